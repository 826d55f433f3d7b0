"""Whether the names of the tissues agree with what was found: a silently exchanged pair is the worst result there is.

The start of a fit is made from the protocol's signatures, so that its overlap with the result proves little. Here the
result alone is asked: is the tissue that should be brighter in a sequence brighter there, and does the tissue that
should lie deeper lie deeper? An inverted sequence, or a brain whose contrast is not an adult's, answers no.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import combinations

import torch
from torch import Tensor

from monai_deepgmm.images.resampling import relative_depth
from monai_deepgmm.methods.task import Images
from monai_deepgmm.mixture.fit import Fit
from monai_deepgmm.protocol import Tissue

#: Two tissues are told apart by a sequence where their signatures differ by this much, in standard deviations.
APART = 1.0
#: So many of their pooled standard deviations may they lie the wrong way round, for noise.
TOLERANCE = 0.1
#: So much less deep than another may a tissue lie that the protocol has deeper, as a share of the mask's largest depth.
DEPTH_TOLERANCE = 0.02
#: The depth is measured on about so many voxels; moments are summed up over so many at a time.
ENOUGH, CHUNK = 1 << 18, 1 << 17


def contradictions(fit: Fit, images: Images) -> list[str]:
    """What of the found tissues contradicts the protocol, in words; empty where all agrees.

    Args:
        fit: its components in the order of the tissues.
        images: with the sequences' names and the tissues' signatures.
    """
    means, deviations, share = _moments(fit, images)
    pairs = [(a, b) for a, b in combinations(range(len(images.tissues)), 2) if share[a] > 0 and share[b] > 0]
    return [*_by_brightness(images, pairs, means, deviations), *_by_depth(images, fit.resp, share)]


def _moments(fit: Fit, images: Images) -> tuple[Tensor, Tensor, Tensor]:
    """Mean and standard deviation of each tissue in each sequence ``(K, M)``, and its share of all images ``(K,)``."""
    tissues, sequences = fit.resp.shape[1], images.image.shape[1]
    moments = torch.zeros(tissues, 2 * sequences + 1, dtype=torch.float64, device=fit.resp.device)
    every = zip(fit.resp.flatten(2), images.image.flatten(2), strict=True)
    for resp, image in every:
        for w, voxels in zip(resp.split(CHUNK, 1), image.split(CHUNK, 1), strict=True):
            x = voxels.double()
            moments += w.double() @ torch.cat([x, x.square(), torch.ones_like(x[:1])]).T
    count = moments[:, -1]
    means, squares = (moments[:, :-1] / count.clamp_min(1e-9)[:, None]).chunk(2, 1)
    return means, (squares - means.square()).clamp_min(1e-12).sqrt(), count / count.sum().clamp_min(1e-9)


def _by_brightness(images: Images, pairs: list[tuple[int, int]], means: Tensor, deviations: Tensor) -> Iterator[str]:
    for m, sequence in enumerate(images.sequences):
        for a, b in pairs:
            dark, bright = _ordered(images.tissues, a, b, sequence)
            first, second = images.tissues[dark].signature[sequence], images.tissues[bright].signature[sequence]
            pooled = float((deviations[dark, m].square() + deviations[bright, m].square()).div(2).sqrt())
            if second - first >= APART and means[bright, m] < means[dark, m] - TOLERANCE * pooled:
                yield f"{images.tissues[bright].name} is darker than {images.tissues[dark].name} in {sequence}"


def _ordered(tissues: tuple[Tissue, ...], a: int, b: int, sequence: str) -> tuple[int, int]:
    return (a, b) if tissues[a].signature[sequence] <= tissues[b].signature[sequence] else (b, a)


def _by_depth(images: Images, resp: Tensor, share: Tensor) -> Iterator[str]:
    where = {tissue.name: k for k, tissue in enumerate(images.tissues) if share[k] > 0}
    told = [pair for pair in images.protocol.deeper if set(pair) <= set(where)]
    step = max(1, round((images.mask.numel() / ENOUGH) ** (1 / len(images.spacing_mm))))
    thinned = (slice(None), slice(None), *[slice(None, None, step)] * len(images.spacing_mm))
    mask, w = images.mask[thinned], resp[thinned].flatten(2)
    if not told or not mask.any():
        return
    depth = relative_depth(mask, tuple(step * s for s in images.spacing_mm)).flatten(2).to(w)
    found = (w * depth).sum((0, 2)) / w.sum((0, 2)).clamp_min(1e-9)
    for deep, shallow in told:
        if found[where[deep]] < found[where[shallow]] - DEPTH_TOLERANCE:
            yield f"{deep} lies nearer to the border than {shallow}"
