"""μ_data: the mean intensity of each tissue in each sequence, from patients with labels (S §4.2)."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Sequence

import numpy as np

from monai_deepgmm.errors import StudyError, UsageError
from monai_deepgmm.images import cropping as transforms
from monai_deepgmm.images import labels as truth
from monai_deepgmm.images import loading as scan
from monai_deepgmm.images.nifti import DEFAULT_MAX_VOXELS
from monai_deepgmm.methods.config import Means
from monai_deepgmm.patients.study import Study
from monai_deepgmm.protocol import Protocol


def compute(
    studies: Sequence[Study],
    protocol: Protocol,
    *,
    frame: int | None = None,
    max_voxels: int = DEFAULT_MAX_VOXELS,
) -> tuple[Means, dict[str, StudyError]]:
    """Averages each image's class means over all images of the labelled patients.

    An image (slice or volume) counts for a tissue if it holds it. Use training patients only: means that saw the
    patients they are scored on flatter the score.

    Args:
        studies: patients, each with a truth.
        protocol: its normalisation is the one the means are good for.
        frame: which frame of a 4-D file.
        max_voxels: larger images are refused.

    Returns:
        The means on the normalised scale, and the patients that could not be used with the reason.

    Raises:
        UsageError: no patient had usable labels, or a tissue of the protocol occurs in none.
    """
    values: dict[tuple[str, str], list[float]] = defaultdict(list)
    unused: dict[str, StudyError] = {}
    n_slices = 0
    for study in studies:
        try:
            rows, count = _one(study, protocol, frame=frame, max_voxels=max_voxels)
        except StudyError as error:
            unused[study.patient] = error
            continue
        n_slices += count
        for key, found in rows.items():
            values[key] += found
    means = {
        t.name: {s: round(float(np.mean(values[t.name, s])), 6) for s in protocol.sequences if values[t.name, s]}
        for t in protocol.tissues
    }
    if n_slices == 0:
        reasons = "; ".join(f"{patient}: {error}" for patient, error in list(unused.items())[:3])
        raise UsageError(f"no patient has labels that can be used ({reasons or 'no patient'})")
    if absent := [name for name, row in means.items() if not row]:
        raise UsageError(f"no patient has a voxel labelled {', '.join(absent)}; add one that has")
    return Means(protocol.name, protocol.normalisation, means, n_slices), unused


def as_json(means: Means) -> bytes:
    """What ``config.read_means`` reads."""
    content = {
        "protocol": means.protocol,
        "normalisation": means.normalisation,
        "means": means.means,
        "n_slices": means.n_slices,
    }
    return (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode()


def _one(
    study: Study, protocol: Protocol, *, frame: int | None, max_voxels: int
) -> tuple[dict[tuple[str, str], list[float]], int]:
    """One patient: (tissue, sequence) → a mean per image that holds the tissue, and how many images there are."""
    patient = scan.load(study, protocol, frame=frame, max_voxels=max_voxels)
    labels = truth.read(study, protocol, patient.sequences, like=patient.reference).labels
    units = transforms.units(patient, protocol)
    cut = units.cut(labels)
    found: dict[tuple[str, str], list[float]] = defaultdict(list)
    for image, mask, label in zip(units.image.numpy(), units.mask.numpy() > 0, cut, strict=True):
        for tissue in protocol.visible(patient.sequences):
            chosen = mask[0] & (label == tissue.index)
            if chosen.any():
                for channel, sequence in zip(image, patient.sequences, strict=True):
                    found[tissue.name, sequence].append(float(channel[chosen].mean()))
    return found, len(cut)
