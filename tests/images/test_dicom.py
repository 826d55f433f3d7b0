"""Stacks of DICOM images as volumes: their grid and values are dcm2niix's, whatever the vendor's habits."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import nibabel as nib
import numpy as np
import phantom_dicom
import pytest
from folders import INFARCT
from phantom_dicom import Scanner, put_pixels, write_patient
from pydicom import dcmread, dcmwrite
from pydicom.data import get_testdata_file
from pydicom.uid import ExplicitVRBigEndian

from monai_deepgmm.errors import StudyError
from monai_deepgmm.images import dicom, image_file
from monai_deepgmm.patients.dicom import header as dicom_header
from monai_deepgmm.patients.dicom import stacks as dicom_stacks
from monai_deepgmm.patients.discovery import find


def oblique(turn: float) -> np.ndarray:
    """A left-handed, oblique grid of 1.4 × 1.3 × 9 mm."""
    a, b = np.array([np.cos(turn), 0.3, np.sin(turn)]), np.array([0.1, -1.0, 0.2])
    a /= np.linalg.norm(a)
    b -= (b @ a) * a
    b /= np.linalg.norm(b)
    affine = np.eye(4)
    affine[:3, :3] = np.stack([1.4 * a, 1.3 * b, -9 * np.cross(a, b)], 1)
    affine[:3, 3] = (-31.5, 12.25, 77.125)
    return affine


AFFINE = oblique(0.4)
IMAGES = {s: (5 * np.arange(10 * 7 * 4).reshape(10, 7, 4) + 60 * k).astype(np.int16) for k, s in enumerate("ABC")}
IMAGES = dict(zip(INFARCT.sequences, IMAGES.values(), strict=True)) | {"LGE": IMAGES["A"] - 90}


def stacks(root: Path):
    (study,) = find(root, INFARCT).studies
    assert study.problems == ()
    return study.images


def converted(folder: Path, out: Path) -> list[nib.Nifti1Image]:
    out.mkdir(parents=True)
    tool = [sys.executable, "-m", "dcm2niix"]
    subprocess.run([*tool, "-o", str(out), "-f", "%s_%r_%e", "-z", "n", str(folder)], check=True, capture_output=True)
    return [nib.load(path) for path in sorted(out.glob("*.nii"))]


def held(volume, image: nib.Nifti1Image) -> set[int]:
    """The slices of a volume that an image of dcm2niix holds at the same places with the same values."""
    data = image.get_fdata().reshape(*image.shape[:3], -1)
    index = np.argwhere(np.ones(data.shape[:3], bool))
    at = np.linalg.solve(volume.affine, image.affine @ np.c_[index, np.ones(len(index))].T)[:3].T
    near = np.rint(at).astype(int)
    if np.abs(at - near).max() > 1e-3 or (near < 0).any() or (near >= volume.data.shape).any():
        return set()
    ours = volume.data[tuple(near.T)].reshape(data.shape[:3])
    good = [np.allclose(ours, data[..., t], rtol=1e-5, atol=1e-2) for t in range(data.shape[3])]
    return set(near[:, 2].tolist()) if any(good) else set()


@pytest.mark.parametrize("vendor", phantom_dicom.VENDORS)
def test_grid_and_values_are_those_of_dcm2niix(tmp_path, vendor):
    write_patient(Scanner(tmp_path / "in" / "p1", vendor), IMAGES, AFFINE)
    theirs = converted(tmp_path / "in", tmp_path / "out")
    for sequence, stack in stacks(tmp_path / "in").items():
        volume = image_file.read(stack)
        assert volume.data.shape == (10, 7, 4)
        assert set().union(*(held(volume, image) for image in theirs)) == {0, 1, 2, 3}
        # The grid is the phantom's own, too, but for the slices' order.
        flip = np.diag([1, 1, -1, 1.0])
        flip[2, 3] = 3
        np.testing.assert_allclose(volume.affine, AFFINE @ flip, atol=1e-5)
        rounding = 1.01 if vendor == "philips" else 1e-6  # its phantoms are stored as whole numbers of another scale
        np.testing.assert_allclose(volume.data, IMAGES[sequence][:, :, ::-1], atol=rounding)
        assert np.linalg.det(volume.affine[:3, :3]) > 0
        assert volume.header.get_qform() == pytest.approx(volume.header.get_sform(), abs=1e-3)


@pytest.mark.parametrize(("vendor", "packed"), [("siemens", "JPEG"), ("philips", "JPEG2000")])
def test_packed_pixels_and_scales(tmp_path, vendor, packed):
    one = Scanner(tmp_path / "p1", vendor, packed=packed)
    more = {"RescaleSlope": "0.5", "RescaleIntercept": "-8"} if vendor == "siemens" else {}
    one.stack(5, "t2_stir_sax", IMAGES["T2"], AFFINE, **more)
    expected = 0.5 * IMAGES["T2"].astype(float) - 8 if more else IMAGES["T2"]
    np.testing.assert_allclose(image_file.read(stacks(tmp_path)["T2"]).data[:, :, ::-1], expected, atol=1.01)


@pytest.mark.parametrize("name", ["RLE", "jp2klossless", "jpeg_ls_lossless", "bigendian", "implicit", "padded"])
def test_a_scanners_own_image_in_the_syntaxes_of_pydicoms_test_files(name):
    (found,) = dicom_stacks.candidates([dicom_header.read(Path(get_testdata_file(f"MR_small_{name}.dcm")))])
    plain = dcmread(get_testdata_file("MR_small.dcm"))
    volume = image_file.read(found.stack)
    np.testing.assert_array_equal(volume.data[:, :, 0].T, plain.pixel_array)
    assert volume.affine[:3, 3] == pytest.approx([83.9063, 91.2, 6.6406])
    assert volume.spacing_mm == pytest.approx((0.3125, 0.3125, 0.8))


def test_unused_bits_and_the_order_of_bytes(tmp_path):
    one = Scanner(tmp_path / "p1", "siemens")
    for path in one.stack(5, "t2_stir_sax", IMAGES["T2"], AFFINE):  # twelve bits, signed, with rubbish above them
        data = dcmread(path)
        rubbish = ((data.pixel_array - 700) & 0xFFF) | 0x5000
        put_pixels(data, rubbish.astype(np.uint16))
        data.BitsStored, data.HighBit, data.PixelRepresentation = 12, 11, 1
        data.PixelData = np.frombuffer(data.PixelData, "<u2").astype(">u2").tobytes()
        data.file_meta.TransferSyntaxUID = ExplicitVRBigEndian
        for _ in data.iterall():  # which reads all numbers, before they are written the other way round
            pass
        dcmwrite(path, data, little_endian=False, implicit_vr=False)
    np.testing.assert_allclose(image_file.read(stacks(tmp_path)["T2"]).data[:, :, ::-1], IMAGES["T2"] - 700, atol=1e-6)


def test_one_slice_frames_of_a_cine_and_sizes(tmp_path):
    one = Scanner(tmp_path / "p1", "canon")
    one.stack(5, "SA STIR", IMAGES["T2"][:, :, :1], AFFINE)
    one.stack(6, "SA cine", np.stack([IMAGES["bSSFP"] + 9 * t for t in range(3)], -1), AFFINE)
    one.stack(7, "LGE SA", np.stack([IMAGES["LGE"], IMAGES["LGE"]], -1), AFFINE)
    found = stacks(tmp_path)
    assert image_file.read(found["T2"]).spacing_mm == pytest.approx((1.4, 1.3, 9), abs=1e-4)
    first = image_file.read(found["bSSFP"])
    assert "frame 0, 12 ms after the R wave" in next(w for w in first.warnings if w.startswith("W_FRAME"))
    np.testing.assert_allclose(image_file.read(found["bSSFP"], frame=2).data, first.data + 18)
    assert image_file.sha256(found["bSSFP"]) == first.sha256
    assert image_file.shape(found["bSSFP"], frame=None, max_voxels=840) == (10, 7, 4, 3)
    for code, options in (("E_SIZE", {"max_voxels": 839}), ("E_DIM", {"frame": 3})):
        with pytest.raises(StudyError) as refused:
            image_file.read(found["bSSFP"], **options)
        assert refused.value.code == code
    with pytest.raises(StudyError, match="2 images at each place"):
        image_file.read(found["LGE"])


def test_what_a_temporary_file_holds_names_nobody(tmp_path, monkeypatch):
    written = []
    monkeypatch.setattr(dicom.Path, "write_bytes", lambda path, content: written.append(content))
    Scanner(tmp_path / "p1", "siemens", packed="JPEG").stack(5, "stir", IMAGES["T2"], AFFINE)
    with pytest.raises(StudyError, match="GDCM cannot read"):  # since there is no file then
        image_file.read(stacks(tmp_path)["T2"])
    assert written
    assert not any(word.encode() in written[0] for word in phantom_dicom.PEOPLE.values())


def test_files_that_change_between_finding_and_reading(tmp_path):
    (path, *_) = Scanner(tmp_path / "p1", "siemens").stack(5, "stir", IMAGES["T2"], AFFINE)
    found = stacks(tmp_path)["T2"]
    whole = path.read_bytes()
    for content, code in ((whole[:-9], "E_DICOM_FILE"), (whole[:300], "E_DICOM_FILE"), (b"x", "E_DICOM_FILE")):
        path.write_bytes(content)
        with pytest.raises(StudyError) as refused:
            image_file.read(found)
        assert refused.value.code == code
    path.unlink()
    with pytest.raises(StudyError):
        image_file.read(found)
