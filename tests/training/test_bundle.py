"""A training's folder as a MONAI bundle: the command, ``monai.bundle run`` and Python give the same labels."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from monai.bundle import ConfigParser, ckpt_export, create_workflow, load, verify_net_in_out

from monai_deepgmm import cli, commands, protocol
from monai_deepgmm.cli import main
from monai_deepgmm.methods import config
from monai_deepgmm.methods import trained_network as model
from monai_deepgmm.networks import model_spec as spec
from monai_deepgmm.networks.model_spec import WEIGHTS
from monai_deepgmm.patients import discovery as cohort
from monai_deepgmm.phantom import heart as phantom
from monai_deepgmm.results import segment
from monai_deepgmm.training import prepare as training
from monai_deepgmm.training.bundle import CONFIGS
from monai_deepgmm.training.handlers import read_history

SHIPPED = Path(__file__).parents[2] / "bundle" / "configs"
INFARCT = protocol.load("infarct")
TINY = "{_target_: monai_deepgmm.networks.UNet, filters: [4, 8]}"
SEEN = ("Phantom001", "Phantom002", "Phantom003", "Phantom004")
UNSEEN = "Phantom005"
#: MONAI warns that a configuration is code whenever it reads one.
pytestmark = pytest.mark.filterwarnings("ignore:parsing config_file")


@pytest.fixture(scope="module")
def patients(tmp_path_factory) -> Path:
    """Four phantoms to train on, and one that no network has seen."""
    folder = tmp_path_factory.mktemp("bundle") / "patients"
    phantom.write_cohort(folder, 5, seed=3, config=phantom.PhantomConfig(slices=(2, 2)))
    return folder


@pytest.fixture(scope="module")
def trained(patients, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("bundle") / "model"
    asked = ["--network", TINY, "--epochs", "3", "--set", "lr=0.01", "workers=0", "--patients", *SEEN]
    assert main(["train", str(patients), str(out), "-q", *asked]) == 0
    return out


@pytest.fixture(scope="module")
def results(patients, trained, tmp_path_factory) -> Path:
    """What the command makes of the unseen patient, with its agreement."""
    out = tmp_path_factory.mktemp("bundle") / "results"
    method = ["--method", "network", "--model", str(trained)]
    assert main(["segment", str(patients), str(out), *method, "--patients", UNSEEN]) == 0
    assert main(["evaluate", str(out), str(patients), "--patients", UNSEEN]) == 0
    return out


def labels(out: Path) -> np.ndarray:
    return np.asarray(nib.load(out / UNSEEN / f"{UNSEEN}_dseg.nii.gz").dataobj)


def bundle(folder: Path, *names: str) -> list[str]:
    return [str(folder / "configs" / name) for name in names]


# One network, three ways ---------------------------------------------------------------------------------------------


def test_the_command_segments_an_unseen_patient(patients, results, trained):
    found = labels(results)
    truth = np.asarray(nib.load(patients / UNSEEN / f"{UNSEEN}_gd.nii.gz").dataobj)
    assert ((found > 0) == np.isin(truth, (200, 500, 1220, 2221))).all()
    assert len(np.unique(found)) > 2
    sidecar = json.loads((results / UNSEEN / f"{UNSEEN}_dseg.json").read_text())
    assert sidecar["method"] == "network"
    assert sidecar["configuration"]["model"]["sha256"] == spec.read(trained, INFARCT).sha256
    assert str(trained) not in json.dumps(sidecar)


def test_monai_bundle_run_gives_the_same_labels_and_agreement(patients, trained, results, tmp_path):
    """As typed: the inference and then the evaluation in one command, from another folder."""
    typed = [
        *(sys.executable, "-m", "monai.bundle", "run"),
        *("--config_file", str(bundle(trained, "inference.json", "evaluate.json"))),
        *("--bundle_root", str(trained), "--dataset_dir", str(patients), "--output_dir", str(tmp_path / "out")),
        *("--patients", str([UNSEEN])),
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        typed, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False, timeout=300
    )
    assert done.returncode == 0, done.stderr
    ours, theirs = (folder / UNSEEN / f"{UNSEEN}_dseg.nii.gz" for folder in (tmp_path / "out", results))
    assert ours.read_bytes() == theirs.read_bytes()
    for name in ("evaluation.json", "evaluation.tsv"):
        assert (tmp_path / "out" / name).read_bytes() == (results / name).read_bytes()
    assert "scar" in done.stdout


def test_inference_alone_gives_the_same_labels(patients, trained, results, tmp_path):
    workflow = create_workflow(
        config_file=bundle(trained, "inference.json"),
        workflow_type="infer",
        bundle_root=str(trained),
        dataset_dir=str(patients),
        output_dir=str(tmp_path / "out"),
        patients=[UNSEEN],
    )
    assert workflow.check_properties() == []
    assert workflow.run() == [0]
    workflow.finalize()
    assert np.array_equal(labels(tmp_path / "out"), labels(results))


@pytest.mark.parametrize("kind", ["inference", "train"])
def test_the_loaded_network_gives_the_same_labels(patients, trained, results, kind):
    network = load(trained.name, bundle_dir=str(trained.parent), workflow_type=kind, device="cpu").eval()
    weights = torch.load(trained / WEIGHTS, weights_only=True)
    assert all(torch.equal(v, weights[k]) for k, v in network.state_dict().items())
    (study,) = cohort.find(patients, INFARCT, patients=[UNSEEN]).studies
    made = segment.segment(study, config.build(model=trained), network=network)
    assert np.array_equal(made.labels, labels(results))
    fresh = model.build(spec.read(trained, INFARCT).spec, seed=7).eval()
    other = segment.segment(study, config.build(model=trained), network=fresh)
    assert not np.array_equal(other.labels, made.labels)  # the weights matter


def test_evaluation_by_volume_is_the_commands_too(patients, trained, results, tmp_path):
    assert main(["evaluate", str(results), str(patients), "--patients", UNSEEN, "--unit", "volume"]) == 0
    wanted = (results / "evaluation.json").read_bytes()
    assert main(["evaluate", str(results), str(patients), "--patients", UNSEEN]) == 0
    assert (results / "evaluation.json").read_bytes() != wanted
    workflow = create_workflow(
        config_file=bundle(trained, "inference.json", "evaluate.json"),
        workflow_type="infer",
        bundle_root=str(trained),
        dataset_dir=str(patients),
        output_dir=str(tmp_path / "out"),
        patients=[UNSEEN],
        unit="volume",
    )
    workflow.run()
    assert (tmp_path / "out" / "evaluation.json").read_bytes() == wanted


# MONAI's tools -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["inference.json", "train.json"])
def test_the_network_fits_the_metadata(trained, name):
    (meta, file) = bundle(trained, "metadata.json", name)
    verify_net_in_out(net_id="network_def", meta_file=meta, config_file=file, device="cpu")
    verify_net_in_out(net_id="network_def", meta_file=meta, config_file=file, device="cpu", n=2, p=2)


def test_the_metadata_tells_the_channels(trained):
    metadata = json.loads((trained / "configs" / "metadata.json").read_text())
    inputs, outputs = (metadata["network_data_format"][k] for k in ("inputs", "outputs"))
    assert inputs["image"]["channel_def"] == {"0": "LGE", "1": "T2", "2": "bSSFP", "3": "relative depth"}
    assert outputs["pred"]["channel_def"] == {"0": "blood", "1": "myocardium", "2": "edema", "3": "scar"}
    assert metadata["data_source"] == "4 unlabelled patients of the user's own"


def test_the_exported_network_is_the_network(patients, trained, tmp_path):
    (meta, file) = bundle(trained, "metadata.json", "inference.json")
    ckpt_export(
        net_id="network_def",
        filepath=str(tmp_path / "model.ts"),
        ckpt_file=str(trained / WEIGHTS),
        meta_file=meta,
        config_file=file,
    )
    script = torch.jit.load(tmp_path / "model.ts").eval()
    network = model.load(spec.read(trained, INFARCT), "cpu")
    (study,) = cohort.find(patients, INFARCT, patients=[UNSEEN]).studies
    prepared = training.prepare(cohort.Cohort(patients, "myops", (study,)), training.plan())
    image = torch.stack([e["image"] for e in prepared.train])
    with torch.no_grad():
        torch.testing.assert_close(script(image), network(image))


# Configurations ------------------------------------------------------------------------------------------------------


def test_the_training_configuration_has_the_commands_options_and_defaults():
    raw = json.loads((SHIPPED / "train.json").read_text(encoding="utf-8"))
    parser = ConfigParser({k: v for k, v in raw.items() if k != "imports"})
    assert parser.get_parsed_content("plan") == training.plan()
    assert parser.get_parsed_content("settings") == training.plan().settings
    assert raw["set"] == {}
    typed = vars(cli.parser().parse_args(["train", "in", "out"]))
    own = {"command", "directory", "model_dir", "verbose", "quiet"}
    for key in set(typed) - own:
        default, ours = typed[key], raw[key]
        assert ours == default or (not ours and not default and type(default) in (list, tuple)), key
    assert {*commands.TRAIN_KEYS} <= set(raw)
    plain = {k for k, v in raw.items() if v is None or (isinstance(v, bool | int | str) and not str(v).startswith("$"))}
    assert plain - set(typed) == {"bundle_root", "net", "amp", "writes"} & plain


def test_a_models_training_can_be_repeated_from_its_folder(patients, trained):
    """The folder's own train.json holds the plan that made it."""
    parser = ConfigParser(json.loads((trained / "configs" / "train.json").read_text(encoding="utf-8")))
    parser["bundle_root"] = str(trained)
    parser["dataset_dir"] = str(patients)
    parser["patients"] = list(SEEN)
    asked = training.plan(network=TINY, epochs=3, settings={"lr": 0.01})
    again = parser.get_parsed_content("plan")
    assert again.as_json() == asked.as_json()
    fingerprint = json.loads((trained / "provenance.json").read_text())["fingerprint"]
    assert parser.get_parsed_content("prepared").fingerprint == fingerprint


