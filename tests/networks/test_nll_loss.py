"""The losses against hand-computed values, finite differences, and two processes against one."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from monai_deepgmm.mixture.gaussian import VARIANCE_FLOOR, Mixture, m_step, nll
from monai_deepgmm.networks.nll_loss import MeanPrior, MixtureNLL, Staged, StartCrossEntropy, Term, across_ranks

K, M = 3, 2

each_covariance = pytest.mark.parametrize("covariance", ["diag", "tied", "full"])
each_model = pytest.mark.parametrize("spatial", [False, True], ids=["gmm", "svgmm"])
each_shape = pytest.mark.parametrize("shape", [(4, 5), (2, 3, 4)], ids=["2d", "3d"])


@pytest.fixture(autouse=True)
def _two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def scene(shape=(4, 5), *, batch=2, dtype=torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    """Logits, image, and a mask that leaves out a border and, in the last image, one voxel more."""
    generator = torch.Generator().manual_seed(0)
    logits = 2 * torch.randn(batch, K, *shape, generator=generator, dtype=torch.float64)
    image = torch.randn(batch, M, *shape, generator=generator, dtype=torch.float64)
    mask = torch.ones(batch, 1, *shape, dtype=torch.float64)
    mask[..., 0] = 0
    mask[(-1, 0, *(n // 2 for n in shape))] = 0
    return logits.to(dtype), image.to(dtype), mask.to(dtype)


def joined(*parts: Tensor) -> Tensor:
    return torch.cat(parts, 1)


def value_and_gradient(loss: nn.Module, logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    logits = logits.detach().requires_grad_()
    value = loss(logits, target)
    value.backward()
    assert logits.grad is not None
    return value.detach(), logits.grad


def with_means(means: list[list[list[float]]]) -> tuple[Mixture, Tensor, Tensor, Tensor]:
    """What a regulariser is called with, for images with these means ``(B, K, M)`` and masks of one voxel."""
    mu = torch.tensor(means, dtype=torch.float64)
    batch, k, m = mu.shape
    mixture = Mixture(torch.full((batch, k), 1 / k), mu, torch.ones_like(mu))
    return mixture, torch.ones(batch, k, 1, 1), torch.zeros(batch, m, 1, 1), torch.ones(batch, 1, 1, 1)


# The mixture's likelihood ----------------------------------------------------------------------------------------


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


@each_model
@each_covariance
@pytest.mark.parametrize(("dtype", "tol"), [(torch.float64, 1e-9), (torch.float32, 1e-4)], ids=["double", "single"])
def test_a_sequence_of_zeros_changes_no_gradient(covariance, spatial, dtype, tol):
    """The loss bears a constant more: the density of 0 under N(0, floor)."""
    logits, image, mask = scene((7, 8), dtype=dtype)
    image[:, 1] += 4 * logits.argmax(1)
    loss = MixtureNLL(spatial=spatial, covariance=covariance)
    value, gradient = value_and_gradient(loss, logits, joined(image, mask))
    padded = joined(image[:, :1], torch.zeros_like(mask), image[:, 1:], mask)
    with_it, same_gradient = value_and_gradient(loss, logits, padded)
    assert with_it.item() == pytest.approx(value.item() + 0.5 * math.log(2 * math.pi * VARIANCE_FLOOR), abs=tol)
    assert gradient.abs().max() > 1e-3
    torch.testing.assert_close(same_gradient, gradient, rtol=tol, atol=tol * float(gradient.abs().max()))


@each_shape
@each_model
@each_covariance
def test_the_loss_is_the_mean_nll_of_an_m_step_from_the_softmax(covariance, spatial, shape):
    logits, image, mask = scene(shape)
    mixture = m_step(image, logits.softmax(1), mask, covariance=covariance, spatial=spatial, floor=0.25)
    each = nll(image, mask, mixture)
    loss = MixtureNLL(spatial=spatial, covariance=covariance, floor=0.25)
    torch.testing.assert_close(loss(logits, joined(image, mask)), (each[0] + each[1]) / 2)


@each_model
@each_covariance
def test_gradients_are_finite_differences(covariance, spatial):
    logits, image, mask = scene((3, 4))
    prior = MeanPrior(torch.tensor([[1.0, 0.0], [math.nan, 2.0], [0.0, -1.0]]))
    loss = MixtureNLL(spatial=spatial, covariance=covariance, terms=[(0.3, prior)])
    assert torch.autograd.gradcheck(lambda x: loss(x, joined(image, mask)), logits.requires_grad_(), atol=1e-5)


@each_model
@each_covariance
def test_a_step_against_the_gradient_lowers_the_loss(covariance, spatial):
    logits, image, mask = scene()
    loss, target = MixtureNLL(spatial=spatial, covariance=covariance), joined(image, mask)
    value, gradient = value_and_gradient(loss, logits, target)
    assert loss(logits - 0.05 * gradient / gradient.norm(), target) < value


@each_model
@each_covariance
@pytest.mark.parametrize("outside", [1e3, -1e6])
def test_what_lies_outside_the_mask_does_not_count(covariance, spatial, outside):
    logits, image, mask = scene()
    loss = MixtureNLL(spatial=spatial, covariance=covariance)
    value, gradient = value_and_gradient(loss, logits, joined(image, mask))
    elsewhere = torch.where(mask > 0, image, outside)
    said = torch.where(mask > 0, logits, 7.0 * torch.arange(K).reshape(1, K, 1, 1))
    other_value, other_gradient = value_and_gradient(loss, said, joined(elsewhere, mask))
    torch.testing.assert_close(other_value, value)
    torch.testing.assert_close(other_gradient, gradient, rtol=0, atol=1e-9)
    assert (gradient.masked_select(mask == 0) == 0).all()


@each_model
def test_the_order_of_images_and_of_components_does_not_matter(spatial):
    logits, image, mask = scene(batch=3)
    prior = MeanPrior(torch.tensor([[1.0, 0.0]]).expand(K, M), over="batch")
    loss = MixtureNLL(spatial=spatial, terms=[(1.0, prior)])
    value, gradient = value_and_gradient(loss, logits, joined(image, mask))
    order = [2, 0, 1]
    again, moved = value_and_gradient(loss, logits[order], joined(image, mask)[order])
    torch.testing.assert_close(again, value)
    torch.testing.assert_close(moved, gradient[order])
    again, moved = value_and_gradient(loss, logits[:, order], joined(image, mask))
    torch.testing.assert_close(again, value)
    torch.testing.assert_close(moved, gradient[:, order])


@each_model
@each_covariance
def test_a_batch_is_the_mean_of_its_images(covariance, spatial):
    logits, image, mask = scene(batch=3)
    loss = MixtureNLL(spatial=spatial, covariance=covariance)
    alone = [loss(logits[i : i + 1], joined(image, mask)[i : i + 1]) for i in range(3)]
    torch.testing.assert_close(loss(logits, joined(image, mask)), torch.stack(alone).mean())


@each_model
@each_covariance
def test_an_empty_mask_costs_nothing_and_moves_nothing(covariance, spatial):
    logits, image, mask = scene(dtype=torch.float32)
    prior = MeanPrior(torch.ones(K, M))
    loss = MixtureNLL(spatial=spatial, covariance=covariance, terms=[(1.0, prior)])
    full, _ = value_and_gradient(loss, logits[:1], joined(image, mask)[:1])
    mask[1] = 0
    value, gradient = value_and_gradient(loss, logits, joined(image, mask))
    assert gradient.isfinite().all()
    assert (gradient[1] == 0).all()
    assert gradient[0].abs().max() > 0
    bare = MixtureNLL(spatial=spatial, covariance=covariance)(logits[:1], joined(image, mask)[:1])
    # The NLL is the mean over both images, of which one is 0; the prior is the first image's alone.
    torch.testing.assert_close(value, bare / 2 + (full - bare))
    value, gradient = value_and_gradient(loss, logits, joined(image, 0 * mask))
    assert value == 0
    assert (gradient == 0).all()


# Precision -------------------------------------------------------------------------------------------------------


@each_model
@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
def test_half_precision_logits_are_lifted_before_anything_is_computed(half, spatial):
    logits, image, mask = scene((6, 7), dtype=torch.float32)
    logits, image = logits.to(half), image + 300  # where half precision has no digits left for the variances
    loss, target = MixtureNLL(spatial=spatial, covariance="full"), joined(image, mask)
    expected = loss(logits.float(), target)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        # What autocast does to a product shows that it is on; the loss must not feel it.
        assert (image[0, 0] @ image[0, 0].T).dtype == torch.bfloat16
        found = loss(logits, target)
    assert found.dtype == torch.float32
    assert torch.equal(found, expected)


def test_double_images_give_a_double_loss():
    logits, image, mask = scene()
    assert MixtureNLL()(logits.float(), joined(image, mask)).dtype == torch.float64


@each_model
def test_the_start_under_autocast_is_single_precision_too(spatial):
    logits, image, mask = scene(dtype=torch.float32)
    target = joined(image, mask, logits.softmax(1))
    staged = Staged(MixtureNLL(spatial=spatial), start_weight=1.0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = staged(logits.bfloat16(), target)
    assert torch.equal(found, staged(logits.bfloat16().float(), target))


# Terms -----------------------------------------------------------------------------------------------------------


@each_model
def test_terms_are_added_with_their_weights(spatial):
    logits, image, mask = scene()
    seen = []

    def total(mixture: Mixture, resp: Tensor, image: Tensor, mask: Tensor) -> Tensor:
        seen.append((mixture, resp, image, mask))
        return mixture.means.sum()

    target = joined(image, mask)
    bare = MixtureNLL(spatial=spatial)(logits, target)
    loss = MixtureNLL(spatial=spatial, terms=[(0.5, total), Term(-2.0, lambda *_: torch.tensor(3.0))])
    means = m_step(image, logits.softmax(1), mask).means
    torch.testing.assert_close(loss(logits, target), bare + 0.5 * means.sum() - 6)
    ((mixture, resp, theirs, where),) = seen
    torch.testing.assert_close(mixture.means, means)
    torch.testing.assert_close(resp, logits.softmax(1))
    assert torch.equal(theirs, image)
    assert torch.equal(where, mask)


def test_regularisers_that_are_modules_belong_to_the_loss_but_not_to_its_checkpoint():
    prior = MeanPrior([[0.0, 1.0]])
    loss = MixtureNLL(terms=[(1.0, prior), (1.0, lambda *_: torch.tensor(0.0))])
    assert prior in list(loss.modules())
    assert not loss.state_dict()
    assert loss.to("meta").regularisers[0].means.is_meta


# Known means -----------------------------------------------------------------------------------------------------

WANTED = [[0.0, 1.0], [2.0, 2.0]]
#: Differences from WANTED: (1, 0), (0, 0) and (3, 2), (0, −4).
FOUND = [[[1.0, 1.0], [2.0, 2.0]], [[3.0, 3.0], [2.0, -2.0]]]


def test_the_prior_per_image_by_hand():
    assert MeanPrior(WANTED)(*with_means(FOUND)).item() == (1 + (9 + 4 + 16)) / 2


def test_the_prior_over_the_batch_by_hand():
    # The averaged means are (2, 2) and (2, 0).
    assert MeanPrior(WANTED, over="batch")(*with_means(FOUND)).item() == 4 + 1 + 4


@pytest.mark.parametrize(("over", "expected"), [("image", (1 + 9 + 16) / 2), ("batch", 4 + 4)])
def test_a_mean_that_is_not_known_is_free(over, expected):
    mixture, *rest = with_means(FOUND)
    mixture.means.requires_grad_()
    prior = MeanPrior([[0.0, math.nan], [2.0, 2.0]], over=over)
    value = prior(mixture, *rest)
    assert value.item() == expected
    value.backward()
    assert mixture.means.grad[:, 0, 1].tolist() == [0, 0]
    assert mixture.means.grad.isfinite().all()
    assert mixture.means.grad[1, 0, 0] != 0


@pytest.mark.parametrize(("over", "expected"), [("image", 29.0), ("batch", 29.0)])
def test_an_image_with_an_empty_mask_does_not_count(over, expected):
    mixture, resp, image, mask = with_means(FOUND)
    mixture.means.requires_grad_()
    mask[0] = 0
    value = MeanPrior(WANTED, over=over)(mixture, resp, image, mask)
    assert value.item() == expected
    value.backward()
    assert (mixture.means.grad[0] == 0).all()
    assert mixture.means.grad[1].tolist() == [[6, 4], [0, -8]]


@pytest.mark.parametrize("over", ["image", "batch"])
def test_nothing_but_empty_masks_move_nothing(over):
    mixture, resp, image, mask = with_means(FOUND)
    mixture.means.requires_grad_()
    value = MeanPrior(WANTED, over=over)(mixture, resp, image, 0 * mask)
    value.backward()
    assert value.isfinite()
    assert (mixture.means.grad == 0).all()


def test_nothing_but_empty_masks_cost_nothing_over_the_batch():
    mixture, resp, image, mask = with_means(FOUND)
    assert MeanPrior(WANTED, over="batch")(mixture, resp, image, 0 * mask) == 0


def test_one_image_is_a_batch():
    one = with_means(FOUND[1:])
    assert MeanPrior(WANTED)(*one) == MeanPrior(WANTED, over="batch")(*one) == 29


def test_an_unknown_average_lists_the_choices():
    with pytest.raises(ValueError, match=r"'slice'.*image, batch"):
        MeanPrior(WANTED, over="slice")  # type: ignore[arg-type]


# The start -------------------------------------------------------------------------------------------------------


def test_the_cross_entropy_to_a_start_by_hand():
    """Odds 3 : 1 and 1 : 1 inside, expected as sure and as even; the third voxel lies outside."""
    logits = torch.tensor([[[math.log(3), 0.0, 50.0], [0.0, 0.0, -50.0]]], dtype=torch.float64)
    expected = torch.tensor([[[1.0, 0.5, 0.0], [0.0, 0.5, 1.0]]], dtype=torch.float64)
    mask = torch.tensor([[[1.0, 1.0, 0.0]]], dtype=torch.float64)
    found = StartCrossEntropy()(logits, joined(expected, mask))
    assert found.item() == pytest.approx((math.log(4 / 3) + math.log(2)) / 2)


def test_the_cross_entropy_is_lowest_at_the_start_itself():
    logits, _, mask = scene()
    expected = logits.softmax(1)
    value, gradient = value_and_gradient(StartCrossEntropy(), logits, joined(expected, mask))
    torch.testing.assert_close(gradient, torch.zeros_like(gradient), rtol=0, atol=1e-12)
    assert StartCrossEntropy()(1.1 * logits, joined(expected, mask)) > value
    assert StartCrossEntropy()(logits, joined(expected, 0 * mask)) == 0


def test_a_staged_loss_switches_after_its_epochs():
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


def test_a_staged_loss_begins_at_once_unless_told_otherwise():
    logits, image, mask = scene()
    target = joined(image, mask, torch.full_like(logits, math.nan))  # the start is not even looked at
    torch.testing.assert_close(Staged(MixtureNLL())(logits, target), MixtureNLL()(logits, joined(image, mask)))


@pytest.mark.parametrize("epoch", [1, 2])
def test_of_several_outputs_the_finest_counts(epoch):
    logits, image, mask = scene()
    target = joined(image, mask, logits.flip(1).softmax(1))
    staged = Staged(MixtureNLL(), start_epochs=1)
    staged.epoch = epoch
    assert torch.equal(staged([logits, logits[..., ::2, ::2]], target), staged(logits, target))


# Two processes ---------------------------------------------------------------------------------------------------


def network() -> nn.Module:
    """Two convolutions and nothing that averages over the batch."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        layers = nn.Conv2d(M, 4, 3, padding=1), nn.Tanh(), nn.Conv2d(4, K, 1)
        return nn.Sequential(*layers).double()


