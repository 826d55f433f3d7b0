"""How bright things are in a synthetic brain: each part's mean, texture and noise on T1, T2 and FLAIR, and shading.

Numbers are typical of scans at 1.5 T; no image went in. Spreads are shares of a sequence's contrast: how far its grey
and white matter lie apart.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from monai_deepgmm.phantom.brain_shapes import Floats, Part, Singles, Waves

#: Mean signal of cortex, deep grey matter, white matter and fluid; deep nuclei lie .3 of the contrast off the cortex.
MEANS: Mapping[str, Floats] = MappingProxyType(
    {
        "T1": np.array([0.62, 0.704, 0.90, 0.28]),
        "T2": np.array([0.58, 0.538, 0.44, 1.00]),
        "FLAIR": np.array([0.70, 0.652, 0.54, 0.14]),
    }
)
SEQUENCES = tuple(MEANS)
#: Standard deviation of the texture within each part.
TEXTURE: Floats = np.array([0.26, 0.24, 0.18, 0.28])
#: The texture's wavelengths in mm, and their shares of its variance.
TEXTURE_SCALES: tuple[tuple[float, float], ...] = ((10.0, 0.6), (45.0, 0.4))
#: The share of its variance that all sequences have in common: what looks more like white matter does so on each.
SHARED = 0.5
#: Texture and noise again, by sequence: T2 and FLAIR tell grey from white matter less well.
SPREAD: Mapping[str, float] = MappingProxyType({"T1": 1.0, "T2": 1.5, "FLAIR": 1.8})
#: How far a part's mean lies off from patient to patient.
BETWEEN = 0.05
#: The scanner's unit, about.
UNIT = 700.0


class Contrast(NamedTuple):
    """How a kind of brain looks.

    Attributes:
        means: of each ``Part``, by sequence.
        spread: of texture and noise, by sequence.
    """

    means: Mapping[str, Floats]
    spread: Mapping[str, float]


HEALTHY = Contrast(MEANS, SPREAD)


def paint(
    tissue: np.random.Generator,
    rng: np.random.Generator,
    noisy: np.random.Generator,
    sequence: str,
    shares: Singles,
    axes: Sequence[Floats],
    noise: float,
    look: Contrast = HEALTHY,
) -> Singles:
    """One sequence in units of its means, ``(X, Y, Z)``: a voxel's signal is the mean of what it holds.

    Args:
        tissue: where the texture comes from that all sequences share.
        rng: where the texture comes from that is this sequence's own.
        noisy: where the noise comes from.
        sequence: one of ``SEQUENCES``.
        shares: of each ``Part`` in each voxel, ``(4, X, Y, Z)``.
        axes: the voxels' centres in mm.
        noise: standard deviation of the noise, as a share of the contrast.
        look: means and spreads.
    """
    means, spread = look.means[sequence], look.spread[sequence]
    contrast = means[Part.WHITE] - means[Part.CORTEX]
    mean = means + BETWEEN * contrast * rng.standard_normal(len(Part))
    grain = np.sqrt(SHARED) * _texture(tissue, axes) + np.sqrt(1 - SHARED) * _texture(rng, axes)
    signal = np.einsum("pxyz,p->xyz", shares, mean.astype(np.float32))
    signal += spread * contrast * np.einsum("pxyz,p->xyz", shares, TEXTURE.astype(np.float32)) * grain
    # A magnitude image: noise in the real and in the imaginary channel.
    real, imaginary = spread * noise * contrast * noisy.standard_normal((2, *signal.shape), dtype=np.float32)
    magnitude: Singles = np.hypot(signal + real, imaginary)
    return magnitude


def _texture(rng: np.random.Generator, axes: Sequence[Floats]) -> Singles:
    """A field of variance 1 on several scales, ``(X, Y, Z)``."""
    fields = [np.sqrt(share) * Waves.draw(rng, length).on(*axes) for length, share in TEXTURE_SCALES]
    return np.asarray(sum(fields), np.float32)


def shading(rng: np.random.Generator, axes: Sequence[Floats], half_mm: Floats, mask: NDArray[np.bool_]) -> Singles:
    """A smooth field whose largest value inside the mask is 1 or -1, ``(X, Y, Z)``; it varies along all axes."""
    u, v, w = np.meshgrid(*(a / h for a, h in zip(axes, half_mm, strict=True)), indexing="ij", sparse=True)
    linear, quadratic, mixed = rng.standard_normal((3, 3))
    field = sum(a * t + b * (t**2 - 0.5) for a, b, t in zip(linear, quadratic, (u, v, w), strict=True))
    field = field + mixed[0] * u * v + mixed[1] * v * w + mixed[2] * u * w
    peak: Singles = (field / np.abs(field[mask]).max()).astype(np.float32)
    return peak


def scanned(signal: Singles, unit: float, mask: NDArray[np.bool_]) -> NDArray[np.int16]:
    """Whole numbers in scanner units: 0 outside the mask, and nowhere inside, as in a skull-stripped scan."""
    whole: NDArray[np.int16] = np.where(mask, np.clip(np.rint(signal * unit), 1, 32767), 0).astype(np.int16)
    return whole
