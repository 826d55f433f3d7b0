"""The script that fits intervals, on patients made up of numbers."""

from __future__ import annotations

import math

import calibrate_intervals as script
import numpy as np
import pytest

from monai_deepgmm.results.cues import LEAST_ML, Cues

#: Half of the patients hang on regions in doubt; for them the error is three times as large.
WIDTH = script.Width(("noise", "unknown"), "edema", (0.04, 0.06), (1.0, 3.0))
SLOPE, REACH = 0.1, 0.05


def patients(number: int, seed: int) -> list[script.Volume]:
    """Whose log-ratio is a cue times a slope and an error that is even between −reach and reach."""
    rng, rows = np.random.default_rng(seed), []
    for i in range(number):
        doubt, cue = 9.0 * (i % 2), float(rng.normal())
        ratio = SLOPE * cue + REACH * (3 if doubt else 1) * float(rng.uniform(-1, 1))
        cues = Cues({"noise": 2 + cue}, {"edema": {"doubt_ml": doubt}})
        true = (80 + LEAST_ML) * math.exp(ratio) - LEAST_ML
        rows.append(script.Volume("myocardium", true, 80.0, 4.0, 300.0, cues, ("LGE",)))
    return rows


def test_a_rule_finds_the_slope_and_the_reach_and_holds_further_patients():
    found = script.rule(patients(400, 1), width=WIDTH)
    slope, usual, sd = found.cues.pop("noise")
    assert not found.cues  # what no sidecar says is left out
    assert slope / sd == pytest.approx(SLOPE, rel=0.1)
    assert usual == pytest.approx(2.0, abs=0.2)
    assert found.absent_ml is None  # it was found in all
    assert found.reach[1] == pytest.approx(3 * found.reach[0], rel=1e-3)
    assert found.reach[0] == pytest.approx(REACH * 0.9, rel=0.25)


def test_intervals_by_cues_hold_as_many_and_are_narrower_than_by_standard_deviations():
    here, there = patients(300, 2), patients(300, 3)
    by_cues = script.checked(there, script.rule(here, width=WIDTH))
    by_sd = script.checked(there, script.reaches(here))
    for held, _ in (by_cues, by_sd):
        assert 0.85 <= held <= 0.96
    assert by_cues[1] < 0.8 * by_sd[1]


def test_half_of_the_mean_error_is_taken_over():
    rows = [r._replace(reference_ml=100.0) for r in patients(100, 4)]
    found = script.rule(rows, width=WIDTH)
    assert found.centre == pytest.approx(WIDTH.share * math.log(100.5 / 80.5), abs=1e-3)


def test_where_nothing_was_found_nine_in_ten_of_the_missed_and_the_healthy_are_held():
    rows = patients(100, 6)
    missed = [r._replace(found_ml=0.0, reference_ml=9.0) for r in rows[:3]]
    healthy = [r._replace(found_ml=0.0, reference_ml=0.0) for r in rows[:27]]
    assert script.rule([*rows, *missed], healthy[:6], width=WIDTH).absent_ml is None  # too few to tell
    assert script.rule([*rows, *missed], healthy[:17], width=WIDTH).absent_ml == 9
    assert script.rule([*rows, *missed], [*healthy] * 2, width=WIDTH).absent_ml == 0


def test_of_what_the_healthy_have_their_volumes_are_held_too():
    rows = patients(200, 7)
    healthy = [r._replace(reference_ml=140.0) for r in patients(40, 8)]
    alone, both = script.rule(rows, width=WIDTH), script.rule(rows, healthy, width=WIDTH)
    assert script.checked(healthy, alone)[0] < 0.1
    assert script.checked([*rows, *healthy], both)[0] == pytest.approx(0.9, abs=0.01)


def test_the_kinds_agree_with_what_a_patient_needs():
    row = patients(1, 5)[0]
    assert script._kind(row) is script.KINDS[1]
    assert script._kind(row._replace(sequences=("LGE", "T2"))) is script.KINDS[0]
    assert script._kind(row._replace(sequences=("T2",))) is None
