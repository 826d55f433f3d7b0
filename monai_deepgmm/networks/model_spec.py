"""What a trained network expects and where it lies, without its weights: what a configuration holds of a model.

A model's folder is a MONAI bundle; ``model.json`` says what the network was trained for, ``models/model.pt`` holds its
weights and nothing else, so that it is read without running any code.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeGuard, get_args

from monai_deepgmm.errors import UsageError
from monai_deepgmm.mixture.gaussian import COVARIANCES, Covariance
from monai_deepgmm.protocol import Protocol

SPEC, WEIGHTS = "model.json", Path("models") / "model.pt"
#: Channels of context that a network sees after the sequences: the relative depth inside the mask.
CONTEXT = 1
#: Sides of a view are multiples of this, so that a network may halve them five times.
MULTIPLE = 32
#: The finest and the coarsest voxel size of a network's grid.
GRID_MM = (0.01, 100.0)
LabelRule = Literal["posterior", "network", "both"]
LABEL_RULES: tuple[LabelRule, ...] = get_args(LabelRule)
Teacher = Literal["signature", "anatomy"]
TEACHERS: tuple[Teacher, ...] = get_args(Teacher)


@dataclass(frozen=True)
class Spec:
    """What a network was trained for; everything besides its weights that decides a label.

    Attributes:
        protocol: the protocol's name.
        normalisation: of the images that it saw.
        sequences: its first channels, in this order; the context follows.
        tissues: its outputs, in this order.
        network: the definition that ``networks.build`` makes it from.
        spatial_dims: 2 or 3.
        grid_mm: the voxel size that it is used to.
        size: of the images that it was trained on, along each axis; an instance norm depends on it.
        spatial: True for deepSVG.
        covariance: the shape of Σ.
        labels: posterior: the label is the most probable component of Π·g; network: of Π alone;
            both: of a weighted mean of Π and the anatomical mixture's responsibilities.
        teacher: what told it where tissues are expected: the signature map, or the anatomical mixture.
        incomplete: whether it has seen images that lack sequences, and so can segment them.
        window: of what the network is given at a time, along each axis, where images are seen window by window; None:
            it is given whole images.
    """

    protocol: str
    normalisation: str
    sequences: tuple[str, ...]
    tissues: tuple[str, ...]
    network: Mapping[str, Any]
    spatial_dims: int
    grid_mm: float
    size: tuple[int, ...]
    spatial: bool
    covariance: Covariance
    labels: LabelRule = "posterior"
    teacher: Teacher = "signature"
    incomplete: bool = False
    window: tuple[int, ...] | None = None

    @property
    def given(self) -> tuple[int, ...]:
        """The size of what the network is given at a time: a window, or a whole image."""
        return self.window or self.size

    @property
    def channels(self) -> int:
        """How many channels the network takes."""
        return len(self.sequences) + CONTEXT

    def as_json(self) -> bytes:
        """What ``read`` reads."""
        return (json.dumps(dataclasses.asdict(self), indent=1) + "\n").encode()


@dataclass(frozen=True)
class Reference:
    """A model by its folder, without its weights: what a configuration holds and other processes are sent.

    Attributes:
        sha256: of ``model.json`` and the weights; two models that share it are the same.
        folder: absolute.
        spec: what ``model.json`` says.
    """

    sha256: str
    folder: Path = field(hash=False)
    spec: Spec = field(hash=False)

    def as_json(self) -> dict[str, Any]:
        """For the sidecar: all but the folder, which cannot change a label."""
        return {**dataclasses.asdict(self.spec), "sha256": self.sha256}


def read(folder: Path, protocol: Protocol) -> Reference:
    """A model's specification, checked against the protocol.

    Raises:
        UsageError: there is no model, it cannot be read, or it was trained for something else.
    """
    try:
        text, weights = (folder / SPEC).read_bytes(), (folder / WEIGHTS).read_bytes()
    except OSError as error:
        hint = "give the folder that deepgmm train wrote to, once it has finished an epoch"
        raise UsageError(f"--model {folder}: {Path(error.filename).name}: {error.strerror}; {hint}") from error
    try:
        raw = json.loads(text)
        listed = ["sequences", "tissues", "size", *(["window"] if raw.get("window") is not None else [])]
        spec = Spec(**{**raw, **{key: tuple(raw[key]) for key in listed}})
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UsageError(f"--model {folder}: {SPEC} was not written by this version ({error})") from error
    for what, theirs, ours in (
        ("protocol", spec.protocol, protocol.name),
        ("normalisation", spec.normalisation, protocol.normalisation),
    ):
        if theirs != ours:
            raise UsageError(f"--model {folder}: trained with {what} {theirs}, but this run uses {ours}")
    for key, good, expected in _rules(spec, protocol):
        if not good:
            got = str(getattr(spec, key))[:80]
            raise UsageError(f"--model {folder}: {SPEC}: {key}: got {got}, expected {expected}; train the model again")
    digest = hashlib.sha256(hashlib.sha256(text).digest() + hashlib.sha256(weights).digest()).hexdigest()
    return Reference(digest, folder.resolve(), spec)


def check_window(window: object) -> None:
    """Refuses windows that a network cannot halve.

    Args:
        window: one side for every axis, or one for each; 0: whole images; None: nobody asked.

    Raises:
        UsageError: a side is no multiple of ``MULTIPLE``, or 0 among others.
    """
    whole = window is None or (window == 0 and _whole(window))
    sides = tuple(window) if isinstance(window, list | tuple) else (window,)
    if not whole and not (sides and _even(sides, len(sides))):
        remedy = f"expected a multiple of {MULTIPLE}, or one for each axis; 0 for whole images"
        raise UsageError(f"window: got {window!r}, {remedy}")


def window_sides(window: int | Sequence[int], dims: int) -> tuple[int, ...]:
    """A window's side along each of the axes.

    Raises:
        UsageError: there are more or fewer sides than axes.
    """
    sides = (window,) * dims if isinstance(window, int) else tuple(window)
    if len(sides) != dims:
        raise UsageError(f"window: got {len(sides)} sides, expected {dims}, one for each axis of an image")
    return sides


def _rules(spec: Spec, protocol: Protocol) -> list[tuple[str, bool, str]]:
    """Of each field: its name, whether it holds what a training writes there, and what that is."""
    dims = 2 if protocol.unit == "slice" else 3
    known = [s for s in protocol.sequences if s in spec.sequences]
    shown = [t.name for t in protocol.visible(known)]
    target = spec.network.get("_target_") if isinstance(spec.network, dict) else None
    grid = spec.grid_mm
    number = isinstance(grid, int | float) and not isinstance(grid, bool) and GRID_MM[0] <= grid <= GRID_MM[1]
    return [
        (
            "sequences",
            bool(known) and list(spec.sequences) == known,
            f"some of {', '.join(protocol.sequences)}, in this order",
        ),
        ("tissues", list(spec.tissues) == shown, f"{', '.join(shown)}, which these sequences show"),
        ("network", isinstance(target, str), "a mapping with _target_"),
        ("spatial_dims", _whole(spec.spatial_dims) and spec.spatial_dims == dims, str(dims)),
        ("grid_mm", number, "a number from {} to {}".format(*GRID_MM)),
        ("size", _even(spec.size, dims), f"{dims} multiples of {MULTIPLE}"),
        ("window", spec.window is None or _even(spec.window, dims), f"{dims} multiples of {MULTIPLE}, or nothing"),
        ("spatial", isinstance(spec.spatial, bool), "true or false"),
        ("covariance", spec.covariance in COVARIANCES, f"one of {', '.join(COVARIANCES)}"),
        ("labels", spec.labels in LABEL_RULES, f"one of {', '.join(LABEL_RULES)}"),
        ("teacher", spec.teacher in TEACHERS, f"one of {', '.join(TEACHERS)}"),
        ("incomplete", isinstance(spec.incomplete, bool), "true or false"),
    ]


def _even(sides: tuple[object, ...], dims: int) -> bool:
    return len(sides) == dims and all(_whole(n) and n > 0 and n % MULTIPLE == 0 for n in sides)


def _whole(value: object) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool)
