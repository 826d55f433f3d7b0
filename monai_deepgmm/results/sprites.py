"""What the viewer shows, in the scan's own pixels: sequences, labels and entropy, each one 8-bit PNG of slices."""

from __future__ import annotations

import base64
import io
import json
import math
import zlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from monai_deepgmm.results import uncertainty
from monai_deepgmm.results.greys import wall, wall_ranges
from monai_deepgmm.results.mosaic import MosaicView, shown_box, view
from monai_deepgmm.results.segmentation import Segmentation

#: Grey codes of the lowest value, the wall's range, and the highest value of a slice: the wall has most of the codes,
#: whatever fat or stomach beside it measure.
KNOT_CODES = (0, 40, 215, 255)
#: Added to a tissue's number where the mask holds the pixel.
MASK_BIT = 128
#: Around a heart's mask: the first with which all sequences fit into the pixels below.
MARGINS_MM = (28.0, 20.0, 14.0, 8.0)

_MOST_PIXELS = 420_000  # of all sequences together: noisy ones make half a MB of page
_MOST_BRAIN_PIXELS = 2_400_000  # of all sequences together; of more, every second slice is shown
_ALL_GREYS, _FEWER = 1_200_000, 0b11111100  # of more pixels, these bits: noise makes pages large, and no picture better
_BESIDE = 2  # slices shown beyond either end of the mask
_BRAIN_MM = 2.0
_BRAIN_MARGIN_MM = 6.0
_MOST_ROWS = 16_000  # what every browser decodes
_LEVELS = 15  # of entropy
_CLEAR = 0.1  # by how much one end of a heart must be smaller than the other to be called its apex


