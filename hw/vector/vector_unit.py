# SPDX-License-Identifier: Apache-2.0
"""The vector unit: what a pass computes besides its products."""

from __future__ import annotations

from amaranth.hdl import Cat, Elaboratable, Module, Mux, ResetInserter, Signal, Value
from amaranth.lib import stream, wiring
from amaranth.lib.wiring import In, Out

from speq.hw.accelerator_config import AcceleratorConfig
from speq.hw.common.logic import ceil_div
from speq.hw.control.descriptor import SINGLE_TARGETS, Target, VectorOperation
from speq.hw.memory.axi import Fault, guarded_members
from speq.hw.memory.tile_reader import TileReader
from speq.hw.memory.write_combiner import LASTS
from speq.hw.memory.write_mux import write_source_signature
from speq.hw.vector.activation_quantizer import ActivationQuantizer, words_at_once
from speq.hw.vector.command import (
    BY_CHANNEL,
    ON_BATCHES,
    TWICE,
    rows_layout,
    shape_layout,
    vector_command_layout,
)
from speq.hw.vector.entry_mover import EntryMover
from speq.hw.vector.operand_reader import OperandReader
from speq.hw.vector.operand_requests import OperandMode
from speq.hw.vector.token_reader import TokenReader
from speq.hw.vector.vector_core import BINARY, VectorCore
from speq.hw.vector.vector_writer import VectorWriter


