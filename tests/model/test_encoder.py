# SPDX-License-Identifier: Apache-2.0
"""The optimiser's parts against brute force and by hand, and all of it on a small model."""

from __future__ import annotations

import itertools
import json
import os
from dataclasses import asdict, replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from speq.model import encoder
from speq.model.checkpoint import Model, linear_names
from speq.model.emulation import Chains, decode, draft_chains, draft_linear
from speq.model.encoder import (
    BUDGETS,
    HEAD_PARTS,
    Calibration,
    OptimisedEncoding,
    Option,
    allocate,
    arranged_moment,
    best_speedup,
    calibrate,
    channel_order,
    channel_shift,
    channels,
    encode_option,
    fit_scales,
    optimise,
    options,
    relative_error,
    restrict_vocabulary,
    segments,
    sensitivities,
    unit_levels,
)
from speq.model.evaluation import Sample, encoded_costs, speedup
from speq.model.format import arranged, encode
from speq.model.number_format import MAX_SHIFT, SCALE_NUMERATORS, UNIT_SCALE_CODE, FormatConfig
from speq.model.transformer import KVCache, forward, prepare_draft_linears
from tests.model.drafted import drafted_model, pass_costs
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


# Channels.


def test_outputs_energy_does_not_depend_on_the_arrangement(generator):
    """Weights and second moment are permuted and scaled so that products stay the same."""
    weights = torch.randn(7, 90, generator=generator).half()
    moment = random_moment(90, generator)
    power = torch.diagonal(moment)
    for scaling, permute in itertools.product((0.0, 0.25, 0.5, 1.0), (False, True)):
        order, shift = channels(weights, power, scaling, permute)
        assert (order is None) == (not permute)
        assert (shift is None) == (scaling == 0)
        stored = arranged(weights, order, shift).double()
        inner = arranged_moment(moment, order, shift).double()
        before = ((weights.double() @ moment.double()) * weights.double()).sum(dim=1)
        assert torch.allclose(((stored @ inner) * stored).sum(dim=1), before, rtol=1e-5)


def test_shift_follows_the_inputs_and_stays_in_range(generator):
    weights = torch.randn(20, 64, generator=generator).half() / 8
    power = torch.exp2(torch.randint(-30, 30, (64,), generator=generator).float())
    previous = 0
    for strength in (0.1, 0.25, 0.5, 1.0):
        shift = channel_shift(weights, power, strength)
        assert shift.dtype == np.uint8 and shift.shape == (64,)
        assert shift.min() == 0 and previous <= shift.max() <= MAX_SHIFT
        by_power = torch.from_numpy(shift.astype(int))[power.argsort(stable=True)]
        assert (by_power.diff() >= 0).all()
        previous = shift.max()
    assert previous == MAX_SHIFT
    assert not channel_shift(weights, torch.ones(64), 1.0).any()
    # A factor of 2^6 of the inputs' mean square is 2^3 of their size, half of it 2^1.5.
    two = torch.tensor([1.0, 1.0, 64.0])
    assert channel_shift(weights[:, :3], two, 1.0).tolist() == [0, 0, 3]
    assert channel_shift(weights[:, :3], two, 0.5).tolist() in ([0, 0, 2], [0, 0, 1])
    assert channels(weights[:, :3], torch.ones(3), 0.5, permute=False) == (None, None)
    # Dead inputs are no reason to shift all others to the limit.
    assert torch.from_numpy(channel_shift(weights, torch.zeros(64), 0.5)).sum() == 0


def test_shift_leaves_room_for_the_largest_weight(generator):
    weights = torch.randn(20, 64, generator=generator).half()
    weights[3, :8] = 65504.0
    weights[4, 8:16] = 20000.0  # one more bit of room
    weights[5, 16:24] = torch.inf
    weights[6, 24:32] = torch.nan
    power = torch.ones(64)
    power[:32] = 2.0**20
    shift = channel_shift(weights, power, 0.5)
    assert not shift[:8].any() and (shift[8:16] == 1).all() and (shift[16:32] >= 3).all()
    finite = torch.isfinite(weights)
    stored = arranged(weights, shift=shift)
    assert torch.equal(torch.isfinite(stored), finite)
    for order, some in (channels(weights, power, 0.5, True), (None, shift)):
        with pytest.warns(RuntimeWarning, match="infinities"):
            tensor = encode(weights, FormatConfig(), order=order, shift=some)
        assert torch.equal(tensor.decode().view(torch.int16), weights.view(torch.int16))


