"""Boxes around masks: where they lie, cutting to them and pasting back, boxes that leave the image."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from monai_deepgmm.mixture.bounding_box import cut, enclosing, paste

MARGIN, MULTIPLE = 4, 16


def ones(shape: tuple[int, ...], *sides: slice) -> Tensor:
    mask = torch.zeros(1, 1, *shape)
    mask[(0, 0, *sides)] = 1
    return mask


def noise(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


# Where they lie --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("inside", "box"),
    [
        ((10, 18), (6, 22)),  # 8 voxels and 4 on each side are 16
        ((10, 19), (-2, 30)),  # 9 need 32: from (10 + 19 − 32) // 2
        ((0, 8), (-4, 12)),
        ((32, 40), (28, 44)),
        ((0, 40), (-4, 44)),
    ],
)
def test_boxes_by_hand(inside, box):
    mask = ones((5, 40), slice(2, 3), slice(*inside))
    assert enclosing(mask, margin=MARGIN, multiple=MULTIPLE) == (slice(-6, 10), slice(*box))


def test_without_a_margin_a_box_is_tight():
    assert enclosing(ones((9, 12, 7), slice(2, 3), slice(0, 12), slice(4, 7))) == (
        slice(2, 3),
        slice(0, 12),
        slice(4, 7),
    )


def test_a_margin_alone_may_leave_the_image():
    assert enclosing(ones((9, 12), slice(0, 3), slice(5, 12)), margin=2) == (slice(-2, 5), slice(3, 14))


def test_a_box_holds_every_mask_of_the_batch():
    masks = torch.cat([ones((60, 60), slice(5, 9), slice(30, 31)), ones((60, 60), slice(20, 29), slice(33, 38))])
    rows, columns = enclosing(masks, margin=MARGIN, multiple=MULTIPLE)
    assert (rows.start, rows.stop) == (1, 33)  # rows 5 … 28 and 4 on each side
    assert (columns.start, columns.stop) == (26, 42)
    assert enclosing(masks) == (slice(5, 29), slice(30, 38))


@pytest.mark.parametrize(("margin", "multiple", "side"), [(MARGIN, MULTIPLE, 16), (0, 1, 1)])
def test_an_empty_mask_has_a_box_too(margin, multiple, side):
    sides = enclosing(torch.zeros(1, 1, 20, 20, 20), margin=margin, multiple=multiple)
    assert [s.stop - s.start for s in sides] == [side] * 3


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.float64])
def test_the_masks_dtype_does_not_matter(dtype):
    mask = ones((9, 12), slice(2, 5), slice(7, 8)).to(dtype)
    assert enclosing(mask) == (slice(2, 5), slice(7, 8))


# There and back --------------------------------------------------------------------------------------------------


def test_cut_by_hand():
    image = torch.arange(12.0).reshape(1, 1, 3, 4)
    found = cut(image, (slice(-1, 2), slice(2, 5)))
    assert found[0, 0].tolist() == [[0, 0, 0], [2, 3, 0], [6, 7, 0]]
    assert paste(found, (slice(-1, 2), slice(2, 5)), image.shape[2:])[0, 0].tolist() == [
        [0, 0, 2, 3],
        [0, 0, 6, 7],
        [0, 0, 0, 0],
    ]


def test_a_box_beyond_the_image_holds_nothing():
    assert torch.equal(cut(torch.ones(1, 1, 4, 4), (slice(-3, 0), slice(0, 4))), torch.zeros(1, 1, 3, 4))


@pytest.mark.parametrize(
    "sides",
    [
        (slice(12, 20), slice(14, 22)),
        (slice(0, 5), slice(25, 33)),
        (slice(0, 30), slice(0, 33)),
        (slice(29, 30), slice(0, 1)),
        (slice(3, 9), slice(10, 20), slice(0, 2)),
        (slice(0, 30), slice(4, 5), slice(5, 7)),
    ],
    ids=["within", "corner", "all", "one voxel", "3d", "3d all"],
)
def test_there_and_back_again_keeps_what_lies_in_the_box(sides):
    shape = (30, 33, 7)[: len(sides)]
    mask = ones(shape, *sides)
    image = noise(2, 3, *shape)
    box = enclosing(mask, margin=MARGIN, multiple=MULTIPLE)
    small = cut(image, box)
    assert all(n % MULTIPLE == 0 for n in small.shape[2:])
    again = paste(small, box, image.shape[2:])
    assert again.shape == image.shape
    assert torch.equal(again * mask, image * mask)
    within = tuple(slice(max(side.start, 0), side.stop) for side in box)
    kept = torch.zeros_like(image)
    kept[(..., *within)] = image[(..., *within)]
    assert torch.equal(again, kept)
    assert torch.equal(cut(again, box), small)


def test_cutting_changes_nothing_that_is_given():
    image = noise(1, 2, 6, 6)
    before = image.clone()
    cut(image, (slice(1, 4), slice(-2, 3))).zero_()
    assert torch.equal(image, before)
