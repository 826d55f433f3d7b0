"""What the values of reference labels mean, by the names that stand beside them."""

from __future__ import annotations

import csv
import difflib
import io
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from monai_deepgmm.errors import UsageError
from monai_deepgmm.patients.study import Meanings, Problem
from monai_deepgmm.protocol import Protocol

#: Values by name, as somebody wrote them: name → values.
Named = Mapping[str, Sequence[int]]

#: Tissue of a protocol → other names of it; compared by ``_key``, which knows sides, spellings and blanks.
SYNONYMS: Mapping[str, tuple[str, ...]] = {
    "blood": (
        *("blood pool", "LV blood", "LV blood pool", "LV pool", "LV cavity", "cavity", "LVBP", "LVC", "BP", "lumen"),
        *("ventricular cavity", "LV lumen", "LV blood cavity", "LV endo", "LV endocardium", "endocardium", "endo"),
    ),
    "myocardium": (
        *(
            "MYO",
            "LV MYO",
            "LV myocardium",
            "LVM",
            "MLV",
            "myocard",
            "muscle",
            "heart muscle",
            "LV wall",
            "wall",
            "LV muscle",
        ),
        *(
            f"{how} {what}"
            for how in ("healthy", "normal", "viable", "remote", "LV normal", "LV healthy", "normal LV")
            for what in ("MYO", "myocardium")
        ),
    ),
    "edema": ("myocardial edema", "LV edema", "LV myocardial edema", "edematous myocardium"),
    "scar": (
        *("scars", "LV scar", "LV scars", "LV myocardial scar", "LV myocardial scars", "myocardial scar", "fibrosis"),
        *("infarct", "infarction", "MI", "myocardial infarction", "myocardial infarct", "infarcted myocardium", "LGE"),
        *("infarct core", "infarct scar", "scar tissue", "hyperenhancement", "enhancement", "no reflow", "MVO"),
        *(
            "necrosis",
            "late gadolinium enhancement",
            "microvascular obstruction",
            "permanent microvascular obstruction",
        ),
    ),
    "GM": (
        *("grey matter", "grey", "cortex", "cortical grey matter", "subcortical grey matter", "deep grey matter"),
        *("cerebral cortex", "cerebellum cortex", "cerebellar cortex", "CGM", "SGM", "DGM", "cortical GM", "deep GM"),
        *("subcortical GM", "basal ganglia", "thalamus", "thalamus proper", "caudate", "putamen", "pallidum"),
        *("hippocampus", "amygdala", "accumbens", "accumbens area", "ventral DC"),
    ),
    "WM": (
        *("white matter", "white", "cerebral white matter", "cerebellum white matter", "cerebellar white matter"),
        *("cerebral WM", "normal appearing white matter", "NAWM", "brain stem", "corpus callosum", "CC posterior"),
        *("CC mid posterior", "CC central", "CC mid anterior", "CC anterior"),
    ),
    "CSF": (
        *("cerebrospinal fluid", "cerebro spinal fluid", "spinal fluid", "fluid", "ventricle", "ventricles", "liquor"),
        *("lateral ventricle", "lateral ventricles", "inf lat vent", "inferior lateral ventricle", "3rd ventricle"),
        *("4th ventricle", "5th ventricle", "third ventricle", "fourth ventricle", "ventricular CSF", "sulcal CSF"),
        *("external CSF", "extracerebral CSF"),
    ),
    "lesion": (
        *("lesions", "MS lesion", "MS lesions", "WM lesion", "WM lesions", "white matter lesion", "WMH", "WML"),
        *("white matter lesions", "white matter hyperintensity", "white matter hyperintensities", "WM hypointensities"),
        *("WM hyperintensity", "WM hyperintensities", "hyperintensity"),
    ),
}
#: Names that mean a tissue only where no other name does: LV is the cavity beside MYO, but not beside "LV blood pool".
_WEAK: Mapping[str, tuple[str, ...]] = {"blood": ("LV",)}
#: Names of what no protocol measures: background without a word.
_ELSEWHERE = (
    *("background", "BG", "air", "none", "unlabeled", "unlabelled", "unknown", "RVC", "RVBP", "LA", "RA", "aorta"),
    *("left atrium", "right atrium", "pulmonary artery", "lung", "lungs", "liver", "skull", "bone", "soft tissue"),
    *("scalp", "skin", "fat", "eyes", "non brain", "other", "rest", "clear label", "head"),
)
_SIDES = {"left", "right", "lh", "rh", "l", "r", "the", "of", "tissue", "class", "label", "region"}
_SPELLED = {"gray": "grey", "oedema": "edema", "oedematous": "edematous"}

