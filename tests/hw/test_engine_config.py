# SPDX-License-Identifier: Apache-2.0
"""The accelerator's configuration: what it refuses, and widths against independent worst cases."""

from __future__ import annotations

import itertools
import re
from fractions import Fraction

import pytest

from speq.hw import EngineConfig
from speq.model.number_format import FormatConfig

CONFIGS = [
    EngineConfig(rows=rows, draft_rows=draft_rows, max_k=max_k, format=FormatConfig(split=split))
    for (rows, draft_rows), max_k, split in itertools.product(
        ((1, 0), (1, 1), (8, 0), (8, 1), (8, 8)), (1, 3, 2048, 4096, 65536), range(4)
    )
]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"rows": 0}, "rows is 0; allowed are integers from 1 to 64"),
        ({"rows": 65}, "rows is 65; allowed are integers from 1 to 64"),
        ({"rows": 2.0}, "rows is 2.0; allowed are integers from 1 to 64"),
        ({"rows": True}, "rows is True; allowed are integers from 1 to 64"),
        ({"cols": 0}, "cols is 0; allowed are integers from 1 to 256"),
        ({"cols": 257}, "cols is 257; allowed are integers from 1 to 256"),
        ({"cols": "16"}, "cols is '16'; allowed are integers from 1 to 256"),
        ({"draft_rows": -1}, "draft_rows is -1; allowed are integers from 0 to 8"),
        ({"rows": 2, "draft_rows": 3}, "draft_rows is 3; allowed are integers from 0 to 2"),
        ({"max_k": 0}, "max_k is 0; allowed are integers from 1 to 65536"),
        ({"max_k": 65537}, "max_k is 65537; allowed are integers from 1 to 65536"),
        ({"max_o": 0}, "max_o is 0; allowed are integers from 1 to 16777216"),
        ({"max_o": 2**24 + 1}, "max_o is 16777217; allowed are integers from 1 to 16777216"),
    ],
)
def test_impossible_values_are_named_with_the_allowed_ones(
    arguments: dict[str, object], message: str
) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        EngineConfig(**arguments)


def draft_levels(split: int) -> list[Fraction]:
    """Draft magnitudes relative to 2^(b - 15), from the table of the format's definition."""
    halves = [Fraction(7, 4) / 2**t for t in range(split)]
    halves += [Fraction(5, 4) / 2**t for t in range(split)]
    whole = [Fraction(3, 2) / 2**t for t in range(split, 7 - split)]
    return [*halves, *whole, Fraction(3, 4) / 2 ** (7 - split)]


def draft_products(split: int, *, largest: bool) -> list[Fraction]:
    """Products of a draft weight and a block activation with the extreme group and block."""
    scales = [Fraction(n, 16) for n in (12, 13, 14, 15, 16, 18, 20, 22)]
    base, block = (30, 30) if largest else (0, 1)
    mantissa = 127 if largest else 1
    unit = mantissa * Fraction(2) ** (base - 15) * Fraction(2) ** (block - 15 - 6)
    return [level * scale * unit for level in draft_levels(split) for scale in scales]


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_the_accumulator_holds_every_sum_and_has_no_bit_more(config: EngineConfig) -> None:
    products = [Fraction(65504) ** 2]
    if config.draft_rows:
        products += draft_products(config.format.split, largest=True)
    worst = config.max_k * max(products) / Fraction(2) ** config.accumulator_unit_exponent
    assert worst.denominator == 1
    assert worst < 2 ** (config.accumulator_bits - 1)
    assert worst >= 2 ** (config.accumulator_bits - 2)


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_every_product_is_a_whole_number_of_accumulator_units(config: EngineConfig) -> None:
    unit = Fraction(2) ** config.accumulator_unit_exponent
    products = [Fraction(1, 2**48)]
    if config.draft_rows:
        products += draft_products(config.format.split, largest=False)
    assert all((product / unit).denominator == 1 for product in products)
    assert config.verify_offset >= 0
    assert not config.draft_rows or config.draft_offset >= 0


def test_more_terms_need_log2_more_bits() -> None:
    bits = [EngineConfig(max_k=2**n).accumulator_bits for n in range(17)]
    assert [b - bits[0] for b in bits] == list(range(17))


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_index_widths_hold_their_largest_value_and_no_bit_more(config: EngineConfig) -> None:
    for bits, largest in (
        (config.token_bits, config.rows),
        (config.column_index_bits, config.cols),
        (config.k_bits, config.max_k),
        (config.o_bits, config.max_o),
    ):
        assert 2 ** (bits - 1) <= largest < 2**bits


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_an_activation_word_holds_either_mode(config: EngineConfig) -> None:
    verify = config.rows * 16
    draft = config.draft_rows * (4 * 8 + 5)  # four signs and magnitudes, one exponent
    assert config.activation_layout.size == max(verify, draft)
    assert config.group_layout.size == 8 * config.cols
