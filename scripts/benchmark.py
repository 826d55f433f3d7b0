#!/usr/bin/env python
"""How fast this software is and how much memory it takes, beside scikit-learn where that has the same, on phantoms.

    python scripts/benchmark.py OUT --only head em-diag

Every measurement has a process of its own on one thread, so that its peak of memory is its own; the imports and the
reading of arrays come before the clock, and the peak after the imports alone stands beside the peak of all. The sides
of a row are measured in turns, each several times, and a row is measured in one go or not at all: its JSON in OUT is
what a second run takes as it is. The table has medians, then the least and the most. The exit code is 1 if something
could not be measured, 2 if nothing could.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import platform
import re
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

# Nothing heavy here: on Linux a new process is charged with what its parent held, and each side imports only its own.

Facts = dict[str, Any]
#: What is timed; it says on what, and what came of it.
Work = Callable[[], Facts]
THREADS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "ITK_GLOBAL_DEFAULT_NUMBER_OF_THREADS")
PACKAGES = ("monai-deepgmm", "torch", "numpy", "scikit-learn")
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


# The phantoms: each is made in a process of its own, once ------------------------------------------------------------


def make_head(folder: Path, size: Size) -> None:
    """A head, shaded by ±35 %: files for ``deepgmm segment``, and arrays as its solver is given them."""
    import numpy as np
    import torch

    from monai_deepgmm import protocol
    from monai_deepgmm.methods import naming as tissues
    from monai_deepgmm.phantom import brain as phantom_brain

    brains = phantom_brain.BrainConfig(shape=size.head, spacing_mm=size.head_mm, shading=0.35)
    phantom_brain.write_cohort(folder / "heads", 1, seed=0, config=brains)
    head, wanted = phantom_brain.make_patient(brains, 0, 1), protocol.load("brain")
    images = torch.from_numpy(np.stack([head.images[s] for s in wanted.sequences]).astype(np.float32))[None]
    mask = torch.from_numpy(head.mask)[None, None].float()
    images = images / images[:, :, head.mask].std(-1).reshape(1, -1, 1, 1, 1)
    np.save(folder / "image.npy", images.numpy())
    np.save(folder / "mask.npy", mask.numpy())
    np.save(folder / "spacing_mm.npy", (size.head_mm,) * 3)
    for n in (1, len(wanted.sequences)):
        used, spacing = wanted.sequences[:n], (size.head_mm,) * 3
        start = tissues.signature_map(images[:, :n], mask, wanted.visible(used), used, spacing)
        np.save(folder / f"start{n}.npy", start.numpy())


def make_hearts(folder: Path, size: Size) -> None:
    """A cohort as ``deepgmm phantom`` makes it."""
    from monai_deepgmm.phantom import heart as phantom

    phantom.write_cohort(folder, size.patients, seed=0)


def make_slices(folder: Path, size: Size) -> None:
    """Slices of 160×160 voxels, normalised, in double precision as ``deepgmm segment`` has them."""
    import numpy as np

    from monai_deepgmm import protocol
    from monai_deepgmm.images import cropping as transforms
    from monai_deepgmm.images import loading as scan
    from monai_deepgmm.patients import discovery as cohort
    from monai_deepgmm.phantom import heart as phantom

    wanted = protocol.load("infarct")
    hearts = phantom.PhantomConfig(
        spacing_mm=(SLICE_MM, SLICE_MM), slices=(6, 6)
    )  # a crop of 120 mm has 160 voxels then
    phantom.write_cohort(folder / "hearts", -(-size.slices // 6), seed=0, config=hearts)
    found = [transforms.units(scan.load(s, wanted), wanted) for s in cohort.find(folder / "hearts", wanted).studies]
    for name in ("image", "mask"):
        values = np.concatenate([getattr(units, name).numpy() for units in found])[: size.slices]
        np.save(folder / f"{name}.npy", values)


DATA: Mapping[str, Callable[[Path, Size], None]] = {"head": make_head, "hearts": make_hearts, "slices": make_slices}


# The sides: each is given a phantom and returns what is timed --------------------------------------------------------


def head(sequences: int, degree: int) -> Callable[[Path], Work]:
    """Partial volume on the head, with so many sequences and a bias field of such a degree, or 0 for none."""

    def load(folder: Path) -> Work:
        from monai_deepgmm.mixture import partial_volume as pvgmm

        # A copy, so that the sequences that are left out are not held.
        image, mask = tensor(folder / "image.npy")[:, :sequences].clone(), tensor(folder / "mask.npy")
        start, model = tensor(folder / f"start{sequences}.npy"), pvgmm.Model(BORDERS, degree=degree)
        spacing_mm = tensor(folder / "spacing_mm.npy").tolist()

        def work() -> Facts:
            fit = pvgmm.fit(image, mask, start, spacing_mm, model)
            kept = "field kept" if fit.mixture.field is not None else "no field"
            return {
                "shape": f"{int(mask.sum())} voxels × {sequences} of {shown(mask.shape[2:])}",
                "came": f"{int(fit.iterations)} iterations, {kept}{'' if fit.converged.all() else ', not converged'}",
            }

        return work

    return load


def segmented(protocol: str, folders: str) -> Callable[[Path], Work]:
    """The default method, from files to labels; the seconds are those of all patients."""

    def load(folder: Path) -> Work:
        from monai_deepgmm.methods import config
        from monai_deepgmm.patients import discovery as cohort
        from monai_deepgmm.results import segment

        settings = config.build(protocol=protocol)
        patients = cohort.find(folder / folders, settings.protocol).studies

        def work() -> Facts:
            results = [segment.segment(patient, settings) for patient in patients]
            return told(results[0].images, len(patients), settings.method)

        return work

    return load


def processed(folder: Path) -> Work:
    """The same for hearts, and then all that ``deepgmm segment`` writes: labels, sidecars, tables and pages."""
    from monai_deepgmm import batch
    from monai_deepgmm.images import nifti
    from monai_deepgmm.methods import config
    from monai_deepgmm.patients import discovery as cohort

    settings = config.build(protocol="infarct")
    patients = cohort.find(folder, settings.protocol)
    out = tempfile.TemporaryDirectory()

    def work() -> Facts:
        with out as place:
            code = batch.run(patients, Path(place), settings, batch.Plan())
        images = {s: nifti.read(path).data for s, path in patients.studies[0].images.items()}
        return told(images, len(patients.studies), f"{settings.method}, exit code {code}")

    return work


def told(images: Mapping[str, Any], patients: int, came: str) -> Facts:
    """The facts of a cohort: the shape of the first patient's images."""
    shape = shown(next(iter(images.values())).shape)
    return {"shape": f"{patients} patient(s), the first {len(images)} × {shape}", "patients": patients, "came": came}


