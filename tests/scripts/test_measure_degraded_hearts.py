"""Every way makes a heart worse as it says, and the table holds what was measured."""

from __future__ import annotations

import measure_degraded_hearts as degraded
import numpy as np
import pytest
from conftest import AFFINE

from monai_deepgmm import cli


def heart(n: int = 48) -> degraded.Heart:
    """Rings of two brightnesses in five slices, of which the outermost are empty."""
    x, y = np.mgrid[:n, :n] - (n - 1) / 2
    radius = np.hypot(x, y)
    labels = np.where(radius < 8, 1, np.where(radius < 16, 2, 0)).astype(np.uint8)
    stack = np.stack([labels * 0, labels, labels, labels, labels * 0], -1)
    values = np.choose(stack, [50.0, 200.0, 100.0])
    images = {s: degraded.Image(values, AFFINE) for s in ("LGE", "T2", "bSSFP")}
    return degraded.Heart(images, stack > 0, stack)


@pytest.mark.parametrize("name", degraded.WAYS)
def test_each_way_changes_what_it_says_and_nothing_before_it(name):
    whole = heart()
    made = degraded.WAYS[name](whole, np.random.default_rng(0))
    same = all(np.array_equal(made.images[s].values, i.values) for s, i in whole.images.items())
    moved = not np.array_equal(made.mask, whole.mask)
    assert (same and not moved) == (name == "as it is")
    assert np.array_equal(whole.images["LGE"].values, heart().images["LGE"].values)
    assert made.mask.shape == made.labels.shape == made.images["LGE"].values.shape
    assert np.isfinite(made.images["T2"].values).all()
    if "mask" not in name:  # what is inside stays inside
        assert np.array_equal(made.mask, made.labels > 0)


def test_sizes_noise_and_shading_are_as_told():
    whole, rng = heart(), np.random.default_rng(0)
    low, width = whole.range("LGE")
    assert (low, width) == (100, 100)
    added = degraded.noisy(0.1)(whole, rng).images["T2"].values - whole.images["T2"].values
    assert added.std() == pytest.approx(10, rel=0.02)
    wall = degraded.shaded(0.5)(whole, rng).images["LGE"].values[whole.labels == 1]
    assert 1.1 < (wall.max() - low) / (wall.min() - low) < 1.5
    coarse = degraded.pixels(2.6)(whole, rng)  # not twice the size, where the nearest voxel is none
    np.testing.assert_allclose(coarse.images["LGE"].pixel_mm, 2.6, rtol=0.03)
    sides = (coarse, whole)
    size = [h.mask.sum() * np.prod(h.images["LGE"].pixel_mm) for h in sides]
    assert size[0] == pytest.approx(size[1], rel=0.05)
    middle = [h.images["LGE"].affine @ [*np.argwhere(h.mask).mean(0), 1] for h in sides]
    np.testing.assert_allclose(*middle, atol=0.2)
    alone = degraded.WAYS["the middle slice alone"](whole, rng)
    assert alone.mask.shape[2] == 1
    np.testing.assert_allclose(alone.images["LGE"].affine[:3, 3], (AFFINE @ [0, 0, 2, 1])[:3])


def test_a_patient_is_measured_kept_and_shown(tmp_path, capsys, monkeypatch):
    assert cli.main(["phantom", str(tmp_path / "in"), "-n", "1", "--seed", "1", "--set", "slices=[2, 2]"]) == 0
    capsys.readouterr()
    words = [str(tmp_path / "in"), str(tmp_path / "out"), "--only", "as it is"]
    assert degraded.main(words) == 0
    table = capsys.readouterr().out
    row = next(line for line in table.splitlines() if line.startswith("| as it is")).split(" | ")
    assert 0.5 < float(row[1]) <= 1
    monkeypatch.setattr(degraded, "measured", None)  # it is kept
    assert degraded.main(words) == 0
    assert capsys.readouterr().out == table
