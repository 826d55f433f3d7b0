"""The script that compares brains with other software: names, scores and tables by hand, and a run on a tiny brain."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from statistics import fmean
from types import ModuleType

import numpy as np
import pytest
from conftest import save

from monai_deepgmm import protocol
from monai_deepgmm.errors import StudyError

SHAPE = (24, 24, 24)
#: Index of the protocol → brightness on T1.
LEVELS = {1: 100.0, 2: 150.0, 3: 40.0}


@pytest.fixture(scope="module")
def script() -> ModuleType:
    path = Path(__file__).parents[2] / "scripts" / "compare_brains.py"
    spec = importlib.util.spec_from_file_location("compare_brains", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules["compare_brains"] = module  # named tuples look their module up
    spec.loader.exec_module(module)
    return module


def brain() -> np.ndarray:
    """White matter in grey matter in CSF, around the middle."""
    radius = np.linalg.norm(np.indices(SHAPE) - 11.5, axis=0)
    return np.select([radius < 6, radius < 9, radius < 11], [2, 1, 3], 0).astype(np.uint8)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One patient; two voxels inside the mask bear no label."""
    folder, labels, rng = tmp_path_factory.mktemp("brains"), brain(), np.random.default_rng(0)
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


def test_components_are_named_by_brightness(script: ModuleType) -> None:
    components = np.array([[[0, 7, 7, 2, 5]]])
    image = np.array([[[9.0, 3.0, 3.0, 1.0, 2.0]]])
    assert script.ordered(components, image, protocol.load("brain")).tolist() == [[[0, 2, 2, 3, 1]]]


def test_a_fit_that_lost_a_component_is_no_result(script: ModuleType) -> None:
    with pytest.raises(StudyError, match="found 2 components, but 3"):
        script.ordered(np.array([[[1, 2, -1]]]), np.array([[[5.0, 1.0, 0.0]]]), protocol.load("brain"))


def test_dice_counts_only_what_the_truth_labels(script: ModuleType) -> None:
    true, found = np.array([[[1, 1, 2, 2, 0]]]), np.array([[[1, 2, 2, 2, 1]]])
    scores = script.dice(found, true, protocol.load("brain"))
    assert scores["GM"] == pytest.approx(2 / 3)
    assert scores["WM"] == pytest.approx(4 / 5)
    assert np.isnan(scores["CSF"])


def test_a_mean_leaves_out_what_does_not_exist(script: ModuleType) -> None:
    assert script.spread([0.5, float("nan"), 0.7]) == "0.600 ± 0.141"
    assert script.spread([float("nan")]) == "-"


def test_both_segment_a_brain_and_a_second_run_measures_nothing(
    script: ModuleType, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    methods = ["sklearn-tied", "deepgmm:gmm,covariance=full"]
    assert script.main([str(data), str(tmp_path), "--methods", *methods]) == 0
    printed = capsys.readouterr().out
    assert "24 × 24 × 24 (1)" in printed
    assert list(rows(printed))[2:] == methods
    for path in sorted(tmp_path.glob("one/*.json")):
        kept = json.loads(path.read_text())
        assert kept["voxels_scored"] == int((brain() > 0).sum()) - 2
        assert min(kept["dice"].values()) > 0.95
        assert kept["peak_gb"] > 0.05  # nothing that computes is smaller
        path.write_text(json.dumps(kept | {"dice": {"CSF": 0.1, "GM": 0.2, "WM": 0.4}}))
    assert script.main([str(data), str(tmp_path), "--methods", *methods]) == 0
    again = rows(capsys.readouterr().out)
    assert [again[method][2:6] for method in methods] == [["0.100", "0.200", "0.400", "0.300"]] * 2


@pytest.mark.parametrize(
    ("method", "module"), [("atropos", "ants"), ("truncate+n4+atropos", "ants"), ("dipy-hmrf", "dipy")]
)
def test_rivals_that_are_installed_segment_it_too(
    script: ModuleType, data: Path, tmp_path: Path, method: str, module: str
) -> None:
    if importlib.util.find_spec(module) is None:
        pytest.skip(f"{module} is not installed")
    assert script.main([str(data), str(tmp_path), "--methods", method]) == 0
    kept = json.loads((tmp_path / "one" / f"{method}.json").read_text())
    assert fmean(kept["dice"].values()) > 0.75  # N4 takes some of the shells for bias; a wrong name would cost more


def test_a_rival_that_is_not_installed_is_left_out(
    script: ModuleType,
    data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(script.util, "find_spec", lambda name: None)
    assert script.main([str(data), str(tmp_path), "--methods", "atropos"]) == 2
    assert "left out: atropos: pip install antspyx" in capsys.readouterr().err


def test_what_cannot_be_done_says_why(
    script: ModuleType, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert script.main([str(data), str(tmp_path), "--methods", "nobody"]) == 2
    assert "--methods nobody: unknown" in capsys.readouterr().err
    assert script.main([str(data), str(tmp_path), "--methods", "deepgmm:gmm,svgmm"]) == 2
    assert "left out: one, deepgmm:gmm,svgmm: deepgmm:gmm,svgmm: gmm and svgmm are two" in capsys.readouterr().err
