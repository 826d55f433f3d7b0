"""Files that are whole or not there, whatever happens while they are written."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import pytest

from monai_deepgmm.errors import StudyError
from monai_deepgmm.images import atomic_files


def parts(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir())


def failing(number: int):
    def fail(*_: object, **__: object) -> None:
        raise OSError(number, os.strerror(number))

    return fail


def refused(path: Path, data: bytes = b"x") -> str:
    """The code of a write that fails."""
    with pytest.raises(StudyError) as caught:
        atomic_files.write_whole(path, data)
    assert str(path.parent) not in str(caught.value)
    return caught.value.code


def test_a_written_file_holds_the_bytes_with_the_umasks_permissions_and_nothing_else_is_left(tmp_path):
    path = tmp_path / "ünï cøde name.bin"
    atomic_files.write_whole(path, b"older")
    before = os.umask(0o027)
    try:
        atomic_files.write_whole(path, b"newer")
    finally:
        os.umask(before)
    assert path.read_bytes() == b"newer"
    assert path.stat().st_mode & 0o777 == 0o640
    assert parts(tmp_path) == [path.name]


@pytest.mark.parametrize("call", ["fsync", "replace"])
@pytest.mark.parametrize(
    ("number", "code"),
    [
        (errno.ENOSPC, "E_DISK"),
        (errno.EDQUOT, "E_DISK"),
        (errno.EIO, "E_WRITE"),
        (errno.EACCES, "E_WRITE"),
        (errno.ENAMETOOLONG, "E_NAME"),
    ],
)
def test_a_failed_write_keeps_the_older_file_and_leaves_no_temporary(tmp_path, monkeypatch, call, number, code):
    path = tmp_path / "labels.nii.gz"
    path.write_bytes(b"older")
    monkeypatch.setattr(atomic_files.os, call, failing(number))
    with pytest.raises(StudyError, match=r"labels\.nii\.gz") as caught:
        atomic_files.write_whole(path, b"newer")
    assert caught.value.code == code
    assert str(tmp_path) not in str(caught.value)
    assert path.read_bytes() == b"older"
    assert parts(tmp_path) == ["labels.nii.gz"]


def test_a_share_that_cannot_flush_is_written_to_all_the_same(tmp_path, monkeypatch):
    monkeypatch.setattr(atomic_files, "_flushes", True)
    atomic_files.write_whole(tmp_path / "a", b"x")
    assert atomic_files.flushes()
    monkeypatch.setattr(atomic_files, "_RENAMES_OPEN_FILES", False)  # as Windows has it
    monkeypatch.setattr(atomic_files.os, "fsync", failing(errno.EINVAL))
    atomic_files.write_whole(tmp_path / "a", b"y")
    assert (tmp_path / "a").read_bytes() == b"y"
    assert parts(tmp_path) == ["a"]
    assert not atomic_files.flushes()


def test_bytes_that_read_back_differently_are_a_failure_and_an_interrupt_leaves_no_temporary(tmp_path, monkeypatch):
    with monkeypatch.context() as patched:
        patched.setattr(atomic_files.Path, "read_bytes", lambda _: b"rotten")
        assert refused(tmp_path / "a") == "E_WRITE"

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(atomic_files.os, "replace", interrupt)
    with pytest.raises(KeyboardInterrupt):
        atomic_files.write_whole(tmp_path / "a", b"x")
    assert parts(tmp_path) == []


def test_places_that_cannot_be_are_refused_and_the_longest_name_works(tmp_path):
    atomic_files.write_whole(tmp_path / ("n" * 255), b"x")
    assert refused(tmp_path / ("n" * 256)) == "E_NAME"
    assert refused(tmp_path / "no folder" / "a") == refused(tmp_path / "nul\0byte") == "E_WRITE"
    assert parts(tmp_path) == ["n" * 255]


def test_sha256_is_that_of_the_bytes_and_of_nothing_or_a_pipe_a_file_error(tmp_path):
    data = os.urandom((1 << 20) + 17)
    (tmp_path / "a").write_bytes(data)
    assert atomic_files.sha256(tmp_path / "a") == hashlib.sha256(data).hexdigest()
    os.mkfifo(tmp_path / "pipe")  # nobody waits for it
    for name in ("absent", "pipe"):
        with pytest.raises(StudyError) as caught:
            atomic_files.sha256(tmp_path / name)
        assert caught.value.code == "E_FILE"


@pytest.mark.parametrize(
    ("name", "expected"), [("a b é", "a b é"), ("x\x1b[31m\n", "x\\x1b[31m\\n"), ("\udcff", "\\udcff")]
)
def test_a_shown_name_is_printable(name, expected):
    assert atomic_files.shown(Path("/secret/folder") / name) == expected


KILLED = """
    import os, sys
    from pathlib import Path
    from monai_deepgmm.images import atomic_files
    atomic_files.os.replace = lambda *_: os.kill(os.getpid(), 9)
    atomic_files.write_whole(Path(sys.argv[1]), b"half")
"""


def test_what_a_killed_run_leaves_is_removed_at_once(tmp_path):
    killed = subprocess.run([sys.executable, "-c", textwrap.dedent(KILLED), str(tmp_path / "a.nii.gz")], check=False)
    assert killed.returncode == -9
    (left,) = parts(tmp_path)
    assert left.startswith(".")
    (tmp_path / ".hidden").touch()
    assert [path.name for path in atomic_files.stale_temporaries(tmp_path)] == [left]
    assert parts(tmp_path) == [".hidden"]


def test_without_locks_only_an_hours_silence_counts(tmp_path, monkeypatch):
    monkeypatch.setattr(fcntl, "flock", failing(errno.EOPNOTSUPP))
    old, new = tmp_path / ".deepgmm-1-00.part", tmp_path / ".deepgmm-1-01.part"
    for part in (old, new):
        part.touch()
    os.utime(old, (time.time() - 4000, time.time() - 4000))
    assert atomic_files.stale_temporaries(tmp_path) == (old,)
    assert parts(tmp_path) == [new.name]


@pytest.mark.parametrize("mistaken", [False, True])
def test_a_live_writers_temporary_stays_and_one_taken_by_mistake_is_written_again(tmp_path, monkeypatch, mistaken):
    taken, replace = [], os.replace

    def meanwhile(source, target):
        if mistaken and not taken:
            taken.append(source)
            source.unlink()
        else:
            assert atomic_files.stale_temporaries(tmp_path) == ()
        replace(source, target)

    monkeypatch.setattr(atomic_files.os, "replace", meanwhile)
    atomic_files.write_whole(tmp_path / "a", b"x")
    assert (tmp_path / "a").read_bytes() == b"x"
    assert parts(tmp_path) == ["a"]


def test_two_writers_and_a_cleaner_never_show_a_partial_file(tmp_path):
    contents = [bytes([value]) * 50_000 for value in (1, 2)]
    path, seen, done = tmp_path / "a", set(), threading.Event()
    atomic_files.write_whole(path, contents[0])

    def write(content: bytes) -> None:
        for _ in range(20):
            atomic_files.write_whole(path, content)

    def clean() -> None:
        while not done.is_set():
            atomic_files.stale_temporaries(tmp_path)
            seen.add(path.read_bytes())

    cleaner = threading.Thread(target=clean)
    writers = [threading.Thread(target=write, args=(content,)) for content in contents]
    for thread in (cleaner, *writers):
        thread.start()
    for thread in writers:
        thread.join()
    done.set()
    cleaner.join()
    assert seen <= set(contents)
    assert parts(tmp_path) == ["a"]
