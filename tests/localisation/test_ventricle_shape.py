"""The shape that slices have in common: those that go astray do not move it, the others keep to it."""

from __future__ import annotations

import numpy as np
import pytest
from chests import SEQUENCES, SPACING, body, dice

from monai_deepgmm.localisation import contours, polar_grid, ventricle_shape
from monai_deepgmm.localisation.annulus import Candidate

RADII = np.array([32.0, 31.5, 30.0, 27.5, 24.0, 19.5])
AXIS = np.stack([50 + 1.5 * np.arange(6), 60 - np.arange(6)], 1)


def circles(radii):
    return np.repeat(np.asarray(radii, float)[:, None], polar_grid.ANGLES, 1)


def test_slices_on_a_straight_axis_are_their_own_shape():
    found = ventricle_shape.fitted(circles(RADII), AXIS, np.ones(6))
    assert np.abs(found.around(AXIS) - circles(RADII)).max() < 1


@pytest.mark.parametrize("astray", [1, 5])
def test_a_slice_that_is_too_large_and_beside_the_others_does_not_move_the_shape(astray):
    radii, centres, fit = RADII.copy(), AXIS.copy(), np.full(6, 2.0)
    radii[astray] *= 1.5
    centres[astray] += (12, 0)
    fit[astray] = 1.0
    found = ventricle_shape.fitted(circles(radii), centres, fit)
    assert np.abs(found.around(AXIS) - circles(RADII))[astray].max() < 5
    assert np.hypot(*(found.centres_mm - AXIS)[astray]) < 3


def test_it_is_never_wider_at_both_ends():
    found = ventricle_shape.fitted(circles(RADII[[0, 3, 5, 5, 3, 0]]), np.zeros((6, 2)), np.ones(6))
    middle = found.contours_mm.mean(1)
    assert middle[2:4].min() > middle[[0, 5]].min() - 0.1


@pytest.mark.parametrize("even", [False, True])
def test_contours_that_went_astray_come_back_only_where_scar_looks_like_blood(even):
    image, truth = body(slices=5)
    late = image[[SEQUENCES.index("LGE")]]
    spacing, middles = np.array(SPACING[:2]), np.repeat([[70.0, 58.0]], 5, 0)
    area = truth.sum((0, 1)) * spacing.prod()
    outer = circles(np.sqrt(area / np.pi))
    centres = middles.copy()
    centres[2] += 9
    wrong = contours.Contours(centres, outer - 9, outer, np.ones(5), np.ones(5))
    start = Candidate(1.0, middles, outer[:, 0] - 9, spacing)
    found = contours.settled(late, start, wrong, np.array([even]))
    mask = polar_grid.enclosed(found.outer_mm, found.centres, spacing, image.shape[1:3])
    assert (dice(mask[..., 2], truth[..., 2]) > 0.9) == (not even)
