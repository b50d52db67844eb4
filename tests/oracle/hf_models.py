# SPDX-License-Identifier: Apache-2.0
"""Hugging Face folders: logits and greedy text, compared with those of transformers."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch.overrides import TorchFunctionMode
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from speq.model.checkpoint import Model, linear_names
from speq.model.format import encode
from speq.model.loaders import load_model
from speq.model.number_format import FormatConfig
from speq.model.speculation import generate
from speq.model.transformer import KVCache, forward, prepare_draft_linears
from tests.model.reference_models import (
    FLOAT64_BOUND,
    GOLDEN_BOUND,
    KEPT,
    TEXT,
    difference,
    seeded_tensor,
    seeded_tokens,
    write_reference,
)
from tests.model.small_models import byte_level_tokenizer, reference_logits
from tests.oracle.cases import CASES, Case
from tests.oracle.table import Check, Row

PROMPT, GENERATED = 12, 24


class Float64(TorchFunctionMode):
    """Computes in float64 what transformers computes in float32 for every type of weights: norms,
    softmax and the angles of RoPE. Its roundings there are 1e-6 of the spread of the logits."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is torch.Tensor.float:
            func = torch.Tensor.double
        args = [torch.float64 if value is torch.float32 else value for value in args]
        named = {
            name: torch.float64 if value is torch.float32 else value
            for name, value in (kwargs or {}).items()
        }
        return func(*args, **named)


def build(folder: Path, case: Case, seed: int) -> None:
    """Lets transformers write the folder of a case, with seeded weights."""
    config = AutoConfig.for_model(**case.settings)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    # Tied weights have one name of several; save_pretrained stores the embedding's.
    weights = {name: seeded_tensor(name, tuple(p.shape), seed) for name, p in named(model)}
    model.load_state_dict(weights, strict=False)
    options = {"max_shard_size": case.shard_bytes} if case.shard_bytes else {}
    model.to(case.dtype).save_pretrained(folder, **options)
    PreTrainedTokenizerFast(tokenizer_object=byte_level_tokenizer()).save_pretrained(folder)
    if case.verbatim:
        (folder / "config.json").write_text(json.dumps(case.settings))
    if case.head:
        file = folder / "model.safetensors"
        shape = (config.vocab_size, config.hidden_size)
        head = seeded_tensor("lm_head.weight", shape, seed).to(case.dtype)
        save_file(load_file(file) | {"lm_head.weight": head}, file, {"format": "pt"})


def named(model: PreTrainedModel) -> list[tuple[str, torch.nn.Parameter]]:
    return list(model.named_parameters())


def read(folder: Path, **options: Any) -> PreTrainedModel:
    """transformers' reading of a folder in float64, with weights rounded to FP16 as the target's
    are."""
    with Float64():
        model = AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float64, attn_implementation="eager", **options
        )
    for _, weight in named(model):
        weight.data = weight.data.half().double()
    model.generation_config.eos_token_id = None
    return model.eval()


def logits(model: PreTrainedModel, tokens: list[int]) -> torch.Tensor:
    """Logits float64 [T, V] of transformers."""
    with Float64(), torch.no_grad():
        return model(torch.tensor([tokens])).logits[0]


def compare_logits(
    model: Model, expected: torch.Tensor, tokens: list[int], bound: float = FLOAT64_BOUND
) -> Iterator[Row]:
    """Configuration and weights in float64; then the golden model."""
    plain = reference_logits(model.config, model.weights, tokens)
    yield Row("logits, float64", difference(plain, expected), bound)
    golden = forward(model, tokens, KVCache(model.config, len(tokens)))
    yield Row("logits, golden model", difference(golden, expected), GOLDEN_BOUND)


def compare_text(model: Model, other: PreTrainedModel, prompt: list[int]) -> Row:
    """Greedy decoding, speculative here. Where the texts part, both tokens' logits must lie within
    the golden model's rounding of each other; that gap is the difference."""
    continuing: Any = other  # its annotations do not say that it can
    with Float64(), torch.no_grad():
        result = continuing.generate(
            torch.tensor([prompt]),
            max_new_tokens=GENERATED,
            do_sample=False,
            output_logits=True,
            return_dict_in_generate=True,
        )
    expected = result.sequences[0, len(prompt) :].tolist()
    encoded = {
        name: encode(model.linear_weight(name), FormatConfig(), name=name)
        for name in linear_names(model.config)
    }
    steps = list(generate(model, prompt, prepare_draft_linears(encoded), max_tokens=GENERATED))
    made = [token for step in steps for token in step.tokens]
    same, gap = 0, 0.0
    for ours, theirs, scores in zip(made, expected, result.logits, strict=True):
        if ours != theirs:
            gap = float((scores[0, theirs] - scores[0, ours]) / scores[0].std())
            break
        same += 1
    accepted = sum(step.accepted for step in steps)
    note = f"{same} of {GENERATED} tokens the same, {accepted} of them drafted"
    return Row("greedy text", gap, 2 * GOLDEN_BOUND, note)


def check(case: Case, folder: Path, seed: int) -> Iterator[Row]:
    build(folder, case, seed)
    other = read(folder)
    model = load_model(folder)
    tokens = seeded_tokens(model.config.vocab_size, TEXT, seed)
    yield from compare_logits(model, logits(other, tokens), tokens)
    yield compare_text(model, other, tokens[:PROMPT])


def keep_logits(seed: int) -> None:
    """Writes the logits of all cases that are seeded float32 weights in one file and no more."""
    entries = {}
    for case in CASES:
        if case.dtype != torch.float32 or case.shard_bytes or case.head:
            continue
        with tempfile.TemporaryDirectory() as parent:
            folder = Path(parent) / "model"
            build(folder, case, seed)
            settings = json.loads((folder / "config.json").read_text())
            tokens = seeded_tokens(settings["vocab_size"], TEXT, seed)
            kept = logits(read(folder), tokens)[KEPT]
            entries[case.name] = {
                "seed": seed,
                "settings": settings,
                "shapes": {
                    name: list(tensor.shape)
                    for name, tensor in load_file(folder / "model.safetensors").items()
                    if ".layers." not in name or ".layers.0." in name
                },
                # As many digits as the bound of the comparison needs.
                "logits": [[float(f"{value:.14g}") for value in row] for row in kept.tolist()],
            }
    write_reference(entries)


def checks() -> list[Check]:
    return [
        Check(f"HF {case.name}", lambda folder, seed, case=case: check(case, folder, seed))
        for case in CASES
    ]
