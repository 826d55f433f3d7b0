"""One study: prepare, fit, name the tissues, decide which regions stand, put them back on the source grid."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from monai_deepgmm.errors import StudyError
from monai_deepgmm.images.loading import Scan
from monai_deepgmm.images.preparation import Prepared, prepare
from monai_deepgmm.methods import name_check, naming, region_filter, registry
from monai_deepgmm.methods.anatomy import AnatomicalConfig
from monai_deepgmm.methods.config import Config
from monai_deepgmm.methods.naming import Naming
from monai_deepgmm.methods.task import Images
from monai_deepgmm.mixture.fit import Fit, likeliest
from monai_deepgmm.patients.study import Study
from monai_deepgmm.results import (
    coverage,
    cues,
    interval_rule,
    notes,
    parts,
    plausibility,
    provenance,
    refit,
    uncertainty,
)
from monai_deepgmm.results.assembly import Assembly, assemble
from monai_deepgmm.results.cues import Cues
from monai_deepgmm.results.numbers import numbers
from monai_deepgmm.results.parts import Part
from monai_deepgmm.results.provenance import Outcome
from monai_deepgmm.results.refit import filtered
from monai_deepgmm.results.segmentation import Segmentation

if TYPE_CHECKING:
    from monai.transforms import Compose

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
        TypeError: what was given is no study or no configuration.
    """
    if not isinstance(study, Study):
        raise TypeError(f"study: got {type(study).__name__}, expected a Study, one of find_cohort(…).studies")
    if not isinstance(config, Config):
        raise TypeError(f"config: got {type(config).__name__}, expected a Config, as configure(…) makes it")
    prepared = prepare(study, preprocessing or config.preprocessing.steps(config.protocol))
    if inferer is None and not config.method.surroundings:
        prepared = prepared.tight()
    found = _found(prepared, config, inferer or Solver(config))
    return with_numbers(_segmentation(study, prepared, _with_second_opinion(found, prepared, config), config))


def with_numbers(segmentation: Segmentation) -> Segmentation:
    """The segmentation with its numbers, and with what speaks against them in its sidecar and warnings."""
    close = segmentation.cropped()
    found = numbers(close)
    against = plausibility.findings(close, found)
    warnings = [*segmentation.warnings, *plausibility.about(close, against), *coverage.about(close)]
    told = {
        "warnings": warnings,
        "plausibility": plausibility.facts(against),
        "coverage": coverage.facts(close) | {"sequences": segmentation.sidecar.get("coverage")},
    }
    sidecar = segmentation.sidecar | told
    return dataclasses.replace(segmentation, measured=found.as_row(), sidecar=sidecar, warnings=tuple(warnings))


class Solved(NamedTuple):
    """What came of one part of a patient; that of most patients is everything.

    Attributes:
        part: its images, and the voxels that it labels.
        assembly: what the method was given.
        outcome: what it found.
        unfiltered: its fit with all regions.
        refits: the fits to the assembly's variants, with all regions.
    """

    part: Part
    assembly: Assembly
    outcome: Outcome
    unfiltered: Fit
    refits: tuple[Fit, ...]

    def probabilities(self, *, filtered: bool = True) -> NDArray[np.float32]:
        """Of the part's tissues, on the scan's grid (K, X, Y, Z)."""
        fit = self.outcome.fit if filtered else self.unfiltered
        return self.part.prepared.crops.restore(self.assembly.everywhere(fit).cpu())


class Found(NamedTuple):
    """All of a patient's parts, put together.

    Attributes:
        first: the first part, with the outcome of all.
        labels: on the grid of the scan (X, Y, Z).
        probabilities: of the first part's tissues (K, X, Y, Z).
    """

    first: Solved
    labels: NDArray[np.uint8]
    probabilities: NDArray[np.float32]


def _found(prepared: Prepared, config: Config, inferer: Inferer) -> Found:
    """What a method finds: labels by Bayes' rule (S §2), and how sure they are."""
    divided = parts.split(prepared, config)
    wall = parts.wall(prepared, config) if len(divided) > 1 else None
    first, *others = _solved(divided, wall, config, inferer)
    probabilities, outcome = _together(first, others, wall, prepared, config)
    mask = prepared.scan.mask
    elsewhere = np.any([np.zeros_like(mask), *(other.part.takes for other in others)], axis=0)
    index = np.array([t.index for t in first.assembly.images.tissues], dtype=np.uint8)
    inside = probabilities[:, mask]  # (K, voxels)
    labels = np.zeros(mask.shape, dtype=np.uint8)
    labels[mask] = np.where((inside > 0).any(0), index[likeliest(torch.from_numpy(inside)[None])[0].numpy()], 0)
    told = _cues(labels, inside, first, outcome, config)
    outcome = outcome._replace(
        cues=told,
        intervals=_intervals(labels, elsewhere, inside, first, config, told),
        entropy=float(uncertainty.entropy(inside).mean()),
    )
    return Found(first._replace(outcome=outcome), labels, probabilities)


