#!/usr/bin/env python
"""Tables 1, 3 and 5 of Ma 2022 on your own copy of IBSR18, beside the published figures.

    python scripts/reproduce_ma.py DATA OUT

DATA holds the volumes as IBSR names them, in folders of any depth: ``IBSR_01.nii.gz`` (or ``IBSR_01_ana_strip``, or
``IBSR_01_ana``) and ``IBSR_01_seg.nii.gz`` (or ``IBSR_01_segTRI_ana``, ``IBSR_01_segTRI_fill_ana``) with 1 CSF, 2 grey
matter, 3 white matter. Everything goes into OUT: ``tables.md``, ``tables.json``, the copies of the volumes that the
tool reads, and the runs and networks. Kill it anywhere and run it again: it goes on. A change of the installed code
goes unnoticed if its version does not change; take another OUT then, and for trainings with other options.

The paper trains on slices on a GPU. The networks here learn from every eighth slice, with half the usual filters, so
that 18 volumes take about an hour on four cores; ``--every``, ``--filters`` and ``--epochs`` change that.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import math
import os
import re
import signal
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import Any, NamedTuple

import numpy as np
from monai_deepgmm.networks.model_spec import WEIGHTS
from numpy.typing import NDArray
from reproduce_paper import Ledger, Stage, StageError, as_json, clock, interrupt, machine, run, run_apart
from scipy import ndimage

from monai_deepgmm import cli, protocol
from monai_deepgmm.errors import StudyError, UsageError
from monai_deepgmm.images import atomic_files as files
from monai_deepgmm.images import nifti
from monai_deepgmm.images.volume import Volume
from monai_deepgmm.phantom.heart import write_nifti
from monai_deepgmm.results import metrics

Labels = NDArray[np.int64]

#: IBSR's own value of each tissue.
IBSR = {"CSF": 1, "GM": 2, "WM": 3}
#: The ends of names, the best first. The last is also the name of 43 structures: what is in it decides.
IMAGE_ENDS = ("", "_ana_strip", "_ana")
TRUTH_ENDS = ("_seg", "_segtri", "_segtri_ana", "_segtri_fill_ana", "_seg_ana")
NAMED = re.compile(r"(IBSR_?\d+)(\w*)\.nii(\.gz)?", re.IGNORECASE)
#: An image with more voxels above 0 than this many times the labelled ones still has its skull.
STRIPPED = 2.0
WHOLE, SLICES = "brain", "brain-slices"
EVERYWHERE, FILLED = "voxels above 0", "labelled voxels, holes filled"
#: Every n-th patient is tested on in the semi-supervised tables.
TESTED = 3

MEASURES = ("precision", "recall", "F1", "JS")
TISSUES = ("GM", "WM")
#: Table 5, precision, recall, F1 and Jaccard in percent.
TABLE5: Mapping[str, Mapping[str, tuple[float, ...]]] = {
    "GMM": {"GM": (80.90, 52.60, 63.42, 46.90), "WM": (74.79, 74.86, 74.17, 59.92)},
    "network, without bias field": {"GM": (85.12, 60.12, 70.17, 54.56), "WM": (73.12, 80.02, 75.59, 61.46)},
    "network, with bias field": {"GM": (89.26, 68.39, 77.29, 63.15), "WM": (77.96, 84.74, 80.79, 68.16)},
}
CE, TOTAL = "L_CE", "L_CE + L_GMM_TV"
RATIOS = ("1/4", "1/2", "3/4")
PAPERS = ("U-Net", "U-Net++", "TRMFCN", "ViT", "TransUNet", "MTUNet", "Our method")
#: Table 1, recall in percent, in the order of PAPERS.
TABLE1: Mapping[tuple[str, str], tuple[float, ...]] = {
    (CE, "1/4"): (91.95, 92.79, 92.67, 87.76, 92.27, 93.13, 93.62),
    (CE, "1/2"): (93.83, 94.49, 94.27, 89.15, 94.03, 94.70, 94.95),
    (CE, "3/4"): (94.54, 95.11, 95.01, 89.96, 94.61, 95.29, 95.50),
    (TOTAL, "1/4"): (92.89, 92.87, 93.07, 88.02, 92.56, 93.24, 93.64),
    (TOTAL, "1/2"): (94.17, 94.61, 94.43, 89.37, 94.11, 94.76, 95.01),
    (TOTAL, "3/4"): (94.73, 95.26, 95.03, 89.99, 94.65, 95.31, 95.54),
}
#: Table 3, IoU in percent of CSF, GM and WM with a quarter of the labels. The paper's ± are left out: of 0.03 to 1.57,
#: they are no standard deviations of percentages, and it does not say of what they are.
TABLE3: Mapping[str, Mapping[str, tuple[float, float, float]]] = {
    CE: {
        "U-Net": (78.82, 92.13, 89.17),
        "U-Net++": (81.56, 92.96, 90.22),
        "TRMFCN": (79.91, 92.55, 89.63),
        "ViT": (58.77, 86.03, 79.12),
        "TransUNet": (77.63, 92.04, 88.91),
        "MTUNet": (81.19, 93.14, 90.48),
        "Our method": (81.64, 93.20, 90.63),
    },
    TOTAL: {
        "U-Net": (79.25, 92.20, 89.21),
        "U-Net++": (81.58, 93.00, 90.28),
        "TRMFCN": (80.26, 92.59, 89.67),
        "ViT": (59.37, 86.92, 79.91),
        "TransUNet": (78.21, 92.54, 89.41),
        "MTUNet": (81.41, 93.24, 90.54),
        "Our method": (81.74, 93.30, 90.71),
    },
}
ORDER3 = ("CSF", "GM", "WM")
#: What a network is called in the paper, and the class whose filters can be chosen.
KNOWN: Mapping[str, tuple[str, str]] = {
    "unet": ("U-Net", "monai_deepgmm.networks.UNet"),
    "modifiedunet": ("Our method", "monai_deepgmm.networks.ModifiedUNet"),
    "basicunetplusplus": ("U-Net++", ""),
    "unetr": ("ViT", ""),
}


# The data ----------------------------------------------------------------------------------------------------------


class Source(NamedTuple):
    """The files of one patient in DATA: the images and the label files that may be meant, the best first."""

    patient: str
    images: tuple[Path, ...]
    truths: tuple[Path, ...]


def sources(data: Path) -> list[Source]:
    """Who is in DATA, by the files' names.

    Raises:
        UsageError: there is no such folder, nobody in it, or a file twice.
    """
    if not data.is_dir():
        raise UsageError(f"DATA: there is no folder {data}")
    found: dict[str, dict[str, Path]] = {}
    for path in sorted(data.rglob("*.nii*")):
        if not (named := NAMED.fullmatch(path.name)) or not path.is_file():
            continue
        own = found.setdefault(named[1].upper(), {})
        if other := own.get(named[2].lower()):
            both = " and ".join(str(p.relative_to(data)) for p in (other, path))
            raise UsageError(f"{named[1]}: {both} are the same file twice; keep one of them")
        own[named[2].lower()] = path
    if not found:
        raise UsageError(f"DATA: no file in {data.name} is called like IBSR_01.nii.gz and IBSR_01_seg.nii.gz")
    return [
        Source(
            patient,
            tuple(own[end] for end in IMAGE_ENDS if end in own),
            tuple(own[end] for end in TRUTH_ENDS if end in own),
        )
        for patient, own in sorted(found.items())
    ]


def digest(found: Sequence[Source]) -> str:
    """What tells that the files are still the same: names, sizes, times."""
    paths = [path for source in found for path in (*source.images, *source.truths)]
    facts = [(str(p), p.stat().st_size, p.stat().st_mtime_ns) for p in paths]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()


class Brain(NamedTuple):
    """One patient as the tool reads it, all arrays (X, Y, Z) on one grid.

    Attributes:
        image: T1.
        mask: the brain.
        truth: the protocol's indices, 0 where nothing is labelled.
        affine: (4, 4), mm.
        facts: which files, and what the mask is.
    """

    image: NDArray[np.float32]
    mask: NDArray[np.bool_]
    truth: NDArray[np.uint8]
    affine: NDArray[np.float64]
    facts: Mapping[str, Any]


def load(source: Source) -> Brain:
    """Reads a patient: recodes the labels, finds the mask, and turns the arrays so that slices are stacked last.

    Raises:
        StudyError: a file is missing or cannot be read, no label file holds IBSR's three tissues, or image and labels
            lie on different grids.
    """
    if not source.images:
        ends = " or ".join(f"{source.patient}{end}.nii.gz" for end in IMAGE_ENDS)
        raise StudyError("E_NO_SEQUENCE", "there is no image", f"Add {ends}")
    volume = nifti.read(source.images[0])
    labelled, name = _truth(source)
    if labelled.data.shape != volume.data.shape:
        shapes = f"{volume.name} is {volume.data.shape}, but {name} {labelled.data.shape}"
        raise StudyError("E_GRID", shapes, "Take image and labels from the same release")
    own = np.rint(labelled.data).astype(np.int64)
    recoded = np.array([0, *(protocol.load(WHOLE).tissue(t).index for t in sorted(IBSR, key=IBSR.__getitem__))])
    truth, inside = recoded[own].astype(np.uint8), ndimage.binary_fill_holes(own > 0)
    above = np.isfinite(volume.data) & (volume.data > 0)
    stripped = int(above.sum()) < STRIPPED * int(inside.sum())
    spacing = volume.spacing_mm
    facts = {
        "image": volume.name,
        "truth": name,
        "mask": EVERYWHERE if stripped else FILLED,
        "shape": list(volume.data.shape),
        "spacing_mm": [round(mm, 4) for mm in spacing],
        "voxels_labelled": int((truth > 0).sum()),
    }
    # IBSR's slices are 1.5 mm apart, which is not always clearly more than in the plane: stacked last, all are cut
    # alike. Affines of label files converted from Analyze are not to be trusted, the arrays are.
    thick = int(np.argmax(np.round(spacing, 3)))
    order = [axis for axis in range(3) if axis != thick] + [thick]
    arrays = (np.ascontiguousarray(a.transpose(order)) for a in (volume.data, above if stripped else inside, truth))
    image, mask, turned = arrays
    return Brain(image, mask, turned, volume.affine[:, [*order, 3]], facts)


def _truth(source: Source) -> tuple[Volume, str]:
    """The first label file that holds the three tissues and nothing else."""
    held = []
    for path in source.truths:
        volume = nifti.read(path, dtype=np.float64)
        values = np.unique(volume.data)
        if set(values.tolist()) - {0} == set(map(float, IBSR.values())):
            return volume, volume.name
        held.append(f"{volume.name} holds {len(values)} values up to {values.max():g}")
    found = "; ".join(held) or "there is no label file"
    meant = ", ".join(f"{value} {tissue}" for tissue, value in IBSR.items())
    raise StudyError("E_TRUTH", found, f"Add {source.patient}_seg.nii.gz with {meant}")


def thinned(brain: Brain, every: int) -> Brain:
    """Every n-th slice of those with brain: what a network learns from."""
    held = np.flatnonzero(brain.mask.any(axis=(0, 1)))
    first = int(held[0]) + min(every, len(held)) // 2
    kept = slice(first, int(held[-1]) + 1, every)
    affine = brain.affine.copy()
    affine[:3, 3] += first * affine[:3, 2]
    affine[:3, 2] *= every
    return brain._replace(
        image=brain.image[..., kept], mask=brain.mask[..., kept], truth=brain.truth[..., kept], affine=affine
    )


def prepare(data: Path, out: Path, *, every: int) -> tuple[dict[str, Any], str]:
    """Writes the copies that the tool reads, whole and thinned, with a manifest each, and the protocol of slices.

    Returns:
        patient → facts, or why a patient is left out; and the digest of the sources.

    Raises:
        UsageError: fewer than two patients can be used.
    """
    found = sources(data)
    facts, made = digest(found), out / "data" / "prepared.json"
    asked = {"digest": facts, "every": every}
    if made.is_file() and (kept := json.loads(made.read_text(encoding="utf-8")))["asked"] == asked:
        return kept["patients"], facts
    patients: dict[str, Any] = {}
    for source in found:
        try:
            brain = load(source)
        except StudyError as error:
            patients[source.patient] = {"left_out": f"{error.code}: {error}"}
            continue
        for folder, version in ((out / "data", brain), (out / "slices", thinned(brain, every))):
            (folder / source.patient).mkdir(parents=True, exist_ok=True)
            for name in ("image", "mask", "truth"):
                array = getattr(version, name)
                array = array.astype(np.uint8) if array.dtype == np.bool_ else array
                write_nifti(folder / source.patient / f"{name}.nii.gz", array, version.affine)
        patients[source.patient] = dict(brain.facts)
    used = usable(patients)
    if len(used) < 2:
        told = "; ".join(f"{p}: {fact['left_out']}" for p, fact in patients.items() if "left_out" in fact)
        raise UsageError(f"{len(used)} patient with image and labels; at least 2 are needed ({told or 'no other'})")
    for folder in (out / "data", out / "slices"):
        rows = [f"{p},{p}/image.nii.gz,{p}/mask.nii.gz,{p}/truth.nii.gz\n" for p in used]
        files.write_whole(folder / "manifest.csv", "".join(["patient,T1,mask,truth\n", *rows]).encode())
    by_slice = dataclasses.replace(protocol.load(WHOLE), name=SLICES, unit="slice")
    files.write_whole(out / "slices" / "protocol.yaml", protocol.as_yaml(by_slice).encode())
    files.write_whole(made, as_json({"asked": asked, "patients": patients}))
    return patients, facts


def usable(patients: Mapping[str, Mapping[str, Any]]) -> tuple[str, ...]:
    """Those who are not left out."""
    return tuple(p for p, facts in patients.items() if "left_out" not in facts)


class Split(NamedTuple):
    """Who trains, with labels or without, and who is tested, in the semi-supervised tables."""

    train: tuple[str, ...]
    test: tuple[str, ...]


def split(patients: Sequence[str]) -> Split:
    """Every third patient is tested on; the second, if there are no three."""
    test = tuple(patients[TESTED - 1 :: TESTED]) or tuple(patients[-1:])
    return Split(tuple(p for p in patients if p not in test), test)


# What is run -------------------------------------------------------------------------------------------------------


class Line(NamedTuple):
    """One method of a table.

    Attributes:
        name: as in the table.
        runs: the segmentations, one per seed.
        trained: their trainings; empty where there are none.
        key: which published figures stand beside it; None: none.
    """

    name: str
    runs: tuple[Stage, ...]
    trained: tuple[Stage, ...] = ()
    key: tuple[str, ...] | None = None


def segmented(options: argparse.Namespace, name: str, *how: str, needs: tuple[Path, ...] = ()) -> Stage:
    """The segmentation of whole volumes."""
    folder = options.out / "runs" / name
    data = options.out / "data"
    command = ("segment", str(data), str(folder), "--manifest", str(data / "manifest.csv"), *how)
    return Stage(f"segment_{name}", (*command, "--device", options.device), needs, folder / "summary.tsv")


def trained(options: argparse.Namespace, name: str, network: str, seed: int, *how: str) -> Stage:
    """A training on slices; ``how`` ends with what ``--set`` takes, if anything."""
    folder, slices = options.out / "models" / name, options.out / "slices"
    # All arms take as many steps, and the loss is watched on all slices.
    same = ("validation=0", "tol=0", f"batch_size={options.batch}")
    command = ["train", str(slices), str(folder), "--manifest", str(slices / "manifest.csv"), "--resume"]
    command += ["--protocol", str(slices / "protocol.yaml"), "--network", definition(network, options.filters)]
    command += ["--epochs", str(options.epochs), "--seed", str(seed), "--device", options.device]
    return Stage(f"train_{name}", (*command, *how, "--set", *same, *options.set), (), folder / WEIGHTS)


def definition(network: str, filters: Sequence[int]) -> str:
    """A network with these filters, where its class is known to take them."""
    target = KNOWN.get(network, ("", ""))[1]
    return json.dumps({"_target_": target, "filters": list(filters)}) if target else network


def applied(options: argparse.Namespace, training: Stage, *patients: str) -> Stage:
    """A trained network on whole volumes, slice by slice."""
    model = training.makes.parents[1]
    how = ["--protocol", str(options.out / "slices" / "protocol.yaml"), "--model", str(model)]
    how += ["--patients", *patients] if patients else []
    return segmented(options, model.name, *how, needs=(training.makes,))


def unsupervised(options: argparse.Namespace) -> list[Line]:
    """Table 5: everyone is trained on, without labels, and everyone is segmented."""
    lines = [Line("GMM", (segmented(options, "gmm", "--protocol", WHOLE, "--method", "gmm"),), key=("GMM",))]
    for loss, name in (("gmm", "network, without bias field"), ("gmm_bias", "network, with bias field")):
        own = [trained(options, f"{loss}_seed{seed}", "unet", seed, "--loss", loss) for seed in options.seeds]
        lines.append(Line(name, tuple(applied(options, stage) for stage in own), tuple(own), (name,)))
    default = segmented(options, "default", "--protocol", WHOLE)
    plain = segmented(options, "default_no_field", "--protocol", WHOLE, "--set", "degree=0")
    return [*lines, Line("brain default, no bias field", (plain,)), Line("brain default", (default,))]


def semi_supervised(options: argparse.Namespace, who: Split) -> list[Line]:
    """Tables 1 and 3: each network with each share of labels and each loss; the test patients are segmented."""
    lines = []
    for network in options.networks:
        for ratio in options.ratios:
            for loss in (CE, TOTAL):
                beta = "0" if loss == CE else options.beta
                how = ["--loss", "gmm_tv", "--labels", ratio, "--patients", *who.train]
                how += [] if beta is None else ["--set", f"beta={beta}"]
                short = re.sub(r"\W+", "_", network)
                name = f"{short}_{ratio.replace('/', 'of')}_{'ce' if loss == CE else 'total'}"
                own = [trained(options, f"{name}_seed{seed}", network, seed, *how) for seed in options.seeds]
                runs = tuple(applied(options, stage, *who.test) for stage in own)
                lines.append(Line(network, runs, tuple(own), (loss, ratio)))
    return lines


# Figures -----------------------------------------------------------------------------------------------------------


def scores(run_folder: Path, data: Path, patients: Sequence[str]) -> dict[str, dict[str, tuple[float, ...]]]:
    """Patient → tissue → precision, recall, F1, Jaccard, among the voxels that have a true label; NaN: undefined."""
    wanted = protocol.load(WHOLE)
    found = {}
    for patient in patients:
        path = run_folder / patient / f"{patient}_dseg.nii.gz"
        if path.is_file():
            labels, truth = (
                np.rint(nifti.read(p, dtype=np.float64).data).astype(np.int64)
                for p in (path, data / patient / "truth.nii.gz")
            )
            found[patient] = agreement(labels, truth, {t.name: t.index for t in wanted.tissues})
    return found


def agreement(labels: Labels, truth: Labels, tissues: Mapping[str, int]) -> dict[str, tuple[float, ...]]:
    """Tissue → precision, recall, F1, Jaccard of labels (X, Y, Z) where ``truth`` is above 0."""
    inside = truth > 0
    found = metrics.overlap(metrics.confusion(labels[inside], truth[inside], list(tissues.values())))
    columns = zip(found.precision, found.recall, found.dice, found.jaccard, strict=True)
    return {name: tuple(map(float, column)) for name, column in zip(tissues, columns, strict=True)}


def row(options: argparse.Namespace, line: Line, patients: Sequence[str], ledger: Ledger) -> dict[str, Any]:
    """A method's figures: of each tissue and measure the mean over seeds and the values of the patients."""
    runs = [scores(stage.makes.parent, options.out / "data", patients) for stage in line.runs if ledger.done(stage)]
    common = [p for p in patients if runs and all(p in found for found in runs)]
    values = {
        tissue: {
            measure: {p: _rounded(fmean(found[p][tissue][i] for found in runs)) for p in common}
            for i, measure in enumerate(MEASURES)
        }
        for tissue in (IBSR if common else ())
    }
    return {
        "name": line.name,
        "key": list(line.key or ()),
        "seeds": len(runs),
        "n": len(common),
        "values": values,
        "cpu_seconds": [ledger.record(stage).get("cpu_seconds", 0.0) for stage in line.trained],
        "seconds": [ledger.record(stage).get("wall_seconds", 0.0) for stage in line.runs],
    }


