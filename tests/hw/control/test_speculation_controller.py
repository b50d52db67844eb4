# SPDX-License-Identifier: Apache-2.0
"""The speculation controller against `speq.model.speculation.generate` on random logits.

The golden loop runs first, behind texts of few words and with a forward pass that makes up logits
with many ties, infinities and NaN. Its passes, their rankings, steps and statistics are recorded;
then the controller must ask for the same passes, is answered with the same rankings and must commit
the same steps.
"""

from __future__ import annotations

import random
import struct
from collections import Counter, deque
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from itertools import islice
from types import MappingProxyType, SimpleNamespace

import pytest
import torch
from amaranth.hdl import Value
from amaranth.lib import data
from amaranth.sim import Simulator

from speq.hw.accelerator_config import TOKEN_BITS, AcceleratorConfig, PassKind
from speq.hw.control.register_map import MAX_STOP_TOKENS
from speq.hw.control.speculation_controller import SpeculationController
from speq.hw.engine_config import EngineConfig
from speq.hw.memory.axi import AxiConfig
from speq.model import speculation
from speq.model.draft_tree import Proposal
from speq.model.settings import NO_GUESS, Policy
from speq.model.speculation import Settings, Statistics
from speq.model.vector_ops import ranked
from speq.sim.runner import seed
from tests.host.decoding import COUNTED
from tests.hw.verilog_tools import lint, write_unit

MAX_K = 500
POOL = [0.0, -0.0, 1.0, 1.0, 1.25, 1.5, 1.5, 2.0, 2.0, 1e-40, -3.0]
SPECIAL = [torch.inf, -torch.inf, torch.nan, -torch.nan, 3e38, -3e38]
THRESHOLDS = [0.0, 0.25, 0.5, 1.0, 1e-41, torch.inf]
#: A run that takes longer has come to a halt.
MAX_CYCLES = 40_000
HISTORY = 32

#: Members that the bench looks at in every cycle.
OUTPUTS = (
    "pass_status", "pass_position", "row_token", "row_place", "row", "step", "step_request",
    "finished", "ring_index", "update", "position", "root", "events",
)  # fmt: skip
#: The same, if there is a history.
HISTORY_OUTPUTS = ("history_update", "history_length")
#: The controller's events by the statistics that they count.
EVENTS = {name: counter.lower() for name, counter in COUNTED.items()}

pytestmark = pytest.mark.usefixtures("simulable_ram")


