"""Tissues of which nothing decides whether they are there, through the command and by planted evidence."""

from __future__ import annotations

import shutil

import numpy as np
import pytest
import torch
from folders import INFARCT
from outcomes import row

from monai_deepgmm.cli import main
from monai_deepgmm.methods.enhancement import Enhancement
from monai_deepgmm.methods.presence_check import undecided
from monai_deepgmm.methods.task import Images

NEEDED = INFARCT.anatomy.enhancement.evidence


@pytest.mark.usefixtures("no_picture")
def test_edema_on_t2_alone_is_told_to_be_undecided(tmp_path, make_patient):
    files = make_patient(tmp_path / "in", "whole", seed=3)
    for what in ("T2", "gd"):
        shutil.copy(files[what], tmp_path / "in" / f"alone_{what}.nii.gz")
    assert main(["segment", str(tmp_path / "in"), str(tmp_path / "out")]) == 0
    told = {p: [w for w in row(tmp_path / "out", p)["warnings"] if "decides whether" in w] for p in ("whole", "alone")}
    assert told["whole"] == []
    assert told["alone"] == ["W_UNSURE: LGE is absent, so that nothing decides whether there is edema at all"]


@pytest.mark.parametrize(
    ("evidence", "present", "told"),
    [(0.9 * NEEDED, False, True), (0.7 * NEEDED, False, False), (0.9 * NEEDED, True, False)],
)
def test_evidence_that_is_nearly_enough_is_told(evidence, present, told):
    blank = np.zeros((1, 8, 8))
    shown = Enhancement(blank, blank, blank > 0, 1.0, evidence, 0.5, present)
    image, mask = torch.zeros(1, 1, 8, 8), torch.ones(1, 1, 8, 8)
    tissues = INFARCT.visible(("LGE",))
    images = Images(image, mask, mask, INFARCT, tissues, ("LGE",), (1.0, 1.0), slices=(0,), enhancement=shown)
    assert len(list(undecided(images, {"scar"} if present else set()))) == told
