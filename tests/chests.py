"""A left ventricle with a right one, lung and a body around it, in three sequences."""

from __future__ import annotations

import numpy as np
from scipy.ndimage import gaussian_filter

SPACING = (1.6, 1.6, 10.0)
SEQUENCES = ("LGE", "T2", "bSSFP")
#: Blood, wall, right ventricle, lung, and the body around them, in each sequence.
LEVELS = {"LGE": (180, 60, 170, 20, 110), "T2": (40, 120, 50, 20, 150), "bSSFP": (220, 90, 200, 20, 120)}


def body(centre=(70.0, 58.0), radius=30.0, slices=4, seed=0, empty=()):
    """Images (M, X, Y, Z) of a left ventricle (none in empty slices), a right one, lung and body; and the ventricle."""
    x, y = np.meshgrid(*(np.arange(n) * 1.0 for n in (128, 112)), indexing="ij")
    labels = np.full((128, 112, slices), 4)
    labels[np.hypot((x - 64) / 60, (y - 56) / 52) > 1] = 5
    for z in set(range(slices)) - set(empty):
        outer = (radius - 3 * z) / SPACING[0]
        away = np.hypot(x - centre[0], y - centre[1])
        labels[np.hypot(x - centre[0] - 26, y - centre[1]) < 16, z] = 3
        labels[np.hypot(x - centre[0] + 6, y - centre[1] + 22) < 12, z] = 2
        labels[away < outer, z] = 1
        labels[away < outer - 6, z] = 0
    rng = np.random.default_rng(seed)
    image = []
    for levels in LEVELS.values():
        painted = np.array([*levels, 0.0])[labels]
        texture = gaussian_filter(rng.normal(0, 140, labels.shape), (2, 2, 0))
        image.append(gaussian_filter(painted, (0.6, 0.6, 0)) + texture + rng.normal(0, 6, labels.shape))
    return np.stack(image), labels <= 1


def dice(a, b):
    return 2 * (a & b).sum() / (a.sum() + b.sum())
