"""What a mask of an organ looks like, as far as a protocol says: how large, and whether an ellipse."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

#: Least possible, least usual, most usual, most possible.
Limits = tuple[float, float, float, float]


@dataclass(frozen=True)
class MaskShape:
    """What a protocol expects of a mask.

    Attributes:
        diameter_mm: of the disc that is as large as the mask's largest slice.
        volume_ml: of all of it.
        ellipses: whether its slices are filled ellipses.
        no_skull: whether the organ lies in a skull that must not be in the mask.
    """

    diameter_mm: Limits | None = None
    volume_ml: Limits | None = None
    ellipses: bool = False
    no_skull: bool = False

    def as_json(self) -> dict[str, Any]:
        """As it stands in a protocol's file."""
        found = {"diameter_mm": self.diameter_mm, "volume_ml": self.volume_ml}
        return {key: None if v is None else list(v) for key, v in found.items()} | {
            "ellipses": self.ellipses,
            "no_skull": self.no_skull,
        }


def parse(raw: Mapping[str, Any]) -> MaskShape:
    """Reads ``mask_shape`` of a protocol's file.

    Raises:
        ValueError: a limit is not four numbers that do not fall.
    """
    return MaskShape(
        _limits("diameter_mm", raw.get("diameter_mm")),
        _limits("volume_ml", raw.get("volume_ml")),
        bool(raw.get("ellipses", False)),
        bool(raw.get("no_skull", False)),
    )


def _limits(key: str, raw: Sequence[float] | None) -> Limits | None:
    if raw is None:
        return None
    found = [float(value) for value in raw]
    if len(found) != 4 or found != sorted(found) or not found[0] >= 0:
        raise ValueError(f"mask_shape: {key} {raw} (four numbers that do not fall)")
    return found[0], found[1], found[2], found[3]
