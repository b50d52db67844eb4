# SPDX-License-Identifier: Apache-2.0
"""Passes of an accelerator with a vector unit: all that is left is to give and to take."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from speq.host.board import Board
from speq.host.layout import ceil_div, ranking_bytes, ranking_margin
from speq.host.passes import NO_PASS, Observe, Pass, Passes, read_pass
from speq.host.run_control import AcceleratorError, RunControl
from speq.host.vector_programs import VectorLayout
from speq.hw.accelerator_config import PassKind
from speq.hw.engine_config import Mode
from speq.model.transformer import first_nonfinite_row

_HALF = 2  # bytes of an FP16 number


class VectorPasses(Passes):
    """Passes without HOST descriptors.

    Parameters
    ----------
    board : Board
    control : RunControl
    layout : VectorLayout
    observe : callable
        As `Driver.observer`.
    """

    def __init__(
        self, board: Board, control: RunControl, layout: VectorLayout, observe: Observe
    ) -> None:
        self._board, self._control, self._observe = board, control, observe
        self._layout = layout
        self.margins = []
        self.reranked = 0

    def fill(self, current: Pass) -> None:
        self.current = current
        self._board.write(self._layout.text + 4 * current.start, np.array(current.tokens, "<u4"))
        self._observe(current, 0)
        self._control.start()
        self._control.expect("IDLE")
        self._observe(current, 1)
        # The last block's entries have been in no product yet.
        block = self._layout.model.blocks - 1
        for product, entries in (("scores", self._keys), ("values", self._values)):
            row = first_nonfinite_row(entries(block, self._places()))
            if row is not None:
                raise current.nonfinite(f"block.{block}.{product}", row)

    def begin(self) -> None:
        self.current = NO_PASS
        self._observe(Pass(PassKind.VERIFY, [], 0), 0)

    def step(self) -> str:
        try:
            state = self._control.expect("STEP", "IDLE")
        except AcceleratorError:
            self.current, _ = read_pass(self._control.registers)
            raise
        if state == "STEP":
            self.current, _ = read_pass(self._control.registers)
            self.margins = self._read_margins()
            self._observe(self.current, 1)
        return state

    def _read_margins(self) -> list[float]:
        """Of the step's draft passes, as many as its chain is long."""
        layout = self._layout
        return [
            ranking_margin(self._board.read(layout.draft_ranking(i), ranking_bytes(layout.config)))
            for i in range(len(self.current.proposal.chain))
        ]

    def nonfinite_row(self, product: str) -> int | None:
        layout = self._layout
        if product in layout.weights:
            return first_nonfinite_row(self._activations(product))
        block = int(product.split(".")[1])
        if product.endswith("scores"):
            return first_nonfinite_row(self._queries(), self._keys(block, self._places()))
        return first_nonfinite_row(self._values(block, self._places()))

    def accept(self, start: int, rows: Sequence[int]) -> None:
        """Nothing: the run moves entries by itself."""

    # Operands in memory, float16 [rows of the pass, ...].

    def _places(self) -> range:
        """Entries of the KV cache that the pass has written."""
        return range(self.current.start, self.current.start + len(self.current.tokens))

    def _words(self, address: int, count: int) -> np.ndarray:
        """Activation words, float16 [count, places of a word]."""
        size = self._layout.config.activation_bytes
        return self._board.read(address, count * size).view(np.float16).reshape(count, -1)

    def _activations(self, product: str) -> torch.Tensor:
        address = self._layout.inputs_of(product, Mode.VERIFY)
        words = self._words(address, self._layout.weights[product].k)
        return torch.from_numpy(words[:, : len(self.current.tokens)].T.copy())

    def _queries(self) -> torch.Tensor:
        layout, rows = self._layout, self._layout.config.engine.rows
        tokens, size = len(self.current.tokens), layout.model.head_dim
        count = tokens * layout.sharing
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
