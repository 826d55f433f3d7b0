"""Whether a mask can be the organ's: its values, its name, its pieces, its cavity, its size and its outline.

A mask that is another organ's, or the organ's from another tool's voxels, gives volumes that look like volumes. What
cannot be right is refused; what may be is flagged, with the numbers that speak against it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import binary_fill_holes, find_objects, label

from monai_deepgmm.errors import StudyError
from monai_deepgmm.images import grid as grids
from monai_deepgmm.images.grid import slice_axis
from monai_deepgmm.images.volume import Volume, corners_apart_mm
from monai_deepgmm.mask_shape import MaskShape
from monai_deepgmm.protocol import Protocol
from monai_deepgmm.wording import spans

Bools = NDArray[np.bool_]

#: Words in a mask's name that mean something else than the whole organ, whatever the protocol.
OTHER = frozenset({
    "lesion", "lesions", "wmh", "scar", "scars", "infarct", "infarction", "mvo", "edema", "oedema", "necrosis",
    "stroke", "tumor", "tumors", "tumour", "tumours", "rv", "myo", "myocardium", "endo", "blood", "csf", "gm", "wm",
    "atrium", "atria", "aorta", "fat", "liver", "lung", "lungs", "skull", "scalp", "vessel", "vessels",
    "vein", "veins", "artery", "ventricles",
})  # fmt: skip
#: What a mask is called anyway.
PLAIN = re.compile(r"(?i)mask|segmentation|seg|labels?|roi|\.nii|\.gz")
#: A mask of more values than these is a probability map, an image, or a label map of everything.
MANY_VALUES = 20
#: A piece smaller than this share of the largest is dropped; it is worth a word from this share of the mask on.
SMALL_PIECE, TOLD = 0.1, 0.002
#: The share of a mask that may lie beyond the image: told of, refused.
LOST, MUCH_LOST = 0.02, 0.5
#: A cavity larger than this share of the filled mask is told of, in slices and in volumes; or the mask is a ring.
HOLE, HOLE_IN_VOLUME, RING = 0.02, 0.005, 0.2
#: A volume ends in a flat cut where its area falls from one slice to the next by this share of the largest.
CUT = 0.5
#: An outline agrees with the ellipse of its moments by this Dice at least: in the middle slice, and in the worst.
ELLIPSE, WORST_ELLIPSE = 0.965, 0.945
#: A slice with fewer voxels is too coarse to have an outline.
ENOUGH = 100


class Examined(NamedTuple):
    """A mask that may be used.

    Attributes:
        mask: (X, Y, Z) bool, without its small pieces.
        warnings: each begins with its code.
    """

    mask: Bools
    warnings: tuple[str, ...]


def refuse_values(values: NDArray[np.floating], name: str) -> None:
    """Refuses a mask of several values of which nobody has said which count.

    Raises:
        StudyError: ``E_MASK_LABELS``, with the values.
    """
    if len(found := np.unique(values[values != 0])) > 1:
        if len(found) > MANY_VALUES:
            told = f"the mask {name} holds {len(found)} values from {found[0]:g} to {found[-1]:g}"
            remedy = "If they are probabilities, threshold them; of a label map, name the values with --mask-labels"
            raise StudyError("E_MASK_LABELS", told, remedy)
        listed = ", ".join(f"{value:g}" for value in found)
        remedy = "Say with --mask-labels which of them make up the organ"
        raise StudyError("E_MASK_LABELS", f"the mask {name} holds {len(found)} values other than 0: {listed}", remedy)


def about_name(name: str, patient: str, protocol: Protocol, *, asked_for: bool) -> Iterator[str]:
    """A warning where a mask's name means another organ, or a part of this one, and the user has chosen it.

    Args:
        name: the file's.
        patient: the id, which is no word.
        protocol: its tissues are parts, and its organ is none.
        asked_for: whether the user named this very file, or the values in it.

    Raises:
        StudyError: ``E_MASK_NAME``, nobody has chosen it.
    """
    parts = {word for tissue in protocol.tissues for word in _words(tissue.name)}
    meant = sorted((OTHER | parts) & _words(_without(name, patient)) - _words(protocol.mask))
    if not meant:
        return
    told = f"the mask {name} is called {' '.join(meant)}, not {protocol.mask}"
    if not asked_for:
        remedy = f"Give the mask of the {protocol.mask}; if this is it, rename it or name it in a manifest"
        raise StudyError("E_MASK_NAME", told, remedy)
    yield f"W_MASK_NAME: {told}; check that it covers all of the {protocol.mask}"


def _without(name: str, patient: str) -> str:
    return re.sub(re.escape(patient), " ", name, flags=re.IGNORECASE) if patient else name


def _words(text: str) -> set[str]:
    """The words of a name, small, split where letters end and where capitals begin."""
    plain = PLAIN.sub(" ", text)
    return {word.lower() for word in re.findall(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])", plain)}


def refuse_elsewhere(mask: Volume, images: Mapping[str, Volume]) -> None:
    """Refuses a mask that has the voxels of an image but the place of none: its header is not its own.

    Raises:
        StudyError: ``E_MASK_GRID``.
    """
    alike = {s: corners_apart_mm(mask, v) for s, v in images.items() if v.data.shape == mask.data.shape}
    if not alike or any(apart <= max(images[s].spacing_mm) for s, apart in alike.items()):
        return
    nearest = min(alike, key=lambda sequence: alike[sequence])
    image, apart = images[nearest], alike[nearest]
    told = (
        f"the mask {mask.name} has the same shape as {image.name} but lies elsewhere: corner voxels are up to "
        f"{apart:.4g} mm apart"
    )
    remedy = (
        f"If it was drawn on {nearest}, save it with that image's header (affine); else give the image it belongs to"
    )
    raise StudyError("E_MASK_GRID", told, remedy)


def about_loss(mask: Volume, reference: Volume) -> Iterator[str]:
    """A warning where a part of the mask lies beyond the reference's field of view.

    Raises:
        StudyError: ``E_MASK_GRID``, more than half of it does.
    """
    drawn = mask.data > 0
    whole, kept = int(drawn.sum()), int((drawn & grids.centres_inside(mask, reference)).sum())
    lost = 1 - kept / max(whole, 1)
    told = (
        f"{(whole - kept) * mask.voxel_ml:.1f} of {whole * mask.voxel_ml:.1f} ml ({100 * lost:.0f} %) of the mask "
        f"{mask.name} lie beyond {reference.name}"
    )
    if lost > MUCH_LOST:
        raise StudyError("E_MASK_GRID", told, "Check that the mask belongs to this examination, and its header")
    if lost > LOST:
        yield f"W_MASK_LOST: {told}"


def examine(mask: Bools, grid: Volume, protocol: Protocol) -> Examined:
    """Takes small pieces off a mask, and holds it against what the protocol expects.

    Args:
        mask: (X, Y, Z), not empty.
        grid: where it lies.
        protocol: its ``mask_shape``; without one, a mask may be anything.

    Raises:
        StudyError: ``E_MASK_CAVITY``, ``E_MASK_SIZE``.
    """
    flat, shape = protocol.unit == "slice", protocol.mask_shape
    if shape is None:
        return Examined(mask, ())
    axis = slice_axis(grid.spacing_mm)
    kept, notes = _pieces(mask, axis if flat else None, grid.voxel_ml)
    notes += [*_cavity(kept, axis if flat else None, protocol.mask), *_size(kept, grid, axis, shape, protocol.mask)]
    notes += _outline(kept, axis, protocol.mask) if shape.ellipses else []
    notes += [] if flat else _cuts(kept, protocol.mask)
    return Examined(kept, tuple(notes))


def planes(mask: Bools, axis: int) -> Iterator[tuple[int, Bools]]:
    """The slices of a mask that hold any of it: their index, and their voxels (X, Y)."""
    for index, plane in enumerate(np.moveaxis(mask, axis, 0)):
        if plane.any():
            yield index, plane


def _pieces(mask: Bools, axis: int | None, voxel_ml: float) -> tuple[Bools, list[str]]:
    """The mask without small pieces, of each slice or of the volume (``axis`` None), and what is to be told."""
    kept, several = mask.copy(), []
    parts = [(0, kept)] if axis is None else [(i, np.moveaxis(kept, axis, 0)[i]) for i, _ in planes(mask, axis)]
    dropped = 0
    for index, part in parts:
        numbered, count = label(part, structure=np.ones((3,) * part.ndim))
        sizes = np.bincount(numbered.ravel(), minlength=count + 1)[1:]
        small = np.flatnonzero(sizes < SMALL_PIECE * sizes.max()) + 1
        dropped += len(small)
        if len(small):
            part &= ~np.isin(numbered, small)
        if count - len(small) > 1:
            several.append((index, count - len(small)))
    lost, notes = int(mask.sum() - kept.sum()), []
    if lost > TOLD * mask.sum():
        notes = [f"W_MASK_PIECES: {dropped} small pieces of the mask ({lost * voxel_ml:.2f} ml) were left out"]
    if several:
        place = "" if axis is None else f" in slice {spans(i for i, _ in several)}"
        most = max(n for _, n in several)
        notes.append(f"W_MASK_PIECES: the mask lies in {most} large pieces{place}; check that all are of one organ")
    return kept, notes


def _cavity(mask: Bools, axis: int | None, organ: str) -> Iterator[str]:
    """A warning where the mask encloses what is not of it."""
    box = find_objects(mask.astype(np.uint8))[0]
    parts = [mask[box]] if axis is None else [plane for _, plane in planes(mask[box], axis)]
    filled = np.array([[binary_fill_holes(part).sum(), part.sum()] for part in parts], dtype=float)
    share = 1 - filled[:, 1].sum() / filled[:, 0].sum()
    if share > RING:
        message = f"the mask is a ring: {100 * share:.0f} % of what its outline encloses is not of it"
        remedy = f"Fill it, or add the cavity's value to --mask-labels: the mask covers the {organ} with its cavity"
        raise StudyError("E_MASK_CAVITY", message, remedy)
    if share > (HOLE_IN_VOLUME if axis is None else HOLE):
        yield f"W_MASK_CAVITY: {100 * share:.1f} % of what the mask encloses is not of it; check its cavity"


def _size(mask: Bools, grid: Volume, axis: int, shape: MaskShape, organ: str) -> Iterator[str]:
    """A warning for each measure of the mask that is unusual."""
    pixel_mm2 = float(np.prod([s for i, s in enumerate(grid.spacing_mm) if i != axis]))
    largest = max(int(plane.sum()) for _, plane in planes(mask, axis))
    diameter = 2 * (largest * pixel_mm2 / np.pi) ** 0.5
    measures = (
        ("a largest diameter", diameter, "mm", shape.diameter_mm),
        ("a volume", mask.sum() * grid.voxel_ml, "ml", shape.volume_ml),
    )
    for what, value, unit, limits in measures:
        if limits is None:
            continue
        least, low, high, most = limits
        told = f"the mask has {what} of {value:.0f} {unit}; the {organ} has {low:g} to {high:g} {unit}"
        if not least <= value <= most:
            remedy = f"Check that it covers the {organ} and nothing else, and that its voxel sizes are right"
            raise StudyError("E_MASK_SIZE", told, remedy)
        if not low <= value <= high:
            yield f"W_MASK_SIZE: {told}"


def _outline(mask: Bools, axis: int, organ: str) -> Iterator[str]:
    """A warning where the slices are no ellipses, as after half of the mask was lost or a neighbour was added."""
    found = {index: _ellipse_dice(plane) for index, plane in planes(mask, axis) if plane.sum() >= ENOUGH}
    if not found:
        return
    middle, worst = float(np.median(list(found.values()))), min(found, key=lambda index: found[index])
    if middle < ELLIPSE or found[worst] < WORST_ELLIPSE:
        yield (
            f"W_MASK_SHAPE: the mask's outline is not that of the {organ}: it agrees with an ellipse by a Dice of "
            f"{middle:.3f} (usual: {ELLIPSE:g} and more), and of {found[worst]:.3f} in slice {worst}"
        )


def _cuts(mask: Bools, organ: str) -> Iterator[str]:
    """A warning for each axis along which a volume ends in a flat cut within the field of view."""
    for axis in range(mask.ndim):
        area = np.count_nonzero(mask, axis=tuple(i for i in range(mask.ndim) if i != axis))
        falls = np.abs(np.diff(area)) / area.max()
        if len(falls) and falls.max() > CUT:
            where = int(falls.argmax())
            yield (
                f"W_MASK_SHAPE: the mask ends in a flat cut between slices {where} and {where + 1} of axis {axis}: its "
                f"area changes by {100 * falls[where]:.0f} % of the largest; check that it covers the whole {organ}"
            )


def _ellipse_dice(plane: Bools) -> float:
    """The Dice of a figure (X, Y) and the ellipse that has its centre and its second moments."""
    where = np.argwhere(plane).astype(float)
    centre, spread = where.mean(0), np.cov(where.T) + np.eye(2) / 12
    (a, b), (_, c) = np.linalg.inv(spread)
    x, y = (np.arange(n) - middle for n, middle in zip(plane.shape, centre, strict=True))
    ellipse = (a * x**2)[:, None] + np.multiply.outer(2 * b * x, y) + c * y**2 <= 4
    return float(2 * (ellipse & plane).sum() / (ellipse.sum() + plane.sum()))
