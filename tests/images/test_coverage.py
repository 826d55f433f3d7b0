"""Zeros within the mask: a part that was not measured, or dark tissue that was rounded down."""

from __future__ import annotations

import numpy as np
import pytest

from monai_deepgmm.images import coverage

MASK = np.zeros((24, 24, 1), bool)
MASK[4:20, 4:20] = True


@pytest.mark.parametrize(
    ("zeros", "share"),
    [
        ((slice(8, 14), slice(8, 14)), 1.0),  # enclosed by the mask: blood on T2, in an export of few grey levels
        ((slice(0, 8), slice(None)), 0.75),  # from the image's border on: padding
        ((slice(18, 21), slice(None)), 0.875),  # a strip that goes on beyond the mask
        ((slice(16, 23), slice(3, 21)), 1.0),  # wall and lung, both nulled on late enhancement: fat encloses them
    ],
)
def test_zeros_that_tissue_encloses_were_measured(zeros, share):
    image = np.ones((1, *MASK.shape), np.float32) + np.indices(MASK.shape)[0]
    image[0][zeros] = 0
    found = coverage.find(image, MASK, np.ones_like(image, bool), 2)
    assert found.seen[0][MASK].mean() == share
    assert [note.split()[0] for note in found.notes(MASK, ("T2",))] == ["W_COVERAGE:"] * (share < 1)
