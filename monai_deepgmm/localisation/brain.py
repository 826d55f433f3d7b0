"""The brain in a head that still has its skull, by deepbet (Fisch et al. 2024), an extra that carries its weights.

Only its network and its clean-up are used; it reads and writes no file here, and asks no network.
"""

from __future__ import annotations

import functools
from typing import Any

import nibabel as nib
import numpy as np
from numpy.typing import NDArray

from monai_deepgmm.errors import StudyError
from monai_deepgmm.localisation import probable_mask
from monai_deepgmm.localisation.probable_mask import Found

#: What a message tells to type.
PIP = "pip install deepbet"
#: From this probability on a voxel is brain.
LEAST = 0.5


def find(image: NDArray[np.floating[Any]], affine: NDArray[np.float64]) -> Found:
    """Finds the brain on T1.

    Args:
        image: ``(X, Y, Z)``, in any orientation.
        affine: voxel index → mm (RAS).

    Raises:
        StudyError: ``E_MASK_NONE``, the extra is not installed.
    """
    finder = _finder()
    turn = nib.orientations.io_orientation(affine)
    upright = nib.orientations.apply_orientation(np.nan_to_num(image, posinf=0, neginf=0), turn)
    try:
        sure = finder.run_model(np.ascontiguousarray(upright, np.float32))
        mask = finder.postprocess((sure > LEAST).copy())
    except (AssertionError, ValueError, RuntimeError):  # no foreground, nothing that looks like a brain
        return Found(np.zeros(image.shape, bool), 0.0)
    back = nib.orientations.ornt_transform([[0, 1], [1, 1], [2, 1]], turn)
    return probable_mask.found(*(nib.orientations.apply_orientation(a, back) for a in (mask > 0, sure)))


@functools.lru_cache(maxsize=1)
def _finder() -> Any:
    """Its networks, on the CPU; kept for the next patient."""
    try:
        from deepbet import BrainExtraction
    except ImportError as error:
        message = "no mask was given, and what finds the brain in a head is not installed"
        raise StudyError("E_MASK_NONE", message, f"{PIP}, or give a mask file") from error
    return BrainExtraction(no_gpu=True)