def system(
    rows: int, data_bits: int = 128, history: int = HISTORY, lanes: int = 0
) -> AcceleratorConfig:
    engine = EngineConfig(rows=rows, cols=data_bits // 16, max_k=MAX_K)
    axi = AxiConfig(data_bits=data_bits, address_bits=36)
    return AcceleratorConfig(engine, weights=axi, data=axi, history=history, lanes=lanes)


# The golden side.


@dataclass
class Pass:
    """A pass that the controller must ask for, and the ranking that it gets."""

    kind: PassKind
    rows: int
    position: int
    index: int = 0
    tokens: list[int] | None = None
    places: list[tuple[int, int, int]] = field(default_factory=list)  # depth, parent, origin
    ranking: list[int] = field(default_factory=list)
    source: int = 0  # of a MOVE


@dataclass
class Commit:
    """What the host must see at a step."""

    tokens: list[int]
    step: dict[str, int]
    position: int


@dataclass
class Run:
    """A run: registers, the history before it, and what must happen. It ends by the host if
    `finish` is set, which only one that `waits` can."""

    values: dict[str, object]
    history: list[int] = field(default_factory=list)
    fills: list[Pass] = field(default_factory=list)  # of the prompt
    passes: list[Pass] = field(default_factory=list)  # behind these
    commits: list[Commit] = field(default_factory=list)
    counts: Counter = field(default_factory=Counter)
    finish: bool = False
    waits: bool = False  # for the host, behind every step
    stopped: bool = False  # behind a stop token


class Cache:
    """Length of a KV cache; `kept` are the rows of the last step that stayed."""

    def __init__(self, length: int) -> None:
        self.length = length
        self.kept: list[int] = []

    def truncate(self, length: int) -> None:
        self.length = length

    def keep(self, start: int, slots: list[int]) -> None:
        self.kept = [slot - start for slot in slots]
        self.length = start + len(slots)


def random_logits(rng: random.Random, vocab: int, tokens: list[int]) -> torch.Tensor:
    """Logits with ties for the rows with `tokens`, in which other tokens of the pass often win."""
    rows = []
    for row in range(len(tokens)):
        logits = [rng.choice(POOL) for _ in range(vocab)]
        if rng.random() < 0.2:
            logits[rng.randrange(vocab)] = rng.choice(SPECIAL)
        if rng.random() < 0.1:
            logits = [rng.choice(SPECIAL) for _ in range(vocab)]
        if row + 1 < len(tokens) and rng.random() < 0.5:
            logits[tokens[row + 1]] = 9.0
        elif rng.random() < 0.6:
            logits[rng.choice(tokens)] = 9.0
        rows.append(logits)
    return torch.tensor(rows, dtype=torch.float32)


def reranked_logits(rng: random.Random, logits: torch.Tensor, count: int) -> torch.Tensor:
    """Logits of which only `count` random ones of each row are left, which are finite."""
    kept = torch.full_like(logits, -torch.inf)
    for row, given in zip(kept, logits, strict=True):
        for index in rng.sample(range(len(row)), min(count, len(row))):
            row[index] = given[index] if given[index].isfinite() else 0.5
    return kept


def ranking_of(
    config: AcceleratorConfig,
    logits: torch.Tensor,
    labels: list[int],
    rng: random.Random,
    reranked: int = 0,
) -> int:
    """Entries of a row, as bits; those that do not exist hold anything."""
    layout, entries = config.ranking_layout, []
    for index in ranked(logits, reranked or config.choices).tolist():
        bits = struct.unpack("<I", struct.pack("<f", logits[index]))[0]
        entries.append({"token": labels[index], "logit": bits, "valid": 1})
    while len(entries) < config.choices:
        entries.append(
            {"token": rng.randrange(2**TOKEN_BITS), "logit": rng.getrandbits(32), "valid": 0}
        )
    return layout.const(entries).as_bits()


def random_policy(rng: random.Random, guesses: bool) -> Policy:
    """Costs with ties or without, limits that are reached or not."""
    most = rng.choice([1, 4, 40, 255])

    def costs(count: int) -> list[int]:
        return [rng.randint(0, most) for _ in range(count)]

    guess_costs = [rng.choice([NO_GUESS, c, c, c]) if guesses else NO_GUESS for c in costs(4)]
    return Policy(
        chain_costs=costs(16),
        alternate_costs=costs(16),
        guess_costs=guess_costs,
        limit=rng.choice([65535, 65535, rng.randint(0, 4 * most)]),
        guess_limit=rng.choice([0, rng.randint(0, most), 255]),
    )


def golden_run(
    config: AcceleratorConfig,
    rng: random.Random,
    *,
    token_limit: int | None = None,
    steps: int | None = None,
    policy: Mapping[str, object] = MappingProxyType({}),
    **given: object,
) -> Run:
    """A run of the golden loop with random parameters, of which settings and those of the policy
    may be given; perhaps there are stop tokens, perhaps the host ends it after `steps`."""
    rows = config.engine.rows
    vocab = rng.choice([2, 3, 4, 6, 10, 30])
    labels = rng.sample(range(2**TOKEN_BITS), vocab)
    settings = Settings(
        rows=rows,
        draft_length=rng.randrange(rows),
        threshold=rng.choice(THRESHOLDS),
        choices=rng.randint(1, config.choices),
        reranked=rng.choice([0, rng.randint(1, config.choices)]),
        policy=replace(random_policy(rng, bool(config.history) and rng.random() < 0.8), **policy),
        history=config.history or HISTORY,
    )
    settings = replace(settings, **given)
    costs = settings.policy
    limit = token_limit or rng.randint(1, 4 * rows + 4)
    words = rng.sample(range(vocab), rng.randint(1, min(vocab, 4)))
    prompt = rng.choices(words, k=rng.choice([1, 2, rng.randint(3, HISTORY + 8)]))
    position = rng.randrange(len(prompt), MAX_K - limit - rows + 1)
    ring = rng.randrange(2**28) * config.data.beat_bytes
    count = steps or rng.choice([None, None, rng.randint(1, limit)])
    stop_ids = rng.sample(range(vocab), rng.choice([0, 0, 0, 1]))
    stops = [labels[token] for token in stop_ids]
    waits = count is not None or rng.random() < 0.5
    moves = {"move": rng.random() < 0.8} if config.lanes else {}
    run = Run(
        {
            "run": {"speculate": 1, "steps": waits} | moves,
            "stop_tokens": len(stops),
            "stop_token": [*stops, *rng.choices(labels, k=MAX_STOP_TOKENS - len(stops))],
            "pass_rows": rng.randrange(256),
            "position": position,
            "root": labels[prompt[-1]],
            "draft_length": settings.length,
            "threshold": struct.unpack("<I", struct.pack("<f", settings.threshold))[0],
            "choices": settings.offered,
            "token_limit": limit,
            "ring": ring,
            "ring_log2": rng.randint(1, 5),
            "chain_costs": packed(costs.chain_costs),
            "alternate_costs": packed(costs.alternate_costs),
            "cost_limit": costs.limit,
        }
    )
    if config.history:
        run.values["guess_costs"] = {f"length_{i + 1}": costs.guess_costs[i] for i in range(4)}
        run.values["guess_limit"] = costs.guess_limit
        run.history = [labels[token] for token in prompt[-config.history :]]
    cache = Cache(position)
    verified = [Proposal()]
    verify = speculation.verify

    def noted(model, cache, root, proposal) -> torch.Tensor:
        verified.append(proposal)
        return verify(model, cache, root, proposal)

    def forward(
        model, tokens, cache, *, draft=None, reranked=0, scores=None, positions=None, mask=None
    ) -> torch.Tensor:
        start = cache.length
        logits = random_logits(rng, vocab, tokens)
        if reranked:
            logits = reranked_logits(rng, logits, reranked)
        drafting = draft is not None
        proposal = Proposal() if drafting else verified[-1]
        places = zip(proposal.depths, [0, *proposal.parents], [0, *proposal.origins], strict=True)
        run.passes.append(
            Pass(
                PassKind.DRAFT if drafting else PassKind.VERIFY,
                len(tokens),
                start,
                run.passes[-1].index + 1 if drafting and previous_is_draft(run) else 0,
                [labels[token] for token in tokens],
                list(places),
                [ranking_of(config, row, labels, rng, reranked) for row in logits],
            )
        )
        cache.length += len(tokens)
        return logits

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(speculation, "forward", forward)
        patch.setattr(speculation, "verify", noted)
        made = speculation.generate(
            SimpleNamespace(config=SimpleNamespace(context=10**9)),
            prompt,
            {},
            max_tokens=limit,
            settings=settings,
            stop_ids=frozenset(stop_ids),
            text=SimpleNamespace(begin=lambda *_: cache, tokens=[]),
        )
        run.finish = count is not None
        statistics = Statistics()
        for step in islice(made, count):
            statistics.add(step)
            kept = cache.kept[: len(step.tokens)]  # nothing behind a stop token
            if moves.get("move"):
                start = cache.length - len(cache.kept)
                run.passes += [
                    Pass(PassKind.MOVE, 1, start + depth, source=start + row)
                    for depth, row in enumerate(kept)
                    if row != depth
                ]
            run.commits.append(
                Commit(
                    [labels[token] for token in step.tokens],
                    {
                        "committed": len(step.tokens),
                        "accepted": step.accepted,
                        "last_row": kept[-1],
                        "chain": step.drafted,
                    },
                    cache.length - len(cache.kept) + len(kept),
                )
            )
    rows_before = rng.choice([0, 0, 1, rng.randint(1, 3 * rows)])
    run.values["prompt_end"] = position if rows_before else rng.randint(0, position)
    if rows_before and position >= rows_before:
        prefill(run, position - rows_before, rows)
    run.stopped = run.commits[-1].tokens[-1] in stops
    run.waits = waits
    run.counts = Counter({event: asdict(statistics)[name] for name, event in EVENTS.items()})
    return run


def prefill(run: Run, start: int, rows: int) -> None:
    """Let a run begin at entry `start` and fill those up to where it decodes."""
    end = run.values["position"]
    run.values["position"] = start
    for position in range(start, end, rows):
        count = min(rows, end - position)
        places = [(row, max(0, row - 1), 0) for row in range(count)]
        run.fills.append(Pass(PassKind.SINGLE, count, position, places=places))


def packed(costs: tuple[int, ...]) -> list[int]:
    """Costs in words of 32 bits."""
    words = (costs[i : i + 4] for i in range(0, len(costs), 4))
    return [int.from_bytes(bytes(word), "little") for word in words]


def previous_is_draft(run: Run) -> bool:
    return bool(run.passes) and run.passes[-1].kind is PassKind.DRAFT


def single_run(config: AcceleratorConfig, rng: random.Random) -> Run:
    """A run of a single pass."""
    rows = rng.randint(1, config.engine.rows)
    run = golden_run(config, rng)
    values = run.values | {"run": {"speculate": 0}, "pass_rows": rows}
    places = [(row, max(0, row - 1), 0) for row in range(rows)]
    return Run(
        values, run.history, [Pass(PassKind.SINGLE, rows, values["position"], places=places)]
    )


# The hardware side.


class Bench:
    """The controller, and everything around it, in cycles."""

    def __init__(self, config: AcceleratorConfig, rng: random.Random) -> None:
        self.config = config
        self.rng = rng
        self.noise = random.Random(0)
        self.dut = dut = SpeculationController(config)
        self.outputs = {
            "pass_valid": dut.passes.valid,
            "pass_payload": dut.passes.payload,
            "command_valid": dut.write_command.valid,
            "command": dut.write_command.payload,
            "beat_valid": dut.write_data.valid,
            "beat": dut.write_data.payload,
        } | {name: getattr(dut, name) for name in self.names()}
        # Sampled as plain numbers, which is a lot faster.
        self.numbers = [Value.cast(signal) for signal in self.outputs.values()]
        self.entries = Value.cast(dut.entries)

    def names(self) -> tuple[str, ...]:
        """Members to look at."""
        return OUTPUTS + HISTORY_OUTPUTS if self.config.history else OUTPUTS

    def reset(self, run: Run) -> None:
        """Before a run."""
        self.run = run
        self.cycle = 0
        self.passes, self.commits = deque([*run.fills, *run.passes]), deque(run.commits)
        self.fills = deque(run.fills)
        self.walked: Pass | None = None  # the pass under way, `wait` cycles before its end
        self.wait = 0
        self.ranked: Pass | None = None  # the last pass, while its ranking is there
        self.row = 0
        self.offered: dict[str, object] = {}
        self.commands, self.beats = deque(), deque()
        self.memory: dict[int, int] = {}
        self.expected_memory: dict[int, int] = {}
        self.written = 0
        self.updates = []
        self.counts = Counter()
        self.answer: int | None = None  # cycles before the host's answer

    async def tick(self, ctx) -> SimpleNamespace:
        """One cycle; returns the outputs before its edge, as numbers."""
        _, _, *values = await ctx.tick().sample(*self.numbers)
        self.cycle += 1
        return SimpleNamespace(**dict(zip(self.outputs, values, strict=True)))

    def decoded(self, out: SimpleNamespace, name: str) -> data.Const:
        """An output that has parts."""
        return self.outputs[name].shape().from_bits(getattr(out, name))

    async def carry_out(self, ctx, run: Run, *, cycles: int | None = None) -> None:
        """Carry out a run and check everything; or only some cycles of it, and abort it."""
        self.reset(run)
        ctx.set(self.dut.values, run.values)
        await self.write_history(ctx, run.history)
        ctx.set(self.dut.begin, 1)
        await self.tick(ctx)
        ctx.set(self.dut.begin, 0)
        while cycles is None or self.cycle < cycles:
            self.check("cycles of a run", True, self.cycle < MAX_CYCLES)
            ready = self.drive(ctx)
            out = await self.tick(ctx)
            self.observe(out, ready)
            if self.config.history and out.history_update:
                self.history = min(self.config.history, self.history + self.committed)
                self.check("history length", self.history, out.history_length)
                ctx.set(self.dut.values.history_length, out.history_length)
            if out.finished:
                self.check("passes left", 0, len(self.passes))
                self.check("steps left", 0, len(self.commits))
                self.check("writes left", 0, len(self.commands) + len(self.beats))
                self.check("counters", +run.counts, +self.counts)
                return
        await self.clear(ctx)

    async def write_history(self, ctx, tokens: list[int]) -> None:
        """Forget the history and write another."""
        self.history = 0
        for token in tokens:
            ctx.set(self.dut.history_append, 1)
            ctx.set(self.dut.history_token, token)
            out = await self.tick(ctx)
            self.history += 1
            self.check("history", (1, self.history), (out.history_update, out.history_length))
            ctx.set(self.dut.values.history_length, self.history)
        if tokens:
            ctx.set(self.dut.history_append, 0)

    def drive(self, ctx) -> dict[str, bool]:
        """Set the inputs of a cycle; returns which streams are ready."""
        dut, rng = self.dut, self.rng
        done = self.walked is not None and self.wait == 0
        if done:
            self.walked, self.ranked = None, self.walked
        self.wait -= 1
        ctx.set(dut.pass_done, done)
        ctx.set(self.entries, self.ranking())
        ready = {name: rng.random() < 0.4 for name in ("pass", "command", "beat")}
        for name, port in zip(ready, (dut.passes, dut.write_command, dut.write_data), strict=True):
            ctx.set(port.ready, ready[name])
        write_done = bool(self.commands and self.beats) and rng.random() < 0.2
        if write_done:
            self.store(self.commands.popleft(), self.beats.popleft())
        ctx.set(dut.write_done, write_done)
        answered = self.answer == 0
        if self.answer is not None:
            self.answer -= 1
        ctx.set(dut.step_answer, answered)
        # Its value must not matter at any other time.
        ctx.set(dut.step_finish, self.run.finish and not self.commits if answered else 1)
        if self.config.history:
            ctx.set(dut.history_append, rng.random() < 0.1)  # is ignored
        return ready

    def ranking(self) -> int:
        """Entries of the row asked for in the cycle before; anything where there is no ranking."""
        ranking = self.ranked.ranking if self.ranked else []
        return ranking[self.row] if self.row < len(ranking) else self.noise.getrandbits(200)

    def observe(self, out: SimpleNamespace, ready: dict[str, bool]) -> None:
        """Check the outputs of a cycle and take what is offered."""
        self.row = out.row
        for name, payload in (
            ("pass", out.pass_payload),
            ("command", out.command),
            ("beat", out.beat),
        ):
            valid = getattr(out, f"{name}_valid")
            if name in self.offered:
                self.check(f"{name} kept until taken", (1, self.offered[name]), (valid, payload))
            self.offered.pop(name, None)
            if valid and not ready[name]:
                self.offered[name] = payload
        if out.pass_valid:
            self.check_pass(out, self.passes[0] if self.passes else None)
            if ready["pass"]:
                self.walked, self.ranked = self.passes.popleft(), None
                self.wait = self.rng.choice([0, 1, 5, 20])
        if out.command_valid and ready["command"]:
            self.commands.append(self.decoded(out, "command"))
        if out.beat_valid and ready["beat"]:
            self.beats.append(self.decoded(out, "beat"))
        if out.events:
            events = self.decoded(out, "events")
            self.counts.update({event: events[event] for event in EVENTS.values()})
            self.committed = events.committed
        if out.update and self.fills:
            fill = self.fills.popleft()
            self.check("passes before", len(self.fills), len(self.passes) - len(self.run.passes))
            expected = (fill.position + fill.rows, self.run.values["root"])
            self.check("update behind a single pass", expected, (out.position, out.root))
        elif out.update:
            self.updates.append((out.position, out.root))
            if not self.run.waits:
                self.check_step(out, self.commits.popleft() if self.commits else None)
        if not out.step_request:
            self.answer = None
        elif self.answer is None:
            self.check("a run with steps", True, self.run.waits)
            self.check_step(out, self.commits.popleft() if self.commits else None)
            self.answer = self.rng.choice([0, 1, 10])

    def check(self, what: str, expected: object, got: object) -> None:
        if expected != got:
            raise AssertionError(
                f"SpeculationController, {what}, cycle {self.cycle}, SPEQ_SEED={seed()}, "
                f"{self.run.values}: expected {_hex(expected)}, got {_hex(got)}"
            )

    def check_pass(self, out: SimpleNamespace, expected: Pass | None) -> None:
        """The pass on offer: its payload, registers and rows."""
        payload, status = self.decoded(out, "pass_payload"), self.decoded(out, "pass_status")
        got = (payload.kind, payload.rows, payload.position)
        self.check("pass", expected and (expected.kind, expected.rows, expected.position), got)
        registers = (PassKind(status.kind), status.rows, out.pass_position)
        if expected.kind is PassKind.MOVE:
            self.check("source of a move", expected.source, payload.source)
            self.check("pass registers in a move", self.registers, registers)
            return
        self.registers = registers
        self.check("pass registers", got, registers)
        self.check("pass index", expected.index, status.index)
        rows = self.decoded(out, "row_place")
        places = [(rows[i].depth, rows[i].parent, rows[i].origin) for i in range(expected.rows)]
        self.check("row places", expected.places, places)
        if expected.tokens is not None:
            tokens = self.decoded(out, "row_token")
            got = [tokens[i] for i in range(expected.rows)]
            self.check("row tokens", expected.tokens, got)

    def check_step(self, out: SimpleNamespace, expected: Commit | None) -> None:
        """What the host sees when it is asked, or as soon as the step is committed: registers, and
        the ring in memory."""
        self.check("a step", True, expected is not None)
        values = self.run.values
        for token in expected.tokens:
            slot = self.written % 2 ** values["ring_log2"]
            content = token.to_bytes(4, "little")
            self.expected_memory |= dict(enumerate(content, values["ring"] + 4 * slot))
            self.written += 1
        self.check("ring", self.expected_memory, self.memory)
        status = self.decoded(out, "step")
        step = {name: status[name] for name in expected.step}
        self.check("step", expected.step, step)
        self.check("ring index", self.written, out.ring_index)
        self.check("updates", [(expected.position, expected.tokens[-1])], self.updates)
        self.updates = []

    def store(self, command: object, beat: object) -> None:
        size = self.config.data.beat_bytes
        self.check("beats of a write", 1, command.beats)
        self.check("alignment of a write", 0, command.address % size)
        for i in range(size):
            if beat.strobe >> i & 1:
                self.memory[command.address + i] = beat.data >> 8 * i & 0xFF

    async def clear(self, ctx) -> None:
        """Abort the run; nothing may be on offer any more, `begin` is ignored."""
        dut = self.dut
        for signal in (dut.pass_done, dut.write_done, dut.step_answer):
            ctx.set(signal, 0)
        if self.config.history:
            ctx.set(dut.history_append, 0)
        ctx.set(dut.clear, 1)
        ctx.set(dut.begin, 1)
        await self.tick(ctx)
        for i in range(20):
            out = await self.tick(ctx)
            offers = (out.pass_valid, out.command_valid, out.beat_valid, out.step_request)
            self.check("offers after clear", (0, 0, 0, 0), offers)
            self.check("pulses after clear", (0, 0), (out.finished, out.update))
            if i == 5:
                ctx.set(dut.clear, 0)
                ctx.set(dut.begin, 0)


def _hex(value: object) -> str:
    """A value for a message, its numbers in hex."""
    if isinstance(value, dict):
        return str({_hex(k): _hex(v) for k, v in value.items()})
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(_hex, value))}]"
    return hex(value) if isinstance(value, int) else str(value)


