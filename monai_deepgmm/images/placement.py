"""Where a header places its image, and what becomes of headers that contradict themselves."""

from __future__ import annotations

import math
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import nibabel as nib
import numpy as np
from nibabel.spatialimages import HeaderDataError
from numpy.typing import NDArray

from monai_deepgmm.errors import StudyError
from monai_deepgmm.images.atomic_files import refused, shown
from monai_deepgmm.patients.spacing import Spacing

_MILLIMETRES = {"": 1.0, "metres": 1000.0, "micron": 0.001, "an unknown unit, taken for mm": 1.0}
_UNITS = {0: "", 1: "metres", 2: "", 3: "micron"}
#: Voxel sizes that differ by less are the same.
_ALIKE = 0.01
_DECIDE = "Say which is right: --spacing sform, --spacing pixdim, or --spacing X,Y,Z in mm"

Affine = NDArray[np.float64]


class Placement(NamedTuple):
    """Where an image lies.

    Attributes:
        affine: (4, 4) voxel index → mm (RAS).
        known: False where the header says nothing of it: no form, or axes of the identity with their origin at 0.
        warnings: each begins with its code.
    """

    affine: Affine
    known: bool
    warnings: tuple[str, ...]


def place(path: Path, header: nib.Nifti1Header, shape: tuple[int, ...], *, spacing: Spacing = None) -> Placement:
    """The affine in mm: the sform if its code is positive, else the qform, else the voxel sizes.

    Args:
        path: the file, for messages.
        header: as parsed.
        shape: of the image, three axes.
        spacing: which voxel sizes count where sform and pixdim contradict each other.

    Raises:
        StudyError: ``E_AFFINE``, or ``E_SPACING`` for a contradiction that nobody has settled.
    """
    name = shown(path)
    repaired, odd = _repaired_pixdim(header)
    warnings = [f"W_PIXDIM: {name}: a voxel size is zero, negative or not finite"] if odd else []
    unit = _UNITS.get(int(header["xyzt_units"]) & 7, "an unknown unit, taken for mm")
    if unit:
        warnings.append(f"W_UNITS: {name}: the header gives lengths in {unit}; the affine is used in mm")
    has_sform, has_qform = int(header["sform_code"]) > 0, int(header["qform_code"]) > 0
    qform = _in_mm(_qform(repaired), unit) if has_qform else None
    if has_sform:
        affine = _checked(path, _in_mm(np.array(header.get_sform(), dtype=np.float64), unit))
        affine, settled = _settled(path, affine, _stated(header, affine, unit), qform, spacing)
        warnings += settled
        if not settled and qform is not None and not _same_placement(affine, qform):
            warnings.append(f"W_QFORM: {name}: qform and sform place the image differently; the sform is used")
    elif qform is not None:
        affine = qform
    else:
        warnings.append(f"W_NOFORM: {name}: neither sform nor qform is set; placed by the voxel sizes alone")
        affine = _in_mm(_centred(repaired, shape), unit)
    affine, known = _checked(path, affine), (has_sform or has_qform) and not _says_nothing(affine)
    if isinstance(spacing, tuple) and not known and np.allclose(_sizes(affine), 1, rtol=1e-3):
        affine = _rescaled(affine, np.array(spacing))
        warnings.append(f"W_SPACING: {name} says nothing of its voxels' size; taken for {_listed(spacing)} mm")
    if _shear(affine) > 1e-3:
        warnings.append(f"W_SHEAR: {name}: the image axes are not at right angles")
    return Placement(affine, known, tuple(warnings))


# Contradictions ----------------------------------------------------------------------------------------------------


def _stated(header: nib.Nifti1Header, affine: Affine, unit: str) -> NDArray[np.float64] | None:
    """The sizes by pixdim in mm (3,), NaN where it has none; None where the sform's are the same."""
    pixdim, used = np.array(header["pixdim"][1:4], dtype=np.float64), _sizes(affine)
    pixdim[~np.isfinite(pixdim) | (pixdim <= 0)] = np.nan
    axes = np.arange(3) < int(header["dim"][0])
    sizes = [np.where(axes, pixdim * factor, used) for factor in (_MILLIMETRES[unit], 1.0)]
    # In a header in metres, pixdim may be in mm all the same; of sheared axes it may hold other sizes than along them.
    tolerance = _ALIKE + _shear(affine)
    if any(np.all(np.isnan(stated) | np.isclose(stated, used, rtol=tolerance, atol=0)) for stated in sizes):
        return None
    return sizes[0]


