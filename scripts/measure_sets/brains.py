"""Brains against manual labels, or against themselves with fewer sequences, and other software on the same images."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from functools import cache, partial
from importlib import util
from itertools import combinations
from pathlib import Path
from typing import Any

import brain_methods
import numpy as np
import runner
from brain_methods import PARENCHYMA, TISSUES, Labels

from measure_sets import Facts, Figure, Set
from monai_deepgmm.images import labels as reference_labels
from monai_deepgmm.images import nifti
from monai_deepgmm.patients import discovery
from monai_deepgmm.patients.study import Cohort, Study

OURS, LESION = "ours", "lesion"
#: Other software: its name in the table → in ``brain_methods``.
RIVALS = {"scikit-learn tied": "sklearn-tied", "Atropos": "truncate+atropos"}
#: Every subset that holds T1.
SUBSETS = (("T1",), ("T1", "T2"), ("T1", "FLAIR"), ("T1", "T2", "FLAIR"))
#: OASIS's values, the protocol's names.
OASIS = {1: "CSF", 2: "GM", 3: "WM"}


@cache
def asked() -> Any:
    """The default configuration."""
    from monai_deepgmm.methods import config

    return config.build(protocol="brain")


def segmented(study: Study) -> dict[str, Labels]:
    """A patient by the default method, and by other software that is installed, which sees the same sequences."""
    from monai_deepgmm.results.segment import segment

    found: dict[str, Labels] = {OURS: segment(study, asked()).labels.astype(np.int64)}
    cohort = Cohort(Path(), "", (study,))
    for name, method in RIVALS.items():
        rival = brain_methods.RIVALS[method]
        if util.find_spec(rival.module) is not None:
            way = brain_methods.by_intensity(rival.make(rival.word), len(study.images))
            found[name] = way(cohort, asked().protocol)
    return found


def against_labels(study: Study) -> Facts:
    """Dice of each tissue among the voxels that have a reference label."""
    wanted, like = asked().protocol, nifti.read(study.images["T1"])
    known = reference_labels.read(study, wanted, tuple(study.images), like=like).labels
    inside, indices = known > 0, {name: wanted.tissue(name).index for name in TISSUES}
    return {
        way: runner.dice(labels[inside], known[inside], indices, needed=False)
        for way, labels in segmented(study).items()
    }


def against_itself(study: Study) -> Facts:
    """Of each way: the share of grey matter in each subset of sequences, and the agreement of each pair of subsets."""
    wanted = asked().protocol
    indices = {name: wanted.tissue(name).index for name in PARENCHYMA}
    subsets = [s for s in SUBSETS if set(s) <= set(study.images)]
    each = {s: segmented(dataclasses.replace(study, images={name: study.images[name] for name in s})) for s in subsets}
    facts: Facts = {}
    for way in each[subsets[0]]:
        grey = {"+".join(s): float((each[s][way] == indices["GM"]).sum() / (each[s][way] > 0).sum()) for s in subsets}
        pairs = [
            runner.dice(*(_merged(each[s][way], a, b) for s in (a, b)), indices, needed=False)
            for a, b in combinations(subsets, 2)
        ]
        facts[way] = {"grey": grey, "pairs": pairs, LESION: _lesions(study, {s: each[s][way] for s in subsets})}
    return facts


def _merged(labels: Labels, *subsets: Sequence[str]) -> Labels:
    """Labels with the tissues that one of two subsets cannot show given to those that it shows instead."""
    merging = asked().protocol.merged([s for s in subsets[0] if s in subsets[1]])
    return np.sum([target * (labels == index) for index, target in merging.items()], axis=0)


def _lesions(study: Study, each: Mapping[Sequence[str], Labels]) -> dict[str, float]:
    """Dice of the lesions in each subset that shows them; empty where the protocol or the patient has none."""
    index = next((t.index for t in asked().protocol.tissues if t.name == LESION), None)
    path = study.images["T1"].parents[1] / f"{study.patient}_lesions.nii.gz"
    if index is None or not path.is_file():
        return {}
    known = (runner.labels_in(path) > 0).astype(np.int64)
    shown = {s: labels for s, labels in each.items() if LESION in [t.name for t in asked().protocol.visible(s)]}
    return {
        "+".join(s): runner.dice((ours == index).astype(np.int64), known, {LESION: 1})[LESION]
        for s, ours in shown.items()
    }


# The figures ---------------------------------------------------------------------------------------------------------


def tissue_figures(found: Mapping[str, Facts]) -> Iterator[Figure]:
    """The mean over patients of each tissue, and of grey and white matter."""
    for name, tissues in (*((t, (t,)) for t in TISSUES), (" + ".join(PARENCHYMA), PARENCHYMA)):
        yield _line(
            f"Dice, {len(found)} brains: {name}", found, lambda f, tissues=tissues: runner.mean(f[t] for t in tissues)
        )


def agreement_figures(found: Mapping[str, Facts]) -> Iterator[Figure]:
    """Grey matter's share by subset, and the agreement between subsets."""
    first = next(iter(found.values()))[OURS]
    for subset in first["grey"]:
        yield _line(f"share of grey matter, {len(found)} brains: {subset}", found, lambda f, s=subset: f["grey"].get(s))
    for tissue in PARENCHYMA:
        for how, of in (("mean", runner.mean), ("least", min)):
            name = f"Dice between subsets of sequences, {how}: {tissue}"
            yield _line(name, found, lambda f, t=tissue, of=of: of(pair[t] for pair in f["pairs"]))
    for subset in first[LESION]:
        yield _line(
            f"lesion Dice: {subset}",
            {p: {OURS: f[OURS]} for p, f in found.items()},
            lambda f, s=subset: f[LESION].get(s),
        )


def _line(name: str, found: Mapping[str, Facts], value: Any) -> Figure:
    """The mean over patients of a value of each way."""
    ways = dict.fromkeys(way for facts in found.values() for way in facts)
    each = {way: runner.mean(value(facts[way]) for facts in found.values() if way in facts) for way in ways}
    return Figure(name, each.pop(OURS), each)


# The patients --------------------------------------------------------------------------------------------------------


def oasis(folder: Path) -> Sequence[Study]:
    """``NNNN_SS.nii.gz``, skull-stripped T1, and ``NNNN_classified.nii.gz``."""
    meaning = {value: asked().protocol.tissue(name).index for value, name in OASIS.items()}
    names = sorted(path.name.removesuffix("_SS.nii.gz") for path in folder.glob("*_SS.nii.gz"))
    return [
        Study(
            name,
            {"T1": folder / f"{name}_SS.nii.gz"},
            mask_rule="nonzero",
            truth=folder / f"{name}_classified.nii.gz",
            truth_labels=meaning,
        )
        for name in names
    ]


def studies(folder: Path, mask: str | None = None) -> Sequence[Study]:
    """The patients of a folder."""
    return discovery.find(folder, asked().protocol, layout="folder", mask=mask).studies


SETS: Mapping[str, Set] = {
    "openms": Set(
        "Open MS: T1, T2, FLAIR, by `pvgmm`", "yes", partial(studies, mask="nonzero"), against_itself, agreement_figures
    ),
    "oasis": Set("OASIS: T1, by `pvgmm`", "yes", oasis, against_labels, tissue_figures),
    "phantom_brains": Set(
        "phantoms: T1, T2, FLAIR, by `pvgmm`",
        "yes",
        studies,
        against_labels,
        tissue_figures,
        ("-n", "4", "--protocol", "brain"),
    ),
}
