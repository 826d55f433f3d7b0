"""Training over a cohort: what is refused, what is held out, when it stops, and that stopping it changes nothing."""

from __future__ import annotations

import dataclasses
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
import torch
from ignite.engine import Engine, Events
from torch import nn

from monai_deepgmm import protocol
from monai_deepgmm.cli import main
from monai_deepgmm.errors import StudyError, UsageError
from monai_deepgmm.images import atomic_files as files
from monai_deepgmm.methods import trained_network as model
from monai_deepgmm.networks import model_spec as spec
from monai_deepgmm.networks.gmm_loss import GMMLoss, TotalLoss
from monai_deepgmm.networks.model_spec import WEIGHTS
from monai_deepgmm.networks.nll_loss import MeanPrior, MixtureNLL, Staged
from monai_deepgmm.patients import discovery as cohort
from monai_deepgmm.training import dataset as examples
from monai_deepgmm.training import handlers
from monai_deepgmm.training import prepare as training
from monai_deepgmm.training.bundle import curves
from monai_deepgmm.training.dataset import Examples
from monai_deepgmm.training.handlers import CHECKPOINT, HISTORY, Checkpoint, Clip, Epochs, read_checkpoint, read_history
from monai_deepgmm.training.prepare import ALPHA, BETA, GAMMA, Settings, plan, prepare

INFARCT = protocol.load("infarct")
TINY = "{_target_: monai_deepgmm.networks.UNet, filters: [4, 8]}"
#: Five patients with two slices each, one of them held out: four steps in each of three epochs.
EPOCHS, STEPS = 3, 4
OPTIONS = ["--network", TINY, "--epochs", str(EPOCHS), "--set", "batch_size=2", "-q"]


def train(folder: Path, out: Path, *more: str) -> int:
    return main(["train", str(folder), str(out), *OPTIONS, *more])


@pytest.fixture(scope="module")
def patients(tmp_path_factory, make_patient) -> Path:
    folder = tmp_path_factory.mktemp("training") / "patients"
    for number in range(1, 6):
        make_patient(folder, f"pat{number}", seed=number)
    return folder


@pytest.fixture(scope="module")
def trained(patients, tmp_path_factory) -> Path:
    """A training that nothing interrupted."""
    out = tmp_path_factory.mktemp("trained") / "model"
    assert train(patients, out) == 0
    return out


