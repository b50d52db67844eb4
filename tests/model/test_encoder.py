# SPDX-License-Identifier: Apache-2.0
"""The optimiser's parts against brute force and by hand, and all of it on a small model."""

from __future__ import annotations

import itertools
import os
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from speq.model.checkpoint import Model, linear_names
from speq.model.emulation import (
    Chains,
    decode,
    draft_chains,
    draft_linear,
    float_weights,
    reranked_linear,
)
from speq.model.encoder import (
    HEAD_PARTS,
    RERANKED,
    Calibration,
    Candidates,
    OptimisedEncoding,
    calibrate,
    encode_fitted,
    expected_chains,
    find_candidates,
    fit_scales,
    optimise,
    unit_levels,
)
from speq.model.encoding import encode_linears
from speq.model.evaluation import Sample, encoded_costs, speedup
from speq.model.format import EncodedTensor, encode
from speq.model.loaders import load_model
from speq.model.number_format import SCALE_NUMERATORS, UNIT_SCALE_CODE, FormatConfig
from speq.model.policy_fit import best_policy
from speq.model.prompts import shipped_prompts
from speq.model.transformer import KVCache, forward
from tests.model.drafted import drafted_model
from tests.model.small_models import random_tokens

SEED = int(os.environ.get("SPEQ_SEED", "0"))
SCALES = torch.tensor(SCALE_NUMERATORS) / 16


@pytest.fixture
def generator() -> torch.Generator:
    print(f"SPEQ_SEED={SEED}")
    return torch.Generator().manual_seed(SEED)


def random_moment(k: int, generator: torch.Generator) -> torch.Tensor:
    """Second moment [K, K] of strongly correlated inputs of different sizes."""
    x = torch.randn(3 * k, k, generator=generator) + 2 * torch.randn(3 * k, 1, generator=generator)
    x = x * torch.exp2(torch.randint(-3, 4, (k,), generator=generator))
    return x.T @ x / len(x)


def row_errors(
    weights: torch.Tensor,
    levels: torch.Tensor,
    codes: torch.Tensor,
    moment: torch.Tensor,
    group: int,
) -> torch.Tensor:
    """Each row's e M e^T in float64."""
    scales = SCALES[codes].repeat_interleave(group, dim=1)[:, : weights.shape[1]]
    error = (weights - scales * levels).double()
    return ((error @ moment.double()) * error).sum(dim=1)


# Scale codes.


@pytest.mark.parametrize("k", [6, 5])
def test_scales_are_the_best_of_all_for_uncorrelated_inputs(generator, k):
    o, group, groups = 40, 2, 3
    levels = torch.randn(o, k, generator=generator)
    weights = levels * (0.5 + torch.rand(o, k, generator=generator))
    moment = torch.diag(torch.rand(k, generator=generator) + 0.1)
    codes = fit_scales(weights, levels, moment, group, sweeps=0)
    every = torch.tensor(list(itertools.product(range(8), repeat=groups)))
    errors = torch.stack(
        [row_errors(weights, levels, c.expand(o, -1), moment, group) for c in every]
    )
    found = row_errors(weights, levels, codes, moment, group)
    assert (found <= errors.amin(dim=0) * (1 + 1e-5)).all()
    assert len(codes.unique()) == 8


def test_scales_of_groups_that_do_not_interact_are_never_worse_than_one(generator):
    k, group = 96, 32
    weights = torch.randn(50, k, generator=generator).half()
    moment = torch.block_diag(*(random_moment(group, generator) for _ in range(3)))
    levels = unit_levels(weights, FormatConfig(group))
    unit = torch.full((50, 3), UNIT_SCALE_CODE)
    plain = row_errors(weights.float(), levels, unit, moment, group)
    for sweeps in (0, 2):
        codes = fit_scales(weights.float(), levels, moment, group, sweeps)
        fitted = row_errors(weights.float(), levels, codes, moment, group)
        assert (fitted <= plain * (1 + 1e-4)).all()
    assert fitted.sum() < 0.99 * plain.sum()


