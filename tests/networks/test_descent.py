"""deepG and deepSVG on one image: planted regions, seeds, the result's parts, masks at the image's border."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, nn

from monai_deepgmm.mixture import em
from monai_deepgmm.mixture.bounding_box import cut, enclosing, paste
from monai_deepgmm.mixture.gaussian import e_step, m_step, nll
from monai_deepgmm.networks import descent as deep
from monai_deepgmm.networks.nll_loss import MeanPrior

K, M = 3, 2
CENTRES = torch.tensor([[-1.2, 0.0], [0.0, 1.3], [1.2, -0.6]], dtype=torch.float64)
QUICK = deep.Descent(steps=25, start_steps=15, lr=0.03, tol=-torch.inf)

each_model = pytest.mark.parametrize("spatial", [False, True], ids=["deepg", "deepsvg"])


@pytest.fixture(autouse=True)
def _two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def tiny(dims: int = 2, channels: int = M) -> nn.Module:
    """A network of two convolutions."""
    conv = nn.Conv2d if dims == 2 else nn.Conv3d
    return nn.Sequential(conv(channels, 12, 3, padding=1), nn.LeakyReLU(), conv(12, K, 1))


def scene(shape=(40, 44), *, batch=1, seed=0, noise=0.3) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Three bands of a disc: image, mask, labels, and a start of which three tenths are wrong."""
    generator = torch.Generator().manual_seed(seed)
    lines = torch.meshgrid(*(torch.arange(n, dtype=torch.float64) - (n - 1) / 2 for n in shape), indexing="ij")
    mask = (sum(line.square() for line in lines) < 11.5**2).double().expand(batch, 1, *shape).clone()
    labels = (1 + (lines[0] > 4).long() - (lines[0] < -4).long()).expand(batch, 1, *shape)
    random = functools.partial(torch.randn, generator=generator, dtype=torch.float64)
    image = CENTRES[labels[:, 0]].movedim(-1, 1) + noise * random(batch, M, *shape)
    wrong = torch.rand(labels.shape, generator=generator) < 0.3
    confused = torch.where(wrong, torch.randint(K, labels.shape, generator=generator), labels)
    return image, mask, labels, em.labels_start(confused, mask, K)


def nothing(image: Tensor) -> Tensor:
    """No context."""
    return image[:, :0]


def descend(image: Tensor, mask: Tensor, start: Tensor, **options) -> em.Fit:
    defaults = {"network": tiny, "seed": 0, "descent": QUICK}
    return deep.fit(image, mask, start, options.pop("context", nothing(image)), **{**defaults, **options})


def dice(fit: em.Fit, mask: Tensor, labels: Tensor) -> Tensor:
    inside = mask[:, 0] > 0
    found, truth = fit.resp.argmax(1)[inside], labels[:, 0][inside]
    pairs = torch.stack([(found == k) & (truth == k) for k in range(K)]).sum(1)
    return 2 * pairs / torch.stack([(found == k).sum() + (truth == k).sum() for k in range(K)])


def assert_same(a: em.Fit, b: em.Fit, **tolerance) -> None:
    for name in em.Fit._fields:
        if name != "mixture":
            torch.testing.assert_close(getattr(a, name), getattr(b, name), **tolerance)
    for one, other in zip(a.mixture, b.mixture, strict=True):
        torch.testing.assert_close(one, other, **tolerance)


# What it finds ---------------------------------------------------------------------------------------------------


@each_model
@pytest.mark.parametrize("labels", ["posterior", "network"])
def test_planted_regions_are_found_under_their_names(spatial, labels):
    image, mask, truth, start = scene()
    fit = descend(image, mask, start, spatial=spatial, labels=labels)
    assert dice(fit._replace(resp=start), mask, truth).max() < 0.85
    assert dice(fit, mask, truth).min() > 0.9
    torch.testing.assert_close(fit.mixture.means[0], CENTRES, rtol=0, atol=0.2)
    assert not fit.collapsed.any()


@each_model
def test_planted_regions_are_found_in_3d(spatial):
    image, mask, truth, start = scene((26, 24, 7))
    fit = descend(image, mask, start, spatial=spatial, network=functools.partial(tiny, 3))
    assert fit.resp.shape == (1, K, 26, 24, 7)
    assert dice(fit, mask, truth).min() > 0.9


@each_model
@pytest.mark.parametrize("covariance", ["diag", "tied", "full", "spherical"])
def test_every_covariance_is_fitted(spatial, covariance):
    image, mask, truth, start = scene()
    fit = descend(image, mask, start, spatial=spatial, covariance=covariance)
    assert dice(fit, mask, truth).min() > 0.9
    peer = em.fit(image, mask, start, spatial=spatial, covariance=covariance)
    assert fit.mixture.covariances.shape == peer.mixture.covariances.shape


