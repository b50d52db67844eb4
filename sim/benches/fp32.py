# SPDX-License-Identifier: Apache-2.0
"""Testbench of the FP32 adder and multiplier: every pair of exponents, and millions of pairs.

The design under test holds units of both kinds side by side, as building a design takes long; each
takes a new pair in every cycle. Every result is compared with NumPy's float32, and with SoftFloat
as far as the environment variable `SOFTFLOAT` says.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import cocotb
import numpy as np
import softfloatpy
from amaranth.hdl import Elaboratable, Module
from amaranth.lib import data, wiring
from amaranth.lib.wiring import In, Out

from speq.hw.common.ieee754 import FP32_BIAS, FP32_FRACTION, FP32_INFINITY, FP32_NAN
from speq.hw.common.unit import Unit
from speq.hw.vector.fp32_adder import Fp32Adder
from speq.hw.vector.fp32_multiplier import Fp32Multiplier
from speq.hw.verilog import convert_unit
from speq.sim.benches.stimulus import WORD_BITS, file_bench_verilog, pad, play_files
from speq.sim.compare import assert_equal_bits
from speq.sim.runner import seed, simulate

#: Units of each kind; two results make an observed word.
_COPIES = 16
_RESULT_BITS = 32
#: Random pairs for each kind, beyond the directed ones.
_RANDOM_PAIRS = 4_500_000
#: Results that are compared with SoftFloat's, evenly spaced, unless all are.
_SOFTFLOAT_SAMPLE = 100_000
_SOFTFLOAT = "SPEQ_BENCH_SOFTFLOAT"

_ONES = (1 << FP32_FRACTION) - 1
#: Fractions of the directed pairs: products of the last two, and sums of the second, are ties.
_FRACTIONS = (0, 1, _ONES, 1 << 22, 0x001000)


@dataclass(frozen=True)
class _Kind:
    """A unit, the members of its operands and result, and what to compare with."""

    unit: Fp32Adder | Fp32Multiplier
    result: str
    golden: Callable[[np.ndarray, np.ndarray], np.ndarray]
    soft: Callable[[softfloatpy.Float32, softfloatpy.Float32], softfloatpy.Float32]


_KINDS = {
    "adder": _Kind(Fp32Adder(), "sum", np.add, softfloatpy.f32_add),
    "multiplier": _Kind(Fp32Multiplier(), "product", np.multiply, softfloatpy.f32_mul),
}


class _Bench(wiring.Component):
    """Units side by side, `_COPIES` of each kind. A word of stimulus is a unit's pair; the last
    has the bits `subtract`."""

    def __init__(self) -> None:
        number = _COPIES * len(_KINDS)
        super().__init__(
            {
                "stimulus": In(data.ArrayLayout(WORD_BITS, number + 1)),
                "observed": Out(data.ArrayLayout(_RESULT_BITS, number)),
            }
        )

    def elaborate(self, platform: object) -> Elaboratable:
        m = Module()
        for i, (name, kind) in enumerate(_KINDS.items()):
            for copy in range(_COPIES):
                place = _COPIES * i + copy
                m.submodules[f"{name}_{copy}"] = unit = Unit(name, kind.unit)
                m.d.comb += [
                    unit.a.eq(self.stimulus[place][:32]),
                    unit.b.eq(self.stimulus[place][32:]),
                    self.observed[place].eq(getattr(unit, kind.result)),
                ]
                if name == "adder":
                    m.d.comb += unit.subtract.eq(self.stimulus[_COPIES * len(_KINDS)][copy])
        return m


def run(*, softfloat: bool = False) -> None:
    """Check the units; with `softfloat` compare every result with SoftFloat's."""
    verilog = file_bench_verilog(_Bench(), "fp32_tb")
    modules = [convert_unit(kind.unit, name, reset=False) for name, kind in _KINDS.items()]
    environment = {_SOFTFLOAT: str(int(softfloat))}
    simulate(verilog + "".join(modules), "fp32_tb", __name__, environment=environment)


@cocotb.test()
async def every_cycle(dut: Any) -> None:
    """Directed and random pairs, each result exactly `LATENCY` cycles after its pair."""
    rng = np.random.default_rng(seed())
    pairs = {"adder": _sums(rng), "multiplier": _products(rng)}
    subtract = rng.integers(0, 2, pairs["adder"].shape[:2]).astype(bool)
    cycles = max(map(len, pairs.values())) + max(kind.unit.LATENCY for kind in _KINDS.values())
    words = [pad(each.view(np.uint64)[..., 0], cycles) for each in pairs.values()]
    flags = np.packbits(pad(subtract, cycles), axis=1, bitorder="little").view(np.uint16)
    observed = await play_files(dut, np.concatenate([*words, flags.astype(np.uint64)], axis=1))
    results = np.split(observed.view(np.uint32), len(_KINDS), axis=1)
    for (name, kind), got in zip(_KINDS.items(), results, strict=True):
        given = pairs[name]
        dut._log.info(f"seed {seed()}, {name}: {given.size // 2:,} pairs")
        a, b = given[..., 0], given[..., 1]
        if name == "adder":
            b = b ^ subtract.astype(np.uint32) << np.uint32(31)
        got = got[kind.unit.LATENCY :][: len(given)]
        assert_equal_bits(
            f"{type(kind.unit).__name__}.{kind.result}",
            expected=_expected(kind, a, b),
            got=got,
            operands={"a": a, "b": b},
            cycles=kind.unit.LATENCY + np.arange(len(given))[:, None],
        )
        every = os.environ[_SOFTFLOAT] == "1"
        _compare_with_softfloat(kind, a.ravel(), b.ravel(), got.ravel(), every=every)


