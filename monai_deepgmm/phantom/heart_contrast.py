"""How bright things are in a synthetic short-axis slice: what each look's mean, texture and blur is in each sequence.

The numbers are statistics of real scans; no image went in. Channels are LGE, T2 and bSSFP, in this order.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import gaussian_filter

from monai_deepgmm.phantom.heart_shapes import RIGHT_VENTRICLE, Floats, Look, Slice, looks

#: Side of the square around the ventricle over which intensities have mean 0 and standard deviation 1.
CROP_MM = 120.0

#: Mean of each look in LGE, T2, bSSFP.
MEANS: Floats = np.array(
    [
        [1.73, -0.71, 2.24],  # blood
        [-0.82, 0.36, -0.28],  # myocardium
        [-0.33, 1.60, 0.13],  # edema
        [1.97, 1.25, 0.57],  # scar
        [0.62, 1.00, 1.30],  # slow flow
        [0.80, 1.60, 1.30],  # rim
        [-0.50, 0.55, 0.55],  # trabecula
        [-0.33, 0.80, 0.00],  # grey zone
        [-0.20, 0.60, 0.10],  # no-reflow core
        [0.90, -0.30, 1.30],  # right ventricle
        [0.00, 0.00, 0.00],  # rest
    ]
)
#: Standard deviation of the texture within each look.
TEXTURE: Floats = np.array(
    [
        [0.20, 0.30, 0.35],  # blood
        [0.23, 0.16, 0.25],  # myocardium
        [0.22, 0.15, 0.20],  # edema
        [0.89, 0.59, 0.63],  # scar
        [0.40, 0.45, 0.40],  # slow flow
        [0.50, 0.45, 0.50],  # rim
        [0.50, 0.50, 0.50],  # trabecula
        [0.42, 0.33, 0.37],  # grey zone
        [0.50, 0.40, 0.40],  # no-reflow core
        [0.60, 0.50, 0.50],  # right ventricle
        [0.60, 0.60, 0.60],  # rest
    ]
)
#: Correlation of that texture: LGE with T2, LGE with bSSFP, T2 with bSSFP.
TEXTURE_CORRELATION: Floats = np.array(
    [
        [0.22, -0.59, 0.35],  # blood
        [-0.64, -0.70, -0.07],  # myocardium
        [0.70, 0.25, 0.39],  # edema
        [0.25, 0.28, 0.06],  # scar
        [0.00, 0.20, 0.00],  # slow flow
        [0.00, 0.20, 0.00],  # rim
        [0.00, 0.20, 0.00],  # trabecula
        [0.15, 0.15, 0.15],  # grey zone
        [0.10, 0.10, 0.10],  # no-reflow core
        [0.00, 0.20, 0.00],  # right ventricle
        [0.20, 0.30, 0.20],  # rest
    ]
)
#: Standard deviation of each look's mean between slices; scar's row serves the core, blood's the rest.
BETWEEN: Floats = np.array([[0.64, 0.44, 0.52], [0.20, 0.32, 0.25], [1.55, 0.70, 1.52], [0.69, 0.51, 0.29]])[
    [0, 1, 2, 3, 0, 0, 0, 1, 3, 0, 0]
]
#: Share of that variance which all looks of a slice have in common, and which all slices of a patient have in common.
SHARED_BY_LOOKS: Floats = np.full((len(Look), 3), 0.4)
SHARED_BY_LOOKS[:, 1] = [
    0.05,
    0.75,
    0.75,
    0.75,
    0.05,
    0.4,
    0.4,
    0.75,
    0.75,
    0.05,
    0.05,
]  # on T2 the wall's tissues go together
SHARED_BY_SLICES = 0.75
#: The texture: correlation lengths in mm (standard deviation of the Gaussian filter) and shares of the variance.
TEXTURE_SCALES: tuple[tuple[float, float], ...] = ((0.3, 0.03), (1.05, 0.53), (3.5, 0.11), (12.0, 0.33))
#: The scanner's blur; looks that fade into each other, and over which distance (standard deviations of Gaussians).
BLUR_MM = 1.1
FADES_MM: tuple[tuple[list[int], float], ...] = (
    ([Look.EDEMA, Look.GREY_ZONE, Look.MYOCARDIUM], 3.2),
    ([Look.SLOW_FLOW, Look.BLOOD], 3.0),
)
#: Over which distance the displacement of the sequences against each other changes.
SHIFT_SCALE_MM = 15.0
#: An intensity of zero lies here, in standard deviations over the crop: magnitude images have no negative values.
ZERO_AT: Floats = np.array([-1.55, -1.15, -1.35])


def paint(
    rng: np.random.Generator,
    shapes: list[Slice],
    truth: NDArray[np.int16],
    x: Floats,
    y: Floats,
    *,
    shift_mm: float,
    of_patient: Floats,
) -> Floats:
    """Intensities as z-scores over the crop, ``(3, H, W, n_slices)``; ``of_patient`` as from ``deviation``."""
    spacing = float(x[1, 0] - x[0, 0])
    gain = np.exp(0.25 * rng.standard_normal((1, 3))) * np.exp(0.12 * rng.standard_normal((len(Look), 3)))
    scores = []
    for i, shape in enumerate(shapes):
        mean = MEANS + np.sqrt(SHARED_BY_SLICES) * of_patient + np.sqrt(1 - SHARED_BY_SLICES) * deviation(rng)
        noise = _texture(rng, x.shape, spacing)
        rest = _rest(rng, x, y, spacing)
        picture = np.stack(
            [_blend(_memberships(rng, shape, x, y, spacing, shift_mm), mean, gain, noise, rest, c) for c in range(3)]
        )
        scores.append(_standardised(picture, truth[..., i], spacing))
    return np.stack(scores, axis=-1)


def deviation(rng: np.random.Generator) -> Floats:
    """How far the looks' means lie from ``MEANS``, ``(looks, 3)``: partly all looks together, partly each by itself."""
    common = rng.standard_normal((1, 3))
    common[0, 2] = 0.8 * common[0, 0] + 0.6 * common[0, 2]  # LGE and bSSFP are bright together
    own = rng.standard_normal((len(Look), 3))
    away: Floats = BETWEEN * (np.sqrt(SHARED_BY_LOOKS) * common + np.sqrt(1 - SHARED_BY_LOOKS) * own)
    return away


