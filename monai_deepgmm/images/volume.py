"""An image in space: voxels, where they lie, and whether two of them share a grid."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product

import nibabel as nib
import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, eq=False)
class Volume:
    """One image, with all that is needed to write a result on its grid.

    Attributes:
        data: (X, Y, Z) intensities, the header's scaling applied; NaN and infinity are kept.
        affine: (4, 4) float64, voxel index → mm (RAS).
        header: the source's own, in the source's own units.
        source_shape: as in the file, such as (X, Y), (X, Y, Z, 1) or (X, Y, Z, T).
        name: the file's name.
        sha256: of the file's bytes, in hexadecimal.
        warnings: each begins with a code, such as "W_QFORM: …".
        placed: whether the header says where the image lies.
    """

    data: NDArray[np.floating]
    affine: NDArray[np.float64]
    header: nib.Nifti1Header
    source_shape: tuple[int, ...]
    name: str
    sha256: str
    warnings: tuple[str, ...] = ()
    placed: bool = True

    @property
    def spacing_mm(self) -> tuple[float, float, float]:
        """Distance between neighbouring voxel centres along each axis, mm."""
        x, y, z = np.linalg.norm(self.affine[:3, :3], axis=0).tolist()
        return x, y, z

    @property
    def voxel_ml(self) -> float:
        """Volume of one voxel, ml."""
        return float(abs(np.linalg.det(self.affine[:3, :3]))) / 1000.0


def corners(shape: tuple[int, ...], affine: NDArray[np.float64]) -> NDArray[np.float64]:
    """Centres (8, 3) in mm of the corner voxels of an (X, Y, Z) grid."""
    index = np.array(list(product(*((0, size - 1) for size in shape))), dtype=np.float64)
    found: NDArray[np.float64] = index @ affine[:3, :3].T + affine[:3, 3]
    return found


def grids_equal(a: Volume, b: Volume, *, tolerance_mm: float = 1e-3) -> bool:
    """Whether two volumes have the same shape and their corner voxels agree within ``tolerance_mm``."""
    if a.data.shape != b.data.shape:
        return False
    return corners_apart_mm(a, b) <= tolerance_mm


def corners_apart_mm(a: Volume, b: Volume) -> float:
    """How far the same corner voxel of two grids of one shape lies apart at most."""
    apart = corners(a.data.shape, a.affine) - corners(b.data.shape, b.affine)
    return float(np.linalg.norm(apart, axis=1).max())


def overlaps(a: Volume, b: Volume) -> bool:
    """Whether a voxel centre of either volume lies inside the other's box (which ends half a voxel beyond)."""
    return _any_centre_inside(a, b) or _any_centre_inside(b, a)


def _any_centre_inside(centres: Volume, box: Volume) -> bool:
    to_index = np.linalg.solve(box.affine, centres.affine)
    x, y, z = (np.arange(size, dtype=np.float64) for size in centres.data.shape)
    for k in z:  # slice by slice, so that a large grid needs little memory
        inside = np.ones((x.size, y.size), dtype=bool)
        for row, size in zip(to_index[:3], box.data.shape, strict=True):
            position = row[0] * x[:, None] + row[1] * y[None, :] + (row[2] * k + row[3])
            inside &= (position >= -0.5) & (position < size - 0.5)
        if inside.any():
            return True
    return False


def resample(volume: Volume, like: Volume, *, nearest: bool = False) -> NDArray[np.floating]:
    """A volume's intensities on another volume's grid.

    Args:
        volume: what is resampled.
        like: whose grid is wanted; oblique, flipped and sheared grids are all right.
        nearest: nearest neighbour, for masks and labels, instead of linear interpolation.

    Returns:
        (X, Y, Z) on ``like``'s grid, in ``volume``'s dtype; 0 outside ``volume``'s box.
    """
    import SimpleITK as sitk  # noqa: N813 (the name its own manual uses); only what is resampled needs it

    source = sitk.GetImageFromArray(volume.data.transpose(2, 1, 0))
    origin, spacing, direction = _frame(volume)
    source.SetOrigin(origin)
    source.SetSpacing(spacing)
    source.SetDirection(direction)
    resampler = sitk.ResampleImageFilter()
    resampler.SetInterpolator(sitk.sitkNearestNeighbor if nearest else sitk.sitkLinear)
    resampler.SetDefaultPixelValue(0.0)
    resampler.SetSize(like.data.shape)
    origin, spacing, direction = _frame(like)
    resampler.SetOutputOrigin(origin)
    resampler.SetOutputSpacing(spacing)
    resampler.SetOutputDirection(direction)
    # A copy, not a view: the view would outlive the image whose memory it shows.
    resampled = sitk.GetArrayFromImage(resampler.Execute(source))
    return np.ascontiguousarray(resampled.transpose(2, 1, 0))


def _frame(volume: Volume) -> tuple[list[float], list[float], list[float]]:
    # Both grids keep RAS: the axes' names do not matter as long as they agree. The columns need not be orthogonal.
    spacing = np.array(volume.spacing_mm)
    direction = volume.affine[:3, :3] / spacing
    return volume.affine[:3, 3].tolist(), spacing.tolist(), direction.ravel().tolist()
