# SPDX-License-Identifier: Apache-2.0
"""The register map in SystemRDL, as the compiler reads it, and a header made from it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from systemrdl import warnings
from systemrdl.compiler import RDLCompiler
from systemrdl.messages import MessagePrinter, Severity
from systemrdl.node import AddrmapNode, RegNode
from systemrdl.rdltypes.builtin_enums import AccessType, OnWriteType
from systemrdl.source_ref import SourceRefBase

from speq.hw.accelerator_config import AcceleratorConfig, ErrorCode, PassKind
from speq.hw.control.register_map import (
    ANSWERS,
    COUNTERS,
    STATES,
    Register,
    constants,
    registers,
)
from speq.hw.verilog.register_docs import c_header
from speq.hw.verilog.register_rdl import system_rdl
from tests.hw.verilog.test_register_docs import each_config

ACCESSES = {
    "ro": (AccessType.r, None),
    "rw": (AccessType.rw, None),
    "wo": (AccessType.w, None),
    "w1c": (AccessType.rw, OnWriteType.woclr),
}
NUMBERS = {
    "STATUS.value": {name: value for name, (value, _) in STATES.items()},
    "ERROR.value": {error.name: error.value for error in ErrorCode},
    "HOST_ANSWER.value": {name: value for name, (value, _) in ANSWERS.items()},
    "PASS.kind": {kind.name: kind.value for kind in PassKind},
}


class _Strict(MessagePrinter):
    """Every message of the compiler is an error."""

    def print_message(self, severity: Severity, text: str, src_ref: SourceRefBase | None) -> None:
        raise AssertionError(f"{severity.name}: {text}")


def compiled(config: AcceleratorConfig, folder: Path) -> AddrmapNode:
    """The address map, with all the compiler's warnings on."""
    path = folder / "speq_top.rdl"
    path.write_text(system_rdl(config, "speq_top"))
    compiler = RDLCompiler(message_printer=_Strict(), warning_flags=warnings.ALL)
    compiler.compile_file(str(path))
    return compiler.elaborate().top


def fields_of(register: Register) -> dict[str, tuple[int, int, str]]:
    """Lowest and highest bit and meaning of each field; of a register without fields, one."""
    if not register.fields:
        return {"value": (0, register.bits - 1, "")}
    return {f.name: (f.low, f.low + f.bits - 1, f.about) for f in register.fields}


def check_register(node: RegNode, register: Register, fixed: int | None) -> None:
    """Compare an element with the map; `fixed` is what it always reads."""
    assert node.get_property("regwidth") == 32 * register.words
    assert node.get_property("accesswidth") == 32
    assert node.get_property("desc") == register.about
    fields = {field.inst_name: field for field in node.fields()}
    expected = fields_of(register)
    assert list(fields) == list(expected)
    for name, (low, high, about) in expected.items():
        field = fields[name]
        assert (field.low, field.high) == (low, high), field.get_path()
        assert (field.get_property("desc") or "") == about
        access, on_write = ACCESSES[register.access]
        assert field.get_property("sw") is access, field.get_path()
        assert field.get_property("onwrite") is on_write
        counts = register.name in COUNTERS
        assert field.get_property("counter") == counts, field.get_path()
        written = register.access in ("ro", "w1c") or register.updated
        assert field.is_hw_writable == (written and not counts and fixed is None), field.get_path()
        reset = field.get_property("reset")
        if fixed is not None:
            assert reset == fixed >> low & (1 << high - low + 1) - 1, field.get_path()
        elif register.access != "ro" or counts:
            assert reset == 0
        else:
            assert reset is None
        encoding = field.get_property("encode")
        numbers = NUMBERS.get(f"{register.name}.{name}")
        assert (encoding and {each.name: each.value for each in encoding}) == numbers


@each_config
def test_it_agrees_with_the_map(config: AcceleratorConfig, tmp_path: Path) -> None:
    top = compiled(config, tmp_path)
    assert top.inst_name == "speq_top"
    fixed = constants(config)
    nodes = {child.inst_name: child for child in top.children(unroll=False)}
    assert list(nodes) == [register.name for register in registers(config)]
    for register in registers(config):
        node = nodes[register.name]
        assert isinstance(node, RegNode)
        assert node.is_array == bool(register.count)
        elements = list(node.unrolled())
        starts = [each.absolute_address for each in elements]
        assert starts == list(register.offsets)[:: register.words], register.name
        always = register.pack(fixed[register.name]) if register.name in fixed else None
        for element in elements:
            check_register(element, register, always)


def test_a_header_made_from_it_agrees_with_the_generated_one(tmp_path: Path) -> None:
    """PeakRDL's structure has every register where the generated header has it."""
    config = AcceleratorConfig()
    (tmp_path / "speq.h").write_text(c_header(config))
    (tmp_path / "speq_top.rdl").write_text(system_rdl(config, "speq_top"))
    command = (sys.executable, "-m", "peakrdl", "c-header", "speq_top.rdl", "-o", "peakrdl.h")
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    checks = "".join(
        f"_Static_assert(offsetof(speq_top_t, {register.name}) == SPEQ_REG_{register.name}, "
        f'"{register.name}");\n'
        for register in registers(config)
    )
    program = f'#include <stddef.h>\n#include "peakrdl.h"\n#include "speq.h"\n{checks}'
    done = subprocess.run(
        ["gcc", "-std=c11", "-fsyntax-only", "-xc", "-"],
        cwd=tmp_path,
        input=program,
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stderr) == (0, "")
