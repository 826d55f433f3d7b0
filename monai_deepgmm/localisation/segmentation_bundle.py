"""Another model's mask: what a MONAI bundle that segments an organ says of itself, read without running any of it.

Of ``configs/inference.json`` (or YAML) three parts count: ``network_def``, ``preprocessing`` and ``inferer``. They must
be plain data that name networks, transforms and inferers of MONAI which load and run nothing; all else needs trust,
since a bundle's configuration is code.
"""

from __future__ import annotations

import hashlib
import logging
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from monai_deepgmm import schema
from monai_deepgmm.errors import UsageError
from monai_deepgmm.networks import allowed
from monai_deepgmm.patients.study import MaskModel
from monai_deepgmm.protocol import Protocol

logger = logging.getLogger(__name__)

CONFIGS = tuple(Path("configs") / f"inference.{ending}" for ending in ("json", "yaml", "yml"))
WEIGHTS = Path("models") / "model.pt"
#: Bundles that are known: the sequence that they are made for, and the labels that make up the protocol's mask.
PRESETS: Mapping[str, tuple[str, tuple[int, ...]]] = {"ventricular_short_axis_3label": ("bSSFP", (1, 2))}
#: Transforms that read or place what was read; images come to the network read and in their place.
LOADING = ("LoadImaged", "EnsureChannelFirstd", "EnsureTyped", "ToTensord", "ToDeviced", "CastToTyped")
#: Transforms that are done as they stand.
TRANSFORMS = (
    *("ScaleIntensityd", "ScaleIntensityRanged", "ScaleIntensityRangePercentilesd", "NormalizeIntensityd"),
    *("Orientationd", "Spacingd", "Resized", "SpatialPadd", "DivisiblePadd", "CenterSpatialCropd"),
    *("ResizeWithPadOrCropd", "CropForegroundd", "GaussianSmoothd", "HistogramNormalized"),
)
INFERERS = ("SimpleInferer", "SliceInferer", "SlidingWindowInferer")


class Definition(NamedTuple):
    """The parts of a bundle's configuration that count.

    Attributes:
        network: class and arguments.
        transforms: of the image, in order, without those that load it.
        inferer: class and arguments; None: by the network's dimensions.
        sigmoid: whether labels may overlap, each with a channel of its own.
    """

    network: Mapping[str, Any]
    transforms: tuple[Mapping[str, Any], ...]
    inferer: Mapping[str, Any] | None
    sigmoid: bool


def asked(
    folder: str | Path | None,
    sequence: str | None,
    labels: Sequence[float],
    protocol: Protocol,
    *,
    trust_code: bool = False,
) -> MaskModel | None:
    """The bundle that finds the masks, as a study carries it.

    Args:
        folder: the bundle's; None: there is none.
        sequence: that it looks at; None: the preset's.
        labels: of its output that make up the mask; empty: the preset's.
        protocol: whose sequences.
        trust_code: whether what it holds may be code that this software does not know.

    Raises:
        UsageError: there is no such bundle, it cannot be read, needs trust, or nobody has said what it looks at.
    """
    if folder is None:
        if sequence is not None:
            raise UsageError("--mask-sequence goes with --mask-from; leave it out, or name the bundle")
        return None
    root = Path(folder)
    content = read(root)
    preset = next((PRESETS[name] for name in _names(root) if name in PRESETS), (None, ()))
    labels = schema.numbers(labels, "--mask-labels")
    sequence, chosen = sequence or preset[0], tuple(int(v) for v in labels) or preset[1]
    if sequence not in protocol.sequences:
        known = ", ".join(protocol.sequences)
        raise UsageError(f"--mask-from {root}: which sequence does it look at? Say --mask-sequence, one of {known}")
    if not chosen or min(chosen) < 1 or any(v != int(v) for v in labels):
        raise UsageError(f"--mask-from {root}: which of its labels are the {protocol.mask}? Say --mask-labels 1 2 …")
    trusted = _needs_trust(content, root, trust_code=trust_code)
    digest = hashlib.sha256()
    for path in (_config(root), root / WEIGHTS):
        try:
            digest.update(path.read_bytes())
        except OSError as error:
            raise UsageError(f"--mask-from {root}: {path.name}: {error.strerror}") from error
    return MaskModel(root.resolve(), digest.hexdigest(), sequence, chosen, trusted)


