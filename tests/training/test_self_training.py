"""A cohort that teaches itself: one command trains and segments, again and again, interrupted or not."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from scenes import INFARCT, QUIET, contents, inference, labels, sidecar, stop_at

from monai_deepgmm.cli import main
from monai_deepgmm.images.preparation import prepare
from monai_deepgmm.methods import config, model_spec
from monai_deepgmm.methods.anatomy import AnatomicalConfig
from monai_deepgmm.methods.model_spec import WEIGHTS
from monai_deepgmm.networks import registry
from monai_deepgmm.patients import discovery
from monai_deepgmm.results.segment import segment
from monai_deepgmm.training import bundle, dataset
from monai_deepgmm.training.handlers import CHECKPOINT

TINY = {"_target_": "monai_deepgmm.networks.UNet", "filters": [4, 8]}
PATIENTS = ("pat1", "pat2", "pat3")
pytestmark = [pytest.mark.filterwarnings(QUIET), pytest.mark.usefixtures("tiny", "no_picture")]


@pytest.fixture(scope="module")
def tiny():
    """Two epochs of a network that is made in no time; three patients of two slices are two steps in each."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(registry, "DEFAULT", TINY)
        patch.setattr("monai_deepgmm.training.prepare.EPOCHS", (2, 2))
        yield


@pytest.fixture(scope="module")
def patients(tmp_path_factory, make_patient) -> Path:
    """Nobody may change these."""
    folder = tmp_path_factory.mktemp("selftaught") / "in"
    for number, name in enumerate(PATIENTS, 1):
        make_patient(folder, name, seed=number)
    return folder


@pytest.fixture
def own(patients, tmp_path) -> Path:
    """The same patients, for a test that changes them."""
    return Path(shutil.copytree(patients, tmp_path / "own"))


@pytest.fixture(scope="module")
def run(patients, tiny, tmp_path_factory) -> Path:
    """A run that nothing interrupted; nobody may change it."""
    out = tmp_path_factory.mktemp("selftaught") / "out"
    assert taught(patients, out) == 0
    return out


def taught(folder: Path, out: Path, *more: str) -> int:
    return main(["segment", str(folder), str(out), "--method", "cohort", "-q", *more])


def same_labels(a: Path, b: Path, names: tuple[str, ...] = PATIENTS) -> bool:
    return all((a / n / f"{n}_dseg.nii.gz").read_bytes() == (b / n / f"{n}_dseg.nii.gz").read_bytes() for n in names)


def sha256(out: Path) -> str:
    return model_spec.read(out / "model", INFARCT).sha256


def summary(out: Path) -> dict[str, tuple[str, str]]:
    with (out / "summary.tsv").open(encoding="utf-8", newline="") as file:
        return {r["patient"]: (r["status"], r["code"]) for r in csv.DictReader(file, delimiter="\t")}


def provenance(out: Path) -> dict:
    return json.loads((out / "model" / "provenance.json").read_text(encoding="utf-8"))


def stamps(out: Path) -> dict[str, int]:
    """When each patient's files and the weights were written."""
    return {str(p.relative_to(out)): p.stat().st_mtime_ns for p in [*out.glob("pat*/*"), out / "model" / WEIGHTS]}


def test_the_networks_folder_is_a_whole_bundle_and_the_sidecar_names_it(run, patients):
    assert set(contents(run / "model")) == {
        *(f"configs/{name}" for name in bundle.CONFIGS),
        *("models/model.pt", "models/checkpoint.pt", "model.json", "protocol.yaml", "LICENSE", "docs/README.md"),
        *("provenance.json", "training.tsv", "training.svg"),
    }
    told = provenance(run)
    assert told["patients"]["trained_on"] + told["patients"]["validation"] == 3
    assert (told["plan"]["network"], told["epochs"], told["not_used"]) == (TINY, 2, {})
    beside = sidecar(run, "pat1")
    assert beside["method"] == beside["configuration"]["method"] == "cohort"
    assert beside["configuration"]["model"]["sha256"] == sha256(run)
    assert beside["configuration"]["model"]["training"]["label_rule"] == "both"
    assert summary(run) == dict.fromkeys(PATIENTS, ("ok", ""))
    texts = [p for p in run.rglob("*") if p.suffix in (".json", ".yaml", ".tsv", ".html", ".svg")]
    assert len(texts) > 15
    for path in texts:  # none names this machine's folders
        text = path.read_text(encoding="utf-8")
        assert str(patients.parent) not in text, path.name
        assert str(run.parent) not in text, path.name


@pytest.mark.parametrize("parts", [["1/1"], ["1/2", "2/2"]])
def test_the_network_alone_gives_the_same_labels_in_parts_too(patients, run, tmp_path, parts):
    for part in parts:
        asked = ["--model", str(run / "model"), "--part", part, "-q"]
        assert main(["segment", str(patients), str(tmp_path), *asked]) == 0
    assert same_labels(tmp_path, run)


