"""Synthetic brains: reproducible, with reference labels that are shares of voxels, and about as hard as real ones."""

from __future__ import annotations

import json
from dataclasses import replace

import nibabel as nib
import numpy as np
import pytest

from monai_deepgmm import cli, protocol
from monai_deepgmm.errors import UsageError
from monai_deepgmm.patients import discovery
from monai_deepgmm.phantom.brain import BrainConfig, BrainPatient, make_patient, write_cohort
from monai_deepgmm.phantom.brain_shapes import AVERAGE_MM, Part, Waves, draw, fractions
from monai_deepgmm.phantom.heart import configured

GM, WM, CSF, LESION = 1, 2, 3, 4
#: A whole brain on coarse voxels.
COARSE = BrainConfig(shape=(64, 76, 64), spacing_mm=2.2)
#: Half of each axis: a little brain, where only the plumbing matters.
SMALL = BrainConfig(shape=(32, 36, 32), spacing_mm=2.2)


@pytest.fixture(scope="module")
def brain() -> BrainPatient:
    return make_patient(COARSE, 7, 1)


@pytest.fixture(scope="module")
def default() -> BrainPatient:
    return make_patient(replace(BrainConfig(), sequences=("T1",)), 7, 1)


def spread(patient: BrainPatient, sequence: str, tissue: int) -> tuple[float, float]:
    values = patient.images[sequence][patient.labels == tissue]
    return float(values.mean()), float(values.std())


def assert_same(one: BrainPatient, other: BrainPatient) -> None:
    """Whatever sequences the first has."""
    for name in ("labels", "fractions", "affine"):
        np.testing.assert_array_equal(getattr(one, name), getattr(other, name))
    for sequence, image in one.images.items():
        np.testing.assert_array_equal(image, other.images[sequence])


def test_tissues_have_a_brains_shares_and_sulci_reach_below_the_surface(default):
    gm, wm, csf = (np.mean(default.labels[default.mask] == tissue) for tissue in (GM, WM, CSF))
    assert 0.40 < gm < 0.48
    assert 0.35 < wm < 0.46
    assert 0.10 < csf < 0.20
    assert 1100 < default.mask.sum() * 1.5**3 / 1000 < 1600  # ml
    # Fluid lies deep in the brain: in sulci and ventricles, not just around it.
    inside = default.mask.copy()
    for _ in range(6):  # 9 mm from the surface
        for axis in range(3):
            inside = inside & np.roll(inside, 1, axis) & np.roll(inside, -1, axis)
    assert 0.03 < np.mean(default.labels[inside] == CSF) < 0.2
    assert 0.2 < np.mean(default.labels[inside] == GM) < 0.5


def test_fractions_sum_to_one_their_largest_is_the_label_and_the_brain_lies_within_the_grid(brain, default):
    for patient in (brain, default):
        assert patient.mask.any((1, 2)).sum() > 0.8 * patient.mask.shape[0]
        assert not any(np.take(patient.mask, [0, -1], axis).any() for axis in range(3))
    np.testing.assert_allclose(brain.fractions[:, brain.mask].sum(0), 1, atol=1e-5)
    assert not brain.fractions[:, ~brain.mask].any()
    np.testing.assert_array_equal(brain.fractions.argmax(0)[brain.mask] + 1, brain.labels[brain.mask])
    assert not brain.labels[~brain.mask].any()
    assert brain.fractions.min() >= 0


def test_partial_volume_is_real_and_can_be_left_out(brain):
    crisp = make_patient(replace(COARSE, partial_volume=False), 7, 1)
    np.testing.assert_array_equal(crisp.labels, brain.labels)
    assert set(np.unique(crisp.fractions)) == {0, 1}
    mixed = (brain.fractions.max(0) < 0.9) & brain.mask
    assert 0.3 < mixed.sum() / brain.mask.sum() < 0.8
    for tissue in (GM, WM, CSF):  # what voxels share with others widens the tissue's histogram
        assert spread(crisp, "T1", tissue)[1] < spread(brain, "T1", tissue)[1]


def test_cortex_is_a_ribbon_three_millimetres_thick():
    """Its volume over the area of its border with white matter."""
    shares = draw(np.random.default_rng(3), AVERAGE_MM).shares(*[np.arange(-75.0, 75.0, 1.0)] * 3)
    jumps = sum(np.abs(np.diff(shares[Part.WHITE], axis=axis)).sum() for axis in range(3))
    assert 2.2 < shares[Part.CORTEX].sum() / (jumps * 2 / 3) < 4.2  # Cauchy: a mean over directions


