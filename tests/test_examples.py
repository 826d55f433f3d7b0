"""What a network is trained on: one example per image, of one size, with nothing in it that is a label."""

from __future__ import annotations

import hashlib
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from monai.data import DataLoader

from monai_deepgmm import cohort, examples, phantom, protocol, transforms
from monai_deepgmm.examples import Examples, augmentation, normalised, prepare_batch
from monai_deepgmm.scan import Scan
from monai_deepgmm.transforms import Units

INFARCT = protocol.load("infarct")
NEEDED = 40  # ten voxels for each of four tissues


def load(folder: Path, *names: str):
    return examples.load(cohort.find(folder, INFARCT, patients=names).studies, INFARCT, frame=None, max_voxels=1 << 28)


@pytest.fixture(scope="module")
def patients(tmp_path_factory, make_patient):
    """Two patients on grids of different spacing and size, and a phantom."""
    folder = tmp_path_factory.mktemp("examples")
    make_patient(folder, "coarse", seed=1)
    make_patient(folder, "fine", seed=2, shape=(64, 56, 3), affine=np.diag([0.75, 0.75, 10, 1]))
    phantom.write_cohort(folder, 1, seed=5, config=phantom.PhantomConfig(slices=(2, 2)))
    found, failed = load(folder)
    assert failed == {}
    return found


@pytest.fixture(scope="module")
def made(patients):
    return examples.make(patients, INFARCT, grid_mm=1.0)


@pytest.fixture(scope="module")
def data(made):
    return [example for own in made.values() for example in own]


# Loading ------------------------------------------------------------------------------------------------------------


def test_who_lacks_a_sequence_of_the_others_is_left_out_with_the_reason(tmp_path, make_patient):
    for number in (1, 2):
        make_patient(tmp_path, f"whole{number}", seed=number)
    make_patient(tmp_path, "part", seed=3, sequences=("LGE", "C0"))
    found, failed = load(tmp_path)
    assert [p.name for p in found] == ["whole1", "whole2"]
    assert {p.sequences for p in found} == {("LGE", "T2", "bSSFP")}
    assert list(failed) == ["part"]
    assert failed["part"].code == "E_MODEL"
    assert "lacks T2" in failed["part"].message
    assert failed["part"].remedy


def test_what_most_patients_have_decides_and_the_surplus_is_dropped(tmp_path, make_patient):
    for number in (1, 2):
        make_patient(tmp_path, f"part{number}", seed=number, sequences=("LGE", "C0"))
    make_patient(tmp_path, "whole", seed=3)
    found, failed = load(tmp_path)
    assert failed == {}
    assert [(p.name, p.sequences) for p in found] == [(n, ("LGE", "bSSFP")) for n in ("part1", "part2", "whole")]
    (alone,), _ = load(tmp_path, "whole")
    assert torch.equal(found[2].units.image, alone.units.image[:, [0, 2]])


def test_a_tie_goes_to_the_larger_set(tmp_path, make_patient):
    make_patient(tmp_path, "a", seed=1, sequences=("LGE", "C0"))
    make_patient(tmp_path, "b", seed=2)
    found, failed = load(tmp_path)
    assert [p.name for p in found] == ["b"]
    assert list(failed) == ["a"]


def test_broken_patients_are_left_out_and_the_rest_loaded(tmp_path, make_patient):
    make_patient(tmp_path, "good", seed=1)
    make_patient(tmp_path, "empty", seed=2)["T2"].write_bytes(b"")
    make_patient(tmp_path, "maskless", seed=3)["gd"].unlink()
    torn = make_patient(tmp_path, "torn", seed=4)["LGE"]
    torn.write_bytes(torn.read_bytes()[:2000])
    found, failed = load(tmp_path)
    assert [p.name for p in found] == ["good"]
    assert {who: why.code for who, why in failed.items()} == {
        "empty": "E_EMPTY",
        "maskless": "E_MASK_NONE",
        "torn": "E_GZIP",
    }


def test_inputs_are_the_hashes_of_the_files(tmp_path, make_patient):
    files = make_patient(tmp_path, "pat", seed=1)
    (found,), _ = load(tmp_path)
    names = {"LGE": "LGE", "T2": "T2", "bSSFP": "C0", "mask": "gd"}
    assert found.inputs == {k: hashlib.sha256(files[v].read_bytes()).hexdigest() for k, v in names.items()}


def test_nobody_is_nobody():
    assert examples.load([], INFARCT, frame=None, max_voxels=1) == ([], {})


# Examples -----------------------------------------------------------------------------------------------------------


