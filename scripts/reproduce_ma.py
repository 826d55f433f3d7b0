#!/usr/bin/env python
"""Tables 1, 3 and 5 of Ma 2022 on your own copy of IBSR18, beside the published figures.

    python scripts/reproduce_ma.py DATA OUT

DATA holds the volumes as IBSR names them, in folders of any depth: ``IBSR_01.nii.gz`` (or ``IBSR_01_ana_strip``, or
``IBSR_01_ana``) and ``IBSR_01_seg.nii.gz`` (or ``IBSR_01_segTRI_ana``, ``IBSR_01_segTRI_fill_ana``) with 1 CSF, 2 grey
matter, 3 white matter. Everything goes into OUT: ``tables.md``, ``tables.json``, the copies of the volumes that the
tool reads, and the runs and networks. Kill it anywhere and run it again: it goes on. A change of the installed code
goes unnoticed if its version does not change; take another OUT then, and for trainings with other options.

The paper trains on slices on a GPU. The networks here learn from every eighth slice, with half the usual filters, so
that 18 volumes take about an hour on four cores; ``--every``, ``--filters`` and ``--epochs`` change that.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

import ibsr
import numpy as np
import runner
from numpy.typing import NDArray
from runner import Facts, Ledger, Stage, StageError

from monai_deepgmm import cli, protocol
from monai_deepgmm.methods.model_spec import WEIGHTS
from monai_deepgmm.results import metrics

Labels = NDArray[np.int64]

#: Every n-th patient is tested on in the semi-supervised tables.
TESTED = 3
MEASURES = ("precision", "recall", "F1", "JS")
TISSUES = ("GM", "WM")
#: Table 5, precision, recall, F1 and Jaccard in percent.
TABLE5: Mapping[str, Mapping[str, tuple[float, ...]]] = {
    "GMM": {"GM": (80.90, 52.60, 63.42, 46.90), "WM": (74.79, 74.86, 74.17, 59.92)},
    "network, without bias field": {"GM": (85.12, 60.12, 70.17, 54.56), "WM": (73.12, 80.02, 75.59, 61.46)},
    "network, with bias field": {"GM": (89.26, 68.39, 77.29, 63.15), "WM": (77.96, 84.74, 80.79, 68.16)},
}
CE, TOTAL = "L_CE", "L_CE + L_GMM_TV"
RATIOS = ("1/4", "1/2", "3/4")
PAPERS = ("U-Net", "U-Net++", "TRMFCN", "ViT", "TransUNet", "MTUNet", "Our method")
#: Table 1, recall in percent, in the order of PAPERS.
TABLE1: Mapping[tuple[str, str], tuple[float, ...]] = {
    (CE, "1/4"): (91.95, 92.79, 92.67, 87.76, 92.27, 93.13, 93.62),
    (CE, "1/2"): (93.83, 94.49, 94.27, 89.15, 94.03, 94.70, 94.95),
    (CE, "3/4"): (94.54, 95.11, 95.01, 89.96, 94.61, 95.29, 95.50),
    (TOTAL, "1/4"): (92.89, 92.87, 93.07, 88.02, 92.56, 93.24, 93.64),
    (TOTAL, "1/2"): (94.17, 94.61, 94.43, 89.37, 94.11, 94.76, 95.01),
    (TOTAL, "3/4"): (94.73, 95.26, 95.03, 89.99, 94.65, 95.31, 95.54),
}
#: Table 3, IoU in percent of CSF, GM and WM with a quarter of the labels. The paper's ± are left out: of 0.03 to 1.57,
#: they are no standard deviations of percentages, and it does not say of what they are.
TABLE3: Mapping[str, Mapping[str, tuple[float, float, float]]] = {
    CE: {
        "U-Net": (78.82, 92.13, 89.17),
        "U-Net++": (81.56, 92.96, 90.22),
        "TRMFCN": (79.91, 92.55, 89.63),
        "ViT": (58.77, 86.03, 79.12),
        "TransUNet": (77.63, 92.04, 88.91),
        "MTUNet": (81.19, 93.14, 90.48),
        "Our method": (81.64, 93.20, 90.63),
    },
    TOTAL: {
        "U-Net": (79.25, 92.20, 89.21),
        "U-Net++": (81.58, 93.00, 90.28),
        "TRMFCN": (80.26, 92.59, 89.67),
        "ViT": (59.37, 86.92, 79.91),
        "TransUNet": (78.21, 92.54, 89.41),
        "MTUNet": (81.41, 93.24, 90.54),
        "Our method": (81.74, 93.30, 90.71),
    },
}
ORDER3 = ("CSF", "GM", "WM")
#: What a network is called in the paper, and the class whose filters can be chosen.
KNOWN: Mapping[str, tuple[str, str]] = {
    "unet": ("U-Net", "monai_deepgmm.networks.UNet"),
    "modifiedunet": ("Our method", "monai_deepgmm.networks.ModifiedUNet"),
    "basicunetplusplus": ("U-Net++", ""),
    "unetr": ("ViT", ""),
}


class Split(NamedTuple):
    """Who trains, with labels or without, and who is tested, in the semi-supervised tables."""

    train: tuple[str, ...]
    test: tuple[str, ...]


def split(patients: Sequence[str]) -> Split:
    """Every third patient is tested on; the second, if there are no three."""
    test = tuple(patients[TESTED - 1 :: TESTED]) or tuple(patients[-1:])
    return Split(tuple(p for p in patients if p not in test), test)


# What is run ---------------------------------------------------------------------------------------------------------


class Line(NamedTuple):
    """One method of a table.

    Attributes:
        name: as in the table.
        runs: the segmentations, one per seed.
        trained: their trainings; empty where there are none.
        key: which published figures stand beside it; None: none.
    """

    name: str
    runs: tuple[Stage, ...]
    trained: tuple[Stage, ...] = ()
    key: tuple[str, ...] | None = None


def segmented(options: argparse.Namespace, name: str, *how: str, needs: tuple[Path, ...] = ()) -> Stage:
    """The segmentation of whole volumes."""
    folder, data = options.out / "runs" / name, options.out / "data"
    command = ("segment", str(data), str(folder), "--manifest", str(data / "manifest.csv"), *how)
    return Stage(f"segment_{name}", (*command, "--device", options.device), needs, folder / "summary.tsv")


def trained(options: argparse.Namespace, name: str, network: str, seed: int, *how: str) -> Stage:
    """A training on slices; ``how`` ends with what ``--set`` takes, if anything."""
    folder, slices = options.out / "models" / name, options.out / "slices"
    # All arms take as many steps, and the loss is watched on all slices.
    same = ("validation=0", "tol=0", f"batch_size={options.batch}")
    command = ["train", str(slices), str(folder), "--manifest", str(slices / "manifest.csv"), "--resume"]
    command += ["--protocol", str(slices / "protocol.yaml"), "--network", definition(network, options.filters)]
    command += ["--epochs", str(options.epochs), "--seed", str(seed), "--device", options.device]
    return Stage(f"train_{name}", (*command, *how, "--set", *same, *options.set), (), folder / WEIGHTS)


def definition(network: str, filters: Sequence[int]) -> str:
    """A network with these filters, where its class is known to take them."""
    target = KNOWN.get(network, ("", ""))[1]
    return json.dumps({"_target_": target, "filters": list(filters)}) if target else network


def applied(options: argparse.Namespace, training: Stage, *patients: str) -> Stage:
    """A trained network on whole volumes, slice by slice."""
    model = training.makes.parents[1]
    how = ["--protocol", str(options.out / "slices" / "protocol.yaml"), "--model", str(model)]
    how += ["--patients", *patients] if patients else []
    return segmented(options, model.name, *how, needs=(training.makes,))


def unsupervised(options: argparse.Namespace) -> list[Line]:
    """Table 5: everyone is trained on, without labels, and everyone is segmented."""
    whole = ("--protocol", ibsr.WHOLE)
    lines = [Line("GMM", (segmented(options, "gmm", *whole, "--method", "gmm"),), key=("GMM",))]
    for loss, name in (("gmm", "network, without bias field"), ("gmm_bias", "network, with bias field")):
        own = [trained(options, f"{loss}_seed{seed}", "unet", seed, "--loss", loss) for seed in options.seeds]
        lines.append(Line(name, tuple(applied(options, stage) for stage in own), tuple(own), (name,)))
    plain = segmented(options, "default_no_field", *whole, "--set", "degree=0")
    lines.append(Line("brain default, no bias field", (plain,)))
    return [*lines, Line("brain default", (segmented(options, "default", *whole),))]


def semi_supervised(options: argparse.Namespace, who: Split) -> list[Line]:
    """Tables 1 and 3: each network with each share of labels and each loss; the test patients are segmented."""
    lines = []
    for network in options.networks:
        for ratio in options.ratios:
            for loss in (CE, TOTAL):
                beta = "0" if loss == CE else options.beta
                how = ["--loss", "gmm_tv", "--labels", ratio, "--patients", *who.train]
                how += [] if beta is None else ["--set", f"beta={beta}"]
                short = re.sub(r"\W+", "_", network)
                name = f"{short}_{ratio.replace('/', 'of')}_{'ce' if loss == CE else 'total'}"
                own = [trained(options, f"{name}_seed{seed}", network, seed, *how) for seed in options.seeds]
                runs = tuple(applied(options, stage, *who.test) for stage in own)
                lines.append(Line(network, runs, tuple(own), (loss, ratio)))
    return lines


# Figures -------------------------------------------------------------------------------------------------------------


def agreement(labels: Labels, reference: Labels) -> dict[str, tuple[float, ...]]:
    """Tissue → precision, recall, F1, Jaccard of labels (X, Y, Z) where the reference is above 0; NaN: undefined."""
    tissues, inside = {t.name: t.index for t in protocol.load(ibsr.WHOLE).tissues}, reference > 0
    found = metrics.overlap(metrics.confusion(labels[inside], reference[inside], list(tissues.values())))
    columns = zip(found.precision, found.recall, found.dice, found.jaccard, strict=True)
    return {name: tuple(map(float, column)) for name, column in zip(tissues, columns, strict=True)}


def row(options: argparse.Namespace, line: Line, patients: Sequence[str], ledger: Ledger) -> Facts:
    """A method's figures: of each tissue and measure the mean over seeds and the values of the patients."""
    runs = [stage.makes.parent for stage in line.runs if ledger.done(stage)]
    common = [p for p in patients if runs and all((run / p / f"{p}_dseg.nii.gz").is_file() for run in runs)]
    known = {p: runner.labels_in(options.out / "data" / p / "truth.nii.gz") for p in common}
    found = [{p: agreement(runner.labels_in(run / p / f"{p}_dseg.nii.gz"), known[p]) for p in common} for run in runs]
    values = {
        tissue: {
            measure: {p: _rounded(fmean(scores[p][tissue][i] for scores in found)) for p in common}
            for i, measure in enumerate(MEASURES)
        }
        for tissue in (ibsr.VALUES if common else ())
    }
    return {
        "name": line.name,
        "key": list(line.key or ()),
        "seeds": len(runs),
        "n": len(common),
        "values": values,
        "cpu_seconds": [ledger.record(stage).get("cpu_seconds", 0.0) for stage in line.trained],
        "seconds": [ledger.record(stage).get("wall_seconds", 0.0) for stage in line.runs],
    }


