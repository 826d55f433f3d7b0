"""One slice as a picture: in grey, with a mask's outline, with tissues over it, with how unsure the model was."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageColor

from monai_deepgmm.protocol import Tissue

#: From certain to unsure; the page's legend shows the same ramp.
UNCERTAINTY_COLORS = ("#10131a", "#3b2a6b", "#a53a7a", "#f08a4b", "#fdf3b5")
MASK_COLOR = (90, 225, 235)
#: Opacity of a tissue over the image: with it, the protocols' colours differ on white and black, and in grey print.
FILL = 0.55

_HATCH_PX = 7  # between the lines that tell tissues apart in grey print


def grey_tile(plane: np.ndarray, window: tuple[float, float], size: tuple[int, int]) -> np.ndarray:
    """(rows, columns) intensities → (height, width, 3) uint8."""
    low, high = window
    filled = np.nan_to_num(plane.astype(np.float32), nan=low, posinf=high, neginf=low)
    grey = np.clip((filled - low) / (high - low), 0, 1) * 255
    return np.repeat(resized(grey.astype(np.uint8), size, smooth=True)[..., None], 3, axis=2)


def resized(plane: np.ndarray, size: tuple[int, int], *, smooth: bool = False) -> np.ndarray:
    """(rows, columns) → (height, width); labels keep their values, images are interpolated."""
    method = Image.Resampling.BICUBIC if smooth else Image.Resampling.NEAREST
    picture = Image.fromarray(np.ascontiguousarray(plane, dtype=np.uint8)).resize((size[1], size[0]), method)
    return np.asarray(picture)


def _edges(labels: np.ndarray) -> np.ndarray:
    """The outermost pixels of every region, on its inner side (height, width)."""
    padded = np.pad(labels, 1)
    centre = padded[1:-1, 1:-1]
    outer = (centre != padded[:-2, 1:-1]) | (centre != padded[2:, 1:-1])
    outer |= (centre != padded[1:-1, :-2]) | (centre != padded[1:-1, 2:])
    return np.asarray(outer & (centre > 0))


def outlined(grey: np.ndarray, outline: np.ndarray) -> np.ndarray:
    """The border of a mask over the image, both (height, width)."""
    tile = grey.copy()
    edge = _edges(outline)
    tile[edge] = (0.3 * tile[edge] + 0.7 * np.array(MASK_COLOR)).astype(np.uint8)
    return tile


def painted(grey: np.ndarray, labels: np.ndarray, tissues: Sequence[Tissue], *, hatch: bool = False) -> np.ndarray:
    """The tissues over the image: see-through inside, solid along their borders.

    Args:
        grey: (height, width, 3) uint8 of equal channels.
        labels: (height, width) indices of tissues.
        tissues: their colours.
        hatch: with lines whose direction tells the tissue's index, for print without colours.
    """
    colors = np.zeros((256, 3), dtype=np.float32)
    colors[[t.index for t in tissues]] = [_rgb(t.color) for t in tissues]
    tile, edge, here = grey.copy(), _edges(labels), np.isin(labels, [t.index for t in tissues])
    inside = here & ~edge
    tile[inside] = ((1 - FILL) * grey[inside] + FILL * colors[labels[inside]]).astype(np.uint8)
    if hatch:
        tile[inside & _lines(labels)] //= 2
    tile[here & edge] = colors[labels[here & edge]].astype(np.uint8)
    return tile


def _lines(labels: np.ndarray) -> np.ndarray:
    """Where lines run over each label, in the direction of its own (height, width)."""
    y, x = np.indices(labels.shape, dtype=np.int16)
    kinds = (np.full(labels.shape, -1, dtype=np.int16), x + y, x - y, np.where(x % _HATCH_PX == 0, 0, y))
    return np.asarray(np.choose((labels + np.uint8(len(kinds) - 1)) % len(kinds), kinds) % _HATCH_PX == 0)


def heated(unsure: np.ndarray, grey: np.ndarray, outline: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """The entropy inside the mask, over a faint image outside."""
    heat = _ramp(resized((np.clip(unsure, 0, 1) * 255).astype(np.uint8), size))
    return np.where(outline[..., None] > 0, heat, grey * 0.35).astype(np.uint8)


def _ramp(level: np.ndarray) -> np.ndarray:
    """Entropy from 0 to 255 as colours (…, 3)."""
    ramp = np.array([_rgb(color) for color in UNCERTAINTY_COLORS], dtype=np.float64)
    at = np.linspace(0, 255, len(ramp))
    return np.stack([np.interp(level, at, ramp[:, channel]) for channel in range(3)], axis=-1)


def _rgb(color: str) -> tuple[int, int, int]:
    red, green, blue, *_ = ImageColor.getrgb(color)
    return red, green, blue


def palette(tissues: Sequence[Tissue]) -> Image.Image:
    """64 greys, the ramp of entropy, and each tissue solid, over greys, and under a hatch."""
    grey = np.linspace(0, 255, 64)[:, None].repeat(3, axis=1)
    colors = np.array([_rgb(t.color) for t in tissues] + [MASK_COLOR], dtype=np.float64)
    steps = max(1, (256 - 64 - 32) // len(colors) - 1)
    under = np.linspace(0, 255, steps)[:, None, None]
    mixed = (FILL * colors + (1 - FILL) * under).reshape(-1, 3)
    content = np.concatenate([grey, _ramp(np.linspace(0, 255, 32)), colors, mixed]).round().astype(np.uint8)
    held = Image.new("P", (1, 1))
    held.putpalette(content.tobytes())
    return held
