"""Whose labels a training may use, and that they reach the loss voxel by voxel."""

from __future__ import annotations

import json
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from monai_deepgmm import protocol
from monai_deepgmm.cli import main
from monai_deepgmm.errors import UsageError
from monai_deepgmm.networks.gmm_loss import IGNORE
from monai_deepgmm.patients import discovery as cohort
from monai_deepgmm.patients.study import Problem, Study
from monai_deepgmm.training import dataset as examples
from monai_deepgmm.training import label_split as labelled
from monai_deepgmm.training import prepare as training
from monai_deepgmm.training.dataset import Examples, augmentation, prepare_batch
from monai_deepgmm.training.handlers import CHECKPOINT

INFARCT = protocol.load("infarct")
TINY = "{_target_: monai_deepgmm.networks.UNet, filters: [4, 8]}"
#: The truth's value of each of the infarct's tissues, in the network's order.
VALUES = (500, 200, 1220, 2221)


def studies(number: int, *, without: tuple[int, ...] = ()) -> list[Study]:
    return [Study(f"p{i}", {}, truth=None if i in without else Path(f"p{i}.nii.gz")) for i in range(number)]


@pytest.fixture(scope="module")
def patients(tmp_path_factory, make_patient) -> Path:
    folder = tmp_path_factory.mktemp("labelled") / "patients"
    for number in range(1, 5):
        make_patient(folder, f"pat{number}", seed=number)
    make_patient(folder, "part", seed=9, sequences=("LGE", "C0"))
    return folder


def loaded(folder: Path, *names: str, labelled: tuple[str, ...] = ()):
    found = cohort.find(folder, INFARCT, patients=names)
    return examples.load(found.studies, INFARCT, frame=None, max_voxels=1 << 28, incomplete=True, labelled=labelled)[0]


# Who ----------------------------------------------------------------------------------------------------------------


def test_nobody_unless_asked():
    assert labelled.asked(None) == labelled.asked([]) == ()
    assert training.plan().labels == ()


def test_everyone_who_has_a_truth():
    assert labelled.of(studies(5, without=(3,)), labelled.asked("all"), seed=0) == {"p0", "p1", "p2", "p4"}


def test_those_that_are_named(tmp_path):
    assert labelled.of(studies(5), labelled.asked(["p1", "p3"]), seed=0) == {"p1", "p3"}
    file = tmp_path / "ids.txt"
    file.write_text("p2\n\n p4 \n")
    assert labelled.of(studies(5), labelled.asked(str(file)), seed=0) == {"p2", "p4"}
    assert labelled.asked([str(file)]) == ("p2", "p4")  # the file may go


@pytest.mark.parametrize(("share", "count"), [("1/4", 3), ("1/2", 6), ("3/4", 9), ("1/1", 12), ("1/100", 1)])
def test_a_share_is_drawn_by_the_seed(share, count):
    drawn = [labelled.of(studies(12), labelled.asked(share), seed=seed) for seed in range(5)]
    assert {len(d) for d in drawn} == {count}
    assert drawn[0] == labelled.of(studies(12), [share], seed=0)
    assert count == 12 or len(set(drawn)) > 1


def test_shares_of_one_seed_are_nested():
    quarter, half, most = (labelled.of(studies(13), [s], seed=4) for s in ("1/4", "1/2", "3/4"))
    assert quarter < half < most


def test_a_patient_with_a_problem_is_not_drawn():
    broken = Study("x", {}, truth=Path("x.nii.gz"), problems=(Problem("E_MASK", "no mask"),))
    assert labelled.of([broken, *studies(2)], ["all"], seed=0) == {"p0", "p1"}


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["p1", "p9"], "--labels p9: there is no such patient"),
        (["p3"], "--labels p3: no truth file"),
        (["some"], "share such as 1/4"),
    ],
)
def test_who_is_not_there_is_refused_with_the_choices(given, said):
    with pytest.raises(UsageError, match=said):
        labelled.of(studies(5, without=(3,)), labelled.asked(given), seed=0)


@pytest.mark.parametrize("share", ["0/4", "5/4", "1/0"])
def test_shares_that_are_none_are_refused(share):
    with pytest.raises(UsageError, match="above 0 and at most 1"):
        labelled.asked(share)


def test_files_that_say_nothing_are_refused(tmp_path):
    empty, binary = tmp_path / "empty", tmp_path / "binary"
    empty.write_text("\n \n")
    binary.write_bytes(b"\xff\xfe\x00\x81")
    with pytest.raises(UsageError, match="names nobody"):
        labelled.asked(str(empty))
    with pytest.raises(UsageError, match="cannot be read"):
        labelled.asked(str(binary))


def test_a_cohort_without_truth_is_refused():
    with pytest.raises(UsageError, match="no patient has a truth file"):
        labelled.of(studies(2, without=(0, 1)), ["all"], seed=0)


# Examples -----------------------------------------------------------------------------------------------------------


