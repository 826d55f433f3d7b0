"""What one patient's segmentation produced."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from monai_deepgmm.images.volume import Volume
from monai_deepgmm.protocol import Protocol, Tissue
from monai_deepgmm.results.uncertainty import Interval


@dataclass(frozen=True, eq=False)
class Segmentation:
    """What one patient's segmentation produced, on the reference sequence's grid.

    Attributes:
        patient: the id.
        protocol: what was looked for.
        tissues: the tissues that the present sequences can show, in order of index.
        images: sequence → intensities (X, Y, Z), resampled to the reference where needed, in order of reference.
        mask: (X, Y, Z) bool.
        labels: (X, Y, Z) uint8, the tissues' indices, 0 outside the mask.
        probabilities: (K, X, Y, Z) float32 in order of ``tissues``, 0 outside the mask.
        reference: the reference sequence's volume: geometry and source header.
        slice_axis: the array axis along which slices are stacked.
        sidecar: provenance, ready for JSON.
        warnings: each begins with its code.
        fields: sequence → bias field (X, Y, Z) float32, mean 1 over each image's mask and 1 outside; empty where none
            was looked for.
        intervals: of each tissue's volume, in order of ``tissues``; empty where none was computed.
        seen: sequence → where it was measured (X, Y, Z) bool; empty where all were everywhere.
        measured: all that is measured, ready for JSON (``numbers.Numbers.as_row``); empty before it is.
    """

    patient: str
    protocol: Protocol
    tissues: tuple[Tissue, ...]
    images: dict[str, np.ndarray]
    mask: np.ndarray
    labels: np.ndarray
    probabilities: np.ndarray
    reference: Volume
    slice_axis: int
    sidecar: dict[str, Any]
    warnings: tuple[str, ...]
    fields: dict[str, np.ndarray] = field(default_factory=dict)
    intervals: tuple[Interval, ...] = ()
    seen: dict[str, np.ndarray] = field(default_factory=dict)
    measured: dict[str, Any] = field(default_factory=dict)

    def where(self, *tissues: str) -> NDArray[np.bool_]:
        """Where the labels (X, Y, Z) are of one of these tissues; nowhere for those that the patient cannot show.

        Raises:
            ValueError: the protocol has no such tissue.
        """
        known = [t.name for t in self.protocol.tissues]
        if unknown := [name for name in tissues if name not in known]:
            raise ValueError(f"where: no tissue {unknown[0]!r} in protocol {self.protocol.name}: {', '.join(known)}")
        chosen: NDArray[np.bool_] = np.zeros(256, dtype=bool)
        chosen[[t.index for t in self.protocol.tissues if t.name in tissues]] = True
        found: NDArray[np.bool_] = chosen[self.labels]
        return found

    def cropped(self) -> Segmentation:
        """The part that holds the mask, with every slice: all that is measured is the same, and found in less time."""
        return self.cut(self.box())

    def box(self, margin_mm: float = 0.0) -> tuple[slice, slice, slice]:
        """Every slice, and in its plane what holds the mask of any slice, with a margin within the image."""
        box = [slice(None)] * 3
        for axis in {0, 1, 2} - {self.slice_axis}:
            inside = np.flatnonzero(self.mask.any(axis=tuple(a for a in range(3) if a != axis)))
            margin = int(np.ceil(margin_mm / float(self.reference.spacing_mm[axis])))
            if len(inside):
                box[axis] = slice(max(0, int(inside[0]) - margin), int(inside[-1]) + 1 + margin)
        return box[0], box[1], box[2]

    def cut(self, box: tuple[slice, slice, slice]) -> Segmentation:
        """A part of the volume; its affine tells where that lies."""
        affine = self.reference.affine.copy()
        affine[:3, 3] += affine[:3, :3] @ [part.start or 0 for part in box]
        return replace(
            self,
            images={name: image[box] for name, image in self.images.items()},
            mask=self.mask[box],
            labels=self.labels[box],
            probabilities=self.probabilities[:, *box],
            reference=replace(self.reference, data=self.reference.data[box], affine=affine),
            fields={name: field[box] for name, field in self.fields.items()},
            seen={name: seen[box] for name, seen in self.seen.items()},
        )
