"""Agreement of label maps, against values worked out by hand."""

from __future__ import annotations

from itertools import permutations

import numpy as np
import pytest

from monai_deepgmm.results import metrics

INDICES = (1, 2, 3)


def dice_by_definition(predicted: np.ndarray, reference: np.ndarray) -> float:
    p, t = set(np.flatnonzero(predicted)), set(np.flatnonzero(reference))
    return 2 * len(p & t) / (len(p) + len(t)) if p or t else np.nan


def test_confusion_counts_each_pair_once_and_other_values_as_background():
    predicted = np.array([[1, 1, 2], [2, 0, 9]])
    reference = np.array([[1, 2, 2], [2, 7, 3]])
    expected = [[1, 0, 0, 1], [0, 1, 1, 0], [0, 0, 2, 0], [0, 0, 0, 0]]  # rows: background, 1, 2, 3
    np.testing.assert_array_equal(metrics.confusion(predicted, reference, INDICES), expected)
    turned = metrics.confusion(predicted, reference, (2, 1, 3))
    np.testing.assert_array_equal(turned, np.array(expected)[np.ix_([0, 2, 1, 3], [0, 2, 1, 3])])


@pytest.mark.parametrize(
    ("reference", "indices", "message"),
    [(np.zeros((2, 3), int), (1, 2), "one grid"), (np.zeros((2, 2), int), (1, 1), "different"), (None, (0, 1), "0")],
)
def test_confusion_refuses_what_does_not_fit(reference, indices, message):
    predicted = np.zeros((2, 2), int)
    with pytest.raises(ValueError, match=message):
        metrics.confusion(predicted, predicted if reference is None else reference, indices)


def test_overlap_by_hand():
    reference = np.array([1, 1, 1, 1, 2, 2, 0, 0])
    predicted = np.array([1, 1, 1, 2, 2, 0, 0, 1])
    found = metrics.overlap(metrics.confusion(predicted, reference, (1, 2)))
    np.testing.assert_allclose(found.dice, [2 * 3 / (4 + 4), 2 * 1 / (2 + 2)])
    np.testing.assert_allclose(found.jaccard, [3 / 5, 1 / 3])
    np.testing.assert_allclose(found.recall, [3 / 4, 1 / 2])
    np.testing.assert_allclose(found.precision, [3 / 4, 1 / 2])
    missed = metrics.overlap(metrics.confusion(np.array([1, 0, 0, 0]), np.array([1, 1, 1, 1]), (1,)))
    assert (missed.recall[0], missed.precision[0]) == (0.25, 1.0)
    np.testing.assert_array_equal(found.voxels_true, [4, 2])
    np.testing.assert_array_equal(found.voxels_predicted, [4, 2])


def test_empties():
    reference, predicted = np.array([1, 1, 0, 0]), np.array([0, 0, 2, 0])
    found = metrics.overlap(metrics.confusion(predicted, reference, INDICES))
    np.testing.assert_array_equal(found.dice, [0, 0, np.nan])
    np.testing.assert_array_equal(found.jaccard, [0, 0, np.nan])
    np.testing.assert_array_equal(found.recall, [0, np.nan, np.nan])
    np.testing.assert_array_equal(found.precision, [np.nan, 0, np.nan])


@pytest.mark.parametrize("shape", [(9, 11), (5, 6, 4)])
def test_overlap_agrees_with_the_definition_on_sets(shape):
    rng = np.random.default_rng(3)
    predicted, reference = rng.integers(0, 4, shape), rng.integers(0, 4, shape)
    found = metrics.overlap(metrics.confusion(predicted, reference, INDICES))
    np.testing.assert_allclose(found.dice, [dice_by_definition(predicted == i, reference == i) for i in INDICES])
    np.testing.assert_allclose(found.jaccard, found.dice / (2 - found.dice))


def test_the_oracle_undoes_any_permutation():
    reference = np.random.default_rng(0).integers(0, 5, (12, 12))
    for order in permutations(range(1, 5)):
        predicted = np.array([0, *order])[reference]
        counts = metrics.confusion(predicted, reference, (1, 2, 3, 4))
        np.testing.assert_array_equal(metrics.matched_dice(counts), np.ones(4))
        assert metrics.match(metrics.dice_table(counts)) == tuple(p - 1 for p in order)


def test_the_oracle_by_hand():
    # Greedy takes .9 first and is left with 0; the other pairing has the higher mean.
    assert metrics.match(np.array([[0.9, 0.8], [0.8, 0.0]])) == (1, 0)
    assert metrics.match(np.full((4, 4), 0.5)) == (0, 1, 2, 3)  # nothing is to be gained
    # The reference lacks 3, the prediction lacks 2 and calls it 3: renamed, all is right and nothing is left over.
    reference, predicted = np.array([1, 1, 2, 2]), np.array([1, 1, 3, 3])
    np.testing.assert_array_equal(
        metrics.matched_dice(metrics.confusion(predicted, reference, INDICES)), [1, 1, np.nan]
    )


