#!/usr/bin/env python3
"""How wide a 90 % interval of a volume must be: measured on synthetic patients with known truth.

Segments phantom patients with the default method, divides what the true volume of each tissue has more than the found
one by the estimated standard deviation, and prints the factor that makes 90 % intervals hold 90 % of the truths, on one
half of the patients, with what they then hold on the other half. The factor in use is
``monai_deepgmm.results.uncertainty.CALIBRATION``.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import nibabel as nib
import numpy as np

from monai_deepgmm.methods import config
from monai_deepgmm.patients import discovery as cohort
from monai_deepgmm.phantom import heart as phantom
from monai_deepgmm.results.segment import segment
from monai_deepgmm.results.uncertainty import CALIBRATION, LEVEL, QUANTILE

NAMES = ("blood", "myocardium", "edema", "scar")


def errors(folder: Path) -> np.ndarray:
    """(true − found) / sd of each tissue of each patient ``(P, 4)``."""
    settings = config.build()
    rows = []
    for study in cohort.find(folder, settings.protocol).studies:
        found = segment(study, settings)
        truth = np.asarray(nib.load(study.truth).dataobj)
        values = {"blood": 500, "myocardium": 200, "edema": 1220, "scar": 2221}
        volumes = found.sidecar["uncertainty"]["volumes"]
        rows.append(
            [
                ((truth == values[name]).sum() * found.reference.voxel_ml - volumes[name]["volume_ml"])
                / max(volumes[name]["sd_ml"], 1e-6)
                for name in NAMES
            ]
        )
    return np.array(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("-n", type=int, default=40, help="how many patients")
    parser.add_argument("--seed", type=int, default=100, help="of the patients")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        phantom.write_cohort(Path(folder), arguments.n, seed=arguments.seed)
        found = np.abs(errors(Path(folder)))
    first, second = found[::2], found[1::2]
    factor = float(np.quantile(first, LEVEL)) / QUANTILE
    print(f"{len(found)} patients, {found.size} volumes")
    print(f"factor for {LEVEL:.0%} on the even half: {factor:.2f} (in use: {CALIBRATION})")
    for name, used in (("this factor", factor), ("the one in use", CALIBRATION)):
        held = (second <= QUANTILE * used).mean(0)
        listed = ", ".join(f"{t} {h:.0%}" for t, h in zip(NAMES, held, strict=True))
        print(f"with {name}, intervals of the odd half hold {(second <= QUANTILE * used).mean():.0%}: {listed}")


if __name__ == "__main__":
    main()
