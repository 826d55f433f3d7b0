"""Phantom patients: reproducible, on scanner-like grids, with the tissues and the difficulty of real ones."""

from __future__ import annotations

import importlib.util
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import nibabel as nib
import numpy as np
import pytest

from monai_deepgmm.errors import UsageError
from monai_deepgmm.phantom.heart import PhantomConfig, PhantomPatient, make_patient, write_cohort

CONFIG = PhantomConfig()


@pytest.fixture(scope="module")
def check() -> ModuleType:
    """The script that measures phantoms."""
    path = Path(__file__).parents[2] / "scripts" / "check_phantom.py"
    spec = importlib.util.spec_from_file_location("check_phantom", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules["check_phantom"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def patients() -> list[PhantomPatient]:
    return [make_patient(CONFIG, 11, number) for number in range(1, 17)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("cohort")
    assert write_cohort(root, 3, seed=11) == ["Phantom001", "Phantom002", "Phantom003"]
    return root


def test_files_are_those_of_myops(folder):
    found = sorted(str(p.relative_to(folder)) for p in folder.rglob("*.nii.gz"))
    names = [f"Phantom{n:03d}" for n in (1, 2, 3)]
    assert found == sorted(f"{p}/{p}_{s}.nii.gz" for p in names for s in ("LGE", "T2", "C0", "gd"))


def test_bytes_depend_on_configuration_seed_and_number_only(folder, tmp_path):
    write_cohort(tmp_path, 1, seed=11)
    for path in sorted((tmp_path / "Phantom001").iterdir()):
        assert path.read_bytes() == (folder / "Phantom001" / path.name).read_bytes()
    assert path.read_bytes()[4:8] == b"\0\0\0\0"  # gzip's time stamp


def test_seed_and_number_make_another_patient(patients):
    assert not np.array_equal(make_patient(CONFIG, 12, 1).images["LGE"], patients[0].images["LGE"])
    assert not np.array_equal(patients[1].images["LGE"], patients[0].images["LGE"])


def test_grid_is_a_scanners(folder):
    for path in folder.rglob("*.nii.gz"):
        image = nib.load(path)
        assert image.get_data_dtype() == np.int16
        assert (int(image.header["sform_code"]), int(image.header["qform_code"])) == (0, 1)
        assert image.header.get_xyzt_units()[0] == "mm"
        assert "".join(nib.aff2axcodes(image.affine)) in ("PSR", "LSP")
        x, y, z = image.header.get_zooms()
        assert x == pytest.approx(y)
        assert 0.73 <= x <= 0.7601
        assert 12 <= z <= 23.001
        assert 2 <= image.shape[2] <= 6


def test_files_of_a_patient_share_one_grid(folder):
    for patient in folder.iterdir():
        images = [nib.load(p) for p in patient.iterdir()]
        assert len({i.shape for i in images}) == 1
        for image in images:
            np.testing.assert_array_equal(image.affine, images[0].affine)


def test_both_orientations_and_several_slice_counts_occur(patients):
    assert {"".join(nib.aff2axcodes(p.affine)) for p in patients} == {"PSR", "LSP"}
    assert len({p.n_slices for p in patients}) >= 3


def test_written_affine_is_the_patients(folder, patients):
    image = nib.load(folder / "Phantom002" / "Phantom002_T2.nii.gz")
    np.testing.assert_allclose(image.affine, patients[1].affine, atol=1e-3)
    np.testing.assert_array_equal(np.asarray(image.dataobj), patients[1].images["T2"])


def test_labels_are_those_of_myops(patients):
    assert set(np.unique([v for p in patients for v in np.unique(p.labels)])) == {0, 200, 500, 600, 1220, 2221}
    for patient in patients:
        assert all({200, 500} <= set(np.unique(patient.labels[..., z])) for z in range(patient.n_slices))


def test_some_slices_lack_edema_or_scar(patients):
    slices = [p.labels[..., z] for p in patients for z in range(p.n_slices)]
    assert any((s == 2221).any() and not (s == 1220).any() for s in slices)
    assert any((s == 1220).any() and not (s == 2221).any() for s in slices)


def test_healthy_patients_have_neither_edema_nor_scar():
    patient = make_patient(replace(CONFIG, healthy=1.0), 3, 1)
    assert not np.isin(patient.labels, (1220, 2221)).any()


def test_every_slice_can_be_complete():
    config = replace(CONFIG, no_edema=0.0, no_scar=0.0, no_edema_or_scar=0.0, slices=(1, 1))
    assert {1220, 2221} <= set(np.unique(make_patient(config, 3, 1).labels))


def test_incomplete_patients_lack_one_or_two_sequences():
    counts = {len(make_patient(replace(CONFIG, incomplete=1.0), 5, n).images) for n in range(1, 7)}
    assert counts == {1, 2}


def test_leaving_sequences_out_changes_nothing_else():
    whole, part = make_patient(CONFIG, 5, 2), make_patient(replace(CONFIG, incomplete=1.0), 5, 2)
    for sequence, image in part.images.items():
        np.testing.assert_array_equal(image, whole.images[sequence])


def test_shading_multiplies_by_a_smooth_field_of_its_amplitude(patients):
    shaded, plain = make_patient(replace(CONFIG, shading=0.35), 11, 1), patients[0]
    np.testing.assert_array_equal(shaded.labels, plain.labels)
    for sequence, image in plain.images.items():
        bright = image > 100  # whole numbers: the ratio is rough where they are small
        ratio = shaded.images[sequence][bright] / image[bright]
        assert 0.64 < ratio.min() < 0.75 or 1.25 < ratio.max() < 1.36
        assert ratio.min() > 0.64
        assert ratio.max() < 1.36


def test_papillary_muscles_count_as_blood(patients):
    """Labelled cavities have no holes although dark muscles stand in them; bSSFP shows those."""
    dark = 0
    for patient in patients:
        for z in range(patient.n_slices):
            blood = patient.labels[..., z] == 500
            values = patient.images["bSSFP"][..., z]
            muscle = np.median(values[patient.labels[..., z] == 200])
            dark += (values[blood] < (muscle + np.median(values[blood])) / 2).mean() > 0.05
    assert dark > 0.5 * sum(p.n_slices for p in patients)


@pytest.mark.parametrize(
    "wrong",
    [
        {"no_edema": 1.2},
        {"no_edema": 0.6, "no_scar": 0.6},
        {"shading": 1.0},
        {"slices": (0, 2)},
        {"slices": (4, 2)},
        {"spacing_mm": (0.0, 1.0)},
        {"size": 100},
        {"shift_mm": -1.0},
    ],
)
def test_impossible_configurations_are_refused(wrong):
    with pytest.raises(UsageError, match="phantom"):
        PhantomConfig(**wrong)


def test_impossible_cohorts_are_refused(tmp_path):
    with pytest.raises(UsageError, match="at least 1"):
        write_cohort(tmp_path / "none", 0, seed=1)
    with pytest.raises(UsageError, match="seed -1"):
        write_cohort(tmp_path / "none", 1, seed=-1)


def test_statistics_are_those_of_patients(check, patients):
    slices = [crop for patient in patients for crop in check.crops(patient)]
    rows = check.tissue_rows(slices) + check.texture_rows(slices) + check.geometry_rows(slices, patients)
    off = [row for row in rows if not row.ok]
    assert len(off) <= 2, off  # of 66, each with a tolerance of about 2.5 standard errors


def test_converged_mixture_does_as_well_as_on_patients(check, patients):
    """Neither easier nor harder: blood .72, myocardium .74, edema .22, scar .48."""
    complete = [crop for patient in patients for crop in check.crops(patient) if crop.complete][:40]
    assert len(complete) == 40
    scores = np.array([check.dice(crop) for crop in complete])
    off = [row for row in check.dice_rows(scores) if not row.ok]
    assert not off
