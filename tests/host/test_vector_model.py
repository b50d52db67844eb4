# SPDX-License-Identifier: Apache-2.0
"""VECTOR descriptors on the functional model: each operation and target against the golden model,
with operands and results placed by hand, and what the checks refuse."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
import torch

from speq.host.accelerator_model import AcceleratorModel, check_descriptor
from speq.host.registers import Registers
from speq.host.vector_model import Memory, PassRow, VectorModel
from speq.hw.accelerator_config import AcceleratorConfig, ErrorCode
from speq.hw.control.descriptor import (
    SINGLE_TARGETS,
    TARGETS,
    Descriptor,
    DescriptorKind,
    Target,
    VectorOperation,
    unpack,
)
from speq.hw.engine_config import EngineConfig
from speq.hw.memory.axi import AxiConfig
from speq.model.arith import quantize_activations, to_float16
from speq.model.number_format import FormatConfig
from speq.model.vector_ops import (
    GELU_CUBIC,
    GELU_LINEAR,
    gated,
    normalize,
    rms_norm,
    rotary_table,
    rotate,
    softmax_weights,
)
from speq.sim.runner import seed

SEED = seed()
SIZE = 1 << 20
X, Y, RESULTS, TABLE = 0x10000, 0x40000, 0x80000, 0xC0000
CONFIGS = {
    "4x16": AcceleratorConfig(EngineConfig(rows=4, cols=16, max_k=512), lanes=8),
    "3x4": AcceleratorConfig(
        EngineConfig(rows=3, cols=4, draft_rows=2, max_k=200, format=FormatConfig(32, 1)), lanes=4
    ),
    "8x64 narrow": AcceleratorConfig(
        EngineConfig(rows=8, cols=64, max_k=512, draft_rows=3),
        lanes=16,
        data=AxiConfig(data_bits=64),
    ),
}
#: Elements of a head: tiles that are full, and one that is not.
HEADS = {"4x16": 20, "3x4": 10, "8x64 narrow": 80}


def random_tree(random: np.random.Generator, rows: int) -> list[PassRow]:
    """Rows that follow any row before them, with random tokens."""
    tree: list[PassRow] = [(int(random.integers(50)), 0, 0)]
    for _ in range(rows - 1):
        parent = int(random.integers(len(tree)))
        tree.append((int(random.integers(50)), tree[parent][1] + 1, parent))
    return tree


def bits_of(value: float) -> int:
    return int(np.float32(value).view(np.uint32))


@dataclass
class Bench:
    """The model of the vector unit on bytes, and what they have to become."""

    config: AcceleratorConfig
    rows: list[PassRow]
    position: int
    random: np.random.Generator

    def __post_init__(self) -> None:
        self.memory = self.random.integers(0, 256, SIZE).astype(np.uint8)
        self.expected = self.memory
        self.model = VectorModel(self.config, Memory(self._load, self._store, self._store_columns))

    def _load(self, address: int, size: int) -> np.ndarray:
        return self.memory[address : address + size]

    def _store(self, address: int, values: np.ndarray, transfer: int) -> None:
        content = np.ascontiguousarray(values).reshape(-1).view(np.uint8)
        assert len(content) % transfer == 0
        self.memory[address : address + len(content)] = content

    def _store_columns(self, address: int, values: np.ndarray, pitch: int) -> None:
        for i, row in enumerate(values):
            self._store(address + i * pitch, row, row.nbytes)

    @property
    def cols(self) -> int:
        return self.config.engine.cols

    @property
    def tokens(self) -> int:
        return len(self.rows)

    def numbers(self, *shape: int) -> np.ndarray:
        """Random float32 of many magnitudes."""
        x = self.random.standard_normal(shape) * np.exp2(self.random.integers(-6, 4, shape))
        return x.astype(np.float32)

    def place_tiles(self, address: int, segments: list[np.ndarray], pad: float = 3.0) -> None:
        """Write segments, float32 [rows, k] each, as FP32 [segment][tile][row][column]."""
        for x in segments:
            for tile in range(-(-x.shape[1] // self.cols)):
                for row in x:
                    part = np.full(self.cols, pad, np.float32)
                    content = row[tile * self.cols : (tile + 1) * self.cols]
                    part[: len(content)] = content
                    self._store(address, part, part.nbytes)
                    address += part.nbytes

    def run(
        self, operation: VectorOperation, target: Target, source: int = 0, **values: int
    ) -> None:
        """Carry out a descriptor; `expected` is then memory from before, to be completed."""
        given = {"first": X, "second": Y, "results": RESULTS} | values
        fields = unpack(
            Descriptor(DescriptorKind.VECTOR, operation=operation, target=target, **given).pack()
        )
        assert check_descriptor(self.config, fields, self.tokens, self.position) is ErrorCode.NONE
        self.expected = self.memory.copy()
        self.model.carry_out(fields, self.rows, self.position, source)

    def expect(self, address: int, value: np.ndarray) -> None:
        content = value.reshape(-1).view(np.uint8)
        self.expected[address : address + len(content)] = content

    def expect_columns(self, address: int, half: np.ndarray) -> None:
        """Words of activations, float16 [rows, k]."""
        for t, row in enumerate(half):
            for e, value in enumerate(row):
                self.expect(address + e * self.config.activation_bytes + 2 * t, value[None])

    def expect_tiles(self, address: int, segments: np.ndarray) -> None:
        """FP32 [segment][tile][row][column] of float32 [segments, rows, k], k whole tiles."""
        for segment in segments:
            for tile in range(segment.shape[1] // self.cols):
                for row in segment:
                    part = row[tile * self.cols : (tile + 1) * self.cols]
                    self.expect(address, part)
                    address += part.nbytes

    def check(self) -> None:
        wrong = np.flatnonzero(self.memory != self.expected)
        assert not len(wrong), f"SPEQ_SEED={SEED}: {len(wrong)} bytes differ from {wrong[0]:#x} on"


@pytest.fixture(params=CONFIGS)
def bench(request: pytest.FixtureRequest) -> Bench:
    config = CONFIGS[request.param]
    random = np.random.default_rng([SEED, len(request.node.name)])
    rows = random_tree(random, config.engine.rows)
    return Bench(config, rows, int(random.integers(1, 60)), random)


def head_dim(bench: Bench) -> int:
    return next(HEADS[name] for name, config in CONFIGS.items() if config == bench.config)


def whole_tiles(bench: Bench, k: int) -> int:
    return -(-k // bench.cols) * bench.cols


def half(x: np.ndarray) -> np.ndarray:
    return to_float16(torch.from_numpy(np.ascontiguousarray(x))).numpy()


@pytest.mark.parametrize("from_memory", [False, True])
def test_embed(bench: Bench, from_memory: bool) -> None:
    k, factor, size = head_dim(bench), 3.3, bench.config.data.beat_bytes
    padded = whole_tiles(bench, k)
    pitch = -(-2 * padded // size) * size + size
    table = bench.numbers(50, padded).astype(np.float16)
    for token, row in enumerate(table):
        bench._store(TABLE + token * pitch, row, row.nbytes)
    tokens = [token for token, _, _ in bench.rows]
    if from_memory:
        tokens = bench.random.integers(0, 50, bench.tokens).tolist()
        bench._store(Y + 4 * bench.position, np.array(tokens, "<u4"), 4 * len(tokens))
    bench.run(
        *(VectorOperation.EMBED, Target.TILES),
        **{"first": TABLE, "k": k, "o": 1, "detail": pitch, "argument": bits_of(factor)},
        values=int(from_memory),
    )
    embedded = torch.from_numpy(table)[tokens].to(torch.float32) * factor
    bench.expect_tiles(RESULTS, embedded.numpy()[None])
    bench.check()


@pytest.mark.parametrize("same", [False, True])
@pytest.mark.parametrize("operation", [VectorOperation.ADD, VectorOperation.MULTIPLY])
def test_elementwise(bench: Bench, operation: VectorOperation, same: bool) -> None:
    k, heads, factor = whole_tiles(bench, head_dim(bench)), 3, np.float32(0.22)
    x = bench.numbers(heads, bench.tokens, k)
    y = bench.numbers(heads, 1 if same else bench.tokens, k)
    bench.place_tiles(X, list(x))
    bench.place_tiles(Y, list(y))
    bench.run(operation, Target.TILES, k=k, o=heads, argument=bits_of(factor), values=int(same))
    result = factor * x + y if operation is VectorOperation.ADD else (x * y) * factor
    bench.expect_tiles(RESULTS, result)
    bench.check()


@pytest.mark.parametrize("target", TARGETS[VectorOperation.NORM])
def test_norm(bench: Bench, target: Target) -> None:
    k, eps = 3 * head_dim(bench) - 1, 1e-5
    heads = 1 if target in SINGLE_TARGETS else 3
    if target is Target.DRAFT_ACTIVATIONS:
        bench.rows = bench.rows[: bench.config.engine.draft_rows]
    x, weight = bench.numbers(heads, bench.tokens, k), bench.numbers(k).astype(np.float16)
    bench.place_tiles(X, list(x), pad=0.0)
    bench.place_tiles(Y, [weight.astype(np.float32)[None]] * heads, pad=0.0)
    bench.run(
        *(VectorOperation.NORM, target),
        **{"k": k, "o": heads, "argument": bits_of(1 / k), "detail": bits_of(eps), "values": 1},
    )
    y = rms_norm(torch.from_numpy(x), torch.from_numpy(weight), eps).numpy()
    if target is Target.ACTIVATIONS:
        bench.expect_columns(RESULTS, half(y[0]))
    elif target is Target.DRAFT_ACTIVATIONS:
        expect_draft_activations(bench, half(y[0]))
    else:
        padded = np.zeros((heads, bench.tokens, whole_tiles(bench, k)), np.float32)
        padded[..., :k] = y
        bench.expect_tiles(RESULTS, padded)
    bench.check()


def expect_queries(bench: Bench, y: np.ndarray, sharing: int, outer: int, inner: int) -> None:
    """Float16 [heads, rows, k] as activations of an ATTENTION per KV head."""
    rows, size = bench.config.engine.rows, bench.config.activation_bytes
    for h, head in enumerate(y):
        for t, values in enumerate(head):
            n = h % sharing * bench.tokens + t
            address = RESULTS + h // sharing * outer + n // rows * inner + 2 * (n % rows)
            for e, value in enumerate(values):
                bench.expect(address + e * size, value[None])


def expect_keys(bench: Bench, y: np.ndarray, outer: int, inner: int) -> None:
    """Float16 [KV heads, rows, k] as keys of the KV cache: a tile holds C entries."""
    cols = bench.cols
    for g, head in enumerate(y):
        for t, values in enumerate(head):
            tile, column = divmod(bench.position + t, cols)
            for e, value in enumerate(values):
                place = g * outer + tile * inner + 2 * (cols * e + column)
                bench.expect(RESULTS + place, value[None])


def pitches(bench: Bench) -> tuple[int, int]:
    """Distances that fit for queries, keys and values of heads of up to 80 elements, and of as many
    entries."""
    inner = 80 * max(bench.config.activation_bytes, 2 * bench.cols)
    return inner * (80 // bench.cols + 1), inner


@pytest.mark.parametrize("target", TARGETS[VectorOperation.ROTATE])
def test_rotate(bench: Bench, target: Target) -> None:
    k, heads, sharing = head_dim(bench), 4, 2
    x = bench.numbers(bench.tokens, heads, k)
    order = np.arange(k).reshape(2, -1).T.reshape(-1)  # pairs become neighbours
    bench.place_tiles(X, list(x[..., order].swapaxes(0, 1)))
    frequencies = torch.from_numpy(bench.numbers(k // 2))
    cos, sin = rotary_table(torch.arange(80), frequencies)
    pitch = 4 * whole_tiles(bench, k) + 2 * bench.config.data.beat_bytes
    table = np.stack((cos.numpy(), sin.numpy()), axis=2).reshape(80, k)
    for position, row in enumerate(table):
        bench.place_tiles(TABLE + position * pitch, [row[None]])
    outer, inner = pitches(bench)
    bench.run(
        *(VectorOperation.ROTATE, target),
        **{"second": TABLE, "k": k, "o": heads, "sharing": sharing, "detail": pitch},
        **{"outer": outer, "inner": inner},
    )
    places = [bench.position + depth for _, depth, _ in bench.rows]
    y = rotate(torch.from_numpy(x), cos[places], sin[places]).numpy()
    y = y[..., order].swapaxes(0, 1)
    if target is Target.QUERIES:
        expect_queries(bench, y, sharing, outer, inner)
    else:
        expect_keys(bench, y, outer, inner)
    bench.check()


@pytest.mark.parametrize("target", TARGETS[VectorOperation.ROUND])
def test_round(bench: Bench, target: Target) -> None:
    k, heads, sharing = head_dim(bench), 6, 3
    x = bench.numbers(heads, bench.tokens, k)
    bench.place_tiles(X, list(x))
    outer, inner = pitches(bench)
    bench.run(
        *(VectorOperation.ROUND, target),
        **{"k": k, "o": heads, "sharing": sharing, "outer": outer, "inner": inner},
    )
    y = half(x)
    if target is Target.QUERIES:
        expect_queries(bench, y, sharing, outer, inner)
    elif target is Target.KEYS:
        expect_keys(bench, y, outer, inner)
    else:
        for g, head in enumerate(y):
            for t, values in enumerate(head):
                row = np.full(whole_tiles(bench, k), 3.0, np.float16)
                row[:k] = values
                for i, part in enumerate(row.reshape(-1, bench.cols)):
                    place = g * outer + i * inner + 2 * bench.cols * (bench.position + t)
                    bench.expect(RESULTS + place, part)
    bench.check()


def test_gates(bench: Bench) -> None:
    k = 3 * head_dim(bench) - 1
    gate, up = bench.numbers(bench.tokens, k), bench.numbers(bench.tokens, k)
    bench.place_tiles(X, [gate])
    bench.place_tiles(Y, [up])
    bench.run(VectorOperation.GATE, Target.ACTIVATIONS, k=k, o=1)
    y = gated(torch.from_numpy(gate), torch.from_numpy(up), "silu")
    bench.expect_columns(RESULTS, y.numpy())
    bench.check()


def test_gelu_in_steps(bench: Bench) -> None:
    k = 3 * head_dim(bench) - 1
    gate, up = bench.numbers(bench.tokens, k), bench.numbers(bench.tokens, k)
    bench.place_tiles(X, [gate])
    bench.place_tiles(Y, [up])
    linear, z, both = TABLE, TABLE + 0x10000, TABLE + 0x20000
    bench.place_tiles(linear, [np.full((1, k), GELU_LINEAR, np.float32)])
    one, multiply, sizes = bits_of(1.0), VectorOperation.MULTIPLY, {"k": k, "o": 1}
    bench.run(multiply, Target.TILES, second=X, results=z, argument=bits_of(GELU_CUBIC), **sizes)
    bench.run(
        *(VectorOperation.ADD, Target.TILES),
        **{"first": z, "second": linear, "results": z, "argument": one, "values": 1, **sizes},
    )
    bench.run(multiply, Target.TILES, first=z, second=X, results=z, argument=one, **sizes)
    bench.run(multiply, Target.TILES, results=both, argument=one, **sizes)
    bench.run(*(VectorOperation.SIGMOID_GATE, Target.ACTIVATIONS), first=both, second=z, **sizes)
    y = gated(torch.from_numpy(gate), torch.from_numpy(up), "gelu_tanh")
    bench.expect_columns(RESULTS, y.numpy())
    bench.check()


def test_product_to_activations(bench: Bench) -> None:
    k = head_dim(bench)
    x, y = bench.numbers(bench.tokens, k), bench.numbers(1, k)
    bench.place_tiles(X, [x])
    bench.place_tiles(Y, [y])
    bench.run(
        *(VectorOperation.MULTIPLY, Target.ACTIVATIONS),
        **{"k": k, "o": 1, "argument": bits_of(7.0), "values": 1},
    )
    bench.expect_columns(RESULTS, half((x * y) * np.float32(7.0)))
    bench.check()


def ancestry(bench: Bench, window: int) -> torch.Tensor:
    """Which KV entries each row sees, bool [rows, entries]."""
    mask = torch.zeros(bench.tokens, bench.position + bench.tokens, dtype=torch.bool)
    for t, (_, depth, _) in enumerate(bench.rows):
        place = bench.position + depth
        for entry in range(bench.position):
            mask[t, entry] = not window or place - entry < window
        row = t
        while True:
            mask[t, bench.position + row] = not window or depth - bench.rows[row][1] < window
            if row == 0:
                break
            row = bench.rows[row][2]
    return mask


@pytest.mark.parametrize("window", [0, 2, 17])
def test_attention(bench: Bench, window: int) -> None:
    sharing, scale, first_head = 3, 0.17, 5
    rows, tokens, size = bench.config.engine.rows, bench.tokens, bench.config.activation_bytes
    entries, k = bench.position + tokens, head_dim(bench)
    n = sharing * tokens
    batches = [slice(first, first + rows) for first in range(0, n, rows)]
    scores = bench.numbers(n, entries)
    bench.place_tiles(X, [scores[batch] for batch in batches])
    heads = {"o": first_head, "sharing": sharing}
    beat = bench.config.data.beat_bytes
    distance = -(-entries * size // beat) * beat
    bench.run(
        *(VectorOperation.SOFTMAX, Target.WEIGHTS),
        **{"argument": bits_of(scale), "detail": window, **heads},
    )
    # Row n is row n % T of query head n // T.
    allowed = ancestry(bench, window).repeat(sharing, 1)
    weights, sums = softmax_weights(torch.from_numpy(scores), allowed, scale)
    for b, batch in enumerate(batches):
        bench.expect_columns(RESULTS + b * distance, weights.numpy()[batch])
    bench.check()

    values = bench.numbers(n, k)
    bench.place_tiles(X, [values[batch] for batch in batches])
    outer = k * size
    bench.run(VectorOperation.NORMALIZE, Target.CONTEXT, k=k, outer=outer, **heads)
    y = normalize(torch.from_numpy(values), sums).numpy()
    for h in range(sharing):
        bench.expect_columns(RESULTS + h * outer, y[h * tokens : (h + 1) * tokens])
    bench.check()


def expect_draft_activations(bench: Bench, x: np.ndarray) -> None:
    """Block activations of FP16 numbers [rows, k] at RESULTS, up to the end of a beat."""
    engine, size = bench.config.engine, bench.config.activation_bytes
    blocks = quantize_activations(torch.from_numpy(x), engine.format.group)
    beat, steps = bench.config.data.beat_bytes, -(-x.shape[1] // 4)
    bench.expect(RESULTS, np.zeros(-(-steps * size // beat) * beat, np.uint8))
    for step in range(steps):
        word = 0
        for row in range(len(x)):
            for lane, mantissa in enumerate(blocks.mantissa[row, 4 * step : 4 * step + 4].tolist()):
                number = abs(mantissa) | (mantissa < 0) << 7
                word |= number << 37 * row + 8 * lane
            exponent = int(blocks.exponent[row, 4 * step // engine.format.group])
            word |= exponent << 37 * row + 32
        bench.expect(RESULTS + step * size, np.frombuffer(word.to_bytes(size, "little"), np.uint8))


def test_quantize(bench: Bench) -> None:
    k, engine, size = 3 * head_dim(bench) - 1, bench.config.engine, bench.config.activation_bytes
    x = half(bench.numbers(engine.rows, k))
    words = np.zeros((k, size // 2), np.float16)
    words[:, : engine.rows] = x.T
    bench._store(X, words, words.nbytes)
    rows = -(-engine.draft_rows // 2)  # what the others would have is 0
    bench.rows = bench.rows[:rows]
    bench.run(VectorOperation.QUANTIZE, Target.TILES, k=k, o=1)
    expect_draft_activations(bench, x[:rows])
    bench.check()


@pytest.mark.parametrize("operation", [VectorOperation.MULTIPLY, VectorOperation.GATE])
def test_results_to_draft_activations(bench: Bench, operation: VectorOperation) -> None:
    rows, k = bench.config.engine.draft_rows, 3 * head_dim(bench) - 1
    bench.rows = bench.rows[:rows]
    x, y = (bench.numbers(rows, k) for _ in range(2))
    bench.place_tiles(X, [x])
    bench.place_tiles(Y, [y])
    bench.run(operation, Target.DRAFT_ACTIVATIONS, k=k, o=1, argument=bits_of(0.3))
    if operation is VectorOperation.GATE:
        expected = gated(torch.from_numpy(x), torch.from_numpy(y), "silu").numpy()
    else:
        expected = half((x * y) * np.float32(0.3))
    expect_draft_activations(bench, expected)
    bench.check()


def test_move(bench: Bench) -> None:
    k, heads, cols = head_dim(bench), 3, bench.cols
    lines = heads * k
    tiles = heads * -(-k // cols)
    key_pitch, value_pitch = lines * 2 * cols, 90 * 2 * cols
    bench.rows = bench.rows[:1]
    for step in (1, 5, cols):
        source = bench.position + step
        bench.run(
            *(VectorOperation.MOVE, Target.TILES),
            **{"source": source, "k": k, "o": heads, "inner": key_pitch, "outer": value_pitch},
        )
        places = []
        for entry in (source, bench.position):
            tile, column = divmod(entry, cols)
            keys = [X + tile * key_pitch + 2 * (cols * line + column) for line in range(lines)]
            values = [Y + tile * value_pitch + 2 * cols * entry for tile in range(tiles)]
            places.append((keys, values))
        for size, old, new in zip((2, 2 * cols), *places, strict=True):
            for start, end in zip(old, new, strict=True):
                bench.expect(end, bench.expected[start : start + size].copy())
        bench.check()


#: A sound descriptor of each operation for "4x16": 4 rows, 1 of them drafts; 64 query heads.
SOUND = {
    VectorOperation.EMBED: {"k": 20, "o": 1, "detail": 64},
    VectorOperation.ADD: {"k": 512, "o": 64},
    VectorOperation.MULTIPLY: {"k": 1, "o": 1, "target": Target.ACTIVATIONS},
    VectorOperation.NORM: {"k": 20, "o": 3, "values": 1, "detail": 0xFFFFFFFF},
    VectorOperation.ROTATE: {"k": 20, "o": 9, "sharing": 3, "detail": 96},
    VectorOperation.ROUND: {"k": 20, "o": 3, "outer": 32, "inner": 96},
    VectorOperation.GATE: {"k": 20, "o": 1},
    VectorOperation.SIGMOID_GATE: {"k": 20, "o": 1, "values": 1},
    VectorOperation.SOFTMAX: {"o": 0, "sharing": 64, "detail": 1},
    VectorOperation.NORMALIZE: {"k": 20, "o": 63, "sharing": 1},
    VectorOperation.QUANTIZE: {"k": 20, "o": 1},
    VectorOperation.MOVE: {"k": 20, "o": 64, "outer": 32, "inner": 96},
}
DEFAULT_TARGETS = {operation: targets[0] for operation, targets in TARGETS.items()} | {
    VectorOperation.ROUND: Target.VALUES
}


def code_of(
    sound: VectorOperation, /, rows: int = 1, position: int = 0, **values: int
) -> ErrorCode:
    """What is wrong with a sound descriptor, changed so; members have their layout's names."""
    given = {"target": DEFAULT_TARGETS[sound], **SOUND[sound]}
    content = Descriptor(DescriptorKind.VECTOR, operation=sound, **given).pack()
    return check_descriptor(CONFIGS["4x16"], unpack(content) | values, rows, position)


