"""Smoothing inside a mask against scipy, a constant, millimetres, and what must not leak in."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy.ndimage import gaussian_filter
from tensors import cube, each_dtype, each_mask_dtype, normal
from torch import Tensor

from monai_deepgmm.mixture.smoothing import BLOCK, TRUNCATE, smooth

SHAPES = [
    ((17, 23), (1.0, 1.0)),
    ((17, 23), (0.7, 1.9)),
    ((9, 12, 7), (1.2, 0.8, 3.0)),
    ((2 * BLOCK + 3, BLOCK + 1), (1.0, 0.9)),
]
each_shape = pytest.mark.parametrize(("shape", "spacing_mm"), SHAPES, ids=["2d", "anisotropic", "3d", "long"])


def scene(shape: tuple[int, ...] = (17, 23), *, batch: int = 2) -> tuple[Tensor, Tensor]:
    """Noise, and a ball with a hole (another one in each image) that touches the border."""
    far = sum((line - 0.2).square() for line in cube(shape)).sqrt()
    mask = torch.stack([((far < 0.9 - 0.1 * b) & (far > 0.3)).double()[None] for b in range(batch)])
    return normal(batch, 3, *shape), mask


@each_shape
@pytest.mark.parametrize("sigma_mm", [0.6, 1.5, 5.0])
def test_it_is_scipys_normalised_convolution(shape, spacing_mm, sigma_mm):
    """scipy's Gaussian filter with the same reach: ⌈3 σ⌉ voxels."""
    sigmas = [sigma_mm / s for s in spacing_mm]
    reach = [math.ceil(TRUNCATE * s) for s in sigmas]

    def convolved(values: np.ndarray) -> np.ndarray:
        return gaussian_filter(values, sigmas, mode="constant", radius=reach)

    values, mask = scene(shape)
    found = smooth(values, mask, sigma_mm, spacing_mm)
    for image, inside, ours in zip(values.numpy(), mask[:, 0].numpy(), found.numpy(), strict=True):
        weight = np.where(inside > 0, convolved(inside), 1)
        for channel, mine in zip(image, ours, strict=True):
            np.testing.assert_allclose(mine, convolved(channel * inside) / weight * inside, rtol=1e-9, atol=1e-12)


@each_shape
@pytest.mark.parametrize("sigma_mm", [0.0, 0.01, 1.5, 50.0])
def test_a_constant_stays_what_it_is_and_shares_still_sum_to_one(shape, spacing_mm, sigma_mm):
    values, mask = scene(shape)
    found = smooth(torch.full_like(values, 7.25), mask, sigma_mm, spacing_mm)
    torch.testing.assert_close(found, 7.25 * mask.expand_as(values))
    shares = smooth(values.softmax(1), mask, sigma_mm, spacing_mm)
    torch.testing.assert_close(shares.sum(1, keepdim=True), mask)


@each_shape
@pytest.mark.parametrize("sigma_mm", [0.0, 1.5])
def test_what_lies_outside_is_zero_and_never_matters(shape, spacing_mm, sigma_mm):
    values, mask = scene(shape)
    found = smooth(values, mask, sigma_mm, spacing_mm)
    assert (found * (1 - mask)).abs().max() == 0
    for outside in (-5.0, 1e9, 1e300):
        assert torch.equal(smooth(torch.where(mask > 0, values, outside), mask, sigma_mm, spacing_mm), found)


def test_by_hand():
    """σ is one voxel; three voxels in a row, the last one outside: weights 1 and e^(−1/2)."""
    values = torch.tensor([[[3.0, 5.0, 100.0]]], dtype=torch.float64)
    mask = torch.tensor([[[1.0, 1.0, 0.0]]], dtype=torch.float64)
    side = math.exp(-0.5)
    expected = [(3 + 5 * side) / (1 + side), (5 + 3 * side) / (1 + side), 0]
    assert smooth(values, mask, 2.0, (2.0,))[0, 0].tolist() == pytest.approx(expected)
    assert torch.equal(smooth(values, mask, 0.0, (2.0,)), values * mask)
    values, mask = scene()
    mask[:] = 0
    mask[1, 0, 16, 22] = 1  # no voxel, and one
    torch.testing.assert_close(smooth(values, mask, 2.0, (1.0, 1.0)), values * mask)


def test_sigma_is_in_millimetres():
    """Twice the spacing with twice the sigma is the same; along an axis with larger voxels less is mixed."""
    values, mask = scene()
    torch.testing.assert_close(smooth(values, mask, 3.0, (2.0, 4.0)), smooth(values, mask, 1.5, (1.0, 2.0)))
    point = torch.zeros(1, 1, 31, 31, dtype=torch.float64)
    point[..., 15, 15] = 1
    spread = smooth(point, torch.ones_like(point), 2.0, (0.5, 1.0))[0, 0]
    offsets = torch.arange(-15, 16, dtype=torch.float64)
    deviations = [(spread.sum(axis) / spread.sum() * offsets.square()).sum().sqrt() for axis in (1, 0)]
    assert [float(d) for d in deviations] == pytest.approx([4.0, 2.0], rel=0.05)  # σ = 2 mm, in voxels


def test_more_sigma_is_smoother_and_values_stay_between_the_smallest_and_the_largest():
    values, mask = scene()
    found = [smooth(values, mask, s, (1.0, 1.0))[0, :, mask[0, 0] > 0] for s in (0.0, 0.5, 1.0, 2.0, 4.0)]
    spread = [inside.std() for inside in found]
    assert spread == sorted(spread, reverse=True)
    assert spread[-1] < 0.2 * spread[0]
    assert all(found[0].min() <= inside.min() and inside.max() <= found[0].max() for inside in found)


@each_dtype
@each_mask_dtype
def test_the_dtype_follows_the_values(dtype, mask_dtype):
    values, mask = scene()
    found = smooth(values.to(dtype), mask.to(mask_dtype), 1.5, (1.0, 1.0))
    assert found.dtype == dtype
    torch.testing.assert_close(found.double(), smooth(values, mask, 1.5, (1.0, 1.0)), rtol=1e-4, atol=1e-5)


@each_shape
def test_an_image_does_not_depend_on_its_batch_and_nothing_that_is_given_is_changed(shape, spacing_mm):
    values, mask = scene(shape, batch=3)
    before = values.clone(), mask.clone()
    together = smooth(values, mask, 1.5, spacing_mm)
    assert torch.equal(values, before[0])
    assert torch.equal(mask, before[1])
    for b in range(3):
        alone = smooth(values[b : b + 1], mask[b : b + 1], 1.5, spacing_mm)
        torch.testing.assert_close(alone[0], together[b], rtol=0, atol=1e-14)  # but for roundings
