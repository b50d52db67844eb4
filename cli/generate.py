# SPDX-License-Identifier: Apache-2.0
"""`speq generate`: text from a model by lossless speculative decoding, streamed as it is committed.

The text goes to standard output and nothing else does. On a terminal, the tokens that the draft got
right, those that an alternate got right and the target's own are told apart by colour. Progress and
the figures at the end go to standard error.

The steps come from the golden model, or from the accelerator's RTL in the simulator, which gives
the same ones, with every cycle counted.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from rich.console import Console
from rich.progress import track
from rich.text import Text

from speq.host.driver import Host, check_encoded, check_model
from speq.host.layout import MemoryLayout
from speq.hw.accelerator_config import AcceleratorConfig
from speq.hw.engine_config import EngineConfig
from speq.model.checkpoint import Model, linear_names
from speq.model.encoded_file import EncodedModel, read_encoded
from speq.model.evaluation import encoded_costs
from speq.model.format import EncodedTensor
from speq.model.format import encode as encode_tensor
from speq.model.loaders import load_model
from speq.model.number_format import FormatConfig
from speq.model.speculation import (
    Sampling,
    Settings,
    Statistics,
    Step,
    generate,
    token_limit,
)
from speq.model.tokenizer import Tokenizer
from speq.model.transformer import prepare_draft_linears

if TYPE_CHECKING:
    from speq.sim.simulated_board import SimulatedBoard

STYLES = {"draft": "green", "alternate": "cyan", "target": "bold yellow"}
#: Early exit of models that are not calibrated.
DEFAULT_THRESHOLD = 2.0
#: Columns of the array.
DEFAULT_COLS = 16
_MIN_MAX_K = 256
_INCOMPLETE = "\N{REPLACEMENT CHARACTER}"  # how a tokenizer shows the first bytes of a character


@dataclass(frozen=True)
class Request:
    """The options of the command; `speq generate --help` explains them."""

    model: str
    prompt: str
    speculative: bool
    max_tokens: int
    seed: int
    temperature: float
    top_k: int
    top_p: float
    encoded: Path | None
    rows: int | None
    draft_length: int | None
    threshold: float | None
    choices: int | None
    raw: bool
    group: int | None
    split: int | None
    width: int | None
    head_width: int | None
    rtl: bool = False
    cols: int | None = None


def sampling_of(request: Request) -> Sampling | None:
    """How to sample; None for greedy decoding, temperature 0.

    Raises
    ------
    ValueError
        If a value is impossible, or if top-k or top-p is given for greedy decoding.
    """
    if request.temperature != 0:
        return Sampling(request.temperature, request.top_k, request.top_p)
    if request.top_k != 0 or request.top_p != 1:
        raise ValueError("top-k and top-p need sampling: give a --temperature above 0")
    return None


def formats_of(request: Request) -> tuple[FormatConfig, FormatConfig]:
    """Formats of the blocks and of the head, of a model that is encoded here.

    Raises
    ------
    ValueError
        If a value is impossible, or if one is given beside an encoded file.
    """
    given = {"group": request.group, "split": request.split, "width": request.width}
    given = {name: value for name, value in given.items() if value is not None}
    if request.encoded and (given or request.head_width is not None):
        name = next(iter(given), "head-width")
        raise ValueError(f"--{name} and --encoded exclude each other: the file says the formats")
    config = FormatConfig(**given)
    if request.head_width is None:
        return config, config
    return config, replace(config, width=request.head_width)


def settings_of(request: Request, file: EncodedModel | None) -> Settings:
    """Settings of speculation: an encoded file's, if it has any, but for what the options say.

    Raises
    ------
    ValueError
        If a value is out of range.
    """
    options = {
        "rows": request.rows,
        "draft_length": request.draft_length,
        "threshold": request.threshold,
        "choices": request.choices,
    }
    given = {name: value for name, value in options.items() if value is not None}
    base = Settings(threshold=DEFAULT_THRESHOLD)
    if file and "alternates" in file.settings:
        # An alternate needs a row, a shorter chain does not: other rows, their own longest chain.
        base = file.settings["chain" if given.get("choices") == 1 else "alternates"]
        if given.get("rows", base.rows) != base.rows:
            base = replace(base, rows=given["rows"], draft_length=None)
    return replace(base, **given)


def read_tensors(path: Path, file: EncodedModel, model: Model) -> Mapping[str, EncodedTensor]:
    """The tensors of an encoded file, which must be this model's. Raises ValueError if not."""
    try:
        file.check_source(model)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    return file.tensors


