"""Which files belong to which patient. A study is paths until it is loaded."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn

from monai_deepgmm import protocol as protocols
from monai_deepgmm import schema
from monai_deepgmm.errors import NobodyError, UsageError
from monai_deepgmm.patients import (
    bids,
    dataset_json,
    given_masks,
    ids,
    label_meanings,
    task_check,
)
from monai_deepgmm.patients import layout as layouts
from monai_deepgmm.patients import manifest as manifests
from monai_deepgmm.patients import spacing as spacings
from monai_deepgmm.patients.claims import Claims, Found, claim
from monai_deepgmm.patients.dicom import cohort as dicom_cohort
from monai_deepgmm.patients.dicom import layout as dicom_layout
from monai_deepgmm.patients.dicom.layout import DicomLayout
from monai_deepgmm.patients.directory import READABLE, Tree, holds_dicom, scan
from monai_deepgmm.patients.formats import foreign
from monai_deepgmm.patients.judge import Asked, failed, judge
from monai_deepgmm.patients.layout import Layout
from monai_deepgmm.patients.study import Cohort, MaskModel, Meanings, Study
from monai_deepgmm.protocol import Protocol
from monai_deepgmm.wording import counted, listed, shown

__all__ = ["Cohort", "Study", "find"]

#: Where a mask comes from; without one of these, from a file, or else from the images where the protocol can.
MASK_RULES = ("file", "auto", "nonzero")


def find(
    root: str | Path,
    protocol: Protocol,
    *,
    layout: str | Path | None = None,
    manifest: str | Path | None = None,
    mask: str | None = None,
    masks: str | Path | None = None,
    mask_labels: Sequence[float] = (),
    truth_labels: Sequence[str] = (),
    filters: Sequence[str] = (),
    patients: Sequence[str] = (),
    spacing: str | Sequence[float] | None = None,
    asked: bool = True,
    mask_model: MaskModel | None = None,
) -> Cohort:
    """Finds the patients of a folder by their files' names, or DICOM's headers; no image is opened.

    Args:
        root: the folder.
        protocol: says which sequences to look for.
        layout: one of ``layout.ORDER``, dicom, or a YAML file; None tries those of NIfTI files in turn and takes the
            first that matches without a conflict: no file matched twice, no id shared, nothing left out that another
            layout finds. Where there is no NIfTI file of any, DICOM studies are looked for.
        manifest: a table of the patients' files, instead of a layout.
        mask: "file", "auto" to find it in the images, "nonzero" for the voxels of the reference sequence that are not
            0; None for its file, or, where there is none and the protocol can, "auto".
        masks: a folder that ``deepgmm mask`` wrote to; its masks are used, and no other.
        mask_labels: which values of the mask's file count; empty: those that the layout says.
        truth_labels: what the values of the reference labels mean (``blood=500``); empty: what stands beside them, or
            the layout says, or else the protocol's indices.
        filters: which of several files is meant, by BIDS's entities (``acq=tse``), or which DICOM series (``LGE=7``).
        patients: the ids to keep; empty: all.
        spacing: which voxel sizes count in headers that contradict themselves: sform, pixdim, or three in mm.
        asked: the protocol is the user's choice and no default.
        mask_model: the bundle that finds the masks; no file is looked for.

    Returns:
        Every patient found, with the problems that names alone reveal.

    Raises:
        UsageError: no such folder, no patient, sequences of another protocol, or options that contradict each other.
        TypeError: the protocol is a name.
    """
    if not isinstance(protocol, Protocol):
        raise TypeError(f"protocol: got {protocol!r}, expected a Protocol, as load_protocol makes of a name")
    root, masks = Path(root), None if masks is None else Path(masks)
    labels = schema.numbers(mask_labels, "--mask-labels")
    _check_options(root, layout, manifest, mask, labels)
    _check_mask(protocol, mask, masks, mask_model)
    wanted = bids.filters(schema.several(filters))
    typed = "; ".join(schema.several(truth_labels))
    meanings = label_meanings.pairs(typed, protocol, "--truth-labels", strict=True) if typed else None
    given = Asked(mask if masks is None and mask_model is None else "auto", labels, meanings)
    if manifest is not None:
        if wanted:
            raise UsageError("--filter chooses between files by their BIDS names, but --manifest names each of them")
        cohort = _from_manifest(root, Path(manifest), protocol, given, asked=asked)
    else:
        cohort = _from_layout(root, layout, protocol, given, wanted, asked=asked)
    if masks is not None:
        cohort = replace(cohort, studies=tuple(given_masks.use(s, masks, labels, protocol) for s in cohort.studies))
    if mask_model is not None:
        found: dict[str, Any] = {"mask": None, "mask_labels": (), "mask_rule": "model", "mask_model": mask_model}
        cohort = replace(cohort, studies=tuple(replace(study, **found) for study in cohort.studies))
    rule = spacings.parse(spacing)
    studies = ids.unique(replace(ids.usable(study), spacing=rule) for study in cohort.studies)
    return replace(cohort, studies=ids.selected(studies, [str(one) for one in schema.several(patients)]))


def _check_options(
    root: Path, layout: str | Path | None, manifest: str | Path | None, mask: str | None, mask_labels: Sequence[float]
) -> None:
    if not root.exists():
        beside = [p.name for p in root.absolute().parent.glob("*") if p.is_dir()]
        raise UsageError(f"there is no folder {shown(root.name or '.')}{schema.nearest(root.name, beside)}")
    if not root.is_dir():
        raise UsageError(f"{shown(root.name or '.')} is a file; expected the folder that holds the patients")
    if layout is not None and manifest is not None:
        raise UsageError("--layout and --manifest both say where the files are: give one of them")
    if mask not in (None, *MASK_RULES):
        raise UsageError(f"--mask {mask}: choose {', '.join(MASK_RULES)}; a file is found by its name or a manifest")
    if mask not in (None, "file") and len(mask_labels):
        raise UsageError(f"--mask-labels choose values of a mask's file, --mask {mask} uses none: give one of them")


def _check_mask(protocol: Protocol, mask: str | None, masks: Path | None, model: MaskModel | None) -> None:
    if model is not None and (mask is not None or masks is not None):
        other = f"--mask {mask}" if mask is not None else "--masks"
        raise UsageError(f"--mask-from and {other} both say where the masks come from: give one of them")
    if mask == "auto" and protocol.mask_finder is None:
        raise UsageError(
            f"--mask auto: protocol {protocol.name} cannot find the {protocol.mask}; give a file, or --mask nonzero"
        )
    if masks is None:
        return
    if mask in ("auto", "nonzero"):
        raise UsageError(f"--masks and --mask {mask} both say where the masks are: give one of them")
    if not masks.is_dir():
        raise UsageError(f"--masks: there is no folder {masks}; give the folder that deepgmm mask wrote to")


def _from_manifest(root: Path, manifest: Path, protocol: Protocol, given: Asked, *, asked: bool) -> Cohort:
    table = manifests.read(manifest, layouts.load("folder").aliases(protocol), protocol)
    task_check.check(manifest.name, task_check.sequences_of(table.patients), protocol, asked=asked)
    here = manifest.parent
    studies = []
    for found in table.patients:
        missing = {name: manifests.absent(here, name, manifest.name) for name in found.files()}
        near = given._replace(tables=bids.tables_near(here / name for name in found.truth))
        study = judge(found, Tree(here, (), (), frozenset(), frozenset()), None, protocol, near)
        used = {n for group in (*found.images.values(), () if given.ruled else found.mask) for n in group}
        problems = tuple(problem for name, problem in missing.items() if problem and name in used)
        of_labels = tuple(problem for name, problem in missing.items() if problem and name in found.truth)
        studies.append(
            replace(study, problems=problems + study.problems, label_problems=of_labels + study.label_problems)
        )
    if not studies:
        raise UsageError(f"--manifest {manifest.name} names no patient")
    return Cohort(root, "manifest", tuple(studies), table.notes)


def _from_layout(
    root: Path, name: str | Path | None, protocol: Protocol, given: Asked, wanted: bids.Filters, *, asked: bool
) -> Cohort:
    tree = scan(root)
    if "" in tree.own:
        raise UsageError(
            f"{shown(root.name or '.')} holds results of deepgmm; expected the folder that holds the patients' images"
        )
    if "" in tree.unreadable:
        raise UsageError(f"{shown(root.name or '.')} cannot be read: check its permissions")
    if name is not None and (series := dicom_layout.load(name)) is not None:
        return _from_dicom(tree, series, protocol, given, wanted, asked=asked) or _no_dicom(tree)
    tried = [layouts.load(n) for n in ((name,) if name is not None else layouts.ORDER)]
    fitting = _fitting(name, tried, protocol, wanted)
    there, title = task_check.sequences_by_name(tree), shown(root.name or ".")
    try:
        claims = [claim(tree, _reader(one, protocol, tree), protocol, wanted) for one in fitting]
    except UsageError:
        task_check.check(title, there, protocol, asked=asked)
        raise
    chosen, notes = _choose(claims)
    found = chosen.found or _found_otherwise(tree, tried)
    if name is None and not any(one.images for one in found):
        series = dicom_layout.load(layouts.DICOM)
        cohort = series and _from_dicom(tree, series, protocol, given, wanted, asked=asked)
        if cohort:
            return cohort
    task_check.check(title, there | task_check.sequences_of(found), protocol, asked=asked)
    if wanted:
        bids.check_filters(wanted, chosen.files())
    if not chosen.found and not any(_holds_scans(tree, one) for one in chosen.empty):
        raise NobodyError(_nobody(tree, protocol, tried))
    near = given._replace(tables=bids.tables(tree.files))
    if given.meanings is None and chosen.layout.channels is not None:
        near = near._replace(meanings=_of_dataset(tree, chosen.layout.channels, protocol))
    studies = [judge(one, tree, chosen.layout, protocol, near) for one in chosen.found]
    studies += [failed(one, tree, protocol) for one in chosen.empty]
    return Cohort(root, chosen.layout.name, tuple(studies), (*notes, *_about_dicom(tree)))


def _fitting(
    name: str | Path | None, tried: Sequence[Layout], protocol: Protocol, wanted: bids.Filters
) -> list[Layout]:
    """The layouts that can hold what is looked for; of those that come with the package there always is one."""
    fitting = [one for one in tried if one.fits(protocol) and (one.entities or not wanted)]
    if fitting:
        return fitting
    if wanted:
        raise UsageError(f"--filter chooses between files by their BIDS names; layout {name} has none")
    raise UsageError(
        f"--layout {name} holds other sequences or tissues than protocol {protocol.name}: choose another --protocol"
    )


def _about_dicom(tree: Tree) -> tuple[str, ...]:
    """What is told of DICOM files beside patients of other files."""
    names = [n for n in tree.files if n.lower().endswith((".dcm", ".ima", ".dicom")) and not layouts.in_results(n)]
    way = "--layout dicom, in a run with an OUT of its own, looks at nothing else"
    return (f"{len(names)} DICOM files are not looked at; {way}",) if names else ()


def _from_dicom(
    tree: Tree, layout: DicomLayout, protocol: Protocol, given: Asked, wanted: bids.Filters, *, asked: bool
) -> Cohort | None:
    return dicom_cohort.find(tree, layout, protocol, mask=given.mask, filters=wanted, asked=asked)


def _no_dicom(tree: Tree) -> NoReturn:
    raise NobodyError(f"{shown(tree.root.name or '.')} holds no DICOM file, of {counted(len(tree.files), 'file')}")


def _found_otherwise(tree: Tree, tried: Sequence[Layout]) -> tuple[Found, ...]:
    """What other protocols find where this one finds nobody."""
    found: list[Found] = []
    for other in map(protocols.load, protocols.names()):
        for layout in (one for one in tried if one.fits(other) and one.channels is None):
            found += claim(tree, layouts.reader(layout, other, tree.root, needed=False), other).found
    return tuple(found)


def _of_dataset(tree: Tree, channels: str, protocol: Protocol) -> Meanings | None:
    named = dataset_json.read(tree.root / channels).labels
    return label_meanings.understood(named, protocol, channels) if named else None


def _reader(layout: Layout, protocol: Protocol, tree: Tree) -> layouts.Reader:
    plain = layouts.reader(layout, protocol, tree.root, needed=False)
    names = (other.stem if (other := foreign(n)) else n for n in tree.files if READABLE.search(n) or foreign(n))
    needed = layout.channels is not None and any(map(plain.could_be_image, names))
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
        notes = (f"layout {claims[best].layout.name} leaves out {listed(left_out[best])}, which another layout finds",)
    return claims[best], notes


def _holds_scans(tree: Tree, found: Found) -> bool:
    names = tree.below(found.folder or "")
    return any(READABLE.search(n) for n in names) or holds_dicom(tree, names)


def _nobody(tree: Tree, protocol: Protocol, tried: Sequence[Layout]) -> str:
    flat = [n for n in tree.files if "/" not in n]
    scans = [n for n in tree.files if READABLE.search(n)]
    looked = f"{counted(len(tree.files), 'file')} in {counted(len(tree.folders), 'folder')}, {len(scans)} of them NIfTI"
    hint = ""
    inside = {n.split("/")[0] for n in tree.folders if "/" in n and n.split("/")[-1].casefold() in layouts.NOT_PATIENTS}
    if inside:
        hint = f" Give the data set's own folder: {listed(sorted(inside))}."
    elif holds_dicom(tree, flat):
        hint = " There are DICOM files: use --layout dicom, or convert them with dcm2niix."
    elif any(_begins_with_sequence(n, protocol) for n in flat):
        hint = " Names that begin with the sequence need a layout of your own with images: ['{sequence}_{patient}']."
    elif any(READABLE.search(n) for n in flat):
        hint = f" It holds {listed([n for n in flat if READABLE.search(n)])}: if it is one patient's folder, give the "
        hint += f"folder around it, and --patients {shown(tree.root.absolute().name)}."
    return (
        f"no patient found in {shown(tree.root.name or '.')} ({looked}).{hint} No name is that of a patient's "
        f"{', '.join(protocol.sequences)} in layout {', '.join(one.name for one in tried)}: choose --protocol or "
        f"--layout ({', '.join(layouts.ORDER)}, or a YAML file), or list the files in a table (--manifest)"
    )


def _begins_with_sequence(name: str, protocol: Protocol) -> bool:
    first, _, rest = name.partition("_")
    return bool(rest) and layouts.load("folder").aliases(protocol).get(first.casefold()) in protocol.sequences
