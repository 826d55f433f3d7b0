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

#: As small as they may be: what is measured lies within a crop of 120 mm.
CONFIG = PhantomConfig(size=210)
SMALL = replace(CONFIG, slices=(1, 1))


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
    assert write_cohort(root, 2, seed=11, config=CONFIG) == ["Phantom001", "Phantom002"]
    return root


def test_files_are_those_of_myops_and_hold_the_patients(folder, patients):
    found = sorted(str(p.relative_to(folder)) for p in folder.rglob("*.nii.gz"))
    names = [f"Phantom{n:03d}" for n in (1, 2)]
    assert found == sorted(f"{p}/{p}_{s}.nii.gz" for p in names for s in ("LGE", "T2", "C0", "gd"))
    image = nib.load(folder / "Phantom002" / "Phantom002_T2.nii.gz")
    np.testing.assert_allclose(image.affine, patients[1].affine, atol=1e-3)
    np.testing.assert_array_equal(np.asarray(image.dataobj), patients[1].images["T2"])


def test_bytes_depend_on_configuration_seed_and_number_only(tmp_path):
    write_cohort(tmp_path / "one", 1, seed=11, config=SMALL)
    write_cohort(tmp_path / "two", 2, seed=11, config=SMALL)
    for path in sorted((tmp_path / "one/Phantom001").iterdir()):
        assert path.read_bytes() == (tmp_path / "two/Phantom001" / path.name).read_bytes()
    assert path.read_bytes()[4:8] == b"\0\0\0\0"  # gzip's time stamp
    first, *others = (make_patient(SMALL, *who).images["LGE"] for who in ((11, 1), (12, 1), (11, 2)))
    assert not any(np.array_equal(first, other) for other in others)


def test_grid_is_a_scanners_and_one_for_all_files_of_a_patient(folder):
    for patient in folder.iterdir():
        images = [nib.load(path) for path in patient.iterdir()]
        for image in images:
            assert image.get_data_dtype() == np.int16
            assert (int(image.header["sform_code"]), int(image.header["qform_code"])) == (0, 1)
            assert image.header.get_xyzt_units()[0] == "mm"
            assert "".join(nib.aff2axcodes(image.affine)) in ("PSR", "LSP")
            x, y, z = image.header.get_zooms()
            assert x == pytest.approx(y)
            assert 0.73 <= x <= 0.7601
            assert 12 <= z <= 23.001
            assert 2 <= image.shape[2] <= 6
            assert image.shape == images[0].shape
            np.testing.assert_array_equal(image.affine, images[0].affine)


def test_both_orientations_occur_and_several_slice_counts_and_slices_without_edema_or_scar(patients):
    assert {"".join(nib.aff2axcodes(p.affine)) for p in patients} == {"PSR", "LSP"}
    assert len({p.n_slices for p in patients}) >= 3
    slices = [set(np.unique(p.labels[..., z])) for p in patients for z in range(p.n_slices)]
    assert set().union(*slices) == {0, 200, 500, 600, 1220, 2221}
    assert all({200, 500} <= values for values in slices)
    assert any(values & {1220, 2221} == {2221} for values in slices)
    assert any(values & {1220, 2221} == {1220} for values in slices)


def test_chances_of_one_and_zero_are_kept():
    whole = make_patient(SMALL, 5, 2)
    healthy = make_patient(replace(SMALL, healthy=1.0), 3, 1)
    assert not np.isin(healthy.labels, (1220, 2221)).any()
    always = replace(SMALL, no_edema=0.0, no_scar=0.0, no_edema_or_scar=0.0)
    assert {1220, 2221} <= set(np.unique(make_patient(always, 3, 1).labels))
    incomplete = [make_patient(replace(SMALL, incomplete=1.0), 5, n).images for n in range(1, 7)]
    assert {len(images) for images in incomplete} == {1, 2}
    for sequence, image in incomplete[1].items():  # nothing else is changed
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
    dark = []
    for patient in patients:
        for z in range(patient.n_slices):
            labels, values = patient.labels[..., z], patient.images["bSSFP"][..., z]
            blood, muscle = values[labels == 500], np.median(values[labels == 200])
            dark.append((blood < (muscle + np.median(blood)) / 2).mean() > 0.05)
    assert np.mean(dark) > 0.5


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


@pytest.mark.parametrize(("n", "seed", "message"), [(0, 1, "at least 1"), (1, -1, "seed -1")])
def test_impossible_cohorts_are_refused(tmp_path, n, seed, message):
    with pytest.raises(UsageError, match=message):
        write_cohort(tmp_path / "none", n, seed=seed)


def test_statistics_are_those_of_patients(check, patients):
    slices = [crop for patient in patients for crop in check.crops(patient)]
    rows = [*check.tissue_rows(slices), *check.texture_rows(slices), *check.geometry_rows(slices, patients)]
    off = [row for row in rows if not row.ok]
    assert len(off) <= 2, off  # of 66, each with a tolerance of about 2.5 standard errors


def test_converged_mixture_does_as_well_as_on_patients(check, patients):
    """Neither easier nor harder: blood .72, myocardium .74, edema .22, scar .48."""
    complete = [crop for patient in patients for crop in check.crops(patient) if crop.complete][:40]
    assert len(complete) == 40
    scores = np.array([check.dice(crop) for crop in complete])
    assert not [row for row in check.dice_rows(scores) if not row.ok]
