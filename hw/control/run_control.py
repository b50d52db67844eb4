# SPDX-License-Identifier: Apache-2.0
"""Starting and ending runs, waiting for the host, errors, interrupts and performance counters."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from amaranth.hdl import Cat, Const, Elaboratable, Module, Mux, Signal, Value, ValueLike
from amaranth.lib import data, enum, wiring
from amaranth.lib.wiring import In, Out

from speq.hw.accelerator_config import AcceleratorConfig, ErrorCode
from speq.hw.common.logic import decremented, incremented
from speq.hw.control.register_file import register_shape, status_layout, values_layout
from speq.hw.control.register_map import (
    ADDRESS_BITS,
    ANSWERS,
    COUNTERS,
    MAX_RING_LOG2,
    MAX_STOP_TOKENS,
    STATES,
    Register,
    registers,
)
from speq.hw.memory.axi import PAGE_BYTES


class State(enum.Enum):
    """The states, with the values of the register STATUS."""

    IDLE = STATES["IDLE"][0]
    RUNNING = STATES["RUNNING"][0]
    HOST = STATES["HOST"][0]
    STEP = STATES["STEP"][0]
    STOPPING = STATES["STOPPING"][0]
    ERROR = STATES["ERROR"][0]


class Answer(enum.Enum):
    """The host's answers, with the values of the register HOST_ANSWER."""

    CONTINUE = ANSWERS["CONTINUE"][0]
    FINISH = ANSWERS["FINISH"][0]
    FAIL = ANSWERS["FAIL"][0]


#: Cycles for which `clear` is given. What a unit passes on in the first is dropped in the second.
CLEAR_CYCLES = 2

_COUNTER_BITS = 64
_NUMBER_BITS = 8
#: Counters that count by themselves; all others count events.
_OWN = ("CYCLES", "HOST_CYCLES")
#: Counters to which an event adds a number.
_NUMBERS = ("ALTERNATES", "ACCEPTED", "COMMITTED", "GUESSES", "GUESS_HITS")


def events_layout() -> data.StructLayout:
    """What the counters add up, by their lower-case names: a bit each, or a number of 8 bits."""
    return data.StructLayout(
        {
            name.lower(): _NUMBER_BITS if name in _NUMBERS else 1
            for name in COUNTERS
            if name not in _OWN
        }
    )


def run_status_layout(config: AcceleratorConfig) -> data.StructLayout:
    """The part of `status_layout` that comes from here: state, error, interrupts, counters."""
    whole = status_layout(config)
    names = ("status", "error", "error_address", "irq_status", *(name.lower() for name in COUNTERS))
    return data.StructLayout({name: whole[name].shape for name in names})


