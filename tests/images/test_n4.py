"""N4 before the fit, and the files of bias fields: planted shading found again, what is written, kept and cleared."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import SimpleITK
import torch
from conftest import AFFINE, save
from numpy.typing import NDArray
from scenes import BRAIN, INFARCT, TINY, sidecar

from monai_deepgmm.cli import main
from monai_deepgmm.errors import StudyError, UsageError
from monai_deepgmm.images import n4
from monai_deepgmm.methods import model_spec, naming
from monai_deepgmm.methods.config import build
from monai_deepgmm.patients.study import Study
from monai_deepgmm.results import outputs
from monai_deepgmm.results.segment import segment

Floats = NDArray[np.float64]
#: What the preprocessing calls.
N4 = "monai_deepgmm.images.preparation.n4_field"


def planted(shape: tuple[int, ...], *, seed: int = 0) -> tuple[Floats, NDArray[np.bool_], Floats]:
    """Blocks of three tissues with about 30 % of shade along the first axis: image, mask, field (mean 1)."""
    rng = np.random.default_rng(seed)
    grid = np.meshgrid(*(np.linspace(-1, 1, n) for n in shape), indexing="ij")
    mask = sum(g**2 for g, n in zip(grid, shape, strict=True) if n > 4) < 0.95
    image = rng.integers(1, 4, [n // 4 + 1 for n in shape])
    for axis in range(len(shape)):
        image = np.repeat(image, 4, axis)
    field = np.exp(0.3 * grid[0])
    field = np.where(mask, field / field[mask].mean(), 1)
    image = 100 * image[tuple(slice(n) for n in shape)] * field
    return image + rng.normal(0, 2, shape), mask, field


def close(found: NDArray[np.float32], field: Floats, mask: NDArray[np.bool_]) -> bool:
    """Whether a field is about the planted one."""
    return bool(np.abs(found / field - 1)[mask].mean() < 0.02 and np.corrcoef(found[mask], field[mask])[0, 1] > 0.98)


@pytest.fixture(scope="module")
def volume() -> tuple[Floats, NDArray[np.bool_], Floats]:
    return planted((22, 20, 18))


def test_a_planted_field_of_a_volume_is_found(volume):
    image, mask, field = volume
    found = n4.field(image, mask, (4.0, 4.0, 4.0))
    assert found.dtype == np.float32
    assert field[mask].max() > 1.25
    assert close(found, field, mask)
    assert found[mask].mean() == pytest.approx(1, abs=1e-5)
    assert (found[~mask] == 1).all()


@pytest.mark.parametrize("axis", [0, 2])
def test_a_thin_stack_is_corrected_slice_by_slice(axis):
    image, mask, field = (np.stack(v, axis) for v in zip(*(planted((32, 30), seed=s) for s in range(2)), strict=True))
    spacing_mm = list(np.insert([1.5, 1.5], axis, 8.0))
    found = n4.field(image, mask, tuple(spacing_mm))
    assert close(found, field, mask)
    for number in range(2):  # each alone, whatever the others hold
        here, inside = (np.take(v, number, axis) for v in (found, mask))
        assert here[inside].mean() == pytest.approx(1, abs=1e-5)
        assert (here[~inside] == 1).all()
        alone = n4.field(np.take(image, number, axis), inside, (1.5, 1.5))
        assert np.array_equal(here, alone)
    empty = np.moveaxis(mask.copy(), axis, 2)
    empty[..., 1] = False
    found = np.moveaxis(n4.field(image, np.moveaxis(empty, 2, axis), tuple(spacing_mm)), axis, 2)
    assert (found[..., 1] == 1).all()  # a slice without a mask has no field


def test_values_below_0_count_as_0(volume):
    image, mask, _ = volume
    holes = image.copy()
    holes[8:11, 9] = -500
    both = [n4.field(i, mask, (4.0, 4.0, 4.0)) for i in (holes, np.maximum(holes, 0))]
    assert np.isfinite(both[0]).all()
    assert np.array_equal(*both)
    for level in (0.0, 100.0, -100.0):  # of a constant image there is next to no field
        assert np.abs(n4.field(np.full(mask.shape, level), mask, (4.0, 4.0, 4.0)) - 1).max() < 0.05


@pytest.mark.parametrize("where", [np.s_[11, 10, 9], np.s_[11, 10, 8:11], np.s_[11]], ids=["voxel", "row", "plane"])
def test_small_masks_give_numbers(volume, where):
    image, mask, _ = volume
    small = np.zeros_like(mask)
    small[where] = mask[where]
    found = n4.field(image, small, (4.0, 4.0, 4.0))
    assert np.isfinite(found).all()
    assert (found[~small] == 1).all()


def test_a_mask_that_thinning_would_miss_is_corrected_all_the_same():
    """A thinned axis keeps every fourth voxel; a plane between them would be gone, and its field 1."""
    image, mask, field = (np.repeat(v[None], 256, 0) for v in planted((24, 22)))
    plane = np.zeros_like(mask)
    plane[101] = mask[101]
    kept = SimpleITK.Shrink(SimpleITK.GetImageFromArray(plane.astype(np.uint8).T), [4, 1, 1])
    assert not SimpleITK.GetArrayFromImage(kept).any()
    found = n4.field(image, plane, (1.0, 4.0, 4.0))
    assert np.corrcoef(found[plane], field[plane])[0, 1] > 0.9


@pytest.mark.parametrize("lost", [False, True])
def test_what_n4_cannot_do_is_the_patients_own_failure(volume, monkeypatch, lost):
    image, mask, _ = volume

    def execute(self, *images: object) -> None:
        if not lost:
            raise RuntimeError("itk::ERROR: somewhere\nITK ERROR: it did not work")

    methods = {"Execute": execute, "GetLogBiasFieldAsImage": lambda self, given: given * float("nan")}
    monkeypatch.setattr(SimpleITK, "N4BiasFieldCorrectionImageFilter", type("Broken", (), methods))
    said = "found no finite field" if lost else r"could not correct the image \(ITK ERROR: it did not work\)"
    with pytest.raises(StudyError, match=f"N4 {said}") as caught:
        n4.field(image, mask, (4.0, 4.0, 4.0))
    assert caught.value.code == "E_N4"
    assert "--set n4=true" in caught.value.remedy


def flat_field(image: Floats, mask: NDArray[np.bool_], spacing_mm: tuple[float, ...]) -> NDArray[np.float32]:
    """What stands for N4 where only its way through the program matters: a slope, mean 1 over the mask."""
    slope = np.linspace(0.8, 1.2, image.shape[0]).reshape(-1, 1, 1) * np.ones(image.shape)
    return np.where(mask, slope / slope[mask].mean(), 1).astype(np.float32)


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch, no_picture: None) -> None:
    monkeypatch.setattr(N4, flat_field)


def run(*arguments: object) -> int:
    return main(["segment", *map(str, arguments)])


def values(path: Path) -> Floats:
    return np.asanyarray(nib.load(path).dataobj).astype(float)


@pytest.fixture(scope="module")
def head(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One patient: white matter in grey matter in CSF, shaded along the first axis, on a turned grid."""
    folder = tmp_path_factory.mktemp("heads")
    shape = (26, 24, 22)
    grid = np.indices(shape) - np.array([12.5, 11.5, 10.5]).reshape(3, 1, 1, 1)
    radius = np.linalg.norm(grid, axis=0)
    mask = radius < 10
    image = np.select([radius < 6, radius < 8.5, mask], [300.0, 200.0, 80.0], 0.0)
    image = image * np.exp(0.035 * grid[0]) + np.random.default_rng(0).normal(0, 4, shape) * mask
    affine = np.array([[0, -4.0, 0, 50], [4.0, 0, 0, -40], [0, 0, 4.0, 7], [0, 0, 0, 1.0]])
    (folder / "one").mkdir()
    save(folder / "one" / "T1.nii.gz", np.rint(image).clip(0).astype(np.int16), affine)
    save(folder / "one" / "mask.nii.gz", mask.astype(np.uint8), affine)
    return folder