@pytest.fixture
def found(patients):
    return cohort.find(patients, INFARCT)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def equal(a: object, b: object) -> bool:
    """Whether two nested states hold the same, bit by bit."""
    if isinstance(a, dict):
        return isinstance(b, dict) and list(a) == list(b) and all(equal(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(equal, a, b))
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


def same_training(folder: Path, reference: Path) -> None:
    ours, theirs = contents(folder), contents(reference)
    name = str(CHECKPOINT)
    assert equal(read_checkpoint(folder / CHECKPOINT), read_checkpoint(reference / CHECKPOINT))
    assert set(ours) == set(theirs)
    assert [k for k in ours if ours[k] != theirs[k] and k != name] == []


# Plans --------------------------------------------------------------------------------------------------------------


def test_the_loss_and_the_method_name_each_other():
    assert plan().method == "deepsvg"
    assert plan(loss="nll").method == "deepg"
    assert plan(loss="nll_v").method == "deepsvg"
    assert plan(method="deepg").spatial is False
    assert plan(method="deepsvg", loss="nll_v").spatial is True
    assert plan().covariance == "tied"
    assert plan(settings={"covariance": "diag"}).covariance == "diag"
    asked = plan(settings=["lr=1e-4", "augment=false", "labels=posterior", "teacher=signature"]).settings
    assert asked == Settings(
        lr=1e-4, augment=False, labels="posterior", teacher="signature", start_weight=0.3, drop=0.0
    )


def test_mas_losses_have_one_weight_per_image_and_their_own_settings():
    for loss, gamma, degree in (("gmm", 0.0, None), ("gmm_tv", GAMMA["gmm_tv"], None), ("gmm_bias", 0.0, 1)):
        asked = plan(loss=loss)
        assert (asked.method, asked.loss, asked.spatial, asked.covariance) == ("deepg", loss, False, "full")
        assert (asked.settings.gamma, asked.settings.degree, asked.settings.labels) == (gamma, degree, "network")
        assert asked.shaded == (loss == "gmm_bias")
        assert plan(method="deepg", loss=loss) == asked
    assert plan(loss="gmm_bias", protocol="brain").settings.degree == 3
    assert plan(loss="gmm_bias", settings={"degree": 2, "gamma": 0.5}).settings.degree == 2
    bare = plan().settings
    assert [bare.gamma, bare.degree, bare.alpha, bare.beta] == [None] * 4


def test_with_labels_the_loss_is_the_papers_unless_another_is_named():
    asked = plan(labels="1/4")
    assert (asked.method, asked.loss, asked.labels) == ("deepg", "gmm_tv", ("1/4",))
    assert (asked.settings.alpha, asked.settings.beta) == (ALPHA, BETA)
    assert plan(labels="all", method="deepsvg").loss == "nll_v"
    assert plan(labels=["a", "b"], loss="gmm_bias", settings={"beta": 0}).settings.beta == 0


def test_the_loss_is_the_plans():
    terms = [(0.5, MeanPrior(torch.zeros(4, 3)))]
    for loss, kind, gamma, degree in (
        ("nll", MixtureNLL, 0, 0),
        ("gmm_tv", GMMLoss, 0.7, 0),
        ("gmm_bias", GMMLoss, 0.7, 2),
    ):
        settings = {k: v for k, v in (("gamma", gamma), ("degree", degree)) if v}
        made = training.mixture_loss(plan(loss=loss, settings=settings), terms=terms)
        assert type(made) is kind
        assert [t.weight for t in made.terms] == [0.5]
        assert (getattr(made, "gamma", 0), getattr(made, "degree", 0)) == (gamma, degree)
        staged = Staged(made)
        assert training.whole_loss(staged, plan(loss=loss, settings=settings)) is staged
    few = plan(labels="all", settings={"alpha": 2.0, "beta": 0.25})
    total = training.whole_loss(staged, few)
    assert isinstance(total, TotalLoss)
    assert (total.loss, total.alpha, total.beta) == (staged, 2.0, 0.25)


def test_the_teacher_begins_alone_with_mas_losses(found):
    assert prepare(found, plan(loss="gmm_tv", network=TINY, epochs=9)).start_epochs == 3
    assert prepare(found, plan(loss="gmm_tv", network=TINY, epochs=9, settings={"start_epochs": 0})).start_epochs == 0
    assert prepare(found, plan(network=TINY, epochs=9)).start_epochs == 0


@pytest.mark.parametrize("loss", ["gmm", "gmm_tv", "gmm_bias"])
def test_mas_losses_train(patients, tmp_path, loss):
    out = tmp_path / "model"
    assert train(patients, out, "--loss", loss, "--set", "start_epochs=1") == 0
    assert all(np.isfinite(row["loss"]) for row in read_history(out / HISTORY))
    content = json.loads((out / "provenance.json").read_text())
    assert content["plan"]["loss"] == loss
    assert spec.read(out, INFARCT).spec.labels == "network"


def test_labels_are_validated_where_they_are_many_and_all_are_watched_where_they_are_few(found):
    def asked(labels):
        return prepare(found, plan(labels=labels, network=TINY, settings={"validation": 0.2}))

    everyone, one = asked("all"), asked(["pat1"])
    assert everyone.patients == (4, 1)
    assert all((e["labels"] > 0).any() for e in everyone.validation)
    assert one.patients == (5, 0)
    assert one.labelled == ("pat1",)


def test_the_teacher_is_the_anatomy_where_there_is_one_and_no_means(patients, tmp_path):
    def resolved(*settings: str, **options) -> tuple:
        asked = plan(settings=settings, **options).settings
        return asked.teacher, asked.start_weight, asked.drop, asked.labels

    by_anatomy, by_signature = ("anatomy", 3.0, 0.25, "both"), ("signature", 0.3, 0.0, "posterior")
    assert resolved() == by_anatomy
    assert resolved(protocol="brain") == by_signature
    assert resolved(means="cohort") == by_signature
    assert resolved("teacher=signature") == by_signature
    assert resolved("teacher=anatomy", means="cohort") == by_anatomy
    file = tmp_path / "means.json"
    assert main(["means", str(patients), "-o", str(file)]) == 0
    assert resolved(means=file) == by_signature
    asked = ("teacher=anatomy", "start_weight=0", "drop=0", "labels=posterior")
    assert resolved(*asked) == ("anatomy", 0, 0, "posterior")  # 0 is no None


def test_a_protocol_without_anatomy_has_no_such_teacher():
    with pytest.raises(UsageError, match="teacher=anatomy: protocol brain does not say where tissues can be"):
        plan(protocol="brain", settings={"teacher": "anatomy"})


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"loss": "dice"}, "choose one of nll, nll_v"),
        ({"method": "gmm"}, "trains no network; choose one of deepg, deepsvg"),
        ({"method": "deepg", "loss": "nll_v"}, "is not a loss of --method deepg, which has nll, gmm"),
        ({"epochs": 0}, "--epochs: got 0, expected at least 1"),
        ({"seed": -1}, "--seed: got -1"),
        ({"seed": 1 << 63}, "--seed"),
        ({"protocol": "liver"}, "brain, infarct"),
        ({"means": "gone.json"}, "gone.json"),
        ({"network": "gone.json"}, "gone.json"),
        ({"network": "{filters: [1]}"}, "_target_"),
        ({"settings": ["lr"]}, "expected key=value"),
        ({"settings": ["speed=3"]}, "no such setting; choose from covariance, batch_size, lr"),
        ({"settings": {"batch_size": 0}}, "batch_size: got 0, expected a whole number of at least 1"),
        ({"settings": {"batch_size": 1.5}}, "batch_size: got 1.5"),
        ({"settings": {"workers": -1}}, "workers: got -1"),
        ({"settings": {"patience": 0}}, "patience: got 0"),
        ({"settings": {"lr": "fast"}}, "lr: got 'fast', expected a number of at least 0"),
        ({"settings": {"lr": float("nan")}}, "lr: got nan"),
        ({"settings": {"tol": float("inf")}}, "tol: got inf"),
        ({"settings": {"clip": True}}, "clip: got True"),
        ({"settings": {"validation": 1}}, "validation must be below 1"),
        ({"settings": {"grid_mm": 0}}, "grid_mm from 0.01 to 100"),
        ({"settings": {"covariance": "round"}}, "choose one of None, diag, full, tied, spherical"),
        ({"settings": {"mean_over": "epoch"}}, "choose one of image, batch"),
        ({"settings": {"labels": "guess"}}, "choose one of None, posterior, network"),
        ({"settings": {"teacher": "me"}}, "teacher: 'me' is unknown; choose one of None, signature, anatomy"),
        ({"settings": {"drop": -0.5}}, "drop: got -0.5, expected a number of at least 0"),
        ({"settings": {"drop": "often"}}, "drop: got 'often'"),
        ({"settings": {"gamma": 1}}, "gamma: goes with --loss gmm_tv or gmm_bias"),
        ({"loss": "gmm", "settings": {"gamma": 1}}, "gamma: goes with"),
        ({"loss": "gmm_tv", "settings": {"degree": 2}}, "degree: goes with --loss gmm_bias"),
        ({"loss": "gmm_bias", "settings": {"degree": 0}}, "degree: got 0"),
        ({"settings": {"beta": 1}}, "beta: goes with --labels"),
        ({"labels": "5/4"}, "--labels 5/4"),
        ({"loss": "gmm_bias", "means": "cohort"}, "another scale"),
        ({"settings": {"augment": "much"}}, "choose one of True, False"),
    ],
)
def test_plans_that_make_no_sense_are_refused(options, said):
    with pytest.raises(UsageError) as refused:
        plan(**options)
    assert said in str(refused.value)


