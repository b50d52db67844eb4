# SPDX-License-Identifier: Apache-2.0
"""Reads llama2.c checkpoints (github.com/karpathy/llama2.c) and their tokenizer files.

Versions 0 (a header of seven int32, then FP32 weights) and 1 (a 256-byte header with magic "ak42").
There is no format library for them: the layout is a fixed sequence of arrays, so the file's length
must be exactly what its header implies, which is checked before any array is read.
"""

import math
import struct
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from speq.model.checkpoint import (
    CheckpointError,
    ModelConfig,
    collect_weights,
    tensor_shapes,
    unpermute_rope,
)
from speq.model.input_file import check_regular, read_limited
from speq.model.sentencepiece import SPACE
from speq.model.tokenizer import Tokenizer, TokenType, sentencepiece_bpe

_MAGIC = 0x616B3432
_HEADER = struct.Struct("<7i")
_HEADER_BYTES = {0: 28, 1: 256}
_ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
_FFN = ("gate_proj", "down_proj", "up_proj")
_ORDER = {  # the arrays of the file by version; one of the blocks' tensors stands for all blocks
    0: ("embedding", "attn_norm", *_ATTENTION, "ffn_norm", *_FFN, "final_norm", "angles", "head"),
    1: ("attn_norm", "ffn_norm", "final_norm", "embedding", *_ATTENTION, *_FFN, "head"),
}
_NORM_EPS, _ROPE_BASE = 1e-5, 10_000.0  # constants of llama2.c, not stored in the file
_MAX_TOKENIZER = 1 << 26  # bytes of the tokenizer's file
_BOS, _EOS = 1, 2  # llama2.c ends a text at either
_FIRST_BYTE = 3  # id of the token for byte 0; older tokenizer files spell these tokens differently


def load_llama2c(
    path: Path, tokenizer: Path | None
) -> tuple[ModelConfig, dict[str, torch.Tensor], Tokenizer]:
    """Configuration, FP16 weights and tokenizer of a .bin file. Raises CheckpointError."""
    config, offsets = _checked_header(path)

    def read(name: str, shape: tuple[int, ...]) -> torch.Tensor:
        count = math.prod(shape)
        if name.startswith("block."):
            _, block, part = name.split(".")
            offset = offsets["block.0." + part] + int(block) * 4 * count
        else:
            offset = offsets[name]
        array = np.fromfile(path, np.dtype("<f4"), count, offset=offset)
        weight = torch.from_numpy(array.astype(np.float32, copy=False)).reshape(shape)
        # llama2.c rotates the pairs (2i, 2i+1).
        rotated = name.endswith(("q_proj", "k_proj"))
        return unpermute_rope(weight, config.head_dim) if rotated else weight

    beside = [path.parent / "tokenizer.bin", path.parent / f"tok{config.vocab_size}.bin"]
    tokenizer = tokenizer or next((file for file in beside if file.exists()), beside[0])
    return config, collect_weights(config, read), _tokenizer(tokenizer, config.vocab_size)


def llama2c_config(path: Path) -> ModelConfig:
    """Configuration of such a file, from its header. Raises CheckpointError."""
    return _checked_header(path)[0]


def _checked_header(path: Path) -> tuple[ModelConfig, dict[str, int]]:
    """Configuration and offsets, as of `_layout`, of a file whose length they fit."""
    check_regular(path)
    version, config = _header(path)
    offsets, length = _layout(version, config)
    if path.stat().st_size != length:
        raise CheckpointError(f"{path.stat().st_size} bytes long, but its header implies {length}")
    return config, offsets


