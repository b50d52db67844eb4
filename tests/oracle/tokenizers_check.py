# SPDX-License-Identifier: Apache-2.0
"""Comparing tokenizers with those of others, on varied strings: for `make check-models`.

A comparison is a row: name, strings compared, differences. What is compared are ids, the text that
they become, and the text as it is streamed. `Reference` is what an implementation of others does.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from speq.model.tokenizer import TextStream, Tokenizer

Row = tuple[str, int, int]

_WORDS = (
    *(
        "the",
        "Hello",
        "world",
        "I'm",
        "we'LL",
        "don't",
        "HTTPServer",
        "snake_case",
        "naïve",
        "Straße",
    ),
    *(
        "Ελληνικά",
        "Привет",
        "мир",
        "世界",
        "日本語テキスト",
        "한국어",
        "नमस्ते",
        "ไทย",
        "שלום",
        "مرحبا",
        "é",
        "e\u0301",
    ),
    *("3.14159", "12345678", "0xFF", "1st", "½", "Ⅷ", "٣٤", "²"),
    *("😀", "👩‍👩‍👧", "🇩🇪", "→", "€", "…", "\ufeff", "\u200b", "\xa0"),
    *(
        "def f(x):",
        "a+=b;",
        "<br/>",
        "$x^2$",
        "http://a.b/c?d=e&f",
        "/*--*/",
        "###",
        "'s",
        "''",
        "“q”",
    ),
)
_GAPS = (
    " ",
    " ",
    " ",
    "  ",
    "    ",
    "\n",
    "\n\n",
    "\n\n\n",
    "\t",
    "\t\t",
    " \n ",
    "\r\n",
    "",
    "",
    "▁",
)


def varied_strings(count: int, seed: int, whole: Sequence[str] = ()) -> list[str]:
    """`count` different strings: words of many scripts, numbers, code, white space of every kind,
    random characters, and the tokens `whole`."""
    chance = random.Random(seed)
    found = {"", " ", "  ", "\n", "a", " a", "a ", "\ta\n\nb  a\n"}
    while len(found) < count:
        parts = []
        for _ in range(chance.randint(1, 12)):
            if whole and chance.random() < 0.15:
                parts.append(chance.choice(whole))
            elif chance.random() < 0.15:
                ranges = ((0x20, 0x7F), (0xA0, 0x250), (0x370, 0x500), (0x4E00, 0x4F00))
                low, high = chance.choice((*ranges, (0x1F600, 0x1F640)))
                parts += [chr(chance.randrange(low, high)) for _ in range(chance.randint(1, 4))]
            else:
                parts.append(chance.choice(_WORDS))
            parts.append(chance.choice(_GAPS))
        found.add("".join(parts))
    return sorted(found)


@dataclass(frozen=True)
class Reference:
    """Another implementation: ids of a text, beginning-of-text tokens included, and the text of ids
    without special tokens; None where only ids are compared."""

    encode: Callable[[str], list[int]]
    decode: Callable[[list[int]], str] | None = None


def compare(
    name: str, tokenizer: Tokenizer, reference: Reference, strings: Sequence[str]
) -> tuple[Row, list[str]]:
    """The row of a comparison, and a line for each string that differs."""
    lines = []
    for text in strings:
        ids, expected = tokenizer.encode(text), reference.encode(text)
        decoded, streamed = tokenizer.decode(expected), stream(tokenizer, expected)
        if ids != expected:
            lines.append(f"{name}: {text!r} becomes {ids}, not {expected}")
        elif reference.decode and decoded != reference.decode(expected):
            lines.append(f"{name}: {expected} become {decoded!r}, not {reference.decode(ids)!r}")
        elif streamed != decoded:
            lines.append(f"{name}: {expected} are streamed as {streamed!r}, not {decoded!r}")
    return (name, len(strings), len(lines)), lines


def stream(tokenizer: Tokenizer, ids: Sequence[int]) -> str:
    """The text of `ids` as it comes token by token."""
    text = TextStream(tokenizer)
    return "".join([*map(text.push, ids), text.flush()])
