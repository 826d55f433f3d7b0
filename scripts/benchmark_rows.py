"""What ``benchmark.py`` measures, and the phantoms that it takes; each side imports only what it needs."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from runner import Facts

#: What is timed; it says on what, and what came of it.
Work = Callable[[], Facts]
#: Of the mixtures on slices: components, and when to stop.
COMPONENTS, TOL, MAX_ITER = 4, 1e-6, 1000
#: The voxel size of the slices, and that of a network's grid where none is asked for.
SLICE_MM, GRID_MM = 0.75, 1.0
#: Pairs of tissues of the protocol brain that touch, in its order: GM, WM, CSF.
BORDERS = ((2, 0), (0, 1))


class Size(NamedTuple):
    """How large the phantoms are.

    Attributes:
        head: voxels along each axis.
        head_mm: their size.
        patients: hearts in the cohort.
        slices: of 160×160 voxels, six from each of other hearts.
    """

    head: tuple[int, int, int]
    head_mm: float
    patients: int
    slices: int


#: 1.5 million voxels lie inside the full head's mask.
FULL = Size((150, 175, 150), 0.96, 3, 24)
TINY = Size((18, 18, 18), 4.0, 1, 2)


class Side(NamedTuple):
    """One thing that is measured.

    Attributes:
        data: the phantom that it takes.
        modules: what it imports.
        load: from the phantom's folder to what is timed.
        beside: the side of the same row that it is compared with.
    """

    data: str
    modules: tuple[str, ...]
    load: Callable[[Path], Work]
    beside: str | None = None


# The phantoms --------------------------------------------------------------------------------------------------------


def make_head(folder: Path, size: Size) -> None:
    """A head, shaded by ±35 %: files for ``deepgmm segment``, and arrays as its solver is given them."""
    import numpy as np
    import torch

    from monai_deepgmm import protocol
    from monai_deepgmm.methods import naming
    from monai_deepgmm.phantom import brain

    brains = brain.BrainConfig(shape=size.head, spacing_mm=size.head_mm, shading=0.35)
    brain.write_cohort(folder / "heads", 1, seed=0, config=brains)
    head, wanted = brain.make_patient(brains, 0, 1), protocol.load("brain")
    image = torch.from_numpy(np.stack([head.images[s] for s in wanted.sequences]).astype(np.float32))[None]
    mask = torch.from_numpy(head.mask)[None, None].float()
    image = image / image[:, :, head.mask].std(-1).reshape(1, -1, 1, 1, 1)
    arrays = {"image": image.numpy(), "mask": mask.numpy(), "spacing_mm": (size.head_mm,) * 3}
    for n in (1, len(wanted.sequences)):
        used = wanted.sequences[:n]
        start = naming.signature_map(image[:, :n], mask, wanted.visible(used), used, arrays["spacing_mm"])
        arrays[f"start{n}"] = start.numpy()
    for name, array in arrays.items():
        np.save(folder / f"{name}.npy", array)


def make_hearts(folder: Path, size: Size) -> None:
    """A cohort as ``deepgmm phantom`` makes it."""
    from monai_deepgmm.phantom import heart

    heart.write_cohort(folder, size.patients, seed=0)


def make_slices(folder: Path, size: Size) -> None:
    """Slices of 160×160 voxels, normalised, in double precision as ``deepgmm segment`` has them."""
    import numpy as np

    from monai_deepgmm import protocol
    from monai_deepgmm.images import cropping, loading
    from monai_deepgmm.patients import discovery
    from monai_deepgmm.phantom import heart

    wanted = protocol.load("infarct")
    hearts = heart.PhantomConfig(spacing_mm=(SLICE_MM, SLICE_MM), slices=(6, 6))  # 120 mm have 160 voxels then
    heart.write_cohort(folder / "hearts", -(-size.slices // 6), seed=0, config=hearts)
    studies = discovery.find(folder / "hearts", wanted).studies
    found = [cropping.crops(loading.load(study, wanted), wanted) for study in studies]
    for name in ("image", "mask"):
        np.save(folder / f"{name}.npy", np.concatenate([getattr(c, name).numpy() for c in found])[: size.slices])


PHANTOMS: Mapping[str, Callable[[Path, Size], None]] = {"head": make_head, "hearts": make_hearts, "slices": make_slices}


# The sides: each is given a phantom and returns what is timed --------------------------------------------------------


def head(folder: Path, sequences: int, degree: int) -> Work:
    """Partial volume on the head, with so many sequences and a bias field of such a degree, or 0 for none."""
    from monai_deepgmm.mixture import partial_volume

    # A copy, so that the sequences that are left out are not held.
    image, mask = tensor(folder / "image.npy")[:, :sequences].clone(), tensor(folder / "mask.npy")
    start, model = tensor(folder / f"start{sequences}.npy"), partial_volume.Model(BORDERS, degree=degree)
    spacing_mm = tensor(folder / "spacing_mm.npy").tolist()

    def work() -> Facts:
        fit = partial_volume.fit_partial_volume(image, mask, start, spacing_mm, model)
        came = "field kept" if fit.mixture.field is not None else "no field"
        came += "" if fit.diagnostics.converged.all() else ", not converged"
        shape = f"{int(mask.sum())} voxels × {sequences} of {shown(mask.shape[2:])}"
        return {"shape": shape, "came": f"{int(fit.diagnostics.iterations)} iterations, {came}"}

    return work


def segmented(folder: Path, protocol: str, *, files: bool = False) -> Work:
    """The default method, from files to labels, or to all that ``deepgmm segment`` writes; seconds of all patients."""
    from monai_deepgmm import batch
    from monai_deepgmm.images import nifti
    from monai_deepgmm.methods import config
    from monai_deepgmm.patients import discovery
    from monai_deepgmm.results import segment

    asked = config.build(protocol=protocol)
    cohort, came = discovery.find(folder, asked.protocol), asked.method.name
    images = nifti.read(next(iter(cohort.studies[0].images.values()))).data.shape

    def work() -> Facts:
        told = came
        if files:
            with tempfile.TemporaryDirectory() as out:
                told += f", exit code {batch.run(cohort, Path(out), asked, batch.BatchOptions())}"
        else:
            for study in cohort.studies:
                segment.segment(study, asked)
        n = len(cohort.studies)
        shape = f"{n} patient(s), the first {len(cohort.studies[0].images)} × {shown(images)}"
        return {"shape": shape, "patients": n, "came": told}

    return work


def ours(folder: Path, covariance: Any, *, spatial: bool = False) -> Work:
    """Our EM on all slices at once, from k-means++."""
    import torch

    from monai_deepgmm.mixture import em, starts

    image, mask = tensor(folder / "image.npy"), tensor(folder / "mask.npy")

    def work() -> Facts:
        began = time.process_time()
        start = starts.kmeans_start(image, mask, COMPONENTS, generator=torch.Generator().manual_seed(0))
        start_s = time.process_time() - began
        fit = em.fit_em(
            image, mask, start, spatial=spatial, covariance=covariance, tol=TOL, max_iter=MAX_ITER
        ).diagnostics
        facts = of_slices(mask, image.shape, fit.iterations.tolist(), fit.nll.tolist())
        return facts | {"came": f"{facts['came']}; k-means {start_s:.2f} s"}

    return work


def sklearn(folder: Path, covariance: str) -> Work:
    """scikit-learn's mixture, slice by slice, from its own k-means++, its tolerance as ours."""
    import numpy as np
    from sklearn.mixture import GaussianMixture

    image, mask = np.load(folder / "image.npy"), np.load(folder / "mask.npy")

    def work() -> Facts:
        iterations, nll = [], []
        for one, inside in zip(image, mask, strict=True):
            voxels = one[:, inside[0] > 0].T
            mixture = GaussianMixture(COMPONENTS, covariance_type=covariance, tol=TOL, max_iter=MAX_ITER)
            mixture.set_params(init_params="kmeans", random_state=0).fit(voxels)
            mixture.predict_proba(voxels)  # ours are there when the fit is
            iterations.append(mixture.n_iter_)
            nll.append(-mixture.score(voxels))
        return of_slices(mask, image.shape, iterations, nll)

    return work


