"""The picture that a person checks: the images in grey, the tissues over them, and where the model was unsure."""

from __future__ import annotations

import functools
import io
from collections.abc import Sequence
from typing import NamedTuple

import nibabel as nib
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from monai_deepgmm.protocol import Tissue
from monai_deepgmm.results import uncertainty
from monai_deepgmm.results.greys import wall, wall_ranges
from monai_deepgmm.results.segmentation import Segmentation
from monai_deepgmm.results.tiles import grey_tile, heated, outlined, painted, palette, resized

YELLOW = "#ffe27a"
PLANE_NAMES = ("sagittal", "coronal", "axial")

_WIDTH_PX = 960  # the mosaic's width, shared by its columns
_HEIGHT_PX = 1150  # what an A4 sheet holds below a heading at that width
_TILE_PX = 260  # a tile's longer side at most
_MARGIN_MM = 14.0  # shown around the mask
_MAX_SLICES = 24  # rows at most, evenly spaced
_ORTHOGONAL_SLICES = 8  # per orientation of a volume that is one image
_GAP_PX, _GUTTER_PX, _HEAD_PX = 4, 34, 24


class MosaicView(NamedTuple):
    """How the slices of a volume are turned upright: axes swapped and flipped, nothing interpolated.

    Attributes:
        axes: the array axes of (slice, row, column).
        flips: whether the rows and the columns run against their array axis.
        edges: the patient's directions at the left, right, top and bottom edge, such as "R", "L", "A", "P"; oblique
            edges carry two letters.
        plane: index into ``PLANE_NAMES`` of the closest anatomical plane.
    """

    axes: tuple[int, int, int]
    flips: tuple[bool, bool]
    edges: tuple[str, str, str, str]
    plane: int

    def upright(self, volume: np.ndarray) -> np.ndarray:
        """The volume (X, Y, Z) as (slices, rows, columns), a view without a copy."""
        turned = volume.transpose(self.axes)
        rows, columns = (slice(None, None, -1 if flip else 1) for flip in self.flips)
        return turned[:, rows, columns]


class Block(NamedTuple):
    """A grid of tiles of one size, with its headings; no title takes no room."""

    title: str
    row_names: list[str]
    column_names: list[str]
    tiles: list[list[np.ndarray]]  # rows of columns of (height, width, 3) uint8


def view(affine: np.ndarray, slice_axis: int) -> MosaicView:
    """Turns slices the way radiologists look at them, as far as the affine tells.

    The patient's right is on the left of axial and coronal planes and anterior on the left of sagittal ones; anterior
    (axial) or superior (coronal, sagittal) is on top. An oblique plane follows the plane it is closest to.

    Args:
        affine: (4, 4), voxel → mm, towards right, anterior, superior.
        slice_axis: the array axis along which slices are stacked.
    """
    closest = [int(axis) for axis in nib.orientations.io_orientation(affine)[:, 0]]
    plane = closest[slice_axis]
    row_axis, column_axis = closest.index(1 if plane == 2 else 2), closest.index(1 if plane == 0 else 0)
    flips, edges = [], []
    for axis in (row_axis, column_axis):
        direction = affine[:3, axis] / np.linalg.norm(affine[:3, axis])
        # Down is posterior or inferior, right is left or posterior: both run towards the negative world axis.
        flip = bool(direction[closest[axis]] > 0)
        flips.append(flip)
        onward = -direction if flip else direction
        edges.append((_letters(-onward), _letters(onward)))
    (top, bottom), (left, right) = edges
    return MosaicView((slice_axis, row_axis, column_axis), (flips[0], flips[1]), (left, right, top, bottom), plane)


def preview(segmentation: Segmentation) -> bytes:
    """Draws the mosaic that is printed, or seen where no script runs, as a PNG.

    Slices that are images of their own get a row each: every sequence in grey with the mask's outline, then the
    tissues over the reference sequence, then the entropy of the probabilities. A volume that is one image gets
    evenly spaced slices in three orientations.
    """
    if segmentation.protocol.unit == "volume":
        drawn = stacked([_block(segmentation, axis, _ORTHOGONAL_SLICES) for axis in _by_plane(segmentation)])
    else:
        drawn = _rows(_block(segmentation, segmentation.slice_axis, _MAX_SLICES))
    return _png(drawn, segmentation.tissues)


def _png(drawn: Image.Image, tissues: Sequence[Tissue]) -> bytes:
    """One palette for all pictures of a protocol: ten times as fast as looking for the best one."""
    file = io.BytesIO()
    drawn.quantize(palette=palette(tissues), dither=Image.Dither.NONE).save(file, "PNG", compress_level=2)
    return file.getvalue()


