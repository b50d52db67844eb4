# SPDX-License-Identifier: Apache-2.0
"""What a driver needs for an accelerator: with a vector unit, or without one."""

from __future__ import annotations

from collections.abc import Collection

from speq.host.board import Board
from speq.host.host_layout import HostLayout
from speq.host.host_passes import HostPasses
from speq.host.layout import MemoryLayout
from speq.host.passes import Observe, Passes
from speq.host.run_control import RunControl
from speq.host.vector_passes import VectorPasses
from speq.host.vector_programs import VectorLayout
from speq.hw.accelerator_config import AcceleratorConfig
from speq.model.checkpoint import Model, ModelConfig


def memory_layout(
    config: AcceleratorConfig,
    model: ModelConfig,
    encoded: Collection[str],
    capacity: int,
    base: int = 0,
    *,
    drafted_outputs: int | None = None,
) -> MemoryLayout:
    """The layout of a model on an accelerator; parameters and errors are those of
    `MemoryLayout`."""
    kind = VectorLayout if config.lanes else HostLayout
    return kind(config, model, encoded, capacity, base, drafted_outputs=drafted_outputs)


def driver_passes(
    board: Board,
    control: RunControl,
    layout: MemoryLayout,
    model: Model,
    capacity: int,
    observe: Observe,
) -> Passes:
    """The driver's part in passes on an accelerator with such a layout."""
    if isinstance(layout, HostLayout):
        return HostPasses(board, control, layout, model, capacity, observe)
    assert isinstance(layout, VectorLayout)
    return VectorPasses(board, control, layout, observe)
