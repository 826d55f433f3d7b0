"""What a training is asked to do: defaults, what goes together, and what is refused."""

from __future__ import annotations

import pytest
import torch
from scenes import INFARCT, TINY

from monai_deepgmm.errors import UsageError
from monai_deepgmm.methods.anatomy import AnatomicalConfig
from monai_deepgmm.methods.known_means import Means
from monai_deepgmm.methods.training_config import ALPHA, BETA, GAMMA, SignatureTeacher, TrainingConfig
from monai_deepgmm.networks.gmm_loss import GMMLoss, TotalLoss
from monai_deepgmm.networks.nll_loss import MeanPrior, MixtureNLL, Staged
from monai_deepgmm.training.plan import mixture_loss, plan, whole_loss
from monai_deepgmm.training.prepare import prepare_cohort


def test_slices_and_volumes_have_their_own_network():
    """Written out, so that a model can be read whatever the name stands for later."""
    folded = {"_target_": "monai_deepgmm.networks.FoldedUNet", "filters": [48, 96, 192]}
    assert plan().network == folded
    assert plan(protocol="brain").network == plan(protocol="brain", network="monai_deepgmm.networks.UNet").network
    assert plan(network="unet").network == {"_target_": "unet"}


def test_the_loss_and_the_method_name_each_other():
    named = {loss: (plan(loss=loss).training.method, plan(loss=loss).training.spatial) for loss in ("nll", "nll_v")}
    assert named == {"nll": ("deepg", False), "nll_v": ("deepsvg", True)}
    assert plan().training.method == plan(method="deepsvg", loss="nll_v").training.method == "deepsvg"
    assert plan(method="deepg").training.loss == "nll"
    assert plan().training.covariance == "tied"
    assert plan(settings={"covariance": "diag"}).training.covariance == "diag"
    for rule in ("label_rule=posterior", "labels=posterior"):  # its former name
        asked = plan(settings=["lr=1e-4", "augment=false", rule, "teacher=signature"]).training
        own = {"covariance": "tied", "start_weight": 0.3, "drop": 0.0}
        assert asked == TrainingConfig(lr=1e-4, augment=False, label_rule="posterior", **own)


def test_mas_losses_have_one_weight_per_image_and_their_own_settings():
    for loss, gamma, degree in (("gmm", 0.0, None), ("gmm_tv", GAMMA["gmm_tv"], None), ("gmm_bias", 0.0, 1)):
        asked = plan(loss=loss).training
        assert (asked.method, asked.loss, asked.spatial, asked.covariance) == ("deepg", loss, False, "full")
        assert (asked.gamma, asked.degree, asked.label_rule) == (gamma, degree, "network")
        assert asked.shaded == (loss == "gmm_bias")
        assert plan(method="deepg", loss=loss).training == asked
    assert plan(loss="gmm_bias", protocol="brain").training.degree == 3
    assert plan(loss="gmm_bias", settings={"degree": 2, "gamma": 0.5}).training.degree == 2
    bare = plan().training
    assert [bare.gamma, bare.degree, bare.alpha, bare.beta] == [None] * 4


def test_with_labels_the_loss_is_the_papers_unless_another_is_named():
    asked = plan(labels="1/4")
    assert (asked.training.method, asked.training.loss, asked.labels) == ("deepg", "gmm_tv", ("1/4",))
    assert (asked.training.alpha, asked.training.beta) == (ALPHA, BETA)
    assert plan(labels="all", method="deepsvg").training.loss == "nll_v"
    assert plan(labels=["a", "b"], loss="gmm_bias", settings={"beta": 0}).training.beta == 0


@pytest.mark.parametrize(
    ("loss", "kind", "gamma", "degree"),
    [("nll", MixtureNLL, 0, 0), ("gmm_tv", GMMLoss, 0.7, 0), ("gmm_bias", GMMLoss, 0.7, 2)],
)
def test_the_loss_is_the_plans(loss, kind, gamma, degree):
    asked = plan(loss=loss, settings={k: v for k, v in (("gamma", gamma), ("degree", degree)) if v})
    made = mixture_loss(asked, terms=[(0.5, MeanPrior(torch.zeros(4, 3)))])
    assert type(made) is kind
    assert [t.weight for t in made.terms] == [0.5]
    assert (getattr(made, "gamma", 0), getattr(made, "degree", 0)) == (gamma, degree)
    staged = Staged(made)
    assert whole_loss(staged, asked) is staged
    total = whole_loss(staged, plan(labels="all", settings={"alpha": 2.0, "beta": 0.25}))
    assert isinstance(total, TotalLoss)
    assert (total.loss, total.alpha, total.beta) == (staged, 2.0, 0.25)