@pytest.mark.usefixtures("no_picture")
@pytest.mark.parametrize("settings", [["n4=true"], ["degree=2"]], ids=["n4", "degree"])
def test_a_brain_gets_its_field_and_the_image_without_it(head, tmp_path, settings):
    assert run(head, tmp_path, "--protocol", "brain", "--fields", "--set", *settings) == 0
    source, mask = nib.load(head / "one" / "T1.nii.gz"), values(head / "one" / "mask.nii.gz") > 0
    both = [nib.load(tmp_path / "one" / f"one_T1{suffix}") for suffix in outputs.SHADING]
    for written in both:
        assert written.shape == source.shape
        assert np.allclose(written.affine, source.affine)
        assert written.get_data_dtype() == np.float32
    field, corrected = (np.asanyarray(written.dataobj) for written in both)
    image = np.asanyarray(source.dataobj)
    assert np.allclose(image / field, corrected, rtol=1e-4, atol=1e-2)
    assert field[mask].mean() == pytest.approx(1, abs=1e-3)
    assert (field[~mask] == 1).all()
    assert np.array_equal(corrected[~mask], image[~mask])
    # The planted shade is found, and equal tissue is about equally bright.
    shade = np.exp(0.035 * (np.indices(image.shape)[0] - 12.5))
    assert np.corrcoef(field[mask], shade[mask])[0, 1] > 0.95
    told = sidecar(tmp_path, "one")["bias"]
    assert told["range"]["T1"] == pytest.approx([field[mask].min(), field[mask].max()], abs=1e-3)
    assert ("N4" in told["rule"]) == (settings == ["n4=true"])
    assert ("degree 2" in told["rule"]) == (settings == ["degree=2"])


