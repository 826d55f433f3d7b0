"""Trains networks on the same patients in the same way, and tells in one table how well each does.

    python scripts/compare_networks/compare.py [DATA] OUT

Each network is trained as by ``deepgmm train DATA … --network NETWORK --set labels=network``, and segments and is
evaluated as by ``deepgmm segment`` and ``deepgmm evaluate``: on the patients of ``--test``, or on those of DATA, whose
labels no training has seen (but for those that ``--labels`` names). Without DATA, phantoms are made in OUT. What is
done is kept: interrupt it and run it again, or ask for more networks. The exit code is 1 if a network could not be
trained, 2 if nothing could be done.

The networks of Ma 2022 (M §4.2) that MONAI does not have stand beside this file, small and after the papers' ideas.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import re
import statistics
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from monai_deepgmm import cli, protocol
from monai_deepgmm.errors import UsageError
from monai_deepgmm.images import atomic_files as files
from monai_deepgmm.methods import trained_network as model
from monai_deepgmm.networks import model_spec as spec
from monai_deepgmm.patients.discovery import find

#: Those of this folder, by the name that stands in the table.
OWN = {"trmfcn": "trmfcn.TRMFCN", "transunet": "transunet.TransUNet", "mtunet": "mtunet.MTUNet"}
#: The seven of M §4.2; unetr stands for ViT.
NETWORKS = ("unet", "basicunetplusplus", "trmfcn", "unetr", "transunet", "mtunet", "modifiedunet")
#: Phantoms to train on and to test on, and their seeds.
PHANTOMS = {"train": (8, 1), "test": (6, 2)}
Row = dict[str, Any]


class FailedError(Exception):
    """A step ended with an exit code that tells of no result."""


def main(argv: Sequence[str] | None = None) -> int:
    arguments = parser().parse_args(argv)
    sys.path.insert(0, str(Path(__file__).parent))  # where --network finds the networks of this folder
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    try:
        return run(arguments)
    except UsageError as error:
        print(f"compare: {error}", file=sys.stderr)
        return cli.USAGE


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, argument_default=None
    )
    made.add_argument("data", metavar="DATA", nargs="?", type=Path, help="the patients to train on; phantoms if absent")
    made.add_argument("out", metavar="OUT", type=Path, help="the folder for models, labels and the table")
    made.add_argument("--test", type=Path, metavar="DIR", help="other patients to segment and to evaluate")
    made.add_argument("--networks", nargs="+", default=NETWORKS, metavar="NETWORK", help="names, classes or files")
    made.add_argument("--loss", default="gmm_tv", help="as of deepgmm train (default: %(default)s)")
    made.add_argument(
        "--labels", nargs="+", metavar="WHOSE", help="as of deepgmm train, such as 1/4: learn from these too"
    )
    made.add_argument("--epochs", type=int, help="as of deepgmm train")
    made.add_argument("--seeds", nargs="+", type=int, default=[0], metavar="SEED", help="one training for each")
    made.add_argument("--protocol", default="infarct", help="as of deepgmm train (default: %(default)s)")
    made.add_argument("--set", nargs="+", default=[], metavar="KEY=VALUE", help="settings of the trainings")
    made.add_argument("--threads", type=int, metavar="N", help="threads of torch")
    return made


def run(arguments: argparse.Namespace) -> int:
    """Compares; the exit code."""
    data, test = arguments.data, arguments.test or arguments.data
    if data is None:
        data, made = (phantoms(arguments.out / "phantoms", part, arguments.protocol) for part in PHANTOMS)
        test = test or made
    wanted = protocol.load(arguments.protocol)
    if not any(study.truth for study in find(test, wanted).studies):
        raise UsageError(f"{test}: no patient has labels to compare with; name labelled ones with --test")
    rows, failed = [], False
    for network in arguments.networks:
        try:
            seeds = [measured(network, seed, data, test, arguments) for seed in arguments.seeds]
        except FailedError as error:
            print(f"{network}: {error}", file=sys.stderr)
            failed = True
            continue
        rows.append(averaged(network, seeds))
    text = "\n".join(table(rows, [t.name for t in wanted.tissues])) + "\n"
    files.write_whole(arguments.out / "table.md", text.encode())
    print(text)
    return cli.SOME_FAILED if failed or not rows else cli.OK


def phantoms(folder: Path, part: str, wanted: str) -> Path:
    """A cohort of phantoms, made if it is not there whole."""
    number, seed = PHANTOMS[part]
    if not (done := folder / f"{part}.done").is_file():
        step("phantom", folder / part, "-n", number, "--seed", seed, "--protocol", wanted)
        files.write_whole(done, b"")
    return folder / part


def measured(network: str, seed: int, data: Path, test: Path, arguments: argparse.Namespace) -> Row:
    """Trains a network, segments and evaluates, unless all that is done.

    Raises:
        UsageError: it was done with other options.
        FailedError: a step failed.
    """
    folder = arguments.out / f"{re.sub(r'[^A-Za-z0-9_.-]+', '_', title(network))}-seed{seed}"
    options = {key: getattr(arguments, key) for key in ("loss", "labels", "epochs", "set")}
    asked = {"network": network, "seed": seed, "protocol": arguments.protocol, **options}
    asked |= {"data": data.name, "test": test.name}
    if (record := folder / "row.json").is_file():
        row: Row = json.loads(record.read_text(encoding="utf-8"))
        if row["asked"] != asked:
            raise UsageError(f"OUT: {folder.name} was made with other options; remove it, or name another OUT")
        return row
    own = ["--protocol", arguments.protocol, "--seed", seed]
    training = ["--network", OWN.get(network, network), "--loss", arguments.loss, "--resume"]
    training += ["--epochs", arguments.epochs] if arguments.epochs else []
    training += ["--labels", *arguments.labels] if arguments.labels else []
    with cpu_seconds(folder / "seconds"):
        step("train", data, folder / "model", *own, *training, "--set", "labels=network", *arguments.set)
    step("segment", test, folder / "labels", *own, "--model", folder / "model")
    step("evaluate", folder / "labels", test, "--protocol", arguments.protocol)
    row = {"asked": asked, **told(folder, protocol.load(arguments.protocol))}
    files.write_whole(record, json.dumps(row, indent=1).encode())
    return row


def title(network: str) -> str:
    """What a network is called in the table: its name, or its file's."""
    return Path(network).stem if network.endswith((".json", ".yaml", ".yml")) else network


