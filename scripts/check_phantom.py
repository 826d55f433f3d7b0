"""Measures phantom patients as real ones were measured, and prints both beside each other.

``python scripts/check_phantom.py [-n 40] [--seed 0] [--solver sklearn|em]`` ends with exit code 1 if any number is off.

Every slice is z-scored per sequence over the 120 mm square around the left ventricle. A mean over slices may be off by
its allowance plus 2.5 standard errors over patients, since slices of one patient are alike.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial

import numpy as np
from numpy.typing import NDArray
from sklearn.mixture import GaussianMixture

from monai_deepgmm.phantom.heart import SEQUENCES, PhantomConfig, PhantomPatient, make_patient
from monai_deepgmm.results.metrics import confusion, matched_dice

Floats = NDArray[np.float64]
Labels = NDArray[np.int64]
Solver = Callable[[Floats, Labels], Labels]

TISSUES = {"blood": 500, "myocardium": 200, "edema": 1220, "scar": 2221}
CROP_MM = 120.0
LAGS = (1, 2, 3, 5, 8)

#: 102 slices of 25 patients. Per tissue: mean, sd between slices, sd within; then the correlations within
#: (LGE-T2, LGE-bSSFP, T2-bSSFP); then the share of the left ventricle.
TARGET = {
    "blood": ((1.12, -0.17, 1.60), (0.50, 0.38, 0.36), (0.66, 0.63, 0.60), (-0.42, 0.45, -0.40), 0.38),
    "myocardium": ((-0.45, 0.52, -0.05), (0.26, 0.31, 0.24), (0.55, 0.41, 0.44), (0.15, 0.19, 0.16), 0.38),
    "edema": ((0.28, 1.23, 0.54), (0.71, 0.47, 0.58), (0.70, 0.45, 0.59), (0.10, 0.35, 0.04), 0.11),
    "scar": ((1.13, 1.08, 0.40), (0.76, 0.56, 0.37), (0.82, 0.53, 0.52), (0.21, 0.24, 0.07), 0.14),
}
TARGET_LAGS = (0.86, 0.68, 0.53, 0.36, 0.24)
TARGET_DICE = (0.72, 0.74, 0.22, 0.48)
DICE_TOLERANCE = 0.07


@dataclass(frozen=True)
class Crop:
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


@dataclass(frozen=True)
class Row:
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


def residuals(crop: Crop) -> Floats:
    """What is left when each tissue's mean is taken off and its standard deviation divided out; NaN outside."""
    result = np.full(crop.image.shape, np.nan)
    for tissue in range(1, len(TISSUES) + 1):
        inside = crop.labels == tissue
        if inside.sum() >= 30:
            values = crop.image[:, inside]
            result[:, inside] = (values - values.mean(1, keepdims=True)) / values.std(1, keepdims=True)
    return result


def autocorrelation(crop: Crop) -> Floats:
    """Correlation of the residuals of two voxels of one tissue at each of ``LAGS``, over sequences and directions."""
    left = residuals(crop)
    return np.array([np.mean([_lagged(left, crop.labels, lag, axis) for axis in (0, 1)]) for lag in LAGS])


def _lagged(left: Floats, labels: Labels, lag: int, axis: int) -> float:
    here, there = [np.s_[:], np.s_[:]], [np.s_[:], np.s_[:]]
    here[axis], there[axis] = np.s_[:-lag], np.s_[lag:]
    first, second = left[(np.s_[:], *here)], left[(np.s_[:], *there)]
    same = (labels[tuple(here)] == labels[tuple(there)]) & ~np.isnan(first[0]) & ~np.isnan(second[0])
    return float((first[:, same] * second[:, same]).mean())


def moments(crop: Crop, tissue: int) -> Floats | None:
    """A tissue's means (3), sds (3), correlations (3) and share of the left ventricle (1); None where it is absent."""
    inside = crop.labels == tissue
    if inside.sum() < 30:
        return None
    values = crop.image[:, inside]
    correlation = np.corrcoef(values)[[0, 0, 1], [1, 2, 2]]
    return np.r_[values.mean(1), values.std(1), correlation, inside.sum() / (crop.labels > 0).sum()]


