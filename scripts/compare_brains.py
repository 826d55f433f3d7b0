#!/usr/bin/env python
"""Brain tissue beside other software: Dice, CPU seconds and peak memory on any folder of T1 images with labels.

    python scripts/compare_brains.py DATA OUT --methods deepgmm deepgmm:gmm,covariance=full sklearn-tied atropos

DATA is read as ``deepgmm segment --protocol brain`` reads it. A method is ``deepgmm``, alone or with what ``--method``
and ``--set`` would say after a colon, or one of the rivals, which see T1 alone; their three components are named by
their mean intensity. Each patient and method has a process of its own, on one thread unless the environment says
otherwise, and leaves one JSON in OUT, which a second run takes as it is. Tissues are scored where the truth holds a
label. The times are from the files to the labels, without imports; ``deepgmm`` also measures and writes its pages in
them. The peak of memory is the process's, libraries included. The exit code is 1 if something was left out, 2 if
nothing could be done.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import resource
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib import metadata, util
from itertools import product
from pathlib import Path
from statistics import fmean, median, stdev
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from monai_deepgmm import protocol
from monai_deepgmm.errors import StudyError, UsageError
from monai_deepgmm.images import atomic_files as files
from monai_deepgmm.images import labels as truth
from monai_deepgmm.images import loading as scan
from monai_deepgmm.images import nifti
from monai_deepgmm.patients import discovery as cohort
from monai_deepgmm.patients.discovery import Cohort, Study
from monai_deepgmm.protocol import Protocol
from monai_deepgmm.results import metrics

Labels = npt.NDArray[np.integer[Any]]
#: One patient's files → labels (X, Y, Z), the tissues' indices inside the mask.
Segment = Callable[[Cohort, Protocol], Labels]
OURS = "deepgmm"
SEQUENCE = "T1"
#: In the order of the table's columns; the last is the mean of grey and white matter.
TISSUES = ("CSF", "GM", "WM")
PARENCHYMA = ("GM", "WM")
#: The quantiles at which ANTs' own pipelines truncate intensities by default; here inside the mask.
TRUNCATION = (0.025, 0.975)
THREADS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "ITK_GLOBAL_DEFAULT_NUMBER_OF_THREADS")


# The methods: each imports what it needs and returns what segments, so that imports are not timed ---------------------


def deepgmm(words: str) -> Segment:
    """This software, through the function that its command calls.

    Args:
        words: ``--method`` and ``--set``s, separated by commas; empty: the defaults.

    Raises:
        UsageError: one of them is unknown.
    """
    from monai_deepgmm import batch
    from monai_deepgmm.methods import config

    given = [word for word in words.split(",") if word]
    named = [word for word in given if "=" not in word]
    if len(named) > 1:
        raise UsageError(f"{OURS}:{words}: {' and '.join(named)} are two methods; give one")
    settings = [word for word in given if "=" in word]

    def segment(patient: Cohort, wanted: Protocol) -> Labels:
        asked = config.build(protocol=wanted.name, method=named[0] if named else None, settings=settings)
        with tempfile.TemporaryDirectory() as folder:
            rows: list[dict[str, Any]] = []
            if batch.run(patient, Path(folder), asked, batch.Plan(), progress=rows.append) != batch.OK:
                raise StudyError(rows[0]["code"], rows[0]["message"], rows[0]["remedy"])
            name = rows[0]["patient"]
            labels: Labels = np.rint(nifti.read(Path(folder) / name / f"{name}_dseg.nii.gz").data).astype(np.int64)
            return labels

    return segment


def by_intensity(components: Callable[[scan.Scan], Labels]) -> Segment:
    """What segments with unnamed components: the darkest on T1 is the tissue that the protocol expects darkest.

    Args:
        components: a scan → (X, Y, Z) numbers from 1; 0 is no component.
    """

    def segment(patient: Cohort, wanted: Protocol) -> Labels:
        found = scan.load(patient.studies[0], wanted)
        return ordered(np.where(found.mask, components(found), 0), found.image[0], wanted)

    return segment


def ordered(components: Labels, image: npt.NDArray[np.floating[Any]], wanted: Protocol) -> Labels:
    """Components ``(X, Y, Z)`` as tissues, both in the order of their brightness in the T1 ``image``.

    Raises:
        StudyError: there are fewer components than tissues, as after a fit that broke down.
    """
    tissues = sorted(wanted.visible([SEQUENCE]), key=lambda tissue: tissue.signature[SEQUENCE])
    present = [int(c) for c in np.unique(components) if c > 0]
    if len(present) != len(tissues):
        raise StudyError("E_INTERNAL", f"it found {len(present)} components, but {len(tissues)} are expected")
    present.sort(key=lambda c: float(image[components == c].mean()))
    labels = np.zeros(components.shape, dtype=np.int64)
    for component, tissue in zip(present, tissues, strict=True):
        labels[components == component] = tissue.index
    return labels


def sklearn(covariance: str) -> Segment:
    """scikit-learn's mixture of the intensities alone."""
    from sklearn.mixture import GaussianMixture

    def components(found: scan.Scan) -> Labels:
        mixture = GaussianMixture(len(TISSUES), covariance_type=covariance, random_state=0)
        labels = np.zeros(found.mask.shape, dtype=np.int64)
        labels[found.mask] = 1 + mixture.fit_predict(found.image[0][found.mask][:, None].astype(np.float64))
        return labels

    return by_intensity(components)