@pytest.mark.parametrize("package", ["tensorboard", "mlflow"])
def test_tracking_says_what_to_install(monkeypatch, package):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UsageError, match=rf"{package}.*pip install 'monai-deepgmm\[tracking\]'"):
        plan(settings={package: "sqlite:///x" if package == "mlflow" else True})


def test_a_plan_tells_no_password(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: True)

    def told(uri: str | None) -> str:
        return plan(settings={"mlflow": uri}).as_json()["settings"]["mlflow"]

    assert told("https://me:se/cr@t@host.org:5000/a") == "https://***@host.org:5000/a"
    assert [told(uri) for uri in ("https://host.org", "sqlite:///runs.db", None)] == [
        "https://host.org",
        "sqlite:///runs.db",
        None,
    ]


# The prepared cohort ------------------------------------------------------------------------------------------------


def owners(prepared, found) -> tuple[list[str], list[str]]:
    """The patient that each example for training, and for validation, is of."""
    loaded, _ = examples.load(found.studies, INFARCT, frame=None, max_voxels=1 << 28)
    made = examples.make(loaded, INFARCT, grid_mm=1.0, teacher=prepared.spec.teacher)

    def owner(example) -> str:
        return next(who for who, own in made.items() if any(equal(example, e) for e in own))

    return [owner(e) for e in prepared.train], [owner(e) for e in prepared.validation]


def test_validation_is_split_by_patients_with_the_seed(found):
    held = set()
    for seed in range(4):
        asked = plan(settings={"validation": 0.4}, seed=seed)
        prepared = prepare(found, asked)
        ours, theirs = owners(prepared, found)
        assert sorted(ours + theirs) == [f"pat{n}" for n in range(1, 6) for _ in range(2)]
        assert not set(ours) & set(theirs)
        assert prepared.patients == (3, 2)
        again = prepare(found, asked)
        assert equal(again.train, prepared.train)
        assert equal(again.validation, prepared.validation)
        held.add(frozenset(theirs))
    assert len(held) > 1


def test_one_of_five_patients_is_held_out_and_none_of_four(found):
    assert prepare(found, plan()).patients == (4, 1)
    for fewer, asked in ((found.studies[:4], plan()), (found.studies, plan(settings={"validation": 0}))):
        prepared = prepare(dataclasses.replace(found, studies=fewer), asked)
        assert prepared.patients == (len(fewer), 0)
        assert prepared.validation is prepared.train


def test_the_network_is_specified_by_the_cohort_and_the_plan(found):
    prepared = prepare(found, plan(method="deepg", network=TINY, settings={"grid_mm": 1.5}))
    taught = spec.Spec(
        protocol="infarct",
        normalisation=INFARCT.normalisation,
        sequences=("LGE", "T2", "bSSFP"),
        tissues=("blood", "myocardium", "edema", "scar"),
        network={"_target_": "monai_deepgmm.networks.UNet", "filters": [4, 8]},
        spatial_dims=2,
        grid_mm=1.5,
        size=(64, 64),  # 31 pixels of 1.5 mm and a margin of 4 mm
        spatial=False,
        covariance="tied",
        labels="both",
        teacher="anatomy",
        incomplete=True,
    )
    assert prepared.spec == taught
    asked = plan(method="deepg", network=TINY, settings={"grid_mm": 1.5, "teacher": "signature"})
    of_the_paper = {"labels": "posterior", "teacher": "signature", "incomplete": False}
    assert prepare(found, asked).spec == dataclasses.replace(taught, **of_the_paper)
    asked = plan(method="deepg", network=TINY, settings={"grid_mm": 1.5, "drop": 0})
    assert prepare(found, asked).spec == dataclasses.replace(taught, incomplete=False)


