"""Pages to check by eye: one self-contained HTML file per patient, and an index, from the files under OUT alone."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2

from monai_deepgmm.errors import UsageError
from monai_deepgmm.images.atomic_files import shown, write_whole
from monai_deepgmm.results import agreement_page, outliers, review, row_files
from monai_deepgmm.results.cohort_page import index, link, ordered
from monai_deepgmm.results.markup import as_list, as_map, encoded, quoted
from monai_deepgmm.results.mosaic import preview
from monai_deepgmm.results.page import Surroundings, page
from monai_deepgmm.results.review import Review
from monai_deepgmm.results.strips import values_by_tissue

__all__ = ["index", "page", "preview", "rebuild", "rebuild_index", "rebuild_patient", "surroundings"]


def rebuild(out: Path, reviews: Sequence[Path] = ()) -> int:
    """Writes every patient's page and the index again, from the files under OUT alone.

    Args:
        out: the folder that ``deepgmm segment`` wrote to.
        reviews: files that pages exported; what they decide is added to ``review.tsv`` in OUT.

    Returns:
        How many patients have a page.

    Raises:
        UsageError: OUT holds no results, or a review cannot be read.
    """
    folders = row_files.folders(out)
    if not folders and not any((out / row_files.REFUSED).glob("*.json")):
        raise UsageError(f"{shown(out)}: no results here; give the folder that deepgmm segment wrote to")
    if reviews:
        kept = [file for file in [out / review.FILE] if file.is_file()]
        write_whole(out / review.FILE, review.table(review.read([*kept, *reviews])))
    for folder, around in surroundings(out):
        rebuild_patient(folder, around)
    rebuild_index(out)
    return len(folders)


def rebuild_patient(folder: Path, around: Surroundings | None = None) -> None:
    """Writes ``<patient>_report.html`` from the row, sidecar and pictures beside it; one that is so already stays."""
    name, around = folder.name, around or Surroundings()
    row = row_files.read_row(folder / f"{name}_row.json", name)
    done, measurements = row["status"] == "ok", as_list(row.get("measurements"))
    drawn, sidecar = folder / f"{name}_preview.png", folder / f"{name}_dseg.json"
    picture = drawn.read_bytes() if done and drawn.is_file() else None
    facts = row_files.read_json(sidecar) if done else None
    try:
        if done and facts is None:
            raise ValueError("no JSON object")
        sprites = row_files.read_json(folder / f"{name}_viewer.json") if done else None
        html = page(row, facts, measurements, picture, sprites, around)
    except (jinja2.TemplateError, ArithmeticError, AttributeError, LookupError, TypeError, ValueError):
        note = f"W_SIDECAR: {shown(sidecar)} is missing or damaged; run deepgmm segment again"
        kept = {**row, "slices": [], "warnings": [*as_list(row.get("warnings")), note]}
        html = page(kept, None, measurements, picture, None, around)
    file, content = folder / f"{name}_report.html", encoded(html)
    if not file.is_file() or file.read_bytes() != content:
        write_whole(file, content)


def rebuild_index(out: Path, title: str | None = None) -> None:
    """Writes ``index.html`` from the patients' rows; the title is the data set's name if none is given."""
    rows, measurements = _cohort(out)
    name = as_map(row_files.read_json(out / "dataset_description.json")).get("Name")
    title, compared = title or str(name or "Segmentations"), _compared(out, rows)
    html = index(rows, measurements, title, _written_colors(out), _reviews(out), compared=compared)
    write_whole(out / "index.html", encoded(html))


def _compared(out: Path, rows: Sequence[Mapping[str, Any]]) -> str | None:
    """Which results the page of agreement is of: "these", "others", where some have changed, or None without a page."""
    if not (out / agreement_page.FILE).is_file():
        return None
    of = as_map(as_map(row_files.read_json(out / "evaluation.json")).get("patients"))
    now = {str(row["patient"]): review.result_of(row.get("fingerprint")) for row in rows}
    same = all(as_map(one).get("result", now.get(name)) == now.get(name) for name, one in of.items())
    return "these" if same else "others"


def _cohort(out: Path) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Every patient's row, and all lines of the measurements."""
    rows = row_files.read_all(out)
    measurements = [m for row in rows for m in as_list(row.get("measurements"))]
    beside = outliers.warnings(rows)
    rows = [{**row, "beside": beside.get(row["patient"], [])} for row in rows]
    rows = [{**row, "warnings": [*as_list(row.get("warnings")), *row["beside"]]} for row in rows]
    return rows, measurements


def surroundings(out: Path) -> Iterator[tuple[Path, Surroundings]]:
    """Each patient's folder and what its page tells of the cohort, in the order of the index."""
    rows, measurements = _cohort(out)
    rows = [row for row in rows if row.get("page") is not False]
    links = [f"../{link(row)}" for row in ordered(rows, measurements)]
    place = {target: k for k, target in enumerate(links)}
    beside = {row["patient"]: row["beside"] for row in rows}
    values, reviews = values_by_tissue(measurements), _reviews(out)
    for folder in (out / name for name in row_files.folders(out)):
        k = place.get(f"../{quoted(folder.name)}/{quoted(folder.name)}_report.html")
        if k is None:
            continue
        yield (
            folder,
            Surroundings(
                previous=links[k - 1] if k else None,
                next=links[k + 1] if k + 1 < len(links) else None,
                place=f"{k + 1} of {len(links)}",
                values=values,
                review=reviews.get(folder.name),
                warnings=beside.get(folder.name, ()),
            ),
        )


def _reviews(out: Path) -> Mapping[str, Review]:
    """What readers decided, as far as it was handed in; a file that cannot be read is nobody's decision."""
    try:
        return review.read([out / review.FILE]) if (out / review.FILE).is_file() else {}
    except UsageError:
        return {}


def _written_colors(out: Path) -> dict[str, str]:
    """Tissue → colour as in ``dseg.tsv``."""
    try:
        lines = (out / "dseg.tsv").read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError):
        return {}
    table = [line.split("\t") for line in lines]
    if not table or not {"name", "color"} <= set(table[0]):
        return {}
    name, color = table[0].index("name"), table[0].index("color")
    return {cells[name]: cells[color] for cells in table[1:] if len(cells) == len(table[0])}
