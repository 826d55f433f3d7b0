"""The modified U-Net of Ma 2022 ("M"): deeper coarse levels, bilinear up-sampling, and skip paths that convolve."""

from __future__ import annotations

import itertools

from monai.networks.blocks import Convolution
from monai.networks.nets.basic_unet import Down, TwoConv, UpCat
from torch import Tensor, nn

#: Levels of the encoder, and of the decoder, that are those of a plain U-Net; the coarser ones are scaling levels.
PLAIN = 2
#: Filters from the finest level to the bottleneck.
FILTERS = (32, 64, 128, 256, 512)


class ModifiedUNet(nn.Module):
    """The modified U-Net of M §3.3 and Fig. 3.

    Two plain levels of two 3×3 convolutions and two scaling levels with a third one for a wider view (blocks A and B),
    each followed by 2×2 max pooling, the filters doubling; a bottleneck; the same levels upwards after bilinear
    (trilinear) interpolation. What the encoder passes sideways goes through 3×3 convolutions with ReLU, one fewer the
    deeper the level: 4, 3, 2, 1.

    The paper leaves open how many filters there are (here those of S §4.3, so that the two U-Nets can be compared), how
    many skip modules a level has (here as many as there are poolings below it), what the bottleneck is (here a plain
    level), and whether activations are normalised. Here they are, by instance norm and in the skip paths too: the
    M-step learns nothing from outputs that are the same in every voxel, and those of a new network without a norm
    nearly are (a standard deviation over noise of 0.001, with the norm 0.4). ``norm=None`` is the paper to the letter.

    Args:
        spatial_dims: 2 or 3.
        in_channels: C.
        out_channels: K.
        filters: of each level, from the finest to the bottleneck; each twice the one before, as the decoder halves it.
        norm: what MONAI's blocks take as a norm; None: none.
    """

    def __init__(
        self,
        spatial_dims: int,
        in_channels: int,
        out_channels: int,
        filters: tuple[int, ...] = FILTERS,
        norm: str | None = "instance",
    ) -> None:
        super().__init__()
        relu = ("relu", {"inplace": True})
        poolings = len(filters) - 1

        def convolutions(channels: int, count: int) -> nn.Sequential:
            layers = (Convolution(spatial_dims, channels, channels, act=relu, norm=norm) for _ in range(count))
            return nn.Sequential(*layers)

        def extra(level: int) -> int:
            return int(PLAIN <= level < poolings)

        def up(coarse: int, fine: int) -> UpCat:
            return UpCat(
                spatial_dims, coarse, fine, fine, relu, norm, bias=True, upsample="nontrainable", align_corners=False
            )

        self.stem = TwoConv(spatial_dims, in_channels, filters[0], relu, norm, bias=True)
        self.down = nn.ModuleList(
            nn.Sequential(Down(spatial_dims, fine, coarse, relu, norm, bias=True), convolutions(coarse, extra(level)))
            for level, (fine, coarse) in enumerate(itertools.pairwise(filters), start=1)
        )
        self.skip = nn.ModuleList(convolutions(filters[level], poolings - level) for level in range(poolings))
        self.up = nn.ModuleList(up(coarse, fine) for fine, coarse in zip(filters[-2::-1], filters[:0:-1], strict=True))
        self.widen = nn.ModuleList(convolutions(filters[level], extra(level)) for level in reversed(range(poolings)))
        self.head = Convolution(spatial_dims, filters[0], out_channels, kernel_size=1, conv_only=True)

    def forward(self, image: Tensor) -> Tensor:
        """``(B, C, *S)`` → logits ``(B, K, *S)``; each side of S at least 2 to the number of poolings."""
        features = self.stem(image)
        skips = []
        for skip, down in zip(self.skip, self.down):  # noqa: B905  # TorchScript knows no strict=
            skips.append(skip(features))
            features = down(features)
        for up, widen in zip(self.up, self.widen):  # noqa: B905
            features = widen(up(features, skips.pop()))
        out: Tensor = self.head(features)
        return out
