# SPDX-License-Identifier: Apache-2.0
"""Descriptions: the configuration in one is read, and nothing else is taken for one.

tests/cli/test_verilog.py reads what was written.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, replace
from typing import Any

import pytest

from speq.hw.accelerator_config import AcceleratorConfig
from speq.hw.engine_config import EngineConfig
from speq.hw.memory.axi import AxiConfig
from speq.hw.verilog import ACCELERATOR_TOP, TOP, read_description
from speq.model.number_format import FormatConfig

ENGINE = EngineConfig(rows=2, cols=4, format=FormatConfig(32, 1), draft_rows=2, max_k=64, max_o=99)
PORT = AxiConfig(data_bits=64, address_bits=33, burst=8, outstanding=4, depth=32)
ACCELERATOR = AcceleratorConfig(ENGINE, weights=PORT, data=replace(PORT, burst=4))


def _text(top: str, parameters: dict[str, Any]) -> str:
    results = {"ports": [], "latencies": {}, "verilator_lint_waivers": {}}
    return json.dumps({"top": top, "parameters": parameters, **results})


@pytest.fixture(scope="module")
def accelerator() -> str:
    return _text(ACCELERATOR_TOP, asdict(ACCELERATOR))


@pytest.fixture(scope="module")
def engine() -> str:
    derived = ("accumulator_bits", "accumulator_unit_exponent")
    return _text(TOP, asdict(ENGINE) | {name: getattr(ENGINE, name) for name in derived})


def test_configurations_are_read(accelerator, engine):
    assert read_description(accelerator) == ACCELERATOR
    assert read_description(engine) == ENGINE


def test_results_need_not_be_there(accelerator):
    content = json.loads(accelerator)
    short = {name: content[name] for name in ("top", "parameters")}
    assert read_description(json.dumps(short)) == ACCELERATOR


def _set(*path: str, value: object) -> Callable[[dict[str, Any]], None]:
    def change(content: dict[str, Any]) -> None:
        *outer, last = path
        for name in outer:
            content = content[name]
        if value is None:
            del content[last]
        else:
            content[last] = value

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_set("top", value=None), "no field top"),
        (_set("top", value="speq_pe"), "top is 'speq_pe'; expected 'speq_top' or"),
        (_set("parameters", value=None), "field parameters is missing"),
        (_set("parameters", value=[]), "parameters is []; expected an object"),
        (_set("version", value=1), "field version is unknown"),
        (_set("parameters", "engine", "rows", value=None), "parameters.engine.rows is missing"),
        (_set("parameters", "engine", "rows", value="4"), "engine.rows is '4'; expected an int"),
        (_set("parameters", "engine", "rows", value=True), "engine.rows is True; expected an int"),
        (_set("parameters", "engine", "rows", value=4.0), "engine.rows is 4.0; expected an int"),
        (_set("parameters", "engine", "rows", value=0), "parameters.engine: rows is 0"),
        (_set("parameters", "engine", "lanes", value=4), "parameters.engine.lanes is unknown"),
        (_set("parameters", "engine", "format", "group", value=48), "engine.format: group is 48"),
        (_set("parameters", "engine", "format", value=3), "engine.format is 3; expected an obj"),
        (_set("parameters", "data", "data_bits", value=100), "parameters.data: data_bits is 100"),
        (_set("parameters", "data", "address_bits", value=40), "parameters: address bits are 33"),
        (_set("parameters", "weights", "data_bits", value=512), "parameters: the weights port's"),
    ],
)
def test_the_wrong_field_is_named(accelerator, change, message):
    content = json.loads(accelerator)
    change(content)
    with pytest.raises(ValueError) as caught:
        read_description(json.dumps(content))
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("accumulator_bits", 3, r"accumulator_bits is 3; the others make it \d+"),
        ("accumulator_bits", None, "field parameters.accumulator_bits is missing"),
        ("engine", {}, "field parameters.engine is unknown"),
    ],
)
def test_what_follows_from_an_engines_parameters(engine, name, value, message):
    content = json.loads(engine)
    _set("parameters", name, value=value)(content)
    with pytest.raises(ValueError, match=message):
        read_description(json.dumps(content))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "not JSON"),
        ('{"top": "speq_top", "parameters"', "not JSON"),
        ("[" * 100_000, "not JSON"),
        ("[]", "no field top"),
        ('"speq_top"', "no field top"),
        ('{"name": "package", "version": 1}', "no field top"),
        ('{"top": "speq_top", "top": "speq_top"}', "field top is there twice"),
        ('{"top": ["speq_top"], "parameters": {}}', "top is"),
    ],
)
def test_foreign_and_damaged_text(text, message):
    with pytest.raises(ValueError, match=message):
        read_description(text)
