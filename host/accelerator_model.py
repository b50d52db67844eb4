# SPDX-License-Identifier: Apache-2.0
"""A functional model of the whole accelerator: registers, descriptors and memory, no cycles.

What the RTL leaves in memory and in its registers, this model leaves there, too, whenever it waits
for the host and when a run has ended; only what products write of whose results one is not finite
is undefined. It shares the arithmetic with `speq.model.arith` and the
speculation with `speq.model.speculation`; where operands lie in memory it finds out by itself, from
the description in `speq.hw.control.descriptor`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from speq.host.vector_model import Memory, VectorModel
from speq.hw.accelerator_config import AcceleratorConfig, ErrorCode, PassKind
from speq.hw.control.descriptor import (
    DESCRIPTOR_BYTES,
    FORMS,
    TARGETS,
    DescriptorKind,
    Target,
    VectorOperation,
    unpack,
)
from speq.hw.control.ngram_matcher import LONGEST_MATCH
from speq.hw.control.register_map import (
    ANSWERS,
    COUNTERS,
    GAP_COSTS,
    MAX_RING_LOG2,
    MAX_STOP_TOKENS,
    STATES,
    Register,
    constants,
    registers,
)
from speq.hw.engine_config import BLOCK_ACTIVATIONS, BLOCK_MAGNITUDE_BITS, DRAFT_LANES, Mode
from speq.hw.memory.axi import PAGE_BYTES
from speq.model.arith import (
    BlockActivations,
    WeightOperand,
    draft_gemm,
    prepare_draft,
    prepare_verify,
    to_float16,
    verify_gemm,
)
from speq.model.draft_tree import Origin, Proposal, chain_ends, free_proposal, grow
from speq.model.format import EncodedTensor
from speq.model.number_format import draft_words, residual_words
from speq.model.settings import Policy
from speq.model.speculation import above_cutoff, accept, ranked_gaps, with_noise
from speq.model.vector_ops import ranked

_PRODUCTS = (
    DescriptorKind.GEMM,
    DescriptorKind.ARGMAX,
    DescriptorKind.ATTENTION,
    DescriptorKind.RERANK,
)

_HOST_INTERRUPT, _DONE_INTERRUPT, _ERROR_INTERRUPT = 1, 2, 4
_NO_ENTRY = (0xFFFFFFFF, 0xFF800000)  # of a ranking: all ones, minus infinity

#: A row of a pass: token, depth, row that it follows, and where its token is from.
_Row = tuple[int, int, int, Origin]

#: A run, or part of one: yields the state in which it waits for the host and expects the answer.
_Run = Generator[str, int | None, None]


class _Fault(Exception):
    """The run ends with this error code and address."""

    def __init__(self, code: ErrorCode, address: int) -> None:
        super().__init__(code, address)
        self.code, self.address = code, address


@dataclass(frozen=True)
class _Product:
    """One GEMM on memory, for at most R rows."""

    mode: Mode
    k: int
    o: int
    tokens: int
    half: bool
    discard: bool
    plane: int
    residual: int
    groups: int
    activations: int
    results: int
    stride: int


class AcceleratorModel:
    """A `speq.host.board.Board` that computes everything at once, when it is started or answered.

    Parameters
    ----------
    config : AcceleratorConfig
    size : int
        Bytes of memory.
    base : int
        Address of the first of them. Other addresses answer DECERR.
    """

    def __init__(self, config: AcceleratorConfig, size: int, base: int = 0) -> None:
        self.config = config
        self._base = base
        self._memory = np.zeros(size, np.uint8)
        # Not numbers, until they are written.
        self._scratch = np.full(config.scratch, 0xFF, np.uint8)
        self._places: dict[int, tuple[Register, int, int]] = {}  # register, element, word
        for register in registers(config):
            for i, offset in enumerate(register.offsets):
                self._places[offset] = (register, *divmod(i, register.words))
        self._written = {r.name: 0 for r in registers(config) if r.access == "rw"}
        self._constants = constants(config)
        self._weights: dict[tuple, tuple[WeightOperand, list[tuple[int, int]]]] = {}
        self._weights_end = 0  # behind which none of these lie
        self.reset()

    def reset(self) -> None:
        """Return to the state after reset; memory stays."""
        self._written = dict.fromkeys(self._written, 0)
        self._counters = dict.fromkeys(COUNTERS, 0)
        self._state = "IDLE"
        self._run: _Run = self._whole_run()  # not begun
        self._pending = 0  # interrupts
        self._error = (ErrorCode.NONE, 0)
        self._argument = 0
        self._ring_index = 0
        self._pass = (PassKind.SINGLE, 0, 0)  # kind, index in the chain, position
        self._rows: list[_Row] = []
        self._step = (0, 0, 0, 0)
        self._history: list[int] = []  # the last of which HISTORY_LENGTH count
        self._logits = torch.zeros(1, 1)
        ports = Memory(self._load, self._store, self._store_columns)
        self._vector = VectorModel(self.config, ports)

    # The interface of a board.

    def read_register(self, offset: int) -> int:
        """Value of a register; 0 where there is none."""
        if offset not in self._places:
            return 0
        register, element, word = self._places[offset]
        if register.access == "wo":
            return 0
        return self._value(register, element) >> 32 * word & 0xFFFFFFFF

    def write_register(self, offset: int, value: int) -> None:
        """Write a register; CONTROL and HOST_ANSWER act before this returns."""
        if offset not in self._places:
            return
        register, element, word = self._places[offset]
        if register.locked and self._state in ("HOST", "STEP"):
            return
        if register.access == "rw":
            low = 32 * (register.words * element + word)  # elements follow each other
            mask = min(0xFFFFFFFF, (1 << register.bits - 32 * word) - 1) << low
            self._written[register.name] &= ~mask
            self._written[register.name] |= value << low & mask
            if register.name.startswith("READ_"):
                self._weights.clear()  # they have to be read again, which may fail
        elif register.name == "IRQ_STATUS":
            self._pending &= ~value
        elif register.name == "CONTROL":
            self._control(start=value & 1, stop=value >> 1 & 1, clear_counters=value >> 2 & 1)
        elif register.name == "HISTORY" and self._state not in ("HOST", "STEP"):
            self._append([value & (1 << register.bits) - 1])
        elif register.name == "HOST_ANSWER" and self._state in ("HOST", "STEP"):
            self._pending &= ~_HOST_INTERRUPT
            self._advance(value)

    def read(self, address: int, size: int) -> np.ndarray:
        """Copy of memory, uint8 [size]. Raises ValueError if it is not all there."""
        return self._span(address, size).copy()

    def write(self, address: int, values: np.ndarray | bytes | bytearray | memoryview) -> None:
        """Write memory. Raises ValueError if the place is not all there."""
        if not isinstance(values, np.ndarray):
            values = np.frombuffer(values, np.uint8)
        content = np.ascontiguousarray(values).reshape(-1).view(np.uint8)
        self._span(address, len(content))[:] = content
        self._forget(address, len(content))

    def wait_interrupt(self, timeout_cycles: int | None = None) -> bool:
        """Whether the interrupt line is high, which does not change by waiting. Raises OSError if
        it is low and there is no time-out: it would wait for ever."""
        high = bool(self._pending & self._written["IRQ_ENABLE"])
        if not high and timeout_cycles is None:
            raise OSError("no interrupt can come: the accelerator is not running")
        return high

    def close(self) -> None:
        """Free the memory."""
        self._memory = np.zeros(0, np.uint8)
        self._weights.clear()

    def _span(self, address: int, size: int) -> np.ndarray:
        first = address - self._base
        if not 0 <= first <= first + size <= len(self._memory):
            raise ValueError(f"{size} bytes at {address:#x} are not all in memory")
        return self._memory[first : first + size]

    def _elements(self, name: str) -> list[int]:
        """The elements of an array of registers."""
        register = next(register for register, *_ in self._places.values() if register.name == name)
        return [self._value(register, i) for i in range(register.count)]

    def _value(self, register: Register, element: int) -> int:
        name = register.name
        if name in self._written:
            content = self._written[name] >> 32 * register.words * element
            return content & (1 << register.bits) - 1
        if name in self._constants:
            return register.pack(self._constants[name])
        if name in self._counters:
            return self._counters[name]
        kind, index, position = self._pass
        committed, accepted, last_row, chain = self._step
        row = self._rows[element] if element < len(self._rows) else (0, 0, 0, Origin.CHAIN)
        token, depth, parent, origin = row
        fields = {
            "PASS": {"kind": kind.value, "rows": len(self._rows), "index": index},
            "STEP": {
                "committed": committed,
                "accepted": accepted,
                "last_row": last_row,
                "chain": chain,
            },
            "ROW_PLACE": {"depth": depth, "parent": parent, "origin": origin.value},
            "STATUS": STATES[self._state][0],
            "ERROR": self._error[0].value,
            "ERROR_ADDRESS": self._error[1],
            "IRQ_STATUS": self._pending,
            "RING_INDEX": self._ring_index,
            "HOST_ARGUMENT": self._argument,
            "PASS_POSITION": position,
            "ROW_TOKEN": token,
        }
        return register.pack(fields[name])

    # Runs.

    def _control(self, start: int, stop: int, clear_counters: int) -> None:
        if clear_counters:
            self._counters = dict.fromkeys(COUNTERS, 0)
        if stop and self._state == "ERROR":
            self._state = "IDLE"
        elif stop and self._state in ("HOST", "STEP"):
            self._run.close()
            self._fail(_Fault(ErrorCode.STOPPED, 0))
        elif start and self._state == "IDLE":
            self._error = (ErrorCode.NONE, 0)
            self._run = self._whole_run()
            self._advance(None)

    def _advance(self, answer: int | None) -> None:
        """Run until the host is needed."""
        try:
            self._state = self._run.send(answer)
            self._pending |= _HOST_INTERRUPT
        except StopIteration:
            self._state = "IDLE"
            self._pending |= _DONE_INTERRUPT
        except _Fault as fault:
            self._fail(fault)

    def _fail(self, fault: _Fault) -> None:
        self._state = "ERROR"
        self._error = (fault.code, fault.address)
        self._pending = self._pending & ~_HOST_INTERRUPT | _ERROR_INTERRUPT

    def _whole_run(self) -> _Run:
        self._check_registers()
        self._ring_index = 0
        written = self._written
        if written["RUN"] & 1:
            while (left := written["PROMPT_END"] - written["POSITION"]) > 0:
                rows = min(self.config.engine.rows, left)
                yield from self._single_pass(rows)
                written["POSITION"] += rows
            yield from self._decode()
        else:
            yield from self._single_pass(written["PASS_ROWS"])

    def _single_pass(self, count: int) -> _Run:
        """A pass of rows that follow each other."""
        rows = [(0, i, max(0, i - 1), Origin.CHAIN) for i in range(count)]
        yield from self._walk(PassKind.SINGLE, 0, self._written["POSITION"], rows)

    def _check_registers(self) -> None:
        """Refuse values that are impossible for this kind of run; the first register counts."""
        engine, written = self.config.engine, self._written
        decodes = bool(written["RUN"] & 1)
        rows = engine.rows if decodes else written["PASS_ROWS"]
        fills = decodes and written["PROMPT_END"] > written["POSITION"]
        limits = {"POSITION": (0, engine.max_k - rows)}
        regions = ("READ_BASE", "READ_LIMIT", "WRITE_BASE", "WRITE_LIMIT")
        addresses: dict[str, int] = {name: 1 for name in regions}
        if decodes:
            limits |= {
                "DRAFT_LENGTH": (0, engine.rows - 1),
                "CHOICES": (1, self.config.choices),
                "TOKEN_LIMIT": (1, 2**32 - 1),
                "RING_LOG2": (1, MAX_RING_LOG2),
                "STOP_TOKENS": (0, MAX_STOP_TOKENS),
            }
            if self.config.history:
                limits["HISTORY_LENGTH"] = (0, self.config.history)
            addresses["DRAFT_PROGRAM"] = addresses["VERIFY_PROGRAM"] = self.config.alignment
            addresses["RING"] = self.config.data.beat_bytes
        if not decodes:
            limits["PASS_ROWS"] = (1, engine.rows)
        if fills:
            limits["PROMPT_END"] = (0, engine.max_k - rows)
        if self._moves():
            addresses["MOVE_PROGRAM"] = self.config.alignment
        if fills or not decodes:
            addresses["PASS_PROGRAM"] = self.config.alignment
        if self.config.scratch:
            addresses["SCRATCH"] = PAGE_BYTES
        wrong = {name for name, (low, high) in limits.items() if not low <= written[name] <= high}
        wrong |= {
            name
            for name, multiple in addresses.items()
            if written[name] % multiple or written[name] >> self.config.address_bits
        }
        if wrong:
            offsets = (offset for offset, (r, *_) in self._places.items() if r.name in wrong)
            raise _Fault(ErrorCode.BAD_REGISTER, min(offsets))

    def _moves(self) -> bool:
        """Whether the run moves entries of the KV cache."""
        run = self._written["RUN"]
        return bool(run & 1 and run & 16)

    def _decode(self) -> _Run:
        """Speculative decoding, as in `speq.model.speculation.generate`."""
        written = self._written
        stops = self._elements("STOP_TOKEN")[: written["STOP_TOKENS"]]
        committed = 0
        while committed < written["TOKEN_LIMIT"]:
            remaining = written["TOKEN_LIMIT"] - committed
            root, position = written["ROOT"], written["POSITION"]
            proposal = Proposal()
            if most := min(written["DRAFT_LENGTH"], remaining - 1):
                proposal = yield from self._draft(root, position, most, remaining - 1)
            parents, origins = [0, *proposal.parents], [Origin.CHAIN, *proposal.origins]
            columns = [root, *proposal.tokens], proposal.depths, parents, origins
            rows = list(zip(*columns, strict=True))
            yield from self._walk(PassKind.VERIFY, 0, position, rows)
            self._count(VERIFY_PASSES=1)
            tokens, taken = accept(proposal, self._logits)
            ended = [i for i, token in enumerate(tokens, 1) if token in stops]
            tokens = tokens[: min(ended, default=None)]
            hits = [origins[row] for row in taken[1 : len(tokens) + 1]]
            taken = taken[: len(tokens)]
            self._write_ring(tokens)
            for depth, row in enumerate(taken):
                if self._moves() and row != depth:
                    yield from self._move(position + row, position + depth)
            self._ring_index += len(tokens)
            self._append(tokens)
            committed += len(tokens)
            written["POSITION"] += len(taken)
            written["ROOT"] = tokens[-1]
            chain, guesses = len(proposal.chain), proposal.count(Origin.GUESS)
            self._step = (len(tokens), hits.count(Origin.CHAIN), taken[-1], chain)
            self._count(
                ALTERNATES=proposal.count(Origin.ALTERNATE),
                ACCEPTED=hits.count(Origin.CHAIN),
                ALTERNATE_HITS=hits.count(Origin.ALTERNATE),
                COMMITTED=len(tokens),
                GUESSES=guesses,
                GUESS_HITS=hits.count(Origin.GUESS),
                FREE_STEPS=int(guesses > 0 and chain == 0),
            )
            if written["RUN"] & 8:
                answer = yield "STEP"
                if answer == ANSWERS["FINISH"][0]:
                    return
                if answer != ANSWERS["CONTINUE"][0]:
                    raise _Fault(ErrorCode.HOST_REFUSED, 0)
            if ended:
                return

    def _draft(
        self, root: int, position: int, length: int, most: int
    ) -> Generator[str, int | None, Proposal]:
        """Draft passes and the choice of rows, as in `speq.model.speculation.draft`."""
        written, rows, policy = self._written, self.config.engine.rows, self._policy()
        known = written.get("HISTORY_LENGTH", 0)
        history = self._history[-known:] if known else []
        free = free_proposal(policy, history, rows, most)
        if free is not None:
            return free
        threshold = float(np.uint32(written["THRESHOLD"]).view(np.float32))
        choices, gaps = [], []
        token = root
        while len(choices) < length:
            index = len(choices)
            row = (token, 0, 0, Origin.CHAIN)
            yield from self._walk(PassKind.DRAFT, index, position + index, [row])
            self._count(DRAFT_PASSES=1)
            best = self._best(0)
            gaps.append(ranked_gaps(self._logits[0], max(2, len(best))))
            choices.append(best[: written["CHOICES"]].tolist())
            token = choices[-1][0]
            if chain_ends(policy, threshold, [gap[1] for gap in gaps]):
                break
        return grow(policy, history, choices, gaps, rows, most)

    def _policy(self) -> Policy:
        """The costs in the registers."""
        written = self._written
        costs = {
            name: tuple(written[register].to_bytes(size, "little"))
            for name, register, size in (
                ("chain_costs", "CHAIN_COSTS", GAP_COSTS),
                ("alternate_costs", "ALTERNATE_COSTS", GAP_COSTS),
                ("guess_costs", "GUESS_COSTS", LONGEST_MATCH),
            )
            if register in written
        }
        guess_limit = written.get("GUESS_LIMIT", 0)
        return Policy(**costs, limit=written["COST_LIMIT"], guess_limit=guess_limit)

    def _append(self, tokens: Sequence[int]) -> None:
        """Append tokens to the history."""
        size, written = self.config.history, self._written
        if size:
            self._history = [*self._history, *tokens][-size:]
            written["HISTORY_LENGTH"] = min(size, written["HISTORY_LENGTH"] + len(tokens))

    def _write_ring(self, tokens: Sequence[int]) -> None:
        written = self._written
        for number, token in enumerate(tokens, self._ring_index):
            place = number % (1 << written["RING_LOG2"])
            content = np.array([token], "<u4")
            self._store(written["RING"] + 4 * place, content, content.nbytes)

    def _count(self, **amounts: int) -> None:
        for name, amount in amounts.items():
            self._counters[name] += amount

    # Programs.

    def _walk(self, kind: PassKind, index: int, position: int, rows: list[_Row]) -> _Run:
        """A pass through the program of its kind."""
        self._pass, self._rows = (kind, index, position), rows
        names = {PassKind.SINGLE: "PASS_PROGRAM", PassKind.DRAFT: "DRAFT_PROGRAM"}
        yield from self._carry_out(names.get(kind, "VERIFY_PROGRAM"), position, rows)

    def _move(self, source: int, target: int) -> _Run:
        """A walk that moves an entry, of which the registers of passes tell nothing."""
        yield from self._carry_out("MOVE_PROGRAM", target, [(0, 0, 0, Origin.CHAIN)], source)

    def _carry_out(self, name: str, position: int, rows: list[_Row], source: int = 0) -> _Run:
        """Walk through a program."""
        address = self._written[name]
        for _ in range(self._written["PROGRAM_LENGTH"]):
            fields = unpack(self._load(address, DESCRIPTOR_BYTES).tobytes())
            code = check_descriptor(self.config, fields, len(rows), position)
            if code != ErrorCode.NONE:
                raise _Fault(code, address)
            self._count(DESCRIPTORS=1)
            match DescriptorKind(fields["kind"]):
                case DescriptorKind.END:
                    return
                case DescriptorKind.HOST:
                    self._argument = fields["argument"]
                    if (yield "HOST") != ANSWERS["CONTINUE"][0]:
                        raise _Fault(ErrorCode.HOST_REFUSED, address)
                case DescriptorKind.ATTENTION:
                    self._attend(fields, address, len(rows), position + len(rows))
                case DescriptorKind.ARGMAX:
                    logits = self._multiply(self._product(fields, len(rows)), address)
                    self._logits = self._perturbed(logits)
                    if fields["extra"]:
                        self._write_ranking(self._ranking_address(fields), len(self._logits))
                case DescriptorKind.RERANK:
                    self._rerank(fields, address)
                    if fields["extra"]:
                        self._write_ranking(self._ranking_address(fields), rows=1)
                case DescriptorKind.GEMM:
                    self._multiply(self._product(fields, len(rows)), address)
                case DescriptorKind.VECTOR:
                    self._vector.carry_out(fields, [row[:3] for row in rows], position, source)
            address += DESCRIPTOR_BYTES
        raise _Fault(ErrorCode.NO_END, address)

    def _product(self, fields: dict[str, int], rows: int) -> _Product:
        tokens = fields["tokens"] or rows
        row_bytes = self.config.engine.cols * (2 if fields["half"] else 4)
        before = fields["sharing"] * tokens * row_bytes
        return _Product(
            mode=Mode(fields["mode"]),
            k=fields["k"],
            o=fields["o"],
            tokens=tokens,
            half=bool(fields["half"]),
            discard=bool(fields["discard"]),
            plane=fields["plane"],
            residual=fields["residual"],
            groups=fields["groups"],
            activations=fields["activations"],
            results=fields["results"] + before,
            stride=0,
        )

    def _rerank(self, fields: dict[str, int], address: int) -> None:
        """A RERANK descriptor at `address`: tile by tile, each with all its outputs."""
        engine, port, k = self.config.engine, self.config.data, fields["k"]
        candidates = self._best(0)[: fields["tokens"]].tolist()
        groups = -(-k // engine.format.group) * engine.cols
        sizes = {
            "plane": draft_words(k) * engine.cols * 2,
            "residual": residual_words(k) * engine.cols * 2,
            "groups": -(-groups // port.beat_bytes) * port.beat_bytes,
        }
        exact = torch.full_like(self._logits, -math.inf)
        for tile in sorted({index // engine.cols for index in candidates}):
            places = {name: fields[name] + tile * size for name, size in sizes.items()}
            outputs = min(engine.cols, engine.max_o)
            y = self._multiply(
                _Product(
                    mode=Mode.VERIFY,
                    k=k,
                    o=outputs,
                    tokens=1,
                    half=False,
                    discard=True,
                    activations=fields["activations"],
                    results=0,
                    stride=0,
                    **places,
                ),
                address,
            )
            for index in candidates:
                if index // engine.cols == tile:
                    exact[0, index] = y[0, index % engine.cols]
        self._logits = self._perturbed(exact)

    def _perturbed(self, logits: torch.Tensor) -> torch.Tensor:
        """What rows are ranked by, from their logits [T, o]."""
        written, (_, _, start) = self._written, self._pass
        if not written["RUN"] & 2:
            return logits
        scale, cutoff = np.array([written["SCALE"], written["CUTOFF"]], np.uint32).view(np.float32)
        positions = [start + depth + 1 for _, depth, _, _ in self._rows[: len(logits)]]
        scores = with_noise(logits, positions, scale, written["SEED"])
        if written["RUN"] & 4:
            scores[~above_cutoff(logits, float(cutoff))] = -math.inf
        return scores

    def _best(self, row: int) -> torch.Tensor:
        """Indices of a row's ranking, the best first."""
        best = ranked(self._logits[row], self.config.choices)
        # What is not finite ends a run, so that these are outputs that do not count.
        return best[self._logits[row, best] > -math.inf]

    def _attend(self, fields: dict[str, int], address: int, rows: int, entries: int) -> None:
        """An ATTENTION descriptor at `address`, batch by batch."""
        engine = self.config.engine
        k, o = (entries, fields["o"]) if fields["values"] else (fields["k"], entries)
        activations, results = fields["activations"], fields["results"]
        left = rows * fields["sharing"]
        while left:
            tokens = min(left, engine.rows)
            self._multiply(
                _Product(
                    mode=Mode.BYPASS,
                    k=k,
                    o=o,
                    tokens=tokens,
                    half=bool(fields["half"]),
                    discard=False,
                    plane=fields["plane"],
                    residual=0,
                    groups=0,
                    activations=activations,
                    results=results,
                    stride=fields["extra"],
                ),
                address,
            )
            beat = self.config.data.beat_bytes
            activations += -(-k * self.config.activation_bytes // beat) * beat
            results += self._tiles(o) * tokens * engine.cols * (2 if fields["half"] else 4)
            left -= tokens

    def _tiles(self, o: int) -> int:
        return -(-o // self.config.engine.cols)

    def _multiply(self, product: _Product, address: int) -> torch.Tensor:
        """Carry out a product of the descriptor at `address`; its results, float32 [tokens, o]."""
        weights = self._operand(product)
        if product.mode is Mode.DRAFT:
            y = draft_gemm(self._block_activations(product), weights)
        else:
            size = self.config.activation_bytes
            words = self._load(product.activations, product.k * size).view(np.uint16)
            x = words.reshape(product.k, -1)[:, : product.tokens].T
            y = verify_gemm(torch.from_numpy(x.copy().view(np.float16)), weights)
        if not torch.isfinite(to_float16(y) if product.half else y).all():
            raise _Fault(ErrorCode.NONFINITE, address)
        if not product.discard:
            self._write_results(product, y)
        return y

    def _block_activations(self, product: _Product) -> BlockActivations:
        engine = self.config.engine
        steps, block = -(-product.k // DRAFT_LANES), engine.format.group
        size = self.config.activation_bytes
        words = self._load(product.activations, steps * size).reshape(steps, size)
        row_bits = BLOCK_ACTIVATIONS.size
        bits = np.unpackbits(words, axis=1, bitorder="little")[:, : engine.draft_rows * row_bits]
        bits = bits.reshape(steps, -1, row_bits)[:, : product.tokens].astype(np.int16)
        lanes = bits[..., : DRAFT_LANES * 8].reshape(steps, -1, DRAFT_LANES, 8)
        magnitude = lanes[..., :BLOCK_MAGNITUDE_BITS] @ (1 << np.arange(BLOCK_MAGNITUDE_BITS))
        mantissa = np.where(lanes[..., BLOCK_MAGNITUDE_BITS], -magnitude, magnitude)
        mantissa = mantissa.swapaxes(0, 1).reshape(product.tokens, -1)[:, : product.k]
        exponent = bits[:: block // DRAFT_LANES, :, DRAFT_LANES * 8 :] @ (1 << np.arange(5))
        return BlockActivations(
            torch.from_numpy(mantissa.astype(np.int8)),
            torch.from_numpy(np.ascontiguousarray(exponent.T).astype(np.uint8)),
            block,
        )

    def _operand(self, product: _Product) -> WeightOperand:
        """The weights of a product, kept until their memory is written."""
        key = (product.mode, product.k, product.o, product.plane, product.residual, product.groups)
        if key in self._weights and not product.stride:
            return self._weights[key][0]
        spans: list[tuple[int, int]] = []
        if product.mode is Mode.BYPASS:
            words = self._tiled(product, product.plane, product.k, spans)
            words = words.transpose(0, 2, 1).reshape(-1, product.k)[: product.o]
            operand = prepare_verify(torch.from_numpy(words.view(np.float16)))
        else:
            tensor = self._encoded(product, spans)
            is_draft = product.mode is Mode.DRAFT
            operand = prepare_draft(tensor) if is_draft else prepare_verify(tensor.decode())
        if not product.stride:
            self._weights[key] = (operand, spans)
            ends = [first + size for first, size in spans]
            self._weights_end = max(self._weights_end, *ends)
        return operand

    def _encoded(self, product: _Product, spans: list[tuple[int, int]]) -> EncodedTensor:
        """The encoded weights of a product; in draft mode the residuals are 0."""
        number_format, cols = self.config.engine.format, self.config.engine.cols
        plane = self._tiled(product, product.plane, draft_words(product.k), spans)
        rest = residual_words(product.k)
        if product.mode is Mode.DRAFT:
            residual = np.zeros((len(plane), rest, cols), np.uint16)
        else:
            residual = self._tiled(product, product.residual, rest, spans)
        groups, beat = -(-product.k // number_format.group), self.config.data.beat_bytes
        size = -(-groups * cols // beat) * beat
        spans.append((product.groups, len(plane) * size))
        tiles = [self._load(product.groups + i * size, size) for i in range(len(plane))]
        group_bytes = np.stack(tiles)[:, : groups * cols].reshape(-1, groups, cols)
        shape = (product.o, product.k)
        planes = (plane, residual, np.ascontiguousarray(group_bytes))
        return EncodedTensor("weights", shape, number_format, cols, *planes)

    def _tiled(
        self, product: _Product, address: int, words: int, spans: list[tuple[int, int]]
    ) -> np.ndarray:
        """A plane, uint16 [tiles, words, columns]; notes in `spans` where it lies."""
        cols = self.config.engine.cols
        size = words * cols * 2
        pitch, tiles = product.stride or size, self._tiles(product.o)
        spans.append((address, tiles * size))
        content = [self._load(address + i * pitch, size) for i in range(tiles)]
        return np.stack(content).view(np.uint16).reshape(tiles, words, cols)

    def _forget(self, address: int, size: int) -> None:
        """Drop the weights that lie where memory has been written."""
        if address >= self._weights_end:
            return
        self._weights = {
            key: (operand, spans)
            for key, (operand, spans) in self._weights.items()
            if all(address + size <= first or first + n <= address for first, n in spans)
        }

    def _write_results(self, product: _Product, y: torch.Tensor) -> None:
        cols, tiles = self.config.engine.cols, self._tiles(product.o)
        y = to_float16(y) if product.half else y
        values = np.zeros((len(y), tiles * cols), np.float16 if product.half else np.float32)
        values[:, : product.o] = y.numpy()
        content = np.ascontiguousarray(values.reshape(-1, tiles, cols).swapaxes(0, 1))
        self._store(product.results, content, content.nbytes // tiles)

    def _ranking_address(self, fields: dict[str, int]) -> int:
        """Where the ranking of a descriptor goes in the pass under way."""
        kind, index, _ = self._pass
        chained = index if self.config.lanes and kind is PassKind.DRAFT else 0
        beat = self.config.data.beat_bytes
        return fields["extra"] + chained * (-(-8 * self.config.choices // beat) * beat)

    def _write_ranking(self, address: int, rows: int) -> None:
        """The first rows of the last ranking."""
        pairs = np.full((rows, self.config.choices, 2), _NO_ENTRY, np.uint32)
        for row, logits in enumerate(self._logits[:rows]):
            best = self._best(row)
            pairs[row, : len(best), 0] = best.numpy()
            pairs[row, : len(best), 1] = logits[best].numpy().view(np.uint32)
        self._store(address, pairs, pairs.nbytes)

    # Memory as the accelerator's ports see it.

    def _load(self, address: int, size: int) -> np.ndarray:
        """One transfer from memory, uint8 [size]."""
        self._check_region("READ", address, size)
        content = self._memory[address - self._base :][:size]
        if window := self._on_chip(address, size):
            content = content.copy()
            content[window.start - address : window.stop - address] = self._scratch_at(window)
        return content

    def _store(self, address: int, values: np.ndarray, transfer: int) -> None:
        """Transfers of `transfer` bytes each to memory."""
        content = np.ascontiguousarray(values).reshape(-1).view(np.uint8)
        for first in range(0, len(content), transfer):
            self._check_region("WRITE", address + first, transfer)
            self._put(address + first, content[first : first + transfer])
        self._forget(address, len(content))

    def _store_columns(self, address: int, values: np.ndarray, pitch: int) -> None:
        """Write `values`, float16 [n, m], row i at ``address + i pitch``: those of words of
        activations in one transfer, others in one each."""
        content = np.ascontiguousarray(values).view(np.uint8)
        rows, size = content.shape
        beat = self.config.data.beat_bytes
        places = address + pitch * np.arange(rows)
        starts, stops = places // beat * beat, -(-(places + size) // beat) * beat
        if pitch == self.config.activation_bytes:
            starts, stops = starts[:1], stops[-1:]
        for start, stop in zip(starts.tolist(), stops.tolist(), strict=True):
            self._check_region("WRITE", start, stop - start)
        if self._on_chip(int(places[0]), int(places[-1]) + size - int(places[0])):
            for place, row in zip(places.tolist(), content, strict=True):
                self._put(place, row)
        else:
            self._memory[(places - self._base)[:, None] + np.arange(size)] = content
        first = int(starts[0])
        self._forget(first, int(stops[-1]) - first)

    def _put(self, address: int, content: np.ndarray) -> None:
        """Write bytes, uint8 [n], to memory and, in its window, to scratch memory instead."""
        place, size = address - self._base, len(content)
        window = self._on_chip(address, size)
        if not window:
            self._memory[place : place + size] = content
            return
        first, last = window.start - address, window.stop - address
        self._memory[place : place + first] = content[:first]
        self._memory[place + last : place + size] = content[last:]
        self._scratch_at(window)[:] = content[first:last]

    def _on_chip(self, address: int, size: int) -> range:
        """Those of so many addresses that are in the window of the scratch memory."""
        start = self._written.get("SCRATCH", 0)
        if not start:
            return range(0)
        return range(max(address, start), min(address + size, start + self.config.scratch))

    def _scratch_at(self, window: range) -> np.ndarray:
        """The bytes of scratch memory at some addresses in the window."""
        start = self._written["SCRATCH"]
        return self._scratch[window.start - start : window.stop - start]

    def _check_region(self, direction: str, address: int, size: int) -> None:
        base, limit = (self._written[f"{direction}_{end}"] for end in ("BASE", "LIMIT"))
        if not base <= address <= address + size - 1 <= limit:
            raise _Fault(ErrorCode[f"{direction}_OUTSIDE"], address)
        first = address - self._base
        if not 0 <= first <= first + size <= len(self._memory):
            raise _Fault(ErrorCode[f"{direction}_DECERR"], address)


def check_descriptor(
    config: AcceleratorConfig, fields: dict[str, int], rows: int, position: int
) -> ErrorCode:
    """The first thing that is wrong with a descriptor, for a pass of `rows` rows behind `position`
    KV entries; NONE if it is sound."""
    checks: tuple[tuple[ErrorCode, Callable[[], bool]], ...] = (
        (ErrorCode.UNKNOWN_KIND, lambda: _is_unknown(config, fields)),
        (ErrorCode.RESERVED, lambda: _uses_reserved(fields)),
        (ErrorCode.BAD_SIZE, lambda: _has_bad_size(config, fields, rows, position)),
        (ErrorCode.MISALIGNED, lambda: _is_misaligned(config, fields)),
    )
    return next((code for code, is_wrong in checks if is_wrong()), ErrorCode.NONE)


def _is_unknown(config: AcceleratorConfig, fields: dict[str, int]) -> bool:
    if fields["kind"] not in {kind.value for kind in DescriptorKind}:
        return True
    if fields["kind"] == DescriptorKind.VECTOR.value and not config.lanes:
        return True
    if fields["kind"] == DescriptorKind.VECTOR.value:
        targets = {
            operation.value: {target.value for target in targets}
            for operation, targets in TARGETS.items()
        }
        return fields["target"] not in targets.get(fields["operation"], ())
    takes_mode = "mode" in FORMS[DescriptorKind(fields["kind"])].uses
    return takes_mode and fields["mode"] not in {mode.value for mode in Mode}


def _uses_reserved(fields: dict[str, int]) -> bool:
    used = {"kind"}
    for name, use in FORMS[DescriptorKind(fields["kind"])].uses.items():
        in_mode = fields["mode"] in {mode.value for mode in use.modes}
        if in_mode and use.values in (None, bool(fields["values"])):
            used.add(name)
    if fields["kind"] == DescriptorKind.VECTOR.value:
        operation = VectorOperation(fields["operation"])
        if operation is VectorOperation.NORM and not fields["values"]:
            return True
        if operation is VectorOperation.SOFTMAX:
            used.remove("k")
    return any(value for name, value in fields.items() if name not in used)


def _has_bad_size(
    config: AcceleratorConfig, fields: dict[str, int], rows: int, position: int
) -> bool:
    engine, kind = config.engine, DescriptorKind(fields["kind"])
    if kind is DescriptorKind.VECTOR:
        return _has_bad_vector_size(config, fields, rows, position)
    if kind not in _PRODUCTS:
        return False
    k, o, tokens, most = fields["k"], fields["o"], fields["tokens"] or rows, engine.rows
    if kind is DescriptorKind.ATTENTION:
        if position + rows > engine.max_k:
            return True
        k, o = (position + rows, o) if fields["values"] else (k, position + rows)
        tokens = min(1, fields["sharing"])
    elif kind is DescriptorKind.RERANK:
        o, tokens, most = 1, fields["tokens"], config.choices
    elif Mode(fields["mode"]) is Mode.DRAFT:
        most = engine.draft_rows
    limits = ((k, engine.max_k), (o, engine.max_o), (tokens, most))
    return any(not 1 <= size <= limit for size, limit in limits)


def _has_bad_vector_size(
    config: AcceleratorConfig, fields: dict[str, int], rows: int, position: int
) -> bool:
    engine = config.engine
    operation, target = VectorOperation(fields["operation"]), Target(fields["target"])
    drafts = operation is VectorOperation.QUANTIZE or target is Target.DRAFT_ACTIVATIONS
    sizes = [
        (rows, engine.draft_rows if drafts else engine.rows),
        (position + rows, engine.max_k),
    ]
    if operation is not VectorOperation.SOFTMAX:
        sizes.append((fields["k"], engine.max_k))
    if operation in (VectorOperation.SOFTMAX, VectorOperation.NORMALIZE):
        sizes.append((fields["sharing"], config.query_heads - fields["o"]))
    else:
        is_one = drafts or target is Target.ACTIVATIONS
        sizes.append((fields["o"], 1 if is_one else config.query_heads))
    if target is Target.QUERIES:
        sizes.append((fields["sharing"], fields["sharing"]))
    return bool(fields["extra"] >> 32) or any(not 1 <= size <= most for size, most in sizes)


def _is_misaligned(config: AcceleratorConfig, fields: dict[str, int]) -> bool:
    for name, use in FORMS[DescriptorKind(fields["kind"])].uses.items():
        if use.port is not None:
            port = config.weights if use.port == "weights" else config.data
            multiple = config.activation_bytes if use.port == "word" else port.beat_bytes
            if fields[name] % multiple or fields[name] >> config.address_bits:
                return True
    if fields["kind"] != DescriptorKind.VECTOR.value:
        return False
    operation, beat = VectorOperation(fields["operation"]), config.data.beat_bytes
    if operation is VectorOperation.MOVE or Target(fields["target"]) is Target.VALUES:
        return bool(fields["residual"] % beat or fields["groups"] % beat)
    in_table = operation in (VectorOperation.EMBED, VectorOperation.ROTATE)
    return in_table and bool(fields["extra"] % beat)
