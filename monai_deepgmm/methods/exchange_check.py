"""Whether late enhancement and a sequence on which blood is bright too were exchanged.

On both the wall is dark and the cavity bright, so that signatures cannot tell them apart. But scar shines on one of
them alone: there the wall is uneven, measured by the contrast between blood and wall, and even on the other.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import gaussian_filter

from monai_deepgmm.methods.border_distance import border_distance
from monai_deepgmm.methods.task import Images

#: Late enhancement's unevenness over the other sequence's is less than this only where they were exchanged. Of 25
#: patients with infarcts the least is .83, and .46 to .78 in most of them when exchanged.
LEAST_RATIO = 0.8
#: And the other is at least so uneven, as scar makes it: of 23 such patients exchanged 2 are below. In healthy hearts
#: both are even (.07 to .27), and their ratio tells nothing.
LEAST_UNEVEN = 0.25
#: Wall and blood are looked at this far from their borders, in mm, after smoothing by so much.
RIM_MM, SMOOTHING_MM = 2.0, 0.7
#: The darker third of the wall is healthy; so many voxels show a level.
HEALTHY_QUANTILE, ENOUGH = 0.33, 20


class Exchange(NamedTuple):
    """Two sequences that look exchanged.

    Attributes:
        late: that called late enhancement.
        other: that which looks like it.
        ratio: the unevenness of the wall on ``late`` over that on ``other``.
    """

    late: str
    other: str
    ratio: float


def exchanged(images: Images) -> Exchange | None:
    """The sequence that looks more like late enhancement than that which is called so; None where there is none.

    Args:
        images: the slices of a patient.
    """
    anatomy = images.protocol.anatomy
    if anatomy is None or anatomy.enhancement is None or not images.slices:
        return None
    late = anatomy.enhancement.sequence
    rivals = [s for s in images.sequences if anatomy.contrast.get(s, 0) > 0 and s != late]
    if late not in images.sequences or not rivals:
        return None
    places = _places(images)
    first, *others = (_unevenness(images, s, places) for s in (late, *rivals))
    ratios = {
        s: first / u for s, u in zip(rivals, others, strict=True) if np.isfinite([first, u]).all() and u >= LEAST_UNEVEN
    }
    if not ratios or min(ratios.values()) >= LEAST_RATIO:
        return None
    other = min(ratios, key=lambda s: ratios[s])
    return Exchange(late, other, ratios[other])


def _places(images: Images) -> list[tuple[NDArray[np.bool_], NDArray[np.bool_]]]:
    """The core of the wall and that of the cavity in each slice (H, W)."""
    organs, cavities = (m[:, 0].cpu().numpy() > 0 for m in (images.mask, images.border().inside))
    organs_deep, walls_deep, cavities_deep = (
        border_distance(place, RIM_MM + max(images.spacing_mm), images.spacing_mm) > RIM_MM
        for place in (organs, ~cavities, cavities)
    )
    return list(zip(organs & ~cavities & organs_deep & walls_deep, cavities & cavities_deep, strict=True))


def _unevenness(images: Images, sequence: str, places: list[tuple[NDArray[np.bool_], NDArray[np.bool_]]]) -> float:
    """The wall's standard deviation over the contrast of blood and healthy wall, in the middle slice; NaN: unknown."""
    spacing = np.array(images.spacing_mm)
    values = images.image[:, images.sequences.index(sequence)].cpu().numpy()
    found = []
    for image, (core, blood) in zip(values, places, strict=True):
        if min(core.sum(), blood.sum()) < ENOUGH:
            continue
        smooth = gaussian_filter(image, SMOOTHING_MM / spacing)
        contrast = float(np.median(smooth[blood]) - np.quantile(smooth[core], HEALTHY_QUANTILE))
        if contrast > 0:
            found.append(float(smooth[core].std()) / contrast)
    return float(np.median(found)) if found else float("nan")
