"""deepG and deepSVG on one image: planted regions, seeds, the result's parts, masks at the image's border."""

from __future__ import annotations

import functools
from unittest.mock import Mock

import pytest
import torch
from tensors import assert_same, each_covariance, is_finite, parts, row, seeded
from torch import Tensor, nn

from monai_deepgmm.mixture import em
from monai_deepgmm.mixture.bounding_box import cut, enclosing, paste
from monai_deepgmm.mixture.fit import Fit
from monai_deepgmm.mixture.gaussian import e_step, m_step, nll
from monai_deepgmm.mixture.starts import labels_start
from monai_deepgmm.networks import descent
from monai_deepgmm.networks.nll_loss import MeanPrior

K, M = 3, 2
CENTRES = torch.tensor([[-1.2, 0.0], [0.0, 1.3], [1.2, -0.6]], dtype=torch.float64)
QUICK = descent.Descent(steps=25, start_steps=15, lr=0.03, tol=-torch.inf)

each_model = pytest.mark.parametrize("spatial", [False, True], ids=["deepg", "deepsvg"])
each_way = pytest.mark.parametrize("together", [False, True], ids=["each", "together"])


def tiny(dims: int = 2, channels: int = M) -> nn.Module:
    """A network of two convolutions."""
    conv = nn.Conv2d if dims == 2 else nn.Conv3d
    return nn.Sequential(conv(channels, 12, 3, padding=1), nn.LeakyReLU(), conv(12, K, 1))


def hooked(hook, **options: int) -> nn.Module:
    """A tiny network, and what is done with what it is given and says."""
    network = tiny(**options)
    network.register_forward_hook(lambda _, given, out: hook(given[0], out))
    return network


