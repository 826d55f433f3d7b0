"""How well it does, as Markdown tables.

    python scripts/measure_accuracy.py all ROOT OUT

segments and measures every set of patients that ROOT holds (folders ``myops``, ``emidec``, ``openms``, ``oasis``;
``phantom_hearts`` and ``phantom_brains`` are made in OUT where they are absent) and writes one table, OUT/accuracy.md,
and the same as JSON. Each patient's figures are kept as long as code and images are the same: interrupt it, and run it
again.

The other commands read results of ``deepgmm segment``: ``absent`` tells what was painted in slices that lack a tissue,
``thresholds`` compares the scar with the classical infarct thresholds, ``incomplete`` tells what fewer sequences cost,
and ``hide`` links a cohort without a sequence, to be segmented for the latter. The exit code is 1 if a patient was left
out, 2 if nothing could be done.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import measure_sets
import numpy as np
import runner
import torch
from measure_sets import Facts, brains, hearts
from measure_sets.hearts import OURS, SCAR, Run

import monai_deepgmm
from monai_deepgmm import protocol
from monai_deepgmm.errors import StudyError, UsageError
from monai_deepgmm.images import atomic_files, nifti
from monai_deepgmm.patients.discovery import find
from monai_deepgmm.patients.study import Cohort, Study
from monai_deepgmm.protocol import Protocol
from monai_deepgmm.results.thresholds import THRESHOLDS, Labels, labelled

SETS: Mapping[str, measure_sets.Set] = {**hearts.SETS, **brains.SETS}
NOTE = """Figures of the default methods; *in view* says whether a set's reference labels were looked at when constants
were chosen. Thresholds are taken slice by slice on LGE, in the wall that our method found, nSD above its darker half.
Dice is named, without reference labels. Research use only, not a medical device."""


# Every set -----------------------------------------------------------------------------------------------------------


def measured(options: argparse.Namespace) -> Iterator[tuple[str, dict[str, Facts], int]]:
    """Each set that is at hand: its name, what was measured of each patient, and how many were left out."""
    code = code_digest()
    for name, one in SETS.items():
        folder = options.ROOT / name
        if not folder.is_dir():
            if not one.phantom:
                print(f"left out: {name}: there is no folder {name} in ROOT", file=sys.stderr)
                continue
            folder = runner.phantoms(options.OUT / name, *one.phantom)
        found, failed = {}, 0
        for study in one.studies(folder):
            same = {"code": code, "files": runner.stamps(measure_sets.files(study))}
            try:
                path = options.OUT / "patients" / name / f"{study.patient}.json"
                made = runner.kept(path, same, lambda s=study, set_=one: {"found": set_.measure(s)})
                found[study.patient] = made["found"]
            except StudyError as error:
                print(f"left out: {name}: {study.patient}: {error.code}: {error}", file=sys.stderr)
                failed += 1
        yield name, found, failed


def code_digest() -> str:
    """What tells that the package and what measures it are the same."""
    package = Path(monai_deepgmm.__file__).parent
    files = [*package.rglob("*.py"), *package.rglob("*.yaml"), *Path(measure_sets.__file__).parent.glob("*.py")]
    return runner.digest([atomic_files.sha256(path) for path in sorted(files)])


def every_set(options: argparse.Namespace) -> int:
    """Measures all sets and writes the table; the exit code."""
    torch.set_num_threads(1)
    rows, content, failed = [("set", "in view", "figure", OURS, "others")], [], 0
    for name, found, left_out in measured(options):
        failed += left_out
        if not found:
            continue
        one, figures = SETS[name], list(SETS[name].figures(found))
        head = (f"**{name}**: {one.title}", one.in_view)
        for figure in figures:
            rivals = ", ".join(f"{way} {runner.shown(value)}" for way, value in figure.rivals.items())
            rows.append((*head, figure.name, runner.shown(figure.ours), rivals))
            head = ("", "")
        lines = [{"figure": f.name, OURS: f.ours, "others": dict(f.rivals)} for f in figures]
        content.append(
            {"set": name, "title": one.title, "in_view": one.in_view, "patients": list(found), "figures": lines}
        )
        made = runner.machine()
        page = f"# Accuracy\n\n{NOTE}\n\n{runner.table(rows, text=3)}\n\n{runner.machine_line(made)}\n"
        runner.write(options.OUT / "accuracy.md", page)
        runner.write(options.OUT / "accuracy.json", {"machine": made, "left_out": failed, "sets": content})
    if not content:
        raise UsageError(f"ROOT: {options.ROOT} holds none of {', '.join(SETS)}")
    print(page)
    return int(failed > 0)


# One patient of a finished run ---------------------------------------------------------------------------------------


def read(out: Path, study: Study) -> Run:
    """The segmentation of a patient.

    Raises:
        StudyError: it is missing or cannot be read.
    """
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


def absent(out: Path, study: Study, wanted: Protocol) -> list[Facts]:
    """What was painted in each labelled slice of a patient."""
    run = read(out, study)
    return list(hearts.by_slice(run.labels, hearts.known(study, wanted, run), run, wanted))


def scars(out: Path, study: Study, wanted: Protocol) -> dict[str, tuple[float, float]]:
    """Dice in 3-D (NaN without a true scar) and share of the wall of the scar, as segmented and by each threshold."""
    run = read(out, study)
    found = hearts.scars(study, wanted, run)
    true = (hearts.known(study, wanted, run) == wanted.tissue(SCAR).index).astype(np.int64)
    wall = max(int(hearts.walls(run.labels, wanted).sum()), 1)
    return {way: (runner.dice(one, true, {SCAR: 1})[SCAR], one.sum() / wall) for way, one in found.items()}


def incomplete(full: Path, part: Path, study: Study, wanted: Protocol) -> list[tuple[str, float, float]]:
    """Each tissue of each labelled slice that holds it, with its Dice in both runs, merged alike."""
    more, fewer = read(full, study), read(part, study)
    if strangers := set(fewer.sequences) - set(more.sequences):
        raise StudyError("E_FILE", f"OUT_PART used {', '.join(sorted(strangers))}, OUT_FULL did not", "Swap the two")
    labels, merging = nifti.resample(more.volume, fewer.volume, nearest=True), wanted.merged(fewer.sequences)
    merged: Labels = np.sum([target * (np.rint(labels) == index) for index, target in merging.items()], axis=0)
    real, tissues = hearts.known(study, wanted, fewer), {t.name: t.index for t in wanted.visible(fewer.sequences)}
    rows = []
    for *both, true in labelled(fewer.axis, merged, fewer.labels, real):
        first, second = (runner.dice(found, true, tissues) for found in both)
        rows += [(name, dice, second[name]) for name, dice in first.items() if dice == dice]
    return rows


def hide(options: argparse.Namespace, wanted: Protocol, patients: Cohort) -> int:
    """Links the files of patients, but for a sequence, into a new folder, and lists what is there now."""
    sequence, new = options.sequence, options.NEW
    if patients.layout not in ("myops", "folder") or sequence not in wanted.sequences:
        choices = ", ".join(wanted.sequences)
        raise UsageError(f"hide: needs layout myops or folder, not {patients.layout}, and a sequence of {choices}")
    if new.is_symlink() or new.exists() or new.resolve().is_relative_to(options.DIR.resolve()):
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
    rows = [(study.patient, ", ".join(study.images)) for study in find(new, wanted).studies]
    print(runner.table([("patient", "sequences left"), *rows]))
    return int(len(rows) < len(patients.studies))


# Tables --------------------------------------------------------------------------------------------------------------


def absent_tables(found: Iterable[Sequence[Facts]]) -> str:
    """Quartiles of what was painted where nothing is, and the mean Dice of the tissues present."""
    rows = list(chain(*found))
    quartiles = [("tissue absent", "slices", "share of the wall painted, 25 %", "50 %", "75 %")]
    for name in sorted({name for row in rows for name in row["painted"]}):
        shares = [row["painted"][name] for row in rows if name in row["painted"]]
        quartiles.append((name, str(len(shares)), *map(runner.shown, np.quantile(shares, (0.25, 0.5, 0.75)))))
    complete = [row for row in rows if all(value == value for value in row["dice"].values())]
    scores = [("slices", "n", "mean Dice of the tissues present")]
    for kind, chosen in (("all", rows), ("complete", complete)):
        mean = runner.mean(runner.mean(row["dice"].values()) for row in chosen)
        scores.append((kind, str(len(chosen)), runner.shown(mean)))
    return f"{runner.table(quartiles)}\n\n{runner.table(scores)}"


def scar_table(found: Mapping[str, Mapping[str, tuple[float, float]]]) -> str:
    """One row for each patient."""
    rows = [(p, *(f"{runner.shown(d)} ({share:.1%})" for d, share in ways.values())) for p, ways in found.items()]
    return runner.table([("scar: Dice (share of the wall)", OURS, *THRESHOLDS), *rows])


def incomplete_table(found: Iterable[Sequence[tuple[str, float, float]]]) -> str:
    """One row for each tissue."""
    rows, lines = list(chain(*found)), [("tissue", "slices", "Dice, full", "Dice, fewer sequences", "loss")]
    for name in dict.fromkeys(row[0] for row in rows):
        scores = np.array([row[1:] for row in rows if row[0] == name])
        first, second = scores.mean(0)
        lines.append((name, str(len(scores)), *map(runner.shown, (first, second, first - second))))
    return runner.table(lines)


#: Command → the runs it reads, what it measures of a patient, and the table of all patients.
COMMANDS: dict[str, tuple[tuple[str, ...], Callable[..., Any], Callable[[dict[str, Any]], str]]] = {
    "absent": (("OUT",), absent, lambda found: absent_tables(found.values())),
    "thresholds": (("OUT",), scars, scar_table),
    "incomplete": (("OUT_FULL", "OUT_PART"), incomplete, lambda found: incomplete_table(found.values())),
}


# The run -------------------------------------------------------------------------------------------------------------


def parser() -> argparse.ArgumentParser:
    """The commands and their options."""
    top = runner.parser(__doc__)
    commands = top.add_subparsers(dest="command", required=True)
    folders = {"all": ("ROOT", "OUT"), "hide": ("DIR", "NEW")}
    folders |= {name: (*runs, "DIR") for name, (runs, _, _) in COMMANDS.items()}
    for name, given in folders.items():
        command = commands.add_parser(name)
        for folder in given:
            command.add_argument(folder, type=Path)
        if name != "all":
            command.add_argument("--protocol", default="infarct", help="the one that was segmented with")
    commands.choices["hide"].add_argument("--sequence", default="T2", help="the one to leave out")
    return top


def main(argv: Sequence[str] | None = None) -> int:
    """Parses, does one command and returns the exit code."""
    options = parser().parse_args(argv)
    work = every_set if options.command == "all" else one_command
    return runner.ended("measure_accuracy", lambda: work(options))


def one_command(options: argparse.Namespace) -> int:
    """All commands but ``all``; the exit code."""
    wanted = protocol.load(options.protocol)
    patients = find(options.DIR, wanted)
    if options.command == "hide":
        return hide(options, wanted, patients)
    if options.command == "thresholds" and SCAR not in wanted.percent_of:
        raise UsageError(f"thresholds: protocol {wanted.name} has no {SCAR} in a wall; choose another --protocol")
    runs, measure, table = COMMANDS[options.command]
    found = {}
    for study in patients.studies:
        try:
            found[study.patient] = measure(*(getattr(options, name) for name in runs), study, wanted)
        except StudyError as error:
            print(f"left out: {study.patient}: {error.code}: {error}", file=sys.stderr)
    if not found:
        raise UsageError("no patient could be measured; was this OUT made from this DIR?")
    print(table(found))
    return int(len(found) < len(patients.studies))


if __name__ == "__main__":
    sys.exit(main())
