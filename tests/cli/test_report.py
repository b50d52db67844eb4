# SPDX-License-Identifier: Apache-2.0
"""`speq report`: what is on the page, hostile texts, damaged files, and how a browser shows it."""

from __future__ import annotations

import html
import json
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from html.parser import HTMLParser
from itertools import product
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from speq.cli.report import render
from speq.cli.report_charts import line_chart
from speq.cli.report_page import read_page
from tests.model.small_models import random_weights, small_config, write_gguf
from tests.test_project import ROOT

SEED = int(os.environ.get("SPEQ_SEED", "0"))
TEMPLATE = (ROOT / "cli/report.html.jinja").read_text()
HOST = "fetched.invalid"
HOSTILE = (
    f'<script>document.title="run"</script><img src="http://{HOST}/a" onerror="document.title=1">'
    f"</p></style><link rel=stylesheet href=//{HOST}/b>&amp;{{{{ 7 * 7 }}}}{{% raw %}}]]>--><!--"
    "\x1b[31m\x00\u202e'\"` " + "w" * 300
)
#: A figure of each kind that `speq bench` has.
FIGURES = [
    {"name": "encode", "value": 3.25, "unit": "s", "target": 15, "at_most": True, "met": True},
    {"name": "rate", "value": 65_000.0, "unit": "/s", "target": 1e5, "at_most": False},
    {"name": "area of one", "value": 17_200.0, "unit": "um2", "target": None, "at_most": True},
    {"name": "area of other", "value": 8_600.0, "unit": "um2", "target": None, "at_most": True},
    {"name": "array, extra area", "value": 6.0, "unit": "%", "target": 5, "at_most": True},
]
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory) -> Path:
    """A folder that `speq eval` has written."""
    from typer.testing import CliRunner

    from speq.cli import app

    folder = tmp_path_factory.mktemp("evaluated")
    config = small_config(tied_head=False, context=512)
    write_gguf(folder / "random.gguf", config, random_weights(config, SEED))
    options = ("--prompts-per-kind", "1", "--max-tokens", "10", "--rows", "4")
    out = str(folder / "out")
    made = CliRunner().invoke(app, ["eval", str(folder / "random.gguf"), *options, "-o", out])
    assert made.exit_code == 0, made.output
    return folder / "out"


@pytest.fixture
def folder(evaluated, tmp_path) -> Path:
    """A copy of it."""
    shutil.copytree(evaluated, tmp_path / "out")
    return tmp_path / "out"


def content(folder: Path) -> dict:
    return json.loads((folder / "report.json").read_text())


def bench_file(path: Path, note: str = "here") -> None:
    """A file of `speq bench --json`."""
    figures = [{"met": None, "note": note, **figure} for figure in FIGURES]
    path.write_text(json.dumps({"seed": 0, "machine": {}, "figures": figures, "skipped": {}}))