@each_model
def test_the_likelihood_falls(spatial):
    image, mask, _, start = scene()
    fit = descend(image, mask, start, spatial=spatial)
    assert fit.trace[-1, 0] < fit.trace[0, 0] - 0.05


def test_the_network_starts_in_the_starts_order():
    image, mask, truth, start = scene()
    order = [2, 0, 1]
    fit = descend(image, mask, start[:, order])
    assert dice(fit, mask, truth).max() < 0.1
    assert dice(fit._replace(resp=fit.resp[:, [1, 2, 0]]), mask, truth).min() > 0.9


def test_context_is_something_the_network_sees():
    """The image says nothing, the context everything; without it nothing can be learned."""
    image, mask, truth, start = scene()
    image = torch.zeros_like(image)
    place = CENTRES[truth[:, 0]].movedim(-1, 1)[:, :1]
    network = functools.partial(tiny, channels=M + 1)
    taught = QUICK._replace(steps=0, start_steps=60)
    told, untold = (
        descend(image, mask, start, context=c, network=network, labels="network", descent=taught)
        for c in (place, 0 * place)
    )
    assert dice(told, mask, truth).min() > 0.9
    assert dice(untold, mask, truth).min() < 0.5


# The same again --------------------------------------------------------------------------------------------------


@each_model
def test_the_same_seed_gives_the_same_fit_and_another_another(spatial):
    image, mask, _, start = scene()
    before = torch.get_rng_state()
    first = descend(image, mask, start, spatial=spatial, seed=3)
    assert torch.equal(torch.get_rng_state(), before)
    torch.rand(5)
    assert_same(descend(image, mask, start, spatial=spatial, seed=3), first, rtol=0, atol=0)
    assert not torch.equal(descend(image, mask, start, spatial=spatial, seed=4).resp, first.resp)


@each_model
@pytest.mark.parametrize("together", [False, True], ids=["each", "together"])
def test_nothing_that_is_given_is_changed(spatial, together):
    given = image, mask, _, start = scene(batch=2)
    copies = [part.clone() for part in given]
    descend(image, mask, start, spatial=spatial, together=together)
    assert all(torch.equal(part, copy) for part, copy in zip(given, copies, strict=True))


# The result ------------------------------------------------------------------------------------------------------


