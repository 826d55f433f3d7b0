"""What ``benchmark.py`` measures: each case makes its phantom and returns its sides, of which the first is ours."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import benchmark_peers as peers
from benchmark_children import as_installed, counted_children
from runner import Facts

#: What is timed; it says what came of it: ``came`` in words, ``objective`` where the sides must agree on one.
Work = Callable[[], Facts]
COMPONENTS, TOL, MAX_ITER, FLOOR = 4, 1e-6, 1000, 1e-6
#: Sides that take long see only the first so many slices; seconds are those of one slice.
FEW = 3


class Size(NamedTuple):
    """How large the phantoms are.

    Attributes:
        slices: of hearts.
        pixel_mm: their voxels; 0.75 makes slices of 160×160.
        head: voxels along each axis; of 150×175×150, 1.5 million lie inside the mask.
        head_mm: their size.
        hearts: patients of the small and the large cohort.
        products: rows of the square matrices that show the machine's limit.
        epochs: of the paper's training on one image, at most.
    """

    slices: int
    pixel_mm: float
    head: tuple[int, int, int]
    head_mm: float
    hearts: tuple[int, int]
    products: int
    epochs: int


FULL = Size(24, 0.75, (150, 175, 150), 0.96, (2, 8), 2048, 60)
TINY = Size(2, 3.0, (20, 20, 18), 4.0, (1, 2), 64, 2)


class Sides(NamedTuple):
    """What a case compares.

    Attributes:
        shape: what it is measured on, in words.
        works: each side's name and what is timed; the first is ours.
        once: sides that are run once, because they take long.
        asked: what ours asks of ``fit_em``, by name, where an earlier revision could be asked the same.
    """

    shape: str
    works: Mapping[str, Work]
    once: tuple[str, ...] = ()
    asked: Mapping[str, Any] | None = None


# Phantoms ------------------------------------------------------------------------------------------------------------


def slices(size: Size) -> tuple[Any, Any, Any, Any]:
    """Slices of hearts, normalised: image, mask, where each tissue is expected, and the reference labels."""
    import numpy as np
    import torch

    from monai_deepgmm import protocol
    from monai_deepgmm.images import cropping, labels, loading
    from monai_deepgmm.methods import naming
    from monai_deepgmm.patients import discovery
    from monai_deepgmm.phantom import heart

    wanted = protocol.load("infarct")
    each = min(6, size.slices)
    made = heart.PhantomConfig(spacing_mm=(size.pixel_mm, size.pixel_mm), slices=(each, each))
    parts: list[tuple[Any, ...]] = []
    with tempfile.TemporaryDirectory() as folder:
        heart.write_cohort(Path(folder), -(-size.slices // each), seed=0, config=made)
        for study in discovery.find(Path(folder), wanted).studies:
            scan = loading.load(study, wanted)
            found = cropping.crops(scan, wanted, dtype=torch.float32)
            truth = labels.read(study, wanted, wanted.sequences, like=scan.reference)
            tissues = wanted.components(scan.sequences)
            start = naming.signature_map(found.image, found.mask, tissues, scan.sequences, found.spacing_mm)
            parts.append((found.image, found.mask, start, torch.from_numpy(found.cut(truth.labels).astype(np.int64))))
    image, mask, start, truth = (torch.cat(p)[: size.slices] for p in zip(*parts, strict=True))
    return image, mask, start, truth


def head(size: Size) -> tuple[Any, Any, Any, Any]:
    """A head shaded by ±35 %: image with 0 for no signal, mask, where each tissue is expected, the reference labels."""
    import numpy as np
    import torch

    from monai_deepgmm import protocol
    from monai_deepgmm.methods import naming
    from monai_deepgmm.phantom import brain

    wanted = protocol.load("brain")
    made = brain.make_patient(brain.BrainConfig(shape=size.head, spacing_mm=size.head_mm, shading=0.35), 0, 1)
    image = torch.from_numpy(np.stack([made.images[s] for s in wanted.sequences]).astype(np.float32))[None]
    mask = torch.from_numpy(made.mask)[None, None].float()
    image = image / image[:, :, made.mask].std(-1).reshape(1, -1, 1, 1, 1)
    tissues = wanted.visible(wanted.sequences)
    start = naming.signature_map(image, mask, tissues, wanted.sequences, (size.head_mm,) * 3)
    return image, mask, start, made.labels


def shown(shape: Any) -> str:
    """As 3×160×160."""
    return "×".join(map(str, shape))


def dice(found: Any, wanted: Any, labels: Any) -> str:
    """The mean Dice of labels, in words."""
    each = [2 * ((found == k) & (wanted == k)).sum() / ((found == k).sum() + (wanted == k).sum()) for k in labels]
    return f"Dice {sum(map(float, each)) / len(each):.3f}"


# Cases ---------------------------------------------------------------------------------------------------------------


def machine(size: Size) -> Sides:
    """The machine's limits: what it copies, and what it multiplies."""
    import torch

    n = size.products
    a, b, big = torch.randn(n, n), torch.randn(n, n), torch.zeros(n * n * 8)
    other = torch.empty_like(big)

    def product() -> Facts:
        torch.mm(a, b)
        return {"flop": 2.0 * n**3, "came": "a product of matrices in single precision"}

    def copied() -> Facts:
        other.copy_(big)
        return {"bytes": 2.0 * big.nbytes, "came": "a copy, read and written"}

    return Sides(f"{n}×{n}, and {big.nbytes / 1e6:.0f} MB", {"product": product, "copy": copied})


