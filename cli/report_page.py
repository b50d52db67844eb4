# SPDX-License-Identifier: Apache-2.0
"""What `speq report` shows: figures and texts of a folder's files, ready for its template.

The files may be of others. What is not as their writers describe it is a ValueError; texts are what
models wrote, and the template escapes them.
"""

from __future__ import annotations

import json
import math
import unicodedata
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from speq.cli.options import chain_end
from speq.cli.report_charts import Chart, line_chart
from speq.model.input_file import read_limited
from speq.model.settings import MAX_COST_LIMIT

#: Bytes of a file that is read.
MAX_FILE = 1 << 26
#: Versions of report.json that can be shown; 2 has no samples.
_VERSIONS = (2, 3, 4)
_LABEL = 40  # characters of a label in a chart
_ORIGINS = ("draft", "alternate", "guess", "target")
#: Embeddings, overrides and isolates, which change the direction of the text behind them.
_DIRECTIONS = {*map(chr, range(0x202A, 0x202F)), *map(chr, range(0x2066, 0x206A))}
_RESULTS = {"chain": "chains alone", "alternates": "with alternates"}
#: Those that reports have from version 4 on, each with what those before it have.
_POLICIES = {
    "product rule": "rows by probability",
    "guesses": "with guesses",
    "policy": "drafts left out",
}


@dataclass(frozen=True)
class Token:
    """A token's text and where it is from: "draft", "alternate", "guess", "target", or
    "refused"."""

    text: str
    origin: str


@dataclass(frozen=True)
class ShownStep:
    """A step: its tokens, and of the draft's those that were refused."""

    tokens: list[Token]
    refused: list[Token]

    @property
    def drafted(self) -> int:
        """Tokens that were accepted from the chain or refused."""
        return self.accepted + len(self.refused)

    @property
    def accepted(self) -> int:
        """Of the chain's tokens."""
        return sum(token.origin == "draft" for token in self.tokens)


@dataclass(frozen=True)
class Sample:
    """A text: a title, the prompt ("" if it is not known) and its steps."""

    title: str
    prompt: str
    steps: list[ShownStep]

    @property
    def tokens(self) -> int:
        """How many it has."""
        return sum(len(step.tokens) for step in self.steps)


@dataclass(frozen=True)
class Bar:
    """A figure and its size in hundredths of the largest: from 0 to `size`, with an interval from
    `low` to `high` if there is one."""

    name: str
    value: str
    size: float
    low: float | None = None
    high: float | None = None
    group: str = ""


@dataclass(frozen=True)
class Card:
    """A figure that comes first."""

    value: str
    name: str
    note: str = ""


@dataclass(frozen=True)
class Table:
    """Headings and rows of text; the first column names the row."""

    headings: list[str]
    rows: list[list[str]]


@dataclass
class Page:
    """Everything that the template shows; what there is none of is empty."""

    title: str
    facts: list[tuple[str, str]] = field(default_factory=list)
    cards: list[Card] = field(default_factory=list)
    samples: list[Sample] = field(default_factory=list)
    kinds: Table | None = None
    acceptance: Chart | None = None
    speed: list[Bar] = field(default_factory=list)
    curves: list[Chart] = field(default_factory=list)
    cycles: list[Bar] = field(default_factory=list)
    cycles_note: str = ""
    benchmarks: Table | None = None
    areas: list[Bar] = field(default_factory=list)
    area_figures: Table | None = None
    ablation: Table | None = None
    sources: list[str] = field(default_factory=list)
    ignored: list[str] = field(default_factory=list)


def read_page(folder: Path) -> Page:
    """What there is to show of a folder that `speq eval` has written, and of files of `speq bench
    --json` and `speq generate --json` in it.

    Raises
    ------
    ValueError
        If a file is not as it should be.
    OSError
        If there is no report.json, or a file cannot be read.
    """
    report = folder / "report.json"
    with _naming(report):
        page = _evaluation(_parsed(read_limited(report, MAX_FILE)))
    page.sources.append(report.name)
    for path in sorted([*folder.glob("*.json"), *folder.glob("*.jsonl")]):
        if path == report:
            continue
        with _naming(path):
            used = _add(page, path)
        (page.sources if used else page.ignored).append(path.name)
    return page


