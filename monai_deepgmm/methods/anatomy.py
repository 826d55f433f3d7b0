"""``anatomy``: the mask is split into places by the inner border, and each place's tissues are fitted within it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Self

import torch
from torch import Tensor

from monai_deepgmm.errors import UsageError
from monai_deepgmm.methods.settings import check_choice, check_numbers
from monai_deepgmm.methods.task import Images
from monai_deepgmm.mixture import map_em
from monai_deepgmm.mixture.fit import Diagnostics, Fit
from monai_deepgmm.mixture.gaussian import m_step, nll
from monai_deepgmm.mixture.map_em import DensityModel, SpatialPrior
from monai_deepgmm.protocol import Protocol, Tissue


@dataclass(frozen=True)
class AnatomicalConfig:
    """A mixture with anatomical priors in each place of the mask, by MAP-EM.

    Attributes:
        sigma_mm: the neighbourhood over which Π is averaged, a Gaussian's standard deviation, in mm.
        temper: what one voxel is worth as an observation, 0 to 1.
        dof: degrees of freedom of Student's t, the shape of a component; null: a Gaussian.
        outliers: the share of voxels that belong to no component.
        tol: a fit has converged when a responsibility changes by less on average.
        max_iter: iterations at most.
        presence: whether a tissue's regions must meet the protocol's criteria.
        perturbations: how many fits with moved priors show how far volumes depend on them.
    """

    name: ClassVar[str] = "anatomy"
    named: ClassVar[bool] = True
    takes_means: ClassVar[bool] = False

    sigma_mm: float = 2.2
    temper: float = 0.3
    dof: float | None = 10.0
    outliers: float = 0.0
    tol: float = map_em.TOL
    max_iter: int = map_em.MAX_ITER
    presence: bool = True
    perturbations: int = 3

    def __post_init__(self) -> None:
        """Refuses what makes no sense.

        Raises:
            UsageError: a field holds a value that it cannot have.
        """
        limits: dict[str, tuple[type, float]] = {"max_iter": (int, 1), "perturbations": (int, 0), "dof": (float, 1)}
        limits |= dict.fromkeys(("sigma_mm", "temper", "outliers", "tol"), (float, 0))
        check_numbers(self, limits)
        if not (self.temper <= 1 and self.outliers < 1):
            raise UsageError("temper must be at most 1, and outliers below 1")
        check_choice("presence", self.presence, (True, False))

    def resolved(self, protocol: Protocol) -> Self:
        """As it is.

        Raises:
            UsageError: the protocol has no anatomy.
        """
        if protocol.anatomy is None:
            raise UsageError(f"--method anatomy: protocol {protocol.name} does not say where tissues can be")
        return self

    def solve(self, images: Images, *, device: str = "cpu") -> Fit:
        """Fits the tissues inside the inner border there, and the others between the two borders.

        The result's components are in the order of the tissues, its mixture is on the image's scale; the diagnostics
        are those of the place with the most tissues, on that place's own scale.
        """
        tissues, ring = images.tissues, images.border()
        within = [k for k, t in enumerate(tissues) if t.name in images.anatomy().inside]
        around = [k for k in range(len(tissues)) if k not in within]
        places = [(ring.inside, within), (images.mask - ring.inside, around)]
        if not (within and around):
            places = [(images.mask, [*within, *around])]
        resp = images.image.new_zeros((len(images.image), len(tissues), *images.image.shape[2:]))
        weights = torch.zeros_like(resp)
        fits = []
        for place, members in places:
            if len(members) == 1:  # nothing to tell apart
                resp[:, members] = weights[:, members] = place
                continue
            fits.append(self._in_place(images, place, members))
            resp[:, members], weights[:, members] = fits[-1].resp, fits[-1].mixture.weights
        mixture = m_step(images.image, resp, images.mask, covariance="full", spatial=True)
        # Where each place has one tissue, there was nothing to iterate.
        alone = Diagnostics(nll(images.image, images.mask, mixture))
        known = max(fits, key=lambda f: f.resp.shape[1]).diagnostics if fits else alone
        return Fit(resp, mixture._replace(weights=weights), known)

    def _in_place(self, images: Images, place: Tensor, members: list[int]) -> Fit:
        return map_em.fit(
            images.image,
            place,
            _prior([images.tissues[k] for k in members], images.sequences),
            images.spacing_mm,
            spatial=SpatialPrior(sigma_mm=self.sigma_mm, temper=self.temper),
            density=DensityModel(dof=self.dof, outliers=self.outliers),
            tol=self.tol,
            max_iter=self.max_iter,
        )


def _prior(members: list[Tissue], sequences: tuple[str, ...]) -> map_em.Prior:
    means = torch.tensor([[t.level.get(s, 0.0) for s in sequences] for t in members], dtype=torch.float64)
    shares = torch.tensor([t.share for t in members], dtype=torch.float64)
    return map_em.Prior(means, shares / shares.sum())
