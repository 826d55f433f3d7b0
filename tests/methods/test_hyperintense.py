"""Lesions: bright regions amid the white matter are found, bright cortex and noise are not."""

from __future__ import annotations

import torch

from monai_deepgmm import protocol
from monai_deepgmm.methods import hyperintense
from monai_deepgmm.methods.task import Images
from monai_deepgmm.mixture.fit import Diagnostics, Fit
from monai_deepgmm.mixture.gaussian import Mixture

BRAIN = protocol.load("brain")
SEQUENCES = ("T1", "FLAIR")
LESION = 3


def scene(
    *, lesion: bool = True, cortex: bool = True, level: float = 16.0, radius_mm: float = 3.2
) -> tuple[Images, Fit, torch.Tensor]:
    """White matter within grey matter within fluid; a ball in the white matter and a bright patch of the grey."""
    n = 40
    line = torch.arange(n) - (n - 1) / 2
    x, y, z = torch.meshgrid(line, line, line, indexing="ij")
    radius = (x.square() + y.square() + z.square()).sqrt()
    labels = torch.where(radius < 12, 1, torch.where(radius < 15, 0, 2))  # GM, WM, CSF
    mask = (radius < 18).double()[None, None]
    ball = ((x - 4).square() + y.square() + z.square()).sqrt() < radius_mm
    patch = ((x + 13.5).square() + y.square() + z.square()).sqrt() < 2.5
    flair = torch.tensor([10.0, 8.0, 2.0])[labels]
    flair = torch.where(ball & torch.tensor(lesion), level, flair)
    flair = torch.where(patch & torch.tensor(cortex), 16.0, flair)
    generator = torch.Generator().manual_seed(0)
    flair = flair + 0.8 * torch.randn(flair.shape, generator=generator)
    t1 = torch.tensor([6.0, 9.0, 2.0])[labels]
    image = torch.stack([t1, flair])[None].double()
    tissues = BRAIN.visible(SEQUENCES)
    expected = torch.full((1, 4, n, n, n), 0.25).double() * mask
    images = Images(image, mask, expected, BRAIN, tissues, SEQUENCES, (1.0, 1.0, 1.0))
    resp = torch.nn.functional.one_hot(labels, 3).movedim(-1, 0)[None].double() * mask
    mixture = Mixture(torch.ones(1, 3) / 3, torch.zeros(1, 3, 2), torch.eye(2).expand(1, 3, 2, 2))
    return images, Fit(resp, mixture, Diagnostics(collapsed=torch.zeros(1, 3, dtype=torch.bool))), ball


def test_a_bright_ball_in_white_matter_is_a_lesion_and_bright_cortex_is_not():
    images, fit, ball = scene()
    found = hyperintense.added(fit, images)
    lesion = found.resp[0, LESION] > 0.5
    assert 2 * (lesion & ball).sum() / (lesion.sum() + ball.sum()) > 0.85
    assert torch.allclose(found.resp.sum(1), images.mask[:, 0])
    assert found.mixture.means.shape == (1, 4, 2)
    assert abs(float(found.mixture.means[0, LESION, 1]) - 16) < 1


def test_a_healthy_brain_has_none():
    images, fit, _ = scene(lesion=False)
    found = hyperintense.added(fit, images)
    assert found.resp[0, LESION].sum() == 0
    assert not found.diagnostics.collapsed.any()


def test_where_healthy_tissue_shines_little_is_taken_for_a_lesion():
    """FLAIR shines around a place within the white matter: without a look around, 385 voxels are painted."""
    for lesion in (False, True):
        images, fit, ball = scene(lesion=lesion, cortex=False)
        square = (torch.arange(40) - 19.5).square()
        shine = 4 * torch.exp(-(square[:, None, None] + square[:, None] + square) / (2 * 5.5**2))
        image = images.image.clone()
        image[0, 1] += shine
        found = hyperintense.added(fit, images._replace(image=image, spacing_mm=(2.0, 2.0, 2.0))).resp[0, LESION] > 0.5
        assert found[~ball].sum() < ball.sum()
        assert bool((found & ball).sum() > 0.7 * ball.sum()) is lesion


def test_a_small_lesion_may_be_dim_where_no_cortex_is_near():
    """On average it is 2.2 standard deviations brighter than grey matter, and blurred into white matter."""
    images, fit, ball = scene(level=10.8, radius_mm=2.2, cortex=False)
    lesion = hyperintense.added(fit, images).resp[0, LESION] > 0.5
    assert (lesion & ball).sum() > 0.5 * ball.sum()
    assert not (lesion & ~ball).any()


def test_a_border_lies_halfway_between_a_lesion_and_its_own_surroundings():
    """Around the lesion, white matter is as bright as grey matter, which is not taken off altogether."""
    images, fit, ball = scene(cortex=False, level=14.0)
    line = torch.arange(40) - 19.5
    around = ((line[:, None, None] - 4).square() + line[:, None].square() + line.square()).sqrt() < 8
    image = images.image.clone()
    image[0, 1] += 2.2 * (around & ~ball & (fit.resp[0, 1] > 0.5))
    lesion = hyperintense.added(fit, images._replace(image=image)).resp[0, LESION] > 0.5
    assert 2 * (lesion & ball).sum() / (lesion.sum() + ball.sum()) > 0.9


def test_without_flair_there_is_no_such_tissue():
    assert [t.name for t in BRAIN.visible(["T1", "T2"])] == ["GM", "WM", "CSF"]
    assert [t.name for t in BRAIN.components(SEQUENCES)] == ["GM", "WM", "CSF"]
    assert BRAIN.merged(["T1"])[4] == BRAIN.tissue("WM").index


def test_the_mixture_starts_without_it():
    images, _, _ = scene()
    mixed = hyperintense.without(images)
    assert [t.name for t in mixed.tissues] == ["GM", "WM", "CSF"]
    assert torch.equal(mixed.expected, images.expected[:, :3])  # the fit itself makes them sum to 1


def test_what_t2_does_not_show_is_no_lesion_and_where_it_was_not_measured_flair_tells_alone():
    images, fit, ball = scene()
    t2 = torch.where(ball, 14.0, torch.tensor([10.0, 8.0, 20.0])[fit.resp[0].argmax(0)])
    dark = torch.where(ball, 0.0, t2)
    noise = 0.8 * torch.randn(t2.shape, generator=torch.Generator().manual_seed(1))
    fit = fit._replace(mixture=Mixture(torch.ones(1, 3) / 3, torch.zeros(1, 3, 3), torch.eye(3).expand(1, 3, 3, 3)))
    for values, measured, there in ((t2, 1, True), (dark, 1, False), (dark, 0, True)):
        image = torch.cat([images.image, (values + noise)[None, None]], 1)
        seen = torch.ones_like(image)
        seen[:, 2] = measured
        three = images._replace(image=image, measured=seen, sequences=("T1", "FLAIR", "T2"))
        lesion = hyperintense.added(fit, three).resp[0, LESION] > 0.5
        assert bool((lesion & ball).sum() > 0.7 * ball.sum()) is there
        assert lesion[~ball].sum() < 0.3 * ball.sum()
