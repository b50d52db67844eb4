# SPDX-License-Identifier: Apache-2.0
"""The number format: lossless for every pattern, and its drafts and planes against slow oracles.

The oracles are per-weight Python and share nothing with `speq.model.format`: the classes of the
remap are written out, the stored word is a string of bits, draft values are fractions, and planes
are read word by word as the module's documentation describes them.
"""

from __future__ import annotations

import os
import warnings
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, seed, settings
from hypothesis import strategies as st

from speq.model.format import EncodedTensor, encode, fit_scale_codes, remap, unmap
from speq.model.number_format import (
    GROUP_SIZES,
    RESIDUAL_BITS,
    SCALE_NUMERATORS,
    SPLITS,
    UNIT_SCALE_CODE,
    FormatConfig,
    draft_levels,
    remap_table,
    smallest_owned,
)

SEED = int(os.environ.get("SPEQ_SEED", "0"))
EVERY_PATTERN = np.arange(1 << 16, dtype=np.uint16)
FORMATS = [FormatConfig(group, split) for group in GROUP_SIZES for split in SPLITS]
TABLES = [config for config in FORMATS if config.group == 64]


def half_exponents(*ts: int) -> list[tuple[int, int]]:
    return [(t, top) for t in ts for top in (1, 0)]


#: Half-exponents (t, top mantissa bit) of classes 7, 6, ..., 0, the largest first, by split.
OWNED = {
    0: [*map(half_exponents, range(7)), half_exponents(7, 8, 9, 10)],
    1: [[(0, 1)], [(0, 0)], *map(half_exponents, range(1, 6)), half_exponents(6, 7, 8, 9)],
    2: [
        *([(0, 1)], [(0, 0)], [(1, 1)], [(1, 0)]),
        *map(half_exponents, range(2, 5)),
        half_exponents(5, 6, 7, 8),
    ],
    3: [
        *([(0, 1)], [(0, 0)], [(1, 1)], [(1, 0)], [(2, 1)], [(2, 0)]),
        half_exponents(3),
        half_exponents(4, 5, 6, 7),
    ],
}
SCALES = [Fraction(n, 16) for n in (12, 13, 14, 15, 16, 18, 20, 22)]


@pytest.fixture
def rng() -> np.random.Generator:
    print(f"SPEQ_SEED={SEED}")
    return np.random.default_rng(SEED)


def half(patterns: np.ndarray) -> torch.Tensor:
    """FP16 tensor of bit patterns."""
    return torch.from_numpy(np.array(patterns, np.uint16).view(np.float16))


def bits(weights: torch.Tensor) -> np.ndarray:
    return weights.contiguous().numpy().view(np.uint16)


