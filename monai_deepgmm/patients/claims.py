"""Which files a layout claims, and for whom: everything that was found, before anything is judged."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from monai_deepgmm.patients import bids
from monai_deepgmm.patients.directory import READABLE, SEGMENTATION, Tree, beside, holds_dicom
from monai_deepgmm.patients.formats import foreign
from monai_deepgmm.patients.layout import NOT_PATIENTS, NOT_SOURCE, Layout, Reader
from monai_deepgmm.protocol import Protocol


@dataclass
class Found:
    """What was found for one patient, as paths below DIR (or, from a manifest, as they stand in it).

    Attributes:
        patient: the id.
        home: the folder that holds the sequences, where a layout keeps them in one; else "".
        images: sequence → all files that match it.
        mask: all files that match the mask.
        truth: all files that match the reference labels.
        dicom: sequence without a NIfTI file → what stands in its place.
        foreign: sequence, "mask" or "truth" → files that match it in formats that are not read.
        passed: files that were understood, and are not meant: of another run, space or modality.
        unused: files beside the images that no name of the layout fits.
        hints: sequence, "mask" or "truth" → how to choose where several files match, or why none does.
        labels: what a manifest says that the values in the reference labels mean.
        folder: the patient's folder, when nothing in it matched.
    """

    patient: str
    home: str = ""
    images: dict[str, list[str]] = field(default_factory=dict)
    mask: list[str] = field(default_factory=list)
    truth: list[str] = field(default_factory=list)
    dicom: dict[str, str] = field(default_factory=dict)
    foreign: dict[str, list[str]] = field(default_factory=dict)
    passed: list[str] = field(default_factory=list)
    unused: list[str] = field(default_factory=list)
    hints: dict[str, str] = field(default_factory=dict)
    labels: str = ""
    folder: str | None = None

    def files(self) -> Iterable[str]:
        """All files of this patient."""
        return (name for group in (*self.images.values(), self.mask, self.truth) for name in group)


@dataclass(frozen=True)
class Claims:
    """What one layout makes of a folder.

    Attributes:
        layout: the layout.
        found: patients with at least one sequence.
        empty: folders that should hold a patient, where nothing matched.
        passed: files that were understood and are no patient's.
    """

    layout: Layout
    found: tuple[Found, ...]
    empty: tuple[Found, ...]
    passed: tuple[str, ...] = ()

    def files(self) -> set[str]:
        """Every file of a patient with at least one sequence."""
        return {*self.passed, *(name for one in self.found for name in (*one.files(), *one.passed))}

    def clashes(self) -> int:
        """How many patients have two files for one purpose, or share an id."""
        several = sum(any(len(g) > 1 for g in (*f.images.values(), f.mask, f.truth)) for f in self.found)
        return several + len(self.found) - len({f.patient for f in self.found})


def claim(tree: Tree, reader: Reader, protocol: Protocol, wanted: bids.Filters | None = None) -> Claims:
    """Reads every name below a folder in the light of one layout.

    Args:
        tree: the names.
        reader: the layout.
        protocol: its sequences are looked for.
        wanted: which values of BIDS's entities are meant, for a layout that has such.
    """
    layout = reader.layout
    found: dict[tuple[str, str], Found] = {}
    labels: list[tuple[str, str, str]] = []
    rest: list[str] = []
    for name in tree.files:
        other = None if READABLE.search(name) else foreign(name)
        if other is None and not READABLE.search(name):
            continue
        stem = other.stem if other else name
        image = None if SEGMENTATION.search(name) else reader.image(stem)
        if image is not None and image[1] in protocol.sequences:
            patient = bids.with_session(image[0], name) if layout.entities else image[0]
            one = found.setdefault(key := _key(patient, name, layout), Found(*key))
            (one.foreign if other else one.images).setdefault(image[1], []).append(name)
        elif image is None and (label := reader.labels(stem)) is not None:
            labels.append((bids.with_session(label[0], name) if layout.entities else label[0], label[1], name))
        elif image is None:
            rest.append(name)
    passed: list[str] = []
    if layout.entities:
        passed = _arrange(found, labels, protocol, reader, wanted or {})
    else:
        _add_labels(found.values(), labels)
        _add_unused(found.values(), rest)
    _add_labels_beside(tree, reader, found.values())
    _add_dicom(tree, reader, protocol, found)
    if reader.ending:
        _keep_ending(found.values(), reader.ending)
    patients = tuple(found[key] for key in sorted(found))
    return Claims(layout, patients, _empty_folders(tree, layout, patients, passed), tuple(passed))


def _key(patient: str, name: str, layout: Layout) -> tuple[str, str]:
    return patient, name.rpartition("/")[0] if layout.one_folder else ""


def _add_labels(found: Iterable[Found], labels: Iterable[tuple[str, str, str]]) -> None:
    """Files of labels go to every patient of that id; ids that are not unique fail later, whoever got them."""
    by_patient: dict[str, list[Found]] = {}
    for one in found:
        by_patient.setdefault(one.patient, []).append(one)
    for patient, role, name in labels:
        for one in by_patient.get(patient, ()):
            _add_label(one, role, name)


def _add_label(one: Found, role: str, name: str) -> None:
    if READABLE.search(name):
        (one.mask if role == "mask" else one.truth).append(name)
    else:
        one.foreign.setdefault(role, []).append(name)


def _add_unused(found: Iterable[Found], rest: Iterable[str]) -> None:
    """What lies in the folder of a patient's images; where they share it with others', what begins with the id."""
    homes: dict[str, list[Found]] = {}
    for one in found:
        for home in {name.rpartition("/")[0] for name in _all_images(one)}:
            homes.setdefault(home, []).append(one)
    for name in rest:
        home, _, base = name.rpartition("/")
        near = homes.get(home, ())
        for one in near:
            if (len(near) == 1 and home) or re.match(rf"{re.escape(one.patient)}(?![^\W_])", base, re.IGNORECASE):
                one.unused.append(name)


def _keep_ending(found: Iterable[Found], ending: str) -> None:
    """Of files that differ in their ending, those that end as the data set says."""
    for one in found:
        for group in (*one.images.values(), one.mask, one.truth):
            fitting = [name for name in group if name.casefold().endswith(ending.casefold())]
            if fitting:
                one.passed += [name for name in group if name not in fitting]
                group[:] = fitting


def _arrange(
    found: dict[tuple[str, str], Found],
    labels: Sequence[tuple[str, str, str]],
    protocol: Protocol,
    reader: Reader,
    wanted: bids.Filters,
) -> list[str]:
    """Of the files that bear BIDS names: sessions inherit from their subject, and only what is meant is kept.

    Returns:
        The files of no patient.
    """
    passed: list[str] = []
    for key in [k for k, one in found.items() if not all(bids.wanted_patient(n, wanted) for n in _all_images(one))]:
        passed += _all_images(found.pop(key))
    passed += _inherit(found)
    of_subject: dict[str, list[tuple[str, str]]] = {}
    for patient, role, name in labels:
        of_subject.setdefault(patient, []).append((role, name))
    aliases = {alias for alias, sequence in reader.aliases.items() if sequence in protocol.sequences}
    for one in found.values():
        for sequence, group in [*one.images.items(), *one.foreign.items()]:
            others = [n for s, names in {**one.images, **one.foreign}.items() if s != sequence for n in names]
            _keep(one, sequence, group, bids.images(group, wanted, others=others), bids.unused_images)
        one.images = {s: names for s, names in one.images.items() if names}
        subject = one.patient.split("_")[0]
        near = [*of_subject.get(one.patient, ()), *(of_subject.get(subject, ()) if subject != one.patient else ())]
        images = [n for s in protocol.sequences for n in (*one.images.get(s, ()), *one.foreign.get(s, ()))]
        own = sorted(a for a in aliases if reader.aliases[a] in {*one.images, *one.foreign})
        for role in ("mask", "truth"):
            names = [name for kind, name in near if kind == role]
            if role == "mask":
                kept = bids.masks(names, wanted, images, organ=protocol.mask, own=own)
            else:
                kept = bids.reference_labels(names, wanted, images, own=own)
            for name in kept:
                _add_label(one, role, name)
            _keep(one, role, names, kept, bids.unused_labels)
    return passed


def _keep(one: Found, role: str, group: list[str], kept: Sequence[str], why: Callable[[Sequence[str]], str]) -> None:
    """Keeps some of a group's files, and notes how to choose between them, or what speaks against the others."""
    passed = [name for name in group if name not in kept]
    one.passed += passed
    one.hints[role] = bids.options(kept) if len(kept) > 1 else why(passed) if not kept else ""
    group[:] = kept


