# SPDX-License-Identifier: Apache-2.0
"""The bit-shared number format: a 4-bit draft model inside FP16 weights.

An FP16 weight is a sign, a 5-bit exponent field e and a 10-bit mantissa m. A *group* is `group`
consecutive weights along K (the reduction dimension) of one output row; the last group of a row
may be shorter. The group's base exponent b is its largest exponent field, and t = b - e (mod 32).
A *half-exponent* is the pair (t, top mantissa bit): 64 of them cover every magnitude. The
exponent remap is a bijection from half-exponents to (q, r), the 3-bit draft magnitude code and a
3-bit slot, so that a weight is stored, losslessly, as the 16-bit word

    bit   15   14..12   11..9    8..0
           s     q        r     m[8:0]

The top 4 bits are the *draft code*, the rest is the *residual*.

An exact zero would spill as well (t = b), into a class that is far too large for it, and
checkpoints that were once quantised have many zeros. So in groups with b beyond the last exponent
that class 0 owns, the pattern of zero changes places with that exponent's power of two
(`smallest_owned`), which is as rare as any single pattern.

Source: "From Quarter to All" (arXiv 2510.18525) for the idea of remapping exponents so that 4 of
the 16 bits are a usable draft; the table with split exponents, the base exponent per group and
the scale codes are this project's.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

GROUP_SIZES = (32, 64, 128)
SPLITS = (0, 1, 2, 3)
#: Bits of a weight in and outside its draft code.
DRAFT_BITS, RESIDUAL_BITS = 4, 12

BASE_BITS = 5
SCALE_BITS = 3
#: Scale of a group's draft levels by scale code, in sixteenths.
SCALE_NUMERATORS = (12, 13, 14, 15, 16, 18, 20, 22)
SCALE_DENOMINATOR = 16
#: The scale code of 1.0.
UNIT_SCALE_CODE = SCALE_NUMERATORS.index(SCALE_DENOMINATOR)
#: The base exponent of a group that holds an infinity or a NaN.
NONFINITE_BASE = 31
#: Weights in one 16-bit word of draft nibbles.
NIBBLES_PER_WORD = 4


def _check_member(name: str, value: int, allowed: tuple[int, ...]) -> None:
    if type(value) is not int or value not in allowed:
        raise ValueError(f"{name} is {value!r}; allowed values are {', '.join(map(str, allowed))}")


@dataclass(frozen=True)
class FormatConfig:
    """Parameters of the number format.

    Parameters
    ----------
    group : int
        Weights that share a base exponent and a draft scale: 32, 64 or 128.
    split : int
        How many of the largest exponents of a group are told apart by their top mantissa bit in
        the draft: 0 to 3.

    Raises
    ------
    ValueError
        If a value is not one of those listed.
    """

    group: int = 64
    split: int = 2

    def __post_init__(self) -> None:
        _check_member("group", self.group, GROUP_SIZES)
        _check_member("split", self.split, SPLITS)

    @property
    def level_unit_exponent(self) -> int:
        """log2 of the unit of draft levels, relative to 2^(b - 15)."""
        return -(10 - self.split)

    @property
    def draft_unit_exponent(self) -> int:
        """log2 of a unit that every finite draft value is a multiple of (b = 0, with scale)."""
        return self.level_unit_exponent - 15 - 4


@cache
def remap_table(split: int) -> tuple[int, ...]:
    """The exponent remap as 64 codes ``q << 3 | r``, indexed by ``t << 1 | top mantissa bit``.

    The `split` largest exponents own one class per half, then one exponent owns a class, and
    class 0 owns the next four. Half-exponents that are left spill into the free slots of classes
    1, 2, ..., the largest first. It is a bijection on 0..63.
    """
    _check_member("split", split, SPLITS)
    halves = [(t, half) for t in range(32) for half in (1, 0)]  # falling magnitude
    sizes = [1] * (2 * split) + [2] * (7 - 2 * split) + [8]  # of classes 7, 6, ..., 0
    codes = {}
    free = {}
    for q, size in zip(range(7, -1, -1), sizes, strict=True):
        owned, halves = halves[:size], halves[size:]
        # Slots count upwards with magnitude, so r continues the significand inside its class.
        for r, key in enumerate(reversed(owned)):
            codes[key] = q << 3 | r
        free[q] = range(size, 8)
    slots = (q << 3 | r for q in range(1, 8) for r in free[q])
    codes.update(zip(halves, slots, strict=True))
    return tuple(codes[t, half] for t in range(32) for half in (0, 1))


def smallest_owned(split: int) -> int:
    """The largest t that class 0 owns: a half of it is drafted as the smallest level."""
    _check_member("split", split, SPLITS)
    return 10 - split


@dataclass(frozen=True)
class Level:
    """One draft magnitude: ``significand << shift`` units of 2^(b - 15 + level_unit_exponent)."""

    significand: int
    shift: int

    @property
    def value(self) -> int:
        """The level as an integer number of units."""
        return self.significand << self.shift


@cache
def draft_levels(config: FormatConfig) -> tuple[Level, ...]:
    """The draft magnitudes, indexed by a draft code without its sign, q.

    A class of one half-exponent [1.5, 2) or [1, 1.5) and a class of one exponent [1, 2) are
    represented by their middle. Class 0, four exponents, is 0.75 of its largest.
    """
    top = 8 - config.split  # shift of the largest exponent's 3-bit significands
    levels = [Level(6, 0)]
    for q in range(1, 8):
        if q > 7 - 2 * config.split:
            t, half = divmod(7 - q, 2)
            levels.append(Level(5 if half else 7, top - t))
        else:
            levels.append(Level(6, top - (7 - q - config.split)))
    return tuple(levels)


def draft_words(k: int) -> int:
    """16-bit words of a column's draft plane for K weights."""
    return -(-k // NIBBLES_PER_WORD)


def residual_words(k: int) -> int:
    """16-bit words of a column's residual plane for K weights (K padded to a multiple of 4)."""
    return 3 * draft_words(k)
