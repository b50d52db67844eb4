# SPDX-License-Identifier: Apache-2.0
"""What an accelerator can take: models, encodings and settings, and the memory that they need."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from speq.model.settings import NO_GUESS, Settings

# Only the names: these load torch, and commands look at an accelerator before that.
if TYPE_CHECKING:
    from speq.hw.accelerator_config import AcceleratorConfig
    from speq.model.checkpoint import Model, ModelConfig
    from speq.model.format import EncodedTensor


def default_capacity(config: AcceleratorConfig, model: ModelConfig) -> int:
    """Entries of a KV cache for the model's whole context, or as many as the accelerator allows."""
    return min(model.context + config.engine.rows, config.engine.max_k)


def check_vector_unit(config: AcceleratorConfig) -> None:
    """Raises ValueError if the accelerator has no vector unit, which all programs here need."""
    if not config.lanes:
        raise ValueError(
            "lanes is 0; only an accelerator with a vector unit can decode a model: take 4 to 64"
        )


def check_model(model: Model) -> None:
    """Raises ValueError if the model has something that the accelerator cannot do."""
    if "head.bias" in model.weights:
        raise ValueError("the head has a bias, which the accelerator's ranking cannot take")


def check_encoded(config: AcceleratorConfig, encoded: Mapping[str, EncodedTensor]) -> None:
    """Raises ValueError, naming the tensor, if the accelerator cannot take an encoded tensor."""
    expected = config.engine.format
    for name, tensor in encoded.items():
        if tensor.drafted_outputs is not None and name != "head":
            raise ValueError(
                f"{name} drafts only part of its outputs, which the accelerator does for the head "
                "alone: encode the model again"
            )
        if tensor.config != expected:
            raise ValueError(
                f"{name} has group {tensor.config.group} and split {tensor.config.split}, which "
                f"the accelerator cannot read; it has {expected.group} and {expected.split}: "
                f"encode the model with --group {expected.group} --split {expected.split}"
            )


def check_settings(config: AcceleratorConfig, settings: Settings) -> None:
    """Raises ValueError if the accelerator cannot speculate so."""
    rows = config.engine.rows
    if settings.rows != rows:
        raise ValueError(f"rows is {settings.rows}; this accelerator's array has {rows}")
    most = config.choices
    if settings.choices > most:
        raise ValueError(f"choices is {settings.choices}; this accelerator ranks 1 to {most}")
    if settings.reranked > most:
        raise ValueError(
            f"reranked is {settings.reranked}; this accelerator ranks 0 (none) to {most}"
        )
    if not settings.policy.guesses:
        return
    if not config.history:
        raise ValueError(
            "the policy guesses, but this accelerator has no history; take one whose guess "
            f"costs are {NO_GUESS}"
        )
    if settings.history != config.history:
        raise ValueError(
            f"history is {settings.history}; this accelerator's has {config.history} "
            f"tokens: take settings or an accelerator (--history) with the same"
        )


def check_capacity(capacity: int, prompt: int, limit: int, rows: int) -> None:
    """Raises ValueError if a KV cache of so many entries cannot hold so many tokens of prompt and
    behind it, decoded on an array of `rows`."""
    needed = prompt + max(0, limit) + rows - 2  # the last verify pass starts at - 2
    if needed > capacity:
        raise ValueError(
            f"{prompt} tokens of prompt and {limit} more need a KV cache of {needed} entries; this "
            f"one has {capacity}"
        )
