"""A cohort → what a network is trained on, and how (S Alg. 4): the settings, the plan, the prepared cohort.

The engine, the optimiser and the loaders are MONAI's and torch's, and stand in ``train.json``.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import importlib.util
import json
import math
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from monai_deepgmm import protocol as protocols
from monai_deepgmm.errors import NobodyError, StudyError, UsageError
from monai_deepgmm.images.nifti import DEFAULT_MAX_VOXELS
from monai_deepgmm.methods.config import (
    DEFAULT_COVARIANCE,
    Means,
    check_device,
    check_numbers,
    chosen,
    network_definition,
    read_means,
)
from monai_deepgmm.methods.naming import name
from monai_deepgmm.mixture.gaussian import COVARIANCES, Covariance
from monai_deepgmm.networks.gmm_loss import GMMLoss, TotalLoss
from monai_deepgmm.networks.model_spec import (
    GRID_MM,
    LABEL_RULES,
    TEACHERS,
    LabelRule,
    Spec,
    Teacher,
    check_window,
    window_sides,
)
from monai_deepgmm.networks.nll_loss import MixtureNLL, Staged, Term
from monai_deepgmm.networks.registry import DEFAULT, inferer, logits
from monai_deepgmm.patients.study import Cohort
from monai_deepgmm.protocol import Protocol
from monai_deepgmm.training import dataset as examples
from monai_deepgmm.training import label_split as labelled
from monai_deepgmm.training.dataset import Example

METHODS: Mapping[str, str] = {"deepg": "nll", "deepsvg": "nll_v"}
#: Each loss's method: Ma's have one π per image, as deepG has.
LOSSES: Mapping[str, str] = {
    "nll": "deepg",
    "nll_v": "deepsvg",
    **dict.fromkeys(("gmm", "gmm_tv", "gmm_bias"), "deepg"),
}
#: The loss beside a few labels where none is asked for.
WITH_LABELS = "gmm_tv"
#: What Ma's losses begin with where nothing is asked for: γ of the total variation, P of the field's polynomials.
GAMMA: Mapping[str, float] = {"gmm": 0.0, "gmm_tv": 0.03, "gmm_bias": 0.0}
DEGREE: Mapping[str, int] = {"gmm": 0, "gmm_tv": 0, "gmm_bias": 3}
#: P where tissues lie around each other: a bowl, of degree 2, would be both a coil's and theirs.
DEGREE_OF_RINGS = 1
#: The share of the epochs that the teacher has alone. A field fitted to a network that knows no tissues yet is the
#: whole image, and no contrast is left to learn from.
START_SHARE: Mapping[str, float] = {"gmm": 1 / 3, "gmm_tv": 1 / 3, "gmm_bias": 1 / 3}
ALPHA, BETA = 1.0, 0.3
#: Epochs where none are asked for: as many as give this number of gradient steps, but within these bounds.
STEPS, EPOCHS = 320, (10, 100)
#: What a teacher's word is worth beside the likelihood (as ``start_weight``), how often a sequence is hidden, and where
#: the final label comes from.
START_WEIGHT: Mapping[Teacher, float] = {"signature": 0.3, "anatomy": 3.0}
#: The same beside labels, where β takes its share of it.
START_WEIGHT_WITH_LABELS: Mapping[Teacher, float] = {"signature": 1.0, "anatomy": 3.0}
DROP: Mapping[Teacher, float] = {"signature": 0.0, "anatomy": 0.25}
LABELS: Mapping[Teacher, LabelRule] = {"signature": "posterior", "anatomy": "both"}
#: Sides of the windows that volumes are seen by, where nothing is asked for.
WINDOW = 96
#: Settings that change no weight, so that a training may go on with others.
INDIFFERENT = ("workers", "tensorboard", "mlflow", "labels")


@dataclass(frozen=True)
class Settings:
    """How a network is trained; every field can be reached by ``--set field=value``.

    Attributes:
        covariance: of the mixture: diag, full, tied or spherical; None: the method's own.
        batch_size: images in a gradient step, on each rank.
        lr: AdamW's learning rate; it decays polynomially (power 0.9) to 0.
        weight_decay: AdamW's.
        clip: the largest norm of a gradient.
        start_epochs: epochs of the cross-entropy to the expected map alone; None: the loss's own share of them
            (``START_SHARE``).
        start_weight: how much of that cross-entropy is kept afterwards, as a prior on Π; None: as the teacher deserves
            (``START_WEIGHT``).
        teacher: what says where tissues are expected: signature, or anatomy (the anatomical mixture); None: anatomy
            where the protocol has one and no means are given.
        drop: the probability that one of an example's sequences is hidden from the network. Above 0, patients who lack
            a sequence are trained on too, and can be segmented. None: as the teacher has it (``DROP``).
        gamma: gmm_tv, gmm_bias: γ of the total variation per voxel; None: the loss's own (``GAMMA``).
        degree: gmm_bias: the highest degree of the field's polynomials; None: ``DEGREE``, or where the protocol has an
            anatomy ``DEGREE_OF_RINGS``.
        rounds: gmm_bias: how many times the field and the mixture are found in turn.
        alpha: with labels: the weight of their cross-entropy; None: ``ALPHA``.
        beta: with labels: the weight of the label-free loss, that of the teacher included; None: ``BETA``.
        mean_weight: λ of ‖μ − μ_data‖², where μ_data is known.
        mean_over: image, or batch (as the paper's code has it).
        validation: the share of patients that is not trained on; 0: the loss on all of them is watched instead.
        tol: the training stops when the validation loss has gained less than this in ``patience`` epochs.
        patience: see ``tol``.
        grid_mm: the voxel size that images are brought to.
        labels: posterior, network or both; see ``spec.Spec``; None: as the teacher has it (``LABELS``).
        window: the size that the network is given at a time, one number or one for each axis, multiples of
            ``spec.MULTIPLE``; an axis that is shorter is seen whole. 0: images are seen whole. None: 0 for slices, and
            ``WINDOW`` for volumes. The likelihood is that of each window's own mixture.
        windows: how many windows of each image are drawn in an epoch; None: as many as hold its voxels.
        augment: whether examples are turned, bent and noised.
        workers: processes that make examples.
        amp: whether the network runs in mixed precision on a GPU; the NLL never does.
        tensorboard: whether to write events for TensorBoard.
        mlflow: an MLflow tracking URI; None: none.
    """

    covariance: Covariance | None = None
    batch_size: int = 4
    lr: float = 1e-3
    weight_decay: float = 1e-3
    clip: float = 12.0
    start_epochs: int | None = None
    start_weight: float | None = None
    teacher: Teacher | None = None
    drop: float | None = None
    gamma: float | None = None
    degree: int | None = None
    rounds: int = 2
    alpha: float | None = None
    beta: float | None = None
    mean_weight: float = 1.0
    mean_over: Literal["image", "batch"] = "image"
    validation: float = 0.1
    tol: float = 0.005
    patience: int = 10
    grid_mm: float = 1.0
    labels: LabelRule | None = None
    window: int | tuple[int, ...] | None = None
    windows: int | None = None
    augment: bool = True
    workers: int = 0
    amp: bool = True
    tensorboard: bool = False
    mlflow: str | None = None

    def __post_init__(self) -> None:
        """Refuses what makes no sense.

        Raises:
            UsageError: a field holds a value that it cannot have.
        """
        floats = ("lr", "weight_decay", "clip", "start_weight", "mean_weight", "validation", "tol", "grid_mm", "drop")
        whole = {"batch_size": (int, 1), "start_epochs": (int, 0), "patience": (int, 1), "workers": (int, 0)}
        check_numbers(self, whole | dict.fromkeys(("degree", "rounds", "windows"), (int, 1)))
        check_window(self.window)
        check_numbers(self, dict.fromkeys((*floats, "gamma", "alpha", "beta"), (float, 0)))
        if self.drop is not None and not self.drop <= 1:
            raise UsageError(f"drop: got {self.drop}, expected a probability")
        if not self.validation < 1 or not GRID_MM[0] <= self.grid_mm <= GRID_MM[1]:
            raise UsageError("validation must be below 1, and grid_mm from {} to {}".format(*GRID_MM))
        for field, choices in (
            ("covariance", (None, *COVARIANCES)),
            ("mean_over", ("image", "batch")),
            ("labels", (None, *LABEL_RULES)),
            ("teacher", (None, *TEACHERS)),
            ("augment", (True, False)),
            ("amp", (True, False)),
            ("tensorboard", (True, False)),
        ):
            if getattr(self, field) not in choices:
                listed = ", ".join(map(str, choices))
                raise UsageError(f"{field}: {getattr(self, field)!r} is unknown; choose one of {listed}")
        if not isinstance(self.mlflow, str | None):
            raise UsageError(f"mlflow: got {self.mlflow!r}, expected a tracking URI")
        for field, package in (("tensorboard", "tensorboard"), ("mlflow", "mlflow")):
            if getattr(self, field) and importlib.util.find_spec(package) is None:
                raise UsageError(f"{field} needs {package}: pip install 'monai-deepgmm[tracking]'")


@dataclass(frozen=True)
class Plan:
    """What a training was asked to do.

    Attributes:
        protocol: what to look for.
        method: deepg or deepsvg.
        loss: one of ``LOSSES``.
        network: the definition that ``networks.build`` takes.
        means: a file's μ_data; "cohort": estimated from the unlabelled cohort; None: none.
        labels: whose manual labels are used, as ``labelled.asked`` gives it; empty: nobody's.
        epochs: how many; None: enough.
        settings: the rest.
        seed: of the weights, the order and the augmentation.
        frame: which frame of a 4-D file.
        max_voxels: larger images are refused.
    """

    protocol: Protocol
    method: str
    loss: str
    network: Mapping[str, Any]
    means: Means | Literal["cohort"] | None
    labels: tuple[str, ...]
    epochs: int | None
    settings: Settings
    seed: int
    frame: int | None
    max_voxels: int

    @property
    def spatial(self) -> bool:
        """True for deepSVG."""
        return METHODS[self.method] == "nll_v"

    @property
    def shaded(self) -> bool:
        """Whether the loss finds a bias field."""
        return bool(DEGREE.get(self.loss))

    @property
    def covariance(self) -> Covariance:
        """The shape of Σ: as asked for, or the method's own; Ma's losses have a full one for each tissue."""
        if self.loss in GAMMA:
            return self.settings.covariance or "full"
        return self.settings.covariance or DEFAULT_COVARIANCE[self.method]  # type: ignore[index]

    def as_json(self) -> dict[str, Any]:
        """For the provenance, without the password that an MLflow URI may hold."""
        means = self.means if self.means is None or self.means == "cohort" else dataclasses.asdict(self.means)
        mlflow = self.settings.mlflow and re.sub("://.*@", "://***@", self.settings.mlflow)
        return {
            "protocol": self.protocol.name,
            "normalisation": self.protocol.normalisation,
            "method": self.method,
            "loss": self.loss,
            "network": dict(self.network),
            "means": means,
            "labels": list(self.labels),
            "epochs": self.epochs,
            "settings": {**dataclasses.asdict(self.settings), "covariance": self.covariance, "mlflow": mlflow},
            "seed": self.seed,
            "frame": self.frame,
        }


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
    device: str = "cpu",
) -> Plan:
    """A plan from what a user typed, on the command line or in the bundle's JSON.

    Args:
        protocol: a name, a YAML file, or one that was read.
        method: deepg or deepsvg; None: what the loss says, or else deepsvg.
        loss: nll_v (deepsvg), or nll, gmm, gmm_tv, gmm_bias (deepg); None: the method's own, or with labels
            ``WITH_LABELS``.
        network: what ``config.network_definition`` takes; None: the paper's U-Net.
        means: a file written by ``deepgmm means``, or "cohort".
        labels: what ``labelled.asked`` takes; None: no label is read.
        epochs: how many.
        settings: ``key=value`` strings, or a mapping, for the fields of ``Settings``.
        seed: of every random draw.
        frame: which frame of a 4-D file.
        max_voxels: larger images are refused.
        device: where the training is to run; the plan does not depend on it.

    Raises:
        UsageError: any of it is unknown or does not fit together, or the device cannot be used.
    """
    check_device(device)
    found = protocol if isinstance(protocol, Protocol) else protocols.load(protocol)
    words = labelled.asked(labels)
    method, loss = _method_and_loss(method, loss, semi_supervised=bool(words))
    if epochs is not None and epochs < 1:
        raise UsageError(f"--epochs: got {epochs}, expected at least 1")
    if not 0 <= seed < 1 << 63:
        raise UsageError(f"--seed: got {seed}, expected a whole number from 0 to 2^63 - 1")
    known = None if means is None else "cohort" if means == "cohort" else read_means(Path(means), found)
    if known is not None and DEGREE.get(loss):
        raise UsageError(f"--means: --loss {loss} has means on another scale, where 0 is no signal; use another loss")
    given = Settings(**chosen(settings, [f.name for f in dataclasses.fields(Settings)]))
    return Plan(
        protocol=found,
        method=method,
        loss=loss,
        network=dict(network_definition(network) or DEFAULT),
        means=known,  # type: ignore[arg-type]  # mypy widens the literal
        labels=words,
        epochs=epochs,
        settings=_of_loss(
            _resolved(given, found, known, loss, semi_supervised=bool(words)),
            found,
            loss,
            semi_supervised=bool(words),
        ),
        seed=seed,
        frame=frame,
        max_voxels=max_voxels,
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


def _of_loss(settings: Settings, protocol: Protocol, loss: str, *, semi_supervised: bool) -> Settings:
    """The settings with the loss's own in place of None.

    Raises:
        UsageError: a setting was given that the loss has no use for.
    """
    for field, used in (
        ("gamma", loss in ("gmm_tv", "gmm_bias")),
        ("degree", bool(DEGREE.get(loss))),
        ("alpha", semi_supervised),
        ("beta", semi_supervised),
    ):
        if getattr(settings, field) is not None and not used:
            where = "--labels" if field in ("alpha", "beta") else "--loss gmm_bias"
            where = "--loss gmm_tv or gmm_bias" if field == "gamma" else where
            raise UsageError(f"{field}: goes with {where}; leave it out, or choose that")
    degree = DEGREE_OF_RINGS if DEGREE.get(loss) and protocol.anatomy is not None else DEGREE.get(loss) or None
    own: dict[str, Any] = {"gamma": GAMMA[loss], "degree": degree} if loss in GAMMA else {}
    own |= {"alpha": ALPHA, "beta": BETA} if semi_supervised else {}
    return dataclasses.replace(settings, **{key: own[key] for key in own if getattr(settings, key) is None})


def _resolved(settings: Settings, protocol: Protocol, means: object, loss: str, *, semi_supervised: bool) -> Settings:
    """The settings with the teacher's own in place of None.

    Raises:
        UsageError: the teacher is one that the protocol does not have.
    """
    teacher = settings.teacher or ("signature" if protocol.anatomy is None or means is not None else "anatomy")
    if teacher == "anatomy" and protocol.anatomy is None:
        raise UsageError(f"teacher=anatomy: protocol {protocol.name} does not say where tissues can be")
    if settings.labels == "both" and protocol.anatomy is None:
        raise UsageError(f"labels=both: protocol {protocol.name} does not say where tissues can be")
    # What a sequence of zeros would spoil: a variance shared by all sequences, and an average over the batch.
    whole = settings.covariance == "spherical" or settings.mean_over == "batch"
    if whole and settings.drop:
        raise UsageError("drop: with covariance=spherical or mean_over=batch every patient needs all sequences")
    weights = START_WEIGHT_WITH_LABELS if semi_supervised else START_WEIGHT
    return dataclasses.replace(
        settings,
        teacher=teacher,
        start_weight=weights[teacher] if settings.start_weight is None else settings.start_weight,
        drop=settings.drop if settings.drop is not None else 0.0 if whole else DROP[teacher],
        # Ma's s is the posterior itself.
        labels=settings.labels or ("network" if loss in GAMMA else LABELS[teacher]),
        window=_window(settings.window, 2 if protocol.unit == "slice" else 3),
    )


def _window(asked: int | tuple[int, ...] | None, dims: int) -> int | tuple[int, ...] | None:
    """What is asked for as a side along each axis; 0 for whole images, and None where nobody asked."""
    asked = WINDOW if asked is None and dims == 3 else asked
    return window_sides(asked, dims) if asked else asked


def mixture_loss(plan: Plan, *, terms: Sequence[Term] = ()) -> nn.Module:
    """The label-free loss of a plan, called with ``cat([image, mask], 1)``.

    Args:
        plan: what was asked for.
        terms: regularisers with their weights.
    """
    if plan.loss not in GAMMA:
        return MixtureNLL(spatial=plan.spatial, covariance=plan.covariance, terms=terms)
    settings = plan.settings
    return GMMLoss(
        gamma=settings.gamma or 0.0,
        degree=settings.degree or 0,
        rounds=settings.rounds,
        covariance=plan.covariance,
        terms=terms,
    )


def whole_loss(loss: Staged, plan: Plan) -> nn.Module:
    """A plan's loss as the engine calls it, with the target of ``examples.prepare_batch``.

    Args:
        loss: the label-free one.
        plan: what was asked for.
    """
    if not plan.labels:
        return loss
    settings = plan.settings
    return TotalLoss(
        loss,
        alpha=ALPHA if settings.alpha is None else settings.alpha,
        beta=BETA if settings.beta is None else settings.beta,
    )


# The cohort ------------------------------------------------------------------------------------------------------


class Prepared(NamedTuple):
    """A cohort, ready to train on.

    Attributes:
        train: examples.
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
    spec: Spec
    means: Tensor
    means_source: str
    epochs: int
    patients: tuple[int, int]
    failed: dict[str, StudyError]
    fingerprint: str
    labelled: tuple[str, ...] = ()
    start_epochs: int = 0
    windows: int = 1


def prepare(cohort: Cohort, plan: Plan) -> Prepared:
    """Loads a cohort and makes its examples.

    Raises:
        UsageError: no patient can be used, the means lack a tissue or a sequence, or labels are asked for that are not
            there.
    """
    protocol, settings = plan.protocol, plan.settings
    allowed = labelled.of(cohort.studies, plan.labels, seed=plan.seed) if plan.labels else frozenset()
    teacher = settings.teacher or "signature"
    patients, failed = examples.load(
        cohort.studies,
        protocol,
        frame=plan.frame,
        max_voxels=plan.max_voxels,
        incomplete=bool(settings.drop),
        labelled=allowed,
    )
    if not patients:
        reasons = "; ".join(f"{who}: {why}" for who, why in list(failed.items())[:3])
        raise NobodyError(f"no patient can be trained on ({reasons or 'none found'})")
    sequences = examples.channels(patients, protocol)
    means, source = _means(plan, patients, sequences)
    made = examples.make(
        patients,
        protocol,
        grid_mm=settings.grid_mm,
        teacher=teacher,
        shaded=plan.shaded,
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
    spec = Spec(
        protocol=protocol.name,
        normalisation=protocol.normalisation,
        sequences=sequences,
        tissues=tuple(t.name for t in protocol.visible(sequences)),
        network=plan.network,
        spatial_dims=2 if protocol.unit == "slice" else 3,
        grid_mm=settings.grid_mm,
        size=size,
        window=window,
        spatial=plan.spatial,
        covariance=plan.covariance,
        labels=settings.labels or LABELS[teacher],
        teacher=teacher,
        incomplete=bool(settings.drop) and settings.augment,
    )
    read = json.dumps([_decisive(plan), [p.inputs for p in patients]], sort_keys=True)
    steps = math.ceil(len(train) * windows / settings.batch_size)
    epochs = plan.epochs or min(max(math.ceil(STEPS / steps), EPOCHS[0]), EPOCHS[1])
    start = math.floor(START_SHARE.get(plan.loss, 0.0) * epochs)
    return Prepared(
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


def _windows(settings: Settings, size: tuple[int, ...]) -> tuple[tuple[int, ...] | None, int]:
    """The window of images of a size, and how many of them are drawn from each image in an epoch."""
    asked = settings.window
    if not isinstance(asked, tuple):
        return None, settings.windows or 1
    window = tuple(min(sides) for sides in zip(asked, size, strict=True))
    return window, settings.windows or math.ceil(math.prod(size) / math.prod(window))


def _decisive(plan: Plan) -> dict[str, Any]:
    """All of a plan that can change a weight."""
    content = plan.as_json()
    content["settings"] = {k: v for k, v in content["settings"].items() if k not in INDIFFERENT}
    return content


def _means(plan: Plan, patients: Sequence[examples.Patient], sequences: tuple[str, ...]) -> tuple[Tensor, str]:
    visible = plan.protocol.visible(sequences)
    if plan.means == "cohort":
        whole = [p for p in patients if p.sequences == sequences]
        if not whole:
            raise UsageError("--means cohort: no patient has all the sequences")
        return examples.cohort_means(whole, plan.protocol), "cohort"
    if plan.means is None:
        return torch.full((len(visible), len(sequences)), torch.nan, dtype=torch.float64), "none"
    try:
        rows = [[plan.means.means[t.name][s] for s in sequences] for t in visible]
    except KeyError as error:
        raise UsageError(f"--means: no value for {error}, which these patients show; compute them anew") from error
    return torch.tensor(rows, dtype=torch.float64), "file"


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
    network: nn.Module, prepared: Prepared, *, device: torch.device | str, window: Sequence[int] | None = None
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
