"""From what was found to what can be segmented: each patient's files, judged by their names alone."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

from monai_deepgmm.patients import bids, label_meanings, overlooked
from monai_deepgmm.patients import layout as layouts
from monai_deepgmm.patients.claims import Found
from monai_deepgmm.patients.directory import READABLE, Tree, holds_dicom
from monai_deepgmm.patients.formats import foreign, pointer
from monai_deepgmm.patients.layout import Layout
from monai_deepgmm.patients.study import Meanings, Problem, Study
from monai_deepgmm.protocol import Protocol
from monai_deepgmm.wording import listed, shown

#: Finders of a mask that are asked also where a mask was found that is not meant, of another space or run.
UNASKED = ("ventricle",)


class Asked(NamedTuple):
    """What the user says of the files, beside where they lie.

    Attributes:
        mask: "file", "auto" or "nonzero"; None for a file, or "auto" where there is none and the protocol can.
        mask_labels: the values of the mask's file that count; empty: those that the layout says.
        meanings: of the values in all reference labels; None: what stands beside each, or the layout's or protocol's
            own.
        tables: folder → the ``dseg.tsv`` in it, which may say what the values mean.
    """

    mask: str | None = None
    mask_labels: tuple[float, ...] = ()
    meanings: Meanings | None = None
    tables: Mapping[str, Sequence[str]] = MappingProxyType({})

    @property
    def ruled(self) -> bool:
        """Whether no file is to be looked for."""
        return self.mask in ("auto", "nonzero")


def judge(found: Found, tree: Tree, layout: Layout | None, protocol: Protocol, asked: Asked) -> Study:
    """What was found for one patient, as a study with its problems.

    Args:
        found: all files that match.
        tree: turns names into paths.
        layout: where they were found; None for a manifest.
        protocol: says which sequences are needed.
        asked: what the user says besides.
    """
    present = {s: found.images[s] for s in protocol.sequences if s in found.images}
    told = overlooked.find(found, layout, protocol)
    problems = [*_sequence_problems(found, present, protocol, told)]
    for sequence, names in present.items():
        problems += _file_problems(found, tree, sequence, names)
    known = layout.mask_labels if layout else ()
    from_truth = bool(known) and not found.mask and not asked.ruled
    chosen = found.truth if from_truth else found.mask
    rule = str(asked.mask) if asked.ruled else "file"
    if not asked.ruled:
        wrong = _mask_problems(found, tree, "truth" if from_truth else "mask", chosen)
        finder = protocol.mask_finder
        unasked = finder in UNASKED or (finder is not None and not found.hints.get("mask"))
        if not chosen and not wrong and asked.mask is None and unasked:
            rule = "auto"
        elif not chosen and not wrong:
            wrong = [_no_mask(found, layout, protocol)]
        problems += wrong
    truth = _only(found.truth)
    meanings = _meanings(found, truth, tree, protocol, asked)
    mask_file = None if asked.ruled else _only(chosen)
    own = layout.truth_labels(protocol) if layout else None
    return Study(
        patient=found.patient,
        images={s: tree.path(names[0]) for s, names in present.items() if len(names) == 1},
        mask=tree.path(mask_file) if mask_file else None,
        mask_labels=() if rule != "file" else asked.mask_labels or (known if from_truth else ()),
        mask_rule=rule,
        mask_named=layout is None,
        truth=tree.path(truth) if truth else None,
        truth_labels=own if meanings is None or meanings.problem else dict(meanings.tissues),
        truth_names=meanings,
        problems=tuple(problems),
        label_problems=tuple(_label_problems(found, tree, meanings)),
        unused=tuple(map(_base, found.unused)),
        overlooked=told,
    )


def _mask_problems(found: Found, tree: Tree, role: str, chosen: Sequence[str]) -> list[Problem]:
    """What is wrong with the file that the mask is taken from, or with one that it cannot be taken from."""
    problems = [*_foreign_problems(found, "mask", found.mask), *_file_problems(found, tree, role, chosen, "the mask")]
    return problems or [*_foreign_problems(found, role, chosen)]


def _label_problems(found: Found, tree: Tree, meanings: Meanings | None) -> Iterable[Problem]:
    yield from _foreign_problems(found, "truth", found.truth)
    yield from _file_problems(found, tree, "truth", found.truth, "the reference labels")
    if meanings is not None and meanings.problem is not None and len(found.truth) == 1:
        yield meanings.problem


def _meanings(found: Found, truth: str | None, tree: Tree, protocol: Protocol, asked: Asked) -> Meanings | None:
    """What the values of the reference labels mean, where anybody or anything says so; else None."""
    if asked.meanings is not None or not truth:
        return asked.meanings
    if found.labels:
        return label_meanings.pairs(found.labels, protocol, "the column labels")
    at = truth if tree.files else Path(os.path.abspath(tree.path(truth))).as_posix()  # a manifest's begin anywhere
    table = bids.inherited(at, asked.tables)
    try:
        named = label_meanings.table(tree.path(table)) if table else None
    except OSError:
        named = None
    return label_meanings.understood(named, protocol, shown((table or "").rpartition("/")[2])) if named else None


def _base(name: str) -> str:
    return name.rpartition("/")[2]


def _only(names: Sequence[str]) -> str | None:
    return names[0] if len(names) == 1 else None


def _sequence_problems(
    found: Found, present: Mapping[str, object], protocol: Protocol, told: Mapping[str, str]
) -> Iterable[Problem]:
    for sequence, name in found.dicom.items():
        yield _dicom(f"{shown(name)} is DICOM where the NIfTI file of {sequence} belongs")
    unread = [s for s in protocol.sequences if found.foreign.get(s) and s not in present]
    for sequence in unread:
        yield from _foreign_problems(found, sequence, ())
    missing = [s for s in protocol.required if s not in present and s not in (*found.dicom, *unread)]
    if missing or not (present or unread):
        wanted = " and ".join(missing) or f"any of {', '.join(protocol.sequences)}"
        have = ", ".join(present) or "none"
        why = "".join(f"; {hint}" for s, hint in found.hints.items() if s in protocol.sequences and hint)
        why += "".join(f"; {told[s]}" for s in protocol.sequences if s in told)
        remedy = f"Protocol {protocol.name} needs {wanted}: add its file, or name it in a table (--manifest)"
        yield Problem("E_NO_SEQUENCE", f"{wanted} is missing; sequences found: {have}{why}", remedy)


def _foreign_problems(found: Found, role: str, instead: Sequence[str]) -> Iterable[Problem]:
    """What stands in the place of a file that is missing, in a format that is not read."""
    of_pairs = {n.rpartition(".")[0]: n for n in sorted(found.foreign.get(role, ()), reverse=True)}  # .hdr before .img
    names = [*of_pairs.values()]
    other = foreign(names[0]) if names and not instead else None
    if other is not None:
        more = f" (and {len(names) - 1} more)" if len(names) > 1 else ""
        what = {"mask": "the mask", "truth": "the reference labels"}.get(role, role)
        yield Problem(other.problem.code, f"{what}: {other.problem.message}{more}", other.problem.remedy)


def _file_problems(found: Found, tree: Tree, role: str, names: Sequence[str], title: str = "") -> Iterable[Problem]:
    """Several files for one purpose, or one that is not what its name promises."""
    title = title or role
    if len(names) > 1:
        way = "Keep one of them in this place, or name the right one in a table (--manifest)"
        remedy = f"{found.hints[role]}. {way}" if found.hints.get(role) else way
        yield Problem("E_AMBIGUOUS", f"{len(names)} files match {title}: {listed(names)}", remedy)
    elif names:
        other = foreign(names[0])
        problem = other.problem if other else pointer(tree.path(names[0]))
        if problem is not None:
            yield Problem(problem.code, f"{title}: {problem.message}", problem.remedy)


def _no_mask(found: Found, layout: Layout | None, protocol: Protocol) -> Problem:
    examples = layout.mask_examples(found.patient) if layout else []
    if layout is not None and layout.entities:
        examples = [bids.mask_example(found.patient, protocol.mask)]
    names = [shown(name) for name in examples]
    ways = [
        *([f"add {' or '.join(names)}"] if names else []),
        "name the mask's file in the column mask of a table (--manifest)",
        "use the voxels that are not 0 (--mask nonzero)",
        *(["have it found (--mask auto)"] if protocol.mask_finder else []),
    ]
    remedy = f"Either {', or '.join(ways)}; of a file, --mask-labels says which values count (else all but 0)"
    why = f"; {found.hints['mask']}" if found.hints.get("mask") else ""
    why += f"; not used: {listed([_base(name) for name in found.unused])}" if found.unused else ""
    return Problem("E_MASK_NONE", f"no mask of the {protocol.mask} was found{why}", remedy)


def failed(found: Found, tree: Tree, protocol: Protocol) -> Study:
    """A folder that should hold a patient, and in which nothing matches."""
    folder = found.folder or ""
    names = tree.below(folder)
    if folder in tree.unreadable:
        problem = Problem("E_FILE", "the folder cannot be read", "Check its permissions")
    elif holds_dicom(tree, names):
        problem = _dicom("the folder holds DICOM files, and no NIfTI file")
        if any(READABLE.search(n) for n in names):
            problem = _dicom("the folder holds DICOM files, and no NIfTI file of a sequence")
    else:
        short = [n.removeprefix(f"{folder}/") for n in names]
        message = f"no file is {', '.join(protocol.sequences)}; found {listed(short) or 'no file'}"
        problem = Problem("E_NO_SEQUENCE", message, _how_to_lay_out(folder, short, tree, protocol))
    return Study(found.patient, {}, problems=(problem,))


def _how_to_lay_out(folder: str, names: Sequence[str], tree: Tree, protocol: Protocol) -> str:
    """What to do with a folder in which no file is called like a sequence; names are below it."""
    reader = layouts.reader(layouts.load("folder"), protocol, tree.root, needed=False)
    meaning, known = reader.meaning, {alias for alias, s in reader.aliases.items() if s in protocol.sequences}
    nearly = [name for name in names if "/" not in name and known & set(re.split(r"[\W_]+", name.casefold()))]
    nested = [name for name in names if "/" in name]
    inner = sorted({name.rpartition("/")[0] for name in nested})
    if meaning(folder) in protocol.sequences:
        own = "{sequence}/{patient}"
    elif any(meaning(_base(home)) in protocol.sequences for home in inner):
        own = "{patient}/{sequence}/*"
    elif any(meaning(READABLE.sub("", _base(name))) in protocol.sequences for name in nested):
        return f"If {listed(inner)} are patients, give this folder as DIR; else use a table (--manifest)"
    elif nearly:
        way = f"name each after its sequence alone, such as {protocol.sequences[0]}.nii.gz, or use a table (--manifest)"
        return f"The last word of a name decides what {listed(nearly)} is: {way}"
    else:
        sequences = ", ".join(protocol.sequences)
        return f"Put each sequence ({sequences}) into this folder as <sequence>.nii.gz, or use a table (--manifest)"
    return f"Files are sorted by sequence: use a layout of your own with images: ['{own}'], or a table (--manifest)"


def _dicom(message: str) -> Problem:
    remedy = "Convert it with dcm2niix, and name the result after its sequence; or segment DICOM with --layout dicom"
    return Problem("E_DICOM", message, remedy)
