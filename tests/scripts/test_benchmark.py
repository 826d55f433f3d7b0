"""The script that measures speed and memory: its table by hand, and tiny phantoms for every side; never a time."""

from __future__ import annotations

import json

import benchmark
from benchmark_rows import PHANTOMS, ROWS, TINY

#: The two that are left out take seconds even on a tiny head, and have their likes among the others.
SIDES = [(row, name) for row in ROWS if row != "patient" for name in ROWS[row] if name != "pvgmm, 3 sequences"]


def test_every_side_runs_and_says_on_what(tmp_path):
    for name, make in PHANTOMS.items():
        (tmp_path / name).mkdir()
        make(tmp_path / name, TINY)
    facts = {side: ROWS[side[0]][side[1]].load(tmp_path / ROWS[side[0]][side[1]].data)() for side in SIDES}
    assert all("×" in one["shape"] and one["came"] for one in facts.values())
    assert all(side.beside in (None, *sides) for sides in ROWS.values() for side in sides.values())


def test_a_row_is_measured_in_processes_of_its_own_and_then_taken(tmp_path, capsys, monkeypatch):
    asked = [str(tmp_path), "--tiny", "--repeats", "1", "--only", "em-diag"]
    assert benchmark.main(asked) == 0
    first = capsys.readouterr().out
    assert "1 run(s) of each" in first
    found = json.loads((tmp_path / "em-diag.json").read_text())
    assert list(found["runs"]) == list(ROWS["em-diag"])
    for (one,) in found["runs"].values():
        assert 0 < one["imports_mb"] <= one["loaded_mb"] <= one["peak_mb"]
        assert one["shape"].startswith("2×3×160×160")
    monkeypatch.setattr(benchmark.runner, "apart", None)
    assert benchmark.main(asked) == 0
    assert capsys.readouterr().out == first
