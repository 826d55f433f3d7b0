"""The settings of a training as a model's folder holds them."""

from __future__ import annotations

import pytest

from monai_deepgmm import protocol
from monai_deepgmm.methods import training_config


@pytest.mark.parametrize("semi_supervised", [False, True])
@pytest.mark.parametrize("name", protocol.names())
@pytest.mark.parametrize("loss", training_config.LOSSES)
def test_what_a_training_leaves_is_what_a_model_may_hold(loss, name, semi_supervised):
    wanted, method = protocol.load(name), training_config.LOSSES[loss]
    made = training_config.configure({}, wanted, method=method, loss=loss, semi_supervised=semi_supervised)
    read = training_config.TrainingConfig.from_json(made.as_json())
    assert read.resolved(wanted, semi_supervised=semi_supervised) == read == made
