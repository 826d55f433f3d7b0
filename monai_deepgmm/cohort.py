"""Which files belong to which patient. A study is paths until it is loaded."""

from __future__ import annotations

import difflib
import os
import unicodedata
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from monai_deepgmm import layout as layouts
from monai_deepgmm import manifest as manifests
from monai_deepgmm.claims import Claims, Found, claim
from monai_deepgmm.errors import UsageError
from monai_deepgmm.layout import Layout
from monai_deepgmm.protocol import Protocol
from monai_deepgmm.tree import NIFTI, Tree, holds_dicom, scan

#: The longest id, in bytes: 255 less what is appended to it in the names of results.
MAX_ID_BYTES = 200

_SHOWN = 6  # files named in a message


@dataclass(frozen=True)
class Problem:
    """Why a patient cannot be segmented, known from the files' names alone.

    Attributes:
        code: one of ``errors.CODES``.
        message: what was found.
        remedy: what the user can do about it.
    """

    code: str
    message: str
    remedy: str = ""


@dataclass(frozen=True)
class Study:
    """The files of one patient.

    Attributes:
        patient: the id, byte for byte as found.
        images: sequence → file, in the protocol's order of reference.
        mask: the mask's file; None with ``mask_rule`` "nonzero", or when there is none.
        mask_labels: which values of the mask's file count; empty: every value but 0.
        mask_rule: "file", or "nonzero" for the voxels of the reference sequence that are not 0.
        truth: the file with the manual labels, for evaluation and means only.
        truth_labels: value in the truth's file → index of the protocol's tissue; empty: values are the indices.
        problems: why it cannot be segmented; empty when it can be tried.
    """

    patient: str
    images: Mapping[str, Path]
    mask: Path | None = None
    mask_labels: tuple[float, ...] = ()
    mask_rule: str = "file"
    truth: Path | None = None
    truth_labels: Mapping[int, int] | None = None
    problems: tuple[Problem, ...] = ()


@dataclass(frozen=True)
class Cohort:
    """The patients of a folder or manifest.

    Attributes:
        root: the folder.
        layout: the layout's name, or "manifest".
        studies: sorted by patient id.
        notes: what else the user should know about the choice of the layout.
    """

    root: Path
    layout: str
    studies: tuple[Study, ...]
    notes: tuple[str, ...] = ()


def find(
    root: Path,
    protocol: Protocol,
    *,
    layout: str | Path | None = None,
    manifest: Path | None = None,
    mask: str | None = None,
    mask_labels: Sequence[float] = (),
    patients: Sequence[str] = (),
) -> Cohort:
    """Finds the patients of a folder by their files' names; no image is opened.

    Args:
        root: the folder.
        protocol: says which sequences to look for.
        layout: one of ``layout.ORDER``, or a YAML file; None tries them in turn and takes the first that matches
            without a conflict: no file matched twice, no id shared, nothing left out that another layout finds.
        manifest: a table of the patients' files, instead of a layout.
        mask: None for the mask's file, "nonzero" for the voxels of the reference sequence that are not 0.
        mask_labels: which values of the mask's file count; empty: those that the layout says.
        patients: the ids to keep; empty: all.

    Returns:
        Every patient found, with the problems that names alone reveal.

    Raises:
        UsageError: no such folder, no patient, or options that contradict each other.
    """
    root = Path(root)
    _check_options(root, layout, manifest, mask, mask_labels)
    labels = tuple(float(value) for value in mask_labels)
    if manifest is not None:
        cohort = _from_manifest(root, Path(manifest), protocol, mask, labels)
    else:
        cohort = _from_layout(root, layout, protocol, mask, labels)
    studies = _unique(_with_usable_id(study) for study in cohort.studies)
    return replace(cohort, studies=_selected(studies, (patients,) if isinstance(patients, str) else patients))


