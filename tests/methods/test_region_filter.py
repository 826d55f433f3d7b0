"""Which regions are accepted, by hand; what those that are not become; the anatomical mixture of a whole patient."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from monai_deepgmm import protocol
from monai_deepgmm.methods.anatomy import AnatomicalConfig
from monai_deepgmm.methods.config import build
from monai_deepgmm.methods.endocardium import ANGLES, Ring
from monai_deepgmm.methods.enhancement import Enhancement
from monai_deepgmm.methods.region_filter import MIN_HEALTHY, UNKNOWN_SUPPORT, Region, _diameter, accepted, decide
from monai_deepgmm.methods.task import Images
from monai_deepgmm.mixture.fit import Fit
from monai_deepgmm.mixture.gaussian import m_step
from monai_deepgmm.patients import discovery
from monai_deepgmm.phantom import heart as phantom
from monai_deepgmm.protocol import RegionCriteria, Tissue
from monai_deepgmm.results.segment import segment

INFARCT = protocol.load("infarct")
SEQUENCES = INFARCT.sequences
BLOOD, MYOCARDIUM, EDEMA, SCAR = range(4)
SIDE, CAVITY, WALL = 61, 10.0, 25.0

ALWAYS = RegionCriteria(0.0, -1e9, {}, "LGE")
NEVER = RegionCriteria(0.0, 1e9, {}, "LGE")

#: Each voxel's place around the centre: offsets along the two axes, and the distance.
X, Y = np.meshgrid(*[np.arange(SIDE) - SIDE // 2] * 2, indexing="ij")
R = np.hypot(X, Y)


def tissues(edema: RegionCriteria | None = ALWAYS, scar: RegionCriteria | None = ALWAYS) -> tuple[Tissue, ...]:
    """The protocol's, with other criteria."""
    changed = [dataclasses.replace(t, criteria=c) for t, c in zip(INFARCT.tissues[2:], (edema, scar), strict=True)]
    return (*INFARCT.tissues[:2], *changed)


def borders(batch: int) -> Ring:
    """A cavity within a wall, the same in each slice."""
    angle = (np.arctan2(Y, X) / (2 * np.pi) % 1 * ANGLES).astype(np.int64) % ANGLES
    inside = torch.from_numpy((R < CAVITY).astype(float)).expand(batch, 1, -1, -1)
    outer, inner = (np.full((batch, ANGLES), radius) for radius in (WALL, CAVITY))
    return Ring(inside, np.stack([angle] * batch), outer, inner)


def labels(**regions: NDArray[np.bool_]) -> NDArray[np.int64]:
    """A slice: blood, myocardium, and where edema and scar are."""
    found = np.where(R < CAVITY, BLOOD, MYOCARDIUM)
    for tissue, where in regions.items():
        found[where] = {"edema": EDEMA, "scar": SCAR, "myocardium": MYOCARDIUM}[tissue]
    return found


def disc(row: float, column: float, radius: float) -> NDArray[np.bool_]:
    return np.hypot(X - row, Y - column) < radius


def soft(*slices: NDArray[np.int64]) -> tuple[Tensor, Tensor]:
    """Responsibilities, and the mask. Edema could be myocardium, and scar could be edema, or less likely myocardium."""
    likely = torch.tensor(
        [[0.9, 0.1, 0.0, 0.0], [0.0, 0.85, 0.1, 0.05], [0.0, 0.2, 0.7, 0.1], [0.0, 0.1, 0.3, 0.6]], dtype=torch.float64
    )
    mask = torch.from_numpy((R < WALL).astype(float)).expand(len(slices), 1, -1, -1).clone()
    return likely[torch.from_numpy(np.stack(slices))].movedim(-1, 1) * mask, mask


def bland(batch: int) -> Tensor:
    """Images that nothing is seen in: a checkerboard of 0 and 2 in each sequence, mean 1 and standard deviation 1."""
    board = torch.from_numpy(((X + Y) % 2 * 2.0)[None, None])
    return board.expand(batch, len(SEQUENCES), -1, -1).clone()


def given(
    resp: Tensor,
    mask: Tensor,
    *,
    of: tuple[Tissue, ...] | None = None,
    image: Tensor | None = None,
    at: tuple[int, ...] = (),
    sequences: tuple[str, ...] = SEQUENCES,
    spacing_mm: tuple[float, float] = (1.0, 1.0),
) -> Images:
    image = bland(len(mask)) if image is None else image
    ring = borders(len(mask))
    return Images(image, mask, resp, INFARCT, of or tissues(), sequences, spacing_mm, slices=at, ring=ring)


