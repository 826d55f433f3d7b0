"""Decisions: the latest counts, pages show them, and what is marked with redo is done again, and nothing else."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from outcomes import row
from pages import FINGERPRINT, hearts, row_of, write

from monai_deepgmm.cli import main
from monai_deepgmm.errors import UsageError
from monai_deepgmm.results import review

HEAD = "patient\tdecision\tnote\treviewer\tdate\tresult\n"


def file_of(folder: Path, *lines: str, name: str = "r.tsv", head: str = HEAD) -> Path:
    path = folder / name
    path.write_text(head + "".join(f"{line}\n" for line in lines), encoding="utf-8")
    return path


def test_the_latest_decision_counts_and_the_table_reads_back(tmp_path):
    first = file_of(tmp_path, "b\tredo\told\tXY\t2026-01-01\t1", "a\taccept\t\t\t\t")
    second = file_of(tmp_path, 'b\taccept\tbetter, "now"\tXY\t2026-01-02\t1', name="s.tsv")
    found = review.read([second, first])
    assert [(r.patient, r.decision, r.note) for r in found.values()] == [
        ("a", "accept", ""),
        ("b", "accept", 'better, "now"'),
    ]
    again = tmp_path / "again.tsv"
    again.write_bytes(review.table(found))
    assert review.read([again]) == found


@pytest.mark.parametrize(
    ("head", "line", "told"),
    [(HEAD, "a\tmaybe", "line 2: 'maybe' is none of accept, redo, reject"), ("patient\n", "a", "lacks the columns")],
)
def test_a_file_that_is_no_review_is_refused(tmp_path, head, line, told):
    with pytest.raises(UsageError, match=told):
        review.read([file_of(tmp_path, line, head=head)])
    with pytest.raises(UsageError, match="cannot be read"):
        review.read([tmp_path / "nowhere.tsv"])


def test_report_shows_and_keeps_a_review(tmp_path, capsys):
    out = tmp_path / "out"
    for name in ("p", "q"):
        write(out, row_of(hearts(name)), hearts(name))
    lines = (f"p\treject\t<b>apex</b>\tAB\t2026-02-03T10:00\t{FINGERPRINT[:16]}", "q\tredo\t\t\t\tolder")
    assert main(["report", str(out), "--review", str(file_of(tmp_path, *lines))]) == 0
    pages = {name: (out / name / f"{name}_report.html").read_text(encoding="utf-8") for name in ("p", "q")}
    assert "reject by AB, 2026-02-03: &lt;b&gt;apex&lt;/b&gt;" in re.sub("<[^>]+>", "", pages["p"])
    assert "of an earlier result" not in re.sub("<script>.*", "", pages["p"], flags=re.DOTALL)
    assert "(of an earlier result)" in re.sub("<script>.*", "", pages["q"], flags=re.DOTALL)
    assert main(["report", str(out)]) == 0  # kept in OUT/review.tsv
    assert (out / "p" / "p_report.html").read_text(encoding="utf-8") == pages["p"]
    assert "&lt;b&gt;apex" in (out / "index.html").read_text(encoding="utf-8")
    assert main(["report", str(out), "--review", str(tmp_path / "none.tsv")]) == 2
    assert "cannot be read" in capsys.readouterr().err


@pytest.mark.usefixtures("no_picture")
def test_redo_does_again_what_is_marked_and_nothing_else(tmp_path, cohort_dir, capsys):
    out = tmp_path / "out"
    segment = ["segment", str(cohort_dir), str(out), "-q"]
    assert main([*segment, "--patients", "pat1", "pat2"]) == 0
    files = {p: (out / p / f"{p}_dseg.nii.gz").stat().st_mtime_ns for p in ("pat1", "pat2")}
    assert main([*segment, "--redo", str(file_of(tmp_path, "pat1\tredo", "pat2\taccept")), "--seed", "3"]) == 0
    assert (out / "pat1" / "pat1_dseg.nii.gz").stat().st_mtime_ns > files["pat1"]
    assert (out / "pat2" / "pat2_dseg.nii.gz").stat().st_mtime_ns == files["pat2"]
    assert not (out / "pat3").exists()
    assert row(out, "pat1")["fingerprint"] != row(out, "pat2")["fingerprint"]
    for lines, told in ((["pat1\taccept"], "marks no patient"), (["gone\tredo"], "gone")):
        assert main([*segment, "--redo", str(file_of(tmp_path, *lines))]) == 2
        assert told in capsys.readouterr().err
    narrowed = ["--patients", "pat2", "--redo", str(file_of(tmp_path, "pat1\tredo"))]
    assert main([*segment, *narrowed]) == 2
