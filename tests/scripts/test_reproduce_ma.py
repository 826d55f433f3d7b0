"""The script that reproduces Ma's tables: whose files it finds, what it makes of them, and what its tables say."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import nibabel as nib
import numpy as np
import pytest

from monai_deepgmm import protocol
from monai_deepgmm.errors import StudyError, UsageError
from monai_deepgmm.images import cropping as transforms
from monai_deepgmm.images import nifti
from monai_deepgmm.patients import discovery as cohort
from monai_deepgmm.phantom.brain import BrainConfig, write_cohort
from monai_deepgmm.phantom.heart import configured

SCRIPTS = Path(__file__).parents[2] / "scripts"
TINY = {"naming": "ibsr", "shape": [32, 20, 34], "spacing_mm": [1.88, 3.0, 1.88], "shading": 0.2}


@pytest.fixture(scope="module")
def script() -> ModuleType:
    sys.path.insert(0, str(SCRIPTS))  # as Python has it for a script: its neighbour is imported from there
    spec = importlib.util.spec_from_file_location("reproduce_ma", SCRIPTS / "reproduce_ma.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["reproduce_ma"] = module
    spec.loader.exec_module(module)
    sys.path.remove(str(SCRIPTS))
    return module


@pytest.fixture(scope="module")
def brains(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("ibsr")
    write_cohort(root, 3, seed=1, config=configured(BrainConfig, TINY))
    return root


def saved(path: Path, data: np.ndarray, spacing=(1.0, 1.5, 1.0)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(data, np.diag([*spacing, 1.0])), path)
    return path


def head(labels: np.ndarray, *, skull: bool) -> np.ndarray:
    """Intensities 10 times the label, 5 in unlabelled brain; with a skull, 90 in all the rest."""
    return np.where(labels > 0, 10 * labels, 90 if skull else 0).astype(np.int16)


@pytest.fixture
def labels() -> np.ndarray:
    """A block of the three tissues with one unlabelled voxel inside, in 6 × 5 × 7."""
    made = np.zeros((6, 5, 7), np.int16)
    made[1:5, 1:4, 1:6] = 2
    made[2:4, 1:4, 2:4] = 3
    made[1, 1, 1:4] = 1
    made[2, 2, 4] = 0
    return made


# Which files ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("image", "truth"),
    [
        ("IBSR_01.nii.gz", "IBSR_01_seg.nii.gz"),
        ("IBSR_01_ana_strip.nii.gz", "IBSR_01_segTRI_ana.nii.gz"),
        ("IBSR_01_ana.nii", "IBSR_01_segTRI_fill_ana.nii.gz"),
        ("ibsr_01.nii.gz", "ibsr_01_SEG.nii.gz"),
    ],
)
def test_names_of_both_releases(script, labels, tmp_path, image, truth):
    saved(tmp_path / "train" / "IBSR_01" / image, head(labels, skull=False)[..., None])
    saved(tmp_path / "train" / "IBSR_01" / truth, labels[..., None])
    (source,) = script.sources(tmp_path)
    brain = script.load(source)
    assert source.patient == "IBSR_01"
    assert (brain.facts["image"], brain.facts["truth"]) == (image, truth)


def test_the_best_name_wins_and_strangers_are_passed_over(script, labels, tmp_path):
    for end in ("_ana", "_ana_strip", "", "_ana_brainmask", "_seg", "_segTRI_ana"):
        saved(tmp_path / f"IBSR_07{end}.nii.gz", labels)
    saved(tmp_path / "notes.nii.gz", labels)
    (source,) = script.sources(tmp_path)
    assert [p.name for p in source.images] == [f"IBSR_07{e}.nii.gz" for e in ("", "_ana_strip", "_ana")]
    assert [p.name for p in source.truths] == ["IBSR_07_seg.nii.gz", "IBSR_07_segTRI_ana.nii.gz"]


def test_the_same_file_twice_is_refused(script, labels, tmp_path):
    for folder in "ab":
        saved(tmp_path / folder / "IBSR_02.nii.gz", labels)
    with pytest.raises(UsageError, match=r"IBSR_02: a/IBSR_02\.nii\.gz and b/IBSR_02\.nii\.gz are the same file twice"):
        script.sources(tmp_path)


def test_nobody(script, tmp_path):
    saved(tmp_path / "a.nii.gz", np.zeros((2, 2, 2), np.int16))
    with pytest.raises(UsageError, match=r"no file in .* is called like IBSR_01"):
        script.sources(tmp_path)
    with pytest.raises(UsageError, match="there is no folder"):
        script.sources(tmp_path / "none")


def test_labels_of_other_structures_are_no_truth(script, labels, tmp_path):
    saved(tmp_path / "IBSR_01.nii.gz", head(labels, skull=False))
    saved(tmp_path / "IBSR_01_seg_ana.nii.gz", 20 * labels)
    with pytest.raises(StudyError, match=r"IBSR_01_seg_ana\.nii\.gz holds 4 values up to 60.*1 CSF, 2 GM, 3 WM"):
        script.load(script.sources(tmp_path)[0])
    saved(tmp_path / "IBSR_01_segTRI_ana.nii.gz", labels)
    assert script.load(script.sources(tmp_path)[0]).facts["truth"] == "IBSR_01_segTRI_ana.nii.gz"


def test_a_missing_file_is_named(script, labels, tmp_path):
    saved(tmp_path / "IBSR_01.nii.gz", head(labels, skull=False))
    with pytest.raises(StudyError, match=r"no label file\. Add IBSR_01_seg\.nii\.gz"):
        script.load(script.sources(tmp_path)[0])
    saved(tmp_path / "IBSR_02_seg.nii.gz", labels)
    with pytest.raises(StudyError, match=r"no image\. Add IBSR_02\.nii\.gz or IBSR_02_ana_strip"):
        script.load(script.sources(tmp_path)[1])


def test_other_shapes_are_refused(script, labels, tmp_path):
    saved(tmp_path / "IBSR_01.nii.gz", head(labels, skull=False)[1:])
    saved(tmp_path / "IBSR_01_seg.nii.gz", labels)
    with pytest.raises(StudyError, match=r"\(5, 5, 7\), but IBSR_01_seg\.nii\.gz \(6, 5, 7\)"):
        script.load(script.sources(tmp_path)[0])


# What becomes of them ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("axes", [3, 4])
@pytest.mark.parametrize("skull", [False, True])
def test_recoded_masked_and_turned(script, labels, tmp_path, skull, axes):
    shape = labels.shape + (1,) * (axes - 3)
    saved(tmp_path / "IBSR_01.nii.gz", head(labels, skull=skull).reshape(shape))
    saved(tmp_path / "IBSR_01_seg.nii.gz", labels.reshape(shape))
    brain = script.load(script.sources(tmp_path)[0])
    known = {t.name: t.index for t in protocol.load("brain").tissues}
    expected = np.array([0, known["CSF"], known["GM"], known["WM"]])[labels].transpose(0, 2, 1)  # 1.5 mm: stacked last
    assert np.array_equal(brain.truth, expected)
    assert np.array_equal(brain.affine, np.array([[1, 0, 0, 0], [0, 0, 1.5, 0], [0, 1, 0, 0], [0, 0, 0, 1]]))
    assert brain.facts["mask"] == (script.FILLED if skull else script.EVERYWHERE)
    assert brain.mask[2, 4, 2] == skull  # the hole is filled where the labels are the mask; it is 0 in the stripped
    assert brain.mask.sum() == (labels > 0).sum() + skull


def test_every_nth_slice_lies_where_it_was(script, labels, tmp_path):
    saved(tmp_path / "IBSR_01.nii.gz", head(labels, skull=False), spacing=(1.0, 1.0, 1.5))
    saved(tmp_path / "IBSR_01_seg.nii.gz", labels, spacing=(1.0, 1.0, 1.5))
    brain = script.load(script.sources(tmp_path)[0])  # slices 1 to 5 hold brain
    thin = script.thinned(brain, 2)
    assert np.array_equal(thin.truth, brain.truth[..., [2, 4]])
    assert np.array_equal(thin.image, brain.image[..., [2, 4]])
    for new, old in enumerate((2, 4)):
        assert np.allclose(thin.affine @ [3, 1, new, 1], brain.affine @ [3, 1, old, 1])
    assert script.thinned(brain, 100).mask.shape[2] == 1


def test_copies_are_what_the_tool_reads(script, brains, tmp_path):
    patients, _ = script.prepare(brains, tmp_path, every=4)
    assert list(patients) == ["IBSR_01", "IBSR_02", "IBSR_03"]
    by_slice = protocol.load(tmp_path / "slices" / "protocol.yaml")
    assert (by_slice.name, by_slice.unit) == ("brain-slices", "slice")
    for folder, wanted in ((tmp_path / "data", protocol.load("brain")), (tmp_path / "slices", by_slice)):
        found = cohort.find(folder, wanted, manifest=folder / "manifest.csv")
        assert [s.patient for s in found.studies] == list(patients)
        assert not any(s.problems for s in found.studies)
        image = nifti.read(found.studies[0].images["T1"])
        assert transforms.slice_axis(image.spacing_mm) == 2
    source = nib.load(brains / "IBSR_01" / "IBSR_01_seg.nii.gz").get_fdata()[..., 0]
    truth = nifti.read(tmp_path / "data" / "IBSR_01" / "truth.nii.gz").data
    for own, name in ((1, "CSF"), (2, "GM"), (3, "WM")):
        assert (truth == by_slice.tissue(name).index).sum() == (source == own).sum() > 0


def test_copies_are_made_once(script, brains, tmp_path):
    first, _ = script.prepare(brains, tmp_path, every=4)
    copy = tmp_path / "data" / "IBSR_01" / "image.nii.gz"
    before = copy.stat().st_mtime_ns
    assert script.prepare(brains, tmp_path, every=4)[0] == first
    assert copy.stat().st_mtime_ns == before
    script.prepare(brains, tmp_path, every=5)
    assert copy.stat().st_mtime_ns > before


def test_who_cannot_be_used_is_told(script, labels, tmp_path, capsys):
    saved(tmp_path / "in" / "IBSR_01.nii.gz", head(labels, skull=False))
    saved(tmp_path / "in" / "IBSR_01_seg.nii.gz", labels)
    saved(tmp_path / "in" / "IBSR_02.nii.gz", head(labels, skull=False))
    assert script.main([str(tmp_path / "in"), str(tmp_path / "out")]) == 2
    told = capsys.readouterr().err
    assert "at least 2 are needed (IBSR_02: E_TRUTH: there is no label file. Add IBSR_02_seg.nii.gz" in told


def test_out_must_not_lie_in_data(script, brains, capsys):
    with pytest.raises(SystemExit):
        script.main([str(brains), str(brains / "out")])
    assert "OUT must not lie in DATA" in capsys.readouterr().err


@pytest.mark.parametrize(("n", "tested"), [(2, [2]), (3, [3]), (6, [3, 6]), (18, [3, 6, 9, 12, 15, 18])])
def test_the_split(script, n, tested):
    who = script.split([str(i) for i in range(1, n + 1)])
    assert who.test == tuple(map(str, tested))
    assert sorted((*who.train, *who.test), key=int) == [str(i) for i in range(1, n + 1)]


# Figures and tables --------------------------------------------------------------------------------------------------


def test_agreement_is_counted_where_labels_are(script):
    truth = np.array([1, 1, 1, 1, 2, 2, 3, 0, 0])
    found = np.array([1, 1, 2, 2, 2, 2, 3, 1, 3])
    scores = script.agreement(found, truth, {"GM": 1, "WM": 2, "CSF": 3})
    assert scores["GM"] == pytest.approx((1.0, 0.5, 2 / 3, 0.5))
    assert scores["WM"] == pytest.approx((0.5, 1.0, 2 / 3, 0.5))
    assert scores["CSF"] == (1.0, 1.0, 1.0, 1.0)


def test_published_figures_fit_together(script):
    """Jaccard follows from Dice to what a mean over volumes leaves of it, and recall grows with the labels."""
    for tissues in script.TABLE5.values():
        for _, _, f1, js in tissues.values():
            assert js == pytest.approx(100 * f1 / (200 - f1), abs=2.0)
    for loss in (script.CE, script.TOTAL):
        by_ratio = [script.TABLE1[loss, ratio] for ratio in script.RATIOS]
        assert all(np.diff(column).min() > 0 for column in zip(*by_ratio, strict=True))
        assert set(script.TABLE3[loss]) == set(script.PAPERS)
    for ratio in script.RATIOS:
        pairs = zip(script.TABLE1[script.CE, ratio], script.TABLE1[script.TOTAL, ratio], strict=True)
        assert all(with_gmm > without for without, with_gmm in pairs)


def ours(name: str, key: list[str], recall: float | None) -> dict:
    """A row with the same value for every tissue and measure of the patient a, and one more for b."""
    values = {"a": recall, "b": None if recall is None else recall + 0.2}
    table = {t: dict.fromkeys(("precision", "recall", "F1", "JS"), values) for t in ("CSF", "GM", "WM")}
    return {"name": name, "key": key, "n": 2, "values": table, "cpu_seconds": [61.0]}


def test_table5_has_the_papers_figures_below_ours(script):
    lines = list(script.table5([ours("GMM", ["GMM"], 0.5), ours("brain default", [], None)]))
    assert lines[1][:4] == ("**GMM**", "GM", "ours", "0.600 ± 0.141")
    assert lines[2][2:7] == ("paper", "0.809", "0.526", "0.634", "0.469")
    assert lines[5] == ("**brain default**", "GM", "ours", "–", "–", "–", "–", "2", "61")
    assert len(lines) == 7


def test_tables_of_few_labels(script):
    rows = [
        ours(n, [loss, "1/4"], r)
        for n, r in (("modifiedunet", 0.5), ("mine", 0.6))
        for loss in (script.CE, script.TOTAL)
    ]
    rows[1] = ours("modifiedunet", [script.TOTAL, "1/4"], 0.52)
    first = list(script.table1(rows))
    assert first[1] == ("**modifiedunet**", "1/4", "ours", "0.600", "0.620", "+0.020", "61 / 61")
    assert first[2] == ("Our method", "", "paper", "0.936", "0.936", "+0.000", "")
    assert first[3][:2] == ("**mine**", "1/4")
    assert len(first) == 4
    third = list(script.table3(rows))
    assert third[2] == ("Our method", "", "", "paper", "0.816", "0.932", "0.906", "")
    assert [line[3] for line in third[1:]] == ["ours", "paper", "ours", "paper", "ours", "ours"]


def test_the_two_losses_differ_in_beta_alone(script, tmp_path):
    options = script.parse([str(tmp_path / "in"), str(tmp_path / "out"), "--networks", "unet", "--ratios", "1/2"])
    plain, total = script.semi_supervised(options, script.Split(("a", "b"), ("c",)))
    both = [[w.replace("_ce_", "_total_") for w in line.trained[0].command] for line in (plain, total)]
    assert [w for w in both[0] if w not in both[1]] == ["beta=0"]
    assert both[0][both[0].index("--labels") + 1] == "1/2"
    assert both[0][both[0].index("--patients") + 1 :][:2] == ["a", "b"]
    assert plain.runs[0].command[-4:] == ("--patients", "c", "--device", "cpu")
    assert plain.runs[0].needs == (plain.trained[0].makes,)


# The whole -----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_all_tables_of_tiny_brains(script, brains, tmp_path, monkeypatch, capsys):
    # In this process: what a new one would import takes longer than the training.
    monkeypatch.setattr(script, "run_apart", lambda ledger, stages, jobs: [script.run(ledger, s, 1) for s in stages])
    arguments = [str(brains), str(tmp_path / "out"), "--only", "unsupervised", "--epochs", "1", "--every", "8"]
    arguments += ["--filters", "4", "8", "--jobs", "1"]
    assert script.main(arguments) == 0
    found = json.loads((tmp_path / "out" / "tables.json").read_text())
    assert "semi" not in found
    rows = {r["name"]: r for r in found["unsupervised"]}
    assert list(rows) == [*script.TABLE5, "brain default, no bias field", "brain default"]
    assert {r["n"] for r in rows.values()} == {3}
    assert all(np.mean(list(rows["brain default"]["values"][t]["F1"].values())) > 0.5 for t in ("GM", "WM"))
    page = (tmp_path / "out" / "tables.md").read_text()
    assert "3 volumes; voxels: [32, 20, 34] (3); brain mask: voxels above 0 (3)" in page
    assert str(tmp_path) not in page
    assert page.count("| paper |") == 6
    few = ["--only", "semi", "--networks", "modifiedunet", "--ratios", "1/2", *arguments[4:]]
    assert script.main([*arguments[:2], *few]) == 0
    both = json.loads((tmp_path / "out" / "tables.json").read_text())
    assert both["unsupervised"] == found["unsupervised"]  # an earlier run's
    assert both["split"] == {"train": ["IBSR_01", "IBSR_02"], "test": ["IBSR_03"]}
    assert [r["key"] for r in both["semi"]] == [[script.CE, "1/2"], [script.TOTAL, "1/2"]]
    assert all(list(r["values"]["GM"]["recall"]) == ["IBSR_03"] for r in both["semi"])
    model = tmp_path / "out" / "models" / "modifiedunet_1of2_ce_seed0"
    assert len(json.loads((model / "provenance.json").read_text())["labels"]) == 1
    page = (tmp_path / "out" / "tables.md").read_text()
    assert page.count("| Our method |") == 1  # the paper's IoU is of a quarter alone

    capsys.readouterr()
    assert script.main(arguments) == 0
    assert len(capsys.readouterr().out.splitlines()) == 2  # who, and where to look
