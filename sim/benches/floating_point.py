# SPDX-License-Identifier: Apache-2.0
"""Testbench of the floating-point units: every FP16 number, every pair of FP32 exponents, and
millions of random operands.

The design under test holds units of all kinds side by side, as building a design takes long; each
takes new operands in every cycle. Every result is compared with NumPy's, and with SoftFloat's: a
sample of them, or all.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import cocotb
import numpy as np
import softfloatpy
from amaranth.hdl import Elaboratable, Module
from amaranth.lib import data, wiring
from amaranth.lib.wiring import In, Out

from speq.hw.common.ieee754 import (
    FP16_BIAS,
    FP16_NAN,
    FP32_BIAS,
    FP32_FRACTION,
    FP32_INFINITY,
    FP32_NAN,
)
from speq.hw.common.unit import Unit
from speq.hw.vector.fp16_to_fp32 import Fp16ToFp32
from speq.hw.vector.fp32_adder import Fp32Adder
from speq.hw.vector.fp32_maximum import Fp32Maximum
from speq.hw.vector.fp32_multiplier import Fp32Multiplier
from speq.hw.vector.fp32_to_fp16 import Fp32ToFp16
from speq.hw.verilog import convert_unit
from speq.sim.benches.stimulus import WORD_BITS, file_bench_verilog, pad, play_files
from speq.sim.compare import assert_equal_bits
from speq.sim.runner import seed, simulate

#: Units of each kind; a word of stimulus is the operands of one, two results are a word observed.
_COPIES = 16
_OPERAND_BITS = _RESULT_BITS = 32
#: Random operands or pairs for each kind, beyond the directed ones.
_RANDOM, _FEWER = 4_500_000, 400_000
#: Results that are compared with SoftFloat's, evenly spaced, unless all are.
_SOFTFLOAT_SAMPLE = 50_000
_SOFTFLOAT = "SPEQ_BENCH_SOFTFLOAT"

_ONES = (1 << FP32_FRACTION) - 1
#: Fractions of the directed pairs: products of the last two, and sums of the second, are ties.
_FRACTIONS = (0, 1, _ONES, 1 << 22, 0x001000)
#: What is below FP16's last place in directed operands: around zero, a half and one.
_BELOW_FP16 = (0, 1, 0x0FFF, 0x1000, 0x1001, 0x1FFF)


@dataclass(frozen=True)
class _Kind:
    """A unit, its members, its operands, and what its results are compared with.

    Attributes
    ----------
    unit : wiring.Component
    members : tuple of str
        Operands, one or two, and the result.
    operands : function of a generator of random numbers
        uint32 [N, number of operands], bit patterns.
    golden : function
        Of arrays of bit patterns to that of the results.
    soft : function
        The same of one set of operands, by SoftFloat.
    """

    unit: Any
    members: tuple[str, ...]
    operands: Callable[[np.random.Generator], np.ndarray]
    golden: Callable[..., np.ndarray]
    soft: Callable[..., int]

    @property
    def name(self) -> str:
        return type(self.unit).__name__


def _fp32(values: np.ndarray) -> np.ndarray:
    """Bit patterns of float32; the only NaN is `FP32_NAN`."""
    return np.where(np.isnan(values), np.uint32(FP32_NAN), values.view(np.uint32))


def _sum(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return _fp32(a.view(np.float32) + b.view(np.float32))


def _product(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return _fp32(a.view(np.float32) * b.view(np.float32))


def _maximum(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    x, y = (np.where(np.isnan(z.view(np.float32)), -np.inf, z.view(np.float32)) for z in (a, b))
    return np.where(y > x, b, a)


def _to_fp16(a: np.ndarray) -> np.ndarray:
    half = a.view(np.float32).astype(np.float16)
    return np.where(np.isnan(half), np.uint16(FP16_NAN), half.view(np.uint16)).astype(np.uint32)


def _to_fp32(a: np.ndarray) -> np.ndarray:
    return _fp32(a.astype(np.uint16).view(np.float16).astype(np.float32))


def _soft(pattern: int) -> softfloatpy.Float32:
    return softfloatpy.Float32.from_bytes(pattern.to_bytes(4, "big"))


def _soft_bits(number: softfloatpy.Float32) -> int:
    """Bit pattern; which NaN it is, is not for SoftFloat to say."""
    pattern = int.from_bytes(number.to_bytes(), "big")
    return FP32_NAN if pattern & 0x7FFFFFFF > FP32_INFINITY else pattern


def _soft_sum(a: int, b: int) -> int:
    return _soft_bits(softfloatpy.f32_add(_soft(a), _soft(b)))


def _soft_product(a: int, b: int) -> int:
    return _soft_bits(softfloatpy.f32_mul(_soft(a), _soft(b)))


def _soft_maximum(a: int, b: int) -> int:
    least = FP32_INFINITY | 1 << 31
    x, y = (least if z & 0x7FFFFFFF > FP32_INFINITY else z for z in (a, b))
    return b if softfloatpy.f32_lt(_soft(x), _soft(y)) else a


def _soft_to_fp16(a: int) -> int:
    pattern = int.from_bytes(softfloatpy.f32_to_f16(_soft(a)).to_bytes(), "big")
    return FP16_NAN if a & 0x7FFFFFFF > FP32_INFINITY else pattern


def _soft_to_fp32(a: int) -> int:
    half = softfloatpy.Float16.from_bytes(a.to_bytes(2, "big"))
    return _soft_bits(softfloatpy.f16_to_f32(half))


def _close_pairs(rng: np.random.Generator) -> np.ndarray:
    """Every pair of exponents, and random pairs of numbers whose exponents are at most a
    significand apart; some differ in a few bits only."""
    a = _random_numbers(rng, _count())
    exponents = (a >> FP32_FRACTION & 255).astype(int)
    distance = np.rint(rng.normal(0, 8, len(a))).astype(int)
    b = _with_exponents(_random_numbers(rng, len(a)), exponents + distance)
    few = (1 << rng.integers(0, 25, len(a))).astype(np.uint32)
    b = np.where(rng.random(len(a)) < 0.1, (a ^ few) - rng.integers(0, 3, len(a)), b)
    return _pairs(rng, a, b)


def _any_pairs(rng: np.random.Generator) -> np.ndarray:
    """Every pair of exponents, and random pairs of numbers whose product has any exponent, one
    around the smallest or the largest more often."""
    a, b = _random_numbers(rng, _count()), _random_numbers(rng, _count())
    limit = np.where(rng.random(len(a)) < 0.8, FP32_BIAS - 12, FP32_BIAS + 255)
    field = limit + np.rint(rng.normal(0, 12, len(a))).astype(int)
    aimed = _with_exponents(b, field - (a >> FP32_FRACTION & 255).astype(int))
    return _pairs(rng, a, np.where(rng.random(len(a)) < 0.7, aimed, b))


def _around_fp16(rng: np.random.Generator) -> np.ndarray:
    """FP32 numbers at, halfway between and beside FP16 numbers, and random ones, most of which are
    subnormal or near the largest as FP16."""
    fractions = np.arange(1 << 10, dtype=np.uint32)[:, None] << 13 | np.array(
        _BELOW_FP16, np.uint32
    )
    exponents = np.arange(256, dtype=np.uint32)[:, None] << FP32_FRACTION
    directed = (exponents | fractions.ravel()).ravel()
    a = _random_numbers(rng, _count())
    low = FP32_BIAS - FP16_BIAS - 13
    near = _with_exponents(a, rng.integers(low, FP32_BIAS + FP16_BIAS + 3, len(a)))
    a = np.where(rng.random(len(a)) < 0.9, near, a)
    numbers = np.concatenate([directed, a])
    return (numbers ^ rng.integers(0, 2, len(numbers), np.uint32) << np.uint32(31))[:, None]


def _every_fp16(rng: np.random.Generator) -> np.ndarray:
    return np.arange(1 << 16, dtype=np.uint32)[:, None]


_KINDS = (
    _Kind(Fp32Adder(), ("a", "b", "sum"), _close_pairs, _sum, _soft_sum),
    _Kind(Fp32Multiplier(), ("a", "b", "product"), _any_pairs, _product, _soft_product),
    _Kind(Fp32Maximum(), ("a", "b", "maximum"), _close_pairs, _maximum, _soft_maximum),
    _Kind(Fp32ToFp16(), ("fp32", "fp16"), _around_fp16, _to_fp16, _soft_to_fp16),
    _Kind(Fp16ToFp32(), ("fp16", "fp32"), _every_fp16, _to_fp32, _soft_to_fp32),
)


class _Bench(wiring.Component):
    """Units side by side, `_COPIES` of each kind. The last word of stimulus has the adders' bits
    `subtract`."""

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
        for i, kind in enumerate(_KINDS):
            *operands, result = kind.members
            for copy in range(_COPIES):
                place = _COPIES * i + copy
                m.submodules[f"{kind.name}_{copy}"] = unit = Unit(
                    kind.name, kind.unit, clocked=kind.unit.LATENCY > 0
                )
                m.d.comb += self.observed[place].eq(getattr(unit, result))
                for j, name in enumerate(operands):
                    operand = self.stimulus[place].word_select(j, _OPERAND_BITS)
                    m.d.comb += getattr(unit, name).eq(operand)
                if isinstance(kind.unit, Fp32Adder):
                    m.d.comb += unit.subtract.eq(self.stimulus[-1][copy])
        return m


def _count() -> int:
    """Random operands of a unit."""
    return _RANDOM if os.environ[_SOFTFLOAT] == "1" else _FEWER


def run(*, softfloat: bool = False) -> None:
    """Check the units; with `softfloat` compare ten times as many random operands, and every result
    with SoftFloat's as well."""
    verilog = file_bench_verilog(_Bench(), "floating_point_tb")
    modules = [convert_unit(kind.unit, kind.name, reset=False) for kind in _KINDS]
    environment = {_SOFTFLOAT: str(int(softfloat))}
    simulate(verilog + "".join(modules), "floating_point_tb", __name__, environment=environment)


