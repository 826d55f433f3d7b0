"""The script that reproduces the paper's tables: whom it tests on, what it counts, and that it goes on where it was."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
import reproduce_paper as script
from PIL import Image


def original(n: int) -> str:
    return f"myops_training_{n}"


@pytest.mark.parametrize("name", [original, lambda n: f"Case{n + 2900}"], ids=["original", "renamed"])
def test_the_papers_split_is_known_by_either_name(name):
    who = script.split([name(n) for n in range(101, 126)])
    assert who.test == tuple(name(n) for n in (109, 114, 117, 120, 122))
    assert len(who.train) == 20
    assert not set(who.train) & set(who.test)
    assert who.remark == "the paper's split"
    some = script.split([name(n) for n in range(101, 126) if n not in (103, 114)])
    assert "**not the paper's 25 patients** (absent: 103, 114)" in some.remark


DICE = {
    ("p1", 0): {"blood": (0.9, 0.9), "myocardium": (0.7, 0.7), "edema": (0.0, 0.4), "scar": (0.1, 0.5)},
    ("p2", 3): dict.fromkeys(("blood", "myocardium", "edema", "scar"), (0.5, 0.5)),
}


def finished(folder: Path, patients: dict[str, tuple[float, int]], shape: str = "diag") -> None:
    """The files of a run that the tables are made from: patient → (seconds, slices)."""
    for patient, (_, slices) in patients.items():
        (folder / patient).mkdir(parents=True)
        asked = {"settings": {"covariance": shape}, "model": None}
        sidecar = {"configuration": asked, "fit": {"units": [{"slice": i} for i in range(slices)]}}
        (folder / patient / f"{patient}_dseg.json").write_text(json.dumps(sidecar))
    rows = "".join(f"{p}\tok\t{seconds}\n" for p, (seconds, _) in patients.items())
    (folder / "summary.tsv").write_text("patient\tstatus\tseconds\n" + rows)
    lines = [f"{p}\t{i}\t{t}\t{a}\t{b}\n" for (p, i), row in DICE.items() for t, (a, b) in row.items()]
    (folder / "evaluation.tsv").write_text("patient\tslice\ttissue\tdice\tdice_matched\n" + "".join(lines))


def test_a_row_is_over_slices_and_judged_by_what_the_paper_reports(tmp_path):
    finished(tmp_path / "runs" / "r", {"p1": (3.0, 2), "p2": (1.0, 2)})
    matched = script.row(tmp_path, "table1", script.Line("SVGMM", ("r",)), ("p1", "p2"), {})
    assert matched["dice_matched"]["mean"][0] == pytest.approx(0.5625)
    assert matched["dice"]["blood"] == pytest.approx([0.7, np.sqrt(0.08)], abs=1e-4)
    assert matched["dice"]["mean"] == pytest.approx([0.4625, np.sqrt(0.075**2 / 2)], abs=1e-4)
    assert matched["within"] is True  # .5625 against .55
    named = script.row(tmp_path, "table2", script.Line("SVGMMμ", ("r",), "dice"), ("p1", "p2"), {})
    assert named["within"] is False  # .4625 against .58
    assert (matched["variant"], matched["n_slices"], matched["n_patients"]) == ("diagonal Σ", 2, 2)
    assert matched["seconds_per_slice"] == 1.0
    some = script.row(tmp_path, "table1", script.Line("SVGMM", ("r",)), ("p1",), {})
    assert (some["n_slices"], some["seconds_per_slice"], some["dice"]["mean"][1]) == (1, 1.5, 0)


def test_lines_mark_the_judged_figures_and_list_the_seeds(tmp_path):
    for seed in (0, 1):
        finished(tmp_path / "runs" / f"cohort_seed{seed}", {"p1": (1.0, 1), "p2": (1.0, 1)}, "tied")
    line = script.Line("deepSVG", ("cohort_seed0", "cohort_seed1"))
    trained = {f"cohort_seed{seed}": {"cpu_seconds": 60.0 + seed} for seed in (0, 1)}
    judged, other = script.our_lines(script.row(tmp_path, "table2", line, ("p1", "p2"), trained))
    assert judged[1] == "▸ shared Σ, oracle-matched"
    assert judged[6:] == (".56 ± .09", ".562 .562", "2", "1.00", "60 61", "yes")
    assert other[6:] == (".46 ± .05", ".463 .463", "2", "", "", "")


@pytest.mark.slow
def test_both_tables_from_patients_in_original_naming(make_patient, no_picture, tmp_path, capsys):
    for n in (101, 102, 109):
        for kind, path in make_patient(tmp_path / "all", original(n), seed=n).items():
            folder = tmp_path / "in" / ("train25_myops_gd" if kind == "gd" else "train25")
            folder.mkdir(parents=True, exist_ok=True)
            path.rename(folder / path.name.replace("_LGE", "_DE"))
    arguments = [str(tmp_path / "in"), str(tmp_path / "out"), "--quick", "--seeds", "0", "--jobs", "1"]
    assert script.main(arguments) == 0
    out = tmp_path / "out"
    found = json.loads((out / "tables.json").read_text())
    assert found["patients"]["train"] == [original(101), original(102)]
    assert found["patients"]["test"] == [original(109)]
    methods = [row["method"] for row in found["table2"]]
    assert methods == ["SVGMM", "SVGMM", "deepSVG", "SVGMMμ", "SVGMMμ", "deepSVGμ"]
    assert {row["n_slices"] for row in found["table1"]} == {6}
    assert {row["n_slices"] for row in found["table2"]} == {2}
    trained = [row["training"] for row in found["table2"] if row["training"]]
    assert [one[0]["cpu_seconds"] > 0 for one in trained] == [True, True]
    assert json.loads((out / "means.json").read_text())["n_slices"] == 4  # of the training patients only

    # The figures are those of deepgmm evaluate, and the test patient's alone in Table 2.
    evaluated = json.loads((out / "runs" / "svgmm_diag" / "evaluation.json").read_text())
    svgmm = next(r for r in found["table1"] if r["runs"] == ["svgmm_diag"])
    expected = [evaluated["dice_matched"]["mean"], evaluated["dice_matched"]["mean_sd"]]
    assert svgmm["dice_matched"]["mean"] == pytest.approx(expected, abs=1e-4)
    alone = evaluated["patients"][original(109)]["dice"]
    assert found["table2"][0]["dice"]["scar"][0] == pytest.approx(alone["scar"], abs=1e-4)
    assert found["table2"][0]["variant"] == "diagonal Σ"

    page = (out / "tables.md").read_text()
    assert "these figures mean nothing" in page
    assert str(tmp_path) not in page
    assert re.findall(r"\]\((.+?)\)", page) == found["panels"] == ["figure2.png", "figure3.png"]
    for name in found["panels"]:
        with Image.open(out / name) as picture:
            assert len(set(picture.resize((60, 40)).convert("RGB").getdata())) > 50

    capsys.readouterr()
    kept = [out / "runs" / "deepsvg" / "summary.tsv", out / "models" / "cohort_mu_seed0" / "models" / "model.pt"]
    before = [path.stat().st_mtime_ns for path in kept]
    assert script.main([*arguments[:-1], "2"]) == 0  # how many jobs there are is no reason to do anything again
    assert len(capsys.readouterr().out.splitlines()) == 2  # who, and where to look
    assert before == [path.stat().st_mtime_ns for path in kept]
    again = json.loads((out / "tables.json").read_text())
    assert again["settings"].pop("jobs") != found["settings"].pop("jobs")
    assert again == found
