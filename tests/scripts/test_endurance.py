"""The endurance test in its short version: nothing is wrong, and what would be wrong is told."""

from __future__ import annotations

import json
import os
import sys
import time

import endurance
import endurance_run
import pytest
from endurance_run import Outcome, attempt

from monai_deepgmm import cli

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="needs /proc and namespaces")


@pytest.mark.usefixtures("no_picture")
def test_the_short_version_finds_nothing_wrong_and_keeps_its_rows(tmp_path, capsys):
    short = [name for name, (_, few, _) in endurance.PARTS.items() if few]
    assert endurance.main([str(tmp_path), "--short"]) == cli.OK, capsys.readouterr().out
    table = capsys.readouterr().out
    for name in short:
        facts = json.loads((tmp_path / f"{name}.json").read_text())
        assert (facts["cases"], facts["wrong"]) == (endurance.PARTS[name][1], [])
        assert f"| {name} | " in table


@pytest.mark.parametrize(
    ("work", "told"),
    [
        (lambda words: time.sleep(60), "took too long"),
        (lambda words: os.kill(os.getpid(), 9), "took too long"),
        (lambda words: 1 / 0, "Traceback: ZeroDivisionError"),
        (lambda words: 70, "exit code 70: "),
        (lambda words: print("pat1\tfailed\tE_INTERNAL: oh"), "E_INTERNAL: pat1"),
        (lambda words: 2, ""),
    ],
)
def test_what_is_wrong_is_told(monkeypatch, work, told):
    monkeypatch.setattr(endurance_run.cli, "main", lambda words: work(words) or 0)
    outcome = attempt("scan", limit_s=1.0)
    assert outcome.wrong().startswith(told)
    assert bool(outcome.wrong()) == bool(told)


def test_memory_above_the_imports_is_that_of_the_command(monkeypatch):
    monkeypatch.setattr(endurance_run.cli, "main", lambda words: time.sleep(0.2 * len(b"x" * 100_000_000) / 1e8) or 0)
    assert 90 < attempt("scan").above_mb < 200


def test_results_that_differ_are_told_and_seconds_do_not_count(tmp_path):
    for name, seconds in (("first", 1.5), ("out", 2.25)):
        place = tmp_path / name / "pat0"
        place.mkdir(parents=True)
        (place / "pat0_row.json").write_text(f'{{"seconds": {seconds}}}')
        (place / "pat0_dseg.nii.gz").write_bytes(b"labels")
    expected = endurance_run.results(tmp_path / "first")
    assert endurance.differing(tmp_path / "out", expected) == ""
    (tmp_path / "out" / "pat0" / "pat0_dseg.nii.gz").write_bytes(b"others")
    (tmp_path / "out" / "pat0" / "half.nii.gz").write_bytes(b"")
    told = endurance.differing(tmp_path / "out", expected)
    assert told == "differs: pat0/half.nii.gz, pat0/pat0_dseg.nii.gz"
    assert Outcome(0, told, 0.0).wrong() == "differs: : " + told
