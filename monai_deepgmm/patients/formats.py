"""Files that hold an image but cannot be read: other formats, and placeholders of files that were never fetched."""

from __future__ import annotations

import functools
import os
import re
from pathlib import Path
from typing import NamedTuple

from monai_deepgmm.patients.directory import READABLE
from monai_deepgmm.patients.study import Problem
from monai_deepgmm.wording import shown

_DCM2NIIX = "Convert it with dcm2niix"
_ONE_FILE = "Save both as one file (.nrrd, .mha or .nii.gz), with 3D Slicer or SimpleITK's WriteImage"
_MRTRIX = "Convert it to NIfTI, with mrconvert"
_UNPACK = "Unpack it and pack it with gzip"
_PAIR = "Join the two files into one, with fslchfiletype NIFTI_GZ or nibabel"

#: (ending of the name, error code, what it is, remedy); of two that fit, the first counts.
_KINDS: tuple[tuple[str, str, str, str], ...] = (
    (r"\.nii(\.gz)?\.(bz2|xz|zst|zip|7z|rar|gz|Z|lz4)", "E_FORMAT", "a NIfTI file packed otherwise", _UNPACK),
    (r"\.nii(\.gz)?\.dvc", "E_POINTER", "a pointer of DVC", "Fetch the file: dvc pull"),
    (r"\.nii(\.gz)?\.(part|partial|crdownload|filepart|download)", "E_FORMAT", "half a download", "Fetch it again"),
    (r"\.(nhdr|mhd)", "E_FORMAT", "a header whose voxels lie in another file", _ONE_FILE),
    (r"\.(hdr|img)(\.gz)?", "E_FORMAT", "an Analyze or NIfTI pair (.hdr and .img)", _PAIR),
    (r"\.(mgz|mgh|mgh\.gz)", "E_FORMAT", "FreeSurfer's format", "Convert it with mri_convert"),
    (r"\.(mnc|mnc\.gz)", "E_FORMAT", "MINC", "Convert it with mnc2nii"),
    (r"\.(mif|mif\.gz|mih)", "E_FORMAT", "MRtrix's format", _MRTRIX),
    (r"\.(par|rec)", "E_FORMAT", "Philips PAR/REC", _DCM2NIIX),
    (r"\.(dcm|ima|dicom)(\.gz)?", "E_DICOM", "DICOM", _DCM2NIIX),
    (r"\.(tiff?|npy|npz)", "E_FORMAT", "no medical image format", "Save it as NIfTI, with its voxel size and place"),
)
_ENDINGS = tuple((re.compile(f"{e}$", re.IGNORECASE), code, what, remedy) for e, code, what, remedy in _KINDS)

_POINTER_BYTES = 2048  # a pointer is shorter than this; an image's file is longer
_POINTERS = (
    (re.compile(rb"version https://git-lfs\.github\.com/spec/"), "Git LFS", "git lfs pull"),
    (re.compile(rb"(^|/)annex/objects/"), "git-annex", "git annex get, or datalad get"),
)


class Foreign(NamedTuple):
    """A file that holds an image in a format that is not read.

    Attributes:
        stem: its name without the ending.
        problem: what to tell of it.
    """

    stem: str
    problem: Problem


@functools.lru_cache(maxsize=1 << 16)  # each name is asked for once per layout
def foreign(name: str) -> Foreign | None:
    """What a file is by the ending of its name, if it holds an image and is not read; else None."""
    if READABLE.search(name):
        return None
    base = shown(name.rpartition("/")[2])
    for ending, code, what, remedy in _ENDINGS:
        if ending.search(name):
            problem = Problem(code, f"{base} is {what}, and is not read", f"{remedy}, and put the result in its place")
            if code == "E_POINTER" or "download" in what:
                problem = Problem(code, f"{base} is {what}, not the image", remedy)
            return Foreign(ending.sub("", name), problem)
    return None


def pointer(path: Path) -> Problem | None:
    """What stands in the place of a file that a version control system has not fetched; None where the file is there.

    A link into git-annex's store that leads nowhere, or a small text file that names what should be in its place.
    """
    try:
        if os.path.islink(path) and not path.exists():
            content = os.fsencode(os.readlink(path)).replace(b"\\", b"/")
            found = next((p for p in _POINTERS if p[1] == "git-annex" and p[0].search(content)), None)
        elif path.is_file() and path.stat().st_size < _POINTER_BYTES:
            content = path.read_bytes().replace(b"\\", b"/")
            found = next((p for p in _POINTERS if p[0].search(content)), None)
        else:
            return None
    except (OSError, ValueError):  # whoever reads it will say so
        return None
    if found is None:
        return None
    _, system, command = found
    message = f"{shown(path.name)} is a pointer of {system}: the image itself was never fetched"
    return Problem("E_POINTER", message, f"Fetch it: {command}")
