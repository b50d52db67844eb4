# SPDX-License-Identifier: Apache-2.0
"""The register map, its C header and its Markdown."""

from __future__ import annotations

import itertools
import re
import subprocess
from pathlib import Path

import pytest

from speq import hw
from speq.hw.accelerator_config import AcceleratorConfig, ErrorCode, PassKind
from speq.hw.control.descriptor import (
    DESCRIPTOR,
    FORMS,
    Descriptor,
    DescriptorKind,
    Target,
    VectorOperation,
)
from speq.hw.control.register_map import (
    ADDRESS_BITS,
    ANSWERS,
    COUNTERS,
    ERRORS,
    STATES,
    constants,
    registers,
)
from speq.hw.engine_config import EngineConfig, Mode
from speq.hw.memory.axi import AxiConfig
from speq.hw.verilog.register_docs import c_header, markdown

WIDE = AxiConfig(data_bits=1024, address_bits=64)
CONFIGS = {
    "default": AcceleratorConfig(),
    "smallest": AcceleratorConfig(EngineConfig(rows=1, cols=4, max_k=1, max_o=1), lanes=0),
    "largest": AcceleratorConfig(
        EngineConfig(rows=64, cols=256, draft_rows=64, max_k=2**16, max_o=2**24), WIDE, WIDE
    ),
}
#: Bits of a descriptor that fields share a member of the struct in: the first and the one behind.
SHARED = ((8, 16), (32, 64))
COMPILERS = {"C99": ("gcc", "-std=c99", "-xc"), "C++17": ("g++", "-std=c++17", "-xc++")}

each_config = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)


def expected_macros(config: AcceleratorConfig) -> dict[str, int]:
    """What the header must define."""
    macros = {}
    for register in registers(config):
        name = f"SPEQ_REG_{register.name}"
        macros[name] = register.offset
        if register.bits > 32:
            macros[f"{name}_HIGH"] = register.offset + 4
        if register.count:
            macros |= {f"{name}_COUNT": register.count, f"{name}_STRIDE": 4}
        for field in register.fields:
            name = f"SPEQ_{register.name}_{field.name.upper()}"
            macros[f"{name}_SHIFT"] = field.low
            macros[f"{name}_MASK"] = sum(1 << field.low + i for i in range(field.bits))
    numbers = {
        "STATE": {name: value for name, (value, _) in STATES.items()},
        "ANSWER": {name: value for name, (value, _) in ANSWERS.items()},
    }
    enums = {"ERROR": ErrorCode, "PASS": PassKind, "KIND": DescriptorKind, "MODE": Mode}
    enums |= {"OPERATION": VectorOperation, "TARGET": Target}
    numbers |= {prefix: {e.name: e.value for e in enum} for prefix, enum in enums.items()}
    for prefix, values in numbers.items():
        macros |= {f"SPEQ_{prefix}_{name}": value for name, value in values.items()}
    by_name = {register.name: register for register in registers(config)}
    for name, value in constants(config).items():
        macros[f"SPEQ_VALUE_{name}"] = by_name[name].pack(value)
    for name, place in DESCRIPTOR:
        start = next((first for first, end in SHARED if first <= place.offset < end), None)
        if start is not None:
            low = place.offset - start
            macros[f"SPEQ_DESCRIPTOR_{name.upper()}_SHIFT"] = low
            macros[f"SPEQ_DESCRIPTOR_{name.upper()}_MASK"] = (1 << place.width) - 1 << low
    return macros | {"SPEQ_DESCRIPTOR_BYTES": 64}


def compile_and_run(program: str, compiler: tuple[str, ...], folder: Path) -> bytes:
    """What a program prints that includes the header, compiled without a warning."""
    strict = ("-Wall", "-Wextra", "-Wpedantic", "-Werror")
    subprocess.run(
        [*compiler, *strict, "-", "-o", "program"], cwd=folder, input=program.encode(), check=True
    )
    return subprocess.run(["./program"], cwd=folder, stdout=subprocess.PIPE, check=True).stdout


@each_config
@pytest.mark.parametrize("compiler", COMPILERS.values(), ids=COMPILERS)
def test_header_agrees_with_the_map(
    config: AcceleratorConfig, compiler: tuple[str, ...], tmp_path: Path
) -> None:
    (tmp_path / "speq.h").write_text(c_header(config))
    macros = expected_macros(config)
    prints = "".join(f'printf("{name} %lu\\n", (unsigned long){name});' for name in macros)
    program = (
        f'#include "speq.h"\n#include "speq.h"\n#include <stdio.h>\nint main(void){{{prints}}}'
    )
    lines = compile_and_run(program, compiler, tmp_path).decode().splitlines()
    assert {name: int(value) for name, value in map(str.split, lines)} == macros
    defined = re.findall(r"^#define (SPEQ_\w+) ", c_header(config), re.MULTILINE)
    checked = [*macros, "SPEQ_ERROR_NAMES"]
    assert sorted(defined) == sorted(checked), "each macro once, and none that is not checked"


@pytest.mark.parametrize("compiler", COMPILERS.values(), ids=COMPILERS)
def test_names_of_errors(compiler: tuple[str, ...], tmp_path: Path) -> None:
    (tmp_path / "speq.h").write_text(c_header(AcceleratorConfig()))
    program = (
        '#include "speq.h"\n#include <stdio.h>\nint main(void) {'
        "static const char *const names[] = {SPEQ_ERROR_NAMES};"
        "for (unsigned i = 0; i < sizeof names / sizeof *names; i++) puts(names[i]); return 0; }"
    )
    names = compile_and_run(program, compiler, tmp_path).decode().split()
    assert names == [ErrorCode(i).name for i in range(len(ErrorCode))]


