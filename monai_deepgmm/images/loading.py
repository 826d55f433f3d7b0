"""From a study's paths to arrays on one grid: load by key, compare grids, resample on record, make the mask.

What is wrong with a patient is found here and nowhere later.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from monai_deepgmm.errors import StudyError
from monai_deepgmm.images import nifti
from monai_deepgmm.images.measured import padding
from monai_deepgmm.images.nifti import DEFAULT_MAX_VOXELS, Volume
from monai_deepgmm.patients.study import Study
from monai_deepgmm.protocol import Protocol

#: A mask needs at least this many voxels for each tissue.
MIN_VOXELS_PER_TISSUE = 10


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
    """

    patient: str
    sequences: tuple[str, ...]
    image: NDArray[np.float32]
    mask: NDArray[np.bool_]
    reference: Volume
    inputs: dict[str, dict[str, Any]]
    warnings: tuple[str, ...]


def load(study: Study, protocol: Protocol, *, frame: int | None = None, max_voxels: int = DEFAULT_MAX_VOXELS) -> Scan:
    """Loads and checks one patient.

    Args:
        study: the files.
        protocol: which sequence is the reference, which are needed.
        frame: which frame of a 4-D file, counted from 0.
        max_voxels: a larger image is refused before it is read.

    Raises:
        StudyError: with the code and the remedy of whatever is wrong; the codes are those of ``nifti.read``, the
            study's own problems, and ``E_IDENTICAL``, ``E_GRID``, ``E_MASK_*``, ``E_NONFINITE``, ``E_CONSTANT``.
    """
    for problem in study.problems:
        raise StudyError(problem.code, problem.message, problem.remedy)
    sequences = tuple(s for s in protocol.sequences if s in study.images)
    volumes = {s: nifti.read(study.images[s], frame=frame, max_voxels=max_voxels) for s in sequences}
    _refuse_identical(volumes)
    reference = volumes[sequences[0]]
    warnings = [f"{w} ({s})" for s, volume in volumes.items() for w in volume.warnings]
    warnings += _about_spacing(reference)
    channels, inputs = [], {}
    for sequence, volume in volumes.items():
        data, note = _on_grid(volume, reference, nearest=False)
        channels.append(data)
        inputs[sequence] = _facts(volume, resampled=note is not None)
        warnings += [note] if note else []
    image = np.stack(channels)
    mask, mask_facts, notes = _mask(study, protocol, sequences, reference, frame=frame, max_voxels=max_voxels)
    inputs |= mask_facts
    image, broken = _finite(image, mask, sequences)
    mask, beyond = _without_padding(image, mask, len(protocol.components(sequences)))
    warnings += [*notes, *broken, *beyond]
    _refuse_constant(image, mask, sequences)
    return Scan(study.patient, sequences, image, mask, reference, inputs, tuple(warnings))


def _about_spacing(volume: Volume) -> list[str]:
    """A warning where the header's voxel sizes contradict the affine that grids and volumes are computed with."""
    stated = np.abs(np.asarray(volume.header["pixdim"][1:4], dtype=float))
    used = np.array(volume.spacing_mm)
    if volume.header["sform_code"] <= 0 or any("W_UNITS" in w for w in volume.warnings):
        return []
    if not np.isfinite(stated).all() or (stated == 0).any() or np.allclose(stated, used, rtol=0.01):
        return []
    listed = [" × ".join(f"{size:.3g}" for size in sizes) for sizes in (used, stated)]
    return [
        f"W_SPACING: {volume.name} has voxels of {listed[0]} mm by its sform, but {listed[1]} by pixdim; volumes "
        "follow the sform"
    ]


def _facts(volume: Volume, *, resampled: bool) -> dict[str, Any]:
    return {
        "file": volume.name,
        "sha256": volume.sha256,
        "shape": list(volume.source_shape),
        "spacing_mm": [round(s, 4) for s in volume.spacing_mm],
        "resampled": resampled,
    }


def _refuse_identical(volumes: dict[str, Volume]) -> None:
    names = list(volumes)
    for i, first in enumerate(names):
        for second in names[i + 1 :]:
            a, b = volumes[first], volumes[second]
            if a.sha256 == b.sha256 or np.array_equal(a.data, b.data, equal_nan=True):
                found = f"{first} ({a.name}) and {second} ({b.name}) hold the same data"
                raise StudyError("E_IDENTICAL", found, "Find the sequence that was overwritten, or remove the copy")


