# SPDX-License-Identifier: Apache-2.0
"""The program walker: jobs of random programs against their definition, and every refusal."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field, replace
from functools import lru_cache

import pytest
from amaranth.sim import Simulator, SimulatorContext

from speq.hw.accelerator_config import AcceleratorConfig, ErrorCode
from speq.hw.control.descriptor import (
    DESCRIPTOR_BYTES,
    SINGLE_TARGETS,
    TARGETS,
    Descriptor,
    DescriptorKind,
    Target,
    VectorOperation,
)
from speq.hw.control.program_walker import ProgramWalker
from speq.hw.engine_config import EngineConfig, Mode
from speq.hw.memory.axi import AxiConfig
from speq.model.number_format import draft_words, residual_words
from speq.sim.runner import seed
from tests.hw.streams import Source

pytestmark = pytest.mark.usefixtures("simulable_ram")

ROWS, COLS, MAX_K, MAX_O = 3, 8, 64, 200
HEADS = 8
BASE, LIMIT = 0x1000, 0x8FFF
PROGRAM = 0x2000
_LATENCY = 5
_JOB_FIELDS = (
    *("mode", "k", "o", "tokens", "half", "discard", "rank", "stride", "keep", "tile", "columns"),
    *("whole", "again"),
)
_ADDRESSES = ("plane", "residual", "groups", "activations", "results")
ARGMAX = DescriptorKind.ARGMAX
#: Outputs of the ranking's row 0, the best first.
RANKED = (77, 5, 3, 79, 4, 76, 199)


def system(data_bits: int = 128, lanes: int = 0) -> AcceleratorConfig:
    engine = EngineConfig(rows=ROWS, cols=COLS, draft_rows=1, max_k=MAX_K, max_o=MAX_O)
    axi = AxiConfig(data_bits=data_bits, address_bits=32)
    if data_bits > 16 * COLS:
        engine = replace(engine, cols=64)
    return AcceleratorConfig(engine, weights=axi, data=axi, lanes=lanes, query_heads=HEADS)


@dataclass
class WalkRecord:
    """What a walk did."""

    events: list = field(default_factory=list)
    error: ErrorCode = ErrorCode.NONE
    error_address: int = 0
    done: bool = False


def memory_port(
    dut: ProgramWalker, memory: dict[int, int], bad_read: int | None = None
) -> Callable[[SimulatorContext], Coroutine]:
    """A process that answers the walker's reads with bytes of a memory; SLVERR at `bad_read`."""
    port = dut.config.data

    async def read_port(ctx):
        axi, waiting = dut.axi, []
        ctx.set(axi.arready, 1)
        async for *_, valid, start, beats, ready in ctx.tick().sample(
            axi.arvalid, axi.araddr, axi.arlen, axi.rready
        ):
            assert ready
            if valid:
                assert start % port.beat_bytes == 0
                for i in range(beats + 1):
                    place = start + i * port.beat_bytes
                    assert BASE <= place <= LIMIT
                    waiting.append([_LATENCY, place, i == beats])
            for entry in waiting:
                entry[0] -= 1
            now = waiting.pop(0) if waiting and waiting[0][0] <= 0 else None
            ctx.set(axi.rvalid, now is not None)
            if now:
                _, place, last = now
                data = bytes(memory.get(place + i, 0) for i in range(port.beat_bytes))
                ctx.set(axi.rdata, int.from_bytes(data, "little"))
                ctx.set(axi.rlast, last)
                ctx.set(axi.rresp, 2 if place == bad_read else 0)

    return read_port


