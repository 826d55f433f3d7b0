"""Networks as MONAI bundles: the configurations that come with the package, and the folder that a training fills."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from monai_deepgmm import protocol
from monai_deepgmm.errors import UsageError, users_own
from monai_deepgmm.images import atomic_files
from monai_deepgmm.methods import trained_network
from monai_deepgmm.methods.known_means import Means
from monai_deepgmm.methods.model_spec import SPEC, WEIGHTS
from monai_deepgmm.networks import weights
from monai_deepgmm.results.provenance import DISCLAIMER, versions
from monai_deepgmm.training import curves, prepare
from monai_deepgmm.training.handlers import CHECKPOINT, HISTORY, check_fingerprint, read_checkpoint, read_history
from monai_deepgmm.training.plan import TrainingPlan
from monai_deepgmm.training.prepare import PreparedCohort

logger = logging.getLogger(__name__)

PROTOCOL, PROVENANCE, MEANS, CURVES = "protocol.yaml", "provenance.json", "means.json", "training.svg"
#: The configurations of a model's folder; what a training decided is written into the first three and the metadata.
CONFIGS = ("train.json", "inference.json", "evaluate.json", "multi_gpu_train.json", "logging.conf", "metadata.json")
#: What else makes a folder a bundle that can be passed on.
PAPERS = ("LICENSE", "docs/README.md")


def shipped() -> Path:
    """The bundle that comes with the package: inside it where that is installed, or beside it in a checkout."""
    here = Path(__file__).parents[1]
    return here / "bundle" if (here / "bundle" / "configs").is_dir() else here.parent / "bundle"


def configs() -> Path:
    """The folder of that bundle's configurations."""
    return shipped() / "configs"


# Training --------------------------------------------------------------------------------------------------------


def train(options: Mapping[str, Any], *, files_of: Sequence[str] = ("train.json",)) -> PreparedCohort:
    """Trains as ``python -m monai.bundle run`` would with the same configuration and options.

    Args:
        options: the configuration's top-level keys to override.
        files_of: names of configurations; later ones override earlier ones.

    Returns:
        The cohort that was trained on, with what failed.

    Raises:
        UsageError: an option, or the whole cohort, cannot be used.
        StudyError: ``E_DISK`` or ``E_WRITE``, a file cannot be written.
    """
    from monai.bundle import ConfigWorkflow

    workflow = ConfigWorkflow(
        config_file=[str(configs() / name) for name in files_of],
        meta_file=str(configs() / "metadata.json"),
        logging_file=False,
        workflow_type="train",
        **options,
    )
    try:
        workflow.initialize()
        workflow.run()
        workflow.finalize()
    except Exception as error:
        cause = users_own(error)
        if cause is None:
            raise
        raise cause from error
    prepared: PreparedCohort = workflow.parser.get_parsed_content("prepared")
    return prepared


def begin(
    folder: str | Path, prepared: PreparedCohort, plan: TrainingPlan, *, resume: bool, writes: bool = True
) -> None:
    """Makes the model's folder, all but the weights.

    Args:
        folder: MODEL_DIR.
        prepared: the cohort.
        plan: what was asked for.
        resume: whether a training that is there may be gone on with.
        writes: False on all ranks but the first.

    Raises:
        UsageError: the folder holds a training that is not to be resumed, or something else, or the network cannot be
            made; the folder is then as it was.
    """
    place = Path(folder)
    if not writes:
        return
    network = trained_network.tried(prepared.spec)
    _check_folder(place, prepared.fingerprint, resume=resume)
    if resume and not (place / CHECKPOINT).is_file():
        logger.warning("--resume: %s holds no checkpoint; the training begins", place)
    if (place / CHECKPOINT).is_file():
        _load_best(place, network)
    for part in ("", "configs", "docs", "models"):
        (place / part).mkdir(parents=True, exist_ok=True)
        atomic_files.stale_temporaries(place / part)
    atomic_files.write_whole(place / SPEC, prepared.spec.as_json())
    atomic_files.write_whole(place / PROTOCOL, protocol.as_yaml(plan.protocol).encode())
    if isinstance(plan.means, Means):
        atomic_files.write_whole(place / MEANS, plan.means.as_json())
    for name in CONFIGS:
        shutil.copyfile(configs() / name, place / "configs" / name)
    _adapt(place / "configs" / "train.json", _training_keys(prepared, plan))
    for name in PAPERS:
        shutil.copyfile(shipped() / name, place / name)
    for name in ("inference.json", "evaluate.json"):
        _adapt(place / "configs" / name, _inference_keys(prepared, plan))
    _adapt(place / "configs" / "metadata.json", _metadata_keys(prepared))


