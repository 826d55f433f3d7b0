"""How a whole sequence lies beside the reference: one rigid movement, by mutual information (SimpleITK).

Mattes et al., IEEE Trans Med Imaging 2003. All voxels of the region count and one thread adds them up, so that the
same images give the same movement.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import SimpleITK
from numpy.typing import NDArray

Array = NDArray[np.floating[Any]]
Bools = NDArray[np.bool_]

#: How much around the mask is looked at, and voxels of the coarsest and the finest level, in mm.
AROUND_MM, LEVELS_MM = 15.0, (4.0, 2.0)
#: Bins of the histogram; steps of the search at most, and how small they get, in mm.
BINS, STEPS, LEAST_STEP_MM = 32, 100, 0.01
#: Mutual information must grow by this share of itself.
GAIN = 0.05
#: So far a sequence can lie beside the reference, in mm and degrees.
MOST_MM, MOST_DEGREES = 30.0, 20.0


class Movement(NamedTuple):
    """A rigid movement of a whole sequence.

    Attributes:
        matrix: 4 × 4, from a place in the reference to the same place in the sequence; places are in mm along the
            axes of the reference's grid, from its first voxel.
        before: how well images agree without it.
        after: with it.
        kept: whether it brings enough.
    """

    matrix: Array
    before: float
    after: float
    kept: bool


def movement(fixed: Array, moving: Array, mask: Bools, spacing_mm: Sequence[float]) -> Movement | None:
    """How a sequence has to be looked up to agree with the reference around a mask.

    Args:
        fixed: the reference ``(X, Y, Z)``.
        moving: the sequence, on the same grid.
        mask: of the organ, as it lies in the reference.
        spacing_mm: of the axes.

    Returns:
        The movement, or None where it cannot be found.
    """
    step = np.asarray(spacing_mm, float)
    where = np.argwhere(mask)
    low, high = where.min(0), where.max(0) + 1
    margin = np.ceil(AROUND_MM / step).astype(int)
    box = tuple(slice(int(a), int(b)) for a, b in zip(np.maximum(low - margin, 0), high + margin, strict=True))
    middle = ((low + high - 1) / 2 - [b.start for b in box]) * step
    found = _search(_image(fixed[box], step), _image(moving[box], step), middle, step)
    if found is None:
        return None
    transform, before, after = found
    matrix = np.eye(4)
    matrix[:3, :3] = np.array(transform.GetMatrix()).reshape(3, 3)
    centre = middle + np.array([b.start for b in box]) * step
    shift = np.array(transform.GetTranslation())
    matrix[:3, 3] = centre + shift - matrix[:3, :3] @ centre
    turn = np.degrees(np.arccos(np.clip((np.trace(matrix[:3, :3]) - 1) / 2, -1, 1)))
    possible = np.linalg.norm(shift) <= MOST_MM and turn <= MOST_DEGREES
    return Movement(matrix, before, after, bool(possible and after > (1 + GAIN) * before))


def _image(values: Array, step: Array) -> Any:
    made = SimpleITK.GetImageFromArray(values.astype(np.float32).transpose(2, 1, 0))
    made.SetSpacing(step.tolist())
    return made


def _search(fixed: Any, moving: Any, middle: Array, step: Array) -> tuple[Any, float, float] | None:
    """The best rigid transform around a point, and mutual information before and after."""
    start = SimpleITK.Euler3DTransform()
    start.SetCenter(middle.tolist())
    best = SimpleITK.Euler3DTransform(start)
    try:
        for level in LEVELS_MM:
            pair = [_coarser(image, level, step) for image in (fixed, moving)]
            found = _method(best).Execute(*pair)
            best = SimpleITK.Euler3DTransform(start)
            best.SetParameters(found.GetParameters())
        before, after = (-_method(each).MetricEvaluate(*pair) for each in (start, best))
    except RuntimeError:  # of ITK: too few voxels, no contrast, or nothing left of the overlap
        return None
    return best, before, after


def _method(start: Any) -> Any:
    """What searches, from a transform."""
    made = SimpleITK.ImageRegistrationMethod()
    made.SetNumberOfThreads(1)
    made.SetMetricAsMattesMutualInformation(BINS)
    made.SetInterpolator(SimpleITK.sitkLinear)
    made.SetOptimizerAsRegularStepGradientDescent(1.0, LEAST_STEP_MM, STEPS, gradientMagnitudeTolerance=1e-8)
    made.SetOptimizerScalesFromPhysicalShift()
    made.SetInitialTransform(start, inPlace=False)
    return made


def _coarser(image: Any, level_mm: float, step: Array) -> Any:
    """The image on a coarser grid, smoothed before along the axes that are thinned."""
    thinned = [max(1, round(level_mm / s)) for s in step]
    smooth = [level_mm / 2 if n > 1 else 0.0 for n in thinned]
    return SimpleITK.Shrink(SimpleITK.DiscreteGaussian(image, [s * s for s in smooth], useImageSpacing=True), thinned)