def atropos(before: str) -> Segment:
    """ANTs' mixture with a Markov random field, weight 0.1 on the 26 neighbours.

    Args:
        before: what is done to the image first: ``truncate``, ``N4``, both or nothing. Its k-means start reaches up to
            the brightest voxel, so that without truncation a few bright vessels can take a component for themselves.
    """
    import ants

    def components(found: scan.Scan) -> Labels:
        spacing, values = found.reference.spacing_mm, found.image[0]
        if "truncate" in before:
            values = values.clip(*np.quantile(values[found.mask], TRUNCATION).astype(values.dtype))
        image = ants.from_numpy(values, spacing=spacing)
        mask = ants.from_numpy(found.mask.astype(np.float32), spacing=spacing)
        if "N4" in before:
            image = ants.n4_bias_field_correction(image, mask=mask)
        fitted = ants.atropos(a=image, x=mask, i=f"KMeans[{len(TISSUES)}]", m="[0.1,1x1x1]", c="[5,0]")
        labels: Labels = np.rint(fitted["segmentation"].numpy()).astype(np.int64)
        return labels

    return by_intensity(components)


def dipy(beta: str) -> Segment:
    """DIPY's Gaussian mixture with a hidden Markov random field; what is not brain is its background."""
    from dipy.segment.tissue import TissueClassifierHMRF

    def components(found: scan.Scan) -> Labels:
        brain = np.where(found.mask, found.image[0], 0).astype(np.float64)
        _, final, _ = TissueClassifierHMRF(verbose=False).classify(brain, len(TISSUES), float(beta))
        labels: Labels = np.rint(final).astype(np.int64)
        return labels

    return by_intensity(components)


class Rival(NamedTuple):
    """Other software: what makes it segment and with which word, the module it needs and who installs that."""

    make: Callable[[str], Segment]
    word: str
    module: str
    package: str


RIVALS: Mapping[str, Rival] = {
    "sklearn-tied": Rival(sklearn, "tied", "sklearn", "scikit-learn"),
    "sklearn-full": Rival(sklearn, "full", "sklearn", "scikit-learn"),
    "atropos": Rival(atropos, "", "ants", "antspyx"),
    "n4+atropos": Rival(atropos, "N4", "ants", "antspyx"),
    "truncate+atropos": Rival(atropos, "truncate", "ants", "antspyx"),
    "truncate+n4+atropos": Rival(atropos, "truncate N4", "ants", "antspyx"),
    "dipy-hmrf": Rival(dipy, "0.1", "dipy", "dipy"),
}


# One measurement -----------------------------------------------------------------------------------------------------