def _rounded(value: float) -> float | None:
    """Four digits; None, which JSON has, for what is undefined."""
    return None if math.isnan(value) else round(value, 4)


def results(
    options: argparse.Namespace, patients: Mapping[str, Any], plan: Mapping[str, list[Line]], ledger: Ledger
) -> dict[str, Any]:
    """The content of ``tables.json``, as far as the runs have come."""
    everyone = usable(patients)
    who = split(everyone)
    chosen = {"unsupervised": everyone, "semi": who.test}
    keys = ("epochs", "every", "filters", "batch", "beta", "seeds", "networks", "ratios", "jobs", "device", "set")
    return {
        "paper": "Ma 2022, Tables 1, 3 and 5",
        "patients": patients,
        "split": {"train": list(who.train), "test": list(who.test)},
        "machine": machine(),
        "settings": {key: getattr(options, key) for key in keys},
        "wall_seconds": ledger.earlier,
        **{part: [row(options, line, chosen[part], ledger) for line in lines] for part, lines in plan.items()},
    }


# Tables ------------------------------------------------------------------------------------------------------------


def markdown(found: Mapping[str, Any]) -> str:
    """The page."""
    lines = ["# IBSR18: Tables 1, 3 and 5 of Ma 2022", "", *about(found)]
    if "unsupervised" in found:
        title = "## Table 5: without labels"
        lines += ["", title, "", "All volumes are trained on and segmented.", "", *cells(table5(found["unsupervised"]))]
    if "semi" in found:
        who = found["split"]
        told = (
            f"{len(who['train'])} volumes are trained on, {len(who['test'])} are tested on: {', '.join(who['test'])}."
        )
        lines += ["", "## Table 1: recall, the mean over tissues", "", told, "", *cells(table1(found["semi"]))]
        lines += ["", "## Table 3: IoU (Jaccard) of each tissue", "", *cells(table3(found["semi"]))]
    return "\n".join(lines) + "\n"


