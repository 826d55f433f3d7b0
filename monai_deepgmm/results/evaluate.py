"""Agreement of a finished run with manual labels, per patient, slice and tissue.

What counts: every unit (slice or volume) in which reference or prediction holds any tissue, in whole; a wrong label
outside the reference counts as wrong. A patient who cannot be evaluated is listed with the reason, never dropped.

Means and standard deviations are over units, with the sample's n - 1 in the latter. The mean over tissues is taken in
each unit first, over the tissues that count there, and then over the units.
"""

from __future__ import annotations

import csv
import io
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from itertools import groupby
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import numpy.typing as npt

from monai_deepgmm.errors import StudyError, UsageError, exit_code
from monai_deepgmm.images import atomic_files, nifti
from monai_deepgmm.images import labels as truth
from monai_deepgmm.patients.study import Cohort, Problem, Study
from monai_deepgmm.protocol import Protocol, Tissue
from monai_deepgmm.results import label_order, metrics
from monai_deepgmm.results.review import result_of
from monai_deepgmm.wording import counted, shown

Slices = Literal["all", "complete"]
Unit = Literal["slice", "volume"]
Labels = npt.NDArray[np.int64]

#: The measures of a row, in the order of the tables.
MEASURES = ("dice", "dice_matched", "recall", "precision", "jaccard", "hd95_mm", "assd_mm")
_SHOWN = 6  # warnings on the terminal
#: With one of these, the folder in OUT may belong to someone else.
_NOT_ONE_PATIENT = ("E_ID", "E_DUPLICATE")


@dataclass(frozen=True)
class Row:
    """One tissue in one unit of one patient; NaN where a measure is undefined.

    Attributes:
        patient: the id.
        slice: the slice's array index, counted from 0; None for a volume.
        tissue: the name.
        dice: with the names that the tool gave.
        dice_matched: with labels re-ordered by means of the reference, in this unit: oracle-matched.
        recall: share of the true voxels that were found.
        precision: share of the predicted voxels that are true.
        jaccard: intersection over union.
        hd95_mm: 95th percentile Hausdorff distance.
        assd_mm: average symmetric surface distance.
        voxels_predicted: in this unit.
        voxels_true: in this unit.
    """

    patient: str
    slice: int | None
    tissue: str
    dice: float
    dice_matched: float
    recall: float
    precision: float
    jaccard: float
    hd95_mm: float
    assd_mm: float
    voxels_predicted: int
    voxels_true: int


@dataclass(frozen=True)
class Evaluated:
    """One patient who was compared with reference labels.

    Attributes:
        sequences: those the segmentation used.
        tissues: those that these sequences can show; the reference's other tissues were merged.
        rows: by unit and tissue; empty when no unit was kept.
        warnings: each begins with its code.
        counts: (K+1, K+1) of all units, see ``metrics.confusion``.
        meaning: what the values of the reference labels were said to mean, and who says so.
        voxel_ml: of the grid that was compared on.
        result: what tells the segmentation from one with other options, see ``review.result_of``.
    """

    sequences: tuple[str, ...]
    tissues: tuple[str, ...]
    rows: tuple[Row, ...]
    warnings: tuple[str, ...]
    counts: metrics.Counts = field(compare=False)
    meaning: tuple[str, tuple[tuple[int, int], ...]]
    voxel_ml: float
    result: str = ""


@dataclass(frozen=True)
class Evaluation:
    """A run against its reference labels.

    Attributes:
        protocol: its name.
        tissues: all of the protocol, in order of index.
        slices: which units were kept: all, or those whose reference holds every tissue.
        unit: what one comparison is made on.
        patients: id → result, sorted.
        problems: id → why it was not evaluated, sorted.
    """

    protocol: str
    tissues: tuple[str, ...]
    slices: Slices
    unit: Unit
    patients: Mapping[str, Evaluated]
    problems: Mapping[str, Problem]

    @property
    def warnings(self) -> tuple[str, ...]:
        """What concerns not one patient but all whose labels mean the same."""
        groups: dict[Any, list[Evaluated]] = {}
        for patient in self.patients.values():
            groups.setdefault((patient.meaning, patient.tissues), []).append(patient)
        found = (
            label_order.warning(np.sum([p.counts for p in group], axis=0), group[0].tissues, group[0].meaning[0])
            for group in groups.values()
        )
        return tuple(dict.fromkeys(warning for warning in found if warning))

    @property
    def exit_code(self) -> int:
        """Whether every patient could be compared, some, or none."""
        return exit_code(len(self.problems), len(self.problems) + len(self.patients))

    @property
    def rows(self) -> tuple[Row, ...]:
        """The rows of all patients."""
        return tuple(row for patient in self.patients.values() for row in patient.rows)


