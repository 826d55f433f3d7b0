"""The pictures that ``reproduce_paper.py`` draws: the sequences of one slice, and what each method made of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import runner

from monai_deepgmm import protocol
from monai_deepgmm.images import labels as reference_labels
from monai_deepgmm.images import loading
from monai_deepgmm.patients.study import Cohort
from monai_deepgmm.results import metrics, mosaic
from monai_deepgmm.results.greys import grey_range
from monai_deepgmm.results.tiles import grey_tile, outlined, painted, resized

#: The longer side of a tile.
TILE_PX = 300


def draw(out: Path, found: Cohort, place: tuple[str, int], runs: Sequence[tuple[str, str, bool]], name: str) -> None:
    """Draws one slice: the sequences and the reference labels above, each method's labels below with NLL and mean Dice.

    Args:
        out: the folder; the picture goes right into it.
        found: the patients.
        place: which slice of whom.
        runs: (method's name, folder below OUT/runs, whether its labels are re-ordered with the reference labels).
        name: of the file.
    """
    infarct, (patient, index) = protocol.load("infarct"), place
    study = next(s for s in found.studies if s.patient == patient)
    scan = loading.load(study, infarct)
    known = reference_labels.read(study, infarct, scan.sequences, like=scan.reference).labels
    paths = [out / "runs" / folder / patient / f"{patient}_dseg" for _, folder, _ in runs]
    notes = [runner.read_json(p.with_suffix(".json")) for p in paths]
    view = mosaic.view(scan.reference.affine, notes[0]["slice_axis"])
    row_mm, column_mm = (scan.reference.spacing_mm[axis] for axis in view.axes[1:])
    box = mosaic.shown_box(view.upright(scan.mask)[[index]], row_mm, column_mm)
    sides = [(b.stop - b.start) * mm for b, mm in zip(box, (row_mm, column_mm), strict=True)]
    size = (round(sides[0] * TILE_PX / max(sides)), round(sides[1] * TILE_PX / max(sides)))
    cuts = [view.upright(volume)[index][box] for volume in (*scan.image, scan.mask, known)]
    greys = [grey_tile(cut, grey_range(cut), size) for cut in cuts[:-2]]
    mask, indices = resized(cuts[-2], size), [t.index for t in infarct.tissues]

    def tile(labels: np.ndarray) -> np.ndarray:
        return painted(greys[0], resized(labels, size), infarct.tissues)

    captions, tiles = [], []
    for (method, _, reorder), path, note in zip(runs, paths, notes, strict=True):
        labels = view.upright(runner.labels_in(path.with_suffix(".nii.gz")))[index][box]
        labels = reordered(labels, cuts[-1], indices) if reorder else labels
        dice = runner.mean(metrics.overlap(metrics.confusion(labels, cuts[-1], indices)).dice.tolist())
        nll = next((u.get("nll") for u in note["fit"]["units"] if u["slice"] == index), None)  # None: too small
        captions.append(f"{method}: NLL {runner.shown(nll)}, Dice {runner.shown(dice, 2)}")
        tiles.append(tile(labels))
    above = [*(outlined(g, mask) for g in greys), tile(cuts[-1])]
    blocks = [
        mosaic.Block("", [""], [*scan.sequences, "reference labels"], [above]),
        mosaic.Block("", [""], captions, [tiles]),
    ]
    mosaic.stacked(blocks).save(out / name, "PNG", optimize=True)


def reordered(labels: np.ndarray, known: np.ndarray, indices: Sequence[int]) -> np.ndarray:
    """The labels under the names that suit the reference labels best."""
    order = metrics.match(metrics.dice_table(metrics.confusion(labels, known, indices)))
    renamed = np.zeros_like(labels)
    for place, predicted in enumerate(order):
        renamed[labels == indices[predicted]] = indices[place]
    return renamed


def median_slice(found: Mapping[tuple[str, int], Mapping[str, np.ndarray]], measure: str) -> tuple[str, int]:
    """The slice in the middle of the order by mean Dice."""
    return sorted(found, key=lambda place: (found[place][measure][-1], place))[(len(found) - 1) // 2]


def panels(
    out: Path, found: Cohort, tested: Sequence[str], seed: int, scores: Callable[[Path, Sequence[str]], Any]
) -> Iterator[tuple[str, str]]:
    """Draws what can be drawn by now: (caption, file name) of each; ``scores`` are those of a run's patients."""
    everyone = [study.patient for study in found.studies]
    # Pillow's own font has no μ.
    first = (("GMM", "gmm_diag"), ("deepG", "deepg"), ("SVGMM", "svgmm_tied"), ("deepSVG", "deepsvg"))
    second = (("SVGMM", "svgmm_tied", True), ("deepSVG", f"cohort_seed{seed}", True))
    second += (("SVGMM, means", "svgmm_mu_tied", False), ("deepSVG, means", f"cohort_mu_seed{seed}", False))
    for name, about, runs, patients, measure in (
        ("figure2.png", "like Figure 2", tuple((*run, True) for run in first), everyone, "dice_matched"),
        ("figure3.png", f"like Figure 3, seed {seed}", second, tested, "dice"),
    ):
        each = [scores(out / "runs" / folder, patients) for _, folder, _ in runs]
        common = {place: each[-1][place] for place in set.intersection(*map(set, each))}
        if not common:
            continue
        place = median_slice(common, measure)
        draw(out, found, place, runs, name)
        where = f"{place[0]}, slice {place[1]}, the median by Dice of {runs[-1][0]}"
        how = "GMM with diagonal Σ, all else with shared Σ; labels oracle-matched unless means are known"
        colors = "Blood orange, myocardium blue, edema yellow, scar green"
        yield f"{about}: {where}. {how}. NLL per voxel, mean Dice. {colors}.", name
