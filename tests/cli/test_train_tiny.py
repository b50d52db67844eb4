# SPDX-License-Identifier: Apache-2.0
"""`make tiny`: what it refuses before it trains, and what it may replace."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from speq.cli.train_tiny import MARKS, main
from speq.hw.common.files import check_output
from speq.model import train_tiny
from speq.model.aliases import tiny_path


@pytest.fixture(autouse=True)
def no_training(monkeypatch):
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("this is work")

    monkeypatch.setattr(train_tiny, "train_tokenizer", refuse)


def test_impossible_options(tmp_path, capsys) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["-o", str(tmp_path / "new"), "--steps", "0"])
    assert stop.value.code not in (0, None)
    assert "steps is 0" in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


def test_output_that_is_a_file(tmp_path) -> None:
    (tmp_path / "file").write_text("kept")
    with pytest.raises(SystemExit, match="file is not a folder"):
        main(["-o", str(tmp_path / "file")])
    assert (tmp_path / "file").read_text() == "kept"


@pytest.mark.parametrize("name", MARKS)
def test_files_of_others_are_not_replaced(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("{}")
    with pytest.raises(SystemExit, match=rf"{name}: a file that this command did not write"):
        main(["-o", str(tmp_path)])
    with pytest.raises(AssertionError, match="this is work"):
        main(["-o", str(tmp_path), "--force"])
    assert [path.name for path in tmp_path.iterdir()] == [name]
    assert (tmp_path / name).read_text() == "{}"


def test_its_own_files_are(tmp_path: Path) -> None:
    """They are known by how they begin; the shipped ones were made by it."""
    folder = tmp_path / "tiny"
    shutil.copytree(tiny_path(), folder)
    for name, mark in MARKS.items():
        check_output(folder / name, mark)
    assert {path.name for path in folder.iterdir()} == set(MARKS)