def encode_quietly(weights: torch.Tensor, config: FormatConfig, *args, **named) -> EncodedTensor:
    """Encode weights that may hold infinities and NaNs."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        return encode(weights, config, *args, **named)


def mixed_patterns(rng: np.random.Generator, o: int, k: int) -> np.ndarray:
    """Finite patterns; exponents spread over a different range in each row."""
    top = rng.integers(1, 31, (o, 1))
    exponent = np.maximum(top - rng.geometric(0.3, (o, k)) + 1, 0)
    patterns = rng.integers(0, 2, (o, k)) << 15 | exponent << 10 | rng.integers(0, 1 << 10, (o, k))
    return np.where(rng.random((o, k)) < 0.05, patterns & 0x8000, patterns).astype(np.uint16)


# Oracles.


def codes_of(split: int) -> dict[tuple[int, int], tuple[int, int]]:
    """The remap as (t, top mantissa bit) -> (q, r), from the classes written out above."""
    codes, left = {}, {(t, h) for t in range(32) for h in (0, 1)}
    for q, owned in zip(range(7, -1, -1), OWNED[split], strict=True):
        for r, key in enumerate(sorted(owned, key=lambda key: (-key[0], key[1]))):
            codes[key] = q, r
            left.remove(key)
    free = [(q, r) for q in range(8) for r in range(8) if (q, r) not in codes.values()]
    # Spilled: the smallest t first, of one exponent the upper half first.
    codes.update(zip(sorted(left, key=lambda key: (key[0], -key[1])), free, strict=True))
    return codes


CODES = {split: codes_of(split) for split in SPLITS}


def stored_word(pattern: int, base: int, split: int) -> str:
    """The stored word as sixteen characters, the draft code first."""
    # Zero changes places with the power of two at the end of class 0.
    power = max(0, base - max(t for t, _ in OWNED[split][7])) << 10
    if pattern & 0x7FFF in (0, power):
        pattern ^= power
    text = f"{pattern:016b}"
    sign, exponent, mantissa = text[0], int(text[1:6], 2), text[6:]
    q, r = CODES[split][(base - exponent) % 32, int(mantissa[0])]
    return sign + f"{q:03b}{r:03b}" + mantissa[1:]


def level(q: int, split: int) -> Fraction:
    """Draft magnitude of a class relative to 2^(b - 15)."""
    owned = OWNED[split][7 - q]
    t, top = owned[0]
    if q == 0:  # the four exponents from t on
        return Fraction(3, 4) / 2**t
    if len(owned) == 1:
        return (1 + Fraction(top, 2) + Fraction(1, 4)) / 2**t
    return Fraction(3, 2) / 2**t


def draft_value(pattern: int, base: int, scale_code: int, config: FormatConfig) -> Fraction:
    word = stored_word(pattern, base, config.split)
    magnitude = level(int(word[1:4], 2), config.split) * SCALES[scale_code]
    return (-1) ** int(word[0]) * magnitude * Fraction(2) ** (base - 15)


def base_of(group: np.ndarray) -> int:
    return max(int(p) >> 10 & 31 for p in group)


# The tables.


@pytest.mark.parametrize("split", SPLITS)
def test_remap_table_is_the_designs_bijection(split):
    table = remap_table(split)
    assert sorted(table) == list(range(64))
    for (t, top), (q, r) in CODES[split].items():
        assert table[t << 1 | top] == q << 3 | r, (t, top)


def test_remap_tables_classes_written_out():
    """Classes of the design's table, and the first and last spilled half-exponents."""

    def classes(split):
        return [remap_table(split)[t << 1 | top] >> 3 for t in range(12) for top in (1, 0)]

    assert classes(0)[:22] == [7, 7, 6, 6, 5, 5, 4, 4, 3, 3, 2, 2, 1, 1] + [0] * 8
    assert classes(2)[:18] == [7, 6, 5, 4, 3, 3, 2, 2, 1, 1] + [0] * 8
    assert classes(0)[22:] == [1, 1]
    assert classes(2)[18:] == [1] * 6
    assert [remap_table(2)[31 << 1 | top] >> 3 for top in (1, 0)] == [7, 7]


def test_draft_levels_are_the_designs():
    def values(split):
        return [level.value for level in reversed(draft_levels(FormatConfig(64, split)))]

    assert values(2) == [448, 320, 224, 160, 96, 48, 24, 6]  # units of 2^-8
    levels = draft_levels(FormatConfig())[::-1]
    assert [lv.significand for lv in levels] == [7, 5, 7, 5, 6, 6, 6, 6]
    assert [lv.shift for lv in levels] == [6, 6, 5, 5, 4, 3, 2, 0]
    assert values(0) == [1536, 768, 384, 192, 96, 48, 24, 6]  # units of 2^-10


