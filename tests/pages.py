"""Patients made by hand, as pages show them, and their folders as the batch leaves them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import outcomes

from monai_deepgmm import protocol
from monai_deepgmm.results import measure, mosaic, report, sprites
from monai_deepgmm.results.segmentation import Segmentation

FINGERPRINT = "0123456789abcdef" * 4
LPS = np.diag([-1.0, -1.0, 1.0, 1.0])
C, S = np.cos(np.deg2rad(40)), np.sin(np.deg2rad(40))
OBLIQUE = np.array([[C, -S, 0, 0], [S, C, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]])


def hearts(
    patient: str = "sub-1", *, name: str = "infarct", sequences: tuple[str, ...] = (), affine: np.ndarray | None = None
) -> Segmentation:
    """A ring around a pool in slices 1 to 3 of 5, 1.5 × 1.5 × 8 mm; edema in a quarter of the ring, no scar."""
    chosen = protocol.load(name)
    sequences = sequences or chosen.sequences
    x, y, z = np.meshgrid(np.arange(60), np.arange(48), np.arange(5), indexing="ij")
    radius = np.hypot(x - 30, y - 24)
    labels = np.where(radius < 16, 2, 0)
    labels[(radius < 16) & (x > 30) & (y > 24)] = 3
    labels[radius < 9] = 1
    labels[(z == 0) | (z == 4)] = 0
    noise = np.random.default_rng(0).normal(0, 5, (len(sequences), *labels.shape))
    sidecar = {
        "method": "svgmm",
        "sequences": list(sequences),
        "tissues": [{"name": t.name, "index": t.index, "color": t.color} for t in chosen.visible(sequences)],
        "naming": {"rule": "by signature", "certainty": 0.9, "units": [{"slice": 1, "certainty": 0.875}]},
        "fit": {"units": [{"slice": 1, "nll": 2.5, "trace": [4.0, 3.0, 2.5], "converged": False, "iterations": 3}]},
        "inputs": {"LGE": {"file": "sub-1_LGE.nii.gz", "sha256": "ab" * 32}},
        "versions": {"monai-deepgmm": "0.1.0"},
        "fingerprint": FINGERPRINT,
        "configuration": {"method": "svgmm", "note": "<b>"},
    }
    return outcomes.segmentation(
        labels,
        patient=patient,
        name=name,
        sequences=sequences,
        images=(100.0 * labels + noise).astype(np.float32),
        affine=LPS @ np.diag([1.5, 1.5, 8.0, 1.0]) if affine is None else affine,
        sidecar=sidecar,
        warnings=("W_QFORM: the sform was used",),
    )


def row_of(segmentation: Segmentation, **changes: Any) -> dict[str, Any]:
    row = {"patient": segmentation.patient, "status": "ok", "code": "", "message": "", "seconds": 1.5}
    row |= {"method": "svgmm", "warnings": list(segmentation.warnings), "fingerprint": FINGERPRINT}
    row["slices"] = [s._asdict() for s in measure.measure_slices(segmentation)]
    return row | changes


def failed(patient: str, **changes: Any) -> dict[str, Any]:
    row = {"patient": patient, "status": "failed", "code": "E_GZIP", "message": "x_T2.nii.gz: cut <short>"}
    return row | {"remedy": "Copy it again", "seconds": 0.1, "method": "svgmm", "warnings": []} | changes


def page_of(segmentation: Segmentation, **changes: Any) -> str:
    rows = [m._asdict() for m in measure.measure(segmentation)]
    return report.page(row_of(segmentation, **changes), segmentation.sidecar, rows, report.preview(segmentation))


def write(out: Path, row: dict[str, Any], segmentation: Segmentation | None = None, *, reference: bool = False) -> Path:
    """A patient's folder as the batch leaves it, without the page."""
    name = row["patient"]
    folder = out / name
    folder.mkdir(parents=True)
    rows = [m._asdict() for m in measure.measure(segmentation)] if segmentation else []
    (folder / f"{name}_row.json").write_text(json.dumps(row | {"measurements": rows}))
    if segmentation:
        (folder / f"{name}_dseg.json").write_text(json.dumps(segmentation.sidecar))
        (folder / f"{name}_preview.png").write_bytes(report.preview(segmentation))
        (folder / f"{name}_thumb.png").write_bytes(mosaic.thumbnail(segmentation))
        known = segmentation.labels if reference else None
        (folder / f"{name}_viewer.json").write_bytes(sprites.as_json(sprites.sprites(segmentation, known)))
    return folder