@cocotb.test()
async def every_cycle(dut: Any) -> None:
    """Directed and random operands, each result exactly `LATENCY` cycles after its operands."""
    rng = np.random.default_rng(seed())
    given = [_shuffled(rng, kind.operands(rng)) for kind in _KINDS]
    cycles = max(map(len, given)) + max(kind.unit.LATENCY for kind in _KINDS)
    words = [pad(_words(operands), cycles) for operands in given]
    subtract = rng.integers(0, 1 << _COPIES, cycles, np.uint64)
    observed = await play_files(dut, np.concatenate([*words, subtract[:, None]], axis=1))
    results = np.split(observed.view(np.uint32), len(_KINDS), axis=1)
    for kind, operands, got in zip(_KINDS, given, results, strict=True):
        dut._log.info(f"seed {seed()}, {kind.name}: {operands[..., 0].size:,} results")
        columns = list(np.moveaxis(operands, -1, 0))
        if isinstance(kind.unit, Fp32Adder):
            bits = subtract[: len(operands), None] >> np.arange(
                _COPIES, dtype=np.uint64
            ) & np.uint64(1)
            columns[1] = columns[1] ^ bits.astype(np.uint32) << np.uint32(31)
        got = got[kind.unit.LATENCY :][: len(operands)]
        with np.errstate(all="ignore"):
            expected = kind.golden(*columns)
        assert_equal_bits(
            f"{kind.name}.{kind.members[-1]}",
            expected=expected,
            got=got,
            operands=dict(zip(kind.members, columns, strict=False)),
            cycles=kind.unit.LATENCY + np.arange(len(got))[:, None],
        )
        step = 1 if os.environ[_SOFTFLOAT] == "1" else max(1, got.size // _SOFTFLOAT_SAMPLE)
        columns = [column.ravel()[::step] for column in columns]
        soft = map(kind.soft, *(column.tolist() for column in columns))
        assert_equal_bits(
            f"{kind.name}.{kind.members[-1]} and SoftFloat",
            expected=np.fromiter(soft, np.uint32, len(columns[0])),
            got=got.ravel()[::step],
            operands=dict(zip(kind.members, columns, strict=False)),
        )


def _shuffled(rng: np.random.Generator, operands: np.ndarray) -> np.ndarray:
    """Operands [N, number] as [cycles, copies, number] in random order, so that neighbours in time
    have little in common; a few may be left out at the end."""
    operands = operands[rng.permutation(len(operands))]
    return operands[: len(operands) // _COPIES * _COPIES].reshape(-1, _COPIES, operands.shape[-1])


def _words(operands: np.ndarray) -> np.ndarray:
    """uint64 [cycles, copies] of operands uint32 [cycles, copies, number]."""
    words = np.zeros(operands.shape[:-1], np.uint64)
    for i in range(operands.shape[-1]):
        words |= operands[..., i].astype(np.uint64) << np.uint64(_OPERAND_BITS * i)
    return words


def _with_exponents(numbers: np.ndarray, exponents: np.ndarray) -> np.ndarray:
    """FP32 bit patterns with other exponent fields, brought to 0 to 255."""
    fields = np.clip(exponents, 0, 255).astype(np.uint32) << FP32_FRACTION
    return numbers & ~np.uint32(255 << FP32_FRACTION) | fields


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


def _pairs(rng: np.random.Generator, a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Directed and given pairs with random signs, uint32 [pairs, 2]."""
    pairs = np.concatenate([_directed(), np.stack([a, b], axis=-1).astype(np.uint32)])
    return pairs ^ rng.integers(0, 2, pairs.shape, np.uint32) << np.uint32(31)