@pytest.mark.parametrize("config", TABLES, ids=str)
def test_draft_levels_lie_in_the_middle_of_what_their_codes_leave_open(config):
    """From all patterns at a base exponent where nothing wraps, spilled weights aside."""
    base = 29
    patterns = EVERY_PATTERN[1 << 10 : 30 << 10]  # normal and positive
    codes = remap(patterns, base, config) >> RESIDUAL_BITS
    # One power of two is drafted like the zero whose place it takes.
    power = base - max(t for t, _ in OWNED[config.split][7]) << 10
    codes[patterns == power] = codes[patterns == power + 1]
    owned = [key for keys in OWNED[config.split] for key in keys]
    spilled = np.array([(base - (p >> 10), p >> 9 & 1) not in owned for p in patterns.tolist()])
    values = patterns.view(np.float16).astype(np.float64)
    unit = 2.0 ** (base - 15 + config.level_unit_exponent)
    levels = draft_levels(config)
    assert len(levels) == 8
    for code, lv in enumerate(levels):
        inside = patterns[(codes == code) & ~spilled]
        low = values[inside - (1 << 10)].min()
        high = (inside + 1).view(np.float16).astype(np.float64).max()  # the interval is half open
        assert low < lv.value * unit < high
        if code:
            assert lv.value * unit == (low + high) / 2
        assert lv.significand < 8


@pytest.mark.parametrize("config", TABLES, ids=str)
def test_zeros_are_drafted_as_the_smallest_level(config):
    """Where they would be spilled, and in exchange for a single power of two."""
    smallest = min(level.value for level in draft_levels(config))
    levels = [level.value for level in draft_levels(config)]
    reach = smallest_owned(config.split)
    assert reach == max(t for t, _ in OWNED[config.split][7])
    for base in range(32):
        words = remap(EVERY_PATTERN, base, config)
        plain = np.array([(base - (p >> 10 & 31)) % 32 << 1 | p >> 9 & 1 for p in (0, 0x8000)])
        classes = np.array(remap_table(config.split))[plain] >> 3
        zeros = words[[0, 0x8000]]
        assert (zeros >> 15 == [0, 1]).all()
        if base <= reach:  # in reach of class 0 already, or it is the largest there is
            assert (zeros >> 12 & 7 == classes).all()
            continue
        codes = (zeros & 0x7FFF) >> RESIDUAL_BITS
        assert [levels[code] for code in codes] == [smallest] * 2
        # The power of two has what would have been the zero's class.
        power = (base - reach) << 10
        assert (words[[power, power | 0x8000]] >> 12 & 7 == classes).all()


# Every pattern.


@pytest.mark.parametrize("config", TABLES, ids=str)
def test_every_pattern_survives_every_base_exponent(config):
    for base in range(32):
        words = remap(EVERY_PATTERN, base, config)
        assert (unmap(words, base, config) == EVERY_PATTERN).all(), f"base exponent {base}"
        # As many words as patterns: nothing but a permutation can be inverted both ways.
        assert (remap(unmap(EVERY_PATTERN, base, config), base, config) == EVERY_PATTERN).all()


@pytest.mark.parametrize("config", TABLES, ids=str)
def test_stored_words_against_the_oracle(config, rng):
    """All signs, exponents and upper mantissas at every base exponent; low bits at random."""
    upper = np.arange(1 << 9) << 7
    base = np.repeat(np.arange(32), len(upper))
    patterns = (np.tile(upper, 32) | rng.integers(0, 1 << 7, len(base))).astype(np.uint16)
    words = remap(patterns, base, config)
    for pattern, b, word in zip(patterns.tolist(), base.tolist(), words.tolist(), strict=True):
        expected = stored_word(pattern, b, config.split)
        assert f"{word:016b}" == expected, f"pattern {pattern:04x}, base exponent {b}"