def test_a_model_keeps_its_means_and_protocol_wherever_it_is_moved(patients, tmp_path):
    file = tmp_path / "means.json"
    assert main(["means", str(patients), "-o", str(file), "--patients", *SEEN]) == 0
    first = tmp_path / "first"
    asked = ["--network", TINY, "--epochs", "1", "--means", str(file), "--patients", *SEEN]
    assert main(["train", str(patients), str(first), "-q", *asked]) == 0
    known = json.loads(file.read_text())["means"]
    file.unlink()
    moved = first.rename(tmp_path / "moved")
    parser = ConfigParser(json.loads((moved / "configs" / "train.json").read_text(encoding="utf-8")))
    parser["bundle_root"] = str(moved)
    asked = parser.get_parsed_content("plan")
    assert asked.means.means == known
    assert asked.protocol == INFARCT
    assert str(tmp_path) not in "".join(p.read_text(encoding="utf-8") for p in moved.rglob("*.json"))
    workflow = create_workflow(
        config_file=bundle(moved, "inference.json"),
        workflow_type="infer",
        bundle_root=str(moved),
        dataset_dir=str(patients),
        output_dir=str(tmp_path / "out"),
        patients=[UNSEEN],
    )
    assert workflow.run() == [0]


def strings(content: object) -> list[str]:
    """Every key and value of a JSON file that is text."""
    if isinstance(content, dict):
        return [s for item in content.items() for part in item for s in strings(part)]
    if isinstance(content, list):
        return [s for part in content for s in strings(part)]
    return [content] if isinstance(content, str) else []


