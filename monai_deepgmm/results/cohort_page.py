"""The cohort's page: who to look at first, everyone's volumes, and what a reader decided."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from monai_deepgmm.errors import CODES
from monai_deepgmm.results import markup
from monai_deepgmm.results.markup import is_number, number
from monai_deepgmm.results.review import Review, result_of
from monai_deepgmm.results.strips import strips, values_by_tissue

STATUSES = ("failed", "skipped", "ok")
#: So many patients who failed for one reason are listed above the table, which lists all.
LISTED = 8
Row = Mapping[str, Any]


def index(
    rows: Sequence[Row],
    measurements: Sequence[Row],
    title: str,
    colors: Mapping[str, str] | None = None,
    reviews: Mapping[str, Review] | None = None,
    *,
    compared: str | None = None,
) -> str:
    """The cohort's page: how many are done, who is flagged, who failed and what to do, and everyone's volumes.

    Args:
        rows: the lines of ``summary.tsv``, as for ``page``; ``page`` = False marks a patient without a page.
        measurements: the lines of ``measurements.tsv``.
        title: of the page.
        colors: tissue → colour, where another than the protocols' own was used.
        reviews: patient → what a reader decided.
        compared: whose agreement with reference labels a page beside tells of: "these" results', or "others"; None:
            there is none.
    """
    tissues = list(dict.fromkeys(str(m["tissue"]) for m in measurements))
    volumes = _volumes(measurements)
    largest = max((sum(number(m.get("volume_ml")) for m in v.values()) for v in volumes.values()), default=0.0)
    known = markup.colors_of([{"name": n, "color": c} for n, c in (colors or {}).items()], tissues)
    patients = [_entry(row, volumes, largest, (reviews or {})) for row in ordered(rows, measurements)]
    percents = list(dict.fromkeys(str(m["tissue"]) for m in measurements if m.get("percent") not in (None, "")))
    masses = [p["lv_mass_g"] for p in patients if is_number(p["lv_mass_g"])]
    return (
        markup.environment()
        .get_template("index.html.j2")
        .render(
            title=title,
            compared=compared,
            patients=patients,
            failures=_failures(patients),
            counts={status: sum(row.get("status") == status for row in rows) for status in STATUSES},
            warned=sum(bool(p["warnings"]) for p in patients),
            flagged=sum(p["flagged"] for p in patients),
            codes=_codes(patients),
            tissues=tissues,
            percents=percents,
            masses=bool(masses),
            percent_of=next((m["percent_of"] for m in measurements if m.get("percent_of")), "the mask"),
            medians={key: _medians(measurements, key) for key in ("volume_ml", "percent")}
            | {"lv_mass_g": statistics.median(masses) if masses else None},
            strips=strips(values_by_tissue(measurements)),
            colors=known,
            serious=markup.SERIOUS,
        )
    )


def ordered(rows: Sequence[Row], measurements: Sequence[Row]) -> list[Row]:
    """Failed, skipped, flagged, then the others; of each the largest last tissue (scar, lesion) first."""
    volumes = _volumes(measurements)
    last = str(measurements[-1]["tissue"]) if measurements else ""

    def key(row: Row) -> tuple[int, int, float, str]:
        status, patient = str(row.get("status")), str(row.get("patient", ""))
        serious = markup.is_flagged(markup.warnings_of(row, {}))
        size = number(volumes.get(patient, {}).get(last, {}).get("volume_ml"))
        return STATUSES.index(status) if status in STATUSES else 0, -int(serious), -size, patient

    return sorted(rows, key=key)


def _volumes(measurements: Sequence[Row]) -> dict[str, dict[str, Row]]:
    """Patient → tissue → its line."""
    found: dict[str, dict[str, Row]] = {}
    for m in measurements:
        found.setdefault(str(m["patient"]), {})[str(m["tissue"])] = m
    return found


def _entry(row: Row, volumes: Mapping[str, Mapping[str, Row]], largest_ml: float, reviews: Mapping[str, Review]) -> Row:
    """What the index shows of one patient."""
    patient, warnings = str(row.get("patient", "")), markup.warnings_of(row, {})
    mine, review = volumes.get(patient, {}), reviews.get(patient)
    return {
        "row": row,
        "patient": markup.readable(patient),
        "link": link(row),
        "volumes": mine,
        "bar": markup.bar(mine.values(), "volume_ml", largest_ml),
        "warnings": warnings,
        "flagged": markup.is_flagged(warnings),
        "meaning": CODES.get(str(row.get("code", ""))),
        "lv_mass_g": markup.as_map(row.get("ventricle")).get("lv_mass_g"),
        "result": result_of(row.get("fingerprint")),
        "review": review._asdict() if review else None,
    }


def _failures(patients: Sequence[Row]) -> list[Row]:
    """Why patients failed, and what to do; those with the same reason together."""
    together: dict[tuple[str, ...], list[Row]] = {}
    for patient in patients:
        row = patient["row"]
        if row.get("status") == "failed":
            reason = (row.get("code"), row.get("message") or patient["meaning"], row.get("remedy"))
            together.setdefault(tuple(str(part or "") for part in reason), []).append(patient)
    return [
        {
            "code": code,
            "message": message,
            "remedy": remedy,
            "patients": who[:LISTED],
            "more": max(len(who) - LISTED, 0),
        }
        for (code, message, remedy), who in together.items()
    ]


def link(row: Row) -> str | None:
    """The way from the index to a patient's page."""
    if row.get("page") is False:
        return None
    name = markup.quoted(row.get("patient", ""))
    return f"{name}/{name}_report.html"


def _codes(patients: Sequence[Row]) -> list[tuple[str, int]]:
    """Each warning's code and how many patients bear it, serious ones first."""
    held = [code for p in patients for code in {w["code"] for w in p["warnings"] if "code" in w}]
    return sorted(((c, held.count(c)) for c in set(held)), key=lambda pair: (pair[0] not in markup.SERIOUS, pair[0]))


def _medians(measurements: Sequence[Row], key: str) -> dict[str, float]:
    values: dict[str, list[float]] = {}
    for m in measurements:
        if is_number(m.get(key)):
            values.setdefault(str(m["tissue"]), []).append(float(m[key]))
    return {tissue: statistics.median(v) for tissue, v in values.items()}
