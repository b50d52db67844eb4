# SPDX-License-Identifier: Apache-2.0
"""FST files as GTKWave's library reads them."""

from __future__ import annotations

import os
from pathlib import Path

import pylibfst
from pylibfst import ffi, lib


class FstFile:
    """All of a file.

    `names` are the signals' handles, `widths` the bits by handle; `changes` are the time, handle
    and value of all changes, by time.
    """

    def __init__(self, path: Path) -> None:
        reader = lib.fstReaderOpen(os.fsencode(path))
        assert reader != ffi.NULL
        _, signals = pylibfst.get_scopes_signals2(reader)
        self.names: dict[str, int] = {s.name: s.handle for s in signals.by_name.values()}
        self.widths: dict[int, int] = {s.handle: s.length for s in signals.by_handle.values()}
        self.first: int = lib.fstReaderGetStartTime(reader)
        self.last: int = lib.fstReaderGetEndTime(reader)
        self.timescale: int = lib.fstReaderGetTimescale(reader)
        self.changes: list[tuple[int, int, str]] = []
        lib.fstReaderSetFacProcessMaskAll(reader)
        assert pylibfst.fstReaderIterBlocks(reader, self._add)
        lib.fstReaderClose(reader)

    def _add(self, _: None, time: int, handle: int, value: ffi.CData) -> None:
        self.changes.append((time, handle, pylibfst.string(value)))

    def value(self, name: str, time: int) -> int:
        """Value of a signal at a time."""
        handle = self.names[name]
        before = [(t, v) for t, h, v in self.changes if h == handle and t <= time]
        return int(max(before, key=lambda change: change[0])[1], 2)
