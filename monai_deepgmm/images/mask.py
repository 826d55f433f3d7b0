"""The mask: which voxels get a label, from a file or by a rule, on the reference sequence's grid."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from monai_deepgmm.errors import StudyError
from monai_deepgmm.images import background, grid, image_file, mask_examination
from monai_deepgmm.images.measured import padding
from monai_deepgmm.images.volume import Volume
from monai_deepgmm.localisation import brain, network_mask, probable_mask, ventricle
from monai_deepgmm.patients.study import MaskModel, Study
from monai_deepgmm.protocol import Protocol

#: The least confidence of a mask that was found.
LEAST_CONFIDENCE = 0.6
#: A mask needs at least this many voxels for each tissue.
MIN_VOXELS_PER_TISSUE = 10


class Mask(NamedTuple):
    """The voxels that get a label, on the reference's grid.

    Attributes:
        voxels: (X, Y, Z) bool, never empty.
        facts: what the sidecar says of its file or rule.
        warnings: each begins with its code.
    """

    voxels: NDArray[np.bool_]
    facts: dict[str, Any]
    warnings: tuple[str, ...]


def read(
    study: Study,
    protocol: Protocol,
    volumes: Mapping[str, Volume],
    image: NDArray[np.floating[Any]],
    *,
    frame: int | None,
    max_voxels: int,
) -> Mask:
    """The mask of a study, from its file or by its rule, examined.

    Args:
        study: its mask's file, labels and rule.
        protocol: the tissues that the mask must have room for, and what it looks like.
        volumes: the images by sequence; the first is the reference.
        image: all of them, on its grid (M, X, Y, Z).
        frame: which frame of a 4-D mask.
        max_voxels: a larger file is refused before it is read.

    Raises:
        StudyError: ``E_MASK_*``, ``E_HEAD``, ``E_GRID``, or a code of ``nifti.read``.
    """
    sequences, reference = tuple(volumes), next(iter(volumes.values()))
    notes: list[str] = []
    if study.mask_rule == "nonzero":
        found = background.foreground(reference, sequences[0], protocol)
        mask, facts, name, notes = found.mask, {"rule": found.rule}, reference.name, list(found.warnings)
    elif study.mask_rule == "auto":
        overlooked = f"; {study.overlooked['mask']}" if "mask" in study.overlooked else ""
        mask, facts, notes, name = _found(protocol, sequences, reference, image, overlooked)
    elif study.mask_model is not None:
        mask, facts, notes, name = _by_model(study.mask_model, protocol, sequences, reference, image)
    else:
        mask, facts, notes, name = _from_file(study, protocol, volumes, frame=frame, max_voxels=max_voxels)
    if not mask.any():
        labels = f" with any of the values {_listed(study.mask_labels)}" if study.mask_labels else ""
        remedy = f"Draw the {protocol.mask}, or name the values that mean it with --mask-labels"
        raise StudyError("E_MASK_EMPTY", f"the mask {name} has no voxel{labels} on the grid of {sequences[0]}", remedy)
    needed = MIN_VOXELS_PER_TISSUE * len(protocol.components(sequences))
    if (count := int(mask.sum())) < needed:
        message = f"the mask {name} has {count} voxels, but {needed} are needed"
        raise StudyError("E_MASK_SMALL", message, f"Check that it covers the {protocol.mask}")
    examined = mask_examination.examine(mask, reference, protocol)
    if study.mask_rule != "nonzero":
        background.refuse_head(reference.data, examined.mask, reference, protocol)
        notes += background.about_rest(reference, examined.mask, protocol)
        notes += background.about_rim(
            reference, examined.mask, protocol, code="W_MASK_EDGE", why="the mask may be too large"
        )
    return Mask(examined.mask, facts, (*notes, *examined.warnings))


def _found(
    protocol: Protocol,
    sequences: tuple[str, ...],
    reference: Volume,
    image: NDArray[np.floating[Any]],
    overlooked: str,
) -> tuple[NDArray[np.bool_], dict[str, Any], list[str], str]:
    found: ventricle.Found | probable_mask.Found
    if protocol.mask_finder == "brain":
        if (stripped := background.stripped(reference, sequences[0], protocol)) is not None:
            note = f"W_MASK_AUTO: {reference.name} is stripped already: the mask is its {stripped.rule}{overlooked}"
            return stripped.mask, {"rule": stripped.rule, "confidence": 1.0}, [note], reference.name
        found, how = brain.find(reference.data, reference.affine), f"by deepbet, on {sequences[0]}"
    else:
        found = ventricle.find_by(image, protocol, sequences, reference.spacing_mm)
        how = "from the images"
    sure = f"{found.confidence:.2f}"
    if found.confidence < LEAST_CONFIDENCE:
        message = f"no mask was given, and the {protocol.mask} was not found surely enough ({sure} of 1){overlooked}"
        remedy = "Draw the mask and give it as a file; add the sequences that are missing, if there are any"
        raise StudyError("E_MASK_UNSURE", message, remedy)
    note = f"W_MASK_AUTO: the {protocol.mask} was found {how}, with confidence {sure}; look at its outline{overlooked}"
    facts = {"rule": f"found {how}", "confidence": round(found.confidence, 4)}
    return found.mask, facts, [note], f"found {how}"


def _by_model(
    model: MaskModel,
    protocol: Protocol,
    sequences: tuple[str, ...],
    reference: Volume,
    image: NDArray[np.floating[Any]],
) -> tuple[NDArray[np.bool_], dict[str, Any], list[str], str]:
    if model.sequence not in sequences:
        message = f"the bundle {model.folder.name} finds the mask on {model.sequence}, which this patient lacks"
        raise StudyError("E_MODEL", message, "Give a mask file, or another --mask-sequence")
    chosen = image[sequences.index(model.sequence)]
    found = network_mask.find(model, chosen, reference.affine, grid.slice_axis(reference.spacing_mm))
    note = (
        f"W_MASK_AUTO: the {protocol.mask} was found by the bundle {model.folder.name} on {model.sequence}, with "
        f"probability {found.confidence:.2f}; look at its outline"
    )
    facts = {"rule": "found by a bundle", "confidence": round(found.confidence, 4), **model.as_json()}
    return found.mask, facts, [note], f"that the bundle {model.folder.name} found"


def _from_file(
    study: Study, protocol: Protocol, volumes: Mapping[str, Volume], *, frame: int | None, max_voxels: int
) -> tuple[NDArray[np.bool_], dict[str, Any], list[str], str]:
    if study.mask is None:
        raise StudyError("E_MASK_NONE", "no mask was found", "Add a mask file, or use --mask nonzero")
    chosen = study.mask_named or bool(study.mask_labels)
    named = list(mask_examination.about_name(study.mask.name, study.patient, protocol, asked_for=chosen))
    reference = next(iter(volumes.values()))
    volume = image_file.read(
        Path(study.mask),
        frame=frame,
        max_voxels=max_voxels,
        spacing=study.spacing,
        beside=reference.data.size,
        dtype=np.float64,
    )
    whole = np.rint(volume.data)
    good = np.isfinite(volume.data) & np.isclose(volume.data, whole, rtol=0, atol=1e-3)
    if not good.all():
        odd = volume.data[~good].flat[0]
        remedy = "Threshold the mask, or resample it with nearest neighbour"
        raise StudyError("E_MASK_FRACTIONAL", f"the mask {volume.name} holds {odd:g}, not a whole number", remedy)
    if not study.mask_labels:
        mask_examination.refuse_values(whole, volume.name)
    drawn = np.isin(whole, study.mask_labels) if study.mask_labels else whole != 0
    binary = dataclasses.replace(volume, data=drawn.astype(np.float64))
    if volume.placed:
        mask_examination.refuse_elsewhere(binary, volumes)
    placed = grid.on_grid(binary, reference, nearest=True)
    facts = grid.facts(volume, resampled=bool(placed.note or placed.taken))
    facts["values"] = [float(v) for v in study.mask_labels] or "any but 0"
    notes = [f"{w} (mask)" for w in volume.warnings] + named
    notes += [f"W_MASK_PLACE: {placed.taken}"] if placed.taken else []
    if placed.note:
        notes += [f"W_RESAMPLED: {placed.note}", *mask_examination.about_loss(binary, reference)]
    return placed.data > 0.5, facts, notes, volume.name


def without_padding(
    image: NDArray[np.float32], mask: NDArray[np.bool_], tissues: int, axis: int | None
) -> tuple[NDArray[np.bool_], list[str]]:
    """The mask without the zeros that lie between it and the image, as after another tool's skull stripping."""
    padded = padding(image, mask, axis)
    share = padded.sum() / mask.sum()
    if share == 0 or int((mask & ~padded).sum()) < MIN_VOXELS_PER_TISSUE * tissues:
        return mask, []
    note = f"W_MASK_PADDING: {100 * share:.1f} % of the mask is 0 in every sequence at its border; it has no label"
    return mask & ~padded, [note]


def _listed(values: tuple[float, ...]) -> str:
    return ", ".join(f"{value:g}" for value in values)
