"""What a trained network expects and where it lies, without its weights: what a configuration holds of a model.

A model's folder is a MONAI bundle; ``model.json`` says what the network was trained for, ``models/model.pt`` holds its
weights and nothing else, so that it is read without running any code.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from monai_deepgmm import schema
from monai_deepgmm.errors import UsageError
from monai_deepgmm.methods.training_config import TrainingConfig
from monai_deepgmm.networks import allowed
from monai_deepgmm.networks.sizes import CONTEXT, LARGEST, MULTIPLE, even, is_whole
from monai_deepgmm.protocol import Protocol

SPEC, WEIGHTS = "model.json", Path("models") / "model.pt"


@dataclass(frozen=True)
class ModelSpec:
    """What a network was trained for, and how; everything besides its weights that decides a label.

    Attributes:
        protocol: the protocol's name.
        normalisation: of the images that it saw.
        sequences: its first channels, in this order; the context follows.
        tissues: its outputs, in this order.
        network: the definition that ``networks.registry.build`` makes it from.
        spatial_dims: 2 or 3.
        size: of the images that it was trained on, along each axis; an instance norm depends on it.
        window: of what the network is given at a time, along each axis, where images are seen window by window; None:
            it is given whole images.
        training: how it was trained, its teacher included.
    """

    protocol: str
    normalisation: str
    sequences: tuple[str, ...]
    tissues: tuple[str, ...]
    network: Mapping[str, Any]
    spatial_dims: int
    size: tuple[int, ...]
    training: TrainingConfig
    window: tuple[int, ...] | None = None

    @property
    def given(self) -> tuple[int, ...]:
        """The size of what the network is given at a time: a window, or a whole image."""
        return self.window or self.size

    @property
    def channels(self) -> int:
        """How many channels the network takes."""
        return len(self.sequences) + CONTEXT

    def content(self) -> dict[str, Any]:
        """Everything, ready for JSON."""
        plain = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return {**plain, "network": dict(self.network), "training": self.training.as_json()}

    def as_json(self) -> bytes:
        """What ``read`` reads."""
        return (json.dumps(self.content(), indent=1) + "\n").encode()


@dataclass(frozen=True)
class ModelReference:
    """A model by its folder, without its weights: what a configuration holds and other processes are sent.

    Attributes:
        sha256: of ``model.json`` and the weights; two models that share it are the same.
        folder: absolute.
        spec: what ``model.json`` says.
        trusted: whether the network's code is a stranger's, which the user trusts.
    """

    sha256: str
    folder: Path = field(hash=False)
    spec: ModelSpec = field(hash=False)
    trusted: bool = field(default=False, hash=False)

    def as_json(self) -> dict[str, Any]:
        """For the sidecar: all but the folder, which cannot change a label."""
        return {**self.spec.content(), "sha256": self.sha256}


def read(folder: Path, protocol: Protocol, *, trust_code: bool = False) -> ModelReference:
    """A model's specification, checked against the protocol; nothing that the folder holds is run or imported.

    Args:
        folder: as ``deepgmm train`` left it, or as a stranger sent it.
        protocol: what is looked for.
        trust_code: whether the network's class may be one that this software does not know.

    Raises:
        UsageError: there is no model, it cannot be read, it was trained for something else, or it needs trust.
    """
    (text, spec_digest), (_, weights_digest) = _content(folder, SPEC), _content(folder, WEIGHTS)
    spec = _parsed(text, folder)
    trusted = allowed.check(spec.network, f"--model {folder}: {SPEC}: network", trust_code=trust_code)
    for what, theirs, ours in (
        ("protocol", spec.protocol, protocol.name),
        ("normalisation", spec.normalisation, spec.training.preprocessing.normalisation(protocol)),
    ):
        if theirs != ours:
            raise UsageError(f"--model {folder}: trained with {what} {theirs}, but this run uses {ours}")
    for key, good, expected in _rules(spec, protocol):
        if not good:
            got = str(getattr(spec, key))[:80]
            raise UsageError(f"--model {folder}: {SPEC}: {key}: got {got}, expected {expected}; train the model again")
    digest = hashlib.sha256(spec_digest + weights_digest).hexdigest()
    return ModelReference(digest, folder.resolve(), spec, trusted)


def _content(folder: Path, part: str | Path) -> tuple[bytes, bytes]:
    """The first bytes of a model's file, as many as a specification may have, and the SHA-256 of all of it.

    Raises:
        UsageError: it is not there, cannot be read, is no plain file, or is a link that leads out of the folder.
    """
    path, name = folder / part, Path(part).name
    try:
        found = path.resolve(strict=True)
        if not found.is_relative_to(folder.resolve()):
            raise UsageError(
                f"--model {folder}: {name} is a link that leads out of the folder; put the file itself there"
            )
        if not found.is_file():
            raise UsageError(f"--model {folder}: {name} is no file")
        with found.open("rb") as stream:
            digest = hashlib.file_digest(stream, "sha256").digest()
            stream.seek(0)
            return stream.read(schema.MAX_BYTES + 1), digest
    except (OSError, RuntimeError) as error:  # a link that leads to itself is a RuntimeError to some Pythons
        hint = "give the folder that deepgmm train wrote to, once it has finished an epoch"
        reason = getattr(error, "strerror", None) or "a link that leads to itself"
        raise UsageError(f"--model {folder}: {name}: {reason}; {hint}") from error


def _parsed(text: bytes, folder: Path) -> ModelSpec:
    try:
        raw = schema.check(schema.parse_json(schema.decoded(text, SPEC), SPEC), "model")
        listed = ["sequences", "tissues", "size", *(["window"] if raw.get("window") is not None else [])]
        training = TrainingConfig.from_json(raw["training"])
        return ModelSpec(**{**raw, **{key: tuple(raw[key]) for key in listed}, "training": training})
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, UsageError) as error:
        reason = f"{SPEC} was not written by this version ({error})"
        raise UsageError(f"--model {folder}: {reason}; train the model again") from error


def _rules(spec: ModelSpec, protocol: Protocol) -> list[tuple[str, bool, str]]:
    """Of each field: its name, whether it holds what a training writes there, and what that is."""
    dims = 2 if protocol.unit == "slice" else 3
    known = [s for s in protocol.sequences if s in spec.sequences]
    shown = [t.name for t in protocol.components(known)]
    return [
        (
            "sequences",
            bool(known) and list(spec.sequences) == known,
            f"some of {', '.join(protocol.sequences)}, in this order",
        ),
        ("tissues", list(spec.tissues) == shown, f"{', '.join(shown)}, which these sequences show"),
        ("spatial_dims", is_whole(spec.spatial_dims) and spec.spatial_dims == dims, str(dims)),
        ("size", _fits(spec.size, dims), f"{dims} multiples of {MULTIPLE}"),
        ("window", spec.window is None or _fits(spec.window, dims), f"{dims} multiples of {MULTIPLE}, or nothing"),
        ("training", _settled(spec.training, protocol), "settings as a training of this protocol leaves them"),
    ]


def _fits(size: tuple[int, ...], dims: int) -> bool:
    return even(size, dims) and math.prod(size) <= LARGEST


def _settled(training: TrainingConfig, protocol: Protocol) -> bool:
    """Whether a training's settings are resolved, and fit the protocol."""
    try:
        semi_supervised = training.alpha is not None or training.beta is not None
        return training.resolved(protocol, semi_supervised=semi_supervised) == training
    except UsageError:
        return False
