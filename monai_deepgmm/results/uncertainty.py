"""How sure a segmentation is: an entropy map, and an interval for each tissue's volume.

Two things make a volume uncertain. Voxels near a border could be either tissue; since neighbours err together, they
count as patches rather than one by one. And other priors than the protocol's, as plausible, would have given another
border: restarts with perturbed priors show how far it moves. Together they underestimate what a reader would call
wrong, so that the width is multiplied by a factor that makes 90 % intervals hold the truth of 90 % of the phantom's
volumes (``scripts/calibrate_intervals.py``).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from monai_deepgmm.protocol import Protocol

#: The share of truths that an interval is to hold, and the normal quantile that goes with it.
LEVEL, QUANTILE = 0.9, 1.6449
#: The area over which errors repeat, in mm²: the integral of a correlation that falls to 1/e in 3.7 mm.
PATCH_MM2 = 88.0
#: Standard deviations by which a restart moves each level of the protocol, and the usual radius of the inner border.
LEVEL_PERTURBATION, RADIUS_PERTURBATION = 0.2, 0.04
#: What the estimated standard deviation is multiplied by.
CALIBRATION = 3.2
#: A patient is flagged where a tissue's interval is wider than so many times its volume (or that of 1 ml).
UNSURE, LEAST_ML = 4.0, 1.0

Floats = NDArray[np.floating]


class Interval(NamedTuple):
    """A volume and where it may really lie, in ml.

    Attributes:
        volume_ml: of the label map.
        sd_ml: its standard deviation, before calibration.
        low_ml: the interval's lower end, at least 0.
        high_ml: its upper end, at most the mask's volume.
    """

    volume_ml: float
    sd_ml: float
    low_ml: float
    high_ml: float


def entropy(probabilities: Floats) -> NDArray[np.float32]:
    """The entropy of each voxel over that of a uniform guess ``(K, X, Y, Z)`` → ``(X, Y, Z)``: 0 sure, 1 no idea.

    It is 0 outside the mask, where all probabilities are.
    """
    p = probabilities.clip(1e-12, 1)
    scale = np.log(max(len(probabilities), 2))
    return np.asarray(-(probabilities * np.log(p)).sum(0) / scale, dtype=np.float32)


def perturbed(protocol: Protocol, seed: int, number: int) -> Protocol:
    """A protocol whose levels and whose inner border's usual radius are moved by draws of the seed and the number."""
    generator = torch.Generator().manual_seed((seed * 1_000_003 + number) % (1 << 63))

    def draw() -> float:
        return float(torch.randn((), generator=generator))

    anatomy = protocol.anatomy
    if anatomy is not None:
        mean, sd = anatomy.radius
        mean = min(max(mean + RADIUS_PERTURBATION * draw(), 0.1), 0.9)
        anatomy = dataclasses.replace(anatomy, radius=(mean, sd))
    tissues = tuple(
        dataclasses.replace(t, level={s: v + LEVEL_PERTURBATION * draw() for s, v in t.level.items()})
        for t in protocol.tissues
    )
    return dataclasses.replace(protocol, anatomy=anatomy, tissues=tissues)


def intervals(
    volumes_ml: Sequence[float],
    probabilities: Floats,
    restarts_ml: Sequence[Sequence[float]],
    *,
    voxel_ml: float,
    pixel_mm2: float,
    calibration: float = CALIBRATION,
) -> list[Interval]:
    """An interval for each of K tissues.

    ``σ² = v² (A / a) Σ_x p(x) (1 − p(x)) + mean_r (V_r − V)²`` with v a voxel's volume, a its area in the plane,
    A = ``PATCH_MM2`` and V_r the restarts' volumes; the interval is V ± 1.64 c σ, c the calibration.

    Args:
        volumes_ml: V of each tissue.
        probabilities: p ``(K, X, Y, Z)``.
        restarts_ml: V_r, for each restart K volumes; may be empty.
        voxel_ml: v.
        pixel_mm2: a.
        calibration: c.
    """
    variance = (probabilities * (1.0 - probabilities)).sum((1, 2, 3), dtype=np.float64)
    variance *= voxel_ml**2 * max(PATCH_MM2 / pixel_mm2, 1.0)
    if len(restarts_ml):
        variance += np.square(np.asarray(restarts_ml) - np.asarray(volumes_ml)).mean(0)
    largest = float(probabilities.sum(dtype=np.float64)) * voxel_ml
    found = []
    for volume, sd in zip(volumes_ml, np.sqrt(variance), strict=True):
        reach = QUANTILE * calibration * float(sd)
        found.append(Interval(volume, float(sd), max(volume - reach, 0.0), max(min(volume + reach, largest), volume)))
    return found
