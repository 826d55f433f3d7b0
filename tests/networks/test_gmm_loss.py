"""Ma's losses against hand-computed values, identities and finite differences."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from monai_deepgmm.mixture import bias_field as bias
from monai_deepgmm.mixture.gaussian import COVARIANCES, Mixture, e_step, m_step, nll
from monai_deepgmm.networks.gmm_loss import (
    IGNORE,
    REDUCTIONS,
    GMMLoss,
    LabelCrossEntropy,
    TotalLoss,
    l_gmm,
    shaded,
    total_variation,
)
from monai_deepgmm.networks.nll_loss import MeanPrior, Staged

K, M = 3, 2

each_covariance = pytest.mark.parametrize("covariance", COVARIANCES)
each_degree = pytest.mark.parametrize("degree", [0, 2])
each_shape = pytest.mark.parametrize("shape", [(5, 6), (3, 4, 5)], ids=["2d", "3d"])


def scene(shape=(5, 6), *, batch=2, seed=0) -> tuple[Tensor, Tensor, Tensor]:
    """Logits, an image above 0, and a mask that leaves out a border and, in the last image, one voxel more."""
    generator = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn(batch, K, *shape, generator=generator, dtype=torch.float64)
    image = 3 + torch.randn(batch, M, *shape, generator=generator, dtype=torch.float64)
    mask = torch.ones(batch, 1, *shape, dtype=torch.float64)
    mask[..., 0] = 0
    mask[(-1, 0, *(n // 2 for n in shape))] = 0
    return logits, image, mask


def joined(*parts: Tensor) -> Tensor:
    return torch.cat(parts, 1)


def labels_of(shape=(5, 6), *, batch=2) -> Tensor:
    """Labels of the first image only, and there of half the voxels."""
    generator = torch.Generator().manual_seed(3)
    labels = torch.randint(0, K, (batch, 1, *shape), generator=generator).double()
    labels[torch.rand(labels.shape, generator=generator) < 0.5] = IGNORE
    labels[1:] = IGNORE
    return labels


def mixture_of(image: Tensor, resp: Tensor, mask: Tensor, covariance, degree: int) -> Mixture:
    if degree:
        return shaded(image, resp, mask, degree=degree, covariance=covariance)
    return m_step(image, resp, mask, covariance=covariance)


# L_GMM --------------------------------------------------------------------------------------------------------------


def test_l_gmm_of_four_voxels_by_hand():
    """0 and 2 belong to one component, 10 and 14 to the other; the fifth voxel lies outside."""
    image = torch.tensor([[[0.0, 2.0, 10.0, 14.0, 99.0]]], dtype=torch.float64)
    mask = torch.tensor([[[1.0, 1.0, 1.0, 1.0, 0.0]]], dtype=torch.float64)
    resp = torch.tensor([[[1.0, 1, 0, 0, 0], [0, 0, 1, 1, 0]]], dtype=torch.float64)
    mixture = m_step(image, resp, mask, floor=0.0)
    # π = ½, variances 1 and 4, and each voxel lies one standard deviation from its mean.
    terms = [math.log(0.5) - 0.5 * math.log(variance) - 0.5 for variance in (1, 1, 4, 4)]
    assert l_gmm(image, resp, mask, mixture).item() == pytest.approx(-sum(terms) / 4)
    assert l_gmm(image, resp, mask, mixture, reduction="sum").item() == pytest.approx(-sum(terms))


def test_a_voxel_shared_by_two_components_by_hand():
    image, mask = torch.tensor([[[1.0]]], dtype=torch.float64), torch.ones(1, 1, 1, dtype=torch.float64)
    weights, means, variances = (
        torch.tensor([x], dtype=torch.float64) for x in ([0.25, 0.75], [[0.0], [3.0]], [[1.0], [4.0]])
    )
    mixture = Mixture(weights, means, variances)
    first = math.log(0.25) - 0.5
    second = math.log(0.75) - 0.5 * math.log(4) - 0.5
    resp = torch.tensor([[[0.3], [0.7]]]).double()
    assert l_gmm(image, resp, mask, mixture).item() == pytest.approx(-0.3 * first - 0.7 * second)


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
    free = torch.zeros_like(logits).requires_grad_()
    optimiser = torch.optim.Adam([free], lr=0.5)
    for _ in range(200):
        optimiser.zero_grad()
        l_gmm(image, free.softmax(1), mask, mixture, reduction="sum").sum().backward()
        optimiser.step()
    inside = mask[:, 0] > 0
    assert torch.equal(free.argmax(1)[inside], e_step(image, mask, mixture).argmax(1)[inside])
    hard = torch.nn.functional.one_hot(e_step(image, mask, mixture).argmax(1), K).movedim(-1, 1).double()
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
def test_every_round_of_the_field_lowers_it(covariance):
    logits, image, mask = scene((12, 10))
    shade = 1 + 0.3 * torch.linspace(-1, 1, 12, dtype=torch.float64)[:, None]
    resp = logits.softmax(1)
    found = [
        l_gmm(image * shade, resp, mask, shaded(image * shade, resp, mask, degree=2, rounds=n, covariance=covariance))
        for n in range(5)
    ]
    assert all((after < before).all() for before, after in pairwise(found))


# Total variation ----------------------------------------------------------------------------------------------------


@each_shape
def test_a_constant_has_no_variation(shape):
    _, _, mask = scene(shape)
    resp = torch.full((2, K, *shape), 1 / K, dtype=torch.float64)
    assert total_variation(resp, mask).tolist() == [0, 0]


def test_a_straight_edge_by_hand():
    """4 × 6 voxels, an edge of 4 voxels' length between two tissues: each of their maps jumps by 1, 4 times."""
    resp = torch.zeros(1, 2, 4, 6, dtype=torch.float64)
    resp[:, 0, :, :2], resp[:, 1, :, 2:] = 1, 1
    mask = torch.ones(1, 1, 4, 6, dtype=torch.float64)
    assert total_variation(resp, mask, reduction="sum").item() == 8
    assert total_variation(resp, mask).item() == pytest.approx(8 / 24)
    mask[..., 2] = 0  # whoever jumps out of the mask does not count
    assert total_variation(resp, mask).item() == 0
    mask[0, 0, 0, 2] = 1  # one pair is inside again
    assert total_variation(resp, mask, reduction="sum").item() == 2


