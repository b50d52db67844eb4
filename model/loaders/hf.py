# SPDX-License-Identifier: Apache-2.0
"""Reads Hugging Face folders: config.json, model*.safetensors and tokenizer.json.

Llama, Qwen2, Qwen3 and Gemma 3 (text). Weights are parsed by `safetensors`, which checks its header
against the file, tokenizers by `tokenizers`; pickled weights (.bin, .pt) are never read. A setting
that would change the computation and is not implemented is refused by name.
"""

import contextlib
import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import safetensors
import torch

from speq.model.checkpoint import (
    CheckpointError,
    ModelConfig,
    WeightReader,
    check_architecture,
    collect_weights,
    expect_all_read,
    expect_shape,
    tensor_shapes,
)
from speq.model.loaders.hf_tokenizer import read_tokenizer
from speq.model.loaders.json_file import read_json
from speq.model.tokenizer import Tokenizer

_TENSOR_NAMES = {
    "embedding": "model.embed_tokens.weight",
    "final_norm": "model.norm.weight",
    "head": "lm_head.weight",
    "attn_norm": "input_layernorm.weight",
    "ffn_norm": "post_attention_layernorm.weight",
    "q_norm": "self_attn.q_norm.weight",
    "k_norm": "self_attn.k_norm.weight",
    **{f"{x}_proj": f"self_attn.{x}_proj.weight" for x in "qkvo"},
    **{f"{x}_proj.bias": f"self_attn.{x}_proj.bias" for x in "qkv"},
    **{f"{x}_proj": f"mlp.{x}_proj.weight" for x in ("gate", "up", "down")},
}
_GEMMA_NAMES = {
    "post_attn_norm": "post_attention_layernorm.weight",
    "ffn_norm": "pre_feedforward_layernorm.weight",
    "post_ffn_norm": "post_feedforward_layernorm.weight",
}
_DTYPES = ("F16", "BF16", "F32")
# Settings that change the computation, with the values under which it is the one implemented here.
_NEUTRAL = {
    "attention_bias": (None, False),
    "mlp_bias": (None, False),
    "use_sliding_window": (None, False),
    "partial_rotary_factor": (None, 1.0),
    "quantization_config": (None,),
    "attn_logit_softcapping": (None,),
    "final_logit_softcapping": (None,),
    "use_bidirectional_attention": (None, False),
}


def load_hf(folder: Path) -> tuple[ModelConfig, dict[str, torch.Tensor], Tokenizer]:
    """Configuration, FP16 weights and tokenizer of a folder. Raises CheckpointError."""
    settings = _Settings(read_json(folder / "config.json"))
    config = _config(settings)
    with contextlib.ExitStack() as stack:
        weights = collect_weights(config, _weight_reader(folder, config, stack))
    return config, weights, read_tokenizer(folder, settings.values)


@dataclass(frozen=True)
class _Settings:
    """Typed access to a JSON object; null is the same as absent."""

    values: dict[str, Any]

    def get(self, key: str, kind: type, default: Any = None) -> Any:
        """Value of `key`, an integer also where a number is wanted; required without a default."""
        value = self.values.get(key)
        if value is None:
            value = default
        if value is None:
            raise CheckpointError(f"setting {key!r} is missing")
        if type(value) is int and abs(value) >= 1 << 53:
            raise CheckpointError(f"setting {key!r} is absurdly large")
        if kind is float and type(value) is int:
            value = float(value)
        if type(value) is not kind:
            raise CheckpointError(f"setting {key!r} has the wrong type")
        return value


