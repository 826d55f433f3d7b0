"""Masks that are whole and wrong, through the command: each ends with a code or a warning, right ones do not."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import heads
import nibabel as nib
import numpy as np
import pytest
from conftest import AFFINE, heart, save
from heads import head
from numpy.typing import NDArray
from scipy.ndimage import binary_dilation, distance_transform_edt, gaussian_filter

from monai_deepgmm.cli import main

Array = NDArray[np.generic]
SHAPE = (96, 96, 2)


def looked_at(folder: Path, capsys: pytest.CaptureFixture[str], *options: str) -> dict[str, str]:
    """Each patient's line of a dry run: its status, code, message and warnings."""
    main(["segment", str(folder), str(folder.parent / "out"), "--dry-run", *options])
    return {line.split("\t")[0]: line for line in capsys.readouterr().out.splitlines()}


def organ(shape: tuple[int, int, int] = SHAPE) -> NDArray[np.bool_]:
    return heart(shape) > 0


def patient(
    folder: Path,
    mask: Array | None,
    *,
    name: str = "mask",
    affine: Array = AFFINE,
    images: dict[str, Array] | None = None,
) -> Path:
    """A heart in a folder of its own: blood bright and wall grey, amid bright fat."""
    if images is None:
        labels, rng = heart(SHAPE), np.random.default_rng(5)
        levels = {"LGE": (60, 180, 140), "bSSFP": (70, 220, 150)}
        images = {
            s: gaussian_filter(
                np.select([labels == 500, labels > 0], [blood, wall], fat) + rng.normal(0, 4, SHAPE), (0.6, 0.6, 0)
            )
            for s, (wall, blood, fat) in levels.items()
        }
    folder.mkdir(parents=True)
    for sequence, data in images.items():
        save(folder / f"{sequence}.nii.gz", np.asarray(data, dtype=np.float32))
    if mask is not None:
        save(folder / f"{name}.nii.gz", np.asarray(mask).astype(np.float32), affine)
    return folder


def in_plane(change: Callable[..., Array], mask: Array, **how: int) -> Array:
    return np.stack([change(mask[..., k], **how) for k in range(mask.shape[2])], -1)


def half() -> Array:
    mask = organ()
    mask[:48] = False
    return mask


def with_neighbour() -> Array:
    """The right ventricle, beside the left one, is in it."""
    x, y = np.indices(SHAPE[:2])
    return organ() | (np.hypot((x - 66) / 10, (y - 48) / 12) < 1)[..., None]


def speckled() -> Array:
    mask = organ()
    mask[5:8, 5:9] = True
    mask[80:83, 12:15] = True
    return mask


def in_pieces() -> Array:
    mask = organ()
    mask[44:52] = False
    return mask


def leaky() -> Array:
    mask = organ()
    mask[44:52, 44:50] = False
    return mask


