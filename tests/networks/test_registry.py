"""Networks by name, by class and by mapping; their sizes, shapes, seeds and errors."""

from __future__ import annotations

import json
from collections.abc import Iterator
from importlib.util import find_spec

import pytest
import torch
from torch import nn

from monai_deepgmm.errors import UsageError
from monai_deepgmm.networks import registry as networks

SIZES = {"in_channels": 2, "out_channels": 3}
PRESETS = [
    pytest.param(name, marks=pytest.mark.skipif(find_spec("einops") is None, reason="needs einops"))
    if name in ("unetr", "swinunetr")
    else name
    for name in networks.NAMED
]
TINY = {"_target_": "unet", "filters": [4, 8]}


@pytest.fixture(autouse=True)
def _two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def build(definition, *, spatial_dims=2, size=None) -> nn.Module:
    return networks.build(definition, spatial_dims=spatial_dims, size=size, **SIZES)


def complete(definition, *, spatial_dims=2, size=None) -> dict:
    return networks.complete(definition, spatial_dims=spatial_dims, size=size, **SIZES)


def state(network: nn.Module) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in network.parameters()])


@torch.no_grad()
def look_at(network: nn.Module, *sides: int) -> torch.Tensor:
    return networks.logits(network.eval(), torch.randn(2, 2, *sides, generator=torch.Generator().manual_seed(0)))


# Sizes and shapes ------------------------------------------------------------------------------------------------


def test_the_default_network_has_the_papers_number_of_parameters():
    network = networks.build(None, spatial_dims=2, in_channels=3, out_channels=4)
    assert sum(p.numel() for p in network.parameters()) == 7_237_956


def test_parameters_of_a_tiny_unet_by_hand():
    """Each level two 3×3 convolutions; up, a 1×1 one halves the filters, and two more see it beside the skip."""
    stem = (2 * 9 * 4 + 4) + (4 * 9 * 4 + 4)
    down = (4 * 9 * 8 + 8) + (8 * 9 * 8 + 8)
    up = (8 * 4 + 4) + (8 * 9 * 4 + 4) + (4 * 9 * 4 + 4)
    head = 4 * 3 + 3
    assert sum(p.numel() for p in build(TINY).parameters()) == stem + down + up + head


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


def test_a_dynunet_has_a_kernel_size_for_each_of_its_levels_in_2d_and_3d():
    for dims in (2, 3):
        network = build({"_target_": "dynunet", "filters": [2] * 5}, spatial_dims=dims)
        kernels = {m.kernel_size for n, m in network.named_modules() if n.endswith("conv1.conv")}
        assert kernels == {(3,) * dims}
        assert len(network.downsamples) == 3  # between the input block and the bottleneck: four halvings


def test_a_network_in_3d_keeps_the_images_shape_with_fewer_filters():
    network = build("unet", spatial_dims=3)
    assert look_at(network, 16, 16, 32).shape == (2, 3, 16, 16, 32)
    assert network.stem.conv_0.conv.out_channels == networks.FILTERS_3D[0] == 8


def test_sides_that_cannot_be_halved_come_back_whole():
    assert look_at(build({"_target_": "unet", "filters": [4, 8, 16]}), 13, 22).shape == (2, 3, 13, 22)


def test_a_unet_sees_as_far_as_its_levels_allow():
    """A voxel far away reaches the output only through the coarse levels; instance norm is taken out to see it."""

    def reach(filters: list[int]) -> int:
        network = networks.fresh(lambda: build({"_target_": "unet", "filters": filters}), 0).double().eval()
        for name, module in list(network.named_modules()):
            if name.endswith("adn"):
                module.N = nn.Identity()
        image = torch.zeros(1, 2, 64, 64, dtype=torch.float64, requires_grad=True)
        network(image)[0, 0, 32, 32].backward()
        return int((image.grad.abs().sum((0, 1, 2)) > 0).sum())

    assert reach([4, 8]) < reach([4, 8, 16])


# Definitions -----------------------------------------------------------------------------------------------------


def test_any_network_of_monai_by_its_class():
    given = {"_target_": "monai.networks.nets.UNet", "channels": [4, 8], "strides": [2], "num_res_units": 1}
    network = build(given)
    assert type(network).__module__.startswith("monai.")
    assert look_at(network, 16, 16).shape == (2, 3, 16, 16)


def test_a_class_by_its_name_alone():
    assert look_at(build("monai.networks.nets.SegResNet"), 16, 16).shape == (2, 3, 16, 16)


def test_only_what_the_class_takes_is_filled_in():
    given = complete({"_target_": "torch.nn.Conv2d", "kernel_size": 1})
    assert given == {"_target_": "torch.nn.Conv2d", "kernel_size": 1, **SIZES}


def test_the_sizes_come_from_the_images_whatever_the_mapping_says():
    given = complete({"_target_": "monai.networks.nets.BasicUNet", "in_channels": 7, "spatial_dims": 3})
    assert given == {"_target_": "monai.networks.nets.BasicUNet", "spatial_dims": 2, **SIZES}


@pytest.mark.parametrize("name", ["unet", "UNet", "UNET"])
def test_a_name_in_any_case_is_the_default(name):
    assert complete(name) == complete(None) == {**networks.DEFAULT, "spatial_dims": 2, **SIZES}


