"""The inner border: planted cavities, odd masks, symmetries, neighbouring slices, and the smoothest closed path."""

from __future__ import annotations

import dataclasses
import itertools

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from monai_deepgmm import protocol
from monai_deepgmm.localisation.closed_path import MAX_STEP, smoothest
from monai_deepgmm.methods import endocardium
from monai_deepgmm.methods.endocardium import Ring, rings
from monai_deepgmm.methods.polar import ANGLES, RADII
from monai_deepgmm.protocol import Anatomy

SEQUENCES = ("LGE", "T2", "bSSFP")
#: How bright blood and wall are in each of them.
BLOOD = {"LGE": 1.0, "T2": -1.0, "bSSFP": 1.5}
WALL = {"LGE": -0.6, "T2": 0.4, "bSSFP": -0.5}
OUTER_MM, INNER_MM = 28.0, 17.0

infarct = protocol.load("infarct").anatomy
assert infarct is not None  # for the type checker; the protocol's own tests show it


def scene(
    shape: tuple[int, int] = (80, 80),
    *,
    spacing_mm: tuple[float, float] = (1.0, 1.0),
    at: tuple[float, float] = (0, 0),
    shift: tuple[float, float] = (0, 0),
    inner: float = INNER_MM,
    noise: float = 0.0,
    papillary: bool = False,
    sequences: tuple[str, ...] = SEQUENCES,
    seed: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:
    """A disc with a cavity: image ``(1, M, H, W)``, mask and cavity ``(1, 1, H, W)``; all lengths in mm."""
    lines = [(np.arange(n) - (n - 1) / 2) * s - a for n, s, a in zip(shape, spacing_mm, at, strict=True)]
    x, y = np.meshgrid(*lines, indexing="ij")
    mask = np.hypot(x, y) < OUTER_MM
    x, y = x - shift[0], y - shift[1]
    cavity = (np.hypot(x, y) < inner) & mask
    muscles = np.zeros_like(mask)
    if papillary:
        for angle in (0.8, 3.5):
            muscles |= np.hypot(x - 0.6 * inner * np.cos(angle), y - 0.6 * inner * np.sin(angle)) < 0.2 * inner
    rng = np.random.default_rng(seed)
    bright = cavity & ~muscles
    image = [np.where(bright, BLOOD[s], WALL[s]) + noise * rng.normal(size=shape) for s in sequences]
    return torch.from_numpy(np.stack(image))[None], tensor(mask), tensor(cavity)


def tensor(where: NDArray[np.bool_]) -> Tensor:
    return torch.from_numpy(where.astype(float))[None, None]


def find(
    image: Tensor,
    mask: Tensor,
    *,
    known: Anatomy = infarct,
    sequences: tuple[str, ...] = SEQUENCES,
    spacing_mm: tuple[float, float] = (1.0, 1.0),
    slices: tuple[int, ...] = (),
) -> Ring:
    return rings(image, mask, [known], sequences, spacing_mm, slices=slices)[0]


def dice(a: Tensor, b: Tensor) -> float:
    return float(2 * (a * b).sum() / (a.sum() + b.sum()))


def same(a: Ring, b: Ring) -> bool:
    return torch.equal(a.inside, b.inside) and all(np.array_equal(x, y) for x, y in zip(a[1:], b[1:], strict=True))


@pytest.mark.parametrize(
    ("planted", "least"),
    [
        *(({"shift": s, "noise": n}, 0.95) for s in [(0, 0), (3, -2), (-4, -3), (6, 0)] for n in (0.0, 0.5, 1.0)),
        *(({"inner": inner, "noise": 0.3}, 0.9 if inner == 14 else 0.95) for inner in (14, 15.5, 19, 21)),
        # The mask's place: the last two are cut off, or touched, by the image's border.
        *(({"at": at, "noise": 0.3}, 0.95) for at in [(8, -9), (12, 0), (15, 15)]),
    ],
    ids=str,
)
def test_a_cavity_is_found_where_it_is(planted, least):
    image, mask, cavity = scene(**planted)
    assert dice(find(image, mask).inside, cavity) > least


@pytest.mark.parametrize(
    ("shape", "spacing_mm"), [((80, 52), (1.0, 1.6)), ((42, 96), (2.0, 0.8)), ((120, 120), (0.75, 0.75))], ids=str
)
def test_voxels_need_not_be_square_millimetres(shape, spacing_mm):
    image, mask, cavity = scene(shape, spacing_mm=spacing_mm, shift=(3, -2), noise=0.3)
    found = find(image, mask, spacing_mm=spacing_mm)
    assert dice(found.inside, cavity) > 0.95
    assert found.outer.mean() == pytest.approx(OUTER_MM, abs=0.5)
    assert found.inner.mean() == pytest.approx(INNER_MM, abs=1)
    assert found.thickness_mm == pytest.approx([OUTER_MM - INNER_MM], abs=1)


@pytest.mark.parametrize("seed", range(3))
def test_papillary_muscles_are_swallowed(seed):
    image, mask, cavity = scene(shift=(3, -2), noise=0.3, papillary=True, seed=seed)
    clean, _, _ = scene(shift=(3, -2), papillary=True)
    muscles = cavity * (clean[:, 2:] < 0)
    assert muscles.sum() > 50
    inside = find(image, mask).inside
    assert dice(inside, cavity) > 0.96
    assert (inside * muscles).sum() > 0.95 * muscles.sum()


@pytest.mark.parametrize(
    "sequences",
    [("T2", "bSSFP"), ("LGE", "bSSFP"), ("LGE", "T2"), ("LGE",), ("T2",), ("bSSFP",), ("bSSFP", "LGE", "T2")],
    ids="+".join,
)
def test_sequences_may_lack_and_come_in_any_order(sequences):
    image, mask, cavity = scene(shift=(2, -2), noise=0.3, sequences=sequences)
    least = 0.9 if sequences == ("LGE",) else 0.95  # which the protocol trusts least, blood being as bright as scar
    assert dice(find(image, mask, sequences=sequences).inside, cavity) > least


def test_the_contrast_decides_which_side_is_inside():
    """Told that the inside is darker, it does not follow the bright one's border."""
    image, mask, cavity = scene(inner=22)
    inverse = Anatomy(infarct.inside, {s: -w for s, w in infarct.contrast.items()}, infarct.radius)
    assert dice(find(-image, mask, known=inverse).inside, cavity) > 0.95
    assert find(image, mask, known=inverse).inner.mean() < find(image, mask).inner.mean() - 3


@pytest.mark.parametrize("mean", [0.45, 0.625, 0.8])
def test_without_contrast_or_where_it_is_strict_the_usual_radius_is_taken(mean):
    image, mask, _ = scene(inner=21)
    blind, strict = Anatomy(("blood",), {}, (mean, 0.1)), Anatomy(infarct.inside, infarct.contrast, (mean, 0.001))
    for seen, known in ((image, blind), (torch.ones_like(image), blind), (image, strict)):
        found = find(seen, mask, known=known)
        np.testing.assert_allclose(found.inner / found.outer, mean, atol=0.5 / RADII + 1e-9)


def test_the_borders_of_a_disc():
    image, mask, cavity = scene()
    found = find(image, mask)
    np.testing.assert_allclose(found.outer, OUTER_MM, atol=0.6)
    np.testing.assert_allclose(found.inner, INNER_MM, atol=1.2)
    assert found.inside.dtype == mask.dtype
    assert set(found.inside.unique().tolist()) == {0.0, 1.0}
    assert found.inside.sum().item() == pytest.approx(cavity.sum().item(), rel=0.05)


def test_angles_by_hand():
    """The mask's centre is voxel (40, 40); angle 0 is along the first axis, a quarter turn along the second."""
    mask = torch.zeros(1, 1, 81, 81, dtype=torch.float64)
    mask[..., 20:61, 20:61] = 1
    angle = find(torch.ones(1, 3, 81, 81, dtype=torch.float64), mask).angle[0]
    quarter = ANGLES // 4
    assert [angle[i] for i in ((50, 40), (40, 50), (30, 40), (40, 30))] == [0, quarter, 2 * quarter, 3 * quarter]
    assert angle[50, 50] == ANGLES // 8
    assert (angle.min(), angle.max()) == (0, ANGLES - 1)


@pytest.fixture(scope="module")
def askew() -> tuple[Tensor, Tensor, Tensor]:
    """Image, mask, what was found; on an odd grid, off the centre."""
    image, mask, _ = scene((81, 81), at=(2, -3), shift=(4, -3), noise=0.5, papillary=True)
    return image, mask, find(image, mask).inside


@pytest.mark.parametrize("axis", [2, 3])
@pytest.mark.parametrize("turns", [0, 1, 2, 3])
def test_turning_or_mirroring_the_image_does_so_to_the_border(askew, turns, axis):
    image, mask, inside = askew
    turned = find(*(t.flip(axis).rot90(turns, (2, 3)) for t in (image, mask))).inside
    assert dice(turned.rot90(-turns, (2, 3)).flip(axis), inside) > 0.99


@pytest.mark.parametrize(("scale", "shift"), [(1e-3, 0.0), (400.0, 250.0)])
def test_the_scale_and_dtype_of_intensities_do_not_matter(askew, scale, shift):
    image, mask, inside = askew
    scales = torch.tensor([scale, 1.0, 3 * scale], dtype=image.dtype).reshape(1, 3, 1, 1)
    assert torch.equal(find(image * scales + shift, mask).inside, inside)
    single = find(image.float(), mask.float()).inside
    assert (single.dtype, inside.dtype) == (torch.float32, torch.float64)
    assert dice(single.double(), inside) > 0.999


@pytest.mark.parametrize("outside", [-30.0, 1e6])
def test_what_lies_outside_the_mask_never_matters(askew, outside):
    """Neither around it nor in a hole on the border."""
    image, mask, _ = askew
    mask = mask.clone()
    mask[..., 20:28, 36:44] = 0
    images = [torch.where(mask > 0, image, value) for value in (outside, 0.0)]
    given = [t.clone() for t in (*images, mask)]
    assert same(find(images[0], mask), find(images[1], mask))
    assert all(torch.equal(a, b) for a, b in zip((*images, mask), given, strict=True))  # nothing given is changed


def odd_masks() -> dict[str, Tensor]:
    _, disc, cavity = scene()
    empty = torch.zeros_like(disc)
    names = ("empty", "one voxel", "one in a corner", "a row", "in a corner", "two apart", "checkers")
    masks = {name: empty.clone() for name in names}
    masks["one voxel"][..., 40, 41] = 1
    masks["one in a corner"][..., 0, 79] = 1
    masks["a row"][..., 40, 10:70] = 1
    masks["in a corner"][..., :20, :20] = 1
    masks["two apart"][..., 5:15, 5:15] = 1
    masks["two apart"][..., 60:75, 60:75] = 1
    masks["checkers"][..., ::2, ::2] = 1
    hole, open_ring = disc.clone(), disc * (1 - cavity)
    hole[..., 36:44, 36:44] = 0
    open_ring[..., 28:52, 40:] = 0
    return {**masks, "hole": hole, "C": open_ring, "ring": disc * (1 - cavity), "everywhere": torch.ones_like(disc)}


@pytest.mark.parametrize("name", list(odd_masks()))
@pytest.mark.parametrize("spacing_mm", [(1.0, 1.0), (0.6, 2.5)], ids=str)
def test_odd_masks(name, spacing_mm):
    image, _, _ = scene(noise=0.5)
    mask = odd_masks()[name]
    found = find(image, mask, spacing_mm=spacing_mm)
    assert ((found.inside == 0) | (mask > 0)).all()
    assert found.angle.shape == (1, 80, 80)
    assert (found.angle >= 0).all()
    assert (found.angle < ANGLES).all()
    assert found.outer.shape == found.inner.shape == (1, ANGLES)
    assert np.isfinite(found.outer).all()
    assert (found.inner > 0).all()
    assert (found.inner <= found.outer).all()
    assert name != "empty" or found.inside.sum() == 0
    if name == "hole" and spacing_mm == (1.0, 1.0):
        assert dice(found.inside, scene()[2] * mask) > 0.95


def stack() -> tuple[Tensor, Tensor]:
    """A narrow cavity, one without any contrast, another narrow cavity."""
    image, mask, _ = scene(inner=14, noise=0.2)
    return torch.cat([image, torch.zeros_like(image), image]), mask.expand(3, -1, -1, -1).clone()


#: Slices of a patient tell each other nothing but what neighbours do: every radius is as usual in any patient.
STRANGERS = dataclasses.replace(infarct, spread=(1e-6, 1.0), enhancement=None)


@pytest.mark.parametrize(("slices", "known"), [((), infarct), ((0, 2, 4), STRANGERS), ((7, 3, 5), STRANGERS)], ids=str)
def test_without_neighbours_no_image_depends_on_another(slices, known):
    images, masks = stack()
    masks[1] = odd_masks()["hole"][0]
    together = find(images, masks, slices=slices, known=known)
    for b in range(3):
        alone = find(images[b : b + 1], masks[b : b + 1], slices=slices[b : b + 1], known=known)
        assert same(alone, Ring(*(part[b : b + 1] for part in together)))


@pytest.mark.parametrize("slices", [(0, 1, 2), (6, 5, 4)], ids=str)
def test_a_slice_that_shows_nothing_follows_its_neighbours(slices):
    images, masks = stack()
    alone, among = find(images, masks, known=STRANGERS), find(images, masks, slices=slices, known=STRANGERS)
    share = [(r.inner[1] / r.outer[1]).mean() for r in (alone, among)]
    found = (among.inner[0] / among.outer[0]).mean()
    usual = infarct.radius[0]
    assert share[0] == pytest.approx(usual, abs=0.01)
    expected = usual + endocardium.NEIGHBOURS * (found - usual)
    assert found < usual - 0.05
    assert share[1] == pytest.approx(expected, abs=1 / RADII)


def test_a_gap_parts_neighbours():
    """0 and 1 are neighbours, 1 and 5 are not; the order within the batch does not matter."""
    images, masks = stack()
    found = find(images, masks, slices=(0, 1, 5), known=STRANGERS)
    pair = find(images[:2], masks[:2], slices=(0, 1), known=STRANGERS)
    last = find(images[2:], masks[2:], slices=(5,), known=STRANGERS)
    for b, (other, at) in enumerate([(pair, 0), (pair, 1), (last, 0)]):
        np.testing.assert_array_equal(found.inner[b], other.inner[at])
    order = [2, 0, 1]
    mixed = find(images[order], masks[order], slices=(5, 0, 1), known=STRANGERS)
    np.testing.assert_array_equal(mixed.inner, found.inner[order])


def test_a_patient_has_a_usual_radius_of_its_own():
    """Four slices show a narrow cavity; the one without contrast, which none of them is beside, is as narrow."""
    image, mask, _ = scene(inner=14, noise=0.2)
    images = torch.cat([image] * 4 + [torch.zeros_like(image)])
    masks = mask.expand(5, -1, -1, -1).clone()
    known = dataclasses.replace(infarct, enhancement=None)
    found = find(images, masks, slices=(0, 2, 4, 6, 8), known=known)
    share = (found.inner / found.outer).mean(1)
    mean, (between, within) = infarct.radius[0], infarct.spread
    expected = (mean / between**2 + share.sum() / within**2) / (1 / between**2 + 5 / within**2)
    assert share[4] == pytest.approx(expected, abs=1 / RADII)
    assert share[4] < mean - 0.05
    strangers = find(images, masks, known=known)
    assert (strangers.inner[4] / strangers.outer[4]).mean() == pytest.approx(mean, abs=0.5 / RADII)


def test_towards_the_apex_the_heart_narrows_sooner_than_its_wall():
    """Nothing is seen: the border is where the wall is √(R̄ / R) as large a share of the radius as is usual."""
    x, y = np.meshgrid(*[np.arange(80) - 39.5] * 2, indexing="ij")
    radii = np.array([18.0, 24.0, 30.0])
    masks = torch.from_numpy((np.hypot(x, y) < radii[:, None, None]).astype(float))[:, None]
    nothing, known = torch.zeros(3, 3, 80, 80, dtype=torch.float64), dataclasses.replace(infarct, enhancement=None)
    found = find(nothing, masks, slices=(0, 2, 4), known=known)
    outer = found.outer.mean(1)
    wall = 1 - (found.inner / found.outer).mean(1)
    usual = (1 - infarct.radius[0]) * np.sqrt(outer.mean() / outer)
    np.testing.assert_allclose(wall, usual, atol=0.6 / RADII)
    strangers = find(nothing, masks, known=known)
    np.testing.assert_allclose((strangers.inner / strangers.outer).mean(1), infarct.radius[0], atol=0.6 / RADII)


def late(
    *, rim_mm: float = 0.0, scar_mm: float = 0.0, half: float = np.pi / 3, level: float = 1.0, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    """LGE alone, five slices of a patient: a cavity of 19 mm; a bright rim around all of it, scar in a sector.

    Blood is 1, wall 0, scar as bright as asked.
    """
    _, mask, cavity = scene(inner=19, sequences=("LGE",))
    x, y = np.meshgrid(*[np.arange(80) - 39.5] * 2, indexing="ij")
    radius, turn = np.hypot(x, y), np.abs(np.arctan2(y, x))
    clean = np.where(radius < 19 + rim_mm, 1.0, 0.0)
    clean[(radius >= 19) & (radius < 19 + scar_mm) & (turn < half)] = level
    rng = np.random.default_rng(seed)
    slices = [clean + 0.15 * rng.normal(size=(80, 80)) for _ in range(5)]
    return torch.from_numpy(np.stack(slices))[:, None], *(t.expand(5, -1, -1, -1).clone() for t in (mask, cavity))


def test_on_late_enhancement_a_rim_is_blood_and_a_broad_sector_is_scar():
    def bright_inside(**planted: float) -> tuple[float, float]:
        """The share of what is bright beyond the planted cavity that the border takes in; the border's Dice."""
        image, mask, cavity = late(**planted)
        plain = late(**planted, seed=1)[0].mean(0, keepdim=True) > 0.5
        beyond = plain.expand_as(mask) * mask * (1 - cavity)
        inside = find(image, mask, sequences=("LGE",), slices=(0, 1, 2, 3, 4)).inside
        return float((inside * beyond).sum() / beyond.sum()), dice(inside, cavity)

    rim, _ = bright_inside(rim_mm=1.5)
    scar, overlap = bright_inside(scar_mm=6.0)
    assert scar < 0.5 < 0.6 < rim
    assert overlap > 0.9


def test_scar_brighter_than_blood_shows_where_it_begins():
    """In half of the wall: there, too much of it to be told from blood by its share alone."""
    image, mask, _ = late(scar_mm=5.0, half=np.pi / 2, level=1.4)
    found = find(image, mask, sequences=("LGE",), slices=(0, 1, 2, 3, 4))
    np.testing.assert_allclose(found.inner, 19, atol=1.5)


@pytest.mark.parametrize(("scale", "shift"), [(400.0, 0.0), (1e-3, -7.0)])
def test_late_enhancement_may_be_signed_and_on_any_scale(scale, shift):
    image, mask, _ = late(scar_mm=6.0)
    found = [find(i, mask, sequences=("LGE",), slices=(0, 1, 2, 3, 4)).inside for i in (image, image * scale + shift)]
    assert torch.equal(*found)


def test_blood_that_is_not_bright_says_nothing():
    """Dark blood: the border is the usual one instead of one that takes the wall for blood."""
    image, mask, _ = late()
    found = find(-image, mask, sequences=("LGE",), slices=(0, 1, 2, 3, 4))
    np.testing.assert_allclose(found.inner / found.outer, infarct.radius[0], atol=0.5 / RADII + 1e-9)


def value(gain: NDArray[np.float64], weight: float, path: NDArray[np.int64]) -> float:
    steps = np.roll(path, -1) - path
    return float(gain[np.arange(len(gain)), path].sum() - weight * (steps**2).sum())


def steps(path: NDArray[np.int64]) -> NDArray[np.int64]:
    """From each angle to the next, the last one to the first included."""
    return np.abs(np.roll(path, -1) - path)


def best(gain: NDArray[np.float64], weight: float) -> float:
    """Of all closed paths."""
    paths = (np.array(p) for p in itertools.product(range(gain.shape[1]), repeat=len(gain)))
    return max(value(gain, weight, p) for p in paths if steps(p).max() <= MAX_STEP)


@pytest.mark.parametrize("weight", [0.0, 0.05, 0.5, 3.0])
@pytest.mark.parametrize(("angles", "radii"), [(4, 5), (5, 4), (6, 3), (3, 6)])
def test_the_best_closed_path_is_found(angles, radii, weight):
    """A ridge that wanders, in noise."""
    rng = np.random.default_rng(angles)
    for _ in range(5):
        ridge = rng.integers(0, 2, angles) + rng.integers(0, radii - 1)
        gain = rng.normal(0, 0.3, (angles, radii)) - 2 * (np.arange(radii) - ridge[:, None]) ** 2
        found = smoothest(gain, weight)
        assert found.shape == (angles,)
        assert value(gain, weight, found) == pytest.approx(best(gain, weight))


def test_a_path_by_hand():
    """The detour to radius 2 gains 3 and costs two steps of 2² · weight; to the neighbour, two of 1."""
    gain = np.zeros((6, 3))
    gain[:, 0] = 1
    gain[3, 2] = 4
    assert smoothest(gain, 0.3).tolist() == [0, 0, 0, 2, 0, 0]
    assert smoothest(gain, 0.4).tolist() == [0] * 6
    assert smoothest(gain, 10.0).tolist() == [0] * 6
    gain[2:5] = [1, 2, 0], [1, 0, 4], [1, 2, 0]
    assert smoothest(gain, 0.9).tolist() == [0, 0, 1, 2, 1, 0]


@pytest.mark.parametrize("shift", range(0, 24, 5))
def test_it_does_not_matter_where_the_turn_begins(shift):
    angles = np.arange(24)
    ridge = 10 + 4 * np.sin(2 * np.pi * angles / 24)
    gain = -((np.arange(20) - ridge[:, None]) ** 2)
    found = smoothest(gain, 0.5)
    assert np.abs(found - ridge).max() < 1.5
    np.testing.assert_array_equal(smoothest(np.roll(gain, shift, 0), 0.5), np.roll(found, shift))


@pytest.mark.parametrize("weight", [0.0, 0.1])
def test_no_step_is_too_large(weight):
    """A place that is worth the longest way there and back."""
    gain = np.zeros((30, 24))
    gain[:, 0] = 1
    gain[14, 23] = 1000
    found = smoothest(gain, weight)
    assert found[14] == 23
    assert steps(found).max() == MAX_STEP


def test_any_path_closes():
    """Noise without any ridge: from the last angle to the first no step may be larger either."""
    rng = np.random.default_rng(1)
    weight = 1 / (2 * (endocardium.SMOOTHNESS * RADII) ** 2)
    for _ in range(30):
        assert steps(smoothest(rng.normal(size=(ANGLES, RADII)), weight)).max() <= MAX_STEP
