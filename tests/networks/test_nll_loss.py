"""The losses against hand-computed values, finite differences and what must not matter."""

from __future__ import annotations

import functools
import math

import pytest
import torch
from tensors import each_covariance, each_model, each_shape, joined, scene
from torch import Tensor, nn

from monai_deepgmm.mixture.gaussian import VARIANCE_FLOOR, Mixture, m_step, nll
from monai_deepgmm.networks.gmm_loss import GMMLoss, TotalLoss
from monai_deepgmm.networks.nll_loss import MeanPrior, MixtureNLL, Staged, StartCrossEntropy, Term

K, M = 3, 2


LOSSES = {
    "nll": functools.partial(MixtureNLL, spatial=False),
    "nll_v": MixtureNLL,
    "gmm_tv": functools.partial(GMMLoss, gamma=0.4),
    "gmm_bias": functools.partial(GMMLoss, gamma=0.4, degree=2),
}
each_loss = pytest.mark.parametrize("make", LOSSES.values(), ids=LOSSES)


def case(shape=(5, 6), **options) -> tuple[Tensor, Tensor]:
    """Logits, and an image above 0 with its mask."""
    logits, image, mask = scene(shape, **options)
    return logits, joined(3 + image, mask)


def value_and_gradient(loss: nn.Module, logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    logits = logits.detach().clone().requires_grad_()
    value = loss(logits, target)
    value.backward()
    return value.detach(), logits.grad


def test_the_nll_of_four_voxels_by_hand():
    """Hard weights: 0 and 2 belong to one component, 10 and 14 to the other; the fifth lies outside."""
    image = torch.tensor([[[0.0, 2.0, 10.0, 14.0, 99.0]]], dtype=torch.float64)
    mask = torch.tensor([[[1.0, 1.0, 1.0, 1.0, 0.0]]], dtype=torch.float64)
    sure = 200.0
    logits = torch.tensor([[[sure, sure, 0, 0, 0], [0, 0, sure, sure, 0]]], dtype=torch.float64)
    # Each voxel lies one standard deviation (1 and 2) from its component's mean (1 and 12).
    own = [0.5 * math.log(2 * math.pi) + math.log(deviation) + 0.5 for deviation in (1, 1, 2, 2)]
    found = MixtureNLL(spatial=True, floor=0.0)(logits, joined(image, mask))
    assert found.item() == pytest.approx(sum(own) / 4)

    def density(x: float) -> float:
        bells = ((1, 1), (12, 2))
        return sum(0.5 * math.exp(-0.5 * ((x - mean) / sd) ** 2) / (sd * math.sqrt(2 * math.pi)) for mean, sd in bells)

    found = MixtureNLL(spatial=False, floor=0.0)(logits, joined(image, mask))
    assert found.item() == pytest.approx(sum(-math.log(density(x)) for x in (0, 2, 10, 14)) / 4)


@each_shape
@each_model
@each_covariance
def test_the_loss_is_the_mean_nll_of_an_m_step_from_the_softmax(covariance, spatial, shape):
    logits, image, mask = scene(shape)
    mixture = m_step(image, logits.softmax(1), mask, covariance=covariance, spatial=spatial, floor=0.25)
    each = nll(image, mask, mixture)
    loss = MixtureNLL(spatial=spatial, covariance=covariance, floor=0.25)
    torch.testing.assert_close(loss(logits, joined(image, mask)), (each[0] + each[1]) / 2)


@each_covariance
def test_a_component_120_logits_behind_still_has_its_gradient_in_single_precision(covariance):
    """Of 100 voxels of the second tissue one is given to the first: there it still pulls with its whole weight."""
    image = torch.cat([5 + torch.linspace(-0.05, 0.05, 400), torch.linspace(-0.1, 0.1, 100)]).double()[None, None]
    logits, found = torch.full((1, 2, 500), 0.0, dtype=torch.float64), []
    logits[0, 1, :400], logits[0, 1, 400:], logits[0, 1, 450] = -120.0, 120.0, -120.0
    for dtype in (torch.float64, torch.float32):
        target = joined(image, torch.ones_like(image)).to(dtype)
        found.append(value_and_gradient(MixtureNLL(covariance=covariance), logits.to(dtype), target)[1].double())
    assert found[1][0, 1, 450] < -0.9 / 500
    torch.testing.assert_close(found[1], found[0], rtol=1e-3, atol=1e-6)


@each_model
def test_a_component_120_logits_behind_everywhere_still_has_a_gradient(spatial):
    """One voxel lies where nobody but the lost component, whose mean has become 0, could explain it."""
    image = torch.full((1, 1, 500), 5.0)
    image[..., 0] = 0
    logits = torch.zeros(1, 2, 500)
    logits[:, 1] = -120
    _, gradient = value_and_gradient(MixtureNLL(spatial=spatial), logits, joined(image, torch.ones_like(image)))
    assert gradient.isfinite().all()
    assert (gradient[0, 1] < 0).any()


@each_loss
@each_covariance
def test_gradients_are_finite_differences_and_a_step_against_them_lowers_the_loss(make, covariance):
    logits, target = case((3, 4))
    prior = MeanPrior(torch.tensor([[1.0, 0.0], [math.nan, 2.0], [0.0, -1.0]]))
    loss = make(covariance=covariance, terms=[(0.3, prior)])
    assert torch.autograd.gradcheck(lambda x: loss(x, target), logits.clone().requires_grad_(), atol=1e-5)
    value, gradient = value_and_gradient(loss, logits, target)
    assert loss(logits - 0.05 * gradient / gradient.norm(), target) < value


@each_loss
@each_covariance
@pytest.mark.parametrize("outside", [1e3, -1e6])
def test_what_lies_outside_the_mask_does_not_count(make, covariance, outside):
    logits, target = case()
    loss, mask = make(covariance=covariance), target[:, -1:]
    value, gradient = value_and_gradient(loss, logits, target)
    elsewhere = torch.where(mask > 0, target, joined(torch.full_like(target[:, :-1], outside), mask))
    said = torch.where(mask > 0, logits, 7.0 * torch.arange(K).reshape(1, K, 1, 1))
    other_value, other_gradient = value_and_gradient(loss, said, elsewhere)
    torch.testing.assert_close(other_value, value)
    torch.testing.assert_close(other_gradient, gradient, rtol=0, atol=1e-9)
    assert (gradient.masked_select(mask == 0) == 0).all()


@each_loss
@each_covariance
@each_shape
def test_images_count_alike_and_the_order_of_images_and_components_does_not_matter(make, covariance, shape):
    logits, target = case(shape, batch=3)
    prior = MeanPrior(torch.tensor([[1.0, 0.0]]).expand(K, M))
    loss, order = make(covariance=covariance, terms=[(1.0, prior)]), [2, 0, 1]
    value, gradient = value_and_gradient(loss, logits, target)
    torch.testing.assert_close(value, torch.stack([loss(logits[[i]], target[[i]]) for i in range(3)]).mean())
    for other, seen, expected in (
        (logits[order], target[order], gradient[order]),
        (logits[:, order], target, gradient[:, order]),
    ):
        again, moved = value_and_gradient(loss, other, seen)
        torch.testing.assert_close(again, value)
        torch.testing.assert_close(moved, expected)


@each_loss
@each_covariance
def test_an_empty_mask_costs_nothing_and_moves_nothing(make, covariance):
    logits, target = (part.float() for part in case())
    bare, loss = make(covariance=covariance), make(covariance=covariance, terms=[(1.0, MeanPrior(torch.ones(K, M)))])
    one, alone = (each(logits[:1], target[:1]) for each in (loss, bare))
    target[1, -1] = 0
    value, gradient = value_and_gradient(loss, logits, target)
    assert gradient.isfinite().all()
    assert (gradient[1] == 0).all()
    assert gradient[0].abs().max() > 0
    # The likelihood is the mean over both images, of which one is 0; the prior is the first image's alone.
    torch.testing.assert_close(value, alone / 2 + (one - alone))
    target[0, -1] = 0
    value, gradient = value_and_gradient(loss, logits, target)
    assert value == 0
    assert (gradient == 0).all()


@each_loss
@pytest.mark.parametrize("covariance", ["diag", "full", "tied"])  # a spherical one is not theirs alone
@pytest.mark.parametrize(("dtype", "tol"), [(torch.float64, 1e-9), (torch.float32, 1e-4)], ids=["double", "single"])
def test_a_sequence_of_zeros_changes_no_gradient(make, covariance, dtype, tol):
    logits, target = case((7, 8))
    target[:, 1] += 4 * logits.argmax(1)
    logits, target = logits.to(dtype), target.to(dtype)
    padded = joined(target[:, :1], torch.zeros_like(target[:, :1]), target[:, 1:])
    (value, gradient), (with_it, same) = (
        value_and_gradient(make(covariance=covariance), logits, t) for t in (target, padded)
    )
    assert gradient.abs().max() > 1e-3
    torch.testing.assert_close(same, gradient, rtol=tol, atol=tol * float(gradient.abs().max()))
    # The loss bears a constant more: the density of 0 under N(0, floor), of which L_GMM leaves out 2π.
    worth = 0.5 * math.log(VARIANCE_FLOOR * (2 * math.pi if isinstance(make(), MixtureNLL) else 1))
    assert with_it.item() == pytest.approx(value.item() + worth, abs=tol)


@each_loss
@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
def test_half_precision_logits_are_lifted_before_anything_is_computed(make, half):
    logits, target = (part.float() for part in case((6, 7)))
    logits = logits.to(half)
    target[:, :M] += 300  # where half precision has no digits left for the variances
    whole = joined(target, torch.full_like(target[:, :1], 1.0))
    begun = joined(target, logits.float().flip(1).softmax(1))
    loss = make(covariance="full")
    cases = [(loss, target), (Staged(loss, start_weight=1.0), begun), (TotalLoss(loss), whole)]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        # What autocast does to a product shows that it is on; the losses must not feel it.
        assert (target[0, 0] @ target[0, 0].T).dtype == torch.bfloat16
        found = [each(logits, given) for each, given in cases]
    assert {value.dtype for value in found} == {torch.float32}
    assert all(
        torch.equal(value, each(logits.float(), given)) for value, (each, given) in zip(found, cases, strict=True)
    )
    assert loss(logits.float(), target.double()).dtype == torch.float64


@each_model
def test_terms_are_added_with_their_weights(spatial):
    logits, image, mask = scene()
    seen = []

    def total(mixture: Mixture, *rest: Tensor) -> Tensor:
        seen.append((mixture.means, *rest))
        return mixture.means.sum()

    target = joined(image, mask)
    bare = MixtureNLL(spatial=spatial)(logits, target)
    loss = MixtureNLL(spatial=spatial, terms=[(0.5, total), Term(-2.0, lambda *_: torch.tensor(3.0))])
    means = m_step(image, logits.softmax(1), mask).means
    torch.testing.assert_close(loss(logits, target), bare + 0.5 * means.sum() - 6)
    for given, expected in zip(seen[0], (means, logits.softmax(1), image, mask), strict=True):
        torch.testing.assert_close(given, expected)


def test_regularisers_that_are_modules_belong_to_the_loss_but_not_to_its_checkpoint():
    prior = MeanPrior([[0.0, 1.0]])
    loss = MixtureNLL(terms=[(1.0, prior), (1.0, lambda *_: torch.tensor(0.0))])
    assert prior in list(loss.modules())
    assert not loss.state_dict()
    assert loss.to("meta").regularisers[0].means.is_meta


@pytest.mark.parametrize(
    ("wanted", "masked", "expected", "gradient"),
    [
        # Differences from WANTED: (1, 0), (0, 0) and (3, 2), (0, −4).
        ([[0.0, 1.0], [2.0, 2.0]], [1, 1], (1 + (9 + 4 + 16)) / 2, [[[1, 0], [0, 0]], [[3, 2], [0, -4]]]),
        # A mean that is not known is free.
        ([[0.0, math.nan], [2.0, 2.0]], [1, 1], (1 + (9 + 16)) / 2, [[[1, 0], [0, 0]], [[3, 0], [0, -4]]]),
        # An image with an empty mask does not count.
        ([[0.0, 1.0], [2.0, 2.0]], [0, 1], 29.0, [[[0, 0], [0, 0]], [[6, 4], [0, -8]]]),
        ([[0.0, 1.0], [2.0, 2.0]], [0, 0], 0.0, [[[0, 0], [0, 0]], [[0, 0], [0, 0]]]),
    ],
    ids=["all known", "one unknown", "one empty", "all empty"],
)
def test_the_prior_on_means_by_hand(wanted, masked, expected, gradient):
    means = torch.tensor([[[1.0, 1.0], [2.0, 2.0]], [[3.0, 3.0], [2.0, -2.0]]]).double().requires_grad_()
    mixture = Mixture(torch.full((2, 2), 0.5), means, torch.ones_like(means))
    mask = torch.tensor(masked).double().reshape(2, 1, 1, 1)
    value = MeanPrior(wanted)(mixture, torch.ones(2, 2, 1, 1), torch.zeros(2, 2, 1, 1), mask)
    assert value.item() == expected
    value.backward()
    assert means.grad.tolist() == gradient


def test_the_cross_entropy_to_a_start_by_hand_is_lowest_at_the_start_itself():
    """Odds 3 : 1 and 1 : 1 inside, expected as sure and as even; the third voxel lies outside."""
    logits = torch.tensor([[[math.log(3), 0.0, 50.0], [0.0, 0.0, -50.0]]], dtype=torch.float64)
    expected = torch.tensor([[[1.0, 0.5, 0.0], [0.0, 0.5, 1.0]]], dtype=torch.float64)
    mask = torch.tensor([[[1.0, 1.0, 0.0]]], dtype=torch.float64)
    found = StartCrossEntropy()(logits, joined(expected, mask))
    assert found.item() == pytest.approx((math.log(4 / 3) + math.log(2)) / 2)
    logits, _, mask = scene()
    expected = logits.softmax(1)
    value, gradient = value_and_gradient(StartCrossEntropy(), logits, joined(expected, mask))
    torch.testing.assert_close(gradient, torch.zeros_like(gradient), rtol=0, atol=1e-12)
    assert StartCrossEntropy()(1.1 * logits, joined(expected, mask)) > value
    assert StartCrossEntropy()(logits, joined(expected, 0 * mask)) == 0


def test_a_staged_loss_switches_after_its_epochs_and_of_several_outputs_the_finest_counts():
    logits, image, mask = scene()
    expected = logits.flip(1).softmax(1)
    target = joined(image, mask, expected)
    teach = StartCrossEntropy()(logits, joined(expected, mask))
    fit = MixtureNLL()(logits, joined(image, mask))
    plain, kept = Staged(MixtureNLL(), start_epochs=2), Staged(MixtureNLL(), start_epochs=2, start_weight=0.25)
    assert abs(teach - fit) > 0.1
    for epoch, of_plain, of_kept in ((1, teach, teach), (2, teach, teach), (3, fit, fit + 0.25 * teach)):
        plain.epoch = kept.epoch = epoch
        torch.testing.assert_close(plain(logits, target), of_plain)
        torch.testing.assert_close(kept(logits, target), of_kept)
        assert torch.equal(kept([logits, logits[..., ::2, ::2]], target), kept(logits, target))
    # It begins at once unless told otherwise; the start is not even looked at.
    torch.testing.assert_close(Staged(MixtureNLL())(logits, joined(image, mask, expected * math.nan)), fit)
