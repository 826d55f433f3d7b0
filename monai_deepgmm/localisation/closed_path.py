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
    n_radii = gain.shape[2]
    steps = np.arange(-MAX_STEP, MAX_STEP + 1)
    came_from = np.arange(n_radii) + steps[:, None]  # (steps, R)
    possible = (came_from >= 0) & (came_from < n_radii)
    cost = np.where(possible, weight * steps[:, None] ** 2, np.inf)
    source = came_from.clip(0, n_radii - 1)
    best, back = gain[:, 0], []
    for angle in range(1, gain.shape[1]):
        candidates = best[:, source] - cost
        choice = candidates.argmax(1)
        back.append(source[choice, np.arange(n_radii)])
        best = np.take_along_axis(candidates, choice[:, None], 1)[:, 0] + gain[:, angle]
    rows = np.arange(len(gain))
    path = [best.argmax(1)]
    for previous in reversed(back):
        path.append(previous[rows, path[-1]])
    return np.stack(path[::-1], 1)
