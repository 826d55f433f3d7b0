"""How sure a segmentation is: an entropy map, and an interval for each tissue's volume.

Three things make a volume uncertain. Voxels near a border could be either tissue; since neighbours err together, they
count as patches rather than one by one. Other priors than the protocol's, as plausible, would have given another
border: refits with perturbed priors show how far it moves. And every method has errors that it does not know of, which
grow with the volume. What an interval reaches below and above the volume, in standard deviations of these three, was
measured for each method and tissue on phantoms (``scripts/calibrate_intervals.py``) and stands in
``interval_calibration.yaml``. A method or a protocol that is not in that table has no intervals.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Sequence
from importlib import resources
from typing import NamedTuple

import numpy as np
import torch
import yaml
from numpy.typing import NDArray

from monai_deepgmm.protocol import Protocol
from monai_deepgmm.results import interval_rule
from monai_deepgmm.results.cues import Cues

#: The share of reference volumes that an interval is to hold.
LEVEL = 0.9
#: The area over which errors repeat, in mm²: the integral of a correlation that falls to 1/e in 3.7 mm.
PATCH_MM2 = 88.0
#: The error that a method does not know of: a share of the volume, and at least so many ml.
UNKNOWN_SHARE, UNKNOWN_ML = 0.05, 0.5
#: Standard deviations by which a refit moves each level of the protocol, and the usual radius of the inner border.
LEVEL_PERTURBATION, RADIUS_PERTURBATION = 0.2, 0.04
#: A patient is flagged where a tissue's interval is wider than so many times its volume, or, where that is smaller,
#: this share of the mask's.
UNSURE, LEAST_SHARE = 8.0, 0.03

Floats = NDArray[np.floating]


class Interval(NamedTuple):
    """A volume and where it may really lie, in ml.

    Attributes:
        volume_ml: of the label map.
        sd_ml: its standard deviation, before calibration.
        low_ml: the interval's lower end, at least 0; None where the method has none.
        high_ml: its upper end, at most the mask's volume; None where the method has none.
    """

    volume_ml: float
    sd_ml: float
    low_ml: float | None
    high_ml: float | None


def entropy(probabilities: Floats) -> NDArray[np.float32]:
    """The entropy of each voxel over that of a uniform guess ``(K, X, Y, Z)`` → ``(X, Y, Z)``: 0 sure, 1 no idea.

    It is 0 outside the mask, where all probabilities are.
    """
    out = np.zeros(probabilities.shape[1:], dtype=np.float32)
    for p in probabilities:  # one by one, as those of a head are large
        out -= p * np.log(p.clip(1e-12, 1))
    out /= np.log(max(len(probabilities), 2))
    return out


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


def reach(protocol: str, method: str, tissue: str) -> tuple[float, float] | None:
    """How far a tissue's interval reaches from its volume, in standard deviations; None: it was never measured."""
    found = _calibration().get(protocol, {}).get(method, {}).get(tissue)
    return None if found is None else (float(found[0]), float(found[1]))


@functools.cache
def _calibration() -> dict[str, dict[str, dict[str, list[float]]]]:
    text = (resources.files("monai_deepgmm.results") / "interval_calibration.yaml").read_text(encoding="utf-8")
    return yaml.safe_load(text) or {}


def standard_deviations(
    volumes_ml: Sequence[float],
    probabilities: Floats,
    refits_ml: Sequence[Sequence[float]],
    *,
    voxel_ml: float,
    pixel_mm2: float,
) -> list[float]:
    """The standard deviation of each of K volumes, in ml, before calibration.

    ``σ² = v² (A / a) Σ_x p(x) (1 − p(x)) + mean_r (V_r − V)² + (s V)² + u²`` with v a voxel's volume, a its area in the
    plane, A = ``PATCH_MM2``, V_r the refits' volumes, s and u the method's unknown errors.

    Args:
        volumes_ml: V of each tissue.
        probabilities: p ``(K, X, Y, Z)``.
        refits_ml: V_r, for each refit K volumes; may be empty.
        voxel_ml: v.
        pixel_mm2: a.
    """
    variance = np.array([(p * (1.0 - p)).sum(dtype=np.float64) for p in probabilities])
    variance *= voxel_ml**2 * max(PATCH_MM2 / pixel_mm2, 1.0)
    if len(refits_ml):
        variance += np.square(np.asarray(refits_ml) - np.asarray(volumes_ml)).mean(0)
    variance += np.square(UNKNOWN_SHARE * np.asarray(volumes_ml)) + UNKNOWN_ML**2
    return [math.sqrt(value) for value in variance]


def interval(volume_ml: float, sd_ml: float, reaches: tuple[float, float] | None, *, mask_ml: float) -> Interval:
    """Where a volume may lie: ``V + r_low σ`` to ``V + r_high σ``, with V itself, within 0 and the mask.

    Args:
        volume_ml: V.
        sd_ml: σ.
        reaches: from ``reach``.
        mask_ml: the largest that the volume can be.
    """
    if reaches is None:
        return Interval(volume_ml, sd_ml, None, None)
    low, high = (volume_ml + r * sd_ml for r in reaches)
    return Interval(volume_ml, sd_ml, *held(volume_ml, low, high, mask_ml=mask_ml))


def intervals(
    names: Sequence[str],
    volumes_ml: Sequence[float],
    deviations_ml: Sequence[float],
    cues: Cues | None,
    *,
    of: tuple[str, str],
    sequences: Sequence[str],
) -> list[Interval]:
    """The interval of each tissue: by its rule where there is one, or by its standard deviation.

    Args:
        names: of the tissues.
        volumes_ml: V of each.
        deviations_ml: σ of each.
        cues: what the rules weigh; None: nothing is known.
        of: the protocol and the method.
        sequences: that the patient has.
    """
    rules = {} if cues is None else interval_rule.rules(*of, sequences)
    found = []
    for name, volume, deviation in zip(names, volumes_ml, deviations_ml, strict=True):
        if cues is None or name not in rules:
            found.append(interval(volume, deviation, reach(*of, name), mask_ml=sum(volumes_ml)))
            continue
        low, high = rules[name].ends_ml(name, volume, cues)
        found.append(Interval(volume, deviation, *held(volume, low, high, mask_ml=sum(volumes_ml))))
    return found


def held(volume_ml: float, low_ml: float, high_ml: float, *, mask_ml: float) -> tuple[float, float]:
    """The ends of an interval that holds the volume itself and lies within 0 and the mask."""
    return max(min(low_ml, volume_ml), 0.0), max(min(high_ml, mask_ml), volume_ml)


def unsure(found: Sequence[Interval]) -> list[bool]:
    """Which of the intervals of all tissues are so wide that a patient is flagged.

    That of a tissue that was not found is as wide for one patient as for another, and tells nothing of this one.
    """
    least = LEAST_SHARE * sum(one.volume_ml for one in found)
    return [
        one.volume_ml > 0
        and one.low_ml is not None
        and one.high_ml is not None
        and one.high_ml - one.low_ml > UNSURE * max(one.volume_ml, least)
        for one in found
    ]