def about(found: Mapping[str, Any]) -> Iterator[str]:
    """What the figures were computed from."""
    made, settings, patients = found["machine"], found["settings"], found["patients"]
    used = [patients[p] for p in usable(patients)]
    masks, shapes = (Counter(map(str, (f[key] for f in used))) for key in ("mask", "shape"))
    yield "Mean ± standard deviation over volumes, among the voxels that have a label; named without truth."
    yield ""
    yield f"- {len(used)} volumes; voxels: {_counted(shapes)}; brain mask: {_counted(masks)}"
    yield from (f"- left out: {p}: {f['left_out']}" for p, f in patients.items() if "left_out" in f)
    yield (
        f"- networks: slices of 2-D, every {settings['every']}th of them to learn from, filters "
        f"{' '.join(map(str, settings['filters']))}, {settings['epochs']} epochs, seeds "
        f"{' '.join(map(str, settings['seeds']))}; the paper's: lr 1e-4, batch 20, 200 epochs"
    )
    beta = settings["beta"]
    yield f"- β: {'the default of deepgmm train' if beta is None else beta} per voxel; L_CE alone is β = 0"
    packages = ", ".join(f"{name} {version}" for name, version in made["versions"].items())
    yield f"- machine: {made['cpu']}, {made['cores']} cores, {made['system']}, {settings['device']}; {packages}"
    yield f"- wall time: {clock(found['wall_seconds'])} with {settings['jobs']} jobs"