def test_sweeps_only_improve_and_end_where_no_code_helps(generator):
    o, k, group = 40, 150, 32
    weights = torch.randn(o, k, generator=generator).half()
    moment = random_moment(k, generator)
    levels, weights = unit_levels(weights, FormatConfig(group)), weights.float()
    errors = []
    for sweeps in (0, 1, 2, 4, 30):
        codes = fit_scales(weights, levels, moment, group, sweeps)
        errors.append(row_errors(weights, levels, codes, moment, group))
    for before, after in itertools.pairwise(errors):
        assert (after <= before * (1 + 1e-4)).all()
    assert errors[2].sum() < 0.9 * errors[0].sum()
    for g, code in itertools.product(range(5), range(8)):
        other = codes.clone()
        other[:, g] = code
        assert (row_errors(weights, levels, other, moment, group) >= errors[-1] * (1 - 1e-4)).all()


def test_groups_without_information_keep_scale_one(generator):
    weights = torch.randn(3, 64, generator=generator).half()
    weights[1, 40] = torch.inf
    with pytest.warns(RuntimeWarning, match="infinities"):
        levels = unit_levels(weights, FormatConfig(32))
    assert not levels[1, 32:].any() and levels[1, :32].all()
    moment = torch.eye(64)
    moment[:32] = 0
    codes = fit_scales(weights.float().nan_to_num(posinf=0.0), levels, moment, 32, sweeps=2)
    assert (codes[:, 0] == UNIT_SCALE_CODE).all() and codes[1, 1] == UNIT_SCALE_CODE


@pytest.mark.parametrize(("o", "k", "group", "columns"), [(24, 80, 32, 16), (33, 64, 64, 8)])
def test_fitted_encoding_keeps_all_bits_and_errs_less(generator, o, k, group, columns):
    weights = torch.randn(o, k, generator=generator).half()
    weights = weights * torch.exp2(torch.randint(-2, 3, (k,), generator=generator)).half()
    weights[3, 5] = -torch.inf
    moment = random_moment(k, generator)
    config = FormatConfig(group, 1)
    with pytest.warns(RuntimeWarning, match="holds infinities"):
        tensor = encode_fitted(weights, moment, config, "q", columns)
        plain = encode(weights, config).draft()
    assert torch.equal(tensor.decode().view(torch.int16), weights.view(torch.int16))
    assert (tensor.config, tensor.columns, tensor.name) == (config, columns, "q")

    def error(draft: torch.Tensor) -> torch.Tensor:
        difference = (weights.float() - draft)[torch.arange(o) != 3].double()
        return ((difference @ moment.double()) * difference).sum()

    assert error(tensor.draft()) < 0.95 * error(plain)


# Part of the vocabulary, and exact logits.


def test_expected_chains_by_hand():
    """Three passes, five candidates; ids from 10 on may be dropped."""
    found = Candidates(
        torch.tensor([[1, 12, 3, 4, 5], [15, 2, 3, 4, 5], [11, 12, 13, 14, 15]]),
        torch.tensor([[9.0, 8, 7, 6, 5]]).expand(3, 5),
        torch.tensor([[1.0, 2, 5, 3, 9], [5, 1, 2, 3, 4], [1, 2, 3, 4, 5]]),
    )

    def steps(drafted: int, reranked: int, choices: int) -> tuple[list, list]:
        chains = expected_chains(found, drafted, reranked, 1, choices)
        return chains.choices[:, 0].tolist(), chains.scores[:, 0].tolist()

    no, low = -1, -torch.inf
    least = torch.finfo().min
    assert steps(20, 0, 2) == ([[1, 12], [15, 2], [11, 12]], [[9, 8]] * 3)
    assert steps(20, 3, 3) == (
        [[3, 12, 1], [15, 3, 2], [13, 12, 11]],
        [[5, 2, 1]] * 2 + [[3, 2, 1]],
    )
    tokens, scores = steps(10, 0, 5)
    assert tokens == [[1, 3, 4, 5, no], [2, 3, 4, 5, no], [no] * 5]
    assert scores == [[9, 7, 6, 5, low], [8, 7, 6, 5, low], [least, low, low, low, low]]
    tokens, scores = steps(10, 2, 3)
    assert tokens == [[3, 1, no], [3, 2, no], [no] * 3]
    assert scores == [[5, 1, low], [2, 1, low], [least, low, low]]
    # Pass j of the chain behind token p is that behind token p + j, as long as there are any.
    chains = expected_chains(found, 20, 0, 4, 2)
    first = [[1, 12], [15, 2], [11, 12]]
    assert chains.choices.tolist() == [[first[min(p + j, 2)] for j in range(4)] for p in range(3)]


# Calibration.


def random_prompts(model: Model, count: int = 3) -> list[list[int]]:
    return [random_tokens(model.config, 4 + i, SEED + i) for i in range(count)]