def test_a_face_of_a_volume_counts_by_its_spacing():
    resp = torch.zeros(1, 2, 3, 4, 5, dtype=torch.float64)
    resp[:, 0, :2], resp[:, 1, 2:] = 1, 1
    mask = torch.ones(1, 1, 3, 4, 5, dtype=torch.float64)
    assert total_variation(resp, mask, reduction="sum").item() == 2 * 20
    assert total_variation(resp, mask, spacing_mm=(10, 1, 1), reduction="sum").item() == pytest.approx(2 * 20 / 10)
    assert total_variation(resp, mask, spacing_mm=(1.5, 10, 3), reduction="sum").item() == 2 * 20


def test_two_differences_by_hand():
    resp = torch.tensor([[[[0.1, 0.4], [0.9, 0.2]]]], dtype=torch.float64)
    mask = torch.ones(1, 1, 2, 2, dtype=torch.float64)
    assert total_variation(resp, mask, reduction="sum").item() == pytest.approx((0.8 + 0.2) + (0.3 + 0.7))


# Labels -------------------------------------------------------------------------------------------------------------


def test_the_cross_entropy_is_the_mean_over_each_images_labelled_voxels():
    logits = torch.log(
        torch.tensor([[[0.5, 0.25, 0.9], [0.5, 0.75, 0.1]], [[0.2, 0.3, 0.4], [0.8, 0.7, 0.6]]])
    ).double()
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
    assert torch.equal(TotalLoss(own, alpha=0, beta=1)(logits, target), own(logits, target[:, :-1]))
    assert torch.equal(TotalLoss(own, alpha=1, beta=0)(logits, target), LabelCrossEntropy()(logits, labels))
    both = TotalLoss(own, alpha=0.7, beta=0.2)(logits, target)
    assert both.item() == pytest.approx(
        0.7 * LabelCrossEntropy()(logits, labels).item() + 0.2 * own(logits, target[:, :-1]).item()
    )


