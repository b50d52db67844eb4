# SPDX-License-Identifier: Apache-2.0
"""What `speq eval` reports: `report.json` and the tables on the terminal.

`report.json` is an object of

    version       4
    model         name, of a path the last part, and its configuration
    settings      of the run: rows, cols, choices, reranked, max_tokens, seed, raw, draft (the
                  file's name if there is one, formats and how many layers have each, the head's
                  drafted outputs)
    prompts       for "calibration" and "evaluation": the number of prompts of each kind
    versions      of speq, Python, torch and numpy
    costs         bytes of weights and group bytes of a `plain`, `draft` and `verify` pass, the
                  `relative` costs of the latter two, and `cycles` of each on an array of `rows` x
                  `cols` (verify: with as many tokens as rows), all without earlier context
    results       for chains alone ("chain") and with the parts of the policy one after the other
                  ("alternates", "product rule", "guesses", "policy"): the `settings` that are best
                  on the calibration prompts, and with them the `figures` of each kind of evaluation
                  prompts and of "all" (speq.model.evaluation.Figures)
    contexts      speedups of "policy" behind so many positions, by `bytes` and by `cycles`
    acceptance    by draft position (speq.model.evaluation.Acceptance)
    curves        for "chain" and "alternates": speedup against each setting, on the evaluation
                  prompts (speq.model.evaluation.Curve)
    exponents     `counts`, 32 pairs: weights of all drafted layers by t and by top mantissa bit,
                  and group and split of most layers
    samples       the texts of the first evaluation prompt of each kind, with "policy": `kind`,
                  `prompt`, and `steps`, each with its `tokens`, their `texts` and `origins`
                  ("draft", "alternate", "guess" or "target"), and the texts of drafted tokens that
                  were `refused`
    ablation      null, or `rows` and `lossy` (speq.model.ablation.RowResult, LossyResult)

What could not be measured (a ratio whose denominator is 0) is null.
"""

from __future__ import annotations

import math
import os
import platform
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, is_dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.table import Table

from speq.cli.options import chain_end
from speq.cli.tables import figure_table, show
from speq.host.cycles import predicted_passes
from speq.model.ablation import Ablation, LossyResult, RowResult
from speq.model.checkpoint import Model
from speq.model.evaluation import Acceptance, Costs, Curve, Estimate, Figures
from speq.model.format import EncodedTensor
from speq.model.number_format import FormatConfig
from speq.model.settings import Settings

VERSION = 4


#: Positions before the passes whose speedups are shown.
CONTEXTS = (80, 1024, 4096)
#: What people read for the parts of the policy, each of which has those before it.
POLICIES = {
    "chain": "chains alone",
    "alternates": "alternates by margin",
    "product rule": "rows and lengths by probability",
    "guesses": "guesses in free rows",
    "policy": "steps without a draft pass",
}


@dataclass(frozen=True)
class Conditions:
    """What a study is made under.

    Attributes
    ----------
    rows, cols : int
        Of the array.
    choices : int
        Choices per position.
    reranked : int
        Best drafted tokens whose logits are computed exactly.
    max_tokens : int
        Per prompt.
    seed : int
        Of everything random.
    raw : bool
        Whether prompts are continued, without a chat format.
    """

    rows: int
    cols: int
    choices: int
    reranked: int
    max_tokens: int
    seed: int
    raw: bool


@dataclass(frozen=True)
class ShownStep:
    """A step of speculation for people: token ids, their texts and origins, and the texts of the
    drafted tokens that were refused."""

    tokens: list[int]
    texts: list[str]
    origins: list[str]
    refused: list[str]


@dataclass(frozen=True)
class ShownText:
    """A text, step by step, of a prompt of some kind."""

    kind: str
    prompt: str
    steps: list[ShownStep]


@dataclass(frozen=True)
class ContextFigures:
    """Modelled speedups if every pass were behind so many positions: by the bytes that passes move,
    KV cache included, and by their cycles."""

    context: int
    bytes: Estimate
    cycles: Estimate


