# SPDX-License-Identifier: Apache-2.0
"""Small models whose drafts are good but not perfect, and encodings of them.

With its own head a random model does not just repeat the last token, and linear layers that are
larger than usual make more of the draft's errors.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np

from speq.model.checkpoint import Model, linear_names
from speq.model.format import EncodedTensor, encode, fit_scale_codes
from speq.model.number_format import FormatConfig
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


def pass_costs(encoded: Mapping[str, EncodedTensor]) -> tuple[float, float]:
    """Costs of a draft and of a verify pass of a model whose linear layers are all encoded: bits
    that they stream over those of the FP16 weights."""
    plain = sum(16 * math.prod(tensor.shape) for tensor in encoded.values())
    drafted = sum(tensor.draft_bits() for tensor in encoded.values())
    verified = sum(tensor.storage_bits() for tensor in encoded.values())
    return drafted / plain, verified / plain


def randomly_scaled(
    model: Model,
    rng: np.random.Generator,
    config: FormatConfig | None = None,
    drafted_outputs: int | None = None,
) -> dict[str, EncodedTensor]:
    """All linear layers encoded with scale codes that are the best or beside the best.

    The head drafts only its first `drafted_outputs` outputs.
    """
    config = config or FormatConfig()
    encoded = {}
    for name in linear_names(model.config):
        weights = model.linear_weight(name)
        codes = fit_scale_codes(weights, config).astype(int)
        codes = np.clip(codes + rng.integers(-1, 2, codes.shape), 0, 7)
        rows = drafted_outputs if name == "head" else None
        encoded[name] = encode(weights, config, codes, name, drafted_outputs=rows)
    return encoded
