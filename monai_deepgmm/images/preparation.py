"""One way in: a study loaded, checked, freed of shading and noise, cropped and normalised, whoever asks for it.

The steps are transforms of MONAI's kind (one dictionary in, one out), so that a bundle's configuration can hold, change
and extend them. Each reads and writes ``scan`` or ``crops``.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from monai_deepgmm.images import cropping, loading, noise
from monai_deepgmm.images.cropping import Crops
from monai_deepgmm.images.grid import slice_axis
from monai_deepgmm.images.loading import Scan
from monai_deepgmm.images.n4 import field as n4_field
from monai_deepgmm.images.nifti import DEFAULT_MAX_VOXELS
from monai_deepgmm.patients.study import Study
from monai_deepgmm.protocol import Protocol
from monai_deepgmm.registration import Align

if TYPE_CHECKING:
    from monai.transforms import Compose

#: One step: a dictionary in, the same with more in it out.
Step = Callable[[Mapping[str, Any]], dict[str, Any]]


class Prepared(NamedTuple):
    """A patient, ready for any method.

    Attributes:
        scan: the sequences and the mask on the reference's grid.
        crops: the images that mixtures are fitted to.
        fields: the bias fields (M, X, Y, Z) that were taken off already, or None.
    """

    scan: Scan
    crops: Crops
    fields: NDArray[np.float32] | None = None

    def tight(self) -> Prepared:
        """The same with no more around the masks than they need."""
        return self._replace(crops=self.crops.tight()) if self.crops.slices else self


def prepare(study: Study, preprocessing: Compose | Sequence[Step]) -> Prepared:
    """Takes a study through the steps of a preprocessing.

    Args:
        study: the files.
        preprocessing: from ``steps`` or ``preprocessing``, or one that a user has changed.

    Raises:
        StudyError: the patient cannot be used; the code says why.
    """
    data: dict[str, Any] = {"study": study}
    # Step by step, because Compose would hide a StudyError inside a RuntimeError.
    each = preprocessing if isinstance(preprocessing, Sequence) else preprocessing.flatten().transforms
    for step in each:
        data = step(data)
    return Prepared(data["scan"], data["crops"], data.get("fields"))


class LoadStudyd:
    """Adds ``scan``: the sequences and mask of ``study``, loaded by key, checked, on the reference's grid.

    Args:
        protocol: which sequence is the reference, which are needed.
        frame: which frame of a 4-D file, counted from 0.
        max_voxels: a larger image is refused before it is read.
        align: how sequences are brought together.
    """

    def __init__(
        self,
        protocol: Protocol,
        *,
        frame: int | None = None,
        max_voxels: int = DEFAULT_MAX_VOXELS,
        align: Align = "off",
    ) -> None:
        self.protocol, self.frame, self.max_voxels, self.align = protocol, frame, max_voxels, align

    def __call__(self, data: Mapping[str, Any]) -> dict[str, Any]:
        """``study`` → ``study``, ``scan``."""
        more: dict[str, Any] = {"frame": self.frame, "max_voxels": self.max_voxels, "align": self.align}
        return {**data, "scan": loading.load(data["study"], self.protocol, **more)}


class Cropd:
    """Adds ``crops``: the images of the scan, cropped and normalised.

    Args:
        protocol: the unit, the crop and the normalisation.
    """

    def __init__(self, protocol: Protocol) -> None:
        self.protocol = protocol

    def __call__(self, data: Mapping[str, Any]) -> dict[str, Any]:
        """``scan`` → ``scan``, ``crops``."""
        return {**data, "crops": cropping.crops(data["scan"], self.protocol, dtype=torch.float32)}


class CorrectShadingd:
    """Divides each sequence of ``scan`` by its bias field, and adds the ``fields`` (M, X, Y, Z), by N4."""

    def __call__(self, data: Mapping[str, Any]) -> dict[str, Any]:
        """``scan`` → ``scan``, ``fields``."""
        patient: Scan = data["scan"]
        spacing_mm = patient.reference.spacing_mm
        fields = np.stack([n4_field(image, patient.mask, spacing_mm) for image in patient.image])
        return {**data, "scan": dataclasses.replace(patient, image=patient.image / fields), "fields": fields}


class SmoothNoised:
    """Smooths each sequence of ``scan`` that is much noisier than what it shows, slice by slice; says so (W_NOISE).

    Args:
        averaged: a sequence whose brightness is averaged over neighbourhoods later on, and needs less of it.
    """

    def __init__(self, averaged: str | None = None) -> None:
        self.averaged = averaged

    def __call__(self, data: Mapping[str, Any]) -> dict[str, Any]:
        """``scan`` → ``scan``."""
        patient: Scan = data["scan"]
        spacing_mm = patient.reference.spacing_mm
        axis = slice_axis(spacing_mm)
        across, down = (s for a, s in enumerate(spacing_mm) if a != axis)
        mask = np.moveaxis(patient.mask, axis, 0)
        image, warnings = patient.image, list(patient.warnings)
        inputs = {name: dict(facts) for name, facts in patient.inputs.items()}
        for channel, sequence in enumerate(patient.sequences):
            stack = np.moveaxis(patient.image[channel], axis, 0)
            left = noise.LEFT_AVERAGED if sequence == self.averaged else noise.LEFT
            found = noise.examine(stack, mask, (across, down), left=left)
            inputs[sequence]["noise"] = {key: round(value, 4) for key, value in found._asdict().items()}
            if found.smoothing_mm > 0:
                image = image.copy() if image is patient.image else image
                quiet = noise.smoothed(stack, mask, (across, down), found.smoothing_mm)
                image[channel] = np.moveaxis(quiet, 0, axis)
                warnings.append(f"W_NOISE: {sequence} {found}")
        changed = dataclasses.replace(patient, image=image, warnings=tuple(warnings), inputs=inputs)
        return {**data, "scan": changed}


def steps(
    protocol: Protocol,
    *,
    frame: int | None = None,
    max_voxels: int = DEFAULT_MAX_VOXELS,
    n4: bool = False,
    smooth_noise: bool = True,
    align: Align = "off",
) -> tuple[Step, ...]:
    """What happens to every study, on the command line and in the bundle alike: load, align, check, crop, normalise.

    Args:
        protocol: what to look for.
        frame: which frame of a 4-D file, counted from 0.
        max_voxels: a larger image is refused before it is read.
        n4: whether N4 takes the shading off.
        smooth_noise: whether noisy stacks of slices are smoothed.
        align: how sequences are brought together.
    """
    between: list[Step] = [CorrectShadingd()] if n4 else []
    late = protocol.anatomy.enhancement if protocol.anatomy else None
    between += [SmoothNoised(late.sequence if late else None)] if smooth_noise and protocol.unit == "slice" else []
    return (LoadStudyd(protocol, frame=frame, max_voxels=max_voxels, align=align), *between, Cropd(protocol))


def preprocessing(
    protocol: Protocol,
    *,
    frame: int | None = None,
    max_voxels: int = DEFAULT_MAX_VOXELS,
    n4: bool = False,
    smooth_noise: bool = True,
    align: Align = "off",
) -> Compose:
    """``steps`` as MONAI's transforms, for a bundle's configuration."""
    from monai.transforms import Compose, Transform  # here, as importing monai takes seconds

    for kind in (LoadStudyd, CorrectShadingd, SmoothNoised, Cropd):
        Transform.register(kind)
    made = steps(protocol, frame=frame, max_voxels=max_voxels, n4=n4, smooth_noise=smooth_noise, align=align)
    return Compose(made)
