"""Where things are in a synthetic brain: a folded cortex on white matter, nuclei, ventricles, and fluid around all.

Everything is a function of a position in mm, so one patient is the same brain on any grid. Folds are the zero surfaces
of a sum of plane waves: sheets that bend at random and keep their distance from each other, as sulci do.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import IntEnum

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Singles = NDArray[np.float32]

#: How many plane waves make a random field.
N_WAVES = 48
#: Fine points per voxel along each axis; what a voxel holds is averaged over their cube.
FINER = 2
#: Planes of voxels that are worked on together, which bounds the memory.
SLAB = 8
#: Half axes of the brain, as a share of the grid's extent.
FILLED = 0.46
#: Half axes of the brain that ``BODIES`` are given for, in mm.
AVERAGE_MM: Floats = np.array([67.0, 79.0, 67.0])


class Part(IntEnum):
    """What a brain is made of; deep grey matter is brighter on T1 than the cortex."""

    CORTEX = 0
    DEEP = 1
    WHITE = 2
    FLUID = 3


#: What lies in the white matter, once per hemisphere: centre (right, front, top) and half axes in mm.
BODIES: tuple[tuple[Part, tuple[float, float, float], tuple[float, float, float]], ...] = (
    (Part.DEEP, (11.0, -10.0, 1.0), (9.0, 15.0, 10.0)),  # thalamus
    (Part.DEEP, (27.0, 4.0, -2.0), (7.5, 20.0, 13.0)),  # putamen and pallidum
    (Part.DEEP, (15.0, 18.0, 5.0), (6.5, 14.0, 10.0)),  # caudate
    (Part.FLUID, (8.0, 3.0, 11.0), (5.0, 25.0, 6.0)),  # lateral ventricle
    (Part.FLUID, (18.0, -27.0, 3.0), (5.0, 13.0, 8.0)),  # its horn
    (Part.FLUID, (0.0, -5.0, -2.0), (2.2, 11.0, 9.0)),  # third ventricle, shared by both
)


@dataclass(frozen=True)
class Waves:
    """A random field of mean 0 and variance 1: plane waves of about one length in random directions.

    Attributes:
        k: wave vectors, rad/mm, ``(N_WAVES, 3)``.
        phase: ``(N_WAVES,)``.
    """

    k: Floats
    phase: Floats

    @classmethod
    def draw(cls, rng: np.random.Generator, length_mm: float) -> Waves:
        """Waves whose lengths lie within 15 % of ``length_mm``."""
        towards = rng.standard_normal((N_WAVES, 3))
        towards /= np.linalg.norm(towards, axis=1, keepdims=True)
        size = 2 * np.pi / (length_mm * rng.uniform(0.85, 1.15, (N_WAVES, 1)))
        return cls(towards * size, rng.uniform(0, 2 * np.pi, N_WAVES))

    def on(self, x: Floats, y: Floats, z: Floats, *, slope: bool = False) -> Singles:
        """The field on the grid of three axes in mm, ``(X, Y, Z)``; with ``slope`` its gradient too, ``(4, X, Y, Z)``.

        A wave is a product of functions of one axis each, so that a whole grid takes one product of matrices.
        """
        a = x[:, None] * self.k[:, 0] + self.phase
        across, up = (np.exp(1j * self.k[:, [i]] * axis).astype(np.complex64) for i, axis in ((1, y), (2, z)))
        product = across[:, :, None] * up[:, None]
        right = np.concatenate([product.real, product.imag]).reshape(2 * N_WAVES, -1)
        rows = [np.concatenate([np.cos(a), -np.sin(a)], axis=1)]
        if slope:
            turned = np.concatenate([-np.sin(a), -np.cos(a)], axis=1)
            rows += [turned * np.tile(self.k[:, i], 2) for i in range(3)]
        left = np.stack(rows) * np.sqrt(2 / N_WAVES)
        found: Singles = (left.astype(np.float32) @ right).reshape(len(rows), len(x), len(y), len(z))
        return found if slope else found[0]


@dataclass(frozen=True)
class Brain:
    """One patient's anatomy, in mm around the centre: right, front and top are positive.

    Attributes:
        half_mm: the half axes, ``(3,)``.
        thick_mm: the cortex's thickness on average.
        sulcus_mm: half the width of a sulcus on average.
        deep_mm: how far sulci reach below the surface on average.
        rim_mm: thickness of the fluid around the brain on average.
        bodies: part, centre and half axes of what lies in the white matter.
        folds: its zero surfaces are the sulci.
        slow: varies depth, thickness and width from place to place.
        hull: moves the surface in and out.
    """

    half_mm: Floats
    thick_mm: float
    sulcus_mm: float
    deep_mm: float
    rim_mm: float
    bodies: tuple[tuple[Part, Floats, Floats], ...]
    folds: Waves
    slow: Waves
    hull: Waves

    def shares(self, x: Floats, y: Floats, z: Floats) -> Singles:
        """How much of each ``Part`` there is at each point of the grid of three axes in mm, ``(4, X, Y, Z)``.

        A point stands for the volume around it: it holds some of both sides of a border that is near.
        """
        step = float(np.cbrt(np.prod([axis[1] - axis[0] for axis in (x, y, z)])))
        depth = self._depth(x, y, z)
        slow = self.slow.on(x, y, z)
        pial = self._pial(depth, slow, x, y, z)
        found = np.zeros((len(Part), *depth.shape), np.float32)
        found[Part.WHITE] = 1
        for part, centre, half in self.bodies:
            away = _ellipsoid(centre, half, np.abs(x) if centre[0] else x, y, z) + 0.06 * slow
            _lay(found, part, (1 - away) * half.min() / step)
        _lay(found, Part.CORTEX, (self.thick_mm * (1 + 0.12 * slow) - pial) / step)
        _lay(found, Part.FLUID, -pial / step)
        return found * _inside(depth / step)

    def _depth(self, x: Floats, y: Floats, z: Floats) -> Singles:
        """The distance to the brain's surface, positive inside."""
        a, b, c = self.half_mm
        u = (x[:, None] / (a * (1 - 0.1 * y / b)))[..., None]  # an egg, narrower in front
        v, w = (y / b)[None, :, None], (z / c)[None, None]
        radius = np.sqrt(u**2 + v**2 + w**2)
        steep = np.sqrt((u / a) ** 2 + (v / b) ** 2 + (w / c) ** 2) / np.maximum(radius, 1e-6)
        depth: Singles = ((1 - radius) / np.maximum(steep, 1 / max(a, b, c))).astype(np.float32)
        return depth + 1.5 * self.hull.on(x, y, z)

    def _pial(self, depth: Singles, slow: Singles, x: Floats, y: Floats, z: Floats) -> Singles:
        """The distance to the fluid at the brain's surface and in its sulci, negative in that fluid."""
        value, *slope = self.folds.on(x, y, z, slope=True)
        away = np.abs(value) / np.sqrt(slope[0] ** 2 + slope[1] ** 2 + slope[2] ** 2 + 1e-6)
        below = np.maximum(depth - self.deep_mm * (1 + 0.35 * slow), 0)
        sulci = np.hypot(away, below) - self.sulcus_mm * (1 + 0.3 * slow)
        # Between the hemispheres, down to the corpus callosum.
        gap = np.hypot(x[:, None, None] + 1.5 * slow, np.maximum(0.3 * self.half_mm[2] - z, 0)) - self.sulcus_mm
        surface = depth - np.maximum(self.rim_mm * (1 + 0.5 * slow), 0.3)
        found: Singles = np.minimum(np.minimum(surface, sulci), gap)
        return found


