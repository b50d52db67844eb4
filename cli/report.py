# SPDX-License-Identifier: Apache-2.0
"""`speq report`: the results of an evaluation as one page for a browser.

The page is one file that fetches nothing, runs nothing and shows texts of models as text. What is
on it says `speq.cli.report_page`, how it looks the template report.html.jinja.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from speq.cli.options import Force

if TYPE_CHECKING:
    from jinja2 import Template

    from speq.cli.report_page import Page

#: How a page begins.
_MARK = rb"<!doctype html>\n<!-- Written by speq report\. -->\n"
_TEMPLATE = "report.html.jinja"


def run(
    folder: Annotated[
        Path, typer.Argument(help="A folder that speq eval has written, perhaps with more in it.")
    ],
    output: Annotated[
        Path | None,
        typer.Option("-o", "--output", help="The page.", show_default="FOLDER/report.html"),
    ] = None,
    force: Force = False,
) -> None:
    """Show an evaluation's texts and figures, and what else is in its folder, as one HTML page."""
    from speq.hw.common.files import replacing

    output = output or folder / "report.html"
    with replacing(output, _MARK, force=force) as temporary:
        # This loads matplotlib: the output is right by now.
        from speq.cli.report_page import read_page

        page = read_page(folder)
        temporary.write_text(render(page), encoding="utf-8")
    if page.ignored:
        print(f"not shown: {', '.join(page.ignored)} (not of speq bench or speq generate --json)")
    print(f"written: {output}, from {', '.join(page.sources)}")


def render(page: Page) -> str:
    """The page as HTML; all that it shows is escaped."""
    return _template().render(page=page)


@cache
def _template() -> Template:
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(_TEMPLATE)