def training_loss() -> MixtureNLL:
    wanted = torch.tensor([[1.0, 0.0], [math.nan, 2.0], [0.0, -1.0]])
    return MixtureNLL(terms=[(0.5, MeanPrior(wanted, over="batch"))])


def gradient_of(model: nn.Module, rows: list[int]) -> Tensor:
    """The gradient of the loss on some images of a batch of four, of which one has no mask."""
    _, image, mask = scene(batch=4)
    mask[2] = 0
    image, mask = image[rows], mask[rows]
    training_loss()(model(image), joined(image, mask)).backward()
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def _one_of_two(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    meet, minute = f"file://{folder}/meet", timedelta(minutes=1)
    torch.distributed.init_process_group("gloo", init_method=meet, rank=rank, world_size=2, timeout=minute)
    model = nn.parallel.DistributedDataParallel(network())
    torch.save(gradient_of(model, [[0, 1], [2, 3]][rank]), f"{folder}/{rank}.pt")
    other = Path(folder, f"{1 - rank}.pt")
    while not other.exists():  # it may still be reading what this process sent
        time.sleep(0.01)
    # Taking the model and its process group apart now and then deadlocks in PyTorch: gloo's thread wants the GIL.
    os._exit(0)


def test_two_processes_have_the_gradient_of_one_with_everybodys_images(tmp_path: Path):
    torch.multiprocessing.spawn(_one_of_two, args=(str(tmp_path),), nprocs=2)
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2))
    assert torch.equal(first, second)
    alone = gradient_of(network(), [0, 1, 2, 3])
    assert alone.abs().max() > 0.01
    torch.testing.assert_close(first, alone)
    # What each rank would have on its own is something else: the prior looks at everybody's means.
    halves = [gradient_of(network(), rows) for rows in ([0, 1], [2, 3])]
    assert (torch.stack(halves).mean(0) - alone).abs().max() > 1e-3


def test_alone_the_sum_over_the_ranks_is_the_value_itself():
    value = torch.ones(3)
    assert across_ranks(value) is value
