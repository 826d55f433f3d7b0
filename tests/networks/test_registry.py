"""Networks by name, by class and by mapping; their sizes, shapes, seeds and errors."""

from __future__ import annotations

import json
from importlib.util import find_spec

import pytest
import torch
from tensors import seeded
from torch import nn

from monai_deepgmm.errors import UsageError
from monai_deepgmm.networks import registry

SIZES = {"in_channels": 2, "out_channels": 3}
PRESETS = [
    pytest.param(name, marks=pytest.mark.skipif(find_spec("einops") is None, reason="needs einops"))
    if name in ("unetr", "swinunetr")
    else name
    for name in registry.NAMED
]
TINY = {"_target_": "unet", "filters": [4, 8]}
MONAI_UNET = {"_target_": "monai.networks.nets.UNet", "channels": [4, 8], "strides": [2], "num_res_units": 1}


def build(definition, *, spatial_dims=2, size=None) -> nn.Module:
    return registry.build(definition, spatial_dims=spatial_dims, size=size, **SIZES)


def complete(definition, *, spatial_dims=2, size=None) -> dict:
    return registry.complete(definition, spatial_dims=spatial_dims, size=size, **SIZES)


def parameters(network: nn.Module) -> int:
    return sum(p.numel() for p in network.parameters())


def state(network: nn.Module) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in network.parameters()])


@torch.no_grad()
def look_at(network: nn.Module, *sides: int) -> torch.Tensor:
    return registry.logits(network.eval(), torch.randn(2, 2, *sides, generator=seeded()))


def test_parameters_of_the_papers_network_and_of_a_tiny_one_by_hand():
    """Each level two 3×3 convolutions; up, a 1×1 one halves the filters, and two more see it beside the skip."""
    assert parameters(registry.build(None, spatial_dims=2, in_channels=3, out_channels=4)) == 7_237_956
    stem = (2 * 9 * 4 + 4) + (4 * 9 * 4 + 4)
    down = (4 * 9 * 8 + 8) + (8 * 9 * 8 + 8)
    up = (8 * 4 + 4) + (8 * 9 * 4 + 4) + (4 * 9 * 4 + 4)
    assert parameters(build(TINY)) == stem + down + up + 4 * 3 + 3


@pytest.mark.parametrize("name", PRESETS)
def test_every_named_network_keeps_the_images_shape(name):
    output = look_at(build(name, size=(32, 64)), 32, 64)
    assert output.shape == (2, 3, 32, 64)
    assert output.isfinite().all()
    assert (output < 0).any()  # logits, not probabilities


@pytest.mark.parametrize("name", PRESETS)
def test_every_named_network_keeps_the_shape_of_a_volume(name):
    """Small ones: what is tried is that the definition is one for three dimensions."""
    tiny = {
        "unet": {"filters": [2, 4]},
        **{key: {"filters": [2, 4]} for key in ("quickunet", "foldedunet")},
        "modifiedunet": {"filters": [2, 4, 8, 16, 32]},
        "basicunet": {"features": [2, 2, 4, 8, 16, 2]},
        "basicunetplusplus": {"features": [2, 2, 4, 8, 16, 2]},
        "attentionunet": {"channels": [2, 4, 8, 16, 32]},
        "dynunet": {"filters": [2, 4, 8, 16, 32]},
        "segresnet": {"init_filters": 8},
        "unetr": {"hidden_size": 12, "mlp_dim": 12, "feature_size": 2},
        "swinunetr": {"feature_size": 12, "depths": [1, 1, 1, 1], "num_heads": [1, 1, 1, 1]},
    }
    size = (32, 32, 64)
    network = build({"_target_": name, **tiny[name]}, spatial_dims=3, size=size)
    assert look_at(network, *size).shape == (2, 3, *size)


@pytest.mark.parametrize("dims", [2, 3])
def test_a_dynunet_has_a_kernel_size_for_each_of_its_levels(dims):
    network = build({"_target_": "dynunet", "filters": [2] * 5}, spatial_dims=dims)
    assert {m.kernel_size for n, m in network.named_modules() if n.endswith("conv1.conv")} == {(3,) * dims}
    assert len(network.downsamples) == 3  # between the input block and the bottleneck: four halvings


def test_a_network_in_3d_has_fewer_filters_unless_they_are_given():
    assert build("unet", spatial_dims=3).stem.conv_0.conv.out_channels == registry.FILTERS_3D[0] == 8
    assert complete(TINY, spatial_dims=3)["filters"] == [4, 8]
    assert "filters" not in complete("modifiedunet")
    assert complete("modifiedunet", spatial_dims=3)["filters"] == [8, 16, 32, 64, 128]
    assert complete({"_target_": "modifiedunet", "filters": [2, 4]}, spatial_dims=3)["filters"] == [2, 4]
    assert [complete("quickunet", spatial_dims=d)["filters"] for d in (2, 3)] == [[48, 96, 192], [24, 48, 96]]


@pytest.mark.parametrize(
    ("definition", "sides"),
    [
        ({"_target_": "unet", "filters": [4, 8, 16]}, (13, 22)),  # sides that cannot be halved
        (MONAI_UNET, (16, 16)),
        ("monai.networks.nets.SegResNet", (16, 16)),
    ],
    ids=["odd sides", "mapping", "class"],
)
def test_any_network_by_its_class_keeps_the_images_shape(definition, sides):
    network = build(definition)
    assert type(network).__module__.startswith("monai")
    assert look_at(network, *sides).shape == (2, 3, *sides)


