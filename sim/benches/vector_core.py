# SPDX-License-Identifier: Apache-2.0
"""Testbench of the arithmetic of the vector unit: random operations of every kind and shape, with
and without pauses of all streams, and how long they take."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import cocotb
import numpy as np
import torch
from amaranth.hdl import Cat, Elaboratable, Module, Signal
from amaranth.lib import stream, wiring
from amaranth.lib.wiring import In, Out

from speq.hw.accelerator_config import AcceleratorConfig
from speq.hw.common.ieee754 import FP16_NAN, FP32_NAN
from speq.hw.common.ram import RAM_VERILOG
from speq.hw.control.descriptor import VectorOperation
from speq.hw.engine_config import EngineConfig
from speq.hw.vector.command import result_word_layout, rows_layout
from speq.hw.vector.lane import PACES, LaneOperation
from speq.hw.vector.partial_sums import PARTIAL_SUMS
from speq.hw.vector.vector_core import (
    RECURRENCE,
    VectorCore,
    core_command_layout,
)
from speq.hw.verilog import convert_unit
from speq.model.arith import to_float16
from speq.model.vector_ops import (
    exponential,
    gated,
    normalize,
    reciprocal,
    rms_norm,
    rotate,
    row_sum,
    rsqrt,
    sigmoid,
    softmax_weights,
)
from speq.sim.benches.file_streams import file_streams_verilog, play_streams
from speq.sim.compare import assert_equal_bits
from speq.sim.runner import seed, simulate

#: Configurations by name; the test of times is for the first.
CONFIGS = {
    "usual": AcceleratorConfig(EngineConfig(rows=8, cols=32, max_k=640), lanes=8, query_heads=16),
    "odd_rows": AcceleratorConfig(EngineConfig(rows=3, cols=8, max_k=200), lanes=4, query_heads=8),
    "one_word": AcceleratorConfig(EngineConfig(rows=4, cols=16, max_k=250), lanes=16),
}
_CONFIG = "SPEQ_BENCH_CONFIG"
#: Random operations of each kind in a run without pauses and in one with them.
_EACH = 12
#: Cycles from a word to the next one of operations with one sweep, if it is not one.
_PACES = {
    VectorOperation.MULTIPLY: PACES[LaneOperation.SCALE_TWICE],
    VectorOperation.ROTATE: PACES[LaneOperation.ROTATE],
    VectorOperation.GATE: PACES[LaneOperation.GATE],
    VectorOperation.SIGMOID_GATE: PACES[LaneOperation.GATE],
}
#: Resets before each run.
_CUTS = 3
_PATIENCE = 1_000_000
#: Infinities, NaNs, quiet and signalling, and zeros.
_SPECIAL = np.array(
    [0x7F800000, 0xFF800000, FP32_NAN, 0xFFC00001, 0x7F800001, 0x80000000, 0], np.uint32
)


class _Bench(wiring.Component):
    """The core. The rows of the pass come with the command, below it."""

    def __init__(self, config: AcceleratorConfig) -> None:
        self.core = VectorCore(config)
        self.command_bits = core_command_layout(config).size
        self.rows_bits = rows_layout(config).as_shape().width
        super().__init__(
            {
                "command": In(stream.Signature(self.rows_bits + self.command_bits)),
                "x": In(stream.Signature(32 * config.lanes)),
                "y": In(stream.Signature(32 * config.lanes)),
                "results": Out(stream.Signature(result_word_layout(config).size)),
                "busy": Out(1),
            }
        )

    def elaborate(self, platform: object) -> Elaboratable:
        m = Module()
        m.submodules.core = core = self.core
        rows = Signal(rows_layout(self.core.config), reset_less=True)
        m.d.comb += [
            core.command.valid.eq(self.command.valid),
            core.command.payload.eq(self.command.payload[self.rows_bits :]),
            self.command.ready.eq(core.command.ready),
            core.rows.eq(rows),
            core.results.ready.eq(self.results.ready),
            self.results.valid.eq(core.results.valid),
            self.results.payload.eq(core.results.payload),
            self.busy.eq(core.busy),
        ]
        with m.If(core.command.valid & core.command.ready):
            m.d.sync += Cat(rows).eq(self.command.payload[: self.rows_bits])
        for name in ("x", "y"):
            inner, outer = getattr(core, name), getattr(self, name)
            m.d.comb += [
                inner.valid.eq(outer.valid),
                inner.payload.eq(outer.payload),
                outer.ready.eq(inner.ready),
            ]
        return m


def run(name: str) -> None:
    """Check the core with the configuration of that name."""
    bench = _Bench(CONFIGS[name])
    verilog = file_streams_verilog(bench, "vector_core_tb") + RAM_VERILOG
    modules = [
        convert_unit(unit, module, reset=False) for module, unit in bench.core.modules.items()
    ]
    environment = {_CONFIG: name}
    simulate(verilog + "".join(modules), "vector_core_tb", __name__, environment=environment)


@dataclass
class _Work:
    """An operation and what it is to give.

    Attributes
    ----------
    command : dict
        Members of the core's command but the operation and the shape.
    x, y, expected : list of float32 arrays [rows, tiles C]
        Of each segment; y is empty if it is not taken.
    parents : sequence of int
        Of the rows of the pass.
    """

    operation: VectorOperation
    x: list[np.ndarray]
    y: list[np.ndarray]
    expected: list[np.ndarray]
    command: dict[str, int] = field(default_factory=dict)
    parents: Sequence[int] = (0,)

    @property
    def sweeps(self) -> int:
        return 2 if self.operation in (VectorOperation.NORM, VectorOperation.SOFTMAX) else 1


class _Golden:
    """Makes operations with operands and golden results."""

    def __init__(self, config: AcceleratorConfig, rng: np.random.Generator) -> None:
        self.config, self.rng = config, rng
        self.rows, self.cols = config.engine.rows, config.engine.cols

    def numbers(self, rows: int, elements: int) -> np.ndarray:
        """float32 [rows, elements]: usual ones, some infinities, NaNs and zeros among usual ones,
        very small and very large ones, or anything."""
        rng = self.rng
        usual = rng.standard_normal((rows, elements)).astype(np.float32)
        kind = rng.integers(0, 8)
        if kind < 4:
            return usual * np.float32(4)
        if kind == 4:
            return self.with_special(usual)
        if kind == 5:
            return usual * np.float32(0.5 ** rng.integers(100, 149))
        if kind == 6:
            return usual * np.float32(2.0 ** rng.integers(40, 127))
        return rng.integers(0, 1 << 32, (rows, elements), np.uint32).view(np.float32)

    def with_special(self, values: np.ndarray) -> np.ndarray:
        """Values float32 of which about one in ten, in every other row, is infinite, NaN or a
        zero."""
        rng = self.rng
        chosen = rng.random(values.shape) < 0.1 * rng.integers(0, 2, (len(values), 1))
        return np.where(chosen, rng.choice(_SPECIAL, values.shape).view(np.float32), values)

    def shape(self) -> tuple[int, list[int]]:
        """Elements of a row, of whole tiles, and the rows of each segment."""
        rng = self.rng
        tiles = int(rng.integers(1, self.config.engine.max_k // self.cols + 1))
        tiles = min(tiles, int(rng.choice([1, 2, 3, tiles])))
        segments = int(rng.integers(1, 5))
        rows = int(rng.integers(1, self.rows + 1))
        last = int(rng.integers(1, rows + 1))
        return tiles * self.cols, [rows] * (segments - 1) + [last]

    def argument(self) -> np.float32:
        return np.float32(self.rng.standard_normal())

    def simple(
        self,
        operation: VectorOperation,
        formula: Callable[[np.ndarray, np.ndarray, np.float32], np.ndarray],
        *,
        takes_y: bool,
    ) -> _Work:
        """An operation element by element."""
        elements, segments = self.shape()
        argument = self.argument()
        x = [self.numbers(rows, elements) for rows in segments]
        y = [self.numbers(rows, elements) for rows in segments]
        with np.errstate(all="ignore"):
            expected = [formula(a, b, argument) for a, b in zip(x, y, strict=True)]
        command = {"argument": int(argument.view(np.uint32))}
        return _Work(operation, x, y if takes_y else [], expected, command)

    def gate(self) -> _Work:
        def formula(x: np.ndarray, y: np.ndarray, _: np.float32) -> np.ndarray:
            result = (x * y) * sigmoid(x)
            halves = gated(torch.from_numpy(x), torch.from_numpy(y), "silu")
            assert torch.equal(_half(result), halves.view(torch.int16))
            return result

        return self.simple(VectorOperation.GATE, formula, takes_y=True)

    def rotation(self) -> _Work:
        def formula(x: np.ndarray, y: np.ndarray, _: np.float32) -> np.ndarray:
            a, b, cos, sin = x[:, ::2], x[:, 1::2], y[:, ::2], y[:, 1::2]
            result = np.empty_like(x)
            result[:, ::2], result[:, 1::2] = a * cos - b * sin, b * cos + a * sin
            halves = rotate(
                torch.from_numpy(np.concatenate((a, b), axis=1))[:, None],
                *(torch.from_numpy(np.ascontiguousarray(part)) for part in (cos, sin)),
            )[:, 0]
            interleaved = torch.stack(halves.chunk(2, dim=-1), dim=-1).flatten(-2)
            assert torch.equal(_half(result), interleaved.view(torch.int16))
            return result

        return self.simple(VectorOperation.ROTATE, formula, takes_y=True)

    def norm(self, tokens: int | None = None, k: int | None = None, segments: int = 0) -> _Work:
        """Rows of any length, with the weights of the golden model, the same for all rows."""
        rng = self.rng
        tokens = tokens or int(rng.integers(1, self.rows + 1))
        segments = segments or int(rng.integers(1, 4))
        most = self.config.engine.max_k
        k = k or int(rng.choice([rng.integers(1, most + 1), rng.integers(1, min(most, 130) + 1)]))
        elements = -(-k // self.cols) * self.cols
        eps = np.float32(rng.choice([1e-5, 1e-6]))
        argument = np.float32(1.0 / k)
        work = _Work(
            VectorOperation.NORM,
            [],
            [],
            [],
            {"argument": int(argument.view(np.uint32)), "detail": int(eps.view(np.uint32))},
        )
        for _ in range(segments):
            x = np.zeros((tokens, elements), np.float32)
            x[:, :k] = self.numbers(tokens, k)
            weights = np.zeros(elements, np.float16)
            weights[:k] = rng.standard_normal(k)
            y = np.broadcast_to(weights.astype(np.float32), x.shape)
            with np.errstate(all="ignore"):
                scale = rsqrt(np.asarray(row_sum(x * x) * argument + eps))
                expected = (x * scale[:, None]) * y
                golden = rms_norm(
                    torch.from_numpy(x[:, :k]), torch.from_numpy(weights[:k]), float(eps)
                )
            assert_equal_bits(
                "rms_norm", expected=_bits(golden.numpy()), got=_bits(expected[:, :k])
            )
            work.x.append(x)
            work.y.append(np.ascontiguousarray(y))
            work.expected.append(expected)
        return work

    def softmax(self) -> list[_Work]:
        """A softmax of the rows of a KV head, and a division by its sums."""
        rng, config = self.rng, self.config
        tokens = int(rng.integers(1, self.rows + 1))
        sharing = int(rng.integers(1, 5))
        o = int(rng.integers(0, config.query_heads - sharing + 1))
        position = int(rng.integers(0, config.engine.max_k - tokens + 1))
        position = min(position, int(rng.choice([0, self.cols, position])))
        parents = [int(rng.integers(max(1, row))) for row in range(tokens)]
        if rng.random() < 0.5:
            parents = [max(0, row - 1) for row in range(tokens)]
        window = int(rng.choice([0, 0, int(rng.integers(1, position + tokens + 2))]))
        allowed = _allowed(parents, position, window)
        argument = np.float32(abs(self.argument()))
        elements = -(-(position + tokens) // self.cols) * self.cols
        seen = np.zeros((sharing * tokens, elements), bool)
        seen[:, : position + tokens] = np.tile(allowed, (sharing, 1))
        scores = (rng.standard_normal(seen.shape) * rng.choice([1, 8])).astype(np.float32)
        if rng.random() < 0.3:
            scores = self.with_special(scores)
        wild = rng.integers(0, 1 << 32, seen.shape, np.uint32).view(np.float32)
        x = np.where(seen, scores, wild)
        weights, sums = softmax_weights(
            torch.from_numpy(x), torch.from_numpy(seen), float(argument)
        )
        with np.errstate(all="ignore"):
            scaled = np.where(seen, x * argument, np.float32(-np.inf))
            largest = np.where(np.isnan(scaled), -np.inf, scaled).max(axis=1, keepdims=True)
            expected = np.where(seen, exponential(scaled - largest), np.float32(0))
        assert torch.equal(_half(expected), weights.view(torch.int16))
        batches = range(0, sharing * tokens, self.rows)
        values = self.numbers(sharing * tokens, self.cols * int(rng.integers(1, 4)))
        with np.errstate(all="ignore"):
            quotients = normalize(torch.from_numpy(values), sums)
        softmax = _Work(
            VectorOperation.SOFTMAX,
            [x[i : i + self.rows] for i in batches],
            [],
            [expected[i : i + self.rows] for i in batches],
            {
                "argument": int(argument.view(np.uint32)),
                "detail": window,
                "o": o,
                "rows": tokens,
                "position": position,
            },
            parents,
        )
        return [softmax, self.division(values, sums.numpy(), quotients, o)]

    def division(
        self, values: np.ndarray, sums: np.ndarray, quotients: torch.Tensor, o: int
    ) -> _Work:
        """Values [rows, elements] divided by the sums of a softmax."""
        with np.errstate(all="ignore"):
            expected = values * reciprocal(sums)[:, None]
        assert torch.equal(_half(expected), quotients.view(torch.int16))
        batches = range(0, len(values), self.rows)
        return _Work(
            VectorOperation.NORMALIZE,
            [values[i : i + self.rows] for i in batches],
            [],
            [expected[i : i + self.rows] for i in batches],
            {"o": o},
        )

    def every(self) -> list[list[_Work]]:
        """One of each kind; those of a list belong together."""
        v = VectorOperation
        return [
            [self.simple(v.EMBED, lambda x, _, s: x * s, takes_y=False)],
            [self.simple(v.ADD, lambda x, y, s: x * s + y, takes_y=True)],
            [self.simple(v.MULTIPLY, lambda x, y, s: (x * y) * s, takes_y=True)],
            [self.simple(v.ROUND, lambda x, _, __: x, takes_y=False)],
            [self.simple(v.SIGMOID_GATE, lambda x, y, _: x * sigmoid(y), takes_y=True)],
            [self.gate()],
            [self.rotation()],
            [self.norm()],
            self.softmax(),
        ]


def _allowed(parents: Sequence[int], position: int, window: int) -> np.ndarray:
    """bool [rows, position + rows]: which entries the rows of a pass attend to."""
    rows = len(parents)
    depths = np.zeros(rows, int)
    seen = np.zeros((rows, position + rows), bool)
    seen[:, :position] = True
    for row, parent in enumerate(parents):
        if row:
            depths[row] = depths[parent] + 1
            seen[row, position:] = seen[parent, position:]
        seen[row, position + row] = True
    places = np.concatenate([np.arange(position), position + depths])
    if window:
        seen &= (position + depths)[:, None] - places < window
    return seen


def _bits(values: np.ndarray) -> np.ndarray:
    """Bit patterns of float32; the only NaN is `FP32_NAN`."""
    return np.where(np.isnan(values), np.uint32(FP32_NAN), values.view(np.uint32))


def _half(values: np.ndarray) -> torch.Tensor:
    """Bit patterns of float32 values as FP16, int16."""
    return to_float16(torch.from_numpy(np.ascontiguousarray(values))).view(torch.int16)


def _words(config: AcceleratorConfig, segments: Sequence[np.ndarray], sweeps: int) -> np.ndarray:
    """The elements of segments [rows, elements] in the order of words, [words, lanes]."""
    parts = [np.zeros((0, config.lanes), np.float32)]
    for segment in segments:
        chunks = segment.reshape(len(segment), -1, config.engine.cols)
        parts += [chunks.transpose(1, 0, 2).reshape(-1, config.lanes)] * sweeps
    return np.concatenate(parts)


def _command(config: AcceleratorConfig, work: _Work) -> np.ndarray:
    """Bytes of the command with the rows of the pass."""
    depths: list[int] = []
    rows = []
    for row, parent in enumerate(work.parents):
        depths.append(depths[parent] + 1 if row else 0)
        rows.append({"token": 0, "depth": depths[row], "parent": parent})
    rows += [{"token": 0, "depth": 0, "parent": 0}] * (config.engine.rows - len(rows))
    layout = rows_layout(config)
    low = layout.const(rows).as_value().value
    shape = {
        "segments": len(work.x),
        "tiles": work.x[0].shape[1] // config.engine.cols,
        "rows": len(work.x[0]),
        "last_rows": len(work.x[-1]),
    }
    values = {"rows": 1, "operation": work.operation, "words": shape} | work.command
    high = core_command_layout(config).const(values).as_value().value
    bits = core_command_layout(config).size + layout.size
    return np.frombuffer((high << layout.size | low).to_bytes(-(-bits // 8), "little"), np.uint8)


async def _play(
    dut: Any, works: Sequence[_Work], pauses: dict[str, float], cut: int = 0
) -> dict[str, Any]:
    """Have the core do it, compare all results, and return the cycles of all streams; `cut` ends it
    after so many cycles."""
    config = CONFIGS[os.environ[_CONFIG]]
    bench = _Bench(config)
    items = {
        "command": np.stack([_command(config, work) for work in works]),
        "x": np.concatenate([_words(config, work.x, work.sweeps) for work in works]),
        "y": np.concatenate([_words(config, work.y, 1) for work in works]),
    }
    for name in ("x", "y"):
        items[name] = np.ascontiguousarray(items[name]).view(np.uint8)
    logs = await play_streams(dut, bench, items, pauses, _PATIENCE, cut=cut)
    if cut:
        return logs
    results = logs["results"][:, 1:]
    got = results[:, : config.lanes]
    halves = results[:, config.lanes :].copy().view(np.uint16)
    first = 0
    for number, work in enumerate(works):
        expected = _words(config, work.expected, 1)
        count = len(expected)
        name = f"VectorCore.results, seed {seed()}, operation {number}, {work.operation.name}"
        shape = f"{[part.shape for part in work.x]}, {work.command}"
        operands = {
            "x": _bits(_words(config, work.x, 1)),
            **({"y": _bits(_words(config, work.y, 1))} if work.y else {}),
        }
        assert_equal_bits(
            f"{name}.fp32 {shape}",
            expected=_bits(expected),
            got=got[first : first + count],
            operands=operands,
        )
        rounded = _half(expected).numpy().view(np.uint16)
        rounded = np.where(np.isnan(expected), np.uint16(FP16_NAN), rounded)
        assert_equal_bits(
            f"{name}.fp16 {shape}",
            expected=rounded,
            got=halves[first : first + count],
            operands=operands,
        )
        first += count
    assert first == len(results)
    return logs


@cocotb.test()
async def every_operation(dut: Any) -> None:
    """Operations in any order, with and without pauses, and resets in the middle before."""
    config = CONFIGS[os.environ[_CONFIG]]
    rng = np.random.default_rng(seed())
    golden = _Golden(config, rng)
    for pauses in ({}, {"x": 0.3, "y": 0.3, "results": 0.3}, {"results": 0.9}, {"x": 0.9}):
        groups = [group for _ in range(_EACH) for group in golden.every()]
        works = [work for i in rng.permutation(len(groups)) for work in groups[i]]
        for _ in range(_CUTS):
            first = int(rng.integers(len(works)))
            await _play(dut, works[first:], pauses, cut=int(rng.integers(20, 300)))
        await _play(dut, works, pauses)


@cocotb.test()
async def times(dut: Any) -> None:
    """A word in as many cycles as the lanes take for it, and what a norm takes."""
    config = CONFIGS[os.environ[_CONFIG]]
    golden = _Golden(config, np.random.default_rng(seed()))
    for group in golden.every():
        for work in group:
            logs = await _play(dut, [work], {})
            taken, given = logs["x"], logs["results"][:, 0]
            dut._log.info(f"{work.operation.name}: {len(taken)} words, {given[-1]} cycles")
            if work.sweeps == 1:
                step = _PACES.get(work.operation, 1)
                assert taken[-1] - taken[0] == step * (len(taken) - 1)
                assert given[-1] - given[0] == step * (len(given) - 1)
    cols, lanes = config.engine.cols, config.lanes
    for tokens in (1, config.engine.rows):
        k = min(576, config.engine.max_k)
        logs = await _play(dut, [golden.norm(tokens, k, 1)], {})
        words = len(logs["x"]) // 2
        sweep = int(logs["x"][words - 1] - logs["x"][0]) + 1
        between = int(logs["x"][words] - logs["x"][words - 1])
        cycles = int(logs["results"][-1, 0] - logs["command"][0])
        dut._log.info(
            f"NORM of {tokens} x {k}: {words} words, first sweep {sweep}, between {between}, "
            f"all {cycles} cycles"
        )
        # Words from one that is added to a partial sum to the next one.
        distance = PARTIAL_SUMS // lanes * (tokens if cols <= PARTIAL_SUMS else 1)
        whole, rest = divmod(words - 1, distance)
        assert sweep == whole * max(distance, RECURRENCE) + rest + 1
