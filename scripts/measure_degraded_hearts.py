"""What a worse scan costs: Dice on hearts that are made worse in the ways of other scanners and other hands.

``python scripts/measure_degraded_hearts.py DIR OUT [--patients N] [--only WORDS] [--set KEY=VALUE]`` makes each
labelled heart of DIR worse in each way, segments it with the default method in the reader's mask, looks for the mask
without it, and prints one table. What is done is kept in OUT for as long as files, code and settings are the same, so
that the same command goes on.
"""

from __future__ import annotations

import dataclasses
import json
import sys
import tempfile
import zlib
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import measure_accuracy
import nibabel as nib
import numpy as np
import runner
from measure_sets import hearts
from nibabel.affines import voxel_sizes
from numpy.typing import NDArray
from runner import Facts
from scipy import ndimage

from monai_deepgmm.errors import StudyError
from monai_deepgmm.images import labels as reference_labels
from monai_deepgmm.images import loading, nifti
from monai_deepgmm.patients.study import Study

Floats = NDArray[np.float64]
Labels = NDArray[np.uint8]
#: Steps from voxel to voxel in a slice.
IN_PLANE = ndimage.generate_binary_structure(2, 1)[..., None]
#: The values of noise, shading and curves are told in shares of what lies between these quantiles inside the mask.
LOW, HIGH = 2, 98
COLUMNS = ("blood", "myocardium", "edema", "scar")


class Image(NamedTuple):
    """One sequence ``(X, Y, Z)``, slices along Z, and where it lies (4, 4)."""

    values: Floats
    affine: Floats

    @property
    def pixel_mm(self) -> Floats:
        """The sizes along X and Y."""
        sizes: Floats = voxel_sizes(self.affine)[:2]
        return sizes


class Heart(NamedTuple):
    """A heart.

    Attributes:
        images: sequence → image; the first is the reference.
        mask: on the reference's grid.
        labels: on the reference's grid.
    """

    images: Mapping[str, Image]
    mask: NDArray[np.bool_]
    labels: Labels

    def on(self, change: Callable[[Floats, str], Floats]) -> Heart:
        """With the values of all sequences changed."""
        return self._replace(images={s: i._replace(values=change(i.values, s)) for s, i in self.images.items()})

    def range(self, sequence: str) -> tuple[float, float]:
        """Its darkest and its brightest values inside the mask, where they share a grid, or in all."""
        values = self.images[sequence].values
        low, high = np.percentile(values[self.mask] if values.shape == self.mask.shape else values, (LOW, HIGH))
        return float(low), float(high - low)


Way = Callable[[Heart, np.random.Generator], Heart]


# Ways to make a heart worse ------------------------------------------------------------------------------------------


def noisy(share: float) -> Way:
    """Gaussian noise of such a share of the range."""

    def change(heart: Heart, rng: np.random.Generator) -> Heart:
        return heart.on(lambda v, s: v + rng.normal(0, share * heart.range(s)[1], v.shape))

    return change


def shaded(share: float) -> Way:
    """From one side of the ventricle to the other brighter by such a share; each sequence from another side."""

    def change(heart: Heart, rng: np.random.Generator) -> Heart:
        places = np.argwhere(heart.mask)
        across = float(np.ptp(places[:, :2], axis=0).max())

        def field(values: Floats, sequence: str) -> Floats:
            angle, (low, _) = rng.uniform(0, 2 * np.pi), heart.range(sequence)
            x, y = (np.arange(n) - c for n, c in zip(values.shape[:2], places.mean(0)[:2], strict=True))
            along = (np.cos(angle) * x[:, None] + np.sin(angle) * y) / across
            return low + (values - low) * np.exp(np.log1p(share) * along)[..., None]

        return heart.on(field)

    return change


def blurred(sigma_mm: float) -> Way:
    """Smoothed in the plane by a Gaussian of such a standard deviation."""

    def change(heart: Heart, _: np.random.Generator) -> Heart:
        images = {
            s: i._replace(values=ndimage.gaussian_filter(i.values, (*(sigma_mm / i.pixel_mm), 0)))
            for s, i in heart.images.items()
        }
        return heart._replace(images=images)

    return change


def pixels(mm: float, *sequences: str) -> Way:
    """Of all sequences, or of some, on a grid of their own, pixels of such a size."""

    def change(heart: Heart, _: np.random.Generator) -> Heart:
        chosen = sequences or tuple(heart.images)
        first = next(iter(heart.images))
        images = {s: _zoomed(i, mm) if s in chosen else i for s, i in heart.images.items()}
        if first not in chosen:
            return heart._replace(images=images)
        labels, mask = (
            _zoomed(Image(part.astype(float), heart.images[first].affine), mm, order=0).values.astype(part.dtype)
            for part in (heart.labels, heart.mask)
        )
        return Heart(images, mask, labels)

    return change


