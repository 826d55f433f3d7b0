"""What the header of a DICOM image says: whose it is, which series, and where each of its frames lies."""

from __future__ import annotations

import math
import re
import struct
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

from monai_deepgmm.patients import dicom_elements
from monai_deepgmm.patients.dicom_elements import NATIVE, DamagedError, DataSet, Elements, damaged
from monai_deepgmm.patients.stack import Point

MR, ENHANCED = "1.2.840.10008.5.1.4.1.1.4", ("1.2.840.10008.5.1.4.1.1.4.1", "1.2.840.10008.5.1.4.1.1.4.4")
#: What lies beside images; of no use here, and not worth telling.
_DIRECTORY = "1.2.840.10008.1.3.10"
_OTHERS = (
    ("1.2.840.10008.5.1.4.1.1.7", "a secondary capture (a picture of a screen)"),
    ("1.2.840.10008.5.1.4.1.1.4.3", "a colour image"),
    ("1.2.840.10008.5.1.4.1.1.66", "no image, but a segmentation or raw data"),
    ("1.2.840.10008.5.1.4.1.1.88", "no image, but a report"),
    ("1.2.840.10008.5.1.4.1.1.11", "no image, but how one is presented"),
)
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
_SHARED, _PER_FRAME = 0x52009229, 0x52009230
_NESTED = {
    *(_SHARED, _PER_FRAME, 0x00209113, 0x00209116, 0x00289110, 0x00289145, 0x00189118, 0x00209111),
    *(0x00189226, 0x00189114, 0x2005140F),
}
_WANTED = {0x00020002, 0x00020010, *_TEXTS, *_DECIMALS, *_BINARY}

Facts = Mapping[str, "str | tuple[float, ...]"]


class Stored(NamedTuple):
    """How a file's pixels are stored.

    Attributes:
        rows: of a frame.
        columns: likewise.
        samples: values per pixel; 1 but for colour.
        allocated: bits per value.
        used: of these.
        high: the highest of the used ones, from 0.
        signed: whether they are two's complement.
        frames: how many.
    """

    rows: int
    columns: int
    samples: int
    allocated: int
    used: int
    high: int
    signed: bool
    frames: int

    @property
    def frame_bytes(self) -> int:
        """Of one frame that is not packed."""
        return self.rows * self.columns * self.samples * self.allocated // 8


class Frame(NamedTuple):
    """One image of a file.

    Attributes:
        number: in the file, from 0.
        position_mm: the centre of its first pixel; None where the header does not tell.
        across: the direction of a row.
        down: the direction of a column.
        spacing_mm: between columns, and between rows.
        thickness_mm: of the slice, with the gap where it is told.
        kind: the image type, from its third value on, and the component.
        echo: number or time.
        trigger_ms: since the R wave.
        order: what sorts images of one place in time: temporal index, acquisition time, instance, frame.
        slope: intensity = slope · stored value + intercept.
        intercept: see ``slope``.
    """

    number: int
    position_mm: Point | None
    across: Point
    down: Point
    spacing_mm: tuple[float, float]
    thickness_mm: float
    kind: tuple[str, ...]
    echo: float
    trigger_ms: float | None
    order: tuple[float, float, float, int]
    slope: float
    intercept: float


class Header(NamedTuple):
    """What is known of a file.

    Attributes:
        file: where it is.
        patient: the PatientID; only ever hashed.
        study: the study's UID.
        series: the series' UID.
        number: the series' number; 0 where there is none.
        uid: of the image.
        description: of the series.
        protocol: what the scan was called.
        text: both, without the words by which people are called.
        modality: such as MR.
        no_image: why it cannot be an image of a stack; "" where it can.
        placed: whether it says where it lies.
        colour: whether it is one in colour.
        frame_of_reference: the UID of the coordinates.
        stored: how the pixels are stored.
        frames: of the file.
        problem: what is wrong with the pixels; None where nothing is known to be.
    """

    file: Path
    patient: str
    study: str
    series: str
    number: int
    uid: str
    description: str
    protocol: str
    text: str
    modality: str
    no_image: str
    placed: bool
    colour: bool
    frame_of_reference: str
    stored: Stored
    frames: tuple[Frame, ...]
    problem: DamagedError | None