def test_a_brain_is_the_same_on_any_grid():
    anatomy, volumes = draw(np.random.default_rng(3), AVERAGE_MM), []
    for spacing in (2.0, 3.0):
        shares, held = fractions(anatomy, [np.arange(-81 + spacing / 2, 81, spacing)] * 3)
        np.testing.assert_allclose(shares.sum(0), held)
        volumes.append(shares.sum((1, 2, 3)) * spacing**3)
    np.testing.assert_allclose(volumes[0], volumes[1], rtol=0.03)


@pytest.fixture(scope="module")
def sick() -> BrainPatient:
    return make_patient(replace(COARSE, hard=True), 7, 1)


def test_a_hard_brain_has_lesions_and_an_edge_that_is_dark_in_every_sequence(brain, sick):
    lesion = sick.labels == LESION
    assert 1 < lesion.sum() * 2.2**3 / 1000 < 30  # ml
    assert (brain.labels[lesion] == WM).mean() > 0.9
    assert spread(sick, "FLAIR", LESION)[0] > 1.15 * spread(sick, "FLAIR", GM)[0]
    assert (sick.mask | brain.mask == sick.mask).mean() > 0.99
    edge = sick.mask & ~brain.mask
    assert 0.02 < edge.sum() / brain.mask.sum() < 0.3
    for sequence, image in sick.images.items():
        assert np.median(image[edge]) < 0.6 * np.median(image[brain.mask]), sequence
    t1 = sick.images["T1"]
    assert (t1[sick.mask] > 2.5 * np.median(t1[sick.labels == WM])).mean() == pytest.approx(0.001, abs=0.0005)


def test_a_hard_brain_keeps_its_grey_matter(sick, tmp_path):
    """As real scans it loses it (GM 19 %, WM 67 %) where the edge is fitted and all sequences share one fit."""
    config = ["--protocol", "brain", "--set"]
    shown = [f"shape={list(COARSE.shape)}", "spacing_mm=2.2", "hard=true"]
    assert cli.main(["phantom", str(tmp_path / "in"), "-n", "1", "--seed", "7", *config, *shown]) == 0
    assert cli.main(["segment", str(tmp_path / "in"), str(tmp_path / "out"), "--protocol", "brain", "-q"]) == 0
    found = np.asarray(nib.load(tmp_path / "out" / "Brain001" / "Brain001_dseg.nii.gz").dataobj)
    shares = {tissue: np.mean(found[sick.mask] == tissue) for tissue in (GM, WM)}
    assert 0.35 < shares[GM] < 0.55
    assert 0.3 < shares[WM] < 0.45
    lesion, known = found == LESION, sick.labels == LESION
    assert 2 * (lesion & known).sum() / (lesion.sum() + known.sum()) > 0.45


def test_waves_have_variance_one_and_their_slope_is_their_own():
    waves, axis = Waves.draw(np.random.default_rng(0), 20.0), np.arange(0, 100, 0.5)
    value, *slope = waves.on(axis, axis[:80], axis[:80], slope=True).astype(float)
    assert value.mean() == pytest.approx(0, abs=0.1)
    assert value.std() == pytest.approx(1, abs=0.15)
    middle = (slice(1, -1),) * 3
    for own, found in zip(slope, np.gradient(value, 0.5), strict=True):
        np.testing.assert_allclose(found[middle], own[middle], atol=0.01)


def test_sequences_have_their_contrast(brain):
    mean = {s: [spread(brain, s, tissue)[0] for tissue in (CSF, GM, WM)] for s in ("T1", "T2", "FLAIR")}
    assert mean["T1"] == sorted(mean["T1"])
    assert mean["T2"] == sorted(mean["T2"], reverse=True)
    csf, gm, wm = mean["FLAIR"]
    assert csf < 0.75 * wm < wm < gm
    for image in brain.images.values():
        assert image.dtype == np.int16
        np.testing.assert_array_equal(image > 0, brain.mask)


def test_tissues_overlap_as_they_do_in_scans(default):
    """In T1 scans at 1.5 T: standard deviations of .3 to .4 of the contrast in grey matter, .2 to .3 in white."""
    (gm, gm_sd), (wm, wm_sd) = spread(default, "T1", GM), spread(default, "T1", WM)
    assert 0.28 < gm_sd / (wm - gm) < 0.42
    assert 0.19 < wm_sd / (wm - gm) < 0.31


