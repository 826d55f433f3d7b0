"""The American Heart Association's 16 segments of the left ventricle, where it is known where the right one inserts.

Cerqueira et al., Circulation 105:539 (2002), without the apex (segment 17), which short-axis slices do not show.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from monai_deepgmm.results.wall import Rays

#: What stands for the segments where no insertion point is given.
UNKNOWN = "not available: no insertion point"
#: Segments of a level, counted counterclockwise as seen from the apex from the anterior insertion of the right
#: ventricle: basal and mid 60° each, of which the anterior one ends there; apical 90°, around the same anterior middle.
SIXTHS = (2, 3, 4, 5, 6, 1)
QUARTERS = (14, 15, 16, 13)


class Segment(NamedTuple):
    """One of 16 segments.

    Attributes:
        number: 1-6 basal, 7-12 mid, 13-16 apical.
        thickness_mm: the mean over its rays; None where none meets the wall.
        percent: the tissue's share of its area; None likewise.
    """

    number: int
    thickness_mm: float | None
    percent: float | None


def segments(rays: Rays, insertion_deg: float) -> list[Segment]:
    """The 16 segments: the slices from base to apex in three levels, as equal in number as can be, and their sectors.

    Args:
        rays: from ``wall.along_rays``.
        insertion_deg: where the right ventricle's wall joins in front, as seen from the middle of the cavity: degrees
            from the patient's left, counterclockwise as seen from the apex, in all slices.

    Raises:
        ValueError: fewer than three slices hold both wall and cavity.
    """
    if len(rays.slices) < 3:
        raise ValueError(f"segments: {len(rays.slices)} slices of the wall, where three levels need at least 3")
    beyond = np.mod(rays.angles - insertion_deg, 360.0)
    found = []
    for level, rows in enumerate(np.array_split(np.arange(len(rays.slices)), 3)):
        if level < 2:
            sector = np.asarray(SIXTHS)[(beyond // 60).astype(int)] + 6 * level
        else:  # the anterior middle is 30° before the insertion
            sector = np.asarray(QUARTERS)[(np.mod(beyond + 30 - 45, 360.0) // 90).astype(int)]
        found += [_segment(rays, rows, int(number), sector == number) for number in np.unique(sector)]
    return found


def _segment(rays: Rays, rows: np.ndarray, number: int, inside: np.ndarray) -> Segment:
    thickness, wall, tissue = (part[rows][:, inside] for part in (rays.thickness_mm, rays.wall_mm2, rays.tissue_mm2))
    if not np.isfinite(thickness).any():
        return Segment(number, None, None)
    return Segment(number, float(np.nanmean(thickness)), 100 * float(tissue.sum() / wall.sum()))
