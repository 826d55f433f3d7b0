"""Which sequence a DICOM series is: a layout is a YAML file of rules on words and image types.

Words are compared without case with the series' description and the protocol's name, cut into runs of letters and
digits: ``4ch`` is one, ``long axis`` two that follow each other, ``psir*`` any that begins so.
"""

from __future__ import annotations

import fnmatch
import functools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any, NamedTuple

from monai_deepgmm import schema
from monai_deepgmm.patients.dicom.stacks import Candidate
from monai_deepgmm.patients.layout import DICOM
from monai_deepgmm.protocol import Protocol


@dataclass(frozen=True)
class Rule:
    """What a series must be like.

    Attributes:
        kind: what it then is, such as PSIR; or why it is left out.
        words: one of them is in its description or protocol name; empty: any.
        without: none of these is.
        image_type: one of its image types is among them; empty: any.
        not_image_type: none of these is.
        times: "one" image at each place, or "many", or None: either.
        looked_for: the rule holds for protocols with one of these sequences; empty: for all.
    """

    kind: str
    words: tuple[str, ...] = ()
    without: tuple[str, ...] = ()
    image_type: tuple[str, ...] = ()
    not_image_type: tuple[str, ...] = ()
    times: str | None = None
    looked_for: tuple[str, ...] = ()

    def fits(self, candidate: Candidate, parts: Sequence[str]) -> bool:
        """Whether a stack, called by these words, is so."""
        kinds = {kind.casefold() for kind in candidate.kind}
        named = not self.words or any(_holds(parts, word) for word in self.words)
        typed = not self.image_type or bool(kinds & {kind.casefold() for kind in self.image_type})
        return (
            named
            and typed
            and not any(_holds(parts, word) for word in self.without)
            and not kinds & {kind.casefold() for kind in self.not_image_type}
            and self.times in (None, "many" if candidate.times > 1 else "one")
        )


@dataclass(frozen=True)
class DicomLayout:
    """The rules of one layout, as its YAML file gives them.

    Attributes:
        name: as typed after ``--layout``.
        title: for people.
        modality: of the series that are looked at.
        left_out: what no sequence is, in this order.
        series: sequence → the kinds that it comes in, the preferred one first.
        cine: the sequences of which the first time is taken where there are several.
    """

    name: str
    title: str
    modality: tuple[str, ...]
    left_out: tuple[Rule, ...]
    series: Mapping[str, tuple[Rule, ...]]
    cine: tuple[str, ...] = ()

    def sequence(self, name: str) -> str | None:
        """A sequence as the layout writes it, whatever its case."""
        return next((s for s in self.series if s.casefold() == name.casefold()), None)


class Meaning(NamedTuple):
    """What a layout makes of a stack.

    Attributes:
        sequence: None: it is left out.
        why: the kind, or why it is left out.
        rank: of the kind among the sequence's kinds, from 0.
    """

    sequence: str | None
    why: str
    rank: int = 0


def meaning(layout: DicomLayout, candidate: Candidate, protocol: Protocol) -> Meaning:
    """The sequence that a stack is, by the first kind that fits; none where several sequences claim it."""
    if candidate.modality not in layout.modality:
        return Meaning(None, candidate.no_image or f"of modality {candidate.modality or 'unknown'}")
    parts = _parts(candidate)
    for rule in layout.left_out:
        asked = not rule.looked_for or set(rule.looked_for) & set(protocol.sequences)
        if asked and rule.fits(candidate, parts):
            return Meaning(None, rule.kind)
    found = [
        Meaning(sequence, rule.kind, rank)
        for sequence, rules in layout.series.items()
        for rank, rule in enumerate(rules)
        if rule.fits(candidate, parts)
    ]
    first = {one.sequence: one for one in reversed(found)}
    if len(first) > 1:
        names = " and ".join(s for s in layout.series if s in first)
        return Meaning(None, f"named like {names}; say which it is with --filter")
    return next(iter(first.values()), Meaning(None, "named like no sequence"))


def load(name: str | Path) -> DicomLayout | None:
    """Reads a layout by name, or from a YAML file.

    Returns:
        None where that is a layout of NIfTI files.

    Raises:
        UsageError: its file cannot be read, or has rules and does not describe a layout.
    """
    label = f"--layout {name}"
    if str(name) == DICOM:
        return _shipped()
    if not str(name).endswith((".yaml", ".yml")):
        return None
    return _read(schema.read_text(Path(name), label), Path(name).stem, label)


@functools.cache
def _shipped() -> DicomLayout | None:
    path = resources.files("monai_deepgmm.patients") / "layouts" / f"{DICOM}.yaml"
    return _read(path.read_text("utf-8"), DICOM, f"--layout {DICOM}")


def _read(text: str, title: str, label: str) -> DicomLayout | None:
    read = schema.parse_yaml(text, label)
    if not isinstance(read.content, dict) or "series" not in read.content:
        return None
    raw = schema.check(read, "dicom_layout")
    return DicomLayout(
        name=title,
        title=raw.get("title", title),
        modality=tuple(raw.get("modality") or ("MR",)),
        left_out=tuple(_rule(one, "why") for one in raw.get("left_out") or ()),
        series={s: tuple(_rule(one, "kind") for one in rules) for s, rules in raw["series"].items()},
        cine=tuple(raw.get("cine") or ()),
    )


def _rule(raw: Mapping[str, Any], kind: str) -> Rule:
    lists = ("words", "without", "image_type", "not_image_type", "looked_for")
    return Rule(kind=raw[kind], times=raw.get("times"), **{key: tuple(raw.get(key) or ()) for key in lists})


def _parts(candidate: Candidate) -> list[str]:
    """The words of description and protocol name; a gap between the two, so that no run of words spans it."""
    texts = (*candidate.descriptions, candidate.protocol)
    return [part for text in texts for part in (*_cut(text), "")]


def _cut(text: str) -> list[str]:
    return re.findall(r"[^\W_]+", text.casefold().replace("t2*", "t2star"))


def _holds(parts: Sequence[str], word: str) -> bool:
    wanted = word.casefold().split()
    starts = range(len(parts) - len(wanted) + 1)
    return any(all(fnmatch.fnmatchcase(parts[i + k], w) for k, w in enumerate(wanted)) for i in starts)
