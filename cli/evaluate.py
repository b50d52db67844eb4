# SPDX-License-Identifier: Apache-2.0
"""`speq eval`: how well a model's draft does, by kind of text, with plots and an ablation.

The FP16 target's greedy texts for every prompt are drafted along and speculation is replayed, with
chains alone ("chain") and with leaf alternates ("alternates"). Longest draft and threshold are
those that are best on the calibration prompts. The output folder gets each plot as PNG and SVG, and
`report.json`, which `speq.cli.eval_report` describes. The same options give the same files on the
same machine.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from speq.cli.eval_report import Request, Study, print_study, report, usual_format
from speq.cli.generate import formats_of, read_tensors
from speq.hw.common.files import staged
from speq.model.ablation import (
    Materials,
    draft_names,
    run_ablation,
)
from speq.model.checkpoint import Model, linear_names
from speq.model.competitors import collect_stats
from speq.model.emulation import (
    Linear,
    Text,
    decode,
    draft_chains,
    draft_linear,
    float_linear,
    float_weights,
)
from speq.model.encoded_file import read_encoded
from speq.model.evaluation import (
    Sample,
    acceptance_by_position,
    best_settings,
    by_kind,
    encoded_costs,
    exponent_counts,
    length_curve,
    threshold_curve,
)
from speq.model.format import EncodedTensor, arranged
from speq.model.format import encode as encode_tensor
from speq.model.loaders import load_model
from speq.model.number_format import FormatConfig
from speq.model.prompts import Prompts, first_of_each, read_prompts, shipped_prompts
from speq.model.speculation import Settings

_PIPED_WIDTH = 120  # characters of a line where there is no terminal


def choose_prompts(request: Request, raw: bool) -> tuple[Prompts, Prompts]:
    """Calibration and evaluation prompts.

    Raises
    ------
    ValueError
        If the file of prompts cannot be used, or has a prompt of the calibration's.
    """
    calibration = shipped_prompts("calibration", raw)
    if request.prompts:
        evaluation = read_prompts(request.prompts)
        known = {prompt for prompts in calibration.values() for prompt in prompts}
        for prompt in (prompt for prompts in evaluation.values() for prompt in prompts):
            if prompt in known:
                raise ValueError(
                    f"{request.prompts}: {prompt!r:.60} is one of the prompts on which settings "
                    "are chosen: take it out"
                )
    else:
        evaluation = shipped_prompts("evaluation", raw)
    count = request.prompts_per_kind
    return first_of_each(calibration, count), first_of_each(evaluation, count)


def encode_for(
    model: Model, body: FormatConfig, head: FormatConfig, progress: Progress
) -> dict[str, EncodedTensor]:
    """All linear layers of a model, encoded."""
    names = linear_names(model.config)
    return {
        name: encode_tensor(model.linear_weight(name), head if name == "head" else body, name=name)
        for name in progress.track(names, description="encoding")
    }


def decode_all(
    request: Request, model: Model, target: Linear, prompts: Sequence[Prompts], raw: bool
) -> list[list[tuple[str, Text]]]:
    """The target's texts with their kinds, for each of some sets of prompts."""
    tokenizer = model.tokenizer
    flat = [
        (kind, tokenizer.encode(prompt if raw else tokenizer.chat(prompt)))
        for group in prompts
        for kind, texts in group.items()
        for prompt in texts
    ]
    texts = decode(model, [ids for _, ids in flat], request.max_tokens, target, tokenizer.stop_ids)
    found = iter([(kind, text) for (kind, _), text in zip(flat, texts, strict=True)])
    return [[next(found) for texts in group.values() for _ in texts] for group in prompts]


def samples_of(
    model: Model,
    texts: Sequence[tuple[str, Text]],
    linear: Linear,
    request: Request,
    progress: Progress,
) -> list[Sample]:
    """The draft's chains along all texts."""
    total = sum(len(text.tokens) for _, text in texts)
    task = progress.add_task("drafting", total=total)
    chains = draft_chains(
        model,
        [text for _, text in texts],
        linear,
        request.rows - 1,
        max(2, request.choices),
        progress=lambda count: progress.advance(task, count),
    )
    return [Sample(kind, text, c) for (kind, text), c in zip(texts, chains, strict=True)]


