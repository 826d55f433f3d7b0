"""``anatomy``: the mask is split into places by the inner border, and each place's tissues are fitted within it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Self

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.ndimage import binary_fill_holes, label
from torch import Tensor

from monai_deepgmm.errors import UsageError
from monai_deepgmm.images.resampling import relative_depth
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
        denoise_mm: standard deviation of the Gaussian that takes the noise off the image first.
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
    denoise_mm: float = 0.5
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
        limits |= dict.fromkeys(("sigma_mm", "denoise_mm", "temper", "outliers", "tol"), (float, 0))
        check_numbers(self, limits)
        if not (self.temper <= 1 and self.outliers < 1):
            raise UsageError("temper must be at most 1, and outliers below 1")
        check_choice("presence", self.presence, (True, False))

    def resolved(self, protocol: Protocol) -> Self:
        """As it is.

        Raises:
            UsageError: the protocol has neither an anatomy nor levels.
        """
        if protocol.anatomy is None and not any(t.level for t in protocol.tissues):
            found = f"protocol {protocol.name} says neither where tissues can be (anatomy) nor how bright (level)"
            raise UsageError(f"--method anatomy: {found}")
        return self

    def solve(self, images: Images, *, device: str = "cpu") -> Fit:
        """Fits the tissues inside the inner border there, and the others between the two borders.

        Where the protocol has no anatomy, all tissues share the mask.

        The result's components are in the order of the tissues, its mixture is on the image's scale; the diagnostics
        are those of the place with the most tissues, on that place's own scale.
        """
        if images.protocol.anatomy is None:
            fit = self._in_place(images, images.mask, [*range(len(images.tissues))])
            return fit._replace(mixture=m_step(images.image, fit.resp, images.mask, covariance="full", spatial=True))
        images = images.with_wall()
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
        resp = enhanced(resp, images)
        mixture = m_step(images.image, resp, images.mask, covariance="full", spatial=True)
        # Where each place has one tissue, there was nothing to iterate.
        alone = Diagnostics(nll(images.image, images.mask, mixture))
        known = max(fits, key=lambda f: f.resp.shape[1]).diagnostics if fits else alone
        return Fit(resp, mixture._replace(weights=weights), known)

    def _in_place(self, images: Images, place: Tensor, members: list[int]) -> Fit:
        return map_em.fit_map_em(
            images.image,
            place,
            _prior([images.tissues[k] for k in members], images),
            images.spacing_mm,
            spatial=SpatialPrior(sigma_mm=self.sigma_mm, temper=self.temper, denoise_mm=self.denoise_mm),
            density=DensityModel(dof=self.dof, outliers=self.outliers),
            tol=self.tol,
            max_iter=self.max_iter,
        )


def enhanced(resp: Tensor, images: Images) -> Tensor:
    """Responsibilities ``(B, K, H, W)`` that know how much of a voxel late enhancement shows to be scar.

    Its share of a voxel becomes ``f / M + (1 − 1 / M) w``, f the partial volume that late enhancement shows and w the
    responsibility of a mixture of M sequences: each sequence has one voice. The wall's other tissues keep their
    proportions. A dark core that it encloses, alone or with the cavity, is no-reflow and belongs to it, where the core
    is smaller than what encloses it.
    """
    found, late = images.enhanced(), images.anatomy().enhancement
    healthy = next((j for j, t in enumerate(images.tissues) if t.level and t.criteria is None), None)
    if found is None or late is None or healthy is None:
        return resp
    k = [t.name for t in images.tissues].index(late.tissue)
    inside = images.border().inside
    wall = images.mask - inside
    fraction = torch.from_numpy(found.fraction)[:, None].to(resp)
    own = resp[:, k : k + 1]
    share = torch.where(wall > 0, own + (fraction - own) / len(images.sequences), own)
    blended = resp * torch.where(own < 1, (1 - share) / (1 - own).clamp_min(1e-9), 0)
    blended[:, k : k + 1] = share
    blended[:, healthy : healthy + 1] += (images.mask - blended.sum(1, keepdim=True)).clamp_min(0)
    cores = torch.from_numpy(_cores(blended.argmax(1), k, inside[:, 0], wall[:, 0]))[:, None].to(resp.device)
    certain = torch.zeros_like(blended)
    certain[:, k] = 1
    return torch.where(cores, certain, blended)


def _cores(labels: Tensor, tissue: int, inside: Tensor, wall: Tensor) -> NDArray[np.bool_]:
    """What of the wall a tissue encloses, alone or with the cavity ``(B, H, W)``."""
    cores = []
    for found, cavity, around in zip(*(t.cpu().numpy() for t in (labels == tissue, inside > 0, wall > 0)), strict=True):
        ring = found & around
        holes, count = label(binary_fill_holes(ring | cavity) & around & ~ring)
        small = [h for h in range(1, count + 1) if (holes == h).sum() < ring.sum()]
        cores.append(np.isin(holes, small))
    return np.stack(cores)


def _prior(members: list[Tissue], images: Images) -> map_em.Prior:
    means = torch.tensor([[t.level.get(s, 0.0) for s in images.sequences] for t in members], dtype=torch.float64)
    shares = torch.tensor([t.share for t in members], dtype=torch.float64)
    return map_em.Prior(means, shares / shares.sum(), location=_location(members, images))


def _location(members: list[Tissue], images: Images) -> Tensor | None:
    """Where each tissue lies ``(B, K, *S)``: the log of a normal curve over the depth in the mask; flat without one."""
    if all(t.depth is None for t in members):
        return None
    relative = relative_depth(images.mask, images.spacing_mm)
    curves = [torch.zeros_like(relative) if t.depth is None else _curve(relative, *t.depth) for t in members]
    return torch.cat(curves, 1)


def _curve(relative: Tensor, mean: float, deviation: float) -> Tensor:
    return -0.5 * ((relative - mean) / deviation) ** 2
