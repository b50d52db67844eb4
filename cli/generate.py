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
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.text import Text

from speq.cli.options import (
    DEFAULT_THRESHOLD,
    DraftLength,
    GroupOfEncode,
    HeadWidth,
    MaxTokens,
    ModelName,
    Seed,
    SplitOfEncode,
    WidthOfEncode,
    chosen_formats,
    finite,
    refuse_unused,
)
from speq.cli.progress import with_passing_bar
from speq.cli.simulation import check_array, rtl_figures, simulated_board

if TYPE_CHECKING:
    from speq.model.checkpoint import Model
    from speq.model.encoded_file import EncodedModel
    from speq.model.format import EncodedTensor
    from speq.model.speculation import Sampling, Settings, Statistics, Step
    from speq.sim.simulated_board import SimulatedBoard

STYLES = {"draft": "green", "alternate": "cyan", "target": "bold yellow"}
#: Columns of the simulated array.
DEFAULT_COLS = 16


class Decoding(StrEnum):
    """How to decode."""

    SPEQ = "speq"
    FP16 = "fp16"


class Backend(StrEnum):
    """What to decode with."""

    GOLDEN = "golden"
    RTL = "rtl"


def run(
    model: ModelName,
    prompt: Annotated[str, typer.Option(help="What to answer, or with --raw to continue.")],
    mode: Annotated[
        Decoding, typer.Option(help="Speculative decoding, or FP16 token by token.")
    ] = Decoding.SPEQ,
    max_tokens: MaxTokens = 128,
    seed: Seed = 0,
    temperature: Annotated[
        float, typer.Option(help="0 always takes the likeliest token.", callback=finite)
    ] = 0.0,
    top_k: Annotated[int, typer.Option(help="Sample from the k likeliest; 0: all.")] = 0,
    top_p: Annotated[float, typer.Option(help="Sample from the likeliest of this sum.")] = 1.0,
    encoded: Annotated[
        Path | None, typer.Option(help="The model as speq encode has written it.")
    ] = None,
    rows: Annotated[
        int | None,
        typer.Option(help="Rows of the array: tokens in a verify pass.", show_default="8"),
    ] = None,
    draft_length: DraftLength = None,
    threshold: Annotated[
        float | None,
        typer.Option(
            help="Stop drafting below this margin of the best logit.",
            callback=finite,
            show_default=f"{DEFAULT_THRESHOLD:g}",
        ),
    ] = None,
    choices: Annotated[
        int | None,
        typer.Option(help="Candidates per position for spare rows; 1: none.", show_default="4"),
    ] = None,
    raw: Annotated[
        bool, typer.Option("--raw", help="Continue the prompt: no chat format.")
    ] = False,
    group: GroupOfEncode = None,
    split: SplitOfEncode = None,
    width: WidthOfEncode = None,
    head_width: HeadWidth = None,
    backend: Annotated[
        Backend, typer.Option(help="The golden model, or the accelerator's RTL, simulated.")
    ] = Backend.GOLDEN,
    cols: Annotated[
        int | None,
        typer.Option(help="With rtl: columns of the array.", show_default=str(DEFAULT_COLS)),
    ] = None,
) -> None:
    """Generate text losslessly with the draft model inside the weights, and report the speedup."""
    from speq.model.settings import Settings

    speculative, rtl = mode is Decoding.SPEQ, backend is Backend.RTL
    sampling = chosen_sampling(temperature, top_k, top_p)
    if rtl and sampling is not None:
        raise ValueError("the accelerator decodes greedily: --temperature needs --backend golden")
    if not rtl and cols is not None:
        raise ValueError("--cols is of the simulated array: give --backend rtl")
    given = {
        "rows": rows,
        "draft_length": draft_length,
        "threshold": threshold,
        "choices": choices,
    }
    if not speculative:
        refuse_unused(
            "with --mode fp16",
            encoded=encoded,
            draft_length=draft_length,
            threshold=threshold,
            choices=choices,
            group=group,
            split=split,
            width=width,
            head_width=head_width,
        )
        if not rtl:
            refuse_unused("with --mode fp16 in the golden model", rows=rows)
    formats = chosen_formats(group, split, width, head_width, encoded)
    if encoded is None:
        chosen_settings(None, **given)
    if rtl:
        check_array(
            Settings().rows if rows is None else rows, DEFAULT_COLS if cols is None else cols
        )
    # These load torch: the options are right by now, as far as they can be known to be.
    import torch

    from speq.host.session import Session
    from speq.model.encoded_file import read_encoded
    from speq.model.encoding import encode_linears, tensors_for
    from speq.model.evaluation import encoded_costs
    from speq.model.loaders import load_model
    from speq.model.speculation import Statistics
    from speq.model.tokenizer import TextStream
    from speq.model.transformer import NonFiniteError

    file = read_encoded(encoded) if encoded else None
    settings = chosen_settings(file, **given)
    loaded = load_model(model)
    tokenizer = loaded.tokenizer
    ids = tokenizer.encode(prompt) if raw else tokenizer.encode_chat(prompt)
    tensors: Mapping[str, EncodedTensor] = {}
    if speculative and file and encoded:
        tensors = tensors_for(loaded, file, encoded)
    elif speculative:
        tensors = encode_linears(loaded, *formats, track=with_passing_bar)
    costs = encoded_costs(loaded.config, tensors).relative if tensors else None

    statistics = Statistics()
    stream = TextStream(tokenizer, ids)
    output = Console(soft_wrap=True, highlight=False)
    options = {"max_tokens": max_tokens, "settings": settings, "stop_ids": tokenizer.stop_ids}
    board, capacity = None, None
    if rtl:
        board, capacity = rtl_board(
            loaded, tensors, ids, max_tokens, settings.rows, DEFAULT_COLS if cols is None else cols
        )
    with Session(loaded, tensors, board, capacity=capacity) as session:
        if sampling is None:
            steps = session.generate(ids, **options)
        else:
            generator = torch.Generator().manual_seed(seed)
            steps = session.golden(ids, **options, sampling=sampling, generator=generator)
        first = board.cycles() if board else 0
        started = time.perf_counter()
        ended: NonFiniteError | None = None
        try:
            for step in steps:
                statistics.add(step)
                for token, origin in origins(step):
                    show(output, stream.push(token), origin if speculative else None)
        except NonFiniteError as error:
            if not statistics.committed:
                raise
            ended = error  # behind what was committed before
        seconds = time.perf_counter() - started
        lines = summary(statistics, seconds, costs, "RTL simulation" if rtl else "golden model")
        if board:
            cycles = board.cycles() - first
            lines += rtl_figures(session.driver.counters(), cycles, seconds)
    show(output, stream.flush(), None)
    print(flush=True)
    if sampling is not None:
        lines.append(f"sampled with seed {seed}")
    print(*lines, sep="\n", file=sys.stderr)
    if ended is not None:
        raise ended
    if speculative and output.is_terminal:
        legend = Console(stderr=True, highlight=False)
        legend.print(*(f"[{style}]{origin}[/]" for origin, style in STYLES.items()), sep=", ")


