"""Which voxel sizes count where an image's header contradicts itself, as ``--spacing`` says it."""

from __future__ import annotations

import math
from collections.abc import Sequence

from monai_deepgmm.errors import UsageError

#: None: nobody has said; ``sform`` or ``pixdim``: that part of the header; three sizes in mm.
Spacing = str | tuple[float, float, float] | None

PARTS = ("sform", "pixdim")


def parse(given: str | Sequence[float] | None) -> Spacing:
    """The rule that a user typed, such as ``pixdim`` or ``1.4,1.4,10``.

    Raises:
        UsageError: it is neither a part of the header nor three sizes.
    """
    if given is None or given in PARTS:
        return given if given is None else str(given)
    parts = given.split(",") if isinstance(given, str) else list(given)
    try:
        sizes = [float(part) for part in parts]
    except (TypeError, ValueError):
        sizes = []
    if len(sizes) != 3 or not all(math.isfinite(size) and 0 < size < 1e4 for size in sizes):
        raise UsageError(f"--spacing {given}: expected sform, pixdim, or three voxel sizes in mm such as 1.4,1.4,10")
    x, y, z = sizes
    return x, y, z
