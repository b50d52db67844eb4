# SPDX-License-Identifier: Apache-2.0
"""`speq bench`: measured speeds and sizes beside their targets."""

from __future__ import annotations

import json
import os
import platform
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table

from speq.cli.options import Seed

if TYPE_CHECKING:
    from speq.cli.benchmarks import Figure


def run(
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Also write the figures to this file.")
    ] = None,
    only: Annotated[str, typer.Option(help="Run only the benchmark of this name.")] = "",
    seed: Seed = 0,
    liberty: Annotated[
        Path | None,
        typer.Option(envvar="LIBERTY", help="Standard-cell library (.lib, .lib.gz) for areas."),
    ] = None,
) -> None:
    """Measure speeds and sizes and compare them with their targets."""
    from speq.cli.benchmarks import BenchSettings, Skipped, choose

    settings = BenchSettings(seed, liberty)
    chosen = choose(only)
    console = Console()
    figures: list[Figure] = []
    skipped: dict[str, str] = {}
    with Console(stderr=True).status("") as status:
        for benchmark in chosen:
            status.update(f"measuring {benchmark.__name__}")
            # One that cannot run here is named with its reason and does not count as a failure.
            try:
                figures += benchmark(settings)
            except Skipped as reason:
                skipped[benchmark.__name__] = str(reason)
    if figures:
        console.print(table(figures))
    for name, reason in skipped.items():
        console.print(f"{name} is skipped: {reason}", soft_wrap=True)
    if json_file is not None:
        rows = [asdict(f) | {"met": f.met} for f in figures]
        report = {
            "seed": seed,
            "machine": machine(),
            "figures": rows,
            "skipped": skipped,
        }
        json_file.write_text(json.dumps(report, indent=2) + "\n")


def machine() -> dict[str, str | int | None]:
    """What the figures were measured on."""
    import torch

    return {
        "processor": platform.processor() or platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


def table(figures: list[Figure]) -> Table:
    """The figures as a table for a terminal."""
    out = Table(title="speq bench: medians after a warm-up")
    for heading in ("figure", "measured", "unit", "target", "met", "measured on"):
        out.add_column(heading, justify="right" if heading in ("measured", "target") else "left")
    for f in figures:
        target = "" if f.target is None else f"{'<=' if f.at_most else '>='} {f.target:g}"
        met = {True: "[green]yes[/]", False: "[red]no[/]", None: ""}[f.met]
        value = f"{f.value:,.0f}" if f.value >= 1000 else f"{f.value:.4g}"
        out.add_row(f.name, value, f.unit, target, met, f.note)
    return out
