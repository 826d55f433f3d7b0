"""One study: prepare, fit, name the tissues, decide which regions stand, put them back on the source grid."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import numpy as np
import torch
from monai.transforms import Compose
from numpy.typing import NDArray

from monai_deepgmm.images.preparation import Prepared, prepare
from monai_deepgmm.methods import name_check, naming, region_filter
from monai_deepgmm.methods.config import Config
from monai_deepgmm.methods.naming import Naming
from monai_deepgmm.methods.region_filter import Region
from monai_deepgmm.methods.task import Images
from monai_deepgmm.mixture.fit import Fit
from monai_deepgmm.patients.study import Study
from monai_deepgmm.results import coverage, notes, plausibility, provenance, uncertainty
from monai_deepgmm.results.assembly import Assembly, assemble
from monai_deepgmm.results.numbers import numbers
from monai_deepgmm.results.provenance import Outcome
from monai_deepgmm.results.segmentation import Segmentation

#: What fits a mixture to a patient's images.
Inferer = Callable[[Images], Fit]


def segment(
    study: Study, config: Config, *, preprocessing: Compose | None = None, inferer: Inferer | None = None
) -> Segmentation:
    """Segments one patient.

    Args:
        study: the files.
        config: what to do with them.
        preprocessing: the steps from files to images; None: the configuration's.
        inferer: what fits the mixture; None: the configuration's method.

    Raises:
        StudyError: the patient cannot be segmented; the code says why.
    """
    prepared = prepare(study, preprocessing or config.preprocessing.transforms(config.protocol))
    assembly = assemble(prepared, config)
    inferer = inferer or Solver(config)
    fit = inferer(assembly.images)
    fit, names = named(fit, assembly.images, config)
    fit, regions = filtered(fit, assembly.images, config)
    outcome = Outcome(fit, names, regions, contradictions=name_check.contradictions(fit, assembly.images))
    return with_numbers(_on_source_grid(study, prepared, assembly, outcome, config, inferer))


def with_numbers(segmentation: Segmentation) -> Segmentation:
    """The segmentation with its numbers, and with what speaks against them in its sidecar and warnings."""
    found = numbers(segmentation)
    against = plausibility.findings(segmentation, found)
    warnings = [*segmentation.warnings, *plausibility.about(segmentation, against), *coverage.about(segmentation)]
    told = {
        "warnings": warnings,
        "plausibility": plausibility.facts(against),
        "coverage": coverage.facts(segmentation),
    }
    sidecar = segmentation.sidecar | told
    return dataclasses.replace(segmentation, measured=found.as_row(), sidecar=sidecar, warnings=tuple(warnings))


class Solver:
    """The configuration's method, as a bundle's configuration can hold it.

    Args:
        config: its method and device are used.
    """

    def __init__(self, config: Config) -> None:
        self.config = config

    def __call__(self, images: Images) -> Fit:
        """Fits the mixture to each image."""
        return self.config.method.solve(images, device=self.config.device)


def named(fit: Fit, images: Images, config: Config) -> tuple[Fit, Naming]:
    """The fit with its components in the order of the tissues, and how certain that is."""
    found = naming.name(fit.resp, images.expected, given=config.method.named)
    return naming.reorder(fit, found.order), found


def filtered(fit: Fit, images: Images, config: Config) -> tuple[Fit, list[Region]]:
    """The fit without the regions that do not meet the protocol's criteria, and all regions."""
    if not (config.presence and images.slices):
        return fit, []
    resp, regions = region_filter.decide(fit.resp, images)
    return fit._replace(resp=resp), regions


