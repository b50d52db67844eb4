# SPDX-License-Identifier: Apache-2.0
"""Testbench of exponential, sigmoid, reciprocal and root: every exponent, and many numbers.

The design under test holds copies of the units side by side, each with a new number in every cycle.
"""

from __future__ import annotations

import os
from typing import Any

import cocotb
import numpy as np
from amaranth.hdl import Elaboratable, Module
from amaranth.lib import data, wiring
from amaranth.lib.wiring import In, Out

from speq.hw.common.ieee754 import FP32_FRACTION, FP32_INFINITY, FP32_NAN
from speq.hw.common.unit import Unit
from speq.hw.vector.reciprocal import Reciprocal
from speq.hw.vector.sigmoid import Exponential, Sigmoid
from speq.hw.verilog import convert_unit
from speq.model.function_tables import INVERSE
from speq.model.vector_ops import exponential, reciprocal, rsqrt, sigmoid
from speq.sim.benches.stimulus import WORD_BITS, file_bench_verilog, pad, play_files
from speq.sim.compare import assert_equal_bits
from speq.sim.runner import seed, simulate

_COPIES = 4
_RESULTS = 3
_RESULT_BITS = 32
#: Random numbers for each unit, of the thorough check and of the ordinary one.
_RANDOM, _FEWER = 5_000_000, 500_000
_THOROUGH = "SPEQ_BENCH_THOROUGH"
_ONES = (1 << FP32_FRACTION) - 1
_UNITS = {"exponential": Exponential(), "sigmoid": Sigmoid(), "reciprocal": Reciprocal()}


class _Bench(wiring.Component):
    """Copies side by side. A word of stimulus has the numbers of both units of a copy; the last
    word has the bits `root`."""

    def __init__(self) -> None:
        super().__init__(
            {
                "stimulus": In(data.ArrayLayout(WORD_BITS, _COPIES + 1)),
                "observed": Out(data.ArrayLayout(_RESULT_BITS, _COPIES * _RESULTS)),
            }
        )

    def elaborate(self, platform: object) -> Elaboratable:
        m = Module()
        for copy in range(_COPIES):
            units = [Unit(name, unit) for name, unit in _UNITS.items()]
            for name, unit in zip(_UNITS, units, strict=True):
                m.submodules[f"{name}_{copy}"] = unit
            exponential, sigmoid, reciprocal = units
            m.d.comb += [
                sigmoid.part.eq(exponential.part),
                exponential.x.eq(self.stimulus[copy][:32]),
                reciprocal.x.eq(self.stimulus[copy][32:]),
                reciprocal.root.eq(self.stimulus[_COPIES][copy]),
            ]
            results = (exponential.exponential, sigmoid.sigmoid, reciprocal.result)
            for i, result in enumerate(results):
                m.d.comb += self.observed[_RESULTS * copy + i].eq(result)
        return m


def run(*, thorough: bool = False) -> None:
    """Check the units, with `thorough` with ten times as many random numbers."""
    verilog = file_bench_verilog(_Bench(), "vector_functions_tb")
    modules = [convert_unit(unit, name, reset=False) for name, unit in _UNITS.items()]
    environment = {_THOROUGH: str(int(thorough))}
    simulate(verilog + "".join(modules), "vector_functions_tb", __name__, environment=environment)


