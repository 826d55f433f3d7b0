"""The bias field: its basis, planted fields found again, EM that never rises, and fields that follow tissue."""

from __future__ import annotations

import pytest
import torch
from tensors import cube, each_covariance, each_dtype, normal, seeded
from torch import Tensor
from torch.nn import functional

from monai_deepgmm.mixture import bias_field, em
from monai_deepgmm.mixture.gaussian import Mixture, m_step

each_shape = pytest.mark.parametrize("shape", [(40, 36), (18, 16, 12)], ids=["2d", "3d"])
MEANS = torch.tensor([[1.0, 3.0], [2.0, 1.0], [3.5, 2.0]], dtype=torch.float64)


def ellipsoid(shape: tuple[int, ...]) -> Tensor:
    return (sum(g.square() for g in cube(shape)) < 1).double()[None, None]


def scene(shape: tuple[int, ...], *, strength: float = 0.35, noise: float = 0.05) -> tuple[Tensor, ...]:
    """Tissues in random patches, with a field per sequence: image, one-hot tissues, mask, the fields (mean 1).

    A field goes from 1 − strength to 1 + strength along the first axis, with a bow along the second.
    """
    mask = ellipsoid(shape)
    coarse = torch.rand(1, len(MEANS), *(n // 3 for n in shape), generator=seeded(), dtype=torch.float64)
    labels = functional.interpolate(coarse, size=shape).argmax(1)
    resp = functional.one_hot(labels, len(MEANS)).movedim(-1, 1).double() * mask
    first, second, *_ = cube(shape)
    slope = first + 0.3 * (second.square() - 0.3)
    planted = torch.stack([1 + strength * slope, 1 - 0.6 * strength * slope])[None]
    planted = planted / ((planted * mask).flatten(2).sum(2) / mask.sum()).reshape(1, 2, *[1] * len(shape))
    image = torch.einsum("bk...,km->bm...", resp, MEANS) * planted + noise * normal(1, 2, *shape)
    return image, resp, mask, torch.where(mask > 0, planted, 1)


@each_shape
@pytest.mark.parametrize("degree", [0, 1, 3])
def test_the_basis_is_orthonormal_over_the_mask_and_begins_with_1(shape, degree):
    mask = ellipsoid(shape)
    g = bias_field.basis(mask, degree).flatten(2)[0]
    papers = {2: (degree + 1) * (degree + 2) // 2, 3: (degree + 1) * (degree + 2) * (degree + 3) // 6}
    assert len(g) == bias_field.terms(degree, len(shape)) == papers[len(shape)]
    assert torch.allclose(g @ g.T / mask.sum(), torch.eye(len(g)).double(), atol=1e-9)
    assert torch.equal(g[0], mask.flatten())


def test_on_a_whole_line_the_basis_is_legendres():
    """Of 5 points −1 … 1: 1, t, t² less its mean, each over its length."""
    t = torch.linspace(-1, 1, 5, dtype=torch.float64)
    found = bias_field.basis(torch.ones(1, 1, 5, dtype=torch.float64), 2)[0]
    bow = t.square() - 0.5
    assert torch.allclose(found[1], t / t.square().mean().sqrt())
    assert torch.allclose(found[2], bow / bow.square().mean().sqrt())


@pytest.mark.parametrize("shape", [(8, 9, 1), (1, 9), (1, 1)])
def test_what_a_thin_mask_cannot_tell_apart_is_0(shape):
    g = bias_field.basis(torch.ones(1, 1, *shape, dtype=torch.float64), 3).flatten(2)[0]
    lengths = g.square().mean(1)
    assert int((lengths > 0.5).sum()) == bias_field.terms(3, sum(n > 1 for n in shape))
    assert ((lengths - 1).abs() < 1e-9).sum() + (lengths == 0).sum() == len(g)


def test_each_image_has_the_basis_of_its_own_mask():
    masks = torch.cat([ellipsoid((12, 10)), torch.ones(1, 1, 12, 10, dtype=torch.float64)])
    for one, alone in zip(bias_field.basis(masks, 2), masks, strict=True):
        assert torch.allclose(one, bias_field.basis(alone[None], 2)[0], atol=1e-12)


@each_shape
@each_covariance
def test_a_planted_field_is_found_given_the_tissues(shape, covariance):
    image, resp, mask, planted = scene(shape)
    mixture = m_step(image, resp, mask, covariance=covariance)
    for _ in range(10):
        mixture = bias_field.m_step(image, resp, mask, mixture, bias_field.basis(mask, 2), covariance=covariance)
    assert planted.max() > 1.3
    assert (mixture.field / planted - 1)[mask.expand_as(planted) > 0].abs().max() < 0.01
    # The means are those of the clean image, but for what the planted field leaves to its scale.
    assert torch.allclose(mixture.means[0], MEANS, rtol=0.01)
    assert torch.allclose((mixture.field * mask).flatten(2).sum(2) / mask.sum(), torch.ones(1, 2).double())
    assert (mixture.field[(mask == 0).expand_as(planted)] == 1).all()


def test_the_field_of_four_voxels_by_hand():
    """One tissue of mean 2: I = 1, 1, 3, 3 on t = −1, −1/3, 1/3, 1. Least squares: b = 1 + slope·t."""
    t = torch.tensor([-1, -1 / 3, 1 / 3, 1], dtype=torch.float64)
    image, mask = torch.tensor([[[1.0, 1, 3, 3]]], dtype=torch.float64), torch.ones(1, 1, 4, dtype=torch.float64)
    mixture = Mixture(torch.ones(1, 1).double(), torch.full((1, 1, 1), 2.0).double(), torch.ones(1, 1, 1).double())
    slope = float((t * image[0, 0] / 2).sum() / t.square().sum())
    found = bias_field.field(image, mask, mask, mixture, bias_field.basis(mask, 1))
    assert torch.allclose(found[0, 0], 1 + slope * t, atol=1e-6)


@pytest.mark.parametrize("covariance", ["diag", "full", "tied"])  # a spherical one is not theirs alone
def test_a_sequence_of_zeros_has_no_field_and_changes_no_other(covariance):
    image, resp, mask, _ = scene((20, 18))
    functions, found = bias_field.basis(mask, 2), []
    for i in (image, torch.cat([image, torch.zeros_like(image[:, :1])], 1)):
        start = m_step(i, resp, mask, covariance=covariance)
        found.append(bias_field.m_step(i, resp, mask, start, functions, covariance=covariance).field)
    assert torch.allclose(found[1][:, :2], found[0], atol=1e-5)
    assert (found[1][:, 2] == 1).all()


@each_dtype
@each_covariance
@pytest.mark.parametrize(
    "where",
    [None, (5, 5, 3), (slice(4, 7), 5, 3), (5, slice(None), 3), (..., 3)],
    ids=["nothing", "one voxel", "three voxels", "one row", "one slice"],
)
def test_degenerate_masks_give_numbers(where, covariance, dtype):
    image, resp, mask, _ = scene((12, 10, 6))
    small = torch.zeros_like(mask)
    if where is not None:
        small[0, 0][where] = 1
    image, resp, small = (x.to(dtype) for x in (image, resp * small, small))
    mixture = m_step(image, resp, small, covariance=covariance)
    for _ in range(3):
        mixture = bias_field.m_step(image, resp, small, mixture, bias_field.basis(small, 3), covariance=covariance)
    assert all(part.isfinite().all() for part in mixture)


@each_shape
@each_covariance
@pytest.mark.parametrize("spatial", [False, True], ids=["gmm", "svgmm"])
def test_em_with_a_field_never_raises_the_nll(shape, covariance, spatial):
    image, resp, mask, _ = scene(shape, noise=0.2)
    start = (0.6 * resp + 0.4 / len(MEANS)) * mask
    options = {"covariance": covariance, "degree": 3, "max_iter": 60, "tol": 0.0}
    found = em.fit_em(image, mask, start, spatial=spatial, **options).diagnostics
    assert int(found.reseeded.sum()) == 0
    assert (found.trace.diff(dim=0) <= 1e-9).all()
    assert (found.trace[-1] < found.trace[0]).all()


@each_shape
def test_an_unshaded_image_has_next_to_no_field_and_a_shaded_one_its_own(shape):
    image, resp, mask, _ = scene(shape, strength=0.0, noise=0.1)
    start = (0.6 * resp + 0.4 / len(MEANS)) * mask
    above = (em.fit_em(image, mask, start, degree=3).mixture.field - 1)[mask.expand_as(image) > 0].abs()
    assert above.square().mean().sqrt() < 0.01
    assert above.max() < 0.03  # at the rim
    image, _, _, planted = scene(shape, strength=0.35, noise=0.1)
    found = em.fit_em(image, mask, start, degree=3, covariance="full").mixture.field
    assert (found / planted - 1).abs().max() < 0.03


def test_a_field_makes_the_labels_right_again():
    image, resp, mask, _ = scene((40, 36), noise=0.2)
    start, inside = (0.4 * resp + 0.6 / len(MEANS)) * mask, mask[:, 0] > 0
    right = [
        (em.fit_em(image[:, :1], mask, start, degree=degree).resp.argmax(1) == resp.argmax(1))[inside].double().mean()
        for degree in (0, 2)
    ]
    assert right[1] > 0.97
    assert right[1] > right[0] + 0.03


def halves(field: Tensor) -> tuple[Mixture, Tensor, Tensor]:
    """Two tissues, left and right, under a field ``(8, 8)``."""
    resp = torch.zeros(1, 2, 8, 8, dtype=torch.float64)
    resp[:, 0, :, :4], resp[:, 1, :, 4:] = 1, 1
    mixture = Mixture(torch.ones(1, 2) / 2, torch.ones(1, 2, 1), torch.ones(1, 2, 1), field[None, None])
    return mixture, resp, torch.ones(1, 1, 8, 8, dtype=torch.float64)


def test_a_field_that_follows_tissue_is_suspicious_if_it_is_notable():
    line = torch.linspace(-1, 1, 8, dtype=torch.float64)
    step = torch.where(line < 0, -1.0, 1.0).double()
    odd = torch.arange(-7, 8, 2, dtype=torch.float64)
    for above, share, suspicious in (
        (0.2 * step.expand(8, 8), 1.0, True),
        (0.03 * step.expand(8, 8), 1.0, False),  # it hardly is there
        (0.4 * line.expand(8, 8), 16 / odd.square().mean().item(), True),  # half left, half right
        (0.4 * line[:, None].expand(8, 8), 0.0, False),  # across the tissues
    ):
        found = halves(1 + above)
        assert bias_field.entangled(*found).item() == pytest.approx(share, abs=1e-12)
        assert bias_field.suspicious(*found).item() == suspicious
    mixture, resp, mask = halves(torch.ones(8, 8))
    bare = mixture._replace(field=None)
    assert bias_field.entangled(bare, resp, mask).tolist() == [[0.0]]
    assert bias_field.suspicious(bare, resp, mask).tolist() == [[False]]


def test_on_two_halves_the_field_eats_the_contrast_and_that_is_noticed():
    """A tissue on the left and one on the right: a slope explains much of the contrast."""
    _, resp, mask = halves(torch.ones(8, 8))
    image = 1 + 0.3 * resp[:, 1:] + 0.02 * normal(1, 1, 8, 8)
    start = torch.full((1, 2, 8, 8), 0.5, dtype=torch.float64) + 0.01 * torch.rand(1, 2, 8, 8, generator=seeded())
    fitted = bias_field.m_step(image, start, mask, m_step(image, start, mask), bias_field.basis(mask, 3))
    assert fitted.field.isfinite().all()
    assert bias_field.suspicious(fitted, resp, mask).all()
