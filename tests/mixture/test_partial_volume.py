"""Partial volume: fractions, fields and neighbours of planted scenes, parts by hand, and images that hold little."""

from __future__ import annotations

import functools
import math

import pytest
import torch
from tensors import assert_same, cube, is_finite, parts, row, seeded
from torch import Tensor
from torch.nn import functional

from monai_deepgmm.mixture import bias_field, lattice
from monai_deepgmm.mixture.fit import Fit
from monai_deepgmm.mixture.gaussian import Mixture
from monai_deepgmm.mixture.mixel_model import COUPLING, COUPLING_SEVERAL, Model
from monai_deepgmm.mixture.mixels import BLUR, LEAST_WIDTH, NODES, mixing, nodes
from monai_deepgmm.mixture.partial_volume import PATCH_MM, bic_penalty
from monai_deepgmm.mixture.partial_volume import fit_partial_volume as fit

BORDERS = ((0, 1), (1, 2))
UNSHADED = Model(BORDERS, degree=0)
MEANS = torch.tensor([[1.0, 2.4, 2.0], [2.0, 3.4, 3.0], [3.5, 1.0, 1.5]])
FLAT, SOLID = (60, 56), (30, 28, 24)

each_shape = pytest.mark.parametrize("shape", [FLAT, SOLID], ids=["2d", "3d"])
each_proof = pytest.mark.parametrize("bic", [True, False], ids=["bic", "free"])


