"""The output folder: whether it may be one, what is already done in it, and each patient's files."""

from __future__ import annotations

import contextlib
import glob
import json
import os
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from monai_deepgmm.errors import StudyError, UsageError
from monai_deepgmm.images import COPIES, atomic_files, image_file, nifti
from monai_deepgmm.methods.config import Config
from monai_deepgmm.patients.study import Cohort, Study
from monai_deepgmm.protocol import Protocol
from monai_deepgmm.results import dataset, dicom_seg, locks, report, row_files, uncertainty
from monai_deepgmm.results.pictures import PICTURES, pictures
from monai_deepgmm.results.provenance import versions
from monai_deepgmm.results.row_files import REFUSED, Row
from monai_deepgmm.results.segmentation import Segmentation

#: A sequence's bias field, and the image without it.
SHADING = ("_bias.nii.gz", "_corrected.nii.gz")
#: Ids that no folder can bear; their rows go where no patient's folder can be.
UNUSABLE = {"E_ID", "E_NAME"}


# Before any work ---------------------------------------------------------------------------------------------------


def check(out: Path, cohort: Cohort) -> None:
    """Refuses an output folder that could harm the input, or that cannot be written.

    Raises:
        UsageError: it is the input folder, lies inside it (but for ``derivatives/`` of a BIDS data set), is a file, or
            cannot be written.
    """
    target, source = Path(os.path.realpath(out)), Path(os.path.realpath(cohort.root))
    if target == source:
        raise UsageError(f"OUT: {out} is the input folder itself; name another one")
    derivatives = source / "derivatives"
    below_derivatives = cohort.layout == "bids" and derivatives in target.parents
    if source in target.parents and not below_derivatives:
        hint = f", or a folder below {derivatives.name}/ in layout bids" if cohort.layout == "bids" else ""
        raise UsageError(f"OUT: {out} lies inside the input folder; name a folder outside it{hint}")
    for study in cohort.studies:
        if not _unusable(study) and _harms(place := target / study.patient, source):
            raise UsageError(f"OUT: the results of {study.patient} would fall on the input folder, {place}")
    if os.path.lexists(out) and not out.is_dir():
        raise UsageError(f"OUT: {out} is a {'file' if out.exists() else 'link that leads nowhere'}; name a folder")
    near = next(p for p in (target, *target.parents) if p.exists())
    if not near.is_dir() or not os.access(near, os.W_OK | os.X_OK) or _read_only(near):
        raise UsageError(f"OUT: {out} cannot be written here; check the permissions of {near}")


def _harms(place: Path, source: Path) -> bool:
    """Whether a patient's folder is the input folder or holds it, or is a link into it."""
    if place in (source, *source.parents):
        return True
    return place.is_symlink() and source in (found := Path(os.path.realpath(place)), *found.parents)


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
        (out / locks.FOLDER).mkdir(parents=True, exist_ok=True)
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
        return row_files.refused_file(out, study.patient).with_suffix("")
    return out / study.patient


def fingerprint(study: Study, config: Config, hashes: Mapping[str, str], steps: Mapping[str, Any] | None = None) -> str:
    """What a patient's result depends on, in one hash: the input files' bytes, the mask's rule and the configuration.

    Args:
        study: whose mask's rule counts.
        config: what is or was asked for.
        hashes: sequence (or "mask") → SHA-256 of its file.
        steps: what is done otherwise than the configuration says, as ``Steps.as_json`` tells it, or None.
    """
    mask: dict[str, Any] = {"labels": list(study.mask_labels), "rule": study.mask_rule}
    mask |= {} if study.mask_model is None else study.mask_model.as_json()
    content = {
        "inputs": dict(hashes),
        "mask": mask,
        "spacing": study.spacing,
        "configuration": config.as_json(),
        "versions": versions(),
    }
    if steps is not None:
        content["steps"] = dict(steps)
    return row_files.digest(json.dumps(content, sort_keys=True))


def _hashes_now(study: Study) -> dict[str, str]:
    """The input files' SHA-256 as they are on the disk at this moment."""
    sources = {**study.images, **({"mask": study.mask} if study.mask is not None else {})}
    return {name: image_file.sha256(one) for name, one in sources.items()}


def _hashes_read(sidecar: Mapping[str, Any]) -> dict[str, str]:
    """The input files' SHA-256 as they were when they were segmented: they may have been replaced since."""
    return {name: facts["sha256"] for name, facts in sidecar["inputs"].items() if "sha256" in facts}


def done(out: Path, study: Study, config: Config, steps: Mapping[str, Any] | None = None) -> Row | None:
    """The row of a patient whose files are all there and were made from the same inputs and configuration."""
    place = folder(out, study)
    row = row_files.read_json(place / f"{study.patient}_row.json") if not study.problems else None
    if not row or row.get("status") != "ok":
        return None
    wanted = ["_dseg.nii.gz", "_dseg.json", *PICTURES]
    wanted += ["_probseg.nii.gz", "_entropy.nii.gz"] * config.probabilities
    wanted += [dicom_seg.SUFFIX] * config.dicom_seg
    wanted += [f"_dseg.{ending}" for ending in config.copies]
    if config.fields:
        present = [s for s in config.protocol.sequences if s in study.images]
        wanted += [f"_{s}{suffix}" for s in present for suffix in SHADING]
    page = place / f"{study.patient}_report.html"
    hashes = row.get("files")
    if not page.is_file() or not all(_as_written(place / f"{study.patient}{suffix}", hashes) for suffix in wanted):
        return None
    sidecar = row_files.read_json(place / f"{study.patient}_dseg.json")
    try:
        now = fingerprint(study, config, _hashes_now(study), steps)
        same = sidecar is not None and sidecar.get("fingerprint") == now
    except StudyError:
        return None
    return row if same else None


