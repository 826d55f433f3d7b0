"""A scan cut into the images that a mixture is fitted to, normalised, and the exact way back.

Nothing is interpolated on the way, so masks come back bit by bit.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from monai_deepgmm.images.grid import slice_axis
from monai_deepgmm.images.loading import Scan
from monai_deepgmm.images.measured import limited, measured
from monai_deepgmm.protocol import Protocol

#: Voxels kept around the mask where the crop would cut it.
MARGIN = 2
#: What surrounds the mask in a tight crop: a Gaussian of 3 mm that is mirrored at the border does not come back to it.
TIGHT_MM = 6.0


class Crops(NamedTuple):
    """The images of one patient: its slices, or its whole volume as a batch of one.

    Attributes:
        image: (B, M, *S), z-scored as the protocol says; 0 where the crop leaves the scan.
        mask: (B, 1, *S), 1 inside.
        spacing_mm: of the axes in ``*S``.
        slices: the index of each image along the slice axis; empty for a volume.
        slice_axis: the array axis of the scan along which slices are stacked.
        corners: (B, 3) where each image's first voxel lies in the scan; may be negative.
        scan_shape: (X, Y, Z).
        zero: (B, M) what the scan's 0 has become: no signal, which a field that multiplies intensities leaves alone.
        measured: (B, M, *S) where each sequence has a usable value (``measured.measured``).
        seen: (B, M, *S) where each sequence was measured at all (``coverage.find``); None: everywhere.
    """

    image: Tensor
    mask: Tensor
    spacing_mm: tuple[float, ...]
    slices: tuple[int, ...]
    slice_axis: int
    corners: NDArray[np.int64]
    scan_shape: tuple[int, int, int]
    zero: Tensor
    measured: Tensor
    seen: Tensor | None = None

    def cut(self, volume: NDArray[Any]) -> NDArray[Any]:
        """Cuts any other array (X, Y, Z) on the scan's grid as the image was cut: (B, *S), 0 beyond the scan."""
        size = np.array(self.image.shape[2:])
        size = np.insert(size, self.slice_axis, 1) if self.slices else size
        whole = torch.from_numpy(np.ascontiguousarray(volume))[None]
        cut = torch.stack([_cut(whole, corner, size)[0] for corner in self.corners])
        return (cut.squeeze(1 + self.slice_axis) if self.slices else cut).numpy()

    def tight(self) -> Crops:
        """The images cut to boxes of one size around their masks, for who looks at nothing else."""
        boxes = [_box((m > 0).numpy(), None, 0) for m in self.mask[:, 0]]
        margin = np.ceil(TIGHT_MM / np.array(self.spacing_mm)).astype(int)
        shape = np.array(self.mask.shape[2:])
        size = np.minimum(np.max([high - low for low, high in boxes], axis=0) + 2 * margin, shape)
        firsts = np.array([((low + high - size) // 2).clip(0, shape - size) for low, high in boxes])

        def cut(values: Tensor) -> Tensor:
            places = [(slice(None), *(slice(f, f + n) for f, n in zip(first, size, strict=True))) for first in firsts]
            return torch.stack([image[place] for image, place in zip(values, places, strict=True)])

        return self._replace(
            image=cut(self.image),
            mask=cut(self.mask),
            corners=self.corners + (np.insert(firsts, self.slice_axis, 0, axis=1) if self.slices else firsts),
            measured=cut(self.measured),
            seen=None if self.seen is None else cut(self.seen),
        )

    def restore(self, values: Tensor) -> NDArray[np.float32]:
        """Maps (B, C, *S) back to where they came from: (C, X, Y, Z) float32, 0 outside the mask."""
        out = np.zeros((values.shape[1], *self.scan_shape), dtype=np.float32)
        maps, masks = (v.detach().to("cpu", torch.float32).numpy() for v in (values, self.mask))
        for image, inside, corner in zip(maps, masks, self.corners, strict=True):
            if self.slices:
                image, inside = (np.expand_dims(v, 1 + self.slice_axis) for v in (image, inside))
            here, there = ((slice(None), *place) for place in _overlap(corner, image.shape[1:], self.scan_shape))
            np.multiply(image[here], inside[here], out=out[there])
        return out


def crops(patient: Scan, protocol: Protocol, *, dtype: torch.dtype = torch.float64) -> Crops:
    """Cuts a scan into the protocol's images, and z-scores each sequence of each image (S §4.3).

    With a ``crop_mm``, each image is a square (cube) of that side around the middle of its mask, larger where the mask
    needs it, and the z-score is taken over all of it; else the image is the mask's box and the z-score is taken over
    the mask.

    Args:
        patient: the scan.
        protocol: the unit and the crop.
        dtype: of the images and masks; single precision halves the memory of a head.

    Returns:
        The crops, in order along the slice axis.
    """
    spacing = patient.reference.spacing_mm
    axis = slice_axis(spacing)
    by_slice = protocol.unit == "slice"
    stack = [axis] if by_slice else []
    if by_slice:
        found = np.flatnonzero(patient.mask.any(axis=tuple(i for i in range(3) if i != axis)))
        boxes = [_box(np.moveaxis(patient.mask, axis, 0)[i], axis, int(i)) for i in found]
    else:
        found, boxes = np.array([], dtype=int), [_box(patient.mask, None, 0)]
    size = _size(boxes, spacing, protocol.crop_mm, stack)
    corners = np.array([(low + high - size) // 2 for low, high in boxes])
    without = axis if by_slice else None
    image = _cut_all(patient.image, corners, size, without).to(dtype)
    mask = _cut_all(patient.mask[None], corners, size, without).to(image)
    covered = _cut_all(np.ones_like(patient.mask[None]), corners, size, without).to(image)
    usable = measured(image, mask)
    seen = None
    if patient.coverage is not None and not patient.coverage.whole():
        seen = _cut_all(patient.coverage.seen, corners, size, without)
    if seen is not None and by_slice:
        image, usable = _without_data(image, mask, seen), usable & seen
    image = limited(image, mask) if by_slice else image
    over = mask if protocol.crop_mm is None else covered
    image, zero = _zscore(image, over.expand_as(image) if seen is None or not by_slice else over * seen)
    kept = tuple(s for i, s in enumerate(spacing) if i not in stack)
    slices = tuple(int(i) for i in found)
    return Crops(image.mul_(covered), mask, kept, slices, axis, corners, patient.mask.shape, zero, usable, seen)


def _cut_all(whole: NDArray[Any], corners: NDArray[np.int64], size: NDArray[np.int64], axis: int | None) -> Tensor:
    """The crops of (C, X, Y, Z) at each corner (B, C, *S), without the axis that slices lack."""
    given = torch.from_numpy(np.ascontiguousarray(whole))
    cut = torch.stack([_cut(given, corner, size) for corner in corners])
    return cut if axis is None else cut.squeeze(2 + axis)


def _without_data(image: Tensor, mask: Tensor, seen: Tensor) -> Tensor:
    """The images with the median of what was measured in the mask where a sequence was not: neither dark nor bright."""
    out = image.clone()
    for values, inside, here in zip(out, mask[:, 0] > 0, seen, strict=True):
        for channel, known in zip(values, here, strict=True):
            if (inside & known).any():
                channel[~known] = channel[inside & known].median()
    return out


def _box(mask: NDArray[np.bool_], axis: int | None, index: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """First and one-past-last voxel (3,) of a mask in scan coordinates; ``axis`` is the one a 2-D mask lacks."""
    lines = [np.flatnonzero(mask.any(tuple(o for o in range(mask.ndim) if o != a))) for a in range(mask.ndim)]
    low, high = (np.array([int(line[end]) for line in lines]) for end in (0, -1))
    high = high + 1
    if axis is None:
        return low, high
    return np.insert(low, axis, index), np.insert(high, axis, index + 1)


def _size(
    boxes: list[tuple[NDArray[np.int64], NDArray[np.int64]]],
    spacing_mm: tuple[float, float, float],
    crop_mm: float | None,
    stack: list[int],
) -> NDArray[np.int64]:
    """The side of every image in voxels (3,): the crop's, but never less than the largest mask needs."""
    needed = np.max([high - low for low, high in boxes], axis=0) + 2 * MARGIN
    wanted = np.zeros(3, int) if crop_mm is None else np.rint(crop_mm / np.array(spacing_mm)).astype(int)
    size: NDArray[np.int64] = np.maximum(needed, wanted)
    size[stack] = 1
    return size


def _overlap(
    corner: NDArray[np.int64], size: tuple[int, ...], shape: tuple[int, int, int]
) -> tuple[tuple[slice, ...], tuple[slice, ...]]:
    """Where a crop and the scan overlap: slices into the crop, slices into the scan."""
    low = np.maximum(corner, 0)
    high = np.minimum(corner + np.array(size), shape)
    here = tuple(slice(int(a - c), int(b - c)) for a, b, c in zip(low, high, corner, strict=True))
    return here, tuple(slice(int(a), int(b)) for a, b in zip(low, high, strict=True))


def _cut(whole: Tensor, corner: NDArray[np.int64], size: NDArray[np.int64]) -> Tensor:
    """The crop (C, *size) of (C, X, Y, Z), 0 where it leaves the scan."""
    shape = whole.shape[1], whole.shape[2], whole.shape[3]
    here, there = _overlap(corner, tuple(size), shape)
    out = whole.new_zeros((len(whole), *size.tolist()))
    out[(slice(None), *here)] = whole[(slice(None), *there)]
    return out


def _zscore(image: Tensor, over: Tensor) -> tuple[Tensor, Tensor]:
    """Each sequence of each image with mean 0 and deviation 1 over ``over`` (B, M, *S); where its 0 is then (B, M).

    In double precision, one sequence at a time: a copy of a whole head would be large.
    """
    out, zero = torch.empty_like(image), image.new_zeros(image.shape[:2])
    for b, m in np.ndindex(*image.shape[:2]):
        values = image[b, m].double()
        found = values[over[b, m] > 0]
        mean = found.mean() if len(found) else found.sum()
        deviation = (found - mean).square().mean().sqrt() if len(found) else mean
        deviation = deviation if deviation > 0 else torch.ones_like(deviation)
        out[b, m] = (values - mean) / deviation
        zero[b, m] = -mean / deviation
    return out, zero
