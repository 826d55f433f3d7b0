"""Late enhancement on the blood pool's scale: planted walls, by hand, and what it does to the anatomical mixture."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from monai_deepgmm import protocol
from monai_deepgmm.methods import blood_pool_scale
from monai_deepgmm.methods.anatomy import AnatomicalConfig
from monai_deepgmm.methods.enhancement import ONE_CLASS, Enhancement, measure
from monai_deepgmm.methods.region_filter import decide
from monai_deepgmm.methods.task import Images

INFARCT = protocol.load("infarct")
SIDE, CAVITY, WALL, SLICES = 61, 16.0, 25.0, 5
X, Y = np.meshgrid(*[np.arange(SIDE) - SIDE // 2] * 2, indexing="ij")
R, TURN = np.hypot(X, Y), np.abs(np.arctan2(Y, X))
INSIDE, MASK = R < CAVITY, R < WALL
#: Subendocardial scar of 5 mm in a sixth of the wall, in every slice; and a dark core within a larger one.
SCAR = (R >= CAVITY) & (R < 21) & (np.pi / 6 > TURN)
OUTER = (R >= 18) & (R < 24) & (np.pi / 4 > TURN)
LARGE = (R >= CAVITY) & (R < 23) & (np.pi / 2 > TURN)
CORE = (R >= 18) & (R < 20.5) & (np.pi / 4 > TURN)

Where = NDArray[np.bool_]


def stack(scar: Where | None = None, *, level: float = 1.0, noise: float = 0.15, seed: int = 0) -> NDArray[np.float64]:
    """Slices ``(SLICES, SIDE, SIDE)``: wall 0, blood 1, scar as bright as asked."""
    clean = np.where(INSIDE, 1.0, 0.0)
    if scar is not None:
        clean[scar] = level
    return clean + noise * np.random.default_rng(seed).normal(size=(SLICES, SIDE, SIDE))


def found(image: NDArray[np.float64], spacing_mm: tuple[float, float] = (1.0, 1.0)) -> Enhancement | None:
    masks, insides = (np.broadcast_to(m, image.shape) for m in (MASK, INSIDE))
    return measure(image, masks, [insides], spacing_mm, slices=tuple(range(len(image))), threshold=1.0)[0]


def task(image: NDArray[np.float64], **others: NDArray[np.float64]) -> Images:
    masks = torch.from_numpy(np.broadcast_to(MASK, image.shape).astype(float))[:, None]
    images = torch.from_numpy(np.stack([image, *others.values()], 1))
    sequences = ("LGE", *others)
    at = tuple(range(len(image)))
    return Images(images, masks, masks, INFARCT, INFARCT.visible(sequences), sequences, (1.0, 1.0), slices=at)


def dice(a: Where, b: Where) -> float:
    return float(2 * (a & b).sum() / (a.sum() + b.sum()))


@pytest.mark.parametrize(("scale", "shift"), [(1.0, 0.0), (300.0, 0.0), (0.01, -5.0)])
@pytest.mark.parametrize("noise", [0.05, 0.15, 0.4])
def test_a_healthy_wall_has_no_scar_and_a_sector_has(noise, scale, shift):
    """On any scale, signed values included."""
    healthy, ill = (found(stack(s, noise=noise) * scale + shift) for s in (None, SCAR))
    assert not healthy.present
    assert ill.present
    assert ill.found > healthy.found


def test_a_faint_infarct_is_seen_by_its_two_classes():
    """Too faint for the evidence, but no single Gaussian is parted like that; noise may be, but lies too close."""
    seen, noise = found(stack(LARGE, level=0.35, noise=0.1)), found(stack(noise=0.01, seed=3))
    assert seen.found < 1.0
    assert seen.separation > ONE_CLASS
    assert seen.present
    assert not noise.present


@pytest.mark.parametrize("level", [0.8, 1.0, 1.6])
def test_the_fraction_is_relative_to_the_patients_own_scar(level):
    """Half of a voxel's way from the wall to the scar is half a voxel of scar, faint or bright."""
    seen = found(stack(LARGE, level=level, noise=0.02))
    assert seen.level == pytest.approx(level, rel=0.2)
    assert dice(seen.fraction[2] > 0.5, LARGE) > 0.8
    assert ((seen.fraction >= 0) & (seen.fraction <= 1)).all()
    assert (seen.fraction[:, ~MASK | INSIDE] == 0).all()
    assert np.isneginf(seen.evidence[:, ~MASK | INSIDE]).all()


def test_evidence_is_a_log_likelihood_ratio():
    """Where the noise doubles it falls to a quarter; what is darker than half of faint scar speaks against scar."""
    seen = [found(stack(LARGE, noise=noise)) for noise in (0.1, 0.2)]
    middle = LARGE & (R > 19) & (R < 21) & (np.pi / 4 > TURN)
    strong, weak = (e.evidence[2][middle].mean() for e in seen)
    assert strong / weak == pytest.approx(4, rel=0.25)
    assert seen[0].evidence[2][(TURN > 2.5) & (R > 19) & (R < 22)].max() < 0


def test_neighbouring_slices_support_each_other():
    alone, all_of_them = stack(), stack(SCAR)
    alone[2] = all_of_them[2]
    single, whole = (found(image).evidence[2][SCAR].mean() for image in (alone, all_of_them))
    assert 0 < single < whole


def test_a_wall_that_is_mostly_scar_has_scar():
    """Its median is as bright as blood; so is what a scale with the median as 0 would divide by."""
    seen = found(stack((R >= CAVITY) & (TURN < 2.4)))
    assert seen.present
    assert seen.level == pytest.approx(1, rel=0.2)


