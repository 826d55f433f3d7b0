"""The classical infarct thresholds: from the wall's intensities in one slice to that above which scar lies."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt

from monai_deepgmm.images.otsu import otsu

Labels = npt.NDArray[np.int64]
Values = npt.NDArray[np.floating[Any]]


#: With fewer voxels than these in a slice, the remote region is that of all slices.
REMOTE_VOXELS = 10


def fwhm(values: Values, remote: Values | None = None) -> float:
    """Half way between the least and the greatest of ``(N,)`` intensities of the wall; no remote region is needed."""
    return float(values.min() + values.max()) / 2


def n_sd(n: int, values: Values, remote: Values | None = None) -> float:
    """So many standard deviations above the mean of the remote wall.

    Args:
        n: how many.
        values: of the wall ``(N,)``.
        remote: of its reference region; None: the darker half of the wall.
    """
    reference = values[values <= np.median(values)] if remote is None else remote
    return float(reference.mean() + n * reference.std())


THRESHOLDS: Mapping[str, Callable[..., float]] = {
    "Otsu": lambda values, remote=None: otsu(values),
    **{f"{n}SD": partial(n_sd, n) for n in (2, 3, 5, 6)},
    "FWHM": fwhm,
}


def shares(
    image: Values, wall: npt.NDArray[np.bool_], remote: npt.NDArray[np.bool_], axis: int
) -> dict[str, float | None]:
    """What percentage of the wall lies above each threshold, which is taken slice by slice.

    Args:
        image: intensities ``(X, Y, Z)``.
        wall: where the wall is.
        remote: where it is healthy: the reference of the n-SD thresholds, slice by slice, or over all slices where a
            slice has fewer than ``REMOTE_VOXELS``.
        axis: along which slices are stacked.

    Returns:
        Threshold → percent; None without a wall, and of n SD without a remote region.
    """
    anywhere = image[remote]
    found = dict.fromkeys(THRESHOLDS, 0)
    for values, healthy, inside in labelled(axis, image, remote, wall):
        around, own = values[inside], values[healthy]
        reference = own if own.size >= REMOTE_VOXELS else anywhere
        for name, threshold in THRESHOLDS.items():
            if reference.size or not name.endswith("SD"):
                found[name] += int((around > threshold(around, reference)).sum())
    total = int(wall.sum())
    known = [name for name in THRESHOLDS if total and (anywhere.size or not name.endswith("SD"))]
    return {name: 100 * found[name] / total if name in known else None for name in THRESHOLDS}


def brighter(image: Values, wall: npt.NDArray[np.bool_], threshold: Callable[[Values], float], axis: int) -> Labels:
    """1 where the wall ``(X, Y, Z)`` is brighter than its slice's threshold, 0 elsewhere."""
    found = np.zeros(wall.shape, dtype=np.int64)
    for values, painted, inside in labelled(axis, image, found, wall):
        painted[inside & (values > threshold(values[inside]))] = 1
    return found


def labelled(axis: int, *volumes: npt.NDArray[Any]) -> Iterator[tuple[npt.NDArray[Any], ...]]:
    """The slices of volumes ``(X, Y, Z)``, as views, where the last of the volumes holds anything."""
    for slices in zip(*(np.moveaxis(volume, axis, 0) for volume in volumes), strict=True):
        if slices[-1].any():
            yield slices
