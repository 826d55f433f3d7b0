"""What of an image is background, where the mask is everything else (``--mask nonzero``), and whether a head is left.

The rule needs a background of one value. Where the border of the image has one that is not 0, as after z-scoring, that
is taken; noise and what skull stripping has left make the "mask" something else, and are refused.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import binary_fill_holes, distance_transform_edt, label

from monai_deepgmm.errors import StudyError
from monai_deepgmm.images import grid
from monai_deepgmm.images.volume import Volume
from monai_deepgmm.localisation.brain import PIP
from monai_deepgmm.protocol import Protocol

Bools = NDArray[np.bool_]
Floats = NDArray[np.floating]

#: A value that so much of the image's border has is the background's.
COMMON = 0.5
#: So much of the border may belong to the organ.
AT_BORDER = 0.2
#: What is darker than this share of the mask's median is hardly tissue; so much of the mask may be, and is flagged.
DARK, MUCH_DARK, SOME_DARK = 0.1, 0.2, 0.12
#: So much of what a stripped image shows may lie outside the mask.
BEYOND = 0.1
#: A head is looked at on voxels of about this size, in mm; what is brighter than this share of its brightest counts.
COARSE_MM, BRIGHTEST, HEAD_SHARE = 2.0, 0.9, 0.15
#: A piece of it counts that is so large as a share of the largest.
PART = 0.05
#: Of what lies so deep below the surface (mm), so much is darker than this share of the inside: bone.
BONE_MM, BONE_SHARE, BONE_LEVEL = (3.0, 20.0), 0.18, 0.4
#: Of what lies less deep than this (mm), so much is brighter than this multiple of the inside: fat of the scalp.
SCALP_MM, SCALP_SHARE, SCALP_LEVEL = 10.0, 0.12, 1.4

#: Of the outer layer of a mask (mm), so much at most is darker than this share of its inside. Right masks of 14
#: brains: .07 to .41; where a layer of residue a quarter as bright as brain, or of bone, lies around them: 1.
RIM_MM, RIM_SHARE, RIM_LEVEL = 4.0, 0.85, 0.4


class Foreground(NamedTuple):
    """The voxels that are not background.

    Attributes:
        mask: (X, Y, Z) bool.
        rule: what it is, for the sidecar.
        warnings: each begins with its code.
    """

    mask: Bools
    rule: str
    warnings: tuple[str, ...]


def foreground(image: Volume, sequence: str, protocol: Protocol) -> Foreground:
    """The voxels of an image that differ from its background.

    Args:
        image: the reference sequence's.
        sequence: its name.
        protocol: what the mask must cover, and whether a skull must not be in it.

    Raises:
        StudyError: ``E_MASK_BACKGROUND``, the background is not of one value; ``E_HEAD``.
    """
    data = image.data
    finite = np.isfinite(data)
    value, rule, notes = 0.0, f"voxels of {sequence} that are not 0", []
    values, counts = np.unique(_border(data, grid.slice_axis(image.spacing_mm)), return_counts=True)
    common, share = (float(values[counts.argmax()]), counts.max() / counts.sum()) if len(values) else (0.0, 0.0)
    if common != 0 and share >= COMMON:
        value, rule = common, f"voxels of {sequence} that are not {common:g}, the value of its border"
        notes = [f"W_MASK_BACKGROUND: the background of {image.name} is {common:g}, not 0; the mask is what differs"]
    mask = finite & (data != value)
    refuse_head(data, mask, image, protocol)
    remedy = f"Set everything outside the {protocol.mask} to 0, or give a mask file"
    if (filled := float((_border(data, grid.slice_axis(image.spacing_mm)) != value).mean())) > AT_BORDER:
        told = (
            f"{100 * filled:.0f} % of the border of {image.name} is not {value:g}: its background holds noise or tissue"
        )
        raise StudyError("E_MASK_BACKGROUND", told, remedy)
    dark = _dark_share(data[mask] - value)
    told = f"{100 * dark:.0f} % of what is not {value:g} in {image.name} is nearly {value:g}: left by skull stripping?"
    if dark > MUCH_DARK:
        raise StudyError("E_MASK_BACKGROUND", told, remedy)
    notes += [f"W_MASK_BACKGROUND: {told}"] if dark > SOME_DARK else []
    notes += about_rim(image, mask, protocol, code="W_MASK_BACKGROUND", why="left by skull stripping?")
    return Foreground(mask, rule, tuple(notes))


def stripped(image: Volume, sequence: str, protocol: Protocol) -> Foreground | None:
    """The foreground of an image that is stripped of the skull already; None where it is not, or not surely.

    Args:
        image: the reference sequence's.
        sequence: its name.
        protocol: how large its organ usually is: a foreground that is larger holds more than that.
    """
    limits = protocol.mask_shape.volume_ml if protocol.mask_shape else None
    try:
        found = foreground(image, sequence, protocol)
    except StudyError:
        return None
    large = limits is not None and float(found.mask.sum()) * image.voxel_ml > limits[2]
    return None if found.warnings or large else found


def refuse_head(data: Floats, mask: Bools, image: Volume, protocol: Protocol) -> None:
    """Refuses a mask that holds a skull: dark bone some way below the surface, and bright scalp above it.

    Args:
        data: (X, Y, Z), of the reference sequence.
        mask: (X, Y, Z).
        image: where it lies.
        protocol: only where its mask must be without a skull.

    Raises:
        StudyError: ``E_HEAD``.
    """
    if protocol.mask_shape is None or not protocol.mask_shape.no_skull or not mask.any():
        return
    thinned, spacing = grid.thinned(image.spacing_mm, COARSE_MM)
    coarse = np.where(mask & np.isfinite(data), data, 0)[thinned]
    bone, scalp = _bone_and_scalp(coarse, spacing, grid.slice_axis(image.spacing_mm))
    if bone > BONE_SHARE and scalp > SCALP_SHARE:
        told = (
            f"{image.name} shows a head with skull and scalp inside the mask: of what lies {BONE_MM[0]:g} to "
            f"{BONE_MM[1]:g} mm below its surface {100 * bone:.0f} % is dark as bone, and of the outer {SCALP_MM:g} mm "
            f"{100 * scalp:.0f} % is brighter than brain"
        )
        remedy = f"Have it stripped (--mask auto, after {PIP}), or give a mask of the {protocol.mask}"
        raise StudyError("E_HEAD", told, remedy)


def about_rest(image: Volume, mask: Bools, protocol: Protocol) -> Iterator[str]:
    """A warning where an image was stripped of the skull and shows much that is not in the mask.

    Args:
        image: the reference sequence's, on the mask's grid.
        mask: (X, Y, Z).
        protocol: its organ, and how large that can be.
    """
    shape = protocol.mask_shape
    if shape is None or not shape.no_skull or shape.volume_ml is None:
        return
    shown = np.isfinite(image.data) & (image.data != 0)
    whole = float(shown.sum()) * image.voxel_ml
    beyond = float((shown & ~mask).sum()) * image.voxel_ml
    if whole > shape.volume_ml[2] or (shown & mask).sum() == 0 or beyond <= BEYOND * whole:
        return
    yield (
        f"W_MASK_PART: {image.name} shows {whole:.0f} ml that are not 0, of which {beyond:.0f} ml "
        f"({100 * beyond / whole:.0f} %) lie outside the mask; check that it covers the whole {protocol.mask}"
    )


def about_rim(image: Volume, mask: Bools, protocol: Protocol, *, code: str, why: str) -> Iterator[str]:
    """A warning where the outer layer of a brain's mask is dark nearly everywhere: residue, or bone.

    Args:
        image: the reference sequence's, on the mask's grid.
        mask: (X, Y, Z).
        protocol: only where its mask must be without a skull.
        code: of the warning.
        why: what may have happened, for the message.
    """
    if protocol.mask_shape is None or not protocol.mask_shape.no_skull:
        return
    thinned, spacing = grid.thinned(image.spacing_mm, COARSE_MM)
    inside, values = mask[thinned] & np.isfinite(image.data[thinned]), image.data[thinned]
    depth = distance_transform_edt(inside, sampling=spacing)
    rim, deep = (depth > 0) & (depth <= max(RIM_MM, 2 * spacing.max())), depth > depth.max() / 2
    if not rim.any() or np.quantile(values[inside], 0.1) < 0:
        return
    dark = float((values[rim] < RIM_LEVEL * np.median(values[deep])).mean())
    if dark > RIM_SHARE:
        told = f"{100 * dark:.0f} % of the mask's outer layer is less than {RIM_LEVEL:g} times as bright as its inside"
        yield f"{code}: {told} in {image.name} (usual: up to 45 %): {why}"


def _border(data: Floats, axis: int) -> Floats:
    """The values of the outer faces of a volume (N,), but for the first and last slice."""
    sides = [np.take(data, end, side).ravel() for side in range(3) if side != axis for end in (0, -1)]
    return np.concatenate(sides)


def _dark_share(values: Floats) -> float:
    """How much of a mask's values (N,) is nearly 0; 0 where values below it are usual."""
    if len(values) == 0 or np.quantile(values, 0.1) < 0:
        return 0.0
    return float((np.abs(values) < DARK * np.median(values)).mean())


