"""One study: load, solve, name the tissues, put them back on the source grid."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from monai_deepgmm.errors import StudyError
from monai_deepgmm.images import cropping as transforms
from monai_deepgmm.images.cropping import Units
from monai_deepgmm.images.loading import MIN_VOXELS_PER_TISSUE, Scan
from monai_deepgmm.images.nifti import Volume
from monai_deepgmm.methods import anatomy as anatomical
from monai_deepgmm.methods import naming as tissues
from monai_deepgmm.methods import registry as solvers
from monai_deepgmm.methods.config import Config
from monai_deepgmm.methods.naming import Naming
from monai_deepgmm.methods.region_filter import Region
from monai_deepgmm.methods.registry import Images
from monai_deepgmm.mixture import bias_field as bias
from monai_deepgmm.mixture import em
from monai_deepgmm.mixture.em import Fit
from monai_deepgmm.mixture.gaussian import Mixture, e_step
from monai_deepgmm.patients.study import Study
from monai_deepgmm.protocol import Protocol, Tissue
from monai_deepgmm.results import provenance, uncertainty
from monai_deepgmm.results.provenance import Evidenced
from monai_deepgmm.results.uncertainty import Interval

#: Names given with less certainty than this are reported.
CERTAIN = 0.5


@dataclass(frozen=True, eq=False)
class Segmentation:
    """What one patient's segmentation produced, on the reference sequence's grid.

    Attributes:
        patient: the id.
        protocol: what was looked for.
        tissues: the tissues that the present sequences can show, in order of index.
        images: sequence → intensities (X, Y, Z), resampled to the reference where needed, in order of reference.
        mask: (X, Y, Z) bool.
        labels: (X, Y, Z) uint8, the tissues' indices, 0 outside the mask.
        probabilities: (K, X, Y, Z) float32 in order of ``tissues``, 0 outside the mask.
        reference: the reference sequence's volume: geometry and source header.
        slice_axis: the array axis along which slices are stacked.
        sidecar: provenance, ready for JSON.
        warnings: each begins with its code.
        fields: sequence → bias field (X, Y, Z) float32, mean 1 over each image's mask and 1 outside; empty where none
            was looked for.
    """

    patient: str
    protocol: Protocol
    tissues: tuple[Tissue, ...]
    images: dict[str, np.ndarray]
    mask: np.ndarray
    labels: np.ndarray
    probabilities: np.ndarray
    reference: Volume
    slice_axis: int
    sidecar: dict[str, Any]
    warnings: tuple[str, ...]
    fields: dict[str, np.ndarray] = field(default_factory=dict)


def segment(study: Study, config: Config, *, network: nn.Module | None = None) -> Segmentation:
    """Segments one patient.

    Args:
        study: the files.
        config: what to do with them.
        network: for the method network: its weights, already loaded; None: those in the model's folder.

    Raises:
        StudyError: the patient cannot be segmented; the code says why.
    """
    data: dict[str, Any] = {"study": study}
    # Step by step, because Compose would hide a StudyError inside a RuntimeError.
    steps = transforms.preprocessing(
        config.protocol, frame=config.frame, max_voxels=config.max_voxels, shaded=config.solver.n4
    )
    for step in steps.transforms:
        data = step(data)
    patient: Scan = data["scan"]
    units: Units = data["units"]
    sequences = _sequences(patient, config)
    visible = config.protocol.visible(sequences)
    channels = [patient.sequences.index(s) for s in sequences]
    image, mask = units.image[:, channels].to(config.device), units.mask.to(config.device)
    means = known_means(config, visible, sequences)
    if means is None:
        expected = tissues.signature_map(image, mask, visible, sequences, units.spacing_mm)
    else:
        expected = em.means_start(image, mask, means)
    # A network needs no voxels of its own to learn from; a fit does.
    large = _large(units, visible, config.protocol) if config.model is None else torch.arange(len(image))
    slices = tuple(units.slices[int(i)] for i in large) if units.slices else ()
    chosen = slice(None) if len(large) == len(image) else large  # a volume is not worth copying
    images = Images(
        image[chosen],
        mask[chosen],
        expected[chosen],
        visible,
        sequences,
        units.spacing_mm,
        slices,
        means,
        units.zero[large][:, channels],
    )
    fit = solvers.solve(images, config, network=network)
    named = config.model is not None or config.method in ("anatomy", "pvgmm")
    naming = tissues.name(fit.resp, images.expected, given=named)
    fit = tissues.reorder(fit, naming.order)
    regions: list[Region] = []
    if config.presence:
        fit, regions = _believed(fit, images, config)
    resp = _all_units(fit, image, mask, large)
    probabilities = units.restore(resp.cpu())
    labels = _labels(probabilities, patient.mask, visible)
    counted = [int((labels == t.index).sum()) * patient.reference.voxel_ml for t in visible]
    pixel_mm2 = math.prod(s for a, s in enumerate(patient.reference.spacing_mm) if a != units.slice_axis)
    sure = uncertainty.intervals(
        counted,
        probabilities,
        _restarted(images, config, patient.reference.voxel_ml, image, mask, large),
        voxel_ml=patient.reference.voxel_ml,
        pixel_mm2=pixel_mm2,
    )
    doubt = float(uncertainty.entropy(probabilities)[patient.mask].mean())
    evidenced = Evidenced(regions, sure, doubt)
    warnings = (
        *patient.warnings,
        *_about_sequences(config.protocol, sequences),
        *_about_order(units, patient, visible),
        *_about_fit(fit, naming, units, large, visible),
        *_about_doubt(visible, sure),
        *_about_field(fit, images),
    )
    fields = _fields(fit, units, large, sequences)
    if "fields" in data:  # of all sequences, whichever a trained network looks at
        fields = dict(zip(patient.sequences, data["fields"], strict=True))
    return Segmentation(
        patient=study.patient,
        protocol=config.protocol,
        tissues=visible,
        images=dict(zip(patient.sequences, patient.image * data.get("fields", 1), strict=True)),
        mask=patient.mask,
        labels=labels,
        probabilities=probabilities,
        reference=patient.reference,
        slice_axis=units.slice_axis,
        sidecar=provenance.sidecar(patient, sequences, units, visible, fit, naming, evidenced, large, config, warnings)
        | {"bias": _about_bias(config, fields, patient.mask)},
        warnings=warnings,
        fields=fields,
    )


def _fields(fit: Fit, units: Units, large: Tensor, sequences: tuple[str, ...]) -> dict[str, np.ndarray]:
    """Each sequence's bias field on the scan's grid as the fit has it; 1 in slices that have no fit of their own."""
    if fit.mixture.field is None:
        return {}
    above = torch.zeros(len(units.image), *fit.mixture.field.shape[1:], dtype=units.mask.dtype)
    above[large] = fit.mixture.field.to(above) - 1
    return dict(zip(sequences, 1 + units.restore(above), strict=True))


def _about_bias(config: Config, fields: dict[str, np.ndarray], mask: np.ndarray) -> dict[str, Any] | None:
    """What the sidecar says of the shading; None where none was looked for."""
    if not fields:
        return None
    own = f"Legendre polynomials of degree {config.degree} in the fit"
    if all(bool((b == 1).all()) for b in fields.values()):
        own += ", dropped: they explained less than they cost"
    return {
        "rule": "N4 before the fit" if config.solver.n4 else own,
        "range": {s: [round(float(b[mask].min()), 4), round(float(b[mask].max()), 4)] for s, b in fields.items()},
    }


def _restarted(
    images: Images, config: Config, voxel_ml: float, image: Tensor, mask: Tensor, large: Tensor
) -> list[list[float]]:
    """The volumes of each tissue, in ml, that fits with perturbed priors give."""
    if config.method != "anatomy":
        return []
    volumes = []
    for number in range(config.solver.perturbations):
        moved, other = _perturbed(images, config, number)
        fit = solvers.solve(moved, other)
        if config.presence:
            fit, _ = _believed(fit, moved, other)
        labels = _all_units(fit, image, mask, large).argmax(1)[:, None]
        inside = mask > 0
        volumes.append([float(((labels == k) & inside).sum()) * voxel_ml for k in range(len(images.tissues))])
    return volumes


def _perturbed(images: Images, config: Config, number: int) -> tuple[Images, Config]:
    """The same task with priors as plausible as the protocol's own."""
    protocol = uncertainty.perturbed(config.protocol, config.seed, number)
    tissues_ = tuple(protocol.tissue(t.name) for t in images.tissues)
    return images._replace(tissues=tissues_), replace(config, protocol=protocol)


