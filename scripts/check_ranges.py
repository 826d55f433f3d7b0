"""Where the numbers of finished results lie against the protocol's ranges, and how often something is flagged.

    deepgmm segment PATIENTS OUT; python scripts/check_ranges.py OUT [OUT …]

Prints, over all patients of each OUT, the least, the median and the greatest of every number that a range is given
for, and how many patients lie outside; then how many have each of the facts on coverage, an interval that reaches 0,
and each of the warnings. The tables of ``bundle/docs/measurements.md`` are made so.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import runner

WIDE_MM, FEW = 12.0, 4
#: Reasons to doubt a result that this script counts.
CODES = ("W_IMPLAUSIBLE", "W_COVERAGE")


def sidecars(out: Path) -> list[dict[str, Any]]:
    """Of every patient who has a result."""
    return [runner.read_json(path) for path in sorted(out.glob("*/*_dseg.json"))]


def numbers(told: Sequence[Mapping[str, Any]]) -> Iterator[tuple[str, list[float], Any, int]]:
    """Each number, what it is in every patient who has it, its range, and how many lie outside."""
    found: dict[str, list[Mapping[str, Any]]] = {}
    for one in (one for patient in told for one in patient["plausibility"]):
        name = f"{one['kind']} of {', '.join(one['of'])}" + (f" on {one['sequence']}" if "sequence" in one else "")
        found.setdefault(name, []).append(one)
    for name, those in found.items():
        values = [float(one["value"]) for one in those if one["value"] is not None]
        yield name, values, those[0]["range"], sum(not one["plausible"] for one in those)


def facts(patient: Mapping[str, Any]) -> Iterator[str]:
    """What of one patient might be a reason to doubt."""
    about = patient["coverage"]
    yield from ["the mask lies on an end slice"] * (about["on_first_slice"] or about["on_last_slice"])
    yield from [f"fewer than {FEW} slices"] * (about["slices"] < FEW)
    yield from [f"slices more than {WIDE_MM:g} mm apart"] * (about["spacing_mm"] > WIDE_MM)
    yield from ["gaps"] * bool(about["gaps"])
    volumes = patient["uncertainty"]["volumes"].values()
    yield from ["an interval reaches 0"] * any(v["low_ml"] == 0 and v["volume_ml"] > 0 for v in volumes)
    yield from (code for code in CODES if any(w.startswith(code) for w in patient["warnings"]))


def lines(told: Sequence[Mapping[str, Any]]) -> Iterable[str]:
    """What is printed of one OUT."""
    yield "| number | least | median | greatest | range | outside |\n|---|---:|---:|---:|---|---:|"
    for name, values, ends, outside in numbers(told):
        middle = [f"{v:.3g}" for v in (min(values), float(np.median(values)), max(values))]
        yield f"| {name} | {' | '.join(middle)} | {ends[0]} to {ends[1]} | {outside} of {len(values)} |"
    counts = Counter(fact for patient in told for fact in facts(patient))
    yield from (f"{fact}: {count} of {len(told)}" for fact, count in counts.items())


if __name__ == "__main__":
    for place in sys.argv[1:]:
        found = sidecars(Path(place))
        print(f"\n{place}: {len(found)} patients", *lines(found), sep="\n")
