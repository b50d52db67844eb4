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


def cycles_of_a_step(session: Session, sampling: Sampling | None) -> int:
    """Those of seven draft passes and a verify pass of 8 rows, without the host's."""
    run = session.generate(
        [1, 2],
        max_tokens=20,
        settings=Settings(8, 7, choices=1),
        sampling=sampling,
        generator=torch.Generator().manual_seed(SEED),
    )
    assert next(run).drafted == 7
    counters = session.driver.counters()
    run.close()
    return counters["CYCLES"] - counters["HOST_CYCLES"]


def test_a_step_takes_no_longer_with_a_real_head():
    """With a head of 512 inputs: but for the last tile's ranking, of at most 28 cycles a row and 70
    for the first beat, as many cycles as greedy."""
    model = drafted_model("llama", SEED, hidden=512, blocks=1, vocab_size=160, context=64)
    encoded = encode_linears(model)
    with simulated_session(model, encoded, FULL, capacity=64, latency=16) as session:
        cycles = [cycles_of_a_step(session, sampling) for sampling in (None, Sampling(1.0))]
    print(f"\ncycles of a step: greedy {cycles[0]:,}, sampled {cycles[1]:,}")
    assert cycles[1] - cycles[0] <= 7 * (28 + 70) + 8 * 28 + 70


@pytest.mark.slow
def test_a_small_head_takes_no_longer_with_noise_for_it(tiny):
    """The head of `tiny` has 64 inputs. With noise for so many a step takes as long as a greedy
    one, but for some cycles of each pass."""
    model, encoded = tiny.model, encode_linears(tiny.model)
    for head_inputs in (FULL.head_inputs, 64):
        config = replace(FULL, head_inputs=head_inputs)
        with simulated_session(model, encoded, config, capacity=64, latency=16) as session:
            samplings = None, Sampling(1.0), Sampling(1.0, min_p=0.05)
            greedy, sampled, truncated = (cycles_of_a_step(session, s) for s in samplings)
        print(
            f"\nhead_inputs {head_inputs}: cycles of a step of tiny: greedy {greedy:,}, sampled "
            f"{sampled:,}, with min-p {truncated:,}"
        )
    assert sampled - greedy <= 8 * 60


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