def table5(rows: Sequence[Mapping[str, Any]]) -> Iterator[Sequence[str]]:
    """Each method's tissues: ours, and the paper's below."""
    yield ("method", "tissue", "figures", *MEASURES, "volumes", "training CPU s")
    for ours in rows:
        for place, tissue in enumerate(TISSUES):
            own = [moments(ours, tissue, measure) for measure in MEASURES]
            cpu = " ".join(f"{s:.0f}" for s in ours["cpu_seconds"]) if place == 0 else ""
            yield (f"**{ours['name']}**" if place == 0 else "", tissue, "ours", *own, str(ours["n"]), cpu)
            if ours["key"]:
                yield ("", "", "paper", *(short(v) for v in TABLE5[ours["key"][0]][tissue]), "", "")


def table1(rows: Sequence[Mapping[str, Any]]) -> Iterator[Sequence[str]]:
    """Each network and share of labels: the two losses, ours and the paper's."""
    yield ("network", "labelled", "figures", CE, TOTAL, "gain", "training CPU s")
    for network, ratio, pair in _pairs(rows):
        own = [_recall(pair.get(loss)) for loss in (CE, TOTAL)]
        gain = f"{own[1] - own[0]:+.3f}" if None not in own else "–"
        cpu = " / ".join(" ".join(f"{s:.0f}" for s in r["cpu_seconds"]) for r in pair.values())
        yield (f"**{network}**", ratio, "ours", *("–" if v is None else f"{v:.3f}" for v in own), gain, cpu)
        theirs = KNOWN.get(network, (network, ""))[0]
        if theirs in PAPERS and (CE, ratio) in TABLE1:
            known = [TABLE1[loss, ratio][PAPERS.index(theirs)] for loss in (CE, TOTAL)]
            yield (f"{theirs}", "", "paper", *map(short, known), f"{(known[1] - known[0]) / 100:+.3f}", "")


