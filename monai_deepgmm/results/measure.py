"""How much of each tissue there is: millilitres, grams and percent, for the whole heart or brain and slice by slice.

What the numbers mean and where the definitions come from stands in ``bundle/docs/measurements.md``.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from monai_deepgmm.protocol import Protocol, Tissue
from monai_deepgmm.results import uncertainty, wall
from monai_deepgmm.results.segmentation import Segmentation
from monai_deepgmm.results.wall import Rays


class Measurement(NamedTuple):
    """One tissue of one patient: one line of ``measurements.tsv``.

    Attributes:
        patient: the id.
        tissue: its name in the protocol.
        voxels: how many voxels bear its label.
        volume_ml: voxels times the size of a voxel, which comes from the affine.
        mass_g: the volume times the protocol's density; None where it gives none.
        percent: of the protocol's denominator (``percent_of``); None for a tissue that is no part of it, such as
            blood, which is no part of the wall, and None where the denominator is empty. Only what was measured by a
            sequence that shows the tissue counts.
        expected_ml: the probabilities of the tissue, summed over the mask, times the size of a voxel. Where it
            departs from ``volume_ml``, many voxels could as well have been another tissue.
        percent_of: what ``percent`` is a percentage of.
        low_ml: the lower end of the volume's interval; None where the method has none.
        high_ml: its upper end.
    """

    patient: str
    tissue: str
    voxels: int
    volume_ml: float
    mass_g: float | None
    percent: float | None
    expected_ml: float
    percent_of: str
    low_ml: float | None = None
    high_ml: float | None = None


class SliceMeasurement(NamedTuple):
    """One tissue in one slice that holds voxels of the mask.

    Attributes:
        slice: the index along the slice axis, counted from 0.
        tissue: its name in the protocol.
        voxels: how many voxels of the slice bear its label.
        volume_ml: their volume.
        percent: of the denominator in this slice; None as in ``Measurement``.
        position_mm: of the slice's plane along the slices' normal, in scanner coordinates.
        thickness_mean_mm: of the slice's wall, whichever the tissue; None where the slice has no wall or no cavity.
        thickness_min_mm: the least.
        thickness_max_mm: the greatest.
        transmural_25_percent: percentage of the slice's rays on which scar takes more than 25 % of the thickness.
        transmural_50_percent: more than 50 %.
        transmural_75_percent: more than 75 %.
    """

    slice: int
    tissue: str
    voxels: int
    volume_ml: float
    percent: float | None
    position_mm: float
    thickness_mean_mm: float | None = None
    thickness_min_mm: float | None = None
    thickness_max_mm: float | None = None
    transmural_25_percent: float | None = None
    transmural_50_percent: float | None = None
    transmural_75_percent: float | None = None


def measure(segmentation: Segmentation) -> list[Measurement]:
    """Volume, mass and share of each tissue that the present sequences can show, in order of index.

    Returns:
        One measurement per tissue; ``_asdict()`` turns it into a row of ``measurements.tsv``.
    """
    voxel_ml = float(segmentation.reference.voxel_ml)
    protocol = segmentation.protocol
    counts, _ = _counts(segmentation)
    total = counts.sum(0)
    expected = segmentation.probabilities.sum(axis=(1, 2, 3), dtype=np.float64) * voxel_ml
    unknown = uncertainty.Interval(0.0, 0.0, None, None)
    intervals = segmentation.intervals or (unknown,) * len(segmentation.tissues)
    rows = []
    for k, tissue in enumerate(segmentation.tissues):
        voxels = int(total[tissue.index])
        density = tissue.density_g_per_ml
        rows.append(
            Measurement(
                patient=segmentation.patient,
                tissue=tissue.name,
                voxels=voxels,
                volume_ml=tidy(voxels * voxel_ml),
                mass_g=None if density is None else tidy(voxels * voxel_ml * density),
                percent=_percent(voxels, int(_denominators(segmentation, tissue).sum()), tissue.name, protocol),
                expected_ml=tidy(float(expected[k])),
                percent_of=protocol.percent_name,
                low_ml=tidied(intervals[k].low_ml),
                high_ml=tidied(intervals[k].high_ml),
            )
        )
    return rows


def measure_slices(segmentation: Segmentation, rays: Rays | None = None) -> list[SliceMeasurement]:
    """Volume and share of each tissue in each slice that holds voxels of the mask.

    Empty where the protocol takes the volume as one image: its slices mean nothing of their own.

    Args:
        segmentation: what is measured.
        rays: of ``ventricle.rays``; None: their columns stay empty.
    """
    if segmentation.protocol.unit == "volume":
        return []
    voxel_ml, affine = float(segmentation.reference.voxel_ml), segmentation.reference.affine
    protocol = segmentation.protocol
    counts, inside = _counts(segmentation)
    denominators = {t.name: _denominators(segmentation, t) for t in segmentation.tissues}
    rows = []
    for k in map(int, np.flatnonzero(inside)):
        place = tidy(wall.position_mm(k, affine, segmentation.slice_axis))
        around = wall.WallSummary() if rays is None else wall.summary(rays, at=k)
        for tissue in segmentation.tissues:
            voxels = int(counts[k, tissue.index])
            percent = _percent(voxels, int(denominators[tissue.name][k]), tissue.name, protocol)
            ring = map(tidied, around)
            rows.append(SliceMeasurement(k, tissue.name, voxels, tidy(voxels * voxel_ml), percent, place, *ring))
    return rows


def _denominators(segmentation: Segmentation, tissue: Tissue) -> np.ndarray:
    """Voxels per slice of what a tissue is a percentage of (slices,): where a sequence that shows it was measured."""
    shown = [seen for sequence, seen in segmentation.seen.items() if sequence in tissue.seen_in]
    counts, inside = _counts(segmentation, np.logical_or.reduce(shown) if shown else None)
    return _denominator(counts, inside, segmentation.protocol)


def _counts(segmentation: Segmentation, within: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Voxels per slice and label (slices, 256), and mask voxels per slice (slices,), perhaps only within a place."""
    place = segmentation.mask if within is None else segmentation.mask & within
    labels = np.moveaxis(np.where(place, segmentation.labels, 0), segmentation.slice_axis, 0)
    mask = np.moveaxis(place, segmentation.slice_axis, 0)
    counts = np.stack([np.bincount(plane.ravel(), minlength=256) for plane in labels])
    return counts, np.count_nonzero(mask, axis=(1, 2))


def _denominator(counts: np.ndarray, inside: np.ndarray, protocol: Protocol) -> np.ndarray:
    """Voxels per slice of what ``percent`` is a percentage of (slices,)."""
    indices = [t.index for t in protocol.tissues if t.name in protocol.percent_of]
    # A denominator of every tissue is the mask itself, voxels without a label included.
    return inside if len(indices) == len(protocol.tissues) else counts[:, indices].sum(1)


def _percent(voxels: int, denominator: int, tissue: str, protocol: Protocol) -> float | None:
    return tidy(100 * voxels / denominator) if denominator and tissue in protocol.percent_of else None


def tidy(value: float) -> float:
    """The value to ten significant digits: 1.2, not 1.2000000000000002, in a table that people read."""
    return float(f"{value:.10g}")


def tidied(value: float | None) -> float | None:
    """Likewise, where there may be none."""
    return None if value is None else tidy(value)
