"""NRRD and MetaImage: the same image as NIfTI gives, and the same refusals."""

from __future__ import annotations

import numpy as np
import pytest
import SimpleITK as sitk  # noqa: N813 (the name its own manual uses)
from conftest import save

from monai_deepgmm.cli import main
from monai_deepgmm.errors import StudyError
from monai_deepgmm.images import image_file

TURNED = np.array([[-1.2, 0.3, 0.5, 40], [0.3, -1.3, 0.2, 30], [0.1, 0.2, 8, -10], [0, 0, 0, 1.0]])
# SimpleITK wants right angles; sheared grids exist in NIfTI alone.
TURNED[:3, :3] = np.linalg.qr(TURNED[:3, :3])[0] @ np.diag([1.2, 1.3, 8])
ENDINGS = pytest.mark.parametrize("ending", ["nrrd", "mha"])


def rewritten(path, ending, *, packed=True):
    image = sitk.ReadImage(str(path))
    for key in image.GetMetaDataKeys():
        image.EraseMetaData(key)
    sitk.WriteImage(image, str(there := path.with_name(f"{path.name.split('.')[0]}.{ending}")), useCompression=packed)
    return there


@pytest.fixture
def plain(tmp_path):
    data = np.random.default_rng(0).integers(0, 900, (20, 24, 3)).astype(np.int16)
    return save(tmp_path / "a.nii.gz", data, TURNED)


def refusal(path, **options):
    with pytest.raises(StudyError) as raised:
        image_file.read(path, **options)
    return raised.value


@ENDINGS
@pytest.mark.parametrize("packed", [True, False])
def test_the_same_voxels_in_the_same_place(plain, ending, packed):
    expected, found = image_file.read(plain), image_file.read(rewritten(plain, ending, packed=packed))
    np.testing.assert_array_equal(found.data, expected.data)
    np.testing.assert_allclose(found.affine, expected.affine, atol=1e-4)
    assert (found.source_shape, found.placed, found.warnings) == ((20, 24, 3), True, ())
    assert found.header.get_xyzt_units()[0] == "mm"


@ENDINGS
def test_packed_voxels_are_read_to_their_checksum(plain, ending):
    path = rewritten(plain, ending)
    whole = path.read_bytes()
    spoiled = bytearray(whole)
    spoiled[-200] ^= 4
    for content, code in (
        (bytes(spoiled), "E_GZIP"),
        (whole[:-20], "E_GZIP"),
        (b"", "E_EMPTY"),
        (b"<html>", "E_FORMAT"),
    ):
        path.write_bytes(content)
        assert refusal(path).code == code


@ENDINGS
def test_fewer_voxels_than_promised(plain, ending):
    path = rewritten(plain, ending, packed=False)
    path.write_bytes(path.read_bytes()[:-100])
    assert (error := refusal(path)).code == "E_HEADER"
    assert "2780 bytes of voxels, but the header promises 2880" in str(error)


@ENDINGS
def test_a_series_wants_a_frame(tmp_path, ending):
    frames = np.arange(2 * 3 * 5 * 4, dtype=np.float32).reshape(2, 3, 5, 4)
    image = sitk.JoinSeries([sitk.GetImageFromArray(frame) for frame in frames])
    sitk.WriteImage(image, str(path := tmp_path / f"a.{ending}"))
    assert refusal(path).code == "E_DIM"
    np.testing.assert_array_equal(image_file.read(path, frame=1).data, frames[1].T)
    assert "header promises" in str(refusal(path, frame=1, max_voxels=100))


@ENDINGS
def test_one_real_number_per_voxel(tmp_path, ending):
    image = sitk.GetImageFromArray(np.zeros((3, 5, 4, 3), np.uint8), isVector=True)
    sitk.WriteImage(image, str(path := tmp_path / f"a.{ending}"))
    assert refusal(path).code == "E_DTYPE"


@pytest.mark.parametrize(
    ("ending", "was", "now", "said"),
    [
        ("nrrd", b"encoding: raw", b"encoding: hex", "written as hex"),
        ("nrrd", b"encoding: raw", b"data file: other.raw\nencoding: raw", "in another file"),
        ("nrrd", b"encoding: raw", b'space units: "cm" "cm" "cm"\nencoding: raw', "in cm, expected mm"),
        ("mha", b"= LOCAL", b"= /etc/hosts", "in another file"),
        ("mha", b"MET_SHORT", b"MET_OTHER", "SimpleITK cannot read it"),
    ],
)
def test_what_is_not_read(plain, ending, was, now, said):
    path = rewritten(plain, ending, packed=False)
    path.write_bytes(path.read_bytes().replace(was, now, 1))
    assert (error := refusal(path)).code == "E_FORMAT"
    assert said in str(error)


def test_a_header_that_does_not_say_where_the_image_lies(plain):
    path = rewritten(plain, "nrrd", packed=False)
    whole = path.read_bytes()
    path.write_bytes(whole.replace(b"space: left-posterior-superior", b"space dimension: 3"))
    assert not image_file.read(path).placed
    path = rewritten(plain, "mha", packed=False)
    path.write_bytes(path.read_bytes().replace(b"Offset = ", b"Elsewhere = "))
    assert not image_file.read(path).placed


@pytest.mark.usefixtures("no_picture")
def test_a_patient_is_segmented_as_from_nifti(make_patient, tmp_path):
    for kind, path in make_patient(tmp_path / "in" / "nifti", "a").items():
        named = path.rename(path.with_name(f"{ {'C0': 'bSSFP', 'gd': 'truth'}.get(kind, kind) }.nii.gz"))
        if kind == "gd":
            save(path.with_name("mask.nii.gz"), (image_file.read(named).data > 0).astype(np.uint8))
    for ending in ("nrrd", "mha"):
        (tmp_path / "in" / ending).mkdir()
        for path in (tmp_path / "in" / "nifti").iterdir():
            there = rewritten(path, ending)
            there.rename(tmp_path / "in" / ending / there.name)
    command = [
        "segment",
        str(tmp_path / "in"),
        str(tmp_path / "out"),
        "--method",
        "gmm",
        "-q",
        "--copies",
        "nrrd",
        "mha",
    ]
    assert main(command) == 0
    labels = [image_file.read(tmp_path / "out" / p / f"{p}_dseg.nii.gz") for p in ("nifti", "nrrd", "mha")]
    copies = [image_file.read(tmp_path / "out" / "nrrd" / f"nrrd_dseg.{e}") for e in ("nrrd", "mha")]
    for other in (*labels[1:], *copies):
        np.testing.assert_array_equal(other.data, labels[0].data)
        np.testing.assert_allclose(other.affine, labels[0].affine, atol=1e-4)
    assert set(np.unique(labels[0].data)) == {0, 1, 2, 3, 4}
    meaning = ["--truth-labels", "blood=500", "myocardium=200", "edema=1220", "scar=2221"]
    assert main(["evaluate", str(tmp_path / "out"), str(tmp_path / "in"), *meaning]) == 0
