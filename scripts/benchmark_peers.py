"""What this software is measured against: the paper's algorithms as plain loops, and other packages.

The loops are those of the paper as a reader would write them first: image after image, component after component,
without matrix products over voxels. They are checked against the package's own functions in the tests.
"""

from __future__ import annotations

import importlib.util
import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

#: Packages that can stand beside this one, and what each has the same of.
PEERS = {"sklearn": "scikit-learn", "pomegranate": "pomegranate", "ants": "ANTsPy", "dipy": "DIPY"}


class Fitted(NamedTuple):
    """What a peer has come to, over all images.

    Attributes:
        nll: the NLL per voxel, the mean over the images.
        iterations: the sum over the images.
    """

    nll: float
    iterations: int


def absent() -> list[str]:
    """The peers that are not installed, by name."""
    return [name for module, name in PEERS.items() if importlib.util.find_spec(module) is None]


# The paper's loops ---------------------------------------------------------------------------------------------------


def density(voxels: Tensor, mean: Tensor, covariance: Tensor) -> Tensor:
    """The log density of one component at voxels ``(N, M)``, with its whole covariance ``(M, M)``."""
    away = voxels - mean
    distance = (away @ torch.linalg.inv(covariance) * away).sum(1)
    return -0.5 * (distance + torch.logdet(covariance) + voxels.shape[1] * math.log(2 * math.pi))


def parameters(voxels: Tensor, w: Tensor, floor: float, *, tied: bool) -> tuple[list[Tensor], list[Tensor]]:
    """μ and Σ of each component from responsibilities ``(N, K)`` (S Alg. 1 line 4); diagonal, or one for all."""
    means, scatters = [], []
    for k in range(w.shape[1]):
        weight = w[:, k : k + 1]
        means.append((weight * voxels).sum(0) / weight.sum())
        away = voxels - means[-1]
        outer = (weight[:, :, None] * away[:, :, None] * away[:, None, :]).sum(0)
        scatters.append(outer if tied else torch.diag(torch.diag(outer)) / weight.sum())
    if tied:
        scatters = [sum(scatters) / w.sum()] * len(scatters)  # type: ignore[list-item]
    return means, [s + floor * torch.eye(voxels.shape[1]).to(s) for s in scatters]


def em(voxels: Tensor, w: Tensor, *, spatial: bool, tied: bool, tol: float, max_iter: int, floor: float) -> Fitted:
    """EM on one image's voxels ``(N, M)`` from responsibilities ``(N, K)``: Alg. 1, or Alg. 2 where ``spatial``."""
    first = torch.full_like(w, 1 / w.shape[1]) if spatial else None  # hard maps would never change
    last, number = math.inf, 0
    for number in range(max_iter + 1):
        means, covariances = parameters(voxels, w, floor, tied=tied)
        weights = (first if number == 0 else w) if spatial else w.mean(0, keepdim=True)
        joint = torch.stack([density(voxels, m, c) for m, c in zip(means, covariances, strict=True)], 1)
        joint = joint + weights.clamp_min(1e-300).log()
        nll = float(-joint.logsumexp(1).mean())
        w = joint.softmax(1)
        if last - nll < tol:
            break
        last = nll
    return Fitted(nll, number)


def nll_loss(logits: Tensor, image: Tensor, mask: Tensor, floor: float) -> Tensor:
    """NLL_V of a batch (S Alg. 3): ``(B, K, *S)``, ``(B, M, *S)``, ``(B, 1, *S)`` → a scalar with a gradient."""
    w, total = logits.softmax(1), logits.new_zeros(())
    for output, values, inside in zip(w, image, mask[:, 0] > 0, strict=True):
        voxels, pi = values[:, inside].T, output[:, inside].T
        means, covariances = parameters(voxels, pi, floor, tied=False)
        mixed = voxels.new_zeros(len(voxels))
        for k, (mean, covariance) in enumerate(zip(means, covariances, strict=True)):
            mixed = mixed + pi[:, k] * density(voxels, mean, covariance).exp()
        total = total - mixed.clamp_min(1e-30).log().mean()
    return total / len(image)


def gmm_loss(logits: Tensor, image: Tensor, mask: Tensor, floor: float) -> Tensor:
    """L_GMM of a batch (M eq. 3.2), likewise."""
    s, total = logits.softmax(1), logits.new_zeros(())
    for output, values, inside in zip(s, image, mask[:, 0] > 0, strict=True):
        voxels, weight = values[:, inside].T, output[:, inside].T
        means, covariances = parameters(voxels, weight, floor, tied=False)
        constant = 0.5 * voxels.shape[1] * math.log(2 * math.pi)
        for k, (mean, covariance) in enumerate(zip(means, covariances, strict=True)):
            log_joint = weight[:, k].mean().log() + density(voxels, mean, covariance) + constant
            total = total - (weight[:, k] * log_joint).mean()
    return total / len(image)


