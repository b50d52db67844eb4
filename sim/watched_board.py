# SPDX-License-Identifier: Apache-2.0
"""A simulated board that sees when passes and steps are reported, and can end a run there."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from speq.host.registers import Registers
from speq.hw.accelerator_config import AcceleratorConfig, PassKind
from speq.hw.control.register_map import registers
from speq.sim.simulated_board import SimulatedBoard

#: Cycles from one look at the pass under way to the next.
_LOOK_CYCLES = 50
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

    No interrupt tells of a pass: the registers are looked at in between, which does not disturb the
    accelerator and happens in the same cycles in every run.

    Parameters
    ----------
    board : SimulatedBoard
        That is closed with this one.
    config : AcceleratorConfig
    enough : function of the watched board
        Whether the run shall end, by a `RunEnded` from `wait_interrupt`; asked before every wait
        and after every look.

    Attributes
    ----------
    events : dict
        For each name of `EVENTS` the cycles of the looks that told of it, of steps those of their
        interrupts.
    """

    def __init__(
        self,
        board: SimulatedBoard,
        config: AcceleratorConfig,
        enough: Callable[[WatchedBoard], bool],
    ) -> None:
        self._board, self._enough = board, enough
        self._registers = Registers(board, config)
        self._step = next(r.offset for r in registers(config) if r.name == "STEP")
        self._pass: tuple[int, int] | None = None  # its kind and position
        self._interrupt = 0  # cycle of the last one
        self.events: dict[str, list[int]] = {name: [] for name in EVENTS}

    def read_register(self, offset: int) -> int:
        if offset == self._step:
            self.events["step"].append(self._interrupt)
        return self._board.read_register(offset)

    def write_register(self, offset: int, value: int) -> None:
        self._board.write_register(offset, value)

    def read(self, address: int, size: int) -> np.ndarray:
        return self._board.read(address, size)

    def write(self, address: int, values: np.ndarray | bytes | bytearray | memoryview) -> None:
        self._board.write(address, values)

    def wait_interrupt(self, timeout_cycles: int | None = None) -> bool:
        self._end_if_enough()
        raised = self._watch(timeout_cycles)
        self._interrupt = self._board.cycles()
        return raised

    def _end_if_enough(self) -> None:
        if self._enough(self):
            raise RunEnded

    def _watch(self, timeout_cycles: int | None) -> bool:
        """Wait as `wait_interrupt` does, and note the passes that begin in the meantime."""
        registers = self._registers
        end = None if timeout_cycles is None else self.cycles() + timeout_cycles
        while not self._board.wait_interrupt(_LOOK_CYCLES):
            if end is not None and self.cycles() >= end:
                return False
            now = registers.fields("PASS")
            current = (now["kind"], registers["PASS_POSITION"])
            # If nothing has changed in between, both are of one pass.
            if now["rows"] and registers.fields("PASS") == now and current != self._pass:
                self._pass = current
                for name, kind in EVENTS.items():
                    if kind and kind.value == current[0]:
                        self.events[name].append(self.cycles())
            self._end_if_enough()
        return True

    def close(self) -> None:
        self._board.close()

    def cycles(self) -> int:
        """Clock cycles since the reset."""
        return self._board.cycles()
