"""The BIDS App: its options choose patients, and what it writes holds nothing that BIDS does not know."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import tomllib
from fnmatch import fnmatch
from pathlib import Path

import pytest
from scenes import BRAIN, INFARCT, labels, write_mask

from monai_deepgmm import bids_app
from monai_deepgmm.results import dataset

ROOT = Path(__file__).parents[1]
QUICK = ("--method", "gmm", "--set", "max_iter=10", "-q")
pytestmark = pytest.mark.usefixtures("no_picture")


@pytest.fixture(scope="module")
def bids(tmp_path_factory, make_patient) -> Path:
    """Two participants, the second with a session; the masks lie in derivatives/."""
    root, made = tmp_path_factory.mktemp("app") / "in", tmp_path_factory.mktemp("made")
    for number, place in enumerate(("sub-01", "sub-02/ses-A")):
        files, stem = make_patient(made, "p", seed=number), place.replace("/", "_")
        for kind, name in (("LGE", "LGE"), ("T2", "T2w"), ("C0", "cine"), ("gd", "desc-lv_mask")):
            anat = root / ("derivatives/masks" if kind == "gd" else "") / place / "anat"
            anat.mkdir(parents=True, exist_ok=True)
            put = write_mask if kind == "gd" else shutil.copyfile
            put(files[kind], anat / f"{stem}_{name}.nii.gz")
    description = {"Name": "phantoms", "BIDSVersion": "1.10.0"}
    (root / "dataset_description.json").write_text(json.dumps(description))
    (root / ".bidsignore").write_text("*_LGE.nii.gz\n*_cine.nii.gz\n")  # BIDS knows no sequences of the heart
    return root


@pytest.fixture(scope="module")
def run(bids) -> Path:
    out = bids / "derivatives" / "deepgmm"
    asked = ["--probabilities", "--fields", *QUICK, "--set", "degree=1"]
    assert bids_app.main([str(bids), str(out), "participant", *asked]) == 0
    return out


def ignored(path: str, patterns: list[str]) -> bool:
    """As gitignore reads it: the last pattern that fits decides; one that begins with a slash, at the top only."""
    top, name, verdict = path.split("/")[0], path.split("/")[-1], False
    for pattern in patterns:
        plain = pattern.removeprefix("!")
        if fnmatch(top, plain[1:]) if plain.startswith("/") else fnmatch(name, plain):
            verdict = not pattern.startswith("!")
    return verdict


def test_what_is_not_ignored_is_bids(run):
    patterns = (run / ".bidsignore").read_text().splitlines()
    files = [
        str(p.relative_to(run)) for p in run.rglob("*") if p.is_file() and p.name[0] != "." and ".locks" not in p.parts
    ]
    left = {f for f in files if not ignored(f, patterns)}
    assert left == {
        *("README.md", "dataset_description.json", "dseg.tsv", "sub-01/sub-01_dseg.json"),
        *("sub-01/sub-01_dseg.nii.gz", "sub-01/sub-01_probseg.nii.gz"),
    }
    assert ignored("Phantom001/Phantom001_dseg.nii.gz", patterns)


@pytest.mark.skipif(shutil.which(bids_app.VALIDATOR) is None, reason="needs bids-validator-deno")
def test_the_validator_finds_no_error(run):
    done = subprocess.run([bids_app.VALIDATOR, "--ignoreWarnings", str(run)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize(
    ("asked", "done"),
    [
        (("--participant-label", "01"), {"sub-01"}),
        (("--participant_label", "sub-02", "01", "--n_cpus", "1"), {"sub-01", "sub-02_ses-A"}),
        (("--session-label", "ses-A"), {"sub-02_ses-A"}),
    ],
)
def test_participants_and_sessions_are_chosen(bids, tmp_path, asked, done):
    assert bids_app.main([str(bids), str(tmp_path / "out"), "participant", *asked, *QUICK]) == 0
    assert {p.name for p in (tmp_path / "out").glob("sub-*")} == done
    assert all(labels(tmp_path / "out", patient).any() for patient in done)


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        (("--participant-label", "09"), "--participant-label: there is no sub-09; there are sub-01, sub-02"),
        (("--participant-label", "01", "--session-label", "A"), "--session-label: there is no ses-A; there are none"),
        (("--protocol", "none"), "none"),
    ],
)
def test_labels_that_nobody_bears_are_refused(bids, tmp_path, capsys, asked, said):
    assert bids_app.main([str(bids), str(tmp_path / "out"), "participant", *asked, *QUICK]) == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_the_group_level_builds_tables_and_pages_again(bids, run, capsys):
    before = (run / "summary.tsv").read_bytes()
    for name in ("summary.tsv", "index.html"):
        (run / name).unlink()
    assert bids_app.main([str(bids), str(run), "group"]) == 0
    assert (run / "summary.tsv").read_bytes() == before
    assert (run / "index.html").is_file()
    assert bids_app.main([str(bids), str(run), "group", "--method", "gmm"]) == 2
    assert "group takes no option --method" in capsys.readouterr().err


def test_a_data_set_that_the_validator_refuses_is_refused(bids, tmp_path, monkeypatch, capsys):
    fake = tmp_path / bids_app.VALIDATOR
    fake.write_text("#!/bin/sh\nexit 16\n")
    fake.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    asked = [str(bids), str(tmp_path / "out"), "participant", "--participant-label", "01", *QUICK]
    assert bids_app.main(asked) == 2
    assert "is no valid BIDS data set" in capsys.readouterr().err
    assert bids_app.main([*asked, "--skip-bids-validation"]) == 0


def test_the_boutiques_descriptor_is_the_command():
    descriptor = json.loads((ROOT / "scripts" / "bids" / "boutiques.json").read_text(encoding="utf-8"))
    version = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["version"]
    assert descriptor["tool-version"] == version
    actions = {action.dest: action for action in bids_app.parser()._actions if action.dest not in ("help", "version")}
    assert {one["id"] for one in descriptor["inputs"]} == set(actions)
    for one in descriptor["inputs"]:
        action = actions[one["id"]]
        assert one.get("command-line-flag", "") == (action.option_strings or [""])[0]
        assert one.get("default-value", action.default) == action.default
        assert one.get("value-choices") == (list(action.choices) if action.choices else None)
        assert f"[{one['id'].upper()}]" in descriptor["command-line"]
    boutiques = pytest.importorskip("boutiques")
    boutiques.validate(str(ROOT / "scripts" / "bids" / "boutiques.json"))


@pytest.mark.parametrize("protocol", [INFARCT, BRAIN], ids=lambda p: p.name)
def test_itk_snap_gets_the_same_names_and_colours(protocol):
    rows = dataset.snap_labels(protocol).splitlines()
    found = [re.fullmatch(r' *(\d+) +(\d+) +(\d+) +(\d+) +([01]) +([01]) +([01]) +"(.+)"', r) for r in rows[2:]]
    assert all(found)
    assert (found[0][1], found[0][8]) == ("0", "Clear Label")
    told = [(int(f[1]), f[8], "#" + bytes(map(int, f.group(2, 3, 4))).hex()) for f in found[1:]]
    assert told == [(t.index, t.name, t.color.lower()) for t in protocol.tissues]
