# SPDX-License-Identifier: Apache-2.0
"""Building simulations."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from speq.sim import runner

VERILOG = "module top(input clk, output reg q); always @(posedge clk) q <= !q; endmodule\n"


def test_the_library_is_compiled_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = runner.build(VERILOG, "top")
    # Another simulation, in another folder, as it may have been built before.
    monkeypatch.setattr(runner, "BUILD_ROOT", tmp_path)
    for library in first.parent.glob("library-*"):
        shutil.copytree(library, tmp_path / library.name)
    second = runner.build(VERILOG.replace("!q", "q"), "top")
    assert "verilator.cpp" in (second / "build.log").read_text()
    assert "verilated.cpp" not in (second / "build.log").read_text()
    assert (second / "verilated.o").read_bytes() == (first / "verilated.o").read_bytes()
    assert (second / "top").exists()


def test_objects_of_the_library_are_kept(tmp_path: Path) -> None:
    (tmp_path / "build").mkdir()
    (tmp_path / "library").mkdir()
    for name in ("verilated.o", "verilated_vpi.o", "Vtop.o"):
        (tmp_path / "build" / name).write_text("new")
    (tmp_path / "library" / "verilated.o").write_text("old")
    runner._keep(tmp_path / "build", tmp_path / "library")
    kept = {path.name: path.read_text() for path in (tmp_path / "library").iterdir()}
    assert kept == {"verilated.o": "old", "verilated_vpi.o": "new"}


def test_builds_without_a_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The system's default is then searched, as by a shell."""
    monkeypatch.setattr(runner, "BUILD_ROOT", tmp_path)
    monkeypatch.delenv("PATH")
    assert (runner.build(VERILOG, "top") / "top").exists()
