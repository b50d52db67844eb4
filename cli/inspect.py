# SPDX-License-Identifier: Apache-2.0
"""`speq inspect`: what of a model would run where, and why not, from its headers.

`speq.host.inspection` says what is reported.
"""

from __future__ import annotations

import json
from typing import Annotated

import typer

from speq.cli.options import MOST_TOKENS, Cols, ModelName, Rows, finite


def run(
    model: ModelName,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    rows: Rows = 8,
    cols: Cols = 16,
    max_k: Annotated[int, typer.Option(help="Longest dot product that the engine stores.")] = 2048,
    context: Annotated[
        int | None,
        typer.Option(
            min=1,
            max=MOST_TOKENS,
            help="Positions that there is to be room for.",
            show_default="the model's, up to 1024",
        ),
    ] = None,
    clock: Annotated[float, typer.Option(help="Clock in MHz.", callback=finite)] = 500.0,
    latency: Annotated[int, typer.Option(help="Latency of memory in cycles.")] = 48,
    acceptance: Annotated[
        float, typer.Option(help="Share of drafted tokens accepted.", callback=finite)
    ] = 0.8,
) -> None:
    """Say of any model file what would run where, in how much memory, how fast, and why not."""
    from speq.hw.accelerator_config import AcceleratorConfig
    from speq.hw.engine_config import EngineConfig

    config = AcceleratorConfig(EngineConfig(rows=rows, cols=cols, max_k=max_k))
    # This loads torch: the options are right by now, as far as they can be known to be.
    from speq.host.inspection import report

    found = report(
        model, config, context=context, clock=clock, acceptance=acceptance, latency=latency
    )
    print(json.dumps(found.to_dict(), indent=1, allow_nan=False) if as_json else found)
