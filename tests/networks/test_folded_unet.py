"""The U-Net on blocks of voxels."""

from __future__ import annotations

import pytest
import torch
from tensors import normal

from monai_deepgmm.networks.folded_unet import FoldedUNet, folded, unfolded


@pytest.mark.parametrize("shape", [(4, 6), (2, 4, 6)], ids=["2d", "3d"])
def test_folding_loses_nothing_and_a_voxel_of_the_fold_is_a_block(shape):
    values = normal(2, 3, *shape)
    small = folded(values)
    assert small.shape == (2, 3 * 2 ** len(shape), *(n // 2 for n in shape))
    assert torch.equal(unfolded(small), values)
    block = values[0, 1][tuple(slice(0, 2) for _ in shape)]  # the second sequence's first block
    count = block.numel()
    assert torch.equal(small[(0, slice(count, 2 * count), *[0] * len(shape))], block.flatten())


def test_logits_are_those_of_single_voxels():
    """Two voxels of one block can be told apart."""
    output = FoldedUNet(2, 1, 3, (4, 8))(normal(1, 1, 16, 24).float())
    assert output.shape == (1, 3, 16, 24)
    assert (output[..., ::2, :] - output[..., 1::2, :]).abs().max() > 1e-3


def test_it_can_be_exported():
    network = FoldedUNet(2, 2, 3, (4, 8)).eval()
    given = normal(1, 2, 16, 16).float()
    torch.testing.assert_close(torch.jit.script(network)(given), network(given))
