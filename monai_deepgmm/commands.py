"""What each command of ``deepgmm`` does: find the patients, call one function, print."""

from __future__ import annotations

import argparse
import dataclasses
import json
import logging
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from monai_deepgmm import protocol as protocols
from monai_deepgmm import terminal
from monai_deepgmm.errors import OK, NobodyError, UsageError, exit_code
from monai_deepgmm.methods import METHODS, settings
from monai_deepgmm.patients import discovery, manifest
from monai_deepgmm.patients.study import Cohort, Study
from monai_deepgmm.wording import counted

if TYPE_CHECKING:
    from monai_deepgmm.methods.config import Config

logger = logging.getLogger("monai_deepgmm")

#: The options of ``deepgmm train`` that the bundle's ``train.json`` takes as they are.
TRAIN_KEYS = (
    *(
        "protocol",
        "asked",
        "layout",
        "mask",
        "mask_sequence",
        "frame",
        "max_voxels",
        "align",
        "spacing",
        "method",
        "loss",
        "network",
        "epochs",
        "resume",
    ),
    *("labels", "seed", "device", "trust_code"),
)


def scan(arguments: argparse.Namespace) -> int:
    """Prints which files belong to which patient, and what is wrong."""
    found = _find(arguments)
    if arguments.json:
        print(json.dumps(terminal.cohort_json(found), indent=1))
    else:
        terminal.print_cohort(found)
    return exit_code(sum(bool(s.problems) for s in found.studies), len(found.studies))


def segment(arguments: argparse.Namespace) -> int:
    """Segments every patient."""
    from monai_deepgmm.quick_start import batch

    if arguments.redo:
        _only_redone(arguments)
    config, found = _config(arguments), _find(arguments)
    logger.debug("configuration: %s", json.dumps(config.as_json(), default=str))
    options = batch.BatchOptions(
        jobs=arguments.jobs,
        dask=arguments.dask,
        part=arguments.part,
        overwrite=arguments.overwrite,
        fail_fast=arguments.fail_fast,
    )
    if arguments.dry_run:
        rows = list(batch.dry_run(found, arguments.out, config, options))
        for row in rows:
            detail = f"{row['code']}: {row['message']}. {row['remedy']}" if row["code"] else "; ".join(row["warnings"])
            print(f"{terminal.shown(row['patient'])}\t{row['status']}\t{terminal.shown(detail)}")
        return exit_code(sum(row["status"] == "failed" for row in rows), len(rows))
    with terminal.progress_bar(len(batch.select(found, options))) as bar:
        code: int = batch.run(found, arguments.out, config, options, progress=lambda row: bar.update())
    logger.log(logging.INFO if code == OK else logging.WARNING, "%s", terminal.closing_line(arguments.out, code))
    return code


def _only_redone(arguments: argparse.Namespace) -> None:
    """Narrows the run to what a reader wants to have done again, done or not."""
    from monai_deepgmm.results import review

    wanted = review.to_redo(arguments.redo)
    arguments.patients = [p for p in wanted if not arguments.patients or p in arguments.patients]
    if not arguments.patients:
        raise UsageError("--redo: none of the patients that it marks is among --patients")
    arguments.overwrite = True


def mask(arguments: argparse.Namespace) -> int:
    """Finds the organ in every patient and writes its mask."""
    from monai_deepgmm import masking

    by_model = arguments.mask_from is not None
    if arguments.mask not in (None, "auto") or arguments.masks is not None or (arguments.mask_labels and not by_model):
        raise UsageError("deepgmm mask finds the masks: leave --mask, --masks and --mask-labels out")
    arguments.mask = None if by_model else "auto"
    wanted, found = protocols.load(arguments.protocol), _find(arguments)
    reading: dict[str, Any] = {"frame": arguments.frame, "max_voxels": arguments.max_voxels, "align": arguments.align}
    code = masking.run(found, arguments.out, wanted, **reading)
    who = counted(len(found.studies), "patient")
    print(f"{who}; how surely each mask was found: {arguments.out / masking.TABLE}")
    return code


