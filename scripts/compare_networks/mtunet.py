"""A network like the mixed transformer U-Net, MT-UNet (Wang et al., ICASSP 2022), small; for images, not volumes.

Kept: convolutions in the two fine levels, mixed transformer modules in the coarse ones. Such a module looks around
inside windows, then from window to window with a weight that falls with their distance as a Gaussian of learnt width,
and then compares each voxel with a memory that all images share (external attention). Changed: windows are joined by
their mean and look at all others, where the paper weighs their voxels and looks along rows and columns; fewer channels.
"""

from __future__ import annotations

import itertools

import torch
from monai.networks.blocks import Convolution
from monai.networks.nets.basic_unet import Down, TwoConv, UpCat
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

#: From the finest level to the coarsest; the first two are convolutions only.
FILTERS = (32, 64, 128, 256)
PLAIN = 2
#: The side of a window, in voxels of its level.
WINDOW = 4
#: Entries of the memory that all images share.
MEMORY = 64


class LocalGlobalAttention(nn.Module):
    """Attention inside windows, and between them with a Gaussian weight of their distance.

    Args:
        channels: C, a multiple of ``heads``.
        heads: of both attentions.
    """

    def __init__(self, channels: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.local, self.globe = (nn.Linear(channels, 3 * channels) for _ in "12")
        self.log_width = nn.Parameter(torch.zeros(heads))
        self.out = nn.Linear(channels, channels)

    def forward(self, features: Tensor) -> Tensor:
        """``(B, C, H, W)`` → the same; H and W multiples of ``WINDOW``."""
        batch, channels, height, width = features.shape
        rows, columns = height // WINDOW, width // WINDOW
        split = features.reshape(batch, channels, rows, WINDOW, columns, WINDOW).permute(0, 2, 4, 3, 5, 1)
        near = self._attend(self.local(split.flatten(3, 4).flatten(1, 2)))  # (B, windows, voxels, C)
        far = self._attend(self.globe(near.mean(2)), self._distances(rows, columns))  # (B, windows, C)
        both: Tensor = self.out(near + far[:, :, None])
        both = both.reshape(batch, rows, columns, WINDOW, WINDOW, channels)
        return both.permute(0, 5, 1, 3, 2, 4).reshape(features.shape)

    def _attend(self, queries_keys_values: Tensor, weight: Tensor | None = None) -> Tensor:
        """``(…, N, 3 C)`` → ``(…, N, C)``; the weight ``(heads, N, N)`` is added to the logits."""
        parts = queries_keys_values.chunk(3, -1)
        q, k, v = (t.reshape(*t.shape[:-1], self.heads, -1).transpose(-2, -3) for t in parts)
        return scaled_dot_product_attention(q, k, v, attn_mask=weight).transpose(-2, -3).flatten(-2)

    def _distances(self, rows: int, columns: int) -> Tensor:
        """−d² / 2σ² between the middles of windows, for each head's σ, in windows."""
        lines = (torch.arange(n, dtype=torch.float32, device=self.log_width.device) for n in (rows, columns))
        places = torch.stack(torch.meshgrid(*lines, indexing="ij"), -1).flatten(0, 1)
        squared = (places[:, None] - places[None]).square().sum(-1)
        return -squared * (-2 * self.log_width).exp()[:, None, None] / 2


class ExternalAttention(nn.Module):
    """Attention to a memory instead of to the image: each voxel as a mixture of entries that all images share."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.keys, self.values = nn.Linear(channels, MEMORY, bias=False), nn.Linear(MEMORY, channels, bias=False)

    def forward(self, features: Tensor) -> Tensor:
        """``(B, C, H, W)`` → the same."""
        attention = self.keys(features.flatten(2).transpose(1, 2)).softmax(1)  # over voxels, then over entries
        attention = attention / attention.sum(2, keepdim=True).clamp_min(1e-9)
        mixed: Tensor = self.values(attention)
        return mixed.transpose(1, 2).reshape(features.shape)


class MixedTransformer(nn.Module):
    """Both attentions, each added to what it was given."""

    def __init__(self, channels: int, heads: int) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.GroupNorm(1, channels) for _ in "12")
        self.attentions = nn.ModuleList([LocalGlobalAttention(channels, heads), ExternalAttention(channels)])

    def forward(self, features: Tensor) -> Tensor:
        """``(B, C, H, W)`` → the same."""
        for norm, attention in zip(self.norms, self.attentions, strict=True):
            features = features + attention(norm(features))
        return features


class MTUNet(nn.Module):
    """A U-Net whose coarse levels are mixed transformers.

    Args:
        spatial_dims: 2.
        in_channels: C.
        out_channels: K.
        filters: of each level; each twice the one before.
        heads: of the attentions.

    Raises:
        ValueError: ``spatial_dims`` is not 2.
    """

    def __init__(
        self,
        spatial_dims: int,
        in_channels: int,
        out_channels: int,
        filters: tuple[int, ...] = FILTERS,
        heads: int = 4,
    ) -> None:
        super().__init__()
        if spatial_dims != 2:
            raise ValueError(f"spatial_dims: got {spatial_dims}, expected 2; its windows are flat")
        act, norm = "relu", "instance"

        def mixed(level: int) -> nn.Module:
            return MixedTransformer(filters[level], heads) if level >= PLAIN else nn.Identity()

        self.stem = TwoConv(2, in_channels, filters[0], act, norm, bias=True)
        self.down = nn.ModuleList(
            nn.Sequential(Down(2, fine, coarse, act, norm, bias=True), mixed(level))
            for level, (fine, coarse) in enumerate(itertools.pairwise(filters), start=1)
        )
        levels = range(len(filters) - 2, -1, -1)
        self.up = nn.ModuleList(
            UpCat(2, filters[n + 1], filters[n], filters[n], act, norm, bias=True, upsample="nontrainable")
            for n in levels
        )
        self.mix = nn.ModuleList(mixed(level) for level in levels)
        self.head = Convolution(2, filters[0], out_channels, kernel_size=1, conv_only=True)

    def forward(self, image: Tensor) -> Tensor:
        """``(B, C, H, W)`` → logits ``(B, K, H, W)``; H and W such that every coarse level holds whole windows."""
        features = self.stem(image)
        skips = []
        for down in self.down:
            skips.append(features)
            features = down(features)
        for up, mix in zip(self.up, self.mix, strict=True):
            features = mix(up(features, skips.pop()))
        out: Tensor = self.head(features)
        return out
