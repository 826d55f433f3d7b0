"""From a study's paths to arrays on one grid: load by key, bring them together, check.

What is wrong with a patient is found here and nowhere later.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from monai_deepgmm.errors import StudyError
from monai_deepgmm.images import alignment, coverage, grid, image_file, mask_cavities, mask_edges, stack_size
from monai_deepgmm.images import mask as masks
from monai_deepgmm.images.coverage import Coverage
from monai_deepgmm.images.header import DEFAULT_MAX_VOXELS
from monai_deepgmm.images.volume import Volume
from monai_deepgmm.patients.study import Study
from monai_deepgmm.protocol import Protocol
from monai_deepgmm.registration import Align


@dataclass(frozen=True, eq=False)
class Scan:
    """One patient's sequences and mask, checked, on the reference sequence's grid.

    Attributes:
        patient: the id.
        sequences: those present, in the protocol's order of reference.
        image: (M, X, Y, Z) float32, one channel per sequence, finite everywhere.
        mask: (X, Y, Z) bool, never empty.
        reference: the first sequence's volume: grid and source header.
        inputs: sequence (or "mask") → {"file", "sha256", "shape", "spacing_mm", "resampled"}.
        warnings: each begins with its code.
        coverage: where each sequence was measured; None: everywhere.
        alignment: how sequences were brought together, for the sidecar; None where that was not looked for.
        overlooked: sequence that is missing → what to do if an unused file is that.
    """

    patient: str
    sequences: tuple[str, ...]
    image: NDArray[np.float32]
    mask: NDArray[np.bool_]
    reference: Volume
    inputs: dict[str, dict[str, Any]]
    warnings: tuple[str, ...]
    coverage: Coverage | None = None
    alignment: dict[str, Any] | None = None
    overlooked: Mapping[str, str] = field(default_factory=dict)


def load(
    study: Study,
    protocol: Protocol,
    *,
    frame: int | None = None,
    max_voxels: int = DEFAULT_MAX_VOXELS,
    align: Align = "off",
) -> Scan:
    """Loads and checks one patient.

    Args:
        study: the files.
        protocol: which sequence is the reference, which are needed.
        frame: which frame of a 4-D file, counted from 0.
        max_voxels: of sequences and mask together; more are refused before any is read.
        align: how sequences are brought together.

    Raises:
        StudyError: with the code and the remedy of whatever is wrong; the codes are those of ``image_file.read``, the
            study's own problems, and ``E_IDENTICAL``, ``E_GRID``, ``E_MASK_*``, ``E_NONFINITE``, ``E_CONSTANT``.
    """
    for problem in study.problems:
        raise StudyError(problem.code, problem.message, problem.remedy)
    sequences = tuple(s for s in protocol.sequences if s in study.images)
    stack_size.check(study, sequences, frame=frame, max_voxels=max_voxels)
    read = functools.partial(image_file.read, frame=frame, max_voxels=max_voxels, spacing=study.spacing)
    volumes = {s: read(study.images[s]) for s in sequences}
    _refuse_identical(volumes)
    reference = volumes[sequences[0]]
    warnings = [f"{w} ({s})" for s, volume in volumes.items() for w in volume.warnings]
    placed = {s: grid.on_grid(volume, reference, nearest=False) for s, volume in volumes.items()}
    find_mask = functools.partial(masks.read, study, protocol, volumes, frame=frame, max_voxels=max_voxels)
    image = np.stack([one.data for one in placed.values()])
    found = find_mask(image)
    aligned = alignment.bring_together(volumes, placed, found.voxels, protocol, align)
    moved = [s for s in sequences if aligned.placed[s] is not placed[s]]
    if moved:
        placed, image = aligned.placed, np.stack([one.data for one in aligned.placed.values()])
        seen_better = protocol.unit == "slice" and study.mask_rule in ("auto", "model")
        found = find_mask(image) if seen_better else found
    resampled = {s: bool(one.note or one.taken) or s in moved for s, one in placed.items()}
    inputs = {s: grid.facts(volume, resampled=resampled[s]) for s, volume in volumes.items()} | {"mask": found.facts}
    for one in placed.values():
        share = one.inside[found.voxels].mean()
        warnings += [f"W_RESAMPLED: {one.note} and covers {100 * share:.1f} % of the mask"] if one.note else []
        warnings += [f"W_PLACE: {one.taken}"] if one.taken else []
    image, broken = _finite(image, found.voxels, sequences)
    axis = grid.slice_axis(reference.spacing_mm)
    about = (image, found.voxels, reference.spacing_mm, axis, protocol)
    edges = [*mask_edges.about(*about), *mask_cavities.about(*about, sequences)]
    stacked, tissues = axis if protocol.unit == "slice" else None, len(protocol.components(sequences))
    mask, beyond = masks.without_padding(image, found.voxels, tissues, stacked)
    _refuse_constant(image, mask, sequences)
    inside = np.stack([one.inside for one in placed.values()])
    seen = coverage.find(image, mask, inside, axis)
    mask, blank = coverage.without_blank(mask, seen)
    warnings += [*found.warnings, *aligned.notes, *edges, *broken, *beyond, *blank, *seen.notes(mask, sequences)]
    reference = dataclasses.replace(reference, data=image[0])  # one copy of a head is enough
    known = (seen, aligned.facts, study.overlooked)
    return Scan(study.patient, sequences, image, mask, reference, inputs, tuple(warnings), *known)


def _refuse_identical(volumes: dict[str, Volume]) -> None:
    names = list(volumes)
    for i, first in enumerate(names):
        for second in names[i + 1 :]:
            a, b = volumes[first], volumes[second]
            if a.sha256 == b.sha256 or np.array_equal(a.data, b.data, equal_nan=True):
                found = f"{first} ({a.name}) and {second} ({b.name}) hold the same data"
                raise StudyError("E_IDENTICAL", found, "Find the sequence that was overwritten, or remove the copy")


def _finite(
    image: NDArray[np.floating[Any]], mask: NDArray[np.bool_], sequences: tuple[str, ...]
) -> tuple[NDArray[np.float32], list[str]]:
    """The image, changed, with 0 for what is not finite outside the mask, and a warning for each such sequence."""
    notes = []
    broken = ~np.isfinite(image)
    for channel, sequence in zip(broken, sequences, strict=True):
        if inside := int((channel & mask).sum()):
            message = f"{inside} voxels of {sequence} inside the mask are NaN or infinite"
            raise StudyError("E_NONFINITE", message, "Export the image again, or take these voxels out of the mask")
        if outside := int(channel.sum()):
            notes.append(f"W_NONFINITE: {outside} voxels of {sequence} outside the mask are NaN or infinite; set to 0")
    if broken.any():
        image[broken] = 0
    return image.astype(np.float32, copy=False), notes


def _refuse_constant(image: NDArray[np.float32], mask: NDArray[np.bool_], sequences: tuple[str, ...]) -> None:
    for channel, sequence in zip(image, sequences, strict=True):
        inside = channel[mask]
        if inside.min() == inside.max():
            message = f"{sequence} has the value {inside[0]:g} in every voxel inside the mask"
            remedy = "Check that the mask lies on the organ, and that the sequence is the right one"
            raise StudyError("E_CONSTANT", message, remedy)