_INDEX = ("index", "value", "id", "intensity", "label", "number", "no")
_NAME = ("name", "tissue", "structure", "region", "label", "long_name", "labelname", "abbreviation")
_HINT = "say what each value means with --truth-labels, such as --truth-labels"
_PAIR = re.compile(r"\s*([^=:;,|\s\d][^=:;,|]*?)\s*[=:]\s*(-?\d+(?:\s*[,+]\s*-?\d+)*)\s*(?:[;,|]|(?=\s|$))")


def understood(named: Named, protocol: Protocol, source: str) -> Meanings:
    """Names as a protocol's tissues.

    A value with several names (regions that hold others) has the meaning of the region with the fewest values.

    Args:
        named: name → values.
        protocol: its tissues.
        source: where the names stand, for messages.
    """
    names: dict[int, list[tuple[int, str]]] = {}
    for name, values in named.items():
        for value in values:
            names.setdefault(value, []).append((len(values), name))
    known = _table(protocol, named)
    tissues: dict[int, int] = {}
    others: dict[int, str] = {}
    elsewhere = {0}
    for value, found in sorted(names.items()):
        found.sort()
        meant = [(size, index) for size, name in found if (index := _index(name, known)) is not None]
        if meant and value == 0:
            return _refused(f"{source} calls 0 {found[0][1]}, but 0 is the background", protocol, source)
        if meant:
            best = {index for size, index in meant if size == meant[0][0]}
            if len(best) > 1:
                both = " and ".join(repr(name) for _, name in found)
                return _refused(f"{source} calls the value {value} {both}", protocol, source)
            tissues[value] = best.pop()
        elif any(_is_elsewhere(name) for _, name in found):
            elsewhere.add(value)
        elif value != 0:
            others[value] = found[0][1]
    if not tissues:
        listed = ", ".join(str(name) for name in list(named)[:8]) or "nothing"
        return _refused(f"{source} names {listed}; none is a tissue of protocol {protocol.name}", protocol, source)
    return Meanings(tissues, others, frozenset(elsewhere), source)


def pairs(text: str, protocol: Protocol, source: str, *, strict: bool = False) -> Meanings:
    """Meanings as a person types them: ``blood=500 scar=3,4``.

    Args:
        text: names with their values, separated by blanks, commas or semicolons.
        protocol: its tissues.
        source: the option or the column, for messages.
        strict: refuse a name that is neither a tissue nor known as something else.

    Raises:
        UsageError: the text is not such a list, or a name is unknown.
    """
    named: dict[str, list[int]] = {}
    at = 0
    while at < len(text.rstrip()):
        found = _PAIR.match(text, at)
        if found is None:
            example = " ".join(f"{t.name}={t.index}" for t in protocol.tissues)
            raise UsageError(f"{source}: got {text.strip()!r}, expected names with their values, such as {example}")
        named.setdefault(found[1], []).extend(int(v) for v in re.split(r"[,+]", found[2]))
        at = found.end()
    meanings, known = understood(named, protocol, source), _table(protocol, named)
    strange = [name for name in named if _index(name, known) is None and not _is_elsewhere(name)]
    if strict and strange:
        name = strange[0]
        near = difflib.get_close_matches(name, [t.name for t in protocol.tissues], n=1, cutoff=0.5)
        hint = f"do you mean {near[0]}? " if near else ""
        listed = ", ".join(t.name for t in protocol.tissues)
        raise UsageError(f"{source}: {name!r} is no tissue of protocol {protocol.name}; {hint}tissues: {listed}")
    if meanings.problem is not None:
        raise UsageError(meanings.problem.message)
    return meanings


