"""SHA-256 of every label map of a fixed set of patients, to see whether a change of the code has changed a result.

    python scripts/hash_labels.py OUT > before.tsv                     # phantoms of hearts and brains
    python scripts/hash_labels.py OUT --folder EMIDEC --folder BRAINS:brain:nonzero ...   # and folders of real scans
    diff before.tsv after.tsv

A folder is ``DIR[:PROTOCOL[:MASK]]``, segmented by the protocol's default method. Each line is the run, the patient and
the hash of the voxels' labels, whatever their file's compression. OUT is filled anew.
"""

from __future__ import annotations

import argparse
import hashlib
import shutil
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import nibabel as nib
import numpy as np
import runner

HEARTS = ("gmm", "svgmm", "deepg", "deepsvg", "anatomy", "cohort")
BRAIN = ["--protocol", "brain"]
BRAINS = {"pvgmm": [], "gmm": ["--method", "gmm"], "svgmm": ["--method", "svgmm", "--set", "n4=true"]}


def hashes(run: str, out: Path) -> Iterator[str]:
    """A line for each patient of a finished run."""
    for place in sorted(p for p in out.iterdir() if p.is_dir() and not p.name.startswith(".") and p.name != "model"):
        labels, found = place / f"{place.name}_dseg.nii.gz", "failed"
        if labels.is_file():
            found = hashlib.sha256(np.ascontiguousarray(np.asanyarray(nib.load(labels).dataobj)).tobytes()).hexdigest()
        yield f"{run}\t{place.name}\t{found}"


def main(argv: Sequence[str] | None = None) -> int:
    """Segments everything and prints the table; the exit code."""
    parser = runner.parser(__doc__)
    parser.add_argument("out", type=Path, metavar="OUT")
    parser.add_argument("--hearts", type=int, default=6, help="phantoms of hearts")
    parser.add_argument("--brains", type=int, default=3, help="phantoms of brains")
    parser.add_argument("--folder", action="append", default=[], metavar="DIR[:PROTOCOL[:MASK]]")
    parser.add_argument("--jobs", type=int, default=1)
    options = parser.parse_args(argv)
    return runner.ended("hash_labels", lambda: run(options))


def run(options: argparse.Namespace) -> None:
    """Every method on the phantoms, then the folders."""
    shutil.rmtree(options.out, ignore_errors=True)
    hearts, brains = options.out / "hearts", options.out / "brains"
    runner.deepgmm("phantom", hearts, "-n", options.hearts)
    runner.deepgmm("phantom", brains, "-n", options.brains, *BRAIN)
    runs = [(f"heart {name}", hearts, ["--method", name]) for name in HEARTS]
    runs += [(f"brain {name}", brains, [*BRAIN, *words]) for name, words in BRAINS.items()]
    for given in options.folder:
        folder, wanted, mask = [*given.split(":"), "", ""][:3]
        words = ["--protocol", wanted or "infarct", *(["--mask", mask] if mask else [])]
        runs.append((Path(folder).name, Path(folder), words))
    for number, (name, folder, words) in enumerate(runs):
        target = options.out / str(number)
        try:
            runner.deepgmm("segment", folder, target, "-q", "--jobs", options.jobs, *words)
        except runner.StageError as error:
            print(error, file=sys.stderr)
        if target.is_dir():
            print("\n".join(hashes(name, target)), flush=True)


if __name__ == "__main__":
    sys.exit(main())
