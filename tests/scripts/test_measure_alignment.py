"""What the script plants is what it says, and what it counts is what was planted."""

from __future__ import annotations

import measure_alignment
import nibabel as nib
import numpy as np
import pytest
from scenes import INFARCT
from scipy.ndimage import center_of_mass

from monai_deepgmm.patients import discovery


def test_slices_of_all_sequences_but_the_first_are_moved_by_what_is_told(tmp_path, make_patient):
    make_patient(tmp_path / "in", "pat1", shape=(48, 48, 2))
    blob = np.zeros((48, 48, 2))
    blob[20:26, 18:24] = 100
    files = discovery.find(tmp_path / "in", INFARCT).studies[0].images
    for path in files.values():
        image = nib.load(path)
        nib.save(nib.Nifti1Image(blob, image.affine), path)
    study = discovery.find(tmp_path / "in", INFARCT).studies[0]
    other, planted = measure_alignment.moved(study, tmp_path / "moved", 8.0, 1)
    assert other.images["LGE"] == study.images["LGE"]
    assert set(planted) == {"T2", "bSSFP"}
    for name, each in planted.items():
        image = nib.load(other.images[name])
        for z, vector in enumerate(each):
            assert 0 < np.linalg.norm(vector) <= 8
            before, after = (center_of_mass(np.asarray(i)[..., z]) for i in (blob, image.dataobj))
            voxels = np.subtract(after, before)
            np.testing.assert_allclose(image.affine[:3, :2] @ voxels, vector, atol=0.2)
    assert measure_alignment.moved(study, tmp_path / "moved", 8.0, 1)[1] == planted
    assert measure_alignment.moved(study, tmp_path / "moved", 8.0, 2)[1] != planted


def test_residues_and_dice_are_counted():
    def told(back, moved):
        return {"T2": {"0": {"back_mm": back, "moved": moved}}}

    dice = [
        {"blood": 0.9, "myocardium": 0.8, "edema": 0.5, "scar": 0.6},
        {**dict.fromkeys("ab", 0.1), "c": float("nan")},
    ]
    facts = {f"{kind}, {align}": dice for kind, align in measure_alignment.WAYS} | {
        "planted": {"T2": [[3.0, 4.0, 0.0]]},
        "as it is": told([0.0, -1.0, 0.0], False),
        "moved": told([-3.0, -5.0, 0.0], True),
        "pixel_mm": 0.5,
        "seconds": 0.25,
    }
    found = {way: float(value[0]) for way, value in measure_alignment.residues([facts], "T2").items()}
    assert found == pytest.approx({"planted": 5, "residue": 1, "pixels": 2, "own": 0})
    left = facts | {"moved": told([-3.0, -5.0, 0.0], False)}
    assert float(measure_alignment.residues([left], "T2")["residue"][0]) == pytest.approx(5)
    text = measure_alignment.tables({"p": facts})
    assert "| moved, `--align auto` | 1 | 0.900 | 0.800 | 0.500 | 0.600 | 0.700 |" in text
    assert "| T2 | 1 | 5.00 | 1.00 | 1.00 | 2.00 | 0.00 |" in text
    assert "0 of 1 patients as they are had a slice moved. Alignment: 0.25 CPU s" in text
