# SPDX-License-Identifier: Apache-2.0
"""Draft activations in memory against the golden model and the memory's layout."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from amaranth.sim import SimulatorContext

from speq.host.layout import draft_activation_words
from speq.hw.accelerator_config import AcceleratorConfig
from speq.hw.engine_config import EngineConfig
from speq.hw.memory.axi import AxiConfig
from speq.hw.vector.activation_quantizer import ActivationQuantizer
from speq.model.arith import quantize_activations
from speq.model.number_format import FormatConfig
from speq.sim.compare import assert_equal_bits
from speq.sim.runner import seed
from tests.hw.streams import Sink, Source, simulate

pytestmark = pytest.mark.usefixtures("simulable_ram")

_PAUSE = 0.4
_MAX_K = 200
_SIZE = 1 << 13
#: Rows, drafting rows, columns, bits of the data port, group: a word is as wide as a beat,
#: narrower, wider.
_SHAPES = (
    (4, 1, 16, 64, 64),
    (2, 2, 16, 256, 32),
    (3, 1, 32, 512, 64),
    (8, 2, 8, 64, 64),
    (6, 4, 8, 128, 128),
)


def system(shape: tuple[int, ...]) -> AcceleratorConfig:
    rows, draft_rows, cols, data_bits, group = shape
    number_format = FormatConfig(group=group)
    engine = EngineConfig(rows, cols, number_format, draft_rows=draft_rows, max_k=_MAX_K)
    port = AxiConfig(data_bits=data_bits, address_bits=32)
    return AcceleratorConfig(engine, AxiConfig(data_bits=64, address_bits=32), port, lanes=4)


def random_activations(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    """FP16 patterns of any kind, infinities and NaN rarely."""
    patterns = rng.integers(1 << 16, size=shape, dtype=np.uint16)
    is_special = (patterns & 0x7C00) == 0x7C00
    return np.where(is_special & (rng.random(shape) < 0.95), patterns & 0xBFFF, patterns)


def cases(
    config: AcceleratorConfig, rng: np.random.Generator, number: int
) -> list[tuple[dict[str, int], np.ndarray]]:
    """Random commands, one behind the other in memory, and their words, uint16 [k][A / 2]."""
    result, place = [], 0
    for _ in range(number):
        k = int(rng.choice((1, 64, _MAX_K, int(rng.integers(1, _MAX_K)))))
        rows = int(rng.integers(1, config.engine.draft_rows + 1))
        words = random_activations(rng, (k, config.activation_bytes // 2))
        place += config.data.beat_bytes * int(rng.integers(3))
        result.append(({"k": k, "rows": rows, "results": place}, words))
        size = -(-k // 4) * config.activation_bytes
        place += -(-size // config.data.beat_bytes) * config.data.beat_bytes
    assert place <= _SIZE
    return result


def run(
    config: AcceleratorConfig, commands: list[tuple[dict[str, int], np.ndarray]], pause: float
) -> tuple[Source, Sink]:
    """Commands through the unit, compared with the golden model."""
    rng = np.random.default_rng(seed())
    unit = ActivationQuantizer(config)
    words = [int.from_bytes(word.tobytes(), "little") for _, block in commands for word in block]
    command = Source(unit.command, [fields for fields, _ in commands], rng, pause)
    source = Source(unit.words, words, rng, pause)
    sink = Sink(unit.pieces, rng, pause)
    simulate(
        unit,
        [command, source],
        [sink],
        lambda: sum(item.last for item in sink.items) == len(commands),
    )
    check(config, commands, sink)
    return source, sink


def check(
    config: AcceleratorConfig, commands: list[tuple[dict[str, int], np.ndarray]], sink: Sink
) -> None:
    """Compare the memory with the golden model."""
    untouched = np.random.default_rng(seed()).integers(256, size=_SIZE, dtype=np.uint8)
    expected, got = untouched.copy(), untouched.copy()
    for fields, words in commands:
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
    run(config, cases(config, np.random.default_rng(seed()), 3), pause)


@pytest.mark.parametrize("shape", _SHAPES, ids=str)
def test_a_word_is_taken_in_every_cycle(shape: tuple[int, ...]) -> None:
    config = system(shape)
    words = random_activations(
        np.random.default_rng(seed()), (_MAX_K, config.activation_bytes // 2)
    )
    source, _ = run(config, [({"k": _MAX_K, "rows": 1, "results": 0}, words)], 0)
    assert np.all(np.diff(source.taken) == 1)


@pytest.mark.parametrize("when", range(1, 130, 26))
def test_a_clear_leaves_nothing_behind(when: int) -> None:
    config = system(_SHAPES[1])
    rng = np.random.default_rng(seed())
    unit = ActivationQuantizer(config)
    dropped, commands = cases(config, rng, 1), cases(config, rng, 2)
    words = [int.from_bytes(word.tobytes(), "little") for _, block in commands for word in block]
    source = Source(unit.words, words, rng)
    command = Source(unit.command, [fields for fields, _ in commands], rng)
    sink = Sink(unit.pieces, rng)
    cleared = False

    async def interrupt(ctx: SimulatorContext) -> None:
        nonlocal cleared
        ((fields, block),) = dropped
        ctx.set(unit.command.payload, {**fields, "k": _MAX_K})
        ctx.set(unit.command.valid, 1)
        ctx.set(unit.words.valid, 1)
        ctx.set(unit.pieces.ready, 1)
        for i in range(when):
            ctx.set(unit.words.payload, int.from_bytes(block[i % len(block)].tobytes(), "little"))
            await ctx.tick()
        ctx.set(unit.command.valid, 0)
        ctx.set(unit.words.valid, 0)
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
        *(After(agent).run for agent in (command, source, sink)),
    )
    check(config, commands, sink)
