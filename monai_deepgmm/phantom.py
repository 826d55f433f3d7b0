"""Synthetic patients after infarction, as hard as real ones: LGE, T2 and bSSFP short-axis slices with known truth.

The numbers below are statistics of real scans; no image went in. ``scripts/check_phantom.py`` measures phantom patients
the way the real ones were measured and prints both beside each other.
"""

from __future__ import annotations

import gzip
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

import nibabel as nib
import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import gaussian_filter

from monai_deepgmm.errors import UsageError
from monai_deepgmm.phantom_shapes import Floats, Look, Slice, draw, labels, looks

#: Sequence → what its file's name ends in.
SUFFIXES: Mapping[str, str] = MappingProxyType({"LGE": "LGE", "T2": "T2", "bSSFP": "C0"})
SEQUENCES = tuple(SUFFIXES)

#: Side of the square around the ventricle over which intensities have mean 0 and standard deviation 1.
CROP_MM = 120.0

#: Mean of each look in LGE, T2, bSSFP.
MEANS: Floats = np.array(
    [
        [1.35, -0.65, 1.85],  # blood
        [-0.45, 0.50, -0.08],  # myocardium
        [0.20, 1.25, 0.40],  # edema
        [1.20, 1.10, 0.35],  # scar
        [1.10, 1.10, 1.60],  # slow flow
        [-0.20, 0.60, 0.10],  # no-reflow core
        [0.90, -0.30, 1.30],  # right ventricle
        [0.00, 0.00, 0.00],  # rest
    ]
)
#: Standard deviation of the texture within each look.
TEXTURE: Floats = np.array(
    [
        [0.45, 0.35, 0.40],
        [0.52, 0.38, 0.40],
        [0.60, 0.42, 0.45],
        [0.75, 0.50, 0.45],
        [0.50, 0.50, 0.40],
        [0.50, 0.40, 0.40],
        [0.60, 0.50, 0.50],
        [0.60, 0.60, 0.60],
    ]
)
#: Correlation of that texture: LGE with T2, LGE with bSSFP, T2 with bSSFP.
TEXTURE_CORRELATION: Floats = np.array(
    [
        [-0.10, 0.20, -0.10],
        [0.15, 0.15, 0.15],
        [0.10, 0.20, 0.05],
        [0.20, 0.20, 0.05],
        [0.00, 0.20, 0.00],
        [0.10, 0.10, 0.10],
        [0.00, 0.20, 0.00],
        [0.20, 0.30, 0.20],
    ]
)
#: Standard deviation of each look's mean between slices; scar's row serves the core, blood's the rest.
BETWEEN: Floats = np.array([[0.50, 0.38, 0.36], [0.26, 0.31, 0.24], [0.70, 0.47, 0.57], [0.76, 0.56, 0.37]])[
    [0, 1, 2, 3, 0, 3, 0, 0]
]
#: Share of that variance which all looks of a slice have in common, and which all slices of a patient have in common.
SHARED_BY_LOOKS: Floats = np.array([0.40, 0.60, 0.40])
SHARED_BY_SLICES = 0.75
#: The texture: correlation lengths in mm (standard deviation of the Gaussian filter) and shares of the variance.
TEXTURE_SCALES: tuple[tuple[float, float], ...] = ((0.3, 0.04), (1.1, 0.5), (3.2, 0.46))
#: An intensity of zero lies here, in standard deviations over the crop: magnitude images have no negative values.
ZERO_AT: Floats = np.array([-1.55, -1.15, -1.35])


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
    shift_mm: float = 0.5
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
        if not 1 <= self.slices[0] <= self.slices[1]:
            raise UsageError(f"phantom: slices {self.slices} must be the fewest and the most, at least 1")
        if not 0 < self.spacing_mm[0] <= self.spacing_mm[1]:
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
    if seed < 0 or number < 1:
        raise UsageError(f"phantom: seed {seed} must not be negative, and number {number} must be at least 1")
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
    scores = _paint(look, shapes, truth, x, y, config.shift_mm)
    intensities = _intensities(look, shade, scores, x, y, config.shading)
    images = {s: np.ascontiguousarray(intensities[i]) for i, s in enumerate(SEQUENCES)}
    for sequence in _lacking(lack, config.incomplete):
        del images[sequence]
    return PhantomPatient(f"Phantom{number:03d}", images, truth, affine)


