"""From what was found to what can be segmented: each patient's files, judged by their names alone."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from monai_deepgmm.patients.claims import Found
from monai_deepgmm.patients.directory import NIFTI, Tree, holds_dicom, listed, shown
from monai_deepgmm.patients.layout import Layout
from monai_deepgmm.patients.study import Problem, Study
from monai_deepgmm.protocol import Protocol


def judge(
    found: Found, tree: Tree, layout: Layout | None, protocol: Protocol, mask: str | None, labels: tuple[float, ...]
) -> Study:
    """What was found for one patient, as a study with its problems.

    Args:
        found: all files that match.
        tree: turns names into paths.
        layout: where they were found; None for a manifest.
        protocol: says which sequences are needed.
        mask: None, "file", "auto" or "nonzero".
        labels: the mask's values that count, as the user typed them.
    """
    present = {s: found.images[s] for s in protocol.sequences if s in found.images}
    problems = [*_sequence_problems(found, present, protocol)]
    ruled = mask in ("auto", "nonzero")
    for role, names in {**present, "the mask": () if ruled else found.mask, "the truth": found.truth}.items():
        if len(names) > 1:
            remedy = "Keep one of them in this place, or name the right one in a table (--manifest)"
            problems.append(Problem("E_AMBIGUOUS", f"{len(names)} files match {role}: {listed(names)}", remedy))
    known = layout.mask_labels if layout else ()
    chosen = found.mask or (found.truth if known else [])
    rule = mask if mask is not None and ruled else "file"
    if not ruled and not chosen:
        if mask is None and protocol.mask_finder is not None:
            rule = "auto"
        else:
            problems.append(_no_mask(found.patient, layout, protocol))
    truth = _only(found.truth)
    mask_file = None if ruled else _only(chosen)
    return Study(
        patient=found.patient,
        images={s: tree.path(names[0]) for s, names in present.items() if len(names) == 1},
        mask=tree.path(mask_file) if mask_file else None,
        mask_labels=() if rule != "file" else labels or (() if found.mask else known),
        mask_rule=rule,
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
    names = [shown(name) for name in layout.mask_examples(patient)] if layout else []
    ways = [
        *([f"add {' or '.join(names)}"] if names else []),
        "name the mask's file in the column mask of a table (--manifest)",
        "use the voxels that are not 0 (--mask nonzero)",
        *(["have it found (--mask auto)"] if protocol.mask_finder else []),
    ]
    remedy = f"Either {', or '.join(ways)}; of a file, --mask-labels says which values count (else all but 0)"
    return Problem("E_MASK_NONE", f"no mask of the {protocol.mask} was found", remedy)


def failed(found: Found, tree: Tree, protocol: Protocol) -> Study:
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
        problem = Problem("E_NO_SEQUENCE", f"no file is {sequences}; found {listed(short) or 'no file'}", remedy)
    return Study(found.patient, {}, problems=(problem,))


def _dicom(message: str) -> Problem:
    return Problem("E_DICOM", message, "Convert it with dcm2niix, and name the result after its sequence")
