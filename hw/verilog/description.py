# SPDX-License-Identifier: Apache-2.0
"""The configuration in a description, the JSON file that lies beside the Verilog.

Only `top` and `parameters` are read; the rest of a description follows from them.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import fields, is_dataclass
from typing import Any, TypeVar, get_type_hints

from speq.hw.accelerator_config import AcceleratorConfig
from speq.hw.engine_config import EngineConfig
from speq.hw.verilog.generate import ACCELERATOR_TOP, TOP

_READ = ("top", "parameters")
_RESULTS = ("ports", "latencies", "verilator_lint_waivers")
#: What an engine's parameters say beside its configuration, of which they are properties.
_DERIVED = ("accumulator_bits", "accumulator_unit_exponent")

_Config = TypeVar("_Config")


def read_description(text: str) -> AcceleratorConfig | EngineConfig:
    """The configuration that a description was written for.

    Raises
    ------
    ValueError
        If it is no description, naming the field that is wrong, missing or unknown.
    """
    try:
        content = json.loads(text, object_pairs_hook=_unique)
    except RecursionError as error:
        raise ValueError("it is not JSON: nested too deeply") from error
    except json.JSONDecodeError as error:
        raise ValueError(f"it is not JSON: {error}") from error
    if not isinstance(content, dict) or "top" not in content:
        raise ValueError("it has no field top: speq verilog has not written it")
    _check_fields(content, "", _READ, _RESULTS)
    top, parameters = content["top"], content["parameters"]
    if top == ACCELERATOR_TOP:
        return _config(AcceleratorConfig, parameters, "parameters")
    if top != TOP:
        raise ValueError(f"top is {top!r:.60}; expected {ACCELERATOR_TOP!r} or {TOP!r}")
    config = _config(EngineConfig, parameters, "parameters", _DERIVED)
    for name in _DERIVED:
        value = getattr(config, name)
        if parameters[name] != value:
            raise ValueError(
                f"parameters.{name} is {parameters[name]!r:.40}; the others make it {value}"
            )
    return config


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object of JSON. Raises ValueError for a field that is there twice."""
    found: dict[str, Any] = {}
    for name, value in pairs:
        if name in found:
            raise ValueError(f"field {name:.60} is there twice")
        found[name] = value
    return found


def _check_fields(
    content: dict[str, Any], prefix: str, needed: Sequence[str], others: Sequence[str] = ()
) -> None:
    """Raises ValueError, naming it, for a field that is unknown or missing."""
    for name in content:
        if name not in (*needed, *others):
            raise ValueError(f"field {prefix}{name:.60} is unknown")
    for name in needed:
        if name not in content:
            raise ValueError(f"field {prefix}{name} is missing")


def _config(kind: type[_Config], content: Any, where: str, derived: Sequence[str] = ()) -> _Config:
    """A configuration of this class from an object of its members and what is derived of them."""
    if not isinstance(content, dict):
        raise ValueError(f"{where} is {content!r:.40}; expected an object")
    hints: dict[str, Any] = get_type_hints(kind)
    names = [member.name for member in fields(kind)]  # pyright: ignore[reportArgumentType]
    _check_fields(content, f"{where}.", [*names, *derived])
    values: dict[str, Any] = {}
    for name in names:
        value, place = content[name], f"{where}.{name}"
        if is_dataclass(hints[name]):
            values[name] = _config(hints[name], value, place)
        elif type(value) is int:
            values[name] = value
        else:
            raise ValueError(f"{place} is {value!r:.40}; expected an integer")
    try:
        return kind(**values)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error
