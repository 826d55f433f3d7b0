"""Bringing one image onto another's grid, on record."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from monai_deepgmm.errors import StudyError
from monai_deepgmm.images import volume as volumes
from monai_deepgmm.images import voxelwise
from monai_deepgmm.images.volume import Volume

#: An axis is taken for the slice axis when its spacing is larger than the others' by this factor.
SLICE_FACTOR = 1.5
#: Rounding of a position, in voxels.
EDGE = 1e-3


def slice_axis(spacing_mm: tuple[float, float, float]) -> int:
    """The axis along which slices are stacked: the one with clearly the largest spacing, or else the last."""
    order = np.argsort(spacing_mm, kind="stable")
    clear = spacing_mm[order[2]] > SLICE_FACTOR * spacing_mm[order[1]]
    return int(order[2]) if clear else 2


def thinned(spacing_mm: tuple[float, ...], to_mm: float) -> tuple[tuple[slice, ...], NDArray[np.float64]]:
    """What to take of each axis so that voxels are about ``to_mm`` apart, and their spacing then, in mm."""
    steps = [max(1, round(to_mm / s)) for s in spacing_mm]
    return tuple(slice(None, None, step) for step in steps), np.array(spacing_mm) * steps


def facts(volume: Volume, *, resampled: bool) -> dict[str, Any]:
    """What the sidecar says of an image that was read."""
    return {
        "file": volume.name,
        "sha256": volume.sha256,
        "shape": list(volume.source_shape),
        "spacing_mm": [round(s, 4) for s in volume.spacing_mm],
        "resampled": resampled,
    }


class Placed(NamedTuple):
    """A volume's data on another grid.

    Attributes:
        data: (X, Y, Z), 0 beyond its field of view.
        inside: (X, Y, Z) the voxels within its field of view.
        note: how it had to be resampled, in words; empty where the grids agree.
        taken: why its voxels were taken for the grid's own, in words; empty where its header says where it lies.
    """

    data: NDArray[np.floating[Any]]
    inside: NDArray[np.bool_]
    note: str = ""
    taken: str = ""


def on_grid(volume: Volume, reference: Volume, *, nearest: bool) -> Placed:
    """A volume's data on the reference's grid.

    Raises:
        StudyError: ``E_GRID``, they do not overlap.
    """
    if volumes.grids_equal(volume, reference):
        return Placed(volume.data, np.ones(volume.data.shape, bool))
    if same := voxelwise.note(volume, reference, labels=nearest):
        return Placed(volume.data, np.ones(volume.data.shape, bool), taken=same)
    if not volumes.overlaps(volume, reference):
        remedy = "Check that both belong to the same patient and examination, and that their headers are right"
        raise StudyError("E_GRID", f"{volume.name} does not overlap {reference.name} in space", remedy)
    how = "nearest neighbour" if nearest else "linear interpolation"
    note = (
        f"{volume.name} lies on another grid than {reference.name} ({_sizes(volume)} voxels of {_spacing(volume)} mm "
        f"instead of {_sizes(reference)} of {_spacing(reference)} mm, corners up to "
        f"{float(f'{apart_mm(volume, reference):.3g}'):g} mm apart); it was resampled by {how}"
    )
    inside = centres_inside(reference, volume)
    return Placed(volumes.resample(volume, reference, nearest=nearest), inside, note)


def apart_mm(a: Volume, b: Volume) -> float:
    """How far the corners of two grids lie apart at most; which axis is which does not matter."""
    first, second = (volumes.corners(v.data.shape, v.affine) for v in (a, b))
    distances = np.linalg.norm(first[:, None] - second[None], axis=-1)
    return float(max(distances.min(0).max(), distances.min(1).max()))


def centres_inside(centres: Volume, box: Volume) -> NDArray[np.bool_]:
    """Which voxels of a volume have their centre in another's box, which ends half a voxel beyond its centres."""
    to_index = np.linalg.solve(box.affine, centres.affine)
    found = np.ones(centres.data.shape, bool)
    x, y, z = (np.arange(size, dtype=np.float64) for size in centres.data.shape)
    for row, size in zip(to_index[:3], box.data.shape, strict=True):
        for k in z.astype(int):  # slice by slice, so that a large grid needs little memory
            position = row[0] * x[:, None] + row[1] * y[None, :] + (row[2] * k + row[3])
            found[:, :, k] &= (position >= -0.5 - EDGE) & (position < size - 0.5 + EDGE)
    return found


def _sizes(volume: Volume) -> str:
    return " × ".join(str(size) for size in volume.data.shape)


def _spacing(volume: Volume) -> str:
    return " × ".join(f"{size:.3g}" for size in volume.spacing_mm)