def ours(covariance: str, *, spatial: bool = False) -> Callable[[Path], Work]:
    """Our EM on all slices at once, from k-means++."""

    def load(folder: Path) -> Work:
        import torch

        from monai_deepgmm.mixture import em

        image, mask = tensor(folder / "image.npy"), tensor(folder / "mask.npy")

        def work() -> Facts:
            began = time.process_time()
            start = em.kmeans_start(image, mask, COMPONENTS, generator=torch.Generator().manual_seed(0))
            start_s = time.process_time() - began
            options = {"spatial": spatial, "covariance": covariance}
            fit = em.fit(image, mask, start, tol=TOL, max_iter=MAX_ITER, **options)  # type: ignore[arg-type]
            facts = of_slices(mask, image.shape, fit.iterations.tolist(), fit.nll.tolist())
            return facts | {"came": f"{facts['came']}; k-means {start_s:.2f} s"}

        return work

    return load


def sklearn(covariance: str) -> Callable[[Path], Work]:
    """scikit-learn's mixture, slice by slice, from its own k-means++, its tolerance as ours."""

    def load(folder: Path) -> Work:
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

    return load


def of_slices(mask: Any, shape: Sequence[int], iterations: Sequence[int], nll: Sequence[float]) -> Facts:
    """The facts of fits to slices ``(B, M, H, W)``."""
    inside = int(mask.sum())
    return {
        "shape": f"{shown(shape)}, {inside} voxels, {COMPONENTS} components",
        "iterations": sum(iterations),
        "came": f"{sum(iterations)} iterations, NLL {sum(nll) / len(nll):.4f}",
    }


