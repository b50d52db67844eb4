# SPDX-License-Identifier: Apache-2.0
"""What commands say beside their results, on standard error, and how much of it.

`--verbose` adds what the modules report of their work as `logging` messages of level DEBUG;
`--quiet` leaves out everything but errors and warnings.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterable

_log = logging.getLogger("speq")  # above those of all modules
_figures = logging.getLogger("speq.figures")


class _StandardError(logging.Handler):
    """Prints to whatever standard error is at the time, and says who speaks."""

    def emit(self, record: logging.LogRecord) -> None:
        speaker = "" if record.name == _figures.name else "speq: "
        print(f"{speaker}{record.getMessage()}", file=sys.stderr, flush=True)


def set_verbosity(verbose: bool, quiet: bool) -> None:
    """Say more than usual, or less.

    Raises
    ------
    ValueError
        If both are wanted.
    """
    if verbose and quiet:
        raise ValueError("--verbose and --quiet exclude each other")
    if not any(isinstance(handler, _StandardError) for handler in _log.handlers):
        _log.addHandler(_StandardError())
    _log.setLevel(logging.DEBUG if verbose else logging.WARNING if quiet else logging.INFO)


def is_quiet() -> bool:
    """Whether only errors and warnings are wanted on standard error, and no progress."""
    return not _log.isEnabledFor(logging.INFO)


def note(text: str) -> None:
    """Say something that a user may want to know while a command works."""
    _log.info("%s", text)


def detail(text: str) -> None:
    """Say something that a user wants to know who has asked for everything."""
    _log.debug("%s", text)


def figures(lines: Iterable[str]) -> None:
    """Print the figures of a run, each in a line of its own."""
    for line in lines:
        _figures.info("%s", line)