def simulate(
    config: AcceleratorConfig, runs: list[Run], rng: random.Random, *, abort: bool
) -> None:
    """Carry out runs one after the other on one controller, some of them aborted before that."""
    bench = Bench(config, rng)

    async def body(ctx):
        for run in runs:
            if abort and rng.random() < 0.5:
                await bench.carry_out(ctx, run, cycles=rng.randrange(2, 120))
            await bench.carry_out(ctx, run)

    simulator = Simulator(bench.dut)
    simulator.add_clock(1e-9)
    simulator.add_testbench(body)
    simulator.run()


@pytest.mark.parametrize(
    ("rows", "data_bits", "history", "count", "lanes"),
    [
        (1, 64, 32, 4, 0),
        (2, 128, 8, 20, 4),
        (3, 64, 0, 30, 0),
        (4, 256, 16, 25, 8),
        (8, 128, 16, 20, 4),
    ],
)
def test_runs_equal_the_golden_loop(rows, data_bits, history, count, lanes):
    config = system(rows, data_bits, history, lanes)
    rng = random.Random(f"{seed()} {rows}")
    runs = [golden_run(config, rng) for _ in range(count)]
    total = sum((run.counts for run in runs), Counter())
    assert rows == 1 or any(run.fills for run in runs)
    assert rows == 1 or {run.stopped for run in runs} == {run.finish for run in runs} == {0, 1}
    assert total["draft_passes"] > total["accepted"] > 0 or rows == 1
    assert total["alternates"] > total["alternate_hits"] > 0 or rows <= 2
    moves = [each for run in runs for each in run.passes if each.kind is PassKind.MOVE]
    assert bool(moves) == (lanes > 0 and rows > 2)
    if history and rows > 2:
        assert total["guesses"] > total["guess_hits"] > 0 and total["free_steps"] > 0
    runs += [single_run(config, rng) for _ in range(3)]
    rng.shuffle(runs)
    simulate(config, runs, rng, abort=False)


