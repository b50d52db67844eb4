# SPDX-License-Identifier: Apache-2.0
"""Walking through a program: descriptors are fetched, checked and carried out in order."""

from __future__ import annotations

from dataclasses import replace

from amaranth.hdl import Cat, Const, Elaboratable, Module, Mux, ResetInserter, Signal, Value
from amaranth.lib import data, stream, wiring
from amaranth.lib.wiring import In, Out

from speq.hw.accelerator_config import AcceleratorConfig, ErrorCode
from speq.hw.common.logic import any_of, ceil_div, exceeds, incremented, registered
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
_ADDRESSES = ("plane", "residual", "groups", "activations", "results", "extra")
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
        # What a batch of an ATTENTION adds to the addresses.
        self._activation_bytes = Signal(address, name="activation_bytes", reset_less=True)
        self._result_bytes = Signal(address, name="result_bytes", reset_less=True)
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
            m.d.sync += [number.eq(number + 1), address.eq(_next_place(address))]

        facts = _Facts(m, config, descriptor, walk)
        job = Signal(config.job_layout, reset_less=True)
        rows_left = Signal.like(facts.all_rows, reset_less=True)
        failed = Signal(ErrorCode)
        code = self._check(m, descriptor, facts)
        checked = Signal()  # in the cycle before
        m.submodules.tiles = tiles = CandidateTiles(config)
        m.d.comb += [
            tiles.candidates.eq(descriptor.tokens),
            tiles.entries.eq(self.rank_entries),
            *(tiles.layer[name].eq(descriptor[name]) for name, _ in tiles.layer.shape()),
            self.jobs.payload.eq(job),
            self.kind.eq(descriptor.kind),
            self.last.eq(rows_left == 0),
            self.rank_command.payload.address.eq(descriptor.extra),
            self.rank_command.payload.tokens.eq(job.tokens),
            self.error.eq(failed),
        ]
        m.d.sync += self.error_address.eq(address)
        idle = self.idle
        is_product = facts.is_any(DescriptorKind.GEMM, DescriptorKind.ATTENTION)
        may_start = (is_product & ~descriptor.wait) | idle
        if config.lanes:
            is_vector = facts.is_any(DescriptorKind.VECTOR)
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
        fetch_failed = registered(
            m, (reader.error != Fault.NONE) & (reader.error_address == beat), "fetch_failed"
        )
        # Nothing arrives in the cycle behind `next_one`, so this is in time.
        at_end = registered(m, number == self.length, "at_end")
        with m.FSM(name="state"):
            with m.State("FETCH"):
                with m.If(walking & at_end):
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
                self._make_job(m, job, rows_left, descriptor, facts, walk)
                m.d.sync += checked.eq(1)
                m.next = "WAIT"
            with m.State("WAIT"):
                m.d.sync += checked.eq(0)
                m.d.comb += self.started.eq(checked & (code == ErrorCode.NONE))
                with m.If(code != ErrorCode.NONE):
                    m.d.sync += failed.eq(code)
                    m.next = "FAILED"
                with m.Elif(may_start):
                    with m.Switch(descriptor.kind):
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
                            self._send(m, job, rows_left, facts, next_one)
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
                self._send(m, job, rows_left, facts, next_one)
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
                asked.eq(_next_place(asked)),
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

    def _check(self, m: Module, d: data.View, facts: _Facts) -> Signal:
        """The first thing that is wrong with a descriptor, from the second cycle on in which its
        `_Facts` are known."""
        kinds = DescriptorKind
        is_gemm = facts.is_any(kinds.GEMM, kinds.ARGMAX)
        is_attention, is_rerank = facts.is_any(kinds.ATTENTION), facts.is_any(kinds.RERANK)
        is_product = facts.is_any(*_PRODUCTS)
        unknown = ~any_of(facts.kinds.values()) | (is_gemm & (d.mode == _NO_MODE))

        reserved = any_of(
            facts.is_any(kind) & facts.any_used(_unused(kind)) for kind in facts.kinds
        )
        reserved |= is_gemm & any_of(
            (d.mode == mode) & facts.any_used(_unused_in(mode)) for mode in Mode
        )
        # What the KV entries take the place of.
        reserved |= is_attention & Mux(
            d.values, *(facts.any_used(_unused_in_attention(v)) for v in (True, False))
        )

        # In attention the KV entries are an inner or an outer dimension.
        by_entries = is_attention & d.values
        in_draft = is_gemm & (d.mode == Mode.DRAFT)
        bad_size = is_product & (
            (~by_entries & facts.k_outside)
            | (is_attention & facts.seen_outside)
            | (~is_rerank & Mux(is_attention & ~d.values, facts.seen_too_many, facts.o_outside))
            | (is_rerank & facts.candidates_outside)
            | (is_gemm & Mux(in_draft, facts.draft_tokens_outside, facts.tokens_outside))
            | (is_attention & (~facts.used["sharing"] | facts.rows_none))
        )

        # The member `extra` of the layout is one or the other.
        shared = {
            "stride": ("extra", is_attention),
            "ranking": ("extra", ~is_attention),
        }
        misaligned = is_product & any_of(
            facts.misaligned[member, port.offset_bits] & condition
            for port, names in (
                (self.config.weights, _places("weights")),
                (self.config.data, _places("data")),
            )
            for member, condition in (shared.get(name, (name, is_product)) for name in names)
        )
        if self.config.lanes:
            vector = _VectorCheck(m, self.config, d, facts)
            unknown |= vector.is_unknown
            reserved |= vector.is_reserved
            bad_size |= vector.has_bad_size
            misaligned |= vector.is_misaligned

        code = Signal(ErrorCode)
        wrong = Cat(unknown, reserved, bad_size, misaligned)
        found = registered(m, wrong, "wrong")
        codes = (
            *(ErrorCode.UNKNOWN_KIND, ErrorCode.RESERVED),
            *(ErrorCode.BAD_SIZE, ErrorCode.MISALIGNED),
        )
        for is_wrong, meaning in reversed([*zip(found, codes, strict=True)]):
            with m.If(is_wrong):
                m.d.comb += code.eq(meaning)
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
        facts: _Facts,
        walk: data.View,
    ) -> None:
        """The descriptor's first job, behind the tiles before its results, and what a further batch
        of an ATTENTION adds to it."""
        config = self.config
        engine, port = config.engine, config.data
        is_attention = facts.is_any(DescriptorKind.ATTENTION)
        is_rerank = facts.is_any(DescriptorKind.RERANK)
        tile_outputs = min(engine.cols, engine.max_o)  # a tile is a GEMM of its own
        first_batch, other_rows = self._batch(facts.all_rows)
        tokens = Mux(is_rerank, 1, Mux(facts.used["tokens"], d.tokens, walk.rows))
        outputs = Mux(is_rerank, tile_outputs, d.o)
        before = Mux(
            facts.is_any(DescriptorKind.GEMM),
            Mux(facts.used["tokens"], facts.own_rows_before, facts.all_rows),
            0,
        )
        half_row = engine.cols * _FP16_BYTES
        inner = Mux(d.values, facts.seen, d.k[: engine.k_bits])
        outer = Mux(d.values, d.o[: engine.o_bits], facts.seen)
        beats = ceil_div(inner * config.activation_bytes, port.beat_bytes)
        half_bytes = ceil_div(outer, engine.cols) * (engine.rows * engine.cols * _FP16_BYTES)
        m.d.sync += [
            job.mode.eq(Mux(is_attention, Mode.BYPASS, d.mode)),
            job.k.eq(Mux(is_attention & d.values, facts.seen, d.k)),
            job.o.eq(Mux(is_attention & ~d.values, facts.seen, outputs)),
            job.tokens.eq(Mux(is_attention, first_batch, tokens)),
            job.half.eq(d.half),
            job.discard.eq(d.discard | is_rerank),
            job.rank.eq(facts.is_any(DescriptorKind.ARGMAX) | is_rerank),
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
            rows_left.eq(Mux(is_attention, other_rows, 0)),
            self._activation_bytes.eq(beats << port.offset_bits),
            self._result_bytes.eq(Mux(d.half, half_bytes, half_bytes << 1)),
        ]

    def _batch(self, rows: Value) -> tuple[Value, Value]:
        """Of so many rows of an ATTENTION, how many are in the next batch, and in those behind."""
        most = self.config.engine.rows
        rest = rows - most  # one bit longer
        return Mux(rest[-1], rows, most), Mux(rest[-1], 0, rest[:-1])

    def _send(
        self, m: Module, job: data.View, rows_left: Signal, facts: _Facts, next_one: Signal
    ) -> None:
        """When the job is taken, go on with the descriptor's next batch or the next descriptor."""
        with m.If(self.jobs.ready):
            with m.If(facts.is_any(DescriptorKind.ARGMAX)):
                m.next = "RANKED"
            with m.Elif(facts.is_any(DescriptorKind.RERANK)):
                m.next = "TILES"
            with m.Elif(rows_left == 0):
                m.d.comb += next_one.eq(1)
                m.next = "FETCH"
            with m.Else():
                tokens, rest = self._batch(rows_left)
                m.d.sync += [
                    job.activations.eq(job.activations + self._activation_bytes),
                    job.results.eq(job.results + self._result_bytes),
                    job.tokens.eq(tokens),
                    rows_left.eq(rest),
                ]
                m.next = "JOB"
        with m.Else():
            m.next = "JOB"


