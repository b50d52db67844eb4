# SPDX-License-Identifier: Apache-2.0
"""Writing files: all or nothing, on any file system, and in the place of nothing of value."""

from __future__ import annotations

import errno
import os
import shutil
import socket
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from speq.hw.common.files import check_output, replacing, staged

MARK = rb"generated\b"
MARKS = {"a": MARK, "b": MARK}
SHARED_MEMORY = Path("/dev/shm")
NOBODY = 65534


@contextmanager
def unprivileged() -> Iterator[None]:
    """Without the right of root to write anywhere."""
    if os.geteuid():
        yield
        return
    os.seteuid(NOBODY)
    try:
        yield
    finally:
        os.seteuid(0)


@pytest.fixture
def public() -> Iterator[Path]:
    """A folder that any user can reach."""
    folder = Path(tempfile.mkdtemp())
    folder.chmod(0o777)
    yield folder
    folder.chmod(0o777)
    shutil.rmtree(folder)


def make(kind: str, path: Path) -> None:
    """Something that is no regular file; skips the test where it cannot be made."""
    if kind == "device":
        try:
            os.mknod(path, stat.S_IFCHR | 0o666, os.makedev(1, 7))  # /dev/full
        except PermissionError:
            pytest.skip("only root can make a device")
    elif kind == "FIFO":
        os.mkfifo(path)
    elif kind == "socket":
        here = Path.cwd()
        os.chdir(path.parent)  # a socket's path must be short
        try:
            with socket.socket(socket.AF_UNIX) as listener:
                listener.bind(path.name)
        finally:
            os.chdir(here)
    elif kind == "folder":
        path.mkdir()
    else:
        target = path.with_name("target")
        if kind == "link":
            target.write_text("generated before")
        path.symlink_to(target)


KINDS = {
    "device": "a device",
    "FIFO": "a FIFO",
    "socket": "a socket",
    "folder": "Is a directory",
    "link": "a symbolic link",
    "dangling link": "a symbolic link",
}


def write(way: str, path: Path, *, force: bool = False) -> None:
    """Write "generated" to a file by either function."""
    if way == "replacing":
        with replacing(path, MARK, force=force) as temporary:
            temporary.write_text("generated")
    else:
        with staged(path.parent, {path.name: MARK}, force=force) as folder:
            (folder / path.name).write_text("generated")


each_way = pytest.mark.parametrize("way", ["replacing", "staged"])


