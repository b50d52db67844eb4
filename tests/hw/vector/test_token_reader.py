# SPDX-License-Identifier: Apache-2.0
"""The reader of a pass's tokens, on a text in memory."""

from __future__ import annotations

import numpy as np
import pytest
from amaranth.sim import Simulator

from speq.hw.accelerator_config import AcceleratorConfig
from speq.hw.engine_config import EngineConfig
from speq.hw.memory.axi import AxiConfig, Fault
from speq.hw.vector.token_reader import TokenReader
from speq.sim.runner import seed

pytestmark = pytest.mark.usefixtures("simulable_ram")

#: Where the text begins, and its tokens.
TEXT, TOKENS = 0x4000, 64
BASE, LIMIT = TEXT, TEXT + 4 * TOKENS - 1
_PATIENCE = 400


def system(rows: int, data_bits: int) -> AcceleratorConfig:
    port = AxiConfig(data_bits=data_bits, address_bits=32)
    return AcceleratorConfig(EngineConfig(rows=rows, cols=16), port, port, lanes=4)


def read(
    config: AcceleratorConfig, text: np.ndarray, passes: list[tuple[int, int]], bad: int = -1
) -> list[list[int] | tuple[Fault, int]]:
    """The tokens of passes at (position, rows), or the fault, which is cleared; the burst with
    token `bad` answers SLVERR."""
    dut, beat = TokenReader(config), config.data.beat_bytes
    rng = np.random.default_rng(seed())
    memory = text.astype("<u4").tobytes()
    got: list[list[int] | tuple[Fault, int]] = []

    async def answer(ctx):
        axi, queue = dut.axi, []
        ctx.set(axi.arready, 1)
        async for *_, valid, start, length, ready in ctx.tick().sample(
            axi.arvalid, axi.araddr, axi.arlen, axi.rready
        ):
            assert ready
            if valid:
                assert start % beat == 0 and start >= BASE
                assert start + (length + 1) * beat - 1 <= LIMIT
                queue += [(start + i * beat, i == length) for i in range(length + 1)]
            gives = bool(queue) and rng.random() < 0.6
            ctx.set(axi.rvalid, gives)
            if gives:
                place, last = queue.pop(0)
                content = memory[place - TEXT :][:beat]
                ctx.set(axi.rdata, int.from_bytes(content, "little"))
                ctx.set(axi.rlast, last)
                ctx.set(axi.rresp, 2 if place <= TEXT + 4 * bad < place + beat else 0)

    async def ask(ctx):
        ctx.set(dut.base, BASE)
        ctx.set(dut.limit, LIMIT)
        for position, rows in passes:
            command = {"address": TEXT, "position": position, "rows": rows}
            ctx.set(dut.command.payload, command)
            ctx.set(dut.command.valid, 1)
            await ctx.tick().until(dut.command.ready)
            ctx.set(dut.command.valid, 0)
            for _ in range(_PATIENCE):
                if not ctx.get(dut.busy) or ctx.get(dut.error) != Fault.NONE:
                    break
                await ctx.tick()
            else:
                raise AssertionError(f"position {position}, {rows} rows: it stays busy")
            if (fault := Fault(ctx.get(dut.error))) is not Fault.NONE:
                got.append((fault, ctx.get(dut.error_address)))
                await ctx.tick().repeat(20)
                assert ctx.get(dut.busy)
                ctx.set(dut.clear, 1)
                await ctx.tick()
                ctx.set(dut.clear, 0)
                await ctx.tick().until(~dut.busy)
                continue
            tokens = []
            for row in rng.permutation(rows):
                ctx.set(dut.row, int(row))
                await ctx.tick()
                tokens.append((row, ctx.get(dut.token)))
            got.append([token for _, token in sorted(tokens)])

    simulator = Simulator(dut)
    simulator.add_clock(1e-9)
    simulator.add_process(answer)
    simulator.add_testbench(ask)
    simulator.run()
    return got


@pytest.fixture
def text() -> np.ndarray:
    return np.random.default_rng(seed()).integers(0, 1 << 32, TOKENS, np.uint32)


@pytest.mark.parametrize(("rows", "data_bits"), [(1, 64), (3, 64), (8, 128), (16, 64), (5, 256)])
def test_tokens(text, rows, data_bits):
    """The lowest 24 bits of each number, from any place of a beat on, up to the region's end."""
    rng = np.random.default_rng(seed() + rows)
    passes = []
    for _ in range(40):
        count = int(rng.integers(1, rows + 1))
        passes.append((int(rng.integers(0, TOKENS - count + 1)), count))
    passes.append((TOKENS - 1, 1))
    got = read(system(rows, data_bits), text, passes)
    assert got == [
        (text[position : position + count] & 0xFFFFFF).tolist() for position, count in passes
    ]


def test_faults(text):
    """A bad response and a transfer outside the region; behind `clear` it reads again."""
    passes = [(4, 4), (20, 8), (0, 8), (TOKENS - 4, 8), (32, 8)]
    got = read(system(8, 128), text, passes, bad=25)
    assert got == [
        (text[4:8] & 0xFFFFFF).tolist(),
        (Fault.SLAVE, TEXT + 80),
        (text[:8] & 0xFFFFFF).tolist(),
        (Fault.REFUSED, TEXT + 4 * (TOKENS - 4)),
        (text[32:40] & 0xFFFFFF).tolist(),
    ]
