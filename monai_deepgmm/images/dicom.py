"""A stack of DICOM images in, a volume out: places from the headers, pixels by GDCM where they are packed."""

from __future__ import annotations

import hashlib
import math
import struct
import tempfile
from collections.abc import Iterable
from pathlib import Path

import nibabel as nib
import numpy as np
from numpy.typing import NDArray

from monai_deepgmm.errors import StudyError
from monai_deepgmm.images import atomic_files
from monai_deepgmm.images.volume import Volume
from monai_deepgmm.patients.dicom import elements as dicom_elements
from monai_deepgmm.patients.dicom import header as dicom_header
from monai_deepgmm.patients.dicom.elements import BIG_ENDIAN, NATIVE, DamagedError, DataSet
from monai_deepgmm.patients.dicom.header import Stored
from monai_deepgmm.patients.stack import Slice, Stack

_PIXELS, _SECONDARY_CAPTURE = 0x7FE00010, "1.2.840.10008.5.1.4.1.1.7"
_UNPACK = "Unpack it with gdcmconv --raw or dcmdjpeg, or convert the series with dcm2niix"


def read(stack: Stack, *, frame: int | None = None, max_voxels: int) -> Volume:
    """Reads the slices of one time.

    Args:
        stack: which files, and where each slice lies.
        frame: which time of several, counted from 0; None: of a cine the first.
        max_voxels: a stack with more voxels (all times together) is refused before any is read.

    Returns:
        The volume, its third axis along the slices' normal; its header holds nothing of DICOM's but the grid.

    Raises:
        StudyError: ``E_SIZE``, ``E_DIM``, ``E_AFFINE``, ``E_DICOM_FILE``, ``E_DICOM_PIXELS`` or ``E_FILE``.
    """
    shape = plan(stack, frame=frame, max_voxels=max_voxels)
    time = _time(stack, frame)
    slices, warnings = stack.times[time], list(stack.notes)
    if len(stack.times) > 1:
        warnings.append(_about_frame(stack, time, asked=frame is not None))
    affine = placed(stack, slices)
    data = np.empty(shape[:3], dtype=np.float32)
    for one, values in _stored_values(stack, slices):
        data[:, :, one] = slices[one].slope * values.T.astype(np.float64) + slices[one].intercept
    return Volume(data, affine, _header(affine), data.shape, stack.name, sha256(stack), tuple(warnings))


def sha256(stack: Stack) -> str:
    """A hash of all files of a stack, and of which frames of them it is made; that of the volume read from it.

    Raises:
        StudyError: ``E_FILE``.
    """
    digest = hashlib.sha256()
    for file, frames in _by_file(stack.slices).items():
        digest.update(f"{atomic_files.sha256(file)} {frames}\n".encode())
    return digest.hexdigest()


def plan(stack: Stack, *, frame: int | None, max_voxels: int) -> tuple[int, ...]:
    """The shape of what ``read`` will read, with the number of times where there are several.

    Raises:
        StudyError: ``E_SIZE``, ``E_DIM``.
    """
    if math.prod(stack.shape) > max_voxels:
        promised = " × ".join(map(str, stack.shape))
        found = f"{stack.name} has {promised} voxels, more than {max_voxels}"
        raise StudyError("E_SIZE", found, "Raise --max-voxels if it is really that large")
    if min(stack.shape) < 1:
        raise StudyError("E_HEADER", f"{stack.name} has images without pixels", "Export the series again")
    _time(stack, frame)
    return stack.shape


def _time(stack: Stack, frame: int | None) -> int:
    times = len(stack.times)
    if times == 1:
        return 0
    if frame is None and stack.cine:
        return 0
    if frame is None:
        found = f"{stack.name} has {times} images at each place, expected one"
        raise StudyError("E_DIM", found, "Choose one with --frame N (counted from 0), or another series with --filter")
    if not 0 <= frame < times:
        raise StudyError("E_DIM", f"{stack.name} has no frame {frame}", f"Choose a frame from 0 to {times - 1}")
    return frame


