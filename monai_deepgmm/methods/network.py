"""``network``: a trained network segments in a forward pass, alone or together with the anatomical mixture."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import ClassVar, Self

import torch
from torch import Tensor

from monai_deepgmm.errors import UsageError
from monai_deepgmm.methods.anatomy import AnatomicalConfig
from monai_deepgmm.methods.model_spec import ModelReference
from monai_deepgmm.methods.settings import NOT_SET, check_choice
from monai_deepgmm.methods.task import Images
from monai_deepgmm.methods.training_config import LABEL_RULES, LabelRule
from monai_deepgmm.mixture.fit import Fit
from monai_deepgmm.protocol import Protocol

#: How much a network's word counts beside that of the anatomical mixture, where both are heard.
NETWORK_WEIGHT = 0.3


@dataclass(frozen=True)
class TrainedConfig:
    """A network that ``deepgmm train`` has trained.

    Attributes:
        label_rule: posterior: a label is the most probable component of Π·g; network: of Π alone; both: of a weighted
            mean of Π and the anatomical mixture's responsibilities; null: as it was trained for.
        presence: whether a tissue's regions must meet the protocol's criteria; null: where the teacher had them.
        model: the trained network.
    """

    name: ClassVar[str] = "network"
    named: ClassVar[bool] = True
    takes_means: ClassVar[bool] = True
    surroundings: ClassVar[bool] = True
    walled: ClassVar[bool] = True

    label_rule: LabelRule | None = None
    presence: bool | None = None
    model: ModelReference | None = field(default=None, metadata=NOT_SET)

    def __post_init__(self) -> None:
        """Refuses what makes no sense.

        Raises:
            UsageError: a field holds a value that it cannot have.
        """
        check_choice("label_rule", self.label_rule, (None, *LABEL_RULES))
        check_choice("presence", self.presence, (None, True, False))

    def resolved(self, protocol: Protocol) -> Self:
        """With the model's own rules.

        Raises:
            UsageError: there is no model, or the protocol has no anatomy to go with it.
        """
        if self.model is None:
            raise UsageError("--method network and a trained model go together: name one with --model MODEL_DIR")
        if self.label_rule == "both" and protocol.anatomy is None:
            raise UsageError("label_rule: both needs a protocol that says where tissues can be")
        training = self.model.spec.training
        presence = training.teacher.name == "anatomy" and getattr(training.teacher, "presence", False)
        return replace(
            self,
            label_rule=self.label_rule or training.label_rule,
            presence=presence if self.presence is None else self.presence,
        )

    def solve(self, images: Images, *, device: str = "cpu") -> Fit:
        """One forward pass, and one M-step from what the network says.

        Raises:
            StudyError: ``E_MODEL``, the trained network cannot be loaded or run.
        """
        from monai_deepgmm.methods import trained_network  # MONAI's networks take a second to import

        model = self.resolved(images.protocol).model
        if model is None:
            raise ValueError("no model")
        rule = self.label_rule or model.spec.training.label_rule
        found = trained_network.apply_network(
            trained_network.load(model, device),
            model.spec,
            images.image,
            images.mask,
            spacing_mm=images.spacing_mm,
            posterior=rule == "posterior",
            sequences=images.sequences,
            merge=_merge(images.protocol, model.spec.sequences, images.sequences),
        )
        if rule != "both":
            return found
        teacher = model.spec.training.teacher
        own = (teacher if isinstance(teacher, AnatomicalConfig) else AnatomicalConfig()).solve(images)
        return found._replace(resp=NETWORK_WEIGHT * found.resp + (1 - NETWORK_WEIGHT) * own.resp)


def _merge(protocol: Protocol, known: tuple[str, ...], present: tuple[str, ...]) -> Tensor:
    """Which of the tissues that the known sequences show make up each that the present ones show ``(T, K)``."""
    target = protocol.merged(present, components=True)
    shown, all_of_them = protocol.components(present), protocol.components(known)
    return torch.tensor([[float(target[t.index] == mine.index) for t in all_of_them] for mine in shown])
