"""``anatomy``: the mask is split into places by the inner border, and each place's tissues are fitted within it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Self

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.ndimage import maximum_filter1d
from torch import Tensor

from monai_deepgmm.errors import UsageError
from monai_deepgmm.images.resampling import relative_depth
from monai_deepgmm.methods.enclosure import cores
from monai_deepgmm.methods.polar import ANGLES
from monai_deepgmm.methods.settings import check_choice, check_numbers
from monai_deepgmm.methods.task import Images
from monai_deepgmm.mixture import map_em
from monai_deepgmm.mixture import statistics as sufficient
from monai_deepgmm.mixture.fit import Diagnostics, Fit, likeliest
from monai_deepgmm.mixture.gaussian import VARIANCE_FLOOR, nll
from monai_deepgmm.mixture.map_em import DensityModel, SpatialPrior
from monai_deepgmm.mixture.statistics import Statistics
from monai_deepgmm.protocol import Protocol, Tissue

#: What lies so many angles away is at the same angle.
BESIDE = 2


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
        perturbations: how many fits with moved priors show how far volumes depend on them; null: none where intervals
            follow a rule of their own, else 3.
    """

    name: ClassVar[str] = "anatomy"
    named: ClassVar[bool] = True
    takes_means: ClassVar[bool] = False
    surroundings: ClassVar[bool] = False
    walled: ClassVar[bool] = True

    sigma_mm: float = 2.2
    denoise_mm: float = 0.5
    temper: float = 0.3
    dof: float | None = 10.0
    outliers: float = 0.0
    tol: float = map_em.TOL
    max_iter: int = map_em.MAX_ITER
    presence: bool = True
    perturbations: int | None = None

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
        return self.solve_all([images])[0]

    def solve_all(self, variants: Sequence[Images]) -> list[Fit]:
        """The fits of ``solve`` to the same images with several protocols, as one batch.

        Args:
            variants: at least one; alike but for levels, the anatomy and the wall's borders.
        """
        first = variants[0]
        if first.protocol.anatomy is not None:
            variants = [images.with_wall() for images in variants]
        image, mask = (torch.cat([getattr(v, name) for v in variants]) for name in ("image", "mask"))
        resp = image.new_zeros((len(image), len(first.tissues), *image.shape[2:]))
        weights, fits = torch.zeros_like(resp), []
        for place, members in _places(variants, mask):
            if len(members) == 1:  # nothing to tell apart
                resp[:, members] = weights[:, members] = place
                continue
            fits.append(self._in_place(variants, image, place, members))
            resp[:, members], weights[:, members] = fits[-1].resp, fits[-1].mixture.weights
        known = max(fits, key=lambda f: f.resp.shape[1]).diagnostics if fits else None
        rows, seen = torch.arange(len(image)).chunk(len(variants)), _statistics(first)
        return [
            _on_scale(images, seen, resp[r], weights[r], None if known is None else known.rows(r))
            for images, r in zip(variants, rows, strict=True)
        ]

    def _in_place(self, variants: Sequence[Images], image: Tensor, place: Tensor, members: list[int]) -> Fit:
        return map_em.fit_map_em(
            image,
            place,
            _prior(members, variants),
            variants[0].spacing_mm,
            spatial=SpatialPrior(sigma_mm=self.sigma_mm, temper=self.temper, denoise_mm=self.denoise_mm),
            density=DensityModel(dof=self.dof, outliers=self.outliers),
            tol=self.tol,
            max_iter=self.max_iter,
        )


def _places(variants: Sequence[Images], mask: Tensor) -> list[tuple[Tensor, list[int]]]:
    """Each place ``(R B, 1, *S)`` of R variants with the tissues that are fitted in it."""
    first, everyone = variants[0], [*range(len(variants[0].tissues))]
    if first.protocol.anatomy is None:
        return [(mask, everyone)]
    within = [k for k in everyone if first.tissues[k].name in first.anatomy().inside]
    around = [k for k in everyone if k not in within]
    if not (within and around):
        return [(mask, [*within, *around])]
    inside = torch.cat([v.border().inside for v in variants])
    return [(inside, within), (mask - inside, around)]


def _statistics(images: Images) -> Statistics:
    """Of the images, which are about standardised already."""
    image, mask = images.image.flatten(2), images.mask.flatten(2).to(images.image)
    return sufficient.statistics(image, mask, torch.ones_like(image[..., 0]), "full")