def table3(rows: Sequence[Mapping[str, Any]]) -> Iterator[Sequence[str]]:
    """Each network, share of labels and loss: IoU by tissue; the paper gives those of a quarter."""
    yield ("network", "labelled", "loss", "figures", *ORDER3, "volumes")
    for network, ratio, pair in _pairs(rows):
        theirs = KNOWN.get(network, (network, ""))[0]
        for loss, ours in pair.items():
            own = [moments(ours, tissue, "JS") for tissue in ORDER3]
            yield (f"**{network}**", ratio, loss, "ours", *own, str(ours["n"]))
            if ratio == "1/4" and theirs in TABLE3[loss]:
                yield (theirs, "", "", "paper", *map(short, TABLE3[loss][theirs]), "")


def _pairs(rows: Sequence[Mapping[str, Any]]) -> Iterator[tuple[str, str, dict[str, Mapping[str, Any]]]]:
    """Network, share of labels, loss → row."""
    for network, ratio in dict.fromkeys((r["name"], r["key"][1]) for r in rows):
        yield network, ratio, {r["key"][0]: r for r in rows if (r["name"], r["key"][1]) == (network, ratio)}


def _recall(ours: Mapping[str, Any] | None) -> Any:
    """The mean over volumes, then tissues; None where nothing has been computed."""
    if not ours or not ours["values"]:
        return None
    recalls = [[v for v in ours["values"][tissue]["recall"].values() if v is not None] for tissue in IBSR]
    return fmean(map(fmean, filter(None, recalls)))


