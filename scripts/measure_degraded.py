"""What a worse scan costs: Dice of grey and white matter on brains that are made worse in the ways of other scanners.

``python scripts/measure_degraded.py DIR OUT [--patients 4] [--only WORDS]`` reads brains from DIR (OASIS's own names,
or any layout of the command), makes each worse in each way, segments it with the default method, and prints one table.
What is done is kept in OUT, so that the same command goes on. T1 alone is compared with the reference labels; T2 and
FLAIR, where a patient has them, are made worse too, and the labels compared with those of the patient as it was.
"""

from __future__ import annotations

import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import nibabel as nib
import numpy as np
import runner
from measure_sets import brains
from numpy.typing import NDArray
from runner import Facts
from scipy.ndimage import binary_dilation, binary_erosion, distance_transform_edt, gaussian_filter, map_coordinates

from monai_deepgmm.images import labels as reference_labels
from monai_deepgmm.images import nifti
from monai_deepgmm.patients.study import Study

Floats = NDArray[np.float32]
Bools = NDArray[np.bool_]
Labels = NDArray[np.uint8]
GM, WM, CSF = 1, 2, 3
TISSUES = {"GM": GM, "WM": WM}
SEED = 0
#: A warning that every brain of one sequence has.
USUAL = "W_MISSING"


class Head(NamedTuple):
    """One brain, with the slice axis last for axial and second for coronal slices, as R or L, A, S are stored.

    Attributes:
        images: sequence → ``(X, Y, Z)``; 0 outside the mask.
        mask: ``(X, Y, Z)``.
        labels: those that the result is compared with, 0 where there is none ``(X, Y, Z)``.
        spacing_mm: of the axes.
    """

    images: Mapping[str, Floats]
    mask: Bools
    labels: Labels
    spacing_mm: tuple[float, ...]

    def on(self, change: Callable[[Floats], Floats], *sequences: str) -> Head:
        """With some sequences changed; none named: T1."""
        named = sequences or ("T1",)
        changed = {s: np.where(self.mask, change(v), 0) if s in named else v for s, v in self.images.items()}
        return self._replace(images=changed)

    def white(self, sequence: str = "T1") -> float:
        """The median of white matter, or of all where none is labelled."""
        where = self.labels == WM
        return float(np.median(self.images[sequence][where if where.any() else self.mask]))


Way = Callable[[Head, np.random.Generator], Head]


# Ways to make a head worse: the grid ---------------------------------------------------------------------------------


def thicker(axis: int, mm: float) -> Way:
    """Slices so thick along an axis; a label is what a voxel holds most of."""

    def change(head: Head, _: np.random.Generator) -> Head:
        step = mm / head.spacing_mm[axis]
        edges = np.arange(0, head.mask.shape[axis] + 1e-6, step)

        def averaged(values: NDArray[Any]) -> Floats:
            total = np.cumsum(np.moveaxis(values, axis, 0).astype(np.float64), 0)
            total = np.concatenate([np.zeros_like(total[:1]), total])
            low = np.floor(edges).astype(int)
            at = total[low] + (edges - low)[:, None, None] * (total[np.minimum(low + 1, len(total) - 1)] - total[low])
            return np.moveaxis(np.diff(at, axis=0) / step, 0, axis).astype(np.float32)

        held = np.stack([averaged(head.labels == k) for k in (0, GM, WM, CSF)])
        inside = averaged(head.mask) >= 0.5
        images = {s: np.where(inside, averaged(v), 0) for s, v in head.images.items()}
        spacing = tuple(mm if i == axis else s for i, s in enumerate(head.spacing_mm))
        return Head(images, inside, np.where(inside, held.argmax(0), 0).astype(np.uint8), spacing)

    return change


def resampled(mm: float, *sequences: str) -> Way:
    """Sequences of axial slices so thick, brought back to the grid by interpolation."""

    def change(head: Head, rng: np.random.Generator) -> Head:
        coarse = thicker(2, mm)(head, rng)
        step = mm / head.spacing_mm[2]
        at = np.clip((np.arange(head.mask.shape[2]) + 0.5) / step - 0.5, 0, coarse.mask.shape[2] - 1)
        low = np.floor(at).astype(int)
        high, part = np.minimum(low + 1, coarse.mask.shape[2] - 1), (at - low).astype(np.float32)
        images = {
            s: np.where(head.mask, coarse.images[s][..., low] * (1 - part) + coarse.images[s][..., high] * part, 0)
            if s in sequences
            else v
            for s, v in head.images.items()
        }
        return head._replace(images=images)

    return change