def test_what_shines_in_the_outer_wall_alone_is_no_infarct():
    """An infarct begins at the endocardium: fat at the epicardium is none, and what goes through the wall is."""
    rim, through = (R >= 22.5) & (R < WALL) & (np.pi / 2 > TURN), (R >= CAVITY) & (R < WALL) & (np.pi / 2 > TURN)
    fat, scar = (found(stack(where, level=1.5)) for where in (rim, through))
    assert np.quantile(fat.evidence[:, rim], 0.5) > 1
    assert not fat.present
    assert scar.present
    assert (scar.inner[0] == (R >= CAVITY) & (R < 22)).mean() > 0.97
    images = task(stack(rim | ((R >= CAVITY) & (R < WALL) & (np.pi - 0.5 < TURN)), level=1.5)).with_wall()
    painted = AnatomicalConfig().solve(images).resp[2].argmax(0).numpy() == 2
    assert painted[rim].mean() < 0.05
    assert painted[(R >= 22.5) & (R < 24) & (np.pi - 0.3 < TURN)].mean() > 0.9


def test_blood_that_is_not_bright_says_nothing():
    assert found(-stack()) is None
    empty = np.zeros((1, SIDE, SIDE), bool)
    assert measure(stack()[:1], MASK[None], [empty], (1.0, 1.0), slices=(0,), threshold=1.0) == [None]


def test_an_apex_that_is_scar_all_around_takes_the_healthy_level_of_the_other_slices():
    image = stack()
    image[3:] += np.where(MASK & ~INSIDE, 1, 0)
    scarred = found(image)
    assert scarred is not None
    assert scarred.present
    assert scarred.fraction[3:, MASK & ~INSIDE].mean() > 0.9
    assert scarred.fraction[:3].mean() < 0.05
    image = stack()
    image[3:] -= np.where(INSIDE, 1, 0)  # an apex without blood
    bloodless = found(image)
    assert bloodless is not None
    assert not bloodless.present


def test_the_scale_by_hand():
    """Slice 1 lacks blood, slice 2 shows hardly any contrast: both are helped by the patient's usual unit, 10."""
    made = blood_pool_scale.scale(np.array([5.0, 4.0, 6.0]), np.array([16.0, np.nan, 15.0 - 9.0 + 9.0]))
    np.testing.assert_allclose(made.wall, [5, 4, 6])
    np.testing.assert_allclose(made.unit, [10.5, 10, 9.5])  # usual: the median of 11 and 9
    np.testing.assert_allclose(made(np.array([[15.5], [4.0], [15.5]])), [[1], [0], [1]])
    flat = blood_pool_scale.scale(np.array([0.0, 0.0, 0.0]), np.array([10.0, 10.0, -40.0]))
    np.testing.assert_allclose(flat.unit, [10, 10, 3])
    assert blood_pool_scale.scale(np.array([1.0]), np.array([1.0])) is None
    assert blood_pool_scale.scale(np.array([np.nan]), np.array([1.0])) is None
    apart = blood_pool_scale.scale(np.array([0.0, 5.0]), np.array([2.0, 4.0]), pooled=False)
    assert apart.unit[0] == 2
    assert np.isnan(apart.unit[1])
    found = blood_pool_scale.Sorted.of(np.array([[3.0, 1.0, 2.0]] * 3), np.array([[1.0, 1.0, 2.0]] * 3))
    places = np.array([[True, True, True], [True, True, False], [False, False, False]])
    np.testing.assert_array_equal(found.quantile(places, 0.5), [2, 1, np.nan])


def test_on_late_enhancement_alone_a_healthy_heart_is_not_painted_and_scar_is_found():
    scar = [t.name for t in INFARCT.visible(("LGE",))].index("scar")
    for where, least in ((None, None), (OUTER, 0.7)):
        images = task(stack(where)).with_wall()
        resp, regions = decide(AnatomicalConfig().solve(images).resp, images)
        painted = (resp.argmax(1) == scar).numpy()
        if least is None:
            assert not painted.any()
            assert not any(r.accepted for r in regions)
        else:
            assert dice(painted, np.broadcast_to(where, painted.shape)) > least
            assert any(r.accepted and r.evidence > 0 for r in regions)
        torch.testing.assert_close(resp.sum(1, keepdim=True), images.mask)


def test_a_dark_core_that_scar_encloses_belongs_to_it():
    image = stack(LARGE, noise=0.1)
    image[:, CORE] -= 1.0
    resp = AnatomicalConfig().solve(task(image)).resp
    painted = (resp.argmax(1) == 2)[2].numpy()
    assert painted[CORE].mean() > 0.9
    assert painted[(TURN > 2.2) & (R > 18) & (R < 23)].mean() < 0.05


def test_where_nothing_is_scarred_slow_blood_that_shines_on_t2_is_no_wall():
    """A rim of the cavity as bright on T2 as edema: with scar all sequences say where the wall begins."""
    t2 = np.where(INSIDE & (R < CAVITY - 4), 0.0, np.where(INSIDE, 2.0, 1.0)) + stack() * 0.01
    radii = {}
    for name, where in (("healthy", None), ("scar", LARGE)):
        with_t2, without = (task(stack(where), **other).with_wall() for other in ({"T2": t2}, {}))
        assert with_t2.enhancement.present == (name == "scar")
        assert torch.equal(with_t2.ring.inside, without.ring.inside) == (name == "healthy")
        radii[name] = float(with_t2.ring.inner.mean())
    assert radii["healthy"] == pytest.approx(CAVITY, abs=1)
    assert radii["scar"] < radii["healthy"] - 0.5


def test_it_is_measured_once_and_only_in_a_stack():
    images = task(stack(SCAR))
    kept = images.with_wall()
    assert kept.enhanced() is kept.enhancement
    assert images._replace(slices=()).enhanced() is None
    assert images._replace(sequences=("T2",)).enhanced() is None