def _about_frame(stack: Stack, time: int, *, asked: bool) -> str:
    triggers = [one.trigger_ms for one in stack.times[time] if one.trigger_ms is not None]
    when = f", {np.median(triggers):.0f} ms after the R wave" if triggers else ""
    why = "as --frame says" if asked else "end-diastole, if the cine begins with it; --frame N takes another"
    return f"W_FRAME: of {stack.name}, {len(stack.times)} images at each place, frame {time}{when} is used: {why}"


def placed(stack: Stack, slices: tuple[Slice, ...]) -> NDArray[np.float64]:
    """The affine (4, 4) from (column, row, slice) to mm, RAS; DICOM's own coordinates are LPS (PS3.3 C.7.6.2.1.1).

    Raises:
        StudyError: ``E_AFFINE``.
    """
    origins = np.array([one.position_mm for one in slices], dtype=np.float64)
    across, down = np.array(stack.across), np.array(stack.down)
    step = np.cross(across, down) * stack.thickness_mm
    if len(slices) > 1:
        step = (origins[-1] - origins[0]) / (len(slices) - 1)
    affine = np.eye(4)
    affine[:3, :3] = np.stack([across * stack.spacing_mm[0], down * stack.spacing_mm[1], step], axis=1)
    affine[:3, 3] = origins[0]
    affine[:2] *= -1
    if not np.isfinite(affine).all() or abs(np.linalg.det(affine[:3, :3])) < 1e-9:
        raise StudyError("E_AFFINE", f"{stack.name}: its slices have no size or place", "Export the series again")
    return affine


def _header(affine: NDArray[np.float64]) -> nib.Nifti1Header:
    """A fresh header on a grid: scanner coordinates, mm, nothing else."""
    image = nib.Nifti1Image(np.zeros((1, 1, 1), np.float32), affine)
    image.set_sform(affine, code=1)
    image.set_qform(affine, code=1)
    image.header.set_xyzt_units("mm")
    header: nib.Nifti1Header = image.header
    return header


# Pixels --------------------------------------------------------------------------------------------------------------


def _by_file(slices: Iterable[Slice]) -> dict[Path, list[int]]:
    found: dict[Path, list[int]] = {}
    for one in slices:
        found.setdefault(one.file, []).append(one.frame)
    return found


def _stored_values(stack: Stack, slices: tuple[Slice, ...]) -> Iterable[tuple[int, NDArray[np.integer]]]:
    """The number of each slice, and its values (rows, columns) as they are stored; each file is opened once."""
    numbers: dict[Path, list[int]] = {}
    for number, one in enumerate(slices):
        numbers.setdefault(one.file, []).append(number)
    for file, mine in numbers.items():
        for number, values in zip(mine, _file_values(stack, file, [slices[n].frame for n in mine]), strict=True):
            yield number, values


def _file_values(stack: Stack, file: Path, frames: list[int]) -> list[NDArray[np.integer]]:
    try:
        data, stored = dicom_header.data_set(file)
        if (stored.rows, stored.columns) != (stack.rows, stack.columns) or max(frames) >= stored.frames:
            raise dicom_elements.damaged(file, "the file was changed since it was found")
        if data.pixels is None or data.pixels.tag != _PIXELS or stored.allocated not in (8, 16, 32):
            found = f"a slice of {stack.name} is stored in floating-point numbers or {stored.allocated} bits"
            raise StudyError("E_DICOM_PIXELS", found, "Convert the series with dcm2niix")
        if data.syntax in NATIVE:
            return [_native(file, data, stored, frame) for frame in frames]
        return [_significant(one, stored) for one in _unpacked(stack, file, data, stored, frames)]
    except DamagedError as error:
        problem = error.problem
        raise StudyError(problem.code, f"{stack.name}: {problem.message}", problem.remedy) from None
    except OSError as error:
        raise atomic_files.unreadable(file, error) from None


def _native(file: Path, data: DataSet, stored: Stored, frame: int) -> NDArray[np.integer]:
    """One frame that is stored as it is; the rest of the file is not read."""
    begin = data.pixels.offset if data.pixels else 0
    with file.open("rb") as stream:
        stream.seek(begin + frame * stored.frame_bytes)
        raw = stream.read(stored.frame_bytes)
    if len(raw) < stored.frame_bytes:
        raise dicom_elements.damaged(file, "the pixels end too early")
    order = ">" if data.syntax == BIG_ENDIAN else "<"
    values = np.frombuffer(raw, dtype=f"{order}{'i' if stored.signed else 'u'}{stored.allocated // 8}")
    return _significant(values.reshape(stored.rows, stored.columns), stored)


