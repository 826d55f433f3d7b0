"""Which studies lie in a folder of DICOM files, however nested: a patient is a study, by its UIDs."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from monai_deepgmm.errors import UsageError
from monai_deepgmm.patients import task_check
from monai_deepgmm.patients.dicom import choice as dicom_choice
from monai_deepgmm.patients.dicom import header as dicom_header
from monai_deepgmm.patients.dicom.choice import Wanted
from monai_deepgmm.patients.dicom.elements import DamagedError
from monai_deepgmm.patients.dicom.header import Header
from monai_deepgmm.patients.dicom.layout import DicomLayout
from monai_deepgmm.patients.directory import READABLE, Tree
from monai_deepgmm.patients.study import Cohort, Problem, Study
from monai_deepgmm.protocol import Protocol
from monai_deepgmm.wording import listed, shown

#: What a folder is called by a disk or a program, and not by a person who names a patient.
_NO_NAMES = {"dicom", "dcm", "images", "image", "export", "data", "study"}


@dataclass
class _Found:
    """One study.

    Attributes:
        names: its files, as paths below DIR.
        headers: of these.
        damaged: what is wrong with files that lie beside them, and are no one else's.
    """

    names: list[str] = field(default_factory=list)
    headers: list[Header] = field(default_factory=list)
    damaged: list[DamagedError] = field(default_factory=list)


def find(
    tree: Tree,
    layout: DicomLayout,
    protocol: Protocol,
    *,
    mask: str | None,
    filters: Mapping[str, tuple[str, ...]],
    asked: bool,
) -> Cohort | None:
    """Finds the studies below a folder.

    Args:
        tree: the names.
        layout: which series is which sequence.
        protocol: its sequences are looked for.
        mask: the rule, as typed; a file of a mask is not looked for.
        filters: which of several series are meant.
        asked: the protocol is the user's choice and no default.

    Returns:
        None where no file is DICOM.

    Raises:
        UsageError: the series are another protocol's, or a filter fits nothing.
    """
    studies = _studies(tree)
    if not studies:
        return None
    wanted = dicom_choice.wanted(filters, protocol)
    _check_task(tree, studies, layout, protocol, asked=asked)
    ids = _ids(studies)
    found: list[Study] = []
    used: set[str] = set()
    for key, study in studies.items():
        made, fitting = _study(ids[key], study, layout, protocol, mask, wanted)
        found.append(made)
        used |= fitting
    for sequence in wanted:
        if sequence not in used:
            values = ",".join(wanted[sequence])
            hint = "deepgmm scan prints those there are"
            raise UsageError(f"--filter {sequence}={values}: no study has such a series; {hint}")
    return Cohort(tree.root, layout.name, tuple(found), _notes(tree))


def _studies(tree: Tree) -> dict[tuple[str, str], _Found]:
    """Patient and study → what was found of it."""
    found: dict[tuple[str, str], _Found] = {}
    broken: list[tuple[str, DamagedError]] = []
    for name in tree.files:
        if READABLE.search(name):
            continue
        try:
            header = dicom_header.read(tree.path(name))
        except DamagedError as error:
            broken.append((name, error))
            continue
        if header is not None:
            study = found.setdefault((header.patient, header.study), _Found())
            study.names.append(name)
            study.headers.append(header)
    for name, trouble in broken:
        for study in _beside(name, found) or [found.setdefault(("", name.split("/")[0]), _Found(names=[name]))]:
            study.damaged.append(trouble)
    return found


def _beside(name: str, studies: Mapping[tuple[str, str], _Found]) -> list[_Found]:
    """The studies whose files lie in the same folder as one that cannot be read, or else in the nearest above."""
    folder = name
    while "/" in folder:
        folder = folder.rpartition("/")[0]
        near = [one for one in studies.values() if any(other.startswith(f"{folder}/") for other in one.names)]
        if near:
            return near
    return [one for one in studies.values() if any("/" not in other for other in one.names)]


def _ids(studies: Mapping[tuple[str, str], _Found]) -> dict[tuple[str, str], str]:
    """The name of the folder right below DIR that holds this study alone, and all of it; else a hash of its UIDs."""
    tops = {key: {name.split("/")[0] if "/" in name else "" for name in one.names} for key, one in studies.items()}
    times = Counter(top for found in tops.values() for top in found)
    ids = {}
    for key, found in tops.items():
        (top, *others) = found
        own = not others and times[top] == 1 and top.casefold() not in {"", *_NO_NAMES}
        ids[key] = top if own else f"dcm-{hashlib.sha256(chr(0).join(key).encode()).hexdigest()[:12]}"
    return ids


def _study(
    patient: str, found: _Found, layout: DicomLayout, protocol: Protocol, mask: str | None, wanted: Wanted
) -> tuple[Study, frozenset[str]]:
    """A study with what can be known of it, and the sequences whose filter found something in it."""
    chosen = dicom_choice.choose(found.headers, layout, protocol, wanted)
    problems = [*_damaged(found.damaged), *chosen.problems]
    lacking = [s for s in protocol.required if s not in chosen.images]
    if not problems and (lacking or not chosen.images):
        names = ", ".join(lacking or protocol.sequences)
        remedy = "Name the series, such as --filter LGE=7, or write a layout (--layout FILE); deepgmm scan prints them"
        problems.append(Problem("E_NO_SEQUENCE", f"no series of the study is {names}", remedy))
    rule = mask if mask in ("auto", "nonzero") else "auto" if mask is None and protocol.mask_finder else "file"
    if rule == "file" and not problems:
        ways = "use the voxels that are not 0 (--mask nonzero), or give masks of deepgmm mask's kind (--masks DIR)"
        problems.append(Problem("E_MASK_NONE", f"DICOM studies bear no mask of the {protocol.mask}", f"Either {ways}"))
    return Study(
        patient=patient,
        images=chosen.images,
        mask_rule=rule,
        problems=tuple(problems),
        series=chosen.series,
    ), chosen.used


def _damaged(errors: Sequence[DamagedError]) -> list[Problem]:
    """One problem for all files that cannot be read."""
    if not errors:
        return []
    first, more = errors[0].problem, f" (and {len(errors) - 1} more files)" if len(errors) > 1 else ""
    return [replace(first, message=f"{first.message}{more}")]


def _check_task(
    tree: Tree, studies: Mapping[tuple[str, str], _Found], layout: DicomLayout, protocol: Protocol, *, asked: bool
) -> None:
    """Refuses heads where hearts are looked for, and the reverse."""
    there: Counter[str] = Counter()
    for one in studies.values():
        for sequence in dicom_choice.sequences(one.headers, layout):
            there[sequence] += 1
    task_check.check(shown(tree.root.name or "."), there, protocol, asked=asked)


def _notes(tree: Tree) -> tuple[str, ...]:
    others = [name for name in tree.files if READABLE.search(name)]
    return (f"only DICOM is looked at: {listed(others)} left out",) if others else ()
