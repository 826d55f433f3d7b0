"""Figures for the documentation, from results of ``deepgmm segment`` and manual labels, as Markdown tables.

``absent`` tells what was painted in slices that lack a tissue, ``thresholds`` compares the scar with the classical
infarct thresholds, ``incomplete`` tells what fewer sequences cost, and ``hide`` links a cohort without a sequence, to
be segmented for the latter. The exit code is 1 if a patient was left out, 2 if nothing could be done.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from monai_deepgmm import protocol
from monai_deepgmm.errors import StudyError, UsageError
from monai_deepgmm.images import labels as truth
from monai_deepgmm.images import nifti
from monai_deepgmm.patients.discovery import Cohort, Study, find
from monai_deepgmm.results import metrics

Labels = npt.NDArray[np.int64]
Values = npt.NDArray[np.floating[Any]]

#: Of a labelled slice: tissue that it lacks → share of the wall painted so, mean Dice of those present, all there.
Slice = tuple[dict[str, float], float, bool]
SCAR = "scar"


class Run(NamedTuple):
    """One patient's segmentation: its volume, labels (X, Y, Z), the sequences it used and the axis of its slices."""

    volume: nifti.Volume
    labels: Labels
    sequences: tuple[str, ...]
    axis: int


def fwhm(values: Values) -> float:
    """Half way between the least and the greatest of the intensities ``(N,)``."""
    return float(values.min() + values.max()) / 2


def five_sd(values: Values) -> float:
    """Five standard deviations above the mean of the darker half of the intensities ``(N,)``, the remote wall."""
    remote = values[values <= np.median(values)]
    return float(remote.mean() + 5 * remote.std())


def otsu(values: Values) -> float:
    """The greatest intensity of the lower of two classes with the greatest variance between them; values ``(N,)``."""
    levels, counts = np.unique(values.astype(np.float64), return_counts=True)
    below, sums = np.cumsum(counts)[:-1], np.cumsum(counts * levels)
    above = values.size - below
    between = below * above * ((sums[-1] - sums[:-1]) / above - sums[:-1] / below) ** 2
    return float(levels[int(np.append(between, 0.0).argmax())])  # a single level cannot be parted


THRESHOLDS: dict[str, Callable[[Values], float]] = {"5SD": five_sd, "FWHM": fwhm, "Otsu": otsu}


def brighter(image: Values, wall: npt.NDArray[np.bool_], threshold: Callable[[Values], float], axis: int) -> Labels:
    """1 where the wall ``(X, Y, Z)`` is brighter than its slice's threshold, 0 elsewhere."""
    found = np.zeros(wall.shape, dtype=np.int64)
    for values, painted, inside in labelled(axis, image, found, wall):
        painted[inside & (values > threshold(values[inside]))] = 1
    return found


def dice(predicted: Labels, true: Labels, indices: Sequence[int]) -> Values:
    """Dice of each index, NaN where the truth does not hold it."""
    found = metrics.overlap(metrics.confusion(predicted, true, indices))
    return np.where(np.asarray(found.voxels_true) > 0, np.asarray(found.dice, dtype=np.float64), np.nan)


def read(out: Path, study: Study) -> Run:
    """The segmentation of a patient; a StudyError if it is missing or cannot be read."""
    # With one of these, a folder in OUT may belong to someone else.
    if problem := next((p for p in study.problems if p.code in ("E_ID", "E_DUPLICATE")), None):
        raise StudyError(problem.code, problem.message, problem.remedy)
    sidecar = out / study.patient / f"{study.patient}_dseg.json"
    volume = nifti.read(sidecar.with_suffix(".nii.gz"), dtype=np.float64)
    try:
        content = json.loads(sidecar.read_text(encoding="utf-8"))
        sequences, axis = tuple(content["sequences"]), range(3)[content.get("slice_axis", 2)]
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise StudyError("E_FILE", f"{sidecar.name} cannot be read: {error!r}", "Segment again") from error
    return Run(volume, np.rint(volume.data).astype(np.int64), sequences, axis)


def labelled(axis: int, *volumes: npt.NDArray[Any]) -> Iterator[tuple[npt.NDArray[Any], ...]]:
    """The slices of volumes ``(X, Y, Z)``, as views, where the last of the volumes holds anything."""
    for slices in zip(*(np.moveaxis(volume, axis, 0) for volume in volumes), strict=True):
        if slices[-1].any():
            yield slices


