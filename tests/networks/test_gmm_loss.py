"""Ma's losses against hand-computed values, identities and finite differences."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from tensors import each_covariance, each_dtype, each_shape, joined, seeded
from tensors import scene as plain_scene
from torch import Tensor
from torch.nn import functional

from monai_deepgmm.mixture import bias_field
from monai_deepgmm.mixture.gaussian import Mixture, e_step, m_step, nll
from monai_deepgmm.networks.gmm_loss import (
    IGNORE,
    GMMLoss,
    LabelCrossEntropy,
    TotalLoss,
    l_gmm,
    shaded,
    total_variation,
)
from monai_deepgmm.networks.nll_loss import MeanPrior, Staged

K, M = 3, 2

each_degree = pytest.mark.parametrize("degree", [0, 2])


def scene(shape=(5, 6), *, batch=2) -> tuple[Tensor, Tensor, Tensor]:
    """Logits, an image above 0, and a mask."""
    logits, image, mask = plain_scene(shape, batch=batch)
    return logits, 3 + image, mask


def labels_of(shape=(5, 6), *, batch=2) -> Tensor:
    """Labels of the first image only, and there of half the voxels."""
    generator = seeded(3)
    labels = torch.randint(0, K, (batch, 1, *shape), generator=generator).double()
    labels[torch.rand(labels.shape, generator=generator) < 0.5] = IGNORE
    labels[1:] = IGNORE
    return labels


def mixture_of(image: Tensor, resp: Tensor, mask: Tensor, covariance, degree: int) -> Mixture:
    if degree:
        return shaded(image, resp, mask, degree=degree, covariance=covariance)
    return m_step(image, resp, mask, covariance=covariance)


def test_l_gmm_by_hand():
    """0 and 2 belong to one component, 10 and 14 to the other; the fifth voxel lies outside."""
    image = torch.tensor([[[0.0, 2.0, 10.0, 14.0, 99.0]]], dtype=torch.float64)
    mask = torch.tensor([[[1.0, 1.0, 1.0, 1.0, 0.0]]], dtype=torch.float64)
    resp = torch.tensor([[[1.0, 1, 0, 0, 0], [0, 0, 1, 1, 0]]], dtype=torch.float64)
    mixture = m_step(image, resp, mask, floor=0.0)
    # π = ½, variances 1 and 4, and each voxel lies one standard deviation from its mean.
    terms = [math.log(0.5) - 0.5 * math.log(variance) - 0.5 for variance in (1, 1, 4, 4)]
    assert l_gmm(image, resp, mask, mixture).item() == pytest.approx(-sum(terms) / 4)
    # A voxel shared by two components.
    image, mask = torch.tensor([[[1.0]]], dtype=torch.float64), torch.ones(1, 1, 1, dtype=torch.float64)
    weights, means, variances = (
        torch.tensor([x], dtype=torch.float64) for x in ([0.25, 0.75], [[0.0], [3.0]], [[1.0], [4.0]])
    )
    first, second = math.log(0.25) - 0.5, math.log(0.75) - 0.5 * math.log(4) - 0.5
    found = l_gmm(image, torch.tensor([[[0.3], [0.7]]]).double(), mask, Mixture(weights, means, variances))
    assert found.item() == pytest.approx(-0.3 * first - 0.7 * second)


@each_covariance
@each_shape
@each_degree
def test_at_the_posterior_it_is_the_likelihood_but_for_the_entropy(covariance, shape, degree):
    """Q + H = log-likelihood, with Q = −L_GMM − (M/2) log 2π per voxel."""
    logits, image, mask = scene(shape)
    mixture = mixture_of(image, logits.softmax(1), mask, covariance, degree)
    posterior = e_step(image, mask, mixture)
    entropy = -torch.special.xlogy(posterior, posterior).flatten(1).sum(1) / mask.flatten(1).sum(1)
    expected = -l_gmm(image, posterior, mask, mixture) - M / 2 * math.log(2 * math.pi)
    assert torch.allclose(expected + entropy, -nll(image, mask, mixture))


@each_covariance
@each_shape
def test_for_given_parameters_the_best_s_is_the_posteriors_arg_max(covariance, shape):
    logits, image, mask = scene(shape)
    mixture = m_step(image, logits.softmax(1), mask, covariance=covariance)
    best = e_step(image, mask, mixture).argmax(1)
    free = torch.zeros_like(logits).requires_grad_()
    optimiser = torch.optim.Adam([free], lr=0.5)
    for _ in range(200):
        optimiser.zero_grad()
        (l_gmm(image, free.softmax(1), mask, mixture) * mask.flatten(1).sum(1)).sum().backward()
        optimiser.step()
    inside = mask[:, 0] > 0
    assert torch.equal(free.argmax(1)[inside], best[inside])
    hard = functional.one_hot(best, K).movedim(-1, 1).double()
    assert (l_gmm(image, hard, mask, mixture) <= l_gmm(image, free.softmax(1), mask, mixture) + 1e-12).all()


@each_covariance
def test_the_m_step_is_the_best_mixture_for_given_s(covariance):
    logits, image, mask = scene()
    resp = logits.softmax(1)
    best = m_step(image, resp, mask, covariance=covariance, floor=0.0)
    lowest = l_gmm(image, resp, mask, best)
    for factor in (0.9, 1.1):
        others = (best._replace(means=factor * best.means), best._replace(covariances=factor * best.covariances))
        assert all((l_gmm(image, resp, mask, other) > lowest).all() for other in others)


@pytest.mark.parametrize("covariance", ["diag", "full"])
def test_the_field_of_the_loss_is_the_fields_and_every_round_lowers_it(covariance):
    logits, image, mask = scene((12, 10))
    image = image * (1 + 0.3 * torch.linspace(-1, 1, 12, dtype=torch.float64)[:, None])
    resp = logits.softmax(1)
    rounds = [shaded(image, resp, mask, degree=2, rounds=n, covariance=covariance) for n in range(5)]
    found = [l_gmm(image, resp, mask, mixture) for mixture in rounds]
    assert all((after < before).all() for before, after in pairwise(found))
    first = GMMLoss(degree=2, rounds=1, covariance=covariance).mixture(image, resp, mask).field
    assert torch.equal(first, bias_field.field(image, resp, mask, rounds[0], bias_field.basis(mask, 2)))


def test_total_variation_is_the_sum_of_absolute_differences_along_the_axes():
    """Not the Euclidean norm of the two: (0.8 + 0.3) at the first voxel, then 0.7 and 0.2 for its neighbours."""
    resp = torch.tensor([[[[0.1, 0.4], [0.9, 0.2]]]], dtype=torch.float64)
    mask = torch.ones(1, 1, 2, 2, dtype=torch.float64)
    assert total_variation(resp, mask).item() == pytest.approx((0.8 + 0.3 + 0.7 + 0.2) / 4)
    # An oblique border counts both ways: each of the two steps of a staircase costs 1 across and 1 down.
    stairs = torch.tensor([[[[1.0, 0, 0], [1, 1, 0], [1, 1, 1]]]], dtype=torch.float64)
    assert total_variation(stairs, torch.ones_like(stairs)).item() == pytest.approx(4 / 9)


def test_total_variation_of_straight_edges_by_hand():
    """4 × 6 voxels, an edge of 4 voxels' length between two tissues: each of their maps jumps by 1, 4 times."""
    resp = torch.zeros(1, 2, 4, 6, dtype=torch.float64)
    resp[:, 0, :, :2], resp[:, 1, :, 2:] = 1, 1
    mask = torch.ones(1, 1, 4, 6, dtype=torch.float64)
    assert total_variation(resp, mask).item() == pytest.approx(8 / 24)
    mask[..., 2] = 0  # whoever jumps out of the mask does not count
    assert total_variation(resp, mask).item() == 0
    assert total_variation(torch.ones_like(resp), torch.ones_like(mask)).item() == 0
    mask[0, 0, 0, 2] = 1  # one pair is inside again
    assert total_variation(resp, mask).item() == pytest.approx(2 / 21)
    resp = torch.zeros(1, 2, 3, 4, 5, dtype=torch.float64)
    resp[:, 0, :2], resp[:, 1, 2:] = 1, 1  # a face of 20
    assert total_variation(resp, torch.ones(1, 1, 3, 4, 5).double()).item() == pytest.approx(2 * 20 / 60)


