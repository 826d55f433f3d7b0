"""The table of spoiled masks."""

from __future__ import annotations

import measure_masks

from monai_deepgmm.phantom import PhantomConfig
from monai_deepgmm.phantom.heart import write_cohort


def test_right_masks_pass_and_spoiled_ones_do_not(tmp_path, capsys):
    write_cohort(tmp_path / "in", 1, seed=11, config=PhantomConfig(slices=(2, 2)))
    assert measure_masks.main([str(tmp_path / "in")]) == 0
    lines = [line.split(" | ") for line in capsys.readouterr().out.splitlines()[2:]]
    found = {name.removeprefix("| "): flagged for name, flagged, _ in lines}
    assert found.pop("right") == "0 of 1"
    del found["eroded by 3 voxels"]  # of .75 mm: may pass
    assert set(found.values()) == {"1 of 1"}


def test_the_ventricle_is_found_alike_however_the_image_is_turned(tmp_path, capsys):
    write_cohort(tmp_path / "in", 1, seed=11, config=PhantomConfig(slices=(3, 3)))
    assert measure_masks.main([str(tmp_path / "in"), "--copies"]) == 0
    head, _, row = capsys.readouterr().out.splitlines()
    names = head.strip("| ").split(" | ")
    values = [float(value) for value in row.strip("| ").split(" | ")[1:]]
    assert len(names) == 1 + len(values) >= 6
    assert min(values) >= 0.98
