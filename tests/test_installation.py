# SPDX-License-Identifier: Apache-2.0
"""The project as others install it: from a wheel and editable, with types for their checkers."""

from __future__ import annotations

import json
import os
import shutil
import site
import subprocess
import sys
from pathlib import Path

import pytest

from tests.test_project import ROOT, SHIPPED

USE = """\
import speq

model = speq.load("tiny")
made = speq.generate(model, "x", speq.encode(model, speq.FormatConfig(group=32)), max_tokens=3)
reveal_type(model)
reveal_type(made.statistics.match_rate)
for chunk in speq.stream(model, [1, 2]):
    reveal_type(chunk.step.origins)
with speq.simulated_session(model) as session:
    reveal_type(session)
reveal_type(speq.gemm)
reveal_type(speq.__version__)
speq.nothing
speq.generate(model, 3)
"""
REVEALED = ("Model", "float", "list[str]", "Session", "(activations: ", "str")
WRONG = {"reportAttributeAccessIssue": "nothing", "reportArgumentType": "Literal[3]"}


def run(*command: str | Path, folder: Path) -> subprocess.CompletedProcess[str]:
    """Run a command in a folder, without the modules of this process."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTHON")}
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)


def succeeded(*command: str | Path, folder: Path) -> str:
    made = run(*command, folder=folder)
    assert made.returncode == 0, made.stdout + made.stderr
    return made.stdout


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    """A copy of what is installed, since setuptools writes beside it."""
    folder = tmp_path_factory.mktemp("source")
    for name in SHIPPED:
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder)
    return folder


def environment(folder: Path) -> Path:
    """Python of a new virtual environment that also has the packages of this one."""
    succeeded(sys.executable, "-m", "venv", "--without-pip", folder, folder=folder.parent)
    (packages,) = folder.glob("lib/python*/site-packages")
    (packages / "others.pth").write_text("\n".join(site.getsitepackages()))
    return folder / "bin/python"


@pytest.mark.parametrize("kind", ["wheel", "editable"])
def test_installation(source, tmp_path, kind) -> None:
    """Everything that the wheel has is where it belongs, and `import speq` is the API."""
    python = environment(tmp_path / "venv")
    pip = (python, "-m", "pip", "install", "-q", "--no-deps", "--no-build-isolation")
    succeeded(*pip, *(("-e",) if kind == "editable" else ()), source, folder=tmp_path)
    code = "import speq, speq.hw.array.pe, speq.sim.benches, speq.model.loaders; print(speq.load)"
    assert "load_model" in succeeded(python, "-c", code, folder=tmp_path)
    code = "import speq; print(speq.__file__, speq.load('tiny').config.blocks)"
    found, blocks = succeeded(python, "-c", code, folder=tmp_path).split()
    place = source if kind == "editable" else tmp_path / "venv"
    assert Path(found).is_relative_to(place) and blocks == "5"
    for command in ((python.parent / "speq",), (python, "-m", "speq")):
        assert succeeded(*command, "--version", folder=tmp_path).startswith("speq ")
    if kind == "wheel":
        check_data(Path(found).parent)
        check_types(tmp_path)


def check_data(package: Path) -> None:
    """Files that are no modules are installed as well, but for documents."""
    files = (path for name in SHIPPED for path in (ROOT / name).rglob("*") if path.is_file())
    data = [path.relative_to(ROOT) for path in files if path.suffix not in (".py", ".md", ".pyc")]
    assert len(data) > 5
    for path in data:
        inside = path.relative_to("api") if path.parts[0] == "api" else path
        assert (package / inside).exists(), f"name {path} in pyproject.toml"


def check_types(folder: Path) -> None:
    """A type checker knows what the names give, and what is wrong with their use."""
    (folder / "use.py").write_text(USE)
    settings = {"venvPath": ".", "venv": "venv", "typeCheckingMode": "standard"}
    (folder / "pyrightconfig.json").write_text(json.dumps(settings))
    checker = Path(sys.executable).with_name("basedpyright")
    made = run(checker, "--outputjson", "use.py", folder=folder)
    found = json.loads(made.stdout)["generalDiagnostics"]
    revealed = [d["message"] for d in found if d["severity"] == "information"]
    assert len(revealed) == len(REVEALED), revealed
    for message, kind in zip(revealed, REVEALED, strict=True):
        assert f'is "{kind}' in message
    wrong = {d["rule"]: d["message"] for d in found if d["severity"] == "error"}
    assert wrong.keys() == WRONG.keys(), found
    for rule, text in WRONG.items():
        assert text in wrong[rule]