class RunControl(wiring.Component):
    """The state machine above all other units.

    A run starts with `begin` when the host writes START in the state IDLE and every register that
    this kind of run uses has a possible value; otherwise it ends at once with BAD_REGISTER, and the
    error's address is the offset of the first bad register. It ends with `finished`, or early with
    an error: one that a unit reports, a STOP, or a host that refuses or does not answer in time.
    Then `clear` is given for `CLEAR_CYCLES` cycles (state STOPPING), and after the outstanding
    transactions the state is ERROR until the host writes STOP. Memory that is `silent` ends a run
    with MEMORY_TIMEOUT, and the state STOPPING without an end of the transactions; then, as long as
    they are not over, a start ends with MEMORY_TIMEOUT as well.

    While a unit requests the host (states HOST and STEP) the run waits for an answer. In HOST,
    only CONTINUE goes on; after a step also FINISH does. Every other value ends the run with
    HOST_REFUSED. HOST_TIMEOUT = n, as it is when the wait begins, allows n cycles; an answer in
    the last of them is in time.

    What comes together or at the wrong time:

    - of events in the same cycle, the first of these counts: an error of a unit, `finished`,
      `silent`, STOP, an answer, the host's timeout, a request;
    - commands are judged by the state they meet: START is ignored unless IDLE, STOP is ignored in
      IDLE and STOPPING (so START and STOP in one write start a run in IDLE and leave ERROR);
    - an answer is ignored unless one is awaited;
    - errors, requests and `finished` are ignored unless a run is under way, so a second error does
      not replace the first.

    Interrupts become pending as HOST or STEP, IDLE (from a run) or ERROR is entered, and host no
    longer is when that wait ends; this takes precedence over the host's writes. Counters count in
    the states RUNNING, HOST and STEP; CLEAR_COUNTERS takes precedence over counting. `irq` follows
    a cycle after what it depends on.

    Parameters
    ----------
    config : AcceleratorConfig

    Members
    -------
    values : In(values_layout(config))
    control_write, host_answer_write, irq_status_write : In(1)
    write_data : In(32)
        All as `RegisterFile` gives them.
    status : Out(run_status_layout(config))
    irq : Out(1)
    locked : Out(1)
        A run is under way, or it is being ended: its registers have to be kept.
    begin : Out(1)
        Pulse: a run starts. It is under way from the next cycle on.
    finished : In(1)
        Pulse: the run is at its end; at most descriptors behind its END are still being fetched.
    host_request : In(1)
        Level, until the cycle of `host_answer`: a HOST descriptor waits.
    host_address : In(address_bits)
        Of that descriptor, for the report of a host that refuses or does not answer.
    host_answer : Out(1)
        Pulse.
    step_request : In(1)
        Level, until the cycle of `step_answer`: a committed step waits.
    step_answer : Out(1)
        Pulse; with `step_finish` the run shall end.
    step_finish : Out(1)
    error : In(ErrorCode)
    error_address : In(address_bits)
        Level: what a unit reports; gone after `clear`.
    clear : Out(1)
    drained : In(1)
        Nothing is outstanding; looked at from the second cycle after `clear` on.
    silent : In(1)
        Level: memory owes an answer, and has for too long.
    events : In(events_layout())
    """

    def __init__(self, config: AcceleratorConfig) -> None:
        self.config = config
        super().__init__(
            {
                "values": In(values_layout(config)),
                "control_write": In(1),
                "host_answer_write": In(1),
                "irq_status_write": In(1),
                "write_data": In(32),
                "status": Out(run_status_layout(config)),
                "irq": Out(1),
                "locked": Out(1),
                "begin": Out(1),
                "finished": In(1),
                "host_request": In(1),
                "host_address": In(config.address_bits),
                "host_answer": Out(1),
                "step_request": In(1),
                "step_answer": Out(1),
                "step_finish": Out(1),
                "error": In(ErrorCode),
                "error_address": In(config.address_bits),
                "clear": Out(1),
                "drained": In(1),
                "silent": In(1),
                "events": In(events_layout()),
            }
        )
        self._state = Signal(State)
        self._error = Signal(ErrorCode)
        self._error_address = Signal(config.address_bits)
        self._pending = Signal(register_shape(self._register("IRQ_STATUS")))
        self._stopping = Signal(range(CLEAR_CYCLES + 2))  # cycles until `drained` counts
        self._hangs = Signal()  # transactions have outlasted their run
        self._remaining = Signal(32, reset_less=True)  # cycles that the host has left; 0: any
        self._command = Signal(register_shape(self._register("CONTROL")))

    def _register(self, name: str) -> Register:
        return next(each for each in registers(self.config) if each.name == name)

    def elaborate(self, platform: object) -> Elaboratable:
        m = Module()
        m.d.comb += [
            self._command.eq(Mux(self.control_write, self.write_data, 0)),
            self.locked.eq((self._state != State.IDLE) & (self._state != State.ERROR)),
            self.clear.eq(self._stopping > 1),
            self.status.status.eq(self._state),
            self.status.error.eq(self._error),
            self.status.error_address.eq(self._error_address),
            self.status.irq_status.eq(self._pending),
        ]
        enabled = self._pending.as_value() & self.values.irq_enable.as_value()
        m.d.sync += self.irq.eq(enabled.any())
        with m.If(self.irq_status_write):
            m.d.sync += self._pending.eq(self._pending.as_value() & ~self.write_data)

        with m.Switch(self._state):
            with m.Case(State.IDLE):
                with m.If(self.drained):
                    m.d.sync += self._hangs.eq(0)
                with m.If(self._command.start & self._hangs):
                    self._fail(m, ErrorCode.MEMORY_TIMEOUT, 0)
                with m.Elif(self._command.start):
                    self._start(m)
            with m.Case(State.RUNNING):
                self._go_on(m)
            with m.Case(State.HOST, State.STEP):
                self._wait(m)
            with m.Case(State.STOPPING):
                self._stop(m)
            with m.Case(State.ERROR):
                with m.If(self.drained):
                    m.d.sync += self._hangs.eq(0)
                with m.If(self._command.stop):
                    m.d.sync += self._state.eq(State.IDLE)
        self._count(m)
        return m

    def _start(self, m: Module) -> None:
        """Begin a run, unless a register has an impossible value."""
        bad = Signal()
        offset = Signal(ADDRESS_BITS)
        # Of several, the first: the last assignment counts.
        for name, condition in reversed(self._impossible()):
            with m.If(condition):
                m.d.comb += [bad.eq(1), offset.eq(self._register(name).offset)]
        with m.If(bad):
            self._fail(m, ErrorCode.BAD_REGISTER, offset)
        with m.Else():
            m.d.comb += self.begin.eq(1)
            m.d.sync += [
                self._state.eq(State.RUNNING),
                self._error.eq(ErrorCode.NONE),
                self._error_address.eq(0),
            ]

    def _impossible(self) -> list[tuple[str, Value]]:
        """Registers, by rising offset, and when their values are impossible for the run."""
        values, engine = self.values, self.config.engine
        decode = values.run.speculate
        rows = Mux(decode, engine.rows, values.pass_rows)
        fills = decode & (values.prompt_end > values.position)
        beat, buffer = self.config.data.beat_bytes, self.config.alignment
        history = []
        if self.config.history:
            too_long = values.history_length > self.config.history
            history.append(("HISTORY_LENGTH", decode & too_long))
        moves = []
        if self.config.lanes:
            wrong = self._is_no_address(values.move_program, buffer)
            moves.append(("MOVE_PROGRAM", decode & values.run.move & wrong))
        scratch = []
        if self.config.scratch:
            scratch.append(("SCRATCH", self._is_no_address(values.scratch, PAGE_BYTES)))
        return [
            ("READ_BASE", self._is_no_address(values.read_base)),
            ("READ_LIMIT", self._is_no_address(values.read_limit)),
            ("WRITE_BASE", self._is_no_address(values.write_base)),
            ("WRITE_LIMIT", self._is_no_address(values.write_limit)),
            ("PASS_PROGRAM", (~decode | fills) & self._is_no_address(values.pass_program, buffer)),
            ("DRAFT_PROGRAM", decode & self._is_no_address(values.draft_program, buffer)),
            ("VERIFY_PROGRAM", decode & self._is_no_address(values.verify_program, buffer)),
            ("PASS_ROWS", ~decode & _is_outside(values.pass_rows, 1, engine.rows)),
            ("POSITION", values.position + rows > engine.max_k),
            ("DRAFT_LENGTH", decode & (values.draft_length >= engine.rows)),
            ("CHOICES", decode & _is_outside(values.choices, 1, self.config.choices)),
            ("TOKEN_LIMIT", decode & (values.token_limit == 0)),
            ("RING", decode & self._is_no_address(values.ring, beat)),
            ("RING_LOG2", decode & _is_outside(values.ring_log2, 1, MAX_RING_LOG2)),
            *history,
            ("PROMPT_END", fills & (values.prompt_end + rows > engine.max_k)),
            ("STOP_TOKENS", decode & (values.stop_tokens > MAX_STOP_TOKENS)),
            *moves,
            *scratch,
        ]

    def _is_no_address(self, value: Value, alignment: int = 1) -> Value:
        """Whether a number has more bits than an address or is not a multiple of `alignment`."""
        return value[self.config.address_bits :].any() | value[: alignment.bit_length() - 1].any()

    def _go_on(self, m: Module) -> None:
        """State RUNNING, until the run ends or the host is requested."""
        with self._unless_ended(m):
            with m.If(self.host_request | self.step_request):
                m.d.sync += [
                    self._state.eq(Mux(self.host_request, State.HOST, State.STEP)),
                    self._remaining.eq(self.values.host_timeout),
                    self._pending.host.eq(1),
                ]

    def _wait(self, m: Module) -> None:
        """States HOST and STEP, until the run ends or the host answers."""
        after_step = self._state == State.STEP
        answer = Signal(Answer)
        address = Mux(after_step, 0, self.host_address)
        m.d.comb += answer.eq(self.write_data)
        with m.If(self._remaining != 0):
            m.d.sync += self._remaining.eq(decremented(self._remaining))
        with self._unless_ended(m):
            with m.If(self.host_answer_write):
                goes_on = answer == Answer.CONTINUE
                finishes = after_step & (answer == Answer.FINISH)
                with m.If(goes_on | finishes):
                    m.d.comb += [
                        self.host_answer.eq(~after_step),
                        self.step_answer.eq(after_step),
                        self.step_finish.eq(finishes),
                    ]
                    m.d.sync += [self._state.eq(State.RUNNING), self._pending.host.eq(0)]
                with m.Else():
                    self._fail(m, ErrorCode.HOST_REFUSED, address)
            with m.Elif(self._remaining == 1):
                self._fail(m, ErrorCode.HOST_TIMEOUT, address)

    @contextmanager
    def _unless_ended(self, m: Module) -> Iterator[None]:
        """What happens while a run is under way and neither ends nor is stopped in this cycle."""
        with m.If(self.error != ErrorCode.NONE):
            self._fail(m, self.error, self.error_address)
        with m.Elif(self.finished):
            m.d.sync += [
                self._state.eq(State.IDLE),
                self._pending.host.eq(0),
                self._pending.done.eq(1),
            ]
        with m.Elif(self.silent):
            self._fail(m, ErrorCode.MEMORY_TIMEOUT, 0)
        with m.Elif(self._command.stop):
            self._fail(m, ErrorCode.STOPPED, 0)
        with m.Else():
            yield

    def _fail(self, m: Module, error: ValueLike, address: ValueLike) -> None:
        """End the run with an error."""
        m.d.sync += [
            self._state.eq(State.STOPPING),
            self._stopping.eq(CLEAR_CYCLES + 1),
            self._error.eq(error),
            self._error_address.eq(address),
            self._pending.host.eq(0),
        ]

    def _stop(self, m: Module) -> None:
        """State STOPPING: empty all units, then wait for outstanding transactions, if they end."""
        with m.If(self._stopping != 0):
            m.d.sync += self._stopping.eq(self._stopping - 1)
        with m.Elif(self.drained | self.silent | self._hangs):
            m.d.sync += [
                self._state.eq(State.ERROR),
                self._pending.error.eq(1),
                self._hangs.eq(~self.drained),
            ]

    def _count(self, m: Module) -> None:
        """The counters."""
        waits = (self._state == State.HOST) | (self._state == State.STEP)
        runs = (self._state == State.RUNNING) | waits
        own = {"CYCLES": Const(1), "HOST_CYCLES": waits}
        for name in COUNTERS:
            key = name.lower()
            added = own[name] if name in _OWN else self.events[key]
            counter = Signal(_COUNTER_BITS, name=key)
            low = counter[: len(added)] + Mux(runs, added, 0)
            total = Cat(low[:-1], incremented(counter[len(added) :], low[-1]))
            m.d.comb += self.status[key].eq(counter)
            m.d.sync += counter.eq(Mux(self._command.clear_counters, 0, total))


def _is_outside(value: Value, low: int, high: int) -> Value:
    """Whether a number is not from `low` to `high`."""
    return (value < low) | (value > high)
