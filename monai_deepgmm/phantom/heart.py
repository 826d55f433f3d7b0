"""Synthetic patients after infarction, as hard as real ones: LGE, T2 and bSSFP short-axis slices with known tissues.

The numbers below are statistics of real scans; no image went in. ``scripts/check_phantom.py`` measures phantom patients
the way the real ones were measured and prints both beside each other.
"""

from __future__ import annotations

import gzip
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import TypeVar

import nibabel as nib
import numpy as np
from numpy.typing import NDArray

from monai_deepgmm.errors import UsageError
from monai_deepgmm.phantom.heart_contrast import CROP_MM, deviation, intensities, paint
from monai_deepgmm.phantom.heart_shapes import Floats, draw, labels

#: Sequence → what its file's name ends in.
SUFFIXES: Mapping[str, str] = MappingProxyType({"LGE": "LGE", "T2": "T2", "bSSFP": "C0"})
SEQUENCES = tuple(SUFFIXES)


Config = TypeVar("Config")


#: A patient's id, the content of its files by name, and their affine.
Files = tuple[str, Mapping[str, NDArray[np.generic]], Floats]


@dataclass(frozen=True)
class PhantomConfig:
    """What kind of patients to make.

    Attributes:
        size: voxels along the two in-plane axes, about (each patient's own size differs by up to 12).
        spacing_mm: in-plane spacing, smallest and largest.
        slices: fewest and most slices.
        shading: amplitude of a smooth field that multiplies each sequence: 0.35 is ±35 %; 0 is none.
        shift_mm: how far the sequences are displaced against each other, as a smooth field (standard deviation).
        no_edema: probability that a slice lacks edema but holds scar.
        no_scar: probability that a slice lacks scar but holds edema.
        no_edema_or_scar: probability that a slice lacks both.
        healthy: probability that a patient has no infarct at all.
        incomplete: probability that a patient lacks one or two of the three sequences.

    Raises:
        UsageError: a value is out of range.
    """

    size: int = 256
    spacing_mm: tuple[float, float] = (0.73, 0.76)
    slices: tuple[int, int] = (2, 6)
    shading: float = 0.0
    shift_mm: float = 0.95
    no_edema: float = 0.10
    no_scar: float = 0.08
    no_edema_or_scar: float = 0.05
    healthy: float = 0.0
    incomplete: float = 0.0

    def __post_init__(self) -> None:
        """Checks the ranges."""
        chances = (self.no_edema, self.no_scar, self.no_edema_or_scar, self.healthy, self.incomplete)
        if not all(0 <= p <= 1 for p in chances) or sum(chances[:3]) > 1:
            raise UsageError(f"phantom: probabilities must lie between 0 and 1, and those of a slice add up: {chances}")
        if not 0 <= self.shading < 1:
            raise UsageError(f"phantom: shading {self.shading} must be at least 0 and less than 1")
        if self.shift_mm < 0:
            raise UsageError(f"phantom: shift_mm {self.shift_mm} must not be negative")
        if len(self.slices) != 2 or not 1 <= self.slices[0] <= self.slices[1]:
            raise UsageError(f"phantom: slices {self.slices} must be the fewest and the most, at least 1")
        if len(self.spacing_mm) != 2 or not 0 < self.spacing_mm[0] <= self.spacing_mm[1]:
            raise UsageError(f"phantom: spacing_mm {self.spacing_mm} must be the smallest and the largest, above 0")
        if (self.size - 12) * self.spacing_mm[0] < CROP_MM + 24:
            raise UsageError(f"phantom: size {self.size} leaves no room for a heart; take 210 or more")


@dataclass(frozen=True)
class PhantomPatient:
    """One synthetic patient.

    Attributes:
        patient: the id, such as ``Phantom001``.
        images: sequence → int16 intensities, ``(H, W, n_slices)``.
        labels: MyoPS values (500 blood, 200 myocardium, 1220 edema, 2221 scar, 600 right ventricle), same shape, int16.
        affine: voxel → world, mm, ``(4, 4)``.
    """

    patient: str
    images: Mapping[str, NDArray[np.int16]]
    labels: NDArray[np.int16]
    affine: Floats

    @property
    def n_slices(self) -> int:
        """How many slices there are."""
        return int(self.labels.shape[2])


