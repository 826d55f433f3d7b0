"""Whose labels a training may use, and that they reach the loss voxel by voxel."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from scenes import INFARCT, TINY, contents, loaded
from torch.utils.data import DataLoader

from monai_deepgmm.cli import main
from monai_deepgmm.errors import UsageError
from monai_deepgmm.images.preprocessing import Preprocessing
from monai_deepgmm.networks.gmm_loss import IGNORE
from monai_deepgmm.patients import discovery
from monai_deepgmm.patients.study import Problem, Study
from monai_deepgmm.training import dataset, label_split
from monai_deepgmm.training.augmentation import OPTIONAL, augmentation
from monai_deepgmm.training.dataset import Examples, prepare_batch
from monai_deepgmm.training.handlers import read_history
from monai_deepgmm.training.plan import plan
from monai_deepgmm.training.prepare import prepare_cohort

#: The values of the infarct's tissues in the reference labels, in the network's order.
VALUES = (500, 200, 1220, 2221)


def studies(number: int, *, without: tuple[int, ...] = ()) -> list[Study]:
    return [Study(f"p{i}", {}, truth=None if i in without else Path(f"p{i}.nii.gz")) for i in range(number)]


@pytest.fixture(scope="module")
def patients(tmp_path_factory, make_patient) -> Path:
    folder = tmp_path_factory.mktemp("labelled") / "patients"
    for number in (1, 2, 3):
        make_patient(folder, f"pat{number}", seed=number)
    make_patient(folder, "part", seed=9, sequences=("LGE", "C0"))
    return folder


@pytest.fixture
def own(patients, tmp_path) -> Path:
    """The same patients, for a test that changes them."""
    return Path(shutil.copytree(patients, tmp_path / "own"))


def of(folder: Path, *names: str, labelled: tuple[str, ...] = ()) -> list[dataset.Patient]:
    return loaded(folder, *names, incomplete=True, labelled=labelled)


def change(path: Path, old: int, new: int) -> None:
    """Another value in a file of reference labels; 0: in every voxel of the mask."""
    image = nib.load(path)
    values = np.asarray(image.dataobj).copy()
    values[values == old if old else values > 0] = new
    nib.save(nib.Nifti1Image(values, image.affine, image.header), path)


def test_nobody_everyone_or_those_that_are_named(tmp_path):
    def who(given: object) -> set[str]:
        return set(label_split.of(studies(5, without=(3,)), label_split.asked(given), seed=0))

    assert label_split.asked(None) == label_split.asked([]) == plan().labels == ()
    assert who("all") == {"p0", "p1", "p2", "p4"}
    assert who(["p1", "p2"]) == {"p1", "p2"}
    file = tmp_path / "ids.txt"
    file.write_text("p2\n\n p4 \n")
    assert who(str(file)) == {"p2", "p4"}
    assert label_split.asked([str(file)]) == ("p2", "p4")  # the file may go
    broken = Study("x", {}, truth=Path("x.nii.gz"), problems=(Problem("E_MASK", "no mask"),))
    assert label_split.of([broken, *studies(2)], ["all"], seed=0) == {"p0", "p1"}


@pytest.mark.parametrize(("share", "count"), [("1/4", 3), ("1/2", 6), ("3/4", 9), ("1/1", 12), ("1/100", 1)])
def test_a_share_is_drawn_by_the_seed(share, count):
    drawn = [label_split.of(studies(12), label_split.asked(share), seed=seed) for seed in range(5)]
    assert {len(d) for d in drawn} == {count}
    assert drawn[0] == label_split.of(studies(12), [share], seed=0)
    assert count == 12 or len(set(drawn)) > 1
    assert drawn[4] <= label_split.of(studies(12), ["3/4" if count < 9 else "1/1"], seed=4)  # shares are nested


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["p1", "p9"], "--labels p9: there is no such patient"),
        (["p3"], "--labels p3: no reference labels"),
        (["some"], "share such as 1/4"),
        *((share, "above 0 and at most 1") for share in ("0/4", "5/4", "1/0")),
        (["none"], "no patient has a file of reference labels"),
        (b"\n \n", "names nobody"),
        (b"\xff\xfe\x00\x81", "cannot be read"),
    ],
)
def test_who_is_not_there_is_refused_with_the_choices(tmp_path, given, said):
    if isinstance(given, bytes):
        (tmp_path / "file").write_bytes(given)
        given = str(tmp_path / "file")
    of = studies(2, without=(0, 1)) if given == ["none"] else studies(5, without=(3,))
    with pytest.raises(UsageError, match=said):
        label_split.of(of, label_split.asked(given), seed=0)


def agree(example: dict[str, torch.Tensor]) -> bool:
    """Whether each labelled voxel has its own tissue's intensity: blood is the brightest by far on bSSFP."""
    means = [example["image"][2][example["labels"][0] == k].mean().item() for k in range(1, 5)]
    return means[0] == max(means) and means[0] - 1 > sorted(means)[-2]


