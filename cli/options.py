# SPDX-License-Identifier: Apache-2.0
"""Options that several commands share, and what they mean together."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated

import typer

from speq.model.aliases import ALIASES, NOT_A_MODEL
from speq.model.errors import CheckpointError
from speq.model.number_format import FormatConfig
from speq.model.settings import COST_STEPS, MAX_COST_LIMIT
from speq.model.settings import DEFAULT_THRESHOLD as DEFAULT_THRESHOLD


def finite(value: float | None) -> float | None:
    """Callback of options: refuses infinity and NaN."""
    if value is not None and not math.isfinite(value):
        raise typer.BadParameter(f"{value} is no finite number")
    return value


def refuse_unused(why: str, **options: object) -> None:
    """Raises ValueError, naming it, if one of the options is given (not None) that has no use."""
    for name, value in options.items():
        if value is not None:
            option = name.replace("_", "-")
            raise ValueError(f"--{option} is not used {why}: leave it out (it is {value})")


def complete_model(incomplete: str) -> list[str]:
    """Aliases that begin so, for shells, which know paths themselves."""
    return [alias for alias in ALIASES if alias.startswith(incomplete)]


def check_model(model: str) -> None:
    """Refuse a model that is not there, without loading torch.

    Raises
    ------
    OSError, CheckpointError
        That name the path, or what an alias needs.
    """
    alias = ALIASES.get(model)
    path = alias() if alias else Path(model)
    if not path.suffix and not path.exists():
        raise CheckpointError(f"{model}: {NOT_A_MODEL}")
    path.stat()


ModelName = Annotated[
    str,
    typer.Argument(
        help="A checkpoint's path, or an alias such as smollm2.", autocompletion=complete_model
    ),
]
Seed = Annotated[
    int,
    typer.Option(
        envvar="SPEQ_SEED", min=0, max=2**64 - 1, help="Seed of everything random, 64 bits."
    ),
]
Force = Annotated[
    bool, typer.Option("--force", help="Replace files that this command did not write.")
]

# The array.
ROWS_HELP = "Rows of the array: tokens in a verify pass."
COLS_HELP = "Columns of the array: outputs in a tile."
Rows = Annotated[int, typer.Option(help=ROWS_HELP)]
Cols = Annotated[int, typer.Option(help=COLS_HELP)]
LANES_HELP = "Elements that the vector unit takes in a cycle: a power of two, 4 to 64."
LANES_DEFAULT = "8, or the columns if there are fewer"
Lanes = Annotated[int | None, typer.Option(help=LANES_HELP, show_default=LANES_DEFAULT)]

# Decoding.
Continued = Annotated[str, typer.Option(help="What to continue.")]
#: No model's context is longer.
MOST_TOKENS = 1 << 24
MaxTokens = Annotated[int, typer.Option(min=1, max=MOST_TOKENS, help="Most tokens to generate.")]
DraftLength = Annotated[
    int | None, typer.Option(help="Most tokens to draft.", show_default="rows - 1")
]

# The format of a model that is encoded here.
GROUP_HELP = "Weights that share a base exponent: 32, 64 or 128."
Group = Annotated[int, typer.Option(help=GROUP_HELP)]
SPLIT_HELP = "Exponents told apart by their top mantissa bit: 0 to 3."
Split = Annotated[int, typer.Option(help=SPLIT_HELP)]
GroupOfEncode = Annotated[int | None, typer.Option(help="As of encode.", show_default="64")]
SplitOfEncode = Annotated[int | None, typer.Option(help="As of encode.", show_default="2")]


def chain_end(threshold: float, limit: int) -> str:
    """What ends a chain before its longest length: its probability, if the policy has a `limit`, or
    else a small margin."""
    if limit < MAX_COST_LIMIT:
        return f"chains end below {2 ** (-limit / COST_STEPS):.0%}"
    return f"threshold {threshold:g}"


def chosen_format(group: int | None, split: int | None, encoded: Path | None) -> FormatConfig:
    """The format of a model that is encoded here.

    Raises
    ------
    ValueError
        If a value is impossible, or if one is given beside an encoded file.
    """
    given = {"group": group, "split": split}
    given = {name: value for name, value in given.items() if value is not None}
    if encoded and given:
        name = next(iter(given))
        raise ValueError(f"--{name} and --encoded exclude each other: the file says the format")
    return FormatConfig(**given)
