"""Trains networks on the same patients in the same way, and tells in one table how well each does.

    python scripts/compare_networks/compare.py [DATA] OUT

Each network is trained as by ``deepgmm train DATA … --network NETWORK --set label_rule=network``, and segments and is
evaluated as by ``deepgmm segment`` and ``deepgmm evaluate``: on the patients of ``--test``, or on those of DATA, whose
labels no training has seen (but for those that ``--labels`` names). Without DATA, phantoms are made in OUT. What is
done is kept: interrupt it and run it again, or ask for more networks. The exit code is 1 if a network could not be
trained, 2 if nothing could be done.

The networks of Ma 2022 (M §4.2) that MONAI does not have stand beside this file, small and after the papers' ideas.
"""

from __future__ import annotations

import argparse
import re
import statistics
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

import runner

from monai_deepgmm import cli, protocol
from monai_deepgmm.errors import UsageError
from monai_deepgmm.methods import model_spec, trained_network
from monai_deepgmm.patients.discovery import find

#: Those of this folder, by the name that stands in the table.
OWN = {"trmfcn": "trmfcn.TRMFCN", "transunet": "transunet.TransUNet", "mtunet": "mtunet.MTUNet"}
#: The seven of M §4.2; unetr stands for ViT.
NETWORKS = ("unet", "basicunetplusplus", "trmfcn", "unetr", "transunet", "mtunet", "modifiedunet")
#: Phantoms to train on and to test on, and their seeds.
PHANTOMS = {"train": (8, 1), "test": (6, 2)}
Row = dict[str, Any]


def main(argv: Sequence[str] | None = None) -> int:
    arguments = parser().parse_args(argv)
    return runner.ended("compare", lambda: run(arguments))


def parser() -> argparse.ArgumentParser:
    made = runner.parser(__doc__)
    made.add_argument("data", metavar="DATA", nargs="?", type=Path, help="the patients to train on; phantoms if absent")
    made.add_argument("out", metavar="OUT", type=Path, help="the folder for models, labels and the table")
    made.add_argument("--test", type=Path, metavar="DIR", help="other patients to segment and to evaluate")
    made.add_argument("--networks", nargs="+", default=NETWORKS, metavar="NETWORK", help="names, classes or files")
    made.add_argument("--loss", default="gmm_tv", help="as of deepgmm train")
    made.add_argument(
        "--labels", nargs="+", metavar="WHOSE", help="as of deepgmm train, such as 1/4: learn from these too"
    )
    made.add_argument("--epochs", type=int, help="as of deepgmm train")
    made.add_argument("--seeds", nargs="+", type=int, default=[0], metavar="SEED", help="one training for each")
    made.add_argument("--protocol", default="infarct", help="as of deepgmm train")
    made.add_argument("--set", nargs="+", default=[], metavar="KEY=VALUE", help="settings of the trainings")
    made.add_argument("--threads", type=int, metavar="N", help="threads of torch")
    return made


def run(arguments: argparse.Namespace) -> int:
    """Compares; the exit code."""
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    data, test = arguments.data, arguments.test or arguments.data
    if data is None:
        data, made = (
            runner.phantoms(
                arguments.out / "phantoms" / part, "-n", n, "--seed", seed, "--protocol", arguments.protocol
            )
            for part, (n, seed) in PHANTOMS.items()
        )
        test = test or made
    wanted = protocol.load(arguments.protocol)
    if not any(study.truth for study in find(test, wanted).studies):
        raise UsageError(f"{test}: no patient has labels to compare with; name labelled ones with --test")
    rows, failed = [], False
    for network in arguments.networks:
        try:
            rows.append(averaged(network, [row(network, seed, data, test, arguments) for seed in arguments.seeds]))
        except runner.StageError as error:
            print(f"{network}: {error}", file=sys.stderr)
            failed = True
    text = runner.table(table(rows, [t.name for t in wanted.tissues])) + "\n"
    if rows:
        sizes = ", ".join(sorted({"×".join(map(str, row["size"])) for row in rows}))
        machine = runner.machine_line(runner.machine(), f"threads: {torch.get_num_threads()}")
        text += f"\nImages of {sizes} voxels; {machine}.\n"
    runner.write(arguments.out / "table.md", text)
    print(text)
    return cli.SOME_FAILED if failed or not rows else cli.OK