class Frame(NamedTuple):
    """What part of a volume is shown, and how coarsely.

    Attributes:
        turned: how the volume is turned upright.
        flipped: whether the slices run against their array axis after that.
        slices: the array indices along the slice axis, in order of array.
        rows: of the upright slices.
        columns: of the upright slices.
        steps: voxels per pixel along (slice, row, column).
    """

    turned: MosaicView
    flipped: bool
    slices: slice
    rows: slice
    columns: slice
    steps: tuple[int, int, int]

    def cut(self, volume: NDArray[Any]) -> NDArray[Any]:
        """The part (slices, rows, columns) of a volume (X, Y, Z), before it is made coarser."""
        upright = self.turned.upright(volume)
        upright = upright[::-1] if self.flipped else upright
        part = upright[self.slices, self.rows, self.columns]
        whole = tuple(n - n % step for n, step in zip(part.shape, self.steps, strict=True))
        return np.asarray(part[tuple(slice(n) for n in whole)])

    def mean(self, volume: NDArray[Any]) -> NDArray[np.float32]:
        """The part, each pixel the mean of its voxels."""
        part = self.cut(volume)
        if self.steps == (1, 1, 1):
            return part.astype(np.float32)
        shape = [m for n, step in zip(part.shape, self.steps, strict=True) for m in (n // step, step)]
        return np.asarray(part.reshape(shape).mean(axis=(1, 3, 5), dtype=np.float32))

    def most(self, labels: NDArray[Any], values: Sequence[int]) -> NDArray[np.uint8]:
        """The part of a label map as numbers: 0 none, k the k-th value; each pixel what most of its voxels are."""
        if self.steps == (1, 1, 1):
            numbers = np.zeros(256, np.uint8)
            numbers[list(values)] = 1 + np.arange(len(values))
            return np.asarray(numbers[self.cut(labels)])
        held = np.stack([self.mean(labels == v) for v in values])
        none = 1 - held.sum(0)
        return np.where(held.max(0) > none, 1 + held.argmax(0), 0).astype(np.uint8)


def sprites(segmentation: Segmentation, reference_labels: NDArray[Any] | None = None) -> dict[str, Any]:
    """Everything that the page's viewer needs, ready for JSON.

    Args:
        segmentation: what is shown.
        reference_labels: (X, Y, Z) indices of tissues by a reader, to be shown beside; None where there are none.
    """
    frame = _brain(segmentation) if segmentation.protocol.unit == "volume" else _heart(segmentation)
    indices = [t.index for t in segmentation.tissues]
    inside = frame.mean(segmentation.mask) >= 0.5
    numbers = frame.most(segmentation.labels, indices)
    walls = frame.mean(wall(segmentation)) >= 0.5
    layers = [
        *(_image(segmentation, frame, name, walls) for name in segmentation.images),
        {"kind": "labels", "name": "labels", "png": _png(numbers + MASK_BIT * inside.astype(np.uint8))},
        {"kind": "entropy", "name": "uncertainty", "png": _png(_unsure(segmentation, frame))},
    ]
    if reference_labels is not None:
        layers.append({"kind": "reference", "name": "reference", "png": _png(frame.most(reference_labels, indices))})
    spacing_mm = [float(segmentation.reference.spacing_mm[axis]) for axis in frame.turned.axes]
    return {
        "planes": 3 if segmentation.protocol.unit == "volume" else 1,
        "shape": list(inside.shape),
        "mm": [round(mm * step, 4) for mm, step in zip(spacing_mm, frame.steps, strict=True)],
        "edges": list(frame.turned.edges),
        "slices": _numbers(segmentation, frame),
        "inside": inside.any(axis=(1, 2)).tolist(),
        "ends": _ends(inside) if segmentation.protocol.unit == "slice" else None,
        "position_mm": _positions(segmentation, frame),
        "tissues": [{"name": t.name, "color": t.color} for t in segmentation.tissues],
        "counts": [np.bincount(plane.ravel(), minlength=len(indices) + 1)[1:].tolist() for plane in numbers],
        "layers": layers,
    }


def as_json(sprites: Mapping[str, Any]) -> bytes:
    """Sprites as they lie in the patient's folder."""
    return json.dumps(sprites, separators=(",", ":")).encode()


def _heart(segmentation: Segmentation) -> Frame:
    """The slices that hold the mask and some beside, around the mask, in native pixels unless these are too many."""
    turned = view(segmentation.reference.affine, segmentation.slice_axis)
    mask = turned.upright(segmentation.mask)
    held = np.flatnonzero(mask.any(axis=(1, 2)))
    slices = slice(max(0, int(held[0]) - _BESIDE), min(len(mask), int(held[-1]) + 1 + _BESIDE))
    row_mm, column_mm = (float(segmentation.reference.spacing_mm[axis]) for axis in turned.axes[1:])
    shadow = np.any(mask, axis=0, keepdims=True)
    for step in (1, 2, 3, 4, 6, 8):
        for margin_mm in MARGINS_MM:
            rows, columns = shown_box(shadow, row_mm, column_mm, margin_mm)
            height, width = ((s.stop - s.start) // step for s in (rows, columns))
            pixels = (slices.stop - slices.start) * height * width * len(segmentation.images)
            if pixels <= _MOST_PIXELS:
                return Frame(turned, False, slices, rows, columns, (1, step, step))
    return Frame(turned, False, slices, rows, columns, (1, step, step))


def _brain(segmentation: Segmentation) -> Frame:
    """The mask's box in axial slices from inferior to superior, of about 2 mm."""
    affine, spacing_mm = segmentation.reference.affine, segmentation.reference.spacing_mm
    axis = max(range(3), key=lambda a: view(affine, a).plane)
    turned = view(affine, axis)
    flipped = bool(affine[2, axis] < 0)
    mask = turned.upright(segmentation.mask)
    mask = mask[::-1] if flipped else mask
    mm = [float(spacing_mm[a]) for a in turned.axes]
    rows, columns = shown_box(mask, mm[1], mm[2], _BRAIN_MARGIN_MM)
    held = np.flatnonzero(mask.any(axis=(1, 2)))
    slices = slice(int(held[0]), int(held[-1]) + 1)
    steps = tuple(max(1, round(_BRAIN_MM / m)) for m in mm)
    sizes = ((part.stop - part.start) // step for part, step in zip((slices, rows, columns), steps, strict=True))
    if math.prod(sizes) * len(segmentation.images) > _MOST_BRAIN_PIXELS:
        steps = (2 * steps[0], *steps[1:])
    while (slices.stop - slices.start) // steps[0] * ((rows.stop - rows.start) // steps[1]) > _MOST_ROWS:
        steps = tuple(step + 1 for step in steps)
    return Frame(turned, flipped, slices, rows, columns, (steps[0], steps[1], steps[2]))


def _image(segmentation: Segmentation, frame: Frame, name: str, walls: NDArray[np.bool_]) -> dict[str, Any]:
    """A sequence in grey codes, with the intensities of ``KNOT_CODES`` in each slice."""
    planes = np.nan_to_num(frame.mean(segmentation.images[name]), posinf=0.0, neginf=0.0)
    ranges = wall_ranges(segmentation, planes, walls)
    whole = [np.percentile(planes, (0.1, 99.9))] * len(planes)
    if segmentation.protocol.unit == "slice":
        whole = [np.percentile(plane, (0.2, 99.8)) for plane in planes]
    coded, knots = np.empty(planes.shape, np.uint8), []
    for k, (plane, (dark, bright), (low, high)) in enumerate(zip(planes, ranges, whole, strict=True)):
        reach = bright - dark
        knot = [min(low, dark - 0.05 * reach), dark, bright, max(high, bright + 0.05 * reach)]
        coded[k] = np.interp(plane, knot, KNOT_CODES).round()
        knots.append([float(f"{v:.5g}") for v in knot])
    if coded.size * len(segmentation.images) > _ALL_GREYS:
        coded &= _FEWER
    return {"kind": "image", "name": name, "knots": knots, "png": _png(coded)}


def _unsure(segmentation: Segmentation, frame: Frame) -> NDArray[np.uint8]:
    if frame.steps == (1, 1, 1):
        unsure = uncertainty.entropy(np.stack([frame.cut(p) for p in segmentation.probabilities]))
    else:
        unsure = frame.mean(uncertainty.entropy(segmentation.probabilities))
    return (np.round(np.clip(unsure, 0, 1) * _LEVELS) * (255 // _LEVELS)).astype(np.uint8)


def _numbers(segmentation: Segmentation, frame: Frame) -> list[int]:
    """The array index of each shown slice."""
    count = segmentation.mask.shape[frame.turned.axes[0]]
    order = np.arange(count)[::-1] if frame.flipped else np.arange(count)
    step, part = frame.steps[0], order[frame.slices]
    return [int(k) for k in part[: len(part) - len(part) % step : step]]


def _positions(segmentation: Segmentation, frame: Frame) -> list[float]:
    """Where each shown slice lies along the normal of the stack, in mm from the first."""
    spacing_mm = float(segmentation.reference.spacing_mm[frame.turned.axes[0]])
    numbers = _numbers(segmentation, frame)
    return [round(abs(k - numbers[0]) * spacing_mm, 2) for k in numbers]


def _ends(inside: NDArray[np.bool_]) -> list[str] | None:
    """What the first and the last slice with a mask are, "base" or "apex"; None where neither is clearly smaller."""
    area = inside.sum(axis=(1, 2))
    held = np.flatnonzero(area)
    if len(held) < 3:
        return None
    few = max(1, len(held) // 3)
    first, last = area[held[:few]].mean(), area[held[-few:]].mean()
    if abs(first - last) < _CLEAR * max(first, last):
        return None
    return ["base", "apex"] if first > last else ["apex", "base"]


def _png(planes: NDArray[np.uint8]) -> str:
    """Slices (n, rows, columns) one below the other, as base64.

    Runs alone are looked for: noise repeats nothing else, so that pictures come out smaller, in half the time.
    """
    file = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(planes).reshape(-1, planes.shape[2])).save(
        file, "PNG", compress_type=zlib.Z_RLE
    )
    return base64.b64encode(file.getvalue()).decode("ascii")