def _on_scale(images: Images, seen: Statistics, resp: Tensor, weights: Tensor, known: Diagnostics | None) -> Fit:
    """The fit of one variant with what late enhancement shows, its mixture on the image's scale.

    Args:
        images: the variant.
        seen: the statistics of the images.
        resp: ``(B, K, *S)``, without late enhancement.
        weights: Π ``(B, K, *S)``.
        known: how the fit went, or None.
    """
    if images.protocol.anatomy is not None:
        resp = enhanced(resp, images)
    floor = torch.full_like(seen.centre, VARIANCE_FLOOR)
    mixture = seen.original(sufficient.estimate(resp.flatten(2) @ seen.features.mT, seen, floor))
    mixture = mixture._replace(weights=resp)
    if known is None:  # where each place has one tissue, there was nothing to iterate
        known = Diagnostics(nll(images.image, images.mask, mixture))
    return Fit(resp, mixture._replace(weights=weights), known)


def enhanced(resp: Tensor, images: Images) -> Tensor:
    """Responsibilities ``(B, K, H, W)`` that know how much of a voxel late enhancement shows to be scar.

    Its share of a voxel becomes ``f / M + (1 − 1 / M) w``, f the partial volume that late enhancement shows and w the
    responsibility of a mixture of M sequences: each sequence has one voice; in the wall's outer part at most what it is
    further in, since infarcts begin at the endocardium. The wall's other tissues keep their proportions. A dark core
    that it encloses, alone or with the cavity, is no-reflow and belongs to it, where the core is smaller than what
    encloses it.
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
    share = torch.from_numpy(_from_within(share[:, 0].cpu().numpy(), found.inner, images))[:, None].to(resp)
    blended = resp * torch.where(own < 1, (1 - share) / (1 - own).clamp_min(1e-9), 0)
    blended[:, k : k + 1] = share
    blended[:, healthy : healthy + 1] += (images.mask - blended.sum(1, keepdim=True)).clamp_min(0)
    dark = torch.from_numpy(_cores(likeliest(blended), k, inside[:, 0], wall[:, 0]))[:, None].to(resp.device)
    certain = torch.zeros_like(blended)
    certain[:, k] = 1
    return torch.where(dark, certain, blended)


def _from_within(share: NDArray[np.floating], inner: NDArray[np.bool_], images: Images) -> NDArray[np.floating]:
    """Shares ``(B, H, W)`` of which those in the wall's outer part are no larger than further in at the same angle."""
    ring = images.border()
    outer = ((images.mask - ring.inside)[:, 0].cpu().numpy() > 0) & ~inner
    limited = share.copy()
    for own, angle, within, beyond in zip(limited, ring.angle, inner, outer, strict=True):
        most = np.zeros(ANGLES)
        np.maximum.at(most, angle[within], own[within])
        most = maximum_filter1d(most, 2 * BESIDE + 1, mode="wrap")
        own[beyond] = np.minimum(own[beyond], most[angle[beyond]])
    return limited


def _cores(labels: Tensor, tissue: int, inside: Tensor, wall: Tensor) -> NDArray[np.bool_]:
    """What of the wall a tissue encloses, alone or with the cavity ``(B, H, W)``."""
    places = (t.cpu().numpy() for t in (labels == tissue, inside > 0, wall > 0))
    return np.stack([cores(found & around, cavity, around) for found, cavity, around in zip(*places, strict=True)])


def _prior(members: list[int], variants: Sequence[Images]) -> map_em.Prior:
    """What is expected of these tissues in the images of each variant."""
    first = variants[0]
    levels = [[[v.tissues[k].level.get(s, 0.0) for s in v.sequences] for k in members] for v in variants]
    shares = torch.tensor([first.tissues[k].share for k in members], dtype=torch.float64)
    means = torch.tensor(levels, dtype=torch.float64).repeat_interleave(len(first.image), 0)
    location = _location([first.tissues[k] for k in members], first)
    if location is not None:
        location = location.repeat(len(variants), *[1] * (location.ndim - 1))
    return map_em.Prior(means, shares / shares.sum(), location=location)


def _location(members: list[Tissue], images: Images) -> Tensor | None:
    """Where each tissue lies ``(B, K, *S)``: the log of a normal curve over the depth in the mask; flat without one."""
    if all(t.depth is None for t in members):
        return None
    relative = relative_depth(images.mask, images.spacing_mm)
    curves = [torch.zeros_like(relative) if t.depth is None else _curve(relative, *t.depth) for t in members]
    return torch.cat(curves, 1)


def _curve(relative: Tensor, mean: float, deviation: float) -> Tensor:
    return -0.5 * ((relative - mean) / deviation) ** 2
