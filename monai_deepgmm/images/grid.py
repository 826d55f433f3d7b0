"""Bringing one image onto another's grid, on record."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from monai_deepgmm.errors import StudyError
from monai_deepgmm.images import volume as volumes
from monai_deepgmm.images import voxelwise
from monai_deepgmm.images.volume import Volume


def facts(volume: Volume, *, resampled: bool) -> dict[str, Any]:
    """What the sidecar says of an image that was read."""
    return {
        "file": volume.name,
        "sha256": volume.sha256,
        "shape": list(volume.source_shape),
        "spacing_mm": [round(s, 4) for s in volume.spacing_mm],
        "resampled": resampled,
    }


def on_grid(volume: Volume, reference: Volume, *, nearest: bool) -> tuple[NDArray[np.floating[Any]], str | None]:
    """A volume's data on the reference's grid, and a warning where it had to be resampled."""
    if volumes.grids_equal(volume, reference):
        return volume.data, None
    if same := voxelwise.note(volume, reference, labels=nearest):
        return volume.data, same
    if not volumes.overlaps(volume, reference):
        remedy = "Check that both belong to the same patient and examination, and that their headers are right"
        raise StudyError("E_GRID", f"{volume.name} does not overlap {reference.name} in space", remedy)
    how = "nearest neighbour" if nearest else "linear interpolation"
    note = f"W_RESAMPLED: {volume.name} lies on another grid than {reference.name}; it was resampled by {how}"
    return volumes.resample(volume, reference, nearest=nearest), note