def _rounded(value: float) -> float | None:
    """Four digits; None for what is undefined."""
    return round(value, 4) if value == value else None


# Tables --------------------------------------------------------------------------------------------------------------


def markdown(found: Mapping[str, Any]) -> str:
    """The page."""
    lines = ["# IBSR18: Tables 1, 3 and 5 of Ma 2022", "", *about(found)]
    if rows := found.get("unsupervised"):
        title = "## Table 5: without labels"
        lines += ["", title, "", "All volumes are trained on and segmented.", "", runner.table(table5(rows), text=3)]
    if rows := found.get("semi"):
        train, test = found["split"]["train"], found["split"]["test"]
        told = f"{len(train)} volumes are trained on, {len(test)} are tested on: {', '.join(test)}."
        lines += ["", "## Table 1: recall, the mean over tissues", "", told, "", runner.table(table1(rows), text=3)]
        lines += ["", "## Table 3: IoU (Jaccard) of each tissue", "", runner.table(table3(rows), text=4)]
    return "\n".join(lines) + "\n"


def about(found: Mapping[str, Any]) -> Iterator[str]:
    """What the figures were computed from."""
    settings, patients = found["settings"], found["patients"]
    used = [patients[p] for p in ibsr.usable(patients)]
    shapes, masks = (
        ", ".join(f"{what} ({n})" for what, n in Counter(str(facts[key]) for facts in used).items())
        for key in ("shape", "mask")
    )
    yield "Mean ± standard deviation over volumes, among the voxels that have a label; named without reference labels."
    yield ""
    yield f"- {len(used)} volumes; voxels: {shapes}; brain mask: {masks}"
    yield from (f"- left out: {p}: {f['left_out']}" for p, f in patients.items() if "left_out" in f)
    filters, seeds = (" ".join(map(str, settings[key])) for key in ("filters", "seeds"))
    yield (
        f"- networks: slices of 2-D, every {settings['every']}th of them to learn from, filters {filters}, "
        f"{settings['epochs']} epochs, seeds {seeds}; the paper's: lr 1e-4, batch 20, 200 epochs"
    )
    beta = settings["beta"]
    yield f"- β: {'the default of deepgmm train' if beta is None else beta} per voxel; L_CE alone is β = 0"
    yield f"- machine: {runner.machine_line(found['machine'], settings['device'])}"
    yield f"- wall time: {runner.clock(found['wall_seconds'])} with {settings['jobs']} jobs"


