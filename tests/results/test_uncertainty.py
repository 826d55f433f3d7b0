"""How sure a segmentation is: entropies and intervals by hand, perturbed priors, and what a run writes of them."""

from __future__ import annotations

import csv
import dataclasses
import json
import math
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from conftest import AFFINE, heart, save

from monai_deepgmm import protocol
from monai_deepgmm.cli import main
from monai_deepgmm.methods import config
from monai_deepgmm.patients import discovery as cohort
from monai_deepgmm.results import measure, uncertainty
from monai_deepgmm.results import segment as room
from monai_deepgmm.results.uncertainty import entropy, interval, perturbed, standard_deviations

INFARCT = protocol.load("infarct")
TISSUES = [t.name for t in INFARCT.tissues]
#: Of the tiny patients: a voxel in ml, and its area in mm².
VOXEL_ML, PIXEL_MM2 = 1.5 * 1.5 * 8 / 1000, 1.5 * 1.5


def sidecar(out: Path, patient: str = "pat1") -> dict:
    return json.loads((out / patient / f"{patient}_dseg.json").read_text(encoding="utf-8"))


def map_of(out: Path, what: str, patient: str = "pat1") -> nib.Nifti1Image:
    return nib.load(out / patient / f"{patient}_{what}.nii.gz")


def noisy(folder: Path, patient: str, sd: float, seed: int) -> None:
    """Adds so much noise to a patient's images that its tissues overlap."""
    rng = np.random.default_rng(seed)
    for name in ("LGE", "T2", "C0"):
        path = folder / f"{patient}_{name}.nii.gz"
        data = np.asanyarray(nib.load(path).dataobj) + rng.normal(0, sd, (48, 48, 2))
        save(path, np.rint(data).astype(np.int16))


@pytest.fixture(scope="module")
def patients(tmp_path_factory, make_patient) -> Path:
    """pat1's tissues overlap; anyone can tell pat2's apart."""
    folder = tmp_path_factory.mktemp("uncertainty") / "in"
    make_patient(folder, "pat1", seed=1)
    make_patient(folder, "pat2", seed=2)
    noisy(folder, "pat1", 60, 3)
    return folder


