"""Which solver fits the mixture: EM, a network fitted to the image itself, or a trained one."""

from __future__ import annotations

import functools

import torch
from torch import Tensor, nn

from monai_deepgmm import em, tissues
from monai_deepgmm.config import DEEP, Config
from monai_deepgmm.em import Fit
from monai_deepgmm.spec import CONTEXT


def solve(
    image: Tensor,
    mask: Tensor,
    expected: Tensor,
    config: Config,
    *,
    spacing_mm: tuple[float, ...],
    means: Tensor | None = None,
    network: nn.Module | None = None,
) -> Fit:
    """Fits the mixture of ``config.method`` to each image: by EM, by a network of its own, or by a trained one.

    Args:
        image: ``(B, M, *S)``.
        mask: ``(B, 1, *S)``.
        expected: where each tissue is expected ``(B, K, *S)``: the start.
        config: the method and its settings.
        spacing_mm: of the axes in ``*S``.
        means: μ_data ``(K, M)``, from which the start was made.
        network: the trained one, already loaded; None: the one in the model's folder.

    Raises:
        StudyError: ``E_MODEL``, the trained network cannot be loaded.
    """
    if config.model is not None:
        from monai_deepgmm import model  # MONAI's networks take a second to import

        loaded = model.load(config.model, config.device) if network is None else network
        return model.fit(loaded, config.model.spec, image, mask, spacing_mm=spacing_mm, labels=config.solver.labels)
    settings = config.solver
    start = expected
    if settings.start == "kmeans" and means is None:
        generator = torch.Generator().manual_seed(config.seed)
        restarts = 1 if config.method in DEEP else settings.restarts
        draws = [em.kmeans_start(image, mask, expected.shape[1], generator=generator) for _ in range(restarts)]
        start = torch.stack(draws)
    if config.method in DEEP:
        start = start[0] if start.ndim > expected.ndim else start
        return _by_descent(image, mask, start, config, spacing_mm=spacing_mm, means=means)
    return em.fit(
        image,
        mask,
        start,
        spatial=config.method == "svgmm",
        covariance=config.covariance,
        tol=config.tol,
        max_iter=settings.max_iter,
        floor=settings.floor,
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
    from monai_deepgmm import deep, losses, networks

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
        tissues.relative_depth(mask, spacing_mm),
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
        ),
    )