TINY = np.abs(np.indices(SHAPE)[:2] - 48).max(0) < 5
#: What is wrong with the mask → the mask, and the code.
WRONG: dict[str, tuple[Array, str]] = {
    "several values": (heart(SHAPE), "E_MASK_LABELS"),
    "probabilities": (np.rint(255 * gaussian_filter(organ().astype(float), 1)), "E_MASK_LABELS"),
    "soft edges": (gaussian_filter(organ().astype(float), 1), "E_MASK_FRACTIONAL"),
    "a ring": (np.isin(heart(SHAPE), (200, 1220, 2221)), "E_MASK_CAVITY"),
    "a hole": (leaky(), "W_MASK_CAVITY"),
    "everything": (np.ones(SHAPE), "E_MASK_SIZE"),
    "a spot": (TINY, "E_MASK_SIZE"),
    "half": (half(), "W_MASK_SHAPE"),
    "the other ventricle too": (with_neighbour(), "W_MASK_SHAPE"),
    "twice": (organ() | np.roll(organ(), 26, 0), "W_MASK_SHAPE"),
    "in pieces": (in_pieces(), "W_MASK_PIECES"),
    "crumbs": (speckled(), "W_MASK_PIECES"),
    "dilated": (in_plane(binary_dilation, organ(), iterations=2), "W_MASK_EDGE"),
    "eroded": (~in_plane(binary_dilation, ~organ(), iterations=3), "W_MASK_EDGE"),
    "shifted": (np.roll(organ(), (4, 4), (0, 1)), "W_MASK_EDGE"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_mask_does_not_pass_unnoticed(tmp_path, capsys, case):
    mask, code = WRONG[case]
    patient(tmp_path / "in" / "p", mask)
    line = looked_at(tmp_path / "in", capsys)["p"]
    assert code in line
    assert ("failed" in line) == code.startswith("E_")


@pytest.mark.parametrize("value", [1, 255, 7])
def test_a_right_mask_of_any_one_value_passes_in_silence(tmp_path, capsys, value):
    patient(tmp_path / "in" / "p", value * organ())
    line = looked_at(tmp_path / "in", capsys)["p"]
    assert "ready" in line
    assert "_MASK_" not in line


def test_the_values_are_listed_and_mask_labels_choose_among_them(tmp_path, capsys):
    patient(tmp_path / "in" / "p", heart(SHAPE))
    assert "200, 500, 1220, 2221" in looked_at(tmp_path / "in", capsys)["p"]
    line = looked_at(tmp_path / "in", capsys, "--mask-labels", "200", "500", "1220", "2221")["p"]
    assert "_MASK_" not in line


@pytest.mark.parametrize(
    ("name", "wrong"),
    [("scar_mask", True), ("RV_mask", True), ("heart-rv_mask", True), ("lv", False), ("curved_mask", False)],
)
def test_a_name_that_means_another_organ_is_refused_unless_it_was_asked_for(tmp_path, capsys, name, wrong):
    patient(tmp_path / "in" / "p", organ(), name=name)
    assert ("E_MASK_NAME" in looked_at(tmp_path / "in", capsys)["p"]) == wrong
    table = tmp_path / "table.csv"
    table.write_text(f"patient,LGE,mask\np,in/p/LGE.nii.gz,in/p/{name}.nii.gz\n")
    line = looked_at(tmp_path / "in", capsys, "--manifest", str(table))["p"]
    assert ("W_MASK_NAME" in line, "failed" in line) == (wrong, False)


def test_the_words_of_a_patients_id_do_not_count(tmp_path, capsys):
    patient(tmp_path / "in" / "scar07", organ(), name="scar07_mask")
    assert "ready" in looked_at(tmp_path / "in", capsys)["scar07"]


def test_the_same_voxels_in_another_place_are_told_as_such(tmp_path, capsys):
    patient(tmp_path / "in" / "p", organ(), affine=np.eye(4))  # which says nothing of where it lies
    line = looked_at(tmp_path / "in", capsys)["p"]
    assert "W_MASK_PLACE" in line
    assert " mm apart" in line
    moved = AFFINE.copy()
    moved[:3, 3] += 40
    patient(tmp_path / "in" / "q", organ(), affine=moved)
    line = looked_at(tmp_path / "in", capsys)["q"]
    assert "E_MASK_GRID" in line
    assert "same shape" in line
    assert " mm apart" in line


def test_what_of_a_mask_lies_beyond_the_images_is_told_in_ml(tmp_path, capsys):
    moved = AFFINE @ np.array([[1, 0, 0, 34], [0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1.0]])
    patient(tmp_path / "in" / "p", organ()[..., :1], affine=moved)
    line = looked_at(tmp_path / "in", capsys)["p"]
    assert "W_MASK_LOST" in line
    assert "ml" in line
    moved[:3, 3] += 20 * AFFINE[:3, 0]
    patient(tmp_path / "in" / "q", organ()[..., :1], affine=moved)
    assert "E_MASK_GRID" in looked_at(tmp_path / "in", capsys)["q"]


AROUND = {"noise": 3.0, "a constant": 0.0}
BRAINS: dict[str, tuple[Array, str]] = {
    "a head": (head(), "E_HEAD"),
    "a head in noise": (head(2), "E_HEAD"),
    "noise": (head(2, strip=True), "E_MASK_BACKGROUND"),
    "a constant": (np.where(head(strip=True) == 0, -20, head(strip=True)), "W_MASK_BACKGROUND"),
    "z-scores": (head(strip=True) / 30 - 1, "W_MASK_BACKGROUND"),
}


def brain_line(tmp_path: Path, capsys: pytest.CaptureFixture[str], image: Array, mask: Array | None = None) -> str:
    folder = heads.write(tmp_path / "in" / "p", image)
    if mask is not None:
        nib.save(nib.Nifti1Image(mask.astype(np.uint8), np.diag([3.0, 3, 3, 1])), folder / "mask.nii.gz")
    options = ["--protocol", "brain", *([] if mask is not None else ["--mask", "nonzero"])]
    return looked_at(tmp_path / "in", capsys, *options)["p"]


def codes(line: str) -> set[str]:
    return set(re.findall(r"[EW]_[A-Z_]+", line))


@pytest.mark.parametrize("case", BRAINS)
def test_a_background_that_is_not_0_is_told_from_the_brain(tmp_path, capsys, case):
    image, code = BRAINS[case]
    assert code in brain_line(tmp_path, capsys, image)


def test_residue_of_skull_stripping_is_no_brain(tmp_path, capsys):
    image = head(strip=True)
    around = (image == 0) & (distance_transform_edt(image == 0) < 5)
    image[around] = 3 + np.random.default_rng(3).random(around.sum())
    assert "E_MASK_BACKGROUND" in brain_line(tmp_path, capsys, image)


def test_residue_as_bright_as_fluid_is_flagged(tmp_path, capsys):
    image = head(strip=True)
    around = (image == 0) & (distance_transform_edt(image == 0) < 2)
    image[around] = 0.25 * np.median(image[image > 0]) + np.random.default_rng(3).random(around.sum())
    assert "W_MASK_BACKGROUND" in brain_line(tmp_path / "a", capsys, image)
    whole = head()
    larger = binary_dilation(head(strip=True) > 0, iterations=2)
    assert "W_MASK_EDGE" in brain_line(tmp_path / "b", capsys, whole, larger)


def test_a_stripped_brain_passes_with_and_without_a_mask_and_a_head_with_the_brains_mask(tmp_path, capsys):
    brain = head(strip=True)
    assert "_MASK_" not in brain_line(tmp_path / "a", capsys, brain)
    assert "_MASK_" not in brain_line(tmp_path / "b", capsys, brain, brain > 0)
    assert "_MASK_" not in brain_line(tmp_path / "c", capsys, head(), brain > 0)
    assert "E_HEAD" in brain_line(tmp_path / "d", capsys, head(), head() > 0)


def test_brains_in_part_with_a_hole_or_with_padding_are_flagged(tmp_path, capsys):
    brain = head(strip=True)
    half_of_it, hollow = brain > 0, brain > 0
    half_of_it[28:] = False
    hollow[24:32, 24:32, 24:32] = False
    assert {"W_MASK_SIZE", "W_MASK_SHAPE", "W_MASK_PART"} <= codes(
        brain_line(tmp_path / "a", capsys, brain, half_of_it)
    )
    assert "W_MASK_CAVITY" in brain_line(tmp_path / "b", capsys, brain, hollow)
    assert "W_MASK_PADDING" in brain_line(tmp_path / "c", capsys, brain, binary_dilation(brain > 0, iterations=2))
