# SPDX-License-Identifier: Apache-2.0
"""Value change dumps (VCD) as FST, the compressed form that GTKWave and Surfer read at once.

Verilator writes FST only where the development files of lz4 and zlib are installed; this needs
nothing but Python. VCD is that of IEEE 1364-2005, clause 18. FST is a sequence of blocks, each a
type and a length before its content: header, values by time, widths, and the hierarchy.
"""

from __future__ import annotations

import gzip
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

#: Value changes of a block, which is in memory while it is written.
BLOCK_CHANGES = 1 << 20

_BLOCK = struct.Struct(">BQ")  # type and length, which counts itself
_HEADER, _GEOMETRY, _HIERARCHY_GZIP, _VALUES = 0, 3, 4, 8
_SCOPE, _UPSCOPE = 254, 255
_SCOPES = ("module", "task", "function", "begin", "fork", "generate", "struct", "union", "class")
_SCOPES += ("interface", "package", "program")
_VARIABLES = ("event", "integer", "parameter", "real", "real_parameter", "reg", "supply0")
_VARIABLES += ("supply1", "time", "tri", "triand", "trior", "trireg", "tri0", "tri1", "wand")
_VARIABLES += ("wire", "wor")
_SECONDS = {"s": 0, "ms": -3, "us": -6, "ns": -9, "ps": -12, "fs": -15}
_NOT_BINARY = b"xzhuwl-?"  # values of a bit beside 0 and 1, by their number in FST
_VERSION_BYTES, _DATE_BYTES, _HEADER_BYTES = 128, 119, 321


def convert(vcd: Path, fst: Path) -> None:
    """Write the content of the VCD file as FST.

    Raises
    ------
    ValueError
        If it is no VCD, or has variables of real numbers.
    """
    with vcd.open("rb") as source, fst.open("wb") as target:
        words = _words(source)
        hierarchy = _Hierarchy()
        hierarchy.read(words, vcd)
        target.write(bytes(_BLOCK.size + _HEADER_BYTES))  # to be written at last
        changes = _Changes(hierarchy.widths)
        for line in source:
            first = line[0]
            if first in b"01xzXZ":
                changes.add(hierarchy.handles[line[1:].strip()], line[:1].lower())
            elif first in b"bB":
                value, code = line[1:].split()
                changes.add(hierarchy.handles[code], value.lower())
            elif first in b"#":
                if changes.count >= BLOCK_CHANGES:
                    target.write(changes.take_block())
                changes.advance(int(line[1:]))
            elif first in b"rR":
                raise ValueError(f"{vcd} has a variable of real numbers, which FST does not get")
        if not changes.times:
            raise ValueError(f"{vcd} has no values")
        target.write(changes.take_block())
        target.write(hierarchy.blocks())
        target.seek(0)
        target.write(_header(hierarchy, changes))


class Contents(NamedTuple):
    """What is in a file: first and last time, in its unit, and the signals' bits by their names as
    GTKWave shows them, scopes and range and all."""

    first: int
    last: int
    signals: dict[str, int]


def contents(path: Path) -> Contents:
    """What is in a file that `convert` has written. Raises ValueError if it is no such file."""
    blocks = {}
    with path.open("rb") as file:
        while len(head := file.read(_BLOCK.size)) == _BLOCK.size:
            kind, size = _BLOCK.unpack(head)
            if not blocks and (kind, size) != (_HEADER, _HEADER_BYTES + 8):
                break
            if kind in (_HEADER, _HIERARCHY_GZIP):
                blocks[kind] = file.read(size - 8)
            else:
                file.seek(size - 8, 1)
    if len(blocks) < 2:
        raise ValueError(f"{path} is no FST file of this program")
    first, last = struct.unpack_from(">QQ", blocks[_HEADER])
    return Contents(first, last, _signals(gzip.decompress(blocks[_HIERARCHY_GZIP][8:])))


