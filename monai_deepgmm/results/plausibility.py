"""Whether a result can be true: its numbers against the ranges of the protocol."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

from monai_deepgmm.ranges import Range
from monai_deepgmm.results import coverage, wall
from monai_deepgmm.results.numbers import Numbers
from monai_deepgmm.results.segmentation import Segmentation

#: Of an organ of which fewer slices hold the mask, no volume is the organ's.
WHOLE = 3
#: What is said of each kind of number.
WORDS = {
    "volume_ml": "the volume of {all} is {value} ml",
    "percent": "{first} is {value} % of the {whole}",
    "ratio": "{first} is {value} times {last}",
    "diameter_mm": "{all} have a diameter of {value} mm",
    "thickness_mm": "the wall ({all}) is on average {value} mm thick",
    "contrast_sd": "{first} is {value} standard deviations of {last} brighter than it on {sequence}",
}


class Finding(NamedTuple):
    """One number against its range.

    Attributes:
        range: where it must lie.
        value: what it is.
    """

    range: Range
    value: float

    @property
    def plausible(self) -> bool:
        """Whether it lies there."""
        return self.range.holds(self.value)


def findings(segmentation: Segmentation, numbers: Numbers) -> list[Finding]:
    """Every number that the protocol gives a range for, as far as the patient has it."""
    close = segmentation.cropped()
    known = [(one, _value(one, close, numbers)) for one in segmentation.protocol.plausible]
    return [Finding(one, value) for one, value in known if value is not None]


def facts(found: list[Finding]) -> list[dict[str, Any]]:
    """For the sidecar: each number, its range, and whether it lies there."""
    return [
        one.range.as_yaml()
        | {"value": round(one.value, 4) if math.isfinite(one.value) else None, "plausible": one.plausible}
        for one in found
    ]


def about(segmentation: Segmentation, found: list[Finding]) -> Iterator[str]:
    """A warning for each number that does not lie in its range."""
    for one in found:
        if not one.plausible:
            yield f"W_IMPLAUSIBLE: {_told(one, segmentation)}; check the mask, the sequences and the header"


def _told(found: Finding, segmentation: Segmentation) -> str:
    asked, visible = found.range, {t.name for t in segmentation.tissues}
    tissues = [name for name in asked.tissues if name in visible]
    told = WORDS[asked.kind].format(
        all=" + ".join(tissues),
        first=tissues[0],
        last=tissues[-1],
        value=f"{found.value:.3g}",
        whole=segmentation.protocol.percent_name,
        sequence=asked.sequence,
    )
    return f"{told}; plausible is {_expected(asked)}"


def _expected(asked: Range) -> str:
    if math.isinf(asked.high):
        return f"more than {asked.low:g}"
    return f"less than {asked.high:g}" if math.isinf(asked.low) else f"{asked.low:g} to {asked.high:g}"


def _value(asked: Range, segmentation: Segmentation, numbers: Numbers) -> float | None:
    """The number; None where the patient's sequences do not show it."""
    rows = {row.tissue: row for row in numbers.tissues}
    if asked.kind == "percent":
        row = rows.get(asked.tissues[0])
        return None if row is None else row.percent
    if asked.kind == "ratio":
        if not set(asked.tissues) <= set(rows):
            return None
        first, second = (rows[name].volume_ml for name in asked.tissues)
        return first / second if second else math.inf
    if asked.kind == "volume_ml":
        if segmentation.protocol.unit == "slice" and coverage.facts(segmentation)["slices"] < WHOLE:
            return None
        return sum(rows[name].volume_ml for name in asked.tissues if name in rows)
    if asked.kind == "diameter_mm":
        organ, axis = segmentation.where(*asked.tissues), segmentation.slice_axis
        return wall.diameter_mm(organ, segmentation.reference.affine, axis) if organ.any() else None
    if asked.kind == "thickness_mm":
        return None if numbers.ventricle is None else numbers.ventricle.thickness_mean_mm
    return _contrast(asked, segmentation)


def _contrast(asked: Range, segmentation: Segmentation) -> float | None:
    """How many standard deviations of the second tissue the first is brighter."""
    image = segmentation.images.get(asked.sequence or "")
    first, second = (segmentation.where(name) for name in asked.tissues)
    if image is None or not (first.any() and second.any()):
        return None
    reference = image[second].astype(float)
    spread = float(reference.std())
    return float(image[first].mean() - reference.mean()) / spread if spread > 0 else None
