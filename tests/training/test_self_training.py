"""A cohort that teaches itself: one command trains and segments, again and again, interrupted or not."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from monai.bundle import create_workflow

from monai_deepgmm import protocol
from monai_deepgmm.cli import main
from monai_deepgmm.errors import UsageError
from monai_deepgmm.methods import config
from monai_deepgmm.methods import registry as solvers
from monai_deepgmm.networks import model_spec as spec
from monai_deepgmm.networks.model_spec import WEIGHTS
from monai_deepgmm.patients import discovery as cohort
from monai_deepgmm.results import segment
from monai_deepgmm.training import bundle as bundled
from monai_deepgmm.training import prepare as training
from monai_deepgmm.training.handlers import CHECKPOINT, Clip

INFARCT = protocol.load("infarct")
TINY = {"_target_": "monai_deepgmm.networks.UNet", "filters": [4, 8]}
PATIENTS = ("pat1", "pat2", "pat3")
#: MONAI warns that a configuration is code whenever it reads one.
pytestmark = [
    pytest.mark.filterwarnings("ignore:parsing config_file"),
    pytest.mark.usefixtures("tiny", "no_picture"),
]


@pytest.fixture(scope="module")
def tiny():
    """Two epochs of a network that is made in no time; three patients of two slices are two steps in each."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "DEFAULT", TINY)
        patch.setattr(training, "EPOCHS", (2, 2))
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


def labels(out: Path, names: tuple[str, ...] = PATIENTS) -> dict[str, bytes]:
    return {name: (out / name / f"{name}_dseg.nii.gz").read_bytes() for name in names}


def summary(out: Path) -> dict[str, tuple[str, str]]:
    with (out / "summary.tsv").open(encoding="utf-8", newline="") as file:
        return {r["patient"]: (r["status"], r["code"]) for r in csv.DictReader(file, delimiter="\t")}


def provenance(out: Path) -> dict:
    return json.loads((out / "model" / "provenance.json").read_text(encoding="utf-8"))


def stamps(out: Path) -> dict[str, int]:
    """When each patient's files and the weights were written."""
    return {str(p.relative_to(out)): p.stat().st_mtime_ns for p in [*out.glob("pat*/*"), out / "model" / WEIGHTS]}


# One command ----------------------------------------------------------------------------------------------------------


def test_the_networks_folder_is_a_whole_bundle(run):
    files = {str(p.relative_to(run / "model")) for p in (run / "model").rglob("*") if p.is_file()}
    assert files == {
        *(f"configs/{name}" for name in bundled.CONFIGS),
        *("models/model.pt", "models/checkpoint.pt", "model.json", "protocol.yaml"),
        *("provenance.json", "training.tsv", "training.svg"),
    }
    told = provenance(run)
    assert told["patients"]["trained_on"] + told["patients"]["validation"] == 3
    assert told["plan"]["network"] == TINY
    assert (told["epochs"], told["not_used"]) == (2, {})


def test_the_sidecar_names_the_network(run):
    sidecar = json.loads((run / "pat1" / "pat1_dseg.json").read_text(encoding="utf-8"))
    assert sidecar["method"] == sidecar["configuration"]["method"] == "cohort"
    assert sidecar["configuration"]["model"]["sha256"] == spec.read(run / "model", INFARCT).sha256
    assert sidecar["configuration"]["model"]["labels"] == "both"
    assert summary(run) == dict.fromkeys(PATIENTS, ("ok", ""))


def test_no_file_names_this_machines_folders(run, patients):
    texts = [p for p in run.rglob("*") if p.suffix in (".json", ".yaml", ".tsv", ".html", ".svg")]
    assert len(texts) > 15
    for path in texts:
        text = path.read_text(encoding="utf-8")
        assert str(patients.parent) not in text, path.name
        assert str(run.parent) not in text, path.name


def test_the_network_alone_gives_the_same_labels(patients, run, tmp_path):
    assert main(["segment", str(patients), str(tmp_path), "--model", str(run / "model"), "-q"]) == 0
    assert labels(tmp_path) == labels(run)


def test_a_cohort_with_a_network_of_its_own_is_not_trained_again(patients, run, tmp_path):
    assert taught(patients, tmp_path, "--model", str(run / "model")) == 0
    assert labels(tmp_path) == labels(run)
    assert not (tmp_path / "model").exists()


