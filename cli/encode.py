# SPDX-License-Identifier: Apache-2.0
"""`speq encode` and `speq verify-file`: a model's linear layers as one file, and its check.

The file is described in speq.model.encoded_file, what the optimiser does in speq.model.encoder. An
interrupted run leaves what it has found in a journal beside the output, OUTPUT.journal, from which
the same command goes on; a finished one removes it.
"""

from __future__ import annotations

import hashlib
import json
import re
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from speq.hw.common.files import replacing
from speq.model.checkpoint import Model, linear_names
from speq.model.encoded_file import VERSION, EncodedModel, read_encoded, sha256, write_encoded
from speq.model.encoder import Journal, OptimisedEncoding, optimise
from speq.model.evaluation import encoded_costs
from speq.model.format import EncodedTensor
from speq.model.format import encode as encode_tensor
from speq.model.loaders import load_model
from speq.model.number_format import FormatConfig
from speq.model.prompts import Prompts, read_prompts, shipped_prompts
from speq.model.speculation import Settings


@dataclass(frozen=True)
class Request:
    """The options of `speq encode`; `speq encode --help` explains them."""

    model: str
    output: Path
    group: int
    columns: int
    fixed: bool
    split: int | None
    width: int | None
    pattern: str | None
    rows: int
    choices: int
    prompts: Path | None
    max_tokens: int
    verify: bool

    def check(self) -> None:
        """Raises ValueError if options contradict each other or are out of range."""
        FormatConfig(group=self.group)
        Settings(rows=self.rows, choices=self.choices)
        if self.fixed:
            self.config()
            if self.prompts:
                raise ValueError("--prompts and --fixed exclude each other: nothing is calibrated")
            return
        given = {"split": self.split, "width": self.width, "tensors": self.pattern}
        for name, value in given.items():
            if value is not None:
                raise ValueError(f"--{name} needs --fixed: else the optimiser chooses")
        if self.rows < 2 or self.choices < 2:
            raise ValueError("the optimiser needs at least 2 rows and 2 choices")

    def config(self) -> FormatConfig:
        """The format of all tensors with --fixed."""
        defaults = FormatConfig()
        split = defaults.split if self.split is None else self.split
        width = defaults.width if self.width is None else self.width
        return FormatConfig(self.group, split, width)


def linear_weights(model: Model, pattern: str = "") -> dict[str, torch.Tensor]:
    """The weights of the linear layers whose name `pattern` finds, torch.float16 [O, K] by name.

    Raises
    ------
    ValueError
        If the pattern is not a regular expression or finds no name.
    """
    try:
        expression = re.compile(pattern)
    except re.error as error:
        raise ValueError(f"{pattern!r} is no regular expression: {error}") from error
    names = linear_names(model.config)
    found = {name: model.linear_weight(name) for name in names if expression.search(name)}
    if not found:
        raise ValueError(f"{pattern!r} finds none of the tensors {names[0]} to {names[-1]}")
    return found


def _bar() -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        console=Console(stderr=True),
    )


def _encode_fixed(request: Request, model: Model) -> dict[str, EncodedTensor]:
    """All wanted tensors in one format, scale codes fitted to the weights alone."""
    weights = linear_weights(model, request.pattern or "")
    with _bar() as progress:
        task = progress.add_task("encoding", total=len(weights))
        encoded = {}
        for name, weight in weights.items():
            options = {"name": name, "columns": request.columns}
            encoded[name] = encode_tensor(weight, request.config(), **options)
            progress.advance(task)
    return encoded


def _calibration_prompts(request: Request, model: Model) -> list[list[int]]:
    """Token ids of the calibration prompts, in chat format if the model has one."""
    tokenizer = model.tokenizer
    raw = not tokenizer.has_chat_format
    prompts: Prompts = (
        read_prompts(request.prompts) if request.prompts else shipped_prompts("calibration", raw)
    )
    texts = (text for group in prompts.values() for text in group)
    return [tokenizer.encode(text if raw else tokenizer.chat(text)) for text in texts]