def test_what_is_filled_in():
    conv, net = "torch.nn.Conv2d", "monai.networks.nets.BasicUNet"
    assert complete({"_target_": conv, "kernel_size": 1}) == {"_target_": conv, "kernel_size": 1, **SIZES}
    # The sizes come from the images, whatever the mapping says.
    assert complete({"_target_": net, "in_channels": 7, "spatial_dims": 3}) == {
        "_target_": net,
        "spatial_dims": 2,
        **SIZES,
    }
    for name in ("unet", "UNet", "UNET", None):
        assert complete(name) == {**registry.DEFAULT, "spatial_dims": 2, **SIZES}


@pytest.mark.parametrize("definition", [None, *PRESETS, TINY])
@pytest.mark.parametrize("spatial_dims", [2, 3])
def test_the_complete_definition_survives_json_and_builds_the_same_network(definition, spatial_dims):
    size = (32, 64, 32)[:spatial_dims]
    written = json.loads(json.dumps(complete(definition, spatial_dims=spatial_dims, size=size)))
    assert complete(written, spatial_dims=spatial_dims, size=size) == written
    if spatial_dims == 2:
        there, here = (registry.fresh(lambda d=d: build(d, size=size), 0) for d in (written, definition))
        assert repr(there) == repr(here)
        assert torch.equal(state(there), state(here))


def test_completing_leaves_the_mapping_as_it_was():
    given = {"_target_": "unet", "filters": [4, 8]}
    complete(given)
    assert given == TINY
    assert complete({"_target_": "segresnet", "init_filters": 8})["init_filters"] == 8  # but can be changed
    complete("dynunet", spatial_dims=3)["strides"] = None
    assert complete("dynunet")["strides"] == [1, 2, 2, 2, 2]


def test_a_network_for_images_of_one_size_is_made_for_that_of_the_training_whatever_the_mapping_says():
    given = {"_target_": "unetr", "img_size": [96, 96]}
    assert complete(given, size=(32, 64))["img_size"] == [32, 64]
    assert "img_size" not in complete("swinunetr", size=(32, 64))
    with pytest.raises(UsageError, match=r"--network \S+UNETR: .*one size.*deepgmm train"):
        build("unetr")


@pytest.mark.parametrize(
    "definition",
    ["unnet", "", "monai.networks.nets.NoSuchNet", "os.system", "json.JSONEncoder", "json", {"filters": [4, 8]}],
    ids=str,
)
def test_what_is_no_network_is_refused_with_the_choices(definition):
    before = torch.get_rng_state()
    with pytest.raises(UsageError, match=r"--network: .* is no network.*unet, basicunet, dynunet, segresnet"):
        registry.fresh(lambda: build(definition), 1)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    ("definition", "message"),
    [
        ({"_target_": "unet", "levels": 3}, "levels"),
        ({"_target_": "monai.networks.nets.UNet"}, "channels"),
        ({"_target_": "monai.networks.nets.UNet", "channels": [8], "strides": [2]}, "channels"),
        ({"_target_": "monai.networks.nets.BasicUNet", "features": [4, 4]}, "6"),
        ({"_target_": "monai.networks.nets.BasicUNet", "norm": "none such"}, "NONE SUCH"),
    ],
    ids=["unknown", "missing", "too few", "wrong length", "wrong choice"],
)
def test_arguments_that_a_network_does_not_take_are_named(definition, message):
    with pytest.raises(UsageError, match=rf"--network \S+Net: .*{message}"):
        build(definition)
    arguments = {name: value for name, value in complete(definition).items() if name != "_target_"}
    with pytest.raises(UsageError, match=rf"--network \S+Net: .*{message}"):  # a bundle's too
        registry.seeded(complete(definition)["_target_"], arguments, 0)


def test_a_package_that_only_some_networks_need_is_named(monkeypatch):
    class Needy(nn.Module):
        def __init__(self, in_channels: int) -> None:
            raise ImportError("from einops import rearrange (No module named 'einops').\n\nA long story")

    monkeypatch.setattr(registry, "_class", lambda target: Needy)
    with pytest.raises(UsageError, match=r"--network needy: .*: pip install einops$"):
        build("needy")


def test_weights_follow_the_seed_and_nothing_else_and_the_global_generator_is_left_alone():
    first = registry.fresh(lambda: build(TINY), 1)
    torch.rand(17)
    before = torch.get_rng_state()
    again, other = registry.fresh(lambda: build(TINY), 1), registry.fresh(lambda: build(TINY), 2)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(state(first), state(again))
    assert not torch.equal(state(first), state(other))
    assert state(first).std() > 0
    given = complete(TINY)
    assert torch.equal(state(registry.seeded(given.pop("_target_"), given, 1)), state(first))  # a bundle's too
    build(TINY)
    assert not torch.equal(torch.get_rng_state(), before)  # without a seed, it is the one that draws


def test_the_finest_output_is_the_first_however_deep():
    fine, coarse = torch.zeros(1, 3, 4, 4), torch.zeros(1, 3, 2, 2)
    for output in (fine, [fine], (fine, coarse), [[fine, coarse], coarse]):
        assert registry.finest(output) is fine


@torch.no_grad()
def test_a_deeply_supervised_network_says_what_its_finest_level_says():
    given = {"_target_": "monai.networks.nets.BasicUNetPlusPlus", "features": [4] * 6, "deep_supervision": True}
    network, image = registry.fresh(lambda: build(given), 0).eval(), torch.randn(1, 2, 32, 32, generator=seeded())
    every = network(image)
    assert len(every) == 4
    assert torch.equal(registry.logits(network, image), every[0])


def test_a_unet_is_scripted_to_the_same_output():
    network = registry.fresh(lambda: build({"_target_": "unet", "filters": [4, 8, 16]}), 0).eval()
    torch.testing.assert_close(look_at(torch.jit.script(network), 16, 16), look_at(network, 16, 16))
