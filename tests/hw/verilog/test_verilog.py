# SPDX-License-Identifier: Apache-2.0
"""The generated Verilog and its description, as other tools read them."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import sys
from collections import Counter
from pathlib import Path

import pytest
from amaranth.hdl import Elaboratable, Module
from amaranth.lib import wiring
from amaranth.lib.wiring import In, Out

from speq.hw import EngineConfig
from speq.hw.accelerator_config import AcceleratorConfig
from speq.hw.memory.axi import AxiConfig
from speq.hw.verilog import (
    ACCELERATOR_TOP,
    LINT_WAIVERS,
    TOP,
    convert_unit,
    generate_verilog,
    write_verilog,
)
from speq.model.number_format import FormatConfig
from tests.hw.verilog_tools import Generated, lint, run, system_tool, yosys

SMALL = EngineConfig(rows=2, cols=2, max_k=16)
CONFIGS = {
    "smallest": EngineConfig(rows=1, cols=1, max_k=1, max_o=1),
    "1x1": EngineConfig(rows=1, cols=1),
    "2x3": EngineConfig(rows=2, cols=3, max_k=300),
    "2x3, FP16 only": EngineConfig(rows=2, cols=3, draft_rows=0, max_k=300),
    "2x3, all rows draft": EngineConfig(
        rows=2, cols=3, draft_rows=2, format=FormatConfig(split=0, group=32)
    ),
    "3x5, 2 rows draft": EngineConfig(
        rows=3, cols=5, draft_rows=2, format=FormatConfig(split=1), max_k=4097
    ),
    "4x2": EngineConfig(rows=4, cols=2, format=FormatConfig(split=3, group=128)),
    "8x16": EngineConfig(),
}

SYSTEMS = {
    "smallest accelerator": AcceleratorConfig(
        EngineConfig(rows=1, cols=4, max_k=1, max_o=1), lanes=0
    ),
    "accelerator 2x8, narrow ports, with lanes": AcceleratorConfig(
        EngineConfig(rows=2, cols=8, draft_rows=2, max_k=300),
        weights=AxiConfig(data_bits=64, address_bits=64),
        data=AxiConfig(data_bits=128, address_bits=64),
        lanes=4,
    ),
    # Words of all kinds are wider than a beat.
    "accelerator 3x16 without a history or lanes": AcceleratorConfig(
        EngineConfig(rows=3, cols=16),
        weights=AxiConfig(data_bits=64),
        data=AxiConfig(data_bits=64),
        history=0,
        lanes=0,
    ),
}
TOPS = CONFIGS | SYSTEMS

each_config = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)


each_top = pytest.mark.parametrize("config", TOPS.values(), ids=TOPS)


def top_of(config: EngineConfig | AcceleratorConfig) -> str:
    """Name of the top module."""
    return ACCELERATOR_TOP if isinstance(config, AcceleratorConfig) else TOP


def description(folder: Path) -> dict:
    """The generated description, read back."""
    return json.loads((folder / "engine.json").read_text())


def test_the_same_configuration_gives_the_same_bytes(generated: Generated, tmp_path: Path) -> None:
    """Also in a process with another order of sets."""
    names = ("2x3", "2x3, FP16 only", "accelerator 2x8, narrow ports, with lanes")
    folders = {name: tmp_path / str(number) for number, name in enumerate(names)}
    code = (
        "import sys; from pathlib import Path\n"
        "from speq.hw import EngineConfig; from speq.hw.verilog import write_verilog\n"
        "from speq.hw.memory.axi import AxiConfig\n"
        "from speq.hw.accelerator_config import AcceleratorConfig\n"
        "from speq.model.number_format import FormatConfig\n"
    )
    for name, folder in folders.items():
        folder.mkdir()
        code += f"write_verilog({TOPS[name]!r}, Path({str(folder)!r}, 'engine.v'))\n"
    seed = "2" if os.environ.get("PYTHONHASHSEED") == "1" else "1"
    environment = os.environ | {"PYTHONHASHSEED": seed}
    done = run(sys.executable, "-c", code, env=environment)
    assert done.returncode == 0, done.stdout
    for name, again in folders.items():
        folder = generated(TOPS[name])
        files = {file.name for file in folder.iterdir()}
        assert {file.name for file in again.iterdir()} == files, name
        for file in files:
            assert (again / file).read_bytes() == (folder / file).read_bytes(), (name, file)


@each_top
def test_verilator_lints_it_without_a_warning(
    config: EngineConfig | AcceleratorConfig, generated: Generated
) -> None:
    folder = generated(config)
    assert lint(top_of(config), folder / "engine.v", folder / "engine.vlt", waivers=()) == (0, "")


@pytest.fixture(scope="module")
def unwaived(generated: Generated) -> str:
    """What Verilator's lint says of the smallest accelerator without waivers."""
    folder = generated(SYSTEMS["smallest accelerator"])
    assert description(folder)["verilator_lint_waivers"] == LINT_WAIVERS
    return lint(ACCELERATOR_TOP, folder / "engine.v", waivers=())[1]


