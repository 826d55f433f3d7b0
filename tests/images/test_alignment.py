"""Sequences that lie apart are brought together, once and on record; those that agree stay, bit by bit."""

from __future__ import annotations

import csv
import re

import nibabel as nib
import numpy as np
import pytest
from chests import SEQUENCES, SPACING, body, dice
from rings import turned
from scenes import contents, labels, sidecar
from scipy.ndimage import shift

from monai_deepgmm import cli, protocol
from monai_deepgmm.images import alignment, grid
from monai_deepgmm.images import volume as volumes
from monai_deepgmm.images.volume import Volume

INFARCT = protocol.load("infarct")
PLANTED_MM = np.array([[5.0, -3.0], [-2.1, 6.4]])


@pytest.fixture(scope="module")
def chest():
    return body(slices=2)


def apart(sequence):
    planes = [shift(sequence[..., z], mm / SPACING[:2], order=3, mode="nearest") for z, mm in enumerate(PLANTED_MM)]
    return np.stack(planes, 2)


def volume(data, affine):
    return Volume(data.astype(np.float32), affine, nib.Nifti1Header(), data.shape, "x.nii", "")


def together(sources, mask, align="auto"):
    reference = next(iter(sources.values()))
    placed = {s: grid.on_grid(one, reference, nearest=False) for s, one in sources.items()}
    return placed, alignment.bring_together(sources, placed, mask, INFARCT, align)


@pytest.mark.parametrize("axis", [2, 0])
def test_moved_slices_are_told_in_mm_of_the_patient_and_the_rest_stays(chest, axis):
    image, mask = chest
    affine, order = turned(SPACING, (25.0, -40.0)), np.roll(range(3), 0 if axis == 2 else 1)
    affine[:, :3] = affine[:, :3][:, order]
    data = [one.transpose(order) for one in (image[0], apart(image[1]), image[2])]
    sources = {s: volume(one, affine) for s, one in zip(SEQUENCES, data, strict=True)}
    placed, found = together(sources, mask.transpose(order))
    assert found.placed["LGE"] is placed["LGE"]
    assert found.placed["bSSFP"] is placed["bSSFP"]
    told = found.facts["sequences"]
    assert (told["T2"]["moved"], told["bSSFP"]["moved"]) == (True, False)
    plane = turned(SPACING, (25.0, -40.0))[:3, :2] / SPACING[:2]
    for z, mm in enumerate(PLANTED_MM):
        one = told["T2"]["slices"][str(z)]
        np.testing.assert_allclose(one["back_mm"], -plane @ mm, atol=SPACING[0])
        assert one["after"] > one["before"] + 0.1
    inner = mask.transpose(order)
    there = image[1].transpose(order)
    before, after = (np.abs(p["T2"].data - there)[inner].mean() for p in (placed, found.placed))
    assert after < before / 2
    assert re.match(r"W_ALIGNED: T2 was moved to LGE by up to \d\.\d mm in slice 0, 1; check", found.notes[0])


def test_what_is_moved_is_looked_up_in_the_file_and_not_twice(chest, monkeypatch):
    image, mask = chest
    affine = np.diag([*SPACING, 1.0])
    finer = np.diag([0.8, 0.8, SPACING[2], 1.0])
    sources = {"LGE": volume(image[0], affine)}
    on_fine = np.stack([np.kron(plane, np.ones((2, 2))) for plane in apart(image[1]).transpose(2, 0, 1)], 2)
    finer[:3, 3] = [-0.4, -0.4, 0]
    sources["T2"] = volume(on_fine, finer)
    placed = {s: grid.on_grid(one, sources["LGE"], nearest=False) for s, one in sources.items()}
    read, real = [], volumes.resample
    monkeypatch.setattr(volumes, "resample", lambda one, like: read.append(one) or real(one, like))
    found = alignment.bring_together(sources, placed, mask, INFARCT, "auto")
    assert found.facts["sequences"]["T2"]["moved"]
    assert len(read) == 2
    assert all(one is sources["T2"] for one in read)


def test_what_moves_out_of_view_was_not_measured(chest):
    image, mask = chest
    cut = {"LGE": volume(image[0], np.diag([*SPACING, 1.0])), "T2": volume(apart(image[1]), np.diag([*SPACING, 1.0]))}
    _, found = together(cut, mask)
    inside = found.placed["T2"].inside
    assert not inside.all()
    assert inside[mask].all()


def test_off_and_brains_and_one_sequence_alone_are_left(chest):
    image, mask = chest
    sources = {s: volume(one, np.diag([*SPACING, 1.0])) for s, one in zip(SEQUENCES, image, strict=True)}
    for chosen, wanted, align in (
        (sources, INFARCT, "off"),
        ({"LGE": sources["LGE"]}, INFARCT, "auto"),
        (sources, protocol.load("brain"), "auto"),
    ):
        placed = {s: grid.on_grid(one, sources["LGE"], nearest=False) for s, one in chosen.items()}
        found = alignment.bring_together(chosen, placed, mask, wanted, align)
        assert found == (placed, None, ())


