"""Provenance: what a patient's sidecar says about how the labels came about."""

from __future__ import annotations

import dataclasses
import math
import platform
from collections.abc import Sequence
from importlib import metadata
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor

from monai_deepgmm.images.cropping import Units
from monai_deepgmm.images.loading import Scan
from monai_deepgmm.images.nifti import Volume
from monai_deepgmm.methods.config import Config
from monai_deepgmm.methods.naming import Naming
from monai_deepgmm.methods.region_filter import Region
from monai_deepgmm.mixture.em import Fit
from monai_deepgmm.protocol import Tissue
from monai_deepgmm.results import uncertainty
from monai_deepgmm.results.uncertainty import Interval

DISCLAIMER = "Research use only. Not a medical device."


class Evidenced(NamedTuple):
    """What is known of the tissues beyond the fit.

    Attributes:
        regions: what spoke for and against each region of those that need evidence.
        intervals: of each tissue's volume.
        doubt: the mean entropy inside the mask, 0 to 1.
    """

    regions: Sequence[Region]
    intervals: Sequence[Interval]
    doubt: float


def versions() -> dict[str, str]:
    """The versions of Python and of the packages that compute."""
    packages = ("monai-deepgmm", "monai", "torch", "numpy", "scipy", "nibabel", "SimpleITK")
    return {"python": platform.python_version(), **{p: metadata.version(p) for p in packages}}


def sidecar(
    patient: Scan,
    sequences: tuple[str, ...],
    units: Units,
    visible: tuple[Tissue, ...],
    fit: Fit,
    naming: Naming,
    evidenced: Evidenced,
    large: Tensor,
    config: Config,
    warnings: tuple[str, ...],
) -> dict[str, Any]:
    """Everything, ready for JSON."""
    names = [t.name for t in visible]
    slices = [units.slices[int(i)] if units.slices else None for i in large]
    voxels = units.mask.flatten(1).sum(1)[large]
    certainty = float((naming.certainty * voxels).sum() / voxels.sum())
    return {
        "Disclaimer": DISCLAIMER,
        "GeneratedBy": "monai-deepgmm",
        "versions": versions(),
        "method": config.method,
        "sequences": list(sequences),
        "tissues": [{"name": t.name, "index": t.index, "color": t.color} for t in visible],
        "configuration": config.as_json(),
        "seed": config.seed,
        "inputs": patient.inputs,
        "grid": _grid(patient.reference),
        "slice_axis": units.slice_axis,
        "converged": bool(fit.converged.all()),
        "naming": {
            "rule": _naming_rule(config),
            "certainty": round(certainty, 4),
            "units": [
                {
                    "slice": slices[i],
                    "certainty": round(float(naming.certainty[i]), 4),
                    "assignment": dict(zip(names, naming.order[i].tolist(), strict=True)),
                    "agreement": dict(zip(names, _rounded(naming.agreement[i]), strict=True)),
                }
                for i in range(len(large))
            ],
        },
        "presence": _presence(evidenced.regions, visible, slices) if config.presence else None,
        "uncertainty": {
            "entropy": round(evidenced.doubt, 4),
            "level": uncertainty.LEVEL,
            "volumes": {
                name: {key: round(value, 4) for key, value in interval._asdict().items()}
                for name, interval in zip(names, evidenced.intervals, strict=True)
            },
        },
        "fit": {
            "units": [
                {
                    "slice": slices[i],
                    "nll": round(float(fit.nll[i]), 7),
                    "converged": bool(fit.converged[i]),
                    "iterations": int(fit.iterations[i]),
                    "reseeded": int(fit.reseeded[i]),
                    "trace": _rounded(fit.trace[: int(fit.iterations[i]) + 1, i], 7),
                }
                for i in range(len(large))
            ]
        },
        "mixture": {
            "units": [_parameters(fit, i, slices[i], names, sequences) for i in range(len(large))],
            "covariance": config.covariance,
            "scale": config.protocol.normalisation,
        },
        "warnings": list(warnings),
    }


def _presence(regions: Sequence[Region], visible: tuple[Tissue, ...], slices: list[int | None]) -> dict[str, Any]:
    """Of each tissue that needs evidence: whether the patient has it, in which slices, and every region."""
    return {
        tissue.name: {
            "present": any(r.believed for r in mine),
            "slices": sorted({s for r in mine if r.believed and (s := slices[r.image]) is not None}),
            "evidence": dataclasses.asdict(tissue.evidence),
            "regions": [
                {
                    "slice": slices[r.image],
                    "voxels": r.voxels,
                    "size_mm": round(r.size, 3),
                    "support": round(r.support, 4),
                    "contrast_sd": round(r.contrast, 4) if math.isfinite(r.contrast) else None,
                    "believed": r.believed,
                }
                for r in mine
            ],
        }
        for tissue in visible
        if tissue.evidence is not None
        for mine in [[r for r in regions if r.tissue == tissue.name]]
    }


def _naming_rule(config: Config) -> str:
    if config.model is not None:
        return "the trained network's outputs, in the order that its training gave them"
    if config.method in ("anatomy", "pvgmm"):
        return "each component stands for its tissue from the start, by the protocol's priors"
    source = "the given means" if config.means is not None else "the protocol's signatures and places"
    return f"components named together, by largest overlap with the map expected from {source}"


def _grid(volume: Volume) -> dict[str, Any]:
    return {
        "shape": list(volume.source_shape),
        "affine": np.round(volume.affine, 6).tolist(),
        "spacing_mm": [round(s, 6) for s in volume.spacing_mm],
        "sform_code": int(volume.header["sform_code"]),
        "qform_code": int(volume.header["qform_code"]),
        "voxel_ml": round(volume.voxel_ml, 9),
    }


def _parameters(
    fit: Fit, index: int, where: int | None, names: list[str], sequences: tuple[str, ...]
) -> dict[str, Any]:
    """One image's π, μ and Σ; of an SVGMM's Π, the mean over the mask."""
    resp = fit.resp[index].flatten(1).sum(1)
    covariances = fit.mixture.covariances[index]
    shared = covariances.shape[0] < len(names)
    return {
        "slice": where,
        "weights": dict(zip(names, _rounded(resp / resp.sum()), strict=True)),
        "means": {
            name: dict(zip(sequences, _rounded(mean), strict=True))
            for name, mean in zip(names, fit.mixture.means[index], strict=True)
        },
        "covariances": {
            name: np.round(covariances[0 if shared else k].cpu().numpy(), 6).tolist() for k, name in enumerate(names)
        },
    }


def _rounded(values: Tensor, digits: int = 5) -> list[float]:
    return [round(float(v), digits) for v in values]