def _signals(hierarchy: bytes) -> dict[str, int]:
    result, scopes, place = {}, [], 0
    while place < len(hierarchy):
        kind = hierarchy[place]
        if kind == _UPSCOPE:
            scopes.pop()
            place += 1
            continue
        end = hierarchy.index(0, place + 2)
        name = hierarchy[place + 2 : end].decode()
        if kind == _SCOPE:
            scopes.append(name)
            place = end + 2  # a scope has a second name, which is empty
        else:
            width, place = _read_number(hierarchy, end + 1)
            _, place = _read_number(hierarchy, place)
            result[".".join((*scopes, name.replace(" ", "")))] = width
    return result


def _read_number(content: bytes, place: int) -> tuple[int, int]:
    """A number in unsigned LEB128, and the place behind it."""
    value = shift = 0
    while content[place] & 0x80:
        value |= (content[place] & 0x7F) << shift
        shift += 7
        place += 1
    return value | content[place] << shift, place + 1


def _words(source: Iterator[bytes]) -> Iterator[str]:
    """The words of the declarations."""
    for line in source:
        yield from line.decode().split()
        if b"$enddefinitions" in line:
            return


@dataclass
class _Hierarchy:
    """Declarations: FST's hierarchy, and variables that differ in value, numbered from 0."""

    timescale: int = 0
    scopes: int = 0
    variables: int = 0
    content: bytearray = field(default_factory=bytearray)
    handles: dict[bytes, int] = field(default_factory=dict)
    widths: list[int] = field(default_factory=list)

    def read(self, words: Iterator[str], path: Path) -> None:
        """Take all declarations."""
        for word in words:
            if word == "$enddefinitions":
                return
            if not word.startswith("$"):
                break
            arguments = list(iter(lambda: next(words, "$end"), "$end"))
            if word == "$timescale":
                scale = "".join(arguments)
                digits = scale.rstrip("munpfs")
                self.timescale = _SECONDS[scale[len(digits) :]] + len(digits) - 1
            elif word == "$scope":
                kind, name = arguments
                number = _SCOPES.index(kind) if kind in _SCOPES else 0
                self.content += bytes((_SCOPE, number)) + name.encode() + b"\0\0"
                self.scopes += 1
            elif word == "$upscope":
                self.content.append(_UPSCOPE)
            elif word == "$var":
                self._add(*arguments)
        raise ValueError(f"{path} is no VCD file")

    def _add(self, kind: str, width: str, code: str, *name: str) -> None:
        handle = self.handles.setdefault(code.encode(), len(self.widths))
        same_as = handle + 1
        if handle == len(self.widths):
            self.widths.append(int(width))
            same_as = 0
        self.content += bytes((_VARIABLES.index(kind), 0)) + " ".join(name).encode() + b"\0"
        self.content += _number(int(width)) + _number(same_as)
        self.variables += 1

    def blocks(self) -> bytes:
        """Widths and hierarchy."""
        widths = b"".join(map(_number, self.widths))
        sizes = struct.pack(">QQ", len(widths), len(self.widths))
        names = struct.pack(">Q", len(self.content)) + gzip.compress(self.content, mtime=0)
        return _block(_GEOMETRY, sizes + _smaller(widths)) + _block(_HIERARCHY_GZIP, names)


