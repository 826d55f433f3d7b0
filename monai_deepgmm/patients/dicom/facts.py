"""The data elements of an image's header by name, decoded: texts, and numbers that are finite."""

from __future__ import annotations

import math
import re
import struct
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Self

from monai_deepgmm.patients.dicom.elements import DataSet, Elements

#: Scale slope of Philips, by which stored values are divided to be comparable between slices.
_PHILIPS_SLOPE = 0x2005100E
_TEXTS = {
    **{0x00080008: "type", 0x00080016: "class", 0x00080018: "uid", 0x00080060: "modality", 0x0008103E: "description"},
    **{0x00181030: "protocol", 0x0020000D: "study", 0x0020000E: "series", 0x00200052: "frame_of_reference"},
    **{0x00100010: "name", 0x00100020: "patient", 0x00080090: "referring", 0x00081050: "performing"},
    **{0x00081070: "operator", 0x00280004: "photometric", 0x00080032: "acquired", 0x00089007: "frame_type"},
    **{0x00089208: "component", 0x00209056: "stack", 0x00080005: "characters"},
}
_DECIMALS = {
    **{0x00180050: "thickness", 0x00180081: "echo", 0x00180086: "echo_number", 0x00180088: "between"},
    **{0x00181060: "trigger", 0x00200011: "number", 0x00200013: "instance", 0x00200032: "position"},
    **{0x00200037: "orientation", 0x00200100: "temporal", 0x00280008: "frames", 0x00280030: "spacing"},
    **{0x00281052: "intercept", 0x00281053: "slope"},
}
_BINARY = {
    **{0x00280002: ("samples", "H"), 0x00280010: ("rows", "H"), 0x00280011: ("columns", "H")},
    **{0x00280100: ("allocated", "H"), 0x00280101: ("stored", "H"), 0x00280102: ("high", "H")},
    **{0x00280103: ("signed", "H"), 0x00189082: ("echo", "d"), 0x00209153: ("trigger", "d")},
    **{0x00209128: ("temporal", "I"), 0x00209057: ("in_stack", "I"), _PHILIPS_SLOPE: ("philips", "f")},
}
SHARED, PER_FRAME = 0x52009229, 0x52009230
NESTED = {
    *(SHARED, PER_FRAME, 0x00209113, 0x00209116, 0x00289110, 0x00289145, 0x00189118, 0x00209111),
    *(0x00189226, 0x00189114, 0x2005140F),
}
WANTED = {0x00020002, 0x00020010, *_TEXTS, *_DECIMALS, *_BINARY}


@dataclass(frozen=True)
class Facts:
    """What is known of a file, or of one of its frames.

    Attributes:
        values: name → text, or numbers; an empty tuple where something else stands than finite numbers.
    """

    values: Mapping[str, str | tuple[float, ...]]

    @classmethod
    def of(cls, elements: Elements, data: DataSet) -> Self:
        """From the elements of all levels but those of shared and single frames."""
        return cls(_values(elements, data))

    def overridden(self, other: Facts) -> Self:
        """With what is said more closely elsewhere."""
        return replace(self, values={**self.values, **other.values})

    def text(self, name: str) -> str:
        """A text; "" where there is none."""
        value = self.values.get(name, "")
        return value if isinstance(value, str) else ""

    def numbers(self, name: str, count: int) -> tuple[float, ...] | None:
        """So many numbers, none of them absurd; else None."""
        value = self.values.get(name)
        good = isinstance(value, tuple) and len(value) == count and all(abs(v) < 1e6 for v in value)
        return value if good and isinstance(value, tuple) else None

    def number(self, name: str, default: float) -> float:
        """The first of one or several numbers."""
        value = self.values.get(name)
        return value[0] if isinstance(value, tuple) and value and math.isfinite(value[0]) else default

    def garbled(self, name: str) -> bool:
        """Whether something stands there that should be a number and is none."""
        return self.values.get(name) == ()

    def clock(self, name: str) -> float:
        """Seconds since midnight of HHMMSS.FFFFFF; 0 where it is no time."""
        found = re.match(r"(\d\d)(\d\d)(\d\d(?:\.\d+)?)", self.text(name))
        return 3600 * int(found[1]) + 60 * int(found[2]) + float(found[3]) if found else 0.0

    def without_people(self, text: str) -> str:
        """What an operator wrote, without the words by which patient and staff are called elsewhere in the header."""
        people = " ".join(self.text(name) for name in ("name", "patient", "referring", "performing", "operator"))
        known = {word for word in re.findall(r"[^\W_]+", people.casefold()) if len(word) > 2}
        return re.sub(r"[^\W_]+", lambda found: "…" if found[0].casefold() in known else found[0], text)


def _values(elements: Elements, data: DataSet) -> dict[str, str | tuple[float, ...]]:
    found: dict[str, str | tuple[float, ...]] = {}
    for tag, value in elements.items():
        if isinstance(value, tuple):
            for item in value if tag not in (SHARED, PER_FRAME) else ():
                # What Philips repeats for old software in a private sequence is only good for its scale.
                inner = _values(item, data)
                found |= {k: v for k, v in inner.items() if tag != 0x2005140F or k == "philips"}
        elif tag in _TEXTS:
            found[_TEXTS[tag]] = _decoded(value)
        elif tag in _DECIMALS:
            found[_DECIMALS[tag]] = _decimals(value)
        elif tag in _BINARY:
            name, kind = _BINARY[tag]
            size = struct.calcsize(kind)
            many = len(value) // size
            found[name] = tuple(struct.unpack(f"{data.order}{many}{kind}", value[: many * size]))
    return found


def _decoded(value: bytes) -> str:
    """Text in UTF-8, or else Latin-1: words that are compared are ASCII, and the rest is only shown."""
    value = value.rstrip(b" \0").lstrip(b" ")
    try:
        return value.decode("utf-8")
    except UnicodeDecodeError:
        return value.decode("latin-1")


def _decimals(value: bytes) -> tuple[float, ...]:
    try:
        found = tuple(float(part) for part in value.decode("ascii").strip(" \0").split("\\"))
    except (UnicodeDecodeError, ValueError):
        return ()
    return found if all(map(math.isfinite, found)) else ()