def _zoomed(image: Image, mm: float, order: int = 1) -> Image:
    """An image with square pixels of such a size; before it is thinned out, it is smoothed."""
    factor = image.pixel_mm / mm
    values = image.values
    if order and factor.max() < 1:
        values = ndimage.gaussian_filter(values, (*(0.4 / factor), 0))
    made = ndimage.zoom(values, (*factor, 1), order=order, grid_mode=True, mode="nearest")
    step = np.array(image.values.shape) / made.shape
    affine = image.affine.copy()
    affine[:3, :3] = image.affine[:3, :3] * step
    affine[:3, 3] += image.affine[:3, :3] @ ((step - 1) / 2)
    return Image(made, affine)


def quantised(levels: int) -> Way:
    """Whole numbers up to so many, as an export in few bits has them; the brightest half per cent is cut off."""

    def change(heart: Heart, _: np.random.Generator) -> Heart:
        def rounded(values: Floats, _: str) -> Floats:
            low, high = np.percentile(values, (0.5, 99.5))
            made: Floats = np.rint(((values - low) / (high - low)).clip(0, 1) * levels)
            return made

        return heart.on(rounded)

    return change


def curved(power: float) -> Way:
    """Another curve from signal to value."""

    def change(heart: Heart, _: np.random.Generator) -> Heart:
        def bent(values: Floats, _: str) -> Floats:
            lowest = values.min()
            made: Floats = ((values - lowest) / np.ptp(values)) ** power
            return made

        return heart.on(bent)

    return change


def signed(heart: Heart, _: np.random.Generator) -> Heart:
    """Late enhancement as PSIR often is stored: 0 lies between healthy wall and blood."""
    middle = float(np.median(heart.images["LGE"].values[heart.mask]))
    return heart.on(lambda v, s: v - middle if s == "LGE" else v)


def turned(degrees: float) -> Way:
    """The patient, or the plane, lies otherwise: turned within the slices."""

    def change(heart: Heart, _: np.random.Generator) -> Heart:
        def about(values: NDArray[Any], order: int) -> NDArray[Any]:
            turned: NDArray[Any] = ndimage.rotate(values, degrees, reshape=False, order=order, mode="nearest")
            return turned

        labels, mask = (about(part.astype(np.uint8), 0) for part in (heart.labels, heart.mask))
        return heart.on(lambda v, _: about(v, 1))._replace(labels=labels, mask=mask > 0)

    return change


def masked(voxels: int) -> Way:
    """The mask so many voxels too large, or too small."""

    def change(heart: Heart, _: np.random.Generator) -> Heart:
        moved = ndimage.binary_dilation if voxels > 0 else ndimage.binary_erosion
        return heart._replace(mask=moved(heart.mask, IN_PLANE, iterations=abs(voxels)))

    return change


def sliced(choice: Callable[[Sequence[int]], Sequence[int]]) -> Way:
    """Some of the slices that hold the mask."""

    def change(heart: Heart, _: np.random.Generator) -> Heart:
        kept = list(choice(np.flatnonzero(heart.mask.any((0, 1))).tolist()))
        step = kept[1] - kept[0] if len(kept) > 1 else 1
        images = {}
        for sequence, image in heart.images.items():
            affine = image.affine.copy()
            affine[:3, 3] += affine[:3, 2] * kept[0]
            affine[:3, 2] *= step
            images[sequence] = Image(image.values[..., kept], affine)
        return Heart(images, heart.mask[..., kept], heart.labels[..., kept])

    return change


