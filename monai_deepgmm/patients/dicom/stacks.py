"""From the images of a DICOM study to stacks: what lies parallel, one behind the other, belongs together."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from monai_deepgmm.patients.dicom.header import Frame, Header
from monai_deepgmm.patients.stack import Slice, Stack
from monai_deepgmm.patients.study import Problem

#: Places that differ by less are one; directions likewise.
_SAME_MM, _SAME_DIRECTION, _SAME_SPACING = 0.05, 1e-3, 1e-3
#: How far gaps may lie from their median, as a share of it: without a word, and with one.
_EVEN, _UNEVEN = 0.01, 0.1


class Candidate(NamedTuple):
    """A stack that may be a sequence's, or what stands in its place.

    Attributes:
        name: the series' number; ``7.2`` for the second stack of a series, ``7-16`` for one of several series.
        numbers: of its series.
        descriptions: of its series.
        protocol: what the scan was called.
        kind: the image type and component.
        text: for the terminal.
        slices: how many places.
        times: how many images at each place, at most.
        modality: such as MR.
        no_image: why it is no image of a stack; "" where it is.
        problem: why it cannot be read; None where it can be tried.
        stack: None with ``no_image`` or a problem of place.
        frame_of_reference: the UID of its coordinates.
    """

    name: str
    numbers: tuple[int, ...]
    descriptions: tuple[str, ...]
    protocol: str
    kind: tuple[str, ...]
    text: str
    slices: int
    times: int
    modality: str
    no_image: str = ""
    problem: Problem | None = None
    stack: Stack | None = None
    frame_of_reference: str = ""


@dataclass
class _Group:
    """Images of one series (or, joined, of several) with the same grid but for their place."""

    first: Header
    frame: Frame
    images: list[tuple[Header, Frame]] = field(default_factory=list)

    def normal(self) -> NDArray[np.float64]:
        found: NDArray[np.float64] = np.cross(self.frame.across, self.frame.down)
        return found / np.linalg.norm(found)

    def depths(self) -> NDArray[np.float64]:
        """How far along the normal each image lies, mm."""
        found: NDArray[np.float64] = np.array([f.position_mm for _, f in self.images], dtype=float) @ self.normal()
        return found

    def places(self) -> list[list[tuple[Header, Frame]]]:
        """The images by place along the normal, those of one place in the order of time."""
        depths = self.depths()
        found: list[list[tuple[Header, Frame]]] = []
        before = None
        for index in np.argsort(depths, kind="stable"):
            if before is None or depths[index] - before > _SAME_MM:
                found.append([])
                before = depths[index]
            found[-1].append(self.images[index])
        for place in found:
            place.sort(key=lambda image: (image[1].trigger_ms or 0.0, *image[1].order))
        return found

    def fits(self, header: Header, frame: Frame) -> bool:
        """Whether an image has the same grid but for its place, in the same coordinates."""
        mine, other = self.frame, frame
        turned = np.abs(np.subtract((*mine.across, *mine.down), (*other.across, *other.down))).max()
        stored = self.first.stored
        return bool(
            turned < _SAME_DIRECTION
            and np.allclose(mine.spacing_mm, other.spacing_mm, rtol=_SAME_SPACING)
            and (stored.rows, stored.columns) == (header.stored.rows, header.stored.columns)
            and self.first.frame_of_reference == header.frame_of_reference
            and (mine.kind, mine.echo) == (other.kind, other.echo)
        )


def candidates(headers: Sequence[Header]) -> tuple[Candidate, ...]:
    """All stacks of one study, and what else its series hold, sorted by the series' number.

    Args:
        headers: of all its files, or of those series that are meant.
    """
    groups: list[_Group] = []
    others: dict[str, list[Header]] = {}
    for header in sorted(_once(headers), key=lambda h: (h.number, h.series, h.frames[0].order if h.frames else ())):
        if header.no_image or header.colour or not header.placed:
            others.setdefault(header.series, []).append(header)
            continue
        for frame in header.frames:
            group = next((g for g in groups if g.first.series == header.series and g.fits(header, frame)), None)
            if group is None:
                group = _Group(header, frame)
                groups.append(group)
            group.images.append((header, frame))
    joined = [(group, _name(group)) for group in _joined(groups)]
    found = [*_named([(g, n) for g, n in joined], others), *(_unusable(o, groups) for o in others.values())]
    return tuple(sorted((c for c in found if c is not None), key=lambda c: (c.numbers, c.name)))


def _once(headers: Iterable[Header]) -> Iterable[Header]:
    """Without copies of the same image in another folder."""
    seen: set[tuple[object, ...]] = set()
    for header in headers:
        frame = header.frames[0] if header.frames else None
        key = (header.uid or header.file, header.series, frame and (frame.position_mm, frame.order))
        if key not in seen:
            seen.add(key)
            yield header


# Several series, one stack -------------------------------------------------------------------------------------------


def _joined(groups: Sequence[_Group]) -> list[_Group]:
    """The groups, of which those of one place each are brought together: each slice of such a stack is a series."""
    found: list[_Group] = []
    for group in groups:
        alike = None
        if _is_single(group):
            alike = next((g for g in found if _is_single_made(g) and _alike(g, group)), None)
        if alike is None:
            found.append(_Group(group.first, group.frame, [*group.images]))
        else:
            alike.images += group.images
    return found


def _is_single(group: _Group) -> bool:
    depths = group.depths()
    return bool(np.ptp(depths) <= _SAME_MM)


def _is_single_made(group: _Group) -> bool:
    """Whether every series of a group has one place."""
    by_series: dict[str, list[float]] = {}
    for (header, _), depth in zip(group.images, group.depths(), strict=True):
        by_series.setdefault(header.series, []).append(float(depth))
    return all(max(depths) - min(depths) <= _SAME_MM for depths in by_series.values())


def _alike(mine: _Group, other: _Group) -> bool:
    same_words = all(
        _wording(getattr(mine.first, name)) == _wording(getattr(other.first, name))
        for name in ("description", "protocol")
    )
    return same_words and mine.first.series != other.first.series and mine.fits(other.first, other.frame)


def _wording(text: str) -> str:
    """A description without the number of the slice at its end."""
    return re.sub(r"[\W_]*(sl(ice)?|pos)?[\W_]*\d+$", "", text.casefold())


# Names ---------------------------------------------------------------------------------------------------------------


def _name(group: _Group) -> str:
    numbers = sorted({header.number for header, _ in group.images})
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ",".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs)


def _named(joined: Sequence[tuple[_Group, str]], others: dict[str, list[Header]]) -> list[Candidate]:
    """Candidates, numbered where several stacks would bear one name."""
    times, count = Counter(name for _, name in joined), Counter[str]()
    found = []
    for group, name in joined:
        count[name] += 1
        title = name if times[name] == 1 else f"{name}.{count[name]}"
        series = {header.series for header, _ in group.images}
        beside = [h for uid in series for h in others.get(uid, ()) if not (h.placed or h.no_image or h.colour)]
        found.append(_candidate(group, title, beside))
    return found


# One stack -----------------------------------------------------------------------------------------------------------


def _candidate(group: _Group, name: str, placeless: Sequence[Header]) -> Candidate:
    places = group.places()
    times = min(len(place) for place in places)
    problem, notes = _problem(group, places, name, placeless)
    first, frame = group.first, group.frame
    stack = Stack(
        name=f"series {name}",
        times=tuple(tuple(_slice(*place[t]) for place in places) for t in range(times)),
        rows=first.stored.rows,
        columns=first.stored.columns,
        across=frame.across,
        down=frame.down,
        spacing_mm=frame.spacing_mm,
        thickness_mm=frame.thickness_mm or 1.0,
        notes=notes,
    )
    headers = [header for header, _ in group.images]
    return Candidate(
        name=name,
        numbers=tuple(sorted({header.number for header in headers})),
        descriptions=tuple(dict.fromkeys(header.description for header in headers)),
        protocol=first.protocol,
        kind=frame.kind,
        text=first.text,
        slices=len(places),
        times=max(len(place) for place in places),
        modality=first.modality,
        problem=problem,
        stack=stack,
        frame_of_reference=first.frame_of_reference,
    )


def _slice(header: Header, frame: Frame) -> Slice:
    place = frame.position_mm or (0.0, 0.0, 0.0)
    return Slice(header.file, frame.number, place, frame.trigger_ms, frame.slope, frame.intercept)


def _problem(
    group: _Group, places: Sequence[Sequence[tuple[Header, Frame]]], name: str, placeless: Sequence[Header]
) -> tuple[Problem | None, tuple[str, ...]]:
    """Why a group is no stack, and what is odd about it."""
    damaged = next((h.problem for h in (*(header for header, _ in group.images), *placeless) if h.problem), None)
    if damaged is not None:
        return damaged.problem, ()
    title, export = f"series {name}", "Export the series again, in full"
    if placeless:
        message = f"{title}: {len(placeless)} of its images do not say where they lie"
        return Problem("E_AFFINE", message, export), ()
    twice = [place for place in places if len({header.series for header, _ in place}) > 1]
    if twice:
        numbers = sorted({header.number for header, _ in twice[0]})
        message = f"{title}: series {' and '.join(map(str, numbers))} hold the same slice"
        return Problem(
            "E_AMBIGUOUS", message, f"Leave one of them out: --filter SEQUENCE={_without(group, numbers[-1])}"
        ), ()
    origins = np.array([place[0][1].position_mm for place in places], dtype=float)
    apart = np.diff(origins @ group.normal())
    if len(origins) > 2 and _bent(origins, apart):
        message = f"{title}: its slices do not lie one behind the other"
        return Problem("E_SLICES", message, "Choose another series with --filter"), ()
    return _gaps(title, apart, group, places)


def _without(group: _Group, number: int) -> str:
    return ",".join(str(n) for n in sorted({h.number for h, _ in group.images}) if n != number)


def _bent(origins: NDArray[np.float64], apart: NDArray[np.float64]) -> bool:
    """Whether the slices' origins do not lie on a line (along which they may be unevenly far apart)."""
    line = (origins[-1] - origins[0]) / apart.sum()
    expected = origins[0] + np.concatenate([[0.0], np.cumsum(apart)])[:, None] * line
    return bool(np.linalg.norm(origins - expected, axis=1).max() > max(0.5, 0.05 * float(np.median(apart))))