def test_order_is_by_energy():
    weights = torch.tensor([[3.0, 0.0, -1.0, 1.0], [0.0, 0.5, 1.0, -1.0]]).half()
    assert channel_order(weights).tolist() == [1, 2, 3, 0]
    weights[0, 1] = torch.inf  # its group is lost in any case
    assert channel_order(weights).tolist() == [1, 2, 3, 0]
    # Ordered as they are scaled: 2^shift times as large.
    power = torch.tensor([1.0, 1.0, 1.0, 2.0**14])
    order, shift = channels(weights[:, :].nan_to_num(posinf=0.0), power, 1.0, permute=True)
    assert order.tolist() == [1, 2, 0, 3] and shift.tolist() == [0, 0, 0, 4]


# Options.


@pytest.mark.parametrize(("o", "k", "group", "columns"), [(24, 80, 32, 16), (33, 64, 64, 8)])
def test_options_say_what_encoding_gives(generator, o, k, group, columns):
    weights = torch.randn(o, k, generator=generator).half()
    weights = weights * torch.exp2(torch.randint(-2, 3, (k,), generator=generator)).half()
    moment = random_moment(k, generator)
    found = options(weights, moment, group, columns)
    bits, errors = [option.bits for option in found], [option.error for option in found]
    assert bits == sorted(set(bits)) and errors == sorted(set(errors), reverse=True)
    assert {option.config.width for option in found} == {4, 5, 6}
    for option in found:
        tensor = encode_option(weights, moment, option, "q", columns)
        assert tensor.draft_bits() == option.bits
        assert (tensor.order is not None) == option.permute
        assert tensor.config == option.config and tensor.config.group == group
        assert torch.equal(tensor.decode().view(torch.int16), weights.view(torch.int16))
        order, shift = tensor.order, tensor.shift
        stored = arranged(weights, order, shift).float()
        inner = arranged_moment(moment, order, shift)
        error = relative_error(stored, tensor.draft(), inner)
        assert 0 < error <= option.error * (1 + 1e-4)  # swept scales are better yet
        plain = encode(weights, option.config).draft()
        assert error < relative_error(weights.float(), plain, moment)
    # Nothing simpler that takes as few bits has a smaller error.
    for width, split in itertools.product((4, 5, 6), (1, 2, 3)):
        config = FormatConfig(group, split, width)
        levels = unit_levels(weights, config)
        codes = fit_scales(weights.float(), levels, moment, group, sweeps=0)
        tensor = encode(weights, config, codes.numpy(), columns=columns)
        error = relative_error(weights.float(), tensor.draft(), moment)
        allowed = [option for option in found if option.bits <= tensor.draft_bits()]
        assert min(option.error for option in allowed) <= error * (1 + 1e-5)


def test_relative_error_by_hand():
    weights, drafted = torch.tensor([[1.0, 2.0]]), torch.tensor([[1.5, 1.0]])
    moment = torch.tensor([[4.0, 1.0], [1.0, 1.0]])
    # e = (-0.5, 1): 4/4 - 2 * 0.5 + 1; w: 4 + 2 * 2 + 4
    assert relative_error(weights, drafted, moment) == pytest.approx(1.0 / 12)
    assert relative_error(weights, weights, moment) == 0
    assert relative_error(torch.zeros(1, 2), torch.zeros(1, 2), moment) == 0


# Allocation of bits.


def random_options(generator: torch.Generator, tensors: int) -> dict[str, list[Option]]:
    choices = {}
    for i in range(tensors):
        count = int(torch.randint(1, 5, (1,), generator=generator))
        bits = sorted(torch.randperm(900, generator=generator)[:count].add(100).tolist())
        errors = sorted(torch.rand(count, generator=generator).tolist(), reverse=True)
        choices[f"t{i}"] = [
            Option(FormatConfig(), 0.0, False, e, b) for e, b in zip(errors, bits, strict=True)
        ]
    return choices