def absent(out: Path, study: Study, wanted: protocol.Protocol) -> list[Slice]:
    """What was painted in each labelled slice of a patient."""
    run = read(out, study)
    true = truth.read(study, wanted, run.sequences, like=run.volume).labels
    tissues = wanted.visible(run.sequences)
    wall = [t.index for t in tissues if t.name in wanted.percent_of]
    rows: list[Slice] = []
    for found, real in labelled(run.axis, run.labels, true):
        scores = dice(found, real, [t.index for t in tissues])
        size = max(int(np.isin(found, wall).sum()), 1)
        missing = [t for t, score in zip(tissues, scores, strict=True) if t.index in wall and np.isnan(score)]
        painted = {t.name: int((found == t.index).sum()) / size for t in missing if t.merges_into is not None}
        rows.append((painted, float(np.nanmean(scores)), not np.isnan(scores).any()))
    return rows


def scars(out: Path, study: Study, wanted: protocol.Protocol) -> dict[str, tuple[float, float]]:
    """Dice in 3-D (NaN without a true scar) and share of the wall of the scar, as segmented and by each threshold."""
    run, scar = read(out, study), wanted.tissue(SCAR)
    sequence = next((s for s in scar.seen_in if s in run.sequences and s in study.images), None)
    if sequence is None:
        raise StudyError("E_FILE", f"segmented without {' or '.join(scar.seen_in)}, which thresholds need")
    image = nifti.read(study.images[sequence])
    bright = image.data if nifti.grids_equal(image, run.volume) else nifti.resample(image, run.volume)
    true = (truth.read(study, wanted, run.sequences, like=run.volume).labels == scar.index).astype(np.int64)
    wall = np.isin(run.labels, [wanted.tissue(name).index for name in wanted.percent_of])
    found = {"ours": (run.labels == scar.index).astype(np.int64)}
    found |= {name: brighter(bright, wall, threshold, run.axis) for name, threshold in THRESHOLDS.items()}
    return {way: (float(dice(one, true, [1])[0]), one.sum() / max(wall.sum(), 1)) for way, one in found.items()}


def incomplete(full: Path, part: Path, study: Study, wanted: protocol.Protocol) -> list[tuple[str, float, float]]:
    """Each tissue of each labelled slice, where the truth holds it, with its Dice in both runs, merged alike."""
    more, fewer = read(full, study), read(part, study)
    if strangers := set(fewer.sequences) - set(more.sequences):
        raise StudyError("E_FILE", f"OUT_PART used {', '.join(sorted(strangers))}, OUT_FULL did not", "Swap the two")
    true = truth.read(study, wanted, fewer.sequences, like=fewer.volume).labels
    labels, merging = nifti.resample(more.volume, fewer.volume, nearest=True), wanted.merged(fewer.sequences)
    merged: Labels = np.sum([target * (np.rint(labels) == index) for index, target in merging.items()], axis=0)
    tissues = wanted.visible(fewer.sequences)
    rows = []
    for first, second, real in labelled(fewer.axis, merged, fewer.labels, true):
        both = (dice(found, real, [t.index for t in tissues]) for found in (first, second))
        rows += [(t.name, float(a), float(b)) for t, a, b in zip(tissues, *both, strict=True) if not np.isnan(a)]
    return rows


