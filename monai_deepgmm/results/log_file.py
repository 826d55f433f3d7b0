"""``deepgmm.log``: what was said during a run, beside its results."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from monai_deepgmm.images import atomic_files


class _LogFile(logging.FileHandler):
    """A log that a full disk silences: the patients' own failures say what happened."""

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802 (logging's own name)
        pass

    def close(self) -> None:
        with suppress(OSError):
            super().close()


@contextmanager
def log_file(out: Path) -> Iterator[None]:
    """Everything said goes to ``deepgmm.log`` in the output folder too.

    Raises:
        StudyError: ``E_DISK`` or ``E_WRITE``, it cannot be written.
    """
    path = out / "deepgmm.log"
    try:
        handler = _LogFile(path, encoding="utf-8", errors="backslashreplace")
    except OSError as error:
        raise atomic_files.unwritten(path, error) from error
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    package = logging.getLogger("monai_deepgmm")
    if package.level == logging.NOTSET:  # a program that set the level itself knows why
        package.setLevel(logging.INFO)
    package.addHandler(handler)
    try:
        yield
    finally:
        package.removeHandler(handler)
        handler.close()
