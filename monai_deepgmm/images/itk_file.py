"""NRRD and MetaImage files in one piece (``.nrrd``, ``.mha``), read by SimpleITK behind the checks of NIfTI files."""

from __future__ import annotations

import contextlib
import math
import os
import re
import tempfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, NamedTuple

import nibabel as nib
import numpy as np
import SimpleITK as sitk  # noqa: N813 (the name its own manual uses)
from numpy.typing import DTypeLike, NDArray

from monai_deepgmm import wording
from monai_deepgmm.errors import StudyError
from monai_deepgmm.images import atomic_files, header
from monai_deepgmm.images.atomic_files import refused
from monai_deepgmm.images.volume import Volume
from monai_deepgmm.patients.spacing import Spacing

_RESAVE = "Save it again, or convert it to NIfTI"
_ONE_FILE = "Save header and voxels as one file (.nrrd, .mha), or convert it to NIfTI"
_LONGEST_HEADER = 1 << 16
_LPS_TO_RAS = np.diag([-1.0, -1.0, 1.0, 1.0])
_STORED = {
    sitk.sitkUInt8: np.uint8,
    sitk.sitkInt8: np.int8,
    sitk.sitkUInt16: np.uint16,
    sitk.sitkInt16: np.int16,
    sitk.sitkUInt32: np.uint32,
    sitk.sitkInt32: np.int32,
    sitk.sitkUInt64: np.uint64,
    sitk.sitkInt64: np.int64,
    sitk.sitkFloat32: np.float32,
    sitk.sitkFloat64: np.float64,
}
#: NRRD's names for the frames of a patient; others, and none, do not say where the image lies.
_OF_A_PATIENT = re.compile(r"(left|right)-(anterior|posterior)-(superior|inferior)|ras|las|lps|rai", re.IGNORECASE)


class _Said(NamedTuple):
    """What the text at a file's beginning says.

    Attributes:
        end: the byte where the voxels begin.
        packed: whether they are packed.
        placed: whether it says where the image lies.
    """

    end: int
    packed: bool
    placed: bool


def read(
    path: Path,
    *,
    frame: int | None = None,
    max_voxels: int = header.DEFAULT_MAX_VOXELS,
    spacing: Spacing = None,
    beside: int = 0,
    dtype: DTypeLike = np.float32,
) -> Volume:
    """Reads one file; arguments, result and errors are those of ``nifti.read``."""
    found = plan(path, frame=frame, max_voxels=max_voxels, spacing=spacing, beside=beside)
    with atomic_files.open_regular(path) as file:
        _check_voxels(path, file, _said(path, file), math.prod(found.shape) * found.stored.itemsize)
    with _as_study_error(path):
        image = sitk.ReadImage(str(path))
        array = sitk.GetArrayViewFromImage(image)
    return Volume(
        data=_three_axes(array, frame, dtype),
        affine=found.affine,
        header=found.header,
        source_shape=found.shape,
        name=path.name,
        sha256=atomic_files.sha256(path),
        warnings=found.warnings,
        placed=found.placed,
    )


def plan(
    path: Path, *, frame: int | None = None, max_voxels: int, spacing: Spacing = None, beside: int
) -> header.ReadPlan:
    """What ``read`` will read of a file, without its voxels, as if it were NIfTI.

    Raises:
        StudyError: what the header alone shows.
    """
    with atomic_files.open_regular(path) as file:
        said, size = _said(path, file), os.fstat(file.fileno()).st_size
    reader = sitk.ImageFileReader()
    reader.SetFileName(str(path))
    with _as_study_error(path):
        reader.ReadImageInformation()
    found = header.plan(path, _as_nifti(path, reader, said), frame=frame, max_voxels=max_voxels, spacing=spacing)
    header.refuse_nearly_empty(path, size, found.shape, max_voxels, beside)
    return found


def write_labels(path: Path, labels: NDArray[np.uint8], *, like: Volume) -> None:
    """Writes a label map (X, Y, Z) on a volume's grid, packed, in the format that the name's end tells.

    Raises:
        StudyError: ``E_DISK`` or ``E_WRITE``.
    """
    image = sitk.GetImageFromArray(labels.transpose(2, 1, 0))
    affine, spacing = _LPS_TO_RAS @ like.affine, np.array(like.spacing_mm)
    image.SetOrigin(affine[:3, 3].tolist())
    image.SetSpacing(spacing.tolist())
    image.SetDirection((affine[:3, :3] / spacing).ravel().tolist())
    with tempfile.TemporaryDirectory() as folder:
        made = Path(folder) / f"labels{path.suffix}"
        sitk.WriteImage(image, str(made), useCompression=True)
        atomic_files.write_whole(path, made.read_bytes())


def _said(path: Path, file: BinaryIO) -> _Said:
    start = file.read(_LONGEST_HEADER)
    file.seek(0)
    if not start:
        raise refused(path, "E_EMPTY", "the file has zero bytes", "Copy or download the file again")
    return _nrrd(path, start) if path.name.lower().endswith(".nrrd") else _metaimage(path, start)


