"""The ways to fit a mixture to a patient's images, and to tell which component is which tissue."""

from collections.abc import Mapping

#: What ``--method`` takes → the room and the class of its settings. A new method is a file here, and a line below.
METHODS: Mapping[str, str] = {
    "gmm": "gaussian_mixture:GaussianMixtureConfig",
    "svgmm": "gaussian_mixture:SpatialMixtureConfig",
    "deepg": "deep:DeepGConfig",
    "deepsvg": "deep:DeepSVGConfig",
    "anatomy": "anatomy:AnatomicalConfig",
    "pvgmm": "partial_volume:PartialVolumeConfig",
    "network": "network:TrainedConfig",
    "cohort": "cohort:CohortConfig",
}
