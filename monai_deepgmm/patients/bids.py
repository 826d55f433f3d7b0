"""BIDS names: their entities, and which of several files of one kind is a patient's own, native one."""

from __future__ import annotations

import functools
import os
import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from monai_deepgmm.errors import UsageError
from monai_deepgmm.patients.directory import READABLE
from monai_deepgmm.patients.formats import foreign
from monai_deepgmm.wording import listed, shown

#: Entity → the values that are wanted; "" stands for files without that entity.
Filters = Mapping[str, tuple[str, ...]]

#: The entities by which two images of one sequence differ, in BIDS's order; the rest comes after them.
_ORDER = ("sample", "acq", "ce", "trc", "stain", "rec", "dir", "run", "echo", "flip", "inv", "mt", "part", "chunk")
_LONG = {
    **{"subject": "sub", "session": "ses", "acquisition": "acq", "ceagent": "ce", "reconstruction": "rec"},
    **{"description": "desc", "resolution": "res", "inversion": "inv"},
}
_PATIENTS = ("sub", "ses")
_NOT_MAGNITUDE = {"phase", "real", "imag"}
_ORGANS = {"brain": ("brain",), "left ventricle": ("lv", "leftventricle", "epicardium", "epi")}
#: Spaces of the patient's own anatomy; all others are templates, or those of another examination.
_OWN_SPACES = {"orig", "individual", "native", "scanner", "anat", "subject", "t1w", "t2w", "flair"}
_REMEMBERED = 1 << 16  # names, each of which is asked for many times
_LEVELS = 4  # data set/subject/session/anat
_OTHER_MODALITIES = {"func", "dwi", "perf", "fmap", "pet", "meg", "eeg", "ieeg", "nirs", "mrs", "beh"}


class BidsName(NamedTuple):
    """What a BIDS file's name says.

    Attributes:
        path: below DIR.
        entities: key → value, as written; with ``pipeline``, the folder below derivatives.
        suffix: the last word.
        datatype: the folder that holds the file.
    """

    path: str
    entities: Mapping[str, str]
    suffix: str
    datatype: str

    def get(self, key: str) -> str:
        """The entity's value for comparing; "" where there is none."""
        return _plain(self.entities.get(key, ""))


@functools.lru_cache(maxsize=_REMEMBERED)
def parse(path: str) -> BidsName:
    """Reads a name; the session may stand in a folder's name only."""
    folders, _, base = path.rpartition("/")
    other = foreign(base)
    *words, suffix = (other.stem if other else READABLE.sub("", base)).split("_")
    parts = folders.split("/")
    entities = {}
    for word in (*(p for p in parts if p.casefold().startswith("ses-")), *words):
        key, dash, value = word.partition("-")
        if dash:
            entities[_LONG.get(key.casefold(), key.casefold())] = value
    below = [i for i, part in enumerate(parts) if part.casefold() == "derivatives"]
    if below:
        inside = parts[below[-1] + 1 :]
        end = next((i for i, part in enumerate(inside) if part.casefold().startswith("sub-")), len(inside))
        entities["pipeline"] = "/".join(inside[:end])
    return BidsName(path, entities, suffix, parts[-1].casefold())


def with_session(patient: str, path: str) -> str:
    """An id with its session, where only a folder's name tells it."""
    session = "" if "_" in patient else parse(path).entities.get("ses", "")
    return f"{patient}_ses-{session}" if session else patient


def filters(words: Sequence[str]) -> Filters:
    """What a user typed after ``--filter``: ``acq=tse run=1,2``; an empty value means files without that entity.

    Raises:
        UsageError: a word is not of this kind.
    """
    found: dict[str, tuple[str, ...]] = {}
    for word in words:
        key, sign, value = str(word).partition("=")
        key = key.strip().casefold()
        if not sign or not re.fullmatch(r"[a-z0-9]+", key):
            raise UsageError(f"--filter: got {word!r}, expected entities with their values, such as acq=tse run=1")
        key = _LONG.get(key, key)
        found[key] = (*found.get(key, ()), *(_plain(v.strip().removeprefix(f"{key}-")) for v in value.split(",")))
    return found


def check_filters(wanted: Filters, paths: Iterable[str]) -> None:
    """Refuses entities and values that no file of the folder has.

    Raises:
        UsageError: it names those that there are.
    """
    names = [parse(path) for path in paths]
    for key, values in wanted.items():
        there = sorted({n.entities[key] for n in names if n.entities.get(key)})
        if not there:
            keys = sorted({k for n in names for k in n.entities if k != "sub"})
            raise UsageError(f"--filter {key}: no file has this entity; there are {', '.join(keys) or 'none'}")
        for value in values:
            if value and value not in map(_plain, there):
                found = ", ".join(shown(v) for v in there[:12])
                raise UsageError(f"--filter {key}={value}: no file has this value; there are {found}")