def hide(arguments: argparse.Namespace, wanted: protocol.Protocol, patients: Cohort) -> int:
    """Links the files of patients, but for a sequence, into a new folder, and lists what is there now."""
    sequence, new = arguments.sequence, arguments.NEW
    if patients.layout not in ("myops", "folder") or sequence not in wanted.sequences:
        choices = ", ".join(wanted.sequences)
        raise UsageError(f"hide: needs layout myops or folder, not {patients.layout}, and a sequence of {choices}")
    if new.is_symlink() or new.exists() or new.resolve().is_relative_to(arguments.DIR.resolve()):
        raise UsageError(f"NEW: {new.name} exists or lies within DIR; name a folder that does not")
    links: dict[Path, Path] = {}
    for study in patients.studies:
        images = [path for name, path in study.images.items() if name != sequence]
        for path in dict.fromkeys([*images, *(p for p in (study.mask, study.truth) if p is not None)]):
            if images and links.setdefault(new / study.patient / path.name, path) != path:
                raise UsageError(f"DIR: {study.patient} has two files named {path.name}; rename one of them")
    if not links:
        raise UsageError(f"--sequence {sequence}: no patient would have an image left; hide another one")
    for link, path in links.items():
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(path.resolve())
    rows = [[study.patient, ", ".join(study.images)] for study in find(new, wanted).studies]
    print(table(["patient", "sequences left"], rows))
    return int(len(rows) < len(patients.studies))


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table; all columns but the first are aligned right."""
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def shown(value: float) -> str:
    """Three digits; a dash where there is no number."""
    return "-" if np.isnan(value) else f"{value:.3f}"


def absent_tables(found: Mapping[str, Sequence[Slice]]) -> str:
    """Quartiles of what was painted where nothing is, and the mean Dice of the tissues present."""
    rows = list(chain(*found.values()))
    lacking = [painted for painted, _, _ in rows]
    shares = {name: [one[name] for one in lacking if name in one] for name in sorted(set(chain(*lacking)))}
    quartiles = [[n, str(len(s)), *map(shown, np.quantile(s, (0.25, 0.5, 0.75)))] for n, s in shares.items()]
    kinds = {"all": [score for _, score, _ in rows], "complete": [score for _, score, complete in rows if complete]}
    scores = [[kind, str(len(s)), shown(float(np.mean(s)) if s else np.nan)] for kind, s in kinds.items()]
    first = table(["tissue absent", "slices", "share of the wall painted, 25 %", "50 %", "75 %"], quartiles)
    return first + "\n" + table(["slices", "n", "mean Dice of the tissues present"], scores)


def scar_table(found: Mapping[str, Mapping[str, tuple[float, float]]]) -> str:
    """One row for each patient."""
    cells = [[name, *(f"{shown(d)} ({share:.1%})" for d, share in ways.values())] for name, ways in found.items()]
    return table(["scar: Dice (share of the wall)", "ours", *THRESHOLDS], cells)


def incomplete_table(found: Mapping[str, Sequence[tuple[str, float, float]]]) -> str:
    """One row for each tissue."""
    rows, cells = list(chain(*found.values())), []
    for name in dict.fromkeys(row[0] for row in rows):
        scores = np.array([row[1:] for row in rows if row[0] == name])
        first, second = (float(score) for score in scores.mean(0))
        cells.append([name, str(len(scores)), *map(shown, (first, second, first - second))])
    return table(["tissue", "slices", "Dice, full", "Dice, fewer sequences", "loss"], cells)


#: Command → the runs it reads, what it measures of a patient, and the table of it.
COMMANDS: dict[str, tuple[tuple[str, ...], Callable[..., Any], Callable[..., str]]] = {
    "absent": (("OUT",), absent, absent_tables),
    "thresholds": (("OUT",), scars, scar_table),
    "incomplete": (("OUT_FULL", "OUT_PART"), incomplete, incomplete_table),
}


def parser() -> argparse.ArgumentParser:
    """The commands and their options."""
    top = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = top.add_subparsers(dest="command", required=True)
    folders = {name: (*runs, "DIR") for name, (runs, _, _) in COMMANDS.items()} | {"hide": ("DIR", "NEW")}
    for name, given in folders.items():
        command = commands.add_parser(name)
        for folder in given:
            command.add_argument(folder, type=Path)
        command.add_argument("--protocol", default="infarct", help="the one that was segmented with")
    commands.choices["hide"].add_argument("--sequence", default="T2", help="the one to leave out")
    return top


def main(argv: Sequence[str] | None = None) -> int:
    """Parses, does one command and returns the exit code."""
    arguments, found = parser().parse_args(argv), {}
    try:
        wanted = protocol.load(arguments.protocol)
        patients = find(arguments.DIR, wanted)
        if arguments.command == "hide":
            return hide(arguments, wanted, patients)
        if arguments.command == "thresholds" and SCAR not in wanted.percent_of:
            raise UsageError(f"thresholds: protocol {wanted.name} has no {SCAR} in a wall; choose another --protocol")
        runs, measured, tables = COMMANDS[arguments.command]
        for study in patients.studies:
            try:
                found[study.patient] = measured(*(getattr(arguments, name) for name in runs), study, wanted)
            except StudyError as error:
                print(f"left out: {study.patient}: {error.code}: {error}", file=sys.stderr)
        if not found:
            raise UsageError("no patient could be measured; was this OUT made from this DIR?")
    except UsageError as error:
        print(error, file=sys.stderr)
        return 2
    print(tables(found))
    return int(len(found) < len(patients.studies))


if __name__ == "__main__":
    sys.exit(main())