def draw(rng: np.random.Generator, half_mm: Floats) -> Brain:
    """One patient's anatomy; brains differ in size by a few percent, their ventricles by more.

    Args:
        rng: where chance comes from.
        half_mm: half axes of a large brain, which fills the grid, ``(3,)``.
    """
    half = half_mm * rng.uniform(0.94, 1.0, 3)
    scale = half / AVERAGE_MM
    wide = np.exp(rng.normal(0, 0.2))
    bodies = []
    for part, centre, axes in BODIES:
        size = rng.uniform(0.92, 1.08, 3) * (wide if part is Part.FLUID else 1.0)
        shift = rng.normal(0, 1.0, 3) * (centre[0] > 0)
        bodies.append((part, (np.array(centre) + shift) * scale, np.array(axes) * scale * size))
    return Brain(
        half_mm=half,
        thick_mm=float(rng.uniform(2.8, 3.4)),
        sulcus_mm=float(rng.uniform(0.6, 0.9)),
        deep_mm=float(rng.uniform(22, 28) * scale.mean()),
        rim_mm=float(rng.uniform(0.8, 1.6)),
        bodies=tuple(bodies),
        folds=Waves.draw(rng, 22.0),
        slow=Waves.draw(rng, 40.0),
        hull=Waves.draw(rng, 60.0),
    )


def fractions(brain: Brain, axes_mm: Sequence[Floats]) -> tuple[Singles, Singles]:
    """What each voxel holds, averaged over a grid ``FINER`` times as fine.

    Args:
        brain: the anatomy.
        axes_mm: where the voxels' centres are, evenly spaced along each axis.

    Returns:
        The share of each ``Part`` in the voxel, ``(4, X, Y, Z)``, and of the brain as a whole, ``(X, Y, Z)``.
    """
    x, y, z = (_finer(axis) for axis in axes_mm)
    shares = np.concatenate([_averaged(brain.shares(some, y, z)) for some in _slabs(x)], axis=1)
    return shares, shares.sum(0)


def _lay(shares: Singles, part: Part, distance: Singles) -> None:
    """Lays a part over the others, where ``distance`` to its border, in points, is positive."""
    cover = _inside(distance)
    if cover.any():
        shares *= 1 - cover
        shares[part] += cover


def _inside(distance: Singles) -> Singles:
    """How much of a point lies inside a border, from its distance in points, positive inside."""
    found: Singles = np.clip(0.5 + distance, 0, 1)
    return found


def _averaged(shares: Singles) -> Singles:
    """The means of blocks of ``FINER``³ points."""
    for axis in (1, 2, 3):
        size = shares.shape
        shares = shares.reshape(*size[:axis], size[axis] // FINER, FINER, *size[axis + 1 :]).mean(axis + 1)
    return shares


def _finer(axis: Floats) -> Floats:
    """The fine points within each voxel."""
    step = axis[1] - axis[0]
    finer: Floats = (axis[:, None] + step * ((np.arange(FINER) + 0.5) / FINER - 0.5)).ravel()
    return finer


def _slabs(axis: Floats) -> Iterator[Floats]:
    for first in range(0, len(axis), SLAB * FINER):
        yield axis[first : first + SLAB * FINER]


def _ellipsoid(centre: Floats, half: Floats, x: Floats, y: Floats, z: Floats) -> Singles:
    """The distance to a centre in half axes: 1 on the surface."""
    squares = [((axis - c) / h) ** 2 for axis, c, h in zip((x, y, z), centre, half, strict=True)]
    found: Singles = np.sqrt(squares[0][:, None, None] + squares[1][:, None] + squares[2]).astype(np.float32)
    return found