@pytest.mark.parametrize("waiver", sorted(set(LINT_WAIVERS) - {"UNOPTFLAT"}))
def test_every_lint_waiver_is_needed(waiver: str, unwaived: str) -> None:
    """But the one that only old versions need (test_package.py)."""
    assert f"%Warning-{waiver}" in unwaived


@each_top
def test_icarus_compiles_it_without_a_warning(
    config: EngineConfig | AcceleratorConfig, generated: Generated, tmp_path: Path
) -> None:
    iverilog = system_tool("iverilog", "iverilog")
    folder = generated(config)
    tops = {top_of(config): "engine.v"}
    if isinstance(config, AcceleratorConfig):
        tops |= {f"{ACCELERATOR_TOP}_tb": "engine_tb.v", "speq_axi_example": "engine_example.v"}
    for top, file in tops.items():
        files = {folder / "engine.v", folder / file}
        options = ("-g2005", "-Wall", "-s", top, "-o", tmp_path / "engine.vvp")
        done = run(iverilog, *options, *files)
        assert (done.returncode, done.stdout) == (0, "")


@pytest.mark.parametrize("draft_rows", [0, 1])
def test_yosys_synthesises_it_without_latches(draft_rows: int, generated: Generated) -> None:
    yosys(
        generated(EngineConfig(rows=2, cols=2, draft_rows=draft_rows, max_k=16)),
        f"read_verilog engine.v; synth -top {TOP}; check -assert; "
        "select -assert-none t:$_DLATCH*; select -assert-any t:$_DFF*",
    )


def test_yosys_synthesises_an_accelerator_without_latches(generated: Generated) -> None:
    yosys(
        generated(SYSTEMS["smallest accelerator"]),
        f"read_verilog engine.v; synth -top {ACCELERATOR_TOP} -run begin:fine; check -assert; "
        "select -assert-none t:$dlatch* t:$dlatchsr t:$adlatch",
    )


def test_the_accelerators_example_fits_its_ports(generated: Generated) -> None:
    config = SYSTEMS["accelerator 2x8, narrow ports, with lanes"]
    folder = generated(config)
    example = folder / "engine_example.v"
    assert lint("speq_axi_example", example, folder / "engine.v") == (0, "")
    text = example.read_text()
    for port in description(folder)["ports"]:
        assert f"    .{port['name']}(" in text
    for prefix, port in (("m_axi_weights", config.weights), ("m_axi_data", config.data)):
        assert f"input [{port.data_bits - 1}:0] {prefix}_rdata" in text
        assert f"output [3:0] {prefix}_arqos" in text
    assert "m_axi_weights_awqos" not in text


class _Mistranslated(wiring.Component):
    """A signal of which one part is constant and another assigned conditionally."""

    def __init__(self) -> None:
        super().__init__({"a": In(1), "y": Out(8)})

    def elaborate(self, platform: object) -> Elaboratable:
        m = Module()
        m.d.comb += self.y[:4].eq(5)
        with m.If(self.a):
            m.d.comb += self.y[4:].eq(3)
        return m


def test_what_verilog_would_misunderstand_is_refused() -> None:
    with pytest.raises(ValueError, match=r"unit: Verilog has another meaning for .always"):
        convert_unit(_Mistranslated(), "unit")


