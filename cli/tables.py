# SPDX-License-Identifier: Apache-2.0
"""Tables of figures: as narrow as can be, and never cut."""

from __future__ import annotations

from rich import box
from rich.console import Console, RenderableType
from rich.measure import Measurement
from rich.table import Table


def figure_table(title: str, *headings: str, left: int = 1) -> Table:
    """A table of figures behind `left` columns of names, for lines of 80 characters. Headings may
    have several lines."""
    spacing = {"box": box.SIMPLE_HEAD, "show_edge": False, "padding": (0, 1, 0, 0)}
    table = Table(title=title or None, title_justify="left", **spacing)
    for i, heading in enumerate(headings):
        justify = "left" if i < left else "right"
        table.add_column(heading, justify=justify, no_wrap=True, vertical="bottom")
    return table


def show(*renderables: RenderableType) -> None:
    """Print tables and lines. Where a line is too short, columns stand closer. What is still wider
    than a terminal, or than 80 characters where there is none, is left to it: no name or number is
    cut."""
    console = Console()
    tables = [renderable for renderable in renderables if isinstance(renderable, Table)]
    for table in tables:
        if _width(table) > console.width:
            table.padding = 0
    console = Console(width=max(console.width, *map(_width, tables), 0), highlight=False)
    for renderable in renderables:
        console.print(renderable, soft_wrap=not isinstance(renderable, Table))


def _width(table: Table) -> int:
    """Characters of a line that a table takes if it can."""
    wide = Console(width=1 << 16)
    return Measurement.get(wide, wide.options, table).maximum
