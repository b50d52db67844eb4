# SPDX-License-Identifier: Apache-2.0
"""Value change dumps (VCD) as FST, the compressed form that GTKWave and Surfer read at once.

Verilator writes FST only where the development files of lz4 and zlib are installed; pylibfst brings
GTKWave's own library as a wheel. VCD is that of IEEE 1364-2005, clause 18.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import pylibfst
from pylibfst import ffi, lib

#: What this program's files say that they were written by.
_VERSION = b"SPEQ"


def convert(vcd: Path, fst: Path) -> None:
    """Write the content of the VCD file as FST.

    Raises
    ------
    ValueError
        If it is no VCD, or has variables of real numbers.
    OSError
        If a file cannot be read or written.
    """
    with vcd.open("rb") as source, _writer(fst) as writer:
        handles = _declare(writer, _words(source), vcd)
        emit, set_time = lib.fstWriterEmitValueChange, lib.fstWriterEmitTimeChange
        has_values = False
        for line in source:
            first = line[0]
            if first in b"01xzXZ":
                handle, _ = handles[line[1:].strip()]
                emit(writer, handle, line[:1].lower())
            elif first in b"bB":
                value, code = line[1:].split()
                handle, width = handles[code]
                emit(writer, handle, _extended(value.lower(), width))
            elif first in b"#":
                set_time(writer, int(line[1:]))
                has_values = True
            elif first in b"rR":
                raise ValueError(f"{vcd} has a variable of real numbers, which FST does not get")
        if not has_values:
            raise ValueError(f"{vcd} has no values")


class Contents(NamedTuple):
    """What is in a file: first and last time, in its unit, and the signals' bits by their names as
    GTKWave shows them, scopes and range and all."""

    first: int
    last: int
    signals: dict[str, int]


def contents(path: Path) -> Contents:
    """What is in an FST file. Raises ValueError if it is none, OSError if it cannot be read."""
    path.open("rb").close()
    reader = lib.fstReaderOpen(os.fsencode(path))
    if reader == ffi.NULL:
        raise ValueError(f"{path} is no FST file")
    try:
        _, signals = pylibfst.get_scopes_signals2(reader)
        first, last = lib.fstReaderGetStartTime(reader), lib.fstReaderGetEndTime(reader)
    finally:
        lib.fstReaderClose(reader)
    bits = {signal.name.replace(" ", ""): signal.length for signal in signals.by_name.values()}
    return Contents(first, last, bits)


@contextmanager
def _writer(path: Path) -> Iterator[Any]:
    """The library's writer of this file, of which nothing is left where writing fails."""
    path.open("wb").close()  # raises the system's error, of which the library tells nothing
    writer = lib.fstWriterCreate(os.fsencode(path), 1)
    if writer == ffi.NULL:
        raise OSError(f"{path} cannot be written")
    try:
        lib.fstWriterSetVersion(writer, _VERSION)
        yield writer
    except BaseException:
        lib.fstWriterClose(writer)
        path.unlink(missing_ok=True)
        raise
    lib.fstWriterClose(writer)


def _words(source: Iterable[bytes]) -> Iterator[str]:
    """The words of the declarations."""
    for line in source:
        yield from line.decode().split()
        if b"$enddefinitions" in line:
            return


def _declare(writer: Any, words: Iterator[str], path: Path) -> dict[bytes, tuple[int, int]]:
    """Declare scopes and variables; the writer's handle and the bits of each VCD code."""
    handles: dict[bytes, tuple[int, int]] = {}
    for word in words:
        if word == "$enddefinitions":
            return handles
        if not word.startswith("$"):
            break
        arguments = list(iter(lambda: next(words, "$end"), "$end"))
        if word == "$timescale":
            lib.fstWriterSetTimescaleFromString(writer, "".join(arguments).encode())
        elif word == "$scope":
            kind, name = arguments
            number = getattr(lib, f"FST_ST_VCD_{kind.upper()}", lib.FST_ST_VCD_MODULE)
            lib.fstWriterSetScope(writer, number, name.encode(), ffi.NULL)
        elif word == "$upscope":
            lib.fstWriterSetUpscope(writer)
        elif word == "$var":
            kind, width, code, *name = arguments
            number = getattr(lib, f"FST_VT_VCD_{kind.upper()}", lib.FST_VT_VCD_WIRE)
            known, bits = handles.get(code.encode(), (0, int(width)))
            shown = " ".join(name).encode()
            handle = lib.fstWriterCreateVar(writer, number, lib.FST_VD_IMPLICIT, bits, shown, known)
            handles.setdefault(code.encode(), (handle, bits))
    raise ValueError(f"{path} is no VCD file")


def _extended(value: bytes, width: int) -> bytes:
    """A value in characters with those that VCD leaves out, the highest bits."""
    if len(value) == width:
        return value
    return value.rjust(width, b"0" if value[0] in b"01" else value[:1])
