# SPDX-License-Identifier: Apache-2.0
"""Descriptors: the instructions of a program in memory.

A program is an array of descriptors of 64 bytes, little-endian, at a multiple of 64 (and of the
ports' beats); it ends with END. `FORMS` says what each kind does and which fields it uses; the
others must be 0. Sizes in bytes refer to an array of C columns.

Descriptors run one after the other but overlap: with `wait` one starts only when all before it are
finished, without it the order must not matter. HOST, ARGMAX, RERANK and END wait in any case.

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


#: The bits of a descriptor.
DESCRIPTOR = data.StructLayout(
    {
        "kind": 8,
        "mode": 2,
        "half": 1,
        "wait": 1,
        "discard": 1,
        "values": 1,
        "reserved": 2,
        "tokens": 8,
        "sharing": 8,
        "k": 32,
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
        multiple of; it has no more bits than the port's addresses
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
_WAIT = Use("1: start only when all descriptors before it are finished")
_GEMM = {
    "mode": Use("what the weights' words hold"),
    "wait": _WAIT,
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
        {"half": _HALF} | _GEMM,
    ),
    DescriptorKind.ARGMAX: Form(
        "A GEMM in FP32 whose results are ranked as they leave the array: the best of each "
        "row, as many as a ranking has entries, ties to the lowest index, NaN as minus infinity.",
        {
            "discard": Use("1: the results themselves are not written"),
            "extra": Use(
                "address of the ranking, 0: it is not written; per row MAX_CHOICES pairs of "
                "index (uint32) and FP32 result; pairs that do not exist are all ones and "
                "0xff800000",
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
    `stride` in place of `extra`, which holds one of them. `tokens` holds `candidates` as well."""

    kind: DescriptorKind
    mode: Mode = Mode.VERIFY
    half: bool = False
    wait: bool = False
    discard: bool = False
    values: bool = False
    tokens: int = 0
    sharing: int = 0
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

    def pack(self) -> bytes:
        """The descriptor as it lies in memory. Raises ValueError if a value is too large, or if two
        do not fit into one descriptor."""
        if self.ranking and self.stride:
            raise ValueError("a descriptor has either a ranking or a stride")
        if self.tokens and self.candidates:
            raise ValueError("a descriptor has either tokens or candidates")
        word = 0
        for name, value in vars(self).items():
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
