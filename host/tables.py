# SPDX-License-Identifier: Apache-2.0
"""What an image holds for a vector unit: the embedding table, rotary tables and channel vectors."""

from __future__ import annotations

import numpy as np
import torch

from speq.host.layout import Kind, Part, round_up
from speq.host.places import GELU_LINEAR, HEAD_MASK, ONES
from speq.host.programs import ModelLayout
from speq.model import vector_ops
from speq.model.checkpoint import Model
from speq.model.transformer import rotary_tables

#: Parts that `table_part` makes.
TABLE_PARTS = (Kind.EMBEDDING, Kind.ROTARY, Kind.CHANNELS)


def table_part(part: Part, layout: ModelLayout, model: Model) -> np.ndarray:
    """The content of such a part as it lies in memory."""
    cols = layout.config.engine.cols
    match part.kind:
        case Kind.EMBEDDING:
            return _padded(model.weights["embedding"].numpy().view(np.uint16), cols)
        case Kind.ROTARY:
            tables = rotary_tables(model, torch.arange(layout.capacity))
            pairs = np.stack(tables[part.name == "local"], axis=-1)
            return _padded(pairs.reshape(layout.capacity, -1), cols)
    return _padded(_channels(part.name, layout, model), cols)


def _channels(name: str, layout: ModelLayout, model: Model) -> np.ndarray:
    """A channel vector, float32 [heads, elements], in the order of memory."""
    heads, size = layout.channel_sizes()[name]
    if name in (ONES, HEAD_MASK):
        return np.ones((heads, size), np.float32)
    if name == GELU_LINEAR:
        return np.full((heads, size), vector_ops.GELU_LINEAR, np.float32)
    vector = model.weights[name].to(torch.float32).numpy()
    if name.endswith(("q_norm", "k_norm")):
        vector = np.tile(vector, heads)
    order = layout.order(name.replace("_norm", "_proj").removesuffix(".bias"))
    if order is not None:
        vector = vector[order[order >= 0]]
    return vector.reshape(heads, size)


def _padded(rows: np.ndarray, cols: int) -> np.ndarray:
    """Rows [n, elements] with zeros behind each up to whole tiles."""
    padding = round_up(rows.shape[1], cols) - rows.shape[1]
    return np.pad(rows, ((0, 0), (0, padding)))