def test_the_bundles_inference_gives_the_same_labels(patients, run, tmp_path):
    workflow = create_workflow(
        config_file=[str(bundled.configs() / "inference.json")],
        workflow_type="infer",
        dataset_dir=str(patients),
        output_dir=str(tmp_path / "out"),
        method="cohort",
    )
    assert workflow.run() == [0]
    workflow.finalize()
    assert labels(tmp_path / "out") == labels(run)
    weights = [folder / "model" / WEIGHTS for folder in (tmp_path / "out", run)]
    assert spec.read(weights[0].parents[1], INFARCT).sha256 == spec.read(weights[1].parents[1], INFARCT).sha256


def test_the_seed_is_the_trainings(patients, run, tmp_path):
    assert taught(patients, tmp_path, "--seed", "1") == 0
    assert provenance(tmp_path)["plan"]["seed"] == 1
    assert (tmp_path / "model" / WEIGHTS).read_bytes() != (run / "model" / WEIGHTS).read_bytes()


def test_a_network_can_be_asked_for(patients, run, tmp_path):
    text = "{_target_: monai_deepgmm.networks.UNet, filters: [3, 6]}"
    assert taught(patients, tmp_path, "--network", text) == 0
    assert spec.read(tmp_path / "model", INFARCT).spec.network["filters"] == [3, 6]
    assert taught(patients, tmp_path / "named", "--network", json.dumps(TINY)) == 0
    assert labels(tmp_path / "named") == labels(run)


# Again ----------------------------------------------------------------------------------------------------------------


def test_a_second_run_does_nothing_anew(patients, tmp_path):
    assert taught(patients, tmp_path) == 0
    first, made = stamps(tmp_path), provenance(tmp_path)
    assert taught(patients, tmp_path) == 0
    assert stamps(tmp_path) == first
    assert provenance(tmp_path) == made
    log = (tmp_path / "deepgmm.log").read_text(encoding="utf-8")
    assert all(f"{name}: done before" in log for name in PATIENTS)


@pytest.mark.parametrize("step", range(4))
@pytest.mark.parametrize("what", [KeyboardInterrupt, RuntimeError])
def test_a_training_that_is_cut_off_goes_on(patients, run, tmp_path, monkeypatch, what, step):
    count, clip = iter(range(99)), Clip.__call__

    def call(self, engine):
        if next(count) == step:
            raise what
        clip(self, engine)

    with monkeypatch.context() as patch:
        patch.setattr(Clip, "__call__", call)
        if what is KeyboardInterrupt:
            assert taught(patients, tmp_path) == 130
        else:
            with pytest.raises(RuntimeError):
                taught(patients, tmp_path)
    assert (tmp_path / "model" / CHECKPOINT).is_file() == (step >= 2)
    assert not list(tmp_path.glob("pat*"))
    assert taught(patients, tmp_path) == 0
    assert labels(tmp_path) == labels(run)
    assert spec.read(tmp_path / "model", INFARCT).sha256 == spec.read(run / "model", INFARCT).sha256


def test_patients_that_are_cut_off_are_gone_on_with(patients, run, tmp_path, monkeypatch):
    done, whole = [], segment.segment

    def one(*given, **named):
        if done:
            raise KeyboardInterrupt
        done.append(1)
        return whole(*given, **named)

    with monkeypatch.context() as patch:
        patch.setattr("monai_deepgmm.batch.segment", one)
        assert taught(patients, tmp_path) == 130
    first = stamps(tmp_path)
    assert {name.split("/")[0] for name in first} == {"pat1", "model"}
    assert taught(patients, tmp_path) == 0
    assert first.items() <= stamps(tmp_path).items()
    assert labels(tmp_path) == labels(run)


def test_a_changed_cohort_is_trained_anew(own, run, tmp_path, make_patient):
    out = tmp_path / "out"
    assert taught(own, out) == 0
    assert labels(out) == labels(run)
    first = stamps(out)
    make_patient(own, "pat4", seed=4)
    assert taught(own, out) == 0
    again = stamps(out)
    assert all(again[name] > first[name] for name in first)
    everyone = (*PATIENTS, "pat4")
    assert provenance(out)["patients"]["trained_on"] == 4
    assert summary(out) == dict.fromkeys(everyone, ("ok", ""))
    assert taught(own, tmp_path / "fresh") == 0
    assert labels(out, everyone) == labels(tmp_path / "fresh", everyone)


