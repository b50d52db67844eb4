# SPDX-License-Identifier: Apache-2.0
"""Models in GGUF files (llama.cpp's format): Llama, Qwen2, Qwen3 and Gemma 3.

`gguf_file` reads the container; here its names and conventions become a configuration, weights and
a tokenizer.
"""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from speq.model.checkpoint import (
    CheckpointError,
    ModelConfig,
    WeightReader,
    check_architecture,
    collect_weights,
    expect_all_read,
    expect_shape,
    unpermute_rope,
)
from speq.model.loaders.gguf_file import GgufTensor, Metadata, read_gguf
from speq.model.loaders.gguf_tokenizer import read_tokenizer
from speq.model.tokenizer import Tokenizer

_TENSOR_NAMES = {
    "embedding": "token_embd.weight",
    "final_norm": "output_norm.weight",
    "head": "output.weight",
    "attn_norm": "attn_norm.weight",
    "ffn_norm": "ffn_norm.weight",
    "q_proj": "attn_q.weight",
    "k_proj": "attn_k.weight",
    "v_proj": "attn_v.weight",
    "o_proj": "attn_output.weight",
    "gate_proj": "ffn_gate.weight",
    "up_proj": "ffn_up.weight",
    "down_proj": "ffn_down.weight",
    "q_proj.bias": "attn_q.bias",
    "k_proj.bias": "attn_k.bias",
    "v_proj.bias": "attn_v.bias",
    "q_norm": "attn_q_norm.weight",
    "k_norm": "attn_k_norm.weight",
    "post_attn_norm": "post_attention_norm.weight",
    "post_ffn_norm": "post_ffw_norm.weight",
}


def load_gguf(path: Path) -> tuple[ModelConfig, dict[str, torch.Tensor], Tokenizer]:
    """Configuration, FP16 weights and tokenizer of a GGUF file. Raises CheckpointError."""
    fields, tensors = read_gguf(path)
    metadata = Metadata(fields)
    config = _config(metadata, tensors)
    weights = collect_weights(config, _weight_reader(config, tensors))
    expect_all_read(tensors, [*map(stored_name, weights), "rope_freqs.weight"])
    return config, weights, read_tokenizer(metadata)


def _config(metadata: Metadata, tensors: dict[str, GgufTensor]) -> ModelConfig:
    architecture = metadata.get("general.architecture", str)
    check_architecture(architecture)

    def field(key: str, kind: type, default: Any = None) -> Any:
        return metadata.get(f"{architecture}.{key}", kind, default)

    if "token_embd.weight" not in tensors:
        raise CheckpointError("tensor 'token_embd.weight' is missing")
    heads = field("attention.head_count", int)
    hidden = field("embedding_length", int)
    blocks = field("block_count", int)
    if heads < 1:
        raise CheckpointError("attention.head_count is 0")
    head_dim = field("attention.key_length", int, hidden // heads)
    if field("rope.scaling.type", str, "none") not in ("none", "linear"):
        raise CheckpointError(f"RoPE scaling {field('rope.scaling.type', str)!r:.40} not supported")
    if field("expert_count", int, 0):
        raise CheckpointError("mixture-of-experts models are not supported")
    gemma = architecture == "gemma3"
    config = ModelConfig(
        architecture=architecture,
        vocab_size=tensors["token_embd.weight"].shape[0],
        hidden=hidden,
        ffn_hidden=field("feed_forward_length", int),
        blocks=blocks,
        heads=heads,
        kv_heads=field("attention.head_count_kv", int, heads),
        head_dim=head_dim,
        context=field("context_length", int),
        norm_eps=field("attention.layer_norm_rms_epsilon", float),
        rope_base=field("rope.freq_base", float, 1_000_000.0 if gemma else 10_000.0),
        # Gemma 3 27B alone, known by its 62 blocks, scales by another size than head_dim.
        attention_scale=(hidden // heads if gemma and blocks == 62 else max(head_dim, 1)) ** -0.5,
        tied_head="output.weight" not in tensors,
        activation="gelu_tanh" if gemma else "silu",
        embedding_scale=float(hidden) ** 0.5 if gemma else 1.0,
        sliding_window=field("attention.sliding_window", int) if gemma else None,
        global_every=6 if gemma else 1,
    )
    # Not before the constructor has checked head_dim.
    return replace(config, rope_divisors=_rope_divisors(field, head_dim, tensors))


def _rope_divisors(
    field: Callable[..., Any], head_dim: int, tensors: dict[str, GgufTensor]
) -> tuple[float, ...] | None:
    """Llama 3 files carry the divisors as a tensor, linear scaling as one factor."""
    if field("rope.dimension_count", int, head_dim) != head_dim:
        raise CheckpointError("RoPE on a part of the head dimension is not supported")
    if "rope_freqs.weight" in tensors:
        tensor = tensors["rope_freqs.weight"]
        expect_shape(tensor.name, tensor.shape, (head_dim // 2,))
        return tuple(tensor.dequantize().tolist())
    if field("rope.scaling.type", str, "none") == "linear":
        return (field("rope.scaling.factor", float),) * (head_dim // 2)
    return None


def stored_name(name: str) -> str:
    """The file's name of a weight."""
    if name.startswith("block."):
        _, block, part = name.split(".", 2)
        return f"blk.{block}.{_TENSOR_NAMES[part]}"
    return _TENSOR_NAMES[name]


def _weight_reader(config: ModelConfig, tensors: dict[str, GgufTensor]) -> WeightReader:
    def read(name: str, shape: tuple[int, ...]) -> torch.Tensor:
        stored = stored_name(name)
        if stored not in tensors:
            raise CheckpointError(f"tensor {stored!r} is missing")
        tensor = tensors[stored]
        expect_shape(stored, tensor.shape, shape)
        weight = torch.from_numpy(tensor.dequantize())
        # llama.cpp stores Llama's (not the others') q and k rows for rotary pairs (2i, 2i+1).
        if config.architecture == "llama" and name.endswith(("q_proj", "k_proj")):
            weight = unpermute_rope(weight, config.head_dim)
        return weight

    return read
