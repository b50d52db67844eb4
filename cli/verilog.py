# SPDX-License-Identifier: Apache-2.0
"""`speq verilog`: write the accelerator's Verilog, or the engine's, and the files beside it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from speq.cli.options import Cols, Force, Group, Rows, refuse_unused


def run(
    output: Annotated[Path, typer.Option("-o", "--output", help="The Verilog file to write.")],
    rows: Rows = 8,
    cols: Cols = 16,
    draft_rows: Annotated[int, typer.Option(help="Rows that can also draft.")] = 1,
    max_k: Annotated[int, typer.Option(help="Longest dot product that the engine stores.")] = 2048,
    group: Group = 64,
    split: Annotated[
        int, typer.Option(help="Exponents told apart by their top mantissa bit: 0 to 3.")
    ] = 2,
    width: Annotated[int, typer.Option(help="Bits of a draft weight: 4, 5 or 6.")] = 4,
    weights_bits: Annotated[
        int | None,
        typer.Option(help="Data width of the weights port.", show_default="16 per column"),
    ] = None,
    data_bits: Annotated[
        int | None,
        typer.Option(help="Data width of the data port.", show_default="16 per column"),
    ] = None,
    address_bits: Annotated[
        int | None, typer.Option(help="Bits of an address in memory.", show_default="40")
    ] = None,
    engine: Annotated[
        bool, typer.Option("--engine", help="Only the matrix engine, without the accelerator.")
    ] = False,
    force: Force = False,
) -> None:
    """Write the accelerator as one Verilog-2005 file, with its register map, C header, SystemRDL,
    FuseSoC core, testbench and an example of its use."""
    from speq.hw import EngineConfig
    from speq.hw.accelerator_config import AcceleratorConfig
    from speq.hw.memory.axi import AxiConfig
    from speq.hw.verilog import write_verilog
    from speq.model.number_format import FormatConfig

    config = EngineConfig(
        rows=rows,
        cols=cols,
        format=FormatConfig(group=group, split=split, width=width),
        draft_rows=draft_rows,
        max_k=max_k,
    )
    if engine:
        refuse_unused(
            "with --engine, which has no ports to memory",
            weights_bits=weights_bits,
            data_bits=data_bits,
            address_bits=address_bits,
        )
    else:
        default = AcceleratorConfig(config)
        chosen = {} if address_bits is None else {"address_bits": address_bits}
        ports = {}
        for name, given in (("weights", weights_bits), ("data", data_bits)):
            bits = getattr(default, name).data_bits if given is None else given
            try:
                ports[name] = AxiConfig(data_bits=bits, **chosen)
            except ValueError as error:
                raise ValueError(f"the {name} port: {error}") from error
        config = AcceleratorConfig(config, **ports)
    for path in write_verilog(config, output, force=force):
        print(f"{path}  {path.stat().st_size:,} bytes")
