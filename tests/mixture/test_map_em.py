"""MAP-EM within one place: hand-computed steps, its limits, planted Gaussians, absent tissues, outliers, batches."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor

from monai_deepgmm.mixture import map_em as mapem
from monai_deepgmm.mixture.em import Fit
from monai_deepgmm.mixture.gaussian import Mixture, e_step, m_step
from monai_deepgmm.mixture.map_em import Field, Prior, Shape, fit, standardised
from monai_deepgmm.mixture.smoothing import smooth

K, M = 3, 2
DOUBLE = torch.float64
CENTRES = torch.tensor([[-2.0, 0.0], [0.0, 2.0], [2.0, -1.0]], dtype=DOUBLE)
#: Each voxel is a centre and one of these times standard noise, so the covariances are L Lᵀ.
FACTORS = torch.tensor([[[0.5, 0.0], [0.3, 0.4]], [[0.4, 0.0], [-0.3, 0.5]], [[0.6, 0.0], [0.2, 0.3]]], dtype=DOUBLE)
#: What is expected of them, roughly.
PRIOR = Prior(
    torch.tensor([[-1.0, 0.3], [0.2, 1.0], [1.0, -0.4]], dtype=DOUBLE), torch.tensor([0.4, 0.3, 0.3], dtype=DOUBLE)
)
#: Priors that weigh next to nothing, every voxel an observation, no neighbourhood: nearly an SVGMM.
PLAIN = Field(sigma_mm=0.0, temper=1.0, denoise_mm=0.0)
GAUSSIAN = Shape(dof=None)

each_shape = pytest.mark.parametrize("size", [(40, 42), (30, 10, 9)], ids=["2d", "3d"])
each_density = pytest.mark.parametrize("shape", [GAUSSIAN, Shape(), Shape(4.0, 0.02)], ids=["gauss", "t", "outliers"])


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def scene(size=(40, 42), *, batch=1, seed=0, blur=1.0) -> tuple[Tensor, Tensor, Tensor]:
    """Three bands of planted Gaussians: image, place (other holes in each image, within one box), labels ``(*S)``."""
    rows = torch.arange(size[0]).reshape(-1, *[1] * (len(size) - 1)).expand(size)
    labels = (rows * K) // size[0]
    noise = torch.randn(batch, *size, M, generator=seeded(seed), dtype=DOUBLE)
    image = CENTRES[labels] + blur * torch.einsum("...ij,b...j->b...i", FACTORS[labels], noise)
    place = torch.ones(batch, 1, *size, dtype=DOUBLE)
    for b in range(batch):
        place[b, :, 3 : 3 + b, 4:9] = 0
    return image.movedim(-1, 1), place, labels


def halves(seed: int = 0, noise: float = 0.3) -> tuple[Tensor, Tensor]:
    """One sequence, 40 × 40: −1 on the left, 1 on the right."""
    image = torch.ones(1, 1, 40, 40, dtype=DOUBLE)
    image[..., :20] = -1
    return image + noise * torch.randn(image.shape, generator=seeded(seed), dtype=DOUBLE), torch.ones_like(image)


def spacing(image: Tensor) -> tuple[float, ...]:
    return (1.0,) * (image.ndim - 2)


def run(image: Tensor, place: Tensor, prior: Prior = PRIOR, **options) -> Fit:
    return fit(image, place, prior, spacing(image), **options)


def two(*means: float, **strengths: float) -> Prior:
    """A prior on tissues in equal shares of one sequence."""
    expected = torch.tensor(means, dtype=DOUBLE)[:, None]
    return Prior(expected, torch.full((len(means),), 1 / len(means), dtype=DOUBLE), **strengths)


def parts(found: Fit) -> list[Tensor]:
    return [found.resp, found.nll, *found.mixture[:3]]


def is_finite(found: Fit) -> bool:
    return all(bool(part.isfinite().all()) for part in (*parts(found), found.trace))


# Standardised ----------------------------------------------------------------------------------------------------


def test_standardised_by_hand():
    """2, 4, 9 have the median 4 and the variance (9 + 1 + 16) / 3 about their mean 5."""
    image = torch.tensor([[[2.0, 9.0, torch.nan, 4.0], [6.0, 6.0, 1e30, 6.0]]], dtype=DOUBLE)
    place = torch.tensor([[[1.0, 1.0, 0.0, 1.0]]], dtype=DOUBLE)
    found = standardised(image, place)
    deviation = (26 / 3) ** 0.5
    assert found[0, 0].tolist() == pytest.approx([-2 / deviation, 5 / deviation, 0, 0])
    assert found[0, 1].tolist() == [0, 0, 0, 0]  # a constant is its own median


def test_an_empty_place_is_standardised_to_zero():
    image, place, _ = scene(batch=2)
    place[1] = 0
    assert standardised(image, place)[1].abs().max() == 0


# Steps by hand ---------------------------------------------------------------------------------------------------


def test_the_first_e_step_by_hand():
    """Before any iteration the mixture is the prior's; each voxel's odds are π g^β."""
    image = torch.tensor([[[-1.0, 0.0, 1.0]]], dtype=DOUBLE)
    prior = two(-1.0, 0.5)._replace(shares=torch.tensor([0.3, 0.7], dtype=DOUBLE), variance=0.4)
    field = Field(sigma_mm=0.0, temper=0.25, denoise_mm=0.0)
    found = run(image, torch.ones_like(image), prior, field=field, shape=GAUSSIAN, max_iter=0)
    z = np.array([-1.0, 0.0, 1.0]) / (2 / 3) ** 0.5
    density = np.stack([stats.norm(m, 0.4**0.5).pdf(z) for m in (-1.0, 0.5)])
    odds = np.array([[0.3], [0.7]]) * density**0.25
    np.testing.assert_allclose(found.resp[0].numpy(), odds / odds.sum(0))
    expected = -np.log((np.array([[0.3], [0.7]]) * density).sum(0)).mean()  # the NLL is not tempered
    assert found.nll.item() == pytest.approx(expected)
    assert found.trace.tolist() == [[found.nll.item()]]
    assert not found.converged.any()


def test_the_m_step_by_hand():
    """The modes of the posterior, from the responsibilities of the step before."""
    image, place, _ = scene()
    prior = PRIOR._replace(variance=0.7, mean_strength=0.6, variance_strength=0.9)
    before, after = (run(image, place, prior, shape=GAUSSIAN, max_iter=n, tol=0) for n in (2, 3))
    z = smooth(standardised(image, place), place, Field().denoise_mm, (1.0, 1.0))[0].flatten(1).numpy()
    w = before.resp[0].flatten(1).numpy()
    n = place.sum().item()
    for k in range(K):
        m, share = prior.means[k].numpy(), prior.shares[k].item()
        kappa, nu = 0.6 * share * n, 0.9 * share * n
        mean = ((w[k] * z).sum(1) + kappa * m) / (w[k].sum() + kappa)
        away = z - mean[:, None]
        covariance = ((w[k] * away) @ away.T + nu * 0.7 * np.eye(M)) / (w[k].sum() + nu)
        np.testing.assert_allclose(after.mixture.means[0, k].numpy(), mean, rtol=1e-6)
        np.testing.assert_allclose(after.mixture.covariances[0, k].numpy(), covariance, rtol=1e-6)


def test_with_weak_priors_an_iteration_is_that_of_an_svgmm():
    image, place, _ = scene()
    prior = PRIOR._replace(mean_strength=0.0, variance_strength=0.0)
    options = {"field": PLAIN, "shape": GAUSSIAN}
    start, found = (run(image, place, prior, **options, max_iter=n) for n in (0, 1))
    z = standardised(image, place)
    expected = m_step(z, start.resp, place, covariance="full", spatial=True, floor=0.0)
    for ours, plain in zip(found.mixture, expected, strict=True):
        torch.testing.assert_close(ours, plain, rtol=1e-8, atol=1e-9)
    torch.testing.assert_close(found.resp, e_step(z, place, expected), rtol=1e-6, atol=1e-8)


@each_shape
def test_the_maps_are_the_smoothed_responsibilities(size):
    image, place, _ = scene(size, blur=2.0)
    before, after = (run(image, place, max_iter=n, tol=0) for n in (3, 4))
    expected = smooth(before.resp, place, Field().sigma_mm, spacing(image))
    torch.testing.assert_close(after.mixture.weights, expected)


def test_nothing_is_learned_where_a_voxel_is_worth_nothing():
    image, place, _ = scene()
    found = run(image, place, field=Field(temper=0.0))
    torch.testing.assert_close(found.resp, PRIOR.shares.reshape(1, K, 1, 1) * place)
    assert found.converged.all()


# Student's t and outliers ----------------------------------------------------------------------------------------


def density(x: Tensor, dof: float | None, mean: Tensor, covariance: Tensor) -> tuple[Tensor, Tensor]:
    return mapem._density(x, Mixture(torch.ones(1, 1), mean[None, None], covariance[None, None]), dof)


@pytest.mark.parametrize("dof", [2.0, 3.0, 10.0, 200.0, None])
def test_a_density_integrates_to_one(dof):
    x = torch.linspace(-2000, 2000, 400_001, dtype=DOUBLE)
    found, _ = density(x[None, None], dof, torch.tensor([0.7], dtype=DOUBLE), torch.tensor([[2.0]], dtype=DOUBLE))
    assert torch.trapezoid(found[0, 0].exp(), x).item() == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("dof", [1.0, 4.0, 10.0, None])
def test_a_density_is_scipys(dof):
    points = torch.randn(1, M, 50, generator=seeded(), dtype=DOUBLE) * 4
    mean, covariance = CENTRES[1], FACTORS[1] @ FACTORS[1].T
    found, _ = density(points, dof, mean, covariance)
    peer = stats.multivariate_normal if dof is None else stats.multivariate_t
    extra = {} if dof is None else {"df": dof}
    np.testing.assert_allclose(
        found[0, 0].numpy(), peer(mean.numpy(), covariance.numpy(), **extra).logpdf(points[0].T.numpy())
    )


def test_many_degrees_of_freedom_are_a_gaussian():
    image, place, _ = scene()
    gaussian, student = (run(image, place, shape=Shape(dof=dof)) for dof in (None, 1e6))
    for one, other in zip(parts(gaussian), parts(student), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-4)


def test_a_voxel_far_away_is_worth_less():
    """(ν + M) / (ν + d²): more than 1 at the mean, 1 at d² = M, next to nothing far away."""
    points = torch.tensor([[[0.0, 2.0**0.5, 100.0], [0.0, 0.0, 0.0]]], dtype=DOUBLE)
    identity = torch.eye(2, dtype=DOUBLE)
    _, worth = density(points, 6.0, torch.zeros(2, dtype=DOUBLE), identity)
    assert worth[0, 0].tolist() == pytest.approx([8 / 6, 1, 8 / 10_006])
    _, worth = density(points, None, torch.zeros(2, dtype=DOUBLE), identity)
    assert worth[0, 0].tolist() == [1, 1, 1]


def test_one_student_is_scipys_fit():
    image = torch.from_numpy(stats.t(4).rvs(900, random_state=0)).reshape(1, 1, 30, 30)
    prior = two(0.0, mean_strength=0.0, variance_strength=0.0)
    found = run(image, torch.ones_like(image), prior, field=PLAIN, shape=Shape(dof=4.0), tol=0, max_iter=100)
    z = standardised(image, torch.ones_like(image)).flatten().numpy()
    _, centre, width = stats.t.fit(z, fdf=4)
    assert found.mixture.means.item() == pytest.approx(centre, abs=2e-4)
    assert found.mixture.covariances.item() == pytest.approx(width**2, rel=2e-3)
    assert found.nll.item() == pytest.approx(-stats.t(4, centre, width).logpdf(z).mean(), abs=1e-6)


def moved_by_outliers(shape: Shape) -> float:
    """How far the two means move, on the image's scale, when eight voxels are put far away."""
    image, place = halves()
    far = image.clone()
    far[0, 0, ::10, 30:36:5] = 60.0
    prior = two(-1.0, 1.0, mean_strength=0.01, variance_strength=0.01)
    found = []
    for x in (image, far):
        means = run(x, place, prior, field=Field(denoise_mm=0.0), shape=shape).mixture.means[0, :, 0]
        found.append(means * x.std(correction=0) + x.flatten().median())
    return float((found[0] - found[1]).abs().max())