def test_long_chains_and_many_alternates():
    config = system(64)
    rng = random.Random(seed())
    drafts = {"limit": 65535, "guess_limit": 0}
    guesses = {"guess_costs": (3, 2, 1, 1), "guess_limit": 0}
    costly = {"chain_costs": (255,) * 16, "alternate_costs": (255,) * 16}
    options = {"draft_length": 63, "threshold": 0.0, "token_limit": 300, "steps": 1}
    long = golden_run(config, rng, policy=drafts | costly | guesses, **options)
    options = {"draft_length": 20, "threshold": 0.0, "choices": 4, "reranked": 0}
    tries = (
        golden_run(config, rng, token_limit=12, policy=drafts | guesses, **options)
        for _ in range(100)
    )
    short = next(run for run in tries if run.counts["alternates"] and run.counts["guesses"])
    assert max(commit.step["chain"] for commit in long.commits) == 63
    simulate(config, [long, short], rng, abort=False)


def test_clear_ends_a_run_at_any_time():
    config = system(4, lanes=4)
    rng = random.Random(seed())
    runs = [golden_run(config, rng, token_limit=rng.randint(4, 8)) for _ in range(15)]
    simulate(config, [*runs, single_run(config, rng)], rng, abort=True)


def test_verilator_lints_it_without_a_warning(tmp_path, monkeypatch):
    monkeypatch.undo()  # the real memory
    name = "speq_speculation_controller"
    source = write_unit(SpeculationController(system(6)), name, tmp_path)
    assert lint(name, source) == (0, "")
