"""Tells in one table how much the losses of Ma 2022 help: a bias field on shaded images, the mixture beside few labels.

    python scripts/compare_losses.py [DATA] OUT --experiment bias|labels [--seeds 0 1 2] [--set KEY=VALUE …]

Each arm of an experiment is trained as by ``deepgmm train``, on the first patients, with the same seeds and as many
steps; the rest are segmented as by ``deepgmm segment --model``, and compared with their reference labels slice by
slice. Without DATA, phantoms are made in OUT. What is done is kept: interrupt it and run it again.
"""

from __future__ import annotations

import argparse
import dataclasses
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import runner
import torch

from monai_deepgmm import protocol
from monai_deepgmm.images import labels as reference_labels
from monai_deepgmm.methods import config
from monai_deepgmm.patients.discovery import find
from monai_deepgmm.patients.study import Study
from monai_deepgmm.results import segment


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


def main(argv: Sequence[str] | None = None) -> int:
    arguments = parser().parse_args(argv)
    return runner.ended("compare_losses", lambda: compare(arguments))


def parser() -> argparse.ArgumentParser:
    made = runner.parser(__doc__)
    made.add_argument("data", metavar="DATA", nargs="?", type=Path, help="labelled patients; phantoms if absent")
    made.add_argument("out", metavar="OUT", type=Path, help="the folder for phantoms and models")
    made.add_argument("--experiment", choices=EXPERIMENTS, required=True)
    made.add_argument("-n", "--number", type=int, default=20, metavar="N", help="phantoms")
    made.add_argument("--test", type=int, default=8, metavar="N", help="of them not trained on")
    made.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], metavar="SEED", help="one training for each")
    made.add_argument("--network", default="{_target_: monai_deepgmm.networks.UNet, filters: [16, 32, 64, 128]}")
    made.add_argument("--epochs", type=int, default=20, help="of every training")
    made.add_argument("--set", nargs="+", default=[], metavar="KEY=VALUE", help="settings of all trainings")
    made.add_argument("--threads", type=int, default=2, metavar="N", help="threads of torch")
    return made


def compare(arguments: argparse.Namespace) -> None:
    """Trains every arm with every seed, and prints the table."""
    torch.set_num_threads(arguments.threads)
    experiment, out = EXPERIMENTS[arguments.experiment], arguments.out
    made = ("-n", arguments.number, "--seed", 11, "--protocol", experiment.protocol, "--set", *experiment.recipe)
    data = arguments.data or runner.phantoms(out / f"phantoms-{arguments.experiment}", *made)
    wanted = by_slice(experiment.protocol, out)
    studies = find(data, protocol.load(wanted)).studies
    seen, unseen = studies[: -arguments.test], studies[-arguments.test :]
    settings = [*experiment.common, *arguments.set]
    asked = f"{arguments.network}, epochs {arguments.epochs}, {' '.join(settings)}"
    print(runner.machine_line(runner.machine(), f"{arguments.threads} threads of torch"))
    print(f"trained on {len(seen)} patients of {data.name}, compared on {len(unseen)}; options: {asked}")
    results: dict[str, list[dict[str, float]]] = {}
    for name, own in experiment.arms.items():
        for seed in arguments.seeds:
            folder = out / f"{'-'.join(re.findall('[A-Za-z_]+', name))}-seed{seed}"
            # The loss on all patients is watched in every arm, and nothing stops early.
            command = ["train", data, folder / "model", "-q", "--seed", seed, "--epochs", arguments.epochs, "--resume"]
            command += ["--protocol", wanted, "--network", arguments.network, "--patients", *(s.patient for s in seen)]
            command += ["--set", "validation=0", "tol=0", *settings, *own]
            scores = runner.kept(
                folder / "scores.json",
                {"arm": own, "options": asked, "patients": [s.patient for s in studies]},
                lambda words=command, model=folder / "model": {"scores": measured(words, model, unseen, wanted)},
                strict=True,
            )["scores"]
            results.setdefault(name, []).append(scores)
            print(f"{name:28s} seed {seed}  " + "  ".join(f"{k} {v:.3f}" for k, v in scores.items()), flush=True)
    print(runner.table(table(results)))


def by_slice(name: str, out: Path) -> str:
    """A protocol whose images are slices: the one of that name, or a file of its like."""
    known = protocol.load(name)
    if known.unit == "slice":
        return name
    place = out / f"{name}-slices.yaml"
    runner.write(place, protocol.as_yaml(dataclasses.replace(known, name=f"{name}-slices", unit="slice")))
    return str(place)


def measured(command: Sequence[object], model: Path, unseen: Sequence[Study], wanted: str) -> dict[str, float]:
    """Trains a network and scores it on the others, with the CPU seconds of both."""
    began = runner.cpu_seconds()
    if runner.deepgmm(*command):
        raise runner.StageError(f"{model.parent.name}: the training failed")
    return agreement(model, unseen, wanted) | {"cpu_s": runner.cpu_seconds() - began}


def agreement(model: Path, studies: Sequence[Study], wanted: str) -> dict[str, float]:
    """Named Dice of each tissue over all slices, and their mean."""
    asked = config.build(protocol=wanted, model=model)
    rows = []
    for study in studies:
        found = segment.segment(study, asked)
        known = reference_labels.read(study, asked.protocol, tuple(found.images), like=found.reference).labels
        indices = {t.name: t.index for t in found.tissues}
        pairs = (np.moveaxis(volume, found.slice_axis, 0) for volume in (found.labels, known))
        rows += [runner.dice(*pair, indices, needed=False) for pair in zip(*pairs, strict=True) if pair[1].any()]
    means = {name: float(np.nanmean([row[name] for row in rows])) for name in rows[0]}
    return means | {"mean": float(np.mean(list(means.values())))}


def table(results: Mapping[str, Sequence[Mapping[str, float]]]) -> Iterator[Sequence[str]]:
    """Means over the seeds; the last columns are each seed's mean, and its gain over the first arm."""
    base = next(iter(results.values()))
    names = [k for k in base[0] if k != "cpu_s"]
    yield ("arm", *names, "mean of each seed", "gain over the first, each seed", "CPU s")
    for arm, rows in results.items():
        cells = [runner.shown(runner.mean(row[k] for row in rows)) for k in names]
        cells += [" ".join(f"{row['mean']:.3f}" for row in rows)]
        cells += [" ".join(f"{row['mean'] - b['mean']:+.3f}" for row, b in zip(rows, base, strict=True))]
        yield (arm, *cells, runner.shown(runner.mean(row["cpu_s"] for row in rows), 0))


if __name__ == "__main__":
    sys.exit(main())