def run(*slices: NDArray[np.int64], **known) -> tuple[Tensor, list[Region]]:
    resp, mask = soft(*slices)
    return decide(resp, given(resp, mask, **known))


def only(regions: list[Region], tissue: str) -> list[Region]:
    return [r for r in regions if r.tissue == tissue]


@pytest.mark.parametrize(
    ("weights", "size", "support", "contrast", "decision"),
    [
        ((0.1, 1.0, 0.25), 5.0, 0.5, 1.0, True),  # 0.1 · 5 + 1 · 0.5 + 0.25 · 1 = 1.25
        ((0.1, 1.0, 0.25), 4.9, 9.0, 9.0, False),  # too small, whatever else speaks for it
        ((0.1, 1.0, 0.25), 5.0, 0.4, 1.0, False),  # 1.15
        ((0.1, 1.0, 0.25), 6.0, 0.4, 1.0, True),  # 1.25
        ((0.1, 1.0, 0.25), 5.0, 0.4, 1.4, True),  # 1.25
        ((0.1, 1.0, 0.25), 9.0, 0.0, np.inf, True),
        ((None, 2.5, None), 5.0, 0.5, -99.0, True),  # what has no weight does not count
        ((None, 2.5, None), 99.0, 0.4, np.inf, False),
    ],
)
def test_accepted_by_hand(weights, size, support, contrast, decision):
    given = {name: w for name, w in zip(("size", "support", "contrast"), weights, strict=True) if w is not None}
    criteria = RegionCriteria(5.0, 1.25 - 1e-9, given, "LGE")
    assert accepted(Region("scar", 0, 9, size, support, contrast, 0.0, False), criteria) is decision


@pytest.mark.parametrize(
    ("where", "spacing_mm", "voxels", "size"),
    [
        (disc(17, 0, 0.5), (1.0, 1.0), 1, 1.0),
        (disc(17, 0, 0.5), (2.0, 0.5), 1, 0.5),
        # From its centre, 3 to the next voxel outside, of which half a voxel is not its own.
        ((np.abs(X - 17) <= 2) & (np.abs(Y) <= 2), (1.0, 1.0), 25, 5.0),
        ((np.abs(X - 17) <= 2) & (np.abs(Y) <= 2), (2.0, 1.0), 25, 5.0),
        ((np.abs(X - 17) <= 2) & (np.abs(Y) <= 2), (1.5, 1.5), 25, 7.5),
        ((X == 17) & (np.abs(Y) <= 9), (1.0, 1.0), 19, 1.0),  # as thin as a speck, though long
    ],
    ids=["speck", "flat speck", "square", "wide square", "large square", "line"],
)
def test_size_by_hand(where, spacing_mm, voxels, size):
    _, regions = run(labels(scar=where), spacing_mm=spacing_mm)
    (region,) = only(regions, "scar")
    assert region.voxels == voxels == where.sum()
    assert region.size == pytest.approx(size)


@pytest.mark.parametrize("spacing_mm", [0.75, 1.0, 2.0])
def test_the_size_of_a_ring_does_not_grow_with_the_voxel(spacing_mm):
    """5 mm thick."""
    ring = (R * spacing_mm >= 10.25) & (R * spacing_mm < 15.25) & (R * spacing_mm < WALL)
    assert _diameter(ring, (spacing_mm, spacing_mm)) == pytest.approx(5, abs=0.75 * spacing_mm)


def test_regions_are_parted_and_measured_one_by_one():
    """A rim is thinner than a disc; what touches at a corner alone is two."""
    rim, ball = (R >= CAVITY) & (R < CAVITY + 2) & (X < 0), disc(17, 0, 5)
    _, regions = run(labels(scar=rim | ball))
    thin, thick = sorted(only(regions, "scar"), key=lambda r: r.size)
    assert (thin.voxels, thick.voxels) == (rim.sum(), ball.sum())
    assert thin.size < 5
    assert thick.size == pytest.approx(10, abs=1)
    _, regions = run(labels(scar=(disc(17, 0, 0.5) | disc(18, 1, 0.5))))
    assert [r.voxels for r in only(regions, "scar")] == [1, 1]