def _believed(fit: Fit, images: Images, config: Config) -> tuple[Fit, list[Region]]:
    """The fit without the regions that lack the protocol's evidence, and all regions."""
    if config.protocol.anatomy is None or not images.slices:
        return fit, []
    resp, regions = anatomical.believed(
        fit.resp,
        images.image,
        images.mask,
        images.tissues,
        images.sequences,
        images.spacing_mm,
        config.protocol.anatomy,
        slices=images.slices,
    )
    return fit._replace(resp=resp), regions


def known_means(config: Config, visible: tuple[Tissue, ...], sequences: tuple[str, ...]) -> Tensor | None:
    """μ_data ``(K, M)`` of these tissues in these sequences, or None where none was given.

    Raises:
        StudyError: ``E_MEANS``, the means lack a tissue or a sequence.
    """
    if config.means is None:
        return None
    try:
        return torch.tensor([[config.means.means[t.name][s] for s in sequences] for t in visible], dtype=torch.float64)
    except KeyError as error:
        message = f"the means have no value for {error}, which this patient's sequences show"
        raise StudyError("E_MEANS", message, "Compute the means from patients with these sequences") from error


def _sequences(patient: Scan, config: Config) -> tuple[str, ...]:
    """The sequences that are looked at: all, or those that the trained network knows.

    Raises:
        StudyError: ``E_MODEL``, the network needs one that the patient lacks.
    """
    if config.model is None:
        return patient.sequences
    spec = config.model.spec
    known = tuple(s for s in spec.sequences if s in patient.sequences)
    absent = [s for s in spec.sequences if s not in known]
    if not known or (absent and not spec.incomplete):
        message = f"the network was trained with {', '.join(absent)}, which this patient lacks"
        raise StudyError("E_MODEL", message, "Segment this patient with a method that needs no trained network")
    return known


