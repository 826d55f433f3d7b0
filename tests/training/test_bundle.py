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
from monai import handlers
from monai.bundle import ConfigParser, ckpt_export, load, verify_net_in_out
from scenes import CONFIGS as SHIPPED
from scenes import INFARCT, QUIET, TINY, contents, inference, labels, sidecar

from monai_deepgmm import cli, commands
from monai_deepgmm.cli import main
from monai_deepgmm.methods import config, model_spec, trained_network
from monai_deepgmm.methods.model_spec import WEIGHTS
from monai_deepgmm.methods.trained_network import apply_network
from monai_deepgmm.patients import discovery
from monai_deepgmm.phantom import heart
from monai_deepgmm.results.segment import segment
from monai_deepgmm.training.bundle import CONFIGS, PAPERS
from monai_deepgmm.training.handlers import read_history
from monai_deepgmm.training.plan import plan
from monai_deepgmm.training.prepare import prepare_cohort

SEEN, UNSEEN = ("Phantom001", "Phantom002", "Phantom003", "Phantom004"), "Phantom005"
ASKED = ["--network", TINY, "-q", "--patients", *SEEN]
pytestmark = pytest.mark.filterwarnings(QUIET)


@pytest.fixture(scope="module")
def patients(tmp_path_factory) -> Path:
    """Four phantoms to train on, and one that no network has seen."""
    folder = tmp_path_factory.mktemp("bundle") / "patients"
    heart.write_cohort(folder, 5, seed=3, config=heart.PhantomConfig(slices=(2, 2)))
    return folder


