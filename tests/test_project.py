# SPDX-License-Identifier: Apache-2.0
"""The project itself: pinned versions, licence headers and what the Makefile promises."""

from __future__ import annotations

import os
import re
import runpy
import shutil
import subprocess
import sys
import tomllib
from importlib.metadata import distribution
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
PINS = {
    canonicalize_name(requirement.name): requirement.specifier
    for line in (ROOT / "constraints.txt").read_text().splitlines()
    if line and not line.startswith("#")
    for requirement in [Requirement(line)]
}
#: What only `make check-models` installs.
#: What only a target of its own installs.
SEPARATE = {
    canonicalize_name(Requirement(line).name)
    for line in (ROOT / "constraints.txt").read_text().partition("# Only")[2].splitlines()[1:]
}
TARGETS = (
    "setup",
    "demo",
    "demo-smollm2",
    "verilog",
    "sim",
    "test",
    "lint",
    "typings",
    "bench",
    "timing",
    "check-models",
    "check-cluster",
    "clean",
)
#: Folders whose modules are installed.
SHIPPED = ("api", "hw", "model", "sim", "cli", "host")
# Parts of torch's accelerator builds, which a CPU build does not have.
ACCELERATOR_PREFIXES = ("nvidia-", "cuda-", "triton")


def installed_closure() -> dict[str, Version]:
    """Versions of everything that the project and its dev extra need, as installed."""
    found: dict[str, Version] = {}
    todo = [Requirement("speq[dev]")]
    while todo:
        wanted = todo.pop()
        name = canonicalize_name(wanted.name)
        package = distribution(name)
        for line in package.requires or ():
            needed = Requirement(line)
            extras = wanted.extras | {""}
            if needed.marker is None or any(needed.marker.evaluate({"extra": e}) for e in extras):
                needed_name = canonicalize_name(needed.name)
                if needed_name not in found or needed.extras:
                    found[needed_name] = Version(distribution(needed_name).version)
                    todo.append(needed)
    return {n: v for n, v in found.items() if not n.startswith(ACCELERATOR_PREFIXES)}


def test_every_pin_is_exact() -> None:
    for name, specifiers in PINS.items():
        operators = [s.operator for s in specifiers]
        assert operators == ["=="], f"{name} is pinned with {specifiers}"
        assert "*" not in str(specifiers), f"{name} is pinned with {specifiers}"


def test_everything_installed_is_pinned_and_nothing_else_is() -> None:
    closure = installed_closure()
    unpinned = sorted(set(closure) - set(PINS))
    assert not unpinned, f"add to constraints.txt: {unpinned}"
    for extra in ("dask", "hf", "oracle", "timing"):
        wanted = {*map(canonicalize_name, PROJECT["optional-dependencies"][extra])}
        assert wanted <= SEPARATE | set(closure)
    unused = sorted(set(PINS) - set(closure) - SEPARATE)
    assert not unused, f"remove from constraints.txt: {unused}"
    different = {n: str(v) for n, v in closure.items() if not PINS[n].contains(v)}
    assert not different, f"installed versions differ from constraints.txt: {different}"


def test_licence_headers() -> None:
    sources = [
        path
        for folder in (*SHIPPED, "tests", "typings", "docs")
        for path in (ROOT / folder).rglob("*.py")
    ]
    assert len(sources) > 5
    for path in sources:
        first, second = path.read_text().split("\n")[:2]
        assert first == "# SPDX-License-Identifier: Apache-2.0", path
        assert re.match(r'r?"""\S', second), f"{path} has no module docstring after its licence"


def test_every_folder_of_modules_is_a_package() -> None:
    """Also for an editable installation, which finds no namespaces inside a package."""
    setuptools = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    for folder in {path.parent for name in SHIPPED for path in (ROOT / name).rglob("*.py")}:
        assert (folder / "__init__.py").exists(), folder
        place = ".".join(folder.relative_to(ROOT).parts)
        name = "speq" if place == "api" else f"speq.{place}"
        assert name in setuptools["packages"], f"add {name} to pyproject.toml"