def make_patient(config: PhantomConfig, seed: int, number: int) -> PhantomPatient:
    """Makes one patient; the same three arguments always give the same patient.

    Args:
        config: what kind of patient.
        seed: the cohort's seed, not negative.
        number: which patient of the cohort, from 1.

    Raises:
        UsageError: ``seed`` or ``number`` is out of range.
    """
    check_draw(seed, number)
    # A stream for each purpose: shading a cohort, or leaving out sequences, changes nothing else about it.
    anatomy, look, shade, lack = (np.random.default_rng([seed, number, purpose]) for purpose in range(4))
    n_slices = int(anatomy.choice(_slice_counts(config.slices)))
    spacing = float(anatomy.uniform(*config.spacing_mm))
    extent = tuple(int(n) for n in config.size + anatomy.integers(-12, 13, 2))
    affine = _affine(anatomy, extent, spacing, n_slices)
    centre = [n / 2 + anatomy.uniform(-8, 8) for n in extent]
    x, y = np.meshgrid(*((np.arange(n) - c) * spacing for n, c in zip(extent, centre, strict=True)), indexing="ij")
    shapes = draw(anatomy, _presence(anatomy, config, n_slices))
    truth = np.stack([labels(s, x, y) for s in shapes], axis=-1)
    scores = paint(look, shapes, truth, x, y, shift_mm=config.shift_mm, of_patient=_contrast(seed, number))
    signal = intensities(look, shade, scores, x, y, config.shading)
    images = {s: np.ascontiguousarray(signal[i]) for i, s in enumerate(SEQUENCES)}
    for sequence in _lacking(lack, config.incomplete):
        del images[sequence]
    return PhantomPatient(f"Phantom{number:03d}", images, truth, affine)


def check_draw(seed: int, number: int) -> None:
    """Refuses what no patient can be drawn from.

    Raises:
        UsageError: ``seed`` is negative, or ``number`` below 1.
    """
    if seed < 0 or number < 1:
        raise UsageError(f"phantom: seed {seed} must not be negative, and number {number} must be at least 1")


def write_cohort(root: Path, n: int, *, seed: int, config: PhantomConfig | None = None) -> list[str]:
    """Writes patients in MyoPS naming: ``root/<id>/<id>_LGE.nii.gz``, ``_T2``, ``_C0`` and the labels, ``_gd``.

    The bytes of a patient depend on the configuration, the seed and its number only, not on ``n``.

    Args:
        root: the folder; made if it is not there.
        n: how many patients.
        seed: not negative.
        config: what kind of patients; None: the defaults.

    Returns:
        The patients' ids.

    Raises:
        UsageError: ``n`` or ``seed`` is out of range.
    """
    return write_patients(root, n, lambda number: _files(make_patient(config or PhantomConfig(), seed, number)))


def write_patients(root: Path, n: int, make: Callable[[int], Files]) -> list[str]:
    """Writes a folder for each patient.

    Args:
        root: the folder; made if it is not there.
        n: how many patients.
        make: number, from 1 → the patient's id, the content of its files by name, and their affine.

    Returns:
        The patients' ids.

    Raises:
        UsageError: ``n`` is out of range.
    """
    if n < 1:
        raise UsageError(f"phantom: the number of patients is {n}; make at least 1")
    written = []
    for patient, files, affine in map(make, range(1, n + 1)):
        folder = Path(root) / patient
        folder.mkdir(parents=True, exist_ok=True)
        for name, data in files.items():
            write_nifti(folder / f"{name}.nii.gz", data, affine)
        written.append(patient)
    return written


def _files(patient: PhantomPatient) -> Files:
    files: dict[str, NDArray[np.generic]]
    files = {f"{patient.patient}_{SUFFIXES[s]}": image for s, image in patient.images.items()}
    return patient.patient, {**files, f"{patient.patient}_gd": patient.labels}, patient.affine


def configured(kind: type[Config], values: Mapping[str, object]) -> Config:
    """A configuration with some fields set, as a user typed them.

    Args:
        kind: ``PhantomConfig``, or the class of another kind of patients; every field has a default.
        values: by field; a list stands for a tuple, and so does text with commas.

    Raises:
        UsageError: a value is of another kind than the default, or out of range.
    """
    chosen = {}
    for name, value in values.items():
        default = getattr(kind(), name)
        if isinstance(default, tuple) and isinstance(value, str):
            value = value.split(",")
        chosen[name] = tuple(value) if isinstance(value, list) else value
        if not _fits(chosen[name], default):
            raise UsageError(f"phantom: {name}: got {value!r}, expected something like {default!r}")
    return kind(**chosen)


