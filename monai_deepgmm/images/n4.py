"""N4, the well-known way to take the shading off an image before anything else (Tustison et al. 2010), by SimpleITK."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from monai_deepgmm.errors import StudyError

#: Axes are thinned until they have about so many voxels: N4's field is smooth, and N4 is slow.
SIDE = 40
#: An axis with fewer voxels holds no field of its own: each slice along it is corrected alone.
THIN = 8


def field(image: NDArray[Any], mask: NDArray[np.bool_], spacing_mm: tuple[float, ...]) -> NDArray[np.float32]:
    """The bias field that N4 finds: mean 1 over the mask, 1 outside.

    Args:
        image: (X, Y, Z); N4 looks at logarithms, so that values below 0 count as 0.
        mask: (X, Y, Z).
        spacing_mm: of the axes.

    Raises:
        StudyError: ``E_N4``, N4 cannot work on this image.
    """
    thin = [axis for axis, n in enumerate(image.shape) if n < THIN]
    if thin and image.ndim == 3:
        axis = thin[0]
        kept = tuple(s for a, s in enumerate(spacing_mm) if a != axis)
        pairs = zip(np.moveaxis(image, axis, 0), np.moveaxis(mask, axis, 0), strict=True)
        slices = [field(i, m, kept) if m.any() else np.ones(i.shape, np.float32) for i, m in pairs]
        return np.stack(slices, axis)
    found = _whole(image, mask, spacing_mm)
    return np.where(mask, found / found[mask].mean(), 1).astype(np.float32)


def _whole(image: NDArray[Any], mask: NDArray[np.bool_], spacing_mm: tuple[float, ...]) -> NDArray[np.float64]:
    import SimpleITK  # here, as it takes 90 MB

    given = SimpleITK.GetImageFromArray(np.maximum(image, 0).astype(np.float32).T)
    where = SimpleITK.GetImageFromArray(mask.astype(np.uint8).T)
    for volume in (given, where):
        volume.SetSpacing([float(s) for s in spacing_mm])
    shrink = [max(1, round(n / SIDE)) for n in image.shape]
    if not SimpleITK.GetArrayFromImage(SimpleITK.Shrink(where, shrink)).any():
        shrink = [1] * image.ndim  # a mask so thin that it falls between the voxels that are kept
    corrector = SimpleITK.N4BiasFieldCorrectionImageFilter()
    try:
        corrector.Execute(SimpleITK.Shrink(given, shrink), SimpleITK.Shrink(where, shrink))
        log_field = corrector.GetLogBiasFieldAsImage(given)
    except RuntimeError as error:
        reason = str(error).strip().splitlines()[-1]
        remedy = "Do without --set n4=true, or check the image and its mask"
        raise StudyError("E_N4", f"N4 could not correct the image ({reason})", remedy) from error
    found: NDArray[np.float64] = np.exp(SimpleITK.GetArrayFromImage(log_field).T.astype(np.float64))
    if not np.isfinite(found).all():
        raise StudyError("E_N4", "N4 found no finite field", "Do without --set n4=true, or check the image")
    return found
