# SPDX-License-Identifier: Apache-2.0
"""The matrix engine's configuration: the source of every width of its RTL."""

from __future__ import annotations

from dataclasses import dataclass, field

from amaranth.hdl import unsigned
from amaranth.lib import data, enum

from speq.model.number_format import (
    BASE_BITS,
    NIBBLES_PER_WORD,
    NONFINITE_BASE,
    SCALE_BITS,
    SCALE_NUMERATORS,
    FormatConfig,
    draft_levels,
)

FP16_BITS = 16
FP16_MAX_EXPONENT = 30
FP16_MAX = 65504
FP16_SIGNIFICAND_BITS = 11
#: log2 of the unit of products of two FP16 values.
PRODUCT_UNIT_EXPONENT = -48
#: Bits of an exponent as the PEs take it: field - 1 (0 for subnormals), 0 to 30.
EXPONENT_BITS = 5
#: Magnitude bits of a block activation.
BLOCK_MAGNITUDE_BITS = 7
#: Draft weights in a weight word, hence draft MACs of a PE in a cycle.
DRAFT_LANES = NIBBLES_PER_WORD
#: Weight significand bits that one lane of the shared multiplier takes, and bits of its code.
LANE_BITS = 3

#: One block activation: sign and magnitude.
BLOCK_ACTIVATION = data.StructLayout({"magnitude": BLOCK_MAGNITUDE_BITS, "negative": 1})
#: What one drafting row takes in a draft cycle.
BLOCK_ACTIVATIONS = data.StructLayout(
    {"lanes": data.ArrayLayout(BLOCK_ACTIVATION, DRAFT_LANES), "exponent": EXPONENT_BITS}
)
#: A group's byte: base exponent in the low bits, scale code above.
GROUP_BYTE = data.StructLayout({"base": BASE_BITS, "scale": SCALE_BITS})

_MAX_BLOCK_UNIT = FP16_MAX_EXPONENT - 15 - 6  # log2 of the largest block's unit
_MIN_BLOCK_UNIT = 1 - 15 - 6
_BLOCK_MAX = 2**BLOCK_MAGNITUDE_BITS - 1


class Mode(enum.Enum, shape=unsigned(2)):
    """What the 16 bits of a weight word mean."""

    #: One encoded FP16 weight (sign, q, residual) for every row.
    VERIFY = 0
    #: Four draft codes for the drafting rows.
    DRAFT = 1
    #: One plain FP16 number for every row: the remap is bypassed, no group bytes are taken.
    BYPASS = 2


def check_range(name: str, value: int, low: int, high: int) -> None:
    """Raise ValueError unless `value` is an integer from `low` to `high`."""
    if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
        raise ValueError(f"{name} is {value!r}; allowed are integers from {low} to {high}")


def check_power_of_two(name: str, value: int, low: int, high: int) -> None:
    """Raise ValueError unless `value` is a power of two from `low` to `high`."""
    valid = isinstance(value, int) and not isinstance(value, bool) and low <= value <= high
    if not valid or value & (value - 1):
        raise ValueError(f"{name} is {value!r}; allowed are powers of two from {low} to {high}")


