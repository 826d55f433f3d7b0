"""From a folder of DICOM files to page, table, NIfTI and DICOM SEG: one command, and what stops it."""

from __future__ import annotations

import importlib.util
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import highdicom
import nibabel as nib
import numpy as np
import phantom_dicom
import pytest
from chests import body, dice
from outcomes import labels_of, row, sidecar
from phantom_dicom import CAPTURE, Scanner, put_pixels, write_patient
from pydicom import dcmread
from scenes import contents

from monai_deepgmm import protocol
from monai_deepgmm.cli import main
from monai_deepgmm.patients import discovery

TURN = np.array([[0, 0.8, 0.6], [-0.28, 0.576, -0.768], [0.96, 0.168, -0.224]])
AFFINE = np.eye(4)
AFFINE[:3, :3], AFFINE[:3, 3] = TURN * (1.6, 1.6, 10), (-20, 55, -130)
SMALL = 7 * np.arange(8 * 6 * 3, dtype=np.int16).reshape(8, 6, 3)
VENDORS = ("siemens", "philips")
#: What stands in a page for a picture.
PICTURE = re.compile(rb"[A-Za-z0-9+/=]{80,}")


@pytest.fixture(scope="module")
def hearts(tmp_path_factory) -> tuple[Path, np.ndarray]:
    """A heart in a body in the habits of two vendors, and where its ventricle is."""
    root = tmp_path_factory.mktemp("hearts")
    image, truth = body(slices=2)
    for vendor in VENDORS:
        images = dict(zip(("LGE", "T2", "bSSFP"), np.rint(image).astype(np.int16), strict=True))
        write_patient(Scanner(root / "in" / vendor / "a" / "b", vendor, vendor), images, AFFINE)
    return root / "in", truth


