"""Manual labels as a protocol's tissues, on another volume's grid."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from monai_deepgmm.errors import StudyError
from monai_deepgmm.images import image_file, voxelwise
from monai_deepgmm.images import volume as volumes
from monai_deepgmm.patients.study import Study
from monai_deepgmm.protocol import Protocol


class Truth(NamedTuple):
    """What a patient's reference labels say.

    Attributes:
        labels: (X, Y, Z) indices of tissues, 0 elsewhere.
        warnings: each begins with its code.
    """

    labels: npt.NDArray[np.int64]
    warnings: tuple[str, ...]


def read(study: Study, protocol: Protocol, sequences: Sequence[str], *, like: volumes.Volume) -> Truth:
    """Reads a patient's reference labels; tissues that the sequences cannot show join those that the protocol names.

    Args:
        study: whose labels, and what their values mean.
        protocol: the tissues.
        sequences: those that the labels are compared on.
        like: the grid wanted; labels on another one are resampled by nearest neighbour, with a warning.

    Raises:
        StudyError: the study's own problems with them; ``E_TRUTH`` for no labels, values that are not whole or none
            that means a tissue; ``E_GRID`` for a file that does not overlap ``like``; and what ``nifti.read`` finds.
    """
    for problem in study.label_problems:
        raise StudyError(problem.code, problem.message, problem.remedy)
    if study.truth is None:
        why = "".join(f"; {p.code}: {p.message}" for p in study.problems)
        raise StudyError(
            "E_TRUTH", f"no reference labels were found{why}", "Add a file of them, or leave this patient out"
        )
    volume = image_file.read(study.truth, spacing=study.spacing, beside=like.data.size, dtype=np.float64)
    name, data, warnings = f"{volume.name} (reference labels)", volume.data, list(volume.warnings)
    if volumes.grids_equal(volume, like):
        pass
    elif same := voxelwise.note(volume, like, labels=True):
        warnings.append(f"W_PLACE: {same}")
    else:
        if not volumes.overlaps(volume, like):
            remedy = "Check that both belong to the same patient and examination"
            raise StudyError("E_GRID", f"{name} does not overlap {like.name}", remedy)
        data = volumes.resample(volume, like, nearest=True)
        warnings.append(f"W_GRID: {name} lies on another grid; it was resampled by nearest neighbour")
    meaning = study.truth_labels or {t.index: t.index for t in protocol.tissues}
    unknown = _unknown(data, meaning, name)
    if odd := _worth_telling(unknown, study):
        warnings.append(f"W_TRUTH: {name} holds values that are no tissue and count as background: {', '.join(odd)}")
    whole, merged = np.rint(data), protocol.merged(sequences)
    labels = np.zeros(data.shape, dtype=np.int64)
    for value, index in meaning.items():
        labels[whole == value] = merged.get(index, 0)
    return Truth(labels, tuple(warnings))


def _worth_telling(unknown: Sequence[int], study: Study) -> list[str]:
    """Of the values that mean no tissue, those of which nobody said that they mean something else."""
    said = study.truth_names
    if said is None:
        return [] if study.truth_labels else [str(value) for value in unknown[:10]]
    odd = [value for value in unknown if value not in said.elsewhere][:10]
    return [f"{value} ({said.others[value]})" if value in said.others else f"{value} (not named)" for value in odd]


def _unknown(data: npt.NDArray[np.floating[Any]], meaning: Mapping[int, int], name: str) -> list[int]:
    """The values other than 0 that mean no tissue.

    Raises:
        StudyError: values are not whole, or all of them are unknown.
    """
    values = np.unique(data[data != 0])
    if (broken := values[~np.isclose(values, np.rint(values), rtol=0, atol=1e-3)]).size:
        message = f"{name} holds {broken[:5].tolist()}; expected whole numbers"
        raise StudyError("E_TRUTH", message, "Save the labels unscaled, or resample them by nearest neighbour")
    unknown = [int(value) for value in np.rint(values) if value not in meaning]
    if len(unknown) == len(values):
        message = f"{name} holds no tissue, but the values {[0, *unknown[:9]]}; expected some of {sorted(meaning)}"
        raise StudyError(
            "E_TRUTH", message, "Say what each value means with --truth-labels, or check the layout and the protocol"
        )
    return unknown
