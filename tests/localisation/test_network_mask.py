"""Masks by another model's bundle, of the shape of the zoo's ventricular_short_axis_3label: through the command."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from chests import SEQUENCES, SPACING, body, dice
from monai.networks.nets import UNet
from scenes import CONFIGS, QUIET, inference, labels, sidecar
from scipy.ndimage import binary_erosion

from monai_deepgmm import cli, protocol
from monai_deepgmm.errors import UsageError
from monai_deepgmm.localisation import network_mask, segmentation_bundle
from monai_deepgmm.patients import discovery

INFARCT = protocol.load("infarct")
ZOO = "ventricular_short_axis_3label"
NETWORK = {"spatial_dims": 2, "in_channels": 1, "out_channels": 4, "channels": [8, 16, 32], "strides": [2, 2]}
LOAD = [
    {"_target_": "LoadImaged", "keys": "image", "image_only": False},
    {"_target_": "EnsureChannelFirstd", "keys": "image"},
]
CONFIG = {
    "imports": ["$import glob"],
    "bundle_root": ".",
    "device": "$torch.device('cuda:0' if torch.cuda.is_available() else 'cpu')",
    "network_def": {"_target_": "UNet", **NETWORK},
    "network": "$@network_def.to(@device)",
    "preprocessing": {
        "_target_": "Compose",
        "transforms": [
            *LOAD,
            {"_target_": "ScaleIntensityd", "keys": "image"},
            {"_target_": "EnsureTyped", "keys": "image", "device": "@device"},
        ],
    },
    "inferer": {"_target_": "SliceInferer", "roi_size": [128, 112], "spatial_dim": 2},
}


@pytest.fixture(scope="module")
def zoo(tmp_path_factory):
    """A bundle that has learnt pool (1) and wall (2) on bSSFP within seconds."""
    root = tmp_path_factory.mktemp("bundles") / ZOO
    images, targets = [], []
    for seed, (centre, radius) in enumerate([((70, 58), 30), ((60, 50), 27), ((64, 64), 33)]):
        image, truth = body(centre, radius, slices=2, seed=10 + seed)
        for z in range(2):
            one = image[2, ..., z]
            pool = binary_erosion(truth[..., z], iterations=6)
            images.append((one - one.min()) / np.ptp(one))
            targets.append(np.where(pool, 1, np.where(truth[..., z], 2, 0)))
    x, y = torch.tensor(np.stack(images), dtype=torch.float32)[:, None], torch.tensor(np.stack(targets))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = UNet(**NETWORK)
        optimizer = torch.optim.Adam(network.parameters(), 0.02)
        for _ in range(40):
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(network(x), y, weight=torch.tensor([0.3, 1, 1, 1.0])).backward()
            optimizer.step()
    write(root, CONFIG)
    (root / "models").mkdir()
    torch.save(network.state_dict(), root / "models" / "model.pt")
    return root


def write(root: Path, config: object) -> Path:
    (root / "configs").mkdir(parents=True, exist_ok=True)
    (root / "configs" / "inference.json").write_text(json.dumps(config))
    return root


def changed(zoo, folder, **changes):
    """A copy of the bundle whose configuration says something else."""
    return write(shutil.copytree(zoo, folder), {**CONFIG, **changes})


@pytest.fixture(scope="module")
def cohort(tmp_path_factory):
    """A heart, and one without bSSFP; slices along the first axis."""
    base = tmp_path_factory.mktemp("hearts") / "in"
    image, truth = body(slices=2)
    for patient, kept in (("heart", SEQUENCES), ("lacks", SEQUENCES[:2])):
        (base / patient).mkdir(parents=True)
        for name in kept:
            one = image[SEQUENCES.index(name)].transpose(2, 0, 1).astype(np.int16)
            nib.save(nib.Nifti1Image(one, np.diag([10.0, *SPACING[:2], 1])), base / patient / f"{name}.nii.gz")
    return base, truth.transpose(2, 0, 1)


def run(*arguments):
    return cli.main([str(a) for a in arguments])


def rows(path):
    return {row["patient"]: row for row in csv.DictReader(path.read_text().splitlines(), delimiter="\t")}


def test_the_preset_segments_and_a_patient_without_its_sequence_fails_alone(cohort, zoo, tmp_path):
    assert run("segment", cohort[0], tmp_path / "out", "--mask-from", zoo, "--method", "gmm") == 1
    found = labels(tmp_path / "out", "heart") > 0
    assert dice(found, cohort[1]) > 0.9
    told = sidecar(tmp_path / "out", "heart")["inputs"]["mask"]
    assert (told["bundle"], told["sequence"], told["labels"]) == (ZOO, "bSSFP", [1, 2])
    assert told["confidence"] > 0.5
    table = rows(tmp_path / "out" / "summary.tsv")
    assert f"W_MASK_AUTO: the left ventricle was found by the bundle {ZOO} on bSSFP" in table["heart"]["warnings"]
    assert (table["lacks"]["code"], "bSSFP, which this patient lacks" in table["lacks"]["message"]) == ("E_MODEL", True)
    # Another bundle is another result.
    dry = ["segment", cohort[0], tmp_path / "out", "--method", "gmm", "--patients", "heart", "--dry-run"]
    again = discovery.find(cohort[0], INFARCT, patients=["heart"]).studies[0]
    assert again.mask_model is None
    assert run(*dry, "--mask-from", zoo) == 0


def test_masks_are_written_to_be_corrected(cohort, zoo, tmp_path):
    assert run("mask", cohort[0], tmp_path / "masks", "--mask-from", zoo) == 1
    assert float(rows(tmp_path / "masks" / "masks.tsv")["heart"]["confidence"]) > 0.5
    written = nib.load(tmp_path / "masks" / "heart" / "heart_desc-lv_mask.nii.gz")
    assert dice(np.asarray(written.dataobj) > 0, cohort[1]) > 0.9


@pytest.mark.filterwarnings(QUIET)
def test_the_bundle_of_this_package_knows_the_option(cohort, zoo, tmp_path):
    keys = {"dataset_dir": cohort[0], "output_dir": tmp_path, "mask_from": zoo, "patients": ["heart"], "method": "gmm"}
    workflow = inference(CONFIGS / "inference.json", **keys)
    workflow.initialize()
    workflow.run()
    assert dice(labels(tmp_path, "heart") > 0, cohort[1]) > 0.9


def test_other_spacings_and_overlapping_labels_come_back_on_the_images_grid(zoo, tmp_path):
    image, truth = body(slices=2)
    steps = [
        *LOAD,
        {"_target_": "Spacingd", "keys": ["image"], "pixdim": [1.6, 1.6, -1], "mode": "bilinear"},
        {"_target_": "ScaleIntensityd", "keys": ["image"]},
    ]
    root = changed(zoo, tmp_path / "spaced", preprocessing={"_target_": "Compose", "transforms": steps}, inferer=None)
    model = segmentation_bundle.asked(root, "bSSFP", (1, 2), INFARCT)
    finer = np.repeat(np.repeat(image[2], 2, 0), 2, 1)
    found = network_mask.find(model, finer, np.diag([0.8, 0.8, 10, 1.0]), 2)
    assert found.mask.shape == finer.shape
    assert dice(found.mask, np.repeat(np.repeat(truth, 2, 0), 2, 1)) > 0.85
    sigmoid = {"_target_": "Compose", "transforms": [{"_target_": "Activationsd", "keys": "pred", "sigmoid": True}]}
    root = changed(zoo, tmp_path / "sigmoid", postprocessing=sigmoid)
    model = segmentation_bundle.asked(root, "bSSFP", (2, 3), INFARCT)  # counted from 1: the channels 1 and 2
    assert dice(network_mask.find(model, image[2], np.diag([*SPACING, 1.0]), 2).mask, truth) > 0.5


@pytest.mark.parametrize(
    ("part", "said"),
    [
        ({"network_def": {"_target_": "os.system", "command": "touch evil.ran"}}, "is no network that this software"),
        ({"network_def": {"_target_": "UNet", "channels": "$__import__('os').system('touch evil.ran')"}}, "without $"),
        (
            {"preprocessing": {"_target_": "Compose", "transforms": [{"_target_": "Lambdad", "keys": "image"}]}},
            "Lambdad",
        ),
        ({"preprocessing": "$__import__('os').system('touch evil.ran')"}, "preprocessing"),
        (
            {"preprocessing": {"_target_": "Compose", "transforms": [{"_target_": "Resized", "keys": "$1"}]}},
            "without $",
        ),
        ({"inferer": {"_target_": "evil.Inferer"}}, "inferer: 'evil.Inferer'"),
    ],
)
def test_a_strangers_configuration_is_code_and_is_not_run(cohort, zoo, tmp_path, monkeypatch, capsys, part, said):
    monkeypatch.chdir(tmp_path)
    root = changed(zoo, tmp_path / ZOO, **part)
    assert run("segment", cohort[0], tmp_path / "out", "--mask-from", root) == 2
    told = capsys.readouterr().err
    assert said in told
    assert "--trust-code" in told
    assert not list(tmp_path.rglob("*.ran"))
    assert not (tmp_path / "out").exists()


def test_with_trust_its_code_is_run_and_that_is_said(zoo, tmp_path, caplog):
    image, truth = body(slices=2)
    root = changed(
        zoo, tmp_path / ZOO, network_def={"_target_": "UNet", **NETWORK, "channels": "$[8 * 2**i for i in range(3)]"}
    )
    model = segmentation_bundle.asked(root, None, (), INFARCT, trust_code=True)
    assert model.trusted
    assert "its code is run" in caplog.text or "code is run" in caplog.text
    assert dice(network_mask.find(model, image[2], np.diag([*SPACING, 1.0]), 2).mask, truth) > 0.9
    assert segmentation_bundle.asked(zoo, None, (), INFARCT, trust_code=True).trusted is False


def test_weights_that_do_not_fit_or_are_damaged_fail_the_patient(cohort, zoo, tmp_path):
    root = changed(zoo, tmp_path / ZOO)
    (root / "models" / "model.pt").write_bytes((zoo / "models" / "model.pt").read_bytes()[:-200])
    assert run("segment", cohort[0], tmp_path / "out", "--mask-from", root, "--patients", "heart") == 3
    assert rows(tmp_path / "out" / "summary.tsv")["heart"]["code"] == "E_MODEL"


def test_what_is_missing_is_asked_for(cohort, zoo, tmp_path):
    other = changed(zoo, tmp_path / "mine")
    (tmp_path / "empty").mkdir()
    for options, said in (
        ((other, None, ()), "which sequence does it look at"),
        ((other, "T1", (1,)), "which sequence does it look at"),
        ((other, "bSSFP", ()), "which of its labels"),
        ((other, "bSSFP", (0, 1)), "which of its labels"),
        ((tmp_path / "gone", None, ()), "no such folder"),
        ((tmp_path / "empty", None, ()), "there is no file"),
        ((None, "bSSFP", ()), "goes with --mask-from"),
        ((write(tmp_path / "bare", {}), None, ()), "has no network_def"),
    ):
        with pytest.raises(UsageError, match=said):
            segmentation_bundle.asked(*options, INFARCT)
    assert run("segment", cohort[0], tmp_path / "o", "--mask-from", zoo, "--mask", "auto") == 2
    assert run("segment", cohort[0], tmp_path / "o", "--mask-from", other) == 2
