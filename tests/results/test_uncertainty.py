"""How sure a segmentation is: entropies and intervals by hand, perturbed priors, and what a run writes of them."""

from __future__ import annotations

import csv
import dataclasses
import math
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from conftest import heart, save
from outcomes import image_of, labels_of, sidecar, study

from monai_deepgmm import protocol
from monai_deepgmm.cli import main
from monai_deepgmm.methods.config import build
from monai_deepgmm.results import uncertainty
from monai_deepgmm.results.segment import Segmentation, segment
from monai_deepgmm.results.uncertainty import Interval, entropy, intervals, perturbed

INFARCT = protocol.load("infarct")
TISSUES = [t.name for t in INFARCT.tissues]
#: Of the tiny patients: a voxel in ml, and its area in mm².
VOXEL_ML, PIXEL_MM2 = 1.5 * 1.5 * 8 / 1000, 1.5 * 1.5


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


@pytest.mark.parametrize("k", [2, 3, 4, 7])
def test_entropy_is_nothing_for_the_certain_and_one_for_the_clueless(k):
    p = np.zeros((k, 3, 1, 1), dtype=np.float32)
    p[k - 1, 0] = 1  # certain
    p[:, 1] = 1 / k  # uniform; the third voxel lies outside the mask
    found = entropy(p)
    assert (found.shape, found.dtype) == ((3, 1, 1), np.float32)
    assert found[:, 0, 0] == pytest.approx([0, 1, 0], abs=1e-6)
    assert not entropy(np.ones((1, 2, 2, 1), dtype=np.float32)).any()  # the only tissue is certain


def test_entropy_by_hand():
    p = np.array([0.5, 0.5, 0, 0, 0.7, 0.2, 0.1, 0], dtype=np.float64).reshape(2, 4).T.reshape(4, 2, 1, 1)
    wanted = [math.log(2) / math.log(4), -sum(q * math.log(q) for q in (0.7, 0.2, 0.1)) / math.log(4)]
    assert entropy(p)[:, 0, 0] == pytest.approx(wanted, rel=1e-6)


#: Two tissues in five voxels, one of them outside the mask: Σ p (1 − p) is 0.21 + 0.25 for either.
P = np.array([[1, 0, 0.3, 0.5, 0], [0, 1, 0.7, 0.5, 0]], dtype=np.float64).reshape(2, 5, 1, 1)


def interval(volumes=(2.0, 2.0), restarts=(), *, pixel_mm2=22.0, calibration=1.0) -> list[Interval]:
    return intervals(volumes, P, restarts, voxel_ml=1.0, pixel_mm2=pixel_mm2, calibration=calibration)


def test_voxels_on_a_border_count_as_patches():
    for found in interval():
        assert found.sd_ml == pytest.approx(math.sqrt(88 / 22 * 0.46))
    for found in interval(pixel_mm2=400):  # a voxel larger than a patch is a patch of its own
        assert found.sd_ml == pytest.approx(math.sqrt(0.46))
    made = intervals([2.0, 2.0], P, [], voxel_ml=0.5, pixel_mm2=88.0)  # the variance goes with a voxel's square
    assert made[0].sd_ml == pytest.approx(0.5 * math.sqrt(0.46))


def test_restarts_add_their_mean_square_distance():
    first, second = interval(restarts=[[2.0, 1.0], [5.0, 3.0]], pixel_mm2=88.0)
    assert first.sd_ml == pytest.approx(math.sqrt(0.46 + (0 + 9) / 2))
    assert second.sd_ml == pytest.approx(math.sqrt(0.46 + (1 + 1) / 2))
    same = interval(restarts=[[2.0, 2.0]] * 3, pixel_mm2=88.0)
    assert [f.sd_ml for f in same] == [f.sd_ml for f in interval(pixel_mm2=88.0)]


