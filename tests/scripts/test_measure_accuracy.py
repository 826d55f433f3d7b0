"""The script that measures accuracy: thresholds, tables and figures by hand, and a run over sets made by hand."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import measure_accuracy as script
import nibabel as nib
import numpy as np
import pytest
from conftest import heart, save
from measure_sets import brains, hearts

from monai_deepgmm import protocol
from monai_deepgmm.patients import discovery
from monai_deepgmm.results import thresholds

SHAPE = (48, 48, 2)
#: The heart as the protocol's labels.
INDICES = np.select([heart(SHAPE) == value for value in (500, 200, 1220, 2221)], [1, 2, 3, 4]).astype(np.uint8)
SECOND = np.arange(2) == 1
WALL, SCAR = (INDICES[:, :, 1] > 1).sum(), (INDICES[:, :, 1] == 4).sum()
#: Ours misses the scar of the second slice.
HALF = np.where((INDICES == 4) & SECOND, 2, INDICES).astype(np.uint8)
#: GM 1, WM 2 and CSF 3, ten voxels each.
BRAIN = np.repeat([1, 2, 3], 10).reshape(5, 3, 2)


def paint(out: Path, patient: str, labels: np.ndarray, sequences: Sequence[str] = ("LGE", "T2", "bSSFP")) -> None:
    (out / patient).mkdir(parents=True)
    save(out / patient / f"{patient}_dseg.nii.gz", labels)
    content = {"sequences": list(sequences), "slice_axis": 2}
    (out / patient / f"{patient}_dseg.json").write_text(json.dumps(content))


def cells(text: str) -> dict[str, list[str]]:
    """First column → the others."""
    lines = [[c.strip() for c in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("|")]
    return {line[0]: line[1:] for line in lines}


def replaced(path: Path, data: np.ndarray) -> None:
    path.unlink()
    save(path, data)


def test_thresholds_by_hand():
    values = np.array([0.0, 2.0, 4.0, 6.0, 20.0, 21.0])
    assert thresholds.fwhm(values) == 10.5
    for n in (2, 3, 5, 6):
        assert thresholds.THRESHOLDS[f"{n}SD"](values) == pytest.approx(2 + n * np.sqrt(8 / 3))  # of 0, 2 and 4
    assert thresholds.otsu(values) == 6
    assert thresholds.otsu(np.full(5, 3.0)) == 3


@pytest.mark.parametrize("seed", range(5))
def test_otsu_parts_as_the_least_variance_within_does(seed):
    values = np.random.default_rng(seed).integers(0, 30, 40).astype(float)
    parts = {t: (values[values <= t], values[values > t]) for t in np.unique(values)[:-1]}
    within = {t: sum(part.var() * part.size for part in two) for t, two in parts.items()}
    assert within[thresholds.otsu(values)] == pytest.approx(min(within.values()))


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_thresholds_are_taken_slice_by_slice_and_within_the_wall(axis):
    image, wall, expected = np.zeros((2, 2, 4)), np.ones((2, 2, 4), dtype=bool), np.zeros((2, 2, 4))
    image[0], image[1] = [0, 1, 9, 10], [0, 100, 900, 1000]
    wall[:, 1], image[:, 1], expected[:, 0, 2:] = False, 1e6, 1
    image, wall, expected = (np.moveaxis(array, 0, axis) for array in (image, wall, expected))
    np.testing.assert_array_equal(thresholds.brighter(image, wall, thresholds.fwhm, axis), expected)


def test_absent_counts_only_slices_without_the_tissue_and_names_who_is_missing(cohort_dir, tmp_path, capsys):
    shares = []
    for number in (1, 2):
        known = heart(SHAPE)
        known[(known == 2221) & SECOND] = 200
        replaced(cohort_dir / f"pat{number}_gd.nii.gz", known)
        labels = HALF.copy()
        labels[tuple(np.argwhere((INDICES == 4) & SECOND)[30 * number :].T)] = 4
        shares.append((labels[:, :, 1] == 4).sum() / WALL)
        paint(tmp_path / "out", f"pat{number}", labels)
    paint(tmp_path / "out", "pat3", INDICES)
    (tmp_path / "out" / "pat3" / "pat3_dseg.json").write_text('{"sequences": ["LGE"], "slice_axis": 7}')
    assert script.main(["absent", str(tmp_path / "out"), str(cohort_dir)]) == 1
    captured = capsys.readouterr()
    found = cells(captured.out)
    assert found["scar"] == ["2", *(f"{q:.3f}" for q in np.quantile(shares, (0.25, 0.5, 0.75)))]
    assert not {"edema", "myocardium"} & set(found)
    assert found["complete"] == ["2", "1.000"]
    assert found["all"][0] == "4"
    assert 0.9 < float(found["all"][1]) < 1  # where scar was painted, myocardium is missing
    assert "left out: pat3: E_FILE: pat3_dseg.json cannot be read" in captured.err
    assert str(tmp_path) not in captured.err


@pytest.mark.parametrize("scarred", [True, False])
def test_thresholds_against_scar_that_is_plain_to_see(make_patient, tmp_path, capsys, scarred):
    files = make_patient(tmp_path / "in", "pat1", shape=SHAPE)
    image = np.choose(INDICES, [0, 50, 60, 60, 200])
    image[(INDICES == 2) & (np.indices(SHAPE).sum(0) % 2 == 0)] = 62  # so that the remote wall has a deviation
    replaced(files["LGE"], image.astype(np.int16))
    if not scarred:
        replaced(files["gd"], np.where(heart(SHAPE) == 2221, 200, heart(SHAPE)).astype(np.int16))
    paint(tmp_path / "out", "pat1", HALF)
    assert script.main(["thresholds", str(tmp_path / "out"), str(tmp_path / "in")]) == 0
    dice = ("0.667", "1.000") if scarred else ("–", "–")
    found = cells(capsys.readouterr().out)["pat1"]
    assert [found[i] for i in (0, 1, 4, 6)] == [f"{dice[0]} ({SCAR / 2 / WALL:.1%})"] + [
        f"{dice[1]} ({SCAR / WALL:.1%})"
    ] * 3


def test_incomplete_merges_the_full_run_alike_and_refuses_the_wrong_way_round(cohort_dir, tmp_path, capsys):
    fewer = np.where(HALF == 3, 2, HALF).astype(np.uint8)
    for number in (1, 2, 3):
        paint(tmp_path / "full", f"pat{number}", INDICES)
        paint(tmp_path / "part", f"pat{number}", fewer, ("LGE", "bSSFP"))
    folders = [str(tmp_path / "full"), str(tmp_path / "part")]
    assert script.main(["incomplete", *folders, str(cohort_dir)]) == 0
    found = cells(capsys.readouterr().out)
    assert "edema" not in found
    assert found["scar"] == ["6", "1.000", "0.500", "0.500"]
    second = 2 * (WALL - SCAR) / (2 * WALL - SCAR)  # the reference has the wall less its scar, painted is all of it
    assert found["myocardium"] == ["6", "1.000", f"{(1 + second) / 2:.3f}", f"{(1 - second) / 2:.3f}"]
    assert script.main(["incomplete", *reversed(folders), str(cohort_dir)]) == 2
    assert "OUT_PART used T2" in capsys.readouterr().err


def test_hide_links_all_but_one_sequence_and_overwrites_nothing(cohort_dir, tmp_path, capsys):
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    hide = ["hide", str(cohort_dir)]
    assert script.main([*hide, str(tmp_path / "new"), "--sequence", "T2"]) == 0
    before, after = (discovery.find(folder, protocol.load("infarct")) for folder in (cohort_dir, tmp_path / "new"))
    for old, new in zip(before.studies, after.studies, strict=True):
        assert (list(new.images), new.problems) == (["LGE", "bSSFP"], ())
        assert (new.patient, new.truth.resolve()) == (old.patient, old.truth.resolve())
        assert np.array_equal(nib.load(new.images["LGE"]).dataobj, nib.load(old.images["LGE"]).dataobj)
    there = sorted(tmp_path.rglob("*"))
    for new, sequence in (("new", "T2"), ("dangling", "T2"), ("cohort/inside", "T2"), ("other", "C0")):
        assert script.main([*hide, str(tmp_path / new), "--sequence", sequence]) == 2
        assert ("NEW" if sequence == "T2" else "LGE, T2, bSSFP") in capsys.readouterr().err
    assert sorted(tmp_path.rglob("*")) == there


# Every set ---------------------------------------------------------------------------------------------------------


def test_infarcts_are_told_from_normal_hearts_by_hand():
    def facts(share: float, ours: float, rival: float) -> dict:
        scars = {way: {"dice": 0.5, "share": rival} for way in thresholds.THRESHOLDS}
        scars["ours"] = {"dice": 0.6, "share": ours}
        return {"blood": 0.8, "blood_size": 1.1, "share": share, "scars": scars}

    found = {"Case_P1": facts(0.2, 0.1, 0.05), "Case_P2": facts(0.1, 0.0, 0.3), "Case_P3": facts(0.04, 0.0, 0.02)}
    found |= {"Case_N1": facts(0.0, 0.01, 0.1), "Case_N2": facts(0.0, 0.05, 0.4)}
    figures = [(f.ours, f.rivals.get("5SD")) for f in hearts.infarct_or_normal(found)]
    ours, rival = (np.corrcoef(x, [0.2, 0.1, 0.04, 0, 0])[0, 1] for x in ([10, 0, 0, 1, 5], [5, 30, 2, 10, 40]))
    sick = [(0.6, 0.5), (1 / 3, 1 / 6), (0.5, 0), (0.5, 0), (ours, rival), (-0.036, 0.106)]
    assert [figures[0], figures[1]] == [(pytest.approx(0.8), None), (pytest.approx(1.1), None)]
    np.testing.assert_allclose(figures[2:], sick, atol=1e-9)


@pytest.fixture
def root(make_patient, tmp_path) -> Path:
    """One patient of each set, two of EMIDEC."""
    make_patient(tmp_path / "myops" / "Case3009", "Case3009")
    for patient, known in (("Case_P001", INDICES), ("Case_N001", HALF)):
        images, contours = (tmp_path / "emidec" / patient / folder for folder in ("Images", "Contours"))
        make_patient(images, patient, sequences=("LGE",))["LGE"].rename(images / f"{patient}.nii.gz")
        (images / f"{patient}_gd.nii.gz").unlink()
        contours.mkdir()
        save(contours / f"{patient}.nii.gz", np.array([0, 1, 2, 2, 3], np.uint8)[known])
    (tmp_path / "oasis").mkdir()
    (tmp_path / "openms" / "patient07").mkdir(parents=True)
    for name in ("oasis/1000_SS", *(f"openms/patient07/{sequence}" for sequence in ("T1", "T2", "FLAIR"))):
        save(tmp_path / f"{name}.nii.gz", np.full(BRAIN.shape, 9, np.int16))
    save(tmp_path / "oasis" / "1000_classified.nii.gz", np.array([0, 2, 3, 1], np.int16)[BRAIN])
    return tmp_path


def test_all_sets_make_one_table_and_are_measured_once(root, tmp_path, monkeypatch, capsys):
    made = {name: one for name, one in script.SETS.items() if not one.phantom}
    monkeypatch.setattr(script, "SETS", {**made, "elsewhere": made["myops"]})

    def segmented(study):  # with T2, half of the grey matter is taken for white
        fewer = BRAIN.copy()
        fewer.flat[5:10] = 2
        return {"ours": BRAIN if "T2" not in study.images else fewer, "other": fewer}

    monkeypatch.setattr(brains, "segmented", segmented)
    out = tmp_path / "out"
    assert script.main(["all", str(root), str(out)]) == 0
    first = capsys.readouterr()
    assert "left out: elsewhere: there is no folder elsewhere in ROOT" in first.err
    content = json.loads((out / "accuracy.json").read_text())
    assert [one["set"] for one in content["sets"]] == ["myops", "emidec", "openms", "oasis"]
    figures = {one["set"]: {f["figure"]: f for f in one["figures"]} for one in content["sets"]}
    test = figures["myops"]["Dice on 2 complete slices of the papers' test patients: scar"]
    assert test["ours"] > 0.6
    assert set(test["others"]) == {"Otsu", "2SD", "3SD", "5SD", "6SD", "FWHM"}
    assert figures["myops"]["without T2: Dice on 2 complete slices: blood"]["ours"] > 0.6
    half = (pytest.approx(10 / 15), pytest.approx(20 / 25))
    gm, wm = (figures["oasis"][f"Dice, 1 brains: {name}"] for name in ("GM", "WM"))
    assert (gm["ours"], wm["ours"], gm["others"]["other"], wm["others"]["other"]) == (1, 1, *half)
    least, mean = (figures["openms"][f"Dice between subsets of sequences, {how}: GM"] for how in ("least", "mean"))
    assert (least["ours"], mean["ours"]) == (half[0], pytest.approx((2 + 4 * 10 / 15) / 6))
    assert figures["openms"]["share of grey matter, 1 brains: T1+T2"]["ours"] == pytest.approx(5 / 30)
    page = (out / "accuracy.md").read_text()
    assert page.count("\n| --- ") == 1
    assert str(tmp_path) not in page
    assert "| **oasis**: OASIS: T1, by `pvgmm` | yes |" in page
    monkeypatch.setattr("monai_deepgmm.results.segment.segment", None)
    assert script.main(["all", str(root), str(out)]) == 0
    assert capsys.readouterr().out == first.out
