"""A manifest: a table (CSV or TSV) that says which files belong to which patient."""

from __future__ import annotations

import codecs
import csv
import difflib
import io
import os
import re
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from monai_deepgmm.errors import UsageError
from monai_deepgmm.patients import label_meanings
from monai_deepgmm.patients.claims import Found
from monai_deepgmm.patients.directory import READABLE
from monai_deepgmm.patients.formats import foreign, pointer
from monai_deepgmm.patients.study import Problem, Study
from monai_deepgmm.protocol import Protocol
from monai_deepgmm.wording import shown

_ROLES = ("patient", "mask", "truth", "labels")
_FILE_WORDS = {"file", "filename", "path", "filepath", "image", "img", "nii", "nifti", "scan"}
_DRIVE = re.compile(r"[A-Za-z]:[\\/]|\\\\")  # C:\ or \\server
_NOT_TEXT = re.compile("[\udc80-\udcff]")  # bytes that are no UTF-8


class Table(NamedTuple):
    """What a manifest says.

    Attributes:
        patients: one per row; paths stay as they stand in it.
        notes: what the user should know.
    """

    patients: tuple[Found, ...]
    notes: tuple[str, ...]


def draft(studies: Sequence[Study], protocol: Protocol, here: Path) -> str:
    """A manifest of what was found, as CSV, to be corrected; paths are relative to the folder that it is to lie in."""
    table = io.StringIO()
    writer = csv.writer(table, lineterminator="\n")
    meant = any(study.truth and study.truth_labels for study in studies)  # a table does not know its layout's
    writer.writerow(["patient", *protocol.sequences, "mask", "truth", *(["labels"] if meant else [])])
    named = {tissue.index: tissue.name for tissue in protocol.tissues}
    for study in studies:
        sources = [*(study.images.get(s) for s in protocol.sequences), study.mask, study.truth]
        paths = [os.path.relpath(one.resolve(), here) if isinstance(one, Path) else "" for one in sources]
        values = (study.truth_labels or {}) if study.truth else {}
        labels = " ".join(f"{named[index]}={value}" for value, index in values.items())
        writer.writerow([study.patient, *paths, *([labels] if meant else [])])
    return table.getvalue()


def read(path: Path, aliases: Mapping[str, str], protocol: Protocol) -> Table:
    """Reads the rows of a manifest, one per patient.

    Args:
        path: a table with the columns ``patient``, one per sequence, ``mask`` and, if there are any, ``truth`` and
            ``labels``: what the values in the reference labels mean (``blood=500 myocardium=200``).
        aliases: name of a sequence, casefolded → the sequence.
        protocol: its tissues are what ``labels`` names.

    Raises:
        UsageError: the table cannot be read, lacks the column ``patient`` or any sequence, or has a column that is
            nearly called like one of those.
    """
    rows = _rows(path)
    header = [cell.strip().casefold() for cell in rows[0][1]] if rows else []
    header = ["labels" if name in ("truth_labels", "truth-labels", "truth labels") else name for name in header]
    columns = [name if name in _ROLES else aliases.get(name) for name in header]
    _refuse_misspelt(path, rows[0][1] if rows else [], columns, aliases)
    if columns.count("patient") != 1:
        found = ", ".join(rows[0][1]) if rows else "nothing"
        raise UsageError(f"--manifest {path.name}: one column must be called patient; the first line holds {found}")
    sequences = sorted(set(aliases.values()))
    if not set(columns) & set(sequences):
        raise UsageError(
            f"--manifest {path.name}: no column is a sequence; found {', '.join(rows[0][1])}, "
            f"expected patient, mask, truth and some of {', '.join(sequences)}"
        )
    patients = tuple(_found(path, line, cells, columns) for line, cells in rows[1:])
    for (line, _), found_here in zip(rows[1:], patients, strict=True):
        _check_labels(path, line, found_here, protocol)
    return Table(patients, _unread(rows, columns))


def absent(here: Path, name: str, manifest: str) -> Problem | None:
    """Why a file named in a manifest is not there; None where it is.

    Args:
        here: the manifest's folder.
        name: the path as read.
        manifest: the table's name, for the message.
    """
    if os.path.exists(here / name) or pointer(here / name):
        return None
    if os.name != "nt" and _DRIVE.match(name):
        message = f"{manifest} names {shown(name)}, a path of Windows that begins with a drive or server"
        return Problem("E_FILE", message, "Name the file by its path on this computer, or relative to the manifest")
    message = f"{shown(Path(name).name)} is named in {manifest} but does not exist"
    if _NOT_TEXT.search(name):
        return Problem("E_FILE", message, f"{manifest} is not in UTF-8: save it as CSV UTF-8, or as UTF-8 text")
    return Problem("E_FILE", message, "Correct the path; relative paths begin at the manifest's folder")


def _path(here: Path, cell: str) -> str:
    """A cell as a path of this system: written on Windows, a relative one has backslashes."""
    if "\\" not in cell or os.name == "nt" or _DRIVE.match(cell) or os.path.exists(here / cell):
        return cell
    return cell.replace("\\", "/")