def wanted_patient(path: str, wanted: Filters) -> bool:
    """Whether a file belongs to a subject and session that the filters keep."""
    name = parse(path)
    return all(not name.get(key) or name.get(key) in wanted[key] for key in _PATIENTS if key in wanted)


def images(paths: Sequence[str], wanted: Filters, *, others: Sequence[str]) -> list[str]:
    """Of the files of one sequence, those that may be meant: magnitude, native, and as the filters say.

    Args:
        paths: the files.
        wanted: the filters. One that fits another sequence of the patient says nothing of a sequence that it does
            not fit: ``acq=tse`` leaves a T1w with ``acq-mprage`` as it is.
        others: the files of the patient's other sequences.
    """
    names = [n for n in map(parse, paths) if n.get("part") not in _NOT_MAGNITUDE]
    for key, values in wanted.items():
        if key in _PATIENTS:
            continue
        fitting = [n for n in names if n.get(key) in values] or [n for n in names if not n.get(key)]
        elsewhere = any(parse(path).get(key) in values for path in others)
        names = fitting or (names if elsewhere or key in ("space", "desc", "pipeline") else [])
    return _best(names, lambda n: (_space(n, ()),))


def masks(paths: Sequence[str], wanted: Filters, of: Sequence[str], *, organ: str, own: Sequence[str]) -> list[str]:
    """Of the masks below DIR, those that may be the patient's.

    Args:
        paths: the files.
        wanted: the filters.
        of: the patient's images, the reference first.
        organ: what the mask must cover, as the protocol says.
        own: names of the images' sequences, which are names of spaces too.
    """
    kinds = _kinds(organ)
    asked = wanted.get("desc", ())
    names = [n for n in map(parse, paths) if {n.get("desc"), n.get("label")} & {*kinds, *asked} - {""}]
    return _labels(names, wanted, of, own)


def mask_example(patient: str, organ: str) -> str:
    """What a mask of this patient may be called."""
    return f"{patient}_desc-{_kinds(organ)[0]}_mask.nii.gz"


def reference_labels(paths: Sequence[str], wanted: Filters, of: Sequence[str], *, own: Sequence[str]) -> list[str]:
    """Of the ``dseg`` files below DIR, those that may be the patient's; the arguments are those of ``masks``."""
    return _labels([*map(parse, paths)], wanted, of, own)


def unused_images(paths: Sequence[str]) -> str:
    """That images were found and are not meant, for a message; "" where there are none."""
    return f"{listed(paths)} is no magnitude image, or not what --filter asks for" if paths else ""


def unused_labels(paths: Sequence[str]) -> str:
    """What speaks against masks that were found and are not used, for a message; "" where there are none."""
    reasons = []
    for name in map(parse, paths):
        reason = f"{shown(name.path.rpartition('/')[2])} is not that of the images"
        if _is_of_other_modality(name):
            reason = f"{shown(name.path.rpartition('/')[2])} belongs to another modality ({name.datatype})"
        elif name.get("space"):
            reason = f"{shown(name.path.rpartition('/')[2])} lies in space {shown(name.entities['space'])}"
        reasons.append(reason)
    more = f" and {len(reasons) - 3} more" if len(reasons) > 3 else ""
    return "; ".join(reasons[:3]) + more


def options(paths: Sequence[str]) -> str:
    """How to choose between files, by the entities in which they differ; "" where they do not."""
    names = [parse(path) for path in paths]
    keys = {key for name in names for key in name.entities}
    ways = []
    for key in sorted(keys, key=lambda k: (_ORDER.index(k) if k in _ORDER else len(_ORDER), k)):
        values = sorted({name.entities.get(key, "") for name in names})
        if len(values) > 1 and key not in _PATIENTS:
            ways.append(" or ".join(f"{key}={shown(value)}" for value in values[:6]))
    return f"Choose with --filter {', or with '.join(ways)}" if ways else ""


def tables(files: Iterable[str]) -> dict[str, list[str]]:
    """Folder → the ``dseg.tsv`` in it, which say what the values of labels mean."""
    found: dict[str, list[str]] = {}
    for file in files:
        if file.casefold().endswith("dseg.tsv"):
            found.setdefault(file.rpartition("/")[0], []).append(file)
    return found