def _expected(kind: _Kind, a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Result bits, uint32, by NumPy."""
    with np.errstate(all="ignore"):
        values = kind.golden(a.view(np.float32), b.view(np.float32))
    return np.where(np.isnan(values), np.uint32(FP32_NAN), values.view(np.uint32))


def _compare_with_softfloat(
    kind: _Kind, a: np.ndarray, b: np.ndarray, got: np.ndarray, *, every: bool
) -> None:
    """Compare all results, or a sample of them, with SoftFloat's."""
    step = 1 if every else len(a) // _SOFTFLOAT_SAMPLE
    a, b, got = a[::step], b[::step], got[::step]
    results = b"".join(x.to_bytes() for x in map(kind.soft, _softfloats(a), _softfloats(b)))
    expected = np.frombuffer(results, ">u4").astype(np.uint32)
    # Which NaN it is, is not for SoftFloat to say.
    nan = (expected & 0x7FFFFFFF) > FP32_INFINITY
    expected = np.where(nan, np.uint32(FP32_NAN), expected)
    name = f"{type(kind.unit).__name__}.{kind.result} and SoftFloat"
    assert_equal_bits(name, expected=expected, got=got, operands={"a": a, "b": b})


def _softfloats(patterns: np.ndarray) -> Iterator[softfloatpy.Float32]:
    """SoftFloat's numbers of FP32 bit patterns."""
    text = patterns.astype(">u4").tobytes()
    return (softfloatpy.Float32.from_bytes(text[i : i + 4]) for i in range(0, len(text), 4))


def _sums(rng: np.random.Generator) -> np.ndarray:
    """Pairs for the adder, uint32 [cycles, copies, 2]: the random ones have exponents that are at
    most a significand apart; of some the difference has only a few bits."""
    a = _random_numbers(rng, _RANDOM_PAIRS)
    exponents = (a >> FP32_FRACTION & 255).astype(int)
    distance = np.rint(rng.normal(0, 8, len(a))).astype(int)
    b = _random_numbers(rng, len(a)) & ~np.uint32(255 << FP32_FRACTION)
    b |= np.clip(exponents + distance, 0, 255).astype(np.uint32) << FP32_FRACTION
    few = (1 << rng.integers(0, 25, len(a))).astype(np.uint32)
    b = np.where(rng.random(len(a)) < 0.1, (a ^ few) - rng.integers(0, 3, len(a)), b)
    return _cycles(rng, a, b)


def _products(rng: np.random.Generator) -> np.ndarray:
    """Pairs for the multiplier, uint32 [cycles, copies, 2]: the random ones' products have any
    exponent, and those around the smallest and the largest more often."""
    a, b = _random_numbers(rng, _RANDOM_PAIRS), _random_numbers(rng, _RANDOM_PAIRS)
    limit = np.where(rng.random(len(a)) < 0.8, FP32_BIAS - 12, FP32_BIAS + 255)
    field = limit + np.rint(rng.normal(0, 12, len(a))).astype(int)
    field -= (a >> FP32_FRACTION & 255).astype(int)
    aimed = b & ~np.uint32(255 << FP32_FRACTION)
    aimed |= np.clip(field, 0, 255).astype(np.uint32) << FP32_FRACTION
    return _cycles(rng, a, np.where(rng.random(len(a)) < 0.7, aimed, b))


def _random_numbers(rng: np.random.Generator, count: int) -> np.ndarray:
    """FP32 bit patterns, of whose fractions half have few significant bits: these make ties."""
    patterns = rng.integers(0, 1 << 32, count, np.uint32)
    places = rng.integers(0, FP32_FRACTION + 1, count).astype(np.uint32)
    short = patterns & ~((np.uint32(1) << places) - np.uint32(1))
    return np.where(rng.random(count) < 0.5, short, patterns)


def _directed() -> np.ndarray:
    """Every pair of exponents with every pair of `_FRACTIONS`, uint32 [pairs, 2]."""
    exponents = np.arange(256, dtype=np.uint32) << FP32_FRACTION
    numbers = (exponents[:, None] | np.array(_FRACTIONS, np.uint32)).ravel()
    return np.stack(np.meshgrid(numbers, numbers), axis=-1).reshape(-1, 2)


def _cycles(rng: np.random.Generator, a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Directed and given pairs with random signs, uint32 [cycles, copies, 2], in random order, so
    that neighbours in time have little in common."""
    pairs = np.concatenate([_directed(), np.stack([a, b], axis=-1).astype(np.uint32)])
    pairs ^= rng.integers(0, 2, pairs.shape, np.uint32) << np.uint32(31)
    pairs = pairs[: len(pairs) // _COPIES * _COPIES]
    return pairs[rng.permutation(len(pairs))].reshape(-1, _COPIES, 2)
