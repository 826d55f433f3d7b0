"""Partial volume: fractions, fields and neighbours of planted scenes, parts by hand, and images that hold little."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from monai_deepgmm.mixture import bias_field as bias
from monai_deepgmm.mixture import partial_volume as pvgmm
from monai_deepgmm.mixture.em import Fit
from monai_deepgmm.mixture.gaussian import Mixture
from monai_deepgmm.mixture.partial_volume import NODES, PATCH_MM, Model, fit, mixing, nodes, worth

BORDERS = ((0, 1), (1, 2))
MEANS = torch.tensor([[1.0, 2.4, 2.0], [2.0, 3.4, 3.0], [3.5, 1.0, 1.5]])
FLAT, SOLID = (72, 64), (30, 28, 24)
each_shape = pytest.mark.parametrize("shape", [FLAT, SOLID], ids=["2d", "3d"])


class Scene:
    """Three tissues in random patches with mixels between them, in an ellipsoid, each sequence with a shade of its own.

    Args:
        shape: of the grid.
        shading: ± along the first axis; the second sequence is shaded the other way round.
        noise: standard deviation.
        sequences: 1 to 3.
        border: how wide borders are; of 0.5, about a third of all voxels are mixels.
        seed: of all draws.
    """

    def __init__(
        self,
        shape: tuple[int, ...],
        *,
        shading: float = 0.0,
        noise: float = 0.1,
        sequences: int = 2,
        border: float = 0.5,
        seed: int = 0,
    ) -> None:
        generator = torch.Generator().manual_seed(seed)
        lines = [torch.linspace(-1, 1, n) for n in shape]
        grid = torch.meshgrid(*lines, indexing="ij")
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
        ramps = [1 + shading * (grid[0] if m % 2 == 0 else -grid[0]) for m in range(sequences)]
        field = torch.stack(ramps)[None]
        mean = (field * self.mask).flatten(2).sum(2) / self.mask.sum()
        self.field = torch.where(self.mask > 0, field / mean.reshape(1, -1, *[1] * len(shape)), 1)
        clean = torch.einsum("bk...,km->bm...", self.fractions, self.means)
        self.image = clean * self.field + noise * torch.randn(clean.shape, generator=generator)
        self.start = (0.7 * self.hard + 0.3 / 3) * self.mask

    @property
    def hard(self) -> Tensor:
        return functional.one_hot(self.fractions.argmax(1), 3).movedim(-1, 1).float() * self.mask

    @property
    def inside(self) -> Tensor:
        return self.mask[0, 0] > 0

    def fitted(self, model: Model | None = None, spacing_mm: tuple[float, ...] | None = None) -> Fit:
        spacing_mm = spacing_mm or (4.0,) * (self.image.ndim - 2)
        return fit(self.image, self.mask, self.start, spacing_mm, model or Model(BORDERS))

    def error(self, found: Fit) -> float:
        """The mean absolute error of a fraction."""
        return float((found.resp - self.fractions)[0][:, self.inside].abs().mean())

    def wrong(self, found: Fit) -> int:
        """How many voxels bear another label than the tissue that fills most of them."""
        return int((found.resp.argmax(1) != self.fractions.argmax(1))[0][self.inside].sum())


def sound(found: Fit, mask: Tensor) -> bool:
    """Whether all is finite, fractions sum to 1 inside the mask and are 0 outside."""
    mixture = found.mixture
    numbers = [found.resp, found.nll, found.trace, mixture.weights, mixture.means, mixture.covariances]
    numbers += [] if mixture.field is None else [mixture.field]
    whole = found.resp.sum(1, keepdim=True)
    return (
        all(bool(n.isfinite().all()) for n in numbers)
        and bool((found.resp >= 0).all())
        and bool((found.resp[(mask == 0).expand_as(found.resp)] == 0).all())
        and torch.allclose(whole, mask.float(), atol=1e-5)
    )


def same(one: Fit, two: Fit) -> bool:
    """Whether two fits agree in every number."""
    flat = [(*f.mixture, *(getattr(f, name) for name in Fit._fields if name != "mixture")) for f in (one, two)]
    return all(torch.equal(a, b) for a, b in zip(*flat, strict=True))


# Parts, by hand ------------------------------------------------------------------------------------------------------


def test_the_nodes_are_the_pure_tissues_and_for_each_border_five_mixels():
    found = mixing(3, [(0, 2)])
    mixels = [[0.9, 0, 0.1], [0.7, 0, 0.3], [0.5, 0, 0.5], [0.3, 0, 0.7], [0.1, 0, 0.9]]
    assert torch.allclose(found, torch.cat([torch.eye(3), torch.tensor(mixels)]))
    assert torch.equal(mixing(2, []), torch.eye(2))
    both = mixing(3, BORDERS)
    assert both.shape == (3 + 2 * NODES, 3)
    assert torch.allclose(both.sum(1), torch.ones(len(both)))
    assert (both[3 : 3 + NODES, 2] == 0).all()
    assert (both[3 + NODES :, 0] == 0).all()


def test_a_mixels_mean_and_covariance_lie_between_those_of_its_tissues():
    means = torch.tensor([[[0.0, 4.0], [10.0, 0.0]]])
    covariances = torch.tensor([[[[1.0, 0.5], [0.5, 2.0]], [[3.0, 0.0], [0.0, 4.0]]]])
    fractions = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.7, 0.3]])
    weights = torch.tensor([[0.5, 0.3, 0.2]])
    found = nodes(Mixture(torch.ones(1, 2) / 2, means, covariances, None), weights, fractions)
    assert torch.equal(found.weights, weights)
    assert torch.allclose(found.means[0], torch.tensor([[0.0, 4.0], [10.0, 0.0], [3.0, 2.8]]))
    assert torch.allclose(found.covariances[0, :2], covariances[0])
    assert torch.allclose(found.covariances[0, 2], torch.tensor([[1.6, 0.35], [0.35, 2.6]]))


def test_of_one_sequence_nodes_have_variances():
    pure = Mixture(torch.ones(1, 2) / 2, torch.tensor([[[1.0], [3.0]]]), torch.tensor([[[[2.0]], [[4.0]]]]), None)
    found = nodes(pure, torch.ones(1, 3) / 3, torch.tensor([[1.0, 0], [0, 1], [0.5, 0.5]]))
    assert found.covariances[0].tolist() == [[2.0], [4.0], [3.0]]


def test_what_a_field_must_be_worth():
    """8 x 8 x 8 voxels of half a patch each way are 64 patches: of 4 parameters, 2 log 64 over 64."""
    mask = torch.ones(1, 1, 8, 8, 8)
    assert worth(4, mask, (PATCH_MM / 2,) * 3) == pytest.approx(2 * math.log(64) / 64)
    assert worth(8, mask, (PATCH_MM / 2,) * 3) == pytest.approx(4 * math.log(64) / 64)
    # Voxels twice as long are as many patches as twice the voxels; outside the mask nothing counts.
    longer = worth(4, mask, (PATCH_MM, PATCH_MM / 2, PATCH_MM / 2))
    assert longer == pytest.approx(worth(4, torch.ones(1, 1, 16, 8, 8), (PATCH_MM / 2,) * 3))
    mask[..., 4:] = 0
    assert worth(4, mask, (PATCH_MM / 2,) * 3) == pytest.approx(2 * math.log(32) / 32)
    # Less than two patches count as two, so that the price stays one.
    assert worth(4, mask, (0.1,) * 3) == pytest.approx(math.log(2))


def test_the_pull_is_the_average_of_neighbours_inside_nearer_ones_weighing_more():
    """Along the second axis neighbours are twice as far, and weigh a quarter."""
    mask = torch.tensor([[1.0, 1, 1], [1, 1, 0]])[None, None]
    values = torch.tensor([[1.0, 2, 4], [8, 16, 0]])[None, None]
    found = pvgmm._Neighbours(mask, (1.0, 2.0))(values)[0, 0]
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
    assert pvgmm._stride(torch.ones(1, 1, 20, 20, 20), spacing_mm, voxels) == stride


def test_a_field_on_the_lattice_is_linear_in_between():
    lattice = torch.tensor([1.0, 3.0, 5.0])[None, None]
    found = pvgmm._on_grid(lattice, (2,), torch.ones(1, 1, 6))
    expected = torch.tensor([1.0, 2, 3, 4, 5, 5])  # after the last of the lattice, as there
    assert torch.allclose(found[0, 0], expected / expected.mean())


# Planted scenes ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sequences", [1, 2, 3])
@each_shape
def test_fractions_and_means_of_a_planted_scene(shape, sequences):
    scene = Scene(shape, sequences=sequences)
    found = scene.fitted(Model(BORDERS, degree=0))
    assert found.converged.all()
    assert sound(found, scene.mask)
    assert scene.error(found) < 0.03
    assert torch.allclose(found.mixture.means[0], scene.means, rtol=0.03)
    assert found.mixture.covariances.shape == (1, 3, sequences, sequences)
    shares = scene.fractions[0][:, scene.inside].mean(1)
    assert torch.allclose(found.mixture.weights[0], shares, atol=0.01)
    assert not found.collapsed.any()


@each_shape
def test_mixels_are_told_better_than_by_tissues_alone(shape):
    scene = Scene(shape)
    blind = scene.fitted(Model((), degree=0, coupling=0))
    assert scene.error(scene.fitted(Model(BORDERS, degree=0, coupling=0))) < 0.7 * scene.error(blind)


def test_components_stay_in_the_order_of_the_start():
    scene = Scene(FLAT)
    turned = fit(scene.image, scene.mask, scene.start[:, [2, 0, 1]], (4.0, 4.0), Model(((1, 2), (2, 0)), degree=0))
    usual = scene.fitted(Model(BORDERS, degree=0))
    assert torch.allclose(turned.mixture.means, usual.mixture.means[:, [2, 0, 1]], atol=1e-3)
    assert torch.allclose(turned.resp, usual.resp[:, [2, 0, 1]], atol=0.01)


@each_shape
def test_neighbours_that_agree_make_fewer_errors_under_noise(shape):
    scene = Scene(shape, noise=0.6, border=1e-3)
    alone, agreed = (scene.fitted(Model(BORDERS, degree=0, coupling=c)) for c in (0.0, 3.0))
    assert scene.wrong(agreed) < 0.8 * scene.wrong(alone)
    assert torch.equal(alone.mixture.means, agreed.mixture.means)  # they are those of the lattice
    assert torch.equal(alone.nll, agreed.nll)


def test_without_coupling_no_sweep_and_without_a_sweep_no_coupling():
    scene = Scene(FLAT, noise=0.3)
    assert same(scene.fitted(Model(BORDERS, coupling=0)), scene.fitted(Model(BORDERS, sweeps=0)))
    assert not same(scene.fitted(Model(BORDERS, coupling=0)), scene.fitted())


# The field -----------------------------------------------------------------------------------------------------------


@each_shape
def test_a_planted_field_is_found_and_proven(shape):
    scene = Scene(shape, shading=0.35)
    assert float(scene.field.max() / scene.field.min()) > 1.8
    found, blind = scene.fitted(), scene.fitted(Model(BORDERS, degree=0))
    assert (found.mixture.field / scene.field - 1).abs().max() < 0.02
    inside = scene.mask.expand_as(scene.field) > 0
    assert torch.corrcoef(torch.stack([found.mixture.field[inside], scene.field[inside]]))[0, 1] > 0.99
    assert torch.allclose(found.mixture.means[0], scene.means, rtol=0.05)
    assert scene.error(found) < 0.03
    assert scene.wrong(found) < 0.5 * scene.wrong(blind)
    assert found.nll < blind.nll


@each_shape
def test_a_field_has_mean_1_over_the_mask_and_is_1_outside(shape):
    scene = Scene(shape, shading=0.35)
    field = scene.fitted(Model(BORDERS, degree=3)).mixture.field
    assert torch.allclose((field * scene.mask).flatten(2).sum(2) / scene.mask.sum(), torch.ones(1, 2), atol=1e-4)
    assert (field[(scene.mask == 0).expand_as(field)] == 1).all()


@each_shape
def test_an_unshaded_image_has_no_field_unless_it_need_not_be_proven(shape):
    scene = Scene(shape)
    dropped, kept, none = (
        scene.fitted(m) for m in (Model(BORDERS), Model(BORDERS, proven=False), Model(BORDERS, degree=0))
    )
    assert torch.equal(dropped.mixture.field, torch.ones_like(scene.image))
    assert none.mixture.field is None
    assert torch.equal(dropped.resp, none.resp)
    assert 0 < (kept.mixture.field - 1).abs().max() < 0.02


@pytest.mark.parametrize(("proven", "degrees"), [(True, [2, 3]), (False, [3])])
def test_a_field_proves_itself_with_degree_2_and_then_bends_more(monkeypatch, proven, degrees):
    scene = Scene(FLAT, sequences=1)
    t = torch.linspace(-1, 1, FLAT[0])[:, None].expand(FLAT)
    bent = 1 + 0.8 * t.pow(3) - 0.2 * t
    bent = bent / (bent[scene.inside].mean())
    scene.image = scene.image * bent
    asked, original = [], bias.basis

    def basis(mask: Tensor, degree: int, *, beyond: bool = False) -> Tensor:
        if beyond:  # on the fine lattice, where a field is judged
            asked.append(degree)
        return original(mask, degree, beyond=beyond)

    monkeypatch.setattr(bias, "basis", basis)
    found = scene.fitted(Model(BORDERS, degree=3, proven=proven))
    assert asked == degrees
    error = [
        (f.mixture.field[0, 0] / bent - 1)[scene.inside].abs().mean()
        for f in (found, scene.fitted(Model(BORDERS, degree=2)))
    ]
    assert error[0] < 0.01 < 0.03 < error[1]
    asked.clear()
    scene.fitted(Model(BORDERS, degree=1))
    assert asked == [1]


def test_a_field_of_a_high_degree_is_dropped_with_the_low_ones(monkeypatch):
    """What degree 2 cannot prove, no higher one may try."""
    scene, asked, original = Scene(FLAT), [], bias.basis

    def basis(mask: Tensor, degree: int, *, beyond: bool = False) -> Tensor:
        if beyond:  # on the fine lattice, where a field is judged
            asked.append(degree)
        return original(mask, degree, beyond=beyond)

    monkeypatch.setattr(bias, "basis", basis)
    assert (scene.fitted(Model(BORDERS, degree=6)).mixture.field == 1).all()
    assert asked == [2]


def test_of_few_patches_of_tissue_no_field_is_proven():
    """As many voxels of a hundredth of the length: what they show may be one lump of tissue, not a coil."""
    scene = Scene(FLAT, shading=0.35)
    assert (scene.fitted(spacing_mm=(4.0, 4.0)).mixture.field != 1).any()
    assert (scene.fitted(spacing_mm=(0.04, 0.04)).mixture.field == 1).all()


# What must not matter ------------------------------------------------------------------------------------------------


def test_a_batch_is_its_images_one_by_one():
    scenes = [Scene(FLAT, shading=s, seed=n) for n, s in enumerate((0.35, 0.0))]
    batch = [torch.cat([getattr(s, name) for s in scenes]) for name in ("image", "mask", "start")]
    together = fit(*batch, (4.0, 4.0), Model(BORDERS))
    assert together.resp.shape == (2, 3, *FLAT)
    assert len(together.iterations) == len(together.converged) == len(together.nll) == 2
    for row, scene in enumerate(scenes):
        alone = scene.fitted()
        assert torch.equal(together.resp[row], alone.resp[0])
        assert all(torch.equal(a[row], b[0]) for a, b in zip(together.mixture, alone.mixture, strict=True))
        assert together.iterations[row] == alone.iterations[0]
        # The shorter trace repeats its last value.
        assert torch.equal(together.trace[: len(alone.trace), row], alone.trace[:, 0])
        assert (together.trace[len(alone.trace) :, row] == alone.trace[-1, 0]).all()


def test_it_is_the_same_every_time_and_in_single_precision():
    scene = Scene(FLAT, shading=0.2)
    once = scene.fitted()
    assert same(once, scene.fitted())
    again = fit(scene.image.double(), scene.mask.double(), scene.start.double(), (4.0, 4.0), Model(BORDERS))
    assert same(once, again)
    assert {t.dtype for t in (again.resp, again.nll, again.trace, *again.mixture)} == {torch.float32}


@pytest.mark.parametrize("factor", [1000.0, 1e-3])
@each_shape
def test_the_scale_of_intensities_does_not_matter(shape, factor):
    scene = Scene(shape, shading=0.35)
    usual = scene.fitted()
    scaled = fit(scene.image * factor, scene.mask, scene.start, (4.0,) * len(shape), Model(BORDERS))
    assert (scaled.resp - usual.resp).abs().max() < 0.02
    assert torch.allclose(scaled.mixture.means / factor, usual.mixture.means, rtol=1e-3)
    assert torch.allclose(scaled.mixture.field, usual.mixture.field, atol=2e-3)


def test_what_lies_outside_the_mask_does_not_matter():
    scene = Scene(FLAT, shading=0.35)
    usual = scene.fitted()
    scene.image = torch.where(scene.mask > 0, scene.image, torch.nan)
    assert same(usual, scene.fitted())


def test_images_in_a_wide_margin_are_fitted_alike():
    scene = Scene(FLAT, shading=0.35)
    usual = scene.fitted()
    wide = [functional.pad(v, (3, 8, 5, 1)) for v in (scene.image, scene.mask, scene.start)]
    found = fit(*wide, (4.0, 4.0), Model(BORDERS))
    inner = (slice(None), slice(None), slice(5, 5 + FLAT[0]), slice(3, 3 + FLAT[1]))
    assert torch.allclose(found.resp[inner], usual.resp, atol=1e-4)
    assert found.resp.sum() == pytest.approx(float(wide[1].sum()), rel=1e-5)
    assert torch.allclose(found.mixture.field[inner], usual.mixture.field, atol=1e-4)


@each_shape
def test_two_lattices_agree(shape):
    scene = Scene(shape, shading=0.35)
    dense, sparse = (scene.fitted(Model(BORDERS, voxels=n)) for n in (25_000, 1200))
    assert dense.trace[0] != sparse.trace[0]  # they do see other voxels
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


# Images that hold little ---------------------------------------------------------------------------------------------

each_proof = pytest.mark.parametrize("proven", [True, False], ids=["proven", "free"])


def voxels_of(mask: Tensor, which: slice) -> Tensor:
    """A mask of some of another's voxels, by their number."""
    out = torch.zeros_like(mask)
    out.view(-1)[torch.nonzero(mask.flatten()).flatten()[which]] = 1
    return out


