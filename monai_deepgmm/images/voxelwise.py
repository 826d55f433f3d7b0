"""Images that do not say where they lie: with the reference's shape they are taken voxel for voxel.

A mask drawn on an image has that image's voxels, whatever its tool wrote of where they are.
"""

from __future__ import annotations

import numpy as np

from monai_deepgmm.errors import StudyError
from monai_deepgmm.images.volume import Volume, corners_apart_mm


def note(volume: Volume, reference: Volume, *, labels: bool) -> str | None:
    """What is to be told of a volume whose voxels are the reference's own; None: its header says where it lies.

    Args:
        volume: on another grid than the reference, by their headers.
        reference: the image whose grid counts.
        labels: whether it is a mask or labels: its voxels' size then changes nothing.

    Raises:
        StudyError: ``E_SPACING``, both have one shape and the one that does not say where it lies has voxels of 1 mm,
            the other has not; ``E_GRID``, their shapes differ, and nothing says how they lie to each other.
    """
    silent = [v for v in (volume, reference) if not v.placed]
    if not silent:
        return None
    bare = [v for v in silent if np.allclose(v.spacing_mm, 1, rtol=1e-3)]
    if volume.data.shape != reference.data.shape:
        if len(silent) == 1 and bare:
            shapes = f"{volume.name} has {_shape(volume)} voxels, {reference.name} {_shape(reference)}"
            remedy = "Export it again with its position, or on the grid of the other"
            raise StudyError("E_GRID", f"{bare[0].name} does not say where it lies; {shapes}", remedy)
        return None
    alike = np.allclose(volume.spacing_mm, reference.spacing_mm, rtol=0.01)
    if alike or (labels and volume in silent):
        return (
            f"{silent[0].name} does not say where it lies; {volume.name} was taken voxel for voxel for "
            f"{reference.name} (their headers are up to {corners_apart_mm(volume, reference):.0f} mm apart)"
        )
    if not bare:
        return None
    found = f"{volume.name} has voxels of {_mm(volume)} mm and {reference.name} of {_mm(reference)} mm"
    why = f"they have one shape, and {bare[0].name} does not say where it lies"
    raise StudyError("E_SPACING", f"{found}: {why}", "Give its voxels' size: --spacing X,Y,Z in mm")


def _mm(volume: Volume) -> str:
    return " × ".join(f"{size:.4g}" for size in volume.spacing_mm)


def _shape(volume: Volume) -> str:
    return " × ".join(map(str, volume.data.shape))
