# SPDX-License-Identifier: Apache-2.0
"""Running simulations that `speq.sim.builder` has built, through cocotb's Python runner."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO
from xml.etree import ElementTree

import cocotb_tools.config
import cocotb_tools.runner
from cocotb_tools.check_results import get_results

from speq.sim.builder import SimulationError, build

#: Seconds for a whole run of a test module.
_RUN_SECONDS = 3600


class _Background(cocotb_tools.runner.Verilator):
    """Starts tests, but does not wait for them."""

    #: The simulator, once `test` has started it.
    process: subprocess.Popen[bytes]

    def __init__(self, descriptors: Sequence[int]) -> None:
        super().__init__()
        self.descriptors = descriptors

    def _execute_cmds(
        self,
        cmds: Sequence[Sequence[str]],
        cwd: str | os.PathLike[str],
        stdout: TextIO | None = None,
    ) -> None:
        self.process = subprocess.Popen(
            cmds[0],
            cwd=cwd,
            env=self.env,
            stdin=subprocess.DEVNULL,
            stdout=stdout,
            stderr=subprocess.STDOUT,
            pass_fds=self.descriptors,
            # Ctrl-C on a terminal is for the process that has started it, which ends it.
            process_group=0,
        )


def seed() -> int:
    """The seed of random tests: the environment variable SPEQ_SEED, 0 by default."""
    return int(os.environ.get("SPEQ_SEED", "0"))


def run_folder(build_folder: Path) -> Path:
    """Folder for a run of this process on a build; `build` removes it once the process is gone."""
    return build_folder / f"run-{os.getpid()}"


def start(
    folder: Path,
    top: str,
    test_module: str,
    run: Path,
    *,
    environment: Mapping[str, str] | None = None,
    plusargs: Sequence[str] = (),
    descriptors: Sequence[int] = (),
) -> subprocess.Popen[bytes]:
    """Run a cocotb test module on a build, in the background.

    Parameters
    ----------
    folder : Path
        From `build`.
    top : str
    test_module : str
        Import name of the cocotb test module.
    run : Path
        Folder to run in. Output goes to test.log, results to results.xml in it.
    environment : dict, optional
        Environment variables for the test.
    plusargs : sequence of str, optional
        Arguments for $value$plusargs.
    descriptors : sequence of int, optional
        File descriptors that the process inherits.
    """
    runner = _Background(descriptors)
    libraries = (str(cocotb_tools.config.libs_dir), os.environ.get("LD_LIBRARY_PATH"))
    added = {
        # Otherwise cocotb rewrites the assertions in all that is imported, which takes seconds.
        "COCOTB_REWRITE_ASSERTION_FILES": f"{test_module.rpartition('.')[2]}.py",
        "PYTHONPATH": os.pathsep.join(sys.path),
        "LD_LIBRARY_PATH": os.pathsep.join(filter(None, libraries)),
    }
    # Within a pytest test, cocotb would check the results at once.
    with _environment(PYTEST_CURRENT_TEST=""):
        runner.test(
            hdl_toplevel=top,
            hdl_toplevel_lang="verilog",
            build_dir=folder,
            test_dir=run,
            test_module=test_module,
            results_xml=str(run / "results.xml"),
            extra_env=dict(environment or {}) | added,
            plusargs=list(plusargs),
            log_file=run / "test.log",
        )
    return runner.process


def simulate(
    verilog: str,
    top: str,
    test_module: str,
    *,
    environment: Mapping[str, str] | None = None,
    plusargs: Sequence[str] = (),
    sources: Sequence[Path] = (),
    parameters: Mapping[str, int] | None = None,
    visible: str | None = "*",
    descriptors: Sequence[int] = (),
) -> Path:
    """Build `verilog` and run a cocotb test module on it.

    Builds are kept and used again for the same Verilog. See `build` and `start` for the parameters.

    Returns
    -------
    Path
        The folder that the simulation ran in.

    Raises
    ------
    SimulationError
        If the build fails, a test fails or no test ran, with the end of the log.
    """
    folder = build(verilog, top, sources=sources, parameters=parameters, visible=visible)
    run = run_folder(folder)
    # The results of an earlier run are none of this one.
    shutil.rmtree(run, ignore_errors=True)
    run.mkdir()
    process = start(
        folder,
        top,
        test_module,
        run,
        environment=environment,
        plusargs=plusargs,
        descriptors=descriptors,
    )
    try:
        code = process.wait(_RUN_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
        message = f"{test_module} has not ended within {_RUN_SECONDS} s"
        raise SimulationError(message, run / "test.log") from None
    except BaseException:
        process.kill()
        process.wait()
        raise
    try:
        tests, failures = get_results(run / "results.xml")
    except (OSError, RuntimeError, ElementTree.ParseError) as error:
        message = f"simulation of {top} failed: exit code {code}, {error}"
        raise SimulationError(message, run / "test.log") from error
    if code or failures or not tests:
        message = f"{failures} of {tests} tests of {test_module} failed"
        raise SimulationError(message, run / "test.log")
    return run


@contextmanager
def _environment(**variables: str) -> Iterator[None]:
    """Set environment variables for as long as the context lasts."""
    saved = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in saved.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
