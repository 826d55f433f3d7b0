"""What a developer passes wrongly to what the package exports: the error names the argument, and what was expected."""

from __future__ import annotations

import outcomes
import pytest
import torch

import monai_deepgmm as api

IMAGE, MASK, START = torch.randn(2, 3, 8, 8), torch.ones(2, 1, 8, 8), torch.rand(2, 2, 8, 8).softmax(1)
CONFIG = api.configure()
FIT = {"image": IMAGE, "mask": MASK, "start": START}


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"image": IMAGE.int()}, "image: expected floating-point numbers"),
        ({"image": torch.where(IMAGE > 2, torch.nan, IMAGE)}, "image: holds NaN or infinity inside the mask"),
        ({"mask": MASK[:, 0]}, r"mask: expected \(B, 1, \*S\)"),
        ({"mask": MASK[:1]}, r"mask: expected \(B, 1, \*S\)"),
        ({"start": START[..., :4]}, r"start: expected \(B, K, \*S\) or \(R, B, K, \*S\)"),
        ({"start": START[:1]}, "start: expected"),
        ({"start": START[None, None]}, "start: expected"),
        ({"covariance": "diagonal"}, "'diagonal' is unknown; choose one of diag, full, tied, spherical"),
    ],
)
def test_a_fit(wrong, said):
    api.fit_em(**FIT, max_iter=1)
    with pytest.raises(ValueError, match=said):
        api.fit_em(**FIT | wrong, max_iter=1)


@pytest.mark.parametrize(
    ("made", "given", "said"),
    [
        ("MixtureNLL", {"covariance": "x"}, "choose one of diag, full"),
        ("GMMLoss", {"covariance": "x"}, "choose one of diag, full"),
        ("UNet", {"spatial_dims": 4, "in_channels": 1, "out_channels": 2}, "spatial_dims: got 4, expected 2 or 3"),
        ("UNet", {"spatial_dims": 2, "in_channels": 1, "out_channels": 2, "filters": ()}, "filters: got none"),
    ],
)
def test_losses_and_networks(made, given, said):
    with pytest.raises(ValueError, match=said):
        getattr(api, made)(**given)


def test_a_folder_a_study_a_configuration(tmp_path):
    with pytest.raises(TypeError, match=r"protocol: got 'infarct', expected a Protocol"):
        api.find_cohort(tmp_path, "infarct")
    with pytest.raises(TypeError, match="study: got str, expected a Study"):
        api.segment("p1", CONFIG)
    with pytest.raises(TypeError, match="config: got str, expected a Config"):
        api.segment(api.Study("p1", {}), "anatomy")
    with pytest.raises(Exception, match="--seed: got 'one', expected a whole number"):
        api.configure(seed="one")


def test_a_tissue_that_the_protocol_lacks():
    found = outcomes.segmentation(torch.ones(2, 2, 2).numpy(), sequences=("LGE",))
    assert not found.where("edema").any()  # without T2 it cannot be shown
    with pytest.raises(ValueError, match="no tissue 'lesion' in protocol infarct: blood, myocardium, edema, scar"):
        found.where("lesion")