def _on_grid(volume: Volume, reference: Volume, *, nearest: bool) -> tuple[NDArray[np.floating[Any]], str | None]:
    """A volume's data on the reference's grid, and a warning where it had to be resampled."""
    if nifti.grids_equal(volume, reference):
        return volume.data, None
    if not nifti.overlaps(volume, reference):
        remedy = "Check that both belong to the same patient and examination, and that their headers are right"
        raise StudyError("E_GRID", f"{volume.name} does not overlap {reference.name} in space", remedy)
    how = "nearest neighbour" if nearest else "linear interpolation"
    note = f"W_RESAMPLED: {volume.name} lies on another grid than {reference.name}; it was resampled by {how}"
    return nifti.resample(volume, reference, nearest=nearest), note


def _mask(
    study: Study,
    protocol: Protocol,
    sequences: tuple[str, ...],
    reference: Volume,
    *,
    frame: int | None,
    max_voxels: int,
) -> tuple[NDArray[np.bool_], dict[str, dict[str, Any]], list[str]]:
    """The mask on the reference's grid, what file it came from, and warnings."""
    if study.mask_rule == "nonzero":
        mask = np.isfinite(reference.data) & (reference.data != 0)
        facts: dict[str, dict[str, Any]] = {"mask": {"rule": f"voxels of {sequences[0]} that are not 0"}}
        name, notes = reference.name, []
        if mask.all():
            notes = [f"W_MASK: no voxel of {name} is 0, so the mask is the whole image; is it skull-stripped?"]
    else:
        mask, facts, notes, name = _mask_from_file(study, reference, frame=frame, max_voxels=max_voxels)
    if not mask.any():
        labels = f" with any of the values {_listed(study.mask_labels)}" if study.mask_labels else ""
        remedy = f"Draw the {protocol.mask}, or name the values that mean it with --mask-labels"
        raise StudyError("E_MASK_EMPTY", f"the mask {name} has no voxel{labels} on the grid of {sequences[0]}", remedy)
    needed = MIN_VOXELS_PER_TISSUE * len(protocol.components(sequences))
    if (found := int(mask.sum())) < needed:
        message = f"the mask {name} has {found} voxels, but {needed} are needed"
        raise StudyError("E_MASK_SMALL", message, f"Check that it covers the {protocol.mask}")
    return mask, facts, notes


def _mask_from_file(
    study: Study, reference: Volume, *, frame: int | None, max_voxels: int
) -> tuple[NDArray[np.bool_], dict[str, dict[str, Any]], list[str], str]:
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
    data, note = _on_grid(binary, reference, nearest=True)
    facts = _facts(volume, resampled=note is not None)
    facts["values"] = [float(v) for v in study.mask_labels] or "any but 0"
    notes = [f"{w} (mask)" for w in volume.warnings] + ([note] if note else [])
    return data > 0.5, {"mask": facts}, notes, volume.name


def _listed(values: tuple[float, ...]) -> str:
    return ", ".join(f"{value:g}" for value in values)


def _finite(
    image: NDArray[np.floating[Any]], mask: NDArray[np.bool_], sequences: tuple[str, ...]
) -> tuple[NDArray[np.float32], list[str]]:
    """The image with 0 for what is not finite outside the mask, and a warning for each such sequence."""
    notes = []
    broken = ~np.isfinite(image)
    for channel, sequence in zip(broken, sequences, strict=True):
        if inside := int((channel & mask).sum()):
            message = f"{inside} voxels of {sequence} inside the mask are NaN or infinite"
            raise StudyError("E_NONFINITE", message, "Export the image again, or take these voxels out of the mask")
        if outside := int(channel.sum()):
            notes.append(f"W_NONFINITE: {outside} voxels of {sequence} outside the mask are NaN or infinite; set to 0")
    return np.where(broken, 0, image).astype(np.float32), notes


def _without_padding(
    image: NDArray[np.float32], mask: NDArray[np.bool_], tissues: int
) -> tuple[NDArray[np.bool_], list[str]]:
    """The mask without the zeros that lie between it and the image, as after another tool's skull stripping."""
    padded = padding(image, mask)
    share = padded.sum() / mask.sum()
    if share == 0 or int((mask & ~padded).sum()) < MIN_VOXELS_PER_TISSUE * tissues:
        return mask, []
    note = f"W_PADDING: {100 * share:.1f} % of the mask is 0 in every sequence at its border; it has no label"
    return mask & ~padded, [note]


def _refuse_constant(image: NDArray[np.float32], mask: NDArray[np.bool_], sequences: tuple[str, ...]) -> None:
    for channel, sequence in zip(image, sequences, strict=True):
        inside = channel[mask]
        if inside.min() == inside.max():
            message = f"{sequence} has the value {inside[0]:g} in every voxel inside the mask"
            remedy = "Check that the mask lies on the organ, and that the sequence is the right one"
            raise StudyError("E_CONSTANT", message, remedy)
