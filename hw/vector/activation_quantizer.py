# SPDX-License-Identifier: Apache-2.0
"""Activations of a pass, from memory or from the lanes, to those of a draft pass."""

from __future__ import annotations

from amaranth.hdl import Cat, Const, Elaboratable, Module, Mux, Signal, Value
from amaranth.lib import data, stream, wiring
from amaranth.lib.wiring import In, Out

from speq.hw.accelerator_config import AcceleratorConfig
from speq.hw.common.logic import ceil_div
from speq.hw.engine_config import BLOCK_ACTIVATIONS, DRAFT_LANES, FP16_BITS
from speq.hw.memory.write_combiner import piece_layout
from speq.hw.vector.block_quantizer import BlockQuantizer
from speq.hw.vector.transposer import placed_word_layout
from speq.hw.vector.word_counter import words_per_row

_BYTE = 8


def quantizer_command_layout(config: AcceleratorConfig) -> data.StructLayout:
    """`k` activations of `rows` rows (1 to the drafting rows), the address that their draft
    activations go to, and whether they are results on their way or lie in memory."""
    engine = config.engine
    return data.StructLayout(
        {
            "k": engine.k_bits,
            "rows": engine.token_bits,
            "results": config.address_bits,
            "from_results": 1,
        }
    )


def words_at_once(config: AcceleratorConfig) -> int:
    """Activation words that are quantised in a cycle, a power of two: as many as a beat has, but
    not more than there are lanes or weights of a group."""
    beat = max(1, config.data.beat_bytes // config.activation_bytes)
    return min(config.lanes, config.engine.format.group, beat)


class ActivationQuantizer(wiring.Component):
    """Make draft activation words (word i: block activations 4i .. 4i + 3 of the drafting rows,
    `EngineConfig.activation_layout`) of activation words (word i: FP16 activation i of all rows),
    some at a time, or of results of vector operations.

    Formula: `speq.model.arith.quantize_activations` of each row, in blocks of a group's weights.
    What the rows of a command do not fill is 0, up to the end of a beat of the data port.

    Flow control: all streams may stall in any cycle. A command is taken when the last piece of the
    one before has been. Without stalls an item is taken in every cycle, if it gives no more than a
    beat, and results do not have more lanes than a group has weights. A block's first piece is
    offered when all its activations have been taken, the last one when all items have been.

    Parameters
    ----------
    config : AcceleratorConfig
        With lanes.

    Members
    -------
    command : In(stream of quantizer_command_layout(config))
    activations : In(stream of 8 * words * activation_bytes, where words are words_at_once(config))
        Of each command without `from_results` ceil(k / words) items; what the last one has behind
        the `k` words has no effect.
    results : In(stream of placed_word_layout(config))
        Of each command with `from_results` whole tiles of its rows.
    pieces : Out(stream of piece_layout(config.data))
        `last` marks the command's last.
    busy : Out(1)
        There is a command.
    clear : In(1)
        Drop everything.

    Raises
    ------
    ValueError
        If there are no lanes.
    """

    def __init__(self, config: AcceleratorConfig) -> None:
        words_per_row(config)
        self.config = config
        self._word_bits = _BYTE * config.activation_bytes
        #: Activations of a row that are quantised in a cycle.
        self._chunk = min(config.lanes, config.engine.format.group)
        self._words = words_at_once(config)
        super().__init__(
            {
                "command": In(stream.Signature(quantizer_command_layout(config))),
                "activations": In(stream.Signature(self._words * self._word_bits)),
                "results": In(stream.Signature(placed_word_layout(config))),
                "pieces": Out(stream.Signature(piece_layout(config.data))),
                "busy": Out(1),
                "clear": In(1),
            }
        )

    def elaborate(self, platform: object) -> Elaboratable:
        m = Module()
        config = self.config
        rows, size = config.engine.draft_rows, self._chunk
        # Results of the first row come up to a tile earlier than those of the last one.
        ahead = config.engine.cols // size if rows > 1 else 0
        quantizers = [BlockQuantizer(size, config.engine.format.group, ahead) for _ in range(rows)]
        for i, quantizer in enumerate(quantizers):
            m.submodules[f"quantizer_{i}"] = quantizer
            m.d.comb += quantizer.clear.eq(self.clear)

        command = Signal(quantizer_command_layout(config), reset_less=True)
        active = Signal()
        # The number of the last activation: that of its chunk, and in the chunk.
        chunk_bits = size.bit_length() - 1
        final = Signal(max(config.engine.k_bits, chunk_bits + 1), reset_less=True)
        takes_command = self.command.valid & self.command.ready
        m.d.comb += [self.command.ready.eq(~active), self.busy.eq(active)]
        with m.If(takes_command):
            m.d.sync += [
                command.eq(self.command.payload),
                final.eq(self.command.payload.k - 1),
                active.eq(1),
            ]
        tail, final_number = final[:chunk_bits], final[chunk_bits:]

        # A chunk of each row that `full` marks; behind the last activation it is 0.
        chunk = Signal(data.ArrayLayout(data.ArrayLayout(FP16_BITS, rows), size), reset_less=True)
        full = Signal(rows)
        ends = Signal(reset_less=True)
        gives = Signal(rows)
        takes = Signal()
        m.d.comb += takes.eq((~full | gives).all())
        for i, quantizer in enumerate(quantizers):
            given = quantizer.activations
            m.d.comb += [given.valid.eq(full[i]), given.payload.last.eq(ends)]
            m.d.comb += gives[i].eq(given.valid & given.ready)
            for j, values in enumerate(chunk):
                is_behind = ends & (tail < j) if j else Const(0)
                m.d.comb += given.payload.values[j].eq(Mux(is_behind, 0, values[i]))
        m.d.sync += full.eq(full & ~gives)

        # From memory, some of its words at a time.
        place = Signal(range(max(2, size // self._words)))
        number = Signal.like(final_number)
        left = Signal()
        item = self.activations
        is_final = number == final_number
        words_bits = self._words.bit_length() - 1
        last_place = Mux(is_final, tail[words_bits:], size // self._words - 1)
        m.d.comb += item.ready.eq(left & takes)
        with m.If(takes_command):
            m.d.sync += [left.eq(~self.command.payload.from_results), number.eq(0), place.eq(0)]
        with m.If(item.valid & item.ready):
            m.d.sync += [place.eq(place + 1), ends.eq(is_final)]
            with m.If(place == last_place):
                m.d.sync += [place.eq(0), number.eq(number + 1), left.eq(~is_final)]
                m.d.sync += full.eq(Cat(i < command.rows for i in range(rows)))
            for j, values in enumerate(chunk):
                word = item.payload.word_select(j % self._words, self._word_bits)
                with m.If(place == j // self._words):
                    m.d.sync += values.eq(word)

        # Results, perhaps in several parts; those behind the last activation have no effect.
        parts = config.lanes // size
        part = Signal(range(max(2, parts)))
        awaited = Signal()
        result = self.results
        row = result.payload.place.row
        result_number = Cat(
            part[: parts.bit_length() - 1],
            result.payload.place.word[: words_per_row(config).bit_length() - 1],
            result.payload.place.tile,
        )
        last_part = part == parts - 1
        m.d.comb += result.ready.eq(awaited & takes & last_part)
        with m.If(takes_command):
            m.d.sync += awaited.eq(self.command.payload.from_results)
        with m.If(awaited & takes & result.valid):
            m.d.sync += [
                part.eq(Mux(last_part, 0, part + 1)),
                ends.eq(result_number == final_number),
            ]
            with m.If(last_part & result.payload.place.ends.operation):
                m.d.sync += awaited.eq(0)
            for i in range(rows):
                with m.If((row == i) & (result_number <= final_number)):
                    m.d.sync += full[i].eq(1)
            for j, values in enumerate(chunk):
                value = result.payload.values.as_value().word_select(part, FP16_BITS * size)
                m.d.sync += values.eq(value.word_select(j, FP16_BITS).replicate(rows))

        self._put(m, command, active, awaited, tail, quantizers)
        with m.If(self.clear):
            m.d.sync += [active.eq(0), left.eq(0), awaited.eq(0), full.eq(0), part.eq(0)]
        return m

    def _put(
        self,
        m: Module,
        command: data.View,
        active: Signal,
        awaited: Signal,
        tail: Value,
        quantizers: list[BlockQuantizer],
    ) -> None:
        """The quantisers' chunks, those of all rows at once, to memory."""
        config = self.config
        port, pieces = config.data, self.pieces
        lane_bits = DRAFT_LANES.bit_length() - 1
        address = Signal(config.address_bits, reset_less=True)
        left = Signal(range(-(-config.engine.max_k // self._chunk) + 1), reset_less=True)
        last = left == 1

        # Draft words, those that are there.
        final_word = tail[lane_bits:]
        words = []
        for j in range(self._chunk // DRAFT_LANES):
            word = Signal(self._word_bits, name=f"word_{j}")
            fields = []
            for i, quantizer in enumerate(quantizers):
                block = quantizer.blocks.payload
                row = Signal(BLOCK_ACTIVATIONS, name=f"row_{i}_{j}")
                with m.If(i < command.rows):
                    m.d.comb += row.exponent.eq(block.exponent)
                    for lane in range(DRAFT_LANES):
                        m.d.comb += row.lanes[lane].eq(block.activations[DRAFT_LANES * j + lane])
                fields.append(row)
            with m.If(~last | (final_word >= j) if j else Const(1)):
                m.d.comb += word.eq(Cat(fields))
            words.append(word)
        chunk = Cat(words)

        part = Signal(range(max(2, len(chunk) // port.data_bits)))
        last_part = Const(1)
        content, strobe = chunk.word_select(part, port.data_bits), Const(-1, port.beat_bytes)
        if len(chunk) > port.data_bits:
            # The beats of the last words, and no more.
            if self._word_bits > port.data_bits:
                beats = self._word_bits // port.data_bits
                final_part = Cat(Const(-1, beats.bit_length() - 1), final_word)
            else:
                final_part = final_word[(port.data_bits // self._word_bits).bit_length() - 1 :]
            last_part = part == Mux(last, final_part, len(chunk) // port.data_bits - 1)
        elif len(chunk) < port.data_bits:
            slots = port.data_bits // len(chunk)
            slot = address[(len(chunk) // _BYTE).bit_length() - 1 : port.offset_bits]
            # Behind the last word the beat is filled with zeros.
            content = Cat(Mux(slot == i, chunk, 0) for i in range(slots))
            marks = (slot == 0, *((slot == i) | (last & (slot < i)) for i in range(1, slots)))
            strobe = Cat(mark.replicate(len(chunk) // _BYTE) for mark in marks)

        # Of rows that the command does not have there are no blocks.
        offered, moves = Signal(), Signal()
        needed = ((i >= command.rows) | q.blocks.valid for i, q in enumerate(quantizers))
        m.d.comb += [
            offered.eq(active & Cat(needed).all() & ~(last & awaited)),
            moves.eq(~pieces.valid | pieces.ready),
        ]
        for quantizer in quantizers:
            m.d.comb += quantizer.blocks.ready.eq(offered & moves & last_part)
        with m.If(moves):
            m.d.sync += [
                pieces.valid.eq(offered),
                pieces.payload.word.eq(address[port.offset_bits :]),
                pieces.payload.data.eq(content),
                pieces.payload.strobe.eq(strobe),
                pieces.payload.last.eq(last & last_part),
            ]
            with m.If(offered):
                m.d.sync += [
                    part.eq(Mux(last_part, 0, part + 1)),
                    address.eq(address + min(len(chunk) // _BYTE, port.beat_bytes)),
                    left.eq(left - last_part),
                ]
        with m.If(~active):
            m.d.sync += [
                address.eq(self.command.payload.results),
                left.eq(ceil_div(self.command.payload.k, self._chunk)),
            ]
        with m.If(pieces.valid & pieces.ready & pieces.payload.last):
            m.d.sync += active.eq(0)
        with m.If(self.clear):
            m.d.sync += [part.eq(0), pieces.valid.eq(0)]
