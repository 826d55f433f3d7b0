"""What other processes used while something ran, for the benchmark."""

from __future__ import annotations

import contextlib
import ctypes
import os
import resource
import sys
from collections.abc import Iterator

PR_SET_CHILD_SUBREAPER = 36  # of Linux's prctl


@contextlib.contextmanager
def counted_children() -> Iterator[dict[str, float]]:
    """Fills in what the processes that were started meanwhile used: ``spent`` CPU seconds, when all have ended.

    Linux hands this process also those whose parent ended before them, such as the one that workers are forked from.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1)
    found: dict[str, float] = {}
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    yield found
    with contextlib.suppress(ChildProcessError):
        while True:
            os.waitpid(-1, 0)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    found["spent"] = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def as_installed() -> dict[str, str]:
    """The environment with bytecode kept, as where the package is installed; a side's first, untimed run makes it."""
    return {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