def test_allocation_is_the_best_of_its_size(generator):
    """No other choice with as few bits has less divergence, and a larger one exceeds the budget."""
    for _ in range(12):
        choices = random_options(generator, 5)
        weight = {name: float(torch.rand(1, generator=generator)) * 10 for name in choices}
        every = [
            dict(zip(choices, some, strict=True)) for some in itertools.product(*choices.values())
        ]

        def bits(chosen: dict[str, Option]) -> int:
            return sum(option.bits for option in chosen.values())

        def loss(chosen: dict[str, Option], weight: dict[str, float] = weight) -> float:
            return sum(weight[name] * option.error for name, option in chosen.items())

        smallest, largest = min(map(bits, every)), max(map(bits, every))
        previous, chosen = None, {}
        for budget in (0, smallest, *range(smallest, largest, 300), largest, 10 * largest):
            chosen = allocate(choices, weight, budget)
            assert bits(chosen) <= max(budget, smallest)
            best = min(loss(c) for c in every if bits(c) <= bits(chosen))
            assert loss(chosen) <= best * (1 + 1e-9)
            assert previous is None or loss(chosen) <= previous
            previous = loss(chosen)
        assert loss(chosen) == min(map(loss, every))
        # On the lower hull of size and loss: of two neighbours the larger one is taken if it fits.
        hull = sorted({bits(allocate(choices, weight, b)) for b in range(smallest, largest + 1, 7)})
        for size in hull:
            assert bits(allocate(choices, weight, size)) == size


def test_tensors_without_effect_take_their_smallest_option(generator):
    choices = random_options(generator, 4)
    weight = {name: float(i > 1) for i, name in enumerate(choices)}
    chosen = allocate(choices, weight, 1e9)
    for i, (name, some) in enumerate(choices.items()):
        assert chosen[name] == some[-1 if i > 1 else 0]


# A part of the vocabulary.


def test_restricted_vocabulary_by_hand():
    """Ids from 10 on are dropped; a dropped first choice changes the rest of the chain."""
    choices = torch.tensor(
        [
            [[1, 12, 3, 4], [5, 6, 17, 8], [9, 2, 3, 4]],  # the chain stays
            [[1, 2, 3, 4], [15, 6, 7, 18], [9, 2, 3, 4]],  # known up to its second token
            [[11, 12, 3, 14], [5, 6, 7, 8], [9, 2, 3, 4]],  # only its first token, 3
            [[11, 12, 13, 14], [5, 6, 7, 8], [9, 2, 3, 4]],  # nothing
        ]
    )
    scores = torch.tensor([4.0, 3.0, 2.0, 1.0]).expand(4, 3, 4)
    made = restrict_vocabulary(Chains(choices, scores), 10, 3)
    no = -1
    assert made.choices.tolist() == [
        [[1, 3, 4], [5, 6, 8], [9, 2, 3]],
        [[1, 2, 3], [6, 7, no], [no, no, no]],
        [[3, no, no], [no, no, no], [no, no, no]],
        [[no, no, no], [no, no, no], [no, no, no]],
    ]
    assert made.scores[0].tolist() == [[4, 2, 1], [4, 3, 1], [4, 3, 2]]
    assert made.scores[1, 1].tolist() == [3, 2, -torch.inf]
    assert made.scores[2, 0].tolist() == [2, -torch.inf, -torch.inf]
    assert torch.isfinite(made.scores[..., 0]).all()
    whole = restrict_vocabulary(Chains(choices, scores), 20, 4)
    assert torch.equal(whole.choices, choices) and torch.equal(whole.scores, scores)


# Calibration and sensitivities.


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
    again = calibrate(model, random_prompts(model), 16, [t.tokens for t in calibration.texts])
    assert torch.equal(again.texts[1].keys, calibration.texts[1].keys)
    with pytest.raises(ValueError, match="at least one prompt"):
        calibrate(model, [], 16)
    with pytest.raises(ValueError, match="a prompt has 0 tokens"):
        calibrate(model, [[]], 16)


def test_segments_split_every_kind_by_depth():
    model = drafted_model("llama", SEED, blocks=6)
    parts = segments(model)
    assert sorted(itertools.chain(*parts.values())) == sorted(linear_names(model.config))
    assert len(parts) == 7 * 3 + 1
    assert parts["down_proj of part 2"] == ["block.2.down_proj", "block.3.down_proj"]
    assert parts["head"] == ["head"]


