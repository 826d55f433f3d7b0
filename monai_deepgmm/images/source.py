"""Where an image comes from: a NIfTI file, or a stack of DICOM images. What is read is a volume either way."""

from __future__ import annotations

from monai_deepgmm.images import atomic_files, dicom, nifti
from monai_deepgmm.images.nifti import DEFAULT_MAX_VOXELS
from monai_deepgmm.images.volume import Volume
from monai_deepgmm.patients.spacing import Spacing
from monai_deepgmm.patients.stack import Stack
from monai_deepgmm.patients.study import Source


def read(
    source: Source, *, frame: int | None = None, max_voxels: int = DEFAULT_MAX_VOXELS, spacing: Spacing = None
) -> Volume:
    """Reads an image.

    Args:
        source: a file, or slices of a DICOM study.
        frame: which of several times, counted from 0.
        max_voxels: a larger image is refused before it is read.
        spacing: which voxel sizes count where a NIfTI header contradicts itself.

    Raises:
        StudyError: the codes of ``nifti.read`` and ``dicom.read``.
    """
    if isinstance(source, Stack):
        return dicom.read(source, frame=frame, max_voxels=max_voxels)
    return nifti.read(source, frame=frame, max_voxels=max_voxels, spacing=spacing)


def shape(
    source: Source, *, frame: int | None, max_voxels: int, spacing: Spacing = None, beside: int = 0
) -> tuple[int, ...]:
    """The shape of an image, without its voxels; the arguments are those of ``read`` and ``nifti.read``.

    Raises:
        StudyError: what the header alone shows.
    """
    if isinstance(source, Stack):
        return dicom.plan(source, frame=frame, max_voxels=max_voxels)
    return nifti.plan(source, frame=frame, max_voxels=max_voxels, spacing=spacing, beside=beside).shape


def sha256(source: Source) -> str:
    """A hash of the bytes that an image is read from.

    Raises:
        StudyError: ``E_FILE``.
    """
    return dicom.sha256(source) if isinstance(source, Stack) else atomic_files.sha256(source)
