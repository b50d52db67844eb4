# SPDX-License-Identifier: Apache-2.0
"""A testbench of the generated accelerator that checks itself, in Verilog-2005."""

from __future__ import annotations

from amaranth.hdl import Shape
from amaranth.lib.wiring import Flow

from speq.hw.accelerator import Accelerator
from speq.hw.control.register_map import (
    ADDRESS_BITS,
    ANSWERS,
    STATES,
    Register,
    constants,
    registers,
)
from speq.hw.memory.axi import BURST_INCR, CACHE, PROTECTION, AxiConfig
from speq.hw.verilog.smoke_program import HOST_ARGUMENT, Region, SmokeProgram, smoke_program

_MAX_CYCLES = 100_000
#: A register of 32 bits that the program does not use, and what is written to it.
_UNUSED, _PATTERN = "THRESHOLD", 0xA5C33C5A
_OKAY, _DECERR = 0b00, 0b11


def testbench(accelerator: Accelerator, top: str) -> str:
    """Verilog of the module `top`_tb, which drives the accelerator, module `top`.

    It reads the registers that never change, writes one and reads it back, runs the program of
    `smoke_program` from memories of its own behind the AXI4 ports, answers its interrupt, and
    compares the results. Then it prints PASS; or FAIL, and the simulator ends with an error.
    """
    config = accelerator.config
    program = smoke_program(config)
    parts = [
        _header(top),
        _instance(accelerator, top),
        _master(),
        _read_port("m_axi_weights", config.weights, program.weights),
        _read_port("m_axi_data", config.data, program.operands),
        _write_port("m_axi_data", config.data, program.written),
        _run(accelerator, program),
    ]
    return "\n".join(parts) + "endmodule\n"


def _header(top: str) -> str:
    return f"""\
// SPDX-License-Identifier: Apache-2.0
// Testbench of the accelerator: registers, interrupt, and a product in each mode from memory.
module {top}_tb;
  reg clk;
  reg rst;
  integer errors;

  initial begin
    clk = 1'b0;
    forever #5 clk = !clk;
  end

  // The simulator ends with an error, for whatever runs it.
  task fail;
    begin
`ifdef VERILATOR
      $stop;
`else
      $fatal(1);
`endif
    end
  endtask

  initial begin
    repeat ({_MAX_CYCLES}) @(negedge clk);
    $display("FAIL: not at the end after {_MAX_CYCLES} cycles");
    fail;
  end
"""


def _instance(accelerator: Accelerator, top: str) -> str:
    """The signals of all ports but clock and reset, and the accelerator."""
    ports = [
        (path[0], member.flow, Shape.cast(member.shape).width)
        for path, member, _ in accelerator.signature.flatten(accelerator)
    ]
    signals = [
        f"  {'reg' if flow is Flow.In else 'wire'}{_range(width)} {name};"
        for name, flow, width in ports
    ]
    connections = [f"    .{name}({name})" for name in ("clk", "rst", *(name for name, *_ in ports))]
    return "\n".join([*signals, "", f"  {top} accelerator (", ",\n".join(connections), "  );", ""])


