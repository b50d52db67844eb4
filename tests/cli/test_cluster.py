# SPDX-License-Identifier: Apache-2.0
"""`--scheduler`: tasks on a Dask cluster of this machine, whose workers are lost.

`make check-cluster` installs Dask, without which all of this is skipped.
"""

from __future__ import annotations

import json
import math
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from speq.cli import tasks
from speq.cli.tasks import results
from speq.host.exploration import Decoding, configurations, speed
from speq.model.cycles import uniform_formats
from speq.model.number_format import FormatConfig
from tests.model.small_models import small_config

distributed = pytest.importorskip("distributed", reason="make check-cluster installs Dask")


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    with distributed.LocalCluster(2, threads_per_worker=1, dashboard_address=None) as found:
        yield found


def ends_once(path: str) -> str:
    """A task whose first worker is lost: that which makes the file."""
    try:
        Path(path).touch(exist_ok=False)
    except FileExistsError:
        return path
    os._exit(3)


def process(_: int) -> int:
    """The process of a worker."""
    return os.getpid()


def test_points_of_a_cluster_that_loses_a_worker(cluster):
    """One of two is killed behind the first result."""
    model = small_config(tied_head=False, context=64)
    formats = uniform_formats(model, FormatConfig())
    decoding = Decoding(model, formats, None, 0, 0.8, 20, 100.0, 1.0, 16)
    todo = [(decoding, c) for c in configurations([2, 4], [4, 8], [4])]
    serial = list(results(speed, todo))
    found, killed = [], False
    ((_, worker),) = results(process, [0], scheduler=cluster.scheduler_address)
    for result in results(speed, todo, scheduler=cluster.scheduler_address):
        found.append(result)
        if not killed:
            os.kill(worker, signal.SIGKILL)
            killed = True
    assert sorted(found, key=lambda result: result[0]) == serial and len(serial) == 10


def test_a_lost_worker_costs_its_task_only(cluster, tmp_path):
    paths = [str(tmp_path / name) for name in "abc"]
    for name in paths[1:]:
        Path(name).touch()
    found = dict(results(ends_once, paths, scheduler=cluster.scheduler_address))
    assert found == dict(enumerate(paths)) and Path(paths[0]).exists()


def test_errors_of_tasks(cluster):
    with pytest.raises(ValueError, match=r"math domain error|nonnegative"):
        list(results(math.sqrt, [-1.0], scheduler=cluster.scheduler_address))


def test_workers_with_other_sources(cluster, monkeypatch):
    monkeypatch.setattr(tasks, "source_digest", lambda: "another")
    with pytest.raises(ValueError, match="has other sources of speq"):
        list(results(math.exp, [1.0], scheduler=cluster.scheduler_address))


def test_the_command(cluster, speq_command, tmp_path):
    call = ("explore", "tiny", "--bandwidth", 1, "--rows", 2, "--cols", 4, "--lanes", 4)
    points, address = [], cluster.scheduler_address
    for name, where in (("serial", ("--jobs", 1)), ("cluster", ("--scheduler", address))):
        report = tmp_path / f"{name}.json"
        found = speq_command(*call, *where, "-o", tmp_path / name, "--json", report)
        assert found.code == 0, found.err
        points.append(json.loads(report.read_text()))
    assert points[0] == points[1]


def test_a_scheduler_that_is_not_there(monkeypatch):
    monkeypatch.setattr(tasks, "_ANSWER", 1)
    with pytest.raises(ValueError, match="no Dask scheduler answers"):
        list(results(math.exp, [1.0], scheduler="tcp://127.0.0.1:1"))
