# SPDX-License-Identifier: Apache-2.0
"""Descriptors: the instructions of a program in memory.

A program is an array of descriptors of 64 bytes, little-endian, at a multiple of 64 (and of the
ports' beats); it ends with END. `FORMS` says what each kind does and which fields it uses; the
others must be 0. Sizes in bytes refer to an array of C columns.

Descriptors run one after the other but overlap: with `wait` one starts only when all before it that
are of its class, products or VECTORs, are finished, with `behind` when enough of the other class
are, and otherwise the order must not matter. HOST, ARGMAX, RERANK and END wait for all in any case.

Planes and group bytes are those of `speq.model.format`, cut into tiles of C outputs, with two
additions: a tile's group bytes are padded to a multiple of the data port's beat, and every buffer
starts at a multiple of `AcceleratorConfig.alignment`. Activations are words of
`AcceleratorConfig.activation_bytes`: word i holds activation i of all rows as FP16 (verify,
bypass), or block activations 4i .. 4i + 3 of the drafting rows (draft;
`EngineConfig.activation_layout`); what a pass does not use is 0. Results are [tile][token][column],
FP32 or FP16.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from amaranth.hdl import unsigned
from amaranth.lib import data, enum

from speq.hw.engine_config import Mode

#: Bytes of a descriptor.
DESCRIPTOR_BYTES = 64


class DescriptorKind(enum.Enum, shape=unsigned(8)):
    """What a descriptor asks for."""

    GEMM = 1
    ATTENTION = 2
    ARGMAX = 3
    HOST = 4
    END = 5
    RERANK = 6
    VECTOR = 7


class VectorOperation(enum.Enum, shape=unsigned(4)):
    """What a VECTOR descriptor computes; `FORMS` says of which operands."""

    EMBED = 1
    ADD = 2
    MULTIPLY = 3
    NORM = 4
    ROTATE = 5
    ROUND = 6
    GATE = 7
    SIGMOID_GATE = 8
    SOFTMAX = 9
    NORMALIZE = 10
    QUANTIZE = 11
    MOVE = 12


class Target(enum.Enum, shape=unsigned(4)):
    """Where, and in which form, a VECTOR descriptor leaves its results.

    T are the rows of the pass, A are `AcceleratorConfig.activation_bytes`, c is a column of tile i
    of a segment, and element e is i C + c. Only elements below `k` (SOFTMAX: below the entries that
    the pass sees) are written, but whole tiles of TILES and VALUES.
    """

    #: FP32 [segment][tile][row][column], as the results of a GEMM.
    TILES = 0
    #: FP16, row t of word e at ``results + e A + 2 t``: a GEMM's activations.
    ACTIVATIONS = 1
    #: Segments are query heads h; g = h // sharing, n = (h % sharing) T + t: FP16 at
    #: ``results + g outer + (n // R) inner + e A + 2 (n % R)``, an ATTENTION's activations.
    QUERIES = 2
    #: Segments are KV heads g; p = position + t: FP16 at
    #: ``results + g outer + (p // C) inner + 2 C e + 2 (p % C)``, the KV cache's keys.
    KEYS = 3
    #: Segments are KV heads g: FP16 at ``results + g outer + i inner + 2 C (position + t) + 2 c``,
    #: the KV cache's values; `outer` and `inner` are multiples of a beat of the data port.
    VALUES = 4
    #: Segments are batches b of an ATTENTION, i its row: FP16 at ``results + b d + e A + 2 i``,
    #: where d are the bytes of a word for each entry that the pass sees, rounded up to whole beats
    #: of the data port: an ATTENTION's activations.
    WEIGHTS = 5
    #: Row n of an ATTENTION is row t of query head h of the KV head, n = h T + t: FP16 at
    #: ``results + h outer + e A + 2 t``, a GEMM's activations.
    CONTEXT = 6
    #: Draft activations, words as of a GEMM in mode DRAFT, of FP16 results of at most as many rows
    #: as can draft; zeros up to the end of a beat of the data port.
    DRAFT_ACTIVATIONS = 7


#: The targets that are the activations of all products with one input.
SINGLE_TARGETS = (Target.ACTIVATIONS, Target.DRAFT_ACTIVATIONS)

#: The targets of each operation.
TARGETS = {
    VectorOperation.EMBED: (Target.TILES,),
    VectorOperation.ADD: (Target.TILES,),
    VectorOperation.MULTIPLY: (Target.TILES, *SINGLE_TARGETS),
    VectorOperation.NORM: (Target.TILES, *SINGLE_TARGETS),
    VectorOperation.ROTATE: (Target.QUERIES, Target.KEYS),
    VectorOperation.ROUND: (Target.QUERIES, Target.KEYS, Target.VALUES),
    VectorOperation.GATE: SINGLE_TARGETS,
    VectorOperation.SIGMOID_GATE: SINGLE_TARGETS,
    VectorOperation.SOFTMAX: (Target.WEIGHTS,),
    VectorOperation.NORMALIZE: (Target.CONTEXT,),
    VectorOperation.QUANTIZE: (Target.TILES,),
    VectorOperation.MOVE: (Target.TILES,),
}


#: The bits of a descriptor.
DESCRIPTOR = data.StructLayout(
    {
        "kind": 8,
        "mode": 2,
        "half": 1,
        "wait": 1,
        "discard": 1,
        "values": 1,
        "behind": 2,
        "tokens": 8,
        "sharing": 8,
        "k": 24,
        "operation": 4,
        "target": 4,
        "o": 32,
        "argument": 32,
        "plane": 64,
        "residual": 64,
        "groups": 64,
        "activations": 64,
        "results": 64,
        "extra": 64,
    }
)
# Offset and width of each member: Amaranth works them out anew whenever it is asked.
_PLACES = {name: (place.offset, place.width) for name, place in DESCRIPTOR}


@dataclass(frozen=True)
class Use:
    """How a kind of descriptor uses a field.

    Attributes
    ----------
    about : what it means
    port : of an address or a distance in bytes "weights" or "data", the port whose beat it is a
        multiple of, or "word": a multiple of `AcceleratorConfig.activation_bytes`; it has no more
        bits than the ports' addresses
    modes : the modes that use it; in others it must be 0
    values : the value of the field `values` with which it is used; with the other it must be 0
    name : what `Descriptor` calls it, where the member of the layout serves several meanings
    """

    about: str
    port: str | None = None
    modes: frozenset[Mode] = frozenset(Mode)
    values: bool | None = None
    name: str | None = None


@dataclass(frozen=True)
class Form:
    """A kind of descriptor: what it does, and how it uses which members of `DESCRIPTOR` besides
    `kind`. All others must be 0."""

    about: str
    uses: dict[str, Use] = field(default_factory=dict)


_HALF = Use("1: results are FP16, 0: FP32")
_WAIT = Use("1: start only when all products before it are finished")
_BEHIND = Use(
    "n > 0: start only when all VECTORs before it but the last n - 1 are finished; 0: whatever "
    "they do"
)
_GEMM = {
    "mode": Use("what the weights' words hold"),
    "wait": _WAIT,
    "behind": _BEHIND,
    "tokens": Use(
        "rows of activations and results, 0: the rows of the pass; at most R, in mode DRAFT at "
        "most the rows that can draft"
    ),
    "k": Use("activations of a row, 1 to the largest K"),
    "o": Use("results of a row, 1 to the largest O"),
    "plane": Use("address of the draft plane, in mode BYPASS of plain FP16 words", "weights"),
    "residual": Use("address of the residual plane", "weights", frozenset({Mode.VERIFY})),
    "groups": Use("address of the group bytes", "data", frozenset({Mode.VERIFY, Mode.DRAFT})),
    "activations": Use("address of the activations", "data"),
    "results": Use("address of the results", "data"),
}
#: The kinds of descriptors: the source of the documentation and of all checks.
FORMS = {
    DescriptorKind.GEMM: Form(
        "results[tokens, o] = activations[tokens, k] times weights[o, k] transposed.",
        {"half": _HALF}
        | _GEMM
        | {
            "sharing": Use(
                "tiles of another product before the results, which are that far behind `results`",
                name="tile",
            )
        },
    ),
    DescriptorKind.ARGMAX: Form(
        "A GEMM in FP32 whose results are ranked as they leave the array: the best of each "
        "row, as many as a ranking has entries, ties to the lowest index, NaN as minus infinity.",
        {
            "discard": Use("1: the results themselves are not written"),
            "extra": Use(
                "address of the ranking, 0: it is not written; per row MAX_CHOICES pairs of "
                "index (uint32) and FP32 result; pairs that do not exist are all ones and "
                "0xff800000. With lanes that of draft pass i of a chain is i times the bytes of a "
                "row, in whole beats, behind it",
                "data",
                name="ranking",
            ),
        }
        | _GEMM,
    ),
    DescriptorKind.RERANK: Form(
        "Computes the best outputs of row 0 of the ranking before it anew, in mode VERIFY of an "
        "encoded layer with one row of activations, in FP32; row 0's ranking is then that of these "
        "outputs alone, and there are no other rows. Only the tiles with such outputs are read and "
        "multiplied. There must be an ARGMAX before it in the program.",
        {
            "tokens": Use(
                "outputs that are computed anew, 1 to MAX_CHOICES: the best of the ranking, or all "
                "if it has fewer",
                name="candidates",
            ),
            "k": _GEMM["k"],
            "plane": Use("address of the layer's draft plane", "weights"),
            "residual": Use("address of its residual plane", "weights"),
            "groups": Use("address of its group bytes", "data"),
            "activations": _GEMM["activations"],
            "extra": Use(
                "address of the ranking, 0: it is not written; as of ARGMAX, of one row",
                "data",
                name="ranking",
            ),
        },
    ),
    DescriptorKind.ATTENTION: Form(
        "A product with one head of the KV cache (plain FP16 words, the remap bypassed) for rows * "
        "`sharing` rows, in batches of at most R rows, where rows are the pass's and S = position "
        "+ rows the KV entries that it sees, at most the largest K. Without `values`: queries [k] "
        "times the keys, S outputs. With `values`: softmax weights [S] times the values, o "
        "outputs. Activations and results of the batches follow each other, the activations of "
        "each batch at a multiple of a beat of the data port.",
        {
            "half": _HALF,
            "wait": _WAIT,
            "behind": _BEHIND,
            "values": Use("0: a product with keys, 1: with values"),
            "sharing": Use("query heads that share the KV head, from 1"),
            "k": Use("elements of a query, 1 to the largest K", values=False),
            "o": Use("elements of a value, 1 to the largest O", values=True),
            "plane": Use("address of the head's keys or values", "weights"),
            "activations": Use("address of queries or softmax weights", "data"),
            "results": Use("address of the results", "data"),
            "extra": Use(
                "distance of the plane's tiles, 0: they follow each other",
                "weights",
                name="stride",
            ),
        },
    ),
    DescriptorKind.VECTOR: Form(
        "Vector work, bit for bit as `speq.model.vector_ops`, on segments (1, heads, or the "
        "batches of an ATTENTION) of ceil(k / C) tiles of rows of C elements. x is the first "
        "operand and y the second, FP32 [segment][tile][row][column], with `values` y is the same "
        "for all rows, [segment][tile][column]; what follows a row's elements in its last tile is "
        "finite, and 0 for NORM. EMBED: argument * the token's row of a table of FP16 rows. ADD: "
        "argument * x + y. MULTIPLY: (x * y) * argument. NORM: (x * rsqrt(argument * row_sum(x * "
        "x) + eps)) * y. ROTATE: rotary embedding of pairs of neighbours, with a table y of rows "
        "by position, FP32 cosine and sine of each pair. ROUND: x. GATE: (x * y) * sigmoid(x). "
        "SIGMOID_GATE: x * sigmoid(y). SOFTMAX: weights of the scores x of one KV head, scaled by "
        "argument; the reciprocals of their sums are kept. NORMALIZE: x times these. QUANTIZE: "
        "draft activations, words as of a GEMM in mode DRAFT, of FP16 activations at x. MOVE: "
        "copies a KV entry p of a block to the pass's position: with keys at x FP16 number p % C "
        "of the o k lines of 2 C bytes from x + (p // C) inner on, with values at y 2 C bytes at "
        "y + i outer + 2 C p for each i below o ceil(k / C); p is 0 but in passes that move "
        "entries. The target says where the results of others go, and in which form. There are "
        "such descriptors only if the configuration has lanes. What an operation does not use has "
        "no effect.",
        {
            "operation": Use("VectorOperation"),
            "target": Use("Target"),
            "wait": Use("1: start only when all VECTORs before it are finished"),
            "behind": Use(
                "n > 0: start only when all products before it but the last n - 1 are finished; 0: "
                "whatever they do"
            ),
            "values": Use(
                "1: y is the same for all rows (ADD, MULTIPLY, NORM, where it must be 1); EMBED: "
                "row t's token is the uint32 at y + 4 (position + t), 0: that of the pass"
            ),
            "sharing": Use(
                "query heads per KV head (SOFTMAX, NORMALIZE, target QUERIES); to TILES, "
                "ACTIVATIONS and DRAFT_ACTIVATIONS: tiles before those of x (not EMBED), of y "
                "without `values`, and of results to TILES, which lie behind their addresses by "
                "as many"
            ),
            "k": Use("elements of a row of a segment, 1 to the largest K (not SOFTMAX)"),
            "o": Use(
                "segments, 1 to the most query heads; SOFTMAX, NORMALIZE: the number of the KV "
                "head's first query head"
            ),
            "argument": Use(
                "an FP32 constant (EMBED, ADD, MULTIPLY, SOFTMAX), NORM: the one nearest to 1 / k"
            ),
            "activations": Use("address of x", "data", name="first"),
            "plane": Use("address of y", "data", name="second"),
            "results": Use("address of the results", "data"),
            "residual": Use(
                "a distance of the target, or MOVE's; of VALUES and MOVE a multiple of a beat",
                "word",
                name="outer",
            ),
            "groups": Use(
                "a distance of the target, or MOVE's; of VALUES and MOVE a multiple of a beat",
                "word",
                name="inner",
            ),
            "extra": Use(
                "32 bits: NORM: eps in FP32; SOFTMAX: positions that a row sees at most, 0: all; "
                "EMBED, ROTATE: bytes from a row of the table to the next, a multiple of a beat of "
                "the data port",
                name="detail",
            ),
        },
    ),
    DescriptorKind.HOST: Form(
        "Interrupts the host and waits for its answer. All descriptors before it are finished.",
        {"argument": Use("a number for the host")},
    ),
    DescriptorKind.END: Form("The program's end, when all descriptors before it are finished."),
}
_MEMBERS = {
    use.name: member for form in FORMS.values() for member, use in form.uses.items() if use.name
}


@dataclass(frozen=True)
class Descriptor:
    """One descriptor, for writing programs; the fields are those of `DESCRIPTOR`, but `ranking` and
    `stride` in place of `extra`, which holds one of them. `tokens` holds `candidates` as well, and
    a VECTOR has names of its own for some (`FORMS`)."""

    kind: DescriptorKind
    mode: Mode = Mode.VERIFY
    half: bool = False
    wait: bool = False
    behind: int = 0
    discard: bool = False
    values: bool = False
    tokens: int = 0
    sharing: int = 0
    tile: int = 0
    k: int = 0
    o: int = 0
    argument: int = 0
    plane: int = 0
    residual: int = 0
    groups: int = 0
    activations: int = 0
    results: int = 0
    ranking: int = 0
    stride: int = 0
    candidates: int = 0
    operation: VectorOperation | int = 0
    target: Target | int = 0
    first: int = 0
    second: int = 0
    outer: int = 0
    inner: int = 0
    detail: int = 0

    def pack(self) -> bytes:
        """The descriptor as it lies in memory. Raises ValueError if a value is too large, or if two
        do not fit into one descriptor."""
        if self.ranking and self.stride:
            raise ValueError("a descriptor has either a ranking or a stride")
        if self.tokens and self.candidates:
            raise ValueError("a descriptor has either tokens or candidates")
        if self.sharing and self.tile:
            raise ValueError("a descriptor has either sharing heads or tiles before it")
        word = 0
        for name, value in vars(self).items():  # asdict copies, which is slow
            offset, width = _PLACES[_MEMBERS.get(name, name)]
            number = int(getattr(value, "value", value))
            if not 0 <= number < 1 << width:
                raise ValueError(f"{name} is {number}; a descriptor holds {width} bits of it")
            word |= number << offset
        return word.to_bytes(DESCRIPTOR_BYTES, "little")


def unpack(content: bytes) -> dict[str, int]:
    """The members of a descriptor in memory. Raises ValueError if it is not 64 bytes long."""
    if len(content) != DESCRIPTOR_BYTES:
        raise ValueError(f"a descriptor has {DESCRIPTOR_BYTES} bytes, not {len(content)}")
    word = int.from_bytes(content, "little")
    return {name: word >> offset & (1 << width) - 1 for name, (offset, width) in _PLACES.items()}