@contextmanager
def _naming(path: Path) -> Iterator[None]:
    """What a file of another structure causes becomes a ValueError that names it."""
    try:
        yield
    except (
        LookupError,
        TypeError,
        ValueError,
        AttributeError,
        ArithmeticError,
        RecursionError,
    ) as error:
        what = f"{error} is missing" if isinstance(error, KeyError) else str(error)
        raise ValueError(f"{path} cannot be shown: {what}") from error


def _parsed(content: bytes | str) -> Any:
    """JSON without infinities and NaN. Raises ValueError."""
    return json.loads(content, parse_float=_finite, parse_constant=_finite)


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text:.20} is no finite number")
    return value


def _evaluation(report: Mapping[str, Any]) -> Page:
    """The page of a report.json, as `speq.cli.eval_report` describes it."""
    if report["version"] not in _VERSIONS:
        raise ValueError(f"its version is {report['version']!r:.20}: evaluate the model again")
    model, settings, costs = report["model"], report["settings"], report["costs"]
    results = {
        name: report["results"][name]
        for name in (*_RESULTS, *_POLICIES)
        if name in _RESULTS or name in report["results"]
    }
    best_of = _best(report)
    best = results[best_of]["figures"]["all"]
    draft, verify = costs["relative"]
    page = Page(_text(model["name"]))
    page.facts = _facts(report)
    speed = best["speedup"]
    page.cards = [
        Card(
            f"{_number(speed['value'])}×",
            "modelled speedup over FP16",
            f"{_number(speed['low'])} to {_number(speed['high'])} (95 %), "
            f"{_number(results['chain']['figures']['all']['speedup']['value'])} with chains alone",
        ),
        Card(_percent(best["acceptance_rate"]), "of the compared draft tokens accepted"),
        Card(_number(best["tokens_per_pass"]), "tokens committed per verify pass"),
        Card(
            _number(1e9 / float(costs["plain"]) * float(speed["value"])),
            "tokens/s for each GB/s of weights",
            f"{_number(1e9 / float(costs['plain']))} by plain decoding",
        ),
        Card(_percent(draft), "of a plain pass is what a draft pass reads"),
        Card(_percent(verify - 1), "is what the encoding adds to a verify pass"),
    ]
    page.samples = [_sample(sample) for sample in report.get("samples", [])]
    page.kinds = _kinds(results[best_of]["figures"], float(costs["plain"]))
    page.acceptance = _acceptance(report["acceptance"])
    page.speed = _speeds({name: results[name]["figures"] for name in results})
    page.curves = [
        line_chart(
            f"Speedup against the {_short(chain['setting'])}",
            _short(chain["setting"]),
            "speedup",
            [float(value) for value in chain["values"]],
            {
                _RESULTS["chain"]: _floats(chain["speedups"]),
                _RESULTS["alternates"]: _floats(alternates["speedups"]),
            },
        )
        for chain, alternates in zip(
            report["curves"]["chain"], report["curves"]["alternates"], strict=True
        )
    ]
    cycles = {name: int(costs["cycles"][name]) for name in ("plain", "draft", "verify")}
    names = {
        "plain": "plain FP16 pass, one token",
        "draft": "draft pass, one token",
        "verify": f"verify pass, {int(settings['rows'])} tokens",
    }
    largest = max(cycles.values())
    page.cycles = [
        Bar(names[name], f"{count:,}", 100 * count / largest) for name, count in cycles.items()
    ]
    page.cycles_note = (
        f"Predicted for an array of {int(settings['rows'])} × {int(settings.get('cols', 16))}, "
        "without earlier context, everything included."
    )
    if report.get("ablation"):
        page.ablation = _ablation(report["ablation"])
    return page


def _best(report: Mapping[str, Any]) -> str:
    """The result that has everything."""
    return "policy" if "policy" in report["results"] else "alternates"


