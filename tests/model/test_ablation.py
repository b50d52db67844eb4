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
    POLICIES,
    ROWS,
    Draft,
    Materials,
    Recipe,
    Row,
    built_draft,
    encoded_draft,
    fitted_scales,
    fitted_tensors,
    run_ablation,
    scheme_draft,
    shared_draft,
)
from speq.model.arith import quantize_activations
from speq.model.checkpoint import linear_names
from speq.model.competitors import SCHEMES, collect_stats
from speq.model.cycles import uniform_formats
from speq.model.emulation import decode, draft_linear, float_linear, float_weights
from speq.model.encoding import encode_linears
from speq.model.evaluation import counted_costs, encoded_costs
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
    """The design study's figures, once each, and every draft exists."""
    assert len({row.name for row in ROWS}) == len(ROWS)
    assert {row.draft for row in ROWS} == set(DRAFTS)
    assert sum(row.prototype[0] is not None for row in ROWS) == 10
    assert sum(row.choices > 1 for row in ROWS) == 8
    assert {row.policy for row in ROWS} == set(POLICIES)
    assert set(COMPETITORS) <= set(SCHEMES)


def test_coded_draft_is_the_formats(materials, inputs):
    """An encoded tensor and block activations, nothing else; the head stays FP16."""
    form = FormatConfig(group=32, split=1)
    recipe = Recipe(form, scales="codes", calibrated=True, block_activations=True)
    draft = shared_draft(recipe, materials)
    weight = materials.model.linear_weight(NAME)
    codes = fit_scale_codes(weight, form, materials.stats[NAME].mean_square)
    expected = quantize_activations(inputs, 32).values() @ encode(weight, form, codes).draft().T
    assert torch.allclose(draft.linear(NAME, inputs), expected, rtol=1e-6, atol=1e-6)
    x = torch.ones(1, 64, dtype=torch.float16)
    assert torch.equal(draft.linear("head", x), materials.target("head", x))
    formats = uniform_formats(materials.model.config, form)
    del formats["head"]
    assert draft.costs == counted_costs(materials.model.config, formats)


def test_steps_to_what_is_encoded(materials):
    """By the weights alone, fitted, re-ranked, and of a part of the vocabulary."""
    model, x = materials.model, torch.randn(3, 64).to(torch.float16)
    plain, fitted, exact, half = (
        built_draft(*step, materials)
        for step in ((False, 0, 1.0), (True, 0, 1.0), (True, 8, 1.0), (True, 8, 0.5))
    )
    formats = uniform_formats(model.config, FormatConfig())
    assert plain.costs == fitted.costs == counted_costs(model.config, formats)
    assert torch.equal(plain.linear("head", x), draft_linear(encode_linears(model))("head", x))
    assert not torch.equal(plain.linear("head", x), fitted.linear("head", x))
    tensors = fitted_tensors(materials)
    assert fitted_tensors(materials) is tensors
    assert (exact.reranked, half.reranked) == (8, 8)
    assert exact.costs == encoded_costs(model.config, tensors, 8)
    logits, some = exact.linear("head", x), half.linear("head", x)
    for y in (logits, some):
        known = y > -torch.inf
        assert (known.sum(dim=1) == 8).all()
        assert torch.allclose(y[known], materials.target("head", x)[known], rtol=1e-5, atol=1e-5)
    # Half of 264 outputs are 9 tiles of 16.
    assert (some[:, 144:] == -torch.inf).all()
    part = {**tensors, "head": replace(tensors["head"], drafted_outputs=144)}
    assert half.costs == encoded_costs(model.config, part, 8)


def test_the_evaluated_encoding_is_re_ranked_as_asked_for(materials):
    draft = encoded_draft(replace(materials, reranked=3))
    x = torch.randn(2, 64).to(torch.float16)
    assert ((draft.linear("head", x) > -torch.inf).sum(dim=1) == 3).all()
    assert draft.costs == encoded_costs(materials.model.config, materials.encoded, 3)
    assert draft.reranked == 3


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
    def watch(samples, *arguments, **options):
        chosen_on.append([sample.text for sample in samples])
        return original(samples, *arguments, **options)

    calibration = [text for _, text in materials.calibration]
    for policy in POLICIES:
        chosen_on, original = [], POLICIES[policy]
        monkeypatch.setitem(POLICIES, policy, watch)
        run_ablation(materials, SEED, [Row("int4", "int4", policy=policy)], [])
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
