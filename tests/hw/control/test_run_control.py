# SPDX-License-Identifier: Apache-2.0
"""RunControl: what starts and ends runs, waiting for the host, interrupts and counters."""

from __future__ import annotations

from collections.abc import Callable, Coroutine

import numpy as np
import pytest
from amaranth.sim import Simulator, SimulatorContext

from speq.hw.accelerator_config import AcceleratorConfig, ErrorCode
from speq.hw.control.register_map import COUNTERS, registers
from speq.hw.control.run_control import CLEAR_CYCLES, Answer, RunControl, State, events_layout
from speq.hw.engine_config import EngineConfig
from speq.sim.runner import seed

CONFIG = AcceleratorConfig(EngineConfig(rows=4, cols=8, max_k=256), lanes=0)
VECTOR = AcceleratorConfig(EngineConfig(rows=4, cols=8, max_k=256), lanes=4)
START, STOP, CLEAR = 1, 2, 4
HOST, DONE, ERROR = 1, 2, 4

SINGLE = {"pass_program": 0x1000, "pass_rows": 4, "position": 252}
DECODE = {
    "run": 1,
    "draft_program": 0x2000,
    "verify_program": 0x3000,
    "position": 252,
    "draft_length": 3,
    "choices": 4,
    "token_limit": 1,
    "ring": 0x4010,
    "ring_log2": 24,
}


class Bench:
    """The unit and what is around it, one cycle at a time."""

    def __init__(self, ctx: SimulatorContext, unit: RunControl) -> None:
        self.ctx = ctx
        self.unit = unit

    def configure(self, **values: int) -> None:
        """Set registers, all others to 0."""
        layout = self.unit.values.shape()
        word = sum(value << layout[name].offset for name, value in values.items())
        self.ctx.set(self.unit.values.as_value(), word)

    async def cycle(self, **inputs: int) -> dict[str, int]:
        """One cycle with some inputs set, and the pulses given in it."""
        for name, value in inputs.items():
            self.ctx.set(getattr(self.unit, name), value)
        pulses = ("begin", "host_answer", "step_answer", "step_finish", "clear")
        seen = {name: self.ctx.get(getattr(self.unit, name)) for name in pulses}
        await self.ctx.tick()
        for name in inputs:
            if name not in ("host_request", "step_request", "drained", "silent", "host_address"):
                self.ctx.set(getattr(self.unit, name), 0)
        return {name: 1 for name, value in seen.items() if value}

    async def control(self, command: int, **inputs: int) -> dict[str, int]:
        """A cycle in which CONTROL is written."""
        return await self.cycle(control_write=1, write_data=command, **inputs)

    async def answer(self, answer: int, **inputs: int) -> dict[str, int]:
        """A cycle in which HOST_ANSWER is written."""
        return await self.cycle(host_answer_write=1, write_data=answer, **inputs)

    def get(self, name: str) -> int:
        """A register."""
        value = self.ctx.get(self.unit.status[name])
        return int(getattr(value, "value", value)) if name != "irq_status" else self._pending()

    def _pending(self) -> int:
        return self.ctx.get(self.unit.status.irq_status.as_value())

    def check(self, state: State, error: ErrorCode = ErrorCode.NONE, address: int = 0) -> None:
        """The state, and why the last run ended."""
        assert State(self.get("status")) == state
        assert ErrorCode(self.get("error")) == error
        assert self.get("error_address") == address
        assert self.ctx.get(self.unit.locked) == (state not in (State.IDLE, State.ERROR))

    async def begin(self, **values: int) -> None:
        """Start a run."""
        self.configure(**(values or SINGLE))
        assert await self.control(START) == {"begin": 1}
        self.check(State.RUNNING)

    async def wait_for_host(self, state: State, **values: int) -> None:
        """Start a run, which comes to the state HOST or STEP."""
        await self.begin(**(SINGLE | values))
        assert await self.cycle(**{f"{state.name.lower()}_request": 1}) == {}
        self.check(state)

    async def check_stops(self, error: ErrorCode, address: int = 0) -> None:
        """From STOPPING to ERROR and back to IDLE."""
        self.check(State.STOPPING, error, address)
        assert not self.get("irq_status") & HOST
        for _ in range(CLEAR_CYCLES):
            assert await self.cycle(drained=1) == {"clear": 1}
        for _ in range(5):
            assert await self.cycle(drained=0, host_request=0, step_request=0) == {}
            self.check(State.STOPPING, error, address)
        assert await self.cycle(drained=1) == {}
        self.check(State.ERROR, error, address)
        assert self.get("irq_status") == ERROR
        assert await self.control(STOP) == {}
        self.check(State.IDLE, error, address)
        await self.cycle(irq_status_write=1, write_data=ERROR)
        assert self.get("irq_status") == 0


