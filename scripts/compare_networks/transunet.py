"""A network like TransUNet (Chen et al. 2021, arXiv 2102.04306), small and without weights from elsewhere.

Kept: a convolutional encoder, a transformer on its coarsest features, and a U-Net's decoder with skips. Changed: plain
convolutions where the paper has a pretrained ResNet-50, four layers of 256 channels where it has twelve of 768, and
places told by a depthwise convolution instead of a table, so that images can have any size.
"""

from __future__ import annotations

import itertools

from monai.networks.blocks import Convolution, TransformerBlock
from monai.networks.nets.basic_unet import Down, TwoConv, UpCat
from torch import Tensor, nn

#: From the finest level to the coarsest, whose voxels are the transformer's tokens.
FILTERS = (16, 32, 64, 128, 256)


class TransUNet(nn.Module):
    """Convolutions down, a transformer at the bottom, convolutions up.

    Args:
        spatial_dims: 2 or 3.
        in_channels: C.
        out_channels: K.
        filters: of each level; each twice the one before.
        layers: of the transformer.
        heads: of each layer's attention.
    """

    def __init__(
        self,
        spatial_dims: int,
        in_channels: int,
        out_channels: int,
        filters: tuple[int, ...] = FILTERS,
        layers: int = 4,
        heads: int = 8,
    ) -> None:
        super().__init__()
        act, norm, width = "relu", "instance", filters[-1]
        self.stem = TwoConv(spatial_dims, in_channels, filters[0], act, norm, bias=True)
        self.down = nn.ModuleList(
            Down(spatial_dims, fine, coarse, act, norm, bias=True) for fine, coarse in itertools.pairwise(filters)
        )
        self.place = Convolution(spatial_dims, width, width, groups=width, conv_only=True)
        self.layers = nn.ModuleList(TransformerBlock(width, 2 * width, heads) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        self.up = nn.ModuleList(
            UpCat(spatial_dims, coarse, fine, fine, act, norm, bias=True, upsample="nontrainable", align_corners=False)
            for fine, coarse in zip(filters[-2::-1], filters[:0:-1], strict=True)
        )
        self.head = Convolution(spatial_dims, filters[0], out_channels, kernel_size=1, conv_only=True)

    def forward(self, image: Tensor) -> Tensor:
        """``(B, C, *S)`` → logits ``(B, K, *S)``."""
        features = self.stem(image)
        skips = []
        for down in self.down:
            skips.append(features)
            features = down(features)
        features = features + self.place(features)
        tokens = features.flatten(2).transpose(1, 2)
        for layer in self.layers:
            tokens = layer(tokens)
        features = self.norm(tokens).transpose(1, 2).reshape(features.shape)
        for up in self.up:
            features = up(features, skips.pop())
        out: Tensor = self.head(features)
        return out
