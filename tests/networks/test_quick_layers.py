"""Quick layers compute what torch's own do."""

from __future__ import annotations

import pytest
import torch
from tensors import normal
from torch import nn

from monai_deepgmm.networks import registry
from monai_deepgmm.networks.quick_layers import QuickInstanceNorm, QuickMaxPool, quickened


@pytest.mark.parametrize("shape", [(6, 7), (5, 4, 3)], ids=["2d", "3d"])
@pytest.mark.parametrize("affine", [False, True], ids=["plain", "affine"])
def test_a_norm_is_the_same_and_so_is_its_gradient(shape, affine):
    kind = nn.InstanceNorm2d if len(shape) == 2 else nn.InstanceNorm3d
    norm = kind(3, affine=affine, eps=1e-3).double()
    if affine:
        nn.init.normal_(norm.weight, generator=torch.Generator().manual_seed(0))
    quick = quickened(nn.Sequential(norm), training=True)[0]
    assert type(quick) is QuickInstanceNorm
    assert list(nn.Sequential(norm).state_dict()) == list(nn.Sequential(quick).state_dict())
    for each in (norm, quick):
        values = normal(2, 3, *shape).requires_grad_()
        (each(values) * normal(2, 3, *shape, seed=1)).sum().backward()
        if each is norm:
            wanted, gradient = norm(values), values.grad
    torch.testing.assert_close(quick(values), wanted)
    torch.testing.assert_close(values.grad, gradient)


@pytest.mark.parametrize("shape", [(2, 2), (6, 8), (7, 9)])
def test_a_pool_is_the_same_also_where_a_voxel_is_left_over(shape):
    values = normal(2, 3, *shape)
    assert torch.equal(QuickMaxPool()(values), nn.functional.max_pool2d(values, 2))


@pytest.mark.parametrize(
    "layer",
    [
        nn.InstanceNorm2d(3, track_running_stats=True),
        nn.MaxPool2d(3),
        nn.MaxPool2d(2, stride=1),
        nn.MaxPool2d(2, padding=1),
        nn.MaxPool2d(2, ceil_mode=True),
        nn.MaxPool2d(2, return_indices=True),
        nn.MaxPool3d(2),
        nn.BatchNorm2d(3),
    ],
    ids=repr,
)
def test_what_is_not_the_same_is_left_as_it_is(layer):
    assert quickened(nn.Sequential(layer), training=False)[0] is layer


@pytest.mark.parametrize("name", ["unet", "foldedunet", "modifiedunet", "dynunet"])
def test_networks_say_the_same(name):
    options = {"spatial_dims": 2, "in_channels": 2, "out_channels": 3}
    plain, quick = (registry.fresh(lambda: registry.build(name, **options), 0).eval() for _ in range(2))
    quick = quickened(quick, training=False)
    kinds = {type(layer) for layer in quick.modules()}
    assert QuickInstanceNorm in kinds
    assert not kinds & {nn.InstanceNorm2d}
    with torch.no_grad():
        wanted, found = (registry.logits(network, normal(2, 2, 32, 64).float()) for network in (plain, quick))
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-4)


def test_a_network_in_training_keeps_its_pools():
    network = quickened(nn.Sequential(nn.InstanceNorm2d(2), nn.MaxPool2d(2)), training=True)
    assert [type(layer) for layer in network] == [QuickInstanceNorm, nn.MaxPool2d]
    network = nn.Sequential(nn.InstanceNorm2d(2, affine=True)).to("meta")
    assert type(quickened(network, training=True)[0]) is nn.InstanceNorm2d  # not on a CPU