def _texture(rng: np.random.Generator, extent: tuple[int, ...], spacing: float) -> Floats:
    """Three independent fields of unit variance, correlated in space as the residuals of patients, ``(3, H, W)``."""
    total = np.zeros((3, *extent))
    for scale_mm, share in TEXTURE_SCALES:
        total += np.sqrt(share) * _smooth_noise(rng, (3, *extent), scale_mm / spacing)
    return total


def _smooth_noise(rng: np.random.Generator, extent: tuple[int, ...], sigma: float) -> Floats:
    """Gaussian-filtered noise of unit variance over the last two axes; ``sigma`` in voxels."""
    field: Floats = gaussian_filter(rng.standard_normal(extent), (0,) * (len(extent) - 2) + (sigma, sigma), mode="wrap")
    field /= field.std(axis=(-2, -1), keepdims=True)
    return field


def _memberships(
    rng: np.random.Generator, shape: Slice, x: Floats, y: Floats, spacing: float, shift_mm: float
) -> Floats:
    """How much of each look a voxel of one sequence holds, ``(looks, H, W)``, sum 1.

    The sequence's own displacement, the scanner's blur, and borders that fade out: edema into myocardium, slow flow
    into the cavity.
    """
    dx, dy = shift_mm * _smooth_noise(rng, (2, *x.shape), SHIFT_SCALE_MM / spacing)
    seen = looks(shape, x + dx, y + dy)
    sharp = (seen == np.arange(len(Look))[:, None, None]).astype(np.float64)
    soft = _blurred(sharp, BLUR_MM / spacing)
    for pair, fade_mm in FADES_MM:
        both = soft[pair].sum(0)
        faded = _blurred(sharp[pair], fade_mm / spacing)
        soft[pair] = both * (faded + 1e-9) / (faded.sum(0) + 2e-9)
    return soft


def _blurred(planes: Floats, sigma: float) -> Floats:
    blurred: Floats = gaussian_filter(planes, (0, sigma, sigma), truncate=3.0)
    return blurred


def _blend(members: Floats, mean: Floats, gain: Floats, noise: Floats, rest: Floats, channel: int) -> Floats:
    """One sequence: each look's mean and texture, in proportion to its membership, ``(H, W)``."""
    picture: Floats = members[Look.REST] * rest[channel]
    for look in Look:
        if look is Look.REST:
            continue
        grain = np.einsum("m,mhw->hw", _mixing(TEXTURE_CORRELATION[look])[channel], noise)
        picture += members[look] * (mean[look, channel] + TEXTURE[look, channel] * gain[look, channel] * grain)
    return picture


def _mixing(correlation: Floats) -> Floats:
    """The Cholesky factor of a 3×3 correlation matrix given as its three entries above the diagonal."""
    a, b, c = correlation
    factor: Floats = np.linalg.cholesky(np.array([[1, a, b], [a, 1, c], [b, c, 1]]))
    return factor


def _rest(rng: np.random.Generator, x: Floats, y: Floats, spacing: float) -> Floats:
    """Chest wall, lung and fat around the heart, ``(3, H, W)``; bright at the upper side, dark at the lower right."""
    common = _smooth_noise(rng, x.shape, 7.0 / spacing)
    own = _smooth_noise(rng, (3, *x.shape), 4.5 / spacing)
    fine = _smooth_noise(rng, (3, *x.shape), 1.1 / spacing)
    turn = rng.normal(0, 0.25)
    across = x * np.sin(turn) - y * np.cos(turn)
    chest = 1 / (1 + np.exp(-(across - rng.uniform(38, 46) - 4 * common) / 1.5))
    lung = 1 / (1 + np.exp(-(x - y - 45 + 8 * common) / 4))
    # Mostly dark with some bright streaks, as fat and vessels are.
    tissue = np.exp(0.35 * common + 0.45 * own) * (1 + 0.2 * fine)
    rest: Floats = tissue * (1 - 0.85 * lung) + np.array([1.0, 1.6, 1.2])[:, None, None] * chest
    return rest


def _standardised(picture: Floats, truth: NDArray[np.int16], spacing: float) -> Floats:
    """Scales what lies outside of the ventricles so that the crop around the left one has mean 0 and deviation 1.

    So a z-score over the crop gives the tissues back the means that they were painted with.
    """
    left = (truth > 0) & (truth != RIGHT_VENTRICLE)
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


def intensities(
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
    """A smooth field per sequence, between -1 and 1, much alike in all slices, ``(3, H, W, n_slices)``."""
    u, v = np.clip(x / (CROP_MM / 2), -1, 1), np.clip(y / (CROP_MM / 2), -1, 1)
    basis = np.stack([u, v, u * v, u**2 - 0.5, v**2 - 0.5])
    weights = rng.standard_normal((3, 1, 5)) + 0.3 * rng.standard_normal((3, n_slices, 5))
    field = np.einsum("csb,bhw->chws", weights, basis)
    peak: Floats = field / np.abs(field).max(axis=(1, 2), keepdims=True)
    return peak