def simulate(process: Callable[[Bench], Coroutine], config: AcceleratorConfig = CONFIG) -> None:
    """Run a test's process."""
    unit = RunControl(config)

    async def testbench(ctx: SimulatorContext) -> None:
        await process(Bench(ctx, unit))

    simulator = Simulator(unit)
    simulator.add_clock(1e-9)
    simulator.add_testbench(testbench)
    simulator.run()


def test_runs_follow_each_other() -> None:
    async def process(bench: Bench) -> None:
        for values in (SINGLE, DECODE, SINGLE):
            await bench.begin(**values)
            for _ in range(3):
                assert await bench.cycle() == {}
            bench.check(State.RUNNING)
            assert await bench.cycle(finished=1) == {}
            bench.check(State.IDLE)
            assert bench.get("irq_status") == DONE
            await bench.cycle(irq_status_write=1, write_data=DONE)
            assert bench.get("irq_status") == 0

    simulate(process)


@pytest.mark.parametrize(
    "values",
    [
        SINGLE | {"pass_rows": 1, "position": 255},
        SINGLE | {"pass_rows": 1, "position": 0, "draft_length": 255, "choices": 7, "ring": 1},
        SINGLE | {"draft_program": 1, "verify_program": 1, "ring_log2": 31},
        DECODE | {"draft_length": 0, "choices": 1, "ring_log2": 1, "token_limit": 2**32 - 1},
        DECODE | {"pass_program": 1, "pass_rows": 0, "root": 2**24 - 1, "threshold": 2**32 - 1},
        DECODE | {"read_limit": 2**40 - 1, "write_limit": 2**40 - 1, "ring": 2**40 - 16},
        SINGLE | {"read_base": 1, "write_base": 3, "pass_program": 2**40 - 64},
        SINGLE | {"prompt_end": 2**17 - 1, "stop_tokens": 15},
        DECODE | {"prompt_end": 252, "pass_program": 1, "stop_tokens": 8},
        SINGLE | {"scratch": 2**40 - 4096},
        DECODE | {"position": 251, "prompt_end": 252, "pass_program": 0x1000},
    ],
)
def test_possible_registers(values: dict[str, int]) -> None:
    async def process(bench: Bench) -> None:
        await bench.begin(**values)

    simulate(process)


