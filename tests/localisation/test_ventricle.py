"""The ventricle is found in phantoms with a body around them, wherever it lies and however the image is turned."""

from __future__ import annotations

import numpy as np
import pytest
from chests import SEQUENCES, SPACING, body, dice
from scipy.ndimage import gaussian_filter

from monai_deepgmm import protocol
from monai_deepgmm.images.mask import LEAST_CONFIDENCE
from monai_deepgmm.localisation import annulus, ventricle
from monai_deepgmm.localisation.contours import Contours


@pytest.fixture(scope="module")
def scene():
    image, truth = body()
    return image, truth, find(image)


def find(image, sequences=SEQUENCES, spacing=SPACING):
    return ventricle.find_by(image, protocol.load("infarct"), sequences, spacing)


def test_mask_confidence_and_centres(scene):
    _, truth, found = scene
    assert dice(found.mask, truth) > 0.95
    assert found.confidence > 0.9
    assert np.abs(found.centres - [[70, 58, z] for z in range(4)]).max() < 1.5


@pytest.mark.parametrize("kept", [("bSSFP",), ("T2",), ("LGE", "bSSFP"), ("LGE",)])
def test_from_whatever_sequences_there_are(scene, kept):
    image, truth, _ = scene
    found = find(image[[SEQUENCES.index(s) for s in kept]], kept)
    assert dice(found.mask, truth) > 0.9


def test_turned_mirrored_cropped_and_padded_copies_give_the_same_mask(scene):
    image, _, found = scene
    turned = find(image.transpose(0, 3, 2, 1)[:, :, ::-1], spacing=SPACING[::-1])
    assert dice(turned.mask[:, ::-1].transpose(2, 1, 0), found.mask) > 0.98
    assert np.abs(turned.centres[:, [2, 0]] - found.centres[:, [0, 2]]).max() < 1
    cropped = find(image[:, 30:118, 20:100])
    assert dice(cropped.mask, found.mask[30:118, 20:100]) > 0.98
    padded = find(np.pad(image, ((0, 0), (30, 10), (0, 40), (0, 0))))
    assert dice(padded.mask[30:-10, :-40], found.mask) > 0.98


def test_scale_and_offset_of_an_intensity_change_nothing(scene):
    image, _, found = scene
    assert dice(find(image * [[[[3.0]]], [[[0.1]]], [[[40.0]]]] + 500).mask, found.mask) > 0.999


def test_a_slice_without_ventricle_stays_empty():
    image, truth = body(slices=5, empty=(4,))
    found = find(image)
    assert found.mask.any((0, 1)).tolist() == [True] * 4 + [False]
    assert dice(found.mask[..., :4], truth[..., :4]) > 0.95
    assert len(found.centres) == 4


def test_where_voxels_are_not_what_the_header_says_the_heart_is_an_ellipse(scene):
    image, truth, _ = scene
    assert dice(find(image, spacing=(1.15, 1.6, 10)).mask, truth) > 0.9


def test_where_no_heart_is_the_confidence_is_low():
    rng = np.random.default_rng(2)
    noise = gaussian_filter(rng.normal(0, 1, (1, 96, 96, 3)), (0, 3, 3, 0))
    assert find(noise, ("LGE",)).confidence < LEAST_CONFIDENCE
    assert find(np.zeros((1, 64, 64, 2)), ("T2",)).confidence < LEAST_CONFIDENCE


def test_candidates_lie_apart_and_the_best_comes_first(scene):
    image, _, _ = scene
    places = annulus.candidates(image, [1, -1, 1], np.array(SPACING[:2]))
    assert [p.score for p in places] == sorted((p.score for p in places), reverse=True)
    middles = [p.centres.mean(0) * SPACING[0] for p in places]
    assert all(np.hypot(*(a - b)) > 5 for i, a in enumerate(middles) for b in middles[:i])
    assert np.hypot(*(middles[0] / SPACING[0] - [70, 58])) < 3


def test_a_bright_pool_with_nothing_around_its_wall_comes_behind_a_heart():
    def rank(score, inner_fit, outer_fit, radius_mm=24.0):
        place = annulus.Candidate(score, np.zeros((2, 2)), np.full(2, radius_mm), np.ones(2))
        radii = np.full((2, 72), radius_mm)
        fits = (np.full(2, inner_fit), np.full(2, outer_fit))
        return ventricle.rank(place, Contours(place.centres, radii, radii + 10, *fits))

    heart = rank(0.74, 1.93, 1.15)
    assert rank(0.87, 3.33, 0.37) < heart  # as seen on one patient's late enhancement
    assert rank(0.87, 9.0, 0.37) < heart
    assert rank(0.74, 1.93, 1.15, radius_mm=12.0) < heart