@pytest.mark.parametrize("operation", VectorOperation)
def test_sound_descriptors(operation: VectorOperation) -> None:
    most = 1 if operation is VectorOperation.QUANTIZE else 4
    assert code_of(operation) is ErrorCode.NONE
    assert code_of(operation, rows=most, position=512 - most) is ErrorCode.NONE
    assert code_of(operation, rows=most, position=513 - most) is ErrorCode.BAD_SIZE
    assert code_of(operation, rows=most + 1) is ErrorCode.BAD_SIZE
    assert code_of(operation, extra=1 << 32) is ErrorCode.BAD_SIZE
    for name in ("mode", "half", "discard", "tokens"):
        assert code_of(operation, **{name: 1}) is ErrorCode.RESERVED
    for name, multiple in (("activations", 32), ("plane", 32), ("results", 32)):
        assert code_of(operation, **{name: 5 * multiple}) is ErrorCode.NONE
        assert code_of(operation, **{name: multiple // 2}) is ErrorCode.MISALIGNED
        assert code_of(operation, **{name: 1 << 40}) is ErrorCode.MISALIGNED
    for name in ("residual", "groups"):
        assert code_of(operation, **{name: 96}) is ErrorCode.NONE
        if operation not in (VectorOperation.ROUND, VectorOperation.MOVE):  # of lines
            assert code_of(operation, **{name: 24}) is ErrorCode.NONE
        assert code_of(operation, **{name: 4}) is ErrorCode.MISALIGNED
    fields = unpack(Descriptor(DescriptorKind.VECTOR, operation=operation).pack())
    assert check_descriptor(AcceleratorConfig(lanes=0), fields, 1, 0) is ErrorCode.UNKNOWN_KIND


def test_unknown_operations_and_targets() -> None:
    for operation, targets in TARGETS.items():
        for target in range(16):
            values = {"target": target, "sharing": 1, "o": 1}
            known = target in {each.value for each in targets}
            expected = ErrorCode.NONE if known else ErrorCode.UNKNOWN_KIND
            assert code_of(operation, **values) is expected
    for number in (0, 13, 15):
        assert code_of(VectorOperation.ADD, operation=number) is ErrorCode.UNKNOWN_KIND


@pytest.mark.parametrize(
    ("operation", "changed", "code"),
    [
        (VectorOperation.SOFTMAX, {"k": 1}, ErrorCode.RESERVED),
        (VectorOperation.NORM, {"values": 0}, ErrorCode.RESERVED),
        (VectorOperation.ADD, {"k": 0}, ErrorCode.BAD_SIZE),
        (VectorOperation.ADD, {"k": 513}, ErrorCode.BAD_SIZE),
        (VectorOperation.ADD, {"o": 0}, ErrorCode.BAD_SIZE),
        (VectorOperation.ADD, {"o": 65}, ErrorCode.BAD_SIZE),
        (VectorOperation.MULTIPLY, {"o": 2}, ErrorCode.BAD_SIZE),
        (
            VectorOperation.GATE,
            {"target": Target.DRAFT_ACTIVATIONS.value, "o": 2},
            ErrorCode.BAD_SIZE,
        ),
        (VectorOperation.QUANTIZE, {"o": 2}, ErrorCode.BAD_SIZE),
        (VectorOperation.SOFTMAX, {"o": 1}, ErrorCode.BAD_SIZE),
        (VectorOperation.SOFTMAX, {"sharing": 0}, ErrorCode.BAD_SIZE),
        (VectorOperation.NORMALIZE, {"sharing": 2}, ErrorCode.BAD_SIZE),
        (VectorOperation.NORMALIZE, {"o": 80}, ErrorCode.BAD_SIZE),
        (VectorOperation.ROTATE, {"sharing": 0}, ErrorCode.BAD_SIZE),
        (VectorOperation.ROTATE, {"extra": 16}, ErrorCode.MISALIGNED),
        (VectorOperation.EMBED, {"extra": 16}, ErrorCode.MISALIGNED),
        (VectorOperation.ROUND, {"residual": 8}, ErrorCode.MISALIGNED),
        (VectorOperation.ROUND, {"groups": 8}, ErrorCode.MISALIGNED),
        (VectorOperation.MOVE, {"residual": 8}, ErrorCode.MISALIGNED),
        (VectorOperation.MOVE, {"groups": 8}, ErrorCode.MISALIGNED),
        (VectorOperation.MOVE, {"o": 0}, ErrorCode.BAD_SIZE),
    ],
)
def test_refused(operation: VectorOperation, changed: dict[str, int], code: ErrorCode) -> None:
    assert code_of(operation, **changed) is code


def test_regions_of_a_run() -> None:
    """A run that adds and rounds, and regions that end too early."""
    config = CONFIGS["4x16"]
    board = AcceleratorModel(config, SIZE)
    random = np.random.default_rng(SEED)
    x, y = random.standard_normal((2, 2, 3, 16)).astype(np.float32)  # [tile][row][column]
    board.write(X, x)
    board.write(Y, y)
    add = Descriptor(
        *(DescriptorKind.VECTOR,),
        operation=VectorOperation.ADD, target=Target.TILES,
        **{"k": 32, "o": 1, "argument": bits_of(2.0)},
        first=X, second=Y, results=RESULTS,
    )  # fmt: skip
    keys = Descriptor(
        *(DescriptorKind.VECTOR,),
        operation=VectorOperation.ROUND, target=Target.KEYS,
        **{"k": 32, "o": 1, "wait": True, "inner": 1024},
        first=RESULTS, results=TABLE,
    )  # fmt: skip
    program = [add, keys, Descriptor(DescriptorKind.END)]
    board.write(0, b"".join(descriptor.pack() for descriptor in program))
    registers = Registers(board, config)

    def run(read_limit: int, write_limit: int) -> tuple[int, int]:
        values = {
            "PASS_PROGRAM": 0, "PROGRAM_LENGTH": 3, "PASS_ROWS": 3, "POSITION": 15,
            "READ_BASE": 0, "READ_LIMIT": read_limit,
            "WRITE_BASE": 0, "WRITE_LIMIT": write_limit,
        }  # fmt: skip
        for name, value in values.items():
            registers[name] = value
        registers.command("start")
        error = registers["ERROR"], registers["ERROR_ADDRESS"]
        registers.command("stop")
        return error

    last = TABLE + 1024 + 32 * 31 + 31  # of the second tile's last key
    assert run(SIZE - 1, last) == (ErrorCode.NONE.value, 0)
    result = np.float32(2.0) * x + y
    assert board.read(RESULTS, result.nbytes).tobytes() == result.tobytes()
    cache = board.read(TABLE, 2048).view(np.float16).reshape(2, 32, 16)
    rounded = half(result).transpose(0, 2, 1).reshape(32, 3)
    np.testing.assert_array_equal(cache[0, :, 15], rounded[:, 0])
    np.testing.assert_array_equal(cache[1, :, :2], rounded[:, 1:])
    assert not cache[0, :, :15].any() and not cache[1, :, 2:].any()

    assert run(SIZE - 1, last - 1) == (ErrorCode.WRITE_OUTSIDE.value, last - 31)
    assert run(SIZE - 1, RESULTS) == (ErrorCode.WRITE_OUTSIDE.value, RESULTS)
    assert run(Y + y.nbytes - 2, last) == (ErrorCode.READ_OUTSIDE.value, Y)