def _check_options(
    root: Path, layout: str | Path | None, manifest: Path | None, mask: str | None, mask_labels: Sequence[float]
) -> None:
    if not root.exists():
        raise UsageError(f"there is no folder {shown(root.name or '.')}")
    if not root.is_dir():
        raise UsageError(f"{shown(root.name or '.')} is a file; expected the folder that holds the patients")
    if layout is not None and manifest is not None:
        raise UsageError("--layout and --manifest both say where the files are: give one of them")
    if mask not in (None, "nonzero"):
        raise UsageError(f"--mask {mask}: the only choice is nonzero; a mask's file is found by its name or a manifest")
    if mask is not None and len(mask_labels):
        raise UsageError("--mask-labels choose values of a mask's file, --mask nonzero uses none: give one of them")


def _from_manifest(
    root: Path, manifest: Path, protocol: Protocol, mask: str | None, labels: tuple[float, ...]
) -> Cohort:
    table = manifests.read(manifest, layouts.load("folder").aliases(protocol))
    here = manifest.parent
    studies = []
    for found in table:
        missing = [n for n in found.files() if not os.path.exists(here / n) and not (mask and n in found.mask)]
        study = _study(found, Tree(here, (), (), frozenset(), frozenset()), None, protocol, mask, labels)
        problems = tuple(
            Problem(
                "E_FILE",
                f"{shown(Path(name).name)} is named in {manifest.name} but does not exist",
                "Correct the path; relative paths begin at the manifest's folder",
            )
            for name in missing
        )
        studies.append(replace(study, problems=problems + study.problems))
    if not studies:
        raise UsageError(f"--manifest {manifest.name} names no patient")
    return Cohort(root, "manifest", tuple(studies))


def _from_layout(
    root: Path, name: str | Path | None, protocol: Protocol, mask: str | None, labels: tuple[float, ...]
) -> Cohort:
    tree = scan(root)
    if "" in tree.own:
        raise UsageError(
            f"{shown(root.name or '.')} holds results of deepgmm; expected the folder that holds the patients' images"
        )
    if "" in tree.unreadable:
        raise UsageError(f"{shown(root.name or '.')} cannot be read: check its permissions")
    tried = [layouts.load(n) for n in ((name,) if name is not None else layouts.ORDER)]
    fitting = [one for one in tried if one.fits(protocol)]
    if not fitting:
        raise UsageError(
            f"--layout {name} holds other sequences or tissues than protocol {protocol.name}: choose another --protocol"
        )
    claims = [claim(tree, _reader(one, protocol, tree), protocol) for one in fitting]
    chosen, notes = _choose(claims)
    if not chosen.found and not any(_holds_scans(tree, one) for one in chosen.empty):
        raise UsageError(_nobody(tree, protocol, tried))
    studies = [_study(one, tree, chosen.layout, protocol, mask, labels) for one in chosen.found]
    studies += [_failed(one, tree, protocol) for one in chosen.empty]
    return Cohort(root, chosen.layout.name, tuple(studies), notes)


def _reader(layout: Layout, protocol: Protocol, tree: Tree) -> layouts.Reader:
    plain = layouts.reader(layout, protocol, tree.root, needed=False)
    needed = layout.channels is not None and any(plain.could_be_image(n) for n in tree.files if NIFTI.search(n))
    return layouts.reader(layout, protocol, tree.root, needed=True) if needed else plain


def _choose(claims: Sequence[Claims]) -> tuple[Claims, tuple[str, ...]]:
    """The first layout that matches without a conflict; else the one with most patients free of clashes."""
    files = [one.files() for one in claims]
    left_out = [sorted(set().union(*files) - mine) for mine in files]
    matching = [i for i, one in enumerate(claims) if one.found]
    for i in matching:
        if not left_out[i] and not claims[i].clashes():
            return claims[i], ()
    if not matching:
        return claims[-1], ()
    best = max(matching, key=lambda i: (len(claims[i].found) - claims[i].clashes(), len(files[i])))
    notes: tuple[str, ...] = ()
    if left_out[best]:
        notes = (f"layout {claims[best].layout.name} leaves out {_listed(left_out[best])}, which another layout finds",)
    return claims[best], notes


