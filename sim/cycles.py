# SPDX-License-Identifier: Apache-2.0
"""Cycle-by-cycle stimulus for units without flow control, as numpy arrays.

The design under test is a module with the ports `clk`, `stimulus` (all inputs side by side) and
`observed` (all outputs), each a multiple of 64 bits wide: two signals to access in a cycle,
however many copies of a unit it holds.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from amaranth.lib import data
from cocotb.triggers import Timer

WORD_BITS = 64


async def play(dut: object, stimulus: np.ndarray) -> np.ndarray:
    """Apply one row of `stimulus` in each clock cycle and record the outputs of that cycle.

    Parameters
    ----------
    dut : cocotb handle
        The top module, see this module's description.
    stimulus : uint64 array [cycles, words]
        The first word is in the lowest bits.

    Returns
    -------
    uint64 array [cycles, words]
        Outputs before the clock edge that ends the cycle, so that combinational outputs belong to
        the same row's inputs, and a register's are one row late.
    """
    observed = bytearray()
    for row in stimulus.astype("<u8"):
        dut.clk.value = 0
        dut.stimulus.value = int.from_bytes(row.tobytes(), "little")
        await Timer(1, "ns")
        observed += dut.observed.value.to_bytes(byteorder="little")
        dut.clk.value = 1
        await Timer(1, "ns")
    return np.frombuffer(observed, "<u8").reshape(len(stimulus), -1)


def pack(layout: data.StructLayout, fields: Mapping[str, np.ndarray]) -> np.ndarray:
    """Bits of a structure of at most 64 bits, elementwise.

    Parameters
    ----------
    layout : data.StructLayout
    fields : arrays of one shape [...] by field name
        A field that is an array has its elements along one more, last axis. Fields that are not
        given are 0.

    Returns
    -------
    uint64 array [...]
    """
    packed = np.uint64(0)
    for name, values in fields.items():
        place, values = layout[name], values.astype(np.uint64)
        if isinstance(place.shape, data.ArrayLayout):
            elements = [(element.offset, values[..., i]) for i, element in place.shape]
        else:
            elements = [(0, values)]
        for offset, element in elements:
            packed = packed | element << np.uint64(place.offset + offset)
    return packed
