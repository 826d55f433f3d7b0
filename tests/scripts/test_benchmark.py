"""The script that measures speed: tiny phantoms, the peers' agreement, and its page from numbers by hand; no time."""

from __future__ import annotations

import json

import benchmark
import benchmark_peers as peers
import pytest
import torch
from benchmark_cases import CASES, TINY, dice
from benchmark_earlier import Earlier
from tensors import normal

from monai_deepgmm.networks.gmm_loss import GMMLoss
from monai_deepgmm.networks.nll_loss import MixtureNLL

#: The others take seconds even on a tiny phantom, or a process, and have their likes among these.
QUICK = ("machine", "em-tied", "svgmm", "loss-nll", "loss-gmm", "scaling")


@pytest.mark.parametrize("name", QUICK)
def test_the_sides_of_a_case_agree(name):
    sides = CASES[name][1](TINY)
    facts = {side: work() for side, work in sides.works.items()}
    assert set(sides.once) <= {*sides.works, "pomegranate"}
    assert "×" in sides.shape
    assert all(one["came"] for one in facts.values())
    ours, *others = [one["objective"] for one in facts.values() if "objective" in one] or [0.0]
    assert others == pytest.approx([ours] * len(others), rel=1e-3)


def test_the_losses_as_loops_are_the_losses():
    logits, image = normal(2, 3, 9, 8).requires_grad_(), normal(2, 2, 9, 8)
    mask = (normal(2, 1, 9, 8) > -0.5).double()
    for ours, plain in ((MixtureNLL(), peers.nll_loss), (GMMLoss(), peers.gmm_loss)):
        both = [ours(logits, torch.cat([image, mask], 1)), plain(logits, image, mask, 1e-6)]
        torch.testing.assert_close(*both)
        torch.testing.assert_close(*(torch.autograd.grad(value, logits)[0] for value in both))


def test_dice_in_words():
    found, wanted = torch.tensor([1, 1, 2, 2]), torch.tensor([1, 2, 2, 2])
    assert dice(found, wanted, (1, 2)) == "Dice 0.733"  # 2/3 and 4/5


def case(name: str, **sides: dict) -> dict:
    asked = {"case": name, "tiny": True, "repeats": 2}
    return {
        "asked": asked,
        "shape": "8×8",
        "sides": sides,
        "machine": "a machine",
        "load": 1.5,
        "when": "2026-01-02T03",
    }


def test_the_page_by_hand(tmp_path, monkeypatch, capsys):
    made = {
        "machine": case(
            "machine",
            product={"seconds": [1.0], "flop": 4e9, "came": ""},
            copy={"seconds": [0.5], "bytes": 1e9, "came": ""},
        ),
        "em-diag": case(
            "em-diag",
            ours={"seconds": [2.0, 1.0, 9.0], "flop": 2e9, "objective": 2.0, "came": "NLL"},
            peer={"seconds": [30.0], "objective": 2.5, "came": "NLL"},
        ),
        "scaling": case(
            "scaling", **{k: {"seconds": [s], "came": ""} for k, s in (("as it is", 1), ("voxels × 4", 4))}
        ),
        "command": case(
            "command",
            help={"seconds": [0.1], "came": ""},
            few={"seconds": [4.0], "hearts": 2, "came": ""},
            many={"seconds": [10.0], "hearts": 8, "came": ""},
        ),
    }
    for name, one in made.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(one))
    monkeypatch.setattr(benchmark, "PAGE", tmp_path / "speed.md")
    monkeypatch.setattr(benchmark.runner, "apart", None)  # nothing is measured again
    assert benchmark.main([str(tmp_path), "--only", *made, "--tiny", "--repeats", "2", "--write"]) == 0
    shown, page = capsys.readouterr().out, (tmp_path / "speed.md").read_text()
    for told in ("| 15.0 (ours lower by 0.5) |", "4 GFLOP/s and copies 2.0 GB/s", "at 25 % of that", "voxels 1.00"):
        assert told in shown
        assert told in page
    assert "2.0 CPU s to start, 1.00 for each heart; of 100 hearts 2 %" in page
    assert "a machine; 2026-01-02" in page


def test_what_cannot_be_measured_is_told(tmp_path, monkeypatch, capsys):
    def broken(*words: object) -> dict:
        raise benchmark.runner.StageError("no such thing")

    monkeypatch.setattr(benchmark.runner, "apart", broken)
    assert benchmark.main([str(tmp_path), "--only", "machine"]) == 2
    assert "left out: machine: no such thing" in capsys.readouterr().err
    assert benchmark.main([str(tmp_path), "--repeats", "0"]) == 2


def test_a_revision_that_git_does_not_know_is_told():
    with pytest.raises(benchmark.runner.StageError, match="no-such-revision"):
        Earlier("no-such-revision", {"image": torch.zeros(1, 1, 2, 2)})
