"""What a network is trained on: one example per image, of one size, with nothing in it that is a label."""

from __future__ import annotations

import hashlib
from collections import Counter
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from monai.data import DataLoader

from monai_deepgmm import protocol
from monai_deepgmm.images import cropping as transforms
from monai_deepgmm.images.cropping import Units
from monai_deepgmm.images.loading import Scan
from monai_deepgmm.methods import anatomy as anatomical
from monai_deepgmm.patients import discovery as cohort
from monai_deepgmm.phantom import heart as phantom
from monai_deepgmm.training import dataset as examples
from monai_deepgmm.training.dataset import Examples, RandDropd, augmentation, normalised, prepare_batch

INFARCT = protocol.load("infarct")
NEEDED = 40  # ten voxels for each of four tissues


def load(folder: Path, *names: str, **options: bool):
    found = cohort.find(folder, INFARCT, patients=names)
    return examples.load(found.studies, INFARCT, frame=None, max_voxels=1 << 28, **options)


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
    assert torch.equal(found[2].units.zero, alone.units.zero[:, [0, 2]])


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
        assert set(example) == {"image", "mask", "expected", "seen"}
        assert example["image"].shape == (3 + 1, *size)
        assert example["mask"].shape == (1, *size)
        assert example["expected"].shape == (4, *size)
        assert torch.equal(example["seen"], torch.ones(3 + 1, 1, 1))  # these patients lack nothing
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
    from monai_deepgmm.methods.naming import signature_map

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


# Patients who lack sequences ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def some(tmp_path_factory, make_patient):
    """A patient with everything, one without T2, and one with LGE alone."""
    folder = tmp_path_factory.mktemp("some")
    make_patient(folder, "lge", seed=3, sequences=("LGE",))
    make_patient(folder, "part", seed=2, sequences=("LGE", "C0"))
    make_patient(folder, "whole", seed=1)
    found, failed = load(folder, incomplete=True)
    assert failed == {}
    return found


def test_incomplete_patients_keep_what_they_have_when_asked_for(some, tmp_path, make_patient):
    assert {p.name: p.sequences for p in some} == {
        "lge": ("LGE",),
        "part": ("LGE", "bSSFP"),
        "whole": ("LGE", "T2", "bSSFP"),
    }
    assert [p.units.image.shape[1] for p in some] == [1, 2, 3]
    make_patient(tmp_path, "whole")
    make_patient(tmp_path, "torn")["T2"].write_bytes(b"")
    found, failed = load(tmp_path, incomplete=True)
    assert [p.name for p in found] == ["whole"]
    assert failed["torn"].code == "E_EMPTY"  # a broken file is no missing one


def test_the_channels_are_all_that_anyone_has_in_the_protocols_order(some):
    lge, part, whole = some
    t2 = whole._replace(sequences=("T2",))
    assert examples.channels(some, INFARCT) == ("LGE", "T2", "bSSFP")
    assert examples.channels([lge, part], INFARCT) == ("LGE", "bSSFP")
    assert examples.channels([t2, lge], INFARCT) == ("LGE", "T2")
    assert examples.channels([], INFARCT) == ()


@pytest.mark.parametrize("teacher", ["signature", "anatomy"])
def test_what_a_patient_lacks_is_0_and_not_seen_and_teaches_no_tissue(some, teacher):
    made = examples.make(some, INFARCT, grid_mm=1.0, teacher=teacher)
    shown = {who: {tuple(e["seen"].flatten().tolist()) for e in own} for who, own in made.items()}
    assert shown == {"lge": {(1, 0, 0, 1)}, "part": {(1, 0, 1, 1)}, "whole": {(1, 1, 1, 1)}}
    for who, own in made.items():
        assert len(own) == 2
        for example in own:
            valid(example)  # its expected maps sum to 1 in the mask
            assert example["image"].shape[0] == 4
            assert example["expected"].shape[0] == 4
            lacking = example["seen"].flatten() == 0
            assert (example["image"][lacking] == 0).all()
            assert all((channel != 0).any() for channel in example["image"][~lacking])
            assert ((example["expected"][2] > 0).any()) == (who == "whole")  # edema is seen on T2 alone


def test_an_incomplete_patient_is_taught_what_he_is_taught_alone(some):
    _, part, _ = some
    together, alone = (examples.make(p, INFARCT, grid_mm=1.0, teacher="anatomy")["part"] for p in (some, [part]))
    for ours, own in zip(together, alone, strict=True):
        assert torch.equal(ours["image"][[0, 2, 3]], own["image"])
        assert torch.equal(ours["expected"][[0, 1, 3]], own["expected"])


def test_an_incomplete_patient_needs_voxels_for_his_own_tissues_only():
    lean = slices_with([30, 40])  # 30 voxels: enough for three tissues, not for four
    lean = lean._replace(sequences=("LGE", "bSSFP"), units=lean.units._replace(image=lean.units.image[:, [0, 2]]))
    made = examples.make([lean, slices_with([30, 40])._replace(name="whole")], INFARCT, grid_mm=1.0)
    assert {who: [int(e["mask"].sum()) for e in own] for who, own in made.items()} == {"p": [30, 40], "whole": [40]}


