"""How the files of a cohort are named: a layout is a YAML file of patterns.

A pattern is a path below DIR, without the ending of the file's name, compared without regard to case:

========================  ==========================================================================================
``{patient}``             the patient's id (``patient:`` in the file narrows it with a regular expression)
``{sequence}``            one of the sequence's names, exactly
``{words}``               a name whose last word is a name of a sequence, of the mask or of the labels
``{channel}``             four digits, which the file under ``channels:`` translates
``*`` and ``**/``         anything within a name; any folders or none
``../``                   at the start of a pattern for reference labels (``truth``): in a folder beside DIR
========================  ==========================================================================================
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from monai_deepgmm import schema
from monai_deepgmm.errors import UsageError
from monai_deepgmm.patients import dataset_json
from monai_deepgmm.patients.directory import READABLE
from monai_deepgmm.protocol import Protocol

#: The layouts that come with the package, in the order in which they are tried.
ORDER = ("bids", "nnunet", "emidec", "myops", "folder")
#: The one for DICOM studies (``dicom_layout``), where these find nobody.
DICOM = "dicom"

#: Folders of results and of raw material: no sequence is looked for in them.
NOT_SOURCE = {"derivatives", "sourcedata"}

#: nnU-Net's own folders are no patients, casefolded.
NOT_PATIENTS = {f"{what}{part}" for what in ("images", "labels", "masks") for part in ("tr", "ts", "va", "val")}

_LINKS = {"to", "in", "on", "onto", "space", "2"}  # T2_to_T1 is a T2


@dataclass(frozen=True)
class Layout:
    """The patterns of one layout, as its YAML file gives them.

    Attributes:
        name: as typed after ``--layout``.
        title: for people.
        images: patterns of the sequences' files.
        mask: patterns of the mask's file; every value but 0 counts.
        truth: patterns of the reference labels' file.
        sequences: sequence → its names in files.
        words: "mask" and "truth" → their names, for ``{words}``.
        patient: a regular expression for the id.
        folders: which folders right below DIR must hold a patient.
        entities: names follow BIDS, whose entities tell which of several files is meant (``bids``).
        one_folder: the sequences of a patient lie in one folder; the same id in two folders is two patients.
        mask_labels: the values of the reference labels that make up the mask of a patient without a mask file.
        tissues: value in the reference labels → tissue; empty: the values are the protocol's indices.
        channels: the JSON file that names the channels.
    """

    name: str
    title: str
    images: tuple[str, ...]
    mask: tuple[str, ...] = ()
    truth: tuple[str, ...] = ()
    sequences: Mapping[str, Sequence[str]] | None = None
    words: Mapping[str, Sequence[str]] | None = None
    patient: str = "[^/]+"
    folders: str | None = None
    entities: bool = False
    one_folder: bool = False
    mask_labels: tuple[float, ...] = ()
    tissues: Mapping[int, str] | None = None
    channels: str | None = None

    def fits(self, protocol: Protocol) -> bool:
        """Whether the layout can hold sequences of the protocol, labelled in its tissues."""
        named = set(self.sequences or ()) & set(protocol.sequences)
        labelled = set((self.tissues or {}).values())
        return bool(named or self._is_open) and (not labelled or bool(labelled & {t.name for t in protocol.tissues}))

    def aliases(self, protocol: Protocol) -> dict[str, str]:
        """Each name of a sequence, casefolded → the sequence; a protocol's own names always count."""
        known = self.sequences or {}
        others = {a.casefold(): s for s, aliases in known.items() for a in (s, *aliases)}
        return others | {s.casefold(): s for s in protocol.sequences}

    def truth_labels(self, protocol: Protocol) -> dict[int, int] | None:
        """Value in the reference labels → the index of the protocol's tissue; None: the values are the indices."""
        index = {t.name: t.index for t in protocol.tissues}
        return {v: index[t] for v, t in self.tissues.items() if t in index} if self.tissues else None

    def mask_examples(self, patient: str) -> list[str]:
        """What a mask of this patient may be called."""
        word = next(iter((self.words or {}).get("mask", ())), "")
        patterns = (*self.mask, *(self.truth if self.mask_labels else ()))
        anywhere = re.compile(r"(\.\./[^/]*/|\*\*/|\*/)*")
        names = [anywhere.sub("", p, count=1) for p in patterns]
        filled = [n.replace("{words}", word).replace("{patient}", patient) for n in names]
        return [f"{name}.nii.gz" for name in dict.fromkeys(filled)]

    def names_of(self, sequence: str) -> tuple[str, ...]:
        """A sequence's names in any of the layouts that come with the package, and in this one, casefolded."""
        known = [one.sequences or {} for one in (self, *map(load, ORDER))]
        names = (sequence, *(alias for aliases in known for alias in aliases.get(sequence, ())))
        return tuple(dict.fromkeys(name.casefold() for name in names))

    def image_example(self, patient: str, sequence: str) -> str:
        """What a file of this sequence may be called; "" where its name does not tell the sequence."""
        name = self.images[0].rpartition("/")[2].replace("{patient}*", "{patient}").replace("{patient}", patient)
        called = next(iter((self.sequences or {}).get(sequence, ())), sequence)
        filled = name.replace("{words}", called).replace("{sequence}", called)
        return f"{filled}.nii.gz" if filled != name and not set("*{") & set(filled) else ""

    @property
    def _is_open(self) -> bool:
        """Whether a sequence's name stands in the file's name, so that any protocol's names can."""
        return any(p in pattern for pattern in self.images for p in ("{sequence}", "{words}", "{channel}"))