class Scene:
    """Three tissues in random patches with mixels between them, in an ellipsoid, each sequence with a shade of its own.

    It is ± shading along the first axis, in the second sequence the other way round. With borders 0.5 wide, about a
    third of all voxels are mixels.
    """

    def __init__(self, shape=FLAT, *, shading=0.0, noise=0.1, sequences=2, border=0.5) -> None:
        generator, grid = seeded(), [line.float() for line in cube(shape)]
        self.mask = (sum(g.square() for g in grid) < 0.95).float()[None, None]
        rough = torch.rand(1, 1, *(n // 4 for n in shape), generator=generator)
        mode = {2: "bilinear", 3: "trilinear"}[len(shape)]
        height = functional.interpolate(rough, size=shape, mode=mode, align_corners=True)
        height = (height - height.mean()) / height.std()
        # From 0 over 1 to 2, with plateaus, so that 0 and 2 never touch.
        filled = sum(((height + shift) / border + 0.5).clamp(0, 1) for shift in (-0.5, 0.5))
        self.fractions = torch.cat([(1 - filled).clamp(0, 1), 1 - (1 - filled).abs(), (filled - 1).clamp(0, 1)], 1)
        self.fractions = self.fractions * self.mask
        self.means = MEANS[:, :sequences]
        field = torch.stack([1 + shading * (grid[0] if m % 2 == 0 else -grid[0]) for m in range(sequences)])[None]
        mean = (field * self.mask).flatten(2).sum(2) / self.mask.sum()
        self.field = torch.where(self.mask > 0, field / mean.reshape(1, -1, *[1] * len(shape)), 1)
        clean = torch.einsum("bk...,km->bm...", self.fractions, self.means)
        self.image = clean * self.field + noise * torch.randn(clean.shape, generator=generator)
        hard = functional.one_hot(self.fractions.argmax(1), 3).movedim(-1, 1)
        self.start = (0.7 * hard + 0.3 / 3) * self.mask
        self.inside = self.mask[0, 0] > 0

    def fitted(self, model: Model | None = None, spacing_mm: tuple[float, ...] | None = None, **changed) -> Fit:
        """With another image, mask or start, where it is given."""
        given = {"image": self.image, "mask": self.mask, "start": self.start} | changed
        spacing_mm = spacing_mm or (4.0,) * (self.image.ndim - 2)
        return fit(**given, spacing_mm=spacing_mm, model=model or Model(BORDERS))

    def error(self, found: Fit) -> float:
        """The mean absolute error of a fraction."""
        return float((found.resp - self.fractions)[0][:, self.inside].abs().mean())

    def wrong(self, found: Fit) -> int:
        """How many voxels bear another label than the tissue that fills most of them."""
        return int((found.resp.argmax(1) != self.fractions.argmax(1))[0][self.inside].sum())


@functools.cache
def planted(shape: tuple[int, ...] = FLAT, shading: float = 0.35) -> tuple[Scene, Fit]:
    """A scene and its fit with the defaults, once for all tests that compare others with it."""
    scene = Scene(shape, shading=shading)
    return scene, scene.fitted()


def sound(found: Fit, mask: Tensor) -> bool:
    """Whether all is finite, fractions sum to 1 inside the mask and are 0 outside."""
    whole = found.resp.sum(1, keepdim=True)
    return (
        is_finite(found)
        and bool((found.resp >= 0).all())
        and bool((found.resp[(mask == 0).expand_as(found.resp)] == 0).all())
        and torch.allclose(whole, mask.float(), atol=1e-5)
    )


def test_the_nodes_are_the_pure_tissues_and_for_each_border_five_mixels():
    mixels = [[0.9, 0, 0.1], [0.7, 0, 0.3], [0.5, 0, 0.5], [0.3, 0, 0.7], [0.1, 0, 0.9]]
    assert torch.allclose(mixing(3, [(0, 2)]), torch.cat([torch.eye(3), torch.tensor(mixels)]))
    assert torch.equal(mixing(2, []), torch.eye(2))
    both = mixing(3, BORDERS)
    assert both.shape == (3 + 2 * NODES, 3)
    assert torch.allclose(both.sum(1), torch.ones(len(both)))
    assert (both[3 : 3 + NODES, 2] == 0).all()
    assert (both[3 + NODES :, 0] == 0).all()


def test_a_mixels_mean_and_covariance_lie_between_those_of_its_tissues():
    means = torch.tensor([[[0.0, 4.0], [10.0, 0.0]]])
    covariances = torch.tensor([[[[1.0, 0.5], [0.5, 2.0]], [[3.0, 0.0], [0.0, 4.0]]]])
    weights, fractions = torch.tensor([[0.5, 0.3, 0.2]]), torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.7, 0.3]])
    found = nodes(Mixture(torch.ones(1, 2) / 2, means, covariances, None), weights, fractions)
    assert torch.equal(found.weights, weights)
    assert torch.allclose(found.means[0], torch.tensor([[0.0, 4.0], [10.0, 0.0], [3.0, 2.8]]))
    assert torch.allclose(found.covariances[0, :2], covariances[0])
    blur = 4 * BLUR**2 * 0.7 * 0.3 * 4.0**2  # the second sequence may see another share than the first
    assert torch.allclose(found.covariances[0, 2], torch.tensor([[1.6, 0.35], [0.35, 2.6 + blur]]))
    # Of one sequence nodes have variances.
    pure = Mixture(torch.ones(1, 2) / 2, torch.tensor([[[1.0], [3.0]]]), torch.tensor([[[[2.0]], [[4.0]]]]), None)
    found = nodes(pure, torch.ones(1, 3) / 3, torch.tensor([[1.0, 0], [0, 1], [0.5, 0.5]]))
    assert found.covariances[0].tolist() == [[2.0], [4.0], [3.0]]


def test_nodes_leave_no_gaps_where_there_is_little_noise():
    means, variances = torch.tensor([[[0.0, 4.0], [10.0, 0.0]]]), torch.tensor([1e-4, 1e-4])
    pure = Mixture(torch.ones(1, 2) / 2, means, torch.diag_embed(variances).expand(1, 2, 2, 2), None)
    fractions = mixing(2, [(0, 1)])
    found = nodes(pure, torch.ones(1, len(fractions)), fractions).covariances[0]
    assert torch.allclose(found[:2], pure.covariances[0])
    assert torch.allclose(found[2:, 0, 0], torch.tensor((LEAST_WIDTH * 10 / NODES) ** 2))
    even = nodes(pure, torch.ones(1, len(fractions)), fractions, smooth=True).covariances[0]
    assert torch.allclose(even[2:, 0, 0], torch.tensor(1e-4 + (10 / NODES) ** 2 / 12))  # of an even density
    assert (found[2:, 1, 1] > (LEAST_WIDTH * 4 / NODES) ** 2).all()  # by what the second sequence may see otherwise


@pytest.mark.parametrize("sequences", [1, 2])
def test_with_hardly_any_noise_every_voxel_has_its_tissues(sequences):
    scene = Scene(noise=0.01, sequences=sequences)
    assert scene.wrong(scene.fitted(UNSHADED)) < 0.02 * scene.inside.sum()


