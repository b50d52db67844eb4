# SPDX-License-Identifier: Apache-2.0
"""The plots of `speq eval` and `speq explore`, as matplotlib figures, saved as PNG and SVG.

The same data gives the same bytes. Colours are those of Okabe and Ito ("Color Universal Design",
2008), which remain distinct for colour-blind readers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from speq.model.ablation import RowResult
from speq.model.evaluation import Acceptance, Curve
from speq.model.number_format import remap_table

if TYPE_CHECKING:
    from speq.host.exploration import Point

BLUE, ORANGE, GREEN = "#0072B2", "#E69F00", "#009E73"
VERMILION, SKY = "#D55E00", "#56B4E9"
GREY = "#999999"
_DPI = 150
_CREATOR = "speq eval"  # by which `speq.cli.evaluate.marks` knows them


def _figure(width: float, height: float, axes: int = 1) -> tuple[Figure, list[Axes]]:
    with matplotlib.rc_context(
        {"font.size": 9, "axes.spines.top": False, "axes.spines.right": False}
    ):
        figure = Figure((width, height), layout="constrained")
        shown = figure.subplots(1, axes, sharey=True, squeeze=False)[0].tolist()
    for axis in shown:
        axis.grid(axis="y", color="#dddddd", linewidth=0.6)
        axis.set_axisbelow(True)
    return figure, shown


def _short(model: str) -> str:
    """A model's name for a title: of a path the last part, and no sign that starts a formula."""
    return Path(model).name.replace("$", r"\$")


def acceptance_plot(acceptance: Acceptance, model: str) -> Figure:
    """Share of right tokens at each chain position, given that the chain is right so far."""
    figure, (axis,) = _figure(5.2, 3.4)
    positions = np.arange(1, len(acceptance.first) + 1)
    axis.plot(positions, acceptance.first, "o-", color=BLUE, label="first choice")
    for (count, shares), color in zip(acceptance.among.items(), (GREEN, SKY), strict=False):
        axis.plot(positions, shares, "o--", color=color, label=f"among {count} choices")
    axis.bar(positions, acceptance.survival, color="#cccccc", label="chain right up to here")
    axis.set(xlabel="draft position", ylabel="share", ylim=(0, 1), xticks=positions)
    axis.set_title(f"Acceptance by draft position, {_short(model)}")
    axis.legend(frameon=False, fontsize=8, loc="lower left")
    return figure


def speedup_plot(curves: Mapping[str, Sequence[Curve]], model: str) -> Figure:
    """Speedup against longest draft and against threshold; `curves` maps "chain" and "alternates"
    to their curves, of the same settings in the same order."""
    count = len(next(iter(curves.values())))
    figure, axes = _figure(4.2 * count, 3.4, count)
    for (label, shown), color in zip(curves.items(), (BLUE, VERMILION), strict=False):
        for axis, curve in zip(axes, shown, strict=True):
            axis.plot(curve.values, curve.speedups, "o-", color=color, label=label)
            axis.axvline(curve.chosen, color=color, linewidth=0.8, linestyle=":")
            axis.set_xlabel(curve.setting)
    axes[0].set_ylabel("modelled speedup over FP16")
    axes[0].legend(frameon=False, fontsize=8)
    figure.suptitle(f"Speedup against settings, {_short(model)} (dotted: chosen on calibration)")
    return figure


def exponent_plot(counts: np.ndarray, split: int, model: str) -> Figure:
    """Weights by t and top mantissa bit, coloured by the remap's classes; counts are [32, 2]."""
    figure, (axis,) = _figure(6.4, 3.4)
    shares = counts / max(1, counts.sum())
    table = remap_table(split)
    owned = 11 - split  # smaller exponents are spilled into other classes' slots
    visible = np.flatnonzero(shares.sum(axis=1) > 1e-4).max(initial=owned) + 1
    colors = matplotlib.colormaps["viridis"](np.linspace(0.05, 0.95, 8))
    bottom = np.zeros(32)
    for half in (0, 1):
        classes = [table[t << 1 | half] >> 3 for t in range(32)]
        shown = [colors[q] if t < owned else VERMILION for t, q in enumerate(classes)]
        axis.bar(range(visible), shares[:visible, half], bottom=bottom[:visible], color=shown)
        bottom += shares[:, half]
    axis.set(
        xlabel="t = base exponent of the group − exponent of the weight",
        ylabel="share of weights",
        xticks=range(visible),
    )
    handles = [Patch(color=colors[q], label=f"q = {q}") for q in range(7, -1, -1)]
    handles.append(Patch(color=VERMILION, label=f"spilled: {shares[owned:].sum():.1%}"))
    axis.legend(handles=handles, frameon=False, fontsize=8, ncols=2)
    axis.set_title(f"Exponents and the remap's draft classes, {_short(model)}, split {split}")
    return figure


