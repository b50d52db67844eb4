# SPDX-License-Identifier: Apache-2.0
"""Small models whose drafts are good but not perfect, and encodings with permuted, scaled channels.

With its own head a random model does not just repeat the last token, and linear layers that are
larger than usual make more of the draft's errors.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np

from speq.model.checkpoint import Model, linear_names
from speq.model.format import EncodedTensor, encode
from speq.model.number_format import MAX_SHIFT, FormatConfig
from tests.model.small_models import random_weights, small_config


def drafted_model(architecture: str, seed: int, **changes: object) -> Model:
    """A random model without a tokenizer."""
    small = {"vocab_size": 64, "hidden": 32, "ffn_hidden": 48, "heads": 2, "kv_heads": 1}
    config = small_config(architecture, **({"tied_head": False, "context": 48} | small | changes))
    scale = 1.0 if architecture == "gemma3" else 1.5
    weights = {
        name: (w * scale if name.endswith("_proj") else w).half()
        for name, w in random_weights(config, seed).items()
    }
    return Model(f"random {architecture}", config, weights, tokenizer=None)


def room_of(patterns: np.ndarray) -> np.ndarray:
    """Largest shift [K] that leaves all finite weights of FP16 patterns [O, K] finite."""
    fields = patterns >> 10 & 31
    return 30 - np.where(fields == 31, 0, fields).max(axis=0).astype(int)


def random_channels(
    rng: np.random.Generator, patterns: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """A random order uint16 [K] and a random shift uint8 [K] of FP16 patterns [O, K]."""
    order = rng.permutation(patterns.shape[1]).astype(np.uint16)
    shift = np.minimum(rng.integers(0, MAX_SHIFT + 1, len(order)), room_of(patterns[:, order]))
    return order, shift.astype(np.uint8)


def pass_costs(encoded: Mapping[str, EncodedTensor]) -> tuple[float, float]:
    """Costs of a draft and of a verify pass of a model whose linear layers are all encoded: bits
    that they stream over those of the FP16 weights."""
    plain = sum(16 * math.prod(tensor.shape) for tensor in encoded.values())
    drafted = sum(tensor.draft_bits() for tensor in encoded.values())
    verified = sum(tensor.storage_bits() for tensor in encoded.values())
    return drafted / plain, verified / plain


def rearranged(
    model: Model,
    rng: np.random.Generator,
    config: FormatConfig | None = None,
    drafted_outputs: int | None = None,
) -> dict[str, EncodedTensor]:
    """All linear layers encoded with random orders and shifts; some have only one of the two.

    The head drafts only its first `drafted_outputs` outputs.
    """
    config = config or FormatConfig()
    encoded = {}
    for i, name in enumerate(linear_names(model.config)):
        weights = model.linear_weight(name)
        order, shift = random_channels(rng, weights.contiguous().numpy().view(np.uint16))
        # Weights of one group must stay of like size: one large shift each, and small differences.
        shift = np.repeat(shift[:: config.group], config.group)[: len(shift)] // 2 * 2
        shift = np.where(shift > 0, shift - rng.integers(0, 2, len(shift)), shift)
        channels = {"order": order, "shift": shift.astype(np.uint8)}
        if i % 4 < 2 and name != "head":
            del channels[("order", "shift")[i % 4]]
        rows = drafted_outputs if name == "head" else None
        encoded[name] = encode(weights, config, name=name, drafted_outputs=rows, **channels)
    return encoded
