"""Whether a tissue is there at all: a mixture always finds all its parts, a patient need not have them.

Each connected region of a tissue that may be absent is weighed by what a reader looks for: is it more than a rim or a
speck, is it also there in the neighbouring slices, is it clearly brighter than the healthy wall. A tissue that late
enhancement does not show in the patient at all has no accepted region, and one that comes with it needs more evidence.
What is not accepted goes to the next probable tissue. What was seen and decided is kept, for the sidecar.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.ndimage import distance_transform_edt, find_objects, gaussian_filter1d, label
from torch import Tensor

from monai_deepgmm.methods.enhancement import Enhancement
from monai_deepgmm.methods.polar import ANGLES
from monai_deepgmm.methods.task import Images
from monai_deepgmm.mixture.fit import likeliest
from monai_deepgmm.protocol import RegionCriteria

#: What the neighbouring slices are taken to hold where there are none.
UNKNOWN_SUPPORT = 0.2
#: Angles over which a slice's share of a tissue is smoothed (standard deviation).
ANGULAR_SD = 2.0
#: Voxels of healthy wall needed to say what is brighter than it.
MIN_HEALTHY = 20


class Region(NamedTuple):
    """A connected region of a tissue, and what speaks for it.

    Attributes:
        tissue: its name.
        image: the index of the image that it lies in.
        voxels: how many.
        size: the diameter of the largest disc within it, in mm.
        support: the tissue's share at the same angles in the neighbouring slices, 0 to 1.
        contrast: how much brighter it is than the healthy wall, in that one's standard deviations.
        evidence: its mean local log-likelihood ratio on late enhancement; 0 where that tells nothing of the tissue.
        accepted: the decision.
    """

    tissue: str
    image: int
    voxels: int
    size: float
    support: float
    contrast: float
    evidence: float
    accepted: bool


class _Seen(NamedTuple):
    """What the regions of a tissue in one image are weighed by.

    Attributes:
        tissue: its name.
        image: the index of the image.
        values: of the sequence that shows the tissue ``(H, W)``.
        angle: the index of each voxel's angle ``(H, W)``.
        near: the tissue's share in the neighbouring slices ``(ANGLES,)``; None: there are none.
        healthy: mean and standard deviation of the healthy wall, if known.
        shown: what late enhancement shows of the tissue, if anything.
    """

    tissue: str
    image: int
    values: NDArray[np.floating]
    angle: NDArray[np.int64]
    near: NDArray[np.float64] | None
    healthy: tuple[float, float] | None
    shown: Enhancement | None

    def region(self, box: tuple[slice, ...], where: NDArray[np.bool_], size: float) -> Region:
        """A region of a size within a box of the image, not yet accepted."""
        return Region(
            tissue=self.tissue,
            image=self.image,
            voxels=int(np.count_nonzero(where)),
            size=size,
            support=_support(where, self.angle[box], self.near),
            contrast=_contrast(self.values[box][where], self.healthy),
            evidence=0.0 if self.shown is None else _shown(self.shown, (self.image, *box), where),
            accepted=False,
        )


def decide(resp: Tensor, images: Images, *, told: bool = True) -> tuple[Tensor, list[Region]]:
    """Takes from each tissue the regions that do not meet its criteria.

    Tissues are decided from the last to the first, and a region that is not accepted goes to those still to be decided
    or always there: what scar loses can still be edema, what edema loses is healthy wall. The healthy wall is the
    first tissue with a level that needs no criteria.

    Args:
        resp: responsibilities ``(B, K, H, W)``, sum 1 inside the mask.
        images: with the wall's borders.
        told: whether every region is described; else only those are that could be accepted.

    Returns:
        Responsibilities with 0 where a tissue is not accepted, which sum to 1 again, and the regions.
    """
    ring, tissues, sequences, slices = images.border(), images.tissues, images.sequences, images.slices
    mask, found = images.mask[:, 0].cpu().numpy() > 0, resp.detach().cpu().numpy().copy()
    wall = mask & (ring.inside[:, 0].cpu().numpy() == 0)
    healthy = next((k for k, t in enumerate(tissues) if t.criteria is None and t.level), None)
    regions: list[Region] = []
    late = images.enhanced()
    for k in reversed(range(len(tissues))):
        criteria = tissues[k].criteria
        if criteria is None or healthy is None or criteria.sequence not in sequences:
            continue
        criteria = criteria.among(enhanced=late is None or late.present)
        gone = [j for j, t in enumerate(tissues) if j >= k and t.criteria is not None]
        likely = likeliest(torch.from_numpy(found)).numpy()
        shares = [_by_angle(f == k, w, a) for f, w, a in zip(likely, wall, ring.angle, strict=True)]
        values = images.image[:, sequences.index(criteria.sequence)].cpu().numpy()
        shown = late if _shines(images, tissues[k].name) else None
        there = shown is None or shown.present
        for i, (labels, around) in enumerate(zip(likely, wall, strict=True)):
            beside = [shares[j] for j, at in enumerate(slices) if abs(at - slices[i]) == 1] if slices else []
            near = np.mean(beside, axis=0) if beside else None
            parts, _ = label((labels == k) & around)
            healthy_wall = _healthy(values[i][(labels == healthy) & around])
            seen = _Seen(tissues[k].name, i, values[i], ring.angle[i], near, healthy_wall, shown)
            for part, box in enumerate(find_objects(parts), 1):
                where, stands = parts[box] == part, False
                size = _diameter(where, images.spacing_mm)
                if told or (there and size >= criteria.size):
                    region = seen.region(box, where, size)
                    stands = there and accepted(region, criteria)
                    regions.append(region._replace(accepted=stands))
                if not stands:
                    for j in gone:
                        found[(i, j, *box)][where] = 0
    total = found.sum(1)
    # Where nothing else was possible, the healthy wall is.
    if healthy is not None:
        found[:, healthy][(total <= 0) & mask] = 1
    found /= np.where(total > 0, total, 1)[:, None]
    return torch.from_numpy(found).to(resp.device), regions


def accepted(region: Region, criteria: RegionCriteria) -> bool:
    """Whether a region meets a tissue's criteria."""
    return region.size >= criteria.size and score(region, criteria) >= criteria.score