@pytest.mark.parametrize(("asked", "batch", "epochs"), [(None, 4, 100), (None, 1, 40), (7, 4, 7)])
def test_epochs_are_those_of_320_steps_within_bounds(found, asked, batch, epochs):
    assert prepare(found, plan(epochs=asked, settings={"batch_size": batch})).epochs == epochs


def test_the_fingerprint_tells_what_can_change_a_weight(found, patients, tmp_path):
    def fingerprint(cohort=found, **options):
        return prepare(cohort, plan(**options)).fingerprint

    base = fingerprint()
    assert fingerprint() == base
    assert fingerprint(settings={"workers": 3, "labels": "posterior"}) == base
    moved = Path(shutil.copytree(patients, tmp_path / "moved"))
    assert fingerprint(cohort.find(moved, INFARCT)) == base
    changed = {"lr": 2e-3, "grid_mm": 1.2, "augment": False, "covariance": "diag", "tol": 0.1, "validation": 0.2}
    changed |= {"drop": 0.1, "start_weight": 0.3, "teacher": "signature"}
    others = [fingerprint(settings={k: v}) for k, v in changed.items()]
    others += [fingerprint(**o) for o in ({"seed": 1}, {"epochs": 9}, {"method": "deepg"}, {"network": "basicunet"})]
    others += [fingerprint(means="cohort"), fingerprint(dataclasses.replace(found, studies=found.studies[1:]))]
    shutil.copy(moved / "pat1_T2.nii.gz", moved / "pat2_T2.nii.gz")
    others.append(fingerprint(cohort.find(moved, INFARCT)))
    assert len({base, *others}) == 1 + len(others)


def test_means_come_from_a_file_from_the_cohort_or_from_nowhere(found, patients, tmp_path):
    none = prepare(found, plan())
    assert none.means_source == "none"
    assert none.means.isnan().all()
    loaded, _ = examples.load(found.studies, INFARCT, frame=None, max_voxels=1 << 28)
    own = prepare(found, plan(means="cohort"))
    assert own.means_source == "cohort"
    assert torch.equal(own.means, examples.cohort_means(loaded, INFARCT))
    file = tmp_path / "means.json"
    assert main(["means", str(patients), "-o", str(file)]) == 0
    known = prepare(found, plan(means=file))
    assert known.means_source == "file"
    raw = json.loads(file.read_text())
    assert known.means[3, 1] == raw["means"]["scar"]["T2"]
    del raw["means"]["scar"]["T2"]
    file.write_text(json.dumps(raw))
    with pytest.raises(UsageError, match="no value for 'T2'"):
        prepare(found, plan(means=file))


# Refusals and failures -----------------------------------------------------------------------------------------------


def test_broken_patients_are_left_out_with_the_reason(patients, tmp_path, capsys):
    folder = Path(shutil.copytree(patients, tmp_path / "in"))
    (folder / "pat1_LGE.nii.gz").write_bytes(b"")
    (folder / "pat2_T2.nii.gz").unlink()
    out = tmp_path / "model"
    assert train(folder, out, "--epochs", "1", "--set", "drop=0") == 1
    said = capsys.readouterr().err
    assert "pat1 was not used: E_EMPTY" in said
    assert "pat2 was not used: E_MODEL" in said
    provenance = json.loads((out / "provenance.json").read_text())
    assert {who: why["code"] for who, why in provenance["not_used"].items()} == {"pat1": "E_EMPTY", "pat2": "E_MODEL"}
    assert "T2" in provenance["not_used"]["pat2"]["message"]
    assert provenance["patients"] == {"trained_on": 3, "validation": 0}
    assert provenance["images"] == {"trained_on": 6, "validation": 0}


def test_a_cohort_without_a_usable_patient_is_refused_and_nothing_touched(tmp_path, make_patient, capsys):
    make_patient(tmp_path / "in", "pat")["gd"].unlink()
    assert train(tmp_path / "in", tmp_path / "model") == 2
    assert "no patient can be trained on (pat:" in capsys.readouterr().err
    assert not (tmp_path / "model").exists()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["{tmp}/gone", "{tmp}/model"], "there is no folder gone"),
        (["{tmp}/empty", "{tmp}/model"], "no patient found"),
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
    ],
)
def test_what_cannot_start_touches_nothing(patients, tmp_path, capsys, options, said):
    (tmp_path / "empty").mkdir()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").write_text("mine")
    (tmp_path / "file").write_text("mine")
    before = contents(tmp_path), contents(patients)
    filled = [o.replace("{in}", str(patients)).replace("{tmp}", str(tmp_path)) for o in options]
    try:
        code = main(["train", *filled, "--network", TINY])
    except SystemExit as stopped:  # argparse's own
        code = stopped.code
    assert code == 2
    printed = capsys.readouterr().err
    assert said in printed
    assert "Traceback" not in printed
    assert (contents(tmp_path), contents(patients)) == before
    assert not (tmp_path / "model").exists()