def table(path: Path) -> dict[str, list[int]] | None:
    """Name → values of a BIDS ``dseg.tsv``; None where it has no column of values or none of names.

    Raises:
        OSError: the file cannot be read.
    """
    content = path.read_bytes()
    encoding = "utf-16" if content[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig"
    lines = [line for line in content.decode(encoding, "replace").splitlines() if line.strip()]
    if not lines:
        return None
    separator = max("\t,;", key=lines[0].count)
    rows = list(csv.reader(io.StringIO("\n".join(lines)), delimiter=separator, skipinitialspace=True))
    header, cells = [cell.strip().casefold() for cell in rows[0]], rows[1:]
    columns = {name: [row[i].strip() if i < len(row) else "" for row in cells] for i, name in enumerate(header)}
    index = next((name for name in _INDEX if name in columns and all(map(_is_whole, columns[name]))), None)
    named = next((name for name in _NAME if name in columns and name != index), None)
    if index is None or named is None or not cells:
        return None
    found: dict[str, list[int]] = {}
    for column in dict.fromkeys((named, "abbreviation")):
        for value, name in zip(columns[index], columns.get(column, ()), strict=False):
            if name.casefold() not in ("", "n/a"):
                found.setdefault(name, []).append(int(float(value)))
    return found


def _is_whole(cell: str) -> bool:
    return re.fullmatch(r"-?\d+(\.0*)?", cell) is not None


def _table(protocol: Protocol, named: Iterable[str]) -> dict[str, int]:
    """Key of a name → index of the tissue."""
    strong: dict[str, int] = {}
    for tissue in protocol.tissues:
        for group in ((name, *others) for name, others in SYNONYMS.items()):
            if _key(tissue.name) in map(_key, group):
                strong.update({_key(other): tissue.index for other in group})
    strong |= {_key(tissue.name): tissue.index for tissue in protocol.tissues}
    present = {index for name in named if (index := _index(name, strong)) is not None}
    weak = {_key(w): t.index for t in protocol.tissues for w in _WEAK.get(t.name.casefold(), ())}
    return {word: index for word, index in weak.items() if index not in present} | strong


def _index(name: str, known: Mapping[str, int]) -> int | None:
    """The tissue that a name means, as a whole, before its brackets or in them; several words for it must agree."""
    for text in (name, re.sub(r"[(\[].*?[)\]]", " ", name), *re.findall(r"[(\[](.*?)[)\]]", name)):
        if (whole := known.get(_key(text))) is not None:
            return whole
        meant = {known.get(_key(part), 0) for part in re.split(r"[/,&+]|\band\b", text) if part.strip()}
        if len(meant) == 1 and 0 not in meant:
            return meant.pop()
    return None


def _key(name: str) -> str:
    """A name for comparing: its words without case, blanks, sides and fillers, in one spelling."""
    apart = re.sub(r"(?<=[a-z])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", " ", str(name))  # HealthyMyocardium, LVCavity
    words = [_SPELLED.get(w, w) for w in re.findall(r"[^\W_]+", apart.casefold())]
    if len(words) > 1 and words[0] == "ctx":  # FreeSurfer's parcels: ctx-lh-cuneus
        return "cortex"
    if words[:1] in (["left"], ["right"]) and words[1:2] in (["ventricle"], ["ventricular"]):
        words = [f"{words[0][0]}v", *words[2:]]
    elif words[1:] != ["atrium"]:
        words = [w for w in words if w not in _SIDES] or words
    return "".join(words)


def _is_elsewhere(name: str) -> bool:
    return _key(name).startswith("rv") or _key(name) in map(_key, _ELSEWHERE)


def _refused(message: str, protocol: Protocol, source: str) -> Meanings:
    example = " ".join(f"{t.name}={t.index}" for t in protocol.tissues)
    remedy = f"Correct {source}, or {_HINT} {example}"
    return Meanings({}, {}, frozenset(), source, Problem("E_TRUTH", message, remedy))
