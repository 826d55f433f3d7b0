"""Masks that are found, written, corrected and used: through the command."""

from __future__ import annotations

import csv
import json
import shutil
from importlib import resources

import nibabel as nib
import numpy as np
import pytest
from chests import SEQUENCES, body, dice

from monai_deepgmm import cli


@pytest.fixture(scope="module")
def cohort(tmp_path_factory):
    """A heart in a body, and one patient in which there is none; neither has a mask."""
    base = tmp_path_factory.mktemp("masks") / "in"
    image, truth = body(slices=3)
    noise = np.random.default_rng(3).normal(100, 20, image.shape)
    for patient, data in (("heart", image), ("none", noise)):
        (base / patient).mkdir(parents=True)
        (base / patient / "Maske.nii.gz").touch()  # drawn by hand, under a name that no layout knows
        for name, one in zip(SEQUENCES, data, strict=True):
            nib.save(
                nib.Nifti1Image(one.astype(np.int16), np.diag([1.6, 1.6, 10, 1])), base / patient / f"{name}.nii.gz"
            )
    return base, truth


@pytest.fixture(scope="module")
def masks(cohort):
    out = cohort[0].parent / "masks"
    assert run("mask", cohort[0], out) == 1
    return out


def run(*arguments):
    return cli.main([str(a) for a in arguments])


def table(path):
    return {row["patient"]: row for row in csv.DictReader(path.read_text().splitlines(), delimiter="\t")}


def test_masks_are_written_with_how_sure_they_are_and_failures_stay_alone(cohort, masks):
    rows = table(masks / "masks.tsv")
    assert (rows["heart"]["status"], rows["none"]["status"], rows["none"]["code"]) == ("ok", "failed", "E_MASK_UNSURE")
    for told in (rows["heart"]["warnings"], rows["none"]["message"]):
        assert "; if Maske.nii.gz is the mask, name it " in told
    assert float(rows["heart"]["confidence"]) > 0.9
    assert "W_MASK_AUTO" in rows["heart"]["warnings"]
    written = nib.load(masks / "heart" / "heart_desc-lv_mask.nii.gz")
    assert dice(np.asarray(written.dataobj) > 0, cohort[1]) > 0.95
    assert not list(masks.glob("none/*.nii.gz"))


def test_a_corrected_mask_is_kept_and_used(cohort, masks, tmp_path, capsys):
    own = shutil.copytree(masks, tmp_path / "own")
    path = own / "heart" / "heart_desc-lv_mask.nii.gz"
    image = nib.load(path)
    changed = np.asarray(image.dataobj).copy()
    changed[..., 0] = 0
    nib.save(nib.Nifti1Image(changed, image.affine), path)
    run("mask", cohort[0], own)
    said = capsys.readouterr().err.splitlines()
    assert said[0].startswith("heart: ok (")
    assert "kept" in said[0]
    assert said[1].startswith("none: failed (E_MASK_UNSURE: no mask was given")
    assert np.array_equal(np.asarray(nib.load(path).dataobj), changed)
    assert "kept" in table(own / "masks.tsv")["heart"]["message"]
    out = tmp_path / "out"
    assert run("segment", cohort[0], out, "--masks", own, "--method", "gmm") == 1
    labels = np.asarray(nib.load(out / "heart" / "heart_dseg.nii.gz").dataobj)
    assert np.array_equal(labels > 0, changed > 0)
    assert table(out / "summary.tsv")["none"]["code"] == "E_MASK_NONE"


def test_without_a_mask_it_is_found_and_flagged_wherever_it_is_read_of(cohort, tmp_path):
    assert run("segment", cohort[0], tmp_path, "--method", "gmm") == 1
    rows = table(tmp_path / "summary.tsv")
    assert rows["none"]["code"] == "E_MASK_UNSURE"
    assert "W_MASK_AUTO" in rows["heart"]["warnings"]
    facts = json.loads((tmp_path / "heart" / "heart_dseg.json").read_text())["inputs"]["mask"]
    assert facts["confidence"] > 0.9
    assert "W_MASK_AUTO" in (tmp_path / "heart" / "heart_report.html").read_text()


def test_a_file_can_be_asked_for_and_a_protocol_without_a_finder_has_none(cohort, tmp_path):
    assert run("segment", cohort[0], tmp_path / "o", "--mask", "file") == 3
    assert table(tmp_path / "o" / "summary.tsv")["heart"]["code"] == "E_MASK_NONE"
    lines = resources.files("monai_deepgmm").joinpath("protocols/infarct.yaml").read_text().splitlines()
    own = tmp_path / "own.yaml"
    own.write_text("\n".join(line for line in lines if not line.startswith("mask_finder")))
    for wrong in (["--mask", "auto", "--protocol", own], ["--masks", tmp_path / "gone"]):
        assert run("segment", cohort[0], tmp_path / "p", *wrong) == 2
    assert run("mask", cohort[0], tmp_path / "p", "--protocol", own) == 2
    assert run("mask", cohort[0], tmp_path / "p", "--mask", "nonzero") == 2
    assert run("segment", cohort[0], tmp_path / "p", "--masks", tmp_path, "--mask", "auto") == 2
    assert not (tmp_path / "p").exists()