def test_only_the_wall_is_looked_at():
    """Scar inside the inner border is someone else's business; a region that leaves the wall counts within it."""
    where = disc(8, 0, 1.5) | disc(-11, 0, 3)
    resp, regions = run(labels(scar=where), of=tissues(scar=NEVER))
    (region,) = only(regions, "scar")
    assert region.voxels == (disc(-11, 0, 3) & (R >= CAVITY)).sum() < disc(-11, 0, 3).sum()
    assert (resp[0, SCAR] > 0.5).sum() == (where & (R < CAVITY)).sum()


def test_support_by_hand():
    """Of slices whose wall is all scar, has none, or is half scar, at the same angles or on the other side."""
    one, none, wall = labels(scar=disc(17, 0, 3)), labels(), R >= CAVITY
    whole, near, far = (labels(scar=where) for where in (wall, wall & (X > 0), wall & (X < 0)))

    def support(*slices: NDArray[np.int64], at: tuple[int, ...] = ()) -> float:
        _, regions = run(*slices, at=at)
        return next(r.support for r in regions if r.tissue == "scar" and r.image == 0)

    assert support(one, whole, at=(4, 3)) == pytest.approx(1)
    assert support(one, none, at=(4, 3)) == 0
    assert support(one, near, at=(4, 5)) == pytest.approx(1, abs=0.02)
    assert support(one, far, at=(4, 5)) == pytest.approx(0, abs=0.02)
    assert support(one, whole, none, at=(4, 3, 5)) == pytest.approx(0.5)
    assert support(one, whole, near, at=(4, 5, 3)) == pytest.approx(1, abs=0.02)
    assert support(one, whole, whole, at=(4, 2, 6)) == UNKNOWN_SUPPORT  # nobody beside it
    assert support(one, none, whole, at=(4, 5, 6)) == 0  # the next but one does not count
    assert support(one, whole) == UNKNOWN_SUPPORT
    assert support(one, at=(4,)) == UNKNOWN_SUPPORT
    inner_half = labels(scar=(R >= CAVITY) & (2 * R**2 < CAVITY**2 + WALL**2))  # by area
    assert support(one, inner_half, at=(0, 1)) == pytest.approx(0.5, abs=0.05)


def test_contrast_by_hand():
    """The healthy wall is 0 and 2 in turns: mean 1, standard deviation 1 (nearly, for either may be more)."""
    where = disc(17, 0, 3)
    image = bland(1)
    image[0, 0][torch.from_numpy(where)] = 4.5
    image[0, 1][torch.from_numpy(where)] = -2.0
    image[0, :, R < CAVITY] = 50.0  # inside is no healthy wall, whatever it is called
    for sequence, contrast in (("LGE", 3.5), ("T2", -3.0)):
        of = tissues(scar=dataclasses.replace(ALWAYS, sequence=sequence))
        _, regions = run(labels(scar=where, myocardium=disc(0, 0, 6)), of=of, image=image)
        assert regions[0].contrast == pytest.approx(contrast, abs=0.01)


def test_without_healthy_wall_any_contrast_will_do():
    square = (np.abs(X - 17) <= 2) & (np.abs(Y) <= 2)
    few, enough = square & (Y * 5 + X - 17 < -2), square & (Y * 5 + X - 17 < 100)
    assert few.sum() < MIN_HEALTHY <= enough.sum()
    for healthy, finite in ((few, False), (enough, True)):
        _, regions = run(labels(scar=(R >= CAVITY) & ~healthy))
        assert np.isfinite(only(regions, "scar")[0].contrast) == finite
    _, regions = run(labels(scar=square), image=torch.ones_like(bland(1)))
    assert regions[0].contrast == np.inf  # a constant wall


def test_where_all_is_accepted_or_needs_no_criteria_nothing_changes():
    slices = [labels(edema=disc(17, 0, 5), scar=disc(-17, 0, 4)), labels(scar=disc(0, 17, 2))]
    for of, found in (
        (tissues(), [("scar", 0, True), ("scar", 1, True), ("edema", 0, True)]),
        (tissues(None, None), []),
    ):
        resp, regions = run(*slices, of=of)
        torch.testing.assert_close(resp, soft(*slices)[0])
        assert [(r.tissue, r.image, r.accepted) for r in regions] == found