def test_the_ends_are_a_calibrated_quantile_away():
    (found, _) = interval(pixel_mm2=88.0, calibration=1.5)
    reach = 1.6449 * 1.5 * math.sqrt(0.46)
    assert found == pytest.approx((2.0, math.sqrt(0.46), 2 - reach, 2 + reach))
    assert found.low_ml > 0
    assert found.high_ml < 4
    default = intervals([2.0, 2.0], P, [], voxel_ml=1.0, pixel_mm2=1e3)[0]
    assert default.sd_ml == pytest.approx(found.sd_ml)
    assert default.low_ml == max(2 - 1.6449 * uncertainty.CALIBRATION * found.sd_ml, 0)


@pytest.mark.parametrize("calibration", [0, 0.1, 1, 50, 100])
def test_an_interval_holds_its_volume_and_nothing_impossible(calibration):
    for volumes in ((0.0, 4.0), (4.0, 0.0), (1.0, 3.0)):
        for found, volume in zip(interval(volumes, calibration=calibration), volumes, strict=True):
            assert found.volume_ml == volume
            assert 0 <= found.low_ml <= volume <= found.high_ml <= 4 + 1e-9  # four voxels of 1 ml
    assert [(f.low_ml, f.high_ml) for f in interval((0.0, 4.0), calibration=100)] == [(0, pytest.approx(4))] * 2
    for found in intervals([1.0, 2.0], (P > 0.6).astype(np.float64), [], voxel_ml=1.0, pixel_mm2=1.0):
        assert found.sd_ml == 0  # whoever is certain
        assert found.low_ml == found.volume_ml == found.high_ml


def test_a_draw_depends_on_the_seed_and_the_number_alone():
    assert perturbed(INFARCT, 3, 1) == perturbed(INFARCT, 3, 1)
    made = [perturbed(INFARCT, seed, number) for seed in (0, 3, (1 << 63) - 1) for number in (0, 1, 2)]
    assert all(a != b for i, a in enumerate(made) for b in [INFARCT, *made[:i]])


def test_only_levels_and_the_usual_radius_are_moved():
    for number in range(5):
        made = perturbed(INFARCT, 0, number)
        assert made.anatomy.radius[0] != INFARCT.anatomy.radius[0]
        pairs = list(zip(made.tissues, INFARCT.tissues, strict=True))
        assert all(ours.level.keys() == theirs.level.keys() for ours, theirs in pairs)
        assert all(ours.level[s] != theirs.level[s] for ours, theirs in pairs for s in theirs.level)
        radius = (INFARCT.anatomy.radius[0], made.anatomy.radius[1])
        tissues = tuple(dataclasses.replace(ours, level=theirs.level) for ours, theirs in pairs)
        back = dataclasses.replace(made, anatomy=dataclasses.replace(made.anatomy, radius=radius), tissues=tissues)
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


def test_what_a_draw_can_reach(monkeypatch):
    monkeypatch.setattr(uncertainty, "RADIUS_PERTURBATION", 10.0)
    radii = [perturbed(INFARCT, 0, number).anatomy.radius[0] for number in range(20)]
    assert {min(radii), max(radii)} == {0.1, 0.9}  # the inner border stays inside the wall
    brain = protocol.load("brain")
    made = perturbed(brain, 0, 0)
    assert made.anatomy is None
    assert [(t.name, t.index) for t in made.tissues] == [(t.name, t.index) for t in brain.tissues]


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
    config = build(settings=["perturbations=0"])
    first, second = (sum(deviations(segment(study(patients, patient), config))) for patient in ("pat1", "pat2"))
    assert first > second


def test_the_entropy_map_is_that_of_the_probabilities(run):
    found = image_of(run, "entropy")
    p = np.moveaxis(image_of(run, "probseg").get_fdata(dtype=np.float32), -1, 0)
    assert found.get_data_dtype() == np.float32
    values, inside = found.get_fdata(), heart() > 0
    np.testing.assert_allclose(values, entropy(p), atol=1e-6)
    assert not values[~inside].any()
    assert values.min() >= 0
    assert values.max() <= 1 + 1e-6
    assert sidecar(run)["uncertainty"]["entropy"] == pytest.approx(values[inside].mean(), abs=1e-4)


