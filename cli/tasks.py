# SPDX-License-Identifier: Apache-2.0
"""Independent tasks: one after the other, in processes, or on a Dask cluster, with what is finished
kept in a file.

A task's result depends on the task alone, so that it is the same wherever it is computed.
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import platform
import re
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures import as_completed as all_completed
from concurrent.futures.process import BrokenProcessPool
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, TextIO, TypeVar

from speq.hw.common.files import check_output, replacing

T = TypeVar("T")
R = TypeVar("R")

#: How a file of finished tasks begins.
MARK = rb'\{"speq tasks": "'
#: Seconds in which a scheduler must answer, and have a worker.
_ANSWER = 10


def processors() -> int:
    """Those that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def check_scheduler(address: str) -> None:
    """Raises ValueError if it is none of a Dask scheduler, or Dask is not installed."""
    if not re.fullmatch(r"(tcp|tls)://[^/\s]+:\d+", address):
        raise ValueError(f"scheduler is {address!r}; expected tcp://HOST:PORT")
    if find_spec("distributed") is None:
        raise ValueError(
            "there is no Dask for --scheduler: install it with pip install -e '.[dask]'"
        )


def results(
    function: Callable[[T], R], tasks: Sequence[T], jobs: int = 1, scheduler: str | None = None
) -> Iterator[tuple[int, R]]:
    """Indices of tasks and what a function makes of them, as they are finished.

    Parameters
    ----------
    function : callable
        Of a module, with a result that can be pickled.
    tasks : sequence
    jobs : int
        Processes; 1: this one.
    scheduler : str, optional
        Address of a Dask scheduler, whose workers are taken in place of processes.

    Raises
    ------
    ValueError
        If Dask is not installed, does not answer, or has workers with other sources.
    OSError
        If a process ends; on a cluster, if a task's workers end four times, or the scheduler does.
    """
    if scheduler is not None:
        check_scheduler(scheduler)
        yield from _on_cluster(function, tasks, scheduler)
    elif jobs == 1 or len(tasks) < 2:
        yield from ((i, function(task)) for i, task in enumerate(tasks))
    else:
        yield from _in_processes(function, tasks, min(jobs, len(tasks)))


def _in_processes(
    function: Callable[[T], R], tasks: Sequence[T], jobs: int
) -> Iterator[tuple[int, R]]:
    # Libraries have threads by now, which a fork would not survive.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(jobs, context) as pool:
        futures = {pool.submit(function, task): i for i, task in enumerate(tasks)}
        try:
            for future in all_completed(futures):
                yield futures[future], future.result()
        except BrokenProcessPool as error:
            raise OSError(
                "a process has ended, perhaps for want of memory: try again, with fewer --jobs"
            ) from error
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def _on_cluster(
    function: Callable[[T], R], tasks: Sequence[T], scheduler: str
) -> Iterator[tuple[int, R]]:
    dask = import_module("distributed")
    try:
        client = dask.Client(scheduler, timeout=_ANSWER, set_as_default=False)
    except (OSError, ValueError) as error:
        raise ValueError(f"{scheduler}: no Dask scheduler answers there") from error
    with client:
        try:
            client.wait_for_workers(1, timeout=_ANSWER)
        except TimeoutError as error:
            raise ValueError(f"{scheduler}: the scheduler has no workers") from error
        # A task of a worker that is lost goes to another one, three times.
        futures = {
            client.submit(_checked, function, task, source_digest(), pure=False): i
            for i, task in enumerate(tasks)
        }
        try:
            for future in dask.as_completed(futures, loop=client.loop):
                yield futures[future], future.result()
        except ImportError as error:
            raise ValueError(f"{scheduler}: a worker does not have speq: {error}") from error
        except (dask.KilledWorker, dask.client.FutureCancelledError) as error:
            raise OSError(f"{scheduler}: workers or scheduler are lost: {error}") from error


def _checked(function: Callable[[T], R], task: T, digest: str) -> R:
    """The result of a task, on a worker that has the same sources."""
    if source_digest() != digest:
        raise ValueError(f"{platform.node()}: this worker has other sources of speq")
    return function(task)


@cache
def source_digest() -> str:
    """SHA-256 of the sources that results may depend on: those of the packages hw, model and
    host."""
    import speq.host
    import speq.hw
    import speq.model

    found = hashlib.sha256()
    for package in (speq.hw, speq.model, speq.host):
        folder = Path(package.__path__[0])
        for path in sorted(folder.rglob("*.py")):
            found.update(f"{package.__name__}/{path.relative_to(folder)}\0".encode())
            found.update(path.read_bytes())
    return found.hexdigest()


class Finished:
    """A file with the results of finished tasks, a line of JSON for each behind one that says what
    they are of; a context.

    Parameters
    ----------
    path : Path
        Read if it is of the same request; made, or put in the place of what is of another one, with
        the first result.
    request : str
        All that results depend on besides their task.
    force : bool
        Replace a file that was written otherwise.

    Attributes
    ----------
    results : dict
        Results by the tasks' names.

    Raises
    ------
    OSError
        If the file cannot be written, or was not written by this class.
    ValueError
        If it is damaged.
    """

    def __init__(self, path: Path, request: str, *, force: bool = False) -> None:
        check_output(path, MARK, force=force)
        digest = hashlib.sha256((request + source_digest()).encode()).hexdigest()
        self._path, self._force = path, force
        self._kept = [json.dumps({"speq tasks": digest}) + "\n"]
        self._file: TextIO | None = None
        self.results: dict[str, Any] = {}
        lines = (
            path.read_text("utf-8", "replace").splitlines(keepends=True) if path.exists() else []
        )
        if lines[:1] == self._kept:
            # A killed run may leave a piece of a line at the end.
            self._kept += [line for line in lines[1:] if line.endswith("\n")]
            for line in self._kept[1:]:
                self.results |= _parsed(line, path)

    def __enter__(self) -> Finished:
        return self

    def __exit__(self, *_: object) -> None:
        if self._file:
            self._file.close()

    def add(self, name: str, result: Any) -> None:
        """Keep the result of a task: JSON values, in which numbers lose nothing."""
        if self._file is None:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with replacing(self._path, MARK, force=self._force) as temporary:
                temporary.write_text("".join(self._kept))
            self._file = self._path.open("a")
        self.results[name] = result
        self._file.write(json.dumps({name: result}) + "\n")
        self._file.flush()


def _parsed(line: str, path: Path) -> dict[str, Any]:
    try:
        return json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is damaged: remove it") from error