def _study(
    found: Found, tree: Tree, layout: Layout | None, protocol: Protocol, mask: str | None, labels: tuple[float, ...]
) -> Study:
    """Judges what was found for one patient."""
    present = {s: found.images[s] for s in protocol.sequences if s in found.images}
    problems = [*_sequence_problems(found, present, protocol)]
    for role, names in {**present, "the mask": () if mask else found.mask, "the truth": found.truth}.items():
        if len(names) > 1:
            remedy = "Keep one of them in this place, or name the right one in a table (--manifest)"
            problems.append(Problem("E_AMBIGUOUS", f"{len(names)} files match {role}: {_listed(names)}", remedy))
    own, known = _only(found.mask), layout.mask_labels if layout else ()
    chosen = found.mask or (found.truth if known else [])
    if not mask and not chosen:
        problems.append(_no_mask(found.patient, layout, protocol))
    truth = _only(found.truth)
    mask_file = None if mask else _only(chosen)
    return Study(
        patient=found.patient,
        images={s: tree.path(names[0]) for s, names in present.items() if len(names) == 1},
        mask=tree.path(mask_file) if mask_file else None,
        mask_labels=() if mask else labels or (known if own is None else ()),
        mask_rule="nonzero" if mask else "file",
        truth=tree.path(truth) if truth else None,
        truth_labels=layout.truth_labels(protocol) if layout else None,
        problems=tuple(problems),
    )


def _only(names: Sequence[str]) -> str | None:
    return names[0] if len(names) == 1 else None


def _sequence_problems(found: Found, present: Mapping[str, object], protocol: Protocol) -> Iterable[Problem]:
    for sequence, name in found.dicom.items():
        yield _dicom(f"{shown(name)} is DICOM where the NIfTI file of {sequence} belongs")
    missing = [s for s in protocol.required if s not in present and s not in found.dicom]
    if missing or not present:
        wanted = " and ".join(missing) or f"any of {', '.join(protocol.sequences)}"
        have = ", ".join(present) or "none"
        remedy = f"Protocol {protocol.name} needs {wanted}: add its file, or name it in a table (--manifest)"
        yield Problem("E_NO_SEQUENCE", f"{wanted} is missing; sequences found: {have}", remedy)


def _no_mask(patient: str, layout: Layout | None, protocol: Protocol) -> Problem:
    if layout is None:
        file = "name its file in the manifest's column mask"
    else:
        examples = " or ".join(map(shown, layout.mask_examples(patient)))
        file = f"add {examples or 'a file'}, or name the file in a manifest's column mask (--manifest)"
    remedy = f"Give one: {file} (--mask-labels says which of its values count); or use the voxels that are not 0 "
    return Problem("E_MASK_NONE", f"no mask of the {protocol.mask} was found", f"{remedy}(--mask nonzero)")


def _failed(found: Found, tree: Tree, protocol: Protocol) -> Study:
    """A folder that should hold a patient, and in which nothing matches."""
    folder = found.folder or ""
    names = tree.below(folder)
    if folder in tree.unreadable:
        problem = Problem("E_FILE", "the folder cannot be read", "Check its permissions")
    elif holds_dicom(tree, names):
        problem = _dicom("the folder holds DICOM files, and no NIfTI file")
        if any(NIFTI.search(n) for n in names):
            problem = _dicom("the folder holds DICOM files, and no NIfTI file of a sequence")
    else:
        sequences = ", ".join(protocol.sequences)
        remedy = f"Put each sequence ({sequences}) into this folder as <sequence>.nii.gz, or use a table (--manifest)"
        short = [n.removeprefix(f"{folder}/") for n in names]
        problem = Problem("E_NO_SEQUENCE", f"no file is {sequences}; found {_listed(short) or 'no file'}", remedy)
    return Study(found.patient, {}, problems=(problem,))


def _dicom(message: str) -> Problem:
    return Problem("E_DICOM", message, "Convert it with dcm2niix, and name the result after its sequence")