def em(size: Size, covariance: Any, *, spatial: bool = False) -> Sides:
    """All slices from the signatures' start, to one tolerance: ours, and who has the same."""
    import torch

    from monai_deepgmm.mixture.em import fit_em

    image, mask, start, _ = slices(size)
    where = mask[:, 0] > 0
    voxels = [i[:, m].T.double().numpy() for i, m in zip(image, where, strict=True)]
    begun = [s[:, m].T.double().numpy() for s, m in zip(start, where, strict=True)]
    begun = [w / w.sum(1, keepdims=True) for w in begun]
    given = {"tol": TOL, "max_iter": MAX_ITER}
    m = image.shape[1]
    features = 2 * m + 1 if covariance == "diag" else m * (m + 1) // 2 + m + 1
    image = image.double() if spatial else image  # as the method does it
    asked = {"spatial": spatial, "covariance": covariance, **given}

    def fitted(part: slice) -> Any:
        return fit_em(image[part], mask[part], start[part], **asked).diagnostics

    first = float(fitted(slice(FEW)).nll.mean())

    def ours() -> Facts:
        known = fitted(slice(None))
        work = float((known.iterations * where.sum((1, 2))).sum()) / len(voxels)
        found = came(peers.Fitted(float(known.nll.mean()), int(known.iterations.sum())))
        return {**found, "flop": 4.0 * COMPONENTS * features * work}

    def came(found: peers.Fitted, count: int = len(voxels)) -> Facts:
        told = f"NLL {found.nll:.4f}, {found.iterations or 'unknown'} iterations"
        if count < len(voxels):
            return {"patients": count, "came": f"{told}, of the first {count} (ours there: NLL {first:.4f})"}
        return {"patients": count, "objective": found.nll, "came": told}

    def loops() -> Facts:
        given_here = {**given, "spatial": spatial, "tied": covariance == "tied", "floor": FLOOR}
        both = zip(voxels[:FEW], begun[:FEW], strict=True)
        each = [peers.em(torch.from_numpy(x), torch.from_numpy(w), **given_here) for x, w in both]
        return came(peers.Fitted(sum(f.nll for f in each) / len(each), sum(f.iterations for f in each)), len(each))

    works: dict[str, Work] = {"ours": ours}
    missing = peers.absent()
    if not spatial and "scikit-learn" not in missing:
        works["scikit-learn"] = lambda: came(peers.sklearn(voxels, begun, covariance, **given))
    if not spatial and covariance in ("diag", "full") and "pomegranate" not in missing:
        works["pomegranate"] = lambda: came(peers.pomegranate(voxels[:FEW], begun[:FEW], covariance, **given), FEW)
    if covariance != "full":
        works["the paper's loops"] = loops
    shape = f"{shown(image.shape)}, {int(mask.sum())} voxels, {COMPONENTS} components; seconds of one slice"
    once = ("the paper's loops", "pomegranate")
    return Sides(shape, works, once, {"image": image, "mask": mask, "start": start, **asked})


