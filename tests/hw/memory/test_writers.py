# SPDX-License-Identifier: Apache-2.0
"""The result writer, the write multiplexer and the ranking writer, each against its definition, and
all of them, with ranker and memory writer, against a model of memory."""

from __future__ import annotations

import random

import pytest
from amaranth.sim import SimulatorContext

from speq.hw.accelerator_config import TOKEN_BITS, AcceleratorConfig
from speq.hw.engine_config import EngineConfig
from speq.hw.memory.axi import AxiConfig
from speq.hw.memory.ranking_writer import RankingWriter
from speq.hw.memory.result_writer import ResultWriter
from speq.hw.memory.write_mux import WriteMux
from speq.sim.benches import writers
from speq.sim.runner import seed
from tests.hw.streams import Pulses, Sink, Source, simulate

_PAUSE = 0.4
#: Rows, columns, bits of the data port: from as wide as an FP16 beat to a sixteenth of an FP32 one.
_SHAPES = ((3, 4, 64), (2, 8, 128), (4, 8, 64), (1, 16, 256), (2, 32, 64))

each_shape = pytest.mark.parametrize("shape", _SHAPES, ids=str)
each_pause = pytest.mark.parametrize("pause", [0, _PAUSE])


def system(rows: int, cols: int, data_bits: int, choices: int = 8) -> AcceleratorConfig:
    data = AxiConfig(data_bits=data_bits, address_bits=32)
    weights = AxiConfig(data_bits=64, address_bits=32)
    engine = EngineConfig(rows=rows, cols=cols)
    return AcceleratorConfig(engine, weights=weights, data=data, choices=choices)


def assert_equal(what: str, expected: list, got: list) -> None:
    """Compare two lists of (tuples of) numbers; a mismatch names the first."""
    for i, (want, have) in enumerate(zip(expected, got, strict=False)):
        assert want == have, f"{what} {i}: seed {seed()}: expected {_hex(want)}, got {_hex(have)}"
    assert len(got) == len(expected), f"{what}: {len(got)}, expected {len(expected)}"


def _hex(value: int | tuple) -> str:
    return str(tuple(map(hex, value))) if isinstance(value, tuple) else hex(value)


# The result writer


