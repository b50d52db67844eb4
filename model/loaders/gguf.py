# SPDX-License-Identifier: Apache-2.0
"""Models in GGUF files (llama.cpp's format).

`gguf_file` reads the container; here its names and conventions become a configuration, weights and
a tokenizer. Every metadata field in the architecture's own namespace is used, known to have no
influence on the logits, or refused by name. What a file leaves out is what llama.cpp takes for it.
"""

import re
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from speq.model.checkpoint import (
    LINEARS,
    CheckpointError,
    ModelConfig,
    WeightReader,
    collect_weights,
    expect_all_read,
    expect_shape,
    places,
    unpermute_rope,
)
from speq.model.loaders.gguf_file import GgufTensor, Metadata, read_gguf
from speq.model.loaders.gguf_tokenizer import knows, read_tokenizer
from speq.model.tokenizer import Tokenizer

_LINEAR_NAMES = {
    "q_proj": "attn_q",
    "k_proj": "attn_k",
    "v_proj": "attn_v",
    "o_proj": "attn_output",
    "gate_proj": "ffn_gate",
    "up_proj": "ffn_up",
    "down_proj": "ffn_down",
}
_TENSOR_NAMES = {
    "embedding": "token_embd.weight",
    "final_norm": "output_norm.weight",
    "head": "output.weight",
    "attn_norm": "attn_norm.weight",
    "ffn_norm": "ffn_norm.weight",
    "q_norm": "attn_q_norm.weight",
    "k_norm": "attn_k_norm.weight",
    "post_attn_norm": "post_attention_norm.weight",
    "post_ffn_norm": "post_ffw_norm.weight",
    **{name: f"{stored}.weight" for name, stored in _LINEAR_NAMES.items()},
    **{f"{name}.bias": f"{stored}.bias" for name, stored in _LINEAR_NAMES.items()},
}
_ROPE_DIVISORS = "rope_freqs.weight"
_PART = re.compile(r"(.*)-(\d{5})-of-(\d{5})\.gguf")


@dataclass(frozen=True)
class _Family:
    """What an architecture's files have of their own.

    Members: metadata fields besides the common ones; layers that always have a bias (others have
    one if the file does); whether q and k rows are stored for rotary pairs (2i, 2i+1); names of
    tensors that differ.
    """

    fields: tuple[str, ...] = ()
    biases: tuple[str, ...] = ()
    head_norms: bool = False
    post_norms: bool = False
    interleaved: bool = False
    tensors: Mapping[str, str] = field(default_factory=dict)


_FAMILIES = {
    "llama": _Family(interleaved=True),  # Mistral's files say llama too
    "smollm3": _Family(interleaved=True),
    "granite": _Family(
        ("embedding_scale", "residual_scale", "logit_scale", "rope.scaling.finetuned"),
        interleaved=True,
    ),
    "phi3": _Family(
        ("attention.sliding_window",),
        tensors={
            **{f"{x}_proj": "attn_qkv.weight" for x in "qkv"},
            **{f"{x}_proj": "ffn_up.weight" for x in ("gate", "up")},
        },
    ),
    "qwen2": _Family(biases=LINEARS[:3]),
    "qwen3": _Family(head_norms=True),
    "gemma3": _Family(
        (
            "attention.sliding_window",
            "attention.sliding_window_pattern",
            "rope.freq_base_swa",
        ),
        head_norms=True,
        post_norms=True,
    ),
}
# Fields of every architecture that are used below.
_USED = {
    "context_length",
    "embedding_length",
    "feed_forward_length",
    "block_count",
    "attention.head_count",
    "attention.head_count_kv",
    "attention.key_length",
    "attention.value_length",
    "attention.layer_norm_rms_epsilon",
    "attention.scale",
    "rope.dimension_count",
    "rope.freq_base",
    "rope.scaling.type",
    "rope.scaling.factor",
    "rope.scale_linear",
}
# Fields that change the computation, with the values under which it is the one implemented here.
_NEUTRAL: dict[str, tuple] = {
    "attention.causal": (True,),
    "attention.clamp_kqv": (0.0,),
    "attention.max_alibi_bias": (0.0,),
    "attention.sliding_window": (0,),
    "attention.output_scale": (1.0,),
    "attention.temperature_scale": (0.0,),
    "attn_logit_softcapping": (0.0,),
    "final_logit_softcapping": (0.0,),
    "embedding_scale": (0.0, 1.0),
    "residual_scale": (0.0, 1.0),
    "logit_scale": (0.0, 1.0),
    "expert_count": (0,),
    "leading_dense_block_count": (0,),
    "nextn_predict_layers": (0,),
    "pooling_type": (0,),
    "rope.scaling.attn_factor": (0.0, 1.0),
    "tensor_data_layout": ("Meta AI original pth",),
    "use_parallel_residual": (False,),
}
# Sizes that the tensors have as well, and what only refused kinds of RoPE scaling and layers use.
_WITHOUT_INFLUENCE = {
    "vocab_size",
    "expert_used_count",
    "rope.scaling.finetuned",
    "rope.scaling.original_context_length",
    "rope.scaling.yarn_attn_factor",
    "rope.scaling.yarn_beta_fast",
    "rope.scaling.yarn_beta_slow",
    "rope.scaling.yarn_ext_factor",
    "rope.scaling.yarn_log_multiplier",
}
# Namespaces about the file itself; `gguf_file` and `_read_parts` use what matters of them.
_ABOUT_THE_FILE = ("general", "split", "quantize", "imatrix")