def test_what_scar_loses_can_be_edema():
    where = torch.from_numpy(disc(17, 0, 4))
    resp, regions = run(labels(scar=disc(17, 0, 4)), of=tissues(scar=NEVER))
    assert (resp.argmax(1)[0][where] == EDEMA).all()
    assert resp[0, :, where].T[0].tolist() == pytest.approx([0, 0.25, 0.75, 0])  # 0.1 and 0.3 of 0.4
    voxels = int(where.sum())
    assert [(r.tissue, r.voxels, r.accepted) for r in regions] == [("scar", voxels, False), ("edema", voxels, True)]


def test_what_edema_loses_is_healthy_and_does_not_return_to_scar():
    edema, scar = disc(17, 0, 4), disc(-17, 0, 4)
    resp, regions = run(labels(edema=edema, scar=scar), of=tissues(NEVER, NEVER))
    lost = torch.from_numpy(edema | scar)
    assert (resp.argmax(1)[0][lost] == MYOCARDIUM).all()
    assert resp[0, :, lost][[EDEMA, SCAR]].abs().max() == 0
    assert sorted((r.tissue, r.accepted) for r in regions) == [("edema", False), ("edema", False), ("scar", False)]


def test_edema_that_scar_leaves_joins_the_edema_beside_it():
    """Two halves of one disc: neither is large enough, both together are."""
    ball = disc(17, 0, 6)
    for scar, count in ((NEVER, ball.sum()), (ALWAYS, 0)):
        of = tissues(RegionCriteria(10.0, 0.0, {}, "T2"), scar)
        _, regions = run(labels(edema=ball & (Y > 0), scar=ball & (Y <= 0)), of=of)
        (region,) = only(regions, "edema")
        assert region.accepted * region.voxels == count


@pytest.mark.parametrize("present", [True, False])
def test_where_late_enhancement_shows_no_scar_edema_needs_more_evidence(present):
    """Its score is its share of the same angles next door, 1: enough at .5, not at 1.5."""
    slices, at = [labels(edema=disc(17, 0, 6))] * 2, (0, 1)
    of = tissues(RegionCriteria(0.0, 0.5, {"support": 1.0}, "T2", unenhanced=1.5), scar=NEVER)
    drawn, mask = soft(*slices)
    late = Enhancement(*[np.zeros((2, SIDE, SIDE))] * 2, np.ones((2, SIDE, SIDE), bool), 1.0, 0.0, 0.0, present)
    _, regions = decide(drawn, given(drawn, mask, of=of, at=at)._replace(enhancement=late))
    assert [r.accepted for r in only(regions, "edema")] == [present] * 2


def test_each_region_is_decided_alone_told_of_or_not():
    large, small, of = disc(17, 0, 5), disc(-17, 0, 2), tissues(scar=RegionCriteria(6.0, 0.0, {}, "LGE"))
    resp, regions = run(labels(scar=large | small), of=of)
    found = resp.argmax(1)[0].numpy()
    assert (found[large] == SCAR).all()
    assert (found[small] == EDEMA).all()
    drawn, mask = soft(labels(scar=large | small))
    untold, rest = decide(drawn, given(drawn, mask, of=of), told=False)
    assert torch.equal(untold, resp)
    assert [r for r in regions if r.size >= 6 or r.tissue != "scar"] == rest != regions
    assert sorted((r.voxels, r.accepted) for r in only(regions, "scar")) == [(small.sum(), False), (large.sum(), True)]


def test_neighbours_support_each_other():
    """Both are decided by what was there before either was."""
    slices = [labels(scar=disc(17, 0, 4))] * 2 + [labels(scar=disc(-17, 0, 4))]
    of = tissues(scar=RegionCriteria(0.0, 0.1, {"support": 1.0}, "LGE"))
    _, regions = run(*slices, of=of, at=(0, 1, 2))
    first, second, third = only(regions, "scar")
    assert first.support == pytest.approx(2 * second.support)  # the third does not hold it there
    assert (first.accepted, second.accepted, third.accepted) == (True, True, False)


def test_where_nothing_else_is_possible_the_wall_is_healthy():
    resp, mask = soft(labels(scar=disc(17, 0, 4)))
    certain = torch.nn.functional.one_hot(resp.argmax(1), 4).movedim(-1, 1).double() * mask
    changed, _ = decide(certain, given(certain, mask, of=tissues(scar=NEVER)))
    where = torch.from_numpy(disc(17, 0, 4))
    assert (changed[0, MYOCARDIUM, where] == 1).all()
    torch.testing.assert_close(changed.sum(1, keepdim=True), mask)


