"""Synthetic brains, as hard as real ones: T1, T2 and FLAIR with the share of each tissue in each voxel as truth."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from monai_deepgmm.errors import UsageError
from monai_deepgmm.phantom import brain_hard
from monai_deepgmm.phantom.brain_contrast import HEALTHY, SEQUENCES, UNIT, paint, scanned, shading
from monai_deepgmm.phantom.brain_shapes import FILLED, Floats, Part, Singles, draw, fractions
from monai_deepgmm.phantom.heart import Files, check_draw, write_patients

#: The labels, in the order of the fractions.
GM, WM, CSF, LESION = 1, 2, 3, 4
Naming = Literal["folder", "ibsr"]
NAMINGS: tuple[Naming, ...] = get_args(Naming)
#: Naming → the grid where none is asked for: voxels, and their size in mm.
GRIDS: Mapping[str, tuple[tuple[int, int, int], tuple[float, float, float]]] = {
    "folder": ((96, 112, 96), (1.5, 1.5, 1.5)),
    "ibsr": ((152, 112, 152), (0.94, 1.5, 0.94)),
}
#: IBSR's own labels, by ours; a lesion lies in white matter.
IBSR: NDArray[np.int16] = np.array([0, 2, 3, 1, 3], np.int16)


@dataclass(frozen=True)
class BrainConfig:
    """What kind of brains to make.

    Attributes:
        naming: folder writes ``<id>/T1.nii.gz`` … ``mask`` and ``seg``; ibsr writes ``IBSR_01/IBSR_01.nii.gz`` (T1
            only) and ``IBSR_01_seg``, both with a fourth axis of one.
        shape: voxels along each axis; the brain fills them. None: 96×112×96, with ibsr 152×112×152.
        spacing_mm: one number, or one for each axis. None: 1.5, with ibsr 0.94, 1.5, 0.94.
        sequences: some of T1, T2 and FLAIR, T1 among them.
        shading: amplitude of a smooth field that multiplies each sequence: 0.35 is ±35 %; 0 is none.
        noise: its standard deviation on T1, as a share of the contrast between grey and white matter; T2 and FLAIR
            have more.
        partial_volume: False gives each voxel to the one tissue that it holds most of.
        fractions: also write ``fractions.nii.gz``: the share of GM, WM and CSF along a fourth axis.
        hard: with lesions of the white matter (4 in the labels; in the fractions they are white matter), bright
            vessels, and the edge of a stripped and resampled brain, which is dark in every sequence.

    Raises:
        UsageError: a value is out of range.
    """

    naming: Naming = "folder"
    shape: tuple[int, int, int] | None = None
    spacing_mm: float | tuple[float, float, float] | None = None
    sequences: tuple[str, ...] = SEQUENCES
    shading: float = 0.0
    noise: float = 0.14
    partial_volume: bool = True
    fractions: bool = False
    hard: bool = False

    def __post_init__(self) -> None:
        """Checks the ranges."""
        if self.naming not in NAMINGS:
            raise UsageError(f"phantom: naming {self.naming!r} is unknown; choose from {', '.join(NAMINGS)}")
        if self.shape is not None and not _three(self.shape, int):
            raise UsageError(f"phantom: shape {self.shape!r} must be three whole numbers, one for each axis")
        if self.spacing_mm is not None and not _three(self.grid[1], int | float):
            raise UsageError(f"phantom: spacing_mm {self.spacing_mm!r} must be a number, or three, one for each axis")
        shape, spacing = self.grid
        if not all(16 <= n <= 1024 for n in shape) or not all(0 < s < 100 for s in spacing):
            raise UsageError(f"phantom: {shape} voxels of {spacing} mm: take 16 to 1024 voxels, smaller than 100 mm")
        if min(n * s for n, s in zip(shape, spacing, strict=True)) < 60:
            raise UsageError(f"phantom: shape {shape} at {spacing} mm leaves no room for a brain; take 60 mm or more")
        known = [s for s in SEQUENCES if s in self.sequences]
        if sorted(known) != sorted(self.sequences) or "T1" not in known:
            raise UsageError(f"phantom: sequences {self.sequences} must be T1, and of T2 and FLAIR what is wanted")
        if not 0 <= self.shading < 1:
            raise UsageError(f"phantom: shading {self.shading} must be at least 0 and less than 1")
        if not 0 <= self.noise <= 10:
            raise UsageError(f"phantom: noise {self.noise} must be at least 0 and at most 10")

    @property
    def grid(self) -> tuple[tuple[int, ...], tuple[float, ...]]:
        """Voxels along each axis, and their size in mm."""
        shape, spacing_mm = GRIDS[self.naming]
        given = self.spacing_mm if isinstance(self.spacing_mm, tuple | None) else (self.spacing_mm,) * 3
        return self.shape or shape, given or spacing_mm


@dataclass(frozen=True)
class BrainPatient:
    """One synthetic brain.

    Attributes:
        patient: the id, such as ``Brain001``.
        images: sequence → int16 intensities, 0 outside the mask, ``(X, Y, Z)``.
        mask: the brain with the fluid around it, ``(X, Y, Z)``.
        labels: GM 1, WM 2, CSF 3, lesion 4, 0 outside the mask: what a voxel holds most of, ``(X, Y, Z)``.
        fractions: the share of GM, WM and CSF in each voxel, 0 outside the mask, ``(3, X, Y, Z)``.
        affine: voxel → world, mm, ``(4, 4)``.
    """

    patient: str
    images: Mapping[str, NDArray[np.int16]]
    mask: NDArray[np.bool_]
    labels: NDArray[np.uint8]
    fractions: Singles
    affine: Floats


def make_patient(config: BrainConfig, seed: int, number: int) -> BrainPatient:
    """Makes one brain; the same three arguments always give the same brain.

    Raises:
        UsageError: ``seed`` is negative, or ``number``, which patient of the cohort, is below 1.
    """
    check_draw(seed, number)
    # A stream for each purpose: other sequences, shading or noise change nothing else.
    anatomy = np.random.default_rng([seed, number, 0])
    shape, spacing = config.grid
    axes = [_centres(n, s) for n, s in zip(shape, spacing, strict=True)]
    affine = _affine(anatomy, shape, spacing)
    brain = draw(anatomy, FILLED * np.array(shape) * spacing)
    shares, held = fractions(brain, axes)
    hard = None
    if config.hard:
        hard = brain_hard.drawn(np.random.default_rng([seed, number, 6]), shares[Part.WHITE], held, axes)
    mask = held >= 0.5 if hard is None else hard.mask
    shares[Part.FLUID] += np.maximum(0.5 - held, 0)  # beyond the brain: of the voxels of an edge
    shares = np.where(mask, shares / np.maximum(held, 0.5), 0)
    labels = np.where(mask, _tissues(shares).argmax(0) + 1, 0).astype(np.uint8)
    if not config.partial_volume:
        shares = _crisp(shares, labels)
    if hard is not None:
        labels = np.where(mask & (hard.lesion >= 0.5), LESION, labels).astype(np.uint8)
    images = {}
    for sequence in config.sequences:
        stream = [np.random.default_rng([seed, number, p, SEQUENCES.index(sequence)]) for p in (1, 2, 3, 4)]
        tissue = np.random.default_rng([seed, number, 5])  # begun anew for each sequence: they share it
        look = HEALTHY if hard is None else brain_hard.SICK
        signal = paint(tissue, stream[0], stream[1], sequence, shares, axes, config.noise, look)
        signal = signal if hard is None else hard.on(sequence, signal)
        signal *= 1 + config.shading * shading(stream[2], axes, brain.half_mm, mask)
        images[sequence] = scanned(signal, UNIT * float(np.exp(0.3 * stream[3].standard_normal())), mask)
    name = f"IBSR_{number:02d}" if config.naming == "ibsr" else f"Brain{number:03d}"
    return BrainPatient(name, images, mask, labels, _tissues(shares), affine)


def write_cohort(root: Path, n: int, *, seed: int, config: BrainConfig | None = None) -> list[str]:
    """Writes brains with mask and reference labels, named as ``BrainConfig.naming`` says, into a folder each.

    The bytes of a patient depend on the configuration, the seed and its number only, not on ``n``.

    Returns:
        The patients' ids.

    Raises:
        UsageError: ``n`` or ``seed`` is out of range.
    """
    asked = config or BrainConfig()

    def made(number: int) -> Files:
        patient = make_patient(asked, seed, number)
        return patient.patient, _files(patient, asked), patient.affine

    return write_patients(root, n, made)


def _files(patient: BrainPatient, config: BrainConfig) -> dict[str, NDArray[np.generic]]:
    """Names without their ending, and what is in the files."""
    files: dict[str, NDArray[np.generic]]
    if config.naming == "ibsr":
        files = {patient.patient: patient.images["T1"], f"{patient.patient}_seg": IBSR[patient.labels]}
        files = {name: data[..., None] for name, data in files.items()}
    else:
        files = {**patient.images, "mask": patient.mask.astype(np.uint8), "seg": patient.labels}
    if config.fractions:
        files["fractions"] = np.moveaxis(patient.fractions, 0, -1)
    return files


def _centres(n: int, spacing_mm: float) -> Floats:
    """Where the voxels' centres are along one axis, in mm around the middle."""
    return np.asarray((np.arange(n) - (n - 1) / 2) * spacing_mm, np.float64)