@pytest.fixture(scope="module")
def run(patients, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("uncertainty") / "out"
    assert main(["segment", str(patients), str(out), "--probabilities", "--seed", "5", "-q"]) == 0
    return out


def study(folder: Path, patient: str = "pat1"):
    (found,) = cohort.find(folder, INFARCT, patients=[patient]).studies
    return found


# Entropy --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("k", [2, 3, 4, 7])
def test_entropy_is_nothing_for_the_certain_and_one_for_the_clueless(k):
    p = np.zeros((k, 3, 1, 1), dtype=np.float32)
    p[k - 1, 0] = 1  # certain
    p[:, 1] = 1 / k  # uniform; the third voxel lies outside the mask
    found = entropy(p)
    assert (found.shape, found.dtype) == ((3, 1, 1), np.float32)
    assert found[:, 0, 0] == pytest.approx([0, 1, 0], abs=1e-6)


def test_entropy_by_hand():
    p = np.array([0.5, 0.5, 0, 0, 0.7, 0.2, 0.1, 0], dtype=np.float64).reshape(2, 4).T.reshape(4, 2, 1, 1)
    wanted = [math.log(2) / math.log(4), -sum(q * math.log(q) for q in (0.7, 0.2, 0.1)) / math.log(4)]
    assert entropy(p)[:, 0, 0] == pytest.approx(wanted, rel=1e-6)


def test_the_only_tissue_is_certain():
    assert not entropy(np.ones((1, 2, 2, 1), dtype=np.float32)).any()


# Intervals ------------------------------------------------------------------------------------------------------------

#: Two tissues in five voxels, one of them outside the mask: Σ p (1 − p) is 0.21 + 0.25 for either.
P = np.array([[1, 0, 0.3, 0.5, 0], [0, 1, 0.7, 0.5, 0]], dtype=np.float64).reshape(2, 5, 1, 1)


def variances(refits=(), *, pixel_mm2=88.0, voxel_ml=1.0) -> np.ndarray:
    """Of two volumes of 2 ml, less the part that every volume has: (5 % of it)² + (0.5 ml)²."""
    found = standard_deviations([2.0, 2.0], P, refits, voxel_ml=voxel_ml, pixel_mm2=pixel_mm2)
    return np.square(found) - (0.1**2 + 0.5**2)


def test_voxels_on_a_border_count_as_patches():
    assert variances(pixel_mm2=22.0) == pytest.approx(88 / 22 * 0.46)
    assert variances(pixel_mm2=400.0) == pytest.approx(0.46)  # a voxel larger than a patch is a patch of its own
    assert variances(voxel_ml=0.5) == pytest.approx(0.25 * 0.46)


def test_refits_add_their_mean_square_distance():
    assert variances([[2.0, 1.0], [5.0, 3.0]]) == pytest.approx([0.46 + 4.5, 0.46 + 1.0])
    assert variances([[2.0, 2.0]] * 3) == pytest.approx(variances())


@pytest.mark.parametrize(
    ("reach", "ends"), [((-2.0, 1.0), (4.0, 13.0)), ((1.0, 2.0), (10.0, 16.0)), ((-9, 9), (0, 20))]
)
def test_the_ends_are_so_many_standard_deviations_away_and_hold_the_volume(reach, ends):
    assert interval(10.0, 3.0, reach, mask_ml=20.0) == pytest.approx((10.0, 3.0, *ends))


def test_a_method_that_was_not_measured_has_no_interval():
    assert uncertainty.reach("infarct", "deepg", "blood") is None
    assert interval(10.0, 3.0, None, mask_ml=20.0) == (10.0, 3.0, None, None)


@pytest.mark.parametrize(("name", "method"), [("infarct", "anatomy"), ("infarct", "svgmm"), ("brain", "pvgmm")])
def test_the_calibrated_methods_know_every_tissue_of_their_protocol(name, method):
    for tissue in protocol.load(name).tissues:
        if tissue.hyperintense is None:  # no phantom has lesions
            low, high = uncertainty.reach(name, method, tissue.name)
            assert low < high


@pytest.mark.parametrize(
    ("volume", "high", "flagged"),
    [(10.0, 79.0, False), (10.0, 81.0, True), (1.0, 23.0, False), (1.0, 25.0, True), (0.0, 99.0, False)],
)
def test_flagged_is_an_interval_of_eight_volumes_or_eight_times_three_percent_of_the_mask(volume, high, flagged):
    rest = uncertainty.Interval(100.0 - volume, 5.0, 90.0, 110.0)
    assert uncertainty.unsure([rest, uncertainty.Interval(volume, 5.0, 0.0, high)]) == [False, flagged]
    assert uncertainty.unsure([rest, uncertainty.Interval(volume, 5.0, None, None)]) == [False, False]


# Perturbed priors -----------------------------------------------------------------------------------------------------


def test_a_draw_depends_on_the_seed_and_the_number_alone():
    assert perturbed(INFARCT, 3, 1) == perturbed(INFARCT, 3, 1)
    made = [perturbed(INFARCT, seed, number) for seed in (0, 3, (1 << 63) - 1) for number in (0, 1, 2)]
    assert all(a != b for i, a in enumerate(made) for b in [INFARCT, *made[:i]])


def test_only_levels_and_the_usual_radius_are_moved():
    for number in range(5):
        made = perturbed(INFARCT, 0, number)
        assert made.anatomy.radius[0] != INFARCT.anatomy.radius[0]
        assert made.anatomy.radius[1] == INFARCT.anatomy.radius[1]
        for ours, theirs in zip(made.tissues, INFARCT.tissues, strict=True):
            assert set(ours.level) == set(theirs.level)
            assert all(ours.level[s] != theirs.level[s] for s in theirs.level)
        back = dataclasses.replace(
            made,
            anatomy=dataclasses.replace(made.anatomy, radius=INFARCT.anatomy.radius),
            tissues=tuple(
                dataclasses.replace(t, level=o.level) for t, o in zip(made.tissues, INFARCT.tissues, strict=True)
            ),
        )
        assert back == INFARCT


def test_levels_and_radii_move_as_far_as_they_are_said_to():
    made = [perturbed(INFARCT, 0, number) for number in range(200)]
    radii = [m.anatomy.radius[0] - INFARCT.anatomy.radius[0] for m in made]
    moved = [
        ours.level[s] - theirs.level[s]
        for m in made
        for ours, theirs in zip(m.tissues, INFARCT.tissues, strict=True)
        for s in theirs.level
    ]
    assert np.std(radii) == pytest.approx(0.04, rel=0.25)
    assert np.std(moved) == pytest.approx(0.2, rel=0.1)
    assert abs(np.mean(moved)) < 0.03


def test_the_inner_border_stays_inside_the_wall(monkeypatch):
    monkeypatch.setattr(uncertainty, "RADIUS_PERTURBATION", 10.0)
    radii = [perturbed(INFARCT, 0, number).anatomy.radius[0] for number in range(20)]
    assert {min(radii), max(radii)} == {0.1, 0.9}


def test_a_protocol_without_anatomy_can_be_perturbed():
    brain = protocol.load("brain")
    made = perturbed(brain, 0, 0)
    assert made.anatomy is None
    assert [(t.name, t.index) for t in made.tissues] == [(t.name, t.index) for t in brain.tissues]


# A run ----------------------------------------------------------------------------------------------------------------


def test_the_sidecars_volumes_are_those_of_the_table(run):
    with (run / "measurements.tsv").open(encoding="utf-8", newline="") as file:
        rows = {(r["patient"], r["tissue"]): float(r["volume_ml"]) for r in csv.DictReader(file, delimiter="\t")}
    for patient in ("pat1", "pat2"):
        told = sidecar(run, patient)["uncertainty"]
        assert (told["level"], list(told["volumes"])) == (0.9, TISSUES)
        for tissue, found in told["volumes"].items():
            assert found["volume_ml"] == pytest.approx(rows[patient, tissue], abs=1e-4)
            assert 0 <= found["low_ml"] <= found["volume_ml"] <= found["high_ml"]
            assert found["high_ml"] <= (heart() > 0).sum() * VOXEL_ML + 1e-4


def test_overlapping_tissues_are_less_certain(patients, run):
    blurred, clear = (sidecar(run, patient)["uncertainty"] for patient in ("pat1", "pat2"))
    assert blurred["entropy"] > clear["entropy"] >= 0
    first, second = (
        deviations(room.segment(study(patients, patient), config.build(settings=["perturbations=0"])))
        for patient in ("pat1", "pat2")
    )
    assert sum(first) > sum(second)


def test_the_entropy_map_is_that_of_the_probabilities(run):
    found = map_of(run, "entropy")
    p = np.moveaxis(map_of(run, "probseg").get_fdata(dtype=np.float32), -1, 0)
    assert found.get_data_dtype() == np.float32
    values, inside = found.get_fdata(), heart() > 0
    np.testing.assert_allclose(values, entropy(p), atol=1e-6)
    assert not values[~inside].any()
    assert values.min() >= 0
    assert values.max() <= 1 + 1e-6
    assert sidecar(run)["uncertainty"]["entropy"] == pytest.approx(values[inside].mean(), abs=1e-4)


@pytest.mark.usefixtures("no_picture")
@pytest.mark.parametrize(
    "affine",
    [
        np.array([[0, 0, 8.0, 3], [-1.5, 0, 0, 4], [0, 1.5, 0, 5], [0, 0, 0, 1]]),
        AFFINE @ np.diag([-1, 1, 1, 1.0]),
        np.array([[1.2, -0.9, 0, 7], [0.9, 1.2, 0, 8], [0, 0, 8.0, 9], [0, 0, 0, 1]]),
    ],
    ids=["PSR", "flipped", "oblique"],
)
def test_the_entropy_map_lies_on_the_sources_grid(tmp_path, make_patient, affine):
    made = make_patient(tmp_path / "in", "pat1", affine=affine)
    assert main(["segment", str(tmp_path / "in"), str(tmp_path / "out"), "--probabilities", "-q"]) == 0
    found, source = map_of(tmp_path / "out", "entropy"), nib.load(made["LGE"])
    assert found.shape == source.shape
    np.testing.assert_array_equal(found.affine, source.affine)
    assert not found.get_fdata()[heart() == 0].any()


@pytest.mark.usefixtures("no_picture")
def test_there_is_an_entropy_map_only_where_probabilities_are_asked_for(patients, tmp_path):
    asked = ["segment", str(patients), str(tmp_path), "--patients", "pat2", "-q"]
    assert main(asked) == 0
    assert not (tmp_path / "pat2" / "pat2_entropy.nii.gz").exists()
    assert main([*asked, "--probabilities"]) == 0
    path = tmp_path / "pat2" / "pat2_entropy.nii.gz"
    whole = path.read_bytes()
    path.unlink()
    assert main([*asked, "--probabilities"]) == 0  # a file that is missing is made again
    assert path.read_bytes() == whole
    assert main([*asked, "--overwrite"]) == 0
    assert not path.exists()  # nobody takes an older run's for this one's


@pytest.mark.usefixtures("no_picture")
def test_the_same_run_gives_the_same_bytes(patients, run, tmp_path):
    assert main(["segment", str(patients), str(tmp_path), "--probabilities", "--seed", "5", "-q"]) == 0
    for suffix in ("dseg.nii.gz", "probseg.nii.gz", "entropy.nii.gz", "dseg.json"):
        ours, theirs = (folder / "pat1" / f"pat1_{suffix}" for folder in (tmp_path, run))
        assert ours.read_bytes() == theirs.read_bytes()


def by_voxels(made: room.Segmentation) -> list[float]:
    """The standard deviation of each tissue's volume that its probabilities and its size alone give."""
    p = made.probabilities.astype(np.float64)
    border = [VOXEL_ML**2 * 88 / PIXEL_MM2 * (q * (1 - q)).sum() for q in p]
    return [math.sqrt(b + (0.05 * v) ** 2 + 0.25) for b, v in zip(border, volumes(made), strict=True)]


def volumes(segmentation: room.Segmentation) -> list[float]:
    return [float((segmentation.labels == t.index).sum()) * VOXEL_ML for t in segmentation.tissues]


def deviations(segmentation: room.Segmentation) -> list[float]:
    return [v["sd_ml"] for v in segmentation.sidecar["uncertainty"]["volumes"].values()]


@pytest.mark.parametrize("method", ["gmm", "svgmm"])
def test_without_priors_only_the_voxels_count(patients, method):
    made = room.segment(study(patients), config.build(method=method))
    assert deviations(made) == pytest.approx(by_voxels(made), abs=1e-4)


def test_no_perturbations_leave_the_voxels(patients):
    made = room.segment(study(patients), config.build(settings=["perturbations=0"]))
    assert deviations(made) == pytest.approx(by_voxels(made), abs=1e-4)


@pytest.mark.parametrize("presence", ["true", "false"])
def test_restarts_are_segmentations_by_perturbed_protocols(patients, presence):
    # Of the plain scene, whose noise moves single voxels from one tissue to the other.
    asked = config.build(settings=["perturbations=2", f"presence={presence}", "smooth_noise=false"], seed=5)
    made = room.segment(study(patients), asked)
    alone = dataclasses.replace(asked, method=dataclasses.replace(asked.method, perturbations=0))
    restarts = [
        volumes(room.segment(study(patients), dataclasses.replace(alone, protocol=perturbed(INFARCT, 5, number))))
        for number in range(2)
    ]
    assert len({tuple(r) for r in [volumes(made), *restarts]}) == 3
    wanted = [
        math.sqrt(sd**2 + sum((r[k] - volumes(made)[k]) ** 2 for r in restarts) / 2)
        for k, sd in enumerate(by_voxels(made))
    ]
    assert deviations(made) == pytest.approx(wanted, abs=1e-4)


def test_perturbations_change_no_label(patients, run):
    made = room.segment(study(patients), config.build(settings=["perturbations=0"], seed=5))
    np.testing.assert_array_equal(made.labels, np.asarray(map_of(run, "dseg").dataobj))


def with_a_small_slice(folder: Path) -> Path:
    """A third slice whose mask has too few voxels for a fit of its own."""
    for path in folder.glob("*.nii.gz"):
        data = np.asanyarray(nib.load(path).dataobj).copy()
        if path.name.endswith("_gd.nii.gz"):
            data[..., 2] = 0
            data[22:28, 22:28, 2] = 500
        save(path, data)
    return folder


@pytest.mark.parametrize("small", [False, True])
def test_priors_that_are_not_moved_add_nothing(tmp_path, make_patient, monkeypatch, small):
    make_patient(tmp_path, "pat1", shape=(48, 48, 3))
    if small:
        with_a_small_slice(tmp_path)
    monkeypatch.setattr(uncertainty, "LEVEL_PERTURBATION", 0.0)
    monkeypatch.setattr(uncertainty, "RADIUS_PERTURBATION", 0.0)
    made = room.segment(study(tmp_path), config.build())
    assert any(w.startswith("W_SMALL") for w in made.warnings) == small
    assert deviations(made) == pytest.approx(by_voxels(made), abs=1e-4)


def test_the_sidecar_agrees_with_what_is_measured(patients):
    made = room.segment(study(patients), config.build(settings=["perturbations=1"]))
    told = made.sidecar["uncertainty"]["volumes"]
    for row in measure.measure(made):
        assert told[row.tissue]["volume_ml"] == pytest.approx(row.volume_ml, abs=1e-4)


# Who is flagged -------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("no_picture")
@pytest.mark.parametrize("unsure", [0.01, 1e9])
def test_the_flag_is_in_the_sidecar_and_the_table(patients, tmp_path, monkeypatch, unsure):
    monkeypatch.setattr(uncertainty, "UNSURE", unsure)
    assert main(["segment", str(patients), str(tmp_path), "--patients", "pat1", "-q"]) == 0
    told = [w for w in sidecar(tmp_path)["warnings"] if w.startswith("W_UNSURE")]
    assert bool(told) == (unsure < 1)
    for warning in told:
        assert warning in (tmp_path / "summary.tsv").read_text(encoding="utf-8")
        for tissue, found in sidecar(tmp_path)["uncertainty"]["volumes"].items():
            assert f"{tissue} {found['low_ml']:.1f} to {found['high_ml']:.1f} ml" in warning
