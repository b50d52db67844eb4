# SPDX-License-Identifier: Apache-2.0
"""A small program with its operands and results, for the generated testbench.

One weight matrix is multiplied in each of the three modes, then the host is asked, and the program
ends. There are so few numbers, and their exponents lie so near to each other, that Python's floats
hold every sum exactly; results are rounded once, as they are packed.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from random import Random

from speq.hw.accelerator_config import AcceleratorConfig
from speq.hw.control.descriptor import Descriptor, DescriptorKind
from speq.hw.engine_config import (
    BLOCK_MAGNITUDE_BITS,
    DRAFT_LANES,
    FP16_BITS,
    GROUP_BYTE,
    Mode,
)
from speq.model.number_format import (
    DRAFT_BITS,
    RESIDUAL_BITS,
    SCALE_BITS,
    SCALE_DENOMINATOR,
    SCALE_NUMERATORS,
    FormatConfig,
    draft_levels,
    draft_words,
    remap_table,
    residual_words,
)

#: What the HOST descriptor hands to the host.
HOST_ARGUMENT = 0x53504551

_K = 8
_TOKENS = 2
_WORD_BYTES = FP16_BITS // 8
_BIAS = 15
_POINT = 6  # a block activation is magnitude * 2^(exponent - 15 - 6)
_MIN_EXPONENT = 9  # of all numbers, biased
_EXPONENT_RANGE_BITS = 3
_REGION_BYTES = 8192  # what 64 rows and 256 columns need


@dataclass(frozen=True)
class Buffer:
    """Bytes at an address, padded to whole beats of the port that they are for."""

    name: str
    address: int
    content: bytes


@dataclass
class Region:
    """Memory that one port reads or writes.

    Attributes
    ----------
    start : int
        Address of the first byte.
    beat : int
        Bytes of a beat of the port.
    alignment : int
        Of the buffers' addresses.
    buffers : list of Buffer
    """

    start: int
    beat: int
    alignment: int
    buffers: list[Buffer] = field(default_factory=list)

    @property
    def stop(self) -> int:
        """Address behind the last buffer."""
        last = self.buffers[-1]
        return last.address + len(last.content)

    def put(self, name: str, content: bytes) -> int:
        """Append a buffer; its address."""
        address = _round_up(self.stop, self.alignment) if self.buffers else self.start
        content = content.ljust(_round_up(len(content), self.beat), b"\0")
        self.buffers.append(Buffer(name, address, content))
        return address


@dataclass(frozen=True)
class Results:
    """What a product writes.

    Attributes
    ----------
    name : str
    address : int
        Of the first row.
    stride : int
        Bytes of a row, whole beats: all columns.
    rows : tuple of bytes
        For each token, the columns in use; what the others hold is undefined.
    """

    name: str
    address: int
    stride: int
    rows: tuple[bytes, ...]


@dataclass(frozen=True)
class SmokeProgram:
    """A program, and the memory around it.

    Attributes
    ----------
    weights, operands, written : Region
        What the weights port reads, what the data port reads, and what it writes: one behind the
        other, from the middle of the address space on.
    results : tuple of Results
        In `written`, when the program asks the host.
    registers : dict
        What to write before the start, by name; all others are as after reset.
    descriptors : int
        Length of the program.
    """

    weights: Region
    operands: Region
    written: Region
    results: tuple[Results, ...]
    registers: dict[str, int]
    descriptors: int


class _Column:
    """The weights of one output: FP16 patterns, none of which is 0."""

    def __init__(self, patterns: Sequence[int], scale: int, number_format: FormatConfig) -> None:
        self._patterns, self._scale, self._format = patterns, scale, number_format
        self._base = max(map(_exponent, patterns))
        table = remap_table(number_format.split)
        self._words = [
            pattern & 0x8000
            | table[self._base - _exponent(pattern) << 1 | pattern >> 9 & 1] << 9
            | pattern & 0x1FF
            for pattern in patterns
        ]

    def plain(self) -> bytes:
        """FP16 words."""
        return _stream(self._patterns, FP16_BITS, len(self._patterns))

    def draft(self) -> bytes:
        """Words of the draft plane."""
        codes = [word >> RESIDUAL_BITS for word in self._words]
        return _stream(codes, DRAFT_BITS, draft_words(len(codes)))

    def residual(self) -> bytes:
        """Words of the residual plane."""
        residuals = [word & (1 << RESIDUAL_BITS) - 1 for word in self._words]
        return _stream(residuals, RESIDUAL_BITS, residual_words(len(residuals)))

    def group_byte(self) -> int:
        """Base exponent and scale code of the one group."""
        return GROUP_BYTE.const({"base": self._base, "scale": self._scale}).as_bits()

    def values(self) -> list[float]:
        """The weights of verify and bypass mode."""
        return list(map(_number, self._patterns))

    def draft_values(self) -> list[float]:
        """The weights of draft mode."""
        scale = SCALE_NUMERATORS[self._scale] / SCALE_DENOMINATOR
        unit = scale * 2.0 ** (self._base - _BIAS + self._format.level_unit_exponent)
        levels = draft_levels(self._format)
        return [(-1) ** (word >> 15) * levels[word >> 12 & 7].value * unit for word in self._words]


class _Word:
    """What a drafting row takes at once: signed magnitudes, and their block's exponent."""

    def __init__(self, numbers: Sequence[int], exponent: int) -> None:
        self.values = [number * 2.0 ** (exponent - _BIAS - _POINT) for number in numbers]
        lanes = [{"magnitude": abs(number), "negative": int(number < 0)} for number in numbers]
        self.fields = {"lanes": lanes, "exponent": exponent}


