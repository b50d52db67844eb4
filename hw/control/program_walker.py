# SPDX-License-Identifier: Apache-2.0
"""Walking through a program: descriptors are fetched, checked and carried out in order."""

from __future__ import annotations

from dataclasses import replace

from amaranth.hdl import Cat, Const, Elaboratable, Module, Mux, ResetInserter, Signal, Value
from amaranth.lib import data, stream, wiring
from amaranth.lib.wiring import In, Out

from speq.hw.accelerator_config import AcceleratorConfig, ErrorCode
from speq.hw.common.logic import ceil_div
from speq.hw.control.candidate_tiles import CandidateTiles
from speq.hw.control.descriptor import (
    DESCRIPTOR,
    DESCRIPTOR_BYTES,
    FORMS,
    TARGETS,
    DescriptorKind,
    Target,
    VectorOperation,
)
from speq.hw.engine_config import Mode
from speq.hw.memory.axi import Fault
from speq.hw.memory.memory_reader import MemoryReader
from speq.hw.memory.ranking_writer import ranking_command_layout, ranking_row_bytes
from speq.hw.vector.command import DETAIL_BITS, vector_command_layout

#: Descriptors that are fetched ahead.
_AHEAD = 4
_PROGRAM_LENGTH_BITS = 16
#: Bits of a number of descriptors that are not finished.
_LEFT_BITS = 4
_FP16_BYTES = 2

#: The number of two bits that is no mode.
(_NO_MODE,) = set(range(1 << 2)) - {mode.value for mode in Mode}
_PRODUCTS = (
    DescriptorKind.GEMM,
    DescriptorKind.ARGMAX,
    DescriptorKind.ATTENTION,
    DescriptorKind.RERANK,
)


def _kinds(config: AcceleratorConfig) -> list[DescriptorKind]:
    """The kinds of descriptors that there are."""
    return [kind for kind in FORMS if config.lanes or kind is not DescriptorKind.VECTOR]


def _unused(kind: DescriptorKind) -> list[str]:
    """Fields that must be 0 in a kind, whatever the others are."""
    return [name for name, _ in DESCRIPTOR if name not in ("kind", *FORMS[kind].uses)]


def _unused_in(mode: Mode) -> list[str]:
    """Fields that must be 0 on top in a GEMM or ARGMAX of a mode."""
    uses = FORMS[DescriptorKind.GEMM].uses
    return [name for name, use in uses.items() if mode not in use.modes]


def _unused_in_attention(values: bool) -> list[str]:
    """Fields that must be 0 on top in an ATTENTION with or without `values`."""
    uses = FORMS[DescriptorKind.ATTENTION].uses
    return [name for name, use in uses.items() if use.values is (not values)]


def _places(port: str) -> list[str]:
    """All fields that are addresses or distances of a port, whichever product uses them."""
    uses = [item for kind in _PRODUCTS for item in FORMS[kind].uses.items()]
    return list(dict.fromkeys(use.name or name for name, use in uses if use.port == port))


def walk_layout(config: AcceleratorConfig) -> data.StructLayout:
    """A walk: the program's address, the pass's rows, and KV entries before them; with lanes the
    entry that a MOVE brings there."""
    return data.StructLayout(
        {
            "program": config.address_bits,
            "rows": config.engine.token_bits,
            "position": config.engine.k_bits,
        }
        | ({"source": config.engine.k_bits} if config.lanes else {})
    )


