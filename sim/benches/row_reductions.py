# SPDX-License-Identifier: Apache-2.0
"""Testbench of what the softmax needs of rows: the largest scores and the sums of the weights.

The design under test holds both units with different numbers of lanes, and all take the same words.
"""

from __future__ import annotations

from typing import Any

import cocotb
import numpy as np
from amaranth.hdl import Cat, Elaboratable, Module
from amaranth.lib import data, wiring
from amaranth.lib.wiring import In, Out

from speq.hw.vector.row_maximum import RowMaximum
from speq.hw.vector.weight_sum import WeightSum
from speq.sim.benches.stimulus import WORD_BITS, file_bench_verilog, play_files
from speq.sim.compare import assert_equal_bits
from speq.sim.runner import seed, simulate

_LANES = (4, 16)
_ROWS = 5
_MOST = 1024  # numbers of a row
_WORDS = 20_000
_WIDEST = max(_LANES)
_NUMBER_WORDS = _WIDEST * 32 // WORD_BITS
_WEIGHT_WORDS = _WIDEST * 16 // WORD_BITS


class _Bench(wiring.Component):
    """The units. The stimulus has the numbers of the widest, its weights, and a word of flags:
    `valid`, `first`, `row` and, from bit 8 on, `counts`."""

    def __init__(self) -> None:
        super().__init__(
            {
                "stimulus": In(data.ArrayLayout(WORD_BITS, _NUMBER_WORDS + _WEIGHT_WORDS + 1)),
                "observed": Out(data.ArrayLayout(32, 2 * len(_LANES))),
            }
        )

    def elaborate(self, platform: object) -> Elaboratable:
        m = Module()
        words = list(self.stimulus)
        numbers, weights = Cat(words[:_NUMBER_WORDS]), Cat(words[_NUMBER_WORDS:-1])
        flags = words[-1]
        for i, lanes in enumerate(_LANES):
            m.submodules[f"maximum_{lanes}"] = maximum = RowMaximum(lanes, _ROWS)
            m.submodules[f"sum_{lanes}"] = total = WeightSum(lanes, _MOST, _ROWS)
            m.d.comb += [
                Cat(maximum.valid, maximum.first, maximum.row).eq(flags[:8]),
                Cat(total.valid, total.first, total.row).eq(flags[:8]),
                maximum.counts.eq(flags[8 : 8 + lanes]),
                maximum.numbers.eq(numbers[: 32 * lanes]),
                total.weights.eq(weights[: 16 * lanes]),
                self.observed[2 * i].eq(maximum.maximum),
                self.observed[2 * i + 1].eq(total.total),
            ]
        return m


def run() -> None:
    """Check the units."""
    simulate(file_bench_verilog(_Bench(), "row_reductions_tb"), "row_reductions_tb", __name__)


@cocotb.test()
async def every_cycle(dut: Any) -> None:
    """Rows of every length in turns of every kind, with pauses, each result exactly as many cycles
    later as the unit says."""
    rng = np.random.default_rng(seed())
    dut._log.info(f"seed {seed()}")
    valid = rng.random(_WORDS) < 0.8
    row = _rows(rng)
    first = _first_words(rng, valid, row)
    numbers, weights = _numbers(rng), _weights(rng)
    counts = rng.random((_WORDS, _WIDEST)) < rng.random((_WORDS, 1))
    flags = valid | first.astype(np.uint64) << np.uint64(1)
    flags = flags | row.astype(np.uint64) << np.uint64(2)
    flags = flags | (counts << (8 + np.arange(_WIDEST))).sum(axis=1).astype(np.uint64)
    latencies = [(RowMaximum(n, _ROWS).latency, WeightSum(n, _MOST, _ROWS).latency) for n in _LANES]
    parts = [numbers.view(np.uint64), weights.view(np.uint64), flags[:, None]]
    stimulus = np.concatenate(parts, axis=1)
    stimulus = np.pad(stimulus, ((0, np.max(latencies)), (0, 0)))
    observed = (await play_files(dut, stimulus)).view(np.uint32)
    for i, lanes in enumerate(_LANES):
        expected = _expected(
            valid, first, row, numbers[:, :lanes], counts[:, :lanes], weights[:, :lanes]
        )
        for j, unit in enumerate(("RowMaximum.maximum", "WeightSum.total")):
            due = slice(latencies[i][j], latencies[i][j] + _WORDS)
            assert_equal_bits(
                f"{unit}, {lanes} lanes",
                expected=_one_zero(expected[j]),
                got=_one_zero(observed[due, 2 * i + j]),
                operands={"row": row, "valid": valid, "first": first},
                cycles=np.arange(len(observed))[due],
            )