def test_what_a_field_must_gain():
    """8 x 8 x 8 voxels of half a patch each way are 64 patches: of 4 parameters, 2 log 64 over 64."""
    mask, half = torch.ones(1, 1, 8, 8, 8), PATCH_MM / 2
    assert bic_penalty(4, mask, (half,) * 3) == pytest.approx(2 * math.log(64) / 64)
    assert bic_penalty(8, mask, (half,) * 3) == pytest.approx(4 * math.log(64) / 64)
    # Voxels twice as long are as many patches as twice the voxels; outside the mask nothing counts.
    longer = bic_penalty(4, mask, (PATCH_MM, half, half))
    assert longer == pytest.approx(bic_penalty(4, torch.ones(1, 1, 16, 8, 8), (half,) * 3))
    mask[..., 4:] = 0
    assert bic_penalty(4, mask, (half,) * 3) == pytest.approx(2 * math.log(32) / 32)
    # Less than two patches count as two, so that the price stays one.
    assert bic_penalty(4, mask, (0.1,) * 3) == pytest.approx(math.log(2))


def test_the_pull_is_the_average_of_neighbours_inside_nearer_ones_weighing_more():
    """Along the second axis neighbours are twice as far, and weigh a quarter."""
    mask = torch.tensor([[1.0, 1, 1], [1, 1, 0]])[None, None]
    values = torch.tensor([[1.0, 2, 4], [8, 16, 0]])[None, None]
    found = lattice.Neighbours(mask, (1.0, 2.0))(values)[0, 0]
    assert found[0, 0] == pytest.approx((8 + 2 / 4) / (1 + 1 / 4))
    assert found[0, 1] == pytest.approx((16 + 1 / 4 + 4 / 4) / (1 + 2 / 4))
    assert found[0, 2] == pytest.approx(2)
    assert found[1, 1] == pytest.approx((2 + 8 / 4) / (1 + 1 / 4))


@pytest.mark.parametrize(
    ("spacing_mm", "voxels", "stride"),
    [
        ((1.0, 1.0, 1.0), 8000, (1, 1, 1)),
        ((1.0, 1.0, 1.0), 7999, (2, 2, 2)),
        ((1.0, 1.0, 1.0), 400, (3, 3, 3)),
        ((0.94, 1.5, 0.94), 2000, (2, 1, 2)),
        ((1.0, 1.0, 10.0), 2000, (2, 2, 1)),
        ((1.0, 1.0, 1.0), 1, (20, 20, 20)),
    ],
)
def test_the_lattice_is_about_as_coarse_in_mm_along_every_axis(spacing_mm, voxels, stride):
    assert lattice.stride(torch.ones(1, 1, 20, 20, 20), spacing_mm, voxels) == stride


@pytest.mark.parametrize("sequences", [1, 2, 3])
@each_shape
def test_fractions_and_means_of_a_planted_scene(shape, sequences):
    scene = Scene(shape, sequences=sequences)
    found = scene.fitted(UNSHADED)
    assert found.diagnostics.converged.all()
    assert not found.diagnostics.collapsed.any()
    assert found.mixture.field is None
    assert sound(found, scene.mask)
    assert scene.error(found) < 0.03
    assert torch.allclose(found.mixture.means[0], scene.means, rtol=0.03)
    assert found.mixture.covariances.shape == (1, 3, sequences, sequences)
    shares = scene.fractions[0][:, scene.inside].mean(1)
    assert torch.allclose(found.mixture.weights[0], shares, atol=0.01)


@each_shape
def test_mixels_are_told_better_than_by_tissues_alone(shape):
    scene = Scene(shape)
    blind, seen = (scene.fitted(Model(borders, degree=0, coupling=0)) for borders in ((), BORDERS))
    assert scene.error(seen) < 0.7 * scene.error(blind)


def test_components_stay_in_the_order_of_the_start():
    scene, order = Scene(), [2, 0, 1]
    turned = scene.fitted(Model(((1, 2), (2, 0)), degree=0), start=scene.start[:, order])
    usual = scene.fitted(UNSHADED)
    assert torch.allclose(turned.mixture.means, usual.mixture.means[:, order], atol=1e-3)
    assert torch.allclose(turned.resp, usual.resp[:, order], atol=0.01)


