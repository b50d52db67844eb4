# SPDX-License-Identifier: Apache-2.0
"""The gap of two FP32 logits against numpy's subtraction."""

from __future__ import annotations

import numpy as np
import pytest
from amaranth.sim import Simulator

from speq.hw.common.ieee754 import FP32_INFINITY
from speq.hw.control.fp32_gap import Fp32Gap
from speq.sim.compare import assert_equal_bits
from speq.sim.runner import seed

CORNERS = [
    0x00000000, 0x00000001, 0x00000002, 0x007FFFFF, 0x00800000, 0x00800001, 0x00FFFFFF,
    0x01000000, 0x33800000, 0x34000000, 0x3F7FFFFF, 0x3F800000, 0x3F800001, 0x4B7FFFFF,
    0x4B800000, 0x4C000000, 0x4C000001, 0x7F000000, 0x7F7FFFFE, 0x7F7FFFFF, 0x7F800000,
    0x7F800001, 0x7FC00000, 0x7FFFFFFF,
]  # fmt: skip
PAIRS = 20_000


def expected_gaps(best: np.ndarray, other: np.ndarray) -> np.ndarray:
    """best - other as bits; +infinity where it is NaN, and +0 for -0."""
    with np.errstate(all="ignore"):
        gap = best.view(np.float32) - other.view(np.float32)
    gap = np.where(np.isnan(gap), np.float32(np.inf), gap) + np.float32(0)
    return gap.astype(np.float32).view(np.uint32)


def ordered(pairs: np.ndarray) -> np.ndarray:
    """Each pair with the larger number first, NaN behind everything."""
    values = pairs.view(np.float32)
    with np.errstate(invalid="ignore"):
        wrong = (values[:, 0] < values[:, 1]) | np.isnan(values[:, 0])
    return np.where(wrong[:, None], pairs[:, ::-1], pairs)


def corner_pairs() -> np.ndarray:
    bits = np.array(CORNERS, np.uint32)
    bits = np.concatenate([bits, bits | np.uint32(1 << 31)])
    return np.stack(np.meshgrid(bits, bits), axis=-1).reshape(-1, 2)


def random_pairs() -> np.ndarray:
    """Any bits; exponents that are close (cancellation, ties of the rounding); small numbers
    (subnormal results); and logits as a model has them, some of them equal."""
    rng = np.random.default_rng(seed())
    count = PAIRS // 4
    anything = rng.integers(0, 2**32, (count, 2), dtype=np.uint32)
    close = rng.integers(0, 2**32, (count, 2), dtype=np.uint32)
    exponents = rng.integers(30, 250, (count, 1)) + rng.integers(-2, 28, (count, 2))
    sparse = rng.integers(0, 2**23, (count, 2)) & -(1 << rng.integers(0, 23, (count, 2)))
    close = (close & (1 << 31)) | np.clip(exponents, 0, 254) << 23 | sparse
    small = rng.integers(0, 2**25, (count, 2), dtype=np.uint32)
    small |= rng.integers(0, 2, (count, 2), dtype=np.uint32) << np.uint32(31)
    logits = (rng.standard_normal((count, 2)) * 8).astype(np.float32).view(np.uint32)
    logits[::8, 1] = logits[::8, 0]
    return np.concatenate([anything, close.astype(np.uint32), small, logits])


def simulated_gaps(pairs: np.ndarray) -> np.ndarray:
    """Gaps of the unit, fed with a pair per cycle."""
    dut = Fp32Gap()
    gaps = []

    async def feed(ctx):
        for best, other in pairs.tolist():
            ctx.set(dut.best, best)
            ctx.set(dut.other, other)
            _, _, gap = await ctx.tick().sample(dut.gap)
            gaps.append(gap)
        for _ in range(dut.LATENCY):
            _, _, gap = await ctx.tick().sample(dut.gap)
            gaps.append(gap)

    simulator = Simulator(dut)
    simulator.add_clock(1e-9)
    simulator.add_testbench(feed)
    simulator.run()
    return np.array(gaps[dut.LATENCY :], np.uint32)


@pytest.mark.parametrize("make", [corner_pairs, random_pairs])
def test_gap_equals_numpys_difference(make):
    pairs = ordered(make())
    best, other = np.ascontiguousarray(pairs.T)
    expected = expected_gaps(best, other)
    assert_equal_bits(
        f"Fp32Gap (SPEQ_SEED={seed()})",
        expected=expected,
        got=simulated_gaps(pairs),
        operands={"best": best, "other": other},
        cycles=np.arange(len(pairs)),
    )
    # Every kind of result was there.
    exponents = expected >> 23
    assert (expected == FP32_INFINITY).any() and (expected == 0).any()
    assert ((exponents == 0) & (expected != 0)).any()
    assert ((exponents > 0) & (exponents < 255)).any()
