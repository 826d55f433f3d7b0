"""The script that measures speed and memory: its table by hand, and tiny phantoms for every side; never a time."""

from __future__ import annotations

import importlib.util
import json
import re
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest


def _script() -> ModuleType:
    path = Path(__file__).parents[2] / "scripts" / "benchmark.py"
    spec = importlib.util.spec_from_file_location("benchmark", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules["benchmark"] = module  # named tuples look their module up
    spec.loader.exec_module(module)
    return module


benchmark = _script()
SIDES = [(row, name) for row, sides in benchmark.ROWS.items() for name in sides]


def cells(text: str) -> dict[str, list[str]]:
    """What was measured → its line of the table."""
    lines = [[c.strip() for c in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("| ")]
    return {line[1]: line for line in lines[2:]}


def run(cpu_s: float, iterations: int, **more: Any) -> dict[str, Any]:
    costs = {"cpu_s": cpu_s, "wall_s": 2 * cpu_s, "peak_mb": 300, "imports_mb": 200}
    return {"shape": "2×3", "came": "x", "iterations": iterations, **costs, **more}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("phantoms")
    for name, make in benchmark.DATA.items():
        (folder / name).mkdir()
        make(folder / name, benchmark.TINY)
    return folder


@pytest.mark.parametrize(("row", "name"), SIDES)
def test_every_side_runs_and_says_on_what(data: Path, row: str, name: str) -> None:
    side = benchmark.ROWS[row][name]
    facts = side.load(data / side.data)()
    assert "×" in facts["shape"]
    assert facts["came"]
    assert side.beside is None or side.beside in benchmark.ROWS[row]


def test_both_mixtures_find_the_same_from_the_same_slices(data: Path) -> None:
    came = [side.load(data / side.data)()["came"] for side in benchmark.ROWS["em-diag"].values()]
    mine, theirs = (float(re.search(r"NLL ([\d.]+)", one)[1]) for one in came)
    assert mine == pytest.approx(theirs, abs=0.05)  # per voxel


def test_a_ratio_shows_both_sides_and_their_iterations() -> None:
    names = list(benchmark.ROWS["em-diag"])
    runs = {names[0]: [run(1.0, 100), run(3.0, 100), run(2.0, 100)], names[1]: [run(4.0, 400)] * 3}
    line = cells(benchmark.table([{"asked": {"row": "em-diag"}, "runs": runs}]))[names[0]]
    assert line[:7] == ["em-diag", names[0], "2×3", "2.00 (1.00-3.00)", "4.00 (2.00-6.00)", "300", "200"]
    assert line[8] == f"2.00 / 4.00 = 0.50 × {names[1]}; divided by iterations 20.00 / 10.00 ms = 2.00"


def test_seconds_are_those_of_a_patient() -> None:
    runs = {"segment, hearts": [run(6.0, 0, patients=3)]}
    line = cells(benchmark.table([{"asked": {"row": "anatomy"}, "runs": runs}]))["segment, hearts"]
    assert line[3:5] == ["2.00", "4.00"]


def test_a_row_is_measured_in_processes_of_its_own_and_then_taken(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = [str(tmp_path), "--tiny", "--repeats", "1", "--only", "em-diag"]
    assert benchmark.main(asked) == 0
    first = capsys.readouterr().out
    assert first.startswith(benchmark.machine())
    assert "1 run(s) of each" in first
    found = json.loads((tmp_path / "em-diag.json").read_text())
    assert list(found["runs"]) == list(benchmark.ROWS["em-diag"])
    for (one,) in found["runs"].values():
        assert 0 < one["imports_mb"] <= one["loaded_mb"] <= one["peak_mb"]
        assert one["shape"].startswith("2×3×160×160")
    monkeypatch.setattr(benchmark, "apart", None)
    assert benchmark.main(asked) == 0
    assert capsys.readouterr().out == first


def test_what_cannot_be_measured_is_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: object) -> str:
        raise benchmark.MeasurementError("no room")

    monkeypatch.setattr(benchmark, "apart", fails)
    assert benchmark.main([str(tmp_path), "--only", "network"]) == 2
    assert "left out: network: no room" in capsys.readouterr().err
    assert not (tmp_path / "network.json").exists()
