"""The script that counts what is flagged, on two patients written by hand."""

from __future__ import annotations

import json

import check_ranges as script


def patient(value: float, slices: int, low: float, warnings: list[str]) -> dict:
    one = {"kind": "volume_ml", "of": ["blood"], "range": [20, 500], "value": value, "plausible": 20 <= value <= 500}
    about = {"slices": slices, "spacing_mm": 14.0, "on_first_slice": True, "on_last_slice": False, "gaps": []}
    volumes = {"scar": {"volume_ml": 3.0, "low_ml": low}, "edema": {"volume_ml": 0.0, "low_ml": 0.0}}
    return {
        "plausibility": [one],
        "coverage": about,
        "uncertainty": {"volumes": volumes},
        "warnings": warnings,
    }


def test_numbers_and_facts_are_counted(tmp_path):
    for name, told in {"a": patient(10, 3, 0.0, ["W_IMPLAUSIBLE: x"]), "b": patient(100, 6, 1.0, [])}.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / f"{name}_dseg.json").write_text(json.dumps(told))
    said = list(script.lines(script.sidecars(tmp_path)))
    assert said[1] == "| volume_ml of blood | 10 | 55 | 100 | 20 to 500 | 1 of 2 |"
    assert said[2:] == [
        "the mask lies on an end slice: 2 of 2",
        "fewer than 4 slices: 1 of 2",
        "slices more than 12 mm apart: 2 of 2",
        "an interval reaches 0: 1 of 2",
        "W_IMPLAUSIBLE: 1 of 2",
    ]
