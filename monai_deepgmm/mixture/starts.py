"""Where a fit may begin: responsibilities ``(B, K, *S)`` from k-means, from known means, or from labels."""

from __future__ import annotations

import torch
from torch import Tensor

from monai_deepgmm.mixture.gaussian import VARIANCE_FLOOR, Mixture, log_joint


def kmeans_start(image: Tensor, mask: Tensor, components: int, *, generator: torch.Generator) -> Tensor:
    """Responsibilities (0 or 1) by scikit-learn's k-means from k-means++ seeds, for each image of the batch.

    Args:
        image: ``(B, M, *S)``; distances are Euclidean, so bring the sequences to one scale first.
        mask: ``(B, 1, *S)``.
        components: K; an image with fewer different voxels leaves some of them empty.
        generator: a CPU generator, whatever the image's device, so that every device draws the same numbers.

    Returns:
        ``(B, K, *S)``, 0 outside the mask.
    """
    from sklearn.cluster import KMeans

    labels = torch.zeros(mask.shape, dtype=torch.long)
    for values, inside, out in zip(image.detach().cpu().double(), mask[:, 0].cpu() > 0, labels[:, 0], strict=True):
        voxels = values[:, inside].T.numpy()
        different = len(torch.unique(values[:, inside], dim=1).T)
        seed = int(torch.randint(1 << 31, (), generator=generator))
        if different:
            means = KMeans(min(components, different), n_init=1, random_state=seed)
            out[inside] = torch.from_numpy(means.fit_predict(voxels)).long()
    return labels_start(labels.to(mask.device), mask.to(image.dtype), components)


def means_start(image: Tensor, mask: Tensor, means: Tensor) -> Tensor:
    """Responsibilities from known means (μ_data, S §4.2): one E-step with equal weights and equal covariances.

    The covariance, shared by all components, is diagonal: the mean square distance to the nearest mean.

    Args:
        image: ``(B, M, *S)``.
        mask: ``(B, 1, *S)``.
        means: μ ``(K, M)`` or ``(B, K, M)``, on the image's scale.

    Returns:
        ``(B, K, *S)``, 0 outside the mask.
    """
    means = means.to(image).expand(len(image), *means.shape[-2:])
    image = torch.where(mask > 0, image, 0)
    squared = (image.flatten(2)[:, None] - means[..., None]).square()  # (B, K, M, N)
    # The variance of each sequence around the nearest mean, shared by all components.
    nearest = squared.sum(2, keepdim=True).argmin(1, keepdim=True).expand(-1, -1, image.shape[1], -1)
    around = squared.take_along_dim(nearest, 1).mT * mask.flatten(2)[..., None]  # (B, 1, N, M)
    variances = around.sum(2) / mask.flatten(1).sum(1)[:, None, None].clamp_min(1) + VARIANCE_FLOOR
    weights = torch.full(means.shape[:2], 1 / means.shape[1]).to(image)
    mixture = Mixture(weights, means, variances.expand_as(means))
    return log_joint(image, mixture).softmax(1) * mask


def labels_start(labels: Tensor, mask: Tensor, components: int) -> Tensor:
    """Responsibilities from a label map: ``(B, 1, *S)`` integers 0 … K−1 inside the mask → ``(B, K, *S)``."""
    inside = torch.where(mask > 0, labels, 0)[:, 0].long()
    return torch.nn.functional.one_hot(inside, components).movedim(-1, 1) * mask