def network(folder: Path) -> Work:
    """A patient's way through a trained network: view, U-Net, back, mixture and labels."""
    from monai_deepgmm import protocol
    from monai_deepgmm.images import resampling as view
    from monai_deepgmm.methods import trained_network as model
    from monai_deepgmm.networks import UNet
    from monai_deepgmm.networks import model_spec as spec
    from monai_deepgmm.networks import registry as networks

    wanted = protocol.load("infarct")
    image, mask, spacing_mm = *of_patient(folder), (SLICE_MM, SLICE_MM)
    sequences = wanted.sequences
    tissues = tuple(tissue.name for tissue in wanted.visible(sequences))
    size = view.around(mask, spacing_mm, GRID_MM).size
    trained = spec.Spec(
        protocol=wanted.name,
        normalisation=wanted.normalisation,
        sequences=sequences,
        tissues=tissues,
        network=networks.DEFAULT,
        spatial_dims=2,
        grid_mm=GRID_MM,
        size=size,
        spatial=True,
        covariance="tied",
    )
    unet = networks.fresh(lambda: UNet(2, trained.channels, len(tissues)), 0).eval()

    def work() -> Facts:
        fit = model.fit(unet, trained, image, mask, spacing_mm=spacing_mm)
        return {"shape": shown(image.shape), "came": f"seen as {shown(size)}, {fit.resp.shape[1]} tissues"}

    return work


def forward(folder: Path) -> Work:
    """The U-Net alone, slice by slice on what it would be given."""
    import torch

    from monai_deepgmm.images import resampling as view
    from monai_deepgmm.networks import UNet
    from monai_deepgmm.networks import registry as networks

    image, mask = of_patient(folder)
    seen = view.around(mask, (SLICE_MM, SLICE_MM), GRID_MM)
    inside = view.look(mask.float(), seen, nearest=True)
    given = view.inputs(view.look(image.float(), seen), inside, GRID_MM)
    unet = networks.fresh(lambda: UNet(2, given.shape[1], COMPONENTS), 0).eval()

    def work() -> Facts:
        with torch.no_grad():
            outputs = [unet(one[None]) for one in given]
        parameters = sum(p.numel() for p in unet.parameters())
        return {"shape": shown(given.shape), "came": f"{parameters} parameters, {outputs[0].shape[1]} outputs"}

    return work


def of_patient(folder: Path) -> tuple[Any, Any]:
    """The six slices of the first heart: image and mask."""
    return tensor(folder / "image.npy")[:6], tensor(folder / "mask.npy")[:6]


def tensor(path: Path) -> Any:
    """A saved array."""
    import numpy as np
    import torch

    return torch.from_numpy(np.load(path))


def shown(shape: Sequence[int]) -> str:
    """As 3×160×160."""
    return "×".join(map(str, shape))


_PARTIAL_VOLUME = ("numpy", "monai_deepgmm.mixture.partial_volume")
_EM, _SKLEARN = ("numpy", "monai_deepgmm.mixture.em"), ("numpy", "sklearn.mixture")
_SEGMENT = ("monai_deepgmm.patients.discovery", "monai_deepgmm.results.segment")
_UNET = ("numpy", "monai_deepgmm.methods.trained_network", "monai_deepgmm.networks.registry")
#: Row → its sides.
ROWS: Mapping[str, Mapping[str, Side]] = {
    "head": {
        "pvgmm, 3 sequences": Side("head", _PARTIAL_VOLUME, head(3, 2), "pvgmm, degree=0"),
        "pvgmm, degree=0": Side("head", _PARTIAL_VOLUME, head(3, 0)),
        "pvgmm, T1": Side("head", _PARTIAL_VOLUME, head(1, 2), "pvgmm, 3 sequences"),
    },
    "patient": {"segment, a head": Side("head", _SEGMENT, segmented("brain", "heads"))},
    "em-diag": {
        "GMM, diag": Side("slices", _EM, ours("diag"), "scikit-learn, diag"),
        "scikit-learn, diag": Side("slices", _SKLEARN, sklearn("diag")),
    },
    "em-tied": {
        "GMM, tied": Side("slices", _EM, ours("tied"), "scikit-learn, tied"),
        "SVGMM, tied": Side("slices", _EM, ours("tied", spatial=True), "scikit-learn, tied"),
        "scikit-learn, tied": Side("slices", _SKLEARN, sklearn("tied")),
    },
    "anatomy": {
        "segment, hearts": Side("hearts", _SEGMENT, segmented("infarct", ".")),
        "segment and all files": Side("hearts", (*_SEGMENT, "monai_deepgmm.batch"), processed, "segment, hearts"),
    },
    "network": {
        "a patient": Side("slices", _UNET, network, "U-Net alone"),
        "U-Net alone": Side("slices", _UNET, forward),
    },
}


