# SPDX-License-Identifier: Apache-2.0
"""The command line `speq`: its commands and how errors are reported.

Each command is a module whose function `run` declares its options and does the work. These modules
import nothing heavy before a command runs, so that help and wrong options do not wait for torch.
"""

from __future__ import annotations

import os
import sys
import warnings
from importlib.metadata import version
from typing import Annotated

import typer

from speq.cli import (
    bench,
    demo,
    demo_decode,
    encode,
    evaluate,
    generate,
    predict,
    verify_file,
    verilog,
    waves,
)

app = typer.Typer(
    name="speq",
    no_args_is_help=True,
    add_completion=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def print_version(wanted: bool) -> None:
    """Answer `--version` and end."""
    if wanted:
        print(f"speq {version('speq')}")
        raise typer.Exit


@app.callback()
def common(
    show_version: Annotated[
        bool,
        typer.Option(
            "--version", callback=print_version, is_eager=True, help="Print the version and exit."
        ),
    ] = False,
) -> None:
    """SPEQ: an LLM accelerator whose 4-bit draft model lies inside the FP16 weights."""


app.command("verilog")(verilog.run)
app.command("encode")(encode.run)
app.command("verify-file")(verify_file.run)
app.command("demo")(demo.run)
app.command("demo-decode")(demo_decode.run)
app.command("generate")(generate.run)
app.command("eval")(evaluate.run)
app.command("cycles")(predict.run)
app.command("bench")(bench.run)
app.command("waves")(waves.run)


def describe(error: Exception) -> str:
    """One line that says what went wrong, without line breaks."""
    if isinstance(error, OSError) and error.filename is not None and error.strerror:
        text = f"{error.filename}: {error.strerror}"
    else:
        text = str(error) or type(error).__name__
    return " ".join(text.split())


def show_warning(message: Warning | str, *_: object) -> None:
    """Print a warning as one line, in place of Python's two with a source line."""
    print(f"speq: warning: {' '.join(str(message).split())}", file=sys.stderr)


def main() -> None:
    """Entry point of `speq`: exit code 1 and one line on stderr for an expected error.

    Usage errors exit with 2. With SPEQ_DEBUG set in the environment, the traceback is shown.
    """
    warnings.showwarning = show_warning
    try:
        app()
    except (ValueError, OSError) as error:
        if os.environ.get("SPEQ_DEBUG"):
            raise
        print(f"speq: error: {describe(error)}", file=sys.stderr)
        sys.exit(1)
