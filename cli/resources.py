# SPDX-License-Identifier: Apache-2.0
"""`speq resources`: what the accelerator and its units take of FPGAs, and which it fits."""

from __future__ import annotations

import json
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from speq.cli.options import Cols, Force, Lanes, Rows
from speq.cli.progress import status
from speq.cli.tables import figure_table, show
from speq.cli.verilog import Scratch

if TYPE_CHECKING:
    from rich.table import Table

    from speq.cli.fpga import Taken

_REPORT = rb'\{\s*"resources": '
#: Modules that are listed part by part, as they are others connected.
_CONNECTIONS = ("datapath", "datapath.engine", "datapath.vector")


def run(
    rows: Rows = 8,
    cols: Cols = 16,
    lanes: Lanes = None,
    scratch: Scratch = None,
    unit: Annotated[
        list[str] | None,
        typer.Option(
            help="Only this unit, alone, in place of the accelerator; may be given several times."
        ),
    ] = None,
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Also write the figures to this file.")
    ] = None,
    force: Force = False,
) -> None:
    """Count what the accelerator, unit by unit, takes of an ECP5 and an UltraScale+, and say which
    parts it fits.

    As Yosys maps it, before placement, with the modules kept apart.
    """
    from speq.cli.fpga import FAMILIES, FpgaTools
    from speq.hw.accelerator_config import AcceleratorConfig
    from speq.hw.common.files import replacing
    from speq.hw.engine_config import EngineConfig
    from speq.hw.verilog import ACCELERATOR_TOP, generate_top
    from speq.hw.verilog.units import unit_verilog, units

    config = AcceleratorConfig(EngineConfig(rows=rows, cols=cols), lanes=lanes)
    if scratch is not None:
        config = replace(config, scratch=scratch)
    makers = units(config)
    for name in unit or ():
        if name not in makers:
            raise ValueError(f"there is no unit {name!r}; choose from {', '.join(makers)}")
    tools = {name: FpgaTools(family) for name, family in FAMILIES.items()}
    writing = replacing(json_file, _REPORT, force=force) if json_file else nullcontext()
    found: dict[str, dict[str, Taken]] = {}  # of each family
    with writing as temporary, status() as say:
        # Each design is elaborated once, for all families.
        designs = {name: unit_verilog(makers[name](), name) for name in unit or ()} or {
            ACCELERATOR_TOP: generate_top(config)
        }
        for family, tool in tools.items():
            found[family] = {}
            with tool:
                for name, verilog in designs.items():
                    say(f"{name}: synthesis for {family}")
                    modules = tool.measure(verilog, name)
                    found[family] |= {name: modules[name]} if unit else by_unit(modules, name)
        fits = {} if unit else fitting(found, ACCELERATOR_TOP)
        if temporary is not None:
            report = {
                "resources": {
                    family: {name: taken.as_json() for name, taken in modules.items()}
                    for family, modules in found.items()
                },
                "rows": rows,
                "cols": cols,
                "lanes": config.lanes,
                "scratch": config.scratch,
                "parts": fits,
            }
            temporary.write_text(json.dumps(report, indent=2) + "\n")
    show(f"speq resources: {rows} x {cols}, {config.lanes} lanes")
    for family, modules in found.items():
        show("", table(family, modules))
    if fits:
        show("", fit_table(fits))


def fitting(found: dict[str, dict[str, Taken]], top: str) -> dict[str, dict]:
    """What of each part the module `top` takes, and whether it fits, by the part's name."""
    from speq.cli.fpga import PARTS

    fits = {}
    for part in PARTS:
        taken = found[part.family][top]
        fits[part.name] = {"fits": taken.fits(part), "shares": taken.shares(part)}
    return fits


def by_unit(modules: dict[str, Taken], top: str) -> dict[str, Taken]:
    """Of all modules of an accelerator those that are its units, the top first. Units that are
    instantiated many times, such as PEs, follow at the end, one of each."""
    units = {top: modules[top]}
    repeated = {}
    for name, taken in modules.items():
        path = name.removeprefix(f"{top}.")
        if "$paramod" in name or name == top:
            continue
        if path == name:
            repeated[f"one {name}"] = taken
        elif "." not in path or path.rpartition(".")[0] in _CONNECTIONS:
            units[path] = taken
    order = sorted(units, key=lambda name: (name != top, name))
    return {name: units[name] for name in order} | dict(sorted(repeated.items()))


def table(family: str, modules: dict[str, Taken]) -> Table:
    """What each unit takes, with all that is in it."""
    from speq.cli.fpga import KINDS

    headings = (*KINDS, "LUTs as RAM", "memory bits\nin registers")
    out = figure_table(family, "unit", *headings)
    for name, taken in modules.items():
        figures = (*taken.kinds.values(), taken.ram_luts, taken.register_bits)
        out.add_row(
            name, *(f"{figure:,g}" if figure % 1 else f"{figure:,.0f}" for figure in figures)
        )
    return out


def fit_table(fits: dict[str, dict]) -> Table:
    """What of each part the accelerator takes."""
    from speq.cli.fpga import KINDS

    out = figure_table("", "part", *KINDS, "fits")
    for name, fit in fits.items():
        shares = (f"{share:.0%}" for share in fit["shares"].values())
        out.add_row(name, *shares, "yes" if fit["fits"] else "no")
    return out
