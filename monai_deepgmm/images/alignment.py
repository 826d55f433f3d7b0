"""Sequences brought together: what lies beside the reference is looked up where it is, and resampled once.

The reference, and the mask that was drawn on it, stay. Where nothing would gain by a margin nothing is changed.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from functools import partial
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from monai_deepgmm.images import grid
from monai_deepgmm.images import volume as volumes
from monai_deepgmm.images.grid import Placed
from monai_deepgmm.images.volume import Volume
from monai_deepgmm.protocol import Protocol
from monai_deepgmm.registration import Align, in_plane
from monai_deepgmm.wording import spans

Mask = NDArray[np.bool_]


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


class _Moved(NamedTuple):
    placed: Placed
    facts: dict[str, Any]
    how: str  # in words; empty where it was not moved


def bring_together(
    sources: Mapping[str, Volume], placed: Mapping[str, Placed], mask: Mask, protocol: Protocol, align: Align
) -> Aligned:
    """Each sequence moved to where the reference is, if that gains by a margin.

    Args:
        sources: the sequences as they were read; the first is the reference.
        placed: the same on its grid.
        mask: (X, Y, Z), as it lies in the reference.
        protocol: whether slices are images of their own.
        align: what is looked for: slices of hearts that lie beside the reference in their plane (auto), also whole
            volumes (rigid), or nothing (off).
    """
    by_slice = protocol.unit == "slice"
    if align == "off" or len(sources) < 2 or not (by_slice or align == "rigid"):
        return Aligned(dict(placed))
    (first, reference), *others = sources.items()
    fixed = _finite(placed[first])
    move = partial(_slices, _planes(fixed, mask, reference)) if by_slice else partial(_whole, fixed, mask)
    out, facts, notes = {first: placed[first]}, {}, []
    for sequence, source in others:
        there = dataclasses.replace(source, affine=reference.affine) if placed[sequence].taken else source
        moved = move(placed[sequence], there, reference)
        out[sequence], facts[sequence] = moved.placed, {"moved": bool(moved.how), **moved.facts}
        notes += [f"W_ALIGNED: {sequence} was moved to {first} {moved.how}; check it on the page"] if moved.how else []
    return Aligned(out, {"rule": align, "reference": first, "sequences": facts}, tuple(notes))


def _planes(fixed: NDArray[Any], mask: Mask, reference: Volume) -> in_plane.Reference:
    """The slices of the reference, ready for the other sequences."""
    axis = grid.slice_axis(reference.spacing_mm)
    spacing_mm = np.delete(reference.spacing_mm, axis).tolist()
    return in_plane.Reference(np.moveaxis(fixed, axis, 2), np.moveaxis(mask, axis, 2), spacing_mm)


def _slices(planes: in_plane.Reference, before: Placed, source: Volume, reference: Volume) -> _Moved:
    """The sequence with each slice that gains moved in its plane; the others stay as they are."""
    axis = grid.slice_axis(reference.spacing_mm)
    found = planes.shifts(np.moveaxis(_finite(before), axis, 2))
    chosen = in_plane.kept(found)
    plane = reference.affine[:3, :3] / reference.spacing_mm
    away = {z: np.delete(plane, axis, 1) @ np.array(shift.mm) for z, shift in found.items()}  # mm, RAS
    data, inside = before.data.copy(), before.inside.copy()
    for z in chosen:
        here = tuple(slice(z, z + 1) if i == axis else slice(None) for i in range(3))
        affine = reference.affine.copy()
        affine[:3, 3] += z * affine[:3, axis] + away[z]
        one = _looked_up(source, dataclasses.replace(reference, data=before.data[here], affine=affine))
        data[here], inside[here] = one.data, one.inside
    told = {
        str(z): {
            "moved": z in chosen,
            "back_mm": (0.0 - np.round(away[z], 3)).tolist(),  # which way it is, or would be, moved
            "before": round(shift.before, 4),
            "after": round(shift.after, 4),
        }
        for z, shift in found.items()
    }
    if not chosen:
        return _Moved(before, {"slices": told}, "")
    far = max(float(np.linalg.norm(away[z])) for z in chosen)
    how = f"by up to {far:.1f} mm in slice {spans(chosen)}"
    return _Moved(before._replace(data=data, inside=inside), {"slices": told}, how)


def _whole(fixed: NDArray[Any], mask: Mask, before: Placed, source: Volume, reference: Volume) -> _Moved:
    """The whole sequence after one rigid movement, if that gains."""
    from monai_deepgmm.registration import whole_stack  # here, as SimpleITK takes 90 MB

    found = whole_stack.movement(fixed, _finite(before), mask, reference.spacing_mm)
    if found is None:
        return _Moved(before, {"stack": None}, "")
    # From mm along the grid's axes to the patient's space, and there the movement.
    frame = reference.affine @ np.diag([*(1 / np.array(reference.spacing_mm)), 1.0])
    matrix = frame @ found.matrix @ np.linalg.inv(frame)
    told = {"before": round(found.before, 4), "after": round(found.after, 4)}
    if not found.kept:
        return _Moved(before, {"stack": {"matrix": None, **told}}, "")
    one = _looked_up(source, dataclasses.replace(reference, affine=matrix @ reference.affine))
    middle = np.array([*(reference.affine @ [*np.argwhere(mask).mean(0), 1.0])[:3], 1.0])
    far = float(np.linalg.norm((matrix @ middle - middle)[:3]))
    facts = {"stack": {"matrix": np.round(matrix, 6).tolist(), **told}}
    return _Moved(before._replace(data=one.data, inside=one.inside), facts, f"as a whole, by {far:.1f} mm in the mask")


def _looked_up(source: Volume, there: Volume) -> Placed:
    """A sequence where another grid lies: what is moved and what is resampled is done at once."""
    return Placed(volumes.resample(source, there), grid.centres_inside(there, source))


def _finite(placed: Placed) -> NDArray[np.floating[Any]]:
    found: NDArray[np.floating[Any]] = np.nan_to_num(placed.data, posinf=0, neginf=0)
    return found
