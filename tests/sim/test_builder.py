# SPDX-License-Identifier: Apache-2.0
"""Building simulations, and what is left of builds and runs that were interrupted or damaged."""

from __future__ import annotations

import fcntl
import logging
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from speq.hw.accelerator_config import AcceleratorConfig
from speq.hw.engine_config import EngineConfig
from speq.sim import builder, runner, session
from speq.sim.builder import SimulationError, build

VERILOG = "module top(input clk, output reg q); always @(posedge clk) q <= !q; endmodule\n"

# A test of the design, which is in a module of its own.
COCOTB_TEST = """
import cocotb
from cocotb.triggers import Timer

@cocotb.test()
async def toggles(dut):
    seen = []
    for _ in range(4):
        dut.clk.value = 0
        await Timer(1)
        dut.clk.value = 1
        await Timer(1)
        seen.append(int(dut.q.value))
    assert seen in ([0, 1, 0, 1], [1, 0, 1, 0])
"""

# Builds in another process, which ends as a command of the command line does.
BUILD_IN_PROCESS = f"""
import signal
from speq.cli import end
from speq.sim.builder import build

signal.signal(signal.SIGTERM, end)
build({VERILOG!r}, "top")
"""


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder for builds of this test alone, with what there is of Verilator's library."""
    build(VERILOG, "top")
    library = builder._library(False)
    shutil.copytree(library, tmp_path / "sim" / library.name)
    monkeypatch.setattr(builder, "BUILD_ROOT", tmp_path / "sim")
    return tmp_path / "sim"


def built_anew(caplog: pytest.LogCaptureFixture, verilog: str = VERILOG) -> bool:
    """Builds, runs the simulation for a moment, and returns whether it was not there."""
    caplog.clear()
    with caplog.at_level(logging.INFO, "speq.sim.builder"):
        folder = build(verilog, "top")
    assert os.access(folder / "top", os.X_OK)
    return any("building" in record.message for record in caplog.records)


def test_the_library_is_compiled_once(root: Path) -> None:
    folder = build(VERILOG.replace("!q", "q"), "top")
    log = (folder / "build.log").read_text()
    assert "verilator.cpp" in log
    assert "verilated.cpp" not in log
    assert "-x c++-header" not in log
    (kept,) = root.glob("library-*/verilated-*.o")
    assert (folder / "verilated.o").read_bytes() == kept.read_bytes()
    assert any(root.glob("library-*/headers.h.fast-*.gch")) and not any(folder.glob("*.gch"))


def test_what_is_in_the_library_is_kept_and_checked(tmp_path: Path) -> None:
    made, library, later = (tmp_path / name for name in ("made", "library", "later"))
    for folder in (made, library, later):
        folder.mkdir()
    headers = "headers.h.fast.gch"
    for name in ("verilated.o", "verilated_vpi.o", "Vtop.o", headers):
        (made / name).write_text("new")
    builder._keep(made, library)
    (made / "verilated.o").write_text("newer")
    builder._keep(made, library)
    assert len(list(library.iterdir())) == 3
    next(library.glob("verilated_vpi-*.o")).write_text("damaged")
    builder._take(library, later)
    taken = {path.name: path.read_text() for path in later.iterdir()}
    assert taken == {"verilated.o": "new", headers: "new"}
    assert len(list(library.iterdir())) == 2


