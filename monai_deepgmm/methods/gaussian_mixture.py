"""``gmm`` and ``svgmm``: the paper's mixtures by EM (S Alg. 1 and 2), with Ma's bias field on request."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar, Self

import torch

from monai_deepgmm.errors import UsageError
from monai_deepgmm.methods.settings import check_choice, check_numbers
from monai_deepgmm.methods.task import Images
from monai_deepgmm.mixture import em, starts
from monai_deepgmm.mixture.fit import Fit
from monai_deepgmm.mixture.gaussian import COVARIANCES, VARIANCE_FLOOR, Covariance
from monai_deepgmm.protocol import Protocol

STARTS = ("signature", "kmeans")
#: The tolerance where none is asked for. A whole volume has hundreds of times the voxels of a slice, and an SVGMM on
#: it creeps on for minutes over gains that change next to no label.
TOL: Mapping[str, float] = {"slice": 1e-6, "volume": 1e-4}
#: A bias field of a higher degree is no longer smooth.
MAX_DEGREE = 6


@dataclass(frozen=True)
class GaussianMixtureConfig:
    """A mixture of Gaussians with one weight per component and image (S eq. 1-2).

    Attributes:
        covariance: the shape of Σ: diag, full, tied or spherical.
        start: signature (the protocol's map of where each tissue is expected) or kmeans; known means come first.
        restarts: how many k-means++ starts are tried; the one with the lowest NLL is kept.
        tol: a fit has converged when its NLL per voxel gains less than this in one iteration; null: 1e-6 for slices,
            1e-4 for volumes.
        max_iter: iterations at most.
        floor: the variance floor, as a fraction of a sequence's variance inside the mask.
        degree: of the bias field's polynomials; 0 for no field.
        presence: whether a tissue's regions must meet the protocol's criteria.
    """

    name: ClassVar[str] = "gmm"
    named: ClassVar[bool] = False
    takes_means: ClassVar[bool] = True
    surroundings: ClassVar[bool] = False
    walled: ClassVar[bool] = False
    spatial: ClassVar[bool] = False

    covariance: Covariance = "diag"
    start: str = "signature"
    restarts: int = 1
    tol: float | None = None
    max_iter: int = 3000
    floor: float = VARIANCE_FLOOR
    degree: int = 0
    presence: bool = False

    def __post_init__(self) -> None:
        """Refuses what makes no sense.

        Raises:
            UsageError: a field holds a value that it cannot have.
        """
        check_choice("covariance", self.covariance, COVARIANCES)
        check_choice("start", self.start, STARTS)
        check_choice("presence", self.presence, (True, False))
        limits: dict[str, tuple[type, float]] = {"tol": (float, 0), "floor": (float, 0)}
        check_numbers(self, {"restarts": (int, 1), "max_iter": (int, 1), "degree": (int, 0), **limits})
        check_degree(self.degree)

    def resolved(self, protocol: Protocol) -> Self:
        """With the tolerance of the protocol's unit."""
        return self if self.tol is not None else replace(self, tol=TOL[protocol.unit])

    def solve(self, images: Images, *, device: str = "cpu") -> Fit:
        """Fits each image by EM."""
        start = images.expected
        if self.start == "kmeans" and images.means is None:
            generator = torch.Generator().manual_seed(images.seed)
            draws = [
                starts.kmeans_start(images.image, images.mask, start.shape[1], generator=generator)
                for _ in range(self.restarts)
            ]
            start = torch.stack(draws)
        image = images.from_zero() if self.degree else images.image
        if self.spatial:  # a weight that was small once comes back by factors; single precision would lose it sooner
            image = image.double()
        fit = em.fit_em(
            image,
            images.mask,
            start,
            spatial=self.spatial,
            covariance=self.covariance,
            tol=TOL[images.protocol.unit] if self.tol is None else self.tol,
            max_iter=self.max_iter,
            floor=self.floor,
            degree=self.degree,
        )
        return images.to_zero(fit) if self.degree else fit


@dataclass(frozen=True)
class SpatialMixtureConfig(GaussianMixtureConfig):
    """The spatially variant mixture, whose weights are maps Π(x) (S §2.1); the paper's Σ is diag.

    One Σ for all components is clearly better for it, since any of them may be small.
    """

    name: ClassVar[str] = "svgmm"
    spatial: ClassVar[bool] = True

    covariance: Covariance = "tied"


def check_degree(degree: int | None) -> None:
    """Refuses polynomials that are not smooth.

    Raises:
        UsageError: the degree is above ``MAX_DEGREE``.
    """
    if degree is not None and degree > MAX_DEGREE:
        raise UsageError(f"degree: got {degree}, expected at most {MAX_DEGREE}")
