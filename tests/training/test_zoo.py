"""The shipped bundle and a training's folder by the rules of MONAI's model zoo, without the network that these ask."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest
import torch
from ignite.engine import Events
from monai.bundle import ConfigParser, ckpt_export, create_workflow, onnx_export, verify_metadata, verify_net_in_out
from scenes import CONFIGS, QUIET, TINY, labels

from monai_deepgmm import terminal
from monai_deepgmm.errors import StudyError, UsageError
from monai_deepgmm.training.handlers import read_history

SCHEMA = Path(__file__).parents[1] / "schemas" / "meta_schema_20240725.json"
CONSTRAINTS = CONFIGS.parents[1] / "scripts" / "constraints.txt"
pytestmark = [pytest.mark.filterwarnings(QUIET), pytest.mark.usefixtures("no_picture")]


@pytest.fixture(scope="module", params=["shipped", "trained"])
def bundle(request, trained, tmp_path_factory) -> Path:
    """A copy that may be written into; the shipped one gets weights, as the zoo's own check makes them."""
    place = tmp_path_factory.mktemp("zoo") / request.param
    if request.param == "trained":
        return Path(shutil.copytree(trained, place))
    shutil.copytree(CONFIGS.parent, place)
    (place / "models").mkdir()
    parser = ConfigParser(json.loads((place / "configs" / "inference.json").read_text(encoding="utf-8")))
    torch.save(parser.get_parsed_content("network_def").state_dict(), place / "models" / "model.pt")
    return place


def meta(bundle: Path) -> dict:
    return json.loads((bundle / "configs" / "metadata.json").read_text(encoding="utf-8"))


def workflow(bundle: Path, name: str, **options: object):
    places = {"bundle_root": str(bundle), "meta_file": str(bundle / "configs" / "metadata.json")}
    kind = "train" if name == "train" else "infer"
    given = {key: str(value) if isinstance(value, Path) else value for key, value in options.items()}
    return create_workflow(workflow_type=kind, config_file=str(bundle / "configs" / f"{name}.json"), **places, **given)


def test_files_versions_and_metadata_are_those_that_the_zoo_wants(bundle, tmp_path):
    for name in ("LICENSE", "configs/metadata.json", "configs/inference.json", "models/model.pt", "docs/README.md"):
        assert (bundle / name).is_file(), name
    told = meta(bundle)
    assert told["version"] in told["changelog"]
    assert told["schema"].endswith(SCHEMA.name)
    pytest.importorskip("jsonschema")
    schema = shutil.copyfile(SCHEMA, tmp_path / "schema.json")
    verify_metadata(meta_file=str(bundle / "configs" / "metadata.json"), filepath=str(schema))


def test_required_versions_are_tried_ones_that_an_index_has(bundle):
    """Of the shipped bundle those of constraints.txt, of a training those that it ran with; never a local build."""
    told = meta(bundle)
    ours = told["required_packages_version"] | {
        name: told[f"{key}_version"] for name, key in (("monai", "monai"), ("torch", "pytorch"), ("numpy", "numpy"))
    }
    assert "monai-deepgmm" not in ours  # it is on no index yet
    tried = dict(line.lower().split("==") for line in CONSTRAINTS.read_text("utf-8").splitlines() if "==" in line)
    for name, version in ours.items():
        assert re.fullmatch(r"[\d.]+", version), name
        assert version == (tried[name.lower()] if bundle.name == "shipped" else metadata.version(name).split("+")[0])


