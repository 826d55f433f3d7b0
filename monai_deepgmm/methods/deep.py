"""``deepg`` and ``deepsvg`` on one image: a network fitted to it takes the place of the E-step (S §3, Alg. 3)."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Self

import torch

from monai_deepgmm.images import resampling
from monai_deepgmm.methods.gaussian_mixture import STARTS
from monai_deepgmm.methods.settings import NOT_SET, check_choice, check_numbers
from monai_deepgmm.methods.task import Images
from monai_deepgmm.mixture import starts
from monai_deepgmm.mixture.fit import Fit
from monai_deepgmm.mixture.gaussian import COVARIANCES, VARIANCE_FLOOR, Covariance
from monai_deepgmm.networks.sizes import CONTEXT, check_window, window_sides
from monai_deepgmm.protocol import Protocol

#: Folded networks, which steps ten times as long suit. They follow the likelihood further in as many, and lose scar to
#: edema unless the start holds them more firmly.
FOLDED = ("quickunet", "foldedunet")
#: The learning rate and the start's weight of such a network, and of any other.
FOLDED_PACE, PACE = (0.01, 1.0), (0.001, 0.3)


@dataclass(frozen=True)
class DeepSVGConfig:
    """A U-Net's output w is Π(x); the loss is NLL_V.

    Attributes:
        covariance: the shape of Σ: diag (the paper's), full, tied or spherical.
        start: signature (the protocol's map of where each tissue is expected) or kmeans; known means come first.
        start_steps: gradient steps that bring the network to the start.
        start_weight: how much of the cross-entropy to the start is kept after them; null: 1 for quickunet and
            foldedunet, else 0.3.
        steps: gradient steps on the NLL, at most.
        lr: the learning rate; null: 0.01 for quickunet and foldedunet, else 0.001, the paper's.
        tol: a fit has converged when a step lowers the NLL per voxel by less.
        window: sides of the random windows that a network is fitted to, in voxels; 0 or null: whole images.
        together: one network for all images of a patient instead of one for each.
        mean_weight: with known means: λ of the regulariser ‖μ − μ_data‖².
        floor: the variance floor, as a fraction of a sequence's variance inside the mask.
        label_rule: posterior (a label is the most probable component of Π·g) or network (of Π alone).
        presence: whether a tissue's regions must meet the protocol's criteria.
        network: the definition that ``networks.registry.build`` takes; None: quickunet where deepsvg is fitted to
            slices, or else the paper's U-Net, for volumes with a quarter of its filters.
    """

    name: ClassVar[str] = "deepsvg"
    named: ClassVar[bool] = False
    takes_means: ClassVar[bool] = True
    surroundings: ClassVar[bool] = True
    walled: ClassVar[bool] = False
    spatial: ClassVar[bool] = True
    quick: ClassVar[bool] = True

    covariance: Covariance = "tied"
    start: str = "signature"
    start_steps: int = 20
    start_weight: float | None = None
    steps: int = 30
    lr: float | None = None
    tol: float = 1e-3
    window: int | tuple[int, ...] | None = None
    together: bool = False
    mean_weight: float = 1.0
    floor: float = VARIANCE_FLOOR
    label_rule: str = "posterior"
    presence: bool = False
    network: Mapping[str, Any] | None = field(default=None, metadata=NOT_SET)

    def __post_init__(self) -> None:
        """Refuses what makes no sense.

        Raises:
            UsageError: a field holds a value that it cannot have.
        """
        check_choice("covariance", self.covariance, COVARIANCES)
        check_choice("start", self.start, STARTS)
        check_choice("label_rule", self.label_rule, ("posterior", "network"))
        check_choice("together", self.together, (True, False))
        check_choice("presence", self.presence, (True, False))
        floats = dict.fromkeys(("start_weight", "lr", "tol", "mean_weight", "floor"), (float, 0))
        check_numbers(self, {"start_steps": (int, 0), "steps": (int, 1), **floats})
        check_window(self.window)

    def resolved(self, protocol: Protocol) -> Self:
        """With the network that suits the protocol's unit, and the learning rate and weight that go with it."""
        network = self.network
        if network is None and self.quick and protocol.unit == "slice":
            network = {"_target_": "quickunet"}
        folded = str((network or {}).get("_target_")).rpartition(".")[2].lower() in FOLDED
        lr, weight = FOLDED_PACE if folded else PACE
        return replace(
            self,
            network=network,
            lr=lr if self.lr is None else self.lr,
            start_weight=weight if self.start_weight is None else self.start_weight,
        )

    def solve(self, images: Images, *, device: str = "cpu") -> Fit:
        """Fits a network to each image, with ‖μ − μ_data‖² where means are known (S §4.2)."""
        from monai_deepgmm.networks import descent, nll_loss, registry  # MONAI's networks take a second to import

        settled = self.resolved(images.protocol)
        image, mask, start, means = images.image, images.mask, images.expected, images.means
        if self.start == "kmeans" and means is None:
            generator = torch.Generator().manual_seed(images.seed)
            start = starts.kmeans_start(image, mask, start.shape[1], generator=generator)
        dims = image.ndim - 2
        network = functools.partial(
            registry.build,
            settled.network,
            spatial_dims=dims,
            in_channels=image.shape[1] + CONTEXT,
            out_channels=start.shape[1],
        )
        return descent.fit_network(
            image,
            mask,
            start,
            resampling.relative_depth(mask, images.spacing_mm),
            network=network,
            seed=images.seed,
            spatial=self.spatial,
            covariance=self.covariance,
            terms=[] if means is None else [nll_loss.Term(self.mean_weight, nll_loss.MeanPrior(means))],
            together=self.together,
            posterior=self.label_rule == "posterior",
            floor=self.floor,
            descent=descent.Descent(
                steps=self.steps,
                start_steps=self.start_steps,
                start_weight=settled.start_weight or 0.0,
                lr=settled.lr or 0.0,
                tol=self.tol,
                window=window_sides(self.window, dims) if self.window else None,
            ),
        )


@dataclass(frozen=True)
class DeepGConfig(DeepSVGConfig):
    """The mean over the mask of a U-Net's output w is π; the loss is NLL."""

    name: ClassVar[str] = "deepg"
    spatial: ClassVar[bool] = False
    quick: ClassVar[bool] = False
