"""The command on real scans, where the folder with them is named by DEEPGMM_TEST_DATA."""

import os
import shutil
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk  # noqa: N813

from monai_deepgmm.cli import main

DATA = os.environ.get("DEEPGMM_TEST_DATA")
pytestmark = [
    pytest.mark.data,
    pytest.mark.skipif(not DATA, reason="DEEPGMM_TEST_DATA does not name a folder with real scans"),
]
METHODS = pytest.mark.parametrize("method", ["gmm", "svgmm"])


def check(source: Path, result: Path, mask: np.ndarray) -> np.ndarray:
    before, after = nib.load(source), nib.load(result)
    assert after.shape == before.shape
    assert np.array_equal(after.affine, before.affine)
    for field in ("sform_code", "qform_code", "xyzt_units", "srow_x", "srow_y", "srow_z", "quatern_b", "qoffset_x"):
        assert np.array_equal(after.header[field], before.header[field], equal_nan=True)
    labels = np.asarray(after.dataobj)
    assert np.array_equal(labels > 0, mask)
    return labels


@METHODS
def test_emidec(tmp_path, method):
    folder = Path(DATA) / "emidec"
    assert main(["segment", str(folder), str(tmp_path / "out"), "--method", method]) == 0
    for patient in ("samplePositive", "sampleNegative"):
        contours = np.asarray(nib.load(folder / patient / "Contours" / f"{patient}.nii.gz").dataobj)
        source = folder / patient / "Images" / f"{patient}.nii.gz"
        labels = check(source, tmp_path / "out" / patient / f"{patient}_dseg.nii.gz", contours > 0)
        assert set(np.unique(labels)) == {0, 1, 2, 4}


def shares_rise_with_t1(labels: np.ndarray, t1: np.ndarray) -> None:
    shares = np.bincount(labels[labels > 0], minlength=4)[1:] / (labels > 0).sum()
    assert ((shares > 0.05) & (shares < 0.75)).all()
    gm, wm, csf = (t1[labels == index].mean() for index in (1, 2, 3))
    assert csf < gm < wm


@pytest.mark.slow
@METHODS
def test_brain_in_template_space(tmp_path, method):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "patient19").symlink_to(Path(DATA) / "openms" / "patient19")
    options = ["--protocol", "brain", "--mask", "nonzero", "--method", method, "--set", "tol=1e-3"]
    assert main(["segment", str(tmp_path / "in"), str(tmp_path / "out"), *options]) == 0
    t1 = Path(DATA) / "openms" / "patient19" / "T1.nii.gz"
    intensity = nib.load(t1).get_fdata()
    labels = check(t1, tmp_path / "out" / "patient19" / "patient19_dseg.nii.gz", intensity != 0)
    shares_rise_with_t1(labels, intensity)


@pytest.mark.slow
@METHODS
def test_three_sequences_on_three_grids(tmp_path, method):
    folder = tmp_path / "in" / "patient01"
    shutil.copytree(Path(DATA) / "openms" / "patient01_raw", folder)
    t1 = folder / "study1_T1W.nii.gz"
    head = sitk.OtsuThreshold(sitk.ReadImage(str(t1)), 0, 1)
    largest = sitk.RelabelComponent(sitk.ConnectedComponent(head)) == 1
    sitk.WriteImage(largest, str(folder / "mask.nii.gz"))
    options = ["--protocol", "brain", "--method", method, "--set", "tol=1e-3"]
    assert main(["segment", str(tmp_path / "in"), str(tmp_path / "out"), *options]) == 0
    mask = np.asarray(nib.load(folder / "mask.nii.gz").dataobj) > 0
    check(t1, tmp_path / "out" / "patient01" / "patient01_dseg.nii.gz", mask)
    assert "W_RESAMPLED" in (tmp_path / "out" / "summary.tsv").read_text(encoding="utf-8")
