#!/usr/bin/env python
"""Brain tissue beside other software: Dice, CPU seconds and peak memory on any folder of T1 images with labels.

    python scripts/compare_brains.py DATA OUT --methods deepgmm deepgmm:gmm,covariance=full sklearn-tied atropos

DATA is read as ``deepgmm segment --protocol brain`` reads it. A method is ``deepgmm``, alone or with what ``--method``
and ``--set`` would say after a colon, or one of the rivals, which see T1 alone; their three components are named by
their mean intensity. Each patient and method has a process of its own, on one thread unless the environment says
otherwise, and leaves one JSON in OUT, which a second run takes as it is. Tissues are scored where a voxel has a
reference label. The times are from the files to the labels, without imports; ``deepgmm`` also measures and writes its
pages in them. The peak of memory is the process's, libraries included. The exit code is 1 if something was left out, 2
if nothing could be done.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from importlib import metadata, util
from itertools import product
from pathlib import Path
from statistics import fmean, median
from typing import Any

import runner
from brain_methods import OURS, PARENCHYMA, RIVALS, SEQUENCE, TISSUES, Labels, by_intensity, deepgmm
from runner import Facts

from monai_deepgmm import protocol
from monai_deepgmm.errors import UsageError
from monai_deepgmm.images import labels as reference_labels
from monai_deepgmm.images import nifti
from monai_deepgmm.patients import discovery
from monai_deepgmm.patients.study import Cohort, Study
from monai_deepgmm.protocol import Protocol

# One measurement -----------------------------------------------------------------------------------------------------


def measure(patient: Cohort, method: str, wanted: Protocol) -> Facts:
    """Segments one patient in this process; what one JSON of OUT holds."""
    rival, study = RIVALS.get(method), patient.studies[0]
    segment = by_intensity(rival.make(rival.word)) if rival else deepgmm(method.partition(":")[2])
    labels, seconds = runner.timed(lambda: segment(patient, wanted))
    peak_gb = runner.peak_mb() / 1000
    like = nifti.read(study.images[SEQUENCE])
    known = reference_labels.read(study, wanted, tuple(study.images), like=like).labels
    package = rival.package if rival else "monai-deepgmm"
    return {
        "patient": study.patient,
        "method": method,
        "version": f"{package} {metadata.version(package)}",
        "shape": list(labels.shape),
        "voxels_scored": int((known > 0).sum()),
        **{name: round(value, 2) for name, value in seconds.items()},
        "peak_gb": round(peak_gb, 3),
        "dice": dice(labels, known, wanted),
    }


def dice(found: Labels, known: Labels, wanted: Protocol) -> dict[str, float]:
    """Dice of each tissue among the voxels ``(X, Y, Z)`` that have a reference label; NaN where neither holds it."""
    inside, indices = known > 0, {name: wanted.tissue(name).index for name in TISSUES}
    return runner.dice(found[inside], known[inside], indices, needed=False)


# All of them ---------------------------------------------------------------------------------------------------------


def measured(arguments: argparse.Namespace, methods: Sequence[str], studies: Sequence[Study]) -> Iterator[Facts]:
    """Each patient with each method, from OUT or anew; what fails is told and left out."""
    for method, study in product(methods, studies):
        path = arguments.OUT / study.patient / f"{re.sub(r'[^A-Za-z0-9.+=-]+', '_', method)}.json"
        words = (arguments.DATA, arguments.OUT, "--here", "--patients", study.patient, "--methods", method)
        make = lambda words=words: runner.apart(__file__, *words, threads=True)  # noqa: E731
        try:
            yield runner.kept(path, {"patient": study.patient, "method": method}, make)
        except runner.StageError as error:
            print(f"left out: {study.patient}, {method}: {error}", file=sys.stderr)


def installed(methods: Sequence[str]) -> Iterator[str]:
    """The methods that can run here; of the others, what would install them is told.

    Raises:
        UsageError: a method is unknown.
    """
    for method in methods:
        rival = RIVALS.get(method)
        if rival is None and method.partition(":")[0] != OURS:
            raise UsageError(f"--methods {method}: unknown; choose from {OURS}[:METHOD,key=value], {', '.join(RIVALS)}")
        if rival is None or util.find_spec(rival.module) is not None:
            yield method
        else:
            print(f"left out: {method}: pip install {rival.package}", file=sys.stderr)


# What is printed -----------------------------------------------------------------------------------------------------


def shapes(found: Sequence[Mapping[str, Any]]) -> str:
    """How many patients there are of each shape, and how many voxels were scored."""
    patients = {one["patient"]: one for one in found}.values()
    scored = median(one["voxels_scored"] for one in patients)
    counts = Counter(" × ".join(map(str, one["shape"])) for one in patients)
    listed = ", ".join(f"{shape} ({n})" for shape, n in counts.items())
    return f"{len(patients)} patient(s): {listed}; voxels scored: median {scored:.0f}"


def table(found: Sequence[Mapping[str, Any]]) -> Iterator[Sequence[str]]:
    """One row for each method."""
    yield ("method", "version", "n", *TISSUES, " + ".join(PARENCHYMA), "CPU s", "wall s", "peak GB")
    for method in dict.fromkeys(one["method"] for one in found):
        rows = [one for one in found if one["method"] == method]
        scores = [runner.spread(row["dice"][tissue] for row in rows) for tissue in TISSUES]
        scores += [runner.spread(fmean(row["dice"][tissue] for tissue in PARENCHYMA) for row in rows)]
        costs = [f"{fmean(row[key] for row in rows):.1f}" for key in ("cpu_seconds", "wall_seconds")]
        yield (method, rows[0]["version"], str(len(rows)), *scores, *costs, f"{max(r['peak_gb'] for r in rows):.2f}")


def parser() -> argparse.ArgumentParser:
    """The arguments."""
    known = runner.parser(__doc__)
    known.add_argument("DATA", type=Path, help="the folder with the patients and their labels")
    known.add_argument("OUT", type=Path, help="the folder for the measurements")
    known.add_argument("--methods", nargs="+", metavar="METHOD", default=[OURS, *RIVALS], help="what to compare")
    known.add_argument("--patients", nargs="+", metavar="ID", default=(), help="only these")
    known.add_argument("--here", action="store_true", help="measure in this process; how the script calls itself")
    return known


def main(argv: Sequence[str] | None = None) -> int:
    """Measures what is not measured yet, prints the table and returns the exit code."""
    arguments = parser().parse_args(argv)
    return runner.ended("compare_brains", lambda: run(arguments))


def run(arguments: argparse.Namespace) -> int:
    """Everything, or with ``--here`` one patient and method."""
    methods, wanted = list(installed(arguments.methods)), protocol.load("brain")
    patients = discovery.find(arguments.DATA, wanted, patients=arguments.patients)
    if arguments.here:
        print(json.dumps(measure(patients, methods[0], wanted)))
        return 0
    found = list(measured(arguments, methods, patients.studies))
    if not found:
        raise UsageError("nothing could be measured")
    threads = os.environ.get(runner.THREADS[0], "1")
    print(f"{runner.machine_line(runner.machine(), f'{threads} thread(s)')}\n{shapes(found)}\n")
    print(runner.table(table(found), text=2))
    return int(len(found) < len(arguments.methods) * len(patients.studies))


if __name__ == "__main__":
    sys.exit(main())
