"""What a fit knows of its own errors, by hand."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import torch

from monai_deepgmm import protocol
from monai_deepgmm.methods.endocardium import ANGLES, Ring
from monai_deepgmm.methods.enhancement import Enhancement
from monai_deepgmm.methods.region_filter import Region
from monai_deepgmm.methods.task import Images
from monai_deepgmm.protocol import RegionCriteria
from monai_deepgmm.results import cues

INFARCT = protocol.load("infarct")
SIDE = 24
X, Y = np.meshgrid(*[np.arange(SIDE) - SIDE // 2] * 2, indexing="ij")
R = np.hypot(X, Y)
MASK, CAVITY = R < 11, R < 6
WALL = MASK & ~CAVITY


def images(*, present: bool = True) -> Images:
    """A ring of wall around a cavity in one slice of LGE: 0 and 2 by turns in the wall, 4 and 6 in the cavity."""
    stripes = np.where((X + Y) % 2 == 0, 0.0, 2.0)
    image, mask, inside = (
        torch.from_numpy(values.astype(np.float32))[None, None]
        for values in (np.where(CAVITY, 4 + stripes, stripes) * MASK, MASK, CAVITY)
    )
    ring = Ring(inside, np.zeros((1, SIDE, SIDE), np.int64), np.full((1, ANGLES), 11.0), np.full((1, ANGLES), 6.0))
    shown = np.where(WALL & (X > 0), 0.9, 0.1)[None]
    late = Enhancement(shown, shown, WALL[None], 1.2, 0.9, 0.5, present)
    tissues = tuple(t for t in INFARCT.tissues if t.name != "edema")
    return Images(image, mask, mask, INFARCT, tissues, ("LGE",), (1.0, 1.0), (0,), ring=ring, enhancement=late)


def labelled(where: np.ndarray, tissue: int) -> torch.Tensor:
    """Responsibilities ``(1, 3, H, W)``: blood in the cavity, a tissue somewhere, and myocardium in the rest."""
    resp = np.zeros((1, 3, SIDE, SIDE), np.float32)
    resp[0, 0][CAVITY], resp[0, 1][WALL & ~where], resp[0, tissue][WALL & where] = 1, 1, 1
    return torch.from_numpy(resp)


def test_the_patient_s_cues_by_hand():
    even = (X + Y) % 2 == 0
    found = cues.of_patient(images(), labelled(even, 2))  # all that is labelled myocardium is 2
    wall = np.where(even, 0.0, 2.0)[WALL]
    blood = np.where(even, 4.0, 6.0)[CAVITY]
    assert found == pytest.approx(
        {
            "present": 1.0,
            "bright": float((X > 0)[WALL].mean()),
            "level": 1.2,
            "evidence": 0.9,
            "separation": 0.5,
            "noise_LGE": blood.std() / wall.std(),
            "contrast_LGE": (blood.mean() - np.median(wall)) / wall.std(),
            "uneven_LGE": 0.0,
        },
        abs=1e-5,
    )


def test_without_borders_nothing_is_said_and_without_enhancement_nothing_of_it():
    resp = labelled(X > 0, 2)
    assert cues.of_patient(images()._replace(ring=None), resp) == {}
    assert "bright" not in cues.of_patient(images()._replace(enhancement=None), resp)


def test_a_slice_without_a_cavity_is_left_out():
    bare = images()
    bare = bare._replace(ring=bare.ring._replace(inside=torch.zeros_like(bare.mask)))
    assert set(cues.of_patient(bare, labelled(X > 0, 2))) == {"present", "bright", "level", "evidence", "separation"}


def test_the_tissues_cues_by_hand():
    found = cues.of_tissues(["blood", "scar"], [10.0, 0.0], [9.5, 1.0], [9.5, 2.0], {"scar": 0.3})
    assert found["blood"] == pytest.approx({k: math.log(10 / 10.5) for k in ("expected", "candidates")})
    assert found["scar"] == pytest.approx({"expected": math.log(3), "candidates": math.log(5), "doubt_ml": 0.3})


def region(score: float, *, voxels: int = 100, size: float = 9.0) -> Region:
    return Region("scar", 0, voxels, size, support=0.0, contrast=0.0, evidence=score, accepted=score >= 1)


def doubt(regions: list[Region], **how: bool) -> float:
    criteria = RegionCriteria(4.0, 1.0, {"evidence": 1.0}, "LGE")
    tissues = tuple(dataclasses.replace(t, criteria=criteria) if t.name == "scar" else t for t in INFARCT.tissues)
    task = images(**how)._replace(protocol=dataclasses.replace(INFARCT, tissues=tissues))
    return cues.doubts_ml(regions, task, voxel_ml=0.01)["scar"]


def test_what_was_refused_since_nothing_is_scarred_is_in_doubt_as_if_at_its_threshold():
    refused = region(3.0)._replace(accepted=False)
    assert doubt([refused]) == pytest.approx(0.5)
    assert doubt([region(3.0)]) < 0.2


def test_a_region_at_its_threshold_is_half_in_doubt_and_one_far_from_it_not_at_all():
    assert doubt([]) == 0
    assert doubt([region(1.0)]) == pytest.approx(0.5)  # of 1 ml
    assert doubt([region(1.0), region(1.0)]) == pytest.approx(math.sqrt(0.5))  # independent
    assert doubt([region(1.0 + d) for d in (-40, 40, math.inf)]) == pytest.approx(0, abs=1e-5)
    share = 1 / (1 + math.exp(-0.5 / cues.SCORE_SCALE))
    assert doubt([region(1.5)]) == pytest.approx(math.sqrt(share * (1 - share)))


@pytest.mark.parametrize(("size", "present"), [(3.0, True), (9.0, False)])
def test_a_region_that_is_too_small_or_of_an_absent_tissue_hardly_counts(size, present):
    share = cues.SMALL / 2
    assert doubt([region(1.0, size=size)], present=present) == pytest.approx(math.sqrt(share * (1 - share)))
