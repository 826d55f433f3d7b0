"""A cohort that is its own training set: every patient is fitted, one network learns from all the fits, and segments.

No label is involved, so the patients to be segmented may be those that are learnt from. The network lies in the
results' folder as any other trained model does, and can segment patients who come later.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import shutil
from pathlib import Path

from monai_deepgmm.errors import ChangedError, NobodyError
from monai_deepgmm.methods import model_spec
from monai_deepgmm.methods.cohort import CohortConfig
from monai_deepgmm.methods.config import Config
from monai_deepgmm.patients.study import Cohort

#: Where in the results' folder the network lies.
MODEL = "model"
#: Lies in the results' folder where that network was trained by this method, and may be trained anew by it.
MARKER = ".cohort"

logger = logging.getLogger(__name__)


def train_on_pseudo_labels(cohort: Cohort, out: Path, config: Config) -> Config:
    """Trains the cohort's network in ``out``, or goes on with a training that was interrupted.

    A training that began with other patients, files or options is begun anew: its network would not be this cohort's.

    Args:
        cohort: everyone.
        out: the results' folder.
        config: with the method cohort; its seed is the training's.

    Returns:
        The configuration with that model; without one if nobody can be trained on, and then nobody can be segmented
        either.

    Raises:
        UsageError: the model's folder holds another training.
        StudyError: ``E_DISK`` or ``E_WRITE``.
    """
    from monai_deepgmm.networks import registry
    from monai_deepgmm.training import bundle  # MONAI's engine takes seconds to import

    method = config.method
    if not isinstance(method, CohortConfig):
        raise ValueError(f"--method {method.name} trains no network on the cohort")
    folder, training = out / MODEL, method.training
    options = {
        "cohort": cohort,
        "model_dir": str(folder),
        "protocol": config.protocol,
        # As text: the configuration's parser would make a network of the mapping.
        "network": json.dumps(dict(method.network or registry.DEFAULT)),
        "method": training.method,
        "loss": training.loss,
        "set": {key: value for key, value in training.as_json().items() if key not in ("method", "loss")},
        "frame": training.preprocessing.frame,
        "max_voxels": training.preprocessing.max_voxels,
        "align": training.preprocessing.align,
        "seed": config.seed,
        "device": config.device,
        "trust_code": config.trusted,
        "resume": True,
    }
    marker = out / MARKER
    ours = marker.exists()
    if not folder.exists():
        marker.touch()
    try:
        bundle.train(options)
    except NobodyError:
        return config
    except ChangedError:
        if not ours:
            raise
        logger.info("the cohort has changed: its network is trained anew")
        shutil.rmtree(folder)
        bundle.train(options)
    model = model_spec.read(folder, config.protocol, trust_code=config.trusted)
    return dataclasses.replace(config, method=dataclasses.replace(method, model=model))
