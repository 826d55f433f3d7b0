"""The smoothest closed path through a table of gains in polar coordinates, by dynamic programming."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

#: The largest step of a path from one angle to the next, in radii.
MAX_STEP = 3


def smoothest(gain: Array, weight: float) -> NDArray[np.int64]:
    """The closed path through a table of gains that maximises ``Σ_a gain[a, p_a] − weight · Σ_a (p_{a+1} − p_a)²``.

    Dynamic programming along two turns, of which the middle one has nearly closed; then along one turn that begins
    and ends where that middle one began, so that it closes always. Both go from the two ends to one place between
    them, side by side.

    Args:
        gain: ``(..., A, R)``, cyclic in A.
        weight: of the squared steps; a step is at most ``MAX_STEP``.

    Returns:
        ``(..., A)`` indices of R.
    """
    tables = gain.reshape(-1, *gain.shape[-2:])
    n_angles, half = tables.shape[1], tables.shape[1] // 2
    through = _met(np.concatenate([tables, tables], 1), half, weight)[1]
    fixed = np.where(np.arange(tables.shape[2]) == through[:, None], 0, -np.inf)[:, None].astype(tables.dtype)
    turn = np.roll(tables, -half, axis=1)
    turn = np.concatenate([turn[:, :1] + fixed, turn[:, 1:], fixed], 1)
    path = _traced(*_met(turn, half, weight), weight)  # the shorter side is filled up at its end
    start = path.shape[1] // 2 - half
    return np.roll(path[:, start : start + n_angles], half, axis=1).reshape(gain.shape[:-1])


def _met(gain: Array, at: int, weight: float) -> tuple[Array, NDArray[np.int64]]:
    """The best open paths through N tables ``(N, A, R)``, met at one place between their ends.

    Returns:
        What the best path from either end to each place is worth ``(L, R + 2 MAX_STEP, 2 N)``, the second ends after
        the first ones; and where the best paths cross ``(N,)``.
    """
    count, length, n_radii = gain.shape
    both = np.zeros(
        (max(at + 1, length - at), n_radii, 2 * count), dtype=gain.dtype
    )  # radii are shifted against each other as rows
    both[-at - 1 :, :, :count] = gain[:, : at + 1].transpose(1, 2, 0)
    both[at - length :, :, count:] = gain[:, at:][:, ::-1].transpose(1, 2, 0)
    best = np.full(
        (len(both), n_radii + 2 * MAX_STEP, 2 * count), -np.inf, dtype=gain.dtype
    )  # beyond the radii nothing is possible
    here, shifted = best[:, MAX_STEP : MAX_STEP + n_radii], np.empty_like(both[0])
    here[0] = both[0]
    for angle in range(1, len(best)):
        before, now = best[angle - 1], here[angle]
        now[:] = here[angle - 1]
        for step in range(1, MAX_STEP + 1):
            low, high = MAX_STEP - step, MAX_STEP + step
            np.maximum(before[low : low + n_radii], before[high : high + n_radii], out=shifted)
            shifted -= gain.dtype.type(weight * step**2)
            np.maximum(now, shifted, out=now)
        now += both[angle]
    return best, (here[-1, :, :count] + here[-1, :, count:] - gain[:, at].T).argmax(0)


def _traced(best: Array, middle: NDArray[np.int64], weight: float) -> NDArray[np.int64]:
    """The paths ``(N, 2 L − 1)`` of ``_met``, as many places before where they met as after."""
    steps = np.arange(-MAX_STEP, MAX_STEP + 1)[:, None]
    cost, last = weight * steps**2, best.shape[1] - 2 * MAX_STEP - 1
    columns, path = np.arange(best.shape[2]), np.empty((len(best), best.shape[2]), dtype=np.int64)
    path[-1] = np.tile(middle, 2)
    for angle in range(len(best) - 1, 0, -1):
        reached = best[angle - 1, path[angle] + MAX_STEP + steps, columns]
        path[angle - 1] = (path[angle] + (reached - cost).argmax(0) - MAX_STEP).clip(0, last)
    first, second = path[:, : len(middle)], path[:, len(middle) :]
    return np.concatenate([first, second[-2::-1]]).T
