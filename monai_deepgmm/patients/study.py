"""One patient's files, and what is known against them. A study is paths until it is loaded."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple, Self

from monai_deepgmm.patients.spacing import Spacing
from monai_deepgmm.patients.stack import Series, Stack

#: What an image is read from: a file, or slices of a DICOM study.
Source = Path | Stack


@dataclass(frozen=True)
class Problem:
    """Why a patient cannot be segmented, known from the files' names alone.

    Attributes:
        code: one of ``errors.CODES``.
        message: what was found.
        remedy: what the user can do about it.
    """

    code: str
    message: str
    remedy: str = ""


class Meanings(NamedTuple):
    """What the values of reference labels mean, in a protocol's tissues, where somebody or something says so.

    Attributes:
        tissues: value → index of the tissue.
        others: value → a name that is no tissue of the protocol, and is worth telling.
        elsewhere: values that are known to be something else, such as the background.
        source: where it stands.
        problem: why the values cannot be understood; None where they can.
    """

    tissues: Mapping[int, int]
    others: Mapping[int, str]
    elsewhere: frozenset[int]
    source: str
    problem: Problem | None = None


@dataclass(frozen=True)
class MaskModel:
    """A MONAI bundle that finds the mask, by its folder; other processes are sent no weights.

    Attributes:
        folder: absolute.
        sha256: of its configuration and weights.
        sequence: that it looks at.
        labels: of its output that make up the mask.
        trusted: whether its configuration is a stranger's code, which the user trusts.
    """

    folder: Path
    sha256: str
    sequence: str
    labels: tuple[int, ...]
    trusted: bool = False

    def as_json(self) -> dict[str, Any]:
        """For sidecars: all but where the folder lies, which cannot change a label."""
        told = {"bundle": self.folder.name, "model_sha256": self.sha256, "sequence": self.sequence}
        return told | {"labels": list(self.labels)} | ({"trust_code": True} if self.trusted else {})


@dataclass(frozen=True)
class Study:
    """The files of one patient.

    Attributes:
        patient: the id, byte for byte as found.
        images: sequence → file or DICOM stack, in the protocol's order of reference.
        mask: the mask's file; None with another ``mask_rule``, or when there is none.
        mask_labels: which values of the mask's file count; empty: every value but 0.
        mask_rule: "file"; "nonzero" for the voxels of the reference sequence that are not 0; "auto" for what is found
            from the images; "model" for what ``mask_model`` finds.
        mask_named: whether the user named this very file.
        truth: the file with the reference labels, for evaluation and means only.
        truth_labels: value in the truth's file → index of the protocol's tissue; empty: values are the indices.
        spacing: which voxel sizes count in a header that contradicts itself.
        truth_names: what was said of these values beside the layout; None: nothing.
        problems: why it cannot be segmented; empty when it can be tried.
        label_problems: why the reference labels cannot be used; they do not stop a segmentation.
        mask_model: the bundle that finds the mask, with that rule.
        series: what was made of each series of a DICOM study.
        unused: names of files beside the images that no name of the layout fits.
        overlooked: "mask", or a sequence that is missing → what to do if an unused file is that.
    """

    patient: str
    images: Mapping[str, Source]
    mask: Path | None = None
    mask_labels: tuple[float, ...] = ()
    mask_rule: str = "file"
    mask_named: bool = False
    truth: Path | None = None
    truth_labels: Mapping[int, int] | None = None
    spacing: Spacing = None
    truth_names: Meanings | None = None
    problems: tuple[Problem, ...] = ()
    label_problems: tuple[Problem, ...] = ()
    mask_model: MaskModel | None = None
    series: tuple[Series, ...] = ()
    unused: tuple[str, ...] = ()
    overlooked: Mapping[str, str] = field(default_factory=dict)

    def with_whole_paths(self) -> Self:
        """The same for a process with another working directory."""

        def whole(path: Path | None) -> Path | None:
            return path if path is None else Path(os.path.abspath(path))  # not resolved: links keep their names

        images = {
            sequence: source.with_whole_paths() if isinstance(source, Stack) else Path(os.path.abspath(source))
            for sequence, source in self.images.items()
        }
        return replace(self, images=images, mask=whole(self.mask), truth=whole(self.truth))


@dataclass(frozen=True)
class Cohort:
    """The patients of a folder or manifest.

    Attributes:
        root: the folder.
        layout: the layout's name, or "manifest".
        studies: sorted by patient id.
        notes: what else the user should know about the choice of the layout.
    """

    root: Path
    layout: str
    studies: tuple[Study, ...]
    notes: tuple[str, ...] = ()
