"""Where a sequence was measured, and what a mask has beyond the image."""

from __future__ import annotations

import numpy as np
import torch

from monai_deepgmm.images.measured import limited, measured, padding


def test_zeros_and_what_lies_far_beyond_all_tissues_were_not_measured():
    generator = torch.Generator().manual_seed(0)
    image = 100 + 10 * torch.rand(1, 2, 10, 10, 10, generator=generator)
    mask = torch.ones(1, 1, 10, 10, 10)
    mask[..., 0] = 0
    image[0, 0, :3] = 0  # beyond its field of view
    image[0, 1, 5, 5, 5:7] = 5000  # a spike
    found = measured(image, mask)
    assert not found[..., 0].any()
    assert not found[0, 0, :3].any()
    assert found[0, 0, 3:, :, 1:].all()
    assert found[0, 1].sum() == mask.sum() - 2


def test_zero_is_a_value_of_a_signed_image_unless_it_is_padding():
    values = torch.arange(-50, 51).repeat(20).reshape(1, 1, 20, 101).float()
    mask = torch.ones_like(values)
    assert measured(values, mask).all()
    assert not measured(values + 50, mask)[values == -50].any()
    padded = values.clone()
    padded[..., :10, :] = 0
    assert not measured(padded, mask)[padded == 0].any()


def test_hot_voxels_are_brought_back_and_all_else_stays():
    image = 100 + 10 * torch.rand(2, 1, 20, 20, generator=torch.Generator().manual_seed(0))
    mask = torch.ones(2, 1, 20, 20)
    mask[..., 0] = 0
    hot = image.clone()
    hot[1, 0, 5, 5:7] = 5000
    hot[1, 0, 9, 9] = -5000
    hot[0, 0, 3, 0] = 5000  # outside the mask
    found = limited(hot, mask)
    assert torch.equal(found[0], hot[0])
    assert found[1].max() < 120
    assert found[1].min() > 90
    assert ((found != hot).nonzero()[:, 2:].tolist()) == [[5, 5], [5, 6], [9, 9]]


def test_a_sequence_without_signal_counts_as_measured():
    assert measured(torch.zeros(1, 1, 4, 4), torch.ones(1, 1, 4, 4)).all()


def test_padding_is_what_lies_at_the_border_and_not_what_is_enclosed():
    image = np.ones((2, 8, 8, 8), np.float32)
    image[:, :2] = 0  # between the mask and the image
    image[:, 5, 5, 5] = 0  # a black voxel
    image[0, 7] = 0  # one sequence alone
    mask = np.ones((8, 8, 8), bool)
    found = padding(image, mask)
    assert found[:2].all()
    assert found.sum() == 2 * 64


def test_zeros_at_the_border_of_a_signed_image_are_values_unless_they_are_padding():
    image = (np.arange(-256, 256, dtype=np.float32) // 4).reshape(1, 8, 8, 8)
    image[0, 0, 0, :2] = image[0, 7, 7, 7] = 0
    mask = np.ones((8, 8, 8), bool)
    assert not padding(image, mask).any()
    assert padding(np.abs(image), mask).sum() == 3 + 4
    image[0, :2] = 0
    assert padding(image, mask)[:2].all()


def test_nulled_tissue_at_the_masks_border_is_no_padding():
    image = np.ones((1, 12, 12, 2), np.float32)
    image[0, 2:10, 3:6] = 0  # wall and lung, both nulled, which fat encloses
    mask = np.zeros((12, 12, 2), bool)
    mask[4:8, 4:9] = True
    assert not padding(image, mask, 2).any()
    image[0, 2:10, :6, 1] = 0  # the same, but open to the image's edge in one slice
    assert padding(image, mask, 2).sum((0, 1)).tolist() == [0, 8]