def test_labels_are_the_truths_and_unknown_elsewhere(patients):
    found = loaded(patients, "pat1", "pat2", labelled=("pat1",))
    made = examples.make(found, INFARCT, grid_mm=1.5, labelled=True)
    truth = np.asarray(nib.load(patients / "pat1_gd.nii.gz").dataobj)
    for index, example in enumerate(made["pat1"]):
        marked, mask = example["labels"], example["mask"]
        assert marked.shape == mask.shape
        assert torch.equal(marked > 0, mask > 0)  # the mask is the truth's
        for tissue, value in enumerate(VALUES, start=1):
            assert int((marked == tissue).sum()) == int((truth[..., index] == value).sum())
    assert all((e["labels"] == 0).all() for e in made["pat2"])


def test_nobodys_truth_is_opened_unless_asked(patients):
    found = loaded(patients, "pat1", "pat2", labelled=("pat1",))
    assert [p.labels is None for p in found] == [False, True]
    assert "labels" in found[0].inputs
    assert "labels" not in found[1].inputs
    assert "labels" not in examples.make(found[1:], INFARCT, grid_mm=1.5)["pat2"][0]


def test_labels_lie_on_the_grid_that_the_network_sees(patients):
    """Each labelled voxel has its own tissue's intensity there, also on a finer grid."""
    found = loaded(patients, "pat1", labelled=("pat1",))
    for grid_mm in (1.0, 1.5):
        for example in examples.make(found, INFARCT, grid_mm=grid_mm, labelled=True)["pat1"]:
            bssfp = example["image"][2]
            means = [bssfp[example["labels"][0] == k].mean().item() for k in range(1, 5)]
            assert max(means) == means[0]  # blood is the brightest by far
            assert means[0] - 1 > sorted(means)[-2]


def test_who_lacks_a_sequence_teaches_the_tissue_that_his_truth_names(patients):
    found = loaded(patients, "pat1", "part", labelled=("part",))
    made = examples.make(found, INFARCT, grid_mm=1.5, labelled=True)
    assert {int(v) for e in made["part"] for v in e["labels"].unique()} == {0, 1, 2, 3, 4}
    alone = examples.make(loaded(patients, "part", labelled=("part",)), INFARCT, grid_mm=1.5, labelled=True)
    # A network that is never shown T2 has no output for edema: its voxels are myocardium.
    assert {int(v) for e in alone["part"] for v in e["labels"].unique()} == {0, 1, 2, 3}
    sizes = [int((e["labels"] == 2).sum()) for e in alone["part"]]
    assert sizes == [int(((e["labels"] == 2) | (e["labels"] == 3)).sum()) for e in made["part"]]


def test_values_that_mean_nothing_are_unknown(patients, tmp_path):
    folder = tmp_path / "scribbles"
    folder.mkdir()
    for file in patients.glob("pat1_*"):
        (folder / file.name).write_bytes(file.read_bytes())
    image = nib.load(folder / "pat1_gd.nii.gz")
    values = np.asarray(image.dataobj).copy()
    values[values == 200] = 7  # inside the mask by --mask-labels, but no tissue
    nib.save(nib.Nifti1Image(values, image.affine, image.header), folder / "pat1_gd.nii.gz")
    found = cohort.find(folder, INFARCT, mask_labels=[7, 500, 1220, 2221])
    (patient,), failed = examples.load(found.studies, INFARCT, frame=None, max_voxels=1 << 28, labelled=["pat1"])
    assert not failed
    for example in examples.make([patient], INFARCT, grid_mm=1.5, labelled=True)["pat1"]:
        unknown = (example["labels"] == 0) & (example["mask"] > 0)
        assert 0 < unknown.sum() < example["mask"].sum()
        assert {1, 3, 4} == {int(v) for v in example["labels"].unique()} - {0}


def test_augmentation_moves_labels_with_the_image(patients):
    found = loaded(patients, "pat1", labelled=("pat1",))
    made = examples.make(found, INFARCT, grid_mm=1.0, labelled=True, shaded=True)["pat1"]
    bare = [{k: v for k, v in e.items() if k not in examples.OPTIONAL} for e in made]
    dataset, without = (Examples(data, augmentation(2), seed=1) for data in (made, bare))
    for epoch in range(1, 9):
        dataset.epoch = without.epoch = epoch
        example, plain = dataset[0], without[0]
        assert all(torch.equal(example[key], plain[key]) for key in plain)  # labels change no draw
        marked = example["labels"]
        assert {int(v) for v in marked.unique()} <= {0, 1, 2, 3, 4}
        assert torch.equal(marked, marked.round())
        assert ((marked > 0) & (example["mask"] == 0)).float().mean() < 0.01
        bssfp = example["image"][2]
        means = [bssfp[marked[0] == k].mean().item() for k in range(1, 5)]
        assert means[0] - 1 > sorted(means)[-2]
        assert torch.equal(example["zero"], made[0]["zero"])


def test_the_target_ends_with_labels_and_unknown_is_ignored(patients):
    found = loaded(patients, "pat1", "pat2", labelled=("pat1",))
    made = examples.make(found, INFARCT, grid_mm=1.5, labelled=True)
    (batch,) = DataLoader(Examples([made["pat1"][0], made["pat2"][0]]), batch_size=2)
    image, target = prepare_batch(batch, "cpu")
    assert target.shape[1] == 3 + 1 + 4 + 1
    assert torch.equal(target[:, :3], image[:, :3])
    assert torch.equal(target[:, 8:], batch["labels"] - 1)
    assert (target[1, 8] == IGNORE).all()
    assert ((target[0, 8] == IGNORE) == (batch["mask"][0, 0] == 0)).all()


