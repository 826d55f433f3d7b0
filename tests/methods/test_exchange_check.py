"""Late enhancement and bSSFP exchanged, through the command."""

from __future__ import annotations

import shutil

import pytest
from outcomes import row

from monai_deepgmm.cli import main


@pytest.mark.usefixtures("no_picture")
def test_late_enhancement_and_bssfp_exchanged_are_told(tmp_path, make_patient):
    right = make_patient(tmp_path / "in", "right", seed=3)
    for what, taken in (("LGE", "C0"), ("C0", "LGE"), ("T2", "T2"), ("gd", "gd")):
        shutil.copy(right[taken], tmp_path / "in" / f"wrong_{what}.nii.gz")
    assert main(["segment", str(tmp_path / "in"), str(tmp_path / "out")]) == 0
    told = {p: [w for w in row(tmp_path / "out", p)["warnings"] if "W_SWAPPED" in w] for p in ("right", "wrong")}
    assert told["right"] == []
    assert "LGE and bSSFP look exchanged" in told["wrong"][0] or "LGE like bSSFP" in told["wrong"][0]
