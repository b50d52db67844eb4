# SPDX-License-Identifier: Apache-2.0
"""The GEMM engine: streams of weights and activations in, a stream of rounded results out."""

from __future__ import annotations

from amaranth.hdl import Cat, Elaboratable, Module, Mux, Signal, Value
from amaranth.lib import data, stream, wiring
from amaranth.lib.fifo import SyncFIFOBuffered
from amaranth.lib.wiring import In, Out

from speq.hw.array.array import Array
from speq.hw.common.logic import ceil_div
from speq.hw.common.ram import Ram
from speq.hw.engine_config import DRAFT_LANES, FP16_BITS, EngineConfig, Mode


def command_layout(config: EngineConfig) -> data.StructLayout:
    """One GEMM: results[tokens, o] = activations[tokens, k] times weights[o, k] transposed.

    `half` asks for FP16 results.
    """
    return data.StructLayout(
        {
            "mode": Mode,
            "k": config.k_bits,
            "o": config.o_bits,
            "tokens": config.token_bits,
            "half": 1,
        }
    )


def result_layout(config: EngineConfig) -> data.StructLayout:
    """One row of one tile: `data` holds FP32, or FP16 zero-extended, in the columns that `strobe`
    marks; `row` is the token; `last` marks the last beat of a GEMM."""
    return data.StructLayout(
        {
            "data": data.ArrayLayout(32, config.cols),
            "strobe": config.cols,
            "row": config.row_bits,
            "last": 1,
        }
    )


#: Why the array stands still although there is a command whose last word it has not taken, one bit
#: each and never two: its activations, weight words or group bytes are not there, or there is no
#: room for the tile's results.
STALLS = data.StructLayout({"activations": 1, "weights": 1, "groups": 1, "results": 1})


