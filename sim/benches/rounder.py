# SPDX-License-Identifier: Apache-2.0
"""Testbench of the rounder: halfway cases at every bit, and random sums of every magnitude.

The design under test holds rounders of several configurations side by side, as building a design
takes long, and several of each; each takes a new sum in every cycle.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import cocotb
import numpy as np
import torch
from amaranth.hdl import Elaboratable, Module
from amaranth.lib import data, wiring
from amaranth.lib.wiring import In, Out

from speq.hw.array.rounder import Rounder
from speq.hw.common.ieee754 import FP16_NAN, FP32_NAN
from speq.hw.common.unit import Unit
from speq.hw.engine_config import FP16_MAX, EngineConfig
from speq.hw.verilog import convert_unit
from speq.model.arith import to_float16
from speq.model.number_format import FormatConfig
from speq.sim.benches.stimulus import WORD_BITS, file_bench_verilog, pad, play_files
from speq.sim.compare import assert_equal_bits
from speq.sim.runner import seed, simulate

_CONFIGS = {
    "reference": EngineConfig(),
    "narrowest": EngineConfig(draft_rows=0, max_k=1),
    "widest": EngineConfig(format=FormatConfig(split=0), max_k=2**16),
}
#: Rounders of each configuration.
_ROUNDERS = 16
#: Words of stimulus per rounder: the sum, and above it in the last word the flags.
_WORDS = 2
_NAN, _HALF = 126, 127
_RESULT_BITS = 32
_RANDOM_SUMS = 150_000
_FP32_SIGNIFICAND_BITS = 24
_FP32_BIAS = 127


class _Bench(wiring.Component):
    """Rounders side by side: `_ROUNDERS` of each of those given."""

    def __init__(self, rounders: Mapping[str, Rounder]) -> None:
        self.rounders = rounders
        number = _ROUNDERS * len(rounders)
        super().__init__(
            {
                "stimulus": In(data.ArrayLayout(_WORDS * WORD_BITS, number)),
                "observed": Out(data.ArrayLayout(_RESULT_BITS, number)),
            }
        )

    def elaborate(self, platform: object) -> Elaboratable:
        m = Module()
        units = [each for each in self.rounders.items() for _ in range(_ROUNDERS)]
        for i, (name, rounder) in enumerate(units):
            m.submodules[f"rounder_{i}"] = unit = Unit(name, rounder)
            stimulus = self.stimulus[i]
            m.d.comb += [
                unit.sum.eq(stimulus),
                unit.nan.eq(stimulus[_NAN]),
                unit.half.eq(stimulus[_HALF]),
                self.observed[i].eq(unit.result),
            ]
        return m


def run() -> None:
    """Check the rounders of several configurations."""
    rounders = {f"rounder_{name}": Rounder(config) for name, config in _CONFIGS.items()}
    verilog = file_bench_verilog(_Bench(rounders), "rounder_tb")
    modules = [convert_unit(unit, name, reset=False) for name, unit in rounders.items()]
    simulate(verilog + "".join(modules), "rounder_tb", __name__)


@dataclass(frozen=True)
class _Case:
    """What the rounders of a configuration are given; arrays [cycles, rounders]."""

    config: EngineConfig
    sums: np.ndarray
    half: np.ndarray
    nan: np.ndarray


@cocotb.test()
async def every_cycle(dut: Any) -> None:
    """Directed and random sums, each result exactly `LATENCY` cycles after its sum."""
    cases = {}
    for name, config in _CONFIGS.items():
        cases[name] = case = _case(config)
        dut._log.info(f"seed {seed()}, {name}: {case.sums.size:,} sums")
    cycles = max(len(case.sums) for case in cases.values()) + Rounder.LATENCY
    stimulus = [pad(_stimulus(case), cycles) for case in cases.values()]
    observed = await play_files(dut, np.concatenate(stimulus, axis=1))
    results = np.split(observed.view(np.uint32), len(cases), axis=1)
    for (name, case), got in zip(cases.items(), results, strict=True):
        due = slice(Rounder.LATENCY, Rounder.LATENCY + len(case.sums))
        assert_equal_bits(
            f"Rounder.result, {name}",
            expected=_expected(case),
            got=got[due],
            operands={"sum": _patterns(case), "half": case.half, "nan": case.nan},
            cycles=np.arange(cycles)[due, None],
        )


def _case(config: EngineConfig) -> _Case:
    """Sums and flags in random order, so that neighbours in time have little in common."""
    rng = np.random.default_rng(seed())
    directed = list(_directed(config))
    sums = [*directed, *directed, *_random(rng, config)]
    sums += [0] * (-len(sums) % _ROUNDERS)
    half = rng.integers(0, 2, len(sums))
    half[: len(directed)], half[len(directed) : 2 * len(directed)] = 0, 1
    order = rng.permutation(len(sums)).reshape(-1, _ROUNDERS)
    nan = (rng.random(order.shape) < 0.02).astype(int)
    return _Case(config, np.array(sums, object)[order], half[order], nan)


def _patterns(case: _Case) -> np.ndarray:
    """The sums in two's complement."""
    return case.sums & (1 << case.config.accumulator_bits) - 1