def test_the_teacher_is_the_anatomy_where_there_is_one_and_no_means(tmp_path):
    def resolved(*settings: str, **options) -> tuple:
        asked = plan(settings=settings, **options).training
        return asked.teacher, asked.start_weight, asked.drop, asked.label_rule

    by_anatomy, by_signature = (AnatomicalConfig(), 3.0, 0.25, "both"), (SignatureTeacher(), 0.3, 0.0, "posterior")
    file = tmp_path / "means.json"
    file.write_bytes(Means("infarct", INFARCT.normalisation, {}, 1).as_json())
    assert resolved() == resolved("teacher=anatomy", means="cohort") == by_anatomy
    for given in ({"protocol": "brain"}, {"means": "cohort"}, {"means": file}):
        assert resolved(**given) == by_signature
    assert resolved("teacher=signature") == by_signature
    asked = ("teacher=anatomy", "start_weight=0", "drop=0", "label_rule=posterior", "temper=0.9", "teacher.tol=0.1")
    assert resolved(*asked) == (AnatomicalConfig(temper=0.9, tol=0.1), 0, 0, "posterior")  # 0 is no None


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
        ({"settings": ["speed=3"]}, "no such setting of a training; it has covariance, batch_size, lr"),
        ({"settings": ["method=deepg"]}, "no such setting of a training"),
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
        ({"settings": {"covariance": "round"}}, "choose one of diag, full, tied, spherical"),
        ({"settings": {"label_rule": "guess"}}, "choose one of posterior, network, both"),
        ({"settings": {"teacher": "me"}}, "teacher: 'me' is unknown; choose one of signature, anatomy"),
        ({"settings": {"teacher": "signature", "temper": 0.5}}, "temper: no such setting of a training"),
        ({"settings": {"temper": 2}}, "temper must be at most 1"),
        ({"settings": {"n4": "much"}}, "choose one of true, false"),
        ({"settings": {"drop": -0.5}}, "drop: got -0.5, expected a number of at least 0"),
        ({"settings": {"drop": "often"}}, "drop: got 'often'"),
        ({"settings": {"drop": 0.5, "covariance": "spherical"}}, "with covariance=spherical every patient needs all"),
        ({"settings": {"gamma": 1}}, "gamma: goes with --loss gmm_tv or gmm_bias"),
        ({"loss": "gmm", "settings": {"gamma": 1}}, "gamma: goes with"),
        ({"loss": "gmm_tv", "settings": {"degree": 2}}, "degree: goes with --loss gmm_bias"),
        ({"loss": "gmm_bias", "settings": {"degree": 0}}, "degree: got 0"),
        ({"settings": {"beta": 1}}, "beta: goes with --labels"),
        ({"labels": "5/4"}, "--labels 5/4"),
        ({"loss": "gmm_bias", "means": "cohort"}, "another scale"),
        ({"settings": {"augment": "much"}}, "choose one of true, false"),
        ({"protocol": "brain", "settings": {"teacher": "anatomy"}}, "brain does not say where tissues can be"),
        ({"protocol": "brain", "settings": {"label_rule": "both"}}, "brain does not say where tissues can be"),
    ],
)
def test_plans_that_make_no_sense_are_refused(options, said):
    with pytest.raises(UsageError) as refused:
        plan(**options)
    assert said in str(refused.value)


@pytest.mark.parametrize("package", ["tensorboard", "mlflow"])
def test_tracking_says_what_to_install(monkeypatch, package):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UsageError, match=rf"{package}.*pip install {package}"):
        plan(settings={package: "sqlite:///x" if package == "mlflow" else True})


@pytest.mark.parametrize("place", ["mlruns", "/data/mlruns", "file:///data/mlruns"])
def test_runs_are_not_tracked_in_plain_folders(place):
    with pytest.raises(UsageError, match="expected a tracking URI, such as sqlite:"):
        plan(settings={"mlflow": place})


def test_a_plan_tells_no_password_and_a_model_no_tracking(monkeypatch, found):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: True)

    def told(uri: str | None) -> str:
        return plan(settings={"mlflow": uri}).as_json()["training"]["mlflow"]

    secret = "https://me:se/cr@t@host.org:5000/a"
    assert told(secret) == "https://***@host.org:5000/a"
    plain = ["https://host.org", "sqlite:///runs.db", None]
    assert [told(uri) for uri in plain] == plain
    asked = {"mlflow": secret, "tensorboard": True, "workers": 2}
    watched = prepare_cohort(found, plan(network=TINY, settings=asked, max_voxels=1 << 20)).spec
    assert watched == prepare_cohort(found, plan(network=TINY)).spec
    assert b"host.org" not in watched.as_json()
