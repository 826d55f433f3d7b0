"""Segment medical images without training labels, by Gaussian mixture models with the help of deep networks.

What a script needs stands here, and is imported when it is first used: ``import monai_deepgmm`` loads neither torch
nor MONAI.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # the same names for type checkers and editors
    from monai_deepgmm.methods.config import Config
    from monai_deepgmm.methods.config import build as configure
    from monai_deepgmm.mixture.em import fit_em
    from monai_deepgmm.mixture.fit import Fit
    from monai_deepgmm.mixture.gaussian import Mixture
    from monai_deepgmm.networks.gmm_loss import GMMLoss
    from monai_deepgmm.networks.nll_loss import MixtureNLL
    from monai_deepgmm.networks.unet import UNet
    from monai_deepgmm.patients.discovery import find as find_cohort
    from monai_deepgmm.patients.study import Study
    from monai_deepgmm.protocol import Protocol
    from monai_deepgmm.protocol import load as load_protocol
    from monai_deepgmm.results.evaluate import evaluate
    from monai_deepgmm.results.segment import segment
    from monai_deepgmm.results.segmentation import Segmentation

_EXPORTS = {
    "Protocol": "protocol",
    "load_protocol": "protocol:load",
    "find_cohort": "patients.discovery:find",
    "Study": "patients.study",
    "Config": "methods.config",
    "configure": "methods.config:build",
    "segment": "results.segment",
    "Segmentation": "results.segmentation",
    "evaluate": "results.evaluate",
    "Mixture": "mixture.gaussian",
    "Fit": "mixture.fit",
    "fit_em": "mixture.em",
    "GMMLoss": "networks.gmm_loss",
    "MixtureNLL": "networks.nll_loss",
    "UNet": "networks.unet",
}
__all__ = [  # a list that type checkers can read
    "Config",
    "Fit",
    "GMMLoss",
    "Mixture",
    "MixtureNLL",
    "Protocol",
    "Segmentation",
    "Study",
    "UNet",
    "configure",
    "evaluate",
    "find_cohort",
    "fit_em",
    "load_protocol",
    "segment",
]


def __getattr__(name: str) -> Any:
    if name not in _EXPORTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    room, _, attribute = _EXPORTS[name].partition(":")
    return getattr(import_module(f"{__name__}.{room}"), attribute or name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_EXPORTS])