def load_gguf(path: Path) -> tuple[ModelConfig, dict[str, torch.Tensor], Tokenizer]:
    """Configuration, FP16 weights and tokenizer of a GGUF file, or of the parts of which it is the
    first. Raises CheckpointError."""
    fields, tensors = _read_parts(path)
    metadata = Metadata(fields)
    config = _config(metadata, tensors)
    weights = collect_weights(config, _weight_reader(config, tensors))
    return config, weights, read_tokenizer(metadata)


def gguf_config(path: Path) -> ModelConfig:
    """Configuration of such a file, from its header. Raises CheckpointError."""
    fields, tensors = _read_parts(path)
    return _config(Metadata(fields), tensors)


def _read_parts(path: Path) -> tuple[dict[str, Any], dict[str, GgufTensor]]:
    """Metadata of a file, and tensors of it and of the parts that follow it."""
    match = _PART.fullmatch(path.name)
    stem, number, count = match.groups() if match else ("", "00001", "00001")
    if int(number) != 1:
        raise CheckpointError(
            f"part {int(number)} of a split model: give the first, {stem}-00001-of-{count}.gguf"
        )
    fields, tensors = read_gguf(path)
    parts = int(fields.get("split.count", 1) or 1)
    if parts == 1 and int(count) == 1:
        return fields, tensors
    if not match or parts != int(count):
        raise CheckpointError(
            f"split.count is {parts}, but the file's name is not that of part 1 of {parts} "
            f"(...-00001-of-{parts:05}.gguf)"
        )
    for i in range(1, parts):
        name = f"{stem}-{i + 1:05}-of-{count}.gguf"
        try:
            more_fields, more = read_gguf(path.with_name(name))
        except CheckpointError as error:
            raise CheckpointError(f"{name}: {error}") from error
        found = (more_fields.get("split.no"), more_fields.get("split.count"))
        if found != (i, parts):
            raise CheckpointError(f"{name}: split.no and split.count are {found}, not {(i, parts)}")
        if twice := tensors.keys() & more.keys():
            raise CheckpointError(f"{name}: tensor {min(twice)!r:.80} is in another part too")
        tensors |= more
    if len(tensors) != fields.get("split.tensors.count", len(tensors)):
        raise CheckpointError(
            f"the {parts} parts have {len(tensors)} tensors, not split.tensors.count = "
            f"{fields['split.tensors.count']}"
        )
    return fields, tensors