def _large(units: Units, visible: tuple[Tissue, ...], protocol: Protocol) -> Tensor:
    """The indices of the images with enough voxels for a fit of their own."""
    needed = MIN_VOXELS_PER_TISSUE * len(visible)
    large = torch.nonzero(units.mask.flatten(1).sum(1) >= needed).flatten()
    if len(large) == 0:
        message = f"no {protocol.unit} of the mask has the {needed} voxels that a fit needs"
        raise StudyError("E_MASK_SMALL", message, f"Check that the mask covers the {protocol.mask}")
    return large


def _all_units(fit: Fit, image: Tensor, mask: Tensor, large: Tensor) -> Tensor:
    """Responsibilities of every image: its own fit's, or for a small one by the mixture of the nearest large one."""
    resp = fit.resp.new_zeros((len(image), *fit.resp.shape[1:]))
    resp[large] = fit.resp
    for index in sorted(set(range(len(image))) - set(large.tolist())):
        near = int((large - index).abs().argmin())
        weights = fit.resp[near].flatten(1).mean(1)
        means, covariances = fit.mixture.means[near][None], fit.mixture.covariances[near][None]
        borrowed = Mixture((weights / weights.sum())[None], means, covariances)
        resp[index] = e_step(image[index][None], mask[index][None], borrowed)[0]
    return resp


