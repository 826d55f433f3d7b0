"""What every method is given, and what every method is: settings with a ``solve``."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, ClassVar, NamedTuple, Protocol, Self

from torch import Tensor

from monai_deepgmm import protocol as protocols
from monai_deepgmm.methods import endocardium, enhancement
from monai_deepgmm.methods.endocardium import Ring
from monai_deepgmm.methods.enhancement import Enhancement
from monai_deepgmm.mixture.fit import Fit
from monai_deepgmm.protocol import Tissue


class Images(NamedTuple):
    """A patient's images, and what is known of them before any fit.

    Attributes:
        image: ``(B, M, *S)``.
        mask: ``(B, 1, *S)``.
        expected: where each tissue is expected ``(B, K, *S)``: the start.
        protocol: what is looked for.
        tissues: the K tissues of it that the sequences show.
        sequences: the M sequences.
        spacing_mm: of the axes in ``*S``.
        slices: the position of each image along the stack; empty for a volume.
        means: μ_data ``(K, M)``, from which the start was made, or None.
        zero: where no signal lies on the image's scale ``(B, M)``; needed for a bias field.
        ring: the wall's borders, where the method or the region filter needs them.
        enhancement: what late enhancement shows in the wall, likewise.
        seed: of every random draw.
        measured: where each sequence was ``(B, M, *S)``; None: everywhere inside the mask.
        organ: the whole organ ``(B, 1, *S)`` where the mask is only what of it was measured; the borders are its own.
    """

    image: Tensor
    mask: Tensor
    expected: Tensor
    protocol: protocols.Protocol
    tissues: tuple[Tissue, ...]
    sequences: tuple[str, ...]
    spacing_mm: tuple[float, ...]
    slices: tuple[int, ...] = ()
    means: Tensor | None = None
    zero: Tensor | None = None
    ring: Ring | None = None
    enhancement: Enhancement | None = None
    seed: int = 0
    measured: Tensor | None = None
    organ: Tensor | None = None

    def anatomy(self) -> protocols.Anatomy:
        """Where the protocol's tissues can be.

        Raises:
            ValueError: the protocol does not say.
        """
        if self.protocol.anatomy is None:
            raise ValueError(f"protocol {self.protocol.name} has no anatomy")
        return self.protocol.anatomy

    def border(self) -> Ring:
        """The wall's borders: ``ring``, or found now."""
        return self._wall()[0] if self.ring is None else self.ring

    @property
    def whole(self) -> Tensor:
        """The whole organ ``(B, 1, *S)``."""
        return self.mask if self.organ is None else self.organ

    def variants(self, protocols: Sequence[protocols.Protocol]) -> list[Self]:
        """The same task for other protocols, which differ from this one in levels and in the usual inner border.

        The wall's borders are found at once, where the protocols have an anatomy.
        """
        made = [
            self._replace(
                protocol=p, tissues=tuple(p.tissue(t.name) for t in self.tissues), ring=None, enhancement=None
            )
            for p in protocols
        ]
        if self.protocol.anatomy is None or not made:
            return made
        walls = self._walls([v.anatomy() for v in made])
        return [v._replace(ring=ring, enhancement=late) for v, (ring, late) in zip(made, walls, strict=True)]

    def with_wall(self) -> Self:
        """The same, with the wall's borders and enhancement, found once for all; itself where there is no anatomy."""
        if self.protocol.anatomy is None:
            return self
        ring, late = self._wall()
        return self._replace(ring=ring, enhancement=late)

    def enhanced(self) -> Enhancement | None:
        """What late enhancement shows in the wall of this patient: ``enhancement``, or measured now.

        None where no sequence shows it, where the wall cannot have the tissue, and where the images are no stack of one
        patient.
        """
        return self.enhancement or self._wall()[1]

    def _wall(self) -> tuple[Ring, Enhancement | None]:
        """The borders and the enhancement between them: what is known of them, the rest found now."""
        if self.ring is None:
            return self._walls([self.anatomy()])[0]
        return self.ring, self.enhancement or self._enhanced([self.ring])[0]

    def _walls(self, anatomies: Sequence[protocols.Anatomy]) -> list[tuple[Ring, Enhancement | None]]:
        """The wall's borders as each anatomy would have them, and what late enhancement shows between them.

        They are sought first without the sequences on which blood is dark, since blood that flows slowly along the wall
        shines there as edema does. Where late enhancement shows no scar in that wall, and its evidence speaks against
        any, there is no edema to look for either, and it is taken; else all sequences have their say.
        """
        if self._shows_enhancement() and any(anatomies[0].contrast.get(s, 0) < 0 for s in self.sequences):
            walls = self._measured([a.where_blood_is_bright() for a in anatomies])
            late = walls[0][1]
            if late is not None and not late.present and late.found < 0:
                return walls
        return self._measured(anatomies)

    def _measured(self, anatomies: Sequence[protocols.Anatomy]) -> list[tuple[Ring, Enhancement | None]]:
        """Borders from all sequences of each anatomy's contrast, and the enhancement between them."""
        rings = endocardium.rings(
            self.image, self.whole, anatomies, self.sequences, self.spacing_mm, slices=self.slices
        )
        if self.organ is not None:
            rings = [ring._replace(inside=ring.inside * self.mask) for ring in rings]
        return list(zip(rings, self._enhanced(rings), strict=True))

    def _shows_enhancement(self) -> bool:
        """Whether late enhancement can be measured: in a stack of one patient, of a tissue that it shows."""
        late = self.anatomy().enhancement
        known = late is not None and late.sequence in self.sequences and late.tissue in [t.name for t in self.tissues]
        return known and len(self.slices) > 0

    def _enhanced(self, rings: Sequence[Ring]) -> list[Enhancement | None]:
        """What late enhancement shows between each of some borders."""
        late = self.anatomy().enhancement
        if late is None or not self._shows_enhancement():
            return [None] * len(rings)
        return enhancement.measure(
            self.image[:, self.sequences.index(late.sequence)].float().cpu().numpy(),
            self.mask[:, 0].cpu().numpy() > 0,
            [ring.inside[:, 0].cpu().numpy() > 0 for ring in rings],
            self.spacing_mm,
            slices=self.slices,
            threshold=late.evidence,
        )

    def from_zero(self) -> Tensor:
        """The image on the scale that a bias field needs: where 0 is no signal."""
        if self.zero is None:
            return self.image
        return self.image - self.zero.to(self.image).reshape(*self.zero.shape, *[1] * (self.image.ndim - 2))

    def to_zero(self, fit: Fit) -> Fit:
        """A fit to ``from_zero`` on the image's own scale again; its means are those of a voxel whose field is 1."""
        zero = 0 if self.zero is None else self.zero.to(fit.mixture.means)[:, None]
        return fit._replace(mixture=fit.mixture._replace(means=fit.mixture.means + zero))


class MethodConfig(Protocol):
    """One method's settings, a frozen dataclass.

    Attributes:
        name: as typed after ``--method``.
        named: whether its components are in the order of the tissues, so that nothing is named afterwards.
        takes_means: whether known class means help it.
        surroundings: whether it looks at what surrounds the mask.
        walled: whether it may ask for the wall's borders.
    """

    name: ClassVar[str]
    named: ClassVar[bool]
    takes_means: ClassVar[bool]
    surroundings: ClassVar[bool]
    walled: ClassVar[bool]
    __dataclass_fields__: ClassVar[dict[str, dataclasses.Field[Any]]]

    @property
    def presence(self) -> bool | None:
        """Whether a tissue's regions must meet the protocol's criteria (``region_filter``)."""

    def resolved(self, protocol: protocols.Protocol) -> Self:
        """The settings with the protocol's own defaults in place of None.

        Raises:
            UsageError: the protocol lacks what the method needs.
        """

    def solve(self, images: Images, *, device: str = "cpu") -> Fit:
        """Fits the mixture to each image.

        Args:
            images: the images and where each fit begins.
            device: where a network is to run.
        """