def table5(rows: Sequence[Mapping[str, Any]]) -> Iterator[Sequence[str]]:
    """Each method's tissues: ours, and the paper's below."""
    yield ("method", "tissue", "figures", *MEASURES, "volumes", "training CPU s")
    for ours in rows:
        for place, tissue in enumerate(TISSUES):
            own = [over_volumes(ours, tissue, measure) for measure in MEASURES]
            cpu = seconds(ours) if place == 0 else ""
            yield (f"**{ours['name']}**" if place == 0 else "", tissue, "ours", *own, str(ours["n"]), cpu)
            if ours["key"]:
                yield ("", "", "paper", *(short(v) for v in TABLE5[ours["key"][0]][tissue]), "", "")


def table1(rows: Sequence[Mapping[str, Any]]) -> Iterator[Sequence[str]]:
    """Each network and share of labels: the two losses, ours and the paper's."""
    yield ("network", "labelled", "figures", CE, TOTAL, "gain", "training CPU s")
    for network, ratio, pair in _pairs(rows):
        own = [recall(pair[loss]) if loss in pair else None for loss in (CE, TOTAL)]
        gain = f"{own[1] - own[0]:+.3f}" if None not in own else runner.NOTHING
        yield (f"**{network}**", ratio, "ours", *map(runner.shown, own), gain, " / ".join(map(seconds, pair.values())))
        theirs = KNOWN.get(network, (network, ""))[0]
        if theirs in PAPERS and (CE, ratio) in TABLE1:
            known = [TABLE1[loss, ratio][PAPERS.index(theirs)] for loss in (CE, TOTAL)]
            yield (f"{theirs}", "", "paper", *map(short, known), f"{(known[1] - known[0]) / 100:+.3f}", "")