def test_the_bundles_inference_gives_the_same_labels(patients, run, tmp_path):
    workflow = inference(dataset_dir=patients, output_dir=tmp_path / "out", method="cohort")
    assert workflow.run() == [0]
    workflow.finalize()
    assert same_labels(tmp_path / "out", run)
    assert sha256(tmp_path / "out") == sha256(run)


def test_seed_and_network_are_the_trainings(patients, run, tmp_path):
    text = "{_target_: monai_deepgmm.networks.UNet, filters: [3, 6]}"
    assert taught(patients, tmp_path, "--seed", "1", "--network", text) == 0
    assert provenance(tmp_path)["plan"]["seed"] == 1
    assert model_spec.read(tmp_path / "model", INFARCT).spec.network["filters"] == [3, 6]
    assert taught(patients, tmp_path / "named", "--network", json.dumps(TINY)) == 0
    assert same_labels(tmp_path / "named", run)


def test_what_is_set_reaches_training_teacher_and_segmentation_alike(patients, tmp_path, monkeypatch):
    """N4 and the teacher's settings, on the command line and in what is told of the labels."""
    corrected, taught_by, given = [], [], []

    def slope(image, mask, spacing_mm):
        corrected.append(1)
        return np.where(mask, np.linspace(0.7, 1.3, image.shape[0])[:, None, None], 1).astype(np.float32)

    def make(patients, protocol, **options):
        taught_by.append(options["teacher"])
        given.extend(patients)
        return whole(patients, protocol, **options)

    whole = dataset.make
    monkeypatch.setattr("monai_deepgmm.images.preparation.n4_field", slope)
    monkeypatch.setattr(dataset, "make", make)
    assert taught(patients, tmp_path, "--set", "n4=true", "temper=0.9", "workers=0") == 0
    assert len(corrected) == 2 * 3 * 3  # each sequence of each patient, in training and in segmentation
    assert taught_by == [AnatomicalConfig(temper=0.9)]
    asked = config.build(method="cohort", settings=["n4=true"])
    for study, patient in zip(discovery.find(patients, INFARCT).studies, given, strict=True):
        here = prepare(study, asked.preprocessing.transforms(INFARCT)).crops.image
        plain = prepare(study, config.build().preprocessing.transforms(INFARCT)).crops.image
        assert np.array_equal(patient.crops.image, here)
        assert not np.array_equal(here, plain)
    spec = json.loads((tmp_path / "model" / "model.json").read_text())
    told = sidecar(tmp_path, "pat1")["configuration"]
    for training in (spec["training"], told["settings"]["training"], told["model"]["training"]):
        assert training["preprocessing"]["n4"] is True
        assert training["teacher"]["temper"] == 0.9
    assert told["preprocessing"]["n4"] is True
    assert spec["normalisation"] == told["normalisation"] == f"{INFARCT.normalisation}-n4"
    # Later patients get the same preprocessing without being told.
    assert main(["segment", str(patients), str(tmp_path / "later"), "--model", str(tmp_path / "model"), "-q"]) == 0
    assert same_labels(tmp_path / "later", tmp_path)


def test_what_changes_no_label_does_nothing_anew(patients, run, tmp_path):
    out = Path(shutil.copytree(run, tmp_path / "out"))
    first, made = stamps(out), provenance(out)["fingerprint"]
    assert taught(patients, out) == 0
    assert taught(patients, out, "--max-voxels", "1000000", "--set", "workers=1", "amp=true") == 0
    assert stamps(out) == first
    assert provenance(out)["fingerprint"] == made
    log = (out / "deepgmm.log").read_text(encoding="utf-8")
    assert all(f"{name}: done before" in log for name in PATIENTS)


@pytest.mark.parametrize(("what", "step"), [(KeyboardInterrupt, 1), (KeyboardInterrupt, 3), (RuntimeError, 2)])
def test_a_training_that_is_cut_off_is_resumed(patients, run, tmp_path, monkeypatch, what, step):
    with monkeypatch.context() as patch:
        stop_at(patch, step, error=what)
        assert taught(patients, tmp_path) == (130 if what is KeyboardInterrupt else 70)
    assert (tmp_path / "model" / CHECKPOINT).is_file() == (step >= 2)
    assert not list(tmp_path.glob("pat*"))
    assert taught(patients, tmp_path) == 0
    assert same_labels(tmp_path, run)
    assert sha256(tmp_path) == sha256(run)


