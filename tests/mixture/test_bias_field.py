"""The bias field: its basis, planted fields found again, EM that never rises, and fields that follow tissue."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from monai_deepgmm.mixture import bias_field as bias
from monai_deepgmm.mixture import em
from monai_deepgmm.mixture.gaussian import COVARIANCES, Mixture, m_step

each_covariance = pytest.mark.parametrize("covariance", COVARIANCES)
each_shape = pytest.mark.parametrize("shape", [(40, 36), (18, 16, 12)], ids=["2d", "3d"])
MEANS = torch.tensor([[1.0, 3.0], [2.0, 1.0], [3.5, 2.0]], dtype=torch.float64)


def ellipsoid(shape: tuple[int, ...]) -> Tensor:
    lines = [torch.linspace(-1, 1, n, dtype=torch.float64) for n in shape]
    grid = torch.meshgrid(*lines, indexing="ij")
    return (sum(g.square() for g in grid) < 1).double()[None, None]


def ramp(shape: tuple[int, ...], strength: float) -> Tensor:
    """From 1 − strength to 1 + strength along the first axis, with a bow along the second."""
    lines = [torch.linspace(-1, 1, n, dtype=torch.float64) for n in shape]
    first, second, *_ = torch.meshgrid(*lines, indexing="ij")
    return 1 + strength * (first + 0.3 * (second.square() - 0.3))


def scene(shape: tuple[int, ...], *, strength: float = 0.35, noise: float = 0.05, seed: int = 0):
    """Tissues in random patches, with a field per sequence: image, one-hot tissues, mask, the fields (mean 1)."""
    generator = torch.Generator().manual_seed(seed)
    mask = ellipsoid(shape)
    coarse = torch.rand(1, len(MEANS), *(n // 3 for n in shape), generator=generator, dtype=torch.float64)
    labels = torch.nn.functional.interpolate(coarse, size=shape).argmax(1)
    resp = torch.nn.functional.one_hot(labels, len(MEANS)).movedim(-1, 1).double() * mask
    planted = torch.stack([ramp(shape, strength), ramp(shape, -0.6 * strength)])[None]
    planted = planted / ((planted * mask).flatten(2).sum(2) / mask.sum()).reshape(1, 2, *[1] * len(shape))
    clean = torch.einsum("bk...,km->bm...", resp, MEANS)
    draw = torch.randn(clean.shape, generator=generator, dtype=torch.float64)
    return clean * planted + noise * draw, resp, mask, torch.where(mask > 0, planted, 1)


# Basis --------------------------------------------------------------------------------------------------------------


@each_shape
@pytest.mark.parametrize("degree", [0, 1, 3])
def test_the_basis_is_orthonormal_over_the_mask_and_begins_with_1(shape, degree):
    mask = ellipsoid(shape)
    g = bias.basis(mask, degree).flatten(2)[0]
    assert len(g) == bias.terms(degree, len(shape))
    assert torch.allclose(g @ g.T / mask.sum(), torch.eye(len(g)).double(), atol=1e-9)
    assert torch.equal(g[0], mask.flatten())


def test_the_papers_numbers_of_terms():
    for degree in range(6):
        assert bias.terms(degree, 2) == (degree + 1) * (degree + 2) // 2
        assert bias.terms(degree, 3) == (degree + 1) * (degree + 2) * (degree + 3) // 6


def test_on_a_whole_line_the_basis_is_legendres():
    """Of 5 points −1 … 1: 1, t, t² less its mean, each over its length."""
    t = torch.linspace(-1, 1, 5, dtype=torch.float64)
    found = bias.basis(torch.ones(1, 1, 5, dtype=torch.float64), 2)[0]
    bow = t.square() - 0.5
    assert torch.allclose(found[1], t / t.square().mean().sqrt())
    assert torch.allclose(found[2], bow / bow.square().mean().sqrt())


@pytest.mark.parametrize("shape", [(8, 9, 1), (1, 9), (1, 1)])
def test_what_a_thin_mask_cannot_tell_apart_is_0(shape):
    g = bias.basis(torch.ones(1, 1, *shape, dtype=torch.float64), 3).flatten(2)[0]
    lengths = g.square().mean(1)
    exist = bias.terms(3, sum(n > 1 for n in shape))
    assert int((lengths > 0.5).sum()) == exist
    assert ((lengths - 1).abs() < 1e-9).sum() + (lengths == 0).sum() == len(g)


def test_each_image_has_the_basis_of_its_own_mask():
    masks = torch.cat([ellipsoid((12, 10)), torch.ones(1, 1, 12, 10, dtype=torch.float64)])
    together = bias.basis(masks, 2)
    for one, alone in zip(together, masks, strict=True):
        assert torch.allclose(one, bias.basis(alone[None], 2)[0], atol=1e-12)


# The closed form ------------------------------------------------------------------------------------------------------


@each_shape
@each_covariance
def test_a_planted_field_is_found_given_the_tissues(shape, covariance):
    image, resp, mask, planted = scene(shape)
    mixture = m_step(image, resp, mask, covariance=covariance)
    functions = bias.basis(mask, 2)
    for _ in range(10):
        mixture = bias.m_step(image, resp, mask, mixture, functions, covariance=covariance)
    error = (mixture.field / planted - 1)[mask.expand_as(planted) > 0].abs()
    assert planted.max() > 1.3
    assert error.max() < 0.01
    # The means are those of the clean image, but for what the planted field leaves to its scale.
    assert torch.allclose(mixture.means[0], MEANS, rtol=0.01)


@each_shape
@pytest.mark.parametrize("covariance", ["diag", "full"])
def test_one_field_for_all_sequences_is_found(shape, covariance):
    _, resp, mask, planted = scene(shape)
    planted = planted[:, :1].expand(-1, 2, *shape)
    noise = 0.05 * torch.randn(planted.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    image = torch.einsum("bk...,km->bm...", resp, MEANS) * planted + noise
    mixture = m_step(image, resp, mask, covariance=covariance)
    for _ in range(10):
        mixture = bias.m_step(image, resp, mask, mixture, bias.basis(mask, 2), covariance=covariance, shared=True)
    assert torch.equal(mixture.field[:, 0], mixture.field[:, 1])
    assert (mixture.field / planted - 1)[mask.expand_as(planted) > 0].abs().max() < 0.01


def test_the_field_of_four_voxels_by_hand():
    """One tissue of mean 2: I = 1, 1, 3, 3 on t = −1, −1/3, 1/3, 1. Least squares: b = 1 + slope·t."""
    t = torch.tensor([-1, -1 / 3, 1 / 3, 1], dtype=torch.float64)
    image, mask = torch.tensor([[[1.0, 1, 3, 3]]], dtype=torch.float64), torch.ones(1, 1, 4, dtype=torch.float64)
    mixture = Mixture(torch.ones(1, 1).double(), torch.full((1, 1, 1), 2.0).double(), torch.ones(1, 1, 1).double())
    slope = float((t * image[0, 0] / 2).sum() / t.square().sum())
    found = bias.field(image, mask, mask, mixture, bias.basis(mask, 1))
    assert torch.allclose(found[0, 0], 1 + slope * t, atol=1e-6)


@each_covariance
def test_its_mean_over_the_mask_is_1_and_it_is_1_outside(covariance):
    image, resp, mask, _ = scene((20, 18))
    mixture = m_step(image, resp, mask, covariance=covariance)
    b = bias.field(image, resp, mask, mixture, bias.basis(mask, 3))
    assert torch.allclose((b * mask).flatten(2).sum(2) / mask.sum(), torch.ones(1, 2).double())
    assert (b[(mask == 0).expand_as(b)] == 1).all()


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("covariance", ["diag", "full", "tied"])  # a spherical one is not theirs alone
def test_a_sequence_of_zeros_has_no_field_and_changes_no_other(covariance, shared):
    image, resp, mask, _ = scene((20, 18))
    lacking = torch.cat([image, torch.zeros_like(image[:, :1])], 1)
    functions = bias.basis(mask, 2)
    found = [
        bias.m_step(i, resp, mask, m_step(i, resp, mask, covariance=covariance), functions,
                    covariance=covariance, shared=shared)
        for i in (image, lacking)
    ]  # fmt: skip
    assert torch.allclose(found[1].field[:, :2], found[0].field, atol=1e-5)
    assert found[1].field.isfinite().all()
    if not shared:
        assert (found[1].field[:, 2] == 1).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@each_covariance
@pytest.mark.parametrize(
    "where", ["nothing", "one voxel", "three voxels", "one row", "one slice"], ids=lambda w: w.replace(" ", "_")
)
def test_degenerate_masks_give_numbers(where, covariance, dtype):
    image, resp, mask, _ = scene((12, 10, 6))
    small = torch.zeros_like(mask)
    if where == "one voxel":
        small[..., 5, 5, 3] = 1
    elif where == "three voxels":
        small[..., 4:7, 5, 3] = 1
    elif where == "one row":
        small[..., 5, :, 3] = 1
    elif where == "one slice":
        small[..., 3] = 1
    image, resp, small = (x.to(dtype) for x in (image, resp * small, small))
    mixture = m_step(image, resp, small, covariance=covariance)
    for _ in range(3):
        mixture = bias.m_step(image, resp, small, mixture, bias.basis(small, 3), covariance=covariance)
    assert all(part.isfinite().all() for part in mixture)


# In EM ----------------------------------------------------------------------------------------------------------------


@each_shape
@each_covariance
def test_em_with_a_field_never_raises_the_nll(shape, covariance):
    image, resp, mask, _ = scene(shape, noise=0.2)
    start = (0.6 * resp + 0.4 / len(MEANS)) * mask
    for spatial in (False, True):
        fit = em.fit(image, mask, start, spatial=spatial, covariance=covariance, degree=3, max_iter=60, tol=0.0)
        assert int(fit.reseeded.sum()) == 0
        assert (fit.trace.diff(dim=0) <= 1e-9).all()
        assert (fit.trace[-1] < fit.trace[0]).all()


@each_shape
def test_an_unshaded_image_has_next_to_no_field_and_a_shaded_one_its_own(shape):
    image, resp, mask, _ = scene(shape, strength=0.0, noise=0.1)
    start = (0.6 * resp + 0.4 / len(MEANS)) * mask
    above = (em.fit(image, mask, start, degree=3).mixture.field - 1)[mask.expand_as(image) > 0].abs()
    assert above.square().mean().sqrt() < 0.01
    assert above.max() < 0.03  # at the rim
    image, _, _, planted = scene(shape, strength=0.35, noise=0.1)
    found = em.fit(image, mask, start, degree=3, covariance="full").mixture.field
    assert (found / planted - 1).abs().max() < 0.03


def test_a_field_makes_the_labels_right_again():
    image, resp, mask, _ = scene((40, 36), noise=0.2)
    image = image[:, :1]
    start = (0.4 * resp + 0.6 / len(MEANS)) * mask
    inside = mask[:, 0] > 0
    truth = resp.argmax(1)[inside]
    without, with_field = (
        (em.fit(image, mask, start, degree=degree).resp.argmax(1)[inside] == truth).double().mean().item()
        for degree in (0, 2)
    )
    assert with_field > 0.97
    assert with_field > without + 0.03


# A field that eats contrast -----------------------------------------------------------------------------------------


def halves(field: Tensor) -> tuple[Mixture, Tensor, Tensor]:
    """Two tissues, left and right, under a field ``(8, 8)``."""
    resp = torch.zeros(1, 2, 8, 8, dtype=torch.float64)
    resp[:, 0, :, :4], resp[:, 1, :, 4:] = 1, 1
    mixture = Mixture(torch.ones(1, 2) / 2, torch.ones(1, 2, 1), torch.ones(1, 2, 1), field[None, None])
    return mixture, resp, torch.ones(1, 1, 8, 8, dtype=torch.float64)


def test_a_field_that_follows_tissue_is_suspicious():
    step = torch.full((8, 8), 0.8, dtype=torch.float64)
    step[:, 4:] = 1.2
    assert bias.entangled(*halves(step)).item() == pytest.approx(1)
    assert bias.suspicious(*halves(step)).all()
    slope = 1 + 0.4 * torch.linspace(-1, 1, 8, dtype=torch.float64).expand(8, 8)  # half left, half right: 84 / 112 …
    odd = torch.arange(-7, 8, 2, dtype=torch.float64)
    assert bias.entangled(*halves(slope)).item() == pytest.approx(16 / odd.square().mean().item())


def test_a_field_across_tissues_is_not_suspicious_nor_one_that_hardly_is_there():
    across = 1 + 0.4 * torch.linspace(-1, 1, 8, dtype=torch.float64)[:, None].expand(8, 8)
    assert bias.entangled(*halves(across)).item() == pytest.approx(0, abs=1e-12)
    assert not bias.suspicious(*halves(across)).any()
    faint = torch.full((8, 8), 0.97, dtype=torch.float64)
    faint[:, 4:] = 1.03
    assert bias.entangled(*halves(faint)).item() == pytest.approx(1)
    assert not bias.suspicious(*halves(faint)).any()


def test_without_a_field_nothing_is_entangled():
    mixture, resp, mask = halves(torch.ones(8, 8))
    bare = mixture._replace(field=None)
    assert bias.entangled(bare, resp, mask).tolist() == [[0.0]]
    assert bias.suspicious(bare, resp, mask).tolist() == [[False]]


def test_on_two_halves_the_field_eats_the_contrast_and_that_is_noticed():
    """A tissue on the left and one on the right: a slope explains much of the contrast, whoever the truth is."""
    generator = torch.Generator().manual_seed(0)
    _, resp, mask = halves(torch.ones(8, 8))
    image = 1 + 0.3 * resp[:, 1:] + 0.02 * torch.randn(1, 1, 8, 8, generator=generator, dtype=torch.float64)
    start = torch.full((1, 2, 8, 8), 0.5, dtype=torch.float64) + 0.01 * torch.rand(1, 2, 8, 8, generator=generator)
    fitted = bias.m_step(image, start, mask, m_step(image, start, mask), bias.basis(mask, 3))
    assert math.isfinite(fitted.field.sum().item())
    assert bias.suspicious(fitted, resp, mask).all()
