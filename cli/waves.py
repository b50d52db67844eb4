# SPDX-License-Identifier: Apache-2.0
"""`speq waves`: the accelerator's signals while it decodes, recorded for GTKWave.

The RTL runs in the simulator as with `speq generate --backend rtl`. A window of its cycles is
recorded as FST, and beside it goes the GTKWave save file of `speq.sim.gtkwave`.

A window may begin at an event. A first run then finds its cycle: the simulation stands still while
the host works, so that a second run meets the same events in the same cycles. Of passes the host is
not told; the accelerator's registers are looked at for them.
"""

from __future__ import annotations

from collections.abc import Callable
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from speq.cli.options import (
    DEFAULT_THRESHOLD,
    Cols,
    Continued,
    DraftLength,
    Force,
    Lanes,
    MaxTokens,
    ModelName,
    Rows,
    check_model,
    refuse_unused,
)
from speq.cli.progress import status, with_passing_bar
from speq.cli.simulation import check_array

if TYPE_CHECKING:
    from speq.sim.simulated_board import Waves
    from speq.sim.watched_board import WatchedBoard

#: Cycles of the window before the event is reported, by the interrupt that tells the host of it or
#: the registers: a pass is under way for about half of them.
BEFORE = 100

_STEM = "speq"
#: How a recording begins: with its writer at byte 74 (speq.sim.fst).
_RECORDING = rb"(?s)\0.{73}SPEQ\0"
_NEVER = 1 << 62


class Event(StrEnum):
    """Where a window can begin."""

    PROMPT = "prompt"
    DRAFT = "draft"
    VERIFY = "verify"
    STEP = "step"


def run(
    model: ModelName = "tiny",
    output: Annotated[
        Path, typer.Option("-o", "--output", help="Folder for the recording and the layout.")
    ] = Path("build/waves"),
    prompt: Continued = "Once upon a time",
    rows: Rows = 4,
    cols: Cols = 8,
    lanes: Lanes = None,
    draft_length: DraftLength = None,
    max_tokens: MaxTokens = 8,
    start: Annotated[
        int | None,
        typer.Option(min=0, max=1 << 40, help="First cycle of the window.", show_default="--at"),
    ] = None,
    at: Annotated[
        Event | None,
        typer.Option(help="The window begins where such a pass, or a step's end, is reported."),
    ] = None,
    nth: Annotated[
        int | None,
        typer.Option(min=1, max=1 << 24, help="With --at: which of them.", show_default="1"),
    ] = None,
    cycles: Annotated[int, typer.Option(min=1, max=1 << 32, help="Cycles of the window.")] = 5000,
    array: Annotated[
        bool, typer.Option("--array", help="Also record the array's inside: much larger.")
    ] = False,
    force: Force = False,
) -> None:
    """Record waves of the accelerator decoding, as FST, with a GTKWave layout of the signals that
    tell what it is doing."""
    from speq.hw.common.files import staged
    from speq.model.settings import Settings

    if start is not None and at is not None:
        raise ValueError("--start and --at exclude each other: both say where the window begins")
    if start is not None:
        refuse_unused("with --start", nth=nth)
    nth = 1 if nth is None else nth
    settings = Settings(rows, draft_length, DEFAULT_THRESHOLD)
    check_array(rows, cols, lanes)
    from speq.sim.gtkwave import layout_marks, write_layout

    recording, save = output / f"{_STEM}.fst", output / f"{_STEM}.gtkw"
    marks = {recording.name: _RECORDING, **layout_marks(_STEM)}
    with staged(output, marks, force=force) as folder:
        check_model(model)
        # These load torch: options and output are right by now.
        from speq.host.session import Session, accelerator_for, kv_capacity
        from speq.model.encoding import encode_linears
        from speq.model.loaders import load_model
        from speq.model.speculation import token_limit
        from speq.sim.session import board_for
        from speq.sim.simulated_board import Waves
        from speq.sim.watched_board import RunEnded, WatchedBoard

        loaded = load_model(model)
        tokenizer = loaded.tokenizer
        ids = tokenizer.encode(prompt)
        token_limit(loaded, ids, max_tokens)
        encoded = encode_linears(loaded, track=with_passing_bar)
        capacity = kv_capacity(loaded, ids, max_tokens, rows)
        config = accelerator_for(loaded, encoded, rows, cols, capacity, lanes)
        options = {"max_tokens": max_tokens, "settings": settings, "stop_ids": tokenizer.stop_ids}

        def simulate(waves: Waves, enough: Callable[[WatchedBoard], bool]) -> WatchedBoard:
            """Decode until there is `enough`, or to the end."""
            board = board_for(loaded, encoded, config, capacity=capacity, waves=waves)
            watched = WatchedBoard(board, config, enough)
            try:
                with Session(loaded, encoded, watched, capacity=capacity) as session:
                    for _ in session.generate(ids, **options):
                        pass
            except RunEnded:
                pass
            return watched

        def find(event: str) -> int:
            """The cycle of the event that the window begins at."""
            # The same build as for the recording.
            never = Waves(recorded, _NEVER, _NEVER + 1, array)
            found = simulate(never, lambda watched: len(watched.events[event]) >= nth).events[event]
            if len(found) < nth:
                raise ValueError(
                    f"--nth is {nth}, but the run has {len(found)} of {event}: generate more with "
                    "--max-tokens"
                )
            return found[nth - 1]

        recorded = folder / recording.name
        with status() as show:
            show("building the simulation")
            marker = None
            if start is None:
                reported = find(at or Event.DRAFT)
                start = max(0, reported - BEFORE)
                marker = reported - start
            show("recording")
            waves = Waves(recorded, start, start + cycles, array)
            end = simulate(waves, lambda watched: watched.cycles() >= waves.stop).cycles()
        if end <= start:
            raise ValueError(
                f"the run ends at cycle {end}, before the window at {start}: generate more with "
                "--max-tokens, or begin earlier"
            )
        write_layout(save, recording, config, marker, folder=folder)
    size = recording.stat().st_size / 1e6
    print(f"{recording}: cycles {start:,} to {min(waves.stop, end) - 1:,}, {size:.1f} MB")
    print(f"{save}: show it with gtkwave {save}")
