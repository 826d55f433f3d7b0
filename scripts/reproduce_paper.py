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
import csv
import io
import os
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import paper_panel
import runner
from runner import Facts, Ledger, Stage

from monai_deepgmm import protocol
from monai_deepgmm.errors import UsageError
from monai_deepgmm.methods.model_spec import WEIGHTS
from monai_deepgmm.patients import discovery

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
NAMES = {"dice_matched": "oracle-matched", "dice": "named without reference labels"}
SHAPES = {"diag": "diagonal Σ", "tied": "shared Σ"}
LAYOUT = ("--layout", "myops")
#: What --quick asks of the methods and of train: far too little for any result.
FEW_STEPS = ("--set", "steps=2", "start_steps=2")
QUICK = {"gmm": ("--set", "max_iter=5"), "svgmm": ("--set", "max_iter=5"), "deepg": FEW_STEPS, "deepsvg": FEW_STEPS}


# The data ------------------------------------------------------------------------------------------------------------


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


# What is run ---------------------------------------------------------------------------------------------------------


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
        informed: μ_data of the training patients, then EM started at it, test patients.
        trained: networks, by the run that they are for.
        applied: the networks on the test patients.
        tables: the rows.
    """

    alone: tuple[Stage, ...]
    informed: tuple[Stage, ...]
    trained: Mapping[str, Stage]
    applied: tuple[Stage, ...]
    tables: Mapping[str, tuple[Line, ...]]


def segmented(
    options: argparse.Namespace, name: str, patients: Sequence[str], *how: str, needs: tuple[Path, ...] = ()
) -> Stage:
    """The segmentation of some patients; ``how`` begins with a method or a model."""
    folder = options.out / "runs" / name
    quick = QUICK.get(how[1], ()) if options.quick else ()
    command = ("segment", str(options.data), str(folder), *LAYOUT, *how, *quick, "--patients", *patients)
    return Stage(f"segment_{name}", command, needs, folder / "summary.tsv")


def trained(
    options: argparse.Namespace, name: str, seed: int, who: Split, more: Sequence[str], needs: tuple[Path, ...]
) -> Stage:
    """The training of one network."""
    epochs = 1 if options.quick else options.epochs
    folder = options.out / "models" / name
    command = ("train", str(options.data), str(folder), *LAYOUT, "--method", "deepsvg", "--seed", str(seed), "--resume")
    few = () if epochs is None else ("--epochs", str(epochs))
    command += ("--network", "unet", "--set", "teacher=signature", *more, *few, "--patients", *who.train)
    return Stage(f"train_{name}", command, needs, folder / WEIGHTS)


def experiment(options: argparse.Namespace, who: Split) -> Experiment:
    """The plan of the whole run."""
    mu = options.out / "means.json"
    means = ("means", str(options.data), "-o", str(mu), *LAYOUT, "--patients", *who.train)
    by_shape = {m: tuple((f"{m}_{c}", f"covariance={c}") for c in SHAPES) for m in ("gmm", "svgmm", "svgmm_mu")}
    alone = [
        segmented(options, name, who.everyone, "--method", m, "--set", setting)
        for m in ("gmm", "svgmm")
        for name, setting in by_shape[m]
    ]
    alone += [segmented(options, m, who.everyone, "--method", m, "--network", "unet") for m in ("deepg", "deepsvg")]
    known = ("--method", "svgmm", "--means", str(mu), "--set")
    informed = (segmented(options, name, who.test, *known, how, needs=(mu,)) for name, how in by_shape["svgmm_mu"])
    networks: dict[str, Stage] = {}
    for name, more, needs in (("cohort", ("mean_weight=0",), ()), ("cohort_mu", ("--means", str(mu)), (mu,))):
        for seed in options.seeds:
            networks[f"{name}_seed{seed}"] = trained(options, f"{name}_seed{seed}", seed, who, more, needs)
    applied = (
        segmented(options, name, who.test, "--model", str(stage.makes.parents[1]), needs=(stage.makes,))
        for name, stage in networks.items()
    )
    lines = {m: tuple(Line(m.upper(), (name,)) for name, _ in by_shape[m]) for m in ("gmm", "svgmm")}
    lines["mu"] = tuple(Line("SVGMMμ", (name,), "dice") for name, _ in by_shape["svgmm_mu"])
    seeds = {m: tuple(f"{m}_seed{seed}" for seed in options.seeds) for m in ("cohort", "cohort_mu")}
    tables = {
        "table1": (*lines["gmm"], Line("deepG", ("deepg",)), *lines["svgmm"], Line("deepSVG", ("deepsvg",))),
        "table2": (
            *lines["svgmm"],
            Line("deepSVG", seeds["cohort"]),
            *lines["mu"],
            Line("deepSVGμ", seeds["cohort_mu"], "dice"),
        ),
    }
    return Experiment(tuple(alone), (Stage("means", means, (), mu), *informed), networks, tuple(applied), tables)


def evaluation(options: argparse.Namespace, segmentation: Stage) -> Stage:
    """The comparison with reference labels that follows a segmentation, of the same patients."""
    folder, patients = segmentation.makes.parent, segmentation.command[segmentation.command.index("--patients") :]
    command = ("evaluate", str(folder), str(options.data), *LAYOUT, "--slices", "complete", *patients)
    name = segmentation.name.replace("segment_", "evaluate_")
    return Stage(name, command, (folder / "summary.tsv",), folder / "evaluation.tsv")


# Figures of the tables -----------------------------------------------------------------------------------------------

#: (patient, slice) → measure → Dice of each tissue, and their mean ``(5,)``.
Scores = dict[tuple[str, int], dict[str, "np.ndarray"]]


def scores(run_folder: Path, patients: Sequence[str]) -> Scores:
    """The complete slices of a run, from its ``evaluation.tsv``; empty where there is none yet."""
    rows = [row for row in tsv(run_folder / "evaluation.tsv") if row["patient"] in patients]
    found: Scores = {}
    for place, group in groupby(rows, key=lambda row: (row["patient"], int(row["slice"]))):
        by_tissue = {row["tissue"]: row for row in group}
        dice = {m: np.array([float(by_tissue[t][m] or "nan") for t in TISSUES]) for m in NAMES}
        found[place] = {m: np.append(values, values.mean()) for m, values in dice.items()}
    return found


def tsv(path: Path) -> list[dict[str, str]]:
    """The rows of a table; none if it is not there."""
    text = path.read_text(encoding="utf-8") if path.is_file() else ""
    return list(csv.DictReader(io.StringIO(text), delimiter="\t"))


def moments(found: Scores, measure: str) -> np.ndarray:
    """Mean and standard deviation over slices of each column ``(5, 2)``."""
    columns = np.array([slice_scores[measure] for slice_scores in found.values()])
    deviations = columns.std(0, ddof=1) if len(columns) > 1 else np.zeros(len(COLUMNS))
    return np.stack([columns.mean(0), deviations], 1)


def reproduced(ours: float, published: float) -> bool:
    """Whether a mean is no more than MARGIN below the published one, as far as four digits tell."""
    return round(ours - published + MARGIN, 4) >= 0


def row(out: Path, table: str, line: Line, patients: Sequence[str], models: Mapping[str, Any]) -> Facts:
    """One row of ``tables.json``: the mean over seeds of what is over slices; None where nothing is computed yet."""
    published, folders = PUBLISHED[table][line.method], [out / "runs" / name for name in line.runs]
    found = [scores(folder, patients) for folder in folders]
    content: Facts = {
        "method": line.method,
        "variant": variant(folders[0]),
        "runs": list(line.runs),
        "published": dict(zip(COLUMNS, map(list, published), strict=True)),
        "judged": line.judged,
        "n_slices": min(map(len, found)),
        "n_patients": min(len({patient for patient, _ in run_scores}) for run_scores in found),
    }
    empty = dict.fromkeys(("dice", "dice_matched", "seed_means", "within", "seconds_per_slice", "training"))
    if not content["n_slices"]:
        return content | empty
    each = {measure: np.array([moments(run_scores, measure) for run_scores in found]) for measure in NAMES}
    ours = {m: dict(zip(COLUMNS, values.mean(0).round(4).tolist(), strict=True)) for m, values in each.items()}
    return {
        **content,
        **ours,
        "seed_means": {m: values[:, -1, 0].round(4).tolist() for m, values in each.items()},
        "within": reproduced(ours[line.judged]["mean"][0], published[-1][0]),
        "seconds_per_slice": round(float(np.mean([seconds_per_slice(f, patients) for f in folders])), 3),
        "training": [models[name] for name in line.runs] if line.runs[0] in models else None,
    }


def sidecars(run_folder: Path, patients: Sequence[str] | None = None) -> Iterator[tuple[str, Facts]]:
    """The provenance of each patient that was segmented."""
    for path in sorted(run_folder.glob("*/*_dseg.json")):
        if patients is None or path.parent.name in patients:
            yield path.parent.name, runner.read_json(path)


def variant(run_folder: Path) -> str:
    """The shape of Σ in words; empty before the run."""
    for _, sidecar in sidecars(run_folder):
        asked = sidecar["configuration"]
        shape = str((asked["model"] or {}).get("training", asked["settings"])["covariance"])
        return SHAPES.get(shape, shape)
    return ""


def seconds_per_slice(run_folder: Path, patients: Sequence[str]) -> float:
    """What one slice takes on one core: each patient was one thread's work."""
    seconds = {r["patient"]: float(r["seconds"]) for r in tsv(run_folder / "summary.tsv") if r["seconds"]}
    slices = {patient: len(sidecar["fit"]["units"]) for patient, sidecar in sidecars(run_folder, patients)}
    return sum(seconds[p] for p in slices) / sum(slices.values())