class _Facts:
    """What the checks and the jobs need to know of a descriptor, in registers: of what it is in the
    cycle before. So no path leads from the words of a descriptor through sizes and addresses to
    what happens.

    Attributes
    ----------
    kinds : dict of DescriptorKind to Signal(1)
        Which kind it is.
    used : dict of str to Signal(1)
        Whether a field is not 0.
    misaligned : dict of (str, int) to Signal(1)
        Whether a field is no multiple of 2^number, or no address.
    k_outside, o_outside, candidates_outside : Signal(1)
        A size of a product is 0 or too large.
    tokens_outside, draft_tokens_outside : Signal(1)
        The same of its rows.
    seen : Signal
        KV entries that the pass sees.
    seen_outside, seen_too_many : Signal(1)
        They are none, or more than a product's inner or outer dimension.
    rows_none, rows_outside, draft_rows_outside : Signal(1)
        Of the pass.
    all_rows : Signal
        Rows of all batches of an ATTENTION, and those of the tiles before a GEMM's results if its
        rows are the pass's.
    own_rows_before : Signal
        The same if they are its own.
    has_slots : Signal(1)
        Its operation is SOFTMAX or NORMALIZE.
    """

    def __init__(self, m: Module, config: AcceleratorConfig, d: data.View, walk: data.View) -> None:
        engine = config.engine
        self._m, self._d = m, d
        self.kinds = {
            kind: registered(m, d.kind == kind, f"is_{kind.name.lower()}")
            for kind in _kinds(config)
        }
        self.used = {
            name: registered(m, Value.cast(d[name]).any(), f"used_{name}")
            for name, _ in DESCRIPTOR
            if name != "kind"
        }
        offsets = {config.weights.offset_bits, config.data.offset_bits}
        if config.lanes:
            offsets.add((config.activation_bytes - 1).bit_length())
        self.misaligned = {
            (name, bits): registered(
                m, _is_misaligned(d[name], bits, config.address_bits), f"misaligned_{name}_{bits}"
            )
            for name in _ADDRESSES
            for bits in sorted(offsets)
        }

        def outside(what: str, value: Value, most: int) -> Signal:
            return registered(m, _is_outside(value, most), f"{what}_outside")

        rows = walk.rows
        self.k_outside = outside("k", d.k, engine.max_k)
        self.o_outside = outside("o", d.o, engine.max_o)
        self.candidates_outside = outside("candidates", d.tokens, config.choices)
        self.rows_none = registered(m, rows == 0, "rows_none")
        self.rows_outside = outside("rows", rows, engine.rows)
        self.draft_rows_outside = outside("draft_rows", rows, engine.draft_rows)
        tokens = Mux(d.tokens == 0, rows, d.tokens)
        self.tokens_outside = outside("tokens", tokens, engine.rows)
        self.draft_tokens_outside = outside("draft_tokens", tokens, engine.draft_rows)
        # The pass is known long before its first descriptor.
        self.seen = registered(m, walk.position + rows, "seen")
        self.seen_outside = outside("seen", self.seen, engine.max_k)
        self.seen_too_many = outside("seen_outer", self.seen, engine.max_o)
        self.all_rows = registered(m, rows * d.sharing, "all_rows")
        self.own_rows_before = registered(m, d.tokens * d.sharing, "own_rows_before")
        slots = (VectorOperation.SOFTMAX, VectorOperation.NORMALIZE)
        self.has_slots = registered(m, any_of(d.operation == each for each in slots), "has_slots")

    def is_any(self, *kinds: DescriptorKind) -> Value:
        """Whether it is of one of these kinds."""
        return any_of(self.kinds[kind] for kind in kinds)

    def any_used(self, names: list[str]) -> Value:
        """Whether one of these fields is not 0."""
        return Cat(self.used[name] for name in names).any()