def moments(ours: Mapping[str, Any], tissue: str, measure: str) -> str:
    """Mean ± standard deviation over volumes of what is defined."""
    kept = [v for v in ours["values"].get(tissue, {}).get(measure, {}).values() if v is not None]
    sd = f" ± {stdev(kept):.3f}" if len(kept) > 1 else ""
    return f"{fmean(kept):.3f}{sd}" if kept else "–"


def short(percent: float) -> str:
    return f"{percent / 100:.3f}"


def cells(rows: Iterator[Sequence[str]]) -> list[str]:
    """Markdown."""
    head, *rest = rows
    return [f"| {' | '.join(line)} |" for line in (head, ["---"] * len(head), *rest)]


def _counted(counts: Counter[str]) -> str:
    return ", ".join(f"{what} ({n})" for what, n in counts.items())


# The run -----------------------------------------------------------------------------------------------------------


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add = parser.add_argument
    add("data", metavar="DATA", type=Path, help="the folder with the IBSR volumes")
    add("out", metavar="OUT", type=Path, help="the folder for tables, copies, runs and networks")
    add("--only", choices=["unsupervised", "semi"], help="Table 5, or Tables 1 and 3; both if absent")
    add("--networks", nargs="+", default=["unet", "modifiedunet"], help="of the semi-supervised tables")
    add("--ratios", nargs="+", default=list(RATIOS), metavar="I/N", help="shares of volumes with labels")
    add("--seeds", type=int, nargs="+", default=[0], metavar="S", help="one training for each")
    add("--epochs", type=int, default=20, metavar="N", help="of every training")
    add("--every", type=int, default=8, metavar="N", help="networks learn from each N-th slice")
    add("--filters", type=int, nargs="+", default=[16, 32, 64, 128, 256], metavar="N", help="of unet and modifiedunet")
    add("--batch", type=int, default=4, metavar="N", help="slices in a gradient step")
    add("--beta", metavar="β", help="of L_GMM_TV beside labels, per voxel; the default of deepgmm train if absent")
    add("--set", nargs="+", default=[], metavar="KEY=VALUE", help="other settings of all trainings")
    add("--jobs", type=int, default=os.cpu_count() or 1, metavar="N", help="processes at the same time")
    add("--device", default="cpu", help="as of deepgmm")
    options = parser.parse_args(argv)
    options.data, options.out = options.data.resolve(), options.out.resolve()  # a stage is known by its command
    numbers = (options.jobs, options.every, options.epochs, options.batch, *options.filters)
    if min(numbers) < 1 or len(set(options.seeds)) < len(options.seeds):
        parser.error("--jobs, --every, --epochs, --batch and --filters must be at least 1, and --seeds all different")
    if options.data in (options.out, *options.out.parents):
        parser.error("OUT must not lie in DATA")
    return options


