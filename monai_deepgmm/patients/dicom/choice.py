"""Which stack of a DICOM study serves as which sequence: by the layout, or as ``--filter`` says; never by a guess."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple

from monai_deepgmm import protocol as protocols
from monai_deepgmm.errors import UsageError
from monai_deepgmm.patients.dicom import layout as dicom_layout
from monai_deepgmm.patients.dicom import stacks as dicom_stacks
from monai_deepgmm.patients.dicom.header import Header
from monai_deepgmm.patients.dicom.layout import DicomLayout, Meaning
from monai_deepgmm.patients.dicom.stacks import Candidate
from monai_deepgmm.patients.stack import Series, Stack
from monai_deepgmm.patients.study import Problem
from monai_deepgmm.protocol import Protocol

#: Sequence → what is meant of each study: numbers of series, UIDs, words of the description, or "none".
Wanted = Mapping[str, tuple[str, ...]]

_NONE = "none"
_NUMBERS, _PART, _UID = re.compile(r"(\d+)(?:-(\d+))?"), re.compile(r"[\d,-]+\.\d+"), re.compile(r"\d+(\.\d+){2,}")


class Chosen(NamedTuple):
    """What is used of a study.

    Attributes:
        images: sequence → stack.
        problems: why the study cannot be used.
        series: what was made of each stack.
        used: the sequences whose filter found something.
    """

    images: dict[str, Stack]
    problems: tuple[Problem, ...]
    series: tuple[Series, ...]
    used: frozenset[str]


def wanted(filters: Mapping[str, tuple[str, ...]], protocol: Protocol) -> Wanted:
    """What a user typed after ``--filter``, by sequence.

    Raises:
        UsageError: a key is no sequence, or a value is empty.
    """
    found = {}
    for key, values in filters.items():
        sequence = next((s for s in protocol.sequences if s.casefold() == key), None)
        if sequence is None:
            there = ", ".join(protocol.sequences)
            raise UsageError(f"--filter {key}: DICOM series are chosen by sequence ({there}), such as LGE=7")
        if not all(values):
            raise UsageError(f"--filter {sequence}: expected a series' number, UID, words of its description, or none")
        found[sequence] = values
    return found


def choose(headers: Sequence[Header], layout: DicomLayout, protocol: Protocol, asked: Wanted) -> Chosen:
    """Chooses one stack for each sequence of the protocol.

    Args:
        headers: of one study.
        layout: says what a series is.
        protocol: its sequences are looked for.
        asked: what the user says of them; of a study in which it fits nothing, the layout's own choice counts.
    """
    everything = dicom_stacks.candidates(headers)
    forced = {s: _forced(headers, everything, values) for s, values in asked.items() if s in protocol.sequences}
    taken = {number for found in forced.values() for one in found for number in one.numbers}
    meanings = [dicom_layout.meaning(layout, one, protocol) for one in everything]
    images, problems, used = {}, [], {}
    for sequence in protocol.sequences:
        found = forced.get(sequence) or _best(sequence, everything, meanings, taken)
        if _NONE in asked.get(sequence, ()) and not forced.get(sequence):
            continue
        problem = _problem(sequence, found)
        if problem is not None:
            problems.append(_told(problem, sequence))
        elif found and found[0].stack is not None:
            images[sequence] = dataclasses.replace(found[0].stack, cine=sequence in layout.cine)
            used[sequence] = found[0]
    images = _with_frames_of_reference(images, used)
    lines = _lines(everything, meanings, used, forced, protocol)
    return Chosen(images, tuple(problems), lines, frozenset(s for s in forced if forced[s] or _NONE in asked[s]))


def sequences(headers: Sequence[Header], layout: DicomLayout) -> set[str]:
    """The sequences that a study's series are in the light of any protocol that comes with the package."""
    known = [protocols.load(name) for name in protocols.names()]
    everything = dicom_stacks.candidates(headers)
    found = (dicom_layout.meaning(layout, one, protocol).sequence for one in everything for protocol in known)
    return {sequence for sequence in found if sequence is not None}


def _forced(headers: Sequence[Header], everything: Sequence[Candidate], values: Iterable[str]) -> list[Candidate]:
    """The stacks that a filter means, whatever the layout says of them."""
    parts = [value for value in values if _PART.fullmatch(value) and not _UID.fullmatch(value)]
    if parts:
        return [one for one in everything if one.name in parts]
    tests = [_test(value) for value in values if value != _NONE]
    chosen = [header for header in headers if any(test(header) for test in tests)]
    return list(dicom_stacks.candidates(chosen)) if chosen else []


