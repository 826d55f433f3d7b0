"""An infer task for MONAI Label: in an app's ``init_infers``, ``return {"deepgmm": DeepGMMInfer("infarct")}``.

MONAI Label knows one image at a time: name the reference sequence's file in the datastore, with the others and the mask
where ``deepgmm scan`` finds them (one folder per patient, BIDS, …).
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from monailabel.interfaces.tasks.infer_v2 import InferTask, InferType

from monai_deepgmm import configure, find_cohort, load_protocol, segment
from monai_deepgmm.images import nifti


class DeepGMMInfer(InferTask):  # type: ignore[misc]
    """Segments the patient to whom an image belongs.

    Args:
        protocol: infarct, brain, or a YAML file.
        root: the folder of all patients; None: the one around the patient's folder.
        given: further arguments of ``configure``, such as ``method`` or ``model``.
    """

    def __init__(self, protocol: str = "infarct", root: str | Path | None = None, **given: Any) -> None:
        self.protocol, self.root = load_protocol(protocol), root
        self.asked = configure(protocol=protocol, **given)
        labels = {tissue.name: tissue.index for tissue in self.protocol.tissues}
        super().__init__(InferType.SEGMENTATION, labels, 3, f"{self.protocol.title}, without training labels")

    def is_valid(self) -> bool:
        """There are no weights that could be missing."""
        return True

    def __call__(self, request: dict[str, Any]) -> tuple[str, dict[str, Any]]:
        """From ``{"image": path}`` to the path of a label map and what is told of it.

        Raises:
            FileNotFoundError: no patient has this image.
            StudyError: the patient cannot be segmented; the message says why.
        """
        image = Path(request["image"]).resolve()
        found = find_cohort(Path(self.root) if self.root else image.parents[1], self.protocol)
        owners = [study for study in found.studies if image in {path.resolve() for path in study.images.values()}]
        if not owners:
            raise FileNotFoundError(f"{image.name} belongs to no patient that deepgmm scan finds")
        result = segment(owners[0], self.asked)
        path = Path(tempfile.mkdtemp()) / "labels.nii.gz"
        nifti.write_labels(path, result.labels, like=result.reference)
        return str(path), {"label_names": dict(self.labels), "warnings": list(result.warnings)}
