"""What a run was asked to do: one immutable object, built alike by the command line and by the bundle's JSON."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

import yaml

from monai_deepgmm import protocol as protocols
from monai_deepgmm.errors import UsageError
from monai_deepgmm.images.nifti import DEFAULT_MAX_VOXELS
from monai_deepgmm.mixture import map_em as mapem
from monai_deepgmm.mixture import partial_volume as pvgmm
from monai_deepgmm.mixture.gaussian import COVARIANCES, VARIANCE_FLOOR, Covariance
from monai_deepgmm.networks import model_spec as spec
from monai_deepgmm.networks.model_spec import LABEL_RULES, LabelRule, Reference
from monai_deepgmm.protocol import Protocol

Method = Literal["gmm", "svgmm", "deepg", "deepsvg", "anatomy", "pvgmm", "network", "cohort"]
METHODS: tuple[Method, ...] = get_args(Method)
#: The method where none is asked for: of a protocol that knows where tissues can be, of one that knows which of them
#: touch, and of any other.
WITH_ANATOMY: Method = "anatomy"
WITH_BORDERS: Method = "pvgmm"
DEFAULT_METHOD: Method = "svgmm"
STARTS = ("signature", "kmeans")
#: The shape of Σ where none is asked for. The paper's is diag; for the SVGMM one shared matrix is clearly better.
DEFAULT_COVARIANCE: Mapping[Method, Covariance] = {
    "gmm": "diag",
    "svgmm": "tied",
    "deepg": "tied",
    "deepsvg": "tied",
    "anatomy": "full",
    "pvgmm": "full",
    "cohort": "tied",
}
#: The methods that can find a bias field, and the degree of its polynomials where none is asked for.
DEFAULT_DEGREE: Mapping[Method, int] = {"gmm": 0, "svgmm": 0, "pvgmm": 3}
#: A bias field of a higher degree is no longer smooth.
MAX_DEGREE = 6
#: The methods that fit a network to the image itself.
DEEP: tuple[Method, ...] = ("deepg", "deepsvg")
#: Their tolerance (S §4.1) where none is asked for: NLL per voxel that a gradient step gains.
DEEP_TOL = 1e-3
#: The tolerance where none is asked for. A whole volume has hundreds of times the voxels of a slice, and an SVGMM on
#: it creeps on for minutes over gains that change next to no label.
DEFAULT_TOL: Mapping[str, float] = {"slice": 1e-6, "volume": 1e-4}


@dataclass(frozen=True)
class Solver:
    """How a mixture is fitted; every field can be reached by ``--set field=value``.

    Attributes:
        covariance: diag, full, tied or spherical; None: the method's own (``DEFAULT_COVARIANCE``).
        start: signature (the protocol's map of where each tissue is expected) or kmeans. Known means come first.
        restarts: how many k-means++ starts are tried; the one with the lowest NLL is kept.
        tol: a fit has converged when its NLL per voxel gains less than this in one iteration;
            None: the unit's own (``DEFAULT_TOL``).
        max_iter: iterations at most.
        floor: the variance floor, as a fraction of a sequence's variance inside the mask.
        start_steps: deepg, deepsvg: gradient steps that bring the network to the start.
        start_weight: deepg, deepsvg: how much of the cross-entropy to the start is kept after them.
        steps: deepg, deepsvg: gradient steps on the NLL, at most.
        lr: deepg, deepsvg: the learning rate.
        window: deepg, deepsvg: sides of the random windows that a network is fitted to, in voxels; 0: whole images.
        together: deepg, deepsvg: one network for all images of a patient instead of one for each.
        mean_weight: deepg, deepsvg with known means: λ of the regulariser ‖μ − μ_data‖².
        sigma_mm: anatomy: the neighbourhood over which Π is averaged, a Gaussian's standard deviation.
        temper: anatomy: what one voxel is worth as an observation, 0 to 1.
        dof: anatomy: degrees of freedom of Student's t, the shape of a component; null: a Gaussian.
        outliers: anatomy: the share of voxels that belong to no component.
        degree: gmm, svgmm, pvgmm: of the bias field's polynomials, 0 for no field; None: the method's own
            (``DEFAULT_DEGREE``), and pvgmm drops a field that explains less than it costs.
        n4: whether SimpleITK's N4 takes the shading off before anything else; then no field is fitted.
        pooling: pvgmm: how far each tissue's covariance is drawn towards the average of all.
        coupling: pvgmm: how strongly neighbouring voxels agree.
        perturbations: anatomy: how many fits with moved priors show how far volumes depend on them.
        presence: whether a tissue's regions must show the protocol's evidence to be believed; None: as the method has
            it (anatomy does, and a network that it taught).
        labels: deepg, deepsvg, network: posterior (a label is the most probable component of Π·g), network (of Π alone)
            or both (of a network and the anatomical mixture); None: posterior, or what the trained network says.
    """

    covariance: Covariance | None = None
    start: str = "signature"
    restarts: int = 1
    tol: float | None = None
    max_iter: int = 3000
    floor: float = VARIANCE_FLOOR
    start_steps: int = 20
    start_weight: float = 0.3
    steps: int = 30
    lr: float = 1e-3
    window: int | tuple[int, ...] | None = None
    together: bool = False
    mean_weight: float = 1.0
    sigma_mm: float = 2.2
    temper: float = 0.3
    dof: float | None = 10.0
    outliers: float = 0.0
    degree: int | None = None
    n4: bool = False
    pooling: float = 0.1
    coupling: float = 3.0
    perturbations: int = 3
    presence: bool | None = None
    labels: LabelRule | None = None

    def __post_init__(self) -> None:
        """Refuses what makes no sense.

        Raises:
            UsageError: a field holds a value that it cannot have.
        """
        _choice("covariance", self.covariance, (None, *COVARIANCES))
        _choice("start", self.start, STARTS)
        check_numbers(
            self,
            dict.fromkeys(("restarts", "max_iter", "steps"), (int, 1))
            | dict.fromkeys(("start_steps", "perturbations", "degree"), (int, 0))
            | dict.fromkeys(("tol", "floor", "lr", "start_weight", "mean_weight"), (float, 0))
            | dict.fromkeys(("sigma_mm", "temper", "outliers", "pooling", "coupling"), (float, 0))
            | {"dof": (float, 1)},
        )
        if not (self.temper <= 1 and self.outliers < 1):
            raise UsageError("temper must be at most 1, and outliers below 1")
        if self.degree is not None and self.degree > MAX_DEGREE:
            raise UsageError(f"degree: got {self.degree}, expected at most {MAX_DEGREE}")
        if self.n4 and self.degree:
            raise UsageError("n4 and degree: the shading is taken off once; choose one of them")
        _choice("n4", self.n4, (True, False))
        spec.check_window(self.window)
        _choice("together", self.together, (True, False))
        _choice("presence", self.presence, (None, True, False))
        _choice("labels", self.labels, (None, *LABEL_RULES))


@dataclass(frozen=True)
class Means:
    """Known class means, μ_data (S §4.2).

    Attributes:
        protocol: the protocol's name.
        normalisation: the one they were computed with; with any other they mean nothing.
        means: tissue → sequence → value.
        n_slices: how many images they were averaged over.
    """

    protocol: str
    normalisation: str
    means: Mapping[str, Mapping[str, float]]
    n_slices: int


@dataclass(frozen=True)
class Config:
    """Everything besides the input files that decides a patient's labels.

    Attributes:
        protocol: what to look for.
        method: which solver.
        means: μ_data, or None.
        solver: how it fits.
        network: deepg, deepsvg, cohort: the definition that ``networks.build`` takes; None: the paper's U-Net.
        model: network: the trained one; cohort: None until it is.
        seed: of every random draw; each patient starts from it anew.
        frame: which frame of a 4-D file, counted from 0.
        max_voxels: larger images are refused.
        probabilities: also write one probability map per tissue.
        fields: also write each sequence's bias field, and the image without it.
        device: where tensors live: cpu, cuda, cuda:1 …
    """

    protocol: Protocol
    method: Method = DEFAULT_METHOD
    means: Means | None = None
    solver: Solver = field(default_factory=Solver)
    network: Mapping[str, Any] | None = None
    model: Reference | None = None
    seed: int = 0
    frame: int | None = None
    max_voxels: int = DEFAULT_MAX_VOXELS
    probabilities: bool = False
    fields: bool = False
    device: str = "cpu"

    def __post_init__(self) -> None:
        """Refuses an unknown method, options that it does not use, and a seed that torch cannot take.

        Raises:
            UsageError: the method is not one of ``METHODS``, a model is missing or not asked for, the same for a
                network's definition, or the seed does not fit into 63 bits.
        """
        _choice("method", self.method, METHODS)
        if self.method != "cohort" and (self.method == "network") != (self.model is not None):
            hint = "name one with --model MODEL_DIR" if self.model is None else "use --method network with it"
            raise UsageError(f"--method {self.method} and a trained model go together: {hint}")
        if self.network is not None and self.method not in (*DEEP, "cohort"):
            raise UsageError(f"--network: --method {self.method} fits no network; use {', '.join(DEEP)} or cohort")
        if self.method == "anatomy" and self.protocol.anatomy is None:
            raise UsageError(f"--method anatomy: protocol {self.protocol.name} does not say where tissues can be")
        if self.method == "pvgmm" and not self.protocol.borders:
            raise UsageError(
                f"--method pvgmm: protocol {self.protocol.name} does not say which tissues touch (borders)"
            )
        if self.method == "pvgmm" and self.solver.covariance not in (None, "full"):
            raise UsageError(f"covariance: pvgmm has one matrix per tissue (full), not {self.solver.covariance}")
        if self.solver.degree and self.method not in DEFAULT_DEGREE:
            raise UsageError(
                f"degree: --method {self.method} fits no bias field; use {', '.join(DEFAULT_DEGREE)} or n4"
            )
        if self.fields and not (self.degree or self.solver.n4):
            raise UsageError("--fields: no bias field is looked for; use --set n4=true, or degree with gmm or svgmm")
        if self.method in ("anatomy", "cohort", "pvgmm") and self.means is not None:
            raise UsageError(f"--means: --method {self.method} has the protocol's own priors; use another with means")
        learnt = self.model is not None or self.method == "cohort"
        if self.solver.labels == "both" and (self.protocol.anatomy is None or not learnt):
            raise UsageError("labels: both needs a trained network, and a protocol that says where tissues can be")
        if not 0 <= self.seed < 1 << 63:
            raise UsageError(f"--seed: got {self.seed}, expected a whole number from 0 to 2^63 - 1")

    @property
    def covariance(self) -> Covariance:
        """The shape of Σ: as asked for, or the method's own."""
        if self.model is not None:
            return self.model.spec.covariance
        return self.solver.covariance or DEFAULT_COVARIANCE[self.method]

    @property
    def tol(self) -> float:
        """The tolerance: as asked for, or the method's and unit's own."""
        if self.solver.tol is not None:
            return self.solver.tol
        if self.method in ("anatomy", "pvgmm"):
            return mapem.TOL if self.method == "anatomy" else pvgmm.TOL
        return DEEP_TOL if self.method in DEEP else DEFAULT_TOL[self.protocol.unit]

    @property
    def degree(self) -> int:
        """The degree of the bias field: as asked for, or the method's own; 0: no field."""
        if self.solver.degree is not None or self.solver.n4:
            return self.solver.degree or 0
        return DEFAULT_DEGREE.get(self.method, 0)

    @property
    def presence(self) -> bool:
        """Whether tissues need evidence: as asked for, or as the method has it."""
        if self.protocol.anatomy is None:
            return False
        if self.solver.presence is not None:
            return self.solver.presence
        return self.method == "anatomy" or (self.model is not None and self.model.spec.teacher == "anatomy")

    def as_json(self) -> dict[str, Any]:
        """For the sidecar: whatever can change a label. The device and ``--probabilities`` cannot."""
        protocol = json.dumps(dataclasses.asdict(self.protocol), sort_keys=True, default=list)
        return {
            "protocol": self.protocol.name,
            "protocol_sha256": hashlib.sha256(protocol.encode()).hexdigest(),
            "normalisation": self.protocol.normalisation,
            "method": self.method,
            "solver": {
                **dataclasses.asdict(self.solver),
                "covariance": self.covariance,
                "tol": self.tol,
            },
            "bias_degree": self.degree,
            "network": None if self.network is None else dict(self.network),
            "model": None if self.model is None else self.model.as_json(),
            "means": None if self.means is None else dataclasses.asdict(self.means),
            "seed": self.seed,
            "frame": self.frame,
        }


def build(
    *,
    protocol: str | Path = "infarct",
    method: str | None = None,
    means: str | Path | None = None,
    network: str | Mapping[str, Any] | None = None,
    model: str | Path | None = None,
    settings: Sequence[str] | Mapping[str, Any] = (),
    seed: int = 0,
    frame: int | None = None,
    max_voxels: int = DEFAULT_MAX_VOXELS,
    probabilities: bool = False,
    fields: bool = False,
    device: str = "cpu",
) -> Config:
    """A configuration from what a user typed, on the command line or in the bundle's JSON.

    Args:
        protocol: a name or a YAML file.
        method: one of ``METHODS``; None: the default.
        means: a file written by ``deepgmm means``.
        network: for deepg and deepsvg: what ``network_definition`` takes.
        model: for network: a folder written by ``deepgmm train``; it makes that method the default.
        settings: ``key=value`` strings, or a mapping, for the fields of ``Solver``.
        seed: of every random draw.
        frame: which frame of a 4-D file.
        max_voxels: larger images are refused.
        probabilities: also write probability maps.
        fields: also write bias fields and the images without them.
        device: cpu, cuda, cuda:1 …

    Raises:
        UsageError: any of it is unknown or does not fit together.
    """
    check_device(device)
    found = protocols.load(protocol)
    _choice("method", method, (None, *METHODS))
    return Config(
        protocol=found,
        method=method or default_method(found, means=means, model=model),  # type: ignore[arg-type]  # checked above
        means=None if means is None else read_means(Path(means), found),
        solver=solver(settings),
        network=network_definition(network),
        model=None if model is None else spec.read(Path(model), found),
        seed=seed,
        frame=frame,
        max_voxels=max_voxels,
        probabilities=probabilities,
        fields=fields,
        device=device,
    )


def default_method(protocol: Protocol, *, means: object = None, model: object = None) -> Method:
    """The method where none is asked for; with a trained model or known means, the one that uses them."""
    if model is not None:
        return "network"
    if means is not None:
        return DEFAULT_METHOD
    return WITH_ANATOMY if protocol.anatomy is not None else WITH_BORDERS if protocol.borders else DEFAULT_METHOD


def solver(settings: Sequence[str] | Mapping[str, Any]) -> Solver:
    """Solver settings from ``key=value`` strings or a mapping.

    Raises:
        UsageError: a string without ``=``, a key that is no field of ``Solver``, or a value it cannot have.
    """
    return Solver(**chosen(settings, [f.name for f in dataclasses.fields(Solver)]))


def chosen(settings: Sequence[str] | Mapping[str, Any], known: Sequence[str]) -> dict[str, Any]:
    """``--set``: values by name, from ``key=value`` strings or a mapping.

    Raises:
        UsageError: a string without ``=``, or a key that is not known.
    """
    if not isinstance(settings, Mapping):
        pairs = [setting.partition("=") for setting in settings]
        if broken := [key for key, equals, _ in pairs if not equals]:
            raise UsageError(f"--set {broken[0]}: expected key=value")
        settings = {key.strip(): _value(value) for key, _, value in pairs}
    if unknown := [key for key in settings if key not in known]:
        raise UsageError(f"--set {unknown[0]}: no such setting; choose from {', '.join(known)}")
    return dict(settings)


def network_definition(given: str | Mapping[str, Any] | None) -> Mapping[str, Any] | None:
    """A network as ``networks.build`` takes it.

    Args:
        given: a name, a class's dotted name, a mapping with ``_target_`` (also as text), or a JSON or YAML file of one.

    Raises:
        UsageError: the file cannot be read, or what it holds is no such mapping.
    """
    if given is None or isinstance(given, Mapping):
        return given
    text, name = given, given.strip()
    if name.endswith((".json", ".yaml", ".yml")):
        try:
            text = Path(name).read_text(encoding="utf-8")
        except (OSError, ValueError) as error:
            raise UsageError(f"--network {name}: cannot be read ({getattr(error, 'strerror', error)})") from error
    elif not name.startswith("{"):
        return {"_target_": name}
    try:
        found = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise UsageError(f"--network: not YAML or JSON ({error})") from error
    if not (isinstance(found, dict) and isinstance(found.get("_target_"), str)):
        raise UsageError(f"--network: expected a mapping with _target_, got {str(found)[:80]}")
    return found


def check_numbers(settings: object, limits: Mapping[str, tuple[type, float]]) -> None:
    """Refuses settings that are no finite numbers of their kind, or below their limit; None passes where it may stand.

    Raises:
        UsageError: naming the setting.
    """
    optional = {f.name for f in dataclasses.fields(settings) if "None" in str(f.type)}  # type: ignore[arg-type]
    for name, (kind, low) in limits.items():
        value: Any = getattr(settings, name)
        if value is None and name in optional:
            continue
        number = isinstance(value, int | float if kind is float else int) and not isinstance(value, bool)
        if not number or not low <= value < math.inf:
            what = "a whole number" if kind is int else "a number"
            raise UsageError(f"{name}: got {value!r}, expected {what} of at least {low}")


def read_means(path: Path, protocol: Protocol) -> Means:
    """Reads μ_data.

    Raises:
        UsageError: no such file, no means in it, another protocol's or another normalisation's.
    """
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
        means = {tissue: {s: float(v) for s, v in row.items()} for tissue, row in raw["means"].items()}
        found = Means(raw["protocol"], raw["normalisation"], means, int(raw["n_slices"]))
    except OSError as error:
        raise UsageError(f"--means {path}: {error.strerror}") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UsageError(f"--means {path}: not written by 'deepgmm means' ({error})") from error
    for what, theirs, ours in (
        ("protocol", found.protocol, protocol.name),
        ("normalisation", found.normalisation, protocol.normalisation),
    ):
        if theirs != ours:
            raise UsageError(f"--means {path}: computed with {what} {theirs}, but this run uses {ours}; compute anew")
    return found


def _value(text: str) -> Any:
    """A value as YAML has it, but for 1e-4, which YAML reads as a string, and people do not."""
    try:
        value = yaml.safe_load(text)
        return float(value) if isinstance(value, str) else value
    except (ValueError, yaml.YAMLError):
        return text


def _choice(name: str, value: object, choices: Sequence[object]) -> None:
    if value not in choices or (isinstance(value, int) and not isinstance(value, bool)):
        listed = ", ".join(str(c) for c in choices if c is not None)
        raise UsageError(f"{name}: {value!r} is unknown; choose one of {listed}")


def check_device(device: str) -> None:
    """Tries whether tensors can live on a device.

    Raises:
        UsageError: they cannot.
    """
    import torch

    try:
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise UsageError(f"--device {device}: cannot be used here ({reason})") from error
