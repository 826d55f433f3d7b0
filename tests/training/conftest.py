"""Five patients, and a network that is trained on them."""

from __future__ import annotations

from pathlib import Path

import pytest
from scenes import INFARCT, train

from monai_deepgmm.patients import discovery
from monai_deepgmm.patients.study import Cohort


@pytest.fixture(scope="session")
def patients(tmp_path_factory, make_patient) -> Path:
    """Nobody may change these."""
    folder = tmp_path_factory.mktemp("training") / "patients"
    for number in range(1, 6):
        make_patient(folder, f"pat{number}", seed=number)
    return folder


@pytest.fixture(scope="session")
def trained(patients, tmp_path_factory) -> Path:
    """A training that nothing interrupted; nobody may change it."""
    out = tmp_path_factory.mktemp("trained") / "model"
    assert train(patients, out) == 0
    return out


@pytest.fixture
def found(patients) -> Cohort:
    return discovery.find(patients, INFARCT)
