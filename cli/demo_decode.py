# SPDX-License-Identifier: Apache-2.0
"""`speq demo-decode`: a model decodes on the simulated accelerator, and every logit is compared.

The golden model decodes first. Then the accelerator's RTL decodes a single token plainly behind the
prompt's first one, and the prompt's continuation speculatively. All that a step says must be the
golden model's: its tokens, how many were drafted and with which margins, and the FP32 bits of the
logits that chose each token. The accelerator's own counters, read where a pass begins, give the
cycles of each kind of pass, beside what `speq.model.cycles` predicts.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import timedelta
from typing import TYPE_CHECKING

import numpy as np
import typer
from rich.console import Console, RenderableType
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from speq.cli.generate import encode_model, rtl_figures, simulated_board, system_for
from speq.host.driver import Host, Pass
from speq.host.layout import MemoryLayout
from speq.hw.accelerator_config import AcceleratorConfig, PassKind
from speq.hw.control.descriptor import DescriptorKind
from speq.model.checkpoint import CheckpointError, Model, ModelConfig
from speq.model.cycles import (
    Engine,
    Formats,
    Job,
    draft_pass,
    linear_shapes,
    stage_cycles,
    verify_pass,
)
from speq.model.format import EncodedTensor
from speq.model.loaders import load_model
from speq.model.number_format import FormatConfig
from speq.model.speculation import Settings, Statistics, Step, generate
from speq.model.transformer import prepare_draft_linears
from speq.sim.compare import mismatched_bits

if TYPE_CHECKING:
    from speq.sim.simulated_board import SimulatedBoard

STALLS = ("WEIGHT", "GROUP", "ACTIVATION", "RESULT")
_REPORTED = 4
_LOGIT_BITS = 32


@dataclass(frozen=True)
class Request:
    """The options of the command; `speq demo-decode --help` explains them."""

    model: str
    prompt: str
    max_tokens: int
    rows: int
    cols: int
    draft_length: int
    threshold: float


@dataclass(frozen=True)
class Walk:
    """A pass's kind and what its cycles depend on."""

    kind: PassKind
    rows: int
    position: int

    @property
    def name(self) -> str:
        """For users; a verify pass of one row is plain decoding."""
        if self.kind is PassKind.SINGLE:
            return "prefill"
        is_plain = self.kind is PassKind.VERIFY and self.rows == 1
        return "plain" if is_plain else self.kind.name.lower()


class Meter:
    """The counters of each pass, without the host's time.

    A pass lasts from its first HOST descriptor to that of its successor, or to `stop`.

    Parameters
    ----------
    host : Host
        Tells this about its passes.
    finished : callable, optional
        Called with each pass that has ended and its cycles.

    Attributes
    ----------
    passes : list of (Walk, counters)
    """

    def __init__(self, host: Host, finished: Callable[[Walk, int], None] | None = None) -> None:
        self.passes: list[tuple[Walk, dict[str, int]]] = []
        self._host, self._finished = host, finished
        self._current: tuple[Walk, dict[str, int]] | None = None
        # Nothing comes after the last one of a single pass; then the counters may start anew.
        program = host.layout.program(PassKind.SINGLE)
        self._last = sum(descriptor.kind is DescriptorKind.HOST for descriptor in program) - 1
        host.observer = self._observe

    def _observe(self, current: Pass, index: int) -> None:
        if index == 0:
            self.stop()
            walk = Walk(current.kind, len(current.tokens), current.start)
            self._current = walk, self._host.counters()
        elif current.kind is PassKind.SINGLE and index == self._last:
            self.stop()

    def stop(self) -> None:
        """The pass under way, if there is one, has ended."""
        if self._current is None:
            return
        (walk, before), self._current = self._current, None
        counted = {name: n - before[name] for name, n in self._host.counters().items()}
        self.passes.append((walk, counted))
        if self._finished:
            self._finished(walk, busy_cycles(counted))


def busy_cycles(counters: Mapping[str, int]) -> int:
    """Cycles in which the accelerator did not wait for the host."""
    return counters["CYCLES"] - counters["HOST_CYCLES"]


class Predictor:
    """Cycles of passes from the analytic model.

    Parameters
    ----------
    config : ModelConfig
    engine : Engine
    formats : dict
        Formats of encoded layers by name.
    """

    def __init__(self, config: ModelConfig, engine: Engine, formats: Formats) -> None:
        self._config, self._engine, self._formats = config, engine, formats

    def cycles(self, walk: Walk) -> int:
        """Cycles of a pass, without the host's."""
        c, engine, formats = self._config, self._engine, self._formats
        if walk.kind is PassKind.DRAFT:
            return draft_pass(c, engine, formats, walk.position).cycles
        if walk.kind is PassKind.VERIFY:
            return verify_pass(c, engine, formats, walk.rows, walk.position).cycles
        # It ends with the last block's keys and values.
        blocks = replace(c, blocks=c.blocks - 1)
        cycles = verify_pass(blocks, engine, formats, walk.rows, walk.position).cycles
        last = [f"block.{c.blocks - 1}.{name}" for name in ("q_proj", "k_proj", "v_proj")]
        return cycles - self._stage(["head"], walk.rows) + self._stage(last, walk.rows)

    def _stage(self, names: Iterable[str], rows: int) -> int:
        shapes = linear_shapes(self._config)
        jobs = []
        for name in names:
            o, k = shapes[name]
            jobs.append(Job(k, o, rows, planes=2 if name in self._formats else 1))
        return stage_cycles(jobs, self._engine)