@pytest.mark.parametrize("seed", range(20))
def test_the_oracle_has_the_best_mean_over_the_tissues_that_count(seed):
    rng = np.random.default_rng(seed)
    present = [rng.choice(5, size=rng.integers(1, 5), replace=False) for _ in range(2)]
    predicted, reference = (rng.choice(labels, 30) for labels in present)
    counts = metrics.confusion(predicted, reference, (1, 2, 3, 4))
    table = metrics.dice_table(counts)
    means = [np.nanmean(d) for p in permutations(range(4)) if not np.isnan(d := table[list(p), range(4)]).all()]
    if means:
        assert np.nanmean(metrics.matched_dice(counts)) == pytest.approx(max(means))
    else:
        assert np.isnan(metrics.matched_dice(counts)).all()


def test_surface_by_hand_in_two_dimensions():
    reference, along_rows, along_columns = np.zeros((3, 8, 8), bool)
    reference[2, 2] = along_rows[5, 2] = along_columns[2, 5] = True
    assert metrics.surface(along_rows, reference, spacing_mm=(2.0, 0.5)) == (6.0, 6.0)
    assert metrics.surface(along_columns, reference, spacing_mm=(2.0, 0.5)) == (1.5, 1.5)
    # Truth: a row of 3 pixels, prediction: the same and one more at its end, 0.5 mm on. All are surface.
    reference, predicted = np.zeros((2, 6, 6), bool)
    reference[3, 1:4], predicted[3, 1:5] = True, True
    found = metrics.surface(predicted, reference, spacing_mm=(2.0, 0.5))
    assert found.assd_mm == pytest.approx(0.5 / 7)  # distances 0 0 0 .5 there and 0 0 0 back
    assert found.hd95_mm == pytest.approx(0.5 * 0.85)  # rank .95·3 = 2.85 of 0 0 0 .5; nothing back


def test_the_inside_is_no_surface():
    # Two concentric squares of 5 and 3 pixels: 16 and 8 pixels of surface; corners lie √2 apart, all others 1.
    reference, predicted = np.zeros((2, 9, 9), bool)
    reference[2:7, 2:7], predicted[3:6, 3:6] = True, True
    found = metrics.surface(predicted, reference, spacing_mm=(1.0, 1.0))
    assert found.assd_mm == pytest.approx((8 * 1 + 12 * 1 + 4 * 2**0.5) / 24)
    assert found.hd95_mm == pytest.approx(2**0.5)


def test_surface_by_hand_in_three_dimensions():
    # Cubes of 3 voxels, one shifted by a voxel along the thick axis: 26 voxels of surface each, as the middle is none.
    reference, predicted = np.zeros((2, 7, 7, 8), bool)
    reference[2:5, 2:5, 2:5], predicted[2:5, 2:5, 3:6] = True, True
    found = metrics.surface(predicted, reference, spacing_mm=(1.0, 1.0, 10.0))
    # 9 voxels of the far face lie 10 mm off. In the two layers between, the 16 at the side lie on the other's surface;
    # the middle of the near face is inside the other cube, 1 mm from its side, 10 mm from its own kind.
    assert found.assd_mm == pytest.approx((9 * 10 + 1 * 1) / 26)
    assert found.hd95_mm == pytest.approx(10.0)


def test_surface_of_a_single_slice_is_that_of_the_image():
    reference, predicted = np.zeros((2, 9, 9), bool)
    reference[2:7, 2:7], predicted[3:6, 3:7] = True, True
    flat = metrics.surface(predicted, reference, spacing_mm=(0.7, 1.3))
    assert metrics.surface(predicted[..., None], reference[..., None], spacing_mm=(0.7, 1.3, 8.0)) == flat
    assert metrics.surface(predicted[:, None], reference[:, None], spacing_mm=(0.7, 8.0, 1.3)) == flat


def test_surface_at_the_edge_of_the_array_and_in_a_row():
    reference, predicted = np.zeros((2, 1, 6), bool)
    reference[0, 0], predicted[0, 4] = True, True
    assert metrics.surface(predicted, reference, spacing_mm=(1.0, 0.5)) == (2.0, 2.0)
    assert metrics.surface(reference[:, :1], reference[:, :1], spacing_mm=(1.0, 0.5)) == (0.0, 0.0)
    whole = np.ones((4, 4), bool)
    assert metrics.surface(whole, whole, spacing_mm=(1.0, 1.0)) == (0.0, 0.0)


def test_surface_is_symmetric_and_undefined_for_empties():
    rng = np.random.default_rng(1)
    a, b = rng.random((2, 6, 7, 5)) < 0.2
    forth, back = (metrics.surface(x, y, spacing_mm=(1, 2, 3)) for x, y in ((a, b), (b, a)))
    assert forth == pytest.approx(back)
    assert np.isnan(metrics.surface(a, np.zeros_like(a), spacing_mm=(1, 2, 3))).all()
    assert np.isnan(metrics.surface(np.zeros_like(a), a, spacing_mm=(1, 2, 3))).all()
    with pytest.raises(ValueError, match="2 spacings"):
        metrics.surface(a, a, spacing_mm=(1, 1))
