"""The masks of many studies, found from the images and written to be looked at, corrected, and used again."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import logging
from pathlib import Path
from typing import Any

import numpy as np

from monai_deepgmm import batch
from monai_deepgmm.errors import DISK_FULL, UsageError, exit_code
from monai_deepgmm.images import atomic_files, loading, nifti
from monai_deepgmm.images.nifti import DEFAULT_MAX_VOXELS
from monai_deepgmm.patients import given_masks
from monai_deepgmm.patients.study import Cohort, Study
from monai_deepgmm.protocol import Protocol
from monai_deepgmm.registration import Align
from monai_deepgmm.results import outputs
from monai_deepgmm.wording import shown

logger = logging.getLogger("monai_deepgmm")

#: The table of all patients, and its columns.
TABLE = "masks.tsv"
COLUMNS = ("patient", "status", "code", "message", "confidence", "slices", "slices_without", "volume_ml", "warnings")
CORRECTED = "the mask was changed since it was written, and is kept"

Row = dict[str, Any]


def run(
    cohort: Cohort,
    out: Path,
    protocol: Protocol,
    *,
    frame: int | None = None,
    max_voxels: int = DEFAULT_MAX_VOXELS,
    align: Align = "auto",
) -> int:
    """Finds the mask of every patient and writes ``<patient>/<patient>_desc-lv_mask.nii.gz`` and ``masks.tsv``.

    A mask that somebody has changed since is kept; delete it to have it found again.

    Args:
        cohort: the patients; their own masks are not looked at.
        out: the folder; made if need be.
        protocol: whose mask.
        frame: which frame of a 4-D file, counted from 0.
        max_voxels: a larger image is refused before it is read.
        align: how sequences are brought together before the mask is found in all of them.

    Returns:
        The exit code: 0 every mask was found, 1 some were not, 3 none was, 4 stopped by a full disk.

    Raises:
        UsageError: the folder is refused, or the protocol's mask cannot be found.
        StudyError: ``E_DISK`` or ``E_WRITE``, the table could not be written.
    """
    if protocol.mask_finder is None and not all(study.mask_rule == "model" for study in cohort.studies):
        raise UsageError(f"--protocol {protocol.name}: the {protocol.mask} cannot be found; draw it")
    outputs.check(out, cohort)
    rows = []
    for study in cohort.studies:
        rule = "auto" if study.mask_model is None else "model"
        asked = dataclasses.replace(study, mask=None, mask_labels=(), mask_rule=rule)
        row = _one(asked, out, protocol, {"frame": frame, "max_voxels": max_voxels, "align": align})
        rows.append(row)
        _log(row)
        if row["code"] == "E_DISK":
            break
    atomic_files.write_whole(atomic_files.folder(out) / TABLE, _table(rows))
    if rows[-1]["code"] == "E_DISK":
        return DISK_FULL
    failed = sum(row["status"] == "failed" for row in rows)
    return exit_code(failed, len(rows))


def _log(row: Row) -> None:
    detail = row["message"] or f"confidence {row['confidence']:.2f}"
    told = f"{row['patient']}: {row['status']} ({row['code'] and row['code'] + ': '}{detail})"
    logger.log(logging.WARNING if row["status"] == "failed" else logging.INFO, "%s", shown(told))


def _one(study: Study, out: Path, protocol: Protocol, reading: dict[str, Any]) -> Row:
    """One patient's row; its mask and what is known of it are written, or nothing is left of them."""
    row: Row = dict.fromkeys(COLUMNS, "") | {"patient": study.patient, "status": "ok"}
    path = out / study.patient / given_masks.name(study.patient, protocol)
    sidecar = path.with_name(path.name.replace(".nii.gz", ".json"))
    try:
        if not study.problems and path.is_file() and _written(sidecar) != atomic_files.sha256(path):
            return row | {"message": CORRECTED}
        if not study.problems:
            path.unlink(missing_ok=True)
        scan = loading.load(study, protocol, **reading)
        atomic_files.folder(path.parent)
        nifti.write_labels(path, scan.mask.astype(np.uint8), like=scan.reference)
        held = scan.mask.any(tuple(a for a in range(3) if a != int(np.argmax(scan.reference.spacing_mm))))
        volume = float(scan.mask.sum() * np.prod(scan.reference.spacing_mm) / 1000)
        facts = {
            "confidence": scan.inputs["mask"]["confidence"],
            "slices": int(held.sum()),
            "slices_without": int((~held).sum()),
            "volume_ml": round(volume, 3),
        }
        about = {"patient": study.patient, **facts, "warnings": list(scan.warnings), "inputs": scan.inputs}
        content = json.dumps({**about, "sha256": atomic_files.sha256(path)}, indent=1)
        atomic_files.write_whole(sidecar, content.encode())
        return row | facts | {"warnings": " | ".join(scan.warnings)}
    except Exception as error:  # one patient's surprise must not stop the others
        failure = batch.failure(error)
        return row | {key: failure[key] for key in ("status", "code")} | {"message": _sentence(failure)}


def _written(sidecar: Path) -> str | None:
    """The SHA-256 of the mask as it was written."""
    try:
        found = json.loads(sidecar.read_text(encoding="utf-8"))["sha256"]
    except (OSError, ValueError, LookupError, TypeError):
        return None
    return str(found)


def _sentence(failure: Row) -> str:
    return f"{failure['message']}. {failure['remedy']}".rstrip(". ")


def _table(rows: list[Row]) -> bytes:
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, delimiter="\t", lineterminator="\n", extrasaction="ignore")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue().encode("utf-8", "surrogateescape")