@pytest.mark.parametrize(
    ("values", "culprit"),
    [
        (SINGLE | {"read_base": 2**40}, "read_base"),
        (SINGLE | {"read_limit": 2**63}, "read_limit"),
        (DECODE | {"write_base": 2**40}, "write_base"),
        (DECODE | {"write_limit": 2**40, "choices": 0}, "write_limit"),
        (SINGLE | {"pass_program": 0x1020}, "pass_program"),
        (SINGLE | {"pass_program": 2**40}, "pass_program"),
        (DECODE | {"draft_program": 0x1001}, "draft_program"),
        (DECODE | {"verify_program": 0x1010}, "verify_program"),
        (SINGLE | {"pass_rows": 0}, "pass_rows"),
        (SINGLE | {"pass_rows": 5, "position": 0}, "pass_rows"),
        (SINGLE | {"pass_rows": 255, "position": 0}, "pass_rows"),
        (SINGLE | {"position": 253}, "position"),
        (DECODE | {"position": 253}, "position"),
        (DECODE | {"position": 2**17 - 1}, "position"),
        (DECODE | {"draft_length": 4}, "draft_length"),
        (DECODE | {"draft_length": 255}, "draft_length"),
        (DECODE | {"choices": 0}, "choices"),
        (DECODE | {"choices": 9}, "choices"),
        (DECODE | {"token_limit": 0}, "token_limit"),
        (DECODE | {"ring": 0x4008}, "ring"),
        (DECODE | {"ring": 2**40}, "ring"),
        (DECODE | {"ring_log2": 0}, "ring_log2"),
        (DECODE | {"ring_log2": 25}, "ring_log2"),
        (DECODE | {"ring_log2": 25, "choices": 0}, "choices"),
        (DECODE | {"position": 252, "prompt_end": 253}, "prompt_end"),
        (DECODE | {"position": 0, "prompt_end": 2**17 - 1}, "prompt_end"),
        (DECODE | {"position": 251, "prompt_end": 252, "pass_program": 1}, "pass_program"),
        (DECODE | {"position": 253, "prompt_end": 254}, "position"),
        (DECODE | {"stop_tokens": 9}, "stop_tokens"),
        (SINGLE | {"scratch": 0x1800}, "scratch"),
        (DECODE | {"scratch": 2**40}, "scratch"),
    ],
)
def test_impossible_registers(values: dict[str, int], culprit: str) -> None:
    offsets = {each.name.lower(): each.offset for each in registers(CONFIG)}

    async def process(bench: Bench) -> None:
        bench.configure(**values)
        assert await bench.control(START) == {}, "begin was given"
        await bench.check_stops(ErrorCode.BAD_REGISTER, offsets[culprit])
        await bench.begin()

    simulate(process)


def test_the_program_of_moves_counts_where_there_are_moves() -> None:
    offsets = {each.name: each.offset for each in registers(VECTOR)}

    async def process(bench: Bench) -> None:
        for values, refused in (
            (DECODE | {"run": 17, "move_program": 0x1000}, False),
            (DECODE | {"run": 17, "move_program": 0x1020}, True),
            (DECODE | {"run": 17, "move_program": 2**40}, True),
            (DECODE | {"run": 17, "move_program": 1, "stop_tokens": 9}, True),
            (DECODE | {"run": 1, "move_program": 1}, False),
            (SINGLE | {"run": 16, "move_program": 1}, False),
        ):
            bench.configure(**values)
            if refused:
                assert await bench.control(START) == {}
                name = "STOP_TOKENS" if "stop_tokens" in values else "MOVE_PROGRAM"
                await bench.check_stops(ErrorCode.BAD_REGISTER, offsets[name])
            else:
                assert await bench.control(START) == {"begin": 1}
                await bench.cycle(finished=1)
                await bench.cycle(irq_status_write=1, write_data=DONE)

    simulate(process, VECTOR)


@pytest.mark.parametrize("state", [State.HOST, State.STEP])
def test_host_answers(state: State) -> None:
    name = state.name.lower()

    async def process(bench: Bench) -> None:
        await bench.wait_for_host(state, host_timeout=0)
        assert bench.get("irq_status") == HOST
        for _ in range(50):
            assert await bench.cycle() == {}
        bench.check(state)
        assert await bench.answer(Answer.CONTINUE.value) == {f"{name}_answer": 1}
        bench.check(State.RUNNING)
        assert bench.get("irq_status") == 0
        await bench.cycle(**{f"{name}_request": 0})
        bench.check(State.RUNNING)
        # The next request; its answer comes at once.
        await bench.cycle(**{f"{name}_request": 1})
        assert await bench.answer(Answer.CONTINUE.value) == {f"{name}_answer": 1}
        await bench.cycle(**{f"{name}_request": 0}, finished=1)
        bench.check(State.IDLE)

    simulate(process)