def evaluate(
    out: str | Path, cohort: Cohort, protocol: Protocol, *, slices: Slices = "all", unit: Unit = "slice"
) -> Evaluation:
    """Compares the segmentations in a folder with the cohort's reference labels.

    Args:
        out: the folder that ``deepgmm segment`` wrote.
        cohort: the patients and their reference labels.
        protocol: the one they were segmented with.
        slices: "complete" keeps the units whose reference holds every tissue that the patient's sequences can show.
        unit: "slice" compares in 2-D, along the slice axis of the sidecar; "volume" in 3-D.

    Raises:
        UsageError: an option is unknown, or there is no such folder.
    """
    for name, value, choices in (("slices", slices, get_args(Slices)), ("unit", unit, get_args(Unit))):
        if value not in choices:
            raise UsageError(f"--{name}: {value!r} is unknown; choose {' or '.join(choices)}")
    out = Path(out)
    if not out.is_dir():
        raise UsageError(f"OUT: there is no folder {out.name}; run deepgmm segment first")
    patients, problems = {}, {}
    for study in sorted(cohort.studies, key=lambda s: s.patient):
        try:
            patients[study.patient] = _patient(out, study, protocol, slices=slices, unit=unit)
        except StudyError as error:
            problems[study.patient] = Problem(error.code, error.message, error.remedy)
    return Evaluation(protocol.name, tuple(t.name for t in protocol.tissues), slices, unit, patients, problems)


def as_json(evaluation: Evaluation) -> dict[str, Any]:
    """The content of ``evaluation.json``: numbers or None, never NaN."""
    table = {measure: _statistics(evaluation.rows, measure, evaluation.tissues) for measure in MEASURES}
    nowhere = dict.fromkeys(evaluation.tissues, 0)
    for row in evaluation.rows:
        nowhere[row.tissue] += not row.voxels_predicted and not row.voxels_true
    return {
        **table,
        "protocol": evaluation.protocol,
        "slices": evaluation.slices,
        "unit": evaluation.unit,
        "n_patients": len(evaluation.patients),
        "n_units": len(list(_by_unit(evaluation.rows))),
        "not_counted": nowhere,
        "warnings": list(evaluation.warnings),
        "patients": {name: _patient_json(patient) for name, patient in evaluation.patients.items()},
        "problems": {
            name: {"code": p.code, "message": p.message, "remedy": p.remedy} for name, p in evaluation.problems.items()
        },
    }


def write(out: Path, evaluation: Evaluation) -> None:
    """Writes ``evaluation.tsv`` and ``evaluation.json``; an undefined value is an empty cell, and null.

    Args:
        out: the folder.
        evaluation: from ``evaluate``.
    """
    names = [one.name for one in fields(Row)]
    text = io.StringIO()
    table = csv.writer(text, delimiter="\t", lineterminator="\n")
    table.writerow(names)
    table.writerows([_cell(getattr(row, name)) for name in names] for row in evaluation.rows)
    atomic_files.write_whole(out / "evaluation.tsv", text.getvalue().encode("utf-8", "surrogateescape"))
    document = json.dumps(as_json(evaluation), indent=2, allow_nan=False)
    atomic_files.write_whole(out / "evaluation.json", f"{document}\n".encode())


