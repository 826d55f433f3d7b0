"""What of the organ a stack of slices covers, as far as the mask tells."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from monai_deepgmm.results.segmentation import Segmentation
from monai_deepgmm.wording import spans


def facts(segmentation: Segmentation) -> dict[str, Any]:
    """For the sidecar: how many slices hold the mask, how far apart they are, and where the mask meets the stack's end.

    Gaps are slices without mask between slices with mask.
    """
    held = np.flatnonzero(np.moveaxis(segmentation.mask, segmentation.slice_axis, 0).any((1, 2)))
    count = segmentation.mask.shape[segmentation.slice_axis]
    between = range(int(held[0]), int(held[-1])) if len(held) else range(0)
    return {
        "slices": len(held),
        "of": count,
        "spacing_mm": round(segmentation.reference.spacing_mm[segmentation.slice_axis], 4),
        "on_first_slice": bool(len(held) and held[0] == 0),
        "on_last_slice": bool(len(held) and held[-1] == count - 1),
        "gaps": sorted(set(between) - set(held.tolist())),
    }


def about(segmentation: Segmentation) -> Iterator[str]:
    """A warning where slices within the organ have no mask; what else ``facts`` tells is usual in clean stacks."""
    if gaps := facts(segmentation)["gaps"]:
        yield (
            f"W_COVERAGE: the mask leaves out slice {spans(gaps)} between slices that it covers, so volumes lack what "
            "lies there; draw it on them, or check that they are empty"
        )