def _with_second_opinion(found: Found, prepared: Prepared, config: Config) -> Found:
    """With the intervals of another method, where the tables say that it knows better how large the tissues are.

    They need not hold the volumes that were found.
    """
    outcome = found.first.outcome
    other = interval_rule.opinion(config.protocol.name, config.method.name, found.first.assembly.images.sequences)
    if other is None:
        return found
    method = registry.configure(other, {}, config.protocol, config.preprocessing, {})
    try:
        asked = dataclasses.replace(config, method=method, means=None)
        second = _found(prepared, asked, Solver(asked)).first.outcome
    except StudyError:  # too few voxels for its fits
        return found
    pairs = zip(outcome.intervals, second.intervals, strict=True)
    intervals = [own._replace(low_ml=one.low_ml, high_ml=one.high_ml) for own, one in pairs]
    outcome = outcome._replace(intervals=intervals, cues=second.cues, opinion=other)
    return found._replace(first=found.first._replace(outcome=outcome))


def _solved(divided: tuple[Part, ...], wall: Images | None, config: Config, inferer: Inferer) -> Iterator[Solved]:
    """Each part fitted, named and filtered; one that is too small for a fit is left out if it is not the last.

    The first is fitted under perturbed protocols, too.
    """
    count = 0
    for number, part in enumerate(divided, 1):
        try:
            variants = [] if count else refit.protocols(config, part.prepared.scan.sequences)
            assembly = assemble(part.prepared, config, wall=wall, variants=variants)
        except StudyError as error:
            if error.code != "E_MASK_SMALL" or (number == len(divided) and count == 0):
                raise
            continue
        own, *refits = _solved_all((assembly.images, *assembly.variants), config, inferer)
        whole, names = named(own, assembly.images, config)
        fit, regions = filtered(whole, assembly.images, config)
        contradictions = name_check.contradictions(fit, assembly.images)
        count += 1
        outcome = Outcome(fit, names, regions, contradictions=contradictions)
        yield Solved(part, assembly, outcome, whole, tuple(refits))


def _together(
    first: Solved, others: list[Solved], wall: Images | None, prepared: Prepared, config: Config
) -> tuple[NDArray[np.float32], Outcome]:
    """The probabilities of all parts (K, X, Y, Z), and the first one's outcome with the regions of all.

    Regions are decided in the whole patient where its wall is known, since a region's neighbours may be another part's.
    """
    tissues = first.assembly.images.tissues
    joint = wall is not None and len(others) > 0 and wall.tissues == tissues and config.presence
    probabilities = first.probabilities(filtered=not joint)
    for other in others:
        found, known = other.probabilities(filtered=not joint), other.assembly.images.tissues
        parts.merged(found, known, other.part.takes, probabilities, tissues, config.protocol)
    if not joint or wall is None:
        return probabilities, first.outcome
    resp = torch.from_numpy(np.stack([prepared.crops.cut(p) for p in probabilities], 1)).to(wall.image)
    labelled = (resp.sum(1, keepdim=True) > 0).to(wall.mask)
    resp, regions = region_filter.decide(resp, wall._replace(mask=wall.mask * labelled))
    return prepared.crops.restore(resp.cpu()), first.outcome._replace(regions=regions, slices=wall.slices)


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


def _solved_all(variants: Sequence[Images], config: Config, inferer: Inferer) -> list[Fit]:
    """The fits to the same images with several protocols, at once where the method can."""
    if isinstance(inferer, Solver) and isinstance(config.method, AnatomicalConfig):
        return config.method.solve_all(variants)
    return [inferer(images) for images in variants]


def named(fit: Fit, images: Images, config: Config) -> tuple[Fit, Naming]:
    """The fit with its components in the order of the tissues, and how certain that is."""
    found = naming.name(fit.resp, images.expected, given=config.method.named)
    return naming.reorder(fit, found.order), found


