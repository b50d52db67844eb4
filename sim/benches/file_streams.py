# SPDX-License-Identifier: Apache-2.0
"""Streams whose items the simulator itself reads from files and writes to files, with pauses.

For units with flow control that take many items: what `speq.sim.benches.streams` does from Python
takes many times longer.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from amaranth.hdl import Value
from amaranth.lib import wiring
from amaranth.lib.wiring import Flow
from cocotb.clock import Clock
from cocotb.triggers import RisingEdge, Timer, with_timeout

from speq.hw.verilog import convert_unit

_CLOCK_NS = 2
#: Bits that say in how many of 256 cycles a stream pauses.
_PAUSE_BITS = 8
#: Cycles of reset, and without anything to do before a run ends.
_RESET, _IDLE = 3, 60


def file_streams_verilog(bench: wiring.Component, top: str) -> str:
    """Verilog of a bench, all of whose members but the output `busy` are streams, and around it the
    module `top`, which `play_streams` runs. Payloads of outputs are multiples of 32 bits wide."""
    ports, declarations, held = [], [], []
    for i, (name, member) in enumerate(bench.signature.members.items()):
        if name == "busy":
            continue
        bits = len(Value.cast(getattr(bench, name).payload))
        ports += [f".{name}__{part}({name}_{part})" for part in ("valid", "ready", "payload")]
        template = _SOURCE if member.flow is Flow.In else _SINK
        held += [f"{name}_held"] if member.flow is Flow.In else []
        padded = -(-bits // 8) * 8
        declarations.append(template.format(name=name, bits=bits, padded=padded, number=i))
    return _TOP.format(
        top=top,
        ports=", ".join(ports),
        streams="".join(declarations),
        pause_bits=_PAUSE_BITS * len(bench.signature.members),
        idle=_IDLE,
        held=" || ".join(held),
    ) + convert_unit(bench, "bench")


_TOP = """\
module {top} (input clk, input run, input rst, input [{pause_bits}-1:0] pauses, output finished);
  reg [31:0] cycle, idle;
  wire busy;
{streams}  bench bench (.clk(clk), .rst(rst), .busy(busy), {ports});
  always @(posedge clk) begin
    cycle <= rst ? 0 : cycle + 1;
    idle <= rst || busy || {held} ? 0 : idle + 1;
  end
  assign finished = idle > {idle};
endmodule
"""
#: The next item is read between two clock edges, and offered until it is taken.
_SOURCE = """
  integer {name}_file, {name}_log, {name}_count;
  reg [{padded}-1:0] {name}_item;
  reg [31:0] {name}_random;
  reg {name}_held, {name}_valid, {name}_taken;
  wire {name}_ready;
  wire [{bits}-1:0] {name}_payload = {name}_item[{bits}-1:0];
  always @(posedge run) begin
    {name}_file = $fopen("{name}.in", "rb");
    {name}_log = $fopen("{name}.log", "wb");
    {name}_random = 32'd{number} * 32'd40503 + 32'd12345;
    {name}_held = 0;
    {name}_valid = 0;
  end
  always @(negedge run) begin
    $fclose({name}_file);
    $fclose({name}_log);
  end
  always @(posedge clk) begin
    {name}_taken <= run && !rst && {name}_valid && {name}_ready;
    if (run && !rst && {name}_valid && {name}_ready) $fwrite({name}_log, "%u", cycle);
  end
  always @(negedge clk) if (run && !rst) begin
    if ({name}_taken) begin
      {name}_held = 0;
      {name}_valid = 0;
    end
    if (!{name}_held) begin
      {name}_count = $fread({name}_item, {name}_file);
      {name}_held = {name}_count != 0;
    end
    {name}_random = {name}_random * 32'd1664525 + 32'd1013904223;
    if ({name}_held && {name}_random[31:24] >= pauses[8*{number} +: 8]) {name}_valid = 1;
  end
"""
_SINK = """
  integer {name}_log;
  reg [31:0] {name}_random;
  reg {name}_ready;
  wire {name}_valid;
  wire [{bits}-1:0] {name}_payload;
  always @(posedge run) begin
    {name}_log = $fopen("{name}.log", "wb");
    {name}_random = 32'd{number} * 32'd40503 + 32'd12345;
    {name}_ready = 0;
  end
  always @(negedge run) $fclose({name}_log);
  always @(posedge clk)
    if (run && !rst && {name}_valid && {name}_ready)
      $fwrite({name}_log, "%u", {{{name}_payload, cycle}});
  always @(negedge clk) begin
    {name}_random = {name}_random * 32'd1664525 + 32'd1013904223;
    {name}_ready = {name}_random[31:24] >= pauses[8*{number} +: 8];
  end
"""


async def play_streams(
    dut: Any,
    bench: wiring.Component,
    items: Mapping[str, np.ndarray],
    pauses: Mapping[str, float],
    patience: int,
    *,
    cut: int = 0,
) -> dict[str, np.ndarray]:
    """Reset the bench, let it take the items and record what it gives, until everything was
    taken and it is no longer busy.

    Parameters
    ----------
    dut : cocotb handle
        The top module of `file_streams_verilog`.
    bench : wiring.Component
    items : dict
        Of each input stream the payloads, uint8 [items, bytes], the lowest byte first.
    pauses : dict
        Of streams the share of cycles in which they pause.
    patience : int
        Cycles.
    cut : int
        End it after so many cycles in any case, if not 0; what has been recorded is then not whole.

    Returns
    -------
    dict
        Of each input stream the cycles in which items were taken, uint32 [items]; of each output
        stream, uint32 [items, 1 + words]: the cycle, and the payload, its lowest word first.

    Raises
    ------
    SimTimeoutError
        If it is busy for longer than `patience`.
    """
    bits = 0
    members = list(bench.signature.members.items())
    for i, (name, _) in enumerate(members):
        bits |= round(255 * pauses.get(name, 0.0)) << _PAUSE_BITS * i
        if name in items:
            Path(f"{name}.in").write_bytes(items[name][:, ::-1].tobytes())
    dut.clk.value, dut.run.value, dut.rst.value, dut.pauses.value = 1, 0, 1, bits
    await Timer(1, "ns")
    dut.run.value = 1
    clock = Clock(dut.clk, _CLOCK_NS, "ns", impl="gpi")
    clock.start(start_high=False)
    await Timer(_CLOCK_NS * _RESET, "ns")
    dut.rst.value = 0
    await Timer(_CLOCK_NS, "ns")
    if cut:
        await Timer(_CLOCK_NS * cut, "ns")
    else:
        await with_timeout(RisingEdge(dut.finished), _CLOCK_NS * patience, "ns")
    clock.stop()
    dut.run.value = 0
    await Timer(1, "ns")
    logs = {}
    for name, member in members:
        if name == "busy":
            continue
        log = np.fromfile(f"{name}.log", "<u4")
        width = len(Value.cast(getattr(bench, name).payload)) // 32
        logs[name] = log if member.flow is Flow.In else log.reshape(-1, 1 + width)
    return logs
