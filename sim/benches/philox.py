# SPDX-License-Identifier: Apache-2.0
"""Testbench of the random bits' generator: rings of all sizes against the golden function, called
sometimes, and as often as they allow."""

from __future__ import annotations

from typing import Any

import cocotb
import numpy as np
from amaranth.hdl import Cat, Elaboratable, Module
from amaranth.lib import data, wiring
from amaranth.lib.wiring import In, Out

from speq.hw.sampling.philox import Philox
from speq.model.gumbel import philox
from speq.sim.benches.stimulus import WORD_BITS, bench_verilog, play
from speq.sim.compare import assert_equal_bits
from speq.sim.runner import seed, simulate

_ROUNDS = (1, 2, 5, 10)
_CYCLES = 6000


class _Rings(wiring.Component):
    """A ring of each size. Stimulus: the counter, the key, and in the last word whether each ring
    is called. Observed, of each ring: the words, whether they are valid, whether a call is taken.
    """

    def __init__(self) -> None:
        super().__init__(
            {
                "stimulus": In(data.ArrayLayout(WORD_BITS, 4)),
                "observed": Out(data.ArrayLayout(3 * WORD_BITS, len(_ROUNDS))),
            }
        )

    def elaborate(self, platform: object) -> Elaboratable:
        m = Module()
        for i, rounds in enumerate(_ROUNDS):
            m.submodules[f"ring_{rounds}"] = ring = Philox(rounds)
            m.d.comb += [
                ring.counters.payload.eq(Cat(self.stimulus[0], self.stimulus[1])),
                ring.counters.valid.eq(self.stimulus[3][i]),
                ring.key.eq(self.stimulus[2]),
                self.observed[i].eq(Cat(ring.words, ring.valid, ring.counters.ready)),
            ]
        return m


def run() -> None:
    """Check the generator."""
    simulate(bench_verilog(_Rings(), "rings_tb"), "rings_tb", __name__)


@cocotb.test()
async def every_call(dut: Any) -> None:
    """All calls that are taken have their words `LATENCY` cycles later, nothing else has any, and
    the rate is the one promised."""
    rng = np.random.default_rng(seed())
    stimulus = rng.integers(0, 2**64, (_CYCLES, 4), np.uint64, endpoint=False)
    key = stimulus[0, 2]
    stimulus[:, 2] = key
    asks = rng.random((_CYCLES, len(_ROUNDS))) < 0.3
    busiest = slice(_CYCLES // 2, None)
    asks[busiest] = True
    stimulus[:, 3] = asks @ (1 << np.arange(len(_ROUNDS))).astype(np.uint64)
    observed = await play(dut, stimulus)
    words = observed.reshape(_CYCLES, len(_ROUNDS), 3)
    counters = stimulus[:, :2].copy().view(np.uint32)
    exact = philox(counters, (int(key) & 0xFFFFFFFF, int(key) >> 32)).view(np.uint64)
    for i, rounds in enumerate(_ROUNDS):
        valid, ready = words[:, i, 2] & 1 == 1, words[:, i, 2] >> 1 & 1 == 1
        taken = asks[:, i] & ready
        assert taken[busiest].mean() > rounds / 10 * 0.99
        due = np.zeros(_CYCLES, bool)
        latency = Philox(rounds).LATENCY
        due[latency:] = taken[:-latency]
        assert np.array_equal(valid, due), f"ring of {rounds}"
        expected = exact[np.flatnonzero(due) - latency]
        assert_equal_bits(
            f"Philox.words, {rounds} rounds",
            expected=expected,
            got=words[due, i, :2],
            operands={"counter": stimulus[np.flatnonzero(due) - latency, :2]},
            cycles=np.flatnonzero(due)[:, None],
        )
