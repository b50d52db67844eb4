# SPDX-License-Identifier: Apache-2.0
"""Decoding with the driver compared with the golden model, for tests on any board."""

from __future__ import annotations

from dataclasses import replace

import torch

from speq.host.session import Session
from speq.hw.accelerator_config import AcceleratorConfig
from speq.hw.engine_config import EngineConfig
from speq.hw.memory.axi import AxiConfig
from speq.model.speculation import Settings, Step
from speq.model.transformer import NonFiniteError
from speq.sim.runner import seed

SEED = seed()
#: Tokens that `check` decodes, unless told otherwise.
TOKENS = 10
#: Statistics of decoding and the accelerator's counters of the same things.
COUNTED = {
    "draft_passes": "DRAFT_PASSES",
    "verify_passes": "VERIFY_PASSES",
    "committed": "COMMITTED",
    "accepted": "ACCEPTED",
    "alternates": "ALTERNATES",
    "alternate_hits": "ALTERNATE_HITS",
}
SMALL = EngineConfig(rows=4, cols=8, max_k=256, max_o=1024)


def system(
    engine: EngineConfig = SMALL, weights: int | None = None, data: int | None = None
) -> AcceleratorConfig:
    """A configuration with ports of so many bits, by default as wide as they can be."""
    ports = {
        name: bits and AxiConfig(data_bits=bits)
        for name, bits in (("weights", weights), ("data", data))
    }
    return AcceleratorConfig(engine, **ports)


def bits(x: torch.Tensor) -> torch.Tensor:
    """Bit patterns of float32 numbers."""
    return x.view(torch.int32)


def assert_same_steps(got: list[Step], expected: list[Step]) -> None:
    """Everything about the steps of two decoders is equal, the logits bit for bit."""
    assert [step.tokens for step in got] == [step.tokens for step in expected], f"SPEQ_SEED={SEED}"
    for number, (a, b) in enumerate(zip(got, expected, strict=True)):
        wrong = (bits(a.logits) != bits(b.logits)).nonzero().tolist()
        if wrong:
            row, token = wrong[0]
            raise AssertionError(
                f"SPEQ_SEED={SEED}: step {number}, row {row}, logit {token}: expected "
                f"{bits(b.logits)[row, token] & 0xFFFFFFFF:08x}, got "
                f"{bits(a.logits)[row, token] & 0xFFFFFFFF:08x} ({len(wrong)} differ)"
            )
        assert replace(a, logits=b.logits) == b, f"SPEQ_SEED={SEED}: step {number}"


def check(session: Session, prompt: list[int], settings: Settings, **options: object) -> list[Step]:
    """Decode on the session's board and with the golden model and compare."""
    options = {"max_tokens": TOKENS, "settings": settings} | options
    got = list(session.generate(prompt, **options))
    assert_same_steps(got, list(session.golden(prompt, **options)))
    return got


def check_end(
    session: Session, prompt: list[int], settings: Settings, **options: object
) -> tuple[list[Step], NonFiniteError | None]:
    """As `check`, but decoding may end with a `NonFiniteError`: both with the same one."""
    options = {"max_tokens": TOKENS, "settings": settings} | options
    made: list[tuple[list[Step], NonFiniteError | None]] = []
    for decode in (session.generate, session.golden):
        steps, error = [], None
        try:
            for step in decode(prompt, **options):
                steps.append(step)
        except NonFiniteError as caught:
            error = caught
        made.append((steps, error))
    (got, error), (expected, golden) = made
    assert_same_steps(got, expected)
    assert str(error) == str(golden), f"SPEQ_SEED={SEED}"
    return got, error
