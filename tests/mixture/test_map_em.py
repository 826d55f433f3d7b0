"""EM with priors within one place: steps by hand, its limits, planted Gaussians, absent tissues, outliers, batches."""

from __future__ import annotations

import functools
import itertools

import numpy as np
import pytest
import torch
from scipy import stats
from tensors import assert_same, each_dtype, each_mask_dtype, is_finite, normal, parts, row
from torch import Tensor

from monai_deepgmm.mixture import map_em, statistics
from monai_deepgmm.mixture.fit import Fit
from monai_deepgmm.mixture.gaussian import Mixture, e_step, m_step
from monai_deepgmm.mixture.map_em import DensityModel, Prior, SpatialPrior, standardised
from monai_deepgmm.mixture.map_em import fit_map_em as fit
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
#: Every voxel an observation, no neighbourhood: with priors that weigh next to nothing, nearly an SVGMM.
PLAIN = SpatialPrior(sigma_mm=0.0, temper=1.0, denoise_mm=0.0)
GAUSSIAN = DensityModel(dof=None)

each_shape = pytest.mark.parametrize("shape", [(40, 42), (30, 10, 9)], ids=["2d", "3d"])
each_density = pytest.mark.parametrize(
    "density", [GAUSSIAN, DensityModel(), DensityModel(4.0, 0.02)], ids=["gauss", "t", "outliers"]
)


def scene(shape=(40, 42), *, batch=1, blur=1.0) -> tuple[Tensor, Tensor, Tensor]:
    """Three bands of planted Gaussians: image, place (other holes in each image, within one box), labels ``(*S)``."""
    rows = torch.arange(shape[0]).reshape(-1, *[1] * (len(shape) - 1)).expand(shape)
    labels = (rows * K) // shape[0]
    image = CENTRES[labels] + blur * torch.einsum("...ij,b...j->b...i", FACTORS[labels], normal(batch, *shape, M))
    place = torch.ones(batch, 1, *shape, dtype=DOUBLE)
    for b in range(batch):
        place[b, :, 3 : 3 + b, 4:9] = 0
    return image.movedim(-1, 1), place, labels


def halves(noise: float = 0.3) -> tuple[Tensor, Tensor]:
    """One sequence, 40 × 40: −1 on the left, 1 on the right."""
    image = torch.ones(1, 1, 40, 40, dtype=DOUBLE)
    image[..., :20] = -1
    return image + noise * normal(1, 1, 40, 40), torch.ones_like(image)


def run(image: Tensor, place: Tensor, prior: Prior = PRIOR, **options) -> Fit:
    return fit(image, place, prior, (1.0,) * (image.ndim - 2), **options)


def two(*means: float, **strengths: float) -> Prior:
    """A prior on tissues in equal shares of one sequence."""
    expected = torch.tensor(means, dtype=DOUBLE)[:, None]
    return Prior(expected, torch.full((len(means),), 1 / len(means), dtype=DOUBLE), **strengths)


def test_standardised_by_hand():
    """2, 4, 9 have the median 4 and the variance (9 + 1 + 16) / 3 about their mean 5."""
    image = torch.tensor([[[2.0, 9.0, torch.nan, 4.0], [6.0, 6.0, 1e30, 6.0]]], dtype=DOUBLE)
    place = torch.tensor([[[1.0, 1.0, 0.0, 1.0]]], dtype=DOUBLE)
    found = standardised(image, place)
    deviation = (26 / 3) ** 0.5
    assert found[0, 0].tolist() == pytest.approx([-2 / deviation, 5 / deviation, 0, 0])
    assert found[0, 1].tolist() == [0, 0, 0, 0]  # a constant is its own median
    assert standardised(image, 0 * place).abs().max() == 0


def test_the_first_e_step_by_hand():
    """Before any iteration the mixture is the prior's; each voxel's odds are π g^β."""
    image = torch.tensor([[[-1.0, 0.0, 1.0]]], dtype=DOUBLE)
    prior = two(-1.0, 0.5)._replace(shares=torch.tensor([0.3, 0.7], dtype=DOUBLE), variance=0.4)
    spatial = SpatialPrior(sigma_mm=0.0, temper=0.25, denoise_mm=0.0)
    found = run(image, torch.ones_like(image), prior, spatial=spatial, density=GAUSSIAN, max_iter=0)
    z = np.array([-1.0, 0.0, 1.0]) / (2 / 3) ** 0.5
    density = np.stack([stats.norm(m, 0.4**0.5).pdf(z) for m in (-1.0, 0.5)])
    odds = np.array([[0.3], [0.7]]) * density**0.25
    np.testing.assert_allclose(found.resp[0].numpy(), odds / odds.sum(0))
    nll = found.diagnostics.nll.item()
    assert nll == pytest.approx(-np.log((np.array([[0.3], [0.7]]) * density).sum(0)).mean())  # it is not tempered
    assert found.diagnostics.trace.tolist() == [[nll]]
    assert not found.diagnostics.converged.any()


