"""How far a 90 % interval of a volume must reach: measured on phantoms of two seeds, each checked on the other's.

    python scripts/calibrate_intervals.py OUT [--methods anatomy svgmm cohort pvgmm] [--hearts 40] [--brains 24]

Each method segments the same phantoms. What the reference volume has more than the found one, divided by the estimated
standard deviation, is a number per patient and tissue; an interval reaches from its lower to its upper percentile.
Printed is the share of each seed's volumes that the intervals of the other seed hold, and how wide these are.
``--write`` puts the reaches over both seeds' patients into the package. OUT keeps every result: a second run goes on
where one stopped.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import runner
import yaml

import monai_deepgmm.results
from monai_deepgmm import protocol as protocols
from monai_deepgmm.errors import StudyError
from monai_deepgmm.images import labels, nifti
from monai_deepgmm.patients import discovery
from monai_deepgmm.results import uncertainty

TABLE = Path(monai_deepgmm.results.__file__).parent / "interval_calibration.yaml"
#: Method → the protocol whose phantoms it is calibrated on.
PROTOCOLS = {"anatomy": "infarct", "svgmm": "infarct", "gmm": "infarct", "cohort": "infarct", "pvgmm": "brain"}
SEEDS = (100, 200)


class Volume(NamedTuple):
    """One tissue of one patient, in ml: as the reference has it, as found, and its standard deviation."""

    reference_ml: float
    found_ml: float
    sd_ml: float
    mask_ml: float


def volumes(method: str, seed: int, number: int, out: Path) -> dict[str, list[Volume]]:
    """The volumes of each tissue in every phantom of a seed."""
    wanted = protocols.load(PROTOCOLS[method])
    data, results = out / f"{wanted.name}-{seed}", out / f"{wanted.name}-{seed}-{method}"
    runner.phantoms(data, "-n", number, "--seed", seed, "--protocol", wanted.name)
    runner.deepgmm("segment", data, results, "--protocol", wanted.name, "--method", method, "-q")
    found: dict[str, list[Volume]] = {t.name: [] for t in wanted.tissues}
    for study in discovery.find(data, wanted).studies:
        place = results / study.patient / f"{study.patient}_dseg.json"
        sidecar = runner.read_json(place)
        try:
            reference = nifti.read(place.with_suffix("").with_suffix(".nii.gz"))
            marked = labels.read(study, wanted, sidecar["sequences"], like=reference).labels
        except StudyError as error:
            print(f"left out: {study.patient}: {error}", file=sys.stderr)
            continue
        told = sidecar["uncertainty"]["volumes"]
        mask_ml = sum(one["volume_ml"] for one in told.values())
        for name, one in told.items():
            count = int((marked == wanted.tissue(name).index).sum()) * reference.voxel_ml
            found[name].append(Volume(count, one["volume_ml"], one["sd_ml"], mask_ml))
    # Of a tissue that no phantom has, nothing can be said.
    return {name: rows for name, rows in found.items() if any(row.reference_ml for row in rows)}


def reaches(rows: Sequence[Volume]) -> tuple[float, float]:
    """How far below and above a volume its interval must reach, in standard deviations.

    Between the i-th and the j-th of n values lies a further one with probability (j − i) / (n + 1): of few values, more
    must be held than of further ones.
    """
    outside = (1 - min(uncertainty.LEVEL * (len(rows) + 1) / max(len(rows) - 1, 1), 1)) / 2
    values = [(r.reference_ml - r.found_ml) / r.sd_ml for r in rows]
    low, high = np.quantile(values, (outside, 1 - outside))
    return round(float(low), 3), round(float(high), 3)


def checked(rows: Sequence[Volume], reach: tuple[float, float]) -> tuple[float, float]:
    """The share of volumes that their intervals hold, and the median width as a share of the found volume."""
    ends = [uncertainty.interval(r.found_ml, r.sd_ml, reach, mask_ml=r.mask_ml) for r in rows]
    lows, highs = (np.array([getattr(e, key) for e in ends], dtype=float) for key in ("low_ml", "high_ml"))
    true = np.array([r.reference_ml for r in rows])
    width = (highs - lows) / np.maximum([r.found_ml for r in rows], 1e-9)
    return float(((lows <= true) & (true <= highs)).mean()), float(np.median(width))


def main(argv: Sequence[str] | None = None) -> int:
    """Calibrates, checks, prints and, if asked to, writes."""
    parser = runner.parser(__doc__)
    parser.add_argument("out", type=Path, metavar="OUT")
    parser.add_argument("--methods", nargs="+", choices=PROTOCOLS, default=["anatomy", "svgmm", "cohort", "pvgmm"])
    parser.add_argument("--hearts", type=int, default=40, help="phantoms of each seed")
    parser.add_argument("--brains", type=int, default=24, help="phantoms of each seed")
    parser.add_argument("--write", action="store_true", help="put the reaches into the package")
    arguments = parser.parse_args(argv)
    table = yaml.safe_load(TABLE.read_text(encoding="utf-8")) or {}
    print("| method | tissue | reach, sd | held on the other seed | median widths |\n|---|---|---:|---:|---:|")
    for method in arguments.methods:
        number = arguments.hearts if PROTOCOLS[method] == "infarct" else arguments.brains
        first, second = (volumes(method, seed, number, arguments.out) for seed in SEEDS)
        entry, held = {name: reaches(first[name] + second[name]) for name in first}, []
        for name, reach in entry.items():
            ways = ((first[name], second[name]), (second[name], first[name]))
            shares, widths = zip(*(checked(other, reaches(one)) for one, other in ways), strict=True)
            held += shares
            told = (", ".join(f"{value:.0%}" for value in values) for values in (shares, widths))
            print(f"| `{method}` | {name} | {reach[0]:+.2f} {reach[1]:+.2f} | {' | '.join(told)} |", flush=True)
        print(f"| `{method}` | all | | {np.mean(held):.0%} | |")
        table.setdefault(PROTOCOLS[method], {})[method] = {name: list(reach) for name, reach in entry.items()}
    if arguments.write:
        comments = [line for line in TABLE.read_text(encoding="utf-8").splitlines() if line.startswith("#")]
        text = yaml.safe_dump(table, default_flow_style=None, sort_keys=True)
        TABLE.write_text("\n".join([*comments, text]), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
