"""How often mixels hold which share of two tissues: a smooth profile, where one sequence alone would let them heap up.

With a weight of its own for each share, EM can heap mixels of one share where a tissue really lies, and move the tissue
to a level that hardly any voxel has: above all in thick slices. Shares of a border that lies anywhere in a voxel have a
smooth density. Here it is a polynomial of degree 3 in Bernstein's form, whose coefficients, all at least 0, are weights
of four fixed shapes, so that EM finds them too.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

#: The degree of the polynomial.
DEGREE = 3
#: EM of the shapes' weights within one iteration of the whole.
ROUNDS = 5


class Profile(NamedTuple):
    """The shapes' weights of J borders.

    Attributes:
        coefficients: ``(J, DEGREE + 1)``; a border's sum to the weight of its mixels.
        shapes: what each shape gives to each node ``(DEGREE + 1, nodes)``; a shape's sum to 1.
    """

    coefficients: Tensor
    shapes: Tensor

    @property
    def weights(self) -> Tensor:
        """Of the mixels' nodes ``(1, J · nodes)``."""
        return (self.coefficients @ self.shapes).reshape(1, -1)

    def updated(self, counts: Tensor) -> Profile:
        """EM's next profile, likelier given how many voxels each node has ``(1, J · nodes)``."""
        counted, found = counts.reshape(len(self.coefficients), -1), self.coefficients
        for _ in range(ROUNDS):
            ratio = counted / (found @ self.shapes).clamp_min(1e-12)
            found = found * (ratio @ self.shapes.mT)
        return self._replace(coefficients=found)


def even(weights: Tensor, nodes: int) -> Profile:
    """The profile of as many mixels as there are, every share as likely.

    Args:
        weights: of the mixels' nodes ``(1, J · nodes)``.
        nodes: so many for each border.
    """
    u = (torch.arange(nodes).to(weights) + 0.5) / nodes
    rows = [math.comb(DEGREE, k) * u**k * (1 - u) ** (DEGREE - k) for k in range(DEGREE + 1)]
    shapes = torch.stack(rows)
    shapes = shapes / shapes.sum(1, keepdim=True)
    mixed = weights.reshape(-1, nodes).sum(1, keepdim=True)
    return Profile(mixed.expand(-1, DEGREE + 1) / (DEGREE + 1), shapes)
