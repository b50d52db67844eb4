# SPDX-License-Identifier: Apache-2.0
"""Loaded models compute the logits that transformers computed for the same folders."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from speq.model.checkpoint import Model
from speq.model.loaders import load_model
from speq.model.transformer import KVCache, forward
from tests.model.reference_models import (
    FLOAT64_BOUND,
    GOLDEN_BOUND,
    KEPT,
    REFERENCE,
    TEXT,
    difference,
    seeded_tokens,
    write_seeded_folder,
)
from tests.model.small_models import reference_logits

MODELS = json.loads(REFERENCE.read_text())


def load(folder: Path, name: str, changes: dict[str, Any] | None = None) -> Model:
    """The model of that name, with some settings of its config.json changed."""
    entry = MODELS[name]
    settings = entry["settings"] | (changes or {})
    write_seeded_folder(folder, settings, entry["shapes"], entry["seed"])
    return load_model(folder)


def plain_difference(model: Model, name: str) -> float:
    """How far float64 logits of the loaded configuration and weights are off."""
    tokens = seeded_tokens(model.config.vocab_size, TEXT, MODELS[name]["seed"])
    got = reference_logits(model.config, model.weights, tokens)
    return difference(got[KEPT], torch.tensor(MODELS[name]["logits"], dtype=torch.float64))


@pytest.mark.parametrize("name", MODELS)
def test_logits_are_those_of_transformers(tmp_path, name):
    model = load(tmp_path / "model", name)
    assert plain_difference(model, name) < FLOAT64_BOUND
    tokens = seeded_tokens(model.config.vocab_size, TEXT, MODELS[name]["seed"])
    golden = forward(model, tokens, KVCache(model.config, TEXT))
    expected = torch.tensor(MODELS[name]["logits"], dtype=torch.float64)
    assert difference(golden[KEPT], expected) < GOLDEN_BOUND


ROPE = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
ROPE |= {"original_max_position_embeddings": 64}


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("llama published rope_theta", {"rope_theta": 500.5}),
        ("llama published rope_theta", {"rms_norm_eps": 1.01e-5}),
        ("llama published rope_theta", {"num_attention_heads": 8, "num_key_value_heads": 4}),
        ("llama published linear, type", {"rope_scaling": {"type": "linear", "factor": 4.01}}),
        ("llama published llama3, rope_type", {"rope_scaling": ROPE | {"factor": 8.01}}),
        ("llama published llama3, rope_type", {"rope_scaling": ROPE | {"low_freq_factor": 1.01}}),
        ("llama published llama3, rope_type", {"rope_scaling": ROPE | {"high_freq_factor": 4.01}}),
        ("mistral published", {"sliding_window": 6}),
        ("smollm3 published", {"no_rope_layers": [1, 1, 0, 1], "no_rope_layer_interval": None}),
        ("phi3 published", {"sliding_window": 6}),
        ("qwen2 published windows", {"sliding_window": 4}),
        ("qwen2 published windows", {"max_window_layers": 1}),
        ("gemma3 published pattern", {"sliding_window_pattern": 2}),
        ("gemma3 published pattern", {"sliding_window": 6}),
        ("gemma3 published pattern", {"query_pre_attn_scalar": 21}),
        ("gemma3 published pattern", {"rope_local_base_freq": 701.0}),
        ("gemma3 published pattern", {"rope_scaling": {"rope_type": "linear", "factor": 8.01}}),
        ("granite published", {"embedding_multiplier": 6.01}),
        ("granite published", {"logits_scaling": 3.01}),
        ("granite published", {"residual_multiplier": 0.221}),
        ("granite published", {"attention_multiplier": 0.126}),
    ],
    ids=str,
)
def test_every_setting_shows(tmp_path, name, changes):
    """A loader that ignored one of these, or took a slightly wrong value, would be noticed."""
    assert plain_difference(load(tmp_path / "model", name, changes), name) > 1000 * FLOAT64_BOUND
