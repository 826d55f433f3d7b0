"""Provenance: what a patient's sidecar says about how the labels came about."""

from __future__ import annotations

import dataclasses
import functools
import math
import platform
from collections.abc import Mapping, Sequence
from importlib import metadata
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from monai_deepgmm.images.loading import Scan
from monai_deepgmm.images.nifti import Volume
from monai_deepgmm.images.preparation import Prepared
from monai_deepgmm.methods import enhancement
from monai_deepgmm.methods.config import Config
from monai_deepgmm.methods.naming import Naming
from monai_deepgmm.methods.region_filter import Region
from monai_deepgmm.methods.task import Images
from monai_deepgmm.mixture.fit import Diagnostics, Fit
from monai_deepgmm.protocol import Tissue
from monai_deepgmm.results import uncertainty
from monai_deepgmm.results.assembly import Assembly
from monai_deepgmm.results.cues import Cues
from monai_deepgmm.results.uncertainty import Interval

DISCLAIMER = "Research use only. Not a medical device."


class Outcome(NamedTuple):
    """What is known of a patient after the fit.

    Attributes:
        fit: of the images that have one, its components in the order of the tissues.
        naming: how the components got their names.
        regions: of those tissues whose regions must meet criteria.
        intervals: of each tissue's volume.
        entropy: the mean over the mask, 0 to 1.
        cues: what the intervals were weighed from; None where they were not.
        contradictions: what of the found tissues contradicts the protocol, in words.
        slices: those of the regions' images; empty: the fit's.
        opinion: the method whose intervals these are; None: the one that was asked for.
    """

    fit: Fit
    naming: Naming
    regions: Sequence[Region] = ()
    intervals: Sequence[Interval] = ()
    entropy: float = 0.0
    cues: Cues | None = None
    contradictions: Sequence[str] = ()
    slices: tuple[int, ...] = ()
    opinion: str | None = None


@functools.cache
def versions() -> dict[str, str]:
    """The versions of Python and of the packages that compute."""
    packages = ("monai-deepgmm", "monai", "torch", "numpy", "scipy", "nibabel", "SimpleITK")
    return {"python": platform.python_version(), **{p: metadata.version(p) for p in packages}}


def sidecar(
    prepared: Prepared, assembly: Assembly, outcome: Outcome, config: Config, warnings: tuple[str, ...]
) -> dict[str, Any]:
    """Everything, ready for JSON."""
    scan, images = prepared.scan, assembly.images
    names = [t.name for t in images.tissues]
    slices: list[int | None] = list(images.slices) or [None] * len(images.image)
    converged = outcome.fit.diagnostics.converged
    return {
        "Disclaimer": DISCLAIMER,
        "GeneratedBy": "monai-deepgmm",
        "versions": versions(),
        "method": config.method.name,
        "sequences": list(images.sequences),
        "tissues": [{"name": t.name, "index": t.index, "color": t.color} for t in images.tissues],
        "configuration": config.as_json(),
        "seed": config.seed,
        "inputs": scan.inputs,
        "grid": _grid(scan.reference),
        "slice_axis": prepared.crops.slice_axis,
        "converged": None if converged is None else bool(converged.all()),
        "naming": _named(outcome, images, slices, config),
        "presence": _presence(outcome.regions, images, list(outcome.slices) or slices) if config.presence else None,
        "uncertainty": {
            "entropy": round(outcome.entropy, 4),
            "level": uncertainty.LEVEL,
            "volumes": {
                name: {k: None if v is None else round(v, 4) for k, v in interval._asdict().items()}
                for name, interval in zip(names, outcome.intervals, strict=True)
            },
            "by": outcome.opinion or config.method.name,
            "cues": None if outcome.cues is None else _cues(outcome.cues),
        },
        "fit": {"units": [_fitted(outcome.fit.diagnostics, i, where) for i, where in enumerate(slices)]},
        "mixture": {
            "units": [_parameters(outcome.fit, i, where, names, images.sequences) for i, where in enumerate(slices)],
            "scale": config.preprocessing.normalisation(config.protocol),
        },
        "warnings": list(warnings),
    }


def _cues(cues: Cues) -> dict[str, Any]:
    """What the volumes' intervals were weighed from, of the patient and of each tissue."""
    of_tissues = {name: {k: round(v, 4) for k, v in told.items()} for name, told in cues.of_tissues.items()}
    return {"patient": {k: round(v, 4) for k, v in cues.of_patient.items()}, "tissues": of_tissues}