def test_noise_is_a_share_of_the_contrast():
    noisy, clean = (make_patient(replace(SMALL, noise=noise), 7, 1) for noise in (0.5, 0.0))
    contrast = spread(clean, "T1", WM)[0] - spread(clean, "T1", GM)[0]
    added = (noisy.images["T1"].astype(float) - clean.images["T1"])[noisy.labels == WM]
    # Partial volume takes a part of the contrast between labels.
    assert 0.4 < added.std() / contrast < 0.85
    np.testing.assert_array_equal(noisy.labels, clean.labels)


def test_seed_and_number_decide_and_fewer_sequences_change_nothing_else(brain):
    part = make_patient(replace(COARSE, sequences=("T1", "FLAIR")), 7, 1)
    assert list(part.images) == ["T1", "FLAIR"]
    assert_same(part, brain)
    assert_same(make_patient(SMALL, 7, 1), make_patient(SMALL, 7, 1))
    for seed, number in ((8, 1), (7, 2)):
        assert not np.array_equal(make_patient(SMALL, seed, number).labels, make_patient(SMALL, 7, 1).labels)


def test_shading_multiplies_by_a_smooth_field_of_its_amplitude_and_changes_nothing_else(brain):
    shaded = make_patient(replace(COARSE, shading=0.35), 7, 1)
    assert_same(replace(shaded, images={}), brain)
    fields = []
    for sequence, image in brain.images.items():
        bright = image > 150  # whole numbers: the ratio is rough where they are small
        ratio = np.where(bright, shaded.images[sequence] / np.maximum(image, 1), np.nan)
        assert np.nanmin(ratio) > 0.64
        assert np.nanmax(ratio) < 1.36
        assert np.nanmax(np.abs(ratio - 1)) > 0.28
        for axis in range(3):  # neighbours differ little; ends of an axis may differ much
            assert np.nanmax(np.abs(np.diff(ratio, axis=axis))) < 0.06
            others = tuple(a for a in range(3) if a != axis)
            across = np.nanmean(np.moveaxis(ratio, axis, 0)[brain.mask.sum(others) > 300], (1, 2))
            assert np.nanmax(across) - np.nanmin(across) > 0.01
        fields.append(ratio[brain.mask & (ratio > 0)][:100])
    assert not np.allclose(fields[0], fields[1], atol=0.02)  # each sequence has its own