class VectorUnit(wiring.Component):
    """Carries out VECTOR descriptors (`speq.hw.control.descriptor`), in order.

    Two `OperandReader`s give x and y, a `VectorCore` computes, a `VectorWriter` writes. EMBED may
    need a `TokenReader` before; QUANTIZE and MOVE go other ways, through an `ActivationQuantizer`
    and an `EntryMover`.

    Flow control: a command is taken when all parts have taken theirs of the one before it, each as
    soon as it has done its share. So operands are read while the lanes work on the command before,
    and writes need not have been answered. QUANTIZE, MOVE and EMBED of tokens in memory are alone.
    At most `LASTS` commands are under way.

    Faults: the first bad response or refused transfer of any reader sets `error`, and `idle` stays
    low until `clear`. Faults of writes are those of the writer that `writes` lead to.

    Parameters
    ----------
    config : AcceleratorConfig
        With lanes.

    Members
    -------
    command : In(stream of vector_command_layout(config))
        Checked.
    rows : In(rows_layout(config))
        Those of the pass, until the unit is idle.
    reads : Out(config.data.read_signature).array(READERS)
    writes : Out(write_source_signature(config.data)).array(WRITERS)
    left : Out(range(LASTS + 1))
        Commands that are not finished: their last write has not been answered. They finish in
        their order.
    idle : Out(1)
        All commands are finished.
    stalls : Out(1)
        Lanes wait for an operand.
    and `guarded_members(address_bits)`
        Of the reads, but for `clear`, which is a level of one cycle or more, and `busy`: from the
        second cycle of `clear` on it tells whether transactions are outstanding.
    """

    #: Masters that read.
    READERS = 5
    #: Sources of writes.
    WRITERS = 2

    def __init__(self, config: AcceleratorConfig) -> None:
        self.config = config
        port = config.data
        super().__init__(
            {
                "command": In(stream.Signature(vector_command_layout(config))),
                "rows": In(rows_layout(config)),
                "reads": Out(port.read_signature).array(self.READERS),
                "writes": Out(write_source_signature(port)).array(self.WRITERS),
                "left": Out(range(LASTS + 1)),
                "idle": Out(1),
                "stalls": Out(1),
            }
            | guarded_members(config.address_bits)
        )
        self._x = OperandReader(config)
        self._y = OperandReader(config, halves=False)
        self._tokens = TokenReader(config)
        self._quantizer = ActivationQuantizer(config)
        word_bits = 8 * words_at_once(config) * config.activation_bytes
        self._activations = TileReader(port, word_bits, config.engine.k_bits, tile_bits=1)
        self._mover = EntryMover(config)
        self._core = VectorCore(config)
        self._writer = VectorWriter(config)

    @property
    def modules(self) -> dict[str, wiring.Component]:
        """Units that are instantiated, by the names of their Verilog modules."""
        return self._core.modules

    def elaborate(self, platform: object) -> Elaboratable:
        top = Module()
        cleared = Signal()
        top.d.sync += cleared.eq(self.clear)
        drop = self.clear & ~cleared  # the readers drain by themselves behind a pulse
        readers = {
            "x": self._x,
            "y": self._y,
            "tokens": self._tokens,
            "activations": self._activations,
            "mover": self._mover,
        }
        for i, (name, reader) in enumerate(readers.items()):
            top.submodules[name] = reader
            wiring.connect(top, reader.axi, wiring.flipped(self.reads[i]))
            top.d.comb += [
                reader.base.eq(self.base),
                reader.limit.eq(self.limit),
                reader.clear.eq(drop),
            ]
        top.d.comb += self.busy.eq(Cat(reader.busy for reader in readers.values()).any())
        for reader in reversed(readers.values()):
            with top.If(reader.error != Fault.NONE):
                top.d.comb += [
                    self.error.eq(reader.error),
                    self.error_address.eq(reader.error_address),
                ]

        resettable = ResetInserter(self.clear)
        core, writer, quantizer = self._core, self._writer, self._quantizer
        top.submodules.core = resettable(core)
        top.submodules.writer = writer
        top.submodules.quantizer = quantizer
        wiring.connect(top, self._x.words, core.x)
        wiring.connect(top, self._y.words, core.y)
        wiring.connect(top, core.results, writer.words)
        wiring.connect(top, self._activations.words, quantizer.activations)
        wiring.connect(top, writer.drafts, quantizer.results)
        wiring.connect(top, quantizer.pieces, writer.pieces)
        wiring.connect(top, writer.writes, wiring.flipped(self.writes[0]))
        wiring.connect(top, self._mover.write, wiring.flipped(self.writes[1]))
        top.d.comb += [
            core.rows.eq(self.rows),
            writer.clear.eq(self.clear),
            quantizer.clear.eq(self.clear),
        ]
        m = Module()
        top.submodules.sequence = ResetInserter(self.clear)(m)
        self._sequence(m)
        return top

    def _sequence(self, m: Module) -> None:
        """Commands, step by step: their shapes, their tokens, their parts."""
        config, engine = self.config, self.config.engine
        command = Signal(vector_command_layout(config), reset_less=True)
        shape = Signal(shape_layout(config), reset_less=True)
        elements = Signal(engine.k_bits, reset_less=True)  # of a row of a segment
        left = Signal(engine.token_bits + len(command.sharing), reset_less=True)  # rows of batches
        operation = command.operation
        is_any = {
            name: Signal(name=name)
            for name in (
                *("binary", "by_channel", "on_batches", "twice"),
                *("embeds", "quantizes", "moves"),
            )
        }
        for name, operations in (
            ("binary", BINARY),
            ("by_channel", BY_CHANNEL),
            ("on_batches", ON_BATCHES),
            ("twice", TWICE),
            ("embeds", (VectorOperation.EMBED,)),
            ("quantizes", (VectorOperation.QUANTIZE,)),
            ("moves", (VectorOperation.MOVE,)),
        ):
            m.d.comb += is_any[name].eq(Cat(operation == each for each in operations).any())
        reads_tokens = is_any["embeds"] & command.values

        # Reads and writes do not go the usual way, or one reader's indices come from another.
        is_alone = is_any["quantizes"] | is_any["moves"] | reads_tokens
        parts = self._parts(m, command, shape, elements, is_any)
        handed = Signal(len(parts))
        handing = Signal()
        taken = Signal(len(parts))
        for i, (part, needed) in enumerate(parts):
            m.d.comb += [
                part.valid.eq(handing & needed & ~handed[i]),
                taken[i].eq(~needed | handed[i] | part.ready),
            ]
        self._index(m, command)
        tokens = self._tokens
        units = (self._x, self._y, self._activations, self._mover)
        units += (self._core, self._quantizer, self._writer)
        # A part is not busy before the cycle after it has taken its command.
        quiet = Signal()
        m.d.sync += quiet.eq(~handing & ~Cat(unit.busy for unit in units).any())
        m.d.comb += self.stalls.eq(self._core.waits)
        taken_one = self.command.valid & self.command.ready
        moved = Signal()
        m.d.sync += self.left.eq(self.left + taken_one - (self._writer.finished | moved))
        m.d.comb += [
            tokens.command.payload.address.eq(command.second),
            tokens.command.payload.position.eq(command.position),
            tokens.command.payload.rows.eq(command.rows),
        ]
        with m.FSM():
            with m.State("IDLE"):
                m.d.comb += [self.idle.eq(quiet), self.command.ready.eq(self.left != LASTS)]
                m.d.sync += command.eq(self.command.payload)
                with m.If(taken_one):
                    m.next = "MEASURE"
            with m.State("MEASURE"):
                seen = command.position + command.rows
                m.d.sync += [
                    left.eq(command.rows * command.sharing),
                    elements.eq(Mux(operation == VectorOperation.SOFTMAX, seen, command.k)),
                ]
                m.next = "SHAPE"
            with m.State("SHAPE"):
                batches, rows = is_any["on_batches"], engine.rows
                m.d.sync += [
                    shape.segments.eq(Mux(batches, 1, command.o)),
                    shape.tiles.eq(ceil_div(elements, engine.cols)),
                    shape.rows.eq(Mux(batches, Mux(left > rows, rows, left), command.rows)),
                    shape.last_rows.eq(Mux(batches, left, command.rows)),
                ]
                # Rows of the tiles before these.
                before = left << (4 * engine.cols).bit_length() - 1
                to_tiles = command.target == Target.TILES
                single = Cat(command.target == target for target in SINGLE_TARGETS).any()
                is_behind = (to_tiles & ~is_any["embeds"]) | single
                with m.If(is_behind & ~is_any["quantizes"] & ~is_any["moves"]):
                    m.d.sync += command.first.eq(command.first + before)
                    with m.If(~(is_any["by_channel"] & command.values)):
                        m.d.sync += command.second.eq(command.second + before)
                with m.If(to_tiles & ~is_any["quantizes"] & ~is_any["moves"]):
                    m.d.sync += command.results.eq(command.results + before)
                m.next = "HAND"
                with m.If(batches):
                    m.next = "BATCHES"
                with m.Elif(is_alone):
                    m.next = "QUIET"
            with m.State("BATCHES"):
                m.next = "HAND"
                with m.If(left > engine.rows):
                    following = left - engine.rows
                    m.d.sync += [
                        left.eq(following),
                        shape.last_rows.eq(following),
                        shape.segments.eq(shape.segments + 1),
                    ]
                    m.next = "BATCHES"
            with m.State("QUIET"):
                with m.If(quiet):
                    m.next = "HAND"
                    with m.If(reads_tokens):
                        m.next = "FETCH"
            with m.State("FETCH"):
                m.d.comb += tokens.command.valid.eq(1)
                with m.If(tokens.command.ready):
                    m.next = "TOKENS"
            with m.State("TOKENS"):
                with m.If(~tokens.busy):
                    m.next = "HAND"
            with m.State("HAND"):
                m.d.comb += handing.eq(1)
                m.d.sync += handed.eq(taken)
                with m.If(taken.all()):
                    m.d.sync += handed.eq(0)
                    m.next = "IDLE"
                    with m.If(is_alone):
                        m.next = "ALONE"
            with m.State("ALONE"):
                with m.If(quiet):
                    m.d.comb += moved.eq(is_any["moves"])
                    m.next = "IDLE"

    def _parts(
        self,
        m: Module,
        command: Value,
        shape: Value,
        elements: Value,
        is_any: dict[str, Signal],
    ) -> list[tuple[stream.Interface, Value]]:
        """The streams of the commands of all units, and which of them a command needs."""
        config = self.config
        x, y = self._x.command, self._y.command
        core, writer = self._core.command, self._writer.command
        quantizer, activations = self._quantizer.command, self._activations.command
        by_channel = is_any["by_channel"] & command.values
        rotates = command.operation == VectorOperation.ROTATE
        by_lanes = ~is_any["quantizes"] & ~is_any["moves"]
        drafts = command.target == Target.DRAFT_ACTIVATIONS
        y_mode = Mux(
            rotates, OperandMode.ROWS, Mux(by_channel, OperandMode.CHANNELS, OperandMode.TILES)
        )
        m.d.comb += [
            x.payload.mode.eq(Mux(is_any["embeds"], OperandMode.ROWS, OperandMode.TILES)),
            x.payload.half.eq(is_any["embeds"]),
            x.payload.twice.eq(is_any["twice"]),
            x.payload.address.eq(command.first),
            x.payload.row_stride.eq(command.detail),
            x.payload.extent.eq(shape),
            y.payload.mode.eq(y_mode),
            y.payload.address.eq(command.second),
            y.payload.row_stride.eq(command.detail),
            y.payload.extent.eq(shape),
            core.payload.words.eq(shape),
            writer.payload.sweep.eq(shape),
            writer.payload.k.eq(elements),
            activations.payload.address.eq(command.first),
            activations.payload.words.eq(ceil_div(command.k, words_at_once(config))),
            activations.payload.tiles.eq(1),
            quantizer.payload.k.eq(command.k),
            quantizer.payload.rows.eq(command.rows),
            quantizer.payload.results.eq(command.results),
            quantizer.payload.from_results.eq(by_lanes),
        ]
        # Batches of weights lie as an ATTENTION reads them.
        batch_beats = ceil_div(elements * config.activation_bytes, config.data.beat_bytes)
        is_weights = command.target == Target.WEIGHTS
        m.d.comb += writer.payload.inner.eq(
            Mux(is_weights, batch_beats << config.data.offset_bits, command.inner)
        )
        for name in ("target", "results", "outer", "rows", "position", "sharing"):
            m.d.comb += Value.cast(writer.payload[name]).eq(command[name])
        for name, _ in core.payload.shape():
            if name != "words":
                m.d.comb += Value.cast(core.payload[name]).eq(command[name])
        mover = self._mover.command
        for name, _ in mover.payload.shape():
            m.d.comb += mover.payload[name].eq(command[name])
        return [
            (x, by_lanes),
            (y, is_any["binary"]),
            (core, by_lanes),
            (writer, by_lanes),
            (activations, is_any["quantizes"]),
            (quantizer, is_any["quantizes"] | drafts),
            (mover, is_any["moves"]),
        ]

    def _index(self, m: Module, command: Value) -> None:
        """The rows of tables that belong to rows of the pass: tokens and positions."""
        tokens, x, y = self._tokens, self._x, self._y
        in_text = Signal(reset_less=True)
        of_pass = Signal.like(x.index, reset_less=True)
        depth = Signal.like(self.rows[0].depth, reset_less=True)
        m.d.sync += [
            of_pass.eq(self.rows[x.index_row].token),
            depth.eq(self.rows[y.index_row].depth),
        ]
        # `command` may be the next one already.
        position = Signal.like(command.position, reset_less=True)
        with m.If(x.command.valid & x.command.ready):
            m.d.sync += in_text.eq(command.values)
        with m.If(y.command.valid & y.command.ready):
            m.d.sync += position.eq(command.position)
        m.d.comb += [
            tokens.row.eq(x.index_row),
            x.index.eq(Mux(in_text, tokens.token, of_pass)),
            y.index.eq(position + depth),
        ]