def run_make(
    folder: Path, *arguments: str, path: str | None = None
) -> subprocess.CompletedProcess[str]:
    """Run make in `folder` as from a fresh shell, with PATH set to `path` if it is given."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("MAKE", "MFLAGS"))}
    if path is not None:
        environment["PATH"] = path
    make = shutil.which("make")
    assert make is not None
    return subprocess.run(
        [make, *arguments], cwd=folder, env=environment, capture_output=True, text=True, timeout=60
    )


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A folder with what the Makefile needs to decide what to do, and no virtual environment."""
    for name in ("Makefile", "pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, tmp_path)
    return tmp_path


def pretend_installed(tree: Path) -> None:
    """Give `tree` a finished virtual environment, as far as make can see it."""
    (tree / ".venv/bin").mkdir(parents=True)
    (tree / ".venv/bin/python").symlink_to(sys.executable)
    (tree / ".venv/.installed").write_text(f"{tree.resolve()}\n")


def tools(folder: Path, *names: str) -> str:
    """A PATH on which only these of the system's programs are found."""
    folder.mkdir()
    for name in names:
        program = shutil.which(name)
        assert program is not None, name
        (folder / name).symlink_to(program)
    return str(folder)


def test_make_alone_lists_the_targets(tree: Path) -> None:
    result = run_make(tree)
    assert result.returncode == 0, result.stderr
    lines = dict(re.findall(r"^make ([\w-]+) +(\S.*)$", result.stdout, re.MULTILINE))
    assert set(TARGETS) <= set(lines)
    assert not (tree / ".venv").exists()


@pytest.mark.parametrize("missing", ["g++", "make", "perl"])
def test_missing_tool_is_one_line(tree: Path, tmp_path: Path, missing: str) -> None:
    present = {"sh", "nproc", "cat", "g++", "make", "perl"} - {missing}
    result = run_make(tree, "test", path=tools(tmp_path / "bin", *present))
    assert result.returncode != 0
    errors = [line for line in result.stderr.splitlines() if not line.startswith("make: ")]
    assert len(errors) == 1 and errors[0].startswith(f"error: {missing} is missing"), errors
    assert not (tree / ".venv").exists()


def test_old_python_is_one_line(tree: Path, tmp_path: Path) -> None:
    path = tools(tmp_path / "bin", "sh", "nproc", "cat", "g++", "make", "perl")
    old = tmp_path / "bin/python3"
    # Runs what it is asked to, but says that it is Python 3.10.
    old.write_text(
        f"#!{sys.executable}\nimport sys\nsys.version_info = (3, 10, 0)\nexec(sys.argv[2])\n"
    )
    old.chmod(0o755)
    result = run_make(tree, "lint", path=path)
    assert result.returncode != 0
    errors = [line for line in result.stderr.splitlines() if not line.startswith("make: ")]
    assert len(errors) == 1 and "python3 is not Python 3.11 or newer" in errors[0], errors
    assert not (tree / ".venv").exists()


def test_finished_environment_is_used_as_it_is(tree: Path) -> None:
    pretend_installed(tree)
    plan = run_make(tree, "--dry-run", "lint").stdout
    assert "ruff check" in plan
    assert "-m basedpyright" in plan
    assert "pip" not in plan


@pytest.mark.parametrize("wrong", ["ruff check", "ruff format", "basedpyright", "pytest", None])
def test_tests_include_lint(tree: Path, wrong: str | None) -> None:
    """`make test` fails if one of them does, and says what the type checker has to say."""
    pretend_installed(tree)
    python = tree / ".venv/bin/python"
    python.unlink()
    python.write_text(f'#!/bin/sh\necho "ran $*"\ncase "$*" in *"{wrong}"*) exit 1;; esac\n')
    python.chmod(0o755)
    result = run_make(tree, "test")
    assert (result.returncode == 0) == (wrong is None)
    assert "ran -m ruff check" in result.stdout
    if wrong is None or wrong == "pytest":
        assert "ran -m ruff format --check" in result.stdout
        assert "ran -m pytest" in result.stdout
        assert "ran -m basedpyright" in (tree / "build/types.txt").read_text()
    elif wrong == "basedpyright":
        assert "ran -m basedpyright" in result.stdout
    else:
        assert "ran -m pytest" not in result.stdout


def test_every_module_has_a_stub() -> None:
    folder = ROOT / "typings/speq"
    written = {p.relative_to(folder): p.read_text() for p in folder.rglob("*.pyi")}
    expected = runpy.run_path(str(ROOT / "typings/update.py"))["stubs"]()
    assert len(expected) > 5
    assert written == expected, "run `make typings`"


@pytest.mark.parametrize("damage", ["stamp", "interpreter", "copied", "pins"])
def test_stale_environment_is_installed_again(tree: Path, damage: str) -> None:
    pretend_installed(tree)
    stamp = tree / ".venv/.installed"
    if damage == "stamp":
        stamp.unlink()
    elif damage == "interpreter":
        (tree / ".venv/bin/python").unlink()
    elif damage == "copied":
        stamp.write_text("/elsewhere\n")
    else:
        later = stamp.stat().st_mtime + 10
        os.utime(tree / "constraints.txt", (later, later))
    plan = run_make(tree, "--dry-run", "lint").stdout
    assert "pip install -q -c constraints.txt" in plan


def test_clean_keeps_the_environment(tree: Path) -> None:
    pretend_installed(tree)
    for name in ("build/engine.v", "model/__pycache__/x.pyc", ".venv/lib/__pycache__/x.pyc"):
        (tree / name).parent.mkdir(parents=True)
        (tree / name).touch()
    result = run_make(tree, "clean")
    assert result.returncode == 0, result.stderr
    assert not (tree / "build").exists()
    assert not (tree / "model/__pycache__").exists()
    assert (tree / ".venv/lib/__pycache__/x.pyc").exists()


def test_ci_runs_the_readme_test_command() -> None:
    script = ROOT / ".ci/run"
    assert os.access(script, os.X_OK)
    assert script.read_text().rstrip().endswith("exec make test")
    assert "make test" in (ROOT / "README.md").read_text()


def test_console_script_points_at_the_command_line() -> None:
    assert PROJECT["scripts"] == {"speq": "speq.cli:main"}
    scripts = {e.name: e.value for e in distribution("speq").entry_points}
    assert scripts == PROJECT["scripts"]