def test_files_are_found_as_ready_and_hold_the_patient(tmp_path, capsys):
    config = replace(SMALL, fractions=True)
    assert write_cohort(tmp_path, 2, seed=3, config=config) == ["Brain001", "Brain002"]
    read = {p.name.split(".")[0]: nib.load(p) for p in (tmp_path / "Brain001").iterdir()}
    assert set(read) == {"T1", "T2", "FLAIR", "mask", "seg", "fractions"}
    assert cli.main(["scan", str(tmp_path), "--protocol", "brain", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["layout"] == "folder"
    assert [p["problems"] for p in found["patients"]] == [[], []]
    assert all(set(p["images"]) == {"T1", "T2", "FLAIR"} for p in found["patients"])
    study = discovery.find(tmp_path, protocol.load("brain")).studies[0]
    assert (study.mask.name, study.truth.name) == ("mask.nii.gz", "seg.nii.gz")
    patient = make_patient(config, 3, 1)
    for image in read.values():
        assert image.shape[:3] == (32, 36, 32)
        np.testing.assert_allclose(image.affine, patient.affine, atol=1e-3)
        np.testing.assert_allclose(image.header.get_zooms()[:3], 2.2, rtol=1e-5)
    data = {name: np.asarray(image.dataobj) for name, image in read.items()}
    np.testing.assert_array_equal(data["T2"], patient.images["T2"])
    np.testing.assert_array_equal(data["mask"], patient.mask)
    assert data["fractions"].shape == (32, 36, 32, 3)
    np.testing.assert_array_equal(data["seg"][patient.mask], data["fractions"].argmax(-1)[patient.mask] + 1)


def test_bytes_depend_on_configuration_seed_and_number_only(tmp_path):
    write_cohort(tmp_path / "one", 1, seed=3, config=SMALL)
    write_cohort(tmp_path / "two", 2, seed=3, config=SMALL)
    files = sorted((tmp_path / "one" / "Brain001").iterdir())
    assert len(files) == 5
    for path in files:
        assert path.read_bytes() == (tmp_path / "two" / "Brain001" / path.name).read_bytes()


def test_ibsr_naming(tmp_path):
    settings = ["naming=ibsr", "shape=[40,30,44]", "spacing_mm=[1.88,3.0,1.88]"]
    assert cli.main(["phantom", str(tmp_path), "-n", "2", "--protocol", "brain", "--set", *settings]) == 0
    found = sorted(str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*.*"))
    assert found == [f"IBSR_0{n}/IBSR_0{n}{end}.nii.gz" for n in (1, 2) for end in ("", "_seg")]
    image, seg = (nib.load(tmp_path / f"IBSR_01/IBSR_01{end}.nii.gz") for end in ("", "_seg"))
    assert image.shape == seg.shape == (40, 30, 44, 1)
    assert image.get_data_dtype() == seg.get_data_dtype() == np.int16
    np.testing.assert_allclose(image.header.get_zooms()[:3], (1.88, 3.0, 1.88), rtol=1e-5)
    values, labels = np.asarray(image.dataobj), np.asarray(seg.dataobj)
    means = [values[labels == label].mean() for label in (0, 1, 2, 3)]
    assert means == sorted(means)  # background, CSF, GM, WM


def test_grids_and_text_and_lists_that_stand_for_tuples():
    assert BrainConfig(naming="ibsr").grid == ((152, 112, 152), (0.94, 1.5, 0.94))
    assert BrainConfig(naming="ibsr", spacing_mm=2.0).grid == ((152, 112, 152), (2.0, 2.0, 2.0))
    assert BrainConfig().grid == ((96, 112, 96), (1.5, 1.5, 1.5))
    assert configured(BrainConfig, {"sequences": "T1,T2"}) == BrainConfig(sequences=("T1", "T2"))
    assert configured(BrainConfig, {"shape": [64, 64, 64]}).grid[0] == (64, 64, 64)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("shading=1", "shading 1"),
        ("shading=dark", "shading: got 'dark'"),
        ("noise=-1", "noise -1"),
        ("noise=.nan", "noise nan"),
        ("sequences=T2", "sequences"),
        ("sequences=[T1,PD]", "sequences"),
        ("shape=40", "three whole numbers"),
        ("shape=[40,40]", "three whole numbers"),
        ("shape=[20,20,20]", "no room"),
        ("spacing_mm=0", "voxels of"),
        ("spacing_mm=[1,1]", "spacing_mm"),
        ("naming=bids", "folder, ibsr"),
        ("fractions=2", "fractions"),
        ("slices=3", "no such setting of a phantom; it has naming"),
    ],
)
def test_impossible_settings_are_refused(tmp_path, capsys, setting, message):
    target = tmp_path / "none"
    assert cli.main(["phantom", str(target), "--protocol", "brain", "--set", setting]) == cli.USAGE
    assert message in capsys.readouterr().err
    assert not target.exists()


@pytest.mark.parametrize(("n", "seed", "message"), [(0, 1, "at least 1"), (1, -1, "seed -1")])
def test_impossible_cohorts_are_refused(tmp_path, n, seed, message):
    with pytest.raises(UsageError, match=message):
        write_cohort(tmp_path / "none", n, seed=seed)


def test_infarcts_take_settings_too(tmp_path):
    assert cli.main(["phantom", str(tmp_path), "-n", "1", "--set", "size=210", "slices=[2,2]"]) == 0
    assert nib.load(tmp_path / "Phantom001" / "Phantom001_T2.nii.gz").shape[2] == 2
    assert cli.main(["phantom", str(tmp_path / "none"), "--set", "slices=[2,2,2]"]) == cli.USAGE


@pytest.mark.usefixtures("no_picture")
@pytest.mark.parametrize("settings", [["sequences=T1"], ["shape=[64,76,64]", "spacing_mm=2.2"]])
def test_a_mixture_finds_the_tissues_but_not_perfectly(tmp_path, settings):
    patients, results = str(tmp_path / "in"), str(tmp_path / "out")
    assert cli.main(["phantom", patients, "-n", "1", "--seed", "7", "--protocol", "brain", "--set", *settings]) == 0
    assert cli.main(["segment", patients, results, "--protocol", "brain", "--method", "gmm"]) == 0
    assert cli.main(["evaluate", results, patients, "--protocol", "brain", "--unit", "volume"]) == 0
    dice = json.loads((tmp_path / "out" / "evaluation.json").read_text())["dice"]
    assert all(0.8 < dice[tissue]["mean"] < 0.96 for tissue in ("GM", "WM"))