def _facts(report: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The conditions of an evaluation."""
    config, settings, versions = report["model"]["config"], report["settings"], report["versions"]
    draft = settings["draft"]
    formats = ", ".join(
        f"{int(entry['tensors'])} layers at {int(entry['format'].get('width', 4))} bits in "
        f"groups of {int(entry['format']['group'])}"  # the width is in older reports
        for entry in draft["formats"]
    )
    counts = [sum(map(int, report["prompts"][name].values())) for name in report["prompts"]]
    chosen = report["results"][_best(report)]["settings"]
    length = chosen["draft_length"]
    length = int(chosen["rows"]) - 1 if length is None else int(length)
    reranked = int(chosen.get("reranked", 0))  # which older reports do not have
    exact = f", {reranked} re-ranked" if reranked else ""
    limit = int(chosen.get("policy", {}).get("limit", MAX_COST_LIMIT))
    end = chain_end(float(chosen["threshold"]), limit)
    figures = report["results"][_best(report)]["figures"]["all"]
    return [
        (
            "model",
            f"{_text(config['architecture'])}, {int(config['blocks'])} blocks, hidden size "
            f"{int(config['hidden']):,}, vocabulary {int(config['vocab_size']):,}",
        ),
        ("draft", formats + (f" ({_text(draft['encoded'])})" if draft["encoded"] else "")),
        (
            "speculation",
            f"{int(chosen['rows'])} rows, drafts of up to {length}, {end}, "
            f"{int(chosen['choices'])} choices{exact}; the best on {counts[0]} calibration prompts",
        ),
        (
            "texts",
            f"{int(figures['tokens']):,} tokens of {counts[1]} other prompts, "
            + ("continued as they are" if settings["raw"] else "in chat format"),
        ),
        (
            "made with",
            f"speq {_text(versions['speq'])}, torch {_text(versions['torch'])}, seed "
            f"{int(settings['seed'])}",
        ),
    ]


def _kinds(figures: Mapping[str, Any], plain: float) -> Table:
    """Figures by kind of text; a plain pass reads so many bytes."""
    headings = [
        *("kind of text", "tokens", "draft’s first choice right", "accepted", "tokens per pass"),
        *("drafted per pass", "stopped early", "alternate accepted", "speedup", "with KV cache"),
        "tokens/s per GB/s",
    ]
    rows = [
        [
            _text(kind),
            f"{int(f['tokens']):,}",
            _percent(f["match_rate"]),
            _percent(f["acceptance_rate"]),
            _number(f["tokens_per_pass"]),
            _number(f["drafted"]),
            _percent(f["early_exits"]),
            _percent(f["alternate_hits"]),
            _number(f["speedup"]["value"]),
            _number(f["speedup_kv"]["value"]),
            _number(1e9 / plain * float(f["speedup"]["value"])),
        ]
        for kind, f in figures.items()
    ]
    return Table(headings, rows)


def _acceptance(found: Mapping[str, Any]) -> Chart:
    series = {"first choice right": _floats(found["first"])}
    for count, shares in found["among"].items():
        series[f"among the first {int(count)} choices"] = _floats(shares)
    series["whole chain right so far"] = _floats(found["survival"])
    return line_chart(
        "Acceptance by position in the draft",
        "position in the draft",
        "share",
        list(range(1, len(found["first"]) + 1)),
        series,
        percent=True,
    )


def _speeds(figures: Mapping[str, Mapping[str, Any]]) -> list[Bar]:
    """Speedups with their intervals, by kind of text and then by way of drafting."""
    entries = [
        (kind, name, figures[name][kind]["speedup"])
        for kind in figures["chain"]
        for name in figures
    ]
    largest = max(float(speed["high"]) for _, _, speed in entries)
    return [
        Bar(
            (_RESULTS | _POLICIES)[name],
            f"{_number(speed['value'])} ({_number(speed['low'])} to {_number(speed['high'])})",
            *(100 * float(speed[part]) / largest for part in ("value", "low", "high")),
            group=_text(kind),
        )
        for kind, name, speed in entries
    ]


def _ablation(found: Mapping[str, Any]) -> Table:
    rows = []
    for result in found["rows"]:
        speed = result["speedup"]
        rows.append(
            [
                _text(result["row"]["name"]),
                _percent(result["match_rate"]),
                _number(speed["value"]),
                f"{_number(speed['low'])} to {_number(speed['high'])}",
                _percent(result["storage_added"]),
            ]
        )
    return Table(["format", "first choice right", "speedup", "95 %", "storage added"], rows)


def _sample(sample: Mapping[str, Any]) -> Sample:
    """A sample of report.json."""
    steps = []
    for step in sample["steps"]:
        tokens = [
            Token(_text(text), _origin(origin))
            for text, origin in zip(step["texts"], step["origins"], strict=True)
        ]
        # A line that is not part of the text must not break it.
        refused = [_text(text).replace("\n", "↵") for text in step["refused"]]
        steps.append(ShownStep(tokens, [Token(text, "refused") for text in refused]))
    return Sample(_text(sample["kind"]), _text(sample["prompt"]), steps)


def _origin(value: object) -> str:
    if value not in _ORIGINS:
        raise ValueError(f"an origin is {value!r:.40}; expected one of {', '.join(_ORIGINS)}")
    return str(value)


def _add(page: Page, path: Path) -> bool:
    """Add what a file beside report.json has, if it is one of `speq bench` or `speq generate`."""
    content = read_limited(path, MAX_FILE).decode()
    try:
        records = [_parsed(content)]
    except ValueError:  # an object in each line
        records = [_parsed(line) for line in content.splitlines() if line.strip()]
    used = False
    for record in records:
        if not isinstance(record, dict):
            continue
        if {"figures", "machine", "skipped"} <= record.keys():
            _add_benchmarks(page, record["figures"])
            used = True
        elif {"token_ids", "steps", "text"} <= record.keys():
            page.samples.append(_generated(record, path.name))
            used = True
    return used


def _add_benchmarks(page: Page, figures: list[Mapping[str, Any]]) -> None:
    """Figures of `speq bench`, those of areas apart."""
    headings = ["figure", "measured", "target", "met", "measured on"]
    areas = [f for f in figures if "area" in _text(f["name"])]
    units = [f for f in areas if f["unit"] != "%"]
    if units:
        largest = max(float(f["value"]) for f in units)
        page.areas = [
            Bar(
                _text(f["name"]).removeprefix("area of "),
                f"{float(f['value']):,.0f} {_text(f['unit'])}",
                100 * float(f["value"]) / largest,
            )
            for f in units
        ]
    for chosen, name in (
        ([f for f in areas if f not in units], "area_figures"),
        ([f for f in figures if f not in areas], "benchmarks"),
    ):
        if chosen:
            setattr(page, name, Table(headings, [_figure(f) for f in chosen]))


def _figure(f: Mapping[str, Any]) -> list[str]:
    value, target = float(f["value"]), f["target"]
    amount = f"{value:,.0f}" if value >= 1000 else f"{value:.4g}"
    bound = "" if target is None else f"{'≤' if f['at_most'] else '≥'} {float(target):,g}"
    met = {True: "yes", False: "no", None: ""}[f["met"]]
    return [_text(f["name"]), f"{amount} {_text(f['unit'])}".strip(), bound, met, _text(f["note"])]


def _generated(record: Mapping[str, Any], name: str) -> Sample:
    """An object of `speq generate --json`."""
    steps = []
    for step in record["steps"]:
        ids = [int(token) for token in step["tokens"]]
        accepted, hit = int(step["accepted"]), bool(step["alternate_hit"])
        origins = ["draft"] * accepted + ["alternate"] * hit
        origins += ["guess"] * int(step.get("guess_hits", 0))  # which older ones do not have
        origins += ["target"] * (len(ids) - len(origins))
        tokens = [Token(_text(t), o) for t, o in zip(step["texts"], origins, strict=True)]
        refused = [Token("", "refused")] * max(0, int(step["drafted"]) - accepted)
        steps.append(ShownStep(tokens, refused))
    return Sample(name, "", steps)


def _text(value: object) -> str:
    """A text as it is shown: control characters, what would turn the text around it, and halves of
    characters as symbols. Raises ValueError for what is no text."""
    if not isinstance(value, str):
        raise ValueError(f"{value!r:.40} is no text")
    return "".join(map(_visible, value))


def _short(value: object) -> str:
    """A text for a chart, where it is not wrapped."""
    text = _text(value)
    return text if len(text) <= _LABEL else text[: _LABEL - 1] + "…"


def _visible(character: str) -> str:
    if character in "\n\t":
        return character
    if unicodedata.category(character) not in ("Cc", "Cs") and character not in _DIRECTIONS:
        return character
    return chr(0x2400 + ord(character)) if character < " " else "\N{REPLACEMENT CHARACTER}"


def _floats(values: list[Any]) -> list[float | None]:
    return [None if value is None else float(value) for value in values]


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{float(share):.1%}"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{float(value):.2f}"
