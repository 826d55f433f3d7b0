"""What a run was asked to do: one immutable object, built alike by the command line and by the bundle's JSON."""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.util
import itertools
import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from numbers import Integral
from pathlib import Path
from typing import Any

from monai_deepgmm import protocol as protocols
from monai_deepgmm import schema
from monai_deepgmm.errors import UsageError
from monai_deepgmm.images import COPIES
from monai_deepgmm.images.header import DEFAULT_MAX_VOXELS
from monai_deepgmm.images.preprocessing import Preprocessing
from monai_deepgmm.methods import METHODS, known_means, model_spec, registry, settings
from monai_deepgmm.methods.known_means import Means
from monai_deepgmm.methods.model_spec import ModelReference
from monai_deepgmm.methods.task import MethodConfig
from monai_deepgmm.networks.definition import network_definition
from monai_deepgmm.protocol import Protocol
from monai_deepgmm.registration import Align

logger = logging.getLogger(__name__)

#: The methods that know a tissue by its signature and centrality alone.
BY_SIGNATURE = ("gmm", "svgmm", "pvgmm", "deepg", "deepsvg")


@dataclass(frozen=True)
class Config:
    """Everything besides the input files that decides a patient's labels.

    Attributes:
        protocol: what to look for.
        method: how it is fitted, with all its settings.
        preprocessing: what is done to every scan before.
        means: μ_data, or None.
        seed: of every random draw; each patient starts from it anew.
        probabilities: also write one probability map per tissue.
        copies: further formats of the label map: ``nrrd``, ``mha``.
        fields: also write each sequence's bias field, and the image without it.
        dicom_seg: also write the labels as a DICOM SEG.
        device: where tensors live: cpu, cuda, cuda:1 …
        trusted: whether the network's code is a stranger's, which the user trusts (``--trust-code``).
    """

    protocol: Protocol
    method: MethodConfig
    preprocessing: Preprocessing = field(default_factory=Preprocessing)
    means: Means | None = None
    seed: int = 0
    probabilities: bool = False
    copies: tuple[str, ...] = ()
    fields: bool = False
    dicom_seg: bool = False
    device: str = "cpu"
    trusted: bool = False

    def __post_init__(self) -> None:
        """Refuses options that the method does not use, what is not installed, and a seed that torch cannot take.

        Raises:
            UsageError: means or fields are asked for that the method has no use for, the model's images were prepared
                otherwise, highdicom is needed and not installed, or the seed does not fit into 63 bits.
        """
        name = self.method.name
        if self.fields and not (self.degree or self.preprocessing.n4):
            raise UsageError("--fields: no bias field is looked for; use --set n4=true, or degree with gmm or svgmm")
        if self.means is not None and not self.method.takes_means:
            raise UsageError(f"--means: --method {name} has the protocol's own priors; use another with means")
        if self.dicom_seg and importlib.util.find_spec("highdicom") is None:
            raise UsageError("--dicom-seg needs highdicom: pip install highdicom")
        for format_name in self.copies:
            settings.check_choice("--copies", format_name, COPIES)
        if not isinstance(self.seed, Integral) or not 0 <= self.seed < 1 << 63:
            raise UsageError(f"--seed: got {self.seed!r}, expected a whole number from 0 to 2^63 - 1")

    @property
    def model(self) -> ModelReference | None:
        """The trained network, where the method has one."""
        return getattr(self.method, "model", None)

    @property
    def degree(self) -> int:
        """The degree of the bias field that the method fits; 0: none."""
        return getattr(self.method, "degree", None) or 0

    @property
    def presence(self) -> bool:
        """Whether a tissue's regions must meet the protocol's criteria."""
        return bool(self.method.presence) and self.protocol.anatomy is not None

    def as_json(self) -> dict[str, Any]:
        """For the sidecar: whatever can change a label. The device, ``--probabilities`` and ``--copies`` cannot."""
        protocol = json.dumps(dataclasses.asdict(self.protocol), sort_keys=True, default=list)
        nested = {"model", "training"}
        plain = {f.name for f in dataclasses.fields(self.method)} - nested
        training = getattr(self.method, "training", None)
        return {
            "protocol": self.protocol.name,
            "protocol_sha256": hashlib.sha256(protocol.encode()).hexdigest(),
            "normalisation": self.preprocessing.normalisation(self.protocol),
            "method": self.method.name,
            "settings": {name: getattr(self.method, name) for name in sorted(plain)}
            | ({} if training is None else {"training": training.decisive().as_json()}),
            "preprocessing": {
                key: getattr(self.preprocessing, key) for key in ("n4", "smooth_noise", "frame", "align")
            },
            "model": None if self.model is None else self.model.as_json(),
            "means": None if self.means is None else dataclasses.asdict(self.means),
            "seed": self.seed,
        } | ({"trust_code": True} if self.trusted else {})


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
    align: Align = "auto",
    probabilities: bool = False,
    copies: Sequence[str] = (),
    fields: bool = False,
    dicom_seg: bool = False,
    device: str = "cpu",
    trust_code: bool = False,
) -> Config:
    """A configuration from what a user typed, on the command line or in the bundle's JSON.

    Args:
        protocol: a name or a YAML file.
        method: one of ``methods.METHODS``; None: the default.
        means: a file written by ``deepgmm means``.
        network: for deepg, deepsvg and cohort: what ``network_definition`` takes.
        model: for network: a folder written by ``deepgmm train``; it makes that method the default.
        settings: ``key=value`` strings, or a mapping, for the fields of the method and of ``Preprocessing``.
        seed: of every random draw.
        frame: which frame of a 4-D file.
        max_voxels: larger images are refused.
        align: how sequences are brought together: auto, off or rigid.
        probabilities: also write probability maps.
        copies: further formats of the label map.
        fields: also write bias fields and the images without them.
        dicom_seg: also write DICOM SEGs.
        device: cpu, cuda, cuda:1 …
        trust_code: whether the network may be a class that this software does not know, whose code is then run.

    Raises:
        UsageError: any of it is unknown or does not fit together.
    """
    device = usable_device(device)
    found = protocols.load(protocol)
    name = method or registry.default_method(found, means=means, model=model)
    if model is not None and name != "network":
        raise UsageError(f"--model: --method {name} takes no trained network; leave one of them out")
    if network is not None and not _takes_network(name):
        others = ", ".join(other for other in METHODS if _takes_network(other))
        raise UsageError(f"--network: --method {name} fits no network; use {others}")
    if means is None and name in BY_SIGNATURE:
        _refuse_alike(found, name)
    trained = None if model is None else model_spec.read(Path(model), found, trust_code=trust_code)
    definition, trusted = network_definition(network, trust_code=trust_code)
    begun = Preprocessing(frame=frame, max_voxels=max_voxels, align=align)
    values, prepared = _preprocessing(settings, begun, trained)
    own: dict[str, Any] = {} if definition is None else {"network": definition}
    own |= {} if trained is None else {"model": trained}
    return Config(
        protocol=found,
        method=registry.configure(name, values, found, prepared, own),
        preprocessing=prepared,
        means=None if means is None else known_means.read(Path(means), found, prepared),
        seed=seed,
        probabilities=probabilities,
        copies=tuple(dict.fromkeys(schema.several(copies))),
        fields=fields,
        dicom_seg=dicom_seg,
        device=device,
        trusted=trusted or (trained is not None and trained.trusted),
    )