def measure(patient: Cohort, method: str, wanted: Protocol) -> dict[str, Any]:
    """Segments one patient in this process; what one JSON of OUT holds."""
    known = RIVALS.get(method)
    segment = known.make(known.word) if known else deepgmm(method.partition(":")[2])
    cpu_s, wall_s = cpu_seconds(), time.perf_counter()
    labels = segment(patient, wanted)
    cpu_s, wall_s = cpu_seconds() - cpu_s, time.perf_counter() - wall_s
    peak_gb = peak_memory_gb()
    study = patient.studies[0]
    volume = nifti.read(study.images[SEQUENCE])
    true = truth.read(study, wanted, tuple(study.images), like=volume).labels
    package = known.package if known else "monai-deepgmm"
    return {
        "patient": study.patient,
        "method": method,
        "version": f"{package} {metadata.version(package)}",
        "shape": list(labels.shape),
        "voxels_scored": int((true > 0).sum()),
        "cpu_seconds": round(cpu_s, 2),
        "wall_seconds": round(wall_s, 2),
        "peak_gb": round(peak_gb, 3),
        "dice": dice(labels, true, wanted),
    }


def dice(found: Labels, true: Labels, wanted: Protocol) -> dict[str, float]:
    """Dice of each tissue among the voxels ``(X, Y, Z)`` that have a true label; NaN where neither holds it."""
    inside, indices = true > 0, [wanted.tissue(name).index for name in TISSUES]
    values = metrics.overlap(metrics.confusion(found[inside], true[inside], indices)).dice
    return {name: float(value) for name, value in zip(TISSUES, values, strict=True)}


def cpu_seconds() -> float:
    """Of this process, its threads and the processes that it has waited for."""
    return sum(sum(resource.getrusage(who)[:2]) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))


