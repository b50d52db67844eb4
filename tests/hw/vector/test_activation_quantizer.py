# SPDX-License-Identifier: Apache-2.0
"""Draft activations in memory against the golden model and the memory's layout."""

from __future__ import annotations

from itertools import product
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from amaranth.sim import SimulatorContext

from speq.host.layout import draft_activation_words
from speq.hw.accelerator_config import AcceleratorConfig
from speq.hw.engine_config import EngineConfig
from speq.hw.memory.axi import AxiConfig
from speq.hw.vector.activation_quantizer import ActivationQuantizer, words_at_once
from speq.model.arith import quantize_activations
from speq.model.number_format import FormatConfig
from speq.sim.compare import assert_equal_bits
from speq.sim.runner import seed
from tests.hw.streams import Sink, Source, simulate

pytestmark = pytest.mark.usefixtures("simulable_ram")

_PAUSE = 0.4
_MAX_K = 200
_SIZE = 1 << 13
#: Rows, drafting rows, columns, bits of the data port, group, lanes: a word is as wide as a beat,
#: narrower, wider; a beat has more words than there are lanes, there are more lanes than a group
#: has weights; a block is smaller than a tile and larger.
_SHAPES = (
    (4, 1, 16, 64, 64, 4),
    (2, 2, 16, 256, 32, 8),
    (3, 1, 32, 512, 64, 4),
    (8, 2, 8, 64, 64, 8),
    (6, 4, 128, 128, 32, 64),
    (2, 2, 64, 512, 128, 16),
    (8, 1, 32, 512, 128, 8),
)


def system(shape: tuple[int, ...]) -> AcceleratorConfig:
    rows, draft_rows, cols, data_bits, group, lanes = shape
    number_format = FormatConfig(group=group)
    engine = EngineConfig(rows, cols, number_format, draft_rows=draft_rows, max_k=_MAX_K)
    port = AxiConfig(data_bits=data_bits, address_bits=32)
    return AcceleratorConfig(engine, AxiConfig(data_bits=64, address_bits=32), port, lanes=lanes)


