# SPDX-License-Identifier: Apache-2.0
"""The tokenizer in a GGUF file's metadata, `tokenizer.*`.

What the keys mean is what llama.cpp does with them (`llama_vocab::impl::load`). Where it differs
from the published models' own tokenizers, those are followed: Qwen's normalisation to NFC,
Mistral's splitting at combining marks, the white space behind Phi-3's special tokens.
"""

import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np

from speq.model.chat import END_OF_TEXT, END_OF_TURN
from speq.model.checkpoint import CheckpointError
from speq.model.loaders.gguf_file import Metadata
from speq.model.tokenizer import (
    SPECIAL,
    WHOLE,
    Tokenizer,
    TokenType,
    Vocabulary,
    byte_level_bpe,
    sentencepiece_bpe,
)

_GGML = "tokenizer.ggml."
_USED = (
    *("model", "pre", "tokens", "token_type", "scores", "merges", "bos_token_id", "eos_token_id"),
    *("eot_token_id", "eom_token_id", "unknown_token_id", "padding_token_id", "add_bos_token"),
    *("add_eos_token", "add_space_prefix"),
)
# Tokens that neither encoding nor decoding gives a meaning, and copies of what is used.
_WITHOUT_INFLUENCE = (
    *("token_type_count", "seperator_token_id", "mask_token_id", "cls_token_id", "added_tokens"),
    *(f"fim_{part}_token_id" for part in ("pre", "suf", "mid", "pad", "rep", "sep")),
    *(f"{part}_token_id" for part in ("prefix", "suffix", "middle")),
)
# Keys that change the tokens or the reply, with the values under which they do not.
_NEUTRAL = {
    "add_sep_token": (False,),
    "remove_extra_whitespaces": (False,),
    "precompiled_charsmap": (),
    "normalizer.lowercase": (False,),
    "normalizer.strip_accents": (False,),
    "suppress_tokens": (),
}
_OTHERS = ("tokenizer.chat_template", "tokenizer.chat_templates", "tokenizer.huggingface.json")
_ADD_BOS = ("llama-bpe", "llama3", "llama-v3", "tekken")  # rules whose models begin with BOS
# Tokens of Phi-3 that keep the white space behind them.
_KEEPS_SPACE = ("<unk>", "<s>", "<|endoftext|>")


def knows(key: str) -> bool:
    """Whether `read_tokenizer` is what uses or refuses the metadata key."""
    return key.startswith("tokenizer.")


def read_tokenizer(metadata: Metadata) -> Tokenizer:
    """The file's tokenizer. Raises CheckpointError, naming the key, for one that is not supported
    or not known."""
    _check_keys(metadata)
    get, keys = metadata.get, metadata.fields
    kind = get(_GGML + "model", str)
    if kind not in ("gpt2", "llama"):
        raise CheckpointError(f"tokenizer {kind!r:.40} is not supported, only gpt2 and llama")
    splitter = get(_GGML + "pre", str, "")
    tokens = metadata.strings(_GGML + "tokens")
    types = _types(metadata, tokens, kind)
    try:
        vocabulary = _vocabulary(metadata, kind, splitter, tokens, types)
    except CheckpointError:
        raise
    except Exception as error:  # the package raises bare Exception
        raise CheckpointError(f"tokenizer: {error}") from error

    sentencepiece = kind == "llama"
    ids = {
        name: get(_GGML + name, int)
        for name in _USED
        if name[-3:] == "_id" and _GGML + name in keys
    }
    if sentencepiece:  # llama.cpp's defaults; those for byte-level BPE are Falcon's
        ids = {"bos_token_id": 1, "eos_token_id": 2, "unknown_token_id": 0} | ids
    add_bos = get(_GGML + "add_bos_token", bool, sentencepiece or splitter in _ADD_BOS)
    if add_bos and "bos_token_id" not in ids:
        raise CheckpointError(f"metadata field '{_GGML}bos_token_id' is missing")
    if get(_GGML + "add_eos_token", bool, False):
        warnings.warn(
            f"{_GGML}add_eos_token = True is not followed: a prompt that ends has no continuation",
            stacklevel=2,
        )
    ends = [ids[name] for name in ("eos_token_id", "eot_token_id", "eom_token_id") if name in ids]
    by_name = [vocabulary.whole[t] for t in (*END_OF_TURN, *END_OF_TEXT) if t in vocabulary.whole]
    named = {
        name.removesuffix("_id").replace("unknown", "unk").replace("padding", "pad"): tokens[i]
        for name, i in ids.items()
        if 0 <= i < len(tokens)
    }
    return Tokenizer(
        vocabulary,
        stop_ids=frozenset([*ends, *(i for i in by_name if types[i] in SPECIAL)]),
        leading=(ids["bos_token_id"],) if add_bos else (),
        chat_template=get("tokenizer.chat_template", str, ""),
        named=named,
    )


