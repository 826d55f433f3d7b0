"""How a network is trained on a cohort: the settings of a training, its teacher's and its preprocessing's included."""

from __future__ import annotations

import dataclasses
import importlib.util
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, Self, get_args

from monai_deepgmm.errors import UsageError
from monai_deepgmm.images.nifti import DEFAULT_MAX_VOXELS
from monai_deepgmm.images.preprocessing import Preprocessing
from monai_deepgmm.methods.anatomy import AnatomicalConfig
from monai_deepgmm.methods.settings import NOT_SET, changed, check_choice, check_keys, check_numbers, keys
from monai_deepgmm.mixture.gaussian import COVARIANCES, Covariance
from monai_deepgmm.networks.sizes import GRID_MM, check_window, window_sides
from monai_deepgmm.protocol import Protocol

LabelRule = Literal["posterior", "network", "both"]
LABEL_RULES: tuple[LabelRule, ...] = get_args(LabelRule)
#: Each loss's method: Ma's have one π per image, as deepG has.
LOSSES: Mapping[str, str] = {
    "nll": "deepg",
    "nll_v": "deepsvg",
    **dict.fromkeys(("gmm", "gmm_tv", "gmm_bias"), "deepg"),
}
#: Each method's loss where none is asked for.
METHODS: Mapping[str, str] = {"deepg": "nll", "deepsvg": "nll_v"}
#: The loss beside a few labels where none is asked for.
WITH_LABELS = "gmm_tv"
#: What Ma's losses begin with where nothing is asked for: γ of the total variation, P of the field's polynomials.
GAMMA: Mapping[str, float] = {"gmm": 0.0, "gmm_tv": 0.03, "gmm_bias": 0.0}
DEGREE: Mapping[str, int] = {"gmm": 0, "gmm_tv": 0, "gmm_bias": 3}
#: P where tissues lie around each other: a bowl, of degree 2, would be both a coil's and theirs.
DEGREE_OF_RINGS = 1
ALPHA, BETA = 1.0, 0.3
#: What a teacher's word is worth beside the likelihood (as ``start_weight``), how often a sequence is hidden, and where
#: the final label comes from.
START_WEIGHT: Mapping[str, float] = {"signature": 0.3, "anatomy": 3.0}
#: The same beside labels, where β takes its share of it.
START_WEIGHT_WITH_LABELS: Mapping[str, float] = {"signature": 1.0, "anatomy": 3.0}
DROP: Mapping[str, float] = {"signature": 0.0, "anatomy": 0.25}
LABEL_RULE: Mapping[str, LabelRule] = {"signature": "posterior", "anatomy": "both"}
#: Sides of the windows that volumes are seen by, where nothing is asked for.
WINDOW = 96


@dataclass(frozen=True)
class SignatureTeacher:
    """The protocol's signatures say where tissues are expected; there is nothing to set."""

    name: ClassVar[str] = "signature"


Teacher = SignatureTeacher | AnatomicalConfig
TEACHERS: Mapping[str, type[Teacher]] = {"signature": SignatureTeacher, "anatomy": AnatomicalConfig}


