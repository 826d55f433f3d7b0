"""Pages to check by eye: one self-contained HTML file per patient, and an index of the cohort."""

from __future__ import annotations

import base64
import functools
import hashlib
import json
import math
import re
import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

import jinja2

from monai_deepgmm import protocol
from monai_deepgmm.errors import CODES, UsageError
from monai_deepgmm.images.atomic_files import shown, write_whole
from monai_deepgmm.results import outliers, row_files
from monai_deepgmm.results.mosaic import UNCERTAINTY_COLORS, omitted, preview

__all__ = ["index", "page", "preview", "rebuild", "rebuild_index", "rebuild_patient"]

#: For tissues whose colour no protocol or sidecar tells; colour-blind people can tell these apart.
PALETTE = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#f0e442")
#: Numbers of the left ventricle that the page shows: what they are called, and their unit.
VENTRICLE = {
    "lv_mass_g": ("LV mass", "g"),
    "cavity_ml": ("cavity", "ml"),
    "scar_edema_g": ("scar + edema", "g"),
    "scar_edema_percent": ("scar + edema", "% of the wall"),
    "thickness_mean_mm": ("wall thickness, mean", "mm"),
    "thickness_min_mm": ("thinnest 30°", "mm"),
    "thickness_max_mm": ("thickest 30°", "mm"),
    "transmural_25_percent": ("scar deeper than 25 % of the wall", "% of rays"),
    "transmural_50_percent": ("deeper than 50 %", "% of rays"),
    "transmural_75_percent": ("deeper than 75 %", "% of rays"),
    "scar_2sd_percent": ("scar by 2 SD", "% of the wall"),
    "scar_3sd_percent": ("by 3 SD", "% of the wall"),
    "scar_5sd_percent": ("by 5 SD", "% of the wall"),
    "scar_6sd_percent": ("by 6 SD", "% of the wall"),
    "scar_fwhm_percent": ("by FWHM", "% of the wall"),
    "scar_otsu_percent": ("by Otsu", "% of the wall"),
    "no_reflow_ml": ("no-reflow within scar", "ml"),
    "segments": ("AHA segments", ""),
}
ORDER = {"failed": 0, "skipped": 1, "ok": 2}


def page(
    row: Mapping[str, Any],
    sidecar: Mapping[str, Any] | None,
    measurements: Sequence[Mapping[str, Any]],
    preview_png: bytes | None,
) -> str:
    """One patient's page, without any resource outside the file.

    Args:
        row: the patient's line of ``summary.tsv``, with ``warnings`` as a list, and ``remedy`` and ``slices`` (rows
            of ``measure.measure_slices``) where known.
        sidecar: the ``<patient>_dseg.json``; None for a patient that failed. Keys that it lacks leave their part out.
        measurements: the patient's lines of ``measurements.tsv``.
        preview_png: the picture of ``preview``, or None.
    """
    facts = dict(sidecar or {})
    slices = [s for s in _list(row.get("slices")) if isinstance(s, Mapping)]
    colors = _colors(_list(facts.get("tissues")), [m.get("tissue") for m in measurements])
    units = _units(facts, slices)
    return (
        _environment()
        .get_template("page.html.j2")
        .render(
            row=row,
            patient=_readable(row.get("patient", "")),
            meaning=CODES.get(str(row.get("code", ""))),
            warnings=[_warning(w) for w in _warnings(row, facts)],
            facts=facts,
            picture=base64.b64encode(preview_png).decode("ascii") if preview_png else None,
            ramp=", ".join(UNCERTAINTY_COLORS),
            measurements=measurements,
            intervals=_map(_map(facts.get("uncertainty")).get("volumes")),
            presence={name: _map(found) for name, found in _map(facts.get("presence")).items()},
            percent_of=next((m["percent_of"] for m in measurements if m.get("percent_of")), "the mask"),
            colors=colors,
            bar=_bar([m for m in measurements if m.get("percent") not in (None, "")], "percent", 100.0),
            units=units,
            slice_tissues=list(dict.fromkeys(s.get("tissue") for s in slices)),
            naming=_map(facts.get("naming")),
            guessed=any(isinstance(_map(u.get("naming")).get("certainty"), int | float) for u in units),
            ventricle=_ventricle(_map(row.get("ventricle"))),
            omitted=omitted(_map(facts.get("coverage")).get("slices"), [u["slice"] for u in units]),
            mixture=[u for u in _list(_map(facts.get("mixture")).get("units")) if isinstance(u, Mapping)],
        )
    )


