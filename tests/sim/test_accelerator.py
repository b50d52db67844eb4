# SPDX-License-Identifier: Apache-2.0
"""The whole accelerator: random programs, faults, stops and resets, and the sustained rate.

Everything is compared with the functional model, on the same memory: the registers that say how a
run stands and every byte of memory, wherever the accelerator waits for the host or has ended.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

import numpy as np
import pytest

from speq.host.accelerator_model import AcceleratorModel
from speq.host.board import Board
from speq.host.layout import ceil_div, ranking_bytes, round_up
from speq.host.registers import Registers
from speq.hw.accelerator_config import AcceleratorConfig, ErrorCode
from speq.hw.control.descriptor import (
    DESCRIPTOR,
    DESCRIPTOR_BYTES,
    DescriptorKind,
    Target,
    VectorOperation,
)
from speq.hw.control.register_map import ANSWERS, registers
from speq.hw.engine_config import EngineConfig, Mode
from speq.hw.memory.axi import AxiConfig
from speq.hw.memory.weight_reader import RESIDUAL_WORDS, chunk_words
from speq.model.number_format import (
    NONFINITE_BASE,
    FormatConfig,
    draft_words,
    residual_words,
)
from speq.sim.runner import seed
from speq.sim.session import top_verilog
from speq.sim.simulated_board import CHANNELS, MemoryFault, MemoryOptions, SimulatedBoard
from tests.sim.configurations import FEW, FULL, NARROW
from tests.sim.workloads import (
    BASE,
    READ,
    SIZE,
    WRITE,
    Patch,
    RunStatus,
    Workload,
    begin,
    decoding,
    moving,
    random_workload,
    run,
    run_status,
)

SEED = seed()


CONFIGS = {
    # Without lanes there is no vector unit: quick to build, and to simulate.
    "3x4 small": AcceleratorConfig(
        EngineConfig(rows=3, cols=4, draft_rows=2, max_k=40, max_o=50, format=FormatConfig(32, 1)),
        lanes=0,
        scratch=0,
    ),
    "4x8": FEW,
    "2x8 narrow": NARROW,
    "2x64 wide data": AcceleratorConfig(
        EngineConfig(rows=2, cols=64, max_k=256, max_o=512),
        AxiConfig(data_bits=256),
        AxiConfig(data_bits=1024),
        lanes=0,
    ),
    "3x4": AcceleratorConfig(
        EngineConfig(
            rows=3, cols=4, draft_rows=2, max_k=200, max_o=200, format=FormatConfig(32, 1)
        ),
        lanes=4,
        query_heads=16,
        scratch=0,
    ),
    "8x16": FULL,
}
QUICK = ["3x4 small", "4x8", "2x8 narrow"]
SLOW = ["2x64 wide data", "3x4", "8x16"]
#: Counters of what a run verifies and accepts.
TOKEN_COUNTERS = (
    "DRAFT_PASSES", "VERIFY_PASSES", "ALTERNATES", "ACCEPTED", "ALTERNATE_HITS", "COMMITTED",
    "GUESSES", "GUESS_HITS", "FREE_STEPS",
)  # fmt: skip

STALLED = {"stalls": dict.fromkeys(CHANNELS, 140), "reorder": True}

# Single bytes of memory that answer with an error: reads in the operands' part, writes in the
# results' part, both behind what a workload places by itself.
BAD_READS = {2: BASE + 0x98000 + 0x2A9, 3: BASE + 0xA8000 + 0x3F0}
BAD_WRITES = {2: BASE + 0xE8000 + 0x158, 3: BASE + 0xF0000 + 0x6A7}
FAULTS = [
    MemoryFault(address, address, response)
    for bad in (BAD_READS, BAD_WRITES)
    for response, address in bad.items()
]
RESPONSES = {2: "SLVERR", 3: "DECERR"}
ACCESSES = ("READ", "WRITE")


class Pair:
    """The accelerator in the simulator beside the functional model."""

    def __init__(self, name: str, random: np.random.Generator, **memory: object) -> None:
        self.config = CONFIGS[name]
        self.random = random
        options = MemoryOptions(SIZE, BASE, seed=SEED, **memory)
        self.rtl = SimulatedBoard(top_verilog(self.config), self.config, options)
        self.model = AcceleratorModel(self.config, SIZE, BASE)

    def __enter__(self) -> Pair:
        return self

    def __exit__(self, *exception: object) -> None:
        self.rtl.close()

    def reset(self) -> None:
        """So that a test that fails does not disturb the next."""
        for board in (self.rtl, self.model):
            board.reset()

    def workload(self, **values: object) -> Workload:
        return Workload(self.config, self.random, **values)

    def check(
        self, workload: Workload, between: Callable[[Board], None] | None = None
    ) -> RunStatus:
        """Run a workload on both; everything must be equal wherever they stand still. `between` is
        called before the host answers, for each of them. Gives how the run ends; behind NONFINITE
        what products have written is undefined."""
        runs = [run(board, workload) for board in (self.model, self.rtl)]
        expected = None
        for expected in runs[0]:
            got = next(runs[1])
            assert got == expected, f"SPEQ_SEED={SEED}: got {got}, expected {expected}\n{workload}"
            if got.error is ErrorCode.NONFINITE:
                assert [next(each, None) for each in runs] == [None, None]
                self.check_stopped(workload)
                return got
            assert_same_memory(self.rtl, memory_of(self.model), workload)
            for board in (self.model, self.rtl):
                if between is not None:
                    between(board)
        assert next(runs[1], None) is None
        names = ["DESCRIPTORS", "POSITION", "ROOT"]
        if workload.registers.get("RUN", 0) & 1:
            names += ["RING_INDEX", "STEP", "HISTORY_LENGTH", *TOKEN_COUNTERS]
        for name in names if expected.state == "IDLE" else ():
            values = [Registers(board, self.config)[name] for board in (self.model, self.rtl)]
            assert values[0] == values[1], f"SPEQ_SEED={SEED}: {name} {values}\n{workload}"
        assert expected is not None
        return expected

    def check_fault(self, workload: Workload, expected: RunStatus | None = None) -> RunStatus:
        """Run a workload that ends with an error: that of the functional model, unless told
        otherwise. Then the accelerator must be fit for another."""
        if expected is None:
            *_, expected = run(self.model, workload)
        *_, got = run(self.rtl, workload)
        assert got.state == "ERROR"
        assert got == expected, f"SPEQ_SEED={SEED}: got {got}, expected {expected}\n{workload}"
        self.check_stopped(workload)
        return got

    def check_stopped(self, workload: Workload) -> None:
        """After an error: no byte outside the write region has changed, nothing is under way, and
        after STOP a random program runs as it should."""
        before = memory_of(self.rtl)
        assert_kept(before, workload)
        assert not self.rtl.wait_interrupt(300)
        assert np.array_equal(memory_of(self.rtl), before), f"a write after ERROR\n{workload}"
        for board in (self.rtl, self.model):
            values = Registers(board, self.config)
            if values["STATUS"]:
                values.command("stop")
            assert run_status(values).state == "IDLE"
        self.check(random_workload(self.config, self.random))


def memory_of(board: Board) -> np.ndarray:
    return board.read(BASE, SIZE)


def assert_same_memory(board: Board, expected: np.ndarray, workload: Workload) -> None:
    got = memory_of(board)
    wrong = np.flatnonzero(got != expected)
    assert not len(wrong), (
        f"SPEQ_SEED={SEED}: {len(wrong)} bytes of memory differ, the first at "
        f"{BASE + wrong[0]:#x}: expected {expected[wrong[0]]:#x}, got {got[wrong[0]]:#x}\n"
        f"{workload}"
    )


def assert_kept(memory: np.ndarray, workload: Workload) -> None:
    """Only the write region may have changed, and where the host has written."""
    values = workload.all_registers()
    changed = memory != workload.content
    allowed = np.zeros_like(changed)
    allowed[max(0, values["WRITE_BASE"] - BASE) : values["WRITE_LIMIT"] - BASE + 1] = True
    allowed[[fault.first - BASE for fault in FAULTS]] = False
    changed &= ~allowed
    for patch in (patch for patches in workload.patches.values() for patch in patches):
        changed[patch.address - BASE :][: patch.content.size] = False
    wrong = np.flatnonzero(changed)
    assert not len(wrong), (
        f"SPEQ_SEED={SEED}: {len(wrong)} bytes outside the write region have changed, the first "
        f"at {BASE + wrong[0]:#x}\n{workload}"
    )


# Random programs.


def check_random_programs(name: str, trials: int, **memory: object) -> None:
    random = np.random.default_rng(SEED)
    print(f"SPEQ_SEED={SEED}")
    with Pair(name, random, **memory) as pair:
        for _ in range(trials):
            pair.check(random_workload(pair.config, random))
        if pair.config.lanes:
            return  # of infinities and NaNs vector work makes others
        ends = [
            pair.check(random_workload(pair.config, random, special=True)).error
            for _ in range(trials // 3)
        ]
    assert trials < 60 or set(ends) == {ErrorCode.NONE, ErrorCode.NONFINITE}


@pytest.mark.parametrize("memory", [{}, STALLED], ids=["ideal", "stalled"])
@pytest.mark.parametrize("name", QUICK)
def test_random_programs(name, memory):
    check_random_programs(name, 60, **memory)


@pytest.mark.slow
@pytest.mark.parametrize("memory", [{"latency": 60}, STALLED], ids=["slow memory", "stalled"])
@pytest.mark.parametrize("name", [*QUICK, *SLOW])
def test_more_random_programs(name, memory):
    check_random_programs(name, 600, **memory)


@pytest.mark.parametrize("channel", CHANNELS)
def test_one_channel_stalls(channel):
    """Queues fill up behind a single slow channel."""
    check_random_programs("4x8", 8, stalls={channel: 240}, latency=3)


def test_a_wrong_byte_is_noticed():
    """A test of these tests: an operand or a result that differs in one bit."""
    with Pair("4x8", np.random.default_rng(SEED)) as pair:
        workload = pair.workload(rows=4)
        gemm = workload.add_product(DescriptorKind.GEMM, Mode.BYPASS, 3, 9)
        workload.put(gemm.plane, np.full(3 * 8, 0x3C00, np.uint16))
        workload.put(gemm.activations, np.full(3 * 8, 0x3C00, np.uint16))
        workload.add(DescriptorKind.HOST)
        workload.end()

        def spoil(address: int) -> Callable[[Board], None]:
            def between(board: Board) -> None:
                if board is pair.rtl:
                    board.write(address, board.read(address, 1) ^ 1)

            return between

        pair.check(workload)
        with pytest.raises(AssertionError, match="1 bytes of memory differ"):
            pair.check(workload, spoil(gemm.results + 5))
        pair.reset()
        workload.descriptors[0], workload.descriptors[1] = workload.descriptors[1::-1]
        workload.write_program()
        with pytest.raises(AssertionError, match="bytes of memory differ"):
            pair.check(workload, spoil(gemm.plane))


# Speculation. A real model's decoding is compared elsewhere; here are ranked rows of a random
# matrix, which change from step to step.


@pytest.mark.parametrize("name", ["3x4 small", "4x8", "2x8 narrow"])
def test_decoding_with_random_rankings(name):
    """With a vector unit, entries of accepted rows are moved as well."""
    with Pair(name, np.random.default_rng(SEED), **STALLED) as pair:
        total = dict.fromkeys(TOKEN_COUNTERS, 0)
        for i in range(35):
            workload = decoding(pair.config, pair.random)
            verify = workload.descriptors[-2]
            if pair.config.lanes and i % 2:
                workload, _ = moving(pair.config, pair.random)
                verify = workload.descriptors[-4]
            size = verify.k * pair.config.activation_bytes
            fresh = [pair.random.standard_normal(size // 2).astype(np.float16) for _ in range(8)]
            steps = {pair.rtl: 0, pair.model: 0}

            def between(board: Board, verify=verify, fresh=fresh, steps=steps) -> None:
                board.write(verify.activations, fresh[steps[board]])
                steps[board] += 1

            pair.check(workload, between)
            for counter in TOKEN_COUNTERS:
                total[counter] += Registers(pair.rtl, pair.config)[counter]
        missing = [name for name, count in total.items() if not count]
        # The alternate of a chain of one token needs a third row.
        may_miss = ["ALTERNATES", "ALTERNATE_HITS"] if pair.config.engine.rows == 2 else []
        assert set(missing) <= set(may_miss), f"none of {missing}: the trials prove too little"


# Faults: malformed descriptors.


@pytest.fixture(scope="module")
def ideal() -> Iterator[Pair]:
    """A board with bad places in its memory, that answers at once."""
    with Pair("4x8", np.random.default_rng(SEED), faults=FAULTS) as pair:
        yield pair


@pytest.fixture(scope="module")
def stalled() -> Iterator[Pair]:
    """Another, with narrow ports, that stalls and answers out of order."""
    with Pair("2x8 narrow", np.random.default_rng(SEED), faults=FAULTS, **STALLED) as pair:
        yield pair


@pytest.fixture(params=["ideal", "stalled"])
def pair(request: pytest.FixtureRequest) -> Pair:
    chosen = request.getfixturevalue(request.param)
    chosen.reset()
    return chosen


@pytest.fixture
def faulty(ideal: Pair) -> Pair:
    ideal.reset()
    return ideal


def malformed(config: AcceleratorConfig) -> dict[ErrorCode, list[tuple[str, dict[str, int]]]]:
    """By the expected error: the name of a sound descriptor of `sound` and what is wrong in it."""
    engine = config.engine
    weights, data = config.weights.beat_bytes, config.data.beat_bytes
    products = ("verify", "draft", "bypass", "argmax")
    wide = 1 << config.address_bits
    reserved = [(name, {field: 1}) for name in products for field in ("values", "argument")]
    reserved += [("argmax", {"sharing": 1})]
    reserved += [("rerank", {"behind": value}) for value in (1, 2)]
    reserved += [(name, {field: 1}) for name in products[:3] for field in ("discard", "extra")]
    reserved += [("draft", {"residual": wide}), ("bypass", {"residual": weights})]
    reserved += [("bypass", {"groups": 1 << 63}), ("argmax", {"half": 1})]
    reserved += [
        (name, {field: 1})
        for name in ("scores", "values")
        for field in ("mode", "discard", "tokens", "argument", "residual", "groups")
    ]
    reserved += [("scores", {"o": 1}), ("values", {"k": 1 << 23})]
    others = [field for field, _ in DESCRIPTOR if field not in ("kind", "mode")]
    reserved += [("host", {field: 1}) for field in others if field != "argument"]
    reserved += [("end", {field: 1}) for field in others] + [("end", {"mode": 1})]
    reserved += [("rerank", {field: 1}) for field in ("mode", "half", "wait", "discard", "o")]
    reserved += [("rerank", {field: 128}) for field in ("sharing", "argument", "results")]
    sizes = [
        (name, {field: value})
        for name in products
        for field, most, bits in (("k", engine.max_k, 24), ("o", engine.max_o, 32))
        for value in (0, most + 1, 1 << bits - 1)
    ]
    sizes += [(name, {"tokens": engine.rows + 1}) for name in ("verify", "bypass", "argmax")]
    sizes += [("verify", {"tokens": 255}), ("draft", {"tokens": engine.draft_rows + 1})]
    sizes += [("scores", {"k": 0}), ("scores", {"k": engine.max_k + 1})]
    sizes += [("values", {"o": 0}), ("values", {"o": engine.max_o + 1})]
    sizes += [("scores", {"sharing": 0}), ("values", {"sharing": 0})]
    sizes += [("rerank", {"k": 0}), ("rerank", {"k": engine.max_k + 1})]
    sizes += [("rerank", {"tokens": value}) for value in (0, config.choices + 1, 255)]
    beats = {"plane": weights, "residual": weights, "groups": data, "activations": data}
    beats |= {"results": data}
    places = [
        (name, {field: value})
        for name in ("verify", "argmax")
        for field, beat in beats.items()
        for value in (BASE + 1, BASE + beat // 2, wide, 1 << 63)
    ]
    places += [("argmax", {"extra": BASE + data // 2}), ("scores", {"extra": weights // 2})]
    places += [("values", {"plane": BASE + 1}), ("values", {"extra": wide})]
    places += [
        ("rerank", {field: value})
        for field, beat in (beats | {"extra": data}).items()
        for value in (BASE + beat // 2, wide)
        if field != "results"
    ]
    unknown = [(name, {"kind": kind}) for name in ("verify", "end") for kind in (0, 7, 33, 255)]
    unknown += [("verify", {"mode": 3}), ("argmax", {"mode": 3})]
    several = [("verify", {"kind": 0, "values": 1}), ("verify", {"mode": 3, "k": 0})]
    return {
        ErrorCode.UNKNOWN_KIND: unknown + several,
        ErrorCode.RESERVED: [*reserved, ("verify", {"values": 1, "k": 0, "plane": 1})],
        ErrorCode.BAD_SIZE: [*sizes, ("verify", {"k": 0, "plane": 1})],
        ErrorCode.MISALIGNED: places,
    }


def add_sound(workload: Workload, name: str) -> None:
    """Append the descriptor that `malformed` calls so, as the last."""
    match name:
        case "verify" | "draft" | "bypass":
            workload.add_product(DescriptorKind.GEMM, Mode[name.upper()], 9, 11, 1)
        case "argmax":
            workload.add_product(DescriptorKind.ARGMAX, Mode.VERIFY, 9, 11, 1, ranking=True)
        case "rerank":
            workload.add_product(DescriptorKind.ARGMAX, Mode.VERIFY, 9, 3, 1)
            workload.add_rerank(3, 9, 4, ranking=True)
        case "scores" | "values":
            workload.add_attention(9, 2, values=name == "values", gap=0)
        case _:
            workload.add(DescriptorKind[name.upper()])


def spoiled(workload: Workload, index: int, changes: dict[str, int]) -> None:
    """Change the fields of a descriptor in memory."""
    content = bytearray(b"".join(d.pack() for d in workload.descriptors))
    place = slice(index * DESCRIPTOR_BYTES, (index + 1) * DESCRIPTOR_BYTES)
    word = int.from_bytes(content[place], "little")
    for name, value in changes.items():
        bits = DESCRIPTOR[name]
        word &= ~((1 << bits.width) - 1 << bits.offset)
        word |= value << bits.offset
    content[place] = word.to_bytes(DESCRIPTOR_BYTES, "little")
    workload.put(workload.program, np.frombuffer(bytes(content), np.uint8))


@pytest.mark.parametrize(
    "code", [ErrorCode.UNKNOWN_KIND, ErrorCode.RESERVED, ErrorCode.BAD_SIZE, ErrorCode.MISALIGNED]
)
def test_malformed_descriptors(faulty, code):
    """Each kind of descriptor with each kind of mistake, behind some sound ones."""
    for name, changes in malformed(faulty.config)[code]:
        workload = faulty.workload(rows=2, position=7)
        index = int(faulty.random.integers(0, 3))
        for _ in range(index):
            workload.add_product(DescriptorKind.GEMM, Mode.VERIFY, 5, 20)
        add_sound(workload, name)
        index = len(workload.descriptors) - 1
        workload.end()
        spoiled(workload, index, changes)
        got = faulty.check_fault(workload)
        assert got.error is code, f"{name} {changes}"
        assert got.address == workload.program + index * DESCRIPTOR_BYTES


def test_sizes_that_follow_from_the_pass(faulty):
    """More drafting rows than there are, more KV entries than an inner dimension may have."""
    engine = faulty.config.engine
    workload = faulty.workload(rows=engine.draft_rows + 1)
    workload.add_product(DescriptorKind.GEMM, Mode.DRAFT, 9, 3, 1)
    workload.descriptors[0] = replace(workload.descriptors[0], tokens=0)
    assert faulty.check_fault(workload.end()).error is ErrorCode.BAD_SIZE


# Faults: vector work.


#: Sound VECTOR descriptors: operation, target, and what `add_vector` takes besides.
SOUND_VECTORS = {
    "add": (VectorOperation.ADD, Target.TILES, {"segments": 2}),
    "norm": (VectorOperation.NORM, Target.ACTIVATIONS, {}),
    "embed": (VectorOperation.EMBED, Target.TILES, {}),
    "queries": (VectorOperation.ROTATE, Target.QUERIES, {"segments": 4, "sharing": 2}),
    "keys": (VectorOperation.ROTATE, Target.KEYS, {"segments": 2}),
    "values": (VectorOperation.ROUND, Target.VALUES, {"segments": 2}),
    "softmax": (VectorOperation.SOFTMAX, Target.WEIGHTS, {"sharing": 3, "slot": 1}),
    "quantize": (VectorOperation.QUANTIZE, Target.TILES, {}),
    "drafts": (VectorOperation.GATE, Target.DRAFT_ACTIVATIONS, {}),
    "multiply": (VectorOperation.MULTIPLY, Target.ACTIVATIONS, {}),
    "sigmoid": (VectorOperation.SIGMOID_GATE, Target.ACTIVATIONS, {}),
    "normalize": (VectorOperation.NORMALIZE, Target.CONTEXT, {"sharing": 3, "slot": 1}),
}


def add_sound_vector(workload: Workload, name: str, k: int = 10) -> None:
    """Append a VECTOR of `SOUND_VECTORS`."""
    operation, target, others = SOUND_VECTORS[name]
    workload.add_vector(operation, target, k, **others)


def malformed_vectors(
    config: AcceleratorConfig,
) -> dict[ErrorCode, list[tuple[str, dict[str, int]]]]:
    """By the expected error: the name of a sound VECTOR and what is wrong in it."""
    wide, beat, word = 1 << config.address_bits, config.data.beat_bytes, config.activation_bytes
    heads, max_k = config.query_heads, config.engine.max_k
    return {
        ErrorCode.UNKNOWN_KIND: [
            *(("add", {"operation": value}) for value in (0, 13, 15)),
            *(("norm", {"target": value}) for value in (2, 8, 15)),
            ("values", {"target": Target.TILES.value, "discard": 1}),
        ],
        ErrorCode.RESERVED: [
            *((name, {"mode": 1}) for name in SOUND_VECTORS),
            *(("add", {field: 1}) for field in ("half", "discard", "tokens")),
            ("softmax", {"k": 1}),
            ("norm", {"values": 0, "o": 0}),
        ],
        ErrorCode.BAD_SIZE: [
            *(("add", {"k": value}) for value in (0, max_k + 1, 1 << 23)),
            *(("keys", {"o": value}) for value in (0, heads + 1, 1 << 31)),
            *((name, {"o": value}) for name in ("norm", "quantize") for value in (0, 2)),
            *((name, {"sharing": 0}) for name in ("softmax", "queries")),
            *(("softmax", {"o": value}) for value in (heads - 2, 1 << 31)),
            *((name, {"extra": 1 << 32}) for name in SOUND_VECTORS),
            ("values", {"k": 0, "plane": 1}),
        ],
        ErrorCode.MISALIGNED: [
            *(
                ("quantize", {field: value})
                for field in ("activations", "plane", "results")
                for value in (BASE + beat // 2, wide)
            ),
            *(
                ("queries", {field: value})
                for field in ("residual", "groups")
                for value in (word // 2, wide)
            ),
            *((name, {"extra": beat // 2}) for name in ("embed", "keys")),
            ("values", {"groups": beat // 2 if beat > word else word // 2}),
        ],
    }


@pytest.mark.parametrize(
    "code", [ErrorCode.UNKNOWN_KIND, ErrorCode.RESERVED, ErrorCode.BAD_SIZE, ErrorCode.MISALIGNED]
)
def test_malformed_vector_descriptors(pair, code):
    """The same with a vector unit: behind sound work, which is finished."""
    for name, changes in malformed_vectors(pair.config)[code]:
        workload = pair.workload(rows=1, position=7)
        for _ in range(int(pair.random.integers(0, 3))):
            workload.add_random_vector()
        index = len(workload.descriptors)
        add_sound_vector(workload, name)
        workload.end()
        spoiled(workload, index, changes)
        got = pair.check_fault(workload)
        assert got.error is code, f"{name} {changes}"
        assert got.address == workload.program + index * DESCRIPTOR_BYTES


VECTOR_READS = [
    *((name, "activations" if name == "quantize" else "first") for name in SOUND_VECTORS),
    *((name, "second") for name in ("add", "norm", "embed", "queries")),
]
VECTOR_ACCESSES = [
    *(("READ", *each) for each in VECTOR_READS),
    *(("WRITE", name, "results") for name in SOUND_VECTORS),
]


@pytest.mark.parametrize("response", RESPONSES, ids=RESPONSES.values())
@pytest.mark.parametrize(
    ("access", "name", "field"), VECTOR_ACCESSES, ids=map("-".join, VECTOR_ACCESSES)
)
def test_bad_responses_to_vector_work(pair, access, name, field, response):
    """The burst with the bad byte is named; it may also be one that is not read or written."""
    bad = (BAD_READS if access == "READ" else BAD_WRITES)[response]
    burst = pair.config.data.burst_beats * pair.config.data.beat_bytes
    for _ in range(200):
        workload = pair.workload(rows=1, position=int(pair.random.integers(3)))
        workload.places = {field: over(bad, pair.random)}
        add_sound_vector(workload, name, k=30)
        workload.places = {}
        workload.add_random_vector()
        workload.end()
        *_, got = run(pair.rtl, workload)
        pair.check_stopped(workload)
        if got.state == "ERROR":
            assert got.error is ErrorCode[f"{access}_{RESPONSES[response]}"]
            assert got.address <= bad < got.address + burst
            return
    pytest.fail("no access came upon the bad byte")


@pytest.mark.parametrize(
    ("access", "name", "field"), VECTOR_ACCESSES, ids=map("-".join, VECTOR_ACCESSES)
)
def test_vector_work_outside_the_regions(pair, access, name, field):
    """Operands that end behind their region, results that begin before theirs."""
    beat = pair.config.data.beat_bytes
    places = {"READ": BASE + READ.stop - beat, "WRITE": BASE + WRITE.start - beat}
    if name == "embed" and field == "second":
        places["READ"] += beat  # of which there is a single one
    workload = pair.workload(rows=1)
    workload.places = {field: lambda _size, _beat: places[access]}
    add_sound_vector(workload, name, k=40)
    workload.end()
    *_, got = run(pair.rtl, workload)
    assert (got.state, got.error) == ("ERROR", ErrorCode[f"{access}_OUTSIDE"])
    pair.check_stopped(workload)


@pytest.mark.parametrize("response", RESPONSES, ids=RESPONSES.values())
def test_bad_responses_to_moves(faulty, response):
    """When an entry is read and when it is written: the step that it belongs to is as if it had not
    been."""
    bad, random = BAD_WRITES[response], faulty.random
    burst = faulty.config.data.burst_beats * faulty.config.data.beat_bytes
    registers, seen = Registers(faulty.rtl, faulty.config), set()
    names = ("POSITION", "ROOT", "COMMITTED", "RING_INDEX")
    for _ in range(60):
        workload, _ = moving(faulty.config, random, bad)
        verify = workload.descriptors[-4]
        size = verify.k * faulty.config.activation_bytes // 2
        before = [workload.position, workload.registers["ROOT"], 0, 0]
        got = run_status(registers)
        for got in run(faulty.rtl, workload):
            if got.state == "STEP":
                before = [registers[name] for name in names]
                fresh = random.standard_normal(size).astype(np.float16).view(np.uint8)
                faulty.rtl.write(verify.activations, fresh)
                workload.patches[-1] = [Patch(verify.activations, fresh)]
        if got.state == "ERROR":
            assert got.error.name in (f"{access}_{RESPONSES[response]}" for access in ACCESSES)
            assert got.address <= bad < got.address + burst
            assert [registers[name] for name in names] == before
            seen.add(got.error)
        faulty.check_stopped(workload)
        if len(seen) == len(ACCESSES):
            return
    pytest.fail(f"the bad byte has been met by {seen} alone")


# Faults: transfers that are refused, and responses of the memory.

#: Buffers that a descriptor reads or writes: kind of descriptor and field.
READS = {
    "verify": ("plane", "residual", "groups", "activations"),
    "draft": ("plane", "groups", "activations"),
    "bypass": ("plane", "activations"),
    "attention": ("plane", "activations"),
    "rerank": ("plane", "residual", "groups", "activations"),
}
WRITES = {
    "verify": ("results",),
    "argmax": ("results", "ranking"),
    "attention": ("results",),
    "rerank": ("ranking",),
}
READ_CASES = [(name, field) for name, fields in READS.items() for field in fields]
WRITE_CASES = [(name, field) for name, fields in WRITES.items() for field in fields]


def with_fault(pair: Pair, name: str, places: dict, **registers: int) -> tuple[Workload, int]:
    """A descriptor with a buffer at a given place among others; its index."""
    random, engine = pair.random, pair.config.engine
    workload = pair.workload(rows=engine.rows, position=int(random.integers(60)))
    workload.registers = registers
    index = int(random.integers(0, 3))
    for _ in range(index):
        workload.add_product(DescriptorKind.GEMM, Mode(int(random.integers(3))), 20, 9, 1)
    k, o = (int(random.integers(30, 120)), int(random.integers(1, 50)))
    if name == "rerank":
        # Of a single tile, so that it is one that is read.
        o = int(random.integers(1, engine.cols + 1))
        workload.add_product(DescriptorKind.ARGMAX, Mode.DRAFT, k, o, 1, discard=True)
        index += 1
    workload.places = places
    if name == "attention":
        values = bool(random.integers(2))
        workload.add_attention(int(random.integers(1, 40)), 3, values=values, gap=0)
    elif name == "argmax":
        workload.add_product(DescriptorKind.ARGMAX, Mode.VERIFY, k, o, ranking=True)
    elif name == "rerank":
        candidates = int(random.integers(1, pair.config.choices + 1))
        workload.add_rerank(o, k, candidates, ranking=True)
    else:
        tokens = 1 if name == "draft" else 0
        workload.add_product(DescriptorKind.GEMM, Mode[name.upper()], k, o, tokens)
    workload.places = {}
    workload.add_product(DescriptorKind.GEMM, Mode.VERIFY, 9, 9)
    return workload.end(), index


def transfers(workload: Workload, index: int, field: str) -> Iterator[tuple[int, int]]:
    """Address and bytes of the transfers that a descriptor's buffer is moved by."""
    config, d = workload.config, workload.descriptors[index]
    cols, data = config.engine.cols, config.data.beat_bytes
    number_format = config.engine.format
    is_attention = d.kind is DescriptorKind.ATTENTION
    entries, tokens = workload.position + workload.rows, d.tokens or workload.rows
    k, o = (entries if is_attention and d.values else d.k, d.o or entries)
    mode = Mode.BYPASS if is_attention else d.mode
    if d.kind is DescriptorKind.RERANK:
        o, tokens, mode = cols, 1, Mode.VERIFY
    tiles, address = ceil_div(o, cols), getattr(d, field)
    word = 2 * cols
    if field in ("plane", "residual"):
        chunk = chunk_words(config) if mode is Mode.VERIFY else 1 << 20
        words = k if mode is Mode.BYPASS else draft_words(k)
        if field == "residual":
            chunk, words = RESIDUAL_WORDS * chunk, residual_words(k)
        for i in range(tiles):
            for first in range(0, words, chunk):
                yield address + (i * words + first) * word, min(chunk, words - first) * word
    elif field == "groups":
        size = round_up(ceil_div(k, number_format.group) * cols, data)
        yield from ((address + i * size, size) for i in range(tiles))
    elif field == "activations":
        batches = ceil_div(tokens * d.sharing, config.engine.rows) if is_attention else 1
        words = ceil_div(k, 4) if mode is Mode.DRAFT else k
        size = round_up(words * config.activation_bytes, data)
        yield from ((address + i * size, size) for i in range(batches))
    elif field == "ranking":
        yield address, ranking_bytes(config) * tokens
    else:
        left = tokens * d.sharing if is_attention else tokens
        address += d.tile * left * cols * (2 if d.half else 4)
        while left > 0:
            size = min(left, config.engine.rows) * cols * (2 if d.half else 4)
            yield from ((address + i * size, size) for i in range(tiles))
            address, left = address + tiles * size, left - config.engine.rows