@pytest.mark.usefixtures("no_picture")
def test_a_run_gives_the_same_bytes_and_an_entropy_map_where_probabilities_are_asked_for(patients, run, tmp_path):
    asked = ["segment", str(patients), str(tmp_path), "--patients", "pat1", "--seed", "5", "-q"]
    path = tmp_path / "pat1" / "pat1_entropy.nii.gz"
    assert main(asked) == 0
    assert not path.exists()
    for _ in range(2):
        assert main([*asked, "--probabilities"]) == 0
        for suffix in ("dseg.nii.gz", "probseg.nii.gz", "entropy.nii.gz", "dseg.json"):
            ours, theirs = (folder / "pat1" / f"pat1_{suffix}" for folder in (tmp_path, run))
            assert ours.read_bytes() == theirs.read_bytes()
        path.unlink()  # a file that is missing is made again
    assert main([*asked, "--probabilities"]) == 0
    assert main([*asked, "--overwrite"]) == 0
    assert not path.exists()  # nobody takes an older run's for this one's


def by_voxels(probabilities: np.ndarray) -> list[float]:
    """The standard deviation of each tissue's volume that its probabilities alone give."""
    p = probabilities.astype(np.float64)
    return [math.sqrt(VOXEL_ML**2 * 88 / PIXEL_MM2 * (q * (1 - q)).sum()) for q in p]


def volumes(segmentation: Segmentation) -> list[float]:
    return [float((segmentation.labels == t.index).sum()) * VOXEL_ML for t in segmentation.tissues]


def deviations(segmentation: Segmentation) -> list[float]:
    return [v["sd_ml"] for v in segmentation.sidecar["uncertainty"]["volumes"].values()]


@pytest.mark.parametrize(("method", "settings"), [("gmm", []), ("svgmm", []), ("anatomy", ["perturbations=0"])])
def test_without_moved_priors_only_the_voxels_count(patients, run, method, settings):
    made = segment(study(patients), build(method=method, settings=settings, seed=5))
    assert deviations(made) == pytest.approx(by_voxels(made.probabilities), abs=1e-4)
    if method == "anatomy":  # moving them changes no label
        np.testing.assert_array_equal(made.labels, labels_of(run))
    else:
        assert min(deviations(made)) > 0


@pytest.mark.parametrize("presence", ["true", "false"])
def test_restarts_are_segmentations_by_perturbed_protocols(patients, presence):
    asked = build(settings=["perturbations=2", f"presence={presence}"], seed=5)
    made = segment(study(patients), asked)
    alone = dataclasses.replace(asked, method=dataclasses.replace(asked.method, perturbations=0))
    restarts = [
        volumes(segment(study(patients), dataclasses.replace(alone, protocol=perturbed(INFARCT, 5, number))))
        for number in range(2)
    ]
    assert len({tuple(r) for r in [volumes(made), *restarts]}) == 3
    wanted = [
        math.sqrt(sd**2 + sum((r[k] - volumes(made)[k]) ** 2 for r in restarts) / 2)
        for k, sd in enumerate(by_voxels(made.probabilities))
    ]
    assert deviations(made) == pytest.approx(wanted, abs=1e-4)


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
    made = segment(study(tmp_path), build())
    assert any(w.startswith("W_SMALL") for w in made.warnings) == small
    assert deviations(made) == pytest.approx(by_voxels(made.probabilities), abs=1e-4)


@pytest.mark.parametrize(
    ("volume", "low", "high", "flagged"),
    [(2.0, 0.0, 8.0, False), (2.0, 0.0, 8.1, True), (0.1, 0.0, 4.0, False), (0.1, 0.0, 4.1, True)],
)
def test_an_interval_four_times_as_wide_as_its_volume_is_flagged(patients, monkeypatch, volume, low, high, flagged):
    narrow = Interval(50.0, 1.0, 45.0, 55.0)
    made = [narrow, Interval(volume, 1.0, low, high), narrow, narrow]
    monkeypatch.setattr(uncertainty, "intervals", lambda *given, **named: made)
    told = segment(study(patients, "pat2"), build(settings=["perturbations=0"])).warnings
    wanted = f"W_UNSURE: volumes are uncertain ({TISSUES[1]} {low:.1f} to {high:.1f} ml); check the page with care"
    assert told == (wanted,) * flagged


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
