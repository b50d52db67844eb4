# SPDX-License-Identifier: Apache-2.0
"""No setting is ignored: each is changed in config.json, and the loader has to follow or refuse.

For every setting that a configuration class of any of the architectures knows, and for older
spellings, a folder gets other values. Where transformers still reads it, the loaded model must
compute transformers' logits, or loading must end in a CheckpointError.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from speq.model.checkpoint import CheckpointError
from speq.model.loaders import load_model
from tests.model.reference_models import FLOAT64_BOUND, TEXT, difference, seeded_tokens
from tests.model.small_models import reference_logits
from tests.oracle.cases import CASES, GEMMA_PATTERN, GEMMA_ROPE, LLAMA3, Case
from tests.oracle.hf_models import Float64, build, logits
from tests.oracle.table import Check, Row

# A case for each type of model, with as many of its traits as possible.
BASES = (
    *("llama head_dim", "mistral window", "smollm3 windows", "phi3 window", "qwen2 windows"),
    *("qwen3 windows", "gemma3 published pattern", "granite"),
)
# Values that numbers and flags do not give by themselves.
VALUES: dict[str, list[Any]] = {
    "hidden_act": ["gelu", "relu"],
    "hidden_activation": ["silu", "gelu"],
    "layer_types": [["full_attention"] * 4, GEMMA_PATTERN],
    "no_rope_layers": [[0, 1, 1, 0], [1, 1, 1, 1], []],
    "rope_theta": [700.0],
    "rope_local_base_freq": [500.0],
    "partial_rotary_factor": [0.5],
    "sliding_window": [None, 3],
    "_sliding_window_pattern": [2],
    "sliding_window_pattern": [2],
    "attn_logit_softcapping": [2.0],
    "final_logit_softcapping": [2.0],
    "quantization_config": [{"quant_method": "gptq", "bits": 4}],
    "rope_parameters": [
        None,
        {"rope_type": "default", "rope_theta": 700.0},
        {"rope_type": "linear", "rope_theta": 700.0, "factor": 2.0},
        {"rope_type": "llama3", "rope_theta": 700.0, **LLAMA3},
        {"rope_type": "dynamic", "rope_theta": 700.0, "factor": 2.0},
        {"rope_type": "yarn", "rope_theta": 700.0, "factor": 2.0},
        {"rope_type": "default", "rope_theta": 700.0, "partial_rotary_factor": 0.5},
        GEMMA_ROPE,
        GEMMA_ROPE | {"sliding_attention": {"rope_type": "linear", "factor": 2.0}},
    ],
    "rope_scaling": [
        {"rope_type": "linear", "factor": 2.0},
        {"rope_type": "llama3", **LLAMA3},
        {"type": "dynamic", "factor": 2.0},
        {"rope_type": "yarn", "factor": 2.0},
        {"type": "linear", "rope_type": "default", "factor": 2.0},
    ],
}


@cache
def known_settings() -> list[str]:
    """All names that settings have for some architecture."""
    bases = [AutoConfig.for_model(**case.settings).to_dict() for case in CASES]
    names = {name for settings in bases for name in settings}
    return sorted(names | VALUES.keys() - {"model_type"})


def other_values(name: str, value: Any) -> list[Any]:
    """Values to try in place of that one."""
    if name in VALUES:
        return VALUES[name]
    if isinstance(value, bool):
        return [not value]
    if isinstance(value, int | float):
        return [value + 1]
    return [True, 3]


def theirs(folder: Path, tokens: list[int]) -> torch.Tensor | None:
    """transformers' logits; None if some tensor is missing or left over. Raises what its own checks
    of settings raise."""
    automatic: Any = AutoModelForCausalLM  # its annotations know one kind of result
    with Float64():
        model, found = automatic.from_pretrained(
            folder, dtype=torch.float64, attn_implementation="eager", output_loading_info=True
        )
    return None if any(found.values()) else logits(model.eval(), tokens)


def check(case: Case, folder: Path, seed: int) -> Iterator[Row]:
    build(folder, case, seed)
    file = folder / "config.json"
    original = json.loads(file.read_text())
    tokens = seeded_tokens(original["vocab_size"], TEXT, seed)
    before = theirs(folder, tokens)
    followed = neutral = refused = unread = 0
    wrong = []
    for name in known_settings():
        for value in other_values(name, original.get(name)):
            file.write_text(json.dumps(original | {name: value}))
            try:
                model = load_model(folder)
            except CheckpointError:
                refused += 1
                continue
            try:
                expected = theirs(folder, tokens)
            except Exception:  # there is nothing to compare with
                unread += 1
                continue
            plain = reference_logits(model.config, model.weights, tokens)
            if expected is None or difference(plain, expected) > FLOAT64_BOUND:
                wrong.append(f"{name}={json.dumps(value)}")
            elif torch.equal(expected, before):
                neutral += 1
            else:
                followed += 1
    note = f"{followed} followed, {neutral} without effect, {refused} refused, {unread} unread"
    if wrong:
        note = f"wrong: {', '.join(wrong)}; {note}"
    yield Row("each setting changed", len(wrong), 0, note)


def checks() -> list[Check]:
    return [
        Check(f"settings of {case.name}", lambda folder, seed, case=case: check(case, folder, seed))
        for case in CASES
        if case.name in BASES
    ]