def _check_known(metadata: Metadata, architecture: str, family: _Family) -> None:
    """Refuses fields that would change the computation and unknown ones of the architecture."""
    kind = metadata.get("general.type", str, "model")
    if kind != "model":
        raise CheckpointError(f"general.type is {kind!r:.40}, only a 'model' can be loaded")
    others = []
    for key, value in metadata.fields.items():
        namespace, _, name = key.partition(".")
        if namespace == architecture:
            if name in _USED or name in family.fields or name in _WITHOUT_INFLUENCE:
                continue
            if name not in _NEUTRAL:
                raise CheckpointError(f"metadata field {key!r:.80} is unknown: {_shown(value)}")
            if isinstance(value, list | np.ndarray) or value not in _NEUTRAL[name]:
                supported = " or ".join(map(str, _NEUTRAL[name]))
                raise CheckpointError(
                    f"metadata field {key} = {_shown(value)} is not supported, only {supported}"
                )
        elif namespace not in _ABOUT_THE_FILE and not knows(key):
            others.append(key)
    if others:
        names = ", ".join(f"{key!r:.60}" for key in others[:8])
        warnings.warn(f"metadata fields of no known kind are ignored: {names}", stacklevel=2)


def _shown(value: object) -> str:
    return f"{value!r:.40}"