def score(region: Region, criteria: RegionCriteria) -> float:
    """The weighted sum of what speaks for a region."""
    return sum(weight * float(getattr(region, name)) for name, weight in criteria.weights.items())


def _shines(images: Images, tissue: str) -> bool:
    """Whether a tissue is the one that late enhancement shows."""
    late = images.anatomy().enhancement
    return late is not None and late.tissue == tissue


def _shown(enhancement: Enhancement, box: tuple[int | slice, ...], where: NDArray[np.bool_]) -> float:
    """The mean evidence of what shines of a region in a box: a dark core says nothing of what encloses it."""
    bright = where & (enhancement.fraction[box] > 0.5)
    return float(enhancement.evidence[box][bright if bright.any() else where].mean())


def _diameter(where: NDArray[np.bool_], spacing_mm: tuple[float, ...]) -> float:
    """The diameter of the largest disc within a region ``(H, W)``, in mm.

    Distances are from centre to centre of voxels, the nearest outside being half a voxel beyond the border.
    """
    least, room = min(spacing_mm), np.zeros((where.shape[0] + 2, where.shape[1] + 2), dtype=bool)
    room[1:-1, 1:-1] = where
    if max(spacing_mm) == least:  # most regions are thin: what is nearest is beside a voxel, or across its corner
        deep = where & room[:-2, 1:-1] & room[2:, 1:-1] & room[1:-1, :-2] & room[1:-1, 2:]
        if not deep.any():
            return least
        if not (deep & room[:-2, :-2] & room[2:, :-2] & room[:-2, 2:] & room[2:, 2:]).any():
            return (2 * math.sqrt(2) - 1) * least
    depth = float(distance_transform_edt(room, sampling=spacing_mm).max())
    return 2 * depth - least


def _by_angle(tissue: NDArray[np.bool_], wall: NDArray[np.bool_], angle: NDArray[np.int64]) -> NDArray[np.float64]:
    """The share of the wall that a tissue takes at each angle ``(ANGLES,)``, smoothed around the circle."""
    counts = [
        gaussian_filter1d(np.bincount(angle[where], minlength=ANGLES).astype(float), ANGULAR_SD, mode="wrap")
        for where in (tissue & wall, wall)
    ]
    share: NDArray[np.float64] = counts[0] / np.maximum(counts[1], 1e-9)
    return share


def _support(where: NDArray[np.bool_], angle: NDArray[np.int64], near: NDArray[np.float64] | None) -> float:
    """The mean share ``(ANGLES,)`` of the tissue in the neighbouring slices, at the angles where the region lies."""
    return UNKNOWN_SUPPORT if near is None else float(near[angle[where]].mean())


def _healthy(values: NDArray[np.floating]) -> tuple[float, float] | None:
    """Mean and standard deviation of the healthy wall; None where there is too little of it, or it has one value."""
    if len(values) < MIN_HEALTHY or (deviation := float(values.std())) == 0:
        return None
    return float(values.mean()), deviation


def _contrast(region: NDArray[np.floating], healthy: tuple[float, float] | None) -> float:
    """How much brighter a region is than the healthy wall, in standard deviations of the latter."""
    return float("inf") if healthy is None else (float(region.mean()) - healthy[0]) / healthy[1]