def study(request: Request, model: Model, raw: bool, progress: Progress) -> Study:
    """Decode, draft, choose settings and measure."""
    if request.choices > model.config.vocab_size:
        raise ValueError(
            f"choices is {request.choices}; the model has {model.config.vocab_size} tokens"
        )
    prompts = choose_prompts(request, raw)
    encoded = (
        read_tensors(request.encoded, read_encoded(request.encoded), model)
        if request.encoded
        else encode_for(model, *formats_of(request), progress)
    )
    target = float_linear(float_weights(model))
    waiting = progress.add_task("decoding the FP16 texts", total=None)
    calibration, evaluation = decode_all(request, model, target, prompts, raw)
    progress.update(waiting, total=1, completed=1)

    costs = encoded_costs(model.config, encoded)
    draft = draft_linear(encoded, target)
    tried = samples_of(model, calibration, draft, request, progress)
    samples = samples_of(model, evaluation, draft, request, progress)
    settings = {
        name: best_settings(tried, costs, request.rows, choices)
        for name, choices in (("chain", 1), ("alternates", request.choices))
    }
    exponents = sum(
        exponent_counts(
            arranged(model.linear_weight(name), tensor.order, tensor.shift), tensor.config.group
        )
        for name, tensor in encoded.items()
    )
    ablation = None
    if request.ablation:
        texts = [[*text.prompt, *text.tokens] for _, text in calibration]
        materials = Materials(
            model=model,
            target=target,
            encoded=encoded,
            stats=collect_stats(model, texts),
            calibration=calibration,
            evaluation=evaluation,
            stop_ids=model.tokenizer.stop_ids,
            max_tokens=request.max_tokens,
        )
        task = progress.add_task("ablation", total=len(draft_names()))

        def show(name: str) -> None:
            progress.update(task, description=f"ablation: {name}", advance=1)

        ablation = run_ablation(materials, request.seed, progress=show)
    return Study(
        prompts={
            purpose: {kind: len(texts) for kind, texts in group.items()}
            for purpose, group in zip(("calibration", "evaluation"), prompts, strict=True)
        },
        encoded=encoded,
        costs=costs,
        settings=settings,
        figures={
            name: by_kind(samples, chosen, costs, request.seed) for name, chosen in settings.items()
        },
        acceptance=acceptance_by_position(samples),
        curves={
            name: [length_curve(samples, chosen, costs), threshold_curve(samples, chosen, costs)]
            for name, chosen in settings.items()
        },
        exponents=exponents,
        ablation=ablation,
    )


def draw(done: Study, model: Model, folder: Path) -> None:
    """All plots of a study into a folder."""
    # matplotlib takes a second to import, which errors in the options need not wait for.
    from speq.cli import plots

    plots.save(plots.acceptance_plot(done.acceptance, model.name), folder, "acceptance")
    plots.save(plots.speedup_plot(done.curves, model.name), folder, "speedup")
    plots.save(
        plots.exponent_plot(done.exponents, usual_format(done).split, model.name),
        folder,
        "exponents",
    )
    if done.ablation:
        plots.save(plots.ablation_plot(done.ablation.rows, model.name), folder, "ablation")


def run(request: Request) -> None:
    """Evaluate a model, print the figures and write the report and the plots.

    Raises
    ------
    ValueError
        If an option, the model, the prompts or the encoded file cannot be used.
    OSError
        If a file cannot be read or written.
    """
    if request.rows < 2:
        raise ValueError(f"rows is {request.rows}; speculation needs at least 2")
    Settings(rows=request.rows, choices=request.choices)
    formats_of(request)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    errors = Console(stderr=True)
    quiet = not errors.is_terminal
    with staged(request.output) as folder:
        with Progress(*columns, console=errors, transient=True, disable=quiet) as progress:
            loading = progress.add_task(f"loading {request.model}", total=None)
            model = load_model(request.model)
            progress.remove_task(loading)
            raw = request.raw or not model.tokenizer.has_chat_format
            done = study(request, model, raw, progress)
        content = json.dumps(report(request, model, raw, done), indent=1, allow_nan=False)
        (folder / "report.json").write_text(content + "\n", encoding="utf-8")
        draw(done, model, folder)
    output = Console()
    print_study(done, output if output.is_terminal else Console(width=_PIPED_WIDTH))
    print(f"written: report.json and plots in {request.output}; seed {request.seed}")