def test_labels_are_the_references_and_unknown_elsewhere(patients):
    found = of(patients, "pat1", "pat2", labelled=("pat1",))
    made = dataset.make(found, INFARCT, grid_mm=1.5, labelled=True)
    reference = np.asarray(nib.load(patients / "pat1_gd.nii.gz").dataobj)
    for index, example in enumerate(made["pat1"]):
        assert torch.equal(example["labels"] > 0, example["mask"] > 0)  # the mask is theirs
        for tissue, value in enumerate(VALUES, start=1):
            assert int((example["labels"] == tissue).sum()) == int((reference[..., index] == value).sum())
    assert all((e["labels"] == 0).all() for e in made["pat2"])
    assert [p.labels is None for p in found] == [False, True]  # nobody's are opened unless asked
    assert ["labels" in p.inputs for p in found] == [True, False]
    assert "labels" not in dataset.make(found[1:], INFARCT, grid_mm=1.5)["pat2"][0]
    finer = dataset.make(found[:1], INFARCT, grid_mm=1.0, labelled=True)["pat1"]
    assert all(agree(example) for example in (*made["pat1"], *finer))


def test_who_lacks_a_sequence_teaches_the_tissue_that_his_labels_name(patients):
    made = dataset.make(of(patients, "pat1", "part", labelled=("part",)), INFARCT, grid_mm=1.5, labelled=True)
    alone = dataset.make(of(patients, "part", labelled=("part",)), INFARCT, grid_mm=1.5, labelled=True)
    assert {int(v) for e in made["part"] for v in e["labels"].unique()} == {0, 1, 2, 3, 4}
    # A network that is never shown T2 has no output for edema: its voxels are myocardium.
    assert {int(v) for e in alone["part"] for v in e["labels"].unique()} == {0, 1, 2, 3}
    sizes = [int((e["labels"] == 2).sum()) for e in alone["part"]]
    assert sizes == [int(((e["labels"] == 2) | (e["labels"] == 3)).sum()) for e in made["part"]]


def test_values_that_mean_nothing_are_unknown(own):
    change(own / "pat1_gd.nii.gz", 200, 7)  # inside the mask by --mask-labels, but no tissue
    found = discovery.find(own, INFARCT, mask_labels=[7, 500, 1220, 2221], patients=["pat1"])
    (patient,), failed = dataset.load(found.studies, INFARCT, Preprocessing(), labelled=["pat1"])
    assert not failed
    for example in dataset.make([patient], INFARCT, grid_mm=1.5, labelled=True)["pat1"]:
        unknown = (example["labels"] == 0) & (example["mask"] > 0)
        assert 0 < unknown.sum() < example["mask"].sum()
        assert {1, 3, 4} == {int(v) for v in example["labels"].unique()} - {0}


def test_augmentation_moves_labels_with_the_image(patients):
    found = of(patients, "pat1", labelled=("pat1",))
    made = dataset.make(found, INFARCT, grid_mm=1.0, labelled=True, shaded=True)["pat1"]
    bare = [{k: v for k, v in e.items() if k not in OPTIONAL} for e in made]
    drawn, without = (Examples(data, augmentation(2), seed=1) for data in (made, bare))
    for epoch in range(1, 9):
        drawn.epoch = without.epoch = epoch
        example, plain = drawn[0], without[0]
        assert all(torch.equal(example[key], plain[key]) for key in plain)  # labels change no draw
        assert {int(v) for v in example["labels"].unique()} <= {0, 1, 2, 3, 4}
        assert torch.equal(example["labels"], example["labels"].round())
        assert ((example["labels"] > 0) & (example["mask"] == 0)).float().mean() < 0.01
        assert agree(example)
        assert torch.equal(example["zero"], made[0]["zero"])