def of_slices(mask: Any, shape: Sequence[int], iterations: Sequence[int], nll: Sequence[float]) -> Facts:
    """The facts of fits to slices ``(B, M, H, W)``."""
    came = f"{sum(iterations)} iterations, NLL {sum(nll) / len(nll):.4f}"
    shape_line = f"{shown(shape)}, {int(mask.sum())} voxels, {COMPONENTS} components"
    return {"shape": shape_line, "iterations": sum(iterations), "came": came}


def network(folder: Path) -> Work:
    """The six slices of a heart through a trained network: view, U-Net, back, mixture and labels."""
    from monai_deepgmm import protocol
    from monai_deepgmm.images import resampling
    from monai_deepgmm.methods import model_spec, trained_network, training_config
    from monai_deepgmm.networks import registry

    wanted = protocol.load("infarct")
    image, mask = tensor(folder / "image.npy")[:6], tensor(folder / "mask.npy")[:6]
    spec = model_spec.ModelSpec(
        protocol=wanted.name,
        normalisation=wanted.normalisation,
        sequences=wanted.sequences,
        tissues=tuple(tissue.name for tissue in wanted.visible(wanted.sequences)),
        network=registry.DEFAULT,
        spatial_dims=2,
        size=resampling.around(mask, (SLICE_MM, SLICE_MM), GRID_MM).size,
        training=training_config.TrainingConfig(grid_mm=GRID_MM, covariance="tied"),
    )
    unet = trained_network.build(spec).eval()

    def work() -> Facts:
        fit = trained_network.apply_network(unet, spec, image, mask, spacing_mm=(SLICE_MM, SLICE_MM))
        return {"shape": shown(image.shape), "came": f"seen as {shown(spec.size)}, {fit.resp.shape[1]} tissues"}

    return work


