"""What the scripts share: stages that are done once, files that are kept, exit codes and tables."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import runner

from monai_deepgmm.errors import StudyError, UsageError


def stages(monkeypatch, out: Path, code: str, names: str) -> list[runner.Stage]:
    """Stages that run this code instead of deepgmm; its argument is the file that it is to make."""

    def start(stage, log):
        return subprocess.Popen([sys.executable, "-c", code, *stage.command], stdout=subprocess.DEVNULL)

    monkeypatch.setattr(runner, "start", start)
    return [runner.Stage(name, (str(out / name),), (), out / name) for name in names]


def test_stages_apart_are_done_once_and_their_cpu_time_is_kept(tmp_path, monkeypatch, capsys):
    burn = "import sys, time\nwhile time.process_time() < 0.3: pass\nopen(sys.argv[1], 'a').write('x')"
    both = stages(monkeypatch, tmp_path, burn, "ab")
    runner.run_apart(runner.Ledger(tmp_path, "data"), both, 2)
    again = runner.Ledger(tmp_path, "data")
    runner.run_apart(again, both, 2)
    assert not again.worked
    assert [(tmp_path / name).read_text() for name in "ab"] == ["x", "x"]
    assert again.record(both[0])["cpu_seconds"] >= 0.3
    assert again.elapsed > 0
    runner.run_apart(runner.Ledger(tmp_path, "other data"), both[:1], 2)
    assert (tmp_path / "a").read_text() == "xx"
    assert len(re.findall(r"^\[0 min \d\d s\] [ab]: \d+ s, \d CPU s$", capsys.readouterr().out, re.MULTILINE)) == 3


def test_an_interrupted_stage_is_ended_and_its_time_added_to_the_next_one(tmp_path, monkeypatch):
    (stage,) = stages(monkeypatch, tmp_path, "import time\nwhile True: time.process_time()", "a")
    calls = iter([None] * 4)

    def sleep(seconds, wait=runner.time.sleep):
        wait(seconds)
        if next(calls, "over") == "over":
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(runner.time, "sleep", sleep)
        with pytest.raises(KeyboardInterrupt):
            runner.run_apart(runner.Ledger(tmp_path, "data"), [stage], 1)
    first = runner.Ledger(tmp_path, "data").record(stage)
    assert first["done"] is False
    assert first["cpu_seconds"] > 0
    stages(monkeypatch, tmp_path, "import sys; open(sys.argv[1], 'w')", "a")
    runner.run_apart(runner.Ledger(tmp_path, "data"), [stage], 1)
    second = runner.Ledger(tmp_path, "data").record(stage)
    assert second["done"] is True
    assert second["cpu_seconds"] >= first["cpu_seconds"]


def test_what_is_kept_is_made_once_for_each_question(tmp_path):
    path, made = tmp_path / "deep" / "kept.json", iter(range(9))

    def ask(seed, **how):
        return runner.kept(path, {"seed": seed, "names": ("a",)}, lambda: {"value": next(made)}, **how)["value"]

    assert [ask(1), ask(1), ask(2), ask(2)] == [0, 0, 1, 1]
    with pytest.raises(UsageError, match="deep was made with other options"):
        ask(3, strict=True)
    path.write_text("no JSON")
    assert ask(2, strict=True) == 2


@pytest.mark.parametrize(
    ("error", "code", "told"),
    [
        (UsageError("no folder"), 2, "no folder"),
        (StudyError("E_GRID", "elsewhere"), 1, "E_GRID: elsewhere"),
        (runner.StageError("it failed", 3), 3, "it failed; run the same command again to go on"),
        (KeyboardInterrupt(), 130, "interrupted; run the same command again to go on"),
    ],
)
def test_how_a_script_ends(error, code, told, capsys):
    def work():
        raise error

    assert runner.ended("name", work) == code
    assert capsys.readouterr().err.startswith(f"name: {told}")


def test_cells():
    assert runner.spread([0.5, None, float("nan"), 0.7]) == "0.600 ± 0.141"
    assert (runner.spread([]), runner.shown(None), runner.shown(0.1234, 2)) == ("–", "–", "0.12")
    assert runner.clock(125.4) == "2 min 05 s"
    assert runner.table([("a", "b"), ("x", "1")]) == "| a | b |\n| --- | ---: |\n| x | 1 |"