def _stimulus(case: _Case) -> np.ndarray:
    """uint64 [cycles, words] for the rounders of a configuration."""
    flags = (case.nan << _NAN - WORD_BITS) | case.half.astype(object) << _HALF - WORD_BITS
    patterns = _patterns(case)
    stimulus = np.zeros((*case.sums.shape, _WORDS), np.uint64)
    stimulus[..., 0] = patterns & 2**WORD_BITS - 1
    stimulus[..., 1] = patterns >> WORD_BITS | flags
    return stimulus.reshape(len(stimulus), -1)


def _directed(config: EngineConfig) -> Iterator[int]:
    """Sums around every rounding decision that there can be, both signs, and the extremes."""
    bits = config.accumulator_bits
    magnitudes = {0, (1 << bits - 1) - 1, 1 << bits - 1}
    product = FP16_MAX * FP16_MAX << config.verify_offset
    magnitudes |= {product, product * config.max_k}
    for top in range(bits - 1):
        # Bit `cut` decides the rounding: the bits above it are kept, those below are sticky.
        for cut in range(top):
            smallest, unit = 1 << top, 1 << cut + 1
            largest = (1 << top + 1) - unit
            for kept in (smallest, smallest | unit, largest - unit | smallest, largest):
                for rest in (1 << cut, (1 << cut) + 1, (1 << cut) - 1):
                    magnitudes.add(kept + rest)
        magnitudes |= {1 << top, (1 << top + 1) - 1}
    for magnitude in sorted(magnitudes):
        if magnitude < 1 << bits - 1:
            yield magnitude
        yield -magnitude


def _random(rng: np.random.Generator, config: EngineConfig) -> list[int]:
    """Random sums with as many of each bit length."""
    bits = config.accumulator_bits
    words = rng.bytes(_RANDOM_SUMS * 16)
    lengths = rng.integers(1, bits, _RANDOM_SUMS).tolist()
    negative = rng.integers(0, 2, _RANDOM_SUMS).tolist()
    sums = []
    for i, (length, minus) in enumerate(zip(lengths, negative, strict=True)):
        magnitude = int.from_bytes(words[16 * i : 16 * i + 16], "little") >> 128 - length
        sums.append(-magnitude if minus else magnitude)
    return sums


def _expected(case: _Case) -> np.ndarray:
    """Result bits, uint32."""
    unit_exponent = case.config.accumulator_unit_exponent
    fp32 = np.vectorize(_round_to_fp32, otypes=[np.uint32])(case.sums, unit_exponent)
    fp16 = to_float16(torch.from_numpy(fp32).view(torch.float32)).view(torch.uint16).numpy()
    fp32[case.nan == 1] = FP32_NAN
    return np.where(case.half, np.where(case.nan, FP16_NAN, fp16), fp32).astype(np.uint32)


def _round_to_fp32(total: int, unit_exponent: int) -> int:
    """FP32 bits of ``total * 2^unit_exponent``, rounded to nearest even; not for subnormals."""
    magnitude = abs(total)
    if magnitude == 0:
        return 0
    shift = max(magnitude.bit_length() - _FP32_SIGNIFICAND_BITS, 0)
    kept, rest = divmod(magnitude, 1 << shift)
    kept += 2 * rest > 1 << shift or (2 * rest == 1 << shift and kept & 1)
    leading = magnitude.bit_length() - 1
    # A carry out of the significand runs into the exponent field, as it should.
    significand = kept << _FP32_SIGNIFICAND_BITS - 1 - (leading - shift)
    field = unit_exponent + leading + _FP32_BIAS - 1
    return (total < 0) << 31 | (field << _FP32_SIGNIFICAND_BITS - 1) + significand
