"""A U-Net on half the resolution that loses none: each 2×2 block of voxels is one voxel with four times the channels."""

from __future__ import annotations

from torch import Tensor, nn

from monai_deepgmm.networks.unet import UNet

#: Filters from the finest level to the coarsest.
FILTERS = (32, 64, 128)
#: Voxels of a block along each axis.
FOLD = 2


class FoldedUNet(nn.Module):
    """The paper's U-Net (S §4.3) with three levels, on blocks of voxels: quickly fitted to one image.

    A step takes a ninth of the time that the paper's does: convolutions at the finest level, where there are few
    channels and many voxels, are the slowest for each operation. Its logits are still those of single voxels.

    Args:
        spatial_dims: 2 or 3.
        in_channels: C.
        out_channels: K.
        filters: of each level, from the finest to the coarsest; each twice the one before.
    """

    def __init__(
        self, spatial_dims: int, in_channels: int, out_channels: int, filters: tuple[int, ...] = FILTERS
    ) -> None:
        super().__init__()
        block = FOLD**spatial_dims
        self.unet = UNet(spatial_dims, block * in_channels, block * out_channels, filters)

    def forward(self, image: Tensor) -> Tensor:
        """``(B, C, *S)`` → logits ``(B, K, *S)``; each side of S a multiple of 2 to the number of levels."""
        return unfolded(self.unet(folded(image)))


def folded(values: Tensor) -> Tensor:
    """``(B, C, *S)`` → ``(B, C · 2^D, *S / 2)``."""
    sides = values.shape[2:]
    if len(sides) == 2:
        return nn.functional.pixel_unshuffle(values, FOLD)
    x, y, z = (n // FOLD for n in sides)
    blocks = values.reshape(values.shape[0], values.shape[1], x, FOLD, y, FOLD, z, FOLD)
    return blocks.permute(0, 1, 3, 5, 7, 2, 4, 6).reshape(values.shape[0], -1, x, y, z)


def unfolded(values: Tensor) -> Tensor:
    """The way back."""
    sides = values.shape[2:]
    if len(sides) == 2:
        return nn.functional.pixel_shuffle(values, FOLD)
    x, y, z = sides
    blocks = values.reshape(values.shape[0], -1, FOLD, FOLD, FOLD, x, y, z)
    return blocks.permute(0, 1, 5, 2, 6, 3, 7, 4).reshape(values.shape[0], -1, FOLD * x, FOLD * y, FOLD * z)