@dataclass(frozen=True, eq=False)
class Study:
    """What the report and the plots show.

    Attributes
    ----------
    prompts : numbers of prompts of each kind, for "calibration" and "evaluation"
    encoded : the drafted layers
    costs : Costs
    settings : of chains alone ("chain"), with alternates in free rows ("alternates"), with rows and
        lengths of chains by probability ("product rule"), then with guesses in free rows as well
        ("guesses"), and with steps that have no draft pass ("policy")
    figures : of all of these, by kind
    acceptance : Acceptance
    curves : of "chain" and "alternates"
    contexts : of "policy", for contexts of several lengths
    exponents : numpy.int64 [32, 2]
    samples : ShownText of the first prompt of each kind
    ablation : Ablation, if it was asked for
    """

    prompts: dict[str, dict[str, int]]
    encoded: Mapping[str, EncodedTensor]
    costs: Costs
    settings: dict[str, Settings]
    figures: dict[str, dict[str, Figures]]
    acceptance: Acceptance
    curves: dict[str, list[Curve]]
    contexts: list[ContextFigures]
    exponents: np.ndarray
    samples: list[ShownText]
    ablation: Ablation | None


def as_json(value: object) -> Any:
    """A value of dataclasses, arrays and containers for `json.dumps`; NaN becomes null."""
    if is_dataclass(value) and not isinstance(value, type):
        return as_json(asdict(value))
    if isinstance(value, Mapping):
        return {str(key): as_json(entry) for key, entry in value.items()}
    if isinstance(value, np.ndarray):
        return value.tolist()
    if isinstance(value, list | tuple):
        return [as_json(entry) for entry in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def usual_format(done: Study) -> FormatConfig:
    """The format that most layers have, which the plot of exponents shows."""
    return Counter(tensor.config for tensor in done.encoded.values()).most_common(1)[0][0]


def report(
    conditions: Conditions, model: Model, encoded_file: Path | None, done: Study
) -> dict[str, Any]:
    """The content of report.json, as this module describes it."""
    formats = {name: tensor.config for name, tensor in done.encoded.items()}
    drafted_outputs = done.encoded["head"].drafted_outputs if "head" in done.encoded else None
    passes = predicted_passes(
        *(model.config, formats),
        rows=conditions.rows,
        cols=conditions.cols,
        drafted_outputs=drafted_outputs,
    )
    cycles = {
        "plain": passes.plain(),
        "draft": passes.draft(reranked_tiles=conditions.reranked),
        "verify": passes.verify(conditions.rows),
    }
    usual = usual_format(done)
    return as_json(
        {
            "version": VERSION,
            "model": {"name": _last_part(model.name), "config": model.config},
            "settings": {
                **asdict(conditions),
                "draft": {
                    "encoded": None if encoded_file is None else _last_part(encoded_file),
                    "formats": [
                        {"format": form, "tensors": count}
                        for form, count in Counter(formats.values()).items()
                    ],
                    "drafted_outputs": drafted_outputs,
                },
            },
            "prompts": done.prompts,
            "versions": {
                "speq": version("speq"),
                "python": platform.python_version(),
                "torch": torch.__version__,
                "numpy": np.__version__,
            },
            "costs": {
                "plain": done.costs.plain,
                "draft": done.costs.draft,
                "verify": done.costs.verify,
                "relative": done.costs.relative,
                "cycles": cycles,
            },
            "results": {
                name: {"settings": done.settings[name], "figures": done.figures[name]}
                for name in done.settings
            },
            "acceptance": done.acceptance,
            "curves": done.curves,
            "contexts": done.contexts,
            "exponents": {"group": usual.group, "split": usual.split, "counts": done.exponents},
            "samples": done.samples,
            "ablation": done.ablation,
        }
    )


def _last_part(path: str | Path) -> str:
    """The name of a file or folder, or an alias: without what is different elsewhere."""
    return os.path.basename(os.path.abspath(path))


def shown(estimate: Estimate) -> str:
    """A speedup with its confidence interval."""
    return f"{estimate.value:.2f} ({estimate.low:.2f}-{estimate.high:.2f})"


def percent(share: float | None) -> str:
    """A share in percent; a dash if there is none."""
    return "-" if share is None or math.isnan(share) else f"{share:.1%}"


def number(value: float | None) -> str:
    """Two decimals; a dash if there is no such figure."""
    return "-" if value is None or math.isnan(value) else f"{value:.2f}"


def result_table(name: str, settings: Settings, figures: Mapping[str, Figures]) -> Table:
    """Figures by kind."""
    table = figure_table(
        f"{name}: L = {settings.length}, "
        f"{chain_end(settings.threshold, settings.policy.limit)}, "
        f"{settings.choices} choices, {settings.reranked} re-ranked, {settings.rows} rows",
        *("kind", "\nmatch", "draft\n/pass", "accept\n/pass", "tokens\n/pass"),
        *("early\nexits", "alt.\nhits", "guess\nhits", "speedup\nover FP16", "with\nKV"),
    )
    for kind, f in figures.items():
        if kind == "all":
            table.add_section()
        table.add_row(
            *(kind, percent(f.match_rate), number(f.drafted), number(f.acceptance_length)),
            number(f.tokens_per_pass),
            *(percent(f.early_exits), percent(f.alternate_hits), number(f.guess_hits)),
            *(shown(f.speedup), number(f.speedup_kv.value)),
        )
    return table


def policy_table(done: Study) -> Table:
    """What each part of the policy is worth, over all texts. All weights that a plain pass reads
    for a token limit what a bandwidth is good for."""
    table = figure_table(
        "parts of the policy",
        *("with", "draft\n/pass", "tokens\n/pass", "alt.\n/pass", "guess\n/pass"),
        *("no draft\npass", "speedup\nover FP16", "tokens/s\nper GB/s"),
    )
    plain = 1e9 / done.costs.plain
    table.add_row("plain decoding", *5 * [""], "1.00", f"{plain:.4g}")
    for name, figures in done.figures.items():
        f = figures["all"]
        table.add_row(
            *(POLICIES[name], number(f.drafted), number(f.tokens_per_pass)),
            *(number(f.alternate_hits), number(f.guess_hits), percent(f.free_steps)),
            *(shown(f.speedup), f"{plain * f.speedup.value:.4g}"),
        )
    return table


def context_table(done: Study, conditions: Conditions) -> Table:
    """Speedups behind contexts of several lengths."""
    table = figure_table(
        "by context, all parts of the policy",
        *("positions", "bytes, with\nKV cache", f"cycles,\n{conditions.rows} x {conditions.cols}"),
    )
    for entry in done.contexts:
        table.add_row(f"{entry.context:,}", shown(entry.bytes), shown(entry.cycles))
    return table


def ablation_table(rows: Sequence[RowResult]) -> Table:
    """The ablation's rows, the design study's figures beside ours."""
    table = figure_table(
        *("ablation", "draft", "match\n", "study\n", "speedup\n", "study\n"),
        *("everything\ncounted", "storage\nadded"),
    )
    for result in rows:
        match, speedup = result.row.prototype
        table.add_row(
            *(result.row.name, percent(result.match_rate), percent(match)),
            *(shown(result.speedup), number(speedup), number(result.counted_speedup.value)),
            percent(result.storage_added),
        )
    return table


def lossy_table(decoders: Sequence[LossyResult]) -> Table:
    """Competitors as decoders of their own."""
    table = figure_table(
        "as lossy decoders: tokens that differ from FP16's",
        *("scheme", "own\ntext", "behind\nFP16's text", "\nperplexity", "\nFP16's", "\nspeedup"),
    )
    for d in decoders:
        table.add_row(
            *(d.name, percent(d.differing), percent(d.differing_next)),
            *(number(d.perplexity), number(d.perplexity_fp16), number(d.speedup)),
        )
    return table


def print_study(done: Study, conditions: Conditions) -> None:
    """All tables."""
    for name in ("chain", "policy"):
        show(result_table(POLICIES[name], done.settings[name], done.figures[name]), "")
    show(policy_table(done), "", context_table(done, conditions), "")
    tokens = done.figures["chain"]["all"].tokens
    evaluated, tried = (sum(done.prompts[p].values()) for p in ("evaluation", "calibration"))
    draft, verify = done.costs.relative
    show(
        f"{tokens} tokens of {evaluated} prompts; intervals: 95 %, bootstrap over prompts.",
        f"L, threshold and policy are the best on {tried} other prompts, those for calibration.",
        f"A draft pass costs {draft:.4f} and a verify pass {verify:.4f} of a plain FP16 pass,",
        "LM head and group bytes counted.",
    )
    if done.ablation:
        show("", ablation_table(done.ablation.rows), "", lossy_table(done.ablation.lossy))
