# SPDX-License-Identifier: Apache-2.0
"""The register map and the descriptor as a C header and as Markdown tables."""

from __future__ import annotations

import inspect
from collections.abc import Sequence

from speq.hw.accelerator_config import AcceleratorConfig, ErrorCode, PassKind
from speq.hw.control import descriptor
from speq.hw.control.descriptor import (
    DESCRIPTOR,
    DESCRIPTOR_BYTES,
    FORMS,
    TARGETS,
    DescriptorKind,
    Form,
    Target,
    Use,
)
from speq.hw.control.register_map import ANSWERS, ERRORS, STATES, Register, constants, registers
from speq.hw.engine_config import Mode

_ACCESSES = {
    "ro": "read only",
    "rw": "read and write",
    "wo": "write only, reads as 0",
    "w1c": "writing ones clears bits",
}
_C_TYPES = {8: "uint8_t", 32: "uint32_t", 64: "uint64_t"}
#: Members of the C struct that hold several fields of a descriptor, by their first bit: name, bits.
_SHARED = {8: ("flags", 8), 32: ("k_and_operation", 32)}
#: What addresses and distances are multiples of.
_MULTIPLES = {
    "weights": "a beat of the weights port",
    "data": "a beat of the data port",
    "word": "an activation word",
}
#: Prefix in C, title, and name, value and meaning of numbers in registers and descriptors.
_NUMBERS = (
    ("STATE", "States (STATUS)", [(name, *number) for name, number in STATES.items()]),
    ("ANSWER", "Answers (HOST_ANSWER)", [(name, *number) for name, number in ANSWERS.items()]),
    ("ERROR", "Errors (ERROR)", [(e.name, e.value, about) for e, about in ERRORS.items()]),
    ("PASS", "Kinds of passes (PASS.kind)", [(e.name, e.value, "") for e in PassKind]),
    ("KIND", "Kinds of descriptors", [(e.name, e.value, "") for e in DescriptorKind]),
    ("MODE", "Modes of GEMM and ARGMAX descriptors", [(e.name, e.value, "") for e in Mode]),
    (
        "OPERATION",
        "Operations of VECTOR descriptors",
        [
            (operation.name, operation.value, f"to {', '.join(target.name for target in targets)}")
            for operation, targets in TARGETS.items()
        ],
    ),
    ("TARGET", "Targets of VECTOR descriptors", [(e.name, e.value, "") for e in Target]),
)


def c_header(config: AcceleratorConfig) -> str:
    """A C header (C99, C++) of the registers and descriptors of one configuration.

    - SPEQ_REG_name: byte offset of a register. Of one of 64 bits, that of the lower half; the upper
      half, SPEQ_REG_name_HIGH, follows. Of an array, of its first element: SPEQ_REG_name_COUNT
      elements, SPEQ_REG_name_STRIDE bytes apart.
    - SPEQ_name_field_SHIFT, _MASK: a field of a register; the mask is in place.
    - SPEQ_VALUE_name: what a register that never changes reads.
    - SPEQ_STATE_, SPEQ_ANSWER_, SPEQ_ERROR_, SPEQ_PASS_, SPEQ_KIND_, SPEQ_MODE_, SPEQ_OPERATION_,
      SPEQ_TARGET_: numbers. SPEQ_ERROR_NAMES: strings, by number.
    - struct speq_descriptor: a descriptor, on a little-endian host.
    """
    parts = [
        "/* SPDX-License-Identifier: Apache-2.0 */",
        "/* Registers and descriptors of the SPEQ accelerator, generated for one configuration. */",
        "#ifndef SPEQ_H\n#define SPEQ_H\n\n#include <stdint.h>",
        "/* Registers: byte offsets, fields. */",
        *(_c_register(register) for register in registers(config)),
        "/* What the registers that never change read. */",
        _c_values(config),
        *(_c_numbers(*numbers) for numbers in _NUMBERS),
        _c_error_names(),
        _c_descriptor(),
        "#endif",
    ]
    return "\n\n".join(parts) + "\n"