def smoke_program(config: AcceleratorConfig) -> SmokeProgram:
    """The program for a configuration, the same one at every call."""
    engine, cols = config.engine, config.engine.cols
    random = Random(0)
    k, o = min(_K, engine.max_k), min(cols, engine.max_o)
    tokens = min(_TOKENS, engine.rows, engine.max_k)
    columns = [
        _Column(_patterns(random, k), random.getrandbits(SCALE_BITS), engine.format)
        for _ in range(o)
    ]
    activations = [_patterns(random, k) for _ in range(tokens)]
    blocks = [_words(random, k) for _ in range(min(_TOKENS, engine.draft_rows))]

    beats = (config.weights.beat_bytes, config.data.beat_bytes, config.data.beat_bytes)
    middle = 1 << config.address_bits - 1
    weights, operands, written = (
        Region(middle + i * _REGION_BYTES, beat, config.alignment) for i, beat in enumerate(beats)
    )
    plain = weights.put("FP16 weights", _plane([each.plain() for each in columns], cols))
    draft = weights.put("draft plane", _plane([each.draft() for each in columns], cols))
    residual = weights.put("residual plane", _plane([each.residual() for each in columns], cols))
    groups = operands.put("group bytes", bytes(each.group_byte() for each in columns))
    words = _activations(config, "verify", zip(*activations, strict=True))
    verify_activations = operands.put("FP16 activations", words)
    block_words = ([each.fields for each in word] for word in zip(*blocks, strict=True))
    words = _activations(config, "draft", block_words)
    draft_activations = operands.put("block activations", words)

    inputs = [list(map(_number, row)) for row in activations]
    block_inputs = [[number for word in row for number in word.values] for row in blocks]
    values = [each.values() for each in columns]
    results = []
    for name, code, rows in (
        ("verify", "f", _product(inputs, values)),
        ("draft", "f", _product(block_inputs, [each.draft_values() for each in columns])),
        ("bypass", "e", _product(inputs, values)),
    ):
        stride = cols * struct.calcsize(code)
        address = written.put(f"{name} results", bytes(stride * len(rows)))
        packed = tuple(struct.pack(f"<{o}{code}", *row) for row in rows)
        results.append(Results(f"{name} product", address, stride, packed))

    gemm = partial(Descriptor, DescriptorKind.GEMM, k=k, o=o)
    program = (
        gemm(
            mode=Mode.VERIFY,
            plane=draft,
            residual=residual,
            groups=groups,
            activations=verify_activations,
            results=results[0].address,
        ),
        gemm(
            mode=Mode.DRAFT,
            tokens=len(blocks),
            plane=draft,
            groups=groups,
            activations=draft_activations,
            results=results[1].address,
        ),
        gemm(
            mode=Mode.BYPASS,
            half=True,
            plane=plain,
            activations=verify_activations,
            results=results[2].address,
        ),
        Descriptor(DescriptorKind.HOST, argument=HOST_ARGUMENT),
        Descriptor(DescriptorKind.END),
    )
    first = operands.put("program", b"".join(each.pack() for each in program))
    registers = {
        "READ_BASE": weights.start,
        "READ_LIMIT": operands.stop - 1,
        "WRITE_BASE": written.start,
        "WRITE_LIMIT": written.stop - 1,
        "PASS_PROGRAM": first,
        "PROGRAM_LENGTH": len(program),
        "PASS_ROWS": tokens,
    }
    return SmokeProgram(weights, operands, written, tuple(results), registers, len(program))


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple


def _patterns(random: Random, count: int) -> list[int]:
    """Random FP16 patterns: normal numbers."""
    return [
        random.getrandbits(1) << 15 | _random_exponent(random) << 10 | random.getrandbits(10)
        for _ in range(count)
    ]


def _random_exponent(random: Random) -> int:
    return _MIN_EXPONENT + random.getrandbits(_EXPONENT_RANGE_BITS)


def _words(random: Random, k: int) -> list[_Word]:
    """Random block activations, of one block; what is beyond k is 0."""
    exponent = _random_exponent(random)
    limit = 1 << BLOCK_MAGNITUDE_BITS
    numbers = [(random.getrandbits(BLOCK_MAGNITUDE_BITS + 1) or 1) - limit for _ in range(k)]
    numbers += [0] * (-k % DRAFT_LANES)
    return [
        _Word(numbers[i : i + DRAFT_LANES], exponent) for i in range(0, len(numbers), DRAFT_LANES)
    ]


def _number(pattern: int) -> float:
    """Value of an FP16 pattern."""
    return struct.unpack("<e", pattern.to_bytes(_WORD_BYTES, "little"))[0]


def _exponent(pattern: int) -> int:
    """Exponent field of an FP16 pattern."""
    return pattern >> 10 & 0x1F


def _stream(values: Iterable[int], bits: int, words: int) -> bytes:
    """Values of some bits each, the first one lowest, as so many 16-bit words."""
    packed = sum(value << bits * i for i, value in enumerate(values))
    return packed.to_bytes(words * _WORD_BYTES, "little")


def _plane(columns: Sequence[bytes], cols: int) -> bytes:
    """Words of each column -> [word][column], with zeros where there is no column."""
    size = len(columns[0])
    padded = [*columns, *[bytes(size)] * (cols - len(columns))]
    return b"".join(
        each[i : i + _WORD_BYTES] for i in range(0, size, _WORD_BYTES) for each in padded
    )


def _activations(config: AcceleratorConfig, form: str, words: Iterable[Sequence]) -> bytes:
    """Words of the activation store, in one form of `EngineConfig.activation_layout`."""
    layout = config.engine.activation_layout
    return b"".join(
        layout.const({form: word}).as_bits().to_bytes(config.activation_bytes, "little")
        for word in words
    )


def _product(rows: list[list[float]], columns: list[list[float]]) -> list[list[float]]:
    """Exact sums; a row may be padded."""
    return [[sum(map(float.__mul__, row, column)) for column in columns] for row in rows]