def test_sensitivity_is_divergence_per_error(model, calibration):
    """Doubling the errors halves it; known segments are left out; no error, no effect."""
    names = linear_names(model.config)
    encoded = {name: encode(model.linear_weight(name), FormatConfig(32)) for name in names}
    errors = {name: 0.5 for name in names} | {"block.0.q_proj": 0.0}
    known = {"head": 1.0}
    found = dict(sensitivities(model, calibration, encoded, errors, known))
    assert found.keys() == segments(model).keys() - {"head"}
    assert found["q_proj of part 1"] == 0.0
    half = dict(sensitivities(model, calibration, encoded, {n: 1.0 for n in names}, known))
    for segment, value in found.items():
        if segment != "q_proj of part 1":
            assert value > 0 and value == pytest.approx(2 * half[segment])
    (pair,) = sensitivities(model, calibration, encoded, errors, found)
    # By hand, for the head.
    total = count = 0
    for text in calibration.texts:
        tokens = [*text.prompt, *text.tokens]
        logits = []
        for layers in ({}, {"head": encoded["head"]}):
            rows = forward(
                model,
                tokens,
                KVCache(model.config, len(tokens)),
                draft=prepare_draft_linears(layers),
            )
            logits.append(rows.double().log_softmax(dim=1))
        total += float((logits[0].exp() * (logits[0] - logits[1])).sum())
        count += len(tokens)
    assert pair == ("head", pytest.approx(total / count / 0.5, rel=0.02))


# All of it.

ARGUMENTS = {"group": 32, "columns": 8, "rows": 6, "choices": 3, "max_tokens": 16}


@pytest.fixture(scope="module")
def optimised(model) -> SimpleNamespace:
    """An outcome and the journal after every step of the way, as JSON."""
    journals: list[str] = []
    outcome = optimise(
        model,
        random_prompts(model),
        **ARGUMENTS,
        save=lambda journal: journals.append(json.dumps(journal)),
    )
    return SimpleNamespace(outcome=outcome, journals=journals)


def check_same(outcome: OptimisedEncoding, expected: OptimisedEncoding) -> None:
    for name in ("chain", "alternates", "speedups", "tried"):
        assert getattr(outcome, name) == getattr(expected, name)
    assert outcome.tensors.keys() == expected.tensors.keys()
    for name, tensor in outcome.tensors.items():
        other = expected.tensors[name]
        assert (tensor.config, tensor.drafted_outputs) == (other.config, other.drafted_outputs)
        for array in ("draft_plane", "residual_plane", "group_bytes", "order", "shift"):
            ours, theirs = getattr(tensor, array), getattr(other, array)
            assert (ours is None) == (theirs is None)
            assert ours is None or np.array_equal(ours, theirs), (name, array)


def test_optimised_model_decodes_to_its_bits(model, optimised):
    tensors = optimised.outcome.tensors
    assert list(tensors) == linear_names(model.config)
    for name, tensor in tensors.items():
        weights = model.linear_weight(name)
        assert torch.equal(tensor.decode().view(torch.int16), weights.view(torch.int16))
        assert tensor.columns == 8 and tensor.config.group == 32 and tensor.name == name
    head = tensors["head"]
    assert head.drafted_outputs is None or head.drafted_outputs % 8 == 0
    outcome = optimised.outcome
    assert outcome.chain.choices == 1 and outcome.alternates.choices == 3
    assert outcome.chain.rows == outcome.alternates.rows == 6
    assert len(outcome.tried) == len(BUDGETS)


def test_reported_speedups_are_those_of_the_outcome(model, optimised, calibration):
    outcome = optimised.outcome
    chains = draft_chains(model, calibration.texts, draft_linear(outcome.tensors), 5, 3)
    costs = encoded_costs(model.config, outcome.tensors)
    assert costs.relative == pass_costs(outcome.tensors)
    samples = [Sample("", *pair) for pair in zip(calibration.texts, chains, strict=True)]
    for settings, value in zip((outcome.chain, outcome.alternates), outcome.speedups, strict=True):
        assert speedup(samples, settings, costs) == value
        best, _ = best_speedup(calibration.texts, chains, costs, 6, settings.choices)
        assert best == value


