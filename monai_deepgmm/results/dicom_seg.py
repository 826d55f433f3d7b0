"""Labels as a DICOM SEG, on the slices that they were made from (PS3.3 A.51), with highdicom.

Whose SEG it is must stand in it, or no archive could file it: the attributes of patient and study that the standard
requires (``KEPT``) are those of the source. No other part of the source's header is looked at but its UIDs.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from monai_deepgmm.errors import StudyError
from monai_deepgmm.images import atomic_files
from monai_deepgmm.methods.config import Config
from monai_deepgmm.patients.dicom.header import ENHANCED, MR
from monai_deepgmm.patients.stack import Slice, Stack
from monai_deepgmm.patients.study import Study
from monai_deepgmm.protocol import Protocol, Tissue
from monai_deepgmm.results.segmentation import Segmentation

if TYPE_CHECKING:
    from pydicom.dataset import Dataset

SUFFIX = "_seg.dcm"
#: What is taken over of patient and study: type 1 and 2 of their modules, but for the referring physician.
KEPT = (
    *("PatientID", "PatientName", "PatientBirthDate", "PatientSex"),
    *("StudyInstanceUID", "StudyDate", "StudyTime", "StudyID", "AccessionNumber"),
)
_OF_IMAGE = ("SOPClassUID", "SOPInstanceUID", "SeriesInstanceUID", "FrameOfReferenceUID")
_TISSUE = ("85756007", "SCT", "Tissue")
_CLUSTERS = ("123107", "DCM", "Cluster Analysis")  # of PS3.16 CID 7162, what a mixture comes nearest to
_SERIES_NUMBER = 9001


def check_source(study: Study, config: Config) -> None:
    """Refuses a patient of whom a SEG is asked for, but whose labels would have no DICOM images to refer to.

    Raises:
        StudyError: ``E_SEG``.
    """
    if config.dicom_seg and study.images and _reference(study, config.protocol) is None:
        message = "a DICOM SEG refers to DICOM images, but this patient's are NIfTI"
        raise StudyError("E_SEG", message, "Leave --dicom-seg out, or give the DICOM files as DIR")


def write(path: Path, study: Study, segmentation: Segmentation, *, frame: int | None, made_from: str) -> None:
    """Writes a patient's labels as a binary SEG, one segment for each tissue of the protocol.

    Args:
        path: a ``.dcm`` file.
        study: whose reference sequence is DICOM.
        segmentation: on that sequence's grid.
        frame: which time of a cine was segmented.
        made_from: the result's fingerprint; UIDs are made of it, so that the same result has the same.

    Raises:
        StudyError: ``E_SEG``, ``E_FILE``, or what ``write_whole`` raises.
    """
    stack = _reference(study, segmentation.protocol)
    if stack is None:
        raise StudyError("E_SEG", "the labels were not made from DICOM images", "Leave --dicom-seg out")
    slices = stack.times[frame if frame is not None and len(stack.times) > 1 else 0]
    headers = [_header(one) for one in slices]
    made = _made(_planes(stack, slices, headers, made_from), segmentation, made_from)
    _refer(made, slices, headers, made_from)
    out = io.BytesIO()
    made.save_as(out, enforce_file_format=True)
    atomic_files.write_whole(path, out.getvalue())


def _reference(study: Study, protocol: Protocol) -> Stack | None:
    first = next((study.images[s] for s in protocol.sequences if s in study.images), None)
    return first if isinstance(first, Stack) else None


def _header(one: Slice) -> Dataset:
    """What a source's header says of patient, study and image, and nothing else of it."""
    import pydicom
    from pydicom.dataset import Dataset

    try:
        read = pydicom.dcmread(one.file, stop_before_pixels=True, force=True)
        kept = Dataset()
        for keyword in (*KEPT, *_OF_IMAGE):
            setattr(kept, keyword, read.get(keyword, "") or "")
    except OSError as error:
        raise atomic_files.unreadable(one.file, error) from None
    except Exception as error:  # of many kinds, whatever a damaged header makes pydicom raise
        message = f"{atomic_files.shown(one.file)}: its header cannot be taken over ({type(error).__name__})"
        raise StudyError("E_SEG", message, "Leave --dicom-seg out, or export the series again") from error
    return kept


def _planes(stack: Stack, slices: Sequence[Slice], headers: Sequence[Dataset], made_from: str) -> list[Dataset]:
    """Single-frame images as highdicom wants them, all of one series, whatever files the slices lie in."""
    from pydicom.dataset import Dataset

    planes = []
    for number, one in enumerate(slices):
        plane = Dataset()
        for keyword in KEPT:
            setattr(plane, keyword, headers[0].get(keyword))
        plane.SOPClassUID, plane.SOPInstanceUID = MR, _uid(made_from, "plane", number)
        plane.SeriesInstanceUID = headers[0].SeriesInstanceUID
        plane.FrameOfReferenceUID = headers[0].FrameOfReferenceUID or _uid(made_from, "frame of reference")
        plane.Modality, plane.Rows, plane.Columns = "MR", stack.rows, stack.columns
        plane.ImageType, plane.SamplesPerPixel, plane.InstanceNumber = ["ORIGINAL", "PRIMARY"], 1, number + 1
        plane.ImagePositionPatient = _decimals(one.position_mm)
        plane.ImageOrientationPatient = _decimals((*stack.across, *stack.down))
        plane.PixelSpacing = _decimals(stack.spacing_mm[::-1])
        plane.SliceThickness = _decimals([stack.thickness_mm])[0]
        planes.append(plane)
    return planes