@pytest.mark.parametrize(
    ("network", "said"),
    [
        ("nonsense", "is no network; name one of unet, basicunet, dynunet, segresnet"),
        ("os.system", "is no network"),
        ("{_target_: monai_deepgmm.networks.UNet, spam: 3}", "unexpected keyword argument 'spam'"),
        (
            "{_target_: dynunet, filters: [4, 4, 4, 4, 4], deep_supervision: true}",
            "of shape (2, 2, 4, 64, 64), expected",
        ),
        (
            "{_target_: torch.nn.Conv2d, kernel_size: 3}",
            "gives an output of shape (2, 4, 62, 62), expected (2, 4, 64, 64)",
        ),
        ("torch.nn.Identity", "no weights to train"),
    ],
)
def test_networks_that_cannot_be_made_are_refused(patients, tmp_path, capsys, network, said):
    assert main(["train", str(patients), str(tmp_path / "model"), "--network", network, "-q"]) == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "model").exists()


def test_a_full_disk_stops_a_training_that_then_goes_on(patients, trained, tmp_path, monkeypatch, capsys):
    whole = files.write_whole

    def write(path: Path, data: bytes) -> None:
        if path.name == "checkpoint.pt" and (path.parent.parent / HISTORY).is_file():
            raise StudyError("E_DISK", f"{path.name}: the disk is full", "Free some space")
        whole(path, data)

    monkeypatch.setattr(files, "write_whole", write)
    assert train(patients, tmp_path / "model") == 4
    assert "E_DISK: checkpoint.pt" in capsys.readouterr().err
    monkeypatch.undo()
    assert train(patients, tmp_path / "model", "--resume") == 0
    same_training(tmp_path / "model", trained)


@pytest.mark.parametrize("lr", ["1e9", "1e30"])
def test_a_training_that_diverges_says_so(patients, tmp_path, capsys, lr):
    assert train(patients, tmp_path / "model", "--set", f"lr={lr}") == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "the training diverged in epoch" in line
    assert "--set lr=" in line
    assert not (tmp_path / "model" / "provenance.json").exists()


def test_a_model_is_not_trained_over(patients, trained, capsys):
    before = contents(trained)
    assert train(patients, trained) == 2
    assert "--resume" in capsys.readouterr().err
    assert contents(trained) == before


@pytest.mark.parametrize("resume", [[], ["--resume"]])
def test_a_finished_model_without_its_checkpoint_is_not_trained_over(patients, trained, tmp_path, capsys, resume):
    out = Path(shutil.copytree(trained, tmp_path / "model"))
    (out / CHECKPOINT).unlink()
    before = contents(out)
    assert train(patients, out, *resume) == 2
    assert "holds a finished model; without checkpoint.pt" in capsys.readouterr().err
    assert contents(out) == before


def test_weights_are_not_trained_over_unless_asked(patients, trained, tmp_path, capsys):
    """They are all that a training leaves that was killed before its first checkpoint."""
    out = Path(shutil.copytree(trained, tmp_path / "model"))
    (out / CHECKPOINT).unlink()
    (out / "provenance.json").unlink()
    before = contents(out)
    assert train(patients, out) == 2
    assert "go on with --resume" in capsys.readouterr().err
    assert contents(out) == before
    assert train(patients, out, "--resume") == 0
    same_training(out, trained)


def test_what_a_killed_training_leaves_before_its_first_file_is_no_content(patients, trained, tmp_path, capsys):
    out = tmp_path / "model"
    (out / "models").mkdir(parents=True)
    (out / "configs").mkdir()
    for place in (out, out / "models"):
        (place / ".deepgmm-1-ab.part").write_bytes(b"half")
    (out / "configs" / "mine").write_text("mine")
    assert train(patients, out) == 2
    assert "is not empty" in capsys.readouterr().err
    (out / "configs" / "mine").unlink()
    assert train(patients, out) == 0
    same_training(out, trained)  # so nothing is left of the halves


@pytest.mark.parametrize(
    "change", [["--seed", "1"], ["--epochs", "5"], ["--patients", "pat1", "pat2"], ["--means", "cohort"]]
)
def test_other_options_do_not_resume(patients, trained, tmp_path, capsys, change):
    out = Path(shutil.copytree(trained, tmp_path / "model"))
    assert train(patients, out, "--resume", *change) == 2
    assert "began with other patients, files or options" in capsys.readouterr().err
    assert contents(out) == contents(trained)


def test_a_checkpoint_is_read_without_running_what_it_holds(patients, trained, tmp_path, capsys):
    class Bomb:
        def __reduce__(self):
            return os.system, (f"touch '{tmp_path / 'went off'}'",)

    out = Path(shutil.copytree(trained, tmp_path / "model"))
    torch.save({**read_checkpoint(trained / CHECKPOINT), "bomb": Bomb()}, out / CHECKPOINT)
    assert train(patients, out, "--resume") == 2
    assert "checkpoint.pt cannot be read" in capsys.readouterr().err
    assert not (tmp_path / "went off").exists()
    torch.load(out / CHECKPOINT, weights_only=False)
    assert (tmp_path / "went off").exists()  # it was a bomb


