"""Where a sequence was not measured it is no evidence, through the command: its slices are segmented without it."""

from __future__ import annotations

import csv
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from conftest import AFFINE, save
from outcomes import labels_of, row, sidecar

from monai_deepgmm.cli import main

SHAPE = (48, 48, 4)


@pytest.fixture(scope="module")
def out(tmp_path_factory, make_patient) -> Path:
    """One heart in several states: whole; T2 blank, or cut off, in slice 0; T2 in half of each slice; slice 3 blank."""
    folder = tmp_path_factory.mktemp("parts")

    def changed(patient: str, **change) -> None:
        files = make_patient(folder / "in", patient, seed=4, shape=SHAPE)
        for what, bend in change.items():
            save(files[what], *bend(np.asanyarray(nib.load(files[what]).dataobj).copy()))

    def blank(which: int, value: int = 0):
        def bend(data):
            data[..., which] = value
            return data, AFFINE

        return bend

    changed("whole")
    changed("blank", T2=blank(0))
    changed("cut", T2=lambda data: (data[..., 1:], AFFINE @ shift(0, 0, 1)))
    changed("half", T2=lambda data: (data[22:], AFFINE @ shift(22, 0, 0)))
    changed("nothing", **{what: blank(3, 7) for what in ("LGE", "T2", "C0")})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("monai_deepgmm.results.report.preview", lambda segmentation: b"no picture")
        assert main(["segment", str(folder / "in"), str(folder / "out")]) == 0
    return folder / "out"


def shift(*voxels: int):
    matrix = np.eye(4)
    matrix[:3, 3] = voxels
    return matrix


def warnings(out: Path, patient: str) -> str:
    return " | ".join(row(out, patient)["warnings"])


def percent(out: Path, patient: str, tissue: str) -> float:
    with (out / "measurements.tsv").open(encoding="utf-8") as file:
        rows = csv.DictReader(file, delimiter="\t")
        return next(float(r["percent"]) for r in rows if (r["patient"], r["tissue"]) == (patient, tissue))


def test_a_patient_whose_sequences_cover_the_mask_is_told_nothing(out):
    assert "W_COVERAGE" not in warnings(out, "whole")
    assert sidecar(out, "whole")["coverage"]["sequences"] is None


@pytest.mark.parametrize("patient", ["blank", "cut"])
def test_a_slice_that_t2_lacks_has_no_edema_and_the_others_are_as_before(out, patient):
    assert "T2 covers 75.0 % of the mask (no data in slice 0)" in warnings(out, patient)
    assert sidecar(out, patient)["coverage"]["sequences"]["T2"] == {"share": 0.75, "slices": {"0": 0.0}}
    assert sidecar(out, patient)["coverage"]["sequences"]["LGE"] == {"share": 1.0, "slices": {}}
    labels, whole = labels_of(out, patient), labels_of(out, "whole")
    assert (whole[..., 0] == 3).any()
    assert not (labels[..., 0] == 3).any()
    assert ((labels > 0) == (whole > 0)).all()
    assert (labels[..., 1:] == whole[..., 1:])[whole[..., 1:] > 0].mean() > 0.95


def test_percentages_are_of_what_the_tissues_sequences_covered(out):
    labels = labels_of(out, "blank")
    wall = (labels[..., 1:] > 1).sum()
    assert percent(out, "blank", "edema") == pytest.approx(100 * (labels == 3).sum() / wall, abs=1e-3)
    assert percent(out, "blank", "scar") == pytest.approx(100 * (labels == 4).sum() / (labels > 1).sum(), abs=1e-3)


def test_beyond_its_field_of_view_t2_shows_no_edema_within_a_slice(out):
    assert "a part of slice 0 to 3" in warnings(out, "half")
    assert "W_RESAMPLED" in warnings(out, "half")
    labels, whole = labels_of(out, "half"), labels_of(out, "whole")
    assert not (labels[:22] == 3).any()
    assert ((labels > 0) == (whole > 0)).all()
    edema = [(one[22:] == 3).sum() for one in (labels, whole)]
    assert edema[0] == pytest.approx(edema[1], rel=0.1)


def test_a_slice_without_any_data_gets_no_label(out):
    assert "no sequence has data in slice 3" in warnings(out, "nothing")
    labels = labels_of(out, "nothing")
    assert not labels[..., 3].any()
    assert all(labels[..., k].any() for k in range(3))
