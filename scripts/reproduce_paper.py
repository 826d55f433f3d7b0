#!/usr/bin/env python
"""Tables 1 and 2 of Schwab et al. 2024 (arXiv 2404.12252) on your own copy of MyoPS 2020, beside the published ones.

    python scripts/reproduce_paper.py DATA OUT

DATA is the folder with the 25 training patients, named as the challenge names them (``myops_training_101_DE.nii.gz``
…, the labels beside them or in a folder of their own) or ``Case3001_LGE.nii.gz`` …. Everything goes into OUT:
``tables.md``, ``tables.json``, two pictures, and the runs and networks that they come from. The pictures show
patients: mind the terms of the data. Kill it anywhere and run it again: it goes on. A change of the installed code
goes unnoticed if its version does not change; take another OUT then.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import ctypes
import hashlib
import io
import json
import os
import platform
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from statistics import fmean, stdev
from typing import Any, NamedTuple, NoReturn

import numpy as np
from monai_deepgmm.networks.model_spec import WEIGHTS
from PIL import Image, ImageColor, ImageDraw, ImageFont

from monai_deepgmm import cli, protocol
from monai_deepgmm.errors import StudyError, UsageError
from monai_deepgmm.images import atomic_files as files
from monai_deepgmm.images import labels as truth
from monai_deepgmm.images import loading as scan
from monai_deepgmm.images import nifti
from monai_deepgmm.patients import discovery as cohort
from monai_deepgmm.patients.study import Cohort
from monai_deepgmm.results import metrics, mosaic
from monai_deepgmm.results.provenance import versions

TISSUES = ("blood", "myocardium", "edema", "scar")
COLUMNS = (*TISSUES, "mean")
#: Mean and standard deviation over slices, in the order of COLUMNS, as printed in the paper.
PUBLISHED: Mapping[str, Mapping[str, tuple[tuple[float, float], ...]]] = {
    "table1": {
        "GMM": ((0.75, 0.14), (0.73, 0.13), (0.13, 0.19), (0.38, 0.22), (0.50, 0.04)),
        "deepG": ((0.78, 0.12), (0.77, 0.13), (0.08, 0.16), (0.48, 0.20), (0.53, 0.03)),
        "SVGMM": ((0.77, 0.08), (0.74, 0.10), (0.18, 0.19), (0.49, 0.17), (0.55, 0.05)),
        "deepSVG": ((0.79, 0.07), (0.77, 0.09), (0.15, 0.18), (0.52, 0.17), (0.56, 0.05)),
    },
    "table2": {
        "SVGMM": ((0.79, 0.05), (0.78, 0.06), (0.09, 0.12), (0.52, 0.17), (0.55, 0.05)),
        "deepSVG": ((0.70, 0.11), (0.79, 0.04), (0.12, 0.08), (0.49, 0.16), (0.52, 0.04)),
        "SVGMMμ": ((0.79, 0.04), (0.82, 0.05), (0.21, 0.12), (0.49, 0.28), (0.58, 0.10)),
        "deepSVGμ": ((0.86, 0.04), (0.83, 0.06), (0.29, 0.15), (0.53, 0.25), (0.63, 0.08)),
    },
}
#: The paper's test patients, and all of its patients, by the challenge's numbers (3001 is 101).
TEST_NUMBERS = frozenset({109, 114, 117, 120, 122})
ALL_NUMBERS = frozenset(range(101, 126))
#: The complete slices that each table is over.
SLICES = {"table1": 79, "table2": 19}
#: How far below the published mean still counts as reproduced.
MARGIN = 0.03
NAMES = {"dice_matched": "re-ordered with the truth", "dice": "named without truth"}
SHAPES = {"diag": "diagonal Σ", "tied": "shared Σ"}
#: What --quick asks of segment and of train: far too little for any result.
QUICK_SEGMENT, QUICK_TRAIN = ("max_iter=5", "steps=2", "start_steps=2"), ("--epochs", "1")


class StageError(Exception):
    """A step failed: what to tell the user, and the exit code."""

    def __init__(self, message: str, code: int = 1) -> None:
        super().__init__(message)
        self.code = code


# The data ----------------------------------------------------------------------------------------------------------


class Split(NamedTuple):
    """Who trains, who is tested, and whether that is the paper's split."""

    train: tuple[str, ...]
    test: tuple[str, ...]
    remark: str

    @property
    def everyone(self) -> tuple[str, ...]:
        """Both, sorted."""
        return tuple(sorted((*self.train, *self.test)))


def number(patient: str) -> int | None:
    """The challenge's number of a patient: 101 for ``myops_training_101`` as for ``Case3001``; None for neither."""
    found = re.search(r"(\d+)$", patient)
    value = int(found[1]) if found else 0
    value = value - 2900 if 3001 <= value <= 3025 else value
    return value if value in ALL_NUMBERS else None