@pytest.mark.parametrize("name", [CHECKPOINT, WEIGHTS])
@pytest.mark.parametrize("kind", ["torn", "empty", "gone", "another"])
def test_damaged_files_do_not_resume(patients, trained, tmp_path, capsys, name, kind):
    out = Path(shutil.copytree(trained, tmp_path / "model"))
    if kind == "torn":
        (out / name).write_bytes((trained / name).read_bytes()[:999])
    elif kind == "empty":
        (out / name).write_bytes(b"")
    elif kind == "gone":
        (out / name).unlink()
    elif name == CHECKPOINT:
        torch.save({"network": {}, "fingerprint": 3}, out / name)
    else:
        torch.save([1], out / name)
    before = contents(out)
    assert train(patients, out, "--resume") == 2
    said = "without checkpoint.pt" if (name, kind) == (CHECKPOINT, "gone") else f"{name.name} cannot be read ("
    assert said in capsys.readouterr().err
    assert contents(out) == before


def test_a_table_that_is_gone_comes_back(patients, trained, tmp_path):
    out = Path(shutil.copytree(trained, tmp_path / "model"))
    (out / HISTORY).unlink()
    assert train(patients, out, "--resume") == 0
    same_training(out, trained)


# Going on ------------------------------------------------------------------------------------------------------------


def test_the_same_command_makes_the_same_files(patients, trained, tmp_path):
    assert train(patients, tmp_path / "model") == 0
    same_training(tmp_path / "model", trained)


@pytest.mark.parametrize("seed", range(6))
def test_interrupted_anywhere_and_resumed_is_never_interrupted(patients, trained, tmp_path, monkeypatch, seed):
    step = random.Random(seed).randrange(EPOCHS * STEPS)
    _interrupt_at(monkeypatch, step)
    out = tmp_path / "model"
    assert train(patients, out) == 130
    monkeypatch.undo()
    assert (out / CHECKPOINT).is_file() == (step >= STEPS)
    if step >= STEPS:
        assert read_checkpoint(out / CHECKPOINT)["epoch"] == step // STEPS
        torch.load(out / WEIGHTS, weights_only=True)
        assert len(read_history(out / HISTORY)) == step // STEPS
    assert not (out / "provenance.json").exists()
    assert train(patients, out, "--resume") == 0
    same_training(out, trained)


def _interrupt_at(monkeypatch, *steps: int) -> None:
    """Ctrl-C in the middle of these gradient steps, counted over all trainings to come."""
    count, clip = iter(range(1 << 30)), Clip.__call__

    def call(self, engine):
        if next(count) in steps:
            raise KeyboardInterrupt
        clip(self, engine)

    monkeypatch.setattr(Clip, "__call__", call)


def test_interrupted_again_and_again(patients, trained, tmp_path, monkeypatch):
    draw = random.Random(9)
    out, codes = tmp_path / "model", []
    while len(codes) < 20 and codes[-1:] != [0]:
        with monkeypatch.context() as patched:
            _interrupt_at(patched, draw.randrange(STEPS, 2 * STEPS))  # at least one epoch is whole each time
            codes.append(train(patients, out, "--resume"))
    assert codes == [130, 130, 0]
    same_training(out, trained)


@pytest.mark.parametrize(
    ("name", "which"),
    [("model.pt", 0), ("model.pt", 1), ("checkpoint.pt", 0), ("checkpoint.pt", 2), (HISTORY, 0), (HISTORY, 2)],
)
def test_interrupted_while_a_file_is_written(patients, trained, tmp_path, monkeypatch, capsys, name, which):
    written, whole = [], files.write_whole

    def write(path: Path, data: bytes) -> None:
        if path.name == name:
            written.append(path)
            if len(written) == which + 1:
                raise KeyboardInterrupt
        whole(path, data)

    monkeypatch.setattr(files, "write_whole", write)
    out = tmp_path / "model"
    assert train(patients, out) == 130
    monkeypatch.undo()
    assert "run the same command with --resume to go on" in capsys.readouterr().err
    assert train(patients, out, "--resume") == 0
    same_training(out, trained)


KILLED = """
    import os, signal, sys
    from monai_deepgmm import files, handlers
    from monai_deepgmm.cli import main

    what, number = sys.argv[1], int(sys.argv[2])
    count = 0

    def die_when(call, counts=lambda *given: True):
        def dying(*given):
            global count
            count += counts(*given)
            if count == number:
                os.kill(os.getpid(), signal.SIGKILL)
            return call(*given)
        return dying

    if what == "step":
        handlers.Clip.__call__ = die_when(handlers.Clip.__call__)
    else:
        os.replace = die_when(os.replace, lambda part, path: path.name == "checkpoint.pt")
    main(sys.argv[3:])
"""


