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
E = -ln(1 - U) is exponential and G = -ln(E). Large G, which decide, come from small U. Everything
behind u is a sequence of single FP32 operations as in `speq.model.vector_ops`:

    x         the smaller one of U and 1 - U, its first 24 bits
    E         if U < 1/2: 2 atanh(x / (2 - x)), else -ln(x)
    ln(x)     with x = m 2^n, m in [sqrt(1/2), sqrt(2)): n ln 2 + 2 atanh((m - 1) / (m + 1))
    atanh(s)  s times a polynomial in s^2; quotients by `reciprocal`

What finite resolution leaves: if every G is within d of the exact one, then so is every difference
of two, and each probability is moved by a factor within e^(2 d): the total variation distance from
exact sampling is at most (e^(2 d) - 1) / 2, about d, whatever the vocabulary. d is 2.0e-6 at most,
where G is largest (tests/model/test_gumbel.py measures it); the resolution of U adds 2^-64 a token,
1.5e-14 for 262,144 of them.
"""

from __future__ import annotations

import math

import numpy as np

from speq.model.vector_ops import reciprocal

_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 10
_WORD = 0xFFFFFFFF

_SQRT_2 = np.float32(math.sqrt(2.0))
_LN2_HIGH = np.float32(0.693359375)  # 9 significant bits: times an exponent it is exact
_LN2_LOW = np.float32(-2.12194440e-4)
_ATANH = tuple(np.float32(1.0 / n) for n in (13, 11, 9, 7, 5, 3, 1))  # of s^12, s^10, ... s^0


def philox(counter: np.ndarray, key: tuple[int, int]) -> np.ndarray:
    """Philox4x32-10: four random words, uint32 [..., 4], for each counter uint32 [..., 4]."""
    c0, c1, c2, c3 = (counter[..., i].astype(np.uint64) for i in range(4))
    k0, k1 = key
    for _ in range(_ROUNDS):
        left, right = c0 * np.uint64(_MULTIPLIERS[0]), c2 * np.uint64(_MULTIPLIERS[1])
        c0 = (right >> np.uint64(32)) ^ c1 ^ np.uint64(k0)
        c2 = (left >> np.uint64(32)) ^ c3 ^ np.uint64(k1)
        c1, c3 = right & np.uint64(_WORD), left & np.uint64(_WORD)
        k0, k1 = (k0 + _KEY_STEPS[0]) & _WORD, (k1 + _KEY_STEPS[1]) & _WORD
    return np.stack([c0, c1, c2, c3], axis=-1).astype(np.uint32)


def random_bits(seed: int, position: int, count: int) -> np.ndarray:
    """The 64 bits of tokens 0 .. count - 1 at a position: uint64 [count]."""
    counter = np.zeros((-(-count // 2), 4), np.uint32)
    counter[:, 0] = np.arange(len(counter))
    counter[:, 1] = position
    words = philox(counter, (seed & _WORD, seed >> 32)).astype(np.uint64).reshape(-1, 2)
    return (words[:, 0] << np.uint64(32) | words[:, 1])[:count]


def exponential(bits: np.ndarray) -> np.ndarray:
    """Exponential variables, float32, of bits uint64 of the same shape."""
    is_large = (bits >> np.uint64(63)).astype(bool)  # U is at least 1/2
    x = _fraction(np.where(is_large, ~bits, bits))
    small = _doubled_atanh(x * reciprocal(np.float32(2.0) - x))
    return np.where(is_large, -log(x), small)


def gumbel(seed: int, position: int, count: int) -> np.ndarray:
    """Noise of tokens 0 .. count - 1 for the token at a position: float32 [count].

    Parameters
    ----------
    seed : int
        64 bits.
    position : int
        Tokens before the one that is chosen, below 2^32.
    """
    return -log(exponential(random_bits(seed, position, count)))


def _fraction(bits: np.ndarray) -> np.ndarray:
    """(2 bits + 1) / 2^65 of uint64 below 2^63, its first 24 bits, as float32."""
    # In units of 2^-65, moved up until the highest bit is set.
    zeros = np.zeros(bits.shape, np.int32)
    shifted = bits << np.uint64(1) | np.uint64(1)
    for step in (32, 16, 8, 4, 2, 1):
        high = shifted >> np.uint64(64 - step) == 0
        shifted = np.where(high, shifted << np.uint64(step), shifted)
        zeros += np.where(high, step, 0).astype(np.int32)
    significand = (shifted >> np.uint64(40)).astype(np.int32)  # 24 bits, the first one set
    exponent = 127 - 2 - zeros  # the highest bit of 64 is 2^-2
    return ((exponent << 23) | (significand & 0x7FFFFF)).astype(np.int32).view(np.float32)


def log(x: np.ndarray) -> np.ndarray:
    """Natural logarithm of positive normal float32."""
    bits = x.view(np.int32)
    m = ((bits & 0x7FFFFF) | 0x3F800000).view(np.float32)
    above = m >= _SQRT_2
    m = np.where(above, m * np.float32(0.5), m)
    n = ((bits >> 23) - 127 + above).astype(np.float32)
    s = (m - np.float32(1.0)) * reciprocal(m + np.float32(1.0))
    return n * _LN2_HIGH + (_doubled_atanh(s) + n * _LN2_LOW)


def _doubled_atanh(s: np.ndarray) -> np.ndarray:
    """2 atanh(s), float32, for |s| of at most 1/3."""
    square = s * s
    p = np.full_like(s, _ATANH[0])
    for coefficient in _ATANH[1:]:
        p = p * square + coefficient
    return (s + s) * p