def test_finish_after_a_step() -> None:
    async def process(bench: Bench) -> None:
        await bench.wait_for_host(State.STEP)
        answered = await bench.answer(Answer.FINISH.value, step_request=1)
        assert answered == {"step_answer": 1, "step_finish": 1}
        bench.check(State.RUNNING)
        await bench.cycle(step_request=0, finished=1)
        bench.check(State.IDLE)

    simulate(process)


@pytest.mark.parametrize(
    ("state", "answer", "address"),
    [
        (State.HOST, Answer.FAIL.value, 0x1040),
        (State.HOST, Answer.FINISH.value, 0x1040),
        (State.HOST, 3, 0x1040),
        (State.STEP, Answer.FAIL.value, 0),
        (State.STEP, 3, 0),
    ],
)
def test_host_refuses(state: State, answer: int, address: int) -> None:
    async def process(bench: Bench) -> None:
        await bench.cycle(host_address=0x1040)
        await bench.wait_for_host(state)
        assert await bench.answer(answer) == {}
        await bench.check_stops(ErrorCode.HOST_REFUSED, address)

    simulate(process)


@pytest.mark.parametrize("cycles", [1, 2, 17])
@pytest.mark.parametrize(("state", "address"), [(State.HOST, 0x1080), (State.STEP, 0)])
def test_host_timeout(state: State, address: int, cycles: int) -> None:
    async def process(bench: Bench) -> None:
        await bench.cycle(host_address=0x1080)
        # An answer in the last cycle is in time, and the next wait has its own time.
        await bench.wait_for_host(state, host_timeout=cycles)
        for _ in range(cycles - 1):
            assert await bench.cycle() == {}
            bench.check(state)
        assert await bench.answer(0) == {f"{state.name.lower()}_answer": 1}
        bench.check(State.RUNNING)
        await bench.cycle()
        for _ in range(cycles):
            bench.check(state)
            assert await bench.cycle() == {}
        await bench.check_stops(ErrorCode.HOST_TIMEOUT, address)

    simulate(process)


@pytest.mark.parametrize("state", [State.RUNNING, State.HOST, State.STEP])
def test_stop_in_every_state_of_a_run(state: State) -> None:
    async def process(bench: Bench) -> None:
        if state == State.RUNNING:
            await bench.begin()
        else:
            await bench.wait_for_host(state)
        assert await bench.control(STOP) == {}
        await bench.check_stops(ErrorCode.STOPPED)
        await bench.begin()

    simulate(process)


@pytest.mark.parametrize("state", [State.RUNNING, State.HOST, State.STEP])
def test_errors_come_first_and_the_first_stays(state: State) -> None:
    async def process(bench: Bench) -> None:
        for others in (
            {},
            {"finished": 1},
            {"control_write": 1, "write_data": STOP},
            {"host_answer_write": 1, "write_data": 0},
            {"host_request": 1, "step_request": 1},
        ):
            if state == State.RUNNING:
                await bench.begin(**SINGLE, host_timeout=1)
            else:
                await bench.wait_for_host(state, host_timeout=1)
            assert await bench.cycle(error=7, error_address=0x1234, **others) == {}
            bench.check(State.STOPPING, ErrorCode.READ_SLVERR, 0x1234)
            await bench.cycle(error=9, error_address=0x99, finished=1)
            await bench.control(START | STOP)
            for _ in range(2):
                assert await bench.cycle(drained=1, host_request=0, step_request=0) == {}
            bench.check(State.ERROR, ErrorCode.READ_SLVERR, 0x1234)
            assert bench.get("irq_status") == ERROR
            await bench.cycle(drained=0, irq_status_write=1, write_data=ERROR)
            await bench.control(STOP)

    simulate(process)


