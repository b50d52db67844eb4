# SPDX-License-Identifier: Apache-2.0
"""Operands as they travel through the array, decoded once per row or column and not per PE.

An FP16 number is ``significand * 2^(exponent - 24)`` with the hidden bit in `significand` and
`exponent` the exponent field less one (0 for subnormals). A draft weight is ``significand <<
shift`` level units; a block activation is its 7-bit magnitude.
"""

from __future__ import annotations

from amaranth.lib import data

from speq.hw.engine_config import (
    DRAFT_LANES,
    EXPONENT_BITS,
    FP16_SIGNIFICAND_BITS,
    LANE_BITS,
    EngineConfig,
)
from speq.model.number_format import SCALE_BITS


def weight_layout(config: EngineConfig, *, draft: bool) -> data.StructLayout:
    """A column's operand.

    The significand is cut into one slice per multiplier lane: in verify mode slices of the
    weight's significand, in draft mode the level significands of four weights. `negative` is the
    sign of the weight (draft: of lane 0's) and `invert` says which of lanes 1 to 3 differ from
    lane 0 in sign. `shift` is a lane's shift in level units (verify: 3 in odd lanes).
    """
    members = {"significand": FP16_SIGNIFICAND_BITS, "exponent": EXPONENT_BITS, "negative": 1}
    if draft:
        members |= {
            "significand": DRAFT_LANES * LANE_BITS,
            "shift": data.ArrayLayout(config.level_shift_bits, DRAFT_LANES),
            "invert": DRAFT_LANES - 1,
            "scale": SCALE_BITS,
        }
    return data.StructLayout(members)


def activation_layout(*, draft: bool) -> data.StructLayout:
    """A row's operand, with one magnitude per multiplier lane if the row can draft.

    In verify mode all lanes carry the significand, in draft mode the magnitudes of four block
    activations; `negative` and `invert` are as for weights.
    """
    members = {"exponent": EXPONENT_BITS, "negative": 1}
    if draft:
        members["magnitudes"] = data.ArrayLayout(FP16_SIGNIFICAND_BITS, DRAFT_LANES)
        members["invert"] = DRAFT_LANES - 1
    else:
        members["significand"] = FP16_SIGNIFICAND_BITS
    return data.StructLayout(members)
