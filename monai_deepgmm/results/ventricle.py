"""The left ventricle in a cardiologist's numbers: mass, cavity, thickness, transmurality, and scar by other rules."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from monai_deepgmm.results import no_reflow, segments, thresholds, wall
from monai_deepgmm.results.measure import Measurement, tidied, tidy
from monai_deepgmm.results.segmentation import Segmentation
from monai_deepgmm.results.wall import Rays


class Ventricle(NamedTuple):
    """The left ventricle of one patient, whose protocol knows of a cavity and of a wall around it.

    What a missing sequence hides is None.

    Attributes:
        lv_mass_g: of the wall, all of its tissues.
        cavity_ml: of what lies within the wall.
        scar_edema_ml: scar and edema together.
        scar_edema_g: their mass.
        scar_edema_percent: their share of the wall.
        thickness_mean_mm: of the wall along rays from the middle of the cavity (``wall.WallSummary``).
        thickness_min_mm: the least.
        thickness_max_mm: the greatest.
        transmural_25_percent: percentage of the rays on which scar takes more than 25 % of the wall's thickness.
        transmural_50_percent: more than 50 %.
        transmural_75_percent: more than 75 %.
        scar_2sd_percent: what percentage of the wall is brighter than healthy myocardium by 2 standard deviations.
        scar_3sd_percent: by 3.
        scar_5sd_percent: by 5.
        scar_6sd_percent: by 6.
        scar_fwhm_percent: brighter than half way between the wall's least and greatest intensity.
        scar_otsu_percent: brighter than Otsu's threshold.
        no_reflow_ml: the dark core of the scar, which its volume includes.
        segments: of the American Heart Association: why there are none.
    """

    lv_mass_g: float | None
    cavity_ml: float
    scar_edema_ml: float | None
    scar_edema_g: float | None
    scar_edema_percent: float | None
    thickness_mean_mm: float | None
    thickness_min_mm: float | None
    thickness_max_mm: float | None
    transmural_25_percent: float | None
    transmural_50_percent: float | None
    transmural_75_percent: float | None
    scar_2sd_percent: float | None
    scar_3sd_percent: float | None
    scar_5sd_percent: float | None
    scar_6sd_percent: float | None
    scar_fwhm_percent: float | None
    scar_otsu_percent: float | None
    no_reflow_ml: float | None
    segments: str = segments.UNKNOWN


def rays(segmentation: Segmentation) -> Rays | None:
    """The wall along rays; None where the protocol knows of no cavity."""
    anatomy, protocol = segmentation.protocol.anatomy, segmentation.protocol
    if anatomy is None:
        return None
    scar = _scar(segmentation)
    return wall.along_rays(
        segmentation.where(*protocol.percent_of),
        segmentation.where(*anatomy.inside),
        None if scar is None else segmentation.where(scar),
        segmentation.reference.affine,
        segmentation.slice_axis,
    )


def measure_ventricle(segmentation: Segmentation, rays: Rays | None, rows: Sequence[Measurement]) -> Ventricle | None:
    """The left ventricle's wall and cavity, for the patient's lines of ``measurements.tsv``.

    Args:
        segmentation: what is measured.
        rays: of ``rays``.
        rows: of ``measure.measure``.

    Returns:
        None where the protocol knows of no cavity.
    """
    anatomy, protocol = segmentation.protocol.anatomy, segmentation.protocol
    if anatomy is None or rays is None:
        return None
    by_name = {row.tissue: row for row in rows}
    parts = [by_name[name] for name in protocol.percent_of if name in by_name]
    scar, sequence = _scar(segmentation), anatomy.enhancement.sequence if anatomy.enhancement else None
    beside = protocol.tissue(scar).merges_into if scar else None
    both = [by_name[name] for name in (scar, beside) if name in by_name] if beside in by_name else []
    around: dict[str, Any] = {name: tidied(value) for name, value in wall.summary(rays)._asdict().items()}
    return Ventricle(
        lv_mass_g=_mass(parts),
        cavity_ml=tidy(sum(by_name[name].volume_ml for name in anatomy.inside if name in by_name)),
        scar_edema_ml=tidied(_sum(row.volume_ml for row in both)),
        scar_edema_g=_mass(both),
        scar_edema_percent=tidied(_sum(row.percent for row in both)),
        **around,
        **_by_intensity(segmentation, scar, sequence),
    )


def _by_intensity(segmentation: Segmentation, scar: str | None, sequence: str | None) -> dict[str, Any]:
    """Scar by each threshold, in percent of the wall, and no-reflow in ml; None where the sequence is not there."""
    columns = {name: f"scar_{name.lower()}_percent" for name in thresholds.THRESHOLDS}
    if scar is None or sequence is None or sequence not in segmentation.images:
        return dict.fromkeys([*columns.values(), "no_reflow_ml"])
    protocol, axis, image = segmentation.protocol, segmentation.slice_axis, segmentation.images[sequence]
    injured = {scar, protocol.tissue(scar).merges_into}
    healthy = segmentation.where(*(name for name in protocol.percent_of if name not in injured))
    found = thresholds.shares(image, segmentation.where(*protocol.percent_of), healthy, axis)
    cavity = segmentation.where(*protocol.anatomy.inside) if protocol.anatomy else ~segmentation.mask
    core = no_reflow.no_reflow(segmentation.where(scar), cavity, healthy, image, axis)
    volume = tidy(int(core.sum()) * float(segmentation.reference.voxel_ml))
    return {columns[name]: tidied(share) for name, share in found.items()} | {"no_reflow_ml": volume}


def _scar(segmentation: Segmentation) -> str | None:
    """The tissue that late enhancement shows; None where the patient has no sequence that does."""
    late = segmentation.protocol.anatomy and segmentation.protocol.anatomy.enhancement
    return late.tissue if late and any(t.name == late.tissue for t in segmentation.tissues) else None


def _mass(rows: Sequence[Measurement]) -> float | None:
    return tidied(_sum(row.mass_g for row in rows))


def _sum(values: Iterable[float | None]) -> float | None:
    """None where there is nothing to sum, or where one of the values is not known."""
    known = list(values)
    return sum(v for v in known if v is not None) if known and None not in known else None
