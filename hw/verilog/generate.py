# SPDX-License-Identifier: Apache-2.0
"""Verilog-2005 of the accelerator or of its engine, and the files that go with it."""

from __future__ import annotations

import gc
import json
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from functools import lru_cache
from pathlib import Path

from amaranth.back import verilog
from amaranth.hdl import ClockDomain, Shape, Value
from amaranth.hdl._xfrm import DomainLowerer
from amaranth.lib import wiring
from amaranth.lib.wiring import Flow

from speq.hw.accelerator import Accelerator
from speq.hw.accelerator_config import AcceleratorConfig
from speq.hw.array.gemm_engine import GemmEngine
from speq.hw.common.files import staged
from speq.hw.common.ram import RAM_VERILOG
from speq.hw.engine_config import EngineConfig
from speq.hw.verilog.package import (
    LINT_WAIVERS,
    axi_example,
    fusesoc_core,
    verilator_waivers,
)
from speq.hw.verilog.register_docs import c_header, markdown
from speq.hw.verilog.register_rdl import system_rdl
from speq.hw.verilog.testbench import testbench

#: The engine's module.
TOP = "speq_gemm_engine"
#: The accelerator's module.
ACCELERATOR_TOP = "speq_top"

#: How each file begins, by what its name has behind the stem: so it is known as generated.
_MARKS = {
    ".v": rb"// SPDX-License-Identifier: Apache-2\.0\n// (Accelerator|Engine)Config\(",
    ".json": rb'\{\s*"top": "speq_',
    ".md": rb"# Registers of SPEQ\n",
    ".h": rb"/\* SPDX-License-Identifier: Apache-2\.0 \*/\s+/\* Registers and descriptors of the ",
    ".core": rb'CAPI=2:\nname: "(::speq|speq:ip):',
    ".rdl": rb"// SPDX-License-Identifier: Apache-2\.0\n// Registers of the SPEQ accelerator",
    ".vlt": rb"// SPDX-License-Identifier: Apache-2\.0\n// Warnings of Verilator that do not apply",
    "_example.v": rb"// SPDX-License-Identifier: Apache-2\.0\n// Example: the accelerator as ",
    "_tb.v": rb"// SPDX-License-Identifier: Apache-2\.0\n// Testbench of the accelerator",
}
_ENGINE_FILES = (".v", ".json", ".core", ".vlt")

#: A block without inputs, which simulators never run; and a vector of no bits, which has two.
_MISTRANSLATED = re.compile(
    r"always @\*\n\s+\S+( \[[^\]]*\])? = \d+'\S+;|^\s*(?:wire|reg) \[-1:0\].*", re.MULTILINE
)

#: What Yosys calls the variable by which a simulator runs every block once at its start.
_INITIAL = re.compile(r"\\\$auto\$verilog_backend\S+ ")


def convert_unit(component: wiring.Component, name: str, *, reset: bool = True) -> str:
    """Verilog of one component as the module `name`, the same bytes for the same component.

    Without `reset` the module's clock domain has no reset port.

    Raises
    ------
    ValueError
        If the component has a signal without bits, or a signal of which one part is constant and
        another assigned conditionally: Verilog takes both for something else.
    """
    with _no_collection(), _shared_values():
        text = verilog.convert(
            component,
            name=name,
            strip_internal_attrs=True,
            emit_src=False,
            missing_domain=lambda domain: ClockDomain(domain, reset_less=not reset),
        )
    if found := _MISTRANSLATED.search(text):
        raise ValueError(f"{name}: Verilog has another meaning for {found[0].strip()!r}")
    return _INITIAL.sub(r"\\$initial ", text)


