"""What a reader decided of each result, and when: ``review.tsv``, which the pages export and show."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from monai_deepgmm.errors import UsageError
from monai_deepgmm.images.atomic_files import shown

DECISIONS = ("accept", "redo", "reject")
FILE = "review.tsv"


class Review(NamedTuple):
    """One decision.

    Attributes:
        patient: the id.
        decision: one of ``DECISIONS``, or empty for a note alone.
        note: what the reader wrote.
        reviewer: who, as they named themselves.
        date: when, ISO 8601.
        result: the beginning of the fingerprint of the result that was looked at.
    """

    patient: str
    decision: str = ""
    note: str = ""
    reviewer: str = ""
    date: str = ""
    result: str = ""


def read(files: Iterable[Path]) -> dict[str, Review]:
    """Patient → the latest decision; of two without a date, the one that stands last.

    Raises:
        UsageError: a file cannot be read, lacks the columns ``patient`` and ``decision``, or holds another decision.
    """
    found: dict[str, Review] = {}
    for file in files:
        for review in _lines(file):
            if review.date >= found.get(review.patient, review).date:
                found[review.patient] = review
    return dict(sorted(found.items()))


def _lines(file: Path) -> list[Review]:
    try:
        text = file.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is no text"
        raise UsageError(f"review: {shown(file)} cannot be read ({reason}); give a review.tsv from a page") from error
    table = csv.DictReader(io.StringIO(text), delimiter="\t", quoting=csv.QUOTE_NONE)
    if not {"patient", "decision"} <= set(table.fieldnames or ()):
        raise UsageError(f"review: {shown(file)} lacks the columns patient and decision; give a review.tsv from a page")
    lines = [Review(**{key: row.get(key) or "" for key in Review._fields}) for row in table]
    for number, line in enumerate(lines, 2):
        if line.decision not in ("", *DECISIONS):
            wanted = ", ".join(DECISIONS)
            raise UsageError(f"review: {shown(file)}, line {number}: {line.decision!r} is none of {wanted}")
    return lines


def to_redo(files: Sequence[Path]) -> list[str]:
    """The patients that a reader wants to have done again.

    Raises:
        UsageError: as for ``read``, or there is none.
    """
    patients = [review.patient for review in read(files).values() if review.decision == "redo"]
    if not patients:
        raise UsageError(f"review: {', '.join(shown(f) for f in files)} marks no patient with redo")
    return patients


def table(reviews: Mapping[str, Review]) -> bytes:
    """The file's content."""
    lines = [Review._fields, *reviews.values()]
    return "".join("\t".join(map(_cell, line)) + "\n" for line in lines).encode("utf-8", "surrogateescape")


def _cell(value: Any) -> str:
    return " ".join(str(value).replace("\t", " ").splitlines())


def result_of(fingerprint: Any) -> str:
    """How a result is told apart in a review."""
    return str(fingerprint or "")[:16]
