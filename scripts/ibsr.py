"""The volumes of IBSR as they were downloaded, and the copies of them that the tool reads."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import runner
from numpy.typing import NDArray
from scipy import ndimage

from monai_deepgmm import protocol
from monai_deepgmm.errors import StudyError, UsageError
from monai_deepgmm.images import nifti
from monai_deepgmm.images.volume import Volume
from monai_deepgmm.phantom.heart import write_nifti

#: IBSR's own value of each tissue.
VALUES = {"CSF": 1, "GM": 2, "WM": 3}
#: The ends of names, the best first. The last is also the name of 43 structures: what is in it decides.
IMAGE_ENDS = ("", "_ana_strip", "_ana")
LABEL_ENDS = ("_seg", "_segtri", "_segtri_ana", "_segtri_fill_ana", "_seg_ana")
NAMED = re.compile(r"(IBSR_?\d+)(\w*)\.nii(\.gz)?", re.IGNORECASE)
#: An image with more voxels above 0 than this many times the labelled ones still has its skull.
STRIPPED = 2.0
WHOLE, SLICES = "brain", "brain-slices"
EVERYWHERE, FILLED = "voxels above 0", "labelled voxels, holes filled"


class Source(NamedTuple):
    """The files of one patient: the images and the label files that may be meant, the best first."""

    patient: str
    images: tuple[Path, ...]
    labels: tuple[Path, ...]


def sources(data: Path) -> list[Source]:
    """Who is in a folder, by the files' names.

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
    ends = (IMAGE_ENDS, LABEL_ENDS)
    return [Source(p, *(tuple(own[e] for e in kind if e in own) for kind in ends)) for p, own in sorted(found.items())]


class Brain(NamedTuple):
    """One patient as the tool reads it, all arrays (X, Y, Z) on one grid.

    Attributes:
        image: T1.
        mask: the brain.
        truth: the reference labels by the protocol's indices, 0 where nothing is labelled.
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
    volume, labelled = nifti.read(source.images[0]), _labelled(source)
    if labelled.data.shape != volume.data.shape:
        shapes = f"{volume.name} is {volume.data.shape}, but {labelled.name} {labelled.data.shape}"
        raise StudyError("E_GRID", shapes, "Take image and labels from the same release")
    own = np.rint(labelled.data).astype(np.int64)
    recoded = np.array([0, *(protocol.load(WHOLE).tissue(t).index for t in sorted(VALUES, key=VALUES.__getitem__))])
    truth, inside = recoded[own].astype(np.uint8), ndimage.binary_fill_holes(own > 0)
    above = np.isfinite(volume.data) & (volume.data > 0)
    stripped = int(above.sum()) < STRIPPED * int(inside.sum())
    spacing = volume.spacing_mm
    facts = {
        "image": volume.name,
        "truth": labelled.name,
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
    return Brain(*arrays, volume.affine[:, [*order, 3]], facts)


def _labelled(source: Source) -> Volume:
    """The first label file that holds the three tissues and nothing else."""
    held = []
    for path in source.labels:
        volume = nifti.read(path, dtype=np.float64)
        values = np.unique(volume.data)
        if set(values.tolist()) - {0} == set(map(float, VALUES.values())):
            return volume
        held.append(f"{volume.name} holds {len(values)} values up to {values.max():g}")
    found = "; ".join(held) or "there is no label file"
    meant = ", ".join(f"{value} {tissue}" for tissue, value in VALUES.items())
    raise StudyError("E_TRUTH", found, f"Add {source.patient}_seg.nii.gz with {meant}")


def thinned(brain: Brain, every: int) -> Brain:
    """Every n-th slice of those with brain: what a network learns from."""
    held = np.flatnonzero(brain.mask.any(axis=(0, 1)))
    first = int(held[0]) + min(every, len(held)) // 2
    kept = slice(first, int(held[-1]) + 1, every)
    affine = brain.affine.copy()
    affine[:3, 3] += first * affine[:3, 2]
    affine[:3, 2] *= every
    thin = {name: getattr(brain, name)[..., kept] for name in ("image", "mask", "truth")}
    return brain._replace(**thin, affine=affine)


def prepare(data: Path, out: Path, *, every: int) -> tuple[dict[str, Any], str]:
    """Writes the copies that the tool reads, whole and thinned, with a manifest each, and the protocol of slices.

    Returns:
        patient → facts, or why a patient is left out; and what tells that the sources are the same.

    Raises:
        UsageError: fewer than two patients can be used.
    """
    found = sources(data)
    same = runner.stamps(path for source in found for path in (*source.images, *source.labels))
    asked = {"digest": same, "every": every}
    made = runner.kept(out / "data" / "prepared.json", asked, lambda: {"patients": _copied(found, out, every)})
    return made["patients"], same


def _copied(found: Sequence[Source], out: Path, every: int) -> dict[str, Any]:
    """Patient → facts, or why a patient is left out."""
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
    rows = [f"{p},{p}/image.nii.gz,{p}/mask.nii.gz,{p}/truth.nii.gz\n" for p in used]
    for folder in (out / "data", out / "slices"):
        runner.write(folder / "manifest.csv", "".join(["patient,T1,mask,truth\n", *rows]))
    by_slice = dataclasses.replace(protocol.load(WHOLE), name=SLICES, unit="slice")
    runner.write(out / "slices" / "protocol.yaml", protocol.as_yaml(by_slice))
    return patients


def usable(patients: Mapping[str, Mapping[str, Any]]) -> tuple[str, ...]:
    """Those who are not left out."""
    return tuple(p for p, facts in patients.items() if "left_out" not in facts)
