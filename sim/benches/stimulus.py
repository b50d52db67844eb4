# SPDX-License-Identifier: Apache-2.0
"""Cycle-by-cycle stimulus for units without flow control, as numpy arrays.

A bench is a component with the members `stimulus` (all inputs side by side) and `observed` (all
outputs), each a multiple of 64 bits wide: two signals to access in a cycle, however many copies of
a unit the bench holds.

`bench_verilog` and `play` set and read these in each cycle from Python; `file_bench_verilog` and
`play_files` leave it to the simulator, which is many times faster, for millions of operands.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from amaranth.lib import data, wiring
from cocotb.clock import Clock
from cocotb.triggers import Timer

from speq.hw.verilog import convert_unit

WORD_BITS = 64
#: What `file_bench_verilog`'s module reads and writes, in the folder that it runs in.
_STIMULUS_FILE = Path("stimulus.bin")
_OBSERVED_FILE = Path("observed.bin")


def bench_verilog(bench: wiring.Component, top: str) -> str:
    """Verilog of a bench and, around it, the module `top`, whose ports are its only signals.

    The simulator can leave out all signals inside, then.
    """
    inputs, outputs = (len(port.as_value()) for port in (bench.stimulus, bench.observed))
    return (
        f"module {top} (input clk, input [{inputs - 1}:0] stimulus, "
        f"output [{outputs - 1}:0] observed);\n"
        "  bench bench (.clk(clk), .stimulus(stimulus), .observed(observed));\nendmodule\n"
    ) + convert_unit(bench, "bench", reset=False)


async def play(dut: Any, stimulus: np.ndarray) -> np.ndarray:
    """Apply one row of `stimulus` in each clock cycle and record the outputs of that cycle.

    Parameters
    ----------
    dut : cocotb handle
        The top module of `bench_verilog`.
    stimulus : uint64 array [cycles, words]
        The first word is in the lowest bits.

    Returns
    -------
    uint64 array [cycles, words]
        Outputs before the clock edge that ends the cycle, so that combinational outputs belong to
        the same row's inputs, and a register's are one row late.
    """
    observed = bytearray()
    for row in stimulus.astype("<u8"):
        dut.clk.value = 0
        dut.stimulus.value = int.from_bytes(row.tobytes(), "little")
        await Timer(1, "ns")
        observed += dut.observed.value.to_bytes(byteorder="little")
        dut.clk.value = 1
        await Timer(1, "ns")
    return np.frombuffer(observed, "<u8").reshape(len(stimulus), -1)


def file_bench_verilog(bench: wiring.Component, top: str) -> str:
    """Verilog of a bench and, around it, the module `top`, which `play_files` runs.

    While `run` is 1 it reads a row of stimulus at each falling edge of `clk` and writes the outputs
    at each rising one.
    """
    inputs, outputs = (len(port.as_value()) for port in (bench.stimulus, bench.observed))
    return (
        f"""\
module {top} (input clk, input run);
  integer source, sink, count;
  reg [{inputs - 1}:0] stimulus;
  wire [{outputs - 1}:0] observed;
  bench bench (.clk(clk), .stimulus(stimulus), .observed(observed));
  always @(posedge run) begin
    source = $fopen("{_STIMULUS_FILE}", "rb");
    sink = $fopen("{_OBSERVED_FILE}", "wb");
  end
  always @(negedge run) begin
    $fclose(source);
    $fclose(sink);
  end
  always @(negedge clk) if (run) count = $fread(stimulus, source);
  always @(posedge clk) if (run) $fwrite(sink, "%u", observed);
endmodule
"""
    ) + convert_unit(bench, "bench", reset=False)


async def play_files(dut: Any, stimulus: np.ndarray) -> np.ndarray:
    """As `play`, for the top module of `file_bench_verilog`."""
    # The simulator fills a vector from its highest byte on.
    _STIMULUS_FILE.write_bytes(stimulus[:, ::-1].astype(">u8").tobytes())
    dut.clk.value, dut.run.value = 1, 0
    await Timer(1, "ns")
    dut.run.value = 1
    clock = Clock(dut.clk, 2, "ns", impl="gpi")
    clock.start(start_high=False)
    # Half a cycle more than the last edge that counts.
    await Timer(2 * len(stimulus), "ns")
    clock.stop()
    dut.run.value = 0
    await Timer(1, "ns")
    return np.fromfile(_OBSERVED_FILE, "<u8").reshape(len(stimulus), -1)


def pad(stimulus: np.ndarray, cycles: int) -> np.ndarray:
    """A stimulus of so many cycles: at its end, all inputs are 0."""
    return np.pad(stimulus, ((0, cycles - len(stimulus)), (0, 0)))


def pack(layout: data.StructLayout, fields: Mapping[str, np.ndarray]) -> np.ndarray:
    """Bits of a structure of at most 64 bits, elementwise.

    Parameters
    ----------
    layout : data.StructLayout
    fields : arrays of one shape [...] by field name
        A field that is an array has its elements along one more, last axis. Fields that are not
        given are 0.

    Returns
    -------
    uint64 array [...]
    """
    packed = np.zeros((), np.uint64)
    for name, values in fields.items():
        place, values = layout[name], values.astype(np.uint64)
        if isinstance(place.shape, data.ArrayLayout):
            elements = [(element.offset, values[..., i]) for i, element in place.shape]
        else:
            elements = [(0, values)]
        for offset, element in elements:
            packed = packed | element << np.uint64(place.offset + offset)
    return packed
