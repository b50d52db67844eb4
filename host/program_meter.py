# SPDX-License-Identifier: Apache-2.0
"""Cycles of programs, and of what single descriptors add to them, counted by the accelerator."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from speq.host.board import Board
from speq.host.layout import MemoryLayout
from speq.host.registers import read_configuration
from speq.host.run_control import RunControl
from speq.hw.control.descriptor import Descriptor, DescriptorKind
from speq.hw.control.register_map import COUNTERS

END = Descriptor(DescriptorKind.END)


class ProgramMeter:
    """Runs programs as passes of their own and counts their cycles.

    The accelerator's memory holds a model's image. Its buffers, text and KV cache are overwritten
    by what the programs compute; programs and registers are as before.

    Parameters
    ----------
    board : Board
        With an accelerator that has a vector unit and is idle.
    layout : MemoryLayout
        Of the image. The place of its longest program is used for the programs that are run.
    """

    def __init__(self, board: Board, layout: MemoryLayout) -> None:
        self._board, self._layout = board, layout
        config = read_configuration(board)
        self._control = RunControl(board, config, None)
        sizes = {kind: len(layout.program_content(kind)) for kind in layout.programs}
        longest = max(sizes, key=lambda kind: sizes[kind])
        self._address, self._size = layout.programs[longest], sizes[longest]

    def counters(self, program: Sequence[Descriptor], rows: int, position: int) -> dict[str, int]:
        """What each counter counts in a pass of so many rows, behind so many KV entries.

        `program` is without END. CYCLES are those from the command to start to the end of the run.

        Raises
        ------
        ValueError
            If the program is too long.
        AcceleratorError
            If the run ends with an error.
        """
        content = b"".join(descriptor.pack() for descriptor in (*program, END))
        if len(content) > self._size:
            raise ValueError(
                f"the program has {len(content)} bytes; there is room for {self._size}"
            )
        registers = self._control.registers
        values = {"RUN": 0, "PASS_PROGRAM": self._address, "PROGRAM_LENGTH": len(program) + 1}
        values |= {"PASS_ROWS": rows, "POSITION": position}
        before = {name: registers[name] for name in values}
        memory = self._board.read(self._address, len(content)).copy()
        self._board.write(self._address, content)
        try:
            for name, value in values.items():
                registers[name] = value
            registers.command("clear_counters")
            self._control.start()
            self._control.expect("IDLE")
            return {name: registers[name] for name in COUNTERS}
        finally:
            self._control.stop()
            self._board.write(self._address, memory)
            for name, value in before.items():
                registers[name] = value

    def cycles(self, program: Sequence[Descriptor], rows: int, position: int) -> int:
        """Cycles of such a pass; parameters and errors as of `counters`."""
        return self.counters(program, rows, position)["CYCLES"]

    def prefixes(self, program: Sequence[Descriptor], rows: int, position: int) -> list[int]:
        """Cycles of the pass if its program ended before each descriptor, and of all of it: one
        more than descriptors. What a descriptor adds is the difference of two of them, so that
        these sum to the whole; what it overlaps with is not counted twice."""
        ends = range(len(program) + 1)
        return [self.cycles(program[:end], rows, position) for end in ends]

    def alone(self, descriptor: Descriptor, rows: int, position: int) -> int:
        """Cycles of a descriptor by itself: from its start to its last result in memory."""
        program = [replace(descriptor, wait=False, behind=0)]
        return self.cycles(program, rows, position) - self.cycles([], rows, position)

    def repeated(self, descriptor: Descriptor, rows: int, position: int) -> int:
        """Cycles of a descriptor among others like it, none of which waits."""
        program = [replace(descriptor, wait=False, behind=0)]
        few, many = (self.cycles(n * program, rows, position) for n in (2, 4))
        return (many - few) // 2
