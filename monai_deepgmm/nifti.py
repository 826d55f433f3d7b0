"""One NIfTI file in, one NIfTI file out, and nothing trusted on the way."""

from __future__ import annotations

import hashlib
import math
import zlib
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import nibabel as nib
import numpy as np
from nibabel.spatialimages import HeaderDataError
from numpy.typing import DTypeLike, NDArray

from monai_deepgmm import files
from monai_deepgmm.errors import StudyError
from monai_deepgmm.volume import Volume, grids_equal, overlaps, resample

__all__ = [
    "DEFAULT_MAX_VOXELS",
    "Volume",
    "grids_equal",
    "overlaps",
    "read",
    "resample",
    "write_labels",
    "write_probabilities",
]

DEFAULT_MAX_VOXELS = 1 << 28  # 512 × 512 × 1024

_BLOCK = 1 << 16
_DRAIN_BYTES = 1 << 28
_MAX_OFFSET = 1 << 26
_RESAVE = "Export the image again, or convert it to .nii.gz anew"
_COPY = "Copy or download the file again"
_DCM2NIIX = "Convert the DICOM series with dcm2niix and name the .nii.gz file that it writes"
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
_UNITS = {0: ("", 1.0), 1: ("metres", 1000.0), 2: ("", 1.0), 3: ("micron", 0.001)}


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


class _Plan(NamedTuple):
    """What the header says, checked, before any voxel is read."""

    header: nib.Nifti1Header
    shape: tuple[int, ...]
    stored: np.dtype[Any]
    slope: float
    intercept: float
    offset: int
    affine: NDArray[np.float64]
    warnings: tuple[str, ...]


class _Stream:
    """The unpacked bytes of an open file: hashed as they are read, and never more in memory than asked for."""

    def __init__(self, file: BinaryIO, path: Path) -> None:
        self._file, self._path, self._digest = file, path, hashlib.sha256()
        self._pending = self._raw()
        self.first = self._pending
        self.packed = self._pending[:2] == b"\x1f\x8b"
        self._engine = zlib.decompressobj(wbits=31) if self.packed else None

    @property
    def sha256(self) -> str:
        """Of the bytes read so far."""
        return self._digest.hexdigest()

    def read(self, count: int) -> bytearray:
        """The next ``count`` bytes; fewer only at the end, and then the checksum of a packed file was right."""
        found = bytearray()
        while len(found) < count:
            piece = self._piece(min(count - len(found), 16 * _BLOCK))
            if not piece:
                break
            found += piece
        return found

    def drain(self, limit: int) -> int:
        """Reads on and forgets what it reads, up to ``limit`` bytes; returns how many there were."""
        total = 0
        while total < limit and (piece := self._piece(16 * _BLOCK)):
            total += len(piece)
        return total

    def _raw(self) -> bytes:
        try:
            block = self._file.read(_BLOCK)
        except OSError as error:
            raise files.unreadable(self._path, error) from None
        self._digest.update(block)
        return block

    def _piece(self, limit: int) -> bytes:
        if self.packed:
            return self._inflate(limit)
        block = self._pending or self._raw()
        self._pending = block[limit:]
        return block[:limit]

    def _inflate(self, limit: int) -> bytes:
        while True:
            if self._engine is None:  # between members, or at the end: zeros may pad a file
                self._pending = self._pending.lstrip(b"\0")
                while not self._pending:
                    block = self._raw()
                    if not block:
                        return b""
                    self._pending = block.lstrip(b"\0")
                self._engine = zlib.decompressobj(wbits=31)
            try:
                piece = self._engine.decompress(self._pending, limit)
            except zlib.error:
                raise _error("E_GZIP", self._path, "the gzip stream is damaged", _COPY) from None
            self._pending = self._engine.unconsumed_tail
            if self._engine.eof:
                self._pending, self._engine = self._engine.unused_data, None
            elif not piece and not self._pending:
                self._pending = self._raw()
                if not self._pending:
                    raise _error("E_GZIP", self._path, "the gzip stream ends too early", _COPY)
            if piece:
                return piece