def _labels(probabilities: np.ndarray, mask: np.ndarray, visible: tuple[Tissue, ...]) -> np.ndarray:
    """Bayes' rule (S §2): the most probable tissue of each voxel inside the mask."""
    index = np.array([t.index for t in visible], dtype=np.uint8)
    return np.where(mask, index[probabilities.argmax(0)], 0).astype(np.uint8)


# What to tell the user -------------------------------------------------------------------------------------------


def _about_sequences(protocol: Protocol, sequences: tuple[str, ...]) -> list[str]:
    absent = [s for s in protocol.sequences if s not in sequences]
    if not absent:
        return []
    by_index = {t.index: t.name for t in protocol.tissues}
    merged = [(by_index[a], by_index[b]) for a, b in protocol.merged(sequences).items() if a != b and b in by_index]
    told = "; ".join(f"{a} is counted as {b}" for a, b in merged) or "no tissue is lost"
    return [f"W_MISSING: without {', '.join(absent)}: {told}"]


def _about_order(units: Units, patient: Scan, visible: tuple[Tissue, ...]) -> list[str]:
    swapped = tissues.looks_swapped(units.image, units.mask, visible, patient.sequences, units.spacing_mm)
    if swapped is None:
        return []
    order = ", ".join(f"{a} like {b}" for a, b in zip(patient.sequences, swapped, strict=True) if a != b)
    return [f"W_SWAPPED: the sequences look exchanged ({order}); check which file is which"]


def _about_doubt(visible: tuple[Tissue, ...], sure: list[Interval]) -> list[str]:
    wide = [
        f"{tissue.name} {found.low_ml:.1f} to {found.high_ml:.1f} ml"
        for tissue, found in zip(visible, sure, strict=True)
        if found.high_ml - found.low_ml > uncertainty.UNSURE * max(found.volume_ml, uncertainty.LEAST_ML)
    ]
    return [f"W_UNSURE: volumes are uncertain ({', '.join(wide)}); check the page with care"] if wide else []


def _about_field(fit: Fit, images: Images) -> list[str]:
    suspicious = bias.suspicious(fit.mixture, fit.resp, images.mask.to(fit.resp)).any(0)
    chosen = [s for s, flag in zip(images.sequences, suspicious.tolist(), strict=True) if flag]
    if not chosen:
        return []
    return [f"W_BIAS: the bias field of {', '.join(chosen)} follows the tissues; compare with --set degree=0"]


def _about_fit(fit: Fit, naming: Naming, units: Units, large: Tensor, visible: tuple[Tissue, ...]) -> list[str]:
    def where(flags: Tensor) -> str:
        chosen = [units.slices[int(large[i])] for i in torch.nonzero(flags).flatten()] if units.slices else []
        return f" in slice {', '.join(map(str, chosen))}" if chosen else ""

    notes = []
    if units.slices and (small := sorted(set(range(len(units.slices))) - set(large.tolist()))):
        listed = ", ".join(str(units.slices[i]) for i in small)
        notes.append(f"W_SMALL: slice {listed} has too few voxels for a fit and uses its neighbour's mixture")
    if not fit.converged.all():
        notes.append(f"W_CONVERGENCE: the fit did not converge{where(~fit.converged)}; raise max_iter or tol")
    if fit.reseeded.any():
        notes.append(f"W_RESEEDED: a collapsed component was started anew{where(fit.reseeded > 0)}")
    for i, tissue in enumerate(visible):
        if fit.collapsed[:, i].any():
            notes.append(f"W_COLLAPSED: {tissue.name} holds nearly no voxel{where(fit.collapsed[:, i])}")
    unsure = naming.certainty < CERTAIN
    if unsure.any():
        notes.append(f"W_NAMES: the tissues' names are uncertain{where(unsure)}; check them on the page")
    return notes
