"""What a run leaves of a patient, read back, and segmentations made by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from numpy.typing import NDArray

from monai_deepgmm import protocol
from monai_deepgmm.images.volume import Volume
from monai_deepgmm.patients import discovery
from monai_deepgmm.patients.study import Study
from monai_deepgmm.results.segmentation import Segmentation


def sidecar(out: Path, patient: str = "pat1") -> dict[str, Any]:
    return json.loads((out / patient / f"{patient}_dseg.json").read_text(encoding="utf-8"))


def row(out: Path, patient: str = "pat1") -> dict[str, Any]:
    return json.loads((out / patient / f"{patient}_row.json").read_text(encoding="utf-8"))


def image_of(out: Path, what: str = "dseg", patient: str = "pat1") -> nib.Nifti1Image:
    return nib.load(out / patient / f"{patient}_{what}.nii.gz")


def labels_of(out: Path, patient: str = "pat1") -> NDArray[np.uint8]:
    return np.asanyarray(image_of(out, "dseg", patient).dataobj)


def study(folder: Path, patient: str = "pat1") -> Study:
    (found,) = discovery.find(folder, protocol.load("infarct"), patients=[patient]).studies
    return found


def segmentation(
    labels: NDArray[np.generic],
    *,
    patient: str = "p",
    name: str = "infarct",
    sequences: tuple[str, ...] = (),
    images: NDArray[np.float32] | None = None,
    affine: NDArray[np.float64] | None = None,
    **changes: Any,
) -> Segmentation:
    """One with these labels, certain of each; unless said otherwise on voxels of 2 × 2 × 5 mm = 0.02 ml."""
    chosen = protocol.load(name)
    sequences = sequences or chosen.sequences
    tissues = chosen.visible(sequences)
    given = np.zeros((len(sequences), *labels.shape), np.float32) if images is None else images
    affine = np.diag([2.0, 2.0, 5.0, 1.0]) if affine is None else affine
    return Segmentation(
        **{
            "patient": patient,
            "protocol": chosen,
            "tissues": tissues,
            "images": dict(zip(sequences, given, strict=True)),
            "mask": labels > 0,
            "labels": labels.astype(np.uint8),
            "probabilities": np.stack([labels == t.index for t in tissues]).astype(np.float32),
            "reference": Volume(given[0], affine, nib.Nifti1Header(), labels.shape, "p.nii", ""),
            "slice_axis": 2,
            "sidecar": {},
            "warnings": (),
            **changes,
        }
    )
