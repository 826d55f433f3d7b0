"""The script that reproduces Ma's tables: whose files it finds, what it makes of them, and what its tables say."""

from __future__ import annotations

import json
from pathlib import Path

import ibsr
import nibabel as nib
import numpy as np
import pytest
import reproduce_ma as script

from monai_deepgmm import protocol
from monai_deepgmm.errors import StudyError
from monai_deepgmm.patients import discovery
from monai_deepgmm.phantom.brain import BrainConfig, write_cohort
from monai_deepgmm.phantom.heart import configured

TINY = {"naming": "ibsr", "shape": [32, 20, 34], "spacing_mm": [1.88, 3.0, 1.88], "shading": 0.2}
#: A block of the three tissues with one unlabelled voxel inside, in 6 × 5 × 7.
LABELS = np.zeros((6, 5, 7), np.int16)
LABELS[1:5, 1:4, 1:6], LABELS[2:4, 1:4, 2:4], LABELS[1, 1, 1:4], LABELS[2, 2, 4] = 2, 3, 1, 0


@pytest.fixture(scope="module")
def brains(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("ibsr")
    write_cohort(root, 3, seed=1, config=configured(BrainConfig, TINY))
    return root


def saved(path: Path, data: np.ndarray, spacing=(1.0, 1.5, 1.0)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(data.astype(np.int16), np.diag([*spacing, 1.0])), path)


@pytest.mark.parametrize(
    ("image", "known"),
    [
        ("IBSR_01.nii.gz", "IBSR_01_seg.nii.gz"),
        ("IBSR_01_ana_strip.nii.gz", "IBSR_01_segTRI_ana.nii.gz"),
        ("IBSR_01_ana.nii", "IBSR_01_segTRI_fill_ana.nii.gz"),
        ("ibsr_01.nii.gz", "ibsr_01_SEG.nii.gz"),
    ],
)
def test_names_of_both_releases(tmp_path, image, known):
    for name in ("IBSR_01_ana_brainmask.nii.gz", "notes.nii.gz", image, known):
        saved(tmp_path / "train" / "IBSR_01" / name, 10 * LABELS if name == image else LABELS)
    saved(tmp_path / "IBSR_01_seg_ana.nii.gz", 20 * LABELS)  # other structures: passed over
    (source,) = ibsr.sources(tmp_path)
    facts = ibsr.load(source).facts
    assert (source.patient, facts["image"], facts["truth"]) == ("IBSR_01", image, known)


def test_what_is_missing_or_does_not_fit_is_named(tmp_path):
    told = {
        r"no label file\. Add IBSR_01_seg\.nii\.gz": {"IBSR_01": LABELS},
        r"no image\. Add IBSR_02\.nii\.gz or IBSR_02_ana_strip": {"IBSR_02_seg": LABELS},
        r"\(5, 5, 7\), but IBSR_03_seg\.nii\.gz \(6, 5, 7\)": {"IBSR_03": LABELS[1:], "IBSR_03_seg": LABELS},
        r"IBSR_04_seg\.nii\.gz holds 4 values up to 60.*1 CSF, 2 GM": {"IBSR_04": LABELS, "IBSR_04_seg": 20 * LABELS},
    }
    for files in told.values():
        for name, data in files.items():
            saved(tmp_path / f"{name}.nii.gz", data)
    for source, message in zip(ibsr.sources(tmp_path), told, strict=True):
        with pytest.raises(StudyError, match=message):
            ibsr.load(source)


@pytest.mark.parametrize("axes", [3, 4])
@pytest.mark.parametrize("skull", [False, True])
def test_recoded_masked_and_turned(tmp_path, skull, axes):
    shape, image = LABELS.shape + (1,) * (axes - 3), np.where(LABELS > 0, 10 * LABELS, 90 if skull else 0)
    saved(tmp_path / "IBSR_01.nii.gz", image.reshape(shape))
    saved(tmp_path / "IBSR_01_seg.nii.gz", LABELS.reshape(shape))
    brain = ibsr.load(ibsr.sources(tmp_path)[0])
    known = {t.name: t.index for t in protocol.load("brain").tissues}
    expected = np.array([0, known["CSF"], known["GM"], known["WM"]])[LABELS].transpose(0, 2, 1)  # 1.5 mm: stacked last
    assert np.array_equal(brain.truth, expected)
    assert np.array_equal(brain.affine, np.array([[1, 0, 0, 0], [0, 0, 1.5, 0], [0, 1, 0, 0], [0, 0, 0, 1]]))
    assert brain.facts["mask"] == (ibsr.FILLED if skull else ibsr.EVERYWHERE)
    assert brain.mask[2, 4, 2] == skull  # the hole is filled where the labels are the mask; it is 0 in the stripped
    assert brain.mask.sum() == (LABELS > 0).sum() + skull


def test_every_nth_slice_lies_where_it_was(tmp_path):
    saved(tmp_path / "IBSR_01.nii.gz", 10 * LABELS, spacing=(1.0, 1.0, 1.5))
    saved(tmp_path / "IBSR_01_seg.nii.gz", LABELS, spacing=(1.0, 1.0, 1.5))
    brain = ibsr.load(ibsr.sources(tmp_path)[0])  # slices 1 to 5 hold brain
    thin = ibsr.thinned(brain, 2)
    assert np.array_equal(thin.truth, brain.truth[..., [2, 4]])
    assert np.array_equal(thin.image, brain.image[..., [2, 4]])
    for new, old in enumerate((2, 4)):
        assert np.allclose(thin.affine @ [3, 1, new, 1], brain.affine @ [3, 1, old, 1])
    assert ibsr.thinned(brain, 100).mask.shape[2] == 1


def test_copies_are_what_the_tool_reads_and_made_once(brains, tmp_path):
    patients, _ = ibsr.prepare(brains, tmp_path, every=4)
    by_slice = protocol.load(tmp_path / "slices" / "protocol.yaml")
    for folder, wanted in ((tmp_path / "data", protocol.load("brain")), (tmp_path / "slices", by_slice)):
        found = discovery.find(folder, wanted, manifest=folder / "manifest.csv")
        assert [s.patient for s in found.studies] == list(patients) == ["IBSR_01", "IBSR_02", "IBSR_03"]
        assert not any(s.problems for s in found.studies)
    source = nib.load(brains / "IBSR_01" / "IBSR_01_seg.nii.gz").get_fdata()
    known = nib.load(tmp_path / "data" / "IBSR_01" / "truth.nii.gz").get_fdata()
    for name, own in ibsr.VALUES.items():
        assert (known == by_slice.tissue(name).index).sum() == (source == own).sum() > 0
    copy = tmp_path / "data" / "IBSR_01" / "image.nii.gz"
    before = copy.stat().st_mtime_ns
    assert ibsr.prepare(brains, tmp_path, every=4)[0] == patients
    assert copy.stat().st_mtime_ns == before
    ibsr.prepare(brains, tmp_path, every=5)
    assert copy.stat().st_mtime_ns > before


def test_who_cannot_be_used_is_told(tmp_path, capsys):
    for name in ("IBSR_01", "IBSR_01_seg", "IBSR_02"):
        saved(tmp_path / "in" / f"{name}.nii.gz", LABELS)
    assert script.main([str(tmp_path / "in"), str(tmp_path / "out")]) == 2
    told = capsys.readouterr().err
    assert "at least 2 are needed (IBSR_02: E_TRUTH: there is no label file. Add IBSR_02_seg.nii.gz" in told
    with pytest.raises(SystemExit):
        script.main([str(tmp_path), str(tmp_path / "out")])
    assert "OUT must not lie in DATA" in capsys.readouterr().err


def test_the_two_losses_differ_in_beta_alone(tmp_path):
    options = script.parse([str(tmp_path / "in"), str(tmp_path / "out"), "--networks", "unet", "--ratios", "1/2"])
    plain, total = script.semi_supervised(options, script.Split(("a", "b"), ("c",)))
    both = [[w.replace("_ce_", "_total_") for w in line.trained[0].command] for line in (plain, total)]
    assert [w for w in both[0] if w not in both[1]] == ["beta=0"]
    assert both[0][both[0].index("--labels") + 1] == "1/2"
    assert both[0][both[0].index("--patients") + 1 :][:2] == ["a", "b"]
    assert plain.runs[0].command[-4:] == ("--patients", "c", "--device", "cpu")


@pytest.mark.slow
def test_all_tables_of_tiny_brains(brains, tmp_path, monkeypatch, capsys):
    def in_this_process(ledger, stages, jobs):  # what a new one would import takes longer than the training
        for stage in stages:
            script.runner.run(ledger, stage, 1)

    monkeypatch.setattr(script.runner, "run_apart", in_this_process)
    arguments = [str(brains), str(tmp_path / "out"), "--epochs", "1", "--filters", "4", "8", "--jobs", "1", "--only"]
    assert script.main([*arguments, "unsupervised"]) == 0
    found = json.loads((tmp_path / "out" / "tables.json").read_text())
    rows = {r["name"]: r for r in found["unsupervised"]}
    assert list(rows) == [*script.TABLE5, "brain default, no bias field", "brain default"]
    assert {r["n"] for r in rows.values()} == {3}
    assert all(np.mean(list(rows["brain default"]["values"][t]["F1"].values())) > 0.5 for t in ("GM", "WM"))
    few = ("--networks", "modifiedunet", "--ratios", "1/2")
    assert script.main([*arguments, "semi", *few]) == 0
    both = json.loads((tmp_path / "out" / "tables.json").read_text())
    assert both["unsupervised"] == found["unsupervised"]  # an earlier run's
    assert both["split"] == {"train": ["IBSR_01", "IBSR_02"], "test": ["IBSR_03"]}
    assert [r["key"] for r in both["semi"]] == [[script.CE, "1/2"], [script.TOTAL, "1/2"]]
    assert all(list(r["values"]["GM"]["recall"]) == ["IBSR_03"] for r in both["semi"])
    page = (tmp_path / "out" / "tables.md").read_text()
    assert "3 volumes; voxels: [32, 20, 34] (3); brain mask: voxels above 0 (3)" in page
    assert (page.count("| paper |"), page.count("| Our method |")) == (7, 1)  # the paper's IoU is of a quarter alone
    assert str(tmp_path) not in page
    capsys.readouterr()
    assert script.main([*arguments, "unsupervised"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 2  # who, and where to look
