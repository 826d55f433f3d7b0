"""Files that are whole or not there: written beside their place, flushed, read back, then renamed."""

from __future__ import annotations

import errno
import hashlib
import os
import secrets
import stat
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO

from monai_deepgmm import wording
from monai_deepgmm.errors import StudyError

if sys.platform != "win32":
    import fcntl

_PREFIX, _SUFFIX = ".deepgmm-", ".part"
_STALE_SECONDS = 3600.0
_ATTEMPTS = 5
_BLOCK = 1 << 20
_RENAMES_OPEN_FILES = sys.platform != "win32"
_UNSUPPORTED = {errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS}
_flushes = True


def shown(path: Path) -> str:
    """A file's name as it may stand in a message: no folder, no control characters, no lone surrogates."""
    return wording.shown(Path(path).name or str(path))


def refused(path: Path, code: str, found: str, remedy: str) -> StudyError:
    """The error that says what was ``found`` wrong with a file."""
    return StudyError(code, f"{shown(path)}: {found}", remedy)


def open_regular(path: Path) -> BinaryIO:
    """Opens a regular file for reading.

    Raises:
        StudyError: ``E_FILE`` for a missing file, a dangling or looping link, a folder, a pipe or device, or one
            that may not be read.
    """
    try:
        # A pipe would block at open, hence the look before it.
        mode = os.stat(path).st_mode
        if stat.S_ISREG(mode):
            return open(path, "rb")
    except (OSError, ValueError) as error:
        raise unreadable(path, error) from None
    found = "a folder" if stat.S_ISDIR(mode) else "a pipe, socket or device"
    raise refused(path, "E_FILE", f"{found} stands where a file is expected", "Name the file itself")


def unreadable(path: Path, error: Exception) -> StudyError:
    """``E_FILE`` for an error met while a file was opened or read, without its folder."""
    number = error.errno if isinstance(error, OSError) else None
    if number == errno.ENOENT and os.path.islink(path):
        return refused(path, "E_FILE", "the link points to a file that does not exist", "Repair the link")
    if number == errno.ENOENT:
        return refused(path, "E_FILE", "no such file", "Check the path")
    if number == errno.ELOOP:
        return refused(path, "E_FILE", "the link leads back to itself", "Repair the link")
    if number in (errno.EACCES, errno.EPERM):
        return refused(path, "E_FILE", "no permission to read it", "Change the file's permissions")
    reason = os.strerror(number) if number else "not a valid file name"
    return refused(path, "E_FILE", f"it cannot be read ({reason})", "Check the file and its disk")


def sha256(path: Path) -> str:
    """The SHA-256 of a file's bytes, in hexadecimal, read in blocks.

    Raises:
        StudyError: ``E_FILE``.
    """
    digest = hashlib.sha256()
    with open_regular(path) as file:
        try:
            while block := file.read(_BLOCK):
                digest.update(block)
        except OSError as error:
            raise unreadable(path, error) from None
    return digest.hexdigest()


def write_whole(path: Path, data: bytes) -> None:
    """Writes a file so that it is never seen half written, whatever happens.

    The bytes go to a hidden temporary file in the same folder, are flushed to the disk, read back and compared; then
    the file takes its place in one step. On any failure the temporary file is removed and an older file stays.

    Args:
        path: where the file belongs; its folder exists.
        data: the whole content.

    Raises:
        StudyError: ``E_DISK`` when the disk or quota is full, ``E_NAME`` when the name is too long, else ``E_WRITE``.
    """
    path = Path(path)
    for attempt in range(1, _ATTEMPTS + 1):
        try:
            _write_beside(path, data)
            return
        except FileNotFoundError as error:
            # Where locks are not shared between machines, another run may have taken our file for a leftover.
            if attempt == _ATTEMPTS or not path.parent.is_dir():
                raise unwritten(path, error) from None
        except (OSError, ValueError) as error:
            raise unwritten(path, error) from None


def _write_beside(path: Path, data: bytes) -> None:
    part = path.parent / f"{_PREFIX}{os.getpid()}-{secrets.token_hex(8)}{_SUFFIX}"
    descriptor = os.open(part, os.O_RDWR | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0), 0o666)
    try:
        with os.fdopen(descriptor, "r+b") as file:
            # The lock says that the writer lives; the system drops it when the process ends, however it ends.
            _lock(file)
            file.write(data)
            _flush(file)
            if part.read_bytes() != data:
                raise OSError(errno.EIO, "the bytes read back differ from those written")
            if _RENAMES_OPEN_FILES:
                os.replace(part, path)
        if not _RENAMES_OPEN_FILES:
            os.replace(part, path)
    except BaseException:
        with suppress(OSError):
            part.unlink()
        raise
    _flush_folder(path.parent)


def _flush(file: BinaryIO) -> None:
    """Brings a file's bytes to the disk; ``flushes`` tells of a share that cannot say when that is done."""
    global _flushes
    file.flush()
    try:
        os.fsync(file.fileno())
    except OSError as error:
        if error.errno not in _UNSUPPORTED:
            raise
        _flushes = False


def flushes() -> bool:
    """Whether every file that this process wrote is on its disk for certain."""
    return _flushes


def _lock(file: BinaryIO) -> bool:
    """Takes the lock if it is free. False: the lock is held elsewhere, or there are no locks here."""
    if sys.platform == "win32":
        return False
    try:
        fcntl.flock(file.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def _flush_folder(folder: Path) -> None:
    # Not every file system can flush a folder; the file's own bytes are on the disk already.
    with suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def folder(place: Path) -> Path:
    """The folder, made with its parents where it is not there.

    Raises:
        StudyError: ``E_DISK``, ``E_NAME`` or ``E_WRITE``.
    """
    try:
        place.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise unwritten(place, error) from error
    return place


def unwritten(path: Path, error: Exception) -> StudyError:
    """What a failed write means to the user: ``E_DISK``, ``E_NAME`` or ``E_WRITE``."""
    number = error.errno if isinstance(error, OSError) else None
    if number in (errno.ENOSPC, errno.EDQUOT):
        return refused(path, "E_DISK", "the disk is full", "Free some space and run the command again")
    if number == errno.ENAMETOOLONG:
        return refused(path, "E_NAME", "the name is too long for a file", "Shorten the patient id")
    reason = os.strerror(number) if number else "not a valid file name"
    return refused(
        path, "E_WRITE", f"it could not be written ({reason})", "Check the output folder and its permissions"
    )


def stale_temporaries(folder: Path) -> tuple[Path, ...]:
    """Removes what a killed run left half written in a folder (not below it).

    A temporary file is a leftover when its writer's lock is gone, or, where the file system knows no locks, when it
    has not been written to for an hour. A writer whose file is taken all the same writes it again.

    Returns:
        The removed files.
    """
    removed = []
    for part in sorted(Path(folder).glob(f"{_PREFIX}*{_SUFFIX}")):
        with suppress(OSError), open(part, "r+b") as file:
            if _lock(file) or time.time() - os.fstat(file.fileno()).st_mtime > _STALE_SECONDS:
                part.unlink()
                removed.append(part)
    return tuple(removed)
