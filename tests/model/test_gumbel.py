# SPDX-License-Identifier: Apache-2.0
"""Noise of sampled decoding: published vectors, float64 and exact probabilities."""

from __future__ import annotations

import math
import os

import numpy as np
import pytest
import torch

from speq.model import gumbel as module
from speq.model.gumbel import gumbel, philox, random_bits, transform
from speq.model.noise_format import (
    FRACTION_BITS,
    PLACE_BITS,
    SEGMENTS,
    correction_table,
    logarithm_table,
)

SEED = int(os.environ.get("SPEQ_SEED", "0"))
#: Largest distance of G from the exact one, and so about that of sampling from exact sampling.
DISTANCE = 2.3e-6

#: Counter, key and result of the known answers that come with Random123 (kat_vectors).
ANSWERS = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


@pytest.mark.parametrize(("counter", "key", "answer"), ANSWERS)
def test_known_answers_of_the_generator(counter, key, answer):
    assert philox(np.array([counter], np.uint32), key)[0].tolist() == list(answer)


def test_bits_of_tokens():
    """Two tokens share a call; seed and position are where they belong."""
    seed, position = 0x299F31D0A4093822, 77
    bits = random_bits(seed, position, 9)
    assert bits.dtype == np.uint64 and bits.shape == (9,)
    for token in range(9):
        counter = np.array([[token >> 1, position, 0, 0]], np.uint32)
        words = philox(counter, (0xA4093822, 0x299F31D0))[0].tolist()
        high, low = words[2 * (token & 1) :][:2]
        assert int(bits[token]) == high << 32 | low
    assert np.array_equal(random_bits(seed, position, 4), bits[:4])


def some_bits(count: int) -> np.ndarray:
    """64 bits of all magnitudes, near 0 and near 2^64 as well, and on both sides of every place at
    which a table's next polynomial begins."""
    rng = np.random.default_rng(SEED)
    bits = rng.integers(0, 2**64, count, np.uint64, endpoint=False)
    bits >>= rng.integers(0, 64, count).astype(np.uint64)
    # Parts of both tables' arguments: of every magnitude, and of 2 U.
    edges = {SEGMENTS + part << shift for part in range(SEGMENTS) for shift in range(57)}
    edges |= {part << 57 for part in range(2 * SEGMENTS)}
    # Parts of the exponential variable's logarithm.
    parts = np.exp2(np.arange(-SEGMENTS, 6 * SEGMENTS) / SEGMENTS)
    edges |= {int(x * 2.0**64) for x in np.exp(-parts) if x <= 0.5}
    near = {edge + i for edge in edges for i in (-2, -1, 0, 1)} | {0, 1, 2, 2**63 - 1}
    near = np.array([edge for edge in near if 0 <= edge < 2**64], np.uint64)
    return np.concatenate([near, ~near, bits, ~bits])


def exact_exponential(bits: np.ndarray) -> np.ndarray:
    """-ln(1 - U) in float64, U = (2 bits + 1) / 2^65, from the smaller one of U and 1 - U."""
    is_large = bits >= 2**63
    least = np.where(is_large, ~bits, bits)
    x = least.astype(np.float64) * 2.0**-64 + 2.0**-65
    return np.where(is_large, -np.log(x), -np.log1p(-x))


def test_tables():
    """Every polynomial is near its function at any place, and its integers are as wide as the
    hardware's (the second one of the sum, with its part of the third, has 18 bits)."""

    def corrections(x: np.ndarray) -> np.ndarray:
        return np.log(-np.log1p(-x / 2) / (x / 2))

    for table, function in ((logarithm_table(), np.log1p), (correction_table(), corrections)):
        assert len(table) == SEGMENTS
        place = np.linspace(1e-6, 1 - 1e-6, 1001)
        for segment, (c0, c1, c2) in enumerate(table):
            exact = function((segment + place) / SEGMENTS) * 2.0**FRACTION_BITS
            loss = 0.5 + place / 2  # of the shifts, on average
            assert np.abs(c0 + (c1 + c2 * place) * place - loss - exact).max() < 3.5
            assert 0 <= c0 < 1 << FRACTION_BITS and 0 <= c1 < 1 << 18 and -(1 << 11) <= c2 < 1 << 11
            r = np.array([0, (1 << PLACE_BITS) - 1])
            inner = c1 + (c2 * r >> PLACE_BITS)
            assert inner.min() >= 0 and inner.max() < 1 << 18


def test_noise_is_within_its_distance():
    bits = some_bits(1_000_000)
    exact = -np.log(exact_exponential(bits))
    got = transform(bits)
    assert got.dtype == np.float32
    noise = np.abs(got - exact).max()
    print(f"largest distance of G: {noise:.2e}; total variation: {math.expm1(2 * noise) / 2:.2e}")
    assert noise < DISTANCE


