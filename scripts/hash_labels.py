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
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import nibabel as nib
import numpy as np

#: Run → what the command is given besides the folders.
HEARTS = {
    "heart gmm": ["--method", "gmm"],
    "heart svgmm": ["--method", "svgmm"],
    "heart deepg": ["--method", "deepg"],
    "heart deepsvg": ["--method", "deepsvg"],
    "heart anatomy": ["--method", "anatomy"],
    "heart cohort": ["--method", "cohort"],
}
BRAINS = {
    "brain pvgmm": ["--protocol", "brain"],
    "brain gmm": ["--protocol", "brain", "--method", "gmm"],
    "brain svgmm": ["--protocol", "brain", "--method", "svgmm", "--set", "n4=true"],
}


def deepgmm(*words: str | Path) -> int:
    """One command, in a process of its own; its words go to the terminal's error stream."""
    return subprocess.run([sys.executable, "-m", "monai_deepgmm", *map(str, words)], stdout=sys.stderr).returncode


def hashes(run: str, out: Path) -> Iterator[str]:
    """A line for each patient of a finished run; a patient without labels has none."""
    for place in sorted(p for p in out.iterdir() if p.is_dir() and not p.name.startswith(".") and p.name != "model"):
        labels = place / f"{place.name}_dseg.nii.gz"
        found = "failed"
        if labels.is_file():
            found = hashlib.sha256(np.ascontiguousarray(np.asanyarray(nib.load(labels).dataobj)).tobytes()).hexdigest()
        yield f"{run}\t{place.name}\t{found}"


def main(argv: Sequence[str] | None = None) -> int:
    """Segments everything and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, metavar="OUT")
    parser.add_argument("--hearts", type=int, default=6, help="phantoms of hearts")
    parser.add_argument("--brains", type=int, default=3, help="phantoms of brains")
    parser.add_argument("--folder", action="append", default=[], metavar="DIR[:PROTOCOL[:MASK]]")
    parser.add_argument("--jobs", type=int, default=1)
    arguments = parser.parse_args(argv)
    shutil.rmtree(arguments.out, ignore_errors=True)
    hearts, brains = arguments.out / "hearts", arguments.out / "brains"
    deepgmm("phantom", hearts, "-n", str(arguments.hearts))
    deepgmm("phantom", brains, "-n", str(arguments.brains), "--protocol", "brain")
    runs = [(name, hearts, words) for name, words in HEARTS.items()]
    runs += [(name, brains, words) for name, words in BRAINS.items()]
    for given in arguments.folder:
        folder, _, rest = given.partition(":")
        name, _, mask = rest.partition(":")
        words = ["--protocol", name or "infarct", *(["--mask", mask] if mask else [])]
        runs.append((Path(folder).name, Path(folder), words))
    for number, (run, folder, words) in enumerate(runs):
        target = arguments.out / str(number)
        deepgmm("segment", folder, target, "-q", "--jobs", str(arguments.jobs), *words)
        print("\n".join(hashes(run, target)), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