def test_a_patient_who_is_not_done_yet_is_done_without_another_training(patients, run, tmp_path):
    out = Path(shutil.copytree(run, tmp_path / "out"))
    first = stamps(out)
    (out / "pat2" / "pat2_row.json").unlink()  # as an interrupt leaves him
    assert taught(patients, out) == 0
    changed = {name.split("/")[0] for name, time in stamps(out).items() if time != first[name]}
    assert changed == {"pat2"}
    assert same_labels(out, run)


@pytest.mark.parametrize("change", [("pat4", 4), ("pat2", 9)], ids=["patient", "image"])
def test_a_changed_cohort_is_trained_anew(own, run, tmp_path, make_patient, change):
    out = Path(shutil.copytree(run, tmp_path / "out"))
    first, before = stamps(out), sha256(out)
    patient, seed = change
    make_patient(own, patient, seed=seed)
    assert taught(own, out) == 0
    again, everyone = stamps(out), tuple(sorted({*PATIENTS, patient}))
    assert all(again[name] > first[name] for name in first)
    assert sha256(out) != before
    assert provenance(out)["patients"]["trained_on"] == len(everyone)
    assert summary(out) == dict.fromkeys(everyone, ("ok", ""))
    assert taught(own, tmp_path / "fresh") == 0
    assert same_labels(out, tmp_path / "fresh", everyone)


def test_what_a_cohort_cannot_use_is_refused(patients, run, tmp_path, capsys):
    known = {"protocol": "infarct", "normalisation": INFARCT.normalisation, "n_slices": 1, "means": {}}
    (tmp_path / "means.json").write_text(json.dumps(known))
    for asked, said in (
        (["--part", "1/2"], "run it without --part; then others can use --model OUT/model"),  # who learns from all
        (["--means", str(tmp_path / "means.json")], "--means"),
        (["--model", str(run / "model")], "--method cohort takes no trained network"),
    ):
        assert taught(patients, tmp_path / "out", *asked) == 2
        assert said in capsys.readouterr().err
        assert not (tmp_path / "out").exists()


def test_a_broken_patient_fails_alone(own, tmp_path):
    path = own / "pat2_LGE.nii.gz"
    path.write_bytes(path.read_bytes()[:-30])
    out = tmp_path / "out"
    assert taught(own, out) == 1
    assert summary(out) == {"pat1": ("ok", ""), "pat2": ("failed", "E_GZIP"), "pat3": ("ok", "")}
    assert not (out / "pat2" / "pat2_dseg.nii.gz").exists()
    assert provenance(out)["patients"]["trained_on"] == 2
    assert provenance(out)["not_used"]["pat2"]["code"] == "E_GZIP"
    first = stamps(out)
    assert taught(own, out) == 1
    changed = {name for name, time in stamps(out).items() if time != first[name]}
    assert {name.split("/")[0] for name in changed} == {"pat2"}


@pytest.mark.parametrize("name", ["model", "Model"])
def test_no_patient_takes_the_networks_place(own, tmp_path, make_patient, name):
    make_patient(own, name, seed=4)
    out = tmp_path / "out"
    assert taught(own, out) == 1
    assert summary(out) == {**dict.fromkeys(PATIENTS, ("ok", "")), name: ("failed", "E_ID")}
    assert model_spec.read(out / "model", INFARCT).spec.training.teacher.name == "anatomy"
    assert provenance(out)["patients"]["trained_on"] == 3
    assert not list(out.rglob(f"{name}_*"))


def test_a_refused_network_leaves_the_trained_one(patients, run, tmp_path, capsys):
    out = Path(shutil.copytree(run, tmp_path / "out"))
    assert taught(patients, out, "--network", json.dumps({**TINY, "fitlers": [4, 8]})) == 2
    assert "fitlers" in capsys.readouterr().err
    assert (out / "model" / WEIGHTS).read_bytes() == (run / "model" / WEIGHTS).read_bytes()


def test_both_are_heard_by_their_weights(patients, run):
    (study,) = discovery.find(patients, INFARCT, patients=["pat1"]).studies

    def probabilities(model: Path | None, *settings: str) -> np.ndarray:
        return segment(study, config.build(model=model, settings=["presence=false", *settings])).probabilities

    network, posterior, both = (
        probabilities(run / "model", f"label_rule={rule}") for rule in ("network", "posterior", "both")
    )
    own = probabilities(None, "perturbations=0")
    assert np.abs(network - own).max() > 0.1
    np.testing.assert_allclose(both, 0.3 * network + 0.7 * own, atol=1e-6)
    np.testing.assert_array_equal(probabilities(run / "model"), both)  # what the model itself says
    assert np.abs(posterior - network).max() > 1e-3
    made = segment(study, config.build(model=run / "model"))
    np.testing.assert_array_equal(labels(run, "pat1"), made.labels)
    np.testing.assert_array_equal(made.labels[made.mask], made.probabilities.argmax(0)[made.mask] + 1)
    assert len(np.unique(made.labels[made.mask])) > 2
