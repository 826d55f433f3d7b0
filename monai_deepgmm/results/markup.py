"""What all pages share: the templates' environment, numbers and warnings in words, colours, links."""

from __future__ import annotations

import base64
import functools
import hashlib
import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from importlib import resources
from typing import Any
from urllib.parse import quote

import jinja2
from markupsafe import Markup

from monai_deepgmm import protocol

#: For tissues whose colour no protocol or sidecar tells; the first four differ in grey print too.
PALETTE = ("#8c1c3a", "#2f7fc4", "#58c98b", "#ffe94a", "#cc79a7", "#c05a35", "#79b8dd")
#: Warnings that a reader has to look at before any number is used; the others tell how a file was read.
SERIOUS = (
    *("W_IMPLAUSIBLE", "W_COVERAGE", "W_OUTLIER", "W_SWAPPED", "W_NAMES", "W_SPACING", "W_SIDECAR"),
    *("W_MASK_SIZE", "W_MASK_SHAPE", "W_MASK_PART", "W_MASK_EDGE", "W_MASK_LOST", "W_MASK_NAME"),
)


@functools.cache
def environment() -> jinja2.Environment:
    """Jinja with everything escaped that is not marked safe."""
    made = jinja2.Environment(
        loader=jinja2.PackageLoader("monai_deepgmm.results", "templates"),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    made.globals["script"] = script
    made.filters["fixed"] = fixed
    made.filters["pretty"] = functools.partial(json.dumps, indent=2, ensure_ascii=False, default=str)
    made.filters["json"] = functools.partial(json.dumps, ensure_ascii=False, separators=(",", ":"), default=str)
    made.filters["csp"] = csp
    made.filters["readable"] = readable
    return made


@functools.cache
def script(*names: str) -> Markup:
    """A page's own scripts, without indents and comments. They are the package's files: nothing in them is escaped."""
    folder = resources.files("monai_deepgmm.results") / "templates"
    lines = [line.strip() for name in names for line in (folder / name).read_text(encoding="utf-8").splitlines()]
    return Markup("\n".join(line for line in lines if line and not line.startswith("//")))


def csp(text: str) -> str:
    """The hash by which a page allows its own script and no other."""
    return "sha256-" + base64.b64encode(hashlib.sha256(str(text).encode()).digest()).decode("ascii")


def fixed(value: Any, digits: int = 1) -> str:
    """A number for people; a dash where there is none."""
    if not isinstance(value, int | float) or isinstance(value, bool) or not math.isfinite(value):
        return "–"
    return f"{round(value, digits) + 0.0:,.{digits}f}"  # never -0.0


def number(value: Any) -> float:
    """A finite number, or 0."""
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else 0.0


def is_number(value: Any) -> bool:
    """Whether it is a finite number."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def as_list(value: Any) -> list[Any]:
    """A list, or an empty one for what is none."""
    return list(value) if isinstance(value, list | tuple) else []


def as_map(value: Any) -> dict[str, Any]:
    """A mapping, or an empty one for what is none."""
    return dict(value) if isinstance(value, Mapping) else {}


def readable(text: Any) -> str:
    """The text with bytes that are no UTF-8 (from a file's name) shown as replacement characters."""
    return str(text).encode("utf-8", "surrogateescape").decode("utf-8", "replace")


def encoded(html: str) -> bytes:
    """A page as it is written."""
    return html.encode("utf-8", "replace")


def quoted(patient: Any) -> str:
    """A patient's id as a part of a link."""
    return quote(str(patient), safe="", errors="surrogateescape")


def warnings_of(row: Mapping[str, Any], facts: Mapping[str, Any]) -> list[dict[str, str]]:
    """The warnings of the row, or of the sidecar where the row has none, each once, serious ones first."""
    texts = dict.fromkeys(readable(w) for w in as_list(row.get("warnings")) or as_list(facts.get("warnings")))
    return sorted((_warning(text) for text in texts), key=lambda w: w.get("code") not in SERIOUS)


def _warning(text: str) -> dict[str, str]:
    """``W_CODE: words`` → its two parts."""
    code, colon, words = text.partition(":")
    return {"code": code, "words": words.strip()} if colon and re.fullmatch(r"[EW]_\w+", code) else {"words": text}


def is_flagged(warnings: Sequence[Mapping[str, str]]) -> bool:
    """Whether any of them is serious."""
    return any(w.get("code") in SERIOUS for w in warnings)


def colors_of(tissues: Iterable[Any], names: Iterable[Any]) -> dict[str, str]:
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


def bar(measurements: Iterable[Mapping[str, Any]], key: str, full: float) -> list[dict[str, Any]]:
    """The parts of a stacked bar: tissue, value, and width in percent of a full bar."""
    return [
        {"tissue": str(m.get("tissue")), "value": m[key], "width": round(100 * number(m[key]) / full, 1)}
        for m in measurements
        if full > 0 and number(m.get(key)) > 0
    ]