def row(network: str, seed: int, data: Path, test: Path, arguments: argparse.Namespace) -> Row:
    """Trains a network, segments and evaluates, unless all that is done.

    Raises:
        UsageError: it was done with other options.
        StageError: a step failed.
    """
    folder = arguments.out / f"{re.sub(r'[^A-Za-z0-9_.-]+', '_', title(network))}-seed{seed}"
    asked = {key: getattr(arguments, key) for key in ("protocol", "loss", "labels", "epochs", "set")}
    asked |= {"network": network, "seed": seed, "data": data.name, "test": test.name}
    return runner.kept(
        folder / "row.json", asked, lambda: measured(network, seed, data, test, folder, arguments), strict=True
    )


def measured(network: str, seed: int, data: Path, test: Path, folder: Path, arguments: argparse.Namespace) -> Row:
    """Trains a network, segments and evaluates; what came of it."""
    own = ["--protocol", arguments.protocol, "--seed", seed]
    training = ["--network", OWN.get(network, network), "--loss", arguments.loss, "--resume", "--trust-code"]
    training += ["--epochs", arguments.epochs] if arguments.epochs else []
    training += ["--labels", *arguments.labels] if arguments.labels else []
    with runner.seconds_added(folder / "seconds"):
        settings = ("--set", "label_rule=network", *arguments.set)
        runner.deepgmm("train", data, folder / "model", *own, *training, *settings)
    runner.deepgmm("segment", test, folder / "labels", *own, "--model", folder / "model", "--trust-code")
    runner.deepgmm("evaluate", folder / "labels", test, "--protocol", arguments.protocol)
    found = runner.read_json(folder / "labels" / "evaluation.json")
    known = model_spec.read(folder / "model", protocol.load(arguments.protocol), trust_code=True).spec
    return {
        "parameters": sum(p.numel() for p in trained_network.build(known).parameters()),
        "cpu_seconds": float((folder / "seconds").read_text()),
        "size": list(known.size),
        "dice": {name: found["dice"][name]["mean"] for name in known.tissues},
        "mean": found["dice"]["mean"],
        "matched": found["dice_matched"]["mean"],
    }


def title(network: str) -> str:
    """What a network is called in the table: its name, or its file's."""
    return Path(network).stem if network.endswith((".json", ".yaml", ".yml")) else network


def averaged(network: str, seeds: Sequence[Row]) -> Row:
    """The mean of the rows of one network's seeds, and how far apart they lie."""
    means = runner.known(s["mean"] for s in seeds)
    return {
        **seeds[0],
        "network": title(network),
        "cpu_seconds": runner.mean(s["cpu_seconds"] for s in seeds),
        "dice": {name: runner.mean(s["dice"][name] for s in seeds) for name in seeds[0]["dice"]},
        "mean": runner.mean(means),
        "sd": statistics.stdev(means) if len(means) > 1 else None,
        "matched": runner.mean(s["matched"] for s in seeds),
    }


def table(rows: Sequence[Row], tissues: Sequence[str]) -> Iterator[Sequence[str]]:
    """One row for each network."""
    yield ("network", "parameters", "train CPU s", *tissues, "mean", "matched")
    for row in rows:
        counts = (f"{row['parameters']:,}", f"{row['cpu_seconds']:.0f}")
        dice = (runner.shown(row["dice"].get(name)) for name in tissues)
        sd = "" if row["sd"] is None else f" ± {row['sd']:.3f}"
        yield (row["network"], *counts, *dice, runner.shown(row["mean"]) + sd, runner.shown(row["matched"]))


if __name__ == "__main__":
    sys.exit(main())