@each_proof
@pytest.mark.parametrize("which", ["1", "2", "10", "row", "plane", "gaps"])
@each_shape
def test_small_and_thin_masks(shape, which, proven):
    scene = Scene(shape)
    middle = [n // 2 for n in shape]
    if which.isdigit():
        small = voxels_of(scene.mask, slice(200, 200 + int(which)))
    else:
        small = torch.zeros_like(scene.mask)
        where = {
            "row": (..., *middle[:-1], slice(None)),
            "plane": (slice(None), slice(None), middle[0]),
            "gaps": (slice(None), slice(None), slice(1, None, 2)),
        }[which]
        small[where] = scene.mask[where]
    for voxels in (25_000, 40):
        model = Model(BORDERS, proven=proven, voxels=voxels)
        found = fit(scene.image, small, scene.start * small, (1.0,) * len(shape), model, max_iter=30)
        assert sound(found, small)


def test_a_mask_that_every_coarser_lattice_would_miss_is_taken_whole():
    """The first voxel is part of every lattice; a mask without it, of every second line, holds none of every second."""
    mask = torch.zeros(1, 1, 20, 20)
    mask[..., 1::2, 1::2] = 1
    mask = functional.pad(mask[..., :19, :19], (0, 1, 0, 1))
    assert pvgmm._stride(mask, (1.0, 1.0), 50) == (1, 1)
    scene = Scene(FLAT)
    sheet = torch.zeros_like(scene.mask)
    sheet[..., 21::2, 21:40:2] = scene.mask[..., 21::2, 21:40:2]
    sheet[..., 20, 20] = 0
    assert sound(fit(scene.image, sheet, scene.start * sheet, (1.0, 1.0), Model(BORDERS, voxels=20)), sheet)


@each_proof
@pytest.mark.parametrize("what", ["one zero", "one constant", "all zero", "all one", "twice the same"])
@each_shape
def test_sequences_that_tell_nothing(shape, what, proven):
    scene = Scene(shape)
    image = scene.image.clone()
    if what == "one zero":
        image[:, 1] = 0
    elif what == "one constant":
        image[:, 1] = 5.3
    elif what == "all zero":
        image[:] = 0
    elif what == "all one":
        image[:] = 1
    else:
        image[:, 1] = image[:, 0]
    found = fit(image, scene.mask, scene.start, (4.0,) * len(shape), Model(BORDERS, proven=proven), max_iter=30)
    assert sound(found, scene.mask)
    if what == "one zero":
        one = fit(image[:, :1], scene.mask, scene.start, (4.0,) * len(shape), Model(BORDERS, degree=0))
        both = fit(image, scene.mask, scene.start, (4.0,) * len(shape), Model(BORDERS, degree=0))
        assert (one.resp - both.resp).abs().max() < 0.02


@each_proof
@pytest.mark.parametrize("pooling", [0.0, 0.1])
def test_a_tissue_that_the_start_does_not_expect_is_empty(pooling, proven):
    scene = Scene(FLAT)
    start = torch.cat([scene.mask, torch.zeros_like(scene.start[:, 1:])], 1)
    found = scene.fitted(Model(BORDERS, pooling=pooling, proven=proven))
    assert not found.collapsed.any()
    found = fit(scene.image, scene.mask, start, (4.0, 4.0), Model(BORDERS, pooling=pooling, proven=proven), max_iter=50)
    assert sound(found, scene.mask)


def test_a_tissue_that_the_image_lacks():
    scene = Scene(FLAT)
    mask = ((scene.fractions[:, 2:] == 0) * scene.mask).float()
    found = fit(scene.image, mask, scene.start * mask, (4.0, 4.0), Model(BORDERS, degree=0))
    assert sound(found, mask)


def test_one_tissue_and_two():
    scene = Scene(FLAT)
    one = fit(scene.image, scene.mask, scene.mask, (4.0, 4.0), Model(()))
    assert torch.equal(one.resp, scene.mask)
    start = torch.cat([scene.start[:, :2].sum(1, keepdim=True), scene.start[:, 2:]], 1)
    assert sound(fit(scene.image, scene.mask, start, (4.0, 4.0), Model(((0, 1),))), scene.mask)


def test_a_fit_that_is_stopped_says_so():
    scene = Scene(FLAT, shading=0.35)
    found = fit(scene.image, scene.mask, scene.start, (4.0, 4.0), Model(BORDERS), max_iter=1)
    assert not found.converged.any()
    assert found.iterations.tolist() == [1]
    assert len(found.trace) == 2
    assert sound(found, scene.mask)


def test_pooled_covariances_are_alike():
    scene = Scene(FLAT, noise=0.2)
    spread = [scene.fitted(Model(BORDERS, degree=0, pooling=p)).mixture.covariances[0] for p in (0.0, 1e4)]
    assert torch.allclose(spread[1][0], spread[1][1], rtol=1e-3)
    assert not torch.allclose(spread[0][0], spread[0][1], rtol=1e-2)


@each_shape
def test_dependent_sequences_need_no_floor(shape):
    """Rounding leaves their covariance without a Cholesky factor."""
    scene = Scene(shape)
    image = torch.cat([scene.image, scene.image.sum(1, keepdim=True)], 1)
    model = Model(BORDERS, degree=0, pooling=0.0)
    assert sound(fit(image, scene.mask, scene.start, (4.0,) * len(shape), model, max_iter=10, floor=0.0), scene.mask)
