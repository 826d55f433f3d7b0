"""Measures phantom patients as real ones were measured, and prints both beside each other.

``python scripts/check_phantom.py [-n 40] [--seed 0] [--solver sklearn|em]`` ends with exit code 1 if any number is off.

Every slice is z-scored per sequence over the 120 mm square around the left ventricle. A mean over slices may be off by
its allowance plus 2.5 standard errors over patients, since slices of one patient are alike.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from typing import NamedTuple

import numpy as np
import runner
from numpy.typing import NDArray
from sklearn.discriminant_analysis import QuadraticDiscriminantAnalysis
from sklearn.mixture import GaussianMixture
from sklearn.preprocessing import scale

from monai_deepgmm.phantom.heart import SEQUENCES, PhantomConfig, PhantomPatient, make_patient
from monai_deepgmm.results.metrics import confusion, oracle_matched_dice

Floats = NDArray[np.float64]
Labels = NDArray[np.int64]

TISSUES = {"blood": 500, "myocardium": 200, "edema": 1220, "scar": 2221}
PAIRS = ("LGE-T2", "LGE-bSSFP", "T2-bSSFP")
CROP_MM = 120.0
LAGS = (1, 2, 3, 5, 8)
#: Voxels that a tissue needs in a slice to have moments.
ENOUGH = 30
#: 102 slices of 25 patients. Per tissue: mean, sd between slices, sd within; then the correlations within, of PAIRS;
#: then the share of the left ventricle.
TARGET = {
    "blood": ((1.12, -0.17, 1.60), (0.50, 0.38, 0.36), (0.66, 0.63, 0.60), (-0.42, 0.45, -0.40), 0.38),
    "myocardium": ((-0.45, 0.52, -0.05), (0.26, 0.31, 0.24), (0.55, 0.41, 0.44), (0.15, 0.19, 0.16), 0.38),
    "edema": ((0.28, 1.23, 0.54), (0.71, 0.47, 0.58), (0.70, 0.45, 0.59), (0.10, 0.35, 0.04), 0.11),
    "scar": ((1.13, 1.08, 0.40), (0.76, 0.56, 0.37), (0.82, 0.53, 0.52), (0.21, 0.24, 0.07), 0.14),
}
TARGET_LAGS = (0.86, 0.68, 0.53, 0.36, 0.24)
TARGET_DICE = (0.72, 0.74, 0.22, 0.48)
DICE_TOLERANCE = 0.07


class Crop(NamedTuple):
    """One slice around the left ventricle.

    Attributes:
        patient: the id.
        image: z-scores ``(3, h, w)``.
        labels: 0 outside, 1 … 4 in the order of ``TISSUES``, ``(h, w)``.
        spacing_mm: in-plane.
    """

    patient: str
    image: Floats
    labels: Labels
    spacing_mm: float

    @property
    def complete(self) -> bool:
        """Whether all four tissues are there."""
        return len(np.unique(self.labels[self.labels > 0])) == len(TISSUES)


class Row(NamedTuple):
    """One line of the table: what was measured, what it should be, and by how much it may differ."""

    name: str
    found: float
    target: float
    tolerance: float

    @property
    def ok(self) -> bool:
        """Whether the difference is within the tolerance."""
        return abs(self.found - self.target) <= self.tolerance


def crops(patient: PhantomPatient) -> Iterator[Crop]:
    """The slices that hold the left ventricle."""
    spacing = float(np.linalg.norm(patient.affine[:3, 0]))
    image = np.stack([patient.images[s] for s in SEQUENCES]).astype(np.float64)
    labels = sum((patient.labels == value) * (i + 1) for i, value in enumerate(TISSUES.values()))
    for z in range(patient.n_slices):
        points = np.argwhere(labels[..., z] > 0)
        if not len(points):
            continue
        middle, half = np.round((points.min(0) + points.max(0)) / 2), round(CROP_MM / spacing / 2)
        window = tuple(slice(max(0, int(m) - half), int(m) + half) for m in middle)
        part = image[(slice(None), *window, z)]
        score = (part - part.mean((1, 2), keepdims=True)) / part.std((1, 2), keepdims=True)
        yield Crop(patient.patient, score, labels[(*window, z)].astype(np.int64), spacing)


def autocorrelation(crop: Crop) -> Floats:
    """Correlation of two voxels of one tissue at each of ``LAGS``, each tissue's mean and sd taken off."""
    left = np.full(crop.image.shape, np.nan)
    for tissue in range(1, len(TISSUES) + 1):
        inside = crop.labels == tissue
        if inside.sum() >= ENOUGH:
            left[:, inside] = scale(crop.image[:, inside], axis=1)
    return np.array([np.mean([_lagged(left, crop.labels, lag, axis) for axis in (0, 1)]) for lag in LAGS])


