"""The sets of patients that ``measure_accuracy.py all`` knows: where they lie, what is measured, and the figures."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from monai_deepgmm.patients.study import Study

Facts = dict[str, Any]


@dataclass(frozen=True)
class Figure:
    """One line of the table.

    Attributes:
        name: what it is.
        ours: the default method's.
        rivals: those of other methods on the same images.
    """

    name: str
    ours: float | None
    rivals: Mapping[str, float | None] = field(default_factory=dict)


@dataclass(frozen=True)
class Set:
    """Patients with reference labels, or of whom some property is known.

    Attributes:
        title: what is segmented, by which method.
        in_view: whether its reference labels were looked at when constants were chosen.
        studies: folder → the patients.
        measure: patient → everything that the figures need, ready for JSON.
        figures: what was measured, by patient → the lines of the table.
        folder: where the patients lie, if not in the folder of the set's name.
        phantom: the options of ``deepgmm phantom`` that make the set, where it can be made.
    """

    title: str
    in_view: str
    studies: Callable[[Path], Sequence[Study]]
    measure: Callable[[Study], Facts]
    figures: Callable[[Mapping[str, Facts]], Iterable[Figure]]
    phantom: tuple[str, ...] = ()
    folder: str | None = None


def files(study: Study) -> Iterator[Path]:
    """All that is read of a patient."""
    yield from study.images.values()
    yield from (path for path in (study.mask, study.truth) if path is not None)