def test_every_image_of_every_patient_is_an_example_of_one_size(patients, made, data):
    assert {p.name: len(p.units.slices) for p in patients} == {who: len(own) for who, own in made.items()}
    (size,) = {tuple(e["mask"].shape[1:]) for e in data}
    assert all(side % 32 == 0 for side in size)
    for example in data:
        assert set(example) == {"image", "mask", "expected"}
        assert example["image"].shape == (3 + 1, *size)
        assert example["mask"].shape == (1, *size)
        assert example["expected"].shape == (4, *size)
        assert {v.dtype for v in example.values()} == {torch.float32}


def test_the_area_of_the_mask_is_the_scans(patients, made):
    for patient in patients:
        voxel = patient.units.spacing_mm[0] * patient.units.spacing_mm[1]
        for mask, example in zip(patient.units.mask, made[patient.name], strict=True):
            assert float(example["mask"].sum()) == pytest.approx(float(mask.sum()) * voxel, rel=0.03)


def valid(example) -> None:
    mask, expected = example["mask"], example["expected"]
    assert set(mask.unique().tolist()) <= {0.0, 1.0}
    assert mask.sum() > 0
    assert (expected >= 0).all()
    torch.testing.assert_close(expected.sum(0, keepdim=True), mask)
    depth = example["image"][-1:]
    assert (depth[mask == 0] == 0).all()
    assert depth.min() >= 0
    assert depth.max() <= 1
    assert example["image"].isfinite().all()


def test_masks_are_0_or_1_and_expected_maps_sum_to_1_inside(data):
    for example in data:
        valid(example)
        assert example["image"][-1].max() == 1


def test_no_label_is_read(tmp_path, make_patient):
    """The truth lends its outline as the mask; which tissue it says a voxel is changes nothing."""
    files = make_patient(tmp_path / "a", "pat", seed=1)
    make_patient(tmp_path / "b", "pat", seed=1)
    other = nib.load(files["gd"])
    shuffled = np.where(np.asarray(other.dataobj) > 0, 200, 0).astype(np.int16)
    nib.save(nib.Nifti1Image(shuffled, other.affine, other.header), tmp_path / "b" / "pat_gd.nii.gz")
    a, b = (examples.make(load(tmp_path / n)[0], INFARCT, grid_mm=1.0)["pat"] for n in "ab")
    for first, second in zip(a, b, strict=True):
        assert all(torch.equal(first[k], second[k]) for k in first)


def slices_with(counts: list[int]) -> examples.Patient:
    """One patient whose slices' masks have so many voxels (in a block of ten rows)."""
    rng = np.random.default_rng(0)
    shape = (32, 32, len(counts))
    mask = np.zeros(shape, bool)
    for z, count in enumerate(counts):
        block = np.zeros(100, bool)
        block[:count] = True
        mask[10:20, 10:20, z] = block.reshape(10, 10)
    image = rng.normal(size=(3, *shape)).astype(np.float32)

    class Reference:
        spacing_mm = (1.0, 1.0, 8.0)

    scan = Scan("p", INFARCT.sequences, image, mask, Reference(), {}, ())
    return examples.Patient("p", INFARCT.sequences, transforms.units(scan, INFARCT), {})


def test_images_too_small_for_a_mixture_are_left_out():
    patient = slices_with([NEEDED - 1, NEEDED, 100])
    assert isinstance(patient.units, Units)
    own = examples.make([patient], INFARCT, grid_mm=1.0)["p"]
    assert [int(e["mask"].sum()) for e in own] == [NEEDED, 100]
    assert examples.make([slices_with([5, 20])], INFARCT, grid_mm=1.0) == {"p": []}


def test_the_grid_is_the_one_asked_for(patients, made):
    coarse = examples.make(patients, INFARCT, grid_mm=2.0)
    for who, own in made.items():
        for fine, half in zip(own, coarse[who], strict=True):
            assert float(half["mask"].sum()) == pytest.approx(float(fine["mask"].sum()) / 4, rel=0.06)


def test_cohort_means_are_the_means_where_each_tissue_is_expected(patients):
    from monai_deepgmm.tissues import signature_map

    rows = []
    for p in patients:
        q = signature_map(p.units.image, p.units.mask, INFARCT.tissues, p.sequences, p.units.spacing_mm)
        for image, weight in zip(p.units.image.numpy(), q.numpy(), strict=True):
            rows.append([[np.average(m, weights=w) for m in image] for w in weight])
    means = examples.cohort_means(patients, INFARCT)
    np.testing.assert_allclose(means.numpy(), np.mean(rows, 0), rtol=1e-9)
    blood, myocardium, edema, scar = means
    assert blood[2] > myocardium[2]  # bright on bSSFP
    assert edema[1] > myocardium[1]  # on T2
    assert scar[0] > myocardium[0]  # on LGE