def walk(
    config: AcceleratorConfig,
    program: list[Descriptor] | bytes,
    *,
    rows: int = 2,
    position: int = 5,
    source: int = 0,
    length: int = 100,
    address: int = PROGRAM,
    bad_read: int | None = None,
    trial: int = 0,
    chain: int = 0,
    cycles: int = 4000,
) -> WalkRecord:
    """Run a program; jobs end at random times, in order, and so does vector work. An ARGMAX misses
    an entry, again and again, if its address is no multiple of four descriptors. `bad_read` answers
    SLVERR there. Events of jobs and VECTORs end with how many jobs, products and VECTORs are under
    way."""
    content = program if isinstance(program, bytes) else b"".join(d.pack() for d in program)
    memory = dict(enumerate(content, start=address))
    dut, simulator, processes = simulation(config)
    record = WalkRecord()
    rng = random.Random(trial)

    async def taker(ctx):
        left, vectors = [], []
        transfer = host = 0
        ctx.set(dut.idle, 1)
        if config.lanes:
            ctx.set(dut.chain, chain)
        ctx.set(dut.rank_idle, 1)
        for _ in range(cycles):
            ctx.set(dut.jobs.ready, rng.random() < 0.5)
            ctx.set(dut.rank_command.ready, rng.random() < 0.5)
            ctx.set(dut.host_answer, host == 1)
            job = ctx.get(dut.jobs.payload)
            taken = ctx.get(dut.jobs.valid) and ctx.get(dut.jobs.ready)
            ranking = ctx.get(dut.rank_command.valid) and ctx.get(dut.rank_command.ready)
            under_way = bool(left or vectors)
            products = sum(ends for _, ends in left)
            if config.lanes:
                ctx.set(dut.vector.ready, rng.random() < 0.2)
                if ctx.get(dut.vector.valid) and ctx.get(dut.vector.ready):
                    command = ctx.get(dut.vector.payload)
                    values = {
                        name: int(getattr(command[name], "value", command[name]))
                        for name, _ in dut.vector.payload.shape()
                    }
                    counts = (len(left), products, len(vectors))
                    record.events.append(("vector", values, under_way, counts))
                    vectors.append([rng.randrange(2, 60), True])
            if taken:
                names = _JOB_FIELDS + _ADDRESSES
                values = {n: int(getattr(job[n], "value", job[n])) for n in names}
                values["descriptor"] = ctx.get(dut.error_address)
                counts = (len(left), products, len(vectors))
                record.events.append(("job", values, under_way, counts))
                left.append([rng.randrange(2, 30), ctx.get(dut.last)])
                if values["rank"]:
                    missed = misses(values["descriptor"]) and not values["keep"]
                    ctx.set(dut.rank_missed, missed and ctx.get(dut.kind) == ARGMAX.value)
            if ranking:
                payload = ctx.get(dut.rank_command.payload)
                record.events.append(("ranking", payload.address, payload.tokens, under_way))
                transfer = rng.randrange(2, 20)
            if ctx.get(dut.host_request):
                if host == 0:
                    record.events.append(("host", ctx.get(dut.host_argument), under_way))
                    host = rng.randrange(2, 20)
                host -= 1
            else:
                host = 0
            if ctx.get(dut.done):
                record.events.append(("end", under_way, transfer > 0))
                record.done = True
                return
            code = ctx.get(dut.error)
            if code != ErrorCode.NONE:
                record.error = ErrorCode(code)
                record.error_address = ctx.get(dut.error_address)
                return
            await ctx.tick()
            for queue in (left, vectors):
                if queue:
                    queue[0][0] -= 1
                    if queue[0][0] == 0:
                        queue.pop(0)
            transfer = max(0, transfer - 1)
            ctx.set(dut.idle, not left)
            if config.lanes:
                ctx.set(dut.products_left, sum(ends for _, ends in left))
                ctx.set(dut.vectors_left, len(vectors))
            ctx.set(dut.rank_idle, transfer == 0)

    async def configure(ctx):
        ctx.set(dut.base, BASE)
        ctx.set(dut.limit, LIMIT)
        ctx.set(dut.length, length)
        for entry, token in zip(dut.rank_entries, RANKED, strict=False):
            ctx.set(entry.token, token)
            ctx.set(entry.valid, 1)

    request = {"program": address, "rows": rows, "position": position}
    if config.lanes:
        request["source"] = source
    if processes:
        simulator.reset()
    processes |= {
        "memory": memory_port(dut, memory, bad_read),
        "taker": taker,
        "registers": configure,
        "request": Source(dut.walk, [request], rng).run,
    }
    simulator.run()
    return record


