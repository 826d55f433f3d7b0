"""The script that measures accuracy: thresholds and tables by hand, on runs whose labels were painted by hand."""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

import nibabel as nib
import numpy as np
import pytest
from conftest import heart, save

from monai_deepgmm import protocol
from monai_deepgmm.patients import discovery as cohort

SHAPE = (48, 48, 2)
INDEX = {500: 1, 200: 2, 1220: 3, 2221: 4}


@pytest.fixture(scope="module")
def script() -> ModuleType:
    path = Path(__file__).parents[2] / "scripts" / "measure_accuracy.py"
    spec = importlib.util.spec_from_file_location("measure_accuracy", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules["measure_accuracy"] = module  # named tuples look their module up
    spec.loader.exec_module(module)
    return module


def indices() -> np.ndarray:
    """The heart as the protocol's labels."""
    labels = heart(SHAPE)
    return sum(index * (labels == value) for value, index in INDEX.items()).astype(np.uint8)


def paint(out: Path, patient: str, labels: np.ndarray, sequences: Sequence[str] = ("LGE", "T2", "bSSFP")) -> None:
    """A segmentation, as far as the script reads it."""
    (out / patient).mkdir(parents=True)
    save(out / patient / f"{patient}_dseg.nii.gz", labels)
    content = {"sequences": list(sequences), "slice_axis": 2}
    (out / patient / f"{patient}_dseg.json").write_text(json.dumps(content))


def cells(text: str) -> dict[str, list[str]]:
    """First column → the others."""
    lines = [[c.strip() for c in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("|")]
    return {line[0]: line[1:] for line in lines}


def without_scar(folder: Path, number: int) -> None:
    """The second slice's truth loses its scar to myocardium."""
    path = folder / f"pat{number}_gd.nii.gz"
    truth = heart(SHAPE)
    truth[:, :, 1][truth[:, :, 1] == 2221] = 200
    path.unlink()
    save(path, truth)


def test_thresholds_by_hand(script):
    values = np.array([0.0, 2.0, 4.0, 6.0, 20.0, 21.0])
    assert script.fwhm(values) == 10.5
    assert script.five_sd(values) == pytest.approx(2 + 5 * np.sqrt(8 / 3))  # of 0, 2 and 4
    assert script.otsu(values) == 6
    assert script.otsu(np.full(5, 3.0)) == 3


@pytest.mark.parametrize("seed", range(5))
def test_otsu_parts_as_the_least_variance_within_does(script, seed):
    values = np.random.default_rng(seed).integers(0, 30, 40).astype(float)
    within = {t: sum(part.var() * part.size for part in (values[values <= t], values[values > t])) for t in
              np.unique(values)[:-1]}  # fmt: skip
    assert within[script.otsu(values)] == pytest.approx(min(within.values()))


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_thresholds_are_taken_slice_by_slice_and_within_the_wall(script, axis):
    image = np.zeros((2, 2, 4))
    image[0], image[1] = [0, 1, 9, 10], [0, 100, 900, 1000]
    wall = np.ones(image.shape, dtype=bool)
    wall[:, 1] = False
    image[:, 1] = 1e6
    expected = np.zeros(image.shape)
    expected[:, 0, 2:] = 1
    turn = [np.moveaxis(array, 0, axis) for array in (image, wall, expected)]
    np.testing.assert_array_equal(script.brighter(turn[0], turn[1], script.fwhm, axis), turn[2])


def test_absent_counts_only_slices_without_the_tissue(script, cohort_dir, tmp_path, capsys):
    shares = []
    for number in (1, 2, 3):
        without_scar(cohort_dir, number)
        labels = indices()
        lost = (labels == 4) & (np.arange(2) == 1)
        lost[: 24 + 3 * number] = False
        labels[(labels == 4) & (np.arange(2) == 1)] = 2
        labels[lost] = 4
        shares.append((labels[:, :, 1] == 4).sum() / (labels[:, :, 1] > 1).sum())
        paint(tmp_path / "out", f"pat{number}", labels)
    assert script.main(["absent", str(tmp_path / "out"), str(cohort_dir)]) == 0
    found = cells(capsys.readouterr().out)
    assert found["scar"] == ["3", *(f"{q:.3f}" for q in np.quantile(shares, (0.25, 0.5, 0.75)))]
    assert "edema" not in found
    assert "myocardium" not in found
    assert found["complete"] == ["3", "1.000"]
    assert found["all"][0] == "6"
    assert 0.9 < float(found["all"][1]) < 1  # where scar was painted, myocardium is missing


def test_thresholds_against_scar_that_is_plain_to_see(script, make_patient, tmp_path, capsys):
    files = make_patient(tmp_path / "in", "pat1", shape=SHAPE)
    labels = indices()
    files["LGE"].unlink()
    image = np.choose(labels, [0, 50, 60, 60, 200])
    image[(labels == 2) & (np.indices(SHAPE).sum(0) % 2 == 0)] = 62  # so that the remote wall has a deviation
    save(files["LGE"], image.astype(np.int16))
    labels[(labels == 4) & (np.arange(2) == 1)] = 2  # ours misses half of it
    paint(tmp_path / "out", "pat1", labels)
    assert script.main(["thresholds", str(tmp_path / "out"), str(tmp_path / "in")]) == 0
    share = (indices() == 4).sum() / (labels > 1).sum()
    full = f"1.000 ({share:.1%})"
    assert cells(capsys.readouterr().out)["pat1"] == [f"0.667 ({share / 2:.1%})", full, full, full]


def test_without_scar_in_the_truth_there_is_no_dice(script, make_patient, tmp_path, capsys):
    files = make_patient(tmp_path / "in", "pat1", shape=SHAPE)
    files["gd"].unlink()
    truth = heart(SHAPE)
    truth[truth == 2221] = 200
    save(files["gd"], truth)
    paint(tmp_path / "out", "pat1", np.where(indices() == 4, 2, indices()).astype(np.uint8))
    assert script.main(["thresholds", str(tmp_path / "out"), str(tmp_path / "in")]) == 0
    assert cells(capsys.readouterr().out)["pat1"][0] == "- (0.0%)"


def test_incomplete_merges_the_full_run_alike(script, cohort_dir, tmp_path, capsys):
    full, fewer = indices(), np.where(indices() == 3, 2, indices()).astype(np.uint8)
    fewer[(fewer == 4) & (np.arange(2) == 1)] = 2
    for number in (1, 2, 3):
        paint(tmp_path / "full", f"pat{number}", full)
        paint(tmp_path / "part", f"pat{number}", fewer, ("LGE", "bSSFP"))
    assert script.main(["incomplete", str(tmp_path / "full"), str(tmp_path / "part"), str(cohort_dir)]) == 0
    found = cells(capsys.readouterr().out)
    assert "edema" not in found
    assert found["scar"] == ["6", "1.000", "0.500", "0.500"]
    wall, scar = (full[:, :, 1] > 1).sum(), (full[:, :, 1] == 4).sum()
    second = 2 * (wall - scar) / (2 * wall - scar)  # truth has the wall less its scar, painted is all of the wall
    assert found["myocardium"] == ["6", "1.000", f"{(1 + second) / 2:.3f}", f"{(1 - second) / 2:.3f}"]


def test_incomplete_refuses_runs_the_wrong_way_round(script, cohort_dir, tmp_path, capsys):
    for number in (1, 2, 3):
        paint(tmp_path / "full", f"pat{number}", indices())
        paint(tmp_path / "part", f"pat{number}", indices(), ("LGE", "bSSFP"))
    assert script.main(["incomplete", str(tmp_path / "part"), str(tmp_path / "full"), str(cohort_dir)]) == 2
    assert "OUT_PART used T2" in capsys.readouterr().err


def test_who_was_not_segmented_is_named(script, cohort_dir, tmp_path, capsys):
    paint(tmp_path / "out", "pat1", indices())
    paint(tmp_path / "out", "pat2", indices())
    (tmp_path / "out" / "pat2" / "pat2_dseg.json").write_text('{"sequences": ["LGE"], "slice_axis": 7}')
    assert script.main(["absent", str(tmp_path / "out"), str(cohort_dir)]) == 1
    captured = capsys.readouterr()
    assert cells(captured.out)["all"] == ["2", "1.000"]
    assert "pat2_dseg.json cannot be read" in captured.err
    assert "left out: pat3: E_FILE" in captured.err
    assert str(tmp_path) not in captured.err


def test_thresholds_need_a_protocol_with_scar(script, tmp_path, capsys):
    (tmp_path / "in" / "a").mkdir(parents=True)
    save(tmp_path / "in" / "a" / "T1.nii.gz", np.ones((4, 4, 4), np.int16))
    assert script.main(["thresholds", str(tmp_path), str(tmp_path / "in"), "--protocol", "brain"]) == 2
    assert "no scar" in capsys.readouterr().err


@pytest.mark.parametrize("layout", ["myops", "folder"])
def test_hide_links_all_but_one_sequence(script, make_patient, tmp_path, layout):
    for patient in ("one", "two"):
        files = make_patient(tmp_path / "in" / patient, patient, shape=SHAPE)
        for name, path in files.items() if layout == "folder" else ():
            path.rename(path.with_name({"gd": "seg"}.get(name, name) + ".nii.gz"))
        if layout == "folder":
            save(tmp_path / "in" / patient / "mask.nii.gz", (heart(SHAPE) > 0).astype(np.uint8))
    assert script.main(["hide", str(tmp_path / "in"), str(tmp_path / "new"), "--sequence", "T2"]) == 0
    before, after = (cohort.find(tmp_path / name, protocol.load("infarct")) for name in ("in", "new"))
    assert after.layout == before.layout == layout
    for old, new in zip(before.studies, after.studies, strict=True):
        assert (list(new.images), new.problems) == (["LGE", "bSSFP"], ())
        assert new.truth.is_symlink()
        assert (new.patient, new.truth.resolve()) == (old.patient, old.truth.resolve())
        assert np.array_equal(nib.load(new.images["LGE"]).dataobj, nib.load(old.images["LGE"]).dataobj)


@pytest.mark.parametrize("new", ["there", "dangling", "cohort/inside"])
def test_hide_refuses_a_folder_that_exists_or_lies_within(script, cohort_dir, tmp_path, capsys, new):
    (tmp_path / "there").mkdir()
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    before = sorted(tmp_path.rglob("*"))
    assert script.main(["hide", str(cohort_dir), str(tmp_path / new)]) == 2
    assert "NEW" in capsys.readouterr().err
    assert sorted(tmp_path.rglob("*")) == before


def test_hide_refuses_an_unknown_sequence(script, cohort_dir, tmp_path, capsys):
    assert script.main(["hide", str(cohort_dir), str(tmp_path / "new"), "--sequence", "C0"]) == 2
    assert "LGE, T2, bSSFP" in capsys.readouterr().err
    assert not (tmp_path / "new").exists()
