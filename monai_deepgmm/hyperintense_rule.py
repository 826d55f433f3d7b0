"""How a tissue is found that is no part of a mixture: by what a protocol says of its regions."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Hyperintense:
    """A tissue that is no part of a mixture but whatever is too bright for the others, and lies within one of them.

    Brightness is in robust standard deviations of ``brighter_than`` above its median (``methods.hyperintense``).

    Attributes:
        sequence: the one that shows it.
        brighter_than: the brightest of the other tissues there.
        inside: the tissue that surrounds it.
        seed: how bright a region is somewhere.
        least: how bright all of it is.
        share: of the surrounding voxels of both tissues, at least so many are of ``inside``.
    """

    sequence: str
    brighter_than: str
    inside: str
    seed: float
    least: float
    share: float


def parse(raw: Mapping[str, Any], sequences: tuple[str, ...]) -> Hyperintense:
    """Reads ``hyperintense`` of a tissue in a protocol's file.

    Raises:
        ValueError: the sequence is unknown, or a number makes no sense.
    """
    seed, least, share = (float(raw[key]) for key in ("seed", "least", "share"))
    if raw["sequence"] not in sequences or not (seed >= least and 0 <= share <= 1):
        raise ValueError(f"hyperintense: a sequence of {', '.join(sequences)}, seed ≥ least, a share from 0 to 1: it")
    return Hyperintense(raw["sequence"], raw["brighter_than"], raw["inside"], seed, least, share)
