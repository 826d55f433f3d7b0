"""The left ventricle's numbers and the thresholds beside them, worked out by hand."""

from __future__ import annotations

import numpy as np
import pytest
from outcomes import segmentation
from rings import GRIDS, INNER, OUTER, polar

from monai_deepgmm.results.measure import measure, measure_slices
from monai_deepgmm.results.no_reflow import no_reflow
from monai_deepgmm.results.numbers import numbers
from monai_deepgmm.results.segmentation import Segmentation
from monai_deepgmm.results.thresholds import REMOTE_VOXELS, THRESHOLDS, shares
from monai_deepgmm.results.uncertainty import Interval
from monai_deepgmm.results.ventricle import measure_ventricle, rays


def hearts(grid: str, **changes: object) -> Segmentation:
    """A ring on that grid: edema in a quarter of the wall, scar in the inner half of another."""
    affine, axis = GRIDS[grid]
    radius, angle = polar(affine, axis)
    labels = np.select([radius < INNER, radius < OUTER], [1, 2], 0)
    labels[(labels == 2) & (angle < 90)] = 3
    labels[(labels == 2) & (angle >= 180) & (angle < 270) & (radius < (INNER + OUTER) / 2)] = 4
    return segmentation(labels, affine=affine, slice_axis=axis, **changes)


@pytest.mark.parametrize("grid", GRIDS)
def test_masses_and_volumes_are_those_of_the_voxels_on_any_grid(grid: str):
    affine, _ = GRIDS[grid]
    made = hearts(grid)
    voxel_ml = float(np.prod(np.linalg.norm(affine[:3, :3], axis=0))) / 1000  # of orthogonal axes
    if grid == "sheared":  # the second axis leans: what it is longer for leaning does not count
        voxel_ml /= np.hypot(1, 0.3)
    found = numbers(made)
    blood, wall, both = (int(np.isin(made.labels, which).sum()) for which in ((1,), (2, 3, 4), (3, 4)))
    lv = found.ventricle
    assert lv.cavity_ml == pytest.approx(blood * voxel_ml, rel=1e-9)
    assert lv.lv_mass_g == pytest.approx(wall * voxel_ml * 1.05, rel=1e-9)
    assert lv.scar_edema_ml == pytest.approx(both * voxel_ml, rel=1e-9)
    assert lv.scar_edema_g == pytest.approx(both * voxel_ml * 1.05, rel=1e-9)
    assert lv.scar_edema_percent == pytest.approx(100 * both / wall, rel=1e-9)
    assert lv.thickness_mean_mm == pytest.approx(OUTER - INNER, abs=0.2)
    # Scar takes half of the wall's depth in a quarter of the rays; a few more or less where it begins.
    assert lv.transmural_25_percent == pytest.approx(25, abs=2)
    assert lv.transmural_75_percent == 0
    # The parts of the area that is drawn: pi (30² - 20²) of the plane, four slices.
    spacing = np.linalg.norm(affine[:3, :3], axis=0)[made.slice_axis]
    assert lv.lv_mass_g == pytest.approx(np.pi * (OUTER**2 - INNER**2) * spacing * 4 / 1000 * 1.05, rel=0.02)


def test_what_is_cut_out_is_measured_alike():
    made = hearts("oblique", images=np.random.default_rng(0).normal(size=(3, *hearts("oblique").labels.shape)))
    close = made.cropped()
    assert close.labels.size < made.labels.size
    assert close.labels.shape[made.slice_axis] == made.labels.shape[made.slice_axis]
    found, around = measure(made), rays(made)
    direct = (found, measure_slices(made, around), measure_ventricle(made, around, found))
    assert numbers(made) == direct


def test_slices_have_places_and_walls_of_their_own():
    made = hearts("isotropic")
    made.labels[:, :, 0][made.labels[:, :, 0] == 1] = 0  # the first slice has no cavity
    rows = numbers(made).slices
    assert [r.position_mm for r in rows[::4]] == pytest.approx([7.0, 15.0, 23.0, 31.0])
    assert rows[0].thickness_mean_mm is rows[0].transmural_50_percent is None
    assert rows[4].thickness_mean_mm == pytest.approx(10, abs=0.2)
    assert {r.transmural_25_percent for r in rows[4:8]} == {rows[4].transmural_25_percent}


