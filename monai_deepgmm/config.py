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
from monai_deepgmm.mixture import COVARIANCES, VARIANCE_FLOOR, Covariance
from monai_deepgmm.nifti import DEFAULT_MAX_VOXELS
from monai_deepgmm.protocol import Protocol

Method = Literal["gmm", "svgmm"]
METHODS: tuple[Method, ...] = get_args(Method)
DEFAULT_METHOD: Method = "svgmm"
STARTS = ("signature", "kmeans")
#: The shape of Σ where none is asked for. The paper's is diag; for the SVGMM one shared matrix is clearly better.
DEFAULT_COVARIANCE: Mapping[Method, Covariance] = {"gmm": "diag", "svgmm": "tied"}
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
    """

    covariance: Covariance | None = None
    start: str = "signature"
    restarts: int = 1
    tol: float | None = None
    max_iter: int = 3000
    floor: float = VARIANCE_FLOOR

    def __post_init__(self) -> None:
        """Refuses what makes no sense.

        Raises:
            UsageError: a field holds a value that it cannot have.
        """
        _choice("covariance", self.covariance, (None, *COVARIANCES))
        _choice("start", self.start, STARTS)
        for name, kind, low in (("restarts", int, 1), ("tol", float, 0), ("max_iter", int, 1), ("floor", float, 0)):
            value = getattr(self, name)
            if name == "tol" and value is None:
                continue
            if isinstance(value, bool) or not isinstance(value, (int, kind)) or not low <= value < math.inf:
                raise UsageError(f"{name}: got {value!r}, expected a number of at least {low}")


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
        seed: of every random draw; each patient starts from it anew.
        frame: which frame of a 4-D file, counted from 0.
        max_voxels: larger images are refused.
        probabilities: also write one probability map per tissue.
        device: where tensors live: cpu, cuda, cuda:1 …
    """

    protocol: Protocol
    method: Method = DEFAULT_METHOD
    means: Means | None = None
    solver: Solver = field(default_factory=Solver)
    seed: int = 0
    frame: int | None = None
    max_voxels: int = DEFAULT_MAX_VOXELS
    probabilities: bool = False
    device: str = "cpu"

    def __post_init__(self) -> None:
        """Refuses an unknown method and a seed that torch cannot take.

        Raises:
            UsageError: the method is not one of ``METHODS``, or the seed does not fit into 63 bits.
        """
        _choice("method", self.method, METHODS)
        if not 0 <= self.seed < 1 << 63:
            raise UsageError(f"--seed: got {self.seed}, expected a whole number from 0 to 2^63 - 1")

    @property
    def covariance(self) -> Covariance:
        """The shape of Σ: as asked for, or the method's own."""
        return self.solver.covariance or DEFAULT_COVARIANCE[self.method]

    @property
    def tol(self) -> float:
        """The tolerance: as asked for, or the unit's own."""
        return DEFAULT_TOL[self.protocol.unit] if self.solver.tol is None else self.solver.tol

    def as_json(self) -> dict[str, Any]:
        """For the sidecar: whatever can change a label. The device and ``--probabilities`` cannot."""
        protocol = json.dumps(dataclasses.asdict(self.protocol), sort_keys=True, default=list)
        return {
            "protocol": self.protocol.name,
            "protocol_sha256": hashlib.sha256(protocol.encode()).hexdigest(),
            "normalisation": self.protocol.normalisation,
            "method": self.method,
            "solver": {**dataclasses.asdict(self.solver), "covariance": self.covariance, "tol": self.tol},
            "means": None if self.means is None else dataclasses.asdict(self.means),
            "seed": self.seed,
            "frame": self.frame,
        }


def build(
    *,
    protocol: str | Path = "infarct",
    method: str | None = None,
    means: str | Path | None = None,
    settings: Sequence[str] | Mapping[str, Any] = (),
    seed: int = 0,
    frame: int | None = None,
    max_voxels: int = DEFAULT_MAX_VOXELS,
    probabilities: bool = False,
    device: str = "cpu",
) -> Config:
    """A configuration from what a user typed, on the command line or in the bundle's JSON.

    Args:
        protocol: a name or a YAML file.
        method: one of ``METHODS``; None: the default.
        means: a file written by ``deepgmm means``.
        settings: ``key=value`` strings, or a mapping, for the fields of ``Solver``.
        seed: of every random draw.
        frame: which frame of a 4-D file.
        max_voxels: larger images are refused.
        probabilities: also write probability maps.
        device: cpu, cuda, cuda:1 …

    Raises:
        UsageError: any of it is unknown or does not fit together.
    """
    _check_device(device)
    found = protocols.load(protocol)
    _choice("method", method, (None, *METHODS))
    return Config(
        protocol=found,
        method=method or DEFAULT_METHOD,  # type: ignore[arg-type]  # checked above
        means=None if means is None else read_means(Path(means), found),
        solver=solver(settings),
        seed=seed,
        frame=frame,
        max_voxels=max_voxels,
        probabilities=probabilities,
        device=device,
    )


def solver(settings: Sequence[str] | Mapping[str, Any]) -> Solver:
    """Solver settings from ``key=value`` strings or a mapping.

    Raises:
        UsageError: a string without ``=``, a key that is no field of ``Solver``, or a value it cannot have.
    """
    if not isinstance(settings, Mapping):
        pairs = [setting.partition("=") for setting in settings]
        if broken := [key for key, equals, _ in pairs if not equals]:
            raise UsageError(f"--set {broken[0]}: expected key=value")
        settings = {key.strip(): _value(value) for key, _, value in pairs}
    known = [f.name for f in dataclasses.fields(Solver)]
    if unknown := [key for key in settings if key not in known]:
        raise UsageError(f"--set {unknown[0]}: no such setting; choose from {', '.join(known)}")
    return Solver(**settings)


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
    if value not in choices:
        listed = ", ".join(str(c) for c in choices if c is not None)
        raise UsageError(f"{name}: {value!r} is unknown; choose one of {listed}")


def _check_device(device: str) -> None:
    import torch

    try:
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise UsageError(f"--device {device}: cannot be used here ({reason})") from error
