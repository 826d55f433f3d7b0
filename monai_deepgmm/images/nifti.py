"""One NIfTI file in, one NIfTI file out, and nothing trusted on the way."""

from __future__ import annotations

import hashlib
import math
import os
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO

import nibabel as nib
import numpy as np
from numpy.typing import DTypeLike, NDArray

from monai_deepgmm.errors import StudyError
from monai_deepgmm.images import atomic_files, header
from monai_deepgmm.images.atomic_files import refused
from monai_deepgmm.images.header import DEFAULT_MAX_VOXELS
from monai_deepgmm.images.volume import Volume, grids_equal, overlaps, resample
from monai_deepgmm.patients.spacing import Spacing

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

_BLOCK = 1 << 16
_DRAIN_BYTES = 1 << 28
_COPY = "Copy or download the file again"
_ABOUT_INTENSITIES = ("cal_max", "cal_min", "glmax", "glmin", "intent_code", "intent_p1", "intent_p2", "intent_p3")
_DCM2NIIX = "Convert the DICOM series with dcm2niix and name the .nii.gz file that it writes"


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
        while total < limit and (piece := self._piece(min(limit - total, 16 * _BLOCK))):
            total += len(piece)
        return total

    def _raw(self) -> bytes:
        try:
            block = self._file.read(_BLOCK)
        except OSError as error:
            raise atomic_files.unreadable(self._path, error) from None
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
                raise refused(self._path, "E_GZIP", "the gzip stream is damaged", _COPY) from None
            self._pending = self._engine.unconsumed_tail
            if self._engine.eof:
                self._pending, self._engine = self._engine.unused_data, None
            elif not piece and not self._pending:
                self._pending = self._raw()
                if not self._pending:
                    raise refused(self._path, "E_GZIP", "the gzip stream ends too early", _COPY)
            if piece:
                return piece


def read(
    path: Path,
    *,
    frame: int | None = None,
    max_voxels: int = DEFAULT_MAX_VOXELS,
    spacing: Spacing = None,
    beside: int = 0,
    dtype: DTypeLike = np.float32,
) -> Volume:
    """Reads one NIfTI-1 or NIfTI-2 file, once, to its last byte and checksum.

    Args:
        path: a ``.nii`` or ``.nii.gz`` file.
        frame: which frame of a 4-D file, counted from 0; a file with a single frame does not look at it.
        max_voxels: a header that promises more voxels (all frames together) is refused before any is read.
        spacing: which voxel sizes count where the header contradicts itself.
        beside: how many voxels the image has that a mask or labels belong to; these may be nearly empty and as large.
        dtype: of ``Volume.data``: float32 for images, float64 for masks and labels.

    Returns:
        The volume; whatever was odd but could be understood is in its ``warnings``.

    Raises:
        StudyError: ``E_FILE``, ``E_EMPTY``, ``E_GZIP``, ``E_FORMAT``, ``E_HEADER``, ``E_DICOM``, ``E_SIZE``,
            ``E_DIM``, ``E_DTYPE``, ``E_SCALE``, ``E_AFFINE`` or ``E_SPACING``.
    """
    path = Path(path)
    with _planned(path, frame=frame, max_voxels=max_voxels, spacing=spacing, beside=beside) as (stream, plan):
        raw = _voxels(path, stream, plan)
    return Volume(
        data=_scaled(raw, plan, frame=frame, dtype=dtype),
        affine=plan.affine,
        header=plan.header,
        source_shape=plan.shape,
        name=path.name,
        sha256=stream.sha256,
        warnings=plan.warnings,
        placed=plan.placed,
    )


def plan(
    path: Path, *, frame: int | None = None, max_voxels: int = DEFAULT_MAX_VOXELS, spacing: Spacing = None, beside: int
) -> header.ReadPlan:
    """What ``read`` will read of a file, without its voxels.

    Raises:
        StudyError: what the header alone shows.
    """
    with _planned(Path(path), frame=frame, max_voxels=max_voxels, spacing=spacing, beside=beside) as (_, found):
        return found


@contextmanager
def _planned(
    path: Path, *, frame: int | None, max_voxels: int, spacing: Spacing, beside: int
) -> Iterator[tuple[_Stream, header.ReadPlan]]:
    """A file's stream behind its header, and what is to be read of it."""
    _refuse_folder(path)
    with atomic_files.open_regular(path) as file:
        stream = _Stream(file, path)
        with _true_cause(path, stream):
            found = header.plan(path, _header(path, stream), frame=frame, max_voxels=max_voxels, spacing=spacing)
            header.refuse_nearly_empty(path, os.fstat(file.fileno()).st_size, found.shape, max_voxels, beside)
            yield stream, found


@contextmanager
def _true_cause(path: Path, stream: _Stream) -> Iterator[None]:
    """Refuses what is no NIfTI; a damaged stream unpacks to nonsense, and then E_GZIP is the true cause of an error."""
    _refuse_foreign(path, stream)
    try:
        yield
    except StudyError as error:
        if stream.packed and error.code != "E_GZIP":
            stream.drain(_DRAIN_BYTES)
        raise