@pytest.mark.parametrize("shape", [Shape(None, 0.02), Shape(10.0, 0.02), Shape(10.0), Shape(4.0)])
def test_outliers_do_not_move_the_means(shape):
    assert moved_by_outliers(shape) < 0.05


def test_outliers_move_the_means_of_gaussians():
    assert moved_by_outliers(GAUSSIAN) > 1


def test_outliers_are_labelled_all_the_same():
    image, place = halves()
    image[0, 0, 7, 30] = 60.0
    found = run(image, place, two(-1.0, 1.0), shape=Shape(outliers=0.05))
    torch.testing.assert_close(found.resp.sum(1, keepdim=True), place)
    assert found.resp[0, :, 7, 30].argmax() == 1


def test_the_nll_counts_outliers():
    """One component: −log((1 − o) g + o / span^M)."""
    image, place = halves()
    found = run(image, place, two(0.0), field=PLAIN, shape=Shape(None, 0.1, span=8.0), max_iter=0)
    inlier = stats.norm(0, 0.5**0.5).pdf(standardised(image, place).numpy())
    assert found.nll.item() == pytest.approx(-np.log(0.9 * inlier + 0.1 / 8).mean())


# What it finds ---------------------------------------------------------------------------------------------------


@each_shape
@each_density
def test_planted_bands_are_found_in_the_priors_order(size, shape):
    image, place, labels = scene(size)
    found = run(image, place, shape=shape)
    assert found.converged.all()
    assert not found.collapsed.any()
    assert (found.resp.argmax(1)[0] == labels).double().mean() > 0.97