def _significant(values: NDArray[np.integer], stored: Stored) -> NDArray[np.integer]:
    """The bits that are used, brought down to 0 and extended with their sign."""
    wide = values.astype(np.int64) >> max(0, stored.high + 1 - stored.used)
    if not 0 < stored.used < stored.allocated:
        return wide
    wide &= (1 << stored.used) - 1
    if stored.signed:
        wide -= (wide >> (stored.used - 1)) << stored.used
    return wide


def _unpacked(stack: Stack, file: Path, data: DataSet, stored: Stored, frames: list[int]) -> list[NDArray[np.integer]]:
    """Frames of packed pixels, by GDCM.

    It is given the pixels and what describes them, and nothing else of the file: which scale it applies depends on the
    kind of image and not only on what the header says, and what names a person is in no temporary file.
    """
    with tempfile.TemporaryDirectory(prefix="deepgmm-") as folder:
        copy = Path(folder) / "pixels.dcm"
        copy.write_bytes(_bare(file, data, stored))
        import SimpleITK as sitk  # noqa: N813 (the name its own manual uses); here, as it takes 90 MB

        reader = sitk.ImageFileReader()
        reader.SetImageIO("GDCMImageIO")
        reader.SetFileName(str(copy))
        try:
            image = sitk.GetArrayFromImage(reader.Execute())
        except RuntimeError:
            found = f"a slice of {stack.name} is packed in a way that GDCM cannot read ({data.syntax})"
            raise StudyError("E_DICOM_PIXELS", found, _UNPACK) from None
    image = image.reshape(-1, *image.shape[-2:])
    if image.shape != (stored.frames, stored.rows, stored.columns):
        found = f"a slice of {stack.name} unpacks to {image.shape}, not to what its header promises"
        raise StudyError("E_DICOM_PIXELS", found, _UNPACK)
    return [image[frame] for frame in frames]


def _bare(file: Path, data: DataSet, stored: Stored) -> bytes:
    """A file of the packed pixels, with what is needed to unpack them."""
    several = stored.frames > 1
    kind = f"{_SECONDARY_CAPTURE}.{2 if stored.allocated == 8 else 3}" if several else _SECONDARY_CAPTURE
    meta = b"".join(
        [
            _element(0x00020002, "UI", kind),
            _element(0x00020003, "UI", "2.25.1"),
            _element(0x00020010, "UI", data.syntax),
        ]
    )
    parts = [bytes(128), b"DICM", _element(0x00020000, "UL", struct.pack("<I", len(meta))), meta]
    parts += [_element(0x00080016, "UI", kind), _element(0x00080018, "UI", "2.25.1")]
    numbers = {0x00280002: 1, 0x00280010: stored.rows, 0x00280011: stored.columns, 0x00280100: stored.allocated}
    numbers |= {0x00280101: stored.used, 0x00280102: stored.high, 0x00280103: int(stored.signed)}
    elements = {tag: _element(tag, "US", struct.pack("<H", value)) for tag, value in numbers.items()}
    elements[0x00280004] = _element(0x00280004, "CS", "MONOCHROME2")
    if several:
        elements[0x00280008] = _element(0x00280008, "IS", str(stored.frames))
    parts += [elements[tag] for tag in sorted(elements)]
    parts += [struct.pack("<HH", 0x7FE0, 0x0010), b"OB\0\0", b"\xff" * 4]
    with file.open("rb") as stream:
        for offset, length in dicom_elements.pieces(file, data):
            stream.seek(offset)
            parts += [struct.pack("<HHI", 0xFFFE, 0xE000, length), stream.read(length)]
    parts.append(struct.pack("<HHI", 0xFFFE, 0xE0DD, 0))
    return b"".join(parts)


def _element(tag: int, kind: str, value: str | bytes) -> bytes:
    raw = value if isinstance(value, bytes) else value.encode("ascii")
    raw += (b"\0" if kind == "UI" else b" ") * (len(raw) % 2)
    return struct.pack("<HH", tag >> 16, tag & 0xFFFF) + kind.encode() + struct.pack("<H", len(raw)) + raw