@each_shape
def test_neighbours_that_agree_make_fewer_errors_under_noise(shape):
    scene = Scene(shape, noise=0.6, border=1e-3)
    alone, agreed, still = (
        scene.fitted(Model(BORDERS, degree=0, coupling=c, sweeps=s)) for c, s in ((0.0, 3), (3.0, 3), (3.0, 0))
    )
    assert scene.wrong(agreed) < 0.8 * scene.wrong(alone)
    assert torch.equal(alone.mixture.means, agreed.mixture.means)  # they are those of the lattice
    assert torch.equal(alone.diagnostics.nll, agreed.diagnostics.nll)
    assert_same(alone, still)


@pytest.mark.parametrize(("sequences", "usual"), [(1, COUPLING), (2, COUPLING_SEVERAL)])
def test_neighbours_pull_less_where_several_sequences_tell(sequences, usual):
    scene = Scene(sequences=sequences, noise=0.6)
    found, same, other = (scene.fitted(Model(BORDERS, degree=0, coupling=c)) for c in (None, usual, 3.0))
    assert_same(found, same)
    assert not torch.equal(found.resp, other.resp)


@each_shape
def test_a_planted_field_is_found_and_gains_bic(shape):
    scene, found = planted(shape, 0.45)
    blind = scene.fitted(UNSHADED)
    assert float(scene.field.max() / scene.field.min()) > 2
    field = found.mixture.field
    assert (field / scene.field - 1).abs().max() < 0.02
    inside = scene.mask.expand_as(scene.field) > 0
    assert torch.corrcoef(torch.stack([field[inside], scene.field[inside]]))[0, 1] > 0.99
    assert torch.allclose((field * scene.mask).flatten(2).sum(2) / scene.mask.sum(), torch.ones(1, 2), atol=1e-4)
    assert (field[~inside] == 1).all()
    assert torch.allclose(found.mixture.means[0], scene.means, rtol=0.05)
    assert scene.error(found) < 0.03
    assert scene.wrong(found) < 0.5 * scene.wrong(blind)
    assert found.diagnostics.nll < blind.diagnostics.nll


@each_shape
def test_an_unshaded_image_has_no_field_unless_it_need_not_gain_bic(shape):
    scene, dropped = planted(shape, 0.0)
    kept, none = (scene.fitted(m) for m in (Model(BORDERS, require_bic_gain=False), UNSHADED))
    assert torch.equal(dropped.mixture.field, torch.ones_like(scene.image))
    assert torch.equal(dropped.resp, none.resp)
    assert 0 < (kept.mixture.field - 1).abs().max() < 0.02


@pytest.fixture
def asked(monkeypatch) -> list[int]:
    """The degrees of fields on the fine lattice, where a field is judged."""
    degrees, original = [], bias_field.basis

    def basis(mask: Tensor, degree: int, *, beyond: bool = False) -> Tensor:
        if beyond:
            degrees.append(degree)
        return original(mask, degree, beyond=beyond)

    monkeypatch.setattr(bias_field, "basis", basis)
    return degrees


@pytest.mark.parametrize(
    ("degree", "bic", "tried"), [(3, True, [2, 3]), (3, False, [3]), (2, True, [2]), (1, True, [1])]
)
def test_a_field_gains_bic_with_degree_2_and_then_bends_more(asked, degree, bic, tried):
    scene = Scene(sequences=1)
    t = torch.linspace(-1, 1, FLAT[0])[:, None].expand(FLAT)
    bent = 1 + 0.8 * t.pow(3) - 0.2 * t
    bent = bent / (bent[scene.inside].mean())
    found = scene.fitted(Model(BORDERS, degree=degree, require_bic_gain=bic), image=scene.image * bent)
    assert asked == tried
    error = (found.mixture.field[0, 0] / bent - 1)[scene.inside].abs().mean()
    assert error < 0.01 if degree == 3 else error > 0.03


def test_where_degree_2_gains_nothing_no_higher_one_may_try(asked):
    assert (Scene().fitted(Model(BORDERS, degree=6)).mixture.field == 1).all()
    # As many voxels of a hundredth of the length: what they show may be one lump of tissue, not a coil.
    scene, found = planted()
    assert (found.mixture.field != 1).any()
    asked.clear()
    assert (scene.fitted(spacing_mm=(0.04, 0.04)).mixture.field == 1).all()
    assert asked == [2]