@pytest.mark.parametrize("state", [State.RUNNING, State.HOST, State.STEP])
def test_silent_memory_ends_a_run(state: State) -> None:
    async def process(bench: Bench) -> None:
        for answers in (False, True):
            if state == State.RUNNING:
                await bench.begin()
            else:
                await bench.wait_for_host(state)
            assert await bench.cycle(silent=1) == {}
            await bench.cycle(silent=int(not answers), host_request=0, step_request=0)
            if answers:  # late, but as the run is being ended
                await bench.cycle()
                await bench.cycle()
                bench.check(State.STOPPING, ErrorCode.MEMORY_TIMEOUT)
                await bench.cycle(drained=1)
            else:
                await bench.cycle()
                await bench.cycle()
            await bench.cycle()
            bench.check(State.ERROR, ErrorCode.MEMORY_TIMEOUT)
            assert bench.get("irq_status") == ERROR
            await bench.control(STOP, irq_status_write=1, silent=0, drained=int(answers))
            bench.check(State.IDLE, ErrorCode.MEMORY_TIMEOUT)
            if answers:
                continue
            # What memory owes is still outstanding.
            for _ in range(2):
                assert await bench.control(START) == {}
                bench.check(State.STOPPING, ErrorCode.MEMORY_TIMEOUT)
                for _ in range(CLEAR_CYCLES):
                    assert await bench.cycle() == {"clear": 1}
                for _ in range(2):
                    await bench.cycle()
                bench.check(State.ERROR, ErrorCode.MEMORY_TIMEOUT)
                await bench.control(STOP)
            await bench.cycle(drained=1)
            await bench.cycle(drained=0)
            await bench.begin()
            await bench.control(STOP)
            await bench.check_stops(ErrorCode.STOPPED)
        await bench.begin()

    simulate(process)


def test_silent_memory_does_not_keep_a_run_from_ending() -> None:
    """A STOP, or another error, while memory does not answer; `finished` comes first."""

    async def process(bench: Bench) -> None:
        await bench.begin()
        await bench.control(STOP)
        for _ in range(20):
            await bench.cycle()
        bench.check(State.STOPPING, ErrorCode.STOPPED)
        await bench.cycle(silent=1)
        bench.check(State.ERROR, ErrorCode.STOPPED)
        await bench.control(STOP, silent=0)
        assert await bench.control(START) == {}
        bench.check(State.STOPPING, ErrorCode.MEMORY_TIMEOUT)
        for _ in range(CLEAR_CYCLES + 2):
            await bench.cycle()
        bench.check(State.ERROR, ErrorCode.MEMORY_TIMEOUT)
        await bench.control(STOP)
        await bench.cycle(drained=1)
        await bench.begin()
        await bench.cycle(finished=1, silent=1)
        bench.check(State.IDLE)
        await bench.cycle(silent=0)
        await bench.begin()
        await bench.cycle(error=7, error_address=0x1234, silent=1)
        bench.check(State.STOPPING, ErrorCode.READ_SLVERR, 0x1234)

    simulate(process)


def test_end_comes_before_a_stop() -> None:
    async def process(bench: Bench) -> None:
        await bench.begin()
        assert await bench.control(STOP, finished=1) == {}
        bench.check(State.IDLE)
        assert bench.get("irq_status") == DONE

    simulate(process)


