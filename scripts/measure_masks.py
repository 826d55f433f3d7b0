"""How many right masks are flagged, and how many spoiled ones are not.

``python scripts/measure_masks.py DIR [--protocol NAME] [--layout NAME] [--mask nonzero]`` loads each patient of DIR, as
``deepgmm segment`` would, spoils its mask in each of several ways, and prints of each way how many are refused or
flagged, and by which codes. Nothing is fitted, and reference labels are used for the right mask alone.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import binary_dilation, binary_erosion, generate_binary_structure

from monai_deepgmm import protocol
from monai_deepgmm.errors import StudyError
from monai_deepgmm.images import background, grid, loading, mask_edges, mask_examination
from monai_deepgmm.images.loading import Scan
from monai_deepgmm.patients import discovery
from monai_deepgmm.protocol import Protocol

Bools = NDArray[np.bool_]


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
    edges = mask_edges.about(scan.image, examined.mask, spacing, grid.slice_axis(spacing), wanted)
    rest = background.about_rest(scan.reference, examined.mask, wanted)
    yield from (note.split(":")[0] for note in (*examined.warnings, *edges, *rest))
    if (mask & (scan.image == 0).all(0)).mean() > 0:
        yield "W_MASK_PADDING"


def main(arguments: list[str] | None = None) -> int:
    """Prints the table; 2 if no patient could be loaded."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("DIR", type=Path)
    parser.add_argument("--protocol", default="infarct")
    parser.add_argument("--layout")
    parser.add_argument("--mask", choices=["nonzero"])
    options = parser.parse_args(arguments)
    wanted = protocol.load(options.protocol)
    found: dict[str, list[set[str]]] = {}
    for study in discovery.find(options.DIR, wanted, layout=options.layout, mask=options.mask).studies:
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
