# SPDX-License-Identifier: Apache-2.0
"""Activations of a pass, as they lie in memory, to those of a draft pass."""

from __future__ import annotations

from amaranth.hdl import Cat, Const, Elaboratable, Module, Mux, Signal
from amaranth.lib import data, stream, wiring
from amaranth.lib.wiring import In, Out

from speq.hw.accelerator_config import AcceleratorConfig
from speq.hw.common.logic import ceil_div
from speq.hw.engine_config import BLOCK_ACTIVATIONS, DRAFT_LANES, FP16_BITS
from speq.hw.memory.write_combiner import piece_layout
from speq.hw.vector.block_quantizer import BlockQuantizer

_BYTE = 8


def quantizer_command_layout(config: AcceleratorConfig) -> data.StructLayout:
    """`k` activations of `rows` rows (1 to the drafting rows), and the address that their draft
    activations go to."""
    engine = config.engine
    return data.StructLayout(
        {"k": engine.k_bits, "rows": engine.token_bits, "results": config.address_bits}
    )


class ActivationQuantizer(wiring.Component):
    """Turn activation words (word i: FP16 activation i of all rows) into draft activation words
    (word i: block activations 4i .. 4i + 3 of the drafting rows, `EngineConfig.activation_layout`).

    Formula: `speq.model.arith.quantize_activations` of each row, in blocks of a group's weights.
    What the rows of a command do not fill is 0, up to the end of a beat of the data port.

    Flow control: all streams may stall in any cycle. A command is taken when the last piece of the
    one before has been. Without stalls a word is taken in every cycle, if a draft word has at most
    four beats. A block's first piece is offered when all its activations have been taken.

    Parameters
    ----------
    config : AcceleratorConfig

    Members
    -------
    command : In(stream of quantizer_command_layout(config))
    words : In(stream of 8 * activation_bytes)
        `k` words of each command.
    pieces : Out(stream of piece_layout(config.data))
        `last` marks the command's last.
    busy : Out(1)
        There is a command.
    clear : In(1)
        Drop everything.
    """

    def __init__(self, config: AcceleratorConfig) -> None:
        self.config = config
        self._word_bits = _BYTE * config.activation_bytes
        super().__init__(
            {
                "command": In(stream.Signature(quantizer_command_layout(config))),
                "words": In(stream.Signature(self._word_bits)),
                "pieces": Out(stream.Signature(piece_layout(config.data))),
                "busy": Out(1),
                "clear": In(1),
            }
        )

    def elaborate(self, platform: object) -> Elaboratable:
        m = Module()
        config = self.config
        rows = config.engine.draft_rows
        quantizers = [BlockQuantizer(DRAFT_LANES, config.engine.format.group) for _ in range(rows)]
        for i, quantizer in enumerate(quantizers):
            m.submodules[f"quantizer_{i}"] = quantizer
            m.d.comb += quantizer.clear.eq(self.clear)

        command = Signal(quantizer_command_layout(config), reset_less=True)
        active = Signal()
        left = Signal(config.engine.k_bits)  # activations
        takes_command = self.command.valid & self.command.ready
        m.d.comb += [self.command.ready.eq(~active), self.busy.eq(active)]
        with m.If(takes_command):
            m.d.sync += [command.eq(self.command.payload), active.eq(1)]

        # Four activations of each row; what is behind the last is 0.
        group = Signal(data.ArrayLayout(data.ArrayLayout(FP16_BITS, rows), DRAFT_LANES))
        place = Signal(range(DRAFT_LANES))
        full = Signal()
        ends = Signal()
        gives = Signal()
        word = self.words
        m.d.comb += [
            gives.eq(full & quantizers[0].activations.ready),
            word.ready.eq((left != 0) & (~full | gives)),
        ]
        for i, quantizer in enumerate(quantizers):
            m.d.comb += [
                quantizer.activations.valid.eq(full),
                quantizer.activations.payload.values.eq(Cat(values[i] for values in group)),
                quantizer.activations.payload.last.eq(ends),
            ]
        with m.If(gives):
            m.d.sync += [group.eq(0), full.eq(0)]
        with m.If(takes_command):
            m.d.sync += left.eq(self.command.payload.k)
        with m.If(word.valid & word.ready):
            m.d.sync += [
                left.eq(left - 1),
                place.eq(Mux(left == 1, 0, place + 1)),
                full.eq((place == DRAFT_LANES - 1) | (left == 1)),
                ends.eq(left == 1),
            ]
            for i, values in enumerate(group):
                with m.If(place == i):
                    m.d.sync += values.eq(word.payload)

        self._put(m, command, active, quantizers)
        with m.If(self.clear):
            m.d.sync += [active.eq(0), left.eq(0), group.eq(0), place.eq(0), full.eq(0)]
        return m

    def _put(
        self, m: Module, command: data.View, active: Signal, quantizers: list[BlockQuantizer]
    ) -> None:
        """The quantisers' words, which come all at once, to memory."""
        config = self.config
        port, pieces = config.data, self.pieces
        moves = Signal()
        fields = []
        for i, quantizer in enumerate(quantizers):
            block = quantizer.blocks.payload
            row = Signal(BLOCK_ACTIVATIONS)
            with m.If(i < command.rows):
                m.d.comb += [row.lanes.eq(block.activations), row.exponent.eq(block.exponent)]
            fields.append(row)
        draft = Signal(self._word_bits)
        m.d.comb += draft.eq(Cat(fields))

        blocks = quantizers[0].blocks
        address = Signal(config.address_bits, reset_less=True)
        left = Signal(range(-(-config.engine.max_k // DRAFT_LANES) + 1), reset_less=True)
        parts = max(1, self._word_bits // port.data_bits)
        part = Signal(range(max(2, parts)))
        last_part = part == parts - 1
        last = left == 1
        content, strobe = draft.word_select(part, port.data_bits), Const(-1, port.beat_bytes)
        if self._word_bits < port.data_bits:
            slots = port.data_bits // self._word_bits
            slot = address[config.activation_bytes.bit_length() - 1 : port.offset_bits]
            # Behind the last word the beat is filled with zeros.
            content = Cat(Mux(slot == i, draft, 0) for i in range(slots))
            marks = (slot == 0, *((slot == i) | (last & (slot < i)) for i in range(1, slots)))
            strobe = Cat(mark.replicate(config.activation_bytes) for mark in marks)
        m.d.comb += moves.eq(~pieces.valid | pieces.ready)
        for quantizer in quantizers:
            m.d.comb += quantizer.blocks.ready.eq(moves & last_part)
        with m.If(moves):
            m.d.sync += [
                pieces.valid.eq(blocks.valid),
                pieces.payload.word.eq(address[port.offset_bits :]),
                pieces.payload.data.eq(content),
                pieces.payload.strobe.eq(strobe),
                pieces.payload.last.eq(last & last_part),
            ]
            with m.If(blocks.valid):
                m.d.sync += [
                    part.eq(Mux(last_part, 0, part + 1)),
                    address.eq(address + min(config.activation_bytes, port.beat_bytes)),
                    left.eq(left - last_part),
                ]
        with m.If(~active):
            m.d.sync += [
                address.eq(self.command.payload.results),
                left.eq(ceil_div(self.command.payload.k, DRAFT_LANES)),
            ]
        with m.If(pieces.valid & pieces.ready & pieces.payload.last):
            m.d.sync += active.eq(0)
        with m.If(self.clear):
            m.d.sync += [part.eq(0), pieces.valid.eq(0)]