def test_normalised_by_hand():
    expected = torch.tensor([[0.2, 0.0, 0.5, 2.0], [0.6, 0.0, 0.5, 6.0]])[None]  # (1, K = 2, 4)
    mask = torch.tensor([[[1.0, 1.0, 0.0, 1.0]]])
    out = normalised(expected, mask)
    torch.testing.assert_close(out[0], torch.tensor([[0.25, 0.5, 0.0, 0.25], [0.75, 0.5, 0.0, 0.75]]))
    torch.testing.assert_close(normalised(expected[0], mask[0]), out[0])


# Augmentation -------------------------------------------------------------------------------------------------------


def same(a, b) -> bool:
    return all(torch.equal(a[k], b[k]) for k in a)


def test_augmentation_depends_on_seed_epoch_and_index_alone(data):
    one, other = (Examples(data, augmentation(2), seed=4) for _ in range(2))
    one.epoch = other.epoch = 3
    forwards = [one[i] for i in range(len(data))]
    torch.manual_seed(99)
    np.random.seed(99)  # MONAI's default generator is numpy's old one
    backwards = [other[i] for i in reversed(range(len(data)))][::-1]
    assert all(same(a, b) for a, b in zip(forwards, backwards, strict=True))
    for change in ({"seed": 5}, {"epoch": 4}):
        third = Examples(data, augmentation(2), seed=change.get("seed", 4))
        third.epoch = change.get("epoch", 3)
        assert not any(same(forwards[i], third[i]) for i in range(len(data)))
    twins = Examples([data[0], data[0]], augmentation(2), seed=4)
    assert not same(twins[0], twins[1])


def test_augmentation_leaves_the_global_generators_alone(data):
    torch.manual_seed(1)
    before = torch.get_rng_state(), np.random.get_state()[1].copy()
    Examples(data, augmentation(2))[0]
    assert torch.equal(torch.get_rng_state(), before[0])
    assert np.array_equal(np.random.get_state()[1], before[1])


def test_workers_draw_the_same(data):
    dataset = Examples(data, augmentation(2), seed=1)
    alone, helped = (list(DataLoader(dataset, batch_size=2, num_workers=n)) for n in (0, 2))
    assert len(alone) == len(helped)
    assert all(same(a, b) for a, b in zip(alone, helped, strict=True))


@pytest.mark.parametrize("epoch", range(1, 7))
def test_augmented_examples_are_examples(data, epoch):
    dataset = Examples(data, augmentation(2), seed=7)
    dataset.epoch = epoch
    for index, plain in enumerate(data):
        example = dataset[index]
        valid(example)
        assert {k: v.shape for k, v in example.items()} == {k: v.shape for k, v in plain.items()}
        assert {type(v) for v in example.values()} == {torch.Tensor}
        assert 0.5 < float(example["mask"].sum() / plain["mask"].sum()) < 1.6


def test_augmentation_changes_no_original(data):
    copies = [{k: v.clone() for k, v in e.items()} for e in data]
    dataset = Examples(data, augmentation(2), seed=2)
    for epoch in (1, 2, 3):
        dataset.epoch = epoch
        _ = [dataset[i] for i in range(len(data))]
    assert all(same(a, b) for a, b in zip(copies, data, strict=True))


def test_volumes_are_augmented_too():
    generator = torch.Generator().manual_seed(0)
    mask = torch.zeros(1, 32, 32, 32)
    mask[:, 8:24, 8:24, 8:24] = 1
    expected = torch.rand((3, 32, 32, 32), generator=generator).softmax(0) * mask
    image = torch.cat([torch.randn((2, 32, 32, 32), generator=generator), mask * 0.5])
    dataset = Examples([{"image": image, "mask": mask, "expected": expected}], augmentation(3), seed=0)
    for epoch in (1, 2):
        dataset.epoch = epoch
        out = dataset[0]
        valid(out)
        assert out["image"].shape == image.shape
        assert not torch.equal(out["image"], image)


def test_without_a_transform_examples_are_as_given(data):
    dataset = Examples(data)
    assert len(dataset) == len(data)
    assert same(dataset[1], data[1])


def test_a_batch_is_the_networks_input_and_the_losss_target(data):
    (batch,) = DataLoader(Examples(data[:2]), batch_size=2)
    image, target = prepare_batch(batch, "cpu", non_blocking=True, memory_format=None)
    assert torch.equal(image, batch["image"])
    assert target.shape[1] == 3 + 1 + 4
    assert torch.equal(target[:, :3], batch["image"][:, :3])  # the sequences, without the depth
    assert torch.equal(target[:, 3:4], batch["mask"])
    assert torch.equal(target[:, 4:], batch["expected"])
