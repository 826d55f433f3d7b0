"""Voxels inside masks to the front and back, in images and in boxes."""

from __future__ import annotations

import pytest
import torch
from tensors import normal

from monai_deepgmm.mixture.packing import packing


@pytest.mark.parametrize("shape", [(7, 9), (5, 4, 6)], ids=["2d", "3d"])
def test_there_and_back_in_images_and_in_boxes(shape):
    mask = (normal(3, 1, *shape) > 0.8).double()
    mask[1], mask[2] = 0, 0
    mask[2, 0, 2] = 1
    values = torch.where(mask > 0, normal(3, 2, *shape), torch.nan)
    found = packing(mask)
    packed = found.pack(values)
    assert packed.shape[2] == mask.flatten(1).sum(1).max()
    assert torch.equal(found.inside.sum((1, 2)), mask.flatten(1).sum(1))
    for b in range(3):
        n = int(mask[b].sum())
        assert torch.equal(packed[b, :, :n], values[b][:, mask[b, 0] > 0])  # in order
        assert (packed[b, :, n:] == 0).all()
    for one in (found, found.boxes()):
        assert torch.equal(one.pack(one.spread(packed)), packed)
    back = found.spread(packed, -1.0)
    assert torch.equal(back, torch.where(mask > 0, values, -1.0))


def test_boxes_lie_around_the_voxels_of_each_image():
    """Two voxels three apart, and one alone: boxes of 1 × 4, from the first voxel on."""
    mask = torch.zeros(2, 1, 6, 8)
    mask[0, 0, 2, 3] = mask[0, 0, 2, 6] = mask[1, 0, 5, 7] = 1
    boxes = packing(mask).boxes()
    assert boxes.shape == (1, 4)
    assert boxes.spread(boxes.inside)[:, 0, 0].tolist() == [[1, 0, 0, 1], [1, 0, 0, 0]]
    assert boxes.rows(torch.tensor([1])).repeated(2).inside.tolist() == [[[1, 0]], [[1, 0]]]