def encode_model(
    model: Model, config: FormatConfig, head_config: FormatConfig
) -> dict[str, EncodedTensor]:
    """All linear layers, the head included, encoded by name, with a progress bar."""
    names = linear_names(model.config)
    console = Console(stderr=True)
    shown = track(
        names, "encoding", console=console, transient=True, disable=not console.is_terminal
    )
    return {
        name: encode_tensor(
            model.linear_weight(name), head_config if name == "head" else config, name=name
        )
        for name in shown
    }


class TextStream:
    """Text of a growing token sequence, piece by piece; holds back incomplete characters."""

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int]) -> None:
        self._tokenizer = tokenizer
        self._ids = list(prompt)
        self._shown = len(tokenizer.decode(self._ids))

    def push(self, token: int) -> str:
        """The text that `token` completes."""
        self._ids.append(token)
        return self._advance(self._tokenizer.decode(self._ids).rstrip(_INCOMPLETE))

    def flush(self) -> str:
        """What was held back."""
        return self._advance(self._tokenizer.decode(self._ids))

    def _advance(self, text: str) -> str:
        new = text[self._shown :]
        self._shown = max(self._shown, len(text))
        return new


def origins(step: Step) -> Iterator[tuple[int, str]]:
    """Each committed token with where it is from: "draft", "alternate" or "target"."""
    for i, token in enumerate(step.tokens):
        if i < step.accepted:
            yield token, "draft"
        else:
            yield token, "alternate" if step.alternate_hit and i == step.accepted else "target"


def summary(
    statistics: Statistics,
    seconds: float,
    costs: tuple[float, float] | None,
    backend: str = "golden model",
) -> list[str]:
    """Lines with the figures of a run; `costs` as `Costs.relative`, None after plain decoding."""
    s = statistics
    speed = f"{s.committed} tokens in {seconds:.1f} s, {s.committed / seconds:.2f} tokens/s"
    if costs is None:
        return [f"{speed} ({backend}, FP16 token by token)"]
    lines = [f"{speed} ({backend})"]
    if s.compared:
        lines.append(
            f"acceptance: {s.match_rate:.1%} of {s.compared} compared draft tokens; "
            f"{s.alternate_hits} alternates; {s.tokens_per_pass:.2f} tokens per verify pass"
        )
    lines.append(
        f"modelled speedup over FP16: {s.speedup(*costs):.2f} ({s.draft_passes} draft passes at "
        f"{costs[0]:.4f}, {s.verify_passes} verify passes at {costs[1]:.4f} of a plain pass)"
    )
    return lines


def system_for(
    model: Model, encoded: Mapping[str, EncodedTensor], rows: int, cols: int, capacity: int
) -> AcceleratorConfig:
    """An accelerator for a model with a KV cache of so many entries.

    Raises
    ------
    ValueError
        If there can be none, or it could not read the encoding.
    """
    first = next(iter(encoded.values()), None)
    # Whatever the width: `check_encoded` says which tensor has another one.
    number_format = replace(first.config, width=4) if first else FormatConfig()
    c = model.config
    max_k = max(c.hidden, c.ffn_hidden, c.heads * c.head_dim, capacity, _MIN_MAX_K)
    engine = EngineConfig(
        rows=rows,
        cols=cols,
        format=number_format,
        # Powers of two, so that one simulation serves prompts of many lengths.
        max_k=1 << (max_k - 1).bit_length(),
    )
    system = AcceleratorConfig(replace(engine, max_o=max(engine.max_o, c.vocab_size)))
    check_encoded(system, encoded)
    return system


@contextmanager
def simulated_board(system: AcceleratorConfig, size: int) -> Iterator[SimulatedBoard]:
    """The accelerator in the simulator, with so many bytes of memory."""
    # Only this backend needs the simulator.
    from speq.hw.verilog import generate_top
    from speq.sim.simulated_board import MemoryOptions, SimulatedBoard

    console = Console(stderr=True)
    note = (
        f"building the simulation of {system.engine.rows} x {system.engine.cols} PEs "
        "(a minute or two, unless it is there from an earlier run)"
    )
    if not console.is_terminal:
        print(f"speq: {note}", file=sys.stderr)
    with console.status(note) if console.is_terminal else nullcontext():
        board = SimulatedBoard(generate_top(system), system, MemoryOptions(size))
    with board:
        yield board


