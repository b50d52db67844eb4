# SPDX-License-Identifier: Apache-2.0
"""Areas of the RTL's units, measured with a library of a few cells."""

from __future__ import annotations

import gzip
import json
import re
import shutil
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

import speq.cli
from speq.cli.area import column_overhead, pe_overhead, unit_areas
from speq.hw import EngineConfig

CONFIG = EngineConfig(rows=2, cols=1, max_k=16)
AREAS = {
    "speq_exponent_remap": 50.0,
    "speq_pe_dual": 1200.0,
    "speq_pe_fp16": 1000.0,
    "speq_rounder": 700.0,
}
GATES = {"buffer": "A", "inverter": "!A", "nand": "!(A & B)", "nor": "!(A | B)"}

Bench = Callable[..., SimpleNamespace]


def library(areas: dict[str, float]) -> str:
    """A Liberty file with a few gates and a flip-flop, and their areas."""

    def pin(name: str, attributes: str) -> str:
        return f"    pin ({name}) {{ {attributes} }}\n"

    cells = []
    for name, function in GATES.items():
        inputs = "".join(pin(letter, "direction: input;") for letter in "AB" if letter in function)
        output = pin("Y", f'direction: output; function: "{function}";')
        cells.append(f"  cell ({name}) {{\n    area: {areas[name]};\n{inputs}{output}  }}\n")
    cells.append(
        f"  cell (flop) {{\n    area: {areas['flop']};\n"
        '    ff (IQ, IQN) { clocked_on: "C"; next_state: "D"; }\n'
        + pin("C", "direction: input; clock: true;")
        + pin("D", "direction: input;")
        + pin("Q", 'direction: output; function: "IQ";')
        + "  }\n"
    )
    return f"library (tiny) {{\n{''.join(cells)}}}\n"


@pytest.fixture
def yosys_from_pip(monkeypatch: pytest.MonkeyPatch) -> None:
    """Hide an installed Yosys, which may be of any age."""
    monkeypatch.setenv("PATH", str(Path(sys.executable).parent))
    if shutil.which("yosys"):
        pytest.skip("a Yosys lies beside the interpreter")


def test_a_library_has_an_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A small file may unpack to one that fills the disk."""
    monkeypatch.setattr("speq.cli.area.MAX_LIBRARY", 1 << 22)
    liberty = tmp_path / "bomb.lib.gz"
    liberty.write_bytes(gzip.compress(bytes(1 << 25)))
    with pytest.raises(ValueError, match=r"bomb\.lib\.gz has more than 4,194,304 bytes"):
        unit_areas(CONFIG, liberty)


def test_overheads() -> None:
    assert pe_overhead(AREAS) == pytest.approx(0.2)
    # A column of 8: the remap's 50 and the dual-mode PE's extra 200 over 8 x 1000.
    assert column_overhead(AREAS, EngineConfig(rows=8)) == pytest.approx(250 / 8000)
    both = EngineConfig(rows=8, draft_rows=2)
    assert column_overhead(AREAS, both) == pytest.approx(450 / 8000)


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Bench:
    """Call `speq bench --only area` with arguments and environment variables."""
    monkeypatch.setattr(warnings, "showwarning", warnings.showwarning)  # main() replaces it
    for name in ("LIBERTY", "SPEQ_DEBUG"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("COLUMNS", "200")

    def call(*arguments: object, **environment: str) -> SimpleNamespace:
        command = ["speq", "bench", "--only", "area", *map(str, arguments)]
        with monkeypatch.context() as patched:
            patched.setattr(sys, "argv", command)
            for name, value in environment.items():
                patched.setenv(name, value)
            with pytest.raises(SystemExit) as stop:
                speq.cli.main()
        captured = capsys.readouterr()
        return SimpleNamespace(
            returncode=stop.value.code or 0, stdout=captured.out, stderr=captured.err
        )

    return call


def test_without_a_library_it_is_skipped_with_the_reason(bench: Bench, tmp_path: Path) -> None:
    report = tmp_path / "bench.json"
    done = bench("--json", report)
    assert done.returncode == 0, done.stderr
    assert re.fullmatch(r"area is skipped: .*--liberty FILE, or LIBERTY=FILE\n", done.stdout)
    assert list(json.loads(report.read_text())["skipped"]) == ["area"]


def test_a_file_that_is_no_library_is_one_clear_line(bench: Bench, tmp_path: Path) -> None:
    liberty = tmp_path / "broken.lib"
    liberty.write_text("cell (")
    for done in (bench("--liberty", liberty), bench(LIBERTY=str(liberty))):
        assert done.returncode == 1
        assert done.stdout == ""
        assert re.fullmatch(rf"speq: error: {liberty}: Yosys fails on .*\n", done.stderr)


def test_a_broken_library_shows_before_the_units_are_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("work for nothing")

    monkeypatch.setattr("speq.cli.area.convert_unit", refuse)
    for text in ("cell (", ""):
        (tmp_path / "broken.lib").write_text(text)
        with pytest.raises(ValueError, match=r"broken\.lib: Yosys fails on it: (ERROR|exit code)"):
            unit_areas(CONFIG, tmp_path / "broken.lib")


def test_a_library_that_is_missing_is_named(bench: Bench, tmp_path: Path) -> None:
    done = bench("--liberty", tmp_path / "absent.lib")
    assert done.returncode == 1
    assert done.stderr == f"speq: error: {tmp_path}/absent.lib: No such file or directory\n"


@pytest.mark.usefixtures("yosys_from_pip")
def test_the_report_lists_areas_and_overheads(bench: Bench, tmp_path: Path) -> None:
    """Areas are sums of cells. The library is compressed."""
    liberty, report = tmp_path / "tiny.lib.gz", tmp_path / "bench.json"
    text = library({"buffer": 1, "inverter": 1, "nand": 2, "nor": 3, "flop": 1_000_000})
    liberty.write_bytes(gzip.compress(text.encode()))
    done = bench("--liberty", liberty, "--json", report)
    assert done.returncode == 0, done.stderr
    figures = {figure["name"]: figure for figure in json.loads(report.read_text())["figures"]}
    areas = {unit: figures[f"area of {unit}"]["value"] for unit in AREAS}
    assert all(figures[f"area of {unit}"]["met"] is None for unit in AREAS)
    flops = {unit: area // 1_000_000 for unit, area in areas.items()}
    assert flops["speq_exponent_remap"] == 0
    # And a weight.
    assert flops["speq_pe_fp16"] >= EngineConfig().accumulator_bits + 17
    assert flops["speq_pe_dual"] > flops["speq_pe_fp16"]
    assert all(0 < area % 1_000_000 < 500_000 for area in areas.values())
    pe, array = figures["dual-mode PE, extra area"], figures["array, extra area"]
    assert pe["value"] == pytest.approx(100 * pe_overhead(areas))
    assert array["value"] == pytest.approx(100 * column_overhead(areas, EngineConfig()))
    for name in figures:
        assert name in done.stdout