@contextmanager
def _no_collection() -> Iterator[None]:
    """No garbage collection: Amaranth makes millions of objects that stay until the end, and
    looking for cycles among them takes a third of the time."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


@contextmanager
def _shared_values() -> Iterator[None]:
    """A value that is used in several places stays one value when Amaranth looks up the domains.

    Its `DomainLowerer` builds every expression anew for each use, so what a chain of n steps uses
    twice in each would be written 2^n times.
    """
    original = DomainLowerer.on_value
    seen: dict[int, tuple[Value, Value]] = {}  # with the old value, so that no other has its id

    def on_value(lowerer: DomainLowerer, value: Value) -> Value:
        if id(value) not in seen:
            seen[id(value)] = value, original(lowerer, value)
        return seen[id(value)][1]

    DomainLowerer.on_value = on_value
    try:
        yield
    finally:
        DomainLowerer.on_value = original


@lru_cache(maxsize=8)
def generate_top(config: AcceleratorConfig) -> str:
    """Verilog of the accelerator, top module `ACCELERATOR_TOP`; kept, as it takes seconds."""
    return _accelerator_verilog(Accelerator(config))


def _accelerator_verilog(accelerator: Accelerator) -> str:
    return _file(
        accelerator.config,
        convert_unit(accelerator, ACCELERATOR_TOP),
        accelerator.datapath.modules,
    )


def _file(
    config: EngineConfig | AcceleratorConfig, top: str, units: Mapping[str, wiring.Component]
) -> str:
    """A Verilog file: the top module, the memory primitive, and units that are instantiated."""
    header = f"// SPDX-License-Identifier: Apache-2.0\n// {config!r}\n"
    modules = [convert_unit(unit, name, reset=False) for name, unit in units.items()]
    return header + RAM_VERILOG + top + "".join(modules)


def accelerator_files(config: AcceleratorConfig, stem: str) -> dict[str, str]:
    """All files of an accelerator by name: Verilog, description (JSON), register map (Markdown, C
    header, SystemRDL), FuseSoC core, waivers of Verilator's warnings, an example of its use, and a
    testbench. Their names begin with `stem`."""
    accelerator = Accelerator(config)
    engine = accelerator.datapath.engine
    description = {
        "top": ACCELERATOR_TOP,
        "parameters": asdict(config),
        "ports": _ports(accelerator),
        "latencies": _latencies(engine),
        "verilator_lint_waivers": LINT_WAIVERS,
    }
    return {
        f"{stem}.v": _accelerator_verilog(accelerator),
        f"{stem}.json": json.dumps(description, indent=2) + "\n",
        f"{stem}.md": markdown(config),
        f"{stem}.h": c_header(config),
        f"{stem}.rdl": system_rdl(config, ACCELERATOR_TOP),
        f"{stem}.core": fusesoc_core(ACCELERATOR_TOP, stem, accelerator=True),
        f"{stem}.vlt": verilator_waivers(stem),
        f"{stem}_example.v": axi_example(accelerator, ACCELERATOR_TOP),
        f"{stem}_tb.v": testbench(accelerator, ACCELERATOR_TOP),
    }


def generate_verilog(config: EngineConfig) -> tuple[str, dict]:
    """Verilog of the engine, top module `TOP`, and its description.

    The description has the parameters, ports and latencies, ready for JSON.
    """
    engine = GemmEngine(config)
    description = {
        "top": TOP,
        "parameters": asdict(config)
        | {
            "accumulator_bits": config.accumulator_bits,
            "accumulator_unit_exponent": config.accumulator_unit_exponent,
        },
        "ports": _ports(engine),
        "latencies": _latencies(engine),
        "verilator_lint_waivers": LINT_WAIVERS,
    }
    return _file(config, convert_unit(engine, TOP), engine.array.modules), description


def engine_files(config: EngineConfig, stem: str) -> dict[str, str]:
    """All files of an engine by name: Verilog, description (JSON), FuseSoC core, and waivers of
    Verilator's warnings. Their names begin with `stem`."""
    text, description = generate_verilog(config)
    return {
        f"{stem}.v": text,
        f"{stem}.json": json.dumps(description, indent=2) + "\n",
        f"{stem}.core": fusesoc_core(TOP, stem, accelerator=False),
        f"{stem}.vlt": verilator_waivers(stem),
    }


def _latencies(engine: GemmEngine) -> dict[str, int]:
    units = engine.array.modules
    return {
        "engine_fill": engine.FILL,
        "engine_overhead": engine.OVERHEAD,
        "array": engine.array.LATENCY,
    } | {name: unit.LATENCY for name, unit in units.items() if hasattr(unit, "LATENCY")}


def _ports(component: wiring.Component) -> list[dict]:
    ports = [{"name": name, "direction": "input", "width": 1} for name in ("clk", "rst")]
    for path, member, _value in component.signature.flatten(component):
        ports.append(
            {
                "name": "__".join(map(str, path)),
                "direction": "input" if member.flow is Flow.In else "output",
                "width": Shape.cast(member.shape).width,
            }
        )
    return ports


def write_verilog(
    config: EngineConfig | AcceleratorConfig, path: Path, *, force: bool = False
) -> tuple[Path, ...]:
    """Write the Verilog to `path` and what goes with it beside it.

    That is, all of `accelerator_files` (AcceleratorConfig) or of `engine_files` (EngineConfig).
    Returns the paths, the Verilog's first. Nothing appears unless all could be written, and nothing
    is generated before that is known to be possible.

    Generated files of these names are replaced, or removed where an engine has none. Any other file
    that is in the way is an error, unless `force` is given.

    Raises
    ------
    ValueError
        If the path does not end in .v.
    OSError
        If the folder does not exist or cannot be written, or a file is in the way.
    """
    if path.suffix != ".v":
        raise ValueError(f"{path}: name the Verilog file .v; the files beside it get its name")
    if not path.parent.is_dir():
        raise FileNotFoundError(f"{path.parent}: no such folder; create it first")
    endings = _MARKS if isinstance(config, AcceleratorConfig) else _ENGINE_FILES
    marks = {f"{path.stem}{ending}": mark for ending, mark in _MARKS.items()}
    names = [f"{path.stem}{ending}" for ending in endings]
    with staged(path.parent, marks, names, force=force) as folder:
        contents = (
            accelerator_files(config, path.stem)
            if isinstance(config, AcceleratorConfig)
            else engine_files(config, path.stem)
        )
        for name, content in contents.items():
            (folder / name).write_text(content)
    return tuple(path.with_name(name) for name in contents)
