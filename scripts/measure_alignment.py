"""How well sequences are brought together again that were moved apart on purpose.

    python scripts/measure_alignment.py DIR OUT

Each patient of DIR, whose sequences agree, is segmented as it is, with ``--align off`` and with ``auto``; then every
slice of every sequence but the reference is moved in its plane, by up to ``--most`` mm and another way each, and both
are done again. Told are the named Dice against the reference labels, how far slices lie from where they were, in mm and
in pixels of the files, and CPU seconds. The reference labels are used for Dice, and as the mask where DIR has no other.
Results that alignment does not change are not computed twice.
Each patient's figures are kept in OUT: interrupt it, and run it again.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
import time
import zlib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import measure_sets
import nibabel as nib
import numpy as np
import numpy.typing as npt
import runner
import torch
from measure_accuracy import code_digest
from measure_sets import hearts
from scipy.ndimage import shift as shifted

from monai_deepgmm.errors import StudyError, UsageError
from monai_deepgmm.images import grid, loading, nifti
from monai_deepgmm.methods import config
from monai_deepgmm.patients import discovery
from monai_deepgmm.patients.study import Study
from monai_deepgmm.registration import Align
from monai_deepgmm.results.segment import segment

Facts = dict[str, Any]
#: The rows of the table: what is segmented, and how.
WAYS: tuple[tuple[str, Align], ...] = (("as it is", "off"), ("as it is", "auto"), ("moved", "off"), ("moved", "auto"))


# Moved apart ---------------------------------------------------------------------------------------------------------


def moved(study: Study, folder: Path, most_mm: float, seed: int) -> tuple[Study, dict[str, list[list[float]]]]:
    """Writes the sequences but the first, each slice moved; the study of them, and by how many mm (RAS)."""
    wanted = hearts.asked().protocol
    names = [s for s in wanted.sequences if s in study.images]
    rng = np.random.default_rng([seed, zlib.crc32(study.patient.encode())])
    images, planted = dict(study.images), {}
    for name in names[1:]:
        source = nib.load(study.images[name])
        data = np.asanyarray(source.dataobj).astype(np.float32)
        volume = nifti.read(study.images[name])
        axis = grid.slice_axis(volume.spacing_mm)
        plane = [i for i in range(3) if i != axis]
        steps = volume.affine[:3, :3]
        planted[name] = []
        for one in np.moveaxis(data, axis, 0):
            angle, radius = rng.uniform(0, 2 * np.pi), most_mm * np.sqrt(rng.uniform())
            along = radius * np.array([np.cos(angle), np.sin(angle)])
            one[:] = shifted(one, along / np.array(volume.spacing_mm)[plane], order=3, mode="constant")
            planted[name].append((steps[:, plane] / np.linalg.norm(steps[:, plane], axis=0) @ along).tolist())
        images[name] = folder / study.patient / f"{name}.nii.gz"
        images[name].parent.mkdir(parents=True, exist_ok=True)
        nib.save(nib.Nifti1Image(data, source.affine, source.header, dtype=np.float32), images[name])
    return dataclasses.replace(study, images=images), planted


# One patient ---------------------------------------------------------------------------------------------------------


def measured(study: Study, folder: Path, most_mm: float, seed: int) -> Facts:
    """What is measured of a patient: by each way, Dice of each labelled slice; residues of each moved slice."""
    wanted = hearts.asked().protocol
    other, planted = moved(study, folder, most_mm, seed)
    found: Facts = {"planted": planted, "seconds": 0.0}
    for kind, one in (("as it is", study), ("moved", other)):
        began = time.process_time()
        loading.load(one, wanted, align="off")
        middle = time.process_time()
        scan = loading.load(one, wanted, align="auto")
        found["seconds"] = max(found["seconds"], time.process_time() - middle - (middle - began))
        told = {} if scan.alignment is None else scan.alignment["sequences"]
        found[kind] = {s: facts["slices"] for s, facts in told.items()}
        found[f"{kind}, off"] = dice(one, study, "off")
        same = not any(facts["moved"] for facts in told.values())  # then labels are, bit by bit
        found[f"{kind}, auto"] = found[f"{kind}, off"] if same else dice(one, study, "auto")
    spacing = scan.reference.spacing_mm
    return {**found, "pixel_mm": float(np.delete(spacing, grid.slice_axis(spacing)).mean())}


def dice(one: Study, real: Study, align: Align) -> list[Facts]:
    """Dice of each labelled slice, by the default method without intervals, which would change no label."""
    result = segment(one, config.build(align=align, settings={"perturbations": 0}))
    run = hearts.Run(result.reference, result.labels.astype(np.int64), tuple(result.images), result.slice_axis)
    rows = hearts.by_slice(run.labels, hearts.known(real, result.protocol, run), run, result.protocol)
    return [row["dice"] for row in rows]


# Tables --------------------------------------------------------------------------------------------------------------


def residues(found: Iterable[Facts], sequence: str) -> dict[str, npt.NDArray[np.float64]]:
    """How far from where it was each moved slice of a sequence is, by way of counting.

    planted: before it is aligned; residue: after that; own: after that, from where the slice that nobody has moved
    would have come to, since sequences of patients agree no better than they do.
    """
    ways: dict[str, list[float]] = {"planted": [], "residue": [], "pixels": [], "own": []}
    for facts in found:
        for z, told in facts["moved"].get(sequence, {}).items():
            planted, back = np.array(facts["planted"][sequence][int(z)]), np.array(told["back_mm"])
            after = np.linalg.norm(planted + back * told["moved"])
            unmoved = facts["as it is"].get(sequence, {}).get(z, {"back_mm": [0.0] * 3})["back_mm"]
            own = np.linalg.norm(planted + back - unmoved)
            for way, mm in zip(ways, (np.linalg.norm(planted), after, after / facts["pixel_mm"], own), strict=True):
                ways[way].append(float(mm))
    return {way: np.array(values) for way, values in ways.items()}


def tables(found: Mapping[str, Facts]) -> str:
    """Dice, residues, and what happened to patients that agree."""
    rows = [("complete slices", "n", *(t.name for t in hearts.asked().protocol.tissues), "mean")]
    for kind, align in WAYS:
        slices = [one for facts in found.values() for one in facts[f"{kind}, {align}"]]
        whole = [one for one in slices if len(runner.known(one.values())) == len(one)]
        each = [runner.mean(one[t] for one in whole) for t in (whole[0] if whole else ())]
        mean = runner.mean(runner.mean(one.values()) for one in whole)
        rows.append((f"{kind}, `--align {align}`", str(len(whole)), *map(runner.shown, (*each, mean))))
    lines = [("mm, median", "slices", "planted", "residue", "90 %", "in pixels", "from its own place")]
    for sequence in dict.fromkeys(s for facts in found.values() for s in facts["planted"]):
        one = residues(found.values(), sequence)
        planted, residue, pixels, own = (float(np.median(values)) for values in one.values())
        numbers = (planted, residue, float(np.quantile(one["residue"], 0.9)), pixels, own)
        lines.append((sequence, str(len(one["residue"])), *(f"{v:.2f}" for v in numbers)))
    touched = [p for p, f in found.items() if any(z["moved"] for s in f["as it is"].values() for z in s.values())]
    seconds = [facts["seconds"] for facts in found.values()]
    last = f"{len(touched)} of {len(found)} patients as they are had a slice moved. "
    last += f"Alignment: {np.mean(seconds):.2f} CPU s a patient, at most {max(seconds):.2f}."
    return f"{runner.table(rows)}\n\n{runner.table(lines)}\n\n{last}"


# The run -------------------------------------------------------------------------------------------------------------


def main(argv: Sequence[str] | None = None) -> int:
    """Parses, measures and returns the exit code."""
    top = runner.parser(__doc__)
    top.add_argument("DIR", type=Path, help="patients whose sequences agree, with reference labels")
    top.add_argument("OUT", type=Path, help="for what was measured, and the moved images")
    top.add_argument("--most", type=float, default=8.0, metavar="MM", help="how far slices are moved at most")
    top.add_argument("--seed", type=int, default=0, help="of how they are moved")
    top.add_argument("--patients", nargs="+", default=(), metavar="ID", help="only these")
    options = top.parse_args(argv)
    return runner.ended("measure_alignment", lambda: run(options))


def run(options: argparse.Namespace) -> int:
    """Measures all patients and prints the tables; 1 if one was left out."""
    torch.set_num_threads(1)
    studies = discovery.find(options.DIR, hearts.asked().protocol, patients=options.patients).studies
    code, found = code_digest(), {}
    for study in studies:
        asked = {"code": code, "files": runner.stamps(measure_sets.files(study))}
        asked |= {"most": options.most, "seed": options.seed}
        path = options.OUT / "patients" / f"{study.patient}.json"

        def make(study: Study = study) -> Facts:
            return measured(study, options.OUT / "moved", options.most, options.seed)

        try:
            found[study.patient] = runner.kept(path, asked, make)
        except StudyError as error:
            print(f"left out: {study.patient}: {error.code}: {error}", file=sys.stderr)
    if not found:
        raise UsageError("DIR: no patient could be measured")
    page = f"{tables(found)}\n\n{runner.machine_line(runner.machine())}\n"
    runner.write(options.OUT / "alignment.md", page)
    print(page)
    return int(len(found) < len(studies))


if __name__ == "__main__":
    sys.exit(main())
