"""The gain of every other slice: found where it was planted, and nowhere else."""

from __future__ import annotations

import functools
from typing import NamedTuple

import pytest
import torch
from tensors import cube, seeded
from torch import Tensor
from torch.nn import functional

from monai_deepgmm.mixture import slice_gain
from monai_deepgmm.mixture.fit import Fit
from monai_deepgmm.mixture.mixel_model import Model
from monai_deepgmm.mixture.partial_volume import fit_partial_volume

SHAPE = (40, 44, 36)
ZERO = torch.zeros(2)
MEANS = torch.tensor([[1.0, 2.4], [2.0, 3.4], [3.5, 1.0]])


class Scene(NamedTuple):
    """Two sequences of three tissues in patches, shaded along the first axis, in an ellipsoid."""

    image: Tensor
    mask: Tensor
    tissues: Tensor

    def fitted(self, image: Tensor) -> Fit:
        """The fit of another image."""
        start = (0.7 * self.tissues + 0.1) * self.mask
        return fit_partial_volume(image, self.mask, start, (4.0,) * 3, Model(((0, 1), (1, 2)), voxels=6000))


@functools.cache
def scene() -> Scene:
    """The scene that all look at."""
    generator, grid = seeded(), [line.float() for line in cube(SHAPE)]
    mask = (sum(g.square() for g in grid) < 0.95).float()[None, None]
    rough = torch.rand(1, 1, *(n // 4 for n in SHAPE), generator=generator)
    height = functional.interpolate(rough, size=SHAPE, mode="trilinear", align_corners=True)
    level = (height > 0.42).long() + (height > 0.58).long()
    tissues = functional.one_hot(level[:, 0], 3).movedim(-1, 1).float() * mask
    clean = torch.einsum("bk...,km->bm...", tissues, MEANS) * (1 + 0.2 * grid[0])
    return Scene(clean + 0.1 * torch.randn(clean.shape, generator=generator), mask, tissues)


def striped(image: Tensor, share: float, axis: int) -> Tensor:
    """The image with odd slices along an axis brighter by such a share, in the first sequence."""
    gain = torch.ones(SHAPE)
    gain.movedim(axis, 0)[1::2] *= 1 + share
    return torch.cat([image[:, :1] * gain, image[:, 1:]], 1)


def found(image: Tensor, zero: Tensor = ZERO) -> Tensor | None:
    """The gain in the scene's mask."""
    return slice_gain.alternating(image, zero, (scene().mask > 0).expand_as(image))


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_a_planted_gain_is_found_along_its_axis_and_in_its_sequence(axis):
    gain = found(striped(scene().image, 0.1, axis))
    even, odd = gain[0, 0].movedim(axis, 0)[::2], gain[0, 0].movedim(axis, 0)[1::2]
    assert float(odd.mean() / even.mean()) == pytest.approx(1.1, abs=0.015)
    assert float(even.amax() - even.amin()) == float(odd.amax() - odd.amin()) == 0
    assert bool((gain[0, 1] == 1).all())


def test_zero_is_where_the_signal_begins():
    image = striped(scene().image, 0.1, 1)
    moved = found(image - 1.5, torch.tensor([-1.5, -1.5]))
    assert torch.allclose(moved, found(image), atol=1e-4)


def test_shading_noise_and_a_gain_of_each_slice_are_none():
    image, generator = scene().image, torch.Generator().manual_seed(3)
    assert found(image) is None
    assert found(striped(image, 0.01, 0)) is None
    assert found(image * (1 + 0.05 * torch.randn(SHAPE[2], generator=generator))) is None


def test_a_striped_image_gets_the_fractions_of_the_image_without_stripes():
    whole, inside = scene(), scene().mask[0, 0] > 0
    plain, lines = (whole.fitted(image) for image in (whole.image, striped(whole.image, 0.15, 1)))
    assert float((lines.resp - plain.resp)[0][:, inside].abs().mean()) < 0.01
    ratio = torch.where(inside, lines.mixture.field[0, 0] / plain.mixture.field[0, 0], torch.nan).movedim(1, 0)
    assert float(ratio[1::2].nanmean() / ratio[::2].nanmean()) == pytest.approx(1.15, abs=0.02)