def _made(planes: list[Dataset], segmentation: Segmentation, made_from: str) -> Any:
    import highdicom

    tissues = sorted(segmentation.protocol.tissues, key=lambda t: t.index)
    numbers = np.zeros(256, dtype=np.uint8)
    numbers[[t.index for t in tissues]] = np.arange(1, len(tissues) + 1)
    frames: NDArray[np.uint8] = numbers[segmentation.labels].transpose(2, 1, 0)
    version = metadata.version("monai-deepgmm")
    method = str(segmentation.sidecar.get("method", ""))
    algorithm = highdicom.AlgorithmIdentificationSequence(
        name="monai-deepgmm", family=_term(_CLUSTERS), version=version, parameters={"method": method}
    )
    made = highdicom.seg.Segmentation(
        source_images=planes,
        pixel_array=np.ascontiguousarray(frames),
        segmentation_type=highdicom.seg.SegmentationTypeValues.BINARY,
        segment_descriptions=[_described(k, t, algorithm) for k, t in enumerate(tissues, 1)],
        series_instance_uid=_uid(made_from, "series"),
        series_number=_SERIES_NUMBER,
        sop_instance_uid=_uid(made_from, "instance"),
        instance_number=1,
        manufacturer="monai-deepgmm",
        manufacturer_model_name="deepgmm",
        software_versions=version,
        device_serial_number="none",
        content_label="TISSUES",
        content_description="Research use only. Not a medical device.",
        series_description="Tissue segmentation (deepgmm)",
    )
    made.SpecificCharacterSet = "ISO_IR 192"
    return made


def _described(number: int, tissue: Tissue, algorithm: Any) -> Any:
    import highdicom

    codes = tissue.dicom
    own = (tissue.name[:16], "99DEEPGMM", tissue.name[:64])
    region = None if codes is None or codes.region is None else [_term(codes.region)]
    red, green, blue = bytes.fromhex(tissue.color.removeprefix("#"))
    return highdicom.seg.SegmentDescription(
        segment_number=number,
        segment_label=tissue.name[:64],
        segmented_property_category=_term(_TISSUE if codes is None else codes.category),
        segmented_property_type=_term(own if codes is None else codes.type),
        algorithm_type=highdicom.seg.SegmentAlgorithmTypeValues.AUTOMATIC,
        algorithm_identification=algorithm,
        anatomic_regions=region,
        display_color=highdicom.color.CIELabColor.from_rgb(red, green, blue),
    )


def _refer(made: Any, slices: Sequence[Slice], headers: Sequence[Dataset], made_from: str) -> None:
    """Puts the true sources in the place of the planes that stood for them, and UIDs that the same result has again."""
    from pydicom.dataset import Dataset
    from pydicom.sequence import Sequence as Items

    planes = {_uid(made_from, "plane", number): number for number in range(len(slices))}
    of_frames = [group.DerivationImageSequence[0] for group in made.PerFrameFunctionalGroupsSequence]
    for holder in (made, *of_frames):
        for source in holder.SourceImageSequence:
            number = planes.get(source.ReferencedSOPInstanceUID)
            if number is None:  # an item that several segments share
                continue
            source.ReferencedSOPClassUID = headers[number].SOPClassUID
            source.ReferencedSOPInstanceUID = headers[number].SOPInstanceUID
            if headers[number].SOPClassUID in ENHANCED:
                source.ReferencedFrameNumber = slices[number].frame + 1
    by_series: dict[str, dict[str, Dataset]] = {}
    for header in headers:
        item = Dataset()
        item.ReferencedSOPClassUID, item.ReferencedSOPInstanceUID = header.SOPClassUID, header.SOPInstanceUID
        by_series.setdefault(header.SeriesInstanceUID, {})[header.SOPInstanceUID] = item
    made.ReferencedSeriesSequence = Items(_series(uid, items) for uid, items in by_series.items())
    for one in (*made.DimensionOrganizationSequence, *made.DimensionIndexSequence):
        one.DimensionOrganizationUID = _uid(made_from, "dimensions")


def _series(uid: str, items: Mapping[str, Dataset]) -> Dataset:
    from pydicom.dataset import Dataset
    from pydicom.sequence import Sequence as Items

    one = Dataset()
    one.SeriesInstanceUID, one.ReferencedInstanceSequence = uid, Items(items.values())
    return one


def _term(term: tuple[str, str, str]) -> Any:
    from highdicom.sr import CodedConcept

    return CodedConcept(*term)


def _uid(*words: object) -> str:
    """A UID that is the same for the same words (PS3.5 B.2 in kind)."""
    digest = hashlib.sha256("/".join(map(str, words)).encode()).digest()
    return f"2.25.{int.from_bytes(digest[:15])}"


def _decimals(values: Sequence[float]) -> list[str]:
    """Numbers in the 16 characters that DICOM allows."""
    return [format(value, ".10g") if len(format(value, ".10g")) <= 16 else format(value, ".8g") for value in values]
