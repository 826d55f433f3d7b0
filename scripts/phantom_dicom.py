"""Phantom patients as DICOM, in the habits of four vendors, as conformance statements and dcm2niix's notes tell them.

    python scripts/phantom_dicom.py DIR -n 2 --vendor philips

Needs pydicom (``pip install pydicom``). ``siemens`` writes every slice of the cine as a series of its
own, and magnitude and PSIR apart; ``ge`` all phases of all slices into one series, from the last slice on; ``philips``
enhanced multi-frame files with a scale for each frame, magnitude and PSIR in one; ``canon`` implicit data sets.
Every study also holds what is to be left out: a localiser, a four-chamber view, a map and a screen capture.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import SimpleITK as sitk  # noqa: N813 (the name its own manual uses)
from numpy.typing import NDArray
from pydicom import dcmread
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.sequence import Sequence as Items
from pydicom.uid import ExplicitVRLittleEndian, ImplicitVRLittleEndian

from monai_deepgmm.phantom import heart

VENDORS = ("siemens", "ge", "philips", "canon")
#: Whoever these are, no output of the software may name them.
PEOPLE = {
    "PatientName": "Lovelace^Augusta",
    "PatientID": "PID-31415926",
    "PatientBirthDate": "18151210",
    "ReferringPhysicianName": "Somerville^Mary",
    "OperatorsName": "Babbage^Charles",
    "InstitutionName": "Marylebone Infirmary",
    "AccessionNumber": "ACC-27182818",
    "StationName": "ENGINE-NO-2",
}
MR, ENHANCED, CAPTURE = (f"1.2.840.10008.5.1.4.1.1.{end}" for end in ("4", "4.1", "7"))
#: What each vendor's protocols call the sequences.
NAMES = {
    "siemens": {
        "LGE": "de_tfi_psir_sax_PSIR",
        "MAG": "de_tfi_psir_sax_MAG",
        "T2": "t2_stir_sax",
        "bSSFP": "cine_trufi_sax",
    },
    "ge": {"LGE": "SAX PS MDE", "MAG": "SAX MDE", "T2": "SAX T2 Triple IR", "bSSFP": "SAX FIESTA CINE"},
    "philips": {"LGE": "PSIR_TFE SA", "MAG": "PSIR_TFE SA", "T2": "T2W_STIR_BB SA", "bSSFP": "B-TFE_BH SA"},
    "canon": {
        "LGE": "Delayed Enhancement SA",
        "MAG": "Delayed Enhancement SA",
        "T2": "SA STIR",
        "bSSFP": "SA True SSFP",
    },
}
Array = NDArray[np.generic]
Floats = NDArray[np.float64]


@dataclasses.dataclass
class Scanner:
    """Writes the series of one study.

    Attributes:
        folder: where the files go.
        vendor: whose habits.
        study: any word; the UIDs are made of it.
        people: what names persons, by keyword.
        packed: "JPEG" or "JPEG2000" (both lossless) instead of plain pixels.
    """

    folder: Path
    vendor: str = "siemens"
    study: str = "study"
    people: dict[str, str] = dataclasses.field(default_factory=lambda: dict(PEOPLE))
    packed: str = ""
    count: int = 0

    def uid(self, *words: object) -> str:
        """The same words make the same UID."""
        digest = hashlib.sha256("/".join(map(str, (self.study, *words))).encode()).digest()
        return f"2.25.{int.from_bytes(digest[:12])}"

    def stack(self, number: int, name: str, data: Array, affine: Floats, **more: Any) -> list[Path]:
        """One series of the slices of a volume (X, Y, Z), or of its times (X, Y, Z, T)."""
        times = data.reshape(*data.shape[:3], -1)
        if self.vendor == "philips" and not more.pop("classic", False):
            return [self._enhanced(number, name, [(times, "M")], affine, **more)]
        return [self.save(one) for one in self._classic(number, name, times, affine, **more)]

    def both(self, number: int, name: str, magnitude: Array, real: Array, affine: Floats) -> list[Path]:
        """Philips: magnitude and phase-sensitive images in one file."""
        pair = [(magnitude[..., None], "M_IR"), (real[..., None], "R_IR")]
        return [self._enhanced(number, name, pair, affine)]

    def save(self, one: Dataset) -> Path:
        """A file for a data set."""
        self.count += 1
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / {"siemens": f"{self.count:05d}.IMA", "ge": f"i{self.count}.MRDC.{self.count}"}.get(
            self.vendor, f"IM_{self.count:04d}" if self.vendor == "philips" else f"{self.count:08d}.dcm"
        )
        implicit = self.vendor == "canon" and not self.packed
        one.file_meta = FileMetaDataset()
        one.file_meta.TransferSyntaxUID = ImplicitVRLittleEndian if implicit else ExplicitVRLittleEndian
        one.file_meta.MediaStorageSOPClassUID, one.file_meta.MediaStorageSOPInstanceUID = (
            one.SOPClassUID,
            one.SOPInstanceUID,
        )
        if self.packed and one.SamplesPerPixel == 1:
            pack(one, self.packed)
        one.save_as(path, enforce_file_format=True)
        return path

    def _classic(self, number: int, name: str, times: Array, affine: Floats, **more: Any) -> Iterator[Dataset]:
        across, down, normal, spacing = directions(affine)
        places = [(z, t) for z in range(times.shape[2]) for t in range(times.shape[3])]
        if self.vendor == "ge":
            places.sort(key=lambda place: (-place[0], place[1]))
        elif self.vendor == "canon":
            places.sort(key=lambda place: place[1])
        for z, t in places:
            one = self._begun(number, name, MR, times[:, :, z, t].T, z, t, **more)
            one.ImagePositionPatient = decimals(position(affine, z))
            one.ImageOrientationPatient = decimals([*across, *down])
            one.PixelSpacing = decimals(spacing[1::-1])
            one.SliceThickness = decimals([0.8 * spacing[2]])[0]
            if self.vendor in ("ge", "canon"):
                one.SpacingBetweenSlices = decimals([spacing[2]])[0]
            one.SliceLocation = decimals([float(position(affine, z) @ normal)])[0]
            one.InstanceNumber = self.count + 1
            one.EchoTime, one.EchoNumbers = "1.5", "1"
            if times.shape[3] > 1:
                one.TriggerTime = decimals([12.5 + 33 * t])[0]
            yield one

    def _begun(self, number: int, name: str, sop_class: str, pixels: Array, *which: int, **more: Any) -> Dataset:
        """A data set with all that does not depend on the kind of file."""
        one = Dataset()
        for keyword, value in self.people.items():
            setattr(one, keyword, value)
        one.SpecificCharacterSet, one.Modality, one.SOPClassUID = "ISO_IR 100", "MR", sop_class
        series = more.pop("series", "")
        one.SOPInstanceUID = self.uid(number, series, name, more, *which)
        one.StudyInstanceUID, one.SeriesInstanceUID = self.uid(), self.uid(number, series)
        one.FrameOfReferenceUID = self.uid("frame of reference")
        one.StudyDate, one.StudyTime, one.StudyID, one.SeriesNumber = "20240229", "101112", "1", number
        one.Manufacturer = {"siemens": "SIEMENS", "ge": "GE MEDICAL SYSTEMS", "philips": "Philips Medical Systems"}.get(
            self.vendor, "CANON_MEC"
        )
        one.PatientSex, one.PatientPosition = "F", "HFS"
        one.SeriesDescription, one.ProtocolName = name, more.pop("protocol", name)
        one.ImageType = ["ORIGINAL", "PRIMARY", *more.pop("kind", ("M", "ND"))]
        one.MRAcquisitionType, one.ScanningSequence, one.SequenceVariant = "2D", "GR", "SK"
        for keyword, value in more.items():
            setattr(one, keyword, value)
        put_pixels(one, pixels)
        return one

    def _enhanced(
        self, number: int, name: str, parts: Sequence[tuple[Array, str]], affine: Floats, **more: Any
    ) -> Path:
        """One file of all frames, each with its own scale, stored such that only Philips' own makes them comparable."""
        across, down, _, spacing = directions(affine)
        frames, pixels = [], []
        for times, kind in parts:
            for z in range(times.shape[2]):
                for t in range(times.shape[3]):
                    private = 0.5 + 0.125 * z  # stored = signal · private
                    stored = np.rint(times[:, :, z, t].T * private).astype(np.int16)
                    pixels.append(stored)
                    frames.append(self._frame(affine, z, t, kind, private, several=times.shape[3] > 1))
        one = self._begun(number, name, ENHANCED, np.stack(pixels), **more)
        one.NumberOfFrames, one.InstanceNumber = len(frames), 1
        one.ImageType = ["ORIGINAL", "PRIMARY", "CARDIAC", "NONE"]
        shared, turned, measures = Dataset(), Dataset(), Dataset()
        turned.ImageOrientationPatient = decimals([*across, *down])
        measures.PixelSpacing, measures.SliceThickness = decimals(spacing[1::-1]), decimals([0.8 * spacing[2]])[0]
        measures.SpacingBetweenSlices = decimals([spacing[2]])[0]
        shared.PlaneOrientationSequence, shared.PixelMeasuresSequence = Items([turned]), Items([measures])
        one.SharedFunctionalGroupsSequence = Items([shared])
        one.PerFrameFunctionalGroupsSequence = Items(frames)
        return self.save(one)

    def _frame(self, affine: Floats, z: int, t: int, kind: str, private: float, *, several: bool) -> Dataset:
        place, content, scale, typed, own, frame = (Dataset() for _ in range(6))
        place.ImagePositionPatient = decimals(position(affine, z))
        content.StackID, content.InStackPositionNumber, content.TemporalPositionIndex = "1", z + 1, t + 1
        content.DimensionIndexValues = [1, z + 1, t + 1, 1 + (kind == "R_IR")]
        scale.RescaleSlope, scale.RescaleIntercept, scale.RescaleType = decimals([1 / private])[0], "0", "US"
        typed.FrameType = ["ORIGINAL", "PRIMARY", kind, "NONE"]
        own.add_new(0x20050010, "LO", "Philips MR Imaging DD 001")
        own.add_new(0x2005100E, "FL", private)
        frame.PlanePositionSequence, frame.FrameContentSequence = Items([place]), Items([content])
        frame.PixelValueTransformationSequence, frame.MRImageFrameTypeSequence = Items([scale]), Items([typed])
        if several:
            heartbeat = Dataset()
            heartbeat.NominalCardiacTriggerDelayTime = 12.5 + 33.0 * t
            frame.CardiacSynchronizationSequence = Items([heartbeat])
        frame.add_new(0x20050014, "LO", "Philips MR Imaging DD 005")
        frame.add_new(0x2005140F, "SQ", Items([own]))
        return frame

    def extras(self, affine: Floats) -> None:
        """What is to be left out: a localiser, a four-chamber view, a map and a screen capture."""
        flat = np.full((16, 16, 1), 7, np.int16)
        axial, turned = np.diag([4.0, 4, 8, 1]), affine.copy()
        turned[:3, :3] = affine[:3, :3] @ np.array([[1, 0, 0], [0, 0, -1], [0, 1, 0.0]])
        self.stack(1, "localizer", np.repeat(flat, 3, 2), axial, kind=("M", "ND"), classic=True)
        self.stack(90, f"{NAMES[self.vendor]['MAG']} 4ch", flat, turned, classic=True)
        self.stack(91, "T2_MAP_SAX", flat, affine, kind=("T2 MAP",), classic=True)
        capture = self._begun(92, "LGE report", CAPTURE, flat[..., 0], Modality="OT", kind=())
        self.save(capture)