@pytest.mark.parametrize("edema", [ALWAYS, NEVER], ids=["edema", "no edema"])
@pytest.mark.parametrize("scar", [ALWAYS, NEVER], ids=["scar", "no scar"])
def test_probabilities_sum_to_one_again_and_nothing_given_is_changed(edema, scar):
    resp, mask = soft(labels(edema=disc(17, 0, 6), scar=disc(15, 0, 4)), labels(scar=disc(0, 17, 2)))
    known = given(resp, mask, of=tissues(edema, scar), at=(0, 1))
    before = [t.clone() for t in (resp, known.image, mask, known.ring.inside)]
    found, _ = decide(resp, known)
    torch.testing.assert_close(found.sum(1, keepdim=True), mask)
    assert ((found >= 0) & (found <= 1)).all()
    assert all(torch.equal(a, b) for a, b in zip((resp, known.image, mask, known.ring.inside), before, strict=True))


def test_what_cannot_be_judged_is_not():
    """A tissue whose sequence lacks, a slice without a wall."""
    slices = labels(edema=disc(17, 0, 5))
    resp, regions = run(slices, of=tissues(edema=dataclasses.replace(NEVER, sequence="T2")), sequences=("LGE",))
    assert only(regions, "edema") == []
    torch.testing.assert_close(resp, soft(slices)[0])
    resp, mask = soft(labels())
    found, regions = decide(resp * 0, given(resp, mask * 0, of=tissues(NEVER, NEVER), at=(0,)))
    assert regions == []
    assert found.abs().max() == 0


#: Level of each tissue in LGE, T2, bSSFP.
LEVELS = torch.tensor([[1.2, -1.2, 1.5], [-0.8, 0.0, -0.5], [-0.5, 1.2, -0.4], [1.2, 0.8, -0.3]], dtype=torch.float64)