@pytest.fixture(scope="module")
def out(hearts) -> Path:
    """What the command makes of them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("monai_deepgmm.results.report.preview", lambda segmentation: b"no picture")
        assert run(hearts[0]) == 0
    return hearts[0].parent / "out"


def run(folder: Path, *more: str) -> int:
    return main(["segment", str(folder), str(folder.parent / "out"), "--method", "gmm", "--dicom-seg", *more])


class TestOneCommand:
    def test_page_table_labels_and_seg(self, hearts, out):
        for vendor in VENDORS:
            assert {f"{vendor}_{what}" for what in ("report.html", "dseg.nii.gz", "dseg.json", "seg.dcm")} <= {
                path.name for path in (out / vendor).iterdir()
            }
            image = nib.load(out / vendor / f"{vendor}_dseg.nii.gz")
            flip = np.linalg.solve(AFFINE, image.affine)
            np.testing.assert_allclose(np.abs(flip[:3, :3]), np.eye(3), atol=1e-4)
            found = labels_of(out, vendor)[:, :, :: int(np.sign(flip[2, 2]))]
            assert dice(found > 0, hearts[1]) > 0.9
            codes = {warning.partition(":")[0] for warning in row(out, vendor)["warnings"]}
            assert {"W_FRAME", "W_MASK_AUTO"} <= codes
        assert sidecar(out, "philips")["inputs"]["LGE"]["file"] == "series 10.2"
        # Both vendors' files hold the same images, but for Philips' rounding.
        assert dice(labels_of(out, "siemens") == 1, labels_of(out, "philips") == 1) > 0.95

    def test_nothing_but_the_seg_names_a_person(self, out):
        secret = [word.encode() for text in phantom_dicom.PEOPLE.values() for word in text.split("^") if word != "Mary"]
        secret += [b"cine_trufi", b"psir", b"STIR", b"20240229", b"2.25."]  # nor is any text or UID of the headers told
        for name, content in contents(out).items():
            if not name.endswith("_seg.dcm"):
                unpacked = nib.load(out / name).header.binaryblock if name.endswith(".gz") else content
                told = PICTURE.sub(b"", unpacked).lower()  # four letters stand somewhere in any long base64
                assert [word for word in secret if word.lower() in told] == [], name
        seg = dcmread(out / "siemens" / "siemens_seg.dcm")
        kept = {"PatientName", "PatientID", "PatientBirthDate", "AccessionNumber"}
        for keyword, text in phantom_dicom.PEOPLE.items():
            assert (str(seg.get(keyword, "")) == text) == (keyword in kept), keyword

    @pytest.mark.parametrize("vendor", VENDORS)
    def test_the_seg_is_read_back_bit_by_bit(self, hearts, out, vendor):
        seg = highdicom.seg.segread(out / vendor / f"{vendor}_seg.dcm")
        (study,) = discovery.find(hearts[0], protocol.load("infarct"), patients=[vendor]).studies
        slices, labels = study.images["LGE"].times[0], labels_of(out, vendor)
        uids = [str(dcmread(one.file, stop_before_pixels=True).SOPInstanceUID) for one in slices]
        how = {"combine_segments": True, "assert_missing_frames_are_empty": True, "ignore_spatial_locations": True}
        if vendor == "philips":
            numbers = [one.frame + 1 for one in slices]
            pixels = seg.get_pixels_by_source_frame(uids[0], numbers, **how)
        else:
            pixels = seg.get_pixels_by_source_instance(uids, **how)
        assert np.array_equal(pixels.transpose(2, 1, 0), labels)
        volume = seg.get_volume(combine_segments=True)  # by places alone
        index = np.argwhere(labels)
        places = np.diag([-1, -1, 1, 1]) @ nib.load(out / vendor / f"{vendor}_dseg.nii.gz").affine
        at = np.linalg.solve(volume.affine, places @ np.c_[index, np.ones(len(index))].T)[:3].T
        assert np.abs(at - np.rint(at)).max() < 1e-3
        assert np.array_equal(volume.array[tuple(np.rint(at).astype(int).T)], labels[labels > 0])
        assert {str(s.ReferencedSOPInstanceUID) for s in seg.SourceImageSequence} == set(uids)
        segments = [seg.get_segment_description(number) for number in seg.segment_numbers]
        named = [(s.segment_label, s.segmented_property_type.meaning) for s in segments]
        assert named[0] == ("blood", "Blood")
        assert named[3] == ("scar", "Scar")
        assert segments[0].algorithm_identification.name == "monai-deepgmm"

    def test_a_second_run_leaves_it_and_a_lost_seg_is_made_again_with_the_same_uids(self, hearts, out, no_picture):
        before = contents(out)
        assert run(hearts[0], "--patients", "siemens") == 0
        path = out / "siemens" / "siemens_seg.dcm"
        assert contents(out)[f"siemens/{path.name}"] == before[f"siemens/{path.name}"]
        uid = dcmread(path).SOPInstanceUID
        path.unlink()
        assert run(hearts[0], "--patients", "siemens") == 0
        assert dcmread(path).SOPInstanceUID == uid

    def test_scan_tells_what_was_found_and_left_out(self, hearts, capsys):
        assert main(["scan", str(hearts[0]), "--patients", "siemens"]) == 0
        said = capsys.readouterr().out
        assert "series 30-31  2 slices × 3  bSSFP (cine)" in said
        assert "left out: a localiser" in said
        assert "layout dicom: 1 patient, 0 with problems" in said
        assert main(["init-manifest", str(hearts[0])]) == 2
        assert "--filter" in capsys.readouterr().err

    def test_a_patient_of_nifti_files_has_no_seg_and_highdicom_must_be_there(
        self, tmp_path, make_patient, monkeypatch, capsys
    ):
        make_patient(tmp_path / "in", "pat1")
        assert run(tmp_path / "in", "--dry-run") == 3
        assert "E_SEG" in capsys.readouterr().out
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
        assert run(tmp_path / "in") == 2
        assert "pip install highdicom" in capsys.readouterr().err


# What stops a patient ------------------------------------------------------------------------------------------------


def stack(folder: Path, name: str = "de_sax", **more) -> list[Path]:
    return Scanner(folder, "siemens", folder.name, packed=more.pop("packed", "")).stack(5, name, SMALL, AFFINE, **more)


def changed(**values: object) -> Callable[[Path], None]:
    """A stack of whose first file some values are others."""

    def write(folder: Path) -> None:
        path = stack(folder)[0]
        data = dcmread(path)
        for keyword, value in values.items():
            setattr(data, keyword, value)
        data.save_as(path)

    return write


def cut(keep: float) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        path = stack(folder)[1]
        content = path.read_bytes()
        path.write_bytes(content[: int(keep * len(content))])

    return write


def with_gap(folder: Path) -> None:
    Scanner(folder, "ge", "gap").stack(5, "SAX MDE", np.repeat(SMALL, 2, 2), AFFINE)[2].unlink()


def huge(folder: Path) -> None:
    for path in stack(folder, packed="JPEG"):
        data = dcmread(path)
        data.Rows = data.Columns = 65535
        data.save_as(path)


def unknown_packing(folder: Path) -> None:
    for path in stack(folder, packed="JPEG"):
        data = dcmread(path)
        data.file_meta.TransferSyntaxUID = "1.2.840.10008.1.2.4.100"  # MPEG2
        data.save_as(path)


def in_colour(folder: Path) -> None:
    for path in stack(folder):
        data = dcmread(path)
        put_pixels(data, np.zeros((6, 8, 3), np.uint8))
        data.save_as(path)


def captured(folder: Path) -> None:
    for path in stack(folder):
        data = dcmread(path)
        data.SOPClassUID = data.file_meta.MediaStorageSOPClassUID = CAPTURE
        data.save_as(path)


BROKEN: dict[str, tuple[Callable[[Path], object], str]] = {
    "ends in the header": (cut(0.2), "E_DICOM_FILE"),
    "ends in the pixels": (cut(0.95), "E_DICOM_FILE"),
    "an empty file beside": (lambda folder: (stack(folder), (folder / "x.dcm").touch()), "E_DICOM_FILE"),
    "only text": (lambda folder: (folder.mkdir(), (folder / "x.dcm").write_text("hello")), "E_DICOM_FILE"),
    "more rows than pixels": (changed(Rows=65535), "E_DICOM_FILE"),
    "more frames than told": (changed(NumberOfFrames="99999999"), "E_DICOM_FILE"),
    "more than fits": (huge, "E_SIZE"),
    "packed oddly": (unknown_packing, "E_DICOM_PIXELS"),
    "one slice without a place": (changed(ImagePositionPatient=None), "E_AFFINE"),
    "a slope that is none": (changed(RescaleSlope="1e999", RescaleIntercept="0"), "E_SCALE"),
    "a missing slice": (with_gap, "E_SLICES"),
    "in colour": (in_colour, "E_DTYPE"),
    "a picture of a screen": (captured, "E_DICOM_IMAGE"),
    "two of a kind": (lambda folder: (stack(folder / "a" / "x"), stack(folder / "b" / "x", series="2")), "E_AMBIGUOUS"),
    "nothing of use": (lambda folder: stack(folder, "localizer"), "E_NO_SEQUENCE"),
}


def test_each_of_them_fails_alone_with_its_code(hearts, tmp_path, capsys):
    shutil.copytree(hearts[0] / "philips", tmp_path / "in" / "well")
    for name, (write, _) in BROKEN.items():
        write(tmp_path / "in" / name)
    assert run(tmp_path / "in", "--dry-run") == 1
    said = dict(line.split("\t", 1) for line in capsys.readouterr().out.splitlines())
    assert {n: text.split("\t")[1].split(":")[0] for n, text in said.items() if n != "well"} == {
        name: code for name, (_, code) in BROKEN.items()
    }
    assert said["well"].startswith("ready")
    assert all(text.count(". ") for name, text in said.items() if name != "well")  # each has its remedy
    assert not any(word in " ".join(said.values()) for word in ("Lovelace", "PID-31415926", str(tmp_path)))
