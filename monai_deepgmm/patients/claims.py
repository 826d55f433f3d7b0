"""Which files a layout claims, and for whom: everything that was found, before anything is judged."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from monai_deepgmm.patients.directory import NIFTI, Tree, beside, holds_dicom
from monai_deepgmm.patients.layout import NOT_SOURCE, Layout, Reader
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
        folder: the patient's folder, when nothing in it matched.
    """

    patient: str
    home: str = ""
    images: dict[str, list[str]] = field(default_factory=dict)
    mask: list[str] = field(default_factory=list)
    truth: list[str] = field(default_factory=list)
    dicom: dict[str, str] = field(default_factory=dict)
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
    """

    layout: Layout
    found: tuple[Found, ...]
    empty: tuple[Found, ...]

    def files(self) -> set[str]:
        """Every file of a patient with at least one sequence."""
        return {name for one in self.found for name in one.files()}

    def clashes(self) -> int:
        """How many patients have two files for one purpose, or share an id."""
        several = sum(any(len(g) > 1 for g in (*f.images.values(), f.mask, f.truth)) for f in self.found)
        return several + len(self.found) - len({f.patient for f in self.found})


def claim(tree: Tree, reader: Reader, protocol: Protocol) -> Claims:
    """Reads every name below a folder in the light of one layout."""
    layout = reader.layout
    found: dict[tuple[str, str], Found] = {}
    labels: list[tuple[str, str, str]] = []
    for name in filter(NIFTI.search, tree.files):
        image = reader.image(name)
        if image is not None and image[1] in protocol.sequences:
            one = found.setdefault(key := _key(image[0], name, layout), Found(*key))
            one.images.setdefault(image[1], []).append(name)
        elif image is None and (label := reader.labels(name)) is not None:
            labels.append((*label, name))
    _add_labels(found.values(), labels)
    _add_labels_beside(tree, reader, found.values())
    _add_dicom(tree, reader, protocol, found)
    patients = tuple(found[key] for key in sorted(found))
    return Claims(layout, patients, _empty_folders(tree, layout, patients))


def _key(patient: str, name: str, layout: Layout) -> tuple[str, str]:
    return patient, name.rpartition("/")[0] if layout.one_folder else ""


def _add_labels(found: Iterable[Found], labels: Iterable[tuple[str, str, str]]) -> None:
    """Files of labels go to every patient of that id; ids that are not unique fail later, whoever got them."""
    by_patient: dict[str, list[Found]] = {}
    for one in found:
        by_patient.setdefault(one.patient, []).append(one)
    for patient, role, name in labels:
        for one in by_patient.get(patient, ()):
            (one.mask if role == "mask" else one.truth).append(name)


def _add_labels_beside(tree: Tree, reader: Reader, found: Iterable[Found]) -> None:
    """The folders beside DIR are asked only for patients whose reference labels are not in DIR itself."""
    wanting = [one for one in found if not one.truth]
    for pattern in reader.layout.truth:
        if wanting and pattern.startswith("../"):
            names = beside(tree.root, pattern.split("/")[1])
            labels = [(*label, name) for name in names if (label := reader.labels(name)) is not None]
            _add_labels(wanting, [label for label in labels if label[1] == "truth"])


def _add_dicom(tree: Tree, reader: Reader, protocol: Protocol, found: Mapping[tuple[str, str], Found]) -> None:
    """A DICOM file or folder that bears the name of a sequence of which there is no NIfTI file."""
    for name in (*tree.folders, *(n for n in tree.files if n.lower().endswith(".dcm"))):
        image = reader.image(name.rsplit(".", 1)[0] if name.lower().endswith(".dcm") else name)
        if image is None or image[1] not in protocol.sequences:
            continue
        one = found.get(_key(image[0], name, reader.layout))
        if one is not None and image[1] not in one.images and holds_dicom(tree, (name, *tree.below(name))):
            one.dicom.setdefault(image[1], name)


def _empty_folders(tree: Tree, layout: Layout, found: Iterable[Found]) -> tuple[Found, ...]:
    """The folders right below DIR that should hold a patient and of which no file was claimed."""
    if layout.folders is None:
        return ()
    claimed = {name.split("/")[0] for one in found for name in (*one.files(), one.home)}
    if layout.one_folder and claimed and not any(one.home for one in found):
        return ()  # all files lie flat in DIR: its folders are not patients
    reserved = NOT_SOURCE | {name.split("/")[0] for name in tree.own}
    folders = (name for name in tree.folders if "/" not in name and name not in claimed | reserved)
    return tuple(Found(name, folder=name) for name in folders if fnmatch.fnmatch(name, layout.folders))
