"""μ_data: the mean intensity of each tissue in each sequence, from patients with labels (S §4.2)."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import numpy as np
from monai.transforms import Compose

from monai_deepgmm.errors import StudyError, UsageError
from monai_deepgmm.images import labels
from monai_deepgmm.images.preparation import prepare
from monai_deepgmm.images.preprocessing import Preprocessing
from monai_deepgmm.methods.known_means import Means
from monai_deepgmm.patients.study import Study
from monai_deepgmm.protocol import Protocol


def compute(
    studies: Sequence[Study], protocol: Protocol, preprocessing: Preprocessing | None = None
) -> tuple[Means, dict[str, StudyError]]:
    """Averages each image's class means over all images of the labelled patients.

    An image (slice or volume) counts for a tissue if it holds it. Use training patients only: means that saw the
    patients they are scored on flatter the score.

    Args:
        studies: patients, each with reference labels.
        protocol: its normalisation is the one the means are good for.
        preprocessing: of the scans; means are good for the same only.

    Returns:
        The means on the normalised scale, and the patients that could not be used with the reason.

    Raises:
        UsageError: no patient had usable labels, or a tissue of the protocol occurs in none.
    """
    preprocessing = preprocessing or Preprocessing()
    steps = preprocessing.transforms(protocol)
    values: dict[tuple[str, str], list[float]] = defaultdict(list)
    unused: dict[str, StudyError] = {}
    n_slices = 0
    for study in studies:
        try:
            rows, count = _one(study, protocol, steps)
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
    return Means(protocol.name, preprocessing.normalisation(protocol), means, n_slices), unused


def _one(study: Study, protocol: Protocol, steps: Compose) -> tuple[dict[tuple[str, str], list[float]], int]:
    """One patient: (tissue, sequence) → a mean per image that holds the tissue, and how many images there are."""
    patient, crops, _ = prepare(study, steps)
    marked = labels.read(study, protocol, patient.sequences, like=patient.reference).labels
    cut = crops.cut(marked)
    found: dict[tuple[str, str], list[float]] = defaultdict(list)
    for image, mask, label in zip(crops.image.numpy(), crops.mask.numpy() > 0, cut, strict=True):
        for tissue in protocol.components(patient.sequences):
            chosen = mask[0] & (label == tissue.index)
            if chosen.any():
                for channel, sequence in zip(image, patient.sequences, strict=True):
                    found[tissue.name, sequence].append(float(channel[chosen].mean()))
    return found, len(cut)
