# SPDX-License-Identifier: Apache-2.0
"""`speq cycles`: predicted cycles, tokens per second and speedup of models too large to simulate.

`speq.model.prediction` says what is counted.
"""

from __future__ import annotations

from typing import Annotated

import typer

from speq.cli.options import MOST_TOKENS, Cols, Rows

MAX_CLOCK = 100_000  # MHz
#: Latency of memory in cycles up to which tests compare predictions with the accelerator.
MAX_LATENCY = 48


def run(
    rows: Rows = 8,
    cols: Cols = 64,
    clock: Annotated[float, typer.Option(help="Clock in MHz.")] = 500.0,
    latency: Annotated[int, typer.Option(help="Latency of memory in cycles.")] = 48,
    context: Annotated[int, typer.Option(help="Positions in the KV cache.")] = 1024,
    acceptance: Annotated[
        list[float] | None,
        typer.Option(help="Share of drafted tokens accepted.", show_default="0.7, 0.8, 0.9"),
    ] = None,
) -> None:
    """Predict cycles, tokens per second and speedup for models of known dimensions."""
    from rich.console import Console
    from rich.table import Table

    from speq.hw.accelerator_config import AcceleratorConfig
    from speq.hw.engine_config import EngineConfig
    from speq.hw.memory.axi import AxiConfig

    if not 0 < clock <= MAX_CLOCK:
        raise ValueError(f"clock is {clock}; expected more than 0 and up to {MAX_CLOCK} MHz")
    if not 0 <= context <= MOST_TOKENS:
        raise ValueError(f"context is {context}; expected 0 to {MOST_TOKENS} positions")
    if not 1 <= latency <= MAX_LATENCY:
        raise ValueError(
            f"latency is {latency}; the prediction holds for 1 to {MAX_LATENCY} cycles, which the "
            "ports' bursts hide"
        )
    # Refuses arrays that cannot be made, or that are wider than a port.
    AcceleratorConfig(
        EngineConfig(rows=rows, cols=cols),
        weights=AxiConfig(data_bits=16 * cols),
        data=AxiConfig(data_bits=16 * cols),
    )
    for share in acceptance or ():
        if not 0 <= share <= 1:
            raise ValueError(f"acceptance is {share}; expected a probability, 0 to 1")
    # These load torch: the options are right by now.
    from speq.model.cycles import Engine
    from speq.model.prediction import MODELS, predict

    engine = Engine(rows=rows, cols=cols, latency=latency)
    bandwidth = 2 * cols * clock / 1000
    table = Table(
        title=f"{rows} x {cols} array at {clock:g} MHz: {bandwidth:.4g} GB/s of weights; "
        f"memory latency {latency} cycles, context {context}",
        title_justify="left",
    )
    columns = ("model", "accepted", "L", "plain", "draft", "verify", "tokens/s plain", "tokens/s")
    for name in (*columns, "speedup"):
        table.add_column(name, justify="left" if name == "model" else "right")
    for name, config in MODELS.items():
        for share in acceptance or (0.7, 0.8, 0.9):
            p = predict(config, engine, share, context)
            rates = [clock * 1e6 / cycles for cycles in (p.plain, p.cycles_per_token)]
            table.add_row(
                name,
                f"{share:.0%}",
                str(p.length),
                *(f"{cycles / 1e6:.3f} M" for cycles in (p.plain, p.draft, p.verify)),
                *(f"{rate:.4g}" for rate in rates),
                f"{p.speedup:.2f}",
            )
        table.add_section()
    Console(width=None if Console().is_terminal else 120).print(table)
