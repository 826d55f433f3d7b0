"""How many right masks are flagged, and how many spoiled ones are not.

``python scripts/measure_masks.py DIR [--protocol NAME] [--layout NAME] [--mask nonzero]`` loads each patient of DIR, as
``deepgmm segment`` would, spoils its mask in each of several ways, and prints of each way how many are refused or
flagged, and by which codes. Nothing is fitted, and reference labels are used for the right mask alone.

``python scripts/measure_masks.py DIR --copies [--patients 5]`` finds the ventricle in mirrored, transposed, turned,
cropped and padded copies of patients spread over DIR, and prints how well these masks agree with the image's own.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import binary_dilation, binary_erosion, generate_binary_structure

from monai_deepgmm import protocol
from monai_deepgmm.errors import StudyError
from monai_deepgmm.images import background, grid, loading, mask_cavities, mask_edges, mask_examination
from monai_deepgmm.images.loading import Scan
from monai_deepgmm.localisation import ventricle
from monai_deepgmm.patients import discovery
from monai_deepgmm.patients.study import Study
from monai_deepgmm.protocol import Protocol

Bools = NDArray[np.bool_]
Floats = NDArray[np.floating[Any]]


def ways(scan: Scan, wanted: Protocol) -> dict[str, Callable[[Bools], Bools]]:
    """What is done to a mask → how."""
    spacing = np.array(scan.reference.spacing_mm)
    axis = grid.slice_axis(scan.reference.spacing_mm)
    plane = [i for i in range(3) if i != axis]
    cross = generate_binary_structure(3, 1)
    if wanted.unit == "slice":
        cross = cross & np.expand_dims(np.array([False, True, False]), plane)

    def moved(mask: Bools, mm: float) -> Bools:
        steps = [round(mm / 2**0.5 / spacing[i]) for i in plane]
        return np.roll(mask, steps, plane)

    def halved(mask: Bools, along: int) -> Bools:
        index = np.arange(mask.shape[along]) < np.argwhere(mask)[:, along].mean()
        return mask & np.expand_dims(index, [i for i in range(3) if i != along])

    def sliced(mask: Bools) -> Bools:
        index = np.arange(mask.shape[plane[0]]) * spacing[plane[0]] % 20 < 14
        return mask & np.expand_dims(index, [i for i in range(3) if i != plane[0]])

    return {
        "right": lambda m: m,
        "dilated by 2 voxels": lambda m: binary_dilation(m, cross, iterations=2),
        "dilated by 3 voxels": lambda m: binary_dilation(m, cross, iterations=3),
        "eroded by 3 voxels": lambda m: binary_erosion(m, cross, iterations=3),
        "left half": lambda m: halved(m, plane[0]),
        "front half": lambda m: halved(m, plane[1]),
        "moved by 5 mm": lambda m: moved(m, 5),
        "moved by 8 mm": lambda m: moved(m, 8),
        "twice, 40 mm apart": lambda m: m | moved(m, 40),
        "in pieces": sliced,
        "a ring": lambda m: m & ~binary_erosion(m, cross, iterations=max(1, round(10 / spacing[plane[0]]))),
    }


def codes(scan: Scan, mask: Bools, wanted: Protocol) -> Iterator[str]:
    """What is said of a mask, by codes."""
    spacing = scan.reference.spacing_mm
    try:
        examined = mask_examination.examine(mask, scan.reference, wanted)
        background.refuse_head(scan.reference.data, examined.mask, scan.reference, wanted)
    except StudyError as error:
        yield error.code
        return
    about = (scan.image, examined.mask, spacing, grid.slice_axis(spacing), wanted)
    edges = [*mask_edges.about(*about), *mask_cavities.about(*about, scan.sequences)]
    rest = background.about_rest(scan.reference, examined.mask, wanted)
    yield from (note.split(":")[0] for note in (*examined.warnings, *edges, *rest))
    if (mask & (scan.image == 0).all(0)).mean() > 0:
        yield "W_MASK_PADDING"


def copies(scan: Scan, wanted: Protocol) -> Iterator[tuple[str, float]]:
    """What is done to an image → the Dice of the mask found in it, brought back, and of that in the image as it is."""
    image, spacing = scan.image, scan.reference.spacing_mm
    find = ventricle.find_by
    found = find(image, wanted, scan.sequences, spacing).mask
    axis = grid.slice_axis(spacing)
    a, b = (i for i in range(3) if i != axis)
    order = [b, axis, a]
    points = np.argwhere(found)
    least, most = points.min(0), points.max(0) + 1
    room = np.ceil(0.1 * (most - least)).astype(int)  # 1.2 times as wide as the organ
    room[axis] = max(found.shape)
    crop = tuple(slice(max(lo - r, 0), hi + r) for lo, hi, r in zip(least, most, room, strict=True))
    wide = [(37, 11) if i == a else (5, 60) if i == b else (0, 0) for i in range(3)]
    inner = tuple(slice(lo, lo + n) for (lo, _), n in zip(wide, found.shape, strict=True))
    turns: dict[str, tuple[Floats, list[int], Callable[[Bools], Bools], Bools]] = {
        "mirrored": (np.flip(image, a + 1), [0, 1, 2], lambda m: np.flip(m, a), found),
        "transposed": (image.transpose(0, *(i + 1 for i in order)), order, lambda m: m, found.transpose(order)),
        "turned": (np.flip(image, (1, 2, 3)), [0, 1, 2], np.flip, found),
        "cropped": (image[(slice(None), *crop)], [0, 1, 2], lambda m: m, found[crop]),
        "padded": (np.pad(image, [(0, 0), *wide]), [0, 1, 2], lambda m: m[inner], found),
    }
    for name, (other, axes, back, same) in turns.items():
        mask = back(find(other, wanted, scan.sequences, [spacing[i] for i in axes]).mask)
        yield name, 2 * float((mask & same).sum()) / float(mask.sum() + same.sum())


def table_of_copies(studies: Sequence[Study], wanted: Protocol) -> int:
    """Prints one row for each patient; the exit code."""
    if wanted.mask_finder != "ventricle":
        print(f"protocol {wanted.name} finds no ventricle", file=sys.stderr)
        return 2
    rows = {study.patient: dict(copies(loading.load(study, wanted), wanted)) for study in studies}
    names = list(next(iter(rows.values()), {}))
    print(f"| patient | {' | '.join(names)} |\n|---|{'---|' * len(names)}")
    for patient, row in rows.items():
        print(f"| {patient} | {' | '.join(f'{row[name]:.3f}' for name in names)} |")
    return 0 if rows else 2


def main(arguments: list[str] | None = None) -> int:
    """Prints the table; 2 if no patient could be loaded."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("DIR", type=Path)
    parser.add_argument("--protocol", default="infarct")
    parser.add_argument("--layout")
    parser.add_argument("--mask", choices=["nonzero"])
    parser.add_argument("--copies", action="store_true", help="find the ventricle in copies instead")
    parser.add_argument("--patients", type=int, default=5, help="of how many patients, with --copies")
    options = parser.parse_args(arguments)
    wanted = protocol.load(options.protocol)
    studies = discovery.find(options.DIR, wanted, layout=options.layout, mask=options.mask).studies
    if options.copies:
        return table_of_copies(studies[:: max(len(studies) // options.patients, 1)][: options.patients], wanted)
    found: dict[str, list[set[str]]] = {}
    for study in studies:
        try:
            scan = loading.load(study, wanted)
        except StudyError as error:
            print(f"left out: {study.patient}: {error.code}", file=sys.stderr)
            continue
        for name, way in ways(scan, wanted).items():
            if (spoiled := way(scan.mask)).any():
                found.setdefault(name, []).append(set(codes(scan, spoiled, wanted)))
    print("| mask | flagged or refused | by |\n|---|---|---|")
    for name, each in found.items():
        counts = Counter(code for one in each for code in sorted(one))
        by = ", ".join(f"{code} {n}" for code, n in counts.most_common())
        print(f"| {name} | {sum(map(bool, each))} of {len(each)} | {by} |")
    return 0 if found else 2


if __name__ == "__main__":
    sys.exit(main())
