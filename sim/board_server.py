# SPDX-License-Identifier: Apache-2.0
"""The simulator's side of `SimulatedBoard`: a cocotb test that carries out requests.

A request asks the master in board.sv for a register access, or to wait for the interrupt. Between
requests the simulation stands still.
"""

from __future__ import annotations

import enum
import os
import socket
import struct
from typing import Any

import cocotb
from cocotb.clock import Clock
from cocotb.triggers import ClockCycles, ValueChange

#: Environment variable with the number of the file descriptor of the connection.
CONNECTION = "SPEQ_BOARD_CONNECTION"
#: Kind, address and data of a request.
REQUEST = struct.Struct("<III")
#: Answer, response and cycles since reset.
ANSWER = struct.Struct("<IIQ")
#: Value of `response` for a register port that did not answer.
TIMEOUT = 4
#: Nanoseconds of a clock cycle.
CLOCK_NS = 2

_RESET_CYCLES = 8


class RequestKind(enum.IntEnum):
    """What a request asks for; see board.sv."""

    READ = 0
    WRITE = 1
    #: Until the interrupt, but at most `data` cycles.
    WAIT = 2
    #: Reset of all but the contents of memory.
    RESET = 3


@cocotb.test()
async def serve(dut: Any) -> None:
    """Carry out requests until the connection is closed."""
    with socket.socket(fileno=int(os.environ[CONNECTION])) as connection:
        dut.rst.value = 1
        Clock(dut.clk, CLOCK_NS, "ns", impl="gpi").start()
        await _reset(dut)
        toggle = 0
        done = ValueChange(dut.done)
        while request := connection.recv(REQUEST.size, socket.MSG_WAITALL):
            kind, address, data = REQUEST.unpack(request)
            if kind == RequestKind.RESET:
                await _reset(dut)
                toggle = 0
                connection.sendall(ANSWER.pack(0, 0, int(dut.cycle.value)))
                continue
            toggle ^= 1
            dut.kind.value = kind
            dut.address.value = address
            dut.data.value = data
            dut.request.value = toggle
            await done
            values = (int(handle.value) for handle in (dut.answer, dut.response, dut.cycle))
            connection.sendall(ANSWER.pack(*values))


async def _reset(dut: Any) -> None:
    """Reset for some cycles, and a cycle without."""
    dut.rst.value = 1
    dut.request.value = 0
    await ClockCycles(dut.clk, _RESET_CYCLES)
    dut.rst.value = 0
    await ClockCycles(dut.clk, 1)