def index(
    rows: Sequence[Mapping[str, Any]],
    measurements: Sequence[Mapping[str, Any]],
    title: str,
    colors: Mapping[str, str] | None = None,
) -> str:
    """The cohort's page: how many are done, who failed and what to do, and everyone's volumes.

    Args:
        rows: the lines of ``summary.tsv``, as for ``page``; ``page`` = False marks a patient without a page.
        measurements: the lines of ``measurements.tsv``.
        title: of the page.
        colors: tissue → colour, where another than the protocols' own was used.
    """
    tissues = list(dict.fromkeys(str(m["tissue"]) for m in measurements))
    volumes: dict[str, dict[str, Mapping[str, Any]]] = {}
    for m in measurements:
        volumes.setdefault(str(m["patient"]), {})[str(m["tissue"])] = m
    largest = max((sum(_number(m.get("volume_ml")) for m in v.values()) for v in volumes.values()), default=0.0)
    known = _colors([{"name": n, "color": c} for n, c in (colors or {}).items()], tissues)
    ordered = sorted(rows, key=lambda row: (ORDER.get(str(row.get("status")), 0), str(row.get("patient", ""))))
    patients = [_entry(row, volumes.get(str(row.get("patient", "")), {}), largest) for row in ordered]
    percents = dict.fromkeys(str(m["tissue"]) for m in measurements if m.get("percent") not in (None, ""))
    return (
        _environment()
        .get_template("index.html.j2")
        .render(
            title=title,
            patients=patients,
            counts={status: sum(row.get("status") == status for row in rows) for status in ORDER},
            warned=sum(bool(p["warnings"]) for p in patients),
            tissues=tissues,
            percents=list(percents),
            percent_of=next((m["percent_of"] for m in measurements if m.get("percent_of")), "the mask"),
            medians={key: _medians(measurements, key) for key in ("volume_ml", "percent")},
            colors=known,
        )
    )


def _entry(row: Mapping[str, Any], volumes: Mapping[str, Mapping[str, Any]], largest_ml: float) -> dict[str, Any]:
    """What the index shows of one patient."""
    return {
        "row": row,
        "patient": _readable(row.get("patient", "")),
        "link": _link(row),
        "volumes": volumes,
        "bar": _bar(volumes.values(), "volume_ml", largest_ml),
        "warnings": [_warning(w) for w in _warnings(row, {})],
        "meaning": CODES.get(str(row.get("code", ""))),
    }


def rebuild(out: Path) -> int:
    """Writes every patient's page and the index again, from the files under OUT alone.

    Returns:
        How many patients have a page.

    Raises:
        UsageError: OUT holds no results.
    """
    folders = [out / name for name in row_files.folders(out)]
    if not folders and not any((out / row_files.REFUSED).glob("*.json")):
        raise UsageError(f"{shown(out)}: no results here; give the folder that deepgmm segment wrote to")
    for folder in folders:
        rebuild_patient(folder)
    rebuild_index(out)
    return len(folders)


def rebuild_patient(folder: Path) -> None:
    """Writes ``<patient>_report.html`` from the row, sidecar and picture beside it."""
    name = folder.name
    row = row_files.read_row(folder / f"{name}_row.json", name)
    done, measurements = row["status"] == "ok", _list(row.get("measurements"))
    file = folder / f"{name}_preview.png"
    picture = file.read_bytes() if done and file.is_file() else None
    sidecar = folder / f"{name}_dseg.json"
    facts = row_files.read_json(sidecar) if done else None
    try:
        if done and facts is None:
            raise ValueError("no JSON object")
        html = page(row, facts, measurements, picture)
    except (jinja2.TemplateError, ArithmeticError, AttributeError, LookupError, TypeError, ValueError):
        note = f"W_SIDECAR: {shown(sidecar)} is missing or damaged; run deepgmm segment again"
        kept = {**row, "slices": [], "warnings": [*_list(row.get("warnings")), note]}
        html = page(kept, None, measurements, picture)
    write_whole(folder / f"{name}_report.html", _encoded(html))


def rebuild_index(out: Path, title: str | None = None) -> None:
    """Writes ``index.html`` from the patients' rows; the title is the data set's name if none is given."""
    rows = row_files.read_all(out)
    measurements = [m for row in rows for m in _list(row.get("measurements"))]
    beside = outliers.warnings(rows)
    rows = [{**row, "warnings": [*_list(row.get("warnings")), *beside.get(row["patient"], ())]} for row in rows]
    name = _map(row_files.read_json(out / "dataset_description.json")).get("Name")
    html = index(rows, measurements, title or str(name or "Segmentations"), _written_colors(out))
    write_whole(out / "index.html", _encoded(html))


@functools.cache
def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("monai_deepgmm.results", "templates"),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["fixed"] = _fixed
    environment.filters["pretty"] = functools.partial(json.dumps, indent=2, ensure_ascii=False, default=str)
    environment.filters["csp"] = _csp
    return environment


def _csp(text: str) -> str:
    """The hash by which a page allows its own script and no other."""
    return "sha256-" + base64.b64encode(hashlib.sha256(str(text).encode()).digest()).decode("ascii")


def _fixed(value: Any, digits: int = 1) -> str:
    """A number for people; a dash where there is none."""
    if not isinstance(value, int | float) or isinstance(value, bool) or not math.isfinite(value):
        return "–"
    return f"{value:,.{digits}f}"