def _refuse_folder(path: Path) -> None:
    try:
        if not path.is_dir():
            return
        dicom = any(entry.suffix.lower() in (".dcm", ".ima") for entry in islice(path.rglob("*"), 256))
    except (OSError, ValueError) as error:
        raise atomic_files.unreadable(path, error) from None
    if dicom:
        raise refused(path, "E_DICOM", "a folder of DICOM files stands where a NIfTI file belongs", _DCM2NIIX)
    raise refused(path, "E_FILE", "a folder stands where a NIfTI file belongs", f"Name the file itself. {_DCM2NIIX}")


def _refuse_foreign(path: Path, stream: _Stream) -> None:
    """Refuses what is plainly no NIfTI file, or not packed as its name says."""
    first, named_gz = stream.first, path.name.lower().endswith(".gz")
    if not first:
        raise refused(path, "E_EMPTY", "the file has zero bytes", _COPY)
    if first[128:132] == b"DICM":
        raise refused(path, "E_DICOM", "a DICOM file stands where a NIfTI file belongs", _DCM2NIIX)
    if stream.packed and not named_gz:
        raise refused(path, "E_GZIP", "the file is packed with gzip, but its name does not end in .gz", "Rename it")
    if named_gz and not stream.packed:
        sample = first[:256]
        if all(byte >= 32 or byte in b"\t\n\f\r" for byte in sample) and 127 not in sample:
            raise refused(path, "E_FORMAT", "the file holds text, not a NIfTI image", _COPY)
        found = "the name ends in .gz, but the file is not packed with gzip"
        raise refused(path, "E_GZIP", found, "Rename or pack it, or copy it again")


def _header(path: Path, stream: _Stream) -> nib.Nifti1Header:
    block = bytes(stream.read(header.MIN_BYTES))
    if not block:
        raise refused(path, "E_EMPTY", "the gzip stream holds zero bytes", _COPY)
    if stream.packed and block[:2] == b"\x1f\x8b":
        raise refused(path, "E_GZIP", "the file is packed with gzip twice", "Unpack it once, and keep its name")
    block += stream.read(header.header_bytes(path, block) - len(block))
    return header.parse(path, block)


def _voxels(path: Path, stream: _Stream, plan: header.ReadPlan) -> bytearray:
    """The stored voxels, exactly as many bytes as the header promises; extensions are passed over."""
    gap = plan.offset - int(plan.header.sizeof_hdr)
    promised = math.prod(plan.shape) * plan.stored.itemsize
    raw = stream.read(promised) if stream.drain(gap) == gap else bytearray()
    if len(raw) < promised:
        raise refused(path, "E_HEADER", f"{len(raw)} bytes of voxels, but the header promises {promised}", _COPY)
    if stream.read(1):
        remedy = "Export the image again: the header does not fit the voxels"
        raise refused(path, "E_SIZE", f"more voxels than the {promised} bytes that the header promises", remedy)
    return raw


def _scaled(raw: bytearray, plan: header.ReadPlan, *, frame: int | None, dtype: DTypeLike) -> NDArray[np.floating]:
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


def write_map(path: Path, values: NDArray[np.float32], *, like: Volume) -> None:
    """Writes one map (X, Y, Z) on a volume's grid, as float32.

    Raises:
        ValueError: the map has another shape.
        StudyError: ``E_DISK``, ``E_NAME`` or ``E_WRITE``.
    """
    if values.shape != like.data.shape:
        raise ValueError(f"map: got {values.shape}, expected {like.data.shape}")
    _write(path, values.astype("<f4"), shape=values.shape, like=like)


def _write(path: Path, data: NDArray[Any], *, shape: tuple[int, ...], like: Volume) -> None:
    # The source's header is kept but for what is set here: nibabel would recompute the qform and the voxel sizes.
    kept = like.header.as_byteswapped("<")
    for field in kept.keys():  # noqa: SIM118 (iterating a header yields no keys)
        if kept[field].dtype.kind == "S" and field != "magic":
            kept[field] = b""
    kept["dim"] = [len(shape), *shape, *[1] * (7 - len(shape))]
    kept.set_data_dtype(data.dtype)
    kept["vox_offset"] = int(kept.sizeof_hdr) + 4
    kept["scl_slope"], kept["scl_inter"] = 1.0, 0.0
    for field in {*_ABOUT_INTENSITIES} & {*kept.keys()}:
        kept[field] = 0
    content = kept.binaryblock + bytes(4) + data.tobytes(order="F")
    # zlib's own gzip frame carries neither a time nor a name, so equal labels make equal files.
    packed = path.name.lower().endswith(".gz")
    atomic_files.write_whole(path, zlib.compress(content, wbits=31) if packed else content)