def summary(evaluation: Evaluation) -> str:
    """An aligned table for the terminal: mean ± standard deviation of each tissue, and who is missing."""
    found = as_json(evaluation)
    lines: list[tuple[str, ...]] = [("tissue", "dice", "oracle-matched dice", "n", "empty in both")]
    for tissue in evaluation.tissues:
        named, matched = found["dice"][tissue], found["dice_matched"][tissue]
        spreads = (_spread(named["mean"], named["sd"]), _spread(matched["mean"], matched["sd"]))
        lines.append((tissue, *spreads, str(named["n"]), str(found["not_counted"][tissue])))
    means = [_spread(found[m]["mean"], found[m]["mean_sd"]) for m in ("dice", "dice_matched")]
    lines.append(("mean", *means, str(found["dice"]["mean_n"]), ""))
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    text = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines]
    compared = (
        f"{counted(found['n_patients'], 'patient')}, {counted(found['n_units'], evaluation.unit)} ({evaluation.slices})"
    )
    text.append(f"compared: {compared}; not evaluated: {len(evaluation.problems)}")
    for name, problem in evaluation.problems.items():
        text.append(f"  {name}: {problem.code}: {problem.message}. {problem.remedy}".rstrip(". "))
    odd = [f"  {name}: {warning}" for name, one in evaluation.patients.items() for warning in one.warnings]
    text += odd[:_SHOWN] + ([f"  and {len(odd) - _SHOWN} more warnings: see evaluation.json"] * (len(odd) > _SHOWN))
    text += evaluation.warnings
    text = [shown(line) for line in text]
    return "\n".join(text)


def _patient(out: Path, study: Study, protocol: Protocol, *, slices: Slices, unit: Unit) -> Evaluated:
    """Compares one patient's segmentation with its reference labels."""
    for problem in study.problems:
        if problem.code in _NOT_ONE_PATIENT:
            raise StudyError(problem.code, problem.message, problem.remedy)
    path = out / study.patient / f"{study.patient}_dseg.nii.gz"
    if not os.path.exists(path):  # pathlib's own raises on a name that is too long
        why = "".join(f"; {p.code}: {p.message}" for p in study.problems)
        message = f"there is no {path.name}: the patient failed or was not segmented{why}"
        raise StudyError("E_FILE", message, "See summary.tsv, or run deepgmm segment")
    sequences, axis, result = _sidecar(path.with_name(f"{study.patient}_dseg.json"), protocol)
    prediction = nifti.read(path, spacing=study.spacing, beside=nifti.DEFAULT_MAX_VOXELS, dtype=np.float64)
    labels, warnings = truth.read(study, protocol, sequences, like=prediction)
    tissues = protocol.visible(sequences)
    rows = [
        row
        for number, predicted, true, spacing_mm in _units(prediction, labels, axis=axis, unit=unit)
        if slices == "all" or np.isin([t.index for t in tissues], true).all()
        for row in _rows(study.patient, number, predicted, true, tissues=tissues, spacing_mm=spacing_mm)
    ]
    voxel_ml = float(prediction.voxel_ml)
    counts = metrics.confusion(prediction.data.astype(np.int64), labels, [t.index for t in tissues])
    source = study.truth_names.source if study.truth_names else "the layout" if study.truth_labels else "the protocol"
    meaning = (source, tuple(sorted((study.truth_labels or {}).items())))
    names = tuple(t.name for t in tissues)
    return Evaluated(sequences, names, tuple(rows), warnings, counts, meaning, voxel_ml, result)


def _sidecar(path: Path, protocol: Protocol) -> tuple[tuple[str, ...], int, str]:
    """The sequences that a segmentation used, its slice axis, and which result it is."""
    try:
        sidecar = json.loads(path.read_text(encoding="utf-8"))
        sequences, axis = tuple(sidecar["sequences"]), int(sidecar.get("slice_axis", 2))
        found = {str(tissue["name"]): int(tissue["index"]) for tissue in sidecar["tissues"]}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        message = f"{path.name} cannot be read, or lacks what a sidecar holds ({type(error).__name__}: {error})"
        raise StudyError("E_FILE", message, "Segment this patient again") from error
    expected = {t.name: t.index for t in protocol.visible(sequences)}
    components = {t.name: t.index for t in protocol.components(sequences)}
    if not found or found not in (expected, components) or axis not in range(3):
        message = f"{path.name} holds tissues {found} and slice axis {axis}; protocol {protocol.name} has {expected}"
        raise StudyError("E_TRUTH", message, "Evaluate with the protocol that the patient was segmented with")
    return sequences, axis, result_of(sidecar.get("fingerprint"))