def test_a_whole_brain_is_moved_on_demand():
    rng = np.random.default_rng(0)
    x, y, z = np.meshgrid(*(np.linspace(-1, 1, n) for n in (40, 40, 32)), indexing="ij")
    mask = x**2 + y**2 + z**2 < 0.5
    first = np.where(mask, 100 + 60 * np.sin(7 * x) * np.cos(6 * y + 2 * z), 0) + rng.normal(0, 2, mask.shape)
    affine = np.diag([2.5, 2.5, 3.0, 1.0])
    there = affine.copy()
    there[:3, 3] = [5.0, -4.0, 3.0]
    sources = {"T1": volume(first, affine), "T2": volume(mask * 250 - first, there)}
    placed = {s: grid.on_grid(one, sources["T1"], nearest=False) for s, one in sources.items()}
    found = alignment.bring_together(sources, placed, mask, protocol.load("brain"), "rigid")
    matrix = np.array(found.facts["sequences"]["T2"]["stack"]["matrix"])
    np.testing.assert_allclose(matrix[:3, 3], [5, -4, 3], atol=1.0)
    error = np.abs(found.placed["T2"].data - sources["T2"].data)[mask].mean()
    assert error < np.abs(placed["T2"].data - sources["T2"].data)[mask].mean() / 3
    assert found.notes[0].startswith("W_ALIGNED: T2 was moved to T1 as a whole, by 7.")


# Through the command -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def cohort(chest, tmp_path_factory):
    """One patient whose sequences agree, and the same with T2 and bSSFP apart."""
    base, (image, mask) = tmp_path_factory.mktemp("apart"), chest
    for patient, data in (
        ("agree", image),
        ("apart", [image[0], apart(image[1]), apart(image[2][..., ::-1])[..., ::-1]]),
    ):
        (base / "in" / patient).mkdir(parents=True)
        for name, one in zip((*SEQUENCES, "mask"), (*data, mask), strict=True):
            saved = nib.Nifti1Image(np.rint(one).astype(np.int16), np.diag([*SPACING, 1]))
            nib.save(saved, base / "in" / patient / f"{name}.nii.gz")
    for align in ("auto", "off"):
        assert run(base, align) == cli.OK
    return base


def run(base, align, *more):
    out = base / align
    return cli.main(["segment", str(base / "in"), str(out), "--method", "gmm", "--align", align, "-q", *more])


def test_aligned_sequences_give_the_labels_of_those_that_agree(cohort):
    wanted, auto, off = (
        labels(cohort / "off", "agree"),
        labels(cohort / "auto", "apart"),
        labels(cohort / "off", "apart"),
    )
    assert np.array_equal(labels(cohort / "auto", "agree"), wanted)
    blood = INFARCT.tissue("blood").index
    assert dice(auto == blood, wanted == blood) > 0.95 > dice(off == blood, wanted == blood)


def test_it_stands_in_sidecar_table_and_page(cohort):
    told = sidecar(cohort / "auto", "apart")
    assert told["configuration"]["preprocessing"]["align"] == "auto"
    assert told["inputs"]["T2"]["resampled"]
    assert all(one["moved"] for one in told["alignment"]["sequences"]["T2"]["slices"].values())
    assert sidecar(cohort / "off", "apart")["alignment"] is None
    rows = {r["patient"]: r for r in csv.DictReader((cohort / "auto" / "summary.tsv").open(), delimiter="\t")}
    assert "W_ALIGNED: T2 was moved to LGE" in rows["apart"]["warnings"]
    assert "W_ALIGNED" not in rows["agree"]["warnings"]
    page = (cohort / "auto" / "apart" / "apart_report.html").read_text()
    assert page.count("<tr><td>bSSFP</td>") == 2
    agree = (cohort / "auto" / "agree" / "agree_report.html").read_text()
    assert "T2, bSSFP: left where they are" in agree
    assert 'id="alignment"' not in (cohort / "off" / "apart" / "apart_report.html").read_text()


def test_a_resumed_run_leaves_what_was_aligned_so(cohort):
    kept = contents(cohort / "auto" / "apart")
    assert run(cohort, "auto") == cli.OK
    assert contents(cohort / "auto" / "apart") == kept


def test_off_in_a_file_of_options_is_the_word(cohort, tmp_path, capsys):
    (tmp_path / "own.yaml").write_text("align: off\nmethod: gmm\ndry_run: true\n")
    assert (
        cli.main(["segment", str(cohort / "in"), str(cohort / "off"), "--config", str(tmp_path / "own.yaml")]) == cli.OK
    )
    assert "agree\tdone" in capsys.readouterr().out
    assert cli.main(["segment", str(cohort / "in"), str(cohort / "off"), "--method", "gmm", "--dry-run"]) == cli.OK
    assert "agree\tready" in capsys.readouterr().out
