# SPDX-License-Identifier: Apache-2.0
"""A simulated board that sees when passes and steps are reported, and can end a run there."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from speq.host.host_layout import host_argument
from speq.hw.accelerator_config import AcceleratorConfig, PassKind
from speq.hw.control.register_map import registers
from speq.sim.simulated_board import SimulatedBoard

#: Passes and what follows them, by name.
EVENTS = {
    "prompt": PassKind.SINGLE,
    "draft": PassKind.DRAFT,
    "verify": PassKind.VERIFY,
    "step": None,
}


class RunEnded(Exception):
    """The run has come as far as it has to: there is enough."""


class WatchedBoard:
    """A simulated board that notes the cycles of events and ends the run where it need not go on;
    a `speq.host.board.Board`.

    Parameters
    ----------
    board : SimulatedBoard
        That is closed with this one.
    config : AcceleratorConfig
    enough : function of the watched board
        Whether the run shall end, by a `RunEnded` from `wait_interrupt`; asked before every wait.

    Attributes
    ----------
    events : dict
        For each name of `EVENTS` the cycles of the interrupts that told of it.
    """

    def __init__(
        self,
        board: SimulatedBoard,
        config: AcceleratorConfig,
        enough: Callable[[WatchedBoard], bool],
    ) -> None:
        self._board, self._enough = board, enough
        offsets = {register.name: register.offset for register in registers(config)}
        self._argument, self._step = offsets["HOST_ARGUMENT"], offsets["STEP"]
        self._interrupt = 0  # cycle of the last one
        self.events: dict[str, list[int]] = {name: [] for name in EVENTS}

    def read_register(self, offset: int) -> int:
        value = self._board.read_register(offset)
        for name, kind in EVENTS.items():
            if kind is None:
                happened = offset == self._step
            else:
                happened = offset == self._argument and value == host_argument(kind, 0)
            if happened:
                self.events[name].append(self._interrupt)
        return value

    def write_register(self, offset: int, value: int) -> None:
        self._board.write_register(offset, value)

    def read(self, address: int, size: int) -> np.ndarray:
        return self._board.read(address, size)

    def write(self, address: int, values: np.ndarray | bytes | bytearray | memoryview) -> None:
        self._board.write(address, values)

    def wait_interrupt(self, timeout_cycles: int | None = None) -> bool:
        if self._enough(self):
            raise RunEnded
        raised = self._board.wait_interrupt(timeout_cycles)
        self._interrupt = self._board.cycles()
        return raised

    def close(self) -> None:
        self._board.close()

    def cycles(self) -> int:
        """Clock cycles since the reset."""
        return self._board.cycles()
