# SPDX-License-Identifier: Apache-2.0
"""`speq encode`: a model's linear layers as one file.

The file is described in speq.model.encoded_file, what the optimiser does in speq.model.encoder. An
interrupted run leaves what it has found in a journal beside the output, OUTPUT.journal, from which
the same command goes on; a finished one removes it. The output appears only when it is complete
and, with --verify, found right.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import time
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape

from speq.cli.options import MOST_TOKENS, Force, Group, ModelName, check_model, refuse_unused
from speq.cli.progress import bars, status, with_bar
from speq.model.aliases import ALIASES
from speq.model.input_file import ENCODED_MODEL
from speq.model.number_format import FormatConfig

if TYPE_CHECKING:
    from speq.model.checkpoint import Model
    from speq.model.encoder import Journal, OptimisedEncoding
    from speq.model.prompts import Prompts

#: How a journal begins.
_JOURNAL = rb'\{"key": "'
_MAX_JOURNAL = 1 << 28  # bytes


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
            min=1, max=MOST_TOKENS, help="Length of a calibration text.", show_default="96"
        ),
    ] = None,
    verify: Annotated[bool, typer.Option("--verify", help="Read back and compare bits.")] = False,
    fixed: Annotated[
        bool, typer.Option("--fixed", help="One format for all tensors, no calibration.")
    ] = False,
    split: Annotated[
        int | None, typer.Option(help="With --fixed: 0 to 3.", show_default="2")
    ] = None,
    width: Annotated[
        int | None, typer.Option(help="With --fixed: 4, 5 or 6.", show_default="4")
    ] = None,
    tensors: Annotated[
        str | None,
        typer.Option(help="With --fixed: only tensors that this regular expression finds."),
    ] = None,
    force: Force = False,
) -> None:
    """Encode a model's linear layers so that the draft inside them is as good as can be."""
    from speq.hw.common.files import check_output, replacing
    from speq.model.prompts import read_prompts
    from speq.model.settings import Settings

    config = FormatConfig(group=group)
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
        for given, default in ((rows, 8), (choices, 4), (max_tokens, 96))
    )
    Settings(rows=rows, choices=choices)
    given = {"split": split, "width": width, "tensors": tensors}
    given = {name: value for name, value in given.items() if value is not None}
    if fixed:
        formats = {name: value for name, value in given.items() if name != "tensors"}
        config = FormatConfig(group, **formats)
    elif given:
        raise ValueError(f"--{next(iter(given))} needs --fixed: else the optimiser chooses")
    elif rows < 2 or choices < 2:
        raise ValueError("the optimiser needs at least 2 rows and 2 choices")
    try:
        re.compile(tensors or "")
    except re.error as error:
        raise ValueError(f"--tensors {tensors!r} is no regular expression: {error}") from error
    calibration = read_prompts(prompts) if prompts else None

    journal = Path(f"{output}.journal")
    if not fixed:
        check_output(journal, _JOURNAL, force=force)
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
            outcome = _optimise(
                loaded,
                calibration,
                journal,
                force,
                group=group,
                columns=columns,
                rows=rows,
                choices=choices,
                max_tokens=max_tokens,
            )
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
    if not fixed:
        journal.unlink(missing_ok=True)
    elif journal.exists():
        print(f"note:     {journal} stays: it is of an unfinished run without --fixed")

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
    model: Model, prompts: Prompts | None, path: Path, force: bool, **numbers: int
) -> OptimisedEncoding:
    """Run the optimiser with these numbers, a progress bar and the journal at `path`."""
    from speq.hw.common.files import replacing
    from speq.model.encoded_file import sha256
    from speq.model.encoder import optimise
    from speq.model.encoding import linear_weights

    texts = _calibration_texts(prompts, model)
    digests = {name: sha256(weight) for name, weight in linear_weights(model).items()}
    key = _journal_key(digests, texts, list(numbers.values()))
    journal = _read_journal(path, key)

    def save(content: Journal) -> None:
        with replacing(path, _JOURNAL, force=force) as temporary:
            temporary.write_text(json.dumps({"key": key, "journal": content}), encoding="utf-8")

    with bars() as progress:
        tasks = {}

        def show(what: str, done: int, total: int) -> None:
            if what not in tasks:
                tasks[what] = progress.add_task(what, total=total)
                for other in list(tasks)[:-1]:
                    progress.update(tasks[other], completed=progress.tasks[tasks[other]].total)
            progress.update(tasks[what], completed=done)

        return optimise(model, texts, **numbers, journal=journal, save=save, progress=show)


def _calibration_texts(prompts: Prompts | None, model: Model) -> list[list[int]]:
    """Token ids of the calibration prompts, in chat format if the model has one."""
    from speq.model.prompts import shipped_prompts

    tokenizer = model.tokenizer
    raw = not tokenizer.has_chat_format
    prompts = prompts or shipped_prompts("calibration", raw)
    texts = (text for group in prompts.values() for text in group)
    return [tokenizer.encode(text) if raw else tokenizer.encode_chat(text) for text in texts]


def _journal_key(digests: Mapping[str, str], prompts: list[list[int]], numbers: list[int]) -> str:
    """Digest of all that an optimiser's results depend on."""
    from speq.model.encoded_file import VERSION

    content = json.dumps([VERSION, numbers, dict(digests), prompts])
    return hashlib.sha256(content.encode()).hexdigest()


def _read_journal(path: Path, key: str) -> Journal:
    """The journal of an interrupted run of the same command; an empty one if there is none."""
    from speq.model.input_file import read_limited

    try:
        stored = json.loads(read_limited(path, _MAX_JOURNAL))
        if stored["key"] == key:
            return dict(stored["journal"])
    except FileNotFoundError:
        pass
    except (ValueError, LookupError, TypeError, RecursionError):
        warnings.warn(f"{path} is damaged: starting anew", stacklevel=2)
    return {}


def _summary(outcome: OptimisedEncoding) -> str:
    """Lines on what the optimiser chose."""
    widths: dict[int, int] = {}
    for tensor in outcome.tensors.values():
        widths[tensor.config.width] = widths.get(tensor.config.width, 0) + 1
    shares = ", ".join(f"{count} at {width} bits" for width, count in sorted(widths.items()))
    head = outcome.tensors["head"]
    lines = [f"tensors:  {shares}; head drafts {head.drafted_outputs or head.shape[0]} tokens"]
    for name, value, settings in zip(
        ("chain", "alternates"), outcome.speedups, (outcome.chain, outcome.alternates), strict=True
    ):
        lines.append(
            f"{name + ':':<9} modelled speedup {value:.3f} on the calibration texts,\n"
            f"{'':9} draft length {settings.length}, threshold {settings.threshold:g}"
        )
    return "\n".join(lines)


def _report(outcome: OptimisedEncoding) -> dict[str, object]:
    """What the file's header says about the optimiser's run."""
    return {
        "calibration_speedup": dict(zip(("chain", "alternates"), outcome.speedups, strict=True)),
        "tried": [
            dict(zip(("cost", "chain", "alternates"), t, strict=True)) for t in outcome.tried
        ],
        "formats": {name: asdict(t.config) for name, t in outcome.tensors.items()},
    }
