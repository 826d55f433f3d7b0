"""Tissues can be told apart by readers with deuteranopia and in grey print, also blended over bright and dark."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest
from PIL import ImageColor

from monai_deepgmm import protocol
from monai_deepgmm.results.tiles import FILL

XYZ = np.array(
    [[0.4124564, 0.3575761, 0.1804375], [0.2126729, 0.7151522, 0.0721750], [0.0193339, 0.1191920, 0.9503041]]
)
#: Machado, Oliveira and Fernandes 2009, severity 1, on linear RGB.
DEUTERANOPIA = np.array(
    [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]]
)


def linear(rgb: np.ndarray) -> np.ndarray:
    return np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)


def lab(light: np.ndarray) -> np.ndarray:
    """Linear RGB (…, 3) → CIE L*a*b* under D65."""
    x = np.clip(light, 0, 1) @ XYZ.T / np.array([0.95047, 1.0, 1.08883])
    f = np.where(x > 216 / 24389, np.cbrt(x), (24389 / 27 * x + 16) / 116)
    return np.stack([116 * f[..., 1] - 16, 500 * (f[..., 0] - f[..., 1]), 200 * (f[..., 1] - f[..., 2])], axis=-1)


EYES = {
    "all colours": lambda light: light,
    "deuteranopia": lambda light: light @ DEUTERANOPIA.T,
    "grey print": lambda light: np.repeat((light @ XYZ[1])[..., None], 3, axis=-1),
}


def test_lab_knows_white_black_and_red():
    found = lab(linear(np.array([[1, 1, 1], [0, 0, 0], [1, 0, 0]], dtype=float)))
    assert found == pytest.approx(np.array([[100, 0, 0], [0, 0, 0], [53.24, 80.09, 67.20]]), abs=0.05)


@pytest.mark.parametrize("name", protocol.names())
@pytest.mark.parametrize("under", [None, 0.0, 1.0], ids=["solid", "over black", "over white"])
@pytest.mark.parametrize("eyes", EYES)
def test_any_two_tissues_differ_by_ten(name, under, eyes):
    """ΔE*ab (CIE 1976): 2.3 is just noticeable. In a heart or brain any two tissues may touch."""
    colors = {t.name: np.array(ImageColor.getrgb(t.color)) / 255 for t in protocol.load(name).tissues}
    if under is not None:
        colors = {tissue: FILL * c + (1 - FILL) * under for tissue, c in colors.items()}
    seen = {tissue: lab(EYES[eyes](linear(c))) for tissue, c in colors.items()}
    apart = {(a, b): float(np.linalg.norm(seen[a] - seen[b])) for a, b in combinations(seen, 2)}
    assert {pair: d for pair, d in apart.items() if d < 10} == {}
