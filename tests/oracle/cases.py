# SPDX-License-Identifier: Apache-2.0
"""The table of small models: every architecture and trait that checkpoints are to be loaded with.

A new architecture is a line here; checks of its logits, its greedy text and the effect of each of
its settings follow from it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from tests.model.small_models import VOCABULARY


@dataclass(frozen=True)
class Case:
    """A small model.

    `settings` are those of transformers' configuration class, which writes config.json; with
    `verbatim` they are config.json themselves, as published in older spellings. `shard_bytes`
    splits the weights into files of that size; `head` stores a head that differs from the
    embedding also where the settings tie them.
    """

    name: str
    settings: dict[str, Any]
    verbatim: bool = False
    dtype: torch.dtype = torch.float32
    shard_bytes: int | None = None
    head: bool = False


def model(model_type: str, **settings) -> dict[str, Any]:
    """Settings of a small model of that type, with what differs from these sizes."""
    sizes = {
        "model_type": model_type,
        "vocab_size": VOCABULARY["bytes"],
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
        "rms_norm_eps": 1e-5,
        "bos_token_id": None,
        "eos_token_id": 2,
        "pad_token_id": None,
    }
    return sizes | settings


def rope(theta: float = 10_000.0, kind: str = "default", **settings) -> dict[str, Any]:
    """RoPE settings in the present spelling."""
    return {"rope_parameters": {"rope_theta": theta, "rope_type": kind, **settings}}


LLAMA3 = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    # Of these wavelengths (6 to 600 positions) some are kept, some divided, some in between.
    "original_max_position_embeddings": 64,
}
GEMMA = {"head_dim": 16, "query_pre_attn_scalar": 20, "sliding_window": 5, "num_hidden_layers": 4}
GEMMA_PATTERN = ["sliding_attention", "sliding_attention", "full_attention", "sliding_attention"]
GEMMA_ROPE = {
    "full_attention": {"rope_type": "default", "rope_theta": 50_000.0},
    "sliding_attention": {"rope_type": "default", "rope_theta": 700.0},
}
GRANITE = {
    "embedding_multiplier": 6.0,
    "logits_scaling": 3.0,
    "residual_multiplier": 0.22,
    "attention_multiplier": 0.125,
}
WINDOWS = {"use_sliding_window": True, "sliding_window": 5, "num_hidden_layers": 4}

CASES = (
    # Llama.
    Case("llama", model("llama")),
    Case("llama MHA", model("llama", num_key_value_heads=4)),
    Case("llama MQA", model("llama", num_key_value_heads=1)),
    Case("llama tied head", model("llama", tie_word_embeddings=True)),
    Case("llama tied flag, own head", model("llama", tie_word_embeddings=True), head=True),
    Case("llama head_dim", model("llama", head_dim=24)),
    Case("llama rope_theta", model("llama", **rope(500.0))),
    Case("llama linear RoPE", model("llama", **rope(kind="linear", factor=4.0))),
    Case("llama llama3 RoPE", model("llama", **rope(kind="llama3", **LLAMA3))),
    Case("llama attention_bias", model("llama", attention_bias=True)),
    Case("llama mlp_bias", model("llama", mlp_bias=True)),
    Case("llama both biases", model("llama", attention_bias=True, mlp_bias=True)),
    Case("llama F16", model("llama"), dtype=torch.float16),
    Case("llama BF16", model("llama"), dtype=torch.bfloat16),
    Case("llama shards", model("llama"), shard_bytes=100_000),
    Case("llama odd sizes", model("llama", hidden_size=44, intermediate_size=86, head_dim=6)),
    # Llama, as published: older spellings, settings of older versions.
    Case(
        "llama published rope_theta",
        model("llama", rope_theta=500.0, rope_scaling=None, torch_dtype="float16", use_cache=True),
        verbatim=True,
    ),
    Case(
        "llama published linear, type",
        model("llama", rope_scaling={"type": "linear", "factor": 4.0}),
        verbatim=True,
    ),
    Case(
        "llama published linear, rope_type",
        model("llama", rope_scaling={"rope_type": "linear", "factor": 4.0}, rope_theta=700.0),
        verbatim=True,
    ),
    Case(
        "llama published llama3, rope_type",
        model("llama", rope_scaling=LLAMA3 | {"rope_type": "llama3"}, rope_theta=500.0),
        verbatim=True,
    ),
    Case(
        "llama published llama3, type",
        model("llama", rope_scaling=LLAMA3 | {"type": "llama3"}, rope_theta=500.0),
        verbatim=True,
    ),
    Case(
        "llama published defaults",
        {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "vocab_size": VOCABULARY["bytes"],
            "hidden_size": 64,
            "intermediate_size": 96,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "max_position_embeddings": 128,
        },
        verbatim=True,
    ),
    # Mistral.
    Case("mistral window", model("mistral", sliding_window=5)),
    Case("mistral no window", model("mistral", sliding_window=None)),
    Case("mistral head_dim, theta", model("mistral", head_dim=24, **rope(700.0))),
    Case(
        "mistral published",
        model("mistral", sliding_window=5, rope_theta=700.0, torch_dtype="bfloat16"),
        verbatim=True,
    ),
    # SmolLM3.
    Case("smollm3", model("smollm3", num_hidden_layers=4)),
    Case("smollm3 interval 2", model("smollm3", num_hidden_layers=4, no_rope_layer_interval=2)),
    Case("smollm3 list", model("smollm3", no_rope_layers=[0, 1, 0])),
    Case("smollm3 own head", model("smollm3", tie_word_embeddings=False, **rope(500.0))),
    Case("smollm3 attention_bias", model("smollm3", attention_bias=True)),
    Case("smollm3 mlp_bias", model("smollm3", mlp_bias=True)),
    Case("smollm3 windows", model("smollm3", no_rope_layer_interval=2, **WINDOWS)),
    Case(
        "smollm3 published",
        model(
            "smollm3",
            num_hidden_layers=4,
            no_rope_layers=[1, 1, 1, 0],
            no_rope_layer_interval=4,
            layer_types=["full_attention"] * 4,
            max_window_layers=28,
            pretraining_tp=2,
            rope_scaling=None,
            rope_theta=5_000_000.0,
            sliding_window=None,
            use_sliding_window=False,
            attention_bias=False,
            mlp_bias=False,
        ),
        verbatim=True,
    ),
    # Phi-3.
    Case("phi3", model("phi3")),
    Case("phi3 window", model("phi3", sliding_window=5, num_key_value_heads=4)),
    Case("phi3 tied head", model("phi3", tie_word_embeddings=True, **rope(700.0))),
    Case(
        "phi3 published",
        model("phi3", sliding_window=5, rope_theta=700.0, rope_scaling=None, resid_pdrop=0.0),
        verbatim=True,
    ),
    # Qwen 2 and 3.
    Case("qwen2", model("qwen2")),
    Case("qwen2 tied head", model("qwen2", tie_word_embeddings=True, **rope(1_000_000.0))),
    Case("qwen2 linear RoPE", model("qwen2", **rope(kind="linear", factor=4.0))),
    Case("qwen2 windows", model("qwen2", max_window_layers=2, **WINDOWS)),
    Case("qwen2 windows everywhere", model("qwen2", max_window_layers=0, **WINDOWS)),
    Case("qwen2 windows nowhere", model("qwen2", max_window_layers=4, **WINDOWS)),
    Case(
        "qwen2 published",
        model(
            "qwen2",
            rope_theta=1_000_000.0,
            sliding_window=5,
            use_sliding_window=False,
            max_window_layers=2,
            attention_dropout=0.0,
            use_mrope=False,
            torch_dtype="bfloat16",
        ),
        verbatim=True,
    ),
    Case(
        "qwen2 published windows",
        model("qwen2", rope_theta=1_000_000.0, max_window_layers=2, **WINDOWS),
        verbatim=True,
    ),
    Case("qwen3", model("qwen3", head_dim=16)),
    Case("qwen3 head_dim", model("qwen3", head_dim=24, tie_word_embeddings=True)),
    Case("qwen3 attention_bias", model("qwen3", head_dim=16, attention_bias=True)),
    Case("qwen3 windows", model("qwen3", head_dim=16, max_window_layers=1, **WINDOWS)),
    Case(
        "qwen3 layer_types",
        model("qwen3", head_dim=16, layer_types=GEMMA_PATTERN, **WINDOWS),
    ),
    Case(
        "qwen3 published",
        model(
            "qwen3",
            head_dim=24,
            attention_bias=False,
            max_window_layers=3,
            rope_scaling=None,
            rope_theta=1_000_000,
            sliding_window=None,
            tie_word_embeddings=True,
            use_sliding_window=False,
        ),
        verbatim=True,
    ),
    # Gemma 3.
    Case("gemma3", model("gemma3_text", **GEMMA)),
    Case("gemma3 pattern", model("gemma3_text", layer_types=GEMMA_PATTERN, **GEMMA)),
    Case("gemma3 own head", model("gemma3_text", tie_word_embeddings=False, **GEMMA)),
    Case("gemma3 attention_bias", model("gemma3_text", attention_bias=True, **GEMMA)),
    Case(
        "gemma3 bases",
        model("gemma3_text", layer_types=GEMMA_PATTERN, rope_parameters=GEMMA_ROPE, **GEMMA),
    ),
    Case(
        "gemma3 linear RoPE",
        model(
            "gemma3_text",
            layer_types=GEMMA_PATTERN,
            rope_parameters=GEMMA_ROPE
            | {"full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 50_000.0}},
            **GEMMA,
        ),
    ),
    Case(
        "gemma3 irregular layer_types",
        model("gemma3_text", layer_types=["full_attention", *GEMMA_PATTERN[:3]], **GEMMA),
    ),
    Case(
        "gemma3 published pattern",
        model(
            "gemma3_text",
            sliding_window_pattern=3,
            rope_theta=50_000.0,
            rope_local_base_freq=700.0,
            rope_scaling={"factor": 8.0, "rope_type": "linear"},
            attn_logit_softcapping=None,
            final_logit_softcapping=None,
            cache_implementation="hybrid",
            attention_bias=False,
            hidden_activation="gelu_pytorch_tanh",
            **GEMMA,
        ),
        verbatim=True,
    ),
    Case(
        "gemma3 published layer_types",
        model(
            "gemma3_text",
            _sliding_window_pattern=3,
            layer_types=GEMMA_PATTERN,
            rope_theta=50_000.0,
            rope_local_base_freq=700.0,
            rope_scaling=None,
            attn_logit_softcapping=None,
            final_logit_softcapping=None,
            use_bidirectional_attention=False,
            attention_bias=False,
            hidden_activation="gelu_pytorch_tanh",
            **GEMMA,
        ),
        verbatim=True,
        dtype=torch.bfloat16,
    ),
    # Granite.
    Case("granite", model("granite", **GRANITE)),
    Case("granite neutral", model("granite")),
    Case("granite biases", model("granite", attention_bias=True, mlp_bias=True, **GRANITE)),
    Case(
        "granite published",
        model("granite", tie_word_embeddings=True, rope_theta=700.0, rope_scaling=None, **GRANITE),
        verbatim=True,
    ),
)
