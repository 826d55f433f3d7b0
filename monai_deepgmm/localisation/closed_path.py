"""The smoothest closed path through a table of gains in polar coordinates, by dynamic programming."""

from __future__ import annotations

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray

Array = NDArray[np.float64]

#: The largest step of a path from one angle to the next, in radii.
MAX_STEP = 3


def smoothest(gain: Array, weight: float) -> NDArray[np.int64]:
    """The closed path through a table of gains that maximises ``Σ_a gain[a, p_a] − weight · Σ_a (p_{a+1} − p_a)²``.

    Dynamic programming along two turns, of which the middle one has nearly closed; then along one turn that begins
    and ends where that middle one began, so that it closes always.

    Args:
        gain: ``(..., A, R)``, cyclic in A.
        weight: of the squared steps; a step is at most ``MAX_STEP``.

    Returns:
        ``(..., A)`` indices of R.
    """
    tables = gain.reshape(-1, *gain.shape[-2:])
    n_angles, half = tables.shape[1], tables.shape[1] // 2
    through = _best_path(np.concatenate([tables, tables], 1), weight)[:, half]
    turn = np.roll(tables, -half, axis=1)
    fixed = np.where(np.arange(tables.shape[2]) == through[:, None], 0, -np.inf)[:, None]
    turn = np.concatenate([turn[:, :1] + fixed, turn[:, 1:], fixed], 1)
    return np.roll(_best_path(turn, weight)[:, :n_angles], half, axis=1).reshape(gain.shape[:-1])


def _best_path(gain: Array, weight: float) -> NDArray[np.int64]:
    """The same for open paths through N tables ``(N, A, R)``, ``(N, A)``."""
    count, n_angles, n_radii = gain.shape
    steps = np.arange(-MAX_STEP, MAX_STEP + 1)
    cost = weight * steps**2
    # Beyond the radii nothing is possible; each radius sees those that it can be reached from as a window.
    best = np.full((n_angles, count, n_radii + 2 * MAX_STEP), -np.inf)
    reachable = np.moveaxis(sliding_window_view(best, len(steps), axis=2), 3, 2)  # (A, N, steps, R)
    here = best[:, :, MAX_STEP : MAX_STEP + n_radii]
    here[0] = gain[:, 0]
    for angle in range(1, n_angles):
        np.add((reachable[angle - 1] - cost[:, None]).max(1), gain[:, angle], out=here[angle])
    rows, path = np.arange(count), np.empty((n_angles, count), dtype=np.int64)
    path[-1] = here[-1].argmax(1)
    for angle in range(n_angles - 1, 0, -1):
        choice = (reachable[angle - 1, rows, :, path[angle]] - cost).argmax(1)
        path[angle - 1] = (path[angle] + steps[choice]).clip(0, n_radii - 1)
    return path.T
