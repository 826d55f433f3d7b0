"""From a prepared patient to what a method is given, and from its fit back to every image of the patient."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from monai_deepgmm.errors import StudyError
from monai_deepgmm.images.cropping import Crops
from monai_deepgmm.images.loading import Scan
from monai_deepgmm.images.mask import MIN_VOXELS_PER_TISSUE
from monai_deepgmm.images.preparation import Prepared
from monai_deepgmm.methods import naming
from monai_deepgmm.methods.config import Config
from monai_deepgmm.methods.task import Images
from monai_deepgmm.mixture import starts
from monai_deepgmm.mixture.fit import Fit
from monai_deepgmm.mixture.gaussian import Mixture, e_step
from monai_deepgmm.protocol import Protocol


class Assembly(NamedTuple):
    """A patient's images, and which of them are large enough for a fit.

    Attributes:
        images: those that are, with what is known of them.
        large: their indices.
        image: all ``(B, M, *S)``.
        mask: all ``(B, 1, *S)``.
        variants: the images with other protocols, which differ in levels and in the usual inner border.
    """

    images: Images
    large: Tensor
    image: Tensor
    mask: Tensor
    variants: tuple[Images, ...] = ()

    @property
    def small(self) -> list[int]:
        """The indices of the images without a fit of their own."""
        return sorted(set(range(len(self.image))) - set(self.large.tolist()))

    def everywhere(self, fit: Fit) -> Tensor:
        """Responsibilities of every image: its own fit's, or for a small one by the mixture of the nearest large one.

        Args:
            fit: of the large images.

        Returns:
            ``(B, K, *S)``.
        """
        if len(self.large) == len(self.image):  # a head is not worth copying
            return fit.resp
        resp = fit.resp.new_zeros((len(self.image), *fit.resp.shape[1:]))
        resp[self.large] = fit.resp
        for index in self.small:
            near = int((self.large - index).abs().argmin())
            weights = fit.resp[near].flatten(1).mean(1)
            means, covariances = fit.mixture.means[near][None], fit.mixture.covariances[near][None]
            borrowed = Mixture((weights / weights.sum())[None], means, covariances)
            resp[index] = e_step(self.image[index][None], self.mask[index][None], borrowed)[0]
        return resp


def assemble(
    prepared: Prepared, config: Config, *, wall: Images | None = None, variants: Sequence[Protocol] = ()
) -> Assembly:
    """What the configuration's method is given of a patient.

    Args:
        prepared: the patient, or a part of it.
        config: the method, the protocol, the means.
        wall: the whole patient, with the wall's borders and enhancement where they are known already.
        variants: other protocols under which the images are wanted, too.

    Raises:
        StudyError: ``E_MASK_SMALL``, no image has enough voxels for a fit; ``E_MODEL`` or ``E_MEANS``, the network or
            the means need sequences that the patient lacks.
    """
    crops = prepared.crops
    sequences = _sequences(prepared.scan, config)
    regions = getattr(config.method, "finds_regions", False)
    tissues = (config.protocol.visible if regions else config.protocol.components)(sequences)
    channels = [prepared.scan.sequences.index(s) for s in sequences]
    every = channels == list(range(len(prepared.scan.sequences)))  # a head is not worth copying
    image, usable, zero = (
        values if every else values[:, channels] for values in (crops.image, crops.measured, crops.zero)
    )
    image, organ, usable = (values.to(config.device) for values in (image, crops.mask, usable))
    known = _known(crops, channels)
    mask = organ if known is None else organ * known.to(organ)
    means = None if config.means is None else config.means.tensor(tissues, sequences)
    if means is None:
        # In slices of a small organ the signatures were chosen with everything inside the mask.
        seen = None if crops.slices else usable
        expected = naming.signature_map(image, organ, tissues, sequences, crops.spacing_mm, measured=seen)
        expected = expected if known is None else expected * mask
    else:
        expected = starts.means_start(image, mask, means)
    large = _large(mask, len(tissues), config)
    chosen = slice(None) if len(large) == len(image) else large  # a volume is not worth copying
    images = Images(
        image[chosen],
        mask[chosen],
        expected[chosen],
        config.protocol,
        tissues,
        sequences,
        crops.spacing_mm,
        tuple(crops.slices[int(i)] for i in large) if crops.slices else (),
        means,
        zero[chosen],
        seed=config.seed,
        measured=usable[chosen],
        organ=None if known is None else organ[chosen],
    )
    if wall is None and images.slices and (config.presence or config.method.walled):
        images, *others = images.variants([images.protocol, *variants])  # the borders of all are found at once
    else:
        others = images.variants(variants)
        images = images if wall is None else _with_wall_of(images, wall)
    return Assembly(images, large, image, mask, tuple(others))


def _with_wall_of(images: Images, whole: Images) -> Images:
    """The images with what is known of the wall in the same slices of the whole patient."""
    index = [whole.slices.index(s) for s in images.slices]
    ring, late = whole.ring, whole.enhancement
    if ring is not None:
        inside = ring.inside[index] * images.mask
        ring = ring._replace(inside=inside, angle=ring.angle[index], outer=ring.outer[index], inner=ring.inner[index])
    if late is not None:
        late = late._replace(fraction=late.fraction[index], evidence=late.evidence[index], inner=late.inner[index])
    return images._replace(ring=ring, enhancement=late)


def _sequences(scan: Scan, config: Config) -> tuple[str, ...]:
    """The sequences that are looked at: all, or those that the trained network knows.

    Raises:
        StudyError: ``E_MODEL``, the network needs one that the patient lacks.
    """
    if config.model is None:
        return scan.sequences
    spec = config.model.spec
    known = tuple(s for s in spec.sequences if s in scan.sequences)
    absent = [s for s in spec.sequences if s not in known]
    if not known or (absent and not spec.training.incomplete):
        message = f"the network was trained with {', '.join(absent)}, which this patient lacks"
        raise StudyError("E_MODEL", message, "Segment this patient with a method that needs no trained network")
    return known


def _known(crops: Crops, channels: list[int]) -> Tensor | None:
    """Where all sequences were measured in slices ``(B, 1, *S)``; None: everywhere, or the fit marginalises."""
    if crops.seen is None or not crops.slices:
        return None
    known = crops.seen[:, channels].all(1, keepdim=True)
    return None if bool((known | (crops.mask == 0)).all()) else known


def _large(mask: Tensor, tissues: int, config: Config) -> Tensor:
    """The indices of the images with enough voxels for a fit; a trained network needs no voxels to learn from."""
    mask = mask.cpu()
    if config.model is not None:
        return torch.arange(len(mask))
    needed = MIN_VOXELS_PER_TISSUE * tissues
    large = torch.nonzero(mask.flatten(1).sum(1) >= needed).flatten()
    if len(large) == 0:
        message = f"no {config.protocol.unit} of the mask has the {needed} voxels that a fit needs"
        raise StudyError("E_MASK_SMALL", message, f"Check that the mask covers the {config.protocol.mask}")
    return large
