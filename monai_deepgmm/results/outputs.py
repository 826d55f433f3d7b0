"""The output folder: what lies in it, what is already done, and the tables rebuilt from the patients' own rows."""

from __future__ import annotations

import contextlib
import glob
import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from monai_deepgmm.errors import StudyError, UsageError
from monai_deepgmm.images import atomic_files, nifti
from monai_deepgmm.methods.config import Config
from monai_deepgmm.patients.study import Cohort, Study
from monai_deepgmm.protocol import Protocol
from monai_deepgmm.results import dataset, outliers, report, uncertainty
from monai_deepgmm.results.measure import Measurement, SliceMeasurement
from monai_deepgmm.results.provenance import versions
from monai_deepgmm.results.segmentation import Segmentation
from monai_deepgmm.results.ventricle import Ventricle

try:
    import fcntl
except ImportError:  # Windows has no such locks; there, two runs must not share an output folder
    fcntl = None  # type: ignore[assignment]

SUMMARY = ("patient", "status", "code", "message", "seconds", "method", "warnings")
MEASUREMENTS = (*Measurement._fields, *Ventricle._fields)
SLICES = ("patient", *SliceMeasurement._fields)
#: A sequence's bias field, and the image without it.
SHADING = ("_bias.nii.gz", "_corrected.nii.gz")
#: Ids that no folder can bear; their rows go where no patient's folder can be.
UNUSABLE = {"E_ID", "E_NAME"}
REFUSED = ".refused"
LOCKS = ".locks"

Row = dict[str, Any]


# Before any work ---------------------------------------------------------------------------------------------------


def check(out: Path, cohort: Cohort) -> None:
    """Refuses an output folder that could harm the input, or that cannot be written.

    Raises:
        UsageError: it is the input folder, lies inside it (but for ``derivatives/`` of a BIDS data set), is a file, or
            cannot be written.
    """
    target, source = out.resolve(), cohort.root.resolve()
    if target == source:
        raise UsageError(f"OUT: {out} is the input folder itself; name another one")
    derivatives = source / "derivatives"
    below_derivatives = cohort.layout == "bids" and derivatives in target.parents
    if source in target.parents and not below_derivatives:
        hint = f", or a folder below {derivatives.name}/ in layout bids" if cohort.layout == "bids" else ""
        raise UsageError(f"OUT: {out} lies inside the input folder; name a folder outside it{hint}")
    for study in cohort.studies:
        if not _unusable(study) and (folder := target / study.patient) in (source, *source.parents):
            raise UsageError(f"OUT: the results of {study.patient} would fall on the input folder, {folder}")
    if out.exists() and not out.is_dir():
        raise UsageError(f"OUT: {out} is a file; name a folder")
    near = next(p for p in (target, *target.parents) if p.exists())
    if not near.is_dir() or not os.access(near, os.W_OK | os.X_OK) or _read_only(near):
        raise UsageError(f"OUT: {out} cannot be written here; check the permissions of {near}")


def _read_only(folder: Path) -> bool:
    statvfs = getattr(os, "statvfs", None)
    return bool(statvfs and statvfs(folder).f_flag & getattr(os, "ST_RDONLY", 0))


def prepare(out: Path, protocol: Protocol) -> None:
    """Makes the folder, with the files that make it a BIDS derivative.

    Raises:
        UsageError: it cannot be made.
        StudyError: ``E_DISK``.
    """
    try:
        (out / LOCKS).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        refusal = atomic_files.unwritten(out, error)
        raise refusal if refusal.code == "E_DISK" else UsageError(f"OUT: {refusal}") from error
    for name, content in dataset.files(protocol).items():
        atomic_files.write_whole(out / name, content)
    sweep(out)


def sweep(out: Path) -> None:
    """Removes what killed writers left half written; files of writers that live stay."""
    for place in (out, *(p for p in out.iterdir() if p.is_dir())):
        atomic_files.stale_temporaries(place)


# One patient -------------------------------------------------------------------------------------------------------


def folder(out: Path, study: Study) -> Path:
    """Where a patient's files go; where no folder can bear the id, a place that none can collide with."""
    if _unusable(study):
        return out / REFUSED / _digest(study.patient)[:16]
    return out / study.patient