def reproduce(options: argparse.Namespace) -> int:
    """Everything, stage after stage; the tables are written anew whenever rows have been added.

    Returns:
        The exit code: 1 if a patient is left out, or a method failed on everyone.

    Raises:
        StageError: a stage failed.
        UsageError: DATA does not hold what is needed.
    """
    patients, facts = prepare(options.data, options.out, every=options.every)
    ledger = Ledger(options.out, facts)
    used = usable(patients)
    ledger.say(f"{len(used)} volumes")
    for patient, known in patients.items():
        if "left_out" in known:
            print(f"left out: {patient}: {known['left_out']}", file=sys.stderr)
    plan = {"unsupervised": unsupervised(options), "semi": semi_supervised(options, split(used))}
    good = len(used) == len(patients)
    for part, lines in plan.items():
        if options.only not in (None, part):
            continue
        for line in (line for line in lines if not line.trained):
            for stage in line.runs:
                good &= attempted(ledger, stage, options.jobs)
        write(options, patients, plan, ledger)
        run_apart(ledger, [stage for line in lines for stage in line.trained], options.jobs)
        for line in (line for line in lines if line.trained):
            for stage in line.runs:
                good &= attempted(ledger, stage, options.jobs)
        write(options, patients, plan, ledger)
    ledger.say(f"done: see {options.out / 'tables.md'}")
    return cli.OK if good else cli.SOME_FAILED