def test_images_without_labels_have_the_beta_term_alone():
    logits, image, mask = scene()
    nothing = torch.full_like(mask, IGNORE)
    own = GMMLoss()
    found = TotalLoss(own, alpha=5.0, beta=0.5)(logits, joined(image, mask, nothing))
    assert found.item() == pytest.approx(0.5 * own(logits, joined(image, mask)).item())


def test_a_voxel_that_is_ignored_has_no_gradient_from_the_labels():
    logits, image, mask = scene()
    labels = labels_of()
    logits.requires_grad_()
    TotalLoss(GMMLoss(), beta=0)(logits, joined(image, mask, labels)).backward()
    touched = (logits.grad != 0).any(1, keepdim=True)
    assert torch.equal(touched, labels != IGNORE)


def test_a_label_pulls_its_own_tissue_up():
    logits, image, mask = scene()
    labels = labels_of()
    logits.requires_grad_()
    TotalLoss(GMMLoss(), beta=0)(logits, joined(image, mask, labels)).backward()
    known = labels != IGNORE
    own = logits.grad.gather(1, labels.long().clamp_min(0))[known]
    assert (own < 0).all()


def test_the_epoch_reaches_a_staged_loss_inside():
    staged = Staged(GMMLoss(), start_epochs=2)
    total = TotalLoss(staged)
    total.epoch = 3
    assert staged.epoch == total.epoch == 3
    bare = TotalLoss(GMMLoss())
    bare.epoch = 3
    assert bare.epoch == 1


def test_of_several_outputs_the_finest_counts():
    logits, image, mask = scene()
    target = joined(image, mask, labels_of())
    loss = TotalLoss(GMMLoss())
    assert torch.equal(loss([logits, logits[..., ::2]], target), loss(logits, target))


# The modules ----------------------------------------------------------------------------------------------------------


@each_covariance
@each_degree
def test_gradients_are_finite_differences(covariance, degree):
    logits, image, mask = scene((4, 5))
    loss = GMMLoss(gamma=0.5, degree=degree, covariance=covariance)
    assert torch.autograd.gradcheck(lambda z: loss(z, joined(image, mask)), logits.requires_grad_())


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_gradients_of_a_shared_field_in_3d_and_of_the_total_loss(reduction):
    shape = (3, 3, 4)
    logits, image, mask = scene(shape, batch=2)
    own = GMMLoss(gamma=0.5, degree=1, covariance="full", shared=True, reduction=reduction, spacing_mm=(5, 1, 1))
    loss = TotalLoss(own, alpha=1.0, beta=0.1)
    target = joined(image, mask, labels_of(shape))
    assert torch.autograd.gradcheck(lambda z: loss(z, target), logits.requires_grad_())


@each_degree
def test_at_gamma_0_the_loss_is_l_gmm_exactly(degree):
    logits, image, mask = scene()
    resp = logits.softmax(1)
    mixture = mixture_of(image, resp, mask, "full", degree)
    loss = GMMLoss(gamma=0, degree=degree, covariance="full")(logits, joined(image, mask))
    assert torch.equal(loss, l_gmm(image, resp, mask, mixture).mean())


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_gamma_keeps_its_value_when_sums_become_means(reduction):
    """For one image both sums are divided by the same N."""
    logits, image, mask = scene(batch=1)
    target, n = joined(image, mask), mask.sum().item()
    mean, total = (GMMLoss(gamma=80.0, reduction=r)(logits, target).item() for r in ("mean", "sum"))
    assert total == pytest.approx(n * mean)


def test_terms_are_added_with_their_weights():
    logits, image, mask = scene()
    prior = MeanPrior(torch.zeros(K, M))
    target = joined(image, mask)
    resp = logits.softmax(1)
    extra = prior(m_step(image, resp, mask), resp, image, mask)
    found = GMMLoss(terms=[(0.3, prior)])(logits, target) - GMMLoss()(logits, target)
    assert found.item() == pytest.approx(0.3 * extra.item())