@pytest.mark.parametrize("definition", [None, *PRESETS, TINY])
@pytest.mark.parametrize("spatial_dims", [2, 3])
def test_the_complete_definition_survives_json_and_builds_the_same_network(definition, spatial_dims):
    size = (32, 64, 32)[:spatial_dims]
    written = json.loads(json.dumps(complete(definition, spatial_dims=spatial_dims, size=size)))
    assert complete(written, spatial_dims=spatial_dims, size=size) == written
    if spatial_dims == 2:
        there, here = (networks.fresh(lambda d=d: build(d, size=size), 0) for d in (written, definition))
        assert repr(there) == repr(here)
        assert torch.equal(state(there), state(here))


def test_completing_leaves_the_mapping_as_it_was():
    given = {"_target_": "unet", "filters": [4, 8]}
    complete(given)
    assert given == TINY
    complete("dynunet", spatial_dims=3)["strides"] = None
    assert complete("dynunet")["strides"] == [1, 2, 2, 2, 2]


def test_filters_that_are_given_are_kept_in_3d():
    assert complete(TINY, spatial_dims=3)["filters"] == [4, 8]


def test_the_modified_unet_has_a_quarter_of_its_filters_in_3d():
    assert "filters" not in complete("modifiedunet")
    assert complete("modifiedunet", spatial_dims=3)["filters"] == [8, 16, 32, 64, 128]
    assert complete({"_target_": "modifiedunet", "filters": [2, 4]}, spatial_dims=3)["filters"] == [2, 4]


def test_a_network_for_images_of_one_size_is_made_for_that_of_the_training_whatever_the_mapping_says():
    given = {"_target_": "unetr", "img_size": [96, 96]}
    assert complete(given, size=(32, 64))["img_size"] == [32, 64]
    assert "img_size" not in complete("swinunetr", size=(32, 64))


def test_a_named_networks_arguments_can_be_changed():
    assert complete({"_target_": "segresnet", "init_filters": 8})["init_filters"] == 8


# Errors ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "definition",
    ["unnet", "", "monai.networks.nets.NoSuchNet", "os.system", "json.JSONEncoder", "json", {"filters": [4, 8]}],
    ids=str,
)
def test_what_is_no_network_is_refused_with_the_choices(definition):
    with pytest.raises(UsageError, match=r"--network: .* is no network.*unet, basicunet, dynunet, segresnet"):
        build(definition)


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


def test_a_network_for_images_of_one_size_is_refused_where_sizes_vary():
    with pytest.raises(UsageError, match=r"--network \S+UNETR: .*one size.*deepgmm train"):
        build("unetr")


def test_a_package_that_only_some_networks_need_is_named(monkeypatch):
    class Needy(nn.Module):
        def __init__(self, in_channels: int) -> None:
            raise ImportError("from einops import rearrange (No module named 'einops').\n\nA long story")

    monkeypatch.setattr(networks, "_class", lambda target: Needy)
    with pytest.raises(UsageError, match=r"--network needy: .*: pip install einops$"):
        build("needy")


def test_a_bundles_network_reports_bad_arguments_alike():
    with pytest.raises(UsageError, match=r"--network monai_deepgmm\.networks\.UNet: .*levels"):
        networks.seeded("monai_deepgmm.networks.UNet", {"levels": 3}, 0)


# Seeds -----------------------------------------------------------------------------------------------------------


def test_weights_follow_the_seed_and_nothing_else():
    first = networks.fresh(lambda: build(TINY), 1)
    torch.rand(17)
    again, other = networks.fresh(lambda: build(TINY), 1), networks.fresh(lambda: build(TINY), 2)
    assert torch.equal(state(first), state(again))
    assert not torch.equal(state(first), state(other))
    assert state(first).std() > 0


def test_the_global_generator_is_left_as_it_was():
    before = torch.get_rng_state()
    networks.fresh(lambda: build(TINY), 1)
    assert torch.equal(torch.get_rng_state(), before)
    build(TINY)
    assert not torch.equal(torch.get_rng_state(), before)  # without a seed, it is the one that draws


def test_the_generator_is_left_alone_when_the_network_cannot_be_made():
    before = torch.get_rng_state()
    with pytest.raises(UsageError):
        networks.fresh(lambda: build("unnet"), 1)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_bundles_network_is_the_same_as_ours():
    given = complete(TINY)
    bundled = networks.seeded(given.pop("_target_"), given, 5)
    assert torch.equal(state(bundled), state(networks.fresh(lambda: build(TINY), 5)))


# Outputs ---------------------------------------------------------------------------------------------------------


def test_the_finest_output_is_the_first_however_deep():
    fine, coarse = torch.zeros(1, 3, 4, 4), torch.zeros(1, 3, 2, 2)
    for output in (fine, [fine], (fine, coarse), [[fine, coarse], coarse]):
        assert networks.finest(output) is fine


def test_a_deeply_supervised_network_says_what_its_finest_level_says():
    given = {"_target_": "monai.networks.nets.BasicUNetPlusPlus", "features": [4] * 6, "deep_supervision": True}
    network = networks.fresh(lambda: build(given), 0).eval()
    image = torch.randn(1, 2, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        every = network(image)
        assert len(every) == 4
        assert torch.equal(networks.logits(network, image), every[0])


def test_a_unet_is_scripted_to_the_same_output():
    network = networks.fresh(lambda: build({"_target_": "unet", "filters": [4, 8, 16]}), 0).eval()
    torch.testing.assert_close(look_at(torch.jit.script(network), 16, 16), look_at(network, 16, 16))
