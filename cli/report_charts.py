# SPDX-License-Identifier: Apache-2.0
"""Line charts of `speq report`, as what its template draws in SVG.

Coordinates are those of the chart's view box. Series are told apart by their marks and dashes as
well as by their colours, which the page's style sheet chooses.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from matplotlib.ticker import MaxNLocator

WIDTH, HEIGHT = 520, 280
_LEFT, _RIGHT, _TOP, _BOTTOM = 68, 12, 12, 44
_TICKS = 5
_SPACE = 26  # for the text of a value of x
#: Shapes of marks around the origin.
_MARKS = (
    "M-4,0a4,4 0 1,0 8,0a4,4 0 1,0 -8,0",
    "M-4,-4H4V4H-4z",
    "M0,-5L5,4H-5z",
    "M0,-5L5,0L0,5L-5,0z",
)


@dataclass(frozen=True)
class Tick:
    """A place on an axis and what is written there."""

    place: float
    text: str


@dataclass(frozen=True)
class Line:
    """A series: its name, number, parts between gaps ("x,y x,y" each), marks and their shape."""

    name: str
    number: int
    parts: list[str]
    marks: list[tuple[float, float]]
    shape: str


@dataclass(frozen=True)
class Chart:
    """A line chart.

    Attributes
    ----------
    title, x_label, y_label : str
    lines : list of Line
    x_ticks, y_ticks : list of Tick
    rows : list of list of str
        The same as a table: a heading row, then a row for each value of x.
    """

    title: str
    x_label: str
    y_label: str
    lines: list[Line]
    x_ticks: list[Tick]
    y_ticks: list[Tick]
    rows: list[list[str]]
    width: int = WIDTH
    height: int = HEIGHT
    left: int = _LEFT
    right: int = WIDTH - _RIGHT
    bottom: int = HEIGHT - _BOTTOM


def line_chart(
    title: str,
    x_label: str,
    y_label: str,
    x_values: Sequence[float],
    series: Mapping[str, Sequence[float | None]],
    *,
    percent: bool = False,
) -> Chart:
    """A chart of some series over the same values of x, from 0 to 1 if they are shares."""
    known = [value for values in series.values() for value in values if value is not None]
    low, high = (0.0, 1.0) if percent else (min([1.0, *known]), max([1.0, *known]))
    ticks = [float(tick) for tick in MaxNLocator(_TICKS).tick_values(low, high)]
    low, high = ticks[0], ticks[-1]
    start, end = min(x_values), max(x_values)
    right, bottom = WIDTH - _RIGHT, HEIGHT - _BOTTOM

    def x_of(value: float) -> float:
        share = (value - start) / (end - start) if end > start else 0.5
        # A little away from the axis.
        return round(_LEFT + 14 + share * (right - _LEFT - 28), 1)

    def y_of(value: float) -> float:
        return round(bottom - (value - low) / (high - low) * (bottom - _TOP), 1)

    def shown(value: float | None) -> str:
        if value is None:
            return "-"
        return f"{value:.1%}" if percent else f"{value:.2f}"

    lines = []
    for number, (name, values) in enumerate(series.items()):
        parts: list[list[tuple[float, float]]] = [[]]
        for x, y in zip(x_values, values, strict=True):
            if y is None:
                parts.append([])
            else:
                parts[-1].append((x_of(x), y_of(y)))
        marks = [point for part in parts for point in part]
        paths = [" ".join(f"{x},{y}" for x, y in part) for part in parts if part]
        lines.append(Line(name, number, paths, marks, _MARKS[number % len(_MARKS)]))
    places: list[Tick] = []
    for x in x_values:  # close ones have no room for their text
        if not places or x_of(x) - places[-1].place >= _SPACE:
            places.append(Tick(x_of(x), f"{x:g}"))
    return Chart(
        title,
        x_label,
        y_label,
        lines,
        places,
        [Tick(y_of(y), f"{y:.0%}" if percent else f"{y:g}") for y in ticks],
        [
            [x_label, *series],
            *(
                [f"{x:g}", *(shown(values[i]) for values in series.values())]
                for i, x in enumerate(x_values)
            ),
        ],
    )