def test_the_teacher_decides_what_is_expected(some):
    *_, whole = some
    units = whole.units
    taught = {t: examples.make([whole], INFARCT, grid_mm=1.5, teacher=t)["whole"] for t in ("signature", "anatomy")}
    by_default = examples.make([whole], INFARCT, grid_mm=1.5)["whole"]
    resp = anatomical.fit(
        units.image, units.mask, INFARCT.tissues, INFARCT.sequences, (1.5, 1.5), INFARCT.anatomy, slices=units.slices
    ).resp
    for index, example in enumerate(taught["anatomy"]):
        assert same(by_default[index], taught["signature"][index])
        assert torch.equal(example["image"], by_default[index]["image"])
        # On the scan's own grid nothing is interpolated, and so clear an image leaves no region in doubt.
        for found, expected in zip(resp[index], example["expected"], strict=True):
            assert float(expected.sum()) == pytest.approx(float(found.sum()), rel=1e-4)
        assert example["expected"].amax(0).sum() > by_default[index]["expected"].amax(0).sum()  # it is surer


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
    plain = {"image": image, "mask": mask, "expected": expected, "seen": torch.ones(3, 1, 1, 1)}
    dataset = Examples([plain], augmentation(3), seed=0)
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


def test_what_is_not_seen_is_0_to_the_network_but_not_to_the_loss(data):
    pair = [{**data[0], "seen": torch.tensor([1.0, 0, 1, 1])[:, None, None]}, data[1]]
    (batch,) = DataLoader(Examples(pair), batch_size=2)
    image, target = prepare_batch(batch, "cpu")
    assert (image[0, 1] == 0).all()
    assert torch.equal(image[0, [0, 2, 3]], batch["image"][0, [0, 2, 3]])
    assert torch.equal(image[1], batch["image"][1])
    assert torch.equal(target[:, :3], batch["image"][:, :3])


def test_what_a_patient_lacks_stays_0_in_the_augmentation(some):
    """Noise there would be a channel of the mixture like any other."""
    made = examples.make(some, INFARCT, grid_mm=1.0)["part"]
    dataset = Examples(made, augmentation(2, 0.5), seed=0)
    for epoch in range(1, 7):
        dataset.epoch = epoch
        for index in range(len(made)):
            assert (dataset[index]["image"][1] == 0).all()


# Hidden sequences ---------------------------------------------------------------------------------------------------


def shows(*seen: float) -> dict[str, torch.Tensor]:
    """An example of which nothing but ``seen`` matters: the sequences' and the depth's."""
    return {"image": torch.ones(len(seen), 2, 2), "seen": torch.tensor(seen)[:, None, None]}


def drawn(hide: RandDropd, example, times: int) -> list[tuple[float, ...]]:
    return [tuple(hide(example)["seen"].flatten().tolist()) for _ in range(times)]


def test_one_sequence_is_hidden_each_as_often_and_never_the_depth():
    hide = RandDropd(1.0)
    hide.set_random_state(seed=0)
    example = shows(1, 1, 1, 1)
    found = Counter(drawn(hide, example, 600))
    assert set(found) == {(0, 1, 1, 1), (1, 0, 1, 1), (1, 1, 0, 1)}
    assert all(150 < count < 250 for count in found.values())  # 200, standard deviation 11.5
    assert example["seen"].flatten().tolist() == [1, 1, 1, 1]  # its own copy
    assert torch.equal(hide(example)["image"], example["image"])


def test_only_what_is_there_is_hidden_and_never_all_of_it():
    hide = RandDropd(1.0)
    hide.set_random_state(seed=0)
    assert set(drawn(hide, shows(1, 0, 1, 1), 50)) == {(0, 0, 1, 1), (1, 0, 0, 1)}
    assert set(drawn(hide, shows(0, 1, 0, 1), 50)) == {(0, 1, 0, 1)}
    assert set(drawn(hide, shows(1, 1), 50)) == {(1, 1)}  # a network of a single sequence


def test_sequences_are_hidden_as_often_as_asked():
    hide = RandDropd(0.25)
    hide.set_random_state(seed=1)
    assert 190 < sum(0 in seen for seen in drawn(hide, shows(1, 1, 1, 1), 1000)) < 310  # 250, standard deviation 13.7
    never = RandDropd(0.0)
    never.set_random_state(seed=1)
    assert set(drawn(never, shows(1, 1, 1, 1), 100)) == {(1, 1, 1, 1)}


def test_what_is_hidden_depends_on_the_seed():
    def of(seed: int) -> list[tuple[float, ...]]:
        hide = RandDropd(0.5)
        hide.set_random_state(seed=seed)
        return drawn(hide, shows(1, 1, 1, 1), 40)

    np.random.seed(0)
    first = of(3)
    np.random.seed(1)
    assert of(3) == first
    assert of(4) != first


def test_hiding_is_a_part_of_the_augmentation_and_changes_nothing_else_in_it(data):
    assert not any(isinstance(t, RandDropd) for t in augmentation(2).transforms)
    plain, hiding = Examples(data, augmentation(2), seed=4), Examples(data, augmentation(2, 1.0), seed=4)
    assert same(plain[0], Examples(data, augmentation(2, 0.0), seed=4)[0])
    for index in range(len(data)):
        a, b = plain[index], hiding[index]
        assert all(torch.equal(a[k], b[k]) for k in ("image", "mask", "expected"))
        assert (a["seen"].sum(), b["seen"].sum()) == (4, 3)
        assert same(b, hiding[index])
