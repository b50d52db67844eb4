# SPDX-License-Identifier: Apache-2.0
"""Writing files that appear complete or not at all."""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary file beside `path` that takes its place at the end; removed on any failure.

    Raises
    ------
    OSError
        At once if `path` is a folder or its folder cannot be written to.
    """
    if path.is_dir():
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.touch(exist_ok=False)
    except FileNotFoundError as error:
        raise FileNotFoundError(errno.ENOENT, "no such folder", str(path.parent)) from error
    try:
        mode = temporary.stat().st_mode
        yield temporary
        # safetensors replaces the file by one that only its owner may read.
        temporary.chmod(mode)
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


@contextmanager
def staged(folder: Path) -> Iterator[Path]:
    """A temporary folder whose files move to `folder` at the end; on any failure none does.

    Raises
    ------
    OSError
        At once if `folder` is a file or nothing can be written beside it.
    """
    if folder.exists() and not folder.is_dir():
        raise NotADirectoryError(f"{folder} is not a folder")
    existing = next(parent for parent in folder.absolute().parents if parent.is_dir())
    temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=existing))
    try:
        yield temporary
        folder.mkdir(parents=True, exist_ok=True)
        for file in sorted(temporary.iterdir()):
            os.replace(file, folder / file.name)
    finally:
        shutil.rmtree(temporary)