# Tables --------------------------------------------------------------------------------------------------------------


def results(options: argparse.Namespace, who: Split, plan: Experiment, ledger: Ledger) -> Facts:
    """The content of ``tables.json``, as far as the runs have come."""
    models = {
        name: {k: ledger.record(stage).get(k) for k in ("wall_seconds", "cpu_seconds")}
        for name, stage in plan.trained.items()
    }
    settings = {name: getattr(options, name) for name in ("seeds", "epochs", "jobs", "quick")}
    chosen = {"table1": who.everyone, "table2": who.test}
    return {
        "paper": "Schwab et al. 2024, arXiv 2404.12252, Tables 1 and 2",
        "patients": {"train": list(who.train), "test": list(who.test), "remark": who.remark},
        "machine": runner.machine(),
        "settings": settings | {"seed_of_single_image_methods": 0},
        "wall_seconds": ledger.earlier,
        "margin": MARGIN,
        **{t: [row(options.out, t, line, chosen[t], models) for line in lines] for t, lines in plan.tables.items()},
    }


def markdown(found: Mapping[str, Any], panels: Sequence[tuple[str, str]]) -> str:
    """The page: figures in two tables, what they were computed from, and links to the panels."""
    patients, settings = found["patients"], found["settings"]
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
        f"- seeds of the trained networks: {', '.join(map(str, settings['seeds']))}; of all else: 0",
        f"- machine: {runner.machine_line(found['machine'])}",
        f"- wall time: {runner.clock(found['wall_seconds'])} with {settings['jobs']} jobs",
    ]
    if settings["quick"]:
        lines.append("- **--quick: far too few steps; these figures mean nothing**")
    for table, title in (("table1", "all patients, each slice fitted on its own"), ("table2", "test patients")):
        lines += [
            "",
            f"## Table {table[-1]}: {title}",
            "",
            runner.table(table_lines(found[table], SLICES[table]), text=2),
        ]
    lines += [line for caption, name in panels for line in ("", f"![{caption}]({name})", "", caption)]
    return "\n".join(lines) + "\n"


