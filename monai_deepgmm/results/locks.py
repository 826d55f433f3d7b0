"""Locks in an output folder: two runs never work on one patient, or on the tables, at the same time."""

from __future__ import annotations

import contextlib
import errno
from collections.abc import Iterator
from pathlib import Path

from filelock import FileLock, Timeout

from monai_deepgmm.images import atomic_files
from monai_deepgmm.results import row_files

#: The folder of their files.
FOLDER = ".locks"
#: What a file system says that knows no locks; there, two runs must not share an output folder.
_NO_LOCKS = {errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK, errno.EINVAL}


@contextlib.contextmanager
def lock(out: Path, what: str, *, wait_s: float = -1) -> Iterator[bool]:
    """Holds a lock of the output folder while one patient (or the tables) is worked on; runs wait for each other.

    Args:
        out: the output folder.
        what: the patient.
        wait_s: how many seconds to wait for another run; below 0: as long as it takes.

    Yields:
        Whether the lock is held; False: another run had it for all that time.

    Raises:
        StudyError: ``E_DISK`` or ``E_WRITE``, the lock's file cannot be made.
    """
    path = atomic_files.folder(out / FOLDER) / row_files.digest(what)[:16]
    held = FileLock(path)
    try:
        held.acquire(timeout=wait_s)
    except Timeout:
        yield False
        return
    except NotImplementedError:
        pass
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise atomic_files.unwritten(path, error) from error
    try:
        yield True
    finally:
        held.release()