def told(folder: Path, wanted: protocol.Protocol) -> Row:
    """What a finished training and its evaluation say."""
    result = json.loads((folder / "labels" / "evaluation.json").read_text(encoding="utf-8"))
    known = spec.read(folder / "model", wanted).spec
    return {
        "parameters": sum(p.numel() for p in model.build(known).parameters()),
        "cpu_seconds": float((folder / "seconds").read_text()),
        "size": list(known.size),
        "dice": {name: result["dice"][name]["mean"] for name in known.tissues},
        "mean": result["dice"]["mean"],
        "matched": result["dice_matched"]["mean"],
    }


def step(command: str, *options: object) -> None:
    """A command of the package, in this process; what it prints goes to the log.

    Raises:
        FailedError: it gave no result.
    """
    words = [command, *map(str, options)]
    print(f"$ deepgmm {' '.join(words)}", file=sys.stderr, flush=True)
    with contextlib.redirect_stdout(sys.stderr):
        code = cli.main(words)
    if code == cli.INTERRUPTED:
        raise KeyboardInterrupt
    if code not in (cli.OK, cli.SOME_FAILED):
        raise FailedError(f"deepgmm {command} ended with exit code {code}")


@contextlib.contextmanager
def cpu_seconds(path: Path) -> Iterator[None]:
    """Adds what this process computes, on all its threads, to the seconds in a file, also when it is interrupted."""
    before = float(path.read_text()) if path.is_file() else 0.0
    begun = time.process_time()
    try:
        yield
    finally:
        path.parent.mkdir(parents=True, exist_ok=True)
        files.write_whole(path, str(before + time.process_time() - begun).encode())


# The table ---------------------------------------------------------------------------------------------------------


def averaged(network: str, seeds: Sequence[Row]) -> Row:
    """The mean of the rows of one network's seeds, and how far apart they lie."""
    means = [s["mean"] for s in seeds if s["mean"] is not None]
    return {
        **seeds[0],
        "network": title(network),
        "cpu_seconds": mean(s["cpu_seconds"] for s in seeds),
        "dice": {name: mean(s["dice"][name] for s in seeds) for name in seeds[0]["dice"]},
        "mean": mean(means),
        "sd": statistics.stdev(means) if len(means) > 1 else None,
        "matched": mean(s["matched"] for s in seeds),
    }


def mean(values: Iterable[float | None]) -> float | None:
    """The mean of the values that there are; None if there are none."""
    known = [value for value in values if value is not None]
    return statistics.fmean(known) if known else None


def table(rows: Sequence[Row], tissues: Sequence[str]) -> Iterator[str]:
    """Lines of Markdown: one row for each network, and below what they were measured on."""
    head = ["network", "parameters", "train CPU s", *tissues, "mean", "matched"]
    yield f"| {' | '.join(head)} |"
    yield f"|{'|'.join(['---'] + ['---:'] * (len(head) - 1))}|"
    for row in rows:
        counts = [f"{row['parameters']:,}", f"{row['cpu_seconds']:.0f}"]
        dice = [cell(row["dice"].get(name)) for name in tissues]
        spread = "" if row["sd"] is None else f" ± {cell(row['sd'])}"
        yield f"| {' | '.join([row['network'], *counts, *dice, cell(row['mean']) + spread, cell(row['matched'])])} |"
    if rows:
        sizes = ", ".join(sorted({"×".join(map(str, row["size"])) for row in rows}))
        yield ""
        yield f"Images of {sizes} voxels; {processor()}, threads: {torch.get_num_threads()}, torch {torch.__version__}."


def cell(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"


def processor() -> str:
    """The machine's processor, as far as it says."""
    with contextlib.suppress(OSError):
        if found := re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text()):
            return f"{found[1].strip()} ({os.cpu_count()} cores)"
    return f"{platform.processor() or platform.machine()} ({os.cpu_count()} cores)"


if __name__ == "__main__":
    sys.exit(main())
