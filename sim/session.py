# SPDX-License-Identifier: Apache-2.0
"""Decoding sessions on the accelerator's RTL in the simulator."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from speq.host.driver import default_capacity
from speq.host.session import Session, memory_size
from speq.hw.accelerator_config import AcceleratorConfig
from speq.hw.verilog import generate_top
from speq.model.checkpoint import Model
from speq.model.format import EncodedTensor
from speq.sim.simulated_board import MemoryOptions, SimulatedBoard, Waves


def board_for(
    model: Model,
    encoded: Mapping[str, EncodedTensor] | None,
    config: AcceleratorConfig,
    *,
    capacity: int | None = None,
    waves: Waves | None = None,
    **memory: Any,
) -> SimulatedBoard:
    """The accelerator in the simulator with as much memory as a session needs.

    Parameters
    ----------
    model : Model
    encoded : encoded linear layers by name, or None
    config : AcceleratorConfig
    capacity : int, optional
        Entries of the KV cache; `default_capacity` when not given.
    waves : Waves, optional
        What to record.
    **memory
        How the memory behaves: fields of `MemoryOptions`.

    Raises
    ------
    ValueError
        If the model does not fit the accelerator.
    SimulationError
        If the simulation cannot be built.
    """
    if capacity is None:
        capacity = default_capacity(config, model.config)
    size = memory_size(config, model, encoded or {}, capacity)
    options = MemoryOptions(size, **memory)
    return SimulatedBoard(generate_top(config), config, options, waves)


def simulated_session(
    model: Model,
    encoded: Mapping[str, EncodedTensor] | None,
    config: AcceleratorConfig,
    *,
    capacity: int | None = None,
    **options: Any,
) -> Session:
    """A session on the accelerator in the simulator; parameters and errors as of `board_for`."""
    board = board_for(model, encoded, config, capacity=capacity, **options)
    return Session(model, encoded, board, capacity=capacity)
