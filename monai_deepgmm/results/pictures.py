"""A patient's pictures: for print, for the viewer, for the index."""

from __future__ import annotations

import contextlib

from monai_deepgmm.errors import StudyError
from monai_deepgmm.images import labels
from monai_deepgmm.patients.study import Study
from monai_deepgmm.results import mosaic, report, sprites
from monai_deepgmm.results.segmentation import Segmentation

#: The ends of their names.
PICTURES = ("_preview.png", "_viewer.json", "_thumb.png")


def pictures(study: Study, segmentation: Segmentation) -> dict[str, bytes]:
    """End of the file's name → content.

    Args:
        study: its reference labels, where there are any that can be read, are shown beside; nothing else uses them.
        segmentation: what is drawn.
    """
    known = None
    if study.truth is not None:
        with contextlib.suppress(StudyError):  # ``evaluate`` says what is wrong with them
            sequences, like = tuple(segmentation.images), segmentation.reference
            known = labels.read(study, segmentation.protocol, sequences, like=like).labels
    box = segmentation.box(sprites.MARGINS_MM[0])
    shown = segmentation.cut(box)
    viewer = sprites.as_json(sprites.sprites(shown, None if known is None else known[box]))
    drawn = (report.preview(shown), viewer, mosaic.thumbnail(shown))
    return dict(zip(PICTURES, drawn, strict=True))
