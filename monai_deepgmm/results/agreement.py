"""Agreement of two measurements of the same patients: Bland-Altman, concordance and intraclass correlation."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from monai_deepgmm.results.evaluate import Evaluation


class Pair(NamedTuple):
    """A tissue's volume in one patient, over the units that were compared.

    Attributes:
        patient: the id.
        predicted_ml: by the software.
        true_ml: by the reference labels.
    """

    patient: str
    predicted_ml: float
    true_ml: float


class Agreement(NamedTuple):
    """How well two measurements agree; what too few patients cannot tell is NaN.

    Attributes:
        n: patients.
        bias: mean of software minus reference.
        sd: sample standard deviation of the differences.
        low: lower limit of agreement, bias − 1.96 sd (Bland and Altman 1986).
        high: upper limit.
        ccc: Lin's concordance correlation coefficient (1989), with population moments.
        icc: ICC(A,1), two-way, absolute agreement, single measurement (McGraw and Wong 1996).
    """

    n: int
    bias: float
    sd: float
    low: float
    high: float
    ccc: float
    icc: float


def pairs(evaluation: Evaluation) -> dict[str, list[Pair]]:
    """Tissue → each patient's two volumes; patients whose sequences cannot show the tissue are left out."""
    found: dict[str, list[Pair]] = {tissue: [] for tissue in evaluation.tissues}
    for name, patient in evaluation.patients.items():
        for tissue in patient.tissues:
            rows = [row for row in patient.rows if row.tissue == tissue]
            if rows:
                ml = [sum(getattr(r, f"voxels_{k}") for r in rows) * patient.voxel_ml for k in ("predicted", "true")]
                found[tissue].append(Pair(name, *ml))
    return found


def agreement(measured: Iterable[Pair]) -> Agreement:
    """Compares the two volumes of each patient."""
    table = np.array([(p.predicted_ml, p.true_ml) for p in measured], dtype=np.float64).reshape(-1, 2)
    if len(table) < 2:
        bias = float(table[0, 0] - table[0, 1]) if len(table) else math.nan
        return Agreement(len(table), bias, *[math.nan] * 5)
    difference = table[:, 0] - table[:, 1]
    bias, sd = float(difference.mean()), float(difference.std(ddof=1))
    reach = 1.96 * sd
    return Agreement(len(table), bias, sd, bias - reach, bias + reach, concordance(table), intraclass(table))


def concordance(table: ArrayLike) -> float:
    """Lin's coefficient, ``2 s_xy / (s_x² + s_y² + (m_x − m_y)²)``, of (n, 2) values."""
    x, y = np.asarray(table, dtype=np.float64).T
    covariance = float(((x - x.mean()) * (y - y.mean())).mean())
    total = float(x.var() + y.var() + (x.mean() - y.mean()) ** 2)
    return 2 * covariance / total if total > 0 else math.nan


def intraclass(table: ArrayLike) -> float:
    """ICC(A,1) of (n, k) values: ``(MSR − MSE) / (MSR + (k − 1) MSE + k (MSC − MSE) / n)``."""
    values = np.asarray(table, dtype=np.float64)
    n, k = values.shape
    grand = values.mean()
    rows, columns = values.mean(axis=1), values.mean(axis=0)
    msr = k * float(((rows - grand) ** 2).sum()) / (n - 1)
    msc = n * float(((columns - grand) ** 2).sum()) / (k - 1)
    error = values - rows[:, None] - columns[None, :] + grand
    mse = float((error**2).sum()) / ((n - 1) * (k - 1))
    below = msr + (k - 1) * mse + k * (msc - mse) / n
    return (msr - mse) / below if below > 0 else math.nan
