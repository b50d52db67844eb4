# SPDX-License-Identifier: Apache-2.0
"""Models whose weights follow from a seed, so that others' results for them can be kept.

A tensor depends on its stored name, its shape and the seed, and on no library's random numbers.
`data/transformers_logits.json` describes small Hugging Face folders this way, one for each
architecture and trait, with the logits that transformers computes for them in float64.
`python -m tests.oracle.check_models --write-reference` writes it.
"""

from __future__ import annotations

import json
import math
import random
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file

from tests.model.small_models import byte_level_tokenizer

REFERENCE = Path(__file__).parent / "data" / "transformers_logits.json"
# Of the logits [T, V] of a text of so many tokens these rows and columns are kept.
TEXT = 40
KEPT = (slice(15, None, 12), slice(None, None, 6))
# Largest differences that are allowed, in units of the standard deviation of the logits. In float64
# only the order of sums differs. The golden model rounds the array's inputs to FP16, by at most
# 2^-11 each, and such errors add up along a few layers.
FLOAT64_BOUND, GOLDEN_BOUND = 1e-11, 0.02


def seeded_tensor(name: str, shape: tuple[int, ...], seed: int) -> torch.Tensor:
    """A float32 tensor that is exact in FP16, also after Gemma's adding 1 to norms.

    With u uniform in [-1, 1), from Python's `random.Random(f"{seed} {name}").random()`, whose
    sequence Python promises to keep: norms are 1 + u / 4 in multiples of 2^-9, biases u / 2, the
    embedding u, and matrices [O, K] 1.7 u / sqrt(K), which has a variance of about 1 / K.
    """
    draw = random.Random(f"{seed} {name}").random
    u = np.array([2.0 * draw() - 1.0 for _ in range(math.prod(shape))]).reshape(shape)
    if "norm" in name:
        values = 1.0 + np.round(u * 128) / 512
    elif len(shape) == 1:
        values = u / 2
    elif "embed" in name:
        values = u
    else:
        values = u * 1.7 / math.sqrt(shape[-1])
    return torch.from_numpy(values.astype(np.float16).astype(np.float32))


def seeded_tokens(vocab_size: int, count: int, seed: int) -> list[int]:
    """Token ids, uniform."""
    draw = random.Random(f"{seed} tokens").random
    return [int(draw() * vocab_size) for _ in range(count)]


def write_seeded_folder(
    folder: Path, settings: dict[str, Any], shapes: dict[str, list[int]], seed: int
) -> None:
    """Writes a Hugging Face folder: config.json, seeded tensors, and a tokenizer. `shapes` are by
    stored name; those of layer 0 stand for all layers."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(settings))
    tensors = {}
    for name, shape in shapes.items():
        layers = settings["num_hidden_layers"] if ".layers.0." in name else 1
        for layer in range(layers):
            full = name.replace(".layers.0.", f".layers.{layer}.")
            tensors[full] = seeded_tensor(full, tuple(shape), seed)
    save_file(tensors, folder / "model.safetensors")
    byte_level_tokenizer().save(str(folder / "tokenizer.json"))


def write_reference(entries: dict[str, dict[str, Any]]) -> None:
    """Writes `REFERENCE`, a line for each model: its settings, shapes, seed and kept logits."""
    lines = [
        f"{json.dumps(name)}: {json.dumps(entry, separators=(',', ':'))}"
        for name, entry in entries.items()
    ]
    REFERENCE.write_text("{\n" + ",\n".join(lines) + "\n}\n")


def difference(got: torch.Tensor, expected: torch.Tensor) -> float:
    """Largest difference in units of the standard deviation of `expected`; infinite if a NaN."""
    largest = (got.double() - expected.double()).abs().max() / expected.double().std()
    return math.inf if largest.isnan() else float(largest)
