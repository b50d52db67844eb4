# SPDX-License-Identifier: Apache-2.0
"""What the commands share that decode on the accelerator's RTL in the simulator."""

from __future__ import annotations

import signal
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import FrameType
from typing import TYPE_CHECKING

from speq.cli.progress import status

if TYPE_CHECKING:
    from speq.hw.accelerator_config import AcceleratorConfig
    from speq.model.checkpoint import Model
    from speq.model.format import EncodedTensor
    from speq.sim.simulated_board import SimulatedBoard


def check_array(rows: int, cols: int, lanes: int | None) -> int:
    """Refuse an accelerator of an impossible size or without a vector unit, whatever the model, and
    a machine that lacks what builds a simulation; the lanes, as usual if None are given. Raises
    ValueError and OSError."""
    from speq.host.checks import check_vector_unit
    from speq.hw.accelerator_config import AcceleratorConfig
    from speq.hw.engine_config import EngineConfig
    from speq.sim.builder import check_tools

    config = AcceleratorConfig(EngineConfig(rows=rows, cols=cols), lanes=lanes)
    check_vector_unit(config)
    check_tools()
    return config.lanes


def simulated_board(
    model: Model,
    encoded: Mapping[str, EncodedTensor],
    config: AcceleratorConfig,
    capacity: int,
) -> SimulatedBoard:
    """`speq.sim.session.board_for`, with a note if it takes long."""
    from speq.sim.session import board_for

    with status("starting the simulation"):
        return board_for(model, encoded, config, capacity=capacity)


@contextmanager
def interruptible(board: SimulatedBoard) -> Iterator[None]:
    """While it lasts, Ctrl-C becomes a KeyboardInterrupt where the board waits for the accelerator,
    so that it can still be asked for what it has counted. A second one comes at once."""
    interrupted = False

    def note_it(number: int, frame: FrameType | None) -> None:
        nonlocal interrupted
        if interrupted:
            raise KeyboardInterrupt
        interrupted = True

    def end_the_wait() -> None:
        if interrupted:
            raise KeyboardInterrupt

    before, board.before_wait = signal.signal(signal.SIGINT, note_it), end_the_wait
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
        board.before_wait = None


def rtl_figures(counters: Mapping[str, int], simulated: int, seconds: float) -> list[str]:
    """Lines with what the accelerator has counted for prompt and reply, per token of the reply; and
    how fast the simulation was, which took so many cycles and seconds."""
    tokens = counters["COMMITTED"]
    if not tokens:
        return []

    def per_token(*names: str, suffix: str) -> str:
        return ", ".join(
            f"{name.lower()} {counters[f'{name}_{suffix}'] / tokens:,.0f}" for name in names
        )

    cycles = counters["CYCLES"] - counters["HOST_CYCLES"]
    named = ("DRAFT", "VERIFY", "BYPASS", "ATTENTION", "ARGMAX", "VECTOR")
    kinds = per_token(*named, suffix="CYCLES")
    stalls = per_token("WEIGHT", "GROUP", "ACTIVATION", "RESULT", "VECTOR", suffix="STALLS")
    busy = f" (the array computes in {counters['COMPUTE_CYCLES'] / cycles:.1%})" if cycles else ""
    return [
        f"cycles per token, with the prompt's: {cycles / tokens:,.0f}{busy}",
        f"  by descriptor: {kinds}",
        f"  stalls: {stalls}",
        f"simulation: {simulated:,} cycles in {seconds:.1f} s, {simulated / seconds:,.0f} cycles/s",
    ]
