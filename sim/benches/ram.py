# SPDX-License-Identifier: Apache-2.0
"""Testbench of the RAM: random reads and writes, often of the same address."""

from __future__ import annotations

from typing import Any

import cocotb
import numpy as np
from amaranth.hdl import Elaboratable, Module
from amaranth.lib import data, wiring
from amaranth.lib.wiring import In, Out

from speq.hw.common.ram import RAM_VERILOG, Ram
from speq.sim.benches.stimulus import WORD_BITS, bench_verilog, pack, play
from speq.sim.compare import assert_equal_bits
from speq.sim.runner import seed, simulate

_CYCLES = 20_000
#: Width and depth of the RAMs under test; a depth need not be a power of two.
_SIZES = ((1, 2), (13, 5), (32, 64))
_ACCESS = data.StructLayout(
    {
        "write_data": 32,
        "write_address": 15,
        "read_address": 15,
        "write_enable": 1,
        "read_enable": 1,
    }
)


class _Bench(wiring.Component):
    """RAMs side by side, each with accesses of its own."""

    def __init__(self) -> None:
        super().__init__(
            {
                "stimulus": In(data.ArrayLayout(_ACCESS, len(_SIZES))),
                "observed": Out(data.ArrayLayout(WORD_BITS, len(_SIZES))),
            }
        )

    def elaborate(self, platform: object) -> Elaboratable:
        m = Module()
        for i, size in enumerate(_SIZES):
            m.submodules[f"ram_{i}"] = ram = Ram(*size)
            m.d.comb += [getattr(ram, name).eq(self.stimulus[i][name]) for name, _ in _ACCESS]
            m.d.comb += self.observed[i].eq(ram.read_data)
        return m


def run() -> None:
    """Check RAMs of several sizes."""
    verilog = bench_verilog(_Bench(), "ram_tb") + RAM_VERILOG
    simulate(verilog, "ram_tb", __name__)


@cocotb.test()
async def random_accesses(dut: Any) -> None:
    """Reads give the newest word of an earlier cycle and stay until the next read."""
    rng = np.random.default_rng(seed())
    dut._log.info(f"seed {seed()}")
    accesses = [_accesses(rng, *size) for size in _SIZES]
    observed = await play(dut, np.stack([pack(_ACCESS, each) for each in accesses], axis=1))
    for i, (width, depth) in enumerate(_SIZES):
        read_data = _read_data(accesses[i], depth)
        # A word appears one cycle after it was read; until `depth` nothing was.
        assert_equal_bits(
            f"Ram({width}, {depth}).read_data",
            expected=read_data[depth:-1],
            got=observed[depth + 1 :, i],
            operands={name: values[depth:-1] for name, values in accesses[i].items()},
            cycles=np.arange(depth + 1, _CYCLES),
        )


def _accesses(rng: np.random.Generator, width: int, depth: int) -> dict[str, np.ndarray]:
    """Values of the input ports by name, each an integer array [cycles]."""
    accesses = {
        "write_data": rng.integers(0, 1 << width, _CYCLES),
        "write_address": rng.integers(0, depth, _CYCLES),
        "read_address": rng.integers(0, depth, _CYCLES),
        "write_enable": rng.integers(0, 2, _CYCLES),
        "read_enable": rng.integers(0, 2, _CYCLES),
    }
    collide = rng.random(_CYCLES) < 0.25
    accesses["read_address"][collide] = accesses["write_address"][collide]
    # Contents are undefined until written: all words first, then a read.
    accesses["write_address"][:depth] = np.arange(depth)
    accesses["write_enable"][:depth] = 1
    accesses["read_enable"][depth] = 1
    return accesses


def _read_data(accesses: dict[str, np.ndarray], depth: int) -> np.ndarray:
    """The word read last, after each cycle, uint64 [cycles]."""
    read_data = np.zeros(_CYCLES, np.uint64)
    memory = [0] * depth
    value = 0
    columns = (accesses[name].tolist() for name, _ in _ACCESS)
    for cycle, (word, written, read, writes, reads) in enumerate(zip(*columns, strict=True)):
        if reads:
            value = memory[read]
        if writes:
            memory[written] = word
        read_data[cycle] = value
    return read_data