def put_pixels(one: Dataset, pixels: Array) -> None:
    """Pixels (…, rows, columns) of 16 bits, or 8 with three colours last."""
    colour = pixels.ndim == 3 and pixels.shape[-1] == 3
    one.SamplesPerPixel, one.PhotometricInterpretation = (3, "RGB") if colour else (1, "MONOCHROME2")
    if colour:
        one.PlanarConfiguration = 0
    one.Rows, one.Columns = pixels.shape[-3:-1] if colour else pixels.shape[-2:]
    bits = 8 * pixels.dtype.itemsize
    one.BitsAllocated, one.BitsStored, one.HighBit = bits, bits, bits - 1
    one.PixelRepresentation = int(pixels.dtype.kind == "i")
    one.PixelData = np.ascontiguousarray(pixels).tobytes()


def pack(one: Dataset, compressor: str) -> None:
    """Packs the pixels of a data set, by GDCM."""
    frames = np.frombuffer(one.PixelData, f"<i{one.BitsAllocated // 8}").reshape(-1, one.Rows, one.Columns)
    frames = frames.view("<u2") if len(frames) > 1 else frames  # several signed ones are more than it can write
    writer = sitk.ImageFileWriter()
    writer.SetImageIO("GDCMImageIO")
    writer.UseCompressionOn()
    writer.SetCompressor(compressor)
    with tempfile.TemporaryDirectory() as folder:
        writer.SetFileName(f"{folder}/packed.dcm")
        writer.Execute(sitk.GetImageFromArray(frames))
        packed = dcmread(f"{folder}/packed.dcm")
    one.file_meta.TransferSyntaxUID = packed.file_meta.TransferSyntaxUID
    one["PixelData"] = packed["PixelData"]


