"""Folders of empty files, and what is made of them: which files belong to which patient is told by names alone."""

from __future__ import annotations

from pathlib import Path

from monai_deepgmm import protocol
from monai_deepgmm.errors import CODES
from monai_deepgmm.patients.discovery import Cohort, Study, find

INFARCT = protocol.load("infarct")
BRAIN = protocol.load("brain")


def touch(root: Path, *names: str, content: bytes = b"") -> Path:
    """Files by their names; of a name such as ``p1/{LGE,T2}.nii`` one for each word."""
    for name in names:
        before, _, rest = name.partition("{")
        words, _, after = rest.partition("}")
        for word in words.split(","):
            path = root / f"{before}{word}{after}"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
    return root


def cohort(root: Path, *names: str, protocol=INFARCT, **options) -> Cohort:
    return find(touch(root, *names), protocol, **options)


def one(root: Path, *names: str, **options) -> Study:
    """The only patient."""
    found = cohort(root, *names, **options)
    assert len(found.studies) == 1
    return found.studies[0]


def ids(found: Cohort) -> list[str]:
    return [study.patient for study in found.studies]


def codes(study: Study) -> list[str]:
    assert all(p.code in CODES and p.message and p.remedy for p in study.problems)
    return [p.code for p in study.problems]


def all_codes(found: Cohort) -> list[list[str]]:
    return [codes(study) for study in found.studies]


def files(root: Path, study: Study) -> dict[str, str]:
    return {s: path.relative_to(root).as_posix() for s, path in study.images.items()}
