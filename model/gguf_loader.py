# SPDX-License-Identifier: Apache-2.0
"""Reads GGUF files (llama.cpp's format) with the package `gguf`: Llama, Qwen2, Qwen3 and Gemma 3.

`gguf.GGUFReader` trusts the file: it makes several Python objects per metadata element and believes
every count. `check_header` therefore walks the file first and compares all counts, sizes and
offsets with the file's length. Reference: GGUF specification, version 3.
"""

import struct
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
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
from speq.model.tokenizer import Tokenizer, byte_level_bpe, sentencepiece_bpe

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
_SCALAR_BYTES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
_STRING, _ARRAY = 8, 9
_MAX_ELEMENTS = 1 << 22  # array elements in all metadata; a 262,144-token vocabulary has a million
_CONTROL, _USER_DEFINED = 3, 4  # token types that are matched as a whole


def load_gguf(path: Path) -> tuple[ModelConfig, dict[str, torch.Tensor], Tokenizer]:
    """Configuration, FP16 weights and tokenizer of a GGUF file. Raises CheckpointError."""
    check_header(path)
    try:
        reader = gguf.GGUFReader(path)
        fields = {name: field.contents() for name, field in reader.fields.items()}
    except (ValueError, KeyError, IndexError, TypeError, OverflowError) as error:
        raise CheckpointError(f"damaged GGUF header: {error}") from error
    metadata = _Metadata(fields)
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    config = _config(metadata, tensors)
    weights = collect_weights(config, _weight_reader(config, tensors))
    expect_all_read(tensors, [*map(_stored_name, weights), "rope_freqs.weight"])
    return config, weights, _tokenizer(metadata)


def check_header(path: Path) -> None:
    """Raises CheckpointError unless every count, string, array and tensor lies inside the file."""
    size = path.stat().st_size
    with path.open("rb") as file:
        try:
            _HeaderCheck(file, size).run()
        except struct.error as error:
            raise CheckpointError("truncated GGUF header") from error


class _HeaderCheck:
    """One walk over a GGUF header; reads lengths only and skips the rest."""

    def __init__(self, file: Any, size: int) -> None:
        self.file, self.size = file, size
        self.elements = 0
        self.alignment = gguf.GGUF_DEFAULT_ALIGNMENT

    def run(self) -> None:
        magic, version, tensor_count, kv_count = self.unpack("<4sIQQ")
        if magic != b"GGUF":
            raise CheckpointError("not a GGUF file")
        if version not in (2, 3):
            raise CheckpointError(f"GGUF version {version} is not supported, only 2 and 3")
        self.count_elements(tensor_count)
        self.count_elements(kv_count)
        for _ in range(kv_count):
            key = self.string()
            (kind,) = self.unpack("<I")
            if key == b"general.alignment":
                (self.alignment,) = self.unpack("<I")
                if kind != 4 or self.alignment.bit_count() != 1 or self.alignment > 1 << 16:
                    raise CheckpointError("general.alignment is not a power of two")
            else:
                self.value(kind)
        extents = [self.tensor() for _ in range(tensor_count)]
        start = -(-self.file.tell() // self.alignment) * self.alignment
        end = start
        for name, offset, length in sorted(extents, key=lambda extent: extent[1]):
            if start + offset < end:
                raise CheckpointError(f"tensor {name!r} overlaps another")
            end = start + offset + length
            if end > self.size:
                raise CheckpointError(f"truncated: tensor {name!r} ends beyond the file")

    def unpack(self, layout: str) -> tuple:
        return struct.unpack(layout, self.file.read(struct.calcsize(layout)))

    def skip(self, count: int) -> None:
        if count > self.size - self.file.tell():
            raise CheckpointError("truncated GGUF header")
        self.file.seek(count, 1)

    def count_elements(self, count: int) -> None:
        self.elements += count
        if self.elements > _MAX_ELEMENTS:
            raise CheckpointError("GGUF header announces an absurd number of elements")

    def string(self) -> bytes:
        (length,) = self.unpack("<Q")
        if length > 1 << 24:
            raise CheckpointError("GGUF header has an absurdly long string")
        text = self.file.read(length)
        if len(text) != length:
            raise CheckpointError("truncated GGUF header")
        return text

    def value(self, kind: int) -> None:
        if kind == _STRING:
            self.string()
        elif kind == _ARRAY:
            element, count = self.unpack("<IQ")
            self.count_elements(count)
            if element == _STRING:
                for _ in range(count):
                    self.string()
            else:  # arrays of arrays occur in no model file
                self.skip(count * self.scalar_bytes(element))
        else:
            self.skip(self.scalar_bytes(kind))

    def scalar_bytes(self, kind: int) -> int:
        if kind not in _SCALAR_BYTES:
            raise CheckpointError(f"GGUF header has an unknown value type {kind}")
        return _SCALAR_BYTES[kind]

    def tensor(self) -> tuple[str, int, int]:
        """Name, offset in the data section and length in bytes of the next tensor."""
        name = self.string().decode("utf-8", "replace")
        (rank,) = self.unpack("<I")
        if not 1 <= rank <= 4:
            raise CheckpointError(f"tensor {name!r:.80} has {rank} dimensions")
        dims = self.unpack(f"<{rank}Q")
        kind, offset = self.unpack("<IQ")
        try:
            block, block_bytes = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType(kind)]
        except (ValueError, KeyError) as error:
            raise CheckpointError(f"tensor {name!r:.80} has unknown type {kind}") from error
        if dims[0] % block:
            raise CheckpointError(f"tensor {name!r:.80}: rows are not whole blocks of {block}")
        elements = 1
        for dim in dims:
            elements *= dim
        return name, offset, elements // block * block_bytes


