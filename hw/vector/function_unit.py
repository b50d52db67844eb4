# SPDX-License-Identifier: Apache-2.0
"""A function from a table of lines or parabolas."""

from __future__ import annotations

from collections.abc import Sequence

from amaranth.hdl import Array, Cat, Const, Elaboratable, Module
from amaranth.lib import wiring
from amaranth.lib.wiring import In, Out

from speq.hw.common.logic import pipeline_stage
from speq.model.function_tables import FunctionTable


class FunctionUnit(wiring.Component):
    """A function of a fraction by `speq.model.function_tables`, to the bit.

    Formula: ``value = tables[table].value(fraction)``.

    Latency `latency` cycles (3 for lines, 7 for parabolas), a fraction per cycle, no flow control.

    Parameters
    ----------
    tables : sequence of FunctionTable
        One or more of one shape.

    Members
    -------
    fraction : In(index_bits + bits)
    table : In(range(len(tables)))
    value : Out(value_bits + 1)
        In units of 2^-value_bits.
    """

    def __init__(self, tables: Sequence[FunctionTable]) -> None:
        self.tables = tables
        shape = tables[0]
        self.latency = 3 if shape.drop is None else 7
        super().__init__(
            {
                "fraction": In(shape.index_bits + shape.bits),
                "table": In(range(max(2, len(tables)))),
                "value": Out(shape.value_bits + 1),
            }
        )

    def elaborate(self, platform: object) -> Elaboratable:
        m = Module()
        shape = self.tables[0]

        # Coefficients.
        address = self.fraction[shape.bits :]
        if len(self.tables) > 1:
            address = Cat(address, self.table)
        c0, slope, g = pipeline_stage(
            m,
            1,
            c0=self._coefficients("c0")[address],
            slope=self._coefficients("c1")[address],
            g=self.fraction[: shape.bits],
        )
        if shape.drop is not None:
            # A large table becomes block RAM in an FPGA, which leaves no time for anything else.
            (c2,) = pipeline_stage(m, 1, c2=self._coefficients("c2")[address])
            c0, slope, c2, g = pipeline_stage(m, 2, c0=c0, slope=slope, c2=c2, g=g)
            # The slope where g is; it stays positive.
            bend = (g[shape.drop :] * c2) >> shape.shift2
            c0, slope, bend, g = pipeline_stage(m, 3, c0=c0, slope=slope, bend=bend, g=g)
            slope = (slope - bend)[: len(slope)]
            c0, slope, g = pipeline_stage(m, 4, c0=c0, slope=slope, g=g)
            # The wide product in two parts.
            half = len(slope) // 2
            c0, low, high = pipeline_stage(m, 5, c0=c0, low=g * slope[:half], high=g * slope[half:])
            product = low + (high << half)
        else:
            product = g * slope

        # How far the value falls, and the value.
        c0, fall = pipeline_stage(m, self.latency - 1, c0=c0, fall=product >> shape.shift1)
        (value,) = pipeline_stage(m, self.latency, value=(c0 - fall)[: len(self.value)])
        m.d.comb += self.value.eq(value)
        return m

    def _coefficients(self, name: str) -> Array:
        """A coefficient of all intervals of all tables, one table behind the other."""
        rows = [value for table in self.tables for value in getattr(table, name)]
        bits = max(rows).bit_length()
        return Array(Const(value, bits) for value in rows)