def test_the_cross_entropy_is_the_mean_over_each_images_labelled_voxels():
    shares = [[[0.5, 0.25, 0.9], [0.5, 0.75, 0.1]], [[0.2, 0.3, 0.4], [0.8, 0.7, 0.6]]]
    logits = torch.tensor(shares).log().double()
    labels = torch.tensor([[[0.0, 1.0, IGNORE]], [[IGNORE, IGNORE, 1.0]]], dtype=torch.float64)
    first, second = -(math.log(0.5) + math.log(0.75)) / 2, -math.log(0.6)
    assert LabelCrossEntropy()(logits, labels).item() == pytest.approx((first + second) / 2)
    labels[1] = IGNORE  # an image without labels costs nothing, but is an image all the same
    assert LabelCrossEntropy()(logits, labels).item() == pytest.approx(first / 2)


@each_shape
@each_degree
def test_at_alpha_0_or_beta_0_what_remains_is_the_other_exactly(shape, degree):
    logits, image, mask = scene(shape)
    labels = labels_of(shape)
    own, target = GMMLoss(gamma=0.3, degree=degree), joined(image, mask, labels)
    free, taught = own(logits, target[:, :-1]), LabelCrossEntropy()(logits, labels)
    assert torch.equal(TotalLoss(own, alpha=0, beta=1)(logits, target), free)
    assert torch.equal(TotalLoss(own, alpha=1, beta=0)(logits, target), taught)
    both = TotalLoss(own, alpha=0.7, beta=0.2)(logits, target)
    assert both.item() == pytest.approx(0.7 * taught.item() + 0.2 * free.item())
    assert torch.equal(TotalLoss(own)([logits, logits[..., ::2]], target), TotalLoss(own)(logits, target))
    alone = [TotalLoss(own)(logits[[i]], target[[i]]).item() for i in range(2)]  # images count alike
    assert TotalLoss(own)(logits, target).item() == pytest.approx(sum(alone) / 2)
    nothing = TotalLoss(own, alpha=5.0, beta=0.5)(logits, joined(image, mask, torch.full_like(mask, IGNORE)))
    assert nothing.item() == pytest.approx(0.5 * free.item())