class ProgramWalker(wiring.Component):
    """Carry out the descriptors of a program, from its first to END (`speq.hw.control.descriptor`).

    Descriptors are fetched up to four ahead. Each is checked before it has any effect: its kind and
    mode, fields that must be 0, sizes, and the alignment of addresses, in this order. GEMM and
    ATTENTION become one job or more on `jobs`, VECTOR becomes a command on `vector`, and both
    overlap with their successors, as far as the takers allow; HOST, END, ARGMAX and RERANK start
    when all is finished, a product or VECTOR with `wait` when all others of its class are, and with
    `behind` when few enough of the other class are left. ARGMAX and RERANK also wait for their own
    end, and for that of the ranking's transfer to memory, if they ask for one. RERANK becomes a job
    for each tile that holds a candidate. If a ranking may have missed an entry (`Ranker`), its
    ARGMAX is carried out a second time, with `again`; a RERANK, of at most as many outputs as there
    are entries, misses none.

    Latency: the first job is offered 2 cycles after its descriptor has arrived.

    Faults: a descriptor that fails its checks, a program without END within `length` descriptors,
    and a failed fetch of a descriptor that is needed set `error`, for good; only `clear` ends it.

    Parameters
    ----------
    config : AcceleratorConfig

    Members
    -------
    axi : Out(config.data.read_signature)
    walk : In(stream of walk_layout(config))
    done : Out(1)
        Pulse: the walk has reached END.
    jobs : Out(stream of config.job_layout)
    kind : Out(8)
    last : Out(1)
        Of the descriptor that the job on offer comes from, and whether it is its last job.
    idle : In(1)
        All jobs taken are finished, with all their effects on memory.
    vector : Out(stream of vector_command_layout(config))
    products_left, vectors_left : In
        Descriptors of each class that are not finished, with all their effects on memory, as far as
        their last job or their command has been taken; they count from the next cycle on.
    chain : In(row_bits)
        Number of a draft pass in its chain, else 0: so many rows the ranking goes behind the
        descriptor's address. These four are there if the configuration has lanes.
    rank_command : Out(stream of ranking_command_layout(config))
        Asks for the transfer of the ranking of the last ARGMAX or RERANK.
    rank_idle : In(1)
        No such transfer is under way.
    rank_entries : In(config.ranking_layout)
        Those of row 0, while no job is under way.
    rank_missed : In(1)
        Whether an entry of the last ranking may be wrong, while no job is under way.
    host_request : Out(1)
        Level, until `host_answer`: a HOST descriptor waits.
    host_argument : Out(32)
        Of the last HOST descriptor.
    host_answer : In(1)
        Pulse.
    length : In(16)
        Most descriptors of a program.
    base, limit : In(address_bits)
        First and last byte that may be read.
    started : Out(1)
        Pulse: a descriptor has passed its checks.
    error : Out(ErrorCode)
    error_address : Out(address_bits)
        Of the descriptor, also while there is no error, or of the failed read.
    clear : In(1)
        Pulse: drop everything.
    busy : Out(1)
        A walk or a transaction is under way.
    """

    def __init__(self, config: AcceleratorConfig) -> None:
        self.config = config
        self._beats = max(1, DESCRIPTOR_BYTES // config.data.beat_bytes)  # of a descriptor
        burst = self._beats
        self._axi = replace(
            config.data, burst=burst, outstanding=_AHEAD, depth=max(2, _AHEAD * burst)
        )
        address = config.address_bits
        vector = {}
        if config.lanes:
            vector = {
                "vector": Out(stream.Signature(vector_command_layout(config))),
                "products_left": In(_LEFT_BITS),
                "vectors_left": In(_LEFT_BITS),
                "chain": In(config.engine.row_bits),
            }
        super().__init__(
            {
                "axi": Out(self._axi.read_signature),
                "walk": In(stream.Signature(walk_layout(config))),
                "done": Out(1),
                "jobs": Out(stream.Signature(config.job_layout)),
                "kind": Out(8),
                "last": Out(1),
                "idle": In(1),
                **vector,
                "rank_command": Out(stream.Signature(ranking_command_layout(config))),
                "rank_idle": In(1),
                "rank_entries": In(config.ranking_layout),
                "rank_missed": In(1),
                "host_request": Out(1),
                "host_argument": Out(32),
                "host_answer": In(1),
                "length": In(_PROGRAM_LENGTH_BITS),
                "base": In(address),
                "limit": In(address),
                "started": Out(1),
                "error": Out(ErrorCode),
                "error_address": Out(address),
                "clear": In(1),
                "busy": Out(1),
            }
        )

    def elaborate(self, platform: object) -> Elaboratable:
        top = Module()
        config = self.config
        top.submodules.reader = reader = MemoryReader(self._axi)
        wiring.connect(top, reader.axi, wiring.flipped(self.axi))
        # The reader must not forget its transactions.
        m = Module()
        top.submodules.steps = ResetInserter(self.clear)(m)
        walk = Signal(walk_layout(config), reset_less=True)
        walking = Signal()
        drop = Signal()  # what has been fetched ahead
        m.d.comb += [
            reader.base.eq(self.base),
            reader.limit.eq(self.limit),
            reader.clear.eq(drop | self.clear),
            self.walk.ready.eq(~walking & ~reader.busy),
            self.busy.eq(walking | reader.busy),
        ]
        descriptor = Signal(DESCRIPTOR, reset_less=True)
        arrived = Signal()
        next_one = Signal()  # the descriptor has been carried out
        address = Signal(config.address_bits, reset_less=True)  # of the descriptor
        with m.If(self.walk.valid & self.walk.ready):
            m.d.sync += [
                walk.eq(self.walk.payload),
                address.eq(self.walk.payload.program),
                walking.eq(1),
            ]
        self._fetch(m, reader, walk, walking, descriptor, arrived, next_one)

        # The number of this descriptor, of which `length` is the first that there must not be.
        number = Signal(_PROGRAM_LENGTH_BITS)
        with m.If(next_one):
            m.d.sync += [number.eq(number + 1), address.eq(address + DESCRIPTOR_BYTES)]

        kind = descriptor.kind
        job = Signal(config.job_layout, reset_less=True)
        rows_left = Signal(config.engine.token_bits + 8, reset_less=True)
        before = Signal.like(rows_left)  # rows of the tiles before the results
        tokens = Mux(descriptor.tokens == 0, walk.rows, descriptor.tokens)
        m.d.sync += before.eq(Mux(kind == DescriptorKind.GEMM, tokens * descriptor.sharing, 0))
        failed = Signal(ErrorCode)
        code = self._check(m, descriptor, walk)
        m.submodules.tiles = tiles = CandidateTiles(config)
        m.d.comb += [
            tiles.candidates.eq(descriptor.tokens),
            tiles.entries.eq(self.rank_entries),
            *(tiles.layer[name].eq(descriptor[name]) for name, _ in tiles.layer.shape()),
            self.jobs.payload.eq(job),
            self.kind.eq(kind),
            self.last.eq(rows_left == 0),
            self.rank_command.payload.address.eq(descriptor.extra),
            self.rank_command.payload.tokens.eq(job.tokens),
            self.error.eq(failed),
        ]
        m.d.sync += self.error_address.eq(address)
        idle = self.idle
        is_product = (kind == DescriptorKind.GEMM) | (kind == DescriptorKind.ATTENTION)
        may_start = (is_product & ~descriptor.wait) | idle
        if config.lanes:
            is_vector = kind == DescriptorKind.VECTOR
            behind, no_vector = descriptor.behind, self.vectors_left == 0
            may_start = (
                (idle & no_vector)
                | (
                    is_product
                    & (~descriptor.wait | idle)
                    & ((behind == 0) | (self.vectors_left < behind))
                )
                | (
                    is_vector
                    & (~descriptor.wait | no_vector)
                    & ((behind == 0) | (self.products_left < behind))
                )
            )
            self._word_vector_command(m, descriptor, walk)
            row_bytes = max(ranking_row_bytes(config), config.data.beat_bytes)
            place = self.chain << (row_bytes - 1).bit_length()
            m.d.comb += self.rank_command.payload.address.eq(descriptor.extra + place)
        # A failed fetch matters when its descriptor is needed: END may come before.
        beat = Cat(Const(0, config.data.offset_bits), address[config.data.offset_bits :])
        fetch_failed = (reader.error != Fault.NONE) & (reader.error_address == beat)
        with m.FSM(name="state"):
            with m.State("FETCH"):
                with m.If(walking & (number == self.length)):
                    m.d.sync += failed.eq(ErrorCode.NO_END)
                    m.next = "FAILED"
                with m.Elif(walking & arrived):
                    m.next = "CHECK"
                with m.Elif(walking & fetch_failed):
                    m.d.sync += [
                        failed.eq(read_error(reader.error)),
                        self.error_address.eq(reader.error_address),
                    ]
                    m.next = "FAILED"
            with m.State("CHECK"):
                m.d.sync += failed.eq(code)
                self._make_job(m, job, rows_left, descriptor, walk, before)
                with m.If(code != ErrorCode.NONE):
                    m.next = "FAILED"
                with m.Else():
                    m.d.comb += self.started.eq(1)
                    m.next = "WAIT"
            with m.State("WAIT"):
                with m.If(may_start):
                    with m.Switch(kind):
                        with m.Case(DescriptorKind.HOST):
                            m.d.sync += self.host_argument.eq(descriptor.argument)
                            m.next = "HOST"
                        with m.Case(DescriptorKind.END):
                            m.d.comb += [self.done.eq(1), drop.eq(1)]
                            m.d.sync += [walking.eq(0), number.eq(0)]
                            m.next = "FETCH"
                        with m.Case(DescriptorKind.RERANK):
                            m.d.comb += tiles.start.eq(1)
                            m.next = "TILES"
                        if config.lanes:
                            with m.Case(DescriptorKind.VECTOR):
                                m.d.comb += self.vector.valid.eq(1)
                                with m.If(self.vector.ready):
                                    m.d.comb += next_one.eq(1)
                                    m.next = "FETCH"
                        with m.Default():
                            # The first job goes at once.
                            m.d.comb += self.jobs.valid.eq(1)
                            self._send(m, job, rows_left, descriptor, next_one)
            with m.State("TILES"):
                m.d.comb += tiles.tiles.ready.eq(1)
                for name, _ in tiles.tiles.payload.shape():
                    m.d.sync += job[name].eq(tiles.tiles.payload[name])
                with m.If(tiles.tiles.valid):
                    m.next = "JOB"
                with m.Elif(~tiles.busy):
                    m.next = "RANKED"
            with m.State("JOB"):
                m.d.comb += self.jobs.valid.eq(1)
                self._send(m, job, rows_left, descriptor, next_one)
            with m.State("RANKED"):  # the job may not be known as unfinished yet
                m.next = "RANKING"
            with m.State("RANKING"):
                with m.If(self.idle & self.rank_missed & ~job.again):
                    m.d.sync += job.again.eq(1)
                    m.next = "JOB"
                with m.Elif(self.idle):
                    with m.If(descriptor.extra == 0):
                        m.d.comb += next_one.eq(1)
                        m.next = "FETCH"
                    with m.Else():
                        m.d.comb += self.rank_command.valid.eq(1)
                        with m.If(self.rank_command.ready):
                            m.next = "TRANSFER"
            with m.State("TRANSFER"):
                with m.If(self.rank_idle):
                    m.d.comb += next_one.eq(1)
                    m.next = "FETCH"
            with m.State("HOST"):
                m.d.comb += self.host_request.eq(1)
                with m.If(self.host_answer):
                    m.d.comb += next_one.eq(1)
                    m.next = "FETCH"
            with m.State("FAILED"):
                m.d.sync += self.error_address.eq(self.error_address)
        return top

    def _fetch(
        self,
        m: Module,
        reader: MemoryReader,
        walk: data.View,
        walking: Signal,
        descriptor: data.View,
        arrived: Signal,
        next_one: Signal,
    ) -> None:
        """Request descriptors ahead and put the beats of each together."""
        config = self.config
        beat_bytes = config.data.beat_bytes
        asked = Signal(config.address_bits, reset_less=True)  # address of the next to ask for
        asked_number = Signal(_PROGRAM_LENGTH_BITS)
        ahead = Signal(range(_AHEAD + 1))
        ask = Signal()
        m.d.comb += [
            reader.command.valid.eq(walking & (ahead != _AHEAD) & (asked_number != self.length)),
            reader.command.payload.address.eq(
                Cat(Const(0, config.data.offset_bits), asked[config.data.offset_bits :])
            ),
            reader.command.payload.beats.eq(self._beats),
            ask.eq(reader.command.valid & reader.command.ready),
        ]
        with m.If(walking):
            m.d.sync += ahead.eq(ahead + ask - next_one)
        with m.Else():
            m.d.sync += [ahead.eq(0), asked_number.eq(0)]
        with m.If(ask):
            m.d.sync += [
                asked.eq(asked + DESCRIPTOR_BYTES),
                asked_number.eq(asked_number + 1),
            ]
        with m.If(self.walk.valid & self.walk.ready):
            m.d.sync += asked.eq(self.walk.payload.program)

        beats = Signal(range(self._beats + 1))
        complete = beats == self._beats
        m.d.comb += [
            reader.data.ready.eq(walking & ~complete),
            arrived.eq(complete),
        ]
        content = descriptor.as_value()
        payload = reader.data.payload
        if beat_bytes <= DESCRIPTOR_BYTES:
            filled = Cat(content[config.data.data_bits :], payload)
        else:
            # A beat holds several: the one that the address says.
            place = Signal(range(beat_bytes // DESCRIPTOR_BYTES))
            with m.If(self.walk.valid & self.walk.ready):
                m.d.sync += place.eq(self.walk.payload.program // DESCRIPTOR_BYTES)
            with m.Elif(next_one):
                m.d.sync += place.eq(place + 1)
            filled = payload.word_select(place, 8 * DESCRIPTOR_BYTES)
        with m.If(reader.data.valid & reader.data.ready):
            m.d.sync += [beats.eq(beats + 1), content.eq(filled)]
        with m.If(next_one | ~walking):
            m.d.sync += beats.eq(0)

    def _check(self, m: Module, d: data.View, walk: data.View) -> Signal:
        """The first thing that is wrong with a descriptor."""
        engine = self.config.engine
        code = Signal(ErrorCode)
        kind, mode = d.kind, d.mode
        is_gemm = (kind == DescriptorKind.GEMM) | (kind == DescriptorKind.ARGMAX)
        is_attention = kind == DescriptorKind.ATTENTION
        is_rerank = kind == DescriptorKind.RERANK
        is_product = is_gemm | is_attention | is_rerank
        known = Cat(kind == value for value in _kinds(self.config)).any() & ~(
            is_gemm & (mode == _NO_MODE)
        )
        vector = None
        if self.config.lanes:
            vector = _VectorCheck(m, self.config, d, walk)
            known &= vector.is_known

        used = Signal()  # a field that must be 0
        with m.Switch(kind):
            for value in _kinds(self.config):
                with m.Case(value):
                    fields = Cat(Value.cast(d[name]) for name in _unused(value))
                    m.d.comb += used.eq(fields.any())
        used_in_mode = Signal()
        with m.Switch(mode):
            for value in Mode:
                with m.Case(value):
                    fields = Cat(Value.cast(d[name]) for name in _unused_in(value))
                    m.d.comb += used_in_mode.eq(is_gemm & fields.any())
        # What the KV entries take the place of.
        counted = Mux(
            d.values, *(Cat(d[name] for name in _unused_in_attention(v)) for v in (True, False))
        )
        reserved = used | used_in_mode | (is_attention & (counted != 0))
        if vector is not None:
            reserved |= vector.is_reserved

        # In attention the KV entries are an inner or an outer dimension.
        seen = Signal(engine.k_bits + 1)
        m.d.comb += seen.eq(walk.position + walk.rows)
        by_entries = is_attention & d.values
        tokens = Mux(d.tokens == 0, walk.rows, d.tokens)
        most_tokens = Mux(is_gemm & (mode == Mode.DRAFT), engine.draft_rows, engine.rows)
        bad_size = is_product & (
            _is_outside(Mux(by_entries, seen, d.k), engine.max_k)
            | (is_attention & (seen > engine.max_k))
            | (~is_rerank & _is_outside(Mux(is_attention & ~d.values, seen, d.o), engine.max_o))
            | (is_rerank & _is_outside(d.tokens, self.config.choices))
            | (is_gemm & _is_outside(tokens, most_tokens))
            | (is_attention & ((d.sharing == 0) | (walk.rows == 0)))
        )
        if vector is not None:
            bad_size |= vector.has_bad_size

        config = self.config
        # The member `extra` of the layout is one or the other.
        shared = {
            "stride": Mux(is_attention, d.extra, 0),
            "ranking": Mux(is_attention, 0, d.extra),
        }
        misaligned = (
            is_product
            & Cat(
                _is_misaligned(
                    shared[name] if name in shared else d[name],
                    port.offset_bits,
                    config.address_bits,
                )
                for port, names in (
                    (config.weights, _places("weights")),
                    (config.data, _places("data")),
                )
                for name in names
            ).any()
        )

        if vector is not None:
            misaligned |= vector.is_misaligned

        with m.If(~known):
            m.d.comb += code.eq(ErrorCode.UNKNOWN_KIND)
        with m.Elif(reserved):
            m.d.comb += code.eq(ErrorCode.RESERVED)
        with m.Elif(bad_size):
            m.d.comb += code.eq(ErrorCode.BAD_SIZE)
        with m.Elif(misaligned):
            m.d.comb += code.eq(ErrorCode.MISALIGNED)
        return code

    def _word_vector_command(self, m: Module, d: data.View, walk: data.View) -> None:
        """The command of a VECTOR descriptor."""
        names = {use.name or name: name for name, use in FORMS[DescriptorKind.VECTOR].uses.items()}
        command = self.vector.payload
        for name, _ in command.shape():
            source = d[names[name]] if name in names else walk[name]
            m.d.comb += Value.cast(command[name]).eq(source)

    def _make_job(
        self,
        m: Module,
        job: data.View,
        rows_left: Signal,
        d: data.View,
        walk: data.View,
        before: Signal,
    ) -> None:
        """The descriptor's first job; `before` rows of tiles are before its results."""
        engine = self.config.engine
        rows = engine.rows
        is_attention = d.kind == DescriptorKind.ATTENTION
        is_rerank = d.kind == DescriptorKind.RERANK
        tile_outputs = min(engine.cols, engine.max_o)  # a tile is a GEMM of its own
        seen = walk.position + walk.rows
        all_rows = walk.rows * d.sharing
        first_batch = Mux(all_rows > rows, rows, all_rows)
        tokens = Mux(is_rerank, 1, Mux(d.tokens == 0, walk.rows, d.tokens))
        outputs = Mux(is_rerank, tile_outputs, d.o)
        half_row = engine.cols * _FP16_BYTES
        m.d.sync += [
            job.mode.eq(Mux(is_attention, Mode.BYPASS, d.mode)),
            job.k.eq(Mux(is_attention & d.values, seen, d.k)),
            job.o.eq(Mux(is_attention & ~d.values, seen, outputs)),
            job.tokens.eq(Mux(is_attention, first_batch, tokens)),
            job.half.eq(d.half),
            job.discard.eq(d.discard | is_rerank),
            job.rank.eq((d.kind == DescriptorKind.ARGMAX) | is_rerank),
            job.keep.eq(0),
            job.whole.eq(d.extra != 0),
            job.again.eq(0),
            job.tile.eq(0),
            job.columns.eq(-1),
            job.plane.eq(d.plane),
            job.residual.eq(d.residual),
            job.groups.eq(d.groups),
            job.activations.eq(d.activations),
            job.results.eq(d.results + Mux(d.half, before * half_row, before * (2 * half_row))),
            job.stride.eq(Mux(is_attention, d.extra, 0)),
            rows_left.eq(Mux(is_attention, all_rows - first_batch, 0)),
        ]

    def _send(
        self, m: Module, job: data.View, rows_left: Signal, d: data.View, next_one: Signal
    ) -> None:
        """When the job is taken, go on with the descriptor's next batch or the next descriptor."""
        engine, port = self.config.engine, self.config.data
        with m.If(self.jobs.ready):
            with m.If(d.kind == DescriptorKind.ARGMAX):
                m.next = "RANKED"
            with m.Elif(d.kind == DescriptorKind.RERANK):
                m.next = "TILES"
            with m.Elif(rows_left == 0):
                m.d.comb += next_one.eq(1)
                m.next = "FETCH"
            with m.Else():
                beats = ceil_div(job.k * self.config.activation_bytes, port.beat_bytes)
                tiles = ceil_div(job.o, engine.cols)
                half_bytes = tiles * (engine.rows * engine.cols * _FP16_BYTES)
                tokens = Mux(rows_left > engine.rows, engine.rows, rows_left)
                m.d.sync += [
                    job.activations.eq(job.activations + (beats << port.offset_bits)),
                    job.results.eq(job.results + Mux(job.half, half_bytes, half_bytes << 1)),
                    job.tokens.eq(tokens),
                    rows_left.eq(rows_left - tokens),
                ]
                m.next = "JOB"
        with m.Else():
            m.next = "JOB"


class _VectorCheck:
    """What may be wrong with a descriptor if it is a VECTOR."""

    is_known: Value
    is_reserved: Value
    has_bad_size: Value
    is_misaligned: Value

    def __init__(self, m: Module, config: AcceleratorConfig, d: data.View, walk: data.View) -> None:
        engine = config.engine
        is_vector = d.kind == DescriptorKind.VECTOR

        def is_any(*operations: VectorOperation) -> Value:
            return Cat(d.operation == operation for operation in operations).any()

        has_target = Signal()
        with m.Switch(d.operation):
            for operation, targets in TARGETS.items():
                with m.Case(operation):
                    m.d.comb += has_target.eq(Cat(d.target == target for target in targets).any())
        is_softmax = is_any(VectorOperation.SOFTMAX)
        is_quantize = is_any(VectorOperation.QUANTIZE)
        self.is_known = ~is_vector | has_target
        self.is_reserved = is_vector & (
            (is_softmax & (d.k != 0)) | (is_any(VectorOperation.NORM) & ~d.values)
        )

        has_slots = is_softmax | is_any(VectorOperation.NORMALIZE)
        drafts = is_quantize | (d.target == Target.DRAFT_ACTIVATIONS)
        has_one_segment = drafts | (d.target == Target.ACTIVATIONS)
        seen = walk.position + walk.rows
        last_slot = d.o[: config.query_heads.bit_length()] + d.sharing
        self.has_bad_size = is_vector & (
            _is_outside(walk.rows, Mux(drafts, engine.draft_rows, engine.rows))
            | (seen > engine.max_k)
            | (~is_softmax & _is_outside(d.k, engine.max_k))
            | (d.o > config.query_heads)
            | (has_slots & (last_slot > config.query_heads))
            | (~has_slots & (d.o == 0))
            | (has_one_segment & (d.o != 1))
            | ((has_slots | (d.target == Target.QUERIES)) & (d.sharing == 0))
            | d.extra[DETAIL_BITS:].any()
        )

        beat = config.data.offset_bits
        offsets = {
            "data": beat,
            "word": (config.activation_bytes - 1).bit_length(),
        }
        has_distance = is_any(VectorOperation.EMBED, VectorOperation.ROTATE)
        # Values are written as they lie there, and moved entries are read so.
        has_lines = (d.target == Target.VALUES) | is_any(VectorOperation.MOVE)
        self.is_misaligned = is_vector & (
            Cat(
                _is_misaligned(d[name], offsets[use.port], config.address_bits)
                for name, use in FORMS[DescriptorKind.VECTOR].uses.items()
                if use.port is not None
            ).any()
            | (has_distance & d.extra[:beat].any())
            | (has_lines & (d.residual[:beat].any() | d.groups[:beat].any()))
        )


def read_error(fault: Value) -> Value:
    """The error code of a fault of a reader, which is not NONE."""
    return Mux(
        fault == Fault.REFUSED,
        ErrorCode.READ_OUTSIDE,
        Mux(fault == Fault.SLAVE, ErrorCode.READ_SLVERR, ErrorCode.READ_DECERR),
    )


def _is_outside(value: Value, most: Value | int) -> Value:
    """Whether a size is 0 or larger than allowed."""
    return (value == 0) | (value > most)


def _is_misaligned(value: Value, offset_bits: int, address_bits: int) -> Value:
    """Whether an address is no multiple of 2^offset_bits or has too many bits."""
    value = Value.cast(value)
    return value[:offset_bits].any() | value[address_bits:].any()