@dataclass(frozen=True)
class TrainingConfig:
    """How a network is trained.

    Attributes:
        method: deepg or deepsvg.
        loss: one of ``LOSSES``.
        teacher: what says where tissues are expected: the protocol's signatures, or the anatomical mixture.
        preprocessing: of the scans; patients to be segmented get the same.
        covariance: of the mixture: diag, full, tied or spherical; null: full for Ma's losses, else tied.
        batch_size: images in a gradient step, on each rank.
        lr: AdamW's learning rate; it decays polynomially (power 0.9) to 0.
        weight_decay: AdamW's weight decay.
        clip: the largest norm of a gradient.
        start_epochs: epochs of the cross-entropy to the expected map alone; null: none, and a third for Ma's losses.
        start_weight: how much of that cross-entropy is kept afterwards, as a prior on Π; null: by the teacher.
        drop: the probability that one of an example's sequences is hidden from the network. Above 0, patients who lack
            a sequence are trained on too, and can be segmented. null: by the teacher.
        gamma: gmm_tv, gmm_bias: γ of the total variation per voxel; null: the loss's own.
        degree: gmm_bias: the highest degree of the field's polynomials; null: 3, or 1 with an anatomy.
        rounds: gmm_bias: how many times the field and the mixture are found in turn.
        alpha: with labels: the weight of their cross-entropy; null: 1.
        beta: with labels: the weight of the label-free loss, that of the teacher included; null: 0.3.
        mean_weight: λ of ‖μ − μ_data‖², where μ_data is known.
        validation: the share of patients that is not trained on; 0: the loss on all of them is watched instead.
        tol: the training stops when the validation loss has gained less than this in ``patience`` epochs.
        patience: how many epochs; see ``tol``.
        grid_mm: the voxel size that images are brought to, in mm.
        label_rule: posterior: a label is the most probable component of Π·g; network: of Π alone; both: of a weighted
            mean of Π and the anatomical mixture's responsibilities; null: by the teacher.
        window: voxels that the network is given at a time, one number or one for each axis, multiples of 32; an axis
            that is shorter is seen whole. 0: images are seen whole. null: 0 for slices, 96 for volumes. The likelihood
            is that of each window's own mixture.
        windows: how many windows of each image are drawn in an epoch; null: as many as hold its voxels.
        augment: whether examples are turned, bent and noised.
        workers: processes that make examples.
        amp: whether the network runs in mixed precision on a GPU; the NLL never does.
        tensorboard: whether to write events for TensorBoard.
        mlflow: an MLflow tracking URI; null: none.
    """

    method: str = field(default="deepsvg", metadata=NOT_SET)
    loss: str = field(default="nll_v", metadata=NOT_SET)
    teacher: Teacher = field(default_factory=SignatureTeacher)
    preprocessing: Preprocessing = field(default_factory=Preprocessing)
    covariance: Covariance | None = None
    batch_size: int = 4
    lr: float = 1e-3
    weight_decay: float = 1e-3
    clip: float = 12.0
    start_epochs: int | None = None
    start_weight: float | None = None
    drop: float | None = None
    gamma: float | None = None
    degree: int | None = None
    rounds: int = 2
    alpha: float | None = None
    beta: float | None = None
    mean_weight: float = 1.0
    validation: float = 0.1
    tol: float = 0.005
    patience: int = 10
    grid_mm: float = 1.0
    label_rule: LabelRule | None = None
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
        check_numbers(self, dict.fromkeys((*floats, "gamma", "alpha", "beta"), (float, 0)))
        check_window(self.window)
        if self.drop is not None and not self.drop <= 1:
            raise UsageError(f"drop: got {self.drop}, expected a probability")
        if not self.validation < 1 or not GRID_MM[0] <= self.grid_mm <= GRID_MM[1]:
            raise UsageError("validation must be below 1, and grid_mm from {} to {}".format(*GRID_MM))
        check_choice("method", self.method, tuple(METHODS))
        check_choice("loss", self.loss, tuple(LOSSES))
        check_choice("covariance", self.covariance, (None, *COVARIANCES))
        check_choice("label_rule", self.label_rule, (None, *LABEL_RULES))
        for name in ("augment", "amp", "tensorboard"):
            check_choice(name, getattr(self, name), (True, False))
        # MLflow keeps no runs in plain folders any more.
        uri = self.mlflow is None or (isinstance(self.mlflow, str) and re.match(r"(?!file:)[\w+-]+:", self.mlflow))
        if not uri:
            raise UsageError(f"mlflow: got {self.mlflow!r}, expected a tracking URI, such as sqlite:///mlruns.db")
        for name, package in (("tensorboard", "tensorboard"), ("mlflow", "mlflow")):
            if getattr(self, name) and importlib.util.find_spec(package) is None:
                raise UsageError(f"{name} needs {package}: pip install {package}")

    @property
    def spatial(self) -> bool:
        """True for deepSVG."""
        return self.method == "deepsvg"

    @property
    def shaded(self) -> bool:
        """Whether the loss finds a bias field."""
        return bool(DEGREE.get(self.loss))

    @property
    def incomplete(self) -> bool:
        """Whether the network sees images that lack sequences, and so can segment them."""
        return bool(self.drop) and self.augment

    def resolved(self, protocol: Protocol, *, semi_supervised: bool = False) -> Self:
        """The settings with the loss's, the teacher's and the protocol's own in place of None.

        Raises:
            UsageError: a setting was given that the loss has no use for, or that the protocol does not allow.
        """
        self._check_use(semi_supervised=semi_supervised)
        if self.teacher.name == "anatomy" and protocol.anatomy is None:
            raise UsageError(f"teacher=anatomy: protocol {protocol.name} does not say where tissues can be")
        if self.label_rule == "both" and protocol.anatomy is None:
            raise UsageError(f"label_rule=both: protocol {protocol.name} does not say where tissues can be")
        # What a sequence of zeros would spoil: a variance shared by all sequences.
        whole = self.covariance == "spherical"
        if whole and self.drop:
            raise UsageError("drop: with covariance=spherical every patient needs all sequences")
        ma, name = self.loss in GAMMA, self.teacher.name
        own: dict[str, Any] = {
            "covariance": "full" if ma else "tied",
            "start_weight": (START_WEIGHT_WITH_LABELS if semi_supervised else START_WEIGHT)[name],
            "drop": 0.0 if whole else DROP[name],
            # Ma's s is the posterior itself.
            "label_rule": "network" if ma else LABEL_RULE[name],
        }
        own |= {"gamma": GAMMA[self.loss]} if ma else {}
        own |= {"degree": DEGREE_OF_RINGS if protocol.anatomy else DEGREE[self.loss]} if self.shaded else {}
        own |= {"alpha": ALPHA, "beta": BETA} if semi_supervised else {}
        missing = {key: value for key, value in own.items() if getattr(self, key) is None}
        return dataclasses.replace(self, **missing, window=_window(self.window, 2 if protocol.unit == "slice" else 3))

    def _check_use(self, *, semi_supervised: bool) -> None:
        for name, used, where in (
            # What `resolved` has filled in may be given again, as a model's folder does.
            (
                "gamma",
                self.loss in ("gmm_tv", "gmm_bias") or self.gamma == GAMMA.get(self.loss),
                "--loss gmm_tv or gmm_bias",
            ),
            ("degree", self.shaded, "--loss gmm_bias"),
            ("alpha", semi_supervised, "--labels"),
            ("beta", semi_supervised, "--labels"),
        ):
            if getattr(self, name) is not None and not used:
                raise UsageError(f"{name}: goes with {where}; leave it out, or choose that")

    def decisive(self) -> Self:
        """The same training without what can change no label: who makes examples, who watches, what is too large."""
        preprocessing = dataclasses.replace(self.preprocessing, max_voxels=DEFAULT_MAX_VOXELS)
        return dataclasses.replace(self, preprocessing=preprocessing, workers=0, tensorboard=False, mlflow=None)

    def as_json(self) -> dict[str, Any]:
        """Everything, with the teacher's name."""
        content = dataclasses.asdict(self)
        content["teacher"] = {"name": self.teacher.name, **dataclasses.asdict(self.teacher)}
        return content

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> Self:
        """The reverse.

        Raises:
            KeyError, TypeError, UsageError: it is no such content.
        """
        teacher = dict(content["teacher"])
        window = content["window"]
        return cls(
            **{
                **content,
                "teacher": TEACHERS[teacher.pop("name")](**teacher),
                "preprocessing": Preprocessing(**content["preprocessing"]),
                "window": tuple(window) if isinstance(window, list) else window,
            }
        )