def fingerprint(study: Study, config: Config, hashes: Mapping[str, str], steps: Mapping[str, Any] | None = None) -> str:
    """What a patient's result depends on, in one hash: the input files' bytes, the mask's rule and the configuration.

    Args:
        study: whose mask's rule counts.
        config: what is or was asked for.
        hashes: sequence (or "mask") → SHA-256 of its file.
        steps: what is done otherwise than the configuration says, as ``Steps.as_json`` tells it, or None.
    """
    mask = {"labels": list(study.mask_labels), "rule": study.mask_rule}
    content = {"inputs": dict(hashes), "mask": mask, "configuration": config.as_json(), "versions": versions()}
    if steps is not None:
        content["steps"] = dict(steps)
    return _digest(json.dumps(content, sort_keys=True))


def _hashes_now(study: Study) -> dict[str, str]:
    """The input files' SHA-256 as they are on the disk at this moment."""
    paths = {**study.images, **({"mask": study.mask} if study.mask is not None else {})}
    return {name: atomic_files.sha256(path) for name, path in paths.items()}


def _hashes_read(sidecar: Mapping[str, Any]) -> dict[str, str]:
    """The input files' SHA-256 as they were when they were segmented: they may have been replaced since."""
    return {name: facts["sha256"] for name, facts in sidecar["inputs"].items() if "sha256" in facts}


def done(out: Path, study: Study, config: Config, steps: Mapping[str, Any] | None = None) -> Row | None:
    """The row of a patient whose files are all there and were made from the same inputs and configuration."""
    place = folder(out, study)
    row = _read(place / f"{study.patient}_row.json") if not study.problems else None
    if not row or row.get("status") != "ok":
        return None
    wanted = ["_dseg.nii.gz", "_dseg.json", "_preview.png", "_report.html"]
    wanted += ["_probseg.nii.gz", "_entropy.nii.gz"] * config.probabilities
    if config.fields:
        present = [s for s in config.protocol.sequences if s in study.images]
        wanted += [f"_{s}{suffix}" for s in present for suffix in SHADING]
    if not all((place / f"{study.patient}{suffix}").is_file() for suffix in wanted):
        return None
    sidecar = _read(place / f"{study.patient}_dseg.json")
    try:
        now = fingerprint(study, config, _hashes_now(study), steps)
        same = sidecar is not None and sidecar.get("fingerprint") == now
    except StudyError:
        return None
    return row if same else None


def write(
    out: Path,
    study: Study,
    segmentation: Segmentation,
    row: Row,
    config: Config,
    steps: Mapping[str, Any] | None = None,
) -> Row:
    """Writes one patient's files: label map, probabilities, sidecar, picture, row, page.

    The old row goes first and the new one comes last, so that a run killed in between is seen to be unfinished.

    Returns:
        The row, with measurements.

    Raises:
        StudyError: ``E_DISK``, ``E_NAME`` or ``E_WRITE``; nothing of the patient is left then.
    """
    place, name = _fresh(out, study), study.patient
    nifti.write_labels(place / f"{name}_dseg.nii.gz", segmentation.labels, like=segmentation.reference)
    if config.probabilities:
        maps = place / f"{name}_probseg.nii.gz"
        nifti.write_probabilities(maps, segmentation.probabilities, like=segmentation.reference)
        entropy = uncertainty.entropy(segmentation.probabilities)
        nifti.write_map(place / f"{name}_entropy.nii.gz", entropy, like=segmentation.reference)
    if config.fields:
        for sequence, field in segmentation.fields.items():
            both = (field, segmentation.images[sequence] / field)
            for suffix, values in zip(SHADING, both, strict=True):
                nifti.write_map(place / f"{name}_{sequence}{suffix}", values, like=segmentation.reference)
    atomic_files.write_whole(place / f"{name}_preview.png", report.preview(segmentation))
    made_from = fingerprint(study, config, _hashes_read(segmentation.sidecar), steps)
    sidecar = {**segmentation.sidecar, "fingerprint": made_from}
    sidecar |= {} if steps is None else {"steps": dict(steps)}
    atomic_files.write_whole(place / f"{name}_dseg.json", _json(sidecar))
    row = {**row, "warnings": list(segmentation.warnings), **segmentation.measured}
    atomic_files.write_whole(place / f"{name}_row.json", _json(row))
    report.rebuild_patient(place)
    return row