def test_a_batch_is_its_images_one_by_one():
    known = [planted(FLAT, shading) for shading in (0.35, 0.0)]
    batch = [torch.cat([getattr(scene, name) for scene, _ in known]) for name in ("image", "mask", "start")]
    together = fit(*batch, (4.0, 4.0), Model(BORDERS))
    for b, (_, alone) in enumerate(known):
        assert_same(row(together, b), alone)
        # The shorter trace repeats its last value.
        trace, own = together.diagnostics.trace[:, b], alone.diagnostics.trace[:, 0]
        assert torch.equal(trace[: len(own)], own)
        assert (trace[len(own) :] == own[-1]).all()


def test_it_is_the_same_every_time_in_single_precision_whatever_lies_outside_the_mask():
    scene, once = planted()
    assert_same(once, scene.fitted(image=torch.where(scene.mask > 0, scene.image, torch.nan)))
    double = scene.fitted(image=scene.image.double(), mask=scene.mask.double(), start=scene.start.double())
    assert_same(once, double)
    assert {part.dtype for part in parts(double) if part.is_floating_point()} == {torch.float32}


@pytest.mark.parametrize("factor", [1000.0, 1e-3])
@each_shape
def test_the_scale_of_intensities_does_not_matter(shape, factor):
    scene, usual = planted(shape)
    scaled = scene.fitted(image=scene.image * factor)
    assert (scaled.resp - usual.resp).abs().max() < 0.02
    assert torch.allclose(scaled.mixture.means / factor, usual.mixture.means, rtol=1e-3)
    assert torch.allclose(scaled.mixture.field, usual.mixture.field, atol=2e-3)


def test_images_in_a_wide_margin_are_fitted_alike():
    scene, usual = planted()
    wide = {name: functional.pad(getattr(scene, name), (3, 8, 5, 1)) for name in ("image", "mask", "start")}
    found = scene.fitted(**wide)
    inner = (..., slice(5, 5 + FLAT[0]), slice(3, 3 + FLAT[1]))
    assert torch.allclose(found.resp[inner], usual.resp, atol=1e-4)
    assert found.resp.sum() == pytest.approx(float(wide["mask"].sum()), rel=1e-5)
    assert torch.allclose(found.mixture.field[inner], usual.mixture.field, atol=1e-4)


@each_shape
def test_two_lattices_agree(shape):
    scene, dense = planted(shape)
    sparse = scene.fitted(Model(BORDERS, voxels=1200))
    assert dense.diagnostics.trace[0] != sparse.diagnostics.trace[0]  # they do see other voxels
    assert torch.allclose(dense.mixture.means, sparse.mixture.means, rtol=0.05)
    assert (dense.mixture.field / sparse.mixture.field - 1).abs().max() < 0.06
    assert (dense.resp - sparse.resp).abs().mean() < 0.02


@pytest.mark.parametrize("spacing_mm", [(4 * 0.94, 4 * 1.5, 4 * 0.94), (3.0, 3.0, 12.0)])
def test_voxels_longer_than_wide(spacing_mm):
    scene = Scene(SOLID, shading=0.35)
    found = scene.fitted(Model(BORDERS, voxels=2000), spacing_mm)
    assert sound(found, scene.mask)
    assert (found.mixture.field / scene.field - 1)[scene.mask.expand_as(scene.field) > 0].abs().mean() < 0.02
    assert torch.allclose(found.mixture.means[0], scene.means, rtol=0.06)


