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
    Descriptor,
    DescriptorKind,
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
        """Append a descriptor with the given fields."""
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
            operands["activations"], wait = earlier, True
        if discard:
            results = self.base  # which must not be written
        else:
            size = ceil_div(o, engine.cols) * engine.cols * actual * (2 if half else 4)
            results = self._product_results(size, half)
        place = self._result("ranking", ranking_bytes(self.config) * actual) if ranking else 0
        return self.add(
            kind,
            mode=mode,
            k=k,
            o=o,
            tokens=tokens,
            half=half,
            wait=wait,
            discard=discard,
            results=results,
            ranking=place,
            **operands,
        )

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

    def add_random(self) -> Descriptor:
        """Append any descriptor that the accelerator can carry out, and behind an ARGMAX perhaps a
        RERANK; the last of them."""
        random, engine = self.random, self.config.engine
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
            words = [f"{i}: {d.kind.name} {d.mode.name} tokens={d.tokens} k={d.k} o={d.o}"]
            names = ("half", "wait", "discard", "values", "sharing", "candidates")
            words += [f"{name}={int(getattr(d, name))}" for name in names if getattr(d, name)]
            names = (*_ADDRESS_FIELDS, "ranking", "stride", "argument")
            words += [f"{name}={getattr(d, name):#x}" for name in names if getattr(d, name)]
            lines.append(" ".join(words))
        return "\n".join(lines)


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
    the draft program a RERANK may follow. Before the steps there may be single passes of a GEMM."""
    engine = config.engine
    workload = Workload(config, random, rows=engine.rows, position=int(random.integers(0, 20)))
    o = int(random.integers(2, 7))
    workload.add_product(DescriptorKind.GEMM, Mode.VERIFY, int(random.integers(1, 30)), o)
    workload.add(DescriptorKind.END)
    for mode in (Mode.DRAFT, Mode.VERIFY):
        workload.rows = 1 if mode is Mode.DRAFT else engine.rows
        start = len(workload.descriptors)
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
        "PROGRAM_LENGTH": 3,
        "DRAFT_PROGRAM": workload.program + 2 * DESCRIPTOR_BYTES,
        "VERIFY_PROGRAM": workload.program + start * DESCRIPTOR_BYTES,
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
    return workload


def moving(config: AcceleratorConfig, random: np.random.Generator) -> tuple[Workload, Descriptor]:
    """A workload that decodes in steps and moves entries of one block, and the descriptor that does
    it, of a head that does not fill its tiles."""
    engine = config.engine
    workload = decoding(config, random)
    heads, head, tiles = 2, engine.cols + 2, 64 // engine.cols
    key_tile = heads * head * engine.cols * 2
    value_tile = tiles * engine.cols * engine.cols * 2
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