def write_failure(out: Path, study: Study, row: Row) -> None:
    """Writes a failed (or skipped) patient's row and page; no label file of it is left, not even an older one."""
    if _unusable(study):
        _made(out / REFUSED)
        atomic_files.write_whole(folder(out, study).with_suffix(".json"), _json(row))
        return
    place = _fresh(out, study)
    atomic_files.write_whole(place / f"{study.patient}_row.json", _json(row))
    report.rebuild_patient(place)


def clear(out: Path, study: Study) -> None:
    """Removes a patient's files, row first: without it, none of the others counts."""
    place = folder(out, study)
    for suffix in (
        "_row.json",
        "_dseg.json",
        "_dseg.nii.gz",
        "_probseg.nii.gz",
        "_entropy.nii.gz",
        "_preview.png",
        "_report.html",
    ):
        with contextlib.suppress(OSError):
            (place / f"{study.patient}{suffix}").unlink()
    for suffix in SHADING:
        for old in place.glob(f"{glob.escape(study.patient)}_*{suffix}"):
            with contextlib.suppress(OSError):
                old.unlink()


def _fresh(out: Path, study: Study) -> Path:
    place = _made(folder(out, study))
    clear(out, study)
    return place


def _made(place: Path) -> Path:
    try:
        place.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise atomic_files.unwritten(place, error) from error
    return place


def _unusable(study: Study) -> bool:
    return any(problem.code in UNUSABLE for problem in study.problems)


@contextlib.contextmanager
def lock(out: Path, what: str) -> Iterator[None]:
    """Holds a lock of the output folder while one patient (or the tables) is worked on; runs wait for each other.

    Raises:
        StudyError: ``E_DISK`` or ``E_WRITE``, the lock's file cannot be made.
    """
    if fcntl is None:
        yield
        return
    path = _made(out / LOCKS) / _digest(what)[:16]
    try:
        file = path.open("w")
    except OSError as error:
        raise atomic_files.unwritten(path, error) from error
    with file:
        with contextlib.suppress(OSError):  # a file system without locks: go on without
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


# Tables ------------------------------------------------------------------------------------------------------------


def rows(out: Path) -> list[Row]:
    """Every patient's row, sorted by id, from the patients' own folders."""
    found = [p / f"{p.name}_row.json" for p in out.iterdir() if p.is_dir() and not p.name.startswith(REFUSED)]
    found += (out / REFUSED).glob("*.json")
    read = [row for path in found if path.is_file() and (row := _read(path)) is not None]
    return sorted((row for row in read if isinstance(row.get("patient"), str)), key=lambda row: _bytes(row["patient"]))


def rebuild_tables(out: Path) -> list[Row]:
    """Rebuilds summary, measurements and index from the patients' rows, so that parts and resumed runs agree."""
    with lock(out, "tables"):
        found = rows(out)
        beside = outliers.warnings(found)
        summary = [{**row, "message": _sentence(row), "warnings": _joined(row, beside)} for row in found]
        atomic_files.write_whole(out / "summary.tsv", _tsv(summary, SUMMARY))
        measured = [{**(row.get("ventricle") or {}), **m} for row in found for m in row.get("measurements", ())]
        atomic_files.write_whole(out / "measurements.tsv", _tsv(measured, MEASUREMENTS))
        slices = [{"patient": row["patient"], **s} for row in found for s in row.get("slices", ())]
        atomic_files.write_whole(out / "measurements_slices.tsv", _tsv(slices, SLICES))
        report.rebuild_index(out)
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
    return "" if value is None else " ".join(str(value).replace("\t", " ").splitlines())


def _json(content: object) -> bytes:
    return (json.dumps(content, indent=1) + "\n").encode()


def _read(path: Path) -> dict[str, Any] | None:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return content if isinstance(content, dict) else None


def _digest(text: str) -> str:
    return hashlib.sha256(_bytes(text)).hexdigest()


def _bytes(text: str) -> bytes:
    return text.encode("utf-8", "surrogatepass")