def _test(value: str) -> Callable[[Header], bool]:
    if found := _NUMBERS.fullmatch(value):
        first, last = int(found[1]), int(found[2] or found[1])
        return lambda header: first <= header.number <= last
    if _UID.fullmatch(value):
        return lambda header: header.series == value
    return lambda header: value in header.description.casefold()


def _best(
    sequence: str, everything: Sequence[Candidate], meanings: Sequence[Meaning], taken: set[int]
) -> list[Candidate]:
    """The candidates of the preferred kind; what is no image counts only where nothing else is there."""
    mine = [
        (meaning.rank, one)
        for one, meaning in zip(everything, meanings, strict=True)
        if meaning.sequence == sequence and not taken & set(one.numbers)
    ]
    real = [(rank, one) for rank, one in mine if one.stack is not None] or mine
    best = min((rank for rank, _ in real), default=0)
    return [one for rank, one in real if rank == best]


def _problem(sequence: str, found: Sequence[Candidate]) -> Problem | None:
    """Why none of these stacks can be used; a damaged one is the true cause of there being several."""
    damaged = (one.problem for one in found if one.problem is not None and one.problem.code == "E_DICOM_FILE")
    if len(found) > 1:
        return next(damaged, None) or _several(sequence, found)
    return found[0].problem if found else None


def _several(sequence: str, found: Sequence[Candidate]) -> Problem:
    listed = " and ".join(f"series {one.name} ({one.slices} slices)" for one in found[:6])
    more = f" and {len(found) - 6} more" if len(found) > 6 else ""
    ways = " or ".join(f"--filter {sequence}={one.name}" for one in found[:6])
    message = f"{len(found)} stacks match {sequence}: {listed}{more}"
    return Problem("E_AMBIGUOUS", message, f"Choose with {ways}; deepgmm scan prints what each of them is")


def _told(problem: Problem, sequence: str) -> Problem:
    """The problem with the sequence that it stops, and how to go without it."""
    remedy = f"{problem.remedy.replace('SEQUENCE', sequence)}; or leave {sequence} out: --filter {sequence}=none"
    return (
        problem
        if problem.code == "E_AMBIGUOUS"
        else dataclasses.replace(problem, message=f"{sequence}: {problem.message}", remedy=remedy)
    )


def _with_frames_of_reference(images: dict[str, Stack], used: Mapping[str, Candidate]) -> dict[str, Stack]:
    """The stacks, with a warning on those whose coordinates are not the reference's."""
    first = next(iter(used), None)
    out = dict(images)
    for sequence, stack in images.items():
        if first and used[sequence].frame_of_reference != used[first].frame_of_reference:
            note = (
                f"W_REFERENCE: {stack.name} was not measured in the coordinates of {images[first].name}, which is the "
                "reference: the patient may have moved between them"
            )
            out[sequence] = dataclasses.replace(stack, notes=(*stack.notes, note))
    return out


def _lines(
    everything: Sequence[Candidate],
    meanings: Sequence[Meaning],
    used: Mapping[str, Candidate],
    forced: Mapping[str, Sequence[Candidate]],
    protocol: Protocol,
) -> tuple[Series, ...]:
    """What was made of each stack."""
    chosen = {one.name: sequence for sequence, one in used.items()}
    named = {one.name for sequence, one in used.items() if forced.get(sequence)}
    lines = [
        Series(one.name, sequence, "as --filter says", one.slices, one.times, one.text)
        for sequence, one in used.items()
        if forced.get(sequence)
    ]
    for one, meaning in zip(everything, meanings, strict=True):
        if one.name in named:
            continue
        sequence, why = meaning.sequence or "", meaning.why
        if sequence and sequence not in protocol.sequences:
            sequence, why = "", f"{sequence}, which protocol {protocol.name} has no use for"
        elif sequence and chosen.get(one.name) != sequence:
            sequence, why = "", f"{sequence} ({why}), but {_but(sequence, one, used, forced)}"
        lines.append(Series(one.name, sequence, why, one.slices, one.times, one.text))
    return tuple(lines)


def _but(
    sequence: str, one: Candidate, used: Mapping[str, Candidate], forced: Mapping[str, Sequence[Candidate]]
) -> str:
    """Why a stack that is of a sequence does not serve as it."""
    if sequence in used:
        return f"series {used[sequence].name} is used"
    if sequence in forced and not forced[sequence]:
        return "--filter leaves it out"
    return one.problem.message if one.problem is not None else "it is not the only one"
