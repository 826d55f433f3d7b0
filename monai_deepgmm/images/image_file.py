"""One door for images: NIfTI by our own reader, NRRD and MetaImage by SimpleITK, stacks of DICOM; checked alike."""

from __future__ import annotations

import re
from types import ModuleType

import numpy as np
from numpy.typing import DTypeLike

from monai_deepgmm.images import atomic_files, dicom, nifti
from monai_deepgmm.images.header import DEFAULT_MAX_VOXELS
from monai_deepgmm.images.volume import Volume
from monai_deepgmm.patients.spacing import Spacing
from monai_deepgmm.patients.stack import Stack
from monai_deepgmm.patients.study import Source

#: The names of files that SimpleITK reads; segmentations of 3D Slicer (``.seg.nrrd``) among them.
ITK_NAME = re.compile(r"\.(nrrd|mha)$", re.IGNORECASE)


def read(
    source: Source,
    *,
    frame: int | None = None,
    max_voxels: int = DEFAULT_MAX_VOXELS,
    spacing: Spacing = None,
    beside: int = 0,
    dtype: DTypeLike = np.float32,
) -> Volume:
    """Reads an image; see ``nifti.read`` and ``dicom.read`` for arguments, result and errors.

    Of a stack, spacing, beside and dtype say nothing: its voxels have one size, and it is no mask.
    """
    if isinstance(source, Stack):
        return dicom.read(source, frame=frame, max_voxels=max_voxels)
    reader = _itk().read if ITK_NAME.search(source.name) else nifti.read
    return reader(source, frame=frame, max_voxels=max_voxels, spacing=spacing, beside=beside, dtype=dtype)


def shape(
    source: Source, *, frame: int | None, max_voxels: int, spacing: Spacing = None, beside: int = 0
) -> tuple[int, ...]:
    """The shape of what ``read`` will read, without its voxels.

    Raises:
        StudyError: what the header alone shows.
    """
    if isinstance(source, Stack):
        return dicom.plan(source, frame=frame, max_voxels=max_voxels)
    reader = _itk().plan if ITK_NAME.search(source.name) else nifti.plan
    return reader(source, frame=frame, max_voxels=max_voxels, spacing=spacing, beside=beside).shape


def _itk() -> ModuleType:
    """The reader of ITK's formats, imported where there is one: SimpleITK takes 90 MB."""
    from monai_deepgmm.images import itk_file

    return itk_file


def sha256(source: Source) -> str:
    """A hash of the bytes that an image is read from.

    Raises:
        StudyError: ``E_FILE``.
    """
    return dicom.sha256(source) if isinstance(source, Stack) else atomic_files.sha256(source)
