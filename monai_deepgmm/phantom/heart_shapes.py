"""Where things are in a synthetic short-axis slice: contours around the left ventricle, and what lies between them.

Two maps come from one set of contours. ``looks`` says what a voxel looks like, ``labels`` what a reader writes down:
papillary muscles look like myocardium and are labelled blood, slow flow along the wall may be labelled edema, and the
reader's border of an infarct is not quite where the image has it.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

#: Contours are sampled at this many angles (half a degree: 0.35 mm at a radius of 40 mm, less than half a voxel).
N_ANGLES = 720
ANGLES: Floats = np.linspace(0.0, 2 * np.pi, N_ANGLES, endpoint=False, dtype=np.float64)

#: The values of the MyoPS label files.
BLOOD, MYOCARDIUM, EDEMA, SCAR, RIGHT_VENTRICLE = 500, 200, 1220, 2221, 600


class Look(IntEnum):
    """What a voxel looks like; ``REST`` is everything but the two ventricles."""

    BLOOD = 0
    MYOCARDIUM = 1
    EDEMA = 2
    SCAR = 3
    SLOW_FLOW = 4
    RIM = 5
    TRABECULA = 6
    GREY_ZONE = 7
    NO_REFLOW = 8
    RIGHT_VENTRICLE = 9
    REST = 10


@dataclass(frozen=True)
class Infarct:
    """Where in the wall scar and edema lie; depths are relative: 0 at the endocardium, 1 at the epicardium.

    Attributes:
        scar: inner and outer depth per angle, ``(2, N_ANGLES)``; no scar where the outer one is not the larger.
        edema: the same for edema, where there is no scar.
        grey: the same for the partly injured wall around both, which counts as myocardium.
        core: the same for the dark no-reflow core inside the scar.
    """

    scar: Floats
    edema: Floats
    grey: Floats
    core: Floats


@dataclass(frozen=True)
class Slice:
    """The contours of one slice, in mm around the centre of the left ventricle.

    Attributes:
        outer_mm: epicardium, ``(N_ANGLES,)``.
        inner_mm: endocardium as a reader draws it, outside of papillary muscles and trabeculae.
        trabecula_mm: how far trabeculae reach into the cavity.
        slow_mm: thickness of the slowly flowing blood along the wall.
        rim_mm: thickness of the layer inside the cavity that the reader calls edema.
        papillary_mm: centre x, centre y and radius of each papillary muscle, ``(n, 3)``.
        right_mm: the right ventricle's ellipse: centre x, centre y, two half axes; its rotation in radians.
        infarct: as it looks.
        reading: as the reader draws it.
    """

    outer_mm: Floats
    inner_mm: Floats
    trabecula_mm: Floats
    slow_mm: Floats
    rim_mm: Floats
    papillary_mm: Floats
    right_mm: tuple[float, float, float, float, float]
    infarct: Infarct
    reading: Infarct


def looks(shape: Slice, x_mm: Floats, y_mm: Floats) -> NDArray[np.int64]:
    """What the image shows at each point, as ``Look``.

    Args:
        shape: the contours.
        x_mm: first coordinate around the centre of the left ventricle, ``(H, W)``.
        y_mm: second coordinate, ``(H, W)``.
    """
    radius, angle = _polar(x_mm, y_mm)
    inner, outer = shape.inner_mm[angle], shape.outer_mm[angle]
    depth = (radius - inner) / (outer - inner)
    result = np.full(x_mm.shape, int(Look.REST))
    result[_in_right_ventricle(shape, x_mm, y_mm)] = Look.RIGHT_VENTRICLE
    wall, cavity = (radius >= inner) & (radius < outer), radius < inner
    result[wall] = Look.MYOCARDIUM
    infarct = shape.infarct
    layers = (infarct.grey, infarct.edema, infarct.scar, infarct.core)
    for look, borders in zip((Look.GREY_ZONE, Look.EDEMA, Look.SCAR, Look.NO_REFLOW), layers, strict=True):
        result[wall & _between(borders, depth, angle)] = look
    result[cavity] = Look.BLOOD
    inside_mm = inner - radius
    result[cavity & (inside_mm < shape.slow_mm[angle])] = Look.SLOW_FLOW
    muscle = inside_mm < shape.trabecula_mm[angle]
    for x, y, size in shape.papillary_mm:
        muscle |= (x_mm - x) ** 2 + (y_mm - y) ** 2 < size**2
    result[cavity & muscle] = Look.TRABECULA
    result[cavity & (inside_mm < shape.rim_mm[angle])] = Look.RIM
    return result


def labels(shape: Slice, x_mm: Floats, y_mm: Floats) -> NDArray[np.int16]:
    """What the reader writes down at each point: MyoPS values, 0 outside the ventricles; arguments as ``looks``."""
    radius, angle = _polar(x_mm, y_mm)
    inner, outer = shape.inner_mm[angle], shape.outer_mm[angle]
    depth = (radius - inner) / (outer - inner)
    result = np.zeros(x_mm.shape, np.int16)
    result[_in_right_ventricle(shape, x_mm, y_mm)] = RIGHT_VENTRICLE
    result[radius < outer] = MYOCARDIUM
    result[(radius < outer) & _between(shape.reading.edema, depth, angle)] = EDEMA
    result[radius < inner] = EDEMA
    result[radius < inner - shape.rim_mm[angle]] = BLOOD
    result[(radius < outer) & _between(shape.reading.scar, depth, angle)] = SCAR
    return result


def draw(rng: np.random.Generator, presence: list[tuple[bool, bool]]) -> list[Slice]:
    """One patient's slices from apex to base.

    Args:
        rng: where chance comes from.
        presence: for each slice, whether it holds edema and whether it holds scar.
    """
    heart = _Heart(
        radius_mm=float(rng.normal(36.0, 3.6)),
        wall_mm=float(np.clip(rng.normal(11.5, 1.8), 8.6, 15.5)),
        septum=float(rng.uniform(np.pi - 0.6, np.pi + 0.6)),
        infarct=float(rng.uniform(0, 2 * np.pi)),
        scar_width=float(rng.uniform(0.65, 1.8)),
        scar_depth=float(rng.uniform(0.65, 1.15)),
        edema_width=float(rng.uniform(0.05, 0.55)),
        edema_depth=float(rng.uniform(0.45, 1.25)),
        core=bool(rng.random() < 0.3),
        rim_mm=float(rng.uniform(0.0, 4.5)),
        outline=wave(rng, 2, 4),
    )
    heights = np.linspace(0, 1, len(presence))
    return [_slice(rng, heart, h, edema=e, scar=s) for h, (e, s) in zip(heights, presence, strict=True)]


@dataclass(frozen=True)
class _Heart:
    """What the slices of one patient share; angles and widths in radians, depths relative to the wall."""

    radius_mm: float
    wall_mm: float
    septum: float
    infarct: float
    scar_width: float
    scar_depth: float
    edema_width: float
    edema_depth: float
    core: bool
    rim_mm: float
    outline: Floats


def _slice(rng: np.random.Generator, heart: _Heart, height: float, *, edema: bool, scar: bool) -> Slice:
    """One slice; ``height`` is 0 at the apical and 1 at the basal end."""
    taper = 0.74 + 0.26 * np.sqrt(height)
    outer = heart.radius_mm * taper * (1 + 0.025 * heart.outline + 0.012 * wave(rng, 2, 5))
    wall = heart.wall_mm * (1.03 - 0.08 * height) * (1 + 0.08 * wave(rng, 1, 4))
    inner = outer - np.clip(wall, 6.0, 0.72 * outer)
    infarct, reading = _infarct(rng, heart, edema=edema, scar=scar)
    towards = heart.septum + rng.normal(0, 0.1)
    size = heart.radius_mm * (0.45 + 0.5 * np.sqrt(height))
    reach = heart.radius_mm * taper * 1.02
    right = (reach * np.cos(towards), reach * np.sin(towards), 0.85 * size, 1.15 * size, towards)
    return Slice(
        outer_mm=outer,
        inner_mm=inner,
        trabecula_mm=np.maximum(0.0, 0.6 + 1.0 * wave(rng, 1, 4) + 1.7 * wave(rng, 8, 26)),
        slow_mm=np.maximum(0.0, 3.8 + 3.2 * wave(rng, 1, 5) + 1.2 * wave(rng, 6, 16)),
        rim_mm=_rim(rng, heart) if edema else np.zeros(N_ANGLES),
        papillary_mm=_papillary(rng, inner, height),
        right_mm=right,
        infarct=infarct,
        reading=reading,
    )


def _infarct(rng: np.random.Generator, heart: _Heart, *, edema: bool, scar: bool) -> tuple[Infarct, Infarct]:
    """An infarct as it looks, and as the reader draws it."""
    centre = heart.infarct + rng.normal(0, 0.2)
    half = heart.scar_width * rng.uniform(0.75, 1.15)
    bump = wedge(centre, half)
    scar_out = np.where(bump > 0, heart.scar_depth * np.sqrt(np.maximum(bump, 0)) + 0.07 * wave(rng, 2, 9), -1.0)
    scar_in = np.maximum(0.0, 0.08 + 0.10 * wave(rng, 2, 9))
    wings = wedge(centre + rng.normal(0, 0.35), half + heart.edema_width * rng.uniform(0.5, 1.5))
    edema_out = np.where(wings > 0, heart.edema_depth * np.maximum(wings, 0) ** 0.4 + 0.10 * wave(rng, 2, 9), -1.0)
    edema_in = np.maximum(0.0, 0.02 + 0.12 * wave(rng, 2, 7))
    around = wedge(centre + rng.normal(0, 0.3), half + heart.edema_width + rng.uniform(0.2, 0.9))
    grey_out = np.where(around > 0, 1.3 * np.maximum(around, 0) ** 0.4 + 0.2 * wave(rng, 2, 9), -1.0)
    never = np.full(N_ANGLES, -1.0)
    core_out = scar_out - 0.22 if heart.core else never
    core_in = np.maximum(scar_in, 0.12)
    seen = Infarct(
        scar=np.stack([scar_in, scar_out if scar else never]),
        edema=np.stack([edema_in, edema_out if edema else never]),
        grey=np.stack([np.zeros(N_ANGLES), grey_out if edema or scar else never]),
        core=np.stack([core_in, core_out if scar else never]),
    )
    return seen, Infarct(scar=_redrawn(rng, seen.scar), edema=_redrawn(rng, seen.edema), grey=seen.grey, core=seen.core)


def _redrawn(rng: np.random.Generator, borders: Floats) -> Floats:
    """The same borders by another hand: turned a little, and a little deeper or shallower."""
    turned = np.roll(borders, int(rng.normal(0, 14.0)), axis=1)
    wobble = np.stack([0.04 * wave(rng, 1, 8), 0.07 * wave(rng, 1, 8)])
    return np.where(turned < 0, turned, np.maximum(turned + wobble, 0))


def _rim(rng: np.random.Generator, heart: _Heart) -> Floats:
    """A layer of slow flow near the infarct that the reader takes for edema, in mm."""
    near = wedge(heart.infarct + rng.normal(0, 0.4), heart.scar_width * 1.2)
    return np.where(near > 0, np.maximum(0.0, heart.rim_mm * near + 1.0 * wave(rng, 3, 12)), 0.0)


def _papillary(rng: np.random.Generator, inner_mm: Floats, height: float) -> Floats:
    """The two papillary muscles, absent near the base; ``(n, 3)``: centre x, centre y, radius in mm."""
    if height > 0.85:
        return np.zeros((0, 3))
    angles = np.array([-0.9, 0.9]) + rng.normal(0, 0.25, 2)
    size = rng.uniform(2.5, 4.5, 2) * min(1.0, float(inner_mm.mean()) / 20)
    at = inner_mm[(angles / (2 * np.pi) * N_ANGLES).astype(int) % N_ANGLES] - size - rng.uniform(0, 3, 2)
    return np.stack([at * np.cos(angles), at * np.sin(angles), size], axis=1)


def wave(rng: np.random.Generator, first: int, last: int) -> Floats:
    """A random closed curve with unit variance over the orders ``first`` to ``last``, ``(N_ANGLES,)``."""
    orders = np.arange(first, last + 1)
    phase = rng.uniform(0, 2 * np.pi, orders.size)
    size = rng.rayleigh(1.0, orders.size)
    curve: Floats = (size[:, None] * np.cos(orders[:, None] * ANGLES + phase[:, None])).sum(0)
    curve /= np.sqrt(orders.size)
    return curve


def wedge(centre: float, half_width: float) -> Floats:
    """1 at the angle ``centre``, 0 at ``half_width`` (radians) from it, negative beyond, ``(N_ANGLES,)``."""
    away = np.abs((ANGLES - centre + np.pi) % (2 * np.pi) - np.pi)
    return 1 - (away / half_width) ** 4


def _polar(x_mm: Floats, y_mm: Floats) -> tuple[Floats, NDArray[np.int64]]:
    angle = (np.arctan2(y_mm, x_mm) % (2 * np.pi) * (N_ANGLES / (2 * np.pi))).astype(np.int64) % N_ANGLES
    return np.hypot(x_mm, y_mm), angle


def _between(borders: Floats, depth: Floats, angle: NDArray[np.int64]) -> NDArray[np.bool_]:
    within: NDArray[np.bool_] = (depth >= borders[0][angle]) & (depth < borders[1][angle])
    return within


def _in_right_ventricle(shape: Slice, x_mm: Floats, y_mm: Floats) -> NDArray[np.bool_]:
    x0, y0, a, b, turn = shape.right_mm
    u = (x_mm - x0) * np.cos(turn) + (y_mm - y0) * np.sin(turn)
    v = (y_mm - y0) * np.cos(turn) - (x_mm - x0) * np.sin(turn)
    inside: NDArray[np.bool_] = (u / a) ** 2 + (v / b) ** 2 < 1
    return inside
