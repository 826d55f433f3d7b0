"""One cavity in the mask of a ventricle, or two."""

from __future__ import annotations

import nibabel as nib
import numpy as np
import pytest
from conftest import AFFINE, heart, save

from monai_deepgmm import protocol
from monai_deepgmm.cli import main
from monai_deepgmm.images import mask_cavities

INFARCT = protocol.load("infarct")
SPACING = (1.5, 1.5, 8.0)


def pools(*middles: tuple[int, int], noise: float = 5.0) -> tuple[np.ndarray, np.ndarray]:
    """Bright discs with walls around them on bSSFP: (1, X, Y, Z) and the mask of all of them."""
    shape = (60, 40, 2)
    x, y, _ = np.meshgrid(*(np.arange(n) for n in shape), indexing="ij")
    away = np.min([np.hypot(x - a, y - b) for a, b in middles], axis=0)
    image = np.select([away < 9, away < 13], [200.0, 60.0], 20.0)
    return (image + np.random.default_rng(0).normal(0, noise, shape)).astype(np.float32)[None], away < 13


@pytest.mark.parametrize("noise", [5.0, 30.0])
def test_two_ventricles_are_told_and_one_is_not(noise):
    one, two = pools((20, 20), noise=noise), pools((16, 20), (40, 20), noise=noise)
    assert [*mask_cavities.about(*one, SPACING, 2, INFARCT, ["bSSFP"])] == []
    (told,) = mask_cavities.about(*two, SPACING, 2, INFARCT, ["bSSFP"])
    assert told.startswith("W_MASK_SHAPE: on bSSFP the mask holds two separate bright pools in slice ")
    assert [*mask_cavities.about(*two, SPACING, 2, INFARCT, ["LGE"])] == []  # where scar is as bright
    assert [*mask_cavities.about(*two, SPACING, 2, protocol.load("brain"), ["T1"])] == []


def test_papillary_muscles_part_a_small_cavity_near_the_apex():
    image, mask = pools((20, 20))
    x, y, _ = np.meshgrid(*(np.arange(n) for n in mask.shape), indexing="ij")
    parted = np.min([np.hypot(x - 20, y - b) for b in (15, 25)], axis=0) < 4
    image[0, ..., 1] = np.where(parted, 200, np.where(mask, 60, 20))[..., 1]
    assert [*mask_cavities.about(image, mask, SPACING, 2, INFARCT, ["bSSFP"])] == []
    alone = image[..., 1:], mask[..., 1:]
    assert len([*mask_cavities.about(*alone, SPACING, 2, INFARCT, ["bSSFP"])]) == 1


@pytest.mark.usefixtures("no_picture")
def test_through_the_command(make_patient, tmp_path, capsys):
    files = make_patient(tmp_path / "in", "p")
    labels, image = heart(), np.asarray(nib.load(files["C0"]).dataobj).copy()
    x, y, _ = np.meshgrid(*(np.arange(n) for n in labels.shape), indexing="ij")
    beside = np.hypot(x - 24, y - 43) < 8
    image[beside & (labels == 0)] = image[labels == 500].mean()
    labels[beside & (labels == 0)] = 200
    save(files["C0"], image, AFFINE)
    save(files["gd"], labels, AFFINE)
    assert main(["segment", str(tmp_path / "in"), str(tmp_path / "out"), "--dry-run"]) == 0
    assert "two separate bright pools" in capsys.readouterr().out
