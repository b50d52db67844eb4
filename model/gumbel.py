# SPDX-License-Identifier: Apache-2.0
"""Gumbel noise that depends on seed, position and token alone, to the bit.

The largest of logits / T + G, with G independent Gumbel variables, is a token drawn from the
softmax of logits / T (Gumbel, "Statistical Theory of Extreme Values", 1954; Maddison et al., "A*
Sampling", 2014). Here the noise of a token at a position is a function of the seed, so that whoever
knows the logits knows the token: a draft that uses the same noise proposes what the target will
choose wherever their logits agree, and the sampled text does not depend on drafts (Daliri et al.,
"Coupling without Communication and Drafter-Invariant Speculative Decoding", 2024).

The bits are those of Philox4x32-10 (Salmon et al., "Parallel Random Numbers: As Easy as 1, 2, 3",
2011): one call for two neighbouring tokens,

    counter   (token >> 1, position, 0, 0)
    key       (low, high word of the seed)
    u         words 0 and 1 of the result for even tokens, 2 and 3 for odd ones, the first above
              the second: 64 bits

U = (2 u + 1) / 2^65 is uniform and neither 0 nor 1; its resolution near 0 is that of 2^-65. Then
G = -ln(-ln(1 - U)). Large G, which decide, come from small U. Everything behind u is integers, in
units of 2^-24 up to the last step, as a small pipeline computes them:

    x      2 v + 1 with v the smaller one of u and 2^64 - 1 - u
    y      -ln(x / 2^65): with x = m 2^n, m in [1, 2), it is (65 - n) ln 2 - ln m
    small  u < 2^63: G = y - c(x / 2^65), where c(u) = ln(-ln(1 - u) / u)
    large  else: y itself is exponential; with y = m 2^n, G = -n ln 2 - ln m
    noise  G rounded to a multiple of 2^-18, halves up: with |G| < 46 an FP32 number

ln m and c are looked up: 64 polynomials of degree 2 each (`speq.model.noise_format`), of the first
22 bits of m's fraction and of 2 U.

What finite resolution leaves: if every G is within d of the exact one, then so is every difference
of two to within 2 d, and each probability is moved by a factor within e^(2 d): the total variation
distance from exact sampling is at most (e^(2 d) - 1) / 2, about d, whatever the vocabulary. d is
2.3e-6 at most (tests/model/test_gumbel.py measures it); 1.9e-6 of it is the last step. The
resolution of U adds 2^-64 a token, 1.5e-14 for 262,144 of them.
"""

from __future__ import annotations

from functools import cache

import numpy as np

from speq.model.noise_format import (
    FRACTION_BITS,
    KEY_STEPS,
    LN_2,
    MULTIPLIERS,
    NOISE_FRACTION_BITS,
    PLACE_BITS,
    ROUNDS,
    SEGMENT_BITS,
    correction_table,
    logarithm_table,
)

_WORD = 0xFFFFFFFF
_DOUBLE_FRACTION_BITS, _DOUBLE_BIAS = 52, 1023
#: Those of 64 bits that it holds whatever they are.
_HELD = 0xFFFF_FFFF_FFFF_F800
_ARGUMENT_BITS = SEGMENT_BITS + PLACE_BITS
#: Tokens whose noise is computed at once: what lies between the steps stays in the cache.
_CHUNK = 8192


def philox(counter: np.ndarray, key: tuple[int, int]) -> np.ndarray:
    """Philox4x32-10: four random words, uint32 [..., 4], for each counter uint32 [..., 4]."""
    c0, c1, c2, c3 = (counter[..., i].astype(np.uint64) for i in range(4))
    k0, k1 = key
    for _ in range(ROUNDS):
        left, right = c0 * np.uint64(MULTIPLIERS[0]), c2 * np.uint64(MULTIPLIERS[1])
        c0 = (right >> np.uint64(32)) ^ c1 ^ np.uint64(k0)
        c2 = (left >> np.uint64(32)) ^ c3 ^ np.uint64(k1)
        c1, c3 = right & np.uint64(_WORD), left & np.uint64(_WORD)
        k0, k1 = (k0 + KEY_STEPS[0]) & _WORD, (k1 + KEY_STEPS[1]) & _WORD
    return np.stack([c0, c1, c2, c3], axis=-1).astype(np.uint32)


def random_bits(seed: int, position: int, count: int) -> np.ndarray:
    """The 64 bits of tokens 0 .. count - 1 at a position: uint64 [count]."""
    counter = np.zeros((-(-count // 2), 4), np.uint32)
    counter[:, 0] = np.arange(len(counter))
    counter[:, 1] = position
    words = philox(counter, (seed & _WORD, seed >> 32)).astype(np.uint64).reshape(-1, 2)
    return (words[:, 0] << np.uint64(32) | words[:, 1])[:count]


def transform(bits: np.ndarray) -> np.ndarray:
    """The noise G, float32, of bits uint64 of the same shape."""
    is_large = bits >> np.uint64(63) != 0
    x = np.where(is_large, ~bits, bits) << np.uint64(1) | np.uint64(1)
    # Truncated to what a float64 holds; that has the leading one and the fraction apart.
    held = np.where(x >> np.uint64(_DOUBLE_FRACTION_BITS + 1), x & np.uint64(_HELD), x)
    exponent, fraction = _leading_one(held)
    y = (65 - exponent) * LN_2 - _looked_up(fraction)
    exponent, fraction = _leading_one(y)
    doubled = (x >> np.uint64(64 - _ARGUMENT_BITS)).astype(np.int64)
    argument = np.where(is_large, fraction, doubled | 1 << _ARGUMENT_BITS)
    noise = np.where(is_large, (FRACTION_BITS - exponent) * LN_2, y) - _looked_up(argument)
    dropped = FRACTION_BITS - NOISE_FRACTION_BITS
    noise = (noise + (1 << dropped - 1)) >> dropped
    return noise.astype(np.float32) * np.float32(2.0**-NOISE_FRACTION_BITS)


def gumbel(seed: int, position: int, count: int) -> np.ndarray:
    """Noise of tokens 0 .. count - 1 for the token at a position: float32 [count].

    Parameters
    ----------
    seed : int
        64 bits.
    position : int
        Tokens before the one that is chosen, below 2^32.
    """
    bits = random_bits(seed, position, count)
    noise = np.empty(count, np.float32)
    for first in range(0, count, _CHUNK):
        part = slice(first, first + _CHUNK)
        noise[part] = transform(bits[part])
    return noise


def _leading_one(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The place of the leading one of positive integers that float64 holds exactly, and the first
    bits behind it, as many as the tables take: int64 each."""
    double = x.astype(np.float64).view(np.int64)
    fraction = double >> _DOUBLE_FRACTION_BITS - _ARGUMENT_BITS & (1 << _ARGUMENT_BITS) - 1
    return (double >> _DOUBLE_FRACTION_BITS) - _DOUBLE_BIAS, fraction


@cache
def _coefficients() -> np.ndarray:
    """Both tables, that of the logarithm first, int64 [3, 2 * segments]."""
    return np.array(logarithm_table() + correction_table(), np.int64).T.copy()


def _looked_up(argument: np.ndarray) -> np.ndarray:
    """The polynomial of the argument's part at its place in it, int64."""
    segment, place = argument >> PLACE_BITS, argument & (1 << PLACE_BITS) - 1
    c0, c1, c2 = (each.take(segment) for each in _coefficients())
    return c0 + ((c1 + (c2 * place >> PLACE_BITS)) * place >> PLACE_BITS)
