# SPDX-License-Identifier: Apache-2.0
"""The C driver, compiled for a configuration and called with the functions of a Python board."""

from __future__ import annotations

import ctypes
import re
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from speq.host.board import Board
from speq.hw.accelerator_config import AcceleratorConfig
from speq.hw.verilog.register_docs import c_header

SOURCES = Path(__file__).parents[2] / "host" / "c"
HEADER = SOURCES / "speq_driver.h"
#: Names of the results, by number.
RESULTS = re.findall(r"^    X\((\w+), ", HEADER.read_text(), re.MULTILINE)
STRICT = ("-Wall", "-Wextra", "-Wconversion", "-Wshadow", "-pedantic", "-Werror")

_Pointer, _Address, _Word, _Size = (
    ctypes.c_void_p,
    ctypes.c_uint64,
    ctypes.c_uint32,
    ctypes.c_size_t,
)
_ReadRegister = ctypes.CFUNCTYPE(ctypes.c_int, _Pointer, _Word, ctypes.POINTER(_Word))
_WriteRegister = ctypes.CFUNCTYPE(ctypes.c_int, _Pointer, _Word, _Word)
_Memory = ctypes.CFUNCTYPE(ctypes.c_int, _Pointer, _Address, _Pointer, _Size)
_Wait = ctypes.CFUNCTYPE(ctypes.c_int, _Pointer)
_Token = ctypes.CFUNCTYPE(ctypes.c_int, _Pointer, _Word)


def _words(*names: str) -> list[tuple[str, type]]:
    return [(name, _Word) for name in names]


class _Board(ctypes.Structure):
    _fields_ = [
        ("context", _Pointer),
        ("read_register", _ReadRegister),
        ("write_register", _WriteRegister),
        ("read_memory", _Memory),
        ("write_memory", _Memory),
        ("wait", _Wait),
    ]


class _File(ctypes.Structure):
    _fields_ = [("context", _Pointer), ("size", _Address), ("read", _Memory)]


class _Driver(ctypes.Structure):
    _fields_ = [
        ("board", _Board),
        *_words("vocabulary", "context", "capacity", "known", "error"),
        *((name, _Address) for name in ("error_address", "text", "ring")),
        *_words("ring_tokens", "draft_length", "history", "rows"),
        ("buffer", ctypes.c_ubyte * 4096),
    ]


class _Run(ctypes.Structure):
    _fields_ = [
        ("prompt", ctypes.POINTER(_Word)),
        *_words("length", "resume", "max_tokens"),
        ("stops", ctypes.POINTER(_Word)),
        *_words("stop_count", "plain", "sample"),
        ("temperature", ctypes.c_double),
        ("seed", ctypes.c_uint64),
        ("truncate", ctypes.c_int),
        ("cutoff", ctypes.c_float),
    ]


_SIZES = """
#include "speq_driver.h"
extern const size_t speq_sizes[];
const size_t speq_sizes[] = {sizeof(struct speq_board), sizeof(struct speq_file),
                             sizeof(struct speq), sizeof(struct speq_run)};
"""


def compile_driver(config: AcceleratorConfig, folder: Path) -> ctypes.CDLL:
    """The driver for a configuration as a library, which is written to a folder."""
    (folder / "speq_top.h").write_text(c_header(config))
    (folder / "sizes.c").write_text(_SIZES)
    library = folder / "speq.so"
    sources = (SOURCES / "speq_driver.c", folder / "sizes.c")
    command = ["gcc", "-std=c99", "-O2", *STRICT, "-shared", "-fPIC", *sources]
    subprocess.run([*command, f"-I{SOURCES}", f"-I{folder}", "-o", library], check=True)
    loaded = ctypes.CDLL(str(library))
    sizes = (_Size * 4).in_dll(loaded, "speq_sizes")
    assert list(sizes) == [ctypes.sizeof(kind) for kind in (_Board, _File, _Driver, _Run)]
    for name in ("speq_message", "speq_error_name"):
        getattr(loaded, name).restype = ctypes.c_char_p
    return loaded


class CDriver:
    """The C driver on a board, with an image.

    Attributes
    ----------
    failing : dict
        Names of functions that fail when they have been called so many times more.
    calls : dict
        How often each has been called.
    image : bytes
        The file's content.
    state : ctypes.Structure
        The driver's struct speq.
    """

    def __init__(
        self, library: ctypes.CDLL, board: Board, image: bytes, waits: bool = True
    ) -> None:
        self._library, self._board, self.image = library, board, image
        self.failing: dict[str, int] = {}
        self.calls: dict[str, int] = {}
        self.state = _Driver()
        self._functions = _Board(
            None,
            _ReadRegister(self._called("read_register", self._read_register)),
            _WriteRegister(self._called("write_register", self._write_register)),
            _Memory(self._called("read_memory", self._read_memory)),
            _Memory(self._called("write_memory", self._write_memory)),
            _Wait(self._called("wait", board.wait_interrupt)) if waits else _Wait(),
        )
        self._file = _File(None, len(image), _Memory(self._called("read", self._read)))

    def load(self, base: int = 0, size: int = 1 << 40) -> str:
        """The name of the result of speq_load."""
        board, file = ctypes.byref(self._functions), ctypes.byref(self._file)
        addresses = ctypes.c_uint64(base), ctypes.c_uint64(size)
        return RESULTS[self._library.speq_load(ctypes.byref(self.state), board, file, *addresses)]

    def generate(
        self,
        prompt: Sequence[int],
        *,
        max_tokens: int = 10,
        stops: Sequence[int] = (),
        cancel: int | None = None,
        **options: Any,
    ) -> tuple[str, list[int]]:
        """The name of the result of speq_generate and the tokens; `cancel`: so many are taken."""
        run = _Run(
            prompt=(_Word * len(prompt))(*prompt),
            length=len(prompt),
            max_tokens=max_tokens,
            stops=(_Word * len(stops))(*stops),
            stop_count=len(stops),
            **options,
        )
        tokens: list[int] = []

        def take(context: int | None, token: int) -> int:
            tokens.append(token)
            return len(tokens) == cancel

        arguments = ctypes.byref(self.state), ctypes.byref(run), _Token(take), None
        return RESULTS[self._library.speq_generate(*arguments)], tokens

    @property
    def error(self) -> str:
        """The name of the last run's error."""
        return self._library.speq_error_name(self.state.error).decode()

    def _called(self, name: str, function: Callable[..., object]) -> Callable[..., int]:
        def call(context: int | None, *arguments: Any) -> int:
            self.calls[name] = self.calls.get(name, 0) + 1
            left = self.failing.get(name)
            if left is not None:
                self.failing[name] = left - 1
                if left <= 0:
                    return 1
            try:
                function(*arguments)
            except (OSError, ValueError):
                return 2
            return 0

        return call

    def _read_register(self, offset: int, value: Any) -> None:
        value[0] = self._board.read_register(offset)

    def _write_register(self, offset: int, value: int) -> None:
        self._board.write_register(offset, value)

    def _read_memory(self, address: int, data: int, size: int) -> None:
        assert address % 4 == size % 4 == 0
        ctypes.memmove(data, self._board.read(address, size).tobytes(), size)

    def _write_memory(self, address: int, data: int, size: int) -> None:
        assert address % 4 == size % 4 == 0
        self._board.write(address, np.frombuffer(ctypes.string_at(data, size), np.uint8))

    def _read(self, position: int, data: int, size: int) -> None:
        if position + size > len(self.image):
            raise OSError("behind the end of the file")
        ctypes.memmove(data, self.image[position : position + size], size)
