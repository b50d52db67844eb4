# SPDX-License-Identifier: Apache-2.0
"""The tokens of a pass's rows, from memory."""

from __future__ import annotations

from dataclasses import replace

from amaranth.hdl import Cat, Const, Elaboratable, Module, ResetInserter, Signal
from amaranth.lib import data, stream, wiring
from amaranth.lib.wiring import In, Out

from speq.hw.accelerator_config import TOKEN_BITS, AcceleratorConfig
from speq.hw.common.ram import Ram
from speq.hw.memory.axi import AxiConfig, guarded_members
from speq.hw.memory.tile_reader import TileReader

_WORD_BITS = 32
_WORD_BYTES = _WORD_BITS // 8


def token_command_layout(config: AcceleratorConfig) -> data.StructLayout:
    """Tokens of `rows` rows (1 or more), uint32, from number `position` of those on that begin at
    byte address `address`, a multiple of a beat."""
    return data.StructLayout(
        {
            "address": config.address_bits,
            "position": config.engine.k_bits,
            "rows": config.engine.token_bits,
        }
    )


class TokenReader(wiring.Component):
    """Fetches the tokens of the rows of a pass, and keeps them.

    Flow control: a command is taken when all tokens of the one before it are there.

    Faults and `clear`: as of `MemoryReader`; after an error the unit is busy until `clear`.

    Parameters
    ----------
    config : AcceleratorConfig

    Members
    -------
    axi : Out(config.data.read_signature)
    command : In(stream of token_command_layout(config))
    row : In(row_bits)
    token : Out(24)
        The token of the `row` of the cycle before, the lowest bits of its number.
    and `guarded_members(address_bits)`
    """

    def __init__(self, config: AcceleratorConfig) -> None:
        self.config = config
        super().__init__(
            {
                "axi": Out(config.data.read_signature),
                "command": In(stream.Signature(token_command_layout(config))),
                "row": In(config.engine.row_bits),
                "token": Out(TOKEN_BITS),
            }
            | guarded_members(config.address_bits)
        )

    def elaborate(self, platform: object) -> Elaboratable:
        top = Module()
        engine, port = self.config.engine, self.config.data
        per_beat = port.beat_bytes // _WORD_BYTES
        slot_bits = per_beat.bit_length() - 1
        reader = TileReader(_short(port, engine.rows), _WORD_BITS, engine.token_bits + slot_bits, 1)
        top.submodules.reader = reader
        # The reader must not forget its transactions.
        m = Module()
        top.submodules.steps = ResetInserter(self.clear)(m)
        m.submodules.tokens = tokens = Ram(TOKEN_BITS, max(2, engine.rows))
        wiring.connect(m, reader.axi, wiring.flipped(self.axi))

        command, tile = self.command.payload, reader.command.payload
        place = Signal(self.config.address_bits - _WORD_BYTES.bit_length() + 1, reset_less=True)
        rows = Signal(engine.token_bits, reset_less=True)  # that are left
        row = Signal(engine.row_bits, reset_less=True)
        slot = place[:slot_bits]
        skipped = Signal(slot_bits, reset_less=True)  # words before the first token
        m.d.comb += [
            reader.base.eq(self.base),
            reader.limit.eq(self.limit),
            reader.clear.eq(self.clear),
            self.error.eq(reader.error),
            self.error_address.eq(reader.error_address),
            tile.address.eq(Cat(Const(0, port.offset_bits), place[slot_bits:])),
            tile.words.eq(slot + rows),
            tile.tiles.eq(1),
            tokens.write_address.eq(row),
            tokens.write_data.eq(reader.words.payload),
            tokens.read_enable.eq(1),
            tokens.read_address.eq(self.row),
            self.token.eq(tokens.read_data),
            self.busy.eq(1),
        ]
        with m.FSM():
            with m.State("IDLE"):
                m.d.comb += [self.busy.eq(reader.busy), self.command.ready.eq(1)]
                m.d.sync += [
                    place.eq(command.address[_WORD_BYTES.bit_length() - 1 :] + command.position),
                    rows.eq(command.rows),
                    row.eq(0),
                ]
                with m.If(self.command.valid):
                    m.next = "ASK"
            with m.State("ASK"):
                m.d.comb += reader.command.valid.eq(1)
                m.d.sync += skipped.eq(slot)
                with m.If(reader.command.ready):
                    m.next = "TAKE"
            with m.State("TAKE"):
                m.d.comb += reader.words.ready.eq(1)
                with m.If(reader.words.valid):
                    with m.If(skipped != 0):
                        m.d.sync += skipped.eq(skipped - 1)
                    with m.Else():
                        m.d.comb += tokens.write_enable.eq(1)
                        m.d.sync += [row.eq(row + 1), rows.eq(rows - 1)]
                        with m.If(rows == 1):
                            m.next = "IDLE"
        return top


def _short(port: AxiConfig, rows: int) -> AxiConfig:
    """The port, for transfers of so few tokens."""
    per_beat = port.beat_bytes // _WORD_BYTES
    beats = (rows - 1 + per_beat - 1) // per_beat + 1  # the first at any place of a beat
    burst = 1 << (beats - 1).bit_length()
    return replace(port, burst=min(burst, port.burst), outstanding=2, depth=max(2, burst))
