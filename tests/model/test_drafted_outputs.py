# SPDX-License-Identifier: Apache-2.0
"""Draft passes of a part of the vocabulary."""

from __future__ import annotations

import os
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from speq.model.arith import draft_gemm
from speq.model.checkpoint import linear_names
from speq.model.emulation import prefill
from speq.model.number_format import FormatConfig
from speq.model.speculation import Sampling, Settings, Statistics, argmax, generate
from speq.model.transformer import KVCache, forward, prepare_draft_linears
from tests.model.drafted import drafted_model, pass_costs, randomly_scaled
from tests.model.small_models import random_tokens
from tests.model.test_speculation import check_lossless

SEED = int(os.environ.get("SPEQ_SEED", "0"))
DRAFTED_OUTPUTS = 50  # of 64


@pytest.fixture(scope="module", params=["llama", "gemma3"])
def subject(request) -> SimpleNamespace:
    """A model, its encoding, prompts; as `check_lossless` takes it."""
    print(f"SPEQ_SEED={SEED}")
    model = drafted_model(request.param, SEED)
    config = FormatConfig(group=32)
    encoded = randomly_scaled(
        model, np.random.default_rng(SEED), config, drafted_outputs=DRAFTED_OUTPUTS
    )
    prompts = [random_tokens(model.config, 1 + 9 * i, SEED + i) for i in range(2)]
    layers = prepare_draft_linears(encoded)
    return SimpleNamespace(model=model, encoded=encoded, layers=layers, prompts=prompts, plain={})


def plain_quantize(x: torch.Tensor, block: int) -> torch.Tensor:
    """Activations float64 [T, K] in 8-bit block floating point, without any trick."""
    parts = []
    for part in x.split(block, dim=1):
        peak = part.abs().amax(dim=1, keepdim=True).clamp(min=2.0**-14)
        step = torch.exp2(torch.floor(torch.log2(peak)) - 6)
        parts.append((part / step).round().clamp(-127, 127) * step)
    return torch.cat(parts, dim=1)


def test_draft_pass_is_one_in_plain_arithmetic(subject):
    """Against a pass that quantises activations in float64."""

    def linear(name: str, x: torch.Tensor) -> torch.Tensor:
        tensor = subject.encoded[name]
        y = plain_quantize(x.double(), tensor.config.group) @ tensor.draft().double().T
        missing = tensor.shape[0] - y.shape[1]
        return torch.nn.functional.pad(y, (0, missing), value=-torch.inf).float()

    tokens = random_tokens(subject.model.config, 9, SEED)
    cache, captured = KVCache(subject.model.config, 9), {}
    ours = forward(subject.model, tokens, cache, draft=subject.layers, capture=captured.__setitem__)
    expected = prefill(subject.model, tokens, linear)[0]
    difference = (ours - expected)[:, :DRAFTED_OUTPUTS].abs()
    print(f"differences: median {difference.median():.1e}, largest {difference.max():.1e}")
    # A difference of float32 rounding may move an activation by one of its 8-bit steps.
    assert difference[0].max() < 1e-4 and difference.max() < 0.5
    assert ours.shape == (9, 64)
    assert (ours[:, DRAFTED_OUTPUTS:] == -torch.inf).all() and torch.isfinite(
        ours[:, :DRAFTED_OUTPUTS]
    ).all()
    head = subject.layers["head"]
    products = draft_gemm(head.quantize(captured["head"]), subject.encoded["head"])
    assert torch.equal(ours[:, :DRAFTED_OUTPUTS], products)
    assert captured.keys() == set(linear_names(subject.model.config))
    # It is a draft of the model, and another one than the model.
    exact = forward(subject.model, tokens, KVCache(subject.model.config, 9))
    error = (ours - exact)[:, :DRAFTED_OUTPUTS].abs()
    assert error.amax(dim=1).mean() > 5 * difference.amax(dim=1).mean()
    assert error.mean() < exact.std()


@pytest.mark.parametrize(
    "settings",
    [
        Settings(rows=6, draft_length=4),
        Settings(rows=6, draft_length=3, threshold=0.2, choices=2),
    ],
    ids=str,
)
def test_greedy_decoding_loses_no_bit(subject, settings):
    statistics = Statistics()
    for step in check_lossless(subject, settings):
        statistics.add(step)
    assert 0.1 < statistics.match_rate < 1
    tokens = [t for expected, _ in subject.plain.values() for t in expected]
    print(f"{sum(t >= DRAFTED_OUTPUTS for t in tokens)} of {len(tokens)} tokens cannot be drafted")


def test_a_draft_of_two_tokens_loses_no_bit(subject):
    """Fewer tokens can be drafted than choices are wanted: the others are -inf."""
    head = randomly_scaled(subject.model, np.random.default_rng(SEED), drafted_outputs=2)["head"]
    layers = subject.layers | prepare_draft_linears({"head": head})
    narrow = SimpleNamespace(**{**vars(subject), "layers": layers})
    steps = check_lossless(narrow, Settings(rows=5, draft_length=1, choices=4))
    assert all(step.drafted <= 1 for step in steps)


def test_sampled_text_may_use_tokens_that_are_not_drafted(subject):
    """With a draft of 16 tokens most of the text is the target's own, from its whole range."""
    head = randomly_scaled(subject.model, np.random.default_rng(SEED), drafted_outputs=16)["head"]
    layers = subject.layers | prepare_draft_linears({"head": head})

    steps = list(
        generate(
            subject.model,
            subject.prompts[1],
            layers,
            max_tokens=36,
            settings=Settings(rows=4, draft_length=2, choices=3),
            sampling=Sampling(1.2),
            generator=torch.Generator().manual_seed(SEED),
        )
    )
    for step in steps:
        # What came from the draft is a token that it has.
        count = step.accepted + step.alternate_hit
        assert all(token < 16 for token in step.tokens[:count])
    tokens = [token for step in steps for token in step.tokens]
    assert len(tokens) == 36
    assert max(tokens) >= 16 and min(tokens) < 16
    assert any(step.accepted for step in steps)


def test_draft_cost_counts_the_drafted_tiles(subject):
    """The head's 50 of 64 outputs are 4 of 4 tiles; 32 of them are 2."""
    cost, verify_cost = pass_costs(subject.encoded)
    fewer = randomly_scaled(
        subject.model, np.random.default_rng(SEED), FormatConfig(32), drafted_outputs=32
    )
    saved = 2 * 16 * (8 * 2 + 1)  # bytes of two tiles with K = 32: 8 words and a group byte
    plain = sum(2 * t.shape[0] * t.shape[1] for t in fewer.values())
    assert pass_costs(fewer)[0] == pytest.approx(cost - saved / plain)
    assert pass_costs(fewer)[1] == verify_cost


def test_not_drafted_outputs_are_never_chosen(subject):
    cache = KVCache(subject.model.config, 20)
    forward(subject.model, subject.prompts[1], cache)
    layers = subject.layers
    logits = forward(subject.model, [63], cache, draft=layers)[0]
    assert argmax(logits) < DRAFTED_OUTPUTS