@each_proof
@pytest.mark.parametrize("which", ["1", "2", "10", "row", "plane", "gaps"])
@each_shape
def test_small_and_thin_masks(shape, which, bic):
    scene = Scene(shape)
    middle, small = [n // 2 for n in shape], torch.zeros_like(scene.mask)
    if which.isdigit():
        small.view(-1)[torch.nonzero(scene.mask.flatten()).flatten()[200 : 200 + int(which)]] = 1
    else:
        where = {"row": (*middle[:-1], ...), "plane": middle[0], "gaps": slice(1, None, 2)}[which]
        small[0, 0][where] = scene.mask[0, 0][where]
    for voxels in (25_000, 40):
        model = Model(BORDERS, require_bic_gain=bic, voxels=voxels)
        found = fit(scene.image, small, scene.start * small, (1.0,) * len(shape), model, max_iter=30)
        assert sound(found, small)


def test_a_mask_that_every_coarser_lattice_would_miss_is_taken_whole():
    """The first voxel is part of every lattice; a mask without it, of every second line, holds none of every second."""
    mask = torch.zeros(1, 1, 20, 20)
    mask[..., 1:19:2, 1:19:2] = 1
    assert lattice.stride(mask, (1.0, 1.0), 50) == (1, 1)
    scene = Scene()
    sheet = torch.zeros_like(scene.mask)
    sheet[..., 21::2, 21:40:2] = scene.mask[..., 21::2, 21:40:2]
    sheet[..., 20, 20] = 0
    found = scene.fitted(Model(BORDERS, voxels=20), (1.0, 1.0), mask=sheet, start=scene.start * sheet)
    assert sound(found, sheet)


@each_proof
@pytest.mark.parametrize("what", ["one zero", "one constant", "all zero", "all one", "twice the same"])
@each_shape
def test_sequences_that_tell_nothing(shape, what, bic):
    scene = Scene(shape)
    image = scene.image.clone()
    where, value = {
        "one zero": (1, 0.0),
        "one constant": (1, 5.3),
        "all zero": (slice(None), 0.0),
        "all one": (slice(None), 1.0),
        "twice the same": (1, image[:, 0].clone()),
    }[what]
    image[:, where] = value
    model = Model(BORDERS, require_bic_gain=bic)
    assert sound(fit(image, scene.mask, scene.start, (4.0,) * len(shape), model, max_iter=30), scene.mask)
    if what == "one zero" and bic:
        one, both = (scene.fitted(UNSHADED, image=i) for i in (image[:, :1], image))
        assert (one.resp - both.resp).abs().max() < 0.02


@each_proof
@pytest.mark.parametrize("pooling", [0.0, 0.1])
def test_a_tissue_that_the_start_does_not_expect_is_empty(pooling, bic):
    scene, model = Scene(), Model(BORDERS, pooling=pooling, require_bic_gain=bic)
    assert not scene.fitted(model).diagnostics.collapsed.any()
    start = torch.cat([scene.mask, torch.zeros_like(scene.start[:, 1:])], 1)
    assert sound(fit(scene.image, scene.mask, start, (4.0, 4.0), model, max_iter=50), scene.mask)


def test_a_tissue_that_the_image_lacks_and_one_tissue_and_two():
    scene = Scene()
    mask = ((scene.fractions[:, 2:] == 0) * scene.mask).float()
    assert sound(scene.fitted(UNSHADED, mask=mask, start=scene.start * mask), mask)
    assert torch.equal(scene.fitted(Model(()), start=scene.mask).resp, scene.mask)
    start = torch.cat([scene.start[:, :2].sum(1, keepdim=True), scene.start[:, 2:]], 1)
    assert sound(scene.fitted(Model(((0, 1),)), start=start), scene.mask)


def test_a_fit_that_is_stopped_says_so():
    scene = Scene(shading=0.35)
    found = fit(scene.image, scene.mask, scene.start, (4.0, 4.0), Model(BORDERS), max_iter=1)
    assert not found.diagnostics.converged.any()
    assert found.diagnostics.iterations.tolist() == [1]
    assert len(found.diagnostics.trace) == 2
    assert sound(found, scene.mask)


@each_shape
def test_pooled_covariances_are_alike_and_dependent_sequences_need_no_floor(shape):
    scene = Scene(shape, noise=0.2)
    free, pooled = (scene.fitted(Model(BORDERS, degree=0, pooling=p)).mixture.covariances[0] for p in (0.0, 1e4))
    assert torch.allclose(pooled[0], pooled[1], rtol=1e-3)
    assert not torch.allclose(free[0], free[1], rtol=1e-2)
    # Rounding leaves their covariance without a Cholesky factor.
    image = torch.cat([scene.image, scene.image.sum(1, keepdim=True)], 1)
    model = Model(BORDERS, degree=0, pooling=0.0)
    assert sound(fit(image, scene.mask, scene.start, (4.0,) * len(shape), model, max_iter=10, floor=0.0), scene.mask)