def thumbnail(segmentation: Segmentation, side_px: int = 96) -> bytes:
    """The slice with most of the last tissue that is there (scar, lesion), as a small square PNG."""
    axis = _by_plane(segmentation)[0] if segmentation.protocol.unit == "volume" else segmentation.slice_axis
    turned = view(segmentation.reference.affine, axis)
    mm = [float(segmentation.reference.spacing_mm[a]) for a in turned.axes[1:]]
    rows, columns = shown_box(turned.upright(segmentation.mask), mm[0], mm[1], 5.0)
    labels = turned.upright(segmentation.labels)
    counts = np.stack([np.bincount(plane.ravel(), minlength=256) for plane in labels[:, rows, columns]])
    rare = max((t.index for t in segmentation.tissues if counts[:, t.index].any()), default=0)
    k = int(counts[:, rare].argmax())
    cut = np.s_[k : k + 1, rows, columns]
    sides = [(s.stop - s.start) * step for s, step in zip((rows, columns), mm, strict=True)]
    height, width = (max(1, round(side_px * s / max(sides))) for s in sides)
    image = turned.upright(next(iter(segmentation.images.values())))[cut]
    (window,) = wall_ranges(segmentation, image, turned.upright(wall(segmentation))[cut])
    grey = grey_tile(image[0], window, (height, width))
    drawn = Image.new("RGB", (side_px, side_px))
    tile = painted(grey, resized(labels[cut][0], (height, width)), segmentation.tissues)
    drawn.paste(Image.fromarray(tile), ((side_px - width) // 2, (side_px - height) // 2))
    return _png(drawn, segmentation.tissues)


def _rows(block: Block) -> Image.Image:
    """A row per slice; many slices stand in groups side by side, so that a sheet of paper holds them."""
    tiles = [list(row) for row in zip(*block.tiles, strict=True)]
    size = -(-len(tiles) // _groups(len(tiles), len(block.tiles)))
    parts = [
        _grid(Block("", block.column_names[k : k + size], block.row_names, tiles[k : k + size]))
        for k in range(0, len(tiles), size)
    ]
    canvas = Image.new("RGB", (sum(p.width for p in parts), max(p.height for p in parts)), "white")
    for k, part in enumerate(parts):
        canvas.paste(part, (sum(p.width for p in parts[:k]), 0))
    return canvas


def _groups(slices: int, panels: int) -> int:
    """How many groups side by side make the tiles largest."""
    return max((1, 2, 3), key=lambda groups: _side_px(slices, panels, groups))


def _side_px(slices: int, panels: int, groups: int) -> int:
    """The longer side of a tile at most."""
    across = (_WIDTH_PX // groups - _GUTTER_PX) // panels - _GAP_PX
    down = (_HEIGHT_PX - _HEAD_PX) // -(-slices // groups) - _GAP_PX
    return min(_TILE_PX, across, down)


def omitted(slices: int | None, units: Sequence[int | None]) -> str:
    """What a person must know of the slices that ``preview`` leaves out; empty where it shows them all.

    Args:
        slices: how many hold the mask; None where nobody knows.
        units: the slices that are images of their own; (None,) for a volume.
    """
    if None in units:
        return f"{_ORTHOGONAL_SLICES} evenly spaced slices in each of three orientations; the others are not shown."
    if slices is None or slices <= _MAX_SLICES:
        return ""
    return f"{_MAX_SLICES} of {slices} slices with mask, evenly spaced; the others are not shown."


def _by_plane(segmentation: Segmentation) -> list[int]:
    """The array axes in order axial, coronal, sagittal."""
    affine = segmentation.reference.affine
    return sorted(range(3), key=lambda axis: -view(affine, axis).plane)


def _block(segmentation: Segmentation, slice_axis: int, most: int) -> Block:
    """One orientation: a row of tiles per panel, a column per slice."""
    turned = view(segmentation.reference.affine, slice_axis)
    mask = turned.upright(segmentation.mask)
    chosen = _evenly(np.flatnonzero(mask.any(axis=(1, 2))), most)
    spacing_mm = segmentation.reference.spacing_mm
    row_mm, column_mm = float(spacing_mm[turned.axes[1]]), float(spacing_mm[turned.axes[2]])
    rows, columns = shown_box(mask, row_mm, column_mm)
    panels_across = len(segmentation.images) + 2
    if segmentation.protocol.unit == "volume":
        side_px = _side_px(1, most, 1)
    else:
        side_px = _side_px(len(chosen), panels_across, _groups(len(chosen), panels_across))
    height_mm, width_mm = (rows.stop - rows.start) * row_mm, (columns.stop - columns.start) * column_mm
    scale = side_px / max(height_mm, width_mm)
    size = max(1, round(height_mm * scale)), max(1, round(width_mm * scale))

    cut = np.s_[chosen, rows, columns]
    masks = mask[cut]
    walls = turned.upright(wall(segmentation))[cut]
    greys = {
        name: [grey_tile(p, w, size) for p, w in zip(cropped, wall_ranges(segmentation, cropped, walls), strict=True)]
        for name, image in segmentation.images.items()
        for cropped in [turned.upright(image)[cut]]
    }
    outlines = [resized(m, size) for m in masks]
    labels = [resized(plane, size) for plane in turned.upright(segmentation.labels)[cut]]
    chances = np.stack([turned.upright(p)[cut] for p in segmentation.probabilities])
    unsure = uncertainty.entropy(chances)
    reference = next(iter(greys))
    panels = [[outlined(g, o) for g, o in zip(tiles, outlines, strict=True)] for tiles in greys.values()]
    panels.append(
        [painted(g, n, segmentation.tissues, hatch=True) for g, n in zip(greys[reference], labels, strict=True)]
    )
    panels.append([heated(u, g, o, size) for u, g, o in zip(unsure, greys[reference], outlines, strict=True)])
    panels[0][0] = _lettered(panels[0][0], turned.edges)
    panels[0][min(1, len(chosen) - 1)] = _scaled(panels[0][min(1, len(chosen) - 1)], scale)
    names = [*segmentation.images, "tissues", "unsure"]
    return Block(PLANE_NAMES[turned.plane], names, [str(k) for k in chosen], panels)


def _letters(direction: np.ndarray) -> str:
    """The patient's direction a unit vector points to: its main letter, and a second one if it is oblique."""
    order = np.argsort(-np.abs(direction))[:2]
    return "".join(
        ("LR", "PA", "IS")[axis][int(direction[axis] > 0)]
        for rank, axis in enumerate(order)
        if rank == 0 or abs(direction[axis]) > 0.38  # more than about 22 degrees off the main direction
    )


def _evenly(indices: np.ndarray, most: int) -> np.ndarray:
    """All indices, or as many as allowed, evenly spaced and without the very ends."""
    if len(indices) <= most:
        return indices
    return np.asarray(indices[np.linspace(0, len(indices) - 1, most + 2)[1:-1].round().astype(int)])


def shown_box(mask: np.ndarray, row_mm: float, column_mm: float, margin_mm: float = _MARGIN_MM) -> tuple[slice, slice]:
    """The rows and columns that hold the mask in any slice, with a margin, within the image."""
    box, shadow = [], np.any(mask, axis=0)
    for across, step_mm in ((1, row_mm), (0, column_mm)):
        held = np.flatnonzero(np.any(shadow, axis=across))
        margin = int(np.ceil(margin_mm / step_mm))
        size = shadow.shape[1 - across]
        box.append(slice(max(0, int(held[0]) - margin), min(size, int(held[-1]) + 1 + margin)))
    return box[0], box[1]


def _lettered(tile: np.ndarray, edges: tuple[str, str, str, str]) -> np.ndarray:
    """The patient's directions at the tile's left, right, top and bottom edge."""
    picture = Image.fromarray(tile)
    draw, (width, height) = ImageDraw.Draw(picture), picture.size
    places = [
        (5, height // 2, "lm"),
        (width - 5, height // 2, "rm"),
        (width // 2, 4, "mt"),
        (width // 2, height - 4, "mb"),
    ]
    for (x, y, anchor), letters in zip(places, edges, strict=True):
        draw.text((x, y), letters, YELLOW, _font(15), anchor, stroke_width=2, stroke_fill="black")
    return np.asarray(picture)


def _scaled(tile: np.ndarray, px_per_mm: float) -> np.ndarray:
    """A bar of 10 mm in a corner, or of 50 mm where 10 would be too short to see."""
    picture = Image.fromarray(tile)
    draw, bar_mm = ImageDraw.Draw(picture), 10 if 10 * px_per_mm >= 12 else 50
    x, y = 8, picture.height - 9
    draw.line((x, y, x + bar_mm * px_per_mm, y), fill=YELLOW, width=2)
    draw.text((x, y - 4), f"{bar_mm} mm", YELLOW, _font(12), "lb", stroke_width=2, stroke_fill="black")
    return np.asarray(picture)


@functools.lru_cache
def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size)


def stacked(blocks: Sequence[Block]) -> Image.Image:
    """The blocks one below the other on white."""
    parts = [_grid(block) for block in blocks]
    canvas = Image.new("RGB", (max(p.width for p in parts), sum(p.height for p in parts)), "white")
    y = 0
    for part in parts:
        canvas.paste(part, (0, y))
        y += part.height
    return canvas


def _grid(block: Block) -> Image.Image:
    """The tiles of a block with headings above and beside them."""
    height, width = block.tiles[0][0].shape[:2]
    gutter = _GUTTER_PX if all(len(n) < 4 for n in block.row_names) else 2 * _GUTTER_PX
    title_px = _HEAD_PX if block.title else 0
    canvas = Image.new(
        "RGB",
        (
            gutter + len(block.column_names) * (width + _GAP_PX),
            title_px + _HEAD_PX + len(block.row_names) * (height + _GAP_PX),
        ),
        "white",
    )
    draw = ImageDraw.Draw(canvas)
    if block.title:
        draw.text((gutter, title_px // 2), block.title, fill="#1c2733", font=_font(16), anchor="lm")
    for column, name in enumerate(block.column_names):
        x = gutter + column * (width + _GAP_PX) + width // 2
        draw.text((x, title_px + _HEAD_PX // 2), name, fill="#445261", font=_font(14), anchor="mm")
    for row, name in enumerate(block.row_names):
        y = title_px + _HEAD_PX + row * (height + _GAP_PX)
        draw.text((gutter - 8, y + height // 2), name, fill="#445261", font=_font(14), anchor="rm")
        for column, tile in enumerate(block.tiles[row]):
            canvas.paste(Image.fromarray(tile), (gutter + column * (width + _GAP_PX), y))
    return canvas