class _Chain(wiring.Component):
    """A chain of steps each of which uses the value before it twice."""

    def __init__(self, steps: int) -> None:
        self.steps = steps
        super().__init__({"a": In(8), "y": Out(8)})

    def elaborate(self, platform: object) -> Elaboratable:
        m = Module()
        value = self.a
        for _ in range(self.steps):
            value = value ^ (value + 1)[:8]
        m.d.comb += self.y.eq(value)
        return m


def test_a_value_that_is_used_twice_is_written_once() -> None:
    text = convert_unit(_Chain(10), "chain")
    assert text.count("^") == 10
    assert text.count("+") == 10


@each_config
def test_the_description_has_the_ports_and_units(
    config: EngineConfig, generated: Generated, tmp_path: Path
) -> None:
    shutil.copy(generated(config) / "engine.v", tmp_path)
    yosys(tmp_path, f"read_verilog engine.v; hierarchy -top {TOP}; proc; write_json net.json")
    modules = json.loads((tmp_path / "net.json").read_text())["modules"]
    said = description(generated(config))

    def ports(module: str) -> dict[str, tuple[str, int]]:
        found = modules[module]["ports"].items()
        return {name: (port["direction"], len(port["bits"])) for name, port in found}

    assert said["top"] == TOP
    described = said["ports"]
    assert {p["name"]: (p["direction"], p["width"]) for p in described} == ports(TOP)
    assert len(described) == len(ports(TOP))

    cells = Counter(c["type"] for module in modules.values() for c in module["cells"].values())
    drafting = config.draft_rows * config.cols
    assert cells["speq_pe_dual"] == drafting
    assert cells["speq_pe_fp16"] == config.rows * config.cols - drafting
    assert cells["speq_exponent_remap"] == (config.cols if config.draft_rows else 0)
    assert cells["speq_rounder"] == config.cols

    parameters = said["parameters"]
    assert (
        EngineConfig(
            **{name: parameters[name] for name in ("rows", "cols", "draft_rows", "max_k", "max_o")},
            format=FormatConfig(**parameters["format"]),
        )
        == config
    )
    assert ports("speq_rounder")["sum"] == ("input", parameters["accumulator_bits"])
    assert all(cycles > 0 for cycles in said["latencies"].values())


def test_a_large_array_has_each_unit_once_and_is_small() -> None:
    text, _ = generate_verilog(EngineConfig(rows=8, cols=64))
    modules = re.findall(r"^module (\S+?)[ (]", text, re.MULTILINE)
    for name in ("speq_pe_dual", "speq_pe_fp16", "speq_exponent_remap", "speq_rounder", "speq_ram"):
        assert modules.count(name) == 1
    assert len(modules) == len(set(modules))
    assert len(text) <= 1_800_000


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="absent: no such folder"):
        write_verilog(SMALL, tmp_path / "absent" / "engine.v")
    assert list(tmp_path.iterdir()) == []


def test_an_unwritable_folder_stays_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "engine.v").write_text("")
    tmp_path.chmod(0o500)
    try:
        if os.access(tmp_path, os.W_OK):
            pytest.skip("this user may write to any folder")
        with pytest.raises(PermissionError):
            write_verilog(SMALL, tmp_path / "engine.v")
    finally:
        tmp_path.chmod(0o700)
    assert [path.name for path in tmp_path.iterdir()] == ["engine.v"]
    assert (tmp_path / "engine.v").read_text() == ""


def test_a_full_disk_leaves_nothing_half_written(
    generated: Generated, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_text = Path.write_text

    def fill_the_disk(path: Path, text: str) -> None:
        write_text(path, text[: len(text) // 2])
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

    shutil.copytree(generated(SMALL), tmp_path, dirs_exist_ok=True)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    monkeypatch.setattr(Path, "write_text", fill_the_disk)
    with pytest.raises(OSError, match="No space left"):
        write_verilog(EngineConfig(rows=1, cols=1), tmp_path / "engine.v")
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_the_description_never_replaces_the_verilog(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"engine\.json"):
        write_verilog(SMALL, tmp_path / "engine.json")
    assert list(tmp_path.iterdir()) == []
