# SPDX-License-Identifier: Apache-2.0
"""`speq encode`: a model's linear layers as one file.

The file is described in speq.model.encoded_file, what the optimiser does in speq.model.encoder. The
output appears only when it is complete and, with --verify, found right.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape

from speq.cli.options import (
    MOST_TOKENS,
    Force,
    Group,
    ModelName,
    Split,
    chain_end,
    check_model,
    refuse_unused,
)
from speq.cli.progress import bars, status, with_bar
from speq.model.aliases import ALIASES
from speq.model.input_file import ENCODED_MODEL
from speq.model.number_format import FormatConfig

if TYPE_CHECKING:
    from speq.model.checkpoint import Model
    from speq.model.encoder import OptimisedEncoding
    from speq.model.prompts import Prompts


def run(
    model: ModelName,
    output: Annotated[Path, typer.Option("-o", "--output", help="The safetensors file to write.")],
    group: Group = 64,
    columns: Annotated[
        int, typer.Option(min=1, max=256, help="Columns of the array that reads it.")
    ] = 16,
    rows: Annotated[
        int | None,
        typer.Option(help="Rows of the array: tokens in a verify pass.", show_default="8"),
    ] = None,
    choices: Annotated[
        int | None,
        typer.Option(help="Candidates per position for spare rows.", show_default="4"),
    ] = None,
    prompts: Annotated[
        Path | None,
        typer.Option(help="Calibration prompts (JSON: kind -> list).", show_default="shipped"),
    ] = None,
    max_tokens: Annotated[
        int | None,
        typer.Option(
            min=1, max=MOST_TOKENS, help="Length of a calibration text.", show_default="64"
        ),
    ] = None,
    verify: Annotated[bool, typer.Option("--verify", help="Read back and compare bits.")] = False,
    fixed: Annotated[
        bool, typer.Option("--fixed", help="One format for all tensors, no calibration.")
    ] = False,
    split: Split = 2,
    tensors: Annotated[
        str | None,
        typer.Option(help="With --fixed: only tensors that this regular expression finds."),
    ] = None,
    force: Force = False,
) -> None:
    """Encode a model's linear layers so that the draft inside them is as good as can be."""
    from speq.hw.common.files import replacing
    from speq.model.prompts import read_prompts
    from speq.model.settings import Settings

    config = FormatConfig(group, split)
    if fixed:
        refuse_unused(
            "with --fixed: nothing is calibrated",
            prompts=prompts,
            rows=rows,
            choices=choices,
            max_tokens=max_tokens,
        )
    rows, choices, max_tokens = (
        default if given is None else given
        for given, default in ((rows, 8), (choices, 4), (max_tokens, 64))
    )
    Settings(rows=rows, choices=choices)
    if tensors is not None and not fixed:
        raise ValueError("--tensors needs --fixed: the optimiser takes all tensors")
    if not fixed and (rows < 2 or choices < 2):
        raise ValueError("the optimiser needs at least 2 rows and 2 choices")
    try:
        re.compile(tensors or "")
    except re.error as error:
        raise ValueError(f"--tensors {tensors!r} is no regular expression: {error}") from error
    calibration = read_prompts(prompts) if prompts else None

    with replacing(output, ENCODED_MODEL, force=force) as temporary:
        check_model(model)
        # These load torch: options and output are right by now.
        from speq.model.encoded_file import EncodedModel, read_encoded, sha256, write_encoded
        from speq.model.encoding import encode_linears
        from speq.model.loaders import load_model

        with status(f"loading {escape(model)}"):
            loaded = load_model(model, decoding=not fixed)
        vocabulary = loaded.config.vocab_size
        if not fixed and choices > vocabulary:
            raise ValueError(f"choices is {choices}; the model has {vocabulary} tokens")
        start = time.perf_counter()
        if fixed:
            outcome = None
            encoded = encode_linears(
                loaded, config, pattern=tensors or "", columns=columns, track=with_bar
            )
        else:
            numbers = {"columns": columns, "rows": rows, "choices": choices}
            outcome = _optimise(loaded, calibration, config, max_tokens=max_tokens, **numbers)
            encoded = outcome.tensors
        seconds = time.perf_counter() - start
        digests = {name: sha256(loaded.linear_weight(name)) for name in encoded}
        settings = {"chain": outcome.chain, "alternates": outcome.alternates} if outcome else {}
        report = _report(outcome) if outcome else {}
        with _naming(output, temporary):
            source = stored_source(model, output)
            write_encoded(temporary, EncodedModel(source, encoded, digests, settings, report))
            if verify:
                read_encoded(temporary).check_bits()
        if verify:
            print(f"verified: all {len(encoded)} tensors decode to their original bits")
    total = sum(tensor.shape[0] * tensor.shape[1] for tensor in encoded.values())
    stored = sum(tensor.storage_bits() for tensor in encoded.values())
    drafted = sum(tensor.draft_bits() for tensor in encoded.values())
    print(f"weights:  {total / 1e6:.2f} M in {len(encoded)} tensors of {loaded.name}")
    print(
        f"storage:  {stored / total:.4f} bits per weight, {stored / total / 16 - 1:.2%} over FP16"
    )
    print(
        f"draft:    {drafted / total:.4f} bits per weight read in a draft pass, "
        f"{drafted / total / 16:.2%} of FP16"
    )
    if outcome:
        print(_summary(outcome))
    print(f"encoding: {seconds:.1f} s")
    print(f"written:  {output}, {output.stat().st_size / 1e6:.1f} MB")


