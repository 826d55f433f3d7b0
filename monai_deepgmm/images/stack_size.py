"""How much memory a patient will ask for, told by the headers before anything is read."""

from __future__ import annotations

import math

from monai_deepgmm.errors import StudyError
from monai_deepgmm.images import image_file
from monai_deepgmm.patients.study import Source, Study
from monai_deepgmm.wording import shown


def check(study: Study, sequences: tuple[str, ...], *, frame: int | None, max_voxels: int) -> None:
    """Refuses a patient whose images would be too large, together and on the reference's grid.

    Counted are the sequences and the mask on the reference's grid, and what files of another shape hold beside.

    Args:
        study: the files.
        sequences: those present, in order of reference.
        frame: which frame of a 4-D file.
        max_voxels: the most voxels.

    Raises:
        StudyError: ``E_SIZE``, or what else the headers of the files show.
    """
    files: dict[str, Source] = {s: study.images[s] for s in sequences}
    if study.mask is not None and study.mask_rule != "nonzero":
        files["mask"] = study.mask
    shapes: dict[str, tuple[int, ...]] = {}
    for name, file in files.items():
        beside = math.prod(shapes[sequences[0]][:3]) if name == "mask" else 0
        shapes[name] = image_file.shape(file, frame=frame, max_voxels=max_voxels, spacing=study.spacing, beside=beside)
    reference = (*shapes[sequences[0]], 1)[:3]
    others = {name: math.prod(shape) for name, shape in shapes.items() if (*shape, 1)[:3] != reference or shape[3:]}
    total = (len(sequences) + 1) * math.prod(reference) + sum(others.values())
    if total > max_voxels:
        largest = max(shapes, key=lambda name: math.prod(shapes[name]))
        stack = f"{len(sequences)} sequences and a mask of {' × '.join(map(str, reference))} voxels"
        stack += f", and {sum(others.values())} voxels of files of another shape" if others else ""
        message = f"{stack} are {total}, more than {max_voxels}; the largest file is {shown(files[largest].name)}"
        raise StudyError("E_SIZE", message, f"Raise --max-voxels to {total} if the images are really that large")
