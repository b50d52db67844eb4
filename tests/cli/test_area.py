# SPDX-License-Identifier: Apache-2.0
"""Areas of the RTL's units, measured with a library of a few cells."""

from __future__ import annotations

import gzip
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

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


@pytest.mark.usefixtures("yosys_from_pip")
def test_areas_are_sums_of_cells(tmp_path: Path) -> None:
    liberty = tmp_path / "tiny.lib"
    liberty.write_text(library(dict.fromkeys(GATES, 1) | {"flop": 100_000}))
    areas = unit_areas(CONFIG, liberty)
    flops = {unit: area // 100_000 for unit, area in areas.items()}
    assert flops["speq_exponent_remap"] == 0
    assert flops["speq_pe_fp16"] >= CONFIG.accumulator_bits + 17  # and a weight
    assert flops["speq_pe_dual"] > flops["speq_pe_fp16"]
    assert all(0 < area % 100_000 < 50_000 for area in areas.values())

    compressed = tmp_path / "tiny.lib.gz"
    compressed.write_bytes(gzip.compress(liberty.read_bytes()))
    assert unit_areas(CONFIG, compressed) == areas


def test_overheads() -> None:
    assert pe_overhead(AREAS) == pytest.approx(0.2)
    # A column of 8: the remap's 50 and the dual-mode PE's extra 200 over 8 x 1000.
    assert column_overhead(AREAS, EngineConfig(rows=8)) == pytest.approx(250 / 8000)
    both = EngineConfig(rows=8, draft_rows=2)
    assert column_overhead(AREAS, both) == pytest.approx(450 / 8000)


def bench(*arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
    inherited = {name: value for name, value in os.environ.items() if name != "LIBERTY"}
    return subprocess.run(
        [Path(sys.executable).with_name("speq"), "bench", "--only", "area", *map(str, arguments)],
        capture_output=True,
        text=True,
        env=inherited | {"COLUMNS": "200"} | environment,
    )


def test_without_a_library_it_is_skipped_with_the_reason(tmp_path: Path) -> None:
    report = tmp_path / "bench.json"
    done = bench("--json", report)
    assert done.returncode == 0, done.stderr
    assert re.fullmatch(r"area is skipped: .*--liberty FILE, or LIBERTY=FILE\n", done.stdout)
    assert list(json.loads(report.read_text())["skipped"]) == ["area"]


def test_a_file_that_is_no_library_is_one_clear_line(tmp_path: Path) -> None:
    liberty = tmp_path / "broken.lib"
    liberty.write_text("cell (")
    for done in (bench("--liberty", liberty), bench(LIBERTY=str(liberty))):
        assert done.returncode == 1
        assert done.stdout == ""
        assert re.fullmatch(rf"speq: error: {liberty}: Yosys fails on .*\n", done.stderr)


def test_a_library_that_is_missing_is_named(tmp_path: Path) -> None:
    done = bench("--liberty", tmp_path / "absent.lib")
    assert done.returncode == 1
    assert done.stderr == f"speq: error: {tmp_path}/absent.lib: No such file or directory\n"


def test_the_report_lists_areas_and_overheads(tmp_path: Path) -> None:
    liberty, report = tmp_path / "tiny.lib", tmp_path / "bench.json"
    liberty.write_text(library({"buffer": 1, "inverter": 1, "nand": 2, "nor": 3, "flop": 10}))
    done = bench("--liberty", liberty, "--json", report)
    assert done.returncode == 0, done.stderr
    figures = {figure["name"]: figure for figure in json.loads(report.read_text())["figures"]}
    areas = {unit: figures[f"area of {unit}"]["value"] for unit in AREAS}
    assert all(figures[f"area of {unit}"]["met"] is None for unit in AREAS)
    pe, array = figures["dual-mode PE, extra area"], figures["array, extra area"]
    assert pe["value"] == pytest.approx(100 * pe_overhead(areas))
    assert array["value"] == pytest.approx(100 * column_overhead(areas, EngineConfig()))
    for name in figures:
        assert name in done.stdout