def _inherit(found: dict[tuple[str, str], Found]) -> list[str]:
    """A subject's image serves those of its sessions that have none of that sequence; then it is no patient itself.

    Returns:
        The subject's files that no session takes.
    """
    serving = set()
    for (patient, home), one in found.items():
        whole = (patient.split("_")[0], home)
        if whole == (patient, home) or whole not in found:
            continue
        for mine, given in ((one.images, found[whole].images), (one.foreign, found[whole].foreign)):
            for sequence in given.keys() - one.images.keys() - one.foreign.keys():
                mine[sequence] = [*given[sequence]]
                serving.add(whole)
    return [name for whole in serving for name in _all_images(found.pop(whole))]


def _all_images(one: Found) -> Iterable[str]:
    return (name for group in (*one.images.values(), *one.foreign.values()) for name in group)


def _add_labels_beside(tree: Tree, reader: Reader, found: Iterable[Found]) -> None:
    """The folders beside DIR are asked only for patients whose reference labels are not in DIR itself."""
    wanting = [one for one in found if not one.truth]
    for pattern in reader.layout.truth:
        if wanting and pattern.startswith("../"):
            names = beside(tree.root, pattern.split("/")[1])
            labels = [(*label, name) for name in names if (label := reader.labels(name)) is not None]
            _add_labels(wanting, [label for label in labels if label[1] == "truth"])


