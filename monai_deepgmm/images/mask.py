"""The mask: which voxels get a label, from a file or by a rule, on the reference sequence's grid."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from monai_deepgmm.errors import StudyError
from monai_deepgmm.images import grid, nifti
from monai_deepgmm.images.measured import padding
from monai_deepgmm.images.volume import Volume
from monai_deepgmm.localisation import ventricle
from monai_deepgmm.patients.study import Study
from monai_deepgmm.protocol import Protocol

#: How the mask is found, by the protocol's ``mask_finder``; and the least confidence that is taken.
FINDERS = {"ventricle": ventricle.find_by}
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
    sequences: tuple[str, ...],
    reference: Volume,
    image: NDArray[np.floating[Any]],
    *,
    frame: int | None,
    max_voxels: int,
) -> Mask:
    """The mask of a study, from its file or by its rule.

    Args:
        study: its mask's file, labels and rule.
        protocol: the tissues that the mask must have room for.
        sequences: those present.
        reference: the image of the first of them.
        image: all of them, on its grid (M, X, Y, Z).
        frame: which frame of a 4-D mask.
        max_voxels: a larger file is refused before it is read.

    Raises:
        StudyError: ``E_MASK_*``, ``E_GRID``, or a code of ``nifti.read``.
    """
    if study.mask_rule == "nonzero":
        mask = np.isfinite(reference.data) & (reference.data != 0)
        facts: dict[str, Any] = {"rule": f"voxels of {sequences[0]} that are not 0"}
        name, notes = reference.name, []
        if mask.all():
            notes = [f"W_MASK: no voxel of {name} is 0, so the mask is the whole image; is it skull-stripped?"]
    elif study.mask_rule == "auto":
        mask, facts, notes, name = _found(protocol, sequences, reference, image)
    else:
        mask, facts, notes, name = _from_file(study, reference, frame=frame, max_voxels=max_voxels)
    if not mask.any():
        labels = f" with any of the values {_listed(study.mask_labels)}" if study.mask_labels else ""
        remedy = f"Draw the {protocol.mask}, or name the values that mean it with --mask-labels"
        raise StudyError("E_MASK_EMPTY", f"the mask {name} has no voxel{labels} on the grid of {sequences[0]}", remedy)
    needed = MIN_VOXELS_PER_TISSUE * len(protocol.components(sequences))
    if (found := int(mask.sum())) < needed:
        message = f"the mask {name} has {found} voxels, but {needed} are needed"
        raise StudyError("E_MASK_SMALL", message, f"Check that it covers the {protocol.mask}")
    return Mask(mask, facts, tuple(notes))


def _found(
    protocol: Protocol, sequences: tuple[str, ...], reference: Volume, image: NDArray[np.floating[Any]]
) -> tuple[NDArray[np.bool_], dict[str, Any], list[str], str]:
    found = FINDERS[protocol.mask_finder or ""](image, protocol, sequences, reference.spacing_mm)
    sure = f"{found.confidence:.2f}"
    if found.confidence < LEAST_CONFIDENCE:
        message = f"no mask was given, and the {protocol.mask} was not found surely enough ({sure} of 1)"
        remedy = "Draw the mask and give it as a file; add the sequences that are missing, if there are any"
        raise StudyError("E_MASK_UNSURE", message, remedy)
    note = f"W_MASK_AUTO: the {protocol.mask} was found from the images, with confidence {sure}; look at its outline"
    facts = {"rule": "found from the images", "confidence": round(found.confidence, 4)}
    return found.mask, facts, [note], "found from the images"


def _from_file(
    study: Study, reference: Volume, *, frame: int | None, max_voxels: int
) -> tuple[NDArray[np.bool_], dict[str, Any], list[str], str]:
    if study.mask is None:
        raise StudyError("E_MASK_NONE", "no mask was found", "Add a mask file, or use --mask nonzero")
    volume = nifti.read(Path(study.mask), frame=frame, max_voxels=max_voxels, dtype=np.float64)
    whole = np.rint(volume.data)
    good = np.isfinite(volume.data) & np.isclose(volume.data, whole, rtol=0, atol=1e-3)
    if not good.all():
        odd = volume.data[~good].flat[0]
        remedy = "Threshold the mask, or resample it with nearest neighbour"
        raise StudyError("E_MASK_FRACTIONAL", f"the mask {volume.name} holds {odd:g}, not a whole number", remedy)
    chosen = np.isin(whole, study.mask_labels) if study.mask_labels else whole != 0
    binary = Volume(
        chosen.astype(np.float64), volume.affine, volume.header, volume.source_shape, volume.name, volume.sha256
    )
    data, note = grid.on_grid(binary, reference, nearest=True)
    facts = grid.facts(volume, resampled=note is not None)
    facts["values"] = [float(v) for v in study.mask_labels] or "any but 0"
    notes = [f"{w} (mask)" for w in volume.warnings] + ([note] if note else [])
    return data > 0.5, facts, notes, volume.name


def without_padding(
    image: NDArray[np.float32], mask: NDArray[np.bool_], tissues: int
) -> tuple[NDArray[np.bool_], list[str]]:
    """The mask without the zeros that lie between it and the image, as after another tool's skull stripping."""
    padded = padding(image, mask)
    share = padded.sum() / mask.sum()
    if share == 0 or int((mask & ~padded).sum()) < MIN_VOXELS_PER_TISSUE * tissues:
        return mask, []
    note = f"W_PADDING: {100 * share:.1f} % of the mask is 0 in every sequence at its border; it has no label"
    return mask & ~padded, [note]


def _listed(values: tuple[float, ...]) -> str:
    return ", ".join(f"{value:g}" for value in values)