def _check_keys(metadata: Metadata) -> None:
    for key, value in metadata.fields.items():
        name = key.removeprefix(_GGML)
        if not knows(key) or name in (*_USED, *_WITHOUT_INFLUENCE) or key in _OTHERS:
            continue
        if key.startswith("tokenizer.chat_template."):  # other templates beside the default one
            continue
        if key.startswith(_GGML) and name in _NEUTRAL:
            empty = isinstance(value, list | np.ndarray) and len(value) == 0
            if not empty and (isinstance(value, list | np.ndarray) or value not in _NEUTRAL[name]):
                allowed = " or ".join(map(str, _NEUTRAL[name])) or "an empty list"
                raise CheckpointError(f"{key} = {_shown(value)} is not supported, only {allowed}")
        elif key.startswith(_GGML):
            raise CheckpointError(f"metadata field {key!r:.80} = {_shown(value)} is not known")
        else:
            warnings.warn(f"metadata field {key!r:.80} is not known and not used", stacklevel=3)


def _shown(value: Any) -> str:
    if isinstance(value, list | np.ndarray):
        return f"(a list of {len(value)})"
    return f"{value!r:.40}"


def _types(metadata: Metadata, tokens: list[str], kind: str) -> list[int]:
    """The tokens' types. Tokens that end a turn are control tokens, whatever the file says."""
    key = _GGML + "token_type"
    if key in metadata.fields:
        types = metadata.numbers(key)
    else:
        byte_tokens = {f"<0x{byte:02X}>" for byte in range(256)} if kind == "llama" else set()
        types = [TokenType.BYTE if t in byte_tokens else TokenType.NORMAL for t in tokens]
    if len(types) < len(tokens):
        raise CheckpointError(f"{key} has {len(types)} entries for {len(tokens)} tokens")
    ends = set(END_OF_TURN)
    return [
        TokenType.CONTROL if token in ends else kind
        for token, kind in zip(tokens, types, strict=False)
    ]


def _vocabulary(
    metadata: Metadata, kind: str, splitter: str, tokens: list[str], types: Sequence[int]
) -> Vocabulary:
    prefix = metadata.get(_GGML + "add_space_prefix", bool, kind == "llama")
    if kind == "llama":
        scores = metadata.numbers(_GGML + "scores")
        strips: frozenset[str] = frozenset()
        if metadata.get("general.architecture", str) == "phi3":
            whole = (t for t, kind in zip(tokens, types, strict=True) if kind in WHOLE)
            strips = frozenset(token for token in whole if token not in _KEEPS_SPACE)
        return sentencepiece_bpe(tokens, scores[: len(tokens)], types, prefix, strips)
    if prefix:
        warnings.warn(
            f"{_GGML}add_space_prefix = True has no meaning for byte-level BPE", stacklevel=3
        )
    if not splitter:
        warnings.warn(
            f"{_GGML}pre is missing: text is cut into words by llama.cpp's 'default' rule, which "
            "is that of no model; convert the model again for the right one",
            stacklevel=3,
        )
    merges = metadata.strings(_GGML + "merges")
    return byte_level_bpe(tokens, merges, types, splitter or "default")