def scene(shape=(40, 44), *, batch=1) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Three bands of a disc: image, mask, labels, and a start of which three tenths are wrong."""
    generator = seeded()
    lines = torch.meshgrid(*(torch.arange(n, dtype=torch.float64) - (n - 1) / 2 for n in shape), indexing="ij")
    mask = (sum(line.square() for line in lines) < 11.5**2).double().expand(batch, 1, *shape).clone()
    labels = (1 + (lines[0] > 4).long() - (lines[0] < -4).long()).expand(batch, 1, *shape)
    noise = torch.randn(batch, M, *shape, generator=generator, dtype=torch.float64)
    image = CENTRES[labels[:, 0]].movedim(-1, 1) + 0.3 * noise
    wrong = torch.rand(labels.shape, generator=generator) < 0.3
    confused = torch.where(wrong, torch.randint(K, labels.shape, generator=generator), labels)
    return image, mask, labels, labels_start(confused, mask, K)


def descend(image: Tensor, mask: Tensor, start: Tensor, **options) -> Fit:
    context = options.pop("context", image[:, :0])
    return descent.fit_network(
        image, mask, start, context, **({"network": tiny, "seed": 0, "descent": QUICK} | options)
    )


def dice(resp: Tensor, mask: Tensor, labels: Tensor) -> Tensor:
    inside = mask[:, 0] > 0
    found, wanted = resp.argmax(1)[inside], labels[:, 0][inside]
    pairs = torch.stack([(found == k) & (wanted == k) for k in range(K)]).sum(1)
    return 2 * pairs / torch.stack([(found == k).sum() + (wanted == k).sum() for k in range(K)])


@each_model
@pytest.mark.parametrize("posterior", [True, False], ids=["posterior", "network"])
def test_planted_regions_are_found_in_the_starts_order(spatial, posterior):
    image, mask, labels, start = scene()
    order = [2, 0, 1]
    fit = descend(image, mask, start[:, order], spatial=spatial, posterior=posterior)
    assert dice(start, mask, labels).max() < 0.85
    assert dice(fit.resp[:, [1, 2, 0]], mask, labels).min() > 0.9
    torch.testing.assert_close(fit.mixture.means[0], CENTRES[order], rtol=0, atol=0.2)
    assert not fit.diagnostics.collapsed.any()
    assert fit.diagnostics.trace[-1, 0] < fit.diagnostics.trace[0, 0] - 0.05


@each_model
def test_planted_regions_are_found_in_3d(spatial):
    image, mask, labels, start = scene((26, 24, 7))
    fit = descend(image, mask, start, spatial=spatial, network=functools.partial(tiny, 3))
    assert fit.resp.shape == (1, K, 26, 24, 7)
    assert dice(fit.resp, mask, labels).min() > 0.9


@each_model
@each_covariance
def test_every_covariance_is_fitted_at_the_images_border_too(spatial, covariance):
    """The image is cut so that the box leaves it; the network sees 0 there."""
    image, mask, labels, start = scene((24, 24))
    assert enclosing(mask, margin=descent.MARGIN, multiple=descent.MULTIPLE)[0].start < 0
    fit = descend(image, mask, start, spatial=spatial, covariance=covariance)
    assert dice(fit.resp, mask, labels).min() > 0.9
    peer = em.fit_em(image, mask, start, spatial=spatial, covariance=covariance)
    assert fit.mixture.covariances.shape == peer.mixture.covariances.shape


def test_context_is_something_the_network_sees():
    """The image says nothing, the context everything; without it nothing can be learned."""
    image, mask, labels, start = scene()
    place = CENTRES[labels[:, 0]].movedim(-1, 1)[:, :1]
    network = functools.partial(tiny, channels=M + 1)
    options = {"network": network, "posterior": False, "descent": QUICK._replace(steps=0, start_steps=60)}
    told, untold = (descend(0 * image, mask, start, context=c, **options) for c in (place, 0 * place))
    assert dice(told.resp, mask, labels).min() > 0.9
    assert dice(untold.resp, mask, labels).min() < 0.5


@each_model
def test_the_same_seed_gives_the_same_fit_and_another_another(spatial):
    image, mask, _, start = scene()
    before = torch.get_rng_state()
    first = descend(image, mask, start, spatial=spatial, seed=3)
    assert torch.equal(torch.get_rng_state(), before)
    torch.rand(5)
    assert_same(descend(image, mask, start, spatial=spatial, seed=3), first)
    assert not torch.equal(descend(image, mask, start, spatial=spatial, seed=4).resp, first.resp)


@each_model
@each_way
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_result_is_shaped_as_ems_and_nothing_that_is_given_is_changed(spatial, together, dtype):
    given = image, mask, _, start = tuple(part.to(dtype) for part in scene(batch=2))
    copies = [part.clone() for part in given]
    fit = descend(image, mask, start, spatial=spatial, together=together)
    assert all(torch.equal(part, copy) for part, copy in zip(given, copies, strict=True))
    assert fit.diagnostics.iterations.tolist() == [QUICK.steps] * 2
    assert fit.diagnostics.reseeded is None
    peer = em.fit_em(image, mask, start, spatial=spatial, max_iter=QUICK.steps, tol=-torch.inf)
    peer = peer._replace(diagnostics=peer.diagnostics._replace(reseeded=None))
    for ours, theirs in zip(parts(fit), parts(peer), strict=True):
        assert (ours.shape, ours.dtype, ours.requires_grad) == (theirs.shape, theirs.dtype, False)


@each_model
def test_labels_by_the_posterior_or_by_the_network(spatial):
    image, mask, _, start = scene()
    by_posterior, by_network = (descend(image, mask, start, spatial=spatial, posterior=p) for p in (True, False))
    torch.testing.assert_close(by_posterior.resp.sum(1, keepdim=True), mask)
    torch.testing.assert_close(by_network.resp.sum(1, keepdim=True), mask)
    mixture, expected = by_network.mixture, m_step(image, by_network.resp, mask, spatial=spatial)
    for one, other, wanted in zip(by_posterior.mixture[:3], mixture[:3], expected[:3], strict=True):
        assert torch.equal(one, other)  # the mixture does not depend on what decides the label
        torch.testing.assert_close(other, wanted)
    torch.testing.assert_close(by_posterior.resp, e_step(image, mask, mixture))
    assert (by_posterior.resp - by_network.resp).abs().max() > 1e-3
    torch.testing.assert_close(by_network.diagnostics.nll, nll(image, mask, mixture))


@each_model
def test_the_trace_is_the_nll_of_what_the_network_said_of_the_image_around_the_mask(spatial):
    image, mask, _, start = scene()
    heard: list[tuple[Tensor, Tensor]] = []
    context = torch.rand(image[:, :1].shape, generator=seeded(1))
    options = {
        "network": lambda: hooked(lambda *both: heard.append(both), channels=M + 1),
        "terms": [(9.0, MeanPrior(0 * CENTRES))],
    }
    fit = descend(image, mask, start, spatial=spatial, context=context, **options)
    assert len(heard) == QUICK.start_steps + QUICK.steps + 1
    # A disc 23 voxels wide with 4 on each side needs 31, so 32.
    box = enclosing(mask, margin=descent.MARGIN, multiple=descent.MULTIPLE)
    assert heard[0][0].shape == (1, M + 1, 32, 32)
    given = cut(torch.cat([image.float(), context], 1), box)
    assert all(torch.equal(seen, given) for seen, _ in heard)
    expected = []
    for _, output in heard[QUICK.start_steps :]:
        resp = paste(output.detach().double().softmax(1), box, image.shape[2:]) * mask
        expected.append(nll(image, mask, m_step(image, resp, mask, spatial=spatial)))
    trace = fit.diagnostics.trace
    assert trace.shape == (QUICK.steps + 1, 1)
    torch.testing.assert_close(trace, torch.stack(expected), rtol=0, atol=1e-4)
    assert torch.equal(trace[-1], fit.diagnostics.nll)


def test_of_a_deeply_supervised_network_the_finest_output_counts():
    image, mask, _, start = scene()
    deep = functools.partial(hooked, lambda _, out: [out, out[..., ::2, ::2].flip(1)])
    assert_same(descend(image, mask, start, network=deep), descend(image, mask, start))


@pytest.mark.parametrize("steps", [0, 1, 7])
def test_so_many_steps_and_no_more(steps):
    image, mask, _, start = scene()
    found = descend(image, mask, start, descent=QUICK._replace(steps=steps, tol=torch.inf)).diagnostics
    assert found.iterations.tolist() == [steps]
    assert len(found.trace) == steps + 1
    assert found.converged.tolist() == [False]


def test_a_small_gain_is_convergence_but_not_before_a_few_steps():
    image, mask, _, start = scene()
    soon, late = (
        descend(image, mask, start, descent=d).diagnostics
        for d in (QUICK._replace(tol=torch.inf), QUICK._replace(steps=80, tol=1e-4))
    )
    assert soon.converged.tolist() == late.converged.tolist() == [True]
    assert soon.iterations.tolist() == [descent.MIN_STEPS + 1]
    assert descent.MIN_STEPS + 1 < late.iterations[0] < 80
    gains = -late.trace[:-1].diff(dim=0)[descent.MIN_STEPS - 1 :, 0]
    assert gains[-1] < 1e-4  # the last step was the first of so small a gain
    assert (gains[:-1] >= 1e-4 - 1e-6).all()


def test_the_start_comes_from_the_start_steps_and_can_be_kept():
    image, mask, labels, start = scene()

    def network(**changed) -> Tensor:
        return descend(image, mask, start, posterior=False, descent=QUICK._replace(**changed)).resp

    # Taught on labels of which three tenths are wrong, it already knows better than they do.
    assert dice(network(steps=0, start_steps=40), mask, labels).min() > 0.85
    assert dice(network(steps=0, start_steps=0), mask, labels).min() < 0.5
    free, kept = (
        -float((start * network(start_weight=w).clamp_min(1e-12).log()).sum() / mask.sum()) for w in (0.0, 5.0)
    )
    assert kept < free - 0.05


def test_one_by_one_an_image_does_not_depend_on_its_neighbours():
    image, mask, _, start = scene(batch=3)
    mask[1, ..., :20] = 0  # another box, and another number of steps
    network, options = Mock(side_effect=tiny), {"descent": QUICK._replace(steps=60, tol=1e-4)}
    fit = descend(image, mask, start, network=network, **options)
    assert network.call_count == 3
    trace, counts = fit.diagnostics.trace, fit.diagnostics.iterations.tolist()
    assert len(set(counts)) > 1
    for i, count in enumerate(counts):
        alone = descend(*(p[i : i + 1] for p in (image, mask, start)), **options)
        assert_same(row(fit, i), alone)
        assert torch.equal(trace[: count + 1, i], alone.diagnostics.trace[:, 0])
        assert (trace[count:, i] == alone.diagnostics.nll).all()


@each_model
def test_together_one_network_serves_every_image(spatial):
    image, mask, labels, start = scene(batch=3)
    network = Mock(side_effect=tiny)
    fit = descend(image, mask, start, spatial=spatial, network=network, together=True)
    assert network.call_count == 1
    assert dice(fit.resp, mask, labels).min() > 0.9
    assert fit.diagnostics.trace.shape == (QUICK.steps + 1, 3)
    # Each image still has a mixture of its own.
    assert (fit.mixture.means[0] - fit.mixture.means[1]).abs().max() > 1e-4
    assert not torch.allclose(fit.resp, descend(image, mask, start, spatial=spatial).resp, atol=1e-4)


def test_together_the_verdict_of_convergence_is_shared_and_one_image_is_itself():
    image, mask, _, start = scene(batch=2)
    found = descend(image, mask, start, together=True, descent=QUICK._replace(steps=60, tol=1e-4)).diagnostics
    assert found.converged.tolist() == [True, True]
    assert found.iterations[0] == found.iterations[1] == len(found.trace) - 1
    one = image[:1], mask[:1], start[:1]
    assert_same(descend(*one, together=True), descend(*one))


@each_way
def test_an_empty_mask_beside_others_stays_finite(together):
    image, mask, labels, start = scene(batch=2)
    mask[1], start[1] = 0, 0
    fit = descend(image, mask, start, together=together)
    assert is_finite(fit)
    assert (fit.resp[1] == 0).all()
    assert dice(fit.resp, mask, labels).min() > 0.9


@each_model
def test_known_means_attract_the_means(spatial):
    image, mask, _, start = scene()
    wanted = CENTRES + 0.4
    free, held = (
        descend(image, mask, start, spatial=spatial, terms=[(weight, MeanPrior(wanted))]) for weight in (0.0, 20.0)
    )
    assert_same(free, descend(image, mask, start, spatial=spatial), rtol=0, atol=1e-6)
    distance = [(fit.mixture.means[0] - wanted).square().sum() for fit in (free, held)]
    assert distance[1] < 0.8 * distance[0]
    assert held.diagnostics.nll > free.diagnostics.nll  # at the likelihood's cost


def test_a_volume_is_fitted_window_by_window():
    image, mask, labels, start = scene((40, 24, 24))
    seen: list[torch.Size] = []
    network = functools.partial(hooked, lambda given, _: seen.append(given.shape[2:]), dims=3)
    options = {"network": network, "descent": QUICK._replace(window=(16, 32, 16))}
    fit = descend(image, mask, start, **options)
    assert set(seen) == {(16, 32, 16)}  # never more, neither in a step nor at the end
    assert len(seen) > QUICK.start_steps + QUICK.steps
    assert fit.resp.shape == start.shape
    assert fit.diagnostics.trace.shape == (QUICK.steps + 1, 1)
    right = (fit.resp.argmax(1) == labels[:, 0])[mask[:, 0] > 0]
    assert right.double().mean() > 0.9
    assert_same(descend(image, mask, start, **options), fit)


def test_a_window_as_large_as_the_image_is_the_image_and_small_ones_converge_over_ten_steps():
    image, mask, _, start = scene()
    whole, windowed = (descend(image, mask, start, descent=QUICK._replace(window=w)) for w in (None, (96, 96)))
    torch.testing.assert_close(windowed.resp, whole.resp, rtol=0, atol=1e-4)
    # When ten steps are no better than the ten before.
    lenient = QUICK._replace(tol=torch.inf, window=(16, 16))
    found = descend(image, mask, start, descent=lenient).diagnostics
    assert found.iterations.tolist() == [2 * descent.MIN_STEPS]
    assert found.converged.all()
