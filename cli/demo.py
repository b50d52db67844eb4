# SPDX-License-Identifier: Apache-2.0
"""`speq demo`: a real model's layers through the generated Verilog, every bit compared.

One transformer block's seven linear layers run on the simulated engine with the activations of a
real prompt, each in draft mode with one token and in verify mode with as many as there are rows.
"""

from __future__ import annotations

import time
import warnings
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TaskID
from rich.text import Text

from speq.cli.notes import is_quiet, note
from speq.cli.options import Seed
from speq.cli.progress import bar_columns, elapsed
from speq.cli.tables import show


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
    from speq.sim.builder import check_tools

    started = time.perf_counter()
    config = EngineConfig(rows=rows, cols=cols)
    check_tools()
    # These load torch: the options are right by now.
    from speq.cli.demo_layers import gemms_with_golden, random_layers, real_layers, report
    from speq.model.checkpoint import CheckpointError
    from speq.sim.benches.gemm_engine import run_gemms

    console = Console(stderr=True)
    on_terminal = console.is_terminal and not is_quiet()
    columns = (SpinnerColumn(), *bar_columns(console, elapsed()))
    with Progress(*columns, console=console, disable=not on_terminal) as progress:

        def stage(description: str) -> TaskID:
            if not on_terminal:  # where no bar is drawn
                note(f"{description} ...")
            return progress.add_task(description, total=None)

        def done(task: TaskID) -> None:
            progress.update(task, total=1, completed=1)

        task = stage("SmolLM2-135M, golden forward pass")
        try:
            layers = real_layers(block, rows)
            source = f"SmolLM2-135M, block {block}, a real prompt's activations"
        except CheckpointError as error:
            layers = random_layers(rows, seed)
            source = f"RANDOM weights with SmolLM2's distribution, seed {seed}"
            warnings.warn(f"no SmolLM2-135M: going on with {source} ({error})", stacklevel=1)
        done(task)

        task = stage("encode, golden products")
        pairs = gemms_with_golden(layers, config)
        weights = sum(layer.weights.numel() for layer in layers)
        done(task)

        task = stage("generate Verilog, build, simulate")
        outcome = run_gemms(
            config,
            [gemm for gemm, _ in pairs],
            progress=lambda share: progress.update(task, total=1, completed=share),
        )
        done(task)

    table, mismatches, ratio = report(pairs, outcome.results, config)
    seconds = time.perf_counter() - started
    show(
        table,
        f"Layers: {source}.",
        f"{weights / 1e6:.2f} M weights, {len(pairs)} GEMMs.",
        f"Simulation: {outcome.cycles:,} cycles at {outcome.cycles_per_second:,.0f} cycles/s; "
        f"everything took {seconds:.0f} s.",
        f"Draft/verify cycle ratio: {ratio:.4f} (a quarter is ideal).",
    )
    if mismatches:
        show(Text(f"{mismatches} bits differ from the golden model.", "red"))
        raise typer.Exit(1)
    show(Text("Every output bit equals the golden model's.", "green"))
