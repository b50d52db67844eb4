# SPDX-License-Identifier: Apache-2.0
"""`speq eval`: how well a model's draft does, by kind of text, with plots and an ablation.

The FP16 target's greedy texts for every prompt are drafted along and speculation is replayed: with
chains alone, and with each part of the policy (`speq.model.draft_tree`) added in turn. Longest
draft, threshold and policy are those that are best on the calibration prompts. The output folder
gets each plot as PNG and SVG, and `report.json`, which `speq.cli.eval_report` describes. The same
options give the same files on the same machine.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape

from speq.cli.options import (
    MOST_TOKENS,
    Force,
    GroupOfEncode,
    ModelName,
    Rows,
    Seed,
    SplitOfEncode,
    check_model,
    chosen_format,
)
from speq.cli.progress import bars

if TYPE_CHECKING:
    from speq.cli.eval_report import Study
    from speq.model.checkpoint import Model
    from speq.model.prompts import Prompts


def run(
    model: ModelName,
    output: Annotated[
        Path, typer.Option("-o", "--output", help="Folder for the report and the plots.")
    ] = Path("build/eval"),
    prompts: Annotated[
        Path | None, typer.Option(help="JSON file of prompts: kind to list.")
    ] = None,
    raw: Annotated[
        bool, typer.Option("--raw", help="Continue prompts (story openings): no chat format.")
    ] = False,
    prompts_per_kind: Annotated[
        int | None, typer.Option(min=1, max=1 << 20, help="Only so many prompts of each kind.")
    ] = None,
    max_tokens: Annotated[
        int, typer.Option(min=1, max=MOST_TOKENS, help="Most tokens per prompt.")
    ] = 64,
    rows: Rows = 8,
    cols: Annotated[
        int, typer.Option(min=1, max=1 << 10, help="Columns of the array whose cycles are shown.")
    ] = 32,
    choices: Annotated[int, typer.Option(help="Choices per position for spare rows.")] = 4,
    reranked: Annotated[
        int | None,
        typer.Option(
            help="Best drafted tokens whose logits are computed exactly; 0: none.",
            show_default="0, or the file's",
        ),
    ] = None,
    group: GroupOfEncode = None,
    split: SplitOfEncode = None,
    encoded: Annotated[
        Path | None, typer.Option(help="Evaluate this file, written by speq encode.")
    ] = None,
    ablation: Annotated[
        bool, typer.Option("--ablation", help="Also compare formats and competitors.")
    ] = False,
    seed: Seed = 0,
    force: Force = False,
) -> None:
    """Measure a model's draft on prompts of five kinds, with modelled speedups and plots."""
    from speq.hw.common.files import staged
    from speq.model.prompts import read_prompts
    from speq.model.settings import Settings

    if rows < 2:
        raise ValueError(f"rows is {rows}; speculation needs at least 2")
    Settings(rows=rows, choices=choices, reranked=reranked or 0)
    number_format = chosen_format(group, split, encoded)
    if prompts:
        read_prompts(prompts)
    with staged(output, marks(True), marks(ablation), force=force) as folder:
        check_model(model)
        # These load torch: options and output are right by now.
        from speq.cli.eval_report import Conditions, print_study, report
        from speq.cli.eval_study import study
        from speq.host.session import Session
        from speq.model.encoded_file import read_encoded
        from speq.model.encoding import encode_linears, tensors_for
        from speq.model.loaders import load_model

        with bars(transient=True, terminal_only=True) as progress:
            file = read_encoded(encoded) if encoded else None
            if reranked is None:
                reranked = file.settings["alternates"].reranked if file and file.settings else 0
            loading = progress.add_task(f"loading {escape(model)}", total=None)
            loaded = load_model(model)
            progress.remove_task(loading)
            vocabulary = loaded.config.vocab_size
            if choices > vocabulary:
                raise ValueError(f"choices is {choices}; the model has {vocabulary} tokens")
            raw = raw or not loaded.tokenizer.has_chat_format
            chosen = choose_prompts(prompts, prompts_per_kind, raw)
            if file and encoded:
                tensors = tensors_for(loaded, file, encoded)
            else:
                tensors = encode_linears(
                    loaded,
                    number_format,
                    track=lambda names: progress.track(names, description="encoding"),
                )
            conditions = Conditions(rows, cols, choices, reranked, max_tokens, seed, raw)
            session = Session(loaded, tensors)
            done = study(session, chosen, conditions, progress, ablation=ablation)
        # What took so long is seen even if it cannot be stored.
        print_study(done, conditions)
        content = json.dumps(report(conditions, loaded, encoded, done), indent=1, allow_nan=False)
        (folder / "report.json").write_text(content + "\n", encoding="utf-8")
        draw(done, loaded, folder)
    print(f"written: report.json and plots in {output}; seed {seed}")


def marks(ablation: bool) -> dict[str, bytes]:
    """The files of a study, with or without ablation, and how each begins."""
    kinds = {
        "png": rb"(?s)\x89PNG.*Software\0speq eval",
        "svg": rb"(?s)<\?xml.*<dc:title>speq eval<",
    }
    plotted = ("acceptance", "speedup", "exponents", *(("ablation",) if ablation else ()))
    plots = {f"{plot}.{kind}": mark for plot in plotted for kind, mark in kinds.items()}
    return {"report.json": rb'\{\s*"version": \d+,\s*"model": \{\s*"name": '} | plots


def choose_prompts(path: Path | None, per_kind: int | None, raw: bool) -> tuple[Prompts, Prompts]:
    """Calibration and evaluation prompts; the latter from `path`, if there is one, and of each
    kind so many.

    Raises
    ------
    ValueError
        If the file of prompts cannot be used, or has a prompt of the calibration's.
    """
    from speq.model.prompts import first_of_each, read_prompts, shipped_prompts

    calibration = shipped_prompts("calibration", raw)
    if path:
        evaluation = read_prompts(path)
        known = {prompt for prompts in calibration.values() for prompt in prompts}
        for prompt in (prompt for prompts in evaluation.values() for prompt in prompts):
            if prompt in known:
                raise ValueError(
                    f"{path}: {prompt!r:.60} is one of the prompts on which settings "
                    "are chosen: take it out"
                )
    else:
        evaluation = shipped_prompts("evaluation", raw)
    return first_of_each(calibration, per_kind), first_of_each(evaluation, per_kind)


def draw(done: Study, model: Model, folder: Path) -> None:
    """All plots of a study into a folder."""
    from speq.cli import plots
    from speq.cli.eval_report import usual_format

    plots.save(plots.acceptance_plot(done.acceptance, model.name), folder, "acceptance")
    plots.save(plots.speedup_plot(done.curves, model.name), folder, "speedup")
    plots.save(
        plots.exponent_plot(done.exponents, usual_format(done).split, model.name),
        folder,
        "exponents",
    )
    if done.ablation:
        plots.save(plots.ablation_plot(done.ablation.rows, model.name), folder, "ablation")
