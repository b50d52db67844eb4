# SPDX-License-Identifier: Apache-2.0
"""The ablation's drafts and figures on a small random model."""

from __future__ import annotations

import os
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch

from speq.model import ablation
from speq.model.ablation import (
    COMPETITORS,
    DRAFTS,
    ROWS,
    Draft,
    Materials,
    Recipe,
    Row,
    channel_shifts,
    fitted_scales,
    run_ablation,
    scheme_draft,
    shared_draft,
)
from speq.model.arith import quantize_activations
from speq.model.checkpoint import linear_names
from speq.model.competitors import SCHEMES, activation_stats, collect_stats
from speq.model.cycles import uniform_formats
from speq.model.emulation import decode, float_linear, float_weights
from speq.model.evaluation import counted_costs
from speq.model.format import encode, fit_scale_codes
from speq.model.loaders import load_model
from speq.model.number_format import FormatConfig
from tests.model.small_models import random_tokens, random_weights, small_config, write_gguf

SEED = int(os.environ.get("SPEQ_SEED", "0"))
NAME = "block.0.down_proj"  # K = 96: a group and a half


@pytest.fixture(scope="module")
def materials(tmp_path_factory) -> Materials:
    config = small_config(tied_head=False)
    path = tmp_path_factory.mktemp("model") / "random.gguf"
    write_gguf(path, config, random_weights(config, SEED))
    model = load_model(path)
    target = float_linear(float_weights(model))
    prompts = [random_tokens(config, 6, SEED + i) for i in range(4)]
    texts = [("kind", text) for text in decode(model, prompts, 8, target)]
    stats = collect_stats(model, [[*text.prompt, *text.tokens] for _, text in texts[:2]])
    encoded = {
        name: encode(model.linear_weight(name), FormatConfig(), name=name)
        for name in linear_names(model.config)
    }
    return Materials(model, target, encoded, stats, texts[:2], texts[2:], frozenset(), 8)


@pytest.fixture
def inputs(materials) -> torch.Tensor:
    generator = torch.Generator().manual_seed(SEED)
    return torch.randn(3, 96, generator=generator).to(torch.float16)


def test_rows_are_complete():
    """All of the design study's figures, once each, and every draft exists."""
    assert len({row.name for row in ROWS}) == len(ROWS)
    assert {row.draft for row in ROWS} == set(DRAFTS)
    assert [row.prototype for row in ROWS].count((None, None)) == len(COMPETITORS) + 3
    assert sum(row.prototype[0] is not None for row in ROWS) == 15
    assert sum(row.choices > 1 for row in ROWS) == 8
    assert set(COMPETITORS) <= set(SCHEMES)


def test_coded_draft_is_the_formats(materials, inputs):
    """Without channel scaling it is an encoded tensor and block activations, nothing else."""
    form = FormatConfig(group=32, width=5)
    recipe = Recipe(form, form, scales="codes", calibrated=True, block_activations=True)
    draft = shared_draft(recipe, materials)
    weight = materials.model.linear_weight(NAME)
    codes = fit_scale_codes(weight, form, materials.stats[NAME].mean_square)
    expected = quantize_activations(inputs, 32).values() @ encode(weight, form, codes).draft().T
    assert torch.allclose(draft.linear(NAME, inputs), expected, rtol=1e-6, atol=1e-6)
    config = materials.model.config
    assert draft.costs == counted_costs(config, uniform_formats(config, form))


def test_head_without_format_stays_fp16(materials):
    draft = shared_draft(Recipe(), materials)
    x = torch.ones(1, 64, dtype=torch.float16)
    assert torch.equal(draft.linear("head", x), materials.target("head", x))
    formats = uniform_formats(materials.model.config, FormatConfig())
    del formats["head"]
    assert draft.costs == counted_costs(materials.model.config, formats)


