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
        before: mutual information without it.
        after: with it.
    """

    matrix: Array
    before: float
    after: float

    @property
    def kept(self) -> bool:
        """Whether it brings enough, and is one that can be."""
        turn = np.degrees(np.arccos(np.clip((np.trace(self.matrix[:3, :3]) - 1) / 2, -1, 1)))
        return self.after > (1 + GAIN) * self.before and turn <= MOST_DEGREES


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
    return None if np.linalg.norm(shift) > MOST_MM else Movement(matrix, before, after)


def _image(values: Array, step: Array) -> Any:
    made = SimpleITK.GetImageFromArray(values.astype(np.float32).transpose(2, 1, 0))
    made.SetSpacing(step.tolist())
    return made


def _search(fixed: Any, moving: Any, middle: Array, step: Array) -> tuple[Any, float, float] | None:
    """The best rigid transform around a point, and mutual information before and after."""
    transform = SimpleITK.Euler3DTransform()
    transform.SetCenter(middle.tolist())
    method = SimpleITK.ImageRegistrationMethod()
    method.SetNumberOfThreads(1)
    method.SetMetricAsMattesMutualInformation(BINS)
    method.SetInterpolator(SimpleITK.sitkLinear)
    method.SetOptimizerAsRegularStepGradientDescent(1.0, LEAST_STEP_MM, STEPS, gradientMagnitudeTolerance=1e-8)
    method.SetOptimizerScalesFromPhysicalShift()
    method.SetInitialTransform(transform, inPlace=True)
    method.SetShrinkFactorsPerLevel([1])
    method.SetSmoothingSigmasPerLevel([0])
    try:
        for level in LEVELS_MM:
            shrink = [max(1, round(level / s)) for s in step]
            pair = [
                SimpleITK.Shrink(SimpleITK.SmoothingRecursiveGaussian(i, [max(level / 2, s / 4) for s in step]), shrink)
                if min(i.GetSize()) >= 4
                else SimpleITK.Shrink(i, shrink)
                for i in (fixed, moving)
            ]
            method.Execute(*pair)
        after = -method.MetricEvaluate(*pair)
        moved = transform.GetParameters()
        transform.SetParameters([0.0] * 6)
        before = -method.MetricEvaluate(*pair)
        transform.SetParameters(moved)
    except RuntimeError:  # of ITK: too few voxels, no contrast, or nothing left of the overlap
        return None
    return transform, before, after