def split(patients: Sequence[str]) -> Split:
    """The paper's test patients where they are known by name, else the last fifth.

    Raises:
        UsageError: fewer than two patients.
    """
    if len(patients) < 2:
        raise UsageError(f"{len(patients)} patient with images and labels; at least 2 are needed, 25 for the paper")
    numbers = {p: number(p) for p in patients}
    test = tuple(p for p in patients if numbers[p] in TEST_NUMBERS)
    if test and len(test) < len(patients):
        whole = set(numbers.values()) == ALL_NUMBERS and len(patients) == len(ALL_NUMBERS)
        absent = ", ".join(str(n) for n in sorted(ALL_NUMBERS - set(numbers.values())))
        remark = "the paper's split" if whole else f"**not the paper's 25 patients** (absent: {absent or 'none'})"
    else:
        test = tuple(patients[-max(1, len(patients) // 5) :])
        remark = "**not the paper's patients**: the last fifth is the test set; the published figures are of other data"
    return Split(tuple(p for p in patients if p not in test), test, remark)


def usable(found: Cohort) -> list[str]:
    """The patients with images, mask and truth; the challenge's own test patients come without truth."""
    return [study.patient for study in found.studies if study.truth is not None and not study.problems]


def digest(found: Cohort, patients: Sequence[str]) -> str:
    """What tells that the files are still the same: names, sizes, times."""
    paths = [p for s in found.studies if s.patient in patients for p in (*s.images.values(), s.mask, s.truth) if p]
    facts = [(str(p), p.stat().st_size, p.stat().st_mtime_ns) for p in paths]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()


# Stages ------------------------------------------------------------------------------------------------------------


class Stage(NamedTuple):
    """One command of deepgmm, done once.

    Attributes:
        name: of its record and log.
        command: its arguments.
        needs: files made by earlier stages that it depends on.
        makes: the file without which it is not done.
    """

    name: str
    command: tuple[str, ...]
    needs: tuple[Path, ...]
    makes: Path


@dataclass
class Ledger:
    """What has been done in OUT, and how long it took; on the disk, so that the next session knows.

    Attributes:
        out: the folder.
        data: from ``digest``.
        began: when the time was last saved.
        earlier: seconds of work up to then, all sessions together.
        worked: whether this session had anything to do.
    """

    out: Path
    data: str
    began: float = field(default_factory=time.monotonic)
    earlier: float = 0.0
    worked: bool = False

    def __post_init__(self) -> None:
        """Reads how long earlier sessions worked."""
        (self.out / "stages").mkdir(parents=True, exist_ok=True)
        self.earlier = float(self._read("session").get("wall_seconds", 0.0))

    @property
    def elapsed(self) -> float:
        """Seconds of work so far, all sessions together."""
        return self.earlier + (time.monotonic() - self.began) * self.worked

    def record(self, stage: Stage) -> dict[str, Any]:
        """What is known of a stage with this very command, data and software; empty: nothing."""
        found = self._read(stage.name)
        return found if found.get("key") == self._key(stage) else {}

    def done(self, stage: Stage) -> bool:
        """Whether nothing is left to do."""
        return bool(self.record(stage).get("done")) and stage.makes.is_file()

    def note(self, stage: Stage, *, done: bool, wall_s: float, cpu_s: float) -> None:
        """Adds the time that a stage took, finished or not."""
        before = self.record(stage)
        content = {
            "key": self._key(stage),
            "command": ["deepgmm", *stage.command],
            "done": done,
            "wall_seconds": round(before.get("wall_seconds", 0.0) + wall_s, 2),
            "cpu_seconds": round(before.get("cpu_seconds", 0.0) + cpu_s, 2),
        }
        self.worked = True
        self._write(stage.name, content)
        self.save()

    def save(self) -> None:
        """Keeps the wall time for the next session; one that had nothing to do adds nothing."""
        self.earlier, self.began = round(self.elapsed, 1), time.monotonic()
        self._write("session", {"wall_seconds": self.earlier})

    def say(self, text: str) -> None:
        """One plain line with the time."""
        print(f"[{clock(self.elapsed)}] {text}", flush=True)

    def _key(self, stage: Stage) -> str:
        needs = [files.sha256(path) for path in stage.needs if path.is_file()]
        facts = [stage.command, self.data, needs, versions()]
        return hashlib.sha256(json.dumps(facts).encode()).hexdigest()

    def _read(self, name: str) -> dict[str, Any]:
        path = self.out / "stages" / f"{name}.json"
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}
        return content if isinstance(content, dict) else {}

    def _write(self, name: str, content: Mapping[str, Any]) -> None:
        files.write_whole(self.out / "stages" / f"{name}.json", as_json(content))


def run(ledger: Ledger, stage: Stage, jobs: int) -> None:
    """Runs a stage in this process; nothing if it is done.

    Raises:
        StageError: the command failed as a whole; patients that fail alone are counted in the tables.
        KeyboardInterrupt: the user stopped it.
    """
    if ledger.done(stage):
        return
    ledger.worked = True
    began, said = time.monotonic(), io.StringIO()
    with contextlib.redirect_stdout(said):
        # How many work at a time changes no figure, and is no part of the stage.
        code = cli.main([*stage.command, *(["--jobs", str(jobs)] if stage.command[0] == "segment" else []), "-q"])
    wall = time.monotonic() - began
    ledger.note(stage, done=code in (cli.OK, cli.SOME_FAILED), wall_s=wall, cpu_s=0.0)
    if code == cli.INTERRUPTED:
        raise KeyboardInterrupt
    if code not in (cli.OK, cli.SOME_FAILED):
        raise StageError(f"deepgmm {' '.join(stage.command)} ended with exit code {code}", code)
    ledger.say(f"{stage.name}: {wall:.0f} s" + ("; some patients failed" if code else ""))


def run_apart(ledger: Ledger, stages: Sequence[Stage], jobs: int) -> None:
    """Runs stages as processes of one thread each, ``jobs`` at a time: several networks train faster so than one.

    The CPU seconds come from the kernel's account of each process, an interrupted one included; only what was killed
    together with this script goes uncounted.

    Raises:
        StageError: one of them failed; the others were finished first.
    """
    waiting = [stage for stage in stages if not ledger.done(stage)]
    running: dict[int, tuple[Stage, float, subprocess.Popen[bytes]]] = {}
    failed: list[str] = []
    try:
        while waiting or running:
            while waiting and len(running) < jobs:
                stage = waiting.pop(0)
                process = start(stage, log_of(ledger.out, stage))
                running[process.pid] = (stage, time.monotonic(), process)
                ledger.worked = True
            for pid in list(running):
                if (code := collect(ledger, running, pid, os.WNOHANG)) not in (None, 0):
                    failed.append(f"exit code {code}")
            time.sleep(0.2)
    finally:
        for _, _, process in running.values():
            process.terminate()
        for pid in list(running):
            collect(ledger, running, pid, 0)
    if failed:
        raise StageError(f"{len(failed)} of the trainings failed ({', '.join(failed)}): see {ledger.out / 'logs'}")


def start(stage: Stage, log: Path) -> subprocess.Popen[bytes]:
    """Starts a command with one thread, its output in a log."""
    one_thread = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")
    log.parent.mkdir(exist_ok=True)
    with log.open("ab") as file:
        return subprocess.Popen(
            [sys.executable, "-m", "monai_deepgmm", *stage.command],
            env={**os.environ, **one_thread},
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            preexec_fn=end_with_parent if sys.platform == "linux" else None,
        )


def end_with_parent() -> None:
    """Asks the kernel to end this process when the script is killed: two trainings must not share a folder."""
    set_death_signal = 1
    ctypes.CDLL(None).prctl(set_death_signal, signal.SIGTERM)


def collect(
    ledger: Ledger, running: dict[int, tuple[Stage, float, subprocess.Popen[bytes]]], pid: int, options: int
) -> int | None:
    """The exit code of a process that has ended, after its record was written; None: it is still at work."""
    ended, status, usage = os.wait4(pid, options)
    if not ended:
        return None
    stage, began, process = running.pop(pid)
    process.returncode = code = os.waitstatus_to_exitcode(status)
    wall, cpu = time.monotonic() - began, usage.ru_utime + usage.ru_stime
    ledger.note(stage, done=code == 0 and stage.makes.is_file(), wall_s=wall, cpu_s=cpu)
    ledger.say(f"{stage.name}: {wall:.0f} s, {cpu:.0f} CPU s" + (f"; exit code {code}" if code else ""))
    return code


def log_of(out: Path, stage: Stage) -> Path:
    return out / "logs" / f"{stage.name}.log"


# What is run -------------------------------------------------------------------------------------------------------


class Line(NamedTuple):
    """One row of a table.

    Attributes:
        method: as the paper calls it.
        runs: the folders below OUT/runs, one per seed.
        judged: the measure that is compared with the paper: it re-ordered all but the rows with μ_data.
    """

    method: str
    runs: tuple[str, ...]
    judged: str = "dice_matched"


class Experiment(NamedTuple):
    """Everything that is run, in the order of the tables.

    Attributes:
        alone: methods that fit each slice on its own, all patients.
        means: μ_data of the training patients.
        informed: EM started at it, test patients.
        trained: networks.
        applied: the networks on the test patients.
        tables: the rows.
        models: run → the stage that trained its network.
    """

    alone: tuple[Stage, ...]
    means: Stage
    informed: tuple[Stage, ...]
    trained: tuple[Stage, ...]
    applied: tuple[Stage, ...]
    tables: Mapping[str, tuple[Line, ...]]
    models: Mapping[str, Stage]


def experiment(options: argparse.Namespace, who: Split) -> Experiment:
    """The plan of the whole run."""
    data, out = str(options.data), options.out
    quick = QUICK_SEGMENT if options.quick else ()
    few = QUICK_TRAIN if options.quick else () if options.epochs is None else ("--epochs", str(options.epochs))
    layout = ("--layout", "myops")

    def segment(name: str, patients: Sequence[str], *how: str, needs: tuple[Path, ...] = ()) -> Stage:
        settings = [h for h in how if "=" in h] + ([] if "--model" in how else [*quick])
        rest = [h for h in how if "=" not in h] + (["--set", *settings] if settings else [])
        folder = out / "runs" / name
        command = ["segment", data, str(folder), *layout, *rest, "--patients", *patients]
        return Stage(f"segment_{name}", tuple(command), needs, folder / "summary.tsv")

    mu = out / "means.json"
    means = Stage("means", ("means", data, "-o", str(mu), *layout, "--patients", *who.train), (), mu)
    alone = [
        segment(f"{m}_{c}", who.everyone, "--method", m, f"covariance={c}") for m in ("gmm", "svgmm") for c in SHAPES
    ]
    alone += [segment(m, who.everyone, "--method", m) for m in ("deepg", "deepsvg")]
    known = ("--method", "svgmm", "--means", str(mu))
    informed = [segment(f"svgmm_mu_{c}", who.test, *known, f"covariance={c}", needs=(mu,)) for c in SHAPES]
    trained, applied, models = [], [], {}
    for name, more, needs in (("cohort", ("--set", "mean_weight=0"), ()), ("cohort_mu", ("--means", str(mu)), (mu,))):
        for seed in options.seeds:
            run_name, folder = f"{name}_seed{seed}", out / "models" / f"{name}_seed{seed}"
            command = (
                "train",
                data,
                str(folder),
                *layout,
                "--method",
                "deepsvg",
                "--set",
                "teacher=signature",
                "--seed",
                str(seed),
                "--resume",
            )
            stage = Stage(
                f"train_{run_name}", (*command, *more, *few, "--patients", *who.train), needs, folder / WEIGHTS
            )
            trained.append(stage)
            models[run_name] = stage
            applied.append(segment(run_name, who.test, "--model", str(folder), needs=(folder / WEIGHTS,)))
    seeds = {name: tuple(f"{name}_seed{seed}" for seed in options.seeds) for name in ("cohort", "cohort_mu")}
    tables = {
        "table1": (
            *(Line("GMM", (f"gmm_{c}",)) for c in SHAPES),
            Line("deepG", ("deepg",)),
            *(Line("SVGMM", (f"svgmm_{c}",)) for c in SHAPES),
            Line("deepSVG", ("deepsvg",)),
        ),
        "table2": (
            *(Line("SVGMM", (f"svgmm_{c}",)) for c in SHAPES),
            Line("deepSVG", seeds["cohort"]),
            *(Line("SVGMMμ", (f"svgmm_mu_{c}",), "dice") for c in SHAPES),
            Line("deepSVGμ", seeds["cohort_mu"], "dice"),
        ),
    }
    return Experiment(tuple(alone), means, tuple(informed), tuple(trained), tuple(applied), tables, models)


def evaluation(options: argparse.Namespace, segmented: Stage) -> Stage:
    """The comparison with truth that follows a segmentation, of the same patients."""
    folder, patients = segmented.makes.parent, segmented.command[segmented.command.index("--patients") :]
    layout = ("--layout", "myops", "--slices", "complete")
    command = ("evaluate", str(folder), str(options.data), *layout, *patients)
    name = segmented.name.replace("segment_", "evaluate_")
    return Stage(name, command, (folder / "summary.tsv",), folder / "evaluation.tsv")


# Figures of the tables ---------------------------------------------------------------------------------------------


class Score(NamedTuple):
    """One complete slice's Dice, by tissue."""

    patient: str
    slice: int
    dice: tuple[float, ...]
    dice_matched: tuple[float, ...]


def scores(run_folder: Path, patients: Sequence[str]) -> list[Score]:
    """The complete slices of a run, from its ``evaluation.tsv``; empty where there is none yet."""
    try:
        text = (run_folder / "evaluation.tsv").read_text(encoding="utf-8")
    except FileNotFoundError:
        return []
    rows = [row for row in csv.DictReader(io.StringIO(text), delimiter="\t") if row["patient"] in patients]
    found = []
    for (patient, index), group in groupby(rows, key=lambda row: (row["patient"], int(row["slice"]))):
        by_tissue = {row["tissue"]: row for row in group}
        dice = {m: tuple(float(by_tissue[t][m] or "nan") for t in TISSUES) for m in NAMES}
        found.append(Score(patient, index, dice["dice"], dice["dice_matched"]))
    return found


def moments(found: Sequence[Score], measure: str) -> dict[str, tuple[float, float]]:
    """Mean and standard deviation over slices, of each tissue and of the slice's mean over tissues."""
    table = [[*getattr(s, measure), fmean(getattr(s, measure))] for s in found]
    columns = dict(zip(COLUMNS, zip(*table, strict=True), strict=True))
    return {name: (fmean(values), stdev(values) if len(values) > 1 else 0.0) for name, values in columns.items()}


def over_seeds(runs: Sequence[Sequence[Score]], measure: str) -> dict[str, list[float]]:
    """Of each column: the mean over seeds of the mean, and of the standard deviation over slices."""
    each = [moments(run_scores, measure) for run_scores in runs]
    return {c: [round(fmean(m[c][i] for m in each), 4) for i in range(2)] for c in COLUMNS}


def reproduced(ours: float, published: float) -> bool:
    """Whether a mean is no more than MARGIN below the published one, as far as four digits tell."""
    return round(ours - published + MARGIN, 4) >= 0


def row(out: Path, table: str, line: Line, patients: Sequence[str], models: Mapping[str, Any]) -> dict[str, Any]:
    """One row of ``tables.json``; None where nothing has been computed yet."""
    published = PUBLISHED[table][line.method]
    found = [scores(out / "runs" / name, patients) for name in line.runs]
    content: dict[str, Any] = {
        "method": line.method,
        "variant": variant(out / "runs" / line.runs[0]),
        "runs": list(line.runs),
        "published": dict(zip(COLUMNS, map(list, published), strict=True)),
        "judged": line.judged,
        "n_slices": min(map(len, found)),
        "n_patients": min(len({s.patient for s in run_scores}) for run_scores in found),
    }
    empty = dict.fromkeys(("dice", "dice_matched", "seed_means", "within", "seconds_per_slice", "training"))
    if not content["n_slices"]:
        return content | empty
    ours = {measure: over_seeds(found, measure) for measure in NAMES}
    return {
        **content,
        **ours,
        "seed_means": {m: [round(moments(run_scores, m)["mean"][0], 4) for run_scores in found] for m in NAMES},
        "within": reproduced(ours[line.judged]["mean"][0], published[-1][0]),
        "seconds_per_slice": round(fmean(seconds_per_slice(out / "runs" / name, patients) for name in line.runs), 3),
        "training": [models[name] for name in line.runs] if line.runs[0] in models else None,
    }


def sidecars(run_folder: Path, patients: Sequence[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    """The provenance of each patient that was segmented."""
    for patient in patients:
        path = run_folder / patient / f"{patient}_dseg.json"
        if path.is_file():
            yield patient, json.loads(path.read_text(encoding="utf-8"))


def variant(run_folder: Path) -> str:
    """The shape of Σ in words; empty before the run."""
    folders = sorted(p.name for p in run_folder.iterdir()) if run_folder.is_dir() else []
    for _, sidecar in sidecars(run_folder, folders):
        shape = str(sidecar["mixture"]["covariance"])
        return SHAPES.get(shape, shape)
    return ""


def seconds_per_slice(run_folder: Path, patients: Sequence[str]) -> float:
    """What one slice takes on one core: each patient was one thread's work."""
    with (run_folder / "summary.tsv").open(encoding="utf-8", newline="") as file:
        seconds = {r["patient"]: float(r["seconds"]) for r in csv.DictReader(file, delimiter="\t") if r["seconds"]}
    slices = {patient: len(sidecar["fit"]["units"]) for patient, sidecar in sidecars(run_folder, patients)}
    return sum(seconds[p] for p in slices) / sum(slices.values())


# Tables ------------------------------------------------------------------------------------------------------------


def machine() -> dict[str, Any]:
    """Where the times were taken."""
    model = platform.processor() or platform.machine()
    with contextlib.suppress(OSError):
        told = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(encoding="utf-8"), re.MULTILINE)
        model = told[1] if told else model
    return {"cpu": model, "cores": os.cpu_count(), "system": platform.system(), "versions": versions()}


def results(options: argparse.Namespace, who: Split, plan: Experiment, ledger: Ledger) -> dict[str, Any]:
    """The content of ``tables.json``, as far as the runs have come."""
    models = {
        name: {k: ledger.record(stage).get(k) for k in ("wall_seconds", "cpu_seconds")}
        for name, stage in plan.models.items()
    }
    chosen = {"table1": who.everyone, "table2": who.test}
    return {
        "paper": "Schwab et al. 2024, arXiv 2404.12252, Tables 1 and 2",
        "patients": {"train": list(who.train), "test": list(who.test), "remark": who.remark},
        "machine": machine(),
        "settings": {
            "seeds": list(options.seeds),
            "seed_of_single_image_methods": 0,
            "epochs": options.epochs,
            "jobs": options.jobs,
            "quick": options.quick,
        },
        "wall_seconds": ledger.earlier,
        "margin": MARGIN,
        **{t: [row(options.out, t, line, chosen[t], models) for line in lines] for t, lines in plan.tables.items()},
    }


def markdown(found: Mapping[str, Any], panels: Sequence[tuple[str, str]]) -> str:
    """The page: figures in two tables, what they were computed from, and links to the panels."""
    patients, made = found["patients"], found["machine"]
    packages = ", ".join(f"{name} {version}" for name, version in made["versions"].items())
    lines = [
        "# MyoPS 2020: Tables 1 and 2 of Schwab et al. 2024 (arXiv 2404.12252)",
        "",
        "Dice, mean ± standard deviation over the slices that hold all four tissues; *mean* is of each slice first.",
        f"*{NAMES['dice_matched']}*: the best of all namings of the labels, slice by slice, as the paper reports all "
        f"rows but those with μ. *{NAMES['dice']}*: as the software names them for a user.",
        f"*Within .03*: our mean (the line marked ▸) is at most {MARGIN} below the published one, or above it.",
        "",
        f"- patients: {len(patients['train'])} train, {len(patients['test'])} test ({', '.join(patients['test'])}); "
        f"{patients['remark']}",
        f"- seeds of the trained networks: {', '.join(map(str, found['settings']['seeds']))}; of all else: 0",
        f"- machine: {made['cpu']}, {made['cores']} cores, {made['system']}; {packages}",
        f"- wall time: {clock(found['wall_seconds'])} with {found['settings']['jobs']} jobs",
    ]
    if found["settings"]["quick"]:
        lines.append("- **--quick: far too few steps; these figures mean nothing**")
    for table, title in (("table1", "all patients, each slice fitted on its own"), ("table2", "test patients")):
        lines += ["", f"## Table {table[-1]}: {title}", "", *table_lines(found[table], SLICES[table])]
    lines += [line for caption, name in panels for line in ("", f"![{caption}]({name})", "", caption)]
    return "\n".join(lines) + "\n"


def table_lines(rows: Sequence[Mapping[str, Any]], n_published: int) -> list[str]:
    """A table: of each method the published line once, and two lines of ours for each variant."""
    titles = ("method", "figures", *COLUMNS, "seeds", "slices", "s per slice", "training CPU s", "within .03")
    lines = [titles, ("---",) * len(titles)]
    for method, group in groupby(rows, key=lambda r: r["method"]):
        for place, ours in enumerate(group):
            if place == 0:
                published = (spread(ours["published"][c]) for c in COLUMNS)
                lines.append((f"**{method}**", "published", *published, "", str(n_published), "", "", ""))
            lines += our_lines(ours)
    return [f"| {' | '.join(cells)} |" for cells in lines]


def our_lines(ours: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """A row's two lines: with the truth's help, and without."""
    lines = []
    for measure, name in NAMES.items():
        judged = measure == ours["judged"]
        label = f"{'▸ ' * judged}{ours['variant']}{', ' * bool(ours['variant'])}{name}"
        if not ours["n_slices"]:
            lines.append(("", label, *["–"] * 5, "", "0", "", "", "–" * judged))
            continue
        figures = [spread(ours[measure][c]) for c in COLUMNS]
        several = len(ours["runs"]) > 1
        seeds = " ".join(short(m, 3) for m in ours["seed_means"][measure]) if several else ""
        training = " ".join(f"{t['cpu_seconds'] or 0:.0f}" for t in ours["training"] or ()) if judged else ""
        seconds = f"{ours['seconds_per_slice']:.2f}" if judged else ""
        verdict = ("yes" if ours["within"] else "no") if judged else ""
        lines.append(("", label, *figures, seeds, str(ours["n_slices"]), seconds, training, verdict))
    return lines


def spread(mean_sd: Sequence[float]) -> str:
    return f"{short(mean_sd[0])} ± {short(mean_sd[1])}"


def short(value: float, digits: int = 2) -> str:
    """.75, as the paper prints it."""
    return f"{value:.{digits}f}".removeprefix("0")


def clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s"


def as_json(content: object) -> bytes:
    return (json.dumps(content, indent=1, ensure_ascii=False) + "\n").encode()


# Panels ------------------------------------------------------------------------------------------------------------


class Plane(NamedTuple):
    """How one slice of one patient is cut out and shown."""

    view: mosaic.View
    at: int
    box: tuple[slice, slice]
    size: tuple[int, int]

    def cut(self, volume: np.ndarray) -> np.ndarray:
        """(X, Y, Z) → (rows, columns) around the mask."""
        turned: np.ndarray = self.view.upright(volume)[self.at][self.box]
        return turned

    def enlarged(self, plane: np.ndarray, *, smooth: bool) -> np.ndarray:
        """(rows, columns) → (height, width) on the page."""
        how = Image.Resampling.BICUBIC if smooth else Image.Resampling.NEAREST
        return np.asarray(Image.fromarray(np.ascontiguousarray(plane, dtype=np.uint8)).resize(self.size, how))


TILE_PX, GAP_PX, CAPTION_PX, MARGIN_MM = 300, 10, 46, 10.0
INK, PAPER = "#1c2733", "white"


def median_slice(found: Sequence[Score], measure: str) -> Score:
    """The slice in the middle of the order by mean Dice."""
    return sorted(found, key=lambda s: (fmean(getattr(s, measure)), s.patient, s.slice))[(len(found) - 1) // 2]


def panel(out: Path, found: Cohort, chosen: Score, runs: Sequence[tuple[str, str, bool]], name: str) -> None:
    """Draws one slice: the sequences and the truth above, each method's labels below with NLL and mean Dice.

    Args:
        out: the folder; the picture goes right into it.
        found: the patients.
        chosen: which slice.
        runs: (method's name, folder below OUT/runs, whether its labels are re-ordered with the truth).
        name: of the file.
    """
    infarct = protocol.load("infarct")
    study = next(s for s in found.studies if s.patient == chosen.patient)
    patient = scan.load(study, infarct)
    true_labels = truth.read(study, infarct, patient.sequences, like=patient.reference).labels
    paths = [out / "runs" / folder / chosen.patient / f"{chosen.patient}_dseg" for _, folder, _ in runs]
    notes = [json.loads(p.with_suffix(".json").read_text(encoding="utf-8")) for p in paths]
    plane = plane_around(patient, int(notes[0]["slice_axis"]), chosen.slice)
    mask, true = plane.cut(patient.mask), plane.cut(true_labels)
    greys = [grey(plane, plane.cut(image)) for image in patient.image]
    colors = {t.index: ImageColor.getrgb(t.color)[:3] for t in infarct.tissues}
    top = [(s, outlined(plane, g, mask)) for s, g in zip(patient.sequences, greys, strict=True)]
    top.append(("truth", painted(plane, greys[0], true, colors)))
    bottom = []
    for (method, _, reorder), path, note in zip(runs, paths, notes, strict=True):
        labels = plane.cut(nifti.read(path.with_suffix(".nii.gz"), dtype=np.float64).data.astype(np.int64))
        labels = reordered(labels, true, list(colors)) if reorder else labels
        dice = metrics.overlap(metrics.confusion(labels, true, list(colors))).dice
        nll = next((u["nll"] for u in note["fit"]["units"] if u["slice"] == chosen.slice), np.nan)  # too small
        caption = f"{method}\nNLL {nll:.3f}   Dice {short(float(np.nanmean(dice)))}"
        bottom.append((caption, painted(plane, greys[0], labels, colors)))
    picture = page([top, bottom], {t.name: colors[t.index] for t in infarct.tissues})
    file = io.BytesIO()
    picture.save(file, "PNG", optimize=True)
    files.write_whole(out / name, file.getvalue())


def plane_around(patient: scan.Scan, axis: int, index: int) -> Plane:
    """The slice, turned upright and cut to its mask with a margin."""
    turned = mosaic.view(patient.reference.affine, axis)
    mask, spacing_mm = turned.upright(patient.mask)[index], patient.reference.spacing_mm
    steps, box = [float(spacing_mm[a]) for a in turned.axes[1:]], []
    for side, step in enumerate(steps):
        held, margin = np.flatnonzero(mask.any(axis=1 - side)), int(np.ceil(MARGIN_MM / step))
        box.append(slice(max(0, int(held[0]) - margin), min(mask.shape[side], int(held[-1]) + 1 + margin)))
    height, width = ((b.stop - b.start) * step for b, step in zip(box, steps, strict=True))
    scale = TILE_PX / max(height, width)
    return Plane(turned, index, (box[0], box[1]), (round(width * scale), round(height * scale)))


def reordered(labels: np.ndarray, true: np.ndarray, indices: Sequence[int]) -> np.ndarray:
    """The labels under the names that suit the truth best."""
    order = metrics.match(metrics.dice_table(metrics.confusion(labels, true, indices)))
    renamed = np.zeros_like(labels)
    for place, predicted in enumerate(order):
        renamed[labels == indices[predicted]] = indices[place]
    return renamed


def grey(plane: Plane, image: np.ndarray) -> np.ndarray:
    """Intensities → (height, width, 3), black and white at the 1st and 99.5th percentile."""
    low, high = np.percentile(image[np.isfinite(image)], [1.0, 99.5])
    level = np.clip((np.nan_to_num(image, nan=low) - low) / max(high - low, 1e-6), 0, 1) * 255
    return np.repeat(plane.enlarged(level, smooth=True)[..., None], 3, axis=2)


def border(labels: np.ndarray) -> np.ndarray:
    """The outermost pixels of every region (height, width)."""
    padded = np.pad(labels, 1)
    around = (padded[:-2, 1:-1], padded[2:, 1:-1], padded[1:-1, :-2], padded[1:-1, 2:])
    return np.asarray(np.any([labels != n for n in around], axis=0) & (labels > 0))


def outlined(plane: Plane, image: np.ndarray, mask: np.ndarray) -> np.ndarray:
    tile = image.copy()
    tile[border(plane.enlarged(mask, smooth=False))] = mosaic.MASK_COLOR
    return tile


def painted(plane: Plane, image: np.ndarray, labels: np.ndarray, colors: Mapping[int, Sequence[int]]) -> np.ndarray:
    """Tissues over the image: see-through inside, solid along their borders."""
    tile, large = image.astype(np.float64), plane.enlarged(labels, smooth=False)
    edge = border(large)
    for index, color in colors.items():
        here = large == index
        tile[here] = 0.35 * tile[here] + 0.65 * np.array(color)
        tile[here & edge] = color
    return tile.astype(np.uint8)


def page(rows: Sequence[Sequence[tuple[str, np.ndarray]]], legend: Mapping[str, tuple[int, ...]]) -> Image.Image:
    """Tiles in rows with a caption below each, and the tissues' colours at the bottom."""
    height, width = rows[0][0][1].shape[:2]
    across = max(map(len, rows)) * (width + GAP_PX) + GAP_PX
    canvas = Image.new("RGB", (across, len(rows) * (height + CAPTION_PX) + GAP_PX + 30), PAPER)
    draw, font = ImageDraw.Draw(canvas), ImageFont.load_default(16)
    for down, tiles in enumerate(rows):
        for along, (caption, tile) in enumerate(tiles):
            x, y = GAP_PX + along * (width + GAP_PX), GAP_PX + down * (height + CAPTION_PX)
            canvas.paste(Image.fromarray(tile), (x, y))
            draw.multiline_text((x + width // 2, y + height + 3), caption, INK, font, "ma", align="center")
    x, y = GAP_PX, canvas.height - 26
    for tissue, color in legend.items():
        draw.rectangle((x, y, x + 16, y + 16), fill=color)
        draw.text((x + 22, y + 8), tissue, INK, font, "lm")
        x += 40 + round(draw.textlength(tissue, font))
    return canvas


def panels(out: Path, found: Cohort, who: Split, options: argparse.Namespace) -> list[tuple[str, str]]:
    """Draws what can be drawn by now: (caption, file name) of each."""
    seed = options.seeds[0]
    # Pillow's own font has no μ.
    first = (
        ("GMM", "gmm_diag", True),
        ("deepG", "deepg", True),
        ("SVGMM", "svgmm_tied", True),
        ("deepSVG", "deepsvg", True),
    )
    second = (
        ("SVGMM", "svgmm_tied", True),
        ("deepSVG", f"cohort_seed{seed}", True),
        ("SVGMM with known means", "svgmm_mu_tied", False),
        ("deepSVG with known means", f"cohort_mu_seed{seed}", False),
    )
    drawn = []
    for name, about, runs, middle, patients, measure in (
        ("figure2.png", "like Figure 2", first, "deepsvg", who.everyone, "dice_matched"),
        ("figure3.png", f"like Figure 3, seed {seed}", second, f"cohort_mu_seed{seed}", who.test, "dice"),
    ):
        found_scores = {folder: scores(out / "runs" / folder, patients) for _, folder, _ in runs}
        common = set.intersection(*({(s.patient, s.slice) for s in v} for v in found_scores.values()))
        candidates = [s for s in found_scores[middle] if (s.patient, s.slice) in common]
        if not candidates:
            continue
        chosen = median_slice(candidates, measure)
        panel(out, found, chosen, runs, name)
        where = f"{chosen.patient}, slice {chosen.slice}, the median by Dice of {runs[-1][0]}"
        how = "GMM with diagonal Σ, all else with shared Σ; labels re-ordered with the truth unless means are known"
        drawn.append((f"{about}: {where}. {how}. NLL per voxel, mean Dice.", name))
    return drawn


# The run -----------------------------------------------------------------------------------------------------------


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("data", metavar="DATA", type=Path, help="the folder with the MyoPS 2020 training patients")
    parser.add_argument("out", metavar="OUT", type=Path, help="the folder for tables, pictures, runs and networks")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, metavar="N", help="processes at the same time")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], metavar="S", help="of the trained networks")
    parser.add_argument("--epochs", type=int, metavar="N", help="of each training; deepgmm train's own if absent")
    parser.add_argument("--quick", action="store_true", help="few steps, to try the script; the figures mean nothing")
    options = parser.parse_args(argv)
    options.data, options.out = options.data.resolve(), options.out.resolve()  # a stage is known by its command
    if options.jobs < 1 or len(set(options.seeds)) < len(options.seeds):
        parser.error("--jobs must be at least 1, and --seeds all different")
    return options


def interrupt(received: int, frame: object) -> NoReturn:
    raise KeyboardInterrupt


def reproduce(options: argparse.Namespace) -> None:
    """Everything, stage after stage; the tables are written anew whenever rows have been added.

    Raises:
        StageError: a stage failed.
        UsageError: DATA does not hold what is needed.
    """
    infarct = protocol.load("infarct")
    found = cohort.find(options.data, infarct, layout="myops")
    who = split(usable(found))
    ledger = Ledger(options.out, digest(found, who.everyone))
    plan = experiment(options, who)
    ledger.say(f"{len(who.everyone)} patients, test: {', '.join(who.test)}; {who.remark}")
    for stage in plan.alone:
        run(ledger, stage, options.jobs)
        run(ledger, evaluation(options, stage), options.jobs)
    write(options, found, who, plan, ledger)
    run(ledger, plan.means, options.jobs)
    for stage in plan.informed:
        run(ledger, stage, options.jobs)
        run(ledger, evaluation(options, stage), options.jobs)
    write(options, found, who, plan, ledger)
    run_apart(ledger, plan.trained, options.jobs)
    for stage in plan.applied:
        run(ledger, stage, options.jobs)
        run(ledger, evaluation(options, stage), options.jobs)
    write(options, found, who, plan, ledger)
    ledger.say(f"done: see {options.out / 'tables.md'}")


def write(options: argparse.Namespace, found: Cohort, who: Split, plan: Experiment, ledger: Ledger) -> None:
    """Writes the two tables and the panels, as far as the runs have come."""
    drawn = panels(options.out, found, who, options)
    ledger.save()
    content = results(options, who, plan, ledger)
    files.write_whole(options.out / "tables.json", as_json({**content, "panels": [name for _, name in drawn]}))
    files.write_whole(options.out / "tables.md", markdown(content, drawn).encode())


def main(argv: Sequence[str] | None = None) -> int:
    options = parse(argv)
    signal.signal(signal.SIGTERM, interrupt)
    try:
        reproduce(options)
    except StageError as error:
        print(f"reproduce_paper: {error}; run the same command again to go on", file=sys.stderr)
        return error.code
    except UsageError as error:
        print(f"reproduce_paper: {error}", file=sys.stderr)
        return cli.USAGE
    except StudyError as error:
        print(f"reproduce_paper: {error.code}: {error}", file=sys.stderr)
        return cli.SOME_FAILED
    except KeyboardInterrupt:
        print("reproduce_paper: interrupted; run the same command again to go on", file=sys.stderr)
        return cli.INTERRUPTED
    return cli.OK


if __name__ == "__main__":
    sys.exit(main())
