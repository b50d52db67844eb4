# SPDX-License-Identifier: Apache-2.0
"""`speq demo-decode`: a model decodes on the simulated accelerator, and every logit is compared.

The golden model decodes first. Then the accelerator's RTL decodes a single token plainly behind the
prompt's first one, and the prompt's continuation speculatively. All that a step says must be the
golden model's: its tokens, how many were drafted and with which margins, the tree of drafted,
alternate and guessed tokens that was verified, and the FP32 bits of the logits of all its rows. The
accelerator's own counters, read behind each step, give its cycles, those of the first step with the
prompt's, beside what `speq.model.pass_cycles` predicts.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console, RenderableType
from rich.progress import Progress, TextColumn
from rich.table import Column, Table
from rich.text import Text

from speq.cli.decoding import chosen_settings
from speq.cli.notes import is_quiet, note
from speq.cli.options import MOST_TOKENS, Cols, Continued, Lanes, Rows, complete_model, finite
from speq.cli.progress import bar_columns, elapsed, remaining, with_passing_bar
from speq.cli.simulation import check_array, rtl_figures, simulated_board
from speq.cli.tables import figure_table, show

if TYPE_CHECKING:
    from speq.host.meter import MeasuredPass, Meter
    from speq.host.session import Session
    from speq.model.checkpoint import Model
    from speq.model.pass_cycles import PassCycles
    from speq.model.speculation import Settings, Step
    from speq.sim.simulated_board import SimulatedBoard

STALLS = ("WEIGHT", "GROUP", "ACTIVATION", "RESULT", "VECTOR")
_REPORTED = 4
_LOGIT_BITS = 32


def run(
    model: Annotated[
        str,
        typer.Option(help="A checkpoint's path, or an alias.", autocompletion=complete_model),
    ] = "smollm2",
    prompt: Continued = "The quick brown fox jumps",
    max_tokens: Annotated[
        int, typer.Option(min=1, max=MOST_TOKENS, help="Tokens to generate.")
    ] = 12,
    rows: Rows = 8,
    cols: Cols = 32,
    lanes: Lanes = None,
    encoded: Annotated[
        Path | None, typer.Option(help="The model as speq encode has written it.")
    ] = None,
    draft_length: Annotated[
        int | None, typer.Option(help="Most tokens to draft.", show_default="4, or the file's")
    ] = None,
    threshold: Annotated[
        float | None,
        typer.Option(
            help="Stop drafting below this margin of the best logit.",
            callback=finite,
            show_default="0.5, or the file's",
        ),
    ] = None,
    reranked: Annotated[
        int | None,
        typer.Option(
            help="Best drafted tokens whose logits are computed exactly; 0: none.",
            show_default="0, or the file's",
        ),
    ] = None,
) -> None:
    """Decode with a real LLM on the accelerator's RTL and compare every token and logit bit."""
    started = time.perf_counter()
    usual = {} if encoded else {"draft_length": 4, "threshold": 0.5}
    given = {"draft_length": draft_length, "threshold": threshold, "reranked": reranked}
    given = usual | {name: value for name, value in given.items() if value is not None}
    settings = chosen_settings(None, rows=rows, **given)
    check_array(rows, cols, lanes)
    # These load torch: the options are right by now.
    from speq.host.cycles import PredictedPasses
    from speq.host.meter import passes_of
    from speq.host.session import Session, accelerator_for, kv_capacity
    from speq.model.encoded_file import read_encoded
    from speq.model.encoding import encode_linears, tensors_for
    from speq.model.speculation import token_limit

    file = read_encoded(encoded) if encoded else None
    if file:
        settings = chosen_settings(file, rows=rows, **given)
    loaded = load(model)
    # What is impossible shows before anything takes long.
    ids = loaded.tokenizer.encode(prompt)
    token_limit(loaded, ids, max_tokens)
    if file and encoded:
        tensors = tensors_for(loaded, file, encoded)
    else:
        tensors = encode_linears(loaded, track=with_passing_bar)
    capacity = kv_capacity(loaded, ids, max_tokens, rows)
    config = accelerator_for(loaded, tensors, rows, cols, capacity, lanes)
    note(f"{loaded.name}: the golden model decodes ...")
    runs = golden_runs(Session(loaded, tensors), ids, settings, max_tokens)
    board = simulated_board(loaded, tensors, config, capacity)
    with Session(loaded, tensors, board, capacity=capacity) as session:
        formats = {name: tensor.config for name, tensor in tensors.items()}
        drafted = tensors["head"].drafted_outputs if "head" in tensors else None
        passes = PredictedPasses(config, loaded.config, formats, board.memory.latency, drafted)

        planned = [
            shape
            for run in runs.values()
            for shape in passes_of(run.prompt, run.golden, rows, settings.reranked)
        ]
        total = sum(shape.predicted_cycles(passes) for shape in planned)
        note(f"{len(planned)} passes on the RTL, about {total / 1e6:.1f} M cycles")
        done = decode(session, board, runs, total)

    comparison = done.comparison
    show(
        f"{loaded.name} on {rows} x {cols} PEs, generated Verilog on Verilator",
        pass_table(done.meters.values(), passes),
    )
    compared = f"{comparison.bits:,} logit bits compared, {comparison.wrong_bits} differ"
    if comparison.problems:
        show(*(Text(line, "red") for line in (*comparison.problems, f"{compared}.")))
        raise typer.Exit(1)
    steps = runs["speculative"].golden
    text = runs["speculative"].prompt + [token for step in steps for token in step.tokens]
    show(
        *figures(done, steps),
        f"text: {loaded.tokenizer.decode(text)!r}",
        f"everything: {time.perf_counter() - started:.0f} s",
        Text(f"All tokens equal the golden model's; {compared}.", "green"),
    )