def test_what_comes_at_the_wrong_time_is_ignored() -> None:
    async def process(bench: Bench) -> None:
        bench.configure(**SINGLE)
        for inputs in ({"finished": 1}, {"error": 3}, {"host_request": 1}, {"step_request": 1}):
            assert await bench.cycle(**inputs) == {}
            await bench.cycle(host_request=0, step_request=0)
            bench.check(State.IDLE)
        for answer in Answer:
            assert await bench.answer(answer.value) == {}
        assert await bench.control(STOP) == {}
        bench.check(State.IDLE)
        assert await bench.control(START | STOP) == {"begin": 1}
        bench.check(State.RUNNING)
        for answer in Answer:
            assert await bench.answer(answer.value) == {}
        assert await bench.control(START) == {}
        bench.check(State.RUNNING)
        await bench.cycle(host_request=1)
        assert await bench.control(START) == {}
        bench.check(State.HOST)
        assert bench.get("irq_status") == HOST
        await bench.control(STOP, drained=1)
        for _ in range(CLEAR_CYCLES + 2):
            bench.check(State.STOPPING, ErrorCode.STOPPED)
            await bench.control(STOP, host_request=0)
        bench.check(State.ERROR, ErrorCode.STOPPED)
        for answer in Answer:
            assert await bench.answer(answer.value) == {}
        assert await bench.control(START) == {}
        assert await bench.cycle(finished=1, error=3) == {}
        bench.check(State.ERROR, ErrorCode.STOPPED)
        assert await bench.control(START | STOP) == {}
        bench.check(State.IDLE, ErrorCode.STOPPED)
        await bench.begin()

    simulate(process)


def test_interrupts() -> None:
    async def process(bench: Bench) -> None:
        irq = bench.unit.irq
        for enable in (0, HOST, DONE, ERROR, 7):
            await bench.wait_for_host(State.HOST, irq_enable=enable)
            assert not bench.ctx.get(irq)
            await bench.cycle()
            assert bench.ctx.get(irq) == (enable & HOST != 0)
            # Cleared by the host, it does not come again in the same wait.
            await bench.cycle(irq_status_write=1, write_data=HOST)
            assert bench.get("irq_status") == 0
            await bench.cycle()
            assert not bench.ctx.get(irq)
            await bench.answer(0)
            # The event that comes with its own clearing is not lost.
            await bench.cycle(host_request=0, finished=1, irq_status_write=1, write_data=7)
            assert bench.get("irq_status") == DONE
            await bench.cycle(irq_status_write=1, write_data=HOST | ERROR)
            assert bench.get("irq_status") == DONE
            assert bench.ctx.get(irq) == (enable & DONE != 0)
            await bench.cycle(irq_status_write=1, write_data=DONE)
            await bench.cycle()
            assert not bench.ctx.get(irq)

    simulate(process)


def test_counters() -> None:
    print(f"SPEQ_SEED={seed()}")
    rng = np.random.default_rng(seed())
    layout = events_layout()
    expected = dict.fromkeys(COUNTERS, 0)

    async def count(bench: Bench, counts: bool, waits: bool, **inputs: int) -> None:
        """A cycle with random events."""
        events = {name: int(rng.integers(1 << place.width)) for name, place in layout}
        word = sum(value << layout[name].offset for name, value in events.items())
        bench.ctx.set(bench.unit.events.as_value(), word)
        await bench.cycle(**inputs)
        events |= {"cycles": 1, "host_cycles": int(waits)}
        if inputs.get("write_data", 0) & CLEAR:
            expected.update(dict.fromkeys(COUNTERS, 0))
        elif counts:
            expected.update({name: expected[name] + events[name.lower()] for name in COUNTERS})
        got = {name: bench.get(name.lower()) for name in COUNTERS}
        assert got == expected, f"unit RunControl, seed {seed()}, events {events}"

    async def process(bench: Bench) -> None:
        for command in (0, CLEAR, 0):
            await count(bench, counts=False, waits=False)
            bench.configure(**SINGLE)
            start = {"control_write": 1, "write_data": START | command}
            await count(bench, counts=False, waits=False, **start)
            for _ in range(300):
                await count(bench, counts=True, waits=False)
            await count(bench, counts=True, waits=False, control_write=1, write_data=command)
            await count(bench, counts=True, waits=False, step_request=1)
            for _ in range(20):
                await count(bench, counts=True, waits=True)
            answer = {"host_answer_write": 1, "write_data": 0}
            await count(bench, counts=True, waits=True, **answer)
            await count(bench, counts=True, waits=False, step_request=0, finished=1)
            await count(bench, counts=False, waits=False)

    simulate(process)
