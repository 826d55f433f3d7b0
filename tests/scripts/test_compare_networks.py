"""The script that compares networks: its own networks' shapes, its table, what it keeps, what it refuses."""

from __future__ import annotations

import importlib.util
import itertools
import json
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import nn

from monai_deepgmm.errors import UsageError
from monai_deepgmm.networks import registry as networks
from monai_deepgmm.networks.nll_loss import MixtureNLL

FOLDER = Path(__file__).parents[2] / "scripts" / "compare_networks"
TINY = {
    "trmfcn.TRMFCN": {"filters": [2, 4, 8, 16]},
    "mtunet.MTUNet": {"filters": [4, 8, 16, 32], "heads": 2},
    "transunet.TransUNet": {"filters": [4, 8, 16, 32], "layers": 2, "heads": 2},
}
OWN = [
    pytest.param(name, marks=pytest.mark.skipif(find_spec("einops") is None, reason="needs einops"))
    if "trans" in name
    else name
    for name in TINY
]


@pytest.fixture(autouse=True)
def _importable(monkeypatch) -> None:
    monkeypatch.syspath_prepend(FOLDER)


@pytest.fixture(scope="module")
def script() -> Iterator[ModuleType]:
    spec = importlib.util.spec_from_file_location("compare", FOLDER / "compare.py")
    module = importlib.util.module_from_spec(spec)
    before = list(sys.path)
    spec.loader.exec_module(module)
    yield module
    sys.path[:] = before


def build(name: str, dims: int = 2) -> nn.Module:
    given = {"_target_": name, **TINY[name]}
    return networks.fresh(lambda: networks.build(given, spatial_dims=dims, in_channels=2, out_channels=3), 0)


def picture(*sides: int) -> torch.Tensor:
    return torch.randn(2, 2, *sides, generator=torch.Generator().manual_seed(0))


# The networks ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", OWN)
def test_each_gives_logits_of_the_images_shape(name):
    output = build(name)(picture(32, 64))
    assert output.shape == (2, 3, 32, 64)
    assert output.isfinite().all()
    assert (output < 0).any()


@pytest.mark.parametrize("name", [name for name in OWN if name != "mtunet.MTUNet"])
def test_all_but_the_windows_work_on_volumes(name):
    assert build(name, 3)(picture(32, 32, 32)).shape == (2, 3, 32, 32, 32)


def test_windows_are_flat():
    with pytest.raises(UsageError, match="spatial_dims: got 3, expected 2"):
        build("mtunet.MTUNet", 3)


@pytest.mark.parametrize("name", OWN)
def test_the_mixtures_gradient_reaches_what_each_layer_uses(name):
    network, image = build(name), picture(32, 64)
    target = torch.cat([image, torch.ones(2, 1, 32, 64)], 1)
    MixtureNLL(spatial=True, covariance="diag")(network(image), target).backward()
    # MONAI's transformer block holds a norm for an attention that it does not have here.
    used = {n: p for n, p in network.named_parameters() if "cross_attn" not in n}
    assert [n for n, p in used.items() if p.grad is None or not p.grad.isfinite().all()] == []
    assert [n for n, p in used.items() if n.endswith("weight") and not p.grad.any()] == []


@pytest.mark.parametrize("name", OWN)
def test_a_far_corner_matters_to_those_that_attend(name):
    """Without the norms, whose averages reach everywhere, convolutions end somewhere; attention does not."""
    network = build(name).double().eval()
    for module in network.modules():
        if isinstance(module, nn.InstanceNorm2d | nn.GroupNorm):
            module.forward = lambda x: x
    image = picture(192, 192).double().requires_grad_()
    network(image)[..., :8, :8].square().sum().backward()
    reached = bool(image.grad[:, :, 160:, 160:].any())
    assert reached == (name != "trmfcn.TRMFCN")


def test_far_windows_weigh_less_the_narrower_the_gaussian():
    attention = importlib.import_module("mtunet").LocalGlobalAttention(4, 2)
    with torch.no_grad():
        attention.log_width.copy_(torch.tensor([0.0, 2.0]).log().clamp_min(0))
        weight = attention._distances(1, 3)
    torch.testing.assert_close(weight[0], -torch.tensor([[0, 1, 4], [1, 0, 1], [4, 1, 0]]) / 2)
    torch.testing.assert_close(weight[1], weight[0] / 4)


def test_an_image_enters_the_triple_residual_network_at_three_sizes():
    network = build("trmfcn.TRMFCN")
    given = []
    for down in network.down:
        down.register_forward_hook(lambda module, inputs, output: given.append(tuple(inputs[0].shape[1:])))
    network(picture(32, 64))
    assert given == [(2, 32, 64), (2 + 2, 16, 32), (4 + 2, 8, 16), (8, 4, 8)]


# The table -------------------------------------------------------------------------------------------------------


def row(**changes) -> dict:
    dice = {"blood": 0.5, "scar": 0.25}
    return {
        "parameters": 1234,
        "cpu_seconds": 10.0,
        "size": [64, 32],
        "dice": dice,
        "mean": 0.4,
        "matched": 0.5,
    } | changes


