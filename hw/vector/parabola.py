# SPDX-License-Identifier: Apache-2.0
"""A function from a table of parabolas."""

from __future__ import annotations

from collections.abc import Sequence

from amaranth.hdl import Array, Cat, Const, Elaboratable, Module
from amaranth.lib import wiring
from amaranth.lib.wiring import In, Out

from speq.hw.common.logic import pipeline_stage
from speq.model.function_tables import Parabolas


class Parabola(wiring.Component):
    """A function of a fraction by `speq.model.function_tables`, to the bit.

    Formula: ``value = tables[table].value(fraction)``.

    Latency `LATENCY` cycles, a fraction per cycle, no flow control. Two multipliers: of as many
    bits as `drop` leaves of a fraction behind its index with the second coefficients, and of all
    these bits with the slope.

    Parameters
    ----------
    tables : sequence of Parabolas
        One or more of one shape.

    Members
    -------
    fraction : In(index_bits + bits)
    table : In(range(len(tables)))
    value : Out(value_bits + 1)
        In units of 2^-value_bits.

    Raises
    ------
    ValueError
        If the tables' shapes differ.
    """

    LATENCY = 4

    def __init__(self, tables: Sequence[Parabolas]) -> None:
        if len({table.shape for table in tables}) != 1:
            raise ValueError("tables have different shapes; expected one or more of the same")
        self.tables = tables
        shape = tables[0]
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

        # Stage 1: coefficients.
        address = self.fraction[shape.bits :]
        if len(self.tables) > 1:
            address = Cat(address, self.table)
        c0, c1, c2, g = pipeline_stage(
            m,
            1,
            c0=self._coefficients("c0")[address],
            c1=self._coefficients("c1")[address],
            c2=self._coefficients("c2")[address],
            g=self.fraction[: shape.bits],
        )

        # Stage 2: the slope, which stays positive.
        bend = (g[shape.drop :] * c2) >> shape.shift2
        c0, slope, g = pipeline_stage(m, 2, c0=c0, slope=(c1 - bend)[: len(c1)], g=g)

        # Stage 3: how far the value falls.
        c0, fall = pipeline_stage(m, 3, c0=c0, fall=(g * slope) >> shape.shift1)

        # Stage 4: the value.
        (value,) = pipeline_stage(m, 4, value=(c0 - fall)[: len(self.value)])
        m.d.comb += self.value.eq(value)
        return m

    def _coefficients(self, name: str) -> Array:
        """A coefficient of all intervals of all tables, one table behind the other."""
        rows = [value for table in self.tables for value in getattr(table, name)]
        bits = max(rows).bit_length()
        return Array(Const(value, bits) for value in rows)
