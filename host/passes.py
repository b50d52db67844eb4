# SPDX-License-Identifier: Apache-2.0
"""Passes of a run: what the accelerator tells of them, and what they leave in memory."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from speq.host.board import Board
from speq.host.layout import (
    ceil_div,
    ranking_bytes,
    ranking_margin,
    results_bytes,
    unpack_results,
)
from speq.host.programs import ModelLayout
from speq.host.registers import Registers
from speq.hw.accelerator_config import PassKind
from speq.hw.engine_config import Mode
from speq.model.draft_tree import Origin, Proposal
from speq.model.transformer import NonFiniteError, first_nonfinite_row

_HALF = 2  # bytes of an FP16 number

#: What a `NonFiniteError` calls passes.
_PASS_NAMES = {PassKind.SINGLE: "prompt", PassKind.DRAFT: "draft", PassKind.VERIFY: "verify"}


@dataclass(frozen=True)
class Pass:
    """A walk through a program: rows' tokens, and KV entries before them; of a verify pass also the
    row that each follows, and where its token is from. By default rows follow each other."""

    kind: PassKind
    tokens: list[int]
    start: int
    parents: list[int] = field(default_factory=list)
    origins: list[Origin] = field(default_factory=list)

    def __post_init__(self) -> None:
        rows = len(self.tokens)
        if not self.parents:
            object.__setattr__(self, "parents", [max(0, row - 1) for row in range(rows)])
            object.__setattr__(self, "origins", [Origin.CHAIN] * rows)

    @property
    def proposal(self) -> Proposal:
        """All rows but the first."""
        return Proposal(self.tokens[1:], self.parents[1:], self.origins[1:])

    @property
    def depths(self) -> list[int]:
        """Each row's distance from the first."""
        return self.proposal.depths

    def nonfinite(self, layer: str, row: int | None) -> NonFiniteError:
        """The error of a product in this pass. The row is None if all operands but the weights are
        finite: then every row shows it."""
        position = self.start + self.depths[row or 0]
        return NonFiniteError(_PASS_NAMES[self.kind], layer, position)


def read_pass(registers: Registers) -> tuple[Pass, int]:
    """The pass that the registers tell, of a run that decodes, and the index of a draft pass in its
    chain."""
    fields = registers.fields("PASS")
    kind, rows, start = PassKind(fields["kind"]), fields["rows"], registers["PASS_POSITION"]
    tokens = [registers.element("ROW_TOKEN", row) for row in range(rows)]
    if kind is PassKind.DRAFT:
        return Pass(kind, tokens, start), fields["index"]
    places = [registers.fields("ROW_PLACE", row) for row in range(rows)]
    parents = [place["parent"] for place in places]
    origins = [Origin(place["origin"]) for place in places]
    return Pass(kind, tokens, start, parents, origins), fields["index"]


def read_results(
    board: Board, layout: ModelLayout, name: str, address: int, tokens: int
) -> torch.Tensor:
    """Results of a linear layer in memory, float32 [tokens, o]."""
    o, cols = layout.weights[name].o, layout.config.engine.cols
    content = board.read(address, results_bytes(tokens, o, cols))
    return torch.from_numpy(unpack_results(content, tokens, o, cols))


def read_margins(board: Board, layout: ModelLayout, count: int) -> list[float]:
    """Logit margins of the first draft passes of the last chain, as of `Step`."""
    size = ranking_bytes(layout.config)
    return [ranking_margin(board.read(layout.draft_ranking(i), size)) for i in range(count)]


class Operands:
    """Operands of the last pass in memory: which of them are not finite.

    Parameters
    ----------
    board : Board
    layout : ModelLayout
    """

    def __init__(self, board: Board, layout: ModelLayout) -> None:
        self._board, self._layout = board, layout

    def nonfinite_row(self, current: Pass, product: str) -> int | None:
        """The lowest row of a pass of which an operand of this product, with a result that is not
        finite, is not; None if all operands but the weights are finite."""
        layout, tokens = self._layout, len(current.tokens)
        if product in layout.weights:
            return first_nonfinite_row(self._activations(product, tokens))
        block = int(product.split(".")[1])
        places = range(current.start, current.start + tokens)
        if product.endswith("scores"):
            return first_nonfinite_row(self._queries(tokens), self._keys(block, places))
        return first_nonfinite_row(self._values(block, places))

    def nonfinite_entry(self, places: range) -> tuple[str, int] | None:
        """The first of these entries that is not finite in the last block, which is in no product
        of a pass over the prompt: the product that would show it, and its place; None if all are
        finite."""
        block = self._layout.model.blocks - 1
        found = [
            (row, name)
            for name, entries in (("scores", self._keys), ("values", self._values))
            if places and (row := first_nonfinite_row(entries(block, places))) is not None
        ]
        if not found:
            return None
        row, name = min(found)
        return f"block.{block}.{name}", places[row]

    # Float16 [tokens, ...].

    def _words(self, address: int, count: int) -> np.ndarray:
        """Activation words, float16 [count, places of a word]."""
        size = self._layout.config.activation_bytes
        return self._board.read(address, count * size).view(np.float16).reshape(count, -1)

    def _activations(self, product: str, tokens: int) -> torch.Tensor:
        address = self._layout.inputs_of(product, Mode.VERIFY)
        words = self._words(address, self._layout.weights[product].k)
        return torch.from_numpy(words[:, :tokens].T.copy())

    def _queries(self, tokens: int) -> torch.Tensor:
        layout, rows = self._layout, self._layout.config.engine.rows
        size, count = layout.model.head_dim, tokens * layout.sharing
        heads = []
        for group in range(layout.model.kv_heads):
            start = layout.queries + group * layout.attention_stride(size)
            batches = [
                self._words(start + i * layout.batch_bytes(size), size)[:, :rows]
                for i in range(ceil_div(count, rows))
            ]
            columns = np.concatenate(batches, axis=1)[:, :count]
            heads.append(columns.reshape(size, layout.sharing, tokens))
        return torch.from_numpy(np.concatenate(heads).transpose(2, 0, 1).copy())

    def _key_tile(self, block: int, tile: int) -> np.ndarray:
        """Keys of all heads, uint16 [kv_heads, head_dim, C]."""
        layout = self._layout
        content = self._board.read(layout.keys_address(block, tile), layout.key_stride)
        shape = (layout.model.kv_heads, layout.model.head_dim, -1)
        return content.view("<u2").reshape(shape)

    def _keys(self, block: int, places: Sequence[int]) -> torch.Tensor:
        cols = self._layout.config.engine.cols
        first = places[0] // cols
        tiles = [self._key_tile(block, tile) for tile in range(first, places[-1] // cols + 1)]
        columns = np.concatenate(tiles, axis=2)[..., [place - first * cols for place in places]]
        return torch.from_numpy(columns.transpose(2, 0, 1).copy().view(np.float16))

    def _values(self, block: int, places: Sequence[int]) -> torch.Tensor:
        layout, model = self._layout, self._layout.model
        size = _HALF * layout.config.engine.cols * len(places)
        tiles = [
            self._board.read(layout.values_address(block, head, i, places[0]), size)
            .view(np.float16)
            .reshape(len(places), -1)
            for head in range(model.kv_heads)
            for i in range(layout.value_tiles)
        ]
        return torch.from_numpy(np.concatenate(tiles, axis=1))