@each_shape
def test_planted_gaussians_are_found_with_their_full_covariances(size):
    image, place, labels = scene(size)
    weak = PRIOR._replace(mean_strength=0.01, variance_strength=0.01)
    found = run(image, place, weak, field=Field(temper=1.0, denoise_mm=0.0), shape=GAUSSIAN)
    z = standardised(image, place)[0]
    scale = image[0].flatten(1).std(1, correction=0)
    for k in range(K):
        planted = FACTORS[k] @ FACTORS[k].T / (scale[:, None] * scale)
        torch.testing.assert_close(found.mixture.means[0, k], z[:, labels == k].mean(1), rtol=0, atol=0.03)
        torch.testing.assert_close(found.mixture.covariances[0, k], planted, rtol=0, atol=0.03)
    assert found.mixture.covariances[0, 0, 0, 1] > 0.03
    assert found.mixture.covariances[0, 1, 0, 1] < -0.03


@each_density
def test_permuting_the_prior_permutes_the_result(shape):
    image, place, _ = scene(blur=2.0)
    order = [2, 0, 1]
    mixed = PRIOR._replace(means=PRIOR.means[order], shares=PRIOR.shares[order])
    one, other = run(image, place, shape=shape), run(image, place, mixed, shape=shape)
    torch.testing.assert_close(other.resp, one.resp[:, order])
    torch.testing.assert_close(other.mixture.means, one.mixture.means[:, order])
    torch.testing.assert_close(other.nll, one.nll)