def volume(size: Size) -> Sides:
    """A mixture of a whole head, diagonal, from one start."""
    from monai_deepgmm.mixture.em import fit_em

    image, mask, start, _ = head(size)
    inside = mask[0, 0] > 0
    x, w = (v[0][:, inside].T.double().numpy() for v in (image, start))

    def ours() -> Facts:
        known = fit_em(image, mask, start, tol=1e-5, max_iter=300).diagnostics
        return {
            "objective": float(known.nll),
            "came": f"NLL {float(known.nll):.4f}, {int(known.iterations)} iterations",
        }

    def theirs() -> Facts:
        found = peers.sklearn([x], [w], "diag", tol=1e-5, max_iter=300)
        return {"objective": found.nll, "came": f"NLL {found.nll:.4f}, {found.iterations} iterations"}

    works = {"ours": ours, **({} if "scikit-learn" in peers.absent() else {"scikit-learn": theirs})}
    return Sides(f"{int(mask.sum())} voxels × {image.shape[1]} of {shown(mask.shape[2:])}", works, ("scikit-learn",))


def pvgmm(size: Size) -> Sides:
    """Partial volume with field and neighbours on the head."""
    from monai_deepgmm.mixture import mixel_model, partial_volume
    from monai_deepgmm.mixture.fit import likeliest

    image, mask, start, truth = head(size)
    inside, spacing_mm = truth > 0, (size.head_mm,) * 3

    def scored(found: Any) -> Facts:
        return {"came": dice(found[inside], truth[inside], (1, 2, 3))}

    def fitted(degree: int) -> Facts:
        # Pairs of tissues of the protocol brain that touch, in its order: GM, WM, CSF.
        model = mixel_model.Model(((2, 0), (0, 1)), degree=degree)
        resp = partial_volume.fit_partial_volume(image, mask, start, spacing_mm, model).resp
        return scored(1 + likeliest(resp)[0].numpy())

    works: dict[str, Work] = {"field and neighbours": lambda: fitted(2), "without a field": lambda: fitted(0)}
    if "ANTsPy" not in peers.absent():
        works["Atropos"] = lambda: scored(peers.atropos(image[0], mask[0, 0], size.head_mm))
    return Sides(f"{int(mask.sum())} voxels × {image.shape[1]}", works, ("without a field", "Atropos"))


def hearts(size: Size) -> Sides:
    """Hearts by the default method with intervals: from arrays to labels, from files to labels, and all files."""
    from monai_deepgmm import batch
    from monai_deepgmm.images import preparation
    from monai_deepgmm.methods import config
    from monai_deepgmm.patients import discovery
    from monai_deepgmm.phantom import heart
    from monai_deepgmm.results import segment

    heart.write_cohort(folder := Path(tempfile.mkdtemp()), n := size.hearts[0], seed=0)
    asked = config.build(protocol="infarct")
    cohort = discovery.find(folder, asked.protocol)
    steps = asked.preprocessing.steps(asked.protocol)
    ready = {study.patient: preparation.prepare(study, steps) for study in cohort.studies}

    def solved() -> Facts:
        for study in cohort.studies:
            segment.segment(study, asked, preprocessing=[lambda data: ready[data["study"].patient]._asdict()])
        return {"patients": n, "came": "labels, intervals and measurements"}

    def read() -> Facts:
        for study in cohort.studies:
            segment.segment(study, asked)
        return {"patients": n, "came": "the same"}

    def written() -> Facts:
        with tempfile.TemporaryDirectory() as out:
            code = batch.run(cohort, Path(out), asked, batch.BatchOptions())
        return {"patients": n, "came": f"labels, sidecars, pages, tables; exit code {code}"}

    shape = f"{n} heart(s), {len(cohort.studies[0].images)} × {shown(next(iter(ready.values())).scan.mask.shape)}"
    return Sides(shape, {"from arrays": solved, "from files": read, "and all files written": written})