def patterns_with_every_base(group: int) -> tuple[np.ndarray, np.ndarray]:
    """Each pattern in groups of every base exponent that it can be in, uint16 [O, 8 * group].

    Also returns the base exponents, [O, 8]. A group's leader, which has the base exponent, stands
    at a different place in each group.
    """
    groups, bases = [], []
    for base in range(32):
        patterns = EVERY_PATTERN[base >= (EVERY_PATTERN >> 10 & 31)]
        leader = base << 10
        filled = np.pad(patterns, (0, -len(patterns) % (group - 1)), constant_values=leader)
        rows = filled.reshape(-1, group - 1)
        rows = np.concatenate([np.full((len(rows), 1), leader, np.uint16), rows], axis=1)
        at = (np.arange(group) - np.arange(len(rows))[:, None]) % group
        groups.append(np.take_along_axis(rows, at, axis=1))
        bases.append(np.full(len(rows), base))
    groups, bases = np.concatenate(groups), np.concatenate(bases)
    short = -len(groups) % 8
    groups = np.pad(groups, ((0, short), (0, 0)))
    return groups.reshape(-1, 8 * group), np.pad(bases, (0, short)).reshape(-1, 8)


@pytest.mark.parametrize("group", GROUP_SIZES)
def test_every_pattern_survives_encoding_in_every_group(group, rng):
    patterns, bases = patterns_with_every_base(group)
    scale_codes = rng.integers(0, 8, bases.shape)
    for config in FORMATS:
        if config.group == group:
            tensor = encode_quietly(half(patterns), config, scale_codes)
            assert (bits(tensor.decode()) == patterns).all(), config
            rows = tensor.group_bytes.transpose(0, 2, 1).reshape(-1, 8)[: len(bases)]
            assert (rows == bases | scale_codes << 5).all()