def test_the_network_fits_the_metadata_and_can_be_exported(bundle, tmp_path):
    files = {"meta_file": str(bundle / "configs" / "metadata.json")}
    files |= {"config_file": str(bundle / "configs" / "inference.json"), "net_id": "network_def"}
    verify_net_in_out(**files, device="cpu", bundle_root=str(bundle))
    weights, exported = str(bundle / "models" / "model.pt"), tmp_path / "model.ts"
    ckpt_export(**files, filepath=str(exported), ckpt_file=weights, bundle_root=str(bundle))
    parser = ConfigParser(json.loads(Path(files["config_file"]).read_text(encoding="utf-8")))
    network = parser.get_parsed_content("network_def").eval()
    network.load_state_dict(torch.load(weights, weights_only=True))
    image = torch.randn(1, 4, 64, 64, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(torch.jit.load(str(exported))(image), network(image))


def test_onnx_export(bundle, tmp_path):
    pytest.importorskip("onnx")
    pytest.importorskip("onnxscript")
    if bundle.name == "shipped":
        pytest.skip("the same network, and large")
    onnx_export(
        net_id="network_def",
        filepath=str(tmp_path / "model.onnx"),
        ckpt_file=str(bundle / "models" / "model.pt"),
        meta_file=str(bundle / "configs" / "metadata.json"),
        config_file=str(bundle / "configs" / "inference.json"),
        input_shape=[1, 4, 64, 64],
        bundle_root=str(bundle),
    )
    assert (tmp_path / "model.onnx").stat().st_size > 1000


@pytest.mark.parametrize("name", ["train", "inference", "evaluate"])
def test_a_workflow_has_monais_properties(bundle, patients, name):
    assert workflow(bundle, name, dataset_dir=patients).check_properties() == []


def test_evaluation_on_its_own_segments_first(bundle, patients, tmp_path):
    run = workflow(bundle, "evaluate", dataset_dir=patients, output_dir=tmp_path, patients=["pat1"])
    run.run()
    run.finalize()
    assert labels(tmp_path, "pat1").any()
    assert json.loads((tmp_path / "evaluation.json").read_text(encoding="utf-8"))["dice"]["blood"]["n"] > 0
    assert "pat1" in (tmp_path / "agreement.html").read_text(encoding="utf-8")


def test_evaluation_is_inference_and_more(bundle):
    """Each file stands on its own, so what they share is written twice."""
    inference, evaluation = (
        json.loads((bundle / "configs" / f"{name}.json").read_text("utf-8")) for name in ("inference", "evaluate")
    )
    own = {"imports", "run", "finalize"}
    assert {k: v for k, v in inference.items() if k not in own} == {k: evaluation[k] for k in inference if k not in own}
    assert set(inference["imports"]) < set(evaluation["imports"])


class Recorder:
    """Takes the place of MLflow's handler: what MONAI gave it, and what it was told."""

    told: list = []  # noqa: RUF012

    def __init__(self, output_transform=None, tag_name="", **given):
        self.output_transform, self.tag_name, self.given = output_transform, tag_name, given

    def attach(self, engine):
        if self.given["iteration_log"]:
            engine.add_event_handler(Events.ITERATION_COMPLETED, self.iteration)
        engine.add_event_handler(Events.EPOCH_COMPLETED, self.epoch)

    def iteration(self, engine):
        self.told.append((self.tag_name, float(self.output_transform(engine.state.output))))

    def epoch(self, engine):
        self.told.append(("epoch", dict(engine.state.metrics)))


@pytest.fixture
def tracked(monkeypatch) -> list:
    place = "monai.handlers.mlflow_handler"
    monkeypatch.setattr(Recorder, "__module__", place)  # MONAI finds its classes by the module that they come from
    monkeypatch.setattr(f"{place}.MLFlowHandler", Recorder)
    monkeypatch.setattr(Recorder, "told", [])
    return Recorder.told


def test_tracking_a_training_and_validating_every_other_epoch(bundle, patients, tmp_path, tracked):
    if bundle.name == "trained":
        pytest.skip("it would go on in the folder that other tests look at")
    asked = {"network": TINY, "epochs": 5, "val_interval": 2, "set": {"batch_size": 2, "workers": 0}}
    places = {"dataset_dir": patients, "model_dir": tmp_path / "model", "output_dir": tmp_path / "eval"}
    run = workflow(bundle, "train", tracking="mlflow", **places, **asked)
    run.run()
    run.finalize()
    assert sum(tag == "train_loss" for tag, _ in tracked) == 5 * 4
    watched = [value["validation_loss"] for tag, value in tracked if tag == "epoch" and value]
    history = read_history(tmp_path / "model" / "training.tsv")
    assert [row["epoch"] for row in history] == [2, 4]
    assert watched == pytest.approx([row["validation_loss"] for row in history], rel=1e-4)
    assert len(list((tmp_path / "eval").glob("config_*.json"))) == 1


def test_more_epochs_between_validations_than_there_are_is_refused(patients, tmp_path):
    places = {"dataset_dir": patients, "model_dir": tmp_path / "model"}
    with pytest.raises(RuntimeError) as refused:
        workflow(CONFIGS.parent, "train", **places, network=TINY, epochs=2, val_interval=3).run()
    cause = refused.value
    while cause.__cause__ is not None:
        cause = cause.__cause__
    assert "val_interval: got 3, expected 1 to 2" in str(cause)


def test_tracking_an_inference(bundle, patients, tmp_path, tracked):
    chosen = ["pat1", "pat2"]
    run = workflow(bundle, "inference", tracking="mlflow", dataset_dir=patients, output_dir=tmp_path, patients=chosen)
    run.run()
    run.finalize()
    ((tag, told),) = tracked
    assert (tag, told["ok"], told["failed"]) == ("epoch", 2, 0)
    assert told["seconds"] > 0


def test_mlflow_itself_keeps_the_runs(patients, tmp_path):
    mlflow = pytest.importorskip("mlflow")
    places = {"dataset_dir": patients, "output_dir": tmp_path / "out", "patients": ["pat1"]}
    run = workflow(CONFIGS.parent, "inference", tracking="mlflow", **places, method="gmm", set={"max_iter": 10})
    run.run()
    run.finalize()
    client = mlflow.MlflowClient(f"sqlite:///{tmp_path / 'out' / 'mlruns.db'}")
    (experiment,) = (e for e in client.search_experiments() if e.name == "monai_experiment")
    (kept,) = client.search_runs([experiment.experiment_id])
    assert kept.info.status == "FINISHED"
    assert (kept.data.metrics["ok"], kept.data.metrics["failed"]) == (1, 0)


def test_a_wrong_folder_ends_with_one_line(tmp_path):
    typed = ("--config_file", str(CONFIGS / "inference.json"), "--dataset_dir", str(tmp_path / "nowhere"))
    command = [sys.executable, "-m", "monai.bundle", "run", *typed, "--output_dir", str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=tmp_path)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert done.stderr.splitlines()[-1].startswith("monai-deepgmm: there is no folder")


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (UsageError("mend it"), 2),
        (StudyError("E_WRITE", "mend it", "so"), 2),
        (StudyError("E_DISK", "mend it", "so"), 4),
        (OSError(2, "mend it"), 2),
        (KeyError(), 0),
    ],
)
def test_only_what_a_user_can_mend_is_one_line(monkeypatch, capsys, error, code):
    before = []
    monkeypatch.setattr(sys, "excepthook", lambda *args: before.append(args))
    terminal.end_with_one_line()
    wrapped = RuntimeError("the parser's own")
    wrapped.__cause__ = error
    if code == 0:
        sys.excepthook(RuntimeError, wrapped, None)
        assert len(before) == 1
        return
    with pytest.raises(SystemExit) as stopped:
        sys.excepthook(RuntimeError, wrapped, None)
    assert (stopped.value.code, before) == (code, [])
    assert "mend it" in capsys.readouterr().err
