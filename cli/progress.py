# SPDX-License-Identifier: Apache-2.0
"""Progress on standard error: nothing of it with `--quiet`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Column

from speq.cli.notes import is_quiet

#: Characters of a line that bars need, and that counts and times beside the description take.
_BAR_WIDTH, _FIGURES_WIDTH = 60, 28


def bar_columns(console: Console, *figures: ProgressColumn) -> list[ProgressColumn]:
    """Columns for a description, a bar and figures, which are never cut: where the line is too
    short, the bar becomes shorter or is left out, then the description's end is."""
    room = max(8, console.width - _FIGURES_WIDTH)
    whole = Column(no_wrap=True, max_width=room, overflow="ellipsis")
    description = TextColumn("{task.description}", table_column=whole)
    return [description, *([BarColumn()] if console.width >= _BAR_WIDTH else []), *figures]


def count() -> ProgressColumn:
    """How many of how many."""
    return MofNCompleteColumn(table_column=Column(no_wrap=True))


def elapsed() -> ProgressColumn:
    """The time since the start."""
    return TimeElapsedColumn(table_column=Column(no_wrap=True))


def remaining() -> ProgressColumn:
    """The time to the end, as it goes so far."""
    return TimeRemainingColumn(table_column=Column(no_wrap=True))


def bars(*, transient: bool = False, terminal_only: bool = False) -> Progress:
    """Bars that say how many of how many are done.

    Parameters
    ----------
    transient : bool
        They go when all is done.
    terminal_only : bool
        Without a terminal there is nothing; else the last state stays.
    """
    console = Console(stderr=True)
    disable = is_quiet() or (terminal_only and not console.is_terminal)
    columns = bar_columns(console, count(), elapsed())
    return Progress(*columns, console=console, transient=transient, disable=disable)


def with_bar(names: Iterable[str]) -> Iterator[str]:
    """Names of layers that are encoded one by one, with a bar that stays."""
    with bars() as progress:
        yield from progress.track(names, description="encoding")


def with_passing_bar(names: Iterable[str]) -> Iterator[str]:
    """The same with a bar that goes when all are done, and only on a terminal."""
    with bars(transient=True, terminal_only=True) as progress:
        yield from progress.track(names, description="encoding")


@contextmanager
def status(text: str = "") -> Iterator[Callable[[str], None]]:
    """Shows on a terminal what is being done; what is yielded changes it."""
    console = Console(stderr=True)
    if is_quiet() or not console.is_terminal:
        yield lambda _: None
        return
    with console.status(text) as shown:
        yield shown.update