class Gemm:
    """A random command of the result writer, its results, and what should become of them."""

    def __init__(self, config: AcceleratorConfig, rng: random.Random, **fields: int) -> None:
        engine = config.engine
        self.command = {
            "tiles": rng.choice((1, 2, 5)),
            "tokens": rng.choice((1, engine.rows, rng.randint(1, engine.rows))),
            "half": rng.randrange(2),
            "discard": rng.random() < 0.3,
            "rank": rng.random() < 0.4,
            "address": rng.randrange(1 << 20) * config.alignment,
        } | fields
        half, tokens = self.command["half"], self.command["tokens"]
        size = 2 if half else 4
        self.results, self.writes, self.beats = [], [], []
        address = self.command["address"]
        for tile in range(self.command["tiles"]):
            is_last_tile = tile + 1 == self.command["tiles"]
            columns = rng.randint(1, engine.cols) if is_last_tile else engine.cols
            content = b""
            for row in range(tokens):
                # Also the columns that are not strobed have values.
                values = [rng.getrandbits(8 * size) for _ in range(engine.cols)]
                self.results.append(
                    {
                        "data": values,
                        "strobe": (1 << columns) - 1,
                        "row": row,
                        "last": is_last_tile and row + 1 == tokens,
                    }
                )
                kept = values[:columns] + [0] * (engine.cols - columns)
                content += b"".join(value.to_bytes(size, "little") for value in kept)
            if not self.command["discard"]:
                beat = config.data.beat_bytes
                self.writes.append((address, len(content) // beat))
                for i in range(0, len(content), beat):
                    self.beats.append(int.from_bytes(content[i : i + beat], "little"))
                address += len(content)


class ResultBench:
    """GEMMs through a result writer, and what came out."""

    def __init__(self, config: AcceleratorConfig, gemms: list[Gemm], pause: float) -> None:
        dut = ResultWriter(config)
        rng = random.Random(f"{seed()} {config} {pause}")
        results = [beat for gemm in gemms for beat in gemm.results]
        self.command = Source(dut.command, [gemm.command for gemm in gemms], rng, pause)
        self.results = Source(dut.results, results, rng, pause)
        self.ranked = Sink(dut.ranked, rng, pause)
        self.writes = Sink(dut.write_command, rng, pause)
        self.beats = Sink(dut.write_data, rng, pause)
        self.done = Pulses(dut.done)
        self.gemms = gemms
        simulate(
            dut,
            [self.command, self.results],
            [self.ranked, self.writes, self.beats],
            lambda: len(self.writes.items) == sum(len(gemm.writes) for gemm in gemms),
            self.done.run,
        )
        self.check(config)

    def check(self, config: AcceleratorConfig) -> None:
        gemms = self.gemms
        expected = [write for gemm in gemms for write in gemm.writes]
        got = [(item.address, item.beats) for item in self.writes.items]
        assert_equal("write command", expected, got)
        expected = [beat for gemm in gemms for beat in gemm.beats]
        assert_equal("beat", expected, [item.data for item in self.beats.items])
        strobe = (1 << config.data.beat_bytes) - 1
        assert_equal("strobe", [strobe] * len(expected), [b.strobe for b in self.beats.items])
        names = ("strobe", "row", "last")
        ranked = [beat for gemm in gemms if gemm.command["rank"] for beat in gemm.results]
        expected = [(*beat["data"], *(beat[name] for name in names)) for beat in ranked]
        got = [(*item.data, *(item[name] for name in names)) for item in self.ranked.items]
        assert_equal("ranked beat", expected, got)
        lasts = [i for i, beat in enumerate(self.results.items) if beat["last"]]
        assert_equal("done", [self.results.taken[i] for i in lasts], self.done.cycles)


@each_shape
@each_pause
def test_results_of_random_commands(shape: tuple[int, int, int], pause: float) -> None:
    config = system(*shape)
    rng = random.Random(seed())
    ResultBench(config, [Gemm(config, rng) for _ in range(40)], pause)


@each_shape
@pytest.mark.parametrize("half", [0, 1])
def test_a_beat_for_memory_in_every_cycle_of_a_tile(shape: tuple[int, int, int], half: int) -> None:
    """And a cycle between them for the command, from command to command as well, and while they are
    ranked."""
    config = system(*shape)
    rng = random.Random(seed())
    gemms = [Gemm(config, rng, half=half, discard=0, rank=i % 2) for i in range(8)]
    bench = ResultBench(config, gemms, 0)
    expected, cycle = [], bench.writes.cycles[0]
    for gemm in gemms:
        for _, beats in gemm.writes:
            expected += range(cycle + 1, cycle + 1 + beats)
            cycle += 1 + beats
    assert bench.beats.cycles == expected


def test_a_discarded_result_takes_a_cycle() -> None:
    config = system(3, 4, 64)
    rng = random.Random(seed())
    bench = ResultBench(config, [Gemm(config, rng, discard=1) for _ in range(8)], 0)
    taken = bench.results.taken
    assert taken == list(range(taken[0], taken[0] + len(taken)))


def test_write_commands_come_with_the_results() -> None:
    """Not before the tile's first one, and even if no beat is taken."""
    config = system(2, 4, 64)
    dut = ResultWriter(config)
    rng = random.Random(seed())
    gemm = Gemm(config, rng, discard=0, rank=0, tiles=2)
    command = Source(dut.command, [gemm.command], rng)
    cycles: list[int] = []

    async def first_result(ctx: SimulatorContext) -> None:
        ctx.set(dut.write_command.ready, 1)
        for cycle in range(60):
            ctx.set(dut.results.valid, cycle >= 40)
            ctx.set(dut.results.payload, gemm.results[0])
            if ctx.get(dut.write_command.valid):
                cycles.append(cycle)
            await ctx.tick()

    simulate(dut, [command], [], lambda: len(cycles) == 1, first_result)
    assert cycles == [40]


# The write multiplexer


class MuxBench:
    """Random commands of several sources through a multiplexer into the model of a writer."""

    def __init__(self, sources: int, commands: int, pause: float, *, beats: int = 9) -> None:
        self.config = config = AxiConfig(data_bits=64, address_bits=32, outstanding=2)
        self.dut = dut = WriteMux(config, sources)
        self.rng = rng = random.Random(f"{seed()} {sources} {pause}")
        self.commands, self.beats = [], []
        self.done = [Pulses(source.done) for source in dut.sources]
        agents = []
        for i, source in enumerate(dut.sources):
            lengths = [rng.randint(1, beats) for _ in range(commands)]
            # Addresses and data say whose and which they are.
            sent = [
                {"address": i << 16 | number, "beats": length}
                for number, length in enumerate(lengths)
            ]
            data = [
                {"data": i << 48 | number << 16 | j, "strobe": rng.getrandbits(8)}
                for number, length in enumerate(lengths)
                for j in range(length)
            ]
            self.commands.append(sent)
            self.beats.append(data)
            agents += [
                Source(source.command, sent, rng, pause),
                Source(source.data, data, rng, pause),
            ]
        self.command, self.data = Sink(dut.command, rng, pause), Sink(dut.data, rng, pause)
        self.answered: list[tuple[int, int]] = []  # source, cycle
        total = sources * commands
        simulate(
            dut,
            agents,
            [self.command, self.data],
            lambda: len(self.answered) == total,
            self.answer,
            *(pulses.run for pulses in self.done),
        )

    async def answer(self, ctx: SimulatorContext) -> None:
        """Answers a command some time after its last beat."""
        cycle = beats = 0
        while True:
            number = len(self.answered)
            answer = False
            if number < len(self.command.items):
                command = self.command.items[number]
                is_complete = len(self.data.items) >= beats + command.beats
                answer = is_complete and self.rng.random() < 0.3
                if answer:
                    beats += command.beats
                    self.answered.append((command.address >> 16, cycle))
            ctx.set(self.dut.done_in, answer)
            await ctx.tick()
            cycle += 1

    def check(self) -> list[int]:
        """Compare all that came out; the sources of the commands in order."""
        order = [item.address >> 16 for item in self.command.items]
        commands = [iter(each) for each in self.commands]
        beats = [iter(each) for each in self.beats]
        expected_commands, expected_beats = [], []
        for source in order:
            command = next(commands[source])
            expected_commands.append((command["address"], command["beats"]))
            expected_beats += [tuple(next(beats[source]).values()) for _ in range(command["beats"])]
        got = [(item.address, item.beats) for item in self.command.items]
        assert_equal("command", expected_commands, got)
        got = [(item.data, item.strobe) for item in self.data.items]
        assert_equal("beat", expected_beats, got)
        assert len(order) == sum(map(len, self.commands))
        for source, pulses in enumerate(self.done):
            expected = [cycle for owner, cycle in self.answered if owner == source]
            assert_equal(f"done of source {source}", expected, pulses.cycles)
        return order


@pytest.mark.parametrize("sources", [1, 2, 3, 5])
@each_pause
def test_writes_of_several_sources(sources: int, pause: float) -> None:
    MuxBench(sources, 60, pause).check()


def test_sources_take_turns_and_leave_no_gap() -> None:
    bench = MuxBench(3, 40, 0)
    order = bench.check()
    assert all(set(order[i : i + 3]) == {0, 1, 2} for i in range(0, len(order), 3))
    # Answers are slower than commands of few beats.
    bench = MuxBench(3, 10, 0, beats=100)
    bench.check()
    cycles = bench.data.cycles
    assert cycles == list(range(cycles[0], cycles[0] + len(cycles)))


def test_a_multiplexer_needs_sources() -> None:
    WriteMux._MustUse__silence = True  # else Amaranth warns that it is never elaborated
    with pytest.raises(ValueError, match="sources is 0"):
        WriteMux(AxiConfig(), 0)


# The ranking writer


@pytest.mark.parametrize(
    ("data_bits", "choices"), [(64, 8), (128, 4), (256, 4), (256, 8), (512, 4), (1024, 8)]
)
@each_pause
def test_rankings_in_memory(data_bits: int, choices: int, pause: float) -> None:
    rows = 6
    config = system(rows, 64, data_bits, choices)
    dut = RankingWriter(config)
    rng = random.Random(f"{seed()} {data_bits} {choices} {pause}")
    sizes = [*range(1, rows + 1), 1, rows]
    commands = [
        {"address": rng.randrange(1 << 20) * config.alignment, "tokens": tokens} for tokens in sizes
    ]
    rankings = [
        [
            [
                (rng.getrandbits(TOKEN_BITS), rng.getrandbits(32), rng.random() < 0.8)
                for _ in range(config.choices)
            ]
            for _ in range(rows)
        ]
        for _ in sizes
    ]
    command = Source(dut.command, commands, rng, pause)
    writes, beats = Sink(dut.write_command, rng, pause), Sink(dut.write_data, rng, pause)

    async def ranker(ctx: SimulatorContext) -> None:
        """Gives each command another ranking, and noise while nothing is read."""
        async for *_, row, busy in ctx.tick().sample(dut.row, dut.busy):
            ranking = rankings[max(0, len(command.taken) - 1)]
            for entry, (token, logit, valid) in zip(dut.entries, ranking[row % rows], strict=True):
                ctx.set(entry.token, token)
                ctx.set(entry.logit, logit if busy else rng.getrandbits(32))
                ctx.set(entry.valid, valid)

    lengths = [-(-config.choices * 8 * tokens * 8 // data_bits) for tokens in sizes]
    simulate(dut, [command], [writes, beats], lambda: len(beats.items) == sum(lengths), ranker)
    expected = [(each["address"], n) for each, n in zip(commands, lengths, strict=True)]
    assert_equal("write command", expected, [(w.address, w.beats) for w in writes.items])
    items = iter(beats.items)
    for tokens, ranking, length in zip(sizes, rankings, lengths, strict=True):
        written = []
        for _ in range(length):
            beat = next(items)
            content = beat.data.to_bytes(data_bits // 8, "little")
            written += [byte for i, byte in enumerate(content) if beat.strobe >> i & 1]
            # What is written has no holes, so that the bytes' number is their place.
            assert (beat.strobe & (beat.strobe + 1)) == 0
        words = []
        for row in ranking[:tokens]:
            for token, logit, valid in row:
                words += [token, logit] if valid else [0xFFFFFFFF, 0xFF800000]
        content = b"".join(word.to_bytes(4, "little") for word in words)
        assert_equal(f"byte of {tokens} rows", list(content), written)


def test_writers() -> None:
    writers.run()
