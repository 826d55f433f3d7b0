"""Patients whose numbers lie far from those of the others in the same cohort."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from monai_deepgmm.mixture.spread import NORMAL_MAD

#: With fewer patients nobody is told apart; above this robust z-score a patient is.
PATIENTS, Z = 10, 3.0
#: Patients who are more alike than this, as a share, are taken to differ by so much.
LEAST_SPREAD = 0.05
#: Numbers of the whole ventricle that are compared.
VENTRICLE = {"lv_mass_g": "LV mass (g)", "thickness_mean_mm": "mean wall thickness (mm)"}


def warnings(rows: Sequence[Mapping[str, Any]]) -> dict[str, list[str]]:
    """Patient → ``W_OUTLIER`` for each number whose robust z-score is above 3.

    ``z = |v − median| / (1.4826 MAD)`` of the logarithm, over the patients who have the tissue: volumes spread by
    factors. A number that fewer than ten have, or that most of them share, tells nobody apart.

    Args:
        rows: of all patients; those that failed have no numbers.
    """
    numbers: dict[str, dict[str, float]] = {}
    for row in rows:
        for name, value in _numbers(row):
            numbers.setdefault(name, {})[str(row["patient"])] = value
    found: dict[str, list[str]] = {}
    for name, values in numbers.items():
        for patient, z, middle in _far(values):
            told = f"{name} is {values[patient]:.4g}, where the median of {len(values)} patients is {middle:.4g}"
            found.setdefault(patient, []).append(f"W_OUTLIER: {told} (robust z {z:.1f}); compare with the others")
    return found


def _numbers(row: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    """What is compared of one patient: each tissue's volume and the ventricle's mass and thickness, where above 0."""
    volumes = ((f"{line.get('tissue')} (ml)", line.get("volume_ml")) for line in row.get("measurements") or ())
    whole = row.get("ventricle") or {}
    for name, value in (*volumes, *((name, whole.get(key)) for key, name in VENTRICLE.items())):
        if isinstance(value, int | float) and value > 0:
            yield name, float(value)


def _far(values: Mapping[str, float]) -> Iterator[tuple[str, float, float]]:
    """Of the patients that lie far from the others: who, the z-score, the median."""
    if len(values) < PATIENTS:
        return
    logs = {patient: math.log(value) for patient, value in values.items()}
    middle = statistics.median(logs.values())
    spread = NORMAL_MAD * statistics.median(abs(v - middle) for v in logs.values())
    for patient, value in logs.items():
        if spread > 1e-9 and (z := abs(value - middle) / max(spread, LEAST_SPREAD)) > Z:
            yield patient, z, math.exp(middle)
