"""Hearts after infarction against manual labels, and the classical thresholds in the same wall."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import runner
from sklearn.metrics import roc_auc_score

from measure_sets import Facts, Figure, Set
from monai_deepgmm.errors import StudyError
from monai_deepgmm.images import labels as reference_labels
from monai_deepgmm.images import nifti
from monai_deepgmm.images.volume import Volume
from monai_deepgmm.patients import discovery
from monai_deepgmm.patients.study import Study
from monai_deepgmm.protocol import Protocol
from monai_deepgmm.results.thresholds import THRESHOLDS, Labels, brighter, labelled

SCAR, OURS = "scar", "ours"
#: What was injured: both tissues as one.
EDEMA, INJURED = "edema", "edema or scar"
#: The patients whom the papers test on.
TESTED = ("Case3009", "Case3014", "Case3017", "Case3020", "Case3022")
#: Of the wall: a heart with less paint than the first counts as clear, a scar above the second must not be missed.
CLEAR, LARGE = 0.02, 0.05


class Run(NamedTuple):
    """One patient's segmentation: its volume, labels (X, Y, Z), the sequences it used and the axis of its slices."""

    volume: Volume
    labels: Labels
    sequences: tuple[str, ...]
    axis: int


# One patient ---------------------------------------------------------------------------------------------------------


def known(study: Study, wanted: Protocol, run: Run) -> Labels:
    """The reference labels on a segmentation's grid, merged as its sequences ask for."""
    return reference_labels.read(study, wanted, run.sequences, like=run.volume).labels


def walls(labels: Labels, wanted: Protocol) -> npt.NDArray[np.bool_]:
    """Where a label is one of the wall's."""
    return np.isin(labels, [wanted.tissue(name).index for name in wanted.percent_of])


def by_slice(found: Labels, real: Labels, run: Run, wanted: Protocol) -> Iterator[Facts]:
    """Of each labelled slice: Dice of each tissue, and what share of the wall was painted as one that is not there."""
    tissues = {t.name: t.index for t in wanted.visible(run.sequences)}
    optional = [name for name in wanted.percent_of if name in tissues and wanted.tissue(name).merges_into]
    for predicted, true in labelled(run.axis, found, real):
        dice, size = runner.dice(predicted, true, tissues), max(int(walls(predicted, wanted).sum()), 1)
        painted = {n: int((predicted == tissues[n]).sum()) / size for n in optional if dice[n] != dice[n]}
        yield {"dice": dice, "painted": painted}


def scars(study: Study, wanted: Protocol, run: Run) -> dict[str, Labels]:
    """Scar ``(X, Y, Z)`` as segmented, and by each threshold in the same wall.

    Raises:
        StudyError: it was segmented without the sequence that shows scar.
    """
    scar = wanted.tissue(SCAR)
    sequence = next((s for s in scar.seen_in if s in run.sequences and s in study.images), None)
    if sequence is None:
        raise StudyError("E_FILE", f"segmented without {' or '.join(scar.seen_in)}, which thresholds need")
    image, wall = nifti.read(study.images[sequence]), walls(run.labels, wanted)
    bright = image.data if nifti.grids_equal(image, run.volume) else nifti.resample(image, run.volume)
    found = {OURS: (run.labels == scar.index).astype(np.int64)}
    return found | {name: brighter(bright, wall, threshold, run.axis) for name, threshold in THRESHOLDS.items()}


def segmented(study: Study) -> Run:
    """A patient by the default method."""
    from monai_deepgmm.results.segment import segment

    found = segment(study, asked())
    return Run(found.reference, found.labels.astype(np.int64), tuple(found.images), found.slice_axis)


@cache
def asked() -> Any:
    """The default configuration."""
    from monai_deepgmm.methods import config

    return config.build()