def configure(
    values: Mapping[str, Any],
    protocol: Protocol,
    *,
    method: str = "deepsvg",
    loss: str = "nll_v",
    means: bool = False,
    semi_supervised: bool = False,
    preprocessing: Preprocessing | None = None,
) -> TrainingConfig:
    """A training's settings from what ``--set`` gave.

    Args:
        values: from ``settings.parsed``; ``teacher`` is a name, and the teacher's own settings may stand beside it.
        protocol: what to look for.
        method: deepg or deepsvg.
        loss: one of ``LOSSES``.
        means: whether class means are known; then the teacher is the protocol's signatures unless one is asked for.
        semi_supervised: whether some labels are used.
        preprocessing: of the scans, before ``values`` change it.

    Raises:
        UsageError: a key or a value is unknown, or does not fit the rest.
    """
    given = dict(values)
    name = given.pop("teacher", None)
    if isinstance(name, Mapping):  # as a model's folder has it
        given |= {f"teacher.{key}": value for key, value in name.items() if key != "name"}
        name = name["name"]
    if isinstance(inner := given.get("preprocessing"), Mapping):
        given.pop("preprocessing")
        given["n4"] = inner["n4"]
    check_choice("teacher", name, (None, *TEACHERS))
    name = name or ("signature" if protocol.anatomy is None or means else "anatomy")
    if name == "anatomy" and protocol.anatomy is None:
        raise UsageError(f"teacher=anatomy: protocol {protocol.name} does not say where tissues can be")
    begun = TrainingConfig(method, loss, TEACHERS[name](), preprocessing or Preprocessing())
    if isinstance(given.get("window"), list):
        given["window"] = tuple(given["window"])
    check_keys(given, [*keys(begun), "teacher"], "a training")
    asked: TrainingConfig = changed(begun, given, "a training")
    return asked.resolved(protocol, semi_supervised=semi_supervised)


def _window(asked: int | tuple[int, ...] | None, dims: int) -> int | tuple[int, ...] | None:
    """What is asked for as a side along each axis; 0 for whole images, and None where nobody asked."""
    asked = WINDOW if asked is None and dims == 3 else asked
    return window_sides(asked, dims) if asked else asked
