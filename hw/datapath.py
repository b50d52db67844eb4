# SPDX-License-Identifier: Apache-2.0
"""GEMMs on memory: the engine between its readers and its writer."""

from __future__ import annotations

from amaranth.hdl import (
    Cat,
    Const,
    Elaboratable,
    Module,
    Mux,
    ResetInserter,
    Signal,
    Value,
)
from amaranth.lib import data, stream, wiring
from amaranth.lib.fifo import SyncFIFO
from amaranth.lib.wiring import In, Out

from speq.hw.accelerator_config import AcceleratorConfig, ErrorCode
from speq.hw.array.gemm_engine import STALLS, GemmEngine
from speq.hw.common.logic import ceil_div
from speq.hw.control.program_walker import read_error
from speq.hw.control.ranker import Ranker
from speq.hw.engine_config import Mode
from speq.hw.memory.activation_reader import ActivationReader
from speq.hw.memory.axi import Fault
from speq.hw.memory.data_port import DataPort
from speq.hw.memory.group_reader import GroupReader
from speq.hw.memory.memory_writer import MemoryWriter, write_layout
from speq.hw.memory.ranking_writer import RankingWriter, ranking_command_layout
from speq.hw.memory.result_writer import ResultWriter
from speq.hw.memory.weight_reader import WeightReader
from speq.hw.memory.write_combiner import LASTS
from speq.hw.memory.write_mux import WriteMux
from speq.hw.sampling.perturber import Perturber
from speq.hw.vector.command import rows_layout, vector_command_layout
from speq.hw.vector.vector_unit import VectorUnit

#: Jobs that are taken before the first of them has finished.
_JOBS = 8
_RESULTS, _RANKING, _RING = range(3)
_WRITERS = 3  # besides those of the vector unit
_LABEL = data.StructLayout({"kind": 4, "mode": 2})
#: Members of `Perturber` that say whether and how results are perturbed.
_SAMPLING = ("sample", "truncate", "scale", "cutoff", "seed", "positions")


def _queued_layout(config: AcceleratorConfig) -> data.StructLayout:
    """What is kept of a job while it is under way."""
    return data.StructLayout({"label": _LABEL, "descriptor": config.address_bits})


