"""A volume that was turned and shifted is found; one that agrees is left."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.ndimage import affine_transform, gaussian_filter

from monai_deepgmm.registration import whole_stack

SPACING = (1.5, 1.5, 2.0)


@pytest.fixture(scope="module")
def head():
    """Two contrasts of blobs in an ellipsoid, and its mask."""
    rng = np.random.default_rng(0)
    x, y, z = np.meshgrid(*(np.linspace(-1, 1, n) for n in (64, 60, 48)), indexing="ij")
    mask = (x / 0.7) ** 2 + (y / 0.75) ** 2 + (z / 0.7) ** 2 < 1
    parts = np.digitize(gaussian_filter(rng.normal(0, 1, mask.shape), 5), [-0.01, 0.01])
    first, second = (np.array(levels)[parts] * mask for levels in ((300.0, 100.0, 200.0), (40.0, 120.0, 90.0)))
    return [gaussian_filter(a, 1) + rng.normal(0, 3, a.shape) for a in (first, second)], mask


def matrix(degrees, shift_mm, middle_mm):
    angle = np.radians(degrees)
    made = np.eye(4)
    made[:2, :2] = [[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]
    made[:3, 3] = middle_mm + np.array(shift_mm) - made[:3, :3] @ middle_mm
    return made


def test_a_planted_movement_is_found_to_half_a_voxel(head):
    (fixed, moving), mask = head
    middle = np.argwhere(mask).mean(0) * SPACING
    planted = matrix(5.0, (4.0, -3.0, 2.5), middle)
    # At M x the moved image holds what lies at x.
    to_index = np.diag([*(1 / np.array(SPACING)), 1]) @ np.linalg.inv(planted) @ np.diag([*SPACING, 1])
    found = whole_stack.movement(fixed, affine_transform(moving, to_index, order=1), mask, SPACING)
    assert found.kept
    places = np.c_[np.argwhere(mask)[::200] * SPACING, np.ones(len(np.argwhere(mask)[::200]))]
    off = np.linalg.norm((places @ found.matrix.T - places @ planted.T)[:, :3], axis=1)
    assert off.mean() < 0.75


def test_what_agrees_is_left(head):
    (fixed, moving), mask = head
    found = whole_stack.movement(fixed, moving, mask, SPACING)
    assert not found.kept
    assert found.after >= found.before - 1e-3


def test_a_volume_too_thin_to_be_turned_has_no_movement(head):
    (fixed, moving), mask = head
    assert whole_stack.movement(fixed[..., 20:22], moving[..., 20:22], mask[..., 20:22], SPACING) is None
