"""The modified U-Net of Ma 2022: its levels, its skip paths, how far it sees, scripting and teaching."""

from __future__ import annotations

import pytest
import torch
from tensors import seeded
from torch import nn

from monai_deepgmm.networks import ModifiedUNet, UNet, registry
from monai_deepgmm.networks.nll_loss import MixtureNLL

SMALL = (2, 4, 8, 16, 32)


def build(dims: int = 2, filters: tuple[int, ...] = SMALL, **options) -> ModifiedUNet:
    return registry.fresh(lambda: ModifiedUNet(dims, 2, 3, filters=filters, **options), 0)


def picture(*sides: int) -> torch.Tensor:
    return torch.randn(2, 2, *sides, generator=seeded(1))


def convolutions(module: nn.Module, kernel: int = 3) -> int:
    return sum(isinstance(m, nn.Conv2d) and m.kernel_size == (kernel, kernel) for m in module.modules())


@pytest.mark.parametrize("sides", [(32, 48), (33, 50), (32, 32, 48), (16, 33, 20)], ids=str)
def test_logits_keep_the_images_shape(sides):
    output = build(len(sides))(picture(*sides))
    assert output.shape == (2, 3, *sides)
    assert output.isfinite().all()
    assert (output < 0).any()


def test_parameters_by_hand():
    """Two plain levels and a bottleneck."""

    def convolution(inner: int, outer: int, kernel: int = 9) -> int:
        return inner * outer * kernel + outer

    stem = convolution(2, 2) + convolution(2, 2)
    down = convolution(2, 4) + convolution(4, 4) + convolution(4, 8) + convolution(8, 8)
    skip = 2 * convolution(2, 2) + convolution(4, 4)
    up = convolution(8, 4, 1) + convolution(8, 4) + convolution(4, 4)
    up += convolution(4, 2, 1) + convolution(4, 2) + convolution(2, 2)
    small, papers = (sum(p.numel() for p in n.parameters()) for n in (build(filters=(2, 4, 8)), ModifiedUNet(2, 3, 4)))
    assert small == stem + down + skip + up + convolution(2, 3, 1)
    assert papers == 9_746_308  # with the filters of the paper's U-Net


def test_skip_paths_have_fewer_modules_the_deeper_the_level_each_a_convolution_and_a_relu():
    assert [convolutions(skip) for skip in build().skip] == [4, 3, 2, 1]
    for level, skip in enumerate(build(norm=None).skip):
        kinds = [type(m) for m in skip.modules() if not list(m.children())]
        assert kinds == [nn.Conv2d, nn.ReLU] * (4 - level)
        assert all(m.in_channels == m.out_channels == SMALL[level] for m in skip.modules() if isinstance(m, nn.Conv2d))


def test_two_levels_are_plain_two_have_a_third_convolution_and_each_is_pooled_to_half():
    network, sizes = build(), []
    assert convolutions(network.stem) == 2
    assert [convolutions(down) for down in network.down] == [2, 3, 3, 2]  # the last is the bottleneck
    upwards = [convolutions(up) + convolutions(widen) for up, widen in zip(network.up, network.widen, strict=True)]
    assert upwards == [3, 3, 2, 2]
    for down in network.down:
        down.register_forward_hook(lambda module, given, output: sizes.append(tuple(output.shape[1:])))
    network(picture(32, 64))
    assert sizes == [(4, 16, 32), (8, 8, 16), (16, 4, 8), (32, 2, 4)]


@pytest.mark.parametrize("dims", [2, 3])
@torch.no_grad()
def test_up_sampling_is_linear(dims):
    """What the decoder is given of a ramp is a ramp, but for its ends."""
    ramp = torch.arange(6.0).reshape(1, 1, 6, *[1] * (dims - 1)).expand(1, 32, 6, *[4] * (dims - 1))
    steps = build(dims).up[0].upsample(ramp)[0, 0].flatten(1)[:, 0].diff()[1:-1]
    torch.testing.assert_close(steps, steps.mean().expand_as(steps))
    assert steps.abs().min() > 0


def test_it_sees_further_than_a_plain_unet_with_as_many_levels_and_more_levels_see_further():
    """How far a voxel's output reaches into the image, without the norms, which would see all of it."""

    def reach(network: nn.Module) -> int:
        network = network.double().eval()
        for name, module in list(network.named_modules()):
            if name.endswith("adn"):
                module.N = nn.Identity()
            if isinstance(module, nn.ReLU):
                module.forward = lambda x: x  # none of what a voxel sees is hidden by a zero
        image = torch.zeros(1, 2, 256, 32, dtype=torch.float64, requires_grad=True)
        network(image)[0, 0, 128, 16].backward()
        rows = torch.nonzero(image.grad.abs().sum((0, 1, 3)))
        return int(rows.max() - rows.min()) + 1

    small, plain = (registry.fresh(lambda n=n: UNet(2, 2, 3, filters=SMALL[:n]), 0) for n in (3, 4))
    assert reach(small) < reach(plain) < reach(build(filters=SMALL[:4])) < reach(build())


@pytest.mark.parametrize("sides", [(32, 48), (16, 16, 32)], ids=str)
@pytest.mark.parametrize("norm", ["instance", None])
def test_it_is_scripted_to_the_same_output(sides, norm):
    network, image = build(len(sides), norm=norm).eval(), picture(*sides)
    with torch.no_grad():
        torch.testing.assert_close(torch.jit.script(network)(image), network(image))


@pytest.mark.parametrize("sides", [(32, 48), (16, 32, 32)], ids=str)
def test_the_mixtures_gradient_reaches_every_weight(sides):
    """A bias before an instance norm has no effect, and so no gradient."""
    network, image = build(len(sides)), picture(*sides)
    target = torch.cat([image, torch.ones(2, 1, *sides)], 1)
    MixtureNLL(spatial=True, covariance="diag")(network(image), target).backward()
    gradients = {name: p.grad for name, p in network.named_parameters()}
    assert [name for name, g in gradients.items() if g is None or not g.isfinite().all()] == []
    assert [name for name, g in gradients.items() if name.endswith("weight") and not g.any()] == []


@torch.no_grad()
def test_a_new_networks_outputs_differ_from_voxel_to_voxel_with_the_norm_alone():
    """Why there is one: without, all voxels look alike to the first M-steps."""
    image = picture(64, 64)
    normed, bare = (build(filters=(32, 64, 128, 256, 512), norm=n)(image) for n in ("instance", None))
    assert normed.std((2, 3)).mean() > 0.1
    assert bare.std((2, 3)).mean() < 0.01


@pytest.mark.parametrize("norm", ["batch", None])
def test_other_norms_are_what_monai_takes(norm):
    kinds = {type(m).__name__ for m in build(norm=norm).modules()}
    assert ("BatchNorm2d" in kinds) == (norm == "batch")
    assert "InstanceNorm2d" not in kinds