@contextmanager
def rtl_steps(
    request: Request,
    model: Model,
    encoded: Mapping[str, EncodedTensor],
    prompt: Sequence[int],
    settings: Settings,
    figures: list[str],
) -> Iterator[Iterator[Step]]:
    """Steps of the accelerator's RTL; at the end, its cycles are added to `figures`."""
    c = model.config
    check_model(model)
    token_limit(model, prompt, request.max_tokens)
    capacity = min(c.context, len(prompt) + request.max_tokens) + settings.rows
    cols = request.cols or DEFAULT_COLS
    system = system_for(model, encoded, settings.rows, cols, capacity)
    size = MemoryLayout(system, c, encoded, capacity).size
    with simulated_board(system, size) as board:
        host = Host(board, model, encoded, capacity=capacity)
        first, started = board.cycles(), time.perf_counter()
        yield host.generate(
            prompt,
            max_tokens=request.max_tokens,
            settings=settings,
            stop_ids=model.tokenizer.stop_ids,
        )
        simulated, seconds = board.cycles() - first, time.perf_counter() - started
        figures += rtl_figures(host.counters(), simulated, seconds)


def rtl_figures(counters: Mapping[str, int], simulated: int, seconds: float) -> list[str]:
    """Lines with what the accelerator has counted since the prompt was in, per token; and how fast
    the simulation was, which took so many cycles and seconds, the prompt included."""
    tokens = counters["COMMITTED"]
    if not tokens:
        return []

    def per_token(*names: str, suffix: str) -> str:
        return ", ".join(
            f"{name.lower()} {counters[f'{name}_{suffix}'] / tokens:,.0f}" for name in names
        )

    cycles = counters["CYCLES"] - counters["HOST_CYCLES"]
    kinds = per_token("DRAFT", "VERIFY", "BYPASS", "ATTENTION", "ARGMAX", suffix="CYCLES")
    stalls = per_token("WEIGHT", "GROUP", "ACTIVATION", "RESULT", suffix="STALLS")
    busy = f" (the array computes in {counters['COMPUTE_CYCLES'] / cycles:.1%})" if cycles else ""
    return [
        f"cycles per token: {cycles / tokens:,.0f}{busy}, and "
        f"{counters['HOST_CYCLES'] / tokens:,.0f} of waiting for the host",
        f"  by descriptor: {kinds}",
        f"  stalls: {stalls}",
        f"simulation: {simulated:,} cycles in {seconds:.1f} s, {simulated / seconds:,.0f} cycles/s",
    ]


def run(request: Request) -> None:
    """Generate text and print it and its figures.

    Raises
    ------
    ValueError
        If an option is impossible or the model cannot be used.
    """
    sampling = sampling_of(request)
    if request.rtl and sampling is not None:
        raise ValueError("the accelerator decodes greedily: --temperature needs --backend golden")
    if not request.rtl and request.cols is not None:
        raise ValueError("--cols is of the simulated array: give --backend rtl")
    formats = formats_of(request)
    file = read_encoded(request.encoded) if request.encoded else None
    settings = settings_of(request, file)
    model = load_model(request.model)
    text = request.prompt if request.raw else model.tokenizer.chat(request.prompt)
    prompt = model.tokenizer.encode(text)
    encoded: Mapping[str, EncodedTensor] = {}
    if request.speculative:
        encoded = (
            read_tensors(request.encoded, file, model) if file else encode_model(model, *formats)
        )
    costs = encoded_costs(model.config, encoded).relative if encoded else None
    figures: list[str] = []
    if request.rtl:
        source = rtl_steps(request, model, encoded, prompt, settings, figures)
    else:
        source = nullcontext(
            generate(
                model,
                prompt,
                prepare_draft_linears(encoded) if encoded else None,
                max_tokens=request.max_tokens,
                settings=settings,
                sampling=sampling,
                generator=torch.Generator().manual_seed(request.seed),
                stop_ids=model.tokenizer.stop_ids,
            )
        )

    statistics = Statistics()
    stream = TextStream(model.tokenizer, prompt)
    output = Console(soft_wrap=True, highlight=False)
    with source as steps:
        started = time.perf_counter()
        for step in steps:
            statistics.add(step)
            for token, origin in origins(step):
                show(output, stream.push(token), origin if request.speculative else None)
        seconds = time.perf_counter() - started
    show(output, stream.flush(), None)
    print(flush=True)
    backend = "RTL simulation" if request.rtl else "golden model"
    lines = summary(statistics, seconds, costs, backend) + figures
    if sampling is not None:
        lines.append(f"sampled with seed {request.seed}")
    print(*lines, sep="\n", file=sys.stderr)
    if request.speculative and output.is_terminal:
        legend = Console(stderr=True, highlight=False)
        legend.print(*(f"[{style}]{origin}[/]" for origin, style in STYLES.items()), sep=", ")


def show(output: Console, text: str, origin: str | None) -> None:
    """Print a piece of text at once: as it is when piped, on a terminal in its origin's style and
    with escape characters made visible, because a model may write anything."""
    if output.is_terminal:
        safe = text.replace("\x1b", "\N{SYMBOL FOR ESCAPE}")
        output.print(Text(safe, style=STYLES[origin] if origin else ""), end="")
    else:
        print(text, end="", flush=True)
