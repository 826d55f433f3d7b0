"""The script that compares networks: its own networks, its table, what it keeps, what it refuses."""

from __future__ import annotations

import json

import compare
import pytest
import torch
from torch import nn

from monai_deepgmm.errors import UsageError
from monai_deepgmm.networks import registry
from monai_deepgmm.networks.nll_loss import MixtureNLL

TINY = {
    "trmfcn.TRMFCN": {"filters": [2, 4, 8, 16]},
    "mtunet.MTUNet": {"filters": [4, 8, 16, 32], "heads": 2},
    "transunet.TransUNet": {"filters": [4, 8, 16, 32], "layers": 2, "heads": 2},
}


def build(name: str, dims: int = 2) -> nn.Module:
    given = {"_target_": name, **TINY[name]}
    return registry.fresh(lambda: registry.build(given, spatial_dims=dims, in_channels=2, out_channels=3), 0)


@pytest.mark.parametrize("name", TINY)
def test_each_gives_logits_and_the_mixtures_gradient_reaches_every_layer(name):
    network, image = build(name), torch.randn(2, 2, 32, 64, generator=torch.Generator().manual_seed(0))
    output = network(image)
    assert output.shape == (2, 3, 32, 64)
    assert (output < 0).any()
    MixtureNLL(spatial=True, covariance="diag")(output, torch.cat([image, torch.ones(2, 1, 32, 64)], 1)).backward()
    # MONAI's transformer block holds a norm for an attention that it does not have here.
    used = {n: p for n, p in network.named_parameters() if "cross_attn" not in n}
    assert [n for n, p in used.items() if p.grad is None or not p.grad.isfinite().all()] == []
    assert [n for n, p in used.items() if n.endswith("weight") and not p.grad.any()] == []
    if name == "mtunet.MTUNet":
        with pytest.raises(UsageError, match="spatial_dims: got 3, expected 2"):
            build(name, 3)
    else:
        assert build(name, 3)(torch.zeros(2, 2, 32, 32, 32)).shape == (2, 3, 32, 32, 32)


def test_a_network_is_trained_and_told_once(make_patient, tmp_path, monkeypatch, capsys):
    for number in (1, 2):
        make_patient(tmp_path / "data", f"pat{number}", seed=number)
    (tmp_path / "tiny.json").write_text(json.dumps({"_target_": "trmfcn.TRMFCN", "filters": [2, 4]}))
    networks = ["--networks", str(tmp_path / "tiny.json"), "json.JSONEncoder"]
    asked = [str(tmp_path / "data"), str(tmp_path / "out"), *networks, "--epochs", "1", "--loss", "nll_v"]
    assert compare.main([*asked, "--set", "lr=0.01"]) == 1  # json.JSONEncoder is no network
    table = (tmp_path / "out" / "table.md").read_text()
    assert table.splitlines()[2].startswith("| tiny | ")
    assert len(table.splitlines()) == 5
    record = json.loads((tmp_path / "out" / "tiny-seed0" / "row.json").read_text())
    assert set(record["dice"]) == {"blood", "myocardium", "edema", "scar"}
    assert 0 <= record["mean"] <= record["matched"] <= 1
    assert record["cpu_seconds"] > 0
    known = json.loads((tmp_path / "out" / "tiny-seed0" / "model" / "model.json").read_text())
    assert known["network"]["_target_"] == "trmfcn.TRMFCN"
    assert (known["training"]["label_rule"], known["training"]["lr"]) == ("network", 0.01)

    def fails(command: str, *options: object) -> None:
        raise compare.runner.StageError(command)

    monkeypatch.setattr(compare.runner, "deepgmm", fails)
    assert compare.main([*asked, "--set", "lr=0.01"]) == 1
    assert (tmp_path / "out" / "table.md").read_text() == table
    assert compare.main(asked) == 2
    assert "tiny-seed0 was made with other options" in capsys.readouterr().err