def read(path: Path) -> Header | None:
    """Reads a file's header.

    Returns:
        None where the file is no DICOM, or only a directory of others.

    Raises:
        DamagedError: it is DICOM, and cannot be read.
    """
    data = dicom_elements.read(path, _WANTED, _NESTED)
    if data is None:
        return None
    facts = _facts(data.elements, data)
    if data.kind == _DIRECTORY:
        return None
    stored = stored_as(path, facts)
    frames = tuple(_frame(path, i, each) for i, each in enumerate(_each(path, data, facts, stored)))
    why = _no_image(facts, data)
    description, protocol = _text(facts, "description"), _text(facts, "protocol")
    return Header(
        file=path,
        patient=_text(facts, "patient"),
        study=_text(facts, "study") or str(path.parent),
        series=_text(facts, "series") or str(path.parent),
        number=int(_number(facts, "number", 0)),
        uid=_text(facts, "uid"),
        description=description,
        protocol=protocol,
        text=_without_people(" / ".join(dict.fromkeys(t for t in (description, protocol) if t)), facts),
        modality=_text(facts, "modality"),
        no_image=why,
        placed=bool(frames) and all(frame.position_mm is not None for frame in frames),
        colour=stored.samples > 1 or not (_text(facts, "photometric") or "MONOCHROME").startswith("MONOCHROME"),
        frame_of_reference=_text(facts, "frame_of_reference"),
        stored=stored,
        frames=frames,
        problem=None if why else _pixel_problem(path, data, stored),
    )


def data_set(path: Path) -> tuple[DataSet, Stored]:
    """A file's data set, for reading its pixels, and how they are stored.

    Raises:
        DamagedError: it cannot be read any more.
    """
    data = dicom_elements.read(path, _WANTED, _NESTED)
    if data is None:
        raise damaged(path, "the file is no DICOM any more")
    return data, stored_as(path, _facts(data.elements, data))


def stored_as(path: Path, facts: Facts) -> Stored:
    """How the pixels are stored, as the header promises."""
    allocated = int(_number(facts, "allocated", 16))
    used = int(_number(facts, "stored", allocated))
    return Stored(
        rows=int(_number(facts, "rows", 0)),
        columns=int(_number(facts, "columns", 0)),
        samples=int(_number(facts, "samples", 1)),
        allocated=allocated,
        used=used,
        high=int(_number(facts, "high", used - 1)),
        signed=_number(facts, "signed", 0) == 1,
        frames=int(_number(facts, "frames", 1)),
    )


def _no_image(facts: Facts, data: DataSet) -> str:
    kind = _text(facts, "class")
    for uid, why in _OTHERS:
        if kind == uid or kind.startswith(f"{uid}."):
            return why
    if kind not in (MR, *ENHANCED):
        return f"no MR image ({_text(facts, 'modality') or 'of unknown modality'})"
    return "" if data.pixels is not None else "without pixels"


def _pixel_problem(path: Path, data: DataSet, stored: Stored) -> DamagedError | None:
    """Whether all pixels that the header promises are there; none of them is read."""
    pixels = data.pixels
    if pixels is None:
        return None
    try:
        if pixels.length is None:
            dicom_elements.pieces(path, data)
        elif pixels.offset + pixels.length > data.size:
            raise damaged(path, f"the pixels end too early, after {data.size} bytes")
        elif data.syntax in NATIVE and pixels.length < stored.frame_bytes * stored.frames:
            promised = stored.frame_bytes * stored.frames
            raise damaged(path, f"{pixels.length} bytes of pixels, but the header promises {promised}")
    except DamagedError as error:
        return error
    except OSError:
        return damaged(path, "it cannot be read")
    return None


# Frames --------------------------------------------------------------------------------------------------------------


def _each(path: Path, data: DataSet, facts: Facts, stored: Stored) -> Iterable[Facts]:
    """The facts of each frame: what the file says, overridden by what is said of all frames, and of each."""
    frames = data.elements.get(_PER_FRAME)
    if not isinstance(frames, tuple):
        if stored.frames == 1:
            yield facts
        return
    if len(frames) != stored.frames:
        raise damaged(path, f"the header promises {stored.frames} frames, and describes {len(frames)}")
    shared = data.elements.get(_SHARED)
    common = dict(facts)
    for item in shared if isinstance(shared, tuple) else ():
        common |= _facts(item, data)
    for item in frames:
        yield {**common, **_facts(item, data)}


