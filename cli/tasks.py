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
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures import as_completed as all_completed
from concurrent.futures.process import BrokenProcessPool
from importlib import import_module
from pathlib import Path
from typing import Any, TypeVar

from speq.hw.common.files import check_output

T = TypeVar("T")
R = TypeVar("R")

#: How a file of finished tasks begins.
MARK = rb'\{"speq tasks": "'
#: Times that a task is tried again elsewhere, on a cluster.
_RETRIES = 3
#: Seconds in which a scheduler must answer.
_ANSWER = 10


def processors() -> int:
    """Those that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


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
        If a process ends.
    """
    if scheduler is not None:
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
    try:
        dask = import_module("distributed")
    except ImportError as error:
        raise ValueError(
            "there is no Dask for --scheduler: install it with pip install -e '.[dask]'"
        ) from error
    try:
        client = dask.Client(scheduler, timeout=_ANSWER, set_as_default=False)
    except (OSError, ValueError) as error:
        raise ValueError(f"{scheduler}: no Dask scheduler answers there") from error
    with client:
        try:
            workers = client.run(source_digest)
        except ImportError as error:
            raise ValueError(f"{scheduler}: a worker does not have speq: {error}") from error
        if not workers:
            raise ValueError(f"{scheduler}: the scheduler has no workers")
        for worker, digest in workers.items():
            if digest != source_digest():
                raise ValueError(f"{scheduler}: {worker} has other sources of speq than this one")
        # A task of a worker that is lost goes to another one.
        futures = {
            client.submit(function, task, pure=False, retries=_RETRIES): i
            for i, task in enumerate(tasks)
        }
        for future in dask.as_completed(futures, loop=client.loop):
            yield futures[future], future.result()


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
        Made, or read if it is of the same request; what is of another one is replaced.
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
    """

    def __init__(self, path: Path, request: str, *, force: bool = False) -> None:
        check_output(path, MARK, force=force)
        digest = hashlib.sha256((request + source_digest()).encode()).hexdigest()
        head = json.dumps({"speq tasks": digest})
        self.results: dict[str, Any] = {}
        lines = path.read_text().splitlines(keepends=True) if path.exists() else []
        kept = [head + "\n"]
        if lines and lines[0] == kept[0]:
            # A killed run may leave a piece of a line at the end.
            kept += [line for line in lines[1:] if line.endswith("\n")]
            for line in kept[1:]:
                self.results |= json.loads(line)
        if kept != lines:
            path.write_text("".join(kept))
        self._file = path.open("a")

    def __enter__(self) -> Finished:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def add(self, name: str, result: Any) -> None:
        """Keep the result of a task: JSON values, in which numbers lose nothing."""
        self.results[name] = result
        self._file.write(json.dumps({name: result}) + "\n")
        self._file.flush()
