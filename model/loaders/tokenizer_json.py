# SPDX-License-Identifier: Apache-2.0
"""What a tokenizer.json may ask of the tokenizers package, checked before the package sees it.

The package builds and runs whatever a file describes. Ten normalisers in a row that replace one
letter by ten make ten billion of it, and so can pre-tokenizers and post-processors. So the steps
are counted, and how much longer they can make a text is bounded.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator
from typing import Any

from speq.model.checkpoint import CheckpointError

# The largest tokenizers (Gemma 3) have 262,144 tokens, 514,906 merges and 2.5 million values.
_MAX_VALUES = 1 << 23
_MAX_TOKENS = 1 << 21
_MAX_MERGES = 1 << 22
_MAX_STEPS = 64
#: Characters that a character may become. NFKC, lower case, NFD and bytes in a row are below it.
_MAX_GROWTH = 1 << 12
_MAX_AROUND = 1 << 10  # tokens that a post-processor adds

# Characters that a step makes of one, at most (Unicode 17, UTF-8).
_GROWTH = {
    "normalizer": {
        **{"NFC": 3, "NFD": 4, "NFKC": 18, "NFKD": 18, "Lowercase": 3, "BertNormalizer": 12},
        **{"Strip": 1, "StripAccents": 1, "Nmt": 1, "ByteLevel": 4},
        **{"Prepend": None, "Replace": None, "Precompiled": None},
    },
    "pre_tokenizer": {
        **{"ByteLevel": 5, "Metaspace": 2, "Split": 1, "Digits": 1, "Punctuation": 1},
        **{"Whitespace": 1, "WhitespaceSplit": 1, "BertPreTokenizer": 1, "UnicodeScripts": 1},
        **{"CharDelimiterSplit": 1, "FixedLength": 1},
    },
    "post_processor": {
        **{"ByteLevel": 1, "TemplateProcessing": 1, "BertProcessing": 1, "RobertaProcessing": 1}
    },
}
_PARTS = {
    "normalizer": "normalizers",
    "pre_tokenizer": "pretokenizers",
    "post_processor": "processors",
}


def check_tokenizer(data: bytes) -> None:
    """Raises CheckpointError, naming what is wrong, for a tokenizer.json that would take memory or
    time without bounds, or whose ids would be random."""
    if sum(map(data.count, (b",", b"[", b"{"))) > _MAX_VALUES:
        raise CheckpointError(f"it holds more than {_MAX_VALUES} values")
    try:
        content = json.loads(data, object_pairs_hook=_object)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"it is not valid JSON: {error}") from error
    if not isinstance(content, dict):
        raise CheckpointError("it is not a JSON object")
    _check_counts(content)
    growth, steps = 1.0, 0
    for part in _PARTS:
        for step in _steps(content.get(part), part):
            growth *= _growth(step, part)
            steps += 1
            if steps > _MAX_STEPS:
                raise CheckpointError(f"it has more than {_MAX_STEPS} steps, the last a {part}")
            if growth > _MAX_GROWTH:
                raise CheckpointError(
                    f"{step['type']} and the steps before it can make a text more than "
                    f"{_MAX_GROWTH} times as long"
                )


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object, none of whose keys is there twice: readers differ in which they take."""
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError("an object has a key twice")
    return result


def _check_counts(content: dict[str, Any]) -> None:
    model = content.get("model")
    if not isinstance(model, dict):
        raise CheckpointError("it has no model")
    limits = {"vocab": _MAX_TOKENS, "merges": _MAX_MERGES, "added_tokens": _MAX_TOKENS}
    for key, limit in limits.items():
        entries = (content if key == "added_tokens" else model).get(key)
        if isinstance(entries, dict | list) and len(entries) > limit:
            raise CheckpointError(f"{key} has {len(entries)} entries, more than {limit}")
    if model.get("dropout"):
        raise CheckpointError(
            f"dropout = {model['dropout']!r:.40} is not supported: tokens would be random"
        )


def _steps(step: Any, part: str) -> Iterator[dict[str, Any]]:
    """The steps of a part of the tokenizer one by one, those of sequences too. Raises
    CheckpointError for one of an unknown type."""
    if step is None:
        return
    kind = step.get("type") if isinstance(step, dict) else None
    if kind == "Sequence" and isinstance(step.get(_PARTS[part]), list):
        for inner in step[_PARTS[part]]:
            yield from _steps(inner, part)
    elif isinstance(kind, str) and kind in _GROWTH[part]:
        yield step
    else:
        raise CheckpointError(
            f"{part} {kind!r:.60} is not supported, only {', '.join(_GROWTH[part])} and Sequence"
        )


def _growth(step: dict[str, Any], part: str) -> float:
    """Characters that a step makes of one, at most."""
    kind = step["type"]
    if kind == "Prepend":
        return 1 + len(_text(step, "prepend"))
    if kind == "Replace":
        pattern = step.get("pattern")
        written = pattern.get("String") if isinstance(pattern, dict) else None
        content = len(_text(step, "content"))
        if isinstance(written, str) and written:
            return max(1.0, content / len(written))
        return 1 + content  # an expression may match before every character
    if kind == "Precompiled":
        return _longest_replacement(_text(step, "precompiled_charsmap"))
    if kind == "TemplateProcessing":
        _check_template(step)
    return _GROWTH[part][kind]


def _text(step: dict[str, Any], key: str) -> str:
    value = step.get(key)
    if not isinstance(value, str):
        raise CheckpointError(f"{key} of {step['type']} is not a text")
    return value


def _longest_replacement(encoded: str) -> int:
    """Bytes of the longest text that SentencePiece's map has for a character: behind the size of
    its trie and the trie come the texts, each with a zero behind it."""
    try:
        blob = base64.b64decode(encoded, validate=True)
    except ValueError as error:
        raise CheckpointError(f"precompiled_charsmap is not base64: {error}") from error
    texts = blob[4 + int.from_bytes(blob[:4], "little") :]
    return max(1, *(len(text) for text in texts.split(b"\0")))


def _check_template(step: dict[str, Any]) -> None:
    """A template has the text once, between not too many tokens."""
    pieces, special = step.get("single"), step.get("special_tokens")
    if not isinstance(pieces, list) or not isinstance(special, dict):
        raise CheckpointError("TemplateProcessing has no template")
    names = [p["SpecialToken"] for p in pieces if isinstance(p, dict) and "SpecialToken" in p]
    added = 0
    for name in names:
        token = special.get(name.get("id")) if isinstance(name, dict) else None
        ids = token.get("ids") if isinstance(token, dict) else None
        added += len(ids) if isinstance(ids, list) else 1
    if len(pieces) - len(names) != 1 or added > _MAX_AROUND:
        raise CheckpointError(
            f"TemplateProcessing must have the text once, between at most {_MAX_AROUND} tokens"
        )