def _frame(path: Path, index: int, facts: Facts) -> Frame:
    position, turned = _numbers(facts, "position", 3), _numbers(facts, "orientation", 6)
    spacing = _numbers(facts, "spacing", 2)
    placed = position is not None and turned is not None and spacing is not None and _at_right_angles(turned)
    rows, columns = spacing if spacing is not None and min(spacing) > 0 else (0.0, 0.0)
    turned = turned or (1.0, 0.0, 0.0, 0.0, 1.0, 0.0)
    kinds = (*_text(facts, "type").split("\\")[2:], *_text(facts, "frame_type").split("\\")[2:])
    trigger = _number(facts, "trigger", math.nan)
    slope, intercept = _scaling(path, facts)
    order = (_number(facts, "temporal", 0), _clock(_text(facts, "acquired")), _number(facts, "instance", 0), index)
    return Frame(
        number=index,
        position_mm=(position[0], position[1], position[2]) if placed and position and columns else None,
        across=(turned[0], turned[1], turned[2]),
        down=(turned[3], turned[4], turned[5]),
        spacing_mm=(columns, rows),
        thickness_mm=_number(facts, "between", 0) or _number(facts, "thickness", 0),
        kind=tuple(dict.fromkeys((*filter(None, kinds), *filter(None, [_text(facts, "component")])))),
        echo=_number(facts, "echo_number", 0) or round(_number(facts, "echo", 0), 1),
        trigger_ms=None if math.isnan(trigger) else trigger,
        order=order,
        slope=slope,
        intercept=intercept,
    )


def _scaling(path: Path, facts: Facts) -> tuple[float, float]:
    """Slope and intercept; where Philips tells its own scale, that of the signal, as dcm2niix has it."""
    if () in (facts.get("slope"), facts.get("intercept")):
        found = "its rescale slope or intercept is no finite number"
        raise damaged(path, found, "Export the series again", code="E_SCALE")
    slope, intercept = _number(facts, "slope", 1.0), _number(facts, "intercept", 0.0)
    private = _number(facts, "philips", 0.0)
    if private > 0 and slope:
        return 1 / private, intercept / (slope * private)
    return slope or 1.0, intercept


def _at_right_angles(turned: tuple[float, ...]) -> bool:
    across, down = turned[:3], turned[3:]
    sizes = (math.hypot(*across), math.hypot(*down))
    product = sum(a * b for a, b in zip(across, down, strict=True))
    return all(abs(size - 1) < 1e-2 for size in sizes) and abs(product) < 1e-2


# Values --------------------------------------------------------------------------------------------------------------


def _facts(elements: Elements, data: DataSet) -> dict[str, str | tuple[float, ...]]:
    """The values of all levels but those of shared and single frames, by name."""
    found: dict[str, str | tuple[float, ...]] = {}
    for tag, value in elements.items():
        if isinstance(value, tuple):
            for item in value if tag not in (_SHARED, _PER_FRAME) else ():
                # What Philips repeats for old software in a private sequence is only good for its scale.
                inner = _facts(item, data)
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


def _text(facts: Facts, name: str) -> str:
    value = facts.get(name, "")
    return value if isinstance(value, str) else ""


def _numbers(facts: Facts, name: str, count: int) -> tuple[float, ...] | None:
    value = facts.get(name)
    good = isinstance(value, tuple) and len(value) == count and all(abs(v) < 1e6 for v in value)
    return value if good and isinstance(value, tuple) else None


def _number(facts: Facts, name: str, default: float) -> float:
    value = facts.get(name)
    return value[0] if isinstance(value, tuple) and value and math.isfinite(value[0]) else default


def _clock(text: str) -> float:
    """Seconds since midnight of HHMMSS.FFFFFF; 0 where it is no time."""
    found = re.match(r"(\d\d)(\d\d)(\d\d(?:\.\d+)?)", text)
    return 3600 * int(found[1]) + 60 * int(found[2]) + float(found[3]) if found else 0.0


def _without_people(text: str, facts: Facts) -> str:
    """What an operator wrote, without the words by which patient and staff are called elsewhere in the header."""
    people = " ".join(_text(facts, name) for name in ("name", "patient", "referring", "performing", "operator"))
    known = {word for word in re.findall(r"[^\W_]+", people.casefold()) if len(word) > 2}
    return re.sub(r"[^\W_]+", lambda found: "…" if found[0].casefold() in known else found[0], text)
