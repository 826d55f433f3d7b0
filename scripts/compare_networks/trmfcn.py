"""A network like the triple residual multiscale FCN, TRMFCN (Chen et al., KSII TIIS 14(3), 2020), small.

Kept, from the paper's abstract: a U-Net with three gates through which the image comes in, residual multiscale blocks,
and concatenate blocks. Filled in here: the image enters at full, half and quarter size; a multiscale block is three
3×3 convolutions that see 3, 5 and 7 voxels, joined and added to what it was given; a concatenate block does the same to
the up-sampled features beside those of the encoder. So each level adds three times: down, across and up.
"""

from __future__ import annotations

import torch
from monai.networks.blocks import Convolution, UpSample
from monai.networks.layers.factories import Pool
from torch import Tensor, nn

#: From the finest level to the coarsest.
FILTERS = (32, 64, 128, 256)
#: Levels at which the image comes in.
GATES = 3
#: Distances between the voxels that a multiscale block's convolutions see.
SCALES = (1, 2, 3)


class Multiscale(nn.Module):
    """Convolutions at several scales, joined by a 1×1 convolution and added to the (projected) input.

    Args:
        spatial_dims: 2 or 3.
        inner: channels that it is given.
        outer: channels that it gives.
    """

    def __init__(self, spatial_dims: int, inner: int, outer: int) -> None:
        super().__init__()
        each = max(outer // 2, 1)
        self.scales = nn.ModuleList(
            Convolution(spatial_dims, inner, each, dilation=scale, act="relu", norm="instance") for scale in SCALES
        )
        self.join = Convolution(spatial_dims, each * len(SCALES), outer, kernel_size=1, act=None, norm="instance")
        self.same = Convolution(spatial_dims, inner, outer, kernel_size=1, conv_only=True)

    def forward(self, features: Tensor) -> Tensor:
        """``(B, inner, *S)`` → ``(B, outer, *S)``."""
        joined = self.join(torch.cat([scale(features) for scale in self.scales], 1))
        return torch.relu(joined + self.same(features))


class TRMFCN(nn.Module):
    """A U-Net of residual multiscale blocks that is shown the image at three sizes.

    Args:
        spatial_dims: 2 or 3.
        in_channels: C.
        out_channels: K.
        filters: of each level.
    """

    def __init__(
        self, spatial_dims: int, in_channels: int, out_channels: int, filters: tuple[int, ...] = FILTERS
    ) -> None:
        super().__init__()
        gates = [in_channels if level < GATES else 0 for level in range(len(filters))]
        before = [0, *filters[:-1]]
        self.halve = Pool[Pool.AVG, spatial_dims](2)
        self.pool = Pool[Pool.MAX, spatial_dims](2)
        self.down = nn.ModuleList(
            Multiscale(spatial_dims, inner + gate, outer)
            for inner, gate, outer in zip(before, gates, filters, strict=True)
        )
        self.across = nn.ModuleList(Multiscale(spatial_dims, n, n) for n in filters[:-1])
        self.grow = nn.ModuleList(
            UpSample(spatial_dims, coarse, fine, 2, mode="nontrainable", align_corners=False)
            for fine, coarse in zip(filters[-2::-1], filters[:0:-1], strict=True)
        )
        self.up = nn.ModuleList(Multiscale(spatial_dims, 2 * n, n) for n in filters[-2::-1])
        self.head = Convolution(spatial_dims, filters[0], out_channels, kernel_size=1, conv_only=True)

    def forward(self, image: Tensor) -> Tensor:
        """``(B, C, *S)`` → logits ``(B, K, *S)``; sides of S can be halved once for each level but the first."""
        features = self.down[0](image)
        skips = []
        for level, (down, across) in enumerate(zip(self.down[1:], self.across, strict=True), start=1):
            skips.append(across(features))
            features = self.pool(features)
            if level < GATES:
                image = self.halve(image)
                features = torch.cat([features, image], 1)
            features = down(features)
        for grow, up in zip(self.grow, self.up, strict=True):
            features = up(torch.cat([grow(features), skips.pop()], 1))
        out: Tensor = self.head(features)
        return out
