"""Which solver fits the mixture: EM, MAP-EM with anatomical priors, the image's own network, or a trained one."""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
from torch import Tensor, nn

from monai_deepgmm.images import resampling as view
from monai_deepgmm.methods import anatomy as anatomical
from monai_deepgmm.methods.config import DEEP, Config
from monai_deepgmm.mixture import em
from monai_deepgmm.mixture import map_em as mapem
from monai_deepgmm.mixture import partial_volume as pvgmm
from monai_deepgmm.mixture.em import Fit
from monai_deepgmm.mixture.map_em import Field, Shape
from monai_deepgmm.networks import model_spec as spec
from monai_deepgmm.networks.model_spec import CONTEXT
from monai_deepgmm.protocol import Protocol, Tissue

#: How much a network's word counts beside that of the anatomical mixture, where both are heard.
TRUST = 0.3


class Images(NamedTuple):
    """A patient's images, and what is known of them before any fit.

    Attributes:
        image: ``(B, M, *S)``.
        mask: ``(B, 1, *S)``.
        expected: where each tissue is expected ``(B, K, *S)``: the start.
        tissues: the K tissues.
        sequences: the M sequences.
        spacing_mm: of the axes in ``*S``.
        slices: the position of each image along the stack; empty for a volume.
        means: μ_data ``(K, M)``, from which the start was made, or None.
        zero: where no signal lies on the image's scale ``(B, M)``; needed for a bias field.
    """

    image: Tensor
    mask: Tensor
    expected: Tensor
    tissues: tuple[Tissue, ...]
    sequences: tuple[str, ...]
    spacing_mm: tuple[float, ...]
    slices: tuple[int, ...] = ()
    means: Tensor | None = None
    zero: Tensor | None = None


def solve(images: Images, config: Config, *, network: nn.Module | None = None) -> Fit:
    """Fits the mixture of ``config.method`` to each image.

    Args:
        images: the images and where each fit begins.
        config: the method and its settings.
        network: the trained one, already loaded; None: the one in the model's folder.

    Raises:
        StudyError: ``E_MODEL``, the trained network cannot be loaded.
    """
    image, mask, start, spacing_mm, means = (
        getattr(images, name) for name in ("image", "mask", "expected", "spacing_mm", "means")
    )
    if config.model is not None:
        from monai_deepgmm.methods import trained_network as model

        loaded = model.load(config.model, config.device) if network is None else network
        rule = config.solver.labels or config.model.spec.labels
        found = model.fit(
            loaded,
            config.model.spec,
            image,
            mask,
            spacing_mm=spacing_mm,
            labels="network" if rule == "both" else rule,
            sequences=images.sequences,
            merge=_merge(config.protocol, config.model.spec.sequences, images.sequences),
        )
        if rule != "both":
            return found
        own = _by_anatomy(images, config)
        return found._replace(resp=TRUST * found.resp + (1 - TRUST) * own.resp)
    if config.method in ("anatomy", "cohort"):
        return _by_anatomy(images, config)
    if config.method == "pvgmm":
        return _by_partial_volume(images, config)
    settings = config.solver
    if settings.start == "kmeans" and means is None:
        generator = torch.Generator().manual_seed(config.seed)
        restarts = 1 if config.method in DEEP else settings.restarts
        draws = [em.kmeans_start(image, mask, start.shape[1], generator=generator) for _ in range(restarts)]
        start = torch.stack(draws)
    if config.method in DEEP:
        start = start[0] if start.ndim > image.ndim else start
        return _by_descent(image, mask, start, config, spacing_mm=spacing_mm, means=means)
    fit = em.fit(
        _from_zero(images, image) if config.degree else image,
        mask,
        start,
        spatial=config.method == "svgmm",
        covariance=config.covariance,
        tol=config.tol,
        max_iter=settings.max_iter,
        floor=settings.floor,
        degree=config.degree,
    )
    return _to_zero(images, fit) if config.degree else fit


