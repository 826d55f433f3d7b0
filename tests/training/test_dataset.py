"""What a network is trained on: one example per image, of one size, with nothing in it that is a label."""

from __future__ import annotations

import hashlib
from collections import Counter

import nibabel as nib
import numpy as np
import pytest
import torch
from monai.data import DataLoader
from scenes import INFARCT, loaded

from monai_deepgmm.images import cropping
from monai_deepgmm.images.loading import Scan
from monai_deepgmm.images.preprocessing import Preprocessing
from monai_deepgmm.methods.anatomy import AnatomicalConfig
from monai_deepgmm.methods.naming import signature_map
from monai_deepgmm.methods.task import Images
from monai_deepgmm.methods.training_config import SignatureTeacher
from monai_deepgmm.patients import discovery
from monai_deepgmm.phantom import heart
from monai_deepgmm.training import dataset
from monai_deepgmm.training.augmentation import RandDropd, augmentation, normalised
from monai_deepgmm.training.dataset import Examples, prepare_batch

NEEDED = 40  # ten voxels for each of four tissues


@pytest.fixture(scope="module")
def patients(tmp_path_factory, make_patient):
    """Two patients on grids of different spacing and size, and a phantom."""
    folder = tmp_path_factory.mktemp("examples")
    make_patient(folder, "coarse", seed=1)
    make_patient(folder, "fine", seed=2, shape=(64, 56, 3), affine=np.diag([0.75, 0.75, 10, 1]))
    heart.write_cohort(folder, 1, seed=5, config=heart.PhantomConfig(slices=(2, 2)))
    return loaded(folder)


@pytest.fixture(scope="module")
def made(patients):
    return dataset.make(patients, INFARCT, grid_mm=1.0)


@pytest.fixture(scope="module")
def data(made):
    return [example for own in made.values() for example in own]


@pytest.fixture(scope="module")
def some(tmp_path_factory, make_patient):
    """A patient with LGE alone, one without T2, and one with everything."""
    folder = tmp_path_factory.mktemp("some")
    make_patient(folder, "lge", seed=3, sequences=("LGE",))
    make_patient(folder, "part", seed=2, sequences=("LGE", "C0"))
    make_patient(folder, "whole", seed=1)
    return loaded(folder, incomplete=True)


@pytest.mark.parametrize(
    ("have", "common", "left_out"),
    [
        ({"part": "LGE C0", "whole1": "LGE T2 C0", "whole2": "LGE T2 C0"}, "LGE T2 bSSFP", "part"),
        ({"part1": "LGE C0", "part2": "LGE C0", "whole": "LGE T2 C0"}, "LGE bSSFP", None),
        ({"a": "LGE C0", "b": "LGE T2 C0"}, "LGE T2 bSSFP", "a"),  # a tie goes to the larger set
    ],
)
def test_what_most_patients_have_decides(tmp_path, make_patient, have, common, left_out):
    for seed, (patient, sequences) in enumerate(have.items()):
        make_patient(tmp_path, patient, seed=seed, sequences=tuple(sequences.split()))
    studies = discovery.find(tmp_path, INFARCT).studies
    found, failed = dataset.load(studies, INFARCT, Preprocessing())
    assert {p.name: p.sequences for p in found} == dict.fromkeys(sorted({*have} - {left_out}), tuple(common.split()))
    assert list(failed) == [left_out] * bool(left_out)
    for error in failed.values():
        assert (error.code, bool(error.remedy)) == ("E_MODEL", True)
        assert "lacks T2" in error.message
    if left_out is None:  # the surplus is dropped
        (alone,) = loaded(tmp_path, "whole")
        assert torch.equal(found[2].crops.image, alone.crops.image[:, [0, 2]])
        assert torch.equal(found[2].crops.zero, alone.crops.zero[:, [0, 2]])


@pytest.mark.parametrize("incomplete", [False, True])
def test_broken_patients_are_left_out_and_the_rest_loaded(tmp_path, make_patient, incomplete):
    files = make_patient(tmp_path, "good", seed=1)
    make_patient(tmp_path, "empty", seed=2)["T2"].write_bytes(b"")  # a broken file is no missing one
    make_patient(tmp_path, "maskless", seed=3)["gd"].unlink()
    torn = make_patient(tmp_path, "torn", seed=4)["LGE"]
    torn.write_bytes(torn.read_bytes()[:2000])
    studies = discovery.find(tmp_path, INFARCT, mask="file").studies
    (good,), failed = dataset.load(studies, INFARCT, Preprocessing(), incomplete=incomplete)
    codes = {"empty": "E_EMPTY", "maskless": "E_MASK_NONE", "torn": "E_GZIP"}
    assert {who: why.code for who, why in failed.items()} == codes
    names = {"LGE": "LGE", "T2": "T2", "bSSFP": "C0", "mask": "gd"}
    assert good.inputs == {k: hashlib.sha256(files[v].read_bytes()).hexdigest() for k, v in names.items()}
    assert dataset.load([], INFARCT, Preprocessing()) == ([], {})


