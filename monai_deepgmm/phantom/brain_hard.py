"""What makes a sick brain harder than a healthy one: lesions, vessels, and the dark edge that skull stripping leaves.

Numbers are those of two patients with multiple sclerosis (OpenMS 07 and 19, stripped, then resampled to 1 mm): medians
and spreads of their tissues and lesions, and of what lies so deep. A resampled edge mixes brain with nothing, so that
its voxels are dark in every sequence: a fit that takes them for tissue loses grey or white matter to them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import gaussian_filter

from monai_deepgmm.phantom.brain_contrast import Contrast
from monai_deepgmm.phantom.brain_shapes import Floats, Singles

#: Grey matter is nearer to white than in ``brain_contrast.MEANS``, and both vary more, above all on T2 and FLAIR.
SICK = Contrast(
    MappingProxyType(
        {
            "T1": np.array([0.675, 0.73, 0.90, 0.27]),
            "T2": np.array([0.57, 0.54, 0.44, 1.10]),
            "FLAIR": np.array([0.62, 0.60, 0.54, 0.22]),
        }
    ),
    MappingProxyType({"T1": 1.3, "T2": 2.0, "FLAIR": 2.6}),
)
#: Signal of a lesion, in the same units, and how much it varies from lesion to lesion.
LESION: Mapping[str, float] = MappingProxyType({"T1": 0.69, "T2": 0.80, "FLAIR": 0.75})
VARIES = 0.06
#: How many lesions, their radii in mm, and how far from anything but white matter their middle lies, in mm.
NUMBER, RADII_MM, DEEP_MM = 14, (2.5, 7.0), 3.0
#: The edge is blurred by so many voxels (standard deviation), and ends where this share of the brain is left.
BLUR, LEAST = 0.8, 0.15
#: The share of voxels that hold a vessel, bright on T1, and how bright, at most.
VESSELS, BRIGHTEST = 0.001, 3.4


class Hard(NamedTuple):
    """What one brain has besides its tissues.

    Attributes:
        lesion: its share of each voxel, ``(X, Y, Z)``.
        bright: how bright each voxel's lesion is, as a factor, ``(X, Y, Z)``.
        edge: the share of signal that the edge leaves, ``(X, Y, Z)``.
        mask: the brain with its edge, ``(X, Y, Z)``.
        vessels: where they are, ``(X, Y, Z)``.
    """

    lesion: Singles
    bright: Singles
    edge: Singles
    mask: NDArray[np.bool_]
    vessels: NDArray[np.bool_]

    def on(self, sequence: str, signal: Singles) -> Singles:
        """One sequence's signal, with all of it ``(X, Y, Z)``."""
        found = signal * (1 - self.lesion) + self.lesion * self.bright * LESION[sequence]
        if sequence == "T1":
            found = np.where(self.vessels, found * BRIGHTEST, found)
        dark: Singles = (found * self.edge).astype(np.float32)
        return dark


def drawn(rng: np.random.Generator, white: Singles, held: Singles, axes: Sequence[Floats]) -> Hard:
    """Lesions in white matter, vessels anywhere, and the edge.

    Args:
        rng: where chance comes from.
        white: the share of white matter in each voxel ``(X, Y, Z)``.
        held: the share of the brain as a whole.
        axes: the voxels' centres in mm.
    """
    step = np.array([axis[1] - axis[0] for axis in axes])
    brain = held >= 0.5
    deep = gaussian_filter(white, DEEP_MM / 2 / step) > 0.9
    lesion, bright = np.zeros(white.shape, np.float32), np.ones(white.shape, np.float32)
    places = np.argwhere(deep & brain)
    for place in places[rng.integers(0, len(places), NUMBER if len(places) else 0)]:
        radius = rng.uniform(*RADII_MM) * rng.uniform(0.7, 1.3, 3)
        level = 1 + VARIES * rng.standard_normal()
        squares = [((a - a[i]) / r) ** 2 for a, i, r in zip(axes, place, radius, strict=True)]
        away = np.sqrt(squares[0][:, None, None] + squares[1][:, None] + squares[2])
        share = np.clip(0.5 + (1 - away) * radius.min() / step.max(), 0, 1) * white
        bright = np.where(share > lesion, level, bright).astype(np.float32)
        lesion = np.maximum(lesion, share).astype(np.float32)
    edge = gaussian_filter(brain.astype(np.float32), BLUR)
    return Hard(lesion, bright, edge, edge > LEAST, rng.random(white.shape) < VESSELS)