def _one_zero(patterns: np.ndarray) -> np.ndarray:
    """The patterns with +0 in place of -0: of equal zeros either may be the largest."""
    return np.where(patterns == 1 << 31, np.uint32(0), patterns)


def _rows(rng: np.random.Generator) -> np.ndarray:
    """The rows of the words: runs of one row, two in turn, all in turn, and in no order."""
    words = np.arange(_WORDS)
    kinds = np.repeat(rng.integers(0, 4, _WORDS // 50), 50)
    part = words // 50
    turns = np.stack([part % _ROWS, (part + words % 2) % _ROWS, words % _ROWS])
    anywhere = rng.integers(0, _ROWS, _WORDS)
    return np.where(kinds == 3, anywhere, turns[np.minimum(kinds, 2), words])


def _first_words(rng: np.random.Generator, valid: np.ndarray, row: np.ndarray) -> np.ndarray:
    """Where rows begin anew, each with its first word, and none with more than `_MOST` numbers;
    also in words that are not valid, where it means nothing."""
    first = rng.random(len(valid)) < np.repeat(rng.choice([0.02, 0.2, 1.0], 20), len(valid) // 20)
    valid[0] = True
    since = [_MOST] * _ROWS
    for i in np.flatnonzero(valid):
        since[row[i]] = 1 if first[i] else since[row[i]] + 1
        if since[row[i]] * _WIDEST > _MOST:
            first[i], since[row[i]] = True, 1
    return first


def _numbers(rng: np.random.Generator) -> np.ndarray:
    """FP32 patterns, uint32 [words, lanes]: scores of both signs, wild ones, equal ones."""
    shape = (_WORDS, _WIDEST)
    usual = (rng.standard_normal(shape) * 9).astype(np.float32).view(np.uint32)
    wild = rng.integers(0, 1 << 32, shape, np.uint32)
    few = np.array([0, 1 << 31, 1, 0x7F800000, 0xFF800000, 0x7FC00000, 0x3F800000], np.uint32)
    kind = np.repeat(rng.integers(0, 3, _WORDS // 20), 20)[:, None]
    return np.where(kind == 0, usual, np.where(kind == 1, wild, rng.choice(few, shape)))


def _weights(rng: np.random.Generator) -> np.ndarray:
    """FP16 patterns from 0 to 1, uint16 [words, lanes]: of all exponents, and ones."""
    shape = (_WORDS, _WIDEST)
    patterns = rng.integers(0, 0x3C01, shape, np.uint16)
    return np.where(rng.random(shape) < 0.1, np.uint16(0x3C00), patterns)


def _expected(
    valid: np.ndarray,
    first: np.ndarray,
    row: np.ndarray,
    numbers: np.ndarray,
    counts: np.ndarray,
    weights: np.ndarray,
) -> tuple[np.ndarray, np.ndarray]:
    """Maxima and sums with each word, uint32 [words], of its row; of the last word's row where
    there is none."""
    values = numbers.view(np.float32)
    largest = np.where(counts & ~np.isnan(values), values, np.float32(-np.inf)).max(axis=1)
    sums = weights.view(np.float16).astype(np.float64).sum(axis=1)  # exact: multiples of 2^-24
    maxima, totals = np.zeros(_ROWS, np.float32), np.zeros(_ROWS)
    results = np.zeros((2, len(valid)), np.float32)
    at = 0
    for i in range(len(valid)):
        if valid[i]:
            at = row[i]
            maxima[at] = largest[i] if first[i] else max(maxima[at], largest[i])
            totals[at] = sums[i] + (0.0 if first[i] else totals[at])
        results[:, i] = maxima[at], totals[at]
    return results[0].view(np.uint32), results[1].view(np.uint32)