def valid(example) -> None:
    mask, expected, depth = example["mask"], example["expected"], example["image"][-1:]
    assert set(mask.unique().tolist()) <= {0.0, 1.0}
    assert mask.sum() > 0
    assert (expected >= 0).all()
    torch.testing.assert_close(expected.sum(0, keepdim=True), mask)
    assert (depth[mask == 0] == 0).all()
    assert 0 <= depth.min() <= depth.max() <= 1
    assert example["image"].isfinite().all()


def same(a, b) -> bool:
    return all(torch.equal(a[k], b[k]) for k in a)


def test_every_image_of_every_patient_is_an_example_of_one_size(patients, made, data):
    assert {p.name: len(p.crops.slices) for p in patients} == {who: len(own) for who, own in made.items()}
    (size,) = {tuple(e["mask"].shape[1:]) for e in data}
    assert all(side % 32 == 0 for side in size)
    for example in data:
        shapes = {"image": (4, *size), "mask": (1, *size), "expected": (4, *size), "seen": (4, 1, 1)}
        assert {k: tuple(v.shape) for k, v in example.items()} == shapes
        assert torch.equal(example["seen"], torch.ones(4, 1, 1))  # these patients lack nothing
        assert {v.dtype for v in example.values()} == {torch.float32}
        valid(example)
        assert example["image"][-1].max() == 1


def test_the_grid_is_the_one_asked_for_and_the_area_of_the_mask_the_scans(patients, made):
    coarse = dataset.make(patients, INFARCT, grid_mm=2.0)
    for patient in patients:
        voxel = patient.crops.spacing_mm[0] * patient.crops.spacing_mm[1]
        for mask, fine, half in zip(patient.crops.mask, made[patient.name], coarse[patient.name], strict=True):
            assert float(fine["mask"].sum()) == pytest.approx(float(mask.sum()) * voxel, rel=0.03)
            assert float(half["mask"].sum()) == pytest.approx(float(fine["mask"].sum()) / 4, rel=0.06)


def test_no_label_is_read(tmp_path, make_patient):
    """The reference labels lend their outline as the mask; which tissue they say a voxel is changes nothing."""
    files = make_patient(tmp_path / "a", "pat", seed=1)
    make_patient(tmp_path / "b", "pat", seed=1)
    other = nib.load(files["gd"])
    shuffled = np.where(np.asarray(other.dataobj) > 0, 200, 0).astype(np.int16)
    nib.save(nib.Nifti1Image(shuffled, other.affine, other.header), tmp_path / "b" / "pat_gd.nii.gz")
    a, b = (dataset.make(loaded(tmp_path / n), INFARCT, grid_mm=1.0)["pat"] for n in "ab")
    assert all(same(first, second) for first, second in zip(a, b, strict=True))


def slices_with(counts: list[int], sequences: tuple[str, ...] = INFARCT.sequences) -> dataset.Patient:
    """One patient whose slices' masks have so many voxels (in a block of ten rows)."""
    shape = (32, 32, len(counts))
    mask = np.zeros(shape, bool)
    for z, count in enumerate(counts):
        mask[10:20, 10:20, z] = (np.arange(100) < count).reshape(10, 10)
    image = np.random.default_rng(0).normal(size=(len(sequences), *shape)).astype(np.float32)
    reference = type("Reference", (), {"spacing_mm": (1.0, 1.0, 8.0)})()
    scan = Scan("p", sequences, image, mask, reference, {}, ())
    return dataset.Patient("p", sequences, cropping.crops(scan, INFARCT), {})


def test_images_too_small_for_a_mixture_are_left_out():
    def areas(*patients: dataset.Patient) -> dict[str, list[int]]:
        made = dataset.make(patients, INFARCT, grid_mm=1.0)
        return {who: [int(e["mask"].sum()) for e in own] for who, own in made.items()}

    assert areas(slices_with([NEEDED - 1, NEEDED, 100])) == {"p": [NEEDED, 100]}
    assert areas(slices_with([5, 20])) == {"p": []}
    # 30 voxels are enough for the three tissues that an incomplete patient shows, not for four.
    lean, whole = slices_with([30, 40], ("LGE", "bSSFP")), slices_with([30, 40])._replace(name="whole")
    assert areas(lean, whole) == {"p": [30, 40], "whole": [40]}