def read(root: Path) -> dict[str, Any]:
    """A bundle's configuration as plain data.

    Raises:
        UsageError: there is none, or it is not what a bundle's is.
    """
    path = _config(root)
    name = f"--mask-from {root}: {path.name}"
    text = schema.read_text(path, name)
    parsed = schema.parse_json(text, name) if path.suffix == ".json" else schema.parse_yaml(text, name)
    content = parsed.content
    if not isinstance(content, dict) or not isinstance(content.get("network_def"), dict):
        raise UsageError(f"{name}: has no network_def; a bundle that segments images has one")
    return content


def definition(content: Mapping[str, Any]) -> Definition:
    """The parts that count, networks by their full names; whether they are safe is another question."""
    network, steps = dict(content["network_def"]), _steps(content.get("preprocessing"))
    named = str(network.get("_target_", ""))
    ours = {name.casefold(): name for name in allowed.MONAI}
    if "." not in named and named.casefold() in ours:  # MONAI's, by the name alone
        network["_target_"] = f"monai.networks.nets.{named}"
    kept = tuple(step for step in steps if _name(step) not in LOADING)
    after = [step for step in _steps(content.get("postprocessing")) if isinstance(step, Mapping)]
    sigmoid = any(_name(step) == "Activationsd" and step.get("sigmoid") is True for step in after)
    inferer = content.get("inferer")
    return Definition(network, kept, inferer if isinstance(inferer, Mapping) else None, sigmoid)


def _needs_trust(content: Mapping[str, Any], root: Path, *, trust_code: bool) -> bool:
    """Whether a bundle's configuration is more than plain data of known kinds.

    Raises:
        UsageError: it is, and is not trusted.
    """
    found, option = definition(content), f"--mask-from {root}: network_def"
    try:
        allowed.check(found.network, option)
        reason = _beyond(found)
    except UsageError as error:
        if not trust_code and "--trust-code" in str(error):
            raise
        reason = str(error).removeprefix(f"--mask-from {root}: ")
    if reason is None:
        return False
    if not trust_code:
        raise UsageError(
            f"--mask-from {root}: {reason}; add --trust-code if you trust whoever wrote the bundle: it runs their code"
        )
    logger.warning("--trust-code: %s; the bundle's code is run", reason)
    return True


def _beyond(found: Definition) -> str | None:
    """What transforms and inferer ask for beyond the lists."""
    parts: list[tuple[str, Any, tuple[str, ...]]] = [("preprocessing", step, TRANSFORMS) for step in found.transforms]
    parts += [("inferer", found.inferer, INFERERS)] if found.inferer is not None else []
    for where, part, known in parts:
        if not isinstance(part, Mapping) or _name(part) not in known:
            named = _name(part) if isinstance(part, Mapping) else str(part)[:40]
            return f"{where}: {named!r} is none of {', '.join(known)}"
        try:
            schema.check(schema.Document(dict(part), {}, where), allowed.TABLE)
        except UsageError as error:
            return str(error)
    return None


def _steps(part: Any) -> Sequence[Any]:
    """The transforms of a Compose, or nothing; what is neither is a step that nobody knows."""
    if part is None:
        return ()
    inner = part.get("transforms") if isinstance(part, Mapping) and _name(part) == "Compose" else None
    return inner if isinstance(inner, list) else (part,)


def _name(step: Any) -> str:
    """The class's name, without the modules of MONAI in front."""
    target = str(step.get("_target_", "")) if isinstance(step, Mapping) else ""
    return re.sub(r"^monai\.(transforms|inferers)\.(\w+\.)*", "", target)


def _names(root: Path) -> list[str]:
    """What a bundle is called: its folder."""
    return [root.name, root.resolve().name]


def _config(root: Path) -> Path:
    if not root.is_dir():
        raise UsageError(f"--mask-from {root}: there is no such folder; give a MONAI bundle's")
    return next((root / path for path in CONFIGS if (root / path).is_file()), root / CONFIGS[0])
