# SPDX-License-Identifier: Apache-2.0
"""`speq verilog`: write the engine's Verilog and the JSON that describes it."""

from __future__ import annotations

from pathlib import Path

from speq.hw import AcceleratorConfig
from speq.hw.verilog import write_verilog
from speq.model.format import FormatConfig


def run(
    output: Path,
    rows: int,
    cols: int,
    draft_rows: int,
    max_k: int,
    group: int,
    split: int,
    width: int,
) -> None:
    """Write `output` and, with the suffix .json, its description, and print what was written.

    Raises
    ------
    ValueError
        If a parameter is not allowed.
    OSError
        If a file cannot be written.
    """
    config = AcceleratorConfig(
        rows=rows,
        cols=cols,
        format=FormatConfig(group=group, split=split, width=width),
        draft_rows=draft_rows,
        max_k=max_k,
    )
    for path in write_verilog(config, output):
        print(f"{path}  {path.stat().st_size:,} bytes")
