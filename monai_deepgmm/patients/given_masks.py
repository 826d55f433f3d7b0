"""The masks of a folder that ``deepgmm mask`` wrote to, in place of what the patients' own folders hold."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from monai_deepgmm.patients.study import Problem, Study
from monai_deepgmm.protocol import Protocol
from monai_deepgmm.wording import shown


def name(patient: str, protocol: Protocol) -> str:
    """What a mask's file is called: ``<patient>_desc-lv_mask.nii.gz``, or ``desc-brain`` of a brain."""
    organ = "lv" if protocol.mask == "left ventricle" else "".join(filter(str.isalnum, protocol.mask)) or "organ"
    return f"{patient}_desc-{organ}_mask.nii.gz"


def use(study: Study, folder: Path, labels: tuple[float, ...], protocol: Protocol) -> Study:
    """The study with its mask in that folder, ``<patient>/<patient>_desc-lv_mask.nii.gz`` or without the folder.

    Args:
        study: whose own mask, and what was wrong with it, no longer counts.
        folder: the masks.
        labels: the values that count; empty: all but 0.
        protocol: whose mask.
    """
    wanted = name(study.patient, protocol)
    file = next((path for path in (folder / study.patient / wanted, folder / wanted) if path.is_file()), None)
    problems = study.problems
    if file is None and not problems:
        remedy = "Write it with deepgmm mask, or draw it and give it this name"
        problems = (Problem("E_MASK_NONE", f"--masks holds no {shown(wanted)}", remedy),)
    return replace(study, mask=file, mask_labels=labels, mask_rule="file", mask_named=True, problems=problems)