def position(affine: Floats, z: int) -> Floats:
    """Where the first pixel of a slice lies, LPS in mm."""
    return np.array([-1, -1, 1]) * (affine[:3, 3] + z * affine[:3, 2])


def directions(affine: Floats) -> tuple[Floats, Floats, Floats, list[float]]:
    """Of rows, columns and their normal, in LPS; and the spacing along X, Y and Z."""
    spacing = np.linalg.norm(affine[:3, :3], axis=0)
    lps = np.array([[-1.0], [-1.0], [1.0]]) * affine[:3, :3] / spacing
    return lps[:, 0], lps[:, 1], np.cross(lps[:, 0], lps[:, 1]), spacing.tolist()


def decimals(values: Sequence[float] | Floats) -> list[str]:
    """As DICOM writes numbers, in at most 16 characters."""
    return [f"{value:.9f}"[:16] if abs(value) < 1e4 else f"{value:.6g}" for value in np.asarray(values).tolist()]


def write_patient(
    scanner: Scanner, images: dict[str, Array], affine: Floats, *, phases: int = 3, extras: bool = True
) -> None:
    """A study of one patient: LGE as magnitude and PSIR, T2, and a cine that begins with the bSSFP image.

    Args:
        scanner: where, and in whose habits.
        images: sequence → (X, Y, Z), whole numbers.
        affine: (4, 4) voxel → mm, RAS.
        phases: of the cine; the later ones are darker.
        extras: whether what is to be left out is written, too.
    """
    names, vendor = NAMES[scanner.vendor], scanner.vendor
    if extras:
        scanner.extras(affine)
    if "LGE" in images:
        real, magnitude = images["LGE"].astype(np.int16), np.abs(images["LGE"]).astype(np.int16) + 30
        if vendor == "philips":
            scanner.both(10, names["LGE"], magnitude, real, affine)
        else:
            scanner.stack(10, names["MAG"], magnitude, affine, kind=("M", "ND"))
            scanner.stack(11, names["LGE"], real, affine, kind=("P" if vendor == "siemens" else "R", "ND"))
    if "T2" in images:
        scanner.stack(20, names["T2"], images["T2"].astype(np.int16), affine)
    if "bSSFP" in images:
        still = images["bSSFP"].astype(np.int16)
        cine = np.stack([still - still // 8 * t for t in range(phases)], -1)
        if vendor == "siemens":
            for z in range(still.shape[2]):
                moved = affine.copy()
                moved[:3, 3] += z * affine[:3, 2]
                scanner.stack(30 + z, names["bSSFP"], cine[:, :, z : z + 1], moved)
        else:
            scanner.stack(30, names["bSSFP"], cine, affine)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("directory", metavar="DIR", type=Path)
    parser.add_argument("-n", "--number", type=int, default=1, help="how many patients")
    parser.add_argument("--vendor", choices=VENDORS, default="siemens")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    for number in range(1, arguments.number + 1):
        patient = heart.make_patient(heart.PhantomConfig(), arguments.seed, number)
        scanner = Scanner(arguments.directory / patient.patient / "DICOM", arguments.vendor, patient.patient)
        write_patient(scanner, dict(patient.images), patient.affine)
        print(f"{scanner.folder}: {scanner.count} files")


if __name__ == "__main__":
    main()
