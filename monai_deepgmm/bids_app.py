"""The command ``deepgmm-bids``: ``deepgmm`` with the options that a BIDS App has."""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path

from monai_deepgmm import cli, protocol
from monai_deepgmm.errors import USAGE, UsageError
from monai_deepgmm.patients import discovery

#: What PyPI's ``bids-validator-deno`` installs.
VALIDATOR = "bids-validator-deno"
#: Of the parts of an id, in their order.
PREFIXES = {"participant": "sub-", "session": "ses-"}


def main(argv: Sequence[str] | None = None) -> int:
    """Segments participants, or builds the tables and pages of them all; returns the exit code of ``deepgmm``."""
    arguments, further = parser().parse_known_args(argv)
    try:
        if arguments.analysis_level == "group":
            if further:
                raise UsageError(f"group takes no option {further[0]}: it only builds tables and pages again")
            return cli.main(["report", str(arguments.output_dir)])
        if not arguments.skip_bids_validation:
            _validate(arguments.bids_dir)
        patients = _patients(arguments)
    except UsageError as error:
        print(f"deepgmm-bids: {error}", file=sys.stderr)
        return USAGE
    chosen = ["--patients", *patients] if patients else []
    asked = ["--layout", "bids", "--protocol", arguments.protocol, "--jobs", str(arguments.n_cpus), *chosen]
    return cli.main(["segment", str(arguments.bids_dir), str(arguments.output_dir), *asked, *further])


def parser() -> argparse.ArgumentParser:
    """The options of a BIDS App."""
    made = argparse.ArgumentParser(
        prog="deepgmm-bids",
        description="Segment a BIDS data set without training labels. Research use only, not a medical device.",
        epilog="participant takes every other option of deepgmm segment, too (--method, --mask, --set …).",
        allow_abbrev=False,
    )
    made.add_argument("--version", action="version", version=f"deepgmm-bids {metadata.version('monai-deepgmm')}")
    made.add_argument("bids_dir", type=Path, help="the data set; masks and results may lie in its derivatives/")
    made.add_argument("output_dir", type=Path, help="the folder for the results")
    levels = "participant: segment; group: tables and pages of all that is in output_dir"
    made.add_argument("analysis_level", choices=["participant", "group"], help=levels)
    for name, prefix in PREFIXES.items():
        spellings = (f"--{name}-label", f"--{name}_label")
        made.add_argument(
            *spellings, nargs="+", default=[], metavar="LABEL", help=f"only these, with or without {prefix}"
        )
    made.add_argument(
        "--n-cpus", "--n_cpus", "--nprocs", type=int, default=1, metavar="N", help="patients side by side"
    )
    made.add_argument("--protocol", default="infarct", help=f"{', '.join(protocol.names())}, or a YAML file")
    skip = ("--skip-bids-validation", "--skip_bids_validator")
    made.add_argument(*skip, action="store_true", help=f"do not ask {VALIDATOR}, where that is installed")
    return made


def _patients(arguments: argparse.Namespace) -> list[str]:
    """The ids of the participants and sessions that were asked for; none: all.

    Raises:
        UsageError: the data set has no such participant, or the participants no such session.
    """
    if not (arguments.participant_label or arguments.session_label):
        return []
    found = discovery.find(arguments.bids_dir, protocol.load(arguments.protocol), layout="bids")
    ids = [study.patient for study in found.studies]
    for place, (name, prefix) in enumerate(PREFIXES.items()):
        wanted = {prefix + label.removeprefix(prefix) for label in getattr(arguments, f"{name}_label")}
        parts = {i: (*i.split("_"), "")[place] for i in ids}  # sub-01_ses-A, or sub-01 alone
        if missing := sorted(wanted - {*parts.values()}):
            there = ", ".join(sorted({*parts.values()} - {""})) or "none"
            raise UsageError(f"--{name}-label: there is no {missing[0]}; there are {there}")
        ids = [i for i in ids if not wanted or parts[i] in wanted]
    return ids


def _validate(folder: Path) -> None:
    """Asks the validator, where there is one.

    Raises:
        UsageError: it found errors.
    """
    if shutil.which(VALIDATOR) is None or not folder.is_dir():
        return
    asked = [VALIDATOR, "--ignoreWarnings", str(folder)]
    done = subprocess.run(asked, capture_output=True, text=True, check=False)
    if done.returncode:
        remedy = f"run {VALIDATOR} {folder} to see them, or go on with --skip-bids-validation"
        raise UsageError(f"{folder.name} is no valid BIDS data set: {remedy}")


if __name__ == "__main__":
    sys.exit(main())