def _config(metadata: Metadata, tensors: dict[str, GgufTensor]) -> ModelConfig:
    architecture = metadata.get("general.architecture", str)
    if architecture not in _FAMILIES:
        raise CheckpointError(
            f"architecture {architecture!r:.60} is not supported, only {', '.join(_FAMILIES)}"
        )
    family = _FAMILIES[architecture]
    _check_known(metadata, architecture, family)

    def entry(key: str, kind: type, default: Any = None) -> Any:
        return metadata.get(f"{architecture}.{key}", kind, default)

    if "token_embd.weight" not in tensors:
        raise CheckpointError("tensor 'token_embd.weight' is missing")
    heads = entry("attention.head_count", int)
    hidden = entry("embedding_length", int)
    blocks = entry("block_count", int)
    if heads < 1:
        raise CheckpointError("attention.head_count is 0")
    head_dim = entry("attention.key_length", int, hidden // heads)
    value_length = entry("attention.value_length", int, head_dim)
    if value_length != head_dim:
        raise CheckpointError(
            f"attention.value_length = {value_length} is not supported, only {head_dim} (keys)"
        )
    gemma = architecture == "gemma3"
    # Gemma 3 27B alone, known by its 62 blocks, scales by another size than head_dim.
    scaled = hidden // heads if gemma and blocks == 62 else max(head_dim, 1)
    config = ModelConfig(
        architecture=architecture,
        vocab_size=tensors["token_embd.weight"].shape[0],
        hidden=hidden,
        ffn_hidden=entry("feed_forward_length", int),
        blocks=blocks,
        heads=heads,
        kv_heads=entry("attention.head_count_kv", int, heads),
        head_dim=head_dim,
        context=entry("context_length", int),
        norm_eps=entry("attention.layer_norm_rms_epsilon", float),
        rope_base=entry("rope.freq_base", float, 1e6 if gemma else 1e4),
        # 0 stands for an absent factor.
        attention_scale=entry("attention.scale", float, 0.0) or max(scaled, 1) ** -0.5,
        tied_head="output.weight" not in tensors,
        activation="gelu_tanh" if gemma else "silu",
        embedding_scale=float(hidden) ** 0.5
        if gemma
        else entry("embedding_scale", float, 0.0) or 1.0,
        residual_scale=entry("residual_scale", float, 0.0) or 1.0,
        logit_scale=1.0 / (entry("logit_scale", float, 0.0) or 1.0),
        biases=tuple(
            name
            for name in LINEARS
            if name in family.biases or f"blk.0.{_LINEAR_NAMES[name]}.bias" in tensors
        ),
        head_norms=family.head_norms,
        post_norms=family.post_norms,
    )
    # Not before the constructor has checked head_dim and blocks.
    windowed = _windowed_blocks(metadata, config)
    return replace(
        config,
        rope_divisors=_rope_divisors(entry, head_dim, tensors),
        sliding_window=entry("attention.sliding_window", int) if windowed else None,
        windowed=windowed,
        local_rope_base=entry("rope.freq_base_swa", float, 1e4) if gemma else None,
        unrotated=_unrotated_blocks(entry, config),
    )


def _windowed_blocks(metadata: Metadata, config: ModelConfig) -> tuple[int, ...]:
    """The blocks with a sliding window: Gemma 3's five of six, Phi-3's all."""
    key = f"{config.architecture}.attention.sliding_window"
    blocks = range(config.blocks)
    if config.architecture == "phi3":
        return tuple(blocks) if metadata.get(key, int, 0) else ()
    if config.architecture != "gemma3":
        return ()
    pattern = metadata.fields.get(key + "_pattern", 6)
    if isinstance(pattern, np.ndarray):
        if pattern.dtype != bool or len(pattern) != config.blocks:
            raise CheckpointError(f"{key}_pattern is not {config.blocks} times true or false")
        return tuple(i for i in blocks if pattern[i])
    if type(pattern) is not int or pattern < 1:
        raise CheckpointError(f"{key}_pattern = {_shown(pattern)} is not a positive number")
    return tuple(i for i in blocks if (i + 1) % pattern)


def _unrotated_blocks(entry: Callable[..., Any], config: ModelConfig) -> tuple[int, ...]:
    """The blocks without rotary embedding: SmolLM3's every fourth, which no field says; all of a
    Granite model whose field switches it off."""
    if config.architecture == "smollm3":
        return tuple(range(3, config.blocks, 4))
    if config.architecture == "granite" and not entry("rope.scaling.finetuned", bool, True):
        return tuple(range(config.blocks))
    return ()


def _rope_divisors(
    entry: Callable[..., Any], head_dim: int, tensors: dict[str, GgufTensor]
) -> tuple[float, ...] | None:
    """Llama 3 files carry the divisors as a tensor, linear scaling as one factor; a factor alone,
    also by its older name, means linear scaling."""
    if entry("rope.dimension_count", int, head_dim) != head_dim:
        raise CheckpointError("RoPE on a part of the head dimension is not supported")
    if "rope_factors_long.weight" in tensors or "rope_factors_short.weight" in tensors:
        raise CheckpointError("RoPE scaling 'longrope' (rope_factors_*.weight) is not supported")
    kind = entry("rope.scaling.type", str, "linear")
    if kind not in ("none", "linear"):
        raise CheckpointError(f"RoPE scaling {kind!r:.40} is not supported, only none and linear")
    factors = {
        key: factor
        for key in ("rope.scaling.factor", "rope.scale_linear")
        if (factor := entry(key, float, 0.0))  # 0 stands for no scaling
    }
    if len({*factors.values()}) > 1:
        raise CheckpointError(f"RoPE scaling factors contradict each other: {factors}")
    factor = next(iter(factors.values()), 1.0)
    if kind == "none" and factor != 1.0:
        raise CheckpointError(f"rope.scaling.type = 'none' contradicts a factor of {factor}")
    divisors = np.ones(head_dim // 2)
    if _ROPE_DIVISORS in tensors:
        tensor = tensors[_ROPE_DIVISORS]
        expect_shape(tensor.name, tensor.shape, divisors.shape)
        divisors = tensor.dequantize()
    elif factor == 1.0:
        return None
    return tuple((divisors * factor).tolist())


def stored_name(name: str, architecture: str) -> str:
    """The file's name of a weight."""
    names = _TENSOR_NAMES | dict(_FAMILIES[architecture].tensors)
    if name.startswith("block."):
        _, block, part = name.split(".", 2)
        return f"blk.{block}.{names[part]}"
    return names[name]


def _weight_reader(config: ModelConfig, tensors: dict[str, GgufTensor]) -> WeightReader:
    where = places(config, lambda name: stored_name(name, config.architecture))
    expect_all_read(tensors, [*(place.tensor for place in where.values()), _ROPE_DIVISORS])
    interleaved = _FAMILIES[config.architecture].interleaved

    def read(name: str, shape: tuple[int, ...]) -> torch.Tensor:
        place = where[name]
        if place.tensor not in tensors:
            raise CheckpointError(f"tensor {place.tensor!r} is missing")
        tensor = tensors[place.tensor]
        expect_shape(place.tensor, tensor.shape, place.shape)
        if tensor.shape != shape:  # one of several weights in it
            tensor = tensor.part(place.rows)
        weight = torch.from_numpy(tensor.dequantize())
        if interleaved and name.removesuffix(".bias").endswith(("q_proj", "k_proj")):
            weight = unpermute_rope(weight, config.head_dim)
        return weight

    return read
