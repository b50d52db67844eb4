# SPDX-License-Identifier: Apache-2.0
"""Tasks in this process and in others, and what is kept of them; test_cluster.py has clusters."""

from __future__ import annotations

import importlib.util
import json
import math
import os
from pathlib import Path

import pytest

from speq.cli.tasks import Finished, results

TASKS = [0.1, 2.0, 3.7]


def ends(_: float) -> None:
    """A task whose process is lost."""
    os._exit(3)


def test_processes_give_what_this_one_gives():
    serial = list(results(math.exp, TASKS))
    assert serial == [(i, math.exp(task)) for i, task in enumerate(TASKS)]
    assert sorted(results(math.exp, TASKS, jobs=2)) == serial
    assert list(results(math.exp, [], jobs=2)) == []


def test_errors_of_tasks_and_lost_processes():
    with pytest.raises(ValueError, match=r"math domain error|nonnegative"):
        list(results(math.sqrt, [1.0, -1.0], jobs=2))
    with pytest.raises(OSError, match=r"a process has ended, .* fewer --jobs"):
        list(results(ends, TASKS, jobs=2))


def test_what_is_finished_is_kept(tmp_path):
    path = tmp_path / "points"
    with Finished(path, "a") as finished:
        finished.add("x", 0.1 + 0.2)
        finished.add("y", {"z": [1, 1e-300]})
    path.write_text(path.read_text() + '{"half of a li')  # as a killed run leaves it
    with Finished(path, "a") as finished:
        assert finished.results == {"x": 0.1 + 0.2, "y": {"z": [1, 1e-300]}}
        finished.add("w", 1)
    with Finished(path, "a") as finished:
        assert list(finished.results) == ["x", "y", "w"]
    with Finished(path, "b") as finished:  # another request
        assert finished.results == {}
        finished.add("x", 2)
    assert len(path.read_text().splitlines()) == 2
    for line in path.read_text().splitlines():
        json.loads(line)


def test_files_of_others_stay(tmp_path: Path):
    path = tmp_path / "points"
    path.write_text("mine")
    with pytest.raises(FileExistsError, match="did not write"):
        Finished(path, "a")
    assert path.read_text() == "mine"
    with Finished(path, "a", force=True) as finished:
        assert finished.results == {}
        finished.add("x", 1)
    with Finished(path, "a") as finished:
        assert finished.results == {"x": 1}
    path.write_text(path.read_text() + "{]\n")
    with pytest.raises(ValueError, match="is damaged: remove it"):
        Finished(path, "a")


@pytest.mark.skipif(importlib.util.find_spec("distributed") is not None, reason="Dask is installed")
def test_dask_that_is_missing_is_named():
    with pytest.raises(ValueError, match=r"install it with pip install -e '\.\[dask\]'"):
        list(results(math.exp, TASKS, scheduler="tcp://127.0.0.1:1"))
