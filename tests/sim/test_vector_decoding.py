# SPDX-License-Identifier: Apache-2.0
"""The accelerator's RTL with a vector unit decodes the golden model's tokens and bits."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch

from speq.host.registers import speculation_words
from speq.host.session import Session
from speq.hw.accelerator_config import AcceleratorConfig
from speq.hw.control.register_map import STATES
from speq.hw.engine_config import EngineConfig
from speq.model.checkpoint import ARCHITECTURES, Model
from speq.model.encoding import encode_linears
from speq.model.loaders import load_model
from speq.model.settings import Sampling
from speq.model.speculation import Settings, Step
from speq.sim.gtkwave import groups
from speq.sim.session import board_for, simulated_session, top_verilog
from speq.sim.simulated_board import CHANNELS
from speq.sim.watched_board import WatchedBoard
from tests.host.decoding import COUNTED, GUESSING, REPETITIVE, SEED, SMALL, check, check_end, system
from tests.host.test_driver import add_counted
from tests.model.drafted import drafted_model
from tests.model.small_models import overflowing, random_tokens

#: One simulation for all that is not slow.
CONFIG = replace(system(SMALL), lanes=4)
#: Cycles within which any run here ends.
LIMIT = 2_000_000


def vector_session(model: Model, config: AcceleratorConfig = CONFIG, **memory: object) -> Session:
    """A session on the accelerator in the simulator."""
    memory = {"latency": 16} | memory
    return simulated_session(model, encode_linears(model), config, **memory)


@pytest.fixture(scope="module")
def llama() -> Iterator[Session]:
    """A small model, which decodes one text after the other."""
    with vector_session(drafted_model("llama", SEED)) as session:
        yield session


def tokens_of(steps: Sequence[Step]) -> list[int]:
    """What they commit."""
    return [token for step in steps for token in step.tokens]


def test_rows_of_all_kinds_with_stalls_and_reordered_responses():
    """On all channels of the memory, behind more passes over the prompt than one; then without
    drafting."""
    memory = {"stalls": dict.fromkeys(CHANNELS, 80), "reorder": True, "seed": SEED, "latency": 5}
    model = drafted_model("llama", SEED)
    prompt = random_tokens(model.config, 3, SEED) * 2
    total = dict.fromkeys(COUNTED, 0)
    with vector_session(model, **memory) as session:
        for settings, count in (
            (Settings(4, policy=GUESSING), 8),
            (Settings(4, 2, 0.5, reranked=2), 5),
            (Settings(4, 0), 2),
        ):
            steps = check(session, prompt, settings, max_tokens=count)
            add_counted(total, session, steps)
    named = ("draft_passes", "verify_passes", "committed", "alternates", "guesses")
    assert all(total[name] for name in named), total


def test_norms_of_heads_windows_and_gelu():
    """Heads that do not fill their tiles, and a window that ends in the prompt."""
    model = drafted_model("gemma3", SEED, head_dim=10)
    with vector_session(model) as session:
        steps = check(session, random_tokens(model.config, 9, SEED), Settings(4), max_tokens=6)
        add_counted(dict.fromkeys(COUNTED, 0), session, steps)


def test_sampling(llama):
    sampling, generator = Sampling(0.9, min_p=0.02), torch.Generator().manual_seed(SEED)
    prompt, options = [5, 6, 7], {"sampling": sampling, "generator": generator}
    check(llama, prompt, Settings(4, 3, 0.1, 3), max_tokens=6, **options)


def test_results_that_are_not_finite_end_decoding():
    """In the prompt and behind it, with the golden model's error; what comes next is right."""
    model = overflowing(drafted_model("llama", SEED), 5, "block.0.values")
    settings = Settings(4, threshold=0.5)
    with vector_session(model) as session:
        for prompt, kind, position in (
            ([1, 2, 3, 4, 5, 6, 7], "prompt", 4),
            ([1, 2, 5], "verify", 2),
        ):
            steps, error = check_end(session, prompt, settings, max_tokens=2)
            assert steps == [] and error is not None
            assert (error.kind, error.layer, error.position) == (kind, "block.0.values", position)
            assert session.driver.registers["STATUS"] == STATES["IDLE"][0]
        check_end(session, [1, 2, 3], settings, max_tokens=3)


def test_runs_that_are_stopped_in_the_middle_of_vector_work(llama):
    """The next run is right."""
    registers, random = llama.driver.registers, np.random.default_rng(SEED)
    for _ in range(3):
        run = llama.generate([1, 2, 3], max_tokens=30, settings=Settings(4, 1))
        next(run)
        while True:
            assert not llama.board.wait_interrupt(int(random.integers(1, 100)))
            before = registers["VECTOR_CYCLES"]
            if registers["VECTOR_CYCLES"] > before:
                break
        run.close()
        assert registers["STATUS"] == STATES["IDLE"][0]
    check(llama, [1, 2, 3, 4, 5], Settings(4, 2), max_tokens=3)


