"""What is done to every scan before any fit; images and networks that were treated otherwise do not fit together."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from numbers import Integral
from typing import TYPE_CHECKING

from monai_deepgmm.errors import UsageError
from monai_deepgmm.images.nifti import DEFAULT_MAX_VOXELS
from monai_deepgmm.protocol import Protocol
from monai_deepgmm.registration import ALIGN, Align

if TYPE_CHECKING:
    from monai.transforms import Compose

    from monai_deepgmm.images.preparation import Step


@dataclass(frozen=True)
class Preprocessing:
    """How a scan is loaded and prepared.

    Attributes:
        n4: whether SimpleITK's N4 takes the shading off before anything else; then no field is fitted.
        smooth_noise: whether a sequence that is much noisier than what it shows is smoothed first, in stacks of slices.
        frame: which frame of a 4-D file, counted from 0.
        max_voxels: larger images are refused.
        align: what lies beside the reference: slices of hearts, moved where that gains (auto), also whole volumes of
            brains (rigid), or nothing (off).
    """

    n4: bool = False
    smooth_noise: bool = True
    frame: int | None = field(default=None, metadata={"set": False})
    max_voxels: int = field(default=DEFAULT_MAX_VOXELS, metadata={"set": False})
    align: Align = field(default="auto", metadata={"set": False})

    def __post_init__(self) -> None:
        """Refuses what makes no sense.

        Raises:
            UsageError: n4 or smooth_noise is neither true nor false, align is none of its choices, or frame or
                max_voxels is no whole number that can be meant.
        """
        for option, value, least in (("--frame", self.frame, 0), ("--max-voxels", self.max_voxels, 1)):
            if value is not None and (not isinstance(value, Integral) or value < least):
                raise UsageError(f"{option}: got {value!r}, expected a whole number of at least {least}")
        if self.align not in ALIGN:
            raise UsageError(f"--align {self.align}: choose {', '.join(ALIGN)}")
        for key, value in (("n4", self.n4), ("smooth_noise", self.smooth_noise)):
            if not isinstance(value, bool):
                raise UsageError(f"{key}: {value!r} is unknown; choose one of true, false")

    def normalisation(self, protocol: Protocol) -> str:
        """A name that tells two scales of intensity apart; means and networks are used only with their own."""
        return protocol.normalisation + ("-n4" if self.n4 else "")

    def steps(self, protocol: Protocol) -> tuple[Step, ...]:
        """The steps from files to images."""
        from monai_deepgmm.images import preparation

        return preparation.steps(protocol, **dataclasses.asdict(self))

    def transforms(self, protocol: Protocol) -> Compose:
        """The steps, as MONAI's transforms."""
        from monai_deepgmm.images import preparation

        return preparation.preprocessing(protocol, **dataclasses.asdict(self))
