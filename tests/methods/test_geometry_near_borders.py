"""What is looked up near borders: distances, holes, intensities between voxels; each against scipy's slower way."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.ndimage import binary_fill_holes, distance_transform_edt, gaussian_filter, label, map_coordinates

from monai_deepgmm.methods.border_distance import border_distance
from monai_deepgmm.methods.enclosure import cores
from monai_deepgmm.methods.polar import interpolated


def blobs(seed: int, *shape: int) -> np.ndarray:
    """Smooth random shapes."""
    noise = np.random.default_rng(seed).normal(size=shape)
    return gaussian_filter(noise, [0] * (len(shape) - 2) + [2.0, 2.0]) > 0


@pytest.mark.parametrize("spacing_mm", [(1.0, 1.0), (0.7, 1.4)])
def test_distances_are_exact_up_to_the_reach(spacing_mm):
    places = blobs(0, 3, 30, 26)
    places[2] = True  # nothing lies outside
    found = border_distance(places, 3.0, spacing_mm)
    for mine, place in zip(found[:2], places[:2], strict=True):
        exact = distance_transform_edt(place, sampling=spacing_mm)
        near = exact <= 3.0
        assert np.allclose(mine[near], exact[near], atol=1e-5)
        assert (mine[~near] > 3.0).all()
    assert (found[2] == np.inf).all()


@pytest.mark.parametrize("seed", range(6))
def test_cores_are_the_holes_that_are_smaller_than_what_encloses_them(seed):
    bright, cavity = blobs(seed, 40, 40), np.zeros((40, 40), bool)
    cavity[15:25, 15:25] = True
    within = ~cavity & (np.hypot(*(np.indices((40, 40)) - 19.5)) < 17)
    bright &= within
    holes, count = label(binary_fill_holes(bright | cavity) & within & ~bright)
    small = [h for h in range(1, count + 1) if (holes == h).sum() < bright.sum()]
    assert np.array_equal(cores(bright, cavity, within), np.isin(holes, small))


def test_a_ring_closed_by_the_cavity_has_a_core():
    bright, cavity = np.zeros((12, 12), bool), np.zeros((12, 12), bool)
    bright[2:9, 2:9], bright[4:9, 4:7], cavity[9:11, 2:9] = True, False, True
    found = cores(bright, cavity, ~cavity)
    assert found.sum() == 15
    assert not cores(bright, np.zeros_like(cavity), ~cavity).any()  # open below


def test_intensities_between_voxels_are_linear():
    generator = np.random.default_rng(0)
    image, points = generator.normal(size=(9, 13)), generator.uniform(-3, 15, size=(2, 5, 40))
    nearest = map_coordinates(image, points, order=1, mode="nearest")
    assert np.allclose(interpolated(image, points), nearest)
    beyond = map_coordinates(image, points, order=1, mode="constant")
    assert np.allclose(interpolated(image, points, outside=0.0), beyond)