def _gaps(
    title: str, apart: NDArray[np.float64], group: _Group, places: Sequence[Sequence[object]]
) -> tuple[Problem | None, tuple[str, ...]]:
    notes: list[str] = []
    counts = sorted({len(place) for place in places})
    if len(counts) > 1:
        notes.append(f"W_SLICES: {title}: its slices have {counts[0]} to {counts[-1]} images each, not all as many")
    if len(apart) == 0:
        return None, tuple(notes)
    middle = float(np.median(apart))
    worst = float(np.abs(apart - middle).max()) / middle
    listed = ", ".join(f"{gap:.4g}" for gap in dict.fromkeys(np.round(apart, 2).tolist()))
    if worst > _UNEVEN:
        message = f"{title}: slices are missing or unevenly spaced ({listed} mm apart)"
        remedy = "Export the series again, in full; or choose another with --filter"
        return Problem("E_SLICES", message, remedy), ()
    stated = group.frame.thickness_mm
    if worst > _EVEN:
        notes.append(f"W_SLICES: {title}: the slices lie {listed} mm apart; taken for {apart.mean():.4g} mm")
    elif stated > 0 and middle > 1.5 * stated:
        message = f"the slices lie {middle:.4g} mm apart, but the header says {stated:.4g}: are some missing?"
        notes.append(f"W_SLICES: {title}: {message}")
    return None, tuple(notes)


def _unusable(headers: Sequence[Header], groups: Sequence[_Group]) -> Candidate | None:
    """What a series holds that is no stack; None where it also holds one, which then bears the problem."""
    first = headers[0]
    placeless = all(h.no_image == "" and not h.colour for h in headers)
    if placeless and any(g.first.series == first.series for g in groups):
        return None
    title = f"series {first.number}"
    problem = Problem(
        "E_DICOM_IMAGE",
        f"{title} is {first.no_image or 'without a place in space'}, not a stack of MR images",
        "Export the original images",
    )
    if first.colour and not first.no_image:
        problem = Problem("E_DTYPE", f"{title} is in colour", "Export the original images, with one value per pixel")
    return Candidate(
        name=str(first.number),
        numbers=(first.number,),
        descriptions=tuple(dict.fromkeys(header.description for header in headers)),
        protocol=first.protocol,
        kind=first.frames[0].kind if first.frames else (),
        text=first.text,
        slices=len(headers),
        times=1,
        modality=first.modality,
        no_image=first.no_image or ("in colour" if first.colour else "without a place in space"),
        problem=problem,
    )
