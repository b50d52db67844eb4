# SPDX-License-Identifier: Apache-2.0
"""Predictions of speed: dimensions of the models, and the best length of a chain."""

from __future__ import annotations

import math

import pytest

from speq.model.checkpoint import tensor_shapes
from speq.model.cycles import Engine, draft_pass, plain_pass, uniform_formats, verify_pass
from speq.model.number_format import FormatConfig
from speq.model.prediction import MODELS, predict

ENGINE = Engine(rows=8, cols=16)
SMOLLM2 = MODELS["SmolLM2-135M"]


def test_dimensions_are_those_of_the_models():
    parameters = {
        name: sum(math.prod(shape) for _, shape in tensor_shapes(config))
        for name, config in MODELS.items()
    }
    assert parameters["SmolLM2-135M"] == 134_515_008
    assert parameters["Llama-3.1-8B"] == 8_030_261_248
    assert parameters["Llama-2-13B"] == 13_015_864_320


def test_hopeless_and_perfect_drafts():
    formats = uniform_formats(SMOLLM2, FormatConfig())
    plain = plain_pass(SMOLLM2, ENGINE, 5).cycles
    draft = draft_pass(SMOLLM2, ENGINE, formats, 5).cycles
    none, all_ = predict(SMOLLM2, ENGINE, 0.0, 5), predict(SMOLLM2, ENGINE, 1.0, 5)
    assert (none.length, none.verify) == (0, verify_pass(SMOLLM2, ENGINE, formats, 1, 5).cycles)
    assert none.speedup == plain / none.verify
    verify = verify_pass(SMOLLM2, ENGINE, formats, 8, 5).cycles
    assert (all_.length, all_.verify, all_.draft) == (7, verify, draft)
    assert all_.speedup == 8 * plain / (7 * draft + verify)
    assert all_.cycles_per_token == pytest.approx((7 * draft + verify) / 8)


def test_the_best_length_grows_with_the_acceptance():
    lengths = [predict(SMOLLM2, ENGINE, p / 10).length for p in range(11)]
    assert lengths == sorted(lengths) and lengths[0] == 0 and lengths[-1] == 7


def test_exact_logits_lengthen_draft_passes():
    formats = uniform_formats(SMOLLM2, FormatConfig())
    draft = draft_pass(SMOLLM2, ENGINE, formats, 5, reranked_tiles=4).cycles
    plain, reranked = predict(SMOLLM2, ENGINE, 1.0, 5), predict(SMOLLM2, ENGINE, 1.0, 5, 4)
    assert reranked.draft == draft > plain.draft + 4 * SMOLLM2.hidden
    assert reranked.speedup < plain.speedup
