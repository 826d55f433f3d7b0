"""Volumes, masses and percentages, against numbers worked out by hand."""

from __future__ import annotations

import numpy as np
import pytest
from outcomes import segmentation

from monai_deepgmm.results.measure import measure, measure_slices


def labels_of(*slices: dict[int, int]) -> np.ndarray:
    """(10, 10, n) labels; each slice holds so many voxels of each label."""
    planes = [np.repeat([*counts, 0], [*counts.values(), 100 - sum(counts.values())]) for counts in slices]
    return np.stack([p.reshape(10, 10) for p in planes], axis=2)


def test_volume_mass_and_share_of_the_wall():
    rows = measure(segmentation(labels_of({1: 30, 2: 20, 3: 5}, {}, {1: 20, 2: 10, 3: 5, 4: 10})))
    by_tissue = {r.tissue: r for r in rows}
    assert [r.tissue for r in rows] == ["blood", "myocardium", "edema", "scar"]
    assert [r.voxels for r in rows] == [50, 30, 10, 10]
    assert [r.volume_ml for r in rows] == [1.0, 0.6, 0.2, 0.2]
    assert by_tissue["blood"].mass_g == pytest.approx(1.06)
    assert by_tissue["scar"].mass_g == pytest.approx(0.21)
    # The wall is 30 + 10 + 10 voxels; blood is no part of it.
    assert [r.percent for r in rows] == [None, 60.0, 20.0, 20.0]
    assert {r.percent_of for r in rows} == {"wall"}
    assert [r.percent for r in measure(segmentation(labels_of({1: 10})))] == [None] * 4  # no wall at all


def test_expected_volume_sums_the_probabilities():
    labels = labels_of({1: 10, 2: 10})
    probabilities = np.zeros((4, *labels.shape), np.float32)
    probabilities[0][labels == 1], probabilities[1][labels == 1] = 0.75, 0.25
    probabilities[1][labels == 2] = 1.0
    rows = measure(segmentation(labels, probabilities=probabilities))
    assert [r.expected_ml for r in rows] == pytest.approx([0.15, 0.25, 0.0, 0.0])
    assert [r.volume_ml for r in rows] == [0.2, 0.2, 0.0, 0.0]


def test_a_tissue_that_no_sequence_shows_has_no_row():
    rows = measure(segmentation(labels_of({1: 10, 2: 15, 4: 5}), sequences=("LGE", "bSSFP")))
    assert [(r.tissue, r.percent) for r in rows] == [("blood", None), ("myocardium", 75.0), ("scar", 25.0)]


def test_brain_is_measured_against_the_mask_and_has_no_mass():
    labels = labels_of({1: 20, 2: 50, 3: 10})
    mask = labels > 0
    mask[9, 9, 0] = mask[9, 8, 0] = True  # two voxels of the mask that bear no label
    rows = measure(segmentation(labels, name="brain", mask=mask))
    assert [r.mass_g for r in rows] == [None] * 4
    assert [r.percent for r in rows] == pytest.approx([100 * n / 82 for n in (20, 50, 10, 0)])
    assert measure_slices(segmentation(labels, name="brain", mask=mask)) == []  # one image has no slices of its own


def test_slices_without_mask_have_no_rows_and_each_slice_has_its_own_wall():
    rows = measure_slices(segmentation(labels_of({}, {1: 7}, {1: 20, 2: 10, 3: 5, 4: 10})))
    assert [r.slice for r in rows] == [1] * 4 + [2] * 4
    assert [r.percent for r in rows] == [None] * 4 + [None, 40.0, 20.0, 40.0]
    assert [r.volume_ml for r in rows] == [0.14, 0, 0, 0, 0.4, 0.2, 0.1, 0.2]


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_slices_are_counted_along_the_slice_axis(axis: int):
    labels = np.moveaxis(labels_of({1: 3, 2: 1}, {2: 9}), 2, axis)
    rows = measure_slices(segmentation(labels, slice_axis=axis))
    assert [(r.slice, r.voxels) for r in rows if r.tissue == "myocardium"] == [(0, 1), (1, 9)]
    assert [r.voxels for r in measure(segmentation(labels, slice_axis=axis))] == [3, 10, 0, 0]
