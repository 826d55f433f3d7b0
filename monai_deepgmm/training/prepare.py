"""A cohort, ready to train on (S Alg. 4): examples, what the network will expect, and how long it takes.

The engine, the optimiser and the loaders are MONAI's and torch's, and stand in ``train.json``.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from monai_deepgmm.errors import NobodyError, StudyError, UsageError
from monai_deepgmm.methods.model_spec import ModelSpec
from monai_deepgmm.methods.naming import name
from monai_deepgmm.methods.training_config import TrainingConfig
from monai_deepgmm.networks.registry import inferer, logits
from monai_deepgmm.patients.study import Cohort
from monai_deepgmm.training import dataset, label_split
from monai_deepgmm.training.augmentation import Example
from monai_deepgmm.training.plan import TrainingPlan

#: The share of the epochs that the teacher has alone. A field fitted to a network that knows no tissues yet is the
#: whole image, and no contrast is left to learn from.
START_SHARE: Mapping[str, float] = {"gmm": 1 / 3, "gmm_tv": 1 / 3, "gmm_bias": 1 / 3}
#: Epochs where none are asked for: as many as give this number of gradient steps, but within these bounds.
STEPS, EPOCHS = 320, (10, 100)


class PreparedCohort(NamedTuple):
    """A cohort, ready to train on.

    Attributes:
        train: dataset.
        validation: examples that the validation loss is computed on.
        spec: what the network will expect.
        means: μ_data ``(K, M)``; NaN everywhere where there is none.
        means_source: file, cohort or none.
        epochs: how many.
        patients: how many were trained on, and how many kept for validation.
        failed: patient → why it was not used.
        fingerprint: of the plan and of all that was read.
        labelled: the patients whose labels were used.
        start_epochs: epochs that the teacher has alone.
        windows: how many windows of each example are drawn in an epoch.
    """

    train: list[Example]
    validation: list[Example]
    spec: ModelSpec
    means: Tensor
    means_source: str
    epochs: int
    patients: tuple[int, int]
    failed: dict[str, StudyError]
    fingerprint: str
    labelled: tuple[str, ...] = ()
    start_epochs: int = 0
    windows: int = 1


def prepare_cohort(cohort: Cohort, plan: TrainingPlan) -> PreparedCohort:
    """Loads a cohort and makes its dataset.

    Raises:
        UsageError: no patient can be used, the means lack a tissue or a sequence, or labels are asked for that are not
            there.
    """
    protocol, settings = plan.protocol, plan.training
    allowed = label_split.of(cohort.studies, plan.labels, seed=plan.seed) if plan.labels else frozenset()
    patients, failed = dataset.load(
        cohort.studies,
        protocol,
        settings.preprocessing,
        incomplete=bool(settings.drop),
        labelled=allowed,
    )
    if not patients:
        reasons = "; ".join(f"{who}: {why}" for who, why in list(failed.items())[:3])
        raise NobodyError(f"no patient can be trained on ({reasons or 'none found'})")
    sequences = dataset.channels(patients, protocol)
    means, source = _means(plan, patients, sequences)
    made = dataset.make(
        patients,
        protocol,
        grid_mm=settings.grid_mm,
        teacher=settings.teacher,
        shaded=settings.shaded,
        labelled=bool(plan.labels),
    )
    with_labels = [p.name for p in patients if p.labels is not None]
    held = _held_out_with_labels(list(made), with_labels, settings.validation, plan.seed)
    train = [e for who, own in made.items() if who not in held for e in own]
    validation = [e for who, own in made.items() if who in held for e in own]
    if not train:
        raise NobodyError("no image of the cohort has enough voxels inside the mask to be trained on")
    size = tuple(train[0]["mask"].shape[1:])
    window, windows = _windows(settings, size)
    spec = ModelSpec(
        protocol=protocol.name,
        normalisation=settings.preprocessing.normalisation(protocol),
        sequences=sequences,
        tissues=tuple(t.name for t in protocol.components(sequences)),
        network=plan.network,
        spatial_dims=2 if protocol.unit == "slice" else 3,
        size=size,
        training=settings.decisive(),
        window=window,
    )
    rules = [str(study.spacing) for study in cohort.studies if study.spacing is not None]
    read = json.dumps([_decisive(plan), [p.inputs for p in patients], *rules[:1]], sort_keys=True)
    steps = math.ceil(len(train) * windows / settings.batch_size)
    epochs = plan.epochs or min(max(math.ceil(STEPS / steps), EPOCHS[0]), EPOCHS[1])
    start = math.floor(START_SHARE.get(settings.loss, 0.0) * epochs)
    return PreparedCohort(
        train=train,
        validation=validation or train,
        spec=spec,
        means=means,
        means_source=source,
        epochs=epochs,
        start_epochs=start if settings.start_epochs is None else settings.start_epochs,
        patients=(len(patients) - len(held), len(held)),
        labelled=tuple(with_labels),
        failed=failed,
        fingerprint=hashlib.sha256(read.encode()).hexdigest(),
        windows=windows,
    )


def _windows(settings: TrainingConfig, size: tuple[int, ...]) -> tuple[tuple[int, ...] | None, int]:
    """The window of images of a size, and how many of them are drawn from each image in an epoch."""
    asked = settings.window
    if not isinstance(asked, tuple):
        return None, settings.windows or 1
    window = tuple(min(sides) for sides in zip(asked, size, strict=True))
    return window, settings.windows or math.ceil(math.prod(size) / math.prod(window))


def _decisive(plan: TrainingPlan) -> dict[str, Any]:
    """All of a plan that can change a weight: where labels come from afterwards cannot."""
    training = dataclasses.replace(plan.training.decisive(), label_rule=None)
    return dataclasses.replace(plan, training=training).as_json()


def _means(plan: TrainingPlan, patients: Sequence[dataset.Patient], sequences: tuple[str, ...]) -> tuple[Tensor, str]:
    visible = plan.protocol.components(sequences)
    if plan.means == "cohort":
        whole = [p for p in patients if p.sequences == sequences]
        if not whole:
            raise UsageError("--means cohort: no patient has all the sequences")
        return dataset.cohort_means(whole, plan.protocol), "cohort"
    if plan.means is None:
        return torch.full((len(visible), len(sequences)), torch.nan, dtype=torch.float64), "none"
    try:
        return plan.means.tensor(visible, sequences), "file"
    except StudyError as error:
        raise UsageError(f"--means: {error}") from error


def _held_out(names: list[str], share: float, seed: int) -> set[str]:
    """Patients for validation: a share of them, at least one if there are five or more."""
    count = math.floor(len(names) * share) or (1 if share and len(names) >= 5 else 0)
    order = torch.randperm(len(names), generator=torch.Generator().manual_seed(seed)).tolist()
    return {names[i] for i in order[:count]}


def _held_out_with_labels(names: list[str], labelled: Collection[str], share: float, seed: int) -> set[str]:
    """The same share of those with labels as of those without; nobody, if that leaves no label to validate with."""
    if not labelled:
        return _held_out(names, share, seed)
    known = _held_out([n for n in names if n in labelled], share, seed)
    return known | _held_out([n for n in names if n not in labelled], share, seed) if known else set()


def agreement(
    network: nn.Module, prepared: PreparedCohort, *, device: torch.device | str, window: Sequence[int] | None = None
) -> list[bool]:
    """Whether each output of a trained network lies where its tissue is expected, over the whole training cohort."""
    network.eval()
    through = inferer(window)
    shared = []
    with torch.no_grad():
        for example in prepared.train:
            image, mask = example["image"][None].to(device), example["mask"][None].to(device)
            w = through(image, functools.partial(logits, network)).softmax(1) * mask
            shared.append((w.flatten(2).cpu(), example["expected"][None].flatten(2)))
    resp, expected = (torch.cat(parts, 2) for parts in zip(*shared, strict=True))
    order = name(resp, expected).order[0].tolist()
    return [component == tissue for tissue, component in enumerate(order)]