def ablation_plot(rows: Sequence[RowResult], model: str) -> Figure:
    """Speedup of every row with its interval, and the design study's figure."""
    figure, (axis,) = _figure(8.0, 0.26 * len(rows) + 1.2)
    axis.grid(axis="y", visible=False)
    axis.grid(axis="x", color="#dddddd", linewidth=0.6)
    for y, result in enumerate(rows):
        estimate = result.speedup
        error = [[estimate.value - estimate.low], [estimate.high - estimate.value]]
        color = ORANGE if result.storage_added > 0.1 else GREEN if result.row.choices > 1 else BLUE
        axis.barh(y, estimate.value, color=color, xerr=error, error_kw={"linewidth": 0.8})
        prototype = result.row.prototype[1]
        if prototype is not None:
            axis.plot(prototype, y, "D", color="black", markersize=4)
    axis.set(yticks=range(len(rows)), yticklabels=[result.row.name for result in rows])
    axis.set_ylim(len(rows) - 0.4, -0.6)
    axis.axvline(1, color=GREY, linewidth=0.8)
    axis.set_xlabel("modelled speedup over FP16")
    axis.set_title(f"Ablation, {_short(model)}")
    handles = [
        Patch(color=BLUE, label="inside the FP16 weights, chain"),
        Patch(color=GREEN, label="inside the FP16 weights, alternates"),
        Patch(color=ORANGE, label="external draft model"),
        Line2D([], [], color="black", marker="D", linestyle="", label="design study"),
    ]
    figure.legend(handles=handles, frameon=False, fontsize=8, ncols=2, loc="outside lower center")
    return figure


def front_plot(points: Sequence[Point], size: str, model: str, bandwidth: float) -> Figure:
    """Speed against size of configurations, the Pareto front in colours that say how well each uses
    its bandwidth."""
    figure, (axis,) = _figure(6.4, 4.2)
    behind = [point for point in points if not point.front]
    front = sorted((point for point in points if point.front), key=lambda point: point.size)
    axis.plot(
        [point.size for point in behind],
        [point.speed.speculative for point in behind],
        *("o",),
        color="#cccccc",
        markersize=4,
        label="others",
    )
    shown = axis.scatter(
        [point.size for point in front],
        [point.speed.speculative for point in front],
        c=[point.goodness[2] for point in front],
        cmap="viridis",
        edgecolors="black",
        linewidths=0.6,
        zorder=3,
        label="Pareto front",
    )
    # The fastest of each array is named.
    best: dict[str, Point] = {}
    for point in front:
        array = f"{point.configuration.rows} x {point.configuration.cols}"
        if array not in best or point.speed.speculative > best[array].speed.speculative:
            best[array] = point
    for array, point in best.items():
        place = (point.size, point.speed.speculative)
        axis.annotate(array, place, (4, 5), textcoords="offset points", fontsize=8)
    figure.colorbar(shown, ax=axis, label="tokens/s per GB/s of weights")
    fastest = max(point.speed.speculative for point in points)
    axis.set(xlabel=size, ylabel="tokens/s", ylim=(0, 1.1 * fastest))
    axis.set_title(f"Configurations for {_short(model)}, {bandwidth:g} GB/s of weights")
    axis.legend(frameon=False, fontsize=8, loc="lower right")
    return figure


def save(figure: Figure, folder: Path, name: str, creator: str = _CREATOR) -> list[Path]:
    """Writes NAME.png and NAME.svg to a folder."""
    png, svg = folder / f"{name}.png", folder / f"{name}.svg"
    figure.savefig(png, dpi=_DPI, metadata={"Software": creator})
    with matplotlib.rc_context({"svg.hashsalt": "speq", "svg.fonttype": "none"}):
        figure.savefig(svg, metadata={"Date": None, "Creator": creator})
    return [png, svg]