def train(arguments: argparse.Namespace) -> int:
    """Trains a network on a cohort without labels."""
    from monai_deepgmm.training import bundle

    found = _find(arguments)  # before torch and MONAI are asked for anything: most mistakes are here
    arguments.device = _device(arguments.device)
    _refuse_inside(arguments.model_dir, arguments.directory)
    prepared = bundle.train(
        {
            "dataset_dir": str(arguments.directory),
            "model_dir": str(arguments.model_dir),
            "manifest": None if arguments.manifest is None else str(arguments.manifest),
            "means": None if arguments.means is None else str(arguments.means),
            "masks": None if arguments.masks is None else str(arguments.masks),
            "mask_from": None if arguments.mask_from is None else str(arguments.mask_from),
            "mask_labels": list(arguments.mask_labels),
            "truth_labels": list(arguments.truth_labels),
            "filter": list(arguments.filter),
            "patients": list(arguments.patients),
            "set": arguments.set,
            **{key: getattr(arguments, key) for key in TRAIN_KEYS},
        }
    )
    for patient, error in prepared.failed.items():
        logger.warning("%s was not used: %s: %s", terminal.shown(patient), error.code, terminal.shown(str(error)))
    logger.info("the network and its bundle are in %s", arguments.model_dir)
    return exit_code(len(prepared.failed), len(found.studies))


def _refuse_inside(target: Path, source: Path) -> None:
    if source.resolve() in (target.resolve(), *target.resolve().parents):
        raise UsageError(f"MODEL_DIR: {target} lies inside the input folder; name a folder outside it")


def means(arguments: argparse.Namespace) -> int:
    """Writes μ_data from labelled patients."""
    from monai_deepgmm.images import atomic_files
    from monai_deepgmm.images.preprocessing import Preprocessing
    from monai_deepgmm.training import class_means

    protocol = protocols.load(arguments.protocol)
    begun = Preprocessing(frame=arguments.frame, max_voxels=arguments.max_voxels, align=arguments.align)
    preprocessing = settings.changed(begun, settings.parsed(arguments.set), "deepgmm means")
    found = _find(arguments)
    computed, unused = class_means.compute(found.studies, protocol, preprocessing)
    for patient, error in unused.items():
        logger.warning("%s was not used: %s: %s", terminal.shown(patient), error.code, terminal.shown(str(error)))
    atomic_files.write_whole(arguments.output, computed.as_json())
    for tissue, row in computed.means.items():
        print(f"{tissue:12s}" + "".join(f"  {sequence} {value:7.3f}" for sequence, value in row.items()))
    who = counted(len(found.studies) - len(unused), "patient")
    print(f"from {counted(computed.n_slices, 'image')} of {who} → {arguments.output}")
    return exit_code(len(unused), len(found.studies))


def evaluate(arguments: argparse.Namespace) -> int:
    """Compares results with reference labels."""
    from monai_deepgmm.results import agreement_page
    from monai_deepgmm.results import evaluate as agreement

    if not arguments.out.is_dir():
        raise UsageError(f"OUT: there is no folder {arguments.out}; give the folder that deepgmm segment wrote to")
    protocol = protocols.load(arguments.protocol)
    found = _find(arguments)
    result = agreement.evaluate(arguments.out, found, protocol, slices=arguments.slices, unit=arguments.unit)
    agreement.write(arguments.out, result)
    agreement_page.write(arguments.out, result, protocol)
    print(agreement.summary(result))
    return result.exit_code


def report(arguments: argparse.Namespace) -> int:
    """Builds the pages and tables again."""
    from monai_deepgmm.results import outputs
    from monai_deepgmm.results import report as pages

    if not arguments.out.is_dir():
        raise UsageError(f"OUT: there is no folder {arguments.out}; give the folder that deepgmm segment wrote to")
    count = pages.rebuild(arguments.out, arguments.review)
    outputs.rebuild_tables(arguments.out)
    print(f"{count} pages and {arguments.out / 'index.html'}")
    return OK


