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

from monai_deepgmm.registration import cooccurrence, correlation, edges
from monai_deepgmm.registration.slice_pair import GRID_MM, Moving, Still

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
#: What of the grid is near enough for edges.
NEAR = (slice(round((FAR_MM - AROUND_MM) / GRID_MM), -round((FAR_MM - AROUND_MM) / GRID_MM)),) * 2
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


class Reference:
    """The slices of the reference that hold the mask, ready for several sequences.

    Args:
        fixed: the reference ``(X, Y, Z)``, slices along the last axis.
        mask: of the organ, as it lies in the reference.
        spacing_mm: of X and Y.
    """

    def __init__(self, fixed: Array, mask: Bools, spacing_mm: Sequence[float]) -> None:
        step, beyond = np.asarray(spacing_mm, float), FAR_MM + REACH_MM
        held = np.flatnonzero(mask.any((0, 1))).tolist()
        self.slices = {z: _Slice.of(Still.of(fixed[..., z], mask[..., z], step, beyond)) for z in held}

    def shifts(self, moving: Array) -> dict[int, Shift]:
        """The shift of each slice of a sequence on the same grid, ``(X, Y, Z)``.

        Returns:
            Slice → shift, for the slices that hold the mask and show something.
        """
        pairs = {z: (one, Moving.of(one.still, moving[..., z])) for z, one in self.slices.items()}
        pairs = {z: pair for z, pair in pairs.items() if pair[1].comparable}
        return {z: _best(fit) for z, fit in zip(pairs, _fits(list(pairs.values())), strict=True)}


class _Slice(NamedTuple):
    """What of a slice of the reference is the same for all sequences.

    Attributes:
        still: the slice.
        region: where it counts what lies on what ``(x, y)``.
        kind: of each place ``(x, y)``.
        weight: of each place beside edges ``(x', y')``.
        edges: its own, and those of the outline.
    """

    still: Still
    region: Bools
    kind: NDArray[np.integer[Any]]
    weight: Array
    edges: tuple[edges.Still, edges.Still]

    @classmethod
    def of(cls, still: Still) -> _Slice:
        region, depth = still.depth_mm > -FAR_MM, still.depth_mm[NEAR]
        around = (depth > -AROUND_MM).astype(np.float32)
        outline = ((depth > -OUTSIDE_MM) & (depth < INSIDE_MM)).astype(np.float32)
        own = (
            edges.Still.of(edges.of(np.nan_to_num(still.values[NEAR]), around), around, REACH),
            edges.Still.of(edges.of(depth, outline), outline, REACH),
        )
        return cls(still, region, cooccurrence.kinds(still.depth_mm, still.values, region), around, own)


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


def _fits(pairs: Sequence[tuple[_Slice, Moving]]) -> list[Array]:
    """How well the slices of one sequence agree with the reference's, by shift."""
    by_edges = [_by_edges(*pair) for pair in pairs]
    borders = [cooccurrence.borders(moving.values[one.region], cooccurrence.LEVELS) for one, moving in pairs]
    levels = [cooccurrence.levels(moving.values, b) for (_, moving), b in zip(pairs, borders, strict=True)]
    spectra = [cooccurrence.spectra(level, REACH) for level in levels]
    kinds = [one.kind for one, _ in pairs]
    fits = by_edges
    for _ in range(ROUNDS):
        there = [moving.shifted(np.array(_best(fit).mm)) for (_, moving), fit in zip(pairs, fits, strict=True)]
        lying = [cooccurrence.levels(values, b) for values, b in zip(there, borders, strict=True)]
        usual = cooccurrence.usual([cooccurrence.counts(k, level) for k, level in zip(kinds, lying, strict=True)])
        found = [cooccurrence.agreement(*one, REACH) for one in zip(kinds, spectra, usual, strict=True)]
        fits = [
            gaussian_filter(edge + WEIGHT * one, AVERAGED_MM / GRID_MM)
            for edge, one in zip(by_edges, found, strict=True)
        ]
    return fits


def _by_edges(one: _Slice, moving: Moving) -> Array:
    """How well edges agree, with the reference's and with the outline."""
    other = correlation.turned(edges.of(np.nan_to_num(moving.values[NEAR]), one.weight), REACH)
    with_reference, with_outline = (edges.agreement(own, other) for own in one.edges)
    return with_reference + with_outline