def test_the_m_step_by_hand():
    """Means drawn to their priors and covariances shrunk, from the responsibilities of the step before."""
    image, place, _ = scene()
    prior = PRIOR._replace(variance=0.7, mean_strength=0.6, variance_strength=0.9)
    before, after = (run(image, place, prior, density=GAUSSIAN, max_iter=n, tol=0) for n in (2, 3))
    z = smooth(standardised(image, place), place, SpatialPrior().denoise_mm, (1.0, 1.0))[0].flatten(1).numpy()
    w, n = before.resp[0].flatten(1).numpy(), place.sum().item()
    for k in range(K):
        m, share = prior.means[k].numpy(), prior.shares[k].item()
        kappa, nu = 0.6 * share * n, 0.9 * share * n
        mean = ((w[k] * z).sum(1) + kappa * m) / (w[k].sum() + kappa)
        away = z - mean[:, None]
        covariance = ((w[k] * away) @ away.T + nu * 0.7 * np.eye(M)) / (w[k].sum() + nu)
        np.testing.assert_allclose(after.mixture.means[0, k].numpy(), mean, rtol=1e-6)
        np.testing.assert_allclose(after.mixture.covariances[0, k].numpy(), covariance, rtol=1e-6)


def test_with_weak_priors_an_iteration_is_that_of_an_svgmm_and_many_degrees_of_freedom_are_a_gaussian():
    image, place, _ = scene()
    gaussian, student = (run(image, place, density=DensityModel(dof=dof)) for dof in (None, 1e6))
    assert_same(gaussian, student, rtol=0, atol=1e-4)
    prior = PRIOR._replace(mean_strength=0.0, variance_strength=0.0)
    start, found = (run(image, place, prior, spatial=PLAIN, density=GAUSSIAN, max_iter=n) for n in (0, 1))
    z = standardised(image, place)
    expected = m_step(z, start.resp, place, covariance="full", spatial=True, floor=0.0)
    for ours, plain in zip(found.mixture[:3], expected[:3], strict=True):
        torch.testing.assert_close(ours, plain, rtol=1e-8, atol=1e-9)
    torch.testing.assert_close(found.resp, e_step(z, place, expected), rtol=1e-6, atol=1e-8)


@each_shape
def test_the_maps_are_the_smoothed_responsibilities(shape):
    image, place, _ = scene(shape, blur=2.0)
    before, after = (run(image, place, max_iter=n, tol=0) for n in (3, 4))
    expected = smooth(before.resp, place, SpatialPrior().sigma_mm, (1.0,) * len(shape))
    torch.testing.assert_close(after.mixture.weights, expected)


def density_of(x: Tensor, dof: float | None, mean: Tensor, covariance: Tensor) -> tuple[Tensor, Tensor]:
    seen = statistics.of_centred(x, torch.ones_like(x[:, :1]), torch.ones_like(x[..., 0]), "full")
    return map_em._density(seen, Mixture(torch.ones(1, 1), mean[None, None], covariance[None, None]), dof)


@pytest.mark.parametrize("dof", [1.0, 4.0, 10.0, None])
def test_a_density_is_scipys(dof):
    points, mean, covariance = normal(1, M, 50) * 4, CENTRES[1], FACTORS[1] @ FACTORS[1].T
    found, _ = density_of(points, dof, mean, covariance)
    peer = stats.multivariate_normal if dof is None else functools.partial(stats.multivariate_t, df=dof)
    expected = peer(mean.numpy(), covariance.numpy()).logpdf(points[0].T.numpy())
    np.testing.assert_allclose(found[0, 0].numpy(), expected)


def test_a_voxel_far_away_is_worth_less_but_to_a_gaussian():
    """(ν + M) / (ν + d²): more than 1 at the mean, 1 at d² = M, next to nothing far away."""
    points = torch.tensor([[[0.0, 2.0**0.5, 100.0], [0.0, 0.0, 0.0]]], dtype=DOUBLE)
    for dof, expected in ((6.0, [8 / 6, 1, 8 / 10_006]), (None, [1, 1, 1])):
        _, worth = density_of(points, dof, torch.zeros(2, dtype=DOUBLE), torch.eye(2, dtype=DOUBLE))
        assert worth[0, 0].tolist() == pytest.approx(expected)