def test_a_label_pulls_its_own_tissue_up_where_it_is_known_and_nowhere_else():
    logits, image, mask = scene()
    labels = labels_of()
    logits.requires_grad_()
    TotalLoss(GMMLoss(), beta=0)(logits, joined(image, mask, labels)).backward()
    known = labels != IGNORE
    assert torch.equal((logits.grad != 0).any(1, keepdim=True), known)
    assert (logits.grad.gather(1, labels.long().clamp_min(0))[known] < 0).all()


def test_the_epoch_reaches_a_staged_loss_inside():
    staged = Staged(GMMLoss(), start_epochs=2)
    total, bare = TotalLoss(staged), TotalLoss(GMMLoss())
    total.epoch = bare.epoch = 3
    assert staged.epoch == total.epoch == 3
    assert bare.epoch == 1


def test_gradients_of_the_total_loss_in_3d():
    shape = (3, 3, 4)
    logits, image, mask = scene(shape)
    loss = TotalLoss(GMMLoss(gamma=0.5, degree=1, covariance="full"), alpha=1.0, beta=0.1)
    target = joined(image, mask, labels_of(shape))
    assert torch.autograd.gradcheck(lambda z: loss(z, target), logits.requires_grad_())


@each_degree
def test_far_behind_the_gradient_in_single_precision_is_that_in_double_precision(degree):
    """L_GMM weighs each component with s itself, so that 120 logits behind e⁻¹²⁰ is all that is left of it."""
    logits, image, mask = scene()
    logits[:, 0, 2, 3] -= 120
    grads = []
    for dtype in (torch.float64, torch.float32):
        free = logits.to(dtype, copy=True).requires_grad_()
        GMMLoss(gamma=0.2, degree=degree)(free, joined(image, mask).to(dtype)).backward()
        grads.append(free.grad.double())
    assert 0 < grads[0][0, 0, 2, 3].abs() < 1e-45
    torch.testing.assert_close(grads[1], grads[0], rtol=1e-3, atol=1e-6)


@each_degree
def test_the_loss_is_l_gmm_plus_its_terms(degree):
    logits, image, mask = scene()
    resp, prior, target = logits.softmax(1), MeanPrior(torch.zeros(K, M)), joined(image, mask)
    mixture = mixture_of(image, resp, mask, "full", degree)
    bare = GMMLoss(degree=degree, covariance="full")(logits, target)
    assert torch.equal(bare, l_gmm(image, resp, mask, mixture).mean())
    found = GMMLoss(gamma=0.7, terms=[(0.3, prior)], degree=degree, covariance="full")(logits, target)
    extra = 0.3 * prior(mixture, resp, image, mask) + 0.7 * total_variation(resp, mask).mean()
    assert found.item() == pytest.approx((bare + extra).item())


