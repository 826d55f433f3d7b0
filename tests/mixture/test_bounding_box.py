"""Boxes around masks: where they lie, cutting to them and pasting back, boxes that leave the image."""

from __future__ import annotations

import pytest
import torch
from tensors import normal
from torch import Tensor

from monai_deepgmm.mixture.bounding_box import cut, enclosing, paste

MARGIN, MULTIPLE = 4, 16


def ones(shape: tuple[int, ...], *sides: tuple[int, int]) -> Tensor:
    mask = torch.zeros(1, 1, *shape)
    mask[(0, 0, *(slice(*side) for side in sides))] = 1
    return mask


def sides(mask: Tensor, **options: int) -> list[tuple[int, int]]:
    return [(side.start, side.stop) for side in enclosing(mask, **options)]


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
    assert sides(ones((5, 40), (2, 3), inside), margin=MARGIN, multiple=MULTIPLE) == [(-6, 10), box]


def test_without_a_margin_a_box_is_tight_and_with_one_it_may_leave_the_image():
    for dtype in (torch.bool, torch.uint8, torch.float64):
        assert sides(ones((9, 12), (2, 5), (7, 8)).to(dtype)) == [(2, 5), (7, 8)]
    assert sides(ones((9, 12, 7), (2, 3), (0, 12), (4, 7))) == [(2, 3), (0, 12), (4, 7)]
    assert sides(ones((9, 12), (0, 3), (5, 12)), margin=2) == [(-2, 5), (3, 14)]


def test_a_box_holds_every_mask_of_the_batch():
    masks = torch.cat([ones((60, 60), (5, 9), (30, 31)), ones((60, 60), (20, 29), (33, 38))])
    # Rows 5 … 28 and 4 on each side.
    assert sides(masks, margin=MARGIN, multiple=MULTIPLE) == [(1, 33), (26, 42)]
    assert sides(masks) == [(5, 29), (30, 38)]


@pytest.mark.parametrize(("margin", "multiple", "side"), [(MARGIN, MULTIPLE, 16), (0, 1, 1)])
def test_an_empty_mask_has_a_box_too(margin, multiple, side):
    found = sides(torch.zeros(1, 1, 20, 20, 20), margin=margin, multiple=multiple)
    assert [stop - start for start, stop in found] == [side] * 3


def test_cut_and_paste_by_hand():
    image, box = torch.arange(12.0).reshape(1, 1, 3, 4), (slice(-1, 2), slice(2, 5))
    before = image.clone()
    found = cut(image, box)
    assert found[0, 0].tolist() == [[0, 0, 0], [2, 3, 0], [6, 7, 0]]
    assert paste(found, box, image.shape[2:])[0, 0].tolist() == [[0, 0, 2, 3], [0, 0, 6, 7], [0, 0, 0, 0]]
    found.zero_()
    assert torch.equal(image, before)
    assert torch.equal(cut(image, (slice(-3, 0), slice(0, 4))), torch.zeros(1, 1, 3, 4))  # beyond the image


@pytest.mark.parametrize(
    "inside",
    [
        ((12, 20), (14, 22)),
        ((0, 5), (25, 33)),
        ((0, 30), (0, 33)),
        ((29, 30), (0, 1)),
        ((3, 9), (10, 20), (0, 2)),
        ((0, 30), (4, 5), (5, 7)),
    ],
    ids=["within", "corner", "all", "one voxel", "3d", "3d all"],
)
def test_there_and_back_again_keeps_what_lies_in_the_box(inside):
    shape = (30, 33, 7)[: len(inside)]
    mask, image = ones(shape, *inside), normal(2, 3, *shape)
    box = enclosing(mask, margin=MARGIN, multiple=MULTIPLE)
    small = cut(image, box)
    assert all(n % MULTIPLE == 0 for n in small.shape[2:])
    again = paste(small, box, image.shape[2:])
    assert torch.equal(again * mask, image * mask)
    within = (..., *(slice(max(side.start, 0), side.stop) for side in box))
    kept = torch.zeros_like(image)
    kept[within] = image[within]
    assert torch.equal(again, kept)
    assert torch.equal(cut(again, box), small)
