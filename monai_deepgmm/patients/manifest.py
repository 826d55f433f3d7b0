"""A manifest: a table (CSV or TSV) that says which files belong to which patient."""

from __future__ import annotations

import codecs
import csv
import io
from collections.abc import Mapping
from pathlib import Path

from monai_deepgmm import schema
from monai_deepgmm.errors import UsageError
from monai_deepgmm.patients.claims import Found

_ROLES = ("patient", "mask", "truth")


def read(path: Path, aliases: Mapping[str, str]) -> tuple[Found, ...]:
    """Reads the rows of a manifest, one per patient; paths stay as they stand in it.

    Args:
        path: a table with the columns ``patient``, one per sequence, ``mask`` and, if there is one, ``truth``.
        aliases: name of a sequence, casefolded → the protocol's sequence.

    Raises:
        UsageError: the table cannot be read, or lacks the column ``patient`` or any sequence.
    """
    rows = _rows(path)
    header = [cell.strip().casefold() for cell in rows[0][1]] if rows else []
    columns = [name if name in _ROLES else aliases.get(name) for name in header]
    if columns.count("patient") != 1:
        found = ", ".join(rows[0][1]) if rows else "nothing"
        raise UsageError(f"--manifest {path.name}: one column must be called patient; the first line holds {found}")
    sequences = sorted(set(aliases.values()))
    if not set(columns) & set(sequences):
        raise UsageError(
            f"--manifest {path.name}: no column is a sequence; found {', '.join(rows[0][1])}, "
            f"expected patient, mask, truth and some of {', '.join(sequences)}"
        )
    _check_columns(path, rows[0][1], columns, [*_ROLES, *sequences, *aliases])
    return tuple(_found(path, line, cells, columns) for line, cells in rows[1:])


def _check_columns(path: Path, header: list[str], columns: list[str | None], known: list[str]) -> None:
    """Refuses columns that are nearly one that is read; others, such as an age, are the user's own.

    Raises:
        UsageError: naming the nearest.
    """
    for number, (name, column) in enumerate(zip(header, columns, strict=True), 1):
        near = "" if column or len(name.strip()) < 3 else schema.nearest(name.strip(), known, least=0.75)
        if near:
            raise UsageError(f"--manifest {path.name}, line 1: column {number} is called {name!r}{near}; rename it")


def _check_cells(path: Path, line: int, cells: list[str]) -> None:
    for number, cell in enumerate(cells, 1):
        if any(ord(c) < 32 or ord(c) == 127 for c in cell.strip()):
            what = f"cell {number} holds a control character: {cell[:40]!r}"
            raise UsageError(f"--manifest {path.name}, line {line}: {what}; is it a table?")


def _found(path: Path, line: int, cells: list[str], columns: list[str | None]) -> Found:
    if any(cell.strip() for cell in cells[len(columns) :]):
        raise UsageError(
            f"--manifest {path.name}, line {line}: {len(cells)} cells, but the first line has {len(columns)}; "
            "put quotes around a path that holds the separator"
        )
    _check_cells(path, line, cells)
    found = Found("")
    for column, cell in zip(columns, cells, strict=False):
        if column == "patient":
            found.patient = cell
        elif column is None or not cell.strip():
            continue
        elif column == "mask":
            found.mask.append(cell)
        elif column == "truth":
            found.truth.append(cell)
        else:
            found.images.setdefault(column, []).append(cell)
    return found


def _rows(path: Path) -> list[tuple[int, list[str]]]:
    """(line number, cells) of every line that is not blank."""
    try:
        text = _decoded(path.read_bytes())
    except OSError as error:
        raise UsageError(f"--manifest {path.name}: cannot be read ({error.strerror})") from error
    except UnicodeDecodeError as error:
        raise UsageError(f"--manifest {path.name}: cannot be read ({error.reason} in its UTF-16)") from error
    first = next((line for line in text.splitlines() if line.strip()), "")
    separator = _delimiter(path, first)
    blanks = separator != "\t"  # "a, b" is a habit of writing; a blank after a tab is meant
    table = io.StringIO(text, newline="")
    reader = csv.reader(table, delimiter=separator, strict=True, skipinitialspace=blanks)
    try:
        return [(reader.line_num, cells) for cells in reader if any(cell.strip() for cell in cells)]
    except csv.Error as error:
        raise UsageError(f"--manifest {path.name}, line {reader.line_num}: {error}") from error


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