def _refuse_misspelt(path: Path, header: list[str], columns: list[str | None], aliases: Mapping[str, str]) -> None:
    """Refuses a column that nobody reads, but that is nearly called like one that would be."""
    missing = {name for name in _ROLES if name not in columns}
    missing |= {alias for alias, sequence in aliases.items() if sequence not in columns}
    for number, (name, column) in enumerate(zip(header, columns, strict=True), 1):
        if column is None and (near := _near(name.strip().casefold(), missing, {*_ROLES, *aliases})):
            title, called = near if near in _ROLES else aliases[near], shown(name.strip())
            where = f"--manifest {path.name}, line 1: column {number} is called {called!r}"
            raise UsageError(f"{where} (did you mean {title}?); rename it")


def _near(name: str, missing: Collection[str], known: Collection[str]) -> str | None:
    """The name that this one misspells: letters are exchanged; or, of a missing one, wrong, or "file" is added."""
    alike = difflib.get_close_matches(name, missing, n=1, cutoff=0.8)
    swapped = [other for other in sorted(known) if len(name) > 2 and sorted(other) == sorted(name)]
    words = re.findall(r"[^\W_]+", name)
    added = [w for w in words if w in missing and _FILE_WORDS & set(words)]
    return next(iter((*swapped, *added, *alike)), None)


def _check_labels(path: Path, line: int, found: Found, protocol: Protocol) -> None:
    """Refuses a cell of the column labels that does not name values."""
    if not found.labels:
        return
    if "=" not in found.labels and (READABLE.search(found.labels) or foreign(found.labels)):
        hint = "the file of the reference labels belongs into the column truth"
        raise UsageError(f"--manifest {path.name}, line {line}, labels: {shown(found.labels)} is a file; {hint}")
    label_meanings.pairs(found.labels, protocol, f"--manifest {path.name}, line {line}, labels", strict=True)


def _unread(rows: Sequence[tuple[int, list[str]]], columns: list[str | None]) -> tuple[str, ...]:
    """Columns that hold images and that nothing is done with."""
    unread = [
        shown(name.strip())
        for i, (name, column) in enumerate(zip(rows[0][1], columns, strict=True))
        if column is None and any(i < len(cells) and READABLE.search(cells[i].strip()) for _, cells in rows[1:])
    ]
    return (f"the columns {', '.join(unread)} hold images of no known sequence and are not read",) if unread else ()


def _found(path: Path, line: int, cells: list[str], columns: list[str | None]) -> Found:
    if any(cell.strip() for cell in cells[len(columns) :]):
        raise UsageError(
            f"--manifest {path.name}, line {line}: {len(cells)} cells, but the first line has {len(columns)}; "
            "put quotes around a path that holds the separator"
        )
    found, here = Found(""), path.parent
    for column, cell in zip(columns, cells, strict=False):
        if column == "patient":
            found.patient = cell
        elif column is None or not cell.strip():
            continue
        elif column == "labels":
            found.labels = cell.strip()
        elif column == "mask":
            found.mask.append(_path(here, cell))
        elif column == "truth":
            found.truth.append(_path(here, cell))
        else:
            found.images.setdefault(column, []).append(_path(here, cell))
    return found


def _rows(path: Path) -> list[tuple[int, list[str]]]:
    """(line number, cells) of every line that is not blank."""
    try:
        text = _decoded(path.read_bytes())
    except OSError as error:
        raise UsageError(f"--manifest {path.name}: cannot be read ({error.strerror})") from error
    except UnicodeDecodeError as error:
        raise UsageError(f"--manifest {path.name}: cannot be read ({error.reason} in its UTF-16)") from error
    if "\0" in text:
        raise UsageError(f"--manifest {path.name}: is no text; save the table as CSV or TSV (Excel can)")
    first = next((line for line in text.splitlines() if line.strip()), "")
    separator = _delimiter(path, first)
    blanks = separator != "\t"  # "a, b" is a habit of writing; a blank after a tab is meant
    table = io.StringIO(text, newline="")
    reader = csv.reader(table, delimiter=separator, strict=True, skipinitialspace=blanks)
    try:
        return [(reader.line_num, cells) for cells in reader if any(cell.strip() for cell in cells)]
    except csv.Error as error:
        raise UsageError(f"--manifest {path.name}, line {reader.line_num}: {error}; save it as CSV or TSV") from error


def _decoded(content: bytes) -> str:
    """UTF-8 (bytes that are not stay as they are, as in file names), or UTF-16 if the file begins with its mark."""
    if content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return content.decode("utf-16")
    return content.removeprefix(codecs.BOM_UTF8).decode("utf-8", "surrogateescape")


def _delimiter(path: Path, header: str) -> str:
    """By the file's ending if that splits off a column ``patient``, else the separator that does."""
    first = "\t" if path.suffix.lower() in (".tsv", ".tab") else ","
    for delimiter in (first, ",", "\t", ";"):
        cells = next(csv.reader([header], delimiter=delimiter), [])
        if len(cells) > 1 and "patient" in (cell.strip().casefold() for cell in cells):
            return delimiter
    return first
