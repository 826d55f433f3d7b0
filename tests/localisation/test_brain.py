"""Heads with their skull on: the brain is found by an extra, or its pip line is named."""

from __future__ import annotations

import csv
import json
import sys
import types

import heads
import nibabel as nib
import numpy as np
import pytest
from chests import dice
from heads import head

from monai_deepgmm import cli
from monai_deepgmm.localisation import brain

BRAIN = head(strip=True) > 0
#: Array axes that run to the left, the front and the feet, in another order than the patient's.
TURNED = np.array([[0, -3.0, 0, 165], [0, 0, 3, 0], [-3, 0, 0, 159], [0, 0, 0, 1]])


@pytest.fixture(autouse=True)
def _fresh():
    brain._finder.cache_clear()
    yield
    brain._finder.cache_clear()


@pytest.fixture
def absent(monkeypatch):
    monkeypatch.setitem(sys.modules, "deepbet", None)


@pytest.fixture
def cohort(tmp_path):
    for patient, image in (("head", head()), ("stripped", head(strip=True))):
        heads.write(tmp_path / "in" / patient, image)
    return tmp_path


def run(command, base, *more):
    options = ["--protocol", "brain", "-q", *more]
    return cli.main([command, str(base / "in"), str(base / "out"), *options])


def rows(base, table="summary.tsv"):
    lines = (base / "out" / table).read_text().splitlines()
    return {row["patient"]: row for row in csv.DictReader(lines, delimiter="\t")}


@pytest.mark.usefixtures("absent")
def test_without_the_extra_a_head_fails_with_its_pip_line_and_a_stripped_brain_needs_none(cohort):
    assert run("mask", cohort, "--mask", "auto") == 1
    found = rows(cohort, "masks.tsv")
    assert found["head"]["code"] == "E_MASK_NONE"
    assert "pip install deepbet" in found["head"]["message"]
    assert "W_MASK_AUTO: T1.nii.gz is stripped already" in found["stripped"]["warnings"]
    written = np.asarray(nib.load(cohort / "out" / "stripped" / "stripped_desc-brain_mask.nii.gz").dataobj)
    assert np.array_equal(written > 0, BRAIN)


def test_the_mask_that_holds_a_head_says_how_to_strip_it(cohort, capsys):
    assert run("segment", cohort, "--mask", "nonzero", "--dry-run") == 1
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("head"))
    assert "E_HEAD" in line
    assert "--mask auto, after pip install deepbet" in line


@pytest.mark.usefixtures("absent")
def test_a_brain_without_a_mask_is_looked_for_unless_a_file_is_asked_for(cohort, capsys):
    assert run("segment", cohort, "--dry-run") == 1
    told = capsys.readouterr().out
    assert told.count("E_MASK_NONE") == 1
    assert "W_MASK_AUTO: T1.nii.gz is stripped already" in told
    assert run("segment", cohort, "--dry-run", "--mask", "file") == 3
    assert capsys.readouterr().out.count("E_MASK_NONE") == 2


class Deepbet:
    """In place of the extra: what is bright enough in a head that stands upright, as the real one wants it."""

    seen: tuple[int, ...] = ()

    def __init__(self, *, no_gpu):
        assert no_gpu

    def run_model(self, image):
        Deepbet.seen = image.shape
        assert image[:, :, :20].sum() < image[:, :, -20:].sum()  # the feet's end of this head is cut off
        return np.where((image > 20) & (image < 140), 0.9, 0.1)

    def postprocess(self, mask):
        return mask.astype(np.float32)


def test_it_is_given_the_head_upright_and_answers_on_the_images_own_grid(monkeypatch):
    monkeypatch.setitem(sys.modules, "deepbet", types.SimpleNamespace(BrainExtraction=Deepbet))
    image = head()
    image[:, :, :18] = 0
    own = image[::-1, :, ::-1].transpose(2, 0, 1)  # as TURNED says
    found = brain.find(own, TURNED)
    assert Deepbet.seen == (56, 56, 54)
    assert np.array_equal(found.mask, (own > 20) & (own < 140))
    assert found.confidence == pytest.approx(0.9)


def test_where_no_brain_is_found_it_is_said(cohort, monkeypatch):
    def nothing(self, image):
        raise AssertionError("Not enough foreground to calculate bounding box")

    monkeypatch.setattr(Deepbet, "run_model", nothing)
    monkeypatch.setitem(sys.modules, "deepbet", types.SimpleNamespace(BrainExtraction=Deepbet))
    assert run("mask", cohort, "--patients", "head") == 3
    assert rows(cohort, "masks.tsv")["head"]["code"] == "E_MASK_UNSURE"


def test_the_extra_strips_a_head_and_its_mask_is_used_again(cohort):
    pytest.importorskip("deepbet", reason="the extra brain-mask is not installed")
    assert run("mask", cohort, "--patients", "head") == 0
    file = cohort / "out" / "head" / "head_desc-brain_mask.nii.gz"
    assert dice(np.asarray(nib.load(file).dataobj) > 0, BRAIN) > 0.88
    told = json.loads(file.with_name("head_desc-brain_mask.json").read_text())
    assert told["inputs"]["mask"]["rule"] == "found by deepbet, on T1"
    assert told["confidence"] > 0.9
    again = ["segment", str(cohort / "in"), str(cohort / "o"), "--protocol", "brain", "--masks", str(cohort / "out")]
    assert cli.main([*again, "--patients", "head", "--dry-run", "-q"]) == 0