def command(size: Size) -> Sides:
    """The command itself, started anew: its CPU seconds, imports included."""
    from monai_deepgmm.phantom import heart

    folder, (few, many) = Path(tempfile.mkdtemp()), size.hearts
    for number in {1, few, many}:
        heart.write_cohort(folder / str(number), number, seed=0)

    def run(*words: str) -> Facts:
        typed = [sys.executable, "-m", "monai_deepgmm", *words]
        with counted_children() as used:
            done = subprocess.run(typed, env=as_installed(), capture_output=True, check=True)
        return {"came": f"exit code {done.returncode}", **used}

    def segment(number: int, jobs: int) -> Facts:
        with tempfile.TemporaryDirectory() as out:
            made = run("segment", str(folder / str(number)), out, "-q", "--jobs", str(jobs))
        return {**made, "hearts": number}

    works: dict[str, Work] = {
        "segment, one heart": lambda: segment(1, 1),
        "--help": lambda: run("--help"),
        "scan": lambda: run("scan", str(folder / "1")),
        f"segment, {few} hearts, 2 processes": lambda: segment(few, 2),
        f"segment, {many} hearts, 2 processes": lambda: segment(many, 2),
    }
    return Sides("a new process each", works)


def loss(size: Size, kind: str) -> Sides:
    """A loss and its gradient, of a batch of four slices."""
    import torch

    from monai_deepgmm.networks.gmm_loss import GMMLoss
    from monai_deepgmm.networks.nll_loss import MixtureNLL

    image, mask, *_ = slices(size)
    image, mask = image[:4], mask[:4]
    logits = torch.randn(len(image), COMPONENTS, *image.shape[2:], generator=torch.Generator().manual_seed(0))
    logits.requires_grad_()
    target = torch.cat([image, mask], 1)
    mine: Any = MixtureNLL() if kind == "nll" else GMMLoss()
    theirs = peers.nll_loss if kind == "nll" else peers.gmm_loss

    def backward(value: Any) -> Facts:
        logits.grad = None
        value.backward()
        return {"objective": float(value.detach()), "came": f"{float(value.detach()):.5f}"}

    works: dict[str, Work] = {
        "ours": lambda: backward(mine(logits, target)),
        "the paper's loops": lambda: backward(theirs(logits, image, mask, FLOOR)),
    }
    return Sides(f"{shown(logits.shape)}, {image.shape[1]} sequences, {int(mask.sum())} voxels", works)


def deepsvg(size: Size) -> Sides:
    """A network fitted to one slice."""
    import numpy as np
    import torch

    from monai_deepgmm import protocol
    from monai_deepgmm.methods.deep import DeepSVGConfig
    from monai_deepgmm.methods.task import Images

    image, mask, start, truth = (part[:1] for part in slices(size))
    wanted = protocol.load("infarct")
    tissues = wanted.components(wanted.sequences)
    task = Images(image, mask, start, wanted, tissues, wanted.sequences, (size.pixel_mm,) * 2, (0,))
    inside, known = mask[0, 0].numpy() > 0, truth[0].numpy()

    def agreed(found: Any) -> str:
        index = np.array([t.index for t in tissues])
        return dice(np.where(inside, index[found], 0), known, [k for k in index if (known == k).any()])

    def ours(**given: Any) -> Facts:
        fit = DeepSVGConfig(**given).solve(task)
        return {"came": f"{agreed(fit.resp.argmax(1)[0].numpy())}, {fit.diagnostics.iterations[0]} steps and the start"}

    def loops() -> Facts:
        torch.manual_seed(0)
        found, epochs = peers.deep_svg(image, mask, start, tol=1e-3, epochs=size.epochs)
        return {"came": f"{agreed(found.numpy())}, {epochs} steps in all, at most {size.epochs}"}

    each = {"ours": ours, "ours, unet": lambda: ours(network={"_target_": "unet"}), "the paper's loop": loops}
    return Sides(shown(image.shape), each, ("the paper's loop",))


