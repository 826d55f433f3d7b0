"""One study: load, solve, name the tissues, put them back on the source grid."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from monai_deepgmm.nifti import Volume
from monai_deepgmm.protocol import Protocol, Tissue


@dataclass(frozen=True)
class Segmentation:
    """What one patient's segmentation produced, on the reference sequence's grid.

    Attributes:
        patient: the id.
        protocol: what was looked for.
        tissues: the tissues that the present sequences can show, in order of index.
        images: sequence → intensities (X, Y, Z), resampled to the reference where needed, in order of reference.
        mask: (X, Y, Z) bool.
        labels: (X, Y, Z) uint8, the tissues' indices, 0 outside the mask.
        probabilities: (K, X, Y, Z) float32 in order of ``tissues``, 0 outside the mask.
        reference: the reference sequence's volume: geometry and source header.
        slice_axis: the array axis along which slices are stacked.
        sidecar: provenance, ready for JSON.
        warnings: each begins with its code.
    """

    patient: str
    protocol: Protocol
    tissues: tuple[Tissue, ...]
    images: dict[str, np.ndarray]
    mask: np.ndarray
    labels: np.ndarray
    probabilities: np.ndarray
    reference: Volume
    slice_axis: int
    sidecar: dict[str, Any]
    warnings: tuple[str, ...]
