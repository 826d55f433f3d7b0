"""A stack of DICOM images: what one NIfTI file is elsewhere."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple, Self

Point = tuple[float, float, float]


class Slice(NamedTuple):
    """One image: a file, or one frame of it.

    Attributes:
        file: where it is stored.
        frame: of a file with several, counted from 0.
        position_mm: the centre of its first pixel, in DICOM's coordinates (left, posterior, head).
        trigger_ms: the time since the R wave; None where the header does not tell.
        slope: intensity = slope · stored value + intercept.
        intercept: see ``slope``.
    """

    file: Path
    frame: int
    position_mm: Point
    trigger_ms: float | None = None
    slope: float = 1.0
    intercept: float = 0.0


@dataclass(frozen=True)
class Stack:
    """Parallel slices, one behind the other, at one time or at several.

    Attributes:
        name: the series' number, as messages and sidecars call it; nothing else of the header.
        times: for each time all slices, in the order of their places along the normal.
        rows: of each slice.
        columns: likewise.
        across: the direction of a row, along which the column's number grows.
        down: the direction of a column.
        spacing_mm: between columns, and between rows.
        thickness_mm: between slices, where there is one only.
        cine: the first time is meant where nobody says which.
        notes: what is odd but could be understood; each begins with its code.
    """

    name: str
    times: tuple[tuple[Slice, ...], ...]
    rows: int
    columns: int
    across: Point
    down: Point
    spacing_mm: tuple[float, float]
    thickness_mm: float
    cine: bool = False
    notes: tuple[str, ...] = ()

    @property
    def shape(self) -> tuple[int, ...]:
        """(X, Y, Z), or (X, Y, Z, T) with several times."""
        whole = (self.columns, self.rows, len(self.times[0]), len(self.times))
        return whole if len(self.times) > 1 else whole[:3]

    @property
    def slices(self) -> tuple[Slice, ...]:
        """All slices of all times."""
        return tuple(one for slices in self.times for one in slices)

    def with_whole_paths(self) -> Self:
        """The same for a process with another working directory."""
        whole = {one.file: Path(os.path.abspath(one.file)) for one in self.slices}
        return replace(self, times=tuple(tuple(s._replace(file=whole[s.file]) for s in t) for t in self.times))


class Series(NamedTuple):
    """What was made of one stack of a DICOM study, for whoever looks at what was found.

    Attributes:
        name: the series' number.
        sequence: of the protocol; "" where it is left out.
        why: the kind, or why it is left out.
        slices: how many places.
        times: how many images at each.
        text: what the scanner's operator called it; it may hold anything, and goes to the terminal only.
    """

    name: str
    sequence: str
    why: str
    slices: int
    times: int
    text: str