class Document(HTMLParser):
    """A page's elements and its text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.parts: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag in self.open:
            while self.open.pop() != tag:
                pass

    def handle_data(self, data: str) -> None:
        if self.open[-1:] not in (["style"], ["script"]):
            self.parts.append(data)

    @property
    def text(self) -> str:
        return "".join(self.parts)


# What is on it.


def test_everything_of_an_evaluation_is_on_the_page(speq_command, folder) -> None:
    bench_file(folder / "bench.json")
    (folder / "other.json").write_text('{"x": 1}')
    made = speq_command("report", folder)
    assert made.code == 0, made.err
    assert made.out == (
        "not shown: other.json (not of speq bench or speq generate --json)\n"
        f"written: {folder / 'report.html'}, from report.json, bench.json\n"
    )
    report, text = content(folder), Document((folder / "report.html").read_text()).text
    assert report["version"] == 4
    for name in ("chain", "alternates"):
        for kind, figures in report["results"][name]["figures"].items():
            speed = figures["speedup"]
            assert kind in text
            assert f"{speed['value']:.2f} ({speed['low']:.2f} to {speed['high']:.2f})" in text
    best = report["results"]["alternates"]["figures"]["all"]
    assert f"{best['speedup']['value']:.2f}×" in text and f"{best['match_rate']:.1%}" in text
    for count in report["costs"]["cycles"].values():
        assert f"{count:,}" in text
    for shares in (report["acceptance"]["first"], report["acceptance"]["survival"]):
        assert all(f"{share:.1%}" in text for share in shares if share is not None)
    for curves in report["curves"].values():
        assert all(f"{speedup:.2f}" in text for curve in curves for speedup in curve["speedups"])
    for expected in ("17,200 um2", "3.25 s", "≤ 15", "65,000 /s", "≥ 100,000", "≤ 5", "here"):
        assert expected in text
    assert "Ablation" not in text


def test_texts_are_shown_token_by_token(folder) -> None:
    """With their origins, and what was refused where it was."""
    report = content(folder)
    assert [sample["kind"] for sample in report["samples"]] == [*report["prompts"]["evaluation"]]
    shown: list[tuple[str | None, str]] = []
    for article in render(read_page(folder)).split("<article")[1:]:
        text = article.split('<p class="text"')[1].split("</p>")[0]
        spans = re.findall(r'<span class="t (\w+)" title="\w+">(.*?)</span>', text, re.DOTALL)
        shown += [(origin, html.unescape(token)) for origin, token in spans]
    expected = []
    for sample in report["samples"]:
        for step in sample["steps"]:
            tokens = list(zip(step["origins"], step["texts"], strict=True))
            accepted = step["origins"].count("draft")
            refused = [("refused", text.replace("\n", "↵")) for text in step["refused"] if text]
            expected += [*tokens[:accepted], *refused, *tokens[accepted:]]
    symbols = {code: 0x2400 + code for code in range(32) if chr(code) not in "\n\t"}
    symbols |= dict.fromkeys((*range(0x7F, 0xA0), *range(0x202A, 0x202F)), 0xFFFD)
    assert shown == [(origin, text.translate(symbols)) for origin, text in expected]
    assert {"draft", "target"} <= {origin for origin, _ in shown}


def test_texts_of_speq_generate_are_shown(folder, speq_command) -> None:
    """One object, or one in each line."""
    options = ("--json", "--max-tokens", 6, "--rows", 4, "--prompt", "Once upon a time")
    made = speq_command("generate", "tiny", *options)
    assert made.code == 0, made.err
    record = json.loads(made.out)
    (folder / "one.json").write_text(made.out)
    (folder / "many.jsonl").write_text(made.out * 2)
    page = read_page(folder)
    assert page.sources == ["report.json", "many.jsonl", "one.json"] and not page.ignored
    samples = page.samples[-3:]
    assert [sample.title for sample in samples] == ["many.jsonl", "many.jsonl", "one.json"]
    for sample in samples:
        assert "".join(t.text for step in sample.steps for t in step.tokens) == record["text"]
        assert sample.tokens == 6
    page_text = Document(render(page)).text
    assert all(page_text.count(t.strip()) >= 3 for s in record["steps"] for t in s["texts"])


def test_reports_of_the_version_before_have_no_texts(folder) -> None:
    report = content(folder)
    del report["samples"]
    (folder / "report.json").write_text(json.dumps(report | {"version": 2}))
    page = read_page(folder)
    assert page.samples == [] and "token by token" not in Document(render(page)).text


def test_an_ablation_is_a_table(folder) -> None:
    speed = {"value": 1.5, "low": 1.25, "high": 1.75}
    row = {"row": {"name": "split 2"}, "match_rate": 0.718, "speedup": speed, "storage_added": 0.0}
    report = content(folder) | {"ablation": {"rows": [row], "lossy": []}}
    (folder / "report.json").write_text(json.dumps(report))
    assert read_page(folder).ablation.rows == [["split 2", "71.8%", "1.50", "1.25 to 1.75", "0.0%"]]


def test_lines_have_gaps_where_there_is_no_figure() -> None:
    chart = line_chart("t", "x", "y", [1, 2, 3, 4], {"a": [0.1, None, 0.3, 0.4]}, percent=True)
    (line,) = chart.lines
    assert [len(part.split()) for part in line.parts] == [1, 2]
    assert len(line.marks) == 3 and chart.rows[2] == ["2", "-"]
    assert {tick.text for tick in chart.y_ticks} >= {"0%", "100%"}


# What others may have put there.


def hostile(value: Any) -> Any:
    """A value with hostile texts in the place of all."""
    if isinstance(value, dict):
        return {key: hostile(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [hostile(entry) for entry in value]
    kept = (None, "draft", "alternate", "target")
    return value if not isinstance(value, str) or value in kept else HOSTILE


@pytest.fixture
def hostile_page(folder) -> Path:
    """The page of a report all of whose texts are hostile."""
    report = hostile(content(folder))
    for figures in (report["results"][name]["figures"] for name in report["results"]):
        figures[HOSTILE] = figures["all"]
    (folder / "report.json").write_text(json.dumps(report))
    bench_file(folder / "bench.json", note=HOSTILE)
    page = folder / "report.html"
    page.write_text(render(read_page(folder)))
    return page


def test_texts_stay_texts(hostile_page) -> None:
    page = hostile_page.read_text()
    document = Document(page)
    tags = {tag for tag, _ in document.elements}
    assert not tags & {"script", "img", "link", "iframe", "object", "embed", "a", "form", "base"}
    names = {name for _, attributes in document.elements for name in attributes}
    assert not names & {"src", "href", "srcset", "style", "data", "action"}
    assert not [name for name in names if name.startswith("on")]
    assert '<script>document.title="run"</script>' in document.text
    assert "{{ 7 * 7 }}" in document.text and "49" not in HOSTILE
    assert not {*"\x1b\x00\u202e"} & {*page} and "␛[31m␀\ufffd" in document.text
    policies = [a["content"] for _, a in document.elements if "http-equiv" in a]
    assert policies == [
        "default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"
    ]
    assert "url(" not in page and "@import" not in page


def paths(value: object, path: tuple = ()) -> Iterator[tuple]:
    """Ways to everything in a JSON value."""
    entries = value.items() if isinstance(value, dict) else enumerate(value)
    for key, entry in entries:
        yield (*path, key)
        if isinstance(entry, dict | list):
            yield from paths(entry, (*path, key))


def test_damaged_reports_are_refused_by_name(folder) -> None:
    """Whatever is missing or of another type, there is one line, and never half a page."""
    original = content(folder)
    refused = shown = 0
    every = [*paths(original)]
    for path, wrong in product(every[:: max(1, len(every) // 100)], (None, "x", [1], {}, 1e400)):
        report = json.loads(json.dumps(original))
        place = report
        for key in path[:-1]:
            place = place[key]
        if wrong is None and isinstance(place, dict):
            del place[path[-1]]
        else:
            place[path[-1]] = wrong
        (folder / "report.json").write_text(json.dumps(report))
        try:
            render(read_page(folder))
            shown += 1
        except ValueError as error:
            assert str(error).startswith(f"{folder / 'report.json'} cannot be shown: ")
            refused += 1
    assert refused > shown / 4


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("report.json", "{", "report.json cannot be shown: Expecting property name"),
        (
            "report.json",
            '{"version": 1}',
            "its version is 1: evaluate the model again",
        ),
        ("report.json", "[]", "report.json cannot be shown"),
        ("bench.json", "{", "bench.json cannot be shown: Expecting property name"),
        (
            "bench.json",
            '{"figures": [{}], "machine": {}, "skipped": {}}',
            "bench.json cannot be shown: 'name' is missing",
        ),
        ("more.json", '{"token_ids": [], "steps": [{}], "text": ""}', "'tokens' is missing"),
    ],
)
def test_errors_are_one_line_and_leave_nothing(speq_command, folder, name, text, message) -> None:
    (folder / name).write_text(text)
    made = speq_command("report", folder)
    assert made.code == 1 and made.out == ""
    (line,) = made.err
    assert line.startswith("speq: error: ") and message in line
    assert not (folder / "report.html").exists()


def test_only_own_pages_are_replaced(speq_command, folder, tmp_path) -> None:
    for _ in range(2):
        assert speq_command("report", folder).code == 0
    (folder / "report.html").write_text("mine")
    made = speq_command("report", folder)
    assert made.code == 1 and "a file that this command did not write" in made.err[0]
    assert (folder / "report.html").read_text() == "mine"
    assert speq_command("report", folder, "--force").code == 0
    assert speq_command("report", folder, "-o", tmp_path / "page.html").code == 0
    assert (tmp_path / "page.html").read_bytes() == (folder / "report.html").read_bytes()
    made = speq_command("report", tmp_path / "nowhere", "-o", tmp_path / "x.html")
    assert made.code == 1 and "report.json: No such file" in made.err[0]
    assert not (tmp_path / "x.html").exists()


# How it looks.


def colours(block: str) -> dict[str, str]:
    return dict(re.findall(r"--([\w-]+): (#[0-9a-f]{6});", block))


def contrast(one: str, other: str) -> float:
    """Of two colours, as the Web Content Accessibility Guidelines 2.2 define it."""

    def luminance(colour: str) -> float:
        channels = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    low, high = sorted(map(luminance, (one, other)))
    return (high + 0.05) / (low + 0.05)


def test_colours_can_be_told_from_their_background() -> None:
    """Text by 4.5, lines and bars by 3, in light, in dark and on paper."""
    themes = [colours(block) for block in re.findall(r":root \{(.*?)\}", TEMPLATE, re.DOTALL)]
    assert len(themes) == 3
    for theme in themes:
        for text, back in product(("text", "quiet", "refused"), ("page", "panel")):
            assert contrast(theme[text], theme[back]) >= 4.5, (text, back)
        for origin in ("draft", "alternate", "target"):
            assert contrast(theme[origin], theme[f"{origin}-back"]) >= 4.5, origin
        for series in ("c0", "c1", "c2", "c3"):
            assert contrast(theme[series], theme["page"]) >= 3, series


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    """Run a headless browser with options on a page: its output."""
    program = next(filter(None, map(shutil.which, BROWSERS)), None)
    if program is None:
        pytest.skip("no browser: install chromium")

    def run(page: Path, *options: str) -> str:
        fixed = (
            *("--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--hide-scrollbars"),
            *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
            f"--user-data-dir={tmp_path_factory.mktemp('browser')}",
        )
        made = subprocess.run(
            [program, *fixed, *options, page.as_uri()], capture_output=True, text=True, timeout=60
        )
        assert made.returncode == 0, made.stderr
        return made.stdout

    return run


def test_a_browser_runs_and_fetches_nothing(browser, hostile_page, tmp_path) -> None:
    log = tmp_path / "log.json"
    document = Document(browser(hostile_page, "--dump-dom", f"--log-net-log={log}"))
    assert "script" not in {tag for tag, _ in document.elements}
    assert '<script>document.title="run"</script>' in document.text
    assert HOST not in log.read_text()
    # The log would tell.
    other = tmp_path / "other.html"
    other.write_text(f'<img src="http://{HOST}/a">')
    browser(other, "--dump-dom", f"--log-net-log={log}")
    assert HOST in log.read_text()


@pytest.mark.parametrize("width", [320, 700, 1300])
def test_nothing_is_wider_than_the_window(browser, hostile_page, tmp_path, width) -> None:
    """But tables in a region of their own, which scrolls. The page is measured in a frame."""
    page = re.sub(r"<meta http-equiv=[^>]*>", "", hostile_page.read_text())
    script = (
        "const page = document.querySelector('iframe').contentDocument;"
        "const root = page.documentElement;"
        "const shown = [...page.querySelectorAll('body *')].filter(e => !e.closest('.scroll'));"
        "const wide = shown.filter(e => e.getBoundingClientRect().right > root.clientWidth + 1);"
        "document.title = JSON.stringify("
        "[root.scrollWidth, root.clientWidth, wide.map(e => e.tagName + e.textContent)]);"
    )
    frame = tmp_path / "frame.html"
    frame.write_text(
        f'<meta charset="utf-8"><title></title><iframe width="{width}" height="600" '
        f'style="border:0" srcdoc="{html.escape(page)}"></iframe>'
        f"<script>window.onload = () => {{ {script} }}</script>"
    )
    (title,) = re.findall(r"<title>(.*?)</title>", browser(frame, "--dump-dom"))[:1]
    found, available, wide = json.loads(html.unescape(title))
    assert available == width and wide == [] and found == width


def test_light_dark_and_paper(browser, hostile_page, tmp_path) -> None:
    pictures = {}
    for name, options in (("light", ()), ("dark", ("--blink-settings=preferredColorScheme=0",))):
        file = tmp_path / f"{name}.png"
        browser(hostile_page, "--window-size=1000,1400", f"--screenshot={file}", *options)
        with Image.open(file) as image:
            pictures[name] = image.convert("RGB")
    pixels = {name: picture.getpixel((2, 2)) for name, picture in pictures.items()}
    corner = {name: "#{:02x}{:02x}{:02x}".format(*pixel) for name, pixel in pixels.items()}
    themes = [colours(block) for block in re.findall(r":root \{(.*?)\}", TEMPLATE, re.DOTALL)]
    assert corner == {"light": themes[0]["page"], "dark": themes[1]["page"]}
    for picture in pictures.values():
        assert len(picture.getcolors(1 << 20)) > 100
    browser(hostile_page, f"--print-to-pdf={tmp_path / 'page.pdf'}")
    assert (tmp_path / "page.pdf").read_bytes().startswith(b"%PDF-")


def test_re_ranking_is_named(folder) -> None:
    assert "re-ranked" not in Document(render(read_page(folder))).text
    report = content(folder)
    report["results"]["alternates"]["settings"]["reranked"] = 5
    (folder / "report.json").write_text(json.dumps(report))
    assert "choices, 5 re-ranked; the best on" in Document(render(read_page(folder))).text
