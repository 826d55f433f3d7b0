"""The left ventricle found where no mask is given, against the reader's, and the default method inside it."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator, Mapping, Sequence
from functools import partial

import numpy as np
import numpy.typing as npt
import runner

from measure_sets import Facts, Figure, Set, hearts
from monai_deepgmm.errors import StudyError
from monai_deepgmm.images import loading
from monai_deepgmm.images.mask import LEAST_CONFIDENCE
from monai_deepgmm.localisation import ventricle
from monai_deepgmm.patients.study import Study

Mask = npt.NDArray[np.bool_]

#: Which sequences the ventricle is found from, where a patient has them.
SUBSETS = (("LGE", "T2", "bSSFP"), ("LGE", "bSSFP"), ("bSSFP",), ("T2",), ("LGE",))
#: A slice below this Dice is counted; a centre within so many mm is right.
POOR, NEAR_MM = 0.8, 10.0


def found(study: Study, *, named: bool) -> Facts:
    """What is measured of one heart: the mask from each subset and, if asked for, Dice of tissues inside it."""
    wanted = hearts.asked().protocol
    scan = loading.load(study, wanted)
    facts: Facts = {"masks": {}}
    for subset in SUBSETS:
        if not set(subset) <= set(scan.sequences):
            continue
        channels = scan.image[[scan.sequences.index(s) for s in subset]]
        began = time.process_time()
        one = ventricle.find_by(channels, wanted, subset, scan.reference.spacing_mm)
        seconds = time.process_time() - began
        against = _against(one.mask, scan.mask, scan.reference.spacing_mm)
        facts["masks"]["+".join(subset)] = {**against, "refused": one.confidence < LEAST_CONFIDENCE, "seconds": seconds}
    if named:
        auto = dataclasses.replace(study, mask=None, mask_labels=(), mask_rule="auto")
        try:
            run = hearts.segmented(auto)
            facts["slices"] = list(hearts.by_slice(run.labels, hearts.known(study, wanted, run), run, wanted))
        except StudyError as error:
            if error.code != "E_MASK_UNSURE":
                raise
    return facts


def _against(mask: Mask, real: Mask, spacing_mm: Sequence[float]) -> Facts:
    """Dice in 3-D and of each labelled slice, size, and how far the centres are apart."""
    axis = int(np.argmax(spacing_mm))
    pairs = [(a, b) for a, b in zip(np.moveaxis(mask, axis, 0), np.moveaxis(real, axis, 0), strict=True) if b.any()]
    centres = [np.argwhere(m).mean(0) * spacing_mm if m.any() else np.full(3, np.inf) for m in (mask, real)]
    return {
        "dice": _dice(mask, real),
        "slices": [_dice(a, b) for a, b in pairs],
        "size": float(np.mean([a.sum() / b.sum() for a, b in pairs])),
        "off_mm": float(np.linalg.norm(np.delete(centres[0] - centres[1], axis))),
    }


def _dice(a: Mask, b: Mask) -> float:
    return float(2 * (a & b).sum() / max(int(a.sum() + b.sum()), 1))


def figures(facts: Mapping[str, Facts]) -> Iterator[Figure]:
    """Dice per slice and in 3-D, poor slices, size, centres, refusals and time, by sequences; then tissues."""
    for subset in dict.fromkeys(name for one in facts.values() for name in one["masks"]):
        rows = [one["masks"][subset] for one in facts.values() if subset in one["masks"]]
        sure = [row for row in rows if not row["refused"]]
        slices = [dice for row in rows for dice in row["slices"]]
        yield Figure(f"{subset}: Dice of {len(slices)} slices", runner.mean(slices))
        yield Figure(f"{subset}: share of slices below {POOR}", float(np.mean([d < POOR for d in slices])))
        yield Figure(f"{subset}: size", runner.mean(row["size"] for row in rows))
        yield Figure(f"{subset}: share of {len(rows)} patients refused", 1 - len(sure) / len(rows))
        yield Figure(f"{subset}: of the others, Dice in 3-D", runner.mean(row["dice"] for row in sure))
        near = [row["off_mm"] < NEAR_MM for row in sure]
        yield Figure(f"{subset}: of the others, centre within {NEAR_MM:g} mm", float(np.mean(near)) if near else None)
        yield Figure(f"{subset}: CPU seconds a patient", runner.mean(row["seconds"] for row in rows))
    rows = [row["dice"] for one in facts.values() for row in one.get("slices", ())]
    whole = [dice for dice in rows if len(runner.known(dice.values())) == len(hearts.asked().protocol.tissues)]
    if whole:
        for tissue in whole[0]:
            yield Figure(f"{len(whole)} complete slices: {tissue}", runner.mean(dice[tissue] for dice in whole))
        yield Figure(f"{len(whole)} complete slices: mean", runner.mean(runner.mean(d.values()) for d in whole))


SETS: Mapping[str, Set] = {
    f"{name}_found": Set(
        f"{title}, the ventricle found",
        "yes",
        partial(hearts.studies, layout=name),
        partial(found, named=named),
        figures,
        folder=name,
    )
    for name, title, named in (("myops", "MyoPS 2020", True), ("emidec", "EMIDEC", False))
}
