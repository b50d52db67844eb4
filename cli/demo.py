# SPDX-License-Identifier: Apache-2.0
"""`speq demo`: a real model's layers through the generated Verilog, every bit compared.

One transformer block's seven linear layers run on the simulated engine with the activations of a
real prompt, each in draft mode with one token and in verify mode with as many as there are rows.
"""

from __future__ import annotations

import time
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    Progress,
    SpinnerColumn,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
)

from speq.cli.options import Seed


def run(
    rows: Annotated[int, typer.Option(help="Rows of the array.")] = 8,
    cols: Annotated[int, typer.Option(help="Columns of the array.")] = 16,
    block: Annotated[
        int, typer.Option(min=0, max=1023, help="The transformer block whose layers run.")
    ] = 0,
    seed: Seed = 0,
) -> None:
    """Run a real LLM's layers through the generated Verilog and compare every bit."""
    from speq.hw import EngineConfig

    started = time.perf_counter()
    config = EngineConfig(rows=rows, cols=cols)
    # These load torch: the options are right by now.
    from speq.cli.demo_layers import gemms_with_golden, random_layers, real_layers, report
    from speq.model.checkpoint import CheckpointError
    from speq.sim.benches.gemm_engine import run_gemms

    console = Console()
    console = Console(width=max(console.width, 100))  # the table's least width
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.fields[detail]}"),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=console) as progress:

        def stage(description: str) -> TaskID:
            if not console.is_terminal:  # where no bar is drawn
                console.print(f"{description} ...")
            return progress.add_task(description, total=None, detail="")

        def done(task: TaskID, detail: str) -> None:
            progress.update(task, total=1, completed=1, detail=detail)

        task = stage("SmolLM2-135M, golden forward pass")
        try:
            layers = real_layers(block, rows)
            source = f"SmolLM2-135M, block {block}, a real prompt's activations"
        except CheckpointError as error:
            layers = random_layers(rows, seed)
            source = f"RANDOM weights with SmolLM2's distribution, seed {seed}"
            progress.console.print(f"[yellow]no SmolLM2-135M ({escape(str(error))})[/]")
            progress.console.print(f"[yellow]going on with {source}[/]")
        done(task, source)

        task = stage("encode, golden products")
        pairs = gemms_with_golden(layers, config)
        weights = sum(layer.weights.numel() for layer in layers)
        done(task, f"{weights / 1e6:.2f} M weights, {len(pairs)} GEMMs")

        task = stage("generate Verilog, build, simulate")
        outcome = run_gemms(
            config,
            [gemm for gemm, _ in pairs],
            progress=lambda share: progress.update(task, total=1, completed=share),
        )
        speed = f"{outcome.cycles:,} cycles at {outcome.cycles_per_second:,.0f} cycles/s"
        done(task, speed)

    table, mismatches, ratio = report(pairs, outcome.results, config)
    console.print(table)
    console.print(f"Layers: {source}.")
    console.print(f"Simulation: {speed}; everything took {time.perf_counter() - started:.0f} s.")
    console.print(f"Draft/verify cycle ratio: {ratio:.4f} (a quarter is ideal).")
    if mismatches:
        console.print(f"[red]{mismatches} bits differ from the golden model.[/]")
        raise typer.Exit(1)
    console.print("[green]Every output bit equals the golden model's.[/]")
