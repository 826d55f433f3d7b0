"""What a NIfTI header says, checked before any voxel is read."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, NamedTuple

import nibabel as nib
import numpy as np
from numpy.typing import NDArray

from monai_deepgmm.images import placement
from monai_deepgmm.images.atomic_files import refused, shown
from monai_deepgmm.patients.spacing import Spacing

MIN_BYTES = 348

#: Of a patient's stack: three sequences and the mask of 512 × 512 × 512 voxels.
DEFAULT_MAX_VOXELS = 1 << 29
#: A file that is small, or packs better than this, is nearly empty and may hold but a small part of the voxels.
_SMALL_BYTES, _VOXELS_PER_BYTE, _NEARLY_EMPTY = 1 << 20, 32, 64

_STORED = {2: "u1", 4: "i2", 8: "i4", 16: "f4", 64: "f8", 256: "i1", 512: "u2", 768: "u4", 1024: "i8", 1280: "u8"}
_REFUSED = {
    1: "1-bit",
    32: "complex",
    128: "RGB",
    1536: "128-bit float",
    1792: "complex",
    2048: "complex",
    2304: "RGBA",
}
_MAX_OFFSET = 1 << 26
_RESAVE = "Export the image again, or convert it to .nii.gz anew"


class _Kind(NamedTuple):
    header: type[nib.Nifti1Header]
    size: int
    magic_at: int
    magic: bytes
    pair: bytes


_KINDS = {
    348: _Kind(nib.Nifti1Header, 348, 344, b"n+1\0", b"ni1\0"),
    540: _Kind(nib.Nifti2Header, 540, 4, b"n+2\0\r\n\x1a\n", b"ni2\0"),
}


class ReadPlan(NamedTuple):
    """What is to be read, and how.

    Attributes:
        header: the source's own.
        shape: as in the file, one to seven axes.
        stored: the voxels' type on disk.
        slope: intensity = slope · stored value + intercept.
        intercept: see ``slope``.
        offset: the byte where the voxels begin.
        affine: (4, 4) voxel index → mm (RAS).
        placed: whether the header says where the image lies.
        warnings: each begins with a code.
    """

    header: nib.Nifti1Header
    shape: tuple[int, ...]
    stored: np.dtype[Any]
    slope: float
    intercept: float
    offset: int
    affine: NDArray[np.float64]
    placed: bool
    warnings: tuple[str, ...]


def header_bytes(path: Path, start: bytes) -> int:
    """How long the header is (348 or 540 bytes), told from its first four bytes in either byte order.

    Raises:
        StudyError: ``E_FORMAT``.
    """
    for order in ("<", ">"):
        if kind := _kind(start, order):
            return kind.size
    raise refused(path, "E_FORMAT", "the file does not begin as a NIfTI header does", "Name a .nii or .nii.gz file")


def _kind(start: bytes, order: str) -> _Kind | None:
    return _KINDS.get(int.from_bytes(start[:4], "little" if order == "<" else "big"))


def parse(path: Path, block: bytes) -> nib.Nifti1Header:
    """The header held in ``block``, nothing in it checked but its kind.

    Raises:
        StudyError: ``E_FORMAT`` for one half of a pair or a wrong magic, ``E_HEADER`` when it is cut short.
    """
    size = header_bytes(path, block)
    order = "<" if _kind(block, "<") else ">"
    kind = _KINDS[size]
    if len(block) < size:
        raise refused(path, "E_HEADER", f"the file ends within its header, after {len(block)} bytes", _RESAVE)
    magic = block[kind.magic_at : kind.magic_at + len(kind.magic)]
    if magic.startswith(kind.pair):
        raise refused(path, "E_FORMAT", "it is one half of a .hdr/.img pair", "Convert the pair to one .nii.gz file")
    if magic != kind.magic:
        raise refused(path, "E_FORMAT", "the header lacks the mark (magic) of a NIfTI file", _RESAVE)
    return kind.header(block, endianness=order, check=False)


def plan(
    path: Path, header: nib.Nifti1Header, *, frame: int | None, max_voxels: int, spacing: Spacing = None
) -> ReadPlan:
    """Checks all that a header says.

    Args:
        path: the file, for messages.
        header: as parsed.
        frame: which frame of a 4-D file is wanted, counted from 0.
        max_voxels: the most voxels, all frames together.
        spacing: which voxel sizes count where the header contradicts itself.

    Raises:
        StudyError: ``E_HEADER``, ``E_DTYPE``, ``E_SIZE``, ``E_DIM``, ``E_SCALE``, ``E_AFFINE`` or ``E_SPACING``.
    """
    shape = _shape(path, header)
    stored = _stored(path, header)
    offset = _offset(path, header)
    if math.prod(shape) > max_voxels:
        found = f"the header promises {_times(shape)} voxels, more than {max_voxels}"
        raise refused(path, "E_SIZE", found, "Raise --max-voxels if the image is really that large")
    _check_frames(path, shape, frame)
    slope, intercept, scaling = _scaling(path, header)
    place = placement.place(path, header, (*shape, 1)[:3], spacing=spacing)
    warnings = scaling + place.warnings
    return ReadPlan(header, shape, stored, slope, intercept, offset, place.affine, place.known, warnings)


def refuse_nearly_empty(path: Path, size: int, shape: tuple[int, ...], max_voxels: int, beside: int) -> None:
    """Refuses a small file that unpacks to a large image of nothing, which no scanner makes.

    Args:
        path: the file, for messages.
        size: of the file, in bytes.
        shape: that its header promises.
        max_voxels: the most voxels.
        beside: how many voxels the image has that a mask or labels belong to.

    Raises:
        StudyError: ``E_SIZE``.
    """
    found = math.prod(shape)
    full = _VOXELS_PER_BYTE * size if size >= _SMALL_BYTES else 0
    if found > max(max(max_voxels, DEFAULT_MAX_VOXELS) // _NEARLY_EMPTY, full, 2 * beside):
        message = f"{size} bytes unpack to {found} voxels, so the image is nearly empty"
        remedy = f"Crop it, or raise --max-voxels to {_NEARLY_EMPTY * found} if it is right"
        raise refused(path, "E_SIZE", message, remedy)


def _times(shape: tuple[int, ...]) -> str:
    return " × ".join(map(str, shape))


def _shape(path: Path, header: nib.Nifti1Header) -> tuple[int, ...]:
    count, *sizes = (int(size) for size in header["dim"])
    if not 1 <= count <= 7:
        raise refused(path, "E_HEADER", f"the header promises {count} dimensions, expected 1 to 7", _RESAVE)
    shape = tuple(sizes[:count])
    if min(shape) < 1:
        raise refused(path, "E_HEADER", f"the header promises {_times(shape)} voxels, expected at least 1", _RESAVE)
    return shape


def _stored(path: Path, header: nib.Nifti1Header) -> np.dtype[Any]:
    code = int(header["datatype"])
    if code in _REFUSED:
        found = f"the voxels are of type {_REFUSED[code]}, expected real numbers"
        remedy = "Convert the image to one real intensity per voxel, such as the magnitude"
        raise refused(path, "E_DTYPE", found, remedy)
    if code not in _STORED:
        raise refused(path, "E_HEADER", f"the header names the unknown data type {code}", _RESAVE)
    return np.dtype(_STORED[code]).newbyteorder(header.endianness)


def _offset(path: Path, header: nib.Nifti1Header) -> int:
    offset, least = float(header["vox_offset"]), int(header.sizeof_hdr) + 4
    if not (least <= offset <= _MAX_OFFSET and offset.is_integer()):
        found = f"the header places the voxels at byte {offset:g}, expected a whole number from {least} on"
        raise refused(path, "E_HEADER", found, _RESAVE)
    return int(offset)


def _check_frames(path: Path, shape: tuple[int, ...], frame: int | None) -> None:
    if len(shape) < 2 or math.prod(shape[4:]) > 1:
        raise refused(path, "E_DIM", f"the image is {_times(shape)} voxels, expected three axes", "Name a 3-D image")
    frames = math.prod(shape[3:])
    if frames == 1:
        return
    if frame is None:
        found = f"the image is a series of {frames} frames ({_times(shape)} voxels), expected three axes"
        raise refused(path, "E_DIM", found, "Choose a frame with --frame N (counted from 0), or name a 3-D image")
    if not 0 <= frame < frames:
        raise refused(path, "E_DIM", f"the image has no frame {frame}", f"Choose a frame from 0 to {frames - 1}")


def _scaling(path: Path, header: nib.Nifti1Header) -> tuple[float, float, tuple[str, ...]]:
    """Slope and intercept; 0 and NaN both stand for an unscaled image (the standard's way, and nibabel's)."""
    slope, intercept = float(header["scl_slope"]), float(header["scl_inter"])
    scaled = slope != 0 and not math.isnan(slope)
    if math.isinf(slope) or math.isinf(intercept) or (scaled and math.isnan(intercept)):
        found = f"the intensity scaling has slope {slope:g} and intercept {intercept:g}, expected finite numbers"
        raise refused(path, "E_SCALE", found, "Repair scl_slope and scl_inter, or export the image again")
    if scaled:
        return slope, intercept, ()
    if intercept == 0 or math.isnan(intercept):
        return 1.0, 0.0, ()
    return 1.0, 0.0, (f"W_SCALE: {shown(path)}: with the slope {slope:g} the intercept {intercept:g} is not applied",)