class GemmEngine(wiring.Component):
    """Matrix multiplication of streams, in verify, draft or bypass mode.

    For each command the engine takes, in this order on each stream,

    - `activations`: k beats (verify, bypass; beat i is activation i of all rows) or ceil(k / 4)
      (draft; beat i is block activations 4i .. 4i + 3 of the drafting rows, zero beyond k). They
      go into one half of a double-buffered store, while the other half is in use;
    - `weights`: per tile of `cols` outputs, as many beats of one 16-bit word per column;
    - `groups` (verify, draft): per tile ceil(k / group) beats of one group byte per column;

    and gives, per tile, one beat on `results` for each token. Any k up to max_k, any o up to
    max_o and any number of tokens up to rows (draft: draft_rows) will do.

    Flow control: every stream may stall in any cycle; nothing is lost or repeated. A tile's last
    step waits until the result FIFO has room for the tile. Without stalls a GEMM takes ``max(k,
    tokens) * ceil(o / cols)`` cycles in verify and bypass mode and ``max(ceil(k / 4), tokens) *
    ceil(o / cols)`` in draft mode (a column's bus carries one result per cycle, so a tile cannot
    take fewer cycles than tokens), GEMMs of any mode follow each other without a gap if their
    activations are there, and the last result appears `OVERHEAD` + tokens - 1 cycles after the
    cycle that follows the last weight word. The first weight word is taken `FILL` cycles after
    the command, if activations come at once: loading and computing overlap.

    A command that the configuration cannot run (k, o or tokens 0 or too large, no such mode) is
    dropped and sets `rejected`.

    Parameters
    ----------
    config : EngineConfig

    Members
    -------
    command : In(stream of command_layout(config))
    activations : In(stream of config.activation_layout)
    weights : In(stream of ArrayLayout(16, cols))
    groups : In(stream of config.group_layout)
        Only in builds with draft hardware; the others take bypass commands only.
    results : Out(stream of result_layout(config))
    busy : Out(1)
        A command is being worked on or results have not been taken.
    step : Out(1)
        A weight word is taken in this cycle.
    stalls : Out(STALLS)
    rejected : Out(1)
        Sticky: a command was dropped.
    nonfinite : Out(1)
        Sticky: a result on offer was not finite. FP32 results are finite or NaN, because of an
        infinite or NaN operand; FP16 results can overflow as well.
    clear : In(1)
        Reset the sticky flags.
    """

    #: Cycles from taking a command to taking its first weight word.
    FILL = 2

    def __init__(self, config: EngineConfig) -> None:
        self.config = config
        tag = data.StructLayout({"columns": config.column_index_bits, "final": 1})
        self.array = Array(config, tag)
        store_width = config.activation_layout.size
        self.store = Ram(store_width, 2 * config.max_k)
        #: Cycles from taking a tile's last weight word to its first result beat.
        self.OVERHEAD = 1 + self.array.LATENCY + 2
        self._fifo_depth = 2 * config.rows + self.OVERHEAD + 2
        members = {
            "command": In(stream.Signature(command_layout(config))),
            "activations": In(stream.Signature(config.activation_layout)),
            "weights": In(stream.Signature(data.ArrayLayout(FP16_BITS, config.cols))),
            "results": Out(stream.Signature(result_layout(config))),
            "busy": Out(1),
            "step": Out(1),
            "stalls": Out(STALLS),
            "rejected": Out(1),
            "nonfinite": Out(1),
            "clear": In(1),
        }
        if config.draft_rows:
            members["groups"] = In(stream.Signature(config.group_layout))
        super().__init__(members)

    def elaborate(self, platform: object) -> Elaboratable:
        m = Module()
        config = self.config
        m.submodules.array = array = self.array
        m.submodules.store = store = self.store

        # A job is a command whose activations are in, or on their way into, a half of the store.
        job_layout = data.StructLayout(
            {
                "mode": Mode,
                "steps": config.k_bits,
                "o": config.o_bits,  # outputs that are left
                "tokens": config.token_bits,
                "half": 1,
                "loaded": config.k_bits,
            }
        )
        jobs = [Signal(job_layout, name=f"job_{i}", reset_less=True) for i in range(2)]
        occupied = Signal(2)
        self._load(m, jobs, occupied)

        running = Signal()
        job = Signal(job_layout)
        m.d.comb += job.eq(Mux(running, jobs[1], jobs[0]))
        index = Signal(config.k_bits)
        credits = Signal(range(self._fifo_depth + 1), init=self._fifo_depth)
        spacing = Signal(config.token_bits)  # cycles until a tile may end

        ready = Signal()
        step = self.step
        first = Signal()
        last = Signal()
        final = Signal()
        loaded = occupied.bit_select(running, 1) & (index < job.loaded)
        may_end = (spacing == 0) & (credits >= job.tokens)
        m.d.comb += [
            first.eq(index == 0),
            last.eq(index + 1 == job.steps),
            final.eq(1 if config.max_o <= config.cols else job.o <= config.cols),
            ready.eq(loaded & (~last | may_end)),
            step.eq(self.weights.valid & self.weights.ready),
        ]
        if config.draft_rows:
            group_mask = Mux(
                job.mode == Mode.DRAFT,
                config.format.group // DRAFT_LANES - 1,
                config.format.group - 1,
            )
            new_group = Signal()
            m.d.comb += [
                new_group.eq((job.mode != Mode.BYPASS) & ((index & group_mask) == 0)),
                self.weights.ready.eq(ready & (~new_group | self.groups.valid)),
                self.groups.ready.eq(ready & new_group & self.weights.valid),
            ]
            with m.If(step & new_group):
                m.d.sync += array.groups.eq(self.groups.payload)
        else:
            m.d.comb += self.weights.ready.eq(ready)
        with m.If(occupied.bit_select(running, 1)):
            with m.If(~loaded):
                m.d.comb += self.stalls.activations.eq(1)
            with m.Elif(~ready):
                m.d.comb += self.stalls.results.eq(1)
            with m.Elif(~self.weights.valid):
                m.d.comb += self.stalls.weights.eq(1)
            with m.Elif(~step):
                m.d.comb += self.stalls.groups.eq(1)

        taken = self.results.valid & self.results.ready
        m.d.sync += credits.eq(credits - Mux(step & last, job.tokens, 0) + taken)
        with m.If(spacing != 0):
            m.d.sync += spacing.eq(spacing - 1)
        with m.If(step):
            m.d.sync += index.eq(Mux(last, 0, index + 1))
            with m.If(last):
                m.d.sync += spacing.eq(job.tokens - 1)
                for i in range(2):
                    with m.If(running == i):
                        m.d.sync += jobs[i].o.eq(job.o - config.cols)
                with m.If(final):
                    m.d.sync += [
                        occupied.bit_select(running, 1).eq(0),
                        running.eq(~running),
                    ]

        # The store answers a cycle later, so the rest of the step waits for it.
        m.d.comb += [
            store.read_enable.eq(step),
            store.read_address.eq(self._store_address(running, index)),
            array.activations.eq(store.read_data),
        ]
        control = array.control
        m.d.sync += [
            array.weights.eq(self.weights.payload),
            control.valid.eq(step),
            control.mode.eq(job.mode),
            control.first.eq(first),
            control.last.eq(last),
            control.tokens.eq(job.tokens),
            control.half.eq(job.half),
            control.tag.columns.eq(Mux(final, job.o, config.cols)),
            control.tag.final.eq(final),
        ]
        self._deliver(m)
        m.d.comb += self.busy.eq(occupied.any() | (credits != self._fifo_depth))
        return m

    def _store_address(self, half: Value, index: Value) -> Value:
        """Address in the store of word `index` of a half."""
        max_k = self.config.max_k
        if max_k & (max_k - 1):
            return index + Mux(half, max_k, 0)
        return Cat(index[: max_k.bit_length() - 1], half)

    def _load(self, m: Module, jobs: list[data.View], occupied: Signal) -> None:
        """Take commands and their activations into the half of the store that is free."""
        config = self.config
        half = Signal()
        loading = Signal()
        loaded = Signal(config.k_bits, reset_less=True)
        steps = Signal(config.k_bits, reset_less=True)
        command = self.command.payload
        is_draft = command.mode == Mode.DRAFT
        new_steps = Mux(is_draft, ceil_div(command.k, DRAFT_LANES), command.k)
        accept = self.command.valid & self.command.ready
        runnable = Signal()
        m.d.comb += [
            runnable.eq(self._is_runnable(command)),
            self.command.ready.eq(~loading & ~occupied.bit_select(half, 1)),
            self.activations.ready.eq(loading),
        ]
        with m.If(self.clear):
            m.d.sync += self.rejected.eq(0)
        with m.If(accept & ~runnable):
            m.d.sync += self.rejected.eq(1)
        with m.If(accept & runnable):
            m.d.sync += [
                loading.eq(1),
                loaded.eq(0),
                steps.eq(new_steps),
                occupied.bit_select(half, 1).eq(1),
            ]

        write = self.activations.valid & self.activations.ready
        m.d.comb += [
            self.store.write_enable.eq(write),
            self.store.write_address.eq(self._store_address(half, loaded)),
            self.store.write_data.eq(self.activations.payload),
        ]
        with m.If(write):
            m.d.sync += loaded.eq(loaded + 1)
            with m.If(loaded + 1 == steps):
                m.d.sync += [loading.eq(0), half.eq(~half)]
        for i, job in enumerate(jobs):
            with m.If(half == i):
                with m.If(accept):
                    m.d.sync += [
                        job.mode.eq(command.mode),
                        job.steps.eq(new_steps),
                        job.o.eq(command.o),
                        job.tokens.eq(command.tokens),
                        job.half.eq(command.half),
                        job.loaded.eq(0),
                    ]
                with m.If(write):
                    m.d.sync += job.loaded.eq(loaded + 1)

    def _is_runnable(self, command: data.View) -> Value:
        """Whether the configuration can run a command."""
        config = self.config
        limits = (
            (command.k, config.max_k),
            (command.o, config.max_o),
            (command.tokens, config.rows),
        )
        conditions = [size != 0 for size, _ in limits]
        conditions += [size <= limit for size, limit in limits if limit + 1 < 1 << len(size)]
        mode = command.mode
        if config.draft_rows:
            conditions.append(Value.cast(mode) < len(Mode))
            if config.draft_rows < config.rows:
                conditions.append((mode != Mode.DRAFT) | (command.tokens <= config.draft_rows))
        else:
            conditions.append(mode == Mode.BYPASS)
        return Cat(conditions).all()

    def _deliver(self, m: Module) -> None:
        """Results from the array through the FIFO to the stream."""
        config = self.config
        array = self.array
        layout = data.StructLayout(
            {
                "data": data.ArrayLayout(32, config.cols),
                "columns": config.column_index_bits,
                "row": config.row_bits,
                "last": 1,
                "half": 1,
            }
        )
        m.submodules.fifo = fifo = SyncFIFOBuffered(width=layout.size, depth=self._fifo_depth)
        written = data.View(layout, fifo.w_data)
        read = data.View(layout, fifo.r_data)
        payload = self.results.payload
        m.d.comb += [
            written.data.eq(array.results),
            written.columns.eq(array.result_tag.columns),
            written.row.eq(array.result_row),
            written.last.eq(array.result_tag.final & array.result_last),
            written.half.eq(array.result_half),
            fifo.w_en.eq(array.result_valid),
            self.results.valid.eq(fifo.r_rdy),
            fifo.r_en.eq(self.results.ready),
            payload.data.eq(read.data),
            payload.strobe.eq(Cat(read.columns > column for column in range(config.cols))),
            payload.row.eq(read.row),
            payload.last.eq(read.last),
        ]
        is_nonfinite = Cat(
            Mux(read.half, lane[10:15].all(), lane[23:31].all()) & payload.strobe[column]
            for column, lane in enumerate(read.data)
        )
        with m.If(self.results.valid & is_nonfinite.any()):
            m.d.sync += self.nonfinite.eq(1)
        with m.Elif(self.clear):
            m.d.sync += self.nonfinite.eq(0)
