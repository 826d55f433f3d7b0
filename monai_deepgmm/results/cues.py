"""What a fit knows of its own errors: how much of each tissue hangs on single decisions, and how plain the images are.

A label map says how much of a tissue is likeliest; these say what it leaves out: the probabilities that lost, the
regions that nearly passed or nearly failed their criteria, how much of the wall is bright, how noisy it is. An interval
rule (``interval_rule``) weighs them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from monai_deepgmm.methods import region_filter
from monai_deepgmm.methods.region_filter import Region
from monai_deepgmm.methods.task import Images
from monai_deepgmm.mixture.fit import likeliest

#: What is added to volumes before they are compared, in ml: of less, nobody would speak.
LEAST_ML = 0.5
#: How far from its threshold a region's score is still in doubt (a logistic curve's scale), and what a region counts
#: that is too small to be accepted.
SCORE_SCALE, SMALL = 0.5, 0.1
#: Voxels that a wall and a cavity must have in a slice to be compared there.
MIN_WALL, MIN_BLOOD = 50, 20

Array = NDArray[np.floating]
Mask = NDArray[np.bool_]


class Cues(NamedTuple):
    """What speaks for and against the volumes of one patient; what cannot be said is left out.

    Attributes:
        of_patient: ``present``, whether late enhancement shows any scar, 1 or 0; ``bright``, the share of the wall that
            it shows as scar; ``level``, ``evidence`` and ``separation``, as it was measured (``Enhancement``); and of
            each sequence ``noise`` (the blood's standard deviation over the wall's), ``uneven`` (the healthy wall's
            likewise) and ``contrast`` (how much brighter blood is than the wall, in the wall's standard deviations).
        of_tissues: tissue → ``expected``, the log of the volume by probabilities over that by labels, ``candidates``,
            the same before regions were refused, and ``doubt_ml``, what hangs on regions near their threshold.
    """

    of_patient: Mapping[str, float]
    of_tissues: Mapping[str, Mapping[str, float]]

    def about(self, tissue: str) -> dict[str, float]:
        """All of one tissue."""
        return {**self.of_patient, **self.of_tissues.get(tissue, {})}


def of_tissues(
    names: Sequence[str],
    volumes_ml: Sequence[float],
    expected_ml: Sequence[float],
    candidates_ml: Sequence[float],
    doubts_ml: Mapping[str, float],
) -> dict[str, dict[str, float]]:
    """The cues of each tissue.

    Args:
        names: of the tissues.
        volumes_ml: of the labels.
        expected_ml: the probabilities' sums.
        candidates_ml: those before regions were refused.
        doubts_ml: from ``doubts_ml``.
    """
    found = {}
    for name, volume, expected, candidates in zip(names, volumes_ml, expected_ml, candidates_ml, strict=True):
        own = {"expected": _log_ratio(expected, volume), "candidates": _log_ratio(candidates, volume)}
        found[name] = own | ({"doubt_ml": doubts_ml[name]} if name in doubts_ml else {})
    return found


def _log_ratio(one_ml: float, other_ml: float) -> float:
    return math.log((one_ml + LEAST_ML) / (other_ml + LEAST_ML))


def doubts_ml(regions: Sequence[Region], images: Images, *, voxel_ml: float) -> dict[str, float]:
    """How much of each tissue hangs on regions near their threshold: ``sqrt(Σ π (1 − π) V²)``, in ml.

    ``π = 1 / (1 + exp(−(score − threshold) / s))``, less for a region that is too small or of a tissue that the patient
    has not; one that was refused since there is no scar counts as one at its threshold. The regions of a tissue are
    taken to be independent. Tissues without criteria have none.
    """
    protocol, late = images.protocol, images.enhancement
    shown = None if protocol.anatomy is None else protocol.anatomy.enhancement
    absent = shown.tissue if shown is not None and late is not None and not late.present else None
    variances = {t.name: 0.0 for t in protocol.tissues if t.criteria is not None}
    for region in regions:
        criteria = protocol.tissue(region.tissue).criteria
        if criteria is None:
            continue
        distance = (region_filter.score(region, criteria) - criteria.score) / SCORE_SCALE
        share = 1 / (1 + math.exp(-min(max(distance, -30.0), 30.0)))
        share = share if region.accepted else min(share, 0.5)
        share *= SMALL if region.size < criteria.size or region.tissue == absent else 1
        variances[region.tissue] += share * (1 - share) * (region.voxels * voxel_ml) ** 2
    return {name: math.sqrt(value) for name, value in variances.items()}


def of_patient(images: Images, resp: Tensor) -> dict[str, float]:
    """The cues that all tissues share.

    Args:
        images: with the wall's borders; without, nothing is said.
        resp: of the fit ``(B, K, H, W)``.
    """
    ring, late = images.ring, images.enhancement
    healthy = next((k for k, t in enumerate(images.tissues) if t.criteria is None and t.level), None)
    if ring is None or healthy is None:
        return {}
    mask, cavity = (m[:, 0].cpu().numpy() > 0 for m in (images.mask, ring.inside))
    wall, cavity, labels = mask & ~cavity, mask & cavity, likeliest(resp).cpu().numpy()
    found: dict[str, float] = {}
    if late is not None and wall.any():
        found |= {"present": float(late.present), "bright": float((late.fraction[wall] > 0.5).mean())}
        found |= {"level": late.level, "evidence": late.found, "separation": late.separation}
    for sequence, image in zip(images.sequences, images.image.cpu().numpy().swapaxes(0, 1), strict=True):
        told = _of_sequence(image, wall, cavity, (labels == healthy) & wall)
        found |= {f"{name}_{sequence}": value for name, value in told.items()}
    return {name: value for name, value in found.items() if math.isfinite(value)}


def _of_sequence(image: Array, wall: Mask, cavity: Mask, healthy: Mask) -> dict[str, float]:
    """Noise, unevenness and contrast of one sequence, all ``(B, H, W)``."""
    levels, spreads, noises, even = [], [], [], []
    for values, around, within, rest in zip(image, wall, cavity, healthy, strict=True):
        of_wall, of_blood = values[around], values[within]
        if len(of_wall) < MIN_WALL or len(of_blood) < MIN_BLOOD or (spread := float(of_wall.std())) == 0:
            continue
        middle = float(np.median(of_wall))
        spreads.append(spread)
        levels.append(float(of_blood.mean()) - middle)
        noises.append(float(of_blood.std()) / spread)
        even.append((values[rest] - middle) / spread)
    if not spreads:
        return {}
    flat = np.concatenate(even)
    return {
        "noise": float(np.mean(noises)),
        "contrast": float(np.mean(levels) / np.mean(spreads)),
        **({"uneven": float(flat.std())} if len(flat) else {}),
    }