def test_the_target_ends_with_labels_and_a_shaded_loss_sees_intensities_above_no_signal(patients):
    found = of(patients, "pat1", "part", labelled=("pat1",))
    made = dataset.make(found, INFARCT, grid_mm=1.5, labelled=True, shaded=True)
    (batch,) = DataLoader(Examples([made["pat1"][0], made["part"][0]]), batch_size=2)
    image, target = prepare_batch(batch, "cpu")
    assert torch.equal(image, batch["image"])  # as the network sees it
    assert target.shape[1] == 3 + 1 + 4 + 1
    assert torch.equal(target[:, 8:], batch["labels"] - 1)
    assert (target[1, 8] == IGNORE).all()  # unknown
    inside = batch["mask"][0, 0] > 0
    assert ((target[0, 8] == IGNORE) == ~inside).all()
    zero = next(p for p in found if p.name == "pat1").crops.zero[0].float()
    assert torch.allclose(target[0, :3], image[0, :3] - zero[:, None, None])
    assert (target[0, :3][:, inside] > 0).all()
    assert (target[1, 1] == 0).all()  # T2, which this patient lacks


OPTIONS = ["--network", TINY, "--epochs", "1", "-q", "--set", "batch_size=2", "validation=0"]


def test_whose_labels_are_used_changes_the_fingerprint(patients):
    found = discovery.find(patients, INFARCT)
    asked = [{"loss": "gmm_tv"}, *({"labels": who} for who in (["pat1"], ["pat2"], "1/2"))]
    made = [prepare_cohort(found, plan(**one, settings={"validation": 0})) for one in asked]
    assert [len(m.labelled) for m in made] == [0, 1, 1, 2]
    assert len({m.fingerprint for m in made}) == 4


def test_labels_of_somebody_are_told_and_others_do_not_resume(patients, tmp_path, capsys):
    out = tmp_path / "model"
    typed = ["train", str(patients), str(out), *OPTIONS]
    assert main([*typed, "--labels", "pat1"]) == 0
    told = json.loads((out / "provenance.json").read_text())
    assert (told["labels"], told["plan"]["training"]["loss"]) == (["pat1"], "gmm_tv")
    assert "of which 1 labelled" in (out / "configs" / "metadata.json").read_text()
    assert json.loads((out / "configs" / "train.json").read_text())["labels"] == ["pat1"]
    before = contents(out)
    assert main([*typed, "--resume", "--labels", "pat2"]) == 2
    assert "other patients, files or options" in capsys.readouterr().err
    assert main([*typed, "--resume", "--labels", "pat1"]) == 0
    assert contents(out) == before


def test_broken_labels_fail_their_patient_alone(own, tmp_path, capsys):
    change(own / "pat2_gd.nii.gz", 0, 9)  # a mask, but no tissue
    asked = ["--mask-labels", "9", *map(str, VALUES), "--labels", "pat1", "pat2"]
    assert main(["train", str(own), str(tmp_path / "m"), *OPTIONS, *asked]) == 1
    assert "pat2 was not used: E_TRUTH" in capsys.readouterr().err
    assert json.loads((tmp_path / "m" / "provenance.json").read_text())["labels"] == ["pat1"]


def test_labels_teach_what_they_say(patients, tmp_path):
    """Without the label-free loss, the loss falls to the cross-entropy of the labelled patients alone."""
    settings = ["beta=0", "lr=0.02", "augment=false", "tol=0"]
    asked = [*OPTIONS, "--epochs", "20", "--labels", "all", "--set", *settings]
    assert main(["train", str(patients), str(tmp_path / "m"), *asked]) == 0
    losses = [row["validation_loss"] for row in read_history(tmp_path / "m" / "training.tsv")]
    assert losses[-1] < 0.6 * losses[0]
    assert losses[0] < 2 * np.log(4)
