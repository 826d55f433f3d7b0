"""Sequences brought together: what lies beside the reference is looked up where it is, and resampled once.

The reference, and the mask that was drawn on it, stay. Where nothing would gain by a margin nothing is changed.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from monai_deepgmm.images import grid
from monai_deepgmm.images import volume as volumes
from monai_deepgmm.images.grid import Placed
from monai_deepgmm.images.volume import Volume
from monai_deepgmm.protocol import Protocol
from monai_deepgmm.registration import Align, in_plane, whole_stack
from monai_deepgmm.registration.in_plane import Shift
from monai_deepgmm.registration.whole_stack import Movement


class Aligned(NamedTuple):
    """The sequences after they were brought together.

    Attributes:
        placed: sequence → its data on the reference's grid; what was not moved is the same object.
        facts: for the sidecar; None where nothing was looked for.
        notes: each begins with its code.
    """

    placed: dict[str, Placed]
    facts: dict[str, Any] | None = None
    notes: tuple[str, ...] = ()


def bring_together(
    sources: Mapping[str, Volume],
    placed: Mapping[str, Placed],
    mask: NDArray[np.bool_],
    protocol: Protocol,
    align: Align,
) -> Aligned:
    """Each sequence moved to where the reference is, if that gains by a margin.

    Args:
        sources: the sequences as they were read; the first is the reference.
        placed: the same on its grid.
        mask: (X, Y, Z), as it lies in the reference.
        protocol: whether slices are images of their own.
        align: what is looked for.
    """
    by_slice = protocol.unit == "slice"
    if align == "off" or len(sources) < 2 or not (by_slice or align == "rigid"):
        return Aligned(dict(placed))
    (first, reference), *others = sources.items()
    out, facts, notes = {first: placed[first]}, {}, []
    fixed = _finite(placed[first])
    for sequence, source in others:
        mover = _Mover(_in_place(source, placed[sequence], reference), reference)
        before, whole = placed[sequence], None
        if align == "rigid":
            whole = whole_stack.movement(fixed, _finite(before), mask, reference.spacing_mm)
            before = mover.whole(before, whole) if whole is not None and whole.kept else before
        found = in_plane_shifts(fixed, _finite(before), mask, reference) if by_slice else {}
        chosen = in_plane.kept(found)
        out[sequence] = mover.slices(before, chosen)
        facts[sequence] = mover.facts(whole, found, chosen)
        notes += _note(sequence, first, whole, chosen)
    return Aligned(out, {"rule": align, "reference": first, "sequences": facts}, tuple(notes))


def in_plane_shifts(
    fixed: NDArray[Any], moving: NDArray[Any], mask: NDArray[np.bool_], reference: Volume
) -> dict[int, Shift]:
    """Slice → how a sequence lies beside the reference in its plane; all arrays (X, Y, Z) on the reference's grid."""
    axis = grid.slice_axis(reference.spacing_mm)
    planes = (np.moveaxis(fixed, axis, 2), np.moveaxis(moving, axis, 2), np.moveaxis(mask, axis, 2))
    return in_plane.shifts(*planes, np.delete(reference.spacing_mm, axis).tolist())


class _Mover:
    """Looks one sequence up on the reference's grid, moved."""

    def __init__(self, source: Volume, reference: Volume) -> None:
        self.source, self.reference = source, reference
        self.axis = grid.slice_axis(reference.spacing_mm)
        self.plane = [i for i in range(3) if i != self.axis]
        # From mm along the grid's axes to the patient's space, and there the movement of the whole sequence.
        self.frame = reference.affine @ np.diag([*(1 / np.array(reference.spacing_mm)), 1.0])
        self.stack = np.eye(4)

    def whole(self, before: Placed, found: Movement) -> Placed:
        """The sequence after a movement of all of it."""
        self.stack = self.frame @ found.matrix @ np.linalg.inv(self.frame)
        grid_there = dataclasses.replace(self.reference, affine=self.stack @ self.reference.affine)
        return self._looked_up(grid_there, before)

    def slices(self, before: Placed, chosen: Mapping[int, Shift]) -> Placed:
        """The sequence after movements of single slices, each looked up in the source; the others stay."""
        if not chosen:
            return before
        data, inside = before.data.copy(), before.inside.copy()
        for z, shift in chosen.items():
            index = [slice(None)] * 3
            index[self.axis] = slice(z, z + 1)
            here = tuple(index)
            first = self.reference.affine.copy()
            first[:3, 3] += z * first[:3, self.axis] + self._mm(shift)
            one = dataclasses.replace(self.reference, data=before.data[here], affine=self.stack @ first)
            moved = self._looked_up(one, before)
            data[here], inside[here] = moved.data, moved.inside
        return before._replace(data=data, inside=inside)

    def facts(self, whole: Movement | None, found: Mapping[int, Shift], chosen: Mapping[int, Shift]) -> dict[str, Any]:
        """What the sidecar says: of each slice by how many mm it was moved (RAS), and how well edges agreed."""
        told: dict[str, Any] = {"moved": bool(chosen) or bool(whole and whole.kept)}
        if whole is not None:
            told["stack"] = {
                "matrix": np.round(self.stack, 6).tolist() if whole.kept else None,
                "before": round(whole.before, 4),
                "after": round(whole.after, 4),
            }
        told["slices"] = {
            str(z): {
                "moved_mm": (-np.round(self._mm(shift), 3) + 0.0).tolist() if z in chosen else None,
                "before": round(shift.before, 4),
                "after": round(shift.after, 4),
            }
            for z, shift in found.items()
        }
        return told

    def _mm(self, shift: Shift) -> NDArray[np.float64]:
        """A shift as a vector in the patient's space, mm."""
        found: NDArray[np.float64] = self.frame[:3, self.plane] @ np.array(shift.mm)
        return found

    def _looked_up(self, there: Volume, before: Placed) -> Placed:
        return before._replace(
            data=volumes.resample(self.source, there), inside=grid.centres_inside(there, self.source)
        )


def _in_place(source: Volume, placed: Placed, reference: Volume) -> Volume:
    """A sequence as it was read, where it was taken to lie."""
    return dataclasses.replace(source, affine=reference.affine) if placed.taken else source


def _finite(placed: Placed) -> NDArray[np.floating[Any]]:
    found: NDArray[np.floating[Any]] = np.nan_to_num(placed.data, posinf=0, neginf=0)
    return found


def _note(sequence: str, first: str, whole: Movement | None, chosen: Mapping[int, Shift]) -> list[str]:
    """A warning that says what was moved."""
    parts = ["as a whole"] if whole is not None and whole.kept else []
    if chosen:
        far = max(float(np.hypot(*shift.mm)) for shift in chosen.values())
        parts.append(f"by up to {far:.1f} mm in slice {', '.join(map(str, chosen))}")
    return [f"W_ALIGNED: {sequence} was moved to {first} {' and '.join(parts)}; check it on the page"] if parts else []