def test_killed_and_resumed_is_never_killed(patients, trained, tmp_path):
    """SIGKILL in the middle of a step, and between a checkpoint's temporary file and its name."""
    draw = random.Random(2)
    points = [("step", draw.randrange(STEPS + 1, 3 * STEPS)), ("write", draw.randrange(2, EPOCHS + 1))]
    running = []
    for what, number in points:
        arguments = ["train", str(patients), str(tmp_path / what), *OPTIONS]
        script = [sys.executable, "-c", textwrap.dedent(KILLED), what, str(number), *arguments]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        running.append(subprocess.Popen(script, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL))
    assert [process.wait(timeout=300) for process in running] == [-signal.SIGKILL] * 2
    left = list((tmp_path / "write" / "models").glob(".deepgmm-*"))
    assert len(left) == 1
    for (what, number), whole_epochs in zip(points, ((points[0][1] - 1) // STEPS, points[1][1] - 1), strict=True):
        out = tmp_path / what
        assert read_checkpoint(out / CHECKPOINT)["epoch"] == whole_epochs, number
        torch.load(out / WEIGHTS, weights_only=True)
        assert train(patients, out, "--resume") == 0
        same_training(out, trained)


def test_resuming_what_is_finished_changes_nothing(patients, trained, tmp_path):
    out = Path(shutil.copytree(trained, tmp_path / "model"))
    assert train(patients, out, "--resume") == 0
    same_training(out, trained)


def test_what_changes_no_weight_may_change(patients, trained, tmp_path):
    out = Path(shutil.copytree(trained, tmp_path / "model"))
    assert train(patients, out, "--resume", "--set", "labels=posterior") == 0
    assert (out / WEIGHTS).read_bytes() == (trained / WEIGHTS).read_bytes()
    assert spec.read(out, INFARCT).spec.labels == "posterior"
    assert spec.read(trained, INFARCT).spec.labels == "both"


# What a training leaves ----------------------------------------------------------------------------------------------


def test_the_curves_hold_a_row_for_every_epoch(trained):
    head, *lines = (trained / HISTORY).read_text().splitlines()
    assert head == "epoch\tloss\tvalidation_loss\tlr"
    rows = read_history(trained / HISTORY)
    assert len(lines) == len(rows) == EPOCHS
    assert [row["epoch"] for row in rows] == [1, 2, 3]
    expected = [1e-3 * (1 - e / EPOCHS) ** 0.9 for e in range(EPOCHS)]
    np.testing.assert_allclose([row["lr"] for row in rows], expected, rtol=1e-5)
    assert rows[-1]["validation_loss"] < rows[0]["validation_loss"]
    provenance = json.loads((trained / "provenance.json").read_text())
    best = min(rows, key=lambda row: row["validation_loss"])
    assert (provenance["epochs"], provenance["best_epoch"]) == (EPOCHS, best["epoch"])
    assert provenance["validation_loss"] == best["validation_loss"]
    svg = (trained / "training.svg").read_text()
    assert svg == curves(rows).decode()
    assert svg.count("<polyline") == 2


def test_the_validation_loss_is_that_of_the_held_out_patients(found, trained):
    prepared = prepare(found, plan(network=TINY, epochs=EPOCHS, settings={"batch_size": 2}))
    network = model.build(prepared.spec)
    network.load_state_dict(read_checkpoint(trained / CHECKPOINT)["network"])
    loss = Staged(MixtureNLL(spatial=True, covariance="tied"), start_weight=3.0)
    network.eval()
    with torch.no_grad():
        values = []
        for example in prepared.validation:
            image, target = examples.prepare_batch({k: v[None] for k, v in example.items()}, "cpu")
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
    after = contents(out)
    assert [k for k in before if after[k] != before[k]] == []


def test_known_means_pull_the_mixtures_means(patients, tmp_path):
    """The same three epochs with a heavy ‖μ − μ_data‖² end with a smaller one."""
    found = cohort.find(patients, INFARCT)
    distance = {}
    for weight in (0, 100):
        out = tmp_path / f"weight{weight}"
        settings = [f"mean_weight={weight}", "lr=0.03", "augment=false", "start_weight=0"]
        assert train(patients, out, "--means", "cohort", "--set", *settings) == 0
        prepared = prepare(found, plan(network=TINY, means="cohort"))
        network = model.load(spec.read(out, INFARCT), "cpu")
        image, target = examples.prepare_batch(
            {k: torch.stack([e[k] for e in prepared.train]) for k in prepared.train[0]}, "cpu"
        )
        with torch.no_grad():
            resp = network(image).softmax(1)
            mixture = MixtureNLL().mixture(target[:, :3], resp, target[:, 3:4])
            distance[weight] = float(MeanPrior(prepared.means)(mixture, resp, target[:, :3], target[:, 3:4]))
        provenance = json.loads((out / "provenance.json").read_text())
        assert provenance["means"]["source"] == "cohort"
        np.testing.assert_allclose(provenance["means"]["values"], prepared.means.numpy())
    assert distance[100] < distance[0]


class Pick(nn.Module):
    """A network whose outputs are its first channels in another order."""

    def __init__(self, order: list[int]) -> None:
        super().__init__()
        self.order = order

    def forward(self, image):
        return image[:, self.order]


@pytest.mark.parametrize(("order", "wanted"), [([0, 1, 2], [True] * 3), ([0, 2, 1], [True, False, False])])
def test_agreement_tells_the_outputs_that_lie_elsewhere(order, wanted):
    generator = torch.Generator().manual_seed(0)
    train = []
    for _ in range(3):
        logits = 3 * torch.randn((3, 16, 16), generator=generator)
        mask = torch.ones(1, 16, 16)
        mask[:, :4] = 0
        train.append({"image": torch.cat([logits, mask]), "mask": mask, "expected": logits.softmax(0) * mask})
    prepared = training.Prepared(train, train, None, torch.zeros(3, 1), "none", 1, (1, 0), {}, "")
    assert training.agreement(Pick(order), prepared, device="cpu") == wanted


# Handlers ------------------------------------------------------------------------------------------------------------


class Toy:
    """A training of one number, which each epoch raises by one, and whose validation losses are given."""

    def __init__(self, folder: Path, watched: list[float], *, tol: float = 0.0, patience: int = 99, **options) -> None:
        (folder / "models").mkdir(parents=True, exist_ok=True)
        self.folder, self.network, self.watched = folder, nn.Linear(1, 1, bias=False), watched
        nn.init.zeros_(self.network.weight)
        optimizer = torch.optim.SGD(self.network.parameters(), lr=0.5)
        self.evaluator = Engine(lambda engine, batch: None)
        self.engine = Engine(self.step)
        self.engine.add_event_handler(Events.EPOCH_COMPLETED, self.validate)
        self.checkpoint = Checkpoint(
            folder,
            network=self.network,
            optimizer=optimizer,
            scheduler=torch.optim.lr_scheduler.ConstantLR(optimizer),
            evaluator=self.evaluator,
            metric="loss",
            fingerprint="toy",
            tol=tol,
            patience=patience,
            **options,
        )
        self.checkpoint.attach(self.engine)

    def step(self, engine, images: int):
        with torch.no_grad():
            self.network.weight += 0.5
        return {"image": [None] * images, "loss": torch.tensor(float(images))}

    def validate(self, engine) -> None:
        self.evaluator.state.metrics = {"loss": self.watched[engine.state.epoch - 1]}

    def run(self) -> Toy:
        self.engine.run([1, 3], max_epochs=len(self.watched))
        return self

    def weight(self, name: Path) -> float:
        state = torch.load(self.folder / name, weights_only=True)
        return float(state.get("network", state)["weight"])


def test_the_best_weights_and_the_last_state_are_kept(tmp_path):
    toy = Toy(tmp_path, [3.0, 1.0, 2.0, 1.0]).run()
    assert toy.weight(WEIGHTS) == 2
    assert toy.weight(CHECKPOINT) == 4
    rows = read_history(tmp_path / HISTORY)
    assert [row["validation_loss"] for row in rows] == [3, 1, 2, 1]
    assert {row["loss"] for row in rows} == {(1 * 1 + 3 * 3) / 4}  # the mean over images, not over batches
    assert list(torch.load(tmp_path / WEIGHTS, weights_only=True)) == ["weight"]


def test_tol_and_patience_by_hand(tmp_path):
    losses = [1.0, 0.5, 0.45, 0.44, 0.1]
    # After three epochs the last two gained 1 − 0.45; after four, 0.5 − 0.44.
    assert len(Toy(tmp_path / "a", losses, tol=0.1, patience=2).run().checkpoint.history) == 4
    assert len(Toy(tmp_path / "b", losses, tol=0.05, patience=2).run().checkpoint.history) == 5
    assert len(Toy(tmp_path / "c", losses, tol=0.1, patience=1).run().checkpoint.history) == 3


def test_only_one_rank_writes(tmp_path):
    toy = Toy(tmp_path, [2.0, 1.0], writes=False).run()
    assert len(toy.checkpoint.history) == 2
    assert [p.name for p in tmp_path.rglob("*") if p.is_file()] == []


def test_a_checkpoint_is_gone_on_from_only_when_asked(tmp_path):
    Toy(tmp_path, [3.0, 2.0]).run()
    toy = Toy(tmp_path, [3.0, 2.0, 1.0], resume=True).run()
    assert toy.weight(CHECKPOINT) == 3
    assert [row["epoch"] for row in toy.checkpoint.history] == [1, 2, 3]
    assert len(Toy(tmp_path, [3.0]).run().checkpoint.history) == 1


def test_gradients_are_clipped():
    parameters = [nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(1))]
    parameters[0].grad, parameters[1].grad = torch.tensor([3.0, 0.0]), torch.tensor([4.0])
    Clip(parameters, 10.0)(Engine(lambda engine, batch: None))
    assert parameters[1].grad.item() == 4
    Clip(parameters, 1.0)(Engine(lambda engine, batch: None))
    torch.testing.assert_close(torch.cat([p.grad for p in parameters]), torch.tensor([0.6, 0.0, 0.8]))


def test_the_epoch_is_told_to_all_that_draw():
    class Sampler:
        def set_epoch(self, epoch: int) -> None:
            self.epoch = epoch

    loss, dataset, sampler, drawn = Staged(nn.Identity()), Examples([]), Sampler(), []
    engine = Engine(lambda engine, batch: drawn.append(float(torch.rand(()))))
    Epochs(loss, dataset, sampler, seed=5).attach(engine)
    engine.run([0], max_epochs=3)
    assert loss.epoch == dataset.epoch == sampler.epoch == 3
    wanted = []
    for epoch in (1, 2, 3):
        torch.manual_seed(5 + epoch)
        wanted.append(float(torch.rand(())))
    assert drawn == wanted


def test_history_is_read_as_it_was_written(tmp_path):
    rows = [{"epoch": 1, "loss": 0.5, "validation_loss": -2.25, "lr": 1e-3}]
    files.write_whole(tmp_path / HISTORY, handlers._table(rows))
    assert read_history(tmp_path / HISTORY) == rows
