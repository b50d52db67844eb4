# SPDX-License-Identifier: Apache-2.0
"""Descriptors: the instructions of a program in memory.

A program is an array of descriptors of 64 bytes, little-endian, at a multiple of 64 (and of the
ports' beats); it ends with END. Fields that a kind does not use must be 0. Sizes in bytes refer to
an array of C columns.

GEMM
    results[tokens, o] = activations[tokens, k] times weights[o, k] transposed, in `mode`. `tokens`
    0 means the rows of the pass. `half` asks for FP16 results.
ARGMAX
    A GEMM in FP32 whose results are ranked as they leave the array: the four largest of each row,
    ties to the lowest index, NaN as minus infinity. With `discard` the results themselves are not
    written. `extra`, if not 0, is where the ranking goes: per row four pairs of index (uint32) and
    FP32 result, 32 bytes; pairs that do not exist are all ones and 0xff800000.
ATTENTION
    A product with one head of the KV cache (plain FP16 words, the remap bypassed) for
    tokens * `sharing` rows, in batches of at most R rows: `tokens` is the pass's rows, and S the
    KV entries that it sees, position + rows. Without `values`: queries [k] times the keys,
    o = S outputs; the descriptor's o is 0. With `values`: softmax weights [S] times the values,
    o outputs; the descriptor's k is 0. `extra` is the distance in bytes of the plane's tiles, 0 if
    they follow each other. Activations and results of the batches follow each other, the
    activations of each batch at a multiple of a beat of the data port.
HOST
    Interrupts the host with `argument` and waits for its answer. All descriptors before it are
    finished.
END
    The program's end, when all descriptors before it are finished.

Descriptors run one after the other but overlap: with `wait` one starts only when all before it are
finished, without it the order must not matter.

Planes and group bytes are those of `speq.model.format`, cut into tiles of C outputs, with two
additions: a tile's group bytes are padded to a multiple of the data port's beat, and every buffer
starts at a multiple of `AcceleratorConfig.alignment`. Activations are words of
`AcceleratorConfig.activation_bytes`: word i holds activation i of all rows as FP16 (verify,
bypass), or block activations 4i .. 4i + 3 of the drafting rows (draft;
`EngineConfig.activation_layout`); what a pass does not use is 0. Results are [tile][token][column],
FP32 or FP16.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass

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


@dataclass(frozen=True)
class Descriptor:
    """One descriptor, for writing programs; the fields are those of `DESCRIPTOR`."""

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
    extra: int = 0

    def pack(self) -> bytes:
        """The descriptor as it lies in memory. Raises ValueError if a value is too large."""
        word = 0
        for name, value in asdict(self).items():
            place = DESCRIPTOR[name]
            number = int(getattr(value, "value", value))
            if not 0 <= number < 1 << place.width:
                raise ValueError(f"{name} is {number}; a descriptor holds {place.width} bits of it")
            word |= number << place.offset
        return word.to_bytes(DESCRIPTOR_BYTES, "little")


def unpack(content: bytes) -> dict[str, int]:
    """The fields of a descriptor in memory. Raises ValueError if it is not 64 bytes long."""
    if len(content) != DESCRIPTOR_BYTES:
        raise ValueError(f"a descriptor has {DESCRIPTOR_BYTES} bytes, not {len(content)}")
    word = int.from_bytes(content, "little")
    return {name: word >> place.offset & (1 << place.width) - 1 for name, place in DESCRIPTOR}