def test_a_changed_image_is_trained_on_anew(own, run, tmp_path, make_patient):
    out = tmp_path / "out"
    assert taught(own, out) == 0
    before = spec.read(out / "model", INFARCT).sha256
    make_patient(own, "pat2", seed=9)
    assert taught(own, out) == 0
    assert spec.read(out / "model", INFARCT).sha256 != before


# What goes wrong ------------------------------------------------------------------------------------------------------


def test_a_part_cannot_learn_from_the_others(patients, tmp_path, capsys):
    assert taught(patients, tmp_path / "out", "--part", "1/2") == 2
    told = capsys.readouterr().err
    assert "--part" in told
    assert "--model OUT/model" in told
    assert not (tmp_path / "out").exists()


def test_parts_can_use_the_cohorts_network(patients, run, tmp_path):
    for part in ("1/2", "2/2"):
        asked = ["--model", str(run / "model"), "--part", part, "-q"]
        assert main(["segment", str(patients), str(tmp_path), *asked]) == 0
    assert labels(tmp_path) == labels(run)


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
    assert spec.read(out / "model", INFARCT).spec.teacher == "anatomy"
    assert provenance(out)["patients"]["trained_on"] == 3
    assert not list(out.rglob(f"{name}_*"))


def test_options_that_a_cohort_does_not_use_are_refused(patients, tmp_path, capsys):
    known = {"protocol": "infarct", "normalisation": INFARCT.normalisation, "n_slices": 1, "means": {}}
    (tmp_path / "means.json").write_text(json.dumps(known))
    assert taught(patients, tmp_path / "out", "--means", str(tmp_path / "means.json")) == 2
    assert "--means" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_refused_network_leaves_the_trained_one(patients, run, tmp_path, monkeypatch, capsys):
    out = Path(shutil.copytree(run, tmp_path / "out"))
    monkeypatch.setattr(training, "DEFAULT", {**TINY, "fitlers": [4, 8]})
    assert taught(patients, out) == 2
    assert "fitlers" in capsys.readouterr().err
    assert (out / "model" / WEIGHTS).read_bytes() == (run / "model" / WEIGHTS).read_bytes()


# The network and the anatomical mixture -------------------------------------------------------------------------------


def probabilities(folder: Path, model: Path | None, *settings: str) -> np.ndarray:
    (study,) = cohort.find(folder, INFARCT, patients=["pat1"]).studies
    asked = config.build(model=model, settings=["presence=false", "perturbations=0", *settings])
    return segment.segment(study, asked).probabilities


def test_both_are_heard_by_their_weights(patients, run):
    network = probabilities(patients, run / "model", "labels=network")
    own = probabilities(patients, None)
    both = probabilities(patients, run / "model", "labels=both")
    assert solvers.TRUST == 0.3
    assert np.abs(network - own).max() > 0.1
    np.testing.assert_allclose(both, 0.3 * network + 0.7 * own, atol=1e-6)
    np.testing.assert_array_equal(probabilities(patients, run / "model"), both)  # what the model itself says
    posterior = probabilities(patients, run / "model", "labels=posterior")
    assert np.abs(posterior - network).max() > 1e-3


def test_labels_are_the_most_probable_tissue_of_both(patients, run):
    (study,) = cohort.find(patients, INFARCT, patients=["pat1"]).studies
    made = segment.segment(study, config.build(model=run / "model"))
    found = np.asarray(nib.load(run / "pat1" / "pat1_dseg.nii.gz").dataobj)
    np.testing.assert_array_equal(found, made.labels)
    np.testing.assert_array_equal(found[made.mask], made.probabilities.argmax(0)[made.mask] + 1)
    assert len(np.unique(found[made.mask])) > 2


@pytest.mark.parametrize("method", ["anatomy", "deepg", "svgmm"])
def test_both_needs_a_trained_network(method):
    with pytest.raises(UsageError, match="both needs a trained network"):
        config.build(method=method, settings=["labels=both"])


def test_both_needs_a_protocol_that_says_where_tissues_can_be():
    with pytest.raises(UsageError, match="says where tissues can be"):
        config.build(protocol="brain", method="cohort", settings=["labels=both"])
    with pytest.raises(UsageError, match="where tissues can be"):
        training.plan(protocol="brain", settings=["labels=both"])
    assert config.build(method="cohort", settings=["labels=both"]).solver.labels == "both"