def _header(path: Path) -> tuple[int, ModelConfig]:
    with path.open("rb") as file:
        data = file.read(max(_HEADER_BYTES.values()))
    version, start = 0, 0
    if len(data) >= 8 and struct.unpack_from("<I", data)[0] == _MAGIC:
        version, start = struct.unpack_from("<i", data, 4)[0], 8
        if version != 1:
            raise CheckpointError(f"llama2.c version {version} is not supported, only 0 and 1")
    if len(data) < _HEADER_BYTES[version]:
        raise CheckpointError("truncated header")
    hidden, ffn_hidden, blocks, heads, kv_heads, vocab, context = _HEADER.unpack_from(data, start)
    if heads < 1 or hidden % heads:
        raise CheckpointError(f"{hidden} dimensions do not divide into {heads} heads")
    head_dim = hidden // heads
    return version, ModelConfig(
        architecture="llama",
        vocab_size=abs(vocab),
        hidden=hidden,
        ffn_hidden=ffn_hidden,
        blocks=blocks,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        context=context,
        norm_eps=_NORM_EPS,
        rope_base=_ROPE_BASE,
        attention_scale=max(head_dim, 1) ** -0.5,
        # Version 0 marks a head of its own with a negative vocabulary size, version 1 with a flag.
        tied_head=data[start + _HEADER.size] != 0 if version else vocab > 0,
    )


def _layout(version: int, config: ModelConfig) -> tuple[dict[str, int], int]:
    """Byte offset of every weight outside the blocks and in block 0, and the length of the file.
    The same tensor of all blocks is one array."""
    offsets = {}
    end = _HEADER_BYTES[version]
    sizes = _sizes(config)
    for part in _ORDER[version]:
        name = "block.0." + part
        if name in sizes:
            offsets[name] = end
            end += sizes[name] * config.blocks
        elif part in sizes:
            offsets[part] = end
            end += sizes[part]
    return offsets, end


def _sizes(config: ModelConfig) -> dict[str, int]:
    """Bytes of every tensor outside the blocks and in block 0."""
    first_block = tensor_shapes(replace(config, blocks=1))
    sizes = {name: 4 * math.prod(shape) for name, shape in first_block}
    # Version 0 stores the rotary cosines and sines too; they are computed here and not read.
    return sizes | {"angles": 4 * config.context * config.head_dim}


def _tokenizer(path: Path, vocab_size: int) -> Tokenizer:
    """The SentencePiece vocabulary: int32, then float32 score, int32 length and text of tokens, at
    most as many as the model has."""
    data = read_limited(path, _MAX_TOKENIZER)
    tokens, scores, position = [], [], 4
    try:
        while position < len(data):
            score, length = struct.unpack_from("<fi", data, position)
            position += 8
            if not 0 <= length <= len(data) - position:
                raise CheckpointError(f"{path.name}: truncated")
            token = data[position : position + length].decode("utf-8")
            tokens.append(token.replace(" ", SPACE))
            scores.append(score)
            position += length
            if len(tokens) > vocab_size:
                raise CheckpointError(f"{path.name}: has more than the model's {vocab_size} tokens")
    except (struct.error, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path.name}: not a tokenizer of llama2.c") from error
    if len(tokens) < _FIRST_BYTE + 256:
        raise CheckpointError(
            f"{path.name}: has {len(tokens)} tokens, fewer than <unk>, <s>, </s> and the 256 bytes"
        )
    tokens[_FIRST_BYTE : _FIRST_BYTE + 256] = [f"<0x{byte:02X}>" for byte in range(256)]
    types = [TokenType.NORMAL] * len(tokens)
    types[:_FIRST_BYTE] = [TokenType.CONTROL] * _FIRST_BYTE
    types[_FIRST_BYTE : _FIRST_BYTE + 256] = [TokenType.BYTE] * 256
    try:
        # The names of special tokens in a text are text to llama2.c.
        vocabulary = sentencepiece_bpe(tokens, scores, types, parse_special=False)
    except ValueError as error:
        raise CheckpointError(f"{path.name}: {error}") from error
    return Tokenizer(vocabulary, stop_ids=frozenset((_BOS, _EOS)), leading=(_BOS,))
