# SPDX-License-Identifier: Apache-2.0
"""The clock of `gemm_engine`'s simulations.

It has a module of its own, so that the many short simulations do not import torch.
"""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

import cocotb
from cocotb.clock import Clock
from cocotb.triggers import ClockCycles, First, RisingEdge, Timer

_CLOCK_NS = 2
#: Cycles at the end in which no further beat may appear.
_SETTLE = 100


@cocotb.test()
async def run_to_end(dut: Any) -> None:
    """Clock the design until all results are out; report cycles and speed in a file."""
    limit = int(os.environ["SPEQ_CYCLE_LIMIT"])
    dut.rst.value = 1
    started = time.perf_counter()
    cocotb.start_soon(Clock(dut.clk, _CLOCK_NS, "ns", impl="gpi").start())
    await ClockCycles(dut.clk, 4)
    dut.rst.value = 0
    if not int(dut.done.value):
        await First(RisingEdge(dut.done), Timer(limit * _CLOCK_NS, "ns"))
    cycles = int(dut.cycle.value)
    seconds = time.perf_counter() - started
    await ClockCycles(dut.clk, _SETTLE)
    report = {
        "done": bool(int(dut.done.value)),
        "idle": bool(int(dut.idle.value)),
        "nonfinite": bool(int(dut.nonfinite.value)),
        "rejected": bool(int(dut.rejected.value)),
        "cycles": cycles,
        "cycles_per_second": cycles / seconds,
    }
    Path("report.json").write_text(json.dumps(report))