@each_covariance
@each_degree
def test_the_order_of_components_does_not_matter(covariance, degree):
    logits, image, mask = scene()
    loss, order = GMMLoss(gamma=0.4, degree=degree, covariance=covariance), [2, 0, 1]
    found = loss(logits[:, order], joined(image, mask)).item()
    assert found == pytest.approx(loss(logits, joined(image, mask)).item(), rel=1e-9)


@each_degree
@each_shape
def test_a_batch_is_the_mean_of_its_images(degree, shape):
    logits, image, mask = scene(shape, batch=3)
    target = joined(image, mask, labels_of(shape, batch=3))
    loss = TotalLoss(GMMLoss(gamma=0.4, degree=degree), alpha=1.0, beta=0.5)
    alone = [loss(logits[i : i + 1], target[i : i + 1]).item() for i in range(3)]
    assert loss(logits, target).item() == pytest.approx(sum(alone) / 3, rel=1e-9)


@each_degree
def test_what_lies_outside_the_mask_does_not_count(degree):
    logits, image, mask = scene()
    loss = GMMLoss(gamma=0.4, degree=degree)
    changed = torch.where(mask > 0, image, 1e3), torch.where(mask > 0, logits, -7.0)
    found = loss(changed[1], joined(changed[0], mask)).item()
    assert found == pytest.approx(loss(logits, joined(image, mask)).item())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@each_degree
@each_covariance
@pytest.mark.parametrize("where", ["nothing", "voxel", "voxels", "row", "slice"])
def test_degenerate_masks_are_never_nan(where, covariance, degree, dtype):
    logits, image, mask = scene((6, 5, 4))
    small = torch.zeros_like(mask)
    index = {"voxel": (2, 2, 2), "voxels": (slice(1, 3), 2, 2), "row": (2, slice(None), 2), "slice": (..., 2)}
    if where != "nothing":
        small[(slice(None), 0, *index[where])] = 1
    labels = torch.where(small > 0, 1.0, IGNORE)
    logits = logits.to(dtype).requires_grad_()
    loss = TotalLoss(GMMLoss(gamma=0.4, degree=degree, covariance=covariance))
    value = loss(logits, joined(image, small, labels).to(dtype))
    value.backward()
    assert value.isfinite()
    assert logits.grad.isfinite().all()
    if where == "nothing":
        assert value.item() == 0
        assert (logits.grad == 0).all()


@each_degree
def test_a_sequence_of_zeros_changes_no_gradient(degree):
    """A sequence that a patient lacks; each variance of it is the floor, in every component."""
    logits, image, mask = scene()
    loss, grads = GMMLoss(gamma=0.2, degree=degree), []
    for shown in (image, joined(image, torch.zeros_like(image[:, :1]))):
        free = logits.clone().requires_grad_()
        loss(free, joined(shown, mask)).backward()
        grads.append(free.grad)
    assert torch.allclose(*grads, atol=1e-9)


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
def test_half_precision_logits_are_lifted_before_anything_is_computed(half):
    logits, image, mask = scene()
    target = joined(image, mask, labels_of()).float()
    loss = TotalLoss(GMMLoss(gamma=0.2, degree=2))
    low = logits.to(half)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = loss(low, target)
    assert found.dtype == torch.float32
    assert torch.equal(found, loss(low.float(), target))


def test_the_loss_tells_a_shaded_image_from_its_tissues():
    """Where the field is free, the true tissues of a shaded image cost no more than those of the clean one, nearly."""
    shade = 1 + 0.35 * torch.linspace(-1, 1, 30, dtype=torch.float64)[:, None]
    generator = torch.Generator().manual_seed(0)
    tissue = torch.randint(0, 2, (1, 30, 20), generator=generator)
    resp = torch.nn.functional.one_hot(tissue, 2).movedim(-1, 1).double()
    clean = 1 + tissue[:, None] + 0.05 * torch.randn(1, 1, 30, 20, generator=generator, dtype=torch.float64)
    mask = torch.ones_like(clean)
    logits = 20 * resp
    plain, field = GMMLoss(), GMMLoss(degree=2, rounds=5)
    cost = plain(logits, joined(clean, mask)).item()
    assert plain(logits, joined(clean * shade, mask)).item() > cost + 0.5
    assert field(logits, joined(clean * shade, mask)).item() == pytest.approx(cost, abs=0.1)