WAYS: Mapping[str, Way] = {
    "as it is": lambda heart, _: heart,
    "noise of 5 % of the range": noisy(0.05),
    "noise of 10 %": noisy(0.1),
    "noise of 20 %": noisy(0.2),
    "shaded by 20 %": shaded(0.2),
    "shaded by 50 %": shaded(0.5),
    "blurred by 1.3 mm": blurred(1.3),
    "pixels of 1.4 mm": pixels(1.4),
    "pixels of 1.4 mm, T2 and bSSFP alone": pixels(1.4, "T2", "bSSFP"),
    "pixels of 0.5 mm": pixels(0.5),
    "255 grey levels": quantised(255),
    "60 grey levels": quantised(60),
    "values to the power of .7": curved(0.7),
    "values to the power of 1.4": curved(1.4),
    "LGE signed": signed,
    "turned by 37°": turned(37),
    "mask 1 voxel too large": masked(1),
    "mask 1 voxel too small": masked(-1),
    "every second slice": sliced(lambda slices: slices[::2]),
    "the middle slice alone": sliced(lambda slices: slices[len(slices) // 2 :][:1]),
}


# Measuring -----------------------------------------------------------------------------------------------------------


def read(study: Study) -> Heart:
    """A patient's images, mask and reference labels, slices last."""
    scan, wanted = loading.load(study, hearts.asked().protocol, align="off"), hearts.asked().protocol
    volumes = {s: nifti.read(path) for s, path in study.images.items()}
    if any(int(np.argmax(voxel_sizes(v.affine))) != 2 for v in volumes.values()):
        raise StudyError("E_FILE", "the slices do not lie along the third axis", "Choose another cohort")
    real = reference_labels.read(study, wanted, scan.sequences, like=scan.reference).labels
    images = {s: Image(v.data.astype(float), np.asarray(v.affine, dtype=float)) for s, v in volumes.items()}
    return Heart(images, scan.mask.reshape(real.shape), real.astype(np.uint8))


def written(heart: Heart, folder: Path) -> Study:
    """A heart as files."""
    first = next(iter(heart.images.values()))
    files = {s: (i.values.astype(np.float32), i.affine) for s, i in heart.images.items()}
    files |= {"mask": (heart.mask.astype(np.uint8), first.affine), "truth": (heart.labels, first.affine)}
    paths = {name: folder / f"{name}.nii.gz" for name in files}
    for name, (values, affine) in files.items():
        nib.save(nib.Nifti1Image(values, affine), paths[name])
    return Study("heart", {s: paths[s] for s in heart.images}, mask=paths["mask"], truth=paths["truth"])


def measured(way: Way, whole: Heart, name: str, settings: Sequence[str]) -> Facts:
    """One heart made worse in one way: Dice of its slices, what was painted, warnings, and the mask that is found."""
    from monai_deepgmm.methods import config
    from monai_deepgmm.results.segment import segment

    made = way(whole, np.random.default_rng(zlib.crc32(name.encode())))
    with tempfile.TemporaryDirectory() as folder:
        study = written(made, Path(folder))
        found = segment(study, config.build(settings=settings))
        run = hearts.Run(found.reference, found.labels.astype(np.int64), tuple(found.images), found.slice_axis)
        wanted = hearts.asked().protocol
        rows = list(hearts.by_slice(run.labels, hearts.known(study, wanted, run), run, wanted))
        alone = dataclasses.replace(study, mask=None, mask_rule="auto")
        try:
            mask = loading.load(alone, wanted).mask.reshape(made.labels.shape)
            pairs = [(a, b) for a, b in zip(np.moveaxis(mask, 2, 0), np.moveaxis(made.labels > 0, 2, 0), strict=True)]
            masks = [float(2 * (a & b).sum() / (a.sum() + b.sum())) for a, b in pairs if b.any()]
        except StudyError as error:
            masks = [error.code]
    return {"slices": rows, "masks": masks, "codes": sorted({w.split(":")[0] for w in found.warnings})}


def patient(study: Study, out: Path, only: str, settings: Sequence[str]) -> dict[str, Facts]:
    """All that is asked of one patient, by what was made worse."""
    whole = read(study)
    asked = {"files": runner.stamps([*study.images.values(), study.truth]), "code": measure_accuracy.code_digest()}
    asked["settings"] = list(settings)

    def made(name: str, way: Way) -> Facts:
        return json.loads(json.dumps(measured(way, whole, study.patient, settings)))

    return {
        name: runner.kept(out / study.patient / f"{name}.json", asked, lambda name=name, way=way: made(name, way))
        for name, way in WAYS.items()
        if only in name
    }


def table(found: Mapping[str, Mapping[str, Facts]]) -> str:
    """The means over slices; a warning with how many patients have it."""
    rows = [["made worse", *COLUMNS, "scar where none is", "mask found", "refused", "warnings"]]
    for name in next(iter(found.values())):
        each = [facts[name] for facts in found.values()]
        slices = [row for facts in each for row in facts["slices"]]
        dice = [runner.shown(runner.mean(row["dice"].get(t) for row in slices)) for t in COLUMNS]
        painted = runner.mean(row["painted"].get(hearts.SCAR) for row in slices)
        masks = [value for facts in each for value in facts["masks"] if isinstance(value, float)]
        refused = sum(isinstance(value, str) for facts in each for value in facts["masks"])
        codes = Counter(code for facts in each for code in facts["codes"])
        told = ", ".join(f"{code} {n}" for code, n in sorted(codes.items()))
        rows.append([name, *dice, runner.shown(painted), runner.shown(runner.mean(masks)), str(refused), told])
    return runner.table(rows)


def main(words: Sequence[str] | None = None) -> int:
    """Prints the table; returns the exit code."""
    parser = runner.parser(__doc__)
    parser.add_argument("folder", type=Path, metavar="DIR")
    parser.add_argument("out", type=Path, metavar="OUT")
    parser.add_argument("--patients", type=int, metavar="N", help="the first N of them")
    parser.add_argument("--only", default="", metavar="WORDS", help="only the ways whose name holds these words")
    parser.add_argument("--set", nargs="+", default=[], metavar="KEY=VALUE", dest="settings", help="of the method")
    asked = parser.parse_args(words)

    def work() -> None:
        chosen = hearts.studies(asked.folder)[: asked.patients]
        print(table({s.patient: patient(s, asked.out, asked.only, asked.settings) for s in chosen}))
        print(f"\n{runner.machine_line(runner.machine())}")

    return runner.ended("measure_degraded_hearts", work)


if __name__ == "__main__":
    sys.exit(main())