def _settled(
    path: Path, affine: Affine, stated: NDArray[np.float64] | None, qform: Affine | None, spacing: Spacing
) -> tuple[Affine, list[str]]:
    """The affine after a contradiction was settled, and the warning that says how.

    Raises:
        StudyError: ``E_SPACING``, only a person can settle it.
    """
    if stated is None:
        return affine, []
    used = _sizes(affine)
    found = f"has voxels of {_listed(used)} mm by its sform, but {_listed(stated)} by pixdim"
    rule = spacing or ("pixdim" if np.allclose(used, 1, rtol=1e-3) else None)
    if rule is None or (rule == "pixdim" and np.isnan(stated).any()):
        raise StudyError("E_SPACING", f"{shown(path)} {found}", _DECIDE)
    how = f"{_listed(rule)} mm" if isinstance(rule, tuple) else f"the {rule}" if rule == "sform" else rule
    note = f"W_SPACING: {shown(path)} {found}; volumes and distances follow {how}"
    if rule == "sform":
        return affine, [note]
    placed = qform if qform is not None and _invertible(qform) else affine
    return _rescaled(placed, stated if rule == "pixdim" else np.array(rule)), [note]


def _rescaled(affine: Affine, sizes: NDArray[np.float64]) -> Affine:
    """The same axes and origin with other voxel sizes in mm."""
    changed = affine.copy()
    changed[:3, :3] *= sizes / _sizes(affine)
    return changed


def _says_nothing(affine: Affine) -> bool:
    """Whether the axes are the identity's but for signs and the origin is 0, as written where neither is known."""
    axes = np.abs(affine[:3, :3]) / _sizes(affine)
    return bool(np.allclose(axes, np.eye(3), atol=1e-6) and not affine[:3, 3].any())


def _sizes(affine: Affine) -> NDArray[np.float64]:
    with np.errstate(all="ignore"):
        sizes: NDArray[np.float64] = np.linalg.norm(affine[:3, :3], axis=0)
    return sizes


def _listed(sizes: Iterable[float]) -> str:
    return " × ".join("?" if math.isnan(size) else f"{size:.4g}" for size in sizes)


# Forms -------------------------------------------------------------------------------------------------------------


def _in_mm(affine: Affine, unit: str) -> Affine:
    affine[:3] *= _MILLIMETRES[unit]
    return affine


def _checked(path: Path, affine: Affine) -> Affine:
    if not _invertible(affine):
        remedy = "Repair the header's sform or qform, or export the image again"
        raise refused(path, "E_AFFINE", "the affine holds NaN, is singular or is out of all proportion", remedy)
    return affine


def _repaired_pixdim(header: nib.Nifti1Header) -> tuple[nib.Nifti1Header, bool]:
    """A copy with positive voxel sizes and a valid qfac, and whether a size in use had to be changed."""
    repaired = header.copy()
    sizes = np.abs(np.array(header["pixdim"][1:4], dtype=np.float64))
    sizes[~np.isfinite(sizes) | (sizes == 0)] = 1.0
    used = min(int(header["dim"][0]), 3)
    odd = not np.array_equal(sizes[:used], header["pixdim"][1 : used + 1])
    repaired["pixdim"][1:4] = sizes
    repaired["pixdim"][0] = -1.0 if header["pixdim"][0] == -1 else 1.0
    return repaired, odd


def _qform(header: nib.Nifti1Header) -> Affine:
    """The qform; all NaN when its quaternion is not one."""
    try:
        with np.errstate(all="ignore"):
            return np.array(header.get_qform(), dtype=np.float64)
    except (ValueError, HeaderDataError):
        return np.full((4, 4), np.nan)


def _centred(header: nib.Nifti1Header, shape: tuple[int, ...]) -> Affine:
    """By voxel sizes alone: the first axis to the left and the origin in the middle, as nibabel and MONAI have it."""
    steps = np.array(header["pixdim"][1:4], dtype=np.float64) * (-1, 1, 1)
    affine = np.diag([*steps, 1.0])
    affine[:3, 3] = -steps * (np.array(shape) - 1) / 2
    return affine


def _same_placement(a: Affine, b: Affine) -> bool:
    # A single-precision quaternion near a half turn is good to some 3e-4 rad, hence not the corners' distance.
    with np.errstate(all="ignore"):
        size = np.linalg.norm(a[:3, :3], axis=0)
        turned = np.linalg.norm(a[:3, :3] - b[:3, :3], axis=0) <= 1e-3 * size
        moved = np.linalg.norm(a[:3, 3] - b[:3, 3]) <= 1e-3
    return bool(turned.all() and moved)


def _invertible(affine: Affine) -> bool:
    with np.errstate(all="ignore"):
        spacing_mm = np.linalg.norm(affine[:3, :3], axis=0)
        if not (np.isfinite(affine).all() and spacing_mm.min() > 1e-6 and np.abs(affine).max() < 1e7):
            return False
        return bool(abs(np.linalg.det(affine[:3, :3] / spacing_mm)) > 1e-4)


def _shear(affine: Affine) -> float:
    """How far the axes are from right angles: the largest cosine between two of them."""
    axes = affine[:3, :3] / _sizes(affine)
    return float(np.abs(axes.T @ axes - np.eye(3)).max())
