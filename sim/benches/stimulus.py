# SPDX-License-Identifier: Apache-2.0
"""Cycle-by-cycle stimulus for units without flow control, as numpy arrays.

A bench is a component with the members `stimulus` (all inputs side by side) and `observed` (all
outputs), each a multiple of 64 bits wide: two signals to access in a cycle, however many copies of
a unit the bench holds. A bench hands its configuration to its test in the environment.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import numpy as np
from amaranth.lib import data, wiring
from cocotb.triggers import Timer

from speq.hw.engine_config import EngineConfig
from speq.hw.verilog import convert_unit
from speq.model.number_format import FormatConfig

WORD_BITS = 64

_CONFIG = "SPEQ_CONFIG"


def config_environment(config: EngineConfig) -> dict[str, str]:
    """Environment variables that hand a configuration to the test."""
    return {_CONFIG: json.dumps(asdict(config))}


def config_of_test() -> EngineConfig:
    """The configuration that the bench has handed to this test."""
    values = json.loads(os.environ[_CONFIG])
    return EngineConfig(**values | {"format": FormatConfig(**values["format"])})


def bench_verilog(bench: wiring.Component, top: str) -> str:
    """Verilog of a bench and, around it, the module `top`, whose ports are its only signals.

    The simulator can leave out all signals inside, then.
    """
    inputs, outputs = (len(port.as_value()) for port in (bench.stimulus, bench.observed))
    return (
        f"module {top} (input clk, input [{inputs - 1}:0] stimulus, "
        f"output [{outputs - 1}:0] observed);\n"
        "  bench bench (.clk(clk), .stimulus(stimulus), .observed(observed));\nendmodule\n"
    ) + convert_unit(bench, "bench", reset=False)


async def play(dut: Any, stimulus: np.ndarray) -> np.ndarray:
    """Apply one row of `stimulus` in each clock cycle and record the outputs of that cycle.

    Parameters
    ----------
    dut : cocotb handle
        The top module of `bench_verilog`.
    stimulus : uint64 array [cycles, words]
        The first word is in the lowest bits.

    Returns
    -------
    uint64 array [cycles, words]
        Outputs before the clock edge that ends the cycle, so that combinational outputs belong to
        the same row's inputs, and a register's are one row late.
    """
    observed = bytearray()
    for row in stimulus.astype("<u8"):
        dut.clk.value = 0
        dut.stimulus.value = int.from_bytes(row.tobytes(), "little")
        await Timer(1, "ns")
        observed += dut.observed.value.to_bytes(byteorder="little")
        dut.clk.value = 1
        await Timer(1, "ns")
    return np.frombuffer(observed, "<u8").reshape(len(stimulus), -1)


def pack(layout: data.StructLayout, fields: Mapping[str, np.ndarray]) -> np.ndarray:
    """Bits of a structure of at most 64 bits, elementwise.

    Parameters
    ----------
    layout : data.StructLayout
    fields : arrays of one shape [...] by field name
        A field that is an array has its elements along one more, last axis. Fields that are not
        given are 0.

    Returns
    -------
    uint64 array [...]
    """
    packed = np.zeros((), np.uint64)
    for name, values in fields.items():
        place, values = layout[name], values.astype(np.uint64)
        if isinstance(place.shape, data.ArrayLayout):
            elements = [(element.offset, values[..., i]) for i, element in place.shape]
        else:
            elements = [(0, values)]
        for offset, element in elements:
            packed = packed | element << np.uint64(place.offset + offset)
    return packed
