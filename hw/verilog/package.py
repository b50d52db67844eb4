# SPDX-License-Identifier: Apache-2.0
"""What goes with the accelerator's Verilog: a FuseSoC core file and an example of its use."""

from __future__ import annotations

from collections.abc import Iterable

from amaranth.hdl import Shape
from amaranth.lib import wiring
from amaranth.lib.wiring import Flow

#: Version of the generated core.
CORE_VERSION = "0.1.0"

_WRAPPER = "speq_axi_example"
#: AXI4 signals that the accelerator leaves out, with their widths and the values that stand for
#: them: normal accesses, no quality of service, no region.
_TIED = {"lock": 1, "qos": 4, "region": 4}
_PORTS = ("s_axi_control", "m_axi_weights", "m_axi_data")


def fusesoc_core(top: str, stem: str, waivers: Iterable[str]) -> str:
    """FuseSoC core file (CAPI2) of the module `top` in the file `stem`.v and those beside it.

    `waivers` are the warnings of Verilator that its target `lint` leaves out.
    """
    options = ", ".join(f"-Wno-{name}" for name in waivers)
    return f"""\
CAPI=2:
name: "::speq:{CORE_VERSION}"
description: "FP16 accelerator for LLM decoding that drafts with 4 bits of its own weights"
filesets:
  rtl:
    files: [{stem}.v]
    file_type: verilogSource-2005
  example:
    files: [{stem}_example.v]
    file_type: verilogSource-2005
  firmware:
    files: [{stem}.h: {{is_include_file: true}}]
    file_type: cSource
targets:
  default: &default
    description: the accelerator
    filesets: [rtl, firmware]
    toplevel: {top}
  example:
    <<: *default
    description: the accelerator as a block for an AXI interconnect
    filesets: [rtl, example, firmware]
    toplevel: {_WRAPPER}
  lint:
    <<: *default
    description: Verilator's warnings
    default_tool: verilator
    filesets: [rtl]
    tools:
      verilator:
        mode: lint-only
        verilator_options: [{options}]
"""


def axi_example(accelerator: wiring.Component, top: str) -> str:
    """Verilog of an example: the accelerator as a block for an AXI interconnect.

    It has the active-low reset and the signals that interconnects expect and the accelerator does
    not need. The attributes let block-design tools (Vivado's, for example) see the three ports as
    interfaces: connect `s_axi_control` to a master of the interconnect (4 KiB of address space),
    `m_axi_weights` and `m_axi_data` to slaves of it, or to memory channels of their own.
    """
    ports = [
        (path[0], member.flow, Shape.cast(member.shape).width)
        for path, member, _ in accelerator.signature.flatten(accelerator)
    ]
    channels = [f"{port}_{c}" for port in _PORTS[1:] for c in ("ar", "aw")]
    names = {name for name, _, _ in ports}
    tied = [
        (f"{channel}{signal}", width)
        for channel in channels
        if f"{channel}valid" in names
        for signal, width in _TIED.items()
    ]
    bus = ":".join(_PORTS)
    lines = [
        "// SPDX-License-Identifier: Apache-2.0",
        "// Example: the accelerator as a block to attach to an AXI interconnect.",
        f"module {_WRAPPER} (",
        '  (* X_INTERFACE_INFO = "xilinx.com:signal:clock:1.0 aclk CLK" *)',
        f'  (* X_INTERFACE_PARAMETER = "ASSOCIATED_BUSIF {bus}, ASSOCIATED_RESET aresetn" *)',
        "  input aclk,",
        '  (* X_INTERFACE_INFO = "xilinx.com:signal:reset:1.0 aresetn RST" *)',
        '  (* X_INTERFACE_PARAMETER = "POLARITY ACTIVE_LOW" *)',
        "  input aresetn,",
    ]
    declared = [(name, flow is Flow.In, width) for name, flow, width in ports]
    declared += [(name, False, width) for name, width in tied]
    lines.append(",\n".join(_port(name, is_input, width) for name, is_input, width in declared))
    lines += [
        ");",
        "  // Interconnects reset with a low level, and release it at a clock edge.",
        f"  {top} accelerator (",
        "    .clk(aclk),",
        "    .rst(!aresetn),",
        ",\n".join(f"    .{name}({name})" for name, _, _ in ports),
        "  );",
        *(f"  assign {name} = {width}'d0;" for name, width in tied),
        "endmodule",
    ]
    return "\n".join(lines) + "\n"


def _port(name: str, is_input: bool, width: int) -> str:
    """The declaration of a port, with the interface that it belongs to."""
    direction = "input" if is_input else "output"
    size = f" [{width - 1}:0]" if width > 1 else ""
    if name == "irq":
        attribute = '  (* X_INTERFACE_INFO = "xilinx.com:signal:interrupt:1.0 irq INTERRUPT" *)\n'
        return f"{attribute}  {direction}{size} {name}"
    bus = next(prefix for prefix in _PORTS if name.startswith(prefix))
    signal = name[len(bus) + 1 :].upper()
    attribute = f'  (* X_INTERFACE_INFO = "xilinx.com:interface:aximm:1.0 {bus} {signal}" *)\n'
    return f"{attribute}  {direction}{size} {name}"
