"""A fit without the regions that do not stand, and how far its volumes move when the protocol's priors do."""

from __future__ import annotations

from collections.abc import Sequence

from monai_deepgmm.methods import region_filter
from monai_deepgmm.methods.config import Config
from monai_deepgmm.methods.region_filter import Region
from monai_deepgmm.methods.task import Images
from monai_deepgmm.mixture.fit import Fit, likeliest
from monai_deepgmm.protocol import Protocol
from monai_deepgmm.results import interval_rule, uncertainty
from monai_deepgmm.results.assembly import Assembly

#: How many refits show how far volumes depend on priors.
USUAL_COUNT = 3


def filtered(fit: Fit, images: Images, config: Config, *, told: bool = True) -> tuple[Fit, list[Region]]:
    """The fit without the regions that do not meet the protocol's criteria, and all regions, if they are to be told."""
    if not (config.presence and images.slices):
        return fit, []
    resp, regions = region_filter.decide(fit.resp, images, told=told)
    return fit._replace(resp=resp), regions


def protocols(config: Config, sequences: Sequence[str]) -> list[Protocol]:
    """As many perturbed protocols as the method asks for; for a rule of intervals nobody looks at refits."""
    count = getattr(config.method, "perturbations", 0)
    if count is None:
        ruled = interval_rule.rules(config.protocol.name, config.method.name, sequences)
        count = 0 if ruled else USUAL_COUNT
    return [uncertainty.perturbed(config.protocol, config.seed, number) for number in range(count)]


def volumes_ml(assembly: Assembly, fits: Sequence[Fit], config: Config, *, voxel_ml: float) -> list[list[float]]:
    """The volumes of each tissue, in ml, that the fits to the variants give."""
    pairs = zip(fits, assembly.variants, strict=True)
    return [_volumes(assembly, filtered(fit, images, config, told=False)[0], voxel_ml) for fit, images in pairs]


def _volumes(assembly: Assembly, fit: Fit, voxel_ml: float) -> list[float]:
    """Of each tissue in all images, in ml."""
    labels = likeliest(assembly.everywhere(fit))[assembly.mask[:, 0] > 0]
    return (labels.bincount(minlength=fit.resp.shape[1]) * voxel_ml).tolist()