def _bone_and_scalp(image: Floats, spacing_mm: NDArray[np.floating], axis: int) -> tuple[float, float]:
    """The share of dark and of bright voxels in their depths, 0 where there is too little to see."""
    if not (image > 0).any():
        return 0.0, 0.0
    numbered, count = label(image > HEAD_SHARE * np.quantile(image[image > 0], BRIGHTEST))
    if count == 0:
        return 0.0, 0.0
    sizes = np.bincount(numbered.ravel())[1:]
    whole = np.isin(numbered, np.flatnonzero(sizes > PART * sizes.max()) + 1)  # dark bone may part scalp from brain
    whole = np.stack([binary_fill_holes(plane) for plane in np.moveaxis(whole, axis, -1).transpose(2, 0, 1)])
    planes = np.moveaxis(image, axis, 0)
    around = np.pad(whole, ((0, 0), (1, 1), (1, 1)))  # the first and the last slice are cuts, not surfaces
    kept = [spacing_mm[axis], *(s for i, s in enumerate(spacing_mm) if i != axis)]
    depth = distance_transform_edt(around, sampling=kept)[:, 1:-1, 1:-1]
    if depth.max() < 2 * BONE_MM[1] / 1.5:
        return 0.0, 0.0
    inside = float(np.median(planes[depth > depth.max() / 2]))
    shell, rim = (depth > BONE_MM[0]) & (depth < BONE_MM[1]), (depth > 0) & (depth <= SCALP_MM)
    return float((planes[shell] < BONE_LEVEL * inside).mean()), float((planes[rim] > SCALP_LEVEL * inside).mean())