def _nrrd(path: Path, start: bytes) -> _Said:
    ends = re.search(rb"\r?\n\r?\n", start)
    if not start.startswith(b"NRRD") or ends is None:
        raise refused(path, "E_FORMAT", "the file does not begin as a NRRD file does", _RESAVE)
    lines = start[: ends.start()].decode("latin-1").splitlines()[1:]
    pairs = (line.split(":", 1) for line in lines if ":" in line and not line.startswith("#"))
    fields = {key.strip().lower(): value.strip() for key, value in pairs}
    if fields.keys() & {"data file", "datafile"}:
        raise refused(path, "E_FORMAT", "its voxels lie in another file", _ONE_FILE)
    encoding = fields.get("encoding", "raw").lower()
    if encoding not in ("raw", "gzip", "gz"):
        raise refused(path, "E_FORMAT", f"its voxels are written as {encoding}; raw and gzip are read", _RESAVE)
    units = {word for word in re.findall(r'"([^"]*)"', fields.get("space units", "")) if word}
    if units - {"mm"}:
        raise refused(path, "E_FORMAT", f"its positions are in {', '.join(sorted(units))}, expected mm", _RESAVE)
    placed = bool(_OF_A_PATIENT.match(fields.get("space", "").removesuffix("-time"))) and "space origin" in fields
    return _Said(ends.end(), encoding != "raw", placed)


def _metaimage(path: Path, start: bytes) -> _Said:
    ends = re.search(rb"(?im)^ElementDataFile *= *([^\r\n]*)\r?\n", start)
    if ends is None:
        raise refused(path, "E_FORMAT", "the file does not begin as a MetaImage file does", _RESAVE)
    if ends[1].strip().upper() != b"LOCAL":
        raise refused(path, "E_FORMAT", "its voxels lie in another file", _ONE_FILE)
    pairs = (line.split("=", 1) for line in start[: ends.start()].decode("latin-1").splitlines() if "=" in line)
    fields = {key.strip().lower(): value.strip() for key, value in pairs}
    placed = bool(fields.keys() & {"offset", "position", "origin"})
    return _Said(ends.end(), fields.get("compresseddata", "").lower() == "true", placed)


def _check_voxels(path: Path, file: BinaryIO, said: _Said, promised: int) -> None:
    """Counts the bytes, unpacked to the checksum: SimpleITK takes what a damaged stream holds without a word."""
    found = os.fstat(file.fileno()).st_size - said.end
    if said.packed:
        file.seek(said.end)
        found = _unpacked_bytes(path, file)
    if found < promised:
        message = f"{max(found, 0)} bytes of voxels, but the header promises {promised}"
        raise refused(path, "E_HEADER", message, "Copy the file again")


def _unpacked_bytes(path: Path, file: BinaryIO) -> int:
    unpacking, found = zlib.decompressobj(zlib.MAX_WBITS | 32), 0
    try:
        while not unpacking.eof and (block := file.read(1 << 16)):
            while block and not unpacking.eof:
                found += len(unpacking.decompress(block, 1 << 20))
                block = unpacking.unconsumed_tail
    except zlib.error as error:
        raise refused(path, "E_GZIP", f"its packed voxels are damaged ({error})", "Copy the file again") from None
    if not unpacking.eof:
        raise refused(path, "E_GZIP", "its packed voxels end too early", "Copy the file again")
    return found


def _as_nifti(path: Path, reader: sitk.ImageFileReader, said: _Said) -> nib.Nifti1Header:
    """The header that a NIfTI file of this image would have, so that all is checked in one place."""
    if reader.GetNumberOfComponents() != 1 or reader.GetPixelID() not in _STORED:
        found = f"it holds {reader.GetNumberOfComponents()} values per voxel, or such as are not real numbers"
        raise refused(path, "E_DTYPE", found, "Save one real intensity, or one label, per voxel")
    shape = tuple(int(size) for size in reader.GetSize())
    made = nib.Nifti2Header() if max(shape) > np.iinfo(np.int16).max else nib.Nifti1Header()
    made.set_data_dtype(_STORED[reader.GetPixelID()])
    made.set_data_shape(shape)
    made["vox_offset"] = made.single_vox_offset
    affine = _affine(reader)
    made.set_xyzt_units("mm")
    made["pixdim"][1:4] = np.linalg.norm(affine[:3, :3], axis=0)
    if said.placed:
        made.set_sform(affine, 1)
        made.set_qform(affine, 1, strip_shears=True)
    return made


def _affine(reader: sitk.ImageFileReader) -> NDArray[np.float64]:
    """(4, 4) voxel index → mm (RAS); of an image with two axes, the third stands upright on them."""
    axes = reader.GetDimension()
    affine, n = np.eye(4), min(axes, 3)
    columns = np.reshape(reader.GetDirection(), (axes, axes)) * reader.GetSpacing()
    affine[:n, :n], affine[:n, 3] = columns[:n, :n], reader.GetOrigin()[:n]
    return _LPS_TO_RAS @ affine


def _three_axes(array: NDArray[np.generic], frame: int | None, dtype: DTypeLike) -> NDArray[np.floating]:
    """(X, Y, Z) of SimpleITK's ([T,] Z, Y, X)."""
    if array.ndim == 4:
        array = array[frame if array.shape[0] > 1 and frame is not None else 0]
    stacked = array if array.ndim == 3 else array[None]
    return np.ascontiguousarray(stacked.transpose(2, 1, 0), dtype=dtype)


@contextlib.contextmanager
def _as_study_error(path: Path) -> Iterator[None]:
    """What SimpleITK raises, as this patient's failure."""
    sitk.ProcessObject.SetGlobalWarningDisplay(False)
    try:
        yield
    except StudyError:
        raise
    except Exception as error:  # SimpleITK has no finer kind
        words = str(error).rsplit("ERROR: ", 1)[-1].rsplit("Error: ", 1)[-1].split("\n")[-1].strip()
        message = f"SimpleITK cannot read it ({wording.shown(words)[:160]})"
        raise refused(path, "E_FORMAT", message, "Copy the file again, or convert it to NIfTI") from None