def _add_dicom(tree: Tree, reader: Reader, protocol: Protocol, found: Mapping[tuple[str, str], Found]) -> None:
    """A folder of DICOM files that bears the name of a sequence of which there is no NIfTI file."""
    for name in tree.folders:
        image = reader.image(name)
        if image is None or image[1] not in protocol.sequences:
            continue
        one = found.get(_key(image[0], name, reader.layout))
        if one is not None and image[1] not in one.images and holds_dicom(tree, tree.below(name)):
            one.dicom.setdefault(image[1], name)


def _empty_folders(tree: Tree, layout: Layout, found: Iterable[Found], passed: Iterable[str]) -> tuple[Found, ...]:
    """The folders right below DIR that should hold a patient and of which no file was claimed."""
    if layout.folders is None:
        return ()
    names = (n for one in found for n in (*one.files(), *_all_images(one), *one.passed, one.home))
    claimed = {name.split("/")[0] for name in (*names, *passed)}
    if layout.one_folder and claimed and not any(one.home for one in found):
        return ()  # all files lie flat in DIR: its folders are not patients
    reserved = NOT_SOURCE | {name.split("/")[0] for name in tree.own}
    reserved |= {name.split("/")[0] for name in tree.folders if name.split("/")[-1].casefold() in NOT_PATIENTS}
    folders = (n for n in tree.folders if "/" not in n and n not in claimed | reserved)
    patients = (n for n in folders if fnmatch.fnmatch(n, layout.folders))
    return tuple(Found(name, folder=name) for name in patients)