def _holds_scans(tree: Tree, found: Found) -> bool:
    names = tree.below(found.folder or "")
    return any(NIFTI.search(n) for n in names) or holds_dicom(tree, names)


def _nobody(tree: Tree, protocol: Protocol, tried: Sequence[Layout]) -> str:
    flat = [n for n in tree.files if "/" not in n]
    scans = [n for n in tree.files if NIFTI.search(n)]
    looked = f"{len(tree.files)} files in {len(tree.folders)} folders, of which {len(scans)} are NIfTI"
    hint = ""
    if holds_dicom(tree, flat):
        hint = " There are DICOM files: convert them with dcm2niix."
    elif any(NIFTI.search(n) for n in flat):
        hint = f" It holds {_listed([n for n in flat if NIFTI.search(n)])}: if it is one patient's folder, give the "
        hint += "folder around it."
    return (
        f"no patient found in {shown(tree.root.name or '.')} ({looked}): nothing is named like "
        f"{', '.join(protocol.sequences)} in layout "
        f"{', '.join(one.name for one in tried)}.{hint} Choose --protocol or --layout "
        f"({', '.join(layouts.ORDER)}, or a YAML file), or list the files in a table (--manifest)"
    )


def _with_usable_id(study: Study) -> Study:
    """The study, with a problem if its id cannot be the name of a folder and of files."""
    name = study.patient
    parts = name.replace("\\", "/").split("/")
    problem = None
    if not name.strip() or len(parts) > 1 or name in (".", "..") or any(unicodedata.category(c) == "Cc" for c in name):
        remedy = "Use an id without separators, '..' or control characters: it becomes a folder's name"
        problem = Problem("E_ID", f"the id {name!r} cannot be a folder's name", remedy)
    elif (size := len(os.fsencode(name))) > MAX_ID_BYTES:
        message = f"the id begins with {shown(name[:20])!r} and has {size} bytes; {MAX_ID_BYTES} are possible"
        problem = Problem("E_NAME", message, "Shorten it")
    return replace(study, problems=(problem, *study.problems)) if problem else study


def _unique(studies: Iterable[Study]) -> tuple[Study, ...]:
    """Sorted by id; those whose ids a file system may take for one another all fail."""

    def key(patient: str) -> str:
        return unicodedata.normalize("NFC", unicodedata.normalize("NFC", patient).casefold())

    first: dict[str, Study] = {}
    times: Counter[str] = Counter()
    for study in studies:
        times[study.patient] += 1
        first.setdefault(study.patient, study)
    alike: dict[str, list[str]] = {}
    for patient in sorted(first):
        alike.setdefault(key(patient), []).append(patient)
    result = []
    for patient in sorted(first):
        study, group = first[patient], alike[key(patient)]
        problem = None
        if times[patient] > 1:
            problem = f"{times[patient]} patients have the id {shown(patient)}"
        elif len(group) > 1:
            problem = f"the ids {', '.join(shown(p) for p in group)} differ only by case or by how accents are encoded"
        if problem:
            duplicate = Problem("E_DUPLICATE", problem, "Rename all but one of them")
            study = replace(study, problems=(duplicate, *study.problems))
        result.append(study)
    return tuple(result)


def _selected(studies: tuple[Study, ...], patients: Sequence[str]) -> tuple[Study, ...]:
    """The studies of these ids; all of them if none is given."""
    have = [study.patient for study in studies]
    for patient in patients:
        if patient not in have:
            near = difflib.get_close_matches(patient, have, n=3) or have[:3]
            raise UsageError(
                f"--patients: there is no patient {shown(patient)} among {len(have)}; "
                f"near: {', '.join(map(shown, near))}"
            )
    return tuple(study for study in studies if not patients or study.patient in patients)


def shown(name: str | Path) -> str:
    """A file's name as it can be printed: bytes that are not text are escaped."""
    return os.fsencode(name).decode("utf-8", "backslashreplace")


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(map(shown, names[:_SHOWN])) + more
