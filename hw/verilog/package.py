# SPDX-License-Identifier: Apache-2.0
"""What goes with the Verilog: a FuseSoC core, waivers of warnings, and an example of its use."""

from __future__ import annotations

import json
import re

from amaranth.hdl import Shape
from amaranth.lib import wiring
from amaranth.lib.wiring import Flow

#: Version of the generated core.
CORE_VERSION = "0.1.0"
#: Verilator lint messages of `-Wall` that do not apply to generated Verilog, and why.
LINT_WAIVERS = {
    "CASEINCOMPLETE": "numbers that an enumeration does not use leave the default value",
    "DECLFILENAME": "all modules are in one file",
    "PROCASSINIT": "registers have their reset value as initial value too, for FPGAs",
    "UNOPTFLAT": "to old versions, parts of a vector that depend on each other look like a loop",
    "UNUSEDSIGNAL": "results that are cut to their width keep names for the bits cut off",
    "WIDTH": "operands are widened and results cut by Verilog's rules, which is meant",
}
#: How the message begins of those that old versions of Verilator do not know: in a waiver file they
#: refuse unknown names, but any text.
_NEW_MESSAGES = {"PROCASSINIT": "Procedural assignment to declaration with initial value"}
#: The waiver that the example and the testbench need, too: the files' names are the user's choice.
_NAME_WAIVER = "DECLFILENAME"

_WRAPPER = "speq_axi_example"
#: AXI4 signals that the accelerator leaves out, with their widths and the values that stand for
#: them: normal accesses, no quality of service, no region.
_TIED = {"lock": 1, "qos": 4, "region": 4}
_PORTS = ("s_axi_control", "m_axi_weights", "m_axi_data")


def fusesoc_core(top: str, stem: str, *, accelerator: bool) -> str:
    """FuseSoC core file (CAPI2, with flows of Edalize) of the module `top` and the files beside it.

    Their names begin with `stem`, which is also the core's name, so that several configurations fit
    into one library. The core of an engine has no example, no testbench and no registers.
    """
    name = re.sub(r"[^A-Za-z0-9_.-]", "_", stem)
    what = "accelerator for LLM decoding that drafts with 4 bits of its own weights"
    description = f"FP16 {what}" if accelerator else f"The matrix engine of an FP16 {what}"
    sets = {"rtl": ("verilogSource-2005", [".v"]), "waivers": ("vlt", [".vlt"])}
    if accelerator:
        sets |= {
            "example": ("verilogSource-2005", ["_example.v"]),
            "testbench": ("verilogSource-2005", ["_tb.v"]),
            "registers": ("user", [".rdl"]),
        }
    lint = "    flow: lint\n    flow_options: {tool: verilator, verilator_options: [-Wall]}"
    lines = [
        "CAPI=2:",
        f'name: "speq:ip:{name}:{CORE_VERSION}"',
        f'description: "{description}"',
        "# From FuseSoC 2.0, Edalize 0.5.4, Verilator 5.006, Icarus Verilog 11 and Yosys 0.23 on.",
        "filesets:",
    ]
    for fileset, (kind, endings) in sets.items():
        files = ", ".join(json.dumps(stem + ending) for ending in endings)
        lines += [f"  {fileset}:", f"    files: [{files}]", f"    file_type: {kind}"]
    if accelerator:
        header = json.dumps(f"{stem}.h")
        lines += [
            "  firmware:",
            f"    files: [{header}: {{is_include_file: true}}]",
            "    file_type: cSource",
        ]
    default = "rtl, waivers, firmware" if accelerator else "rtl, waivers"
    lines += [
        "targets:",
        "  default: &default",
        f"    filesets: [{default}]",
        f"    toplevel: {top}",
        "  lint:",
        "    <<: *default",
        "    description: all warnings of Verilator",
        lint,
        "  synth:",
        "    <<: *default",
        "    description: synthesis with Yosys, for ECP5 unless --arch says otherwise",
        "    flow: generic",
        "    flow_options: {tool: yosys, arch: ecp5, output_format: json}",
    ]
    if accelerator:
        lines += [
            "  sim:",
            "    description: the testbench, in Icarus Verilog, or with --tool=verilator",
            "    filesets: [rtl, waivers, testbench]",
            f"    toplevel: {top}_tb",
            "    flow: sim",
            "    flow_options: {tool: icarus, iverilog_options: [-g2005], mode: binary}",
            "  example:",
            "    description: all warnings of Verilator on the block for an AXI interconnect",
            "    filesets: [rtl, waivers, example]",
            f"    toplevel: {_WRAPPER}",
            lint,
        ]
    return "\n".join(lines) + "\n"


def verilator_waivers(stem: str) -> str:
    """Verilator configuration file that turns off the `LINT_WAIVERS` in the Verilog of `stem`."""
    lines = [
        "// SPDX-License-Identifier: Apache-2.0",
        "// Warnings of Verilator that do not apply to the generated Verilog, and why.",
        "`verilator_config",
    ]
    for waiver, reason in LINT_WAIVERS.items():
        lines.append(f"// {waiver}: {reason}")
        message = _NEW_MESSAGES.get(waiver)
        for ending in (".v", "_example.v", "_tb.v") if waiver == _NAME_WAIVER else (".v",):
            for folder in ("", "*/"):
                file = f'-file "{folder}{stem}{ending}"'
                rule = f'{file} -match "{message}*"' if message else f"-rule {waiver} {file}"
                lines.append(f"lint_off {rule}")
    return "\n".join(lines) + "\n"


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
