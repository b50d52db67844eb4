# SPDX-License-Identifier: Apache-2.0
"""Images as files, which docs/image.md describes byte by byte.

Files are untrusted: sizes and offsets are compared with the file's length and with one another
before anything is done with them, and all checksums before anything is written to a board.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from enum import Enum
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np

from speq.host.checks import check_settings, check_vector_unit
from speq.host.image import AGAIN, Action, Image, Setting
from speq.host.layout import Kind, Part
from speq.hw.control.register_map import registers
from speq.model.input_file import check_regular

VERSION = 1

_E = TypeVar("_E", bound=Enum)

_MAGIC = b"SPEQIMG\0"
_HEADER = struct.Struct("<8sII3Q10I32s64s")
_REGION = struct.Struct("<II3Q32s")
_REGISTER = struct.Struct("<IIQ")
_RELOCATION = struct.Struct("<Q")
_CHECKED = 16  # the header's checksum is over all from here on
_MAX_HEADER = 1 << 26  # bytes; that of SmolLM2's has 78,000
_ADDRESS = 8  # bytes of what is relocated
_COPY = f"copy it again, or {AGAIN}"


def write_image(path: Path, image: Image) -> None:
    """Write an image to a file, one part after the other.

    Raises OSError if it cannot be written, and what `Image.content` raises.
    """
    header_bytes = (
        _HEADER.size
        + _REGION.size * len(image.parts)
        + _REGISTER.size * len(image.registers)
        + _RELOCATION.size * len(image.relocations)
    )
    tables = bytearray()
    with path.open("wb") as file:
        file.seek(header_bytes)
        position = header_bytes
        for part in image.parts:
            place = checksum = 0
            if part.kind.is_given:
                content = image.content(part)
                file.write(content.data)
                place, checksum = position, zlib.crc32(content.data)
                position += part.size
            tables += _REGION.pack(
                part.kind.value, checksum, part.start, part.size, place, part.name.encode()
            )
        for offset, action, value in image.registers:
            tables += _REGISTER.pack(offset, action.value, value)
        for offset in image.relocations:
            tables += _RELOCATION.pack(offset)
        header = _HEADER.pack(
            _MAGIC,
            VERSION,
            0,
            position,
            image.size,
            image.write_offset,
            header_bytes,
            len(image.parts),
            len(image.registers),
            len(image.relocations),
            image.alignment,
            image.capacity,
            image.vocabulary,
            image.context,
            image.drafted_outputs,
            image.reranked,
            image.digest,
            image.name.encode(),
        )
        whole = bytearray(header + tables)
        struct.pack_into("<I", whole, 12, zlib.crc32(whole[_CHECKED:]))
        file.seek(0)
        file.write(whole)


def read_image(path: Path) -> Image:
    """Read a file, which is mapped into memory, and compare all of its checksums.

    Raises
    ------
    ValueError
        If it is no image, of another version, truncated or damaged; one line that names the file,
        what is wrong with it and what to do.
    OSError
        If it is no regular file or cannot be read.
    """
    check_regular(path)
    with path.open("rb") as file:
        start = file.read(_CHECKED)
    if start[:8] != _MAGIC:
        raise ValueError(f"{path} is no image: it does not begin like one of speq image")
    if len(start) < _CHECKED:
        raise ValueError(f"{path} is truncated behind {len(start)} bytes: {_COPY}")
    version, checksum = struct.unpack("<II", start[8:])
    if version != VERSION:
        raise ValueError(f"{path}: its version is {version}, expected {VERSION}: {AGAIN}")
    data = np.memmap(path, np.uint8, "r")
    if len(data) < _HEADER.size:
        raise ValueError(f"{path} is truncated behind {len(data)} bytes: {_COPY}")
    members = _HEADER.unpack(data[: _HEADER.size].data)
    file_bytes, header_bytes = members[3], members[6]
    if not _HEADER.size <= header_bytes <= _MAX_HEADER:
        raise ValueError(f"{path}: its header is damaged, its size is {header_bytes}: {_COPY}")
    if len(data) < header_bytes:
        raise ValueError(f"{path} is truncated in its header: {_COPY}")
    if zlib.crc32(data[_CHECKED:header_bytes].data) != checksum:
        raise ValueError(f"{path}: its header is damaged, its checksum differs: {_COPY}")
    if len(data) != file_bytes:
        problem = "truncated" if len(data) < file_bytes else "too long"
        raise ValueError(
            f"{path} is {problem}: it has {len(data)} bytes instead of {file_bytes}: {_COPY}"
        )
    with _naming(path):
        image, regions = _parse(path, data, members)
    for region in regions:
        part = region.part
        if zlib.crc32(image.content(part).data) != region.checksum:
            raise ValueError(f"{path}: {describe(part)} is damaged, its checksum differs: {_COPY}")
    return image


@contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Report what is impossible in a header as a ValueError that names the file."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{path} is no intact image: {error}: {AGAIN}") from error


#: What parts are called, and what they are for.
DESCRIPTIONS = {
    Kind.PLAIN_WEIGHTS: ("plain weights", "FP16 words"),
    Kind.DRAFT_PLANE: ("draft plane", "4 bits of each weight"),
    Kind.RESIDUAL_PLANE: ("residual plane", "the other 12 bits"),
    Kind.GROUP_BYTES: ("group bytes", "base exponents and scales"),
    Kind.KEYS: ("keys", "of the KV cache"),
    Kind.VALUES: ("values", "of the KV cache"),
    Kind.ACTIVATIONS: ("activations", "input of products, FP16"),
    Kind.DRAFT_ACTIVATIONS: ("draft activations", "input of draft products, blocks"),
    Kind.PROGRAM: ("program", "descriptors of a pass"),
    Kind.RANKING: ("ranking", "best logits of each row"),
    Kind.RING: ("ring", "committed tokens"),
    Kind.RESULTS: ("results", "of products, FP32"),
    Kind.EMBEDDING: ("embedding", "FP16 rows by token"),
    Kind.ROTARY: ("rotary table", "cosines and sines by position"),
    Kind.CHANNELS: ("channel vector", "FP32, norms and biases"),
    Kind.TEXT: ("text", "tokens by position"),
    Kind.STREAM: ("residual stream", "FP32"),
    Kind.TEMPORARY: ("temporary", "FP32, between vector operations"),
    Kind.QUERIES: ("queries", "input of scores, FP16"),
    Kind.SOFTMAX_WEIGHTS: ("softmax weights", "input of products with values, FP16"),
    Kind.SCORES: ("scores", "queries times keys, FP32"),
    Kind.ATTENDED: ("attention", "softmax weights times values, FP32"),
    Kind.LOGITS: ("logits", "of verify passes, FP32"),
}


def describe(part: Part) -> str:
    """A part's name for people: "the draft plane of head"."""
    what, _ = DESCRIPTIONS[part.kind]
    return f"the {what} of {part.name}" if part.name else f"the {what}"


