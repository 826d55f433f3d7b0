"""What pages cost: each patient's line, and the index's."""

from __future__ import annotations

import measure_pages


def test_a_page_and_an_index_of_many(make_patient, tmp_path, capsys):
    make_patient(tmp_path / "in", "pat1")
    words = [str(tmp_path / "in"), str(tmp_path / "out"), "--index", "3", "--repeats", "1"]
    assert measure_pages.main(words) == 0
    told = capsys.readouterr().out
    cells = next(line for line in told.splitlines() if line.startswith("| pat1")).strip("| ").split(" | ")
    assert float(cells[1]) >= float(cells[2]) > 0
    assert float(cells[4]) * 1000 > (tmp_path / "out/pat1/pat1_viewer.json").stat().st_size
    assert "index of 3: " in told