def _check_folder(place: Path, fingerprint: str, *, resume: bool) -> None:
    """Refuses a folder that a training must not write into.

    Raises:
        UsageError: the folder holds a training that is not to be resumed, or cannot be, or something else.
    """
    if place.exists() and not place.is_dir():
        raise UsageError(f"MODEL_DIR: {place} is a file; name a folder")
    begun, weighed = (place / CHECKPOINT).is_file(), (place / WEIGHTS).is_file()
    if not begun and (place / PROVENANCE).is_file():
        hint = f"without {CHECKPOINT.name} it cannot be trained further; name another folder"
        raise UsageError(f"MODEL_DIR: {place} holds a finished model; {hint}")
    if (begun or weighed) and not resume:
        raise UsageError(f"MODEL_DIR: {place} holds a training; go on with --resume, or name another folder")
    if begun:
        check_fingerprint(place, read_checkpoint(place / CHECKPOINT), fingerprint)
    elif not (place / SPEC).is_file() and _used(place):
        raise UsageError(f"MODEL_DIR: {place} is not empty; name a new folder")


def _used(place: Path) -> bool:
    """Whether a folder holds more than a killed training leaves before its first file: folders, half a file."""
    return any(
        (path.is_symlink() or not path.is_dir()) and not path.name.startswith(".deepgmm-") for path in place.rglob("*")
    )


def _load_best(place: Path, network: torch.nn.Module) -> None:
    """Gives a network the weights of the best epoch.

    Raises:
        UsageError: they cannot be read, or are another network's.
    """
    try:
        network.load_state_dict(weights.read(place / WEIGHTS))
    except Exception as error:  # whatever a damaged file makes torch raise
        reason = error.strerror if isinstance(error, OSError) else weights.reason(error)
        raise UsageError(f"--resume: {WEIGHTS.name} cannot be read ({reason}); begin another folder") from error


def finish(
    folder: str | Path, network: torch.nn.Module, prepared: PreparedCohort, plan: TrainingPlan, *, writes: bool = True
) -> None:
    """Writes the curves and where the model came from; a model without that is not finished.

    Args:
        folder: MODEL_DIR.
        network: as trained.
        prepared: the cohort.
        plan: what was asked for.
        writes: False on all ranks but the first.
    """
    if not writes:
        return
    place = Path(folder)
    history = read_history(place / HISTORY)
    best = min(history, key=lambda row: row["validation_loss"])
    _load_best(place, network)
    device, window = next(network.parameters()).device, prepared.spec.window
    agreed = prepare.agreement(network, prepared, device=device, window=window)
    # Where no patient is held out, the loss on all of them is watched in place of a validation.
    held = 0 if prepared.validation is prepared.train else len(prepared.validation)
    strangers = [t for t, good in zip(prepared.spec.tissues, agreed, strict=True) if not good]
    content = {
        "Disclaimer": DISCLAIMER,
        "GeneratedBy": "monai-deepgmm",
        "versions": versions(),
        "plan": plan.as_json(),
        "means": {
            "source": prepared.means_source,
            "values": None if prepared.means_source == "none" else prepared.means.tolist(),
        },
        "patients": {"trained_on": prepared.patients[0], "validation": prepared.patients[1]},
        "labels": list(prepared.labelled),
        "images": {"trained_on": len(prepared.train), "validation": held},
        "not_used": {who: {"code": why.code, "message": why.message} for who, why in prepared.failed.items()},
        "fingerprint": prepared.fingerprint,
        "epochs": len(history),
        "best_epoch": int(best["epoch"]),
        "validation_loss": best["validation_loss"],
        "warnings": [
            f"W_NAMES: the network's output {t} does not lie where the protocol expects it" for t in strangers
        ],
    }
    atomic_files.write_whole(place / CURVES, curves.curves(history))
    atomic_files.write_whole(place / PROVENANCE, _json(content))


