"""One patient's page: pictures to check, numbers with their intervals, where the patient stands among the others."""

from __future__ import annotations

import base64
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from monai_deepgmm.errors import CODES
from monai_deepgmm.results import markup
from monai_deepgmm.results.markup import as_list, as_map, is_number
from monai_deepgmm.results.mosaic import omitted
from monai_deepgmm.results.review import Review, result_of
from monai_deepgmm.results.strips import strips
from monai_deepgmm.results.tiles import UNCERTAINTY_COLORS

#: Columns of the measurements that have a place of their own; others are shown as they come.
KNOWN = {"patient", "tissue", "voxels", "volume_ml", "mass_g", "percent", "percent_of", "expected_ml"}
KNOWN |= {"low_ml", "high_ml", "slice"}
#: Numbers of the left ventricle that the page shows: what they are called, and their unit.
VENTRICLE = {
    "lv_mass_g": ("LV mass", "g"),
    "cavity_ml": ("cavity", "ml"),
    "scar_edema_ml": ("scar + edema", "ml"),
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
UNITS = {"ml": "ml", "g": "g", "mm": "mm", "percent": "%", "sd": "SD", "mm2": "mm²"}


class Surroundings(NamedTuple):
    """What a patient's page tells of the cohort and of its reader.

    Attributes:
        previous: the link to the page before, in the order of the index.
        next: to the one after.
        place: such as "3 of 20".
        values: tissue → patient → ml.
        review: what a reader decided.
        warnings: what the comparison with the others gave rise to.
    """

    previous: str | None = None
    next: str | None = None
    place: str = ""
    values: Mapping[str, Mapping[str, float]] = {}
    review: Review | None = None
    warnings: Sequence[str] = ()


class Number(NamedTuple):
    """A number with a name and a unit, as words."""

    name: str
    value: str
    unit: str


def page(
    row: Mapping[str, Any],
    sidecar: Mapping[str, Any] | None,
    measurements: Sequence[Mapping[str, Any]],
    preview_png: bytes | None,
    sprites: Mapping[str, Any] | None = None,
    around: Surroundings = Surroundings(),  # noqa: B008 (a NamedTuple does not change)
) -> str:
    """One patient's page, without any resource outside the file.

    Args:
        row: the patient's line of ``summary.tsv``, with ``warnings`` as a list, and ``remedy``, ``slices`` (rows
            of ``measure.measure_slices``) and ``ventricle`` where known.
        sidecar: the ``<patient>_dseg.json``; None for a patient that failed. Keys that it lacks leave their part out.
        measurements: the patient's lines of ``measurements.tsv``.
        preview_png: the picture of ``preview``, or None.
        sprites: what the viewer shows, of ``sprites.sprites``, or None.
        around: the cohort, as far as it is known.
    """
    facts = dict(sidecar or {})
    slices = [s for s in as_list(row.get("slices")) if isinstance(s, Mapping)]
    units = _units(facts, slices)
    shown = {**row, "warnings": [*as_list(row.get("warnings")), *around.warnings]}
    patient = str(row.get("patient", ""))
    return (
        markup.environment()
        .get_template("page.html.j2")
        .render(
            row=row,
            patient=markup.readable(patient),
            meaning=CODES.get(str(row.get("code", ""))),
            warnings=markup.warnings_of(shown, facts),
            facts=facts,
            picture=base64.b64encode(preview_png).decode("ascii") if preview_png else None,
            viewer=_viewer(sprites),
            ramp=UNCERTAINTY_COLORS,
            measurements=measurements,
            intervals=_intervals(measurements, facts),
            opinion=_opinion(facts),
            presence={name: as_map(found) for name, found in as_map(facts.get("presence")).items()},
            percent_of=next((m["percent_of"] for m in measurements if m.get("percent_of")), "the mask"),
            more=_columns(measurements),
            whole=_numbers(as_map(row.get("ventricle"))),
            colors=markup.colors_of(as_list(facts.get("tissues")), [m.get("tissue") for m in measurements]),
            indices={
                str(t.get("name")): t.get("index") for t in as_list(facts.get("tissues")) if isinstance(t, Mapping)
            },
            bar=markup.bar([m for m in measurements if m.get("percent") not in (None, "")], "percent", 100.0),
            units=units,
            guessed=any(is_number(as_map(u.get("naming")).get("certainty")) for u in units),
            omitted=omitted(as_map(facts.get("coverage")).get("slices"), [u["slice"] for u in units]),
            slice_tissues=list(dict.fromkeys(s.get("tissue") for s in slices)),
            slice_more=_columns(slices),
            naming=as_map(facts.get("naming")),
            mixture=[u for u in as_list(as_map(facts.get("mixture")).get("units")) if isinstance(u, Mapping)],
            around=around,
            strips=strips(around.values, patient),
            result=result_of(row.get("fingerprint")),
            files=_files(patient, facts),
            alignment=_alignment(as_map(facts.get("alignment"))),
        )
    )


def _viewer(sprites: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """The pictures apart from what is told of them, which the script reads as JSON."""
    layers = [as_map(layer) for layer in as_list(as_map(sprites).get("layers"))]
    if not sprites or not layers:
        return None
    bare = [{k: v for k, v in layer.items() if k != "png"} for layer in layers]
    return {
        "meta": {**sprites, "layers": bare},
        "pictures": [str(layer.get("png", "")) for layer in layers],
        "images": [str(layer.get("name")) for layer in layers if layer.get("kind") == "image"],
        "reference": any(layer.get("kind") == "reference" for layer in layers),
    }


def _intervals(measurements: Sequence[Mapping[str, Any]], facts: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Tissue → low_ml and high_ml, of the measurements or else of the sidecar."""
    told = {str(name): as_map(v) for name, v in as_map(as_map(facts.get("uncertainty")).get("volumes")).items()}
    return told | {str(m.get("tissue")): dict(m) for m in measurements if is_number(m.get("low_ml"))}


def _opinion(facts: Mapping[str, Any]) -> str | None:
    """The method whose intervals these are, where it is not the one that segmented."""
    by = as_map(facts.get("uncertainty")).get("by")
    return by if isinstance(by, str) and by != facts.get("method") else None


def _columns(rows: Sequence[Mapping[str, Any]]) -> list[tuple[str, str, str]]:
    """The numeric columns that have no place of their own: key, name, unit."""
    keys = dict.fromkeys(key for row in rows for key, value in row.items() if key not in KNOWN and is_number(value))
    return [(key, *_named(key)) for key in keys]


def _named(key: str) -> tuple[str, str]:
    """``lv_mass_g`` → "LV mass", "g"."""
    name, _, unit = key.rpartition("_")
    words, unit = (name, UNITS[unit]) if name and unit in UNITS else (key, "")
    words = words.replace("_", " ")
    return ("LV" + words[2:] if words.startswith("lv ") else words), unit


def _numbers(found: Mapping[str, Any]) -> list[Number]:
    """Whatever is measured of the organ as a whole; what could not be is left out, but for words that say why."""
    named = {key: VENTRICLE.get(key) or _named(key) for key in found}
    return [
        Number(name, value if isinstance(value, str) else markup.fixed(value), "" if isinstance(value, str) else unit)
        for key, (name, unit) in named.items()
        if is_number(value := found[key]) or (isinstance(value, str) and value)
    ]


def _units(facts: Mapping[str, Any], slices: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """What is known of each slice (or of the volume, with slice None), from naming, fit and measurements together."""
    units: dict[Any, dict[str, Any]] = {}
    for part in ("naming", "fit"):
        for unit in as_list(as_map(facts.get(part)).get("units")):
            if isinstance(unit, Mapping):
                units.setdefault(unit.get("slice"), {"volumes": {}})[part] = unit
    for unit in units.values():
        trace = [float(v) for v in as_list(as_map(unit.get("fit")).get("trace")) if is_number(v)]
        unit["sparkline"] = sparkline(trace)
        unit["ends"] = (trace[0], trace[-1]) if len(trace) > 1 else None
    for s in slices:
        unit = units.setdefault(s.get("slice"), {"volumes": {}})
        unit["volumes"][s.get("tissue")] = s.get("volume_ml")
        unit.setdefault("more", s)
    ordered = sorted(units, key=lambda k: (k is not None, k if isinstance(k, int) else 0))
    return [{"slice": key, **units[key]} for key in ordered]


def sparkline(trace: Sequence[float], width: float = 96.0, height: float = 18.0) -> str:
    """The points of an SVG polyline that shows how a number changed, without the axes."""
    values = [v for v in trace if math.isfinite(v)]
    if len(values) < 2:
        return ""
    low, span = min(values), (max(values) - min(values)) or 1.0
    step = (width - 2) / (len(values) - 1)
    return " ".join(f"{1 + k * step:.1f},{1 + (height - 2) * (1 - (v - low) / span):.1f}" for k, v in enumerate(values))


def _alignment(told: Mapping[str, Any]) -> dict[str, Any] | None:
    """What lay beside the reference: a line for each slice or sequence that was moved, and those that were not."""
    sequences = {str(name): as_map(found) for name, found in as_map(told.get("sequences")).items()}
    lines = []
    for name, found in sequences.items():
        stack = as_map(found.get("stack"))
        if stack.get("matrix") is not None:
            lines.append({"sequence": name, "slice": "all", "mm": None, **stack})
        for z, one in as_map(found.get("slices")).items():
            vector = [float(mm) for mm in as_list(as_map(one).get("back_mm")) if is_number(mm)]
            if as_map(one).get("moved") is True:
                lines.append({**as_map(one), "sequence": name, "slice": z, "mm": math.hypot(*vector)})
    stayed = [name for name, found in sequences.items() if not found.get("moved")]
    return {"lines": lines, "stayed": stayed, "reference": told.get("reference")} if sequences else None


def _files(patient: str, facts: Mapping[str, Any]) -> list[tuple[str, str]]:
    """What lies beside the page: words and link."""
    if not facts:
        return []
    name = markup.quoted(patient)
    tables = ("measurements.tsv", "measurements_slices.tsv", "summary.tsv")
    beside = [("label map", f"{name}_dseg.nii.gz"), ("sidecar", f"{name}_dseg.json")]
    return [*beside, *((table, f"../{table}") for table in tables)]