def _fits(value: object, default: object) -> bool:
    if isinstance(default, tuple):
        return isinstance(value, tuple) and len(value) > 0 and all(_fits(v, default[0]) for v in value)
    if isinstance(default, float):
        return isinstance(value, int | float) and not isinstance(value, bool)
    return default is None or type(value) is type(default)


def _contrast(seed: int, number: int) -> Floats:
    """How one patient's looks differ from the average.

    Patients 1 and 2, 3 and 4, … are opposites, so that a few patients are already as varied, and on average as hard,
    as many.
    """
    pair, second = divmod(number - 1, 2)
    away = deviation(np.random.default_rng([seed, pair, 4]))
    return -away if second else away


def _slice_counts(bounds: tuple[int, int]) -> list[int]:
    """Slice counts to choose from: as often as in patients, all equally where patients have none in the bounds."""
    usual = [2] + [3] * 10 + [4] * 3 + [5] * 8 + [6] * 3
    return [n for n in usual if bounds[0] <= n <= bounds[1]] or list(range(bounds[0], bounds[1] + 1))


def _presence(rng: np.random.Generator, config: PhantomConfig, n_slices: int) -> list[tuple[bool, bool]]:
    """For each slice: does it hold edema, does it hold scar."""
    infarct = rng.random() >= config.healthy
    missing = (config.no_edema, config.no_scar, config.no_edema_or_scar)
    chances = [*missing, max(0.0, 1 - sum(missing))]
    kinds = rng.choice(4, n_slices, p=np.array(chances) / sum(chances))
    return [(bool(infarct and kind in (1, 3)), bool(infarct and kind in (0, 3))) for kind in kinds]


def _lacking(rng: np.random.Generator, chance: float) -> tuple[str, ...]:
    """The sequences that this patient lacks: none, one or two."""
    lacks, count = rng.random() < chance, int(rng.integers(1, 3))
    return tuple(rng.permutation(SEQUENCES)[:count].tolist()) if lacks else ()


def _affine(rng: np.random.Generator, extent: tuple[int, ...], spacing: float, n_slices: int) -> Floats:
    """A slightly oblique grid whose axes are PSR or LSP, ``(4, 4)`` in mm."""
    psr = np.array([[0.0, 0, 1], [-1, 0, 0], [0, 1, 0]])
    lsp = np.array([[-1.0, 0, 0], [0, 0, -1], [0, 1, 0]])
    a, b, c = rng.uniform(-0.3, 0.3, 3)
    turn_x = np.array([[1, 0, 0], [0, np.cos(a), -np.sin(a)], [0, np.sin(a), np.cos(a)]])
    turn_y = np.array([[np.cos(b), 0, np.sin(b)], [0, 1, 0], [-np.sin(b), 0, np.cos(b)]])
    turn_z = np.array([[np.cos(c), -np.sin(c), 0], [np.sin(c), np.cos(c), 0], [0, 0, 1]])
    thickness = float(rng.choice({2: [23.0], 3: [23.0, 23.0, 12.0], 4: [12.0, 14.0]}.get(n_slices, [12.0, 14.0])))
    affine = np.eye(4)
    affine[:3, :3] = (
        turn_x @ turn_y @ turn_z @ (psr if rng.random() < 0.5 else lsp) @ np.diag([spacing, spacing, thickness])
    )
    middle = (np.array([*extent, n_slices]) - 1) / 2
    affine[:3, 3] = rng.uniform(-20, 20, 3) - affine[:3, :3] @ middle
    return affine


def write_nifti(path: Path, data: NDArray[np.generic], affine: Floats) -> None:
    """Writes NIfTI as the scanner's converter does: qform only, mm; gzip without a time stamp or a name."""
    image = nib.Nifti1Image(data, affine)
    image.set_qform(affine, code=1)
    image.set_sform(None, code=0)
    image.header.set_xyzt_units("mm", "sec")
    with path.open("wb") as raw, gzip.GzipFile(filename="", mode="wb", compresslevel=6, fileobj=raw, mtime=0) as stream:
        stream.write(image.to_bytes())