def table3(rows: Sequence[Mapping[str, Any]]) -> Iterator[Sequence[str]]:
    """Each network, share of labels and loss: IoU by tissue; the paper gives those of a quarter."""
    yield ("network", "labelled", "loss", "figures", *ORDER3, "volumes")
    for network, ratio, pair in _pairs(rows):
        theirs = KNOWN.get(network, (network, ""))[0]
        for loss, ours in pair.items():
            own = [over_volumes(ours, tissue, "JS") for tissue in ORDER3]
            yield (f"**{network}**", ratio, loss, "ours", *own, str(ours["n"]))
            if ratio == "1/4" and theirs in TABLE3[loss]:
                yield (theirs, "", "", "paper", *map(short, TABLE3[loss][theirs]), "")


def _pairs(rows: Sequence[Mapping[str, Any]]) -> Iterator[tuple[str, str, dict[str, Mapping[str, Any]]]]:
    """Network, share of labels, loss → row."""
    for network, ratio in dict.fromkeys((r["name"], r["key"][1]) for r in rows):
        yield network, ratio, {r["key"][0]: r for r in rows if (r["name"], r["key"][1]) == (network, ratio)}


def recall(ours: Mapping[str, Any]) -> Any:
    """The mean over volumes, then tissues; None where nothing has been computed."""
    return runner.mean(runner.mean(measures["recall"].values()) for measures in ours["values"].values())


def over_volumes(ours: Mapping[str, Any], tissue: str, measure: str) -> str:
    """Mean ± standard deviation of what is defined."""
    return runner.spread(ours["values"].get(tissue, {}).get(measure, {}).values())


def seconds(ours: Mapping[str, Any]) -> str:
    """CPU seconds of each training."""
    return " ".join(f"{s:.0f}" for s in ours["cpu_seconds"])


def short(percent: float) -> str:
    return f"{percent / 100:.3f}"