class _Changes:
    """Value changes since the last block, and the values before them.

    `count` is of the changes, `blocks` of the blocks so far, `first` and `times` are of the times.
    """

    def __init__(self, widths: list[int]) -> None:
        self._widths = widths
        self._values = [b"x" * width for width in widths]
        self.count = self.blocks = self.first = 0
        self.times: list[int] = []
        self._start()

    def _start(self) -> None:
        self._before = b"".join(self._values)
        self._chains = [bytearray() for _ in self._widths]
        self._last = [0] * len(self._widths)  # place in `times` of the last change
        self.count = 0

    def advance(self, time: int) -> None:
        """What follows is at this time."""
        if not self.times:
            self.first = time
        if self.times[-1:] != [time]:
            self.times.append(time)

    def add(self, handle: int, value: bytes) -> None:
        """A variable has a new value, in characters, the highest bit first."""
        width = self._widths[handle]
        if len(value) < width:
            value = value.rjust(width, b"0" if value[0] in b"01" else value[:1])
        now = len(self.times) - 1
        later = now - self._last[handle]
        self._last[handle] = now
        self._values[handle] = value
        self.count += 1
        chain = self._chains[handle]
        binary = not value.strip(b"01")
        if width == 1:
            if binary:
                chain += _number(later << 2 | (value == b"1") << 1)
            else:
                chain += _number(later << 4 | _NOT_BINARY.index(value) << 1 | 1)
        elif binary:
            chain += _number(later << 1)
            size = (width + 7) // 8
            chain += (int(value, 2) << (8 * size - width)).to_bytes(size, "big")
        else:
            chain += _number(later << 1 | 1) + value

    def take_block(self) -> bytes:
        """The block of the changes until now; the next begins at the last of these times."""
        first, last, count = self.times[0], self.times[-1], _number(len(self._widths))
        before = _smaller(self._before)
        content = struct.pack(">QQQ", first, last, sum(map(len, self._chains)))
        content += _number(len(self._before)) + _number(len(before)) + count + before
        content += count + b"Z" + self._packed_chains()
        steps = [first, *(later - earlier for earlier, later in pairwise(self.times))]
        times = b"".join(map(_number, steps))
        packed = _smaller(times)
        content += packed + struct.pack(">QQQ", len(times), len(packed), len(steps))
        self.blocks += 1
        self.times = [last]
        self._start()
        return _block(_VALUES, content)

    def _packed_chains(self) -> bytes:
        """The chains of changes, and where each begins."""
        data, places = bytearray(), bytearray()
        unchanged = 0
        distance = 1  # from where the last one begins
        for chain in self._chains:
            if not chain:
                unchanged += 1
                continue
            if unchanged:
                places += _number(unchanged << 1)
                unchanged = 0
            places += _signed_number(distance << 1 | 1)
            packed = _smaller(chain)
            size = len(chain) if len(packed) < len(chain) else 0
            item = _number(size) + packed
            data += item
            distance = len(item)
        if unchanged:
            places += _number(unchanged << 1)
        return bytes(data + places) + struct.pack(">Q", len(places))


def _header(hierarchy: _Hierarchy, changes: _Changes) -> bytes:
    """The first block."""
    content = struct.pack(">QQ", changes.first, changes.times[-1])
    content += struct.pack("=d", 2.718281828459045)  # tells readers this machine's byte order
    sizes = (hierarchy.scopes, hierarchy.variables, len(hierarchy.widths), changes.blocks)
    content += struct.pack(">QQQQQb", 0, *sizes, hierarchy.timescale)
    content += b"SPEQ".ljust(_VERSION_BYTES, b"\0") + bytes(_DATE_BYTES)
    return _block(_HEADER, content + bytes(9))  # Verilog; times count from 0


def _block(kind: int, content: bytes) -> bytes:
    return _BLOCK.pack(kind, len(content) + 8) + content


def _smaller(content: bytes) -> bytes:
    """Compressed by zlib, or as it is if that does not make it smaller, which tells readers."""
    return min(bytes(content), zlib.compress(content, 4), key=len)


def _number(value: int) -> bytes:
    """Unsigned LEB128."""
    if value < 0x80:
        return _BYTES[value]
    result = bytearray()
    while value >= 0x80:
        result.append(value & 0x7F | 0x80)
        value >>= 7
    result.append(value)
    return bytes(result)


_BYTES = [bytes((value,)) for value in range(0x80)]


def _signed_number(value: int) -> bytes:
    """Signed LEB128 of a number that is not negative."""
    # The highest bit of the last byte's seven is the sign.
    encoded = _number(value)
    return encoded[:-1] + bytes((encoded[-1] | 0x80, 0)) if encoded[-1] & 0x40 else encoded