def read(
    path: Path, *, frame: int | None = None, max_voxels: int = DEFAULT_MAX_VOXELS, dtype: DTypeLike = np.float32
) -> Volume:
    """Reads one NIfTI-1 or NIfTI-2 file, once, to its last byte and checksum.

    Args:
        path: a ``.nii`` or ``.nii.gz`` file.
        frame: which frame of a 4-D file, counted from 0; a file with a single frame does not look at it.
        max_voxels: a header that promises more voxels (all frames together) is refused before any is read.
        dtype: of ``Volume.data``: float32 for images, float64 for masks and labels.

    Returns:
        The volume; whatever was odd but could be understood is in its ``warnings``.

    Raises:
        StudyError: ``E_FILE``, ``E_EMPTY``, ``E_GZIP``, ``E_FORMAT``, ``E_HEADER``, ``E_DICOM``, ``E_SIZE``,
            ``E_DIM``, ``E_DTYPE``, ``E_SCALE`` or ``E_AFFINE``.
    """
    path = Path(path)
    _refuse_folder(path)
    with files.open_regular(path) as file:
        stream = _Stream(file, path)
        _refuse_foreign(path, stream)
        try:
            plan = _plan(path, _header(path, stream), frame=frame, max_voxels=max_voxels)
            raw = _voxels(path, stream, plan)
        except StudyError as error:
            if stream.packed and error.code != "E_GZIP":
                # A damaged stream unpacks to nonsense: then E_GZIP, raised here, is the true cause.
                stream.drain(_DRAIN_BYTES)
            raise
    return Volume(
        data=_scaled(raw, plan, frame=frame, dtype=dtype),
        affine=plan.affine,
        header=plan.header,
        source_shape=plan.shape,
        name=path.name,
        sha256=stream.sha256,
        warnings=plan.warnings,
    )


def _error(code: str, path: Path, found: str, remedy: str) -> StudyError:
    return StudyError(code, f"{files.shown(path)}: {found}", remedy)


def _refuse_folder(path: Path) -> None:
    try:
        if not path.is_dir():
            return
        dicom = any(entry.suffix.lower() in (".dcm", ".ima") for entry in islice(path.rglob("*"), 256))
    except (OSError, ValueError) as error:
        raise files.unreadable(path, error) from None
    if dicom:
        raise _error("E_DICOM", path, "a folder of DICOM files stands where a NIfTI file belongs", _DCM2NIIX)
    raise _error("E_FILE", path, "a folder stands where a NIfTI file belongs", f"Name the file itself. {_DCM2NIIX}")


def _refuse_foreign(path: Path, stream: _Stream) -> None:
    """Refuses what is plainly no NIfTI file, or not packed as its name says."""
    first, named_gz = stream.first, path.name.lower().endswith(".gz")
    if not first:
        raise _error("E_EMPTY", path, "the file has zero bytes", _COPY)
    if first[128:132] == b"DICM":
        raise _error("E_DICOM", path, "a DICOM file stands where a NIfTI file belongs", _DCM2NIIX)
    if stream.packed and not named_gz:
        raise _error("E_GZIP", path, "the file is packed with gzip, but its name does not end in .gz", "Rename it")
    if named_gz and not stream.packed:
        sample = first[:256]
        if all(byte >= 32 or byte in b"\t\n\f\r" for byte in sample) and 127 not in sample:
            raise _error("E_FORMAT", path, "the file holds text, not a NIfTI image", _COPY)
        raise _error(
            "E_GZIP", path, "the name ends in .gz, but the file is not packed with gzip", "Rename it, or pack it"
        )


def _header(path: Path, stream: _Stream) -> nib.Nifti1Header:
    block = stream.read(348)
    if not block:
        raise _error("E_EMPTY", path, "the gzip stream holds zero bytes", _COPY)
    if block[128:132] == b"DICM":
        raise _error("E_DICOM", path, "a DICOM file stands where a NIfTI file belongs", _DCM2NIIX)
    little, big = int.from_bytes(block[:4], "little"), int.from_bytes(block[:4], "big")
    kind = _KINDS.get(little) or _KINDS.get(big)
    if kind is None:
        raise _error("E_FORMAT", path, "the file does not begin as a NIfTI header does", "Name a .nii or .nii.gz file")
    block += stream.read(kind.size - len(block))
    if len(block) < kind.size:
        raise _error("E_HEADER", path, f"the file ends within its header, after {len(block)} bytes", _COPY)
    magic = bytes(block[kind.magic_at : kind.magic_at + len(kind.magic)])
    if magic.startswith(kind.pair):
        raise _error("E_FORMAT", path, "it is one half of a .hdr/.img pair", "Convert the pair to one .nii.gz file")
    if magic != kind.magic:
        raise _error("E_FORMAT", path, "the header lacks the mark (magic) of a NIfTI file", _RESAVE)
    return kind.header(bytes(block), endianness="<" if little in _KINDS else ">", check=False)


def _plan(path: Path, header: nib.Nifti1Header, *, frame: int | None, max_voxels: int) -> _Plan:
    shape = _shape(path, header)
    stored = _stored(path, header)
    if math.prod(shape) > max_voxels:
        found = f"the header promises {' × '.join(map(str, shape))} voxels, more than {max_voxels}"
        raise _error("E_SIZE", path, found, "Raise --max-voxels if the image is really that large")
    _check_frames(path, shape, frame)
    slope, intercept, scale_warnings = _scale(path, header)
    affine, affine_warnings = _affine(path, header, (*shape, 1)[:3])
    return _Plan(
        header, shape, stored, slope, intercept, _offset(path, header), affine, scale_warnings + affine_warnings
    )