def test_optimised_draft_is_better_than_the_fixed_format(model, optimised, calibration):
    """On the texts that it was calibrated on, at least."""
    fixed = {}
    for name in linear_names(model.config):
        fixed[name] = encode(model.linear_weight(name), FormatConfig(32), columns=8)
    chains = draft_chains(model, calibration.texts, draft_linear(fixed), 5, 3)
    costs = encoded_costs(model.config, fixed)
    plain, _ = best_speedup(calibration.texts, chains, costs, 6, 3)
    print(f"fixed {plain:.3f}, optimised {optimised.outcome.speedups[1]:.3f}")
    assert optimised.outcome.speedups[1] >= plain


def test_optimising_again_gives_the_same(model, optimised):
    check_same(optimise(model, random_prompts(model), **ARGUMENTS), optimised.outcome)


def stage_of(journal: dict) -> str:
    return list(journal)[-1]


def test_interrupted_run_goes_on_where_it_was(model, optimised, monkeypatch):
    """Cut behind every stage and in the middle of each: the same result, no work twice."""
    calls = {"decode": 0, "options": 0, "sensitivities": 0, "_trial": 0}

    def count(name: str):
        original = getattr(encoder, name)

        def counted(*args, **named):
            result = original(*args, **named)
            if name == "sensitivities":
                result = list(result)
                calls[name] += len(result)
            else:
                calls[name] += 1
            return result

        return counted

    for name in calls:
        monkeypatch.setattr(encoder, name, count(name))
    names, parts = linear_names(model.config), segments(model)
    journals = [json.loads(text) for text in optimised.journals]
    by_stage: dict[str, list[dict]] = {}
    for journal in journals:
        by_stage.setdefault(stage_of(journal), []).append(journal)
    assert list(by_stage) == ["texts", "options", "sensitivities", "trials"]
    cuts = [by_stage["options"][2], by_stage["sensitivities"][0]]
    cuts += [by_stage["trials"][len(BUDGETS) // 2], by_stage["trials"][-1]]
    final = journals[-1]["trials"]
    assert len(final) == len(BUDGETS)
    for journal in cuts:
        calls.update(dict.fromkeys(calls, 0))
        left = {
            "decode": 0,
            "options": len(names) - len(journal["options"]),
            "sensitivities": len(parts) - len(journal.get("sensitivities", {})),
            # Budgets that allow the same options share a trial.
            "_trial": len(
                {json.dumps(final[b]) for b in final if b not in journal.get("trials", {})}
            ),
        }
        saved: list[str] = []
        outcome = optimise(
            model,
            random_prompts(model),
            **ARGUMENTS,
            journal=json.loads(json.dumps(journal)),
            save=lambda j, saved=saved: saved.append(json.dumps(j)),
        )
        check_same(outcome, optimised.outcome)
        assert calls == left
        assert json.loads(saved[-1]) == journals[-1]


def test_progress_is_reported_in_order(model, optimised):
    seen = []
    journal = json.loads(optimised.journals[-1])
    optimise(
        model,
        random_prompts(model),
        **ARGUMENTS,
        journal=journal,
        progress=lambda *event: seen.append(event),
    )
    assert all(0 <= done <= total for _, done, total in seen)
    assert seen[0][0] == "decoding calibration texts" and seen[-1][0] == "choosing settings"


def test_options_survive_the_journal():
    option = Option(FormatConfig(32, 3, 5), 0.25, True, 0.1 + 0.2, 12345)
    assert encoder._option(json.loads(json.dumps(asdict(option)))) == option


def test_impossible_settings_are_refused(model):
    with pytest.raises(ValueError, match="at least one prompt"):
        optimise(model, [])
    with pytest.raises(ValueError, match="a prompt has 48 tokens"):
        optimise(model, [[1] * 48])
    with pytest.raises(ValueError, match="group is 48"):
        optimise(model, random_prompts(model, 1), group=48, max_tokens=2)


def test_parts_of_the_vocabulary_that_are_tried():
    assert HEAD_PARTS[0] == 1.0 and all(0 < part <= 1 for part in HEAD_PARTS)
