"""What lies below a folder: names only, read once, without following a link in circles."""

from __future__ import annotations

import bisect
import fnmatch
import json
import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

#: The end of the name of a file that is read: NIfTI, NRRD or MetaImage.
READABLE = re.compile(r"\.(nii(\.gz)?|(seg\.)?nrrd|mha)$", re.IGNORECASE)
#: The end of the name of a segmentation of 3D Slicer, which is no image.
SEGMENTATION = re.compile(r"\.seg\.nrrd$", re.IGNORECASE)

#: Deeper than derivatives/pipeline/sub/ses/anat, and an end to links that lead ever deeper.
MAX_DEPTH = 8

_IGNORED = {"__MACOSX"}
_SNIFFED = 8  # files without an extension that are opened per folder in search of DICOM


class Tree(NamedTuple):
    """The names below a folder.

    Attributes:
        root: the folder.
        files: paths below it, with '/', sorted; a folder called ``*.nii[.gz]`` counts as a file.
        folders: likewise.
        unreadable: the folders that could not be listed.
        own: the folders left out because this software wrote them.
    """

    root: Path
    files: tuple[str, ...]
    folders: tuple[str, ...]
    unreadable: frozenset[str]
    own: frozenset[str]

    def path(self, name: str) -> Path:
        """The path of a name in ``files`` or ``folders``, or of one that begins with '../'."""
        if name.startswith("../"):
            return Path(os.path.abspath(self.root)).parent / name.removeprefix("../")
        return self.root / name

    def below(self, folder: str) -> tuple[str, ...]:
        """The files below one of the folders."""
        first = bisect.bisect_left(self.files, f"{folder}/")
        return self.files[first : bisect.bisect_left(self.files, f"{folder}0", first)]  # '0' comes right after '/'


def scan(root: Path) -> Tree:
    """Lists everything below a folder, but hidden files and what this software wrote itself."""
    files: list[str] = []
    folders: list[str] = []
    unreadable: set[str] = set()
    own: set[str] = set()
    stack: list[tuple[str, tuple[tuple[int, int], ...]]] = [("", ())]
    while stack:
        folder, ancestors = stack.pop()
        path = root / folder
        try:
            status = os.stat(path)
            with os.scandir(path) as entries:
                listed = [e for e in entries if not e.name.startswith(".") and e.name not in _IGNORED]
        except OSError:
            unreadable.add(folder)
            continue
        identity = (status.st_dev, status.st_ino)
        if identity in ancestors:  # a link that leads back up
            continue
        if _is_own(path, {e.name for e in listed}):
            own.add(folder)
            continue
        for entry in listed:
            name = f"{folder}/{entry.name}" if folder else entry.name
            if not _is_folder(entry):
                files.append(name)
            elif len(ancestors) < MAX_DEPTH:
                folders.append(name)
                stack.append((name, (*ancestors, identity)))
    kept = (name for name in folders if name not in own)
    return Tree(root, tuple(sorted(files)), tuple(sorted(kept)), frozenset(unreadable), frozenset(own))


def beside(root: Path, pattern: str) -> Iterator[str]:
    """The NIfTI files in the folders beside ``root`` whose name fits a pattern (``*_gd``), as '../folder/file'."""
    here = Path(os.path.abspath(root))
    for folder in sorted(_listed(here.parent, folders=True)):
        if folder != here.name and fnmatch.fnmatch(folder, pattern):
            yield from (f"../{folder}/{n}" for n in sorted(_listed(here.parent / folder)) if READABLE.search(n))


def holds_dicom(tree: Tree, names: Iterable[str]) -> bool:
    """Whether one of these files is DICOM: by its extension, or by the mark at its 128th byte where it has none."""
    bare = []
    for name in names:
        base = name.rpartition("/")[2]
        stem, dot, extension = base.rpartition(".")
        if extension.lower() in ("dcm", "dicom", "ima") or base == "DICOMDIR":
            return True
        if not dot or not stem or extension.isdigit():
            bare.append(name)
    return any(_has_dicom_mark(tree.path(name)) for name in bare[:_SNIFFED])


def _has_dicom_mark(path: Path) -> bool:
    try:
        if not path.is_file():  # opening a pipe would wait for ever
            return False
        with path.open("rb") as stream:
            return stream.read(132)[128:] == b"DICM"
    except OSError:
        return False


def _is_folder(entry: os.DirEntry[str]) -> bool:
    if READABLE.search(entry.name):
        return False  # it stands where a file belongs: whoever reads it will say so
    try:
        return entry.is_dir()
    except OSError:  # a link to itself
        return False


def _listed(path: Path, *, folders: bool = False) -> list[str]:
    try:
        with os.scandir(path) as entries:
            return [e.name for e in entries if not e.name.startswith(".") and _is_folder(e) == folders]
    except OSError:
        return []


def _is_own(path: Path, names: set[str]) -> bool:
    """Whether ``segment`` wrote this folder: a run's folder says so itself, a patient's folder in its sidecar."""
    if "dataset_description.json" in names:
        description = _json(path / "dataset_description.json")
        generated = json.dumps(description.get("GeneratedBy", "")).lower()
        if "deepgmm" in generated and description.get("DatasetType") != "raw":
            return True
    sidecar = f"{path.name}_dseg.json"
    return sidecar in names and "deepgmm" in json.dumps(_json(path / sidecar)).lower()


def _json(path: Path) -> dict[str, object]:
    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}
