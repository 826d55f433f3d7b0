"""What every way to fit a mixture gives back: responsibilities, parameters, and what it knows of how it went."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from monai_deepgmm.mixture.gaussian import Mixture

#: A component that explains fewer voxels than this has collapsed.
MIN_VOXELS = 5.0


class Diagnostics(NamedTuple):
    """How a fit went, as far as its method knows; what it does not know is None.

    Attributes:
        nll: the final NLL per voxel ``(B,)``.
        trace: the NLL of the start and after each iteration ``(T + 1, B)``. An image that has converged repeats its
            last value.
        iterations: how many of them each image needed ``(B,)``.
        converged: whether the method's criterion was met ``(B,)``.
        reseeded: how often a collapsed component was moved elsewhere ``(B,)``.
        collapsed: components that explain (nearly) no voxel in the end ``(B, K)``.
    """

    nll: Tensor | None = None
    trace: Tensor | None = None
    iterations: Tensor | None = None
    converged: Tensor | None = None
    reseeded: Tensor | None = None
    collapsed: Tensor | None = None

    def rows(self, index: Tensor) -> Diagnostics:
        """Those of some of the images."""
        return self._mapped(lambda name, values: values[:, index] if name == "trace" else values[index])

    def _mapped(self, function: Callable[[str, Tensor], Tensor]) -> Diagnostics:
        known = {name: values for name, values in self._asdict().items() if values is not None}
        return Diagnostics(**{name: function(name, values) for name, values in known.items()})


class Fit(NamedTuple):
    """A fitted mixture, whoever fitted it.

    Attributes:
        resp: responsibilities ``(B, K, *S)``, 0 outside the mask.
        mixture: the parameters.
        diagnostics: how it went.
    """

    resp: Tensor
    mixture: Mixture
    diagnostics: Diagnostics = Diagnostics()

    def rows(self, index: Tensor) -> Fit:
        """The fits of some of the images."""
        return Fit(self.resp[index], self.mixture.rows(index), self.diagnostics.rows(index))


def joined(fits: Sequence[Fit]) -> Fit:
    """Fits of single images by one method as one of a batch; shorter traces repeat their last value."""
    found = {name: [getattr(f.diagnostics, name) for f in fits] for name in Diagnostics._fields}
    if None not in found["trace"]:
        longest = max(len(trace) for trace in found["trace"])
        found["trace"] = [torch.cat([t, t[-1:].expand(longest - len(t), -1)]) for t in found["trace"]]
    diagnostics = {
        name: torch.cat(values, 1 if name == "trace" else 0)
        for name, values in found.items()
        if all(value is not None for value in values)
    }
    mixture = stacked([f.mixture for f in fits])
    return Fit(torch.cat([f.resp for f in fits]), mixture, Diagnostics(**diagnostics))


def stacked(mixtures: Sequence[Mixture]) -> Mixture:
    """Mixtures of some images each as one of all of them."""
    fields = [m.field for m in mixtures if m.field is not None]
    weights, means, covariances = (
        torch.cat([getattr(m, name) for m in mixtures]) for name in ("weights", "means", "covariances")
    )
    return Mixture(weights, means, covariances, torch.cat(fields) if fields else None)


def chosen(rows: Tensor, old: Tensor, new: Tensor) -> Tensor:
    """The new values ``(B, …)`` in the images where ``rows`` ``(B,)`` is set, the old in the others."""
    return torch.where(rows.reshape(-1, *[1] * (old.ndim - 1)), new, old)


def likeliest(resp: Tensor) -> Tensor:
    """The component with the highest probability ``(B, K, *S)`` → ``(B, *S)``, the first of equals.

    torch's argmax over an axis that is not the last takes ten times as long.
    """
    kind = torch.uint8 if resp.shape[1] < 256 else torch.long  # a byte is written sooner
    best, found = resp[:, 0].clone(), torch.zeros(resp[:, 0].shape, dtype=kind, device=resp.device)
    for k in range(1, resp.shape[1]):
        found.masked_fill_(resp[:, k] > best, k)
        torch.maximum(best, resp[:, k], out=best)
    return found.long()


def collapsed(resp: Tensor, mask: Tensor) -> Tensor:
    """Which components explain (nearly) no voxel ``(B, K)``; in a tiny image, none is called so for its size.

    Args:
        resp: ``(B, K, N)``, 0 outside the mask.
        mask: ``(B, 1, N)``.
    """
    return resp.sum(-1) < fewest(mask, resp.shape[1])


def fewest(mask: Tensor, components: int) -> Tensor:
    """The voxels that a component needs, or it has collapsed: ``(B, 1, N)`` → ``(B, 1)``."""
    return (mask.sum(-1) / (4 * components)).clamp_max(MIN_VOXELS)