class Datapath(wiring.Component):
    """Carry out jobs: weights, group bytes and activations are read from memory, results are
    written to it and ranked.

    All but weights goes through a `DataPort`, whose window of addresses is on chip.

    A job goes to all units at once. Each works through its own queue, so that the readers run
    ahead of the array, from job to job as well, and the writer follows behind.

    Faults: the first bad response or refused transfer of any unit sets `error`, and what depends on
    it does not happen; `clear` drops all work. Outstanding transactions are then waited for.

    A result that is not finite sets `error` to NONFINITE in the cycle after the one in which it is
    on offer, with the address of its job's descriptor, however far the readers are ahead. Its job
    is not over then, or has been for less than a cycle: nothing that waits for `idle` has followed.
    What the job writes is undefined.

    Parameters
    ----------
    config : AcceleratorConfig

    Members
    -------
    weights_axi : Out(config.weights.read_signature)
    data_read_axi : Out(config.data.read_signature)
    data_write_axi : Out(config.data.write_signature)
    program_axi : In(config.data.read_signature)
        A further reader of the data port.
    jobs : In(stream of config.job_layout)
        GEMMs that the engine can run, with aligned addresses; of those with `rank` but without
        `keep` only one at a time.
    kind : In(8)
    descriptor : In(address_bits)
    last : In(1)
        Kind and address of the descriptor that the job is from, and whether it is its last one.
    rank_command, rank_idle
        Transfers of the last ranking to memory, and whether none is under way.
    sample, truncate : In(1), scale, cutoff, seed, positions : In
        Whether results are perturbed before they are ranked, and how (`Perturber`).
    rank_missed : Out(1)
        Whether an entry of the last ranking may be wrong (`Ranker`); while `idle`.
    rank_row : In, rank_entries : Out
        The last ranking, for reading.
    ring_command, ring_data, ring_done
        A further writer.
    vector : In(stream of vector_command_layout(config)), rows : In(rows_layout(config))
        Work of the vector unit, and the rows of the pass that it is part of.
    vector_idle, vector_stalls : Out(1)
        It is finished, with all its effects on memory; it waits for operands.
    products_left, vectors_left : Out
        Descriptors whose last job, or whose vector work, has been taken, and whose results are not
        all in memory. They finish in their order. These six are there if the configuration has
        lanes.
    idle : Out(1)
        No job is under way, all results are in memory.
    current : Out({kind: 4, mode: 2})
        Of the oldest job that is under way; kind is 0 if there is none.
    step : Out(1)
        The array takes a weight word.
    stalls : Out(STALLS)
    read_base, read_limit, write_base, write_limit : In(address_bits)
        First and last byte of the regions.
    scratch : In(address_bits)
        First byte of the window, if the configuration has a scratch memory; 0: there is none.
    error : Out(ErrorCode)
    error_address : Out(address_bits)
    clear : In(1)
        Level of one cycle or more.
    drained : Out(1)
        From the second cycle of `clear` on: no transaction is outstanding any more.
    """

    def __init__(self, config: AcceleratorConfig) -> None:
        self.config = config
        address = config.address_bits
        self._perturber = perturber = Perturber(config)
        self._vector = VectorUnit(config) if config.lanes else None
        vector = {}
        if config.lanes:
            vector = {
                "vector": In(stream.Signature(vector_command_layout(config))),
                "rows": In(rows_layout(config)),
                "vector_idle": Out(1),
                "vector_stalls": Out(1),
                "products_left": Out(range(_JOBS + 1)),
                "vectors_left": Out(range(LASTS + 1)),
            }
        super().__init__(
            {
                "weights_axi": Out(config.weights.read_signature),
                "data_read_axi": Out(config.data.read_signature),
                "data_write_axi": Out(config.data.write_signature),
                "program_axi": In(config.data.read_signature),
                "jobs": In(stream.Signature(config.job_layout)),
                "kind": In(8),
                "descriptor": In(address),
                "last": In(1),
                "rank_command": In(stream.Signature(ranking_command_layout(config))),
                "rank_idle": Out(1),
                **{name: perturber.signature.members[name] for name in _SAMPLING},
                "rank_missed": Out(1),
                "rank_row": In(config.engine.row_bits),
                "rank_entries": Out(config.ranking_layout),
                "ring_command": In(stream.Signature(config.data.command_layout)),
                "ring_data": In(stream.Signature(write_layout(config.data))),
                "ring_done": Out(1),
                **vector,
                **({"scratch": In(address)} if config.scratch else {}),
                "idle": Out(1),
                "current": Out(_LABEL),
                "step": Out(1),
                "stalls": Out(STALLS),
                "read_base": In(address),
                "read_limit": In(address),
                "write_base": In(address),
                "write_limit": In(address),
                "error": Out(ErrorCode),
                "error_address": Out(address),
                "clear": In(1),
                "drained": Out(1),
            }
        )
        self.engine = GemmEngine(config.engine)
        self._nonfinite = Signal()
        self._culprit = Signal(address, name="culprit", reset_less=True)

    @property
    def modules(self) -> dict[str, wiring.Component]:
        """Units that are instantiated, by the names of their Verilog modules."""
        vector = {} if self._vector is None else self._vector.modules
        return self.engine.array.modules | vector

    def elaborate(self, platform: object) -> Elaboratable:
        m = Module()
        config = self.config
        engine = self.engine
        cleared = Signal()
        m.d.sync += cleared.eq(self.clear)
        drop = self.clear & ~cleared  # the memory units drain by themselves behind a pulse
        resettable = ResetInserter(self.clear)

        weights = WeightReader(config)
        groups = GroupReader(config)
        activations = ActivationReader(config)
        m.submodules.engine = resettable(engine)
        m.submodules.weight_reader = weights
        m.submodules.group_reader = groups
        m.submodules.activation_reader = activations
        readers = (weights, groups, activations)
        for reader in readers:
            m.d.comb += [
                reader.base.eq(self.read_base),
                reader.limit.eq(self.read_limit),
                reader.clear.eq(drop),
            ]
        wiring.connect(m, weights.weights, engine.weights)
        wiring.connect(m, groups.groups, engine.groups)
        wiring.connect(m, activations.activations, engine.activations)
        wiring.connect(m, weights.axi, wiring.flipped(self.weights_axi))
        masters = [wiring.flipped(self.program_axi), groups.axi, activations.axi]
        sources = []
        if self._vector is not None:
            self._connect_vector(m, self._vector)
            masters += [self._vector.reads[i] for i in range(VectorUnit.READERS)]
            sources += [self._vector.writes[i] for i in range(VectorUnit.WRITERS)]
            readers += (self._vector,)
        m.submodules.data_port = port = DataPort(config.data, len(masters), config.scratch)
        for i, master in enumerate(masters):
            wiring.connect(m, master, port.readers[i])
        wiring.connect(m, port.read, wiring.flipped(self.data_read_axi))
        wiring.connect(m, port.write, wiring.flipped(self.data_write_axi))
        if config.scratch:
            m.d.comb += port.base.eq(self.scratch)

        result_writer = ResultWriter(config)
        writer = self._connect_writers(m, result_writer, sources, resettable, drop)
        wiring.connect(m, writer.axi, port.writer)
        self._dispatch(m, (weights, groups, activations), result_writer)
        self._report(m, readers, writer)
        return m

    def _connect_vector(self, m: Module, vector: VectorUnit) -> None:
        """The vector unit, but for its ways to memory."""
        m.submodules.vector = vector
        wiring.connect(m, wiring.flipped(self.vector), vector.command)
        m.d.comb += [
            vector.base.eq(self.read_base),
            vector.limit.eq(self.read_limit),
            vector.clear.eq(self.clear),
            vector.rows.eq(self.rows),
            self.vector_idle.eq(vector.idle),
            self.vector_stalls.eq(vector.stalls),
            self.vectors_left.eq(vector.left),
        ]

    def _connect_writers(
        self,
        m: Module,
        results: ResultWriter,
        others: list[wiring.PureInterface],
        resettable: ResetInserter,
        drop: Value,
    ) -> MemoryWriter:
        """All that is written, through one writer."""
        config = self.config
        m.submodules.writer = writer = MemoryWriter(config.data)
        m.submodules.result_writer = resettable(results)
        mux = WriteMux(config.data, _WRITERS + len(others))
        m.submodules.write_mux = resettable(mux)
        ranker = Ranker(config)
        m.submodules.ranker = resettable(ranker)
        ranking = RankingWriter(config)
        m.submodules.ranking_writer = resettable(ranking)
        wiring.connect(m, self.engine.results, results.results)
        m.submodules.perturber = resettable(self._perturber)
        wiring.connect(m, results.ranked, self._perturber.results)
        wiring.connect(m, self._perturber.perturbed, ranker.results)
        wiring.connect(m, self._perturber.rank_start, ranker.start)
        m.d.comb += [getattr(self._perturber, name).eq(getattr(self, name)) for name in _SAMPLING]
        wiring.connect(m, results.write_command, mux.sources[_RESULTS].command)
        wiring.connect(m, results.write_data, mux.sources[_RESULTS].data)
        wiring.connect(m, ranking.write_command, mux.sources[_RANKING].command)
        wiring.connect(m, ranking.write_data, mux.sources[_RANKING].data)
        wiring.connect(m, wiring.flipped(self.ring_command), mux.sources[_RING].command)
        wiring.connect(m, wiring.flipped(self.ring_data), mux.sources[_RING].data)
        for i, source in enumerate(others):
            wiring.connect(m, source, mux.sources[_WRITERS + i])
        wiring.connect(m, mux.command, writer.command)
        wiring.connect(m, mux.data, writer.data)
        wiring.connect(m, wiring.flipped(self.rank_command), ranking.command)
        m.d.comb += [
            writer.base.eq(self.write_base),
            writer.limit.eq(self.write_limit),
            writer.clear.eq(drop),
            mux.done_in.eq(writer.done),
            self.ring_done.eq(mux.sources[_RING].done),
            ranker.row.eq(Mux(ranking.busy, ranking.row, self.rank_row)),
            ranker.truncate.eq(self._perturber.truncates),
            ranker.logits.eq(self._perturber.logits),
            ranker.cutoff.eq(self._perturber.row_cutoff),
            self.rank_missed.eq(ranker.missed),
            ranking.entries.eq(ranker.entries),
            self.rank_entries.eq(ranker.entries),
        ]
        self._ranker, self._ranking, self._mux = ranker, ranking, mux
        return writer

    def _dispatch(self, m: Module, readers: tuple, results: ResultWriter) -> None:
        """Hand each job to all units that take part in it, each as soon as it is ready."""
        config = self.config
        weights, groups, activations = readers
        job = self.jobs.payload
        tiles = ceil_div(job.o, config.engine.cols)
        takers = (
            (self.engine.command, Const(1), {}),
            (weights.command, Const(1), {"tiles": tiles}),
            (groups.command, job.mode != Mode.BYPASS, {"tiles": tiles}),
            (activations.command, Const(1), {"address": job.activations}),
            (results.command, Const(1), {"tiles": tiles, "address": job.results}),
            (self._perturber.start, job.rank, {"tiles": tiles}),
        )
        layout = _queued_layout(config)
        labels = SyncFIFO(width=layout.size, depth=_JOBS)
        oldest = data.View(layout, labels.r_data)
        m.submodules.labels = ResetInserter(self.clear)(labels)
        room = labels.w_rdy
        if config.lanes:
            room &= self.products_left != _JOBS
        handed = Signal(len(takers))
        taken = Signal(len(takers))
        accept = Signal()
        for i, (taker, needed, other) in enumerate(takers):
            m.d.comb += [
                taker.valid.eq(self.jobs.valid & room & ~handed[i] & needed),
                taken[i].eq((taker.valid & taker.ready) | handed[i] | ~needed),
            ]
            for name, _ in taker.payload.shape():
                m.d.comb += taker.payload[name].eq(other[name] if name in other else job[name])
        m.d.comb += [
            self.jobs.ready.eq(taken.all() & room),
            accept.eq(self.jobs.valid & self.jobs.ready),
            labels.w_data.eq(Cat(self.kind[:4], job.mode, self.descriptor)),
            labels.w_en.eq(accept),
            labels.r_en.eq(results.done),
        ]
        with m.If(self.jobs.valid & room):
            m.d.sync += handed.eq(Mux(accept, 0, taken))
        with m.If(self.clear):
            m.d.sync += handed.eq(0)

        if config.lanes:
            self._count(m, accept, tiles)

        # Writes that have not been answered, and the label of what they belong to.
        unanswered = Signal(16)
        asked = Signal()
        last_label = Signal(_LABEL.size)
        m.d.comb += asked.eq(results.write_command.valid & results.write_command.ready)
        m.d.sync += unanswered.eq(unanswered + asked - self._mux.sources[_RESULTS].done)
        with m.If(self.clear):
            m.d.sync += unanswered.eq(0)
        with m.If(labels.r_rdy):
            m.d.sync += last_label.eq(oldest.label)
        under_way = labels.r_rdy | (unanswered != 0) | self._ranker.busy
        m.d.comb += [
            self.idle.eq(~under_way),
            self.current.eq(Mux(labels.r_rdy, oldest.label, Mux(under_way, last_label, 0))),
            self.step.eq(self.engine.step),
            self.stalls.eq(self.engine.stalls),
        ]
        # A result on offer belongs to the oldest job, whose label may come a little later.
        known = Signal()
        m.d.comb += self._nonfinite.eq(self.engine.nonfinite & known)
        with m.If(~self._nonfinite):
            m.d.sync += [self._culprit.eq(oldest.descriptor), known.eq(labels.r_rdy)]
        with m.If(self.clear):
            m.d.sync += known.eq(0)
        transfer = Signal()
        with m.If(self.rank_command.valid & self.rank_command.ready):
            m.d.sync += transfer.eq(1)
        with m.Elif(self._mux.sources[_RANKING].done | self.clear):
            m.d.sync += transfer.eq(0)
        m.d.comb += self.rank_idle.eq(~transfer)

    def _count(self, m: Module, accept: Value, tiles: Value) -> None:
        """Products whose results are not in memory. Each tile is a write, and they are answered in
        their order."""
        bits = self.config.tiles_bits + _JOBS.bit_length()
        asked = Signal(bits)  # by all jobs that have been taken
        answered = Signal(bits)
        ends = SyncFIFO(width=bits, depth=_JOBS)
        m.submodules.ends = ResetInserter(self.clear)(ends)
        following = (asked + Mux(self.jobs.payload.discard, 0, tiles))[:bits]
        finished = Signal()
        m.d.comb += [
            ends.w_data.eq(following),
            ends.w_en.eq(accept & self.last),
            ends.r_en.eq(finished),
            self.products_left.eq(ends.level),
        ]
        # The next one's end is there two cycles after the end of the one before has been taken.
        m.d.sync += [
            finished.eq(ends.r_rdy & ~finished & ~(answered - ends.r_data)[bits - 1]),
            answered.eq(answered + self._mux.sources[_RESULTS].done),
        ]
        with m.If(accept):
            m.d.sync += asked.eq(following)
        with m.If(self.clear):
            m.d.sync += [asked.eq(0), answered.eq(0), finished.eq(0)]

    def _report(self, m: Module, readers: tuple, writer: MemoryWriter) -> None:
        """The first error, and whether all transactions are over."""
        with m.If(self._nonfinite):
            m.d.comb += [
                self.error.eq(ErrorCode.NONFINITE),
                self.error_address.eq(self._culprit),
            ]
        units = [(reader, read_error(reader.error)) for reader in readers]
        units.append((writer, write_error(writer.error)))
        for unit, code in reversed(units):
            with m.If(unit.error != Fault.NONE):
                m.d.comb += [self.error.eq(code), self.error_address.eq(unit.error_address)]
        busy = Cat(unit.busy for unit, _ in units).any()
        m.d.comb += self.drained.eq(~busy)


def write_error(fault: Value) -> Value:
    """The error code of a fault of a writer, which is not NONE."""
    return Mux(
        fault == Fault.REFUSED,
        ErrorCode.WRITE_OUTSIDE,
        Mux(fault == Fault.SLAVE, ErrorCode.WRITE_SLVERR, ErrorCode.WRITE_DECERR),
    )
