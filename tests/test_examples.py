# SPDX-License-Identifier: Apache-2.0
"""The scripts of docs/examples run as they are, with all that they assert."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

import matplotlib.pyplot as plt
import pytest
from PIL import Image

from tests.test_project import ROOT

EXAMPLES = sorted((ROOT / "docs/examples").glob("*.py"))


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_example(path: Path, tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(sys, "argv", [str(path), str(tmp_path)])
    names = runpy.run_path(str(path), run_name="__main__")
    plt.close("all")
    printed = capsys.readouterr().out
    assert printed.count("\n") >= 4
    plots = [*tmp_path.iterdir()]
    assert bool(plots) == ("plt" in names)
    for plot in plots:
        with Image.open(plot) as image:
            image.load()
            assert min(image.size) > 300


def test_there_are_examples_and_the_manual_names_them() -> None:
    assert len(EXAMPLES) >= 3
    manual = (ROOT / "docs/api.md").read_text()
    for path in EXAMPLES:
        assert f"examples/{path.name}" in manual
        assert path.read_text().count("\n# %%") > 4  # cells