class _Region(NamedTuple):
    """A given part in a file: where its content is, and its checksum."""

    part: Part
    position: int
    checksum: int


def _parse(
    path: Path, data: np.ndarray, members: tuple[Any, ...]
) -> tuple[Image, Collection[_Region]]:
    """The image in a file whose length and header's checksum are right; contents are not read.

    Raises ValueError if something in the header is impossible.
    """
    _, _, _, file_bytes, size, write_offset, header_bytes, *rest = members
    counts, rest = rest[:3], rest[3:]
    alignment, capacity, vocabulary, context, drafted, reranked, digest, name = rest
    structs = (_REGION, _REGISTER, _RELOCATION)
    ends = [_HEADER.size]
    for count, record in zip(counts, structs, strict=True):
        ends.append(ends[-1] + count * record.size)
    if ends[-1] != header_bytes:
        raise ValueError(f"its header has {header_bytes} bytes, its tables end at {ends[-1]}")
    tables = [
        record.iter_unpack(data[start:stop].data)
        for record, (start, stop) in zip(structs, pairwise(ends), strict=True)
    ]
    if not alignment or alignment & (alignment - 1):
        raise ValueError(f"its alignment is {alignment}")
    parts: list[Part] = []
    places: dict[Part, _Region] = {}
    end, position = 0, header_bytes
    for kind, checksum, offset, length, place, label in tables[0]:
        part = Part(_member(Kind, kind), _text(label), offset, length)
        if offset < end or offset + length > size or offset % _ADDRESS:
            raise ValueError(
                f"{describe(part)} at {offset:#x}, {length} bytes, is not in its place"
            )
        if part.kind.is_given:
            if place != position or place + length > file_bytes or length % _ADDRESS:
                raise ValueError(f"{describe(part)} is not in its place in the file")
            places[part] = _Region(part, place, checksum)
            position += length
        elif place or checksum:
            raise ValueError(f"{describe(part)} has a content")
        parts.append(part)
        end = offset + length
    if position != file_bytes:
        raise ValueError(f"its contents end at {position} of {file_bytes} bytes")
    if not 0 < write_offset <= size:
        raise ValueError(f"the write region begins at {write_offset:#x} of {size:#x}")
    settings = tuple(
        Setting(offset, _member(Action, action), value) for offset, action, value in tables[1]
    )
    relocations = tuple(offset for (offset,) in tables[2])
    _check_relocations(relocations, parts)

    def content(part: Part) -> np.ndarray:
        start = places[part].position
        return data[start : start + part.size]

    image = Image(
        name=_text(name),
        digest=digest,
        vocabulary=vocabulary,
        context=context,
        capacity=capacity,
        drafted_outputs=drafted,
        reranked=reranked,
        alignment=alignment,
        size=size,
        write_offset=write_offset,
        parts=tuple(parts),
        registers=settings,
        relocations=relocations,
        content=content,
        source=str(path),
    )
    _check_registers(image)
    return image, places.values()