@dataclass(frozen=True)
class EngineConfig:
    """Everything that determines the RTL of the matrix engine.

    Parameters
    ----------
    rows : int
        Rows R of PEs, the tokens that a verify pass can hold: 1 to 64.
    cols : int
        Columns C of PEs, the output channels of a tile: 1 to 256.
    format : FormatConfig
        Number format of the weights.
    draft_rows : int
        Rows 0 .. draft_rows - 1 have draft hardware, the others are FP16-only. 0 builds the
        FP16-only baseline, which has no exponent remap either and takes plain FP16 weights.
    max_k : int
        Largest reduction dimension K, 1 to 65,536. It sets the accumulator's growth bits and the
        depth of the activation store.
    max_o : int
        Largest output dimension O, up to 2^24.

    Raises
    ------
    ValueError
        If a value is out of its range or the RTL does not support it.
    """

    rows: int = 8
    cols: int = 16
    format: FormatConfig = field(default_factory=FormatConfig)
    draft_rows: int = 1
    max_k: int = 2048
    max_o: int = 2**20 - 1

    def __post_init__(self) -> None:
        check_range("rows", self.rows, 1, 64)
        check_range("cols", self.cols, 1, 256)
        check_range("draft_rows", self.draft_rows, 0, self.rows)
        check_range("max_k", self.max_k, 1, 2**16)
        check_range("max_o", self.max_o, 1, 2**24)

    @property
    def accumulator_unit_exponent(self) -> int:
        """log2 of the weight of the accumulator's lowest bit: the finest product of any mode."""
        if not self.draft_rows:
            return PRODUCT_UNIT_EXPONENT
        return min(PRODUCT_UNIT_EXPONENT, self._draft_unit_exponent)

    @property
    def _draft_unit_exponent(self) -> int:
        return self.format.draft_unit_exponent + _MIN_BLOCK_UNIT

    @property
    def accumulator_bits(self) -> int:
        """Width of the signed accumulator: no sum of max_k products of any mode overflows it."""
        largest = FP16_MAX * FP16_MAX << -self.accumulator_unit_exponent
        if self.draft_rows:
            level = max(level.value for level in draft_levels(self.format))
            weight = level * max(SCALE_NUMERATORS)
            top = _MAX_BLOCK_UNIT - _MIN_BLOCK_UNIT + NONFINITE_BASE - 1
            shift = top + self._draft_unit_exponent - self.accumulator_unit_exponent
            largest = max(largest, _BLOCK_MAX * weight << shift)
        return (largest * self.max_k).bit_length() + 1

    @property
    def verify_offset(self) -> int:
        """Accumulator bit of a verify product whose operands have exponent 0."""
        return PRODUCT_UNIT_EXPONENT - self.accumulator_unit_exponent

    @property
    def draft_offset(self) -> int:
        """Accumulator bit of a draft sum in units of `_level_unit` whose block and group have
        exponent 0."""
        unit = self._draft_unit_exponent + self._level_unit
        return unit - self.accumulator_unit_exponent

    @property
    def _level_unit(self) -> int:
        """log2 of the largest power of two that divides all draft levels."""
        return min(odd_part(level.value)[1] for level in draft_levels(self.format))

    @property
    def draft_products(self) -> tuple[tuple[int, int], ...]:
        """For each draft code without its sign an odd multiple and a shift: its level is ``multiple
        << shift`` in units of ``2^_level_unit``."""
        parts = [odd_part(level.value) for level in draft_levels(self.format)]
        return tuple((odd, shift - self._level_unit) for odd, shift in parts)

    @property
    def draft_multiples(self) -> tuple[int, ...]:
        """The odd multiples in `draft_products`, each once."""
        return tuple(sorted({multiple for multiple, _ in self.draft_products}))

    @property
    def column_index_bits(self) -> int:
        """Bits of a number of columns, 0 to cols."""
        return self.cols.bit_length()

    @property
    def row_bits(self) -> int:
        """Bits of a row's index."""
        return max(1, (self.rows - 1).bit_length())

    @property
    def token_bits(self) -> int:
        """Bits of a number of tokens, 0 to rows."""
        return self.rows.bit_length()

    @property
    def k_bits(self) -> int:
        """Bits of a reduction dimension, 0 to max_k."""
        return self.max_k.bit_length()

    @property
    def o_bits(self) -> int:
        """Bits of an output dimension, 0 to max_o."""
        return self.max_o.bit_length()

    @property
    def activation_layout(self) -> data.Layout:
        """One word of the activation store.

        ``verify``: the FP16 activations of all rows for one k. ``draft``: for each drafting row
        the block activations (sign and 7-bit magnitude) of four k and their block's biased
        exponent, 1 to 30, or 31 for a block that holds an infinity or a NaN.
        """
        verify = data.ArrayLayout(FP16_BITS, self.rows)
        if not self.draft_rows:
            return data.StructLayout({"verify": verify})
        draft = data.ArrayLayout(BLOCK_ACTIVATIONS, self.draft_rows)
        return data.UnionLayout({"verify": verify, "draft": draft})

    @property
    def group_layout(self) -> data.Layout:
        """The group bytes of all columns."""
        return data.ArrayLayout(GROUP_BYTE, self.cols)


def odd_part(number: int) -> tuple[int, int]:
    """odd and shift with ``number = odd << shift``; 0 and 0 for 0."""
    shift = max(0, (number & -number).bit_length() - 1)
    return number >> shift, shift
