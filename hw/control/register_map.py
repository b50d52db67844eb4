# SPDX-License-Identifier: Apache-2.0
"""The accelerator's registers: the one source of the RTL, the driver, the C header and the tables.

Registers are 32 bits wide, at multiples of four bytes, on an AXI4-Lite port. Numbers of more bits
take two, the lower half first. What is not named reads as 0 and ignores writes. After reset
everything that can be written is 0. All "rw" registers but IRQ_ENABLE ignore writes while a run is
under way, that is in all states but IDLE and ERROR.

The halves of a counter are read one after the other: while a run is under way, read the upper half,
the lower and the upper again until both upper ones are the same.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache

from speq.hw.accelerator_config import AcceleratorConfig, ErrorCode, PassKind
from speq.hw.memory.axi import PAGE_BYTES
from speq.model.number_format import DRAFT_BITS

#: "SPEQ", little-endian.
IDENTIFICATION = 0x51455053
#: Of this map: major version in the upper half, minor in the lower.
VERSION = 0x0001_0006
#: Bits of a register's address.
ADDRESS_BITS = 12
#: Largest value of RING_LOG2.
MAX_RING_LOG2 = 24
#: Stop tokens that there is room for.
MAX_STOP_TOKENS = 8
#: Costs in each table by logit gap, 8 bits each, and in a register of such a table.
GAP_COSTS, COSTS_PER_REGISTER = 16, 4

_COUNTERS = 0x100
_SAMPLING = 0x300
_ENDS = 0x340
_ROW_TOKENS = 0x400
_ROW_PLACES = 0x600


@dataclass(frozen=True)
class Field:
    """Bits `low` .. low + bits - 1 of a register."""

    name: str
    low: int
    bits: int
    about: str


@dataclass(frozen=True)
class Register:
    """One register, or one that takes several words.

    Attributes
    ----------
    name : str
    offset : int
        Byte offset of its first word.
    access : str
        "ro" read only, "rw" read and write, "wo" write only (reads as 0), "w1c" writing ones clears
        bits.
    about : str
    bits : int
        Bits in use; more than 32 take two words, the lower half first.
    fields : tuple of Field
        Its parts, if it has several.
    count : int
        Elements, of an array of registers; 0: it is none.
    updated : bool
        Of an "rw" register: the hardware changes it as well.
    """

    name: str
    offset: int
    access: str
    about: str
    bits: int = 32
    fields: tuple[Field, ...] = ()
    count: int = 0
    updated: bool = False

    @property
    def key(self) -> str:
        """Its name in the RTL's structures of registers."""
        return self.name.lower()

    @property
    def locked(self) -> bool:
        """Whether the host cannot write it while a run, which depends on it, is under way."""
        return self.access == "rw" and self.name != "IRQ_ENABLE"

    @property
    def words(self) -> int:
        """32-bit words of an element."""
        return -(-self.bits // 32)

    @property
    def offsets(self) -> range:
        """Byte offsets of all its words; those of an array's elements follow each other."""
        return range(self.offset, self.offset + 4 * self.words * max(1, self.count), 4)

    def pack(self, value: int | Mapping[str, int]) -> int:
        """The register's content, from a number or from values of all its fields.

        Raises ValueError if a value is too large.
        """
        if not isinstance(value, Mapping):
            return self._fitting(self.name, value, self.bits)
        return sum(
            self._fitting(f"{self.name}.{field.name}", value[field.name], field.bits) << field.low
            for field in self.fields
        )

    @staticmethod
    def _fitting(name: str, value: int, bits: int) -> int:
        if not 0 <= value < 1 << bits:
            raise ValueError(f"{name} is {value}; the register holds {bits} bits of it")
        return value


#: Values of the register STATUS.
STATES = {
    "IDLE": (0, "ready for start"),
    "RUNNING": (1, "running, or waiting for memory"),
    "HOST": (2, "waiting for the host's answer to a HOST descriptor"),
    "STEP": (3, "waiting for the host's answer to a committed step"),
    "STOPPING": (4, "waiting for outstanding transactions, then ERROR"),
    "ERROR": (5, "stopped; ERROR says why, writing STOP returns to IDLE"),
}

#: Values to write to HOST_ANSWER.
ANSWERS = {
    "CONTINUE": (0, "go on"),
    "FINISH": (1, "after a step: end the run"),
    "FAIL": (2, "end the run with the error HOST_REFUSED"),
}

#: What the values of the register ERROR mean.
ERRORS = {
    ErrorCode.NONE: "no error",
    ErrorCode.UNKNOWN_KIND: "a descriptor is of no known kind, mode or operation, or an operation "
    "has no such target",
    ErrorCode.RESERVED: "a descriptor field does not have the value that its kind demands, mostly "
    "0",
    ErrorCode.BAD_SIZE: "a size of a descriptor is 0 or more than the configuration allows",
    ErrorCode.MISALIGNED: "an address of a descriptor is not a multiple of a beat, or a distance "
    "of an activation word, or it has more bits than the ports",
    ErrorCode.NO_END: "a program has no END within PROGRAM_LENGTH descriptors",
    ErrorCode.READ_OUTSIDE: "a read would leave the read region",
    ErrorCode.READ_SLVERR: "memory answered a read with SLVERR",
    ErrorCode.READ_DECERR: "memory answered a read with DECERR",
    ErrorCode.WRITE_OUTSIDE: "a write would leave the write region",
    ErrorCode.WRITE_SLVERR: "memory answered a write with SLVERR",
    ErrorCode.WRITE_DECERR: "memory answered a write with DECERR",
    ErrorCode.HOST_TIMEOUT: "the host gave no answer within HOST_TIMEOUT cycles",
    ErrorCode.HOST_REFUSED: "the host answered FAIL, or FINISH to a HOST descriptor",
    ErrorCode.STOPPED: "the host wrote STOP",
    ErrorCode.BAD_REGISTER: "start was written with an impossible value in the register whose "
    "offset ERROR_ADDRESS holds",
    ErrorCode.NONFINITE: "a result of a product is infinite or NaN",
    ErrorCode.MEMORY_TIMEOUT: "memory has not answered for MEMORY_TIMEOUT cycles, or start was "
    "written while it still owed answers from such a run",
}

#: Counters of 64 bits. They count from reset or CLEAR_COUNTERS on, while a run is under way.
COUNTERS = {
    "CYCLES": "cycles of runs",
    "HOST_CYCLES": "cycles of waiting for the host",
    "COMPUTE_CYCLES": "cycles in which the array took weight words",
    "WEIGHT_STALLS": "cycles in which the array had work but no weight words",
    "GROUP_STALLS": "the same, but no group bytes",
    "ACTIVATION_STALLS": "the same, but no activations",
    "RESULT_STALLS": "the same, but no room for results",
    "VERIFY_CYCLES": "cycles with the oldest unfinished descriptor a GEMM in verify mode",
    "DRAFT_CYCLES": "the same, GEMM in draft mode",
    "BYPASS_CYCLES": "the same, GEMM in bypass mode",
    "ATTENTION_CYCLES": "the same, ATTENTION",
    "ARGMAX_CYCLES": "the same, ARGMAX or RERANK",
    "DESCRIPTORS": "descriptors started",
    "DRAFT_PASSES": "draft passes finished, each of which drafted a token",
    "VERIFY_PASSES": "verify passes finished",
    "ALTERNATES": "alternates verified",
    "ACCEPTED": "drafted tokens of the chain that were accepted",
    "ALTERNATE_HITS": "alternates that were accepted",
    "COMMITTED": "tokens committed",
    "GUESSES": "guesses from the history verified",
    "GUESS_HITS": "guesses that were accepted",
    "FREE_STEPS": "steps that guessed without a draft pass",
    "VECTOR_CYCLES": "cycles with an unfinished VECTOR descriptor",
    "VECTOR_STALLS": "of these, cycles in which the vector unit waits for operands",
}


def constants(config: AcceleratorConfig) -> dict[str, int | dict[str, int]]:
    """Values of the registers that never change; of those with fields, the fields' values."""
    engine, number_format = config.engine, config.engine.format
    return {
        "ID": IDENTIFICATION,
        "VERSION": VERSION,
        "ARRAY": {"rows": engine.rows, "cols": engine.cols, "draft_rows": engine.draft_rows},
        "MAX_K": engine.max_k,
        "MAX_O": engine.max_o,
        "FORMAT": {
            "group": number_format.group,
            "split": number_format.split,
            "width": DRAFT_BITS,
        },
        "BUS": {
            "weights_bytes": config.weights.beat_bytes,
            "data_bytes": config.data.beat_bytes,
            "activation_bytes": config.activation_bytes,
        },
        "ADDRESS_BITS": config.address_bits,
        "MAX_CHOICES": config.choices,
        "HISTORY_SIZE": config.history,
        "VECTOR": {"lanes": config.lanes, "query_heads": config.query_heads},
        "SCRATCH_SIZE": config.scratch,
    }


def _address(name: str, offset: int, about: str, access: str = "rw") -> Register:
    return Register(name, offset, access, about, bits=64)


@lru_cache(maxsize=8)
def registers(config: AcceleratorConfig) -> tuple[Register, ...]:
    """All registers of a configuration, by rising offset. Those of the history and of guesses are
    not there if it has no history, MOVE_PROGRAM and RUN.move not without lanes, SCRATCH not without
    scratch memory."""
    rows = config.engine.rows
    states = ", ".join(f"{value} {name}" for name, (value, _) in STATES.items())
    answers = ", ".join(f"{value} {name}" for name, (value, _) in ANSWERS.items())
    kinds = ", ".join(f"{kind.value} {kind.name}" for kind in PassKind)
    interrupts = (
        Field("host", 0, 1, "the accelerator waits for HOST_ANSWER; cleared by the answer"),
        Field("done", 1, 1, "a run has ended without an error"),
        Field("error", 2, 1, "the state ERROR has been entered"),
    )
    about = "with speculate: move the KV entries of accepted rows to their places"
    moves = (Field("move", 4, 1, about),) if config.lanes else ()
    plain = (
        Register("ID", 0x000, "ro", f"0x{IDENTIFICATION:08x}, 'SPEQ'"),
        Register("VERSION", 0x004, "ro", f"0x{VERSION:08x}, of the register map"),
        Register(
            "ARRAY",
            0x008,
            "ro",
            "the array",
            fields=(
                Field("rows", 0, 8, "rows R: tokens of a pass"),
                Field("cols", 8, 16, "columns C: outputs of a tile"),
                Field("draft_rows", 24, 8, "rows that can draft"),
            ),
        ),
        Register("MAX_K", 0x00C, "ro", "largest reduction dimension"),
        Register("MAX_O", 0x010, "ro", "largest output dimension"),
        Register(
            "FORMAT",
            0x014,
            "ro",
            "the number format",
            fields=(
                Field("group", 0, 8, "weights that share a base exponent"),
                Field("split", 8, 4, "exponents told apart by their top mantissa bit"),
                Field("width", 12, 4, "bits of a draft weight"),
            ),
        ),
        Register(
            "BUS",
            0x018,
            "ro",
            "the ports",
            fields=(
                Field("weights_bytes", 0, 8, "bytes of a beat of the weights port"),
                Field("data_bytes", 8, 8, "bytes of a beat of the data port"),
                Field("activation_bytes", 16, 16, "bytes of an activation word"),
            ),
        ),
        Register("ADDRESS_BITS", 0x01C, "ro", "bits of an address in memory", bits=8),
        Register(
            "CONTROL",
            0x020,
            "wo",
            "commands; each bit is one",
            bits=3,
            fields=(
                Field("start", 0, 1, "start a run; ignored unless IDLE"),
                Field("stop", 1, 1, "end the run with the error STOPPED, or leave ERROR for IDLE"),
                Field("clear_counters", 2, 1, "set all counters to 0"),
            ),
        ),
        Register("STATUS", 0x024, "ro", f"state: {states}", bits=3),
        Register("ERROR", 0x028, "ro", "error code of the last run; see the table", bits=5),
        Register("MAX_CHOICES", 0x02C, "ro", "entries of a ranking", bits=8),
        _address(
            "ERROR_ADDRESS",
            0x030,
            "of the malformed descriptor, the refused transfer, the burst that failed, the "
            "descriptor that the host did not answer, the product's descriptor for NONFINITE, or "
            "the register; 0 for STOPPED and MEMORY_TIMEOUT",
            "ro",
        ),
        Register("IRQ_ENABLE", 0x038, "rw", "interrupts that raise irq", 3, interrupts),
        Register("IRQ_STATUS", 0x03C, "w1c", "interrupts that are pending", 3, interrupts),
        _address("READ_BASE", 0x040, "first byte that may be read"),
        _address("READ_LIMIT", 0x048, "last byte that may be read"),
        _address("WRITE_BASE", 0x050, "first byte that may be written"),
        _address("WRITE_LIMIT", 0x058, "last byte that may be written"),
        _address("PASS_PROGRAM", 0x060, "program of single passes"),
        _address("DRAFT_PROGRAM", 0x068, "program of draft passes; ends with a ranking"),
        _address("VERIFY_PROGRAM", 0x070, "program of verify passes; ends with a ranking"),
        Register("PROGRAM_LENGTH", 0x078, "rw", "most descriptors of a program", bits=16),
        Register("HOST_TIMEOUT", 0x07C, "rw", "cycles that the host may take to answer, 0: any"),
        Register(
            "RUN",
            0x080,
            "rw",
            "what a run is",
            bits=4 + len(moves),
            fields=(
                Field("speculate", 0, 1, "0: one pass of PASS_PROGRAM, 1: decode"),
                Field("sample", 1, 1, "rank logits times SCALE plus noise instead of logits"),
                Field("truncate", 2, 1, "with sample: rank no logits below the cut-off"),
                Field("steps", 3, 1, "with speculate: wait in the state STEP behind every step"),
                *moves,
            ),
        ),
        Register("PASS_ROWS", 0x084, "rw", "rows of a single pass, 1 to R", bits=8),
        Register(
            "POSITION", 0x088, "rw", "entries in the KV cache; a run moves it on", 17, updated=True
        ),
        Register("ROOT", 0x08C, "rw", "last committed token; a run moves it on", 24, updated=True),
        Register("DRAFT_LENGTH", 0x090, "rw", "longest chain L, 0 to R - 1; 0: plain", bits=8),
        Register("THRESHOLD", 0x094, "rw", "FP32: a smaller logit margin ends the chain"),
        Register("CHOICES", 0x098, "rw", "choices of a chain position, 1 to MAX_CHOICES", bits=4),
        Register("TOKEN_LIMIT", 0x09C, "rw", "tokens after which a run ends, at least 1", bits=32),
        _address("RING", 0x0A0, "ring of committed tokens, uint32 each"),
        Register(
            "RING_LOG2", 0x0A8, "rw", f"log2 of the ring's tokens, 1 to {MAX_RING_LOG2}", bits=5
        ),
        Register("RING_INDEX", 0x0AC, "ro", "tokens written to the ring since the run started"),
        Register("HOST_ARGUMENT", 0x0B0, "ro", "argument of the HOST descriptor"),
        Register("HOST_ANSWER", 0x0B4, "wo", f"the host's answer: {answers}", bits=2),
        Register(
            "PASS",
            0x0B8,
            "ro",
            "the pass under way, or the last one; moves of KV entries are none here",
            fields=(
                Field("kind", 0, 2, kinds),
                Field("rows", 8, 8, "rows in use"),
                Field("index", 16, 8, "of a draft pass in its chain, from 0"),
            ),
        ),
        Register("PASS_POSITION", 0x0BC, "ro", "KV entries before the pass's rows", bits=17),
        Register(
            "STEP",
            0x0C0,
            "ro",
            "the last committed step",
            fields=(
                Field("committed", 0, 8, "tokens committed"),
                Field("accepted", 8, 8, "of the chain"),
                Field("last_row", 16, 8, "the row that the last token was chosen by"),
                Field("chain", 24, 8, "length of the chain"),
            ),
        ),
        Register("HISTORY_SIZE", 0x0C4, "ro", "most tokens of the history, 0: none", bits=17),
    )
    history = (
        Register(
            "HISTORY_LENGTH",
            0x0C8,
            "rw",
            "tokens of the history, which ends with the last; a smaller number forgets the oldest; "
            "HISTORY and every committed token move it on",
            bits=17,
            updated=True,
        ),
        Register(
            "HISTORY",
            0x0CC,
            "wo",
            "append a token to the history; ignored while a run is under way",
            bits=24,
        ),
        Register(
            "GUESS_LIMIT",
            0x0D4,
            "rw",
            "a step whose guess costs less has no draft pass; 0: every step has",
            bits=8,
        ),
        Register(
            "GUESS_COSTS",
            0x0D8,
            "rw",
            "cost of each token behind a match in the history",
            fields=tuple(
                Field(f"length_{i + 1}", 8 * i, 8, f"of {about}; 255: never guessed")
                for i, about in enumerate(("1 token", "2 tokens", "3 tokens", "4 tokens or more"))
            ),
        ),
    )
    costs = (
        Register(
            "COST_LIMIT", 0x0D0, "rw", "a chain that costs more has no further token", bits=16
        ),
        *(
            Register(
                name,
                offset,
                "rw",
                f"cost of {about}, by the logit gap's index, four to an element",
                count=GAP_COSTS // COSTS_PER_REGISTER,
            )
            for name, offset, about in (
                ("CHAIN_COSTS", 0x0E0, "a chain token"),
                ("ALTERNATE_COSTS", 0x0F0, "an alternate"),
            )
        ),
    )
    vector = Register(
        "VECTOR",
        0x0DC,
        "ro",
        "the vector unit",
        fields=(
            Field("lanes", 0, 8, "elements that it takes in a cycle, 0: there is none"),
            Field("query_heads", 8, 16, "most query heads of a model that it works for"),
        ),
    )
    others = (vector, *costs, *(history if config.history else ()))
    more = sorted(others, key=lambda each: each.offset)
    counters = tuple(
        Register(name, _COUNTERS + 8 * i, "ro", about, bits=64)
        for i, (name, about) in enumerate(COUNTERS.items())
    )
    sampling = (
        Register("SCALE", _SAMPLING, "rw", "FP32: what logits are multiplied by, 1 / temperature"),
        Register(
            "CUTOFF",
            _SAMPLING + 4,
            "rw",
            "FP32, added to a row's largest logit: the cut-off, T ln(min-p)",
        ),
        Register("SEED", _SAMPLING + 8, "rw", "seed of the noise", bits=64),
    )
    scratch = _address(
        "SCRATCH",
        _ENDS + 0x18,
        "first byte of the window of SCRATCH_SIZE bytes that is on chip, a multiple of "
        f"{PAGE_BYTES:,}; 0: there is none, and all is in memory",
    )
    move = (_address("MOVE_PROGRAM", _ENDS + 0x10, "program of moves of KV entries"),)
    ends = (
        Register(
            "PROMPT_END",
            _ENDS,
            "rw",
            "with RUN.speculate: entries that single passes fill, from POSITION on, before the run "
            "decodes; up to POSITION: none",
            bits=17,
        ),
        Register(
            "STOP_TOKENS",
            _ENDS + 0x04,
            "rw",
            f"elements of STOP_TOKEN that count, 0 to {MAX_STOP_TOKENS}",
            bits=4,
        ),
        Register(
            "MEMORY_TIMEOUT",
            _ENDS + 0x08,
            "rw",
            "cycles without a transfer on either port in which memory may owe an answer, 0: any",
        ),
        Register(
            "SCRATCH_SIZE", _ENDS + 0x0C, "ro", "bytes of the scratch memory, 0: there is none"
        ),
        *(move if config.lanes else ()),
        *((scratch,) if config.scratch else ()),
        Register(
            "STOP_TOKEN",
            _ENDS + 0x20,
            "rw",
            "a run commits nothing behind such a token, and ends",
            24,
            count=MAX_STOP_TOKENS,
        ),
    )
    arrays = (
        Register("ROW_TOKEN", _ROW_TOKENS, "ro", "token of each row of the pass", 24, count=rows),
        Register(
            "ROW_PLACE",
            _ROW_PLACES,
            "ro",
            "place of each row in the pass",
            18,
            (
                Field("depth", 0, 8, "position less PASS_POSITION"),
                Field("parent", 8, 8, "the row that it follows; of row 0: 0"),
                Field("origin", 16, 2, "0 root or chain, 1 alternate, 2 guess"),
            ),
            rows,
        ),
    )
    return (*plain, *more, *counters, *sampling, *ends, *arrays)