@pytest.mark.usefixtures("no_picture")
def test_a_field_that_was_dropped_is_told_and_written_as_1(head, tmp_path):
    (tmp_path / "in" / "even").mkdir(parents=True)
    source = nib.load(head / "one" / "T1.nii.gz")
    shade = np.exp(0.035 * (np.indices(source.shape)[0] - 12.5))
    even = np.rint(np.asanyarray(source.dataobj) / shade).astype(np.int16)
    save(tmp_path / "in" / "even" / "T1.nii.gz", even, source.affine)
    (tmp_path / "in" / "even" / "mask.nii.gz").write_bytes((head / "one" / "mask.nii.gz").read_bytes())
    assert run(tmp_path / "in", tmp_path / "out", "--protocol", "brain", "--fields") == 0
    place = tmp_path / "out" / "even"
    told = sidecar(tmp_path / "out", "even")["bias"]
    assert told["rule"].endswith("dropped: they explained less than they cost")
    assert told["range"] == {"T1": [1.0, 1.0]}
    assert (values(place / "even_T1_bias.nii.gz") == 1).all()
    assert np.allclose(values(place / "even_T1_corrected.nii.gz"), even)


@pytest.mark.usefixtures("no_picture")
def test_each_sequence_of_a_stack_of_slices_has_its_files(make_patient, tmp_path):
    """With the anatomical mixture, which has no field of its own."""
    make_patient(tmp_path / "in", "pat1", sequences=("LGE", "C0"), shape=(48, 48, 1))
    assert run(tmp_path / "in", tmp_path / "out", "--fields", "--set", "n4=true", "perturbations=0") == 0
    place = tmp_path / "out" / "pat1"
    for sequence, suffix in (("LGE", "LGE"), ("bSSFP", "C0")):
        field, corrected = (nib.load(place / f"pat1_{sequence}{end}") for end in outputs.SHADING)
        assert np.allclose(field.affine, AFFINE)
        product = np.asanyarray(field.dataobj) * np.asanyarray(corrected.dataobj)
        assert np.allclose(product, values(tmp_path / "in" / f"pat1_{suffix}.nii.gz"), rtol=1e-4, atol=1e-2)
    assert not (place / "pat1_T2_bias.nii.gz").exists()
    assert set(sidecar(tmp_path / "out", "pat1")["bias"]["range"]) == {"LGE", "bSSFP"}