def write_cohort(root: Path, n: int, *, seed: int, config: PhantomConfig | None = None) -> list[str]:
    """Writes patients in MyoPS naming: ``root/<id>/<id>_LGE.nii.gz``, ``_T2``, ``_C0`` and the truth, ``_gd``.

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
    if n < 1:
        raise UsageError(f"phantom: the number of patients is {n}; make at least 1")
    written = []
    for number in range(1, n + 1):
        patient = make_patient(config or PhantomConfig(), seed, number)
        folder = Path(root) / patient.patient
        folder.mkdir(parents=True, exist_ok=True)
        for sequence, image in patient.images.items():
            _write(folder / f"{patient.patient}_{SUFFIXES[sequence]}.nii.gz", image, patient.affine)
        _write(folder / f"{patient.patient}_gd.nii.gz", patient.labels, patient.affine)
        written.append(patient.patient)
    return written


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


def _paint(
    rng: np.random.Generator, shapes: list[Slice], truth: NDArray[np.int16], x: Floats, y: Floats, shift_mm: float
) -> Floats:
    """Intensities as z-scores over the crop, ``(3, H, W, n_slices)``."""
    spacing = float(x[1, 0] - x[0, 0])
    of_patient = _deviation(rng)
    gain = np.exp(0.18 * rng.standard_normal((1, 3))) * np.exp(0.12 * rng.standard_normal((len(Look), 3)))
    scores = []
    for i, shape in enumerate(shapes):
        mean = MEANS + np.sqrt(SHARED_BY_SLICES) * of_patient + np.sqrt(1 - SHARED_BY_SLICES) * _deviation(rng)
        noise = _texture(rng, x.shape, spacing)
        rest = _rest(rng, x, y, spacing)
        picture = np.stack(
            [
                _blend(_memberships(rng, shape, x, y, spacing, shift_mm), mean, gain, noise, rest, c)
                for c in range(len(SEQUENCES))
            ]
        )
        scores.append(_standardised(picture, truth[..., i], spacing))
    return np.stack(scores, axis=-1)


def _deviation(rng: np.random.Generator) -> Floats:
    """How far the looks' means lie from ``MEANS``, ``(looks, 3)``: partly all looks together, partly each by itself."""
    common = rng.standard_normal((1, 3))
    common[0, 2] = 0.8 * common[0, 0] + 0.6 * common[0, 2]  # LGE and bSSFP are bright together
    own = rng.standard_normal((len(Look), 3))
    return BETWEEN * (np.sqrt(SHARED_BY_LOOKS) * common + np.sqrt(1 - SHARED_BY_LOOKS) * own)


def _texture(rng: np.random.Generator, extent: tuple[int, ...], spacing: float) -> Floats:
    """Three independent fields of unit variance, correlated in space as the residuals of patients, ``(3, H, W)``."""
    total = np.zeros((3, *extent))
    for scale_mm, share in TEXTURE_SCALES:
        total += np.sqrt(share) * _smooth_noise(rng, (3, *extent), scale_mm / spacing)
    return total


def _smooth_noise(rng: np.random.Generator, extent: tuple[int, ...], sigma: float) -> Floats:
    """Gaussian-filtered noise of unit variance over the last two axes; ``sigma`` in voxels."""
    field: Floats = gaussian_filter(rng.standard_normal(extent), (0,) * (len(extent) - 2) + (sigma, sigma), mode="wrap")
    return field / field.std(axis=(-2, -1), keepdims=True)


def _memberships(
    rng: np.random.Generator, shape: Slice, x: Floats, y: Floats, spacing: float, shift_mm: float
) -> Floats:
    """How much of each look a voxel of one sequence holds, ``(looks, H, W)``, sum 1.

    The sequence's own displacement, the scanner's blur, and an edema that fades out instead of ending.
    """
    dx, dy = shift_mm * _smooth_noise(rng, (2, *x.shape), 15.0 / spacing)
    seen = looks(shape, x + dx, y + dy)
    sharp = (seen == np.arange(len(Look))[:, None, None]).astype(np.float64)
    soft: Floats = gaussian_filter(sharp, (0, 0.6 / spacing, 0.6 / spacing))
    wall = soft[Look.MYOCARDIUM] + soft[Look.EDEMA]
    faded = gaussian_filter(sharp[[Look.EDEMA, Look.MYOCARDIUM]], (0, 1.8 / spacing, 1.8 / spacing))
    edema = wall * faded[0] / np.maximum(faded.sum(0), 1e-6)
    soft[Look.EDEMA], soft[Look.MYOCARDIUM] = edema, wall - edema
    return soft


def _blend(members: Floats, mean: Floats, gain: Floats, noise: Floats, rest: Floats, channel: int) -> Floats:
    """One sequence: each look's mean and texture, in proportion to its membership, ``(H, W)``."""
    picture = members[Look.REST] * rest[channel]
    for look in Look:
        if look is Look.REST:
            continue
        grain = np.tensordot(_mixing(TEXTURE_CORRELATION[look])[channel], noise, 1)
        picture = picture + members[look] * (mean[look, channel] + TEXTURE[look, channel] * gain[look, channel] * grain)
    return picture


