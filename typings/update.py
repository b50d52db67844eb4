# SPDX-License-Identifier: Apache-2.0
"""Stubs that tell type checkers and editors where `speq.*` lies.

No folder is called `speq`: setuptools maps `speq` to api/, `speq.hw` to hw/ and so on when it
installs. A checker that looks for `speq.hw.array.pe` in a clone finds the stub
typings/speq/hw/array/pe.pyi instead (pyright, basedpyright and Pylance look in typings/ by
themselves), which says that all its names are those of hw/array/pe.py. So a file has one identity,
and definitions and references are found in it; links to the folders in place of stubs would give
each file two.

`make typings` runs this after a module was added, moved or removed.
"""

from __future__ import annotations

import shutil
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
STUBS = ROOT / "typings/speq"
#: Each folder, and where its modules are below `speq`.
FOLDERS = {"api": ""} | {name: name for name in ("hw", "model", "host", "sim", "cli")}


def stubs() -> dict[Path, str]:
    """Path below `STUBS` -> text, of the stub of every module of the project."""
    result = {}
    for folder, place in FOLDERS.items():
        for path in sorted((ROOT / folder).rglob("*.py")):
            module = path.relative_to(ROOT).with_suffix("")
            parts = module.parent.parts if module.name == "__init__" else module.parts
            stub = place / module.relative_to(folder).with_suffix(".pyi")
            result[stub] = f"from {'.'.join(parts)} import *\n"
    return result


def main() -> None:
    """Write all stubs anew."""
    shutil.rmtree(STUBS, ignore_errors=True)
    for path, text in stubs().items():
        (STUBS / path).parent.mkdir(parents=True, exist_ok=True)
        (STUBS / path).write_text(text)


if __name__ == "__main__":
    main()