def test_one_student_is_scipys_fit():
    image = torch.from_numpy(stats.t(4).rvs(900, random_state=0)).reshape(1, 1, 30, 30)
    prior, place = two(0.0, mean_strength=0.0, variance_strength=0.0), torch.ones_like(image)
    found = run(image, place, prior, spatial=PLAIN, density=DensityModel(dof=4.0), tol=0, max_iter=100)
    z = standardised(image, place).flatten().numpy()
    _, centre, width = stats.t.fit(z, fdf=4)
    assert found.mixture.means.item() == pytest.approx(centre, abs=2e-4)
    assert found.mixture.covariances.item() == pytest.approx(width**2, rel=2e-3)
    assert found.diagnostics.nll.item() == pytest.approx(-stats.t(4, centre, width).logpdf(z).mean(), abs=1e-6)


@pytest.mark.parametrize(
    ("density", "robust"),
    [
        (DensityModel(None, 0.02), True),
        (DensityModel(10.0, 0.02), True),
        (DensityModel(10.0), True),
        (DensityModel(4.0), True),
        (GAUSSIAN, False),
    ],
    ids=str,
)
def test_outliers_move_only_the_means_of_gaussians(density, robust):
    """On the image's scale, when eight voxels are put far away."""
    image, place = halves()
    far = image.clone()
    far[0, 0, ::10, 30:36:5] = 60.0
    prior, found = two(-1.0, 1.0, mean_strength=0.01, variance_strength=0.01), []
    for x in (image, far):
        means = run(x, place, prior, spatial=SpatialPrior(denoise_mm=0.0), density=density).mixture.means[0, :, 0]
        found.append(means * x.std(correction=0) + x.flatten().median())
    moved = (found[0] - found[1]).abs().max()
    assert moved < 0.05 if robust else moved > 1


def test_outliers_are_labelled_all_the_same_and_the_nll_counts_them():
    image, place = halves()
    # One component: −log((1 − o) g + o / span^M).
    found = run(image, place, two(0.0), spatial=PLAIN, density=DensityModel(None, 0.1, span=8.0), max_iter=0)
    inlier = stats.norm(0, 0.5**0.5).pdf(standardised(image, place).numpy())
    assert found.diagnostics.nll.item() == pytest.approx(-np.log(0.9 * inlier + 0.1 / 8).mean())
    image[0, 0, 7, 30] = 60.0
    found = run(image, place, two(-1.0, 1.0), density=DensityModel(outliers=0.05))
    torch.testing.assert_close(found.resp.sum(1, keepdim=True), place)
    assert found.resp[0, :, 7, 30].argmax() == 1


@each_shape
@each_density
def test_planted_bands_are_found_in_the_priors_order(shape, density):
    image, place, labels = scene(shape)
    found = run(image, place, density=density)
    assert found.diagnostics.converged.all()
    assert (found.resp.argmax(1)[0] == labels).double().mean() > 0.97
    order = [2, 0, 1]
    mixed = PRIOR._replace(means=PRIOR.means[order], shares=PRIOR.shares[order])
    other = run(image, place, mixed, density=density)
    torch.testing.assert_close(other.resp, found.resp[:, order])
    torch.testing.assert_close(other.mixture.means, found.mixture.means[:, order])
    torch.testing.assert_close(other.diagnostics.nll, found.diagnostics.nll)


@each_shape
def test_planted_gaussians_are_found_with_their_full_covariances(shape):
    image, place, labels = scene(shape)
    weak = PRIOR._replace(mean_strength=0.01, variance_strength=0.01)
    mixture = run(image, place, weak, spatial=SpatialPrior(temper=1.0, denoise_mm=0.0), density=GAUSSIAN).mixture
    z = standardised(image, place)[0]
    scale = image[0].flatten(1).std(1, correction=0)
    for k in range(K):
        planted = FACTORS[k] @ FACTORS[k].T / (scale[:, None] * scale)
        torch.testing.assert_close(mixture.means[0, k], z[:, labels == k].mean(1), rtol=0, atol=0.03)
        torch.testing.assert_close(mixture.covariances[0, k], planted, rtol=0, atol=0.03)
    assert mixture.covariances[0, 0, 0, 1] > 0.03
    assert mixture.covariances[0, 1, 0, 1] < -0.03


