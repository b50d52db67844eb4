# SPDX-License-Identifier: Apache-2.0
"""llama2.c files: no library reads them, so a Llama that transformers computes is converted."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from speq.model.loaders import load_model
from tests.model.reference_models import TEXT, seeded_tokens
from tests.model.small_models import VOCABULARY, write_llama2c
from tests.oracle.cases import Case, model
from tests.oracle.hf_models import build, compare_logits, logits, read
from tests.oracle.table import Check, Row


def check(version: int, tied: bool, folder: Path, seed: int) -> Iterator[Row]:
    settings = model("llama", vocab_size=VOCABULARY["pieces"], tie_word_embeddings=tied)
    build(folder, Case("", settings), seed)
    source = load_model(folder)
    path = folder / "model.bin"
    weights = {name: weight.float() for name, weight in source.weights.items()}
    write_llama2c(path, source.config, weights, version)
    tokens = seeded_tokens(VOCABULARY["pieces"], TEXT, seed)
    yield from compare_logits(load_model(path), logits(read(folder), tokens), tokens)


def checks() -> list[Check]:
    return [
        Check(
            f"llama2.c version {version}",
            lambda folder, seed, version=version, tied=tied: check(version, tied, folder, seed),
            "tied head" if tied else "own head",
        )
        for version in (0, 1)
        for tied in (True, False)
    ]
