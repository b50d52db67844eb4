# SPDX-License-Identifier: Apache-2.0
"""A reader of the FST files that `speq.sim.fst` writes, for checking them."""

from __future__ import annotations

import gzip
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path


@dataclass
class _Bytes:
    """Content that is read from front to back."""

    content: bytes
    place: int = 0

    def take(self, size: int) -> bytes:
        self.place += size
        assert self.place <= len(self.content)
        return self.content[self.place - size : self.place]

    def big(self) -> int:
        return int.from_bytes(self.take(8), "big")

    def leb(self, signed: bool = False) -> int:
        value = shift = 0
        while True:
            (byte,) = self.take(1)
            value |= (byte & 0x7F) << shift
            shift += 7
            if byte < 0x80:
                return value - (1 << shift) if signed and byte & 0x40 else value

    def text(self) -> str:
        end = self.content.index(0, self.place)
        return self.take(end + 1 - self.place)[:-1].decode()

    def __bool__(self) -> bool:
        return self.place < len(self.content)


def _unpacked(content: bytes, size: int) -> bytes:
    result = content if len(content) == size else zlib.decompress(content)
    assert len(result) == size
    return result


class FstFile:
    """All of a file.

    `names` are the signals' by their handle, from 0, with `widths`; `changes` are the time, handle
    and value of all changes, in the order of blocks; `frames` the values before each block.
    """

    def __init__(self, path: Path) -> None:
        self.names: dict[str, int] = {}
        self.changes: list[tuple[int, int, str]] = []
        self.frames: list[str] = []
        file = _Bytes(path.read_bytes())
        blocks: dict[int, list[_Bytes]] = {}
        while file:
            (kind,) = file.take(1)
            blocks.setdefault(kind, []).append(_Bytes(file.take(file.big() - 8)))
        assert sorted(blocks) == [0, 3, 4, 8]
        (geometry,), (header,), (hierarchy,) = blocks[3], blocks[0], blocks[4]
        size, count = geometry.big(), geometry.big()
        widths = _Bytes(_unpacked(geometry.content[16:], size))
        self.widths = [widths.leb() for _ in range(count)]
        assert not widths
        self._read_hierarchy(_Bytes(gzip.decompress(hierarchy.content[8:])))
        for block in blocks[8]:
            self._read_values(block)
        assert len(header.content) == 321
        self.first, self.last = header.big(), header.big()
        assert struct.unpack("=d", header.take(8))[0] == 2.718281828459045
        sizes = [header.big() for _ in range(5)]
        assert sizes[2:] == [len(self.names), count, len(blocks[8])]
        self.timescale = struct.unpack("b", header.take(1))[0]

    def _read_hierarchy(self, hierarchy: _Bytes) -> None:
        scopes, handles = [], 0
        while hierarchy:
            (kind,) = hierarchy.take(1)
            if kind == 255:
                scopes.pop()
                continue
            hierarchy.take(1)
            name = hierarchy.text()
            if kind == 254:
                assert hierarchy.text() == ""
                scopes.append(name)
                continue
            width, same_as = hierarchy.leb(), hierarchy.leb()
            handles += not same_as
            handle = (same_as or handles) - 1
            assert self.widths[handle] == width
            self.names[".".join((*scopes, name))] = handle
        assert not scopes and handles == len(self.widths)

    def _read_values(self, block: _Bytes) -> None:
        first, last, _ = block.big(), block.big(), block.big()
        size, packed, count = block.leb(), block.leb(), block.leb()
        assert count == len(self.widths)
        self.frames.append(_unpacked(block.take(packed), size).decode())
        assert block.leb() == count
        chains_start = block.place
        assert block.take(1) == b"Z"
        end = _Bytes(block.content[-24:])
        size, packed, items = end.big(), end.big(), end.big()
        times_start = len(block.content) - 24 - packed
        deltas = _Bytes(_unpacked(block.content[times_start:-24], size))
        times, now = [], 0
        for _ in range(items):
            now += deltas.leb()
            times.append(now)
        assert not deltas and (times[0], times[-1]) == (first, last)
        places_size = int.from_bytes(block.content[times_start - 8 : times_start], "big")
        places_start = times_start - 8 - places_size
        starts = dict(_chain_starts(_Bytes(block.content[places_start : times_start - 8]), count))
        ends = [*list(starts.values())[1:], places_start - chains_start]
        for (handle, start), stop in zip(starts.items(), ends, strict=True):
            chain = _Bytes(block.content[chains_start + start : chains_start + stop])
            size = chain.leb()
            content = chain.content[chain.place :]
            self._read_chain(handle, _Bytes(_unpacked(content, size or len(content))), times)

    def _read_chain(self, handle: int, chain: _Bytes, times: list[int]) -> None:
        width, now = self.widths[handle], 0
        while chain:
            code = chain.leb()
            if width == 1:
                now += code >> (4 if code & 1 else 2)
                value = "xzhuwl-?"[code >> 1 & 7] if code & 1 else str(code >> 1 & 1)
            else:
                now += code >> 1
                if code & 1:
                    value = chain.take(width).decode()
                else:
                    bits = chain.take((width + 7) // 8)
                    value = "".join(f"{byte:08b}" for byte in bits)[:width]
            self.changes.append((times[now], handle, value))

    def value(self, name: str, time: int) -> int:
        """Value of a signal at a time."""
        handle = self.names[name]
        before = [(t, v) for t, h, v in self.changes if h == handle and t <= time]
        return int(max(before, key=lambda change: change[0])[1], 2)


def _chain_starts(places: _Bytes, count: int) -> Iterator[tuple[int, int]]:
    """Handles that change in a block, and where their chains begin."""
    handle = start = 0
    while places:
        if places.content[places.place] & 1:
            start += places.leb(signed=True) >> 1
            yield handle, start
            handle += 1
        else:
            handle += places.leb() >> 1
    assert handle == count