def load(name: str) -> Model:
    """The model. Raises CheckpointError, with what may run instead, if there is none."""
    from speq.model.checkpoint import CheckpointError
    from speq.model.loaders import load_model

    try:
        return load_model(name)
    except CheckpointError as error:
        if name == "tiny":
            raise
        message = f"{error} (--model tiny decodes the model that comes with the project)"
        raise CheckpointError(message) from error


@dataclass(frozen=True)
class GoldenRun:
    """What both decode, and the golden model's steps."""

    prompt: list[int]
    settings: Settings
    max_tokens: int
    golden: list[Step]


def golden_runs(
    session: Session, prompt: list[int], settings: Settings, max_tokens: int
) -> dict[str, GoldenRun]:
    """The runs by name, as the golden model decodes them. Raises NonFiniteError where it cannot go
    on, behind the text so far."""
    from speq.model.transformer import NonFiniteError

    runs = {}
    for name, ids, chosen, count in (
        ("plain", prompt[:1], replace(settings, draft_length=0), 1),
        ("speculative", prompt, settings, max_tokens),
    ):
        steps: list[Step] = []
        try:
            for step in session.golden(ids, max_tokens=count, settings=chosen):
                steps.append(step)
        except NonFiniteError:
            text = ids + [token for step in steps for token in step.tokens]
            show(f"text: {session.model.tokenizer.decode(text)!r}")
            raise
        runs[name] = GoldenRun(ids, chosen, count, steps)
    return runs


class Comparison:
    """What the accelerator decodes against the golden model's steps.

    Attributes
    ----------
    bits, wrong_bits : int
        Logit bits compared, and those that differ.
    problems : list of str
        The first differences of the first step that differs; the comparison ends with it.
    """

    def __init__(self) -> None:
        self.bits = self.wrong_bits = 0
        self.problems: list[str] = []

    def compare(self, name: str, expected: Sequence[Step], got: Iterable[Step]) -> None:
        """Compare steps as they come, up to the first that differs."""
        number = 0
        for number, step in enumerate(got, start=1):
            where = f"{name} step {number}"
            if number > len(expected):
                self.problems.append(f"{where}: {step.tokens}; expected none")
            else:
                self._compare_step(where, expected[number - 1], step)
            if self.problems:
                return
        if number < len(expected):
            self.problems.append(f"{name}: {number} steps; expected {len(expected)}")

    def _compare_step(self, where: str, expected: Step, got: Step) -> None:
        import numpy as np

        from speq.sim.compare import mismatched_bits

        if replace(got, logits=expected.logits, verified=expected.verified) != expected:
            self.problems.append(
                f"{where}: {got}, {got.proposal}; expected {expected}, {expected.proposal}"
            )
        if got.verified.shape != expected.verified.shape:
            return
        a, b = (step.verified.numpy().view(np.uint32) for step in (expected, got))
        self.bits += _LOGIT_BITS * a.size
        self.wrong_bits += mismatched_bits(a, b)
        for row, column in np.argwhere(a != b)[:_REPORTED]:
            self.problems.append(
                f"{where}, row {row}, column {column}: expected {a[row, column]:#010x}, "
                f"got {b[row, column]:#010x}"
            )