def test_a_strong_prior_keeps_the_means():
    image, place, _ = scene()
    found = run(image, place, PRIOR._replace(mean_strength=1e9))
    torch.testing.assert_close(found.mixture.means[0], PRIOR.means, rtol=0, atol=1e-6)
    found = run(image, place, PRIOR._replace(variance=0.3, variance_strength=1e9), shape=GAUSSIAN)
    torch.testing.assert_close(
        found.mixture.covariances[0], 0.3 * torch.eye(M, dtype=DOUBLE).expand(K, -1, -1), rtol=0, atol=1e-6
    )


@each_density
def test_an_absent_tissue_keeps_its_prior(shape):
    image = torch.randn(1, 1, 40, 40, generator=seeded(), dtype=DOUBLE)
    prior = two(0.0, 9.0)
    found = run(image, torch.ones_like(image), prior, shape=shape)
    assert is_finite(found)
    assert found.mixture.means[0, :, 0].tolist() == pytest.approx([0, 9], abs=0.2)
    assert found.mixture.covariances[0, 1].item() == pytest.approx(prior.variance, rel=0.5)
    assert found.resp[0, 1].sum() < 1
    assert found.collapsed.tolist() == [[False, True]]


def test_neighbours_make_up_for_noise():
    image, place = halves(noise=2.0)
    truth = torch.arange(40).expand(40, 40) >= 20

    def right(sigma_mm: float) -> float:
        field = Field(sigma_mm=sigma_mm, denoise_mm=0.0)
        return float(((run(image, place, two(-0.5, 0.5), field=field).resp.argmax(1)[0] == 1) == truth).double().mean())

    assert right(2.2) > 0.95
    assert right(2.2) > right(0.0) + 0.15


