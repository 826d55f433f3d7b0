"""Brains that are made worse, and the table of what it costs."""

from __future__ import annotations

import measure_degraded
import numpy as np
import pytest
from measure_degraded import Head
from scipy.ndimage import binary_erosion

from monai_deepgmm.phantom.brain import BrainConfig, make_patient, write_cohort

SMALL = BrainConfig(shape=(28, 32, 28), spacing_mm=5.0)


@pytest.fixture(scope="module")
def head() -> Head:
    """A brain of 5 mm voxels."""
    made = make_patient(SMALL, 1, 1)
    images = {name: image.astype(np.float32) for name, image in made.images.items()}
    return Head(images, made.mask, made.labels, (5.0, 5.0, 5.0))


def made(way: str, head: Head) -> Head:
    """The head made worse in one way."""
    ways = {**measure_degraded.OTHER_WAYS, **measure_degraded.T1_WAYS}
    return ways[way](head, np.random.default_rng(0))


def test_thick_slices_hold_the_average_and_what_most_of_them_was(head):
    thick = measure_degraded.thicker(1, 10.0)(head, np.random.default_rng(0))
    assert thick.spacing_mm == (5.0, 10.0, 5.0)
    pairs = head.images["T1"].reshape(28, 16, 2, 28)
    assert np.allclose(thick.images["T1"], pairs.mean(2) * thick.mask, rtol=1e-5)
    same = head.labels[:, ::2] == head.labels[:, 1::2]
    assert (thick.labels == head.labels[:, ::2])[same & thick.mask].all()


def test_a_field_and_a_gain_multiply_and_stay_inside(head):
    t1 = head.images["T1"][head.mask]
    shaded = made("shaded by 40 %", head).images["T1"][head.mask] / t1
    assert np.abs(shaded - 1).max() == pytest.approx(0.4, abs=1e-3)
    striped = made("every other coronal slice brighter by 10 %", head).images["T1"]
    assert np.allclose(striped[:, 1::2], 1.1 * head.images["T1"][:, 1::2], rtol=1e-5)
    assert (striped[:, ::2] == head.images["T1"][:, ::2]).all()
    assert not striped[~head.mask].any()


def test_the_other_sequences_stay_as_they_are(head):
    blurred = made("FLAIR of 5 mm", head._replace(spacing_mm=(1.0, 1.0, 1.0)))
    assert (blurred.images["T1"] == head.images["T1"]).all()
    inner = binary_erosion(head.mask, iterations=5)
    steps = [
        np.abs(np.diff(images["FLAIR"], axis=2))[inner[..., 1:]].mean() for images in (blurred.images, head.images)
    ]
    assert steps[0] < 0.5 * steps[1]


def test_inverted_contrast_swaps_grey_and_white_matter(head):
    swapped = made("contrast inverted", head).images["T1"]
    grey, white = (float(np.median(swapped[head.labels == k])) for k in (measure_degraded.GM, measure_degraded.WM))
    assert grey > white


def test_the_table_is_made_and_kept(tmp_path, capsys):
    write_cohort(tmp_path / "in", 1, seed=1, config=SMALL)
    words = [str(tmp_path / "in"), str(tmp_path / "out"), "--only", "as it is"]
    for _ in range(2):
        assert measure_degraded.main(words) == 0
        rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| as it is")]
        alone, together = ([float(cell) for cell in row.split(" | ")[1:3]] for row in rows)
        assert min(alone) > 0.6
        assert together == [1.0, 1.0]  # it is compared with itself
    assert len(list((tmp_path / "out").rglob("*.json"))) == 2
