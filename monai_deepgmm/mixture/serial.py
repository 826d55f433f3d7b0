"""One thread for work that is too small to share."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

#: Fewer elements than these are not worth sharing: threads that wait for the next share of work take whole cores.
WORTH_SHARING = 1 << 21


@contextmanager
def serial(elements: int) -> Iterator[None]:
    """Torch works on one thread, where its largest arrays have no more than so many elements."""
    before = torch.get_num_threads()
    small = before > 1 and elements < WORTH_SHARING
    if small:
        torch.set_num_threads(1)
    try:
        yield
    finally:
        if small:
            torch.set_num_threads(before)
