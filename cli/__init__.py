# SPDX-License-Identifier: Apache-2.0
"""The command line `speq`: its commands and how errors are reported.

Each command is a module whose function `run` declares its options and does the work. These modules
import nothing heavy before a command runs, so that help and wrong options do not wait for torch.
"""

from __future__ import annotations

import os
import platform
import signal
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
    explore,
    generate,
    image,
    inspect,
    predict,
    report,
    resources,
    timing,
    verify_file,
    verilog,
    waves,
)
from speq.cli.notes import detail, set_verbosity
from speq.cli.presets import presets_help

app = typer.Typer(
    name="speq",
    no_args_is_help=True,
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
    verbose: Annotated[
        bool,
        typer.Option("--verbose", "-v", help="Say more: files, formats, sizes, builds, seeds."),
    ] = False,
    quiet: Annotated[
        bool,
        typer.Option("--quiet", "-q", help="Only results, errors and warnings; no progress."),
    ] = False,
) -> None:
    """SPEQ: an LLM accelerator whose 4-bit draft model lies inside the FP16 weights."""
    set_verbosity(verbose, quiet)
    detail(f"version {version('speq')}, Python {platform.python_version()}")


app.command("verilog", epilog=presets_help())(verilog.run)
app.command("encode")(encode.run)
app.command("verify-file")(verify_file.run)
app.command("image", epilog=presets_help())(image.run)
app.command("demo")(demo.run)
app.command("demo-decode")(demo_decode.run)
app.command("generate")(generate.run)
app.command("inspect")(inspect.run)
app.command("eval")(evaluate.run)
app.command("report")(report.run)
app.command("cycles")(predict.run)
app.command("explore")(explore.run)
app.command("bench")(bench.run)
app.command("timing")(timing.run)
app.command("resources")(resources.run)
app.command("waves")(waves.run)


def describe(error: BaseException) -> str:
    """One line that says what went wrong."""
    if isinstance(error, OSError) and error.filename is not None and error.strerror:
        text = f"{error.filename}: {error.strerror}"
    else:
        text = str(error) or type(error).__name__
    return one_line(text)


def one_line(text: str) -> str:
    """The text without line breaks, and with what would control a terminal as escape sequences: it
    may quote files of others."""
    line = " ".join(text.split())
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in line)


def answer(error: BaseException) -> str:
    """What the user is told of an error that ends a command, in one line."""
    if isinstance(error, (ValueError, OSError)):
        return describe(error)
    if isinstance(error, MemoryError) or "allocate memory" in str(
        error
    ):  # torch has no class for it
        return f"not enough memory: {describe(error)}"
    return (
        f"{type(error).__name__}: {describe(error):.300} (this should not happen: please report "
        "it, with what the same command prints with SPEQ_DEBUG=1 in front)"
    )


def show_warning(message: Warning | str, *_: object) -> None:
    """Print a warning as one line, in place of Python's two with a source line."""
    print(f"speq: warning: {one_line(str(message))}", file=sys.stderr)


def end(number: int, _frame: object) -> None:
    """Handler of signals that end a command: what it has begun is cleaned up first."""
    sys.exit(128 + number)


def main() -> None:
    """Entry point of `speq`: exit code 1 and one line on stderr for an error; one that is not
    expected asks for a report.

    Usage errors exit with 2. With SPEQ_DEBUG set in the environment, the traceback is shown.
    """
    warnings.showwarning = show_warning
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, end)
    try:
        app(prog_name="speq")  # also where it runs as a module
    except (SystemExit, KeyboardInterrupt):
        raise
    except BaseException as error:  # a panic in a library of Rust is no Exception
        if os.environ.get("SPEQ_DEBUG"):
            raise
        print(f"speq: error: {answer(error)}", file=sys.stderr)
        sys.exit(1)
