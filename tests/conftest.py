"""A cohort that takes no time: tiny short-axis stacks in MyoPS naming, with four tissues that anyone can tell apart."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from numpy.typing import NDArray

# Networks as small as these are done before threads have met, and where tests run side by side those get stuck.
torch.set_num_threads(1)

#: Intensities of each tissue (its value in the file with the labels) as the protocol expects them.
CONTRAST = {
    "LGE": {500: 180, 200: 60, 1220: 100, 2221: 220},
    "T2": {500: 40, 200: 100, 1220: 220, 2221: 180},
    "C0": {500: 220, 200: 60, 1220: 110, 2221: 65},
}
AFFINE = np.array([[-1.5, 0, 0, 40], [0, -1.5, 0, 30], [0, 0, 8, -10], [0, 0, 0, 1.0]])

MakePatient = Callable[..., dict[str, Path]]


def heart(shape: tuple[int, int, int] = (48, 48, 2)) -> NDArray[np.int16]:
    """A ring of wall (edema in a quarter of it, scar in another) around a pool of blood, with MyoPS's values."""
    x, y, _ = np.meshgrid(*(np.arange(n) - n // 2 for n in shape), indexing="ij")
    radius = np.hypot(x, y)
    labels = np.where(radius < 16, 200, 0)
    labels[(radius < 16) & (x > 0) & (y > 0)] = 1220
    labels[(radius < 16) & (x > 0) & (y <= 0)] = 2221
    labels[radius < 9] = 500
    return labels.astype(np.int16)


def save(path: Path, data: NDArray[np.generic], affine: NDArray[np.float64] = AFFINE) -> Path:
    """Writes NIfTI-1 in mm and seconds, sform and qform alike."""
    image = nib.Nifti1Image(data, affine)
    image.header.set_xyzt_units("mm", "sec")
    image.set_sform(affine, 1)
    image.set_qform(affine, 1)
    nib.save(image, path)
    return path


@pytest.fixture(scope="session")
def make_patient() -> MakePatient:
    """Writes one patient and returns its files by what they hold: LGE, T2, C0 and gd (the labels, and the mask)."""

    def make(
        folder: Path,
        patient: str,
        *,
        seed: int = 0,
        shape: tuple[int, int, int] = (48, 48, 2),
        affine: NDArray[np.float64] = AFFINE,
        sequences: tuple[str, ...] = ("LGE", "T2", "C0"),
    ) -> dict[str, Path]:
        folder.mkdir(parents=True, exist_ok=True)
        labels, rng = heart(shape), np.random.default_rng(seed)
        files = {}
        for sequence in sequences:
            image = 20 + rng.normal(0, 6, shape)
            for value, level in CONTRAST[sequence].items():
                image[labels == value] += level
            files[sequence] = save(folder / f"{patient}_{sequence}.nii.gz", np.rint(image).astype(np.int16), affine)
        files["gd"] = save(folder / f"{patient}_gd.nii.gz", labels, affine)
        return files

    return make


@pytest.fixture
def no_picture(monkeypatch: pytest.MonkeyPatch) -> None:
    """A run without the mosaic, which takes most of a tiny patient's time."""
    monkeypatch.setattr("monai_deepgmm.results.report.preview", lambda segmentation: b"no picture")


@pytest.fixture
def cohort_dir(tmp_path: Path, make_patient: MakePatient) -> Path:
    """Three patients of this test's own: pat1, pat2, pat3."""
    for number in (1, 2, 3):
        make_patient(tmp_path / "cohort", f"pat{number}", seed=number)
    return tmp_path / "cohort"
