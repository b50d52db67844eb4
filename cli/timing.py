# SPDX-License-Identifier: Apache-2.0
"""`speq timing`: clock, logic levels, critical path and size of each unit alone."""

from __future__ import annotations

import json
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from speq.cli.options import Cols, Force, Rows
from speq.cli.progress import status
from speq.cli.tables import figure_table, show

if TYPE_CHECKING:
    from rich.table import Table

    from speq.cli.synthesis import Timing

_REPORT = rb'\{\s*"technology": '


def run(
    rows: Rows = 8,
    cols: Cols = 16,
    unit: Annotated[
        list[str] | None, typer.Option(help="Only this unit; may be given several times.")
    ] = None,
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Also write the figures to this file.")
    ] = None,
    liberty: Annotated[
        Path | None,
        typer.Option(
            envvar="LIBERTY", help="Standard-cell library (.lib, .lib.gz), in place of the ECP5."
        ),
    ] = None,
    force: Force = False,
) -> None:
    """Measure how fast each unit of the accelerator is, alone, on an ECP5-85F of speed grade 6.

    With a standard-cell library: mapped to its cells, without wires.
    """
    from speq.cli import synthesis
    from speq.hw.accelerator_config import AcceleratorConfig
    from speq.hw.common.files import replacing
    from speq.hw.engine_config import EngineConfig
    from speq.hw.verilog.units import COMPOSED, units

    config = AcceleratorConfig(EngineConfig(rows=rows, cols=cols))
    makers = units(config)
    for name in unit or ():
        if name not in makers:
            raise ValueError(f"there is no unit {name!r}; choose from {', '.join(makers)}")
    # With all that they have instances of, they take longer to place than all others.
    names = unit or [name for name in makers if liberty or name not in COMPOSED]
    tools = synthesis.CellTools(liberty) if liberty else synthesis.Ecp5Tools()
    writing = replacing(json_file, _REPORT, force=force) if json_file else nullcontext()
    timings: list[Timing] = []
    failed: list[str] = []
    with writing as temporary, tools, status() as say:
        for name in names:
            say(f"{name}: synthesis, placement, routing" if not liberty else f"{name}: synthesis")
            try:
                timings.append(tools.measure(name, makers[name]()))
            except ValueError as error:
                if len(names) == 1:
                    raise
                failed.append(str(error))  # the others' figures are not lost
        if temporary is not None:
            report = {
                "technology": tools.technology,
                "rows": rows,
                "cols": cols,
                "units": [timing.as_json() for timing in timings],
                "failed": failed,
            }
            temporary.write_text(json.dumps(report, indent=2) + "\n")
    if timings:
        show(f"speq timing: {rows} x {cols}, {tools.technology}", "", table(timings))
    if failed:
        raise ValueError("; ".join(failed))
    if len(timings) == 1:
        show("", "critical path:", *(f"  {step}" for step in timings[0].steps()))


def table(timings: list[Timing]) -> Table:
    """The figures, the slowest unit first."""
    sizes = list(timings[0].sizes)
    out = figure_table("", "unit", "MHz", "ns", "levels", *sizes, "critical path")
    out.columns[-1].justify, out.columns[-1].no_wrap = "left", False
    for timing in sorted(timings, key=lambda t: -t.delay):
        path = timing.signals
        figures = (f"{timing.mhz:.0f}", f"{timing.delay:.2f}", str(timing.levels))
        ends = f"{path[0]} to {path[-1]}" if path else "none from register to register"
        areas = (f"{size:,.0f}" for size in timing.sizes.values())
        out.add_row(timing.unit, *(figures if path else ("", "", "")), *areas, ends)
    return out
