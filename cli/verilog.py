# SPDX-License-Identifier: Apache-2.0
"""`speq verilog`: write the accelerator's Verilog, or the engine's, and the files beside it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from speq.cli.notes import detail
from speq.cli.options import (
    COLS_HELP,
    GROUP_HELP,
    LANES_DEFAULT,
    LANES_HELP,
    ROWS_HELP,
    SPLIT_HELP,
    Force,
    refuse_unused,
)
from speq.cli.presets import PRESETS, complete_preset

if TYPE_CHECKING:
    from speq.hw import EngineConfig
    from speq.hw.accelerator_config import AcceleratorConfig

_MAX_DESCRIPTION = 1 << 20  # bytes
#: Parameters of an accelerator besides those of its engine and its ports.
_OTHERS = ("choices", "history", "lanes", "query_heads", "head_inputs", "scratch")


# The options that are a configuration.
Description = Annotated[
    Path | None,
    typer.Option(
        help="A description that speq verilog has written (.json): the same once more, but for "
        "what other options say."
    ),
]
PresetName = Annotated[
    str | None,
    typer.Option(
        help="A named configuration (see below), but for what other options say.",
        autocompletion=complete_preset,
    ),
]
ArrayRows = Annotated[int | None, typer.Option(help=ROWS_HELP, show_default="8")]
ArrayCols = Annotated[int | None, typer.Option(help=COLS_HELP, show_default="16")]
DraftRows = Annotated[int | None, typer.Option(help="Rows that can also draft.", show_default="1")]
MaxK = Annotated[
    int | None,
    typer.Option(help="Longest dot product that the engine stores.", show_default="2048"),
]
ArrayGroup = Annotated[int | None, typer.Option(help=GROUP_HELP, show_default="64")]
ArraySplit = Annotated[int | None, typer.Option(help=SPLIT_HELP, show_default="2")]
WeightsBits = Annotated[
    int | None,
    typer.Option(help="Data width of the weights port.", show_default="16 per column"),
]
DataBits = Annotated[
    int | None,
    typer.Option(help="Data width of the data port.", show_default="16 per column"),
]
AddressBits = Annotated[
    int | None, typer.Option(help="Bits of an address in memory.", show_default="40")
]
Choices = Annotated[
    int | None,
    typer.Option(
        help="Tokens that a ranking names: 4 or 8, most choices of a position and most that "
        "are re-ranked.",
        show_default="8",
    ),
]
History = Annotated[
    int | None,
    typer.Option(
        help="Last tokens that guesses are looked for in: a power of two, 8 to 65536, or 0, none.",
        show_default="2048",
    ),
]
Lanes = Annotated[
    int | None,
    typer.Option(
        help=f"{LANES_HELP[:-1]}, or 0: no vector unit, for own programs.",
        show_default=LANES_DEFAULT,
    ),
]
QueryHeads = Annotated[
    int | None,
    typer.Option(
        help="Most query heads of a model that the vector unit works for: a power of two, 4 to "
        "1024.",
        show_default="64",
    ),
]
HeadInputs = Annotated[
    int | None,
    typer.Option(
        help="Inputs of the smallest head that sampling does not slow down: a power of two. The "
        "fewer, the more generators of noise.",
        show_default="512",
    ),
]
Scratch = Annotated[
    int | None,
    typer.Option(
        help="Bytes of the memory on chip for what a pass leaves for later: a power of two, 4096 "
        "to 16777216, or 0, none.",
        show_default="524288",
    ),
]


def run(
    output: Annotated[Path, typer.Option("-o", "--output", help="The Verilog file to write.")],
    config: Description = None,
    preset: PresetName = None,
    rows: ArrayRows = None,
    cols: ArrayCols = None,
    draft_rows: DraftRows = None,
    max_k: MaxK = None,
    group: ArrayGroup = None,
    split: ArraySplit = None,
    weights_bits: WeightsBits = None,
    data_bits: DataBits = None,
    address_bits: AddressBits = None,
    choices: Choices = None,
    history: History = None,
    lanes: Lanes = None,
    query_heads: QueryHeads = None,
    head_inputs: HeadInputs = None,
    scratch: Scratch = None,
    engine: Annotated[
        bool, typer.Option("--engine", help="Only the matrix engine, without the accelerator.")
    ] = False,
    force: Force = False,
) -> None:
    """Write the accelerator as one Verilog-2005 file, with its register map, C header, SystemRDL,
    FuseSoC core, testbench and an example of its use."""
    given = {
        "rows": rows,
        "cols": cols,
        "draft_rows": draft_rows,
        "max_k": max_k,
        "group": group,
        "split": split,
        "weights_bits": weights_bits,
        "data_bits": data_bits,
        "address_bits": address_bits,
        "choices": choices,
        "history": history,
        "lanes": lanes,
        "query_heads": query_heads,
        "head_inputs": head_inputs,
        "scratch": scratch,
    }
    base, given = starting_point(config, preset, given)
    from speq.hw.verilog import write_verilog

    chosen = configuration(base, engine, given)
    detail(f"configuration: {chosen}")
    for path in write_verilog(chosen, output, force=force):
        print(f"{path}  {path.stat().st_size:,} bytes")


def starting_point(
    config: Path | None, preset: str | None, options: Mapping[str, int | None]
) -> tuple[AcceleratorConfig | EngineConfig | None, dict[str, int]]:
    """The configuration of a description, if there is one, and what is given by name, by a preset
    too.

    Raises
    ------
    ValueError, OSError
        If there is no such preset, or both, or the description cannot be read.
    """
    given = {name: value for name, value in options.items() if value is not None}
    if config is not None:
        if preset is not None:
            raise ValueError("--config and --preset exclude each other")
        return read_configuration(config), given
    if preset is not None:
        if preset not in PRESETS:
            raise ValueError(f"there is no preset {preset!r}; choose one of {', '.join(PRESETS)}")
        given = PRESETS[preset].options | given
    return None, given


def read_configuration(path: Path) -> AcceleratorConfig | EngineConfig:
    """The configuration in a description.

    Raises
    ------
    ValueError
        If it is none, with one line that names the file and the field.
    OSError
        If it cannot be read.
    """
    from speq.hw.verilog import read_description
    from speq.model.input_file import read_limited

    content = read_limited(path, _MAX_DESCRIPTION)
    try:
        return read_description(content.decode())
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: it is not JSON: not UTF-8") from error
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def configuration(
    base: AcceleratorConfig | EngineConfig | None, engine_only: bool, given: dict[str, int]
) -> AcceleratorConfig | EngineConfig:
    """A configuration, by default the usual one, but for the options that are given by name.

    Raises
    ------
    ValueError
        If there can be none such.
    """
    from speq.hw import EngineConfig
    from speq.hw.accelerator_config import AcceleratorConfig

    def chosen(*names: str) -> dict[str, int]:
        return {name: given[name] for name in names if name in given}

    engine = base.engine if isinstance(base, AcceleratorConfig) else base or EngineConfig()
    engine = replace(
        engine,
        format=replace(engine.format, **chosen("group", "split")),
        **chosen("rows", "cols", "draft_rows", "max_k"),
    )
    if engine_only or isinstance(base, EngineConfig):
        refuse_unused(
            "with an engine alone, which has neither ports to memory nor rankings",
            **chosen("weights_bits", "data_bits", "address_bits", *_OTHERS),
        )
        return engine
    ports = base or AcceleratorConfig(engine, lanes=given.get("lanes"))
    changed: dict[str, Any] = {name: getattr(ports, name) for name in _OTHERS}
    changed |= chosen(*_OTHERS)
    for name in ("weights", "data"):
        bits = {"data_bits": given[f"{name}_bits"]} if f"{name}_bits" in given else {}
        try:
            changed[name] = replace(getattr(ports, name), **bits, **chosen("address_bits"))
        except ValueError as error:
            raise ValueError(f"the {name} port: {error}") from error
    return AcceleratorConfig(engine, **changed)