def _number(value: Any) -> float:
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else 0.0


def _list(value: Any) -> list[Any]:
    return list(value) if isinstance(value, list | tuple) else []


def _map(value: Any) -> dict[str, Any]:
    return dict(value) if isinstance(value, Mapping) else {}


def _readable(text: Any) -> str:
    """The text with bytes that are no UTF-8 (from a file's name) shown as replacement characters."""
    return str(text).encode("utf-8", "surrogateescape").decode("utf-8", "replace")


def _encoded(html: str) -> bytes:
    return html.encode("utf-8", "replace")


def _link(row: Mapping[str, Any]) -> str | None:
    """The way from the index to a patient's page."""
    if row.get("page") is False:
        return None
    name = quote(str(row.get("patient", "")), safe="", errors="surrogateescape")
    return f"{name}/{name}_report.html"


def _warnings(row: Mapping[str, Any], facts: Mapping[str, Any]) -> list[str]:
    """The warnings of the row, or of the sidecar where the row has none, each once."""
    return list(dict.fromkeys(_readable(w) for w in _list(row.get("warnings")) or _list(facts.get("warnings"))))


def _warning(text: str) -> dict[str, str]:
    """``W_CODE: words`` → its two parts."""
    code, colon, words = text.partition(":")
    return {"code": code, "words": words.strip()} if colon and re.fullmatch(r"[EW]_\w+", code) else {"words": text}


def _colors(tissues: Iterable[Any], names: Iterable[Any]) -> dict[str, str]:
    """Tissue → ``#rrggbb``: as given, else the built-in protocols', else one of ``PALETTE``."""
    colors = {
        str(t["name"]): str(t["color"])
        for t in tissues
        # Only a plain colour goes into a style attribute, whatever the file says.
        if isinstance(t, Mapping) and "name" in t and re.fullmatch(r"#[0-9a-fA-F]{6}", str(t.get("color")))
    }
    for k, name in enumerate(dict.fromkeys(str(n) for n in names)):
        colors.setdefault(name, _protocol_colors().get(name, PALETTE[k % len(PALETTE)]))
    return colors


@functools.cache
def _protocol_colors() -> dict[str, str]:
    return {t.name: t.color for name in protocol.names() for t in protocol.load(name).tissues}


def _bar(measurements: Iterable[Mapping[str, Any]], key: str, full: float) -> list[dict[str, Any]]:
    """The parts of a stacked bar: tissue, value, and width in percent of a full bar."""
    return [
        {"tissue": str(m.get("tissue")), "value": m[key], "width": round(100 * _number(m[key]) / full, 2)}
        for m in measurements
        if full > 0 and _number(m.get(key)) > 0
    ]


def _medians(measurements: Sequence[Mapping[str, Any]], key: str) -> dict[str, float]:
    values: dict[str, list[float]] = {}
    for m in measurements:
        if isinstance(m.get(key), int | float):
            values.setdefault(str(m["tissue"]), []).append(float(m[key]))
    return {tissue: statistics.median(v) for tissue, v in values.items()}


def _units(facts: Mapping[str, Any], slices: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """What is known of each slice (or of the volume, with slice None), from naming, fit and measurements together."""
    units: dict[Any, dict[str, Any]] = {}
    for part in ("naming", "fit"):
        for unit in _list(_map(facts.get(part)).get("units")):
            if isinstance(unit, Mapping):
                units.setdefault(unit.get("slice"), {"volumes": {}})[part] = unit
    for unit in units.values():
        unit["sparkline"] = _sparkline(_list(_map(unit.get("fit")).get("trace")))
    for s in slices:
        units.setdefault(s.get("slice"), {"volumes": {}})["volumes"][s.get("tissue")] = s.get("volume_ml")
    ordered = sorted(units, key=lambda k: (k is not None, k if isinstance(k, int) else 0))
    return [{"slice": key, **units[key]} for key in ordered]


def _sparkline(trace: Sequence[Any], width: float = 96.0, height: float = 18.0) -> str:
    """The points of an SVG polyline that shows a falling NLL, without the axes."""
    values = [float(v) for v in trace if isinstance(v, int | float) and math.isfinite(v)]
    if len(values) < 2:
        return ""
    low, span = min(values), (max(values) - min(values)) or 1.0
    step = (width - 2) / (len(values) - 1)
    return " ".join(f"{1 + k * step:.1f},{1 + (height - 2) * (1 - (v - low) / span):.1f}" for k, v in enumerate(values))


def _ventricle(numbers: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """The left ventricle's numbers as the page shows them: name, value and unit; empty for another organ."""
    return [
        (name, value if isinstance(value, str) else _fixed(value), "" if isinstance(value, str) else unit)
        for key, (name, unit) in VENTRICLE.items()
        if (value := numbers.get(key)) is not None
    ]


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
