# SPDX-License-Identifier: Apache-2.0
"""`make check-models`: what others make of the same files, compared with the loaders and the golden
model. Prints one table and ends with 1 on any difference beyond the stated rounding."""

from __future__ import annotations

import math
import os
import sys
import tempfile
import time
import warnings
from contextlib import redirect_stderr
from dataclasses import replace
from io import StringIO
from pathlib import Path
from typing import Annotated

import transformers
import typer
from rich.console import Console
from rich.table import Table

from tests.oracle import (
    gguf_models,
    hf_models,
    llama2c_models,
    object_models,
    settings,
    vocabularies,
)
from tests.oracle.table import Check, Row


def run(check: Check, seed: int) -> list[Row]:
    """Rows of a check; what it raises is one of them."""
    rows = []
    # The packages' progress bars go to the standard error.
    with tempfile.TemporaryDirectory() as folder, redirect_stderr(StringIO()):
        try:
            rows.extend(check.run(Path(folder) / "model", seed))
        except Exception as error:
            if "SPEQ_DEBUG" in os.environ:
                raise
            text = str(error).replace(folder, "").split("\n")[0]
            rows.append(Row("an error", math.inf, 0.0, f"{type(error).__name__}: {text}"))
    if check.variant:
        rows = [replace(row, note=f"{check.variant} {row.note}".strip()) for row in rows]
    return rows


def worst(rows: list[Row]) -> Row:
    """Of the same comparison in several variants, the one that is furthest off."""
    row = max(rows, key=lambda row: (not row.ok, row.difference))
    return replace(row, note=f"worst of {len(rows)}: {row.note}") if len(rows) > 1 else row


def main(
    seed: Annotated[int, typer.Option(help="Of weights and texts.", envvar="SPEQ_SEED")] = 0,
    only: Annotated[str, typer.Option(help="Checks whose names contain this text.")] = "",
    write_reference: Annotated[
        bool, typer.Option(help="Write the logits that `make test` compares with, and end.")
    ] = False,
) -> None:
    """Compares loaded models with transformers, gguf and their tokenizers."""
    transformers.logging.set_verbosity_error()
    warnings.filterwarnings("ignore")
    if write_reference:
        hf_models.keep_logits(seed)
        return
    start = time.monotonic()
    found: dict[tuple[str, str], list[Row]] = {}
    groups = (hf_models, object_models, gguf_models, llama2c_models, settings, vocabularies)
    chosen = [check for group in groups for check in group.checks() if only in check.name]
    console = Console()
    with console.status("") as status:
        for number, check in enumerate(chosen, start=1):
            status.update(f"{number} of {len(chosen)}: {check.name} {check.variant}")
            for row in run(check, seed):
                found.setdefault((check.name, row.compared), []).append(row)
    table = Table("case", "compared", "worst difference", "bound", "ok", "note")
    for (case, compared), rows in found.items():
        row = worst(rows)
        ok = "yes" if row.ok else "[bold red]NO"
        table.add_row(case, compared, f"{row.difference:.2g}", f"{row.bound:.2g}", ok, row.note)
    console.print(table)
    every = [row for rows in found.values() for row in rows]
    failed = sum(not row.ok for row in every)
    seconds = time.monotonic() - start
    console.print(f"SPEQ_SEED={seed}: {len(every)} comparisons, {failed} failed, {seconds:.0f} s")
    sys.exit(failed > 0 or not every)


if __name__ == "__main__":
    typer.run(main)
