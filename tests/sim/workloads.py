# SPDX-License-Identifier: Apache-2.0
"""Programs with random operands, for tests of the whole accelerator on any board.

A `Workload` collects descriptors and the memory that they use; `run` runs it on a board, pass by
pass or wait by wait, so that two boards can be compared wherever the accelerator stands still.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch

from speq.host.accelerator_model import AcceleratorModel
from speq.host.board import Board
from speq.host.layout import (
    Region,
    ceil_div,
    draft_activation_words,
    ranking_bytes,
    round_up,
    tiled,
    weight_planes,
)
from speq.host.registers import Registers
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
from speq.hw.control.register_map import ANSWERS, STATES
from speq.hw.engine_config import DRAFT_LANES, Mode
from speq.model.arith import quantize_activations
from speq.model.format import encode
from speq.model.number_format import draft_words, residual_words

#: Bytes of the memory.
SIZE = 1 << 20
#: Where the memory begins, unless a workload says otherwise: no address is below 2^32.
BASE = 0x12_3450_0000
#: What may be read and what may be written, from BASE on. All around is guarded.
READ = Region(0x2000, 0xF8000)
WRITE = Region(0xC0000, 0xF8000)
#: Cycles within which the accelerator must be waiting or done.
LIMIT = 200_000

# Operands and results are placed from the start of their region up to these, so that tests can
# place others behind them.
_OPERANDS_STOP = 0x88000
_RESULTS_STOP = 0xE0000
_ADDRESS_FIELDS = ("plane", "residual", "groups", "activations", "results")
_VECTOR_ADDRESSES = ("first", "second", "results", "outer", "inner")
#: Tokens that there is a row of an embedding for.
EMBEDDED = 8
#: Entries that a run of `decoding` adds to the KV cache at most.
_ADDED = 40
#: Operations whose second operand has a row for each of the first, unless `values` is set.
_BINARY = (
    VectorOperation.ADD,
    VectorOperation.MULTIPLY,
    VectorOperation.NORM,
    VectorOperation.GATE,
    VectorOperation.SIGMOID_GATE,
)
_SPECIAL = np.array([0x7C00, 0xFC00, 0x7E00, 0xFDFF, 0x0001, 0x83FF, 0x8000, 0x7BFF], np.uint16)
_STATE_NAMES = {value: name for name, (value, _) in STATES.items()}


class RunStatus(NamedTuple):
    """How a run stands when it waits for the host or has ended.

    `argument` is that of the HOST descriptor, 0 in other states.
    """

    state: str
    error: ErrorCode
    address: int
    argument: int


class Patch(NamedTuple):
    """Bytes that the host writes before it answers."""

    address: int
    content: np.ndarray


@dataclass
class Workload:
    """A program, its operands, and the registers to run it.

    Parameters
    ----------
    config : AcceleratorConfig
    random : numpy Generator
        Of operands and places.
    rows : int
        Of the pass.
    position : int
        KV entries before it.
    base : int
        Address of the memory's first byte.
    special : bool
        Infinities and NaNs may be among the operands.
    steps : bool
        The program is that of passes of several numbers of rows.

    Attributes
    ----------
    content : uint8 [SIZE]
        The memory at the start: random, but for operands and the program.
    descriptors : list of Descriptor
    patches : dict of lists of Patch
        What the host writes at the HOST descriptor with this index.
    places : dict of functions
        Where a buffer shall be: by field of a descriptor, from its size and the bytes of a beat.
        Buffers of other fields are at random places.
    registers : dict
        Values of registers that shall differ from the usual ones.
    costs : dict of lists
        Tables of costs, by register.
    history : list of int, optional
        Tokens that are committed before the run; those of before when not given.
    stop_tokens : list of int
    answers : dict
        The host's answer at the HOST descriptor with this index, if it is not CONTINUE.
    """

    config: AcceleratorConfig
    random: np.random.Generator
    rows: int = 1
    position: int = 0
    base: int = BASE
    special: bool = False
    steps: bool = False
    descriptors: list[Descriptor] = field(default_factory=list)
    patches: dict[int, list[Patch]] = field(default_factory=dict)
    places: dict[str, Callable[[int, int], int]] = field(default_factory=dict)
    registers: dict[str, int] = field(default_factory=dict)
    costs: dict[str, list[int]] = field(default_factory=dict)
    history: list[int] | None = None
    stop_tokens: list[int] = field(default_factory=list)
    answers: dict[int, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.content = self.random.integers(0, 256, SIZE, np.uint8)
        self._operands_end = self.base + READ.start
        self._results_end = self.base + WRITE.start
        self._written: list[tuple[int, int]] = []  # address and bytes of results
        self._own_activations: dict[int, tuple[int, int]] = {}  # by index of the descriptor
        self.program = self._buffer("program", 64 * DESCRIPTOR_BYTES, self.config.alignment)

    # Places.

    def _buffer(self, name: str, size: int, multiple: int) -> int:
        """The address of an operand of so many bytes."""
        if name in self.places:
            return self.places[name](size, multiple)
        gap = int(self.random.integers(0, 4)) * multiple
        address = round_up(self._operands_end + gap, multiple)
        self._operands_end = address + size
        assert self._operands_end <= self.base + _OPERANDS_STOP, "the operands do not fit"
        return address

    def _result(self, name: str, size: int) -> int:
        """The address of a result of so many bytes."""
        multiple = self.config.data.beat_bytes
        if name in self.places:
            return self.places[name](size, multiple)
        gap = int(self.random.integers(0, 4)) * multiple
        address = round_up(self._results_end + gap, multiple)
        self._results_end = address + size
        assert self._results_end <= self.base + _RESULTS_STOP, "the results do not fit"
        return address

    def _product_results(self, size: int, half: bool) -> int:
        """The address of a product's results, which may be operands later on."""
        address = self._result("results", size)
        # Halves of FP32 numbers may be any FP16 patterns.
        if half or self.special:
            self._written.append((address, size))
        return address

    def put(self, address: int, values: np.ndarray) -> None:
        """Write the bytes of `values` into the memory at the start; those outside are dropped."""
        content = np.ascontiguousarray(values).reshape(-1).view(np.uint8)
        first = address - self.base
        content = content[max(0, -first) : max(0, SIZE - first)]
        self.content[max(0, first) :][: content.size] = content

    # Operands.

    def patterns(self, *shape: int) -> np.ndarray:
        """FP16 bit patterns, of one of several kinds: any bits, sane numbers, sane ones with a few
        special ones, small integers (for equal results)."""
        values = self._any_patterns(*shape)
        if not self.special:
            values[values & 0x7C00 == 0x7C00] &= 0xBFFF
        return values

    def _any_patterns(self, *shape: int) -> np.ndarray:
        random = self.random
        match random.choice(["bits", "sane", "special", "integers"], p=[0.15, 0.45, 0.15, 0.25]):
            case "bits":
                return random.integers(0, 1 << 16, shape, np.uint16)
            case "integers":
                return random.integers(-1, 2, shape).astype(np.float16).view(np.uint16)
            case style:
                scale = 2.0 ** random.integers(-12, 6)
                values = (random.standard_normal(shape) * scale).astype(np.float16).view(np.uint16)
                if style == "special":
                    chosen = random.random(shape) < 2 / max(shape)
                    values[chosen] = random.choice(_SPECIAL, int(chosen.sum()))
                return values

    def _weights(self, mode: Mode, k: int, o: int) -> dict[str, int]:
        """Addresses of new weights [o, k]."""
        config, cols = self.config, self.config.engine.cols
        beat, number_format = config.weights.beat_bytes, config.engine.format
        tiles = ceil_div(o, cols)
        if mode is Mode.BYPASS:
            address = self._buffer("plane", tiles * k * cols * 2, beat)
            self.put(address, tiled(self.patterns(o, k), cols))
            return {"plane": address}
        sizes = (draft_words(k), residual_words(k))
        group_size = round_up(ceil_div(k, number_format.group) * cols, config.data.beat_bytes)
        names = {
            "plane": (tiles * sizes[0] * cols * 2, beat),
            "residual": (tiles * sizes[1] * cols * 2, beat),
            "groups": (tiles * group_size, config.data.beat_bytes),
        }
        addresses = {name: self._buffer(name, *place) for name, place in names.items()}
        if not self.special or self.random.random() < 0.85:  # else the random bytes that are there
            values = torch.from_numpy(self.patterns(o, k).view(np.float16))
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # infinities and NaNs are meant
                tensor = encode(values, number_format, name="weights")
            for address, plane in zip(
                addresses.values(), weight_planes(tensor, config), strict=True
            ):
                self.put(address, plane)
        if mode is Mode.DRAFT:
            del addresses["residual"]
        return addresses

    def _activations(self, mode: Mode, k: int, tokens: int) -> int:
        """Address of new activations [tokens, k], in batches of at most R tokens."""
        config, rows = self.config, self.config.engine.rows
        size = config.activation_bytes
        words = ceil_div(k, DRAFT_LANES) if mode is Mode.DRAFT else k
        batch = round_up(words * size, config.data.beat_bytes)
        address = self._buffer(
            "activations", ceil_div(tokens, rows) * batch, config.data.beat_bytes
        )
        self._own_activations[len(self.descriptors)] = (address, words * size)
        if mode is Mode.DRAFT:
            values = torch.from_numpy(self.patterns(tokens, k).view(np.float16))
            x = quantize_activations(values, config.engine.format.group)
            self.put(address, draft_activation_words(x, config)[:words])
            return address
        for first in range(0, tokens, rows):
            # What other rows than these have must not matter.
            content = self.random.integers(0, 1 << 16, (k, size // 2), np.uint16)
            count = min(rows, tokens - first)
            content[:, :count] = self.patterns(count, k).T
            self.put(address + first // rows * batch, content)
        return address

    # Descriptors.

    def add(self, kind: DescriptorKind, **values: object) -> Descriptor:
        """Append a descriptor with the given fields; with lanes products and VECTORs may be behind
        some of the other class."""
        waits = (DescriptorKind.GEMM, DescriptorKind.ATTENTION, DescriptorKind.VECTOR)
        if self.config.lanes and kind in waits and "behind" not in values:
            values["behind"] = int(self.random.choice((0, 0, 1, 2, 3)))
        self.descriptors.append(Descriptor(kind, **values))
        return self.descriptors[-1]

    def add_product(
        self,
        kind: DescriptorKind,
        mode: Mode,
        k: int,
        o: int,
        tokens: int = 0,
        *,
        half: bool = False,
        wait: bool = False,
        ranking: bool = False,
        discard: bool = False,
        chained: bool = False,
    ) -> Descriptor:
        """Append a GEMM or an ARGMAX with new operands.

        With `ranking` it is written, with `chained` earlier results are the activations, if there
        are as many.
        """
        engine = self.config.engine
        actual = tokens or self.rows
        earlier = self._earlier_results(k) if chained and mode is not Mode.DRAFT else None
        operands = self._weights(mode, k, o)
        if earlier is None:
            operands["activations"] = self._activations(mode, k, actual)
        else:
            # That of a product or of vector work.
            operands["activations"], wait = earlier, True
            operands["behind"] = int(bool(self.config.lanes))
        if discard:
            results = self.base  # which must not be written
        else:
            size = ceil_div(o, engine.cols) * engine.cols * actual * (2 if half else 4)
            results = self._product_results(size, half)
        place = self._result("ranking", ranking_bytes(self.config) * actual) if ranking else 0
        tile = 0
        if kind is DescriptorKind.GEMM:
            tile, results = self._tiles_before(actual * engine.cols * (2 if half else 4), results)
        return self.add(
            kind,
            mode=mode,
            k=k,
            o=o,
            tokens=tokens,
            half=half,
            wait=wait,
            discard=discard,
            tile=tile,
            results=results,
            ranking=place,
            **operands,
        )

    def _tiles_before(self, size: int, *places: int) -> tuple[int, ...]:
        """A number of tiles of `size` bytes, often 0, and the addresses that are so far before
        these; 0 if passes of other rows, whose tiles have other sizes, follow."""
        most = 0 if self.steps else min(255, (min(places) - self.base) // size)
        tile = int(self.random.integers(0, most + 1)) if self.random.random() < 0.3 else 0
        return tile, *(place - tile * size for place in places)

    def add_rerank(self, o: int, k: int, candidates: int, *, ranking: bool = False) -> Descriptor:
        """Append a RERANK with new operands, for a ranking of `o` outputs."""
        return self.add(
            DescriptorKind.RERANK,
            k=k,
            candidates=candidates,
            activations=self._activations(Mode.VERIFY, k, 1),
            ranking=self._result("ranking", ranking_bytes(self.config)) if ranking else 0,
            **self._weights(Mode.VERIFY, k, o),
        )

    def _earlier_results(self, k: int) -> int | None:
        needed = round_up(k * self.config.activation_bytes, self.config.data.beat_bytes)
        fitting = [address for address, size in self._written if size >= needed]
        return int(self.random.choice(fitting)) if fitting else None

    def add_attention(
        self,
        size: int,
        sharing: int,
        *,
        values: bool = False,
        half: bool = False,
        wait: bool = False,
        gap: int | None = None,
    ) -> Descriptor:
        """Append an ATTENTION of a head of `size` dimensions with new operands; `gap` beats lie
        between tiles (None: the tiles follow each other, by a stride of 0)."""
        config, cols = self.config, self.config.engine.cols
        entries = self.position + self.rows
        k, o = (entries, size) if values else (size, entries)
        tiles, tile = ceil_div(o, cols), k * cols * 2
        stride = tile + (gap or 0) * config.weights.beat_bytes
        plane = self._buffer("plane", (tiles - 1) * stride + tile, config.weights.beat_bytes)
        for i, words in enumerate(tiled(self.patterns(o, k), cols)):
            self.put(plane + i * stride, words)
        all_rows = self.rows * sharing
        return self.add(
            DescriptorKind.ATTENTION,
            values=values,
            half=half,
            wait=wait,
            sharing=sharing,
            k=0 if values else k,
            o=o if values else 0,
            plane=plane,
            activations=self._activations(Mode.BYPASS, k, all_rows),
            results=self._product_results(tiles * cols * all_rows * (2 if half else 4), half),
            stride=0 if gap is None else stride,
        )

    # Vector work.

    def numbers(self, *shape: int) -> np.ndarray:
        """Finite FP32 numbers, of one of several kinds: of one magnitude, of many, small
        integers."""
        random = self.random
        match random.choice(["sane", "wide", "integers"]):
            case "integers":
                return random.integers(-2, 3, shape).astype(np.float32)
            case style:
                exponents = random.integers(-20, 12, shape if style == "wide" else ())
                return np.ldexp(random.standard_normal(shape), exponents).astype(np.float32)

    def _put_tiles(self, name: str, segments: list[int], k: int, *, padded: bool = False) -> int:
        """The address of a new operand [segment][tile][row][column] of segments with so many rows;
        `padded` with zeros behind its k elements."""
        cols = self.config.engine.cols
        tiles = ceil_div(k, cols)
        address = self._buffer(name, sum(segments) * tiles * cols * 4, self.config.data.beat_bytes)
        place = address
        for rows in segments:
            x = self.numbers(rows, tiles * cols)
            if padded:
                x[:, k:] = 0
            self.put(place, x.reshape(rows, tiles, cols).swapaxes(0, 1))
            place += x.nbytes
        if name == "first":
            self._own_activations[len(self.descriptors)] = (address, place - address)
        return address

    def _put_table(self, rows: int, k: int, *, half: bool) -> tuple[int, int]:
        """Address and distance of the rows of a new table."""
        config, size = self.config, 2 if half else 4
        beat = config.data.beat_bytes
        width = ceil_div(k, config.engine.cols) * config.engine.cols
        stride = width * size + int(self.random.integers(0, 3)) * beat
        address = self._buffer("second" if not half else "first", rows * stride, beat)
        for row in range(rows):
            x = self.patterns(width) if half else self.numbers(width)
            self.put(address + row * stride, x)
        return address, stride

    def _put_tokens(self, tokens: int) -> int:
        """The address of a new text up to the pass's last row, of tokens below `tokens`; of each
        number the lowest 24 bits count."""
        beat, count = self.config.data.beat_bytes, self.position + self.rows
        address = self._buffer("second", round_up(4 * count, beat), beat)
        text = self.random.integers(0, 256, count, np.uint32) << 24
        text |= self.random.integers(0, tokens, count, np.uint32)
        self.put(address, text)
        return address

    def add_vector(
        self,
        operation: VectorOperation,
        target: Target,
        k: int,
        segments: int = 1,
        sharing: int = 1,
        *,
        values: bool = False,
        wait: bool = False,
        window: int = 0,
        slot: int = 0,
        text: bool = True,
    ) -> Descriptor:
        """Append a VECTOR with new operands.

        Of SOFTMAX and NORMALIZE `segments` follow from `sharing` and the rows of the pass, and
        `slot` is the number of the first query head. EMBED takes the tokens of a new text, or those
        of the pass.
        """
        batches = [
            min(self.config.engine.rows, self.rows * sharing - done)
            for done in range(0, self.rows * sharing, self.config.engine.rows)
        ]
        rows = [self.rows] * segments
        o, first, second, detail = segments, 0, 0, window
        argument = self.numbers(1)
        match operation:
            case VectorOperation.EMBED:
                first, detail = self._put_table(EMBEDDED, k, half=True)
                second, values = self._put_tokens(EMBEDDED) if text else 0, text
            case VectorOperation.ROTATE:
                second, detail = self._put_table(self.position + self.rows, k, half=False)
            case VectorOperation.NORM:
                argument, values = np.array([1 / k], np.float32), True
                eps = self.random.choice(np.array([1e-5, 1e-6, 0], np.float32))
                detail = int(eps.view(np.uint32))
            case VectorOperation.SOFTMAX:
                rows, o, k = batches, slot, self.position + self.rows
                argument = np.ldexp(np.float32(1), self.random.integers(-4, 2, 1))
            case VectorOperation.NORMALIZE:
                rows, o = batches, slot
        if operation is VectorOperation.QUANTIZE:
            first = self._activations(Mode.VERIFY, k, self.config.engine.rows)
        elif operation is not VectorOperation.EMBED:
            first = self._put_tiles("first", rows, k, padded=operation is VectorOperation.NORM)
        if operation in _BINARY:
            second = self._put_tiles("second", [1] * segments if values else rows, k)
        places = self._vector_results(operation, target, k, rows, sharing)
        others = (VectorOperation.EMBED, VectorOperation.QUANTIZE)
        if target in (Target.TILES, *SINGLE_TARGETS) and operation not in others:
            size = self.rows * self.config.engine.cols * 4
            moved = [first]
            if operation in _BINARY and not values:
                moved.append(second)
            if target is Target.TILES:
                moved.append(places["results"])
            sharing, first, *moved = self._tiles_before(size, *moved)
            if target is Target.TILES:
                places["results"] = moved.pop()
            if moved:
                second = moved.pop()
        elif operation is VectorOperation.EMBED:
            sharing, places["results"] = self._tiles_before(
                self.rows * self.config.engine.cols * 4, places["results"]
            )
        return self.add(
            DescriptorKind.VECTOR,
            operation=operation,
            target=target,
            values=values,
            wait=wait,
            sharing=sharing,
            k=0 if operation is VectorOperation.SOFTMAX else k,
            o=o,
            argument=int(argument.astype(np.float32).view(np.uint32)[0]),
            detail=detail,
            first=first,
            second=second,
            **places,
        )

    def _vector_results(
        self,
        operation: VectorOperation,
        target: Target,
        k: int,
        rows: list[int],
        sharing: int,
    ) -> dict[str, int]:
        """Where the results of a VECTOR go, and the distances of its target."""
        config, cols = self.config, self.config.engine.cols
        word, beat = config.activation_bytes, config.data.beat_bytes
        tiles, words, entries = ceil_div(k, cols), k * word, self.position + self.rows
        segments = len(rows)
        groups = ceil_div(segments, sharing)

        def distance(size: int, multiple: int) -> int:
            return round_up(size, multiple) + int(self.random.integers(0, 3)) * multiple

        outer = inner = 0
        match target:
            case Target.TILES if operation is not VectorOperation.QUANTIZE:
                size = sum(rows) * tiles * cols * 4
            case Target.TILES | Target.DRAFT_ACTIVATIONS:
                size = ceil_div(k, DRAFT_LANES) * word
            case Target.ACTIVATIONS:
                size = words
            case Target.QUERIES:
                inner = distance(words, word)
                outer = distance(ceil_div(self.rows * sharing, config.engine.rows) * inner, word)
                size = groups * outer
            case Target.KEYS:
                inner = distance(2 * cols * k, word)
                outer = distance(ceil_div(entries, cols) * inner, word)
                size = segments * outer
            case Target.VALUES:
                inner = distance(2 * cols * entries, max(word, beat))
                outer = distance(tiles * inner, max(word, beat))
                size = segments * outer
            case Target.WEIGHTS:
                inner = distance(words, word)  # has no effect
                size = segments * round_up(words, beat)
            case Target.CONTEXT:
                outer = distance(words, word)
                size = sharing * outer
        size = round_up(size, beat)
        address = self._result("results", size)
        if target is Target.ACTIVATIONS:
            self._written.append((address, size))
        return {"results": address, "outer": outer, "inner": inner}

    def add_random_vector(self, operation: VectorOperation | None = None) -> Descriptor:
        """Append any VECTOR, and behind a SOFTMAX perhaps a NORMALIZE; the last of them."""
        random, config = self.random, self.config
        engine = config.engine
        if operation is None:
            others = (VectorOperation.NORMALIZE, VectorOperation.MOVE)
            known = [each for each in TARGETS if each not in others]
            operation = known[random.integers(len(known))]
        if operation is VectorOperation.QUANTIZE and self.rows > engine.draft_rows:
            operation = VectorOperation.ROUND
        targets = TARGETS[operation]
        if self.rows > engine.draft_rows:
            targets = tuple(each for each in targets if each is not Target.DRAFT_ACTIVATIONS)
        target = targets[random.integers(len(targets))]
        sharing = int(random.integers(1, min(5, config.query_heads)))
        wait = random.random() < 0.4
        limit = min(engine.max_k, 40 if operation is VectorOperation.ROTATE else 200)
        k = self._size(limit, engine.cols)
        if operation is VectorOperation.ROTATE:
            k += k % 2
        if operation is not VectorOperation.SOFTMAX:
            is_one = operation is VectorOperation.QUANTIZE or target in SINGLE_TARGETS
            segments = 1 if is_one or random.random() < 0.3 else int(random.integers(1, 5))
            values = bool(random.integers(2))
            return self.add_vector(
                operation, target, k, segments, sharing, values=values, wait=wait
            )
        slot = int(random.integers(0, config.query_heads - sharing + 1))
        window = int(random.integers(1, self.position + self.rows + 3))
        last = self.add_vector(
            operation,
            target,
            k,
            sharing=sharing,
            wait=wait,
            window=int(random.choice([0, window])),
            slot=slot,
        )
        if random.random() < 0.6:
            last = self.add_vector(
                VectorOperation.NORMALIZE,
                Target.CONTEXT,
                k,
                sharing=sharing,
                wait=random.random() < 0.4,
                slot=slot,
            )
        return last

    def add_random(self) -> Descriptor:
        """Append any descriptor that the accelerator can carry out, and behind an ARGMAX perhaps a
        RERANK; the last of them."""
        random, engine = self.random, self.config.engine
        if self.config.lanes and random.random() < 0.6:
            return self.add_random_vector()
        kind = random.choice(["gemm", "argmax", "attention", "host"], p=[0.5, 0.2, 0.2, 0.1])
        half, wait = (bool(random.integers(2)), random.random() < 0.3)
        if kind == "host":
            return self.add(DescriptorKind.HOST, argument=int(random.integers(1 << 32)))
        if kind == "attention":
            values = bool(random.integers(2))
            limit = engine.max_o if values else engine.max_k
            return self.add_attention(
                self._size(limit, engine.cols),
                int(random.integers(1, 6)),
                values=values,
                half=half,
                wait=wait,
                gap=random.choice(np.array([None, 0, int(random.integers(1, 40))])),
            )
        mode = Mode(int(random.integers(3)))
        most = engine.draft_rows if mode is Mode.DRAFT else engine.rows
        tokens = int(random.integers(1, most + 1))
        if self.rows <= most and random.random() < 0.5:
            tokens = 0
        is_argmax = kind == "argmax"
        product = self.add_product(
            DescriptorKind.ARGMAX if is_argmax else DescriptorKind.GEMM,
            mode,
            self._size(engine.max_k, engine.format.group),
            self._size(engine.max_o, engine.cols),
            tokens,
            half=half and not is_argmax,
            wait=wait,
            ranking=is_argmax and random.random() < 0.7,
            discard=is_argmax and random.random() < 0.4,
            chained=random.random() < 0.4,
        )
        if not is_argmax or random.random() < 0.5:
            return product
        return self.add_rerank(
            product.o,
            self._size(engine.max_k, engine.format.group),
            int(random.integers(1, self.config.choices + 1)),
            ranking=random.random() < 0.7,
        )

    def _size(self, limit: int, multiple: int) -> int:
        """A size, often small or near a multiple."""
        random = self.random
        size = random.choice(
            np.array(
                [
                    random.integers(1, 9),
                    random.integers(1, 4) * multiple + random.integers(-1, 2),
                    random.integers(1, 140),
                    limit if limit < 140 else 1,
                ]
            ),
            p=[0.35, 0.3, 0.3, 0.05],
        )
        return int(min(size, limit, 200))

    def end(self) -> Workload:
        """Append END; the program is complete and in memory."""
        self.add(DescriptorKind.END)
        self.write_program()
        return self

    def write_program(self) -> None:
        """Put the descriptors into memory."""
        packed = b"".join(descriptor.pack() for descriptor in self.descriptors)
        self.put(self.program, np.frombuffer(packed, np.uint8))

    def delay_operands(self) -> None:
        """Let the host provide some activations at HOST descriptors: until then there are other
        bytes, which the accelerator must not have read by then."""
        hosts = [i for i, d in enumerate(self.descriptors) if d.kind is DescriptorKind.HOST]
        for index, (address, size) in self._own_activations.items():
            earlier = [i for i in hosts if i < index]
            if earlier and self.random.random() < 0.7:
                place = slice(address - self.base, address - self.base + size)
                patch = Patch(address, self.content[place].copy())
                self.patches.setdefault(earlier[-1], []).append(patch)
                self.content[place] = self.random.integers(0, 256, size, np.uint8)

    def all_registers(self) -> dict[str, int]:
        """Values to write before the run."""
        return {
            "IRQ_ENABLE": 7,
            "READ_BASE": self.base + READ.start,
            "READ_LIMIT": self.base + READ.stop - 1,
            "WRITE_BASE": self.base + WRITE.start,
            "WRITE_LIMIT": self.base + WRITE.stop - 1,
            "PASS_PROGRAM": self.program,
            "PROGRAM_LENGTH": len(self.descriptors),
            "HOST_TIMEOUT": 0,
            "RUN": 0,
            "PASS_ROWS": self.rows,
            "POSITION": self.position,
            "ROOT": 0,
        } | self.registers

    def __str__(self) -> str:
        """The program, for the report of a mismatch."""
        lines = [f"{self.rows} rows at position {self.position}, program at {self.program:#x}"]
        for i, d in enumerate(self.descriptors):
            if d.kind is DescriptorKind.VECTOR:
                lines.append(f"{i}: {_vector_line(d)}")
                continue
            words = [f"{i}: {d.kind.name} {d.mode.name} tokens={d.tokens} k={d.k} o={d.o}"]
            names = ("half", "wait", "discard", "values", "sharing", "candidates")
            words += [f"{name}={int(getattr(d, name))}" for name in names if getattr(d, name)]
            names = (*_ADDRESS_FIELDS, "ranking", "stride", "argument")
            words += [f"{name}={getattr(d, name):#x}" for name in names if getattr(d, name)]
            lines.append(" ".join(words))
        return "\n".join(lines)


def _vector_line(d: Descriptor) -> str:
    """A VECTOR, for the report of a mismatch."""
    words = [f"VECTOR {VectorOperation(d.operation).name} to {Target(d.target).name}"]
    names = ("k", "o", "wait", "values", "sharing")
    words += [f"{name}={int(getattr(d, name))}" for name in names]
    names = (*_VECTOR_ADDRESSES, "argument", "detail")
    words += [f"{name}={getattr(d, name):#x}" for name in names if getattr(d, name)]
    return " ".join(words)


def random_workload(
    config: AcceleratorConfig, random: np.random.Generator, *, special: bool = False
) -> Workload:
    """A program of 1 to 8 random descriptors before its END. Unless `special`, all results are
    finite."""
    while True:
        workload = _random_workload(config, random, special)
        if special:
            return workload
        *_, last = run(AcceleratorModel(config, SIZE, BASE), workload)
        if last.error is not ErrorCode.NONFINITE:
            return workload


def decoding(config: AcceleratorConfig, random: np.random.Generator) -> Workload:
    """Draft and verify programs of one ARGMAX each, with few tokens, so that some are accepted; in
    the draft program a RERANK may follow. Before the steps there may be single passes of a GEMM.
    With a vector unit all have work for it as well, on the rows of each pass."""
    engine = config.engine
    position = int(random.integers(0, 20))
    workload = Workload(config, random, rows=engine.rows, position=position, steps=True)
    o = int(random.integers(2, 7))
    workload.add_product(DescriptorKind.GEMM, Mode.VERIFY, int(random.integers(1, 30)), o)
    if config.lanes:
        _add_work_on_rows(workload, text=True)
    workload.add(DescriptorKind.END)
    starts = []
    for mode in (Mode.DRAFT, Mode.VERIFY):
        workload.rows = 1 if mode is Mode.DRAFT else engine.rows
        starts.append(len(workload.descriptors))
        if config.lanes:
            _add_work_on_rows(workload, text=False)
        workload.add_product(DescriptorKind.ARGMAX, mode, int(random.integers(1, 30)), o)
        if mode is Mode.DRAFT and random.integers(2):
            candidates = int(random.integers(1, config.choices + 1))
            workload.add_rerank(o, int(random.integers(1, 30)), candidates)
        workload.add(DescriptorKind.END)
    workload.write_program()
    log2 = int(random.integers(1, 5))
    thresholds = np.array([0, 1, 4, np.inf], np.float32)
    workload.registers = {
        "RUN": int(random.choice([1, 9])),
        "PROGRAM_LENGTH": 8,
        "DRAFT_PROGRAM": workload.program + starts[0] * DESCRIPTOR_BYTES,
        "VERIFY_PROGRAM": workload.program + starts[1] * DESCRIPTOR_BYTES,
        "ROOT": int(random.integers(o)),
        "PROMPT_END": workload.position + int(random.choice([0, 0, 1, 2 * engine.rows + 1])),
        "DRAFT_LENGTH": int(random.integers(engine.rows)),
        "THRESHOLD": int(random.choice(thresholds).view(np.uint32)),
        "CHOICES": int(random.integers(1, config.choices + 1)),
        "COST_LIMIT": int(random.choice([0, 60, 65535])),
        "GUESS_LIMIT": int(random.choice([0, 20, 255])),
        "TOKEN_LIMIT": int(random.integers(1, 8)),
        "RING": workload._result("ring", 4 << log2),
        "RING_LOG2": log2,
        "MEMORY_TIMEOUT": int(random.choice([0, 1000])),
    }
    tables = {"CHAIN_COSTS": 16, "ALTERNATE_COSTS": 16, "GUESS_COSTS": 4}
    workload.costs = {name: random.integers(0, 40, n).tolist() for name, n in tables.items()}
    workload.history = random.integers(0, o, random.integers(0, 30)).tolist()
    workload.stop_tokens = random.integers(0, o, random.choice([0, 0, 0, 0, 1])).tolist()
    _add_sampling(workload)
    return workload


def _add_sampling(workload: Workload) -> None:
    """Half of all workloads sample, and half of these truncate; none that ranks more rows than the
    pass has, as these have no position."""
    random, rows = workload.random, workload.rows
    ranked = (d.tokens for d in workload.descriptors if d.kind is DescriptorKind.ARGMAX)
    if random.integers(2) or any(tokens > rows for tokens in ranked):
        return
    run = workload.registers.get("RUN", 0) | 2 | 4 * int(random.integers(2))
    scale, cutoff = np.array([random.choice([0.5, 1, 3]), random.choice([0, -1, -9])], np.float32)
    workload.registers |= {
        "RUN": run,
        "SCALE": int(scale.view(np.uint32)),
        "CUTOFF": int(cutoff.view(np.uint32)),
        "SEED": int(random.integers(2**63)),
    }


def _add_work_on_rows(workload: Workload, text: bool) -> None:
    """Vector work that depends on the rows of the pass, their tokens and depths and what they
    follow, with room for the positions that a run moves on to."""
    random, cols = workload.random, workload.config.engine.cols
    position = workload.position
    workload.position += _ADDED
    k, heads = cols + 2, {"sharing": 3, "slot": 1}
    workload.add_vector(VectorOperation.EMBED, Target.TILES, k, text=text)
    workload.add_vector(VectorOperation.ROTATE, Target.KEYS, k, 2)
    workload.add_vector(VectorOperation.ROUND, Target.VALUES, k, 2)
    workload.add_vector(
        VectorOperation.SOFTMAX, Target.WEIGHTS, 0, window=int(random.choice([0, 2, 7])), **heads
    )
    workload.add_vector(VectorOperation.NORMALIZE, Target.CONTEXT, k, **heads)
    workload.position = position


def moving(
    config: AcceleratorConfig, random: np.random.Generator, bad: int | None = None
) -> tuple[Workload, Descriptor]:
    """A workload that decodes in steps and moves entries of one block, and the descriptor that does
    it, of a head that does not fill its tiles. The byte `bad` is in an entry of the first step, of
    its keys or of its values, if it is given."""
    engine = config.engine
    workload = decoding(config, random)
    heads, head, tiles = 2, engine.cols + 2, 64 // engine.cols
    key_tile = heads * head * engine.cols * 2
    value_tile = tiles * engine.cols * engine.cols * 2
    if bad is not None:
        entry = workload.position + int(random.integers(engine.rows))
        name = str(random.choice(["keys", "values"]))
        line = int(random.integers(heads * head)) * 2 * engine.cols
        block = int(random.integers(2 * heads)) * value_tile
        offset = {
            "keys": entry // engine.cols * key_tile + line,
            "values": block + entry * 2 * engine.cols,
        }[name]
        workload.places[name] = lambda _, beat: bad - bad % beat - offset
    move = workload.add(
        DescriptorKind.VECTOR,
        operation=VectorOperation.MOVE,
        k=head,
        o=heads,
        first=workload._result("keys", tiles * key_tile),
        second=workload._result("values", 2 * heads * value_tile),
        inner=key_tile,
        outer=value_tile,
    )
    program = workload.program + (len(workload.descriptors) - 1) * DESCRIPTOR_BYTES
    workload.end()
    workload.registers |= {
        "RUN": 1 | 8 | 16,
        "MOVE_PROGRAM": program,
        "PROMPT_END": 0,
        "DRAFT_LENGTH": max(1, engine.rows // 2 - 1),
        "CHOICES": 3,
    }
    return workload, move


def _random_workload(
    config: AcceleratorConfig, random: np.random.Generator, special: bool
) -> Workload:
    rows = int(random.integers(1, config.engine.rows + 1))
    position = int(
        random.integers(0, min(90, config.engine.max_k - rows, config.engine.max_o - rows))
    )
    workload = Workload(config, random, rows, position, special=special)
    for _ in range(random.integers(1, 9)):
        workload.add_random()
    _add_sampling(workload)
    workload.end()
    workload.delay_operands()
    return workload


def run_status(registers: Registers) -> RunStatus:
    """How a run stands."""
    state = _STATE_NAMES[registers["STATUS"]]
    error = ErrorCode(registers["ERROR"])
    argument = registers["HOST_ARGUMENT"] if state == "HOST" else 0
    return RunStatus(state, error, registers["ERROR_ADDRESS"], argument)


def begin(board: Board, workload: Workload) -> Registers:
    """Write memory and registers and start the run."""
    board.write(workload.base, workload.content)
    registers = Registers(board, workload.config)
    registers["IRQ_STATUS"] = 7
    if workload.history is not None:
        registers["HISTORY_LENGTH"] = 0
        for token in workload.history:
            registers["HISTORY"] = token
    for name, costs in workload.costs.items():
        registers.write_costs(name, costs)
    registers.write_stop_tokens(workload.stop_tokens)
    for name, value in workload.all_registers().items():
        registers[name] = value
    registers.command("clear_counters")
    registers.command("start")
    return registers


def run(board: Board, workload: Workload) -> Iterator[RunStatus]:
    """Run a workload; gives the status at each wait for the host, then that at the end.

    The next item is asked for when the host may answer.

    Raises
    ------
    TimeoutError
        If the accelerator does nothing more.
    """
    registers = begin(board, workload)
    hosts = (i for i, d in enumerate(workload.descriptors) if d.kind is DescriptorKind.HOST)
    while True:
        if not board.wait_interrupt(LIMIT):
            raise TimeoutError(f"the accelerator hangs: {run_status(registers)}\n{workload}")
        now = run_status(registers)
        yield now
        if now.state not in ("HOST", "STEP"):
            registers["IRQ_STATUS"] = 7
            return
        answer = ANSWERS["CONTINUE"][0]
        if now.state == "HOST":
            index = next(hosts)
            for patch in workload.patches.get(index, ()):
                board.write(patch.address, patch.content)
            answer = workload.answers.get(index, answer)
        registers["HOST_ANSWER"] = answer