def walks(prompt: Sequence[int], steps: Iterable[Step], rows: int) -> Iterator[Walk]:
    """The passes that fill the KV cache with a prompt and make these steps."""
    position = len(prompt) - 1
    for start in range(0, position, rows):
        yield Walk(PassKind.SINGLE, min(rows, position - start), start)
    for step in steps:
        for i in range(step.drafted):
            yield Walk(PassKind.DRAFT, 1, position + i)
        yield Walk(PassKind.VERIFY, 1 + step.drafted + step.alternates, position)
        position += len(step.tokens)


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
        if replace(got, logits=expected.logits) != expected:
            self.problems.append(f"{where}: {got}; expected {expected}")
        if got.logits.shape != expected.logits.shape:
            return
        a, b = (step.logits.numpy().view(np.uint32) for step in (expected, got))
        self.bits += _LOGIT_BITS * a.size
        self.wrong_bits += mismatched_bits(a, b)
        for row, column in np.argwhere(a != b)[:_REPORTED]:
            self.problems.append(
                f"{where}, row {row}, column {column}: expected {a[row, column]:#010x}, "
                f"got {b[row, column]:#010x}"
            )


class CycleProgress(Progress):
    """A bar that follows the simulated cycles by itself."""

    def __init__(self, cycles: Callable[[], int], total: int, console: Console) -> None:
        super().__init__(
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.completed:,.0f} of about {task.total:,.0f} cycles"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=console,
            speed_estimate_period=120,
        )
        self._cycles = cycles
        self.add_task("simulating", total=total)

    def get_renderables(self) -> Iterable[RenderableType]:
        """The bar as it stands; called several times a second."""
        for task in self.task_ids:
            self.update(task, completed=self._cycles())
        return super().get_renderables()


def pass_table(meters: Iterable[Meter], predictor: Predictor, title: str) -> Table:
    """Cycles of each kind of pass, predicted and counted, and what the array did in them."""
    groups: dict[str, list[tuple[Walk, dict[str, int]]]] = {}
    for meter in meters:
        for walk, counted in meter.passes:
            groups.setdefault(walk.name, []).append((walk, counted))
    table = Table(title=title, title_justify="left")
    stalls = (f"{cause.lower()} stalls" for cause in STALLS)
    headings = ("pass", "passes", "cycles each", "predicted", "differs", "array busy", *stalls)
    for heading in headings:
        table.add_column(heading, justify="left" if heading == "pass" else "right")
    for name, passes in groups.items():
        cycles = sum(busy_cycles(counted) for _, counted in passes)
        predicted = sum(predictor.cycles(walk) for walk, _ in passes)
        parts = ("COMPUTE_CYCLES", *(f"{cause}_STALLS" for cause in STALLS))
        computing, *stalled = (sum(counted[part] for _, counted in passes) for part in parts)
        n = len(passes)
        table.add_row(
            *(name, str(n), f"{cycles / n:,.0f}", f"{predicted / n:,.0f}"),
            *(f"{cycles / predicted - 1:+.2%}", f"{computing / cycles:.1%}"),
            *(f"{stall / n:,.0f}" for stall in stalled),
        )
    return table


def load(name: str) -> Model:
    """The model. Raises CheckpointError, with what may run instead, if there is none."""
    try:
        return load_model(name)
    except CheckpointError as error:
        if name == "tiny":
            raise
        message = f"{error} (--model tiny decodes the model that comes with the project)"
        raise CheckpointError(message) from error


@dataclass(frozen=True)
class Run:
    """What both decode, and the golden model's steps."""

    prompt: list[int]
    settings: Settings
    max_tokens: int
    golden: list[Step]


def golden_runs(
    request: Request, model: Model, encoded: Mapping[str, EncodedTensor]
) -> dict[str, Run]:
    """The runs by name, as the golden model decodes them."""
    settings = Settings(request.rows, request.draft_length, request.threshold)
    prompt = model.tokenizer.encode(request.prompt)
    layers = prepare_draft_linears(encoded)
    runs = {}
    for name, ids, chosen, count in (
        ("plain", prompt[:1], replace(settings, draft_length=0), 1),
        ("speculative", prompt, settings, request.max_tokens),
    ):
        steps = list(generate(model, ids, layers, max_tokens=count, settings=chosen))
        runs[name] = Run(ids, chosen, count, steps)
    return runs


