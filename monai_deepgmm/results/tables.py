"""The tables of an output folder, rebuilt from the patients' own rows."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from monai_deepgmm.images import atomic_files
from monai_deepgmm.results import outliers, report, row_files
from monai_deepgmm.results.locks import lock
from monai_deepgmm.results.measure import Measurement, SliceMeasurement
from monai_deepgmm.results.row_files import Row
from monai_deepgmm.results.ventricle import Ventricle

SUMMARY = ("patient", "status", "code", "message", "seconds", "method", "warnings")
MEASUREMENTS = (*Measurement._fields, *Ventricle._fields)
SLICES = ("patient", *SliceMeasurement._fields)

_CONTROLS = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]")


def rebuild(out: Path) -> list[Row]:
    """Rebuilds summary, measurements and index from the patients' rows, so that parts and resumed runs agree."""
    with lock(out, "tables"):
        found = row_files.read_all(out)
        beside = outliers.warnings(found)
        summary = [{**row, "message": _sentence(row), "warnings": _joined(row, beside)} for row in found]
        atomic_files.write_whole(out / "summary.tsv", _tsv(summary, SUMMARY))
        measured = [{**(row.get("ventricle") or {}), **m} for row in found for m in row.get("measurements", ())]
        atomic_files.write_whole(out / "measurements.tsv", _tsv(measured, MEASUREMENTS))
        slices = [{"patient": row["patient"], **s} for row in found for s in row.get("slices", ())]
        atomic_files.write_whole(out / "measurements_slices.tsv", _tsv(slices, SLICES))
        report.rebuild_index(out)
    for place, around in report.surroundings(out):
        with lock(out, place.name, wait_s=0) as held:
            if held:  # whoever is at work on the patient rebuilds all pages at the end
                report.rebuild_patient(place, around)
    return found


def _joined(row: Mapping[str, Any], beside: Mapping[str, Sequence[str]]) -> str:
    """A patient's own warnings, and those that only the others give rise to."""
    return " | ".join([*row.get("warnings", ()), *beside.get(row["patient"], ())])


def _sentence(row: Mapping[str, Any]) -> str:
    parts = [str(row.get(key, "")).rstrip(". ") for key in ("message", "remedy")]
    return ". ".join(part for part in parts if part)


def _tsv(table: Sequence[Mapping[str, Any]], columns: Sequence[str]) -> bytes:
    lines = ["\t".join(columns), *("\t".join(_cell(row.get(c)) for c in columns) for row in table)]
    return ("\n".join(lines) + "\n").encode("utf-8", "surrogateescape")


def _cell(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.6g}"
    # Ids stay byte for byte but for what would end a line or a cell, or move the cursor of whoever looks at it.
    return "" if value is None else _CONTROLS.sub(lambda found: repr(found[0])[1:-1], str(value))
