"""What a developer passes wrongly to what the package exports: the error names the argument, and what was expected."""

from __future__ import annotations

import outcomes
import pytest
import torch
from folders import touch

import monai_deepgmm as api
from monai_deepgmm.errors import UsageError

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
    with pytest.raises(UsageError, match=r"--masks: there is no folder .*gone"):
        api.find_cohort(tmp_path, CONFIG.protocol, masks=str(tmp_path / "gone"))
    for wrong in ({"seed": "one"}, {"frame": "first"}, {"frame": -1}, {"max_voxels": 0}):
        option = next(iter(wrong)).replace("_", "-")
        with pytest.raises(UsageError, match=rf"--{option}: got .*, expected a whole number"):
            api.configure(**wrong)


def test_one_value_may_stand_for_a_list(tmp_path):
    """As MONAI's command line reads ``--mask_labels 500 --patients 1001``."""
    touch(tmp_path, "1001/{LGE,mask}.nii.gz", "1002/LGE.nii.gz")
    for labels in (500, "500", [500], (500.0,)):
        (study,) = api.find_cohort(tmp_path, CONFIG.protocol, mask_labels=labels, patients=1001).studies
        assert (study.patient, study.mask_labels) == ("1001", (500.0,))
    with pytest.raises(UsageError, match="--mask-labels: got 'blood', expected one number or several"):
        api.find_cohort(tmp_path, CONFIG.protocol, mask_labels="blood")
    assert api.configure(copies="nrrd", settings="max_iter=7").copies == ("nrrd",)
    assert api.configure(settings=None) == CONFIG


def test_a_tissue_that_the_protocol_lacks():
    found = outcomes.segmentation(torch.ones(2, 2, 2).numpy(), sequences=("LGE",))
    assert not found.where("edema").any()  # without T2 it cannot be shown
    with pytest.raises(ValueError, match="no tissue 'lesion' in protocol infarct: blood, myocardium, edema, scar"):
        found.where("lesion")
