"""A file is whole or as it was, whatever stops the writer."""

import errno
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import BinaryIO

import pytest

from ovit_engine.utils import files
from ovit_engine.utils.files import atomic_write, staged


def test_replaces_the_old_file_and_leaves_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "a.bin"
    atomic_write(path, lambda stream: stream.write(b"old"))
    atomic_write(path, lambda stream: stream.write(b"new"))
    assert path.read_bytes() == b"new"
    assert os.listdir(tmp_path) == ["a.bin"]


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()])
def test_a_writer_that_fails_midway_leaves_the_old_file(tmp_path: Path, error: BaseException) -> None:
    path = tmp_path / "a.bin"
    path.write_bytes(b"old")

    def write(stream: BinaryIO) -> None:
        stream.write(b"half of the n")
        raise error

    with pytest.raises(type(error)):
        atomic_write(path, write)
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["a.bin"]


def test_a_disk_that_is_full_only_when_flushed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.bin"
    path.write_bytes(b"old")

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        atomic_write(path, lambda stream: stream.write(b"new"))
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["a.bin"]


def test_a_missing_folder_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        atomic_write(tmp_path / "none" / "a.bin", lambda stream: stream.write(b"new"))


KILLED = """
import os, runpy, signal

atomic_write = runpy.run_path({source!r})["atomic_write"]

def write(stream):
    stream.write(b"half of the n")
    stream.flush()
    os.kill(os.getpid(), signal.SIGKILL)

atomic_write({path!r}, write)
"""


def test_a_kill_midway_leaves_the_old_file_and_the_next_write_works(tmp_path: Path) -> None:
    path = tmp_path / "a.bin"
    path.write_bytes(b"old")
    source = files.__file__  # without the package: importing torch takes seconds
    done = subprocess.run([sys.executable, "-c", KILLED.format(source=source, path=str(path))], check=False)
    assert done.returncode == -signal.SIGKILL
    assert path.read_bytes() == b"old"
    atomic_write(path, lambda stream: stream.write(b"new"))
    assert path.read_bytes() == b"new"


def test_what_kills_left_goes_with_a_later_write(tmp_path: Path) -> None:
    """Only hidden files of this very path, and only old ones: a young one may be another process at work."""
    path = tmp_path / "a[1].bin"
    names = [
        ".a[1].bin.0123abcd.tmp",
        ".a[1].bin.ffffffff.tmp",
        ".a1.bin.0123abcd.tmp",
        ".a[1].bin.tmp",
        "a[1].bin.tmp",
    ]
    for name in names:
        (tmp_path / name).mkdir()
        (tmp_path / name / "a[1].bin").write_bytes(b"half")
        for part in (tmp_path / name / "a[1].bin", tmp_path / name):
            os.utime(part, (time.time() - 7200, time.time() - (60 if "ffff" in name else 7200)))
    (tmp_path / ".a[1].bin.01234567.tmp").write_bytes(b"half")  # a plain file: of `save_checkpoint`
    os.utime(tmp_path / ".a[1].bin.01234567.tmp", (time.time() - 7200, time.time() - 7200))
    atomic_write(path, b"new")
    assert sorted(os.listdir(tmp_path)) == sorted(["a[1].bin", *names[1:]])


def test_a_long_write_is_no_leftover(tmp_path: Path) -> None:
    """The folder of a write is as old as its start, the file inside as its last byte."""
    scratch = tmp_path / ".a.bin.0123abcd.tmp"
    scratch.mkdir()
    (scratch / "a.bin").write_bytes(b"half")
    os.utime(scratch, (time.time() - 7200, time.time() - 7200))
    atomic_write(tmp_path / "a.bin", b"new")
    assert (scratch / "a.bin").exists()


def test_text_and_bytes(tmp_path: Path) -> None:
    atomic_write(tmp_path / "a", "é")
    atomic_write(tmp_path / "b", b"\xff")
    assert ((tmp_path / "a").read_bytes(), (tmp_path / "b").read_bytes()) == (b"\xc3\xa9", b"\xff")


def test_files_that_belong_together_appear_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The named file last: who sees it sees the others."""
    moved: list[str] = []
    replace = os.replace
    monkeypatch.setattr(os, "replace", lambda old, new: (moved.append(Path(new).name), replace(old, new)))
    path = tmp_path / "a.onnx"
    with staged(path) as draft:
        draft.write_bytes(b"model")
        draft.with_name("z.json").write_bytes(b"facts")
        assert not path.exists()
    assert moved == ["z.json", "a.onnx"]

    def fails() -> None:
        with staged(path) as draft:
            draft.write_bytes(b"other")
            draft.with_name("z.json").write_bytes(b"other")
            raise ValueError("breaks its promise")

    with pytest.raises(ValueError, match="breaks its promise"):
        fails()
    assert [(tmp_path / name).read_bytes() for name in ("a.onnx", "z.json")] == [b"model", b"facts"]
    assert sorted(os.listdir(tmp_path)) == ["a.onnx", "z.json"]


def test_a_folder_is_told_by_its_name(tmp_path):
    with pytest.raises(IsADirectoryError, match=f"'{tmp_path}' is a folder: name the file"):
        atomic_write(tmp_path, lambda stream: stream.write(b"x"))
    with pytest.raises(FileNotFoundError, match=f"no such folder: {tmp_path / 'no'}"):
        atomic_write(tmp_path / "no" / "file", lambda stream: stream.write(b"x"))
