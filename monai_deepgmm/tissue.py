"""What is known of a tissue and of where tissues can be: the parts of a protocol."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field


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

    def where_blood_is_bright(self) -> Anatomy:
        """The same without the contrast of sequences on which the inside is darker."""
        return dataclasses.replace(self, contrast={s: c for s, c in self.contrast.items() if c > 0})


@dataclass(frozen=True)
class RegionCriteria:
    """What a connected region of a tissue must show to be accepted (``region_filter.decide``).

    Attributes:
        size: the least diameter of the largest disc within it, in mm.
        score: the least sum of the weighted evidence below.
        weights: of ``size``, of ``support`` (how far the neighbouring slices hold the tissue at the same angles) and
            of ``contrast`` (how many standard deviations of the healthy rest it is brighter in ``sequence``).
        sequence: the one that shows the tissue.
        unenhanced: ``score`` in a patient in whom late enhancement shows nothing; None: as in others.
    """

    size: float
    score: float
    weights: Mapping[str, float]
    sequence: str
    unenhanced: float | None = None

    def among(self, *, enhanced: bool) -> RegionCriteria:
        """The criteria in a patient in whom late enhancement shows something, is not known, or shows nothing."""
        return self if enhanced or self.unenhanced is None else dataclasses.replace(self, score=self.unenhanced)


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
        also: sequences that show it, too: where they were measured, brightness is the average over all.
    """

    sequence: str
    brighter_than: str
    inside: str
    seed: float
    least: float
    share: float
    also: tuple[str, ...] = ()


#: A coded term of DICOM: value, scheme, meaning.
Term = tuple[str, str, str]


@dataclass(frozen=True)
class DicomCodes:
    """How a DICOM SEG calls a tissue.

    Attributes:
        category: what kind of thing it is (PS3.16 CID 7150), such as a tissue, or a morphologically abnormal structure.
        type: what it is.
        region: where in the body; None: the type says so.
    """

    category: Term
    type: Term
    region: Term | None = None


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
        dicom: what a DICOM SEG calls it; None: a tissue of that name.
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
    dicom: DicomCodes | None = None