def _shape(path: Path, header: nib.Nifti1Header) -> tuple[int, ...]:
    count, *sizes = (int(size) for size in header["dim"])
    if not 1 <= count <= 7:
        raise _error("E_HEADER", path, f"the header promises {count} dimensions, expected 1 to 7", _RESAVE)
    if min(sizes[:count]) < 1:
        raise _error(
            "E_HEADER", path, f"the header promises the dimensions {sizes[:count]}, expected 1 or more", _RESAVE
        )
    return tuple(sizes[:count])


def _stored(path: Path, header: nib.Nifti1Header) -> np.dtype[Any]:
    code = int(header["datatype"])
    if code in _REFUSED:
        found = f"the voxels are of type {_REFUSED[code]}, expected real numbers"
        raise _error("E_DTYPE", path, found, "Convert the image to one real intensity per voxel, such as the magnitude")
    if code not in _STORED:
        raise _error("E_HEADER", path, f"the header names the unknown data type {code}", _RESAVE)
    return np.dtype(_STORED[code]).newbyteorder(header.endianness)


def _offset(path: Path, header: nib.Nifti1Header) -> int:
    offset, least = float(header["vox_offset"]), int(header["sizeof_hdr"]) + 4
    if not (least <= offset <= _MAX_OFFSET and offset.is_integer()):
        raise _error(
            "E_HEADER", path, f"the header places the voxels at byte {offset:g}, expected {least} or more", _RESAVE
        )
    return int(offset)


def _check_frames(path: Path, shape: tuple[int, ...], frame: int | None) -> None:
    sizes = " × ".join(map(str, shape))
    if len(shape) < 2 or math.prod(shape[4:]) > 1:
        raise _error("E_DIM", path, f"the image has the dimensions {sizes}, expected three", "Name a 3-D image")
    frames = math.prod(shape[3:])
    if frames == 1:
        return
    if frame is None:
        remedy = "Choose a frame with --frame N (counted from 0), or name a 3-D image"
        raise _error(
            "E_DIM", path, f"the image is a series of {frames} frames ({sizes}), expected three dimensions", remedy
        )
    if not 0 <= frame < frames:
        raise _error("E_DIM", path, f"the image has no frame {frame}", f"Choose a frame from 0 to {frames - 1}")


def _scale(path: Path, header: nib.Nifti1Header) -> tuple[float, float, tuple[str, ...]]:
    """Slope and intercept; 0 and NaN both stand for an unscaled image (the standard's way, and nibabel's)."""
    slope, intercept = float(header["scl_slope"]), float(header["scl_inter"])
    scaled = slope != 0 and not math.isnan(slope)
    if math.isinf(slope) or math.isinf(intercept) or (scaled and math.isnan(intercept)):
        found = f"the intensity scaling is slope {slope:g}, intercept {intercept:g}"
        raise _error("E_SCALE", path, found, "Set scl_slope and scl_inter to finite numbers, or export the image again")
    if scaled:
        return slope, intercept, ()
    if intercept != 0 and not math.isnan(intercept):
        found = f"W_SCALE: {files.shown(path)}: the slope is {slope:g}, so the intercept {intercept:g} is not applied"
        return 1.0, 0.0, (found,)
    return 1.0, 0.0, ()


def _affine(
    path: Path, header: nib.Nifti1Header, shape: tuple[int, ...]
) -> tuple[NDArray[np.float64], tuple[str, ...]]:
    """The affine in mm: the sform if its code is positive, else the qform, else the voxel sizes."""
    name, warnings = files.shown(path), []
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
        steps = np.array(repaired["pixdim"][1:4], dtype=np.float64) * (-1, 1, 1)
        affine = np.diag([*steps, 1.0])
        affine[:3, 3] = -steps * (np.array(shape) - 1) / 2
    unit, millimetres = _UNITS.get(int(header["xyzt_units"]) & 7, ("an unknown unit, taken for mm", 1.0))
    if unit:
        warnings.append(f"W_UNITS: {name}: the header gives lengths in {unit}; the affine is used in mm")
    affine[:3] *= millimetres
    if not _invertible(affine):
        remedy = "Repair the header's sform or qform, or export the image again"
        raise _error("E_AFFINE", path, "the affine holds NaN, is singular or is out of all proportion", remedy)
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
    """The qform; all NaN when the quaternion is none."""
    try:
        with np.errstate(all="ignore"):
            return np.array(header.get_qform(), dtype=np.float64)
    except (ValueError, HeaderDataError):
        return np.full((4, 4), np.nan)