@dataclass(frozen=True)
class Reader:
    """A layout, compiled for a protocol: tells what a file is by its name.

    Attributes:
        layout: the layout.
        aliases: name, casefolded → sequence.
        channels: four digits → sequence.
        images: compiled patterns.
        mask: likewise.
        truth: likewise; those that begin with '../' come last.
        ending: of the data set's files, as the file of channels says; "": any.
    """

    layout: Layout
    aliases: Mapping[str, str]
    channels: Mapping[str, str]
    images: tuple[re.Pattern[str], ...]
    mask: tuple[re.Pattern[str], ...]
    truth: tuple[re.Pattern[str], ...]
    ending: str = ""

    def image(self, name: str) -> tuple[str, str] | None:
        """(patient, sequence) of a sequence's file, given its path below DIR."""
        if in_results(name):
            return None
        for found in _matches(self.images, name):
            groups = found.groupdict()
            if groups["patient"].casefold() in NOT_PATIENTS:
                continue
            if groups.get("sequence") is not None:
                sequence: str | None = self.aliases.get(groups["sequence"].casefold())
            elif "channel" in groups:
                sequence = self.channels.get(groups["channel"])
            elif "words" in groups:
                sequence = self.meaning(groups["words"])
                sequence = None if sequence in ("mask", "truth") else sequence
            else:
                sequence = next(iter(self.layout.sequences or ()), None)
            if sequence is not None:
                return groups["patient"], sequence
        return None

    def could_be_image(self, name: str) -> bool:
        """Whether a sequence's pattern fits the file, whatever sequence it is."""
        return next(iter(_matches(self.images, name)), None) is not None

    def labels(self, name: str) -> tuple[str, str] | None:
        """(patient, "mask" or "truth") of a file of labels, given its path below DIR."""
        for role, patterns in (("mask", self.mask), ("truth", self.truth)):
            for found in _matches(patterns, name):
                groups = found.groupdict()
                if "words" not in groups or self.meaning(groups["words"]) == role:
                    return groups["patient"], role
        return None

    def meaning(self, stem: str) -> str | None:
        """What a name's last word stands for: a sequence, "mask" or "truth"; None where the words disagree."""
        words = re.findall(r"[^\W_]+", stem.casefold())
        while len(words) > 1 and words[-1].isdigit():
            words.pop()
        roles = {str(w).casefold(): role for role, names in (self.layout.words or {}).items() for w in names}
        if not words:
            return None
        *before, last = words
        if last in roles:
            return roles[last]
        if (before and before[-1] in _LINKS) or any(w in roles for w in before):
            return None
        return self.aliases.get(last)


def in_results(name: str) -> bool:
    """Whether a path below DIR lies in a folder of results or of raw material, where no sequence is looked for."""
    return bool(NOT_SOURCE & {part.casefold() for part in name.split("/")[:-1]})


def load(name: str | Path) -> Layout:
    """Reads a layout by name, or from a YAML file.

    Raises:
        UsageError: no such layout, or its file does not describe one; the message says what is wrong.
    """
    label = f"--layout {name}"
    if str(name).endswith((".yaml", ".yml")):
        return _from_text(schema.read_text(Path(name), label), Path(name).stem, label)
    if str(name) in ORDER:
        return _built_in(str(name))
    near, known = schema.nearest(name, (*ORDER, DICOM)), ", ".join((*ORDER, DICOM))
    raise UsageError(f"--layout: no layout {str(name)!r}{near}; choose one of {known}, or a YAML file")