def table_lines(rows: Sequence[Mapping[str, Any]], n_published: int) -> Iterator[Sequence[str]]:
    """A table: of each method the published line once, and two lines of ours for each variant."""
    yield ("method", "figures", *COLUMNS, "seeds", "slices", "s per slice", "training CPU s", "within .03")
    for method, group in groupby(rows, key=lambda r: r["method"]):
        for place, ours in enumerate(group):
            if place == 0:
                published = (spread(ours["published"][c]) for c in COLUMNS)
                yield (f"**{method}**", "published", *published, "", str(n_published), "", "", "")
            yield from our_lines(ours)


def our_lines(ours: Mapping[str, Any]) -> Iterator[Sequence[str]]:
    """A row's two lines: with the reference labels' help, and without."""
    for measure, name in NAMES.items():
        judged = measure == ours["judged"]
        label = f"{'▸ ' * judged}{ours['variant']}{', ' * bool(ours['variant'])}{name}"
        if not ours["n_slices"]:
            yield ("", label, *[runner.NOTHING] * 5, "", "0", "", "", runner.NOTHING * judged)
            continue
        figures = [spread(ours[measure][c]) for c in COLUMNS]
        means = ours["seed_means"][measure]
        seeds = " ".join(short(m, 3) for m in means) if len(means) > 1 else ""
        training = " ".join(f"{t['cpu_seconds'] or 0:.0f}" for t in ours["training"] or ())
        verdict = (f"{ours['seconds_per_slice']:.2f}", training, "yes" if ours["within"] else "no")
        yield ("", label, *figures, seeds, str(ours["n_slices"]), *(verdict if judged else ("", "", "")))