def peak_memory_gb() -> float:
    """The most that this process has held at a time."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


def apart(arguments: argparse.Namespace, patient: str, method: str) -> str | None:
    """Has a process of its own measure and write, so that no memory is shared; what it said if it failed."""
    command = [sys.executable, __file__, str(arguments.DATA), str(arguments.OUT), "--here"]
    command += ["--patients", patient, "--methods", method]
    done = subprocess.run(command, env=dict.fromkeys(THREADS, "1") | os.environ, capture_output=True, text=True)
    return (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1] if done.returncode else None


# All of them ---------------------------------------------------------------------------------------------------------


def written(out: Path, patient: str, method: str) -> Path:
    """Where a measurement lies."""
    return out / patient / f"{re.sub(r'[^A-Za-z0-9.+=-]+', '_', method)}.json"


def earlier(path: Path, method: str) -> dict[str, Any] | None:
    """A measurement of an earlier run, or None."""
    try:
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return found if found.get("method") == method else None


def measured(arguments: argparse.Namespace, studies: Sequence[Study]) -> Iterator[dict[str, Any]]:
    """Each patient with each method, from OUT or anew; what fails is told and left out."""
    for method, study in product(arguments.methods, studies):
        path = written(arguments.OUT, study.patient, method)
        found, said = earlier(path, method), "it left no measurement"
        if found is None:
            said = apart(arguments, study.patient, method) or said
            found = earlier(path, method)
        if found is None:
            print(f"left out: {study.patient}, {method}: {said}", file=sys.stderr)
        else:
            yield found


def here(arguments: argparse.Namespace, patient: Cohort, wanted: Protocol) -> None:
    """Measures one patient with one method, and writes it."""
    path = written(arguments.OUT, patient.studies[0].patient, arguments.methods[0])
    path.parent.mkdir(parents=True, exist_ok=True)
    content = json.dumps(measure(patient, arguments.methods[0], wanted), indent=1) + "\n"
    files.write_whole(path, content.encode())


def installed(methods: Sequence[str]) -> list[str]:
    """The methods that can run here; of the others, what would install them is told.

    Raises:
        UsageError: a method is unknown.
    """
    able = []
    for method in methods:
        rival = RIVALS.get(method)
        if rival is None and method.partition(":")[0] != OURS:
            raise UsageError(f"--methods {method}: unknown; choose from {OURS}[:METHOD,key=value], {', '.join(RIVALS)}")
        if rival is None or util.find_spec(rival.module) is not None:
            able.append(method)
        else:
            print(f"left out: {method}: pip install {rival.package}", file=sys.stderr)
    return able


# What is printed -----------------------------------------------------------------------------------------------------


def machine() -> str:
    """The processor, the cores and threads, and Python."""
    model = platform.processor() or platform.machine()
    try:
        told = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(encoding="utf-8"), re.MULTILINE)
        model = told[1] if told else model
    except OSError:
        pass  # only Linux has it
    threads = (dict.fromkeys(THREADS, "1") | os.environ)[THREADS[0]]
    system = f"{platform.system()}, Python {platform.python_version()}"
    return f"{model}, {os.cpu_count()} cores, {threads} thread(s); {system}"


def shapes(found: Sequence[Mapping[str, Any]]) -> str:
    """How many patients there are of each shape, and how many voxels were scored."""
    patients = {one["patient"]: one for one in found}.values()
    scored = median(one["voxels_scored"] for one in patients)
    counts = Counter(" × ".join(map(str, one["shape"])) for one in patients)
    listed = ", ".join(f"{shape} ({n})" for shape, n in counts.items())
    return f"{len(patients)} patient(s): {listed}; voxels scored: median {scored:.0f}"


def spread(values: Sequence[float]) -> str:
    """Mean ± standard deviation of what is not NaN; a dash where there is nothing."""
    kept = [value for value in values if value == value]
    sd = f" ± {stdev(kept):.3f}" if len(kept) > 1 else ""
    return f"{fmean(kept):.3f}{sd}" if kept else "-"


def table(found: Sequence[Mapping[str, Any]]) -> str:
    """One row for each method, in Markdown."""
    head = ["method", "version", "n", *TISSUES, " + ".join(PARENCHYMA), "CPU s", "wall s", "peak GB"]
    lines = [head, ["---", "---", *["---:"] * (len(head) - 2)]]
    for method in dict.fromkeys(one["method"] for one in found):
        rows = [one for one in found if one["method"] == method]
        scores = [spread([row["dice"][tissue] for row in rows]) for tissue in TISSUES]
        scores += [spread([fmean(row["dice"][tissue] for tissue in PARENCHYMA) for row in rows])]
        costs = [f"{fmean(row[key] for row in rows):.1f}" for key in ("cpu_seconds", "wall_seconds")]
        peak = f"{max(row['peak_gb'] for row in rows):.2f}"
        lines.append([method, rows[0]["version"], str(len(rows)), *scores, *costs, peak])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def parser() -> argparse.ArgumentParser:
    """The arguments."""
    known = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    known.add_argument("DATA", type=Path, help="the folder with the patients and their labels")
    known.add_argument("OUT", type=Path, help="the folder for the measurements")
    known.add_argument("--methods", nargs="+", metavar="METHOD", default=[OURS, *RIVALS], help="default: %(default)s")
    known.add_argument("--patients", nargs="+", metavar="ID", default=(), help="only these")
    known.add_argument("--here", action="store_true", help="measure in this process; how the script calls itself")
    return known


def main(argv: Sequence[str] | None = None) -> int:
    """Measures what is not measured yet, prints the table and returns the exit code."""
    arguments = parser().parse_args(argv)
    try:
        asked, wanted = list(arguments.methods), protocol.load("brain")
        arguments.methods = installed(asked)
        patients = cohort.find(arguments.DATA, wanted, patients=arguments.patients)
        if arguments.here:
            here(arguments, patients, wanted)
            return 0
        found = list(measured(arguments, patients.studies))
        if not found:
            raise UsageError("nothing could be measured")
    except (StudyError, UsageError) as error:
        print(error, file=sys.stderr)
        return 2
    print(f"{machine()}\n{shapes(found)}\n\n{table(found)}")
    return int(len(found) < len(asked) * len(patients.studies))


if __name__ == "__main__":
    sys.exit(main())