def _segmentation(study: Study, prepared: Prepared, found: Found, config: Config) -> Segmentation:
    """What was found, and what is to be told of it."""
    first = found.first
    scan, assembly, outcome, main = prepared.scan, first.assembly, first.outcome, first.part.prepared
    images = assembly.images
    fields = _fields(outcome.fit, main, assembly)
    warnings = (*scan.warnings, *notes.about(main, assembly, outcome, config))
    scanned = scan.image if prepared.fields is None else scan.image * prepared.fields
    return Segmentation(
        patient=study.patient,
        protocol=config.protocol,
        tissues=images.tissues,
        images=dict(zip(scan.sequences, scanned, strict=True)),
        mask=scan.mask,
        labels=found.labels,
        probabilities=found.probabilities,
        reference=scan.reference,
        slice_axis=main.crops.slice_axis,
        sidecar=provenance.sidecar(main, assembly, outcome, config, warnings)
        | {
            "bias": provenance.bias(config, fields, scan.mask),
            "coverage": provenance.coverage(scan),
            "alignment": scan.alignment,
        },
        warnings=warnings,
        fields=fields,
        intervals=tuple(outcome.intervals),
        seen=_seen(scan),
    )


def _seen(scan: Scan) -> dict[str, np.ndarray]:
    """Where each sequence was measured; empty where all were everywhere."""
    if scan.coverage is None or scan.coverage.whole():
        return {}
    return dict(zip(scan.sequences, scan.coverage.seen, strict=True))


def _cues(
    labels: NDArray[np.uint8], inside: NDArray[np.float32], first: Solved, outcome: Outcome, config: Config
) -> Cues | None:
    """What speaks for and against the volumes, from the probabilities of the mask's voxels (K, N); None for a head."""
    assembly, voxel_ml = first.assembly, first.part.prepared.scan.reference.voxel_ml
    images = assembly.images
    if not images.slices:
        return None
    refused = assembly.everywhere(first.unfiltered) - assembly.everywhere(first.outcome.fit)
    expected = inside.sum(1, dtype=np.float64) * voxel_ml
    return Cues(
        cues.of_patient(images, first.outcome.fit.resp),
        cues.of_tissues(
            [t.name for t in images.tissues],
            [int((labels == t.index).sum()) * voxel_ml for t in images.tissues],
            expected.tolist(),
            (expected + refused.sum((0, 2, 3)).cpu().numpy() * voxel_ml).tolist(),
            cues.doubts_ml(outcome.regions, images, voxel_ml=voxel_ml),
        ),
    )


def _intervals(
    labels: NDArray[np.uint8],
    elsewhere: NDArray[np.bool_],
    inside: NDArray[np.float32],
    first: Solved,
    config: Config,
    told: Cues | None,
) -> list[uncertainty.Interval]:
    """Where each tissue's volume may lie, from the probabilities of the mask's voxels (K, N).

    What another part has labelled, ``elsewhere``, is the same in all refits.
    """
    assembly, prepared = first.assembly, first.part.prepared
    reference, tissues = prepared.scan.reference, assembly.images.tissues
    volumes, fixed = (
        [int((places == t.index).sum()) * reference.voxel_ml for t in tissues] for places in (labels, labels[elsewhere])
    )
    refits = refit.volumes_ml(assembly, first.refits, config, voxel_ml=reference.voxel_ml)
    deviations = uncertainty.standard_deviations(
        volumes,
        inside[..., None, None],
        [[a + b for a, b in zip(v, fixed, strict=True)] for v in refits],
        voxel_ml=reference.voxel_ml,
        pixel_mm2=math.prod(s for a, s in enumerate(reference.spacing_mm) if a != prepared.crops.slice_axis),
    )
    return uncertainty.intervals(
        [t.name for t in tissues],
        volumes,
        deviations,
        told,
        of=(config.protocol.name, config.method.name),
        sequences=assembly.images.sequences,
    )


def _fields(fit: Fit, prepared: Prepared, assembly: Assembly) -> dict[str, NDArray[np.float32]]:
    """Each sequence's bias field on the scan's grid, N4's or the fit's; 1 in slices without a fit of their own."""
    if prepared.fields is not None:  # of all sequences, whichever a trained network looks at
        return dict(zip(prepared.scan.sequences, prepared.fields, strict=True))
    if fit.mixture.field is None:
        return {}
    crops, found = prepared.crops, {}
    for sequence, field in zip(assembly.images.sequences, torch.split(fit.mixture.field, 1, 1), strict=True):
        above = torch.zeros(len(crops.image), *field.shape[1:], dtype=crops.mask.dtype)
        above[assembly.large] = field.to(above) - 1
        found[sequence] = crops.restore(above)[0]
        found[sequence] += 1
    return found
