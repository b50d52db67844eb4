# SPDX-License-Identifier: Apache-2.0
"""The KV cache as it lies in the accelerator's memory."""

from __future__ import annotations

import numpy as np
import torch

from speq.host.board import Board
from speq.host.layout import MemoryLayout, ceil_div


class KVEntries:
    """The KV cache: a copy of what lies in the accelerator's memory, which it keeps up to date.

    Parameters
    ----------
    board : Board
    layout : MemoryLayout
    """

    def __init__(self, board: Board, layout: MemoryLayout) -> None:
        self._board, self._layout = board, layout
        model, cols = layout.model, layout.config.engine.cols
        tiles = layout.capacity // cols
        self._keys = np.zeros((model.blocks, tiles, model.kv_heads, model.head_dim, cols), "<u2")
        shape = (model.blocks, model.kv_heads, layout.value_tiles, layout.capacity, cols)
        self._values = np.zeros(shape, "<u2")

    def store(self, block: int, start: int, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Write float16 [T, kv_heads, head_dim] to the entries from `start` on."""
        count, heads, _ = keys.shape
        cols = self._keys.shape[-1]
        entries = np.arange(start, start + count)
        self._keys[block, entries // cols, :, :, entries % cols] = keys.numpy().view(np.uint16)
        padding = ((0, 0), (0, 0), (0, -values.shape[2] % cols))
        tiles = np.pad(values.numpy().view(np.uint16), padding).reshape(count, heads, -1, cols)
        stop = start + count
        self._values[block, :, :, start:stop] = tiles.transpose(1, 2, 0, 3)
        self._write(block, start, stop)

    def move(self, source: int, target: int) -> None:
        """Copy an entry of all blocks to another place."""
        cols = self._keys.shape[-1]
        entry = self._keys[:, source // cols, :, :, source % cols]
        self._keys[:, target // cols, :, :, target % cols] = entry
        self._values[:, :, :, target] = self._values[:, :, :, source]
        for block in range(len(self._keys)):
            self._write(block, target, target + 1)

    def _write(self, block: int, start: int, stop: int) -> None:
        """Bring entries of a block to memory: the keys' whole tiles, the values."""
        layout, cols = self._layout, self._keys.shape[-1]
        first, last = start // cols, ceil_div(stop, cols)
        self._board.write(layout.keys_address(block, first), self._keys[block, first:last])
        values = self._values[block, :, :, start:stop]
        for head in range(values.shape[0]):
            for tile in range(values.shape[1]):
                address = layout.values_address(block, head, tile, start)
                self._board.write(address, values[head, tile])
