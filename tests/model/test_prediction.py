# SPDX-License-Identifier: Apache-2.0
"""Predictions of speed: dimensions of the models, and the best length of a chain."""

from __future__ import annotations

import math

import pytest

from speq.host.cycles import predicted_passes
from speq.model.checkpoint import tensor_shapes
from speq.model.cycles import uniform_formats
from speq.model.number_format import FormatConfig
from speq.model.pass_cycles import PassCycles
from speq.model.prediction import MODELS, predict

SMOLLM2 = MODELS["SmolLM2-135M"]


@pytest.fixture(scope="module")
def passes() -> PassCycles:
    """Of SmolLM2 on 8 x 16."""
    return predicted_passes(SMOLLM2, uniform_formats(SMOLLM2, FormatConfig()), context=5)


def test_dimensions_are_those_of_the_models():
    parameters = {
        name: sum(math.prod(shape) for _, shape in tensor_shapes(config))
        for name, config in MODELS.items()
    }
    assert parameters["SmolLM2-135M"] == 134_515_008
    assert parameters["Llama-3.1-8B"] == 8_030_261_248
    assert parameters["Llama-2-13B"] == 13_015_864_320


def test_hopeless_and_perfect_drafts(passes):
    plain, draft = passes.plain(5), passes.draft(5)
    none, all_ = predict(passes, 0.0, 5), predict(passes, 1.0, 5)
    assert (none.length, none.verify) == (0, passes.verify(1, 5))
    assert none.speedup == plain / none.verify
    verify = passes.verify(8, 5)
    assert (all_.length, all_.verify, all_.draft) == (7, verify, draft)
    assert all_.speedup == 8 * plain / (7 * draft + verify)
    assert all_.cycles_per_token == pytest.approx((7 * draft + verify) / 8)


def test_the_best_length_grows_with_the_acceptance(passes):
    lengths = [predict(passes, p / 10).length for p in range(11)]
    assert lengths == sorted(lengths) and lengths[0] == 0 and lengths[-1] == 7


def test_exact_logits_lengthen_draft_passes(passes):
    plain, reranked = predict(passes, 1.0, 5), predict(passes, 1.0, 5, 4)
    assert reranked.draft == passes.draft(5, 4) > plain.draft + 4 * SMOLLM2.hidden
    assert reranked.speedup < plain.speedup