@dataclass(frozen=True)
class _Metadata:
    """Typed access to the metadata fields."""

    fields: dict[str, Any]

    def get(self, key: str, kind: type, default: Any = None) -> Any:
        value = self.fields.get(key, default)
        if value is None:
            raise CheckpointError(f"metadata field {key!r} is missing")
        if type(value) is not kind:
            raise CheckpointError(f"metadata field {key!r} has the wrong type")
        return value

    def strings(self, key: str) -> list[str]:
        return self._list(key, str)

    def numbers(self, key: str) -> list:
        return self._list(key, int, float)

    def _list(self, key: str, *kinds: type) -> list:
        values = self.get(key, list)
        if not all(type(value) in kinds for value in values):
            raise CheckpointError(f"metadata field {key!r} has the wrong type")
        return values


def _config(metadata: _Metadata, tensors: dict[str, Any]) -> ModelConfig:
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
        vocab_size=int(tensors["token_embd.weight"].shape[-1]),
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
    field: Callable[..., Any], head_dim: int, tensors: dict[str, Any]
) -> tuple[float, ...] | None:
    """Llama 3 files carry the divisors as a tensor, linear scaling as one factor."""
    if field("rope.dimension_count", int, head_dim) != head_dim:
        raise CheckpointError("RoPE on a part of the head dimension is not supported")
    if "rope_freqs.weight" in tensors:
        tensor = tensors["rope_freqs.weight"]
        expect_shape(tensor.name, tensor.data.shape, (head_dim // 2,))
        return tuple(_dequantized(tensor).tolist())
    if field("rope.scaling.type", str, "none") == "linear":
        return (field("rope.scaling.factor", float),) * (head_dim // 2)
    return None


def _dequantized(tensor: Any) -> torch.Tensor:
    """The tensor as float32, [rows, K] as usual in torch (GGUF lists the dimensions reversed)."""
    try:
        # Infinite block scales of damaged files make NaNs here; FP16 weights may be NaN.
        with np.errstate(all="ignore"):
            values = gguf.dequantize(tensor.data, tensor.tensor_type)
    except NotImplementedError as error:
        raise CheckpointError(
            f"tensor {tensor.name!r}: type {tensor.tensor_type.name} is not supported"
        ) from error
    return torch.from_numpy(np.array(values, dtype=np.float32))


def _stored_name(name: str) -> str:
    """The file's name of a weight."""
    if name.startswith("block."):
        _, block, part = name.split(".", 2)
        return f"blk.{block}.{_TENSOR_NAMES[part]}"
    return _TENSOR_NAMES[name]


def _weight_reader(config: ModelConfig, tensors: dict[str, Any]) -> WeightReader:
    def read(name: str, shape: tuple[int, ...]) -> torch.Tensor:
        stored = _stored_name(name)
        if stored not in tensors:
            raise CheckpointError(f"tensor {stored!r} is missing")
        tensor = tensors[stored]
        expect_shape(stored, tensor.shape.tolist()[::-1], shape)
        weight = _dequantized(tensor)
        # llama.cpp stores Llama's (not the others') q and k rows for rotary pairs (2i, 2i+1).
        if config.architecture == "llama" and name.endswith(("q_proj", "k_proj")):
            weight = unpermute_rope(weight, config.head_dim)
        return weight

    return read


def _tokenizer(metadata: _Metadata) -> Tokenizer:
    key = "tokenizer.ggml."
    kind = metadata.get(key + "model", str)
    tokens = metadata.strings(key + "tokens")
    types = metadata.numbers(key + "token_type")
    special = [i for i, t in enumerate(types[: len(tokens)]) if t in (_CONTROL, _USER_DEFINED)]
    try:
        if kind == "gpt2":
            splitter = metadata.get(key + "pre", str, "gpt-2")
            backend = byte_level_bpe(tokens, metadata.strings(key + "merges"), special, splitter)
        elif kind == "llama":
            prefix = metadata.get(key + "add_space_prefix", bool, True)
            scores = metadata.numbers(key + "scores")
            backend = sentencepiece_bpe(tokens, scores, special, prefix)
        else:
            raise CheckpointError(f"tokenizer {kind!r:.40} is not supported, only gpt2 and llama")
    except CheckpointError:
        raise
    except Exception as error:  # the package raises bare Exception
        raise CheckpointError(f"tokenizer: {error}") from error
    stop = [key + name for name in ("eos_token_id", "eot_token_id")]
    use_bos = metadata.get(key + "add_bos_token", bool, kind == "llama")
    return Tokenizer(
        backend,
        stop_ids=frozenset(metadata.get(name, int) for name in stop if name in metadata.fields),
        bos_id=metadata.get(key + "bos_token_id", int) if use_bos else None,
        chat_template=metadata.get("tokenizer.chat_template", str, ""),
    )
