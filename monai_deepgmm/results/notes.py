"""What the user is told of a result: warnings, each with its code."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from monai_deepgmm.images.preparation import Prepared
from monai_deepgmm.methods import exchange_check, naming
from monai_deepgmm.methods.config import Config
from monai_deepgmm.mixture import bias_field
from monai_deepgmm.protocol import Protocol, Tissue
from monai_deepgmm.results import uncertainty
from monai_deepgmm.results.assembly import Assembly
from monai_deepgmm.results.provenance import Outcome
from monai_deepgmm.wording import spans

#: Names given with less certainty than this are reported.
CERTAIN = 0.5


def about(prepared: Prepared, assembly: Assembly, outcome: Outcome, config: Config) -> Iterator[str]:
    """All warnings that a fit gives rise to, in the order of reading."""
    yield from _about_sequences(config.protocol, assembly.images.sequences, prepared.scan.overlooked)
    yield from _about_order(prepared, assembly, config.protocol.components(assembly.images.sequences))
    yield from _about_fit(prepared, assembly, outcome)
    yield from _about_names(assembly, outcome, config)
    yield from _about_volumes(assembly, outcome)
    yield from _about_field(assembly, outcome)


def _about_sequences(protocol: Protocol, sequences: tuple[str, ...], overlooked: Mapping[str, str]) -> Iterator[str]:
    absent = [s for s in protocol.sequences if s not in sequences]
    if not absent:
        return
    by_index = {t.index: t.name for t in protocol.tissues}
    merged = [(by_index[a], by_index[b]) for a, b in protocol.merged(sequences).items() if a != b and b in by_index]
    told = "; ".join(f"{a} is counted as {b}" for a, b in merged) or "no tissue is lost"
    told += "".join(f"; {overlooked[sequence]}" for sequence in absent if sequence in overlooked)
    yield f"W_MISSING: without {', '.join(absent)}: {told}"


def _about_order(prepared: Prepared, assembly: Assembly, tissues: tuple[Tissue, ...]) -> Iterator[str]:
    crops, sequences = prepared.crops, prepared.scan.sequences
    seen = None if crops.slices else crops.measured
    swapped = naming.looks_swapped(
        crops.image, crops.mask, tissues, sequences, spacing_mm=crops.spacing_mm, measured=seen
    )
    if swapped is not None:
        order = ", ".join(f"{a} like {b}" for a, b in zip(sequences, swapped, strict=True) if a != b)
        yield f"W_SWAPPED: the sequences look exchanged ({order}); check which file is which"
    elif found := exchange_check.exchanged(assembly.images):
        yield (
            f"W_SWAPPED: {found.late} and {found.other} look exchanged (the wall is {found.ratio:.2f} times as uneven "
            f"on {found.late}, where scar shines); check which file is which"
        )


def _about_fit(prepared: Prepared, assembly: Assembly, outcome: Outcome) -> Iterator[str]:
    known, slices = outcome.fit.diagnostics, assembly.images.slices
    if slices and assembly.small:
        small = spans(prepared.crops.slices[i] for i in assembly.small)
        yield f"W_SMALL: slice {small} has too few voxels for a fit and uses its neighbour's mixture"
    if known.converged is not None and not known.converged.all():
        place = _where(slices, ~known.converged)
        yield f"W_CONVERGENCE: the fit did not converge{place}; raise max_iter or tol"
    if known.reseeded is not None and known.reseeded.any():
        yield f"W_RESEEDED: a collapsed component was started anew{_where(slices, known.reseeded > 0)}"
    if known.collapsed is not None:
        for tissue, lost in zip(assembly.images.tissues, known.collapsed.T, strict=True):
            if lost.any():
                yield f"W_COLLAPSED: {tissue.name} holds nearly no voxel{_where(slices, lost)}"


def _about_names(assembly: Assembly, outcome: Outcome, config: Config) -> Iterator[str]:
    if outcome.contradictions:
        yield f"W_NAMES: the tissues' names contradict what was found ({'; '.join(outcome.contradictions)})"
    unsure = outcome.naming.certainty < CERTAIN
    if not config.method.named and unsure.any():
        place = _where(assembly.images.slices, unsure)
        yield f"W_NAMES: the tissues' names are uncertain{place}; check them on the page"


def _about_volumes(assembly: Assembly, outcome: Outcome) -> Iterator[str]:
    flags = uncertainty.unsure(outcome.intervals)
    wide = [
        f"{tissue.name} {found.low_ml:.1f} to {found.high_ml:.1f} ml"
        for tissue, found, flag in zip(assembly.images.tissues, outcome.intervals, flags, strict=True)
        if flag
    ]
    if wide:
        yield f"W_UNSURE: volumes are uncertain ({', '.join(wide)}); check the page with care"


def _about_field(assembly: Assembly, outcome: Outcome) -> Iterator[str]:
    fit, images = outcome.fit, assembly.images
    suspicious = bias_field.suspicious(fit.mixture, fit.resp, images.mask.to(fit.resp)).any(0)
    chosen = [s for s, flag in zip(images.sequences, suspicious.tolist(), strict=True) if flag]
    if chosen:
        yield f"W_BIAS: the bias field of {', '.join(chosen)} follows the tissues; compare with --set degree=0"


def _where(slices: tuple[int, ...], flags: Tensor) -> str:
    """In which slices; nothing for a volume."""
    chosen = [slices[int(i)] for i in torch.nonzero(flags).flatten()] if slices else []
    return f" in slice {spans(chosen)}" if chosen else ""
