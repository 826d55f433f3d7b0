"""Brain tissue by this software and by others: what makes each of them segment.

Each method imports what it needs and returns what segments, so that imports are not timed.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import runner
from runner import Facts

from monai_deepgmm.errors import StudyError, UsageError
from monai_deepgmm.images import loading
from monai_deepgmm.patients.study import Cohort
from monai_deepgmm.protocol import Protocol

Labels = npt.NDArray[np.integer[Any]]
#: One patient's files → labels (X, Y, Z), the tissues' indices inside the mask.
Segment = Callable[[Cohort, Protocol], Labels]
#: Images (M, X, Y, Z), the mask and the voxels' sides in mm → numbers of unnamed components from 1; 0 is none.
Components = Callable[[npt.NDArray[np.floating[Any]], npt.NDArray[np.bool_], Sequence[float]], Labels]
OURS = "deepgmm"
SEQUENCE = "T1"
#: In the order of the table's columns; the last is the mean of grey and white matter.
TISSUES = ("CSF", "GM", "WM")
PARENCHYMA = ("GM", "WM")
#: The quantiles at which ANTs' own pipelines truncate intensities by default; here inside the mask.
TRUNCATION = (0.025, 0.975)


def deepgmm(words: str) -> Segment:
    """This software, through the function that its command calls.

    Args:
        words: ``--method`` and ``--set``s, separated by commas; empty: the defaults.

    Raises:
        UsageError: one of them is unknown.
    """
    from monai_deepgmm import batch
    from monai_deepgmm.methods import config

    given = [word for word in words.split(",") if word]
    named = [word for word in given if "=" not in word]
    if len(named) > 1:
        raise UsageError(f"{OURS}:{words}: {' and '.join(named)} are two methods; give one")
    settings = [word for word in given if "=" in word]

    def segment(patient: Cohort, wanted: Protocol) -> Labels:
        asked = config.build(protocol=wanted.name, method=named[0] if named else None, settings=settings)
        rows: list[Facts] = []
        with tempfile.TemporaryDirectory() as folder:
            if batch.run(patient, Path(folder), asked, batch.BatchOptions(), progress=rows.append) != batch.OK:
                raise StudyError(rows[0]["code"], rows[0]["message"], rows[0]["remedy"])
            name = rows[0]["patient"]
            return runner.labels_in(Path(folder) / name / f"{name}_dseg.nii.gz")

    return segment


def by_intensity(components: Components, channels: int = 1) -> Segment:
    """What segments with unnamed components: the darkest on T1 is the tissue that the protocol expects darkest.

    Args:
        components: finds them.
        channels: how many of the protocol's sequences it is shown, if the patient has them.
    """

    def segment(patient: Cohort, wanted: Protocol) -> Labels:
        found = loading.load(patient.studies[0], wanted)
        spacing_mm = found.reference.spacing_mm
        labels = np.where(found.mask, components(found.image[:channels], found.mask, spacing_mm), 0)
        return ordered(labels, found.image[0], wanted)

    return segment


def ordered(components: Labels, image: npt.NDArray[np.floating[Any]], wanted: Protocol) -> Labels:
    """Components ``(X, Y, Z)`` as tissues, both in the order of their brightness in the T1 ``image``.

    Raises:
        StudyError: there are fewer components than tissues, as after a fit that broke down.
    """
    tissues = sorted((wanted.tissue(name) for name in TISSUES), key=lambda tissue: tissue.signature[SEQUENCE])
    present = [int(c) for c in np.unique(components) if c > 0]
    if len(present) != len(tissues):
        raise StudyError("E_INTERNAL", f"it found {len(present)} components, but {len(tissues)} are expected")
    present.sort(key=lambda c: float(image[components == c].mean()))
    labels = np.zeros(components.shape, dtype=np.int64)
    for component, tissue in zip(present, tissues, strict=True):
        labels[components == component] = tissue.index
    return labels


def sklearn(covariance: str) -> Components:
    """scikit-learn's mixture of the intensities alone."""
    from sklearn.mixture import GaussianMixture

    def components(images: Any, mask: Any, spacing_mm: Sequence[float]) -> Labels:
        labels = np.zeros(mask.shape, dtype=np.int64)
        mixture = GaussianMixture(len(TISSUES), covariance_type=covariance, random_state=0)
        labels[mask] = 1 + mixture.fit_predict(images[:, mask].T.astype(np.float64))
        return labels

    return components


def atropos(before: str) -> Components:
    """ANTs' mixture with a Markov random field, weight 0.1 on the 26 neighbours.

    Args:
        before: what is done to the image first: ``truncate``, ``N4``, both or nothing. Its k-means start reaches up to
            the brightest voxel, so that without truncation a few bright vessels can take a component for themselves.
    """
    import ants

    def components(images: Any, mask: Any, spacing_mm: Sequence[float]) -> Labels:
        values = images[0]
        if "truncate" in before:
            values = values.clip(*np.quantile(values[mask], TRUNCATION).astype(values.dtype))
        image, inside = (ants.from_numpy(a, spacing=spacing_mm) for a in (values, mask.astype(np.float32)))
        if "N4" in before:
            image = ants.n4_bias_field_correction(image, mask=inside)
        fitted = ants.atropos(a=image, x=inside, i=f"KMeans[{len(TISSUES)}]", m="[0.1,1x1x1]", c="[5,0]")
        labels: Labels = np.rint(fitted["segmentation"].numpy()).astype(np.int64)
        return labels

    return components


def dipy(beta: str) -> Components:
    """DIPY's Gaussian mixture with a hidden Markov random field; what is not brain is its background."""
    from dipy.segment.tissue import TissueClassifierHMRF

    def components(images: Any, mask: Any, spacing_mm: Sequence[float]) -> Labels:
        brain = np.where(mask, images[0], 0).astype(np.float64)
        _, final, _ = TissueClassifierHMRF(verbose=False).classify(brain, len(TISSUES), float(beta))
        labels: Labels = np.rint(final).astype(np.int64)
        return labels

    return components


class Rival(NamedTuple):
    """Other software: what makes it segment and with which word, the module it needs and who installs that."""

    make: Callable[[str], Components]
    word: str
    module: str
    package: str


RIVALS: Mapping[str, Rival] = {
    "sklearn-tied": Rival(sklearn, "tied", "sklearn", "scikit-learn"),
    "sklearn-full": Rival(sklearn, "full", "sklearn", "scikit-learn"),
    "atropos": Rival(atropos, "", "ants", "antspyx"),
    "n4+atropos": Rival(atropos, "N4", "ants", "antspyx"),
    "truncate+atropos": Rival(atropos, "truncate", "ants", "antspyx"),
    "truncate+n4+atropos": Rival(atropos, "truncate N4", "ants", "antspyx"),
    "dipy-hmrf": Rival(dipy, "0.1", "dipy", "dipy"),
}
