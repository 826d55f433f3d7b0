"""``pvgmm``: voxels that may hold two tissues, a bias field that must pay for itself, neighbours that agree."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar, Self

from monai_deepgmm.errors import UsageError
from monai_deepgmm.methods import hyperintense
from monai_deepgmm.methods.gaussian_mixture import check_degree
from monai_deepgmm.methods.settings import check_choice, check_numbers
from monai_deepgmm.methods.task import Images
from monai_deepgmm.mixture import mixel_model, partial_volume
from monai_deepgmm.mixture.fit import Fit
from monai_deepgmm.mixture.gaussian import VARIANCE_FLOOR
from monai_deepgmm.protocol import Protocol


@dataclass(frozen=True)
class PartialVolumeConfig:
    """A mixture of pure tissues and of voxels that two touching tissues share.

    Attributes:
        degree: of the bias field's polynomials; 0 for no field; null: 3, and the field is dropped where it explains
            less than its parameters cost (BIC).
        pooling: how far each tissue's covariance is drawn towards the average of all.
        coupling: how strongly neighbouring voxels agree; null: 8 with one sequence, 5 with several.
        tol: a fit has converged when responsibilities change by less, summed over a voxel, on average.
        max_iter: iterations at most.
        floor: the variance floor, as a fraction of a sequence's variance inside the mask.
        require_bic_gain: whether a field is dropped where it explains less than it costs; null: unless a degree is
            given.
        presence: whether a tissue's regions must meet the protocol's criteria.
    """

    name: ClassVar[str] = "pvgmm"
    named: ClassVar[bool] = True
    takes_means: ClassVar[bool] = False
    surroundings: ClassVar[bool] = False
    walled: ClassVar[bool] = False
    finds_regions: ClassVar[bool] = True

    degree: int | None = None
    pooling: float = 0.3
    coupling: float | None = None
    tol: float = partial_volume.TOL
    max_iter: int = 3000
    floor: float = VARIANCE_FLOOR
    require_bic_gain: bool | None = None
    presence: bool = False

    def __post_init__(self) -> None:
        """Refuses what makes no sense.

        Raises:
            UsageError: a field holds a value that it cannot have.
        """
        floats = dict.fromkeys(("pooling", "coupling", "tol", "floor"), (float, 0))
        check_numbers(self, {"degree": (int, 0), "max_iter": (int, 1), **floats})
        check_degree(self.degree)
        check_choice("require_bic_gain", self.require_bic_gain, (None, True, False))
        check_choice("presence", self.presence, (True, False))

    def resolved(self, protocol: Protocol) -> Self:
        """With the degree that will be used.

        Raises:
            UsageError: the protocol does not say which tissues touch.
        """
        if not protocol.borders:
            raise UsageError(f"--method pvgmm: protocol {protocol.name} does not say which tissues touch (borders)")
        gain = self.degree is None if self.require_bic_gain is None else self.require_bic_gain
        degree = mixel_model.DEGREE if self.degree is None else self.degree
        return replace(self, degree=degree, require_bic_gain=gain)

    def solve(self, images: Images, *, device: str = "cpu") -> Fit:
        """Fits each image; ``resp`` are the fractions of the tissues in each voxel.

        Tissues that are too bright for the mixture (``Tissue.hyperintense``) are found when it has been fitted.
        """
        mixed = hyperintense.without(images)
        return hyperintense.added(self._mixture(mixed), images)

    def _mixture(self, images: Images) -> Fit:
        where = {tissue.name: i for i, tissue in enumerate(images.tissues)}
        pairs = [(where[a], where[b]) for a, b in images.protocol.borders if a in where and b in where]
        settled = self.resolved(images.protocol)
        fit = partial_volume.fit_partial_volume(
            images.image,
            images.mask,
            images.expected,
            images.spacing_mm,
            mixel_model.Model(
                tuple(pairs),
                degree=settled.degree or 0,
                require_bic_gain=bool(settled.require_bic_gain),
                pooling=self.pooling,
                coupling=self.coupling,
                anchored=tuple(where[name] for name in images.protocol.anchored if name in where),
            ),
            measured=images.measured,
            zero=images.zero,
            tol=self.tol,
            max_iter=self.max_iter,
            floor=self.floor,
        )
        return images.to_zero(fit)