def test_seeds_are_averaged_and_their_spread_is_told(script):
    seeds = [row(), row(cpu_seconds=20.0, dice={"blood": 0.7, "scar": None}, mean=0.6, matched=0.7)]
    lines = list(script.table([script.averaged("net", seeds)], ["blood", "edema", "scar"]))
    assert lines[0] == "| network | parameters | train CPU s | blood | edema | scar | mean | matched |"
    assert lines[2] == "| net | 1,234 | 15 | 0.600 |  | 0.250 | 0.500 ± 0.141 | 0.600 |"
    assert lines[-1].startswith("Images of 64×32 voxels; ")


def test_what_could_not_be_measured_is_an_empty_cell(script):
    (*_, last) = list(script.table([script.averaged("a", [row(mean=None, matched=None)])], ["blood"]))[:3]
    assert last == "| a | 1,234 | 10 | 0.500 |  |  |"


def test_seconds_add_up_over_interruptions(script, tmp_path):
    path = tmp_path / "deep" / "seconds"
    with pytest.raises(KeyboardInterrupt), script.cpu_seconds(path):
        raise KeyboardInterrupt
    first = float(path.read_text())
    path.write_text("100")
    with script.cpu_seconds(path):
        sum(range(10**5))
    assert first >= 0
    assert float(path.read_text()) > 100


# A run -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def compared(script, make_patient, tmp_path_factory):
    """One tiny network, trained for an epoch; another that cannot be."""
    folder = tmp_path_factory.mktemp("compare")
    for number in (1, 2):
        make_patient(folder / "data", f"pat{number}", seed=number)
    (folder / "tiny.json").write_text(json.dumps({"_target_": "trmfcn.TRMFCN", "filters": [2, 4]}))
    networks = ["--networks", str(folder / "tiny.json"), "json.JSONEncoder"]
    asked = [str(folder / "data"), str(folder / "out"), *networks, "--epochs", "1", "--loss", "nll_v"]
    return folder, asked, script.main(asked)


def test_a_run_makes_a_table_of_what_could_be_trained(compared):
    folder, _, code = compared
    lines = (folder / "out" / "table.md").read_text().splitlines()
    assert code == 1  # json.JSONEncoder is no network
    assert lines[2].startswith("| tiny | ")
    assert len(lines) == 5
    record = json.loads((folder / "out" / "tiny-seed0" / "row.json").read_text())
    assert set(record["dice"]) == {"blood", "myocardium", "edema", "scar"}
    assert 0 <= record["mean"] <= record["matched"] <= 1
    assert record["cpu_seconds"] > 0
    known = json.loads((folder / "out" / "tiny-seed0" / "model" / "model.json").read_text())
    assert (known["labels"], known["network"]["_target_"]) == ("network", "trmfcn.TRMFCN")


def test_what_is_done_is_kept_and_other_options_are_refused(compared, script, monkeypatch, capsys):
    folder, asked, _ = compared
    before = (folder / "out" / "table.md").read_bytes()

    def nothing(command: str, *options: object) -> None:
        raise script.FailedError(command)

    monkeypatch.setattr(script, "step", nothing)
    assert script.main(asked) == 1
    assert (folder / "out" / "table.md").read_bytes() == before
    assert script.main([*asked, "--epochs", "2"]) == 2
    assert "tiny-seed0 was made with other options" in capsys.readouterr().err


def test_patients_without_labels_are_refused_before_anything_is_trained(script, make_patient, tmp_path, capsys):
    make_patient(tmp_path / "data", "pat1")["gd"].unlink()
    assert script.main([str(tmp_path / "data"), str(tmp_path / "out")]) == 2
    assert "no patient has labels" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_without_data_phantoms_are_made_once(script, tmp_path, monkeypatch):
    made = []
    monkeypatch.setattr(script, "step", lambda *words: made.append(words))
    first = script.phantoms(tmp_path, "train", "infarct")
    assert script.phantoms(tmp_path, "train", "infarct") == first == tmp_path / "train"
    assert made == [("phantom", first, "-n", 8, "--seed", 1, "--protocol", "infarct")]


def test_options_reach_the_training_and_the_tables_names_their_networks(script, tmp_path, monkeypatch):
    steps = []
    monkeypatch.setattr(script, "step", lambda *words: steps.append(list(map(str, words))))
    monkeypatch.setattr(script, "told", lambda folder, wanted: {})
    asked = ["D", str(tmp_path), "--labels", "1/4", "--epochs", "3", "--set", "lr=0.01", "--loss", "gmm"]
    script.measured("mtunet", 7, Path("D"), Path("E"), script.parser().parse_args(asked))
    (train, segment, evaluate) = steps
    pairs = dict(itertools.pairwise(train))
    given = {"--network": "mtunet.MTUNet", "--labels": "1/4", "--epochs": "3", "--loss": "gmm", "--seed": "7"}
    assert given.items() <= pairs.items()
    assert train[-3:] == ["--set", "labels=network", "lr=0.01"]
    assert (train[1], segment[1], evaluate[2]) == ("D", "E", "E")
    assert segment[segment.index("--model") + 1] == train[2]


def test_its_own_networks_are_known_by_short_names(script):
    assert set(script.OWN) < set(script.NETWORKS)
    assert all((FOLDER / f"{target.partition('.')[0]}.py").is_file() for target in script.OWN.values())
    others = set(script.NETWORKS) - set(script.OWN)
    assert others < set(networks.NAMED)
