# SPDX-License-Identifier: Apache-2.0
"""Progress bars on standard error."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    track,
)


def bars(*, transient: bool = False, disable: bool = False) -> Progress:
    """Bars that say how many of how many are done; options as of `rich.progress.Progress`."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    return Progress(*columns, console=Console(stderr=True), transient=transient, disable=disable)


def with_bar(names: Iterable[str]) -> Iterator[str]:
    """Names of layers that are encoded one by one, with a bar that stays."""
    with bars() as progress:
        yield from progress.track(names, description="encoding")


def with_passing_bar(names: Iterable[str]) -> Iterable[str]:
    """The same with a bar that goes when all are done, and only on a terminal."""
    console = Console(stderr=True)
    return track(
        names, "encoding", console=console, transient=True, disable=not console.is_terminal
    )
