"""Agreement in numbers that are known from elsewhere, and the page that tells it."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest

from monai_deepgmm import protocol
from monai_deepgmm.cli import main
from monai_deepgmm.patients.study import Problem
from monai_deepgmm.results import agreement, agreement_page, report
from monai_deepgmm.results.agreement import Pair
from monai_deepgmm.results.evaluate import Evaluated, Evaluation, Row

HOSTILE = "<script>alert(1)</script>"
SEQUENCES = ("LGE", "T2", "bSSFP")


def test_the_intraclass_correlation_of_shrout_and_fleiss():
    judges = [[9, 2, 5, 8], [6, 1, 3, 2], [8, 4, 6, 8], [7, 1, 2, 6], [10, 5, 6, 9], [6, 2, 4, 7]]
    assert agreement.intraclass(judges) == pytest.approx(0.29, abs=0.005)  # 1979, ICC(2,1)


def test_a_shift_is_a_bias_and_lowers_concordance_as_lin_says():
    x = np.array([10.0, 20.0, 40.0])
    found = agreement.agreement(Pair(str(k), v + 3, v) for k, v in enumerate(x))
    assert found[:5] == pytest.approx((3, 3, 0, 3, 3))
    assert found.ccc == pytest.approx(2 * x.var() / (2 * x.var() + 9))
    spread = agreement.agreement([Pair("a", 1, 0), Pair("b", 5, 6)])  # differences 1 and -1
    assert spread[:5] == pytest.approx((2, 0, 2**0.5, -1.96 * 2**0.5, 1.96 * 2**0.5))
    alone = agreement.agreement([Pair("a", 1, 0)])
    assert (alone.n, alone.bias) == (1, 1)
    assert np.isnan(alone.icc)


def evaluation(**voxels: tuple[int, int]) -> Evaluation:
    """Patients with one slice that holds blood alone: predicted and true voxels of 0.1 ml."""
    tissues = ("blood", "myocardium", "edema", "scar")
    patients = {}
    for name, (predicted, true) in voxels.items():
        dice = min(predicted, true) / max(predicted, true)
        row = Row(name, 0, "blood", dice, dice, dice, dice, dice, 1.0, 0.5, predicted, true)
        patients[name] = Evaluated(SEQUENCES, tissues, (row,), (), np.zeros((5, 5)), ("the layout", ()), 0.1)
    problems = {HOSTILE: Problem("E_TRUTH", HOSTILE, "Add a file")}
    return Evaluation("infarct", tissues, "all", "slice", patients, problems)


def test_the_page_tells_the_worst_first_and_what_was_used():
    found = evaluation(good=(100, 110), bad=(50, 150), fair=(300, 200))
    assert agreement.pairs(found)["blood"] == [Pair("good", 10, 11), Pair("bad", 5, 15), Pair("fair", 30, 20)]
    sidecars = {
        name: {"method": method, "sequences": list(SEQUENCES), "seed": 7, "versions": {"monai-deepgmm": "9.9"}}
        for name, method in (("good", "anatomy"), ("bad", "anatomy"), ("fair", "gmm"))
    }
    html = agreement_page.page(found, protocol.load("infarct"), sidecars)
    assert re.findall(r'<a href="(\w+)/\w+_report.html">', html) == ["bad", "fair", "good"]
    assert len(re.findall("<circle", html)) == 3  # blood alone has volumes
    assert "monai-deepgmm 9.9 (method anatomy or gmm, seed 7)" in html
    assert "Lin 1989" in html
    assert "Research use only" in html
    assert "<script" not in html


def test_the_index_leads_to_the_page_where_it_is(tmp_path):
    folder = tmp_path / "p"
    folder.mkdir()
    (folder / "p_row.json").write_text(json.dumps({"patient": "p", "status": "failed"}))
    report.rebuild(tmp_path)
    assert "agreement.html" not in (tmp_path / "index.html").read_text(encoding="utf-8")
    agreement_page.write(tmp_path, evaluation(p=(1, 1)), protocol.load("infarct"))
    report.rebuild(tmp_path)
    assert 'href="agreement.html"' in (tmp_path / "index.html").read_text(encoding="utf-8")


@pytest.mark.usefixtures("no_picture")
def test_agreement_of_results_that_have_changed_since_is_told_from_that_of_these(tmp_path, make_patient):
    make_patient(tmp_path / "in", "pat1")
    out, where = tmp_path / "out", (str(tmp_path / "in"), str(tmp_path / "out"))

    def said() -> bool:
        return "reference labels, of earlier results" in (out / "index.html").read_text(encoding="utf-8")

    for command, earlier in ((), False), (("--method", "gmm"), True):
        assert main(["segment", *where, *command]) == 0
        assert said() is earlier
        assert main(["evaluate", *reversed(where)]) == 0
        assert main(["report", where[1]]) == 0
        assert not said()
