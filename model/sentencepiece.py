# SPDX-License-Identifier: Apache-2.0
"""Encoding with SentencePiece BPE vocabularies: tokens with scores instead of an ordered list of
merges.

Text is cut into characters; two neighbours merge if their concatenation is a token, the best score
first and leftmost among equals, until none do. What is then no token becomes its UTF-8 bytes. That
is the rule of SentencePiece and llama.cpp (`llm_tokenizer_spm_session`), which the tests compare.
"""

import heapq
import math
from collections.abc import Iterator, Mapping, Sequence

SPACE = "▁"  # U+2581, a space inside tokens


class SentencePieceBpe:
    """Encoder for `tokens` with their `scores`.

    `whole` are the texts that are tokens wherever they appear (control and user-defined tokens)
    with their ids; those in `strips_right` also swallow the white space behind them. With
    `prefix_space` a space is put before the text and behind every whole token, as llama.cpp does.
    """

    def __init__(
        self,
        tokens: Sequence[str],
        scores: Sequence[float],
        whole: Mapping[str, int],
        prefix_space: bool,
        strips_right: frozenset[str] = frozenset(),
    ) -> None:
        # Of equal tokens the last counts, and so do scores. Not a number would have no order.
        self._ids = {token: i for i, token in enumerate(tokens)}
        self._scores = [-math.inf if math.isnan(score) else score for score in scores]
        if len(self._scores) != len(tokens):
            raise ValueError(f"{len(tokens)} tokens have {len(scores)} scores")
        self._whole = dict(sorted(whole.items(), key=lambda item: -len(item[0].encode())))
        self._strips_right = strips_right
        self._prefix = SPACE if prefix_space else ""
        self._bytes = [self._ids.get(f"<0x{byte:02X}>") for byte in range(256)]
        self._unknown = self._ids.get("<unk>")

    def __call__(self, text: str) -> list[int]:
        """Token ids of `text`."""
        ids: list[int] = []
        prefix = self._prefix
        for part in self._cut(text):
            if isinstance(part, int):
                ids.append(part)
                prefix = self._prefix
            else:
                self._encode(prefix + part.replace(" ", SPACE), ids)
                prefix = ""
        return ids

    def _cut(self, text: str) -> list[str | int]:
        """Text between whole tokens, and the ids of those; the longest are found first."""
        parts: list[str | int] = [text] if text else []
        for token, number in self._whole.items():
            if token in text:
                parts = [piece for part in parts for piece in self._cut_at(part, token, number)]
        return parts

    def _cut_at(self, part: str | int, token: str, number: int) -> Iterator[str | int]:
        if isinstance(part, int):
            yield part
            return
        for i, piece in enumerate(part.split(token)):
            if i:
                yield number
                if token in self._strips_right:
                    piece = piece.lstrip(" \t\n\v\f\r")
            if piece:
                yield piece

    def _encode(self, text: str, ids: list[int]) -> None:
        """Appends the ids of `text`, which has no whole tokens."""
        symbols = list(text)  # a merged symbol is where its left part was; its right part is ""
        before = list(range(-1, len(symbols) - 1))
        after = [*range(1, len(symbols)), -1]
        queue: list[tuple[float, int, int, str]] = []

        def offer(left: int, right: int) -> None:
            if left >= 0 and right >= 0:
                number = self._ids.get(both := symbols[left] + symbols[right])
                if number is not None:
                    heapq.heappush(queue, (-self._scores[number], left, right, both))

        for i in range(1, len(symbols)):
            offer(i - 1, i)
        while queue:
            _, left, right, both = heapq.heappop(queue)
            if not symbols[left] or not symbols[right] or symbols[left] + symbols[right] != both:
                continue  # one of them has merged with another neighbour
            symbols[left], symbols[right] = both, ""
            after[left] = after[right]
            if after[right] >= 0:
                before[after[right]] = left
            offer(before[left], left)
            offer(left, after[left])
        for symbol in symbols:
            if symbol in self._ids:
                ids.append(self._ids[symbol])
            elif symbol:
                self._append_bytes(symbol, ids)

    def _append_bytes(self, symbol: str, ids: list[int]) -> None:
        found = [self._bytes[byte] for byte in symbol.encode()]
        known = [number for number in found if number is not None]
        if len(known) == len(found):
            ids += known
        elif self._unknown is None:
            raise ValueError(f"the tokenizer has no token for {symbol!r}")
        elif ids[-1:] != [self._unknown]:  # a run of unknown characters is one token
            ids.append(self._unknown)