@pytest.fixture(scope="module")
def trained(patients, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("bundle") / "model"
    assert main(["train", str(patients), str(out), *ASKED, "--epochs", "3", "--set", "lr=0.01", "workers=0"]) == 0
    return out


@pytest.fixture(scope="module")
def results(patients, trained, tmp_path_factory) -> Path:
    """What the command makes of the unseen patient, with its agreement by volume and then by slice."""
    out = tmp_path_factory.mktemp("bundle") / "results"
    method = ["--method", "network", "--model", str(trained)]
    assert main(["segment", str(patients), str(out), *method, "--patients", UNSEEN]) == 0
    for unit in ("volume", "slice"):
        assert main(["evaluate", str(out), str(patients), "--patients", UNSEEN, "--unit", unit]) == 0
        (out / "evaluation.json").rename(out / f"{unit}.json")
    return out


def files(folder: Path, *names: str) -> list[Path]:
    return [folder / "configs" / name for name in names]


def run(*typed: str, folder: Path) -> str:
    """A command in another folder, as typed; what it printed."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [sys.executable, "-m", *typed], cwd=folder, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_the_command_segments_an_unseen_patient(patients, results, trained):
    found = labels(results, UNSEEN)
    reference = np.asarray(nib.load(patients / UNSEEN / f"{UNSEEN}_gd.nii.gz").dataobj)
    assert ((found > 0) == np.isin(reference, (200, 500, 1220, 2221))).all()
    assert len(np.unique(found)) > 2
    told = sidecar(results, UNSEEN)
    assert told["method"] == "network"
    assert told["configuration"]["model"]["sha256"] == model_spec.read(trained, INFARCT).sha256
    assert str(trained) not in json.dumps(told)


def test_monai_bundle_run_gives_the_same_labels_and_agreement(patients, trained, results, tmp_path):
    """The inference and then the evaluation in one command."""
    printed = run(
        *("monai.bundle", "run", "--config_file", str([*map(str, files(trained, "inference.json", "evaluate.json"))])),
        *("--bundle_root", str(trained), "--dataset_dir", str(patients), "--output_dir", str(tmp_path / "out")),
        *("--patients", str([UNSEEN])),
        folder=tmp_path,
    )
    ours, theirs = (folder / UNSEEN / f"{UNSEEN}_dseg.nii.gz" for folder in (tmp_path / "out", results))
    assert ours.read_bytes() == theirs.read_bytes()
    assert (tmp_path / "out" / "evaluation.json").read_bytes() == (results / "slice.json").read_bytes()
    assert (tmp_path / "out" / "evaluation.tsv").read_bytes() == (results / "evaluation.tsv").read_bytes()
    assert "scar" in printed


@pytest.mark.parametrize("with_agreement", [False, True])
def test_inference_in_python_gives_the_same_labels_and_agreement(patients, trained, results, tmp_path, with_agreement):
    names = ["inference.json", "evaluate.json"] if with_agreement else ["inference.json"]
    places = {"bundle_root": trained, "dataset_dir": patients, "output_dir": tmp_path}
    unit = {"unit": "volume"} if with_agreement else {}
    workflow = inference(*files(trained, *names), **places, patients=[UNSEEN], **unit)
    assert workflow.check_properties() == []
    workflow.run()
    workflow.finalize()
    assert np.array_equal(labels(tmp_path, UNSEEN), labels(results, UNSEEN))
    assert sidecar(tmp_path, UNSEEN)["fingerprint"] == sidecar(results, UNSEEN)["fingerprint"]
    if with_agreement:
        assert (tmp_path / "evaluation.json").read_bytes() == (results / "volume.json").read_bytes()
        assert (results / "volume.json").read_bytes() != (results / "slice.json").read_bytes()


@pytest.mark.parametrize("kind", ["inference", "train"])
def test_the_loaded_network_gives_the_same_labels(patients, trained, results, kind):
    asked = config.build(model=trained, settings=["label_rule=network"])
    (study,) = discovery.find(patients, INFARCT, patients=[UNSEEN]).studies
    spec, wanted = asked.model.spec, segment(study, asked).labels

    def made(network) -> np.ndarray:
        def inferer(images):
            return apply_network(
                network, spec, images.image, images.mask, spacing_mm=images.spacing_mm, posterior=False
            )

        return segment(study, asked, inferer=inferer).labels

    network = load(trained.name, bundle_dir=str(trained.parent), workflow_type=kind, device="cpu").eval()
    weights = torch.load(trained / WEIGHTS, weights_only=True)
    assert all(torch.equal(v, weights[k]) for k, v in network.state_dict().items())
    assert np.array_equal(made(network), wanted)
    assert not np.array_equal(made(trained_network.build(spec, seed=7).eval()), wanted)  # the weights matter


@pytest.mark.parametrize("name", ["inference.json", "train.json"])
def test_the_network_fits_the_metadata(trained, name):
    meta, file = map(str, files(trained, "metadata.json", name))
    verify_net_in_out(net_id="network_def", meta_file=meta, config_file=file, device="cpu")
    verify_net_in_out(net_id="network_def", meta_file=meta, config_file=file, device="cpu", n=2, p=2)
    metadata = json.loads(Path(meta).read_text())
    inputs, outputs = (metadata["network_data_format"][k] for k in ("inputs", "outputs"))
    assert inputs["image"]["channel_def"] == {"0": "LGE", "1": "T2", "2": "bSSFP", "3": "relative depth"}
    assert outputs["pred"]["channel_def"] == {"0": "blood", "1": "myocardium", "2": "edema", "3": "scar"}
    assert metadata["data_source"] == "4 unlabelled patients of the user's own"


def test_the_exported_network_is_the_network(patients, trained, tmp_path):
    meta, file = map(str, files(trained, "metadata.json", "inference.json"))
    script = str(tmp_path / "model.ts")
    given = {"ckpt_file": str(trained / WEIGHTS), "meta_file": meta, "config_file": file}
    ckpt_export(net_id="network_def", filepath=script, **given)
    prepared = prepare_cohort(discovery.find(patients, INFARCT, patients=[UNSEEN]), plan())
    image = torch.stack([e["image"] for e in prepared.train])
    network = trained_network.load(model_spec.read(trained, INFARCT), "cpu")
    with torch.no_grad():
        torch.testing.assert_close(torch.jit.load(script).eval()(image), network(image))


def test_the_training_configuration_has_the_commands_options_and_defaults():
    raw = json.loads((SHIPPED / "train.json").read_text(encoding="utf-8"))
    parser = ConfigParser({k: v for k, v in raw.items() if k != "imports"})
    assert parser.get_parsed_content("plan") == plan()
    assert parser.get_parsed_content("settings") == plan().training
    assert raw["set"] == {}
    typed = vars(cli.parser().parse_args(["train", "in", "out"]))
    for key in set(typed) - {"command", "directory", "model_dir", "verbose", "quiet", "config", "save_config"}:
        default, ours = typed[key], raw[key]
        assert ours == default or (not ours and not default and type(default) in (list, tuple)), key
    assert {*commands.TRAIN_KEYS} <= set(raw)
    plain = {k for k, v in raw.items() if v is None or (isinstance(v, bool | int | str) and not str(v).startswith("$"))}
    assert plain - set(typed) == {"bundle_root", "net", "amp", "writes", "val_interval"} & plain


def test_a_models_training_can_be_repeated_from_its_folder_wherever_it_is_moved(patients, trained, tmp_path):
    """The folder's own train.json holds the plan that made it, the means and the protocol included."""

    def parser(model: Path) -> ConfigParser:
        found = ConfigParser(json.loads((model / "configs" / "train.json").read_text(encoding="utf-8")))
        found.update({"bundle_root": str(model), "dataset_dir": str(patients), "patients": list(SEEN)})
        return found

    again = parser(trained)
    asked = plan(network=TINY, epochs=3, settings={"lr": 0.01})
    assert again.get_parsed_content("plan").as_json() == asked.as_json()
    fingerprint = json.loads((trained / "provenance.json").read_text())["fingerprint"]
    assert again.get_parsed_content("prepared").fingerprint == fingerprint

    file, first = tmp_path / "means.json", tmp_path / "first"
    assert main(["means", str(patients), "-o", str(file), "--patients", *SEEN]) == 0
    assert main(["train", str(patients), str(first), *ASKED, "--epochs", "1", "--means", str(file)]) == 0
    known = json.loads(file.read_text())["means"]
    file.unlink()
    moved = first.rename(tmp_path / "moved")
    asked = parser(moved).get_parsed_content("plan")
    assert (asked.means.means, asked.protocol) == (known, INFARCT)
    assert str(tmp_path) not in "".join(p.read_text(encoding="utf-8") for p in moved.rglob("*.json"))
    places = {"bundle_root": moved, "dataset_dir": patients, "output_dir": tmp_path / "out"}
    assert inference(*files(moved, "inference.json"), **places, patients=[UNSEEN]).run() == [0]


def strings(content: object) -> list[str]:
    """Every key and value of a JSON file that is text."""
    if isinstance(content, dict):
        return [s for item in content.items() for part in item for s in strings(part)]
    if isinstance(content, list):
        return [s for part in content for s in strings(part)]
    return [content] if isinstance(content, str) else []


@pytest.mark.parametrize("where", ["shipped", "trained"])
def test_no_file_of_a_bundle_names_an_absolute_path_or_code_that_is_not_installed(where, trained):
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
        targets = re.findall(r'"_target_": "([^"]+)"', text)
        installed = ("monai_deepgmm.", "monai.", "torch.", "ignite.")
        assert all(t.startswith(installed) or hasattr(handlers, t) for t in targets), path.name


def test_a_models_folder_is_a_whole_bundle(trained):
    assert set(contents(trained)) == {
        *(f"configs/{name}" for name in CONFIGS),
        *PAPERS,
        *("models/model.pt", "models/checkpoint.pt", "model.json", "protocol.yaml"),
        *("provenance.json", "training.tsv", "training.svg"),
    }


def test_two_ranks_train_what_one_does(patients, trained, tmp_path):
    """On two processes by torchrun, each with half of the batch: equal weights, which are those of one process."""
    own = json.loads((SHIPPED / "multi_gpu_train.json").read_text(encoding="utf-8"))["run"]
    saved = "$torch.save(@network_def.state_dict(), str(Path(@model_dir).parent / ('rank%d.pt' % dist.get_rank())))"
    (tmp_path / "extra.json").write_text(json.dumps({"run": [*own, saved]}))
    configs = [SHIPPED / "train.json", SHIPPED / "multi_gpu_train.json", tmp_path / "extra.json"]
    run(
        *("torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m", "monai.bundle", "run"),
        *("--device", "cpu", "--config_file", str([*map(str, configs)]), "--dataset_dir", str(patients)),
        *("--model_dir", str(tmp_path / "model"), "--patients", str(list(SEEN)), "--network", TINY),
        *("--epochs", "3", "--set", "{'lr': 0.01, 'batch_size': 2}"),
        folder=tmp_path,
    )
    first, second = (torch.load(tmp_path / f"rank{rank}.pt", weights_only=True) for rank in (0, 1))
    assert all(torch.equal(first[k], second[k]) for k in first)
    assert set(contents(tmp_path / "model")) == set(contents(trained))
    for ours, theirs in zip(*(read_history(m / "training.tsv") for m in (tmp_path / "model", trained)), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-3)
    trained_network.load(model_spec.read(tmp_path / "model", INFARCT), "cpu")