def test_the_neighbourhood_is_measured_in_millimetres():
    image, place, _ = scene(blur=2.0)
    one = fit(image, place, PRIOR, (1.0, 1.5))
    field = Field(sigma_mm=2 * Field().sigma_mm, denoise_mm=2 * Field().denoise_mm)
    other = fit(image, place, PRIOR, (2.0, 3.0), field=field)
    torch.testing.assert_close(one.resp, other.resp)
    assert not torch.allclose(one.resp, fit(image, place, PRIOR, (2.0, 3.0)).resp)


@pytest.mark.parametrize(("scale", "shift"), [(1e-3, 0.0), (250.0, -1e3)])
def test_scaling_or_shifting_a_sequence_changes_nothing(scale, shift):
    image, place, _ = scene(blur=2.0)
    other = image.clone()
    other[:, 1] = scale * other[:, 1] + shift
    torch.testing.assert_close(run(other, place).resp, run(image, place).resp, rtol=0, atol=1e-7)


# What every fit must keep ----------------------------------------------------------------------------------------


@each_shape
@each_density
def test_the_parts_of_a_fit_belong_together(size, shape):
    image, place, _ = scene(size, batch=3, blur=2.0)
    found = run(image, place, shape=shape)
    torch.testing.assert_close(found.resp.sum(1, keepdim=True), place)
    torch.testing.assert_close(found.mixture.weights.sum(1, keepdim=True), place)
    assert found.resp.shape == found.mixture.weights.shape == (3, K, *size)
    assert found.mixture.means.shape == (3, K, M)
    assert found.mixture.covariances.shape == (3, K, M, M)
    assert found.trace.shape == (found.iterations.max() + 1, 3)
    assert torch.equal(found.trace[-1], found.nll)
    for b, n in enumerate(found.iterations):
        assert (found.trace[n:, b] == found.trace[n, b]).all()
    assert (torch.linalg.eigvalsh(found.mixture.covariances) > 0).all()
    assert not found.reseeded.any()


@each_density
def test_an_image_does_not_depend_on_its_batch(shape):
    """To the bit where their places have one box; to a rounding where they are cut differently."""
    image, place, _ = scene(batch=3, blur=1.5)
    place[1, :, 5:30, 10:35] = 0
    place[2, :, 25:35, 5:40] = 0
    together = run(image, place, shape=shape, tol=1e-4)
    assert len(together.iterations.unique()) > 1  # or the test would not show that they end at their own time
    smaller = place.clone()
    smaller[0, ..., :10] = 0
    mixed = run(image, smaller, shape=shape, tol=1e-4)
    for b in range(3):
        one = slice(b, b + 1)
        alone = run(image[one], place[one], shape=shape, tol=1e-4)
        assert alone.iterations[0] == together.iterations[b]
        assert all(torch.equal(a[0], t[b]) for a, t in zip(parts(alone), parts(together), strict=True))
        alone = run(image[one], smaller[one], shape=shape, tol=1e-4)
        torch.testing.assert_close(alone.resp[0], mixed.resp[b], rtol=0, atol=1e-10)