@each_dtype
@each_degree
@each_covariance
@pytest.mark.parametrize(
    "where",
    [None, (2, 2, 2), (slice(1, 3), 2, 2), (2, slice(None), 2), (..., 2)],
    ids=["nothing", "voxel", "voxels", "row", "slice"],
)
def test_degenerate_masks_are_never_nan(where, covariance, degree, dtype):
    logits, image, mask = scene((6, 5, 4))
    small = torch.zeros_like(mask)
    if where is not None:
        small[(slice(None), 0, *where)] = 1
    logits = logits.to(dtype).requires_grad_()
    loss = TotalLoss(GMMLoss(gamma=0.4, degree=degree, covariance=covariance))
    value = loss(logits, joined(image, small, torch.where(small > 0, 1.0, IGNORE)).to(dtype))
    value.backward()
    assert value.isfinite()
    assert logits.grad.isfinite().all()
    if where is None:
        assert value.item() == 0
        assert (logits.grad == 0).all()


def patches(seed: int, *, shading: float = 0.0, noise: float = 0.15) -> tuple[Tensor, Tensor, Tensor]:
    """Four images of patches of three tissues in two sequences: image, labels ``(B, *S)``, mask."""
    generator = seeded(seed)
    coarse = torch.rand(4, K, 6, 6, generator=generator)
    labels = functional.interpolate(coarse, size=(32, 32), mode="bilinear").argmax(1)
    means = torch.tensor([[1.0, 2.2], [1.6, 1.0], [2.2, 1.6]])
    line = torch.linspace(-1, 1, 32)
    shade = torch.stack([(1 + shading * line)[:, None].expand(32, 32), (1 - shading * line)[None].expand(32, 32)])
    image = means[labels].movedim(-1, 1) * shade + noise * torch.randn(4, M, 32, 32, generator=generator)
    return image, labels, torch.ones(4, 1, 32, 32)


def test_the_loss_tells_a_shaded_image_from_its_tissues():
    """Where the field is free, the true tissues of a shaded image cost no more than those of the clean one, nearly."""
    cost = {}
    for shading in (0.0, 0.35):
        image, labels, mask = patches(0, shading=shading, noise=0.05)
        logits, target = 20 * functional.one_hot(labels, K).movedim(-1, 1).float(), joined(image, mask)
        cost[shading] = [loss(logits, target).item() for loss in (GMMLoss(), GMMLoss(degree=2, rounds=5))]
    assert cost[0.35][0] > cost[0.0][0] + 0.5
    assert cost[0.35][1] == pytest.approx(cost[0.0][0], abs=0.1)


def learnt(loss: torch.nn.Module, image: Tensor, target: Tensor, labels: Tensor, seed: int) -> float:
    """The share of voxels that a small network gets right."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = torch.nn.Sequential(
            torch.nn.Conv2d(M, 16, 3, padding=1), torch.nn.LeakyReLU(), torch.nn.Conv2d(16, 16, 3, padding=1),
            torch.nn.LeakyReLU(), torch.nn.Conv2d(16, K, 1),
        )  # fmt: skip
    optimiser = torch.optim.Adam(network.parameters(), lr=1e-2)
    for _ in range(100):
        optimiser.zero_grad()
        loss(network(image), target).backward()
        optimiser.step()
    return (network(image).argmax(1) == labels).float().mean().item()


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_beside_scribbles_the_mixture_helps(seed):
    """Of each image four voxels of each tissue are labelled."""
    image, labels, mask = patches(seed, noise=0.3)
    generator = seeded(seed)
    known = torch.full_like(mask, IGNORE)
    for scribbled, reference in zip(known[:, 0], labels, strict=True):
        for tissue in range(K):
            where = torch.nonzero(reference == tissue)
            chosen = where[torch.randperm(len(where), generator=generator)[:4]]
            scribbled[chosen[:, 0], chosen[:, 1]] = tissue
    target = joined(image, mask, known)
    alone, both = (learnt(TotalLoss(GMMLoss(gamma=0.1), beta=b), image, target, labels, seed) for b in (0, 0.3))
    assert both > alone + 0.03


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_on_shaded_images_the_field_helps(seed):
    """Of a network that could say anything, from a blurred idea of where tissues are."""
    image, labels, mask = patches(seed, shading=0.35)
    idea = functional.one_hot(labels, K).movedim(-1, 1).float()
    idea = functional.avg_pool2d(idea, 9, 1, 4) + 0.05
    found = []
    for degree in (0, 2):
        logits, loss = idea.log().requires_grad_(), GMMLoss(degree=degree, covariance="full")
        optimiser = torch.optim.Adam([logits], lr=0.1)
        for _ in range(60):
            optimiser.zero_grad()
            loss(logits, joined(image, mask)).backward()
            optimiser.step()
        found.append((logits.argmax(1) == labels).float().mean().item())
    assert found[1] > found[0] + 0.03
