"""What the header of a DICOM image says: whose it is, which series, and where each of its frames lies."""

from __future__ import annotations

import math
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from monai_deepgmm.patients.dicom import elements as dicom_elements
from monai_deepgmm.patients.dicom.elements import NATIVE, DamagedError, DataSet, damaged
from monai_deepgmm.patients.dicom.facts import NESTED, PER_FRAME, SHARED, WANTED, Facts
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
    data = dicom_elements.read(path, WANTED, NESTED)
    if data is None:
        return None
    facts = Facts.of(data.elements, data)
    if data.kind == _DIRECTORY:
        return None
    stored = stored_as(facts)
    frames = tuple(_frame(path, i, each) for i, each in enumerate(_each(path, data, facts, stored)))
    why = _no_image(facts, data)
    description, protocol = facts.text("description"), facts.text("protocol")
    return Header(
        file=path,
        patient=facts.text("patient"),
        study=facts.text("study") or str(path.parent),
        series=facts.text("series") or str(path.parent),
        number=int(facts.number("number", 0)),
        uid=facts.text("uid"),
        description=description,
        protocol=protocol,
        text=facts.without_people(" / ".join(dict.fromkeys(t for t in (description, protocol) if t))),
        modality=facts.text("modality"),
        no_image=why,
        placed=bool(frames) and all(frame.position_mm is not None for frame in frames),
        colour=stored.samples > 1 or not (facts.text("photometric") or "MONOCHROME").startswith("MONOCHROME"),
        frame_of_reference=facts.text("frame_of_reference"),
        stored=stored,
        frames=frames,
        problem=None if why else _pixel_problem(path, data, stored),
    )


def data_set(path: Path) -> tuple[DataSet, Stored]:
    """A file's data set, for reading its pixels, and how they are stored.

    Raises:
        DamagedError: it cannot be read any more.
    """
    data = dicom_elements.read(path, WANTED, NESTED)
    if data is None:
        raise damaged(path, "the file is no DICOM any more")
    return data, stored_as(Facts.of(data.elements, data))


def stored_as(facts: Facts) -> Stored:
    """How the pixels are stored, as the header promises."""
    allocated = int(facts.number("allocated", 16))
    used = int(facts.number("stored", allocated))
    return Stored(
        rows=int(facts.number("rows", 0)),
        columns=int(facts.number("columns", 0)),
        samples=int(facts.number("samples", 1)),
        allocated=allocated,
        used=used,
        high=int(facts.number("high", used - 1)),
        signed=facts.number("signed", 0) == 1,
        frames=int(facts.number("frames", 1)),
    )


def _no_image(facts: Facts, data: DataSet) -> str:
    kind = facts.text("class")
    for uid, why in _OTHERS:
        if kind == uid or kind.startswith(f"{uid}."):
            return why
    if kind not in (MR, *ENHANCED):
        return f"no MR image ({facts.text('modality') or 'of unknown modality'})"
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
    frames = data.elements.get(PER_FRAME)
    if not isinstance(frames, tuple):
        if stored.frames == 1:
            yield facts
        return
    if len(frames) != stored.frames:
        raise damaged(path, f"the header promises {stored.frames} frames, and describes {len(frames)}")
    shared = data.elements.get(SHARED)
    common = facts
    for item in shared if isinstance(shared, tuple) else ():
        common = common.overridden(Facts.of(item, data))
    for item in frames:
        yield common.overridden(Facts.of(item, data))


def _frame(path: Path, index: int, facts: Facts) -> Frame:
    position, turned = facts.numbers("position", 3), facts.numbers("orientation", 6)
    spacing = facts.numbers("spacing", 2)
    placed = position is not None and turned is not None and spacing is not None and _at_right_angles(turned)
    rows, columns = spacing if spacing is not None and min(spacing) > 0 else (0.0, 0.0)
    turned = turned or (1.0, 0.0, 0.0, 0.0, 1.0, 0.0)
    kinds = (*facts.text("type").split("\\")[2:], *facts.text("frame_type").split("\\")[2:])
    trigger = facts.number("trigger", math.nan)
    slope, intercept = _scaling(path, facts)
    order = (facts.number("temporal", 0), facts.clock("acquired"), facts.number("instance", 0), index)
    return Frame(
        number=index,
        position_mm=(position[0], position[1], position[2]) if placed and position and columns else None,
        across=(turned[0], turned[1], turned[2]),
        down=(turned[3], turned[4], turned[5]),
        spacing_mm=(columns, rows),
        thickness_mm=facts.number("between", 0) or facts.number("thickness", 0),
        kind=tuple(dict.fromkeys((*filter(None, kinds), *filter(None, [facts.text("component")])))),
        echo=facts.number("echo_number", 0) or round(facts.number("echo", 0), 1),
        trigger_ms=None if math.isnan(trigger) else trigger,
        order=order,
        slope=slope,
        intercept=intercept,
    )


def _scaling(path: Path, facts: Facts) -> tuple[float, float]:
    """Slope and intercept; where Philips tells its own scale, that of the signal, as dcm2niix has it."""
    if facts.garbled("slope") or facts.garbled("intercept"):
        found = "its rescale slope or intercept is no finite number"
        raise damaged(path, found, "Export the series again", code="E_SCALE")
    slope, intercept = facts.number("slope", 1.0), facts.number("intercept", 0.0)
    private = facts.number("philips", 0.0)
    if private > 0 and slope:
        return 1 / private, intercept / (slope * private)
    return slope or 1.0, intercept


def _at_right_angles(turned: tuple[float, ...]) -> bool:
    across, down = turned[:3], turned[3:]
    sizes = (math.hypot(*across), math.hypot(*down))
    product = sum(a * b for a, b in zip(across, down, strict=True))
    return all(abs(size - 1) < 1e-2 for size in sizes) and abs(product) < 1e-2
