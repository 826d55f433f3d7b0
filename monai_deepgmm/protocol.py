"""What to look for: which sequences, which tissues, and what each tissue looks like in each sequence.

A protocol is a YAML file. Two come with the package (``infarct`` and ``brain``); a path to any other file works too.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any, Literal

import yaml

from monai_deepgmm.errors import UsageError

#: How bright a word is, in standard deviations of the intensities inside the mask.
BRIGHTNESS = {"very dark": -1.5, "dark": -0.75, "grey": 0.0, "bright": 0.75, "very bright": 1.5}


@dataclass(frozen=True)
class Enhancement:
    """A sequence on which the healthy wall is dark and blood bright, and the tissue of the wall that shines there.

    Attributes:
        sequence: that one.
        tissue: that one.
        evidence: a patient has the tissue when a twentieth of the wall has at least this local log-likelihood ratio
            (``enhancement.measure``).
    """

    sequence: str
    tissue: str
    evidence: float


@dataclass(frozen=True)
class Anatomy:
    """Where tissues can be, as far as the mask's shape tells: an inner border inside the mask, which is the outer one.

    Attributes:
        inside: the tissues within the inner border; all others lie between the two.
        contrast: sequence → how much brighter the inside is, as a log-likelihood ratio per standard deviation in the
            mask; only the sequences that help.
        radius: of the inner border, as a share of the outer one: its mean, and its standard deviation at an angle.
        spread: the standard deviations of its mean radius between patients, and between the slices of one.
        enhancement: what late enhancement shows; None: no sequence does.
    """

    inside: tuple[str, ...]
    contrast: Mapping[str, float]
    radius: tuple[float, float]
    spread: tuple[float, float] = (0.06, 0.05)
    enhancement: Enhancement | None = None


@dataclass(frozen=True)
class RegionCriteria:
    """What a connected region of a tissue must show to be accepted (``region_filter.decide``).

    Attributes:
        size: the least diameter of the largest disc within it, in mm.
        score: the least sum of the weighted evidence below.
        weights: of ``size``, of ``support`` (how far the neighbouring slices hold the tissue at the same angles) and
            of ``contrast`` (how many standard deviations of the healthy rest it is brighter in ``sequence``).
        sequence: the one that shows the tissue.
    """

    size: float
    score: float
    weights: Mapping[str, float]
    sequence: str


@dataclass(frozen=True)
class Hyperintense:
    """A tissue that is no part of a mixture but whatever is too bright for the others, and lies within one of them.

    Brightness is in robust standard deviations of ``brighter_than`` above its median (``methods.hyperintense``).

    Attributes:
        sequence: the one that shows it.
        brighter_than: the brightest of the other tissues there.
        inside: the tissue that surrounds it.
        seed: how bright a region is somewhere.
        least: how bright all of it is.
        share: of the surrounding voxels of both tissues, at least so many are of ``inside``.
    """

    sequence: str
    brighter_than: str
    inside: str
    seed: float
    least: float
    share: float


@dataclass(frozen=True)
class Tissue:
    """One tissue of a protocol.

    Attributes:
        name: as written into tables and sidecars.
        index: the label value in the written NIfTI, 1 to 255.
        color: ``#rrggbb``.
        density_g_per_ml: for the mass; None where the protocol gives none.
        signature: sequence → expected brightness, in standard deviations from the mean inside the mask.
        centrality: expected mean relative depth, 0 at the mask's border and 1 at its deepest point; None where the
            place tells nothing.
        seen_in: the sequences that show this tissue; one of them must be present.
        merges_into: the tissue that takes its voxels where it cannot be seen.
        level: sequence → how bright the tissue is among those that share its place, in standard deviations from their
            median; what an anatomical mixture expects of its mean.
        share: of the voxels of that place, as expected.
        depth: mean and standard deviation of its relative depth in the mask, 0 at the border and 1 at the deepest
            point; where an anatomical mixture looks for it. None: anywhere in its place.
        criteria: what its regions must show (``evidence`` in YAML); None: the tissue is always there.
        hyperintense: how it is found beside the mixture; None: it is a component of the mixture.
    """

    name: str
    index: int
    color: str
    density_g_per_ml: float | None
    signature: Mapping[str, float]
    centrality: float | None
    seen_in: tuple[str, ...]
    merges_into: str | None
    level: Mapping[str, float] = field(default_factory=dict)
    share: float = 1.0
    depth: tuple[float, float] | None = None
    criteria: RegionCriteria | None = None
    hyperintense: Hyperintense | None = None


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
        borders: pairs of tissues that touch, so that a voxel may hold both; empty: voxels are of one tissue.
        deeper: pairs of tissues of which the first lies deeper in the mask than the second, on average; a result in
            which it does not is flagged (``W_NAMES``).
        anchored: tissues whose levels and proportions the first sequence alone defines; others only add to it. Empty:
            all sequences are fitted together.
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
    borders: tuple[tuple[str, str], ...] = ()
    deeper: tuple[tuple[str, str], ...] = ()
    anchored: tuple[str, ...] = ()
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
    if str(name).endswith((".yaml", ".yml")):
        path = Path(name)
        if not path.is_file():
            raise UsageError(f"--protocol: there is no file {name}")
        text = path.read_text(encoding="utf-8")
    elif str(name) in names():
        text = (resources.files("monai_deepgmm") / "protocols" / f"{name}.yaml").read_text(encoding="utf-8")
    else:
        raise UsageError(f"--protocol: no protocol {str(name)!r}; choose one of {', '.join(names())}, or a YAML file")
    try:
        return _parse(yaml.safe_load(text))
    except (KeyError, TypeError, ValueError, AttributeError, yaml.YAMLError) as error:
        raise UsageError(f"--protocol {name}: {error!s} is missing or wrong") from error


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
        "sequences": list(protocol.sequences),
        "required": list(protocol.required),
        "normalisation": {"crop_mm": protocol.crop_mm},
        "anatomy": None
        if anatomy is None
        else dataclasses.asdict(anatomy) | {key: list(getattr(anatomy, key)) for key in ("inside", "radius", "spread")},
        "borders": [list(pair) for pair in protocol.borders],
        "deeper": [list(pair) for pair in protocol.deeper],
        "anchored": list(protocol.anchored),
        "method": None if protocol.method is None else {"name": protocol.method, **protocol.settings},
        "tissues": tissues,
        "percent_of": {"name": protocol.percent_name, "tissues": list(protocol.percent_of)},
    }
    return yaml.safe_dump(content, sort_keys=False, allow_unicode=True)


def _parse(raw: Mapping[str, Any]) -> Protocol:
    sequences = tuple(raw["sequences"])
    tissues = tuple(sorted((_tissue(t, sequences) for t in raw["tissues"]), key=lambda t: t.index))
    if len({t.index for t in tissues}) < len(tissues) or not all(1 <= t.index <= 255 for t in tissues):
        raise ValueError("tissues: indices must differ and lie in 1-255: one of them")
    if raw["unit"] not in ("slice", "volume"):
        raise ValueError(f"unit: {raw['unit']!r} (choose slice or volume)")
    denominator = raw["percent_of"]
    settings = dict(raw.get("method") or {})
    anatomy = (
        None
        if raw.get("anatomy") is None
        else _anatomy(raw["anatomy"], raw["unit"], sequences, [t.name for t in tissues])
    )
    return Protocol(
        name=raw["name"],
        title=raw["title"],
        unit=raw["unit"],
        mask=raw["mask"],
        sequences=sequences,
        required=tuple(raw.get("required", ())),
        crop_mm=raw["normalisation"]["crop_mm"],
        tissues=tissues,
        percent_name=denominator["name"],
        percent_of=tuple(denominator.get("tissues") or (t.name for t in tissues)),
        anatomy=anatomy,
        borders=_pairs("borders", raw.get("borders") or (), [t.name for t in tissues]),
        deeper=_pairs("deeper", raw.get("deeper") or (), [t.name for t in tissues]),
        anchored=_anchored(raw.get("anchored") or (), tissues),
        method=settings.pop("name", None),
        settings=settings,
    )


def _anchored(raw: Sequence[str], tissues: Sequence[Tissue]) -> tuple[str, ...]:
    able = [t.name for t in tissues if t.hyperintense is None]
    for tissue in tissues:
        if tissue.hyperintense and {tissue.hyperintense.brighter_than, tissue.hyperintense.inside} - set(able):
            raise ValueError(f"hyperintense of {tissue.name}: brighter_than and inside (two of {', '.join(able)})")
    if isinstance(raw, str) or set(raw) - set(able):
        raise ValueError(f"anchored: {raw!r} (some of {', '.join(able)})")
    return tuple(raw)


def _pairs(key: str, raw: Sequence[Sequence[str]], tissues: Sequence[str]) -> tuple[tuple[str, str], ...]:
    for pair in raw:
        if isinstance(pair, str) or len(pair) != 2 or len(set(pair)) != 2 or set(pair) - set(tissues):
            raise ValueError(f"{key}: {pair!r} (two of {', '.join(tissues)})")
    if len({frozenset(pair) for pair in raw}) < len(raw):
        raise ValueError(f"{key}: each pair once: one of them")
    return tuple((str(a), str(b)) for a, b in raw)


def _anatomy(raw: Mapping[str, Any], unit: str, sequences: tuple[str, ...], tissues: Sequence[str]) -> Anatomy:
    if unit != "slice":
        raise ValueError("anatomy: only for unit slice; it")
    mean, sd = (float(v) for v in raw["radius"])
    if not (0 < mean < 1 and sd > 0):
        raise ValueError(f"anatomy: radius {raw['radius']} (a mean between 0 and 1, and its standard deviation)")
    between, within = (float(v) for v in raw.get("spread", Anatomy.spread))
    if not (between > 0 and within > 0):
        raise ValueError(f"anatomy: spread {raw['spread']} (two standard deviations)")
    if strangers := (set(raw["contrast"]) - set(sequences)) | (set(raw["inside"]) - set(tissues)):
        raise ValueError(f"anatomy: {', '.join(sorted(strangers))}")
    late = raw.get("enhancement")
    return Anatomy(
        inside=tuple(raw["inside"]),
        contrast={s: float(w) for s, w in raw["contrast"].items()},
        radius=(mean, sd),
        spread=(between, within),
        enhancement=None if late is None else _enhancement(late, sequences, tissues),
    )


def _enhancement(raw: Mapping[str, Any], sequences: tuple[str, ...], tissues: Sequence[str]) -> Enhancement:
    found = Enhancement(raw["sequence"], raw["tissue"], float(raw["evidence"]))
    if found.sequence not in sequences or found.tissue not in tissues:
        raise ValueError("anatomy: enhancement's sequence or tissue")
    return found


def _evidence(raw: Mapping[str, Any], sequences: tuple[str, ...]) -> RegionCriteria:
    if raw["sequence"] not in sequences or set(raw["weights"]) - {"size", "support", "contrast", "evidence"}:
        raise ValueError("evidence: its sequence or its weights")
    weights = {name: float(weight) for name, weight in raw["weights"].items()}
    return RegionCriteria(float(raw["size"]), float(raw["score"]), weights, raw["sequence"])


def _hyperintense(raw: Mapping[str, Any], sequences: tuple[str, ...]) -> Hyperintense:
    seed, least, share = (float(raw[key]) for key in ("seed", "least", "share"))
    if raw["sequence"] not in sequences or not (seed >= least and 0 <= share <= 1):
        raise ValueError(f"hyperintense: a sequence of {', '.join(sequences)}, seed ≥ least, a share from 0 to 1: it")
    return Hyperintense(raw["sequence"], raw["brighter_than"], raw["inside"], seed, least, share)


def _depth(name: str, raw: Sequence[float]) -> tuple[float, float]:
    mean, deviation = (float(value) for value in raw)
    if not (0 <= mean <= 1 and 0 < deviation < math.inf):
        raise ValueError(f"depth of {name}: {raw} (a mean from 0 to 1, and its standard deviation)")
    return mean, deviation


def _tissue(raw: Mapping[str, Any], sequences: tuple[str, ...]) -> Tissue:
    def level(value: str | float) -> float:
        return BRIGHTNESS[value] if isinstance(value, str) else float(value)

    signature = {sequence: level(value) for sequence, value in raw["signature"].items()}
    if set(signature) != set(sequences):
        raise ValueError(f"signature of {raw['name']} for each of {', '.join(sequences)}")
    levels = {sequence: level(value) for sequence, value in raw.get("level", {}).items()}
    if set(levels) - set(sequences) or not all(map(math.isfinite, levels.values())):
        raise ValueError(f"level of {raw['name']}: a number for some of {', '.join(sequences)}")
    share = float(raw.get("share", 1.0))
    if not 0 < share < math.inf:
        raise ValueError(f"share of {raw['name']}: above 0")
    return Tissue(
        name=raw["name"],
        index=int(raw["index"]),
        color=raw["color"],
        density_g_per_ml=raw.get("density_g_per_ml"),
        signature=signature,
        centrality=None if raw.get("centrality") is None else float(raw["centrality"]),
        seen_in=tuple(raw["seen_in"]),
        merges_into=raw.get("merges_into"),
        level=levels,
        share=share,
        depth=None if raw.get("depth") is None else _depth(raw["name"], raw["depth"]),
        criteria=None if raw.get("evidence") is None else _evidence(raw["evidence"], sequences),
        hyperintense=None if raw.get("hyperintense") is None else _hyperintense(raw["hyperintense"], sequences),
    )