def test_coded_draft_with_channel_scaling(materials, inputs, monkeypatch):
    """Weights times 2^shift, inputs and their importance divided by it (and its square)."""
    shifts = torch.arange(96) % 5.0
    monkeypatch.setattr(ablation, "channel_shifts", lambda weight, *_: shifts[: weight.shape[1]])
    recipe = Recipe(scales="codes", calibrated=True, channels=True, block_activations=True)
    draft = shared_draft(recipe, materials)
    mean_square = materials.stats[NAME].mean_square
    factor = torch.exp2(shifts)
    weight = materials.model.linear_weight(NAME).to(torch.float32) * factor
    weight = weight.to(torch.float16)
    codes = fit_scale_codes(weight, FormatConfig(), mean_square / factor**2)
    assert (codes != fit_scale_codes(weight, FormatConfig(), mean_square)).any()
    x = quantize_activations((inputs.to(torch.float32) / factor).to(torch.float16), 64).values()
    expected = x @ encode(weight, FormatConfig(), codes).draft().T
    assert torch.allclose(draft.linear(NAME, inputs), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("block_activations", [False, True])
def test_channel_scaling_is_undone(materials, inputs, monkeypatch, block_activations):
    """With weights that the draft represents exactly when scaled, 1.25 and 1.75 times the channel's
    power of two, the draft is exact."""
    recipe = Recipe(scales="none", channels=True, block_activations=block_activations)
    shifts = torch.arange(96) % 5.0
    monkeypatch.setattr(ablation, "channel_shifts", lambda weight, *_: shifts[: weight.shape[1]])
    generator = torch.Generator().manual_seed(SEED)
    scaled = torch.tensor([1.25, 1.75])[torch.randint(2, (64, 96), generator=generator)]
    weight = torch.ldexp(scaled, -shifts).to(torch.float16)
    model = replace(materials.model, weights=materials.model.weights | {NAME: weight})
    draft = shared_draft(recipe, replace(materials, model=model))
    x = torch.ldexp(inputs.to(torch.float32).round().clamp(-3, 3), shifts).to(torch.float16)
    expected = x.to(torch.float32) @ weight.to(torch.float32).T
    assert torch.allclose(draft.linear(NAME, x), expected, rtol=1e-5, atol=1e-4)


def test_channel_shifts():
    """Even inputs are left alone; large ones have their weights scaled up, by at most 16."""
    generator = torch.Generator().manual_seed(SEED)
    weight = torch.randn(64, 128, generator=generator).to(torch.float16)
    x = torch.randn(64, 128, generator=generator)
    even = activation_stats((x.sign() * 0.5).to(torch.float16))
    assert (channel_shifts(weight, FormatConfig(), even) == 0).all()
    x[:, ::16] *= 64
    shifts = channel_shifts(weight, FormatConfig(), activation_stats(x.to(torch.float16)))
    assert torch.equal(shifts, shifts.round()) and shifts.min() == 0 and 0 < shifts.max() <= 4
    assert shifts[::16].min() > shifts[torch.arange(128) % 16 != 0].max()


def test_fitted_scales_minimise_the_weighted_error():
    rng = np.random.default_rng(SEED)
    weight = torch.from_numpy(rng.standard_t(4, (5, 100)).astype(np.float16))
    levels = encode(weight, FormatConfig(), np.full((5, 2), 4)).draft()
    importance = torch.from_numpy(rng.random(100).astype(np.float32))
    scales = fitted_scales(weight, levels, 64, importance)
    assert torch.equal(scales[:, :64], scales[:, :1].expand(-1, 64))
    assert torch.equal(scales[:, 64:], scales[:, 64:65].expand(-1, 36))

    def error(factor: float) -> torch.Tensor:
        return ((weight.to(torch.float32) - levels * scales * factor).square() * importance).sum(1)

    assert (error(1.0) < error(0.99)).all() and (error(1.0) < error(1.01)).all()


def test_schemes_as_drafts(materials):
    external = scheme_draft("int4", True, True, materials)
    assert external.external and external.costs.verify == external.costs.plain
    assert external.costs.draft == external.quantized.bytes_streamed
    shared = scheme_draft("window-group-scale", False, False, materials)
    assert shared.costs.verify == shared.costs.plain + shared.quantized.bytes_added
    x = torch.ones(1, 64, dtype=torch.float16)
    assert torch.allclose(shared.linear("head", x), materials.target("head", x))


def test_a_perfect_draft(materials, monkeypatch):
    """The target as its own draft: everything matches, and as a decoder it differs nowhere."""

    def target(_: Materials) -> Draft:
        exact = scheme_draft("int4", True, True, materials)
        return replace(exact, linear=materials.target)

    monkeypatch.setitem(DRAFTS, "target", target)
    rows = [
        Row("a quarter", "target", rows=9),
        Row("counted", "target", counted=True, rows=9),
        Row("short", "target", rows=3, choices=2),
    ]
    seen = []
    result = run_ablation(materials, SEED, rows, ["target"], seen.append)
    assert seen == ["target"]
    assert [r.row for r in result.rows] == rows
    quarter, counted, short = result.rows
    assert quarter.match_rate == counted.match_rate == 1.0
    # 8 tokens: 7 draft passes and one verify pass.
    assert quarter.settings.length == 7
    assert quarter.speedup.value == pytest.approx(8 / (7 * 0.25 + 1))
    costs = target(materials).costs
    assert counted.speedup.value == pytest.approx(8 / (7 * costs.draft / costs.plain + 1))
    assert quarter.counted_speedup == counted.speedup
    assert short.settings.length == 2
    (decoder,) = result.lossy
    assert (decoder.differing, decoder.differing_next) == (0.0, 0.0)
    assert decoder.perplexity == decoder.perplexity_fp16 > 1
    assert decoder.speedup == costs.plain / costs.draft


def test_a_bad_draft_differs(materials, monkeypatch):
    """Negated logits: the target's choice is the last one."""

    def opposite(_: Materials) -> Draft:
        exact = scheme_draft("int4", True, True, materials)

        def linear(name: str, x: torch.Tensor) -> torch.Tensor:
            y = materials.target(name, x)
            return -y if name == "head" else y

        return replace(exact, linear=linear)

    monkeypatch.setitem(DRAFTS, "opposite", opposite)
    result = run_ablation(materials, SEED, [Row("opposite", "opposite")], ["opposite"])
    assert result.rows[0].match_rate == 0.0
    assert result.rows[0].settings.length == 1
    assert result.rows[0].speedup.value < 1
    (decoder,) = result.lossy
    assert decoder.differing_next == 1.0 and decoder.differing > 0.5
    assert decoder.perplexity > decoder.perplexity_fp16


def test_settings_are_chosen_on_calibration_texts(materials, monkeypatch):
    chosen_on = []

    def watch(samples, *arguments):
        chosen_on.append([sample.text for sample in samples])
        return original(samples, *arguments)

    original = ablation.best_settings
    monkeypatch.setattr(ablation, "best_settings", watch)
    run_ablation(materials, SEED, [Row("int4", "int4")], [])
    calibration = [text for _, text in materials.calibration]
    assert chosen_on and all(texts == calibration for texts in chosen_on)


def test_external_drafts_have_keys_and_values_of_their_own(materials, monkeypatch):
    """An external draft whose blocks differ sees other keys than one that shares the target's."""
    seen = {}

    def watch(model, texts, linear, length):
        seen[external] = texts[0].keys
        return original(model, texts, linear, length)

    original = ablation.draft_chains
    monkeypatch.setattr(ablation, "draft_chains", watch)
    for external in (False, True):
        monkeypatch.setitem(DRAFTS, "int4", partial(scheme_draft, "int4", True, external))
        run_ablation(materials, SEED, [Row("int4", "int4")], [])
    assert torch.equal(seen[False], materials.evaluation[0][1].keys)
    assert not torch.equal(seen[True], seen[False])