@lru_cache(maxsize=1)
def simulation(
    config: AcceleratorConfig,
) -> tuple[ProgramWalker, Simulator, dict[str, Callable[[SimulatorContext], Coroutine]]]:
    """A walker in the simulator, which takes longer to make than to run; and what runs beside it
    after the next reset, by name."""
    dut = ProgramWalker(config)
    processes: dict[str, Callable[[SimulatorContext], Coroutine]] = {}
    simulator = Simulator(dut)
    simulator.add_clock(1e-9)

    async def memory(ctx):
        await processes["memory"](ctx)

    async def taker(ctx):
        await processes["taker"](ctx)

    async def registers(ctx):
        await processes["registers"](ctx)

    async def request(ctx):
        await processes["request"](ctx)

    simulator.add_process(memory)
    simulator.add_testbench(taker)
    simulator.add_testbench(registers, background=True)
    simulator.add_testbench(request, background=True)
    return dut, simulator, processes


def misses(place: int) -> bool:
    """Whether the ranking of an ARGMAX descriptor there misses an entry."""
    return place // DESCRIPTOR_BYTES % 4 != 0


def jobs_of(config: AcceleratorConfig, d: Descriptor, rows: int, position: int) -> list[dict]:
    """The jobs that a descriptor means, by its definition."""
    engine = config.engine
    job = {
        "mode": d.mode.value, "k": d.k, "o": d.o, "tokens": d.tokens or rows, "half": int(d.half),
        "discard": int(d.discard), "rank": int(d.kind is DescriptorKind.ARGMAX), "stride": 0,
        "keep": 0, "tile": 0, "columns": (1 << engine.cols) - 1,
        "whole": int(d.ranking > 0 or d.stride > 0), "again": 0,
        **{name: getattr(d, name) for name in _ADDRESSES},
    }  # fmt: skip
    if d.kind is DescriptorKind.RERANK:
        candidates = RANKED[: d.candidates]
        groups = -(-d.k // engine.format.group) * engine.cols
        sizes = {
            "plane": draft_words(d.k) * engine.cols * 2,
            "residual": residual_words(d.k) * engine.cols * 2,
            "groups": -(-groups // config.data.beat_bytes) * config.data.beat_bytes,
        }
        job |= {"o": engine.cols, "tokens": 1, "discard": 1, "rank": 1}
        return [
            job
            | {"keep": int(i > 0), "tile": tile}
            | {"columns": sum(1 << c % engine.cols for c in candidates if c // engine.cols == tile)}
            | {name: job[name] + tile * size for name, size in sizes.items()}
            for i, tile in enumerate(sorted({c // engine.cols for c in candidates}))
        ]
    if d.kind is not DescriptorKind.ATTENTION:
        before = d.tile * job["tokens"] * engine.cols * (2 if d.half else 4)
        return [job | {"results": job["results"] + before}]
    job |= {"mode": Mode.BYPASS.value, "stride": d.stride}
    job["k" if d.values else "o"] = position + rows
    jobs = []
    left = rows * d.sharing
    while left:
        batch = min(left, engine.rows)
        jobs.append(job | {"tokens": batch})
        beat = config.data.beat_bytes
        job["activations"] += -(-job["k"] * config.activation_bytes // beat) * beat
        tiles = -(-job["o"] // engine.cols)
        job["results"] += tiles * batch * engine.cols * (2 if d.half else 4)
        left -= batch
    return jobs


def vector_command_of(d: Descriptor, rows: int, position: int, source: int) -> dict[str, int]:
    """The command that a VECTOR means, by its definition."""
    names = ("values", "sharing", "k", "o", "argument", "detail", "first", "second", "results")
    return {
        "operation": d.operation.value,
        "target": d.target.value,
        **{name: int(getattr(d, name)) for name in (*names, "outer", "inner")},
        "rows": rows,
        "position": position,
        "source": source,
    }


def random_vector(rng: random.Random) -> Descriptor:
    operation = rng.choice(list(TARGETS))
    keeps = operation in (VectorOperation.SOFTMAX, VectorOperation.NORMALIZE)
    target = rng.choice(TARGETS[operation])
    single = operation is VectorOperation.QUANTIZE or target in SINGLE_TARGETS
    sharing, o = rng.randint(1, HEADS), rng.randint(1, HEADS)
    if keeps:
        o = rng.randint(0, HEADS - sharing)
    return Descriptor(
        DescriptorKind.VECTOR,
        operation=operation,
        target=target,
        wait=rng.random() < 0.4,
        behind=rng.choice((0, 0, 1, 2, 3)),
        values=operation is VectorOperation.NORM or rng.random() < 0.5,
        sharing=sharing if keeps or target is Target.QUERIES else rng.choice([0, 255]),
        k=0 if operation is VectorOperation.SOFTMAX else rng.randint(1, MAX_K),
        o=1 if single else o,
        argument=rng.randrange(1 << 32),
        detail=rng.randrange(1 << 25) * 128,
        **{
            name: rng.randrange(1 << 20) * 128
            for name in ("first", "second", "results", "outer", "inner")
        },
    )


def random_descriptor(rng: random.Random, lanes: int) -> Descriptor:
    addresses = {name: rng.randrange(1 << 20) * 128 for name in _ADDRESSES}
    kind = rng.choice(
        [
            DescriptorKind.GEMM,
            DescriptorKind.GEMM,
            DescriptorKind.ATTENTION,
            DescriptorKind.ARGMAX,
            DescriptorKind.RERANK,
            DescriptorKind.HOST,
            *([DescriptorKind.VECTOR] * 6 if lanes else ()),
        ]
    )
    if kind is DescriptorKind.VECTOR:
        return random_vector(rng)
    if kind is DescriptorKind.HOST:
        return Descriptor(kind, argument=rng.randrange(1 << 32))
    wait, k, o = rng.random() < 0.3, rng.randint(1, MAX_K), rng.randint(1, MAX_O)
    behind = rng.choice((0, 0, 1, 2, 3)) if lanes else 0
    if kind is DescriptorKind.ATTENTION:
        values = rng.random() < 0.5
        return Descriptor(
            kind, wait=wait, behind=behind, half=rng.random() < 0.5, values=values,
            sharing=rng.randint(1, 5), k=0 if values else k, o=o if values else 0,
            plane=addresses["plane"], activations=addresses["activations"],
            results=addresses["results"], stride=rng.randrange(3) * 128,
        )  # fmt: skip
    if kind is DescriptorKind.RERANK:
        del addresses["results"]
        return Descriptor(
            kind, k=k, candidates=rng.randint(1, 8), ranking=rng.randrange(2) * 128, **addresses
        )
    mode = rng.choice(list(Mode))
    if mode is not Mode.VERIFY:
        addresses["residual"] = 0
    if mode is Mode.BYPASS:
        addresses["groups"] = 0
    d = Descriptor(
        kind, mode, wait=wait, behind=behind, k=k, o=o,
        tokens=1 if mode is Mode.DRAFT else rng.randint(0, ROWS), **addresses,
    )  # fmt: skip
    if kind is DescriptorKind.ARGMAX:
        return replace(d, discard=rng.random() < 0.5, ranking=rng.randrange(2) * 128)
    return replace(d, half=rng.random() < 0.5, tile=rng.choice((0, 0, 1, rng.randrange(256))))


@pytest.mark.parametrize(
    ("data_bits", "lanes"), [(64, 0), (128, 0), (1024, 0), (64, 4), (128, 8), (1024, 64)]
)
def test_random_programs(data_bits, lanes):
    config = system(data_bits, lanes)
    rng = random.Random(1000 * seed() + data_bits + lanes)
    events, repeated = [], 0
    for trial in range(3):
        rows = 1 if lanes else rng.randint(1, ROWS)  # draft activations allow no more
        program = [random_descriptor(rng, lanes) for _ in range(20)]
        position, source = (rng.randint(0, MAX_K - ROWS) for _ in range(2))
        got = walk(
            config,
            [*program, Descriptor(DescriptorKind.END)],
            rows=rows,
            position=position,
            source=source,
            trial=trial,
            chain=trial,
        )
        events += got.events
        rest = iter(got.events)
        for place, d in zip(itertools.count(PROGRAM, DESCRIPTOR_BYTES), program, strict=False):
            if d.kind is DescriptorKind.HOST:
                assert next(rest) == ("host", d.argument, False)
                continue
            if d.kind is DescriptorKind.VECTOR:
                name, values, _, (_, products, vectors) = next(rest)
                assert name == "vector" and not (d.wait and vectors)
                assert not d.behind or products < d.behind
                assert values == vector_command_of(d, rows, position, source)
                continue
            jobs = jobs_of(config, d, rows, position)
            if d.kind is DescriptorKind.ARGMAX and misses(place):
                jobs.append(jobs[0] | {"again": 1})
                repeated += 1
            for i, job in enumerate(jobs):
                name, values, overlaps, (under_way, _, vectors) = next(rest)
                assert (name, values) == ("job", job | {"descriptor": place})
                ranks = d.kind in (DescriptorKind.ARGMAX, DescriptorKind.RERANK)
                assert not (overlaps and ranks and (i == 0 or values["again"]))
                if i == 0:
                    assert not (under_way and d.wait)
                    assert not d.behind or vectors < d.behind
            if d.ranking:
                ranked = 1 if d.kind is DescriptorKind.RERANK else d.tokens or rows
                # Of a later pass of a chain it is behind the others: 8 pairs, or a beat.
                row = max(64, data_bits // 8) if lanes else 0
                assert next(rest) == ("ranking", d.ranking + trial * row, ranked, False)
        assert next(rest) == ("end", False, False)
        assert got.error is ErrorCode.NONE
    assert repeated, "no ranking has missed anything"
    kinds = {"job", "vector"} if lanes else {"job"}
    assert {event[0] for event in events if event[2] is True} == kinds, "nothing overlapped"


GEMM = Descriptor(DescriptorKind.GEMM, k=8, o=8, plane=128, residual=128, groups=128)
ATTENTION = Descriptor(DescriptorKind.ATTENTION, k=8, sharing=2)
RERANK = Descriptor(DescriptorKind.RERANK, k=8, candidates=8)


@pytest.mark.parametrize(
    ("descriptor", "expected"),
    [
        (replace(GEMM, tokens=ROWS + 1), ErrorCode.BAD_SIZE),
        (replace(GEMM, k=0), ErrorCode.BAD_SIZE),
        (replace(GEMM, k=MAX_K + 1), ErrorCode.BAD_SIZE),
        (replace(GEMM, k=1 << 23), ErrorCode.BAD_SIZE),
        (replace(GEMM, o=0), ErrorCode.BAD_SIZE),
        (replace(GEMM, o=MAX_O + 1), ErrorCode.BAD_SIZE),
        (replace(GEMM, mode=Mode.DRAFT, residual=0), ErrorCode.BAD_SIZE),  # two rows
        (replace(ATTENTION, sharing=0), ErrorCode.BAD_SIZE),
        (replace(GEMM, plane=8), ErrorCode.MISALIGNED),
        (replace(GEMM, residual=64 + 8), ErrorCode.MISALIGNED),
        (replace(GEMM, groups=4), ErrorCode.MISALIGNED),
        (replace(GEMM, activations=1), ErrorCode.MISALIGNED),
        (replace(GEMM, results=1 << 32), ErrorCode.MISALIGNED),
        (replace(ATTENTION, stride=8), ErrorCode.MISALIGNED),
        (replace(GEMM, kind=DescriptorKind.ARGMAX, ranking=8), ErrorCode.MISALIGNED),
        (replace(RERANK, k=0), ErrorCode.BAD_SIZE),
        (replace(RERANK, k=MAX_K + 1), ErrorCode.BAD_SIZE),
        (replace(RERANK, candidates=0), ErrorCode.BAD_SIZE),
        (replace(RERANK, candidates=9), ErrorCode.BAD_SIZE),
        (replace(RERANK, candidates=255), ErrorCode.BAD_SIZE),
        (replace(RERANK, residual=8), ErrorCode.MISALIGNED),
        (replace(RERANK, ranking=8), ErrorCode.MISALIGNED),
        (replace(RERANK, groups=1 << 32), ErrorCode.MISALIGNED),
        (replace(RERANK, mode=Mode.BYPASS), ErrorCode.RESERVED),
        (replace(RERANK, o=8), ErrorCode.RESERVED),
        (replace(RERANK, wait=True), ErrorCode.RESERVED),
        (replace(RERANK, discard=True), ErrorCode.RESERVED),
        (replace(RERANK, results=128), ErrorCode.RESERVED),
        (replace(GEMM, argument=1), ErrorCode.RESERVED),
        (replace(GEMM, kind=DescriptorKind.ARGMAX, tile=1), ErrorCode.RESERVED),
        (replace(RERANK, behind=1), ErrorCode.RESERVED),
        (Descriptor(DescriptorKind.END, behind=2), ErrorCode.RESERVED),
        (replace(GEMM, ranking=128), ErrorCode.RESERVED),
        (replace(GEMM, stride=128), ErrorCode.RESERVED),
        (replace(GEMM, mode=Mode.BYPASS, residual=0), ErrorCode.RESERVED),
        (replace(GEMM, mode=Mode.BYPASS, groups=0), ErrorCode.RESERVED),
        (replace(GEMM, mode=Mode.DRAFT, tokens=1), ErrorCode.RESERVED),  # a residual plane
        (replace(GEMM, kind=DescriptorKind.ARGMAX, half=True), ErrorCode.RESERVED),
        (replace(ATTENTION, o=1), ErrorCode.RESERVED),
        (replace(ATTENTION, values=True, o=1), ErrorCode.RESERVED),
        (replace(ATTENTION, tokens=1), ErrorCode.RESERVED),
        (Descriptor(DescriptorKind.HOST, k=1), ErrorCode.RESERVED),
        (Descriptor(DescriptorKind.END, argument=1), ErrorCode.RESERVED),
        (b"\0" * DESCRIPTOR_BYTES, ErrorCode.UNKNOWN_KIND),
        (b"\7" + b"\0" * (DESCRIPTOR_BYTES - 1), ErrorCode.UNKNOWN_KIND),
        (b"\1\3" + b"\1" * (DESCRIPTOR_BYTES - 2), ErrorCode.UNKNOWN_KIND),
    ],
)
def test_refusal(descriptor, expected):
    content = descriptor if isinstance(descriptor, bytes) else descriptor.pack()
    program = (
        Descriptor(DescriptorKind.HOST).pack() + content + Descriptor(DescriptorKind.END).pack()
    )
    got = walk(system(), program)
    assert got.events == [("host", 0, False)]
    assert (got.error, got.error_address) == (expected, PROGRAM + DESCRIPTOR_BYTES)


ADD = Descriptor(
    DescriptorKind.VECTOR,
    operation=VectorOperation.ADD,
    target=Target.TILES,
    k=MAX_K,
    o=HEADS,
    sharing=255,
    detail=2**32 - 1,
)
EMBED = replace(ADD, operation=VectorOperation.EMBED, detail=128)
NORM = replace(ADD, operation=VectorOperation.NORM, values=True)
SOFTMAX = replace(
    ADD, operation=VectorOperation.SOFTMAX, target=Target.WEIGHTS, k=0, o=HEADS - 3, sharing=3
)
NORMALIZE = replace(
    SOFTMAX, operation=VectorOperation.NORMALIZE, target=Target.CONTEXT, k=1, o=0, sharing=HEADS
)
ROTATE = replace(EMBED, operation=VectorOperation.ROTATE, target=Target.KEYS, sharing=0)
QUERIES = replace(ROTATE, target=Target.QUERIES, sharing=255)
GATE = replace(ADD, operation=VectorOperation.GATE, target=Target.ACTIVATIONS, o=1)
QUANTIZE = replace(GATE, operation=VectorOperation.QUANTIZE, target=Target.TILES)
DRAFTED = replace(GATE, target=Target.DRAFT_ACTIVATIONS)
#: Of no more rows than draft.
OF_DRAFTS = (QUANTIZE, DRAFTED)
MOVE = replace(ADD, operation=VectorOperation.MOVE)
SOUND = (ADD, EMBED, NORM, SOFTMAX, NORMALIZE, ROTATE, QUERIES, GATE, *OF_DRAFTS, MOVE)


def refusals(
    config: AcceleratorConfig, programs: list[bytes], rows: int = 2, position: int = 5
) -> list[tuple[ErrorCode, int]]:
    """How walks end, one after the other, that do not get beyond their first descriptor; others
    end with the second, which is none."""
    dut = ProgramWalker(config)
    memory: dict[int, int] = {}
    ends = []

    async def walks(ctx):
        ctx.set(dut.base, BASE)
        ctx.set(dut.limit, LIMIT)
        ctx.set(dut.length, 2)
        for taker in (dut.jobs.ready, dut.vector.ready, dut.idle):
            ctx.set(taker, 1)
        ctx.set(dut.walk.payload, {"program": PROGRAM, "rows": rows, "position": position})
        for program in programs:
            memory.clear()
            memory.update(enumerate(program, start=PROGRAM))
            ctx.set(dut.walk.valid, 1)
            await ctx.tick().until(dut.walk.ready)
            ctx.set(dut.walk.valid, 0)
            await ctx.tick().until(dut.error != ErrorCode.NONE)
            ends.append((ErrorCode(ctx.get(dut.error)), ctx.get(dut.error_address)))
            ctx.set(dut.clear, 1)
            await ctx.tick().repeat(2)
            ctx.set(dut.clear, 0)

    simulator = Simulator(dut)
    simulator.add_clock(1e-9)
    simulator.add_process(memory_port(dut, memory))
    simulator.add_testbench(walks)
    simulator.run()
    return ends


REFUSED_VECTORS = [
    *(
        (replace(d, operation=number), ErrorCode.UNKNOWN_KIND)
        for d in (ADD, GATE)
        for number in (0, 13, 15)
    ),
    *(
        (
            replace(ADD, operation=operation, target=number, mode=Mode.DRAFT),
            ErrorCode.UNKNOWN_KIND,
        )
        for operation, targets in TARGETS.items()
        for number in (*range(9), 15)
        if number not in [target.value for target in targets]
    ),
    *((replace(ADD, **{name: 1}), ErrorCode.RESERVED) for name in ("half", "discard", "tokens")),
    (replace(ADD, mode=Mode.DRAFT), ErrorCode.RESERVED),
    (replace(GEMM, operation=1), ErrorCode.RESERVED),
    (replace(ATTENTION, target=1), ErrorCode.RESERVED),
    (Descriptor(DescriptorKind.END, target=8), ErrorCode.RESERVED),
    (replace(SOFTMAX, k=1), ErrorCode.RESERVED),
    (replace(NORM, values=False), ErrorCode.RESERVED),
    *((d, ErrorCode.BAD_SIZE) for d in OF_DRAFTS),  # two rows
    *(
        (replace(d, k=k), ErrorCode.BAD_SIZE)
        for d in (ADD, NORM, NORMALIZE, QUERIES, GATE, MOVE)
        for k in (0, MAX_K + 1, 1 << 23)
    ),
    *(
        (replace(d, o=o), ErrorCode.BAD_SIZE)
        for d in (ADD, NORM, QUERIES, MOVE)
        for o in (0, HEADS + 1, 1 << 31)
    ),
    *((replace(d, o=o), ErrorCode.BAD_SIZE) for d in (GATE, DRAFTED) for o in (0, 2, 257)),
    (replace(SOFTMAX, o=HEADS - 2), ErrorCode.BAD_SIZE),
    (replace(SOFTMAX, o=1 << 31), ErrorCode.BAD_SIZE),
    (replace(NORMALIZE, sharing=255), ErrorCode.BAD_SIZE),
    (replace(NORMALIZE, o=1), ErrorCode.BAD_SIZE),
    *((replace(d, sharing=0), ErrorCode.BAD_SIZE) for d in (SOFTMAX, NORMALIZE, QUERIES)),
    *((replace(d, detail=0, ranking=1 << 32), ErrorCode.BAD_SIZE) for d in (ADD, SOFTMAX, ROTATE)),
    *(
        (replace(d, **{name: place}), ErrorCode.MISALIGNED)
        for d in (ADD, SOFTMAX, EMBED)
        for name in ("first", "second", "results")
        for place in (8, 1 << 32)
    ),
    *(
        (replace(d, **{name: place}), ErrorCode.MISALIGNED)
        for d in (ADD, QUERIES)
        for name in ("outer", "inner")
        for place in (4, 1 << 32)
    ),
    *(
        (
            replace(ADD, operation=VectorOperation.ROUND, target=Target.VALUES, **{name: 8}),
            ErrorCode.MISALIGNED,
        )
        for name in ("outer", "inner")
    ),
    *((replace(MOVE, **{name: 8}), ErrorCode.MISALIGNED) for name in ("outer", "inner")),
    (replace(EMBED, detail=8), ErrorCode.MISALIGNED),
    (replace(ROTATE, detail=4), ErrorCode.MISALIGNED),
]


def test_waiting_for_one_class_and_for_some_of_the_other():
    """`wait` and `behind` of products and VECTORs: as many are left as may be, and no more."""
    config = system(128, 8)
    common = {"target": Target.VALUES, "k": 8, "o": 1, "sharing": 1}
    product = Descriptor(DescriptorKind.GEMM, Mode.BYPASS, k=8, o=8)
    vector = Descriptor(DescriptorKind.VECTOR, operation=VectorOperation.ROUND, **common)
    for one, other, place in ((product, vector, 2), (vector, product, 1)):
        own = {1: 2, 2: 1}[place]
        for behind, wait in ((0, False), (0, True), (1, False), (2, False), (3, False), (2, True)):
            waits = replace(one, wait=wait, behind=behind)
            program = [one, other, other, other, waits, Descriptor(DescriptorKind.END)]
            left = set()
            for trial in range(24):
                counts = walk(config, program, trial=trial).events[4][3]
                left.add((counts[own], counts[place]))
            assert max(b for _, b in left) == (behind - 1 if behind else 3)
            assert not wait or all(a == 0 for a, _ in left)


def test_sound_vector_descriptors():
    """At the edge of what is allowed."""
    got = walk(
        system(lanes=4),
        [*(d for d in SOUND if d not in OF_DRAFTS), Descriptor(DescriptorKind.END)],
        rows=ROWS,
        position=MAX_K - ROWS,
    )
    assert [event[0] for event in got.events] == ["vector"] * (len(SOUND) - 2) + ["end"]
    assert walk(system(lanes=4), [*OF_DRAFTS, Descriptor(DescriptorKind.END)], rows=1).done


def test_refusals_of_vector_descriptors():
    descriptors = [descriptor for descriptor, _ in REFUSED_VECTORS]
    ends = refusals(system(lanes=4), [descriptor.pack() for descriptor in descriptors])
    for (descriptor, expected), got in zip(REFUSED_VECTORS, ends, strict=True):
        assert got == (expected, PROGRAM), descriptor


def test_distances_are_multiples_of_words():
    """Of 8 bytes here, half a beat."""
    got = walk(
        system(lanes=4), [replace(QUERIES, outer=8, inner=24), Descriptor(DescriptorKind.END)]
    )
    assert got.done


def test_vector_entries_beyond_the_largest_dimension():
    for d in (ADD, SOFTMAX, NORMALIZE):
        got = walk(system(lanes=4), [d], position=MAX_K - 1)
        assert got.error is ErrorCode.BAD_SIZE


def test_entries_beyond_the_largest_dimension():
    got = walk(system(), [replace(ATTENTION, values=True, k=0, o=8)], position=MAX_K - 1)
    assert got.error is ErrorCode.BAD_SIZE


def test_no_end():
    got = walk(system(), [Descriptor(DescriptorKind.HOST)] * 8, length=3)
    assert [event[0] for event in got.events] == ["host"] * 3
    assert (got.error, got.error_address) == (ErrorCode.NO_END, PROGRAM + 3 * DESCRIPTOR_BYTES)


def test_prefetch_beyond_the_region_does_no_harm():
    address = LIMIT + 1 - 2 * DESCRIPTOR_BYTES
    got = walk(
        system(), [Descriptor(DescriptorKind.HOST), Descriptor(DescriptorKind.END)], address=address
    )
    assert got.done
    got = walk(system(), [Descriptor(DescriptorKind.HOST)] * 2, address=address)
    assert [event[0] for event in got.events] == ["host"] * 2
    assert (got.error, got.error_address) == (ErrorCode.READ_OUTSIDE, LIMIT + 1)


def test_failed_fetch():
    bad = PROGRAM + 2 * DESCRIPTOR_BYTES
    got = walk(
        system(),
        [Descriptor(DescriptorKind.HOST)] * 3 + [Descriptor(DescriptorKind.END)],
        bad_read=bad,
    )
    assert [event[0] for event in got.events] == ["host"] * 2
    assert (got.error, got.error_address) == (ErrorCode.READ_SLVERR, bad)