def _from_zero(images: Images, image: Tensor) -> Tensor:
    """Images on the scale that a bias field needs: where 0 is no signal."""
    if images.zero is None:
        return image
    return image - images.zero.to(image).reshape(*images.zero.shape, *[1] * (image.ndim - 2))


def _to_zero(images: Images, fit: Fit) -> Fit:
    """The fit's means on the images' own scale again; there they are those of a voxel whose field is 1."""
    zero = 0 if images.zero is None else images.zero.to(fit.mixture.means)[:, None]
    return fit._replace(mixture=fit.mixture._replace(means=fit.mixture.means + zero))


def _by_partial_volume(images: Images, config: Config) -> Fit:
    where = {tissue.name: i for i, tissue in enumerate(images.tissues)}
    pairs = [(where[a], where[b]) for a, b in config.protocol.borders if a in where and b in where]
    settings = config.solver
    fit = pvgmm.fit(
        _from_zero(images, images.image.float()),
        images.mask,
        images.expected,
        images.spacing_mm,
        pvgmm.Model(
            tuple(pairs),
            degree=config.degree,
            proven=settings.degree is None,
            pooling=settings.pooling,
            coupling=settings.coupling,
        ),
        tol=config.tol,
        max_iter=settings.max_iter,
        floor=settings.floor,
    )
    return _to_zero(images, fit)


def _merge(protocol: Protocol, known: tuple[str, ...], present: tuple[str, ...]) -> Tensor:
    """Which of the tissues that the known sequences show make up each that the present ones show ``(T, K)``."""
    target = protocol.merged(present)
    shown, all_of_them = protocol.visible(present), protocol.visible(known)
    return torch.tensor([[float(target[t.index] == mine.index) for t in all_of_them] for mine in shown])


def _by_anatomy(images: Images, config: Config) -> Fit:
    known = config.protocol.anatomy
    if known is None:
        raise ValueError(f"protocol {config.protocol.name} has no anatomy")
    return anatomical.fit(
        images.image,
        images.mask,
        images.tissues,
        images.sequences,
        images.spacing_mm,
        known,
        slices=images.slices,
        field=Field(sigma_mm=config.solver.sigma_mm, temper=config.solver.temper),
        shape=Shape(dof=config.solver.dof, outliers=config.solver.outliers),
        covariance=config.covariance,
        tol=mapem.TOL if config.solver.tol is None else config.solver.tol,
        max_iter=config.solver.max_iter,
        floor=config.solver.floor,
    )


def _by_descent(
    image: Tensor,
    mask: Tensor,
    start: Tensor,
    config: Config,
    *,
    spacing_mm: tuple[float, ...],
    means: Tensor | None,
) -> Fit:
    """One-image deepG or deepSVG (S Alg. 3), with ‖μ − μ_data‖² where means are known (S §4.2)."""
    from monai_deepgmm.networks import descent as deep
    from monai_deepgmm.networks import nll_loss as losses
    from monai_deepgmm.networks import registry as networks

    settings = config.solver
    network = functools.partial(
        networks.build,
        config.network,
        spatial_dims=image.ndim - 2,
        in_channels=image.shape[1] + CONTEXT,
        out_channels=start.shape[1],
    )
    return deep.fit(
        image,
        mask,
        start,
        view.relative_depth(mask, spacing_mm),
        network=network,
        seed=config.seed,
        spatial=config.method == "deepsvg",
        covariance=config.covariance,
        terms=[] if means is None else [losses.Term(settings.mean_weight, losses.MeanPrior(means))],
        together=settings.together,
        labels=settings.labels or "posterior",
        floor=settings.floor,
        descent=deep.Descent(
            steps=settings.steps,
            start_steps=settings.start_steps,
            start_weight=settings.start_weight,
            lr=settings.lr,
            tol=config.tol,
            window=spec.window_sides(settings.window, image.ndim - 2) if settings.window else None,
        ),
    )
