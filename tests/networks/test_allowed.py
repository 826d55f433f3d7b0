"""Models from strangers: nothing that their folders hold is run, imported or fetched, unless the user says so."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import webbrowser
from pathlib import Path

import models
import pytest
from outcomes import row, sidecar

from monai_deepgmm import cli
from monai_deepgmm.cli import main
from monai_deepgmm.methods.model_spec import SPEC, WEIGHTS
from monai_deepgmm.networks import allowed, registry

NET = "monai.networks.nets"
MODULE = """
from pathlib import Path
import torch
Path(__file__).with_suffix(".ran").touch()
from monai_deepgmm.networks import UNet as Net
"""
#: What a stranger's ``model.json`` may name as the network, and the words that refuse it.
HOSTILE = {
    "a module beside the bundle": ({"_target_": "evil.Net"}, "'evil.Net' is no network that this software knows"),
    "a module by its name alone": ({"_target_": "evil"}, "'evil' is no network"),
    "a command": ({"_target_": "os.system", "command": "touch evil.ran"}, "'os.system' is no network"),
    "a browser": ({"_target_": "webbrowser.open", "site": "http://127.0.0.1:9"}, "'webbrowser.open' is no network"),
    "a name through MONAI": ({"_target_": f"{NET}.evil.os.UNet"}, "is no network"),
    "MONAI's, but no network": ({"_target_": "monai.bundle.download"}, "is no network"),
    "an expression": (
        {"_target_": "unet", "filters": "$__import__('os').system('touch evil.ran')"},
        "without $, @ and",
    ),
    "an expression as target": ({"_target_": "$import os"}, "_target_: got '$import os'"),
    "a reference": ({"_target_": "unet", "filters": ["@evil"]}, "filters"),
    "a target inside": ({"_target_": "unet", "act": {"_target_": "os.system"}}, "act"),
    "pretrained": (
        {"_target_": f"{NET}.FlexibleUNet", "backbone": "resnet10", "pretrained": True},
        "may load something",
    ),
    "pretrained_url": ({"_target_": f"{NET}.UNet", "pretrained_url": "http://127.0.0.1:9/x"}, "pretrained_url of"),
    "weights by path": ({"_target_": f"{NET}.UNet", "model_path": "/etc/passwd"}, "model_path of"),
    "huge numbers": ({"_target_": "unet", "filters": [10**9]}, "filters"),
    "a huge configuration": ({"_target_": "unet", "filters": [1] * 100_000}, "more than 131072 bytes"),
    "deep": ({"_target_": "unet", "filters": json.loads("[" * 500 + "]" * 500)}, "nested too deep"),
    "no mapping": ("unet", "expected a mapping with _target_"),
}


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """A good model beside a module that tells when it is run; commands run there, as by ``python -m``."""
    made = models.write(tmp_path / "model")
    (made / "evil.py").write_text(MODULE)
    monkeypatch.chdir(made)
    monkeypatch.syspath_prepend(made)
    monkeypatch.delitem(sys.modules, "evil", raising=False)
    for owner, name in ((os, "system"), (webbrowser, "open"), (socket.socket, "connect")):
        monkeypatch.setattr(owner, name, lambda *a, **k: pytest.fail("something was run or fetched"))
    return made


def name_network(folder: Path, network: object) -> None:
    raw = json.loads((folder / SPEC).read_text())
    (folder / SPEC).write_text(json.dumps({**raw, "network": network}))


def segment(folder: Path, make_patient, *more: str) -> int:
    make_patient(folder.parent / "in", "pat1")
    return main(["segment", str(folder.parent / "in"), str(folder.parent / "out"), "--model", str(folder), *more])


@pytest.mark.parametrize("case", HOSTILE)
def test_a_strangers_model_runs_nothing(folder, make_patient, capsys, case):
    network, words = HOSTILE[case]
    name_network(folder, network)
    assert segment(folder, make_patient) == cli.USAGE
    said = capsys.readouterr().err
    assert words in said
    assert said.count("\n") == 1
    assert not (folder.parent / "out").exists()
    assert not list(folder.glob("*.ran"))


@pytest.mark.parametrize("case", ["a module beside the bundle", "a command", "pretrained", "an expression", "deep"])
@pytest.mark.parametrize("command", ["segment", "train"])
def test_a_strangers_definition_runs_nothing(folder, make_patient, capsys, command, case):
    make_patient(folder.parent / "in", "pat1")
    (folder.parent / "net.json").write_text(json.dumps(HOSTILE[case][0]))
    more = ["--network", str(folder.parent / "net.json"), "--method", "deepg"]
    assert main([command, str(folder.parent / "in"), str(folder.parent / "out"), *more]) == cli.USAGE
    assert "--network" in capsys.readouterr().err
    assert not list(folder.glob("*.ran"))


@pytest.mark.parametrize("part", [SPEC, str(WEIGHTS)])
@pytest.mark.parametrize("kind", ["out of the folder", "to itself", "a pipe", "a folder"])
def test_files_that_are_no_files_of_the_folder(folder, make_patient, capsys, part, kind):
    path, elsewhere = folder / part, folder.parent / "elsewhere"
    path.rename(elsewhere)
    {
        "out of the folder": lambda: path.symlink_to(elsewhere),
        "to itself": lambda: path.symlink_to(path),
        "a pipe": lambda: os.mkfifo(path),
        "a folder": path.mkdir,
    }[kind]()
    assert segment(folder, make_patient) == cli.USAGE
    said = capsys.readouterr().err
    assert path.name in said
    assert said.count("\n") == 1


@pytest.mark.usefixtures("no_picture")
def test_who_trusts_a_strangers_code_runs_it_and_is_told(folder, make_patient, capsys):
    name_network(folder, {**models.TINY, "_target_": "evil.Net"})
    assert segment(folder, make_patient, "--trust-code") == cli.OK
    assert (folder / "evil.ran").is_file()
    assert "--trust-code: 'evil.Net' is no network that this software knows" in capsys.readouterr().err
    out = folder.parent / "out"
    assert row(out, "pat1")["status"] == "ok"
    assert sidecar(out, "pat1")["configuration"]["trust_code"] is True


@pytest.mark.usefixtures("no_picture")
def test_trust_that_is_not_needed_changes_nothing(folder, make_patient):
    assert segment(folder, make_patient, "--trust-code") == cli.OK
    assert "trust_code" not in sidecar(folder.parent / "out", "pat1")["configuration"]


def test_the_words_and_classes_that_are_let_through_are_those_that_are_there():
    from monai.networks import nets

    import monai_deepgmm.networks as ours

    assert set(allowed.WORDS) == set(registry.NAMED)
    assert all(hasattr(nets, name) for name in allowed.MONAI)
    assert all(hasattr(ours, name) for name in allowed.OURS)
    for definition in registry.NAMED.values():
        assert not allowed.check(definition, "--network")


def test_modules_in_the_folder_where_the_user_stands_are_not_imported(tmp_path):
    """By ``python -m``, which would; and who interrupts while modules are loaded gets one line."""
    (tmp_path / "yaml.py").write_text("import pathlib; pathlib.Path('ran').touch()")
    command = [sys.executable, "-m", "monai_deepgmm", "scan", "absent"]
    path = str(Path(cli.__file__).parents[1])
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": path})
    assert (done.returncode, done.stderr) == (cli.USAGE, "deepgmm: there is no folder absent\n")
    assert not (tmp_path / "ran").exists()
    (tmp_path / "late").mkdir()
    (tmp_path / "late" / "yaml.py").write_text("raise KeyboardInterrupt")
    late = {"PYTHONPATH": f"{tmp_path / 'late'}{os.pathsep}{path}"}
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env=os.environ | late)
    assert (done.returncode, done.stderr.count("\n")) == (cli.INTERRUPTED, 1)