def test_cohort_means_are_the_means_where_each_tissue_is_expected(patients):
    rows = []
    for p in patients:
        q = signature_map(p.crops.image, p.crops.mask, INFARCT.tissues, p.sequences, p.crops.spacing_mm)
        for image, weight in zip(p.crops.image.double().numpy(), q.double().numpy(), strict=True):
            rows.append([[np.average(m, weights=w) for m in image] for w in weight])
    means = dataset.cohort_means(patients, INFARCT)
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


def test_incomplete_patients_keep_what_they_have_in_the_protocols_order(some):
    lge, part, whole = some
    assert [p.sequences for p in some] == [("LGE",), ("LGE", "bSSFP"), ("LGE", "T2", "bSSFP")]
    assert [p.crops.image.shape[1] for p in some] == [1, 2, 3]
    assert dataset.channels(some, INFARCT) == ("LGE", "T2", "bSSFP")
    assert dataset.channels([lge, part], INFARCT) == ("LGE", "bSSFP")
    assert dataset.channels([whole._replace(sequences=("T2",)), lge], INFARCT) == ("LGE", "T2")
    assert dataset.channels([], INFARCT) == ()


@pytest.mark.parametrize("teacher", [SignatureTeacher(), AnatomicalConfig()])
def test_what_a_patient_lacks_is_0_and_not_seen_and_teaches_no_tissue(some, teacher):
    made = dataset.make(some, INFARCT, grid_mm=1.0, teacher=teacher)
    shown = {who: {tuple(e["seen"].flatten().tolist()) for e in own} for who, own in made.items()}
    assert shown == {"lge": {(1, 0, 0, 1)}, "part": {(1, 0, 1, 1)}, "whole": {(1, 1, 1, 1)}}
    for who, own in made.items():
        assert len(own) == 2
        for example in own:
            valid(example)  # its expected maps sum to 1 in the mask
            assert example["image"].shape[0] == example["expected"].shape[0] == 4
            lacking = example["seen"].flatten() == 0
            assert (example["image"][lacking] == 0).all()
            assert all((channel != 0).any() for channel in example["image"][~lacking])
            assert ((example["expected"][2] > 0).any()) == (who == "whole")  # edema is seen on T2 alone
    hiding = Examples(made["part"], augmentation(2, 0.5))  # noise there would be a channel like any other
    for hiding.epoch in range(1, 7):
        assert all((hiding[index]["image"][1] == 0).all() for index in range(2))
    alone = dataset.make([some[1]], INFARCT, grid_mm=1.0, teacher=teacher)["part"]
    for ours, own in zip(made["part"], alone, strict=True):  # he is taught what he is taught alone
        assert torch.equal(ours["image"][[0, 2, 3]], own["image"])
        assert torch.equal(ours["expected"][[0, 1, 3]], own["expected"])


def test_the_teacher_decides_what_is_expected(some):
    *_, whole = some
    crops = whole.crops
    images = Images(
        crops.image, crops.mask, crops.mask, INFARCT, INFARCT.tissues, INFARCT.sequences, (1.5, 1.5), crops.slices
    )
    plain, signature, anatomy, sharp = (
        dataset.make([whole], INFARCT, grid_mm=1.5, teacher=t)["whole"]
        for t in (None, SignatureTeacher(), AnatomicalConfig(), AnatomicalConfig(temper=0.9))
    )
    resp = AnatomicalConfig().solve(images).resp
    for index, example in enumerate(anatomy):
        assert same(plain[index], signature[index])
        assert torch.equal(example["image"], plain[index]["image"])
        # On the scan's own grid nothing is interpolated, and in so clear an image every region is accepted.
        for found, expected in zip(resp[index], example["expected"], strict=True):
            assert float(expected.sum()) == pytest.approx(float(found.sum()), rel=1e-4)
        assert example["expected"].amax(0).sum() > plain[index]["expected"].amax(0).sum()  # it is surer
        assert not torch.equal(example["expected"], sharp[index]["expected"])  # its settings count


def test_augmentation_depends_on_seed_epoch_and_index_alone(data):
    one, other = (Examples(data, augmentation(2), seed=4) for _ in range(2))
    one.epoch = other.epoch = 3
    torch.manual_seed(1)
    before = torch.get_rng_state(), np.random.get_state()[1].copy()
    forwards = [one[i] for i in range(len(data))]
    assert torch.equal(torch.get_rng_state(), before[0])  # and leaves the global generators alone
    assert np.array_equal(np.random.get_state()[1], before[1])
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
    alone, helped = (list(DataLoader(one, batch_size=2, num_workers=n)) for n in (0, 2))
    assert all(same(a, b) for a, b in zip(alone, helped, strict=True))


def volume() -> dict[str, torch.Tensor]:
    generator, mask = torch.Generator().manual_seed(0), torch.zeros(1, 32, 32, 32)
    mask[:, 8:24, 8:24, 8:24] = 1
    expected = torch.rand((3, 32, 32, 32), generator=generator).softmax(0) * mask
    image = torch.cat([torch.randn((2, 32, 32, 32), generator=generator), mask * 0.5])
    return {"image": image, "mask": mask, "expected": expected, "seen": torch.ones(3, 1, 1, 1)}


