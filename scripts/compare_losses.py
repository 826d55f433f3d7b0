"""Tells in one table how much the losses of Ma 2022 help: a bias field on shaded images, the mixture beside few labels.

    python scripts/compare_losses.py [DATA] OUT --experiment bias|labels [--seeds 0 1 2] [--set KEY=VALUE …]

Each arm of an experiment is trained as by ``deepgmm train``, on the first patients, with the same seeds and as many
steps; the rest are segmented as by ``deepgmm segment --model``, and compared with their truth slice by slice. Without
DATA, phantoms are made in OUT. What is done is kept: interrupt it and run it again.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import platform
import re
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from monai_deepgmm import cli, protocol
from monai_deepgmm.images import atomic_files as files
from monai_deepgmm.images import labels as truth
from monai_deepgmm.methods import config
from monai_deepgmm.patients.discovery import find
from monai_deepgmm.patients.study import Study
from monai_deepgmm.results import metrics, segment


class Experiment(NamedTuple):
    """What is compared, and on whom.

    Attributes:
        protocol: of the phantoms; brains are trained on slice by slice.
        recipe: how the phantoms are made.
        common: options of all trainings.
        arms: what each adds; the first is what the others are compared with.
    """

    protocol: str
    recipe: Sequence[str]
    common: Sequence[str]
    arms: Mapping[str, Sequence[str]]


EXPERIMENTS: Mapping[str, Experiment] = {
    "bias": Experiment(
        "brain",
        ["shading=0.35", "shape=[64,72,16]", "spacing_mm=[2.2,2.2,9]"],
        ["grid_mm=2.2", "lr=3e-3", "start_weight=0.3"],
        {"gmm": ["--loss", "gmm"], "gmm_bias": ["--loss", "gmm_bias"]},
    ),
    "labels": Experiment(
        "infarct",
        ["shading=0"],
        ["grid_mm=2", "teacher=signature"],
        {
            "CE": ["--labels", "1/4", "--set", "beta=0"],
            "CE + β (L_GMM_TV + teacher)": ["--labels", "1/4"],
            "CE + β teacher": ["--labels", "1/4", "--set", "start_epochs=100000", "start_weight=1"],
        },
    ),
}
Scores = dict[str, float]


def main(argv: Sequence[str] | None = None) -> int:
    arguments = parser().parse_args(argv)
    torch.set_num_threads(arguments.threads)
    experiment = EXPERIMENTS[arguments.experiment]
    data = arguments.data or phantoms(arguments.out / f"phantoms-{arguments.experiment}", arguments, experiment)
    wanted = by_slice(experiment.protocol, arguments.out)
    studies = find(data, protocol.load(wanted)).studies
    seen, unseen = studies[: -arguments.test], studies[-arguments.test :]
    print(f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, {arguments.threads} threads of torch")
    print(f"trained on {len(seen)} patients of {data.name}, compared on {len(unseen)}; options: {options(arguments)}")
    results: dict[str, list[Scores]] = {}
    for name, own in experiment.arms.items():
        for seed in arguments.seeds:
            scores = measured(name, own, seed, data, wanted, seen, unseen, arguments)
            results.setdefault(name, []).append(scores)
            print(f"{name:28s} seed {seed}  " + "  ".join(f"{k} {v:.3f}" for k, v in scores.items()), flush=True)
    print("\n".join(table(results)))
    return cli.OK


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("data", metavar="DATA", nargs="?", type=Path, help="labelled patients; phantoms if absent")
    made.add_argument("out", metavar="OUT", type=Path, help="the folder for phantoms and models")
    made.add_argument("--experiment", choices=EXPERIMENTS, required=True)
    made.add_argument("-n", "--number", type=int, default=20, metavar="N", help="phantoms (default: %(default)s)")
    made.add_argument("--test", type=int, default=8, metavar="N", help="of them not trained on (default: %(default)s)")
    made.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], metavar="SEED", help="one training for each")
    made.add_argument("--network", default="{_target_: monai_deepgmm.networks.UNet, filters: [16, 32, 64, 128]}")
    made.add_argument("--epochs", type=int, default=20, help="of every training (default: %(default)s)")
    made.add_argument("--set", nargs="+", default=[], metavar="KEY=VALUE", help="settings of all trainings")
    made.add_argument("--threads", type=int, default=2, metavar="N", help="threads of torch (default: %(default)s)")
    return made


def options(arguments: argparse.Namespace) -> str:
    """What all arms share, and what is kept with a result."""
    settings = " ".join([*EXPERIMENTS[arguments.experiment].common, *arguments.set])
    return f"{arguments.network}, epochs {arguments.epochs}, {settings}"


def by_slice(name: str, out: Path) -> str:
    """A protocol whose images are slices: the one of that name, or a file of its like."""
    known = protocol.load(name)
    if known.unit == "slice":
        return name
    place = out / f"{name}-slices.yaml"
    place.parent.mkdir(parents=True, exist_ok=True)
    files.write_whole(place, protocol.as_yaml(dataclasses.replace(known, name=f"{name}-slices", unit="slice")).encode())
    return str(place)


def phantoms(folder: Path, arguments: argparse.Namespace, experiment: Experiment) -> Path:
    """A cohort of phantoms, made if it is not there whole."""
    if not (done := folder.with_suffix(".done")).is_file():
        made = ["phantom", str(folder), "-n", str(arguments.number), "--seed", "11", "--protocol", experiment.protocol]
        if cli.main([*made, "--set", *experiment.recipe]):
            raise SystemExit("the phantoms could not be made")
        files.write_whole(done, b"")
    return folder


def measured(
    name: str,
    own: Sequence[str],
    seed: int,
    data: Path,
    wanted: str,
    seen: Sequence[Study],
    unseen: Sequence[Study],
    arguments: argparse.Namespace,
) -> Scores:
    """Trains an arm with a seed and scores it, unless that is done."""
    folder = arguments.out / f"{'-'.join(re.findall('[A-Za-z_]+', name))}-seed{seed}"
    asked = {"arm": list(own), "options": options(arguments), "patients": [s.patient for s in (*seen, *unseen)]}
    if (record := folder / "scores.json").is_file():
        kept = json.loads(record.read_text(encoding="utf-8"))
        if kept["asked"] == asked:
            return dict(kept["scores"])
        raise SystemExit(f"{folder.name} was made with other options; remove it, or name another OUT")
    # The loss on all patients is watched in every arm, and nothing stops early.
    settings = ["validation=0", "tol=0", *EXPERIMENTS[arguments.experiment].common, *arguments.set]
    began = time.process_time()
    command = ["train", str(data), str(folder / "model"), "-q", "--seed", str(seed), "--epochs", str(arguments.epochs)]
    command += ["--protocol", wanted, "--network", arguments.network, "--resume"]
    if cli.main([*command, "--patients", *(s.patient for s in seen), "--set", *settings, *own]):
        raise SystemExit(f"{name}: the training failed")
    scores = agreement(folder / "model", unseen, wanted) | {"cpu_s": time.process_time() - began}
    files.write_whole(record, json.dumps({"asked": asked, "scores": scores}).encode())
    return scores


def agreement(model: Path, studies: Sequence[Study], wanted: str) -> Scores:
    """Named Dice of each tissue over all slices, and their mean."""
    asked = config.build(protocol=wanted, model=model)
    rows = []
    for study in studies:
        found = segment.segment(study, asked)
        known = truth.read(study, asked.protocol, tuple(found.images), like=found.reference).labels
        pairs = (np.moveaxis(volume, found.slice_axis, 0) for volume in (found.labels, known))
        for ours, theirs in zip(*pairs, strict=True):
            if theirs.any():
                counts = metrics.confusion(ours, theirs, [t.index for t in found.tissues])
                rows.append(metrics.overlap(counts).dice)
    means = np.nanmean(np.stack(rows), axis=0).tolist()
    return {t.name: value for t, value in zip(found.tissues, means, strict=True)} | {"mean": statistics.mean(means)}


def table(results: Mapping[str, Sequence[Scores]]) -> list[str]:
    """Markdown: means over the seeds; the last column is the gain over the first arm, seed by seed."""
    base, names = next(iter(results.values())), [k for k in next(iter(results.values()))[0] if k != "cpu_s"]
    lines = [f"| arm | {' | '.join(names)} | mean of each seed | gain over the first, each seed | CPU s |"]
    lines += ["|" + "---|" * (len(names) + 4)]
    for arm, rows in results.items():
        cells = [f"{statistics.mean(row[k] for row in rows):.3f}" for k in names]
        cells += [" ".join(f"{row['mean']:.3f}" for row in rows)]
        cells += [" ".join(f"{row['mean'] - b['mean']:+.3f}" for row, b in zip(rows, base, strict=True))]
        lines += [f"| {arm} | {' | '.join(cells)} | {statistics.mean(row['cpu_s'] for row in rows):.0f} |"]
    return lines


if __name__ == "__main__":
    sys.exit(main())