@each_way
@pytest.mark.parametrize("force", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_only_regular_files_are_replaced(tmp_path, way, force, kind):
    path = tmp_path / "x"
    make(kind, path)
    before = (path.lstat().st_mode, path.lstat().st_ino)
    with pytest.raises(OSError) as caught:
        write(way, path, force=force)
    assert caught.value.filename == str(path) and KINDS[kind] in caught.value.strerror
    assert (path.lstat().st_mode, path.lstat().st_ino) == before
    assert {p.name for p in tmp_path.iterdir()} <= {"x", "target"}
    if kind == "link":
        assert path.read_text() == "generated before"


@each_way
def test_what_comes_into_the_way_later_stays(tmp_path, way):
    """Of the staged files not even one that comes earlier is replaced."""
    (tmp_path / "a").write_text("generated before")
    if way == "replacing":
        writing = replacing(tmp_path / "b", MARK)
    else:
        writing = staged(tmp_path, MARKS)
    with pytest.raises(FileExistsError, match="a FIFO"), writing as temporary:
        if way == "replacing":
            temporary.write_text("generated")
        else:
            for name in MARKS:
                (temporary / name).write_text("generated")
        os.mkfifo(tmp_path / "b")
    assert (tmp_path / "b").is_fifo()
    assert (tmp_path / "a").read_text() == "generated before"
    assert {p.name for p in tmp_path.iterdir()} == {"a", "b"}


@each_way
@pytest.mark.parametrize("content", ["written by hand", "generate", " generated"])
def test_only_own_files_are_replaced_without_force(tmp_path, way, content):
    path = tmp_path / "x"
    path.write_text(content)
    with pytest.raises(FileExistsError, match="--force") as caught:
        write(way, path)
    assert caught.value.filename == str(path)
    assert path.read_text() == content
    write(way, path, force=True)
    assert path.read_text() == "generated"
    write(way, path)
    path.write_text("")  # as from mktemp: nothing is lost
    write(way, path)
    assert path.read_text() == "generated"
    assert [p.name for p in tmp_path.iterdir()] == ["x"]


@each_way
def test_a_read_only_file_is_refused(public, way):
    path = public / "x"
    path.write_text("generated before")
    path.chmod(0o444)
    with pytest.raises(PermissionError) as caught, unprivileged():
        write(way, path)
    assert caught.value.filename == str(path)
    assert path.read_text() == "generated before"


@each_way
def test_a_read_only_folder_is_refused_before_any_work(public, way):
    public.chmod(0o555)
    started = False
    with pytest.raises(PermissionError) as caught, unprivileged():
        if way == "replacing":
            writing = replacing(public / "x", MARK)
        else:
            writing = staged(public, MARKS)
        with writing:
            started = True
    assert not started
    assert caught.value.filename == str(public / "x" if way == "replacing" else public)
    assert list(public.iterdir()) == []


@each_way
def test_the_parent_of_the_folder_may_be_read_only(public, way):
    (public / "out").mkdir()
    (public / "out").chmod(0o777)
    public.chmod(0o555)
    with unprivileged():
        write(way, public / "out" / "x")
    assert (public / "out" / "x").read_text() == "generated"
    assert [p.name for p in (public / "out").iterdir()] == ["x"]


@each_way
def test_output_in_a_mount_point(way):
    """Where the parent of the folder is another file system."""
    if not os.path.ismount(SHARED_MEMORY) or not os.access(SHARED_MEMORY, os.W_OK):
        pytest.skip(f"{SHARED_MEMORY} is no file system of its own, or cannot be written to")
    path = SHARED_MEMORY / f"speq-test-{os.getpid()}"
    try:
        write(way, path)
        assert path.read_text() == "generated"
    finally:
        path.unlink(missing_ok=True)
    assert not list(SHARED_MEMORY.glob(".speq-*"))


@each_way
@pytest.mark.parametrize("failure", [OSError(errno.ENOSPC, "full"), KeyboardInterrupt()])
def test_a_failure_leaves_everything_as_it_was(tmp_path, way, failure):
    (tmp_path / "a").write_text("generated before")
    with pytest.raises(type(failure)):
        if way == "replacing":
            with replacing(tmp_path / "a", MARK) as temporary:
                temporary.write_text("part")
                raise failure
        with staged(tmp_path, MARKS) as folder:
            (folder / "a").write_text("part")
            raise failure
    assert {p.name: p.read_text() for p in tmp_path.iterdir()} == {"a": "generated before"}


def test_errors_name_the_place_that_a_file_is_for(tmp_path):
    with pytest.raises(OSError) as caught, replacing(tmp_path / "x", MARK) as temporary:
        raise OSError(errno.ENOSPC, "full", str(temporary))
    assert caught.value.filename == str(tmp_path / "x")
    with pytest.raises(OSError) as caught, staged(tmp_path / "out", MARKS) as folder:
        raise OSError(errno.ENOSPC, "full", str(folder / "a"))
    assert caught.value.filename == str(tmp_path / "out" / "a")
    with pytest.raises(OSError) as caught, staged(tmp_path / "out", MARKS):
        raise OSError(errno.ENOENT, "missing", "another")
    assert caught.value.filename == "another"


def test_a_file_gets_the_mode_of_any_new_one(tmp_path):
    with replacing(tmp_path / "x", MARK) as temporary:
        temporary.chmod(0o600)
    (tmp_path / "plain").touch()
    assert (tmp_path / "x").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_folders_are_made_at_the_end(tmp_path):
    folder = tmp_path / "some" / "out"
    with pytest.raises(RuntimeError), staged(folder, MARKS) as inside:
        (inside / "a").write_text("1")
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []
    with staged(folder, MARKS) as inside:
        (inside / "a").write_text("generated")
        assert not folder.exists()
    assert [p.name for p in folder.iterdir()] == ["a"]
    assert [p.name for p in tmp_path.iterdir()] == ["some"]


@pytest.mark.parametrize("part", ["out", "some"])
def test_a_folder_that_is_none_is_refused(tmp_path, part):
    folder = tmp_path / "some" / "out"
    place = folder if part == "out" else folder.parent
    place.parent.mkdir(exist_ok=True)
    for make_it in (place.touch, lambda: place.symlink_to("absent")):
        make_it()
        with pytest.raises(NotADirectoryError, match=f"{part} is not a folder"):
            write("staged", folder / "x")
        place.unlink()


def test_links_to_folders_are_followed(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    for way in ("staged", "replacing"):
        write(way, tmp_path / "link" / way)
        assert (tmp_path / "real" / way).read_text() == "generated"
    assert (tmp_path / "link").is_symlink()


def test_own_files_that_no_longer_belong_are_removed(tmp_path):
    """Others of these names stay, and are in nobody's way where they are not written."""
    marks = dict.fromkeys(("a", "old", "hand", "fifo", "link"), MARK)
    (tmp_path / "old").write_text("generated before")
    (tmp_path / "hand").write_text("by hand")
    (tmp_path / "other").write_text("generated, but none of these")
    (tmp_path / "link").symlink_to("other")
    os.mkfifo(tmp_path / "fifo")
    with staged(tmp_path, marks, ["a"]) as folder:
        (folder / "a").write_text("generated")
    assert {p.name for p in tmp_path.iterdir()} == {"a", "hand", "fifo", "link", "other"}
    assert (tmp_path / "hand").read_text() == "by hand"


def test_check_output_touches_nothing(tmp_path):
    check_output(tmp_path / "absent" / "x", MARK)
    check_output(tmp_path / "x", MARK)
    assert list(tmp_path.iterdir()) == []