# One measurement -----------------------------------------------------------------------------------------------------


def measure(side: Side, folder: Path) -> Facts:
    """Measures one side in this process."""
    for module in side.modules:
        importlib.import_module(module)
    imports_mb = peak_mb()
    if "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(1)
    work = side.load(folder)
    loaded_mb = peak_mb()
    cpu_s, wall_s = time.process_time(), time.perf_counter()
    facts = work()
    cpu_s, wall_s = time.process_time() - cpu_s, time.perf_counter() - wall_s
    seconds = {"cpu_s": round(cpu_s, 3), "wall_s": round(wall_s, 3)}
    peaks = {"imports_mb": imports_mb, "loaded_mb": loaded_mb, "peak_mb": peak_mb()}
    return {**facts, **seconds, **{name: round(mb) for name, mb in peaks.items()}}


def peak_mb() -> float:
    """The most that this process has held at a time."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 1e6


class MeasurementError(Exception):
    """A process that made or measured something failed; what it said last."""


def apart(arguments: argparse.Namespace, *here: str) -> str:
    """Has a process of its own make or measure something; what it printed last.

    Raises:
        MeasurementError: it did not end well.
    """
    command = [sys.executable, __file__, str(arguments.OUT), *(["--tiny"] if arguments.tiny else []), "--here", *here]
    done = subprocess.run(command, env=os.environ | dict.fromkeys(THREADS, "1"), capture_output=True, text=True)
    if done.returncode:
        raise MeasurementError((done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1])
    return done.stdout.strip().rpartition("\n")[2]


def here(arguments: argparse.Namespace) -> None:
    """Makes a phantom, or measures a side of a row, and prints it."""
    name, *side = arguments.here
    if not side:
        folder = data(arguments, name)
        with tempfile.TemporaryDirectory(dir=arguments.OUT) as place:
            made = Path(place) / name
            made.mkdir()
            DATA[name](made, TINY if arguments.tiny else FULL)
            made.rename(folder)  # a phantom that is there is whole
        return
    chosen = ROWS[name][side[0]]
    print(json.dumps(measure(chosen, data(arguments, chosen.data))))


def data(arguments: argparse.Namespace, name: str) -> Path:
    """Where a phantom lies."""
    return Path(arguments.OUT, f"{name}-tiny" if arguments.tiny else name)


# All of them ---------------------------------------------------------------------------------------------------------


def measured(arguments: argparse.Namespace, row: str) -> Facts:
    """A row, from OUT or anew.

    Raises:
        MeasurementError: one of its sides could not be measured.
    """
    path = arguments.OUT / f"{row}.json"
    asked = {"row": row, "tiny": arguments.tiny, "repeats": arguments.repeats}
    found = earlier(path)
    if found.get("asked") == asked:
        return found
    sides = ROWS[row]
    for name in dict.fromkeys(side.data for side in sides.values()):
        if not data(arguments, name).is_dir():
            apart(arguments, name)
    before = load()
    runs: dict[str, list[Facts]] = {name: [] for name in sides}
    for _ in range(arguments.repeats):
        for name in sides:  # in turns, so that what else the machine does hits all sides alike
            runs[name].append(json.loads(apart(arguments, row, name)))
    when = datetime.now(UTC).isoformat(timespec="seconds")
    made = {"asked": asked, "machine": machine(), "load": [before, load()], "when": when, "runs": runs}
    beside = path.with_suffix(".part")
    beside.write_text(json.dumps(made, indent=1) + "\n", encoding="utf-8")
    beside.replace(path)
    return made


def earlier(path: Path) -> Facts:
    """A row of an earlier run; empty if there is none."""
    try:
        found: Facts = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found


def machine() -> str:
    """The processor, its cores, Python and the packages that matter."""
    model = platform.processor() or platform.machine()
    try:
        found = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(encoding="utf-8"), re.MULTILINE)
        model = found[1] if found else model
    except OSError:
        pass  # only Linux has it
    versions = ", ".join(f"{name} {metadata.version(name)}" for name in PACKAGES)
    system = f"{platform.system()}, Python {platform.python_version()}"
    return f"{model}, {os.cpu_count()} cores, 1 thread; {system}, {versions}"


def load() -> float:
    """How many processes wanted a core, on average over the last minute."""
    return round(os.getloadavg()[0], 1)


# What is printed -----------------------------------------------------------------------------------------------------


def spread(values: Sequence[float], digits: int) -> str:
    """The median, then the least and the most."""
    least, most = (f"{one:.{digits}f}" for one in (min(values), max(values)))
    return f"{median(values):.{digits}f}" + (f" ({least}-{most})" if least != most else "")


def each(runs: Sequence[Mapping[str, Any]], key: str) -> list[float]:
    """One number of every run; seconds are those of one patient."""
    return [float(run[key]) / (run.get("patients", 1) if key.endswith("_s") else 1) for run in runs]


def ratio(runs: Mapping[str, Sequence[Mapping[str, Any]]], name: str, other: str | None) -> str:
    """The CPU seconds of a side and of that beside it, and how they compare; per iteration too, where both count."""
    if other is None:
        return ""
    mine, theirs = (median(each(runs[side], "cpu_s")) for side in (name, other))
    said = f"{mine:.2f} / {theirs:.2f} = {mine / max(theirs, 1e-9):.2f} × {other}"
    steps = [runs[side][0].get("iterations", 0) for side in (name, other)]
    if all(steps):
        a, b = (1e3 * one / n for one, n in zip((mine, theirs), steps, strict=True))
        said += f"; divided by iterations {a:.2f} / {b:.2f} ms = {a / max(b, 1e-9):.2f}"
    return said


def table(rows: Sequence[Facts]) -> str:
    """One line for each side, in Markdown; seconds are those of one patient."""
    head = ["row", "what", "shape", "CPU s", "wall s", "peak MB", "after imports", "came of it", "CPU s, both sides"]
    lines = [head, ["---", "---", "---", *["---:"] * 4, "---", "---"]]
    for found in rows:
        row, runs = found["asked"]["row"], found["runs"]
        for name, of_side in runs.items():
            seconds = [spread(each(of_side, key), 2) for key in ("cpu_s", "wall_s")]
            peaks = [spread(each(of_side, key), 0) for key in ("peak_mb", "imports_mb")]
            first, beside = of_side[0], ratio(runs, name, ROWS[row][name].beside)
            lines.append([row, name, first["shape"], *seconds, *peaks, first["came"], beside])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def about(rows: Sequence[Facts]) -> str:
    """The machines, and how busy they were."""
    machines = dict.fromkeys(found["machine"] for found in rows)
    loads = [one for found in rows for one in found["load"]]
    days = sorted({found["when"][:10] for found in rows})
    repeats = rows[0]["asked"]["repeats"]
    return "\n".join([*machines, f"load {min(loads)} to {max(loads)}; {repeats} run(s) of each; {', '.join(days)}"])


def tables(arguments: argparse.Namespace) -> Iterator[Facts]:
    """The rows that could be measured; of the others, why not."""
    for row in arguments.only:
        try:
            yield measured(arguments, row)
        except MeasurementError as error:
            print(f"left out: {row}: {error}", file=sys.stderr)


def parser() -> argparse.ArgumentParser:
    """The arguments."""
    known = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    known.add_argument("OUT", type=Path, nargs="?", default=Path("benchmark"), help="default: %(default)s")
    known.add_argument("--only", nargs="+", metavar="NAME", choices=ROWS, default=list(ROWS), help=", ".join(ROWS))
    known.add_argument("--repeats", type=int, default=3, help="runs of each side; default: %(default)s")
    known.add_argument("--tiny", action="store_true", help=argparse.SUPPRESS)
    known.add_argument("--here", nargs="+", help=argparse.SUPPRESS)  # how the script calls itself
    return known


def main(argv: Sequence[str] | None = None) -> int:
    """Measures what is not measured yet, prints the table and returns the exit code."""
    arguments = parser().parse_args(argv)
    if arguments.here:
        here(arguments)
        return 0
    if arguments.repeats < 1:
        print(f"--repeats: got {arguments.repeats}, expected at least 1", file=sys.stderr)
        return 2
    arguments.OUT.mkdir(parents=True, exist_ok=True)
    rows = list(tables(arguments))
    if not rows:
        print("nothing could be measured", file=sys.stderr)
        return 2
    print(f"{about(rows)}\n\n{table(rows)}")
    return int(len(rows) < len(arguments.only))


if __name__ == "__main__":
    sys.exit(main())
