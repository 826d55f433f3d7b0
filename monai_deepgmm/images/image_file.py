"""One door for image files: NIfTI by our own reader, NRRD and MetaImage by SimpleITK, checked alike."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import DTypeLike

from monai_deepgmm.images import itk_file, nifti
from monai_deepgmm.images.header import DEFAULT_MAX_VOXELS, ReadPlan
from monai_deepgmm.images.volume import Volume
from monai_deepgmm.patients.spacing import Spacing


def read(
    path: Path,
    *,
    frame: int | None = None,
    max_voxels: int = DEFAULT_MAX_VOXELS,
    spacing: Spacing = None,
    beside: int = 0,
    dtype: DTypeLike = np.float32,
) -> Volume:
    """Reads an image; see ``nifti.read`` for arguments, result and errors."""
    reader = itk_file.read if itk_file.NAME.search(path.name) else nifti.read
    return reader(path, frame=frame, max_voxels=max_voxels, spacing=spacing, beside=beside, dtype=dtype)


def plan(
    path: Path, *, frame: int | None = None, max_voxels: int = DEFAULT_MAX_VOXELS, spacing: Spacing = None, beside: int
) -> ReadPlan:
    """What ``read`` will read of a file, without its voxels.

    Raises:
        StudyError: what the header alone shows.
    """
    reader = itk_file.plan if itk_file.NAME.search(path.name) else nifti.plan
    return reader(path, frame=frame, max_voxels=max_voxels, spacing=spacing, beside=beside)
