"""A cohort that is its own training set: every patient is fitted, one network learns from all the fits, and segments.

No label is involved, so the patients to be segmented may be those that are learnt from. The network lies in the
results' folder as any other trained model does, and can segment patients who come later.
"""

from __future__ import annotations

import dataclasses
import logging
import shutil
from pathlib import Path

from monai_deepgmm import spec
from monai_deepgmm.config import Config
from monai_deepgmm.errors import ChangedError
from monai_deepgmm.study import Cohort

#: Where in the results' folder the network lies.
MODEL = "model"

logger = logging.getLogger(__name__)


def taught(cohort: Cohort, out: Path, config: Config) -> Config:
    """Trains the cohort's network in ``out``, or goes on with a training that was interrupted.

    A training that began with other patients, files or options is begun anew: its network would not be this cohort's.

    Args:
        cohort: everyone.
        out: the results' folder.
        config: with the method cohort; its seed is the training's.

    Returns:
        The configuration with that model.

    Raises:
        UsageError: no patient can be trained on.
        StudyError: ``E_DISK`` or ``E_WRITE``.
    """
    from monai_deepgmm import bundled  # MONAI's engine takes seconds to import

    folder = out / MODEL
    options = {
        "cohort": cohort,
        "model_dir": str(folder),
        "protocol": config.protocol,
        "network": None if config.network is None else dict(config.network),
        "seed": config.seed,
        "frame": config.frame,
        "max_voxels": config.max_voxels,
        "device": config.device,
        "resume": True,
    }
    try:
        bundled.train(options)
    except ChangedError:
        logger.info("the cohort has changed: its network is trained anew")
        shutil.rmtree(folder)
        bundled.train(options)
    return dataclasses.replace(config, model=spec.read(folder, config.protocol))
