# SPDX-License-Identifier: Apache-2.0
"""The records that the parts of the vector unit exchange."""

from __future__ import annotations

from amaranth.lib import data

from speq.hw.accelerator_config import TOKEN_BITS, AcceleratorConfig
from speq.hw.control.descriptor import Target, VectorOperation
from speq.hw.engine_config import FP16_BITS

#: The operations that go twice through each segment.
TWICE = (VectorOperation.NORM, VectorOperation.SOFTMAX)
#: Operations on the rows of an ATTENTION, batch by batch.
ON_BATCHES = (VectorOperation.SOFTMAX, VectorOperation.NORMALIZE)
#: Operations whose y may be the same for all rows.
BY_CHANNEL = (VectorOperation.ADD, VectorOperation.MULTIPLY, VectorOperation.NORM)
#: Bits of `detail`.
DETAIL_BITS = 32


def segment_bits(config: AcceleratorConfig) -> int:
    """Bits of a number of segments, 0 to the most query heads."""
    return config.query_heads.bit_length()


def vector_tiles_bits(config: AcceleratorConfig) -> int:
    """Bits of a number of tiles of a row."""
    return (-(-config.engine.max_k // config.engine.cols)).bit_length()


def vector_command_layout(config: AcceleratorConfig) -> data.StructLayout:
    """A VECTOR descriptor, checked, and the pass that it is part of: `rows` rows behind `position`
    KV entries, or the move of entry `source` to `position`. The members are those of
    `speq.hw.control.descriptor.FORMS`."""
    engine, address = config.engine, config.address_bits
    return data.StructLayout(
        {
            "operation": VectorOperation,
            "target": Target,
            "values": 1,
            "sharing": 8,
            "k": engine.k_bits,
            "o": segment_bits(config),
            "argument": 32,
            "detail": DETAIL_BITS,
            "first": address,
            "second": address,
            "results": address,
            "outer": address,
            "inner": address,
            "rows": engine.token_bits,
            "position": engine.k_bits,
            "source": engine.k_bits,
        }
    )


def shape_layout(config: AcceleratorConfig) -> data.StructLayout:
    """What a vector operation goes through: for each of `segments` segments (1 or more), of `tiles`
    tiles (1 or more), of `rows` rows (the last segment: `last_rows`; 1 or more), the words of a
    row, C / lanes of `lanes` elements. All parts of the vector unit take it in this order."""
    return data.StructLayout(
        {
            "segments": segment_bits(config),
            "tiles": vector_tiles_bits(config),
            "rows": config.engine.token_bits,
            "last_rows": config.engine.token_bits,
        }
    )


def rows_layout(config: AcceleratorConfig) -> data.ArrayLayout:
    """Of each row of a pass its token, its depth (position less that of the first row) and the row
    that it follows (row 0: 0)."""
    engine = config.engine
    return data.ArrayLayout(
        data.StructLayout(
            {"token": TOKEN_BITS, "depth": engine.row_bits, "parent": engine.row_bits}
        ),
        engine.rows,
    )


def result_word_layout(config: AcceleratorConfig) -> data.StructLayout:
    """A word of results, as FP32 and rounded to FP16; a target needs one of the two."""
    return data.StructLayout(
        {
            "fp32": data.ArrayLayout(32, config.lanes),
            "fp16": data.ArrayLayout(FP16_BITS, config.lanes),
        }
    )