def random_activations(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    """FP16 patterns of any kind, infinities and NaN rarely."""
    patterns = rng.integers(1 << 16, size=shape, dtype=np.uint16)
    is_special = (patterns & 0x7C00) == 0x7C00
    return np.where(is_special & (rng.random(shape) < 0.95), patterns & 0xBFFF, patterns)


class Case(NamedTuple):
    """A command, its activations uint16 [k][A / 2], and the items that give them."""

    fields: dict[str, int]
    words: np.ndarray
    items: list[Any]


def case(
    config: AcceleratorConfig, rng: np.random.Generator, from_results: bool, **fields: int
) -> Case:
    """A command with random activations; what does not count is random, too."""
    engine, k, at_once = config.engine, fields["k"], words_at_once(config)
    tiles = -(-k // engine.cols)
    shape = (tiles * engine.cols + at_once, config.activation_bytes // 2)
    words = random_activations(rng, shape)
    items: list[Any] = []
    if from_results:
        for tile, row, word in product(
            range(tiles), range(fields["rows"]), range(engine.cols // config.lanes)
        ):
            first = tile * engine.cols + word * config.lanes
            ends = tile == tiles - 1 and row == fields["rows"] - 1
            ends &= word == engine.cols // config.lanes - 1
            place = {"tile": tile, "row": row, "word": word, "ends": {"operation": ends}}
            values = words[first : first + config.lanes, row].tolist()
            items.append({"values": values, "place": place})
    else:
        for first in range(0, k, at_once):
            content = words[first : first + at_once].tobytes()
            items.append(int.from_bytes(content, "little"))
    return Case(fields | {"from_results": from_results}, words[:k], items)


def cases(config: AcceleratorConfig, rng: np.random.Generator, number: int) -> list[Case]:
    """Random commands, one behind the other in memory."""
    result, place = [], 0
    for i in range(number):
        k = int(rng.choice((1, 64, _MAX_K, int(rng.integers(1, _MAX_K)))))
        rows = int(rng.integers(1, config.engine.draft_rows + 1))
        place += config.data.beat_bytes * int(rng.integers(3))
        result.append(case(config, rng, bool(i % 2), k=k, rows=rows, results=place))
        size = -(-k // 4) * config.activation_bytes
        place += -(-size // config.data.beat_bytes) * config.data.beat_bytes
    assert place <= _SIZE
    return result


def sources(
    unit: ActivationQuantizer, commands: list[Case], rng: np.random.Generator, pause: float
) -> list[Source]:
    """What gives the commands, and the items of both kinds."""
    kinds = [
        [item for each in commands if each.fields["from_results"] == kind for item in each.items]
        for kind in (False, True)
    ]
    return [
        Source(unit.command, [each.fields for each in commands], rng, pause),
        Source(unit.activations, kinds[0], rng, pause),
        Source(unit.results, kinds[1], rng, pause),
    ]


def run(config: AcceleratorConfig, commands: list[Case], pause: float) -> tuple[list[Source], Sink]:
    """Commands through the unit, compared with the golden model."""
    rng = np.random.default_rng(seed())
    unit = ActivationQuantizer(config)
    given = sources(unit, commands, rng, pause)
    sink = Sink(unit.pieces, rng, pause)
    simulate(unit, given, [sink], lambda: sum(item.last for item in sink.items) == len(commands))
    check(config, commands, sink)
    return given, sink


def check(config: AcceleratorConfig, commands: list[Case], sink: Sink) -> None:
    """Compare the memory with the golden model."""
    untouched = np.random.default_rng(seed()).integers(256, size=_SIZE, dtype=np.uint8)
    expected, got = untouched.copy(), untouched.copy()
    for fields, words, _ in commands:
        rows = np.ascontiguousarray(words[:, : fields["rows"]].T).view(np.float16)
        blocks = quantize_activations(torch.from_numpy(rows), config.engine.format.group)
        content = draft_activation_words(blocks, config).ravel()
        expected[fields["results"] :][: len(content)] = content
    size = config.data.beat_bytes
    for item in sink.items:
        for i, byte in enumerate(item.data.to_bytes(size, "little")):
            if item.strobe >> i & 1:
                got[item.word * size + i] = byte
    assert_equal_bits(
        f"ActivationQuantizer: seed {seed()}: memory (by byte)", expected=expected, got=got
    )


@pytest.mark.parametrize("shape", _SHAPES, ids=str)
@pytest.mark.parametrize("pause", [0, _PAUSE])
def test_memory_is_as_by_the_golden_model(shape: tuple[int, ...], pause: float) -> None:
    config = system(shape)
    run(config, cases(config, np.random.default_rng(seed()), 4), pause)


@pytest.mark.parametrize("shape", (_SHAPES[1], _SHAPES[2], _SHAPES[6]), ids=str)
@pytest.mark.parametrize("from_results", [False, True])
def test_an_item_is_taken_in_every_cycle(shape: tuple[int, ...], from_results: bool) -> None:
    config = system(shape)
    rng = np.random.default_rng(seed())
    rows = config.engine.draft_rows
    command = case(config, rng, from_results, k=_MAX_K, rows=rows, results=0)
    given, _ = run(config, [command], 0)
    (taken,) = (source.taken for source in given[1:] if source.taken)
    assert len(taken) == len(command.items)
    assert np.all(np.diff(taken) == 1)


@pytest.mark.parametrize("from_results", [False, True])
@pytest.mark.parametrize("when", range(1, 90, 22))
def test_a_clear_leaves_nothing_behind(when: int, from_results: bool) -> None:
    config = system(_SHAPES[1])
    rng = np.random.default_rng(seed())
    unit = ActivationQuantizer(config)
    dropped = case(config, rng, from_results, k=_MAX_K, rows=2, results=0)
    commands = cases(config, rng, 4)
    sink = Sink(unit.pieces, rng)
    cleared = False

    async def interrupt(ctx: SimulatorContext) -> None:
        nonlocal cleared
        items = unit.results if from_results else unit.activations
        ctx.set(unit.command.payload, dropped.fields)
        ctx.set(unit.command.valid, 1)
        ctx.set(items.valid, 1)
        ctx.set(unit.pieces.ready, 1)
        for i in range(when):
            ctx.set(items.payload, dropped.items[i % len(dropped.items)])
            await ctx.tick()
        ctx.set(unit.command.valid, 0)
        ctx.set(items.valid, 0)
        ctx.set(unit.clear, 1)
        await ctx.tick()
        ctx.set(unit.clear, 0)
        assert not ctx.get(unit.busy)
        cleared = True

    class After:
        """An agent that begins when the unit has been cleared."""

        def __init__(self, agent: Source | Sink) -> None:
            self.agent = agent

        async def run(self, ctx: SimulatorContext) -> None:
            while not cleared:
                await ctx.tick()
            await self.agent.run(ctx)

    simulate(
        unit,
        [],
        [],
        lambda: sum(item.last for item in sink.items) == len(commands),
        interrupt,
        *(After(agent).run for agent in (*sources(unit, commands, rng, 0), sink)),
    )
    check(config, commands, sink)