@cocotb.test()
async def every_cycle(dut: Any) -> None:
    """Directed and random numbers, each result exactly as many cycles later as the unit says."""
    rng = np.random.default_rng(seed())
    count = _RANDOM if os.environ[_THOROUGH] == "1" else _FEWER
    x, positive, root = _cycles(rng, _any_numbers(rng, count), _positive_numbers(rng, count))
    dut._log.info(f"seed {seed()}: {x.size:,} numbers")
    words = x.astype(np.uint64) | positive.astype(np.uint64) << np.uint64(32)
    flags = np.packbits(root, axis=1, bitorder="little").astype(np.uint64)
    stimulus = np.concatenate([words, flags], axis=1)
    latency = Exponential.LATENCY + Sigmoid.LATENCY
    observed = await play_files(dut, pad(stimulus, len(stimulus) + latency))
    results = observed.view(np.uint32).reshape(len(observed), _COPIES, _RESULTS)
    with np.errstate(all="ignore"):
        numbers = positive.view(np.float32)
        expected = {
            "Exponential.exponential": (exponential(x.view(np.float32)), Exponential.LATENCY),
            "Sigmoid.sigmoid": (sigmoid(x.view(np.float32)), latency),
            "Reciprocal.result": (
                np.where(root, rsqrt(numbers), reciprocal(numbers)),
                Reciprocal.LATENCY,
            ),
        }
    for i, (name, (values, latency)) in enumerate(expected.items()):
        operands = {"x": positive, "root": root} if name.startswith("Reciprocal") else {"x": x}
        assert_equal_bits(
            name,
            expected=np.where(np.isnan(values), np.uint32(FP32_NAN), values.view(np.uint32)),
            got=results[latency:, :, i][: len(x)],
            operands=operands,
            cycles=latency + np.arange(len(x))[:, None],
        )


def _any_numbers(rng: np.random.Generator, count: int) -> np.ndarray:
    """FP32 patterns, uint32: corners of all exponents, random ones of which most are of the
    magnitudes that matter to an exponential, and those around each multiple of ln 2."""
    corners = np.concatenate([_corners(np.arange(256)), _corners(np.arange(256)) | 1 << 31])
    patterns = rng.integers(0, 1 << 32, count, np.uint32)
    exponents = np.uint32(127 - 24) + rng.integers(0, 32, count, np.uint32)
    likely = patterns & ~np.uint32(255 << FP32_FRACTION) | exponents << np.uint32(FP32_FRACTION)
    multiples = (np.arange(1, 200)[:, None] * np.log(2.0)).astype(np.float32).view(np.uint32)
    near = (multiples + np.arange(-20, 20)).astype(np.uint32).ravel()
    random = np.where(rng.random(count) < 0.9, likely, patterns)
    return np.concatenate([corners, near, near | 1 << 31, random]).astype(np.uint32)


def _positive_numbers(rng: np.random.Generator, count: int) -> np.ndarray:
    """FP32 patterns, uint32, for which both functions are defined: positive, from 2^-125 to below
    2^126, infinite or NaN; corners, both ends of each interval of the tables, and random ones."""
    exponents = np.arange(2, 127 + 126)
    ends = np.arange(1 << INVERSE.index_bits, dtype=np.uint32) << np.uint32(INVERSE.bits)
    ends = np.concatenate([ends, ends - 1]) & np.uint32(_ONES)
    octaves = (np.array([127, 128], np.uint32) << np.uint32(FP32_FRACTION))[:, None] | ends
    special = np.array([FP32_INFINITY, FP32_NAN, FP32_INFINITY + 1], np.uint32)
    random = rng.integers(2 << FP32_FRACTION, 253 << FP32_FRACTION, count, np.uint32)
    return np.concatenate([special, _corners(exponents), octaves.ravel(), random])


def _corners(exponents: np.ndarray) -> np.ndarray:
    """Positive patterns with these exponent fields, uint32."""
    fractions = [0, 1, 2, _ONES, _ONES - 1, 1 << 22, (1 << 22) - 1, 0x3504F3, 0x38AA3B]
    return ((exponents[:, None] << FP32_FRACTION) | np.array(fractions)).ravel().astype(np.uint32)


def _cycles(rng: np.random.Generator, *patterns: np.ndarray) -> tuple[np.ndarray, ...]:
    """The patterns, uint32 [cycles, copies], in random order, so that neighbours in time have
    little in common, and as many random bits."""
    length = min(map(len, patterns)) // _COPIES * _COPIES
    # The directed ones come first and must all be there.
    shuffled = (each[:length][rng.permutation(length)] for each in patterns)
    bits = rng.integers(0, 2, length).astype(bool)
    return tuple(each.reshape(-1, _COPIES) for each in (*shuffled, bits))