def test_a_strong_prior_keeps_the_means_and_the_covariances_and_voxels_worth_nothing_the_shares():
    image, place, _ = scene()
    found = run(image, place, spatial=SpatialPrior(temper=0.0))
    torch.testing.assert_close(found.resp, PRIOR.shares.reshape(1, K, 1, 1) * place)
    assert found.diagnostics.converged.all()
    found = run(image, place, PRIOR._replace(mean_strength=1e9)).mixture
    torch.testing.assert_close(found.means[0], PRIOR.means, rtol=0, atol=1e-6)
    found = run(image, place, PRIOR._replace(variance=0.3, variance_strength=1e9), density=GAUSSIAN).mixture
    expected = 0.3 * torch.eye(M, dtype=DOUBLE).expand(K, -1, -1)
    torch.testing.assert_close(found.covariances[0], expected, rtol=0, atol=1e-6)


@each_density
def test_an_absent_tissue_keeps_its_prior(density):
    image, prior = normal(1, 1, 40, 40), two(0.0, 9.0)
    found = run(image, torch.ones_like(image), prior, density=density)
    assert is_finite(found)
    assert found.mixture.means[0, :, 0].tolist() == pytest.approx([0, 9], abs=0.2)
    assert found.mixture.covariances[0, 1].item() == pytest.approx(prior.variance, rel=0.5)
    assert found.resp[0, 1].sum() < 1


@each_density
def test_where_a_component_lies_decides_where_brightness_does_not(density):
    """Two tissues of one brightness, of which the first lies on the left: up to a factor, however often it is given."""
    image, place = normal(1, 1, 40, 40), torch.ones(1, 1, 40, 40, dtype=DOUBLE)
    left = torch.linspace(4, -4, 40, dtype=DOUBLE).expand(1, 1, 40, 40)
    prior = Prior(torch.zeros(2, 1, dtype=DOUBLE), torch.tensor([0.5, 0.5], dtype=DOUBLE))
    location = torch.cat([left, -left], 1)
    found = run(image, place, prior._replace(location=location), density=density)
    assert (found.resp.argmax(1)[..., :18] == 0).all()
    assert (found.resp.argmax(1)[..., 22:] == 1).all()
    torch.testing.assert_close(found.mixture.weights.sum(1), torch.ones(1, 40, 40, dtype=DOUBLE))
    shifted = location + torch.tensor([3.0, -7.0], dtype=DOUBLE).reshape(1, 2, 1, 1)
    again = run(image, place, prior._replace(location=shifted), density=density)
    torch.testing.assert_close(again.resp, found.resp)
    flat = run(image, place, prior._replace(location=torch.zeros_like(location)), density=density)
    torch.testing.assert_close(flat.resp, run(image, place, prior, density=density).resp)


def test_neighbours_make_up_for_noise():
    image, place = halves(noise=2.0)
    right = [
        ((run(image, place, two(-0.5, 0.5), spatial=spatial).resp.argmax(1) == 1) == (torch.arange(40) >= 20))
        for spatial in (SpatialPrior(sigma_mm=s, denoise_mm=0.0) for s in (0.0, 2.2))
    ]
    assert right[1].double().mean() > 0.95
    assert right[1].double().mean() > right[0].double().mean() + 0.15


def test_the_neighbourhood_is_measured_in_millimetres():
    image, place, _ = scene(blur=2.0)
    one = fit(image, place, PRIOR, (1.0, 1.5))
    spatial = SpatialPrior(sigma_mm=2 * SpatialPrior().sigma_mm, denoise_mm=2 * SpatialPrior().denoise_mm)
    torch.testing.assert_close(one.resp, fit(image, place, PRIOR, (2.0, 3.0), spatial=spatial).resp)
    assert not torch.allclose(one.resp, fit(image, place, PRIOR, (2.0, 3.0)).resp)


@pytest.mark.parametrize(("scale", "shift"), [(1e-3, 0.0), (250.0, -1e3)])
def test_scaling_or_shifting_a_sequence_changes_nothing(scale, shift):
    image, place, _ = scene(blur=2.0)
    other = torch.stack([image[:, 0], scale * image[:, 1] + shift], 1)
    torch.testing.assert_close(run(other, place).resp, run(image, place).resp, rtol=0, atol=1e-7)


