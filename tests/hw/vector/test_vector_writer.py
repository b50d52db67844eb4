# SPDX-License-Identifier: Apache-2.0
"""The writer of the vector unit's results: what it writes where, and how fast."""

from __future__ import annotations

import numpy as np
import pytest

from speq.hw.accelerator_config import AcceleratorConfig
from speq.hw.control.descriptor import Target
from speq.hw.engine_config import EngineConfig
from speq.hw.memory.axi import AxiConfig
from speq.hw.vector.vector_writer import VectorWriter
from speq.sim.benches import vector_writer
from speq.sim.benches.vector_writer import Command, command_fields, random_results
from speq.sim.runner import seed
from tests.hw.streams import Sink, Source, simulate

#: Cycles that pipelines and the planning of the first tile may take.
_START = 20


def system(rows: int, cols: int, lanes: int, data_bits: int) -> AcceleratorConfig:
    port = AxiConfig(data_bits=data_bits, address_bits=32)
    engine = EngineConfig(rows=rows, cols=cols, max_k=512)
    return AcceleratorConfig(engine, AxiConfig(data_bits=64, address_bits=32), port, lanes=lanes)


def test_results_of_every_target_in_memory() -> None:
    vector_writer.run()


def run(config: AcceleratorConfig, command: Command) -> tuple[list[int], Sink, Sink]:
    """Results as fast as the unit takes them: the cycles in which it did, and its writes."""
    rng = np.random.default_rng(seed())
    unit = VectorWriter(config)
    results = random_results(config, command, rng)
    commands = Source(unit.command, [command_fields(config, command, 0)], rng)
    words = Source(unit.words, results.words, rng)
    writes, beats = Sink(unit.writes.command, rng), Sink(unit.writes.data, rng)
    number_bytes = 4 if command.target is Target.TILES else 2
    size = sum(command.sizes) * command.k * number_bytes
    simulate(
        unit,
        [commands, words],
        [writes, beats],
        lambda: sum(beat.strobe.bit_count() for beat in beats.items) == size,
    )
    assert sum(write.beats for write in writes.items) == len(beats.items)
    return words.taken, writes, beats


def command_for(config: AcceleratorConfig, target: Target, rows: int, segments: int) -> Command:
    """A command of segments of 4 tiles."""
    cols = config.engine.cols
    return Command(target, 4 * cols, (rows,) * segments, rows, 0, 1, 0, 1 << 16, 1 << 12)


@pytest.mark.usefixtures("simulable_ram")
@pytest.mark.parametrize("target", [Target.TILES, Target.VALUES])
@pytest.mark.parametrize(("lanes", "data_bits"), [(4, 128), (4, 256), (8, 128)])
def test_rows_take_a_cycle_for_each_word_or_each_of_its_beats(
    target: Target, lanes: int, data_bits: int
) -> None:
    config = system(4, 16, lanes, data_bits)
    taken, writes, _ = run(config, command_for(config, target, 4, 2))
    bits = 32 if target is Target.TILES else 16
    assert set(np.diff(taken)) == {max(1, bits * lanes // data_bits)}
    # Whole bursts.
    if target is Target.TILES:
        assert {write.beats for write in writes.items} == {config.data.burst_beats}


@pytest.mark.usefixtures("simulable_ram")
@pytest.mark.parametrize(
    ("shape", "lines"),
    [((4, 32, 8, 512), 8), ((8, 16, 8, 256), 2), ((8, 16, 8, 64), 0.5), ((4, 32, 4, 512), 4)],
    ids=str,
)
@pytest.mark.parametrize("rows", [1, 4])
def test_lines_of_rows_take_a_cycle_for_a_beat_of_them(
    shape: tuple[int, int, int, int], lines: float, rows: int
) -> None:
    """Where filling the tiles takes longer, a word is taken in every cycle."""
    config = system(*shape)
    command = command_for(config, Target.ACTIVATIONS, rows, 1)
    taken, _, beats = run(config, command)
    drained = beats.cycles[-1] - taken[0]
    # The first tile is filled before, the last one drained behind all others.
    filling, draining = len(taken), command.k / lines
    assert drained <= max(filling + draining / 4, filling / 4 + draining) + _START


@pytest.mark.usefixtures("simulable_ram")
def test_a_line_of_keys_takes_a_cycle() -> None:
    config = system(4, 16, 8, 128)
    command = command_for(config, Target.KEYS, 4, 2)
    taken, writes, beats = run(config, command)
    # The first of eight tiles is filled before.
    assert beats.cycles[-1] - taken[0] <= len(taken) / 8 + 2 * command.k + _START
    assert all(write.beats == 1 for write in writes.items)
