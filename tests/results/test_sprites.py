"""The viewer's pixels are the scan's own, its greys the wall's, its labels the label map's."""

from __future__ import annotations

import base64
import io
from typing import Any

import numpy as np
import outcomes
import pytest
from pages import LPS, hearts
from PIL import Image

from monai_deepgmm.results import greys, mosaic, sprites


def decoded(shown: dict[str, Any], name: str) -> np.ndarray:
    """A layer as (slices, rows, columns)."""
    (layer,) = (layer for layer in shown["layers"] if layer["name"] == name)
    png = Image.open(io.BytesIO(base64.b64decode(layer["png"])))
    assert png.mode == "L"
    return np.asarray(png).reshape(shown["shape"])


@pytest.fixture(scope="module")
def shown() -> dict[str, Any]:
    return sprites.sprites(hearts(), hearts().labels)


def test_a_hearts_pixels_are_native_and_its_labels_exact(shown):
    heart = hearts()
    upright = mosaic.view(heart.reference.affine, 2).upright(heart.labels)
    assert shown["mm"] == [8.0, 1.5, 1.5]
    assert shown["slices"] == [0, 1, 2, 3, 4]  # the mask is in 1 to 3; slices beside it are shown too
    assert shown["inside"] == [False, True, True, True, False]
    labels = decoded(shown, "labels")
    box = mosaic.shown_box(upright > 0, 1.5, 1.5, 28.0)
    assert np.array_equal(labels & 127, upright[:, box[0], box[1]])
    assert np.array_equal(labels > 127, upright[:, box[0], box[1]] > 0)
    assert np.array_equal(decoded(shown, "reference"), labels & 127)
    assert shown["counts"][2] == [int((labels[2] & 127 == k).sum()) for k in (1, 2, 3, 4)]


def test_greys_tell_intensities_to_a_175th_of_the_walls_range(shown):
    heart = hearts()
    turned = mosaic.view(heart.reference.affine, 2)
    upright, walls = turned.upright(heart.images["T2"]), turned.upright(greys.wall(heart))
    knots = next(layer["knots"] for layer in shown["layers"] if layer["name"] == "T2")
    wall = upright[2][walls[2]]
    assert knots[2][1:3] == pytest.approx(np.percentile(wall, [1, 99]), rel=1e-4)
    box = mosaic.shown_box(turned.upright(heart.mask), 1.5, 1.5, 28.0)
    codes = decoded(shown, "T2")[2][walls[2][box]]
    told = np.interp(codes, sprites.KNOT_CODES, knots[2])
    inside = (wall >= knots[2][1]) & (wall <= knots[2][2])
    assert np.abs(told - wall)[inside].max() <= 0.51 * (knots[2][2] - knots[2][1]) / 175
    assert knots[0][1:3] == knots[1][1:3]  # a slice without a wall takes the nearest one's


@pytest.mark.parametrize(
    ("radii", "ends"), [((10, 8, 4), ["base", "apex"]), ((4, 8, 10), ["apex", "base"]), ((8, 8, 8), None)]
)
def test_the_smaller_end_is_the_apex_and_equal_ends_have_no_name(radii, ends):
    x, y = np.meshgrid(np.arange(32) - 16, np.arange(32) - 16, indexing="ij")
    labels = np.stack([np.where(np.hypot(x, y) < r, 2, 0) for r in radii], axis=-1)
    assert sprites.sprites(outcomes.segmentation(labels))["ends"] == ends


def test_many_large_slices_keep_to_the_pages_size():
    labels = np.zeros((300, 300, 24), np.uint8)
    labels[60:240, 60:240, 2:22] = 2
    shown = sprites.sprites(outcomes.segmentation(labels, affine=np.diag([0.5, 0.5, 8, 1])))
    assert np.prod(shown["shape"]) * 3 <= sprites._MOST_PIXELS
    assert shown["mm"][1] == 0.5 * round(shown["mm"][1] / 0.5)


@pytest.mark.parametrize("flip", [1, -1])
def test_a_brain_is_shown_in_2_mm_from_below_whichever_way_its_slices_run(flip):
    labels = np.zeros((40, 48, 36), np.uint8)
    labels[8:32, 8:40, 4:32] = 2
    labels[8:32, 8:40, 4:16] = 1  # GM below
    image = labels.astype(np.float32)[None] * 100
    affine = LPS @ np.diag([1, 1, flip, 1])
    labels, image = labels[:, :, ::flip], image[:, :, :, ::flip]
    brain = outcomes.segmentation(labels, name="brain", sequences=("T1",), images=image, affine=affine)
    shown = sprites.sprites(brain)
    assert (shown["planes"], shown["mm"], shown["shape"][0]) == (3, [2.0, 2.0, 2.0], 14)
    middle = (decoded(shown, "labels") & 127)[:, shown["shape"][1] // 2, shown["shape"][2] // 2]
    assert middle.tolist() == [1] * 6 + [2] * 8
