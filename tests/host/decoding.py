# SPDX-License-Identifier: Apache-2.0
"""Decoding with the driver compared with the golden model, for tests on any board."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import fields

import torch

from speq.host.passes import Pass
from speq.host.session import Session
from speq.hw.accelerator_config import AcceleratorConfig
from speq.hw.control.register_map import STATES
from speq.hw.engine_config import EngineConfig
from speq.hw.memory.axi import AxiConfig
from speq.model.settings import Policy
from speq.model.speculation import Settings, Step
from speq.model.transformer import NonFiniteError
from speq.sim.runner import seed
from tests.model.small_models import BEHIND_PREFILL, random_tokens

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
    "guesses": "GUESSES",
    "guess_hits": "GUESS_HITS",
    "free_steps": "FREE_STEPS",
}
SMALL = EngineConfig(rows=4, cols=8, max_k=256, max_o=1024)
#: Costs with which steps have rows of all kinds, or no draft pass.
GUESSING = Policy(
    chain_costs=tuple(range(64, 0, -4)),
    alternate_costs=tuple(range(16, 80, 4)),
    guess_costs=(48, 24, 12, 6),
    limit=150,
    guess_limit=20,
)
#: Behind this `tiny` takes all of them, within 24 tokens on 8 rows.
REPETITIVE = "Once upon a time, there was a little girl named Lily. Once upon a time, there was"


def system(
    engine: EngineConfig = SMALL,
    weights: int | None = None,
    data: int | None = None,
    lanes: int | None = None,
) -> AcceleratorConfig:
    """A configuration with ports of so many bits, by default as wide as they can be, and so many
    lanes, by default as usual."""
    ports = {
        name: bits and AxiConfig(data_bits=bits)
        for name, bits in (("weights", weights), ("data", data))
    }
    return AcceleratorConfig(engine, **ports, lanes=lanes)


def bits(x: torch.Tensor) -> torch.Tensor:
    """Bit patterns of float32 numbers."""
    return x.view(torch.int32)


def assert_same_steps(got: list[Step], expected: list[Step]) -> None:
    """Everything about the steps of two decoders is equal, logits of all rows bit for bit."""
    assert [step.tokens for step in got] == [step.tokens for step in expected], f"SPEQ_SEED={SEED}"
    for number, (a, b) in enumerate(zip(got, expected, strict=True)):
        pairs = {each.name: (getattr(a, each.name), getattr(b, each.name)) for each in fields(Step)}
        for name in ("verified", "logits"):
            mine, theirs = map(bits, pairs.pop(name))
            assert mine.shape == theirs.shape, f"SPEQ_SEED={SEED}: step {number}, {name}"
            wrong = (mine != theirs).nonzero().tolist()
            if wrong:
                row, token = wrong[0]
                raise AssertionError(
                    f"SPEQ_SEED={SEED}: step {number}, {name}, row {row}, logit {token}: expected "
                    f"{theirs[row, token] & 0xFFFFFFFF:08x}, got "
                    f"{mine[row, token] & 0xFFFFFFFF:08x} ({len(wrong)} differ)"
                )
        different = {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}
        assert not different, f"SPEQ_SEED={SEED}: step {number}: got and expected {different}"


def check(session: Session, prompt: list[int], settings: Settings, **options: object) -> list[Step]:
    """Decode on the session's board and with the golden model and compare."""
    options = {"max_tokens": TOKENS, "settings": settings} | options
    got = list(session.generate(prompt, **options))
    assert_same_steps(got, list(session.golden(prompt, **options)))
    return got


def check_resumed(
    session: Session, prompt: list[int], settings: Settings, known: int
) -> list[Step]:
    """Decode behind a prompt of which the KV caches hold `known` tokens, on the board and with the
    golden model; both give a fresh run's steps, and the board computes only the other tokens."""
    options = {"max_tokens": TOKENS // 2, "settings": settings}
    filled = []

    def note_entries(verified: Pass | None, prompt: int) -> None:
        if verified is not None:
            filled.extend(range(verified.start - prompt, verified.start))

    assert session.known(prompt) == known
    session.driver.observer = note_entries
    got = list(session.generate(prompt, **options, resume=True))
    session.driver.observer = None
    assert filled == list(range(known, len(prompt) - 1))
    expected = list(session.golden(prompt, **options))
    assert_same_steps(got, expected)
    assert_same_steps(list(session.golden(prompt, **options, resume=True)), expected)
    return got


def check_conversation(session: Session, settings: Settings) -> None:
    """Prompts that continue one another, that differ in the middle, and behind a run that was left:
    every run gives a fresh one's steps."""
    config = session.model.config

    def text(steps: list[Step]) -> list[int]:
        return [token for step in steps for token in step.tokens]

    prompt = random_tokens(config, 5, SEED)
    reply = text(check_resumed(session, prompt, settings, known=0))
    # All but the last token, of which there is no entry yet.
    whole = [*prompt, *reply]
    prompt = [*whole, *random_tokens(config, 3, SEED + 1)]
    reply = text(check_resumed(session, prompt, settings, known=len(whole) - 1))
    # The same once more.
    assert text(check_resumed(session, prompt, settings, known=len(prompt) - 1)) == reply
    # Another history.
    prompt[7] = (prompt[7] + 1) % config.vocab_size
    check_resumed(session, prompt, settings, known=7)
    # A run that is left after its first step, and then goes on.
    for decode in (session.generate, session.golden):
        run = decode(prompt[:9], max_tokens=TOKENS // 2, settings=settings, resume=True)
        step = next(run)
        run.close()
    prompt = [*prompt[:9], *step.tokens, *random_tokens(config, 2, SEED + 2)]
    check_resumed(session, prompt, settings, known=8 + len(step.tokens))


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


def check_where_it_ends(
    session: Session, layer: str, texts: Iterable[tuple[list[int], str, int]]
) -> None:
    """Behind each text, with the kind of the pass and the position in which results of a layer (a
    name of `overflowing`) are not finite: the golden model's error, and an idle accelerator."""
    for text, kind, position in texts:
        steps, error = check_end(session, text, Settings(4, threshold=0.5), max_tokens=2)
        if layer in BEHIND_PREFILL and kind == "prompt":
            assert error is None or error.kind == "verify"
            continue
        assert steps == [] and error is not None
        assert (error.kind, error.layer, error.position) == (kind, layer.split(" ")[0], position)
        assert session.driver.registers["STATUS"] == STATES["IDLE"][0]


def check_lowest_positions(session: Session, texts: Iterable[tuple[list[int], int]]) -> None:
    """Each text's error names this position."""
    for text, position in texts:
        _, error = check_end(session, text, Settings(4))
        assert error is not None and error.position == position