def phantom(arguments: argparse.Namespace) -> int:
    """Writes synthetic patients."""
    from monai_deepgmm.phantom import brain as brains
    from monai_deepgmm.phantom import heart as infarcts

    if arguments.number < 1:
        raise UsageError(f"-n: got {arguments.number}, expected at least 1")
    makers: dict[str, tuple[type[Any], Callable[..., list[str]]]] = {
        "infarct": (infarcts.PhantomConfig, infarcts.write_cohort),
        "brain": (brains.BrainConfig, brains.write_cohort),
    }
    kind, write = makers[arguments.protocol]
    config = infarcts.configured(kind, _phantom_settings(arguments.set, kind))
    target: Path = arguments.directory
    if target.exists() and any(target.iterdir()):
        raise UsageError(f"DIR: {target} is not empty, and nothing is written over; name a new folder")
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".deepgmm-") as work:  # all of it, or nothing
        patients = write(Path(work) / "made", arguments.number, seed=arguments.seed, config=config)
        if target.exists():
            target.rmdir()
        (Path(work) / "made").rename(target)
    print(f"{counted(len(patients), 'synthetic patient')} in {arguments.directory}")
    return OK


def init_manifest(arguments: argparse.Namespace) -> int:
    """Writes a manifest of what is found, to be corrected."""
    target: Path | None = arguments.output
    if target is not None and target.exists():
        raise UsageError(f"-o {target}: is there already, and nothing is written over; name another file")
    wanted = protocols.load(arguments.protocol)
    try:
        studies = discovery.find(arguments.directory, wanted, layout=arguments.layout).studies
    except NobodyError:
        folders = sorted(p.name for p in arguments.directory.iterdir() if p.is_dir() and not p.name.startswith("."))
        studies = tuple(Study(name, {}) for name in folders)
    if any(study.series for study in studies):
        raise UsageError("init-manifest: a table names NIfTI files; of DICOM studies, --filter chooses the series")
    here = arguments.directory.resolve() if target is None else target.resolve().parent
    table = manifest.draft(studies, wanted, here)
    values = next((study.mask_labels for study in studies if study.mask_labels), ())
    if target is None:
        print(table, end="")
    else:
        target.write_bytes(table.encode("utf-8", "surrogateescape"))
        more = f" --mask-labels {' '.join(f'{value:g}' for value in values)}" if values else ""
        print(f"{counted(len(studies), 'patient')} in {target}: correct it, then add --manifest {target}{more}")
    return OK


def _phantom_settings(given: Sequence[str], kind: type[Any]) -> dict[str, Any]:
    values = settings.parsed(given)
    settings.check_keys(values, [f.name for f in dataclasses.fields(kind)], "a phantom")
    return values


def _find(arguments: argparse.Namespace) -> Cohort:
    wanted, model = protocols.load(arguments.protocol), None
    if arguments.mask_from is not None or arguments.mask_sequence is not None:
        from monai_deepgmm.localisation import segmentation_bundle

        options = (arguments.mask_from, arguments.mask_sequence, arguments.mask_labels, wanted)
        model = segmentation_bundle.asked(*options, trust_code=getattr(arguments, "trust_code", False))
    found = discovery.find(
        arguments.directory,
        wanted,
        layout=arguments.layout,
        manifest=arguments.manifest,
        mask=arguments.mask,
        masks=arguments.masks,
        mask_labels=arguments.mask_labels if model is None else (),
        truth_labels=arguments.truth_labels,
        filters=arguments.filter,
        patients=arguments.patients,
        spacing=arguments.spacing,
        asked=arguments.asked,
        mask_model=model,
    )
    if arguments.command not in (scan, segment):  # which tell them below the table, and in OUT's log
        for note in found.notes:
            logger.warning("note: %s", terminal.shown(note))
    return found


def _device(asked: str) -> str:
    """The device that is meant by ``auto``, or the one that is named."""
    if asked != "auto":
        return asked
    import torch

    found = "cuda" if torch.cuda.is_available() else "cpu"
    logger.info("--device auto: %s", found)
    return found


def _config(arguments: argparse.Namespace) -> Config:
    settings.check_choice("--method", arguments.method, (None, *METHODS))  # before torch and MONAI are loaded
    from monai_deepgmm.methods import config

    return config.build(
        protocol=arguments.protocol,
        method=arguments.method,
        means=arguments.means,
        network=arguments.network,
        model=arguments.model,
        settings=arguments.set,
        seed=arguments.seed,
        frame=arguments.frame,
        max_voxels=arguments.max_voxels,
        align=arguments.align,
        probabilities=arguments.probabilities,
        copies=arguments.copies,
        fields=arguments.fields,
        dicom_seg=arguments.dicom_seg,
        device=_device(arguments.device),
        trust_code=arguments.trust_code,
    )
