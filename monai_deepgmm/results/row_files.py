"""Each patient's row as JSON: in the patient's folder, or apart from it where no folder can bear the id."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from monai_deepgmm.images import atomic_files

Row = dict[str, Any]

#: Where the rows lie of patients whose folder cannot be made or written.
REFUSED = ".refused"
STATUS = ("ok", "failed", "skipped")
#: The texts of a row, and the numbers of a measurement.
_TEXTS = ("code", "message", "remedy", "method")
_NUMBERS = ("voxels", "volume_ml", "mass_g", "percent", "expected_ml")


def refused_file(out: Path, patient: str) -> Path:
    """The place of a row that does not lie in its patient's folder; no other id has the same."""
    return out / REFUSED / f"{digest(patient)[:16]}.json"


def read_all(out: Path) -> list[Row]:
    """Every patient's row, sorted by id; a row that lies apart is the newer one.

    A row that cannot be read, or was changed into something else, is a failed one, so that it hides nobody.
    """
    rows = {name: read_row(out / name / f"{name}_row.json", name) for name in folders(out)}
    for file in sorted((out / REFUSED).glob("*.json")):
        row = read_row(file, file.stem, apart=True)
        rows[row["patient"]] = {**row, "page": False}
    return [rows[patient] for patient in sorted(rows, key=_bytes)]


def folders(out: Path) -> list[str]:
    """The names of the patients' folders: those that hold a row, be it damaged."""
    if not out.is_dir():
        return []
    return sorted(f.name for f in out.iterdir() if _is_row(f / f"{f.name}_row.json"))


def _is_row(file: Path) -> bool:
    found = read_json(file) if file.is_file() else {}
    return found is None or "patient" in found


def read_row(file: Path, patient: str, *, apart: bool = False) -> Row:
    """A patient's row; one that is damaged, or another's unless it lies apart, becomes a failed row."""
    row = read_json(file)
    if row is not None and _sound(row) and (apart or row["patient"] == patient):
        return row
    remedy = "Delete this patient's folder and run deepgmm segment again"
    message = f"{atomic_files.shown(file)}: the row is damaged"
    return {"patient": patient, "status": "failed", "code": "E_FILE", "message": message, "remedy": remedy}


def read_json(file: Path) -> Row | None:
    """A JSON object, or None where there is none that can be read."""
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def as_bytes(content: object) -> bytes:
    """A JSON file's bytes."""
    return (json.dumps(content, indent=1) + "\n").encode()


def digest(text: str) -> str:
    """The SHA-256 of a text, whatever bytes a file's name has put into it."""
    return hashlib.sha256(_bytes(text)).hexdigest()


def _sound(row: Mapping[str, Any]) -> bool:
    """Whether what tables and pages are made of has the types that they need."""
    warnings, seconds = row.get("warnings", []), row.get("seconds", 0.0)
    measured, slices = row.get("measurements", []), row.get("slices", [])
    return (
        row.get("status") in STATUS
        and isinstance(row.get("patient"), str)
        and all(isinstance(row.get(key, ""), str) for key in _TEXTS)
        and isinstance(seconds, int | float)
        and isinstance(warnings, list)
        and all(isinstance(warning, str) for warning in warnings)
        and isinstance(measured, list)
        and all(isinstance(m, dict) and _measurement(m, row["patient"]) for m in measured)
        and isinstance(slices, list)
        and all(isinstance(s, dict) for s in slices)
        and isinstance(row.get("ventricle"), dict | None)
    )


def _measurement(found: Mapping[str, Any], patient: str) -> bool:
    named = found.get("patient") == patient and isinstance(found.get("tissue"), str)
    return named and all(isinstance(found.get(key), int | float | None) for key in _NUMBERS)


def _bytes(text: str) -> bytes:
    return text.encode("utf-8", "surrogatepass")