@seed(SEED)
@settings(max_examples=150, deadline=None, derandomize=False, database=None)
@given(
    o=st.integers(1, 300),
    k=st.integers(1, 300),
    columns=st.integers(1, 40),
    config=st.sampled_from(FORMATS),
    kind=st.sampled_from(["arbitrary", "near", "scattered"]),
    fitted=st.booleans(),
    number=st.integers(0, 2**32 - 1),
)
def test_shapes_and_patterns_survive(o, k, columns, config, kind, fitted, number):
    rng = np.random.default_rng(number)
    if kind == "near":
        patterns = mixed_patterns(rng, o, k)
    else:
        patterns = rng.integers(0, 1 << 16, (o, k)).astype(np.uint16)
    weights = half(patterns)
    if kind == "scattered":  # no contiguous memory
        weights = half(np.repeat(patterns.T, 2, axis=0))[::2].T
    codes = None if fitted else rng.integers(0, 8, (o, -(-k // config.group)), dtype=np.uint8)
    tensor = encode_quietly(weights, config, codes, columns=columns)
    assert (bits(tensor.decode()) == patterns).all()
    words = tensor.verify_words()
    assert words.shape == (-(-o // columns), k, columns)
    assert tensor.draft().shape == (o, k)
    assert tensor.shape == (o, k) and tensor.columns == columns


# Memory layout.


def read_column(tensor: EncodedTensor, tile: int, column: int) -> tuple[list[str], list[str]]:
    """Draft codes and residuals of one output row, word by word from the planes."""
    k = tensor.shape[1]
    codes = []
    for word in tensor.draft_plane[tile, :, column]:
        nibbles = f"{int(word):016b}"
        codes += [nibbles[i : i + 4] for i in (12, 8, 4, 0)]
    # In the stream, written with its last bit first, residual i ends 12 * i bits from the right.
    plane = tensor.residual_plane[tile, :, column]
    stream = "".join(f"{int(word):016b}" for word in reversed(plane))
    ends = [len(stream) - 12 * i for i in range(k)]
    return codes, [stream[end - 12 : end] for end in ends]


@pytest.mark.parametrize(("o", "k", "columns"), [(5, 44, 3), (2, 21, 4), (7, 131, 7), (1, 1, 16)])
def test_memory_layout_read_by_hand(o, k, columns, rng):
    config = FormatConfig(32, 2)
    patterns = mixed_patterns(rng, o, k)
    groups, tiles = -(-k // 32), -(-o // columns)
    scale_codes = rng.integers(0, 8, (o, groups))
    tensor = encode(half(patterns), config, scale_codes, columns=columns)
    quads = -(-k // 4)
    shapes = {
        "draft_plane": (tiles, quads, columns),
        "residual_plane": (tiles, 3 * quads, columns),
        "group_bytes": (tiles, groups, columns),
    }
    for plane, shape in shapes.items():
        array = getattr(tensor, plane)
        assert array.shape == shape and array.flags.c_contiguous
    for row in range(tiles * columns):
        tile, column = divmod(row, columns)
        codes, residuals = read_column(tensor, tile, column)
        group_bytes = tensor.group_bytes[tile, :, column]
        if row >= o:  # padding
            assert set("".join(codes + residuals)) == {"0"} and not group_bytes.any()
            continue
        for i in range(groups):
            base = base_of(patterns[row, 32 * i : 32 * i + 32])
            assert int(group_bytes[i]) == scale_codes[row, i] << 5 | base
            for j in range(32 * i, min(32 * i + 32, k)):
                word = stored_word(int(patterns[row, j]), base, 2)
                assert codes[j] + residuals[j] == word, f"row {row}, weight {j}"
                assert f"{tensor.verify_words()[tile, j, column]:016b}" == word


def test_storage_is_counted():
    """16 weights take 16 words; a group of 64 takes a byte more; padding rows count."""
    weights = torch.ones(20, 128, dtype=torch.float16)
    tensor = encode(weights, FormatConfig(), columns=16)
    assert tensor.storage_bits() == 32 * (8 * 16 * 16 + 2 * 8)
    whole = encode(torch.ones(32, 128, dtype=torch.float16), FormatConfig())
    assert whole.storage_bits() / (32 * 128 * 16) == 1 + 1 / 128


# Drafts.


@pytest.mark.parametrize("config", FORMATS, ids=str)
def test_draft_values_against_the_oracle(config, rng):
    o, k = 3, 150
    patterns = mixed_patterns(rng, o, k)
    patterns[1] = rng.integers(0, 31 << 10, k)  # every exponent: many weights are spilled
    scale_codes = rng.integers(0, 8, (o, -(-k // config.group)))
    draft = encode(half(patterns), config, scale_codes, columns=2).draft()
    assert draft.dtype == torch.float32
    for row in range(o):
        for first in range(0, k, config.group):
            group = patterns[row, first : first + config.group]
            base, code = base_of(group), scale_codes[row, first // config.group]
            for j, pattern in enumerate(group.tolist(), start=first):
                expected = draft_value(pattern, base, code, config)
                assert Fraction(draft[row, j].item()) == expected, f"[{row}, {j}] {pattern:04x}"


@pytest.mark.parametrize("config", TABLES, ids=str)
def test_zeros_beside_any_base_exponent_are_drafted_as_the_smallest_level(config):
    """No exact zero becomes one of the large levels."""
    smallest = min(level.value for level in draft_levels(config))
    largest = max(level.value for level in draft_levels(config))
    for base in range(31):
        patterns = np.full((1, 32), 0x8000, np.uint16)
        patterns[0, 0], patterns[0, 1::2] = base << 10 | 0x3FF, 0
        codes = np.full((1, 1), UNIT_SCALE_CODE)
        draft = encode(half(patterns), config, codes).draft()[0].abs()
        zeros, top = draft[1:], draft[0]
        assert len(zeros.unique()) == 1
        if base > 10 - config.split:
            assert zeros[0] / top == pytest.approx(smallest / largest)
        assert zeros[0] <= top


def test_draft_values_are_multiples_of_the_draft_unit(rng):
    for config in TABLES:
        patterns = mixed_patterns(rng, 4, 64)
        patterns[:2] &= 0x83FF  # base exponent 0
        draft = encode(half(patterns), config, rng.integers(0, 8, (4, 1))).draft().double()
        units = draft * 2.0**-config.draft_unit_exponent
        assert (units == units.round()).all()


# Fitted scales.


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("config", FORMATS, ids=str)
def test_fitted_scale_codes_are_the_best_of_eight(config, weighted, rng):
    o, k = 40, 150
    values = rng.standard_t(5, (o, k))
    # Half of the rows have nearly one magnitude, so that the best scale is not always 1.
    values[::2] = rng.choice([-1, 1], (o // 2, k)) * rng.uniform(1, 2, (o // 2, 1))
    values *= 2.0 ** rng.integers(-8, 4, (o, 1)) * rng.normal(1, 0.001, (o, k))
    weights = torch.from_numpy(values.astype(np.float16))
    importance = torch.from_numpy(rng.exponential(1.0, k).astype(np.float32)) if weighted else None
    codes = fit_scale_codes(weights, config, importance)
    groups = -(-k // config.group)
    assert codes.dtype == np.uint8 and codes.shape == (o, groups)
    assert len(set(codes.flat)) >= 4
    errors = []
    for code in range(8):
        every = np.full((o, groups), code)
        error = (weights.double() - encode(weights, config, every).draft().double()) ** 2
        error = error * (1 if importance is None else importance.double())
        padded = np.pad(error.numpy(), ((0, 0), (0, -k % config.group)))
        errors.append(padded.reshape(o, groups, -1).sum(-1))
    fitted = np.take_along_axis(np.array(errors), codes[None].astype(int), 0)[0]
    assert (fitted <= np.min(errors, 0) * (1 + 1e-5)).all()
    if not weighted:
        default = encode(weights, config)
        assert (default.draft() == encode(weights, config, codes).draft()).all()


def test_fitted_scales_of_groups_without_information():
    weights = torch.zeros(2, 128, dtype=torch.float16)
    weights[1, :64] = 1.3
    unimportant = torch.ones(128)
    unimportant[:64] = 0
    codes = fit_scale_codes(weights, FormatConfig(), unimportant)
    assert codes[1, 0] == UNIT_SCALE_CODE
    assert SCALE_NUMERATORS[UNIT_SCALE_CODE] == 16
    # 1.3 in the class [1, 1.5), whose level is 1.25: the best scale is 1.04
    assert fit_scale_codes(weights, FormatConfig())[1].tolist()[0] == UNIT_SCALE_CODE


# Infinities and NaNs.


def test_infinities_and_nans_warn_and_survive(rng):
    patterns = mixed_patterns(rng, 40, 200)
    clean = encode(half(patterns), FormatConfig(), np.full((40, 4), 3)).draft()
    for row, column, pattern in ((17, 130, 0x7C00), (17, 199, 0xFC00), (30, 0, 0x7E01)):
        patterns[row, column] = pattern
    message = r"tensor 'block\.3\.up_proj' .*index \[17, 130\]"
    with pytest.warns(RuntimeWarning, match=message):
        tensor = encode(half(patterns), FormatConfig(), np.full((40, 4), 3), "block.3.up_proj")
    assert (bits(tensor.decode()) == patterns).all()
    draft = tensor.draft()
    lost = torch.zeros(40, 200, dtype=torch.bool)
    lost[17, 128:] = lost[30, :64] = True  # the groups, not the rows
    assert (draft.isnan() == lost).all()
    assert (draft[~lost] == clean[~lost]).all()
    with pytest.warns(RuntimeWarning, match=r"\[0, 0\]"):
        encode(half([[0xFFFF]]), FormatConfig())


def test_finite_tensors_do_not_warn(rng):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for patterns in (mixed_patterns(rng, 5, 70), [[0x7BFF, 0xFBFF]], [[0, 0x8000]], [[1]]):
            encode(half(patterns), FormatConfig())


# Drafts of some rows only.


def test_a_part_of_the_outputs_is_drafted_as_in_the_whole(rng):
    patterns = mixed_patterns(rng, 40, 100)
    whole = encode(half(patterns), FormatConfig(32))
    for rows in (1, 16, 17, 40):
        part = encode(half(patterns), FormatConfig(32), drafted_outputs=rows)
        assert (bits(part.decode()) == patterns).all()
        assert torch.equal(part.draft(), whole.draft()[:rows])


def test_what_a_draft_pass_reads_is_counted():
    """40 rows of 100 weights in groups of 32, tiles of 16 columns."""
    weights = torch.ones(40, 100, dtype=torch.float16)
    draft, residual = 25, 75  # words
    for rows, tiles in ((None, 3), (1, 1), (16, 1), (17, 2), (40, 3)):
        tensor = encode(weights, FormatConfig(group=32), drafted_outputs=rows)
        assert tensor.draft_bits() == tiles * 16 * (draft * 16 + 4 * 8)
        assert tensor.storage_bits() == 3 * 16 * ((draft + residual) * 16 + 4 * 8)
        assert tensor.draft().shape == (rows or 40, 100)


def test_wrong_numbers_of_drafted_outputs_are_refused():
    weights = torch.ones(3, 65, dtype=torch.float16)
    for rows in (0, -1, 4):
        with pytest.raises(ValueError, match=rf"drafted_outputs of 'q' is {rows}; expected 1\.\.3"):
            encode(weights, FormatConfig(), name="q", drafted_outputs=rows)


# Bad arguments.


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"group": 48}, "group is 48; allowed values are 32, 64, 128"),
        ({"split": 4}, "split is 4; allowed values are 0, 1, 2, 3"),
        ({"split": -1}, "split is -1"),
        ({"split": True}, "split is True"),
        ({"group": None}, "group is None"),
        ({"group": 64.0}, r"group is 64\.0"),
    ],
)
def test_impossible_formats_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        FormatConfig(**arguments)


def test_wrong_arguments_are_refused(rng):
    config, weights = FormatConfig(), torch.ones(3, 65, dtype=torch.float16)
    with pytest.raises(TypeError, match=r"weights of 'q' are torch\.float32; expected a torch\.fl"):
        encode(weights.float(), config, name="q")
    with pytest.raises(TypeError, match="weights of 'q' are float16"):
        encode(weights.numpy(), config, name="q")
    for shape in ((3,), (0, 4), (4, 0), (1, 2, 3)):
        with pytest.raises(ValueError, match=r"shape \(.*expected \[O, K\], both >= 1"):
            encode(torch.ones(shape, dtype=torch.float16), config)
    with pytest.raises(ValueError, match=r"scale codes of 'q' are .*\(3, 1\); expected .*\(3, 2\)"):
        encode(weights, config, np.zeros((3, 1), int), "q")
    with pytest.raises(ValueError, match=r"scale codes of 'q' are float64"):
        encode(weights, config, np.zeros((3, 2)), "q")
    for bad in (8, -1):
        codes = np.zeros((3, 2), int)
        codes[1, 1] = bad
        with pytest.raises(ValueError, match=rf"{bad}.*allowed are 0 to 7"):
            encode(weights, config, codes)
    for columns in (0, -3, 2.0):
        with pytest.raises(ValueError, match=rf"columns is {columns}"):
            encode(weights, config, columns=columns)
    with pytest.raises(ValueError, match=r"importance of 'q' has shape \(64,\); expected \[65\]"):
        fit_scale_codes(weights, config, torch.ones(64), "q")
    with pytest.raises(ValueError, match="split is 5"):
        remap_table(5)
    good = encode(weights, config)
    with pytest.raises(ValueError, match=r"draft_plane of 'q' is uint16 .*expected uint16 \(1, 17"):
        EncodedTensor(
            "q", (3, 65), config, 16, good.draft_plane[:, 1:], good.residual_plane, good.group_bytes
        )
    with pytest.raises(ValueError, match=r"group_bytes of 'q' is int64"):
        EncodedTensor(
            "q",
            (3, 65),
            config,
            16,
            good.draft_plane,
            good.residual_plane,
            good.group_bytes.astype(int),
        )