def _master() -> str:
    """Tasks that access the registers and count what is wrong."""
    address = f"[{ADDRESS_BITS - 1}:0]"
    return f"""\
  // The master of the registers. Signals change at falling edges, transfers are at rising ones.

  task write_register;
    input {address} offset;
    input [31:0] content;
    begin
      @(negedge clk);
      s_axi_control_awaddr = offset;
      s_axi_control_awvalid = 1'b1;
      while (!s_axi_control_awready) @(negedge clk);
      @(negedge clk);
      s_axi_control_awvalid = 1'b0;
      s_axi_control_wdata = content;
      s_axi_control_wvalid = 1'b1;
      while (!s_axi_control_wready) @(negedge clk);
      @(negedge clk);
      s_axi_control_wvalid = 1'b0;
      s_axi_control_bready = 1'b1;
      while (!s_axi_control_bvalid) @(negedge clk);
      if (s_axi_control_bresp !== 2'd{_OKAY}) begin
        $display("FAIL: writing register %h is answered with %b", offset, s_axi_control_bresp);
        errors = errors + 1;
      end
      @(negedge clk);
      s_axi_control_bready = 1'b0;
    end
  endtask

  task check_register;
    input {address} offset;
    input [31:0] expected;
    begin
      @(negedge clk);
      s_axi_control_araddr = offset;
      s_axi_control_arvalid = 1'b1;
      while (!s_axi_control_arready) @(negedge clk);
      @(negedge clk);
      s_axi_control_arvalid = 1'b0;
      s_axi_control_rready = 1'b1;
      while (!s_axi_control_rvalid) @(negedge clk);
      if (s_axi_control_rdata !== expected || s_axi_control_rresp !== 2'd{_OKAY}) begin
        $display("FAIL: register %h: got %h (response %b), expected %h", offset,
                 s_axi_control_rdata, s_axi_control_rresp, expected);
        errors = errors + 1;
      end
      @(negedge clk);
      s_axi_control_rready = 1'b0;
    end
  endtask

  task check_interrupt;
    input expected;
    begin
      @(negedge clk);
      if (irq !== expected) begin
        $display("FAIL: irq: got %b, expected %b", irq, expected);
        errors = errors + 1;
      end
    end
  endtask
"""


def _read_port(port: str, axi: AxiConfig, region: Region) -> str:
    """The memory that a port reads: one burst at a time, a beat in each cycle."""
    return f"""\
  // What {port} reads: one burst at a time.
{_memory(f"{port}_memory", axi, region)}
  initial begin
{_content(f"{port}_memory", axi, region)}
  end

{_channel(port, "ar", axi, region)}
  always @(posedge clk) begin
    if (rst) begin
      {port}_arready <= 1'b1;
      {port}_rvalid <= 1'b0;
      {port}_ar_wrong <= 1'b0;
    end else if ({port}_arready) begin
      if ({port}_arvalid) begin
        {port}_arready <= 1'b0;
        {port}_rid <= {port}_arid;
{_take(port, "ar", "r", axi, region)}
      end
    end else if (!{port}_rvalid || {port}_rready) begin
      {port}_rvalid <= !({port}_rvalid && {port}_rlast);
      {port}_arready <= {port}_rvalid && {port}_rlast;
      {port}_rdata <= {port}_memory[{port}_ar_beat];
      {port}_rlast <= {port}_ar_left == 8'd0;
      {port}_ar_beat <= {port}_ar_beat + 1'b1;
      {port}_ar_left <= {port}_ar_left - 8'd1;
    end
  end
"""


def _write_port(port: str, axi: AxiConfig, region: Region) -> str:
    """The memory that a port writes: one burst at a time, a beat in each cycle."""
    return f"""\
  // What {port} writes: one burst at a time.
{_memory("results", axi, region)}
{_channel(port, "aw", axi, region)}
  wire{_range(axi.data_bits)} written;  // the bits with strobe
  genvar i;
  generate
    for (i = 0; i < {axi.beat_bytes}; i = i + 1) begin : strobes
      assign written[8 * i +: 8] = {{8{{{port}_wstrb[i]}}}};
    end
  endgenerate

  always @(posedge clk) begin
    if (rst) begin
      {port}_awready <= 1'b1;
      {port}_wready <= 1'b0;
      {port}_bvalid <= 1'b0;
      {port}_aw_wrong <= 1'b0;
    end else if ({port}_awready) begin
      if ({port}_awvalid) begin
        {port}_awready <= 1'b0;
        {port}_wready <= 1'b1;
        {port}_bid <= {port}_awid;
{_take(port, "aw", "b", axi, region)}
      end
    end else if ({port}_wready) begin
      if ({port}_wvalid) begin
        results[{port}_aw_beat] <=
            {port}_wdata & written | results[{port}_aw_beat] & ~written;
        {port}_aw_beat <= {port}_aw_beat + 1'b1;
        {port}_aw_left <= {port}_aw_left - 8'd1;
        {port}_wready <= {port}_aw_left != 8'd0;
        {port}_bvalid <= {port}_aw_left == 8'd0;
        if ({port}_wlast != ({port}_aw_left == 8'd0)) {port}_aw_wrong <= 1'b1;
      end
    end else if ({port}_bready) begin
      {port}_bvalid <= 1'b0;
      {port}_awready <= 1'b1;
    end
  end
"""


