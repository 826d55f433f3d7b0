"""A cohort, ready to train on, and what a training makes of it: what is held out, refused, and learnt."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from scenes import EPOCHS, INFARCT, TINY, contents, equal, loaded, train
from torch import nn

from monai_deepgmm.cli import main
from monai_deepgmm.errors import UsageError
from monai_deepgmm.images.preprocessing import Preprocessing
from monai_deepgmm.methods import model_spec, trained_network
from monai_deepgmm.methods.anatomy import AnatomicalConfig
from monai_deepgmm.methods.model_spec import ModelSpec
from monai_deepgmm.methods.training_config import SignatureTeacher
from monai_deepgmm.networks.nll_loss import MeanPrior, MixtureNLL, Staged
from monai_deepgmm.patients import discovery
from monai_deepgmm.training import dataset
from monai_deepgmm.training.curves import curves
from monai_deepgmm.training.handlers import CHECKPOINT, HISTORY, read_checkpoint, read_history
from monai_deepgmm.training.plan import plan
from monai_deepgmm.training.prepare import PreparedCohort, agreement, prepare_cohort


def owners(prepared, patients: Path) -> tuple[list[str], list[str]]:
    """The patient that each example for training, and for validation, is of."""
    made = dataset.make(loaded(patients), INFARCT, grid_mm=1.0, teacher=prepared.spec.training.teacher)

    def owner(example) -> str:
        return next(who for who, own in made.items() if any(equal(example, e) for e in own))

    return [owner(e) for e in prepared.train], [owner(e) for e in prepared.validation]


def test_validation_is_split_by_patients_with_the_seed(found, patients):
    held = set()
    for seed in range(3):
        asked = plan(settings={"validation": 0.4}, seed=seed)
        prepared, again = prepare_cohort(found, asked), prepare_cohort(found, asked)
        ours, theirs = owners(prepared, patients)
        assert sorted(ours + theirs) == [f"pat{n}" for n in range(1, 6) for _ in range(2)]
        assert not set(ours) & set(theirs)
        assert prepared.patients == (3, 2)
        assert equal([again.train, again.validation], [prepared.train, prepared.validation])
        held.add(frozenset(theirs))
    assert len(held) > 1


def test_one_of_five_patients_is_held_out_and_none_of_four_nor_of_a_single_label(found):
    assert prepare_cohort(found, plan()).patients == (4, 1)
    for fewer, asked in ((found.studies[:4], plan()), (found.studies, plan(settings={"validation": 0}))):
        prepared = prepare_cohort(dataclasses.replace(found, studies=fewer), asked)
        assert prepared.patients == (len(fewer), 0)
        assert prepared.validation is prepared.train
    everyone, one = (prepare_cohort(found, plan(labels=who, settings={"validation": 0.2})) for who in ("all", ["pat1"]))
    assert everyone.patients == (4, 1)
    assert all((e["labels"] > 0).any() for e in everyone.validation)
    assert (one.patients, one.labelled) == ((5, 0), ("pat1",))


@pytest.mark.parametrize(
    ("settings", "teacher", "label_rule", "incomplete"),
    [
        ({}, AnatomicalConfig(), "both", True),
        ({"teacher": "signature"}, SignatureTeacher(), "posterior", False),
        ({"drop": 0}, AnatomicalConfig(), "both", False),
        ({"augment": False}, AnatomicalConfig(), "both", False),
        ({"temper": 0.9, "n4": True}, AnatomicalConfig(temper=0.9), "both", True),
    ],
)
def test_the_network_is_specified_by_the_cohort_and_the_plan(found, settings, teacher, label_rule, incomplete):
    asked = plan(method="deepg", network=TINY, settings={"grid_mm": 1.5} | settings)
    spec = prepare_cohort(dataclasses.replace(found, studies=found.studies[:1]), asked).spec
    shaded = settings.get("n4", False)
    assert spec == ModelSpec(
        protocol="infarct",
        normalisation=INFARCT.normalisation + "-n4" * shaded,
        sequences=("LGE", "T2", "bSSFP"),
        tissues=("blood", "myocardium", "edema", "scar"),
        network={"_target_": "monai_deepgmm.networks.UNet", "filters": [4, 8]},
        spatial_dims=2,
        size=(64, 64),  # 31 pixels of 1.5 mm and a margin of 4 mm
        training=asked.training,
    )
    told = spec.training
    assert (told.method, told.covariance, told.grid_mm, told.spatial) == ("deepg", "tied", 1.5, False)
    assert (told.teacher, told.label_rule, told.incomplete) == (teacher, label_rule, incomplete)
    assert told.preprocessing == Preprocessing(n4=shaded)


def test_epochs_are_those_of_320_steps_and_the_teacher_begins_alone_with_mas_losses(found):
    def made(**options):
        return prepare_cohort(found, plan(network=TINY, **options))

    assert [made(settings={"batch_size": batch}).epochs for batch in (4, 1)] == [100, 40]  # 100 at most
    assert made(epochs=7).epochs == 7
    assert made(loss="gmm_tv", epochs=9).start_epochs == 3
    assert made(loss="gmm_tv", epochs=9, settings={"start_epochs": 0}).start_epochs == 0
    assert made(epochs=9).start_epochs == 0


def test_the_fingerprint_tells_what_can_change_a_weight(patients, tmp_path):
    def fingerprint(folder=patients, names=("pat1", "pat2"), **options):
        return prepare_cohort(discovery.find(folder, INFARCT, patients=names), plan(**options)).fingerprint

    base = fingerprint()
    assert fingerprint(settings={"workers": 3, "label_rule": "posterior"}, max_voxels=1 << 20) == base
    moved = Path(shutil.copytree(patients, tmp_path / "moved"))
    assert fingerprint(moved) == base
    changed = {"lr": 2e-3, "grid_mm": 1.2, "augment": False, "covariance": "diag", "tol": 0.1, "validation": 0.2}
    changed |= {"drop": 0.1, "start_weight": 0.3, "teacher": "signature", "temper": 0.9}
    others = [fingerprint(settings={k: v}) for k, v in changed.items()]
    others += [fingerprint(**o) for o in ({"seed": 1}, {"epochs": 9}, {"method": "deepg"}, {"network": "basicunet"})]
    others += [fingerprint(means="cohort"), fingerprint(names=("pat2",))]
    shutil.copy(moved / "pat1_T2.nii.gz", moved / "pat2_T2.nii.gz")
    others.append(fingerprint(moved))
    assert len({base, *others}) == 1 + len(others)


def test_means_come_from_a_file_from_the_cohort_or_from_nowhere(found, patients, tmp_path):
    none, own = prepare_cohort(found, plan()), prepare_cohort(found, plan(means="cohort"))
    assert none.means_source == "none"
    assert none.means.isnan().all()
    assert own.means_source == "cohort"
    assert torch.equal(own.means, dataset.cohort_means(loaded(patients), INFARCT))
    file = tmp_path / "means.json"
    assert main(["means", str(patients), "-o", str(file)]) == 0
    known = prepare_cohort(found, plan(means=file))
    assert known.means_source == "file"
    raw = json.loads(file.read_text())
    assert known.means[3, 1] == raw["means"]["scar"]["T2"]
    del raw["means"]["scar"]["T2"]
    file.write_text(json.dumps(raw))
    with pytest.raises(UsageError, match="no value for 'T2'"):
        prepare_cohort(found, plan(means=file))


class Pick(nn.Module):
    """A network whose outputs are its first channels in another order."""

    def __init__(self, order: list[int]) -> None:
        super().__init__()
        self.order = order

    def forward(self, image):
        return image[:, self.order]


@pytest.mark.parametrize(("order", "wanted"), [([0, 1, 2], [True] * 3), ([0, 2, 1], [True, False, False])])
def test_agreement_tells_the_outputs_that_lie_elsewhere(order, wanted):
    generator, mask = torch.Generator().manual_seed(0), torch.ones(1, 16, 16)
    mask[:, :4] = 0
    logits = [3 * torch.randn((3, 16, 16), generator=generator) for _ in range(3)]
    data = [{"image": torch.cat([one, mask]), "mask": mask, "expected": one.softmax(0) * mask} for one in logits]
    prepared = PreparedCohort(data, data, None, torch.zeros(3, 1), "none", 1, (1, 0), {}, "")
    assert agreement(Pick(order), prepared, device="cpu") == wanted


def test_broken_patients_are_left_out_with_the_reason(patients, tmp_path, capsys):
    folder = Path(shutil.copytree(patients, tmp_path / "in"))
    (folder / "pat1_LGE.nii.gz").write_bytes(b"")
    (folder / "pat2_T2.nii.gz").unlink()
    assert train(folder, tmp_path / "model", "--epochs", "1", "--set", "drop=0") == 1
    said = capsys.readouterr().err
    assert "pat1 was not used: E_EMPTY" in said
    assert "pat2 was not used: E_MODEL" in said
    told = json.loads((tmp_path / "model" / "provenance.json").read_text())
    assert {who: why["code"] for who, why in told["not_used"].items()} == {"pat1": "E_EMPTY", "pat2": "E_MODEL"}
    assert "T2" in told["not_used"]["pat2"]["message"]
    assert told["patients"] == {"trained_on": 3, "validation": 0}
    assert told["images"] == {"trained_on": 6, "validation": 0}


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["{tmp}/gone", "{tmp}/model"], "there is no folder gone"),
        (["{tmp}/empty", "{tmp}/model"], "no patient found"),
        (["{tmp}/maskless", "{tmp}/model", "--mask", "file"], "no patient can be trained on (pat1:"),
        (["{in}", "{in}"], "inside the input folder"),
        (["{in}", "{in}/model"], "inside the input folder"),
        (["{in}", "{tmp}/file"], "is a file"),
        (["{in}", "{tmp}/full"], "is not empty"),
        (["{in}", "{tmp}/file/model"], "check the path"),
        (["{in}", "{tmp}/model", "--device", "warp"], "--device warp: cannot be used here"),
        (["{in}", "{tmp}/model", "--device", "cuda:99"], "--device cuda:99: cannot be used here"),
        (["{in}", "{tmp}/model", "--set", "mlflow=true"], "mlflow: got True, expected a tracking URI"),
        (["{in}", "{tmp}/model", "--patients", "pat9"], "pat9"),
        (["{in}", "{tmp}/model", "--set", "speed=1"], "no such setting"),
        (["{in}", "{tmp}/model", "--set", "validation=2"], "validation"),
        (["{in}", "{tmp}/model", "--means", "{tmp}/gone.json"], "gone.json"),
        (["{in}", "{tmp}/model", "--method", "deepg", "--loss", "nll_v"], "--loss nll_v"),
        (["{in}", "{tmp}/model", "--method", "svgmm"], "deepg"),
        (["{in}", "{tmp}/model", "--epochs", "0"], "at least 1"),
        (["{in}", "{tmp}/model", "--labels", "somebody"], "--labels somebody: there is no such patient"),
        (["{in}", "{tmp}/model", "--network", "torch.nn.Identity", "--trust-code"], "no weights to train"),
        (
            ["{in}", "{tmp}/model", "--network", "{_target_: dynunet, filters: [4,4,4,4,4], deep_supervision: true}"],
            "of shape (2, 2, 4, 64, 64), expected",
        ),
        (
            ["{in}", "{tmp}/model", "--trust-code", "--network", "{_target_: torch.nn.Conv2d, kernel_size: 3}"],
            "gives an output of shape (2, 4, 62, 62), expected (2, 4, 64, 64)",
        ),
    ],
)  # fmt: skip
def test_what_cannot_start_touches_nothing(patients, tmp_path, make_patient, capsys, options, said):
    (tmp_path / "empty").mkdir()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").write_text("mine")
    (tmp_path / "file").write_text("mine")
    make_patient(tmp_path / "maskless", "pat1")["gd"].unlink()
    before = contents(tmp_path), contents(patients)
    filled = [o.replace("{in}", str(patients)).replace("{tmp}", str(tmp_path)) for o in options]
    try:
        code = main(["train", "--network", TINY, *filled])
    except SystemExit as stopped:  # argparse's own
        code = stopped.code
    assert code == 2
    printed = capsys.readouterr().err
    assert said in printed
    assert "Traceback" not in printed
    assert (contents(tmp_path), contents(patients)) == before
    assert not (tmp_path / "model").exists()


@pytest.mark.parametrize("lr", ["1e9", "1e30"])
def test_a_training_that_diverges_says_so(patients, tmp_path, capsys, lr):
    assert train(patients, tmp_path / "model", "--set", f"lr={lr}") == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "the training diverged in epoch" in line
    assert "--set lr=" in line
    assert not (tmp_path / "model" / "provenance.json").exists()


@pytest.mark.parametrize("loss", ["gmm", "gmm_tv", "gmm_bias"])
def test_mas_losses_train(patients, tmp_path, loss):
    out = tmp_path / "model"
    assert train(patients, out, "--loss", loss, "--epochs", "2", "--set", "start_epochs=1") == 0
    assert all(np.isfinite(row["loss"]) for row in read_history(out / HISTORY))
    assert json.loads((out / "provenance.json").read_text())["plan"]["training"]["loss"] == loss
    told = model_spec.read(out, INFARCT).spec.training
    assert (told.loss, told.label_rule) == (loss, "network")
    raw = json.loads((out / "configs" / "train.json").read_text())
    assert plan(method=raw["method"], loss=raw["loss"], settings=raw["set"]).training == told


def test_the_curves_hold_a_row_for_every_epoch(trained):
    head, *lines = (trained / HISTORY).read_text().splitlines()
    assert head == "epoch\tloss\tvalidation_loss\tlr"
    rows = read_history(trained / HISTORY)
    assert len(lines) == len(rows) == EPOCHS
    assert [row["epoch"] for row in rows] == [1, 2, 3]
    expected = [1e-3 * (1 - e / EPOCHS) ** 0.9 for e in range(EPOCHS)]
    np.testing.assert_allclose([row["lr"] for row in rows], expected, rtol=1e-5)
    assert rows[-1]["validation_loss"] < rows[0]["validation_loss"]
    told = json.loads((trained / "provenance.json").read_text())
    best = min(rows, key=lambda row: row["validation_loss"])
    assert (told["epochs"], told["best_epoch"]) == (EPOCHS, best["epoch"])
    assert told["validation_loss"] == best["validation_loss"]
    svg = (trained / "training.svg").read_text()
    assert svg == curves(rows).decode()
    assert svg.count("<polyline") == 2


def test_the_validation_loss_is_that_of_the_held_out_patients(found, trained):
    prepared = prepare_cohort(found, plan(network=TINY, epochs=EPOCHS, settings={"batch_size": 2}))
    network = trained_network.build(prepared.spec).eval()
    network.load_state_dict(read_checkpoint(trained / CHECKPOINT)["network"])
    loss, values = Staged(MixtureNLL(spatial=True, covariance="tied"), start_weight=3.0), []
    for example in prepared.validation:
        image, target = dataset.prepare_batch({k: v[None] for k, v in example.items()}, "cpu")
        with torch.no_grad():
            values.append(float(loss(network(image), target)))
    assert len(values) == 2
    assert read_history(trained / HISTORY)[-1]["validation_loss"] == pytest.approx(np.mean(values), rel=1e-5)


def test_a_training_stops_when_nothing_is_gained(patients, tmp_path):
    out, stop = tmp_path / "model", ["--epochs", "6", "--set", "tol=1000", "patience=2"]
    assert train(patients, out, *stop) == 0
    assert len(read_history(out / HISTORY)) == 3  # one to compare with, and two in which next to nothing was gained
    assert read_checkpoint(out / CHECKPOINT)["stopped"] is True
    before = contents(out)
    assert train(patients, out, *stop, "--resume") == 0
    assert contents(out) == before


def test_known_means_pull_the_mixtures_means(found, patients, tmp_path):
    """The same three epochs with a heavy ‖μ − μ_data‖² end with a smaller one."""
    distance, prepared = {}, prepare_cohort(found, plan(network=TINY, means="cohort"))
    batch = {k: torch.stack([e[k] for e in prepared.train]) for k in prepared.train[0]}
    image, target = dataset.prepare_batch(batch, "cpu")
    for weight in (0, 100):
        out = tmp_path / f"weight{weight}"
        settings = [f"mean_weight={weight}", "lr=0.03", "augment=false", "start_weight=0"]
        assert train(patients, out, "--means", "cohort", "--set", *settings) == 0
        with torch.no_grad():
            resp = trained_network.load(model_spec.read(out, INFARCT), "cpu")(image).softmax(1)
            mixture = MixtureNLL().mixture(target[:, :3], resp, target[:, 3:4])
            distance[weight] = float(MeanPrior(prepared.means)(mixture, resp, target[:, :3], target[:, 3:4]))
        told = json.loads((out / "provenance.json").read_text())["means"]
        assert told["source"] == "cohort"
        np.testing.assert_allclose(told["values"], prepared.means.numpy())
    assert distance[100] < distance[0]
