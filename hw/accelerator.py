# SPDX-License-Identifier: Apache-2.0
"""The accelerator's top: registers, control, speculation loop, programs and the datapath."""

from __future__ import annotations

from collections.abc import Iterator

from amaranth.hdl import Cat, Elaboratable, Module, Mux, Value
from amaranth.lib import wiring
from amaranth.lib.wiring import Flow, Member, Out

from speq.hw.accelerator_config import AcceleratorConfig, ErrorCode, PassKind
from speq.hw.control.descriptor import DescriptorKind
from speq.hw.control.program_walker import ProgramWalker
from speq.hw.control.register_file import RegisterFile, lite_signature
from speq.hw.control.run_control import RunControl, run_status_layout
from speq.hw.control.speculation_controller import SpeculationController, speculation_events_layout
from speq.hw.datapath import Datapath
from speq.hw.engine_config import Mode
from speq.hw.memory.memory_watchdog import MemoryWatchdog

#: The counters that the datapath drives by kind of descriptor.
_MODE_COUNTERS = {
    Mode.VERIFY: "verify_cycles",
    Mode.DRAFT: "draft_cycles",
    Mode.BYPASS: "bypass_cycles",
}


class Accelerator(wiring.Component):
    """Decodes a model from memory, driven by a host through registers and an interrupt.

    Ports, all with AMBA names behind a prefix:

    - ``s_axi_control_``: AXI4-Lite slave of 32 bits with the registers of
      `speq.hw.control.register_map`;
    - ``m_axi_weights_``: AXI4 master that reads weights and the KV cache;
    - ``m_axi_data_``: AXI4 master that reads programs, group bytes and activations, and writes
      results, rankings and tokens;
    - ``irq``: level, high while an enabled interrupt is pending.

    Flow control is AXI's; every channel may stall. Reset (synchronous, active high) may come at any
    time, but only together with that of the interconnect: transactions are forgotten.

    Parameters
    ----------
    config : AcceleratorConfig
    """

    def __init__(self, config: AcceleratorConfig) -> None:
        self.config = config
        self.walker = ProgramWalker(config)
        self.datapath = Datapath(config)
        members = {"irq": Out(1)}
        for prefix, signature in self._ports():
            for name, member in signature.members.items():
                members[prefix + name] = member
        super().__init__(members)

    def _ports(self) -> Iterator[tuple[str, wiring.Signature]]:
        """Prefix and signature of the AXI ports, as the accelerator sees them."""
        yield "s_axi_control_", lite_signature().flip()
        yield "m_axi_weights_", self.config.weights.read_signature
        yield "m_axi_data_", self.config.data.read_signature
        yield "m_axi_data_", self.config.data.write_signature

    def elaborate(self, platform: object) -> Elaboratable:
        m = Module()
        config = self.config
        m.submodules.registers = registers = RegisterFile(config)
        m.submodules.control = control = RunControl(config)
        m.submodules.speculation = speculation = SpeculationController(config)
        m.submodules.walker = walker = self.walker
        m.submodules.datapath = datapath = self.datapath
        values = registers.values
        inner = (
            registers.bus,
            datapath.weights_axi,
            datapath.data_read_axi,
            datapath.data_write_axi,
        )
        for port, (prefix, signature) in zip(inner, self._ports(), strict=True):
            for name, member in signature.members.items():
                self._pass(m, getattr(self, prefix + name), getattr(port, name), member)

        m.d.comb += [
            control.values.eq(values),
            control.control_write.eq(registers.control_write),
            control.host_answer_write.eq(registers.host_answer_write),
            control.irq_status_write.eq(registers.irq_status_write),
            control.write_data.eq(registers.write_data),
            registers.locked.eq(control.locked),
            self.irq.eq(control.irq),
            # The run.
            speculation.begin.eq(control.begin),
            speculation.values.eq(values),
            speculation.clear.eq(control.clear),
            control.finished.eq(speculation.finished),
            control.step_request.eq(speculation.step_request),
            speculation.step_answer.eq(control.step_answer),
            speculation.step_finish.eq(control.step_finish),
            # Its passes.
            walker.walk.valid.eq(speculation.passes.valid),
            speculation.passes.ready.eq(walker.walk.ready),
            walker.walk.payload.rows.eq(speculation.passes.payload.rows),
            walker.walk.payload.position.eq(speculation.passes.payload.position),
            speculation.pass_done.eq(walker.done),
            walker.length.eq(values.program_length),
            walker.base.eq(values.read_base),
            walker.limit.eq(values.read_limit),
            walker.clear.eq(control.clear),
            control.host_request.eq(walker.host_request),
            control.host_address.eq(walker.error_address),
            walker.host_answer.eq(control.host_answer),
            # Their jobs.
            datapath.kind.eq(walker.kind),
            datapath.descriptor.eq(walker.error_address),
            datapath.last.eq(walker.last),
            walker.idle.eq(datapath.idle),
            walker.rank_idle.eq(datapath.rank_idle),
            walker.rank_entries.eq(datapath.rank_entries),  # of row 0 while a pass is under way
            datapath.rank_row.eq(speculation.row),
            walker.rank_missed.eq(datapath.rank_missed),
            datapath.sample.eq(values.run.sample),
            datapath.truncate.eq(values.run.truncate),
            datapath.cutoff.eq(values.cutoff),
            datapath.scale.eq(values.scale),
            datapath.seed.eq(values.seed),
            speculation.entries.eq(datapath.rank_entries),
            speculation.write_done.eq(datapath.ring_done),
            datapath.read_base.eq(values.read_base),
            datapath.read_limit.eq(values.read_limit),
            datapath.write_base.eq(values.write_base),
            datapath.write_limit.eq(values.write_limit),
            datapath.clear.eq(control.clear),
            control.drained.eq(datapath.drained & ~walker.busy),
        ]
        self._watch_memory(m, control, values.memory_timeout)
        if config.scratch:
            m.d.comb += datapath.scratch.eq(values.scratch)
        if config.lanes:
            m.d.comb += walker.chain.eq(speculation.pass_status.index)
        # The token that a row chooses is the one behind it.
        for position, place in zip(datapath.positions, speculation.row_place, strict=True):
            m.d.sync += position.eq(speculation.pass_position + place.depth + 1)
        programs = {
            PassKind.SINGLE: values.pass_program,
            PassKind.DRAFT: values.draft_program,
            PassKind.VERIFY: values.verify_program,
        }
        if config.lanes:
            programs[PassKind.MOVE] = values.move_program
            m.d.comb += walker.walk.payload.source.eq(speculation.passes.payload.source)
        with m.Switch(speculation.passes.payload.kind):
            for kind, program in programs.items():
                with m.Case(kind):
                    m.d.comb += walker.walk.payload.program.eq(program)
        if config.lanes:
            self._connect_vector(m, speculation)
        wiring.connect(m, walker.jobs, datapath.jobs)
        wiring.connect(m, walker.rank_command, datapath.rank_command)
        wiring.connect(m, walker.axi, datapath.program_axi)
        wiring.connect(m, speculation.write_command, datapath.ring_command)
        wiring.connect(m, speculation.write_data, datapath.ring_data)

        # A memory fault is the cause of what the walker may find later.
        datapath_failed = datapath.error != ErrorCode.NONE
        m.d.comb += [
            control.error.eq(Mux(datapath_failed, datapath.error, walker.error)),
            control.error_address.eq(
                Mux(datapath_failed, datapath.error_address, walker.error_address)
            ),
        ]
        self._report(m, registers, control, speculation)
        return m

    def _watch_memory(self, m: Module, control: RunControl, timeout: Value) -> None:
        """Notice when memory does not answer."""

        def moves(channel: str) -> Value:
            return getattr(self, f"m_axi_{channel}valid") & getattr(self, f"m_axi_{channel}ready")

        addresses = ("weights_ar", "data_ar", "data_aw")
        reads = ("weights_r", "data_r")
        m.submodules.watchdog = watchdog = MemoryWatchdog(len(addresses))
        ends = [moves(read) & getattr(self, f"m_axi_{read}last") for read in reads]
        offers = [getattr(self, f"m_axi_{channel}valid") for channel in (*addresses, "data_w")]
        m.d.comb += [
            watchdog.requests.eq(Cat(moves(channel) for channel in addresses)),
            watchdog.answers.eq(Cat(*ends, moves("data_b"))),
            watchdog.offer.eq(Cat(offers).any()),
            watchdog.transfer.eq(
                Cat(moves(channel) for channel in (*addresses, *reads, "data_w", "data_b")).any()
            ),
            watchdog.timeout.eq(timeout),
            control.silent.eq(watchdog.silent),
        ]

    def _connect_vector(self, m: Module, speculation: SpeculationController) -> None:
        """The vector unit's work, and the rows of the pass that it is part of."""
        walker, datapath = self.walker, self.datapath
        wiring.connect(m, walker.vector, datapath.vector)
        m.d.comb += [
            walker.products_left.eq(datapath.products_left),
            walker.vectors_left.eq(datapath.vectors_left),
        ]
        for i in range(self.config.engine.rows):
            row, place = datapath.rows[i], speculation.row_place[i]
            m.d.comb += [
                row.token.eq(speculation.row_token[i]),
                row.depth.eq(place.depth),
                row.parent.eq(place.parent),
            ]

    def _pass(self, m: Module, outer: Value, inner: Value, member: Member) -> None:
        """Connect a port with a unit's."""
        target, source = (outer, inner) if member.flow is Flow.Out else (inner, outer)
        m.d.comb += target.eq(source)

    def _report(
        self,
        m: Module,
        registers: RegisterFile,
        control: RunControl,
        speculation: SpeculationController,
    ) -> None:
        """What the host sees: status registers and the counters' events."""
        walker, datapath = self.walker, self.datapath
        status, events = registers.status, control.events
        for name in run_status_layout(self.config).members:
            m.d.comb += status[name].eq(control.status[name])
        for name in ("row_token", "row_place", "pass_position", "step", "ring_index"):
            m.d.comb += status[name].eq(getattr(speculation, name))
        m.d.comb += [
            status["pass"].eq(speculation.pass_status),
            status.host_argument.eq(walker.host_argument),
            registers.position_update.eq(speculation.update),
            registers.position_value.eq(speculation.position),
            registers.root_update.eq(speculation.update),
            registers.root_value.eq(speculation.root),
        ]
        if self.config.history:
            m.d.comb += [
                speculation.history_append.eq(registers.history_write),
                speculation.history_token.eq(registers.write_data),
                registers.history_length_update.eq(speculation.history_update),
                registers.history_length_value.eq(speculation.history_length),
            ]
        for name in speculation_events_layout().members:
            m.d.comb += events[name].eq(speculation.events[name])
        current = datapath.current
        m.d.comb += [
            events.compute_cycles.eq(datapath.step),
            events.weight_stalls.eq(datapath.stalls.weights),
            events.group_stalls.eq(datapath.stalls.groups),
            events.activation_stalls.eq(datapath.stalls.activations),
            events.result_stalls.eq(datapath.stalls.results),
            events.descriptors.eq(walker.started),
            events.attention_cycles.eq(current.kind == DescriptorKind.ATTENTION),
            events.argmax_cycles.eq(
                (current.kind == DescriptorKind.ARGMAX) | (current.kind == DescriptorKind.RERANK)
            ),
        ]
        if self.config.lanes:
            m.d.comb += [
                events.vector_cycles.eq(~datapath.vector_idle),
                events.vector_stalls.eq(datapath.vector_stalls),
            ]
        for mode, name in _MODE_COUNTERS.items():
            m.d.comb += events[name].eq(
                (current.kind == DescriptorKind.GEMM) & (current.mode == mode)
            )
