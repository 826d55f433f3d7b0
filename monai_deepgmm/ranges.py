"""What a result must lie within to be plausible: ranges of volumes, shares, sizes and contrasts, from a protocol."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

Kind = Literal["volume_ml", "percent", "ratio", "diameter_mm", "thickness_mm", "contrast_sd"]


@dataclass(frozen=True)
class Range:
    """One number of a result, and where it must lie.

    Attributes:
        kind: ``volume_ml`` of all tissues together; ``percent`` of the first, of the protocol's denominator; ``ratio``
            of the volumes of two; ``diameter_mm`` of the disc whose area all together have in their largest slice;
            ``thickness_mm`` of the wall that they are, the mean along rays from the middle of the cavity;
            ``contrast_sd``, how many standard deviations of the second the first is brighter in ``sequence``.
        tissues: their names.
        low: the least plausible number.
        high: the greatest; infinite where there is none.
        sequence: of a contrast.
    """

    kind: Kind
    tissues: tuple[str, ...]
    low: float
    high: float
    sequence: str | None = None

    def holds(self, value: float) -> bool:
        """Whether the number is plausible."""
        return self.low <= value <= self.high

    def as_yaml(self) -> dict[str, Any]:
        """As ``parse`` reads it."""
        ends = [end if math.isfinite(end) else None for end in (self.low, self.high)]
        found = {"kind": self.kind, "of": list(self.tissues), "range": ends}
        return found if self.sequence is None else found | {"sequence": self.sequence}


def parse(raw: Sequence[Mapping[str, Any]], tissues: Sequence[str], sequences: Sequence[str]) -> tuple[Range, ...]:
    """The ranges of a protocol's YAML.

    Args:
        raw: content that the table of protocols has let through.
        tissues: the names that the protocol has.
        sequences: likewise.

    Raises:
        ValueError: a range does not fit the protocol; the message says which and what is expected.
    """
    return tuple(_range(one, tissues, sequences) for one in raw)


def _range(raw: Mapping[str, Any], tissues: Sequence[str], sequences: Sequence[str]) -> Range:
    kind, names, sequence = raw["kind"], raw["of"], raw.get("sequence")
    number = {"percent": 1, "ratio": 2, "contrast_sd": 2}.get(kind, len(names))
    if set(names) - set(tissues) or number != len(names):
        raise ValueError(f"plausible: of {names} for {kind}: expected {number} of {', '.join(tissues)}")
    if (kind == "contrast_sd") != (sequence is not None) or sequence not in (None, *sequences):
        raise ValueError(f"plausible: sequence {sequence} for {kind}: a contrast has one of {', '.join(sequences)}")
    low, high = raw["range"]
    found = Range(kind, tuple(names), _end(low, -math.inf), _end(high, math.inf), sequence)
    if not found.low < found.high:
        raise ValueError(f"plausible: range {raw['range']} of {kind}: expected the least, then the greatest")
    return found


def _end(value: float | None, absent: float) -> float:
    return absent if value is None else float(value)