def _on_source_grid(
    study: Study, prepared: Prepared, assembly: Assembly, outcome: Outcome, config: Config, inferer: Inferer
) -> Segmentation:
    """Labels by Bayes' rule (S §2) on the grid of the scan, and what is to be told of them."""
    scan, crops, images = prepared.scan, prepared.crops, assembly.images
    probabilities = crops.restore(assembly.everywhere(outcome.fit).cpu())
    index = np.array([t.index for t in images.tissues], dtype=np.uint8)
    labels = np.where(scan.mask, index[probabilities.argmax(0)], 0).astype(np.uint8)
    outcome = outcome._replace(
        intervals=_intervals(labels, probabilities, prepared, assembly, config, inferer),
        entropy=float(uncertainty.entropy(probabilities)[scan.mask].mean()),
    )
    fields = _fields(outcome.fit, prepared, assembly)
    warnings = (*scan.warnings, *notes.about(prepared, assembly, outcome, config))
    taken_off = 1 if prepared.fields is None else prepared.fields
    return Segmentation(
        patient=study.patient,
        protocol=config.protocol,
        tissues=images.tissues,
        images=dict(zip(scan.sequences, scan.image * taken_off, strict=True)),
        mask=scan.mask,
        labels=labels,
        probabilities=probabilities,
        reference=scan.reference,
        slice_axis=crops.slice_axis,
        sidecar=provenance.sidecar(prepared, assembly, outcome, config, warnings)
        | {"bias": provenance.bias(config, fields, scan.mask)},
        warnings=warnings,
        fields=fields,
        intervals=tuple(outcome.intervals),
    )


def _intervals(
    labels: NDArray[np.uint8],
    probabilities: NDArray[np.float32],
    prepared: Prepared,
    assembly: Assembly,
    config: Config,
    inferer: Inferer,
) -> list[uncertainty.Interval]:
    """Where each tissue's volume may lie."""
    reference, tissues = prepared.scan.reference, assembly.images.tissues
    volumes = [int((labels == t.index).sum()) * reference.voxel_ml for t in tissues]
    deviations = uncertainty.standard_deviations(
        volumes,
        probabilities,
        _refitted_ml(assembly, config, inferer, reference.voxel_ml),
        voxel_ml=reference.voxel_ml,
        pixel_mm2=math.prod(s for a, s in enumerate(reference.spacing_mm) if a != prepared.crops.slice_axis),
    )
    reaches = [uncertainty.reach(config.protocol.name, config.method.name, t.name) for t in tissues]
    return [
        uncertainty.interval(*found, mask_ml=sum(volumes)) for found in zip(volumes, deviations, reaches, strict=True)
    ]


def _refitted_ml(assembly: Assembly, config: Config, inferer: Inferer, voxel_ml: float) -> list[list[float]]:
    """The volumes of each tissue, in ml, that fits with perturbed priors give."""
    volumes = []
    for number in range(getattr(config.method, "perturbations", 0)):
        images = _perturbed(assembly.images, config.seed, number)
        fit, _ = filtered(inferer(images), images, config)
        labels = assembly.everywhere(fit).argmax(1)[:, None]
        inside = assembly.mask > 0
        volumes.append([float(((labels == k) & inside).sum()) * voxel_ml for k in range(len(images.tissues))])
    return volumes


def _perturbed(images: Images, seed: int, number: int) -> Images:
    """The same task with priors as plausible as the protocol's own."""
    protocol = uncertainty.perturbed(images.protocol, seed, number)
    tissues = tuple(protocol.tissue(t.name) for t in images.tissues)
    return images._replace(protocol=protocol, tissues=tissues, ring=None, enhancement=None).with_wall()


def _fields(fit: Fit, prepared: Prepared, assembly: Assembly) -> dict[str, NDArray[np.float32]]:
    """Each sequence's bias field on the scan's grid, N4's or the fit's; 1 in slices without a fit of their own."""
    if prepared.fields is not None:  # of all sequences, whichever a trained network looks at
        return dict(zip(prepared.scan.sequences, prepared.fields, strict=True))
    if fit.mixture.field is None:
        return {}
    crops = prepared.crops
    above = torch.zeros(len(crops.image), *fit.mixture.field.shape[1:], dtype=crops.mask.dtype)
    above[assembly.large] = fit.mixture.field.to(above) - 1
    return dict(zip(assembly.images.sequences, 1 + crops.restore(above), strict=True))
