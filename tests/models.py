"""Models that never saw a patient, in folders."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from monai_deepgmm import protocol
from monai_deepgmm.methods import trained_network, training_config
from monai_deepgmm.methods.model_spec import SPEC, WEIGHTS, ModelSpec

INFARCT = protocol.load("infarct")
TINY = {"_target_": "monai_deepgmm.networks.UNet", "filters": [4, 8]}


def specified(*, method: str = "deepsvg", training: dict[str, Any] | None = None, **changes: Any) -> ModelSpec:
    """A tiny network for all sequences of the infarct protocol, taught by its signatures; ``training`` says else."""
    asked = {"teacher": "signature", "covariance": "diag", **(training or {})}
    settings = training_config.configure(asked, INFARCT, method=method)
    sequences = changes.get("sequences", INFARCT.sequences)
    usual = {
        "protocol": "infarct",
        "normalisation": settings.preprocessing.normalisation(INFARCT),
        "sequences": sequences,
        "tissues": tuple(t.name for t in INFARCT.visible(sequences)),
        "network": TINY,
        "spatial_dims": 2,
        "size": (64, 64),
        "training": settings,
    }
    return ModelSpec(**usual | changes)


def write(folder: Path, of: ModelSpec | None = None, *, seed: int = 0) -> Path:
    """As ``deepgmm train`` leaves it, but for the weights, which are as drawn."""
    of = of or specified()
    (folder / WEIGHTS).parent.mkdir(parents=True)
    (folder / SPEC).write_bytes(of.as_json())
    torch.save(trained_network.build(of, seed=seed).state_dict(), folder / WEIGHTS)
    return folder
