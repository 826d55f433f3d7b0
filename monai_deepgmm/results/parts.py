"""A patient whose sequences do not all cover the same voxels, as one task for each set of sequences that is there.

Where a sequence was not measured, a voxel is segmented as if the patient lacked that sequence: what it alone shows
merges, as the protocol says. Each task is fitted to all voxels where its sequences are, and labels those that have no
others. In volumes the fit itself marginalises, voxel by voxel, and there is one task.
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from monai_deepgmm.images.cropping import Crops
from monai_deepgmm.images.preparation import Prepared
from monai_deepgmm.methods.config import Config
from monai_deepgmm.methods.task import Images
from monai_deepgmm.protocol import Protocol, Tissue
from monai_deepgmm.results.assembly import assemble


class Part(NamedTuple):
    """One task.

    Attributes:
        prepared: the patient with these sequences, and the slices in which they are.
        takes: (X, Y, Z) bool, the voxels that get their label from it.
    """

    prepared: Prepared
    takes: NDArray[np.bool_]


def split(prepared: Prepared, config: Config) -> tuple[Part, ...]:
    """The tasks of a patient; the first is that with the most sequences.

    A trained network knows its own sequences only, so that there is one task with it.
    """
    scan, crops = prepared.scan, prepared.crops
    everything = (Part(prepared, scan.mask),)
    if scan.coverage is None or scan.coverage.whole() or crops.seen is None or not crops.slices or config.model:
        return everything
    sets = np.stack([seen[scan.mask] for seen in scan.coverage.seen])  # (M, voxels of the mask)
    kinds = np.unique(sets, axis=1)
    ordered = sorted(kinds.T.tolist(), key=lambda kind: (-sum(kind), -_count(sets, kind)))
    parts = []
    for kind in ordered:
        takes = np.zeros_like(scan.mask)
        takes[scan.mask] = (sets == np.array(kind)[:, None]).all(0)
        if any(kind):
            parts.append(Part(_with(prepared, np.flatnonzero(kind)), takes))
    return tuple(parts) or everything


def wall(prepared: Prepared, config: Config) -> Images | None:
    """The whole patient with the wall's borders and enhancement, which all parts share.

    None where the method needs none, and where late enhancement is not there in all slices: each part has its own.
    """
    anatomy, coverage = config.protocol.anatomy, prepared.scan.coverage
    late = None if anatomy is None else anatomy.enhancement
    if not config.presence or late is None or coverage is None or late.sequence not in prepared.scan.sequences:
        return None
    if not coverage.seen[prepared.scan.sequences.index(late.sequence)][prepared.scan.mask].all():
        return None
    whole = prepared._replace(crops=prepared.crops._replace(seen=None))
    found = assemble(whole, config).images
    return found if len(found.slices) == len(prepared.crops.slices) else None


def _count(sets: NDArray[np.bool_], kind: list[bool]) -> int:
    return int((sets == np.array(kind)[:, None]).all(0).sum())


def _with(prepared: Prepared, channels: NDArray[np.intp]) -> Prepared:
    """The patient with these sequences alone, in the slices where all of them are."""
    scan, crops = prepared.scan, prepared.crops
    if scan.coverage is None or crops.seen is None:
        return prepared
    there = (crops.seen[:, channels].all(1, keepdim=True) & (crops.mask > 0)).flatten(1).any(1)
    chosen = torch.nonzero(there).flatten()
    scan = dataclasses.replace(
        scan,
        sequences=tuple(scan.sequences[i] for i in channels),
        image=scan.image[channels],
        coverage=scan.coverage._replace(seen=scan.coverage.seen[channels]),
    )
    return Prepared(scan, _only(crops, chosen, channels), prepared.fields)


def _only(crops: Crops, images: torch.Tensor, channels: NDArray[np.intp]) -> Crops:
    seen = crops.seen
    return crops._replace(
        image=crops.image[images][:, channels],
        mask=crops.mask[images],
        slices=tuple(crops.slices[int(i)] for i in images),
        corners=crops.corners[images.numpy()],
        zero=crops.zero[images][:, channels],
        measured=crops.measured[images][:, channels],
        seen=None if seen is None else seen[images][:, channels],
    )


def merged(
    found: NDArray[np.float32],
    tissues: tuple[Tissue, ...],
    takes: NDArray[np.bool_],
    into: NDArray[np.float32],
    wanted: tuple[Tissue, ...],
    protocol: Protocol,
) -> None:
    """Writes a task's probabilities into those of the patient, in the voxels that it takes.

    Args:
        found: (K, X, Y, Z) of the task.
        tissues: its K tissues.
        takes: (X, Y, Z) bool.
        into: (T, X, Y, Z), changed.
        wanted: the patient's T tissues; one that the task does not know keeps probability 0.
        protocol: what a tissue that the patient lacks merges into.
    """
    into[:, takes] = 0
    index = {t.name: k for k, t in enumerate(wanted)}
    for values, tissue in zip(found, tissues, strict=True):
        target = tissue
        while target.name not in index and target.merges_into is not None:
            target = protocol.tissue(target.merges_into)
        into[index.get(target.name, 0)][takes] += values[takes]
