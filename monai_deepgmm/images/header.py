"""What a NIfTI header says, checked before any voxel is read."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, NamedTuple

import nibabel as nib
import numpy as np
from nibabel.spatialimages import HeaderDataError
from numpy.typing import NDArray

from monai_deepgmm.images.atomic_files import refused, shown

MIN_BYTES = 348

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
_MILLIMETRES = {"": 1.0, "metres": 1000.0, "micron": 0.001, "an unknown unit, taken for mm": 1.0}
_UNITS = {0: "", 1: "metres", 2: "", 3: "micron"}
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
        warnings: each begins with a code.
    """

    header: nib.Nifti1Header
    shape: tuple[int, ...]
    stored: np.dtype[Any]
    slope: float
    intercept: float
    offset: int
    affine: NDArray[np.float64]
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


def plan(path: Path, header: nib.Nifti1Header, *, frame: int | None, max_voxels: int) -> ReadPlan:
    """Checks all that a header says.

    Args:
        path: the file, for messages.
        header: as parsed.
        frame: which frame of a 4-D file is wanted, counted from 0.
        max_voxels: the most voxels, all frames together.

    Raises:
        StudyError: ``E_HEADER``, ``E_DTYPE``, ``E_SIZE``, ``E_DIM``, ``E_SCALE`` or ``E_AFFINE``.
    """
    shape = _shape(path, header)
    stored = _stored(path, header)
    offset = _offset(path, header)
    if math.prod(shape) > max_voxels:
        found = f"the header promises {_times(shape)} voxels, more than {max_voxels}"
        raise refused(path, "E_SIZE", found, "Raise --max-voxels if the image is really that large")
    _check_frames(path, shape, frame)
    slope, intercept, scaling = _scaling(path, header)
    affine, placing = _affine(path, header, (*shape, 1)[:3])
    return ReadPlan(header, shape, stored, slope, intercept, offset, affine, scaling + placing)


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


def _affine(
    path: Path, header: nib.Nifti1Header, shape: tuple[int, ...]
) -> tuple[NDArray[np.float64], tuple[str, ...]]:
    """The affine in mm: the sform if its code is positive, else the qform, else the voxel sizes."""
    name, warnings = shown(path), []
    repaired, odd = _repaired_pixdim(header)
    if odd:
        warnings.append(f"W_PIXDIM: {name}: a voxel size is zero, negative or not finite")
    has_sform, has_qform = int(header["sform_code"]) > 0, int(header["qform_code"]) > 0
    if has_sform:
        affine = np.array(header.get_sform(), dtype=np.float64)
        if has_qform and not _same_placement(affine, _qform(repaired)):
            warnings.append(f"W_QFORM: {name}: qform and sform place the image differently; the sform is used")
    elif has_qform:
        affine = _qform(repaired)
    else:
        warnings.append(f"W_NOFORM: {name}: neither sform nor qform is set; placed by the voxel sizes alone")
        affine = _centred(repaired, shape)
    unit = _UNITS.get(int(header["xyzt_units"]) & 7, "an unknown unit, taken for mm")
    if unit:
        warnings.append(f"W_UNITS: {name}: the header gives lengths in {unit}; the affine is used in mm")
    affine[:3] *= _MILLIMETRES[unit]
    if not _invertible(affine):
        remedy = "Repair the header's sform or qform, or export the image again"
        raise refused(path, "E_AFFINE", "the affine holds NaN, is singular or is out of all proportion", remedy)
    if _sheared(affine):
        warnings.append(f"W_SHEAR: {name}: the image axes are not at right angles")
    return affine, tuple(warnings)


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


def _qform(header: nib.Nifti1Header) -> NDArray[np.float64]:
    """The qform; all NaN when its quaternion is not one."""
    try:
        with np.errstate(all="ignore"):
            return np.array(header.get_qform(), dtype=np.float64)
    except (ValueError, HeaderDataError):
        return np.full((4, 4), np.nan)


def _centred(header: nib.Nifti1Header, shape: tuple[int, ...]) -> NDArray[np.float64]:
    """By voxel sizes alone: the first axis to the left and the origin in the middle, as nibabel and MONAI have it."""
    steps = np.array(header["pixdim"][1:4], dtype=np.float64) * (-1, 1, 1)
    affine = np.diag([*steps, 1.0])
    affine[:3, 3] = -steps * (np.array(shape) - 1) / 2
    return affine


def _same_placement(a: NDArray[np.float64], b: NDArray[np.float64]) -> bool:
    # A single-precision quaternion near a half turn is good to some 3e-4 rad, hence not the corners' distance.
    with np.errstate(all="ignore"):
        size = np.linalg.norm(a[:3, :3], axis=0)
        turned = np.linalg.norm(a[:3, :3] - b[:3, :3], axis=0) <= 1e-3 * size
        moved = np.linalg.norm(a[:3, 3] - b[:3, 3]) <= 1e-3
    return bool(turned.all() and moved)


def _invertible(affine: NDArray[np.float64]) -> bool:
    with np.errstate(all="ignore"):
        spacing_mm = np.linalg.norm(affine[:3, :3], axis=0)
        if not (np.isfinite(affine).all() and spacing_mm.min() > 1e-6 and np.abs(affine).max() < 1e7):
            return False
        return bool(abs(np.linalg.det(affine[:3, :3] / spacing_mm)) > 1e-4)


def _sheared(affine: NDArray[np.float64]) -> bool:
    axes = affine[:3, :3] / np.linalg.norm(affine[:3, :3], axis=0)
    return bool(np.abs(axes.T @ axes - np.eye(3)).max() > 1e-3)