@each_shape
@each_density
def test_the_parts_of_a_fit_belong_together_and_nothing_given_is_changed(shape, density):
    image, place, _ = scene(shape, batch=3, blur=2.0)
    given = [part.clone() for part in (image, place, *PRIOR[:2])]
    fitted = run(image, place, density=density)
    torch.testing.assert_close(fitted.resp.sum(1, keepdim=True), place)
    torch.testing.assert_close(fitted.mixture.weights.sum(1, keepdim=True), place)
    assert fitted.resp.shape == fitted.mixture.weights.shape == (3, K, *shape)
    assert fitted.mixture.means.shape == (3, K, M)
    assert fitted.mixture.covariances.shape == (3, K, M, M)
    assert (torch.linalg.eigvalsh(fitted.mixture.covariances) > 0).all()
    found = fitted.diagnostics
    assert found.trace.shape == (found.iterations.max() + 1, 3)
    assert torch.equal(found.trace[-1], found.nll)
    assert all((found.trace[n:, b] == found.trace[n, b]).all() for b, n in enumerate(found.iterations))
    assert found.reseeded is found.collapsed is None
    assert_same(run(image, place, density=density), fitted)
    assert all(torch.equal(a, b) for a, b in zip((image, place, *PRIOR[:2]), given, strict=True))


@each_density
def test_an_image_does_not_depend_on_its_batch(density):
    """To the bit where their places have one box and as many voxels; to a rounding where they are cut differently."""
    image, _, _ = scene(batch=3, blur=1.5)
    place = torch.ones_like(image[:, :1])
    place[0, :, 35:37, 5:35] = 0
    place[1, :, 5:25, 30:33] = 0
    place[2, :, 20:35, 10:14] = 0
    smaller = place.clone()
    smaller[0, ..., :10] = 0
    together, mixed = (run(image, p, density=density, tol=1e-4) for p in (place, smaller))
    assert len(together.diagnostics.iterations.unique()) > 1  # so that they end at their own time
    for b in range(3):
        one = slice(b, b + 1)
        assert_same(run(image[one], place[one], density=density, tol=1e-4), row(together, b))
        alone = run(image[one], smaller[one], density=density, tol=1e-4)
        torch.testing.assert_close(alone.resp[0], mixed.resp[b], rtol=0, atol=1e-10)


@pytest.mark.parametrize("outside", [torch.nan, torch.inf, 1e30])
def test_what_lies_outside_the_place_never_reaches_the_fit(outside):
    image, place, _ = scene(batch=2, blur=2.0)
    place[0, :, :, :15] = 0
    assert_same(run(torch.where(place > 0, image, outside), place), run(image, place))


@each_dtype
@each_mask_dtype
def test_the_dtype_follows_the_image(dtype, mask_dtype):
    image, place, _ = scene()
    found = run(image.to(dtype), place.to(mask_dtype))
    assert {part.dtype for part in parts(found) if part.is_floating_point()} == {dtype}
    torch.testing.assert_close(found.resp.double(), run(image, place).resp, rtol=0, atol=1e-4)


@each_density
@pytest.mark.parametrize("voxels", [0, 1, 2, None])
def test_places_of_hardly_any_voxel_and_constant_images_stay_finite(density, voxels):
    image, place, _ = scene(batch=2)
    alone = run(image[1:], place[1:], density=density)
    if voxels is None:
        image[0] = 7.0
    else:
        place[0] = 0
        place[0, 0, 20, 20 : 20 + voxels] = 1
    found, only = run(image, place, density=density), run(image[:1], place[:1], density=density)
    assert is_finite(found)
    assert is_finite(only)
    torch.testing.assert_close(found.resp.sum(1, keepdim=True), place)
    torch.testing.assert_close(only.resp.sum(1, keepdim=True), place[:1])
    torch.testing.assert_close(found.resp[1], alone.resp[0], rtol=0, atol=1e-10)


@pytest.mark.parametrize(("tol", "iterations", "converged"), [(2.0, 1, True), (0.0, 7, False)])
def test_a_large_tolerance_ends_at_once_and_none_never(tol, iterations, converged):
    image, place, _ = scene(batch=2, blur=2.0)
    found = run(image, place, tol=tol, max_iter=7).diagnostics
    assert found.iterations.tolist() == [iterations] * 2
    assert found.converged.tolist() == [converged] * 2
    assert found.trace.shape == (iterations + 1, 2)


def test_it_ends_when_the_responsibilities_change_little():
    image, place, _ = scene(blur=2.0)
    found = run(image, place, tol=1e-3)
    n = int(found.diagnostics.iterations[0])
    steps = [run(image, place, tol=0.0, max_iter=i).resp for i in (n - 2, n - 1, n)]
    before, last = ((b - a).abs().sum() / (K * place.sum()) for a, b in itertools.pairwise(steps))
    assert last < 1e-3 <= before
    assert torch.equal(found.resp, steps[-1])
