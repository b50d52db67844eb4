# SPDX-License-Identifier: Apache-2.0
"""The matcher against `longest_match` of the golden model."""

from __future__ import annotations

import random
from dataclasses import dataclass

import pytest
from amaranth.sim import Simulator

from speq.hw.accelerator_config import TOKEN_BITS, AcceleratorConfig
from speq.hw.control.ngram_matcher import NgramMatcher
from speq.hw.engine_config import EngineConfig
from speq.model.draft_tree import longest_match
from speq.sim.runner import seed
from tests.hw.verilog_tools import lint, write_unit

HISTORY = 16

pytestmark = pytest.mark.usefixtures("simulable_ram")


def system(rows: int = 4, choices: int = 4, history: int = HISTORY) -> AcceleratorConfig:
    return AcceleratorConfig(EngineConfig(rows=rows, cols=8), choices=choices, history=history)


@dataclass
class Query:
    """What is committed behind the history, and the candidates of each position of the chain that
    is then drafted; the first of them are the chain. `forgotten`: tokens that no longer count."""

    committed: list[int]
    positions: list[list[int]]
    forgotten: int = 0


class Bench:
    """The unit, and a list of the tokens that it should hold."""

    def __init__(self, config: AcceleratorConfig, rng: random.Random) -> None:
        self.config, self.rng = config, rng
        self.dut = NgramMatcher(config)
        self.tokens: list[int] = []

    async def run(self, ctx, queries: list[Query]) -> None:
        for query in queries:
            await self.carry_out(ctx, query)

    async def carry_out(self, ctx, query: Query) -> None:
        """The history, the root's match and those of all positions; then all once more."""
        dut = self.dut
        for token in query.committed:
            self.tokens.append(token)
            ctx.set(dut.append, 1)
            ctx.set(dut.token, token)
            await ctx.tick()
        ctx.set(dut.append, 0)
        kept = max(0, len(self.tokens) - query.forgotten)
        self.tokens = self.tokens[len(self.tokens) - min(kept, self.config.history) :]
        ctx.set(dut.length, len(self.tokens))
        end = ctx.get(dut.end)
        scans_root = self.rng.random() < 0.5 or not query.positions
        ctx.set(dut.restart, 1)
        await self.scan(ctx, scans_root, position=0)
        ctx.set(dut.restart, 0)
        if scans_root:
            await self.check(ctx, end, 0, 0, [])
        for position, candidates in enumerate(query.positions):
            ctx.set(dut.extend, 1)
            for i, token in enumerate(candidates):
                ctx.set(dut.candidates[i], token)
            await self.scan(ctx, True, position)
        for position, candidates in enumerate(query.positions):
            chain = [tokens[0] for tokens in query.positions[:position]]
            for choice, token in enumerate(candidates):
                await self.check(ctx, end, position, choice, [*chain, token])
        for back in range(1, len(self.tokens) + 1):
            ctx.set(dut.place, (end - back) % self.config.history)
            await ctx.tick()
            assert ctx.get(dut.known) == self.tokens[-back]

    async def scan(self, ctx, scans: bool, position: int) -> None:
        """Finish the cycle of a restart or extension, and the scan that it may start."""
        dut = self.dut
        ctx.set(dut.scan, scans)
        ctx.set(dut.position, position)
        await ctx.tick()
        for signal in (dut.restart, dut.extend, dut.scan):
            ctx.set(signal, 0)
        for i in range(self.config.choices):
            ctx.set(dut.candidates[i], self.rng.randrange(2**TOKEN_BITS))
        ctx.set(dut.position, self.rng.randrange(self.config.engine.rows))
        cycles = 0
        while ctx.get(dut.busy):
            await ctx.tick()
            cycles += 1
            assert cycles < self.config.history + 30
        places = len(self.tokens) - 1
        scanning = places + dut.OVERHEAD if places > 0 else 1
        assert cycles == (scanning + self.config.choices if scans else 0)

    async def check(self, ctx, end: int, position: int, choice: int, path: list[int]) -> None:
        """The match of a candidate, by the golden model."""
        dut = self.dut
        ctx.set(dut.position, position)
        ctx.set(dut.choice, choice)
        await ctx.tick()
        got = (ctx.get(dut.match.length), ctx.get(dut.match.next))
        match = longest_match(self.tokens, path)
        text = f"SPEQ_SEED={seed()}: path {path} behind {self.tokens}: "
        if match is None:
            assert got[0] == 0, f"{text}expected none, got {got}"
        else:
            place = (end - len(self.tokens) + match.next) % self.config.history
            assert got == (match.length, place), f"{text}expected {match}, at {place}, got {got}"


def simulate(config: AcceleratorConfig, queries: list[Query], rng: random.Random) -> None:
    bench = Bench(config, rng)

    async def body(ctx):
        await bench.run(ctx, queries)

    simulator = Simulator(bench.dut)
    simulator.add_clock(1e-9)
    simulator.add_testbench(body)
    simulator.run()


@pytest.mark.parametrize(
    "text",
    [
        [],
        [1],
        [1, 1],
        [1, 2],
        [1, 2, 1],
        [5, 1, 2, 3, 5, 1, 2, 3],  # the match ends where the window begins
        [1, 2, 3, 9, 2, 3, 8, 2, 3],  # two of equal length: the latest
        [4, 1, 2, 3, 9, 7, 2, 3, 8, 1, 2, 3],  # the longer one, before a later shorter one
        [6, 1, 2, 3, 4, 9, 7, 1, 2, 3, 4, 5, 6, 1, 2, 3, 4],  # longer ones count as 4 tokens
        [7] * 11,
        [1, 2, 3, 4, *range(100, 111), 1, 2, 3],  # the window has moved on: 1 is no longer there
        [*range(40), 39],
    ],
)
def test_directed(text):
    """The root's match, and chains of tokens that are known and of others; 0xFFFFFF and tokens that
    differ from one of the history in a single bit are not known."""
    rng = random.Random(seed())
    known = text[-3:] or [1]
    positions = [[token, token ^ 1 << 23, 0xFFFFFF, text[0] if text else 0] for token in known]
    same = [[known[0]] * 4] * 3  # all candidates are equal
    simulate(system(), [Query(text, []), Query([], positions), Query([], same)], rng)


@pytest.mark.parametrize(("rows", "choices", "history"), [(4, 4, 16), (1, 8, 8), (3, 8, 64)])
def test_random_texts(rows, choices, history):
    """Of few words, so that much is repeated; the ring wraps, and sometimes its length is set."""
    rng = random.Random(f"{seed()} {rows}")
    queries = []
    for _ in range(40):
        words = [rng.randrange(2**TOKEN_BITS) for _ in range(rng.choice([1, 2, 3, 6]))]
        if queries and rng.random() < 0.7:
            words = queries[-1].committed or words
        queries.append(
            Query(
                rng.choices(words, k=rng.randint(0, rng.choice([3, history]))),
                [rng.choices(words, k=choices) for _ in range(rng.randint(0, rows))],
                rng.choice([0, 0, 0, 1, 2 * history]),
            )
        )
    simulate(system(rows, choices, history), queries, rng)


def test_a_configuration_without_a_history_has_none():
    with pytest.raises(ValueError, match="no history"):
        NgramMatcher(system(history=0))


def test_verilator_lints_it_without_a_warning(tmp_path, monkeypatch):
    monkeypatch.undo()  # the real memory
    name = "speq_ngram_matcher"
    source = write_unit(NgramMatcher(system(6)), name, tmp_path)
    assert lint(name, source) == (0, "")