def test_a_shaded_loss_sees_intensities_above_no_signal_and_the_network_does_not(patients):
    found = loaded(patients, "pat1", "part")
    made = examples.make(found, INFARCT, grid_mm=1.5, shaded=True)
    (batch,) = DataLoader(Examples([made["pat1"][0], made["part"][0]]), batch_size=2)
    image, target = prepare_batch(batch, "cpu")
    assert torch.equal(image, batch["image"])
    zero = next(p for p in found if p.name == "pat1").units.zero[0].float()
    assert torch.allclose(target[0, :3], image[0, :3] - zero[:, None, None])
    inside = batch["mask"][0, 0] > 0
    assert (target[0, :3][:, inside] > 0).all()
    assert (target[1, 1] == 0).all()  # T2, which this patient lacks


# Training -----------------------------------------------------------------------------------------------------------


def trained(folder: Path, out: Path, *more: str) -> dict:
    options = ["--network", TINY, "--epochs", "1", "-q", "--set", "batch_size=2", "validation=0"]
    assert main(["train", str(folder), str(out), *options, *more]) == 0
    return json.loads((out / "provenance.json").read_text())


def test_the_provenance_tells_whose_labels_were_used(patients, tmp_path):
    none, some, others, share = (
        trained(patients, tmp_path / name, *more)
        for name, more in {
            "none": ["--loss", "gmm_tv"],
            "some": ["--labels", "pat1"],
            "others": ["--labels", "pat2"],
            "share": ["--labels", "1/2"],
        }.items()
    )
    assert [p["labels"] for p in (none, some, others)] == [[], ["pat1"], ["pat2"]]
    assert len(share["labels"]) == 3  # of five, rounded
    assert {p["plan"]["loss"] for p in (none, some, others, share)} == {"gmm_tv"}
    assert len({p["fingerprint"] for p in (none, some, others, share)}) == 4
    metadata = json.loads((tmp_path / "some" / "configs" / "metadata.json").read_text())
    assert "of which 1 labelled" in metadata["data_source"]
    settings = json.loads((tmp_path / "share" / "configs" / "train.json").read_text())
    assert settings["labels"] == ["1/2"]


def test_other_labels_do_not_resume(patients, tmp_path, capsys):
    options = ["--network", TINY, "--epochs", "1", "-q", "--set", "validation=0"]
    assert main(["train", str(patients), str(tmp_path / "m"), *options, "--labels", "pat1"]) == 0
    again = ["train", str(patients), str(tmp_path / "m"), *options, "--resume", "--labels"]
    assert main([*again, "pat2"]) == 2
    assert "other patients, files or options" in capsys.readouterr().err
    assert main([*again, "pat1"]) == 0


def test_a_broken_truth_fails_its_patient_alone(patients, tmp_path, capsys):
    folder = tmp_path / "patients"
    folder.mkdir()
    for file in patients.glob("pat*"):
        (folder / file.name).write_bytes(file.read_bytes())
    image = nib.load(folder / "pat2_gd.nii.gz")
    values = np.asarray(image.dataobj)
    other = np.where(values > 0, 9, 0).astype(np.int16)  # a mask, but no tissue
    nib.save(nib.Nifti1Image(other, image.affine, image.header), folder / "pat2_gd.nii.gz")
    options = ["--network", TINY, "--epochs", "1", "--mask-labels", "9", "200", "500", "1220", "2221"]
    assert main(["train", str(folder), str(tmp_path / "m"), *options, "--labels", "pat1", "pat2"]) == 1
    assert "pat2 was not used: E_TRUTH" in capsys.readouterr().err
    assert json.loads((tmp_path / "m" / "provenance.json").read_text())["labels"] == ["pat1"]


def test_labels_of_nobody_are_refused_before_anything_is_written(patients, tmp_path, capsys):
    assert main(["train", str(patients), str(tmp_path / "m"), "--labels", "somebody"]) == 2
    assert "--labels somebody: there is no such patient" in capsys.readouterr().err
    assert not (tmp_path / "m").exists()


def test_labels_teach_what_they_say(patients, tmp_path):
    """Without the label-free loss, the loss falls to the cross-entropy of the labelled patients alone."""
    out = tmp_path / "m"
    options = ["--network", TINY, "-q", "--epochs", "20", "--labels", "all", "--set"]
    settings = ["beta=0", "validation=0", "lr=0.02", "augment=false", "tol=0"]
    assert main(["train", str(patients), str(out), *options, *settings]) == 0
    rows = (out / "training.tsv").read_text().splitlines()[1:]
    losses = [float(row.split("\t")[2]) for row in rows]
    assert losses[-1] < 0.6 * losses[0]
    assert losses[0] < 2 * np.log(4)
    assert (out / CHECKPOINT).is_file()
