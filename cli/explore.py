# SPDX-License-Identifier: Apache-2.0
"""`speq explore`: which configuration of the accelerator a model, a memory and a part ask for."""

from __future__ import annotations

import json
from contextlib import ExitStack, nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape

from speq.cli.options import Force, ModelName, check_model, finite
from speq.cli.predict import MAX_LATENCY, Context, Encoded, check_conditions
from speq.cli.progress import bars
from speq.cli.tables import figure_table, show

if TYPE_CHECKING:
    from rich.table import Table

    from speq.cli.sizes import Limit
    from speq.host.exploration import Decoding, Point

_ROWS = "Rows that are tried; may be given several times."
_COLS = "Columns that are tried, powers of two; may be given several times."
_LANES = "Lanes of the vector unit that are tried, powers of two; may be given several times."
#: Largest bandwidth, GB/s.
_MAX_BANDWIDTH = 1e6
#: How files begin that the command has written.
_REPORT = rb'\{\s*"explored": '
_PLOTS = {
    "front.png": rb"(?s)\x89PNG.*Software\0speq explore",
    "front.svg": rb"(?s)<\?xml.*<dc:title>speq explore<",
}
_FINISHED = "points.jsonl"


def run(
    model: ModelName,
    bandwidth: Annotated[
        float,
        typer.Option(help="GB/s that memory gives the port of weights.", callback=finite),
    ],
    part: Annotated[
        str | None,
        typer.Option(help="An FPGA that it is to fit, such as K26: the beginning of its name."),
    ] = None,
    area: Annotated[
        float | None,
        typer.Option(
            help="In place of a part: square millimetres of SKY130 HD that arithmetic may take.",
            callback=finite,
        ),
    ] = None,
    context: Context = None,
    clock: Annotated[
        float | None,
        typer.Option(
            help="Clock in MHz.",
            show_default="as measured of the slowest unit",
            callback=finite,
        ),
    ] = None,
    acceptance: Annotated[
        float, typer.Option(help="Share of drafted tokens accepted.", callback=finite)
    ] = 0.8,
    encoded: Encoded = None,
    rows: Annotated[list[int] | None, typer.Option(help=_ROWS, show_default="4, 8, 16")] = None,
    cols: Annotated[
        list[int] | None, typer.Option(help=_COLS, show_default="8, 16, 32, 64")
    ] = None,
    lanes: Annotated[list[int] | None, typer.Option(help=_LANES, show_default="4, 8, 16")] = None,
    latency: Annotated[int, typer.Option(help="Latency of memory in cycles.")] = MAX_LATENCY,
    jobs: Annotated[
        int | None, typer.Option(min=1, max=1024, help="Processes.", show_default="all processors")
    ] = None,
    scheduler: Annotated[
        str | None,
        typer.Option(help="A Dask scheduler, tcp://HOST:PORT, whose workers are taken instead."),
    ] = None,
    output: Annotated[
        Path, typer.Option("-o", "--output", help="Folder for the plot and for finished points.")
    ] = Path("build/explore"),
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Also write all points to this file.")
    ] = None,
    force: Force = False,
) -> None:
    """Find the configurations that no other beats in speed, size and use of the bandwidth.

    Rows, columns, lanes, widths of the ports and lengths of drafts are varied.
    """
    from speq.cli.sizes import Limit, chosen_part
    from speq.cli.tasks import Finished, check_scheduler, processors, results
    from speq.hw.common.files import replacing, staged

    if not 0 < bandwidth <= _MAX_BANDWIDTH:
        raise ValueError(f"bandwidth is {bandwidth:g}; expected more than 0 and up to 1,000,000")
    if area is not None and not area > 0:
        raise ValueError(f"area is {area:g}; expected more than 0 mm²")
    if scheduler is not None:
        check_scheduler(scheduler)
    limit = Limit(chosen_part(part), area)
    clock = limit.clock if clock is None else clock
    check_conditions(clock, latency, context, [acceptance])
    check_model(model)
    # These load torch: options are right by now.
    from speq.cli import plots
    from speq.cli.predict import Drafts, chosen_context, encoded_drafts
    from speq.host.exploration import Decoding, Point, Speed, configurations, mark_front, speed
    from speq.model.cycles import uniform_formats
    from speq.model.loaders import read_config
    from speq.model.number_format import FormatConfig

    found = configurations(rows or (4, 8, 16), cols or (8, 16, 32, 64), lanes or (4, 8, 16))
    fitting = limit.fitting(found)
    config = read_config(model)
    drafts = encoded_drafts(encoded, config) if encoded else Drafts()
    decoding = Decoding(
        model=config,
        formats=drafts.formats or uniform_formats(config, FormatConfig()),
        drafted_outputs=drafts.drafted_outputs,
        reranked=drafts.reranked,
        acceptance=acceptance,
        context=chosen_context({model: config}, context, max(c.rows for c in found)),
        clock=clock,
        bandwidth=bandwidth,
        latency=latency,
    )
    writing = replacing(json_file, _REPORT, force=force) if json_file else nullcontext()
    with ExitStack() as stack:
        temporary = stack.enter_context(writing)
        folder = stack.enter_context(staged(output, _PLOTS, force=force))
        finished = stack.enter_context(Finished(output / _FINISHED, repr(decoding), force=force))
        progress = stack.enter_context(bars(transient=True, terminal_only=True))
        left = [c for c in fitting if c.name not in finished.results]
        shown = progress.add_task(
            f"exploring {escape(model)}", total=len(fitting), completed=len(fitting) - len(left)
        )
        tasks = [(decoding, c) for c in left]
        for i, result in results(speed, tasks, jobs or processors(), scheduler):
            finished.add(left[i].name, asdict(result))
            progress.advance(shown)
        points = mark_front(
            [Point(c, size, Speed(**finished.results[c.name])) for c, size in fitting.items()]
        )
        figure = plots.front_plot(points, limit.axis, model, bandwidth)
        plots.save(figure, folder, "front", "speq explore")
        if temporary is not None:
            report = {
                "explored": model,
                "bandwidth": bandwidth,
                "target": limit.name,
                "sizes": limit.axis,
                "clock": decoding.clock,
                "latency": latency,
                "context": decoding.context,
                "acceptance": acceptance,
                "left_out": len(found) - len(fitting),
                "points": [point.as_json() for point in points],
            }
            temporary.write_text(json.dumps(report, indent=2) + "\n")
    left_out = len(found) - len(fitting)
    show(
        *heading(model, decoding, limit),
        f"{len(found)} configurations, {left_out} of them too large",
        "",
        table(points, limit),
    )
    print(f"written: front.png, front.svg and {_FINISHED} in {output}")


