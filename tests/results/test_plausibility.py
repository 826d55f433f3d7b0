"""What a result is told that can hardly be true: by the command, in every place where people look."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import yaml
from conftest import AFFINE, save
from outcomes import row, segmentation, sidecar

from monai_deepgmm import protocol
from monai_deepgmm.cli import main
from monai_deepgmm.errors import UsageError
from monai_deepgmm.results import outliers
from monai_deepgmm.results.segment import with_numbers

#: A heart of 35 mm radius, and what its shape becomes when a header says that voxels have 1 mm.
REAL, UNIT = AFFINE @ np.diag([1.5, 1.5, 1.0, 1.0]), np.diag([-1.0, -1.0, 1.0, 1.0])
SHAPE = (48, 48, 4)


def summary(out: Path) -> dict[str, str]:
    with (out / "summary.tsv").open(encoding="utf-8", newline="") as file:
        return {line["patient"]: line["warnings"] for line in csv.DictReader(file, delimiter="\t")}


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory, make_patient) -> Path:
    """A right heart, one with voxels of 1 mm, and one whose mask leaves out a slice."""
    base = tmp_path_factory.mktemp("plausibility")
    for name, affine in (("gap", REAL), ("right", REAL), ("unit", UNIT)):
        files = make_patient(base / "in", name, shape=SHAPE, affine=affine, seed=1)
    mask = nib.load(base / "in" / "gap_gd.nii.gz")
    labels = np.asanyarray(mask.dataobj).copy()
    labels[:, :, 1] = 0
    (base / "in" / "gap_gd.nii.gz").unlink()
    save(base / "in" / "gap_gd.nii.gz", labels, REAL)
    assert files["gd"].is_file()
    assert main(["segment", str(base / "in"), str(base / "out"), "-q"]) == 0
    return base / "out"


def test_a_right_heart_is_not_flagged_and_its_numbers_stand_in_the_sidecar(out):
    assert summary(out)["right"] == ""
    told = sidecar(out, "right")
    assert {one["kind"] for one in told["plausibility"]} == {
        *("volume_ml", "diameter_mm", "thickness_mm", "percent", "contrast_sd"),
    }
    assert all(one["plausible"] for one in told["plausibility"])
    assert told["coverage"] == {
        "slices": 4,
        "of": 4,
        "spacing_mm": 8.0,
        "on_first_slice": True,
        "on_last_slice": True,
        "gaps": [],
        "sequences": None,
    }


def test_the_page_shows_the_ventricle_and_claims_no_more_than_is_known(out):
    page = (out / "right" / "right_report.html").read_text("utf-8")
    whole = row(out, "right")["ventricle"]
    assert f'<td>LV mass</td><td class="n"><strong>{whole["lv_mass_g"]:.1f}</strong> g' in page
    assert "not available: no insertion point" in page
    assert "processed, not reviewed" in page
    # The default method's names are fixed: there is nothing to be certain of.
    naming = sidecar(out, "right")["naming"]
    assert {naming["certainty"], *(unit["certainty"] for unit in naming["units"])} == {None}
    assert "Certainty" not in page
    assert "falling" not in page


def test_a_header_that_says_1_mm_makes_an_implausible_heart_everywhere_one_looks(out):
    warnings = row(out, "unit")["warnings"]
    flagged = [w for w in warnings if w.startswith("W_IMPLAUSIBLE")]
    assert any("the volume of blood is" in w and "plausible is 20 to 500" in w for w in flagged)
    assert all("check the mask" in w for w in flagged)
    assert sidecar(out, "unit")["warnings"] == warnings
    assert summary(out)["unit"] == " | ".join(warnings)
    page = (out / "unit" / "unit_report.html").read_text("utf-8")
    assert "W_IMPLAUSIBLE" in page
    assert "W_IMPLAUSIBLE" in (out / "index.html").read_text("utf-8")


def test_a_slice_that_the_mask_leaves_out_is_told(out):
    (warning,) = row(out, "gap")["warnings"]
    assert warning.startswith("W_COVERAGE: the mask leaves out slice 1 between")
    assert "draw it on them" in warning
    assert sidecar(out, "gap")["coverage"]["gaps"] == [1]


def test_the_tables_hold_what_was_measured(out):
    with (out / "measurements.tsv").open(encoding="utf-8", newline="") as file:
        lines = [line for line in csv.DictReader(file, delimiter="\t") if line["patient"] == "right"]
    blood, *walls = lines
    mass = sum(float(line["mass_g"]) for line in walls)
    assert float(blood["lv_mass_g"]) == float(walls[0]["lv_mass_g"]) == pytest.approx(mass, rel=1e-5)
    assert float(blood["cavity_ml"]) == float(blood["volume_ml"])
    assert float(walls[2]["low_ml"]) <= float(walls[2]["volume_ml"]) <= float(walls[2]["high_ml"])
    assert blood["segments"] == "not available: no insertion point"
    with (out / "measurements_slices.tsv").open(encoding="utf-8", newline="") as file:
        slices = [line for line in csv.DictReader(file, delimiter="\t") if line["patient"] == "right"]
    assert [(s["slice"], s["tissue"]) for s in slices[3:5]] == [("0", "scar"), ("1", "blood")]
    assert sum(float(s["volume_ml"]) for s in slices if s["tissue"] == "scar") == pytest.approx(
        float(walls[2]["volume_ml"]), rel=1e-4
    )
    assert float(slices[4]["position_mm"]) - float(slices[0]["position_mm"]) == pytest.approx(8)
    assert 10 < float(slices[0]["thickness_mean_mm"]) < 20


def test_a_patient_far_from_the_others_is_told_in_the_tables_alone(out, tmp_path):
    """The tables are made from rows, so rows of ten more patients stand for ten more patients."""
    whole = json.loads((out / "right" / "right_row.json").read_text())
    for number in range(12):
        place = tmp_path / "out" / f"p{number:02}"
        place.mkdir(parents=True)
        lines = [{**m, "patient": place.name} for m in whole["measurements"]]
        for line in lines:
            line["volume_ml"] *= (1 + number / 50) * (4 if number == 7 and line["tissue"] == "blood" else 1)
        changed = {**whole, "patient": place.name, "measurements": lines}
        (place / f"{place.name}_row.json").write_text(json.dumps(changed))
    cohort = out.parent / "in"
    assert main(["segment", str(cohort), str(tmp_path / "out"), "--patients", "right", "-q"]) == 0
    flagged = {patient: words for patient, words in summary(tmp_path / "out").items() if "W_OUTLIER" in words}
    assert set(flagged) == {"p07"}
    assert "blood (ml) is" in flagged["p07"]
    assert "compare with the others" in flagged["p07"]
    assert "W_OUTLIER" in (tmp_path / "out" / "index.html").read_text("utf-8")


def rows(values: list[float], tissue: str = "scar") -> list[dict]:
    return [
        {"patient": str(k), "measurements": [{"tissue": tissue, "volume_ml": value}]} for k, value in enumerate(values)
    ]


def test_outliers_need_ten_patients_who_have_the_tissue_and_differ():
    values = [10.0, 11.0, 12.0, 13.0, 14.0, 15.0, 16.0, 17.0, 18.0]
    assert outliers.warnings(rows([*values, 900.0])).keys() == {"9"}
    assert outliers.warnings(rows([*values[:8], 900.0])) == {}  # nine
    assert outliers.warnings(rows([*values, 0.0])) == {}  # nine have it
    assert outliers.warnings(rows([5.0] * 12 + [50.0])) == {}  # no spread to measure by
    assert outliers.warnings(rows([5.0])[:0]) == {}
    alike = [5 + k / 1000 for k in range(12)]
    assert outliers.warnings(rows([*alike, 5.5])) == {}  # a tenth more is no outlier among copies
    assert outliers.warnings(rows([*alike, 7.0])).keys() == {"12"}


def brain(grey: int, white: int, fluid: int) -> list[str]:
    """Warnings of a brain of so many ml of each."""
    labels = np.repeat([1, 2, 3], [grey, white, fluid]).reshape(-1, 1, 1)
    affine = np.diag([10.0, 10.0, 10.0, 1.0])
    return list(with_numbers(segmentation(labels, name="brain", sequences=("T1",), affine=affine)).warnings)


def test_brains_are_held_against_their_ranges():
    assert brain(700, 600, 200) == []
    (ratio,) = brain(188, 675, 200)
    assert ratio.startswith("W_IMPLAUSIBLE: GM is 0.279 times WM; plausible is 0.6 to 2")
    (whole,) = brain(300, 300, 100)
    assert whole.startswith("W_IMPLAUSIBLE: the volume of GM + WM + CSF is 700 ml; plausible is 800 to 1900")
    assert brain(900, 0, 0)[0].startswith("W_IMPLAUSIBLE: GM is inf times WM")


def ring(scar: slice, level: float, shape: tuple[int, int, int] = (40, 40, 4)) -> list[str]:
    """Warnings of a heart of 2 mm voxels with that much scar, as bright on LGE."""
    x, y, _ = np.meshgrid(*(np.arange(n) - n // 2 for n in shape), indexing="ij")
    labels = np.select([np.hypot(x, y) < 11, np.hypot(x, y) < 17], [1, 2], 0)
    labels[scar][labels[scar] == 2] = 4
    noise = np.random.default_rng(0).normal(0, 1, labels.shape)
    late = noise + np.select([labels == 1, labels == 4], [8.0, level], 0.0)
    images = np.stack([late, -late, late]).astype(np.float32)  # LGE, black-blood T2, bSSFP
    return list(with_numbers(segmentation(labels, images=images)).warnings)


def test_scar_is_held_against_the_wall_and_its_brightness():
    half = np.s_[:10]
    assert ring(half, 5.0) == []
    (large,) = ring(np.s_[:28], 5.0)
    assert large.startswith("W_IMPLAUSIBLE: scar is")
    assert "% of the wall; plausible is 0 to 50" in large
    (dark,) = ring(half, 0.5)
    assert "standard deviations of myocardium brighter than it on LGE; plausible is more than 1" in dark


def test_two_slices_are_no_whole_cavity():
    assert ring(np.s_[:10], 5.0, shape=(40, 40, 2)) == []
    assert ring(np.s_[:10], 5.0, shape=(24, 24, 3))  # cut off, and three slices


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"kind": "weight"}, "kind"),
        ({"of": []}, "of"),
        ({"of": ["GM", "bone"]}, "of .'GM', 'bone'. for ratio: expected 2 of GM, WM"),
        ({"of": ["GM"]}, "of .'GM'. for ratio: expected 2"),
        ({"sequence": "T1"}, "sequence T1 for ratio"),
        ({"range": [2, 1]}, "range .2, 1. of ratio"),
    ],
    ids=str,
)
def test_a_range_that_is_none_is_refused(tmp_path, change, word):
    raw = yaml.safe_load(protocol.as_yaml(protocol.load("brain")))
    raw["plausible"] = [raw["plausible"][0] | change]
    (tmp_path / "other.yaml").write_text(yaml.safe_dump(raw))
    with pytest.raises(UsageError, match=f"plausible.*{word}"):
        protocol.load(tmp_path / "other.yaml")
    raw["plausible"] = []
    (tmp_path / "other.yaml").write_text(yaml.safe_dump(raw))
    assert protocol.load(tmp_path / "other.yaml").plausible == ()
