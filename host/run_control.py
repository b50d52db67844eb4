# SPDX-License-Identifier: Apache-2.0
"""Starting runs, waiting for the accelerator and stopping it."""

from __future__ import annotations

from contextlib import suppress

from speq.host.board import Board
from speq.host.registers import ALL_INTERRUPTS, Registers
from speq.hw.accelerator_config import AcceleratorConfig, ErrorCode
from speq.hw.control.register_map import ANSWERS, ERRORS, STATES

#: Times that STATUS is read before an accelerator counts as unable to stop.
_STOP_READS = 100_000


class AcceleratorError(OSError):
    """A run has ended with an error.

    Attributes
    ----------
    code : ErrorCode
    address : int
        Of the culprit, as the register ERROR_ADDRESS explains it.
    """

    def __init__(self, code: ErrorCode, address: int) -> None:
        super().__init__(f"accelerator: {code.name} at {address:#x}: {ERRORS[code]}")
        self.code, self.address = code, address


class RunControl:
    """Runs of the accelerator on a board.

    Parameters
    ----------
    board : Board
    config : AcceleratorConfig
    patience : int, optional
        Cycles without an interrupt after which the accelerator counts as hanging.

    Attributes
    ----------
    registers : Registers
    """

    def __init__(self, board: Board, config: AcceleratorConfig, patience: int | None) -> None:
        self._board, self._patience = board, patience
        self.registers = Registers(board, config)

    def start(self) -> None:
        """Start a run."""
        self.registers["IRQ_STATUS"] = ALL_INTERRUPTS
        self.registers.command("start")

    def answer(self, name: str) -> None:
        """Give the answer that the accelerator waits for, one of `ANSWERS`."""
        self.registers["HOST_ANSWER"] = ANSWERS[name][0]

    def wait(self) -> None:
        """Wait for an interrupt. Raises OSError if there is none in time."""
        if not self._board.wait_interrupt(self._patience):
            raise OSError(f"accelerator: no interrupt within {self._patience} cycles")

    def expect(self, *names: str) -> str:
        """Wait for an interrupt; the state, which must be one of these.

        Raises AcceleratorError if the run has ended with an error, OSError in another state.
        """
        self.wait()
        return self.check_state(*names)

    def check_state(self, *names: str) -> str:
        """The state; otherwise as `expect`."""
        value = self.registers["STATUS"]
        state = next((name for name, (v, _) in STATES.items() if v == value), str(value))
        if state == "ERROR":
            raise AcceleratorError(
                ErrorCode(self.registers["ERROR"]), self.registers["ERROR_ADDRESS"]
            )
        if state not in names:
            raise OSError(f"accelerator: state {state}; expected {' or '.join(names)}")
        return state

    def abort(self) -> None:
        """Bring the accelerator back to IDLE behind an error, if it answers."""
        with suppress(OSError):  # the first error says more
            self.stop()

    def stop(self) -> None:
        """Bring the accelerator to IDLE, whatever it was doing. Raises OSError if it stays busy."""
        idle, error = (STATES[name][0] for name in ("IDLE", "ERROR"))
        if self.registers["STATUS"] not in (idle, error):
            self.registers.command("stop")
        for _ in range(_STOP_READS):
            if self.registers["STATUS"] in (idle, error):
                break
        else:
            raise OSError("accelerator: it does not stop, perhaps memory does not answer: reset it")
        if self.registers["STATUS"] == error:
            self.registers.command("stop")