def forward(folder: Path) -> Work:
    """The U-Net alone, slice by slice on what it would be given."""
    import torch

    from monai_deepgmm.images import resampling
    from monai_deepgmm.networks import UNet, registry

    image, mask = tensor(folder / "image.npy")[:6].float(), tensor(folder / "mask.npy")[:6].float()
    seen = resampling.around(mask, (SLICE_MM, SLICE_MM), GRID_MM)
    inside = resampling.look(mask, seen, nearest=True)
    given = resampling.inputs(resampling.look(image, seen), inside, GRID_MM)
    unet = registry.fresh(lambda: UNet(2, given.shape[1], COMPONENTS), 0).eval()

    def work() -> Facts:
        with torch.no_grad():
            outputs = [unet(one[None]) for one in given]
        parameters = sum(p.numel() for p in unet.parameters())
        return {"shape": shown(given.shape), "came": f"{parameters} parameters, {outputs[0].shape[1]} outputs"}

    return work


def tensor(path: Path) -> Any:
    """A saved array."""
    import numpy as np
    import torch

    return torch.from_numpy(np.load(path))


def shown(shape: Sequence[int]) -> str:
    """As 3×160×160."""
    return "×".join(map(str, shape))


_PARTIAL_VOLUME = ("numpy", "monai_deepgmm.mixture.partial_volume")
_EM, _SKLEARN = ("numpy", "monai_deepgmm.mixture.em", "sklearn.cluster"), ("numpy", "sklearn.mixture")
_SEGMENT = ("monai_deepgmm.patients.discovery", "monai_deepgmm.results.segment")
_UNET = ("numpy", "monai_deepgmm.methods.trained_network", "monai_deepgmm.networks.registry")
#: Row → its sides.
ROWS: Mapping[str, Mapping[str, Side]] = {
    "head": {
        "pvgmm, 3 sequences": Side("head", _PARTIAL_VOLUME, partial(head, sequences=3, degree=2), "pvgmm, degree=0"),
        "pvgmm, degree=0": Side("head", _PARTIAL_VOLUME, partial(head, sequences=3, degree=0)),
        "pvgmm, T1": Side("head", _PARTIAL_VOLUME, partial(head, sequences=1, degree=2), "pvgmm, 3 sequences"),
    },
    "patient": {"segment, a head": Side("head", _SEGMENT, lambda folder: segmented(folder / "heads", "brain"))},
    "em-diag": {
        "GMM, diag": Side("slices", _EM, partial(ours, covariance="diag"), "scikit-learn, diag"),
        "scikit-learn, diag": Side("slices", _SKLEARN, partial(sklearn, covariance="diag")),
    },
    "em-tied": {
        "GMM, tied": Side("slices", _EM, partial(ours, covariance="tied"), "scikit-learn, tied"),
        "SVGMM, tied": Side("slices", _EM, partial(ours, covariance="tied", spatial=True), "scikit-learn, tied"),
        "scikit-learn, tied": Side("slices", _SKLEARN, partial(sklearn, covariance="tied")),
    },
    "anatomy": {
        "segment, hearts": Side("hearts", _SEGMENT, partial(segmented, protocol="infarct")),
        "segment and all files": Side(
            "hearts",
            (*_SEGMENT, "monai_deepgmm.batch"),
            partial(segmented, protocol="infarct", files=True),
            "segment, hearts",
        ),
    },
    "network": {
        "a patient": Side("slices", _UNET, network, "U-Net alone"),
        "U-Net alone": Side("slices", _UNET, forward),
    },
}
