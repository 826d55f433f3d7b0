"""Noise: measured, smoothed where it is notable, said so; everything else stays as it is."""

from __future__ import annotations

import nibabel as nib
import numpy as np
import pytest
from scenes import INFARCT, labels, sidecar
from scipy.ndimage import gaussian_filter

from monai_deepgmm.cli import main
from monai_deepgmm.images import labels as reference_labels
from monai_deepgmm.images import nifti, noise
from monai_deepgmm.images.preparation import LoadStudyd, SmoothNoised
from monai_deepgmm.patients import discovery
from monai_deepgmm.results import metrics

PIXEL = (1.5, 1.5)


def disc(n: int = 64) -> np.ndarray:
    """A round mask in three slices, the last of which it leaves out."""
    x, y = np.mgrid[:n, :n] - (n - 1) / 2
    inside = np.hypot(x, y) < 0.4 * n
    return np.stack([inside, inside, np.zeros_like(inside)])


def shown(sd: float, seed: int = 0) -> np.ndarray:
    """Smooth blobs of such a standard deviation."""
    blobs = gaussian_filter(np.random.default_rng(seed).normal(size=(3, 64, 64)), (0, 6, 6))
    return 100 + sd * blobs / blobs.std()


@pytest.mark.parametrize("share", [0.0, 0.1, 0.4, 1.0])
def test_the_share_of_noise_that_was_added_is_found(share):
    mask, clean = disc(), shown(10)
    spread = clean[mask].std()
    image = clean + np.random.default_rng(1).normal(0, share * spread, clean.shape)
    found = noise.examine(image, mask, PIXEL)
    assert found.share == pytest.approx(share, rel=0.25, abs=0.01)
    assert (found.smoothing_mm > 0) == (share > noise.NOTABLE)
    assert noise.examine(7 * image - 3000, mask, PIXEL).share == pytest.approx(found.share, rel=1e-6)


def test_shading_and_edges_are_no_noise():
    mask = disc()
    x = np.mgrid[:64, :64][0]
    steps = np.stack([np.where(x > 30, 200.0, 100.0) + 3 * x] * 3)
    assert noise.examine(steps, mask, PIXEL) == (0, 0)
    assert noise.examine(np.full((3, 64, 64), 5.0), mask, PIXEL) == (0, 0)
    assert noise.examine(steps, np.zeros_like(mask), PIXEL) == (0, 0)


def test_what_is_left_is_a_small_share_and_small_organs_are_smoothed_little():
    mask, clean = disc(), shown(10)
    rng = np.random.default_rng(2)
    image = clean + rng.normal(0, 0.35 * clean[mask].std(), clean.shape)
    found = noise.examine(image, mask, PIXEL)
    quiet = noise.smoothed(image, mask, PIXEL, found.smoothing_mm)
    left = (quiet - noise.smoothed(clean, mask, PIXEL, found.smoothing_mm))[mask].std() / clean[mask].std()
    assert left == pytest.approx(noise.LEFT, rel=0.3)
    less = noise.examine(image, mask, PIXEL, left=noise.LEFT_AVERAGED).smoothing_mm
    assert less == pytest.approx(found.smoothing_mm * noise.LEFT / noise.LEFT_AVERAGED)
    tiny = (0.2, 0.2)  # an organ of 10 mm
    assert noise.examine(rng.normal(size=image.shape), mask, tiny).smoothing_mm <= noise.MOST * 0.8 * 64 * 0.2


def test_hot_and_missing_voxels_are_neither_changed_nor_spread():
    mask, image = disc(), np.random.default_rng(3).normal(100, 10, (3, 64, 64))
    image[0, 30, 30], image[1, 20:24, 30:34] = 5000, 0
    quiet = noise.smoothed(image, mask, PIXEL, 2.0)
    assert quiet[0, 30, 30] == 5000
    assert (quiet[1, 20:24, 30:34] == 0).all()
    assert quiet[0, 28:33, 31:33].max() < 130
    assert quiet[1, 24, 30:34].min() > 80


@pytest.fixture(scope="module")
def patients(tmp_path_factory):
    """A phantom as it is, and two with noise of a fifth of their range on every sequence: one alone proves little."""
    folder = tmp_path_factory.mktemp("noise") / "in"
    assert main(["phantom", str(folder), "-n", "3", "--seed", "4", "--set", "slices=[3, 3]"]) == 0
    rng = np.random.default_rng(0)
    for study in discovery.find(folder, INFARCT).studies[1:]:
        inside = nib.load(study.truth).get_fdata() > 0
        for path in study.images.values():
            image = nib.load(path)
            values = np.asarray(image.dataobj)
            noisy = values + rng.normal(0, 0.2 * np.ptp(np.percentile(values[inside], (2, 98))), values.shape)
            nib.save(nib.Nifti1Image(noisy.astype(np.float32), image.affine), path)
    return folder


def test_a_noisy_patient_is_smoothed_and_told_and_a_quiet_one_is_untouched(patients, tmp_path):
    out, off = tmp_path / "out", tmp_path / "off"
    assert main(["segment", str(patients), str(out)]) == 0
    assert main(["segment", str(patients), str(off), "--set", "smooth_noise=false"]) == 0
    studies = discovery.find(patients, INFARCT).studies
    quiet, *noisy = studies
    for study, told in ((quiet, 0), *((study, 3) for study in noisy)):
        about = sidecar(out, study.patient)
        assert sum("W_NOISE" in warning for warning in about["warnings"]) == told
        smoothing = {s: about["inputs"][s]["noise"]["smoothing_mm"] for s in study.images}
        assert all((mm > 0) == bool(told) for mm in smoothing.values())
        assert not told or smoothing["LGE"] < smoothing["T2"]
        assert not any("W_NOISE" in warning for warning in sidecar(off, study.patient)["warnings"])
    assert np.array_equal(labels(out, quiet.patient), labels(off, quiet.patient))
    dice = {way: np.mean([mean_dice(study, labels(way, study.patient)) for study in noisy]) for way in (out, off)}
    assert dice[out] > dice[off]
    scan = LoadStudyd(INFARCT)({"study": quiet})["scan"]
    assert SmoothNoised()({"scan": scan})["scan"].image is scan.image


def mean_dice(study, found) -> float:
    """Over the tissues."""
    real = reference_labels.read(study, INFARCT, tuple(study.images), like=nifti.read(study.images["LGE"])).labels
    return float(np.nanmean(metrics.overlap(metrics.confusion(found, real, [1, 2, 3, 4])).dice))
