"""Manners of the command: options in a file, what may have been meant, and what is never written over."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest
import torch
import yaml
from outcomes import sidecar

from monai_deepgmm import cli
from monai_deepgmm.cli import main


def run(*arguments: object) -> int:
    try:
        return main([*map(str, arguments)])
    except SystemExit as stopped:  # argparse's own
        return int(stopped.code or 0)


@pytest.fixture(scope="module")
def cohort(tmp_path_factory, make_patient) -> Path:
    folder = tmp_path_factory.mktemp("manners") / "in"
    for number in (1, 2):
        make_patient(folder, f"pat{number}", seed=number)
    return folder


@pytest.mark.usefixtures("no_picture")
def test_options_in_a_file_are_as_if_typed_and_what_is_typed_counts(cohort, tmp_path, capsys):
    file, kept = tmp_path / "own.yaml", tmp_path / "kept.yaml"
    file.write_text(
        "method: gmm\nset: {covariance: diag, n4: false, tol: 1e-3}\npatients: [pat1]\nmax_voxels: 100000\nseed: 3"
    )
    assert run("segment", "--config", file, cohort, tmp_path / "out", "--seed", 5, "--save-config", kept) == cli.OK
    told = sidecar(tmp_path / "out", "pat1")["configuration"]
    assert (told["method"], told["settings"]["covariance"], told["settings"]["tol"]) == ("gmm", "diag", 1e-3)
    assert told["seed"] == 5
    assert not (tmp_path / "out" / "pat2").exists()
    assert yaml.safe_load(kept.read_text()) == {
        "method": "gmm",
        "patients": ["pat1"],
        "max-voxels": 100000,
        "seed": 5,
        "set": ["covariance=diag", "n4=false", "tol=0.001"],
    }
    assert run("segment", cohort, tmp_path / "again", "--config", kept, "--dry-run") == cli.OK
    assert capsys.readouterr().out == "pat1\tready\t\n"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("methd: gmm", "line 1: methd: no such key (did you mean method?)"),
        ("seed: 1\nseed: 2", "line 2: 'seed' stands there twice"),
        ("seed: [1]", "line 1: seed: got [1], expected a word or a number"),
        ("overwrite: maybe", "overwrite: got 'maybe', expected true or false"),
        ("set: {max_itr: 5}", "did you mean max_iter?"),
        ("jobs: 0", "argument --jobs: '0' is not a whole number of at least 1"),
        ("mask: nonzeros", "mask: got 'nonzeros' (did you mean nonzero?)"),
        ("- a", "expected keys with values"),
        ("config: other.yaml", "config: no such key"),
    ],
)
def test_a_file_of_options_that_is_wrong_is_refused(cohort, tmp_path, capsys, text, said):
    (tmp_path / "own.yaml").write_text(text)
    assert run("segment", cohort, tmp_path / "out", "--config", tmp_path / "own.yaml") == cli.USAGE
    assert said in capsys.readouterr().err
    assert run("scan", cohort, "--config", tmp_path / "gone.yaml") == cli.USAGE
    assert "there is no file" in capsys.readouterr().err
    assert run("scan", cohort, "--save-config", tmp_path / "gone" / "own.yaml") == cli.USAGE
    assert "--save-config" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["segmnt", "{in}", "{out}"], "did you mean segment?"),
        (["segment", "{in}", "{out}", "--overwite"], "unrecognized arguments: --overwite (did you mean --overwrite?)"),
        (["evaluate", "{out}", "{in}", "--unit", "slices"], "did you mean slice?"),
        (["segment", "{in}", "{out}", "--protocol", "infract"], "no protocol 'infract' (did you mean infarct?)"),
        (["segment", "{in}", "{out}", "--layout", "nnunt"], "did you mean nnunet?"),
        (["segment", "--patients", "pat1", "{in}", "{out}"], "--patients takes every word after it: put DIR OUT first"),
        (["scan", "--mask-labels", "1", "--set", "a=1", "{in}"], "put DIR first"),
        (["--fast", "scan", "{in}"], "unrecognized arguments: --fast"),
        ([], "required: COMMAND"),
    ],
)
def test_what_may_have_been_meant_is_said(cohort, tmp_path, capsys, words, said):
    filled = [word.replace("{in}", str(cohort)).replace("{out}", str(tmp_path / "out")) for word in words]
    assert run(*filled) == cli.USAGE
    assert said in capsys.readouterr().err


@pytest.mark.parametrize(
    ("column", "said"),
    [("patint", "patient"), ("maks", "(did you mean mask?); rename"), ("trut", "(did you mean truth?)"), ("age", "")],
)
def test_a_misspelt_column_is_refused_with_the_nearest_name(cohort, tmp_path, capsys, column, said):
    table = tmp_path / "own.csv"
    patient = "patient" if column != "patint" else column
    table.write_text(f"{patient},LGE,mask{'' if column == 'patint' else ',' + column}\np,{cohort}/pat1_LGE.nii.gz,,1\n")
    assert run("scan", cohort, "--manifest", table, "--mask", "nonzero") == (cli.USAGE if said else cli.OK)
    assert said in capsys.readouterr().err


def test_a_manifest_to_fill_in_can_be_used_and_is_never_written_over(cohort, tmp_path, capsys):
    table = tmp_path / "own.csv"
    assert run("init-manifest", cohort, "-o", table) == cli.OK
    said = capsys.readouterr().out
    assert "2 patients in" in said
    rows = list(csv.reader(table.open()))
    assert rows[0] == ["patient", "LGE", "T2", "bSSFP", "mask", "truth", "labels"]
    assert {row[6] for row in rows[1:]} == {"blood=500 myocardium=200 edema=1220 scar=2221"}
    assert [row[0] for row in rows[1:]] == ["pat1", "pat2"]
    more = said.split(" then add ")[1].split()
    assert run("scan", cohort, *more) == cli.OK
    capsys.readouterr()
    assert run("init-manifest", cohort, "-o", table) == cli.USAGE
    assert "nothing is written over" in capsys.readouterr().err
    (tmp_path / "odd" / "somebody").mkdir(parents=True)
    assert run("init-manifest", tmp_path / "odd") == cli.OK
    assert capsys.readouterr().out == "patient,LGE,T2,bSSFP,mask,truth\nsomebody,,,,,\n"


def test_phantoms_are_all_there_or_none_and_nothing_is_written_over(tmp_path, capsys, monkeypatch):
    assert run("phantom", tmp_path / "made", "-n", 1) == cli.OK
    before = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*")}
    assert run("phantom", tmp_path / "made", "-n", 2) == cli.USAGE
    assert "is not empty, and nothing is written over" in capsys.readouterr().err
    monkeypatch.setattr("monai_deepgmm.phantom.heart.make_patient", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    assert run("phantom", tmp_path / "other", "-n", 1) == cli.INTERRUPTED
    assert {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*")} == before


@pytest.mark.parametrize(("there", "said"), [(False, "--device auto: cpu"), (True, "--device cuda: cannot be used")])
def test_the_device_auto_is_the_gpu_where_there_is_one(cohort, tmp_path, capsys, monkeypatch, there, said):
    if there and torch.cuda.is_available():
        said = "--device auto: cuda"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: there)
    code = run("segment", cohort, tmp_path / "out", "--dry-run", "--device", "auto", "-v")
    err = capsys.readouterr().err
    assert code == (cli.OK if "auto" in said else cli.USAGE)
    assert said in err
    assert ('configuration: {"protocol": "infarct"' in err) == (code == cli.OK)