def _same_placement(a: NDArray[np.float64], b: NDArray[np.float64]) -> bool:
    # A single-precision quaternion near a half turn is good to some 3e-4 rad, hence not the corners' distance.
    size = np.linalg.norm(a[:3, :3], axis=0)
    with np.errstate(all="ignore"):
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


def _voxels(path: Path, stream: _Stream, plan: _Plan) -> bytearray:
    """The stored voxels, exactly as many bytes as the header promises."""
    skipped = len(stream.read(plan.offset - int(plan.header["sizeof_hdr"]))) + int(plan.header["sizeof_hdr"])
    promised = math.prod(plan.shape) * plan.stored.itemsize
    raw = stream.read(promised) if skipped == plan.offset else bytearray()
    if len(raw) < promised:
        found = f"the file holds {len(raw)} bytes of voxels, but its header promises {promised}"
        raise _error("E_HEADER", path, found, _COPY)
    if stream.read(1):
        raise _error("E_SIZE", path, f"the file holds more than the {promised} bytes that its header promises", _RESAVE)
    return raw


def _scaled(raw: bytearray, plan: _Plan, *, frame: int | None, dtype: DTypeLike) -> NDArray[np.floating]:
    """(X, Y, Z) intensities."""
    stored = np.frombuffer(raw, dtype=plan.stored).reshape(plan.shape, order="F")
    if math.prod(plan.shape[3:]) > 1:
        stored = stored[:, :, :, frame]
    stored = stored.reshape((*plan.shape, 1)[:3], order="F")
    with np.errstate(all="ignore"):  # what overflows becomes infinite, and is met as such by the mask's check
        if (plan.slope, plan.intercept) == (1.0, 0.0):
            return np.ascontiguousarray(stored, dtype=dtype)
        return np.ascontiguousarray(stored.astype(np.float64) * plan.slope + plan.intercept, dtype=dtype)


def write_labels(path: Path, labels: NDArray[np.uint8], *, like: Volume) -> None:
    """Writes labels on a volume's grid: shape, matrices, codes and units as in its source.

    Args:
        path: a ``.nii.gz`` or ``.nii`` file.
        labels: (X, Y, Z) uint8.
        like: the volume that was labelled.

    Raises:
        ValueError: the labels have another shape or dtype.
        StudyError: ``E_DISK``, ``E_NAME`` or ``E_WRITE``.
    """
    if labels.shape != like.data.shape or labels.dtype != np.uint8:
        raise ValueError(f"labels: got {labels.dtype} {labels.shape}, expected uint8 {like.data.shape}")
    shape = like.source_shape if math.prod(like.source_shape[3:]) == 1 else like.data.shape
    _write(path, labels, shape=shape, like=like)


def write_probabilities(path: Path, probabilities: NDArray[np.float32], *, like: Volume) -> None:
    """Writes one map per component on a volume's grid, as 4-D float32 with the components on the last axis.

    Args:
        path: a ``.nii.gz`` or ``.nii`` file.
        probabilities: (K, X, Y, Z).
        like: the volume that was segmented.

    Raises:
        ValueError: the maps have another shape.
        StudyError: ``E_DISK``, ``E_NAME`` or ``E_WRITE``.
    """
    if probabilities.ndim != 4 or probabilities.shape[1:] != like.data.shape:
        raise ValueError(f"probabilities: got {probabilities.shape}, expected (K, *{like.data.shape})")
    last = np.moveaxis(probabilities, 0, -1).astype("<f4")
    _write(path, last, shape=last.shape, like=like)


def _write(path: Path, data: NDArray[Any], *, shape: tuple[int, ...], like: Volume) -> None:
    # The header's own bytes are kept but for what is set here: nibabel would recompute the qform and its voxel sizes.
    header = like.header.as_byteswapped("<")
    for field in header.keys():  # noqa: SIM118 (a header iterates differently)
        if header[field].dtype.kind == "S" and field != "magic":
            header[field] = b""
    header["dim"] = [len(shape), *shape, *[1] * (7 - len(shape))]
    header.set_data_dtype(data.dtype)
    header["vox_offset"] = int(header["sizeof_hdr"]) + 4
    header["scl_slope"], header["scl_inter"] = 1.0, 0.0
    for field in ("cal_max", "cal_min", "intent_code", "intent_p1", "intent_p2", "intent_p3"):
        header[field] = 0
    content = header.binaryblock + bytes(4) + data.tobytes(order="F")
    packed = path.name.lower().endswith(".gz")
    # zlib's own gzip frame carries neither a time nor a name, so equal labels make equal files.
    files.write_whole(path, zlib.compress(content, wbits=31) if packed else content)