def markdown(config: AcceleratorConfig) -> str:
    """The registers, the numbers in them and the descriptor as Markdown tables."""
    fixed = constants(config)
    parts = [
        "# Registers of SPEQ",
        "Registers are 32 bits wide, on an AXI4-Lite port. Those of 64 bits take two words, the "
        "lower half first. What is not named reads as 0 and ignores writes; after reset everything "
        "that can be written is 0. Registers with the access rw, but for IRQ_ENABLE, ignore writes "
        "in all states but IDLE and ERROR. Access: "
        + "; ".join(f"{access} {meaning}" for access, meaning in _ACCESSES.items())
        + ".",
        _table(
            ("Offset", "Name", "Access", "Bits", "Meaning"),
            [row for register in registers(config) for row in _register_rows(register, fixed)],
        ),
    ]
    for _prefix, title, rows in _NUMBERS:
        columns = [(value, name, about) for name, value, about in rows]
        headings = ("Value", "Name", "Meaning")
        if not any(about for _, _, about in columns):
            headings, columns = headings[:2], [column[:2] for column in columns]
        parts += [f"## {title}", _table(headings, columns)]
    fields = [
        (place.offset // 8, _bits(place.offset % 8, place.width), name)
        for name, place in DESCRIPTOR
    ]
    parts += [
        "## Descriptor",
        f"{DESCRIPTOR_BYTES} bytes, little-endian.",
        _table(("Byte", "Bits", "Field"), fields),
        f"```text\n{inspect.getdoc(descriptor)}\n```",
        *(_form(kind, form) for kind, form in FORMS.items()),
    ]
    return "\n\n".join(parts) + "\n"


def _form(kind: DescriptorKind, form: Form) -> str:
    """What a kind of descriptor does, and its fields."""
    parts = [f"### {kind.name}", form.about]
    rows = [
        (
            member + (f" ({use.name})" if use.name else ""),
            use.about,
            f"multiple of {_MULTIPLES[use.port]}" if use.port else "",
            _zero(use),
        )
        for member, use in form.uses.items()
    ]
    if rows:
        parts.append(_table(("Field", "Meaning", "Alignment", "Must be 0"), rows))
    return "\n\n".join([*parts, "All other fields but kind must be 0."])


def _zero(use: Use) -> str:
    """In which descriptors of its kind a field must be 0."""
    if use.values is not None:
        return f"with values = {int(not use.values)}"
    others = [mode.name for mode in Mode if mode not in use.modes]
    return f"in mode {' and '.join(others)}" if others else ""


def _define(name: str, value: str, about: str = "") -> str:
    return f"#define SPEQ_{name} {value}" + (f" /* {about} */" if about else "")


def _c_register(register: Register) -> str:
    lines = [_define(f"REG_{register.name}", f"0x{register.offset:03x}u", _about(register))]
    if register.words > 1:
        lines.append(_define(f"REG_{register.name}_HIGH", f"0x{register.offset + 4:03x}u"))
    if register.count:
        lines += [
            _define(f"REG_{register.name}_COUNT", f"{register.count}u"),
            _define(f"REG_{register.name}_STRIDE", f"{4 * register.words}u"),
        ]
    for field in register.fields:
        name = f"{register.name}_{field.name.upper()}"
        lines += [
            _define(f"{name}_SHIFT", f"{field.low}u", field.about),
            _define(f"{name}_MASK", f"0x{(1 << field.bits) - 1 << field.low:08x}u"),
        ]
    return "\n".join(lines)


def _about(register: Register) -> str:
    return f"{register.access}, {register.bits} bits: {register.about}"


def _c_values(config: AcceleratorConfig) -> str:
    fixed = constants(config)
    return "\n".join(
        _define(f"VALUE_{register.name}", f"0x{register.pack(fixed[register.name]):08x}u")
        for register in registers(config)
        if register.name in fixed
    )


def _c_numbers(prefix: str, title: str, rows: list[tuple[str, int, str]]) -> str:
    lines = [_define(f"{prefix}_{name}", f"{value}u", about) for name, value, about in rows]
    return "\n".join([f"/* {title}. */", *lines])


def _c_error_names() -> str:
    """The initializer of an array with the names of all errors."""
    names = (f'    "{code.name}"' for code in sorted(ErrorCode, key=lambda code: code.value))
    return "\n".join(
        [
            "/* Names of the errors, in order. */",
            "#define SPEQ_ERROR_NAMES \\",
            ", \\\n".join(names),
        ]
    )


def _c_descriptor() -> str:
    """The descriptor as a struct; some fields share a member."""
    members, macros = [], []
    start = end = 0  # of the member that is shared
    for name, place in DESCRIPTOR:
        if place.offset in _SHARED:
            shared, bits = _SHARED[place.offset]
            start, end = place.offset, place.offset + bits
            members.append(f"    {_C_TYPES[bits]} {shared};")
            macros.append(f"/* Fields of the member `{shared}`. */")
        if place.offset < end:
            macro, low = f"DESCRIPTOR_{name.upper()}", place.offset - start
            mask = (1 << place.width) - 1 << low
            macros += [
                _define(f"{macro}_SHIFT", f"{low}u"),
                _define(f"{macro}_MASK", f"0x{mask:0{(end - start) // 4}x}u"),
            ]
        else:
            members.append(f"    {_C_TYPES[place.width]} {name};")
    return "\n".join(
        [
            "/* A descriptor as it lies in memory, for a little-endian host. */",
            "struct speq_descriptor {",
            *members,
            "};",
            *macros,
            _define("DESCRIPTOR_BYTES", f"{DESCRIPTOR_BYTES}u"),
            "typedef char speq_descriptor_has_its_size",
            "    [sizeof(struct speq_descriptor) == SPEQ_DESCRIPTOR_BYTES ? 1 : -1];",
        ]
    )


def _register_rows(
    register: Register, fixed: dict[str, int | dict[str, int]]
) -> list[tuple[str, str, str, str, str]]:
    """A register's row of the table, and one for each of its fields."""
    offset, name, about = f"0x{register.offset:03x}", f"`{register.name}`", register.about
    if register.count:
        name += f" [{register.count}]"
    if register.name in fixed:
        about += f": 0x{register.pack(fixed[register.name]):x}"
    rows = [(offset, name, register.access, _bits(0, register.bits), about)]
    for field in register.fields:
        bits = _bits(field.low, field.bits)
        rows.append(("", f"`{register.name}.{field.name}`", "", bits, field.about))
    return rows


def _bits(low: int, bits: int) -> str:
    return f"{low + bits - 1}:{low}" if bits > 1 else f"{low}"


def _table(head: tuple[str, ...], rows: Sequence[tuple[object, ...]]) -> str:
    lines = [head, ("---",) * len(head), *rows]
    return "\n".join(
        "| " + " | ".join(str(cell).replace("|", "\\|") for cell in line) + " |" for line in lines
    )