def _as_written(path: Path, hashes: object) -> bool:
    """Whether a file holds what the run wrote that made the row."""
    try:
        return isinstance(hashes, dict) and hashes.get(path.name) == atomic_files.sha256(path)
    except StudyError:
        return False


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
    _write_images(place, name, segmentation, config)
    for suffix, picture in pictures(study, segmentation).items():
        atomic_files.write_whole(place / f"{name}{suffix}", picture)
    made_from = fingerprint(study, config, _hashes_read(segmentation.sidecar), steps)
    if config.dicom_seg:
        seg, frame = place / f"{name}{dicom_seg.SUFFIX}", config.preprocessing.frame
        dicom_seg.write(seg, study, segmentation, frame=frame, made_from=made_from)
    sidecar = {**segmentation.sidecar, "fingerprint": made_from}
    sidecar |= {} if steps is None else {"steps": dict(steps)}
    atomic_files.write_whole(place / f"{name}_dseg.json", row_files.as_bytes(sidecar))
    row = {
        **row,
        "date": datetime.now(UTC).date().isoformat(),
        "fingerprint": made_from,
        "warnings": list(segmentation.warnings),
        **segmentation.measured,
        "files": {path.name: atomic_files.sha256(path) for path in sorted(place.iterdir()) if _is_result(path, name)},
    }
    atomic_files.write_whole(place / f"{name}_row.json", row_files.as_bytes(row))
    report.rebuild_patient(place)
    return row


def _write_images(place: Path, name: str, segmentation: Segmentation, config: Config) -> None:
    """Label map, and what else is asked for on its grid: copies, probabilities with their entropy, bias fields."""
    nifti.write_labels(place / f"{name}_dseg.nii.gz", segmentation.labels, like=segmentation.reference)
    for ending in config.copies:
        from monai_deepgmm.images import itk_file  # here, as SimpleITK takes 90 MB

        itk_file.write_labels(place / f"{name}_dseg.{ending}", segmentation.labels, like=segmentation.reference)
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


def write_failure(out: Path, study: Study, row: Row) -> None:
    """Writes a failed (or skipped) patient's row and page; no label file of it is left, not even an older one."""
    if _unusable(study):
        write_refused(out, study, row)
        return
    place = _fresh(out, study)
    atomic_files.write_whole(place / f"{study.patient}_row.json", row_files.as_bytes(row))
    report.rebuild_patient(place)


def write_refused(out: Path, study: Study, row: Row) -> None:
    """Writes the row of a patient whose folder cannot be made or written."""
    atomic_files.folder(out / REFUSED)
    atomic_files.write_whole(row_files.refused_file(out, study.patient), row_files.as_bytes(row))


def forget_refused(out: Path, study: Study) -> None:
    """Removes a row that says that a patient's folder could not be written, since now it could."""
    with contextlib.suppress(OSError):
        row_files.refused_file(out, study.patient).unlink()


def tidy(out: Path, study: Study) -> None:
    """Removes what a writer that was stopped has left of a patient: files without a row, unless another run has it."""
    place = folder(out, study)
    row = place / f"{study.patient}_row.json"
    if not place.is_dir() or row.exists():
        return
    with contextlib.suppress(StudyError), locks.lock(out, study.patient, wait_s=0) as ours:
        if ours and not row.exists():
            clear(out, study)


def clear(out: Path, study: Study) -> None:
    """Removes a patient's files, row first: without it, none of the others counts."""
    place = folder(out, study)
    for suffix in (
        "_row.json",
        "_dseg.json",
        "_dseg.nii.gz",
        "_probseg.nii.gz",
        "_entropy.nii.gz",
        dicom_seg.SUFFIX,
        *(f"_dseg.{ending}" for ending in COPIES),
        *PICTURES,
        "_report.html",
    ):
        with contextlib.suppress(OSError):
            (place / f"{study.patient}{suffix}").unlink()
    for suffix in SHADING:
        for old in place.glob(f"{glob.escape(study.patient)}_*{suffix}"):
            with contextlib.suppress(OSError):
                old.unlink()


def _fresh(out: Path, study: Study) -> Path:
    place = atomic_files.folder(folder(out, study))
    clear(out, study)
    forget_refused(out, study)
    return place


def _is_result(path: Path, patient: str) -> bool:
    return path.is_file() and path.name.startswith(f"{patient}_") and not path.name.endswith(".html")


def _unusable(study: Study) -> bool:
    return any(problem.code in UNUSABLE for problem in study.problems)