def three_sequences(study: Study) -> Facts:
    """What is measured of a heart with LGE, T2 and bSSFP: slice by slice, also without T2."""
    wanted, full = asked().protocol, segmented(study)
    real, scar = known(study, wanted, full), wanted.tissue(SCAR).index
    rows = list(by_slice(full.labels, real, full, wanted))
    for way, found in scars(study, wanted, full).items():
        places = labelled(full.axis, found, walls(full.labels, wanted), real)
        for row, (painted, wall, true) in zip(rows, places, strict=True):
            dice = runner.dice(painted, (true == scar).astype(np.int64), {SCAR: 1})[SCAR]
            row.setdefault("scars", {})[way] = {"dice": dice, "share": int(painted.sum()) / max(int(wall.sum()), 1)}
    fewer = segmented(dataclasses.replace(study, images={s: p for s, p in study.images.items() if s != "T2"}))
    for row, part in zip(rows, by_slice(fewer.labels, known(study, wanted, fewer), fewer, wanted), strict=True):
        row["without T2"] = part
    injured = [np.isin(labels, [wanted.tissue(EDEMA).index, scar]).astype(np.int64) for labels in (full.labels, real)]
    for row, (painted, true, _) in zip(rows, labelled(full.axis, *injured, real), strict=True):
        row[INJURED] = runner.dice(painted, true, {INJURED: 1})[INJURED]
    whole = runner.dice(full.labels, real, {name: wanted.tissue(name).index for name in (EDEMA, SCAR)})
    return {"slices": rows, "volume": whole | runner.dice(*injured, {INJURED: 1})}


def lge_alone(study: Study) -> Facts:
    """What is measured of a heart with LGE alone: blood, and scar by each way, in 3-D."""
    wanted, run = asked().protocol, segmented(study)
    real = known(study, wanted, run)
    blood, scar = (wanted.tissue(name).index for name in ("blood", SCAR))
    truly, wall = (real == scar).astype(np.int64), max(int(walls(run.labels, wanted).sum()), 1)
    return {
        "blood": runner.dice(run.labels, real, {"blood": blood})["blood"],
        "blood_size": int((run.labels == blood).sum()) / max(int((real == blood).sum()), 1),
        "share": int(truly.sum()) / max(int(walls(real, wanted).sum()), 1),
        "scars": {
            way: {"dice": runner.dice(found, truly, {SCAR: 1})[SCAR], "share": int(found.sum()) / wall}
            for way, found in scars(study, wanted, run).items()
        },
    }


# The figures ---------------------------------------------------------------------------------------------------------


def complete_slices(found: Mapping[str, Facts]) -> Iterator[Figure]:
    """Named Dice on the slices that hold all tissues, and what is painted where a tissue is not."""
    rows = [row for facts in found.values() for row in facts["slices"]]
    tested = [row for patient in TESTED for row in found.get(patient, {"slices": []})["slices"]]
    for about, chosen in (("", rows), (" of the papers' test patients", tested)):
        if whole := [row for row in chosen if all(value == value for value in row["dice"].values())]:
            place = f"{len(whole)} complete slices{about}"
            yield from _dice_lines(f"Dice on {place}", whole)
            parts = [row["without T2"] for row in whole]
            yield from _dice_lines(f"without T2: Dice on {place}", parts)
        if whole:
            both = runner.mean(row[INJURED] for row in whole)
            yield Figure(f"Dice on {len(whole)} complete slices{about}: {INJURED}", both)
    for tissue in (EDEMA, SCAR, INJURED):
        each = [facts["volume"][tissue] for facts in found.values()]
        yield Figure(f"3-D Dice of each of {len(found)} patients, mean: {tissue}", runner.mean(each))
    for tissue in (EDEMA, SCAR):
        lacking = [row for row in rows if tissue in row["painted"]]
        rivals = _each(lacking, "share") if tissue == SCAR else {}
        name = f"share of the wall painted as {tissue} in {len(lacking)} slices without, median"
        yield Figure(name, _median(row["painted"][tissue] for row in lacking), rivals)
    parts = [row["without T2"] for row in rows]
    lacking = [row["painted"][SCAR] for row in parts if SCAR in row["painted"]]
    yield Figure(f"without T2: share painted as scar in {len(lacking)} slices without, median", _median(lacking))