def _config(settings: _Settings) -> ModelConfig:
    get = settings.get
    model_type = get("model_type", str)
    architecture = "gemma3" if model_type == "gemma3_text" else model_type
    if model_type == "gemma3":
        raise CheckpointError("multimodal 'gemma3' is not supported, only 'gemma3_text'")
    check_architecture(architecture)
    gemma = architecture == "gemma3"
    activation = {"hidden_activation": "gelu_pytorch_tanh"} if gemma else {"hidden_act": "silu"}
    implemented = _NEUTRAL | {name: (None, value) for name, value in activation.items()}
    for key, allowed in implemented.items():
        if settings.values.get(key) not in allowed:
            raise CheckpointError(f"setting {key} = {settings.values[key]!r:.60} is not supported")
    hidden, heads = get("hidden_size", int), get("num_attention_heads", int)
    if heads < 1:
        raise CheckpointError("num_attention_heads is not positive")
    head_dim = get("head_dim", int, hidden // heads)
    rope, local_rope = _rope_settings(settings)
    pattern = get("sliding_window_pattern", int, get("_sliding_window_pattern", int, 6))
    base = get("rope_theta", float, rope.get("rope_theta", float, 1e6 if gemma else 1e4))
    local_base = local_rope.get("rope_theta", float, get("rope_local_base_freq", float, 1e4))
    config = ModelConfig(
        architecture=architecture,
        vocab_size=get("vocab_size", int),
        hidden=hidden,
        ffn_hidden=get("intermediate_size", int),
        blocks=get("num_hidden_layers", int),
        heads=heads,
        kv_heads=get("num_key_value_heads", int, heads),
        head_dim=head_dim,
        context=get("max_position_embeddings", int),
        norm_eps=get("rms_norm_eps", float, 1e-6),
        rope_base=base,
        attention_scale=_attention_scale(settings, head_dim, gemma),
        tied_head=get("tie_word_embeddings", bool, gemma),
        activation="gelu_tanh" if gemma else "silu",
        embedding_scale=math.sqrt(max(hidden, 1)) if gemma else 1.0,
        sliding_window=get("sliding_window", int) if gemma else None,
        global_every=pattern if gemma else 1,
        local_rope_base=local_base,
    )
    _check_layer_types(settings, config)
    # Not before the constructor has checked head_dim and base.
    return replace(config, rope_divisors=_rope_divisors(rope, base, head_dim))


def _rope_settings(settings: _Settings) -> tuple[_Settings, _Settings]:
    """RoPE settings of global and of sliding-window blocks; newer files of Gemma give both."""
    both = settings.get("rope_parameters", dict, settings.get("rope_scaling", dict, {}))
    if "full_attention" not in both:
        return _Settings(both), _Settings({})
    rope = _Settings(both)
    local = _Settings(rope.get("sliding_attention", dict, {}))
    if local.get("rope_type", str, "default") != "default":
        raise CheckpointError("RoPE scaling of sliding-window blocks is not supported")
    return _Settings(rope.get("full_attention", dict)), local


def _rope_divisors(rope: _Settings, base: float, head_dim: int) -> tuple[float, ...] | None:
    """What divides the rotary frequencies: nothing, one factor ("linear"), or Llama 3's rule."""
    kind = rope.get("rope_type", str, rope.get("type", str, "default"))
    if kind == "default":
        return None
    if kind == "linear":
        return (rope.get("factor", float),) * (head_dim // 2)
    if kind != "llama3":
        raise CheckpointError(f"RoPE scaling {kind!r:.40} is not supported")
    factor = rope.get("factor", float)
    low = rope.get("low_freq_factor", float)
    high = rope.get("high_freq_factor", float)
    trained = rope.get("original_max_position_embeddings", float)
    if not (factor >= 1 and 0 < low < high and trained > 0):
        raise CheckpointError("RoPE scaling 'llama3' has impossible factors")
    divisors = []
    for i in range(head_dim // 2):
        # Turns that the pair makes within the original context: few are slowed down, many are not.
        turns = trained / (2 * math.pi * base ** (2 * i / head_dim))
        kept = min(max((turns - low) / (high - low), 0.0), 1.0)
        divisors.append(1.0 / (kept + (1.0 - kept) / factor))
    return tuple(divisors)


def _attention_scale(settings: _Settings, head_dim: int, gemma: bool) -> float:
    scalar = settings.get("query_pre_attn_scalar", float, 256.0) if gemma else float(head_dim)
    if scalar <= 0:
        raise CheckpointError("the attention scale is not positive")
    return scalar**-0.5


def _check_layer_types(settings: _Settings, config: ModelConfig) -> None:
    """Raises CheckpointError unless the list of attention types, if any, is the regular pattern."""
    kinds = settings.get("layer_types", list, [])
    expected = [
        "full_attention" if config.is_global(i) else "sliding_attention" for i in range(len(kinds))
    ]
    if kinds and (kinds != expected or len(kinds) != config.blocks):
        raise CheckpointError("setting layer_types is not the regular pattern")


def stored_name(name: str, gemma: bool) -> str:
    """The file's name of a weight."""
    names = _TENSOR_NAMES | _GEMMA_NAMES if gemma else _TENSOR_NAMES
    if name.startswith("block."):
        _, block, part = name.split(".", 2)
        return f"model.layers.{block}.{names[part]}"
    return names[name]


def _weight_reader(folder: Path, config: ModelConfig, stack: contextlib.ExitStack) -> WeightReader:
    """Opens the folder's safetensors files and returns the function that reads a weight."""
    files = {}
    for path in sorted(folder.glob("model*.safetensors")):
        try:
            file = stack.enter_context(safetensors.safe_open(path, framework="pt"))
        except safetensors.SafetensorError as error:
            raise CheckpointError(f"{path.name}: {error}") from error
        for name in file.keys():  # noqa: SIM118 (not a dict)
            if name in files:
                raise CheckpointError(f"tensor {name!r:.80} is in two files")
            files[name] = file
    if not files:
        raise CheckpointError("no model*.safetensors with weights (pickled weights are not read)")
    gemma = config.architecture == "gemma3"
    stored_names = {name: stored_name(name, gemma) for name, _ in tensor_shapes(config)}
    # Old files store the rotary frequencies, tied models sometimes the head once more.
    unused = [name for name in files if name.endswith("rotary_emb.inv_freq")]
    expect_all_read(files, [*stored_names.values(), *unused, _TENSOR_NAMES["head"]])

    def read(name: str, shape: tuple[int, ...]) -> torch.Tensor:
        stored = stored_names[name]
        if stored not in files:
            raise CheckpointError(f"tensor {stored!r} is missing")
        entry = files[stored].get_slice(stored)
        if entry.get_dtype() not in _DTYPES:
            raise CheckpointError(f"tensor {stored!r} is {entry.get_dtype()}")
        expect_shape(stored, tuple(entry.get_shape()), shape)
        weight = files[stored].get_tensor(stored)
        # Gemma stores a norm's factor minus one.
        return weight.to(torch.float32) + 1.0 if gemma and name.endswith("norm") else weight

    return read
