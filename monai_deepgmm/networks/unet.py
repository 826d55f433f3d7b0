"""The paper's U-Net (S §4.3)."""

from __future__ import annotations

import itertools

from monai.networks.blocks import Convolution
from monai.networks.nets.basic_unet import Down, TwoConv, UpCat
from torch import Tensor, nn

#: Filters of the paper's U-Net from the finest level to the coarsest.
FILTERS = (32, 64, 128, 256, 512)


class UNet(nn.Module):
    """The U-Net of S §4.3, of MONAI's blocks: two 3×3 convolutions a level, instance norm, leaky ReLU, nearest.

    With the default filters in 2-D it has the paper's four down-samplings and 7.24 million parameters.

    Args:
        spatial_dims: 2 or 3.
        in_channels: C.
        out_channels: K.
        filters: of each level, from the finest to the coarsest; each twice the one before, as the decoder halves them.

    Raises:
        ValueError: another number of dimensions, or no filters.
    """

    def __init__(
        self, spatial_dims: int, in_channels: int, out_channels: int, filters: tuple[int, ...] = FILTERS
    ) -> None:
        super().__init__()
        if spatial_dims not in (2, 3):
            raise ValueError(f"spatial_dims: got {spatial_dims!r}, expected 2 or 3")
        if not filters:
            raise ValueError("filters: got none, expected the number of each level, such as (32, 64)")
        act, norm = ("leakyrelu", {"inplace": True}), "instance"
        self.stem = TwoConv(spatial_dims, in_channels, filters[0], act, norm, bias=True)
        self.down = nn.ModuleList(
            Down(spatial_dims, fine, coarse, act, norm, bias=True) for fine, coarse in itertools.pairwise(filters)
        )
        self.up = nn.ModuleList(
            UpCat(
                spatial_dims,
                coarse,
                fine,
                fine,
                act,
                norm,
                bias=True,
                upsample="nontrainable",
                interp_mode="nearest",
                align_corners=None,
            )
            for fine, coarse in zip(filters[-2::-1], filters[:0:-1], strict=True)
        )
        self.head = Convolution(spatial_dims, filters[0], out_channels, kernel_size=1, conv_only=True)

    def forward(self, image: Tensor) -> Tensor:
        """``(B, C, *S)`` → logits ``(B, K, *S)``; each side of S at least 2 to the number of down-samplings."""
        features = self.stem(image)
        skips = [features]
        for down in self.down:
            features = down(features)
            skips.append(features)
        # TorchScript indexes no module list by a variable; it does unroll one in a loop.
        level = len(skips) - 2
        for up in self.up:
            features = up(features, skips[level])
            level -= 1
        out: Tensor = self.head(features)
        return out