# The run -------------------------------------------------------------------------------------------------------------


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = runner.parser(__doc__)
    add = parser.add_argument
    add("data", metavar="DATA", type=Path, help="the folder with the IBSR volumes")
    add("out", metavar="OUT", type=Path, help="the folder for tables, copies, runs and networks")
    add("--only", choices=["unsupervised", "semi"], help="Table 5, or Tables 1 and 3; both if absent")
    add("--networks", nargs="+", default=["unet", "modifiedunet"], help="of the semi-supervised tables")
    add("--ratios", nargs="+", default=list(RATIOS), metavar="I/N", help="shares of volumes with labels")
    add("--seeds", type=int, nargs="+", default=[0], metavar="S", help="one training for each")
    add("--epochs", type=int, default=20, metavar="N", help="of every training")
    add("--every", type=int, default=8, metavar="N", help="networks learn from each N-th slice")
    add("--filters", type=int, nargs="+", default=[16, 32, 64, 128, 256], metavar="N", help="of unet and modifiedunet")
    add("--batch", type=int, default=4, metavar="N", help="slices in a gradient step")
    add("--beta", metavar="β", help="of L_GMM_TV beside labels, per voxel; the default of deepgmm train if absent")
    add("--set", nargs="+", default=[], metavar="KEY=VALUE", help="other settings of all trainings")
    add("--jobs", type=int, default=os.cpu_count() or 1, metavar="N", help="processes at the same time")
    add("--device", default="cpu", help="as of deepgmm")
    options = parser.parse_args(argv)
    options.data, options.out = options.data.resolve(), options.out.resolve()  # a stage is known by its command
    numbers = (options.jobs, options.every, options.epochs, options.batch, *options.filters)
    if min(numbers) < 1 or len(set(options.seeds)) < len(options.seeds):
        parser.error("--jobs, --every, --epochs, --batch and --filters must be at least 1, and --seeds all different")
    if options.data in (options.out, *options.out.parents):
        parser.error("OUT must not lie in DATA")
    return options


def reproduce(options: argparse.Namespace) -> int:
    """Everything, stage after stage; the tables are written anew whenever rows have been added.

    Returns:
        The exit code: 1 if a patient is left out, or a method failed on everyone.

    Raises:
        StageError: a stage failed.
        UsageError: DATA does not hold what is needed.
    """
    patients, same = ibsr.prepare(options.data, options.out, every=options.every)
    ledger, used = Ledger(options.out, same), ibsr.usable(patients)
    ledger.say(f"{len(used)} volumes")
    for patient in patients.keys() - set(used):
        print(f"left out: {patient}: {patients[patient]['left_out']}", file=sys.stderr)
    plan = {"unsupervised": unsupervised(options), "semi": semi_supervised(options, split(used))}
    good = len(used) == len(patients)
    for part, lines in plan.items():
        if options.only not in (None, part):
            continue
        for networks in (False, True):
            chosen = [line for line in lines if bool(line.trained) == networks]
            runner.run_apart(ledger, [stage for line in chosen for stage in line.trained], options.jobs)
            for stage in (stage for line in chosen for stage in line.runs):
                good &= attempted(ledger, stage, options.jobs)
            write(options, patients, plan, ledger)
    ledger.say(f"done: see {options.out / 'tables.md'}")
    return cli.OK if good else cli.SOME_FAILED


def attempted(ledger: Ledger, stage: Stage, jobs: int) -> bool:
    """Runs a stage; False if it failed on every patient, which leaves its row empty and the others alone."""
    try:
        runner.run(ledger, stage, jobs)
    except StageError as error:
        if error.code != cli.ALL_FAILED:
            raise
        ledger.say(f"{stage.name}: every patient failed; see {stage.makes}")
        return False
    return True


def write(
    options: argparse.Namespace, patients: Mapping[str, Any], plan: Mapping[str, list[Line]], ledger: Ledger
) -> None:
    """Writes the tables, as far as the runs have come."""
    ledger.save()
    everyone = ibsr.usable(patients)
    who = split(everyone)
    chosen = {"unsupervised": everyone, "semi": who.test}
    keys = ("epochs", "every", "filters", "batch", "beta", "seeds", "networks", "ratios", "jobs", "device", "set")
    content: Facts = {
        "paper": "Ma 2022, Tables 1, 3 and 5",
        "patients": patients,
        "split": {"train": list(who.train), "test": list(who.test)},
        "machine": runner.machine(),
        "settings": {key: getattr(options, key) for key in keys},
        "wall_seconds": ledger.earlier,
    }
    for part, lines in plan.items():
        # A part that was not asked for is shown as far as an earlier run has brought it.
        if options.only in (None, part) or any(ledger.done(stage) for line in lines for stage in line.runs):
            content[part] = [row(options, line, chosen[part], ledger) for line in lines]
    runner.write(options.out / "tables.json", content)
    runner.write(options.out / "tables.md", markdown(content))


def main(argv: Sequence[str] | None = None) -> int:
    options = parse(argv)
    return runner.ended("reproduce_ma", lambda: reproduce(options))


if __name__ == "__main__":
    sys.exit(main())
