"""What tests of several wings share: a tiny network, loaded patients, folders by what they hold, the bundle."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch
from monai.bundle import ConfigWorkflow, create_workflow
from numpy.typing import NDArray

from monai_deepgmm import protocol
from monai_deepgmm.cli import main
from monai_deepgmm.images.preprocessing import Preprocessing
from monai_deepgmm.patients import discovery
from monai_deepgmm.protocol import Protocol
from monai_deepgmm.training import dataset
from monai_deepgmm.training.dataset import Patient
from monai_deepgmm.training.handlers import CHECKPOINT, Clip, read_checkpoint

INFARCT, BRAIN = protocol.load("infarct"), protocol.load("brain")
#: A network as ``--network`` takes it.
TINY = "{_target_: monai_deepgmm.networks.UNet, filters: [4, 8]}"
#: Of a training by ``train`` on five patients with two slices each, of whom one is held out.
EPOCHS, STEPS = 3, 4
OPTIONS = ("--network", TINY, "--epochs", str(EPOCHS), "--set", "batch_size=2", "-q")
#: The bundle that comes with the package.
CONFIGS = Path(__file__).parents[1] / "bundle" / "configs"
#: MONAI warns that a configuration is code whenever it reads one.
QUIET = "ignore:parsing config_file"


def inference(*files: Path, **options: Any) -> ConfigWorkflow:
    """A bundle's inference with these files (or the shipped one) and options; paths may be given as such."""
    given = {key: str(value) if isinstance(value, Path) else value for key, value in options.items()}
    chosen = [str(file) for file in files or (CONFIGS / "inference.json",)]
    return create_workflow(config_file=chosen, workflow_type="infer", **given)


def loaded(folder: Path, *names: str, protocol: Protocol = INFARCT, **options: Any) -> list[Patient]:
    """Patients as a training loads them; none of them may fail."""
    studies = discovery.find(folder, protocol, patients=names).studies
    patients, failed = dataset.load(studies, protocol, Preprocessing(), **options)
    assert failed == {}
    return patients


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below a folder."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def write_mask(reference: Path, path: Path) -> Path:
    """Writes the mask that reference labels make."""
    image = nib.load(reference)
    nib.save(nib.Nifti1Image((np.asarray(image.dataobj) > 0).astype(np.uint8), image.affine, dtype=np.uint8), path)
    return path


def labels(out: Path, patient: str) -> NDArray[np.uint8]:
    """A patient's label map."""
    return np.asarray(nib.load(out / patient / f"{patient}_dseg.nii.gz").dataobj)


def sidecar(out: Path, patient: str) -> dict[str, Any]:
    """What is told of a patient's labels."""
    return json.loads((out / patient / f"{patient}_dseg.json").read_text(encoding="utf-8"))


def train(folder: Path, out: Path, *more: str) -> int:
    """A training by the command that takes no time."""
    return main(["train", str(folder), str(out), *OPTIONS, *more])


def equal(a: object, b: object) -> bool:
    """Whether two nested states hold the same, bit by bit."""
    if isinstance(a, dict):
        return isinstance(b, dict) and list(a) == list(b) and all(equal(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(equal, a, b))
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


def same_training(folder: Path, reference: Path) -> None:
    """Asserts that two trainings left the same, their checkpoints by what these hold."""
    ours, theirs = contents(folder), contents(reference)
    assert equal(read_checkpoint(folder / CHECKPOINT), read_checkpoint(reference / CHECKPOINT))
    assert set(ours) == set(theirs)
    assert [k for k in ours if ours[k] != theirs[k] and k != str(CHECKPOINT)] == []


def stop_at(monkeypatch: pytest.MonkeyPatch, *steps: int, error: type[BaseException] = KeyboardInterrupt) -> None:
    """Ctrl-C in the middle of these gradient steps, counted over all trainings to come."""
    count, clip = iter(range(1 << 30)), Clip.__call__

    def call(self, engine):
        if next(count) in steps:
            raise error
        clip(self, engine)

    monkeypatch.setattr(Clip, "__call__", call)
