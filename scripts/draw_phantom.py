#!/usr/bin/env python
"""Draws the README's picture: three sequences of a synthetic patient, the tissues found, and a legend.

    python scripts/draw_phantom.py bundle/docs/phantom.png

The patient is made by ``deepgmm phantom``, and segmented by the default method; of its slices, that is drawn whose
rarest tissue has most voxels.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageColor, ImageDraw, ImageFont

from monai_deepgmm import configure, find_cohort, segment
from monai_deepgmm.cli import main as deepgmm
from monai_deepgmm.protocol import Tissue
from monai_deepgmm.results import mosaic
from monai_deepgmm.results.greys import grey_range
from monai_deepgmm.results.segmentation import Segmentation
from monai_deepgmm.results.tiles import MASK_COLOR, grey_tile, outlined, painted, palette, resized

#: A tile's side, the gap between tiles, and the height of the headings and of the legend.
TILE_PX, GAP_PX, HEAD_PX, LEGEND_PX = 296, 8, 40, 50
INK, PAPER = "#20242c", "#ffffff"


def main() -> None:
    """Makes, segments and draws the patient."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("out", metavar="PNG", type=Path, help="the file to write")
    parser.add_argument("--seed", type=int, default=11, help="of the patient")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        deepgmm(["phantom", f"{folder}/patients", "-n", "1", "--seed", str(arguments.seed)])
        config = configure(protocol="infarct")
        study = find_cohort(Path(folder, "patients"), config.protocol).studies[0]
        found = segment(study, config)
    draw(found).save(arguments.out, "PNG", optimize=True)


def draw(found: Segmentation) -> Image.Image:
    """The sequences in grey, the tissues over the first of them, and what the colours mean."""
    view = mosaic.view(found.reference.affine, found.slice_axis)
    counts = [[int((plane == t.index).sum()) for t in found.tissues] for plane in view.upright(found.labels)]
    k = max(range(len(counts)), key=lambda index: min(counts[index]))
    row_mm, column_mm = (float(found.reference.spacing_mm[axis]) for axis in view.axes[1:])
    box = mosaic.shown_box(view.upright(found.mask)[[k]], row_mm, column_mm, 16.0)
    size = (TILE_PX, TILE_PX)
    mask = view.upright(found.mask)[k][box]
    greys = []
    for image in found.images.values():
        plane = view.upright(image)[k][box]
        greys.append(grey_tile(plane, grey_range(plane[mask > 0]), size))
    outline = resized(mask, size)
    labels = resized(view.upright(found.labels)[k][box], size)
    tiles = [*(outlined(grey, outline) for grey in greys), painted(greys[0], labels, found.tissues)]
    return composed(tiles, [*found.images, "tissues found"], found.tissues)


def composed(tiles: Sequence[np.ndarray], names: Sequence[str], tissues: Sequence[Tissue]) -> Image.Image:
    """Tiles side by side under their names, above a legend."""
    width = len(tiles) * (TILE_PX + GAP_PX) + GAP_PX
    canvas = Image.new("RGB", (width, HEAD_PX + TILE_PX + LEGEND_PX), PAPER)
    pen, font = ImageDraw.Draw(canvas), ImageFont.load_default(19)
    for k, (tile, name) in enumerate(zip(tiles, names, strict=True)):
        left = GAP_PX + k * (TILE_PX + GAP_PX)
        canvas.paste(Image.fromarray(tile), (left, HEAD_PX))
        pen.text((left + TILE_PX / 2, HEAD_PX / 2), name, fill=INK, font=font, anchor="mm")
    entries = [*((t.name, t.color) for t in tissues), ("mask", "#{:02x}{:02x}{:02x}".format(*MASK_COLOR))]
    side, middle = 18, HEAD_PX + TILE_PX + LEGEND_PX / 2
    widths = [side + 10 + pen.textlength(name, font=font) + 34 for name, _ in entries]
    left = (width - sum(widths) + 34) / 2
    for (name, color), step in zip(entries, widths, strict=True):
        square = (left, middle - side / 2, left + side, middle + side / 2)
        if name == "mask":  # an outline in the picture, and here
            pen.rectangle(square, outline=ImageColor.getrgb(color), width=3)
        else:
            pen.rectangle(square, fill=ImageColor.getrgb(color))
        pen.text((left + side + 10, middle), name, fill=INK, font=font, anchor="lm")
        left += step
    return canvas.quantize(palette=palette(tissues), dither=Image.Dither.NONE)


if __name__ == "__main__":
    main()