def network(size: Size) -> Sides:
    """Six slices through a trained network to labels, and the paper's U-Net on their crops, slice by slice."""
    import torch

    from monai_deepgmm import protocol
    from monai_deepgmm.images import resampling
    from monai_deepgmm.methods import model_spec, trained_network, training_config
    from monai_deepgmm.networks import UNet, quick_layers, registry

    (image, mask, *_), wanted, mm = (part[:6] for part in slices(size)), protocol.load("infarct"), (size.pixel_mm,) * 2
    spec = model_spec.ModelSpec(
        protocol=wanted.name,
        normalisation=wanted.normalisation,
        sequences=wanted.sequences,
        tissues=tuple(tissue.name for tissue in wanted.visible(wanted.sequences)),
        network={},
        spatial_dims=2,
        size=resampling.around(mask, mm, 1.0).size,
        training=training_config.TrainingConfig(grid_mm=1.0, covariance="tied"),
    )
    plain = registry.fresh(lambda: UNet(2, image.shape[1], COMPONENTS), 0).eval()

    def ours(name: str) -> Work:
        own = replace(spec, network=registry.NAMED[name])
        quick = quick_layers.quickened(trained_network.build(own).eval(), training=False)  # as a patient meets it
        solve = partial(trained_network.apply_network, quick, own, image, mask, spacing_mm=mm)
        return lambda: {"came": f"seen as {shown(spec.size)}, {solve().resp.shape[1]} tissues"}

    @torch.no_grad()
    def theirs() -> Facts:
        return {"came": f"{len([plain(one[None]) for one in image])} × {shown(image.shape[2:])}"}

    each = {"ours": ours("quickunet"), "ours, unet": ours("unet"), "the paper's U-Net": theirs}
    return Sides(shown(image.shape), each)


def scaling(size: Size) -> Sides:
    """Fifty iterations of a mixture with twice the voxels, components and sequences."""
    import torch

    from monai_deepgmm.mixture.em import fit_em

    generator = torch.Generator().manual_seed(0)
    side = max(size.products // 16, 16)

    def fitted(n: int, k: int, m: int) -> Work:
        image, start = (torch.randn(1, c, n, side, generator=generator) for c in (m, k))

        def work() -> Facts:
            fit_em(image, torch.ones(1, 1, n, side), start.softmax(1), tol=0, max_iter=50, accelerate=False)
            return {"came": "50 iterations"}

        return work

    works = {
        "as it is": fitted(side, 4, 3),
        "voxels × 4": fitted(4 * side, 4, 3),
        "components × 4": fitted(side, 16, 3),
        "sequences × 4": fitted(side, 4, 12),
    }
    return Sides(f"{side}×{side} voxels × 3 sequences, 4 components", works)


#: Name → what it is about, and what makes it.
CASES: Mapping[str, tuple[str, Callable[[Size], Sides]]] = {
    "machine": ("the machine's limits", machine),
    "em-diag": ("GMM, diagonal Σ", lambda size: em(size, "diag")),
    "em-tied": ("GMM, one Σ", lambda size: em(size, "tied")),
    "em-full": ("GMM, full Σ", lambda size: em(size, "full")),
    "svgmm": ("SVGMM, one Σ", lambda size: em(size, "tied", spatial=True)),
    "volume": ("GMM of a head, diagonal Σ", volume),
    "pvgmm": ("partial volume on a head", pvgmm),
    "hearts": ("hearts by `anatomy`", hearts),
    "command": ("the command", command),
    "loss-nll": ("NLL_V, forward and backward", lambda size: loss(size, "nll")),
    "loss-gmm": ("L_GMM, forward and backward", lambda size: loss(size, "gmm")),
    "deepsvg": ("deepSVG on one slice", deepsvg),
    "network": ("a trained network on six slices", network),
    "scaling": ("how the seconds of a GMM grow", scaling),
}
