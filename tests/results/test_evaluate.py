"""Agreement of a run with reference labels, on a folder of three tiny patients made by hand."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pytest
from conftest import save

from monai_deepgmm import protocol
from monai_deepgmm.errors import UsageError
from monai_deepgmm.patients.study import Cohort, Problem, Study
from monai_deepgmm.results.evaluate import MEASURES, as_json, evaluate, summary, write

INFARCT = protocol.load("infarct")
ALL = ("LGE", "T2", "bSSFP")
GD = {500: 1, 200: 2, 1220: 3, 2221: 4}
VALUE = np.array([0, 500, 200, 1220, 2221], np.int16)
AFFINE = np.diag([2.0, 0.5, 10.0, 1.0])

#: Slice 0: two tissues. Slice 1: all four. Slice 2: nothing. (X, Y, Z) = (4, 6, 3)
TRUTH = np.zeros((4, 6, 3), np.int64)
TRUTH[0, :4, 0], TRUTH[1, :4, 0] = 1, 2
TRUTH[0, :4, 1], TRUTH[1, :4, 1], TRUTH[2, :4, 1], TRUTH[3, :4, 1] = 1, 2, 3, 4


class Folders:
    """An OUT and a DIR that grow patient by patient."""

    def __init__(self, root: Path) -> None:
        self.out, self.dir, self.studies = root / "out", root / "dir", []
        self.out.mkdir()
        self.dir.mkdir()

    def add(
        self, patient, predicted, truth=TRUTH, *, sequences=ALL, labels=GD, affine=AFFINE, truth_affine=AFFINE, axis=2
    ):
        if predicted is not None:
            place = self.out / patient / f"{patient}_dseg.nii.gz"
            place.parent.mkdir()
            save(place, predicted.astype(np.uint8), affine)
            tissues = [{"name": t.name, "index": t.index} for t in INFARCT.visible(sequences)]
            sidecar = {"sequences": list(sequences), "tissues": tissues, "slice_axis": axis}
            place.with_name(f"{patient}_dseg.json").write_text(json.dumps(sidecar))
        path = None
        if truth is not None:
            values = VALUE[truth] if labels else truth.astype(np.int16)
            path = save(self.dir / f"{patient}_gd.nii.gz", values, truth_affine)
        self.studies.append(Study(patient, {}, truth=path, truth_labels=labels))

    def evaluate(self, **options):
        return evaluate(self.out, Cohort(self.dir, "myops", tuple(self.studies)), INFARCT, **options)


@pytest.fixture
def folders(tmp_path):
    return Folders(tmp_path)


def test_a_perfect_segmentation_scores_one_everywhere(folders):
    folders.add("A", TRUTH)
    found = as_json(folders.evaluate())
    for measure in ("dice", "dice_matched", "recall", "precision", "jaccard"):
        assert found[measure]["mean"] == 1
        assert {t: found[measure][t]["n"] for t in ("blood", "scar")} == {"blood": 2, "scar": 1}
    assert found["hd95_mm"]["mean"] == found["assd_mm"]["mean"] == 0
    assert (found["n_units"], found["n_patients"], found["problems"]) == (2, 1, {})
    assert found["not_counted"] == {"blood": 0, "myocardium": 0, "edema": 1, "scar": 1}


def test_values_by_hand(folders):
    predicted = TRUTH.copy()
    predicted[0, 3, 0] = 2  # slice 0: blood 3 of 4, myocardium 4 and one more
    predicted[3, 4, 2] = 1  # slice 2: blood where there is nothing
    folders.add("A", predicted)
    evaluation = folders.evaluate()
    rows = {(row.slice, row.tissue): row for row in evaluation.rows}
    assert rows[0, "blood"].dice == pytest.approx(6 / 7)
    assert rows[0, "blood"].recall == pytest.approx(3 / 4)
    assert rows[0, "blood"].assd_mm == pytest.approx(0.5 / 7)  # 0.5 mm between columns
    assert rows[0, "myocardium"].dice == pytest.approx(8 / 9)
    assert rows[0, "myocardium"].precision == pytest.approx(4 / 5)
    assert rows[0, "myocardium"].assd_mm == pytest.approx(2 / 9)  # 2 mm between rows
    assert np.isnan(rows[0, "scar"].dice)
    assert rows[1, "scar"].dice == 1
    assert rows[2, "blood"].dice == 0
    assert (rows[2, "blood"].voxels_predicted, rows[2, "blood"].voxels_true) == (1, 0)

    found = as_json(evaluation)
    blood = np.array([6 / 7, 1, 0])
    assert found["dice"]["blood"] == pytest.approx({"mean": blood.mean(), "sd": blood.std(ddof=1), "n": 3})
    units = np.array([(6 / 7 + 8 / 9) / 2, 1, 0])
    assert found["dice"]["mean"] == pytest.approx(units.mean())
    assert found["dice"]["mean_sd"] == pytest.approx(units.std(ddof=1))
    assert found["dice"]["mean_n"] == 3
    assert found["not_counted"] == {"blood": 0, "myocardium": 1, "edema": 2, "scar": 2}
    assert found["hd95_mm"]["blood"]["n"] == 2  # no distance to a surface that is not there
    assert found["patients"]["A"]["dice"]["blood"] == pytest.approx(blood.mean())


def test_volumes_are_one_unit_in_three_dimensions(folders):
    predicted = TRUTH.copy()
    predicted[0, :4, 1], predicted[0, :4, 2] = 0, 1  # blood of slice 1 lies one slice too high
    folders.add("A", predicted)
    (row,) = [row for row in folders.evaluate(unit="volume").rows if row.tissue == "blood"]
    assert row.slice is None
    assert row.dice == pytest.approx(0.5)
    assert row.assd_mm == pytest.approx((4 * 10 + 4 * 10) / 16)  # 10 mm between slices, both ways


def test_the_oracle_renames_within_each_slice(folders):
    predicted = TRUTH.copy()
    predicted[..., 1] = np.array([0, 2, 1, 4, 3])[TRUTH[..., 1]]
    folders.add("A", predicted)
    found = as_json(folders.evaluate())
    assert found["dice"]["mean"] == pytest.approx(0.5)
    assert found["dice_matched"]["mean"] == 1
    assert found["dice_matched"]["scar"] == {"mean": 1, "sd": None, "n": 1}


def test_complete_keeps_the_slices_whose_reference_holds_every_tissue(folders):
    predicted = TRUTH.copy()
    predicted[:, :, 2] = 1
    folders.add("A", predicted)
    evaluation = folders.evaluate(slices="complete")
    assert {row.slice for row in evaluation.rows} == {1}
    found = as_json(evaluation)
    assert (found["slices"], found["n_units"]) == ("complete", 1)
    assert set(found["not_counted"].values()) == {0}
    rng = np.random.default_rng(0)
    for name in "BC":
        folders.add(name, np.where(rng.random(TRUTH.shape) < 0.4, rng.integers(0, 5, TRUTH.shape), TRUTH))
    found = as_json(folders.evaluate(slices="complete"))
    for measure in ("dice", "dice_matched", "recall", "jaccard"):  # the mean is that of the tissues
        tissues = [found[measure][t.name]["mean"] for t in INFARCT.tissues]
        assert found[measure]["mean"] == pytest.approx(np.mean(tissues))
    assert found["dice_matched"]["mean"] >= found["dice"]["mean"] - 1e-8


@pytest.mark.parametrize(
    ("sequences", "merged", "visible"),
    [
        (("LGE", "bSSFP"), [0, 1, 2, 2, 4], ("blood", "myocardium", "scar")),
        (("T2",), [0, 1, 2, 3, 3], ("blood", "myocardium", "edema")),
        (("bSSFP",), [0, 1, 2, 2, 2], ("blood", "myocardium")),
    ],
)
def test_missing_sequences_merge_the_reference(folders, sequences, merged, visible):
    folders.add("A", np.array(merged)[TRUTH], sequences=sequences)
    evaluation = folders.evaluate(slices="complete")
    assert evaluation.patients["A"].tissues == visible
    assert tuple(row.tissue for row in evaluation.rows if row.slice == 1) == visible
    assert as_json(evaluation)["dice"]["mean"] == 1
    assert as_json(evaluation)["dice"]["edema"]["n"] == ("edema" in visible)


def test_slices_follow_the_sidecars_axis(folders):
    turned = np.moveaxis(TRUTH, 2, 0)
    predicted = turned.copy()
    predicted[0, 0, 3] = 2
    affine = np.diag([10.0, 2.0, 0.5, 1.0])
    folders.add("A", predicted, turned, affine=affine, truth_affine=affine, axis=0)
    rows = {(row.slice, row.tissue): row for row in folders.evaluate().rows}
    assert {number for number, _ in rows} == {0, 1}
    assert rows[0, "blood"].dice == pytest.approx(6 / 7)
    assert rows[0, "blood"].assd_mm == pytest.approx(0.5 / 7)


def test_a_reference_without_a_mapping_holds_indices(folders):
    folders.add("A", TRUTH, labels=None)
    folders.add("B", TRUTH, np.where(TRUTH == 4, 9, TRUTH), labels={})
    evaluation = folders.evaluate()
    assert as_json(evaluation)["patients"]["A"]["dice"]["mean"] == 1
    assert evaluation.patients["A"].warnings == ()
    assert as_json(evaluation)["patients"]["B"]["dice"]["scar"] == 0
    assert [w.split(":")[0] for w in evaluation.patients["B"].warnings] == ["W_TRUTH"]


def test_a_reference_on_another_grid_is_resampled_and_said(folders):
    fine = np.repeat(TRUTH, 2, axis=0)
    affine = np.diag([1.0, 0.5, 10.0, 1.0])
    affine[0, 3] = -0.5
    folders.add("A", TRUTH, fine, truth_affine=affine)
    evaluation = folders.evaluate()
    assert as_json(evaluation)["dice"]["mean"] == 1
    assert any(w.startswith("W_GRID") for w in evaluation.patients["A"].warnings)


def test_nobody_is_dropped_in_silence(folders):
    far = AFFINE.copy()
    far[:3, 3] = 1e4
    near = AFFINE.copy()
    near[:3, 3] = 5
    folders.add("E no overlap", TRUTH, affine=near, truth_affine=far)
    folders.add("D no truth", TRUTH, None)
    folders.add("C failed", None)
    folders.add("B other labels", TRUTH, TRUTH + 20, labels=None)
    folders.add("A fine", TRUTH)
    evaluation = folders.evaluate()
    codes = {name: problem.code for name, problem in evaluation.problems.items()}
    expected = {"B other labels": "E_TRUTH", "C failed": "E_FILE", "D no truth": "E_TRUTH", "E no overlap": "E_GRID"}
    assert codes == expected
    assert list(codes) == sorted(codes)
    found = as_json(evaluation)
    assert (found["n_patients"], found["n_units"], found["dice"]["mean"]) == (1, 2, 1)
    assert found["problems"]["C failed"]["message"].startswith("there is no C failed_dseg.nii.gz")
    for problem in evaluation.problems.values():
        assert str(folders.out.parent) not in problem.message
        assert problem.remedy
    assert all(name in summary(evaluation) for name in codes)


@pytest.mark.parametrize(
    ("patient", "problems", "code", "message"),
    [
        ("A", (Problem("E_MASK_NONE", "no mask"),), "E_FILE", "E_MASK_NONE: no mask"),  # its own reason
        ("A", (Problem("E_DUPLICATE", "a and A"),), "E_DUPLICATE", ""),  # an id that is not one patient's
        ("x" * 250, (), "E_FILE", ""),  # too long for a file's name
    ],
)
def test_who_cannot_be_looked_up_is_listed_with_the_reason(folders, patient, problems, code, message):
    if code == "E_DUPLICATE":
        folders.add(patient, TRUTH)
    folders.studies = [Study(patient, {}, problems=problems)]
    evaluation = folders.evaluate()
    assert evaluation.patients == {}
    assert evaluation.problems[patient].code == code
    assert message in evaluation.problems[patient].message


@pytest.mark.parametrize(
    ("content", "code"),
    [
        ("{", "E_FILE"),
        ("[]", "E_FILE"),
        ('{"sequences": ["LGE"]}', "E_FILE"),
        ('{"sequences": ["LGE"], "tissues": [{"name": "GM", "index": 1}]}', "E_TRUTH"),
        ('{"sequences": ["T1"], "tissues": []}', "E_TRUTH"),
        ('{"sequences": ["bSSFP"], "slice_axis": 3, "tissues": [{"name": "blood", "index": 1}, '
         '{"name": "myocardium", "index": 2}]}', "E_TRUTH"),
        (None, "E_FILE"),
    ],
)  # fmt: skip
def test_a_damaged_sidecar_fails_its_patient_alone(folders, content, code):
    folders.add("A", TRUTH)
    folders.add("B", TRUTH)
    sidecar = folders.out / "A" / "A_dseg.json"
    sidecar.unlink() if content is None else sidecar.write_text(content)
    evaluation = folders.evaluate()
    assert {name: problem.code for name, problem in evaluation.problems.items()} == {"A": code}
    assert list(evaluation.patients) == ["B"]


def test_an_unreadable_reference_fails_its_patient_alone(folders):
    for name in "ABC":
        folders.add(name, TRUTH)
    (folders.dir / "A_gd.nii.gz").write_bytes(b"")
    save(folders.dir / "B_gd.nii.gz", VALUE[TRUTH].astype(np.float32) / 3, AFFINE)
    evaluation = folders.evaluate()
    assert {name: problem.code for name, problem in evaluation.problems.items()} == {"A": "E_EMPTY", "B": "E_TRUTH"}
    assert list(evaluation.patients) == ["C"]


def test_files_hold_the_same_as_the_evaluation(folders):
    predicted = TRUTH.copy()
    predicted[0, 3, 0] = 2
    folders.add("Zoë", predicted)
    folders.add("A", TRUTH)
    evaluation = folders.evaluate()
    write(folders.out, evaluation)
    text = (folders.out / "evaluation.json").read_text(encoding="utf-8")
    assert "NaN" not in text
    assert json.loads(text) == as_json(evaluation)
    assert set(MEASURES) < set(json.loads(text))
    with (folders.out / "evaluation.tsv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file, delimiter="\t"))
    assert [(r["patient"], r["slice"], r["tissue"]) for r in rows[:5]] == [
        ("A", "0", "blood"), ("A", "0", "myocardium"), ("A", "0", "edema"), ("A", "0", "scar"), ("A", "1", "blood"),
    ]  # fmt: skip
    assert len(rows) == 16
    assert (rows[8]["patient"], rows[8]["dice"], rows[8]["voxels_predicted"]) == ("Zoë", "0.857143", "3")
    assert (rows[2]["dice"], rows[2]["voxels_true"]) == ("", "0")
    before = {name: (folders.out / name).read_bytes() for name in ("evaluation.tsv", "evaluation.json")}
    write(folders.out, folders.evaluate())
    assert before == {name: (folders.out / name).read_bytes() for name in before}


def test_nothing_to_evaluate_is_still_a_result(folders):
    folders.add("A", None)
    evaluation = folders.evaluate()
    write(folders.out, evaluation)
    found = json.loads((folders.out / "evaluation.json").read_text())
    assert found["dice"]["mean"] is None
    assert found["dice"]["blood"] == {"mean": None, "sd": None, "n": 0}
    assert "not evaluated: 1" in summary(evaluation)


def test_summary_is_aligned(folders):
    predicted = TRUTH.copy()
    predicted[0, 3, 0] = 2
    folders.add("A", predicted)
    lines = summary(folders.evaluate()).splitlines()
    header, blood = lines[0], lines[1]
    for column in ("dice", "oracle-matched dice"):
        assert blood[header.index(column) :].startswith("0.929 ± 0.101")  # 6/7 and 1
    assert lines[5].startswith("mean")


def test_what_cannot_be_evaluated_lists_the_choices(folders, tmp_path):
    for option, value in (("slices", "some"), ("unit", "voxel")):
        with pytest.raises(UsageError, match=f"--{option}: '{value}' is unknown; choose .* or "):
            folders.evaluate(**{option: value})
    with pytest.raises(UsageError, match="no folder nowhere"):
        evaluate(tmp_path / "nowhere", Cohort(tmp_path, "myops", ()), INFARCT)