def _refuse_alike(protocol: Protocol, method: str) -> None:
    """Refuses two tissues that nothing tells apart: one of them would stay empty, whatever the image.

    Raises:
        UsageError: they have the same signature, and lie equally deep.
    """
    for a, b in itertools.combinations(protocol.components(protocol.sequences), 2):
        if (a.signature, a.centrality) == (b.signature, b.centrality):
            raise UsageError(
                f"--protocol {protocol.name}: {a.name} and {b.name} have the same signature, by which --method "
                f"{method} tells tissues apart; give each its own, or centrality, or use method anatomy with level and "
                "depth"
            )


def _takes_network(name: str) -> bool:
    """Whether a method fits a network itself, as a field of its settings says.

    Raises:
        UsageError: the method is unknown.
    """
    return any(field.name == "network" for field in dataclasses.fields(registry.method_class(name)))


def _preprocessing(
    given: Sequence[str] | Mapping[str, Any], begun: Preprocessing, trained: ModelReference | None
) -> tuple[dict[str, Any], Preprocessing]:
    """What ``--set`` says of the method, and what happens to every scan; with a trained network, what it is used to.

    Raises:
        UsageError: the network is used to something else than what is asked for.
    """
    values = settings.parsed(given)
    own = {key: values.pop(key) for key in settings.keys(Preprocessing) if key in values}
    prepared: Preprocessing = settings.changed(begun, own, "the preprocessing")
    if trained is None:
        return values, prepared
    used = trained.spec.training.preprocessing.n4
    if "n4" in own and own["n4"] != used:
        raise UsageError(f"n4: the network was trained with n4={str(used).lower()}; leave n4 out, or train another")
    return values, dataclasses.replace(prepared, n4=used)


def usable_device(device: str) -> str:
    """Where tensors are to live: the device itself, or the CPU where a device has not what mixtures need.

    Mixtures are fitted with double precision and Cholesky factors; both are tried before any patient is.

    Raises:
        UsageError: there is no such device, or it does not work.
    """
    import torch

    try:
        torch.zeros(1, device=device).cpu()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        reason = "there is no such kind" if reason.startswith("Expected one of") else reason  # and some twenty kinds
        raise UsageError(
            f"--device {device}: cannot be used here ({reason}); name cpu, cuda, cuda:1 … or auto"
        ) from error
    try:
        one = torch.ones(1, 1, dtype=torch.float64, device=device)
        torch.cholesky_solve(one, torch.linalg.cholesky(one)).cpu()
    except (RuntimeError, TypeError, NotImplementedError) as error:
        logger.warning("--device %s has no double precision (%s); the CPU is used", device, str(error).splitlines()[0])
        return "cpu"
    return device
