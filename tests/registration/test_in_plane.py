"""Shifts planted in slices are found again, and what agrees stays where it is."""

from __future__ import annotations

import numpy as np
import pytest
from chests import SPACING, body
from scipy.ndimage import gaussian_filter, shift

from monai_deepgmm.registration import correlation, edges, in_plane

PLANTED_MM = np.array([[5.0, -3.0], [-2.1, 6.4], [0.0, 7.7]])


@pytest.fixture(scope="module")
def chest():
    image, truth = body(slices=3)
    return image, truth


def planted(sequence, each=PLANTED_MM):
    planes = [shift(sequence[..., z], mm / SPACING[:2], order=3, mode="nearest") for z, mm in enumerate(each)]
    return np.stack(planes, 2)


def found(chest, moving):
    return in_plane.Reference(chest[0][0], chest[1], SPACING[:2]).shifts(moving)


@pytest.mark.parametrize("sequence", [1, 2])
def test_planted_shifts_are_found_to_a_pixel(chest, sequence):
    shifts = found(chest, planted(chest[0][sequence]))
    assert list(shifts) == [0, 1, 2]
    off = [np.hypot(*(np.array(one.mm) - mm)) for one, mm in zip(shifts.values(), PLANTED_MM, strict=True)]
    assert max(off) < SPACING[0]
    assert set(in_plane.kept(shifts)) == {0, 1, 2}


@pytest.mark.parametrize("change", [lambda x: x, lambda x: 300 - 0.2 * x])
def test_what_agrees_stays_whatever_the_contrast(chest, change):
    shifts = found(chest, change(chest[0][1]))
    assert in_plane.kept(shifts) == {}
    assert max(one.gain for one in shifts.values()) < 0.01


def test_one_slice_that_moved_is_moved_alone(chest):
    alone = PLANTED_MM * [[0], [1], [0]]
    assert set(in_plane.kept(found(chest, planted(chest[0][2], alone)))) == {1}


def test_a_sequence_moves_as_a_whole_where_its_slices_gain_together():
    little, much, none = (in_plane.Shift((1.0, 0.0), 1.0, 1.0 + gain) for gain in (0.12, 0.2, 0.005))
    assert set(in_plane.kept({0: little, 1: little, 2: none})) == set()
    assert set(in_plane.kept({0: much, 1: little, 2: none})) == {0, 1}
    assert set(in_plane.kept({0: much, 1: none, 2: none})) == {0}
    assert in_plane.kept({}) == {}


def test_a_blank_slice_and_one_without_the_organ_have_no_shift(chest):
    moving, mask = planted(chest[0][1]), chest[1].copy()
    moving[..., 0] = 7
    mask[..., 2] = False
    assert list(in_plane.Reference(chest[0][0], mask, SPACING[:2]).shifts(moving)) == [1]


def agreement(one, other, weight, reach):
    return edges.agreement(edges.Still.of(one, weight, reach), correlation.turned(other, reach))


def test_agreement_is_that_of_every_shift_by_hand():
    rng = np.random.default_rng(0)
    a, b = (gaussian_filter(rng.normal(0, 1, (20, 23)), 1.5) for _ in "ab")
    weight = np.zeros((20, 23))
    weight[6:14, 5:17] = rng.uniform(0.5, 1, (8, 12))
    one, other = edges.of(a, weight), edges.of(b, weight)
    fast = agreement(one, other, weight, 4)
    for i, j in ((0, 0), (-4, 3), (2, -4)):
        there = [np.roll(part, (-i, -j), (0, 1)) for part in other]
        dot = one.xx * there[0] + 2 * one.xy * there[1] + one.yy * there[2]
        norms = (weight * one.strength).sum() * (weight * there[3]).sum()
        assert fast[4 + i, 4 + j] == pytest.approx((weight * dot).sum() / norms**0.5, abs=1e-4)


def test_edges_agree_wholly_with_themselves_and_inverted():
    image = gaussian_filter(np.random.default_rng(1).normal(0, 1, (24, 24)), 2)
    weight = np.ones_like(image)
    for other in (image, -3 * image + 2):
        place, best = edges.highest(agreement(edges.of(image, weight), edges.of(other, weight), weight, 3))
        assert np.abs(place).max() < 0.05
        assert best == pytest.approx(1, abs=1e-3)


def test_a_peak_lies_between_voxels_but_not_beyond_the_map():
    x, y = np.meshgrid(np.arange(-3, 4), np.arange(-3, 4), indexing="ij")
    place, _ = edges.highest(-((x - 0.3) ** 2) - (y + 1.4) ** 2)
    np.testing.assert_allclose(place, [0.3, -1.4], atol=1e-9)
    np.testing.assert_allclose(edges.highest(x + 0.0 * y)[0], [3, -3])
