"""Where in the mask each sequence was measured: not beyond its field of view, nor in a slice that was left blank.

Resampling writes 0 where a sequence does not reach, and so do tools that pad. Where there is no data there is no
evidence: neither a tissue that this sequence shows, nor its absence.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import binary_opening

from monai_deepgmm.images.measured import from_edge
from monai_deepgmm.wording import spans

Bools = NDArray[np.bool_]

#: Exact zeros that fill a square of so many voxels are padding, if they take so much of the mask in their slice and go
#: on to the image's edge: those that tissue encloses are dark blood or wall, cut off in an export of few grey levels.
PADDING_SIDE, PADDING_SHARE = 3, 0.05
#: A sequence that lacks more of the mask than this is told of.
TOLD = 0.01
#: So many voxels of a slice do not have one value by chance.
MANY = 10


class Coverage(NamedTuple):
    """Where each sequence was measured.

    Attributes:
        seen: (M, X, Y, Z) bool, True outside the mask's slices.
        axis: along which slices are stacked.
    """

    seen: Bools
    axis: int

    def whole(self) -> bool:
        """Whether every sequence was measured everywhere."""
        return bool(self.seen.all())

    def shares(self, mask: Bools) -> NDArray[np.floating]:
        """The share of each slice of the mask that each sequence covers (M, slices); NaN where there is no mask."""
        voxels = _by_slice(mask, self.axis)
        with np.errstate(invalid="ignore"):
            found: NDArray[np.floating] = np.stack([_by_slice(mask & s, self.axis) for s in self.seen]) / voxels
        return found

    def facts(self, mask: Bools, sequences: Sequence[str]) -> dict[str, Any]:
        """For the sidecar: of each sequence the share of the mask, and of each slice that it does not cover wholly."""
        out: dict[str, Any] = {}
        for sequence, seen, shares in zip(sequences, self.seen, self.shares(mask), strict=True):
            lacking = {str(k): round(float(v), 4) for k, v in enumerate(shares) if v < 1}
            out[sequence] = {"share": round(float(seen[mask].mean()), 4), "slices": lacking}
        return out

    def notes(self, mask: Bools, sequences: Sequence[str]) -> Iterator[str]:
        """A warning for each sequence that lacks a part of the mask, with the share and the slices."""
        for sequence, seen, shares in zip(sequences, self.seen, self.shares(mask), strict=True):
            lacking = 1 - float(seen[mask].mean())
            if lacking <= TOLD:
                continue
            blank, part = (spans(np.flatnonzero(chosen)) for chosen in (shares == 0, (shares > 0) & (shares < 1)))
            places = [f"no data in slice {blank}"] if blank else []
            places += [f"a part of slice {part}"] if part and len(part) < 60 else []
            told = f" ({', '.join(places)})" if places else ""
            yield (
                f"W_COVERAGE: {sequence} covers {100 * (1 - lacking):.1f} % of the mask{told}; the rest is segmented "
                f"without it"
            )


def find(image: NDArray[np.floating], mask: Bools, inside: Bools, axis: int) -> Coverage:
    """Where each sequence was measured.

    Args:
        image: (M, X, Y, Z), finite.
        mask: (X, Y, Z).
        inside: (M, X, Y, Z) the voxels within each sequence's field of view.
        axis: along which slices are stacked.
    """
    seen = np.ones(image.shape, bool)
    for channel, within, out in zip(image, inside, seen, strict=True):
        planes = zip(*(np.moveaxis(a, axis, 0) for a in (channel, within, mask, out)), strict=True)
        for values, here, wanted, target in planes:
            if wanted.any():
                target &= _measured(values, here, wanted)
    return Coverage(seen, axis)


def without_blank(mask: Bools, found: Coverage) -> tuple[Bools, list[str]]:
    """The mask without the slices in which no sequence was measured, and a warning that lists them."""
    blank = [k for k, share in enumerate(found.shares(mask).max(0)) if share == 0]
    if not blank:
        return mask, []
    kept = mask.copy()
    np.moveaxis(kept, found.axis, 0)[blank] = False
    if not kept.any():
        return mask, []
    return kept, [f"W_COVERAGE: no sequence has data in slice {spans(blank)}, which gets no label"]


def _measured(values: NDArray[np.floating], here: Bools, wanted: Bools) -> Bools:
    """Where one slice of a sequence was measured (X, Y): all of it, but for what a mask's slice really lacks."""
    inside, everywhere = values[wanted], bool(here[wanted].all())
    within = inside if everywhere else values[wanted & here]
    if not within.any() or (len(within) >= MANY and within.min() == within.max()):
        return np.zeros_like(wanted)
    padded = np.zeros_like(wanted)
    if (inside == 0).mean() > PADDING_SHARE:
        zeros = binary_opening(values == 0, np.ones((PADDING_SIDE, PADDING_SIDE)))
        zeros = from_edge(zeros)
        padded = zeros if (zeros & wanted).sum() > PADDING_SHARE * wanted.sum() else padded
    found: Bools = np.ones_like(wanted) if everywhere and not padded.any() else here & ~padded
    return found


def _by_slice(mask: Bools, axis: int) -> NDArray[np.int64]:
    """How many voxels of a mask each slice has; few are set, so that they are faster listed than summed."""
    stride, n = int(np.prod(mask.shape[axis + 1 :])), mask.shape[axis]
    found: NDArray[np.int64] = np.bincount(np.flatnonzero(mask) // stride % n, minlength=n)
    return found
