"""A view of an image on a grid of its own, and the way back: positions by hand, round trips, borders."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from monai_deepgmm.images import resampling as view
from monai_deepgmm.networks.model_spec import CONTEXT


def box(shape: tuple[int, ...], *sides: slice) -> Tensor:
    """A mask ``(1, 1, *S)`` of a box."""
    mask = torch.zeros(1, 1, *shape, dtype=torch.float64)
    mask[(0, 0, *sides)] = 1
    return mask


def ramp(shape: tuple[int, ...], *slopes: float) -> Tensor:
    """``(1, 1, *S)``: 5 and the slopes times the voxel coordinates, which linear interpolation does not change."""
    lines = torch.meshgrid(*(torch.arange(n, dtype=torch.float64) for n in shape), indexing="ij")
    return (5 + sum(slope * line for slope, line in zip(slopes, lines, strict=True)))[None, None]


def waves(shape: tuple[int, ...]) -> Tensor:
    """A smooth image: a wavelength of 24 voxels along each axis."""
    lines = torch.meshgrid(*(torch.arange(n, dtype=torch.float64) for n in shape), indexing="ij")
    return torch.stack([torch.sin(line * torch.pi / 12 + i) for i, line in enumerate(lines)]).sum(0)[None, None]


def noise(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def positions(taken: view.View, image: int = 0) -> list[Tensor]:
    """The image's voxel coordinates of the view's voxels along each axis."""
    return [
        taken.centre[image, axis] + step * (torch.arange(n, dtype=torch.float64) - (n - 1) / 2)
        for axis, (n, step) in enumerate(zip(taken.size, taken.step, strict=True))
    ]


# Where -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("voxels", "spacing_mm", "grid_mm", "side"),
    [
        (24, 1.0, 1.0, 32),  # 24 mm and 4 mm on each side are 32
        (25, 1.0, 1.0, 64),
        (24, 1.5, 1.0, 64),  # 36 + 8 = 44
        (24, 1.5, 1.5, 32),  # 44 / 1.5 = 29.3
        (59, 1.0, 1.0, 96),
        (1, 1.0, 1.0, 32),
        (59, 1.0, 0.5, 160),  # 67 / 0.5 = 134
    ],
)
def test_sizes_by_hand(voxels, spacing_mm, grid_mm, side):
    mask = box((80, 20), slice(3, 3 + voxels), slice(7, 8))
    assert view.around(mask, (spacing_mm, 1.0), grid_mm).size[0] == side


def test_steps_are_image_voxels_per_voxel_of_the_view():
    taken = view.around(box((40, 40, 9), slice(10, 30), slice(12, 20), slice(2, 7)), (1.25, 1.5, 8.0), 1.0)
    assert taken.step == (1 / 1.25, 1 / 1.5, 1 / 8)
    assert taken.size == (64, 32, 64)  # 25 + 8, 12 + 8 and 40 + 8 mm
    assert taken.shape == (40, 40, 9)


def test_the_middle_by_hand():
    """Voxels 10 … 13 have their middle at 11.5, which an even view takes as it is; 10 … 14 at 12, which moves."""
    even = view.around(box((40, 40), slice(10, 14), slice(10, 15)), (1.0, 1.0), 1.0)
    assert even.centre[0, 0] == 11.5
    assert even.centre[0, 1] in (11.5, 12.5)
    assert positions(even)[0][[0, -1]].tolist() == [-4, 27]


@settings(deadline=None, max_examples=60)
@given(
    low=st.integers(0, 20),
    voxels=st.integers(1, 40),
    spacing_mm=st.floats(0.4, 10),
    grid_mm=st.floats(0.5, 4),
)
def test_a_view_holds_the_whole_mask_and_begins_on_a_voxel(low, voxels, spacing_mm, grid_mm):
    mask = box((60, 3), slice(low, low + voxels), slice(1, 2))
    taken = view.around(mask, (spacing_mm, 1.0), grid_mm)
    along = positions(taken)[0]
    assert all(n % view.MULTIPLE == 0 for n in taken.size)
    assert along[0].item() == pytest.approx(round(along[0].item()), abs=1e-6)
    assert along[0] <= low
    assert along[-1] >= low + voxels - 1
    assert abs(taken.centre[0, 0] - (low + (voxels - 1) / 2)) <= 0.5 + 1e-9


def test_a_batch_shares_the_largest_size_and_keeps_its_own_middles():
    small, large = box((60, 60), slice(2, 6), slice(2, 6)), box((60, 60), slice(10, 50), slice(20, 30))
    taken = view.around(torch.cat([small, large]), (1.0, 1.0), 1.0)
    assert taken.size == view.around(large, (1.0, 1.0), 1.0).size == (64, 32)
    torch.testing.assert_close(
        taken.centre, torch.tensor([[3.5, 3.5], [29.5, 24.5]], dtype=torch.float64), rtol=0, atol=0.5
    )
    image = noise(2, 3, 60, 60)
    both = view.look(image, taken)
    for i, mask in enumerate((small, large)):
        alone = view.around(mask, (1.0, 1.0), 1.0, taken.size)
        torch.testing.assert_close(view.look(image[i : i + 1], alone), both[i : i + 1])


def test_an_empty_mask_in_a_batch_does_not_disturb_the_others():
    full = box((40, 40), slice(10, 30), slice(10, 30))
    taken = view.around(torch.cat([torch.zeros_like(full), full]), (1.0, 1.0), 1.0)
    alone = view.around(full, (1.0, 1.0), 1.0)
    assert taken.size == alone.size
    assert torch.equal(taken.centre[1:], alone.centre)
    assert taken.centre.isfinite().all()


# Looking ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("spacing_mm", [(1.0, 1.0, 1.0), (1.25, 1.5, 8.0), (0.7, 0.9, 2.3)])
def test_a_view_shows_what_lies_at_its_positions(spacing_mm):
    image = ramp((40, 44, 12), 1.0, -2.0, 0.5)
    taken = view.around(box((40, 44, 12), slice(10, 30), slice(15, 25), slice(3, 9)), spacing_mm, 1.0)
    found = view.look(image, taken)
    assert found.shape == (1, 1, *taken.size)
    x, y, z = torch.meshgrid(*positions(taken), indexing="ij")
    within = torch.ones_like(x, dtype=torch.bool)
    for line, n in zip((x, y, z), image.shape[2:], strict=True):
        within &= (line >= 0) & (line <= n - 1)
    expected = 5 + x - 2 * y + 0.5 * z
    torch.testing.assert_close(found[0, 0][within], expected[within])
    assert within.any()


@pytest.mark.parametrize("nearest", [False, True])
def test_where_the_spacings_agree_nothing_is_interpolated(nearest):
    image = noise(1, 2, 50, 50)
    taken = view.around(box((50, 50), slice(15, 30), slice(18, 28)), (1.3, 1.3), 1.3)
    x, y = (p.round().long() for p in positions(taken))
    found = view.look(image, taken, nearest=nearest)
    torch.testing.assert_close(found, image[:, :, x[0] : x[-1] + 1, y[0] : y[-1] + 1])


def test_beyond_the_image_lies_nothing():
    """A mask in the corner: most of the view is outside, and 0 there."""
    image = noise(1, 2, 20, 24) + 9
    taken = view.around(box((20, 24), slice(0, 4), slice(20, 24)), (1.0, 1.0), 1.0)
    first = [int(p[0].round()) for p in positions(taken)]
    assert first[0] < 0 < first[1] < 24 < first[1] + 32
    expected = torch.zeros(1, 2, 32, 32, dtype=torch.float64)
    rows, columns = min(20, 32 + first[0]), 24 - first[1]
    expected[..., -first[0] : -first[0] + rows, :columns] = image[..., :rows, first[1] :]
    torch.testing.assert_close(view.look(image, taken), expected)


def test_a_mask_stays_a_mask():
    mask = box((30, 30, 5), slice(8, 20), slice(9, 21), slice(1, 4))
    found = view.look(mask, view.around(mask, (1.4, 1.4, 8.0), 1.0), nearest=True)
    assert set(found.unique().tolist()) == {0.0, 1.0}
    # Its volume in mm³ is the image's but for the rounding of its six faces to whole voxels.
    expected = 12 * 1.4, 12 * 1.4, 3 * 8.0
    sides = [int(found.amax([a for a in range(5) if a != axis]).sum()) for axis in (2, 3, 4)]
    assert all(abs(side - length) <= 1 for side, length in zip(sides, expected, strict=True))


def test_beyond_a_single_slice_lies_nothing():
    mask = box((30, 30, 1), slice(8, 20), slice(9, 21), slice(0, 1))
    found = view.look(mask, view.around(mask, (1.0, 1.0, 8.0), 1.0), nearest=True)
    assert found.sum() <= 12 * 12 * 9


# Back ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shape", "spacing_mm"), [((60, 64), (1.0, 1.0)), ((40, 40, 40), (1.0, 1.0, 1.0))], ids=["2d", "3d"]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_there_and_back_on_the_same_spacing_changes_nothing(shape, spacing_mm, dtype):
    mask = box(shape, *(slice(10, 30) for _ in shape))
    image = noise(1, 2, *shape).to(dtype)
    taken = view.around(mask, spacing_mm, 1.0)
    again = view.back(view.look(image, taken), taken)
    assert again.dtype == dtype
    assert again.shape == image.shape
    inside = mask[0, 0] > 0
    torch.testing.assert_close(again[..., inside], image[..., inside], rtol=0, atol=1e-4)


@pytest.mark.parametrize("grid_mm", [0.8, 1.0, 1.7])
@pytest.mark.parametrize(
    ("shape", "spacing_mm"), [((60, 64), (1.5, 1.1)), ((40, 40, 12), (1.4, 1.4, 2.0))], ids=["2d", "3d"]
)
def test_there_and_back_between_spacings_keeps_a_smooth_image(shape, spacing_mm, grid_mm):
    mask = box(shape, *(slice(n // 4, n - n // 4) for n in shape))
    image, taken = waves(shape), view.around(mask, spacing_mm, grid_mm)
    inside = mask[0, 0] > 0
    error = (view.back(view.look(image, taken), taken) - image)[..., inside]
    assert error.abs().max() < 0.1  # of an image between −3 and 3


@pytest.mark.parametrize("spacing_mm", [(1.25, 1.5, 8.0), (0.7, 0.9, 2.3)])
def test_what_the_network_says_lands_where_it_looked(spacing_mm):
    """Outputs that are the position itself come back as each voxel's own coordinates."""
    mask = box((40, 44, 12), slice(10, 30), slice(15, 25), slice(3, 9))
    taken = view.around(mask, spacing_mm, 1.0)
    there = torch.stack(torch.meshgrid(*positions(taken), indexing="ij"))[None]
    found = view.back(there, taken)
    expected = torch.cat([ramp((40, 44, 12), *row) - 5 for row in torch.eye(3).tolist()], 1)
    inside = mask[0, 0] > 0
    torch.testing.assert_close(found[..., inside], expected[..., inside])