def chosen_sampling(temperature: float, top_k: int, top_p: float) -> Sampling | None:
    """How to sample; None for greedy decoding, temperature 0.

    Raises
    ------
    ValueError
        If a value is impossible, or if top-k or top-p is given for greedy decoding.
    """
    from speq.model.settings import Sampling

    if temperature != 0:
        return Sampling(temperature, top_k, top_p)
    if top_k != 0 or top_p != 1:
        raise ValueError("top-k and top-p need sampling: give a --temperature above 0")
    return None


def chosen_settings(file: EncodedModel | None, **options: float | None) -> Settings:
    """Settings of speculation: an encoded file's, if it has any, but for what the options say.

    Raises
    ------
    ValueError
        If a value is out of range.
    """
    from speq.model.settings import Settings

    given = {name: value for name, value in options.items() if value is not None}
    base = Settings(threshold=DEFAULT_THRESHOLD)
    if file and "alternates" in file.settings:
        # An alternate needs a row, a shorter chain does not: other rows, their own longest chain.
        base = file.settings["chain" if given.get("choices") == 1 else "alternates"]
        if given.get("rows", base.rows) != base.rows:
            base = replace(base, rows=given["rows"], draft_length=None)
    return replace(base, **given)


def rtl_board(
    model: Model,
    encoded: Mapping[str, EncodedTensor],
    prompt: Sequence[int],
    max_tokens: int,
    rows: int,
    cols: int,
) -> tuple[SimulatedBoard, int]:
    """The simulated RTL of an array of this size, for so many tokens behind a prompt, and the
    entries of its KV cache.

    Raises ValueError, before anything takes long, if that is impossible.
    """
    from speq.host.session import accelerator_for, kv_capacity
    from speq.model.speculation import token_limit

    token_limit(model, prompt, max_tokens)
    capacity = kv_capacity(model, prompt, max_tokens, rows)
    config = accelerator_for(model, encoded, rows, cols, capacity)
    return simulated_board(model, encoded, config, capacity), capacity


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
    if s.repeated:
        lines.append(f"{s.repeated} verify passes were not finite and were repeated plainly")
    return lines


def show(output: Console, text: str, origin: str | None) -> None:
    """Print a piece of text at once: as it is when piped, on a terminal in its origin's style and
    with control characters made visible, because a model may write anything."""
    if output.is_terminal:
        safe = "".join(map(visible, text))
        output.print(Text(safe, style=STYLES[origin] if origin else ""), end="")
    else:
        print(text, end="", flush=True)


def visible(character: str) -> str:
    """The character, or what stands for one that would control a terminal."""
    if character in "\n\t" or unicodedata.category(character) != "Cc":
        return character
    return chr(0x2400 + ord(character)) if character < " " else "\N{REPLACEMENT CHARACTER}"
