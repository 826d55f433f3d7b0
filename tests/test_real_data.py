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
BRAIN = ("--set", "tol=1e-3", "--protocol", "brain")
METHODS = pytest.mark.parametrize("method", ["gmm", "svgmm"])


def segmented(folder: Path, out: Path, method: str, *options: str) -> None:
    assert main(["segment", str(folder), str(out), "--method", method, *options]) == 0


def check(source: Path, out: Path, patient: str, mask: np.ndarray) -> np.ndarray:
    """The labels, once they have been found on their source's grid and in all of the mask."""
    before, after = nib.load(source), nib.load(out / patient / f"{patient}_dseg.nii.gz")
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
    segmented(folder, tmp_path, method)
    for patient in ("samplePositive", "sampleNegative"):
        contours = np.asarray(nib.load(folder / patient / "Contours" / f"{patient}.nii.gz").dataobj)
        labels = check(folder / patient / "Images" / f"{patient}.nii.gz", tmp_path, patient, contours > 0)
        assert set(np.unique(labels)) == {0, 1, 2, 4}


@pytest.mark.slow
@METHODS
def test_brain_in_template_space(tmp_path, method):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "patient19").symlink_to(Path(DATA) / "openms" / "patient19")
    segmented(tmp_path / "in", tmp_path / "out", method, *BRAIN, "--mask", "nonzero")
    path = Path(DATA) / "openms" / "patient19" / "T1.nii.gz"
    t1 = nib.load(path).get_fdata()
    labels = check(path, tmp_path / "out", "patient19", t1 != 0)
    shares = np.bincount(labels[labels > 0], minlength=4)[1:] / (labels > 0).sum()
    assert ((shares > 0.05) & (shares < 0.75)).all()
    gm, wm, csf = (t1[labels == index].mean() for index in (1, 2, 3))
    assert csf < gm < wm


@pytest.mark.slow
@METHODS
def test_three_sequences_on_three_grids(tmp_path, method):
    folder = Path(shutil.copytree(Path(DATA) / "openms" / "patient01_raw", tmp_path / "in" / "patient01"))
    t1 = folder / "study1_T1W.nii.gz"
    head = sitk.OtsuThreshold(sitk.ReadImage(str(t1)), 0, 1)
    largest = sitk.RelabelComponent(sitk.ConnectedComponent(head)) == 1
    sitk.WriteImage(largest, str(folder / "mask.nii.gz"))
    assert main(["segment", str(tmp_path / "in"), str(tmp_path / "head"), "--method", method, *BRAIN]) == 3
    assert "E_HEAD" in (tmp_path / "head" / "summary.tsv").read_text(encoding="utf-8")
    head = nib.load(folder / "mask.nii.gz")
    where = np.stack(np.meshgrid(*map(np.arange, head.shape), indexing="ij"), -1) * head.header.get_zooms()
    away = np.linalg.norm(where - where[np.asarray(head.dataobj) > 0].mean(0), axis=-1)
    nib.save(nib.Nifti1Image((away < 60).astype(np.uint8), head.affine, head.header), folder / "mask.nii.gz")
    segmented(tmp_path / "in", tmp_path / "out", method, *BRAIN)
    check(t1, tmp_path / "out", "patient01", np.asarray(nib.load(folder / "mask.nii.gz").dataobj) > 0)
    assert "W_RESAMPLED" in (tmp_path / "out" / "summary.tsv").read_text(encoding="utf-8")


def test_a_spinal_cord_by_the_yaml_file_of_the_documentation(tmp_path):
    page = (Path(__file__).parent.parent / "bundle" / "docs" / "own_anatomy.md").read_text(encoding="utf-8")
    (tmp_path / "cord.yaml").write_text(page.split("```yaml\n")[1].split("```")[0], encoding="utf-8")
    source, folder = Path(DATA) / "sct", tmp_path / "in" / "person"
    folder.mkdir(parents=True)
    shutil.copy(source / "t2s.nii.gz", folder / "T2star.nii.gz")
    shutil.copy(source / "t2s_seg.nii.gz", folder / "mask.nii.gz")
    assert (
        main(["segment", str(tmp_path / "in"), str(tmp_path / "out"), "--protocol", str(tmp_path / "cord.yaml")]) == 0
    )
    cord, by_hand = (
        np.asarray(nib.load(source / name).dataobj) > 0 for name in ("t2s_seg.nii.gz", "t2s_gmseg_manual.nii.gz")
    )
    grey = check(source / "t2s.nii.gz", tmp_path / "out", "person", cord) == 1
    assert 2 * (grey & by_hand).sum() / (grey.sum() + by_hand.sum()) >= 0.68
