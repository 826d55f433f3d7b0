"""What lies on what, counted over slices, tells a shift."""

from __future__ import annotations

import numpy as np
import pytest

from monai_deepgmm.registration import cooccurrence
from monai_deepgmm.registration.cooccurrence import KINDS, LEVELS

SHIFT = (2, -3)


@pytest.fixture(scope="module")
def slices():
    """Two slices whose levels follow from their kinds by the same rule, the other shifted; some places do not count."""
    rng = np.random.default_rng(0)
    kinds = [np.kron(rng.integers(0, KINDS, (8, 9)), np.ones((3, 3), int)) for _ in "ab"]
    levels = [np.roll(kind * 7 % LEVELS, SHIFT, (0, 1)) for kind in kinds]
    for kind, level in zip(kinds, levels, strict=True):
        kind[:5] = kind[-5:] = -1
        level[:, :2] = -1
    return kinds, levels


def test_agreement_is_that_of_every_shift_by_hand(slices):
    (kind, _), (level, _) = slices
    worth = np.random.default_rng(1).normal(0, 1, (KINDS, LEVELS))
    fast = cooccurrence.agreement(kind, cooccurrence.spectra(level, 4), worth, 4)
    for i, j in ((0, 0), SHIFT, (-4, 1)):
        total = 0.0
        for x, y in np.argwhere(kind >= 0):
            a, b = x + i, y + j
            if 0 <= a < len(level) and 0 <= b < level.shape[1] and level[a, b] >= 0:
                total += worth[kind[x, y], level[a, b]]
        assert fast[4 + i, 4 + j] == pytest.approx(total / (kind >= 0).sum(), abs=1e-4)


def test_one_slice_tells_where_the_other_lies(slices):
    kinds, levels = slices
    back = [np.roll(level, np.negative(SHIFT), (0, 1)) for level in levels]
    nothing = np.zeros((KINDS, LEVELS))
    usual = cooccurrence.usual([nothing, cooccurrence.counts(kinds[1], back[1])])[0]
    fit = cooccurrence.agreement(kinds[0], cooccurrence.spectra(levels[0], 5), usual, 5)
    assert np.unravel_index(fit.argmax(), fit.shape) == (5 + SHIFT[0], 5 + SHIFT[1])
    assert not cooccurrence.usual([nothing])[0].any()  # nothing was counted: as by chance


def test_a_slice_counts_little_in_its_own_measure():
    mine, others = np.zeros((2, KINDS, LEVELS))
    mine[0, 3], others[0, 12] = 500, 500
    others[8:] = 500 / LEVELS  # elsewhere every level is usual
    usual = cooccurrence.usual([mine, others])[0]
    assert usual[0, 12] > usual[0, 3] + 1


def test_levels_hold_as_many_each_and_nothing_where_there_is_nothing():
    values = np.append(np.random.default_rng(2).normal(0, 1, 800), np.nan)
    levels = cooccurrence.levels(values, cooccurrence.borders(values, 8))
    assert levels[-1] == -1
    assert set(np.bincount(levels[:-1])) == {100}
    region = np.array([[True, True, False]])
    kinds = cooccurrence.kinds(np.array([[5.0, -20.0, 5.0]]), np.array([[1.0, np.nan, 1.0]]), region)
    assert (kinds >= 0).tolist() == [[True, False, False]]
