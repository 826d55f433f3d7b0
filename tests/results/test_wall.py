"""The wall along rays, and its segments, against shapes whose numbers are known."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray
from rings import GRIDS, INNER, OUTER, Affine, polar

from monai_deepgmm.results import wall
from monai_deepgmm.results.segments import segments
from monai_deepgmm.results.wall import along_rays, diameter_mm, plane, position_mm, summary


@pytest.fixture(params=GRIDS)
def ring(request) -> tuple[Affine, int, NDArray[np.float64], NDArray[np.float64]]:
    affine, axis = GRIDS[request.param]
    return affine, axis, *polar(affine, axis)


def half_voxel(affine: Affine, axis: int) -> float:
    return np.linalg.norm(plane(affine, axis).to_mm, axis=0).max() / 2


def test_a_ring_is_as_thick_as_it_was_drawn_on_any_grid(ring):
    affine, axis, radius, _ = ring
    found = summary(along_rays((radius >= INNER) & (radius < OUTER), radius < INNER, None, affine, axis))
    near = half_voxel(affine, axis)
    assert found.thickness_mean_mm == pytest.approx(OUTER - INNER, abs=near / 4)
    assert found.thickness_min_mm == pytest.approx(OUTER - INNER, abs=near)
    assert found.thickness_max_mm == pytest.approx(OUTER - INNER, abs=near)
    assert found[3:] == (None, None, None)  # of no tissue
    drawn = np.moveaxis(radius < OUTER, axis, 0).sum((1, 2)).max() * abs(np.linalg.det(plane(affine, axis).to_mm))
    assert diameter_mm(radius < OUTER, affine, axis) == pytest.approx(2 * np.sqrt(drawn / np.pi), rel=1e-9)
    assert diameter_mm(radius < OUTER, affine, axis) == pytest.approx(2 * OUTER, abs=near)


def test_scar_is_as_deep_and_as_wide_as_it_was_drawn_on_any_grid(ring):
    affine, axis, radius, angle = ring
    whole = (radius >= INNER) & (radius < OUTER)
    # From the inner border outwards: all of the wall in 60°, 6 of 10 mm in the next 60°, 3.5 mm in the next.
    reach = np.select([angle < 60, angle < 120, angle < 180], [10.0, 6.0, 3.5], 0.0)
    rays = along_rays(whole, radius < INNER, whole & (radius < INNER + reach), affine, axis)
    near = half_voxel(affine, axis)
    for middle, depth in ((30, 10.0), (90, 6.0), (150, 3.5), (270, 0.0)):
        here = (rays.angles > middle - 25) & (rays.angles < middle + 25)
        assert (rays.depth * rays.thickness_mm)[:, here].mean() == pytest.approx(depth, abs=near / 2)
    edges = 100 * 4 * near / INNER / (2 * np.pi)  # where two depths meet, half a voxel to either side at each end
    found = summary(rays)
    assert found.transmural_25_percent == pytest.approx(50, abs=edges)
    assert found.transmural_50_percent == pytest.approx(100 / 3, abs=edges)
    assert found.transmural_75_percent == pytest.approx(50 / 3, abs=edges)
    # Areas: the wall's is what was drawn; full scar's is a sixth of it.
    pixel = abs(np.linalg.det(plane(affine, axis).to_mm))
    drawn = np.moveaxis(whole, axis, 0).sum((1, 2)) * pixel
    assert rays.wall_mm2.sum(1) == pytest.approx(drawn, rel=0.01)
    assert summary(rays, at=int(rays.slices[0])).transmural_50_percent == pytest.approx(100 / 3, abs=edges)


def test_an_ellipse_is_measured_along_its_rays():
    affine, axis = GRIDS["anisotropic"]
    radius, angle = polar(affine, axis)
    scale = 1 / np.hypot(np.cos(np.radians(angle)) / 1.0, np.sin(np.radians(angle)) / 0.75)  # half axes 1 and 0.75
    rays = along_rays((radius >= INNER * scale) & (radius < OUTER * scale), radius < INNER * scale, None, affine, axis)
    known = (OUTER - INNER) / np.hypot(np.cos(np.radians(rays.angles)), np.sin(np.radians(rays.angles)) / 0.75)
    assert np.abs(rays.thickness_mm - known).max() < half_voxel(affine, axis)


def test_an_open_wall_and_slices_without_cavity_do_not_count_as_thin():
    affine, axis = GRIDS["isotropic"]
    radius, angle = polar(affine, axis)
    whole, cavity = (radius >= INNER) & (radius < OUTER) & (angle < 270), radius < INNER
    cavity[..., 0] = False
    rays = along_rays(whole, cavity, whole, affine, axis)
    assert sorted(rays.slices) == [1, 2, 3]
    open_ = (rays.angles > 276) & (rays.angles < 354)
    assert np.isnan(rays.thickness_mm[:, open_]).all()
    assert np.isfinite(rays.thickness_mm[:, (rays.angles > 6) & (rays.angles < 264)]).all()
    assert summary(rays).transmural_75_percent == 100
    assert summary(rays, at=0) == wall.WallSummary()
    beside = np.zeros_like(whole)
    beside[:5, :5] = True  # a cavity that the wall does not surround
    assert np.isfinite(along_rays(whole, beside, None, affine, axis).thickness_mm).any()
    nothing = along_rays(whole & False, cavity, None, affine, axis)
    assert len(nothing.slices) == 0
    assert summary(nothing) == wall.WallSummary()


@pytest.mark.parametrize("flip", [1, -1])
def test_slices_run_from_base_to_apex_and_lie_where_the_scanner_says(flip: int):
    affine = np.diag([-1.0, -1.0, 8.0 * flip, 1.0])  # an axial plane: its apex is at the feet
    affine[:3, 3] = (40.0, 30.0, -10.0)
    radius, _ = polar(affine, 2)
    rays = along_rays((radius >= INNER) & (radius < OUTER), radius < INNER, None, affine, 2)
    assert rays.slices.tolist() == ([3, 2, 1, 0] if flip > 0 else [0, 1, 2, 3])
    assert [position_mm(k, affine, 2) for k in (0, 3)] == pytest.approx([-10.0 * flip, -10.0 * flip + 24.0])
    oblique, _ = GRIDS["oblique"]
    apart = position_mm(5, oblique, 2) - position_mm(4, oblique, 2)
    assert apart == pytest.approx(8.0, abs=1e-9)


def test_angles_are_counted_from_the_left_as_seen_from_the_apex():
    axial = plane(np.diag([-1.0, -1.0, 8.0, 1.0]), 2)  # LPS: the first index runs to the right, the second to the front
    assert axial.towards_apex.tolist() == [0, 0, -1]
    np.testing.assert_allclose(axial.to_mm, [[1, 0], [0, -1]], atol=1e-12)
    for affine, axis in GRIDS.values():
        seen = plane(affine, axis)
        lengths = np.linalg.norm(affine[:3, :3], axis=0)[list(seen.axes)]
        np.testing.assert_allclose(np.linalg.norm(seen.to_mm, axis=0), lengths)  # mm stay mm
    sagittal = plane(np.diag([-8.0, 1.0, 1.0, 1.0]), 0)
    np.testing.assert_allclose(sagittal.to_mm[1], [1, 0], atol=1e-12)  # anterior is up


def test_the_sixteen_segments_by_hand():
    affine = np.diag([-1.0, -1.0, -8.0, 1.0])
    radius, angle = polar(affine, 2, count=6)
    insertion = 110.0
    beyond = (angle - insertion) % 360
    whole = (radius >= INNER) & (radius < OUTER)
    scar = np.zeros_like(whole)
    scar[..., :2] = (whole & (beyond < 60))[..., :2]  # anteroseptal, basal: segment 2
    scar[..., 2:4] = (whole & (beyond >= 120) & (beyond < 150))[..., 2:4]  # half of the inferior one: 10
    scar[..., 4:] = (whole & ((angle - (insertion - 30) + 45) % 360 < 90))[..., 4:]  # apical anterior: 13
    found = segments(along_rays(whole, radius < INNER, scar, affine, 2), insertion)
    assert [s.number for s in found] == list(range(1, 17))
    expected = dict.fromkeys(range(1, 17), 0.0) | {2: 100.0, 10: 50.0, 13: 100.0}
    for segment in found:
        assert segment.percent == pytest.approx(expected[segment.number], abs=6)  # a voxel of 1 mm in a sector of 26
        assert segment.thickness_mm == pytest.approx(OUTER - INNER, abs=0.5)
    with pytest.raises(ValueError, match="2 slices"):
        segments(along_rays(whole[..., :2], (radius < INNER)[..., :2], None, affine, 2), insertion)
