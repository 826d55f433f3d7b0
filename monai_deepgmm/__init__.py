"""Segment medical images without training labels, by Gaussian mixture models with the help of deep networks.

What a script needs stands here, and is imported when it is first used: ``import monai_deepgmm`` loads neither torch
nor MONAI.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

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
__all__ = list(_EXPORTS)


def __getattr__(name: str) -> Any:
    if name not in _EXPORTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    room, _, attribute = _EXPORTS[name].partition(":")
    return getattr(import_module(f"{__name__}.{room}"), attribute or name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_EXPORTS])