@pytest.mark.parametrize("stops", [False, True])
def test_a_run_from_the_prompt_to_the_last_token_needs_no_host(llama, stops):
    """Neither an answer nor a memory access: tokens of the prompt before it, those in the ring
    behind it, up to a stop token or as many as there should be."""
    driver, board = llama.driver, llama.board
    settings, count = Settings(4, choices=3, policy=GUESSING), 12
    prompt = random_tokens(llama.model.config, 3, SEED) * 3
    options = {"max_tokens": count, "settings": settings}
    expected = tokens_of(list(llama.golden(prompt, **options)))
    # Where the text ends, if anything does before its end.
    stop = max(expected[:-2], key=expected.index)
    if stops:
        expected = tokens_of(list(llama.golden(prompt, **options, stop_ids=frozenset([stop]))))
        assert expected[-1] == stop and len(expected) < count
    board.write(driver.layout.text, np.array(prompt[:-1], "<u4"))
    registers = driver.registers
    for name, value in speculation_words(driver.config, settings).items():
        if isinstance(value, tuple):
            registers.write_costs(name, value)
        else:
            registers[name] = value
    registers["HISTORY_LENGTH"] = 0
    for token in prompt:
        registers["HISTORY"] = token
    registers.write_stop_tokens([stop] if stops else [])
    flags = {"speculate": 1, "sample": 0, "truncate": 0, "steps": 0, "move": 1}
    values = {"RUN": flags, "POSITION": 0, "PROMPT_END": len(prompt) - 1, "ROOT": prompt[-1]}
    values |= {"DRAFT_LENGTH": settings.length, "TOKEN_LIMIT": count, "IRQ_STATUS": 7}
    for name, value in values.items():
        registers[name] = value
    registers.command("clear_counters")
    registers.command("start")
    assert board.wait_interrupt(LIMIT)
    assert registers["STATUS"] == STATES["IDLE"][0]
    assert registers["HOST_CYCLES"] == 0
    assert registers["RING_INDEX"] == registers["COMMITTED"] == len(expected)
    assert board.read(driver.layout.ring, 4 * len(expected)).view("<u4").tolist() == expected
    assert registers["POSITION"] == len(prompt) - 1 + len(expected)
    assert registers["ROOT"] == expected[-1]


def test_passes_are_seen_though_no_interrupt_tells_of_them():
    """All of them, in the same cycles in every run."""
    model = drafted_model("llama", SEED)
    prompt = random_tokens(model.config, 6, SEED)
    options = {"max_tokens": 5, "settings": Settings(4, 2, 0.5)}
    encoded, seen = encode_linears(model), []
    for _ in range(2):
        board = board_for(model, encoded, CONFIG, latency=16)
        watched = WatchedBoard(board, CONFIG, lambda _: False)
        with Session(model, encoded, watched) as session:
            steps = list(session.generate(prompt, **options))
        seen.append(watched.events)
        counts = {name: len(cycles) for name, cycles in watched.events.items()}
        drafts = sum(step.drafted for step in steps)
        assert counts == {"prompt": 2, "draft": drafts, "verify": len(steps), "step": len(steps)}
        assert drafts and all(cycles == sorted(set(cycles)) for cycles in watched.events.values())
    assert seen[0] == seen[1]


def test_the_layout_of_waves_names_signals_of_the_verilog():
    """As recordings name them: by the instances that they are in."""
    signals, instance = set(), ""
    for line in top_verilog(CONFIG).splitlines():
        if module := re.match(r"module \\?(speq_top\S*)", line):
            instance = module[1].replace("speq_top", "board.accelerator")
        elif found := re.match(r"  (?:wire|reg) (?:\[\d+:\d+\] )?\\?([^ ;]+)", line):
            signals.add(f"{instance}.{found[1]}")
    named = {trace.signal for group in groups(CONFIG) for trace in group.traces}
    named = {name for name in named if name.startswith("board.accelerator.")}
    assert named and named <= signals, named - signals


# Larger ones.


@pytest.mark.slow
@pytest.mark.parametrize(
    "config",
    [
        replace(system(EngineConfig()), lanes=8),
        replace(system(EngineConfig(), weights=64, data=64), lanes=8),
        replace(system(EngineConfig(cols=64)), lanes=16),
    ],
    ids=["8 x 16", "ports of 64 bits", "8 x 64"],
)
def test_64_tokens_plain_and_speculative(config):
    model = load_model("tiny")
    prompt = model.tokenizer.encode("Once upon a time")
    cycles, total = {}, dict.fromkeys(COUNTED, 0)
    with vector_session(model, config, capacity=128) as session:
        for settings in (Settings(8, 0), Settings(8, threshold=1.0)):
            steps = check(session, prompt, settings, max_tokens=64)
            add_counted(total, session, steps)
            counters = session.driver.counters()
            assert counters["COMMITTED"] == 64
            cycles[settings.length] = (counters["CYCLES"] - counters["HOST_CYCLES"]) / 64
        assert total["accepted"] and total["alternate_hits"]
        repetitive = model.tokenizer.encode(REPETITIVE)
        steps = check(session, repetitive, Settings(8, policy=GUESSING), max_tokens=24)
        add_counted(total, session, steps)
    ratio = cycles[7] / cycles[0]
    print(f"\ncycles per token: plain {cycles[0]:,.0f}, speculative {cycles[7]:,.0f} = {ratio:.3f}")
    assert all(total.values()), total


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_architectures(architecture):
    """Biases, norms of queries and keys, norms behind layers, sliding windows, blocks without
    rotary embedding, factors; behind more rows of prompt than a pass has."""
    model = drafted_model(architecture, SEED)
    with vector_session(model) as session:
        check(session, random_tokens(model.config, 11, SEED), Settings(4), max_tokens=8)