def _units(
    prediction: nifti.Volume, labels: Labels, *, axis: int, unit: Unit
) -> Iterator[tuple[int | None, Labels, Labels, tuple[float, ...]]]:
    """Each unit that holds anything: slice number, predicted (*S), true (*S), spacing in mm."""
    predicted, spacing_mm = prediction.data.astype(np.int64), tuple(float(mm) for mm in prediction.spacing_mm)
    if unit == "volume":
        yield None, predicted, labels, spacing_mm
        return
    in_plane = spacing_mm[:axis] + spacing_mm[axis + 1 :]
    pairs = zip(np.moveaxis(predicted, axis, 0), np.moveaxis(labels, axis, 0), strict=True)
    for number, (image, true) in enumerate(pairs):
        if image.any() or true.any():
            yield number, image, true, in_plane


def _rows(
    patient: str,
    number: int | None,
    predicted: Labels,
    true: Labels,
    *,
    tissues: Sequence[Tissue],
    spacing_mm: Sequence[float],
) -> Iterator[Row]:
    """One row for each tissue of a unit."""
    counts = metrics.confusion(predicted, true, [t.index for t in tissues])
    found, matched = metrics.overlap(counts), metrics.oracle_matched_dice(counts)
    for i, tissue in enumerate(tissues):
        surface = metrics.surface(predicted == tissue.index, true == tissue.index, spacing_mm=spacing_mm)
        yield Row(
            patient=patient,
            slice=number,
            tissue=tissue.name,
            dice=float(found.dice[i]),
            dice_matched=float(matched[i]),
            recall=float(found.recall[i]),
            precision=float(found.precision[i]),
            jaccard=float(found.jaccard[i]),
            hd95_mm=surface.hd95_mm,
            assd_mm=surface.assd_mm,
            voxels_predicted=int(found.voxels_predicted[i]),
            voxels_true=int(found.voxels_true[i]),
        )


def _by_unit(rows: Iterable[Row]) -> Iterator[list[Row]]:
    """The rows of each unit; they follow one another."""
    for _, unit in groupby(rows, key=lambda row: (row.patient, row.slice)):
        yield list(unit)


def _statistics(rows: Sequence[Row], measure: str, tissues: Sequence[str]) -> dict[str, Any]:
    """Mean, sd and n of each tissue over the units; ``mean`` and its companions over the units' own means."""
    table: dict[str, Any] = {}
    for tissue in tissues:
        mean, sd, n = _moments(getattr(row, measure) for row in rows if row.tissue == tissue)
        table[tissue] = {"mean": mean, "sd": sd, "n": n}
    units = (_moments(getattr(row, measure) for row in unit)[0] for unit in _by_unit(rows))
    table["mean"], table["mean_sd"], table["mean_n"] = _moments(m for m in units if m is not None)
    return table


def _moments(values: Iterable[float]) -> tuple[float | None, float | None, int]:
    """Mean, sample standard deviation (None for fewer than two) and number of the values that are not NaN."""
    kept = [value for value in values if not np.isnan(value)]
    mean = float(np.mean(kept)) if kept else None
    return mean, float(np.std(kept, ddof=1)) if len(kept) > 1 else None, len(kept)


def _patient_json(patient: Evaluated) -> dict[str, Any]:
    """One patient's part of ``evaluation.json``."""
    document: dict[str, Any] = {"sequences": list(patient.sequences), "n_units": len(list(_by_unit(patient.rows)))}
    for measure in ("dice", "dice_matched"):
        found = _statistics(patient.rows, measure, patient.tissues)
        document[measure] = {t: found[t]["mean"] for t in patient.tissues} | {"mean": found["mean"]}
    return {**document, "result": patient.result, "warnings": list(patient.warnings)}


def _cell(value: str | float | None) -> str:
    """A value as written into the table."""
    if isinstance(value, float):
        return "" if np.isnan(value) else f"{value:.6g}"
    return "" if value is None else str(value)


def _spread(mean: float | None, sd: float | None) -> str:
    """``0.812 ± 0.034``, as far as known."""
    if mean is None:
        return "-"
    return f"{mean:.3f}" if sd is None else f"{mean:.3f} ± {sd:.3f}"