def _index_bits(region: Region) -> int:
    """Bits of the number of a beat in a region."""
    return max(1, (_beats(region) - 1).bit_length())


def _beats(region: Region) -> int:
    return (region.stop - region.start) // region.beat


def _memory(name: str, axi: AxiConfig, region: Region) -> str:
    return f"  reg{_range(axi.data_bits)} {name} [0:{_beats(region) - 1}];"


def _content(name: str, axi: AxiConfig, region: Region) -> str:
    """Assignments of a memory's content, a beat each."""
    lines = []
    for buffer in region.buffers:
        lines.append(f"    // {_sentence(buffer.name)}")
        first = (buffer.address - region.start) // region.beat
        for i in range(0, len(buffer.content), region.beat):
            beat = int.from_bytes(buffer.content[i : i + region.beat], "little")
            lines.append(f"    {name}[{first + i // region.beat}] = {_hex(beat, axi.data_bits)};")
    return "\n".join(lines)


def _channel(port: str, channel: str, axi: AxiConfig, region: Region) -> str:
    """Registers of the burst under way: the next beat, those behind it; something was wrong."""
    return f"""\
  reg{_range(_index_bits(region))} {port}_{channel}_beat;
  reg [7:0] {port}_{channel}_left;
  reg {port}_{channel}_wrong;
"""


def _take(port: str, channel: str, response: str, axi: AxiConfig, region: Region) -> str:
    """Take an address: it must be in the region, and the burst as all of the accelerator's are."""
    name = f"{port}_{channel}"
    low, high = axi.offset_bits, axi.offset_bits + _index_bits(region)
    upper = f"{name}addr[{axi.address_bits - 1}:{high}]"
    start = _hex(region.start >> high, axi.address_bits - high)
    kind = axi.offset_bits << 9 | BURST_INCR << 7 | CACHE << 3 | PROTECTION
    signals = ", ".join(f"{name}{signal}" for signal in ("size", "burst", "cache", "prot"))
    right = f"12'b{kind:012b}"
    return f"""\
        {name}_beat <= {name}addr[{high - 1}:{low}];
        {name}_left <= {name}len;
        {port}_{response}resp <= {upper} == {start} ? 2'd{_OKAY} : 2'd{_DECERR};
        if ({name}addr[{low - 1}:0] != {low}'d0) {name}_wrong <= 1'b1;
        if ({{{signals}}}
            != {right}) {name}_wrong <= 1'b1;"""


