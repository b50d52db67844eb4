# SPDX-License-Identifier: Apache-2.0
"""`speq bench`: measured speeds and sizes beside their targets."""

from __future__ import annotations

import json
import os
import platform
from contextlib import nullcontext
from dataclasses import asdict
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import RenderableType
from rich.text import Text

from speq.cli.options import Force, Seed
from speq.cli.progress import status
from speq.cli.tables import figure_table, show

if TYPE_CHECKING:
    from speq.cli.benchmarks import Figure

#: The benchmarks, functions of `speq.cli.benchmarks`, in the order in which they run.
NAMES = (
    "codec",
    "verify",
    "verilog",
    "simulation",
    "accelerator",
    "vector",
    "samplers",
    "area",
)
_REPORT = rb'\{\s*"seed": \d+,\s*"machine": '


def complete_name(incomplete: str) -> list[str]:
    """Benchmarks whose names begin so, for shells."""
    return [name for name in NAMES if name.startswith(incomplete)]


def run(
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Also write the figures to this file.")
    ] = None,
    only: Annotated[
        str,
        typer.Option(help="Run only the benchmark of this name.", autocompletion=complete_name),
    ] = "",
    seed: Seed = 0,
    liberty: Annotated[
        Path | None,
        typer.Option(envvar="LIBERTY", help="Standard-cell library (.lib, .lib.gz) for areas."),
    ] = None,
    encoded: Annotated[
        Path | None, typer.Option(help="SmolLM2's file of speq encode, to compare samplers.")
    ] = None,
    force: Force = False,
) -> None:
    """Measure speeds and sizes and compare them with their targets."""
    from speq.hw.common.files import replacing

    names = chosen_names(only)
    if liberty is not None and "area" in names:
        liberty.open("rb").close()
    if encoded is not None and "samplers" in names:
        encoded.open("rb").close()
    writing = replacing(json_file, _REPORT, force=force) if json_file else nullcontext()
    with writing as temporary:
        # This loads torch: options and output are right by now.
        from speq.cli import benchmarks

        settings = benchmarks.BenchSettings(seed, liberty, encoded)
        figures: list[Figure] = []
        skipped: dict[str, str] = {}
        with status() as say:
            for name in names:
                say(f"measuring {name}")
                # One that cannot run here is named with its reason and does not count as a failure.
                try:
                    figures += getattr(benchmarks, name)(settings)
                except benchmarks.Skipped as reason:
                    skipped[name] = str(reason)
        if figures:
            show(*tables(figures))
        for name, reason in skipped.items():
            show(f"{name} is skipped: {reason}")
        if temporary is not None:
            rows = [asdict(f) | {"met": f.met} for f in figures]
            report = {
                "seed": seed,
                "machine": machine(),
                "figures": rows,
                "skipped": skipped,
            }
            temporary.write_text(json.dumps(report, indent=2) + "\n")


def chosen_names(only: str) -> tuple[str, ...]:
    """The benchmark of that name, or all of them for an empty one.

    Raises
    ------
    ValueError
        If there is none of that name.
    """
    if not only:
        return NAMES
    if only not in NAMES:
        raise ValueError(f"there is no benchmark {only!r}; choose one of {', '.join(NAMES)}")
    return (only,)


def machine() -> dict[str, str | int | None]:
    """What the figures were measured on."""
    import torch

    return {
        "processor": platform.processor() or platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


def tables(figures: list[Figure]) -> list[RenderableType]:
    """The figures as tables, one for each thing that they were measured on."""
    shown: list[RenderableType] = ["speq bench: medians after a warm-up"]
    longest = max(len(f.name) for f in figures)
    for note, group in groupby(figures, lambda f: f.note):
        out = figure_table("", "figure", "measured", "unit", "target", "met")
        out.columns[0].min_width = longest  # so that they stand below one another
        rows: dict[str, list[Figure]] = {}
        for f in group:
            if f.column:
                rows.setdefault(f.name, []).append(f)
                continue
            target = "" if f.target is None else f"{'<=' if f.at_most else '>='} {f.target:g}"
            met = {True: Text("yes", "green"), False: Text("no", "red"), None: ""}[f.met]
            out.add_row(f.name, _number(f.value), f.unit, target, met)
        shown += ["", f"{note}:", out]
        if rows:
            shown += ["", _matrix(rows)]
    return shown


def _matrix(rows: dict[str, list[Figure]]) -> RenderableType:
    """A table of the figures with columns; all rows have the same."""
    first = next(iter(rows.values()))
    headings = [f"{f.column}\n{f.unit}" if f.unit else f.column for f in first]
    out = figure_table("", "", *headings)
    for name, figures in rows.items():
        out.add_row(name, *(_number(f.value) for f in figures))
    return out


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 1000 else f"{value:.4g}"
