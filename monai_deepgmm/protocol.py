"""What to look for: which sequences, which tissues, and what each tissue looks like in each sequence.

A protocol is a YAML file. Two come with the package (``infarct`` and ``brain``); a path to any other file works too.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any, Literal

import yaml

from monai_deepgmm import mask_shape, ranges, schema
from monai_deepgmm.errors import UsageError
from monai_deepgmm.mask_shape import MaskShape
from monai_deepgmm.ranges import Range
from monai_deepgmm.tissue import Anatomy, DicomCodes, Enhancement, Hyperintense, RegionCriteria, Tissue

__all__ = ["Anatomy", "Enhancement", "Hyperintense", "Protocol", "RegionCriteria", "Tissue", "as_yaml", "load", "names"]

#: How bright a word is, in standard deviations of the intensities inside the mask.
BRIGHTNESS = {"very dark": -1.5, "dark": -0.75, "grey": 0.0, "bright": 0.75, "very bright": 1.5}


@dataclass(frozen=True)
class Protocol:
    """The sequences and tissues of one kind of examination.

    Attributes:
        name: as typed after ``--protocol``.
        title: one line for people.
        unit: ``slice`` when every slice is an image of its own, ``volume`` when the whole volume is one.
        mask: what the mask must cover, for messages.
        sequences: in order of reference; the first one present lends its grid.
        required: sequences without which a patient fails.
        crop_mm: side of the square (cube) around the mask over which intensities are z-scored; None: over the mask.
        tissues: in order of index.
        percent_name: what ``percent`` in the measurements is a percentage of.
        percent_of: the tissues that make up that denominator.
        anatomy: where tissues can be; None: anywhere in the mask.
        mask_finder: how the mask is found where none is given (``ventricle``, ``brain``); None: it must be given.
        borders: pairs of tissues that touch, so that a voxel may hold both; empty: voxels are of one tissue.
        deeper: pairs of tissues of which the first lies deeper in the mask than the second, on average; a result in
            which it does not is flagged (``W_NAMES``).
        anchored: tissues whose levels and proportions the first sequence alone defines; others only add to it. Empty:
            all sequences are fitted together.
        mask_shape: what its mask looks like; None: anything.
        plausible: what a result must lie within (``W_IMPLAUSIBLE``); empty: nothing is checked.
        method: the method where none is asked for; None: by what the protocol tells.
        settings: of that method, in place of its own defaults.
    """

    name: str
    title: str
    unit: Literal["slice", "volume"]
    mask: str
    sequences: tuple[str, ...]
    required: tuple[str, ...]
    crop_mm: float | None
    tissues: tuple[Tissue, ...]
    percent_name: str
    percent_of: tuple[str, ...]
    anatomy: Anatomy | None = None
    mask_finder: str | None = None
    borders: tuple[tuple[str, str], ...] = ()
    deeper: tuple[tuple[str, str], ...] = ()
    anchored: tuple[str, ...] = ()
    mask_shape: MaskShape | None = None
    plausible: tuple[Range, ...] = ()
    method: str | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)

    @property
    def normalisation(self) -> str:
        """A name that tells two normalisations apart; means are used only with the one they were computed with."""
        where = "mask" if self.crop_mm is None else f"crop-{self.crop_mm:g}mm"
        return f"zscore-{self.unit}-{where}"

    def tissue(self, name: str) -> Tissue:
        """The tissue of that name.

        Raises:
            KeyError: the protocol has no such tissue.
        """
        return next((t for t in self.tissues if t.name == name), None) or _no_tissue(name, self)

    def visible(self, sequences: Sequence[str]) -> tuple[Tissue, ...]:
        """The tissues that these sequences can show, in order of index."""
        return tuple(t for t in self.tissues if set(t.seen_in) & set(sequences))

    def components(self, sequences: Sequence[str]) -> tuple[Tissue, ...]:
        """Those of them that are components of a mixture."""
        return tuple(t for t in self.visible(sequences) if t.hyperintense is None)

    def merged(self, sequences: Sequence[str], *, components: bool = False) -> dict[int, int]:
        """Each tissue's index → the index it bears when only these sequences are present.

        Args:
            sequences: those that are present.
            components: whether only components of a mixture bear an index.
        """
        seen = {t.name for t in (self.components if components else self.visible)(sequences)}
        mapping = {}
        for tissue in self.tissues:
            target = tissue
            while target.name not in seen and target.merges_into is not None:
                target = self.tissue(target.merges_into)
            mapping[tissue.index] = target.index if target.name in seen else 0
        return mapping


def _no_tissue(name: str, protocol: Protocol) -> Tissue:
    raise KeyError(f"no tissue {name!r} in protocol {protocol.name}; it has {[t.name for t in protocol.tissues]}")


def names() -> list[str]:
    """The protocols that come with the package."""
    folder = resources.files("monai_deepgmm") / "protocols"
    return sorted(f.name.removesuffix(".yaml") for f in folder.iterdir() if f.name.endswith(".yaml"))


def load(name: str | Path) -> Protocol:
    """Reads a protocol by name, or from a YAML file.

    Args:
        name: one of ``names()``, or a path that ends in ``.yaml`` or ``.yml``.

    Raises:
        UsageError: no such protocol, or its file does not describe one; the message says which key.
    """
    label = f"--protocol {name}"
    if str(name).endswith((".yaml", ".yml")):
        return _from_text(schema.read_text(Path(name), label), label)
    if str(name) in names():
        return _built_in(str(name))
    near = schema.nearest(name, names())
    known = ", ".join(names())
    raise UsageError(f"--protocol: no protocol {str(name)!r}{near}; choose one of {known}, or a YAML file")


@functools.cache
def _built_in(name: str) -> Protocol:
    """One that comes with the package; every patient and page asks for it again."""
    text = (resources.files("monai_deepgmm") / "protocols" / f"{name}.yaml").read_text(encoding="utf-8")
    return _from_text(text, f"--protocol {name}")


def _from_text(text: str, label: str) -> Protocol:
    content = schema.check(schema.parse_yaml(text, label), "protocol")
    try:
        return _parse(content)
    except ValueError as error:
        raise UsageError(f"{label}: {error}") from error


def as_yaml(protocol: Protocol) -> str:
    """A protocol as a file that ``load`` reads."""
    anatomy = protocol.anatomy
    tissues = [dataclasses.asdict(t) | {"seen_in": list(t.seen_in)} for t in protocol.tissues]
    for tissue in tissues:
        tissue["evidence"] = tissue.pop("criteria")
        tissue["depth"] = None if tissue["depth"] is None else list(tissue["depth"])
    content = {
        "name": protocol.name,
        "title": protocol.title,
        "unit": protocol.unit,
        "mask": protocol.mask,
        "mask_finder": protocol.mask_finder,
        "sequences": list(protocol.sequences),
        "required": list(protocol.required),
        "normalisation": {"crop_mm": protocol.crop_mm},
        "anatomy": None
        if anatomy is None
        else dataclasses.asdict(anatomy) | {key: list(getattr(anatomy, key)) for key in ("inside", "radius", "spread")},
        "borders": [list(pair) for pair in protocol.borders],
        "deeper": [list(pair) for pair in protocol.deeper],
        "anchored": list(protocol.anchored),
        "mask_shape": None if protocol.mask_shape is None else protocol.mask_shape.as_json(),
        "plausible": [one.as_yaml() for one in protocol.plausible],
        "method": None if protocol.method is None else {"name": protocol.method, **protocol.settings},
        "tissues": tissues,
        "percent_of": {"name": protocol.percent_name, "tissues": list(protocol.percent_of)},
    }
    return yaml.safe_dump(content, sort_keys=False, allow_unicode=True)


def _parse(raw: Mapping[str, Any]) -> Protocol:
    """From content that the table has let through.

    Raises:
        ValueError: its parts do not fit together; the message says which.
    """
    sequences = tuple(raw["sequences"])
    tissues = tuple(sorted((_tissue(t, sequences) for t in raw["tissues"]), key=lambda t: t.index))
    own = [t.name for t in tissues]
    _check_names(sequences, tissues)
    _some_of("required", raw.get("required") or (), sequences)
    denominator = raw["percent_of"]
    _some_of("percent_of", denominator.get("tissues") or (), own)
    able = [t.name for t in tissues if t.hyperintense is None]
    for name, found in ((t.name, t.hyperintense) for t in tissues):
        around = () if found is None else (found.brighter_than, found.inside)
        _some_of(f"hyperintense of {name}: brighter_than and inside", around, able)
    _some_of("anchored", raw.get("anchored") or (), able)
    anatomy, settings = raw.get("anatomy"), dict(raw.get("method") or {})
    return Protocol(
        name=raw["name"],
        title=raw["title"],
        unit=raw["unit"],
        mask=raw["mask"],
        mask_finder=raw.get("mask_finder"),
        sequences=sequences,
        required=tuple(raw.get("required") or ()),
        crop_mm=raw["normalisation"]["crop_mm"],
        tissues=tissues,
        percent_name=denominator["name"],
        percent_of=tuple(denominator.get("tissues") or own),
        anatomy=None if anatomy is None else _anatomy(anatomy, raw["unit"], sequences, own),
        borders=_pairs("borders", raw.get("borders") or (), own),
        deeper=_pairs("deeper", raw.get("deeper") or (), own),
        anchored=tuple(raw.get("anchored") or ()),
        mask_shape=None if raw.get("mask_shape") is None else mask_shape.parse(raw["mask_shape"]),
        plausible=ranges.parse(raw.get("plausible") or (), own, sequences),
        method=settings.pop("name", None),
        settings=settings,
    )


def _some_of(where: str, given: Iterable[str], known: Sequence[str]) -> None:
    for name in given:
        if name not in known:
            hint = schema.nearest(name, known)
            raise ValueError(f"{where}: {name!r} is unknown{hint}; choose of {', '.join(known) or 'nothing'}")


def _check_names(sequences: Sequence[str], tissues: Sequence[Tissue]) -> None:
    """Names and indices that differ, also by case, and merges that come to an end."""
    for what, given in (
        ("tissues: indices", [t.index for t in tissues]),
        ("tissues: names", [t.name.casefold() for t in tissues]),
        ("sequences: names", [s.casefold() for s in sequences]),
    ):
        if len(set(given)) < len(given):
            raise ValueError(f"{what} must differ, also by more than case: {', '.join(map(str, given))}")
    if taken := {"patient", "mask", "truth"} & {s.casefold() for s in sequences}:
        raise ValueError(f"sequences: {min(taken)} is what a column of a manifest is called; choose another name")
    target = {t.name: t.merges_into for t in tissues}
    for tissue in tissues:
        _some_of(f"tissues: merges_into of {tissue.name}", [n for n in (tissue.merges_into,) if n], [*target])
        name, steps = tissue.merges_into, 0
        while name is not None and (steps := steps + 1) <= len(tissues):
            name = target.get(name)
        if name is not None:
            raise ValueError(f"tissues: merges_into of {tissue.name} leads round in a circle")


def _pairs(key: str, raw: Sequence[Sequence[str]], tissues: Sequence[str]) -> tuple[tuple[str, str], ...]:
    for pair in raw:
        _some_of(f"{key}: {list(pair)}", pair, tissues)
    if len({frozenset(pair) for pair in raw}) < len(raw):
        raise ValueError(f"{key}: a pair stands there twice")
    return tuple((a, b) for a, b in raw)


def _anatomy(raw: Mapping[str, Any], unit: str, sequences: tuple[str, ...], tissues: Sequence[str]) -> Anatomy:
    if unit != "slice":
        raise ValueError("anatomy: only for unit slice")
    radius, spread = raw["radius"], raw.get("spread", Anatomy.spread)
    if radius[0] >= 1:
        raise ValueError(f"anatomy: radius {radius}: expected a mean between 0 and 1, and its standard deviation")
    _some_of("anatomy: contrast", raw["contrast"], sequences)
    _some_of("anatomy: inside", raw["inside"], tissues)
    if not set(tissues) - set(raw["inside"]):
        raise ValueError("anatomy: inside: no tissue is left for what lies around it")
    late = raw.get("enhancement")
    if late is not None:
        _some_of("anatomy: enhancement", (late["sequence"],), sequences)
        _some_of("anatomy: enhancement", (late["tissue"],), tissues)
    return Anatomy(
        inside=tuple(raw["inside"]),
        contrast={s: float(w) for s, w in raw["contrast"].items()},
        radius=(float(radius[0]), float(radius[1])),
        spread=(float(spread[0]), float(spread[1])),
        enhancement=None if late is None else Enhancement(**_floats(late)),
    )


def _tissue(raw: Mapping[str, Any], sequences: tuple[str, ...]) -> Tissue:
    def level(value: str | float) -> float:
        return BRIGHTNESS[value] if isinstance(value, str) else float(value)

    name, levels = raw["name"], raw.get("level", {})
    if set(raw["signature"]) != set(sequences):
        raise ValueError(f"signature of {name}: expected a brightness for each of {', '.join(sequences)}")
    _some_of(f"level of {name}", levels, sequences)
    _some_of(f"seen_in of {name}", raw["seen_in"], sequences)
    needs, bright = raw.get("evidence"), raw.get("hyperintense")
    named = [part["sequence"] for part in (needs, bright) if part]
    also = tuple(bright.get("also", ())) if bright else ()
    _some_of(f"evidence and hyperintense of {name}", [*named, *also], sequences)
    if bright and bright["seed"] < bright["least"]:
        raise ValueError(f"hyperintense of {name}: seed {bright['seed']:g} is less than least {bright['least']:g}")
    if (depth := raw.get("depth")) and depth[1] <= 0:
        raise ValueError(f"depth of {name}: {depth}: expected a mean, and a standard deviation above 0")
    return Tissue(
        name=name,
        index=raw["index"],
        color=raw["color"],
        density_g_per_ml=raw.get("density_g_per_ml"),
        signature={sequence: level(value) for sequence, value in raw["signature"].items()},
        centrality=None if raw.get("centrality") is None else float(raw["centrality"]),
        seen_in=tuple(raw["seen_in"]),
        merges_into=raw.get("merges_into"),
        level={sequence: level(value) for sequence, value in levels.items()},
        share=float(raw.get("share", 1.0)),
        depth=None if depth is None else (float(depth[0]), float(depth[1])),
        criteria=None if needs is None else RegionCriteria(**_floats(needs | {"weights": _floats(needs["weights"])})),
        hyperintense=None if bright is None else Hyperintense(**_floats(bright | {"also": also})),
        dicom=None if raw.get("dicom") is None else DicomCodes(**{k: tuple(v) for k, v in raw["dicom"].items() if v}),
    )


def _floats(raw: Mapping[str, Any]) -> dict[str, Any]:
    return {key: float(value) if isinstance(value, int) else value for key, value in raw.items()}
