# SPDX-License-Identifier: Apache-2.0
"""The documents: what they name exists, and what they show works."""

from __future__ import annotations

import doctest
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
from typer.core import TyperGroup
from typer.main import get_command

import speq.cli
from speq.hw.verilog import convert_unit

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ("api", "hw", "model", "host", "sim", "cli", "tests", "docs")
PAGES = sorted([*ROOT.glob("*.md"), *(p for f in FOLDERS for p in (ROOT / f).rglob("*.md"))])
#: Written by hand, as opposed to hw/verilog/registers.md.
OWN_PAGES = [page for page in PAGES if page.parent.name != "verilog"]
README_LINES = 120

_LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
_PATH = re.compile(rf"(?<![\w./-])(?:{'|'.join(FOLDERS)})/[\w./-]*")
_FENCED = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_INDENTED = re.compile(r"^ {4,}\S.*$", re.MULTILINE)
_SPAN = re.compile(r"`([^`\n]+)`")
_CONTRACT = re.compile(r"\bC(\d)\b")

each_page = pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
each_own_page = pytest.mark.parametrize("page", OWN_PAGES, ids=lambda p: str(p.relative_to(ROOT)))


def code(page: Path) -> Iterator[str]:
    """Lines of a page's code blocks, with continued ones joined, and its code spans."""
    text = page.read_text()
    blocks = [content for language, content in _FENCED.findall(text) if language != "mermaid"]
    text = _FENCED.sub("", text)
    blocks += _INDENTED.findall(text)
    for line in "\n".join(blocks).replace("\\\n", " ").splitlines():
        yield line.partition(" #")[0]
    yield from _SPAN.findall(_INDENTED.sub("", text))


def anchors(page: Path) -> set[str]:
    """What links can name behind `#` in a page: its headings, as GitHub writes them."""
    headings = re.findall(r"^#+ (.*)$", _FENCED.sub("", page.read_text()), re.MULTILINE)
    kept = (re.sub(r"[^\w\- ]", "", heading.lower()) for heading in headings)
    return {heading.replace(" ", "-") for heading in kept}


@cache
def options() -> dict[str, set[str]]:
    """Long options of the commands of `speq`, by command, and of `speq` itself."""
    group = get_command(speq.cli.app)
    assert isinstance(group, TyperGroup)
    found = {}
    for name, command in {"speq": group, **group.commands}.items():
        names = (opt for parameter in command.params for opt in parameter.opts)
        found[name] = {"--help", *(opt for opt in names if opt.startswith("--"))}
    return found


def targets() -> set[str]:
    return set(re.findall(r"^([a-z][a-z0-9-]*):", (ROOT / "Makefile").read_text(), re.MULTILINE))


@each_page
def test_links_lead_somewhere(page: Path) -> None:
    wrong = []
    for link in _LINK.findall(page.read_text()):
        if re.match(r"https?:", link):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        if not target.exists():
            wrong.append(f"{link}: no such file")
        elif not target.is_relative_to(ROOT):
            wrong.append(f"{link}: leads out of the project")
        elif anchor and anchor not in anchors(target):
            wrong.append(f"{link}: no such heading")
    assert not wrong


@each_own_page
def test_paths_exist(page: Path) -> None:
    paths = {path.rstrip(".-") for path in _PATH.findall(page.read_text())}
    missing = sorted(path for path in paths if not (ROOT / path).exists())
    assert not missing


@each_own_page
def test_targets_exist(page: Path) -> None:
    named = {name for line in code(page) for name in re.findall(r"\bmake ([a-z][\w-]*)", line)}
    assert named <= targets()


@each_own_page
def test_commands_and_options_exist(page: Path) -> None:
    for line in code(page):
        for name, arguments in re.findall(r"\bspeq ([a-z][\w-]*)([^|&;]*)", line):
            assert name in options(), f"speq {name} in: {line}"
            unknown = set(re.findall(r"(?<!\S)--[\w-]+", arguments)) - options()[name]
            assert not unknown, f"{unknown} in: {line}"
        if line.startswith("--"):  # an option on its own
            option = line.split()[0]
            assert any(option in some for some in options().values()), f"no command has {option}"


@each_own_page
def test_commands_run_as_printed(page: Path) -> None:
    """Without an activated environment; in prose, `speq cycles` is a name."""
    rows = [line for line in page.read_text().splitlines() if line.startswith("|")]
    cells = {span for row in rows for span in _SPAN.findall(row.rpartition(" | ")[2])}
    for line in code(page):
        assert not re.match(r"(pytest|python3?|\$) ", line), line
        assert not (line in cells and re.match(r"speq [a-z-]+ -", line)), line


@each_own_page
def test_imports_in_examples_exist(page: Path) -> None:
    """Without importing them: torch takes seconds."""
    for line in code(page):
        for module, names in re.findall(r"\bfrom speq\.([\w.]+) import ([\w, ]+|\*)", line):
            path = ROOT.joinpath(*module.split("."))
            source = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
            assert source.exists(), line
            for name in names.replace("*", "").replace(",", " ").split():
                assert re.search(rf"\b{name}\b", source.read_text()), line


def test_readme_is_short_and_leads_to_every_page() -> None:
    readme = (ROOT / "README.md").read_text()
    assert len(readme.splitlines()) <= README_LINES
    linked = {(ROOT / link.partition("#")[0]).resolve() for link in _LINK.findall(readme)}
    assert set(PAGES) - {ROOT / "README.md"} <= linked


def test_readmes_figures_are_those_of_the_results() -> None:
    """Measured value, target and command of every headline figure are somewhere in results.md."""
    table = re.search(
        r"^\| figure \| measured .*\n\| ---.*\n((?:\|.*\n)+)",
        (ROOT / "README.md").read_text(),
        re.MULTILINE,
    )
    assert table is not None
    results = (ROOT / "docs/results.md").read_text()
    for row in table[1].splitlines():
        _, _, measured, target, *_ = (cell.strip() for cell in row.split("|"))
        rows = [line for line in results.splitlines() if line.startswith("|")]
        assert any(measured in line and target in line for line in rows), row


def test_contracts_that_code_refers_to_are_defined() -> None:
    contracts = (ROOT / "docs/contracts.md").read_text()
    sections = dict(re.findall(r"^## C(\d): .*\n((?:(?!## ).*\n)*)", contracts, re.MULTILINE))
    assert sorted(sections) == ["1", "2", "3", "4", "5"]
    for number, section in sections.items():
        assert re.search(r"^Held by .*tests/", section, re.MULTILINE), f"C{number} without tests"
    sources = [p for folder in FOLDERS for p in (ROOT / folder).rglob("*.py")]
    referred = {n for p in sources if p != Path(__file__) for n in _CONTRACT.findall(p.read_text())}
    assert "4" in referred and referred <= set(sections)


def test_the_worked_weight() -> None:
    failures, tried = doctest.testfile(str(ROOT / "docs/number_format.md"), module_relative=False)
    assert tried > 10 and not failures


def test_the_example_unit_is_one() -> None:
    """It is a component that becomes Verilog, and checks its argument."""
    page = (ROOT / "docs/adding_a_unit.md").read_text()
    (example,) = (content for language, content in _FENCED.findall(page) if language == "python")
    names: dict = {}
    exec(compile(example, "adding_a_unit.md", "exec", dont_inherit=True), names)
    unit = names["LargerMagnitude"]
    assert "module larger" in convert_unit(unit(8), "larger", reset=False)
    unit._MustUse__silence = True  # else Amaranth warns that it is never elaborated
    with pytest.raises(ValueError, match="bits is 17"):
        unit(17)