@functools.cache
def _built_in(name: str) -> Layout:
    text = (resources.files("monai_deepgmm.patients") / "layouts" / f"{name}.yaml").read_text("utf-8")
    return _from_text(text, name, f"--layout {name}")


def _from_text(text: str, title: str, label: str) -> Layout:
    content = schema.check(schema.parse_yaml(text, label), "layout")
    try:
        return _parse(title, content)
    except ValueError as error:
        raise UsageError(f"{label}: {error}") from error


def reader(layout: Layout, protocol: Protocol, root: Path, *, needed: bool) -> Reader:
    """Compiles a layout for a protocol.

    Args:
        layout: the layout.
        protocol: lends the sequences.
        root: the folder that holds the file of channels.
        needed: there are files that only the channels can explain.

    Raises:
        UsageError: the file of channels is missing, damaged, or names no sequence of the protocol.
    """
    aliases = layout.aliases(protocol)

    def compiled(patterns: Iterable[str]) -> tuple[re.Pattern[str], ...]:
        return tuple(_compile(p, layout.patient, aliases) for p in patterns)

    truth = compiled(sorted(layout.truth, key=lambda p: p.startswith("../")))
    plain = Reader(layout, aliases, {}, compiled(layout.images), compiled(layout.mask), truth)
    if layout.channels is None or not needed:
        return plain
    stated = dataset_json.read(root / layout.channels)
    names = stated.channels
    channels = {f"{int(k):04d}": plain.meaning(v) for k, v in names.items()}
    known = {k: s for k, s in channels.items() if s in protocol.sequences and s is not None}
    if not known:
        raise UsageError(
            f"{layout.channels}: channel_names are {', '.join(names.values()) or 'empty'}, none of which is a sequence "
            f"of protocol {protocol.name}: use {', '.join(protocol.sequences)}"
        )
    return Reader(layout, aliases, known, plain.images, plain.mask, plain.truth, stated.ending)


def _parse(name: str, raw: Mapping[str, Any]) -> Layout:
    patterns = {key: tuple(raw.get(key) or ()) for key in ("images", "mask", "truth")}
    if not patterns["images"]:
        raise ValueError("images: expected at least one pattern")
    for pattern in (p for group in patterns.values() for p in group):
        if "{patient}" not in pattern:
            raise ValueError(f"pattern {pattern!r} lacks {{patient}}")
        if pattern.count("**/") > 2 or any(part.count("*") + part.count("{words}") > 2 for part in pattern.split("/")):
            raise ValueError(f"pattern {pattern!r}: expected at most two **/, and two * in a name")
        _compile(pattern, raw.get("patient", "[^/]+"), {})
    given: dict[str, Any] = {"title": name, **raw, **patterns}
    given["mask_labels"] = tuple(float(v) for v in raw.get("mask_labels") or ())
    if raw.get("tissues"):
        given["tissues"] = {int(value): tissue for value, tissue in raw["tissues"].items()}
    return Layout(name=name, **given)


def _compile(pattern: str, patient: str, aliases: Iterable[str]) -> re.Pattern[str]:
    longest_first = sorted(aliases, key=lambda a: (-len(a), a))
    meaning = {
        "**/": "(?:[^/]+/)*",
        "*": "[^/]*",
        "{patient}": f"(?P<patient>{patient})",
        "{sequence}": f"(?P<sequence>{'|'.join(map(re.escape, longest_first))})",
        "{words}": "(?P<words>[^/]+)",
        "{channel}": r"(?P<channel>\d{4})",
    }
    parts, seen = [], set()
    for part in re.split(r"(\*\*/|\*|\{[^}]*\})", pattern):
        if part.startswith("{") and part not in meaning:
            raise ValueError(
                f"pattern {pattern!r}: unknown {part}; use {{patient}}, {{sequence}}, {{words}}, {{channel}}"
            )
        repeated = part in seen and part.startswith("{")
        parts.append(f"(?P={part[1:-1]})" if repeated else meaning.get(part, re.escape(part)))
        seen.add(part)
    return re.compile("".join(parts), re.IGNORECASE | re.DOTALL)


def _matches(patterns: Sequence[re.Pattern[str]], name: str) -> Iterable[re.Match[str]]:
    """Matches of the whole path, less the ending that makes it NIfTI."""
    stem = READABLE.sub("", name)
    return (found for pattern in patterns if (found := pattern.fullmatch(stem)))