def test_images_of_a_batch_come_back_to_their_own_places():
    masks = torch.cat([box((50, 50), slice(2, 20), slice(4, 22)), box((50, 50), slice(30, 48), slice(25, 43))])
    image, taken = noise(2, 1, 50, 50), view.around(masks, (1.0, 1.0), 1.0)
    again = view.back(view.look(image, taken), taken)
    torch.testing.assert_close(again * masks, image * masks)


def test_beyond_the_view_its_border_goes_on():
    taken = view.around(box((80, 80), slice(38, 42), slice(38, 42)), (1.0, 1.0), 1.0)
    assert taken.size == (32, 32)
    values = torch.zeros(1, 1, 32, 32)
    values[..., -1, :] = 3.0
    found = view.back(values, taken)
    assert (found[0, 0, 60:] == 3).all()
    assert (found[0, 0, :50] == 0).all()


def test_a_mask_at_the_border_comes_back_whole():
    mask = box((33, 30), slice(0, 33), slice(20, 30))
    image, taken = noise(1, 1, 33, 30), view.around(mask, (1.0, 1.0), 1.0)
    assert taken.size == (64, 32)
    torch.testing.assert_close(view.back(view.look(image, taken), taken) * mask, image * mask)


def test_probabilities_sum_to_one_wherever_they_come_back():
    mask = box((30, 30, 6), slice(8, 20), slice(9, 21), slice(1, 4))
    taken = view.around(mask, (1.4, 1.2, 8.0), 1.0)
    back = view.back(noise(1, 4, *taken.size).softmax(1), taken)
    torch.testing.assert_close(back.sum(1), torch.ones(1, 30, 30, 6, dtype=torch.float64))


# What the network is given ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("grid_mm", [1.0, 2.5])
def test_inputs_are_the_sequences_and_the_relative_depth(grid_mm):
    """A bar five voxels wide: 1, 2, 3, 2, 1 voxels from outside, whatever the voxel's size."""
    mask = box((32, 32), slice(4, 9), slice(0, 32))
    image = noise(1, 3, 32, 32)
    given = view.inputs(image.float(), mask, grid_mm)
    assert given.shape == (1, 3 + CONTEXT, 32, 32)
    assert given.dtype == torch.float32
    assert torch.equal(given[:, :3], image.float())
    torch.testing.assert_close(given[0, 3, 3:10, 16], torch.tensor([0, 1, 2, 3, 2, 1, 0]) / 3)


def test_inputs_in_3d():
    mask = box((16, 16, 8), slice(4, 9), slice(4, 9), slice(2, 7))
    given = view.inputs(noise(1, 2, 16, 16, 8), mask, 1.0)
    assert given.shape == (1, 3, 16, 16, 8)
    assert given[0, 2, 6, 6, 4] == 1
    assert (given[:, 2:][mask == 0] == 0).all()