@each_model
@pytest.mark.parametrize("together", [False, True], ids=["each", "together"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_result_is_shaped_as_ems(spatial, together, dtype):
    image, mask, _, start = (part.to(dtype) for part in scene(batch=2))
    fit = descend(image, mask, start, spatial=spatial, together=together)
    peer = em.fit(image, mask, start, spatial=spatial, max_iter=QUICK.steps, tol=-torch.inf)
    assert type(fit) is type(peer)
    for name in em.Fit._fields:
        ours, theirs = getattr(fit, name), getattr(peer, name)
        for one, other in zip(ours[:3], theirs[:3], strict=True) if name == "mixture" else [(ours, theirs)]:
            assert one.shape == other.shape, name
            assert one.dtype == other.dtype, name
            assert not one.requires_grad, name
    assert fit.iterations.tolist() == [QUICK.steps] * 2
    assert fit.reseeded.tolist() == [0, 0]


@each_model
def test_labels_by_the_posterior_or_by_the_network(spatial):
    image, mask, _, start = scene()
    by_posterior = descend(image, mask, start, spatial=spatial)
    by_network = descend(image, mask, start, spatial=spatial, labels="network")
    for fit in (by_posterior, by_network):
        torch.testing.assert_close(fit.resp.sum(1, keepdim=True), mask)
    mixture = by_network.mixture
    for one, other in zip(by_posterior.mixture[:3], mixture[:3], strict=True):
        assert torch.equal(one, other)  # the mixture does not depend on what decides the label
    expected = m_step(image, by_network.resp, mask, spatial=spatial)
    for one, other in zip(mixture[:3], expected[:3], strict=True):
        torch.testing.assert_close(one, other)
    torch.testing.assert_close(by_posterior.resp, e_step(image, mask, mixture))
    assert (by_posterior.resp - by_network.resp).abs().max() > 1e-3
    torch.testing.assert_close(by_network.nll, nll(image, mask, mixture))


class Heard(nn.Module):
    """A network that writes down what it says."""

    def __init__(self, said: list[Tensor]) -> None:
        super().__init__()
        self.network, self.said = tiny(), said

    def forward(self, seen: Tensor) -> Tensor:
        out = self.network(seen)
        self.said.append(out.detach())
        return out


@each_model
def test_the_trace_is_the_nll_of_what_the_network_said_at_each_step(spatial):
    image, mask, _, start = scene()
    said: list[Tensor] = []
    fit = descend(
        image, mask, start, spatial=spatial, network=lambda: Heard(said), terms=[(9.0, MeanPrior(0 * CENTRES))]
    )
    assert len(said) == QUICK.start_steps + QUICK.steps + 1
    box = enclosing(mask, margin=deep.MARGIN, multiple=deep.MULTIPLE)
    expected = []
    for output in said[QUICK.start_steps :]:
        resp = paste(output.double().softmax(1), box, image.shape[2:]) * mask
        expected.append(nll(image, mask, m_step(image, resp, mask, spatial=spatial)))
    assert fit.trace.shape == (QUICK.steps + 1, 1)
    torch.testing.assert_close(fit.trace, torch.stack(expected), rtol=0, atol=1e-4)
    assert torch.equal(fit.trace[-1], fit.nll)


def test_what_the_network_sees_is_the_image_around_the_mask():
    image, mask, _, start = scene()
    seen: list[Tensor] = []

    class Watched(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.network = tiny(channels=M + 1)

        def forward(self, given: Tensor) -> Tensor:
            seen.append(given)
            return self.network(given)

    context = torch.rand(image[:, :1].shape, generator=torch.Generator().manual_seed(1))
    descend(image, mask, start, context=context, network=Watched, descent=QUICK._replace(steps=1))
    # A disc 23 voxels wide with 4 on each side needs 31, so 32.
    assert {tuple(given.shape) for given in seen} == {(1, M + 1, 32, 32)}
    expected = cut(torch.cat([image.float(), context], 1), enclosing(mask, margin=deep.MARGIN, multiple=deep.MULTIPLE))
    assert all(torch.equal(given, expected) for given in seen)


def test_of_a_deeply_supervised_network_the_finest_output_counts():
    image, mask, _, start = scene()

    class Deep(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.network = tiny()

        def forward(self, seen: Tensor) -> list[Tensor]:
            out = self.network(seen)
            return [out, out[..., ::2, ::2].flip(1)]

    assert_same(descend(image, mask, start, network=Deep), descend(image, mask, start), rtol=0, atol=0)


# Steps and convergence -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("steps", [0, 1, 7])
def test_so_many_steps_and_no_more(steps):
    image, mask, _, start = scene()
    fit = descend(image, mask, start, descent=QUICK._replace(steps=steps, tol=torch.inf))
    assert fit.iterations.tolist() == [steps]
    assert len(fit.trace) == steps + 1
    assert fit.converged.tolist() == [False]


def test_a_small_gain_is_convergence_but_not_before_a_few_steps():
    image, mask, _, start = scene()
    fit = descend(image, mask, start, descent=QUICK._replace(tol=torch.inf))
    assert fit.converged.tolist() == [True]
    assert fit.iterations.tolist() == [deep.MIN_STEPS + 1]
    late = descend(image, mask, start, descent=QUICK._replace(steps=80, tol=1e-4))
    assert late.converged.tolist() == [True]
    assert deep.MIN_STEPS + 1 < late.iterations[0] < 80
    gains = -late.trace[:-1].diff(dim=0)[deep.MIN_STEPS - 1 :, 0]
    assert gains[-1] < 1e-4  # the last step was the first of so small a gain
    assert (gains[:-1] >= 1e-4 - 1e-6).all()


def test_the_start_comes_from_the_start_steps():
    image, mask, truth, start = scene()
    fit = descend(image, mask, start, labels="network", descent=QUICK._replace(steps=0, start_steps=40))
    none = descend(image, mask, start, labels="network", descent=QUICK._replace(steps=0, start_steps=0))
    # Taught on labels of which three tenths are wrong, it already knows better than they do.
    assert dice(fit, mask, truth).min() > 0.85
    assert dice(none, mask, truth).min() < 0.5


# Together --------------------------------------------------------------------------------------------------------


def counted(made: list[nn.Module]) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        made.append(tiny())
        return made[-1]

    return make


def test_one_by_one_an_image_does_not_depend_on_its_neighbours():
    image, mask, _, start = scene(batch=3)
    mask[1, ..., :20] = 0  # another box, and another number of steps
    made: list[nn.Module] = []
    descent = QUICK._replace(steps=60, tol=1e-4)
    fit = descend(image, mask, start, network=counted(made), descent=descent)
    assert len(made) == 3
    alone = [descend(*(p[i : i + 1] for p in (image, mask, start)), descent=descent) for i in range(3)]
    counts = [int(one.iterations) for one in alone]
    assert len(set(counts)) > 1
    assert fit.iterations.tolist() == counts
    for i, one in enumerate(alone):
        for name in ("resp", "nll", "converged", "collapsed"):
            assert torch.equal(getattr(fit, name)[i], getattr(one, name)[0])
        for joined, single in zip(fit.mixture[:3], one.mixture[:3], strict=True):
            assert torch.equal(joined[i], single[0])
        assert torch.equal(fit.trace[: counts[i] + 1, i], one.trace[:, 0])
        assert (fit.trace[counts[i] :, i] == one.nll).all()


@each_model
def test_together_one_network_serves_every_image(spatial):
    image, mask, truth, start = scene(batch=3)
    made: list[nn.Module] = []
    fit = descend(image, mask, start, spatial=spatial, network=counted(made), together=True)
    assert len(made) == 1
    assert dice(fit, mask, truth).min() > 0.9
    assert fit.trace.shape == (QUICK.steps + 1, 3)
    # Each image still has a mixture of its own.
    assert (fit.mixture.means[0] - fit.mixture.means[1]).abs().max() > 1e-4
    separate = descend(image, mask, start, spatial=spatial)
    assert not torch.allclose(fit.resp, separate.resp, atol=1e-4)


def test_together_the_verdict_of_convergence_is_shared():
    image, mask, _, start = scene(batch=2)
    fit = descend(image, mask, start, together=True, descent=QUICK._replace(steps=60, tol=1e-4))
    assert fit.converged.tolist() == [True, True]
    assert fit.iterations[0] == fit.iterations[1] == len(fit.trace) - 1


def test_a_single_image_together_is_a_single_image():
    image, mask, _, start = scene()
    assert_same(descend(image, mask, start, together=True), descend(image, mask, start), rtol=0, atol=0)


@pytest.mark.parametrize("together", [False, True], ids=["each", "together"])
def test_an_empty_mask_beside_others_stays_finite(together):
    image, mask, truth, start = scene(batch=2)
    mask[1], start[1] = 0, 0
    fit = descend(image, mask, start, together=together)
    assert all(part.isfinite().all() for part in (fit.resp, fit.nll, fit.trace, *fit.mixture[:3]))
    assert (fit.resp[1] == 0).all()
    assert dice(fit, mask, truth).min() > 0.9


# Regularisers ----------------------------------------------------------------------------------------------------


# Windows -------------------------------------------------------------------------------------------------------------


def test_a_volume_is_fitted_window_by_window():
    image, mask, truth, start = scene((40, 24, 24))
    given = []

    def network() -> nn.Module:
        made = tiny(3)
        made.register_forward_pre_hook(lambda _, inputs: given.append(tuple(inputs[0].shape[2:])))
        return made

    descent = QUICK._replace(window=(16, 32, 16))
    fit = descend(image, mask, start, network=network, descent=descent)
    assert set(given) == {(16, 32, 16)}  # never more, neither in a step nor at the end
    assert len(given) > QUICK.start_steps + QUICK.steps
    assert fit.resp.shape == start.shape
    assert fit.trace.shape == (QUICK.steps + 1, 1)
    inside = mask[0, 0] > 0
    right = fit.resp[0].argmax(0)[inside] == truth[0, 0][inside]
    assert right.double().mean() > 0.9
    assert_same(descend(image, mask, start, network=network, descent=descent), fit, rtol=0, atol=0)


def test_a_window_as_large_as_the_image_is_the_image():
    image, mask, _, start = scene()
    whole, windowed = (descend(image, mask, start, descent=QUICK._replace(window=w)) for w in (None, (96, 96)))
    torch.testing.assert_close(windowed.resp, whole.resp, rtol=0, atol=1e-4)


def test_windows_have_converged_when_ten_steps_are_no_better_than_the_ten_before():
    image, mask, _, start = scene()
    lenient = QUICK._replace(tol=torch.inf, window=(16, 16))
    fit = descend(image, mask, start, descent=lenient)
    assert fit.iterations.tolist() == [2 * deep.MIN_STEPS]
    assert fit.converged.all()


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
    assert held.nll > free.nll  # at the likelihood's cost


def test_a_kept_start_keeps_the_network_near_it():
    image, mask, _, start = scene()

    def surprise(weight: float) -> float:
        fit = descend(image, mask, start, labels="network", descent=QUICK._replace(start_weight=weight))
        return -float((start * fit.resp.clamp_min(1e-12).log()).sum() / mask.sum())

    assert surprise(5.0) < surprise(0.0) - 0.05


@each_model
def test_a_mask_at_the_images_border_is_fitted_alike(spatial):
    """The image is cut so that the box leaves it; the network sees 0 there."""
    image, mask, truth, start = scene((24, 24))
    assert enclosing(mask, margin=deep.MARGIN, multiple=deep.MULTIPLE)[0].start < 0
    fit = descend(image, mask, start, spatial=spatial)
    assert fit.resp.shape == (1, K, 24, 24)
    assert dice(fit, mask, truth).min() > 0.9