@pytest.mark.parametrize("where", ["shipped", "trained"])
def test_no_file_of_a_bundle_names_an_absolute_path(where, trained):
    root = SHIPPED if where == "shipped" else trained
    texts = [p for p in root.rglob("*") if p.suffix in (".json", ".yaml", ".conf", ".tsv", ".svg")]
    assert len(texts) >= 6
    for path in texts:
        text = path.read_text(encoding="utf-8")
        for part in (*trained.parts[1:-1], *(os.environ.get(k) or "\0" for k in ("HOME", "USER"))):
            if len(part) > 4:
                assert part not in text, path.name
        if path.suffix == ".json":
            found = [s for s in strings(json.loads(text)) if re.match(r"(/|~|[A-Za-z]:\\|file:)", s)]
            assert found == [], path.name


def test_a_models_folder_is_a_whole_bundle(trained):
    files = {str(p.relative_to(trained)) for p in trained.rglob("*") if p.is_file()}
    assert files == {
        *(f"configs/{name}" for name in CONFIGS),
        *("models/model.pt", "models/checkpoint.pt", "model.json", "protocol.yaml"),
        *("provenance.json", "training.tsv", "training.svg"),
    }


def test_every_target_is_installed_code(trained):
    known = ("monai_deepgmm.", "monai.", "torch.", "ignite.")
    for root in (SHIPPED, trained / "configs"):
        for path in root.glob("*.json"):
            targets = re.findall(r'"_target_": "([^"]+)"', path.read_text(encoding="utf-8"))
            assert all(t.startswith(known) for t in targets), path.name


# Several processes ---------------------------------------------------------------------------------------------------


def test_two_ranks_train_what_one_does(patients, trained, tmp_path):
    """On two processes by torchrun, each with half of the batch: equal weights, which are those of one process."""
    extra = json.loads((SHIPPED / "multi_gpu_train.json").read_text(encoding="utf-8"))["run"]
    saved = "$torch.save(@network_def.state_dict(), str(Path(@model_dir).parent / ('rank%d.pt' % dist.get_rank())))"
    (tmp_path / "extra.json").write_text(json.dumps({"run": [*extra, saved]}))
    typed = [
        *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"),
        *("-m", "monai.bundle", "run", "--device", "cpu"),
        *(
            "--config_file",
            str([*map(str, (SHIPPED / "train.json", SHIPPED / "multi_gpu_train.json")), str(tmp_path / "extra.json")]),
        ),
        *("--dataset_dir", str(patients), "--model_dir", str(tmp_path / "model"), "--patients", str(list(SEEN))),
        *("--network", TINY, "--epochs", "3", "--set", "{'lr': 0.01, 'batch_size': 2}"),
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        typed, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]
    first, second = (torch.load(tmp_path / f"rank{rank}.pt", weights_only=True) for rank in (0, 1))
    assert all(torch.equal(first[k], second[k]) for k in first)
    names = {str(p.relative_to(trained)) for p in trained.rglob("*") if p.is_file()}
    assert {str(p.relative_to(tmp_path / "model")) for p in (tmp_path / "model").rglob("*") if p.is_file()} == names
    for ours, theirs in zip(*(read_history(m / "training.tsv") for m in (tmp_path / "model", trained)), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-3)
    model.load(spec.read(tmp_path / "model", INFARCT), "cpu")