def _steps(accelerator: Accelerator, program: SmokeProgram) -> list[str]:
    """Statements, from reset to the last check."""
    config = accelerator.config
    by_name = {register.name: register for register in registers(config)}
    inputs = [
        path[0]
        for path, member, _ in accelerator.signature.flatten(accelerator)
        if member.flow is Flow.In and path[0].startswith("s_axi_control_")
    ]

    def write(name: str, value: int) -> list[str]:
        return _accesses("write_register", by_name[name], value)

    def check(name: str, value: int) -> list[str]:
        return _accesses("check_register", by_name[name], value)

    def bits(name: str, *chosen: str) -> int:
        register = by_name[name]
        return register.pack({field.name: int(field.name in chosen) for field in register.fields})

    lines = [
        "errors = 0;",
        "rst = 1'b1;",
        *(f"{name} = {'15' if name.endswith('wstrb') else '0'};" for name in inputs),
        "repeat (4) @(negedge clk);",
        "rst = 1'b0;",
        "",
        "// What never changes.",
    ]
    for name, value in constants(config).items():
        lines += check(name, by_name[name].pack(value))
    lines += ["", "// A register holds what is written to it."]
    lines += [*check(_UNUSED, 0), *write(_UNUSED, _PATTERN), *check(_UNUSED, _PATTERN)]
    lines += ["", "// A run, up to its HOST descriptor: all products are finished."]
    lines += [
        *check("STATUS", STATES["IDLE"][0]),
        *check("IRQ_STATUS", 0),
        "check_interrupt(1'b0);",
    ]
    for name, value in program.registers.items():
        lines += write(name, value)
    lines += write("IRQ_ENABLE", bits("IRQ_ENABLE", "host", "done", "error"))
    lines += write("CONTROL", bits("CONTROL", "start"))
    lines += ["while (!irq) @(negedge clk);"]
    lines += check("STATUS", STATES["HOST"][0])
    lines += check("ERROR", 0)
    lines += check("IRQ_STATUS", bits("IRQ_STATUS", "host"))
    lines += check("HOST_ARGUMENT", HOST_ARGUMENT)
    beat = config.data.beat_bytes
    for product in program.results:
        lines += ["", f"// {_sentence(product.name)}"]
        for token, row in enumerate(product.rows):
            first = (product.address + token * product.stride - program.written.start) // beat
            for i in range(0, len(row), beat):
                part = row[i : i + beat]
                number = _hex(int.from_bytes(part, "little"), config.data.data_bits)
                lines.append(f"check_results({first + i // beat}, {len(part)}, {number});")
    lines += ["", "// The end of the run."]
    lines += write("HOST_ANSWER", ANSWERS["CONTINUE"][0])
    lines += ["while (!irq) @(negedge clk);"]
    lines += check("STATUS", STATES["IDLE"][0])
    lines += check("IRQ_STATUS", bits("IRQ_STATUS", "done"))
    lines += check("DESCRIPTORS", program.descriptors)
    lines += write("IRQ_STATUS", bits("IRQ_STATUS", "done"))
    lines += check("IRQ_STATUS", 0)
    return [*lines, "check_interrupt(1'b0);"]


def _run(accelerator: Accelerator, program: SmokeProgram) -> str:
    """What happens, from reset to the verdict."""
    data_bits = accelerator.config.data.data_bits
    body = "\n".join(f"    {line}" if line else "" for line in _steps(accelerator, program))
    return f"""\
  // Compare the first bytes of a beat of the results.
  task check_results;
    input{_range(_index_bits(program.written))} beat;
    input integer bytes;
    input{_range(data_bits)} expected;
    reg{_range(data_bits)} got;
    begin
      got = results[beat] & ({{{data_bits}{{1'b1}}}} >> ({data_bits} - 8 * bytes));
      if (got !== expected) begin
        $display("FAIL: results, beat %0d: got %h, expected %h", beat, got, expected);
        errors = errors + 1;
      end
    end
  endtask

  initial begin
{body}

    if (m_axi_weights_ar_wrong || m_axi_data_ar_wrong || m_axi_data_aw_wrong) begin
      $display("FAIL: a burst is not as it should be");
      errors = errors + 1;
    end
    if (errors != 0) begin
      $display("FAIL: %0d errors", errors);
      fail;
    end else begin
      $display("PASS: registers, interrupt and {len(program.results)} products");
      $finish;
    end
  end
"""


def _accesses(task: str, register: Register, value: int) -> list[str]:
    """Calls of a task for each word of a register."""
    return [
        f"{task}({_hex(offset, ADDRESS_BITS)}, {_hex(value >> 32 * i & 0xFFFFFFFF, 32)});"
        f"  // {register.name}{', upper half' if i else ''}"
        for i, offset in enumerate(register.offsets)
    ]


def _hex(value: int, bits: int) -> str:
    """A number in Verilog."""
    return f"{bits}'h{value:0{-(-bits // 4)}x}"


def _sentence(text: str) -> str:
    return f"{text[0].upper()}{text[1:]}."


def _range(bits: int) -> str:
    """The range of a declaration, nothing for a single bit."""
    return f" [{bits - 1}:0]" if bits > 1 else ""