def heading(model: str, decoding: Decoding, limit: Limit) -> list[str]:
    """The conditions, line by line."""
    from speq.hw.engine_config import EngineConfig

    clock = f"{decoding.clock:g} MHz"
    if decoding.clock == limit.clock:
        clock += f" ({limit.clock_source})"
    lines = [
        model,
        f"{decoding.bandwidth:g} GB/s of weights, latency {decoding.latency} cycles, context "
        f"{decoding.context}, {decoding.acceptance:.0%} of drafts accepted",
        clock,
        f"sizes: {limit.counted}",
    ]
    longest = EngineConfig().max_k
    if decoding.longest > longest:
        lines.append(f"sizes: for products of {longest:,} inputs; {decoding.longest:,} take more")
    return lines


def table(points: list[Point], limit: Limit) -> Table:
    """The front, the fastest first."""
    rates = (f"{rate}\n{kind}" for rate in ("tokens/s", "per GB/s") for kind in ("plain", "spec."))
    out = figure_table("", "array", "lanes", "ports\nbits", "L", "GB/s", *rates, limit.heading)
    for point in sorted(points, key=lambda p: -p.speed.speculative):
        c, s = point.configuration, point.speed
        if point.front:
            speeds = (s.plain, s.speculative)
            out.add_row(
                *(f"{c.rows} x {c.cols}", str(c.lanes), f"{c.weights_bits}/{c.data_bits}"),
                *(str(s.length), f"{s.bandwidth:.4g}"),
                *(_rate(rate) for rate in speeds),
                *(_rate(rate / s.bandwidth) for rate in speeds),
                limit.shown(point.size),
            )
    return out


def _rate(value: float) -> str:
    return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"
