"""Where a patient's volumes lie among those of the cohort: one line of dots for each tissue, as SVG paths."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from monai_deepgmm.results.markup import is_number

WIDTH, HEIGHT = 200.0, 16.0
CROWD = 60


class Strip(NamedTuple):
    """One tissue's line.

    Attributes:
        tissue: its name.
        unit: of the values.
        dots: an SVG path, a dot for each patient.
        low: the least value, at the left end.
        high: the greatest, at the right end.
        median_x: where the median lies.
        x: where this patient lies; None for a patient without the value, or where none is marked.
        value: this patient's.
        crowded: whether the dots have to be small.
    """

    tissue: str
    unit: str
    dots: str
    low: float
    high: float
    median_x: float
    x: float | None
    value: float | None
    crowded: bool


def values_by_tissue(measurements: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, float]]:
    """Tissue → patient → ml."""
    found: dict[str, dict[str, float]] = {}
    for m in measurements:
        if is_number(m.get("volume_ml")):
            found.setdefault(str(m["tissue"]), {})[str(m["patient"])] = float(m["volume_ml"])
    return found


def strips(values: Mapping[str, Mapping[str, float]], patient: str | None = None) -> list[Strip]:
    """A line for each tissue that three patients have; fewer are no distribution."""
    return [_strip(tissue, v, patient) for tissue, v in values.items() if len(v) > 2]


def _strip(tissue: str, values: Mapping[str, float], patient: str | None) -> Strip:
    low, high = min(values.values()), max(values.values())
    span = high - low or 1.0

    def x(value: float) -> float:
        return round(4 + (WIDTH - 8) * (value - low) / span, 1)

    # Dots that would cover each other are moved up and down in turn.
    places = sorted(x(v) for v in values.values())
    dots = "".join(f"M{place:g} {HEIGHT / 2 + (k % 5 - 2) * 2.4:g}h0" for k, place in enumerate(places))
    mine = values.get(patient) if patient is not None else None
    middle = x(statistics.median(values.values()))
    return Strip(tissue, "ml", dots, low, high, middle, None if mine is None else x(mine), mine, len(values) > CROWD)