def _lagged(left: Floats, labels: Labels, lag: int, axis: int) -> float:
    """Over sequences and the voxels along one axis."""
    here, there = [np.s_[:], np.s_[:]], [np.s_[:], np.s_[:]]
    here[axis], there[axis] = np.s_[:-lag], np.s_[lag:]
    products = left[(np.s_[:], *here)] * left[(np.s_[:], *there)]
    return float(np.nanmean(products[:, labels[tuple(here)] == labels[tuple(there)]]))


def moments(crop: Crop, tissue: int) -> Floats | None:
    """A tissue's means (3), sds (3), correlations (3) and share of the left ventricle (1); None where it is absent."""
    inside = crop.labels == tissue
    if inside.sum() < ENOUGH:
        return None
    values = crop.image[:, inside]
    correlation = np.corrcoef(values)[[0, 0, 1], [1, 2, 2]]
    return np.r_[values.mean(1), values.std(1), correlation, inside.sum() / (crop.labels > 0).sum()]


def sklearn_labels(voxels: Floats, _: Labels) -> Labels:
    """A converged mixture of four Gaussians with diagonal covariances, from k-means++: one label per voxel, 1 … 4."""
    stop = {"tol": 1e-6, "max_iter": 1000}
    mixture = GaussianMixture(4, covariance_type="diag", init_params="k-means++", random_state=0, **stop)
    found: Labels = mixture.fit_predict(voxels).astype(np.int64) + 1
    return found


def em_labels(voxels: Floats, _: Labels) -> Labels:
    """The same by the package's own EM."""
    import torch

    from monai_deepgmm.mixture import em, starts

    torch.set_num_threads(1)
    image, mask = torch.from_numpy(voxels.T.copy())[None], torch.ones(1, 1, len(voxels), dtype=torch.float64)
    start = starts.kmeans_start(image, mask, 4, generator=torch.Generator().manual_seed(0))
    fit = em.fit_em(image, mask, start, tol=1e-6, max_iter=1000)
    return fit.resp[0].argmax(0).numpy() + 1


def reference_fitted(voxels: Floats, reference: Labels) -> Labels:
    """Four full Gaussians fitted with the reference labels: what a mixture could reach at best."""
    found: Labels = QuadraticDiscriminantAnalysis().fit(voxels, reference).predict(voxels)
    return found


SOLVERS: dict[str, Callable[[Floats, Labels], Labels]] = {
    "sklearn": sklearn_labels,
    "em": em_labels,
    "reference": reference_fitted,
}


def dice(crop: Crop, solver: str = "sklearn") -> Floats:
    """Oracle-matched Dice of each tissue."""
    inside = crop.labels > 0
    reference = crop.labels[inside]
    found = SOLVERS[solver](scale(crop.image[:, inside].T), reference)
    return oracle_matched_dice(confusion(found, reference, (1, 2, 3, 4)))


def tissue_rows(slices: Sequence[Crop]) -> Iterator[Row]:
    """Means, spreads, correlations and shares of the four tissues."""
    for tissue, (name, (means, between, within, correlations, share)) in enumerate(TARGET.items(), 1):
        found = [(c.patient, m) for c in slices if (m := moments(c, tissue)) is not None]
        values = np.array([m for _, m in found])
        root = np.sqrt(len({p for p, _ in found}))
        average, spread = values.mean(0), values.std(0)
        for i, s in enumerate(SEQUENCES):
            yield Row(f"{name} {s} mean", average[i], means[i], 0.08 + 2.5 * between[i] / root)
            allowed = 0.06 + 2.5 * between[i] / np.sqrt(2) / root
            yield Row(f"{name} {s} sd between slices", spread[i], between[i], allowed)
            yield Row(f"{name} {s} sd within", average[3 + i], within[i], 0.06 + 2.5 * spread[3 + i] / root)
        for i, pair in enumerate(PAIRS):
            allowed = 0.06 + 2.5 * spread[6 + i] / root
            yield Row(f"{name} {pair} correlation", average[6 + i], correlations[i], allowed)
        yield Row(f"{name} share", average[9], share, 0.02 + 2.5 * spread[9] / root)