def patient(*slices: NDArray[np.int64], noise: float = 0.2, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Image, mask and truth of slices with a cavity of a usual size."""
    truth = torch.from_numpy(np.stack(slices))
    generator = torch.Generator().manual_seed(seed)
    image = LEVELS[truth].movedim(-1, 1)
    image = image + noise * torch.randn(image.shape, generator=generator, dtype=torch.float64)
    return image, soft(*slices)[1], truth


def infarcted() -> NDArray[np.int64]:
    """A cavity of 15 in a wall of 25: edema in a third of it, scar in the middle of that."""
    found = np.where(R < 15, BLOOD, MYOCARDIUM)
    turn = np.abs(np.arctan2(Y, X))
    found[(R >= 15) & (turn < np.pi / 3)] = EDEMA
    found[(R >= 15) & (turn < np.pi / 6)] = SCAR
    return found


def healthy() -> NDArray[np.int64]:
    return np.where(R < 15, BLOOD, MYOCARDIUM)


def task(image: Tensor, mask: Tensor, of: tuple[Tissue, ...] = INFARCT.tissues, slices: tuple[int, ...] = ()) -> Images:
    return Images(image, mask, mask, INFARCT, of, SEQUENCES, (1.0, 1.0), slices=slices)


def fitted(images: Images, **settings) -> Fit:
    return AnatomicalConfig(**settings).solve(images)


def overlap(found: Tensor, truth: Tensor, mask: Tensor, tissue: int) -> float:
    a, b = ((x == tissue) & (mask[:, 0] > 0) for x in (found, truth))
    return float(2 * (a & b).sum() / (a.sum() + b.sum()))


def test_planted_tissues_are_found_under_their_names():
    image, mask, truth = patient(infarcted())
    found = fitted(task(image, mask))
    assert found.diagnostics.converged.all()
    for tissue in range(4):
        assert overlap(found.resp.argmax(1), truth, mask, tissue) > 0.85
    # Its mixture is on the image's scale, and its covariances are those of an M-step.
    torch.testing.assert_close(found.mixture.means[0], LEVELS, rtol=0, atol=0.25)
    expected = m_step(image, found.resp, mask, covariance="full", spatial=True)
    torch.testing.assert_close(found.mixture.covariances, expected.covariances)
    assert found.mixture.covariances.shape == (1, 4, 3, 3)


def test_blood_lies_inside_the_border_and_the_rest_outside():
    image, mask, _ = patient(infarcted(), healthy(), noise=1.0)
    images = task(image, mask, slices=(0, 1))
    found, inside = fitted(images), images.border().inside
    torch.testing.assert_close(found.resp[:, :1], inside)
    torch.testing.assert_close(found.resp[:, 1:].sum(1, keepdim=True), mask - inside)
    torch.testing.assert_close(found.mixture.weights.sum(1, keepdim=True), mask)
    assert (found.mixture.weights - found.resp).abs().max() > 0.1  # maps of the neighbourhood, not of the voxel


def test_a_tissue_that_is_not_there_is_no_collapsed_component_and_one_place_is_the_whole_mask():
    image, mask, _ = patient(healthy())
    bright = dataclasses.replace(INFARCT.tissue("scar"), level=dict.fromkeys(SEQUENCES, 9.0))
    found = fitted(task(image, mask, (*INFARCT.tissues[:3], bright)))
    assert found.resp[:, SCAR].sum() < 1
    assert found.diagnostics.collapsed is None
    image, mask, _ = patient(infarcted())
    for of in (INFARCT.tissues[1:], INFARCT.tissues[:1], INFARCT.tissues[1:2]):
        found = fitted(task(image, mask, of))
        torch.testing.assert_close(found.resp.sum(1, keepdim=True), mask)
        assert found.resp.shape[1] == len(of)


def test_slices_are_fitted_one_by_one():
    image, mask, _ = patient(infarcted(), healthy(), infarcted(), noise=0.5)
    together = fitted(task(image, mask))
    for b in range(3):
        alone = fitted(task(image[b : b + 1], mask[b : b + 1]))
        torch.testing.assert_close(alone.resp[0], together.resp[b], rtol=0, atol=1e-9)
        torch.testing.assert_close(alone.mixture.means[0], together.mixture.means[b])
        assert alone.diagnostics.nll[0].item() == pytest.approx(together.diagnostics.nll[b].item())


def test_the_decision_takes_the_border_from_the_image():
    """A bright line in a healthy wall is not accepted; a pair of infarcted slices keeps what it has."""
    line = (R >= 19) & (R < 21) & (X > 0)
    slices = np.where(line, SCAR, healthy()), infarcted(), infarcted()
    image, mask, truth = patient(*slices, noise=0.4)
    resp, _ = soft(*slices)
    found, regions = decide(resp, task(image, mask, slices=(0, 5, 6)))
    before, after = resp.argmax(1), found.argmax(1)
    assert (before[0] >= EDEMA).sum() == line.sum() > 50
    assert (after[0] >= EDEMA).sum() == 0
    assert torch.equal(after[1:] * mask[1:, 0], truth[1:] * mask[1:, 0])
    assert {(r.tissue, r.image) for r in regions if r.accepted} == {(t, i) for t in ("edema", "scar") for i in (1, 2)}


@pytest.mark.parametrize("ill", [False, True], ids=["healthy", "infarct"])
def test_a_phantom_patient(tmp_path, ill):
    made = phantom.PhantomConfig(size=210, slices=(2, 3), healthy=float(not ill))
    phantom.write_cohort(tmp_path, 1, seed=1, config=made)
    (study,) = discovery.find(tmp_path, INFARCT).studies
    found = segment(study, build())
    told = found.sidecar["presence"]
    assert [told[name]["present"] for name in ("edema", "scar")] == [ill, ill]
    for tissue in INFARCT.tissues[2:]:
        seen = told[tissue.name]
        assert ((found.labels == tissue.index).sum() > 0) == ill
        assert seen["regions"]
        assert bool(seen["slices"]) == ill
        assert seen["criteria"] == dataclasses.asdict(tissue.criteria.among(enhanced=ill))
    assert told["edema"]["patient"] is None
    patient = told["scar"]["patient"]
    assert patient["present"] or not ill
    assert patient["needed"] == INFARCT.anatomy.enhancement.evidence
    assert set(patient) == {"present", "evidence", "needed", "separation", "needed_separation", "level"}
    everything = segment(study, build(settings={"presence": False}))
    assert everything.sidecar["presence"] is None
    assert {1, 2, 3, 4} <= set(np.unique(everything.labels).tolist())