def attempted(ledger: Ledger, stage: Stage, jobs: int) -> bool:
    """Runs a stage; False if it failed on every patient, which leaves its row empty and the others alone."""
    try:
        run(ledger, stage, jobs)
    except StageError as error:
        if error.code != cli.ALL_FAILED:
            raise
        ledger.say(f"{stage.name}: every patient failed; see {stage.makes}")
        return False
    return True


def write(
    options: argparse.Namespace, patients: Mapping[str, Any], plan: Mapping[str, list[Line]], ledger: Ledger
) -> None:
    """Writes the tables, as far as the runs have come."""
    ledger.save()
    # A part that was not asked for is shown as far as an earlier run has brought it.
    shown = {
        part: lines
        for part, lines in plan.items()
        if options.only in (None, part) or any(ledger.done(stage) for line in lines for stage in line.runs)
    }
    content = results(options, patients, shown, ledger)
    files.write_whole(options.out / "tables.json", as_json(content))
    files.write_whole(options.out / "tables.md", markdown(content).encode())


def main(argv: Sequence[str] | None = None) -> int:
    options = parse(argv)
    signal.signal(signal.SIGTERM, interrupt)
    try:
        return reproduce(options)
    except StageError as error:
        print(f"reproduce_ma: {error}; run the same command again to go on", file=sys.stderr)
        return error.code
    except UsageError as error:
        print(f"reproduce_ma: {error}", file=sys.stderr)
        return cli.USAGE
    except StudyError as error:
        print(f"reproduce_ma: {error.code}: {error}", file=sys.stderr)
        return cli.SOME_FAILED
    except KeyboardInterrupt:
        print("reproduce_ma: interrupted; run the same command again to go on", file=sys.stderr)
        return cli.INTERRUPTED


if __name__ == "__main__":
    sys.exit(main())