def sklearn_labels(voxels: Floats, _: Labels) -> Labels:
    """A converged mixture of four Gaussians with diagonal covariances, from k-means++: one label per voxel, 1 … 4."""
    mixture = GaussianMixture(
        4, covariance_type="diag", tol=1e-6, max_iter=1000, init_params="k-means++", random_state=0
    )
    found: Labels = mixture.fit_predict(voxels).astype(np.int64) + 1
    return found


def em_labels(voxels: Floats, _: Labels) -> Labels:
    """The same by the package's own EM."""
    import torch

    from monai_deepgmm.mixture import em

    torch.set_num_threads(1)
    image, mask = torch.from_numpy(voxels.T.copy())[None], torch.ones(1, 1, len(voxels), dtype=torch.float64)
    start = em.kmeans_start(image, mask, 4, generator=torch.Generator().manual_seed(0))
    fit = em.fit(image, mask, start, tol=1e-6, max_iter=1000)
    return fit.resp[0].argmax(0).numpy() + 1


def truth_labels(voxels: Floats, truth: Labels) -> Labels:
    """Four full Gaussians fitted with the truth: what a mixture could reach at best."""
    score = np.empty((4, len(voxels)))
    for k in range(4):
        mine = voxels[truth == k + 1]
        away = voxels - mine.mean(0)
        covariance = np.cov(mine.T)
        distance = np.einsum("ni,ij,nj->n", away, np.linalg.inv(covariance), away)
        score[k] = np.log(len(mine)) - 0.5 * (np.linalg.slogdet(covariance)[1] + distance)
    return score.argmax(0) + 1


SOLVERS: dict[str, Solver] = {"sklearn": sklearn_labels, "em": em_labels, "truth": truth_labels}


def dice(crop: Crop, solver: str = "sklearn") -> Floats:
    """Dice of each tissue when the mixture's components are named with the help of the truth."""
    inside = crop.labels > 0
    voxels, truth = crop.image[:, inside].T, crop.labels[inside]
    found = SOLVERS[solver]((voxels - voxels.mean(0)) / voxels.std(0), truth)
    return matched_dice(confusion(found, truth, (1, 2, 3, 4)))


def tissue_rows(slices: Sequence[Crop]) -> list[Row]:
    """Means, spreads, correlations and shares of the four tissues."""
    rows = []
    for tissue, (name, (means, between, within, correlations, share)) in enumerate(TARGET.items(), 1):
        found = [(c.patient, m) for c in slices if (m := moments(c, tissue)) is not None]
        table = np.array([m for _, m in found])
        root = np.sqrt(len({p for p, _ in found}))
        average, spread = table.mean(0), table.std(0)
        for i, s in enumerate(SEQUENCES):
            rows.append(Row(f"{name} {s} mean", average[i], means[i], 0.08 + 2.5 * between[i] / root))
            allowed = 0.06 + 2.5 * between[i] / np.sqrt(2) / root
            rows.append(Row(f"{name} {s} sd between slices", spread[i], between[i], allowed))
            rows.append(Row(f"{name} {s} sd within", average[3 + i], within[i], 0.06 + 2.5 * spread[3 + i] / root))
        for i, pair in enumerate(("LGE-T2", "LGE-bSSFP", "T2-bSSFP")):
            allowed = 0.06 + 2.5 * spread[6 + i] / root
            rows.append(Row(f"{name} {pair} correlation", average[6 + i], correlations[i], allowed))
        rows.append(Row(f"{name} share", average[9], share, 0.02 + 2.5 * spread[9] / root))
    return rows


def texture_rows(slices: Sequence[Crop]) -> list[Row]:
    """How far the residuals are correlated in space."""
    found = np.mean([autocorrelation(c) for c in slices], axis=0)
    return [Row(f"residuals, lag {lag}", f, t, 0.06) for lag, f, t in zip(LAGS, found, TARGET_LAGS, strict=True)]