@pytest.fixture(scope="module")
def model() -> Model:
    print(f"SPEQ_SEED={SEED}")
    stops = SimpleNamespace(stop_ids=frozenset())
    return replace(drafted_model("llama", SEED, blocks=1), tokenizer=stops)


@pytest.fixture(scope="module")
def calibration(model) -> Calibration:
    return calibrate(model, random_prompts(model), 16)


def test_calibration_collects_the_inputs_of_the_texts(model, calibration):
    expected = decode(model, random_prompts(model), 16)
    assert [t.tokens for t in calibration.texts] == [t.tokens for t in expected]
    captured: dict[str, list[torch.Tensor]] = {}
    for text in calibration.texts:
        tokens = [*text.prompt, *text.tokens[:-1]]
        inputs: dict[str, torch.Tensor] = {}
        cache = KVCache(model.config, len(tokens))
        forward(model, tokens, cache, capture=inputs.__setitem__)
        for name, x in inputs.items():
            # Where continuation tokens are predicted: that is where drafts are made.
            captured.setdefault(name, []).append(x[len(text.prompt) - 1 :])
    for name in linear_names(model.config):
        x = torch.cat(captured[name]).float()
        x = x * (x.shape[1] ** 0.5 / x.norm(dim=1, keepdim=True))  # every input counts alike
        moment = x.T @ x / len(x)
        ours = calibration.moment(name)
        scale = moment.abs().max()
        assert (torch.diagonal(ours) - torch.diagonal(moment)).abs().max() < 0.01 * scale
        rest = ~torch.eye(len(moment), dtype=torch.bool)
        assert (ours[rest] - 0.9 * moment[rest]).abs().max() < 0.01 * scale
    with pytest.raises(ValueError, match="at least one prompt"):
        calibrate(model, [], 16)
    with pytest.raises(ValueError, match="a prompt has 0 tokens"):
        calibrate(model, [[]], 16)


@pytest.fixture(scope="module")
def fitted(model, calibration) -> dict[str, EncodedTensor]:
    config = FormatConfig(32)
    return {
        name: encode_fitted(
            model.linear_weight(name), calibration.moment(name), config, name, columns=8
        )
        for name in linear_names(model.config)
    }


@pytest.mark.parametrize(("drafted", "reranked"), [(64, 0), (64, 5), (40, 0), (25, 3)])
def test_candidates_are_what_such_drafts_propose(model, calibration, fitted, drafted, reranked):
    """First passes of chains that such a head drafts, from candidates of the whole one."""
    count = []
    found = find_candidates(model, calibration.texts, fitted, 64, progress=count.append)
    assert sum(count) == sum(len(text.tokens) for text in calibration.texts)
    head = replace(fitted["head"], drafted_outputs=drafted)
    linear = draft_linear({**fitted, "head": head})
    if reranked:
        linear = reranked_linear(linear, float_weights(model)["head"], reranked)
    expected = draft_chains(model, calibration.texts, linear, 1, 4)
    for candidates, chains in zip(found, expected, strict=True):
        ours: Chains = expected_chains(candidates, drafted, reranked, 1, 4)
        known = ours.scores > -torch.inf
        assert torch.equal(ours.choices[known], chains.choices[known])
        assert torch.allclose(ours.scores, chains.scores, rtol=1e-5, atol=1e-5)
        assert (known.sum(dim=2) == min(4, reranked or 4)).all()


# All of it.

ARGUMENTS = {
    "config": FormatConfig(32), "columns": 8, "rows": 6, "choices": 3, "max_tokens": 16
}  # fmt: skip


@pytest.fixture(scope="module")
def optimised(model) -> OptimisedEncoding:
    return optimise(model, random_prompts(model), **ARGUMENTS)


def test_optimised_model_decodes_to_its_bits(model, optimised):
    assert list(optimised.tensors) == linear_names(model.config)
    for name, tensor in optimised.tensors.items():
        weights = model.linear_weight(name)
        assert torch.equal(tensor.decode().view(torch.int16), weights.view(torch.int16))
        assert tensor.columns == 8 and tensor.config == FormatConfig(32) and tensor.name == name
    assert optimised.chain.choices == 1 and optimised.alternates.choices == 3
    assert optimised.chain.rows == optimised.alternates.rows == 6