def deep_svg(image: Tensor, mask: Tensor, start: Tensor, *, tol: float, epochs: int) -> tuple[Tensor, int]:
    """DeepSVG on one image as the paper has it (S Alg. 3): its U-Net on the whole crop, AdamW, NLL_V.

    The network is brought to the start first, with as many steps as this package takes. Returns the labels ``(*S)``
    and how many epochs it took.
    """
    from monai_deepgmm.networks import UNet, registry

    network = registry.fresh(lambda: UNet(2, image.shape[1], start.shape[1]), 0)
    optimiser = torch.optim.AdamW(network.parameters(), 1e-3, weight_decay=1e-3)
    last, epoch = math.inf, 0
    for epoch in range(epochs):
        logits = network(image)
        if epoch < 20:
            loss = -(start * logits.log_softmax(1)).sum() / mask.sum()
        else:
            loss = nll_loss(logits, image, mask, 1e-6)
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 12.0)
        optimiser.step()
        value = float(loss.detach())
        if epoch >= 30 and last - value < tol:
            break
        last = value if epoch >= 20 else math.inf
    with torch.no_grad():
        return network(image).argmax(1)[0], epoch + 1


# Other packages ------------------------------------------------------------------------------------------------------


def sklearn(images: list[Any], starts: list[Any], covariance: str, *, tol: float, max_iter: int) -> Fitted:
    """scikit-learn's mixture on each image's voxels ``(N, M)`` from responsibilities ``(N, K)``."""
    import numpy as np
    from sklearn.mixture import GaussianMixture

    nll, iterations = [], 0
    for x, w in zip(images, starts, strict=True):
        count = w.sum(0)
        means = w.T @ x / count[:, None]
        away = x[:, None] - means
        scatter = np.einsum("nk,nki,nkj->kij", w, away, away) + 1e-6 * np.eye(x.shape[1])
        if covariance == "tied":
            precisions = np.linalg.inv(scatter.sum(0) / count.sum())
        else:
            precisions = np.linalg.inv(scatter / count[:, None, None])
        if covariance == "diag":
            precisions = 1 / (np.diagonal(scatter, axis1=1, axis2=2) / count[:, None])
        mixture = GaussianMixture(
            w.shape[1],
            covariance_type=covariance,
            tol=tol,
            max_iter=max_iter,
            reg_covar=1e-6,
            weights_init=count / count.sum(),
            means_init=means,
            precisions_init=precisions,
        ).fit(x)
        mixture.predict_proba(x)  # ours are there when the fit is
        nll.append(-mixture.score(x))
        iterations += mixture.n_iter_
    return Fitted(float(np.mean(nll)), iterations)


def pomegranate(images: list[Any], starts: list[Any], covariance: str, *, tol: float, max_iter: int) -> Fitted:
    """The mixture of pomegranate, likewise; its tolerance is on the sum over voxels, and it counts no iterations."""
    from pomegranate.distributions import Normal
    from pomegranate.gmm import GeneralMixtureModel

    nll = []
    for x, w in zip(images, starts, strict=True):
        voxels, resp = (torch.from_numpy(v).float() for v in (x, w))
        parts = []
        for k in range(resp.shape[1]):
            part = Normal(covariance_type=covariance)
            part.summarize(voxels, sample_weight=resp[:, k : k + 1].expand_as(voxels))
            part.from_summaries()
            parts.append(part)
        mixture = GeneralMixtureModel(parts, priors=resp.mean(0), tol=tol * len(voxels), max_iter=max_iter)
        mixture.fit(voxels)
        nll.append(-float(mixture.log_probability(voxels).mean()))
    return Fitted(sum(nll) / len(nll), 0)


def atropos(image: Tensor, mask: Tensor, spacing_mm: float) -> Any:
    """ANTs' Atropos on a head ``(M, X, Y, Z)``, with N4 before it, which is how its users take shading off.

    Returns:
        1 GM, 2 WM, 3 CSF by their order on the first sequence ``(X, Y, Z)``, 0 outside the mask.
    """
    import ants
    import numpy as np

    where, *scans = (ants.from_numpy(c.numpy(), spacing=(spacing_mm,) * 3) for c in (mask, *image))
    given = [ants.n4_bias_field_correction(scan, where) for scan in scans]
    found = ants.atropos(a=given, x=where, i="kmeans[3]", m="[0.1,1x1x1]")["segmentation"].numpy().astype(int)
    order = np.argsort([given[0].numpy()[found == k].mean() for k in (1, 2, 3)])  # CSF, GM, WM on T1
    return np.append(0, np.array([3, 1, 2])[np.argsort(order)])[found]