@pytest.mark.parametrize("compiler", COMPILERS.values(), ids=COMPILERS)
def test_struct_is_a_descriptor_in_memory(compiler: tuple[str, ...], tmp_path: Path) -> None:
    (tmp_path / "speq.h").write_text(c_header(AcceleratorConfig()))
    flags = {"mode": 2, "half": 1, "wait": 0, "discard": 1, "values": 1, "behind": 2}
    sizes = {"k": 0xABCDE, "operation": 6, "target": 4}
    others = {name: 0x11 * (i + 1) for i, (name, place) in enumerate(DESCRIPTOR)
              if name not in flags | sizes and name != "kind"}  # fmt: skip
    packed, packed_sizes = (
        " | ".join(f"{v}u << SPEQ_DESCRIPTOR_{n.upper()}_SHIFT" for n, v in fields.items())
        for fields in (flags, sizes)
    )
    members = "".join(f"d.{name} = {value};" for name, value in others.items())
    program = (
        '#include "speq.h"\n#include <stdio.h>\nint main(void) { struct speq_descriptor d;'
        f"d.kind = SPEQ_KIND_ARGMAX; d.flags = (uint8_t)({packed}); "
        f"d.k_and_operation = {packed_sizes}; {members}"
        "return fwrite(&d, sizeof d, 1, stdout) != 1; }"
    )
    got = compile_and_run(program, compiler, tmp_path)
    booleans = {
        name: bool(value) for name, value in flags.items() if name not in ("mode", "behind")
    }
    others["ranking"] = others.pop("extra")
    fields = booleans | {"behind": flags["behind"]} | sizes | others
    expected = Descriptor(DescriptorKind.ARGMAX, Mode.BYPASS, **fields).pack()
    assert got.hex() == expected.hex()


@each_config
def test_markdown_has_a_row_for_everything(config: AcceleratorConfig) -> None:
    lines = markdown(config).splitlines()
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines if "|" in line]
    by_offset = {row[0]: row for row in cells if row[0].startswith("0x")}
    for register in registers(config):
        offset, name, access, bits, about = by_offset.pop(f"0x{register.offset:03x}")
        size = f" [{register.count}]" if register.count else ""
        assert (name, access) == (f"`{register.name}`{size}", register.access), offset
        assert int(bits.split(":")[0]) == register.bits - 1
        assert about.startswith(register.about)
        for field in register.fields:
            row = next(row for row in cells if row[1] == f"`{register.name}.{field.name}`")
            assert int(row[3].split(":")[-1]) == field.low
            assert row[4] == field.about
    assert not by_offset
    rows = [tuple(row) for row in cells]
    assert all((str(value), name, about) in rows for name, (value, about) in STATES.items())
    assert all((str(value), name, about) in rows for name, (value, about) in ANSWERS.items())
    assert all((str(e.value), e.name, about) in rows for e, about in ERRORS.items())
    for name, place in DESCRIPTOR:
        row = next(row for row in rows if row[-1] == name)
        high, low = (row[1].split(":") * 2)[:2]
        assert (int(row[0]) * 8 + int(low)) == place.offset
        assert int(high) - int(low) + 1 == place.width
    for kind, form in FORMS.items():
        section = lines[lines.index(f"### {kind.name}") :]
        fields = [line.split("|")[1:3] for line in section if line.startswith("|")][2:]
        for (name, about), (member, use) in zip(fields, form.uses.items(), strict=False):
            assert name.split()[0] == member and about.strip() == use.about
        assert form.about in section and len(fields) >= len(form.uses)


@each_config
def test_map_has_no_overlaps_and_fits(config: AcceleratorConfig) -> None:
    used = list(itertools.chain.from_iterable(each.offsets for each in registers(config)))
    assert used == sorted(set(used)), "registers overlap or are not in order"
    assert used[-1] < 1 << ADDRESS_BITS
    for register in registers(config):
        bits = [i for f in register.fields for i in range(f.low, f.low + f.bits)]
        assert len(bits) == len(set(bits)) and all(i < register.bits for i in bits), register.name
        assert register.words <= 2 and register.offset % (4 * register.words) == 0, register.name
    assert set(ERRORS) == set(ErrorCode)
    names = [register.name for register in registers(config)]
    assert len(names) == len(set(names)) and set(COUNTERS) | set(constants(config)) < set(names)


def test_values_that_do_not_fit_are_refused() -> None:
    by_name = {register.name: register for register in registers(AcceleratorConfig())}
    assert by_name["ROOT"].pack(2**24 - 1) == 0xFFFFFF
    assert by_name["PASS"].pack({"kind": 2, "rows": 3, "index": 4}) == 0x04_03_02
    with pytest.raises(ValueError, match="ROOT is 16777216; the register holds 24 bits"):
        by_name["ROOT"].pack(2**24)
    with pytest.raises(ValueError, match=r"PASS\.kind is 4; the register holds 2 bits"):
        by_name["PASS"].pack({"kind": 4, "rows": 3, "index": 4})


def test_the_map_in_the_repository_is_up_to_date() -> None:
    """hw/verilog/registers.md is what `speq verilog` writes for the default configuration."""
    path = Path(hw.__file__).with_name("verilog") / "registers.md"
    assert path.read_text() == markdown(AcceleratorConfig())