def geometry_rows(slices: Sequence[Crop], patients: Sequence[PhantomPatient]) -> list[Row]:
    """Sizes in mm, and how many slices hold which tissue."""
    areas = np.array([[(c.labels > 0).sum(), (c.labels == 1).sum()] for c in slices])
    outer, inner = np.sqrt(areas.T / np.pi) * np.array([c.spacing_mm for c in slices])
    thick = np.array([np.linalg.norm(p.affine[:3, 2]) for p in patients])
    root = np.sqrt(len(patients))
    rows = []
    for name, values, low, high in (("radius", outer, 25.0, 40.0), ("wall", outer - inner, 9.0, 16.0)):
        rows.append(Row(f"{name} mm, 5th percentile", np.percentile(values, 5), low, 1.0 + 8 / root))
        rows.append(Row(f"{name} mm, 95th percentile", np.percentile(values, 95), high, 1.0 + 8 / root))
    rows.append(Row("thickness mm, least", thick.min(), 12.0, 0.01))
    rows.append(Row("thickness mm, most", thick.max(), 23.0, 0.01))
    held = {
        "edema": np.mean([(c.labels == 3).any() for c in slices]),
        "scar": np.mean([(c.labels == 4).any() for c in slices]),
    }
    held["all four"] = np.mean([c.complete for c in slices])
    for name, target in (("edema", 87 / 102), ("scar", 89 / 102), ("all four", 79 / 102)):
        rows.append(Row(f"slices with {name}", held[name], target, 0.03 + 1.25 / np.sqrt(len(slices))))
    return rows


def dice_rows(scores: Floats) -> list[Row]:
    """Matched Dice of a converged mixture on the slices that hold all four tissues."""
    found = scores.mean(0)
    return [Row(f"Dice {t}", f, g, DICE_TOLERANCE) for t, f, g in zip(TISSUES, found, TARGET_DICE, strict=True)]


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("-n", type=int, default=40, help="patients (default 40)")
    parser.add_argument("--seed", type=int, default=0, help="the cohort's seed (default 0)")
    parser.add_argument("--solver", choices=["sklearn", "em"], default="sklearn", help="who fits the mixture")
    parser.add_argument("--jobs", type=int, default=2, help="processes (default 2)")
    args = parser.parse_args()
    with ProcessPoolExecutor(args.jobs) as pool:
        patients = list(pool.map(partial(make_patient, PhantomConfig(), args.seed), range(1, args.n + 1)))
        slices = [crop for patient in patients for crop in crops(patient)]
        complete = [crop for crop in slices if crop.complete]
        scores = np.array(list(pool.map(partial(dice, solver=args.solver), complete)))
        best = np.array(list(pool.map(partial(dice, solver="truth"), complete)))
    rows = tissue_rows(slices) + texture_rows(slices) + geometry_rows(slices, patients) + dice_rows(scores)
    print(f"{len(patients)} patients, {len(slices)} slices, {len(complete)} with all four tissues, seed {args.seed}\n")
    print(f"{'':34}{'phantom':>9}{'patients':>10}{'differ':>9}{'allowed':>9}")
    for row in rows:
        numbers = f"{row.found:9.2f}{row.target:10.2f}{row.found - row.target:+9.2f}{row.tolerance:9.2f}"
        print(f"{row.name:34}{numbers}  {'ok' if row.ok else 'OFF'}")
    bound = " ".join(f"{b:.2f}" for b in best.mean(0))
    print(f"\nGaussians fitted with the truth reach {bound}, mean {best.mean():.2f}")
    print("(in patients edema .51, scar .67, mean .73)")
    off = sum(not row.ok for row in rows)
    print(f"{off} of {len(rows)} numbers are off" if off else f"all {len(rows)} numbers are within their tolerance")
    return int(off > 0)


if __name__ == "__main__":
    sys.exit(main())