def cut(part: slice, axis: int = 2) -> Way:
    """Only some tenths of the brain's extent along an axis."""

    def change(head: Head, _: np.random.Generator) -> Head:
        where = np.flatnonzero(head.mask.any(tuple(i for i in range(3) if i != axis)))
        low, high = (where[0] + (where[-1] + 1 - where[0]) * (n or 0) // 10 for n in (part.start, part.stop or 10))
        kept = (slice(None),) * axis + (slice(low, high),)
        return Head({s: v[kept] for s, v in head.images.items()}, head.mask[kept], head.labels[kept], head.spacing_mm)

    return change


def wider(head: Head, _: np.random.Generator) -> Head:
    """Ventricles that are wider by 9 mm: what lies around them is pushed aside, as in old age."""
    middle = np.argwhere(head.mask).mean(0)
    spacing = np.array(head.spacing_mm)
    axes = [(np.arange(n) - c) * s for n, c, s in zip(head.mask.shape, middle, spacing, strict=True)]
    offset = np.stack(np.meshgrid(*axes, indexing="ij"))
    away = np.sqrt(((offset / np.array([12.0, 28.0, 14.0])[:, None, None, None]) ** 2).sum(0))
    pull = np.where(away > 0, np.clip(1 - 0.55 * np.exp(-((away / 1.6) ** 2)), 0, 1), 1)
    at = offset * pull / spacing[:, None, None, None] + middle[:, None, None, None]
    moved = {s: map_coordinates(v, at, order=1) for s, v in head.images.items()}
    images = {s: np.where(head.mask, v, 0).astype(np.float32) for s, v in moved.items()}
    labels = map_coordinates(head.labels, at, order=0)
    return head._replace(images=images, labels=np.where(head.mask, labels, 0).astype(np.uint8))


def masked(voxels: int) -> Way:
    """A mask that is so many voxels too large, or too small; what is beyond the brain is 0."""

    def change(head: Head, _: np.random.Generator) -> Head:
        moved = binary_dilation if voxels > 0 else binary_erosion
        return head._replace(mask=moved(head.mask, iterations=abs(voxels)))

    return change


# Ways to make a head worse: the values -------------------------------------------------------------------------------


def shaded(share: float, *sequences: str) -> Way:
    """A smooth field of degree 3 whose largest value is so far from 1."""

    def change(head: Head, rng: np.random.Generator) -> Head:
        axes = [np.linspace(-1, 1, n) for n in head.mask.shape]
        field = np.zeros(head.mask.shape)
        for i in range(4):
            for j in range(4 - i):
                for k in range(4 - i - j):
                    if i + j + k:
                        weight = rng.normal() / (i + j + k)
                        terms = (axis**p for axis, p in zip(axes, (i, j, k), strict=True))
                        field += weight * np.einsum("i,j,k->ijk", *terms)
        field -= field[head.mask].mean()
        field = (1 + share * field / np.abs(field[head.mask]).max()).astype(np.float32)
        return head.on(lambda v: v * field, *sequences)

    return change


def interleaved(share: float, axis: int) -> Way:
    """Every other slice brighter by such a share."""

    def change(head: Head, _: np.random.Generator) -> Head:
        gain = 1 + share * (np.arange(head.mask.shape[axis]) % 2)
        return head.on(lambda v: v * np.expand_dims(gain, [i for i in range(3) if i != axis]).astype(np.float32))

    return change


def by_slice(share: float, axis: int) -> Way:
    """Each slice with a gain of its own, of such a standard deviation."""

    def change(head: Head, rng: np.random.Generator) -> Head:
        gain = 1 + share * rng.standard_normal(head.mask.shape[axis])
        return head.on(lambda v: v * np.expand_dims(gain, [i for i in range(3) if i != axis]).astype(np.float32))

    return change


def noisy(share: float) -> Way:
    """Noise of a magnitude image, of such a share of white matter's signal."""

    def change(head: Head, rng: np.random.Generator) -> Head:
        real, imaginary = share * head.white() * rng.standard_normal((2, *head.mask.shape))
        return head.on(lambda v: np.hypot(v + real, imaginary).astype(np.float32))

    return change


def quantised(levels: int) -> Way:
    """Whole numbers from 1 to so many."""

    def change(head: Head, _: np.random.Generator) -> Head:
        top = float(np.percentile(head.images["T1"][head.mask], 99.9))
        return head.on(lambda v: np.clip(np.rint(v / top * levels), 1, levels).astype(np.float32))

    return change


def flat(head: Head, _: np.random.Generator) -> Head:
    """Half of the contrast, with 3 % noise: every value halfway to white matter's."""
    white = head.white()
    return noisy(0.03)(head.on(lambda v: (v + white) / 2), np.random.default_rng(SEED))


def vessels(head: Head, rng: np.random.Generator) -> Head:
    """Bright vessels in and around the cortex, as after gadolinium: 0.7 % of the voxels, twice as bright."""
    field = gaussian_filter(rng.standard_normal(head.mask.shape).astype(np.float32), 4)
    other = gaussian_filter(rng.standard_normal(head.mask.shape).astype(np.float32), 4)
    near = distance_transform_edt(head.mask) < 20
    lines = np.hypot(field / field.std(), other / other.std())
    inside = head.mask & near
    tubes = inside & (lines < np.quantile(lines[inside], 0.007 * head.mask.sum() / inside.sum()))
    return head.on(lambda v: np.where(tubes, np.maximum(v, head.white()) * 2, v).astype(np.float32))


def residue(head: Head, rng: np.random.Generator) -> Head:
    """FLAIR with rests of the skull: patches of the outermost 3 mm, three times as bright as the brain."""
    field = gaussian_filter(rng.standard_normal(head.mask.shape).astype(np.float32), 6)
    rim = head.mask & (distance_transform_edt(head.mask, sampling=head.spacing_mm) <= 3) & (field > 0.5 * field.std())
    return head.on(lambda v: np.where(rim, 3 * head.white("FLAIR"), v).astype(np.float32), "FLAIR")


def inverted(head: Head, _: np.random.Generator) -> Head:
    """White matter darker than grey, as in infants: must be flagged."""
    grey = float(np.median(head.images["T1"][head.labels == GM]))
    middle = (grey + head.white()) / 2
    dark = grey - 0.5 * (head.white() - grey)
    return head.on(lambda v: np.where(v > dark, 2 * middle - v, v).clip(1).astype(np.float32))


def all_of(*ways: Way) -> Way:
    """One after the other."""

    def change(head: Head, rng: np.random.Generator) -> Head:
        for way in ways:
            head = way(head, rng)
        return head

    return change


T1_WAYS: Mapping[str, Way] = {
    "as it is": lambda head, _: head,
    "coronal slices of 1.5 mm": thicker(1, 1.5),
    "coronal slices of 3 mm": thicker(1, 3.0),
    "axial slices of 3 mm": thicker(2, 3.0),
    "axial slices of 5 mm": thicker(2, 5.0),
    "shaded by 20 %": shaded(0.2),
    "shaded by 40 %": shaded(0.4),
    "shaded by 60 %": shaded(0.6),
    "every other coronal slice brighter by 10 %": interleaved(0.1, 1),
    "every other coronal slice brighter by 15 %": interleaved(0.15, 1),
    "each axial slice with a gain of its own, 5 %": by_slice(0.05, 2),
    "noise of 4 % of WM": noisy(0.04),
    "noise of 8 % of WM": noisy(0.08),
    "120 grey levels": quantised(120),
    "40 grey levels": quantised(40),
    "half of the contrast, 3 % noise": flat,
    "mask 1 voxel too small": masked(-1),
    "mask 1 voxel too large": masked(1),
    "wide ventricles": wider,
    "without the top fifth": cut(slice(0, 8)),
    "without the lower three tenths": cut(slice(3, None)),
    "bright vessels": vessels,
    "1.5 mm, 30 % shading, 10 % every other slice, 4 % noise, 120 levels": all_of(
        thicker(1, 1.5), shaded(0.3), interleaved(0.1, 1), noisy(0.04), quantised(120)
    ),
    "contrast inverted": inverted,
}
OTHER_WAYS: Mapping[str, Way] = {
    "as it is": lambda head, _: head,
    "T2 of 5 mm": resampled(5.0, "T2"),
    "FLAIR of 5 mm": resampled(5.0, "FLAIR"),
    "T2 and FLAIR of 5 mm": resampled(5.0, "T2", "FLAIR"),
    "FLAIR with rests of the skull": residue,
    "each shaded by 30 %": all_of(shaded(0.3, "T1"), shaded(0.3, "T2"), shaded(0.3, "FLAIR")),
}


# Measuring -----------------------------------------------------------------------------------------------------------


def read(study: Study) -> Head:
    """A patient's brain; without reference labels the labels are 0."""
    volumes = {s: nifti.read(path) for s, path in study.images.items()}
    t1 = volumes["T1"]
    labels = np.zeros(t1.data.shape, np.uint8)
    if study.truth is not None:
        labels = reference_labels.read(study, brains.asked().protocol, ("T1",), like=t1).labels.astype(np.uint8)
    images = {s: v.data.astype(np.float32) for s, v in volumes.items()}
    return Head(images, images["T1"] != 0, labels, tuple(map(float, nib.affines.voxel_sizes(t1.affine))))


def segmented(made: Head, sequences: Sequence[str]) -> tuple[Labels, list[str]]:
    """The labels of some sequences by the default method, and the codes of its warnings."""
    from monai_deepgmm.results.segment import segment

    with tempfile.TemporaryDirectory() as folder:
        paths = {name: Path(folder) / f"{name}.nii.gz" for name in (*sequences, "mask")}
        for name, path in paths.items():
            values = made.mask.astype(np.uint8) if name == "mask" else made.images[name].astype(np.float32)
            nib.save(nib.Nifti1Image(values, np.diag([*made.spacing_mm, 1.0])), path)
        study = Study("head", {s: paths[s] for s in sequences}, mask=paths["mask"])
        found = segment(study, brains.asked())
        return found.labels.astype(np.uint8), sorted({w.split(":")[0] for w in found.warnings})


def measured(way: Way, whole: Head, sequences: Sequence[str]) -> Facts:
    """One head made worse in one way: Dice where there are labels, grey matter's share, warnings."""
    made = way(whole, np.random.default_rng(SEED))
    found, codes = segmented(made, sequences)
    known = (made.labels > 0) & made.mask
    dice = runner.dice(found[known].astype(np.int64), made.labels[known].astype(np.int64), TISSUES, needed=False)
    return {"dice": dice, "grey": float((found == GM).sum() / made.mask.sum()), "codes": codes}


def patient(study: Study, out: Path, only: str) -> dict[str, dict[str, Facts]]:
    """All that is asked of one patient, by what was made worse."""
    whole, found = read(study), {}
    kinds = {"T1": (T1_WAYS, ("T1",))} if whole.labels.any() else {}
    if len(study.images) > 1:
        kinds["+".join(study.images)] = (OTHER_WAYS, tuple(study.images))
    for kind, (ways, sequences) in kinds.items():
        one = whole
        if len(sequences) > 1:  # in this case the result itself, of the patient as it was, is what others are held to
            labels, _ = segmented(whole, sequences)
            one = whole._replace(labels=labels)
        found[kind] = {
            name: runner.kept(
                out / study.patient / f"{kind} {name.replace('/', ' ')}.json",
                {"files": runner.stamps(study.images.values())},
                lambda way=way, one=one, sequences=sequences: measured(way, one, sequences),
            )
            for name, way in ways.items()
            if only in name
        }
    return found


def table(found: Mapping[str, Mapping[str, Mapping[str, Facts]]]) -> list[str]:
    """The means over patients in Markdown; a warning with how many patients have it."""
    lines = []
    for kind in dict.fromkeys(kind for facts in found.values() for kind in facts):
        heads = [facts[kind] for facts in found.values() if kind in facts]
        lines += [
            "",
            f"| {kind}, {len(heads)} brains | GM | WM | GM of the mask | warnings |",
            "|---|---:|---:|---:|---|",
        ]
        for name in heads[0]:
            each = [facts[name] for facts in heads]
            codes = Counter(code for facts in each for code in facts["codes"] if code != USUAL)
            told = ", ".join(f"{code} {n}" for code, n in sorted(codes.items()))
            dice = [f"{runner.mean(facts['dice'][t] for facts in each):.3f}" for t in TISSUES]
            lines.append(f"| {name} | {' | '.join(dice)} | {runner.mean(f['grey'] for f in each):.0%} | {told} |")
    return lines


def studies(folder: Path) -> Sequence[Study]:
    """OASIS's brains, or those that a layout of the command finds."""
    return brains.oasis(folder) or brains.studies(folder, None if any(folder.rglob("mask.nii*")) else "nonzero")


def main(words: Sequence[str] | None = None) -> int:
    """Prints the table; returns the exit code."""
    parser = runner.parser(__doc__)
    parser.add_argument("folder", type=Path, metavar="DIR")
    parser.add_argument("out", type=Path, metavar="OUT")
    parser.add_argument("--patients", type=int, default=4, help="so many of them")
    parser.add_argument("--only", default="", help="only the ways whose name holds these words")
    asked = parser.parse_args(words)

    def work() -> int:
        chosen = studies(asked.folder)[: asked.patients]
        found = {study.patient: patient(study, asked.out, asked.only) for study in chosen}
        print("\n".join(table(found)))
        return 0

    return runner.ended("measure_degraded", work)


if __name__ == "__main__":
    sys.exit(main())
