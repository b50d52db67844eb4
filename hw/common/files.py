# SPDX-License-Identifier: Apache-2.0
"""Writing files that appear complete or not at all, in the place of nothing of value.

Only a regular file is ever replaced, and only one that is empty or that the same writer has written
before: its beginning matches a pattern of the writer's, its *mark*. With `force` any regular file
is. Devices, FIFOs, sockets, folders and symbolic links in the place of a file are refused at all
times. A link to the folder of a file is followed.

What is being written lies in the folder where it is to appear, under a name that starts with
`.speq-`, so that it takes its place in one step on any file system. Errors name that place.
"""

from __future__ import annotations

import errno
import os
import re
import secrets
import shutil
import stat
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

_PREFIX = ".speq-"
_MARK_BYTES = 4096  # in which a mark is looked for
_KINDS = {
    stat.S_IFBLK: "a device",
    stat.S_IFCHR: "a device",
    stat.S_IFIFO: "a FIFO",
    stat.S_IFSOCK: "a socket",
    stat.S_IFLNK: "a symbolic link",
}


def check_output(path: Path, mark: bytes, *, force: bool = False) -> None:
    """Refuse a path where `replacing` would put nothing; neither folder nor file is touched.

    Parameters
    ----------
    path : Path
    mark : bytes
        Regular expression that the beginning of the writer's own files matches.
    force : bool
        Allow any regular file.

    Raises
    ------
    OSError
        If what is there is no regular file, is read-only, or is not the writer's own.
    """
    if not _is_replaceable(path):
        return
    if not os.access(path, os.W_OK, effective_ids=os.access in os.supports_effective_ids):
        raise PermissionError(errno.EACCES, "the file is read-only", str(path))
    if not (force or _is_own(path, mark)):
        text = "a file that this command did not write: move it, or replace it with --force"
        raise FileExistsError(errno.EEXIST, text, str(path))


@contextmanager
def replacing(path: Path, mark: bytes, *, force: bool = False) -> Iterator[Path]:
    """A temporary file beside `path` that takes its place at the end; removed on any failure.

    Parameters as of `check_output`.

    Raises
    ------
    OSError
        At once if `check_output` refuses the path or its folder cannot be written to.
    """
    check_output(path, mark, force=force)
    temporary = path.with_name(f"{_PREFIX}{secrets.token_hex(8)}")
    with _named(temporary, path):
        try:
            temporary.touch(exist_ok=False)
        except FileNotFoundError as error:
            raise FileNotFoundError(errno.ENOENT, "no such folder", str(path.parent)) from error
        try:
            mode = temporary.stat().st_mode
            yield temporary
            # safetensors replaces the file by one that only its owner may read.
            temporary.chmod(mode)
            _is_replaceable(path)  # still
            temporary.replace(path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise


@contextmanager
def staged(
    folder: Path,
    marks: Mapping[str, bytes],
    names: Iterable[str] | None = None,
    *,
    force: bool = False,
) -> Iterator[Path]:
    """A temporary folder whose files move to `folder` at the end; on any failure none does.

    Of the writer's own files in the folder, those that were not written this time are removed.

    Parameters
    ----------
    folder : Path
        Made if it does not exist.
    marks : dict
        Of each file that the writer may write there the name, and its mark as of `check_output`.
    names : iterable of str, optional
        Those that are written this time; all when not given.
    force : bool
        As of `check_output`.

    Raises
    ------
    OSError
        At once if `check_output` refuses a file, the folder is none or cannot be written to.
    """
    existing = next(filter(os.path.lexists, (folder, *folder.parents)), folder)
    if not existing.is_dir():
        raise NotADirectoryError(f"{existing} is not a folder")
    if existing == folder:
        for name in marks if names is None else names:
            check_output(folder / name, marks[name], force=force)
    try:
        temporary = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=existing))
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(existing)) from error
    try:
        with _named(temporary, folder):
            yield temporary
            folder.mkdir(parents=True, exist_ok=True)
            files = sorted(temporary.iterdir())
            for file in files:
                _is_replaceable(folder / file.name)  # all of them, before the first moves
            for file in files:
                file.replace(folder / file.name)
            for name in marks.keys() - {file.name for file in files}:
                old = folder / name
                if old.is_file() and not old.is_symlink() and _is_own(old, marks[name]):
                    old.unlink()
    finally:
        shutil.rmtree(temporary)


def _is_replaceable(path: Path) -> bool:
    """Whether a regular file is there; raises OSError if something else is."""
    try:
        mode = path.lstat().st_mode
    except FileNotFoundError:
        return False
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    if not stat.S_ISREG(mode):
        text = f"{_KINDS[stat.S_IFMT(mode)]}, which is never replaced: name a file"
        raise FileExistsError(errno.EEXIST, text, str(path))
    return True


def _is_own(path: Path, mark: bytes) -> bool:
    """Whether a regular file is empty or begins with the mark."""
    with path.open("rb") as file:
        head = file.read(_MARK_BYTES)
    return not head or re.match(mark, head) is not None


@contextmanager
def _named(temporary: Path, path: Path) -> Iterator[None]:
    """Errors of the temporary file, or of one in the temporary folder, get the name of the place
    that it is for."""
    try:
        yield
    except OSError as error:
        if isinstance(error.filename, str) and Path(error.filename).is_relative_to(temporary):
            error.filename = str(path / Path(error.filename).relative_to(temporary))
            error.filename2 = None
        raise
