"""``cohort``: the patients to be segmented are the training set of one network, which then segments them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Self

from monai_deepgmm.errors import UsageError
from monai_deepgmm.methods.model_spec import ModelReference
from monai_deepgmm.methods.network import TrainedConfig
from monai_deepgmm.methods.settings import NOT_SET
from monai_deepgmm.methods.task import Images
from monai_deepgmm.methods.training_config import TrainingConfig
from monai_deepgmm.mixture.fit import Fit
from monai_deepgmm.protocol import Protocol


@dataclass(frozen=True)
class CohortConfig:
    """A network trained on the cohort itself: what can be set is what a training has, its teacher's settings included.

    Attributes:
        training: how the network is trained.
        network: the definition that ``networks.registry.build`` takes; None: the paper's U-Net, with which its
            intervals were calibrated.
        model: the trained network; None until there is one.
    """

    name: ClassVar[str] = "cohort"
    named: ClassVar[bool] = True
    takes_means: ClassVar[bool] = False
    surroundings: ClassVar[bool] = True
    walled: ClassVar[bool] = True

    training: TrainingConfig = field(default_factory=TrainingConfig)
    network: Mapping[str, Any] | None = field(default=None, metadata=NOT_SET)
    model: ModelReference | None = field(default=None, metadata=NOT_SET)

    @property
    def presence(self) -> bool:
        """Whether regions must meet the protocol's criteria: where they must for the teacher."""
        return bool(getattr(self.training.teacher, "presence", False))

    def resolved(self, protocol: Protocol) -> Self:
        """As it is: the training is resolved when it is configured."""
        return self

    def solve(self, images: Images, *, device: str = "cpu") -> Fit:
        """As the trained network does.

        Raises:
            UsageError: the network has not been trained yet.
        """
        if self.model is None:
            raise UsageError("--method cohort: its network has not been trained yet")
        return TrainedConfig(model=self.model).solve(images, device=device)