@pytest.mark.usefixtures("quick")
def test_the_fit_sees_the_image_without_its_shade_and_no_field_is_written_unless_asked(head, tmp_path):
    study = Study("one", {"T1": head / "one" / "T1.nii.gz"}, head / "one" / "mask.nii.gz")
    found = segment(study, build(protocol="brain", method="gmm", settings=["n4=true"], fields=True))
    # What the page shows is the image as it was.
    assert np.allclose(found.images["T1"], values(head / "one" / "T1.nii.gz"), rtol=1e-5, atol=1e-3)
    assert found.fields["T1"].dtype == np.float32
    plain = segment(study, build(protocol="brain", method="gmm", settings=["n4=false"]))
    assert (plain.fields, plain.sidecar["bias"]) == ({}, None)
    assert not np.array_equal(found.probabilities, plain.probabilities)
    assert run(head, tmp_path, "--protocol", "brain", "--set", "n4=true") == 0
    assert shading(tmp_path) == {}
    told = sidecar(tmp_path, "one")
    assert set(told["bias"]["range"]) == {"T1"}  # but told
    assert told["configuration"]["settings"]["degree"] == 0
    assert told["configuration"]["preprocessing"]["n4"] is True
    assert told["mixture"]["scale"] == f"{BRAIN.normalisation}-n4"


@pytest.mark.usefixtures("quick")
def test_a_network_trained_with_n4_is_given_it_without_being_told(make_patient, tmp_path, capsys):
    """And every sequence gets its field, whichever the network knows."""
    for number in (1, 2):
        make_patient(tmp_path / "seen", f"pat{number}", seed=number, sequences=("LGE", "C0"))
    model, out = tmp_path / "model", tmp_path / "out"
    asked = ["--network", TINY, "--epochs", "1", "-q", "--set", "n4=true", "drop=0.5"]
    assert main(["train", str(tmp_path / "seen"), str(model), *asked]) == 0
    spec = model_spec.read(model, INFARCT).spec
    assert spec.training.preprocessing.n4 is True
    assert spec.normalisation == f"{INFARCT.normalisation}-n4"
    make_patient(tmp_path / "in", "pat1", shape=(48, 48, 1))
    arguments = [tmp_path / "in", out, "--model", model, "--fields"]
    assert run(*arguments) == 0
    told, written = sidecar(out, "pat1"), shading(out)
    assert told["configuration"]["preprocessing"]["n4"] is True
    assert told["bias"]["rule"] == "N4 before the fit"
    assert set(written) == {f"pat1_{s}{end}" for s in INFARCT.sequences for end in outputs.SHADING}
    assert run(*arguments) == 0  # all is there
    assert run(*arguments, "--set", "n4=true") == 0
    assert shading(out) == written
    assert run(*arguments, "--set", "n4=false") == 2
    assert "n4: the network was trained with n4=true" in capsys.readouterr().err


@pytest.mark.usefixtures("quick")
def test_means_of_images_with_n4_are_good_for_images_with_n4(cohort_dir, tmp_path, capsys):
    files = {n4: tmp_path / f"{n4}.json" for n4 in ("true", "false")}
    for setting, file in files.items():
        assert main(["means", str(cohort_dir), "-o", str(file), "--set", f"n4={setting}"]) == 0
    shaded, plain = (json.loads(files[setting].read_text()) for setting in ("true", "false"))
    assert shaded["normalisation"] == f"{plain['normalisation']}-n4"
    assert shaded["means"] != plain["means"]
    asked = [cohort_dir, tmp_path / "out", "--method", "gmm", "--set", "max_iter=5"]
    for setting, other in (("true", "false"), ("false", "true")):
        capsys.readouterr()
        assert run(*asked, f"n4={setting}", "--means", files[other]) == 2
        assert "computed with normalisation" in capsys.readouterr().err
        with pytest.raises(UsageError, match="computed with normalisation"):
            build(means=files[other], method="deepsvg", settings=[f"n4={setting}"])
    assert not (tmp_path / "out").exists()
    assert run(*asked, "n4=true", "--means", files["true"]) == 0


def test_a_patient_that_n4_cannot_correct_fails_alone(cohort_dir, tmp_path, monkeypatch, no_picture):
    calls = []

    def fourth_fails(image, mask, spacing_mm):
        calls.append(1)
        if len(calls) == 4:  # pat2's first
            raise StudyError("E_N4", "N4 could not correct the image (why)", "Do without")
        return flat_field(image, mask, spacing_mm)

    monkeypatch.setattr(N4, fourth_fails)
    settings = ["--method", "gmm", "--set", "n4=true", "max_iter=5"]
    assert run(cohort_dir, tmp_path / "out", "--fields", *settings) == 1
    failed = json.loads((tmp_path / "out" / "pat2" / "pat2_row.json").read_text())
    assert (failed["status"], failed["code"]) == ("failed", "E_N4")
    assert (tmp_path / "out" / "pat3" / "pat3_T2_bias.nii.gz").is_file()


