"""The script that reproduces the paper's tables: whom it tests on, what it counts, and that it goes on where it was."""

from __future__ import annotations

import importlib.util
import json
import re
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from PIL import Image


@pytest.fixture(scope="module")
def script() -> ModuleType:
    path = Path(__file__).parents[2] / "scripts" / "reproduce_paper.py"
    spec = importlib.util.spec_from_file_location("reproduce_paper", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules["reproduce_paper"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def original(n: int) -> str:
    return f"myops_training_{n}"


def renamed(n: int) -> str:
    return f"Case{n + 2900}"


@pytest.mark.parametrize("name", [original, renamed])
def test_the_papers_split_is_known_by_either_name(script, name):
    who = script.split([name(n) for n in range(101, 126)])
    assert who.test == tuple(name(n) for n in (109, 114, 117, 120, 122))
    assert len(who.train) == 20
    assert not set(who.train) & set(who.test)
    assert who.remark == "the paper's split"


def test_an_incomplete_copy_is_said_to_be_one(script):
    who = script.split([original(n) for n in range(101, 126) if n not in (103, 114)])
    assert who.test == tuple(original(n) for n in (109, 117, 120, 122))
    assert "not the paper's" in who.remark
    assert "absent: 103, 114)" in who.remark


@pytest.mark.parametrize(("n", "tested"), [(2, 1), (5, 1), (12, 2)])
def test_other_patients_are_tested_on_the_last_fifth(script, n, tested):
    names = [f"Phantom{i:03d}" for i in range(1, n + 1)]
    who = script.split(names)
    assert who.test == tuple(names[-tested:])
    assert who.train == tuple(names[:-tested])
    assert "published figures are of other data" in who.remark


def test_one_patient_is_too_few(script):
    with pytest.raises(script.UsageError, match="at least 2"):
        script.split(["a"])


def test_published_means_agree_with_their_tissues(script):
    for table in script.PUBLISHED.values():
        for figures in table.values():
            assert len(figures) == len(script.COLUMNS)
            assert np.mean([mean for mean, _ in figures[:4]]) == pytest.approx(figures[4][0], abs=0.0051)


@pytest.mark.parametrize(
    ("ours", "published", "verdict"),
    [(0.52, 0.55, True), (0.5199, 0.55, False), (0.60, 0.63, True), (0.9, 0.5, True), (0.49, 0.53, False)],
)
def test_within_the_margin(script, ours, published, verdict):
    assert script.reproduced(ours, published) is verdict


def test_moments_are_over_slices_and_the_mean_is_of_each_slice(script):
    found = [
        script.Score("a", 0, (1.0, 0.5, 0.0, 0.5), (1.0, 0.5, 0.25, 0.5)),
        script.Score("a", 1, (0.8, 0.7, 0.2, 0.7), (0.8, 0.7, 0.2, 0.7)),
    ]
    named = script.moments(found, "dice")
    assert named["blood"] == pytest.approx((0.9, np.sqrt(0.02)))
    assert named["mean"] == pytest.approx((0.55, np.sqrt(0.005)))
    seeds = script.over_seeds([found, found[:1]], "dice")
    assert seeds["mean"] == [0.525, round(np.sqrt(0.005) / 2, 4)]  # one slice alone spreads by 0


TSV = """patient\tslice\ttissue\tdice\tdice_matched
p1\t0\tblood\t0.9\t0.9
p1\t0\tmyocardium\t0.7\t0.7
p1\t0\tedema\t0\t0.4
p1\t0\tscar\t0.1\t0.5
p2\t3\tblood\t0.5\t0.5
p2\t3\tmyocardium\t0.5\t0.5
p2\t3\tedema\t0.5\t0.5
p2\t3\tscar\t0.5\t0.5
"""


def finished_run(folder: Path, patients: dict[str, tuple[float, int]], shape: str = "diag") -> None:
    """The files of a run that the tables are made from: patient → (seconds, slices)."""
    for patient, (_, slices) in patients.items():
        (folder / patient).mkdir(parents=True)
        sidecar = {"mixture": {"covariance": shape}, "fit": {"units": [{"slice": i} for i in range(slices)]}}
        (folder / patient / f"{patient}_dseg.json").write_text(json.dumps(sidecar))
    rows = "".join(f"{p}\tok\t{seconds}\n" for p, (seconds, _) in patients.items())
    (folder / "summary.tsv").write_text("patient\tstatus\tseconds\n" + rows)
    (folder / "evaluation.tsv").write_text(TSV)


def test_a_row_is_judged_by_what_the_paper_reports(script, tmp_path):
    finished_run(tmp_path / "runs" / "r", {"p1": (3.0, 2), "p2": (1.0, 2)})
    matched = script.row(tmp_path, "table1", script.Line("SVGMM", ("r",)), ("p1", "p2"), {})
    assert matched["dice_matched"]["mean"][0] == pytest.approx(0.5625)
    assert matched["dice"]["mean"][0] == pytest.approx(0.4625)
    assert matched["within"] is True  # .5625 against .55
    named = script.row(tmp_path, "table2", script.Line("SVGMMμ", ("r",), "dice"), ("p1", "p2"), {})
    assert named["within"] is False  # .4625 against .58
    assert (matched["variant"], matched["n_slices"], matched["n_patients"]) == ("diagonal Σ", 2, 2)
    assert matched["seconds_per_slice"] == 1.0
    some = script.row(tmp_path, "table1", script.Line("SVGMM", ("r",)), ("p1",), {})
    assert (some["n_slices"], some["seconds_per_slice"]) == (1, 1.5)


def test_rows_that_are_not_there_yet_are_empty(script, tmp_path):
    line = script.Line("deepSVGμ", ("cohort_mu_seed0", "cohort_mu_seed1"), "dice")
    ours = script.row(tmp_path, "table2", line, ("p1",), {})
    assert (ours["n_slices"], ours["dice"], ours["within"]) == (0, None, None)
    lines = script.table_lines([ours], 19)
    assert lines[2].startswith("| **deepSVGμ** | published | .86 ± .04 |")
    assert [line.count("–") for line in lines[3:]] == [5, 6]


def test_lines_mark_the_judged_figures_and_list_the_seeds(script, tmp_path):
    for seed in (0, 1):
        finished_run(tmp_path / "runs" / f"cohort_seed{seed}", {"p1": (1.0, 1), "p2": (1.0, 1)}, "tied")
    line = script.Line("deepSVG", ("cohort_seed0", "cohort_seed1"))
    trained = {f"cohort_seed{seed}": {"cpu_seconds": 60.0 + seed} for seed in (0, 1)}
    judged, other = script.our_lines(script.row(tmp_path, "table2", line, ("p1", "p2"), trained))
    assert judged[1] == "▸ shared Σ, re-ordered with the truth"
    assert judged[6:] == (".56 ± .09", ".562 .562", "2", "1.00", "60 61", "yes")
    assert other[6:] == (".46 ± .05", ".463 .463", "2", "", "", "")


def test_the_median_slice(script):
    found = [script.Score("p", i, (d,) * 4, (1 - d,) * 4) for i, d in enumerate((0.3, 0.9, 0.6, 0.1))]
    assert script.median_slice(found, "dice").slice == 0
    assert script.median_slice(found[:3], "dice_matched").slice == 2


def test_reordered_labels_take_the_names_that_suit_the_truth(script):
    true = np.repeat([[0, 1, 2, 3, 4]], 6, axis=0)
    shuffled = np.array([0, 3, 1, 4, 2])[true]
    assert np.array_equal(script.reordered(shuffled, true, [1, 2, 3, 4]), true)


# Stages --------------------------------------------------------------------------------------------------------------


def python(script, monkeypatch, code: str) -> None:
    """Lets ``start`` run this code instead of deepgmm; its argument is the stage's first."""

    def start(stage, log):
        with log.open("ab") as file:
            return script.subprocess.Popen([sys.executable, "-c", code, *stage.command], stdout=file)

    monkeypatch.setattr(script, "start", start)


def stages(script, out: Path, names: str) -> list:
    (out / "logs").mkdir()
    return [script.Stage(name, (str(out / name),), (), out / name) for name in names]


def test_stages_apart_are_done_once_and_their_cpu_time_is_kept(script, tmp_path, monkeypatch, capsys):
    burn = "import sys, time\nwhile time.process_time() < 0.3: pass\nopen(sys.argv[1], 'a').write('x')"
    python(script, monkeypatch, burn)
    both = stages(script, tmp_path, "ab")
    script.run_apart(script.Ledger(tmp_path, "data"), both, 2)
    again = script.Ledger(tmp_path, "data")
    script.run_apart(again, both, 2)
    assert not again.worked
    assert [(tmp_path / name).read_text() for name in "ab"] == ["x", "x"]
    assert again.record(both[0])["cpu_seconds"] >= 0.3
    assert again.elapsed > 0
    other_data = script.Ledger(tmp_path, "other")
    script.run_apart(other_data, both[:1], 2)
    assert (tmp_path / "a").read_text() == "xx"
    assert len(re.findall(r"^\[0 min \d\d s\] [ab]: \d s, \d CPU s$", capsys.readouterr().out, re.MULTILINE)) == 3


def test_an_interrupted_stage_is_ended_and_its_time_added_to_the_next_one(script, tmp_path, monkeypatch):
    sleepless = "import time\nwhile True: time.process_time()"
    python(script, monkeypatch, sleepless)
    (stage,) = stages(script, tmp_path, "a")
    calls = iter([None] * 4)

    def sleep(seconds, wait=script.time.sleep):
        wait(seconds)
        if next(calls, "over") == "over":
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(script.time, "sleep", sleep)
        with pytest.raises(KeyboardInterrupt):
            script.run_apart(script.Ledger(tmp_path, "data"), [stage], 1)
    first = script.Ledger(tmp_path, "data").record(stage)
    assert first["done"] is False
    assert first["cpu_seconds"] > 0
    python(script, monkeypatch, "import sys; open(sys.argv[1], 'w')")
    script.run_apart(script.Ledger(tmp_path, "data"), [stage], 1)
    second = script.Ledger(tmp_path, "data").record(stage)
    assert second["done"] is True
    assert second["cpu_seconds"] >= first["cpu_seconds"]


def test_a_failed_stage_is_said_after_the_others_are_done(script, tmp_path, monkeypatch):
    python(script, monkeypatch, "import sys; sys.argv[1].endswith('a') and sys.exit(3); open(sys.argv[1], 'w')")
    both = stages(script, tmp_path, "ab")
    ledger = script.Ledger(tmp_path, "data")
    with pytest.raises(script.StageError, match=r"1 of the trainings failed \(exit code 3\)"):
        script.run_apart(ledger, both, 1)
    assert [ledger.done(stage) for stage in both] == [False, True]


def test_a_folder_without_patients_is_refused(script, tmp_path, capsys):
    (tmp_path / "in").mkdir()
    assert script.main([str(tmp_path / "in"), str(tmp_path / "out")]) == 2
    assert "no patient found" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


# The whole -----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_both_tables_from_patients_in_original_naming(script, make_patient, no_picture, tmp_path, capsys):
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
    assert [row["method"] for row in found["table1"]] == ["GMM", "GMM", "deepG", "SVGMM", "SVGMM", "deepSVG"]
    methods2 = ["SVGMM", "SVGMM", "deepSVG", "SVGMMμ", "SVGMMμ", "deepSVGμ"]
    assert [row["method"] for row in found["table2"]] == methods2
    assert {row["n_slices"] for row in found["table1"]} == {6}
    assert {row["n_slices"] for row in found["table2"]} == {2}
    assert [row["judged"] for row in found["table2"]] == ["dice_matched"] * 3 + ["dice"] * 3
    assert [bool(row["training"]) for row in found["table2"]] == [False, False, True, False, False, True]
    assert all(row["training"][0]["cpu_seconds"] > 0 for row in found["table2"] if row["training"])
    assert json.loads((out / "means.json").read_text())["n_slices"] == 4  # of the training patients only

    # The figures are those of deepgmm evaluate, and the test patient's alone in Table 2.
    evaluated = json.loads((out / "runs" / "svgmm_diag" / "evaluation.json").read_text())
    svgmm = next(r for r in found["table1"] if r["runs"] == ["svgmm_diag"])
    assert svgmm["dice_matched"]["mean"] == pytest.approx(
        [evaluated["dice_matched"]["mean"], evaluated["dice_matched"]["mean_sd"]], abs=1e-4
    )
    alone = evaluated["patients"][original(109)]["dice"]
    assert found["table2"][0]["dice"]["scar"][0] == pytest.approx(alone["scar"], abs=1e-4)
    assert found["table2"][0]["variant"] == "diagonal Σ"

    page = (out / "tables.md").read_text()
    assert "these figures mean nothing" in page
    assert str(tmp_path) not in page
    assert re.findall(r"\]\((.+?)\)", page) == found["panels"] == ["figure2.png", "figure3.png"]
    for name in found["panels"]:
        with Image.open(out / name) as picture:
            assert picture.width > 1000
            assert len(set(picture.resize((60, 40)).convert("RGB").getdata())) > 50

    capsys.readouterr()
    labels = out / "runs" / "deepsvg" / original(101) / f"{original(101)}_dseg.nii.gz"
    weights = out / "models" / "cohort_mu_seed0" / "models" / "model.pt"
    before = [path.stat().st_mtime_ns for path in (labels, weights, out / "runs" / "deepsvg" / "summary.tsv")]
    assert script.main([*arguments[:-1], "2"]) == 0  # how many jobs there are is no reason to do anything again
    assert len(capsys.readouterr().out.splitlines()) == 2  # who, and where to look
    assert before == [path.stat().st_mtime_ns for path in (labels, weights, out / "runs" / "deepsvg" / "summary.tsv")]
    again = json.loads((out / "tables.json").read_text())
    assert again.pop("wall_seconds") == found.pop("wall_seconds")
    assert again["settings"].pop("jobs") != found["settings"].pop("jobs")
    assert again == found