def burst_of(workload: Workload, index: int, field: str, bad: int) -> int:
    """Address of the burst that moves a byte."""
    d = workload.config
    port = d.weights if field in ("plane", "residual") else d.data
    burst = port.burst_beats * port.beat_bytes
    (start,) = (
        first for first, size in transfers(workload, index, field) if first <= bad < first + size
    )
    return max(start, bad // burst * burst)


def over(bad: int, random: np.random.Generator) -> Callable[[int, int], int]:
    """A place for a buffer so that a random beat of it holds the byte `bad`."""

    def place(size: int, beat: int) -> int:
        return (bad // beat - int(random.integers(0, size // beat))) * beat

    return place


@pytest.mark.parametrize("response", RESPONSES, ids=RESPONSES.values())
@pytest.mark.parametrize(("name", "field"), READ_CASES, ids=map("-".join, READ_CASES))
def test_bad_responses_to_reads(pair, name, field, response):
    for _ in range(3):
        bad = BAD_READS[response]
        workload, index = with_fault(pair, name, {field: over(bad, pair.random)})
        code = ErrorCode[f"READ_{RESPONSES[response]}"]
        address = burst_of(workload, index, field, bad)
        pair.check_fault(workload, RunStatus("ERROR", code, address, 0))


@pytest.mark.parametrize("response", RESPONSES, ids=RESPONSES.values())
@pytest.mark.parametrize(("name", "field"), WRITE_CASES, ids=map("-".join, WRITE_CASES))
def test_bad_responses_to_writes(pair, name, field, response):
    for _ in range(3):
        bad = BAD_WRITES[response]
        workload, index = with_fault(pair, name, {field: over(bad, pair.random)})
        code = ErrorCode[f"WRITE_{RESPONSES[response]}"]
        address = burst_of(workload, index, field, bad)
        pair.check_fault(workload, RunStatus("ERROR", code, address, 0))


@pytest.mark.parametrize("side", ["below", "beyond"])
@pytest.mark.parametrize(("name", "field"), READ_CASES, ids=map("-".join, READ_CASES))
def test_reads_outside_the_region(pair, name, field, side):
    """Buffers that begin before the memory or end behind it, which must not reach the bus."""
    random = pair.random
    by_tiles = name in ("verify", "rerank") and field in ("plane", "residual")

    def place(size: int, beat: int) -> int:
        if side == "below":
            return BASE - int(random.integers(1, size // beat + 1)) * beat
        # In verify mode a tile is read in several transfers; only its first is compared.
        inside = 0 if by_tiles else int(random.integers(0, size // beat))
        return BASE + SIZE - inside * beat

    for _ in range(3):
        limits = {"READ_BASE": BASE, "READ_LIMIT": BASE + SIZE - 1}
        workload, _ = with_fault(pair, name, {field: place}, **limits)
        assert pair.check_fault(workload).error is ErrorCode.READ_OUTSIDE


@pytest.mark.parametrize("side", ["below", "beyond"])
@pytest.mark.parametrize(("name", "field"), WRITE_CASES, ids=map("-".join, WRITE_CASES))
def test_writes_outside_the_region(pair, name, field, side):
    random = pair.random

    def place(size: int, beat: int) -> int:
        if side == "below":
            return BASE + WRITE.start - int(random.integers(1, size // beat + 1)) * beat
        return BASE + WRITE.stop - int(random.integers(0, size // beat)) * beat

    for _ in range(3):
        workload, _ = with_fault(pair, name, {field: place})
        assert pair.check_fault(workload).error is ErrorCode.WRITE_OUTSIDE


def test_reads_around_the_end_of_the_address_space(faulty):
    """A transfer that runs over the last address is refused, whatever the region."""
    top = 1 << faulty.config.address_bits
    for name, field in READ_CASES:
        place = {field: lambda size, beat: top - beat}
        limits = {"READ_BASE": 0, "READ_LIMIT": top - 1}
        workload, index = with_fault(faulty, name, place, **limits)
        first, size = next(transfers(workload, index, field))
        if first + size > top:
            expected = RunStatus("ERROR", ErrorCode.READ_OUTSIDE, first, 0)
            faulty.check_fault(workload, expected)


# Faults: results that are not finite.


def spoil_operand(workload: Workload, index: int, field: str) -> None:
    """Put an infinity or a NaN among the activations or the weights of a product."""
    d, random, engine = workload.descriptors[index], workload.random, workload.config.engine
    address = getattr(d, field)
    if field == "groups":  # of the first column of the first tile
        workload.put(address, np.array([NONFINITE_BASE], np.uint8))
        return
    k = d.k or workload.position + workload.rows
    word = int(random.integers(k)) * (
        workload.config.activation_bytes if field == "activations" else 2 * engine.cols
    )
    workload.put(address + word, np.array([random.choice([0x7C00, 0xFC00, 0x7E00])], np.uint16))


NONFINITE = {
    "verify": ("activations", "groups"),
    "draft": ("groups",),
    "bypass": ("activations", "plane"),
    "argmax": ("activations", "groups"),
    "rerank": ("activations", "groups"),
    "scores": ("activations", "plane"),
    "values": ("activations", "plane"),
}


@pytest.mark.parametrize(
    ("name", "field"), [(name, field) for name, fields in NONFINITE.items() for field in fields]
)
def test_results_that_are_not_finite(pair, name, field):
    """The product's descriptor is named, whatever the walker has fetched and started behind it, and
    whichever products are before it."""
    for before in range(4):
        for behind in (
            [],
            [DescriptorKind.HOST],
            [DescriptorKind.GEMM] * 4,
            [DescriptorKind.ARGMAX, DescriptorKind.HOST],
        ):
            workload = pair.workload(rows=pair.config.engine.draft_rows, position=7)
            for _ in range(before):
                workload.add_product(DescriptorKind.GEMM, Mode.VERIFY, 5, 20)
            add_sound(workload, name)
            index = len(workload.descriptors) - 1
            spoil_operand(workload, index, field)
            for kind in behind:
                if kind is DescriptorKind.HOST:
                    workload.add(kind)
                else:
                    workload.add_product(kind, Mode.BYPASS, 3, 4)
            got = pair.check_fault(workload.end())
            address = workload.program + index * DESCRIPTOR_BYTES
            assert got == RunStatus("ERROR", ErrorCode.NONFINITE, address, 0)


def test_fp16_results_that_overflow(pair):
    """The largest FP32 results are finite, and those of FP16 are not."""
    for half in (False, True):
        workload = pair.workload(rows=1)
        gemm = workload.add_product(DescriptorKind.GEMM, Mode.BYPASS, 40, 9, half=half)
        largest = np.full(40 * pair.config.engine.cols, 0x7BFF, np.uint16)
        workload.put(gemm.plane, largest)
        workload.put(
            gemm.activations, np.full(40 * pair.config.activation_bytes // 2, 0x7BFF, np.uint16)
        )
        expected = RunStatus("ERROR", ErrorCode.NONFINITE, workload.program, 0)
        workload.end()
        assert pair.check(workload) == (
            expected if half else RunStatus("IDLE", ErrorCode.NONE, 0, 0)
        )


def test_columns_and_rows_beyond_a_product_do_not_matter(pair):
    """Infinities in the padding of tiles and in rows that are not in use."""
    engine, size = pair.config.engine, pair.config.activation_bytes // 2
    o = engine.cols + 3
    workload = pair.workload(rows=1)
    gemm = workload.add_product(DescriptorKind.ARGMAX, Mode.BYPASS, 5, o)
    plane = np.full((2, 5, engine.cols), 0x7C00, np.uint16)
    plane[0], plane[1, :, :3] = 0x3C00, 0x3C00
    activations = np.full((5, size), 0xFC00, np.uint16)
    activations[:, 0] = 0x3C00
    workload.put(gemm.plane, plane)
    workload.put(gemm.activations, activations)
    assert pair.check(workload.end()).state == "IDLE"


@pytest.mark.parametrize("spoiled_pass", ["draft", "verify"])
def test_nothing_of_a_step_that_is_not_finite_is_committed(pair, spoiled_pass):
    """By an ARGMAX whose results are written or only ranked."""
    for discard in (False, True):
        workload = decoding(pair.config, pair.random)
        workload.registers |= {"DRAFT_LENGTH": 1, "TOKEN_LIMIT": 5, "GUESS_LIMIT": 0}
        workload.registers["PROMPT_END"] = 0
        ranked = [i for i, d in enumerate(workload.descriptors) if d.kind is DescriptorKind.ARGMAX]
        index = ranked[0 if spoiled_pass == "draft" else 1]
        workload.descriptors = [
            replace(d, discard=discard, results=BASE if discard else d.results)
            if d.kind is DescriptorKind.ARGMAX
            else d
            for d in workload.descriptors
        ]
        workload.write_program()
        spoil_operand(workload, index, "groups")
        got = pair.check_fault(workload)
        address = workload.program + index * DESCRIPTOR_BYTES
        assert got == RunStatus("ERROR", ErrorCode.NONFINITE, address, 0)
        begun = {"ROOT": workload.registers["ROOT"], "POSITION": workload.position}
        begun["HISTORY_LENGTH"] = len(workload.history or [])
        for board in (pair.rtl, pair.model):
            *_, got = run(board, workload)
            assert got == RunStatus("ERROR", ErrorCode.NONFINITE, address, 0)
            values = Registers(board, pair.config)
            assert {name: values[name] for name in begun} == begun
            assert values["RING_INDEX"] == values["COMMITTED"] == 0
            values.command("stop")


# Faults: programs.


def small_program(pair: Pair, products: int, **places: Callable[[int, int], int]) -> Workload:
    workload = pair.workload(rows=1, places=places)
    workload.places = {}
    for _ in range(products):
        workload.add_product(DescriptorKind.GEMM, Mode.VERIFY, 5, 9)
    return workload


def test_programs_without_end(pair):
    """PROGRAM_LENGTH ends them; what follows in memory must not count, even if it is sound."""
    for products in range(4):
        workload = small_program(pair, products).end()
        workload.registers = {"PROGRAM_LENGTH": products}
        address = workload.program + products * DESCRIPTOR_BYTES
        pair.check_fault(workload, RunStatus("ERROR", ErrorCode.NO_END, address, 0))


def test_a_program_may_end_where_the_region_does(pair):
    """What is fetched behind END must not count: neither what is refused nor what fails."""
    for bad in (None, *BAD_READS.values()):
        for products in range(4):
            end = BASE + READ.stop if bad is None else bad // DESCRIPTOR_BYTES * DESCRIPTOR_BYTES
            start = end - (products + 1) * DESCRIPTOR_BYTES
            workload = small_program(pair, products, program=lambda _s, _m, start=start: start)
            workload.end()
            workload.registers = {"PROGRAM_LENGTH": 1000}
            pair.check(workload)


@pytest.mark.parametrize("products", range(4))
def test_faults_of_fetches(pair, products):
    """Refused, and failed with either response, at the first or a later descriptor."""
    length = {"PROGRAM_LENGTH": 1000}
    end = BASE + READ.stop
    start = end - products * DESCRIPTOR_BYTES
    workload = small_program(pair, products, program=lambda _s, _m: start)
    workload.write_program()
    workload.registers = length
    pair.check_fault(workload, RunStatus("ERROR", ErrorCode.READ_OUTSIDE, end, 0))
    for response, bad in BAD_READS.items():
        first = bad // DESCRIPTOR_BYTES * DESCRIPTOR_BYTES
        start = first - products * DESCRIPTOR_BYTES
        workload = small_program(pair, products, program=lambda _s, _m, start=start: start)
        workload.write_program()
        workload.registers = length
        code = ErrorCode[f"READ_{RESPONSES[response]}"]
        pair.check_fault(workload, RunStatus("ERROR", code, first, 0))


def test_a_failed_fetch_before_a_refused_one(pair):
    """The first descriptor that cannot be had counts, even if a later one was refused before."""
    bad = BAD_READS[2]
    first = bad // DESCRIPTOR_BYTES * DESCRIPTOR_BYTES
    workload = small_program(pair, 1, program=lambda _s, _m: first - DESCRIPTOR_BYTES)
    workload.write_program()
    workload.registers = {"PROGRAM_LENGTH": 1000, "READ_LIMIT": first + DESCRIPTOR_BYTES - 1}
    pair.check_fault(workload, RunStatus("ERROR", ErrorCode.READ_SLVERR, first, 0))


# Faults: the host.


def with_host(pair: Pair) -> Workload:
    """A program with a HOST descriptor, number 1, between products."""
    workload = small_program(pair, 1)
    workload.add(DescriptorKind.HOST, argument=77)
    workload.add_product(DescriptorKind.GEMM, Mode.VERIFY, 30, 20)
    return workload.end()


@pytest.mark.parametrize("answer", ["FINISH", "FAIL", "none of these"])
def test_a_host_that_refuses(pair, answer):
    workload = with_host(pair)
    workload.answers = {1: ANSWERS.get(answer, (3,))[0]}
    address = workload.program + DESCRIPTOR_BYTES
    pair.check_fault(workload, RunStatus("ERROR", ErrorCode.HOST_REFUSED, address, 0))


def test_a_host_that_does_not_answer(pair):
    workload = with_host(pair)
    workload.registers = {"HOST_TIMEOUT": 100, "IRQ_ENABLE": 4}  # only the error interrupts
    address = workload.program + DESCRIPTOR_BYTES
    pair.check_fault(workload, RunStatus("ERROR", ErrorCode.HOST_TIMEOUT, address, 0))


def test_stop_while_the_host_is_asked(pair):
    for board in (pair.model, pair.rtl):
        workload = with_host(pair)
        waits = run(board, workload)
        assert next(waits).state == "HOST"
        values = Registers(board, pair.config)
        values.command("stop")
        assert board.wait_interrupt(1000)
        assert run_status(values) == RunStatus("ERROR", ErrorCode.STOPPED, 0, 0)
        values["IRQ_STATUS"] = 7
    pair.check_stopped(workload)


# Faults: memory that does not answer.


@pytest.mark.parametrize("channel", CHANNELS)
def test_memory_that_does_not_answer(channel):
    """MEMORY_TIMEOUT ends the run, and STOP leads to IDLE; the next run does not begin until a
    reset. Without it only a reset helps."""
    with Pair("4x8", np.random.default_rng(SEED), stalls={channel: 256}) as pair:
        workload = with_host(pair)
        workload.descriptors[1] = replace(workload.descriptors[0], wait=True)
        workload.write_program()
        silent = RunStatus("ERROR", ErrorCode.MEMORY_TIMEOUT, 0, 0)
        for _ in range(2):
            workload.registers = {"MEMORY_TIMEOUT": 300}
            *_, got = run(pair.rtl, workload)
            assert got == silent
            values = Registers(pair.rtl, pair.config)
            values.command("stop")
            assert run_status(values) == silent._replace(state="IDLE")
            values["MEMORY_TIMEOUT"], values["IRQ_STATUS"] = 0, 7
            values.command("start")
            assert pair.rtl.wait_interrupt(50)
            assert run_status(values) == silent
            pair.rtl.reset()
            workload.registers = {}
            values = begin(pair.rtl, workload)
            assert not pair.rtl.wait_interrupt(3000)
            values.command("stop")
            assert not pair.rtl.wait_interrupt(3000)
            assert run_status(values).state == "STOPPING"
            pair.rtl.reset()
            assert run_status(values) == RunStatus("IDLE", ErrorCode.NONE, 0, 0)


@pytest.mark.parametrize("channel", ["aw", "w", "b"])
def test_memory_that_answers_no_write_of_vector_work(channel):
    """Whatever the vector unit does, MEMORY_TIMEOUT ends the run."""
    with Pair("4x8", np.random.default_rng(SEED), stalls={channel: 256}) as pair:
        for name in SOUND_VECTORS:
            workload = pair.workload(rows=1, position=3)
            add_sound_vector(workload, name)
            workload.registers = {"MEMORY_TIMEOUT": 300}
            *_, got = run(pair.rtl, workload.end())
            assert got == RunStatus("ERROR", ErrorCode.MEMORY_TIMEOUT, 0, 0), name
            pair.rtl.reset()


# Faults: registers.


def test_impossible_registers(faulty):
    """Each register that is checked, for both kinds of run; only what the run uses counts."""
    engine, wide = faulty.config.engine, 1 << faulty.config.address_bits
    cases = [(name, wide) for name in ("READ_BASE", "READ_LIMIT", "WRITE_BASE", "WRITE_LIMIT")]
    cases += [
        (f"{name}_PROGRAM", value)
        for name in ("PASS", "DRAFT", "VERIFY")
        for value in (wide, BASE + 32, BASE + 1)
    ]
    cases += [("PASS_ROWS", 0), ("PASS_ROWS", engine.rows + 1), ("POSITION", engine.max_k)]
    cases += [("DRAFT_LENGTH", engine.rows), ("CHOICES", 0), ("CHOICES", 9), ("TOKEN_LIMIT", 0)]
    cases += [("RING", BASE + WRITE.start + 1), ("RING", wide), ("RING_LOG2", 0), ("RING_LOG2", 25)]
    cases += [("HISTORY_LENGTH", faulty.config.history + 1)]
    cases += [("PROMPT_END", engine.max_k), ("STOP_TOKENS", 9)]
    offsets = {register.name: register.offset for register in registers(faulty.config)}
    refused = 0
    for decodes in (0, 1):
        for name, value in cases:
            workload = decoding(faulty.config, faulty.random)
            usual = {"RUN": decodes, "PASS_ROWS": 1, "PROMPT_END": 0}
            workload.registers |= usual | {name: value}
            *_, expected = run(faulty.model, workload)
            if expected.error is ErrorCode.BAD_REGISTER:
                assert expected.address == offsets[name]
                faulty.check_fault(workload, expected)
                refused += 1
            else:
                faulty.check(workload)
    assert refused == 2 * 4 + 3 + 2 * 3 + 2 + 2 + 1 + 2 + 1 + 2 + 2 + 1 + 2


def test_several_impossible_registers(faulty):
    """The first one counts."""
    workload = small_program(faulty, 1).end()
    workload.registers = {"PASS_PROGRAM": BASE + 1, "PASS_ROWS": 0, "WRITE_LIMIT": 1 << 63}
    assert faulty.check_fault(workload).error is ErrorCode.BAD_REGISTER


# Faults: the ring of committed tokens.


def test_faults_of_the_ring(pair):
    beat = pair.config.data.beat_bytes
    cases = [(BASE + WRITE.start - beat, "OUTSIDE"), (BASE + WRITE.stop, "OUTSIDE")]
    cases += [(bad // beat * beat, RESPONSES[response]) for response, bad in BAD_WRITES.items()]
    for ring, why in cases:
        workload = decoding(pair.config, pair.random)
        # All places of this ring are in its first beat.
        workload.registers |= {"RING": ring, "RING_LOG2": 1, "TOKEN_LIMIT": 5, "PROMPT_END": 0}
        *_, got = run(pair.rtl, workload)
        assert got == RunStatus("ERROR", ErrorCode[f"WRITE_{why}"], ring, 0)
        values = Registers(pair.rtl, pair.config)
        assert values["ROOT"] == workload.registers["ROOT"]
        assert values["POSITION"] == workload.position
        assert values["HISTORY_LENGTH"] == len(workload.history or [])
        assert values["RING_INDEX"] == 0
        pair.check_stopped(workload)


# Stops and resets in mid-run.


def interrupted(pair: Pair) -> Iterator[tuple[Workload, Registers]]:
    """Runs of random programs, each at a random time of it."""
    for _ in range(12):
        workload = random_workload(pair.config, pair.random)
        started = pair.rtl.cycles()
        for _outcome in run(pair.rtl, workload):
            pass
        duration = pair.rtl.cycles() - started
        for _ in range(3):
            values = begin(pair.rtl, workload)
            pair.rtl.wait_interrupt(int(pair.random.integers(1, duration + 1)))
            yield workload, values


def test_stop_at_any_time(pair):
    stopped = 0
    for workload, values in interrupted(pair):
        values.command("stop")
        while (now := run_status(values)).state == "STOPPING":
            pass
        if now.state == "ERROR":
            assert now == RunStatus("ERROR", ErrorCode.STOPPED, 0, 0)
            stopped += 1
        else:
            assert now == RunStatus("IDLE", ErrorCode.NONE, 0, 0)
        values["IRQ_STATUS"] = 7
        pair.check_stopped(workload)
    assert stopped > 10


def test_reset_at_any_time(pair):
    for workload, values in interrupted(pair):
        pair.rtl.reset()
        assert run_status(values) == RunStatus("IDLE", ErrorCode.NONE, 0, 0)
        for register in registers(pair.config):
            if register.access in ("rw", "w1c"):
                assert values[register.name] == 0
        pair.check_stopped(workload)


def test_an_error_after_stop_does_not_count(pair):
    """STOP in the state ERROR returns to IDLE and takes nothing along."""
    workload = small_program(pair, 1).end()
    spoiled(workload, 0, {"k": 0})
    for _ in range(3):
        assert pair.check_fault(workload).error is ErrorCode.BAD_SIZE


# The sustained rate.


def check_rate(name: str, mode: Mode, k: int = 512, o: int = 512) -> None:
    """Of the cycles in which a GEMM is the oldest unfinished descriptor, from its arrival to the
    answer to its last write, at least 98 % take a weight word. That includes the memory's latency
    at both ends, so the rate between the first and the last weight word is higher: it is the
    COMPUTE_CYCLES' part of those and the cycles that the array stands still for want of weights,
    group bytes, activations or room (all *_STALLS).
    """
    with Pair(name, np.random.default_rng(SEED)) as pair:
        workload = pair.workload()
        workload.add_product(DescriptorKind.GEMM, mode, k, o, 1)
        pair.check(workload.end())
        values = Registers(pair.rtl, pair.config)
        names = ("WEIGHT_STALLS", "GROUP_STALLS", "ACTIVATION_STALLS", "RESULT_STALLS")
        compute, whole = values["COMPUTE_CYCLES"], values[f"{mode.name}_CYCLES"]
        stalls = {name: values[name] for name in names}
    words = ceil_div(o, pair.config.engine.cols) * (ceil_div(k, 4) if mode is Mode.DRAFT else k)
    assert compute == words
    print(
        f"{name} {mode.name} {o} x {k}: {compute} words, {stalls}, {whole} cycles in all: "
        f"{compute / (compute + sum(stalls.values())):.2%} of the array's, {compute / whole:.2%} "
        f"of all"
    )
    assert compute >= 0.98 * whole


@pytest.mark.parametrize("mode", list(Mode), ids=lambda mode: mode.name)
def test_rate(mode):
    check_rate("4x8", mode)


@pytest.mark.slow
@pytest.mark.parametrize("mode", list(Mode), ids=lambda mode: mode.name)
def test_rate_of_the_usual_array(mode):
    check_rate("8x16", mode)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("operation", "target", "beats"),
    [
        (VectorOperation.ADD, Target.TILES, 2),
        (VectorOperation.SOFTMAX, Target.WEIGHTS, 2),
    ],
    ids=lambda each: getattr(each, "name", None),
)
def test_rate_of_vector_work(operation, target, beats):
    """A word of the lanes, a beat of the port here, takes as many cycles as beats are read for it:
    one for each sweep and each operand. The rest is memory's latency and what lies between operands
    and sweeps."""
    with Pair("8x16", np.random.default_rng(SEED)) as pair:
        rows, lanes = pair.config.engine.rows, pair.config.lanes
        k = 400 if operation is VectorOperation.SOFTMAX else 200
        workload = pair.workload(rows=rows, position=k - rows)
        segments = 1 if operation is VectorOperation.SOFTMAX else 4
        workload.add_vector(operation, target, k, segments, segments)
        pair.check(workload.end())
        values = Registers(pair.rtl, pair.config)
        cycles, stalls = values["VECTOR_CYCLES"], values["VECTOR_STALLS"]
        assert values["CYCLES"] > cycles > stalls
        words = segments * rows * k // lanes
        print(f"{operation.name}: {words} words in {cycles} cycles, {stalls} without operands")
        assert words * beats <= cycles <= words * beats + 200
        pair.check(pair.workload().end())
        assert values["VECTOR_CYCLES"] == values["VECTOR_STALLS"] == 0
