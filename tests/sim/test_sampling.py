# SPDX-License-Identifier: Apache-2.0
"""The accelerator's RTL samples the golden model's tokens and bits."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch

from speq.host.session import Session
from speq.model.encoding import encode_linears
from speq.model.loaders import load_model
from speq.model.settings import Sampling
from speq.model.speculation import Settings
from speq.sim.session import simulated_session
from tests.host.decoding import GUESSING, SEED, check
from tests.model.drafted import drafted_model
from tests.sim.configurations import FULL

CAPACITY = 300


@pytest.fixture(scope="module")
def tiny() -> Iterator[Session]:
    """The model on 8 x 16 PEs."""
    model = load_model("tiny")
    encoded = encode_linears(model)
    with simulated_session(model, encoded, FULL, capacity=CAPACITY, latency=16) as session:
        yield session


def sample(
    session: Session, settings: Settings, sampling: Sampling, seed: int, tokens: int
) -> list[int]:
    """Decode and compare with the golden model; the tokens."""
    steps = check(
        session,
        session.model.tokenizer.encode("Once upon a time"),
        settings,
        max_tokens=tokens,
        sampling=sampling,
        generator=torch.Generator().manual_seed(seed),
    )
    return [token for step in steps for token in step.tokens]


def test_steps_are_the_golden_models(tiny):
    """A chain with alternates, re-ranked drafts and guesses, and plain decoding: one text."""
    for sampling in (Sampling(0.8), Sampling(1.5, min_p=0.05)):
        texts = [
            sample(tiny, settings, sampling, SEED + 2**63, 12)
            for settings in (
                Settings(8, 7, 1.0),
                Settings(8, 5, 0.5, choices=3, reranked=8, policy=GUESSING),
                Settings(8, 0),
            )
        ]
        assert texts[0] == texts[1] == texts[2]


def cycles_of_a_step(session: Session, settings: Settings, sampling: Sampling | None) -> int:
    """Those of the step behind a prompt of one token, which has no passes of its own, without the
    host's."""
    run = session.generate(
        [1],
        max_tokens=20,
        settings=settings,
        sampling=sampling,
        generator=torch.Generator().manual_seed(SEED),
    )
    assert next(run).drafted == settings.length
    counters = session.driver.counters()
    run.close()
    return counters["CYCLES"] - counters["HOST_CYCLES"]


def added_cycles(session: Session, settings: Settings, sampling: Sampling) -> int:
    """Cycles that sampling adds to a step, whose share is printed."""
    greedy, sampled = (cycles_of_a_step(session, settings, s) for s in (None, sampling))
    print(
        f"\n{session.model.name}, {settings.length} draft passes, {settings.reranked} tokens "
        f"re-ranked, min-p {sampling.min_p}: greedy {greedy:,} cycles, sampled {sampled:,}, "
        f"{sampled / greedy - 1:+.3%}"
    )
    return sampled - greedy


PLAIN, CHAINS = Settings(8, 0), Settings(8, 7, choices=1)


def test_a_pass_takes_no_longer_with_a_real_head():
    """With a head of 512 inputs, but for the last tile's ranking: at most 25 cycles in a draft pass
    and 50 in a verify pass of 8 rows. A plain pass waits for its logits' way to memory anyway."""
    model = drafted_model("llama", SEED, hidden=512, blocks=1, vocab_size=160, context=64)
    encoded = encode_linears(model)
    with simulated_session(model, encoded, FULL, capacity=64, latency=16) as session:
        assert added_cycles(session, PLAIN, Sampling(1.0)) <= 12
        assert added_cycles(session, CHAINS, Sampling(1.0)) <= 7 * 25 + 50


def test_a_plain_pass_of_tiny_takes_no_longer(tiny):
    """Within 0.1 %, with noise for its head of 64 inputs."""
    greedy = cycles_of_a_step(tiny, PLAIN, None)
    for sampling in (Sampling(1.0), Sampling(1.0, min_p=0.05)):
        assert added_cycles(tiny, PLAIN, sampling) <= greedy / 1000


@pytest.mark.slow
def test_a_speculative_step_of_tiny_hardly_takes_longer(tiny):
    """Draft passes are so short that each counts; with min-p verify passes wait for results."""
    for settings in (CHAINS, replace(CHAINS, reranked=8)):
        greedy = cycles_of_a_step(tiny, settings, None)
        assert added_cycles(tiny, settings, Sampling(1.0)) <= 0.003 * greedy
        assert added_cycles(tiny, settings, Sampling(1.0, min_p=0.05)) <= 0.08 * greedy


@pytest.mark.slow
def test_500_tokens(tiny):
    """Of every temperature and several draft lengths and choices."""
    total = 0
    for seed, (temperature, length, choices) in enumerate(
        ((0.3, 7, 4), (0.8, 7, 4), (1.0, 3, 2), (1.5, 1, 1), (0.7, 5, 3))
    ):
        settings = Settings(8, length, 0.5, choices=choices, reranked=8 * (seed % 2))
        sampling = Sampling(temperature, min_p=0.05 * (seed % 3))
        total += len(sample(tiny, settings, sampling, SEED + seed, 120))
    assert total >= 500