@dataclass
class Outcome:
    """What the simulation has done.

    Attributes
    ----------
    comparison : Comparison
    meters : dict
        Of each run.
    counters : dict
        At the end of the last run.
    cycles, seconds : int, float
        Of all runs, the host's time and the prompt included.
    """

    comparison: Comparison = field(default_factory=Comparison)
    meters: dict[str, Meter] = field(default_factory=dict)
    counters: dict[str, int] = field(default_factory=dict)
    cycles: int = 0
    seconds: float = 0.0


def decode(
    board: SimulatedBoard, host: Host, runs: Mapping[str, Run], total: int, console: Console
) -> Outcome:
    """Decode all runs, about `total` cycles, and compare, up to the first step that differs."""
    outcome = Outcome()
    first, started = board.cycles(), time.perf_counter()

    def finished(walk: Walk, cycles: int) -> None:
        passed = timedelta(seconds=round(time.perf_counter() - started))
        console.print(
            f"{passed}  {walk.name} pass, rows {walk.rows}, position {walk.position}: "
            f"{cycles:,} cycles"
        )

    with CycleProgress(lambda: board.cycles() - first, total, console):
        for name, run in runs.items():
            meter = outcome.meters[name] = Meter(host, finished)
            steps = host.generate(run.prompt, max_tokens=run.max_tokens, settings=run.settings)
            outcome.comparison.compare(name, run.golden, steps)
            if outcome.comparison.problems:
                steps.close()
                break
            meter.stop()
            outcome.counters = host.counters()
    outcome.cycles, outcome.seconds = board.cycles() - first, time.perf_counter() - started
    return outcome


def figures(outcome: Outcome, steps: Iterable[Step]) -> list[str]:
    """Lines with what the runs took; `steps` are those of the speculative one."""
    statistics = Statistics()
    for step in steps:
        statistics.add(step)
    *per_token, speed = rtl_figures(outcome.counters, outcome.cycles, outcome.seconds)
    [(_, counted)] = outcome.meters["plain"].passes
    plain = busy_cycles(counted)
    ratio = plain * statistics.committed / busy_cycles(outcome.counters)
    return [
        f"{statistics.committed} tokens in {statistics.verify_passes} steps; of "
        f"{statistics.draft_passes} drafted ones {statistics.accepted} accepted, and "
        f"{statistics.alternate_hits} alternates",
        *per_token,
        f"plain: {plain:,} cycles per token, {ratio:.2f} times as many",
        speed,
    ]


def run(request: Request) -> None:
    """Run the demo.

    Raises
    ------
    ValueError
        If an argument is impossible or the model cannot be used.
    SimulationError
        If the simulation cannot be built or run.
    typer.Exit
        With code 1 if a step differs.
    """
    started = time.perf_counter()
    console = Console()
    console = Console(width=max(console.width, 120), highlight=False)
    model = load(request.model)
    encoded = encode_model(model, FormatConfig(), FormatConfig())
    # What is impossible shows before anything takes long.
    capacity = len(model.tokenizer.encode(request.prompt)) + request.max_tokens + request.rows
    system = system_for(model, encoded, request.rows, request.cols, capacity)
    console.print(f"{model.name}: the golden model decodes ...")
    runs = golden_runs(request, model, encoded)
    size = MemoryLayout(system, model.config, encoded, capacity).size
    with simulated_board(system, size) as board:
        formats = {name: tensor.config for name, tensor in encoded.items()}
        engine = cycles_engine(system, board.memory.latency)
        predictor = Predictor(model.config, engine, formats)
        planned = [w for r in runs.values() for w in walks(r.prompt, r.golden, request.rows)]
        total = sum(map(predictor.cycles, planned))
        console.print(f"{len(planned)} passes on the RTL, about {total / 1e6:.1f} M cycles")
        host = Host(board, model, encoded, capacity=capacity)
        outcome = decode(board, host, runs, total, console)

    comparison = outcome.comparison
    title = f"{model.name} on {request.rows} x {request.cols} PEs, generated Verilog on Verilator"
    console.print(pass_table(outcome.meters.values(), predictor, title))
    compared = f"{comparison.bits:,} logit bits compared, {comparison.wrong_bits} differ"
    if comparison.problems:
        for line in (*comparison.problems, f"{compared}."):
            console.print(line, style="red", markup=False)
        raise typer.Exit(1)
    steps = runs["speculative"].golden
    for line in figures(outcome, steps):
        console.print(line, markup=False)
    text = runs["speculative"].prompt + [token for step in steps for token in step.tokens]
    console.print(f"text: {model.tokenizer.decode(text)!r}", markup=False)
    console.print(f"everything: {time.perf_counter() - started:.0f} s")
    console.print(f"[green]All tokens equal the golden model's; {compared}.[/]")


def cycles_engine(system: AcceleratorConfig, latency: int) -> Engine:
    """What the cycles of an accelerator depend on, with memory of this latency."""
    rows, cols = system.engine.rows, system.engine.cols
    beats = _LOGIT_BITS * cols // system.data.data_bits
    return Engine(rows=rows, cols=cols, latency=latency, result_beats=beats)