def test_builds_without_a_path(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The system's default is then searched, as by a shell."""
    monkeypatch.delenv("PATH")
    assert (build(VERILOG, "top") / "top").exists()


def test_names_that_make_cannot_hold(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Project, packages and builds are in folders with spaces and characters outside ASCII."""
    odd = root.parent / "mit Lücke $(x) 'ж'"
    shutil.copytree(root, odd / "sim")
    for name in ("_VERILATOR_ROOT", "_COCOTB"):
        (odd / name).symlink_to(getattr(builder, name))
        monkeypatch.setattr(builder, name, odd / name)
    monkeypatch.setattr(builder, "BUILD_ROOT", odd / "sim")
    (odd / "toggle_test.py").write_text(COCOTB_TEST)
    monkeypatch.syspath_prepend(odd)
    run = runner.simulate(VERILOG, "top", "toggle_test")
    assert odd in run.parents
    assert (run / "results.xml").exists()
    assert "verilator.cpp" in (run.parent / "build.log").read_text()


def test_a_missing_compiler_is_named(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tools = root.parent / "bin"
    tools.mkdir()
    for tool in ("make", "perl"):
        (tools / tool).symlink_to(str(shutil.which(tool)))
    monkeypatch.setenv("PATH", str(tools))
    with pytest.raises(SimulationError, match=r"g\+\+ is missing: install it"):
        build(VERILOG, "top")


def test_the_end_of_the_log_is_told(root: Path) -> None:
    with pytest.raises(
        SimulationError, match=r"building the simulation of top failed.*build\.log"
    ) as e:
        build(VERILOG.replace("endmodule", ""), "top")
    assert "syntax error" in e.value.__notes__[0]


def test_a_damaged_build_is_built_anew(root: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert built_anew(caplog)
    assert not built_anew(caplog)
    (folder,) = root.glob("top-*")
    executable = (folder / "top").read_bytes()
    (folder / "top").write_bytes(executable[: len(executable) // 2])
    assert built_anew(caplog)
    assert len((folder / "top").read_bytes()) == len(executable)
    (folder / "top").unlink()
    assert built_anew(caplog)
    # An interrupted build leaves objects that are newer than their sources and not whole.
    (folder / "built").unlink()
    for path in folder.glob("*.o"):
        path.write_bytes(b"")
    assert built_anew(caplog)
    assert not built_anew(caplog)


def test_runs_of_dead_processes_are_removed(root: Path) -> None:
    folder = build(VERILOG, "top")
    ended = subprocess.Popen(["true"])
    ended.wait()
    for name in (f"run-{ended.pid}", f"run-{ended.pid}-x1", f"run-{os.getpid()}-x2"):
        (folder / name).mkdir()
        (folder / name / "test.log").write_text("")
    build(VERILOG, "top")
    assert [path.name for path in folder.glob("run-*")] == [f"run-{os.getpid()}-x2"]


@pytest.fixture
def sleeping(root: Path) -> tuple[subprocess.Popen[bytes], int]:
    """A process that builds with a compiler that does not end, and the compiler's process."""
    tools = root.parent / "bin"
    tools.mkdir()
    compiler = tools / "g++"
    compiler.write_text(f'#!/bin/sh\necho $$ > "{root.parent}/compiler"\nexec sleep 300\n')
    compiler.chmod(0o755)
    # The makefile puts the folder of this Python first, which has no g++.
    path = os.pathsep.join((str(tools), os.environ.get("PATH", os.defpath)))
    environment = os.environ | {"PATH": path, "SPEQ_BUILD": str(root.parent)}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, sys.path))
    process = subprocess.Popen([sys.executable, "-c", BUILD_IN_PROCESS], env=environment)
    number = root.parent / "compiler"
    for _ in range(300):
        if number.exists() and number.read_text().endswith("\n"):
            return process, int(number.read_text())
        time.sleep(0.1)
    process.kill()
    raise AssertionError("no compiler was started")


def test_compilers_end_with_the_command(sleeping: tuple[subprocess.Popen[bytes], int]) -> None:
    process, compiler = sleeping
    process.send_signal(signal.SIGTERM)
    assert process.wait(30) == 128 + signal.SIGTERM
    with pytest.raises(ProcessLookupError):
        for _ in range(100):  # until init has waited for it
            os.kill(compiler, 0)
            time.sleep(0.1)


def test_nobody_builds_beside_what_a_killed_process_left(
    root: Path, sleeping: tuple[subprocess.Popen[bytes], int]
) -> None:
    process, compiler = sleeping
    process.kill()
    process.wait()
    (lock,) = root.glob("top-*/lock")
    with lock.open("w") as file, pytest.raises(BlockingIOError):
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    os.killpg(os.getpgid(compiler), signal.SIGKILL)
    assert (build(VERILOG, "top") / "top").exists()


def test_verilog_is_kept(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = AcceleratorConfig(EngineConfig(rows=2, cols=8))
    calls = []

    def generate(asked: AcceleratorConfig) -> str:
        calls.append(asked)
        return f"// {asked.engine.rows} rows\n"

    monkeypatch.setattr(session, "generate_top", generate)
    for _ in range(2):
        session.top_verilog.cache_clear()
        assert session.top_verilog(config) == "// 2 rows\n"
    assert len(calls) == 1
    (kept,) = root.glob("speq_top-*.v")
    kept.write_text(kept.read_text().replace("2 rows", "3 rows"))
    session.top_verilog.cache_clear()
    assert session.top_verilog(config) == "// 2 rows\n"
    assert len(calls) == 2
    # A generator of another version.
    monkeypatch.setattr(session.number_format, "__file__", __file__)
    session.top_verilog.cache_clear()
    session.top_verilog(config)
    assert len(calls) == 3
    session.top_verilog.cache_clear()
