"""What a training was asked to do: one immutable object, built alike by the command line and by ``train.json``."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from torch import nn

from monai_deepgmm import protocol as protocols
from monai_deepgmm.errors import UsageError
from monai_deepgmm.images.nifti import DEFAULT_MAX_VOXELS
from monai_deepgmm.images.preprocessing import Preprocessing
from monai_deepgmm.methods import known_means, training_config
from monai_deepgmm.methods.config import usable_device
from monai_deepgmm.methods.known_means import Means
from monai_deepgmm.methods.settings import parsed
from monai_deepgmm.methods.training_config import ALPHA, BETA, GAMMA, LOSSES, METHODS, WITH_LABELS, TrainingConfig
from monai_deepgmm.networks.definition import network_definition
from monai_deepgmm.networks.gmm_loss import GMMLoss, TotalLoss
from monai_deepgmm.networks.nll_loss import MixtureNLL, Staged, Term
from monai_deepgmm.networks.registry import DEFAULT, QUICK
from monai_deepgmm.protocol import Protocol
from monai_deepgmm.registration import Align
from monai_deepgmm.training import label_split

#: The network where none is asked for, by the protocol's unit.
DEFAULTS: dict[str, Mapping[str, Any]] = {"slice": QUICK, "volume": DEFAULT}


@dataclass(frozen=True)
class TrainingPlan:
    """What a training was asked to do.

    Attributes:
        protocol: what to look for.
        training: how, the teacher's settings and the preprocessing included.
        network: the definition that ``networks.registry.build`` takes.
        means: a file's μ_data; "cohort": estimated from the unlabelled cohort; None: none.
        labels: whose manual labels are used, as ``label_split.asked`` gives it; empty: nobody's.
        epochs: how many; None: enough.
        seed: of the weights, the order and the augmentation.
        trusted: whether the network's code is a stranger's, which the user trusts (``--trust-code``).
    """

    protocol: Protocol
    training: TrainingConfig
    network: Mapping[str, Any]
    means: Means | Literal["cohort"] | None = None
    labels: tuple[str, ...] = ()
    epochs: int | None = None
    seed: int = 0
    trusted: bool = False

    def as_json(self) -> dict[str, Any]:
        """For the provenance, without the password that an MLflow URI may hold."""
        means = self.means if self.means is None or self.means == "cohort" else dataclasses.asdict(self.means)
        mlflow = self.training.mlflow and re.sub("://.*@", "://***@", self.training.mlflow)
        return {
            "protocol": self.protocol.name,
            "normalisation": self.training.preprocessing.normalisation(self.protocol),
            "training": {**self.training.as_json(), "mlflow": mlflow},
            "network": dict(self.network),
            "means": means,
            "labels": list(self.labels),
            "epochs": self.epochs,
            "seed": self.seed,
        } | ({"trust_code": True} if self.trusted else {})


def plan(
    *,
    protocol: str | Path | Protocol = "infarct",
    method: str | None = None,
    loss: str | None = None,
    network: str | Mapping[str, Any] | None = None,
    means: str | Path | None = None,
    labels: str | Sequence[str] | None = None,
    epochs: int | None = None,
    settings: Sequence[str] | Mapping[str, Any] = (),
    seed: int = 0,
    frame: int | None = None,
    max_voxels: int = DEFAULT_MAX_VOXELS,
    align: Align = "auto",
    device: str = "cpu",
    trust_code: bool = False,
) -> TrainingPlan:
    """A plan from what a user typed, on the command line or in the bundle's JSON.

    Args:
        protocol: a name, a YAML file, or one that was read.
        method: deepg or deepsvg; None: what the loss says, or else deepsvg.
        loss: nll_v (deepsvg), or nll, gmm, gmm_tv, gmm_bias (deepg); None: the method's own, or with labels
            ``WITH_LABELS``.
        network: what ``network_definition`` takes; None: quickunet for slices, the paper's U-Net for
            volumes.
        means: a file written by ``deepgmm means``, or "cohort".
        labels: what ``label_split.asked`` takes; None: no label is read.
        epochs: how many.
        settings: ``key=value`` strings, or a mapping, for the fields of ``TrainingConfig``.
        seed: of every random draw.
        frame: which frame of a 4-D file.
        max_voxels: larger images are refused.
        align: how sequences are brought together: auto, off or rigid.
        device: where the training is to run; the plan does not depend on it.
        trust_code: whether the network may be a class that this software does not know, whose code is then run.

    Raises:
        UsageError: any of it is unknown or does not fit together, or the device cannot be used.
    """
    usable_device(device)
    found = protocol if isinstance(protocol, Protocol) else protocols.load(protocol)
    words = label_split.asked(labels)
    if epochs is not None and epochs < 1:
        raise UsageError(f"--epochs: got {epochs}, expected at least 1")
    if not 0 <= seed < 1 << 63:
        raise UsageError(f"--seed: got {seed}, expected a whole number from 0 to 2^63 - 1")
    method, loss = _method_and_loss(method, loss, semi_supervised=bool(words))
    if means is not None and training_config.DEGREE.get(loss):
        raise UsageError(f"--means: --loss {loss} has means on another scale, where 0 is no signal; use another loss")
    training = training_config.configure(
        parsed(settings),
        found,
        method=method,
        loss=loss,
        means=means is not None,
        semi_supervised=bool(words),
        preprocessing=Preprocessing(frame=frame, max_voxels=max_voxels, align=align),
    )
    known: Means | Literal["cohort"] | None = None if means is None else "cohort"
    if means is not None and means != "cohort":
        known = known_means.read(Path(means), found, training.preprocessing)
    definition, trusted = network_definition(network, trust_code=trust_code)
    return TrainingPlan(
        protocol=found,
        training=training,
        network=dict(definition or DEFAULTS[found.unit]),
        means=known,
        labels=words,
        epochs=epochs,
        seed=seed,
        trusted=trusted,
    )


def _method_and_loss(method: str | None, loss: str | None, *, semi_supervised: bool) -> tuple[str, str]:
    """Both, from what was asked for of either.

    Raises:
        UsageError: one of them is unknown, or they do not belong together.
    """
    if loss is not None and loss not in LOSSES:
        raise UsageError(f"--loss: {loss!r} is unknown; choose one of {', '.join(LOSSES)}")
    if method is None and loss is None and semi_supervised:
        loss = WITH_LABELS
    method = method or (LOSSES[loss] if loss else "deepsvg")
    if method not in METHODS:
        raise UsageError(f"--method: {method!r} trains no network; choose one of {', '.join(METHODS)}")
    if loss is not None and LOSSES[loss] != method:
        own = ", ".join(name for name, whose in LOSSES.items() if whose == method)
        raise UsageError(f"--loss {loss} is not a loss of --method {method}, which has {own}")
    return method, loss or METHODS[method]


def mixture_loss(plan: TrainingPlan, *, terms: Sequence[Term] = ()) -> nn.Module:
    """The label-free loss of a plan, called with ``cat([image, mask], 1)``.

    Args:
        plan: what was asked for.
        terms: regularisers with their weights.
    """
    settings, shape = plan.training, plan.training.covariance or "tied"
    if settings.loss not in GAMMA:
        return MixtureNLL(spatial=settings.spatial, covariance=shape, terms=terms)
    return GMMLoss(
        gamma=settings.gamma or 0.0,
        degree=settings.degree or 0,
        rounds=settings.rounds,
        covariance=shape,
        terms=terms,
    )


def whole_loss(loss: Staged, plan: TrainingPlan) -> nn.Module:
    """A plan's loss as the engine calls it, with the target of ``dataset.prepare_batch``.

    Args:
        loss: the label-free one.
        plan: what was asked for.
    """
    if not plan.labels:
        return loss
    settings = plan.training
    return TotalLoss(
        loss,
        alpha=ALPHA if settings.alpha is None else settings.alpha,
        beta=BETA if settings.beta is None else settings.beta,
    )