@pytest.mark.parametrize("dims", [2, 3])
def test_augmented_examples_are_examples_and_the_originals_stay(data, dims):
    plain = data if dims == 2 else [volume()]
    copies = [{k: v.clone() for k, v in e.items()} for e in plain]
    drawn = Examples(plain, augmentation(dims), seed=7)
    for epoch in range(1, 7 if dims == 2 else 3):
        drawn.epoch = epoch
        for index, original in enumerate(plain):
            example = drawn[index]
            valid(example)
            assert {k: v.shape for k, v in example.items()} == {k: v.shape for k, v in original.items()}
            assert {type(v) for v in example.values()} == {torch.Tensor}
            assert 0.5 < float(example["mask"].sum() / original["mask"].sum()) < 1.6
            assert dims == 2 or not torch.equal(example["image"], original["image"])
    assert all(same(a, b) for a, b in zip(copies, plain, strict=True))
    bare = Examples(plain)
    assert len(bare) == len(plain)
    assert same(bare[0], plain[0])


def test_a_batch_is_the_networks_input_and_the_losss_target(data):
    pair = [{**data[0], "seen": torch.tensor([1.0, 0, 1, 1])[:, None, None]}, data[1]]
    (batch,) = DataLoader(Examples(pair), batch_size=2)
    image, target = prepare_batch(batch, "cpu", non_blocking=True, memory_format=None)
    assert (image[0, 1] == 0).all()  # what is not seen is 0 to the network, but not to the loss
    assert torch.equal(image[0, [0, 2, 3]], batch["image"][0, [0, 2, 3]])
    assert torch.equal(image[1], batch["image"][1])
    # The sequences without the depth, the mask, and where each tissue is expected.
    assert torch.equal(target, torch.cat([batch["image"][:, :3], batch["mask"], batch["expected"]], 1))


def drawn(prob: float, seen: tuple[float, ...], times: int, *, seed: int = 0) -> list[tuple[float, ...]]:
    """What of an example is seen, of which nothing else matters; the last channel is the depth."""
    hide = RandDropd(prob).set_random_state(seed=seed)
    example = {"image": torch.ones(len(seen), 2, 2), "seen": torch.tensor(seen)[:, None, None]}
    out = [hide(example) for _ in range(times)]
    assert tuple(example["seen"].flatten().tolist()) == seen  # its own copy
    assert all(torch.equal(one["image"], example["image"]) for one in out)
    return [tuple(one["seen"].flatten().tolist()) for one in out]


def test_one_sequence_that_is_there_is_hidden_as_often_as_asked_and_never_all_nor_the_depth():
    found = Counter(drawn(1.0, (1, 1, 1, 1), 600))
    assert set(found) == {(0, 1, 1, 1), (1, 0, 1, 1), (1, 1, 0, 1)}
    assert all(150 < count < 250 for count in found.values())  # 200, standard deviation 11.5
    assert set(drawn(1.0, (1, 0, 1, 1), 50)) == {(0, 0, 1, 1), (1, 0, 0, 1)}
    assert set(drawn(1.0, (0, 1, 0, 1), 50)) == {(0, 1, 0, 1)}
    assert set(drawn(1.0, (1, 1), 50)) == {(1, 1)}  # a network of a single sequence
    hidden = sum(0 in seen for seen in drawn(0.25, (1, 1, 1, 1), 1000, seed=1))
    assert 190 < hidden < 310  # 250, standard deviation 13.7
    assert set(drawn(0.0, (1, 1, 1, 1), 100)) == {(1, 1, 1, 1)}
    first = drawn(0.5, (1, 1, 1, 1), 40, seed=3)
    np.random.seed(1)
    assert drawn(0.5, (1, 1, 1, 1), 40, seed=3) == first
    assert drawn(0.5, (1, 1, 1, 1), 40, seed=4) != first


def test_hiding_is_a_part_of_the_augmentation_and_changes_nothing_else_in_it(data):
    assert not any(isinstance(t, RandDropd) for t in augmentation(2).transforms)
    plain, hiding = Examples(data, augmentation(2), seed=4), Examples(data, augmentation(2, 1.0), seed=4)
    assert same(plain[0], Examples(data, augmentation(2, 0.0), seed=4)[0])
    for index in range(len(data)):
        a, b = plain[index], hiding[index]
        assert all(torch.equal(a[k], b[k]) for k in ("image", "mask", "expected"))
        assert (a["seen"].sum(), b["seen"].sum()) == (4, 3)
        assert same(b, hiding[index])