def _mixing(correlation: Floats) -> Floats:
    """The Cholesky factor of a 3×3 correlation matrix given as its three entries above the diagonal."""
    a, b, c = correlation
    factor: Floats = np.linalg.cholesky(np.array([[1, a, b], [a, 1, c], [b, c, 1]]))
    return factor


def _rest(rng: np.random.Generator, x: Floats, y: Floats, spacing: float) -> Floats:
    """Chest wall, lung and fat around the heart, ``(3, H, W)``; bright at the upper side, dark at the lower right."""
    common = _smooth_noise(rng, x.shape, 7.0 / spacing)
    own = _smooth_noise(rng, (3, *x.shape), 4.0 / spacing)
    fine = _smooth_noise(rng, (3, *x.shape), 0.9 / spacing)
    turn = rng.normal(0, 0.25)
    across = x * np.sin(turn) - y * np.cos(turn)
    chest = 1 / (1 + np.exp(-(across - rng.uniform(38, 46) - 4 * common) / 1.5))
    lung = 1 / (1 + np.exp(-(x - y - 45 + 8 * common) / 4))
    tissue = 0.5 * common + 0.6 * own + 0.35 * fine
    return tissue * (1 - 0.8 * lung) - 0.9 * lung + np.array([1.0, 1.5, 1.2])[:, None, None] * chest


def _standardised(picture: Floats, truth: NDArray[np.int16], spacing: float) -> Floats:
    """Scales what lies outside of the ventricles so that the crop around the left one has mean 0 and deviation 1.

    So a z-score over the crop gives the tissues back the means that they were painted with.
    """
    left = (truth > 0) & (truth != 600)
    points = np.argwhere(left)
    middle = (points.min(0) + points.max(0)) / 2
    half = CROP_MM / spacing / 2
    window = np.zeros(truth.shape, bool)
    window[tuple(slice(max(0, round(m - half)), round(m + half)) for m in middle)] = True
    heart = gaussian_filter((truth > 0).astype(np.float64), 1.0)
    inside, outside = window & (truth > 0), window & (truth == 0)
    share = outside.sum() / window.sum()
    result = picture.copy()
    for channel in result:
        kept = channel[inside]
        mean = -kept.sum() / outside.sum()
        variance = (window.sum() - (kept**2).sum()) / outside.sum() - mean**2
        old = channel[outside]
        scaled = mean + np.sqrt(max(variance, 0.15 * share)) * (channel - old.mean()) / old.std()
        channel[:] = heart * channel + (1 - heart) * scaled
    return result


def _intensities(
    look: np.random.Generator, shade: np.random.Generator, scores: Floats, x: Floats, y: Floats, shading: float
) -> NDArray[np.int16]:
    """Scanner units: shaded, not negative, whole numbers, ``(3, H, W, n_slices)``."""
    unit = np.array([190.0, 170.0, 400.0]) * np.exp(0.3 * look.standard_normal(3))
    above = scores - ZERO_AT[:, None, None, None]
    # A magnitude image folds its noise floor up instead of cutting it off.
    floored = 0.5 * (above + np.sqrt(above**2 + 0.15**2))
    field = _shading(shade, x, y, scores.shape[-1])
    signal = floored * (1 + shading * field) * unit[:, None, None, None]
    whole: NDArray[np.int16] = np.clip(np.rint(signal), 0, 32767).astype(np.int16)
    return whole


def _shading(rng: np.random.Generator, x: Floats, y: Floats, n_slices: int) -> Floats:
    """A smooth field per sequence, between -1 and 1 over the crop, much alike in all slices, ``(3, H, W, n_slices)``."""
    u, v = np.clip(x / (CROP_MM / 2), -1, 1), np.clip(y / (CROP_MM / 2), -1, 1)
    basis = np.stack([u, v, u * v, u**2 - 0.5, v**2 - 0.5])
    weights = rng.standard_normal((3, 1, 5)) + 0.3 * rng.standard_normal((3, n_slices, 5))
    field = np.einsum("csb,bhw->chws", weights, basis)
    peak: Floats = field / np.abs(field).max(axis=(1, 2), keepdims=True)
    return peak


def _write(path: Path, data: NDArray[np.int16], affine: Floats) -> None:
    """Writes NIfTI as the scanner's converter does: qform only, mm; gzip without a time stamp or a name."""
    image = nib.Nifti1Image(data, affine)
    image.set_qform(affine, code=1)
    image.set_sform(None, code=0)
    image.header.set_xyzt_units("mm", "sec")
    with path.open("wb") as raw, gzip.GzipFile(filename="", mode="wb", compresslevel=6, fileobj=raw, mtime=0) as stream:
        stream.write(image.to_bytes())
