"""The script that compares brains with other software: names, scores and tables by hand, and a run on a tiny brain."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path
from statistics import fmean

import brain_methods
import compare_brains
import nibabel as nib
import numpy as np
import pytest
from conftest import save

from monai_deepgmm import protocol
from monai_deepgmm.errors import StudyError

SHAPE = (24, 24, 24)
#: Index of the protocol → brightness on T1.
LEVELS = {1: 100.0, 2: 150.0, 3: 40.0}


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """White matter in grey matter in CSF; two voxels inside the mask bear no label."""
    folder, rng = tmp_path_factory.mktemp("brains"), np.random.default_rng(0)
    radius = np.linalg.norm(np.indices(SHAPE) - 11.5, axis=0)
    labels = np.select([radius < 6, radius < 9, radius < 11], [2, 1, 3], 0).astype(np.uint8)
    (folder / "one").mkdir()
    image = sum(level * (labels == index) for index, level in LEVELS.items()) + rng.normal(0, 12, SHAPE) * (labels > 0)
    save(folder / "one" / "T1.nii.gz", np.rint(image).astype(np.int16), np.eye(4))
    save(folder / "one" / "mask.nii.gz", (labels > 0).astype(np.uint8), np.eye(4))
    labels[12, 12, 12:14] = 0
    save(folder / "one" / "seg.nii.gz", labels, np.eye(4))
    return folder


def rows(text: str) -> dict[str, list[str]]:
    """Method → its cells."""
    lines = [[c.strip() for c in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("|")]
    return {line[0]: line[1:] for line in lines}


def test_components_are_named_by_brightness():
    wanted = protocol.load("brain")
    named = brain_methods.ordered(np.array([0, 7, 7, 2, 5]), np.array([9.0, 3.0, 3.0, 1.0, 2.0]), wanted)
    assert named.tolist() == [0, 2, 2, 3, 1]
    with pytest.raises(StudyError, match="found 2 components, but 3"):
        brain_methods.ordered(np.array([1, 2, -1]), np.array([5.0, 1.0, 0.0]), wanted)


def test_dice_counts_only_what_bears_a_label():
    scores = compare_brains.dice(np.array([1, 2, 2, 2, 1]), np.array([1, 1, 2, 2, 0]), protocol.load("brain"))
    assert scores == pytest.approx({"GM": 2 / 3, "WM": 4 / 5, "CSF": np.nan}, nan_ok=True)


def test_both_segment_a_brain_and_a_second_run_measures_nothing(data, tmp_path, capsys):
    methods = ["sklearn-tied", "deepgmm:gmm,covariance=full"]
    assert compare_brains.main([str(data), str(tmp_path), "--methods", *methods]) == 0
    printed = capsys.readouterr().out
    assert "24 × 24 × 24 (1)" in printed
    assert list(rows(printed))[2:] == methods
    for path in sorted(tmp_path.glob("one/*.json")):
        kept = json.loads(path.read_text())
        assert kept["voxels_scored"] == np.count_nonzero(nib.load(data / "one" / "seg.nii.gz").dataobj)
        assert min(kept["dice"].values()) > 0.95
        assert kept["peak_gb"] > 0.05  # nothing that computes is smaller
        path.write_text(json.dumps(kept | {"dice": {"CSF": 0.1, "GM": 0.2, "WM": 0.4}}))
    assert compare_brains.main([str(data), str(tmp_path), "--methods", *methods]) == 0
    again = rows(capsys.readouterr().out)
    assert [again[method][2:6] for method in methods] == [["0.100", "0.200", "0.400", "0.300"]] * 2


@pytest.mark.parametrize(("method", "module"), [("truncate+n4+atropos", "ants"), ("dipy-hmrf", "dipy")])
def test_rivals_segment_it_too_or_say_what_would_install_them(data, tmp_path, capsys, method, module):
    code = compare_brains.main([str(data), str(tmp_path), "--methods", method])
    if find_spec(module) is None:
        assert code == 2
        assert f"left out: {method}: pip install" in capsys.readouterr().err
        return
    assert code == 0
    kept = json.loads((tmp_path / "one" / f"{method}.json").read_text())
    assert fmean(kept["dice"].values()) > 0.75  # N4 takes some of the shells for bias; a wrong name would cost more
