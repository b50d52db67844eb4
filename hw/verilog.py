# SPDX-License-Identifier: Apache-2.0
"""Verilog-2005 of the accelerator, with a JSON description of it."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

from amaranth.back import verilog
from amaranth.hdl import ClockDomain, Shape
from amaranth.lib import wiring
from amaranth.lib.wiring import Flow

from speq.hw.accelerator import Accelerator
from speq.hw.config import AcceleratorConfig
from speq.hw.gemm_engine import GemmEngine
from speq.hw.ram import RAM_VERILOG
from speq.hw.system import SystemConfig

TOP = "speq_gemm_engine"


#: Verilator lint messages of `-Wall` that do not apply to generated Verilog, and why.
LINT_WAIVERS = {
    "DECLFILENAME": "all modules are in one file",
    "PROCASSINIT": "registers have their reset value as initial value too, for FPGAs",
    "UNUSEDSIGNAL": "results that are cut to their width keep names for the bits cut off",
    "WIDTHEXPAND": "operands are widened by Verilog's rules, which the generator relies on",
    "WIDTHTRUNC": "`! signal` of a wide signal compares it with zero",
}


def convert_unit(component: wiring.Component, name: str, *, reset: bool = True) -> str:
    """Verilog of one component as the module `name`, the same bytes for the same component.

    Without `reset` the module's clock domain has no reset port.
    """
    return verilog.convert(
        component,
        name=name,
        strip_internal_attrs=True,
        emit_src=False,
        missing_domain=lambda domain: ClockDomain(domain, reset_less=not reset),
    )


def generate_top(config: SystemConfig) -> str:
    """Verilog of the whole accelerator, top module `speq_top`."""
    accelerator = Accelerator(config)
    units = accelerator.datapath.engine.array.modules
    modules = [convert_unit(accelerator, "speq_top")]
    modules += [convert_unit(unit, name, reset=False) for name, unit in units.items()]
    return f"// SPDX-License-Identifier: Apache-2.0\n// {config}\n" + RAM_VERILOG + "".join(modules)


def generate_verilog(config: AcceleratorConfig) -> tuple[str, dict]:
    """Verilog of the engine, top module `TOP`, and its description.

    The description has the parameters, ports and latencies, ready for JSON.
    """
    engine = GemmEngine(config)
    units = engine.array.modules
    modules = [convert_unit(engine, TOP)]
    modules += [convert_unit(unit, name, reset=False) for name, unit in units.items()]
    header = f"// SPDX-License-Identifier: Apache-2.0\n// {config}\n"
    description = {
        "top": TOP,
        "parameters": asdict(config)
        | {
            "accumulator_bits": config.accumulator_bits,
            "accumulator_unit_exponent": config.accumulator_unit_exponent,
        },
        "ports": _ports(engine),
        "latencies": {
            "engine_fill": engine.FILL,
            "engine_overhead": engine.OVERHEAD,
            "array": engine.array.LATENCY,
        }
        | {name: unit.LATENCY for name, unit in units.items() if hasattr(unit, "LATENCY")},
        "verilator_lint_waivers": LINT_WAIVERS,
    }
    return header + RAM_VERILOG + "".join(modules), description


def _ports(component: wiring.Component) -> list[dict]:
    ports = [{"name": name, "direction": "input", "width": 1} for name in ("clk", "rst")]
    for path, member, _value in component.signature.flatten(component):
        ports.append(
            {
                "name": "__".join(map(str, path)),
                "direction": "input" if member.flow is Flow.In else "output",
                "width": Shape.cast(member.shape).width,
            }
        )
    return ports


def write_verilog(config: AcceleratorConfig, path: Path) -> tuple[Path, Path]:
    """Write the Verilog to `path` and its description beside it, as .json.

    Returns both paths. Either file appears complete or not at all.

    Raises
    ------
    ValueError
        If the path ends in .json.
    OSError
        If the folder does not exist or cannot be written.
    """
    if path.suffix == ".json":
        raise ValueError(f"{path}: the description gets this name; name the Verilog file .v")
    if not path.parent.is_dir():
        raise FileNotFoundError(f"{path.parent}: no such folder; create it first")
    text, description = generate_verilog(config)
    contents = {path: text, path.with_suffix(".json"): json.dumps(description, indent=2) + "\n"}
    for target, content in contents.items():
        partial = target.with_name(target.name + ".partial")
        try:
            partial.write_text(content)
            partial.replace(target)
        finally:
            partial.unlink(missing_ok=True)
    return tuple(contents)
