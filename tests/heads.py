"""A head: a ball of brain in a skull and a scalp, or without them."""

from __future__ import annotations

from pathlib import Path

import nibabel as nib
import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.floating]

#: Where the brain of a head ends, in mm from its centre; the skull and the scalp lie around it.
BRAIN_MM, SKULL_MM, SCALP_MM = 60, 70, 78


def head(noise: float = 0, *, strip: bool = False) -> Array:
    """A ball of brain, 1.1 l on 3 mm voxels, in a skull and a scalp; or without them."""
    shape = (56, 56, 54)
    away = 3 * np.sqrt(((np.moveaxis(np.indices(shape), 0, -1) - np.array(shape) / 2) ** 2).sum(-1))
    tissue = np.select([away < 45, away < BRAIN_MM - 4, away < BRAIN_MM], [100, 70, 35], 0)
    if not strip:
        tissue = np.select([away < BRAIN_MM, away < SKULL_MM, away < SCALP_MM], [tissue, 8, 160], 0)
    return tissue + noise * np.abs(np.random.default_rng(2).normal(size=shape)) * (1 if noise else 0)


def write(folder: Path, image: Array, affine: Array | None = None) -> Path:
    """A patient with T1 alone, its tissues uneven by 1."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(1)
    image = np.where(image == image[0, 0, 0], image, image + rng.normal(0, 1, image.shape))
    affine = np.diag([3.0, 3, 3, 1]) if affine is None else affine
    nib.save(nib.Nifti1Image(image.astype(np.float32), affine), folder / "T1.nii.gz")
    return folder
