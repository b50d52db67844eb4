# SPDX-License-Identifier: Apache-2.0
"""Models of transformers in memory: `from_transformers`, compared with the folder they save."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from speq.model.checkpoint import Model
from speq.model.loaders import from_transformers, load_model
from tests.oracle.cases import CASES, Case
from tests.oracle.hf_models import build
from tests.oracle.table import Check, Row

TEXTS = ("hello the", "<|im_start|>hell<extra>o", "the é 123 \U0001f600\n")
TEMPLATE = "{% for m in messages %}<|im_start|>{{ m.content }}{% endfor %}{{ eos_token }}"


def check(case: Case, folder: Path, seed: int) -> Iterator[Row]:
    build(folder, case, seed)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<extra>"]})
    tokenizer.eos_token = "<|im_end|>"
    tokenizer.chat_template = TEMPLATE
    model.generation_config.eos_token_id = [2, 5]
    saved = folder.with_name("saved")
    model.save_pretrained(saved)
    tokenizer.save_pretrained(saved)
    # A copy is made: what becomes of the original changes nothing.
    mine = from_transformers(model, tokenizer)
    with torch.no_grad():
        for weight in model.parameters():
            weight.zero_()
    different = [*differences(mine, load_model(saved))]
    yield Row("bits, settings and tokens", len(different), 0.0, ", ".join(different[:3]))


def differences(mine: Model, expected: Model) -> Iterator[str]:
    """What differs between two models."""
    for name, value in vars(expected.config).items():
        if getattr(mine.config, name) != value:
            yield name
    if mine.weights.keys() != expected.weights.keys():
        yield "names of weights"
    for name, weight in expected.weights.items():
        if not torch.equal(mine.weights[name].view(torch.int16), weight.view(torch.int16)):
            yield name
    for part in ("stop_ids", "leading", "chat_template", "named", "limit"):
        if getattr(mine.tokenizer, part) != getattr(expected.tokenizer, part):
            yield part
    for text in TEXTS:
        for function in ("encode", "encode_chat", "chat"):
            made = [outcome(getattr(m.tokenizer, function), text) for m in (mine, expected)]
            if made[0] != made[1]:
                yield f"{function}({text!r})"
    ids = range(expected.config.vocab_size + 2)
    if mine.tokenizer.decode(ids) != expected.tokenizer.decode(ids):
        yield "decode"


def outcome(function: Callable[[str], object], text: str) -> object:
    """What a function of a tokenizer gives, or why it gives nothing."""
    try:
        return function(text)
    except ValueError as error:  # a token for which the model has no row
        return str(error)


def unsupported(folder: Path, seed: int) -> Iterator[Row]:
    """Models that are refused, in the words of a folder's refusal."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for model in others():
            model.save_pretrained(folder)
            said = []
            for function, argument in ((load_model, folder), (from_transformers, model)):
                try:
                    function(argument)
                    said.append("")
                except ValueError as error:
                    said.append(str(error).partition(": ")[2])
            different = not said[0] or said[0] != said[1]
            yield Row("refusals", int(different), 0.0, said[1][:60])


def others() -> Iterator[Any]:
    """Small models that cannot be computed with."""
    from transformers import AutoConfig, AutoModel

    sizes = {"num_hidden_layers": 1, "num_attention_heads": 2, "hidden_size": 8, "vocab_size": 16}
    for kind in ("gpt2", "gpt_neox", "phi", "olmo", "starcoder2"):
        config = AutoConfig.for_model(kind, intermediate_size=16, **sizes)
        yield AutoModelForCausalLM.from_config(config)
    config = AutoConfig.for_model("llama", intermediate_size=16, **sizes)
    yield AutoModel.from_config(config)
    config.mlp_bias = True
    yield AutoModelForCausalLM.from_config(config).to(torch.float64)


def checks() -> list[Check]:
    return [
        *(
            Check(
                "transformers object",
                lambda folder, seed, case=case: check(case, folder, seed),
                case.name,
            )
            for case in CASES
        ),
        Check("transformers object, refused", unsupported),
    ]
