# SPDX-License-Identifier: Apache-2.0
"""A functional model of VECTOR descriptors: operands and results in memory, no cycles.

The arithmetic is that of `speq.model.vector_ops`; where operands and results lie this model finds
out by itself, from the description in `speq.hw.control.descriptor`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from speq.host.layout import ceil_div, draft_activation_words
from speq.hw.accelerator_config import TOKEN_BITS, AcceleratorConfig
from speq.hw.control.descriptor import SINGLE_TARGETS, Target, VectorOperation
from speq.model.arith import quantize_activations, to_float16
from speq.model.vector_ops import reciprocal, row_sum, rsqrt, sigmoid, softmax_weights

_BATCHED = (VectorOperation.SOFTMAX, VectorOperation.NORMALIZE)
#: Operations whose y is tiles of rows, and those of which it may be, or the same for all rows.
_GATES = (VectorOperation.GATE, VectorOperation.SIGMOID_GATE)
_BY_CHANNEL = (VectorOperation.ADD, VectorOperation.MULTIPLY)

#: A row of a pass: token, depth and the row that it follows.
PassRow = tuple[int, int, int]


@dataclass(frozen=True)
class Memory:
    """Memory as the accelerator's ports see it.

    Attributes
    ----------
    load : (address, size) -> uint8 [size]
        One transfer from memory.
    store : (address, values, transfer) -> None
        Transfers of `transfer` bytes each to memory, which follow each other.
    store_columns : (address, values, pitch) -> None
        Writes values, float16 [n, m], row i at ``address + i pitch``.
    """

    load: Callable[[int, int], np.ndarray]
    store: Callable[[int, np.ndarray, int], None]
    store_columns: Callable[[int, np.ndarray, int], None]


@dataclass(frozen=True)
class _Command:
    """A VECTOR descriptor, and the pass that it is part of."""

    operation: VectorOperation
    target: Target
    values: bool
    sharing: int
    k: int
    o: int
    argument: np.float32
    detail: int
    first: int
    second: int
    results: int
    outer: int
    inner: int
    rows: Sequence[PassRow]
    position: int
    source: int

    @property
    def elements(self) -> int:
        """Of a row of a segment."""
        if self.operation is VectorOperation.SOFTMAX:
            return self.position + len(self.rows)
        return self.k


class VectorModel:
    """What a vector unit does, at once.

    Parameters
    ----------
    config : AcceleratorConfig
    memory : Memory
    """

    def __init__(self, config: AcceleratorConfig, memory: Memory) -> None:
        self.config = config
        self._memory = memory
        # Of the sums of softmax weights, by query head and row of a batch.
        self._reciprocals = np.zeros((config.query_heads, config.engine.rows), np.float32)

    def carry_out(
        self, fields: dict[str, int], rows: Sequence[PassRow], position: int, source: int = 0
    ) -> None:
        """Carry out a VECTOR descriptor without faults, of these `fields`, for a pass of `rows`
        behind `position` KV entries, or one that moves entry `source` to `position`."""
        command = _Command(
            operation=VectorOperation(fields["operation"]),
            target=Target(fields["target"]),
            values=bool(fields["values"]),
            sharing=fields["sharing"],
            k=fields["k"],
            o=fields["o"],
            argument=_float32(fields["argument"]),
            detail=fields["extra"],
            first=fields["activations"],
            second=fields["plane"],
            results=fields["results"],
            outer=fields["residual"],
            inner=fields["groups"],
            rows=rows,
            position=position,
            source=source,
        )
        if command.operation is VectorOperation.QUANTIZE:
            self._quantize(command)
            return
        command = self._behind_tiles(command)
        if command.operation is VectorOperation.MOVE:
            self._move(command)
            return
        first, second = self._first(command), self._second(command)
        with np.errstate(all="ignore"):  # overflow and NaN are results like others
            for segment, x in enumerate(first):
                y = next(second) if second else None
                self._write(command, segment, self._compute(command, segment, x, y))

    def _behind_tiles(self, command: _Command) -> _Command:
        """With the addresses of what lies behind other tiles."""
        operation, target = command.operation, command.target
        tiled = target in (Target.TILES, *SINGLE_TARGETS)
        if not tiled or operation is VectorOperation.MOVE:
            return command
        before = 4 * command.sharing * len(command.rows) * self.config.engine.cols
        of_rows = operation in _GATES or (operation in _BY_CHANNEL and not command.values)
        return replace(
            command,
            first=command.first + (0 if operation is VectorOperation.EMBED else before),
            second=command.second + (before if of_rows else 0),
            results=command.results + (before if target is Target.TILES else 0),
        )

    def _segment_rows(self, command: _Command) -> list[int]:
        """The rows of each segment."""
        rows, most = len(command.rows), self.config.engine.rows
        if command.operation not in _BATCHED:
            return [rows] * command.o
        left = rows * command.sharing
        return [min(most, left - done) for done in range(0, left, most)]

    # Operands: for each segment float32 [rows, elements of its tiles].

    def _first(self, command: _Command) -> Iterator[np.ndarray]:
        if command.operation is not VectorOperation.EMBED:
            return self._tiles(command, command.first)
        rows = self._table(command, command.first, self._tokens(command), np.float16)
        return iter([rows] * command.o)

    def _second(self, command: _Command) -> Iterator[np.ndarray] | None:
        match command.operation:
            case VectorOperation.ADD | VectorOperation.MULTIPLY | VectorOperation.NORM:
                tiles = self._channels if command.values else self._tiles
                return tiles(command, command.second)
            case operation if operation in _GATES:
                return self._tiles(command, command.second)
            case VectorOperation.ROTATE:
                positions = [command.position + depth for _, depth, _ in command.rows]
                rows = self._table(command, command.second, positions, np.float32)
                return iter([rows] * command.o)
        return None

    def _tiles(self, command: _Command, address: int) -> Iterator[np.ndarray]:
        """From FP32 [segment][tile][row][column]."""
        cols = self.config.engine.cols
        tiles = ceil_div(command.elements, cols)
        for rows in self._segment_rows(command):
            size = 4 * tiles * rows * cols
            content = self._memory.load(address, size).view(np.float32)
            yield content.reshape(tiles, rows, cols).swapaxes(0, 1).reshape(rows, -1)
            address += size

    def _channels(self, command: _Command, address: int) -> Iterator[np.ndarray]:
        """From FP32 [segment][tile][column], the same for all rows."""
        cols = self.config.engine.cols
        size = 4 * ceil_div(command.elements, cols) * cols
        for _ in self._segment_rows(command):
            yield self._memory.load(address, size).view(np.float32)[None]
            address += size

    def _table(
        self, command: _Command, address: int, indices: Sequence[int], dtype: type[np.floating]
    ) -> np.ndarray:
        """These rows of a table, of a segment's tiles."""
        cols = self.config.engine.cols
        size = ceil_div(command.k, cols) * cols * np.dtype(dtype).itemsize
        content = [self._memory.load(address + i * command.detail, size) for i in indices]
        return np.stack(content).view(dtype).astype(np.float32)

    def _tokens(self, command: _Command) -> list[int]:
        if not command.values:
            return [token for token, _, _ in command.rows]
        address = command.second + 4 * command.position
        words = self._memory.load(address, 4 * len(command.rows)).view("<u4")
        return (words & (1 << TOKEN_BITS) - 1).tolist()

    # Results.

    def _compute(
        self, command: _Command, segment: int, x: np.ndarray, y: np.ndarray | None
    ) -> np.ndarray:
        """Results of a segment, float32 [rows, elements of its tiles]; there is a y where the
        operation has one."""
        argument = command.argument
        match command.operation, y:
            case VectorOperation.ROUND, None:
                return x
            case VectorOperation.EMBED, None:
                return argument * x
            case VectorOperation.SOFTMAX, None:
                return self._softmax(command, segment, x)
            case VectorOperation.NORMALIZE, None:
                return x * self._reciprocals[command.o + segment, : len(x), None]
            case VectorOperation.ADD, np.ndarray():
                return argument * x + y
            case VectorOperation.MULTIPLY, np.ndarray():
                return (x * y) * argument
            case VectorOperation.NORM, np.ndarray():
                mean = row_sum(x * x) * argument + _float32(command.detail)
                return (x * rsqrt(np.asarray(mean))[:, None]) * y
            case VectorOperation.GATE, np.ndarray():
                return (x * y) * sigmoid(x)
            case VectorOperation.SIGMOID_GATE, np.ndarray():
                return x * sigmoid(y)
            case VectorOperation.ROTATE, np.ndarray():
                a, b, cos, sin = x[:, ::2], x[:, 1::2], y[:, ::2], y[:, 1::2]
                return np.stack((a * cos - b * sin, b * cos + a * sin), axis=2).reshape(x.shape)
        raise ValueError(f"{command.operation} has no such operands")

    def _softmax(self, command: _Command, batch: int, x: np.ndarray) -> np.ndarray:
        """Weights of a batch's scores; keeps the reciprocals of their sums."""
        first = batch * self.config.engine.rows
        rows = (first + np.arange(len(x))) % len(command.rows)
        seen = np.zeros(x.shape, np.bool_)
        seen[:, : command.elements] = _attention_mask(command)[rows]
        scores, allowed = torch.from_numpy(x), torch.from_numpy(seen)
        weights, sums = softmax_weights(scores, allowed, float(command.argument))
        self._reciprocals[command.o + batch, : len(x)] = reciprocal(sums.numpy())
        return weights.to(torch.float32).numpy()

    def _write(self, command: _Command, segment: int, y: np.ndarray) -> None:
        """Write results of a segment to the target."""
        engine, word_bytes = self.config.engine, self.config.activation_bytes
        cols, rows, tokens = engine.cols, engine.rows, len(command.rows)
        address, outer, inner = command.results, command.outer, command.inner
        if command.target is Target.TILES:
            content = np.ascontiguousarray(_cut(y, cols))
            self._memory.store(address + segment * content.nbytes, content, content.nbytes)
            return
        half = to_float16(torch.from_numpy(y)).numpy()
        columns = half[:, : command.elements].T
        group, head = divmod(segment, max(1, command.sharing))
        match command.target:
            case Target.ACTIVATIONS:
                self._memory.store_columns(address, columns, word_bytes)
            case Target.DRAFT_ACTIVATIONS:
                self._store_draft_activations(address, half[:, : command.elements])
            case Target.WEIGHTS:
                beat = self.config.data.beat_bytes
                batch = ceil_div(command.elements * word_bytes, beat) * beat
                self._memory.store_columns(address + segment * batch, columns, word_bytes)
            case Target.VALUES:
                for i, tile in enumerate(_cut(half, cols)):
                    place = address + segment * outer + i * inner + 2 * cols * command.position
                    self._memory.store(place, tile, tile.nbytes)
            case Target.QUERIES:
                start = head * tokens
                for n, end in _runs(start, start + tokens, rows):
                    place = address + group * outer + n // rows * inner + 2 * (n % rows)
                    run = columns[:, n - start : end - start]
                    self._memory.store_columns(place, run, word_bytes)
            case Target.KEYS:
                start = command.position
                for p, end in _runs(start, start + tokens, cols):
                    place = address + segment * outer + p // cols * inner + 2 * (p % cols)
                    run = columns[:, p - start : end - start]
                    self._memory.store_columns(place, run, 2 * cols)
            case Target.CONTEXT:
                start = segment * rows
                for n, end in _runs(start, start + len(half), tokens):
                    place = address + n // tokens * outer + 2 * (n % tokens)
                    run = columns[:, n - start : end - start]
                    self._memory.store_columns(place, run, word_bytes)

    def _quantize(self, command: _Command) -> None:
        """Draft activations of the rows of the pass."""
        size = self.config.activation_bytes
        words = self._memory.load(command.first, command.k * size).view(np.float16)
        x = np.ascontiguousarray(words.reshape(command.k, -1)[:, : len(command.rows)].T)
        self._store_draft_activations(command.results, x)

    def _store_draft_activations(self, address: int, x: np.ndarray) -> None:
        """Quantise activations, float16 [rows, k], and write them."""
        activations = torch.from_numpy(np.ascontiguousarray(x))
        blocks = quantize_activations(activations, self.config.engine.format.group)
        content = draft_activation_words(blocks, self.config)
        self._memory.store(address, content, content.nbytes)

    def _move(self, command: _Command) -> None:
        """Copy a KV entry of all heads."""
        cols, memory = self.config.engine.cols, self._memory
        old, new = (divmod(entry, cols) for entry in (command.source, command.position))
        size = 2 * cols
        lines = memory.load(
            command.first + old[0] * command.inner, command.o * command.k * size
        ).view(np.float16)
        keys = lines.reshape(-1, cols)[:, old[1]].copy()
        place = command.first + new[0] * command.inner + 2 * new[1]
        memory.store_columns(place, keys[:, None], size)
        for tile in range(command.o * ceil_div(command.k, cols)):
            address = command.second + tile * command.outer
            values = memory.load(address + size * command.source, size).copy()
            memory.store(address + size * command.position, values, size)


def _float32(pattern: int) -> np.float32:
    return np.uint32(pattern).view(np.float32)


def _cut(y: np.ndarray, cols: int) -> np.ndarray:
    """[rows, elements of tiles] -> [tiles, rows, cols]."""
    return y.reshape(len(y), -1, cols).swapaxes(0, 1)


def _runs(start: int, stop: int, multiple: int) -> Iterator[tuple[int, int]]:
    """The numbers from start to stop - 1, cut at multiples: first and one behind the last."""
    while start < stop:
        end = min(stop, (start // multiple + 1) * multiple)
        yield start, end
        start = end


def _attention_mask(command: _Command) -> np.ndarray:
    """Which KV entries each row of the pass sees, bool [rows, entries]: its ancestors and itself,
    as far as the window reaches."""
    position, window = command.position, command.detail
    depths = np.array([depth for _, depth, _ in command.rows])
    places = np.concatenate((np.arange(position), position + depths))
    mask = np.zeros((len(depths), len(places)), np.bool_)
    mask[:, :position] = True
    for row, (_, _, parent) in enumerate(command.rows):
        if row:
            mask[row] = mask[parent]
        mask[row, position + row] = True
    if window:
        mask &= (position + depths)[:, None] - places < window
    return mask