class _VectorCheck:
    """What may be wrong with a descriptor if it is a VECTOR."""

    is_unknown: Value
    is_reserved: Value
    has_bad_size: Value
    is_misaligned: Value

    def __init__(self, m: Module, config: AcceleratorConfig, d: data.View, facts: _Facts) -> None:
        is_vector = facts.is_any(DescriptorKind.VECTOR)

        def is_any(*operations: VectorOperation) -> Value:
            return any_of(d.operation == operation for operation in operations)

        has_target = Signal()
        with m.Switch(d.operation):
            for operation, targets in TARGETS.items():
                with m.Case(operation):
                    m.d.comb += has_target.eq(any_of(d.target == target for target in targets))
        is_softmax = is_any(VectorOperation.SOFTMAX)
        is_quantize = is_any(VectorOperation.QUANTIZE)
        self.is_unknown = is_vector & ~registered(m, has_target, "has_target")
        self.is_reserved = is_vector & (
            (is_softmax & facts.used["k"]) | (is_any(VectorOperation.NORM) & ~d.values)
        )

        drafts = is_quantize | (d.target == Target.DRAFT_ACTIVATIONS)
        has_one_segment = drafts | (d.target == Target.ACTIVATIONS)
        last_slot = d.o[: config.query_heads.bit_length()] + d.sharing
        too_many = registered(m, d.o > config.query_heads, "o_too_many")
        too_far = registered(m, last_slot > config.query_heads, "slot_too_far")
        not_one = registered(m, d.o != 1, "o_not_one")
        no_detail = registered(m, d.extra[DETAIL_BITS:].any(), "no_detail")
        self.has_bad_size = is_vector & (
            Mux(drafts, facts.draft_rows_outside, facts.rows_outside)
            | facts.seen_outside
            | (~is_softmax & facts.k_outside)
            | too_many
            | Mux(facts.has_slots, too_far, ~facts.used["o"])
            | (has_one_segment & not_one)
            | ((facts.has_slots | (d.target == Target.QUERIES)) & ~facts.used["sharing"])
            | no_detail
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
            any_of(
                facts.misaligned[name, offsets[use.port]]
                for name, use in FORMS[DescriptorKind.VECTOR].uses.items()
                if use.port is not None
            )
            | (has_distance & registered(m, d.extra[:beat].any(), "detail_misaligned"))
            | (has_lines & (facts.misaligned["residual", beat] | facts.misaligned["groups", beat]))
        )


def _next_place(address: Value) -> Value:
    """The address of the next descriptor."""
    low = DESCRIPTOR_BYTES.bit_length() - 1
    return Cat(address[:low], incremented(address[low:], Const(1)))


def read_error(fault: Value) -> Value:
    """The error code of a fault of a reader, which is not NONE."""
    return Mux(
        fault == Fault.REFUSED,
        ErrorCode.READ_OUTSIDE,
        Mux(fault == Fault.SLAVE, ErrorCode.READ_SLVERR, ErrorCode.READ_DECERR),
    )


def _is_outside(value: Value, most: int) -> Value:
    """Whether a size is 0 or larger than allowed."""
    return (value == 0) | exceeds(value, most)


def _is_misaligned(value: Value, offset_bits: int, address_bits: int) -> Value:
    """Whether an address is no multiple of 2^offset_bits or has too many bits."""
    value = Value.cast(value)
    return value[:offset_bits].any() | value[address_bits:].any()
