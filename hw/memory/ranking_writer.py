# SPDX-License-Identifier: Apache-2.0
"""The last ranking, written to memory."""

from __future__ import annotations

from amaranth.hdl import Cat, Const, Elaboratable, Module, Mux, Signal, Value
from amaranth.lib import data, stream, wiring
from amaranth.lib.wiring import In, Out

from speq.hw.accelerator_config import AcceleratorConfig
from speq.hw.common.logic import ceil_div
from speq.hw.memory.memory_writer import write_layout

_WORD_BITS = 32
#: What stands for an entry that does not exist.
_NO_TOKEN = 0xFFFF_FFFF
_NO_LOGIT = 0xFF80_0000


def ranking_row_bytes(config: AcceleratorConfig) -> int:
    """Bytes of a row's pairs in memory."""
    return config.choices * 2 * _WORD_BITS // 8


def ranking_command_layout(config: AcceleratorConfig) -> data.StructLayout:
    """Where the ranking goes, and the number of its rows."""
    return data.StructLayout({"address": config.address_bits, "tokens": config.engine.token_bits})


class RankingWriter(wiring.Component):
    """Write the entries of a `Ranker` to memory: per row, the best first, pairs of index (uint32)
    and FP32 logit, all ones and minus infinity for entries that do not exist.

    Rows follow each other without gaps; of the last beat only the bytes of rows are written. The
    ranker must not be busy or start before `busy` has fallen.

    Flow control: all streams may stall in any cycle. A command is taken when the one before has
    been passed on, and becomes one write command (tokens must not be 0). A row takes two cycles and
    one for each of its beats; there are several rows in a beat of more bits than a row's pairs.

    Parameters
    ----------
    config : AcceleratorConfig

    Members
    -------
    command : In(stream of ranking_command_layout(config))
    row : Out(range(rows))
        The ranker's, while busy.
    entries : In(config.ranking_layout)
        Those of `row` in the cycle before.
    write_command : Out(stream of config.data.command_layout)
    write_data : Out(stream of write_layout(config.data))
    busy : Out(1)
        From the cycle after a command was taken until its last beat has been.
    """

    def __init__(self, config: AcceleratorConfig) -> None:
        self.config = config
        super().__init__(
            {
                "command": In(stream.Signature(ranking_command_layout(config))),
                "row": Out(config.engine.row_bits),
                "entries": In(config.ranking_layout),
                "write_command": Out(stream.Signature(config.data.command_layout)),
                "write_data": Out(stream.Signature(write_layout(config.data))),
                "busy": Out(1),
            }
        )

    def elaborate(self, platform: object) -> Elaboratable:
        m = Module()
        config = self.config
        size = config.data.data_bits
        row_bits = 8 * ranking_row_bytes(config)
        rows_per_beat = max(1, size // row_bits)
        beats_per_row = max(1, row_bits // size)
        write = self.write_data

        tokens = Signal(config.engine.token_bits, reset_less=True)
        is_last_row = self.row + 1 == tokens
        # A beat of rows, or a row of beats, with the marks of the rows that are in it.
        rows = Signal(data.ArrayLayout(row_bits, rows_per_beat), reset_less=True)
        filled = Signal(rows_per_beat)
        slot = self.row[: rows_per_beat.bit_length() - 1]
        part = Signal(range(max(2, beats_per_row)))
        m.d.comb += [
            self.busy.eq(1),
            self.write_command.payload.beats.eq(ceil_div(tokens * beats_per_row, rows_per_beat)),
            write.payload.data.eq(rows),
            write.payload.strobe.eq(
                Cat(bit.replicate(config.data.beat_bytes // rows_per_beat) for bit in filled)
            ),
        ]
        with m.FSM():
            with m.State("IDLE"):
                m.d.comb += [self.busy.eq(0), self.command.ready.eq(1)]
                with m.If(self.command.valid):
                    m.d.sync += [
                        self.row.eq(0),
                        tokens.eq(self.command.payload.tokens),
                        self.write_command.payload.address.eq(self.command.payload.address),
                    ]
                    m.next = "COMMAND"
            with m.State("COMMAND"):
                m.d.comb += self.write_command.valid.eq(1)
                with m.If(self.write_command.ready):
                    m.next = "READ"
            with m.State("READ"):
                m.next = "FILL"
            with m.State("FILL"):
                for i in range(rows_per_beat):
                    with m.If(slot == i):
                        m.d.sync += [rows[i].eq(self._packed()), filled[i].eq(1)]
                with m.If((slot == rows_per_beat - 1) | is_last_row):
                    m.next = "SEND"
                with m.Else():
                    m.d.sync += self.row.eq(self.row + 1)
                    m.next = "READ"
            with m.State("SEND"):
                m.d.comb += write.valid.eq(1)
                with m.If(write.ready):
                    if beats_per_row > 1:
                        m.d.sync += [rows.eq(rows.as_value() >> size), part.eq(part + 1)]
                    with m.If(part == beats_per_row - 1):
                        m.d.sync += [filled.eq(0), self.row.eq(self.row + 1)]
                        m.next = "READ"
                        with m.If(is_last_row):
                            m.next = "IDLE"
        return m

    def _packed(self) -> Value:
        """The entries as they lie in memory."""
        words = []
        for entry in self.entries:
            words.append(Mux(entry.valid, entry.token, Const(_NO_TOKEN, _WORD_BITS)))
            words.append(Mux(entry.valid, entry.logit, Const(_NO_LOGIT, _WORD_BITS)))
        return Cat(words)