class CycleProgress(Progress):
    """A bar that follows the simulated cycles by itself."""

    def __init__(self, cycles: Callable[[], int], total: int) -> None:
        console = Console(stderr=True)
        share = TextColumn("{task.percentage:>3.0f}%", table_column=Column(no_wrap=True))
        super().__init__(
            *bar_columns(console, share, elapsed(), TextColumn("left"), remaining()),
            console=console,
            speed_estimate_period=120,
            disable=is_quiet() or not console.is_terminal,
        )
        self._cycles = cycles
        self.add_task("simulating", total=total)

    def get_renderables(self) -> Iterable[RenderableType]:
        """The bar as it stands; called several times a second."""
        for task in self.task_ids:
            self.update(task, completed=self._cycles())
        return super().get_renderables()


def pass_table(meters: Iterable[Meter], predicted: PassCycles) -> Table:
    """Cycles of each kind of step, predicted and counted, and what the array did in them."""
    groups: dict[str, list[MeasuredPass]] = {}
    for meter in meters:
        for measured in meter.passes:
            groups.setdefault(measured.shape.name, []).append(measured)
    stalls = (f"{cause.lower()}\nstalls" for cause in STALLS)
    headings = ("cycles\neach", "predicted", "differs", "array\nbusy", *stalls)
    table = figure_table("", "steps", *headings)
    for name, passes in groups.items():
        cycles = sum(measured.cycles for measured in passes)
        expected = sum(measured.shape.predicted_cycles(predicted) for measured in passes)
        parts = ("COMPUTE_CYCLES", *(f"{cause}_STALLS" for cause in STALLS))
        computing, *stalled = (sum(p.counters[part] for p in passes) for part in parts)
        n = len(passes)
        table.add_row(
            *(f"{n} {name.removesuffix(' step')}", f"{cycles / n:,.0f}", f"{expected / n:,.0f}"),
            *(f"{cycles / expected - 1:+.2%}", f"{computing / cycles:.1%}"),
            *(f"{stall / n:,.0f}" for stall in stalled),
        )
    return table


@dataclass
class SimulatedRuns:
    """What the simulation of the runs has shown.

    Attributes
    ----------
    comparison : Comparison
    meters : dict
        Of each run.
    counters : dict
        At the end of the last run.
    cycles, seconds : int, float
        Of all runs.
    """

    comparison: Comparison = field(default_factory=Comparison)
    meters: dict[str, Meter] = field(default_factory=dict)
    counters: dict[str, int] = field(default_factory=dict)
    cycles: int = 0
    seconds: float = 0.0


def decode(
    session: Session,
    board: SimulatedBoard,
    runs: Mapping[str, GoldenRun],
    total: int,
) -> SimulatedRuns:
    """Decode all runs on the session's board, about `total` cycles, and compare, up to the first
    step that differs."""
    from speq.host.meter import Meter

    done = SimulatedRuns()
    first, started = board.cycles(), time.perf_counter()

    def finished(measured: MeasuredPass) -> None:
        passed, shape = timedelta(seconds=round(time.perf_counter() - started)), measured.shape
        note(
            f"{passed}  {shape.name} at position {shape.position}, {len(shape.drafts)} drafted, "
            f"{shape.rows} rows verified: {measured.cycles:,} cycles"
        )

    with CycleProgress(lambda: board.cycles() - first, total):
        for name, run in runs.items():
            done.meters[name] = Meter(session.driver, finished)
            steps = session.generate(run.prompt, max_tokens=run.max_tokens, settings=run.settings)
            done.comparison.compare(name, run.golden, steps)
            if done.comparison.problems:
                steps.close()
                break
            done.counters = session.driver.counters()
    done.cycles, done.seconds = board.cycles() - first, time.perf_counter() - started
    return done


def figures(done: SimulatedRuns, steps: Iterable[Step]) -> list[str]:
    """Lines with what the runs took; `steps` are those of the speculative one."""
    from speq.model.speculation import Statistics

    statistics = Statistics()
    for step in steps:
        statistics.add(step)
    *per_token, speed = rtl_figures(done.counters, done.cycles, done.seconds)
    [measured] = done.meters["plain"].passes
    compared = f"plain: {measured.cycles:,} cycles per token"
    if later := [each for each in done.meters["speculative"].passes if not each.shape.prompt]:
        tokens = sum(each.counters["COMMITTED"] for each in later)
        average = sum(each.cycles for each in later) / tokens
        compared += f", {measured.cycles / average:.2f} times the {average:,.0f} of these steps"
        compared += " behind the first" if len(later) < statistics.verify_passes else ""
    return [
        f"{statistics.committed} tokens in {statistics.verify_passes} steps; of "
        f"{statistics.draft_passes} drafted ones {statistics.accepted} accepted, and "
        f"{statistics.alternate_hits} alternates; {statistics.guess_hits} of "
        f"{statistics.guesses} guessed ones, {statistics.free_steps} steps without a draft pass",
        *per_token,
        compared,
        speed,
    ]
