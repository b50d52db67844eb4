# SPDX-License-Identifier: Apache-2.0
"""The readers of weights, group bytes and activations: their parts, each against a few lines of
Python, their Verilog, and all of them against a model of memory."""

from __future__ import annotations

import re
from collections import deque
from pathlib import Path

import numpy as np
import pytest
from amaranth.hdl import Cat, Value
from amaranth.lib import data
from amaranth.sim import Simulator, SimulatorContext

from speq.hw.accelerator_config import AcceleratorConfig
from speq.hw.engine_config import EngineConfig
from speq.hw.memory.activation_reader import ActivationReader
from speq.hw.memory.axi import ID_BITS, AxiConfig
from speq.hw.memory.group_reader import GroupReader
from speq.hw.memory.plane_merger import PlaneMerger
from speq.hw.memory.read_arbiter import ReadArbiter
from speq.hw.memory.repeater import Repeater
from speq.hw.memory.weight_reader import WeightReader
from speq.hw.memory.word_packer import WordPacker
from speq.model.format import pack_draft, pack_residual
from speq.model.number_format import RESIDUAL_BITS
from speq.sim.benches import readers
from speq.sim.compare import assert_equal_bits
from speq.sim.runner import seed
from tests.hw.streams import Rng, Sink, Source, simulate
from tests.hw.verilog_tools import lint, write_unit

#: Share of cycles in which a stream pauses, in the tests with pauses.
PAUSE = 0.4
#: Cycles after which a test gives up waiting.
PATIENCE = 20_000

with_pauses = pytest.mark.parametrize("pause", [0.0, PAUSE], ids=["full rate", "pauses"])


def passed_through(
    unit: object, inputs: dict[str, list], output: str, number: int, rng: Rng, pause: float
) -> Sink:
    """What a unit made of the items of its input streams: `number` items, and no more.

    The unit must be busy until the last item was taken and padding has been dropped, and not after
    that.
    """
    name = type(unit).__name__
    sources = [Source(getattr(unit, stream), items, rng, pause) for stream, items in inputs.items()]
    sink = Sink(getattr(unit, output), rng, pause)
    is_busy = None

    async def watch(context: SimulatorContext) -> None:
        nonlocal is_busy
        async for *_, valid, busy in context.tick().sample(sink.stream.valid, unit.busy):
            assert busy or not valid, f"{name}: an item behind {len(sink.items)}, but not busy"
            is_busy = busy

    simulate(unit, sources, [sink], lambda: len(sink.items) >= number, watch)
    assert len(sink.items) == number, f"{name}: {len(sink.items)} items, expected {number}"
    assert is_busy == 0, f"{name}: busy behind the last item"
    return sink


def random_numbers() -> np.random.Generator:
    """Those of a test, whose seed is printed."""
    print(f"seed {seed()}")
    return np.random.default_rng(seed())


def compare(unit: str, expected: list[int], sink: Sink) -> None:
    """Compare the items of a stream."""
    assert_equal_bits(
        unit,
        expected=np.array(expected, dtype=object),
        got=np.array(sink.bits, dtype=object),
        cycles=np.array(sink.cycles),
    )


@with_pauses
def test_repeater(pause: float) -> None:
    layout = data.StructLayout({"value": 8})
    unit = Repeater(layout, 3, 4)
    rng = random_numbers()
    commands = [
        {"item": {"value": int(value)}, "times": int(times)}
        for value, times in zip(rng.integers(0, 256, 40), rng.integers(1, 8, 40), strict=True)
    ]
    expected = [each["item"]["value"] for each in commands for _ in range(each["times"])]
    sink = passed_through(unit, {"command": commands}, "items", len(expected), rng, pause)
    compare("repeater", expected, sink)
    if not pause:
        assert sink.cycles[-1] - sink.cycles[0] == len(expected) - 1


