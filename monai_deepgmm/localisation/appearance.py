"""What blood, wall and surroundings look like inside and around two contours, as log densities in polar cells."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import gaussian_filter1d

from monai_deepgmm.localisation.polar_grid import MIDDLES_MM

Array = NDArray[np.floating[Any]]

#: What is left out on either side of a contour, and how far the surroundings reach, in mm.
GAP_MM, BAND_MM = 1.0, 16.0
#: How far a slice's Gaussians are moved to those of all slices.
POOLED = 0.7
#: What is added to variances, in those of the ventricle.
FLOOR = 0.02
#: Over so many angles the surroundings are smoothed (standard deviation); and what their average counts, as a share.
SECTOR_SD, AVERAGE_SHARE = 4.0, 0.5
#: The wall's two parts at first: shares, shifts and variances in those of the whole wall; then steps of EM, and what
#: the first values count, as a share of the wall.
PARTS, SHIFTS, VARIANCES, EM_STEPS, PRIOR_SHARE = (0.7, 0.3), (-0.5, 1.0), (0.6, 0.8), 4, 0.1


class Densities(NamedTuple):
    """Log densities but for a constant, each ``(Z, ANGLES, RADII)``."""

    blood: Array
    wall: Array
    outside: Array


class _Gaussian(NamedTuple):
    weight: Array  # (Z,)
    mean: Array  # (Z, M)
    covariance: Array  # (Z, M, M)

    def log_density(self, x: Array) -> Array:
        """Of ``(Z, M, N)``: ``(Z, N)``."""
        factor = np.linalg.cholesky(self.covariance)
        away = np.linalg.inv(factor) @ (x - self.mean[..., None])  # a solver is slow on so many columns
        logs = np.log(np.diagonal(factor, axis1=1, axis2=2)).sum(1)
        density: Array = -0.5 * (away**2).sum(1) - logs[:, None]
        return density


def densities(x: Array, area: Array, inner_mm: Array, outer_mm: Array, even: NDArray[np.bool_]) -> Densities:
    """Fits Gaussians of blood, wall (a mixture of two: healthy, and scar or edema) and, by angle, the surroundings.

    Args:
        x: ``(Z, M, ANGLES, RADII)``.
        area: of each cell ``(Z, ANGLES, RADII)``.
        inner_mm: the inner contour ``(Z, ANGLES)``.
        outer_mm: the outer one.
        even: of the M sequences, those in which scar and edema look like the rest of the wall.
    """
    inner, outer = inner_mm[..., None], outer_mm[..., None]
    blood_area = area * (inner - GAP_MM > MIDDLES_MM)
    wall_area = area * ((inner + GAP_MM < MIDDLES_MM) & (outer - GAP_MM > MIDDLES_MM))
    beyond = area * ((outer + GAP_MM < MIDDLES_MM) & (outer + GAP_MM + BAND_MM > MIDDLES_MM))
    z, m = x.shape[:2]
    flat = x.reshape(z, m, -1)
    whole = _fitted(flat, (blood_area + wall_area).reshape(z, -1))
    sd = np.sqrt(np.diagonal(whole.covariance, axis1=1, axis2=2)) + 1e-6
    flat = (flat - whole.mean[..., None]) / sd[..., None]
    blood = _pooled(_fitted(flat, blood_area.reshape(z, -1)))
    wall = _wall(flat, wall_area.reshape(z, -1), even)
    outside = np.stack([_outside(s, a) for s, a in zip(flat.reshape(x.shape), beyond, strict=True)])
    return Densities(blood.log_density(flat).reshape(area.shape), wall.reshape(area.shape), outside)


def _fitted(x: Array, weight: Array) -> _Gaussian:
    """The Gaussians of ``(Z, M, N)`` with weights ``(Z, N)``."""
    total = weight.sum(1) + 1e-9
    mean = (x * weight[:, None]).sum(2) / total[:, None]
    away = x - mean[..., None]
    return _Gaussian(total, mean, (away * weight[:, None]) @ away.transpose(0, 2, 1) / total[:, None, None])


def _pooled(found: _Gaussian) -> _Gaussian:
    """Each slice's Gaussian, moved to the average one."""
    share = found.weight / found.weight.sum()
    mean, covariance = share @ found.mean, np.tensordot(share, found.covariance, 1)
    floor = FLOOR * np.eye(len(mean))
    return _Gaussian(
        found.weight,
        (1 - POOLED) * found.mean + POOLED * mean,
        (1 - POOLED) * found.covariance + POOLED * covariance + floor,
    )


def _wall(x: Array, weight: Array, even: NDArray[np.bool_]) -> Array:
    """The log density of a mixture of two Gaussians, which share their means where the wall is even ``(Z, N)``."""
    start = _pooled(_fitted(x, weight))
    sd = np.sqrt(np.diagonal(start.covariance, axis1=1, axis2=2))
    total, floor = start.weight, FLOOR * np.eye(x.shape[1])
    parts = [
        _Gaussian(total * s, start.mean + d * sd, v * start.covariance)
        for s, d, v in zip(PARTS, SHIFTS, VARIANCES, strict=True)
    ]
    prior = PRIOR_SHARE * total
    for _ in range(EM_STEPS):
        logs = _joint(parts, x)
        resp = np.exp(logs - np.logaddexp(*logs))
        for k, before in enumerate(parts):
            found = _fitted(x, weight * resp[k])
            n, n0 = found.weight[:, None], prior[:, None]
            mean = (n * found.mean + n0 * before.mean) / (n + n0)
            ratio = (found.weight / (found.weight + prior))[:, None, None]
            covariance = ratio * found.covariance + (1 - ratio) * start.covariance + floor
            parts[k] = _Gaussian(found.weight + prior, mean, covariance)
        shares = np.stack([p.weight for p in parts]) / sum(p.weight for p in parts)
        common = np.einsum("kz,kzm->zm", shares, np.stack([p.mean for p in parts]))
        parts = [p._replace(mean=np.where(even, common, p.mean)) for p in parts]
    mixed: Array = np.logaddexp(*_joint(parts, x))
    return mixed


def _joint(parts: list[_Gaussian], x: Array) -> Array:
    """``log π + log N`` of each part ``(2, Z, N)``."""
    total = parts[0].weight + parts[1].weight
    return np.stack([np.log(p.weight / total)[:, None] + p.log_density(x) for p in parts])


def _outside(x: Array, weight: Array) -> Array:
    """The log density of one slice's surroundings, of which each angle has its own Gaussian ``(ANGLES, RADII)``."""

    def smooth(a: Array) -> Array:
        found: Array = gaussian_filter1d(a, SECTOR_SD, axis=-1, mode="wrap")
        return found

    m = len(x)
    average = _fitted(x.reshape(1, m, -1), weight.reshape(1, -1))
    count = smooth(weight.sum(1)) + 1e-6
    few = AVERAGE_SHARE * count.mean()
    mean = (smooth((x * weight).sum(2)) + few * average.mean[0][:, None]) / (count + few)
    away = x - mean[:, :, None]
    spread = smooth(np.einsum("iar,jar->ija", away * weight, away)) + few * average.covariance[0][:, :, None]
    covariance = (spread / (count + few)).transpose(2, 0, 1) + 2 * FLOOR * np.eye(m)
    return _Gaussian(count, np.zeros((len(count), m)), covariance).log_density(away.transpose(1, 0, 2))