GMM = ["--method", "gmm", "--set", "n4=true", "max_iter=5"]


def shading(out: Path) -> dict[str, int]:
    """When each field and corrected image was written."""
    return {p.name: p.stat().st_mtime_ns for p in out.glob("*/*") if p.name.endswith(outputs.SHADING)}


@pytest.mark.usefixtures("quick")
def test_fields_are_made_where_they_are_asked_for_and_stay_until_it_is_done_without_them(cohort_dir, tmp_path):
    out = tmp_path / "out"
    assert run(cohort_dir, out, *GMM) == 0
    assert shading(out) == {}
    assert run(cohort_dir, out, *GMM, "--fields") == 0
    first = shading(out)
    assert len(first) == 3 * 3 * 2
    assert run(cohort_dir, out, *GMM, "--fields") == 0
    assert run(cohort_dir, out, *GMM) == 0  # all is done already, and more
    assert shading(out) == first
    (out / "pat2" / "pat2_T2_corrected.nii.gz").unlink()
    assert run(cohort_dir, out, *GMM, "--fields") == 0
    again = shading(out)
    assert {name.split("_")[0] for name in first if again[name] > first[name]} == {"pat2"}
    assert set(again) == set(first)
    (cohort_dir / "pat2_gd.nii.gz").write_bytes(b"")  # who fails keeps no older field
    assert run(cohort_dir, out, *GMM, "--fields") == 1
    assert {name.split("_")[0] for name in shading(out)} == {"pat1", "pat3"}
    assert run(cohort_dir, out, "--method", "gmm", "--set", "max_iter=5", "--patients", "pat1") == 0
    assert {name.split("_")[0] for name in shading(out)} == {"pat3"}


@pytest.mark.usefixtures("quick")
def test_no_patient_loses_the_files_of_another_whose_id_begins_alike(make_patient, tmp_path):
    source, out = tmp_path / "in", tmp_path / "out"
    for patient in ("pat1", "pat1_T1", "pat[1]"):
        make_patient(source / patient, patient, shape=(48, 48, 1))
    assert run(source, out, *GMM, "--fields") == 0
    assert len(shading(out)) == 3 * 3 * 2
    assert run(source, out, "--method", "gmm", "--set", "max_iter=5", "--patients", "pat1") == 0
    assert {p.parent.name for p in out.glob("*/*_bias.nii.gz")} == {"pat1_T1", "pat[1]"}
    assert run(source, out, "--method", "gmm", "--set", "max_iter=5", "--patients", "pat[1]") == 0
    assert {p.parent.name for p in out.glob("*/*_bias.nii.gz")} == {"pat1_T1"}


def test_exchanged_sequences_are_seen_on_large_images_and_thin_masks():
    """Large images are thinned; a mask that falls between the voxels that are kept tells as much as any."""
    levels = torch.tensor([[-1.0, -1.0, 1.4], [-1.2, 1.2, 0.0]])  # of three tissues on T1 and T2
    three = tuple(
        dataclasses.replace(tissue, signature={"T1": float(t1), "T2": float(t2)})
        for tissue, t1, t2 in zip(BRAIN.tissues[:3], *levels, strict=True)
    )
    index = torch.randint(3, (110, 110, 110), generator=torch.Generator().manual_seed(0))
    image = levels[:, index][None]
    assert image[:, 0].numel() > naming.ENOUGH
    plane = torch.zeros(1, 1, 110, 110, 110)
    plane[:, :, 51] = 1
    for mask in (torch.ones_like(plane), plane):
        for order, swapped in ((("T1", "T2"), None), (("T2", "T1"), ("T1", "T2"))):
            assert naming.looks_swapped(image, mask, three, order, spacing_mm=(1.0, 1.0, 1.0)) == swapped