def test_intervals_stand_beside_the_volumes():
    made = hearts("isotropic", intervals=tuple(Interval(k, 1.0, k - 1.0, k + 1.0) for k in (2.0, 3.0, 4.0, 5.0)))
    assert [(r.low_ml, r.high_ml) for r in measure(made)] == [(1, 3), (2, 4), (3, 5), (4, 6)]
    assert {(r.low_ml, r.high_ml) for r in measure(hearts("isotropic"))} == {(None, None)}


def test_what_no_sequence_shows_is_not_a_number():
    labels = hearts("isotropic").labels
    without_lge = numbers(segmentation(np.where(labels == 4, 3, labels), sequences=("T2", "bSSFP"))).ventricle
    hidden = ("scar_edema_g", "transmural_25_percent", "scar_2sd_percent", "scar_otsu_percent", "no_reflow_ml")
    assert {getattr(without_lge, name) for name in hidden} == {None}
    assert without_lge.thickness_mean_mm > 0
    without_t2 = numbers(segmentation(np.where(labels == 3, 2, labels), sequences=("LGE",))).ventricle
    assert without_t2.scar_edema_g is None
    assert without_t2.transmural_25_percent > 0
    assert without_t2.segments == "not available: no insertion point"
    assert numbers(segmentation(labels, name="brain")).ventricle is None


def test_thresholds_in_the_wall_by_hand():
    # One slice: 20 voxels of healthy wall, half at 8 and half at 12 (mean 10, sd 2); scar at 15, 17, 21, 23, 40.
    image = np.array([8.0] * 10 + [12.0] * 10 + [15.0, 17.0, 21.0, 23.0, 40.0]).reshape(25, 1, 1)
    wall = np.ones_like(image, dtype=bool)
    remote = image <= 12
    found = shares(image, wall, remote, 2)
    expected = {"2SD": 5, "3SD": 4, "5SD": 3, "6SD": 2, "FWHM": 1, "Otsu": 3}  # above 14, 16, 20, 22, 24 and 17
    assert found == {name: pytest.approx(100 * count / 25) for name, count in expected.items()}
    # A slice with too few healthy voxels borrows those of all slices.
    two = np.concatenate([image, image[::-1] + 100], axis=2)
    few = np.concatenate([remote, remote & False], axis=2)
    few[0, 0, 1] = True  # one voxel, at 140
    assert few[..., 1].sum() < REMOTE_VOXELS
    reference = two[few]
    above = (two > 14)[..., 0].sum() + (two[..., 1] > reference.mean() + 2 * reference.std()).sum()
    assert shares(two, np.ones_like(two, dtype=bool), few, 2)["2SD"] == pytest.approx(100 * above / 50)
    nowhere = shares(image, wall, remote & False, 2)
    assert {name for name, share in nowhere.items() if share is None} == {"2SD", "3SD", "5SD", "6SD"}
    assert set(shares(image, wall & False, remote, 2)) == set(THRESHOLDS)


def test_a_dark_core_is_no_reflow_where_scar_and_cavity_enclose_it():
    labels = np.zeros((24, 24, 2), int)
    labels[2:22, 2:22], labels[8:16, 8:16] = 2, 1
    labels[8:16, 16:22] = 4
    image = np.where(labels == 4, 100.0, 10.0)
    core = np.zeros(labels.shape, dtype=bool)
    core[11:13, 16:18, 0] = True  # at the cavity, with bright scar around
    image[core] = 20.0
    image[8:16, 20:22, 1] = 20.0  # at the outer border: not enclosed
    found = no_reflow(labels == 4, labels == 1, labels == 2, image, 2)
    np.testing.assert_array_equal(found, core)
    assert not no_reflow(labels == 3, labels == 1, labels == 2, image, 2).any()
    made = segmentation(labels, images=np.stack([image] * 3).astype(np.float32))
    assert numbers(made).ventricle.no_reflow_ml == pytest.approx(4 * 0.02)