def tables_near(paths: Iterable[Path]) -> dict[str, list[str]]:
    """The same beside these files, and in the folders above them up to that of the data set."""
    found: dict[str, list[str]] = {}
    for path in paths:
        for folder in list(Path(os.path.abspath(path)).parents)[:_LEVELS]:
            try:
                found |= tables(entry.as_posix() for entry in folder.iterdir())
            except OSError:
                break
            if (folder / "dataset_description.json").is_file():
                break
    return found


def inherited(path: str, tables: Mapping[str, Sequence[str]]) -> str | None:
    """The ``dseg.tsv`` that applies to a file of labels, by BIDS's inheritance: of the nearest folder, most specific.

    Args:
        path: the labels' file.
        tables: from ``tables``.
    """
    name, folder = parse(path), path.rpartition("/")[0]
    pairs = {(k, _plain(v)) for k, v in name.entities.items() if k != "pipeline"}
    while True:
        fitting = []
        for file in tables.get(folder, ()):
            *words, suffix = file.rpartition("/")[2][: -len(".tsv")].split("_")
            own = {(_LONG.get(k.casefold(), k.casefold()), _plain(v)) for k, _, v in (w.partition("-") for w in words)}
            if suffix.casefold() == "dseg" and own <= pairs:
                fitting.append((len(own), file))
        if fitting:
            return max(fitting)[1]
        if not folder:
            return None
        folder = folder.rpartition("/")[0]


def _kinds(organ: str) -> list[str]:
    """The values of ``desc`` that mean a mask of this organ."""
    known = [k for name, kinds in _ORGANS.items() if name in organ.casefold() for k in kinds]
    return known or ["".join(re.findall(r"\w+", organ.casefold())), *(k for kinds in _ORGANS.values() for k in kinds)]


def _labels(names: list[BidsName], wanted: Filters, of: Sequence[str], own: Sequence[str]) -> list[str]:
    """Those in the images' own space, of their acquisition and run, of the session before those of the subject."""
    targets = [*map(parse, of)]
    reference = targets[0] if targets else None
    same = {_plain(s) for s in own}
    names = [n for n in names if not _is_of_other_modality(n, reference) and _fits_space(n, reference, same)]
    names = [n for n in names if all(_agrees(n, key, targets) for key in (*_ORDER, "ses"))]
    for key, values in wanted.items():
        if key not in _PATIENTS:
            fitting = [n for n in names if n.get(key) in values]
            names = fitting or [n for n in names if not n.get(key)] or names

    def rank(name: BidsName) -> tuple[int, ...]:
        strange = reference is not None and name.get("acq") not in ("", reference.get("acq"))
        return not name.get("ses"), _space(name, same), bool(name.get("res") or name.get("den")), strange

    return _best(names, rank)


def _agrees(name: BidsName, key: str, targets: Sequence[BidsName]) -> bool:
    """Whether labels can belong to one of the images, as far as one entity tells."""
    there = {target.get(key) for target in targets}
    if key != "acq" and targets and targets[0].get(key):
        there = {targets[0].get(key)}  # run-1 of another sequence says nothing of run-2 of the reference
    return not name.get(key) or name.get(key) in there or there <= {""}


def _fits_space(name: BidsName, reference: BidsName | None, own: Collection[str]) -> bool:
    space, target = name.get("space"), reference.get("space") if reference else ""
    if target and target not in _OWN_SPACES | set(own):
        return space == target  # images in a template's space
    return not space or space in _OWN_SPACES or space in own


def _is_of_other_modality(name: BidsName, reference: BidsName | None = None) -> bool:
    mine = reference.datatype if reference else ""
    return bool(name.get("task")) or (name.datatype in _OTHER_MODALITIES and name.datatype != mine)


def _space(name: BidsName, own: Collection[str]) -> int:
    """0: native; 1: of one of the images; 2: another of the patient's own; 3: a template's."""
    space = name.get("space")
    return 0 if not space else 1 if space in own else 2 if space in _OWN_SPACES else 3


def _best(names: Sequence[BidsName], rank: Callable[[BidsName], tuple[int, ...]]) -> list[str]:
    best = min(map(rank, names), default=())
    return [name.path for name in names if rank(name) == best]


@functools.lru_cache(maxsize=_REMEMBERED)
def _plain(value: str) -> str:
    """A value for comparing: run-01 is run-1."""
    return value.lstrip("0") or "0" if value.isdecimal() else value.casefold()
