"""Late enhancement and bSSFP exchanged, through the command."""

from __future__ import annotations

import shutil

import pytest
import torch
from conftest import heart
from folders import INFARCT
from outcomes import row
from tensors import seeded

from monai_deepgmm.cli import main
from monai_deepgmm.methods.exchange_check import exchanged
from monai_deepgmm.methods.task import Images


@pytest.mark.usefixtures("no_picture")
def test_late_enhancement_and_bssfp_exchanged_are_told(tmp_path, make_patient):
    right = make_patient(tmp_path / "in", "right", seed=3)
    for what, taken in (("LGE", "C0"), ("C0", "LGE"), ("T2", "T2"), ("gd", "gd")):
        shutil.copy(right[taken], tmp_path / "in" / f"wrong_{what}.nii.gz")
    assert main(["segment", str(tmp_path / "in"), str(tmp_path / "out")]) == 0
    told = {p: [w for w in row(tmp_path / "out", p)["warnings"] if "W_SWAPPED" in w] for p in ("right", "wrong")}
    assert told["right"] == []
    assert "LGE and bSSFP look exchanged" in told["wrong"][0] or "LGE like bSSFP" in told["wrong"][0]


@pytest.mark.parametrize("scarred", [True, False])
def test_two_even_walls_tell_nothing(scarred):
    """That of late enhancement is the evener one; the other is uneven by noise, or as scar makes it."""
    labels, rng = torch.from_numpy(heart((48, 48, 1))[..., 0]), seeded(0)
    image = torch.where(labels == 500, 100.0, 20.0).repeat(1, 2, 1, 1)
    image += torch.tensor([2.0, 20.0])[:, None, None] * torch.randn(image.shape, generator=rng)
    image[0, 1][labels == 2221] += 60 * scarred
    mask, anything = (labels > 0)[None, None], torch.zeros(1, 4, 48, 48)
    tissues = INFARCT.visible(("LGE", "bSSFP"))
    found = exchanged(Images(image, mask, anything, INFARCT, tissues, ("LGE", "bSSFP"), (1.5, 1.5), slices=(0,)))
    assert (found is not None) == scarred
