"""The classical infarct thresholds: from the wall's intensities in one slice ``(N,)`` to that above which scar lies."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt

Labels = npt.NDArray[np.int64]
Values = npt.NDArray[np.floating[Any]]


def fwhm(values: Values) -> float:
    """Half way between the least and the greatest."""
    return float(values.min() + values.max()) / 2


def n_sd(n: int, values: Values) -> float:
    """So many standard deviations above the mean of the darker half, the remote wall."""
    remote = values[values <= np.median(values)]
    return float(remote.mean() + n * remote.std())


def otsu(values: Values) -> float:
    """The greatest intensity of the lower of two classes with the greatest variance between them."""
    levels, counts = np.unique(values.astype(np.float64), return_counts=True)
    below, sums = np.cumsum(counts)[:-1], np.cumsum(counts * levels)
    above = values.size - below
    between = below * above * ((sums[-1] - sums[:-1]) / above - sums[:-1] / below) ** 2
    return float(levels[int(np.append(between, 0.0).argmax())])  # a single level cannot be parted


THRESHOLDS: Mapping[str, Callable[[Values], float]] = {
    "Otsu": otsu,
    **{f"{n}SD": partial(n_sd, n) for n in (2, 3, 5, 6)},
    "FWHM": fwhm,
}


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
