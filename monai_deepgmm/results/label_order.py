"""Whether reference labels would fit a segmentation far better if their values meant other tissues."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from monai_deepgmm.results import metrics

#: A mean Dice that rises by at least this much is told.
GAIN = 0.2


def warning(counts: metrics.Counts, tissues: Sequence[str], source: str) -> str | None:
    """What another order of the tissues would change, where it changes much.

    Args:
        counts: (K+1, K+1) from ``metrics.confusion``, summed over all patients whose labels mean the same.
        tissues: the K names.
        source: who says what the values mean.

    Returns:
        ``W_ORDER`` with both Dice, or None.
    """
    table = metrics.dice_table(counts)
    if np.isnan(np.diagonal(table)).all():
        return None
    order = metrics.match(table)
    stated, best = (float(np.nanmean(table[list(rows), range(len(table))])) for rows in (range(len(table)), order))
    if best - stated < GAIN:
        return None
    changed = ", ".join(f"{tissues[i]} as {tissues[j]}" for i, j in enumerate(order) if i != j)
    return (
        f"W_ORDER: the reference labels fit far better if read otherwise ({changed}): mean Dice {best:.2f} instead of "
        f"{stated:.2f}; check what their values mean (here by {source}; --truth-labels says it) and the tissues' names"
    )