def bias(config: Config, fields: Mapping[str, NDArray[np.float32]], mask: NDArray[np.bool_]) -> dict[str, Any] | None:
    """What the sidecar says of the shading; None where none was looked for."""
    if not fields:
        return None
    own = f"Legendre polynomials of degree {config.degree} in the fit"
    if all(bool((b == 1).all()) for b in fields.values()):
        own += ", dropped: they explained less than they cost"
    return {
        "rule": "N4 before the fit" if config.preprocessing.n4 else own,
        "range": {s: [round(float(b[mask].min()), 4), round(float(b[mask].max()), 4)] for s, b in fields.items()},
    }


def coverage(scan: Scan) -> dict[str, Any] | None:
    """Of each sequence the share of the mask that it covers, and of each slice that it lacks; None: all of it."""
    if scan.coverage is None or scan.coverage.whole():
        return None
    return scan.coverage.facts(scan.mask, scan.sequences)


def _named(outcome: Outcome, images: Images, slices: list[int | None], config: Config) -> dict[str, Any]:
    found, names = outcome.naming, [t.name for t in images.tissues]
    voxels = images.mask.flatten(1).sum(1).cpu()
    fixed = config.model is not None or config.method.named  # nothing was guessed that could be certain
    return {
        "rule": _naming_rule(config),
        "contradictions": list(outcome.contradictions),
        "certainty": None if fixed else round(float((found.certainty * voxels).sum() / voxels.sum()), 4),
        "units": [
            {
                "slice": where,
                "certainty": None if fixed else round(float(found.certainty[i]), 4),
                "assignment": dict(zip(names, found.order[i].tolist(), strict=True)),
                "agreement": dict(zip(names, _rounded(found.agreement[i]), strict=True)),
            }
            for i, where in enumerate(slices)
        ],
    }


def _fitted(known: Diagnostics, index: int, where: int | None) -> dict[str, Any]:
    """How one image's fit went, as far as its method knows."""
    out: dict[str, Any] = {"slice": where}
    out |= {} if known.nll is None else {"nll": round(float(known.nll[index]), 7)}
    out |= {} if known.converged is None else {"converged": bool(known.converged[index])}
    out |= {} if known.reseeded is None else {"reseeded": int(known.reseeded[index])}
    if known.iterations is not None and known.trace is not None:
        count = int(known.iterations[index])
        out |= {"iterations": count, "trace": _rounded(known.trace[: count + 1, index], 7)}
    return out


def _presence(regions: Sequence[Region], images: Images, slices: list[int | None]) -> dict[str, Any]:
    """Of each tissue that needs evidence: whether the patient has it, in which slices, and every region."""
    late = images.enhancement
    return {
        tissue.name: {
            "present": any(r.accepted for r in mine),
            "slices": sorted({s for r in mine if r.accepted and (s := slices[r.image]) is not None}),
            "criteria": dataclasses.asdict(tissue.criteria.among(enhanced=late is None or late.present)),
            "patient": _enhancement(images, tissue),
            "regions": [_region(r, slices) for r in mine],
        }
        for tissue in images.tissues
        if tissue.criteria is not None
        for mine in [[r for r in regions if r.tissue == tissue.name]]
    }


def _region(found: Region, slices: list[int | None]) -> dict[str, Any]:
    return {
        "slice": slices[found.image],
        "voxels": found.voxels,
        "size_mm": round(found.size, 3),
        "support": round(found.support, 4),
        "contrast_sd": round(found.contrast, 4) if math.isfinite(found.contrast) else None,
        "evidence": round(found.evidence, 4),
        "accepted": found.accepted,
    }


def _enhancement(images: Images, tissue: Tissue) -> dict[str, Any] | None:
    """What late enhancement says of the whole patient; None where it says nothing of this tissue."""
    late, found = images.anatomy().enhancement, images.enhancement
    if found is None or late is None or late.tissue != tissue.name:
        return None
    return {
        "present": found.present,
        "evidence": round(found.found, 4),
        "needed": late.evidence,
        "separation": round(found.separation, 4),
        "needed_separation": round(enhancement.ONE_CLASS, 4),
        "level": round(found.level, 4),
    }


def _naming_rule(config: Config) -> str:
    if config.model is not None:
        return "the trained network's outputs, in the order that its training gave them"
    if config.method.named:
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