def _member(kind: type[_E], value: int) -> _E:
    try:
        return kind(value)
    except ValueError:
        raise ValueError(f"{value} is no {kind.__name__.lower()} of this version") from None


def _text(content: bytes) -> str:
    """Text from a header, up to its zeros. Raises ValueError if it is none."""
    text = content.rstrip(b"\0").decode("utf-8", "replace")
    if not text.isprintable() or "\ufffd" in text:
        raise ValueError(f"{content!r:.80} is no name")
    return text


def _check_relocations(relocations: tuple[int, ...], parts: list[Part]) -> None:
    """Raises ValueError unless they rise and are words of programs."""
    programs = [part for part in parts if part.kind is Kind.PROGRAM]
    for before, offset in pairwise((-1, *relocations)):
        inside = any(p.start <= offset < p.start + p.size for p in programs)
        if offset <= before or offset % _ADDRESS or not inside:
            raise ValueError(f"its relocation at {offset:#x} is not of a word of a program")


def _check_registers(image: Image) -> None:
    """Raises ValueError unless its registers are such as are there for what is done with them, and
    tell a configuration, with the image's alignment, and settings."""
    config = image.config
    check_vector_unit(config)
    if image.alignment != config.load_alignment:
        raise ValueError(f"its alignment is {image.alignment}; expected {config.load_alignment}")
    for part in image.parts:
        if part.start % config.alignment:
            raise ValueError(f"{describe(part)} at {part.start:#x} is not in its place")
    known = {offset: r for r in registers(config) for offset in r.offsets}
    for offset, action, value in image.registers:
        register = known.get(offset)
        address = action is Action.WRITE_ADDRESS
        access = "ro" if action is Action.EXPECT else "rw"
        if register is None or register.access != access or (register.words == 2) != address:
            raise ValueError(f"there is no register at {offset:#x} for {action.name}")
        if value >= (image.size if address else 1 << 32):
            raise ValueError(f"{value:#x} is too large for {register.name}")
    check_settings(config, image.settings)
