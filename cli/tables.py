# SPDX-License-Identifier: Apache-2.0
"""Tables of figures: as narrow as can be, and never cut."""

from __future__ import annotations

from rich import box
from rich.console import Console, RenderableType
from rich.measure import Measurement
from rich.table import Table


def figure_table(title: str, *headings: str, left: int = 1) -> Table:
    """A table of figures behind `left` columns of names, for lines of 80 characters. Headings may
    have several lines, and what is in the first column gets several between its words."""
    spacing = {"box": box.SIMPLE_HEAD, "show_edge": False, "padding": (0, 1, 0, 0)}
    table = Table(title=title or None, title_justify="left", **spacing)
    for i, heading in enumerate(headings):
        justify = "left" if i < left else "right"
        table.add_column(heading, justify=justify, no_wrap=i > 0, vertical="bottom")
    return table


def show(*renderables: RenderableType) -> None:
    """Print such tables, and lines. Strings, also those in tables, are plain text.

    Where a line is too short for a table, its columns stand closer, then names get several lines.
    What is still wider than a terminal, or than 80 characters where there is none, is left to it:
    no word and no number is cut.
    """
    console = Console()
    tables = [renderable for renderable in renderables if isinstance(renderable, Table)]
    needed = console.width
    for table in tables:
        if _width(table) > console.width:
            table.padding = 0
            names = [str(cell) for cell in table.columns[0].cells]
            words = [name.split() or [""] for name in (str(table.columns[0].header), *names)]
            shortest = max(len(word) for name in words for word in name)
            longest = max(map(len, names), default=0)
            needed = max(needed, _width(table) - max(0, longest - shortest))
    console = Console(width=needed, highlight=False)
    for renderable in renderables:
        is_table = isinstance(renderable, Table)
        console.print(renderable, soft_wrap=not is_table, markup=False)


def _width(table: Table) -> int:
    """Characters of a line that a table takes if it can."""
    wide = Console(width=1 << 16)
    return Measurement.get(wide, wide.options, table).maximum