def test_noise_is_that_of_single_integers():
    """The definition's steps with integers of any length, and the same whatever the count."""
    bits = some_bits(3000)
    rng = np.random.default_rng(SEED)
    bits = rng.permutation(bits)[:20_000]
    expected = [noise_of(int(u)) for u in bits]
    assert (transform(bits) * 2.0**18).tolist() == expected
    whole = gumbel(SEED, 5, 20_001)
    assert whole[:9999].tobytes() == gumbel(SEED, 5, 9999).tobytes()
    assert whole.tobytes() == transform(random_bits(SEED, 5, 20_001)).tobytes()


def noise_of(u: int) -> int:
    """The noise of 64 bits in units of 2^-18."""
    x = 2 * min(u, 2**64 - 1 - u) + 1
    y = (66 - x.bit_length()) * 11629080 - polynomial(logarithm_table(), *split(x))
    if u < 2**63:
        g = y - polynomial(correction_table(), x >> 58, x >> 42 & 0xFFFF)
    else:
        g = (25 - y.bit_length()) * 11629080 - polynomial(logarithm_table(), *split(y))
    return (g + 32) // 64


def split(x: int) -> tuple[int, int]:
    """The 6 bits behind the leading one, and the 16 behind them."""
    behind = (x << 64 >> x.bit_length() - 1) & 2**64 - 1
    return behind >> 58, behind >> 42 & 0xFFFF


def polynomial(table: tuple, segment: int, r: int) -> int:
    c0, c1, c2 = table[segment]
    return c0 + ((c1 + (c2 * r >> 16)) * r >> 16)


def test_noise_has_its_distribution():
    """Kolmogorov's test of a million variables, and moments of neighbours."""
    rows = np.stack([gumbel(SEED + 3, position, 1000) for position in range(1000)])
    u = np.sort(np.exp(-np.exp(-rows.astype(np.float64))).reshape(-1))
    steps = np.arange(1, len(u) + 1) / len(u)
    assert np.abs(u - steps).max() < 2.2 / math.sqrt(len(u))  # p = 1e-4
    centred = rows - rows.mean()
    for a, b in ((centred[1:], centred[:-1]), (centred[:, 1:], centred[:, :-1])):
        correlation = (a * b).mean() / centred.var()
        assert abs(correlation) < 4.5 / 1000
    other = gumbel(SEED + 4, 0, 1000)
    assert abs(np.corrcoef(rows[0], other)[0, 1]) < 4.5 / math.sqrt(1000)


def draws(noise, logits: np.ndarray, groups: int, positions: int = 100) -> np.ndarray:
    """How often each token was the largest, by the one at the position before: int [V, V].

    Each of `groups` groups of neighbouring tokens is a vocabulary of its own.
    """
    rows = [noise(SEED + 9, place, groups * len(logits)) for place in range(positions)]
    scores = np.stack(rows).reshape(positions, groups, len(logits)) + logits
    tokens = scores.argmax(axis=2)
    pairs = tokens[:-1] * len(logits) + tokens[1:]
    return np.bincount(pairs.reshape(-1), minlength=len(logits) ** 2).reshape(2 * (len(logits),))


def chi_square(counts: np.ndarray, p: np.ndarray) -> float:
    """p-value of counts [N, V], rows independent of each other, against probabilities [V]."""
    counts = counts[counts.sum(axis=1) > 0]
    expected = counts.sum(axis=1, keepdims=True) * p
    statistic = ((counts - expected) ** 2 / expected).sum()
    half = torch.tensor([len(counts) * (len(p) - 1) / 2, statistic / 2], dtype=torch.float64)
    return float(torch.special.gammaincc(*half))


LOGITS = np.float32([0.5, 2.0, 1.0, -1.0, 1.5])
PROBABILITIES = np.exp(LOGITS.astype(np.float64)) / np.exp(LOGITS.astype(np.float64)).sum()


def test_draws_have_the_probabilities_whatever_was_drawn_before():
    counts = draws(gumbel, LOGITS, 2000)
    assert counts.sum() == 2000 * 99
    assert chi_square(counts, PROBABILITIES) > 1e-5


def test_a_token_left_out_of_the_counter_is_noticed(monkeypatch):
    """All tokens with the bits of the first: no noise at all."""

    def same(seed: int, position: int, count: int) -> np.ndarray:
        return np.repeat(random_bits(seed, position, 1), count)

    monkeypatch.setattr(module, "random_bits", same)
    assert chi_square(draws(gumbel, LOGITS, 100), PROBABILITIES) < 1e-5


def test_a_position_left_out_of_the_counter_is_noticed():
    def same(seed: int, position: int, count: int) -> np.ndarray:
        return gumbel(seed, position // 2, count)

    assert chi_square(draws(same, LOGITS, 200), PROBABILITIES) < 1e-5