def _adapt(path: Path, keys: Mapping[str, Any]) -> None:
    """Sets keys (``a#b`` reaches inside) of a JSON file."""
    content = json.loads(path.read_text(encoding="utf-8"))
    for key, value in keys.items():
        *outer, last = key.split("#")
        inner = content
        for name in outer:
            inner = inner[name]
        inner[last] = value
    atomic_files.write_whole(path, _json(content))


def _training_keys(prepared: PreparedCohort, plan: TrainingPlan) -> dict[str, Any]:
    """What was asked for; the folder of the patients is the user's own business, and is not written down."""
    known = "$@bundle_root + '/" + MEANS + "'" if isinstance(plan.means, Means) else plan.means
    settings = {k: v for k, v in plan.as_json()["training"].items() if k not in ("method", "loss")}
    method, loss = plan.training.method, plan.training.loss
    network = trained_network.complete(prepared.spec)
    return {
        "model_dir": "@bundle_root",
        "protocol": "$@bundle_root + '/" + PROTOCOL + "'",
        "method": method,
        "loss": loss,
        # As text: the configuration's parser would make a network of the mapping.
        "network": json.dumps(dict(plan.network)),
        "means": known,
        "labels": list(plan.labels) or None,
        "epochs": plan.epochs,
        "set": settings,
        "seed": plan.seed,
        "trust_code": plan.trusted,
        "frame": plan.training.preprocessing.frame,
        "align": plan.training.preprocessing.align,
        # A network that can be made without the patients, for whoever loads the bundle.
        "network_def": {
            "_target_": "monai_deepgmm.networks.registry.seeded",
            "target": network.pop("_target_"),
            "arguments": network,
            "seed": "@seed",
        },
    }


def _inference_keys(prepared: PreparedCohort, plan: TrainingPlan) -> dict[str, Any]:
    spec = prepared.spec
    return {
        "trust_code": plan.trusted,
        "protocol": "$@bundle_root + '/" + PROTOCOL + "'",
        "method": "network",
        "model": "@bundle_root",
        "network_def": trained_network.complete(spec),
    }


def _metadata_keys(prepared: PreparedCohort) -> dict[str, Any]:
    spec = prepared.spec
    shape = trained_network.sides(spec)
    seen = [*spec.sequences, "relative depth"]
    known = f"(of which {len(prepared.labelled)} labelled)" if prepared.labelled else "unlabelled"
    required = json.loads((configs() / "metadata.json").read_text(encoding="utf-8"))["required_packages_version"]
    return {
        "version": _version("monai-deepgmm"),
        "monai_version": _version("monai"),
        "pytorch_version": _version("torch"),
        "numpy_version": _version("numpy"),
        "required_packages_version": {name: _version(name) for name in required},
        "data_source": f"{sum(prepared.patients)} {known} patients of the user's own",
        "network_data_format#inputs#image#num_channels": spec.channels,
        "network_data_format#inputs#image#spatial_shape": shape,
        "network_data_format#inputs#image#channel_def": {str(i): name for i, name in enumerate(seen)},
        "network_data_format#outputs#pred#num_channels": len(spec.tissues),
        "network_data_format#outputs#pred#spatial_shape": shape,
        "network_data_format#outputs#pred#channel_def": {str(i): name for i, name in enumerate(spec.tissues)},
    }


def _version(package: str) -> str:
    """What is installed, as an index knows it: without the name of a local build, such as ``+cpu``."""
    return metadata.version(package).partition("+")[0]


def _json(content: object) -> bytes:
    return (json.dumps(content, indent=4, ensure_ascii=False) + "\n").encode()
