"""How far each slice of a sequence lies beside the reference's, in its plane: patients breathe between sequences.

Edges around the organ are compared with those of the reference, and with the organ's outline as the mask has it. From
where that puts a patient's slices is counted what lies on what, and each slice compared with what the others show. A
slice that would not gain by a margin stays where it is, and so does a sequence.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import gaussian_filter

from monai_deepgmm.registration import cooccurrence, edges, slice_pair
from monai_deepgmm.registration.slice_pair import GRID_MM, SlicePair

Array = NDArray[np.floating[Any]]
Bools = NDArray[np.bool_]

#: How far shifts go, in mm, and in voxels of the grid.
REACH_MM = 12.0
REACH = round(REACH_MM / GRID_MM)
#: Where edges count: the mask and so much around it; and so much outside and inside of its outline, in mm.
AROUND_MM, OUTSIDE_MM, INSIDE_MM = 10.0, 4.0, 2.0
#: Where it counts what lies on what: the mask and so much around it, in mm; its weight beside edges; how often slices
#: are put where they agree best, and counted again.
FAR_MM, WEIGHT, ROUNDS = 40.0, 1.2, 2
#: So far around a shift agreement is averaged (standard deviation, in mm): places of organs that move are not sharper.
AVERAGED_MM = 1.0
#: A slice is moved if its agreement gains so much; or if its sequence gains so much in all slices together and the
#: slice itself so much.
SLICE_GAIN, SEQUENCE_GAIN, LEAST_GAIN = 0.18, 0.095, 0.01


class Shift(NamedTuple):
    """How a slice lies beside the reference's.

    Attributes:
        mm: what has to be added to a place in the reference's slice to come to the same place in this one, along the
            two axes of the plane.
        before: how well the slices agree without it: with the reference's edges (0 to 1), with the outline (0 to 1),
            and by what lies on what (nats a voxel, weighted).
        after: how well with it.
    """

    mm: tuple[float, float]
    before: float
    after: float

    @property
    def gain(self) -> float:
        """What the shift brings."""
        return self.after - self.before


def shifts(fixed: Array, moving: Array, mask: Bools, spacing_mm: Sequence[float]) -> dict[int, Shift]:
    """The shift of each slice of a sequence.

    Args:
        fixed: the reference ``(X, Y, Z)``, slices along the last axis.
        moving: the sequence, on the same grid.
        mask: of the organ, as it lies in the reference.
        spacing_mm: of X and Y.

    Returns:
        Slice → shift, for the slices that hold the mask and show something.
    """
    step, beyond = np.asarray(spacing_mm, float), FAR_MM + REACH_MM
    held = np.flatnonzero(mask.any((0, 1))).tolist()
    pairs = {z: slice_pair.pair(fixed[..., z], moving[..., z], mask[..., z], step, beyond) for z in held}
    pairs = {z: pair for z, pair in pairs.items() if pair.comparable}
    return {z: _best(fit) for z, fit in zip(pairs, _fits(list(pairs.values())), strict=True)}


def kept(found: dict[int, Shift]) -> dict[int, Shift]:
    """The shifts that bring enough: those of single slices, or of all of a sequence that has moved."""
    if not found:
        return {}
    moved = float(np.mean([shift.gain for shift in found.values()])) > SEQUENCE_GAIN
    least = LEAST_GAIN if moved else SLICE_GAIN
    return {z: shift for z, shift in found.items() if shift.gain > least}


def _best(fit: Array) -> Shift:
    place, after = edges.highest(fit)
    x, y = (place * GRID_MM).tolist()
    return Shift((x, y), float(fit[REACH, REACH]), after)


def _fits(pairs: Sequence[SlicePair]) -> list[Array]:
    """How well the slices of one sequence agree with the reference's, by shift."""
    by_edges = [_by_edges(pair) for pair in pairs]
    regions = [pair.depth_mm > -FAR_MM for pair in pairs]
    kinds = [cooccurrence.kinds(p.depth_mm, p.fixed, region) for p, region in zip(pairs, regions, strict=True)]
    borders = [cooccurrence.borders(p.moving[r], cooccurrence.LEVELS) for p, r in zip(pairs, regions, strict=True)]
    levels = [cooccurrence.levels(p.moving, b) for p, b in zip(pairs, borders, strict=True)]
    fits = by_edges
    for _ in range(ROUNDS):
        there = [p.shifted(np.array(_best(fit).mm)) for p, fit in zip(pairs, fits, strict=True)]
        lying = [cooccurrence.levels(values, b) for values, b in zip(there, borders, strict=True)]
        usual = cooccurrence.usual([cooccurrence.counts(k, level) for k, level in zip(kinds, lying, strict=True)])
        found = [cooccurrence.agreement(*one, REACH) for one in zip(kinds, levels, usual, strict=True)]
        fits = [
            gaussian_filter(edge + WEIGHT * one, AVERAGED_MM / GRID_MM)
            for edge, one in zip(by_edges, found, strict=True)
        ]
    return fits


def _by_edges(pair: SlicePair) -> Array:
    """How well edges agree, with the reference's and with the outline."""
    cut = round((FAR_MM - AROUND_MM) / GRID_MM)
    near = np.s_[cut:-cut, cut:-cut]
    depth, fixed, moving = pair.depth_mm[near], np.nan_to_num(pair.fixed[near]), np.nan_to_num(pair.moving[near])
    around = (depth > -AROUND_MM).astype(np.float32)
    outline = ((depth > -OUTSIDE_MM) & (depth < INSIDE_MM)).astype(np.float32)
    other = edges.of(moving, around)
    with_reference = edges.agreement(edges.of(fixed, around), other, around, REACH)
    return with_reference + edges.agreement(edges.of(depth, outline), other, outline, REACH)
