"""Smoothing inside a mask against scipy, a constant, millimetres, and what must not leak in."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy.ndimage import gaussian_filter
from torch import Tensor

from monai_deepgmm.mixture.smoothing import TRUNCATE, smooth

SHAPES = [((17, 23), (1.0, 1.0)), ((17, 23), (0.7, 1.9)), ((9, 12, 7), (1.2, 0.8, 3.0))]
each_shape = pytest.mark.parametrize(("shape", "spacing_mm"), SHAPES, ids=["2d", "anisotropic", "3d"])


def scene(shape: tuple[int, ...], *, batch: int = 2, channels: int = 3, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Noise, and a ball with a hole (another one in each image) that touches the border."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(batch, channels, *shape, generator=generator, dtype=torch.float64)
    lines = torch.meshgrid(*(torch.linspace(-1, 1, n, dtype=torch.float64) for n in shape), indexing="ij")
    far = sum((line - 0.2).square() for line in lines).sqrt()
    return values, torch.stack([((far < 0.9 - 0.1 * b) & (far > 0.3)).double()[None] for b in range(batch)])


def convolved(values: np.ndarray, sigma_mm: float, spacing_mm: tuple[float, ...]) -> np.ndarray:
    """scipy's Gaussian filter with the same reach: ⌈3 σ⌉ voxels."""
    sigmas = [sigma_mm / s for s in spacing_mm]
    reach = [math.ceil(TRUNCATE * s) for s in sigmas]
    return gaussian_filter(values, sigmas, mode="constant", radius=reach)


@each_shape
@pytest.mark.parametrize("sigma_mm", [0.6, 1.5, 5.0])
def test_it_is_scipys_normalised_convolution(shape, spacing_mm, sigma_mm):
    values, mask = scene(shape)
    found = smooth(values, mask, sigma_mm, spacing_mm)
    for image, inside, ours in zip(values.numpy(), mask[:, 0].numpy(), found.numpy(), strict=True):
        weight = convolved(inside, sigma_mm, spacing_mm)
        for channel, mine in zip(image, ours, strict=True):
            expected = convolved(channel * inside, sigma_mm, spacing_mm)
            np.testing.assert_allclose(mine, expected / np.where(inside > 0, weight, 1) * inside, rtol=1e-9, atol=1e-12)


@each_shape
@pytest.mark.parametrize("sigma_mm", [0.0, 0.01, 1.5, 50.0])
def test_a_constant_stays_what_it_is(shape, spacing_mm, sigma_mm):
    values, mask = scene(shape)
    found = smooth(torch.full_like(values, 7.25), mask, sigma_mm, spacing_mm)
    torch.testing.assert_close(found, 7.25 * mask.expand_as(values))


@each_shape
@pytest.mark.parametrize("sigma_mm", [0.0, 1.5])
def test_outside_is_zero(shape, spacing_mm, sigma_mm):
    values, mask = scene(shape)
    assert (smooth(values, mask, sigma_mm, spacing_mm) * (1 - mask)).abs().max() == 0


@each_shape
@pytest.mark.parametrize("outside", [-5.0, 1e9, 1e300])
@pytest.mark.parametrize("sigma_mm", [0.0, 1.5])
def test_what_lies_outside_never_matters(shape, spacing_mm, outside, sigma_mm):
    values, mask = scene(shape)
    dirty = torch.where(mask > 0, values, outside)
    assert torch.equal(smooth(dirty, mask, sigma_mm, spacing_mm), smooth(values, mask, sigma_mm, spacing_mm))


def test_sigma_zero_leaves_the_values_as_they_are():
    values, mask = scene((17, 23))
    assert torch.equal(smooth(values, mask, 0.0, (1.0, 1.0)), values * mask)


def test_by_hand():
    """σ is one voxel; three voxels in a row, the last one outside: weights 1 and e^(−1/2)."""
    values = torch.tensor([[[3.0, 5.0, 100.0]]], dtype=torch.float64)
    mask = torch.tensor([[[1.0, 1.0, 0.0]]], dtype=torch.float64)
    side = math.exp(-0.5)
    expected = [(3 + 5 * side) / (1 + side), (5 + 3 * side) / (1 + side), 0]
    assert smooth(values, mask, 2.0, (2.0,))[0, 0].tolist() == pytest.approx(expected)


def test_sigma_is_in_millimetres():
    """Twice the spacing with twice the sigma is the same; along an axis with larger voxels less is mixed."""
    values, mask = scene((17, 23))
    torch.testing.assert_close(smooth(values, mask, 3.0, (2.0, 4.0)), smooth(values, mask, 1.5, (1.0, 2.0)))
    point = torch.zeros(1, 1, 31, 31, dtype=torch.float64)
    point[..., 15, 15] = 1
    spread = smooth(point, torch.ones_like(point), 2.0, (0.5, 1.0))[0, 0]
    offsets = torch.arange(-15, 16, dtype=torch.float64)
    deviations = [(spread.sum(axis) / spread.sum() * offsets.square()).sum().sqrt() for axis in (1, 0)]
    assert [float(d) for d in deviations] == pytest.approx([4.0, 2.0], rel=0.05)  # σ = 2 mm, in voxels


def test_more_sigma_is_smoother():
    values, mask = scene((17, 23))
    spread = [smooth(values, mask, s, (1.0, 1.0))[0, :, mask[0, 0] > 0].std() for s in (0.0, 0.5, 1.0, 2.0, 4.0)]
    assert spread == sorted(spread, reverse=True)
    assert spread[-1] < 0.2 * spread[0]


def test_values_stay_between_the_smallest_and_the_largest():
    values, mask = scene((17, 23))
    found = smooth(values, mask, 1.0, (1.0, 1.0))
    for b in range(len(values)):
        inside = mask[b, 0] > 0
        assert found[b][:, inside].max() <= values[b][:, inside].max()
        assert found[b][:, inside].min() >= values[b][:, inside].min()


def test_shares_that_sum_to_one_still_do():
    values, mask = scene((17, 23))
    shares = smooth(values.softmax(1), mask, 1.7, (1.0, 1.3))
    torch.testing.assert_close(shares.sum(1, keepdim=True), mask)


def test_masks_of_no_and_of_one_voxel():
    values, mask = scene((17, 23))
    mask[0] = 0
    mask[1] = 0
    mask[1, 0, 16, 22] = 1
    found = smooth(values, mask, 2.0, (1.0, 1.0))
    torch.testing.assert_close(found, values * mask)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("mask_dtype", [torch.bool, torch.uint8, torch.float32, torch.float64])
def test_the_dtype_follows_the_values(dtype, mask_dtype):
    values, mask = scene((17, 23))
    found = smooth(values.to(dtype), mask.to(mask_dtype), 1.5, (1.0, 1.0))
    assert found.dtype == dtype
    torch.testing.assert_close(found.double(), smooth(values, mask, 1.5, (1.0, 1.0)), rtol=1e-4, atol=1e-5)


@each_shape
def test_an_image_does_not_depend_on_its_batch(shape, spacing_mm):
    values, mask = scene(shape, batch=3)
    together = smooth(values, mask, 1.5, spacing_mm)
    for b in range(3):
        alone = smooth(values[b : b + 1], mask[b : b + 1], 1.5, spacing_mm)
        torch.testing.assert_close(alone[0], together[b], rtol=0, atol=1e-14)  # but for roundings


def test_nothing_that_is_given_is_changed():
    values, mask = scene((17, 23))
    before = values.clone(), mask.clone()
    smooth(values, mask, 1.5, (1.0, 1.0))
    assert torch.equal(values, before[0])
    assert torch.equal(mask, before[1])