def _optimise(
    request: Request, model: Model, digests: Mapping[str, str], path: Path
) -> OptimisedEncoding:
    """Run the optimiser with a progress bar and the journal at `path`."""
    prompts = _calibration_prompts(request, model)
    key = _journal_key(request, digests, prompts)
    journal = _read_journal(path, key)

    def save(content: Journal) -> None:
        with replacing(path) as temporary:
            temporary.write_text(json.dumps({"key": key, "journal": content}), encoding="utf-8")

    with _bar() as progress:
        tasks = {}

        def show(what: str, done: int, total: int) -> None:
            if what not in tasks:
                tasks[what] = progress.add_task(what, total=total)
                for other in list(tasks)[:-1]:
                    progress.update(tasks[other], completed=progress.tasks[tasks[other]].total)
            progress.update(tasks[what], completed=done)

        return optimise(
            model,
            prompts,
            group=request.group,
            columns=request.columns,
            rows=request.rows,
            choices=request.choices,
            max_tokens=request.max_tokens,
            journal=journal,
            save=save,
            progress=show,
        )


def _journal_key(request: Request, digests: Mapping[str, str], prompts: list[list[int]]) -> str:
    """Digest of all that an optimiser's results depend on."""
    numbers = [request.group, request.columns, request.rows, request.choices, request.max_tokens]
    content = json.dumps([VERSION, numbers, dict(digests), prompts])
    return hashlib.sha256(content.encode()).hexdigest()


def _read_journal(path: Path, key: str) -> Journal:
    """The journal of an interrupted run of the same command; an empty one if there is none."""
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
        if stored["key"] == key:
            return dict(stored["journal"])
    except FileNotFoundError:
        pass
    except (ValueError, LookupError, TypeError, RecursionError):
        Console(stderr=True).print(f"note: {path} is damaged: starting anew")
    return {}


def run(request: Request) -> None:
    """Encode a model and print what it takes and, with `verify`, the comparison.

    The output appears only when it is complete and, with `verify`, found right.

    Raises
    ------
    ValueError
        If a parameter, the model (CheckpointError) or the comparison is wrong.
    OSError
        If a file cannot be read or written.
    """
    request.check()
    journal = Path(f"{request.output}.journal")
    with replacing(request.output) as temporary:
        with Console(stderr=True).status(f"loading {request.model}"):
            model = load_model(request.model)
        start = time.perf_counter()
        if request.fixed:
            outcome, tensors = None, _encode_fixed(request, model)
        else:
            weights = linear_weights(model)
            digests = {name: sha256(weight) for name, weight in weights.items()}
            outcome = _optimise(request, model, digests, journal)
            tensors = outcome.tensors
        seconds = time.perf_counter() - start
        digests = {name: sha256(model.linear_weight(name)) for name in tensors}
        settings = {"chain": outcome.chain, "alternates": outcome.alternates} if outcome else {}
        report = _report(outcome) if outcome else {}
        write_encoded(temporary, EncodedModel(model.name, tensors, digests, settings, report))
        if request.verify:
            read_encoded(temporary).check_bits()
            print(f"verified: all {len(tensors)} tensors decode to their original bits")
    journal.unlink(missing_ok=True)

    total = sum(tensor.shape[0] * tensor.shape[1] for tensor in tensors.values())
    stored = sum(tensor.storage_bits() for tensor in tensors.values())
    cost = encoded_costs(model.config, tensors).relative[0]
    print(f"weights:  {total / 1e6:.2f} M in {len(tensors)} tensors of {model.name}")
    print(
        f"storage:  {stored / total:.4f} bits per weight, {stored / total / 16 - 1:.2%} over FP16"
    )
    print(f"draft:    {16 * cost:.4f} bits per weight read in a draft pass, {cost:.2%} of FP16")
    if outcome:
        print(_summary(outcome))
    print(f"encoding: {seconds:.1f} s")
    print(f"written:  {request.output}, {request.output.stat().st_size / 1e6:.1f} MB")


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
            f"{name + ':':<9} modelled speedup {value:.3f} on the calibration texts, "
            f"draft length {settings.length}, threshold {settings.threshold:g}"
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


def verify(path: Path, model_name: str | None) -> None:
    """Check an encoded file: every tensor decodes to the bits of the checkpoint.

    Parameters
    ----------
    path : Path
    model_name : the checkpoint, or None for the one that the file names

    Raises
    ------
    ValueError
        If the file is damaged, the model cannot be used or a tensor differs.
    OSError
        If a file cannot be read.
    """
    encoded = read_encoded(path)
    model = load_model(model_name or encoded.source)
    try:
        encoded.check_source(model)
        encoded.check_bits()
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    count = len(encoded.tensors)
    print(f"verified: all {count} tensors of {path} decode to the bits of {model.name}")