def _dice_lines(name: str, rows: Sequence[Facts]) -> Iterator[Figure]:
    """The mean over slices of each tissue, and of each slice's mean."""
    for tissue in rows[0]["dice"]:
        rivals = (
            {w: runner.mean(row["scars"][w]["dice"] for row in rows) for w in THRESHOLDS}
            if tissue == SCAR and "scars" in rows[0]
            else {}
        )
        yield Figure(f"{name}: {tissue}", runner.mean(row["dice"][tissue] for row in rows), rivals)
    yield Figure(f"{name}: mean", runner.mean(runner.mean(row["dice"].values()) for row in rows))


def _each(rows: Sequence[Facts], key: str) -> dict[str, float | None]:
    """The median of each threshold."""
    return {way: _median(row["scars"][way][key] for row in rows) for way in THRESHOLDS}


def _median(values: Iterable[float]) -> float | None:
    there = runner.known(values)
    return float(np.median(there)) if there else None


def infarct_or_normal(found: Mapping[str, Facts]) -> Iterator[Figure]:
    """EMIDEC's: patients with infarct (P) and without (N)."""
    sick, well = ([f for name, f in found.items() if name.startswith(f"Case_{kind}")] for kind in "PN")
    yield Figure(f"blood, 3-D Dice, {len(found)} hearts", runner.mean(f["blood"] for f in found.values()))
    yield Figure("blood, found / reference volume", runner.mean(f["blood_size"] for f in found.values()))
    large = [f for f in sick if f["share"] > LARGE]

    def line(name: str, value: Callable[[str], float | None]) -> Figure:
        return Figure(name, value(OURS), {way: value(way) for way in THRESHOLDS})

    def shares(facts: Iterable[Facts], way: str) -> list[float]:
        return [f["scars"][way]["share"] for f in facts]

    yield line(f"infarct, 3-D Dice, {len(sick)} patients", lambda w: runner.mean(f["scars"][w]["dice"] for f in sick))
    if sick and well:
        truly = [1] * len(sick) + [0] * len(well)
        yield line(
            "infarct or normal by the scar's share, AUC",
            lambda w: float(roc_auc_score(truly, shares([*sick, *well], w))),
        )
    yield line(
        f"share of {len(well)} normal hearts with at most {CLEAR:.0%} of the wall painted",
        lambda w: runner.mean(float(share <= CLEAR) for share in shares(well, w)),
    )
    yield line(
        f"share of {len(large)} infarcts above {LARGE:.0%} of the wall that are missed altogether",
        lambda w: runner.mean(float(share == 0) for share in shares(large, w)),
    )
    real = [f["share"] for f in found.values()]
    if len(found) > 2:
        yield line(
            "share of the wall, correlation", lambda w: float(np.corrcoef(shares(found.values(), w), real)[0, 1])
        )
    yield line(
        "share of the wall, bias",
        lambda w: runner.mean(a - b for a, b in zip(shares(found.values(), w), real, strict=True)),
    )


def studies(folder: Path, layout: str | None = None) -> Sequence[Study]:
    """The patients of a folder."""
    return discovery.find(folder, asked().protocol, layout=layout).studies


SETS: Mapping[str, Set] = {
    "myops": Set(
        "MyoPS 2020: LGE, T2, bSSFP, by `anatomy`",
        "yes",
        partial(studies, layout="myops"),
        three_sequences,
        complete_slices,
    ),
    "emidec": Set(
        "EMIDEC: LGE alone, by `anatomy`", "yes", partial(studies, layout="emidec"), lge_alone, infarct_or_normal
    ),
    "phantom_hearts": Set(
        "phantoms: LGE, T2, bSSFP, by `anatomy`",
        "for the width of volume intervals",
        studies,
        three_sequences,
        complete_slices,
        ("-n", "12", "--seed", "0"),
    ),
}