def spread(mean_sd: Sequence[float]) -> str:
    return f"{short(mean_sd[0])} ± {short(mean_sd[1])}"


def short(value: float, digits: int = 2) -> str:
    """.75, as the paper prints it."""
    return f"{value:.{digits}f}".removeprefix("0")


# The run -------------------------------------------------------------------------------------------------------------


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = runner.parser(__doc__)
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


def reproduce(options: argparse.Namespace) -> None:
    """Everything, stage after stage; the tables are written anew whenever rows have been added.

    Raises:
        StageError: a stage failed.
        UsageError: DATA does not hold what is needed.
    """
    found = discovery.find(options.data, protocol.load("infarct"), layout="myops")
    # The challenge's own test patients come without reference labels.
    usable = {s.patient: s for s in found.studies if s.truth is not None and not s.problems}
    who = split(list(usable))
    ledger = Ledger(options.out, runner.stamps(p for s in usable.values() for p in (*s.images.values(), s.truth)))
    plan = experiment(options, who)
    ledger.say(f"{len(who.everyone)} patients, test: {', '.join(who.test)}; {who.remark}")
    for stages in (plan.alone, plan.informed, plan.applied):
        if stages is plan.applied:
            runner.run_apart(ledger, plan.trained.values(), options.jobs)
        for stage in stages:
            runner.run(ledger, stage, options.jobs)
            if stage.command[0] == "segment":
                runner.run(ledger, evaluation(options, stage), options.jobs)
        drawn = list(paper_panel.panels(options.out, found, who.test, options.seeds[0], scores))
        ledger.save()
        content = results(options, who, plan, ledger)
        runner.write(options.out / "tables.json", {**content, "panels": [name for _, name in drawn]})
        runner.write(options.out / "tables.md", markdown(content, drawn))
    ledger.say(f"done: see {options.out / 'tables.md'}")


def main(argv: Sequence[str] | None = None) -> int:
    options = parse(argv)
    return runner.ended("reproduce_paper", lambda: reproduce(options))


if __name__ == "__main__":
    sys.exit(main())
