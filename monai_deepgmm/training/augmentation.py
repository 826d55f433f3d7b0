"""The paper's augmentations, and what windows and missing sequences add to them, as MONAI's transforms."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from monai.transforms import (
    CenterSpatialCropd,
    Compose,
    Rand2DElasticd,
    Rand3DElasticd,
    RandAffined,
    RandAxisFlipd,
    RandGaussianNoised,
    Randomizable,
    RandomizableTransform,
    Transform,
)
from torch import Tensor

from monai_deepgmm.mixture import bounding_box
from monai_deepgmm.networks.sizes import CONTEXT

Example = dict[str, Tensor]
#: What an example holds where it is asked for.
OPTIONAL = ("zero", "labels")
#: What of an example lies on its grid, and how it is sampled.
MAPS = {"image": "bilinear", "mask": "nearest", "expected": "bilinear", "labels": "nearest"}
#: The share of a window that is cut beside it on each side, for what is turned and bent into it.
AROUND = 1 / 8


def normalised(expected: Tensor, mask: Tensor) -> Tensor:
    """Maps that sum to 1 over K inside the mask again, and are 0 outside; where nothing is left, all are equal.

    Args:
        expected: ``(…, K, *S)``.
        mask: ``(…, 1, *S)``, with as many axes.
    """
    axis = next(i for i, (a, b) in enumerate(zip(expected.shape, mask.shape, strict=True)) if a != b)
    total = expected.sum(axis, keepdim=True)
    equal = torch.full_like(expected, 1 / expected.shape[axis])
    return torch.where(total > 1e-3, expected / total.clamp_min(1e-3), equal) * mask


def augmentation(spatial_dims: int, drop: float = 0.0, window: Sequence[int] | None = None) -> Compose:
    """The paper's augmentations, of MONAI's transforms: flips, rotation, scaling, elastic deformation, noise (S §4.2).

    Args:
        spatial_dims: 2 or 3; a volume is turned by less than a slice, which has no upright.
        drop: the probability that one of an example's sequences is not shown to the network.
        window: what of an example is used at a time, along each axis; None: all of it.
    """
    keys, modes = tuple(MAPS), tuple(MAPS.values())
    common: dict[str, Any] = {"mode": modes, "padding_mode": "zeros", "allow_missing_keys": True}
    turn = torch.pi if spatial_dims == 2 else torch.pi / 12
    elastic = (
        Rand2DElasticd(keys, spacing=(24, 24), magnitude_range=(0.5, 1.5), prob=0.25, **common)
        if spatial_dims == 2
        else Rand3DElasticd(keys, sigma_range=(4, 6), magnitude_range=(20, 60), prob=0.25, **common)
    )
    rotate = (turn,) if spatial_dims == 2 else (turn,) * 3
    return Compose(
        [
            *([RandWindowd(window, [int(n * AROUND) for n in window])] if window else []),
            RandAxisFlipd(keys, prob=0.5, allow_missing_keys=True),
            RandAffined(keys, prob=0.8, rotate_range=rotate, scale_range=(0.15,) * spatial_dims, **common),
            elastic,
            *([CenterSpatialCropd(keys, window, allow_missing_keys=True)] if window else []),
            Tidyd(),
            RandGaussianNoised(("sequences",), prob=0.5, std=0.1),
            Joind(),
            *([RandDropd(drop)] if drop else []),
        ]
    )


def cropping(window: Sequence[int] | None) -> Compose | None:
    """What is left of the augmentation without any: the draw of a window; None where there is none."""
    return None if window is None else Compose([RandWindowd(window)])


class RandWindowd(Randomizable, Transform):
    """Cuts a window out of an example, around a voxel of the mask unless the border is in the way.

    Every voxel of the mask is as likely as another, so a window always holds some of it.

    Args:
        window: its size along each axis; at most the example's.
        around: voxels that are cut beside it on both sides of each axis; 0 where there are none. None: none.
    """

    def __init__(self, window: Sequence[int], around: Sequence[int] | None = None) -> None:
        self.window, self.around = tuple(window), tuple(around or [0] * len(window))

    def __call__(self, data: Mapping[str, Tensor]) -> Example:
        """Whatever lies on the example's grid is cut alike."""
        mask = data["mask"][0]
        inside = torch.nonzero(mask.flatten()).flatten()
        drawn = int(inside[self.R.randint(len(inside))]) if len(inside) else mask.numel() // 2
        middle = [int(at) for at in torch.unravel_index(torch.tensor(drawn), mask.shape)]
        window = bounding_box.around(middle, self.window, mask.shape)
        wide = tuple(slice(s.start - more, s.stop + more) for s, more in zip(window, self.around, strict=True))
        cut = {key: bounding_box.cut(data[key][None], wide)[0] for key in MAPS if key in data}
        return {**data, **cut}


class RandDropd(RandomizableTransform):
    """Hides one of the sequences that an example shows, so that a network learns to do without; one is always left.

    Args:
        prob: how often.
    """

    def __init__(self, prob: float) -> None:
        super().__init__(prob)

    def __call__(self, data: Mapping[str, Tensor]) -> Example:
        """Changes ``seen`` alone."""
        seen = data["seen"]
        there = torch.nonzero(seen.flatten()[:-CONTEXT]).flatten().tolist()
        self.randomize(None)
        if not self._do_transform or len(there) < 2:
            return dict(data)
        hidden = seen.clone()
        hidden[there[self.R.randint(len(there))]] = 0
        return {**data, "seen": hidden}


class Tidyd(Transform):
    """Repairs what interpolation did to an example, and splits its sequences from the depth, which bears no noise."""

    def __call__(self, data: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """``image``, ``mask``, ``expected`` → ``sequences``, ``depth``, ``mask``, ``expected``; the rest stays."""
        image, mask, expected = (
            torch.as_tensor(data[key]).as_subclass(Tensor) for key in ("image", "mask", "expected")
        )
        return {
            "sequences": image[:-CONTEXT],
            "depth": image[-CONTEXT:] * mask,
            "mask": mask,
            "expected": normalised(expected, mask),
            "seen": data["seen"],
            **{key: torch.as_tensor(data[key]).as_subclass(Tensor) for key in OPTIONAL if key in data},
        }


class Joind(Transform):
    """The reverse: ``sequences``, ``depth`` → ``image``."""

    def __call__(self, data: Mapping[str, Tensor]) -> Example:
        """One dictionary in, one out."""
        image = torch.cat([torch.as_tensor(data["sequences"]).as_subclass(Tensor), data["depth"]])
        # What a patient lacks stays 0, whatever noise there is.
        rest = {key: value for key, value in data.items() if key not in ("sequences", "depth")}
        return {"image": image * data["seen"], **rest}
