# SPDX-License-Identifier: Apache-2.0
"""What a driver needs of a board, real or simulated."""

from __future__ import annotations

from typing import Protocol

import numpy as np


class Board(Protocol):
    """An accelerator, its registers, its interrupt and the memory that it shares with the host.

    A driver that uses nothing else runs on simulated and on real boards alike.

    Flow control: every call returns when what it asks for is done. Memory is coherent: what `write`
    has written before a `write_register` is seen by the accelerator after it, and what the
    accelerator has written before it raises an interrupt is seen by `read`.

    Any call may raise OSError when the board does not answer; it is of no use from then on.
    """

    def read_register(self, offset: int) -> int:
        """Value of the 32-bit register at byte offset `offset`, a multiple of 4."""
        ...

    def write_register(self, offset: int, value: int) -> None:
        """Write `value`, 0 to 2**32 - 1, to the register at byte offset `offset`."""
        ...

    def read(self, address: int, size: int) -> np.ndarray:
        """Copy of `size` bytes of memory from `address` on, uint8 [size]."""
        ...

    def write(self, address: int, values: np.ndarray | bytes | bytearray | memoryview) -> None:
        """Write the bytes of `values`, an array of any type in C order, from `address` on."""
        ...

    def wait_interrupt(self, timeout_cycles: int | None = None) -> bool:
        """Wait until the interrupt line is high.

        Parameters
        ----------
        timeout_cycles : int, optional
            Clock cycles of the accelerator after which to give up; None waits for ever.

        Returns
        -------
        bool
            Whether the line is high: False after the time-out.
        """
        ...

    def close(self) -> None:
        """Release what the board takes up; no other call is allowed from then on, but another
        `close`, which does nothing."""
        ...
