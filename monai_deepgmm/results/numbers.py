"""All that is measured of one patient, together."""

from __future__ import annotations

from typing import Any, NamedTuple

from monai_deepgmm.results.measure import Measurement, SliceMeasurement, measure, measure_slices
from monai_deepgmm.results.segmentation import Segmentation
from monai_deepgmm.results.ventricle import Ventricle, measure_ventricle, rays


class Numbers(NamedTuple):
    """What is measured of a patient.

    Attributes:
        tissues: one line for each.
        slices: one for each tissue of each slice.
        ventricle: of a heart; None for another organ.
    """

    tissues: list[Measurement]
    slices: list[SliceMeasurement]
    ventricle: Ventricle | None

    def as_row(self) -> dict[str, Any]:
        """For the patient's row, as JSON takes it."""
        return {
            "measurements": [line._asdict() for line in self.tissues],
            "slices": [line._asdict() for line in self.slices],
            "ventricle": None if self.ventricle is None else self.ventricle._asdict(),
        }


def numbers(segmentation: Segmentation) -> Numbers:
    """Measures a patient."""
    close = segmentation.cropped()
    found, around = measure(close), rays(close)
    return Numbers(found, measure_slices(close, around), measure_ventricle(close, around, found))