@pytest.mark.parametrize("outside", [torch.nan, torch.inf, 1e30])
def test_what_lies_outside_the_place_never_reaches_the_fit(outside):
    image, place, _ = scene(batch=2, blur=2.0)
    place[0, :, :, :15] = 0
    dirty = torch.where(place > 0, image, outside)
    assert all(torch.equal(a, b) for a, b in zip(parts(run(dirty, place)), parts(run(image, place)), strict=True))


def test_a_fit_is_the_same_each_time_and_changes_nothing_that_is_given():
    image, place, _ = scene(batch=2, blur=2.0)
    given = (image.clone(), place.clone(), PRIOR.means.clone(), PRIOR.shares.clone())
    first, again = run(image, place), run(image, place)
    assert all(torch.equal(a, b) for a, b in zip(parts(first), parts(again), strict=True))
    assert all(torch.equal(a, b) for a, b in zip((image, place, *PRIOR[:2]), given, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("place_dtype", [torch.float32, torch.float64, torch.bool, torch.uint8])
def test_the_dtype_follows_the_image(dtype, place_dtype):
    image, place, _ = scene()
    found = run(image.to(dtype), place.to(place_dtype))
    assert {part.dtype for part in (*parts(found), found.trace)} == {dtype}
    torch.testing.assert_close(found.resp.double(), run(image, place).resp, rtol=0, atol=1e-4)


@each_density
@pytest.mark.parametrize("voxels", [0, 1, 2])
def test_places_of_hardly_any_voxel_stay_finite(shape, voxels):
    image, place, _ = scene(batch=2)
    alone = run(image[1:], place[1:], shape=shape)
    place[0] = 0
    place[0, 0, 20, 20 : 20 + voxels] = 1
    found = run(image, place, shape=shape)
    assert is_finite(found)
    torch.testing.assert_close(found.resp.sum(1, keepdim=True), place)
    torch.testing.assert_close(found.resp[1], alone.resp[0], rtol=0, atol=1e-10)
    only = run(image[:1], place[:1], shape=shape)
    assert is_finite(only)
    torch.testing.assert_close(only.resp.sum(1, keepdim=True), place[:1])


@each_density
def test_a_constant_image_stays_finite(shape):
    image, place, _ = scene()
    found = run(torch.full_like(image, 7.0), place, shape=shape)
    assert is_finite(found)
    torch.testing.assert_close(found.resp.sum(1, keepdim=True), place)


# When it ends ----------------------------------------------------------------------------------------------------


def test_a_large_tolerance_ends_at_once_and_none_never():
    image, place, _ = scene(batch=2, blur=2.0)
    soon = run(image, place, tol=2.0)
    assert soon.iterations.tolist() == [1, 1]
    assert soon.converged.all()
    assert soon.trace.shape == (2, 2)
    never = run(image, place, tol=0.0, max_iter=7)
    assert never.iterations.tolist() == [7, 7]
    assert not never.converged.any()
    assert never.trace.shape == (8, 2)


def test_it_ends_when_the_responsibilities_change_little():
    image, place, _ = scene(blur=2.0)
    found = run(image, place, tol=1e-3)
    n = int(found.iterations[0])
    steps = [run(image, place, tol=0.0, max_iter=i).resp for i in (n - 2, n - 1, n)]
    before, last = ((b - a).abs().sum() / (K * place.sum()) for a, b in itertools.pairwise(steps))
    assert last < 1e-3 <= before
    assert torch.equal(found.resp, steps[-1])