def _three(values: object, kind: Any) -> bool:
    return isinstance(values, tuple) and len(values) == 3 and all(isinstance(v, kind) for v in values)


def _tissues(shares: Singles) -> Singles:
    """From the shares of each ``Part`` to those of GM, WM and CSF."""
    return np.stack([shares[Part.CORTEX] + shares[Part.DEEP], shares[Part.WHITE], shares[Part.FLUID]])


def _crisp(shares: Singles, labels: NDArray[np.uint8]) -> Singles:
    """Voxels that hold nothing but their label; grey matter is cortical or deep, whichever it is more of."""
    deep = shares[Part.DEEP] > shares[Part.CORTEX]
    return np.stack([(labels == GM) & ~deep, (labels == GM) & deep, labels == WM, labels == CSF]).astype(np.float32)


def _affine(rng: np.random.Generator, shape: tuple[int, ...], spacing: tuple[float, ...]) -> Floats:
    """A grid along right, front and top, turned by a few degrees as heads are, ``(4, 4)`` in mm."""
    affine = np.eye(4)
    turn, _ = np.linalg.qr(np.eye(3) + rng.normal(0, 0.06, (3, 3)))
    affine[:3, :3] = turn * np.sign(np.diag(turn)) @ np.diag(spacing)
    affine[:3, 3] = rng.uniform(-10, 10, 3) - affine[:3, :3] @ ((np.array(shape) - 1) / 2)
    return affine