@with_pauses
@pytest.mark.parametrize(("beat_bits", "word_bits"), [(64, 64), (64, 16), (32, 4), (16, 64)])
def test_word_packer(beat_bits: int, word_bits: int, pause: float) -> None:
    unit = WordPacker(beat_bits, word_bits)
    rng = random_numbers()
    counts = [1, 1, 2, *map(int, rng.integers(1, 20, 30))]
    beats: list[int] = []
    words: list[int] = []
    beats_taken = 0
    for count in counts:
        number = -(-count * word_bits // beat_bits)
        content = rng.bytes(number * beat_bits // 8)
        whole = int.from_bytes(content, "little")
        beats += [whole >> beat_bits * i & (1 << beat_bits) - 1 for i in range(number)]
        words += [whole >> word_bits * i & (1 << word_bits) - 1 for i in range(count)]
        beats_taken += max(number, count)
    inputs = {"command": [{"words": count} for count in counts], "beats": beats}
    sink = passed_through(unit, inputs, "words", len(words), rng, pause)
    compare(f"{beat_bits} to {word_bits} bits", words, sink)
    if not pause:
        lead = max(1, word_bits // beat_bits)  # until the first word is there
        assert sink.cycles[-1] - sink.cycles[0] == beats_taken - lead


@with_pauses
def test_plane_merger(pause: float) -> None:
    config = EngineConfig(rows=2, cols=4, max_k=40)
    unit = PlaneMerger(config)
    rng = random_numbers()
    draft: list[list[int]] = []
    residual: list[list[int]] = []
    words: list[list[int]] = []
    commands = []
    steps = 0
    sizes = [*range(1, 10), *map(int, rng.integers(1, 41, 20))]
    for k in sizes:
        merge = bool(rng.random() < 0.7)
        weights = rng.integers(0, 1 << 16, (config.cols, k), np.uint16)
        if merge:
            draft += pack_draft(weights >> RESIDUAL_BITS).T.tolist()
            low = weights & np.uint16((1 << RESIDUAL_BITS) - 1)
            residual += pack_residual(low).T.tolist()
        else:
            draft += weights.T.tolist()
        words += weights.T.tolist()
        commands.append({"words": k, "merge": merge})
        # A residual word is taken in each cycle but every fourth.
        steps += max(k, 4 * -(-k // 4) - 1) if merge else k
    inputs = {"command": commands, "draft": draft, "residual": residual}
    sink = passed_through(unit, inputs, "words", len(words), rng, pause)
    expected = [sum(word << 16 * i for i, word in enumerate(row)) for row in words]
    compare("plane merger", expected, sink)
    if not pause:
        dropped = max(0, 3 - sizes[-1] % 4) if sizes[-1] % 4 and commands[-1]["merge"] else 0
        assert sink.cycles[-1] - sink.cycles[0] == steps - dropped - 1


@pytest.mark.parametrize("ports", [1, 2, 3, 8])
@with_pauses
def test_read_arbiter(ports: int, pause: float) -> None:
    """Every port gets what it asked for, in order, from a memory that interleaves IDs."""
    requests_each = 40
    unit = ReadArbiter(AxiConfig(data_bits=64, address_bits=32), ports)
    rng = random_numbers()
    wanted = [
        [(int(rng.integers(1 << 29)) * 8, int(rng.integers(0, 4))) for _ in range(requests_each)]
        for _ in range(ports)
    ]
    got: list[list[tuple[int, int, int]]] = [[] for _ in range(ports)]
    total = sum(length + 1 for each in wanted for _, length in each)
    queues: list[deque[tuple[int, int, int]]] = [deque() for _ in range(ports)]
    order: list[tuple[int, int]] = []  # cycle and port of each request

    def pauses() -> bool:
        return bool(rng.random() < pause)

    async def memory(context: SimulatorContext) -> None:
        axi = unit.axi
        held = None
        for cycle in range(PATIENCE):
            ready = not pauses()
            context.set(axi.arready, ready)
            choices = [i for i, queue in enumerate(queues) if queue]
            give = bool(choices) and not pauses()
            context.set(axi.rvalid, give)
            if give:
                port = int(rng.choice(choices))
                value, response, last = queues[port].popleft()
                context.set(axi.rid, port)
                context.set(axi.rdata, value)
                context.set(axi.rresp, response)
                context.set(axi.rlast, last)
            names = ("arid", "araddr", "arlen", "arsize", "arburst", "arcache", "arprot")
            *_, valid, accepted, request = await context.tick().sample(
                axi.arvalid, axi.rready, joined(axi, names)
            )
            assert accepted, f"cycle {cycle}: not ready for read data"
            if held is not None:
                assert valid and request == held, f"cycle {cycle}: a waiting request changed"
            held = request if valid and not ready else None
            if valid and ready:
                fields = split(request, axi, names)
                port = fields["arid"]
                assert [fields[n] for n in ("arsize", "arburst", "arcache", "arprot")] == [
                    3,
                    1,
                    port,
                    5,
                ]
                order.append((cycle, port))
                beats = fields["arlen"] + 1
                for i in range(beats):
                    response = int(rng.integers(0, 4))
                    queues[port].append((fields["araddr"] + i, response, i == beats - 1))
            if len(order) == ports * requests_each and not any(queues) and not give:
                return
        raise AssertionError(f"{len(order)} requests in {PATIENCE} cycles")

    simulator = Simulator(unit)
    simulator.add_clock(1e-6)
    simulator.add_testbench(memory)
    for number in range(ports):

        async def ask(context: SimulatorContext, number: int = number) -> None:
            port = unit.ports[number]
            context.set(port.arid, 3)
            context.set(port.arsize, 3)
            context.set(port.arburst, 1)
            context.set(port.arcache, number)
            context.set(port.arprot, 5)
            for address, length in wanted[number]:
                while pauses():
                    await context.tick()
                context.set(port.arvalid, 1)
                context.set(port.araddr, address)
                context.set(port.arlen, length)
                await context.tick().until(port.arready)
                context.set(port.arvalid, 0)

        async def listen(context: SimulatorContext, number: int = number) -> None:
            port = unit.ports[number]
            context.set(port.rready, 1)
            while True:
                *_, valid, identity, value, last = await context.tick().sample(
                    port.rvalid, port.rid, port.rdata, port.rlast
                )
                if valid:
                    got[number].append((identity, value, last))

        simulator.add_testbench(ask, background=True)
        simulator.add_testbench(listen, background=True)
    simulator.run()
    for number in range(ports):
        expected = [
            (0, address + i, int(i == length))
            for address, length in wanted[number]
            for i in range(length + 1)
        ]
        assert got[number] == expected, f"port {number}"
    assert sum(map(len, got)) == total
    if not pause:  # one request per cycle, by turns
        cycles = [cycle for cycle, _ in order]
        assert cycles == list(range(cycles[0], cycles[0] + len(order)))
        turns = [port for _, port in order]
        assert turns == [(turns[0] + i) % ports for i in range(len(turns))]


def joined(axi: object, names: tuple[str, ...]) -> Value:
    """Several fields as one value."""
    return Cat(getattr(axi, name) for name in names)


def split(value: int, axi: object, names: tuple[str, ...]) -> dict[str, int]:
    """The fields in such a value."""
    fields = {}
    for name in names:
        width = len(getattr(axi, name))
        fields[name] = value & (1 << width) - 1
        value >>= width
    return fields


NARROW = AxiConfig(data_bits=64, address_bits=32, burst=1, outstanding=2, depth=2)
SYSTEMS = {
    "default": AcceleratorConfig(EngineConfig(rows=2, cols=4)),
    "narrow ports": AcceleratorConfig(EngineConfig(rows=3, cols=16), NARROW, NARROW),
    "smallest sizes": AcceleratorConfig(EngineConfig(rows=1, cols=4, max_k=1, max_o=1)),
}
UNITS = {
    "speq_weight_reader": WeightReader,
    "speq_group_reader": GroupReader,
    "speq_activation_reader": ActivationReader,
    "speq_read_arbiter": lambda config: ReadArbiter(config.data, 3),
}


@pytest.mark.parametrize("config", SYSTEMS.values(), ids=SYSTEMS)
@pytest.mark.parametrize("name", UNITS)
def test_verilator_lints_it_without_a_warning(
    name: str, config: AcceleratorConfig, tmp_path: Path
) -> None:
    source = write_unit(UNITS[name](config), name, tmp_path)
    assert lint(name, source) == (0, "")


@pytest.mark.parametrize("ports", [0, (1 << ID_BITS) + 1])
def test_more_ports_than_ids_are_refused(ports: int) -> None:
    ReadArbiter._MustUse__silence = True  # else Amaranth warns that it is never elaborated
    with pytest.raises(ValueError, match=f"ports is {ports}; allowed are 1 to {1 << ID_BITS}"):
        ReadArbiter(AxiConfig(), ports)


@pytest.mark.parametrize(
    ("beat", "word", "bad"), [(24, 8, "beat_bits is 24"), (8, 0, "word_bits is 0")]
)
def test_widths_that_are_no_powers_of_two_are_refused(beat: int, word: int, bad: str) -> None:
    WordPacker._MustUse__silence = True  # else Amaranth warns that it is never elaborated
    with pytest.raises(ValueError, match=re.escape(bad)):
        WordPacker(beat, word)


def test_readers() -> None:
    readers.run()