def texture_rows(slices: Sequence[Crop]) -> Iterator[Row]:
    """How residuals repeat each other at a distance."""
    lags = np.mean([autocorrelation(crop) for crop in slices], 0)
    for n, found, target in zip(LAGS, lags, TARGET_LAGS, strict=True):
        yield Row(f"residuals, lag {n}", found, target, 0.06)


def dice_rows(scores: Floats) -> Iterator[Row]:
    """The oracle-matched Dice of each tissue, over slices ``(N, 4)``."""
    for tissue, found, target in zip(TISSUES, scores.mean(0), TARGET_DICE, strict=True):
        yield Row(f"Dice {tissue}", found, target, DICE_TOLERANCE)


def geometry_rows(slices: Sequence[Crop], patients: Sequence[PhantomPatient]) -> Iterator[Row]:
    """Sizes in mm, and how many slices hold which tissue."""
    areas = np.array([[(c.labels > 0).sum(), (c.labels == 1).sum()] for c in slices])
    outer, inner = np.sqrt(areas.T / np.pi) * np.array([c.spacing_mm for c in slices])
    thick = np.array([np.linalg.norm(p.affine[:3, 2]) for p in patients])
    allowed = 1.0 + 8 / np.sqrt(len(patients))
    for name, values, low, high in (("radius", outer, 25.0, 40.0), ("wall", outer - inner, 9.0, 16.0)):
        yield Row(f"{name} mm, 5th percentile", np.percentile(values, 5), low, allowed)
        yield Row(f"{name} mm, 95th percentile", np.percentile(values, 95), high, allowed)
    yield Row("thickness mm, least", thick.min(), 12.0, 0.01)
    yield Row("thickness mm, most", thick.max(), 23.0, 0.01)
    held = [((c.labels == 3).any(), (c.labels == 4).any(), c.complete) for c in slices]
    for name, share, target in zip(("edema", "scar", "all four"), np.mean(held, 0), (87, 89, 79), strict=True):
        yield Row(f"slices with {name}", share, target / 102, 0.03 + 1.25 / np.sqrt(len(slices)))


def main() -> int:
    parser = runner.parser(__doc__)
    parser.add_argument("-n", type=int, default=40, help="patients")
    parser.add_argument("--seed", type=int, default=0, help="the cohort's seed")
    parser.add_argument("--solver", choices=["sklearn", "em"], default="sklearn", help="who fits the mixture")
    parser.add_argument("--jobs", type=int, default=2, help="processes")
    args = parser.parse_args()
    with ProcessPoolExecutor(args.jobs) as pool:
        patients = list(pool.map(partial(make_patient, PhantomConfig(), args.seed), range(1, args.n + 1)))
        slices = [crop for patient in patients for crop in crops(patient)]
        complete = [crop for crop in slices if crop.complete]
        scores = np.array(list(pool.map(partial(dice, solver=args.solver), complete)))
        best = np.mean(list(pool.map(partial(dice, solver="reference"), complete)), 0)
    rows = [*tissue_rows(slices), *texture_rows(slices), *geometry_rows(slices, patients), *dice_rows(scores)]
    print(f"{len(patients)} patients, {len(slices)} slices, {len(complete)} with all four tissues, seed {args.seed}\n")
    cells = [(r.name, *(f"{n:.2f}" for n in (*r[1:3], r.found - r.target, r.tolerance)), r.ok) for r in rows]
    print(
        runner.table(
            [
                ("", "phantom", "patients", "differ", "allowed", ""),
                *((*c[:-1], "ok" if c[-1] else "OFF") for c in cells),
            ]
        )
    )
    bound = " ".join(f"{b:.2f}" for b in best)
    print(f"\nGaussians fitted with the reference labels reach {bound}, mean {best.mean():.2f}")
    print("(in patients edema .51, scar .67, mean .73)")
    off = sum(not row.ok for row in rows)
    print(f"{off} of {len(rows)} numbers are off" if off else f"all {len(rows)} numbers are within their tolerance")
    return int(off > 0)


if __name__ == "__main__":
    sys.exit(main())