def test_unknown_reductions_list_the_choices():
    with pytest.raises(ValueError, match="choose one of mean, sum"):
        GMMLoss(reduction="median")
    _, image, mask = scene()
    with pytest.raises(ValueError, match="choose one of mean, sum"):
        total_variation(image, mask, reduction="median")


def test_the_field_of_the_loss_is_the_fields():
    logits, image, mask = scene()
    found = GMMLoss(degree=2, rounds=1).mixture(image, logits.softmax(1), mask)
    start = m_step(image, logits.softmax(1), mask)
    assert torch.equal(found.field, bias.field(image, logits.softmax(1), mask, start, bias.basis(mask, 2)))


# What they are for ----------------------------------------------------------------------------------------------------


def patches(seed: int, *, shading: float = 0.0, noise: float = 0.15) -> tuple[Tensor, Tensor, Tensor]:
    """Four images of patches of three tissues in two sequences: image, labels ``(B, *S)``, mask."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(4, K, 6, 6, generator=generator)
    labels = torch.nn.functional.interpolate(coarse, size=(32, 32), mode="bilinear").argmax(1)
    means = torch.tensor([[1.0, 2.2], [1.6, 1.0], [2.2, 1.6]])
    line = torch.linspace(-1, 1, 32)
    shade = torch.stack([(1 + shading * line)[:, None].expand(32, 32), (1 - shading * line)[None].expand(32, 32)])
    image = means[labels].movedim(-1, 1) * shade + noise * torch.randn(4, M, 32, 32, generator=generator)
    return image, labels, torch.ones(4, 1, 32, 32)


def learnt(loss: torch.nn.Module, image: Tensor, target: Tensor, labels: Tensor, seed: int, lr: float = 1e-2) -> float:
    """The share of voxels that a small network gets right."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = torch.nn.Sequential(
            torch.nn.Conv2d(M, 16, 3, padding=1), torch.nn.LeakyReLU(), torch.nn.Conv2d(16, 16, 3, padding=1),
            torch.nn.LeakyReLU(), torch.nn.Conv2d(16, K, 1),
        )  # fmt: skip
    optimiser = torch.optim.Adam(network.parameters(), lr=lr)
    for _ in range(100):
        optimiser.zero_grad()
        loss(network(image), target).backward()
        optimiser.step()
    return (network(image).argmax(1) == labels).float().mean().item()


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_beside_scribbles_the_mixture_helps(seed):
    """Of each image four voxels of each tissue are labelled."""
    image, labels, mask = patches(seed, noise=0.3)
    generator = torch.Generator().manual_seed(seed)
    known = torch.full_like(mask, IGNORE)
    for scribbled, truth in zip(known[:, 0], labels, strict=True):
        for tissue in range(K):
            where = torch.nonzero(truth == tissue)
            chosen = where[torch.randperm(len(where), generator=generator)[:4]]
            scribbled[chosen[:, 0], chosen[:, 1]] = tissue
    target = joined(image, mask, known)
    alone, both = (learnt(TotalLoss(GMMLoss(gamma=0.1), beta=b), image, target, labels, seed) for b in (0, 0.3))
    assert both > alone + 0.03


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_on_shaded_images_the_field_helps(seed):
    """Of a network that could say anything, from a blurred idea of where tissues are."""
    image, labels, mask = patches(seed, shading=0.35)
    idea = torch.nn.functional.one_hot(labels, K).movedim(-1, 1).float()
    idea = torch.nn.functional.avg_pool2d(idea, 9, 1, 4) + 0.05
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
