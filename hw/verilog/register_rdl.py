# SPDX-License-Identifier: Apache-2.0
"""The register map in SystemRDL 2.0, the input of generators of headers, pages and models."""

from __future__ import annotations

import json
from collections.abc import Mapping

from speq.hw.accelerator_config import AcceleratorConfig, PassKind
from speq.hw.control.register_map import (
    ANSWERS,
    COUNTERS,
    ERRORS,
    STATES,
    Field,
    Register,
    constants,
    registers,
)

#: The type of a field whose values have names, by register and field.
_ENUM_OF = {
    ("STATUS", "value"): "state_e",
    ("ERROR", "value"): "error_e",
    ("HOST_ANSWER", "value"): "answer_e",
    ("PASS", "kind"): "pass_e",
}
_ENUMS = {
    "state_e": STATES,
    "error_e": {error.name: (error.value, about) for error, about in ERRORS.items()},
    "answer_e": ANSWERS,
    "pass_e": {kind.name: (kind.value, "") for kind in PassKind},
}
#: What software and hardware do with a field, by the register's access.
_PROPERTIES = {
    "ro": ("sw = r", "hw = w"),
    "rw": ("sw = rw", "hw = r"),
    "wo": ("sw = w", "hw = r", "swmod"),
    "w1c": ("sw = rw", "onwrite = woclr", "hw = w", "hwset", "hwclr"),
}
_CONSTANT = ("sw = r", "hw = na")
_COUNTER = ("sw = r", "hw = na", "counter", "hwclr")
_UPDATED = ("sw = rw", "hw = rw", "we")


def system_rdl(config: AcceleratorConfig, name: str) -> str:
    """The registers of a configuration as the address map `name`.

    A register of 64 bits is one of that width, accessed in words of 32. A register without fields
    has one called `value`. Registers that never change, that the host can write, and counters have
    a reset value.
    """
    fixed = constants(config)
    lines = [
        "// SPDX-License-Identifier: Apache-2.0",
        "// Registers of the SPEQ accelerator, generated for one configuration.",
        f"addrmap {name} {{",
        f"    name = {_text('SPEQ accelerator')};",
        f"    desc = {_text('What is not named reads as 0 and ignores writes.')};",
    ]
    for enum, members in _ENUMS.items():
        lines.append(f"    enum {enum} {{")
        bits = max(value for value, _ in members.values()).bit_length()
        for member, (value, about) in members.items():
            description = f" {{ desc = {_text(about)}; }}" if about else ""
            lines.append(f"        {member} = {bits}'d{value}{description};")
        lines.append("    };")
    for register in registers(config):
        lines += _register(register, fixed.get(register.name))
    return "\n".join([*lines, "};"]) + "\n"


def _register(register: Register, fixed: int | Mapping[str, int] | None) -> list[str]:
    """A register; `fixed` is what it always reads."""
    width = 32 * register.words
    lines = [
        "    reg {",
        f"        name = {_text(register.name)};",
        f"        desc = {_text(register.about)};",
        f"        regwidth = {width}; accesswidth = 32;",
    ]
    fields = register.fields or (Field("value", 0, register.bits, ""),)
    for field in fields:
        reset = None
        if isinstance(fixed, Mapping):
            reset = fixed[field.name]
        elif fixed is not None:
            reset = fixed
        elif register.access != "ro" or register.name in COUNTERS:
            reset = 0
        lines += _field(register, field, reset, constant=fixed is not None)
    array = f"[{register.count}]" if register.count else ""
    step = f" += {4 * register.words}" if register.count else ""
    return [*lines, f"    }} {register.name}{array} @ 0x{register.offset:03x}{step};"]


def _field(register: Register, field: Field, reset: int | None, *, constant: bool) -> list[str]:
    properties = _PROPERTIES[register.access]
    if constant:
        properties = _CONSTANT
    elif register.name in COUNTERS:
        properties = _COUNTER
    elif register.updated:
        properties = _UPDATED
    lines = ["        field {", f"            {' '.join(f'{each};' for each in properties)}"]
    if field.about:
        lines.append(f"            desc = {_text(field.about)};")
    if enum := _ENUM_OF.get((register.name, field.name)):
        lines.append(f"            encode = {enum};")
    start = "" if reset is None else f" = {field.bits}'h{reset:x}"
    place = f"{field.name}[{field.low + field.bits - 1}:{field.low}]"
    return [*lines, f"        }} {place}{start};"]


def _text(text: str) -> str:
    """A string in SystemRDL."""
    return json.dumps(text, ensure_ascii=False)