def stored_source(model: str, output: Path) -> str:
    """What an encoded file calls its model: the alias, or the way from the file to the checkpoint,
    so that both can be moved together."""
    if model in ALIASES:
        return model
    path = Path(model)
    # Of the checkpoint itself, a link's name counts: it may be what says the format.
    return os.path.relpath(path.parent.resolve() / path.name, output.parent.resolve())


@contextmanager
def _naming(output: Path, temporary: Path) -> Iterator[None]:
    """Errors name the file that was asked for, not the temporary one in its place."""
    try:
        yield
    except (ValueError, OSError) as error:
        raise ValueError(str(error).replace(str(temporary), str(output))) from error


def _optimise(
    model: Model, prompts: Prompts | None, config: FormatConfig, **numbers: int
) -> OptimisedEncoding:
    """Run the optimiser with these numbers and a progress bar."""
    from speq.model.encoder import optimise

    with bars() as progress:
        tasks = {}

        def show(what: str, done: int, total: int) -> None:
            if what not in tasks:
                tasks[what] = progress.add_task(what, total=total)
                for other in list(tasks)[:-1]:
                    progress.update(tasks[other], completed=progress.tasks[tasks[other]].total)
            progress.update(tasks[what], completed=done)

        texts = _calibration_texts(prompts, model)
        return optimise(model, texts, config=config, **numbers, progress=show)


def _calibration_texts(prompts: Prompts | None, model: Model) -> list[list[int]]:
    """Token ids of the calibration prompts, in chat format if the model has one."""
    from speq.model.prompts import shipped_prompts

    tokenizer = model.tokenizer
    raw = not tokenizer.has_chat_format
    prompts = prompts or shipped_prompts("calibration", raw)
    texts = (text for group in prompts.values() for text in group)
    return [tokenizer.encode(text) if raw else tokenizer.encode_chat(text) for text in texts]


def _summary(outcome: OptimisedEncoding) -> str:
    """Lines on what the optimiser chose."""
    head = outcome.tensors["head"]
    drafted = head.drafted_outputs or head.shape[0]
    tokens = f"{drafted} of {head.shape[0]} tokens, {outcome.chain.reranked} re-ranked"
    lines = [f"head:       drafts {tokens}"]
    for name, value, settings in zip(
        ("chain", "alternates"), outcome.speedups, (outcome.chain, outcome.alternates), strict=True
    ):
        lines.append(
            f"{name + ':':<11} modelled speedup {value:.3f} on the calibration texts,\n"
            f"{'':11} draft length {settings.length}, "
            f"{chain_end(settings.threshold, settings.policy.limit)}"
        )
    return "\n".join(lines)


def _report(outcome: OptimisedEncoding) -> dict[str, object]:
    """What the file's header says about the optimiser's run."""
    return {
        "calibration_speedup": dict(zip(("chain", "alternates"), outcome.speedups, strict=True)),
        "tried": [asdict(trial) for trial in outcome.tried],
    }