def test_every_head_is_tried_and_the_best_taken(model, optimised):
    head, tried = optimised.tensors["head"], optimised.tried
    sizes = {trial.drafted_outputs for trial in tried}
    assert max(sizes) == 64 and all(size % 8 == 0 for size in sizes) and len(sizes) > 3
    pairs = {(trial.drafted_outputs, trial.reranked) for trial in tried}
    assert pairs == set(itertools.product(sizes, RERANKED)) and len(pairs) == len(tried)
    assert tried[0].speedup == max(trial.speedup for trial in tried)
    assert (head.drafted_outputs or 64) == tried[0].drafted_outputs
    assert optimised.chain.reranked == optimised.alternates.reranked == tried[0].reranked
    for trial in tried:
        some = replace(head, drafted_outputs=trial.drafted_outputs)
        tensors = {**optimised.tensors, "head": some}
        assert trial.cost == encoded_costs(model.config, tensors, trial.reranked).relative[0]


def test_reported_speedups_are_those_of_the_outcome(model, optimised, calibration):
    reranked = optimised.chain.reranked
    linear = draft_linear(optimised.tensors)
    if reranked:
        linear = reranked_linear(linear, float_weights(model)["head"], reranked)
    chains = draft_chains(model, calibration.texts, linear, 5, 3)
    costs = encoded_costs(model.config, optimised.tensors, reranked)
    samples = [Sample("", *pair) for pair in zip(calibration.texts, chains, strict=True)]
    found = zip((optimised.chain, optimised.alternates), optimised.speedups, strict=True)
    for settings, value in found:
        assert speedup(samples, settings, costs) == value
        assert settings == best_policy(samples, costs, 6, settings.choices, reranked)


@pytest.mark.slow
def test_optimised_drafts_of_tiny_are_better_than_the_fixed_formats():
    """On texts that the optimiser has not seen, each with its best settings on those it has."""
    model = load_model("tiny")
    calibration, unseen = (
        [
            model.tokenizer.encode(text)
            for some in shipped_prompts(purpose, raw=True).values()
            for text in some
        ]
        for purpose in ("calibration", "evaluation")
    )
    seen = calibrate(model, calibration, 64).texts
    texts = decode(model, unseen, 64, stop_ids=model.tokenizer.stop_ids)
    optimised, fixed = optimise(model, calibration), encode_linears(model)
    assert optimised.alternates.reranked == 0  # exact logits of so few outputs do not pay
    draft, costs = draft_linear(fixed), encoded_costs(model.config, fixed)
    chains = draft_chains(model, seen, draft, 7, 4)
    known = [Sample("", *pair) for pair in zip(seen, chains, strict=True)]
    results = []
    for tensors, settings in (
        (fixed, best_policy(known, costs, 8, 4)),
        (optimised.tensors, optimised.alternates),
    ):
        chains = draft_chains(model, texts, draft_linear(tensors), 7, 4)
        samples = [Sample("", *pair) for pair in zip(texts, chains, strict=True)]
        results.append(speedup(samples, settings, encoded_costs(model.config, tensors)))
    print(f"fixed {results[0]:.3f}, optimised {results[1]:.3f}")
    assert results[1] > results[0]


def test_optimising_again_gives_the_same_and_says_how_far_it_is(model, optimised):
    seen: list[tuple[str, int, int]] = []
    again = optimise(
        model, random_prompts(model), **ARGUMENTS, progress=lambda *event: seen.append(event)
    )
    for name in ("chain", "alternates", "speedups", "tried"):
        assert getattr(again, name) == getattr(optimised, name)
    for name, tensor in again.tensors.items():
        other = optimised.tensors[name]
        assert tensor.drafted_outputs == other.drafted_outputs
        for array in ("draft_plane", "residual_plane", "group_bytes"):
            assert np.array_equal(getattr(tensor, array), getattr(other, array)), (name, array)
    assert all(0 <= done <= total for _, done, total in seen)
    stages = list(dict.fromkeys(what for what, *_ in seen))
    expected = ["decoding calibration texts", "fitting scales", "trying heads", "drafting"]
    assert stages == expected and seen[-1][1] == seen[-1][2]


def test_impossible_settings_are_refused(model):
    with pytest.raises(ValueError, match="at least one prompt"):
        optimise(model, [])
    with pytest.raises(ValueError, match="a prompt has 48 tokens"):
        optimise(model, [[1] * 48])


def test_parts_of_the_vocabulary_that_are_tried():
    assert HEAD_PARTS[0] == 1.0 and all(0 < part <= 1 for part in HEAD_PARTS)
